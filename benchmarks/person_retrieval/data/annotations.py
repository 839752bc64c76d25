"""An annotation file, read and checked as a whole.

It is a JSON list with an object for every image:

    {"split": "train", "id": 7, "file_path": "cam/0007_1.jpg", "captions": ["a man in a red coat", ...]}

Other fields are ignored. What every file must keep:

- `split` is "train", "val" or "test"; `id` is an integer from 0; the path is relative and stays below imgs/.
- `captions` is a list of strings. An empty one, or one of white space alone, is left out and counted; an image must
  keep at least one.
- A path is in one split.

Of ICFG-PEDES 34,673 training images are reported in 34,674 entries, and one identity more than the 4,101 of MSMT17,
which its images are from. So a path may be listed again: it is one image for each identity that it is listed with. And
a number may be in several splits, whose people may have been numbered apart. What of this occurs is counted, see
`folders.py`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .errors import DataError, listed

__all__ = ["SPLITS", "Entry", "read_annotations"]

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Entry:
    """An image: its split, its path below imgs/, who it shows, its captions without empty ones, how many were empty."""

    split: str
    path: str
    pid: int
    captions: tuple[str, ...]
    empty: int

    @property
    def image(self) -> tuple[str, int]:
        """What tells images apart."""
        return self.path, self.pid


def read_annotations(file: Path, path_key: str) -> list[Entry]:
    """Every entry of `file`, whose image paths are in the field `path_key`.

    Raises:
        DataError: the file is no JSON list, or entries break a rule; the message has the number of every entry.
    """
    raw = _load(file)
    problems = [f"entry {number}: {problem}" for number, one in enumerate(raw) if (problem := _problem(one, path_key))]
    entries: list[Entry] = []
    if not problems:
        entries = [_entry(one, path_key) for one in raw]
        problems = [f"entry {number}: {problem}" for number, problem in _contradictions(entries)]
    if problems:
        raise DataError(f"{len(problems)} problems in {file}, entries are counted from 0:{listed(problems)}")
    return entries


def _load(file: Path) -> list[Any]:
    try:
        text = file.read_bytes().decode("utf-8-sig")  # a byte order mark may lead
        raw = json.loads(text)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} must be UTF-8, got {error.reason} at byte {error.start}; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} must be JSON, got: {error}") from error
    if not isinstance(raw, list) or not raw:
        got = "an empty list" if raw == [] else f"{_shown(raw)}"
        raise DataError(f"{file} must be a list of entries, got {got}")
    return raw


def _problem(one: Any, path_key: str) -> str | None:
    """What is wrong with an entry by itself."""
    if not isinstance(one, dict):
        return f"must be an object, got {_shown(one)}"
    if missing := sorted({"split", "captions", "id", path_key} - one.keys()):
        return f"must have the fields {', '.join(missing)}, got only {', '.join(one) or 'none'}"
    split, pid, path, captions = one["split"], one["id"], one[path_key], one["captions"]
    if split not in SPLITS:
        return f"split must be one of {', '.join(SPLITS)}, got {_shown(split)}"
    if type(pid) is not int or not 0 <= pid < 2**63:  # bool is a subclass of int
        return f"id must be an integer from 0, got {_shown(pid)}"
    if not isinstance(path, str) or not PurePosixPath(path).parts:
        return f"{path_key} must name a file below imgs/, got {_shown(path)}"
    both = PureWindowsPath(path)  # takes / and \ for separators
    if both.anchor or ".." in both.parts:
        return f"{path_key} must be relative and stay below imgs/, got {_shown(path)}"
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        return f"captions must be a list of strings, got {_shown(captions)}"
    if half := [text for text in (path, *captions) if not _encodable(text)]:
        return f"{path_key} and captions must be Unicode text, got half a surrogate pair in {_shown(half[0])}"
    return None


def _entry(one: dict[str, Any], path_key: str) -> Entry:
    captions = tuple(text for text in one["captions"] if text.strip())
    path = PurePosixPath(one[path_key]).as_posix()  # a//b and ./a/b are a/b
    return Entry(one["split"], path, one["id"], captions, len(one["captions"]) - len(captions))


def _contradictions(entries: list[Entry]) -> Iterator[tuple[int, str]]:
    """What is wrong between entries, with the number of the later one."""
    paths: dict[str, int] = {}
    described = {entry.image for entry in entries if entry.captions}
    for number, entry in enumerate(entries):
        first = paths.setdefault(entry.path, number)
        if entry.image not in described:
            yield number, f"an image must have a caption that is not empty, {entry.path} has none"
        if (other := entries[first].split) != entry.split:
            yield (
                number,
                f"an image must be in one split, {entry.path} is in {entry.split} and, in entry {first}, in {other}",
            )


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    """As JSON, cut to a line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
