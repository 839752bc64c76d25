"""What the parameter-free losses share: hyperparameters declared once, the reduction, the global batch.

A loss is a class whose annotated attributes are its hyperparameters, each with type, default and check: they become
the arguments of its constructor, as in a dataclass. The function of the same loss builds one and calls it. Losses over
rows of scores have more in common: score_loss.py.
"""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypedDict, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self, dataclass_transform

from ..distributed.handshake import handshake
from ..distributed.peers import Peers
from ..ops.checks import check_flag, check_ids, check_option, check_unused_ids, did_you_mean
from ..ops.module import Module
from ..ops.options import BACKENDS, GATHER, MOVED, REDUCTIONS, Backend, Gather, Reduction
from .scores import check_weight

__all__ = ["Loss", "Options", "ScaledOptions", "functional", "hyperparameter"]

F = TypeVar("F", bound=Callable[..., Tensor])
# Of the whole batch; the first three are compared by every handshake, the last one is the rank's own choice.
OF_FEATURES = ("gather", "process_group", "equal_batches", "backend")


class Options(TypedDict, total=False):
    """Keywords of every loss's function, for type checkers."""

    sample_weight: Tensor | None
    reduction: Reduction
    gather: Gather
    process_group: Any
    equal_batches: bool
    backend: Backend


class ScaledOptions(Options, total=False):
    temperature: float
    logit_scale: float | Tensor | None


def hyperparameter(
    *,
    default: Any = dataclasses.MISSING,
    check: Callable[[str, Any], Any] | tuple[object, ...],
    kw_only: Any = dataclasses.MISSING,
) -> Any:
    """An argument of a loss; `check` takes name and value and returns what is kept, or holds the values allowed."""
    return dataclasses.field(default=default, kw_only=kw_only, metadata={"check": check})


def _call_options(cls: type, method: str) -> list[inspect.Parameter]:
    """Keywords of a call; `peers` are FMFALoss's."""
    parameters = inspect.signature(getattr(cls, method)).parameters.values()
    return [one for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY and one.name != "peers"]


def _starting_the_module(generated: Callable[..., None]) -> Callable[..., None]:
    """A dataclass's constructor, after that of nn.Module; an unknown keyword gets the nearest one."""
    known = [name for name in inspect.signature(generated).parameters if name != "self"]

    @functools.wraps(generated)
    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        for word in kwargs:
            if word not in known:
                raise TypeError(_unknown(type(self), word, known))
        super(_Declared, self).__init__()  # dynamo follows super() alone
        generated(self, *args, **kwargs)

    start.generated = True  # type: ignore[attr-defined]
    return start


def _unknown(cls: Any, word: str, known: list[str]) -> str:
    of_call = sorted({name for names in cls._of_call.values() for name in names})
    if word in of_call:
        return f"{cls.__name__} is built without {word!r}, which belongs to the call: loss(..., {word}=...)"
    near = f"; use {MOVED[word]}." if word in cls.moved else did_you_mean(word, [*known, *of_call]) or "."
    return f"{cls.__name__} takes no {word!r}{near} It takes {', '.join(known)}; its call {', '.join(of_call)}"


@dataclass_transform(eq_default=False, field_specifiers=(hyperparameter,))
class _Declared(Module):
    """A module whose annotated attributes are the arguments of its constructor, which checks them."""

    _checks: ClassVar[Mapping[str, Any]]
    _compared: ClassVar[tuple[str, ...]]  # torch.export of 2.6 reads no dict of a class
    _of_call: ClassVar[Mapping[str, tuple[str, ...]]]
    moved: ClassVar[tuple[str, ...]] = ()  # options that it had, and compat has now

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls).get("__annotations__", {}):
            _keep_check(cls, name)
        declares = bool(vars(cls).get("__annotations__"))
        generated = "__init__" not in vars(cls) and (declares or getattr(cls.__init__, "generated", False))
        dataclasses.dataclass(eq=False, repr=False, init=generated)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        cls._checks = {field.name: field.metadata["check"] for field in fields if field.metadata}
        cls._compared = tuple(name for name in cls._checks if name not in OF_FEATURES)
        methods = [name for name in ("forward", "from_scores") if hasattr(cls, name)]
        cls._of_call = {name: tuple(one.name for one in _call_options(cls, name)) for name in methods}
        if generated:
            cls.__init__ = _starting_the_module(cls.__init__)  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        """A hyperparameter is checked whenever it is set, by the constructor or later."""
        check = self._checks.get(name)
        if isinstance(check, tuple):
            check_option(name, value, check)
        elif check is not None:
            value = check(name, value)
        super().__setattr__(name, value)


def _keep_check(cls: Any, name: str) -> None:
    """A subclass that gives a hyperparameter another default keeps its check."""
    value, known = vars(cls).get(name, dataclasses.MISSING), getattr(cls, "__dataclass_fields__", {}).get(name)
    if known is not None and known.metadata and not isinstance(value, dataclasses.Field):
        setattr(cls, name, dataclasses.field(default=value, kw_only=known.kw_only, metadata=known.metadata))


class Loss(_Declared):
    """Base of the parameter-free losses: a subclass annotates its hyperparameters and defines `forward`.

    Args:
        reduction: "mean", "sum", or "none" for [B].
        gather: False; True or "ring" for the batch of all processes: see ASDMLoss.
        process_group, equal_batches: of gather.
        backend: "auto", "triton" or "torch".
    """

    reduction: Reduction = hyperparameter(default="mean", check=REDUCTIONS, kw_only=True)
    gather: Gather = hyperparameter(default=False, check=GATHER, kw_only=True)
    process_group: Any = hyperparameter(default=None, check=lambda name, group: group, kw_only=True)
    equal_batches: bool = hyperparameter(default=False, check=check_flag, kw_only=True)
    backend: Backend = hyperparameter(default="auto", check=BACKENDS, kw_only=True)

    # An option that decides whether pids are used: its name, the values with and without, what using them is good for.
    pids_option: ClassVar[tuple[str, str, str, str] | None] = None

    @classmethod
    def of(cls, /, *tensors: Tensor | None, **options: Any) -> Tensor:
        """The functional form: builds the loss with its keywords, and calls it with those of the call."""
        return cls._built_and_called("forward", tensors, options)

    @classmethod
    def of_scores(cls, /, *scores: Tensor | None, **options: Any) -> Tensor:
        """The same for `from_scores`."""
        return cls._built_and_called("from_scores", scores, options)

    @classmethod
    def _built_and_called(cls, method: str, tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> Tensor:
        of_call = {name: options.pop(name) for name in cls._of_call[method] if name in options}
        value: Tensor = getattr(cls(**options), method)(*tensors, **of_call)
        return value

    def settings(self) -> dict[str, object]:
        """The hyperparameters that must be the same on all ranks."""
        return {name: getattr(self, name) for name in self._compared}

    def handshake(
        self,
        tensors: Mapping[str, Tensor | None],
        check: Callable[[], Any],
        peers: Peers | None = None,
        **settings: object,
    ) -> tuple[Peers, Any]:
        """The ranks of the batch, and what `check` returns: see `distributed.handshake`; `peers` if already known."""
        return handshake(
            self.gather,
            self.process_group if peers is None else peers,
            tensors,
            loss=type(self).__name__,
            settings={**self.settings(), **settings} if self.gather else None,
            equal_batches=self.equal_batches,
            check=check,
        )

    def check_pids(self, pids: Tensor | None, like: Tensor) -> Tensor | None:
        """The ids to compare, one per sample of `like`; None where pairs alone count."""
        if self.pids_option is not None:
            option, used, unused, purpose = self.pids_option
            if getattr(self, option) == unused:
                if pids is not None:
                    remedy = f'{option}="{used}" {purpose}'
                    check_unused_ids(type(self).__name__, pids, like, f'{option}="{unused}"', remedy)
                return None
            if pids is None:
                raise ValueError(
                    f'{option}="{used}" needs the identities: pass pids [B], or choose {option}="{unused}"'
                )
        elif pids is None:
            raise TypeError(
                f"pids must be an integer tensor [B], got None; {type(self).__name__} compares identities: pass that "
                "of each pair"
            )
        return check_ids("pids", pids, like.shape[0], like.device)

    def as_called(self) -> Self:
        """A copy with the hyperparameters of this call, whatever becomes of these before its backward."""
        return self if torch.compiler.is_compiling() else copy.copy(self)

    def alone(self) -> Peers:
        """The peers of scores that exist already: none."""
        if self.gather:
            raise ValueError(f"gather must be False for scores, which are one process's, got {self.gather!r}")
        return Peers(sizes=(1,))

    def reduce(self, per_sample: Tensor, sample_weight: Tensor | None, peers: Peers) -> Tensor:
        """[b] of the own pairs to this rank's part of the loss.

        Weights multiply; "mean" then divides by their sum over all ranks, and gives 0 where all are 0.
        """
        if sample_weight is not None:
            weight = check_weight("sample_weight", sample_weight, per_sample)
            per_sample = weight * per_sample
        if self.reduction == "none":
            return per_sample
        if self.reduction == "sum":
            return per_sample.sum()
        if sample_weight is None:
            return peers.mean(per_sample)
        total = peers.gather(weight).sum()
        return per_sample.sum() * len(peers.sizes) / torch.where(total == 0, torch.ones_like(total), total)


def functional(cls: type[Loss], method: str = "forward") -> Callable[[F], F]:
    """Gives a function, which passes its keywords on to `cls.of`, their names and defaults for `help` and editors."""

    def signed(function: F) -> F:
        kinds = inspect.Parameter
        positional = [one for one in inspect.signature(function).parameters.values() if one.kind != kinds.VAR_KEYWORD]
        built = [
            one.replace(kind=kinds.KEYWORD_ONLY)
            for one in inspect.signature(cls).parameters.values()
            if method == "forward" or one.name not in OF_FEATURES
        ]
        parameters = [*positional, *_call_options(cls, method), *built]
        function.__signature__ = inspect.Signature(parameters, return_annotation=Tensor)  # type: ignore[attr-defined]
        return function

    return signed
