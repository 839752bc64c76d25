"""The consensus division against an EM of its own, at degenerate losses, and in a step of training."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
from helpers.errors import explains
from torch import Tensor

from fmfa_losses import TALLoss
from fmfa_losses.noise import ConsensusDivision, clean_probability, consensus_division

pytest.importorskip("sklearn")
EXACT = {"max_iter": 500, "tol": 1e-12, "reg_covar": 1e-6}


def losses(clean=300, noisy=100, seed=0, dtype=torch.float64) -> Tensor:
    """Shuffled, clean ones about 1 and noisy ones about 4."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([
        1 + 0.4 * torch.randn(clean, generator=generator, dtype=dtype),
        4 + 0.8 * torch.randn(noisy, generator=generator, dtype=dtype),
    ])  # fmt: skip
    return values[torch.randperm(len(values), generator=generator)]


def mixture(values: Tensor, steps=3000) -> Tensor:
    """The probability of the lower of two Gaussians, by expectation and maximisation."""
    x = (values - values.min()) / (values.max() - values.min())
    mean, variance, share = x.quantile(torch.tensor([0.25, 0.95], dtype=x.dtype)), x.new_full((2,), 0.01), x.new_ones(2)
    for _ in range(steps):
        density = share * torch.exp(-((x[:, None] - mean) ** 2) / (2 * variance)) / variance.sqrt()
        p = density / density.sum(1, keepdim=True)
        share, mean = p.mean(0), (p * x[:, None]).sum(0) / p.sum(0)
        variance = (p * (x[:, None] - mean) ** 2).sum(0) / p.sum(0) + 1e-6
    return p[:, mean.argmin()]


def test_probabilities_are_those_of_the_mixture():
    values = losses()
    got = clean_probability(values, **EXACT)
    torch.testing.assert_close(got, mixture(values), rtol=0, atol=1e-5)
    assert got.dtype == torch.float64
    assert ((got > 0.5) == (values < 2.4)).float().mean() > 0.97


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_of_every_dtype(dtype):
    values = losses().to(dtype).requires_grad_()
    got = clean_probability(values, **EXACT)
    torch.testing.assert_close(got, clean_probability(values.detach().double(), **EXACT), rtol=0, atol=0)
    assert not got.requires_grad


def test_neither_scale_nor_origin_nor_order_matter():
    values = losses()
    probability = clean_probability(values, **EXACT)
    torch.testing.assert_close(clean_probability(7 * values - 30, **EXACT), probability, rtol=0, atol=1e-6)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(clean_probability(values[order], **EXACT), probability[order], rtol=0, atol=1e-5)


def test_every_pair_is_clean_noisy_or_uncertain():
    bge, tse = losses(seed=0), losses(seed=1)
    division = consensus_division(bge, tse)
    assert isinstance(division, ConsensusDivision)
    votes = (division.bge_probability > 0.5).long() + (division.tse_probability > 0.5).long()
    assert torch.equal(division.clean, votes == 2)
    assert torch.equal(division.uncertain, votes == 1)
    assert torch.equal(division.noisy, votes == 0)
    torch.testing.assert_close(division.bge_probability, clean_probability(bge))
    torch.testing.assert_close(division.tse_probability, clean_probability(tse))
    assert division.label_hat.dtype == torch.float32
    assert (division.label_hat[division.clean] == 1).all() and (division.label_hat[division.noisy] == 0).all()
    coins = division.label_hat[division.uncertain]
    assert set(coins.tolist()) == {0, 1} and 0.35 < coins.mean() < 0.65


def test_the_seed_decides_alone():
    bge, tse = losses(seed=0), losses(seed=1)
    first = consensus_division(bge, tse, seed=3)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = consensus_division(bge, tse, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    other = consensus_division(bge, tse, seed=4)
    assert not torch.equal(other.label_hat, first.label_hat)
    assert torch.equal(other.clean, first.clean)


def test_a_weight_for_uncertain_pairs_and_another_threshold():
    bge, tse = losses(seed=0), losses(seed=1)
    division = consensus_division(bge, tse, uncertain=0.25)
    assert (division.label_hat[division.uncertain] == 0.25).all() and division.uncertain.any()
    strict = consensus_division(bge, tse, threshold=0.999)
    assert strict.clean.sum() < division.clean.sum()
    assert torch.equal(strict.clean, (strict.bge_probability > 0.999) & (strict.tse_probability > 0.999))


@pytest.mark.parametrize("size", [40, 250])
def test_where_none_is_noisy_the_least_probable_are(size):
    """N // 100 + 1 of each branch, as released."""
    values = losses(size - 20, 20)
    probability = clean_probability(values)
    low = float(probability.min()) / 2
    division = consensus_division(values, values, threshold=low)
    noisy = division.noisy.nonzero()[:, 0]
    assert len(noisy) == size // 100 + 1
    assert probability[noisy].max() <= probability[~division.noisy].min()
    assert consensus_division(values, values, threshold=low, enforce_noisy=False).clean.all()


def test_of_equal_probability_the_larger_losses_are_noisy():
    """The released code would call all of them noisy. Two components so wide tell nothing apart."""
    values = losses(200, 50)
    division = consensus_division(values, values, threshold=0.1, reg_covar=1e18)
    assert len(division.bge_probability.unique()) == 1
    assert torch.equal(division.noisy.nonzero()[:, 0].sort().values, values.topk(3).indices.sort().values)
    assert division.clean.sum() == 247


def test_losses_that_are_all_equal_are_clean():
    """Nothing distinguishes them; TAL of a fitted batch is 0 everywhere."""
    flat = torch.zeros(50)
    assert torch.equal(clean_probability(flat), torch.ones(50, dtype=torch.float64))
    division = consensus_division(flat, flat)
    assert division.clean.all() and (division.label_hat == 1).all()
    other = losses(40, 10)
    assert torch.equal(consensus_division(flat, other).noisy, torch.zeros(50, dtype=torch.bool))


def test_two_pairs():
    division = consensus_division(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0]))
    assert division.label_hat.tolist() == [1, 0]


def test_no_warning_where_the_fit_ends_early():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean_probability(losses(), max_iter=1, tol=0.0)


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        ({"bge_losses": torch.tensor([1.0, math.nan, 2.0])}, ValueError, ("bge_losses must be finite", "index 1", ())),
        ({"tse_losses": torch.tensor([1.0, 2.0, math.inf])}, ValueError, ("tse_losses must be finite", "inf", "batch")),
        ({"tse_losses": torch.tensor([1.0])}, ValueError, ("at least 2", "float32 [1]", "all training pairs")),
        ({"tse_losses": torch.ones(0)}, ValueError, ("must not be empty", "[0]")),
        ({"tse_losses": torch.rand(4)}, ValueError, ("same pairs", ("[3]", "[4]"), "both branches")),
        ({"bge_losses": torch.ones(3, 1)}, ValueError, ("must have shape [N]", "[3, 1]", ())),
        ({"bge_losses": torch.tensor([1, 2, 3])}, TypeError, ("floating-point", "int64", ".float()")),
        ({"bge_losses": [1.0, 2.0]}, TypeError, ("must be a tensor", "list", "torch.as_tensor")),
        ({"threshold": 1.5}, ValueError, ("threshold must lie in [0, 1]", "1.5")),
        ({"uncertain": "half"}, TypeError, ("uncertain", "'half'", ())),
        ({"uncertain": 2}, ValueError, ("uncertain", "2")),
        ({"seed": -1}, ValueError, ("seed must be an integer from 0", "-1")),
        ({"max_iter": 0}, ValueError, ("max_iter must be an integer >= 1", "0")),
        ({"reg_covar": 0.0}, ValueError, ("reg_covar must be a finite number > 0", "0.0")),
        ({"tol": -1.0}, ValueError, ("tol must be a finite number >= 0", "-1.0")),
        ({"enforce_noisy": "no"}, TypeError, ("enforce_noisy must be True or False", "'no'")),
    ],
)
def test_bad_input_says_what_to_change(change, error, parts):
    arguments = {"bge_losses": torch.tensor([1.0, 2.0, 3.0]), "tse_losses": torch.tensor([1.0, 2.0, 3.0])}
    with explains(error, *parts):
        consensus_division(**(arguments | change))


def test_label_hat_is_a_sample_weight():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(32, 8, generator=generator)
    text = image + 0.1 * torch.randn(32, 8, generator=generator)
    text[::4] = text[::4].roll(1, 0)
    pids, loss = torch.arange(32), TALLoss(reduction="none")
    division = consensus_division(loss(image, text, pids), loss(image, text, pids))
    assert not division.clean[::4].any() and division.clean.sum() == 24
    got = TALLoss()(image, text, pids, sample_weight=division.label_hat)
    per_pair = loss(image, text, pids)
    torch.testing.assert_close(got, per_pair[division.clean].mean())


def test_without_scikit_learn_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['sklearn'] = sys.modules['sklearn.mixture'] = None; import torch\n"
        "from fmfa_losses.noise import consensus_division, make_noise_index\n"
        "make_noise_index(5, 0.5)\n"
        "try: consensus_division(torch.rand(5), torch.rand(5))\n"
        "except ImportError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert 'pip install "fmfa-losses[noise]"' in out
