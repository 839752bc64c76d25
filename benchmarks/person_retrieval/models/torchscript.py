"""A TorchScript archive read for its tensors alone.

Such an archive is a zip of stored members: data.pkl, a pickle of the module tree; data/0, data/1 ..., the storages; and
code/, which `torch.jit.load` compiles and which is not opened here. The pickle is read by an unpickler to which nothing
can be imported: the module classes become plain objects, tensors remember where their numbers are, and any
other global is an error.
"""

import pickle
import zipfile
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .stored import Stored, leaves

__all__ = ["is_torchscript", "read_torchscript"]

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What TorchScript writes for attributes that are no tensors: lists, typed containers, devices. None of it is needed.
ATTRIBUTES = {
    ("torch.jit._pickle", "build_intlist"),
    ("torch.jit._pickle", "build_doublelist"),
    ("torch.jit._pickle", "build_boollist"),
    ("torch.jit._pickle", "build_tensorlist"),
    ("torch.jit._pickle", "restore_type_tag"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
}


class _Storage(NamedTuple):
    member: zipfile.ZipInfo
    dtype: torch.dtype
    numel: int


def is_torchscript(file: Path) -> bool:
    """Whether a zip file is one: `torch.save` writes no constants.pkl."""
    with zipfile.ZipFile(file) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(file: Path) -> dict[str, Stored]:
    """The parameters and buffers of the archive's module by their dotted names.

    Raises:
        ValueError: the archive is damaged, or its pickle asks for anything but modules and tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"one data.pkl is expected, {len(pickles)} found")
            folder = pickles[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in archive.namelist():
                with archive.open(_member(archive, f"{folder}byteorder")) as stream:
                    if stream.read(7) != b"little":
                        raise ValueError("its numbers are not little-endian")
            with archive.open(_member(archive, pickles[0])) as stream:
                root = _Unpickler(stream, file, archive, folder).load()
        return _tensors(root)
    except ValueError as error:
        raise ValueError(f"{file}, a TorchScript archive, was refused: {error}") from error
    except Exception as error:  # whatever a damaged pickle leads to
        raise ValueError(f"{file} is a damaged TorchScript archive: {error}; copy or download it again") from error


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:  # as torch writes; so nothing unfolds to more than the file's size
        raise ValueError(f"{name} must be stored uncompressed")
    return member


class _Unpickler(pickle.Unpickler):
    """Nothing is imported: `find_class` answers from the tables above and with functions of this instance."""

    def __init__(self, stream: Any, file: Path, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(stream)
        self.file, self.archive, self.folder = file, archive, folder

        class Module:  # of this archive alone: a pickle may write attributes into the classes it names
            def __setstate__(self, state: Any) -> None:
                if not isinstance(state, dict):
                    raise ValueError(f"a module must be saved as a dictionary, got {type(state).__name__}")
                self.state = state

        self.module = Module

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return self.module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: self.tensor(storage, offset, shape, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) in ATTRIBUTES:
            return lambda *_: None
        raise ValueError(
            f"its pickle asks for {module}.{name}, which is neither a module nor a tensor; nothing was run"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(numel) is not int:
            raise ValueError(f"a storage is expected, got {pid!r:.80}")
        member = _member(self.archive, f"{self.folder}data/{key}")
        if member.file_size != numel * dtype.itemsize:
            raise ValueError(f"storage {key} must have {numel * dtype.itemsize} bytes, got {member.file_size}")
        return _Storage(member, dtype, numel)

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any) -> Stored:
        numbers = [offset, *shape, *stride]
        if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor must have a storage, and an offset, shape and strides that are not negative")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if prod(shape) > storage.numel or (prod(shape) and last >= storage.numel):
            raise ValueError(f"a tensor of shape {tuple(shape)} reaches beyond its storage of {storage.numel} numbers")

        def read() -> Tensor:
            buffer = bytearray(storage.member.file_size)
            try:
                with zipfile.ZipFile(self.file) as archive, archive.open(storage.member) as stream:
                    stream.readinto(buffer)
            except zipfile.BadZipFile as error:
                raise ValueError(f"the TorchScript archive is damaged ({error}); copy or download it again") from error
            flat = torch.frombuffer(buffer, dtype=storage.dtype) if buffer else torch.empty(0, dtype=storage.dtype)
            return flat.as_strided(tuple(shape), tuple(stride), offset)

        return Stored(tuple(shape), str(storage.dtype).removeprefix("torch."), read)


def _tensors(root: Any) -> dict[str, Stored]:
    """Of a module and the modules in it; modules may be shared, so that their number is not that of the pickle."""

    def inside(node: Any) -> dict[Any, Any] | None:
        state = getattr(node, "state", None)
        return state if isinstance(state, dict) else None

    return {name: node for name, node in leaves(root, inside) if isinstance(node, Stored)}
