"""CLIP's own loss on the global features: the baseline of Table 6."""

from torch import Tensor, nn

from fmfa_losses import FMFAOutput, ITCLoss

__all__ = ["InfoNCE"]


class InfoNCE(nn.Module):
    """The model with InfoNCE alone; each caption's own image is its one positive.

    Args:
        temperature: tau, as that of A-SDM.
        gather: as ITCLoss takes it.
    """

    uses_tokens = False

    def __init__(self, model: nn.Module, temperature: float = 0.02, *, gather: bool | str = False) -> None:
        super().__init__()
        self.model, self.objective = model, ITCLoss(targets="paired", temperature=temperature, gather=gather)

    def forward(
        self, pixels: Tensor, token_ids: Tensor, masked_ids: Tensor, labels: Tensor, pids: Tensor
    ) -> FMFAOutput:
        image, _ = self.model.encode_image(pixels)
        text, _ = self.model.encode_text(token_ids)
        loss = self.objective(image, text)
        return FMFAOutput(loss, {"itc": loss}, {})
