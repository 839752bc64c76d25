"""mask_tokens: what holds for every caption, and the shares over many."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmfa_losses.heads.token_masking import mask_tokens

MASK, START, END = 49405, 49406, 49407
SPECIAL = (0, START, END)

ids = st.one_of(st.sampled_from((0, MASK, START, END)), st.integers(1, MASK - 1))
captions = st.integers(1, 12).flatmap(lambda l: st.lists(st.lists(ids, min_size=l, max_size=l), min_size=1, max_size=5))
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def is_content(token_ids: torch.Tensor) -> torch.Tensor:
    return ~torch.isin(token_ids, torch.tensor((*SPECIAL, MASK)))


@settings(max_examples=150, deadline=None)
@given(captions, st.sampled_from((0.0, 0.15, 0.6, 1.0)), seeds)
def test_what_holds_for_every_caption(rows, probability, seed):
    token_ids = torch.tensor(rows)
    before, content = token_ids.clone(), is_content(token_ids)
    masked, labels = mask_tokens(token_ids, probability=probability, generator=generator(seed))
    chosen = labels != 0

    assert torch.equal(token_ids, before), "the input is never changed"
    assert masked.data_ptr() != token_ids.data_ptr()
    assert torch.equal(labels, torch.where(chosen, token_ids, 0)), "labels are the ids where chosen"
    assert torch.equal(masked[~chosen], token_ids[~chosen]), "nothing else changes"
    assert not (chosen & ~content).any(), "only content is chosen"
    assert torch.equal(chosen.any(1), content.any(1)), "at least one a caption that has content"
    replaced = chosen & (masked != token_ids) & (masked != MASK)
    assert ((masked[replaced] > 0) & (masked[replaced] < MASK)).all(), "random words are ordinary ids"
    if probability == 1:
        assert torch.equal(chosen, content)
    if probability == 0:
        assert (chosen.sum(1) <= 1).all()

    again = mask_tokens(token_ids, probability=probability, generator=generator(seed))
    assert torch.equal(masked, again[0])
    assert torch.equal(labels, again[1])


def within(count: int, total: int, share: float) -> bool:
    """Within 4.5 standard errors of a binomial share, which chance leaves once in 150 000 times; seeds are fixed."""
    return abs(count - total * share) <= 4.5 * math.sqrt(total * share * (1 - share))


def test_shares_over_many_captions():
    token_ids = torch.full((2000, 77), 1234)
    token_ids[:, 0], token_ids[:, 40], token_ids[:, 41:] = START, END, 0
    masked, labels = mask_tokens(token_ids, generator=generator(0))
    chosen = labels != 0
    total, content = int(chosen.sum()), int(is_content(token_ids).sum())
    assert within(total, content, 0.15)  # 39 words a caption: "at least one" adds 0.0002 to the share
    assert within(int((masked[chosen] == MASK).sum()), total, 0.8)
    assert within(int((masked[chosen] == 1234).sum()), total, 0.1)
    words = masked[chosen & (masked != MASK) & (masked != 1234)]
    assert within(len(words), total, 0.1)
    assert within(int((words < MASK // 2).sum()), len(words), 0.5), "random words are uniform"
    assert words.unique().numel() > 0.95 * len(words)


def test_every_content_token_is_equally_likely_to_be_the_one():
    token_ids = torch.tensor([[START, 5, 6, 7, 8, END, 0]]).expand(8000, -1)
    _, labels = mask_tokens(token_ids, probability=0.0, generator=generator(0))
    counts = (labels != 0).sum(0)
    assert counts.sum() == 8000
    assert all(within(int(count), 8000, 0.25) for count in counts[1:5])


def test_random_words_step_over_reserved_ids():
    token_ids = torch.full((1, 20000), 9)
    kwargs = {"mask_id": 3, "special_ids": (0, 1, 6), "vocab_size": 10, "probability": 1.0}
    masked, _ = mask_tokens(token_ids, **kwargs, generator=generator(0))
    words = masked[masked != 3]
    assert words.unique().tolist() == [2, 4, 5, 7, 8, 9]
    drawn = [int((words == word).sum()) for word in (2, 4, 5, 7, 8)]
    assert all(within(count, 2000, 1 / 6) for count in drawn)


def test_default_words_reach_both_ends_of_the_ordinary_ids():
    token_ids = torch.full((1, 20000), 5)
    masked, _ = mask_tokens(token_ids, mask_id=8, special_ids=(0, 9, 10), probability=1.0, generator=generator(0))
    words = masked[masked != 8].unique().tolist()
    assert words == [1, 2, 3, 4, 5, 6, 7]


def test_zero_is_padding_whatever_the_special_ids():
    token_ids = torch.tensor([[0, 5, 0]])
    masked, labels = mask_tokens(token_ids, special_ids=(), probability=1.0)
    assert labels.tolist() == [[0, 5, 0]]
    assert masked[0, [0, 2]].tolist() == [0, 0]


def test_captions_without_content_get_no_mask():
    token_ids = torch.tensor([[START, END, 0, 0], [0, 0, 0, 0], [START, MASK, END, 0], [START, 7, END, 0]])
    masked, labels = mask_tokens(token_ids, probability=1.0)
    assert torch.equal(masked[:3], token_ids[:3])
    assert labels.tolist() == [[0] * 4, [0] * 4, [0] * 4, [0, 7, 0, 0]]


def test_one_caption_and_one_token():
    masked, labels = mask_tokens(torch.tensor([START, 5, 6, END]), generator=generator(1))
    assert masked.shape == labels.shape == (4,)
    assert (labels != 0).any()
    assert mask_tokens(torch.tensor([[5]]))[1].tolist() == [[5]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_dtype_is_kept(dtype):
    token_ids = torch.tensor([[START, 5, 6, END]], dtype=dtype)
    masked, labels = mask_tokens(token_ids, probability=1.0)
    assert masked.dtype == labels.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_changes_nothing(dtype):
    token_ids = torch.randint(1, MASK, (20, 77))
    expected = mask_tokens(token_ids, generator=generator(3))
    torch.set_default_dtype(dtype)
    try:
        masked = mask_tokens(token_ids, generator=generator(3))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, masked, expected))


def test_global_generator_follows_the_seed():
    token_ids = torch.randint(1, MASK, (4, 20))
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(mask_tokens(token_ids)[0])
    assert torch.equal(*results)


def test_nothing_reads_values_of_an_accelerator():
    # Meta tensors have no values: whatever would wait for an accelerator raises here.
    masked, labels = mask_tokens(torch.zeros(3, 7, dtype=torch.long, device="meta"))
    assert masked.device.type == labels.device.type == "meta"
    assert masked.shape == labels.shape == (3, 7)


# --- a probability for every token ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("probability", [0.0, 0.15, 0.5, 1.0])
def test_one_probability_for_all_tokens_is_the_number(probability, dtype):
    token_ids = torch.randint(1, MASK, (200, 20), generator=generator(1))
    token_ids[:, 0], token_ids[::3, 10], token_ids[::3, 11:] = START, END, 0
    expected = mask_tokens(token_ids, probability=probability, generator=generator(2))
    for shape in ((200, 20), (20,)):
        tensor = torch.full(shape, probability, dtype=dtype)
        assert all(map(torch.equal, mask_tokens(token_ids, probability=tensor, generator=generator(2)), expected))
    one = mask_tokens(token_ids[0], probability=torch.full((20,), probability), generator=generator(2))
    assert all(map(torch.equal, one, mask_tokens(token_ids[0], probability=probability, generator=generator(2))))


def test_draws_of_a_number_are_those_of_the_version_before():
    token_ids = torch.arange(1, 13).reshape(2, 6)
    masked, labels = mask_tokens(token_ids, probability=0.3, mask_id=20, generator=generator(5))
    assert masked.tolist() == [[1, 20, 3, 4, 5, 20], [20, 8, 20, 10, 11, 12]]
    assert labels.tolist() == [[0, 2, 0, 0, 0, 6], [7, 0, 9, 0, 0, 0]]


@settings(max_examples=150, deadline=None)
@given(captions, st.integers(0, 2**16), seeds)
def test_what_holds_for_every_caption_with_probabilities(rows, which, seed):
    token_ids = torch.tensor(rows)
    probability = torch.tensor([0.0, 0.0, 1e-30, 0.15, 0.9, 1.0])[
        torch.randint(6, token_ids.shape, generator=generator(which))
    ]
    content = is_content(token_ids)
    chosen = mask_tokens(token_ids, probability=probability, generator=generator(seed))[1] != 0
    likely = content & (probability > 0)
    assert not (chosen & ~content).any()
    assert torch.equal(chosen.any(1), content.any(1)), "at least one a caption that has content"
    assert (chosen >= (content & (probability == 1))).all()
    some = likely.any(1)
    assert not (chosen & ~likely)[some].any(), "a probability of 0 is never chosen beside others"
    assert (chosen[~some].sum(1) <= 1).all()


def test_shares_are_the_probabilities():
    token_ids = torch.tensor([[START, 5, 6, 7, 8, 9, END, 0]]).expand(20000, -1)
    probability = torch.tensor([0.9, 0.0, 0.05, 0.3, 0.6, 1.0, 0.9, 0.9])
    counts = (mask_tokens(token_ids, probability=probability, generator=generator(0))[1] != 0).sum(0)
    assert counts[[0, 1, 6, 7]].tolist() == [0, 0, 0, 0]
    assert counts[5] == 20000
    assert all(within(int(counts[i]), 20000, float(probability[i])) for i in (2, 3, 4))


def test_the_one_token_of_a_caption_is_rather_a_likely_one():
    """Of two tokens with p and 2 p, both small, the second is the one of smallest u / p in 3 of 4 captions."""
    token_ids = torch.tensor([[5, 6, 7]]).expand(20000, -1)
    probability = torch.tensor([1e-6, 2e-6, 0.0])
    counts = (mask_tokens(token_ids, probability=probability, generator=generator(0))[1] != 0).sum(0)
    assert counts.sum() == 20000 and counts[2] == 0
    assert within(int(counts[1]), 20000, 0.75)


def test_noise_aware_masking():
    """As in the docstring: the expected share of a caption is 0.15, and words unlike the image are masked rather."""
    s = 0.3 + 0.1 * torch.rand(4000, 12, generator=generator(1))
    s[:, 3] = 0.25
    probability = (0.15 + s.mean(dim=1, keepdim=True) - s).clamp(0, 1)
    token_ids = torch.full((4000, 12), 1234)
    chosen = mask_tokens(token_ids, probability=probability.requires_grad_(), generator=generator(0))[1] != 0
    assert chosen[:, 3].sum() > 1.5 * chosen[:, 4].sum()
    alone = (1 - probability).prod(dim=1).sum().item()  # captions whose one token is the one of "at least one"
    assert abs(chosen.sum().item() - alone - 0.15 * chosen.numel()) < 4.5 * (0.15 * chosen.numel()) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_strided_and_expanded_probabilities(dtype):
    token_ids = torch.randint(1, MASK, (6, 8))
    wide = torch.rand(8, 12).to(dtype)
    strided = wide.T[::2]
    assert not strided.is_contiguous()
    expected = mask_tokens(token_ids, probability=strided.float().contiguous(), generator=generator(0))
    assert all(map(torch.equal, mask_tokens(token_ids, probability=strided, generator=generator(0)), expected))
    row = strided[:1].expand(6, -1)
    expected = mask_tokens(token_ids, probability=row.clone(), generator=generator(0))
    assert all(map(torch.equal, mask_tokens(token_ids, probability=row, generator=generator(0)), expected))


def test_probabilities_of_an_accelerator_are_not_looked_at():
    token_ids = torch.zeros(3, 7, dtype=torch.long, device="meta")
    masked, _ = mask_tokens(token_ids, probability=torch.zeros(3, 7, device="meta"))
    assert masked.shape == (3, 7)


@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals, by version
def test_where_values_are_not_checked_nan_is_zero_and_the_others_are_clamped():
    token_ids = torch.tensor([[5, 6, 7, 8]]).expand(50, -1)
    wrong = torch.tensor([math.nan, -1.0, 2.0, math.inf])
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids, p: mask_tokens(ids, probability=p)[1], fullgraph=True, backend="aot_eager")
    assert compiled(token_ids, wrong).tolist() == [[0, 0, 7, 8]] * 50
    assert (compiled(token_ids, torch.full((4,), math.nan)) != 0).sum(1).tolist() == [1] * 50


CAPTION = torch.tensor([[START, 5, 6, END]])


@pytest.mark.parametrize(
    ("token_ids", "kwargs", "error", "message"),
    [
        (CAPTION.tolist(), {}, TypeError, r"token_ids must be an integer tensor \[B, L\], got list"),
        (CAPTION.float(), {}, TypeError, r"token_ids must be an integer tensor, got float32 .*token_ids.long\(\)"),
        (CAPTION.bool(), {}, TypeError, r"token_ids must be an integer tensor, got bool"),
        (CAPTION[None], {}, ValueError, r"token_ids must be \[B, L\] or \[L\] and not empty, got int64 \[1, 1, 4\]"),
        (CAPTION[:, :0], {}, ValueError, r"not empty, got int64 \[1, 0\]"),
        (CAPTION.short(), {}, ValueError, r"must be of a dtype that holds the ids 0 to 49407, got int16 .*long\(\)"),
        (CAPTION, {"probability": 1.5}, ValueError, r"probability must lie in \[0, 1\], got 1.5"),
        (CAPTION, {"probability": math.nan}, ValueError, r"probability must lie in \[0, 1\], got nan"),
        (
            CAPTION,
            {"probability": torch.ones(1, 3)},
            TypeError,
            r"a tensor \[1, 4\] or \[4\].*got float32 \[1, 3\].*as_tensor",
        ),
        (CAPTION, {"probability": torch.tensor(0.5)}, TypeError, r"probability must be a number .*got float32 \[\]"),
        (CAPTION, {"probability": [0.5] * 4}, TypeError, r"probability must be .* a tensor .*as_tensor"),
        (CAPTION, {"probability": torch.rand(1, 4).numpy()}, TypeError, r"probability must be .* a tensor .*as_tensor"),
        (CAPTION, {"probability": torch.ones(1, 4).long()}, TypeError, r"probability must be a floating-point tensor"),
        (
            CAPTION,
            {"probability": torch.tensor([0.5, 0, 1.5, 0])},
            ValueError,
            r"lie in \[0, 1\], got 0 to 1.5; .*clamp",
        ),
        (CAPTION, {"probability": torch.tensor([0.5, 0, math.nan, 0])}, ValueError, r"lie in \[0, 1\], got nan"),
        (CAPTION, {"probability": torch.ones(4, device="meta")}, ValueError, r"device of token_ids, got meta and cpu"),
        (CAPTION, {"generator": 0}, TypeError, r"generator must be a torch.Generator, got int 0; .*manual_seed"),
        (CAPTION, {"mask_id": 1}, ValueError, r"must be an ordinary id below 1 .*pass vocab_size"),
        (
            CAPTION.to("meta"),
            {"generator": torch.Generator()},
            ValueError,
            r"generator must be on the device of token_ids",
        ),
    ],
)
def test_bad_input(token_ids, kwargs, error, message):
    with pytest.raises(error, match=message):
        mask_tokens(token_ids, **kwargs)
