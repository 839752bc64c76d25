"""Tasks on threads: each is run once, one thread inside of each, and what goes wrong in one is raised."""

import threading
from functools import partial

import pytest
import torch
from helpers.compare import value_and_grads

from fmfa_losses.functional import efa_loss
from fmfa_losses.ops.threads import on_threads

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_task_runs_once_and_alone(threads):
    out, inside = torch.zeros(40), set()

    def task(n):
        inside.add((torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        out[n] += n

    with torch.autocast("cpu"):
        on_threads([partial(task, n) for n in range(40)], CPU)
    assert torch.equal(out, torch.arange(40.0))
    assert inside == {(1, False, False)}
    assert torch.get_num_threads() == threads
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [threads]


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
