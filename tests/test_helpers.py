"""What the GPU tests lean on, where there is no GPU."""

import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import gpu
from helpers.compare import value_and_grads
from helpers.distribution import value_and_gradients
from helpers.errors import explains

HERE = Path(__file__).parent


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_cotangents_are_where_the_value_is(shape):
    x = torch.ones(shape, device="meta")
    value, gradient = value_and_grads(lambda x: 2 * x, [x])
    assert value.device == gradient.device == x.device
    got = value_and_gradients(lambda x: 2 * x, {"x": x})
    assert got["dx"].device == x.device


class Cuda:
    """torch.cuda's debug mode, which warns after it has changed."""

    mode = 1
    known = {"default": 0, "warn": 1, "error": 2}  # noqa: RUF012

    def set_sync_debug_mode(self, mode):
        self.mode = self.known.get(mode, mode)
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)

    def get_sync_debug_mode(self):
        return self.mode


@pytest.mark.parametrize("fails", [False, True])
def test_the_debug_mode_is_what_it_was(fails, monkeypatch):
    cuda = Cuda()
    for name in ("set_sync_debug_mode", "get_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    try:
        with gpu.waiting_raises():
            assert cuda.mode == 2
            if fails:
                raise RuntimeError("called a synchronizing operation")
    except RuntimeError:
        assert fails
    assert cuda.mode == 1


WARNS = """
import warnings
def test_warns():
    warnings.warn("Please use the new API settings to control TF32 behavior", UserWarning)
"""


def test_warnings_about_older_switches_are_no_failures(tmp_path):
    (tmp_path / "test_it.py").write_text(WARNS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    run = lambda: subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode  # noqa: E731
    assert run() == 1
    (tmp_path / "conftest.py").write_text((HERE / "gpu" / "conftest.py").read_text())
    assert run() == 0


@pytest.mark.parametrize(
    ("message", "missing"),
    [
        ("pids must lie in [0, 4), got -1; number them from 0", None),
        ("pids must lie in [0, 4), got 7; number them from 0", "what came"),
        ("ids must lie in [0, 5), got -1; number them from 0", "what must hold"),
        ("pids must lie in [0, 4), got -1; look again", "what to do"),
        ("pids must lie in [0, 4), got -1", "does not say what to do"),
        ("pids must lie in [0, 4) and not be -1; number them from 0", "does not say what came"),
    ],
)
def test_a_message_explains_in_three_parts(message, missing):
    expectation = nullcontext() if missing is None else pytest.raises(AssertionError, match=missing)
    with expectation, explains(ValueError, ("pids", "[0, 4)"), "-1", "from 0"):
        raise ValueError(message)


def test_an_error_of_another_kind_explains_nothing():
    with pytest.raises(TypeError), explains(ValueError, "pids"):
        raise TypeError("pids must be a tensor, got 1")
    with pytest.raises(pytest.fail.Exception), explains(ValueError, "pids"):
        pass
