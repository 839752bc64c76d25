"""docs/integrations/transformers_trainer.md: an epoch on a tiny CLIP, its gradient, and the metrics."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from helpers.pages import code_blocks, run_blocks
from torch import Tensor

from fmfa_losses.retrieval import retrieval_metrics

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
PAGE = "integrations/transformers_trainer.md"
# Of torch 2.13 and transformers 5 themselves.
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


def tiny_clip() -> torch.nn.Module:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    config = transformers.CLIPConfig(
        text_config={**tower, **ends},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=64,
    )
    return transformers.CLIPModel(config)


def tokenizer(captions: list[str], **options: object) -> dict[str, Tensor]:
    """A word is its number; padded as CLIP's tokenizer does, with the token of the end."""
    assert options["padding"] == "max_length" and options["return_tensors"] == "pt"
    ids = torch.full((len(captions), 77), 49407)
    mask = torch.zeros_like(ids)
    for row, caption in enumerate(captions):
        words = [49406, *map(int, caption.split()), 49407]
        ids[row, : len(words)], mask[row, : len(words)] = torch.tensor(words), 1
    return {"input_ids": ids, "attention_mask": mask}


def samples(images: int, first_pid: int = 0) -> list[dict[str, object]]:
    """Two captions of each image, two images of each person."""
    torch.manual_seed(3)
    pictures = torch.randn(images, 3, 64, 32)
    return [
        {"pixel_values": pictures[i], "caption": f"{5 + i} {100 + c} 7", "pid": first_pid + i // 2, "image_id": i}
        for i in range(images)
        for c in range(2)
    ]


def page(folder: object, **arguments: object) -> SimpleNamespace:
    """The page with these arguments in place of its own, before `train`."""
    recipe = run_blocks("recipes/huggingface.md", 0, 1)
    scope = {
        **vars(run_blocks(PAGE, 0, 1, encode_image=recipe.encode_image, encode_text=recipe.encode_text)),
        "tokenizer": tokenizer,
        "output_dir": str(folder),
        "clip": tiny_clip(),
        "num_identities": 4,
        "train_dataset": samples(4),
        "eval_dataset": samples(5, first_pid=100),
    }
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 1}
    given = {**quiet, "num_train_epochs": 1, "per_device_train_batch_size": 8, **arguments}

    def made(**of_page: object) -> object:
        known = inspect.signature(transformers.TrainingArguments).parameters
        return transformers.TrainingArguments(**{name: x for name, x in {**of_page, **given}.items() if name in known})

    scope["TrainingArguments"] = made
    exec(code_blocks(PAGE)[1].replace("trainer.train()", ""), scope)
    return SimpleNamespace(**scope)


def test_an_epoch(tmp_path):
    done = page(tmp_path)
    before = {name: x.clone() for name, x in done.trainer.model.named_parameters()}
    done.trainer.train()
    changed = {name for name, x in done.trainer.model.named_parameters() if not torch.equal(x, before[name])}
    assert {"objective.identity.classifier.weight", "clip.visual_projection.weight", "clip.logit_scale"} <= changed
    rates = [(group["initial_lr"], len(group["params"])) for group in done.trainer.optimizer.param_groups]
    parts = done.trainer.model.clip, done.trainer.model.objective
    assert rates == [(rate, len(list(x.parameters()))) for rate, x in zip((1e-5, 5e-5), parts, strict=True)]

    log = next(entry for entry in done.trainer.state.log_history if "eval_t2i_R1" in entry)
    images, texts = {}, []
    with torch.no_grad():
        outputs = done.trainer.model.eval()(**done.collate(done.eval_dataset))
    for i, sample in enumerate(done.eval_dataset):
        images.setdefault(sample["image_id"], (sample["pid"], outputs["image_features"][i]))
        texts.append(sample["pid"])
    pids = torch.tensor([pid for pid, _ in images.values()])
    gallery = torch.stack([feature for _, feature in images.values()])
    expected = retrieval_metrics(outputs["text_features"], gallery, torch.tensor(texts), pids)
    assert len(pids) == 5 and log["eval_t2i_mAP"] == pytest.approx(expected.t2i.mAP)
    assert log["eval_t2i_R1"] == pytest.approx(expected.t2i.cmc[1])
    assert log["eval_loss"] > 0


@pytest.mark.parametrize("small", [4, 2])
def test_accumulated_gradients_are_means(tmp_path, small):
    """Of the small batches' losses, as the Trainer computes them."""
    done = page(tmp_path, per_device_train_batch_size=small, gradient_accumulation_steps=8 // small, max_grad_norm=0.0)
    trainer, kept = done.trainer, []

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: object, model: torch.nn.Module, **__: object) -> None:
            kept.append({name: x.grad.clone() for name, x in model.named_parameters()})

    batches = []

    def collate(given: list[object]) -> dict[str, Tensor]:
        batches.append(done.collate(given))
        return batches[-1]

    trainer.data_collator, trainer.eval_dataset, trainer.args.eval_strategy = collate, None, "no"
    trainer.add_callback(Keep)
    state = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.train()
    trainer.model.load_state_dict(state)
    trainer.model.zero_grad()
    (sum(trainer.model.train()(**batch)["loss"] for batch in batches) / len(batches)).backward()
    assert len(kept) == 1 and len(batches) == 8 // small
    for name, x in trainer.model.named_parameters():
        torch.testing.assert_close(kept[0][name], x.grad, rtol=1e-3, atol=1e-5)
