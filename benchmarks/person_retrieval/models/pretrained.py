"""The two-stream model with the weights that are committed, or with those of another pretraining.

`pretrained/two_stream.pt` holds half-precision weights, the vocabulary, and how they were made; `commands/pretrain.py`
makes such files.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError
from .tokenizer import WordTokenizer
from .two_stream import TwoStream

__all__ = ["COMMITTED", "Pretrained", "load_two_stream", "tokenizer_of"]

COMMITTED = Path(__file__).parent / "pretrained" / "two_stream.pt"
CONTEXT = 40  # words of a rendered caption, at most


@dataclass(frozen=True)
class Pretrained:
    """What a run of rendered pedestrians starts from.

    Attributes:
        build: seed -> the model; the seed matters only where weights are random.
        about: weights and their SHA-256, for run.json and metrics.json.
    """

    build: Callable[[int], TwoStream]
    tokenizer: WordTokenizer
    embed_dim: int
    heads: int
    patches: int
    about: dict[str, Any]


def tokenizer_of(vocabulary: list[str]) -> WordTokenizer:
    return WordTokenizer([" ".join(vocabulary)], context_length=CONTEXT)


def _shape(content: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of TwoStream."""
    return {"width": content["width"], "heads": content["heads"], "context_length": CONTEXT}


def load_two_stream(weights: str | Path | None, *, image_size: tuple[int, int]) -> Pretrained:
    """From a file of `pretrain` or of a run; the committed one where `weights` is None, random where it is "none".

    Raises:
        RunError: no such file, or another kind of file.
    """
    file = COMMITTED if weights in (None, "none") else Path(weights)  # type: ignore[arg-type]
    committed = _read(COMMITTED)[0]
    content, sha256 = _read(file)
    shape = {**_shape(committed), "image_size": image_size}
    tokenizer = tokenizer_of(committed["vocabulary"])
    random = weights == "none"

    def build(seed: int) -> TwoStream:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = TwoStream(tokenizer.vocab_size, **shape)
        if not random:
            model.load_state_dict(content["model"])  # half precision becomes single
        return model

    try:
        rows, columns = build(0).grid
    except RuntimeError as error:
        raise RunError(f"--weights of rendered pedestrians must fit their model, got {file}: {error}") from error
    about = {
        "weights": "random" if random else "committed" if weights is None else str(weights),
        "weights_sha256": None if random else sha256,
    }
    return Pretrained(build, tokenizer, shape["width"], shape["heads"], rows * columns, about)


def _read(file: Path) -> tuple[dict[str, Any], str]:
    """What a file holds, and its SHA-256."""
    try:
        data = file.read_bytes()
        content: dict[str, Any] = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
        if "trainee" in content:  # a run's checkpoint: the model and its objective
            found = content.pop("trainee").items()
            content["model"] = {name.removeprefix("model."): x for name, x in found if name.startswith("model.")}
        content["model"].items()
    except Exception as error:  # there are many ways to be another file
        raise RunError(
            f"--weights of rendered pedestrians must be a file of `pretrain`, a run's checkpoint, or none; got {file}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return content, hashlib.sha256(data).hexdigest()
