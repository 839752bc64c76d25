"""The commands evaluate, time and compare, on runs and weights of rendered pedestrians and of a folder layout."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.person_folders import folder_of
from PIL import Image

from benchmarks.person_retrieval.__main__ import main
from benchmarks.person_retrieval.commands import compare, evaluate
from benchmarks.person_retrieval.data import Pairs, Split
from benchmarks.person_retrieval.models import TwoStream
from benchmarks.person_retrieval.models.pretrained import COMMITTED, load_two_stream
from benchmarks.person_retrieval.paper import VIT_B_16_SHA256
from benchmarks.person_retrieval.scoring import metrics_by
from benchmarks.person_retrieval.subject import Subject, of_run
from benchmarks.person_retrieval.training import Recipe, RunFolder, World, save, settings_of

PEOPLE = {"train": 2, "val": 2, "test": 6}
SIZES = ["--identities", "2", "--val-identities", "2", "--test-identities", "6"]
QUIET = ["--device", "cpu", "--quiet"]


def two_stream(seed: int) -> TwoStream:
    return load_two_stream("none", image_size=(96, 32)).build(seed)


def write_run(path: Path, *, best: int = 1, last: int = 2, people: dict[str, int] = PEOPLE) -> Path:
    """A run of 3 epochs that was left after `last` ones: the weights of epoch n are those of seed n."""
    about = {"dataset": "rendered", "rendered": {**people, "seed": 0}, "weights": "random", "weights_sha256": None}
    settings = settings_of(Recipe(epochs=3), World(), select="val", dry_run=False, **about)
    with RunFolder(path, settings, command="train") as folder:
        trainee = {f"model.{name}": x for name, x in two_stream(last).state_dict().items()} | {
            "objective.x": torch.ones(1)
        }
        chosen = {"epoch": best, "R1": 50.0}
        save(folder.checkpoint, {"run": folder.run, "epoch": last, "best": chosen, "trainee": trainee})
        save(folder.best, {"run": folder.run, **chosen, "model": two_stream(best).state_dict()})
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / name, best=best) for name, best in (("one", 1), ("other", 4))]


def error_of(argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert str(stopped.value.code).startswith("error: ")
    return str(stopped.value.code)


# ------------------------------------------------------------------------------------------------------- evaluate


def test_weights_are_evaluated_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["evaluate", *SIZES, *QUIET, "--zero-shot", "--out", str(tmp_path)]
    command += ["--score", "rerank", "--top-k", "3"]
    assert main(command) == 0
    told = capsys.readouterr().out
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert (result["kind"], result["dataset"], result["split"]) == ("evaluation", "rendered", "test")
    assert (result["score"], result["top_k"], result["dry_run"], result["zero_shot"]) == ("rerank", 3, False, True)
    assert result["weights"] == "committed"
    assert result["weights_sha256"] == hashlib.sha256(COMMITTED.read_bytes()).hexdigest()
    assert (result["identities"], result["images"], result["captions"]) == (6, 12, 24)
    assert [record["direction"] for record in result["records"]] == ["t2i", "i2t"]
    assert "zero-shot" in told and "the first 3 anew" in told and "No figures are published for rendered" in told
    assert f"{result['records'][0]['mAP']:8.2f}" in told
    assert "--overwrite" in error_of(command)
    assert main([*command, "--overwrite"]) == 0


def test_a_run_is_evaluated_with_the_weights_it_kept(tmp_path: Path, runs: list[Path]) -> None:
    assert main(["evaluate", "--run", str(runs[1]), *QUIET, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["weights"].endswith("other/best.pt") and result["epoch"] == 4
    subject = of_run(runs[1], World())
    assert "unfinished: 2 of 3 epochs" in subject.title
    device = torch.device("cpu")
    found = metrics_by("global", two_stream(4), subject.pairs, device)
    assert result["records"][0]["mAP"] == pytest.approx(found.t2i.mAP, abs=1e-9)
    assert found.t2i.mAP != metrics_by("global", two_stream(2), subject.pairs, device).t2i.mAP


def test_a_run_killed_between_its_two_files_has_its_best_weights(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", best=2, last=2)
    (run / "best.pt").unlink()
    kept = of_run(run, World())
    assert torch.equal(kept.model.cls, two_stream(2).cls) and kept.about["epoch"] == 2
    assert torch.equal(kept.model.word.weight, two_stream(2).word.weight)
    early = write_run(tmp_path / "early", best=1, last=2)
    (early / "best.pt").unlink()
    assert "must be of the run in" in error_of(["evaluate", "--run", str(early), *QUIET])
    (early / "checkpoint.pt").unlink()
    assert "must have finished an epoch" in error_of(["evaluate", "--run", str(early), *QUIET])
    (early / "run.json").write_text("{}")
    assert "must be the folder of a run of `train`" in error_of(["evaluate", "--run", str(early), *QUIET])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "x", "--weights", "y"], "--weights must be left out: --run says"),
        (["--run", "x", "--zero-shot"], "--zero-shot must be left out"),
        (["--run", "nowhere"], "must be the folder of a run of `train`"),
        (["--top-k", "3"], "--top-k must be left out: --score global has none"),
        (["--score", "rerank", "--top-k", "0"], "--top-k must be 1 or more, got 0"),
        (["--root", "x"], "--root must be left out"),
        (["--dataset", "RSTPReid", "--root", "x"], "needs --run or --weights"),
        (["--overwrite"], "--overwrite must be left out"),
    ],
)
def test_what_does_not_go_together_is_told(options: list[str], message: str) -> None:
    assert message in error_of(["evaluate", *QUIET, *options])


def test_a_folder_layout_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder_of(tmp_path, "CUHK-PEDES", train=2, val=2, test=3)
    command = ["evaluate", "--dataset", "CUHK-PEDES", "--root", str(tmp_path), *QUIET, "--workers", "0"]
    assert main([*command, "--tiny", "--activation", "gelu", "--split", "val", "--score", "fused"]) == 0
    told = capsys.readouterr().out
    assert "CUHK-PEDES val: 2 identities, 4 images, 8 captions" in told and "a dry run" in told
    assert "joint space 64; gelu" in told  # every option of the data and weights arrives


def test_published_figures_are_set_beside_what_they_are_of() -> None:
    about: dict[str, Any] = {"dry_run": False, "weights_sha256": VIT_B_16_SHA256}
    figures = {"R1": 12.557, "R5": 27.128, "R10": 35.445, "mAP": 11.485, "mINP": 4.614}
    pairs = of_sizes(1000, 3074, 6156)

    def told(argv: list[str], **other: Any) -> str:
        subject = Subject(torch.nn.Identity(), pairs, None, "CUHK-PEDES", "", about | other)
        return "\n".join(evaluate.published(subject, figures, evaluate.arguments(argv)))

    zero_shot = told(["--zero-shot"])
    assert zero_shot.count("+0.00") == 5 and "the same weights" in zero_shot and "this one" not in zero_shot
    assert "The file here is another" in told(["--zero-shot"], weights_sha256="0")
    assert "74.16" in told([])
    for argv in (["--split", "val"], ["--score", "fused"]):
        assert "are of the test split, by the cosine of global features" in told(argv)
    assert "dry run" in told([], dry_run=True)
    pairs = of_sizes(999, 3074, 6156)
    assert "this one 999 identities" in told([])


def of_sizes(identities: int, images: int, captions: int) -> Any:
    """Pairs with nothing but their numbers."""
    split = Split(Image.new, torch.arange(images) % identities, [""] * captions, torch.arange(captions) % images)
    return Pairs(split, torch.zeros(captions, 1), size=(1, 1))


# ----------------------------------------------------------------------------------------------------------- time


def test_the_phases_are_timed_apart(tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture) -> None:
    command = ["time", "--run", str(runs[0]), *QUIET, "--repeats", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    records = json.loads((tmp_path / "time.json").read_text())["records"]
    items = {record["phase"]: record.get("items") for record in records}
    assert items == {"features of images": 12, "features of texts": 24, "ranking, t2i": 24, "ranking, i2t": 12,
                     "together": None}  # fmt: skip
    for record in records:
        assert len(record["seconds"]) == 2 and 0 <= record["min"] <= record["median"]
    assert "Peak memory: process" in capsys.readouterr().out
    assert "--repeats must be 1 or more" in error_of(["time", *QUIET, "--repeats", "0"])


# -------------------------------------------------------------------------------------------------------- compare


def test_two_runs_are_compared(tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "compare.png"
    command = ["compare", *map(str, runs), "--queries", "2", "--top", "2", *QUIET, "--out", str(file)]
    assert main(command) == 0
    assert np.asarray(Image.open(file)).std() > 10
    told = capsys.readouterr().out
    counted = {line[:8].strip(): int(line[8:16]) for line in told.splitlines() if line.endswith(" %")}
    assert sum(counted.values()) == 24 and set(counted) == {"both", "only A", "only B", "neither"}
    assert "McNemar" in told and "--overwrite" in error_of(command)


def test_runs_that_cannot_be_compared_are_told(tmp_path: Path, runs: list[Path]) -> None:
    small = write_run(tmp_path / "small", people={**PEOPLE, "test": 3})
    out = [*QUIET, "--out", str(tmp_path / "x.png")]
    assert "must be tested on the same captions" in error_of(["compare", str(runs[0]), str(small), *out])
    assert "--names must be two" in error_of(["compare", str(runs[0]), str(runs[0]), *out])
    same = ["compare", str(runs[0]), str(runs[0]), "--names", "a", "b", "--choose", "differ", *out]
    assert "needs captions that differ" in error_of(same)
    assert "must be a file that ends in .png" in error_of(["compare", "a", "b", *out, "--out", "x.jpg"])
    assert "--top must be 1 or more" in error_of(["compare", "a", "b", "--top", "0", *out])


def test_mcnemars_test_is_the_binomial_one() -> None:
    scipy_values = {(0, 0): 1.0, (3, 3): 1.0, (0, 5): 0.0625, (8, 1): 0.0390625, (10, 2): 0.03857421875}
    for (a, b), p in scipy_values.items():
        assert compare.exact_mcnemar(a, b) == compare.exact_mcnemar(b, a) == pytest.approx(p, abs=1e-12)
    n, low = 3000, 1400
    tail = math.fsum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2))
                     for i in range(low + 1))  # fmt: skip
    assert compare.exact_mcnemar(low, n - low) == pytest.approx(2 * tail, rel=1e-6)


def test_captions_that_differ_are_taken_in_turn_and_at_even_distances() -> None:
    first_a, first_b = torch.zeros(2, 40, dtype=torch.bool)
    first_a[[1, 5, 9, 13, 17, 30]] = True
    first_b[[2, 20, 30]] = True  # 30: both
    assert compare.choose(first_a, first_b, 4, differ=True) == [1, 2, 17, 20]
    assert compare.choose(first_a, first_b, 6, differ=True) == [1, 2, 5, 20, 13, 17]  # B alone has two
    assert compare.choose(first_a, first_a, 4, differ=True) == []
    assert compare.choose(first_a, first_b, 4, differ=False) == [0, 13, 26, 39]
