"""Defines an operator of `torch.ops.fmfa_losses` with one implementation for every device, and its gradient.

Below autograd and opaque to torch.compile, like `torch.library.custom_op`, which at its first call would import torch's
compiler: 150 MB and two seconds that an eager training run does not need.

`differentiable_once` returns what the library calls. In eager mode that is the implementation itself, inside of a plain
autograd.Function: the dispatcher costs more host time than the launches of a small batch. Whoever traces, transforms or
replaces what runs (torch.compile, torch.export, torch.func, forward-mode AD, fake tensors) meets the operator.

`register_gradient` is `torch.library.register_autograd` with two differences: torch.func (grad, vjp, jacrev, vmap of
them) passes through it, and forward-mode AD is right or an error. PyTorch's own ignores tangents in silence.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["differentiable_once", "never_compiled", "operator", "refusals", "register_gradient", "replaced", "watched"]

P = ParamSpec("P")
R = TypeVar("R")

_implementations: dict[Any, Callable[..., Any]] = {}  # by operator
_library = torch.library.Library("fmfa_losses", "FRAGMENT")  # type: ignore[no-untyped-call]


def operator(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: "name(Tensor x, ...) -> (...)" runs the function; its outputs must be fresh tensors.

    Give the operator its fake kernel with torch.library.register_fake, and its gradient with one of the two below. An
    argument `bool save` becomes True when the gradient is wanted. torch.vmap takes one problem after the other.

    A compiler's cache on disk identifies an operator by its name: when the outputs change, change the name.
    """

    def define(implementation: Callable[..., Any]) -> Any:
        name = _library.define(schema)  # type: ignore[no-untyped-call]
        _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        op = getattr(torch.ops.fmfa_losses, name.partition("::")[2] or name).default
        _implementations[op] = implementation

        def one_by_one(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
            batched = list(zip(inputs, in_dims, strict=True))
            outputs = [
                op(*(x if dim is None else x.select(dim, i) for x, dim in batched)) for i in range(info.batch_size)
            ]
            if isinstance(outputs[0], Tensor):
                return torch.stack(outputs), 0
            return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])

        torch.library.register_vmap(op, one_by_one, lib=_library)
        return op

    return define


def _has_tangent(x: Tensor) -> bool:
    """Of the one level that PyTorch has; forward_ad.unpack_dual does not see the level of a compiled torch.func.jvp."""
    return torch._VF._unpack_dual(x, level=0)[1] is not None


def register_gradient(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., None], jvp: Callable[..., Any]
) -> None:
    """Gives an operator its gradient, for autograd, torch.func and torch.compile.

    Args:
        op: what `operator` returned.
        backward: (ctx, gradients of the outputs) -> gradients of the inputs, one for each input.
        setup_context: (ctx, inputs, output), keeps what the other two need.
        jvp: (ctx, tangents of the inputs) -> tangents of the outputs, or raises.
    """
    schema = op._schema.arguments
    defaults = tuple(argument.default_value for argument in schema)

    def forward(ctx, *arguments):  # type: ignore[no-untyped-def]
        *inputs, keyset = arguments
        inputs = [True if argument.name == "save" else x for argument, x in zip(schema, inputs, strict=True)]
        keyset &= torch._C._after_autograd_keyset
        with torch._C._AutoDispatchBelowAutograd():
            if torch._C._are_functorch_transforms_active():
                # An autograd.Function turns both modes off, also for the levels of torch.func below its own.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    output = op.redispatch(keyset, *inputs)
            else:
                output = op.redispatch(keyset, *inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {
        "forward": staticmethod(forward),
        "backward": staticmethod(lambda ctx, *gradients: (*backward(ctx, *gradients), None)),
        "jvp": staticmethod(lambda ctx, *tangents: jvp(ctx, *tangents[:-1])),
    }
    function: Any = type(f"{op._opname}_gradient", (torch.autograd.Function,), methods)
    # Function.apply would refuse torch.func, whose levels the dispatcher has already taken apart here.
    apply = super(torch.autograd.Function, function).apply

    def differentiate(keyset: Any, *inputs: Any) -> Any:
        inputs += defaults[len(inputs) :]  # the dispatcher drops them
        reverse, nested = torch.is_grad_enabled(), torch._C._are_functorch_transforms_active()
        forward_mode = nested or forward_ad._current_level >= 0
        for x in inputs:
            if isinstance(x, Tensor) and ((reverse and x.requires_grad) or (forward_mode and _has_tangent(x))):
                break
        else:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
        if not nested:
            return apply(*inputs, keyset)
        allowed = torch._C._functorch.get_single_level_autograd_function_allowed()
        torch._C._functorch.set_single_level_autograd_function_allowed(True)
        try:
            return apply(*inputs, keyset)
        finally:
            torch._C._functorch.set_single_level_autograd_function_allowed(allowed)

    _library.impl(op, differentiate, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def differentiable_once(
    op: Any,
    backward_op: Any,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    name: str,
    losses: str,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`register_gradient` with a backward made of `backward_op`, which has no gradient itself.

    A second derivative raises, and so does forward-mode AD. Without it PyTorch takes the gradient for a constant, and a
    gradient penalty would change nothing.

    Args:
        op, backward, setup_context: as above; the contexts do what those of an autograd.Function can.
        backward_op: the operator of the gradient.
        name: what the user calls.
        losses: those that are made of it.

    Returns:
        What to call instead of `op` and, in `backward`, of `backward_op`. They take every argument, by position.
    """

    refuse_second, refuse_forward = refusals(name, losses)
    register_gradient(op, backward, setup_context, refuse_forward)
    register_gradient(backward_op, refuse_second, lambda ctx, inputs, output: None, refuse_forward)
    return _direct(op, _function(op, backward, setup_context)), _direct(backward_op)


def _function(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> Callable[..., Any]:
    """Applies a plain autograd.Function around the implementation of an operator."""
    implementation = _implementations[op]
    saves = [n for n, argument in enumerate(op._schema.arguments) if argument.name == "save"]

    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        if saves:
            inputs = tuple(True if n in saves else x for n, x in enumerate(inputs))
        with torch._C._AutoDispatchBelowAutograd():  # as the operator: its outputs are views of nothing
            output = implementation(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(op._opname, (torch.autograd.Function,), methods)
    # What Function.apply does before this is for torch.func.
    return super(torch.autograd.Function, function).apply  # type: ignore[no-any-return]


# Of dispatch modes these replace what runs; others, such as counters, see what the implementation does.
_MODES = (
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)
_PLAIN = (Tensor, torch.nn.Parameter)
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of autograd.grad(is_grads_batched=True)


def replaced() -> bool:
    """Whether a mode replaces what runs: make_fx, fake tensors."""
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES)


def watched(x: Tensor) -> bool:
    """Whether something else than autograd must see every operation: a compiler, torch.func, forward mode, tracing."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        return True
    return forward_ad._current_level >= 0 or replaced() or bool(_is_batched(x))


def _direct(op: Any, apply: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Calls the implementation where nothing but autograd must know of the call, through `apply`; else the operator.

    A gradient has no `apply`: with create_graph it is the operator, whose own gradient says that there is none.
    """
    implementation = _implementations[op]

    def call(*inputs: Any) -> Any:  # all in one: every eager step pays for it
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
            return op(*inputs)
        if forward_ad._current_level >= 0 or torch._ops._len_torch_dispatch_stack_pre_dispatch():  # type: ignore[no-untyped-call]
            return op(*inputs)
        if torch._C._len_torch_dispatch_stack() and replaced():
            return op(*inputs)
        differentiated, recording = False, torch.is_grad_enabled()
        for x in inputs:
            if isinstance(x, Tensor):
                if type(x) not in _PLAIN or x.is_meta or _is_batched(x):
                    return op(*inputs)
                differentiated |= x.requires_grad
        if recording and apply is None:
            return op(*inputs)
        if recording and apply is not None and differentiated:
            return apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(*inputs)

    return call


def refusals(name: str, losses: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The backward of a gradient, and a jvp, that say why there is none; `name` and `losses` as above."""

    def second(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"{name} is differentiable once, got a second derivative of it ({losses}: gradient penalties through it "
            "are not supported); leave its gradient out of what you differentiate again, create_graph alone is fine"
        )

    def forward_mode(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(
            f"{name} is differentiable once and in reverse mode, got a tangent ({losses}: torch.func.jvp, jacfwd, "
            "hessian and dual numbers are not supported); use backward(), torch.func.grad, vjp or jacrev"
        )

    return second, forward_mode


def never_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: torch.compile breaks its graph at the call, and compiles nothing below it.

    Like torch.compiler.disable, which would import the compiler with this package.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        dynamo = sys.modules.get("torch._dynamo")  # who compiles has imported it
        run: Callable[P, R] = function if dynamo is None else dynamo.disable(function)
        return run(*args, **kwargs)

    return call
