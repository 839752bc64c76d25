"""The released objectives, each written down plainly from its formula: what doctor's suggestions are compared with."""

import torch
import torch.nn.functional as F


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def same(pid):
    return (pid[:, None] == pid[None]).double()


def kl(logits, target, eps=1e-8):
    """[B], of every row."""
    return (logits.softmax(1) * (logits.log_softmax(1) - (target + eps).log())).sum(1)


def compute_sdm(
    image_fetures, text_fetures, pid, logit_scale, image_id=None, factor=0.3, epsilon=1e-8, use_weight=False
):
    alpha = 0.1 if use_weight else 0.0
    return compute_a_sdm(image_fetures, text_fetures, pid, logit_scale, alpha, alpha, image_id, factor, epsilon)


def compute_a_sdm(
    image_fetures, text_fetures, pid, logit_scale, alpha_i2t, alpha_t2i, image_id=None, factor=0.3, epsilon=1e-8
):
    y = same(pid)
    if image_id is not None:
        y = factor * y + (1 - factor) * same(image_id)
    target = y / y.sum(1)
    cosines = unit(text_fetures) @ unit(image_fetures).T
    total = 0
    for cos, alpha in ((cosines, alpha_t2i), (cosines.T, alpha_i2t)):
        first = target.argmax(1)
        gap = cos.max(1).values - cos[torch.arange(len(cos)), first]
        total = total + ((1 + alpha * gap) * kl(logit_scale * cos, target, epsilon)).mean()
    return total


def compute_itc(image_features, text_features, logit_scale):
    return compute_InfoNCE_per(unit(text_features) @ unit(image_features).T, logit_scale).mean()


def compute_cmpm(image_embeddings, text_embeddings, labels, epsilon=1e-8):
    y = same(labels)
    target = y / y.norm(dim=1, keepdim=True)
    t2i = text_embeddings @ unit(image_embeddings).T
    i2t = image_embeddings @ unit(text_embeddings).T
    return kl(t2i, target, epsilon).mean() + kl(i2t, target, epsilon).mean()


def compute_id(image_logits, text_logits, labels):
    return (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2


def compute_mlm(scores, labels):
    masked = labels != 0
    return F.cross_entropy(scores[masked], labels[masked])


compute_mcm_or_mlm = compute_mlm


def aggregate(text, patches):
    similarity = text @ patches.transpose(1, 2)
    low, high = similarity.amin(2, keepdim=True), similarity.amax(2, keepdim=True)
    share = (similarity - low) / (high - low)
    share = share * (share > 1 / share.shape[2])
    return (share / share.sum(2, keepdim=True)) @ patches


def alignment(tokens, joint, margin, temperature):
    matches = torch.einsum("ind,jld->ijnl", unit(tokens), unit(joint)).amax(3)
    similarity = unit((matches / temperature).logsumexp(2))
    own = similarity.diag()
    total = 0
    for positive in (own[:, None], own[None]):
        cost = similarity - positive + margin
        total = total + cost.masked_fill(torch.eye(len(cost), dtype=torch.bool), 0).exp().sum(0).log().mean()
    return total


def compute_minmax_info_loss(A, B, C, margin=0.1):
    return alignment(A, C, 0.1, 1.0) + alignment(B, C, 0.9, 1.0)


def compute_efa(text_feat, image_feat, multimodal_feat, margin_t2e, margin_i2e):
    return alignment(text_feat, multimodal_feat, margin_t2e, 0.1) + alignment(
        image_feat, multimodal_feat, margin_i2e, 0.1
    )


def positive(scores, y, tau):
    weight = ((scores / tau).exp() * y).detach()
    return (weight / weight.sum(1, keepdim=True) * scores).sum(1)


def compute_TAL_per(scores, pid, tau, margin):  # noqa: N802
    y, total = same(pid), 0
    for s in (scores, scores.T):
        hardness = tau * ((s / tau).exp() * (1 - y)).sum(1).log()
        total = total + (margin - positive(s, y, tau) + hardness).clamp(min=0)
    return total


def compute_TRL_per(scores, pid, margin=0.2, tau=0.02):  # noqa: N802
    y, total = same(pid), 0
    for s in (scores, scores.T):
        total = total + (margin - positive(s, y, tau) + ((1 - y) * s).amax(1)).clamp(min=0)
    return total


def compute_sdm_per(scores, pid, logit_scale, epsilon=1e-8):
    target = same(pid) / same(pid).sum(1, keepdim=True)
    return kl(logit_scale * scores, target, epsilon) + kl(logit_scale * scores.T, target, epsilon)


def compute_InfoNCE_per(scores, logit_scale):  # noqa: N802
    return -sum((logit_scale * s).log_softmax(1).diag() for s in (scores, scores.T)) / 2


def compute_per_loss(image_features, text_features, pid, tau=0.02, margin=0.2, loss_type="TAL", logit_scale=50):
    scores = unit(text_features) @ unit(image_features).T
    losses = {
        "TAL": lambda: compute_TAL_per(scores, pid, tau, margin),
        "TRL": lambda: compute_TRL_per(scores, pid, margin, tau),
        "InfoNCE": lambda: compute_InfoNCE_per(scores, logit_scale),
        "SDM": lambda: compute_sdm_per(scores, pid, logit_scale),
    }
    return losses[loss_type](), scores.diag()


def compute_rbs(
    i_feats, t_feats, i_tse_f, t_tse_f, pid, label_hat=None, tau=0.02, margin=0.1, loss_type="TAL", logit_scale=50
):
    options = pid, tau, margin, loss_type, logit_scale
    totals = [(label_hat * compute_per_loss(i, t, *options)[0]).sum() for i, t in
              ((i_feats, t_feats), (i_tse_f, t_tse_f))]  # fmt: skip
    return tuple(t if loss_type in ("TAL", "TRL") else t / label_hat.sum() for t in totals)


def rank(similarity, q_pids, g_pids, max_rank=10, get_mAP=True):
    order = similarity.argsort(dim=1, descending=True)
    matches = g_pids[order] == q_pids[:, None]
    cmc = 100 * (matches[:, :max_rank].cumsum(1) > 0).float().mean(0)
    places = torch.arange(1, matches.shape[1] + 1)
    precision = (matches.cumsum(1) / places * matches).sum(1) / matches.sum(1)
    last = (matches * places).amax(1)
    return cmc, 100 * precision.mean(), 100 * (matches.sum(1) / last).mean(), order
