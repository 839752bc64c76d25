"""docs/integrations in two processes, against one with the whole batch."""

import logging
import os
import tempfile
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import processes
from helpers.errors import explains
from helpers.pages import code_blocks, run_blocks
from helpers.tiny_clip import IDENTITIES, TinyCLIP, pooled_images, pooled_texts, rows, training_batch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from fmfa_losses import FMFALoss
from fmfa_losses.cached import cached_backward
from fmfa_losses.retrieval import Evaluator, retrieval_metrics

# They take seconds to import, which one process does for all.
PACKAGES = ("accelerate", "lightning", "torchmetrics")
pytestmark = pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason=f"one of {PACKAGES} is missing")

UNEQUAL = (slice(0, 3), slice(3, 8))
PRECISION = "integrations/mixed_precision_and_fsdp.md"


def trainee(gather: bool, depth: int = 1) -> nn.Module:
    model = TinyCLIP()
    torch.manual_seed(9)
    objective = FMFALoss.for_dataset("CUHK-PEDES", model.embed_dim, IDENTITIES, gather=gather, irr={"depth": depth})
    return run_blocks(PRECISION, 0, 1).Trainee(model, objective)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: getattr(x, "full_tensor", x.clone)() for name, x in found.items()}


def whole_step(data: dict[str, Tensor], depth: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and gradients of one process with the whole batch."""
    alone = trainee(False, depth)
    out = alone(**data)
    out.loss.backward()
    return {"loss": out.loss.detach(), **out.terms, **out.metrics}, gradients(alone)


def difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest, relative to the largest number of each tensor."""
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    return max(((got[name] - x).abs().max() / x.abs().max().clamp(min=1e-3)).item() for name, x in expected.items())


def evaluation() -> tuple[list[Any], list[Any]]:
    """Batches of (pids, images) and of (pids, caption ids), in other numbers."""
    images, texts = training_batch(7, seed=1), training_batch(10, seed=2)
    pairs = zip(*(x.split(2) for x in (images["pids"], images["images"])), strict=True)
    return list(pairs), list(zip(*(x.split(3) for x in (texts["pids"], texts["caption_ids"])), strict=True))


@torch.no_grad()
def expected_metrics(model: nn.Module) -> str:
    evaluator = Evaluator(*evaluation(), encode_image=pooled_images, encode_text=pooled_texts, progress=False)
    return str(evaluator.metrics(model))


# ------------------------------------------------------------------------------------------------- on each rank


def metric_of_torchmetrics() -> dict[str, object]:
    """Unequal numbers, and a rank without texts, one without anything, as their own cases."""
    from fmfa_losses.integrations.torchmetrics import TextToImageRetrieval

    warnings.filterwarnings("ignore", message=".*was called before the ``update`` method")
    generator = torch.Generator().manual_seed(5)
    image, text = torch.randn(9, 4, generator=generator), torch.randn(7, 4, generator=generator)
    image_pids, text_pids = torch.arange(9) % 3, torch.arange(7) % 3
    expected = retrieval_metrics(text, image, text_pids, image_pids)
    cases = {
        "unequal": ((slice(0, 2), slice(0, 5)), (slice(2, 9), slice(5, 7))),
        "no texts on rank 1": ((slice(0, 2), slice(0, 7)), (slice(2, 9), None)),
        "no images on rank 0": ((None, slice(0, 7)), (slice(0, 9), None)),
        "nothing on rank 1": ((slice(0, 9), slice(0, 7)), (None, None)),
    }
    found: dict[str, object] = {}
    for case, parts in cases.items():
        metric = TextToImageRetrieval()
        images, texts = parts[dist.get_rank()]
        if images is not None:
            for features, pids in zip(image[images].split(3), image_pids[images].split(3), strict=True):
                metric.update(features, pids=pids)
        if texts is not None:
            metric.update(text_features=text[texts], pids=text_pids[texts])
        mine = len(metric.text_features)
        value = metric.compute()["t2i_mAP"].item()
        found[case] = str(metric.table) == str(expected) and abs(value - expected.t2i.mAP) < 1e-4
        found[f"{case}, afterwards"] = len(metric.text_features) == mine
    return found


def lightning() -> dict[str, object]:
    import lightning as L

    quiet_lightning()
    data = training_batch()
    values, expected = whole_step(data, depth=4)
    page = run_blocks("integrations/lightning.md", 0, 1)
    kept: dict[str, Tensor] = {}

    class Recorded(page.PersonRetrieval):
        def on_after_backward(self) -> None:
            kept.update(gradients(self))

    evaluator = Evaluator(*evaluation(), encode_image=pooled_images, encode_text=pooled_texts, progress=False)
    model = TinyCLIP()
    torch.manual_seed(9)
    module = Recorded(model, IDENTITIES, evaluator, gather=True)
    os.environ["TORCHELASTIC_RUN_ID"] = "test"  # by which Lightning finds that the ranks are in the environment
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, use_distributed_sampler=False, **silent()
    )
    trainer.fit(module, DataLoader([rows(data, UNEQUAL[dist.get_rank()])], batch_size=None))
    logged = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
    return {
        "gradients": difference(kept, expected),
        "logged": difference(logged, {f"train/{name}": value for name, value in values.items()}),
        "evaluated": "val/t2i_R1" in trainer.callback_metrics,
    }


def lightning_alone() -> dict[str, object]:
    """The second example of the page: a Trainer of one device, which writes its checkpoint."""
    quiet_lightning()
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        del os.environ[name]
    images, texts = evaluation()
    with tempfile.TemporaryDirectory() as folder:
        names = {"model": TinyCLIP(), "num_identities": IDENTITIES, "image_loader": images, "text_loader": texts}
        page = run_blocks("integrations/lightning.md", 0, 1, **names)
        scope = {**vars(page), "train_loader": DataLoader([training_batch()], batch_size=None), "folder": folder}
        given = "max_epochs=1, accelerator='cpu', default_root_dir=folder, **silent(), "
        scope["silent"] = lambda: {**silent(), "enable_checkpointing": True}
        exec(code_blocks("integrations/lightning.md")[1].replace("max_epochs=60, ", given), scope)
        page = SimpleNamespace(**scope)
        (best,) = Path(folder).rglob("*.ckpt")
        saved = torch.load(best, weights_only=False)
    module = page.trainer.lightning_module
    metrics = page.evaluator.metrics(module.model)
    return {
        "one step": saved["global_step"] == 1,
        "same": all(torch.equal(x, saved["state_dict"][name]) for name, x in module.state_dict().items()),
        "evaluated": page.trainer.callback_metrics["val/t2i_mAP"].item() == pytest.approx(metrics.t2i.mAP),
        "both optimized": [len(group["params"]) for group in page.trainer.optimizers[0].param_groups]
        == [len(list(part.parameters())) for part in (module.model, module.objective)],
    }


def quiet_lightning() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")  # advice about workers and loggers


def silent() -> dict[str, object]:
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return dict.fromkeys(names, False)


def with_accelerate() -> dict[str, object]:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    data = training_batch()
    values, expected = whole_step(data, depth=4)
    images, texts = ([pair for batch in side for pair in zip(*batch, strict=True)] for side in evaluation())
    start = trainee(gather=False)
    torch.manual_seed(9)
    page = run_blocks(
        "integrations/accelerate.md",
        model=start.model,
        num_identities=IDENTITIES,
        Trainee=type(start),
        train_loader=DataLoader([rows(data, i) for i in range(8)], batch_size=4),
        image_loader=DataLoader(images, 2),
        text_loader=DataLoader(texts, 3),
    )
    return {
        "gradients": difference(gradients(page.trainee.module), expected),
        "terms": difference(
            {name: page.values[name] for name in ("loss", "id", "irr", "efa", "asdm")},
            {name: values[name] for name in ("loss", "id", "irr", "efa", "asdm")},
        ),
        "metrics": str(page.metrics) == expected_metrics(page.encoder),
    }


def sharded(gather: bool = True, precision: str = "float32") -> nn.Module:
    made = trainee(gather)
    exec(code_blocks(PRECISION)[2].replace("bfloat16", precision), {"torch": torch, "trainee": made})
    return made


def fsdp() -> dict[str, object]:
    data, rank = training_batch(), dist.get_rank()
    mine = rows(data, UNEQUAL[rank])
    values, expected = whole_step(data)
    found: dict[str, object] = {}

    step = sharded()
    out = step(**mine)
    out.loss.backward()
    mean = torch.stack([out.loss.detach(), *out.terms.values()])
    dist.all_reduce(mean)
    whole = torch.stack([values["loss"], *(values[name] for name in out.terms)]).detach()
    found["loss and terms"] = difference({"": mean / 2}, {"": whole})
    found["gradients"] = difference(gradients(step), expected)

    step.set_requires_gradient_sync(False)
    step.zero_grad()
    step(**mine).loss.backward()
    step.set_requires_gradient_sync(True)
    step(**mine).loss.backward()
    found["accumulated"] = difference(gradients(step), {name: 2 * x for name, x in expected.items()})

    step.zero_grad()
    found["cached loss"] = abs(cached_step(step, mine) - values["loss"].item()) / values["loss"].item()
    found["cached"] = difference(gradients(step), expected)
    evaluator = Evaluator(*evaluation(), encode_image=pooled_images, encode_text=pooled_texts, progress=False)
    found["evaluated"] = str(evaluator.metrics(step.model)) == expected_metrics(TinyCLIP())
    for head in (step.objective.irr, step.objective.identity):
        with explains(TypeError, "plain parameters", "DTensors", "before fully_shard"):
            head.load_irra_state_dict({"mlm_head.fc.bias": torch.zeros(49408)})
    return found | checkpoints(step, data) | scaled(mine) | layers(mine, expected)


def cached_step(step: nn.Module, mine: dict[str, Tensor]) -> float:
    def encode(images: Tensor, caption_ids: Tensor, masked_ids: Tensor) -> tuple[Tensor, ...]:
        model = step.model
        return model.image_tokens(images), model.text_tokens(caption_ids), model.text_tokens(masked_ids)

    def loss_fn(image: Tensor, text: Tensor, masked: Tensor) -> Tensor:
        ids = mine["caption_ids"]
        end = text[torch.arange(len(text)), ids.argmax(dim=1)]
        words = {"masked_text_tokens": masked, "masked_labels": mine["masked_labels"], "text_mask": ids != 0}
        return step.objective(image[:, 0], end, image[:, 1:], text, mine["pids"], **words).loss

    inputs = [mine[name].tensor_split(2) for name in ("images", "caption_ids", "masked_ids")]
    loss = cached_backward(encode, list(zip(*inputs, strict=True)), loss_fn)
    dist.all_reduce(loss)
    return loss.item() / 2


def checkpoints(step: nn.Module, data: dict[str, Tensor]) -> dict[str, object]:
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    path = f"{folder[0]}/trainee.pt"
    torch.optim.SGD(step.parameters(), lr=0.1).step()
    run_blocks(PRECISION, 3, 4, torch=torch, trainee=step, path=path)
    dist.barrier()
    plain, again = trainee(gather=False), sharded()
    plain.load_state_dict(torch.load(path))
    setters = run_blocks(PRECISION, 3, 4, torch=torch, trainee=step, path=path)
    run_blocks(PRECISION, 4, 5, **{**vars(setters), "trainee": again})
    expected = {name: x.detach() for name, x in plain.named_parameters()}
    return {
        "same names": set(plain.state_dict()) == set(trainee(gather=False).state_dict()),
        "loaded": difference({name: x.full_tensor() for name, x in again.named_parameters()}, expected),
    }


def scaled(mine: dict[str, Tensor]) -> dict[str, object]:
    """An infinity in what one process holds of the gradient."""
    step = sharded(precision="bfloat16")
    optimizer, scaler = torch.optim.SGD(step.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
    before = [x.full_tensor() for x in step.parameters()]
    out = step(**mine)
    scaler.scale(out.loss).backward()
    if dist.get_rank() == 1:
        step.objective.identity.classifier.weight.grad.to_local()[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    after = [x.full_tensor() for x in step.parameters()]
    return {
        "float32 loss": out.loss.dtype == torch.float32 and bool(out.loss.isfinite()),
        "all skip": all(map(torch.equal, before, after)) and scaler.get_scale() == 32.0,
    }


def layers(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, object]:
    """Every layer of the objective sharded by itself."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # returned a view, which nothing here changes in place
    step = trainee(gather=True)
    for module in reversed(list(step.objective.modules())):
        if next(module.parameters(recurse=False), None) is not None:
            fully_shard(module)
    fully_shard(step)
    step(**mine).loss.backward()
    return {"each layer": difference(gradients(step), expected)}


# ------------------------------------------------------------------------------------------------------- tests


def on_rank() -> dict[str, dict[str, object] | str]:
    """All in one start of two processes: the imports take seconds."""
    found: dict[str, dict[str, object] | str] = {}
    for work in (metric_of_torchmetrics, fsdp, with_accelerate, lightning):
        try:
            found[work.__name__] = work()
        except Exception:
            found[work.__name__] = traceback.format_exc()
    if dist.get_rank() == 0:
        found["lightning_alone"] = lightning_alone()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, object]]]:
    return processes.run_forked(2, on_rank, first="import lightning, accelerate, torchmetrics")


@pytest.mark.parametrize(
    ("work", "tolerance"),
    [("metric_of_torchmetrics", 0), ("fsdp", 1e-3), ("with_accelerate", 0.1), ("lightning", 1e-3)],
)
def test_two_processes_are_one(ranks, work, tolerance):
    for found in ranks:
        assert isinstance(found[work], dict), found[work]
        wrong = {
            what: value
            for what, value in found[work].items()
            if not (value if isinstance(value, bool) else value <= tolerance)
        }
        assert found[work] and not wrong, wrong


def test_lightning_on_one_device(ranks):
    assert all(ranks[0]["lightning_alone"].values()), ranks[0]["lightning_alone"]
