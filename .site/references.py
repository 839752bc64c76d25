"""Names of code between backticks lead to the API reference: `ASDMLoss`, `functional.asdm_loss`, `TALLoss(margin=0.2)`.

Paths of this repository between backticks lead to the file: `benchmarks/results/micro_cpu.json`. A link whose text is
the name of a page's file, as GitHub shows it, gets the title of that page.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

CODE = re.compile(r"<code>([\w.]+)(\([^<]*\))?</code>")
PATH = re.compile(r"<code>((?:benchmarks|fmfa_losses|kernels|tests)/[\w./]+)</code>")
# No links within links, headings and blocks of code.
CLOSED = re.compile(r"(<(a|pre|h[1-6]|autoref)\b.*?</\2>)", re.S)
FILE = re.compile(r'(<a href="([^":#]+)\.html(?:#[^"]*)?">)[\w/]+\.md</a>')


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


def in_open_text(content: str, pattern: re.Pattern, one: Callable[[re.Match], str]) -> str:
    pieces = CLOSED.split(content)  # open text, closed text, its tag, open text ...
    return "".join(pattern.sub(one, piece) if i % 3 == 0 else piece for i, piece in enumerate(pieces) if i % 3 != 2)


def leading_to_files(content: str, root: Path, repository: str) -> str:
    def one(match: re.Match) -> str:
        path = root / match[1]
        if not path.exists():
            return match[0]
        return f'<a href="{repository}/{"tree" if path.is_dir() else "blob"}/main/{match[1]}">{match[0]}</a>'

    return in_open_text(content, PATH, one)


def linked(content: str, names: dict[str, str]) -> str:
    def one(match: re.Match) -> str:
        name, call = match[1], match[2]
        if name not in names or (name.endswith("_loss") and not call and "." not in name):  # a key of a dictionary
            return match[0]
        return f'<autoref identifier="{names[name]}" optional>{match[0]}</autoref>'

    return in_open_text(content, CODE, one)


def titled(content: str, page: str, docs: Path) -> str:
    def one(match: re.Match) -> str:
        file = docs / posixpath.normpath(posixpath.join(posixpath.dirname(page), f"{match[2]}.md"))
        title = re.search(r"^# (.+)$", file.read_text(encoding="utf-8"), re.M) if file.exists() else None
        return f"{match[1]}{title[1]}</a>" if title else match[0]

    return FILE.sub(one, content)


def on_page_content(content, page, config, **_):
    docs = Path(config.docs_dir)
    content = leading_to_files(content, docs.parent, config.repo_url)
    return titled(linked(content, identifiers(docs / "api")), page.file.src_uri, docs)
