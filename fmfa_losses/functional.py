"""The functional forms: the losses without state, and the two operators under EFA."""

from .asdm import asdm_loss
from .cmpm import cmpm_loss, cmpm_loss_from_scores
from .efa import efa_loss
from .identity import id_loss
from .itc import itc_loss, itc_loss_from_scores
from .ops.aggregation import sparse_aggregate
from .ops.hard_similarity import hard_similarity
from .sdm import sdm_loss, sdm_loss_from_scores
from .sigmoid import sigmoid_loss, sigmoid_loss_from_scores
from .tal import tal_loss, tal_loss_from_scores, trl_loss, trl_loss_from_scores
from .triplet import triplet_loss, triplet_loss_from_scores

__all__ = [
    "asdm_loss",
    "cmpm_loss",
    "cmpm_loss_from_scores",
    "efa_loss",
    "hard_similarity",
    "id_loss",
    "itc_loss",
    "itc_loss_from_scores",
    "sdm_loss",
    "sdm_loss_from_scores",
    "sigmoid_loss",
    "sigmoid_loss_from_scores",
    "sparse_aggregate",
    "tal_loss",
    "tal_loss_from_scores",
    "triplet_loss",
    "triplet_loss_from_scores",
    "trl_loss",
    "trl_loss_from_scores",
]
