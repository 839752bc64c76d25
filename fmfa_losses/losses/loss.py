"""What the parameter-free losses share: hyperparameters declared once, the reduction, the global batch.

A loss is a class whose annotated attributes are its hyperparameters, each with type, default and check: they become
the arguments of its constructor, as in a dataclass. The function of the same loss builds one and calls it. A loss over
whole matrices of scores is a `ScoreLoss`: it has `rows`, the equation, and everything else is here.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypedDict, TypeVar

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

from ..distributed.handshake import handshake
from ..distributed.peers import Peers
from ..ops.checks import check_divisor, check_flag, check_ids, check_option, check_unused_ids, did_you_mean
from ..ops.module import Module
from ..ops.options import BACKENDS, GATHER, MOVED, REDUCTIONS, Backend, Gather, Reduction
from ..ops.precision import accumulation_dtype, product, unit_rows
from .scores import check_features, check_scores, check_weight, resolve_scale

__all__ = ["Loss", "Options", "ScaledOptions", "ScaledScoreLoss", "ScoreLoss", "functional", "hyperparameter"]

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
        gather: False; True, or "ring" where a loss has one, for the batch of all processes: see ASDMLoss.
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
        return check_ids("pids", pids, like.shape[0], like.device)

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


def _without_ring(name: str, gather: Any) -> Any:
    if gather == "ring":
        raise ValueError(
            f'{name} must be False or True, got "ring": this loss needs whole rows of scores; pass gather=True'
        )
    check_option(name, gather, GATHER)
    return gather


def _without_kernel(name: str, backend: Any) -> Any:
    if backend == "triton":
        raise ValueError(f'{name} must be "auto" or "torch", got "triton": this loss has no kernel; pass "auto"')
    check_option(name, backend, BACKENDS)
    return backend


class ScoreLoss(Loss):
    """A loss over the [B, B] scores of texts and images; a subclass has its equation as `rows`.

        rows(scores [b, B], positive [b, B], offset) -> [b]

    Row i belongs to column offset + i: the own queries against all keys. `positive` says which columns count as
    positives of a row: the same identity, or the pair alone where the loss does not look at pids.

    Inputs:
        image_features, text_features: [B, D], any float dtype.
        pids: [B] integer identities.
        sample_weight: [B] weights >= 0 of the pairs; "mean" divides by their sum.
    """

    gather: Gather = hyperparameter(default=False, check=_without_ring, kw_only=True)
    backend: Backend = hyperparameter(default="auto", check=_without_kernel, kw_only=True)
    rows: ClassVar[Callable[..., Tensor]]

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return self._of_features(image_features, text_features, pids, sample_weight)

    def from_scores(self, scores: Tensor, pids: Tensor | None = None, *, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of scores that exist already, [B, B] text x image."""
        return self._of_scores(check_scores(scores), None, pids, sample_weight)

    def arguments(self, like: Tensor, **given: Any) -> dict[str, Any]:
        """Of what a call gives besides, what `rows` takes besides; tensors in `like`'s dtype."""
        return given

    def scores(self, image_features: Tensor, text_features: Tensor, peers: Peers) -> tuple[Tensor, Tensor | None]:
        """Own texts x all images, and own images x all texts where these are not the transposed ones, [b, B] each."""
        dtype = accumulation_dtype(image_features, text_features)
        image, text = (unit_rows(x, dtype=dtype) for x in (image_features, text_features))
        if peers.group is None:
            return product(text, image), None
        every_image, every_text = (unit_rows(peers.gather(x), dtype=dtype) for x in (image_features, text_features))
        return product(text, every_image), product(image, every_text)

    def per_sample(
        self, scores: Tensor, transposed: Tensor | None, positive: Tensor, offset: int, **given: Any
    ) -> Tensor:
        """Both directions, [b]."""
        i2t = scores.T if transposed is None else transposed
        return self.rows(scores, positive, offset, **given) + self.rows(i2t, positive, offset, **given)

    def _of_features(
        self, image: Tensor, text: Tensor, pids: Tensor | None, sample_weight: Tensor | None, **given: Any
    ) -> Tensor:
        def checked() -> Any:  # torch.compile of 2.6 cannot make the types of a nested function
            check_features(image, text)
            if sample_weight is not None:
                check_weight("sample_weight", sample_weight, text[:, 0])
            like = text.new_empty((), dtype=accumulation_dtype(image, text))
            return self.check_pids(pids, text), self.arguments(like, **given)

        tensors = {"image_features": image, "text_features": text, "pids": pids, "sample_weight": sample_weight}
        peers, (ids, arguments) = self.handshake(tensors, checked, **given)
        scores, transposed = self.scores(image, text, peers)
        positive = _positives(ids, scores, peers)
        return self.reduce(
            self.per_sample(scores, transposed, positive, peers.offset, **arguments), sample_weight, peers
        )

    def _of_scores(
        self,
        scores: Tensor,
        transposed: Tensor | None,
        pids: Tensor | None,
        sample_weight: Tensor | None,
        **given: Any,
    ) -> Tensor:
        alone, ids, arguments = self.alone(), self.check_pids(pids, scores), self.arguments(scores, **given)
        positive = _positives(ids, scores, alone)
        return self.reduce(self.per_sample(scores, transposed, positive, 0, **arguments), sample_weight, alone)


class ScaledScoreLoss(ScoreLoss):
    """A ScoreLoss with a temperature: rows(scores, positive, offset, scale), where scale is 1 / temperature.

    Inputs:
        logit_scale: 1 / temperature instead of `temperature`: a number, or a tensor with one element on any device,
            which receives its gradient.
    """

    temperature: float = hyperparameter(default=0.02, check=check_divisor)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor | None = None,
        *,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return self._of_features(image_features, text_features, pids, sample_weight, logit_scale=logit_scale)

    def from_scores(
        self,
        scores: Tensor,
        pids: Tensor | None = None,
        *,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return self._of_scores(check_scores(scores), None, pids, sample_weight, logit_scale=logit_scale)

    def arguments(self, like: Tensor, **given: Any) -> dict[str, Any]:
        logit_scale = given.pop("logit_scale")
        return {"scale": resolve_scale(logit_scale, self.temperature, like), **given}


def _positives(ids: Tensor | None, scores: Tensor, peers: Peers) -> Tensor:
    """[b, B] bool: which columns of all pairs are positives of the own rows."""
    if ids is not None:
        return ids[:, None] == peers.gather(ids)
    index = torch.arange(scores.shape[1], device=scores.device)
    return index[peers.offset : peers.offset + scores.shape[0], None] == index


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
