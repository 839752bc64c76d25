"""docs/integrations/mixed_precision_and_fsdp.md: float16 with a GradScaler; FSDP2 is in test_processes.py."""

from pathlib import Path

import pytest
import torch
from helpers.pages import code_blocks, run_blocks
from helpers.tiny_clip import IDENTITIES, TinyCLIP, training_batch

from benchmarks import ROOT
from fmfa_losses import FMFALoss

PAGE = "integrations/mixed_precision_and_fsdp.md"


def trainee() -> torch.nn.Module:
    model = TinyCLIP()
    objective = FMFALoss.for_dataset("CUHK-PEDES", model.embed_dim, IDENTITIES, irr={"depth": 1})
    return run_blocks(PAGE, 0, 1).Trainee(model, objective)


def test_float16_with_a_scaler():
    step = trainee()
    before = {name: x.clone() for name, x in step.named_parameters()}
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-3)
    loader = [training_batch(seed=seed) for seed in range(8)]  # the first ones overflow, until the scale is low enough
    done = run_blocks(PAGE, 1, 2, torch=torch, trainee=step, optimizer=optimizer, loader=loader)
    assert done.out.loss.dtype == torch.float32 and done.out.loss.isfinite()
    assert step.model.image_tokens(training_batch()["images"]).dtype == torch.float32  # outside of autocast
    assert all(x.isfinite().all() for x in step.parameters())
    assert not [name for name, x in step.named_parameters() if torch.equal(x, before[name])]
    assert done.scaler.get_scale() >= 1


def test_an_overflow_is_skipped():
    step = trainee()
    optimizer = torch.optim.SGD(step.parameters(), lr=1e-3)
    code = code_blocks(PAGE)[1].replace("GradScaler(device)", "GradScaler(device, init_scale=2.0**40)")
    scope = {"torch": torch, "trainee": step, "optimizer": optimizer, "loader": [training_batch()]}
    before = [x.clone() for x in step.parameters()]
    exec(code, scope)
    assert all(map(torch.equal, before, step.parameters())) and scope["scaler"].get_scale() == 2.0**39


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_parameters_in_one_dtype(dtype):
    """bfloat16 is Lightning's "bf16-true", and FSDP2's policy on the objective."""
    data = training_batch()
    out = trainee().to(dtype)(**{**data, "images": data["images"].to(dtype)})
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and out.loss.isfinite()


def test_every_page_is_run():
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    for page in (ROOT / "docs/integrations").glob("*.md"):
        assert f'"integrations/{page.name}"' in tests and code_blocks(f"integrations/{page.name}"), page.name
