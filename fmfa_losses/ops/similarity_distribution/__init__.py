"""Per-row losses of softmax similarity distributions, Eq. 1-4, in blocks and tiles."""

from .api import RowLoss, similarity_distribution_loss, similarity_distribution_loss_reference

__all__ = ["RowLoss", "similarity_distribution_loss", "similarity_distribution_loss_reference"]
