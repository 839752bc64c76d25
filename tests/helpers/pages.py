"""The code of a page, run as a reader would run it."""

import re
from types import SimpleNamespace
from typing import Any

from benchmarks import ROOT


def code_blocks(page: str) -> list[str]:
    """The Python blocks of docs/`page`."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def run_blocks(page: str, start: int = 0, stop: int | None = None, /, **namespace: Any) -> SimpleNamespace:
    """Blocks `start` to `stop`, one after the other, with these names; returns what they defined."""
    for number, text in list(enumerate(code_blocks(page)))[start:stop]:
        exec(compile(text, f"docs/{page}, block {number}", "exec"), namespace)
    return SimpleNamespace(**namespace)
