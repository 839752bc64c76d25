"""The operators as torch.library sees them: opcheck, torch.compile, choice of backend."""

import importlib.util
import sys
from typing import ClassVar

import pytest
import torch
from helpers.compare import value_and_grads
from helpers.errors import explains
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fmfa_losses.functional import (
    asdm_loss,
    cmpm_loss,
    efa_loss,
    hard_similarity,
    itc_loss,
    sdm_loss,
    sigmoid_loss,
    sparse_aggregate,
    tal_loss,
    triplet_loss,
    trl_loss,
)
from fmfa_losses.ops import backend as _backend
from fmfa_losses.ops.aggregation import sparse_aggregation_backward_op, sparse_aggregation_op
from fmfa_losses.ops.alignment import alignment_rows_backward_op, alignment_rows_op
from fmfa_losses.ops.backend import select_backend, why_not_triton
from fmfa_losses.ops.hard_similarity import hard_similarity_backward_op, hard_similarity_op
from fmfa_losses.ops.linear_cross_entropy import linear_cross_entropy
from fmfa_losses.ops.precision import kernels_run
from fmfa_losses.ops.ranking import ranking
from fmfa_losses.ops.similarity_distribution import similarity_distribution_loss


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool", ["lse", "mean"])
def test_opcheck_hard_similarity(pool, masked):
    x, e = torch.randn(2, 3, 4), torch.randn(3, 5, 4)
    x_mask, e_mask = (torch.rand(2, 3) > 0.3, torch.rand(3, 5) > 0.3) if masked else (None, None)
    args = (x.requires_grad_(), e.requires_grad_(), x_mask, e_mask, pool, 1.0, True, "torch")
    torch.library.opcheck(hard_similarity_op, args)
    sim, *saved = (t.detach() for t in hard_similarity_op(*args))
    torch.library.opcheck(
        hard_similarity_backward_op,
        (torch.ones_like(sim), *saved, x.detach(), e.detach(), x_mask, e_mask, pool, "torch"),
    )


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_alignment_rows(masked):
    """The same bits twice, too: what the operator returns besides is no memory that nobody wrote."""
    image, text = torch.randn(4, 6, 5, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    masks = (torch.rand(4, 6) > 0.3, torch.rand(4, 3) > 0.5) if masked else (None, None)
    args = (image, text, *masks, None, "lse", 1.0, True)
    torch.library.opcheck(alignment_rows_op, args)
    text_sim, image_sim, *saved = (t.detach() for t in alignment_rows_op(*args))
    inputs = (image.detach(), text.detach(), *masks, None, "lse")
    torch.library.opcheck(alignment_rows_backward_op, (text_sim, image_sim, *saved, *inputs))


def opcheck_sparse_aggregate(image, text, *masks, strict=False):
    options = None, strict, "torch"
    torch.library.opcheck(sparse_aggregation_op, (image.requires_grad_(), text.requires_grad_(), *masks, *options))
    image, text = image.detach(), text.detach()
    joint, total = sparse_aggregation_op(image, text, *masks, *options)
    args = (torch.ones_like(joint), image, text, *masks, total, *options)
    torch.library.opcheck(sparse_aggregation_backward_op, args)
    return joint, total, *sparse_aggregation_backward_op(*args)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_sparse_aggregate(masked):
    masks = (torch.rand(2, 6) > 0.3, torch.rand(2, 3) > 0.3) if masked else (None, None)
    opcheck_sparse_aggregate(torch.randn(2, 6, 4), torch.randn(2, 3, 4), *masks, strict=masked)


def permuted_tokens():
    """[L, B, D] as CLIP has them, seen as [B, L, D], and a mask without its first column."""
    image, text = (torch.randn(n, 2, 4).permute(1, 0, 2) for n in (6, 3))
    return image, text, torch.tensor([[True] * 7, [True] * 4 + [False] * 3])[:, 1:]


def test_opcheck_sparse_aggregate_permuted():
    assert all(t.is_contiguous() for t in opcheck_sparse_aggregate(*permuted_tokens(), None))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_compile_sparse_aggregate_permuted(dynamic):
    torch._dynamo.reset()
    image, text, mask = permuted_tokens()
    fn = lambda i, t: sparse_aggregate(i, t, image_mask=mask)  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert not image.clone().is_contiguous()  # the leaves of value_and_grads are permuted, too
    for a, b in zip(value_and_grads(compiled, (image, text)), value_and_grads(fn, (image, text)), strict=True):
        torch.testing.assert_close(a, b)


class Made(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Stop(torch.autograd.Function):
    """The identity, whose gradient is missing rather than zero."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return None


def test_sparse_aggregate_backward_is_given_no_zeros():
    image, text = torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    joint, total = sparse_aggregation_op(image, text, None, None, 0.3, False, "torch")
    assert joint.requires_grad
    assert not total.requires_grad
    with Made() as made:
        joint.backward(torch.ones_like(joint))
    at = next(n for n, name in enumerate(made.names) if "bmm" in name)  # the first product of the gradient
    # The gradients of image and text, which are added to, and the scores: none for the second output.
    assert sum("zeros" in name for name in made.names[:at]) == 3


def test_sparse_aggregate_without_a_gradient_of_joint_gives_none():
    image, text = torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    joint = sparse_aggregate(image, text)
    with Made() as made:
        Stop.apply(joint).sum().backward()
    assert image.grad is None
    assert text.grad is None
    assert not any("bmm" in name for name in made.names)


def losses(dtype=torch.float32):
    image, text = torch.randn(4, 6, 8, dtype=dtype), torch.randn(4, 5, 8, dtype=dtype)
    masks = {"image_mask": torch.rand(4, 6) > 0.2, "text_mask": torch.rand(4, 5) > 0.2}
    pids = torch.tensor([0, 1, 0, 2])
    return {
        "hard_similarity": (lambda i, t: hard_similarity(i, t, x_mask=masks["image_mask"]), (image, text)),
        "sparse_aggregate": (lambda i, t: sparse_aggregate(i, t, image_mask=masks["image_mask"]), (image, text)),
        "efa": (lambda i, t: efa_loss(i, t, **masks), (image, text)),
        "asdm": (lambda i, t: asdm_loss(i, t, pids), (image[:, 0], text[:, 0])),
    }


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["hard_similarity", "sparse_aggregate", "efa", "asdm"])
# The compiler itself warns about its own internals, by version; the comparison below is what counts here.
@pytest.mark.filterwarnings("ignore")
def test_compile_fullgraph_equals_eager(name, dynamic):
    torch._dynamo.reset()
    fn, inputs = losses()[name]
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    # Eager takes a small batch of A-SDM at once, what is compiled is the operator: another order of sums.
    for a, b in zip(value_and_grads(compiled, inputs), value_and_grads(fn, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def getitem(x, index):
    """x[index], whose own code wants the device of x to be there."""
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, int):
            x = torch.ops.aten.select.int(x, dim, part)
            continue
        if part is None:
            x = torch.ops.aten.unsqueeze.default(x, dim)
        elif isinstance(part, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop)
        else:
            raise NotImplementedError(part)
        dim += 1
    return x


LOSSES = {
    "asdm": asdm_loss, "cmpm": cmpm_loss, "itc": lambda v, t, pids: itc_loss(v, t, pids, targets="identity"),
    "sdm": sdm_loss, "sigmoid": sigmoid_loss, "tal": tal_loss, "triplet": triplet_loss, "trl": trl_loss,
}  # fmt: skip
OF_TOKENS = {
    "efa": lambda v, t, mask: efa_loss(v, t, text_mask=mask),
    "hard_similarity": lambda v, t, mask: hard_similarity(v, t, e_mask=mask),
    "linear_cross_entropy": lambda v, t, mask: linear_cross_entropy(
        v[:, 0], t[0], None, torch.arange(4, device=v.device)
    )[0],
    "sparse_aggregate": lambda v, t, mask: sparse_aggregate(v, t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*LOSSES, *OF_TOKENS])
@pytest.mark.filterwarnings("ignore")
def test_compile_traces_what_only_an_accelerator_runs(monkeypatch, name, dtype):
    """Fake tensors on a CUDA device: all that chooses the kernels is traced, none of them runs."""

    def search(name):
        raise AssertionError(f"torch.compile (2.6 to 2.11) does not trace the search for {name}")

    torch._dynamo.reset()
    compiled = torch.compile({**LOSSES, **OF_TOKENS}[name], fullgraph=True, backend="eager")
    monkeypatch.delenv("FMFA_LOSSES_BACKEND", raising=False)
    monkeypatch.setattr(_backend, "NO_TRITON", None)
    lists = importlib.util.find_spec("triton") is not None  # the kernels' module knows the size of a mask's lists
    with FakeTensorMode(), monkeypatch.context() as patch:
        patch.setattr(FakeTensor, "__getitem__", getitem)
        patch.setattr(FakeTensor, "__invert__", lambda x: torch.bitwise_not(x))
        image, text = (torch.empty(4, T, 8, device="cuda", dtype=dtype) for T in (6, 5))
        third = torch.empty(4, 5, dtype=torch.bool, device="cuda") if lists else None
        if name in LOSSES:
            image, text, third = image[:, 0], text[:, 0], torch.empty(4, dtype=torch.int64, device="cuda")
        assert select_backend("auto", image) == "triton"
        patch.setattr(importlib.util, "find_spec", search)
        assert compiled(image, text, third).device.type == "cuda"


def test_explicit_triton_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(2, 3, 4)
    with explains(RuntimeError, ("triton", "CUDA or ROCm"), "cpu", ('"auto"', '"torch"')):
        hard_similarity(x, x, backend="triton")
    with pytest.raises(RuntimeError, match="float64"):
        sparse_aggregate(x.double(), x.double(), backend="triton")


def test_the_environment_chooses_where_the_call_did_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(2, 3, 4)
    monkeypatch.setenv("FMFA_LOSSES_BACKEND", "torch")
    assert select_backend("auto", x) == "torch"
    monkeypatch.setenv("FMFA_LOSSES_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="cannot run"):
        hard_similarity(x, x)
    assert select_backend("torch", x) == "torch"
    monkeypatch.setenv("FMFA_LOSSES_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FMFA_LOSSES_BACKEND must be one of"):
        hard_similarity(x, x)


def test_auto_leaves_cpu_tensors_to_torch_even_under_the_interpreter(monkeypatch):
    monkeypatch.delenv("FMFA_LOSSES_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.randn(2, 3, 4)
    assert select_backend("auto", x) == "torch"
    assert why_not_triton(x) is None or "not installed" in why_not_triton(x)


@pytest.mark.parametrize("variable", ["backend", "FMFA_LOSSES_BACKEND"])
def test_the_interpreter_does_not_get_bfloat16(monkeypatch, variable):
    """Its tl.dot multiplies their bits as integers, in every Triton from 3.2 to 3.9: numbers near 1e10, no error."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if variable == "FMFA_LOSSES_BACKEND":
        monkeypatch.setenv(variable, "triton")
    x = torch.randn(2, 3, 4).bfloat16()
    with pytest.raises(RuntimeError, match="multiplies the bits of bfloat16"):
        hard_similarity(x, x, backend="triton" if variable == "backend" else "auto")
    assert "bfloat16" in why_not_triton(x.float(), x)


def test_a_missing_triton_is_a_reason(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(_backend, "NO_TRITON", _backend.why_no_triton(False, None))
    assert "not installed" in why_not_triton(torch.randn(2))


def test_a_checkout_without_its_kernels_says_so(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    find_spec = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "fmfa_losses.kernels", raising=False)
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name: None if name == "fmfa_losses.kernels" else find_spec(name),
    )
    monkeypatch.setattr(_backend, "NO_TRITON", None)
    with pytest.raises(ModuleNotFoundError, match="this checkout is not installed; run pip install -e"):
        select_backend("triton", torch.randn(2))
    assert select_backend("auto", torch.randn(2)) == "torch"
    with FakeTensorMode(), pytest.raises(ModuleNotFoundError, match="this checkout is not installed"):
        kernels_run(torch.empty(2, device="cuda"))


OUTPUTS = {
    "alignment_rows": [(2, 2), (2, 2), (2, 4, 5), (2, 2, 4), (2, 2, 4), (2, 2, 4), (2, 2, 4)],
    "hard_matches": [(2, 3), (3, 2, 4), (3, 2, 4)],
    "linear_cross_entropy": [(), (), (2, 2), (2, 4)],
    "row_norms": [(2, 2, 1)],
    "similarity_distribution": [(), (2, 4, 2), (2, 2, 2), (2, 4), (2,)],
    "sparse_aggregation": [(2, 4, 5), (2, 4)],
    "kept_lists": [(36,)],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_operator_with_other_outputs_has_another_name(name):
    """A graph that a compiler left on disk knows an operator by its name, and not what it returned when it was kept."""
    if name == "kept_lists":
        pytest.importorskip("triton", reason="lists of tokens are for the kernels alone")
    row_loss = ("divergence", 1.0, "paired", False, 1e-8, 0.3, 0, True, "mean")
    with FakeTensorMode():
        x, e, ids = torch.randn(2, 4, 5), torch.randn(3, 6, 5), torch.arange(2)
        arguments = {
            "alignment_rows": (x, x, None, None, None, "lse", 1.0, True),
            "hard_matches": (x, e, None, None, "lse", 1.0, True, "torch"),
            "linear_cross_entropy": (x[:, 0], x[0], None, ids, -100, True, True, "torch"),
            "row_norms": (x[:, 0], False, False),
            "similarity_distribution": (x[:, 0], x[:, 1], ids, None, None, 50.0, "torch", *row_loss),
            "sparse_aggregation": (e[:2], x, None, None, None, False, "torch"),
            "kept_lists": (torch.ones(2, 4, dtype=torch.bool),),
        }
        outputs = getattr(torch.ops.fmfa_losses, name).default(*arguments[name])
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    assert [tuple(output.shape) for output in outputs] == OUTPUTS[name], "give the operator another name as well"


# What `differentiable_once` returns: the implementation in eager mode, and else the operator.


def offset_loss(queries, keys):
    """A-SDM of queries that begin at key 1, which no shortcut takes on the CPU."""
    pids = torch.arange(len(keys), device=keys.device) // 2
    return similarity_distribution_loss(queries, keys, pids, logit_scale=4.0, alpha=1.0, offset=1, both=False)


DIRECT = {
    "linear_cross_entropy": (
        lambda x, y: linear_cross_entropy(x, y, None, torch.arange(len(x), device=x.device))[0],
        [(4, 5), (6, 5)],
    ),
    "ranking": (lambda x, y: ranking(x, y, margin=0.2, logit_scale=3.0).mean(), [(4, 4), (4, 4)]),
    "similarity_distribution": (offset_loss, [(3, 5), (4, 5)]),
}


def leaves(name, **options):
    return [torch.randn(shape, requires_grad=True, **options) for shape in DIRECT[name][1]]


def step(name, inputs):
    return torch.autograd.grad(DIRECT[name][0](*inputs), inputs)


@pytest.mark.parametrize("name", DIRECT)
def test_eager_mode_does_without_the_operator(name):
    inputs = leaves(name)
    with Made() as made:
        step(name, inputs)
        with torch.no_grad():
            DIRECT[name][0](*inputs)
    assert [called for called in made.names if called.startswith(f"fmfa_losses.{name}")] == []
    assert len(made.names) > 5
    with Made() as made:
        torch.autograd.grad(DIRECT[name][0](*inputs), inputs, create_graph=True)
    assert f"fmfa_losses.{name}_backward.default" in made.names, "its gradient refuses a second derivative"


class Seen(torch.Tensor):
    """Notes the operators that meet it."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.names.append(str(func))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.filterwarnings("ignore")  # exporters warn about their own internals, by version
def test_whoever_traces_or_replaces_meets_the_operator(name):
    operator, function = f"fmfa_losses.{name}.default", DIRECT[name][0]
    inputs = [x.detach() for x in leaves(name)]
    of = lambda graph: [str(node.target) for node in graph.graph.nodes]  # noqa: E731
    assert operator in of(make_fx(function)(*inputs))
    assert operator in of(make_fx(function, pre_dispatch=True)(*inputs))
    assert operator in of(make_fx(torch.func.functionalize(function))(*inputs))

    class Model(torch.nn.Module):
        def forward(self, x, y):
            return function(x, y)

    for strict in (False, True):
        assert operator in of(torch.export.export(Model(), tuple(inputs), strict=strict))
    with FakeTensorMode() as mode:
        assert isinstance(function(*map(mode.from_tensor, inputs)), FakeTensor)
    assert function(*(x.to("meta") for x in inputs)).is_meta
    Seen.names.clear()
    function(*(x.as_subclass(Seen) for x in inputs))
    assert operator in Seen.names


@pytest.mark.parametrize("name", DIRECT)
def test_the_graph_of_an_eager_step(name):
    function, inputs = DIRECT[name][0], leaves(name)
    expected = step(name, inputs)
    value = function(*inputs)
    for _ in range(2):
        for got, gradient in zip(torch.autograd.grad(value, inputs, retain_graph=True), expected, strict=True):
            assert torch.equal(got, gradient)
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()
    twice = torch.autograd.grad(function(*inputs) + function(*inputs), inputs)
    for got, gradient in zip(twice, expected, strict=True):
        torch.testing.assert_close(got, 2 * gradient)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert function(*inputs).grad_fn is None
            assert torch.equal(function(*inputs), value)
    frozen = function(inputs[0], inputs[1].detach())
    assert torch.equal(torch.autograd.grad(frozen, inputs[0])[0], expected[0])
    assert function(*(x.detach() for x in inputs)).grad_fn is None


@pytest.mark.parametrize("name", DIRECT)
def test_what_an_eager_step_saves_goes_through_hooks(name):
    inputs, packed = leaves(name), []
    expected = step(name, inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or len(packed) - 1, lambda n: packed[n]):
        value = DIRECT[name][0](*inputs)
    assert len(packed) >= 3
    for got, gradient in zip(torch.autograd.grad(value, inputs), expected, strict=True):
        assert torch.equal(got, gradient)


@pytest.mark.parametrize("name", DIRECT)
def test_a_changed_input_is_noticed_and_a_missing_gradient_is_none(name):
    inputs = leaves(name)
    value = DIRECT[name][0](*inputs)
    with torch.no_grad():
        inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    inputs = leaves(name)
    Stop.apply(DIRECT[name][0](*inputs)).backward()
    assert all(x.grad is None for x in inputs)


@pytest.mark.parametrize("name", DIRECT)
def test_batched_gradients_of_an_eager_graph(name):
    inputs = leaves(name)
    value, expected = DIRECT[name][0](*inputs), step(name, inputs)
    batched = torch.autograd.grad(value, inputs, torch.tensor([1.0, 3.0]), is_grads_batched=True)
    for got, gradient in zip(batched, expected, strict=True):
        torch.testing.assert_close(got, torch.stack([gradient, 3 * gradient]))
