"""Whole tasks on threads of their own: how the PyTorch paths use the cores of a CPU.

PyTorch splits every operation among the threads and waits for the slowest before the next one. A tile of a loss is a
dozen short operations, so one core that something else keeps busy stops all of them, a dozen times a tile. Here a
thread takes the next task when it has finished one, and inside a task every operation runs on one thread: nobody
waits, what a task has computed stays in its core's cache, and the bits are the same for any number of threads.
"""

import threading
from collections.abc import Callable, Iterable

import torch

__all__ = ["Work", "on_threads"]

Work = Callable[[], None]


def on_threads(tasks: Iterable[Work], device: torch.device) -> None:
    """Runs all tasks, in any order, on as many threads as PyTorch has; without gradients and autocast.

    Tasks must write to different memory; the longest ones belong first. The first exception of any of them is raised
    when all threads have stopped. On another device than the CPU the tasks follow each other, as it has its own queue.
    """
    tasks = list(tasks)
    if device.type != "cpu":
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for task in tasks:
                task()
        return
    waiting, lock = iter(tasks), threading.Lock()
    errors: list[BaseException] = []
    inference = torch.is_inference_mode_enabled()

    def take() -> None:
        torch.set_num_threads(1)  # of the calling thread
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
            while not errors:
                with lock:
                    task = next(waiting, None)
                if task is None:
                    return
                try:
                    task()
                except BaseException as error:  # KeyboardInterrupt, too, ends all of them
                    errors.append(error)

    count = torch.get_num_threads()
    helpers = [threading.Thread(target=take, daemon=True) for _ in range(min(count, len(tasks)) - 1)]
    try:
        for helper in helpers:
            helper.start()
        take()
    finally:
        for helper in helpers:
            helper.join()
        torch.set_num_threads(count)  # also for threads to come
    if errors:
        raise errors[0]
