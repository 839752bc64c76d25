"""Run with the installed wheel from outside the checkout: the package is whole, and every loss gives its gradient.

python outside.py                               # without triton, which is an extra
TRITON_INTERPRET=1 python outside.py triton     # with it: its kernels are found, and right
"""

import importlib.util
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import fmfa_losses

package = Path(fmfa_losses.__file__).parent
assert "site-packages" in str(package), package
assert (package / "py.typed").exists()
assert fmfa_losses.__version__ == version("fmfa-losses")
assert importlib.util.find_spec("fmfa_losses.kernels") is not None
assert importlib.util.find_spec("kernels") is None

wanted = sys.argv[1:] == ["triton"]
assert (importlib.util.find_spec("triton") is not None) == wanted
os.environ.setdefault("TRITON_INTERPRET", "1")  # so that a missing triton is the one reason on a CPU

pids = torch.tensor([0, 1, 0])
losses = [getattr(fmfa_losses, name) for name in fmfa_losses.__all__ if name.endswith("Loss") and name != "FMFALoss"]
assert len(losses) >= 9, losses
WITHOUT_PIDS = (fmfa_losses.CITCLoss, fmfa_losses.EFALoss, fmfa_losses.ITCLoss, fmfa_losses.SimCLRLoss)
IDENTITY = [Loss for Loss in losses if Loss not in WITHOUT_PIDS]


def value_and_gradient(Loss, **options):
    torch.manual_seed(0)
    tokens = torch.randn(3, 6, 8, requires_grad=True)
    inputs = (tokens, tokens[:, :4]) if Loss is fmfa_losses.EFALoss else (tokens[:, 0], tokens[:, 1])
    loss = Loss(**options)(*inputs, *((pids,) if Loss in IDENTITY else ()))
    loss.backward()
    assert torch.isfinite(tokens.grad).all(), Loss
    return loss.item(), tokens.grad


for Loss in losses:
    value_and_gradient(Loss)
for Loss in (fmfa_losses.EFALoss, fmfa_losses.ASDMLoss):
    if wanted:
        (value, gradient), (expected, expected_gradient) = (
            value_and_gradient(Loss, backend="triton"),
            value_and_gradient(Loss),
        )
        # Is it the same loss? The budgets of its kernels are those of the tests.
        assert abs(value - expected) <= 1e-3 * abs(expected), (Loss, value, expected)
        assert (gradient - expected_gradient).abs().max() <= 1e-3 * expected_gradient.abs().max(), Loss
        continue
    try:
        value_and_gradient(Loss, backend="triton")
    except RuntimeError as error:
        assert 'pip install "fmfa-losses[triton]"' in str(error), error
    else:
        raise AssertionError(f"{Loss.__name__} ran on kernels without triton")
print(f"fmfa_losses {fmfa_losses.__version__} from {package}, {'with' if wanted else 'without'} triton: all is there")
