"""The training step of the GPU run: equal losses, the search for the largest batch, and what is said of both."""

import sys
import weakref

import pytest
import torch

pytest.importorskip("triton", reason="the stand-in device needs the kernels, which need triton")
from benchmarks.gpu import largest_batch, stand_in_cuda, step, step_model
from benchmarks.gpu.book import checked
from benchmarks.gpu.lines import record_line
from benchmarks.gpu.plan import Job, Step, gpu_jobs, stage_jobs
from benchmarks.gpu.step_report import step_tables
from benchmarks.gpu.worker import do
from benchmarks.providers import RELEASED, TORCH, TRITON

SPREAD = {"median": 2.0, "p20": 1.0, "p80": 3.0}


@pytest.fixture
def on_the_cpu(monkeypatch):
    stand_in_cuda.install(monkeypatch.setattr)


def records(job, *, dry=True):
    found = []
    do(job, found.append, dry=dry)
    return found


# ------------------------------------------------------------------------------------------------- the largest batch


@pytest.mark.parametrize(
    ("unit", "start", "most"), [(1, 2, 40), (16, 64, 640), (16, 16, 48), (16, 128, 64), (3, 3, 60)]
)
def test_the_search_finds_the_last_batch_that_fits(unit, start, most):
    """For every memory: in as many tries as a bisection needs, none twice, in whole units and never beyond `most`."""
    start = min(start, most)
    for memory in range(2 * most):
        tried = []

        def fits(B, memory=memory, tried=tried):
            tried.append(B)
            return B <= memory

        assert largest_batch.largest(fits, unit=unit, start=start, most=most) == min(memory, most) // unit * unit
        assert len(tried) == len(set(tried))
        assert all(B % unit == 0 and 0 < B <= most for B in tried)
        assert len(tried) <= 2 + 2 * (most // unit).bit_length()


def test_out_of_memory_is_an_outcome(on_the_cpu):
    """What the step had come to is let go of, as are gradients; any other error is one."""
    kept, forgotten = [], []

    def fail(kind, message):
        def step():
            tensor = torch.zeros(3)
            kept.append(weakref.ref(tensor))
            raise kind(message)

        return largest_batch.fits(step, lambda: forgotten.append(kept[-1]()))

    assert fail(torch.cuda.OutOfMemoryError, "CUDA out of memory") is False
    assert fail(RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate") is False
    assert forgotten == [None, None]
    assert largest_batch.fits(lambda: None, lambda: forgotten.append(1)) is True
    assert len(forgotten) == 2
    with pytest.raises(RuntimeError, match="shapes"):
        fail(RuntimeError, "shapes do not fit")


def test_the_allocator_gets_what_the_card_would_have(on_the_cpu, monkeypatch):
    fractions = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    with pytest.raises(RuntimeError, match="inside"), largest_batch.limited(4.0):
        assert fractions == [0.25]  # of 16 GiB
        raise RuntimeError("inside")
    assert fractions == [0.25, 1.0]
    assert list(largest_batch.CARDS) == [24, 48, 80]
    assert all(gib <= card - 1 for card, gib in largest_batch.CARDS.items())


def test_the_largest_batch_of_a_card(on_the_cpu, monkeypatch):
    """A step that needs 2 GiB and 0.09 a pair: 224 of 233 pairs fit into 23 GiB, and the limit is taken away again."""
    total, allowed = 100.0, [1.0]
    properties = type("Properties", (), {"total_memory": total * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part: allowed.append(part * total))
    peak = [0.0]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: int(peak[0] * 2**30))

    class Fake:
        def __init__(self, *_):
            pass

        def batch(self, B):
            return B

        def __call__(self, B):
            peak[0] = 2 + 0.09 * B
            if peak[0] > allowed[-1]:
                raise torch.cuda.OutOfMemoryError("no")

        def forget(self):
            pass

    monkeypatch.setattr(step, "TrainingStep", Fake)
    (record,) = records(Job("i", "largest", provider=TRITON, step=Step(card=24)), dry=False)
    assert (record["status"], record["largest"], record["at_least"]) == ("ok", 224, False)
    assert record["peak_gib"] == pytest.approx(2 + 0.09 * 224, abs=1e-3)
    assert record["tried"] == 6  # 64 128 256, 192 224 240
    assert allowed[-1] == total
    properties.total_memory = 40 * 2**30
    (record,) = records(Job("i", "largest", provider=TRITON, step=Step(card=48)), dry=False)
    assert record["status"] == "not run: needs 47 GiB, this card has 40.0"


# ----------------------------------------------------------------------------------------------------- equal losses


def test_released_losses_and_ours_are_equal(on_the_cpu):
    """In float32: every term, the gradient of every output of the towers, and of every parameter."""
    found = []
    for name in (RELEASED, TORCH):
        made = step.TrainingStep(step_model.TOY, name, "fp32")
        terms, gradients = made.gradients(made.batch(6))
        learned = {key: p.grad for key, p in made.heads.named_parameters()}
        learned |= {key: p.grad for key, p in made.towers.named_parameters() if p.requires_grad}
        found.append((terms, gradients._asdict(), learned))
    assert list(found[0][0]) == ["id", "irr", "efa", "asdm"]
    for theirs, mine in zip(*found, strict=True):
        assert theirs.keys() == mine.keys()
        largest = max(x.abs().max().item() for x in theirs.values())  # a bias of attention's keys has none but rounding
        for key, expected in theirs.items():
            assert expected.abs().max() > 0, key
            torch.testing.assert_close(
                mine[key], expected, rtol=1e-3, atol=1e-6 * largest, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_the_backward_in_two_parts_is_the_backward(on_the_cpu):
    made = step.TrainingStep(step_model.TOY, TORCH, "fp32")
    batch, marks = made.batch(4), []
    made(batch, lambda: marks.append(sum(p.grad is not None for p in made.heads.parameters())))
    heads = len(list(made.heads.parameters()))
    assert marks == [0, 0, 0, heads, heads, 0]  # start, towers, losses, their backward, the towers', the optimizer
    assert max(last for _, last in step.TIMES.values()) == len(marks) - 1
    made.gradients(batch)
    parts = [p.grad for p in made.optimizer.param_groups[0]["params"]]
    made.forget()
    sum(made.losses(made.heads, made.encode(batch), batch).values()).backward()
    for part, p in zip(parts, made.optimizer.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(part, p.grad)


def test_the_batch_is_what_loaders_give():
    batch = step_model.batch(step_model.PAPER, 8, "cpu")
    assert batch.pixels.shape == (8, 3, 384, 128)
    assert batch.pixels.dtype == torch.uint8
    assert batch.token_ids.shape == batch.masked_ids.shape == batch.labels.shape == (8, 77)
    assert (batch.token_ids[:, 0] == 49406).all()
    assert ((batch.token_ids == 49407).sum(dim=1) == 1).all()
    assert batch.labels.count_nonzero(dim=1).min() >= 1
    assert torch.equal(batch.token_ids[batch.labels == 0], batch.masked_ids[batch.labels == 0])
    assert torch.equal(batch.labels, batch.cpu_labels)


# -------------------------------------------------------------------------------------------- plan, records, tables


def test_the_most_important_jobs_come_first():
    jobs = [(job.kind, job.step.B, job.step.card, job.provider) for job in stage_jobs("i")]
    assert jobs[:4] == [("step", B, None, name) for B in (64, 128) for name in (RELEASED, TRITON)]
    assert jobs[4:] == [("largest", None, card, name) for card in (24, 48, 80) for name in (TRITON, RELEASED)]
    assert sum(job.seconds(prebuilt=True) for job in stage_jobs("i")) <= 3 * 60 - 20
    assert len({str(identity) for job in gpu_jobs(["i"], dry=True) for identity in job.identities}) == len(jobs)


def test_without_transformers_it_is_not_run(on_the_cpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for job in (stage_jobs("i")[0], stage_jobs("i")[-1]):
        assert [record["status"] for record in records(job)] == ["not run: needs transformers"]


def timed(provider, **other):
    terms = {"id": 9.0, "irr": 10.0, "efa": 5.0, "asdm": 70.0}
    gradients = {"image_features": 3.0, "patches": 0.1}
    times = dict.fromkeys(step.TIMES, SPREAD)
    return Job("i", "step", provider=provider, step=Step(64)).identities[0] | times | {
        "status": "ok", "at_s": 1.0, "terms": terms, "gradients": gradients, "peak_gib": 9.5, "reserved_gib": 10.0,
        "first_call_s": 3.0, "compiled": 4, **other,
    }  # fmt: skip


def test_losses_that_disagree_get_no_time():
    known = {}
    released = checked(timed(RELEASED), known)
    ours = checked(timed(TRITON), known)
    assert (released["checked"], ours["checked"]) == (False, True)
    for wrong in (
        {"terms": released["terms"] | {"id": 9.5}},  # a small one of four
        {"terms": {"id": 9.0}},
        {"gradients": released["gradients"] | {"patches": 0.13}},
        {"gradients": released["gradients"] | {"patches": float("nan")}},
    ):
        record = checked(timed(TRITON, **wrong), known)
        assert record["status"].startswith(f"failed: {next(iter(wrong))} ")
        assert not step.TIMES.keys() & record.keys()


def test_lines_and_tables():
    released = timed(RELEASED, checked=False)
    ours = timed(TRITON, checked=True, losses={"median": 0.5, "p20": 0.5, "p80": 0.5})
    line = record_line(ours, {(ours["case"], "bf16", "eager"): released}, None)
    assert "step, B 64, bf16, fmfa-losses (triton): 2 ms a step" in line
    assert "1.00x released formulation, losses 4.00x; peak 9.5 GiB, reserved 10.0" in line
    card = {**Job("i", "largest", provider=TRITON, step=Step(card=24)).identities[0], "status": "ok", "at_s": 1.0,
            "largest": 144, "unit": 16, "tried": 6, "limit_gib": 23.0, "at_least": False, "peak_gib": 22.0,
            "reserved_gib": 22.5}  # fmt: skip
    none = {key: value for key, value in card.items() if "_gib" not in key or key == "limit_gib"} | {"largest": 0}
    assert "144 pairs a batch, peak 22.0 GiB, reserved 22.5 of 23; 6 sizes tried" in record_line(card, {}, None)
    assert "fewer than 16 pairs a batch; 6 sizes" in record_line(none, {}, None)
    failed = timed(TRITON) | {"status": "failed: out of memory", "case": "step, B 128"}
    page = step_tables({"records": [released, ours, failed, card, none, card | {"at_least": True}]})
    for cells in ("4.00x | 9.50 |    10.00 |", "| failed: out of memory |", "|           144 |", "| fewer than 16 |"):
        assert cells in page
    assert "144 or more" in page
    assert step_tables({"records": []}) == ""
