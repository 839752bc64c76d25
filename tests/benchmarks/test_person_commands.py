"""The commands evaluate, time and compare, on runs and weights of rendered pedestrians and of a folder layout."""

import math

import pytest
import torch

from benchmarks.person_retrieval.commands import compare

# -------------------------------------------------------------------------------------------------------- compare


def test_mcnemars_test_is_the_binomial_one() -> None:
    scipy_values = {(0, 0): 1.0, (3, 3): 1.0, (0, 5): 0.0625, (8, 1): 0.0390625, (10, 2): 0.03857421875}
    for (a, b), p in scipy_values.items():
        assert compare.exact_mcnemar(a, b) == compare.exact_mcnemar(b, a) == pytest.approx(p, abs=1e-12)
    n, low = 3000, 1400
    tail = math.fsum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2))
                     for i in range(low + 1))  # fmt: skip
    assert compare.exact_mcnemar(low, n - low) == pytest.approx(2 * tail, rel=1e-6)


def test_captions_that_differ_are_taken_in_turn_and_at_even_distances() -> None:
    first_a, first_b = torch.zeros(2, 40, dtype=torch.bool)
    first_a[[1, 5, 9, 13, 17, 30]] = True
    first_b[[2, 20, 30]] = True  # 30: both
    assert compare.choose(first_a, first_b, 4, differ=True) == [1, 2, 17, 20]
    assert compare.choose(first_a, first_b, 6, differ=True) == [1, 2, 5, 20, 13, 17]  # B alone has two
    assert compare.choose(first_a, first_a, 4, differ=True) == []
    assert compare.choose(first_a, first_b, 4, differ=False) == [0, 13, 26, 39]
