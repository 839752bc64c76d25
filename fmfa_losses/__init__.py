"""The training objectives of FMFA for text-to-image person retrieval: exact, small in memory, deterministic."""

from . import _search_path, functional  # noqa: F401, in this order: the first decides where torch comes from
from .asdm import ASDMLoss
from .cmpm import CMPMLoss
from .efa import EFALoss
from .identity import IDHead, IDOutput
from .irr import IRRHead, IRROutput
from .itc import ITCLoss
from .masking import mask_tokens
from .objective import FMFALoss, FMFAOutput
from .sdm import SDMLoss
from .sigmoid import SigmoidLoss
from .tal import TALLoss, TRLLoss
from .triplet import TripletLoss

__version__ = "0.1.0"

__all__ = [
    "ASDMLoss",
    "CMPMLoss",
    "EFALoss",
    "FMFALoss",
    "FMFAOutput",
    "IDHead",
    "IDOutput",
    "IRRHead",
    "IRROutput",
    "ITCLoss",
    "SDMLoss",
    "SigmoidLoss",
    "TALLoss",
    "TRLLoss",
    "TripletLoss",
    "functional",
    "mask_tokens",
]
