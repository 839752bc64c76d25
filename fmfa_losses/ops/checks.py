"""Checks of shape, dtype, device and number that raise; each message states the invariant, what came, and what to do.

Only what the host knows without waiting for an accelerator is checked: shapes, dtypes, devices, numbers, and the values
of a tensor that `on_host`. Checks of numbers and ids return what to go on with: a Python number, ids that can be
compared.
"""

import difflib
import numbers
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "as_tensor",
    "check_divisor",
    "check_finite",
    "check_flag",
    "check_float",
    "check_fraction",
    "check_ids",
    "check_integer",
    "check_mask",
    "check_nonnegative",
    "check_option",
    "check_positive",
    "check_same",
    "check_scalar",
    "check_scale",
    "check_shape",
    "check_unused_ids",
    "describe",
    "did_you_mean",
    "integer_ids",
    "nan_unless",
    "on_host",
    "refuse_capture",
    "warn_once",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ORDER = "check the order of the arguments"
LARGEST = torch.finfo(torch.float64).max


def describe(tensor: object) -> str:
    """`float32 [4, 7] on cpu`, the way every message here shows a tensor."""
    if isinstance(tensor, Tensor):
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
    if tensor is None:
        return "None"
    if isinstance(tensor, torch.nn.Module):
        return f"a module {type(tensor).__name__}"
    if getattr(tensor, "ndim", 0) > 0 and hasattr(tensor, "dtype"):  # an array of NumPy
        return f"{type(tensor).__name__} {tensor.dtype} {list(getattr(tensor, 'shape', ()))}"
    text = repr(tensor)
    if isinstance(tensor, (list, tuple, dict)) and len(text) > 60:
        return f"{type(tensor).__name__} of length {len(tensor)}"
    return f"{type(tensor).__name__} {text:.60}"


def as_tensor(value: object) -> str:
    """The advice of a message about a value that is no tensor."""
    return "pass one" if value is None else "torch.as_tensor makes one of an array or a list of numbers"


def on_host(tensor: Tensor) -> bool:
    """Whether the host may look at the tensor's values: it need not wait, and nothing records what it then does."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)  # no fake tensor
        and not torch._C._is_tracing()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and torch._C._len_torch_dispatch_stack() == 0
    )


warned: set[str] = set()


def warn_once(message: str) -> None:
    """A UserWarning, once a process, at the line that called the library; compiled code does not warn."""
    if torch.compiler.is_compiling() or message in warned:
        return
    warned.add(message)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "fmfa_losses",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def check_float(name: str, tensor: object, pattern: str) -> None:
    """A floating-point tensor with as many dimensions as `pattern` ("B L D") has letters, none of them empty."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor [{pattern}], got {describe(tensor)}; {as_tensor(tensor)}")
    if hasattr(tensor, "device_mesh"):
        raise TypeError(
            f"{name} must be a plain tensor with this process's samples, got a DTensor; pass {name}.to_local() where "
            f"it is sharded over the batch, {name}.full_tensor() where this process should hold all of it"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a {'nested' if tensor.is_nested else 'sparse'} one; pass "
            f"{name}.{'to_padded_tensor(0), and a mask' if tensor.is_nested else 'to_dense()'}"
        )
    if not (tensor.is_floating_point() or tensor.is_complex()) and tensor.ndim != len(pattern.split()):
        raise TypeError(f"{name} must be a floating-point tensor [{pattern}], got {describe(tensor)}; {ORDER}")
    if not tensor.is_floating_point():
        part = ".real" if tensor.is_complex() else ".float()"
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(tensor)}; pass {name}{part}")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {describe(tensor)}; call {name}.bfloat16() and "
            "multiply by the scale that it was stored with"
        )
    if tensor.ndim != len(pattern.split()):
        raise ValueError(f"{name} must have shape [{pattern}], got {describe(tensor)}; reshape it")
    if 0 in tensor.shape:
        raise ValueError(f"{name} [{pattern}] must not be empty, got {describe(tensor)}; skip empty batches")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {list(expected)} ({why}), got {describe(tensor)}")


def check_same(names: str, a: Tensor, b: Tensor, *, dims: Iterable[tuple[str, int]] = ()) -> None:
    """`a` and `b` are on one device and agree in the given (letter, dimension) pairs; `names` is "image and text"."""
    if a.device != b.device:
        to = str(b.device if a.device.type == "cpu" else a.device)
        raise ValueError(f"{names} must be on one device, got {a.device} and {b.device}; move one with .to({to!r})")
    for letter, dim in dims:
        if a.shape[dim] != b.shape[dim]:
            raise ValueError(f"{names} must agree in {letter} (dimension {dim}), got {describe(a)} and {describe(b)}")


def check_ids(name: str, ids: object, length: int, device: torch.device) -> Tensor:
    """Integer ids [length] on `device`, to be compared with each other: see `integer_ids`."""
    ids = integer_ids(name, ids, "B")
    check_shape(name, ids, (length,), "one id per sample")
    if ids.device != device:
        raise ValueError(f"{name} must be on {device}, got {describe(ids)}; call {name}.to({str(device)!r})")
    return ids


def check_unused_ids(loss: str, pids: object, like: Tensor, option: str, remedy: str) -> None:
    """Pids that were passed although the option that was chosen makes no use of them, one per sample of `like`."""
    if pids is None:
        return
    check_ids("pids", pids, like.shape[0], like.device)
    warn_once(
        f"{loss} got pids, which {option} does not use: other images of the same person are pushed away; pass "
        f"{remedy}, or leave pids out"
    )


def integer_ids(name: str, ids: object, pattern: str) -> Tensor:
    """The ids in int32 or int64, whatever integer dtype they came in.

    Ids of different values stay different: those of uint64 from 2^63 on become negative.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be an integer tensor [{pattern}], got {describe(ids)}; {as_tensor(ids)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        if ids.is_floating_point() and ids.ndim > len(pattern.split()):
            raise TypeError(f"{name} must be an integer tensor [{pattern}], got {describe(ids)}; {ORDER}")
        part = ".real" if ids.is_complex() else ""
        raise TypeError(f"{name} must be an integer tensor, got {describe(ids)}; call {name}{part}.long()")
    if ids.dtype == torch.uint64:
        return ids.view(torch.int64)
    return ids if ids.dtype in (torch.int32, torch.int64) else ids.long()


def check_mask(name: str, mask: object, like: Tensor) -> None:
    """A boolean mask over the tokens of `like` [B, T, D]; True = keep."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        call = f"call {name}.bool()"
        if isinstance(mask, Tensor) and mask.is_floating_point():
            call += f", or {name} == 0 where it holds 0 to keep and -inf to drop"
        elif isinstance(mask, Tensor) and mask.ndim == 1:
            call = f"of lengths pass fmfa_losses.functional.length_mask({name}, {like.shape[1]})"
        raise TypeError(f"{name} must be a boolean tensor (True = keep), got {describe(mask)}; {call}")
    check_shape(name, mask, (like.shape[0], like.shape[1]), "one flag a token")
    if mask.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {describe(mask)}; call {name}.to(...)")


def check_positive(name: str, value: object) -> float:
    number = _number(name, value, "a finite number > 0")
    if not 0 < number <= LARGEST:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return float(number)


def check_divisor(name: str, value: object) -> float:
    """A finite number > 0 that has an inverse in float32: a temperature or a scale by which numbers are divided."""
    number = check_positive(name, value)
    if number * torch.finfo(torch.float32).max < 1:
        raise ValueError(f"{name} must be large enough for float32 to hold 1 / {name} (>= 3e-39), got {value!r}")
    return number


def check_scalar(name: str, tensor: Tensor) -> Tensor:
    """A floating-point tensor with one element, as one of 0 dimensions."""
    if tensor.numel() != 1 or not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be a number or a floating-point tensor with one element, got {describe(tensor)}; "
            f"pass {name}.float().reshape(()) of one number"
        )
    return tensor.reshape(())


def check_scale(logit_scale: float | Tensor | None, temperature: float = 1.0) -> float | Tensor:
    """1 / temperature, or the given scale: a number, or a tensor of 0 dimensions.

    Where the host would wait for the tensor's value, any value gives what its equation has.
    """
    temperature = check_divisor("temperature", temperature)
    if logit_scale is None:
        return 1 / temperature
    if not isinstance(logit_scale, Tensor):
        return check_positive("logit_scale", logit_scale)
    scale = check_scalar("logit_scale", logit_scale)
    if on_host(scale) and scale.item() <= 0:
        raise ValueError(
            f"logit_scale must be > 0, got a tensor with {scale.item():.6g}; pass 1 / temperature, for a learned one "
            "the exponential of its logarithm"
        )
    return scale


def check_nonnegative(name: str, value: object) -> float:
    number = _number(name, value, "a finite number >= 0")
    if not 0 <= number <= LARGEST:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return float(number)


def check_finite(name: str, value: object) -> float:
    number = _number(name, value, "a finite number")
    if not -LARGEST <= number <= LARGEST:
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(number)


def check_fraction(name: str, value: object) -> float:
    number = _number(name, value, "a number in [0, 1]")
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    return float(number)


def check_integer(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """An integer, from `low` to `high` where they are given."""
    wanted = "an integer"
    if low is not None:
        wanted += f" >= {low}" if high is None else f" from {low} to {high}"
    number = value if isinstance(value, torch.SymInt) else _number(name, value, wanted)
    whole = isinstance(number, (numbers.Integral, torch.SymInt))
    if not whole or (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return number if isinstance(number, torch.SymInt) else int(number)  # type: ignore[return-value]


def check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool) and getattr(getattr(value, "dtype", None), "kind", "") == "b":
        value = value.item()  # type: ignore[attr-defined]
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def _number(name: str, value: Any, wanted: str) -> Any:
    """`value`, if it is a number of Python or NumPy (an array of 0 dimensions too); True is none, nor is a tensor."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if not isinstance(value, Tensor) and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, Tensor):
        advice = f"{name}.item(), which has no gradient" if value.numel() == 1 else "one number"
        raise TypeError(f"{name} must be {wanted}, got {describe(value)}; pass {advice}")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {wanted}, got {describe(value)}; pass a Python or NumPy number")
    return value


def check_option(name: str, value: object, options: Iterable[object]) -> None:
    options = tuple(options)
    if not isinstance(value, (str, bool)) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def did_you_mean(word: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known word that is near, whatever its case; nothing where none is."""
    lower = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(str(word).casefold(), lower, n=1, cutoff=cutoff)
    return f"; did you mean {lower[near[0]]!r}?" if near else ""


def nan_unless(right: Tensor | None, value: Tensor) -> Tensor:
    """value, or NaN with NaN gradients where `right` is False, for an error that the host cannot raise."""
    return value if right is None else value * torch.where(right, 1.0, float("nan")).to(value.dtype)


def refuse_capture(logit_scale: Tensor | None, features: Tensor) -> None:
    """The host reads a scale on the CPU while it launches: a CUDA graph would keep the number that it was then."""
    if logit_scale is None or not features.is_cuda or not logit_scale.is_cpu:
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "logit_scale must be on the device of the features, or a number, while a CUDA graph is being captured, got "
            f"a tensor on the CPU and features on {features.device}: every replay would use the value that it has now; "
            f"call logit_scale.to({str(features.device)!r}) before capturing"
        )
