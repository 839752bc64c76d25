"""The pictures of the documentation: `python -m benchmarks pictures` draws them all into docs/pictures.

One file of this folder a page of docs, with one function, `draw(folder)`, which writes `folder / "NAME.png"`. Seeds are
fixed, no data set is needed. The pages name their pictures; tests/docs/test_pictures.py draws each into another folder.
"""

import argparse
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from .. import ROOT

__all__ = ["FOLDER", "main", "pages"]

FOLDER = ROOT / "docs" / "pictures"


def pages() -> dict[str, Callable[[Path], None]]:
    """The drawing function of each page that has pictures."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}").draw for name in names}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks pictures", description="Draws the pictures of docs.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: docs/pictures)")
    parser.add_argument("--page", nargs="*", choices=sorted(pages()), help="of these pages alone (default: of all)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, draw in pages().items():
        if options.page is None or name in options.page:
            draw(options.out)
