"""What a user meets first: the import, the public names, the packaging."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fmfa_losses

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_import_brings_einops_and_nothing_of_torch_that_is_not_there_already():
    """torch's compiler, torch.utils.checkpoint (which imports it in torch 2.6), triton and matplotlib wait for use."""
    out = run(
        "import sys, torch; before = set(sys.modules); import fmfa_losses;"
        "print(*sorted(m for m in set(sys.modules) - before if m.split('.')[0] not in sys.stdlib_module_names))"
    )
    brought = out.split()
    assert {name.split(".")[0] for name in brought} == {"fmfa_losses", "einops"}, brought


def test_eager_use_does_not_import_the_compiler():
    out = run(
        "import sys, torch, fmfa_losses; x = torch.randn(3, 4, 8, requires_grad=True);"
        "fmfa_losses.EFALoss()(x, x).backward(); fmfa_losses.ASDMLoss()(x[:, 0], x[:, 1], torch.arange(3)).backward();"
        "print('torch._dynamo' in sys.modules, 'triton' in sys.modules)"
    )
    assert out.split() == ["False", "False"]


def test_public_names():
    for name in fmfa_losses.__all__:
        assert getattr(fmfa_losses, name) is not None
    for name in fmfa_losses.functional.__all__:
        assert callable(getattr(fmfa_losses.functional, name))


@pytest.mark.parametrize("name", [n for n in fmfa_losses.__all__ if isinstance(getattr(fmfa_losses, n), type)])
def test_modules_and_outputs_are_documented(name):
    doc = getattr(fmfa_losses, name).__doc__
    assert doc
    if issubclass(getattr(fmfa_losses, name), torch.nn.Module):
        for part in ("Args:", "Returns:", "Raises:", "Example:", "Reference:"):
            assert part in doc, f"{name} lacks {part}"


def test_kernels_install_inside_the_package():
    import importlib.util

    assert importlib.util.find_spec("fmfa_losses.kernels") is not None
