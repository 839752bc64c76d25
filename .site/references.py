"""Names between backticks lead to the API reference: `ASDMLoss`, `functional.asdm_loss`, `TALLoss(margin=0.2)`."""

import re
from collections import Counter
from pathlib import Path

CODE = re.compile(r"<code>([\w.]+)(\([^<]*\))?</code>")
# No links within links, headings and blocks of code.
CLOSED = re.compile(r"(<(a|pre|h[1-6]|autoref)\b.*?</\2>)", re.S)


def identifiers(api: Path) -> dict[str, str]:
    """Name -> what the pages of the reference document under it, where that is one thing."""
    documented = [name for page in api.glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    names: dict[str, str] = {}
    endings: Counter[str] = Counter()
    for identifier in documented:
        parts = identifier.split(".")
        for i in range(len(parts)):
            ending = ".".join(parts[i:])
            endings[ending] += 1
            names[ending] = identifier
    return {name: identifier for name, identifier in names.items() if endings[name] == 1}


def linked(content: str, names: dict[str, str]) -> str:
    def one(match: re.Match) -> str:
        identifier = names.get(match[1])
        return f'<autoref identifier="{identifier}" optional>{match[0]}</autoref>' if identifier else match[0]

    pieces = CLOSED.split(content)  # open text, closed text, its tag, open text ...
    return "".join(CODE.sub(one, piece) if i % 3 == 0 else piece for i, piece in enumerate(pieces) if i % 3 != 2)


def on_page_content(content, config, **_):
    return linked(content, identifiers(Path(config.docs_dir) / "api"))
