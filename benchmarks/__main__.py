"""`python -m benchmarks COMMAND`: time and memory, on the CPU and on a GPU, and the report of both."""

import importlib
import sys

COMMANDS = {
    "micro": ("benchmarks.micro", "every operation against its reference on the CPU"),
    "gpu": ("benchmarks.gpu", "the kernels on a CUDA device: right, then how fast"),
    "tune": ("benchmarks.tune", "candidates for the block tables: compiled anywhere, timed on a CUDA device"),
    "report": ("benchmarks.report", "docs/benchmarks.md from benchmarks/results/*.json"),
    "launches": ("benchmarks.launches", "what a step launches, compiles, moves and allocates, without a GPU"),
    "compile-check": ("benchmarks.compile_check", "every kernel compiled for every architecture, without a GPU"),
    "prebuild": ("benchmarks.prebuild", "the kernels of a GPU run, compiled for that machine without its GPU"),
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        print(__doc__, *(f"    {name:14} {what}" for name, (_, what) in COMMANDS.items()), sep="\n")
        print("\n    COMMAND --help says more; python -m benchmarks.person_retrieval trains and retrieves")
        return 0 if argv[:1] in ([], ["--help"], ["-h"]) else 2
    return int(importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
