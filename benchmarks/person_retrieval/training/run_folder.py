"""The folder of a run: one run at a time, one run in all, and what it was told."""

import fcntl
import json
import os
import shlex
import sys
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from ..errors import RunError
from . import checkpoint
from .files import remove_partial, write_aside
from .settings import differences, plain

__all__ = ["RunFolder", "holds_run"]

RECORD, CHECKPOINT, BEST, LOG, METRICS = "run.json", "checkpoint.pt", "best.pt", "log.txt", "metrics.json"
TENSORBOARD = "tensorboard"
PICTURES = ("loss_curves.png", "retrieval.png", "similarity_maps.png")
FORMAT = 2

_held: set[int] = set()  # descriptors of the locks of this process


def _close_held() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


# Processes that read images are forked. One that outlives a killed run for a moment must not hold on to its folder.
os.register_at_fork(after_in_child=_close_held)


def holds_run(path: Path) -> bool:
    """Whether there is a run, or a part of one."""
    return any((path / name).exists() for name in (RECORD, CHECKPOINT, METRICS))


class RunFolder:
    """Holds `path` for one run from `with` to its end.

    On entering, before anything is computed: the folder is created and written to, no other process holds it, and it is
    empty of runs. A folder that holds one is either gone on with (`resume`: with the same settings) or emptied of that
    run's own files (`overwrite`) before the new run begins, so that nothing of the old one can be resumed. `run.json`
    then holds the run's id, which checkpoints repeat, its settings, and the commands that trained it.

    Resumed settings may differ in the number of processes where their batch is the same, in the readers of images, and
    in the number of epochs where it is more than what was trained. `notes` says what differs.

    Args:
        settings: what the run is a function of, for JSON: see `settings_of`.
        leads: False for all processes but one, which write nothing and check nothing.
        command: how the run was started; as this process was, unless given.

    Raises:
        RunError: in use, not writable, another run's, other settings, nothing to resume.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        leads: bool = True,
        command: str | None = None,
    ) -> None:
        if resume and overwrite:
            raise RunError("--resume goes on with a run and --overwrite removes it, got both; pass one of them")
        self.path, self.settings, self.leads = Path(path), plain(settings), leads
        self.resuming, self.overwrite = resume, overwrite
        self.command = shlex.join(sys.argv) if command is None else command
        self.run = uuid4().hex
        self.commands: list[str] = []
        self.notes: list[str] = []
        self.chosen_epochs: int | None = None
        self._lock: int | None = None

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def best(self) -> Path:
        return self.path / BEST

    @property
    def epochs(self) -> int:
        """How many this run trains: what was chosen, or else what the recipe says."""
        return self.chosen_epochs or int(self.settings["recipe"]["epochs"])

    def choose_epochs(self, epochs: int | None) -> None:
        """Notes a number of epochs that this machine can afford; a resumed run keeps it. None: all of the recipe."""
        self.chosen_epochs = epochs
        if self.leads:
            self._write()

    def write_json(self, name: str, content: Any) -> Path:
        """Writes a file of this run, whole or not at all."""
        return self._put(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def __enter__(self) -> "RunFolder":
        record = self._read() if self.resuming else None  # before a folder with another name is created
        if not self.leads:
            if record:
                self._take_over(record)
            return self
        self._hold()
        try:
            self._begin()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    # ---------------------------------------------------------------------------------------------- entering

    def _hold(self) -> None:
        """Creates the folder and locks a file in it. The kernel drops the lock when the process ends, however it ends.

        The file stays: whoever removed it could remove one that a third process has locked by now.
        """
        file = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 4096).decode(errors="replace").strip() or "a process that just started"
            os.close(descriptor)
            raise RunError(
                f"a folder must be used by one run at a time; {self.path} is in use by {holder}; "
                "wait for it, or pass another --out"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise RunError(
                f"--out must be on a file system with locks, {self.path} has none ({error.strerror}); "
                "pass a folder on a local disk"
            ) from error
        self._lock = descriptor
        _held.add(descriptor)

    def _begin(self) -> None:
        try:
            os.ftruncate(self._lock, 0)  # type: ignore[arg-type]
            os.pwrite(self._lock, f"process {os.getpid()} ({self.command})\n".encode(), 0)  # type: ignore[arg-type]
            remove_partial(self.path)
        except OSError as error:
            raise self._unwritable(error) from error
        if self.resuming:
            self._resume()
        elif holds_run(self.path) and not self.overwrite:
            raise RunError(
                f"{self.path} holds a run{self._of()}; pass --resume to go on with it, --overwrite to start anew, "
                "or another --out"
            )
        else:
            self._remove()
        self.commands.append(self.command)
        self._write()

    def _resume(self) -> None:
        record = self._read()
        self.run = record["run"]
        trained = 0
        if self.checkpoint.exists():
            trained = checkpoint.load(self.checkpoint, keys=("run", "epoch"), mmap=True)["epoch"]
        forbidden, self.notes = differences(record["settings"], self.settings, trained)
        if forbidden:
            raise RunError(
                f"a resumed run must keep its settings; in {self.path} {'; '.join(forbidden)}; "
                "give the former ones, or start anew with --overwrite or another --out"
            )
        self._take_over(record)

    def _take_over(self, record: dict[str, Any]) -> None:
        self.run, self.commands = record["run"], record["commands"]
        if record["settings"].get("recipe", {}).get("epochs") == self.settings.get("recipe", {}).get("epochs"):
            self.chosen_epochs = record["chosen_epochs"]

    def _remove(self) -> None:
        """The files of a run, and nothing else. First of all the record, without which nothing is resumed."""
        events = sorted((self.path / TENSORBOARD).glob("events.out.tfevents.*"))
        try:
            for file in [*(self.path / name for name in (RECORD, CHECKPOINT, BEST, METRICS, LOG, *PICTURES)), *events]:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def _release(self) -> None:
        if self._lock is not None:
            _held.discard(self._lock)
            os.close(self._lock)
            self._lock = None

    # ------------------------------------------------------------------------------------------------ record

    def _read(self) -> dict[str, Any]:
        file = self.path / RECORD
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(
                f"--resume needs a run to go on with, found no {file}; run without --resume first"
                + (", with --overwrite" if holds_run(self.path) else "")
            ) from error
        except (OSError, ValueError) as error:
            raise RunError(f"{file} must be JSON that can be read, got {error}; start anew with --overwrite") from error
        whole = isinstance(record, dict) and {"run", "commands", "chosen_epochs", "settings"} <= record.keys()
        if not whole or record.get("format") != FORMAT or not isinstance(record["settings"], dict):
            raise RunError(f"{file} must be a record of this program, got something else; start anew with --overwrite")
        return record

    def _write(self) -> None:
        record = {
            "format": FORMAT,
            "run": self.run,
            "commands": self.commands,
            "chosen_epochs": self.chosen_epochs,
            "settings": self.settings,
        }
        self.write_json(RECORD, record)

    def _put(self, file: Path, text: str) -> Path:
        try:
            write_aside(file, lambda stream: stream.write(text.encode()))
        except OSError as error:
            raise self._unwritable(error) from error
        return file

    def _of(self) -> str:
        try:
            return f" of `{self._read()['commands'][0]}`"
        except (RunError, LookupError):
            return ""

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"--out must be a folder that can be written to, got {self.path} ({error.strerror}); "
            "make room or give another"
        )
