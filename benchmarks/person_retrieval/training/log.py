"""What a run tells while it trains: a line an epoch, a bar on a terminal, curves for TensorBoard."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import RunError
from .files import write_aside
from .run_folder import LOG, TENSORBOARD

__all__ = ["EpochReport", "Log"]

_EPOCH = re.compile(r"epoch +(\d+)/")


@dataclass(frozen=True)
class EpochReport:
    """One epoch: means over its steps, and what came of it.

    Args:
        epoch: counted from 1.
        epochs: of the run.
        means: "loss", every term, and accuracies in [0, 1], by name.
        rates: the learning rates of the last step, one a group of parameters.
        validation: percent by name, "R1" among them; None where nothing is validated.
        best: the epoch with the best R1 so far, and that R1.
        selected: on which split.
        seconds: of training, without validation.
        images: how many pairs were read, by all processes.
    """

    epoch: int
    epochs: int
    means: dict[str, float]
    rates: list[float]
    seconds: float
    images: int
    validation: dict[str, float] | None = None
    best: tuple[int, float] | None = None
    selected: str = "last"

    def __str__(self) -> str:
        """A line with columns that stand below each other; accuracies in percent."""
        width = len(str(self.epochs))
        terms = {name: value for name, value in self.means.items() if not name.endswith("accuracy")}
        accuracies = {
            name.removesuffix("_accuracy"): value for name, value in self.means.items() if name.endswith("accuracy")
        }
        cells = [f"epoch {self.epoch:{width}}/{self.epochs}"]
        cells += [f"{name} {value:9.4f}" for name, value in terms.items()]
        cells.append("lr " + " ".join(f"{rate:.2e}" for rate in dict.fromkeys(self.rates)))
        cells += [f"{name} {100 * value:5.1f} %" for name, value in accuracies.items()]
        if self.validation is not None and self.best is not None:
            epoch, best = self.best
            cells.append(f"{self.selected} R1 {self.validation['R1']:6.2f} (best {best:6.2f}, epoch {epoch:{width}})")
        cells.append(f"{self.seconds:7.1f} s {self.images / max(self.seconds, 1e-9):7.1f} images/s")
        return "  ".join(cells)


class Log:
    """Prints, and appends to `log.txt` in the run's folder.

    Args:
        folder: of the run; None keeps nothing.
        quiet: no progress bars; there are none either where stderr is no terminal.
        tensorboard: writes the figures of every epoch into the folder's `tensorboard`.
        leads: False for all processes but one, which are silent.

    Raises:
        RunError: `tensorboard` without the package, or without a folder.
    """

    def __init__(
        self, folder: Path | None = None, *, quiet: bool = False, tensorboard: bool = False, leads: bool = True
    ) -> None:
        self.folder, self.leads = folder, leads
        self.bars = leads and not quiet and sys.stderr.isatty()
        self._writer: Any = None
        self._curves = folder / TENSORBOARD if tensorboard and leads and folder is not None else None
        if tensorboard and folder is None:
            raise RunError("--tensorboard needs a folder to write to, got none; give --out")
        if tensorboard:
            try:
                import torch.utils.tensorboard  # noqa: F401, what is missing is told before the first step
            except ImportError as error:
                raise RunError(
                    "--tensorboard needs the package tensorboard, which is not installed; "
                    "`pip install tensorboard`, or leave the option out"
                ) from error

    def bar(self, total: int) -> "tqdm[Any]":
        return tqdm(total=total, unit="step", disable=not self.bars)

    def say(self, text: str) -> None:
        """A line, above a bar if there is one."""
        if not self.leads:
            return
        tqdm.write(text)
        sys.stdout.flush()
        if self.folder is not None:
            try:
                with open(self.folder / LOG, "a", encoding="utf-8") as file:
                    file.write(text + "\n")
            except OSError as error:
                raise self._unwritable(error) from error

    def begin(self, done: int) -> None:
        """Before a run goes on after `done` epochs: the lines of later ones, which come again, are taken out."""
        if not self.leads or self.folder is None:
            return
        file = self.folder / LOG
        try:
            if file.exists():
                lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and _epoch_of(line) <= done]
                if kept != lines:
                    write_aside(file, lambda stream: stream.write("".join(kept).encode()))
        except OSError as error:
            raise self._unwritable(error) from error

    def epoch(self, report: EpochReport) -> None:
        self.say(str(report))
        if self._curves is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            try:  # points of this epoch and later ones, of a run that was killed, are taken out
                self._writer = SummaryWriter(str(self._curves), purge_step=report.epoch)
            except OSError as error:
                raise self._unwritable(error) from error
        curves = {f"train/{name}": value for name, value in report.means.items()}
        curves |= {f"learning_rate/{group}": rate for group, rate in enumerate(report.rates)}
        curves |= {f"{report.selected}/{name}": value for name, value in (report.validation or {}).items()}
        curves["images_per_second"] = report.images / max(report.seconds, 1e-9)
        for name, value in curves.items():
            self._writer.add_scalar(name, value, report.epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"the log in {self.folder} could not be written: {error.strerror}; checkpoints stand; "
            "make room, then go on with --resume"
        )


def _epoch_of(line: str) -> int:
    found = _EPOCH.match(line)
    return int(found[1]) if found else 0
