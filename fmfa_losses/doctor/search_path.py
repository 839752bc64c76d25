"""`python -m fmfa_losses` leaves the current folder out of the module search.

`python -m` puts the current folder first, and the codebase in which doctor is started may have a `torch.py`. So this
module is imported before torch. Python itself imports some modules earlier, from that folder too (`runpy.py` in Python
3.10, or a folder `fmfa_losses`); `python -I -m fmfa_losses doctor`, or -P from Python 3.11 on, leaves it out.
"""

import os
import sys

NAMES = {"fmfa_losses", "fmfa_losses.__main__"}


def leave_out_current_folder() -> None:
    locating = sys.argv[:1] == ["-m"]  # what Python sets while it looks for the module that it was told to run
    options = zip(sys.orig_argv[1:], [*sys.orig_argv[2:], ""], strict=False)  # -m name, -Wm name, -mname
    named = any(o[:1] == "-" and ((o[-1] == "m" and name in NAMES) or o[2:] in NAMES) for o, name in options)
    added = not getattr(sys.flags, "safe_path", sys.flags.isolated)
    if locating and named and added and sys.path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]


leave_out_current_folder()
