"""Real processes that talk over Gloo on this machine."""

import datetime
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

# The processes are forked from one that has imported torch and nothing else: a second instead of many.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo"])


def run(world: int, work: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """What `work(*args)` returns on each rank; the traceback's text where it raised, None where the process ended."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, folder, timeout, work, args, sys.path)
        torch.multiprocessing.start_processes(_start, arguments, nprocs=world, start_method="forkserver")
        files = [Path(folder, f"{rank}.pt") for rank in range(world)]
        return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


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
    # Under load the Gloo of torch 2.6 now and then never comes back from its end; the result is written by now.
    end = threading.Thread(target=dist.destroy_process_group, daemon=True)
    end.start()
    end.join(20)


FORKS = """
import os, sys, traceback
exec(sys.argv[1], scope := {})
for code in sys.argv[2:]:
    if os.fork() == 0:
        try:
            exec(code, scope)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        print(end="\\0", flush=True)
        os._exit(0)
    os.wait()
"""


def forked(first: str, codes: list[str]) -> list[str]:
    """What each of `codes` prints, or the traceback where it raises: each in a process of its own, `first` run once."""
    command = [sys.executable, "-c", FORKS, first, *codes]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    printed = out.split("\0")[:-1]
    assert len(printed) == len(codes), out
    return printed


RANKS = """
import os, pickle, sys
sys.path[:] = pickle.loads(bytes.fromhex(sys.argv[1]))
exec(sys.argv[3])
from helpers import processes
processes.fork_ranks(*pickle.loads(bytes.fromhex(sys.argv[2])))
"""


def run_forked(world: int, work: Callable[..., Any], *args: Any, first: str, timeout: float = 60) -> list[Any]:
    """As `run`, where imports take seconds: one process does what is `first`, and the ranks are its forks."""
    with tempfile.TemporaryDirectory() as folder:
        given = pickle.dumps(sys.path), pickle.dumps((world, folder, timeout, work, args))
        command = [sys.executable, "-c", RANKS, *(x.hex() for x in given), first]
        # A process that has used a GPU or threads cannot be forked. The rest is what torchrun sets.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": "1", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2], env=environment)
        files = [Path(folder, f"{rank}.pt") for rank in range(world)]
        return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def fork_ranks(world: int, folder: str, timeout: float, work: Callable[..., Any], args: Any) -> None:
    for rank in range(world):
        if os.fork() == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            _start(rank, world, folder, timeout, work, args, sys.path)
            os._exit(0)
    for _ in range(world):
        os.wait()
