"""`python -m fmfa_losses doctor [PATH]`."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fmfa_losses", description="fmfa-losses on the command line")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="what runs here, whether it is right, and which lines of a codebase the library replaces",
        description="Reports versions, devices and backends, tests the operators in about 2 seconds, and lists the "
        "lines of a codebase that call objectives this library replaces. Never edits. Exits with 1 only when the "
        "self-test fails.",
    )
    doctor.add_argument("path", nargs="?", type=Path, metavar="PATH", help="a Python file, or a folder to look through")
    path = parser.parse_args(argv).path
    if path is not None and not path.exists():
        parser.error(f"PATH must exist, got {path}")

    from .doctor import diagnose

    return diagnose(path)


if __name__ == "__main__":
    sys.exit(main())
