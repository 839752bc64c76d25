"""docs/benchmarks.md and its plots from benchmarks/results/*.json.

python -m benchmarks report [--results DIR] [--out FILE]
"""

import argparse
import re
from pathlib import Path
from typing import Any

from . import ROOT
from .busy import busy_tables
from .gpu import plots
from .gpu.about import LEGEND
from .gpu.tables import gpu_report
from .results import described, load_all
from .tables import micro_tables, target_table
from .targets import micro_targets

HEAD = """# Benchmarks

Written by `python -m benchmarks report` from the files in `benchmarks/results/`; do not edit it by hand.

- Times are medians with the 20th and 80th percentile in brackets, after a warm-up. The forward keeps what its backward
  needs, as in training. The speed-up is that of forward and backward together, against the first provider of a case;
  below 1x is a loss. Of a forward alone it is that of the forward.
- **released formulation**: the paper's equations in the way the code released with the paper computes them, a batched
  product over operands expanded to [B, B, tokens, D]. **reference**: the library's own specification, one product for
  all pairs, everything in memory, gradients by autograd (for A-SDM, ID and IRR: whole matrices, whole vocabulary).
- Providers of one case must agree in value and gradient norm; one that does not gets no time.
- What the runs on a GPU found wrong and what is open: [The EFA kernels](kernels.md#what-is-open). How to run them:
  [On a GPU](kernels.md#on-a-gpu).
"""

CPU = """- Every measurement has a process of its own. A step of more than 10 s is measured once. *process* is its whole
  peak of resident memory, Python and torch included; *above inputs* what came on top of inputs and libraries, gradients
  included. That of torch.compile has the compiler in it.
- *of torch.mm*: the time in which a large float32 torch.mm of the same run would do the operations that the case needs,
  over the measured time; forward / both passes. A case needs its kept tokens, and in a backward the winners: whoever
  multiplies more than that has a smaller share.
- *forward alone* keeps nothing for a backward. maxsim-cpu and maxsim-fast have none. They get unit tokens, normalised
  before the clock runs, and captions without padding; the others normalise while it runs, and get a text mask.
- *without the mask*: the released code takes none. It computes more there, and its values are not compared."""

BUSY = """Forward and backward together: one thread alone, all threads alone, and all threads beside a process that
counts without end. Nobody is bound to a core."""

NOT_MEASURED = """## On a GPU

Not measured: no result of `python -m benchmarks gpu` on a CUDA device is in `benchmarks/results/`. No claim is made
about the speed or memory of the kernels there."""

# Kind of a result -> the page of docs/ that shows its figures, and what they are.
PAGES = {
    "ablation": ("experiments.md", "Table 6 on rendered pedestrians"),
    "sweep_alpha": ("experiments.md", "A-SDM's alpha on rendered pedestrians"),
    "sweep_start": ("experiments.md", "A-SDM from weaker and from stronger weights"),
    "cross": ("experiments.md", "Trained on one world, tested on the other"),
    "training": ("experiments.md", "The embedded run"),
    "torchrun": ("distributed.md", "Training in one process and in two"),
    "distributed": ("distributed.md", "The global batch over processes"),
    "large-batch": ("losses.md", "Every loss on a large batch"),
    "retrieval-metrics": ("retrieval.md", "Retrieval metrics"),
    "gradient-norms": ("recipes/irra.md", "Gradient norms of A-SDM from random weights"),
    "small-batch": ("kernels.md", "A-SDM in tiles and in blocks"),
    "compiled": ("kernels.md", "What the compiler gives for every kernel"),
    "host": ("kernels.md", "Host time of a step"),
    "step": ("kernels.md", "One training step: kernels, launches, bytes"),
    "gpu-earlier": ("kernels.md", "Earlier runs on a GPU, of other kernels"),
    "tuned": ("kernels.md", "Entries of the block tables"),
}


def describe(name: str, result: dict[str, Any]) -> str:
    """Where the figures come from."""
    return described(result, f"[`benchmarks/results/{name}`](../benchmarks/results/{name}), ")


def cpu_section(name: str, result: dict[str, Any]) -> str:
    parts = [f"## On the CPU: {result['machine']['cpu']}", CPU, describe(name, result)]
    rate = result.get("mm_gflops")
    parts += [f"torch.mm, 2048 x 2048 x 2048: {rate:.0f} GFLOP a second."] if rate else []
    tables = micro_tables(result["records"], rate)
    return "\n\n".join([*parts, tables, target_table(micro_targets(result["records"]))])


def busy_section(name: str, result: dict[str, Any]) -> str:
    parts = [f"## Beside other work: {result['machine']['cpu']}", BUSY, describe(name, result)]
    return "\n\n".join([*parts, busy_tables(result["records"])])


def gpu_section(name: str, result: dict[str, Any], folder: Path, legend: str = LEGEND) -> str:
    """Also draws the plots, into a folder beside the report."""
    images = plots.draw_gpu(result, folder, Path(name).stem)
    parts = [
        f"## On a GPU: {result['machine'].get('gpu', 'none')}, commit {result['commit']}",
        legend,
        describe(name, result),
        *(f"![{image.stem}]({folder.name}/{image.name})" for image in images),
        gpu_report(result),
    ]
    return "\n\n".join(parts)


def other_section(name: str, result: dict[str, Any], many: bool) -> str:
    """Where the figures of another page come from; the file is in the heading where the kind has several."""
    page, what = PAGES[result["kind"]]
    return f"### [{what}]({page}){f': {name}' if many else ''}\n\n{describe(name, result)}"


def contents(parts: list[str]) -> str:
    """Links to the sections; on a phone the page shows no other table of contents."""
    titles = [part.splitlines()[0].removeprefix("## ") for part in parts if part.startswith("## ")]
    links = [f"[{title}](#{re.sub(r'[^a-z0-9_ -]', '', title.lower()).replace(' ', '-')})" for title in titles]
    return "On this page: " + " · ".join(links) + "."


def render(results: dict[str, dict[str, Any]], folder: Path) -> str:
    """The report as Markdown; `folder` is where the plots go."""
    kinds: dict[str, dict[str, dict[str, Any]]] = {}
    for name, result in results.items():
        kinds.setdefault(result["kind"], {})[name] = result
    micro, busy, gpu = (kinds.pop(kind, {}) for kind in ("micro", "busy", "gpu"))
    parts = [HEAD.strip()]
    parts += [cpu_section(name, result) for name, result in micro.items()]
    parts += [busy_section(name, result) for name, result in busy.items()]
    legends = [LEGEND] + ["What the columns say is above."] * (len(gpu) - 1)
    parts += [gpu_section(*run, folder, legend) for run, legend in zip(gpu.items(), legends, strict=False)]
    parts += [] if gpu else [NOT_MEASURED]
    others = [other_section(name, result, len(kind) > 1) for kind in kinds.values() for name, result in kind.items()]
    if others:
        parts += ["## Other results", *others]
    return "\n\n".join([parts[0], contents(parts[1:]), *parts[1:]]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks.md", metavar="FILE")
    options = parser.parse_args(argv)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(render(load_all(options.results), options.out.parent / options.out.stem))
    print(f"written to {options.out}")
    return 0
