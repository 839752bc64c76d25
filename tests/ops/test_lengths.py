"""Lengths and packed captions: the same bits as with a mask made by hand, and an error or NaN for wrong ones."""

import itertools

import pytest
import torch
import torch.distributed as dist
from helpers import processes
from helpers.compare import value_and_grads
from helpers.errors import explains
from helpers.global_batch import raised
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fmfa_losses import EFALoss, FMFALoss, IRRHead
from fmfa_losses.functional import efa_loss, hard_similarity, length_mask, pad_packed, sparse_aggregate
from fmfa_losses.ops.lengths import captions

B, N, L, D, V = 5, 6, 9, 64, 30
LENGTHS = torch.tensor([4, 0, 7, 1, 4])
STARTS = torch.tensor([0, 4, 4, 11, 12, 16])
MASK = torch.arange(L) < LENGTHS[:, None]


def draw(dtype=torch.float32):
    """Patches, and captions [B, L, D] whose padding is NaN."""
    image, text = torch.randn(B, N, D, dtype=dtype), torch.randn(B, L, D, dtype=dtype)
    return image, text.masked_fill(~MASK[..., None], float("nan"))


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_a_mask_of_lengths():
    assert torch.equal(length_mask(LENGTHS, L), MASK)
    assert torch.equal(length_mask(LENGTHS.to(torch.uint8), L), MASK)
    assert torch.equal(length_mask(torch.tensor([L]), L), torch.ones(1, L, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("most", [None, 7, 12])
def test_packed_tokens_stand_where_the_starts_say(dtype, most):
    packed = torch.randn(D, int(STARTS[-1])).T  # strided
    padded, mask = pad_packed(packed, STARTS.to(dtype), most)
    expected = torch.zeros(B, most or 7, D)
    for b, (start, end) in enumerate(itertools.pairwise(STARTS)):
        expected[b, : end - start] = packed[start:end]
    assert torch.equal(padded, expected)
    assert torch.equal(mask, length_mask(LENGTHS, most or 7))


def test_captions_without_a_token_at_the_ends():
    padded, mask = pad_packed(torch.ones(2, 3), torch.tensor([0, 0, 2, 2, 2]))
    assert mask.tolist() == [[False, False], [True, True], [False, False], [False, False]]
    assert padded.sum(dim=(1, 2)).tolist() == [0, 6, 0, 0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own forward mode
def test_the_gradient_goes_back_to_the_packed_tokens():
    packed, weight = torch.randn(16, D), torch.randn(B, L, D)
    _, grad = value_and_grads(lambda x: (pad_packed(x, STARTS, L)[0] * weight).sum(), [packed], torch.ones(()))
    assert torch.equal(grad, weight[MASK])
    x = torch.randn(16, 2, dtype=torch.float64, requires_grad=True)
    pad = lambda x: pad_packed(x, STARTS, L)[0]  # noqa: E731
    assert torch.autograd.gradcheck(pad, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(pad, x)


OPTIONS = {
    "mean": {},
    "none": {"reduction": "none"},
    "weighted": {"sample_weight": torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])},
    "pids": {"pids": torch.tensor([0, 1, 0, 2, 3]), "negatives": "different_identity"},
    "flat": {"pool_scale": 1e-6},
    "image mask": {"image_mask": torch.arange(N) < torch.tensor([[6], [3], [0], [1], [5]])},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
def test_efa_with_lengths_and_packed_is_efa_with_the_mask(dtype, options):
    image, text = draw(dtype)
    options = OPTIONS[options]
    masked = value_and_grads(lambda i, t: efa_loss(i, t, text_mask=MASK, **options), (image, text))
    assert all(torch.isfinite(x).all() for x in masked)
    same(value_and_grads(lambda i, t: efa_loss(i, t, text_lengths=LENGTHS.int(), **options), (image, text)), masked)
    for most in (None, L, 40):
        packed = value_and_grads(
            lambda i, t: efa_loss(i, t, text_cu_seqlens=STARTS.int(), text_max_seqlen=most, **options),  # noqa: B023
            (image, text[MASK]),
        )
        same(packed, [*masked[:2], masked[2][MASK]])


def test_operators_and_images_take_what_is_padded():
    image, text = draw()
    packed = image.flatten(0, 1)[:16]
    padded, mask = pad_packed(packed, STARTS)
    joint = sparse_aggregate(padded, text.nan_to_num(), image_mask=mask)
    assert torch.isfinite(hard_similarity(text, joint, x_mask=MASK, e_mask=MASK)).all()
    assert torch.isfinite(efa_loss(padded, text, image_mask=mask, text_lengths=LENGTHS))


def objective(**options):
    torch.manual_seed(0)
    return FMFALoss(D, 10, vocab_size=V, irr={"depth": 1, "ignore_index": -1}, **options)


def batch():
    image, text = draw()
    text = text.nan_to_num()
    labels = torch.full((B, L), -1)
    labels[0, 1], labels[2, 6], labels[4, 0], labels[3, 5] = 3, 7, 0, 9  # the last one stands in the padding
    return (image.mean(1), text.mean(1), image, text, text.roll(1, 2), labels)


def of_objective(module, labels, **lengths):
    def all_of(*tensors):
        image_features, text_features, image, text, masked = tensors
        pids = torch.tensor([0, 1, 0, 2, 3])
        out = module(
            image_features, text_features, image, text, pids, masked_text_tokens=masked, masked_labels=labels, **lengths
        )
        return torch.stack([out.loss, *(x for part in out[1:] for _, x in sorted(part.items()))])

    return all_of


@pytest.mark.parametrize("how", ["lengths", "packed labels", "padded labels"])
def test_the_objective_takes_them_for_all_its_terms(how):
    module, (*tensors, labels) = objective(), batch()
    if how == "packed labels":
        labels = labels.masked_fill(~MASK, -1)
    masked = value_and_grads(of_objective(module, labels, text_mask=MASK), tensors)
    assert masked[0].shape == (8,) and all(torch.isfinite(x).all() for x in masked)
    if how == "lengths":
        same(value_and_grads(of_objective(module, labels, text_lengths=LENGTHS), tensors), masked)
        return
    packed = [*tensors[:3], *(x[MASK] for x in tensors[3:])]
    labels, most = (labels[MASK].to(torch.int32), None) if how == "packed labels" else (labels, L)
    got = value_and_grads(of_objective(module, labels, text_cu_seqlens=STARTS, text_max_seqlen=most), packed)
    same(got, [*masked[:4], *(x[MASK] for x in masked[4:])])


def test_the_objective_without_words_takes_packed_captions():
    image, text = draw()
    module = objective(weights={"irr": 0})
    given = (image.mean(1), image.mean(1), image)
    a = module(*given, text, torch.arange(B), text_mask=MASK)
    b = module(*given, text[MASK], torch.arange(B), text_cu_seqlens=STARTS)
    assert torch.equal(a.loss, b.loss)


def test_the_head_of_words_takes_lengths():
    image, text = draw()
    head, labels = IRRHead(D, V, depth=1), batch()[-1].clamp(min=0)
    a, b = head(image, text, labels, text_mask=MASK), head(image, text, labels, text_lengths=LENGTHS)
    same(a, b)
    with explains(ValueError, "text_lengths must lie in [0, L = 9]", "10 for sample 1", "masked_text_tokens"):
        head(image, text, labels, text_lengths=torch.tensor([1, 10, 2, 3, 4]))


def gathered(gather):
    """Value and gradients of each rank's part, with the mask and packed; and errors that one rank has alone."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    image, text = draw(torch.float64)
    part = slice(0, 2) if rank == 0 else slice(2, B)
    image, text, mask, lengths = image[part], text[part], MASK[part], LENGTHS[part]
    starts = nn.functional.pad(lengths.cumsum(0), (1, 0))
    loss = EFALoss(gather=gather)
    masked = value_and_grads(lambda i, t: loss(i, t, text_mask=mask), (image, text))
    by_length = value_and_grads(lambda i, t: loss(i, t, text_lengths=lengths), (image, text))
    packing = {"text_cu_seqlens": starts, "text_max_seqlen": L}
    packed = value_and_grads(lambda i, t: loss(i, t, **packing), (image, text[mask]))
    same(by_length, masked)
    same(packed, [*masked[:2], masked[2][mask]])

    module = objective(gather=gather, weights={"irr": 0}).double()
    given = (image.mean(1), image.mean(1), image)
    a = module(*given, text, torch.arange(len(image)), text_mask=mask)
    b = module(*given, text[mask], torch.arange(len(image)), **packing)
    assert torch.equal(a.loss, b.loss)

    wrong = {**packing, "text_cu_seqlens": starts + (rank == 1)}
    unlike = {**packing, "text_max_seqlen": L + rank}
    return {
        "wrong on one": raised(lambda: loss(image, text[mask], **wrong)),
        "objective, wrong on one": raised(lambda: module(*given, text[mask], torch.arange(len(image)), **wrong)),
        "unlike": raised(lambda: loss(image, text[mask], **unlike)),
        "missing": raised(lambda: loss(image, text[mask], text_cu_seqlens=starts)),
    }


@pytest.mark.parametrize("gather", [True, "ring"])
def test_ranks_exchange_padded_captions_and_raise_alike(gather):
    for found in processes.run(2, gathered, gather):
        assert isinstance(found, dict), found
        for name in ("wrong on one", "objective, wrong on one"):
            assert "rank 1 of 2 cannot take part: text_cu_seqlens must begin with 0" in found[name], found
        assert "text_tokens must agree on all ranks" in found["unlike"], found
        assert "text_max_seqlen must be given with gather" in found["missing"], found


def test_transforms():
    image, text = (x.nan_to_num() for x in draw())
    packed = text[MASK]

    def packed_loss(packed, starts=STARTS):
        return efa_loss(image, packed, text_cu_seqlens=starts, text_max_seqlen=L)

    _, expected = value_and_grads(packed_loss, [packed], torch.ones(()))
    torch.testing.assert_close(torch.func.grad(packed_loss)(packed), expected)
    other = torch.tensor([0, 1, 5, 6, 14, 16])
    both = torch.stack([STARTS, other])
    values = torch.vmap(packed_loss)(torch.stack([packed, packed]), both)
    torch.testing.assert_close(values, torch.stack([packed_loss(packed, starts) for starts in both]))
    lengths = torch.stack([LENGTHS, LENGTHS.flip(0)])
    values = torch.vmap(lambda one: efa_loss(image, text, text_lengths=one))(lengths)
    torch.testing.assert_close(values, torch.stack([efa_loss(image, text, text_lengths=one) for one in lengths]))


@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals, by version
def test_compiled_once_for_batches_of_many_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    head = IRRHead(D, V, depth=1)

    def total(image, packed, starts, padded, lengths, labels):
        loss = efa_loss(image, packed, text_cu_seqlens=starts, text_max_seqlen=L)
        loss = loss + efa_loss(image, padded, text_lengths=lengths)
        return loss + head(image, padded, labels, text_lengths=lengths).loss

    compiled = torch.compile(total, backend=counter, fullgraph=True)
    for lengths in ([4, 0, 7, 1, 4], [9, 1, 1, 2], [3, 3, 3], [9, 9, 9, 9, 9, 9]):
        lengths = torch.tensor(lengths)
        mask, starts = length_mask(lengths, L), nn.functional.pad(lengths.cumsum(0), (1, 0))
        image, text = torch.randn(len(lengths), N, D), torch.randn(len(lengths), L, D)
        labels = torch.zeros(len(lengths), L, dtype=torch.int64)
        labels[:, 0] = 5
        given = (image, text[mask], starts, text, lengths, labels)
        torch.testing.assert_close(compiled(*given), total(*given))
    assert counter.frame_count <= 2


class Packed(nn.Module):
    def forward(self, image, packed, starts):
        return efa_loss(image, packed, text_cu_seqlens=starts, text_max_seqlen=L)


@pytest.mark.filterwarnings("ignore")
def test_exported_with_any_number_of_tokens():
    image, text = draw()
    tokens = torch.export.Dim("T", min=2, max=B * L)
    args = (image, text[MASK], STARTS)
    exported = torch.export.export(Packed(), args, dynamic_shapes=[None, {0: tokens}, None]).module()
    other = length_mask(LENGTHS.flip(0), L - 1)
    starts = nn.functional.pad(other.sum(1).cumsum(0), (1, 0))
    for given in (args, (image, torch.randn(int(starts[-1]), D), starts)):
        torch.testing.assert_close(exported(*given), Packed()(*given))
    assert exported(image, text[MASK], STARTS + 1).isnan()


WRONG_STARTS = {
    "does not begin with 0": torch.tensor([1, 4, 4, 11, 12, 16]),
    "all too late": STARTS + 1,
    "does not end with T": STARTS.clamp(max=15),
    "falls": torch.tensor([0, 4, 3, 11, 12, 16]),
    "longer than the bound": torch.tensor([0, 12, 12, 12, 12, 16]),
    "far outside": torch.tensor([-(2**62), 2**62, -1, 2**40, 0, 16]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("starts", WRONG_STARTS)
def test_wrong_starts_that_nobody_reads_make_the_loss_nan(starts):
    """torch.compile sees as little of them as the host does on an accelerator."""
    image, text = draw()
    loss = torch.compile(Packed(), backend="eager", fullgraph=True)
    assert loss(image, text[MASK], STARTS).isfinite()
    value, *grads = value_and_grads(lambda i, t: loss(i, t, WRONG_STARTS[starts]), (image, text[MASK]), torch.ones(()))
    assert value.isnan() and all(grad.isnan().any() for grad in grads)
    with explains(ValueError, ("text_", "must"), (), ()):
        Packed()(image, text[MASK], WRONG_STARTS[starts])
    padded, _ = torch.compile(pad_packed, backend="eager", fullgraph=True)(text[MASK], WRONG_STARTS[starts], L)
    assert padded.isnan().all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", [-1, L + 1, 2**62])
def test_wrong_lengths_that_nobody_reads_make_the_loss_nan(wrong):
    lengths = torch.where(torch.arange(B) == 2, wrong, LENGTHS)
    module, (*tensors, labels) = objective(), batch()
    pids = torch.arange(B)

    def terms(lengths):
        *given, masked = tensors
        return module(*given, pids, masked_text_tokens=masked, masked_labels=labels, text_lengths=lengths)

    out = torch.compile(terms, backend="eager", fullgraph=True)(lengths)
    assert {name: bool(x.isnan()) for name, x in (out.terms | out.metrics).items()} == {
        "asdm": False, "id": False, "image_accuracy": False, "text_accuracy": False,
        "efa": True, "irr": True, "mlm_accuracy": True,
    }  # fmt: skip
    with explains(ValueError, "text_lengths must lie in [0, L = 9]", f"{wrong} for sample 2", "count"):
        terms(lengths)


def test_an_accelerator_is_not_asked():
    tokens, image = torch.empty(16, D, device="meta"), torch.empty(B, N, D, device="meta")
    starts = STARTS.to("meta")
    text = captions(tokens, None, (None, starts, L), image)
    assert text.tokens.shape == (B, L, D) and text.mask.shape == (B, L) and text.right.device.type == "meta"
    assert captions(torch.empty(B, L, D, device="meta"), None, (LENGTHS.to("meta"), None, None), image).right.ndim == 0
    with explains(ValueError, "text_max_seqlen must be given where the host does not read", "None", "upper bound"):
        captions(tokens, None, (None, starts, None), image)
    with explains(ValueError, "max_seqlen must be given where", "None", "upper bound"):
        pad_packed(tokens, starts)


def bad(text=None, labels=None, **given):
    image, padded = draw()
    return lambda: efa_loss(image, padded if text is None else text, **given)


PACKED = torch.randn(16, D)
BAD = {
    "both": (bad(text_mask=MASK, text_lengths=LENGTHS), ValueError, "only one of", "text_mask and text_lengths", "out"),
    "three": (
        bad(PACKED, text_mask=MASK, text_lengths=LENGTHS, text_cu_seqlens=STARTS),
        ValueError, "only one of", "text_mask and text_lengths and text_cu_seqlens", "leave out",
    ),
    "float": (bad(text_lengths=LENGTHS.float()), TypeError, "text_lengths must be an integer", "float32", ".long()"),
    "bool": (bad(text_lengths=LENGTHS.bool()), TypeError, "text_lengths must be an integer", "bool", ".long()"),
    "a list": (bad(text_lengths=[1, 2, 3, 4, 5]), TypeError, "text_lengths must be an integer", "list", "as_tensor"),
    "too few": (bad(text_lengths=LENGTHS[1:]), ValueError, "text_lengths must have shape [5]", "int64 [4]", None),
    "too many dimensions": (bad(text_lengths=LENGTHS[:, None]), ValueError, "must have shape [5]", "[5, 1]", None),
    "too long": (bad(text_lengths=LENGTHS + 3), ValueError, "lie in [0, L = 9]", "10 for sample 2", "count"),
    "negative": (bad(text_lengths=LENGTHS - 1), ValueError, "lie in [0, L = 9]", "-1 for sample 1", "count"),
    "lengths elsewhere": (
        bad(text_lengths=LENGTHS.to("meta")), ValueError, "text_lengths must be on cpu", "on meta", ".to('cpu')",
    ),
    "starts elsewhere": (
        bad(PACKED, text_cu_seqlens=STARTS.to("meta")), ValueError, "text_cu_seqlens must be on cpu", "meta", ".to(",
    ),
    "starts of floats": (bad(PACKED, text_cu_seqlens=STARTS.half()), TypeError, "text_cu_seqlens must be an integer"),
    "no end": (bad(PACKED, text_cu_seqlens=STARTS[:-1]), ValueError, "shape [6]", "[5]", None),
    "not packed": (
        bad(text_cu_seqlens=STARTS), ValueError, "text_tokens must have shape [T D]", "[5, 9, 64]", "text_lengths=",
    ),
    "not padded": (bad(PACKED), ValueError, ("[B L D]", "[T D] with text_cu_seqlens"), "[16, 64]", "starts"),
    "first": (bad(PACKED, text_cu_seqlens=STARTS + 1), ValueError, ("begin with 0", "T = 16"), "1 at the start"),
    "last": (bad(PACKED[1:], text_cu_seqlens=STARTS), ValueError, "end with T = 15", "16 at the end", "cumulative"),
    "falls": (
        bad(PACKED, text_cu_seqlens=WRONG_STARTS["falls"]), ValueError, "never fall", "4 and then 3 at caption 1", "0",
    ),
    "bound too low": (
        bad(PACKED, text_cu_seqlens=STARTS, text_max_seqlen=6), ValueError, ("at least the longest", "7"), "6", "bound",
    ),
    "bound alone": (bad(text_max_seqlen=9), ValueError, "must come with text_cu_seqlens", "9 alone", "leave it out"),
    "bound of 0": (bad(PACKED, text_cu_seqlens=STARTS, text_max_seqlen=0), ValueError, "an integer >= 1", "0", None),
    "bound of a tensor": (
        bad(PACKED, text_cu_seqlens=STARTS, text_max_seqlen=torch.tensor(9)), TypeError, "an integer >= 1", "int64",
    ),
    "no sample": (lambda: pad_packed(PACKED, torch.tensor([0])), ValueError, "[B + 1]", "[1]", "cumulative"),
    "no room": (
        lambda: captions(PACKED.to("meta"), None, (None, STARTS.to("meta"), 3), PACKED[:5].to("meta")),
        ValueError, "room for all T = 16 tokens of 5 samples", "3", "bound",
    ),
    "mask of floats": (lambda: length_mask(LENGTHS.float(), L), TypeError, "lengths must be an integer", "float32"),
    "mask too small": (lambda: length_mask(LENGTHS, 5), ValueError, "lengths must lie in [0, size = 5]", "7", "count"),
    "mask of one number": (lambda: length_mask(LENGTHS[0], 5), ValueError, "must have shape [B]", "int64 []", "shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, *words = BAD[name]
    with explains(kind, *words):
        call()


def test_bad_input_of_the_objective():
    module, (*tensors, labels) = objective(), batch()
    image_features, text_features, image, text, masked = tensors

    def call(labels, masked=masked[MASK], **given):
        tokens = (image_features, text_features, image, text[MASK], torch.arange(B))
        return module(*tokens, masked_text_tokens=masked, masked_labels=labels, text_cu_seqlens=STARTS, **given)

    with explains(ValueError, "masked_text_tokens must have shape [T D]", "[5, 9, 64]", "reshape"):
        call(labels, masked)
    with explains(ValueError, "masked_text_tokens must have shape [16, 64]", "[15, 64]"):
        call(labels, masked[MASK][1:])
    with explains(ValueError, "masked_labels must have shape [16]", "[15]"):
        call(labels[MASK][1:])
    with explains(ValueError, "masked_labels must have shape [5, 7]", "[5, 9]"):
        call(labels)
    with explains(TypeError, "masked_labels must be", "float32", "long"):
        call(labels[MASK].float())
    with explains(ValueError, "masked_labels [T] must be on cpu", "meta", "[B, text_max_seqlen]"):
        call(labels[MASK].to("meta"))


@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_refused():
    image, text = draw()
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot follow"):
        torch.jit.trace(lambda i, t: efa_loss(i, t, text_cu_seqlens=STARTS), (image, text[MASK]))
