"""ID: images and captions of one person are the same class of one linear classifier.

    L_id = ( CE(W v + b, pid) + CE(W t + b, pid) ) / 2,    averaged over the batch
    CE(z, y) = -sum_k q_k log softmax(z)_k,                q_k = (1 - s) [k = y] + s / K    of K identities

Both modalities use one classifier, so that v and t of a person are pulled to the same class vector. The released
code does the same, without label smoothing (s = 0). Source: Zheng et al., arXiv 1711.05535; IRRA, arXiv 2303.12501,
section 3.4; label smoothing: Szegedy et al., arXiv 1512.00567, section 7.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import (
    check_flag,
    check_float,
    check_fraction,
    check_ids,
    check_integer,
    check_same,
    describe,
    on_host,
)
from ..ops.module import Module
from .checkpoint import LoadReport, checkpoint_entries, load_entries
from .parts import WideLinear, check_device, nan_unless, to_dtype_of

__all__ = ["IDHead", "IDOutput", "id_loss"]

NO_PID = -(2**31)  # cross_entropy would leave out the pids of -100


class IDOutput(NamedTuple):
    """`loss` carries the gradient; the accuracies are fractions in [0, 1] without one."""

    loss: Tensor
    image_accuracy: Tensor
    text_accuracy: Tensor


def id_loss(image_logits: Tensor, text_logits: Tensor, pids: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean of the cross-entropies of the two modalities.

    Args:
        image_logits: [B, identities], any float dtype.
        text_logits: [B, identities].
        pids: [B], integers in [0, identities). Values are checked on the CPU alone.
        label_smoothing: s in [0, 1], the part of every target that is spread evenly over all identities.
    Returns:
        Scalar, float32 or better.
    Raises:
        TypeError, ValueError: rank, shape, dtype or device; the message says what to do.
    Example:
        >>> id_loss(torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, 3, 1]))
        tensor(1.3863)

    Reference: IRRA, arXiv 2303.12501, section 3.4.
    """
    label_smoothing = check_fraction("label_smoothing", label_smoothing)
    check_float("image_logits", image_logits, "B identities")
    check_float("text_logits", text_logits, "B identities")
    check_same("image_logits and text_logits", image_logits, text_logits, dims=[("B", 0), ("identities", 1)])
    pids = check_ids("pids", pids, image_logits.shape[0], image_logits.device)
    if on_host(pids):
        _check_range(pids, "identities", image_logits.shape[1], "build the classifier with more identities")
    image, text = (
        F.cross_entropy(_at_least_float32(x), pids.long(), ignore_index=NO_PID, label_smoothing=label_smoothing)
        for x in (image_logits, text_logits)
    )
    return (image + text) / 2


class IDHead(Module):
    """Pulls images and captions of one person to one class of a shared linear classifier.

        L_id = ( CE(W v + b, pid) + CE(W t + b, pid) ) / 2

    The product runs in the wider of the dtypes of features and weights and in float32 at least (under
    autocast: in what autocast chooses), the cross-entropy in float32 at least. A NaN feature comes out as a
    NaN loss.

    `classifier` is called once for each modality, images first, so that hooks, adapters, parametrisations and
    wrappers work. A module that replaces it gets the features in the dtype of its own first weight, and the width of
    its logits is the number of identities.

    Args:
        embed_dim: D, width of the features.
        num_identities: number of training identities; pids lie in [0, num_identities).
        check_labels: check the values of pids on an accelerator too, which makes the host wait for it. On the
            CPU they are always checked. torch.compile sees no values: there a pid outside the range makes the
            loss NaN, or PyTorch raises.
        label_smoothing: s in [0, 1]; the targets are (1 - s) of the pid and s / num_identities of every identity.
    Inputs:
        image_features, text_features: [B, D], any float dtype.
        pids: [B], integers in [0, num_identities).
    Returns:
        IDOutput(loss, image_accuracy, text_accuracy): scalars, float32 or better.
    Raises:
        TypeError, ValueError: rank, width, batch, dtype, device, or a pid outside [0, num_identities).
    Example:
        >>> head = IDHead(embed_dim=8, num_identities=5)
        >>> output = head(torch.randn(3, 8), torch.randn(3, 8), torch.tensor([0, 4, 4]))
        >>> output.loss.shape, sorted(head.state_dict())
        (torch.Size([]), ['classifier.bias', 'classifier.weight'])

    Reference: IRRA, arXiv 2303.12501, section 3.4. `classifier` is the name that the optimizers and
    checkpoints of IRRA-derived codebases look for.
    """

    check_labels: bool
    label_smoothing: float
    classifier: WideLinear

    _caller = "IDHead"  # as messages name the module; FMFALoss sets its own

    def __init__(
        self, embed_dim: int, num_identities: int, *, check_labels: bool = False, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        embed_dim = check_integer("embed_dim", embed_dim, 1)
        num_identities = check_integer("num_identities", num_identities, 1)
        self.check_labels = check_flag("check_labels", check_labels)
        self.label_smoothing = check_fraction("label_smoothing", label_smoothing)
        self.classifier = WideLinear(embed_dim, num_identities)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, image_features: Tensor, text_features: Tensor, pids: Tensor) -> IDOutput:
        pids = self._check(image_features, text_features, pids)
        image_logits, text_logits = (
            self.classifier(to_dtype_of(self.classifier, features)) for features in (image_features, text_features)
        )
        right = self._in_range(pids, image_logits.shape[1])
        return IDOutput(
            loss=nan_unless(right, id_loss(image_logits, text_logits, pids, label_smoothing=self.label_smoothing)),
            image_accuracy=_accuracy(image_logits, pids),
            text_accuracy=_accuracy(text_logits, pids),
        )

    def load_irra_state_dict(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """Copies `classifier.*` out of a whole published checkpoint; see `IRRHead.load_irra_state_dict`."""
        return load_entries(
            self,
            checkpoint_entries(state_dict),
            "build IDHead with the embed_dim and num_identities of the checkpoint",
        )

    def _check(self, image_features: Tensor, text_features: Tensor, pids: Tensor) -> Tensor:
        width = getattr(self.classifier, "in_features", None)
        for name, features in (("image_features", image_features), ("text_features", text_features)):
            check_float(name, features, "B D")
            if width is not None and features.shape[1] != width:
                raise ValueError(
                    f"{name} must have the width embed_dim = {width}, got {describe(features)}; "
                    f"build {self._caller}(embed_dim={features.shape[1]}, ...)"
                )
            check_device(f"{name} and the classifier", features, self.classifier)
        check_same("image_features and text_features", image_features, text_features, dims=[("B", 0)])
        return check_ids("pids", pids, image_features.shape[0], image_features.device)

    def _in_range(self, pids: Tensor, identities: int) -> Tensor | None:
        """Whether all pids are in the range, for compiled code; None where the host has checked them, or need not."""
        if torch.compiler.is_compiling():
            return ((pids >= 0) & (pids < identities)).all()
        if self.check_labels or on_host(pids):
            _check_range(pids, "num_identities", identities, "raise num_identities")
        return None


def _check_range(pids: Tensor, name: str, classes: int, advice: str) -> None:
    low, high = int(pids.min()), int(pids.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"pids must lie in [0, {name} = {classes}), got {low} to {high}; number the training identities from 0 "
            f"without gaps, or {advice}"
        )


def _accuracy(logits: Tensor, pids: Tensor) -> Tensor:
    return (logits.detach().argmax(dim=1) == pids).float().mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
