"""EFA and its operators through the Triton kernels on a CUDA device."""

import pytest
import torch
from helpers.compare import default_dtype, value_and_grads
from helpers.gpu import (
    DTYPES,
    assert_function_within_budget,
    assert_usually_within_budget,
    captured_step,
    clear_tokens,
    compiled,
    directions,
    matmul_precision,
    needs_cuda,
    needs_memory,
    needs_two,
    waiting_raises,
)

from benchmarks.budget import relative_error
from benchmarks.providers import plain_efa
from fmfa_losses import EFALoss
from fmfa_losses.functional import efa_loss, hard_similarity, sparse_aggregate
from fmfa_losses.ops.aggregation import sparse_aggregate_reference
from fmfa_losses.ops.hard_similarity import hard_similarity_reference

pytestmark = needs_cuda

SHAPES = [(1, 1, 1, 1, 16), (3, 5, 63, 77, 64), (7, 2, 193, 129, 96), (4, 4, 77, 192, 512), (2, 3, 192, 77, 768)]
# Every combination would spend its time in the compiler: all shapes in two precisions, the rest at one awkward shape.
SIMILARITIES = [(shape, "lse", precision) for shape in SHAPES for precision in ("fp32", "bf16")]
SIMILARITIES += [(SHAPES[2], "lse", precision) for precision in ("tf32", "tf32x3", "fp16")]
SIMILARITIES += [(SHAPES[2], pool, precision) for pool in ("sum", "mean") for precision in ("fp32", "bf16")]

IMAGES = [(1, 1, 1, 16), (3, 63, 7, 64), (2, 193, 77, 96), (2, 192, 77, 512), (2, 432, 77, 768)]
AGGREGATIONS = [(shape, precision) for shape in IMAGES for precision in ("fp32", "bf16")]
AGGREGATIONS += [(IMAGES[2], precision) for precision in ("tf32", "fp16")]
AGGREGATIONS += [((5, N, 29, 64), "bf16") for N in (65, 96, 128)]


def tokens(Bx, Be, P, Q, D):
    """x [Bx, P, D] and e [Be, Q, D] with clear winners; the mask of e keeps the first copy of every direction."""
    M = max(1, min(Q // 4, D // 2))
    shared = directions(M, D)
    x, e = clear_tokens(Bx, P, D, directions=shared, seed=1), clear_tokens(Be, Q, D, directions=shared, seed=2)
    generator = torch.Generator().manual_seed(3)
    x_mask = torch.rand(Bx, P, generator=generator) < 0.6
    e_mask = (torch.rand(Be, Q, generator=generator) < 0.5) | (torch.arange(Q) < M)
    return x.cuda(), e.cuda(), x_mask.cuda(), e_mask.cuda()


def random_tokens(B, N, L, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, D, generator=generator).to("cuda", dtype) for T in (N, L)]


@pytest.mark.parametrize(("shape", "pool", "precision"), SIMILARITIES)
def test_hard_similarity(shape, pool, precision):
    x, e, x_mask, e_mask = tokens(*shape)
    for masks in ({}, {"x_mask": x_mask, "e_mask": e_mask}):
        options = {"pool": pool, "pool_scale": 4.0, **masks}
        assert_function_within_budget(
            lambda x, e, options=options: hard_similarity(x, e, backend="triton", **options),
            lambda x, e, options=options: hard_similarity_reference(x, e, **options),
            [x, e],
            precision,
        )


@pytest.mark.parametrize(("shape", "precision"), AGGREGATIONS)
def test_sparse_aggregate(shape, precision):
    B, N, L, D = shape
    image, text = random_tokens(B, N, L, D)
    keep = torch.rand(B, N, generator=torch.Generator().manual_seed(1)) < 0.6
    keep[0] = False  # a sample without patches
    for mask in (None, keep.cuda()):
        if mask is not None and B == 1:
            continue  # nothing but zeros to compare
        # sparsity 0: no patch sits at the threshold, where a rounding decides about it
        assert_function_within_budget(
            lambda v, t, mask=mask: sparse_aggregate(v, t, image_mask=mask, sparsity=0.0, backend="triton"),
            lambda v, t, mask=mask: sparse_aggregate_reference(v, t, image_mask=mask, sparsity=0.0),
            [image, text],
            precision,
        )


def test_threshold_in_float32():
    image, text = random_tokens(3, 192, 77, 128)
    assert_function_within_budget(
        lambda v, t: sparse_aggregate(v, t, backend="triton"), sparse_aggregate_reference, [image, text], "fp32"
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
def test_whole_loss(precision, masked):
    """Winners among random tokens are close, a hardest negative is one of many: several draws where digits are few."""
    draws = [random_tokens(16, 65, 33, 128, seed=seed) for seed in range(7)]
    text_mask = torch.arange(33, device="cuda") < torch.arange(5, 21, device="cuda")[:, None] if masked else None
    ours = lambda v, t: efa_loss(v, t, text_mask=text_mask, backend="triton")  # noqa: E731
    plain = lambda v, t: plain_efa(hard_similarity_reference, v, t, text_mask)  # noqa: E731
    if precision in ("fp32", "tf32x3"):
        assert_function_within_budget(ours, plain, draws[0], precision)
    else:
        assert_usually_within_budget(ours, plain, draws, precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_out_tokens_change_nothing(dtype):
    image, text = random_tokens(4, 65, 33, 64, dtype)
    image_mask, text_mask = (torch.rand(4, T, device="cuda") < 0.7 for T in (65, 33))
    text_mask[0] = False
    loss = EFALoss(backend="triton")

    def run(v, t):
        return value_and_grads(lambda v, t: loss(v, t, image_mask=image_mask, text_mask=text_mask), [v, t])

    expected = run(image, text)
    image, text = image.clone(), text.clone()
    image[~image_mask], text[~text_mask] = float("nan"), 1e4
    got = run(image, text)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not got[1][~image_mask].any()
    assert not got[2][~text_mask].any()


@pytest.mark.parametrize("precision", DTYPES)
def test_deterministic_to_the_bit(precision):
    image, text = random_tokens(32, 192, 77, 512, DTYPES[precision])
    with matmul_precision(precision):
        runs = [value_and_grads(lambda v, t: efa_loss(v, t, backend="triton"), [image, text]) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.filterwarnings("ignore")  # of the compiler, about the machine it is on
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(dynamic):
    loss = EFALoss(backend="triton")
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for B in (4, 6) if dynamic else (4,):
        image, text = random_tokens(B, 65, 33, 64)
        mask = torch.arange(33, device="cuda") < torch.arange(5, 5 + B, device="cuda")[:, None]
        eager = value_and_grads(lambda v, t, mask=mask: loss(v, t, text_mask=mask), [image, text])
        got = value_and_grads(lambda v, t, mask=mask: compiled(v, t, text_mask=mask), [image, text])
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, eager, strict=True))


def test_captured_graph_replays():
    loss = EFALoss(backend="triton")
    image, text = (t.requires_grad_() for t in random_tokens(8, 65, 33, 64))

    def step():
        value = loss(image, text)
        # Without its graph: one that lives on binds the leaves to the stream that it was made on.
        return value.detach(), *torch.autograd.grad(value, (image, text))

    graph, captured = captured_step(step)
    with torch.no_grad():
        image.normal_()
        text.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_host_never_waits():
    loss = EFALoss(backend="triton")
    image, text = (t.requires_grad_() for t in random_tokens(4, 65, 33, 64))
    mask = torch.ones(4, 33, dtype=torch.bool, device="cuda")
    loss(image, text, text_mask=mask).backward()  # compiled
    with waiting_raises():
        loss(image, text, text_mask=mask).backward()


def test_autocast_changes_nothing():
    image, text = random_tokens(4, 65, 33, 64)
    expected = efa_loss(image, text, backend="triton")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(efa_loss(image, text, backend="triton"), expected)


def test_more_winners_than_32_bits_count():
    needs_memory(60)
    Bx = Be = 4096
    P, Q, D = 140, 16, 16  # Bx Be P = 2.3e9
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(Bx, P, D, device="cuda", generator=generator).bfloat16().requires_grad_()
    e = torch.randn(Be, Q, D, device="cuda", generator=generator).bfloat16().requires_grad_()
    sim = hard_similarity(x, e, backend="triton")
    last = (slice(-2, None),) * 2
    dx, de = torch.autograd.grad(sim[last].sum(), (x, e))
    corner = [t.detach()[-2:].float().requires_grad_() for t in (x, e)]
    expected = hard_similarity_reference(*corner)
    dcorner = torch.autograd.grad(expected.sum(), corner)
    assert relative_error(sim[last], expected) < 2**-7
    for got, exact in zip((dx, de), dcorner, strict=True):
        assert relative_error(got[-2:], exact) < 0.1  # a few winners flip in bf16
        assert not got[:-2].any()


def test_more_elements_than_32_bits_count():
    needs_memory(60)
    B, N, L, D = 6000, 720, 2, 512  # B N D = 2.2e9
    image = torch.empty(B, N, D, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_()
    text = torch.randn(B, L, D, device="cuda").bfloat16().requires_grad_()
    joint = sparse_aggregate(image, text, sparsity=0.0, backend="triton")
    dimage, dtext = torch.autograd.grad(joint[-2:].sum(), (image, text))
    corner = [t.detach()[-2:].float().requires_grad_() for t in (image, text)]
    expected = sparse_aggregate_reference(*corner, sparsity=0.0)
    dcorner = torch.autograd.grad(expected.sum(), corner)
    assert relative_error(joint[-2:], expected) < 2**-6
    for got, exact in zip((dimage, dtext), dcorner, strict=True):
        assert relative_error(got[-2:], exact) < 2**-5
        assert not got[:-2].any()


def test_masks_of_any_stride():
    """`mask[:, 1:]` drops [CLS]; a transposed mask comes from a sequence-first collate function."""
    image, text = random_tokens(4, 65, 33, 64)
    image_mask = (torch.rand(4, 66, device="cuda") < 0.7)[:, 1:]
    text_mask = (torch.rand(33, 4, device="cuda") < 0.7).T
    text_mask[:, 0] = True

    def run(image_mask, text_mask):
        return [
            *value_and_grads(
                lambda v, t: sparse_aggregate(v, t, image_mask=image_mask, backend="triton"), [image, text]
            ),
            *value_and_grads(
                lambda x, e: hard_similarity(x, e, x_mask=image_mask, e_mask=text_mask, backend="triton"), [image, text]
            ),
            *value_and_grads(
                lambda v, t: efa_loss(v, t, image_mask=image_mask, text_mask=text_mask, backend="triton"), [image, text]
            ),
        ]

    assert not image_mask.is_contiguous()
    assert not text_mask.is_contiguous()
    expected = run(image_mask.contiguous(), text_mask.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(run(image_mask, text_mask), expected, strict=True))


@pytest.mark.filterwarnings("ignore")  # of the compiler, about the machine it is on
@pytest.mark.parametrize("operation", [efa_loss, hard_similarity, sparse_aggregate])
def test_permuted_tokens_compile(operation):
    """[T, B, D] seen as [B, T, D], as CLIP's transformers leave them."""
    image, text = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in random_tokens(4, 65, 33, 64))
    run = lambda v, t: operation(v, t, backend="triton")  # noqa: E731
    eager = value_and_grads(run, [image, text])
    got = value_and_grads(torch.compile(run, fullgraph=True), [image, text])
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, eager, strict=True))


@pytest.mark.parametrize("operation", [efa_loss, hard_similarity, sparse_aggregate])
def test_default_dtype_changes_nothing(operation):
    image, text = random_tokens(4, 65, 33, 64)

    def run():
        return value_and_grads(lambda v, t: operation(v, t, backend="triton"), [image, text])

    expected = run()
    with default_dtype(torch.bfloat16):
        got = run()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("operation", [efa_loss, hard_similarity, sparse_aggregate])
def test_differentiable_once(operation, backend):
    leaves = [t.requires_grad_() for t in random_tokens(4, 65, 33, 64)]
    value = operation(*leaves, backend=backend)
    value = value if value.ndim == 0 else value.square().sum()
    plain = torch.autograd.grad(value, leaves, retain_graph=True)
    graph = torch.autograd.grad(value, leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, graph, strict=True))
    with pytest.raises(RuntimeError, match=r"differentiable once|once_differentiable"):
        (value + sum(gradient.square().sum() for gradient in graph)).backward()


@pytest.mark.parametrize("masked", [False, True])
def test_a_ragged_batch_compiles_nothing(masked):
    def step(B, L):
        image, text = random_tokens(B, 65, L, 64, torch.bfloat16)
        mask = torch.arange(L, device="cuda") < torch.arange(B, device="cuda")[:, None] % L + 1 if masked else None
        value_and_grads(lambda v, t: efa_loss(v, t, text_mask=mask, backend="triton"), [image, text])

    step(64, 77)
    before = compiled()
    assert sum(before.values()) >= 3
    for B in (37, 17, 8, 2, 1, 63):
        step(B, 77)
        assert compiled() == before, B
    for L in (70, 66):
        step(16, L)
        assert compiled() == before, L


def test_more_samples_than_an_axis_of_the_grid():
    """Axes 1 and 2 of a grid end at 65535 programs. The last samples against the reference."""
    needs_memory(4)
    B, N, L, D = 66000, 16, 5, 16
    image, text = random_tokens(B, N, L, D)
    got = value_and_grads(lambda v, t: sparse_aggregate(v, t, sparsity=0.0, backend="triton")[-7:], [image, text])
    expected = value_and_grads(lambda v, t: sparse_aggregate_reference(v, t, sparsity=0.0), [image[-7:], text[-7:]])
    assert relative_error(got[0], expected[0]) < 1e-5
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert relative_error(a[-7:], b) < 1e-4
        assert not a[:-7].any()


@needs_two
def test_runs_where_the_tensors_are():
    image, text = (t.to("cuda:1") for t in random_tokens(4, 65, 33, 64))
    assert torch.cuda.current_device() == 0
    got = value_and_grads(lambda v, t: efa_loss(v, t, backend="triton"), [image, text])
    expected = value_and_grads(lambda v, t: efa_loss(v, t, backend="torch"), [image, text])
    assert all(a.device == image.device for a in got)
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(got, expected, strict=True))
