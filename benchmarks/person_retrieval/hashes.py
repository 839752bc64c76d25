"""The SHA-256 of a file, by which results name the weights that they are of."""

import hashlib
from pathlib import Path

__all__ = ["sha256"]


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
