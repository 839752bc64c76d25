"""What the losses and heads have in common as modules: their repr, and how they are copied."""

import copy
import inspect
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from torch import nn

__all__ = ["Module"]


P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


class _Forward(Protocol[P, R_co]):
    def forward(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class Module(nn.Module):
    """repr shows every required argument of the constructor, and every one that is not at its default.

    An argument is the attribute of its name. One that has none, or is a module, is shown by the parts below. A
    process_group cannot be copied nor pickled: copies share it.
    """

    if TYPE_CHECKING:  # nn.Module's own returns Any; a call takes and returns what `forward` does

        def __call__(self: _Forward[P, R_co], *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    def extra_repr(self) -> str:
        parameters: dict[str, inspect.Parameter] = {}
        for cls in reversed(type(self).__mro__):
            if issubclass(cls, Module) and "__init__" in vars(cls):
                parameters.update(inspect.signature(cls.__init__).parameters)
        shown = {name: self._shown(name) for name in parameters if name != "self" and hasattr(self, name)}
        return ", ".join(
            f"{name}={'...' if name == 'process_group' else repr(value)}"
            for name, value in shown.items()
            if not isinstance(value, nn.Module) and repr(value) != repr(parameters[name].default)
        )

    def _shown(self, name: str) -> object:
        """The value of an argument, as repr has it."""
        return getattr(self, name)

    def __copy__(self) -> Any:
        copied = self.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = copied = self.__new__(type(self))
        group = self.__dict__.get("process_group")
        memo[id(group)] = group
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        if self.__dict__.get("process_group") is not None:
            raise TypeError(
                "a loss with a process_group cannot be pickled, because the group belongs to the running processes; "
                "save its state_dict(), or set process_group = None before and the new group after loading"
            )
        return self.__dict__
