"""Figures: which patches a token is similar to, which pairs A-SDM weights more, what a search finds, losses over time.

Needs matplotlib: `pip install "fmfa-losses[plot]"`. Every function returns a `matplotlib.figure.Figure` made
without pyplot: nothing global changes, nothing has to be closed; `figure.savefig("maps.png")` writes it.
Colours are those of Okabe and Ito; where a colour means something, a mark or a line style says it too.
"""

from .curves import loss_curves
from .pair_weights import asdm_weights
from .search_results import retrieval_strips
from .token_maps import aggregated_patches, similarity_maps

__all__ = ["aggregated_patches", "asdm_weights", "loss_curves", "retrieval_strips", "similarity_maps"]
