"""What a user meets first: the import, the public names, the packaging."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from helpers.processes import forked

import fmfa_losses

ROOT = Path(__file__).parents[1]


def run(code: str, **variables: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | variables
    ).stdout


def test_import_brings_einops_and_nothing_of_torch_that_is_not_there_already():
    """torch's compiler, torch.utils.checkpoint (which imports it in torch 2.6), triton and matplotlib wait for use."""
    out = run(
        "import sys, torch; before = set(sys.modules); import fmfa_losses;"
        "print(*sorted(m for m in set(sys.modules) - before if m.split('.')[0] not in sys.stdlib_module_names))"
    )
    brought = out.split()
    assert {name.split(".")[0] for name in brought} == {"fmfa_losses", "einops"}, brought


@pytest.mark.skipif(
    metadata.version("einops") < "0.8.2", reason="einops imports torch's compiler itself when it meets its first tensor"
)
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


def test_a_part_is_imported_when_it_is_named():
    names = ["cached", "compat", "distributed", "doctor", "noise", "plot", "retrieval"]
    code = (
        "key = 'fmfa_losses.{0}'; part = fmfa_losses.{0};"
        "print(part is sys.modules[key], '{0}' in dir(fmfa_losses), 'matplotlib' in sys.modules)"
    )
    printed = forked("import sys, fmfa_losses", [code.format(name) for name in names])
    assert dict(zip(names, printed, strict=True)) == dict.fromkeys(names, "True True False\n")


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(fmfa_losses, "retreival")


@pytest.mark.parametrize("name", [n for n in fmfa_losses.__all__ if isinstance(getattr(fmfa_losses, n), type)])
def test_modules_and_outputs_are_documented(name):
    doc = getattr(fmfa_losses, name).__doc__
    assert doc
    if issubclass(getattr(fmfa_losses, name), torch.nn.Module):
        for part in ("Args:", "Returns:", "Raises:", "Example:", "Reference:"):
            assert part in doc, f"{name} lacks {part}"


def test_every_folder_is_installed():
    """The wheel has the folders that pyproject.toml lists."""
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "fmfa_losses").rglob("*.py")}
    assert set(re.findall(r'"(.+?)"', listed)) == {".".join(folder.parts) for folder in folders} | {
        "fmfa_losses.kernels"
    }


def test_kernels_install_inside_the_package():
    import importlib.util

    assert importlib.util.find_spec("fmfa_losses.kernels") is not None


def test_triton_is_an_extra():
    """A CPU needs none, and builds of torch for GPUs bring the one that fits."""
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any("triton" in line for line in project["dependencies"])
    assert any("triton" in line for line in project["optional-dependencies"]["triton"])


def test_a_triton_that_is_too_old_is_named(tmp_path):
    """ "auto" falls back; asked for by name, the message says which version came and which one is needed."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise ImportError('not to be imported')")
    (tmp_path / "triton-3.2.0.dist-info").mkdir()
    (tmp_path / "triton-3.2.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.2.0\n")
    out = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch; from fmfa_losses import EFALoss\n"
        "x = torch.randn(2, 3, 4); EFALoss()(x, x)\n"
        "try: EFALoss(backend='triton')(x, x)\n"
        "except RuntimeError as error: print(error)",
        TRITON_INTERPRET="1",
    )
    assert "cannot run: its kernels need triton >= 3.3, got 3.2.0 (docs/install.md)" in out


def test_versions_of_triton():
    from fmfa_losses.ops.backend import why_no_triton

    for version in (None, "3.3.0", "3.10.0", "3.4.0+git1234", "3.5.1.post21", "4.0rc1"):
        assert why_no_triton(True, version) is None
    for version in ("2.1.0", "3.2.0+gite7a1c2b", "3.1"):
        assert version in why_no_triton(True, version)
