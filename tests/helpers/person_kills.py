"""Training killed at one moment after another, each time resumed: `python person_kills.py FOLDER`, one thread.

Every process is forked from this one, which has imported everything and computed nothing. Moments are right
before each step of the optimizer, in the middle of writing a checkpoint, and right before whatever the run does to its
files. The report goes to FOLDER/report.json.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers ask for it: once here, not once in every child

from benchmarks.person_retrieval.training import Log, holds_run
from helpers.person_trainer import run_folder, small_trainer, split

RECIPE: dict[str, Any] = {"epochs": 2, "batch_size": 12}
R1 = (10.0, 20.0)  # of the epochs: the second takes the first one's place as the best


def forked(work: Callable[[], None]) -> int:
    """How a child process ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def train(path: Path) -> None:
    with run_folder(path, resume=holds_run(path), **RECIPE) as folder:

        def validate(model: torch.nn.Module) -> dict[str, float]:
            return {"R1": R1[trainer.epoch - 1], "norm": float(sum(p.abs().sum() for p in model.parameters()))}

        trainer = small_trainer(folder, validate=validate, log=Log(path), **RECIPE)
        trainer.resume()
        trainer.fit()


def killed(path: Path, moment: int) -> None:
    """Trains and kills itself when it reaches `moment`; without reaching it, writes how many there were."""
    reached = 0

    def now() -> bool:
        nonlocal reached
        reached += 1
        return reached == moment

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if now():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    def half_saved(state: Any, file: Any) -> None:
        if now():
            file.write(b"PK half of a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        whole(state, file)

    whole, torch.save = torch.save, half_saved
    os.replace, os.fsync = watched(os.replace), watched(os.fsync)
    torch.optim.Adam.step = watched(torch.optim.Adam.step)
    train(path)
    (path / "moments").write_text(str(reached))


def left(path: Path) -> dict[str, Any]:
    """What a run leaves, without its id and its times."""
    state, best = (torch.load(path / name, weights_only=True) for name in ("checkpoint.pt", "best.pt"))
    assert state.pop("run") == best.pop("run") == json.loads((path / "run.json").read_text())["run"]
    lines = [line.split("  lr ")[0] for line in (path / "log.txt").read_text().splitlines() if line[:5] == "epoch"]
    partial = [file.name for file in path.iterdir() if file.name.endswith(".partial")]
    return {"state": state, "best": best, "lines": lines, "partial": partial}


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def outlived(path: Path) -> int:
    """Whether a folder is free although a child of its killed run, a reader of images, still lives: 0 if it is."""

    def run() -> None:
        with run_folder(path):
            reader = os.fork()
            if reader == 0:
                time.sleep(60)
                os._exit(0)
            (path / "reader").write_text(str(reader))
            os.kill(os.getpid(), signal.SIGKILL)

    def next_run() -> None:
        with run_folder(path, resume=True):
            pass

    forked(run)
    result = forked(next_run)
    os.kill(int((path / "reader").read_text()), signal.SIGKILL)
    return result


def main() -> None:
    root = Path(sys.argv[1])
    split()
    assert forked(lambda: killed(root / "whole", -1)) == 0
    expected = left(root / "whole")
    moments = int((root / "whole" / "moments").read_text())
    wrong = []
    for moment in range(1, moments + 1):
        path = root / "killed"
        ended, resumed = forked(lambda path=path, n=moment: killed(path, n)), forked(lambda path=path: train(path))
        if (ended, resumed) != (signal.SIGKILL, 0) or not same(left(path), expected):
            wrong.append([moment, ended, resumed])
        shutil.rmtree(path)
    report = {"moments": moments, "wrong": wrong, "lines": expected["lines"], "outlived": outlived(root / "reader")}
    (root / "report.json").write_text(json.dumps(report | {"best": expected["best"]["epoch"]}))


if __name__ == "__main__":
    main()
