"""What goes into a loss or head, one table over all of them: ids of every dtype, numbers of NumPy, bad numbers, float8,
negative weights, torch.export."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from helpers.errors import explains
from torch import nn

import fmfa_losses as fl
from fmfa_losses import functional as f
from fmfa_losses.compat import fmfa, fmfa_2025_04, irra, rde
from fmfa_losses.compat.released import released_efa
from fmfa_losses.heads.identity import id_loss
from fmfa_losses.ops import checks as _checks
from fmfa_losses.ops.checks import check_flag, check_integer, check_nonnegative, check_positive
from fmfa_losses.ops.similarity_distribution.api import similarity_distribution_loss
from fmfa_losses.retrieval import Evaluator, ranking_metrics, retrieval_metrics, search, similarity_metrics

B, N, L, D, C, V = 6, 5, 4, 64, 7, 30
g = torch.Generator().manual_seed(0)
IMAGE, TEXT = torch.randn(B, D, generator=g), torch.randn(B, D, generator=g)
PATCHES, TOKENS = torch.randn(B, N, D, generator=g), torch.randn(B, L, D, generator=g)
IDS = torch.tensor([3, 0, 3, 5, 6, 0])
OTHER_IDS = torch.tensor([1, 1, 2, 2, 3, 4])
LABELS = torch.tensor([[0, 7, 0, 29]] * B)
SCORES = TEXT @ IMAGE.T / D
torch.manual_seed(0)
ID, IRR = fl.IDHead(D, C), fl.IRRHead(D, V, depth=1)
FMFA = fl.FMFALoss(D, C, vocab_size=V, irr={"depth": 1}, efa={"negatives": "different_identity"})


def fmfa_loss(image, text, pids, cast=lambda ids: ids):
    labels, image_ids = cast(LABELS), cast(OTHER_IDS)
    tokens = PATCHES, TOKENS, pids
    return FMFA(image, text, *tokens, masked_text_tokens=TOKENS, masked_labels=labels, image_ids=image_ids)


# name: (image_features, text_features, pids) -> loss
LOSSES = {
    **{name.removesuffix("_loss"): getattr(f, name) for name in f.__all__ if name.endswith("_loss")},
    "itc": partial(f.itc_loss, targets="identity"),
    "itc soft": partial(f.itc_loss, targets="identity", softlabel_ratio=0.5, mutual_neighbors=2),
    "citc": lambda i, t, p: f.citc_loss(i, t),
    "simclr": lambda i, t, p: f.simclr_loss(i, t),
    "id": lambda i, t, p: ID(i, t, p),
    "id_loss": lambda i, t, p: id_loss(i[:, :C], t[:, :C], p),
    "fmfa": lambda i, t, p: fmfa_loss(i, t, p, lambda ids: ids.to(p.dtype)),
    "efa": lambda i, t, p: f.efa_loss(PATCHES.to(i.dtype), TOKENS.to(t.dtype), pids=p, negatives="different_identity"),
    "operator": partial(similarity_distribution_loss, logit_scale=5.0, alpha=1.0),
    "irra.compute_sdm": partial(irra.compute_sdm, logit_scale=5.0),
    "irra.compute_cmpm": irra.compute_cmpm,
    "irra.compute_id": lambda i, t, p: irra.compute_id(i[:, :C], t[:, :C], p),
    "fmfa.compute_sdm": partial(fmfa.compute_sdm, logit_scale=5.0, use_weight=True),
    "fmfa_2025_04": partial(fmfa_2025_04.compute_a_sdm, logit_scale=5.0, alpha_i2t=1.0, alpha_t2i=2.0),
    "rde": lambda i, t, p: rde.compute_rbs(i, t, i, t, p, loss_type="TRL"),
}
FROM_SCORES = {
    name: partial(lambda loss, ids, **kwargs: loss(SCORES, ids, **kwargs), getattr(f, name))
    for name in f.__all__
    if name.endswith("_from_scores") and not name.startswith("cmpm")
}
FROM_SCORES["cmpm_loss_from_scores"] = lambda ids, **kwargs: f.cmpm_loss_from_scores(SCORES, SCORES.T, ids, **kwargs)
FROM_SCORES["itc_loss_from_scores"] = partial(FROM_SCORES["itc_loss_from_scores"], targets="identity")
WITH_IMAGE_IDS = {
    "asdm": lambda ids: f.asdm_loss(IMAGE, TEXT, IDS, image_ids=ids),
    "sdm": lambda ids: f.sdm_loss(IMAGE, TEXT, IDS, image_ids=ids),
    "sdm_from_scores": lambda ids: f.sdm_loss_from_scores(SCORES, IDS, image_ids=ids),
    "operator": lambda ids: similarity_distribution_loss(TEXT, IMAGE, IDS, image_ids=ids, logit_scale=5.0),
    "compat": lambda ids: fmfa.compute_sdm(IMAGE, TEXT, IDS, 5.0, ids, use_weight=True),
}
# name: ids -> result
TAKES_IDS = {
    **{name: partial(lambda loss, ids: loss(IMAGE, TEXT, ids), loss) for name, loss in LOSSES.items()},
    **FROM_SCORES,
    **{f"image_ids {name}": loss for name, loss in WITH_IMAGE_IDS.items()},
    "irr": lambda ids: IRR(PATCHES, TOKENS, ids[:, None].expand(B, L)),
    "compute_mlm": lambda ids: irra.compute_mlm(IMAGE[:, :C], ids),
    "rank": lambda ids: irra.rank(SCORES, ids, ids),
    "retrieval_metrics": lambda ids: str(retrieval_metrics(TEXT, IMAGE, ids, ids.numpy())),
    "mask_tokens": lambda ids: [x.long() for x in f_mask(ids)],
}
DTYPES = [getattr(torch, name) for name in ("uint8", "int8", "int16", "int32", "uint16", "uint32", "uint64")]


def f_mask(ids):
    return fl.mask_tokens(ids, mask_id=6, special_ids=(0,), generator=torch.Generator().manual_seed(0))


def values(result):
    return torch.utils._pytree.tree_leaves(result)


def assert_same(got, expected):
    for a, b in zip(values(got), values(expected), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TAKES_IDS)
def test_every_integer_dtype_holds_ids(name, dtype):
    assert_same(TAKES_IDS[name](IDS.to(dtype)), TAKES_IDS[name](IDS))


def test_the_table_holds_every_loss():
    assert {name for name in f.__all__ if "loss" in name} <= {*FROM_SCORES, "id_loss", *(f"{x}_loss" for x in LOSSES)}
    exported = {type(call.module).__name__ for call in EXPORTED}
    assert {name for name in fl.__all__ if name.endswith(("Loss", "Head"))} <= exported


@pytest.mark.parametrize("ids", [IDS.float().numpy(), IDS.numpy().astype(">i4"), IDS.numpy().astype(object)])
def test_arrays_that_hold_no_ids(ids):
    with explains(TypeError, ("query_pids", "integer"), "[6]", "query_pids.astype('i8')"):
        ranking_metrics(IMAGE, TEXT, ids, IDS)
    ranking_metrics(IMAGE, TEXT, ids.astype("i8"), IDS)


@pytest.mark.parametrize("dtype", [">f4", "g", "i4"])
def test_arrays_that_are_no_features(dtype):
    image = IMAGE.numpy().astype(dtype)
    with explains(TypeError, ("query_features", "floating-point"), "[6, 64]", "query_features.astype('f4')"):
        search(image, TEXT, 1)
    search(image.astype("f4"), TEXT, 1)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.int16], ids=str)
def test_token_ids_keep_their_dtype(dtype):
    assert {x.dtype for x in f_mask(IDS.to(dtype))} == {dtype}


INDICES = {"id", "id_loss", "fmfa", "irra.compute_id"}


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - INDICES))
def test_large_ids_stay_apart(name):
    """uint64 ids beyond int64, and those that a cast to 32 bits would merge."""
    large = np.array([2**63, 2**64 - 1, 1, 2**32 + 1], dtype="uint64")
    ids = torch.from_numpy(large[[0, 1, 0, 2, 3, 1]])
    assert_same(LOSSES[name](IMAGE, TEXT, ids), LOSSES[name](IMAGE, TEXT, torch.tensor([0, 1, 0, 2, 3, 1])))


def test_ids_that_are_indices_are_in_range():
    large = torch.from_numpy(np.array([2**63 + 3, 2**64 - 100, 0, 0, 0, 0], dtype="uint64"))
    with explains(ValueError, ("pids", "[0, num_identities = 7)"), (), "num_identities"):
        ID(IMAGE, TEXT, large)
    with explains(ValueError, ("pids", "[0, identities = 7)"), "-100 to 0", "classifier"):
        id_loss(IMAGE[:, :C], TEXT[:, :C], torch.tensor([-100, 0, 0, 0, 0, 0]))  # -100 is what cross_entropy leaves out
    with explains(ValueError, ("labels", "ignore_index = 0", "[0, vocab_size = 30)"), (), "vocab_size"):
        IRR(PATCHES, TOKENS, large[:, None].expand(B, L))


# Numbers. name: (a number that is right, call with a number, kind)
NUMBERS = {
    "temperature": (
        0.5,
        [fl.ASDMLoss, fl.SDMLoss, fl.ITCLoss, fl.TALLoss, fl.TRLLoss, fl.SigmoidLoss, fl.EFALoss, fl.SimCLRLoss],
    ),
    "alpha": (2.0, [fl.ASDMLoss]),
    "eps": (0.125, [fl.ASDMLoss, fl.SDMLoss, fl.RITCLoss, fl.CMPMLoss]),
    "softlabel_ratio": (0.25, [fl.ITCLoss, fl.SDMLoss]),
    "mutual_neighbors": (2, [fl.ITCLoss]),
    "lambda1": (0.125, [fl.CITCLoss]),
    "lambda2": (0.125, [fl.CITCLoss]),
    "image_id_factor": (0.5, [fl.ASDMLoss, fl.SDMLoss]),
    "margin": (0.25, [fl.TALLoss, fl.TRLLoss, fl.TripletLoss]),
    "bias": (-2.0, [fl.SigmoidLoss]),
    "margin_text": (0.25, [fl.EFALoss]),
    "margin_image": (0.25, [fl.EFALoss]),
    "pool_scale": (2.0, [fl.EFALoss]),
    "sparsity": (0.5, [fl.EFALoss]),
    "num_identities": (3, [partial(fl.IDHead, 8)]),
    "label_smoothing": (0.125, [partial(fl.IDHead, 8, 3), partial(id_loss, IMAGE[:, :C], TEXT[:, :C], IDS)]),
    "embed_dim": (
        64,
        [
            partial(fl.IDHead, num_identities=3),
            partial(fl.IRRHead, vocab_size=9, depth=1),
            partial(fl.TokenSelection, "text"),
        ],
    ),
    "input_dim": (64, [partial(fl.TokenSelection, "image")]),
    "ratio": (0.5, [partial(fl.TokenSelection, "image")]),
    "vocab_size": (9, [partial(fl.IRRHead, 64, depth=1)]),
    "depth": (1, [partial(fl.IRRHead, 64, 9)]),
    "num_heads": (2, [partial(fl.IRRHead, 64, 9, depth=1)]),
    "max_masked": (2, [partial(fl.IRRHead, 64, 9, depth=1)]),
    "ignore_index": (0, [partial(fl.IRRHead, 64, 9, depth=1)]),
    "k": (2, [partial(search, IMAGE, TEXT)]),
    "block_size": (2, [partial(search, IMAGE, TEXT, 1), lambda **k: str(ranking_metrics(IMAGE, TEXT, IDS, IDS, **k))]),
    "max_rank": (2, [partial(irra.rank, SCORES, IDS, IDS)]),
    "logit_scale": (
        4.0,
        [partial(loss, IMAGE, TEXT, IDS) for loss in (f.asdm_loss, f.sdm_loss, LOSSES["itc"], f.sigmoid_loss)]
        + [partial(similarity_distribution_loss, IMAGE, TEXT, IDS), partial(irra.compute_itc, IMAGE, TEXT)],
    ),
    "logit_bias": (-2.0, [partial(f.sigmoid_loss, IMAGE, TEXT, IDS)]),
    "factor": (0.5, [partial(irra.compute_sdm, IMAGE, TEXT, IDS, 4.0)]),
    "epsilon": (
        0.125,
        [partial(irra.compute_sdm, IMAGE, TEXT, IDS, 4.0), partial(irra.compute_cmpm, IMAGE, TEXT, IDS)],
    ),
    "margin_t2e": (0.25, [partial(fmfa_2025_04.compute_efa, TOKENS, PATCHES, TOKENS, margin_i2e=0.1)]),
    "alpha_i2t": (1.0, [partial(fmfa_2025_04.compute_a_sdm, IMAGE, TEXT, IDS, 4.0, alpha_t2i=2.0)]),
    "tau": (0.5, [partial(rde.compute_TRL_per, SCORES, IDS)]),
    "mask_id": (6, [partial(fl.mask_tokens, IDS, special_ids=())]),
    "probability": (0.5, [partial(fl.mask_tokens, IDS)]),
    "vocab_size ": (9, [partial(fl.mask_tokens, IDS, mask_id=6, special_ids=())]),
}
INTEGERS = {name for name, (number, _) in NUMBERS.items() if isinstance(number, int)}
EACH_NUMBER = pytest.mark.parametrize(
    ("name", "number", "call"),
    [
        pytest.param(name.strip(), number, call, id=f"{name}-{index}")
        for name, (number, calls) in NUMBERS.items()
        for index, call in enumerate(calls)
    ],
)


def seeded(call):
    torch.manual_seed(0)
    result = call()
    return list(result.state_dict().values()) or repr(result) if isinstance(result, nn.Module) else result


@EACH_NUMBER
def test_numbers_of_numpy_are_numbers(name, number, call):
    """The same result, and a module keeps a plain number, which every pickle and torch.compile understands."""
    expected = seeded(lambda: call(**{name: number}))
    kinds = (np.int64, np.int16, np.uint8) if name in INTEGERS else (np.float32, np.float64, np.float16)
    for kind in (*kinds, lambda x: np.array(x)):
        assert_same(seeded(lambda kind=kind: call(**{name: kind(number)})), expected)
        made = call(**{name: kind(number)})
        if isinstance(made, nn.Module):
            assert type(getattr(made, name, number)) is type(number)


@EACH_NUMBER
def test_what_is_no_number_is_refused(name, number, call):
    optional = {"sparsity", "num_heads", "max_masked", "block_size", "vocab_size", "logit_scale", "logit_bias"}
    wrong = [str(number), True, np.True_, [number], np.array([number, number]), number + 1j, float("nan"), float("inf")]
    if name != "logit_scale" and name != "logit_bias":
        wrong.append(torch.tensor(number))
    if name not in optional:
        wrong.append(None)
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=rf"{name} must (be|lie in)"):
            call(**{name: value})


def test_checks_of_numbers():
    assert check_positive("x", np.float32(0.5)) == 0.5 and type(check_positive("x", 1)) is float
    assert check_nonnegative("x", np.array(0)) == 0
    assert check_flag("x", np.bool_(True)) is True
    assert type(check_integer("x", np.uint8(3))) is int
    for call in (
        lambda: check_nonnegative("x", -1e-9),
        lambda: check_positive("x", 10**400),  # no float holds it
        lambda: check_integer("x", 2.0),
        lambda: check_integer("x", 5, 1, 4),
    ):
        with pytest.raises(ValueError, match="x must be"):
            call()
    for value in (1, "yes", None):
        with pytest.raises(TypeError, match="x must be True or False"):
            check_flag("x", value)


def test_flags_are_flags():
    for make, name in (
        (partial(fl.ASDMLoss, detach_weight="no"), "detach_weight"),
        (partial(fl.ASDMLoss, equal_batches=1), "equal_batches"),
        (partial(fl.EFALoss, equal_batches="no"), "equal_batches"),
        (partial(fl.FMFALoss, D, C, asdm=fl.ASDMLoss(), efa=fl.EFALoss(), equal_batches="yes"), "equal_batches"),
        (partial(fl.IDHead, 4, 4, check_labels="no"), "check_labels"),
        (partial(fl.IRRHead, 64, 9, depth=1, check_labels=0), "check_labels"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            make()


def test_ranks_of_numpy():
    made = similarity_metrics(SCORES, IDS, IDS, ranks=np.array([1, 2]))
    assert [type(k) for k in made.cmc] == [int, int]
    assert Evaluator([], [], ranks=(np.int64(5),)).ranks == (5,)
    for ranks in ((True,), ("1",), (1.5,)):
        with pytest.raises((TypeError, ValueError), match="ranks must be an integer >= 1"):
            similarity_metrics(SCORES, IDS, IDS, ranks=ranks)


@pytest.mark.filterwarnings("ignore")
def test_numbers_of_numpy_under_compile():
    loss = fl.ASDMLoss(temperature=np.float32(0.5), alpha=np.int64(3), eps=np.array(1e-6))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ids in (IDS, IDS.to(torch.uint16), IDS.to(torch.uint64)):
        torch.testing.assert_close(compiled(IMAGE, TEXT, ids), loss(IMAGE, TEXT, IDS))
    torch._dynamo.reset()


# Features.

FEATURES = {name: loss for name, loss in LOSSES.items() if name not in ("efa", "fmfa", "rde")}
FEATURES |= {
    "efa": lambda i, t, p: f.efa_loss(i[:, None], t[:, None]),
    "fmfa": lambda i, t, p: FMFA(i, t, i[:, None], t[:, None], p),
    "irr": lambda i, t, p: IRR(i[:, None], t[:, None], p[:, None]),
    "hard_similarity": lambda i, t, p: f.hard_similarity(i[:, None], t[:, None]),
    "sparse_aggregate": lambda i, t, p: f.sparse_aggregate(i[:, None], t[:, None]),
    "search": lambda i, t, p: search(i, t, 1),
    "metrics": lambda i, t, p: ranking_metrics(i, t, p, p),
    "compute_itc": lambda i, t, p: irra.compute_itc(i, t, 1.0),
    "compute_agg_v": lambda i, t, p: fmfa.compute_agg_v(t[:, None], i[:, None]),
    "compute_efa": lambda i, t, p: fmfa_2025_04.compute_efa(t[:, None], i[:, None], t[:, None], 0.1, 0.1),
    "rde": lambda i, t, p: rde.compute_rbs(i, t, i, t, p),
    "scores": lambda i, t, p: f.tal_loss_from_scores(i[:, :B], p),
}


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_float8_is_refused_in_one_sentence(name, dtype):
    with explains(TypeError, ("float16", "bfloat16", "float32", "float64"), "float8_", ".bfloat16()"):
        FEATURES[name](IMAGE.to(dtype), TEXT.to(dtype), IDS)
    FEATURES[name](IMAGE.to(dtype).bfloat16(), TEXT.to(dtype).bfloat16(), IDS)  # what the sentence advises


@pytest.mark.parametrize("name", ["asdm", "sdm", "itc", "cmpm", "tal", "trl", "triplet", "sigmoid", "id", "citc"])
def test_sparse_features_are_refused(name):
    with explains(TypeError, "dense", "sparse", ".to_dense()"):
        LOSSES[name](IMAGE.to_sparse(), TEXT.to_sparse(), IDS)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tokens_are_refused():
    with explains(TypeError, ("image_tokens", "dense"), "nested", "image_tokens.to_padded_tensor(0)"):
        f.efa_loss(torch.nested.nested_tensor([PATCHES[0], PATCHES[1, :2]]), TOKENS[:2])


def test_an_option_that_is_no_text_is_refused():
    for option in (np.array(["a", "b"]), ["paired"], None, torch.zeros(2)):
        with explains(ValueError, ("positive", "'paired'", "'any'")):
            fl.ASDMLoss(positive=option)


TEMPERED = [fl.ASDMLoss, fl.SDMLoss, fl.ITCLoss, fl.TALLoss, fl.TRLLoss, fl.SigmoidLoss, fl.EFALoss]
TEMPERED += [fl.RITCLoss, fl.SimCLRLoss]


@pytest.mark.parametrize("temperature", [1e-39, 1e-320])
@pytest.mark.parametrize("build", TEMPERED)
def test_a_temperature_without_an_inverse_is_named(build, temperature):
    message = ("temperature", "float32"), repr(temperature)
    with explains(ValueError, *message):
        build(temperature=temperature)
    build(temperature=1e-38)
    for loss in (f.asdm_loss, f.itc_loss, f.sdm_loss, f.sigmoid_loss, f.tal_loss):
        with explains(ValueError, *message):
            loss(IMAGE, TEXT, IDS, temperature=temperature)


@pytest.mark.parametrize("pool_scale", [1e-39, 1e-320])
def test_a_pool_scale_without_an_inverse_is_named(pool_scale):
    calls = (
        lambda: fl.EFALoss(pool_scale=pool_scale),
        lambda: f.efa_loss(PATCHES, TOKENS, pool_scale=pool_scale),
        lambda: f.hard_similarity(PATCHES, TOKENS, pool_scale=pool_scale),
    )
    for call in calls:
        with explains(ValueError, ("pool_scale", "float32"), repr(pool_scale)):
            call()
    for loss in (f.efa_loss, released_efa):  # of captions of one length, which all have the same log n / pool_scale
        assert loss(PATCHES, TOKENS, pool_scale=1e-37).isfinite()


def test_an_additive_mask_is_not_to_be_cast():
    additive = torch.zeros(TOKENS.shape[:2]).masked_fill(torch.rand(TOKENS.shape[:2]) > 0.5, -torch.inf)
    with explains(TypeError, ("text_mask", "boolean"), "float32", ("text_mask.bool()", "text_mask == 0")):
        f.efa_loss(PATCHES, TOKENS, text_mask=additive)
    with pytest.raises(TypeError, match=r"call text_mask\.bool\(\)$"):
        f.efa_loss(PATCHES, TOKENS, text_mask=(additive == 0).long())


def test_complex_features_and_ids():
    with explains(TypeError, ("image_features", "floating-point"), "complex64", "image_features.real"):
        f.tal_loss(IMAGE + 1j, TEXT, IDS)
    with explains(TypeError, ("pids", "integer"), "complex64", "pids.real.long()"):
        f.tal_loss(IMAGE, TEXT, IDS + 1j)
    f.tal_loss((IMAGE + 1j).real, TEXT, (IDS + 1j).real.long())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: irra.compute_sdm(IMAGE.tolist(), TEXT, IDS, 1.0), "image_fetures must be a tensor"),
        (lambda: irra.compute_sdm(IMAGE, TEXT[:2], IDS, 1.0), "image_fetures and text_fetures must agree in B"),
        (lambda: irra.compute_sdm(IMAGE, TEXT, IDS.tolist(), 1.0), "pid must be an integer tensor"),
        (lambda: irra.compute_sdm(IMAGE, TEXT, IDS, 1.0, IDS[:2]), "image_id must have shape"),
        (lambda: irra.compute_cmpm(IMAGE, TEXT, IDS.float()), "labels must be an integer tensor"),
        (lambda: irra.compute_id(IMAGE, TEXT, IDS[:2]), "labels must have shape"),
        (lambda: irra.compute_mlm(IMAGE, IDS.float()), "labels must be an integer tensor"),
        (lambda: fmfa.compute_sdm(IMAGE, TEXT, IDS[1:], 1.0, use_weight=True), "pid must have shape"),
        (lambda: fmfa.compute_agg_v(TOKENS, PATCHES[:2]), "patch_feats and text_feats must agree in B"),
        (lambda: fmfa.compute_minmax_info_loss(TOKENS, PATCHES, TOKENS[0]), "C must have shape"),
        (lambda: rde.compute_TAL_per(SCORES, IDS[1:], 0.1, 0.1), "pid must have shape"),
        (lambda: rde.compute_rbs(IMAGE, TEXT, IMAGE, TEXT, IDS, IMAGE[:, 0]), "label_hat must not be negative"),
        (lambda: f.asdm_loss(IMAGE, TEXT[:, :5], IDS), "image_features and text_features must agree in D"),
        (lambda: f.itc_loss(IMAGE.long(), TEXT), "image_features must be a floating-point tensor"),
    ],
)
def test_messages_name_the_argument_of_the_caller(call, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


# Weights.

WEIGHTED = {
    **{name: LOSSES[name] for name in ("sdm", "itc", "itc soft", "ritc", "cmpm", "tal", "trl", "triplet", "sigmoid")},
    "citc": lambda i, t, p, **kwargs: f.citc_loss(i, t, **kwargs),
    **{
        name: partial(lambda loss, i, t, ids, **kwargs: loss(ids, **kwargs), loss) for name, loss in FROM_SCORES.items()
    },
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_negative_weight_is_refused(name):
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, -0.5, 1.0])
    with explains(ValueError, ("sample_weight", "negative"), "-0.5", "0"):
        WEIGHTED[name](IMAGE, TEXT, IDS, sample_weight=weight)
    WEIGHTED[name](IMAGE, TEXT, IDS, sample_weight=weight.clamp(min=0))
    for dtype in (torch.uint16, torch.bool, torch.float16):
        kept = torch.tensor([1, 0, 1, 1, 0, 1])
        assert_same(*(WEIGHTED[name](IMAGE, TEXT, IDS, sample_weight=kept.to(d)) for d in (dtype, torch.float32)))


def test_weights_of_an_accelerator_are_not_looked_at():
    # Meta tensors have no values: whatever would wait for an accelerator raises here.
    scores, ids, weight = (x.to("meta") for x in (SCORES, IDS, torch.ones(B)))
    assert f.tal_loss_from_scores(scores, ids, sample_weight=weight).device.type == "meta"


@pytest.mark.filterwarnings("ignore")
def test_weights_under_compile_and_functorch():
    weight = torch.rand(B)
    compiled = torch.compile(f.tal_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(IMAGE, TEXT, IDS, sample_weight=weight), f.tal_loss(IMAGE, TEXT, IDS, sample_weight=weight)
    )
    torch._dynamo.reset()
    losses = torch.vmap(lambda w: f.tal_loss_from_scores(SCORES, IDS, sample_weight=w))(torch.stack([weight, weight]))
    torch.testing.assert_close(losses[0], f.tal_loss_from_scores(SCORES, IDS, sample_weight=weight))


# Ids that a loss does not use.


@pytest.mark.parametrize(
    ("loss", "advised", "features"),
    [
        (fl.ITCLoss(), fl.ITCLoss(targets="identity"), (IMAGE, TEXT)),
        (fl.EFALoss(), fl.EFALoss(negatives="different_identity"), (PATCHES, TOKENS)),
        (fl.SigmoidLoss(positives="paired"), fl.SigmoidLoss(), (IMAGE, TEXT)),
        (fl.TripletLoss(negatives="all"), fl.TripletLoss(), (IMAGE, TEXT)),
    ],
)
def test_unused_pids_are_said_once(loss, advised, features, monkeypatch):
    monkeypatch.setattr(_checks, "warned", set())
    with pytest.warns(UserWarning, match=r"pids.* not use.*pass (targets|negatives|positives)=") as w:
        value = loss(*features, pids=IDS)
    assert [warning.filename for warning in w] == [__file__]  # the caller's line, not one of the library or of torch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(loss(*features, pids=IDS), value)
        assert_same(loss(*features), value)
        advised(*features, pids=IDS)
        fl.FMFALoss(D, C, vocab_size=V, irr={"depth": 1})(IMAGE, TEXT, PATCHES, TOKENS, IDS)
    with pytest.raises(ValueError, match="pids must have shape"):
        loss(*features, pids=IDS[:2])
    with pytest.raises(TypeError, match="pids must be an integer tensor"):
        loss(*features, pids=IDS.float())


# Captions.


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask_id": 30}, r"mask_id must lie in the vocabulary \[0, vocab_size = 30\), got 30; pass the mask_id and"),
        ({"special_ids": (0, 49407)}, r"special_ids must lie in the vocabulary \[0, vocab_size = 30\), got \[49407\]"),
        ({"special_ids": (0, -1)}, r"special_ids must lie in the vocabulary"),
        ({"vocab_size": 6}, r"mask_id must lie in the vocabulary \[0, vocab_size = 6\)"),
        ({"vocab_size": 29, "mask_id": 3}, r"token_ids must lie in the vocabulary \[0, vocab_size = 29\), got 0 to 29"),
        ({"mask_id": 0}, "mask_id must be an integer >= 1, got 0"),
    ],
)
def test_ids_outside_the_vocabulary(kwargs, message):
    captions = torch.tensor([[1, 4, 5, 29, 2, 0]])
    good = {"mask_id": 28, "special_ids": (0, 1, 2), "vocab_size": 30}
    fl.mask_tokens(captions, **good)
    with pytest.raises(ValueError, match=message):
        fl.mask_tokens(captions, **(good | kwargs))


# torch.export with a dynamic batch.


def batch(size):
    ids = torch.arange(size) % 5
    return torch.randn(size, D), torch.randn(size, D), torch.randn(size, N, D), torch.randn(size, L, D), ids


class Call(nn.Module):
    def __init__(self, module, pick):
        super().__init__()
        self.module, self.pick = module, pick

    def forward(self, image, text, patches, tokens, ids):
        return self.pick(self.module, image, text, patches, tokens, ids)


def mask(tokens):
    return tokens[..., 0] > -2


OTHER_INPUTS = ("EFALoss", "FMFALoss", "CITCLoss", "SimCLRLoss")  # tokens, or no ids
GLOBAL = tuple(getattr(fl, name)() for name in fl.__all__ if name.endswith("Loss") and name not in OTHER_INPUTS)
GLOBAL += (fl.ITCLoss(targets="identity"), fl.TripletLoss(negatives="all"), fl.SigmoidLoss(positives="paired"), ID)
EXPORTED = [
    *(Call(module, lambda m, i, t, v, w, p: m(i, t, p)) for module in GLOBAL),
    Call(fl.ASDMLoss(), lambda m, i, t, v, w, p: m(i, t, p, image_ids=p // 2)),
    Call(fl.TALLoss(), lambda m, i, t, v, w, p: m(i, t, p, sample_weight=i[:, 0].abs())),
    Call(fl.CITCLoss(), lambda m, i, t, v, w, p: m(i, t)),
    Call(fl.SimCLRLoss(), lambda m, i, t, v, w, p: m(i, t)),
    Call(
        fl.ITCLoss(softlabel_ratio=0.5, mutual_neighbors=1), lambda m, i, t, v, w, p: m(i, t, momentum_features=(t, i))
    ),
    Call(fl.SDMLoss(), lambda m, i, t, v, w, p: m(i, t, soft_targets=(i @ t.mT).exp())),
    Call(fl.EFALoss(), lambda m, i, t, v, w, p: m(v, w)),
    Call(fl.EFALoss(pool_scale=1e-6), lambda m, i, t, v, w, p: m(v, w)),
    Call(fl.EFALoss(), lambda m, i, t, v, w, p: m(v, w, image_mask=mask(v), text_mask=mask(w))),
    Call(IRR, lambda m, i, t, v, w, p: m(v, w, p[:, None].expand(-1, L), text_mask=mask(w))),
    Call(
        fl.FMFALoss(D, C, vocab_size=V, irr={"depth": 1}),
        lambda m, i, t, v, w, p: m(
            i, t, v, w, p, masked_text_tokens=w, masked_labels=p[:, None].expand(-1, L), text_mask=mask(w)
        ),
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("call", EXPORTED, ids=lambda call: type(call.module).__name__)
def test_export_with_a_dynamic_batch(call, strict):
    size = torch.export.Dim("size", min=2, max=200)  # EFA has other code for more
    inputs = batch(6)
    exported = torch.export.export(call, inputs, dynamic_shapes=tuple({0: size} for _ in inputs), strict=strict)
    for other in (2, 6, 13):
        inputs = batch(other)
        for a, b in zip(values(exported.module()(*inputs)), values(call(*inputs)), strict=True):
            torch.testing.assert_close(a, b)
