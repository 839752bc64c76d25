"""Parses foreign files in another process, in bounded time and memory.

A file can crash the process that parses it: CPython 3.10 overflows the C stack on 400,000 chained calls. And a parse
cannot be interrupted. So `source/program.py` is started as a program, gets one source after the other, and is started
again when it has crashed or taken too long.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from threading import Event, Timer
from typing import Any

__all__ = ["PROGRAM", "SECONDS", "Parser"]

SECONDS = 20  # to parse one file

# The folder as a package of its own: importing it by its full name would import all of fmfa_losses, torch too.
PROGRAM = """
import sys, types
package = types.ModuleType("source")
package.__path__ = [sys.argv[1]]
sys.modules["source"] = package
from source.program import serve
serve()
"""


class Parser:
    """`source/program.py` as a process, started when it is needed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, source: bytes, *, notebook: bool) -> tuple[dict[str, Any] | None, str | None]:
        """The facts of a source (`source/facts.py`), and why it, or a part of it, could not be read."""
        fresh = self.process is None
        process = self.process = self.process or self._start()
        assert process.stdin is not None and process.stdout is not None
        late = Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = Timer(SECONDS, give_up)
        timer.start()
        answer = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"%s %d\n" % (b"notebook" if notebook else b"module", len(source)) + source)
            process.stdin.flush()
            answer = process.stdout.readline()
        timer.cancel()
        if answer.endswith(b"\n"):
            facts, unread = json.loads(answer)
            return facts, unread
        code = self.end()
        if late.is_set():
            return None, f"not parsed within {SECONDS} s"
        if not fresh:  # the crash may be due to a file before
            return self(source, notebook=notebook)
        return None, f"the parser died of it ({f'signal {-code}' if code < 0 else f'exit status {code}'})"

    def _start(self) -> "subprocess.Popen[bytes]":
        # -I: neither the current folder nor the environment adds a module; -S: nor does an installation.
        command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", PROGRAM, str(Path(__file__).parent / "source")]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, close_fds=True
        )

    def end(self) -> int:
        """Its exit status; negative is a signal."""
        process, self.process = self.process, None
        if process is None:
            return 0
        with process, contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            process.stdin.close()
        return process.returncode
