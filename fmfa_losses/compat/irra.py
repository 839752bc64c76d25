"""IRRA: `model/objectives.py`, and `rank` of `utils/metrics.py`. Source: anosorae/IRRA, arXiv 2303.12501."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads.identity import id_loss
from ..losses.cmpm import cmpm_loss
from ..losses.itc import itc_loss
from ..losses.scores import check_features
from ..losses.sdm import sdm_loss
from ..ops.checks import check_float, check_fraction, check_ids, check_integer, check_positive
from ..ops.precision import accumulation_dtype
from ..retrieval.metrics import similarity_metrics
from .released import flat_ids, released_asdm

__all__ = ["compute_cmpm", "compute_id", "compute_itc", "compute_mcm_or_mlm", "compute_mlm", "compute_sdm", "rank"]

# Rows of similarities that are sorted at a time hold about this many numbers.
SORT_ELEMENTS = 2**24


def compute_sdm(
    image_fetures: Tensor,
    text_fetures: Tensor,
    pid: Tensor,
    logit_scale: float | Tensor,
    image_id: Tensor | None = None,
    factor: float = 0.3,
    epsilon: float = 1e-8,
) -> Tensor:
    """Similarity distribution matching: `SDMLoss`.

    Quirk: with `image_id` the soft labels are divided by the sums of their columns' label rows, so that a row of
    targets need not sum to 1. Without it: `SDMLoss()`.

    Args:
        image_fetures, text_fetures: [B, D].
        pid: [B] or [B, 1] integers.
        logit_scale: 1 / tau, a number or a one-element tensor on any device.
        image_id: [B] integers, for labels factor [same pid] + (1 - factor) [same image].
    Returns:
        Scalar, both directions summed.
    Example:
        >>> features = torch.eye(4)
        >>> compute_sdm(features, features, torch.arange(4), torch.tensor(50.0)) < 1e-6
        tensor(True)
    """
    if image_id is not None:
        return released_asdm(image_fetures, text_fetures, pid, logit_scale, 0.0, 0.0, image_id, factor, epsilon)
    check_features(image_fetures, text_fetures, ("image_fetures", "text_fetures"))
    pids, epsilon = flat_ids("pid", pid, image_fetures), check_positive("epsilon", epsilon)
    check_fraction("factor", factor)
    return sdm_loss(image_fetures, text_fetures, pids, logit_scale=logit_scale, eps=epsilon)


def compute_mlm(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the positions whose label is not 0.

    Quirks: the logits of all B L rows are computed by the caller, and a batch without a label gives NaN. Without
    them: `IRRHead`, which holds IRRA's parameters, projects the masked rows alone and gives 0.

    Args:
        scores: [B L, V].
        labels: [B L] integers, 0 = not masked.
    Returns:
        Scalar.
    Example:
        >>> compute_mlm(torch.zeros(3, 5), torch.tensor([0, 2, 0]))        # log 5
        tensor(1.6094)
    """
    check_float("scores", scores, "BL V")
    labels = check_ids("labels", labels, scores.shape[0], scores.device)
    return F.cross_entropy(scores.to(accumulation_dtype(scores)), labels.long(), ignore_index=0)


compute_mcm_or_mlm = compute_mlm
"""`compute_mlm` by the name that IRRA's first `model/build.py` calls, and codebases made of that."""


def compute_itc(image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor) -> Tensor:
    """InfoNCE: `ITCLoss`.

    Quirk: other images of the same person count as negatives. Without it: `ITCLoss(targets="identity")`.

    Args:
        image_features, text_features: [B, D].
        logit_scale: 1 / tau, a number or a one-element tensor on any device.
    Returns:
        Scalar, the mean of both directions.
    Example:
        >>> compute_itc(torch.ones(4, 2), torch.ones(4, 2), 50.0)          # log 4
        tensor(1.3863)
    """
    return itc_loss(image_features, text_features, logit_scale=logit_scale)


def compute_id(image_logits: Tensor, text_logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of the two cross-entropies over identities: what `IDHead`, which holds the classifier, returns as loss.

    Args:
        image_logits, text_logits: [B, identities].
        labels: [B] integers.
    Returns:
        Scalar.
    Example:
        >>> compute_id(torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, 3, 1]))
        tensor(1.3863)
    """
    check_float("image_logits", image_logits, "B identities")
    labels = check_ids("labels", labels, image_logits.shape[0], image_logits.device)
    return id_loss(image_logits, text_logits, labels)


def compute_cmpm(image_embeddings: Tensor, text_embeddings: Tensor, labels: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Cross-modal projection matching: `CMPMLoss(normalize="released")`.

    Quirks: labels are divided by the L2 norm of their row, so that targets of repeated identities sum to more than 1;
    its docstring promises four results, the code returns one. Without the first: `CMPMLoss(normalize="sum")`.

    Args:
        image_embeddings, text_embeddings: [B, D], not normalised.
        labels: [B] or [B, 1] integer identities.
    Returns:
        Scalar, both directions summed.
    Example:
        >>> features = 100 * torch.eye(4)
        >>> compute_cmpm(features, features, torch.arange(4)) < 1e-6
        tensor(True)
    """
    check_features(image_embeddings, text_embeddings, ("image_embeddings", "text_embeddings"))
    labels, epsilon = flat_ids("labels", labels, image_embeddings), check_positive("epsilon", epsilon)
    return cmpm_loss(image_embeddings, text_embeddings, labels, normalize="released", eps=epsilon)


@torch.no_grad()
def rank(
    similarity: Tensor,
    q_pids: Tensor,
    g_pids: Tensor,
    max_rank: int = 10,
    get_mAP: bool = True,
) -> tuple[Tensor, ...]:
    """CMC, mAP, mINP in percent, and the ranking itself: the core of IRRA's Evaluator.

    Equal scores rank by gallery index here, lower first; the released sort is unstable. A query without a match in the
    gallery is left out of the means; the released code raises an IndexError.

    Quirk: it returns the whole ranking [Q, G] in int64, more memory than the similarities, and callers drop it. Without
    it: `fmfa_losses.retrieval.similarity_metrics`, or `retrieval_metrics` and `Evaluator` from the features, which
    sort nothing.

    Args:
        similarity: [Q, G], higher is better.
        q_pids, g_pids: [Q] and [G] integer identities.
        max_rank: length of the CMC curve.
        get_mAP: False gives the CMC curve and the first max_rank indices alone.
    Returns:
        (cmc [max_rank], mAP, mINP, indices [Q, G]), or (cmc [max_rank], indices [Q, max_rank]).
    Example:
        >>> similarity = torch.tensor([[0.9, 0.5, 0.7, 0.1]])
        >>> cmc, mAP, mINP, indices = rank(similarity, torch.tensor([3]), torch.tensor([1, 3, 3, 2]), max_rank=2)
        >>> cmc, indices
        (tensor([  0., 100.]), tensor([[0, 2, 1, 3]]))
    """
    check_float("similarity", similarity, "Q G")
    shown = min(check_integer("max_rank", max_rank, 1), similarity.shape[1])
    metrics = similarity_metrics(similarity, q_pids.reshape(-1), g_pids.reshape(-1), ranks=range(1, shown + 1))
    cmc, mean_ap, mean_inp = (
        torch.tensor(value, dtype=torch.float32, device=similarity.device)
        for value in (list(metrics.cmc.values()), metrics.mAP, metrics.mINP)
    )
    step = max(1, SORT_ELEMENTS // similarity.shape[1])
    columns = similarity.shape[1] if get_mAP else shown
    blocks = (similarity[i : i + step] for i in range(0, similarity.shape[0], step))
    indices = torch.cat([block.argsort(dim=1, descending=True, stable=True)[:, :columns] for block in blocks])
    return (cmc, mean_ap, mean_inp, indices) if get_mAP else (cmc, indices)
