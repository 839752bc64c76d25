"""Every kind of suggestion is run: the same value where doctor says so, another one where it says that."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from helpers import released_formulas

import fmfa_losses
from fmfa_losses import compat, functional, retrieval
from fmfa_losses.doctor.codebase import examine
from fmfa_losses.doctor.codebase.source.published import MODULES, PUBLISHED

B, D, L, N = 6, 16, 5, 9


def names():
    """What the calls below and the suggestions for them are evaluated with."""
    torch.manual_seed(0)
    pids = torch.tensor([0, 1, 0, 2, 3, 1])
    i, t, i2, t2 = torch.randn(4, B, D, dtype=torch.float64).unbind()
    t = t + 0.5 * i
    text, patches = torch.randn(B, L, D, dtype=torch.float64), torch.randn(B, N, D, dtype=torch.float64)
    args = SimpleNamespace(tau=0.05, margin=0.3, use_weight=True, loss_type="TRL", eps=1e-3, alpha=5.0, max_rank=4)
    return {
        **{name: getattr(fmfa_losses, name) for name in fmfa_losses.__all__},
        **{name: getattr(functional, name) for name in functional.__all__},
        **{name: getattr(retrieval, name) for name in retrieval.__all__},
        "compat": compat,
        "torch": torch,
        "objectives": released_formulas,
        "rank": released_formulas.rank,
        "i": i, "t": t, "i2": i2, "t2": t2, "pids": pids, "image_ids": torch.tensor([0, 1, 2, 3, 0, 4]),
        "scale": torch.tensor(10.0), "scores": released_formulas.unit(t) @ released_formulas.unit(i).T,
        "w": torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64), "args": args,
        "text": text, "patches": patches, "agg": released_formulas.aggregate(text, patches),
        "logits": torch.randn(B, 4, dtype=torch.float64), "words": torch.tensor([0, 1, 0, 2, 3, 1]),
        "similarity": torch.rand(B, 7), "g": torch.tensor([0, 1, 2, 3, 0, 1, 2]),
    }  # fmt: skip


# The call, and how many suggestions of the same and of another value it gets (those on `self` are not counted).
CALLS = {
    "compute_sdm(i, t, pids, scale)": (1, 0),
    "compute_sdm(i, t, pids, scale, epsilon=args.eps)": (1, 0),
    "compute_sdm(i, t, pid=pids, logit_scale=scale, use_weight=False)": (1, 0),
    "compute_sdm(i, t, pids, scale, use_weight=args.use_weight)": (1, 1),
    "compute_sdm(i, t, pids, scale, image_ids, factor=0.4)": (1, 1),
    "compute_a_sdm(i, t, pids, scale, args.alpha, 10.0)": (1, 1),
    "compute_itc(i, t, scale)": (1, 0),
    "compute_cmpm(i, t, pids)": (1, 1),
    "compute_cmpm(i, t, pids, args.eps)": (1, 1),
    "compute_id(logits, 2 * logits, words)": (1, 0),
    "compute_mlm(logits, words)": (1, 0),
    "compute_mcm_or_mlm(logits, words)": (1, 0),
    "compute_minmax_info_loss(text, patches, agg)": (1, 1),
    "compute_efa(text, patches, agg, 0.2, args.margin)": (1, 1),
    "compute_TAL_per(scores, pids, args.tau, margin=args.margin)": (1, 0),
    "compute_TRL_per(scores - 0.5, pids, tau=args.tau)": (1, 1),
    "compute_TRL_per(scores - 1, pids)": (1, 1),
    "compute_sdm_per(scores, pids, scale, args.eps)": (1, 0),
    "compute_InfoNCE_per(scores, scale)": (1, 0),
    "compute_per_loss(i, t, pids)": (2, 0),
    "compute_per_loss(i, t, pids, tau=args.tau, margin=args.margin, loss_type='TRL')": (2, 0),
    "compute_per_loss(i, t, pids, loss_type='InfoNCE', logit_scale=scale)": (2, 0),
    "compute_per_loss(i, t, pids, loss_type='SDM', logit_scale=scale)": (2, 0),
    "compute_per_loss(i, t, pids, loss_type=args.loss_type, margin=args.margin)": (1, 0),
    "compute_rbs(i, t, i2, t2, pids, w)": (2, 1),
    "compute_rbs(i, t, i2, t2, pids, label_hat=w, loss_type='TRL', tau=args.tau, margin=args.margin)": (2, 1),
    "compute_rbs(i, t, i2, t2, pids, label_hat=w, loss_type='InfoNCE', logit_scale=scale)": (2, 0),
    "compute_rbs(i, t, i2, t2, pids, label_hat=w, loss_type='SDM', logit_scale=scale)": (2, 0),
    "compute_rbs(i, t, i2, t2, pids, label_hat=w, loss_type=args.loss_type)": (1, 0),
}


def suggestions_for(tmp_path, source):
    file = tmp_path / "build.py"
    file.write_text(source)
    (finding,) = examine(file).findings
    return finding


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """The findings for all calls, of one scan."""
    file = tmp_path_factory.mktemp("codebase") / "build.py"
    file.write_text("from model import objectives\n" + "".join(f"objectives.{call}\n" for call in CALLS))
    return dict(zip(CALLS, examine(file).findings, strict=True))


def differ(one, other):
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return any(a.shape != b.shape or not torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-9) for a, b in pairs)


@pytest.mark.parametrize("call", CALLS)
def test_a_suggestion_has_the_value_that_is_said(findings, call):
    finding = findings[call]
    known = names()
    expected = eval(finding.code, known)
    same = [s for s in finding.suggestions if s.same_value and not s.write.startswith("self.")]
    other = [s for s in finding.suggestions if not s.same_value]
    assert (len(same), len(other)) == CALLS[call]
    assert finding.suggestions[0].same_value  # the same value stands first
    for suggestion in same:
        assert not differ(expected, eval(suggestion.write, known)), suggestion.write
    for suggestion in other:
        assert len(suggestion.why) > 30
        assert differ(expected, eval(suggestion.write, known)), suggestion.write


def test_every_published_function_is_tried():
    assert {call.partition("(")[0] for call in CALLS} == PUBLISHED.keys() - {"rank"}


def test_what_is_known_of_published_functions_is_what_compat_has():
    for module, has in MODULES.items():
        for name in has:
            plain = name.partition("(")[0]
            function = getattr(getattr(compat, module), plain)
            parameters = inspect.signature(function).parameters
            known = PUBLISHED[plain]
            assert tuple(parameters) == known.parameters[: len(parameters)]
            assert set(known.parameters[len(parameters) :]) <= {"use_weight"}
            for key, parameter in parameters.items():
                assert (key in known.defaults) == (parameter.default is not parameter.empty)
                assert key not in known.defaults or eval(known.defaults[key]) == parameter.default


AGGREGATION = """
def forward(text, patches):
    s = torch.matmul(text, patches.transpose(1, 2))
    low, high = s.amin(2, keepdim=True), s.amax(2, keepdim=True)
    s = (s - low) / (high - low)
    limit = 1.0 / s.size(2)
    s = torch.where(s > limit, s, torch.zeros_like(s))
    s = s / s.sum(dim=2, keepdim=True)
    joint = s @ patches
    return joint
"""


def test_the_aggregation_is_found_by_what_it_does(tmp_path):
    finding = suggestions_for(tmp_path, AGGREGATION)
    assert (finding.line, finding.kind) == (3, "aggregation")
    known = names()
    namespace = {"torch": torch}
    exec(AGGREGATION, namespace)
    expected = namespace["forward"](known["text"], known["patches"])
    exact, paper = finding.suggestions
    assert exact.same_value and not paper.same_value
    torch.testing.assert_close(eval(exact.write, known), expected)
    torch.testing.assert_close(expected, known["agg"])
    # One patch exactly at the threshold 1 / 2 is where the paper's form differs.
    known |= {"text": torch.tensor([[[1.0]]]), "patches": torch.tensor([[[0.0], [2.0], [1.0], [0.5]]])}
    expected = namespace["forward"](known["text"], known["patches"])
    torch.testing.assert_close(eval(exact.write, known), expected)


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("s = (s - low) / (high - low)", "s = torch.softmax(s, dim=2)"),
        ("s = (s - low) / (high - low)", "s = (s - low) / (high - low + 1e-6)"),
        ("limit = 1.0 / s.size(2)", "limit = 20.0 / s.size(2)"),
        ("    s = s / s.sum(dim=2, keepdim=True)\n", ""),
        ("    s = s / s.sum(dim=2, keepdim=True)\n", "    s = s / s.sum(dim=2, keepdim=True)\n    s *= 2\n"),
        ("s > limit", "s >= limit"),
    ],
)
def test_another_aggregation_is_left_alone(tmp_path, there, instead):
    assert there in AGGREGATION
    file = tmp_path / "build.py"
    file.write_text(AGGREGATION.replace(there, instead))
    assert not examine(file).findings


RANK = "from utils.metrics import rank\ncmc, mAP, mINP, _ = rank(similarity=similarity, q_pids=pids, g_pids=g{})\n"


@pytest.mark.parametrize("more", ["", ", max_rank=4", ", max_rank=args.max_rank, get_mAP=True"])
def test_scores_at_hand_get_similarity_metrics(tmp_path, more):
    finding = suggestions_for(tmp_path, RANK.format(more))
    known = names()
    cmc, mean_ap, mean_inp, order = eval(finding.code, known)
    same_tuple, metrics = (eval(s.write, known) for s in finding.suggestions)
    assert all(s.same_value for s in finding.suggestions) and finding.kind == "ranking"
    for got, expected in zip(same_tuple, (cmc, mean_ap, mean_inp, order), strict=True):
        assert torch.allclose(got.double(), expected.double())
    assert metrics.mAP == pytest.approx(mean_ap.item()) and metrics.mINP == pytest.approx(mean_inp.item())
    for k, value in metrics.cmc.items():
        assert k > len(cmc) or value == pytest.approx(cmc[k - 1].item())


FEATURES = """
from utils.metrics import rank

def evaluate(t, i, pids, g):
    {}
    similarity = t @ i.t()
    result = rank(similarity=similarity{}, q_pids={}, g_pids={})
"""


@pytest.mark.parametrize(
    "lengths",
    ["t, i = F.normalize(t, dim=1), F.normalize(i, dim=1)", "t = F.normalize(t, dim=1)\n    i = F.normalize(i, dim=1)"],
)
@pytest.mark.parametrize(("turn", "queries", "gallery"), [("", "pids", "g"), (".t()", "g", "pids")])
def test_features_at_hand_get_retrieval_metrics_too(tmp_path, lengths, turn, queries, gallery):
    finding = suggestions_for(tmp_path, FEATURES.format(lengths, turn, queries, gallery))
    known = names() | {"i": torch.randn(7, D), "t": torch.randn(B, D)}
    if "\n" in lengths:  # each by itself: seen to have length 1, and not normalised again
        known |= {"t": released_formulas.unit(known["t"]), "i": released_formulas.unit(known["i"])}
    known["similarity"] = known["t"] @ known["i"].T
    *_, by_scores, by_features = (eval(s.write, known) for s in finding.suggestions)
    assert finding.suggestions[-1].write.startswith("retrieval_metrics(t, i, pids, g")
    assert ("normalize=False" in finding.suggestions[-1].write) == ("\n" not in lengths)
    assert by_features.mAP == pytest.approx(by_scores.mAP) and by_features.cmc == pytest.approx(by_scores.cmc)


def test_fused_and_re_ranked_scores_are_not_lost(tmp_path):
    source = """
from utils.metrics import rank

def evaluate(a, b, x, y, reranked, pids, g):
    similarity = (a @ b.t() + x @ y.t()) / 2
    result = rank(similarity=similarity, q_pids=pids, g_pids=g)
    result = rank(similarity=reranked + a @ b.t(), q_pids=pids, g_pids=g)
"""
    (tmp_path / "build.py").write_text(source)
    first, second = examine(tmp_path).findings
    assert "fused" in first.suggestions[1].why
    assert [s.write for s in first.suggestions][1:] == ["similarity_metrics(similarity, pids, g)"]
    assert [s.write for s in second.suggestions][1:] == ["similarity_metrics(reranked + a @ b.t(), pids, g)"]
    assert "fused" in second.suggestions[1].why


CHANGES = [
    "s += b",
    "s = s + b",
    "s[b] = 0",
    "s.add_(b)",
    "for s in b:\n        pass",
    "s, c = b",
    "if b:\n        s = rerank(s)",
]


@pytest.mark.parametrize("change", CHANGES)
def test_scores_that_were_changed_are_no_product_of_features(tmp_path, change):
    source = f"""
from utils.metrics import rank

def evaluate(x, y, b, pids, g):
    s = x @ y.t()
    {change}
    return rank(similarity=s, q_pids=pids, g_pids=g)
"""
    finding = suggestions_for(tmp_path, source)
    assert [s.write for s in finding.suggestions][1:] == ["similarity_metrics(s, pids, g)"]


ORDERED = """
def evaluate(q, g, qids, gids, unit):
    {before}
    similarity = q @ g.t()
    {after}
    order = torch.argsort(similarity, dim=1, descending=True)
    matches = gids[order].eq(qids.view(-1, 1))
"""
FEATURES_OF = {
    ("pass", "pass"): "retrieval_metrics(q, g, qids, gids, normalize=False).t2i",
    ("q = F.normalize(q); g = F.normalize(g)", "pass"): "retrieval_metrics(q, g, qids, gids).t2i",
    (
        "if unit: q = F.normalize(q); g = F.normalize(g)",
        "pass",
    ): "retrieval_metrics(q, g, qids, gids, normalize=False).t2i",
    ("pass", "q = F.normalize(q)"): None,
    ("q = F.normalize(q); g = F.normalize(g)", "g = g[:5]"): None,
    ("q = F.normalize(q); g = F.normalize(g)", "g[0] = 0"): None,
}


@pytest.mark.parametrize("change", FEATURES_OF)
def test_features_are_those_of_the_product(tmp_path, change):
    finding = suggestions_for(tmp_path, ORDERED.format(before=change[0], after=change[1]))
    written = [s.write for s in finding.suggestions if s.write.startswith("retrieval_metrics")]
    assert written == ([] if FEATURES_OF[change] is None else [FEATURES_OF[change]])
    assert "compare one evaluation" in finding.note  # what becomes of `matches` is not read
