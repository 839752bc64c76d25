"""The training objectives of FMFA for text-to-image person retrieval: exact, small in memory, deterministic."""

from . import functional
from .asdm import ASDMLoss
from .efa import EFALoss
from .identity import IDHead, IDOutput
from .irr import IRRHead, IRROutput
from .masking import mask_tokens
from .objective import FMFALoss, FMFAOutput

__version__ = "0.1.0"

__all__ = [
    "ASDMLoss",
    "EFALoss",
    "FMFALoss",
    "FMFAOutput",
    "IDHead",
    "IDOutput",
    "IRRHead",
    "IRROutput",
    "functional",
    "mask_tokens",
]
