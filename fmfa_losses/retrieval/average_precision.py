"""Average precision out of the ranks of the matches, by two rules for the area under precision over recall.

With the ranks r_1 < ... < r_m, counted from 1, precision at the i-th match is i / r_i, and just before it
(i - 1) / (r_i - 1), which is 1 where r_i = 1. Recall grows by 1 / m at each match.

    step           AP = (1/m) sum_i i / r_i
    trapezoidal    AP = (1/m) sum_i (i / r_i + (i - 1) / (r_i - 1)) / 2
"""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..ops.checks import check_option

__all__ = ["AveragePrecision", "average_precisions", "check_average_precision"]

AveragePrecision: TypeAlias = Literal["step", "trapezoidal"]


def check_average_precision(rule: AveragePrecision) -> AveragePrecision:
    check_option("average_precision", rule, get_args(AveragePrecision))
    return rule


def average_precisions(rank: Tensor, valid: Tensor, rule: AveragePrecision) -> Tensor:
    """[q] of ascending ranks [q, m], float64, of which `valid` says how many there are; a NaN rank gives NaN."""
    found = torch.arange(1, rank.shape[1] + 1, device=rank.device)
    precision = found / rank
    if rule == "trapezoidal":
        before = torch.where(rank == 1, 1, (found - 1) / (rank - 1))
        precision = (precision + before) / 2
    return precision.masked_fill(~valid, 0).sum(1) / valid.sum(1)
