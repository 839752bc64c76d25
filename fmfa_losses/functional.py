"""The losses as functions, the two operators that EFA is made of, and masks of real lengths for them.

All have first derivatives: by backward(), by torch.func (grad, vjp, jacrev, vmap) and under torch.compile. TAL, TRL,
CMPM, C-ITC, SimCLR, triplet, sigmoid, ID and every function of scores also have second derivatives and forward mode
(jvp, jacfwd, hessian, dual numbers), and so have ITC, SDM and R-ITC with soft targets. A-SDM, EFA, the two operators
and SDM, ITC, R-ITC with labels are differentiable once, in reverse mode; anything else raises. PyTorch itself has no
second derivatives of compiled code, nor of the attention of IRRHead unless it runs under
torch.nn.attention.sdpa_kernel(SDPBackend.MATH).
"""

from .heads.identity import id_loss
from .losses.asdm import asdm_loss
from .losses.citc import citc_loss
from .losses.cmpm import cmpm_loss, cmpm_loss_from_scores
from .losses.efa import efa_loss
from .losses.itc import itc_loss, itc_loss_from_scores
from .losses.ritc import ritc_loss, ritc_loss_from_scores
from .losses.sdm import sdm_loss, sdm_loss_from_scores
from .losses.sigmoid import sigmoid_loss, sigmoid_loss_from_scores
from .losses.simclr import simclr_loss
from .losses.tal import tal_loss, tal_loss_from_scores, trl_loss, trl_loss_from_scores
from .losses.triplet import triplet_loss, triplet_loss_from_scores
from .ops.aggregation import sparse_aggregate
from .ops.hard_similarity import hard_similarity
from .ops.lengths import length_mask, pad_packed

__all__ = [
    "asdm_loss",
    "citc_loss",
    "cmpm_loss",
    "cmpm_loss_from_scores",
    "efa_loss",
    "hard_similarity",
    "id_loss",
    "itc_loss",
    "itc_loss_from_scores",
    "length_mask",
    "pad_packed",
    "ritc_loss",
    "ritc_loss_from_scores",
    "sdm_loss",
    "sdm_loss_from_scores",
    "sigmoid_loss",
    "sigmoid_loss_from_scores",
    "simclr_loss",
    "sparse_aggregate",
    "tal_loss",
    "tal_loss_from_scores",
    "triplet_loss",
    "triplet_loss_from_scores",
    "trl_loss",
    "trl_loss_from_scores",
]
