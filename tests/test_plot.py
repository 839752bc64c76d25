"""Figures: what is drawn is what was computed, and nothing is cut off."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from helpers.errors import explains
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from fmfa_losses import FMFALoss, plot
from fmfa_losses.plot.figure import BLUE, GREEN, ORANGE, VERMILION

GRID = (6, 2)
LONG_TOKEN = "incomprehensibilities</w>"


@pytest.fixture
def image():
    return torch.rand(3, 48, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def similarity():
    return torch.randn(3, 12, generator=torch.Generator().manual_seed(1))


def weights(similarity: torch.Tensor, sparsity: float) -> np.ndarray:
    """Eq. 5-7, row by row."""
    rows = []
    for s in similarity.double().numpy():
        n = (s - s.min()) / (s.max() - s.min())
        m = np.where(n >= sparsity, n, 0)
        rows.append(m / m.sum())
    return np.stack(rows)


def assert_all_text_is_whole(figure):
    """Whatever is drawn lies inside the figure, and no two texts lie on each other."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn, size = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= size[0] and drawn.y1 <= size[1], (drawn, size)
    labels = [*figure.texts]
    for axes in figure.axes:
        labels += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
    boxes = [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in labels if t.get_text()]
    for i, (text, box) in enumerate(boxes):
        for other, other_box in boxes[i + 1 :]:
            assert not box.padded(-1).overlaps(other_box.padded(-1)), (text, other)


def panels(figure, label):
    return [axes for axes in figure.axes if axes.get_xlabel() == label]


# --- similarity maps


def test_similarity_maps_draw_the_map_before_and_after(image, similarity):
    figure = plot.similarity_maps(image, similarity, tokens=["red</w>", "shirt", "bag"], grid=GRID, sparsity=0.4)
    assert [text.get_text() for text in figure.texts] == ["red", "shirt", "bag"]
    assert len(panels(figure, "image")) == 1
    np.testing.assert_allclose(panels(figure, "image")[0].images[0].get_array(), image.permute(1, 2, 0), atol=1e-7)

    a = weights(similarity, 0.4)
    low, high = similarity.amin(1, keepdim=True), similarity.amax(1, keepdim=True)
    n = ((similarity - low) / (high - low)).numpy()
    before, after = panels(figure, "before"), panels(figure, "after")
    assert len(before) == len(after) == 3
    for i in range(3):
        np.testing.assert_allclose(before[i].images[1].get_array(), n[i].reshape(GRID), atol=1e-6)
        drawn = after[i].images[1].get_array()
        np.testing.assert_array_equal(np.ma.getmaskarray(drawn), (a[i] == 0).reshape(GRID))  # the bare image
        np.testing.assert_allclose(drawn.filled(0), 12 * a[i].reshape(GRID), atol=1e-6)
        assert after[i].images[1].get_clim() == pytest.approx((0, 12 * a.max()))
        assert before[i].images[1].get_clim() == (0, 1)
        # The map covers the image exactly.
        assert before[i].images[1].get_extent() == [-0.5, 15.5, 47.5, -0.5]
    bars = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert bars == ["before: normalised similarity", "after: weight × N"]


def test_default_threshold_is_one_patch(image, similarity):
    figure = plot.similarity_maps(image, similarity[:1], tokens=["red"], grid=GRID)
    a = weights(similarity[:1], 1 / 12)
    drawn = panels(figure, "after")[0].images[1].get_array().filled(0)
    np.testing.assert_allclose(drawn, 12 * a[0].reshape(GRID), atol=1e-6)


def test_constant_similarity_is_uniform(image):
    figure = plot.similarity_maps(image, torch.zeros(1, 12), tokens=["red"], grid=GRID)
    np.testing.assert_allclose(panels(figure, "after")[0].images[1].get_array(), np.ones(GRID))


def test_tokens_wrap_into_rows_and_none_is_cut_off(image):
    tokens = [LONG_TOKEN, "$5", "red", "shirt", "bag", LONG_TOKEN, "a_b^c"]
    figure = plot.similarity_maps(image, torch.randn(7, 12), tokens=tokens, grid=GRID)
    assert len(panels(figure, "image")) == 2
    assert "".join(figure.texts[0].get_text().split("\n")) == LONG_TOKEN.removesuffix("</w>")
    assert figure.texts[1].get_text() == "$5"
    assert_all_text_is_whole(figure)


# --- aggregated patches


def test_aggregated_patches_show_kept_and_heaviest(image):
    similarity = torch.zeros(1, 12)
    similarity[0, [0, 5, 11]] = torch.tensor([1.0, 0.6, 0.4])
    figure = plot.aggregated_patches(image, similarity, tokens=["red"], grid=GRID, sparsity=0.3, share=0.5)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "3 of 12 kept\n50 % in 1"
    shown, original = axes.images[0].get_array(), image.permute(1, 2, 0).numpy()
    kept = np.zeros((48, 16), bool)
    for patch in (0, 5, 11):
        row, column = divmod(patch, 2)
        kept[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = True
    np.testing.assert_allclose(shown[kept], original[kept], atol=1e-7)
    assert (shown[~kept] >= 0.88).all()
    # The first patch alone is outlined: pixels 0-8 in both directions.
    corners = np.concatenate(axes.collections[-1].get_segments())
    assert sorted(set(map(tuple, corners.tolist()))) == [(-0.5, -0.5), (-0.5, 7.5), (7.5, -0.5), (7.5, 7.5)]


@pytest.mark.parametrize(("share", "needed"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.81, 3), (1.0, 3)])
def test_share_takes_the_fewest_patches(image, share, needed):
    similarity = torch.zeros(1, 12)
    similarity[0, [0, 5, 11]] = torch.tensor([1.0, 0.6, 0.4])  # 50 %, 30 %, 20 % of the weight
    figure = plot.aggregated_patches(image, similarity, tokens=["red"], grid=GRID, sparsity=0.3, share=share)
    assert figure.axes[0].get_xlabel().endswith(f"in {needed}")


def test_aggregated_patches_are_not_cut_off(image):
    tokens = [LONG_TOKEN, *"abcdefgh", "photograph"]
    figure = plot.aggregated_patches(image, torch.randn(10, 12), tokens=tokens, grid=GRID)
    assert len(figure.axes) == 10
    assert_all_text_is_whole(figure)


# --- A-SDM weights


def test_asdm_weights_are_those_of_the_equation():
    generator = torch.Generator().manual_seed(0)
    image_features = torch.randn(16, 8, generator=generator)
    text_features = image_features + torch.randn(16, 8, generator=generator)
    figure = plot.asdm_weights(image_features, text_features, temperature=0.1, alpha=3.0, named=2)
    image_features, text_features = (
        torch.nn.functional.normalize(x.double(), dim=1) for x in (image_features, text_features)
    )
    for axes, name, a, b in zip(
        figure.axes,
        ("t2i", "i2t"),
        (text_features, image_features),
        (image_features, text_features),
        strict=True,
    ):
        expected = []
        for i in range(16):
            p = (a[i] @ b.T / 0.1).softmax(0)
            expected.append(1 + 3 * (p.max() - p[i]).item())
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == pytest.approx(sorted(expected, reverse=True))
        colours = [to_hex(bar.get_facecolor()).upper() for bar in axes.patches]
        harder = sum(w > 1 for w in expected)
        assert 0 < harder < 16
        assert colours == [ORANGE] * harder + [BLUE] * (16 - harder)
        heaviest = sorted(range(16), key=lambda i: -expected[i])[:2]
        assert axes.get_title() == (
            f"{name}: {harder} of 16 pairs pulled harder\nheaviest: {heaviest[0]}, {heaviest[1]}"
        )
        assert axes.lines[0].get_ydata()[0] == pytest.approx(sum(expected) / 16)
    assert figure.axes[0].get_ylabel() == "weight 1 + 3 · gap"
    assert_all_text_is_whole(figure)


def test_a_batch_that_ranks_itself_first_has_weight_one():
    figure = plot.asdm_weights(torch.eye(4), torch.eye(4))
    assert figure.axes[0].get_title() == "t2i: 0 of 4 pairs pulled harder\nheaviest: none"
    assert [bar.get_height() for bar in figure.axes[0].patches] == [1.0] * 4


# --- strips


def frame(axes) -> Rectangle:
    (rectangle,) = (patch for patch in axes.patches if isinstance(patch, Rectangle))
    return rectangle


def test_strips_frame_right_green_and_wrong_red():
    images = torch.rand(2, 3, 3, 48, 16)
    correct = [[True, False, True], [False, False, True]]
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]])
    caption = "a woman in a long red coat " * 12
    figure = plot.retrieval_strips([caption, "a man"], images, scores, correct)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "0.900",
        "0.800",
        "0.700",
        "0.600",
        "0.500",
        "0.400",
    ]
    for axes, right, picture in zip(figure.axes, [*correct[0], *correct[1]], images.flatten(0, 1), strict=True):
        assert to_hex(frame(axes).get_edgecolor()).upper() == (GREEN if right else VERMILION)
        assert (frame(axes).get_linestyle() in ("-", "solid")) == right
        assert [text.get_text() for text in axes.texts] == ["✓" if right else "✗"]
        np.testing.assert_allclose(axes.images[0].get_array(), picture.permute(1, 2, 0), atol=1e-7)
    # Best first, from left to right, and below the other caption's strip.
    lefts = [axes.get_position().x0 for axes in figure.axes]
    assert lefts[:3] == sorted(lefts[:3]) and lefts[:3] == pytest.approx(lefts[3:])
    assert figure.axes[0].get_position().y0 > figure.axes[3].get_position().y1
    assert " ".join(figure.texts[0].get_text().split()) == caption.strip()
    assert_all_text_is_whole(figure)


def test_captions_do_not_reach_the_images():
    figure = plot.retrieval_strips(["w" * 34 + " " + "m" * 30], torch.rand(1, 1, 3, 48, 16), [[0.5]], [[True]])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    caption = figure.texts[0].get_window_extent(canvas.get_renderer())
    assert caption.x1 <= figure.axes[0].get_window_extent().x0


# --- curves


def test_curves_draw_raw_and_smoothed():
    figure = plot.loss_curves({"efa": [4.0, 2.0, 0.0], "asdm": [1.0, 1.0, 1.0]}, smoothing=0.5)
    assert [axes.get_title() for axes in figure.axes] == ["efa", "asdm"]
    raw, smoothed = figure.axes[0].lines
    assert raw.get_ydata().tolist() == [4.0, 2.0, 0.0]
    assert raw.get_xdata().tolist() == [1, 2, 3]
    # Weighted means with weights 1; 1/2, 1; 1/4, 1/2, 1.
    assert smoothed.get_ydata().tolist() == pytest.approx([4.0, 4 / 1.5, 2 / 1.75])
    assert smoothed.get_zorder() >= raw.get_zorder() and raw.get_alpha() < 1
    assert figure.axes[1].lines[1].get_ydata().tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert_all_text_is_whole(figure)


def test_curves_take_one_mapping_a_step_and_tensors():
    steps = [{"id": torch.tensor(2.0), "efa": 1.0}, {"id": torch.tensor(1.0), "efa": 3.0}]
    figure = plot.loss_curves(steps, smoothing=0)
    assert [axes.lines[0].get_ydata().tolist() for axes in figure.axes] == [[2.0, 1.0], [1.0, 3.0]]


def test_curves_take_the_terms_of_fmfa_loss():
    objective = FMFALoss(64, 4, vocab_size=10, irr={"depth": 1})
    image, text = torch.randn(4, 12, 64, requires_grad=True), torch.randn(4, 7, 64)
    terms = objective(image.mean(1), text.mean(1), image, text, torch.arange(4)).terms
    assert all(term.requires_grad for term in terms.values())
    for history in ([terms, terms], {name: [term, term] for name, term in terms.items()}):
        figure = plot.loss_curves(history)  # a warning would be an error here
        assert [axes.get_title() for axes in figure.axes] == list(terms)
    plot.loss_curves({"efa": torch.ones(3, requires_grad=True), 1: np.ones(3)})


def test_curves_do_not_hide_a_nan():
    figure = plot.loss_curves({"efa": [1.0, float("nan"), 3.0, float("inf")]}, smoothing=0.5)
    (axes,) = figure.axes
    assert axes.get_title() == "efa (2 of 4 steps not finite)"
    marks = [line.get_xdata()[0] for line in axes.lines if to_hex(line.get_color()).upper() == VERMILION]
    assert marks == [2, 4]
    assert axes.lines[1].get_ydata().tolist() == pytest.approx([1.0, 1.0, 3.5 / 1.5, 3.5 / 1.5])


# --- images, errors, imports


@pytest.mark.parametrize("form", ["uint8 tensor", "array", "pil", "float16", "bfloat16", "float64 with gradient"])
def test_images_in_every_form(form):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 16, 3), dtype=np.uint8)
    if form == "uint8 tensor":
        picture = torch.from_numpy(pixels).permute(2, 0, 1)
    elif form == "array":
        picture = pixels
    elif form == "pil":
        picture = pytest.importorskip("PIL.Image", reason="pillow is not installed").fromarray(pixels)
    else:
        picture = (torch.from_numpy(pixels).permute(2, 0, 1) / 255).to(getattr(torch, form.split()[0]))
        picture.requires_grad_("gradient" in form)
    atol = 2**-9 if form == "bfloat16" else 1e-3
    for figure in (
        plot.similarity_maps(picture, torch.randn(1, 12), tokens=["red"], grid=GRID),
        plot.retrieval_strips(["red"], [[picture]], torch.tensor([[0.5]]), [[True]]),
    ):
        np.testing.assert_allclose(figure.axes[0].images[0].get_array(), pixels / 255, atol=atol)
    plot.aggregated_patches(picture, torch.randn(1, 12), tokens=["red"], grid=GRID)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, s: plot.similarity_maps(i, s, tokens=["a"], grid=GRID), "one row per token"),
        (
            lambda i, s: plot.similarity_maps(i, s, tokens=["a"] * 3),
            "grid must hold all N patches, got 24 x 8",
        ),
        (lambda i, s: plot.similarity_maps(i, s[:0], tokens=[], grid=GRID), "must not be empty"),
        (
            lambda i, s: plot.similarity_maps(3 * i - 1, s, tokens=["a"] * 3, grid=GRID),
            "undo the normalisation",
        ),
        (
            lambda i, s: plot.similarity_maps(i[None], s, tokens=["a"] * 3, grid=GRID),
            "drop the batch dimension",
        ),
        (lambda i, s: plot.aggregated_patches(i, s, tokens=["a"] * 3, grid=GRID, share=0), "share must be"),
        (lambda i, s: plot.asdm_weights(torch.eye(3), torch.eye(4)), "must agree in B"),
        (lambda i, s: plot.asdm_weights(s, s, temperature=0), "temperature must be"),
        (
            lambda i, s: plot.retrieval_strips(["a"], [[i]], [[0.1, 0.2]], [[True]]),
            r"scores must have .* \[1, 1\]",
        ),
        (lambda i, s: plot.retrieval_strips(["a"], [[i], [i]], [[0.1]], [[True]]), "images must have"),
        (lambda i, s: plot.retrieval_strips([], [], [], []), "images must have"),
        (lambda i, s: plot.loss_curves({"a": [1.0], "b": []}), "as many for every term"),
        (lambda i, s: plot.loss_curves([]), "at least one step"),
        (lambda i, s: plot.loss_curves([{"a": 1.0}, {"b": 1.0}]), "same terms"),
        (lambda i, s: plot.loss_curves({"a": [1.0]}, smoothing=1), "smoothing must be"),
        (lambda i, s: plot.loss_curves({"a": [1.0]}, smoothing="a"), "smoothing must be"),
        (lambda i, s: plot.loss_curves({"a": ["x"]}), "one number per step for 'a'"),
        (lambda i, s: plot.loss_curves({"a": [torch.ones(2)]}), "one number per step for 'a'"),
        (lambda i, s: plot.loss_curves({"a": torch.ones(2, 2)}), "one number per step for 'a'"),
        (lambda i, s: plot.loss_curves({"a": torch.tensor(1.0)}), "one number per step for 'a'"),
        (lambda i, s: plot.loss_curves([1.0]), "one mapping per step, got float 1.0"),
        (lambda i, s: plot.similarity_maps(i, s, tokens=["a"] * 3, grid=GRID, tokens_per_row=0), "tokens_per_row must"),
        (lambda i, s: plot.aggregated_patches(i, s, tokens=["a"] * 3, grid=GRID, tokens_per_row=-1), "tokens_per_row"),
        (lambda i, s: plot.aggregated_patches(i, s, tokens=["a"] * 3, grid=GRID, tokens_per_row="2"), "tokens_per_row"),
        (lambda i, s: plot.aggregated_patches(i, s, tokens=["a"] * 3, grid=(-6, -2)), "rows of grid must"),
        (lambda i, s: plot.aggregated_patches(i, s, tokens=["a"] * 3, grid=(6.0, 2)), "rows of grid must"),
        (lambda i, s: plot.aggregated_patches(i, s, tokens=["a"] * 3, grid=12), "grid must be"),
        (lambda i, s: plot.aggregated_patches(i, s, tokens=["a"] * 3, grid=GRID, share="a"), "share must be"),
        (lambda i, s: plot.aggregated_patches(i, s, tokens="abc", grid=GRID), "tokens must be a sequence of texts"),
        (lambda i, s: plot.aggregated_patches(i, s, tokens=[1, 2, 3], grid=GRID), "tokens must be a sequence of texts"),
        (lambda i, s: plot.similarity_maps("a.png", s, tokens=["a"] * 3, grid=GRID), "PIL.Image.open"),
        (lambda i, s: plot.similarity_maps(None, s, tokens=["a"] * 3, grid=GRID), "picture as numbers"),
        (lambda i, s: plot.similarity_maps(i + 0j, s, tokens=["a"] * 3, grid=GRID), "picture as numbers"),
        (lambda i, s: plot.similarity_maps(i[:, :0], s, tokens=["a"] * 3, grid=GRID), "must not be empty"),
        (lambda i, s: plot.asdm_weights(s, s, alpha=float("nan")), "alpha must be"),
        (lambda i, s: plot.asdm_weights(s, s, alpha="10"), "alpha must be"),
        (lambda i, s: plot.asdm_weights(s, s, named=-1), "named must be"),
        (lambda i, s: plot.retrieval_strips("a", [[i]], [[0.1]], [[True]]), "queries must be"),
        (lambda i, s: plot.retrieval_strips(["a", "b"], [[i], [i]], [[0.1], []], [[True]] * 2), "scores must have"),
    ],
)
def test_bad_input_says_what_to_mend(image, similarity, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(image, similarity)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(0, 0), (slice(None), slice(None))])
def test_what_is_not_finite_is_not_drawn_as_something_else(image, similarity, value, where):
    similarity[where] = value
    count = int((~similarity.isfinite()).sum())
    options = {"tokens": ["a"] * 3, "grid": GRID}
    for call in (
        lambda: plot.similarity_maps(image, similarity, **options),
        lambda: plot.aggregated_patches(image, similarity, **options),
        lambda: plot.asdm_weights(similarity, torch.ones_like(similarity)),
        lambda: plot.asdm_weights(torch.ones_like(similarity), similarity),
    ):
        with explains(ValueError, "finite", f"{count} of 36"):
            call()


def test_matplotlib_is_imported_by_the_functions_alone():
    code = """
import sys
import fmfa_losses, fmfa_losses.plot
assert "matplotlib" not in sys.modules
import torch
fmfa_losses.plot.loss_curves({"a": [1.0, 2.0]})
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "fmfa-losses\[plot\]"'):
        plot.loss_curves({"a": [1.0]})


def test_global_style_is_left_alone(image, similarity):
    def style():
        return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}

    before = style()
    plot.similarity_maps(image, similarity, tokens=["a", "b", "c"], grid=GRID).canvas.draw()
    assert style() == before
