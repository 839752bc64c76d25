"""docs/getting_started.md, step by step, on the small model with IRRA's interface."""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers import codebases
from helpers.recipes import apply, load
from test_recipes import IDENTITIES, arguments, make_batch, train_one_step

from benchmarks import ROOT
from fmfa_losses.retrieval import Evaluator

PAGE = (ROOT / "docs/getting_started.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"^```diff (\w+)\n(.*?)^```", PAGE, re.M | re.S))
CHECK, EVALUATE = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture
def adopted(monkeypatch):
    """The model after steps 3 and 4."""
    module = load(monkeypatch, apply(DIFFS["fmfa"], apply(DIFFS["same"], codebases.IRRA)))
    model = module.IRRA(arguments(loss_names="fmfa"), IDENTITIES)
    module.convert_weights(model)
    return SimpleNamespace(model=model, optimizer=module.build_optimizer(model.args, model))


def test_one_import_keeps_the_losses(monkeypatch):
    module = load(monkeypatch, apply(DIFFS["same"], codebases.IRRA))
    model = module.IRRA(arguments(loss_names="sdm+id+mlm"), IDENTITIES)
    module.convert_weights(model)
    ret = train_one_step(model, module.build_optimizer(model.args, model), make_batch())
    assert {key for key in ret if "loss" in key} == {"sdm_loss", "id_loss", "mlm_loss"}


def test_it_trains_with_the_four_objectives(adopted):
    ret = train_one_step(adopted.model, adopted.optimizer, make_batch())
    assert {key for key in ret if "loss" in key} == {"id_loss", "irr_loss", "efa_loss", "asdm_loss"}


def test_the_first_batch_is_checked(adopted, capsys):
    batch = make_batch()
    with torch.no_grad():
        image_feats, text_feats = adopted.model.base_model(batch["images"], batch["caption_ids"])
    names = {
        "self": adopted.model,
        "batch": batch,
        "caption_ids": batch["caption_ids"],
        "image_feats": image_feats,
        "text_feats": text_feats,
        "i_feats": image_feats[:, 0].float(),
        "t_feats": text_feats[torch.arange(len(text_feats)), batch["caption_ids"].argmax(dim=-1)].float(),
        "logit_scale": adopted.model.logit_scale,
    }
    exec(CHECK, names)
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("!")]
    assert len(found) == 1 and 'EFALoss(negatives="all")' in found[0]  # the paper's own choice
    exec(CHECK.replace("!= 0", "== 0"), names)
    assert "! text_mask drops" in capsys.readouterr().out


def test_it_evaluates(adopted, capsys):
    batch = make_batch()
    names = {
        "Evaluator": Evaluator,
        "model": adopted.model,
        "val_img_loader": [(batch["pids"], batch["images"])],
        "val_txt_loader": [(batch["pids"], batch["caption_ids"])],
    }
    exec(EVALUATE, names)
    assert 0 <= names["top1"] <= 100 and "mINP" in capsys.readouterr().out
