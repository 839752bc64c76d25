"""Python wheels put on the path of a process and its children, without installing them."""

import os
import tempfile
import zipfile
from pathlib import Path

from .. import ROOT

__all__ = ["folder", "on_path", "unpack"]


def folder(given: Path | None) -> Path | None:
    """The one that is named, else wheels/ or .whl/ in the checkout, whichever exists."""
    return given or next((ROOT / name for name in ("wheels", ".whl") if (ROOT / name).is_dir()), None)


def unpack(folder: Path) -> tuple[Path | None, str]:
    """(a folder with the contents of every pure wheel, a sentence about them); None: there are none.

    Unpacked rather than imported from the archive: Triton reads the source of its kernels.
    """
    wheels = sorted(folder.glob("*.whl"))
    pure = [wheel for wheel in wheels if wheel.stem.endswith("-none-any")]
    if not pure:
        return None, f"{folder} holds no wheel that runs everywhere (py3-none-any)"
    site = Path(tempfile.mkdtemp(prefix="wheels-"))
    for wheel in pure:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    names = ", ".join("-".join(wheel.name.split("-")[:2]) for wheel in pure)
    skipped = f"; not for every machine, so left out: {', '.join(w.name for w in wheels if w not in pure)}"
    return site, f"from {folder}: {names}" + (skipped if len(pure) < len(wheels) else "")


def on_path(env: dict[str, str], site: Path) -> dict[str, str]:
    """The environment of a process that finds the packages in `site` first."""
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), env.get("PYTHONPATH")]))}
