"""What released code does otherwise than the papers say, on whole [B, B] matrices and by autograd.

SDM, A-SDM    t_ij = y_ij / sum_k y_jk: soft labels divided by the sum of their column's label row
A-SDM         gap_i = max_k cos_ik - cos_i,f(i): in cosines, to the first column f(i) of the largest target
EFA           its ranking, of joint embeddings that the caller has made
ids           [B] or [B, 1]
"""

from functools import partial

import torch
from torch import Tensor

from ..losses.scores import check_features, cosine_scores, divergence, resolve_scale, same_identity
from ..ops.aggregation import aggregate
from ..ops.backend import select_backend
from ..ops.checks import (
    check_finite,
    check_float,
    check_fraction,
    check_ids,
    check_mask,
    check_nonnegative,
    check_positive,
    check_same,
    integer_ids,
)
from ..ops.hard_similarity import hard_similarity
from ..ops.options import Backend
from ..ops.precision import unit_rows


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


def released_aggregate(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_mask: Tensor | None = None,
    backend: Backend = "auto",
    names: tuple[str, str] = ("image_tokens", "text_tokens"),
) -> Tensor:
    """`sparse_aggregate` of the patches that lie strictly above the threshold 1/N, [B, L, D]; `names` for messages."""
    check_float(names[0], image_tokens, "B N D")
    check_float(names[1], text_tokens, "B L D")
    check_same(" and ".join(names), image_tokens, text_tokens, dims=[("B", 0), ("D", 2)])
    check_mask("image_mask", image_mask, image_tokens)
    chosen = select_backend(backend, image_tokens, text_tokens)
    return aggregate(image_tokens, text_tokens, image_mask, None, chosen, strict=True)


def released_efa(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    margin_text: float = 0.1,
    margin_image: float = 0.9,
    pool_scale: float = 1.0,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """EFA as released in 2025-08; of 2025-04 with margin_image=0.1, pool_scale=10.

        L = sum_x mean_j [ log (1 + sum_{i != j} exp(R_ij - R_ii + margin_x))
                         + log (1 + sum_{i != j} exp(R_ij - R_jj + margin_x)) ]    x in {text, image}, R_i = S_i / |S_i|

    Quirks: a patch must lie strictly above the threshold; each row of S is L2-normalised, so that the factor
    1 / pool_scale does not matter; the positive pair stays in the sum as exp(0); both directions are sums over the rows
    of S. Without them: `EFALoss()`, Eq. 5-12.

    Args:
        image_tokens: [B, N, D], any float dtype; patches without [CLS].
        text_tokens: [B, L, D].
        margin_text, margin_image: margins of the text and the image terms.
        pool_scale: lambda > 0 of the pooling over tokens.
        image_mask, text_mask: [B, N] and [B, L] bool, True = keep; the released code has no masks.
        backend: "auto", "triton" or "torch".
    Returns:
        Scalar, float32 (float64 when an input is).
    Raises:
        TypeError, ValueError: shapes, dtypes, devices, masks or numbers that do not fit.
        RuntimeError: backend="triton" cannot run; the message says why.
    Example:
        >>> tokens = torch.eye(4).unsqueeze(1)                          # four pairs, all orthogonal
        >>> released_efa(tokens, tokens, margin_image=0.1)              # 4 log (1 + 3 exp(0.1 - 1))
        tensor(3.1895)
    """
    margin_text, margin_image = check_finite("margin_text", margin_text), check_finite("margin_image", margin_image)
    joint = released_aggregate(image_tokens, text_tokens, image_mask=image_mask, backend=backend)
    check_mask("text_mask", text_mask, text_tokens)
    similarity = partial(hard_similarity, e=joint, e_mask=text_mask, pool_scale=pool_scale, backend=backend)
    text_sim = similarity(text_tokens, x_mask=text_mask)
    image_sim = similarity(image_tokens, x_mask=image_mask)
    return _ranking(text_sim, margin_text) + _ranking(image_sim, margin_image)


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
    return _ranking(hard_similarity(tokens, joint, pool_scale=1 / pool_temperature), margin)


def _ranking(sim: Tensor, margin: float) -> Tensor:
    """Both directions of S [B, B]: rows of length 1, the positive pair as exp(0), sums over the rows; a scalar."""
    sim = unit_rows(sim)
    positive = sim.diagonal()
    own = torch.eye(sim.shape[0], dtype=torch.bool, device=sim.device)
    total = sim.new_zeros(())
    for reference in (positive.unsqueeze(1), positive):
        total = total + (sim - reference + margin).masked_fill(own, 0).logsumexp(dim=0).mean()
    return total
