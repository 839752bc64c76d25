"""CLIP's byte-pair tokenizer, from OpenAI's file of merges or from a folder of Hugging Face.

Ids are those of IRRA and its successors, who needed a mask and left the size of the vocabulary as it was: the last
merge is left out, and its id, third from the end, is the mask's. Of OpenAI's 49408 entries it is 49405.
"""

import gzip
import html
import importlib.util
import json
import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

__all__ = ["OPENAI_FILE", "CLIPWords", "find_clip_words", "read_clip_words"]

OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
PUBLISHED_MERGES = 49152 - 256 - 2  # of the 262144 in OpenAI's file CLIP uses the first
START, END = "<|startoftext|>", "<|endoftext|>"
MASKS = ("<|mask|>", "[mask]")
WORD = regex.compile(r"'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
# What ftfy, which IRRA calls, does to punctuation of word processors.
STRAIGHT = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
)


def _byte_letters() -> list[str]:
    """The letter for each byte: itself where it is visible in Latin-1, else one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in visible}
    hidden = (byte for byte in range(256) if byte not in letters)
    letters |= {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


LETTERS = _byte_letters()
BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}


class CLIPWords:
    """Captions to ids as TIPR codebases have them: 77 tokens, padding 0, [mask] third from the end.

    Args:
        vocabulary: piece -> id, 0 to V - 1; every byte alone, within a word and at its end ("a", "a</w>"), what merges
            make, and as the last two the start and the end of a text.
        merges: pairs of pieces, the first to be merged first.
        source: where they are from, in words.

    Raises:
        ValueError: the vocabulary is not as described.
    """

    pad_id = 0

    def __init__(
        self, vocabulary: dict[str, int], merges: Iterable[tuple[str, str]], *, source: str, context_length: int = 77
    ) -> None:
        self.context_length, self.source = context_length, source
        self.vocab_size = len(vocabulary)
        self.mask_id, self.sot_id, self.eot_id = (self.vocab_size - offset for offset in (3, 2, 1))
        self.names = {index: piece for piece, index in vocabulary.items()}
        if sorted(self.names) != list(range(self.vocab_size)):
            raise ValueError(f"{source}: ids must be 0 to {self.vocab_size - 1}, each once")
        if (vocabulary.get(START), vocabulary.get(END)) != (self.sot_id, self.eot_id):
            raise ValueError(f"{source}: {START} and {END} must be the last two of {self.vocab_size} entries")
        last = self.names[self.mask_id]
        self.ids = {piece: index for piece, index in vocabulary.items() if index < self.mask_id}
        pairs = [pair for pair in merges if last in MASKS or "".join(pair) != last]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        needed = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *map("".join, self.ranks)]
        if lacking := [piece for piece in needed if piece not in self.ids]:
            raise ValueError(f"{source}: {len(lacking)} bytes or merges have no id, the first is {lacking[0]!r}")
        self.known: dict[str, list[int]] = {}  # the ids of words already seen

    @property
    def special_ids(self) -> tuple[int, int, int]:
        return self.pad_id, self.sot_id, self.eot_id

    def __call__(self, captions: Iterable[str]) -> Tensor:
        """[B, context_length] int64; what is too long loses its end, never its EOT."""
        rows = []
        for text in captions:
            ids = self.encode(text)[: self.context_length - 2]
            rows.append([self.sot_id, *ids, self.eot_id] + [self.pad_id] * (self.context_length - 2 - len(ids)))
        return torch.tensor(rows, dtype=torch.long)

    def encode(self, text: str) -> list[int]:
        """All ids of a caption, without start and end: in lower case, HTML's entities replaced, quotes straight."""
        text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)).translate(STRAIGHT)).lower()
        return [index for word in WORD.findall(text) for index in self._ids(word)]

    def words(self, token_ids: Tensor) -> list[str]:
        """The pieces of one caption [L], between SOT and EOT."""
        ids = token_ids.tolist()
        return [self._text(index) for index in ids[1 : ids.index(self.eot_id)]]

    def _ids(self, word: str) -> list[int]:
        if word not in self.known:
            *pieces, last = (LETTERS[byte] for byte in word.encode())
            self.known[word] = [self.ids[piece] for piece in self._merge([*pieces, f"{last}</w>"])]
        return self.known[word]

    def _merge(self, pieces: list[str]) -> list[str]:
        """The pair of the lowest rank becomes one piece, wherever it is, until no pair has a rank."""
        while pairs := [pair for pair in pairwise(pieces) if pair in self.ranks]:
            pair = min(pairs, key=self.ranks.__getitem__)
            merged, index = [], 0
            while index < len(pieces):
                is_pair = tuple(pieces[index : index + 2]) == pair
                merged.append("".join(pair) if is_pair else pieces[index])
                index += 2 if is_pair else 1
            pieces = merged
        return pieces

    def _text(self, index: int) -> str:
        if index >= self.mask_id:
            return "[mask]" if index == self.mask_id else self.names[index]
        piece = self.names[index].removesuffix("</w>")
        return bytes(BYTES[letter] for letter in piece).decode(errors="replace")


def read_clip_words(path: Path) -> CLIPWords:
    """The tokenizer of a folder of Hugging Face, of a folder that holds OpenAI's file, or of that file.

    Raises:
        FileNotFoundError: nothing of the kind is there.
        ValueError: it is damaged.
    """
    if path.is_file():
        return _openai(path)
    if all((path / name).is_file() for name in ("vocab.json", "merges.txt")):
        lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        vocabulary = _json(path / "vocab.json")
        return CLIPWords(vocabulary, _pairs(merges, path / "merges.txt"), source=f"vocab.json and merges.txt in {path}")
    file = path / "tokenizer.json"
    if file.is_file():
        saved = _json(file)
        model, added = (
            saved.get("model", {}),
            {entry["content"]: entry["id"] for entry in saved.get("added_tokens", [])},
        )
        if not {"vocab", "merges"} <= model.keys():
            raise ValueError(f"{file} must be of a byte-pair tokenizer, with vocab and merges under model")
        return CLIPWords(model["vocab"] | added, _pairs(model["merges"], file), source=str(file))
    if (path / OPENAI_FILE).is_file():
        return _openai(path / OPENAI_FILE)
    raise FileNotFoundError(
        f"a tokenizer must be {OPENAI_FILE}, or a folder with that file, with vocab.json and merges.txt, or with "
        f"tokenizer.json; found none at {path}"
    )


def find_clip_words(folder: Path, tokenizer: str | Path | None = None) -> CLIPWords:
    """What `tokenizer` names, or else what is beside the weights in `folder`, in open_clip or in clip.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is damaged.
    """
    if tokenizer is not None:
        return read_clip_words(Path(tokenizer))
    places = [folder]
    for package in ("open_clip", "clip"):
        found = importlib.util.find_spec(package)  # which does not import it
        if found and found.origin:
            places.append(Path(found.origin).parent)
    for place in places:
        try:
            return read_clip_words(place)
        except FileNotFoundError:
            continue
    raise FileNotFoundError(
        f"no tokenizer was found: {folder} has neither vocab.json and merges.txt, nor tokenizer.json, nor "
        f"{OPENAI_FILE}, and neither open_clip nor clip is installed, which have the latter; give the file or its "
        "folder as tokenizer"
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON, got {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(saved).__name__}")
    return saved


def _openai(file: Path) -> CLIPWords:
    try:
        text = gzip.decompress(file.read_bytes()).decode()
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{file} must be {OPENAI_FILE}, merges compressed by gzip: {error}") from error
    lines = [line for line in text.split("\n")[1 : PUBLISHED_MERGES + 1] if line]
    merges = _pairs(lines, file)
    order = [letter for byte, letter in enumerate(LETTERS) if letter == chr(byte)]
    order += [letter for letter in LETTERS if letter not in order]
    pieces = [*order, *(f"{letter}</w>" for letter in order), *map("".join, merges), START, END]
    return CLIPWords({piece: index for index, piece in enumerate(pieces)}, merges, source=str(file))


def _pairs(merges: Iterable[str | list[str]], file: Path) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        pair = tuple(merge.split() if isinstance(merge, str) else merge)
        if len(pair) != 2:
            raise ValueError(f"{file}: a merge must be of two pieces, got {merge!r:.80}")
        pairs.append(pair)
    return pairs
