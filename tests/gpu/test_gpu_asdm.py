"""A-SDM through the Triton kernels on a CUDA device."""

from functools import partial

import pytest
import torch
from helpers.compare import default_dtype, value_and_grads
from helpers.distribution import assert_differentiable_once
from helpers.gpu import (
    DTYPES,
    assert_function_within_budget,
    captured_step,
    compiled,
    matmul_precision,
    needs_cuda,
    needs_memory,
    needs_two,
    waiting_raises,
)
from helpers.plain_asdm import plain

from benchmarks.budget import relative_error
from fmfa_losses import ASDMLoss
from fmfa_losses.functional import asdm_loss, itc_loss, sdm_loss

pytestmark = needs_cuda

SHAPES = [(2, 512), (40, 16), (63, 64), (129, 507), (193, 512)]
VARIANTS = [
    {"alpha": 0.0},
    {"positive": "any", "alpha": 0.1},
    {"positive": "any", "detach_weight": True},
]
# Every combination would spend its time in the compiler.
CASES = [(shape, {}, precision) for shape in SHAPES for precision in ("fp32", "bf16")]
CASES += [((193, 512), {}, precision) for precision in ("tf32", "fp16")]
CASES += [((129, 507), options, precision) for options in VARIANTS for precision in ("fp32", "bf16")]
# More than fit into the kernels for small batches: tiles in half precision, blocks of rows in float32.
CASES += [((1500, 64), options, precision) for options in ({}, *VARIANTS) for precision in ("fp32", "bf16")]


def draw(B, D, dtype=torch.float32, ids=None):
    """Image and text features that correlate a little, and pids of which about half repeat.

    No row is certain of its positive: gradients of a saturated softmax are differences of rounding errors.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(B, D, generator=generator)
    text = 0.15 * image + torch.randn(B, D, generator=generator)
    pids = torch.randint(ids or max(1, B // 2), (B,), generator=generator)
    return image.to("cuda", dtype), text.to("cuda", dtype), pids.to("cuda")


@pytest.mark.parametrize(("shape", "options", "precision"), CASES)
def test_values_and_gradients(shape, options, precision):
    image, text, pids = draw(*shape)
    assert_function_within_budget(
        lambda v, t: asdm_loss(v, t, pids, reduction="none", backend="triton", **options),
        lambda v, t: plain(v, t, pids, **options),
        [image, text],
        precision,
        amplification=50,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_soft_labels(precision):
    image, text, pids = draw(77, 64, ids=20)
    image_ids = torch.arange(77, device="cuda") // 2
    assert_function_within_budget(
        lambda v, t: asdm_loss(v, t, pids, image_ids=image_ids, reduction="none", backend="triton"),
        lambda v, t: plain(v, t, pids, image_ids=image_ids),
        [image, text],
        precision,
        amplification=50,
    )


def test_learnable_scale():
    image, text, pids = draw(129, 64)
    scale = torch.tensor(30.0, device="cuda")

    def loss(backend):
        return lambda v, t, s: asdm_loss(v, t, pids, logit_scale=s, backend=backend)

    exact = value_and_grads(loss("torch"), [t.double() for t in (image, text, scale)])
    got = value_and_grads(loss("triton"), [image, text, scale])
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("B", [1000, 5000])
def test_deterministic_to_the_bit(B, precision):
    image, text, pids = draw(B, 512, DTYPES[precision])
    with matmul_precision(precision):
        runs = [value_and_grads(lambda v, t: asdm_loss(v, t, pids, backend="triton"), [image, text]) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.filterwarnings("ignore")  # of the compiler, about the machine it is on
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(dynamic):
    loss = ASDMLoss(backend="triton")
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for B in (64, 77) if dynamic else (64,):
        image, text, pids = draw(B, 64)
        eager = value_and_grads(lambda v, t, pids=pids: loss(v, t, pids), [image, text])
        got = value_and_grads(lambda v, t, pids=pids: compiled(v, t, pids), [image, text])
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, eager, strict=True))


@pytest.mark.parametrize("B", [128, 1500])
def test_captured_graph_replays(B):
    loss = ASDMLoss(backend="triton")
    image, text, pids = draw(B, 64)
    image.requires_grad_()
    text.requires_grad_()

    def step():
        value = loss(image, text, pids)
        # Without its graph: one that lives on binds the leaves to the stream that it was made on.
        return value.detach(), *torch.autograd.grad(value, (image, text))

    graph, captured = captured_step(step)
    with torch.no_grad():
        image.normal_()
        text.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("B", [128, 1500])
def test_host_never_waits(B):
    loss = ASDMLoss(backend="triton")
    image, text, pids = draw(B, 64)
    image.requires_grad_()
    loss(image, text, pids, logit_scale=torch.tensor(50.0)).backward()  # compiled; the scale stays on the CPU
    with waiting_raises():
        loss(image, text, pids).backward()


def test_more_pairs_than_32_bits_count():
    """65536 x 65536 logits: twice what 31 bits address. The last rows against the torch path."""
    needs_memory(8)
    image, text, pids = draw(65536, 64)
    got = value_and_grads(lambda v, t: asdm_loss(v, t, pids, backend="triton"), [image, text])
    expected = value_and_grads(lambda v, t: asdm_loss(v, t, pids, backend="torch"), [image, text])
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-4
    assert relative_error(got[1][-100:], expected[1][-100:]) < 1e-3


@pytest.mark.parametrize(("B", "dtype"), [(40, torch.float32), (1500, torch.float32), (1500, torch.bfloat16)])
def test_ids_of_any_stride(B, dtype):
    image, text, pids = draw(B, 64, dtype)
    image_ids = torch.arange(B, device="cuda") // 2

    def run(pids, image_ids):
        loss = lambda v, t: asdm_loss(v, t, pids, image_ids=image_ids, backend="triton")  # noqa: E731
        return value_and_grads(loss, [image, text])

    column, every_second = torch.stack([pids, -pids], dim=1)[:, 0], image_ids.repeat_interleave(2)[::2]
    same = pids[:1].expand(B)
    for strided in ((column, every_second), (same, column)):
        assert not any(ids.is_contiguous() for ids in strided)
        expected = run(*(ids.contiguous() for ids in strided))
        assert all(torch.equal(a, b) for a, b in zip(run(*strided), expected, strict=True))


@pytest.mark.parametrize("B", [40, 1500])
def test_default_dtype_changes_nothing(B):
    image, text, pids = draw(B, 64)
    scale = torch.tensor(30.0, device="cuda")

    def run():
        loss = lambda v, t, s: asdm_loss(v, t, pids, logit_scale=s, backend="triton")  # noqa: E731
        return value_and_grads(loss, [image, text, scale])

    expected = run()
    with default_dtype(torch.bfloat16):
        got = run()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("loss", [asdm_loss, sdm_loss, itc_loss])
def test_differentiable_once(loss, backend):
    loss = partial(loss, targets="identity") if loss is itc_loss else loss
    assert_differentiable_once(loss, backend, "cuda")


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_scale_on_the_cpu_is_not_captured(backend):
    image, text, pids = draw(40, 64)
    loss = ASDMLoss(backend=backend)
    expected = loss(image, text, pids, logit_scale=torch.tensor(50.0))
    stream = torch.cuda.Stream()
    with (
        pytest.raises(RuntimeError, match="logit_scale must be on the device of the features"),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream),
    ):
        loss(image, text, pids, logit_scale=torch.tensor(50.0))
    assert torch.equal(loss(image, text, pids, logit_scale=torch.tensor(50.0)), expected)  # the device is as before


@pytest.mark.parametrize(
    ("precision", "first", "others"),
    [
        ("fp32", 64, (37, 17, 8, 2, 1, 63)),
        ("fp32", 128, (65, 97, 256, 999)),
        ("fp32", 300, (1500, 257, 999, 2048)),
        ("bf16", 64, (37, 17, 8, 2, 1, 63, 128, 256)),
        ("bf16", 1500, (1025, 2047)),
    ],
)
def test_a_ragged_batch_compiles_nothing(precision, first, others):
    def step(B, start):
        image, text, pids = draw(B + start, 64, DTYPES[precision])
        value_and_grads(lambda v, t: asdm_loss(v, t, pids[start:], backend="triton"), [image[start:], text[start:]])

    with matmul_precision(precision):
        step(first, 0)
        before = compiled()
        assert sum(before.values()) >= 3
        for B in others:
            step(B, 1)  # ids that do not begin at a multiple of 16 bytes
            assert compiled() == before, B


@needs_two
def test_runs_where_the_tensors_are():
    image, text, pids = (t.to("cuda:1") for t in draw(100, 64))
    assert torch.cuda.current_device() == 0
    got = value_and_grads(lambda v, t: asdm_loss(v, t, pids, backend="triton"), [image, text])
    expected = value_and_grads(lambda v, t: asdm_loss(v, t, pids, backend="torch"), [image, text])
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(got, expected, strict=True))
