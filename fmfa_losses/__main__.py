"""`python -m fmfa_losses doctor [PATH]`."""

import argparse
import os
import sys
from pathlib import Path

from . import __version__


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fmfa_losses", description="fmfa-losses on the command line")
    parser.add_argument("--version", action="version", version=f"fmfa-losses {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="what runs here, whether it is right, and which lines of a codebase the library replaces",
        description="Reports versions, devices and backends, tests sparse_aggregate, hard_similarity and sdm_loss on "
        "small tensors (a GPU compiles its kernels first), and lists the lines of Python files and notebooks that "
        "call objectives this library replaces. Never edits, imports or runs them. Exits with 1 when the self-test "
        "fails, or when FMFA_LOSSES_BACKEND names a backend that runs on no device here.",
        epilog="It imports nothing from the folder in which it is started, as far as Python lets it: start it with "
        "python -I -m fmfa_losses where you do not trust that folder.",
    )
    doctor.add_argument("path", nargs="?", type=Path, metavar="PATH", help="a Python file or notebook, or a folder")
    path = parser.parse_args(argv).path
    if path is not None and not os.path.exists(path):  # Path.exists raises where a folder may not be read
        parser.error(f"PATH must exist, got {path}")

    from .doctor.diagnosis import diagnose

    return diagnose(path)


if __name__ == "__main__":
    sys.exit(main())
