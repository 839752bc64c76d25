"""Run with the installed wheel from outside the checkout: the package is whole, and one loss gives its gradient."""

import importlib.util
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

tokens = torch.randn(3, 6, 8, requires_grad=True)
loss = fmfa_losses.EFALoss()(tokens, tokens[:, :4]) + fmfa_losses.ASDMLoss()(
    tokens[:, 0], tokens[:, 1], torch.tensor([0, 1, 0])
)
loss.backward()
assert torch.isfinite(tokens.grad).all()
print(f"fmfa_losses {fmfa_losses.__version__} from {package}: loss {loss.item():.4f}")
