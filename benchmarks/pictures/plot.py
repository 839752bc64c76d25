"""docs/plot.md: every figure as the page's own code makes it."""

import re
from pathlib import Path
from typing import Any

import torch

from .. import ROOT
from ._people import people, save

__all__ = ["draw", "examples"]

EXAMPLE = re.compile(r"^```python\n(.*?)^```\n+!\[[^\]]*\]\(pictures/(\w+\.png)\)", re.M | re.S)


def examples() -> dict[str, str]:
    """The code above each picture of the page, by the picture's name."""
    page = (ROOT / "docs" / "plot.md").read_text(encoding="utf-8")
    return {name: code for code, name in EXAMPLE.findall(page)}


def draw(folder: Path) -> None:
    """Runs the examples one after the other; each leaves a `figure`."""
    seen = people()
    given: dict[str, Any] = {
        "photograph": seen.photograph, "captions": seen.split.captions, "words": seen.words,
        "image_features": seen.image_features, "text_features": seen.text_features,
        "image_tokens": seen.image_tokens, "text_tokens": seen.text_tokens, "text_mask": seen.token_ids != 0,
        "image_pids": seen.image_pids, "text_pids": seen.text_pids,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # an example sets the seed
        for name, code in examples().items():
            exec(compile(code, f"docs/plot.md, {name}", "exec"), given)
            save(given["figure"], folder / name, dpi=85)
