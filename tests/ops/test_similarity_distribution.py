"""The distribution's loss: golden values, torch path against reference in float64, contracts of the operator."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.compare import default_dtype, value_and_grads
from helpers.distribution import (
    GOLDEN,
    assert_differentiable_once,
    assert_rows_within_budget,
    back,
    far,
    features,
    ties,
    value_and_gradients,
    value_and_gradients_of_a_ring,
)
from helpers.golden import golden
from helpers.processes import forked
from torch import Tensor

from fmfa_losses import ASDMLoss
from fmfa_losses.functional import asdm_loss, itc_loss, sdm_loss
from fmfa_losses.ops import checks as _checks
from fmfa_losses.ops.options import OBJECTIVES, POSITIVES, REDUCTIONS
from fmfa_losses.ops.similarity_distribution.api import (
    RowLoss,
    similarity_distribution_backward_op,
    similarity_distribution_loss,
    similarity_distribution_loss_reference,
    similarity_distribution_op,
)
from fmfa_losses.ops.similarity_distribution.blocks import torch_blocks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_blocks, "block_elements", 64)


def same(inputs: dict[str, Tensor], **options: object) -> None:
    """The torch path equals the reference in float64, values and gradients."""
    got = value_and_gradients(similarity_distribution_loss, inputs, backend="torch", **options)
    want = value_and_gradients(similarity_distribution_loss_reference, inputs, **options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case: str) -> None:
    expected = golden(case)
    inputs = expected.leaf_inputs(torch.float64)
    value = asdm_loss(**inputs, **GOLDEN[case])
    torch.testing.assert_close(value, expected.value, rtol=1e-9, atol=1e-9)
    value.backward()
    for name, gradient in expected.grads.items():
        torch.testing.assert_close(inputs[name].grad, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("positive", POSITIVES)
@pytest.mark.parametrize("detach_weight", [False, True])
def test_weights(positive: str, detach_weight: bool) -> None:
    options = {"alpha": 3.0, "positive": positive, "detach_weight": detach_weight}
    same(features(23, 23, 5, dtype=torch.float64, images=False), reduction="none", **options)
    same(features(9, 23, 5, offset=11, dtype=torch.float64), both=False, offset=11, **options)


@pytest.mark.parametrize("elements", [12, 40, 1000])
@pytest.mark.parametrize("positive", POSITIVES)
def test_ties_go_to_the_lowest_column(positive: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_blocks, "block_elements", elements)
    same(ties(torch.float64), alpha=3.0, positive=positive)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
def test_labels(objective: str, factor: float) -> None:
    options = {"objective": objective, "image_id_factor": factor}
    same(features(23, 23, 5, dtype=torch.float64), **options)
    same(features(9, 23, 5, offset=3, dtype=torch.float64), both=False, offset=3, reduction="sum", **options)


def test_info_nce() -> None:
    """Ids that are all different and the cross-entropy: lse_i - z_ii in both directions."""
    inputs = features(12, 12, 7, dtype=torch.float64)
    image, text = (torch.nn.functional.normalize(inputs[name], dim=1) for name in ("queries", "keys"))
    z, pairs = 12.0 * image @ text.T, torch.arange(12)
    want = torch.nn.functional.cross_entropy(z, pairs) + torch.nn.functional.cross_entropy(z.T, pairs)
    got = similarity_distribution_loss(
        inputs["queries"], inputs["keys"], pairs, logit_scale=12.0, objective="cross_entropy"
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_slices_of_the_batch_add_up() -> None:
    """Rows of one direction, slice by slice against all columns, sum to both directions at once."""
    inputs = features(13, 13, 6, dtype=torch.float64)
    options = {"logit_scale": 12.0, "alpha": 10.0, "reduction": "sum"}
    q, k, ids = inputs["queries"], inputs["keys"], {"pids": inputs["pids"], "image_ids": inputs["image_ids"]}
    whole = similarity_distribution_loss(q, k, **ids, **options)
    parts = sum(
        similarity_distribution_loss(rows[i], columns, **ids, both=False, offset=i.start, **options)
        for rows, columns in ((q, k), (k, q))
        for i in (slice(0, 5), slice(5, 13))
    )
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("options", [{"alpha": 2.0}, {"alpha": 2.0, "positive": "any"}, {"objective": "cross_entropy"}])
def test_gradcheck(options: dict[str, object]) -> None:
    inputs = features(6, 6, 3, dtype=torch.float64)
    leaves = [inputs[name].requires_grad_() for name in ("queries", "keys", "logit_scale")]

    def loss(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> Tensor:
        return similarity_distribution_loss(
            queries, keys, inputs["pids"], image_ids=inputs["image_ids"], logit_scale=logit_scale, **options
        )

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 16), (77, 77, 16), (40, 129, 64)])
def test_error_budget(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    inputs = features(*shape, dtype=dtype)
    options = {"alpha": 10.0, "both": shape[0] == shape[1]}
    exact = value_and_gradients(
        similarity_distribution_loss_reference,
        {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()},
        **options,
    )
    plain = value_and_gradients(similarity_distribution_loss_reference, inputs, **options)
    got = value_and_gradients(similarity_distribution_loss, inputs, backend="torch", **options)
    assert got["value"].dtype == torch.float32
    assert got["dqueries"].dtype == dtype
    assert_rows_within_budget(got, plain, exact, inputs)


def test_mixed_dtypes_and_autocast() -> None:
    inputs = features(8, 8, 6)
    half = inputs | {"queries": inputs["queries"].bfloat16()}
    want = value_and_gradients(similarity_distribution_loss, half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradients(similarity_distribution_loss, half)
    assert got["dqueries"].dtype == torch.bfloat16
    assert got["dkeys"].dtype == torch.float32
    for name in want:
        assert torch.equal(got[name], want[name]), name


LOSSES = {
    "asdm": asdm_loss,
    "sdm": sdm_loss,
    "itc": lambda *args, **options: itc_loss(*args, targets="identity", **options),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_differentiable_once(loss: str) -> None:
    assert_differentiable_once(LOSSES[loss], backend="torch")


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_default_dtype_changes_nothing(loss: str, default: torch.dtype) -> None:
    inputs = features(9, 9, 6)
    leaves = [inputs[name] for name in ("queries", "keys", "logit_scale")]

    def run() -> list[Tensor]:
        return value_and_grads(lambda i, t, s: LOSSES[loss](i, t, inputs["pids"], logit_scale=s), leaves)

    want = run()
    with default_dtype(default):
        got = run()
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


class OnCuda(Tensor):
    """A tensor on the CPU that says it is on a CUDA device."""

    is_cuda = True


@pytest.mark.parametrize("scale", [torch.tensor(5.0), torch.tensor([5.0], requires_grad=True)])
def test_a_scale_on_the_cpu_is_not_captured(scale: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = features(6, 6, 5, images=False)
    image, text, pids = (inputs[name] for name in ("queries", "keys", "pids"))
    on_cuda = image.as_subclass(OnCuda).requires_grad_()
    asked = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(1) or True)
    with pytest.raises(RuntimeError, match="logit_scale must be on the device"):
        asdm_loss(on_cuda, text, pids, logit_scale=scale)
    assert asked.pop()
    # Nobody asks where it cannot matter.
    asdm_loss(on_cuda, text, pids, logit_scale=5.0)
    asdm_loss(image, text, pids, logit_scale=scale)
    assert not asked


def test_the_gradient_of_a_scale_on_the_cpu_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = features(6, 6, 5, images=False)
    image = inputs["queries"].as_subclass(OnCuda).requires_grad_()
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    loss = asdm_loss(image, inputs["keys"], inputs["pids"], logit_scale=torch.tensor(5.0, requires_grad=True))
    capturing = True
    with pytest.raises(RuntimeError, match="while a CUDA graph is being captured"):
        loss.backward()


SWITCHES = [
    ("", "ieee"),
    ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
    ("torch.backends.cuda.matmul.allow_tf32 = False", "ieee"),
    ("torch.set_float32_matmul_precision('highest')", "ieee"),
    ("torch.set_float32_matmul_precision('high')", "tf32"),
    ("torch.set_float32_matmul_precision('medium')", "tf32"),
    ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
    ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", "ieee"),
    ("torch.backends.fp32_precision = 'tf32'", "tf32"),
    ("torch.backends.fp32_precision = 'ieee'", "ieee"),
]
IMPORTS = """
import warnings
import torch
import benchmarks  # noqa: F401, a checkout that is not installed finds its kernels
from fmfa_losses.kernels._launch import dot_precision, precision
"""
PRECISION = """
warnings.simplefilter("error")
print(precision(torch.float32), dot_precision(torch.float32), precision(torch.bfloat16), dot_precision(torch.float16))
"""


def test_float32_products_follow_torch() -> None:
    """Each in its own process: torch raises where older switches are read after a newer one was set."""
    newer = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    expected = {switch: way for switch, way in SWITCHES if newer or "fp32_precision" not in switch}
    printed = forked(IMPORTS, [switch + PRECISION for switch in expected])
    assert dict(zip(expected, printed, strict=True)) == {
        switch: f"{way} {way} half ieee\n" for switch, way in expected.items()
    }


def test_what_changes_with_the_batch_is_not_specialised() -> None:
    """Triton compiles a kernel anew for every divisibility by 16, and every 1, among arguments that it specialises."""
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel for this platform")
    from fmfa_losses.kernels import asdm_blocks, asdm_gradient, asdm_kept, asdm_prepare, asdm_tiles

    fixed = {"D", "q_stride", "k_stride", "x_stride", "y_stride"}  # of the features
    fixed |= {"cos_stride", "row_stride", "col_stride"}  # always a multiple of 16, and never 1
    fixed |= {"scale", "alpha", "gap_alpha", "eps", "factor", "loss_weight"}  # floats are never specialised
    kernels = (
        asdm_prepare._prepare_kernel,
        asdm_tiles._row_loss_kernel,
        asdm_gradient._gradient_kernel,
        asdm_kept._cosines_kernel,
        asdm_kept._kept_dlogits_kernel,
        asdm_kept._kept_gradient_kernel,
        asdm_blocks._update_kernel,
        asdm_blocks._dlogits_kernel,
    )
    for kernel in kernels:
        numbers = {p.name: p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")}
        assert {name for name, p in numbers.items() if not p.do_not_specialize} <= fixed
        # Ids, a scale and gradients come from the user, at any address.
        vectors = {"pids_ptr", "image_ids_ptr", "scale_ptr", "dloss_ptr", "g_ptr"}
        assert all(p.do_not_specialize for p in kernel.params if p.name in vectors)


def degenerate(case: str) -> tuple[Tensor, Tensor, Tensor, float]:
    inputs = features(9, 9, 6)
    q, k, pids, scale = inputs["queries"], inputs["keys"], inputs["pids"], 50.0
    if case == "one pair":
        q, k, pids = q[:1], k[:1], pids[:1]
    elif case == "zero vectors":
        q, k = q.index_fill(0, torch.tensor([2, 3]), 0.0), k.index_fill(0, torch.tensor([3]), 0.0)
    elif case == "one identity":
        pids = torch.zeros_like(pids)
    elif case == "temperature 0.01":
        scale = 100.0
    elif case == "large float16":
        q, k = (6e4 * torch.nn.functional.normalize(x, dim=1) for x in (q, k))
        q, k = q.half(), k.half()
    return q, k, pids, scale


DEGENERATE = ["one pair", "zero vectors", "one identity", "temperature 0.01", "large float16"]


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize(
    "options", [{"alpha": 10.0}, {"alpha": 10.0, "positive": "any"}, {"objective": "cross_entropy"}]
)
def test_degenerate_inputs_are_finite(case: str, options: dict[str, object]) -> None:
    q, k, pids, scale = degenerate(case)
    inputs = {"queries": q, "keys": k, "pids": pids, "logit_scale": torch.tensor(scale)}
    got = value_and_gradients(similarity_distribution_loss, inputs, backend="torch", **options)
    assert all(tensor.isfinite().all() for tensor in got.values())
    same({name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}, **options)


def test_nan_comes_out() -> None:
    inputs = features(9, 9, 6)
    inputs["queries"][4, 2] = torch.nan
    got = value_and_gradients(similarity_distribution_loss, inputs, both=False, reduction="none", alpha=10.0)
    assert got["value"].isnan().tolist() == [i == 4 for i in range(9)]
    assert got["dkeys"].isnan().all()


@pytest.fixture
def any_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where nobody looks at the scale."""
    monkeypatch.setattr(_checks, "on_host", lambda tensor: False)


SCALES = [0.0, -3.0, -60.0]


@pytest.mark.usefixtures("small_blocks", "any_scale")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("positive", POSITIVES)
@pytest.mark.parametrize("detach_weight", [False, True])
def test_any_scale(scale: float, positive: str, detach_weight: bool) -> None:
    options = {"alpha": 3.0, "positive": positive, "detach_weight": detach_weight}
    number = {"logit_scale": torch.tensor(scale, dtype=torch.float64)}
    same(features(23, 23, 5, dtype=torch.float64, images=False) | number, reduction="none", **options)
    same(features(9, 23, 5, offset=11, dtype=torch.float64) | number, both=False, offset=11, **options)


@pytest.mark.usefixtures("small_blocks", "any_scale")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("options", [{}, {"objective": "cross_entropy"}])
def test_any_scale_without_weights(scale: float, options: dict[str, object]) -> None:
    same(
        features(23, 23, 5, dtype=torch.float64) | {"logit_scale": torch.tensor(scale, dtype=torch.float64)}, **options
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("sizes", [(13,), (3, 9, 1)])
@pytest.mark.parametrize("scale", [7.0, *SCALES])
@pytest.mark.parametrize("positive", POSITIVES)
def test_a_ring(positive: str, scale: float, sizes: tuple[int, ...]) -> None:
    inputs = features(13, 13, 6, dtype=torch.float64) | {"logit_scale": torch.tensor(scale, dtype=torch.float64)}
    options = {"positive": positive, "alpha": 3.0}
    got = value_and_gradients_of_a_ring(inputs, sizes, torch_blocks, **options)
    want = value_and_gradients(similarity_distribution_loss_reference, inputs, reduction="none", **options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_compiled_any_scale(scale: float) -> None:
    inputs = features(6, 6, 4, dtype=torch.float64, images=False)
    inputs["logit_scale"] = torch.tensor(scale, dtype=torch.float64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(queries: Tensor, keys: Tensor, pids: Tensor, logit_scale: Tensor) -> Tensor:
        return asdm_loss(keys, queries, pids, logit_scale=logit_scale, alpha=2.0)

    got = value_and_gradients(loss, inputs)
    want = value_and_gradients(similarity_distribution_loss_reference, inputs, alpha=2.0)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "options", [{"alpha": 10.0}, {"alpha": 1.0, "positive": "any"}, {"objective": "cross_entropy"}]
)
def test_rows_of_any_length(options: dict[str, object]) -> None:
    """Squares of float32 and bfloat16 overflow from 1e19 on and vanish below 1e-23; float64 holds them."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = features(23, 23, 16, dtype=dtype)
        doubles = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        exact = value_and_gradients(similarity_distribution_loss_reference, doubles, **options)
        plain = value_and_gradients(similarity_distribution_loss_reference, inputs, **options)
        got = value_and_gradients(similarity_distribution_loss, far(inputs), backend="torch", **options)
        assert_rows_within_budget(back(got), plain, exact, inputs)
        reference = value_and_gradients(similarity_distribution_loss_reference, far(inputs), **options)
        assert_rows_within_budget(back(reference), plain, exact, inputs)


def test_float64_rows_of_any_length() -> None:
    inputs = features(9, 9, 16, dtype=torch.float64)
    want = value_and_gradients(similarity_distribution_loss, inputs, alpha=2.0)
    for power in (2.0**660, 2.0**-660, 2.0**1019):
        got = value_and_gradients(
            similarity_distribution_loss,
            inputs | {name: power * inputs[name] for name in ("queries", "keys")},
            alpha=2.0,
        )
        torch.testing.assert_close(got["value"], want["value"], rtol=1e-12, atol=0)
        torch.testing.assert_close(got["dqueries"] * power, want["dqueries"], rtol=1e-9, atol=1e-9)


def test_infinity_is_not_a_number() -> None:
    inputs = features(9, 9, 6)
    inputs["queries"][4, 2] = torch.inf
    got = value_and_gradients(similarity_distribution_loss, inputs, both=False, reduction="none", alpha=10.0)
    assert got["value"].isnan().tolist() == [i == 4 for i in range(9)]


def arguments(objective: str, reduction: str) -> tuple[object, ...]:
    inputs = features(5, 7, 4, offset=1)
    spec = RowLoss(objective=objective, alpha=2.0, offset=1, both=False, reduction=reduction)
    floats = (inputs[name].requires_grad_() for name in ("queries", "keys", "logit_scale"))
    queries, keys, scale = floats
    return queries, keys, inputs["pids"], inputs["image_ids"], scale, 1.0, "torch", *spec


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck(objective: str, reduction: str) -> None:
    inputs = arguments(objective, reduction)
    torch.library.opcheck(similarity_distribution_op, inputs)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    loss, *saved = similarity_distribution_op(*detached)
    backward = (torch.ones_like(loss), *saved, *detached[:6], True, *detached[6:])
    torch.library.opcheck(similarity_distribution_backward_op, backward)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    loss = ASDMLoss(positive="any")
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B in (6, 9) if dynamic else (6,):
        inputs = features(B, B, 4)
        ids, scale = (inputs["pids"],), inputs["logit_scale"]
        results = []
        for function in (loss, compiled):
            leaves = [t.clone().requires_grad_() for t in (inputs["queries"], inputs["keys"], scale)]
            value = function(*leaves[:2], *ids, image_ids=inputs["image_ids"], logit_scale=leaves[2])
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        # Eager takes a small batch at once, what is compiled is the operator: another order of sums.
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)


MEMORY = """
import torch
from benchmarks.measure import peak_process_bytes
from fmfa_losses.functional import asdm_loss
from fmfa_losses.ops.similarity_distribution.blocks import torch_blocks
torch_blocks.block_elements = 2**18
def step(B):
    image, text = (torch.randn(B, 8).requires_grad_() for _ in "it")
    asdm_loss(image, text, torch.arange(B), backend="torch").backward()
step(64)
before = peak_process_bytes()
step(4096)
print((peak_process_bytes() - before) / 2**20)
"""


def test_memory_is_a_block_of_rows() -> None:
    """Forward and backward grow the process by less than half of one [B, B] matrix in float32."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4096**2 * 4 / 2**20 / 2


def test_messages() -> None:
    q, k, pids = torch.randn(3, 4), torch.randn(5, 4), torch.arange(5)
    with pytest.raises(ValueError, match="both=True needs as many queries as keys"):
        similarity_distribution_loss(q, k, pids, logit_scale=1.0)
    with pytest.raises(ValueError, match="offset 3, R 3, C 5"):
        similarity_distribution_loss(q, k, pids, logit_scale=1.0, both=False, offset=3)
    with pytest.raises(ValueError, match="one element"):
        similarity_distribution_loss(q, k, pids, logit_scale=torch.ones(2), both=False)
    with pytest.raises(ValueError, match="objective must be one of"):
        similarity_distribution_loss(q, k, pids, logit_scale=1.0, both=False, objective="kl")
    with pytest.raises(ValueError, match="pids must have shape"):
        similarity_distribution_loss(q, k, pids[:3], logit_scale=1.0, both=False)
    with pytest.raises(RuntimeError, match="float64"):
        similarity_distribution_loss(q.double(), k, pids, logit_scale=1.0, both=False, backend="triton")
    with pytest.raises(ValueError, match="alpha must be"):
        ASDMLoss(alpha=-1.0)
    with pytest.raises(ValueError, match="backend must be one of"):
        ASDMLoss(backend="cuda")
