"""The training objectives of FMFA for text-to-image person retrieval."""

from .asdm import ASDMLoss
from .efa import EFALoss

__version__ = "0.1.0"
