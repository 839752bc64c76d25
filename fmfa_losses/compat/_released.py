"""What both releases of FMFA share: A-SDM with the cosine gap, and EFA given the joint embeddings."""

from torch import Tensor

from .._pairwise import cosine_scores, divergence, resolve_scale, same_identity, soft_targets
from ..asdm import asdm_loss
from ..distributed import Peers
from ..efa import _released_ranking
from ..ops.hard_similarity import hard_similarity


def released_asdm(
    image_features: Tensor,
    text_features: Tensor,
    pid: Tensor,
    logit_scale: float | Tensor,
    alpha_i2t: float,
    alpha_t2i: float,
    image_id: Tensor | None,
    factor: float,
    epsilon: float,
) -> Tensor:
    """mean_i (1 + alpha gap_i) KL_i of both directions; gap in cosines, to the first column of the largest target."""
    pids = pid.reshape(-1)
    if image_id is None and alpha_i2t == alpha_t2i:
        return asdm_loss(
            image_features,
            text_features,
            pids,
            logit_scale=logit_scale,
            alpha=alpha_t2i,
            gap="cosine",
            positive="first",
            eps=epsilon,
        )
    # Two alphas, or a positive that soft labels choose: too rare for a place in the fused path.
    cos = cosine_scores(image_features, text_features)
    image_ids = None if image_id is None else image_id.reshape(-1)
    target = soft_targets(same_identity(pids, cos), image_ids, factor, "column", cos)
    positive = target.argmax(dim=1, keepdim=True)
    scale = resolve_scale(logit_scale, 1.0, cos)

    def direction(cos: Tensor, alpha: float) -> Tensor:
        gap = cos.max(dim=1).values - cos.gather(1, positive).squeeze(1)
        return ((1 + alpha * gap) * divergence(scale * cos, target, epsilon)).mean()

    return direction(cos, alpha_t2i) + direction(cos.T, alpha_i2t)


def released_alignment(tokens: Tensor, joint: Tensor, margin: float, pool_temperature: float) -> Tensor:
    """Both directions of the released ranking between one modality's tokens and the joint embeddings, a scalar."""
    # The factor 1/lambda that the code leaves out cancels where the rows of S are normalised.
    sim = hard_similarity(tokens, joint, pool_scale=1 / pool_temperature)
    return _released_ranking(sim, margin, 1.0, Peers(sizes=(sim.shape[0],))).mean()
