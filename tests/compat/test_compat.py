"""fmfa_losses.compat against the released code's numbers, its signatures, and its formulas written out."""

import inspect

import pytest
import torch
from helpers.compare import assert_close, assert_finite, value_and_grads
from helpers.golden import golden, load

from fmfa_losses.compat import fmfa, fmfa_2025_04, irra, rde

SCALE = torch.ones([]) * (1 / 0.02)  # as IRRA holds it: 0-dim, on the CPU

FILES = pytest.mark.parametrize("file", ["small", "odd"])
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])


def minmax(text, patches):
    return fmfa.compute_minmax_info_loss(text, patches, fmfa.compute_agg_v(text, patches))


def efa_2025_04(text, patches):
    return fmfa_2025_04.compute_efa(text, patches, fmfa_2025_04.compute_agg_v(text, patches), 0.1, 0.1)


# case -> call, names of the differentiable inputs, names of the others
GOLDEN = {
    "sdm": (lambda i, t, p: irra.compute_sdm(i, t, p, SCALE), ["image_features", "text_features"], ["pids"]),
    "sdm_released_image_id": (
        lambda i, t, p, m: irra.compute_sdm(i, t, p, SCALE, image_id=m),
        ["image_features", "text_features"],
        ["pids", "image_ids"],
    ),
    "itc": (lambda i, t: irra.compute_itc(i, t, SCALE), ["image_features", "text_features"], []),
    "id": (irra.compute_id, ["image_logits", "text_logits"], ["labels"]),
    "cmpm_released": (irra.compute_cmpm, ["image_features", "text_features"], ["pids"]),
    "asdm_released_2025_08": (
        lambda i, t, p: fmfa.compute_sdm(i, t, p, SCALE, use_weight=True),
        ["image_features", "text_features"],
        ["pids"],
    ),
    "asdm_released_2025_04": (
        lambda i, t, p: fmfa_2025_04.compute_a_sdm(i, t, p, SCALE, 10.0, 10.0),
        ["image_features", "text_features"],
        ["pids"],
    ),
    "efa_released_2025_08": (minmax, ["text", "patches"], []),
    "efa_released_2025_04": (efa_2025_04, ["text", "patches"], []),
    "tal_per_sample": (lambda s, p: rde.compute_TAL_per(s, p, 0.02, 0.1), ["scores"], ["pids"]),
    "trl_per_sample": (lambda s, p: rde.compute_TRL_per(s, p), ["scores"], ["pids"]),
}


@FILES
@DTYPES
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, file, dtype, tolerance):
    call, differentiable, others = GOLDEN[name]
    case = golden(name, file)
    inputs = case.leaf_inputs(dtype)
    value = call(*(inputs[key] for key in differentiable + others))
    assert value.dtype == dtype and value.shape == case.value.shape
    value.sum().backward()
    got = [value.detach(), *(inputs[key].grad for key in differentiable)]
    assert_close(got, [case.value, *(case.grads[key] for key in differentiable)], tolerance)


SIGNATURES = {
    irra: {
        "compute_sdm": "image_fetures, text_fetures, pid, logit_scale, image_id=None, factor=0.3, epsilon=1e-08",
        "compute_mlm": "scores, labels",
        "compute_itc": "image_features, text_features, logit_scale",
        "compute_id": "image_logits, text_logits, labels",
        "compute_cmpm": "image_embeddings, text_embeddings, labels, epsilon=1e-08",
        "rank": "similarity, q_pids, g_pids, max_rank=10, get_mAP=True",
    },
    fmfa: {
        "compute_sdm": "image_fetures, text_fetures, pid, logit_scale, image_id=None, factor=0.3, epsilon=1e-08,"
        " use_weight=False",
        "compute_minmax_info_loss": "A, B, C, margin=0.1",
        "compute_agg_v": "text_feats, patch_feats",
    },
    fmfa_2025_04: {
        "compute_a_sdm": "image_fetures, text_fetures, pid, logit_scale, alpha_i2t, alpha_t2i, image_id=None,"
        " factor=0.3, epsilon=1e-08",
        "compute_efa": "text_feat, image_feat, multimodal_feat, margin_t2e, margin_i2e",
    },
    rde: {
        "compute_sdm_per": "scores, pid, logit_scale, epsilon=1e-08",
        "compute_TRL_per": "scores, pid, margin=0.2, tau=0.02",
        "compute_InfoNCE_per": "scores, logit_scale",
        "compute_TAL_per": "scores, pid, tau, margin",
        "compute_rbs": "i_feats, t_feats, i_tse_f, t_tse_f, pid, label_hat=None, tau=0.02, margin=0.1,"
        " loss_type='TAL', logit_scale=50",
        "compute_per_loss": "image_features, text_features, pid, tau=0.02, margin=0.2, loss_type='TAL', logit_scale=50",
        "TexualEmbeddingLayer": "input_dim=512, embed_dim=1024, ratio=0.3",
        "VisualEmbeddingLayer": "input_dim=512, embed_dim=1024, ratio=0.3",
    },
}


def test_signatures_are_the_published_ones():
    for module, functions in SIGNATURES.items():
        for name, published in functions.items():
            parameters = inspect.signature(getattr(module, name)).parameters.values()
            assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == published, name
    for module in (fmfa, fmfa_2025_04):  # what their objectives.py shares with IRRA's
        for name in ("compute_mlm", "compute_itc", "compute_id", "compute_cmpm"):
            assert getattr(module, name) is getattr(irra, name)
    assert fmfa_2025_04.compute_sdm is irra.compute_sdm


def draw(B=9, D=12):
    pids = torch.tensor([3, 3, 1, 2, 1, 0, 3, 4, 5])[:B]
    image_ids = torch.tensor([0, 1, 2, 3, 2, 5, 6, 7, 8])[:B]
    return torch.randn(B, D, dtype=torch.float64), torch.randn(B, D, dtype=torch.float64), pids, image_ids


def released_asdm(image, text, pids, alpha_i2t, alpha_t2i, image_ids=None, factor=0.3):
    """The released equations, written out."""
    y = (pids[:, None] == pids).double()
    if image_ids is not None:
        y = factor * y + (1 - factor) * (image_ids[:, None] == image_ids).double()
    q = y / y.sum(1)  # broadcasts over columns
    top_label = q.argmax(1)
    t2i = torch.nn.functional.normalize(text, dim=1) @ torch.nn.functional.normalize(image, dim=1).T
    total = 0
    for cos, alpha in ((t2i, alpha_t2i), (t2i.T, alpha_i2t)):
        log_p = (50 * cos).log_softmax(1)
        kl = (log_p.exp() * (log_p - (q + 1e-8).log())).sum(1)
        gap = torch.stack([cos[i].max() - cos[i, top_label[i]] for i in range(len(cos))])
        total = total + ((1 + alpha * gap) * kl).mean()
    return total


@pytest.mark.parametrize("with_image_ids", [False, True])
@pytest.mark.parametrize(("alpha_i2t", "alpha_t2i"), [(10.0, 10.0), (1.0, 7.0), (0.0, 3.0)])
def test_a_sdm_takes_an_alpha_a_direction(alpha_i2t, alpha_t2i, with_image_ids):
    image, text, pids, image_ids = draw()
    image_ids = image_ids if with_image_ids else None
    expected = value_and_grads(lambda i, t: released_asdm(i, t, pids, alpha_i2t, alpha_t2i, image_ids), [image, text])
    got = value_and_grads(
        lambda i, t: fmfa_2025_04.compute_a_sdm(i, t, pids, SCALE, alpha_i2t, alpha_t2i, image_id=image_ids),
        [image, text],
    )
    assert_close(got, expected, 1e-9)


def test_weighted_sdm_with_image_ids():
    image, text, pids, image_ids = draw()
    expected = value_and_grads(lambda i, t: released_asdm(i, t, pids, 0.1, 0.1, image_ids, 0.6), [image, text])
    got = value_and_grads(
        lambda i, t: fmfa.compute_sdm(i, t, pids, SCALE, image_ids, factor=0.6, use_weight=True), [image, text]
    )
    assert_close(got, expected, 1e-9)
    unweighted = fmfa.compute_sdm(image, text, pids, SCALE, image_ids)
    torch.testing.assert_close(unweighted, irra.compute_sdm(image, text, pids, SCALE, image_ids))


def test_margin_of_the_minmax_loss_is_ignored():
    text, patches = torch.randn(4, 5, 6), torch.randn(4, 7, 6)
    joint = fmfa.compute_agg_v(text, patches)
    assert torch.equal(
        fmfa.compute_minmax_info_loss(text, patches, joint, margin=0.7),
        fmfa.compute_minmax_info_loss(text, patches, joint),
    )


def test_agg_v_is_the_inline_block():
    text, image = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 1 + 7, 6, dtype=torch.float64)

    def inline(text, patches):
        s = text @ patches.transpose(1, 2)
        low, high = s.amin(2, keepdim=True), s.amax(2, keepdim=True)
        n = (s - low) / (high - low)
        m = n * (n > 1 / n.shape[2])
        return m / m.sum(2, keepdim=True) @ patches

    patches = image[:, 1:, :]
    assert_close(value_and_grads(fmfa.compute_agg_v, [text, patches]), value_and_grads(inline, [text, patches]), 1e-9)
    on_the_threshold = torch.tensor([[[0.0], [1.0], [2.0]]])  # n = 0, 1/2, 1 with 1/N = 1/3; then n = 1/3 itself
    assert fmfa.compute_agg_v(torch.ones(1, 1, 1), on_the_threshold).item() == pytest.approx(5 / 3)
    quarter = torch.tensor([[[0.0], [1.0], [0.0], [4.0]]])  # n = 1/4 = 1/N is out
    assert fmfa.compute_agg_v(torch.ones(1, 1, 1), quarter).item() == 4


def test_mlm():
    scores, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 3, 0, 4, 1, 0])
    log_p = scores.log_softmax(1)
    expected = -(log_p[1, 3] + log_p[3, 4] + log_p[4, 1]) / 3
    torch.testing.assert_close(irra.compute_mlm(scores, labels), expected)
    assert irra.compute_mlm(scores.half(), labels.int()).dtype == torch.float32
    assert irra.compute_mlm(scores, torch.zeros(6, dtype=torch.int64)).isnan()


def test_rde_infonce_and_sdm():
    scores, pids = torch.rand(7, 7, dtype=torch.float64) * 0.2, torch.tensor([0, 1, 0, 2, 3, 1, 0])

    def infonce(s):
        rows, columns = (50 * s).softmax(1), (50 * s).softmax(0)
        return -(rows.diagonal().log() + columns.diagonal().log()) / 2

    def sdm(s):
        same = (pids[:, None] == pids).double()
        log_q = (same / same.sum(1) + 1e-8).log()
        p = [(50 * s).softmax(1), (50 * s.T).softmax(1)]
        return sum((x * (x.log() - log_q)).sum(1) for x in p)

    assert_close(
        value_and_grads(lambda s: rde.compute_InfoNCE_per(s, SCALE), [scores]), value_and_grads(infonce, [scores]), 1e-9
    )
    assert_close(
        value_and_grads(lambda s: rde.compute_sdm_per(s, pids, SCALE), [scores]), value_and_grads(sdm, [scores]), 1e-9
    )


@pytest.mark.parametrize("loss_type", ["TAL", "TRL", "InfoNCE", "SDM"])
def test_rbs(loss_type):
    image, text, pids, _ = draw()
    label_hat = torch.tensor([1.0, 0, 1, 1, 0.5, 1, 0, 1, 1])
    per_loss, cosine = rde.compute_per_loss(image, text, pids, 0.02, 0.1, loss_type, SCALE)
    opposed, _ = rde.compute_per_loss(image, -text, pids, 0.02, 0.1, loss_type, SCALE)
    torch.testing.assert_close(cosine, torch.nn.functional.cosine_similarity(image, text))
    for weight, label in ((label_hat, label_hat), (torch.ones(9), None)):
        bge, tse = rde.compute_rbs(image, text, image, -text, pids, label, loss_type=loss_type, logit_scale=SCALE)
        for got, each in ((bge, per_loss), (tse, opposed)):
            expected = (weight * each).sum()
            torch.testing.assert_close(got, expected if loss_type in ("TAL", "TRL") else expected / weight.sum())
    with pytest.raises(ValueError, match="loss_type must be one of"):
        rde.compute_per_loss(image, text, pids, loss_type="CE")


def published_rank(similarity, q_pids, g_pids):
    """CMC, mAP, mINP of a full sort, query by query."""
    order = similarity.argsort(dim=1, descending=True, stable=True)
    cmc, ap, inp = torch.zeros(10, dtype=torch.float64), [], []
    for row, pid in zip(order, q_pids, strict=True):
        ranks = (g_pids[row] == pid).nonzero()[:, 0] + 1
        cmc[ranks[0] - 1 :] += 1
        ap.append((torch.arange(1, len(ranks) + 1) / ranks).mean())
        inp.append(len(ranks) / ranks[-1])
    return 100 * cmc / len(q_pids), 100 * torch.stack(ap).mean(), 100 * torch.stack(inp).mean(), order


@FILES
def test_rank(file, monkeypatch):
    arrays = {k.split("/")[1]: torch.as_tensor(v) for k, v in load(file).items() if k.startswith("retrieval_metrics/")}
    args = arrays["similarity"], arrays["query_pids"], arrays["gallery_pids"]
    monkeypatch.setattr(irra, "SORT_ELEMENTS", 7 * args[0].shape[1])  # several blocks, the last one smaller
    cmc, mean_ap, mean_inp, indices = irra.rank(*args)
    for got, name in ((cmc, "cmc"), (mean_ap, "mAP"), (mean_inp, "mINP")):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), arrays[name].double(), rtol=1e-6, atol=1e-5)
    expected = published_rank(*args)
    assert torch.equal(indices, expected[3])
    torch.testing.assert_close(cmc.double(), expected[0], rtol=1e-6, atol=1e-5)
    first, top = irra.rank(*args, max_rank=3, get_mAP=False)
    assert torch.equal(first, cmc[:3]) and torch.equal(top, indices[:, :3])
    assert irra.rank(*args, max_rank=1000)[0].shape == (args[0].shape[1],)


def test_accepts_what_the_originals_accept():
    """pid as a column, int32, a 0-dim scale of another dtype, half-precision features."""
    image, text, pids, image_ids = draw()
    expected = irra.compute_sdm(image, text, pids, SCALE, image_ids)
    column = pids[:, None].int()
    torch.testing.assert_close(irra.compute_sdm(image, text, column, SCALE.double(), image_ids[:, None]), expected)
    torch.testing.assert_close(irra.compute_cmpm(image, text, column), irra.compute_cmpm(image, text, pids))
    scores = torch.rand(9, 9)
    torch.testing.assert_close(
        rde.compute_TAL_per(scores, column, 0.02, 0.1), rde.compute_TAL_per(scores, pids, 0.02, 0.1)
    )
    half = irra.compute_sdm(image.half(), text.half(), pids, SCALE)
    torch.testing.assert_close(half, irra.compute_sdm(image.half().float(), text.half().float(), pids, SCALE))
    for dtype in (torch.float16, torch.bfloat16):
        text_tokens, patches = torch.randn(3, 5, 8).to(dtype), torch.randn(3, 7, 8).to(dtype)
        assert minmax(text_tokens, patches).dtype == torch.float32
        torch.testing.assert_close(minmax(text_tokens, patches), minmax(text_tokens.float(), patches.float()))


def test_finite_where_the_originals_are_not():
    pids = torch.zeros(4, dtype=torch.int64)
    scores = torch.full((4, 4), 0.9, requires_grad=True)
    value = rde.compute_TAL_per(scores, pids, 0.01, 0.1)
    value.sum().backward()
    assert not value.any() and not scores.grad.any()
    with torch.no_grad():
        assert rde.compute_TRL_per(scores - 0.8, pids, tau=0.001).allclose(torch.tensor(2 * (0.2 - 0.1)))
    zeros = torch.zeros(4, 8, requires_grad=True)
    value = irra.compute_sdm(zeros, torch.randn(4, 8), torch.arange(4), SCALE)
    value.backward()
    assert_finite([value.detach(), zeros.grad])
    constant = torch.ones(2, 3, 4, requires_grad=True)
    value = minmax(torch.randn(2, 5, 4), constant)
    value.backward()
    assert_finite([value.detach(), constant.grad])
