"""What a batch holds: images as augmentation leaves them, and pairs in the order of a sampler."""

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.person_retrieval.data import (
    Augmentation,
    Batches,
    IdentitySampler,
    Pairs,
    RandomSampler,
    rendered_splits,
)
from benchmarks.person_retrieval.models import WordTokenizer

# -------------------------------------------------------------------------------------------------- augmentation

BRIGHT = np.random.default_rng(0).integers(160, 256, (96, 32, 3)).astype(np.uint8)  # not black, not the grey of erasing
ERASED = [round((std * mean + mean) * 255) for mean, std in zip(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), strict=True
)]  # fmt: skip


def test_a_flip_changes_left_and_right() -> None:
    flip = Augmentation(flip=1.0, pad=0, erase=0.0)
    assert (flip(BRIGHT, np.random.default_rng(0)) == BRIGHT[:, ::-1]).all()
    half = Augmentation(pad=0, erase=0.0)
    flipped = [bool((half(BRIGHT, np.random.default_rng(i)) != BRIGHT).any()) for i in range(200)]
    assert 58 < sum(flipped) < 142  # six standard deviations


@pytest.mark.parametrize(("height", "pad"), [(384, 10), (96, 3), (48, 1), (19, 0)])
def test_a_shift_shows_the_image_in_a_black_frame(height: int, pad: int) -> None:
    """The pad of 10 is of 384 rows; every offset is drawn, none always."""
    pixels = np.arange(1, 1 + height, dtype=np.uint16)[:, None, None] * np.ones((1, 24, 3), dtype=np.uint16)
    shift, offsets = Augmentation(flip=0.0, erase=0.0), set()
    for i in range(300):
        out = shift(pixels, np.random.default_rng(i))
        assert out.shape == pixels.shape
        rows, columns = (np.flatnonzero(out.any(axis=axes)) for axes in ((1, 2), (0, 2)))
        down = int(rows[0]) if rows[0] else int(rows[-1]) + 1 - height
        right = int(columns[0]) if columns[0] else int(columns[-1]) + 1 - 24
        framed = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))[pad - down :, pad - right :][:height, :24]
        assert (out == framed).all()
        offsets.add((down, right))
    for axis in zip(*offsets, strict=True):
        assert set(axis) == set(range(-pad, pad + 1))
    if pad == 0:
        assert (shift(pixels, np.random.default_rng(0)) == pixels).all()


@given(seed=st.integers(0, 2**32), height=st.integers(1, 60), width=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_an_erased_rectangle_is_grey_and_within_its_bounds(seed: int, height: int, width: int) -> None:
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    out = Augmentation(flip=0.0, pad=0, erase=1.0)(pixels, np.random.default_rng(seed))
    assert (pixels == 255).all() and out.shape == pixels.shape
    gone = (out != 255).all(axis=2)
    if not gone.any():  # no room for one
        return
    rows, columns = (np.flatnonzero(gone.any(axis=axis)) for axis in (1, 0))
    h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert gone.sum() == h * w and out[gone].tolist() == [ERASED] * (h * w)
    assert h < height and w < width
    # The sides before they were rounded have an area and an aspect within the bounds.
    assert (h + 0.5) * (w + 0.5) >= 0.02 * height * width and (h - 0.5) * (w - 0.5) <= 0.4 * height * width
    assert (h + 0.5) / max(w - 0.5, 1e-9) >= 0.3 and (h - 0.5) / (w + 0.5) <= 3.3


def test_erasing_happens_half_of_the_time_with_areas_between_the_bounds() -> None:
    erase = Augmentation(flip=0.0, pad=0)
    shares = np.array([(erase(BRIGHT, np.random.default_rng(i)) == ERASED).all(axis=2).mean() for i in range(200)])
    assert 58 < (shares > 0).sum() < 142
    assert shares[shares > 0].min() < 0.08 and shares.max() > 0.3
    assert 0.13 < shares[shares > 0].mean() < 0.26  # uniform: 0.21, less where the widest have no room


def test_augmentation_follows_from_seed_epoch_and_index() -> None:
    train = rendered_splits({"train": 2}, seed=0)["train"]
    ids = WordTokenizer(train.captions)(train.captions)
    pairs, again = (Pairs(train, ids, size=(96, 32), seed=4, augmentation=Augmentation()) for _ in range(2))
    assert torch.equal(pairs[1]["pixels"], again[1]["pixels"])
    pairs.epoch = 1
    drawn = [bool((pairs[i]["pixels"] != again[i]["pixels"]).any()) for i in range(6)]
    assert sum(drawn) >= 5
    assert not torch.equal(pairs[0]["pixels"], pairs[1]["pixels"])  # two captions of one image
    assert pairs[0]["pixels"].dtype == torch.uint8
    plain, kept = (Pairs(train, ids, size=(96, 32), keep=keep) for keep in (False, True))
    resized = np.asarray(train.photograph(0).resize((32, 96), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    for pixels in (plain[0]["pixels"], plain[1]["pixels"], plain.images()[0], kept.images()[0], kept[1]["pixels"]):
        assert (pixels.numpy() == resized).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"flip": 1.5}, "flip must be a probability from 0 to 1, got 1.5"),
        ({"erase": float("nan")}, "erase must be a probability from 0 to 1, got nan"),
        ({"pad": -1}, "pad must be at least 0 pixels, got -1"),
        ({"erase_area": (0.4, 0.02)}, "erase_area must be two rising shares"),
        ({"erase_aspect": (0.0, 1.0)}, "erase_aspect must be two rising ratios"),
    ],
)
def test_augmentation_that_cannot_be_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**setting)


# ------------------------------------------------------------------------------------------------------- batches


def test_identity_batches_hold_groups() -> None:
    pids = torch.arange(10).repeat_interleave(9)
    sampler = IdentitySampler(pids, per_identity=4, seed=1)
    drawn = list(sampler)
    assert len(drawn) == len(set(drawn)) == len(sampler) == 80
    groups = pids[torch.tensor(drawn)].view(-1, 4)
    assert (groups.amax(1) == groups.amin(1)).all()
    sampler.epoch = 1
    assert list(sampler) != drawn
    with pytest.raises(ValueError, match="per_identity must be at least 1, got 0"):
        IdentitySampler(pids, per_identity=0)


def test_every_seed_and_epoch_has_its_own_order() -> None:
    orders = set()
    for seed in range(3):
        sampler = RandomSampler(50, seed=seed)
        for epoch in range(3):
            sampler.epoch = epoch
            orders.add(tuple(sampler))
    assert len(orders) == 9 and {frozenset(order) for order in orders} == {frozenset(range(50))}


@pytest.mark.parametrize("sampler", [RandomSampler(23, seed=3), IdentitySampler(torch.arange(23) // 5, seed=3)])
@pytest.mark.parametrize(("world", "size"), [(2, 4), (3, 2), (4, 1), (2, 16), (3, 16)])
def test_processes_read_slices_of_the_batches_of_one(
    sampler: RandomSampler | IdentitySampler, world: int, size: int
) -> None:
    whole = Batches(sampler, world * size)
    shares = [Batches(sampler, size, rank=rank, world_size=world) for rank in range(world)]
    for epoch in range(2):
        for batches in (whole, *shares):
            batches.set_epoch(epoch)
        assert len(list(whole)) == len(whole) == len(shares[0]) > 0
        together = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
        assert together == list(whole)
        if world * size <= len(sampler):
            assert all(len(batch) == size for batches in shares for batch in batches)
        else:  # all pairs are one batch, and processes get one pair more or less
            assert sorted(together[0]) == sorted(sampler)
            assert {len(batch) for batches in shares for batch in batches} <= {
                len(sampler) // world,
                len(sampler) // world + 1,
            }
    with pytest.raises(ValueError, match="got 2 pairs for 3 processes"):
        Batches(RandomSampler(2), size, rank=1, world_size=3)
