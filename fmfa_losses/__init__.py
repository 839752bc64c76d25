"""The training objectives of FMFA for text-to-image person retrieval: exact, small in memory, deterministic."""

from .doctor import search_path as _search_path  # noqa: F401, first: it decides where all others come from

# isort: split
from importlib import import_module
from typing import TYPE_CHECKING

from . import functional
from .fmfa import FMFALoss, FMFAOutput
from .heads.identity import IDHead, IDOutput
from .heads.irr import IRRHead, IRROutput
from .heads.token_masking import mask_tokens
from .heads.token_selection import TokenSelection
from .losses.asdm import ASDMLoss
from .losses.citc import CITCLoss
from .losses.cmpm import CMPMLoss
from .losses.efa import EFALoss
from .losses.itc import ITCLoss
from .losses.negatives_queue import NegativesQueue
from .losses.ritc import RITCLoss
from .losses.sdm import SDMLoss
from .losses.sigmoid import SigmoidLoss
from .losses.simclr import SimCLRLoss
from .losses.tal import TALLoss, TRLLoss
from .losses.triplet import TripletLoss

if TYPE_CHECKING:
    from . import cached as cached
    from . import compat as compat
    from . import distributed as distributed
    from . import doctor as doctor
    from . import noise as noise
    from . import plot as plot
    from . import retrieval as retrieval

__version__ = "0.1.0"

__all__ = [
    "ASDMLoss",
    "CITCLoss",
    "CMPMLoss",
    "EFALoss",
    "FMFALoss",
    "FMFAOutput",
    "IDHead",
    "IDOutput",
    "IRRHead",
    "IRROutput",
    "ITCLoss",
    "NegativesQueue",
    "RITCLoss",
    "SDMLoss",
    "SigmoidLoss",
    "SimCLRLoss",
    "TALLoss",
    "TRLLoss",
    "TokenSelection",
    "TripletLoss",
    "functional",
    "mask_tokens",
]

# Parts that a training script may never need are imported when they are named.
_LAZY = ("cached", "compat", "distributed", "doctor", "noise", "plot", "retrieval")

if not TYPE_CHECKING:  # a type checker would take every misspelt name for a lazy one

    def __getattr__(name):
        if name in _LAZY:
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
