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
        "this library replaces, with what to write instead. Never edits, imports or runs them.",
        epilog="Exit codes: 0, all is well; 1, the self-test fails, or FMFA_LOSSES_BACKEND names a backend that runs "
        "on no device here; 2, a wrong argument; 3, with --check alone: there is a line to replace. It imports nothing "
        "from the folder in which it is started, as far as Python lets it: start it with python -I -m fmfa_losses "
        "where you do not trust that folder.",
    )
    doctor.add_argument("path", nargs="?", type=Path, metavar="PATH", help="a Python file or notebook, or a folder")
    doctor.add_argument("--json", action="store_true", help="print one JSON object, described in docs/doctor.md")
    doctor.add_argument("--check", action="store_true", help="exit with 3 when a line of PATH can be replaced, for CI")
    arguments = parser.parse_args(argv)
    path = arguments.path
    if arguments.check and path is None:
        parser.error("--check needs PATH, the codebase to look at")
    if path is not None and not os.path.exists(path):  # Path.exists raises where a folder may not be read
        parser.error(f"PATH must exist, got {path}")

    from .doctor.diagnosis import diagnose

    return diagnose(path, as_json=arguments.json, check=arguments.check)


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `doctor PATH | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        code = 128 + 13  # as of a program that SIGPIPE ends
    sys.exit(code)
