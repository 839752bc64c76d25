"""The functional forms: the losses without state, and the two operators under EFA."""

from .asdm import asdm_loss
from .efa import efa_loss
from .identity import id_loss
from .ops.aggregation import sparse_aggregate
from .ops.hard_similarity import hard_similarity

__all__ = ["asdm_loss", "efa_loss", "hard_similarity", "id_loss", "sparse_aggregate"]
