"""Kernels through Triton's interpreter. It is chosen when the kernels are imported, so this folder has its own process:

TRITON_INTERPRET=1 python -m pytest tests/interpreter
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]


def pytest_configure(config):
    # numpy speaks of entries that a `where` discards afterwards.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("markers", "table: with the rows a program of the block tables")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _many_rows_a_program(request, monkeypatch):
    """The interpreter runs one program after the other, and pays for programs more than for numbers."""
    if request.node.get_closest_marker("table"):
        return
    from fmfa_losses.kernels import gather_gradient, match, ranking, unit_rows

    for key, (_, *others) in gather_gradient.DX.items():
        monkeypatch.setitem(gather_gradient.DX, key, (32, *others))
    for module, name in ((match, "COSINE"), (ranking, "RANKING"), (ranking, "GRADIENT")):
        monkeypatch.setattr(module, name, (32, *getattr(module, name)[1:]))
    monkeypatch.setattr(unit_rows, "ROWS", 32)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory that a launcher did not fill holds NaN, or a large negative number."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-12345)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poisoned(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poisoned(empty_like(*args, **kwargs)))
