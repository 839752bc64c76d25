"""Compiles every kernel of the prepared run on a GPU here, without one, and keeps them for the machine that has it.

    python -m benchmarks prebuild --out DIR [--wheel triton-3.6.0-cp312-...whl] [--candidates candidates.json]
                                  [--only 'asdm, B 64'] [--workers 2]

Compiles through the stand-in of `benchmarks/stand_in` and writes two files: `DIR/kernels.tar.xz`, folders of Triton's
cache, and `DIR/prebuilt.json`, what they are for. The machine with the GPU asks `usable(DIR)`; `install(DIR, cache)`
then puts the kernels where TRITON_CACHE_DIR points. A second run compiles only what DIR does not hold.

Triton's key of a kernel holds, besides the kernel with its specialisation and options:

    triton_key      hashes of triton's own files, libtriton among them, which is another file for every version of
                    Python. With --wheel the key is that of the wheel; all other files must agree with those here.
    ptxas           its version; it comes with triton
    the chip        sm_90: a CUDA driver says so from the capability (9, 0), the stand-in because it was asked to
    environment     TRITON_... and other variables that change the code; `usable` compares them
    source          text of the kernel and of what it calls, its first line's number and its module's name; no path

The kernels are those of the jobs of `benchmarks/gpu/plan.py`, both entries of an alternative among them, and with
--candidates the survivors of `benchmarks tune --compile`; not those of tests/gpu, nor the peers'. Batches are smaller
than the real ones: no kernel is specialised on one (docs/launches.md).
"""

import argparse
import base64
import hashlib
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fmfa_losses import FMFALoss
from fmfa_losses.ops.linear_cross_entropy import linear_cross_entropy

from .. import ROOT, stand_in
from ..cases import Case, inputs, leaves
from ..measure import DTYPES, autocast, matmul_precision
from ..providers import TRITON, provider
from . import exact, step_model
from .alternatives import ALTERNATIVES, Alternative, swapped
from .candidates import survivors, tables
from .plan import Job, gpu_jobs
from .step_losses import LOSSES, Encoded

CHIP = "sm_90"
WIDTH, PATCHES = 512, 192  # of ViT-B/16
ABOUT, KERNELS = "prebuilt.json", "kernels.tar.xz"


def jobs(precision: str | None = None, only: str = "") -> list[Job]:
    """Jobs of the prepared run (`benchmarks/gpu/plan.py`) that launch our kernels, equal ones once."""
    found: dict[Any, Job] = {}
    for job in gpu_jobs():
        subject = job.case or job.step
        if subject is None or job.provider != TRITON or only not in f"{subject.name} {job.precision}":
            continue
        kind = job.kind if job.step else job.kind == "exact"
        found[job.case and small(job.case), job.precision, kind, job.alternative] = job
    return [job for job in found.values() if precision in (None, job.precision)]


def small(case: Case) -> Case:
    """The case at a batch that chooses the same blocks; kernels are not specialised on the batch."""
    return replace(case, B=min(case.B, 4096 if case.op == "asdm" else 16))


def run(job: Job, others: Iterable[tuple[Alternative, Any]] = ()) -> None:
    """Forward and backward as the job makes them; an alternative with both entries; `others`: more of them."""
    if job.step is not None:
        (losses_of_a_step if job.kind == "step" else losses_of_large_batches)(DTYPES[job.precision])
        return
    assert job.case is not None
    case, dtype = small(job.case), DTYPES[job.precision]
    if job.kind == "exact":
        problem = exact.build(case, dtype, "cpu")
        targets = [leaf.requires_grad_() for leaf in problem.leaves]
        step = lambda: problem.ours(*targets)  # noqa: E731
    else:
        arguments = inputs(case, dtype=dtype)
        targets = leaves(arguments)
        step = lambda: provider(TRITON, case.op)(**arguments)  # noqa: E731
    rows = [] if job.alternative is None else [(ALTERNATIVES[job.alternative], ALTERNATIVES[job.alternative].other)]
    for change in (nullcontext(), *(swapped(row, entry) for row, entry in (*rows, *others))):
        with change:
            value = step()
            torch.autograd.grad(value, targets, torch.ones_like(value))


def losses_of_a_step(dtype: torch.dtype) -> None:
    """Our losses on what the towers return, laid out alike; blocks of the head have no kernels, one is enough."""
    objective = FMFALoss.for_dataset("CUHK-PEDES", WIDTH, 16, irr={"depth": 1}, backend="triton")
    batch = step_model.batch(step_model.PAPER, 4, "cpu")
    image, text = torch.zeros(4, 1 + PATCHES, WIDTH, dtype=dtype), torch.zeros(8, 77, WIDTH, dtype=dtype)
    parts = image[:, 0], text[:4, 0].clone(), image[:, 1:], *text.chunk(2)
    encoded = Encoded(*(x.detach().requires_grad_() for x in parts))
    # IRR has no argument for it.
    with mock.patch.dict(os.environ, FMFA_LOSSES_BACKEND="triton"), autocast("bf16", "cpu"):
        terms = LOSSES[TRITON](objective, encoded, batch)
    torch.stack(list(terms.values())).sum().backward()


def losses_of_large_batches(dtype: torch.dtype) -> None:
    """What the largest batches need besides: A-SDM that keeps its cosines, gradients of more masked words."""
    pairs = inputs(Case("asdm", 512), dtype=dtype)
    provider(TRITON, "asdm")(**pairs).backward()
    states = torch.zeros(2048, WIDTH, dtype=dtype, requires_grad=True)
    weight, bias = (torch.zeros(*shape, requires_grad=True) for shape in ((49408, WIDTH), (49408,)))
    with autocast("bf16", "cpu"):
        loss, _ = linear_cross_entropy(states, weight, bias, torch.ones(2048, dtype=torch.int64), backend="triton")
    loss.backward()


def candidates(file: Path | None, precision: str) -> list[tuple[Alternative, Any]]:
    """Entries of the block tables that `benchmarks tune --compile` found worth timing."""
    if file is None:
        return []
    rows = [(tables()[row["table"]].entry, tuple(row["candidate"])) for row in survivors(file)]
    return [(entry, candidate) for entry, candidate in rows if entry.precision == precision]


def fill(precision: str, only: str, cache: Path, key: str, file: Path | None) -> tuple[list[str], list[str]]:
    """Compiles the kernels of one precision into a cache; the hashes of what was compiled, and of what was there.

    Runs in a process of its own, whose environment it changes.
    """
    import triton.runtime.cache
    from triton import knobs

    compiled: list[str] = []
    found: list[str] = []

    def note(src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        (found if cache_hit else compiled).append(metadata["hash"])

    for name in environment():
        os.environ.pop(name)
    os.environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    torch.set_num_threads(1)
    matmul_precision(precision)
    knobs.compilation.listener = note
    with mock.patch.object(triton.runtime.cache, "triton_key", lambda: key), stand_in.gpu(compile=True, chip=CHIP):
        for job in jobs(precision, only):
            run(job)
        others = candidates(file, precision)
        if others:
            entry = others[0][0]
            run(Job("c", "kernels", entry.case, precision=precision), others)
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


def usable(folder: Path, key: str | None = None) -> str | None:
    """Why no kernel prebuilt in a folder can be found by a process with this triton_key (its own), or None.

    What else enters a kernel's key is Triton's to compare: a kernel that was edited since is compiled anew, alone.
    """
    try:
        about = json.loads((Path(folder) / ABOUT).read_text())
        packed = digest((Path(folder) / KERNELS).open("rb"))
    except (OSError, ValueError) as error:
        return f"{folder} holds no prebuilt kernels: {error}"
    if about.get("sha256") != packed:
        return f"{folder}/{KERNELS} is not the file that {ABOUT} was written for"
    here = {"triton_key": sha256(key or own_key()), "environment": environment()}
    for what, value in here.items():
        if about.get(what) != value:
            return f"prebuilt for another {what}: {about.get(what)!r}, here {value!r}"
    return None


def contents(folder: Path) -> str:
    """`71 kernels`, and whether their source has changed since."""
    about = json.loads((Path(folder) / ABOUT).read_text())
    changed = (
        "" if about["sources"] == sources() else ", from before kernels/ was last edited: what changed is compiled"
    )
    return f"{about['kernels']} kernels{changed}"


def install(folder: Path, cache: Path) -> None:
    """Puts prebuilt kernels into a folder for TRITON_CACHE_DIR."""
    with tarfile.open(Path(folder) / KERNELS) as archive:
        archive.extractall(cache, filter="data")
    # A kernel's files name each other by absolute paths.
    for group in Path(cache).absolute().glob("*/__grp__*.json"):
        point_to(group, group.parent)


def point_to(group: Path, folder: Path) -> None:
    """The files of a kernel, as far as they exist, are in `folder`."""
    names = [name for name in json.loads(group.read_text())["child_paths"] if (group.parent / name).exists()]
    group.write_text(json.dumps({"child_paths": {name: str(folder / name) for name in names}}))


def pack(cache: Path, used: set[str] | None, folder: Path) -> int:
    """Writes the kernels of a cache, or those `used` (hashes of their keys), and says how many.

    Intermediate code, which a cache hit does not need, is left out. Equal kernels make equal archives.
    """
    names = None if used is None else {base64.b32encode(bytes.fromhex(key)).decode().rstrip("=") for key in used}
    kernels = [path.parent for path in sorted(cache.glob("*/*.cubin")) if names is None or path.parent.name in names]
    with tarfile.open(folder / KERNELS, "w:xz") as archive:
        for kernel in kernels:
            for source in kernel.glob("*.source"):
                source.unlink()
            for group in kernel.glob("__grp__*.json"):
                point_to(group, Path(kernel.name))
            for path in sorted(kernel.iterdir()):
                about = tarfile.TarInfo(f"{kernel.name}/{path.name}")
                about.size = path.stat().st_size
                with path.open("rb") as file:
                    archive.addfile(about, file)
    return len(kernels)


def main(argv: list[str] | None = None) -> int:
    import triton

    parser = argparse.ArgumentParser(prog="python -m benchmarks prebuild", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--wheel", type=Path, help="of the triton there, for another Python than this one")
    parser.add_argument(
        "--candidates", type=Path, metavar="FILE", help="of `benchmarks tune --compile`: survivors, too"
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="jobs whose case and precision hold them")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(argv)
    if not jobs(only=options.only):
        parser.error(f"no job holds {options.only!r}")
    start = time.perf_counter()
    key = wheel_key(options.wheel) if options.wheel else own_key()
    compiled: set[str] = set()
    found: set[str] = set()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        if (options.out / KERNELS).exists():
            install(options.out, Path(cache))
        with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
            kinds = dict.fromkeys(job.precision for job in jobs(only=options.only))
            filled = {
                kind: pool.submit(fill, kind, options.only, Path(cache), key, options.candidates) for kind in kinds
            }
            for kind, result in filled.items():
                new, old = map(set, result.result())
                print(f"{kind}: {len(new)} kernels compiled, {len(old - new)} found", flush=True)
                compiled, found = compiled | new, found | old
        kernels = pack(Path(cache), None if options.only else compiled | found, options.out)
    about = {"triton": triton.__version__, "triton_key": sha256(key), "ptxas": ptxas(), "sources": sources(),
             "environment": {}, "chip": CHIP, "kernels": kernels, "bytes": (options.out / KERNELS).stat().st_size,
             "sha256": digest((options.out / KERNELS).open("rb"))}  # fmt: skip
    (options.out / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    took = time.perf_counter() - start
    print(f"{len(compiled)} kernels compiled, {len(found - compiled)} found, in {took:.0f} s on {os.cpu_count()} cores")
    print(f"{options.out}: {kernels} kernels, {about['bytes'] / 1e6:.2f} MB, triton {triton.__version__}, "
          f"sha256 of triton_key {about['triton_key']}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
