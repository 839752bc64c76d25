"""The tensors of a weights file by name, read from the disk only when they are asked for, and no code run.

Kinds of file, told apart by what they hold: safetensors, a TorchScript archive, and what `torch.save` writes.
"""

import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .stored import Stored
from .torchscript import is_torchscript, read_torchscript

__all__ = ["EXPECTED", "Contents", "read_weights", "sha256"]

EXPECTED = (
    "a TorchScript archive or a state dict with OpenAI's or open_clip's names (ViT-B-16.pt), a checkpoint of IRRA, "
    "RDE, NAM, HAM, GA-DMS or FMFA, or the folder or the file of a CLIPModel of Hugging Face (safetensors or bin)"
)
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Contents(NamedTuple):
    container: str  # what kind of file it is, in words
    tensors: dict[str, Stored]  # by dotted name; nested dictionaries are joined with dots


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_weights(file: Path) -> Contents:
    """Names and tensors of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, cut short, or of no kind known here; or reading it would run code.
    """
    if not file.is_file():
        raise FileNotFoundError(f"weights must be a file or a folder, there is no {file}")
    with file.open("rb") as stream:
        head = stream.read(16)
    size = file.stat().st_size
    if not size:
        raise ValueError(f"{file} is empty; expected {EXPECTED}")
    if zipfile.is_zipfile(file):
        if is_torchscript(file):
            return Contents("TorchScript archive", read_torchscript(file))
        return Contents("state dict", _torch_load(file, mmap=True))
    if head.startswith(b"PK"):
        raise ValueError(f"{file} is cut short: it begins as a zip archive and has no end; copy or download it again")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return Contents("safetensors", _safetensors(file))
    if head.startswith(b"\x80"):
        return Contents("state dict", _torch_load(file, mmap=False))
    raise ValueError(f"{file} holds no weights, it begins with {head!r}; expected {EXPECTED}")


def _torch_load(file: Path, *, mmap: bool) -> dict[str, Stored]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # of a damaged file torch raises whatever its bytes lead to
        reason = " ".join(str(error).split())
        if asked := re.search(r"GLOBAL ([\w.]+)", reason):
            raise ValueError(
                f"{file} holds more than tensors, it asks for {asked[1]}, and nothing was run; expected {EXPECTED}. "
                "Where you trust the file, save its state dict alone"
            ) from error
        reason = reason.rpartition("WeightsUnpickler error: ")[2][:120] or type(error).__name__
        raise ValueError(f"{file} is cut short or damaged ({reason}); expected {EXPECTED}") from error
    return {
        name: Stored(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda tensor=tensor: tensor)
        for name, tensor in _flat(content)
    }


def _flat(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dictionaries, with dotted names."""
    if isinstance(content, Tensor):
        yield name, content.detach()
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))


def _safetensors(file: Path) -> dict[str, Stored]:
    def read(name: str) -> Tensor:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Stored(
                    tuple(part.get_shape()),
                    SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()),
                    lambda name=name: read(name),
                )
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{file} is a safetensors file cut short or damaged ({error}); expected {EXPECTED}") from error
