"""doctor and docs/recipes agree: it finds what a recipe replaces, and is silent after it was applied in full."""

import re
from pathlib import Path

import pytest
from helpers import codebases

from fmfa_losses.doctor.codebase import examine

RECIPES = Path(__file__).parents[2] / "docs/recipes"
METRICS = """
import torch
import torch.nn.functional as F


def rank(similarity, q_pids, g_pids, max_rank=10, get_mAP=True):
    order = torch.argsort(similarity, dim=1, descending=True)
    return (g_pids[order] == q_pids.view(-1, 1)).float()[:, :max_rank].mean(0), 0, 0, order


class Evaluator:
    def eval(self, model):
        similarity = self.texts @ self.images.t()
        return rank(similarity=similarity, q_pids=self.qids, g_pids=self.gids)[0]
"""
OBJECTIVES = """
def compute_sdm(image_fetures, text_fetures, pid, logit_scale, image_id=None, factor=0.3, epsilon=1e-8):
    return compute_itc(image_fetures, text_fetures, logit_scale)


def compute_itc(image_features, text_features, logit_scale):
    return 0
"""
TRAIN = """from utils.metrics import Evaluator
from model.build import build_model

if __name__ == '__main__':
    main(Evaluator)
"""
EVALUATOR = "from fmfa_losses.retrieval import Evaluator\n"


def applied(recipe, *labels, source):
    """The source after the diffs of a recipe, as tests/docs/test_recipes.py applies them."""
    text = (RECIPES / f"{recipe}.md").read_text()
    for label in labels:
        (diff,) = re.findall(rf"```diff {label}\n(.*?)```", text, re.S)
        for hunk in re.split(r"^@@.*\n", diff, flags=re.M):
            lines = [line for line in hunk.splitlines() if line]
            there = [line[1:].rstrip() for line in lines if line[0] in " -"]
            pattern = "\n".join(r"[\s\S]*?".join(map(re.escape, line.split("..."))) for line in there)
            (match,) = re.finditer(rf"^{pattern}[ ]*$", source, re.M)
            kept = "\n".join(line[1:] for line in lines if line[0] in " +")
            source = source[: match.start()] + kept + source[match.end() :]
    return source


def codebase(folder, build, evaluator=False):
    files = {"model/build.py": build, "model/objectives.py": OBJECTIVES, "utils/metrics.py": METRICS}
    files["train.py"] = TRAIN.replace("from utils.metrics import Evaluator\n", EVALUATOR) if evaluator else TRAIN
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return examine(folder)


@pytest.mark.parametrize(
    ("source", "calls", "module"),
    [("IRRA", ["itc", "sdm", "cmpm", "sdm", "minmax", "id", "mlm"], "fmfa"), ("RDE", ["per_loss", "rbs"], "rde")],
)
def test_every_objective_of_a_whole_model_is_found(tmp_path, source, calls, module):
    text = getattr(codebases, source)
    found = codebase(tmp_path, text)
    items = [item for item in found.findings if item.kind == "objective"]
    assert len(items) == text.count("objectives.compute_") == len(calls)
    for item, call in zip(items, calls, strict=True):
        assert item.code.startswith(f"objectives.compute_{call}")
        assert "objectives.compute_" in text.splitlines()[item.line - 1]
    assert [item.write for item in found.imports] == [(f"from fmfa_losses.compat import {module} as objectives",)]
    assert [item.file.name for item in found.findings if item.kind == "ranking"] == ["metrics.py"]


APPLIED = [
    ("irra", ["irra-same"], "IRRA"),
    ("irra", ["irra-fmfa", "irra-same"], "IRRA"),
    ("fmfa", ["fmfa-same"], "IRRA"),
    ("rde", ["rde-same"], "RDE"),
    ("rde", ["rde-selection", "rde-same"], "RDE"),
    ("tbps_clip", ["tbps-losses"], "TBPS_CLIP"),
]


@pytest.mark.parametrize(("recipe", "labels", "source"), APPLIED)
def test_after_a_recipe_in_full_there_is_nothing_to_say(tmp_path, recipe, labels, source):
    text = applied(recipe, *labels, source=getattr(codebases, source))
    found = codebase(tmp_path, text, evaluator=True)
    assert not found.findings and not found.imports and not found.unreadable


def test_the_paper_in_fmfa_leaves_nothing_of_the_released_equations(tmp_path):
    text = applied("fmfa", "fmfa-paper", source=codebases.IRRA)
    names = {item.name for item in codebase(tmp_path, text, evaluator=True).findings}
    assert names == {"compute_itc", "compute_sdm", "compute_cmpm", "compute_id", "compute_mlm"}


def test_a_module_that_is_still_imported_is_still_reported(tmp_path):
    text = applied("irra", "irra-same", source=codebases.IRRA)
    (finding,) = (item for item in codebase(tmp_path, text).findings if item.kind == "ranking")
    assert finding.file.name == "metrics.py"
    assert "compare one evaluation" in finding.note  # this rank computes something else than IRRA's


def test_an_import_that_nothing_uses_does_not_keep_a_module(tmp_path):
    """IRRA's and RDE's test.py import an Evaluator and never name it again; no recipe touches that line."""
    (tmp_path / "test.py").write_text("from utils.metrics import Evaluator\nif __name__ == '__main__':\n    run()\n")
    text = applied("irra", "irra-same", source=codebases.IRRA)
    assert not codebase(tmp_path, text, evaluator=True).findings
    (tmp_path / "test.py").write_text("from utils.metrics import Evaluator\nprint(Evaluator())\n")
    assert [item.kind for item in codebase(tmp_path, text, evaluator=True).findings] == ["ranking"]
