"""The kernels of the similarity distribution, through Triton's interpreter, against the reference in float64."""

from typing import Any

import pytest
import torch
import triton.language as tl
from fmfa_losses.kernels import _asdm, asdm_blocks, asdm_gradient, asdm_kept, asdm_prepare
from fmfa_losses.kernels import asdm_tiles as kernels
from fmfa_losses.kernels._launch import launch
from helpers.compare import assert_close, default_dtype, value_and_grads
from helpers.distribution import (
    GOLDEN,
    assert_differentiable_once,
    assert_rows_within_budget,
    back,
    far,
    features,
    rounded_twice,
    ties,
    value_and_gradients,
    value_and_gradients_of_a_ring,
)
from helpers.golden import golden
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fmfa_losses.functional import asdm_loss, itc_loss, sdm_loss
from fmfa_losses.ops import checks as _checks
from fmfa_losses.ops.options import OBJECTIVES, POSITIVES
from fmfa_losses.ops.similarity_distribution.api import (
    RowLoss,
    similarity_distribution_loss,
    similarity_distribution_loss_reference,
)
from fmfa_losses.ops.similarity_distribution.blocks import torch_blocks


def go(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A way of larger batches at sizes that the interpreter can bear."""
    if way != "small tiles":
        monkeypatch.setattr(_asdm, "SMALL", dict.fromkeys(_asdm.SMALL, 0))
    if way != "kept":
        monkeypatch.setattr(_asdm, "KEPT", dict.fromkeys(_asdm.KEPT, 0))
    if way == "tiles":
        monkeypatch.setattr(_asdm, "precision", lambda dtype: "half")


@pytest.fixture(params=["kept", "tiles", "blocks"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """[R, C] kept, half precision's tiles, float32's blocks."""
    go(request.param, monkeypatch)
    monkeypatch.setattr(asdm_blocks, "block_elements", 1100)
    monkeypatch.setitem(asdm_blocks.ROWS, "narrow", (8, 32))  # several tiles along a row
    return request.param


def check(inputs: dict[str, Tensor], *, any_order: bool = False, **options: object) -> None:
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    exact = value_and_gradients(similarity_distribution_loss_reference, doubles, **options)
    plain = value_and_gradients(similarity_distribution_loss_reference, inputs, **options)
    got = value_and_gradients(similarity_distribution_loss, inputs, backend="triton", **options)
    rounded = rounded_twice(doubles, **options) if any_order else None
    assert_rows_within_budget(got, plain, exact, inputs, rounded=rounded)


@pytest.mark.parametrize("shape", [(1, 16), (63, 64), (77, 16), (20, 507)])
def test_small(shape: tuple[int, int]) -> None:
    B, D = shape
    check(features(B, B, D, images=False), alpha=10.0)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("shape", [(77, 507), (129, 64)])
def test_large(shape: tuple[int, int]) -> None:
    B, D = shape
    check(features(B, B, D, images=False), alpha=10.0)


@pytest.mark.parametrize("shape", [(77, 507), (40, 16)])
def test_rows_of_wide_blocks(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    B, D = shape
    go("blocks", monkeypatch)
    monkeypatch.setattr(asdm_blocks, "WIDE", B)
    monkeypatch.setattr(asdm_blocks, "block_elements", 1100)
    check(features(B, B, D), alpha=10.0, positive="any")


@pytest.mark.parametrize(
    ("pairs", "dtypes", "tiles"),
    [
        (1024, (torch.float32, torch.float32), True),
        (1025, (torch.float32, torch.float32), False),
        (1025, (torch.float16, torch.float32), False),
        (5000, (torch.float16, torch.float16), True),
    ],
)
def test_large_float32_batches_go_through_blocks(pairs: int, dtypes: tuple[torch.dtype, ...], tiles: bool) -> None:
    queries, keys = (torch.empty(B, 8, dtype=dtype) for B, dtype in zip((3, pairs), dtypes, strict=True))
    assert kernels.takes(queries, keys) is tiles


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("positive", POSITIVES)
@pytest.mark.parametrize("detach_weight", [False, True])
def test_weights(positive: str, detach_weight: bool) -> None:
    options = {"alpha": 3.0, "positive": positive, "detach_weight": detach_weight}
    check(features(70, 70, 16, images=False), reduction="none", **options)
    check(features(17, 70, 16, offset=41), both=False, offset=41, **options)


@pytest.mark.parametrize("sizes", [(24,), (7, 5, 11, 1)])
@pytest.mark.parametrize(
    "options",
    [{"alpha": 3.0}, {"alpha": 3.0, "positive": "any", "detach_weight": True}, {"objective": "cross_entropy"}],
)
def test_a_ring(sizes: tuple[int, ...], options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of several ranks' columns, and of some of the own rows, in the order in which they arrive."""
    monkeypatch.setattr(asdm_blocks, "block_elements", 60)
    inputs = features(24, 24, 16)
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    exact = value_and_gradients(similarity_distribution_loss_reference, doubles, reduction="none", **options)
    plain = value_and_gradients(similarity_distribution_loss_reference, inputs, reduction="none", **options)
    got = value_and_gradients_of_a_ring(inputs, sizes, asdm_blocks, **options)
    rounded = rounded_twice(doubles, reduction="none", **options)
    assert_rows_within_budget(got, plain, exact, inputs, rounded=rounded)


def test_ties_in_a_ring_go_to_the_lowest_column() -> None:
    inputs = ties(torch.float32)
    for positive in POSITIVES:
        got, want = (
            value_and_gradients_of_a_ring(inputs, (5, 4, 3), way, alpha=3.0, positive=positive)
            for way in (asdm_blocks, torch_blocks)
        )
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("positive", ["paired", "any"])
def test_ties_go_to_the_lowest_column(positive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asdm_blocks, "block_elements", 40)
    check(ties(torch.float32), alpha=3.0, positive=positive)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_labels(objective: str) -> None:
    options = {"objective": objective}
    check(features(63, 63, 16), **options)
    check(features(17, 63, 16, offset=3, images=False), both=False, offset=3, reduction="sum", **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("way", ["small tiles", "kept", "blocks"])
def test_dtypes(dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    monkeypatch.setattr(asdm_blocks, "block_elements", 400)
    check(features(40, 40, 64, dtype=dtype, images=False), alpha=10.0)


def column(ids: Tensor) -> Tensor:
    return torch.stack([-ids, ids], dim=1)[:, 1]


def every_second(ids: Tensor) -> Tensor:
    return torch.stack([ids, -ids], dim=1).flatten()[::2]


def expanded(ids: Tensor) -> Tensor:
    return ids[:1].expand(len(ids))


LOSSES = {
    "asdm": asdm_loss,
    "sdm": sdm_loss,
    "itc": lambda *args, **options: itc_loss(*args, targets="identity", **options),
}


@pytest.mark.parametrize("way", ["small tiles", "kept", "tiles", "blocks"])
@pytest.mark.parametrize("ids", [column, every_second, expanded])
@pytest.mark.parametrize("loss", ["asdm", "itc"])
def test_ids_of_any_stride(loss: str, ids: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    monkeypatch.setattr(asdm_blocks, "block_elements", 100)
    inputs = features(23, 23, 16)
    pids = ids(inputs["pids"])
    options = {} if loss == "itc" else {"image_ids": ids(inputs["image_ids"])}
    assert not pids.is_contiguous()
    got, want = (
        value_and_grads(
            lambda i, t, b=backend: LOSSES[loss](i, t, pids, logit_scale=5.0, backend=b, **options),
            [inputs["queries"], inputs["keys"]],
        )
        for backend in ("triton", "torch")
    )
    assert_close(got, want, 2e-5)


def test_a_launch_refuses_what_is_not_contiguous() -> None:
    ids = column(torch.arange(5))
    with pytest.raises(RuntimeError, match=r"_prepare_kernel reads pids_ptr as contiguous, got shape \[5\]"):
        launch(asdm_prepare._prepare_kernel, (1, 2), torch.ones(5, 4), torch.ones(5, 4), ids)


@pytest.mark.of_torch
@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_default_dtype_changes_nothing(loss: str, default: torch.dtype) -> None:
    inputs = features(23, 23, 16, images=False)

    def run() -> list[Tensor]:
        return value_and_grads(
            lambda i, t, s: LOSSES[loss](i, t, inputs["pids"], logit_scale=s, backend="triton"),
            [inputs["queries"], inputs["keys"], inputs["logit_scale"]],
        )

    want = run()
    with default_dtype(default):
        got = run()
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss", LOSSES)
def test_differentiable_once(loss: str) -> None:
    assert_differentiable_once(LOSSES[loss], backend="triton")


def test_mixed_dtypes_and_strided_rows() -> None:
    inputs = features(20, 20, 16, images=False)
    tokens = torch.stack([inputs["queries"], torch.zeros_like(inputs["queries"])], dim=1)
    keys = inputs["keys"].half().requires_grad_()
    options = {"pids": inputs["pids"], "logit_scale": 12.0, "alpha": 1.0}
    results = []
    for queries in (inputs["queries"].requires_grad_(), tokens.requires_grad_()):
        rows = queries if queries.ndim == 2 else queries[:, 0]
        value = similarity_distribution_loss(rows, keys, **options, backend="triton")
        dqueries, dkeys = torch.autograd.grad(value, (queries, keys))
        results.append((value.detach(), dqueries if queries.ndim == 2 else dqueries[:, 0], dkeys))
    for plain, strided in zip(*results, strict=True):
        assert torch.equal(plain, strided)
    assert results[0][2].dtype == torch.float16


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case: str) -> None:
    expected = golden(case)
    inputs = expected.leaf_inputs(torch.float32)
    value = asdm_loss(**inputs, **GOLDEN[case], backend="triton")
    torch.testing.assert_close(value, expected.value.float(), rtol=1e-5, atol=1e-5)
    value.backward()
    for name, gradient in expected.grads.items():
        torch.testing.assert_close(inputs[name].grad, gradient.float(), rtol=1e-4, atol=1e-4)


def degenerate(case: str) -> dict[str, Tensor]:
    inputs = features(33, 33, 32, images=False)
    if case == "zero vectors":
        inputs["queries"][2:4], inputs["keys"][3] = 0, 0
    elif case == "one identity":
        inputs["pids"] = torch.zeros_like(inputs["pids"])
    elif case == "temperature 0.01":
        # Eighths: products add up without rounding, and forward and backward have the same logits in every order. The
        # interpreter leaves the order to a BLAS library, which chooses it by the tile's shape and the processor.
        inputs |= {name: (8 * inputs[name]).round() / 8 for name in ("queries", "keys")}
        inputs["logit_scale"] = torch.tensor(100.0)
    elif case == "large float16":
        for name in ("queries", "keys"):
            inputs[name] = (6e4 * torch.nn.functional.normalize(inputs[name], dim=1)).half()
    return inputs


@pytest.mark.parametrize("case", ["zero vectors", "one identity", "temperature 0.01", "large float16"])
@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    "options", [{"alpha": 10.0}, {"alpha": 1.0, "positive": "any"}, {"objective": "cross_entropy"}]
)
def test_degenerate_inputs(case: str, options: dict[str, object]) -> None:
    """Finite, and the gradient of a zero vector is that of the identity. Enough rows to average rounding errors."""
    check(degenerate(case), **options)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    "options", [{"alpha": 10.0}, {"alpha": 1.0, "positive": "any"}, {"objective": "cross_entropy"}]
)
def test_any_order_of_summation(seed: int, options: dict[str, object]) -> None:
    """Temperature 0.01 and features whose products do not add up exactly, in several orders."""
    inputs = features(33, 33, 32, images=False)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    inputs |= {name: inputs[name][:, order].contiguous() for name in ("queries", "keys")}
    check(inputs | {"logit_scale": torch.tensor(100.0)}, any_order=True, **options)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("scale", [0.0, -3.0, -60.0])
@pytest.mark.parametrize("positive", POSITIVES)
def test_any_scale(scale: float, positive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where nobody looks at the scale."""
    monkeypatch.setattr(_checks, "on_host", lambda tensor: False)
    number = {"logit_scale": torch.tensor(scale)}
    options = {"alpha": 3.0, "positive": positive}
    check(features(40, 40, 16, images=False) | number, reduction="none", any_order=True, **options)
    check(features(17, 40, 16, offset=11) | number, both=False, offset=11, any_order=True, **options)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("scale", [0.0, -60.0])
@pytest.mark.parametrize("options", [{}, {"objective": "cross_entropy"}, {"alpha": 1.0, "detach_weight": True}])
def test_any_scale_without_weights(scale: float, options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "on_host", lambda tensor: False)
    check(features(40, 40, 16) | {"logit_scale": torch.tensor(scale)}, any_order=True, **options)


@pytest.mark.filterwarnings("ignore:overflow encountered in reduce:RuntimeWarning")
@pytest.mark.parametrize("way", ["small tiles", "kept", "tiles", "blocks"])
@pytest.mark.parametrize(
    "options", [{"alpha": 10.0}, {"alpha": 1.0, "positive": "any"}, {"objective": "cross_entropy"}]
)
def test_rows_of_any_length(way: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of float32 overflow from 1e19 on and vanish below 1e-23: the loss does not see it."""
    go(way, monkeypatch)
    monkeypatch.setattr(asdm_blocks, "block_elements", 1100)
    for inputs, more in (
        (features(40, 40, 72), {}),
        (features(17, 40, 16, offset=3), {"both": False, "offset": 3}),
    ):
        doubles = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        exact = value_and_gradients(similarity_distribution_loss_reference, doubles, **options, **more)
        plain = value_and_gradients(similarity_distribution_loss_reference, inputs, **options, **more)
        got = value_and_gradients(similarity_distribution_loss, far(inputs), backend="triton", **options, **more)
        assert_rows_within_budget(back(got), plain, exact, inputs)


@pytest.mark.usefixtures("large")
def test_infinity_is_not_a_number() -> None:
    inputs = features(9, 9, 16, images=False)
    inputs["queries"][4, 2] = torch.inf
    got = value_and_gradients(
        similarity_distribution_loss, inputs, both=False, reduction="none", alpha=10.0, backend="triton"
    )
    assert got["value"].isnan().tolist() == [i == 4 for i in range(9)]


def test_nan_comes_out() -> None:
    inputs = features(9, 9, 16, images=False)
    inputs["queries"][4, 2] = torch.nan
    got = value_and_gradients(
        similarity_distribution_loss, inputs, both=False, reduction="none", alpha=10.0, backend="triton"
    )
    assert got["value"].isnan().tolist() == [i == 4 for i in range(9)]
    assert got["dkeys"].isnan().all()


@pytest.mark.parametrize("way", ["small tiles", "kept", "tiles"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_last_program_adds_up_all(way: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of many programs, more than are added at once; the last one has rows beyond the end."""
    go(way, monkeypatch)
    monkeypatch.setattr(kernels, "SUM_BLOCK", tl.constexpr(4))
    inputs, options = features(70, 70, 16), {"alpha": 3.0, "backend": "triton"}
    plain = {name: t for name, t in inputs.items() if t is not None}
    rows, total = (similarity_distribution_loss(**plain, **options, reduction=r) for r in ("none", reduction))
    torch.testing.assert_close(total, getattr(rows, reduction)(), rtol=1e-6, atol=0)


def test_many_tiles_of_kept_dlogits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More sums along rows and columns than a program adds at once, of the radial terms and of the scale's gradient."""
    go("kept", monkeypatch)
    monkeypatch.setitem(_asdm.BLOCKS, ("logits", "kept", "ieee"), (8, 16, 16, None, 4, 4))
    monkeypatch.setattr(asdm_kept, "TILES", tl.constexpr(2))
    monkeypatch.setattr(asdm_kept, "SUMS", tl.constexpr(64))
    check(features(70, 70, 16), alpha=10.0)


@pytest.mark.usefixtures("large")
def test_reruns_are_bitwise_equal() -> None:
    inputs = features(40, 40, 16)
    first, second = (
        value_and_gradients(similarity_distribution_loss, inputs, alpha=10.0, backend="triton") for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_operators_match_their_fake_kernels() -> None:
    """The same shapes, dtypes and gradients whichever backend runs."""
    inputs = features(5, 9, 16, offset=1)
    spec = RowLoss(alpha=2.0, offset=1, both=False)
    leaves = [inputs[name].requires_grad_() for name in ("queries", "keys", "logit_scale")]
    arguments = (*leaves[:2], inputs["pids"], inputs["image_ids"], leaves[2], 1.0, "triton", *spec)
    torch.library.opcheck(
        torch.ops.fmfa_losses.similarity_distribution.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


class Launches(TorchDispatchMode):
    """Names of the kernels launched, and of the torch operations between them that would be one."""

    # Memory and views; the tests poison what they allocate. A `to` that copies is seen as `_to_copy`, too.
    FREE = ("alias", "detach", "empty", "empty_like", "expand", "fill_", "promote_types", "to", "view")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside = False
        for module in (kernels, asdm_prepare, asdm_gradient, asdm_kept):
            monkeypatch.setattr(module, "launch", self.launch)

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        self.names.append(kernel.__name__)
        self.inside = True
        launch(kernel, grid, *arguments, **options)
        self.inside = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not self.inside and function.namespace != "fmfa_losses" and name not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_launches_of_a_small_batch(reduction: str, both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = features(17, 17, 16)
    spec = RowLoss(alpha=10.0, both=both, reduction=reduction)
    arguments = (inputs["queries"], inputs["keys"], inputs["pids"], inputs["image_ids"], inputs["logit_scale"], 1.0)
    gradient = torch.ones(() if reduction == "mean" else 17)
    with Launches(monkeypatch) as count:
        _, *saved = kernels.forward(*arguments, spec)
        assert count.names == ["_prepare_kernel", "_row_loss_kernel", *["sum"] * (reduction == "none")]
        count.names.clear()
        kernels.backward(gradient, *saved, *arguments, True, spec)
        assert count.names == [*["_gradient_kernel"] * (1 if both else 2), "sum"]


@pytest.mark.parametrize("scale_learns", [False, True])
@pytest.mark.parametrize("way", ["small tiles", "kept"])
def test_launches_of_a_step(way: str, scale_learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of autograd's own, for the gradient of the loss; none for statistics that nobody differentiates.

    Four for a small batch, five where the scale learns, whose gradient is a sum.
    """
    go(way, monkeypatch)
    inputs = features(17, 17, 16)
    leaves = [inputs[name].requires_grad_() for name in ("queries", "keys", "logit_scale")[: 3 if scale_learns else 2]]
    with Launches(monkeypatch) as count:
        loss = asdm_loss(*leaves[:2], inputs["pids"], logit_scale=inputs["logit_scale"], backend="triton")
        torch.autograd.grad(loss, leaves)
    if way == "small tiles":
        step = ["_prepare_kernel", "_row_loss_kernel", "ones_like", "_gradient_kernel"]
        assert count.names == step + ["sum"] * scale_learns
    else:
        forward = ["_prepare_kernel", "_cosines_kernel", "_row_loss_kernel"]
        assert count.names == [*forward, "ones_like", "_kept_dlogits_kernel", "_kept_gradient_kernel"]
