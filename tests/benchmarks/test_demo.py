"""The retrieval run, small: rendered pedestrians, the three layouts on disk, the commands."""

import json
import os
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.person_trainer import difference
from PIL import Image

from benchmarks import results
from benchmarks.person_retrieval.__main__ import main
from benchmarks.person_retrieval.data import (
    LAYOUTS,
    Batches,
    IdentitySampler,
    Pairs,
    RandomSampler,
    read_dataset,
    rendered_splits,
)
from benchmarks.person_retrieval.models import WordTokenizer
from benchmarks.person_retrieval.pedestrians import HEIGHT, WIDTH, caption, make_identities, render
from benchmarks.person_retrieval.training import Trainer

ROOT = Path(__file__).parents[2]
GLOO = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no Gloo")
TINY_RUN = [
    "--identities",
    "12",
    "--test-identities",
    "6",
    "--batch-size",
    "16",
    "--epochs",
    "2",
    "--quiet",
    "--device",
    "cpu",
]


# --------------------------------------------------------------------------------------------------- pedestrians


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
        texts = [caption(who, photo, seed=(2, i, wording)) for wording in range(6)]
        assert len(set(texts)) > 3
        assert texts[0] == caption(who, photo, seed=(2, i, 0))
        told = " ".join(texts)
        assert not (photo.feet_hidden and any(word in told for word in ("shoes", "sneakers", "footwear")))
        assert not (photo.view != "front" and any(word in told for word in ("glasses", "logo", "emblem", "print")))
        assert not (who.bag == "none" and "bag" in told)
        assert photo.walking or "walk" not in told


def test_no_test_identity_is_in_training() -> None:
    train, test = rendered_splits(8, 5, images=2, test_images=2, seed=3)
    people = make_identities(13, seed=3)
    assert not {who.described() for who in people[:8]} & {who.described() for who in people[8:]}
    assert (train.num_identities, test.num_identities) == (8, 5)
    assert len(train.captions) == 2 * len(train.image_pids) == 32
    # The split's photographs are those of its own people.
    assert (np.asarray(test.photograph(1)) == np.asarray(render(people[8], seed=(3, 8, 1)).image)).all()
    assert test.image_pids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert test.caption_pids.tolist() == [pid for pid in range(5) for _ in range(4)]


# ------------------------------------------------------------------------------------------------------- reading


def test_tokenizer_keeps_eot_and_marks_the_unknown() -> None:
    tokenizer = WordTokenizer(["a red coat .", "a T-shirt"], context_length=5)
    ids = tokenizer(["a red coat and a red coat", "t-shirt zebra"])
    assert ids.shape == (2, 5)
    assert ids[0, -1] == tokenizer.eot_id == tokenizer.vocab_size - 1
    assert tokenizer.words(ids[1]) == ["t-shirt", "?"]
    assert tokenizer.mask_id == tokenizer.vocab_size - 3


def test_augmentation_follows_from_seed_epoch_and_index() -> None:
    train, _ = rendered_splits(3, 1, images=1, seed=0)
    ids = WordTokenizer(train.captions)(train.captions)
    pairs, again = (Pairs(train, ids, size=(96, 32), seed=4) for _ in range(2))
    assert torch.equal(pairs[1]["pixels"], again[1]["pixels"])
    pairs.epoch = 1
    drawn = [bool((pairs[i]["pixels"] != again[i]["pixels"]).any()) for i in range(6)]
    assert sum(drawn) >= 3
    assert pairs[0]["pixels"].dtype == torch.uint8
    plain = Pairs(train, ids, size=(96, 32), augment=False)
    assert torch.equal(plain.images()[0], plain[0]["pixels"])


def test_identity_batches_hold_groups() -> None:
    pids = torch.arange(10).repeat_interleave(9)
    sampler = IdentitySampler(pids, per_identity=4, seed=1)
    drawn = list(sampler)
    assert len(drawn) == len(set(drawn)) == len(sampler) == 80
    groups = pids[torch.tensor(drawn)].view(-1, 4)
    assert (groups.amax(1) == groups.amin(1)).all()
    sampler.epoch = 1
    assert list(sampler) != drawn


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


def folder_of(root: Path, name: str) -> Path:
    """A data set of four training and two test identities in the layout of `name`."""
    file, path_key = LAYOUTS[name]
    entries = []
    for i, who in enumerate(make_identities(6, seed=9)):
        for number in range(2):
            photo = render(who, seed=(9, i, number))
            path = Path("cam") / f"{i:04d}_{number}.png"
            (root / name / "imgs" / "cam").mkdir(parents=True, exist_ok=True)
            photo.image.save(root / name / "imgs" / path)
            captions = [caption(who, photo, seed=(9, i, number, wording)) for wording in range(2)]
            split = "train" if i < 4 else "test"
            entries.append({"id": 100 + 7 * i, path_key: path.as_posix(), "split": split, "captions": captions})
    (root / name / file).write_text(json.dumps(entries), encoding="utf-8")
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_in_each_layout_trains_and_resumes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = folder_of(tmp_path, name)
    train, test = (read_dataset(name, root, split) for split in ("train", "test"))
    assert train.image_pids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert test.image_pids.tolist() == [128, 128, 135, 135]
    assert (len(train.captions), len(test.captions)) == (16, 8)
    assert train.photograph(3).size == (WIDTH, HEIGHT)

    out, fit = tmp_path / "out", Trainer.fit
    command = ["--dataset", name, "--root", str(root), "--tiny", "--device", "cpu", "--workers", "0", "--quiet"]
    command += ["--batch-size", "8", "--epochs", "2", "--out", str(out)]
    monkeypatch.setattr("benchmarks.person_retrieval.__main__.draw", lambda *_: {})  # drawn in the rendered run
    with monkeypatch.context() as stopped:
        stopped.setattr(Trainer, "fit", lambda self, **_: fit(self, until=1))
        main(command)
    first = json.loads((out / "metrics.json").read_text())
    assert (first["steps"], first["epochs"]) == (2, 1)
    assert set(first["last_epoch"]) >= {"loss", "id", "irr", "efa", "asdm"}
    assert first["recipe"]["lr"] == 1e-5 and first["recipe"]["lr_factor"] == 5
    history = torch.load(out / "checkpoint.pt", weights_only=True)["history"]["loss"]

    main([*command, "--resume"])
    result = json.loads((out / "metrics.json").read_text())
    assert (result["steps"], result["epochs"]) == (4, 2)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["history"]["loss"][:2] == history
    assert "dry run" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"reid_raw\.json"):
        read_dataset("CUHK-PEDES", tmp_path, "train")
    root = folder_of(tmp_path, "RSTPReid")
    (root / "RSTPReid" / "imgs" / "cam" / "0001_0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 8 images .*0001_0\.png"):
        read_dataset("RSTPReid", root, "train")
    with pytest.raises(ValueError, match="split 'val'"):
        read_dataset("RSTPReid", root, "val")
    with pytest.raises(SystemExit, match="data_captions"):
        main(["--dataset", "RSTPReid", "--root", str(tmp_path / "nowhere"), "--device", "cpu"])
    with pytest.raises(SystemExit, match="--resume needs a run"):
        main([*TINY_RUN, "--resume", "--out", str(tmp_path / "empty")])


def test_clip_weights_from_a_folder(tmp_path: Path) -> None:
    """A CLIPModel and its tokenizer, as save_pretrained leaves them."""
    from transformers import CLIPModel, CLIPTokenizer

    from benchmarks.person_retrieval.models.clip import TINY, load_clip

    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    words = [
        "!",
        "!</w>",
        *letters,
        *(f"{x}</w>" for x in letters),
        "re",
        "red</w>",
        "[mask]",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    made, _ = load_clip(None, ["red coat"], image_size=(64, 32), tiny=True)
    config = made.clip.config
    config.text_config.vocab_size, config.text_config.eos_token_id = len(words), len(words) - 1
    assert config.vision_config.hidden_size == TINY["vision_config"]["hidden_size"]
    saved = CLIPModel(config)
    saved.save_pretrained(tmp_path)

    model, tokenizer = load_clip(tmp_path, [], image_size=(96, 32))
    ids = tokenizer(["a red cap", "red"])
    assert ids.shape == (2, 77)
    assert tokenizer.words(ids[0]) == ["a", "red", "c", "a", "p"]
    marked = tokenizer(["a!! cap"])  # a "!" within a word is id 0, as in CLIP
    assert tokenizer.words(marked[0]) == ["a", "!", "!", "c", "a", "p"] and model.text_mask(marked).sum() == 8
    assert ids[1, 0] == tokenizer.sot_id and ids[1, 2] == tokenizer.eot_id and ids[1, 3] == 0
    model.eval()
    pixels = torch.randint(0, 256, (2, 3, 96, 32), dtype=torch.uint8)
    features, tokens = model.encode_image(pixels)
    assert tokens.shape == (2, 12, 64) and model.grid == (6, 2)
    normalized = (pixels.float() / 255 - model.mean) / model.std
    pooled = saved.eval().get_image_features(normalized, interpolate_pos_encoding=True).pooler_output
    assert torch.allclose(features, pooled, atol=1e-6)
    text = saved.get_text_features(ids).pooler_output
    assert torch.allclose(model.encode_text(ids)[0], text, atol=1e-6)


# ------------------------------------------------------------------------------------------------- the whole run


def test_the_embedded_run_writes_metrics_and_three_pictures(tmp_path: Path) -> None:
    main([*TINY_RUN, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "metrics.json").read_text())
    for direction in ("t2i", "i2t"):
        one = result[direction]
        assert set(one) == {"R1", "R5", "R10", "mAP", "mINP"}
        assert 0 <= one["R1"] <= one["R5"] <= one["R10"] <= 100
        assert 0 < one["mINP"] <= 100 and 0 < one["mAP"] <= 100
    assert result["chance_R1"] == pytest.approx(100 / 6)
    assert all(np.isfinite(value) for value in result["last_epoch"].values())
    assert result["versions"]["torch"] == torch.__version__
    for name in ("loss_curves", "retrieval", "similarity_maps"):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(picture.shape) > 200 and picture.std() > 10  # something is drawn


def test_the_ablation_tells_mean_and_spread_of_every_variant(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main([*TINY_RUN, "--epochs", "1", "--ablation", "--seeds", "2", "--out", str(tmp_path)])
    report = results.read(tmp_path / "ablation.json")
    assert [row["variant"] for row in report["table"]] == ["SDM", "A-SDM", "SDM + EFA", "A-SDM + EFA (FMFA)"]
    for row in report["table"]:
        runs = [record for record in report["records"] if record["variant"] == row["variant"]]
        assert [run["seed"] for run in runs] == [0, 1]
        values = [run["t2i"]["R1"] for run in runs]
        assert row["R1"]["mean"] == pytest.approx(np.mean(values))
        assert row["R1"]["std"] == pytest.approx(np.std(values, ddof=1))
        assert ("efa" in runs[0]["last_epoch"]) == ("EFA" in row["variant"])
    written = (tmp_path / "ablation.md").read_text()
    assert "±" in written and written.strip() in capsys.readouterr().out


@GLOO
def test_torchrun_trains_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, both phases, in float32: the order of sums differs, and every step builds on the last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--identities", "4", "--test-identities", "2", "--epochs", "2", "--quiet", "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += ["-m", "benchmarks", "person-retrieval", *options, "--batch-size", "8", "--gather", "ring"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Written to") == 1
    result = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert result["processes"] == 2 and result["recipe"]["gather"] == "ring"
    assert result["steps"] == 2  # 16 pairs, 2 x 8 at a time, two epochs
    monkeypatch.setattr("benchmarks.person_retrieval.__main__.draw", lambda *_: {})  # drawn by the others
    main([*options, "--batch-size", "16", "--out", str(tmp_path / "one")])
    ours, theirs = (
        torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["history"] for run in ("two", "one")
    )
    assert len(ours["loss"]) == 2
    assert difference(ours, theirs) < 1e-4
