"""The published objectives by their own names and signatures, computed by this library's operators.

Each module replaces the `model/objectives.py` of its codebase; only the import changes:

    from fmfa_losses.compat import irra as objectives            # IRRA and what derives from it
    from fmfa_losses.compat import fmfa as objectives            # FMFA, as released in 2025-08
    from fmfa_losses.compat import fmfa_2025_04 as objectives    # FMFA, as first released
    from fmfa_losses.compat import rde as objectives             # RDE, per-sample losses; its two TSE layers too

Names (misspelt ones too), order of arguments, shapes and results are the published ones. So are the quirks: every
docstring names those of its function, and what to call instead. Three things differ:

    arithmetic in half precision     here float32 or better, and so are the results
    NaN and inf by overflow, for zero vectors, for equal similarities, or for one identity in the batch
                                     here finite; the docstrings of the losses say which value
    `.cuda()`                        here results are on the inputs' device; logit_scale may be a 0-dim CPU tensor
"""

from . import fmfa, fmfa_2025_04, irra, rde

__all__ = ["fmfa", "fmfa_2025_04", "irra", "rde"]
