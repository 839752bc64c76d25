"""Sparse aggregation: the torch path against its reference, golden values, properties, degenerate and bad input."""

import pytest
import torch
from helpers.budget import assert_function_within_budget
from helpers.compare import assert_close, assert_finite, default_dtype, value_and_grads
from helpers.golden import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fmfa_losses.functional import sparse_aggregate
from fmfa_losses.ops.aggregation import aggregate, sparse_aggregate_reference

SHAPES = [(1, 1, 1, 1), (2, 193, 77, 16), (3, 63, 7, 5), (2, 1, 9, 8), (4, 129, 1, 3), (2, 507, 3, 4)]  # B N L D


def draw(B, N, L, D, dtype=torch.float64):
    return torch.randn(B, N, D, dtype=dtype), torch.randn(B, L, D, dtype=dtype)


def some_mask(image):
    mask = torch.rand(image.shape[:2]) > 0.4
    mask[0] = False
    return mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("fn", [sparse_aggregate, sparse_aggregate_reference])
def test_golden(fn, dtype, tolerance):
    case = golden("aggregate_paper_masked")
    inputs = case.inputs["patches"].to(dtype), case.inputs["text"].to(dtype)
    got = value_and_grads(
        lambda i, t: fn(i, t, image_mask=case.inputs["patch_mask"]), inputs, torch.ones(case.value.shape)
    )
    assert_close(got, [case.value, case.grads["patches"], case.grads["text"]], tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, sparsity, masked):
    inputs = draw(*shape)
    mask = some_mask(inputs[0]) if masked else None
    assert_close(
        value_and_grads(lambda i, t: sparse_aggregate(i, t, image_mask=mask, sparsity=sparsity), inputs),
        value_and_grads(lambda i, t: sparse_aggregate_reference(i, t, image_mask=mask, sparsity=sparsity), inputs),
        1e-11,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    image, text = (t.requires_grad_() for t in draw(3, 6, 4, 3))
    mask = some_mask(image) if masked else None
    assert torch.autograd.gradcheck(lambda i, t: sparse_aggregate(i, t, image_mask=mask), (image, text))


@pytest.mark.parametrize("sparsity", [None, 0.3])
def test_a_text_mask_leaves_tokens_out(sparsity):
    """Their joint embeddings are zero, whatever they hold; no gradient passes."""
    image, text = draw(3, 6, 5, 4)
    image_mask, text_mask = some_mask(image), torch.rand(3, 5) > 0.4
    image, text = (t.masked_fill(~m[..., None], torch.nan) for t, m in ((image, image_mask), (text, text_mask)))
    cotangent = torch.randn(3, 5, 4, dtype=torch.float64)

    def fn(image, text):
        return aggregate(image, text, image_mask, sparsity, "torch", text_mask=text_mask)

    def right(image, text):
        text = text.masked_fill(~text_mask[..., None], 0)
        joint = sparse_aggregate_reference(image, text, image_mask=image_mask, sparsity=sparsity)
        return joint.masked_fill(~text_mask[..., None], 0)

    assert_close(value_and_grads(fn, (image, text), cotangent), value_and_grads(right, (image, text), cotangent), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_budget(dtype):
    torch.manual_seed(2)
    inputs = draw(3, 24, 5, 32, torch.float32)
    assert_function_within_budget(sparse_aggregate, sparse_aggregate_reference, inputs, dtype)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_properties(B, N, L, seed):
    torch.manual_seed(seed)
    image, text = draw(B, N, L, 4)
    mask = some_mask(image)
    got = value_and_grads(lambda i, t: sparse_aggregate(i, t, image_mask=mask), (image, text))
    # Masked-out patches, even NaN, change nothing; a sample without patches gives zeros.
    poisoned = image.masked_fill(~mask[..., None], torch.nan)
    again = value_and_grads(lambda i, t: sparse_aggregate(i, t, image_mask=mask), (poisoned, text))
    for a, b in zip(again, got, strict=True):
        assert torch.equal(a, b)
    assert got[0][0].abs().sum() == 0
    # A mask equals leaving the patches out.
    for b in range(1, B):
        if mask[b].any():
            kept = sparse_aggregate(image[b : b + 1, mask[b]], text[b : b + 1])
            torch.testing.assert_close(kept, got[0][b : b + 1])
    # The order of the patches does not matter, and the joint embedding lies within their box.
    order = torch.randperm(N)
    torch.testing.assert_close(sparse_aggregate(image[:, order], text), sparse_aggregate(image, text))
    joint = sparse_aggregate(image, text)
    assert (joint <= image.amax(1, keepdim=True) + 1e-9).all()
    assert (joint >= image.amin(1, keepdim=True) - 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_constant_rows_aggregate_uniformly(dtype):
    """Identical patches: their mean, and no gradient through the similarities, although these carry rounding noise."""
    image = torch.randn(2, 1, 65, dtype=dtype).expand(2, 193, 65).contiguous()
    text = 5 * torch.randn(2, 7, 65, dtype=dtype)
    joint, dimage, dtext = value_and_grads(sparse_aggregate, (image, text), torch.ones(2, 7, 65))
    torch.testing.assert_close(joint, image[:, :1].expand(2, 7, 65).to(joint.dtype))
    assert dtext.abs().max() == 0
    torch.testing.assert_close(dimage, torch.full_like(dimage, 7 / 193))


def test_zero_tokens_and_huge_halves_are_finite():
    image, text = draw(2, 12, 3, 8, torch.float32)
    text[0] = 0
    assert_finite(value_and_grads(sparse_aggregate, (image, text)))
    assert_finite(
        value_and_grads(sparse_aggregate, tuple((t * 3e4).clamp(-65000, 65000).half() for t in (image, text)))
    )


@pytest.mark.parametrize("fn", [sparse_aggregate, sparse_aggregate_reference])
@pytest.mark.parametrize("scores", [[1.0, -3.0, torch.inf], [1.0, -torch.inf], [torch.inf], [3e38, -3e38]])
def test_what_overflows_shows(fn, scores):
    image = torch.tensor(scores).view(1, -1, 1).expand(2, -1, 1)
    joint, dimage, dtext = value_and_grads(fn, (image, torch.tensor([1.0, 0.5]).view(2, 1, 1)))
    finite = torch.tensor(scores).isfinite().all()  # then a half of the scores is no overflow
    assert torch.equal(joint.isnan().flatten(), torch.tensor([True, not finite]))
    assert dimage[0].isnan().any()
    assert dtext[0].isnan()


def test_a_sum_that_overflows_shows():
    """Its weights would be 0, and the joint embedding too."""
    image = torch.tensor([[[3e38], [3e38], [0.0]]])
    assert sparse_aggregate(image, torch.ones(1, 1, 1), backend="torch").isnan().all()


def test_nan_shows():
    image, text = draw(2, 5, 3, 4)
    image[1, 2, 0] = torch.nan
    joint = sparse_aggregate(image, text)
    assert joint[1].isnan().any(-1).all()
    assert joint[0].isfinite().all()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fn", [sparse_aggregate, sparse_aggregate_reference])
def test_the_default_dtype_changes_nothing(fn, default):
    inputs = draw(3, 9, 4, 8, torch.float32)
    mask = some_mask(inputs[0])
    mask[2] = torch.arange(9) < 3
    inputs[0][2, :3], inputs[1][2] = torch.tensor([0.0, 0.3336, 1.0])[:, None], 1  # in bfloat16 1/3 is 0.334
    call = lambda: value_and_grads(lambda i, t: fn(i, t, image_mask=mask), inputs)  # noqa: E731
    expected = call()
    with default_dtype(default):
        got = call()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


def recorded(B, N, L, D=32, dtype=torch.float32):
    """The launches of forward and backward for a chip, on tensors that hold nothing."""
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel for this platform")
    from fmfa_losses.kernels import _launch, aggregation

    meta = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    image, text, mask = meta(B, N, D, dtype=dtype), meta(B, L, D, dtype=dtype), meta(B, N, dtype=torch.bool)
    text_mask = meta(B, L, dtype=torch.bool)
    with _launch.recording("sm_90") as launches:
        joint, row_sum = aggregation.forward(image, text, mask, text_mask, None)
        aggregation.backward(joint, image, text, mask, None, row_sum)
    return launches


WHOLE = ["_forward_kernel", "_rows_kernel", "_dimage_product_kernel"]
TILES = ["_forward_kernel", "_statistics_kernel", "_dtext_kernel", "_dimage_kernel"]


@pytest.mark.parametrize(("N", "names"), [(192, WHOLE), (512, WHOLE), (513, TILES), (1025, TILES)])
def test_a_batch_of_seventy_thousand_fits_the_grid(N, names):
    B, L, D = 70_000, 77, 512
    launches = recorded(B, N, L, D, torch.bfloat16)
    assert [launch.kernel.__name__ for launch in launches] == names
    for launch in launches:
        name, (axis_0, *others) = launch.kernel.__name__, launch.grid
        assert all(axis <= 65535 for axis in others)
        assert axis_0 < 2**31
        size, block = (N, launch.options["BLOCK_N"]) if "dimage" in name else (L, launch.options["BLOCK_L"])
        assert axis_0 == B * -(-size // block)
        chunked = "dtext" in name or "dimage" in name or launch.options.get("WHOLE_ROW") is False
        assert others == ([D // launch.options["BLOCK_OUT"]] if chunked else [1] * len(others))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("N", [192, 513])
def test_masks_and_thresholds_cost_no_launch(N, masked):
    """Launches of torch are allocations alone: what the kernels read is what the caller gave."""
    image, text = torch.empty(2, N, 16), torch.empty(2, 9, 16)
    masks = (torch.ones(2, N, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)) if masked else (None, None)
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel for this platform")
    from fmfa_losses.kernels import _launch, aggregation

    with _launch.recording("sm_90"), Made() as made:
        joint, row_sum = aggregation.forward(image, text, *masks, 0.3)
        aggregation.backward(joint, image, text, masks[0], 0.3, row_sum)
    assert {name.split(".")[1] for name in made.names} <= {"empty", "empty_like"}


class Made(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("N", "dtype", "names"), [(192, torch.bfloat16, WHOLE), (192, torch.float32, TILES), (513, torch.bfloat16, TILES)]
)
def test_another_batch_or_caption_length_compiles_nothing_new(N, dtype, names):
    jit = pytest.importorskip(
        "triton.runtime.jit", reason="the kernels need triton, which has no wheel for this platform"
    )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", 90, 32))
    keys = {}
    for B, L in ((1, 1), (1, 16), (16, 77), (37, 64), (128, 77), (3, 7)):
        for launch in recorded(B, N, L, dtype=dtype):
            kernel = launch.kernel
            bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
            key = str(bind(*launch.args, **launch.options)[1:])
            keys.setdefault(kernel.__name__, set()).add(key)
    assert list(keys) == names
    assert {name: len(found) for name, found in keys.items()} == dict.fromkeys(keys, 1)


IMAGE, TEXT = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
BAD = [
    (lambda: sparse_aggregate(IMAGE[0], TEXT), ValueError, r"image_tokens must have shape \[B N D\]"),
    (lambda: sparse_aggregate(IMAGE, TEXT[:1]), ValueError, "agree in B"),
    (lambda: sparse_aggregate(IMAGE, TEXT[..., :2]), ValueError, "agree in D"),
    (lambda: sparse_aggregate(IMAGE, TEXT, image_mask=torch.ones(2, 5)), TypeError, "boolean"),
    (lambda: sparse_aggregate(IMAGE, TEXT, sparsity=1.5), ValueError, r"sparsity must lie in \[0, 1\]"),
    (lambda: sparse_aggregate(IMAGE.int(), TEXT), TypeError, "floating-point"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
