"""`python -m benchmarks COMMAND`: time and memory on the CPU and on a GPU, training runs, and the report of all."""

import importlib
import sys

COMMANDS = {
    "micro": ("benchmarks.micro", "every operation against its reference on the CPU"),
    "busy": ("benchmarks.busy", "EFA while another process works"),
    "large-batch": ("benchmarks.large_batch", "every loss on 16384 pairs: seconds, memory, exactness of its blocks"),
    "retrieval-metrics": ("benchmarks.retrieval_metrics", "retrieval metrics against sorting whole galleries"),
    "gradient-norms": ("benchmarks.gradient_norms", "gradient norms of SDM and A-SDM from random weights"),
    "distributed": ("benchmarks.distributed", "the global batch over processes: bytes, seconds, memory"),
    "person-retrieval": (
        "benchmarks.person_retrieval.__main__",
        "the paper's experiments, a command each",
    ),
    "torchrun": ("benchmarks.person_retrieval.torchrun", "that training in one process and in two, compared"),
    "gpu": ("benchmarks.gpu.run", "the kernels on a CUDA device: right, then how fast"),
    "tune": ("benchmarks.gpu.tune", "candidates for the block tables: compiled anywhere, timed on a CUDA device"),
    "prebuild": ("benchmarks.gpu.prebuild", "the kernels of a GPU run, compiled for that machine without its GPU"),
    "compile-check": ("benchmarks.compile_check", "every kernel compiled for every architecture, without a GPU"),
    "products": ("benchmarks.products", "products that a step executes, against those that it needs, without a GPU"),
    "launches": ("benchmarks.launches", "what a step launches, compiles, moves and allocates, without a GPU"),
    "host": ("benchmarks.host", "host time of a training step, on a GPU that launches nothing"),
    "step-picture": ("benchmarks.step_picture", "one EFA step as a picture: launches and bytes, without a GPU"),
    "pictures": ("benchmarks.pictures", "the pictures of the documentation"),
    "report": ("benchmarks.report", "docs/benchmarks.md from benchmarks/results/*.json"),
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        print(__doc__, *(f"    {name:18} {what}" for name, (_, what) in COMMANDS.items()), sep="\n")
        print("\n    COMMAND --help says more")
        return 0 if argv[:1] in ([], ["--help"], ["-h"]) else 2
    return int(importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
