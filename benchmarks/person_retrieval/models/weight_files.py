"""The tensors of a weights file by name, read from the disk only when they are asked for, and no code run.

Kinds of file, told apart by what they hold: safetensors, a TorchScript archive, and what `torch.save` writes.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .stored import Stored, leaves
from .torchscript import is_torchscript, read_torchscript

__all__ = ["EXPECTED", "Contents", "read_weights"]

EXPECTED = (
    "a TorchScript archive or a state dict with OpenAI's or open_clip's names (ViT-B-16.pt), a checkpoint of IRRA, "
    "RDE, NAM, HAM, GA-DMS or FMFA, or the folder or the file of a CLIPModel of Hugging Face (safetensors or bin)"
)
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Contents(NamedTuple):
    container: str  # what kind of file it is, in words
    tensors: dict[str, Stored]  # by dotted name; nested dictionaries are joined with dots


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
        if _is_torchscript(file):
            return Contents("TorchScript archive", read_torchscript(file))
        return Contents("state dict", _torch_load(file, mmap=True))
    if head.startswith(b"PK"):
        raise ValueError(f"{file} is cut short: it begins as a zip archive and has no end; copy or download it again")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return Contents("safetensors", _safetensors(file))
    if head.startswith(b"\x80"):
        return Contents("state dict", _torch_load(file, mmap=False))
    raise ValueError(f"{file} holds no weights, it begins with {head!r}; expected {EXPECTED}")


def _is_torchscript(file: Path) -> bool:
    """Of a zip archive, whose checksums are looked at where torch does not: when it reads a state dict."""
    try:
        if is_torchscript(file):
            return True
        with zipfile.ZipFile(file) as archive:
            # As torch writes, so that nothing unfolds to more than the file's size.
            packed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
            wrong = None if packed else archive.testzip()
    except Exception as error:  # a damaged directory of members leads to whatever its bytes say
        raise ValueError(f"{file} is a damaged zip archive ({error}); copy or download it again") from error
    if packed:
        raise ValueError(f"{file} must hold its members uncompressed, as torch.save writes, {packed[0]} is compressed")
    if wrong is not None:
        raise ValueError(f"{file} is damaged, the checksum of {wrong} is wrong; copy or download it again")
    return False


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
    try:
        tensors = [(name, x.detach()) for name, x in leaves(content, _inside) if isinstance(x, Tensor)]
        if huge := [name for name, x in tensors if _is_plain(x) and x.nbytes > x.untyped_storage().nbytes()]:
            raise ValueError(f"{huge[0]} must have its numbers stored one by one, it repeats some")
    except ValueError as error:
        raise ValueError(f"{file}: {error}; expected {EXPECTED}") from error
    return {name: Stored(tuple(x.shape), _dtype(x), lambda x=x: x) for name, x in tensors}


def _inside(content: Any) -> Mapping[Any, Any] | None:
    return content if isinstance(content, Mapping) else None


def _dtype(tensor: Tensor) -> str:
    """Of what is stored; a name of no dtype for what is not stored number by number."""
    if _is_plain(tensor):
        return str(tensor.dtype).removeprefix("torch.")
    return "none" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


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
