"""What released code does otherwise than the papers say, on whole [B, B] matrices and by autograd.

SDM, A-SDM    t_ij = y_ij / sum_k y_jk: soft labels divided by the sum of their column's label row
A-SDM         gap_i = max_k cos_ik - cos_i,f(i): in cosines, to the first column f(i) of the largest target
EFA           its ranking, of joint embeddings that the caller has made
ids           [B] or [B, 1]
"""

from torch import Tensor

from ..distributed.peers import Peers
from ..losses.efa import _released_ranking
from ..losses.scores import check_features, cosine_scores, divergence, resolve_scale, same_identity
from ..ops.checks import (
    check_finite,
    check_float,
    check_fraction,
    check_ids,
    check_nonnegative,
    check_positive,
    check_same,
    integer_ids,
)
from ..ops.hard_similarity import hard_similarity


def flat_ids(name: str, ids: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, 1] of any integer dtype -> [B]; a sample of `like` [B, ...] each."""
    return check_ids(name, integer_ids(name, ids, "B").reshape(-1), like.shape[0], like.device)


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
    """mean_i (1 + alpha gap_i) KL_i of both directions, a scalar; SDM where both alphas are 0."""
    check_features(image_features, text_features, ("image_fetures", "text_fetures"))
    pids = flat_ids("pid", pid, image_features)
    image_ids = None if image_id is None else flat_ids("image_id", image_id, image_features)
    alpha_i2t, alpha_t2i = check_nonnegative("alpha_i2t", alpha_i2t), check_nonnegative("alpha_t2i", alpha_t2i)
    factor, epsilon = check_fraction("factor", factor), check_positive("epsilon", epsilon)
    cos = cosine_scores(image_features, text_features)
    y = same_identity(pids, cos).to(cos.dtype)
    if image_ids is not None:
        y = factor * y + (1 - factor) * same_identity(image_ids, cos).to(cos.dtype)
    target = y / y.sum(dim=1)
    positive = target.argmax(dim=1, keepdim=True)
    scale = resolve_scale(logit_scale, 1.0, cos)

    def direction(cos: Tensor, alpha: float) -> Tensor:
        gap = cos.max(dim=1).values - cos.gather(1, positive).squeeze(1)
        return ((1 + alpha * gap) * divergence(scale * cos, target, epsilon)).mean()

    return direction(cos, alpha_t2i) + direction(cos.T, alpha_i2t)


def released_alignment(
    tokens: Tensor, joint: Tensor, margin: float, pool_temperature: float, names: tuple[str, str, str]
) -> Tensor:
    """Both directions of the released ranking between one modality's tokens and the joint embeddings, a scalar.

    `names` are those of tokens, joint and margin in the published signature.
    """
    check_float(names[0], tokens, "B T D")
    check_float(names[1], joint, "B L D")
    check_same(" and ".join(names[:2]), tokens, joint, dims=[("B", 0), ("D", 2)])
    margin = check_finite(names[2], margin)
    # The factor 1/lambda that the code leaves out cancels where the rows of S are normalised.
    sim = hard_similarity(tokens, joint, pool_scale=1 / pool_temperature)
    return _released_ranking(sim, margin, 1.0, Peers(sizes=(sim.shape[0],))).mean()
