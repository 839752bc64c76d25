"""Rendered pedestrians: who they are, how they look, what is written about them, and in which splits they are."""

import numpy as np

from benchmarks.person_retrieval.data import catalogue_split, rendered_splits
from benchmarks.person_retrieval.models import WordTokenizer
from benchmarks.person_retrieval.models.pretrained import COMMITTED, load_two_stream
from benchmarks.person_retrieval.pedestrians import (
    CATALOGUE,
    HEIGHT,
    STUDIO,
    WIDTH,
    alt_text,
    caption,
    make_identities,
    render,
)


def test_the_same_seed_draws_the_same_pixels_and_another_does_not() -> None:
    who = make_identities(3, seed=5)[2]
    first, again, other = (np.asarray(render(who, seed=(5, 2, n)).image) for n in (0, 0, 1))
    assert first.shape == (HEIGHT, WIDTH, 3)
    assert (first == again).all()
    assert np.abs(first.astype(int) - other.astype(int)).mean() > 5


def test_no_two_people_share_a_description_and_lookalikes_exist() -> None:
    people = make_identities(300, seed=1)
    assert people == make_identities(300, seed=1)
    assert len({who.described() for who in people}) == 300
    keys = [(who.upper, who.upper_color, who.lower, who.lower_color) for who in people]
    assert len(set(keys)) < 300  # people whom only shoes, hair, hat or bag tell apart


def test_captions_tell_only_what_is_seen() -> None:
    people = make_identities(200, seed=2)
    photos = [render(who, seed=(2, i, 0)) for i, who in enumerate(people[:60])]
    for i, (who, photo) in enumerate(zip(people, photos, strict=False)):
        for write in (caption, alt_text):
            texts = [write(who, photo, seed=(2, i, wording)) for wording in range(6)]
            assert len(set(texts)) > 2
            assert texts[0] == write(who, photo, seed=(2, i, 0))
            told = " ".join(texts)
            assert not (photo.feet_hidden and any(word in told for word in ("shoes", "sneakers", "footwear")))
            assert not (photo.view != "front" and any(word in told for word in ("glasses", "logo", "emblem", "print")))
            assert not (who.bag == "none" and "bag" in told)
            assert photo.walking or "walk" not in told


def test_the_catalogue_is_another_world() -> None:
    """Other clothes, other light, other sentences; the same words for things."""
    street, catalogue = make_identities(400, seed=3), make_identities(400, seed=3, wardrobe=CATALOGUE, lookalikes=0.0)
    rare = [sum(who.upper_color in ("orange", "teal") for who in people) for people in (street, catalogue)]
    assert rare[0] > 3 * rare[1]
    assert not {who.described() for who in street} & {who.described() for who in catalogue}
    photos = [render(who, seed=(3, i, 0), camera=STUDIO) for i, who in enumerate(catalogue[:40])]
    texts = [alt_text(who, photo, seed=(3, i)) for i, (who, photo) in enumerate(zip(catalogue, photos, strict=False))]
    words = {word for text in texts for word in text.split()}
    assert not words & {"walking", "carries", "she", "camera", "wears"}
    assert sum(photo.view == "front" for photo in photos) > 20


def test_no_identity_is_in_two_splits() -> None:
    splits = rendered_splits({"train": 8, "val": 3, "test": 5}, seed=3)
    people = make_identities(16, seed=3)
    assert [split.num_identities for split in splits.values()] == [8, 3, 5]
    train, test = splits["train"], splits["test"]
    assert len(train.captions) == 2 * len(train.image_pids) == 32
    # The split's photographs are those of its own people.
    assert (np.asarray(test.photograph(1)) == np.asarray(render(people[11], seed=(3, 11, 1)).image)).all()
    assert test.image_pids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert test.caption_pids.tolist() == [pid for pid in range(5) for _ in range(4)]
    pictures = catalogue_split(4, size=(48, 16), seed=3)
    assert pictures.num_identities == len(pictures.captions) == 4 and pictures.photograph(0).size == (16, 48)


def test_the_committed_weights_know_every_word_and_fit_into_3_mb() -> None:
    assert COMMITTED.stat().st_size <= 3 * 10**6
    tokenizer = load_two_stream(None, image_size=(96, 32)).tokenizer
    splits = rendered_splits({"train": 12}, seed=4)
    assert not (tokenizer(splits["train"].captions) == tokenizer.unknown_id).any()


def test_tokenizer_keeps_eot_and_marks_the_unknown() -> None:
    tokenizer = WordTokenizer(["a red coat .", "a T-shirt"], context_length=5)
    ids = tokenizer(["a red coat and a red coat", "t-shirt zebra"])
    assert ids.shape == (2, 5)
    assert ids[0, -1] == tokenizer.eot_id == tokenizer.vocab_size - 1
    assert tokenizer.words(ids[1]) == ["t-shirt", "?"]
    assert tokenizer.mask_id == tokenizer.vocab_size - 3
