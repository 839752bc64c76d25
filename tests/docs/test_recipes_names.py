"""docs/recipes, the tables "there | here": where a line says that values are equal, they are."""

from types import SimpleNamespace

import pytest
import torch
from helpers.recipes import run_recipe
from torch.nn.functional import cross_entropy, kl_div, logsigmoid, normalize

from fmfa_losses import CMPMLoss, ITCLoss, SDMLoss, SigmoidLoss, SimCLRLoss, TripletLoss
from fmfa_losses.compat import irra
from fmfa_losses.functional import hard_similarity, itc_loss_from_scores
from fmfa_losses.retrieval import retrieval_metrics

PIDS, DISTINCT = torch.tensor([0, 0, 1, 2, 3, 3, 3, 4]), torch.arange(8)
close = torch.testing.assert_close


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 16, dtype=torch.float64, generator=generator) for _ in range(2)]


def test_irra(pair):
    image, text = pair
    close(SDMLoss()(image, text, PIDS, logit_scale=50.0), irra.compute_sdm(image, text, PIDS, 50.0))
    close(ITCLoss()(image, text, logit_scale=50.0), irra.compute_itc(image, text, 50.0))
    close(CMPMLoss(normalize="released")(image, text, PIDS), irra.compute_cmpm(image, text, PIDS))


def test_open_clip(pair):
    """Its losses as written: products of normalised features, a softmax or a sigmoid over them."""
    (image, text), (teacher_image, teacher_text) = pair, [x.flip(1) for x in pair]
    logits, teacher = (50 * normalize(a) @ normalize(b).T for a, b in ((image, text), (teacher_image, teacher_text)))
    clip = (cross_entropy(logits, DISTINCT) + cross_entropy(logits.T, DISTINCT)) / 2
    close(ITCLoss()(image, text, logit_scale=50.0), clip)
    distill = sum(
        -(t.softmax(1) * s.log_softmax(1)).sum(1).mean() / 2 for t, s in ((teacher, logits), (teacher.T, logits.T))
    )
    both = ITCLoss(softlabel_ratio=0.5)
    momentum = {"momentum_features": (teacher_image, teacher_text), "logit_scale": 50.0}
    close(2 * both(image, text, **momentum), clip + distill)
    labels = 2 * torch.eye(8, dtype=torch.float64) - 1
    siglip = -logsigmoid(labels * (logits / 5 - 10)).sum() / 8
    close(SigmoidLoss(positives="paired")(image, text, logit_scale=10.0, logit_bias=-10.0), siglip)


def test_hugging_face():
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 60, "bos_token_id": 57, "eos_token_id": 58, "pad_token_id": 0}
    inputs = {
        "input_ids": torch.randint(1, 57, (4, 9)),
        "pixel_values": torch.randn(4, 3, 32, 32),
        "return_loss": True,
    }
    inputs["input_ids"][:, -1] = 58
    vision = {**tower, "image_size": 32, "patch_size": 16}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**tower, **ids}, vision_config=vision, projection_dim=32)
    )
    with torch.no_grad():
        out, scale = clip(**inputs), clip.logit_scale.exp()
        close(ITCLoss()(out.image_embeds, out.text_embeds, logit_scale=scale), out.loss)
        close(itc_loss_from_scores(out.logits_per_text, logit_scale=1.0), out.loss)
        siglip = transformers.SiglipModel(
            transformers.SiglipConfig(text_config={**tower, **ids}, vision_config=vision)
        ).eval()
        out = siglip(**inputs)
        ours = SigmoidLoss(positives="paired")(
            out.image_embeds, out.text_embeds, logit_scale=siglip.logit_scale.exp(), logit_bias=siglip.logit_bias
        )
    close(ours.reshape(()), out.loss.reshape(()))


@pytest.fixture
def metric_learning():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners, reducers

    return SimpleNamespace(distances=distances, losses=losses, miners=miners, reducers=reducers)


def both_ways(loss, image, text, labels):
    ways = (text, image), (image, text)
    return sum(loss(query, labels, ref_emb=key, ref_labels=labels.clone()) for query, key in ways)


def test_metric_learning_losses(metric_learning, pair):
    image, text = pair
    losses, cosine = metric_learning.losses, metric_learning.distances.CosineSimilarity()
    close(both_ways(losses.NTXentLoss(0.07), image, text, DISTINCT), 2 * ITCLoss(0.07)(image, text))
    n_itc = 2 * ITCLoss(0.07, targets="identity")(image, text, PIDS)
    close(both_ways(losses.SupConLoss(0.07), image, text, PIDS), n_itc)
    assert not torch.isclose(both_ways(losses.NTXentLoss(0.07), image, text, PIDS), n_itc, rtol=1e-2)
    close(losses.SelfSupervisedLoss(losses.NTXentLoss(0.1))(text, image), SimCLRLoss(0.1)(text, image))

    mine = metric_learning.miners.BatchHardMiner(distance=cosine)
    triplet = losses.TripletMarginLoss(0.2, distance=cosine, reducer=metric_learning.reducers.MeanReducer())

    def hardest(query, labels, ref_emb, ref_labels):
        triplets = mine(query, labels, ref_emb, ref_labels)
        return triplet(query, labels, triplets, ref_emb=ref_emb, ref_labels=ref_labels)

    close(both_ways(hardest, image, text, DISTINCT), TripletLoss(0.2, negatives="all")(image, text))


def test_metric_learning_drops_the_pair_where_both_labels_are_one_tensor(metric_learning, pair):
    image, text = pair
    loss = metric_learning.losses.NTXentLoss(0.07)
    assert loss(text, DISTINCT, ref_emb=image, ref_labels=DISTINCT) == 0
    assert loss(text, DISTINCT, ref_emb=image, ref_labels=DISTINCT.clone()) > 1


def test_metric_learning_page(metric_learning, pair):
    image, text = pair
    done = run_recipe("pytorch_metric_learning", image=image, text=text, pids=PIDS)
    close(done.theirs, done.ours)


def test_metric_learning_accuracies(metric_learning, pair):
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    image, text = (x.float() for x in pair)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision"),
        k=None,
        knn_func=CustomKNN(metric_learning.distances.CosineSimilarity()),
    )
    theirs = calculator.get_accuracy(text, PIDS, image, PIDS)
    ours = retrieval_metrics(text, image, PIDS, PIDS).t2i
    assert ours.cmc[1] == pytest.approx(100 * theirs["precision_at_1"])
    assert ours.mAP == pytest.approx(100 * theirs["mean_average_precision"])


def colbert_scores(queries, documents, documents_mask=None, queries_mask=None):
    """MaxSim as PyLate writes it: masks are factors."""
    scores = torch.einsum("ash,bth->abst", queries, documents)
    if queries_mask is not None:
        scores = scores * queries_mask[:, None, :, None]
    if documents_mask is not None:
        scores = scores * documents_mask[None, :, None, :]
    return scores.amax(-1).sum(-1)


def test_pylate(pair):
    generator = torch.Generator().manual_seed(0)
    text, image = (torch.randn(5, size, 8, dtype=torch.float64, generator=generator) for size in (7, 12))
    text_mask = torch.arange(7) < torch.tensor([7, 3, 5, 1, 0])[:, None]
    image_mask = torch.arange(12) < torch.tensor([12, 6, 2, 12, 0])[:, None]
    words, patches = normalize(text, dim=-1), normalize(image, dim=-1)

    def ours(**masks):
        return hard_similarity(text, image, pool="sum", **masks)

    close(ours(), colbert_scores(words, patches))
    close(ours(x_mask=text_mask), colbert_scores(words, patches, None, text_mask))
    assert not torch.allclose(ours(), colbert_scores(text, image))  # not normalised
    best = torch.einsum("ash,bth->abst", words, patches).masked_fill(~image_mask[None, :, None], -2).amax(-1)
    masked, theirs = ours(e_mask=image_mask), colbert_scores(words, patches, image_mask)
    fits = (best >= 0).all(-1) | ~image_mask.any(1)  # no word whose best match is below a masked token's 0
    close(masked[fits], theirs[fits])
    assert fits.any() and not torch.allclose(masked, theirs) and (masked[:, -1] == theirs[:, -1]).all()

    done = run_recipe(
        "pylate", text_tokens=text.requires_grad_(), image_tokens=image, text_mask=text_mask, pids=torch.arange(5) // 2
    )
    close(done.scores, colbert_scores(words, patches, None, text_mask))
    close(done.contrastive, cross_entropy(done.scores, torch.arange(5)))
    assert text.grad.isfinite().all() and text.grad.any()


def test_pylate_distillation(pair):
    """Without the min-max: the gradients of KL(teacher, student) in both directions."""
    scores, teacher = (x[:, :8].clone().requires_grad_() for x in pair)
    soft = (teacher.detach().softmax(1), teacher.detach().T.softmax(1))
    ours = 2 * itc_loss_from_scores(scores, soft_targets=soft, temperature=1.0)
    theirs = sum(
        kl_div(s.log_softmax(1), t.detach().log_softmax(1), log_target=True, reduction="batchmean")
        for s, t in ((scores, teacher), (scores.T, teacher.T))
    )
    close(*(torch.autograd.grad(loss, scores) for loss in (ours, theirs)))
