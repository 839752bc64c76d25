"""Measurements of fmfa_losses. They are not installed; run them from a checkout: `python -m benchmarks gpu`.

The kernels are at the top of the repository and install as `fmfa_losses.kernels`. From a checkout that is not
installed they are found here, by measurements and tests alike.
"""

from pathlib import Path

import fmfa_losses

ROOT = Path(__file__).parents[1]
if Path(fmfa_losses.__file__).parent == ROOT / "fmfa_losses" and str(ROOT) not in fmfa_losses.__path__:
    fmfa_losses.__path__.append(str(ROOT))
