"""Real processes that talk over Gloo on this machine."""

import datetime
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def run(world: int, work: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """What `work(*args)` returns on each of `world` ranks; an exception comes back as its traceback's text."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_start, (world, folder, timeout, work, args, sys.path), nprocs=world)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def _start(
    rank: int, world: int, folder: str, timeout: float, work: Callable[..., Any], args: Any, path: list[str]
) -> None:
    sys.path[:] = path
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=timeout)
    )
    try:
        result: Any = work(*args)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
