"""Compiles every kernel of the prepared run on a GPU here, without one, and keeps them for the machine that has it.

    python -m benchmarks prebuild --out DIR [--wheel triton-3.6.0-cp312-...whl] [--only asdm] [--workers 2]

Fills DIR, a folder in the form of Triton's cache, through the stand-in of `benchmarks/stand_in`; `DIR/prebuilt.json`
says what it is for. The machine with the GPU asks `usable(DIR)`, and `install(DIR, cache)` puts the kernels where
TRITON_CACHE_DIR points: Triton's files name each other by absolute paths, so that a plain copy would never be found.

Triton's key of a kernel holds, besides the kernel with its specialisation and options:

    triton_key      hashes of triton's own files, libtriton among them, which is another file for every version of
                    Python. With --wheel the key is that of the wheel; all other files must agree with those here.
    ptxas           its version; it comes with triton
    the chip        sm_90: a CUDA driver says so from the capability (9, 0), the stand-in because it was asked to
    environment     TRITON_... and other variables that change the code; `usable` compares them
    source          text of the kernel and of what it calls, its first line's number and its module's name; no path

The kernels are those of `CASES`: the same launchers, at sizes that specialise as the real ones do.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from fmfa_losses.functional import asdm_loss, efa_loss, hard_similarity

from . import ROOT, stand_in

CHIP = "sm_90"
ABOUT = "prebuilt.json"
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


class Case(NamedTuple):
    """One operation of the prepared run, forward and backward."""

    name: str
    kind: str  # of KINDS
    run: Callable[[torch.dtype], Any]


def cases() -> Iterator[Case]:
    """Everything that the prepared run launches. Batches are the real ones, or smaller ones that specialise alike."""
    for kind in KINDS:
        for B in (64, 128):
            for masked in (False, True):
                yield Case(f"efa {B}" + " masked" * masked, kind, lambda dtype, B=B, m=masked: efa(dtype, B, masked=m))
        yield Case("efa ViT-L/14", kind, lambda dtype: efa(dtype, 16, N=432, D=768))
        for P, Q, D in ((32, 1024, 128), (32, 192, 128), (77, 192, 512)):
            yield Case(f"maxsim {P} {Q} {D}", kind, lambda dtype, sizes=(P, Q, D): maxsim(dtype, *sizes))
        # Tiles, then blocks of rows: 4096 stands for 16384 and 65536.
        for B in (64, 256, 1024, 2048, 4096):
            yield Case(f"asdm {B}", kind, lambda dtype, B=B: asdm(dtype, B))


def selected(only: str) -> Iterator[Case]:
    return (case for case in cases() if only in f"{case.name} {case.kind}")


def efa(dtype: torch.dtype, B: int, N: int = 192, D: int = 512, masked: bool = False) -> None:
    image, text = leaf(dtype, B, N, D), leaf(dtype, B, 77, D)
    mask = torch.arange(77) < 25 + torch.arange(B)[:, None] % 52 if masked else None
    torch.autograd.grad(efa_loss(image, text, text_mask=mask, backend="triton"), (image, text))


def maxsim(dtype: torch.dtype, P: int, Q: int, D: int, B: int = 64) -> None:
    text, image = leaf(dtype, B, P, D), leaf(dtype, B, Q, D)
    sim = hard_similarity(text, image, pool="sum", backend="triton")
    torch.autograd.grad(sim, (text, image), torch.ones_like(sim))
    with torch.no_grad():
        hard_similarity(text, image, pool="sum", backend="triton")


def asdm(dtype: torch.dtype, B: int, D: int = 512) -> None:
    image, text = leaf(dtype, B, D), leaf(dtype, B, D)
    torch.autograd.grad(asdm_loss(image, text, torch.arange(B) // 2, backend="triton"), (image, text))


def leaf(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_()


def fill(kind: str, only: str, cache: Path, key: str) -> tuple[list[str], list[str]]:
    """Kernels of one kind that were compiled into the cache, and those that were there; in a process of its own."""
    import triton.runtime.cache
    from triton import knobs

    compiled: list[str] = []
    found: list[str] = []

    def note(src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        (found if cache_hit else compiled).append(f"{src.name} {metadata['hash']}")

    for name in environment():
        os.environ.pop(name)
    os.environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    knobs.compilation.listener = note
    with mock.patch.object(triton.runtime.cache, "triton_key", lambda: key), stand_in.gpu(compile=True, chip=CHIP):
        for case in selected(only):
            if case.kind == kind:
                case.run(KINDS[kind])
    return compiled, found


# The key


def environment() -> dict[str, str]:
    """The variables that are set and enter a kernel's key."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return dict(get_cache_invalidating_env_vars())


def own_key() -> str:
    from triton.runtime.cache import triton_key

    return str(triton_key())


def wheel_key(wheel: Path) -> str:
    """triton_key of a wheel, which differs from the triton here in its shared libraries alone."""
    import triton

    folder = Path(triton.__file__).parent
    libraries = {}
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = entry.filename
            if not name.startswith("triton/") or entry.is_dir():
                continue
            theirs = digest(archive.open(entry))
            ours = digest((folder.parent / name).open("rb")) if (folder.parent / name).exists() else None
            if name == "triton/_C/libtriton.so":
                libraries[ours] = theirs
            elif theirs != ours and not name.endswith(".so"):
                raise ValueError(f"{wheel.name} is not the triton {triton.__version__} here: {name} differs")
    (ours, theirs), key = *libraries.items(), own_key()
    if key.count(ours) != 1:
        raise ValueError(f"triton {triton.__version__} does not make its key of libtriton's hash")
    return key.replace(ours, theirs)


def digest(file: Any) -> str:
    with file:
        value = hashlib.sha256()
        while block := file.read(2**20):
            value.update(block)
    return value.hexdigest()


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def ptxas() -> str:
    """Version of the assembler, as it enters the key."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    return str(get_ptxas_version(int(CHIP[3:]))).splitlines()[-1]


def sources() -> str:
    """One hash of the kernels' source."""
    return sha256("".join(digest(path.open("rb")) for path in sorted((ROOT / "kernels").glob("*.py"))))


# The folder


def usable(folder: Path) -> str | None:
    """Why the kernels prebuilt in a folder are of no use to this process, or None when they are."""
    import triton

    try:
        about = json.loads((Path(folder) / ABOUT).read_text())
    except (OSError, ValueError) as error:
        return f"{folder} holds no prebuilt kernels: {error}"
    here = {"triton": triton.__version__, "triton_key": sha256(own_key()), "ptxas": ptxas(), "sources": sources(),
            "environment": environment()}  # fmt: skip
    for what, value in here.items():
        if about.get(what) != value:
            return f"prebuilt for another {what}: {about.get(what)!r}, here {value!r}"
    return None


def install(folder: Path, cache: Path) -> None:
    """Copies prebuilt kernels into a folder for TRITON_CACHE_DIR."""
    shutil.copytree(folder, cache, dirs_exist_ok=True, ignore=shutil.ignore_patterns(ABOUT))
    settle(cache)


def settle(cache: Path) -> None:
    """Triton finds the files of every kernel where they are now."""
    for group in Path(cache).absolute().glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        paths = {name: str(group.parent / name) for name in names if (group.parent / name).exists()}
        group.write_text(json.dumps({"child_paths": paths}))


def tidy(cache: Path) -> None:
    """Leaves what a cache hit needs: Triton keeps intermediate code of a kernel, too."""
    for path in cache.glob("*/*.source"):
        path.unlink()
    settle(cache)


def main(argv: list[str] | None = None) -> int:
    import triton

    parser = argparse.ArgumentParser(prog="python -m benchmarks prebuild", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--wheel", type=Path, help="of the triton there, for another Python than this one")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases that hold them: 'asdm 64 bf16'")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(argv)
    start = time.perf_counter()
    key = wheel_key(options.wheel) if options.wheel else own_key()
    cache = options.out.absolute()
    cache.mkdir(parents=True, exist_ok=True)
    settle(cache)  # what an earlier run left, perhaps elsewhere
    compiled: set[str] = set()
    found: set[str] = set()
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        kinds = dict.fromkeys(case.kind for case in selected(options.only))
        jobs = {kind: pool.submit(fill, kind, options.only, cache, key) for kind in kinds}
        for kind, job in jobs.items():
            new, old = map(set, job.result())
            print(f"{kind}: {len(new)} kernels compiled, {len(old - new)} found", flush=True)
            compiled, found = compiled | new, found | old
    tidy(cache)
    kernels = len(list(cache.glob("*/*.cubin")))
    size = sum(path.stat().st_size for path in cache.glob("*/*"))
    about = {"triton": triton.__version__, "triton_key": sha256(key), "ptxas": ptxas(), "sources": sources(),
             "environment": {}, "chip": CHIP, "kernels": kernels, "bytes": size}  # fmt: skip
    (cache / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    print(f"{len(compiled)} kernels compiled, {len(found - compiled)} found, in {time.perf_counter() - start:.0f} s")
    print(f"{options.out}: {kernels} kernels, {size / 1e6:.1f} MB, triton {triton.__version__}, "
          f"sha256 of triton_key {about['triton_key']}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
