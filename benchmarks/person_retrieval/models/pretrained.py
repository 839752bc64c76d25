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

__all__ = ["COMMITTED", "Pretrained", "load_two_stream", "shape_of", "tokenizer_of"]

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


def shape_of(content: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of TwoStream."""
    return {"width": content["width"], "heads": content["heads"], "context_length": CONTEXT}


def load_two_stream(weights: str | Path | None, *, image_size: tuple[int, int]) -> Pretrained:
    """From a file of `pretrain`; the committed one where `weights` is None, random weights where it is "none".

    Raises:
        RunError: no such file, or another kind of file.
    """
    file = COMMITTED if weights in (None, "none") else Path(weights)  # type: ignore[arg-type]
    try:
        data = file.read_bytes()
        content = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
        tokenizer = tokenizer_of(content["vocabulary"])
        shape = {**shape_of(content), "image_size": image_size}
        model = TwoStream(tokenizer.vocab_size, **shape)
        model.load_state_dict(
            {name: value.float() if value.is_floating_point() else value for name, value in content["model"].items()}
        )
    except Exception as error:
        raise RunError(
            f"--weights of rendered pedestrians must be a file that `pretrain` wrote, or `none`; {file}: {error}"
        ) from error
    sha256 = hashlib.sha256(data).hexdigest()

    def build(seed: int) -> TwoStream:
        if weights != "none":
            built = TwoStream(tokenizer.vocab_size, **shape)
            built.load_state_dict(model.state_dict())
            return built
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return TwoStream(tokenizer.vocab_size, **shape)

    random = weights == "none"
    about = {
        "weights": "random" if random else ("committed" if weights is None else str(weights)),
        "weights_sha256": None if random else sha256,
    }
    rows, columns = model.grid
    return Pretrained(build, tokenizer, model.embed_dim, content["heads"], rows * columns, about)
