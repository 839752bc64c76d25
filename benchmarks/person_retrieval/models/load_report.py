"""What was found in a file of weights, and what became of it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["LoadReport", "few"]


def few(names: Iterable[str], count: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


@dataclass(frozen=True)
class LoadReport:
    """What was found in a file of weights, and what became of it; `str` of it is for a reader, `as_dict` for JSON."""

    source: str  # what kind of file it is, in words
    architecture: str
    activation: str  # and where that is known from
    tokenizer: str  # where it is from
    file: str | None = None
    sha256: str | None = None
    dtypes: tuple[str, ...] = ()  # of the towers' tensors in the file
    loaded: dict[str, int] = field(default_factory=dict)  # part of the model -> tensors filled
    missing: tuple[str, ...] = ()  # of the model, which it does without; anything else that is missing is an error
    unexpected: tuple[str, ...] = ()  # of the file, within the towers, for which the model has no place
    resized: dict[str, tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=dict)  # name -> grids, old, new
    skipped: dict[str, int] = field(default_factory=dict)  # of the file, beside the towers: part -> tensors

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        def counts(parts: dict[str, int]) -> str:
            return ", ".join(f"{name} {count}" for name, count in parts.items())

        lines = [f"weights: {self.source}" + (f", {self.file}" if self.file else "")]
        if self.sha256:
            lines.append(f"sha256 {self.sha256}")
        lines.append(f"model: {self.architecture}; {self.activation}")
        if self.loaded:
            lines.append(f"tensors loaded: {counts(self.loaded)}; stored as {' and '.join(self.dtypes)}")
        for name, (old, new) in self.resized.items():
            lines.append(f"resized: {name} from {old[0]} x {old[1]} to {new[0]} x {new[1]}")
        if self.skipped:
            lines.append(f"skipped, not of the towers: {counts(self.skipped)}")
        if self.missing:
            lines.append(f"not in the file, and not needed: {', '.join(self.missing)}")
        if self.unexpected:
            lines.append(
                f"WARNING: {len(self.unexpected)} tensors of the towers have no place in this model, so that its "
                f"features may differ from theirs: {few(self.unexpected)}"
            )
        return "\n  ".join([*lines, f"tokenizer: {self.tokenizer}"])
