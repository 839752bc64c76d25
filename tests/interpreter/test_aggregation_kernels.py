import pytest
import torch
import triton
import triton.language as tl
from fmfa_losses.kernels import _scores, aggregation
from helpers.budget import assert_within_budget
from helpers.compare import default_dtype

from fmfa_losses.functional import sparse_aggregate
from fmfa_losses.ops.aggregation import (
    aggregate,
    sparse_aggregate_reference,
    sparse_aggregation_backward_op,
    sparse_aggregation_op,
)

# B, N, L, D: patches around one tile (256 in IEEE float32, 512 else), sizes around the blocks, a width that no vector
# divides.
SHAPES = [
    (2, 1, 1, 16), (2, 5, 77, 64), (2, 63, 77, 64), (1, 192, 33, 64), (1, 17, 9, 507), (2, 129, 129, 16),
    (1, 256, 33, 16), (1, 300, 33, 16), (1, 1025, 17, 16),
]  # fmt: skip


@pytest.fixture
def narrow(monkeypatch):
    """Rows of more than 64 patches take several tiles. SHAPES has the limit of the table."""
    for kind in _scores.ONE_TILE:
        monkeypatch.setitem(_scores.ONE_TILE, kind, 64)


def inputs(B, N, L, D, dtype, masked=False):
    """Tokens and both masks; what these leave out is NaN."""
    image, text = torch.randn(B, N, D).to(dtype), torch.randn(B, L, D).to(dtype)
    if not masked:
        return image, text, None, None
    image_mask, text_mask = torch.rand(B, N) < 0.6, torch.rand(B, L) < 0.7
    image_mask[0, 0] = text_mask[0, 0] = True
    if B > 1:
        image_mask[-1] = False  # a sample without any patch
        text_mask[-1, : L // 2] = False
    image, text = (t.masked_fill(~m.unsqueeze(-1), torch.nan) for t, m in ((image, image_mask), (text, text_mask)))
    return image, text, image_mask, text_mask


def run(image, text, image_mask, text_mask, sparsity, djoint, **gradients):
    joint, row_sum = aggregation.forward(image, text, image_mask, text_mask, sparsity)
    return joint, *aggregation.backward(djoint, image, text, image_mask, sparsity, row_sum, **gradients)


def plain(image, text, image_mask, text_mask, sparsity, djoint, dtype):
    """Value and gradients of the reference, computed in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (image, text)]
    left_out = torch.zeros(text.shape[:2], dtype=torch.bool) if text_mask is None else ~text_mask
    text = leaves[1].masked_fill(left_out.unsqueeze(-1), 0)
    joint = sparse_aggregate_reference(leaves[0], text, image_mask=image_mask, sparsity=sparsity)
    joint = joint.masked_fill(left_out.unsqueeze(-1), 0)
    return joint.detach(), *torch.autograd.grad(joint, leaves, djoint.to(dtype))


def assert_right(got, *arguments):
    """Value and gradients within the budget of the reference in float32."""
    exact, rounded = (plain(*arguments, dtype) for dtype in (torch.float64, torch.float32))
    for name, value, same_dtype, right in zip(("joint", "dimage", "dtext"), got, rounded, exact, strict=True):
        assert_within_budget(value, same_dtype.to(value.dtype), right, name=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_float32(shape, masked):
    arguments = *inputs(*shape, torch.float32, masked), None if masked else 0.4, torch.randn(shape[0], *shape[2:])
    assert_right(run(*arguments), *arguments)


@pytest.mark.parametrize("shape", [(2, 63, 77, 64), (1, 193, 33, 16), (2, 512, 20, 16), (2, 513, 20, 16)])
def test_values_and_gradients_float16(shape):
    arguments = *inputs(*shape, torch.float16, masked=True), 0.3, torch.randn(shape[0], *shape[2:])
    got = run(*arguments)
    assert [t.dtype for t in got] == [torch.float32, torch.float16, torch.float16]
    assert_right(got, *arguments)  # products of float16 are exact in float32; gradients have one rounding more


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("N", [20, 140])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("which", [("dimage",), ("dtext",), ("dimage", "dtext")])
def test_gradients_are_added_to_given_ones(N, dtype, which):
    """In float32, with one rounding. A token or patch that is left out adds nothing."""
    arguments = *inputs(2, N, 9, 24, dtype, masked=True), None, torch.randn(2, 9, 24)
    _, *alone = run(*arguments)
    held = {"dimage": torch.randn(2, N, 24).to(dtype), "dtext": torch.randn(2, 9, 24).to(dtype)}
    given = {name: held[name].clone() for name in which}
    _, *got = run(*arguments, **given)
    _, *exact = plain(*arguments, torch.float64)
    left_out = [~mask for mask in arguments[2:4]]
    for name, gradient, plain_one, right, out in zip(held, got, alone, exact, left_out, strict=True):
        if name in which:
            assert gradient.data_ptr() == given[name].data_ptr()
            total = right + held[name].double()
            assert_within_budget(gradient, total.to(dtype), total, name=name)
            assert torch.equal(gradient[out], held[name][out])
        else:
            assert torch.equal(gradient, plain_one)
            assert (gradient[out] == 0).all()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("N", [20, 140])
def test_masks_that_leave_everything(N):
    image, text, *_ = inputs(2, N, 9, 24, torch.float16)
    masks = torch.ones(2, N, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
    djoint = torch.randn(2, 9, 24)
    for a, b in zip(run(image, text, *masks, None, djoint), run(image, text, None, None, None, djoint), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("N", [20, 140])
def test_a_text_mask_hides_a_broken_image_from_its_tokens(N):
    """And its rows of djoint, which may be NaN, from the image."""
    image, text, _, _ = inputs(2, N, 9, 24, torch.float32)
    text_mask = torch.arange(9).lt(5).expand(2, 9)
    djoint = torch.randn(2, 9, 24).masked_fill(~text_mask.unsqueeze(-1), torch.nan)
    assert all(t.isfinite().all() for t in run(image, text, None, text_mask, None, djoint))
    image[1, 3] = torch.inf
    joint, _, dtext = run(image, text, None, text_mask, None, djoint)
    for value in (joint, dtext):
        assert value[1, :5].isnan().any(-1).all()
        assert (value[:, 5:] == 0).all()


def poisoned(monkeypatch):
    """Memory is full of NaN before a kernel writes to it."""
    for name in ("empty", "empty_like"):
        fresh = getattr(torch, name)
        monkeypatch.setattr(
            torch,
            name,
            lambda *a, fresh=fresh, **k: (lambda t: t.fill_(torch.nan) if t.is_floating_point() else t.fill_(-7))(
                fresh(*a, **k)
            ),
        )


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("N", [1, 20, 140])
def test_every_element_is_written(N, masked, monkeypatch):
    arguments = *inputs(2, N, 33, 24, torch.float32, masked), None, torch.randn(2, 33, 24)
    expected = run(*arguments)
    poisoned(monkeypatch)
    for a, b in zip(run(*arguments), expected, strict=True):
        assert torch.equal(a, b)


def test_threshold_zero_keeps_every_patch():
    arguments = *inputs(2, 17, 9, 16, torch.float32), 0.0, torch.randn(2, 9, 16)
    assert_right(run(*arguments), *arguments)


def test_threshold_one_keeps_the_best_patch():
    image, text, *masks = inputs(2, 17, 9, 16, torch.float32)
    djoint = torch.randn(*text.shape)
    joint, dimage, dtext = run(image, text, *masks, 1.0, djoint)
    best = (text @ image.mT).argmax(-1)
    torch.testing.assert_close(joint, image.gather(1, best.unsqueeze(-1).expand_as(text)))
    right = torch.zeros_like(image).scatter_add(1, best.unsqueeze(-1).expand_as(text), djoint)
    torch.testing.assert_close(dimage, right, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(dtext, torch.zeros_like(text), atol=2e-5, rtol=0)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("N", [17, 140])
def test_constant_rows_are_uniform_and_send_no_gradient_through_s(N):
    patch = torch.randn(1, 1, 16)
    image, text = patch.repeat(1, N, 1), torch.randn(1, 5, 16)
    image[0, 3] = 0  # masked out: the kept patches are all alike
    image[0, 1] *= 1 + 2**-22  # but for rounding noise
    mask = torch.arange(N).ne(3).unsqueeze(0)
    djoint = torch.randn(1, 5, 16)
    joint, dimage, dtext = run(image, text, mask, None, 0.5, djoint)
    torch.testing.assert_close(joint, patch.expand(1, 5, 16), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dimage[0, 0], djoint[0].sum(0) / (N - 1))
    assert (dtext == 0).all()
    assert (dimage[0, 3] == 0).all()


def test_the_first_of_equal_minima_takes_the_gradient():
    image = torch.tensor([[[2.0] + [0.0] * 15, [-1.0] + [0.0] * 15, [-1.0] + [0.0] * 15, [1.0] + [0.0] * 15]])
    text = torch.zeros(1, 1, 16)
    text[..., 0] = 1
    image[0, :, 1] = torch.tensor([1.0, 5.0, 7.0, 3.0])
    djoint = torch.zeros(1, 1, 16)
    djoint[..., 1] = 1
    _, dimage, _ = run(image, text, None, None, 0.1, djoint)
    # u = 3, 0, 0, 2 of 5; da = 1, 5, 7, 3, c = 9/5: ds = (-4/5, ., ., 6/5) / 5, and minus their sum at patch 1.
    torch.testing.assert_close(dimage[0, :, 0], torch.tensor([-0.16, -0.08, 0.0, 0.24]))


def test_nan_shows_in_its_own_rows_and_nowhere_else():
    image, text, *_ = inputs(2, 20, 9, 16, torch.float32)
    text[0, 4, 3] = float("nan")
    joint, row_sum = aggregation.forward(image, text, None, None, 0.3)
    broken = torch.zeros(2, 9, dtype=torch.bool)
    broken[0, 4] = True
    assert torch.equal(joint.isnan().all(-1), broken)
    assert torch.equal(joint.isnan().any(-1), broken)
    dimage, dtext = aggregation.backward(torch.randn_like(joint), image, text, None, 0.3, row_sum)
    assert torch.equal(dtext.isnan().any(-1), broken)
    assert dimage[0].isnan().any()
    assert not dimage[1].isnan().any()
    image[1, 7] = float("nan")
    assert aggregation.forward(image, text, None, None, 0.3)[0][1].isnan().all()
    alone = aggregation.forward(image[:, :1], text, None, None, 0.3)[0]  # N = 1 is constant, unless it is NaN
    assert torch.equal(alone.isnan().any(-1), broken)


def test_two_runs_are_equal_bit_for_bit():
    arguments = *inputs(2, 70, 40, 24, torch.float32, masked=True), 0.2, torch.randn(2, 40, 24)
    runs = [run(*arguments) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


STRIDED = {
    "mask of a sequence without its first token": lambda x: x | {"image_mask": torch.rand(3, 21).lt(0.6)[:, 1:]},
    "masks for every sample": lambda x: x | {
        name: torch.rand(1, 20).lt(0.6).expand(3, 20) for name in ("image_mask", "text_mask")
    },
    "transposed masks": lambda x: x | {name: torch.rand(20, 3).lt(0.6).t() for name in ("image_mask", "text_mask")},
    "tokens [L, B, D]": lambda x: x | {name: torch.randn(20, 3, 24).permute(1, 0, 2) for name in ("image", "text")},
    "one image for every sample": lambda x: x | {"image": torch.randn(1, 20, 24).expand(3, 20, 24)},
    "one text for every sample": lambda x: x | {"text": torch.randn(1, 20, 24).expand(3, 20, 24)},
    "columns of wider tokens": lambda x: x | {name: torch.randn(3, 20, 48)[..., ::2] for name in ("image", "text")},
    "one cotangent": lambda x: x | {"djoint": torch.tensor(0.7).expand(3, 20, 24)},
}  # fmt: skip


@pytest.mark.parametrize("which", STRIDED)
def test_strided_inputs(which):
    names = "image", "text", "image_mask", "text_mask", "sparsity", "djoint"
    values = *inputs(3, 20, 20, 24, torch.float32), 0.3, torch.randn(3, 20, 24)
    given = STRIDED[which](dict(zip(names, values, strict=True)))
    assert any(isinstance(t, torch.Tensor) and not t.is_contiguous() for t in given.values())
    strided = [given[name] for name in names]
    got = run(*strided)
    assert_right(got, *strided)
    assert all(value.is_contiguous() for value in got)
    contiguous = [t.contiguous() if isinstance(t, torch.Tensor) else t for t in strided]
    for a, b in zip(got, run(*contiguous), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(public("triton", *strided), public("torch", *strided), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def public(backend, image, text, image_mask, text_mask, sparsity, djoint, strict=False):
    """Value and gradients of the operator, in the order of `run`."""
    leaves = [t.detach().requires_grad_() for t in (image, text)]  # keeps the strides
    joint = aggregate(*leaves, image_mask, sparsity, backend, text_mask=text_mask, strict=strict)
    return joint.detach(), *torch.autograd.grad(joint, leaves, djoint)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("shape", [(3, 70, 40, 130), (2, 140, 33, 130)])  # several blocks of tokens, patches and D
def test_every_program_has_its_own_rows(shape):
    """The samples of a batch, one after the other in the grid, are what each of them is alone."""
    *tensors, djoint = *inputs(*shape, torch.float16, masked=True), torch.randn(shape[0], *shape[2:])
    together = run(*tensors, None, djoint)
    for b in range(shape[0]):
        alone = run(*(t[b : b + 1] for t in tensors), None, djoint[b : b + 1])
        assert all(torch.equal(a[b : b + 1], c) for a, c in zip(together, alone, strict=True))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("N", [17, 140])
def test_a_nan_shows_in_rows_that_are_constant_without_it(N):
    image, text = torch.randn(1, 1, 16).repeat(2, N, 1), torch.randn(2, 3, 16)
    image[1, N - 2, 5] = float("nan")
    joint, row_sum = aggregation.forward(image, text, None, None, 0.3)
    assert torch.equal(joint.isnan().all(-1), torch.tensor([[False], [True]]).expand(2, 3))
    assert not joint[0].isnan().any()
    dimage, dtext = aggregation.backward(torch.randn_like(joint), image, text, None, 0.3, row_sum)
    assert dtext[1].isnan().all()
    assert dimage[1].isnan().all()
    assert not dtext[0].isnan().any()
    assert not dimage[0].isnan().any()


def overflowing(N):
    """image [1, N, 4] and text [1, 6, 4]: the first token has finite scores, those of the others leave float32."""
    image, text = torch.randn(1, N, 4), torch.zeros(1, 6, 4)
    image[..., 1:] = 0
    image[0, 1] = torch.tensor([0.0, -1e20, 1e20, 0.0])
    image[0, -1] = torch.tensor([0.0, 1e20, -1e20, 1e20])
    text[0, :, 0] = 1
    text[0, 1, 1] = torch.inf  # inf, -inf, and 0 inf = NaN
    text[0, 2, 1] = 1e20  # inf and -inf
    text[0, 3, 2] = 3e18  # 3e38 and -3e38: their difference is infinite
    text[0, 4, 3] = 1e20  # inf alone
    text[0, 5, 3] = -1e20  # -inf alone
    return image, text


@pytest.mark.usefixtures("narrow")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy speaks of overflow in a sum, too
@pytest.mark.parametrize("sparsity", [None, 0.0, 1.0])
@pytest.mark.parametrize("N", [17, 140])
def test_scores_that_overflow_show_in_their_rows_and_nowhere_else(N, sparsity):
    image, text = overflowing(N)
    broken = torch.tensor([[False] + [True] * 5])
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in (image, text)]
        joint = sparse_aggregate(*leaves, sparsity=sparsity, backend=backend)
        assert torch.equal(joint.isnan().all(-1), broken)
        assert torch.equal(joint.isnan().any(-1), broken)
        dimage, dtext = torch.autograd.grad(joint, leaves, torch.ones_like(joint))
        assert torch.equal(dtext.isnan().all(-1), broken)
        assert dimage[0, [1, -1]].isnan().all()
    reference = sparse_aggregate_reference(image, text, sparsity=sparsity)
    assert torch.equal(reference.isnan().all(-1), broken)


@pytest.mark.usefixtures("narrow")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("N", [17, 140])
def test_a_sum_that_overflows_shows(N):
    image = torch.full((1, N, 1), 2e38)
    image[0, 0] = 0
    for backend in ("triton", "torch"):
        joint = sparse_aggregate(image, torch.ones(1, 1, 1), sparsity=0.0, backend=backend)
        assert joint.isnan().all()


# N, and scores of which some lie at 1/N of their range exactly, in float32: 3 of 21, 2^-20 of 7 2^-20, 11 of 5 11.
AT_THRESHOLD = [
    *(([21.0, 3, 0, 0, 0, 0, 0], None), ([7 * 2.0**-20, 0, 2.0**-20, 0, 0, 0, 0], None), ([55.0, 11, 11, 0, 44], None)),
    *(([float(N), *[0.0] * (N - 2), 1], None) for N in (3, 5, 41, 49, 193, 600)),
    *(([3.0, 0, 5, 1], 0.6), ([0.0, 10, 7, 3], 0.7), ([0.0, 10, 7, 3], 0.3), ([-1.0, 9, 0], 0.1)),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("scores, sparsity", AT_THRESHOLD)
def test_a_patch_at_the_threshold_has_one_fate(scores, sparsity, strict, masked):
    N = len(scores)
    image = torch.stack([torch.tensor(scores), torch.arange(N) % 7], dim=-1)[None]
    mask = torch.ones(1, N, dtype=torch.bool)
    if masked:  # two patches more, which do not count
        image = torch.cat([image[:, :1], 100 * torch.ones(1, 2, 2), image[:, 1:]], dim=1)
        mask = torch.tensor([[True, False, False] + [True] * (N - 1)])
    text, cotangent = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]).expand(1, 2, 2)
    kept = torch.tensor(scores).double()
    n = (kept - kept.min()) / (kept.max() - kept.min())
    threshold = 1 / N if sparsity is None else sparsity
    m = torch.where(n > threshold + 1e-6 if strict else n > threshold - 1e-6, n, 0)
    assert (n - threshold).abs().min() < 1e-7
    right = (m / m.sum() @ image[mask].double()).expand(1, 2, 2)

    if not strict:
        reference = sparse_aggregate_reference(image, text, image_mask=mask, sparsity=sparsity)
        torch.testing.assert_close(reference, right.float())
    arguments = image, text, mask if masked else None, None, sparsity, cotangent, strict
    kernels = public("triton", *arguments)
    for a, b in zip(kernels, public("torch", *arguments), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(kernels[0], right.float())


def test_the_cutoff_is_the_first_number_whose_quotient_passes():
    N = torch.cat([torch.arange(1, 300), torch.randint(300, 5000, (213,))])
    span = torch.cat([torch.randint(1, 4000, (256,)).float(), torch.rand(256) * 2.0 ** torch.randint(-60, 60, (256,))])
    for threshold in (1 / N, torch.rand(512), torch.nextafter(1 / N, torch.ones(512))):
        out = torch.empty(512)
        _cutoff_kernel[(1,)](span, threshold, out, R=512)
        assert (out / span >= threshold).all()
        assert (torch.nextafter(out, torch.zeros(512)) / span < threshold).all()


@triton.jit
def _cutoff_kernel(span_ptr, threshold_ptr, out_ptr, R: tl.constexpr):
    r = tl.arange(0, R)
    tl.store(
        out_ptr + r, _scores.cutoff_of(tl.zeros((R,), tl.float32), tl.load(span_ptr + r), tl.load(threshold_ptr + r))
    )


@pytest.mark.of_torch
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(default):
    tensors, djoint = inputs(2, 20, 9, 16, torch.float32, masked=True), torch.randn(2, 9, 16)
    expected = [public("triton", *tensors, sparsity, djoint) for sparsity in (0.3, None)]
    with default_dtype(default):
        got = [public("triton", *tensors, sparsity, djoint) for sparsity in (0.3, None)]
    for a, b in zip(sum(got, ()), sum(expected, ()), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


def permuted():
    image, text = (torch.randn(n, 2, 16).permute(1, 0, 2) for n in (20, 9))
    return image, text, torch.rand(21, 2).lt(0.6).t()[:, 1:]


@pytest.mark.of_torch
def test_opcheck_permuted_tokens():
    image, text, mask = permuted()
    masks, options = (mask, torch.rand(9, 2).lt(0.6).t()), (0.1, False, "triton")
    args = (image.requires_grad_(), text.requires_grad_(), *masks, *options)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(sparse_aggregation_op, args, test_utils=tests)
    joint, total = (t.detach() for t in sparse_aggregation_op(*args))
    torch.library.opcheck(
        sparse_aggregation_backward_op,
        (torch.ones_like(joint), image.detach(), text.detach(), *masks, total, *options),
        test_utils=tests,
    )


@pytest.mark.of_torch
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals, by version
def test_compiled_permuted_tokens():
    image, text, mask = permuted()

    def both(fn):
        leaves = [t.detach().requires_grad_() for t in (image, text)]
        joint = fn(*leaves)
        return joint.detach(), *torch.autograd.grad(joint, leaves, torch.linspace(-1, 2, joint.numel()).view_as(joint))

    def fn(image, text):
        return sparse_aggregate(image, text, image_mask=mask, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(both(compiled), both(fn), strict=True):
        torch.testing.assert_close(a, b)


def test_a_float32_operand_is_two_halves():
    """As the kernels multiply beside bfloat16; the interpreter has float16, whose two halves hold 22 bits."""
    a, v, out = torch.randn(16, 64), torch.randn(64, 16).half(), torch.empty(16, 16)
    _halves_kernel[(1,)](a, v, out, K=64)
    exact = a.double() @ v.double()
    assert_within_budget(out, a @ v.float(), exact, amplification=4.0)
    assert ((a.half().double() @ v.double() - exact).norm() / exact.norm()) > 1e-4  # what one half leaves


@triton.jit
def _halves_kernel(a_ptr, v_ptr, out_ptr, K: tl.constexpr):
    m, k = tl.arange(0, 16), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    v = tl.load(v_ptr + k[:, None] * 16 + m[None, :])
    tl.store(out_ptr + m[:, None] * 16 + m[None, :], _scores.add_halves(a, v, tl.zeros((16, 16), tl.float32)))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("N", [6, 140])
def test_a_nan_of_a_token_does_not_reach_patches_that_the_mask_leaves_out(N):
    image, text = torch.randn(2, N, 16, requires_grad=True), torch.randn(2, 3, 16)
    text[1, 2, 0] = float("nan")
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, 2:4] = False
    sparse_aggregate(image, text, image_mask=mask, backend="triton").sum().backward()
    assert (image.grad[~mask] == 0).all()
    assert image.grad[1, 0].isnan().any()
