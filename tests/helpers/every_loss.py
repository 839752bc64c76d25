"""Every public parameter-free loss with each of its named options, and how it is called by the names of its inputs.

A new loss is found in `fmfa_losses.__all__`, its variants in its hyperparameters, its inputs in its signature; an input
of another name gets a line in `inputs_of`.
"""

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

import fmfa_losses as fl
from fmfa_losses.losses.loss import Loss
from helpers.global_batch import Towers

PUBLIC = [x for x in map(vars(fl).get, fl.__all__) if isinstance(x, type) and issubclass(x, Loss)]
OF_FEATURES = {"reduction", "gather", "process_group", "equal_batches", "backend"}


def hyperparameters(loss: type[Loss]) -> dict[str, tuple[Any, Any]]:
    """Default and check of each one that the loss has beside those of all losses."""
    fields = [field for field in dataclasses.fields(loss) if field.name not in OF_FEATURES]
    return {field.name: (field.default, field.metadata["check"]) for field in fields}


def another_value(value: Any, check: Any) -> Any:
    """One that the hyperparameter may have."""
    if isinstance(check, tuple):
        return next(x for x in check if x != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value / 2 if value else 0.5


def _variants(loss: type[Loss]) -> dict[str, tuple[type[Loss], dict[str, Any]]]:
    """The loss as it is by default, with each other value of each option that has a name or is a flag, and with each
    number that is off by default."""
    name = loss.__name__
    found: dict[str, tuple[type[Loss], dict[str, Any]]] = {name: (loss, {})}
    for option, (default, check) in hyperparameters(loss).items():
        values = check if isinstance(check, tuple) else ()
        if isinstance(default, bool) or default in (0, None):
            values = (another_value(default, check),)
        found |= {f"{name} {option}={value}": (loss, {option: value}) for value in values if value != default}
    return found


VARIANTS = {name: variant for loss in PUBLIC for name, variant in _variants(loss).items()}


def build(name: str, **options: Any) -> Loss:
    loss, own = VARIANTS[name]
    return loss(**{**own, **options})


def another(loss: Loss, name: str) -> Any:
    """A value that the hyperparameter may have and has not."""
    return another_value(getattr(loss, name), hyperparameters(type(loss))[name][1])


class Model(Towers):
    """Two towers, a logit scale and a logit bias, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))


def inputs_of(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, data: dict[str, Tensor]) -> dict[str, Any]:
    """All that a loss may be given, by name; `image` and `text` are tokens, and features are their means."""
    return {
        "image_features": image.mean(1),
        "text_features": text.mean(1),
        "first_view": image.mean(1),
        "second_view": text.mean(1),
        "image_tokens": image,
        "text_tokens": text,
        "image_mask": data["image_mask"],
        "text_mask": data["text_mask"],
        "pids": data["pids"],
        "image_ids": data["image_ids"],
        "sample_weight": data["weight"].to(image.dtype),
        "logit_scale": scale,
        "logit_bias": bias,
    }


def arguments(loss: Loss, inputs: dict[str, Any], *, bare: bool = False) -> dict[str, Any]:
    """Those of `inputs` that the loss takes, or with `bare` those alone that it cannot do without."""
    parameters = inspect.signature(loss.forward).parameters.values()
    needed = [one.name for one in parameters if one.default is inspect.Parameter.empty]
    missing = [name for name in needed if name not in inputs]
    assert not missing, f"{type(loss).__name__} takes {missing}: give every_loss.inputs_of a line for it"
    unused = _without_pids(loss)
    taken = [one.name for one in parameters if one.name in inputs and not (one.name == "pids" and unused)]
    return {name: inputs[name] for name in taken if not bare or name in needed or name == "pids"}


def _without_pids(loss: Loss) -> bool:
    """Whether the loss compares pairs alone, and warns of pids."""
    option = loss.pids_option
    return option is not None and getattr(loss, option[0]) == option[2]


def inputs(loss: Loss, model: Model, data: dict[str, Tensor], *, bare: bool = False) -> dict[str, Any]:
    """What the loss takes, with the model's tokens, scale and bias."""
    image, text, scale = model(data["image"], data["text"])
    return arguments(loss, inputs_of(image, text, scale, model.bias, data), bare=bare)


def evaluate(loss: Loss, model: Model, data: dict[str, Tensor], *, bare: bool = False) -> Tensor:
    value: Tensor = loss(**inputs(loss, model, data, bare=bare))
    return value


def gradients(value: Tensor, module: nn.Module) -> Tensor:
    """Of all parameters in one vector, 0 where they are not used."""
    parameters = list(module.parameters())
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    given = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
    return torch.cat([g.flatten() for g in given])
