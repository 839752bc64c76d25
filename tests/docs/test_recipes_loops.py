"""docs/recipes, around the model: loaders, training loops, evaluation and its log, each diff applied and run."""

import logging
import random
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from helpers import codebases
from helpers.recipes import apply, blocks
from torch import nn

from benchmarks import ROOT, gradient_norms, results
from fmfa_losses import FMFALoss
from fmfa_losses.retrieval import Evaluator

PIDS = torch.tensor([0, 1, 0, 2, 3])


class AverageMeter:
    def __init__(self):
        self.sum = self.count = self.avg = 0

    def update(self, value, n=1):
        self.sum, self.count = self.sum + value * n, self.count + n
        self.avg = self.sum / self.count


class TheirEvaluator:
    """Imported from the codebase, so never called once a diff is applied."""

    def __init__(self, *loaders):
        raise AssertionError("the codebase's own evaluator")


def run(monkeypatch, recipe, diff, source):
    """What the source defines after the diff, with the codebase's other modules beside it."""
    modules = {name: types.ModuleType(name) for name in ("utils", "utils.meter", "utils.metrics", "utils.logger")}
    modules["utils.meter"].AverageMeter = AverageMeter
    modules["utils.metrics"].Evaluator = TheirEvaluator
    modules["utils.logger"].setup_logger = lambda name, **options: logging.getLogger(name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    text = source if diff is None else apply(blocks(recipe, "diff")[diff], source)
    namespace = {"__name__": "codebase"}
    exec(compile(text, f"{recipe}, {diff}", "exec"), namespace)
    return SimpleNamespace(**namespace)


class Model(nn.Module):
    """Two branches, and the dictionary of losses of the recipe."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 8), nn.Linear(6, 8)

    def encode_image(self, images):
        return self.image(images)

    def encode_text(self, captions):
        return self.text(captions)

    def encode_image_tse(self, images):
        return self.image(images) ** 3

    def encode_text_tse(self, captions):
        return self.text(captions) ** 3

    def forward(self, batch):
        loss = (self.image(batch["images"]) - self.text(batch["images"])).square().mean()
        return {"efa_loss": loss, "asdm_loss": 2 * loss, "irr_loss": 3 * loss, "img_acc": torch.tensor(0.5)}


def loaders():
    generator = torch.Generator().manual_seed(0)
    return [[(PIDS, torch.randn(5, 6, generator=generator))] for _ in range(2)]


ARGS = SimpleNamespace(output_dir="logs", training=True)


def prints(caplog, name, table_of):
    """Under the codebase's logger, which alone has handlers, the table comes out."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger=name):
        result = table_of()
    assert any(record.name.startswith(name) and "mAP" in record.getMessage() for record in caplog.records)
    return result


def test_irra_prints_its_table_in_training(monkeypatch, caplog):
    images, texts = loaders()
    evaluator = run(monkeypatch, "irra", "irra-train", codebases.IRRA_TRAIN).main(ARGS, images, texts)
    assert isinstance(evaluator, Evaluator) and evaluator.logger.name == "IRRA.eval"
    top1 = prints(caplog, "IRRA", lambda: evaluator.eval(Model()))
    assert top1 == Evaluator(images, texts, progress=False).metrics(Model()).t2i.cmc[1]


@pytest.mark.parametrize(
    ("recipe", "diff", "source", "name"),
    [
        ("irra", "irra-inference", codebases.IRRA_PROCESSOR, "IRRA"),
        ("rde", "rde-inference", codebases.RDE_PROCESSOR, "RDE"),
    ],
)
def test_inference_prints_its_table(monkeypatch, caplog, recipe, diff, source, name):
    if name == "RDE":
        pytest.importorskip("sklearn")
    images, texts = loaders()
    processor = run(monkeypatch, recipe, diff, source)
    prints(caplog, name, lambda: processor.do_inference(Model(), images, texts))
    assert ("BGE+TSE" in caplog.text) == (name == "RDE")


def test_rde_picks_the_epoch_by_the_mean_of_both_scores(monkeypatch, caplog):
    images, texts = loaders()
    evaluator = run(monkeypatch, "rde", "rde-train", codebases.RDE_TRAIN).main(ARGS, images, texts)
    top1 = prints(caplog, "RDE", lambda: evaluator.eval(Model()))
    assert top1 == evaluator.fused_metrics(Model()).fused.t2i.cmc[1]
    assert [line for line in caplog.text.split("\n") if line in ("BGE", "TSE", "BGE+TSE")] == ["BGE", "TSE", "BGE+TSE"]


def test_fmfa_prints_three_tables(monkeypatch, caplog):
    images, texts = loaders()
    finetune = run(monkeypatch, "fmfa", "fmfa-finetune", codebases.FMFA_FINETUNE)
    evaluators = finetune.main(ARGS, [images, texts] * 3)
    assert len(evaluators) == 3
    for evaluator in evaluators:
        prints(caplog, "IRRA", lambda evaluator=evaluator: evaluator.eval(Model()))


def test_fmfa_counts_persons(monkeypatch):
    dataset = SimpleNamespace(train=[(0, 0, "a.jpg", "a man")] * 6, train_id_container={0, 1, 2})
    arguments = SimpleNamespace(dataset=dataset, MLM=True, pretrain=True)
    before = run(monkeypatch, "fmfa", None, codebases.FMFA_DATASETS)
    after = run(monkeypatch, "fmfa", "fmfa-classes", codebases.FMFA_DATASETS)
    assert before.build_zero_shot_loader(arguments)[1] == 6  # a class for every caption
    assert after.build_zero_shot_loader(arguments)[1] == 3
    assert after.build_dataloader(arguments, dataset) == 6  # of the pretraining, left as it is


def test_irra_shows_the_terms(monkeypatch, caplog):
    class Silent:
        def eval(self, model):
            return 0.0

    def train(diff):
        processor = run(monkeypatch, "irra", diff, codebases.IRRA_PROCESSOR)
        caplog.clear()
        model = Model()
        batches = [{"images": torch.ones(4, 6)}] * 2
        with caplog.at_level(logging.INFO, logger="IRRA.train"):
            processor.do_train(model, batches, Silent(), torch.optim.SGD(model.parameters(), lr=0.01))
        return caplog.messages[0]

    assert "efa_loss" not in train(None)
    line = train("irra-meters")
    loss, *terms = (float(line.split(f", {name}: ")[1].split(",")[0]) for name in
                    ("loss", "efa_loss", "asdm_loss", "irr_loss"))  # fmt: skip
    assert loss == pytest.approx(sum(terms), abs=1e-3) and terms[1] == pytest.approx(2 * terms[0], abs=1e-3)


class Tokenizer:
    def encode(self, caption):
        return [49406, *caption, 49407]


def test_irra_masks_its_captions_themselves(monkeypatch):
    """With --MLM every loss sees masked captions; with the line of the recipe the masked words alone do."""
    caption = list(range(100, 130))
    data = [(0, 0, "a.jpg", caption)]

    def item(diff):
        module = run(monkeypatch, "irra", diff, codebases.IRRA_BASES)
        random.seed(0)
        return module.ImageTextMLMDataset(data, Tokenizer())[0]

    before, after = item(None), item("irra-masking")
    whole = torch.tensor([49406, *caption, 49407])
    assert torch.equal(before["caption_ids"], before["mlm_ids"]) and not torch.equal(before["caption_ids"], whole)
    assert torch.equal(after["caption_ids"], whole) and not torch.equal(after["mlm_ids"], whole)
    for name in ("mlm_ids", "mlm_labels"):
        assert torch.equal(before[name], after[name])
    restored = torch.where(after["mlm_labels"] > 0, after["mlm_labels"], after["mlm_ids"])
    assert torch.equal(restored, whole)


def test_the_table_of_gradient_norms_is_that_of_the_results():
    records = results.read(ROOT / "benchmarks/results/gradient_norms_cpu.json")["records"]
    page = (ROOT / "docs/recipes/irra.md").read_text()
    assert gradient_norms.table(records) in page
    first = {way: sum(row["norms"][0] for row in records if row["way"] == way) for way in gradient_norms.WAYS}
    words = " ".join(page.split())
    times, part = first["alpha 10"] / first["SDM (alpha 0)"], first["alpha 10"] / first["alpha 10, detach_weight"]
    assert f"alpha 10 are {times:.0f} times" in words and f"count {times:.0f} times" in words
    assert round(part) == 9 and "the gradients a ninth" in words


def test_alpha_can_be_raised_and_the_weight_kept_out_of_the_graph():
    objective = FMFALoss.for_dataset("CUHK-PEDES", 8, 4, weights={"irr": 0}, asdm={"detach_weight": True})
    assert objective.asdm.alpha == 10.0 and objective.asdm.detach_weight
    image, text, pids = torch.randn(5, 8), torch.randn(5, 8), torch.arange(5)
    values = []
    for alpha in (0.0, 1.0):
        objective.asdm.alpha = alpha
        values.append(objective.asdm(image, text, pids).item())
    assert values[0] < values[1]
