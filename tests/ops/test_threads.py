"""Tasks on threads: each is run once, one thread inside of each, and what goes wrong in one is raised."""

import signal
import threading
import time
from functools import partial

import pytest
import torch
from helpers.compare import value_and_grads
from torch.utils.flop_counter import FlopCounterMode

from fmfa_losses.functional import efa_loss
from fmfa_losses.ops.threads import on_threads

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def of_a_new_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_every_task_runs_once_and_alone(threads):
    out, inside = torch.zeros(40), set()

    def task(n):
        inside.add((torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        out[n] += n

    with torch.autocast("cpu"):
        on_threads([partial(task, n) for n in range(40)], CPU)
    assert torch.equal(out, torch.arange(40.0))
    assert inside == {(1, False, False)}
    assert torch.get_num_threads() == of_a_new_thread() == threads


def test_the_first_error_is_raised_and_ends_all(threads):
    ran = []

    def task(n):
        ran.append(n)
        if n == 3:
            raise ValueError("the fourth task")

    with pytest.raises(ValueError, match="the fourth task"):
        on_threads([partial(task, n) for n in range(1000)], CPU)
    assert len(ran) < 1000
    assert torch.get_num_threads() == threads


def test_a_thread_that_starts_meanwhile_has_the_number_of_all(threads):
    seen = []
    on_threads([lambda: seen.append(of_a_new_thread())] * 4, CPU)
    assert seen == [threads] * 4


def test_tasks_of_two_threads_at_once(threads):
    """The second one meets PyTorch first while tasks run, and ends last."""
    seen, second = [], []

    def also():
        on_threads([partial(time.sleep, 0.1)] * 4, CPU)
        seen.append(torch.get_num_threads())

    def task():
        second.append(threading.Thread(target=also))
        second[0].start()

    on_threads([task], CPU)
    second[0].join()
    assert seen == [threads]
    assert torch.get_num_threads() == of_a_new_thread() == threads


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="only the main thread can be")
def test_an_interrupt_while_others_work(threads):
    """It ends all of them before it goes on, and a second one changes nothing."""
    running = []

    def task(n):
        running.append(n)
        if n < 2:
            time.sleep(0.1 * n)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.05)
        running.pop()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            on_threads([partial(task, n) for n in range(1000)], CPU)
    finally:
        signal.signal(signal.SIGINT, before)
    assert running == [] or threads == 1  # where the interrupt is inside of the task
    assert torch.get_num_threads() == of_a_new_thread() == threads


@pytest.mark.parametrize("possible", [0, 1])
def test_a_system_that_has_no_more_threads(monkeypatch, threads, possible):
    start, left = threading.Thread.start, [possible]

    def limited(thread):
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    out = torch.zeros(9)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        on_threads([partial(out[n : n + 1].fill_, n) for n in range(9)], CPU)
    assert torch.equal(out, torch.arange(9.0))
    assert torch.get_num_threads() == of_a_new_thread() == threads


def test_a_counter_sees_every_operation(threads):
    """A dispatch mode is one thread's: 2 n^3 for each product."""
    x = torch.ones(3, 3)
    with FlopCounterMode(display=False) as counter:
        on_threads([lambda: x @ x] * 20, CPU)
    assert counter.get_total_flops() == 20 * 54
    assert torch.get_num_threads() == threads


def test_no_task_and_inference_mode(threads):
    on_threads([], CPU)
    with torch.inference_mode():
        out = torch.zeros(8)
        on_threads([partial(out[n : n + 1].fill_, n) for n in range(8)], CPU)  # refused outside of the mode
    assert torch.equal(out, torch.arange(8.0))


@pytest.mark.parametrize("masked", [False, True])
def test_any_number_of_threads_gives_the_same_bits(masked):
    """EFA of several tiles, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(24, n, 64, generator=generator) for n in (65, 40))
    lengths = torch.randint(0, 41, (24, 1), generator=generator)
    mask = torch.arange(40) < lengths if masked else None
    results, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(value_and_grads(lambda i, t: efa_loss(i, t, text_mask=mask), (image, text)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
