"""Unit rows by the kernels: values and gradients against float64, masks, any scale, in place."""

import pytest
import torch
from fmfa_losses.kernels import unit_rows
from helpers.budget import assert_within_budget
from helpers.compare import value_and_grads

SHAPES = [(1, 1, 1), (3, 7, 5), (2, 5, 64), (1, 3, 1025)]
HALF = {torch.float16: "fp16", torch.float32: "fp32"}


def exact(x, dunit):
    """Unit rows and the gradient of x, in float64."""

    def unit(x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.where(norm == 0, 1, norm)

    return value_and_grads(unit, [x.double()], dunit.double())


def by_kernels(x, dunit, mask=None, dtype=None):
    unit, inverse = unit_rows.forward(x, mask, dtype or x.dtype)
    return unit, unit_rows.backward(dunit, x, inverse, mask, torch.empty_like(x))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype):
    x, dunit = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    plain = value_and_grads(lambda x: torch.nn.functional.normalize(x, dim=-1), [x], dunit)
    for got, a, b in zip(by_kernels(x, dunit), plain, exact(x, dunit), strict=True):
        assert_within_budget(got, a, b, precision=HALF[dtype], size=max(b.norm().item(), 1.0))


def test_a_float32_row_in_half_precision_is_rounded_once():
    x = torch.randn(4, 9)
    assert torch.equal(
        unit_rows.forward(x, None, torch.float16)[0], unit_rows.forward(x, None, torch.float32)[0].half()
    )


def test_masked_rows_are_zero_whatever_they_hold():
    x, dunit = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    mask = torch.rand(3, 8)[:, ::2] > 0.5  # strided
    x[~mask] = float("nan")
    dunit[~mask] = float("inf")
    unit, dx = by_kernels(x, dunit, mask)
    clean = [t.where(mask.unsqueeze(-1), 0) for t in (x, dunit)]
    expected = exact(*clean)
    for got, b in zip((unit, dx), expected, strict=True):
        assert (got[~mask] == 0).all()
        assert_within_budget(got, b.float(), b)


def test_a_zero_row_stays_and_its_gradient_passes():
    dunit = torch.randn(2, 5)
    unit, dx = by_kernels(torch.zeros(2, 5), dunit)
    assert torch.equal(unit, torch.zeros(2, 5))
    assert torch.equal(dx, dunit)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-12, 1e12, 1e30, 1e37])
def test_any_scale(scale):
    x = torch.randn(2, 16, dtype=torch.float64) * scale
    x = x.float()
    unit = unit_rows.forward(x, None, torch.float32)[0]
    assert_within_budget(unit, exact(x, x)[0].float(), exact(x, x)[0], amplification=4)
    dunit = torch.randn(2, 16) * scale  # what leaves float32's range only where it must
    dx = by_kernels(x, dunit)[1]
    if scale > 1e-38:
        assert_within_budget(dx, exact(x, dunit)[1].float(), exact(x, dunit)[1], amplification=4)
    assert (by_kernels(x, torch.zeros(2, 16))[1] == 0).all()


def test_nan_stays_in_its_row():
    x = torch.randn(3, 8)
    x[1, 2] = float("nan")
    unit, dx = by_kernels(x, torch.ones(3, 8))
    for got in (unit, dx):
        assert got[1].isnan().all()
        assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("D", [24, 1030])
def test_in_place(D):
    x, dunit = torch.randn(5, D), torch.randn(5, D)
    unit, inverse = unit_rows.forward(x, None, torch.float32)
    for rows, are_units in ((x, False), (unit, True)):
        expected = unit_rows.backward(dunit, rows, inverse, None, torch.empty_like(x), unit=are_units)
        over_dunit = dunit.clone()
        assert torch.equal(unit_rows.backward(over_dunit, rows, inverse, None, over_dunit, unit=are_units), expected)
        assert torch.equal(unit_rows.backward(dunit, rows, inverse, None, rows, unit=are_units), expected)
        assert torch.equal(rows, expected)


def test_unit_rows_give_the_gradient_of_what_they_were_made_of():
    x, dunit = torch.randn(5, 24), torch.randn(5, 24)
    unit, inverse = unit_rows.forward(x, None, torch.float32)
    got = unit_rows.backward(dunit, unit, inverse, None, torch.empty_like(x), unit=True)
    assert_within_budget(got, exact(x, dunit)[1].float(), exact(x, dunit)[1], amplification=4)


def test_a_gradient_along_its_row_keeps_its_digits():
    """u and du nearly parallel: what is left is a hundredth of both, and a rounded unit row would lose two digits."""
    x = torch.randn(8, 64).half()
    dunit = torch.nn.functional.normalize(x.float(), dim=-1) + 0.01 * torch.randn(8, 64) / 8
    inverse = unit_rows.forward(x, None, torch.float16)[1]
    got = unit_rows.backward(dunit, x, inverse, None, torch.empty(8, 64))
    truth = exact(x, dunit)[1]
    assert (got - truth).norm() < 1e-4 * truth.norm()


def test_strided_rows():
    x = torch.randn(6, 4, 9).permute(1, 0, 2)
    assert torch.equal(*(unit_rows.forward(t, None, torch.float32)[0] for t in (x, x.contiguous())))
