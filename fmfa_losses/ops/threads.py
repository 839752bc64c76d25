"""Whole tasks on threads of their own: how the PyTorch paths use the cores of a CPU.

PyTorch splits every operation among the threads and waits for the slowest before the next one. A tile of a loss is a
dozen short operations, so one core that something else keeps busy stops all of them, a dozen times a tile. Here a
thread takes the next task when it has finished one, and inside a task every operation runs on one thread: nobody
waits, what a task has computed stays in its core's cache, and the bits are the same for any number of threads.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

import torch

__all__ = ["Work", "on_threads"]

Work = Callable[[], None]

_starting = threading.Lock()  # held while PyTorch's number of threads is not the user's


def on_threads(tasks: Iterable[Work], device: torch.device) -> None:
    """Runs all tasks, in any order, on as many threads as PyTorch has; without gradients and autocast.

    Tasks must write to different memory; the longest ones belong first. The first exception of any of them is raised
    when all threads have stopped. The tasks follow each other on another device than the CPU, as it has its own queue,
    and where a dispatch mode counts or records operations: it sees those of its own thread alone.
    """
    waiting = list(tasks)[::-1]
    errors: list[BaseException] = []
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast(device.type, enabled=False):
            while not errors:
                try:
                    task = waiting.pop()
                except IndexError:
                    return
                try:
                    task()
                except BaseException as error:  # KeyboardInterrupt, too, ends all of them
                    errors.append(error)

    if device.type != "cpu":
        work()
    elif torch._C._len_torch_dispatch_stack() or not _by_threads(work, len(waiting), errors):
        with _one_thread():
            work()
    if errors:
        raise errors.pop(0)  # the list would hold its traceback, and that the list


def _by_threads(work: Work, tasks: int, errors: list[BaseException]) -> bool:
    """Runs work on threads while this one waits; False: there is need or room for none.

    torch.set_num_threads is for the calling thread and for all threads to come. So this thread keeps its number and
    waits, and as soon as the new ones have set theirs, it sets its own again, for whatever thread comes next.
    """
    begin = threading.Event()

    def run(ready: threading.Event, ended: threading.Event) -> None:
        torch.get_num_threads()  # a thread that meets PyTorch first takes what counts then, whatever it has set before
        torch.set_num_threads(1)
        ready.set()
        begin.wait()
        work()
        ended.set()

    running: list[tuple[threading.Event, threading.Event]] = []
    try:
        with _starting:
            count = torch.get_num_threads()
            if count == 1:
                return False
            try:
                for _ in range(min(count, tasks)):
                    events = threading.Event(), threading.Event()
                    threading.Thread(target=run, args=events, daemon=True).start()
                    running.append(events)
            except RuntimeError:  # the system has no more, or the interpreter shuts down
                pass
            finally:
                for ready, _ in running:
                    ready.wait()
                torch.set_num_threads(count)
                begin.set()
    except BaseException as error:
        errors.append(error)
    for _, ended in running:
        while not ended.is_set():
            try:
                ended.wait()  # Thread.join, once it was interrupted, takes a thread that runs for one that does not
            except BaseException as error:  # KeyboardInterrupt reaches this thread
                errors.append(error)
    return bool(running or errors)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    count = torch.get_num_threads()
    if count == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
