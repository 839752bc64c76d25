"""Confident consensus division: which training pairs two branches agree to be clean (RDE, section 3.3).

    x_i = (l_i - min l) / (max l - min l)                          losses of one branch, of all training pairs
    p_i = P(component of smaller mean | x_i)                       mixture of two Gaussians, fitted to x
    clean: p_i > threshold in both branches      noisy: in neither      uncertain: in one

What the released code (2024-CVPR-RDE/processor/processor.py) does beside that, and here:
- An uncertain pair is clean or noisy for one epoch, by a coin. Here too, by `seed`; or it gets a weight.
- Where the lowest p of a branch is above the threshold, so that none is noisy, the N // 100 + 1 pairs of lowest p are
  called noisy. Here too, unless enforce_noisy=False. There, pairs of equal p are all noisy, and where p is 1 for
  nearly all, that is every pair; here they are N // 100 + 1, of equal p those of larger loss.
- Losses that are all equal end in an error of scikit-learn there. Here their branch holds all pairs to be clean.
- It fits to float32, from the global random state. Here to float64, from `seed`.
"""

import warnings
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..ops.checks import (
    check_flag,
    check_float,
    check_fraction,
    check_integer,
    check_nonnegative,
    check_positive,
    describe,
)

__all__ = ["ConsensusDivision", "clean_probability", "consensus_division"]


class ConsensusDivision(NamedTuple):
    """Of N pairs, in the order of the losses and on their device; every pair is clean, noisy or uncertain.

    Attributes:
        label_hat: [N] float32, 1 for clean pairs, 0 for noisy ones: the sample_weight of a loss.
        clean, noisy, uncertain: [N] bool.
        bge_probability, tse_probability: [N] float64, p of each branch.
    """

    label_hat: Tensor
    clean: Tensor
    noisy: Tensor
    uncertain: Tensor
    bge_probability: Tensor
    tse_probability: Tensor


def clean_probability(
    losses: Tensor, *, seed: int = 0, max_iter: int = 10, tol: float = 1e-2, reg_covar: float = 5e-4
) -> Tensor:
    """How probable each pair is clean: that its loss belongs to the component of smaller mean.

        p_i = P(component of smaller mean | (l_i - min l) / (max l - min l)),    mixture of two Gaussians

    scikit-learn's GaussianMixture on the CPU; the same losses and seed give the same probabilities on one machine.

    Args:
        losses: [N], N >= 2, of all training pairs; any float dtype. If all are equal, all probabilities are 1.
        seed: of the first guess of the components, 0 to 2^32 - 1.
        max_iter, tol, reg_covar: of GaussianMixture. RDE has (10, 1e-2, 5e-4), and (100, 1e-4, 1e-6) for RSTPReid and
            for more than 40 % of noise.
    Returns:
        [N] float64, on the device of the losses.
    Raises:
        ImportError: scikit-learn is missing.
        TypeError, ValueError: no [N] of floats, N < 2, NaN or infinite losses, numbers out of their range.
    Example:
        >>> clean_probability(torch.tensor([0.1, 0.2, 0.1, 0.2, 5.0, 5.1, 4.9, 5.0])).round()
        tensor([1., 1., 1., 1., 0., 0., 0., 0.], dtype=torch.float64)

    Reference: RDE, arXiv 2308.09911, section 3.3; Li et al., DivideMix, arXiv 2002.07394, section 3.1.
    """
    return _probability("losses", losses, seed, max_iter, tol, reg_covar)


def consensus_division(
    bge_losses: Tensor,
    tse_losses: Tensor,
    *,
    threshold: float = 0.5,
    uncertain: float | Literal["random"] = "random",
    enforce_noisy: bool = True,
    seed: int = 0,
    max_iter: int = 10,
    tol: float = 1e-2,
    reg_covar: float = 5e-4,
) -> ConsensusDivision:
    """Divides all training pairs by the losses of two branches into clean, noisy and uncertain ones, once an epoch.

        clean_i = [p_i > threshold] of both branches,   noisy_i = [p_i <= threshold] of both,   uncertain_i otherwise

    with the p of `clean_probability`. Take the losses in eval mode with `reduction="none"`, ordered by the index of
    the pair; in training `sample_weight=division.label_hat[index]`.

    Args:
        bge_losses: [N], of the global features, any float dtype.
        tse_losses: [N], of the selected tokens, on the same device.
        threshold: in [0, 1].
        uncertain: weight of uncertain pairs in label_hat, in [0, 1]; "random", as RDE has it, is 0 or 1 by a coin.
        enforce_noisy: where a branch has p > threshold for every pair, it calls the N // 100 + 1 least probable noisy,
            as RDE does; not where all of its losses are equal.
        seed: of the fits and of the coin; pass the epoch, so that uncertain pairs take turns.
        max_iter, tol, reg_covar: as `clean_probability`.
    Returns:
        ConsensusDivision(label_hat, clean, noisy, uncertain, bge_probability, tse_probability).
    Raises:
        ImportError: scikit-learn is missing.
        TypeError, ValueError: losses that are no [N] of floats, differ in length or device, hold NaN or infinity, or
            are fewer than 2; numbers out of their range.
    Example:
        >>> bge = torch.tensor([0.1, 0.2, 0.1, 0.2, 5.0, 5.1, 4.9, 5.0])
        >>> division = consensus_division(bge, bge.roll(1), uncertain=0.5)
        >>> division.label_hat
        tensor([0.5000, 1.0000, 1.0000, 1.0000, 0.5000, 0.0000, 0.0000, 0.0000])

    Reference: RDE, arXiv 2308.09911, section 3.3.
    """
    threshold, enforce_noisy = check_fraction("threshold", threshold), check_flag("enforce_noisy", enforce_noisy)
    if uncertain != "random":
        uncertain = check_fraction("uncertain, if it is not 'random',", uncertain)
    fit = (seed, max_iter, tol, reg_covar)
    bge, tse = _probability("bge_losses", bge_losses, *fit), _probability("tse_losses", tse_losses, *fit)
    if bge.shape != tse.shape or bge.device != tse.device:
        raise ValueError(
            f"bge_losses and tse_losses must be of the same pairs, on one device, got {describe(bge_losses)} and "
            f"{describe(tse_losses)}; pass the losses of both branches for every training pair"
        )
    votes = [_above(p, x, threshold, enforce_noisy) for p, x in ((bge, bge_losses), (tse, tse_losses))]
    clean, some = votes[0] & votes[1], votes[0] | votes[1]
    if uncertain == "random":
        weight = torch.randint(2, bge.shape, generator=torch.Generator().manual_seed(seed)).to(bge.device)
    else:
        weight = torch.full_like(bge, uncertain)
    label_hat = torch.where(clean, 1, torch.where(some, weight, 0)).float()
    return ConsensusDivision(label_hat, clean, ~some, some & ~clean, bge, tse)


def _probability(name: str, losses: Tensor, seed: int, max_iter: int, tol: float, reg_covar: float) -> Tensor:
    check_float(name, losses, "N")
    options = {
        "random_state": check_integer("seed", seed, 0, 2**32 - 1),
        "max_iter": check_integer("max_iter", max_iter, 1),
        "tol": check_nonnegative("tol", tol),
        "reg_covar": check_positive("reg_covar", reg_covar),
    }
    values = losses.detach().double().cpu()
    if len(values) < 2:
        raise ValueError(
            f"{name} must hold at least 2 pairs, got {describe(losses)}; pass the losses of all training pairs"
        )
    wrong = ~values.isfinite()
    if bool(wrong.any()):
        raise ValueError(
            f"{name} must be finite, got {values[wrong][0].item()} at index {int(wrong.to(torch.uint8).argmax())}, and "
            f"{int(wrong.sum())} such in all; look for the batch that made them"
        )
    mixture = _gaussian_mixture()(n_components=2, **options)
    low, high = values.min(), values.max()
    if low == high:
        return torch.ones_like(values).to(losses.device)
    x = ((values - low) / (high - low)).unsqueeze(1).numpy()
    with warnings.catch_warnings():  # max_iter may end the fit: that is what it is for
        warnings.simplefilter("ignore")
        mixture.fit(x)
    probability = mixture.predict_proba(x)[:, mixture.means_.argmin()]
    return torch.from_numpy(probability.copy()).to(losses.device)


def _above(probability: Tensor, losses: Tensor, threshold: float, enforce_noisy: bool) -> Tensor:
    """Which pairs one branch holds to be clean, [N] bool."""
    above = probability > threshold
    if enforce_noisy and bool(above.all()) and losses.min() != losses.max():
        by_loss = losses.detach().argsort(descending=True, stable=True)
        order = by_loss[probability[by_loss].argsort(stable=True)]
        above[order[: len(order) // 100 + 1]] = False
    return above


def _gaussian_mixture() -> Any:
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise ImportError('fmfa_losses.noise needs scikit-learn; pip install "fmfa-losses[noise]"') from error
    return GaussianMixture
