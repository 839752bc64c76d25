"""C-ITC: cyclic consistency of images and texts, CyCLIP and TBPS-CLIP (parameter-free).

    L = lambda1 mean_ij (cos(v_i, v_j) - cos(t_i, t_j))^2        within the modalities: images lie as their texts do
      + lambda2 mean_ij (cos(t_i, v_j) - cos(v_i, t_j))^2        across them: text i to image j as image i to text j

Both codebases square differences of logits and divide by the squared logit scale, which cancels: there is none here.
CyCLIP multiplies by the batch size besides.
"""

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..ops.checks import check_nonnegative
from .loss import Options, functional, hyperparameter
from .two_views import TwoViewLoss

__all__ = ["CITCLoss", "citc_loss"]


class CITCLoss(TwoViewLoss):
    """Makes similarities consistent: image to image as text to text, and text to image as image to text.

        L = lambda1 mean_ij (cos(v_i, v_j) - cos(t_i, t_j))^2 + lambda2 mean_ij (cos(t_i, v_j) - cos(v_i, t_j))^2

    Args:
        lambda1: weight >= 0 of the term within the modalities.
        lambda2: weight >= 0 of the term across them.
        reduction: "mean", "sum", or "none" for the mean over j of sample i, [B].
        gather, process_group, equal_batches: see ASDMLoss.

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        sample_weight: [B] weights >= 0 of the pairs i; "mean" divides by their sum.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). 0 up to rounding for B == 1; a
        zero vector has cosine 0 with everything. Memory: a few [B, B] for up to 2048 pairs, a block of their rows for
        more; whole ones where compiled or transformed.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> import torch
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> CITCLoss()(image, text)                                   # 1/4 6/9
        tensor(0.1667)

    Reference: Goel et al., CyCLIP, arXiv 2205.14459, Eq. 3-4; Cao et al., arXiv 2308.10045, C-ITC.
    """

    lambda1: float = hyperparameter(default=0.25, check=check_nonnegative)
    lambda2: float = hyperparameter(default=0.25, check=check_nonnegative)

    def queries(self, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([v, t], dim=1), torch.cat([t, v], dim=1)

    def keys(self, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """So that the scores are v_i v_j - t_i t_j, and t_i v_j - v_i t_j."""
        keys = torch.cat([v, -t], dim=1)
        return keys, keys

    def rows(self, way: int, scores: Tensor, first: int) -> Tensor:  # type: ignore[override]
        return (self.lambda1, self.lambda2)[way] * scores.square().mean(dim=1)

    def forward(self, image_features: Tensor, text_features: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        names = ("image_features", "text_features")
        return self.of_views(names, image_features, text_features, sample_weight)


class CITCOptions(Options, total=False):
    lambda1: float
    lambda2: float


@functional(CITCLoss)
def citc_loss(image_features: Tensor, text_features: Tensor, **options: Unpack[CITCOptions]) -> Tensor:
    """Functional form of `CITCLoss`, which documents every argument.

    Example:
        >>> import torch
        >>> features = torch.eye(4)
        >>> citc_loss(features, features)
        tensor(0.)
    """
    return CITCLoss.of(image_features, text_features, **options)
