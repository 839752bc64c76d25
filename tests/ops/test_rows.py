"""Both similarities of EFA in PyTorch, on rows of kept tokens: every pattern of masks, any length, small tiles."""

import pytest
import torch
from helpers.compare import assert_close, relative_error, value_and_grads

from fmfa_losses.functional import efa_loss, hard_similarity
from fmfa_losses.ops.aggregation import aggregate, sparse_aggregate_reference
from fmfa_losses.ops.alignment import alignment_rows_op, alignment_similarities
from fmfa_losses.ops.hard_similarity import hard_similarity_reference
from fmfa_losses.ops.rows import aggregation, bfloat16, layout, match

B, N, L, D = 11, 13, 9, 24


def lengths(most):
    return torch.arange(most) < torch.randint(0, most + 1, (B, 1))


def scattered(most):
    return torch.rand(B, most) > 0.6


def some_empty(most):
    return scattered(most) & (torch.arange(B) % 3 > 0).unsqueeze(1)


def nothing(most):
    return torch.zeros(B, most, dtype=torch.bool)


def one_token(most):
    return torch.arange(most) == torch.randint(0, most, (B, 1))


MASKS = {"none": lambda most: None, **{f.__name__: f for f in (lengths, scattered, some_empty, nothing, one_token)}}


@pytest.fixture(params=["tiles of the CPU", "small tiles", "as on an accelerator"])
def path(request, monkeypatch):
    if request.param == "small tiles":
        for module, name, value in (
            (match, "COLUMNS", 8), (match, "ROWS", 16), (match, "MATCHES", 40), (match, "TOKENS", 20),
            (aggregation, "SAMPLES", 3),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, (value, value))
        monkeypatch.setattr(match, "SAMPLES", 2)
    if request.param == "as on an accelerator":  # where the host does not read the masks
        monkeypatch.setattr(layout, "on_cpu", lambda x: False)


def similarities(image_mask, text_mask, **options):
    options = {"sparsity": None, "pool": "lse", "pool_scale": 2.0, "backend": "torch"} | options
    return lambda image, text: torch.stack(alignment_similarities(image, text, image_mask, text_mask, **options))


def reference(image_mask, text_mask, pool="lse"):
    def both(image, text):
        joint = sparse_aggregate_reference(image, text, image_mask=image_mask)
        options = {"e_mask": text_mask, "pool": pool, "pool_scale": 2.0}
        of_text = hard_similarity_reference(text, joint, x_mask=text_mask, **options)
        return torch.stack([of_text, hard_similarity_reference(image, joint, x_mask=image_mask, **options)])

    return both


@pytest.mark.parametrize("image_mask", ["none", "scattered", "some_empty", "nothing"])
@pytest.mark.parametrize("text_mask", MASKS)
def test_every_pattern_of_masks(path, text_mask, image_mask):
    """What is left out may hold anything."""
    image, text = (torch.randn(B, n, D, dtype=torch.float64) for n in (N, L))
    masks = MASKS[image_mask](N), MASKS[text_mask](L)
    expected = value_and_grads(reference(*masks), (image, text))
    for x, mask in zip((image, text), masks, strict=True):
        if mask is not None:
            x[~mask] = torch.nan
    assert_close(value_and_grads(similarities(*masks), (image, text)), expected, 1e-12)


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_every_pool(path, pool):
    image, text = (torch.randn(B, n, D, dtype=torch.float64) for n in (N, L))
    masks = scattered(N), some_empty(L)
    expected = value_and_grads(reference(*masks, pool), (image, text))
    assert_close(value_and_grads(similarities(*masks, pool=pool), (image, text)), expected, 1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1e-30, 1e-15, 1e15, 1e30])
def test_rows_of_any_length(path, length, masked):
    """Only the cosine counts, so the gradient of tokens that are c times as long is 1 / c of what it was.

    The aggregation multiplies raw tokens, so it is given text tokens and patches whose products stay in range.
    """
    image, text = (torch.randn(B, n, D) for n in (N, L))
    image[:, :, 0] += 3
    masks = (scattered(N), some_empty(L)) if masked else (None, None)
    expected = value_and_grads(similarities(*masks), (image, text))
    got = value_and_grads(similarities(*masks), (image * length, text / length))
    scaled = [got[0], got[1] * length, got[2] / length]
    assert_close(scaled, expected, 2e-4)


def test_strided_and_expanded_tokens():
    image, text = torch.randn(N, B, D, dtype=torch.float64).transpose(0, 1), torch.randn(L, 1, D, dtype=torch.float64)
    text = text.transpose(0, 1).expand(B, -1, -1)
    masks = scattered(2 * N)[:, ::2], some_empty(L)
    plain = (image.contiguous(), text.contiguous())
    expected = value_and_grads(similarities(*masks), plain)
    got = value_and_grads(similarities(*masks), (image, text))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float16, torch.float64)])
def test_gradients_have_the_dtype_of_the_tokens(dtypes):
    """Half precision is rounded once, at the end: as float32 of the same numbers is."""
    image, text = (torch.randn(B, n, D).to(dtype) for n, dtype in zip((N, L), dtypes, strict=True))
    wide = torch.promote_types(torch.float32, torch.promote_types(*dtypes))
    masks = scattered(N), some_empty(L)
    expected = value_and_grads(similarities(*masks), (image.to(wide), text.to(wide)))
    got = value_and_grads(similarities(*masks), (image, text))
    assert [t.dtype for t in got] == [wide, *dtypes]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, expected, strict=True))


def test_the_aggregation_of_tokens_that_are_left_out(path):
    """They have the joint embedding 0, and neither they nor left out patches get a gradient."""
    image, text = (torch.randn(B, n, D, dtype=torch.float64) for n in (N, L))
    patches, tokens = scattered(N), some_empty(L)
    function = lambda image, text: aggregate(image, text, patches, None, "torch", text_mask=tokens)  # noqa: E731
    joint, dimage, dtext = value_and_grads(function, (image, text))
    assert (joint[~tokens] == 0).all()
    assert (dimage[~patches] == 0).all()
    assert (dtext[~tokens] == 0).all()
    expected = sparse_aggregate_reference(image, text, image_mask=patches)
    assert_close([joint[tokens]], [expected[tokens]], 1e-12)


def test_blocks_hold_no_more_rows_than_they_may():
    found = layout.blocks([5, 4, 3, 2, 0, 0], rows=7)
    assert [block.sizes for block in found] == [[5], [4, 3], [2]]
    assert [(block.rows.start, block.rows.stop) for block in found] == [(0, 5), (5, 12), (12, 14)]
    assert [block.sizes for block in layout.blocks([9, 1], rows=7)] == [[9], [1]]


@pytest.mark.parametrize(("samples", "tokens"), [(1, 40000), (3, 15000)])
def test_more_tokens_than_int16_counts(samples, tokens):
    """In one sample, and in the samples of one task: the last token wins, and its gradient alone is not 0."""
    x = torch.tensor([[[0.0, 1.0]]], dtype=torch.float64)
    e = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(samples, tokens, 1)
    e[:, -1] = torch.tensor([0.6, 0.8])
    de = value_and_grads(lambda x, e: hard_similarity(x, e, pool="sum"), (x, e), torch.ones(1, samples).double())[2]
    assert torch.equal(de.abs().sum(dim=-1).nonzero()[:, 1], torch.full((samples,), tokens - 1))


@pytest.mark.parametrize("pool", ["lse", "mean"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float16)])
def test_the_fake_operator_says_what_comes(dtypes, pool):
    """torch.compile goes by it."""
    image, text = (torch.randn(B, n, D).to(dtype).requires_grad_() for n, dtype in zip((N, L), dtypes, strict=True))
    arguments = image, text, scattered(N), some_empty(L), None, pool, 2.0, True
    torch.library.opcheck(alignment_rows_op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_default_device_changes_nothing(threads):
    """What has no data shows that it was used."""
    image, text = (torch.randn(B, n, D, dtype=torch.float64) for n in (N, L))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for masks in ((scattered(N), some_empty(L)), (None, lengths(L)), (scattered(N), None), (None, None)):
            expected = value_and_grads(similarities(*masks), (image, text))
            torch.set_default_device("meta")
            got = value_and_grads(similarities(*masks), (image, text))
            torch.set_default_device(None)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    finally:
        torch.set_default_device(None)
        torch.set_num_threads(before)


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_is_not_that_of_the_first_product_in_bfloat16(monkeypatch, default):
    """On a processor that has units, `has_units` tries them once."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert bfloat16.has_units.__wrapped__()
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def medium(monkeypatch):
    """As on a processor that gains by it."""
    monkeypatch.setattr(bfloat16, "has_units", lambda: True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_medium_finds_clear_winners_and_their_exact_maxima(path, medium):
    """Every token is one of a few directions, so that bfloat16 cannot take one for another."""
    image, text = (torch.eye(D)[torch.randint(0, 6, (B, n))] * (1 + torch.rand(B, n, 1)) for n in (N, L))
    masks = scattered(N), some_empty(L)
    options = {"sparsity": 0.9}
    exact = value_and_grads(similarities(*masks, **options), (image.double(), text.double()))
    assert_close(value_and_grads(similarities(*masks, **options), (image, text)), exact, 2e-6)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_medium_is_within_the_rounding_of_bfloat16(medium):
    """The token that won has at most two roundings of 1/256 less than the best one."""
    image, text = torch.randn(B, N, D), torch.randn(B, L, D)
    low = similarities(None, None)(image, text)
    torch.set_float32_matmul_precision("highest")
    exact = similarities(None, None)(image, text)
    assert not torch.equal(low, exact)
    assert ((exact - low) >= -1e-6).all()
    assert ((exact - low) <= 2 / 256).all()


def test_medium_is_not_for_float64_and_not_the_default(monkeypatch):
    monkeypatch.setattr(bfloat16, "has_units", lambda: True)
    assert not bfloat16.in_bfloat16(torch.ones(1))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert bfloat16.in_bfloat16(torch.ones(1))
        assert not bfloat16.in_bfloat16(torch.ones(1, dtype=torch.float64))
    finally:
        torch.set_float32_matmul_precision(before)


def test_efa_of_kept_tokens_is_that_of_shorter_captions():
    """What is masked out is not there."""
    image, text = torch.randn(B, N, D), torch.randn(B, L, D)
    mask = torch.arange(L).expand(B, L) < 5
    cut = value_and_grads(efa_loss, (image, text[:, :5]))
    masked = value_and_grads(lambda i, t: efa_loss(i, t, text_mask=mask), (image, text))
    assert relative_error(masked[0], cut[0]) <= 1e-6
    assert_close([masked[1], masked[2][:, :5]], [cut[1], cut[2]], 1e-5)
    assert (masked[2][:, 5:] == 0).all()
