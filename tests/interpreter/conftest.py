"""Kernels through Triton's interpreter. It is chosen when the kernels are imported, so this folder has its own process:

TRITON_INTERPRET=1 python -m pytest tests/interpreter

SOME_CASES=1 runs a few cases of each test, and none of what only asks torch: enough to see whether another Triton reads
the kernels as this one does.
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
    config.addinivalue_line("markers", "of_torch: of torch.compile, opcheck and dtypes, whatever the Triton")


def pytest_collection_modifyitems(config, items):
    """The first and the last case of a test differ in each parameter. Of several ways through a loss one more runs."""
    if not os.environ.get("SOME_CASES") or os.environ.get("TRITON_INTERPRET") != "1":  # of this folder alone
        return
    cases = {}
    for item in items:
        if not item.get_closest_marker("of_torch"):
            cases.setdefault((item.path, item.originalname), []).append(item)
    kept = {id(of[at]) for of in cases.values() for at in (0, -1)}
    kept |= {id(of[len(of) // 2]) for of in cases.values() if {"large", "way"} & {*of[0].fixturenames}}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


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
