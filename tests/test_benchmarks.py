"""The benchmark's own logic: counted work, the plan and its time, tables, plots, report. No speed is judged."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__, gpu, gpu_worker, micro, plots, providers, report, results, roofline
from benchmarks.cases import SIZES, Case, inputs, leaves, lengths, work
from benchmarks.measure import disagreement, measure_cpu, measure_cuda, spread
from benchmarks.plan import OUT_OF_TIME, Job, gpu_jobs, run_plan
from benchmarks.providers import COMPILED, OURS, REFERENCE, RELEASED, TORCH, TRITON
from benchmarks.tables import gpu_tables, micro_table
from benchmarks.targets import gpu_targets, micro_targets

SMALL = {"L": 3, "N": 5, "D": 7}
MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "threads": 2,
    "memory_gib": 8,
    "gpu": "FAKE DEVICE",
    "gpu_memory_gib": 1.0,
    "cuda": "0",
}


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        # aggregation: s and a V, 2 x 2*6*5*7 operations; backward s, da, a^T de, ds^T t, ds v
        (Case("sparse_aggregate", 2, **SMALL), (840, 448), (2100, 896)),
        # 10 patches against 6 joint tokens; backward: 10 x 2 winners, two multiply-adds of 7 each
        (Case("hard_similarity", 2, **SMALL), (840, 448), (560, 896)),
        # 6 text tokens against 10 patches; 6 x 2 winners
        (Case("maxsim", 2, **SMALL), (840, 448), (336, 896)),
        # aggregation, 6 x 6 and 10 x 6 products; winners 12 + 20
        (Case("efa", 2, **SMALL), (840 + 504 + 840, 448), (2100 + 336 + 560, 896)),
        # one 3 x 3 product of width 4, three in the backward
        (Case("asdm", 3, D=4), (72, 96), (216, 192)),
    ],
)
def test_work_by_hand(case, forward, backward):
    counted = work(case, itemsize=4)
    assert counted["forward"] == forward
    assert counted["backward"] == backward
    assert counted["both"] == tuple(a + b for a, b in zip(forward, backward, strict=True))


def test_work_at_the_papers_shape():
    """64 pairs: 2 * (64 * 77) * (64 * 269) * 512 operations of similarity, 4 * 64 * 77 * 192 * 512 of aggregation."""
    assert work(Case("efa", 64), 4)["forward"].flops == 86_876_618_752 + 1_937_768_448


def test_only_kept_tokens_are_work():
    case = Case("efa", 64, mean_length=25)
    kept = lengths(case)
    assert kept.float().mean().item() == pytest.approx(25, abs=3)
    assert inputs(case)["text_mask"].sum() == kept.sum()
    assert work(case, 4)["forward"].flops < work(Case("efa", 64), 4)["forward"].flops / 2


def test_spread():
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}


@pytest.mark.parametrize("op", SIZES)
def test_providers_agree(op):
    sizes = {"L": 5, "N": 6, "D": 64, "V": 30}
    for case in (Case(op, 4, **sizes), Case(op, 4, **sizes, mean_length=3)):
        if case.mean_length and op in ("asdm", "irr", "id", "mask_tokens"):
            continue
        names = [REFERENCE, TORCH]
        names += [RELEASED] if op in ("efa", "hard_similarity") and not case.mean_length else []
        arguments = inputs(case)
        rows = [measure_cpu(providers.provider(name, op), arguments, seconds=0) | {"provider": name} for name in names]
        assert all(row["process_mib"] > 50 and row["repeats"] >= 3 for row in rows)
        if op != "mask_tokens":
            assert rows[0]["gradient_norm"] > 0
            assert [disagreement(row, rows[0], 1e-5) for row in rows] == [None] * len(rows)


def test_disagreement_is_seen():
    good = {"provider": "a", "value": 1.0, "gradient_norm": 2.0}
    assert disagreement(good | {"gradient_norm": 2.1}, good, 1e-3).startswith("gradient_norm 2.1")
    assert disagreement(good | {"value": float("nan")}, good, 1e-3).startswith("value nan")


def test_micro_writes_every_field(tmp_path, capsys):
    out = tmp_path / "micro.json"
    assert micro.main(["--quick", "--only", "asdm", "--seconds", "0", "--threads", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["kind"] == "micro"
    assert {"cpu", "cores", "threads", "memory_gib"} <= result["machine"].keys()
    assert {"python", "torch", "fmfa-losses"} <= result["versions"].keys()
    assert {"command", "date", "targets"} <= result.keys()
    for row in result["measurements"]:
        assert row["status"] == "ok"
        assert {"case", "op", "B", "D", "provider", "dtype", "repeats", "process_mib", "above_inputs_mib"} <= row.keys()
        for part in ("forward", "backward", "both"):
            assert 0 < row[part]["p20"] <= row[part]["median"] <= row[part]["p80"]
    table = micro_table(result["measurements"])
    assert table in capsys.readouterr().out
    text = report.render({"micro.json": result}, tmp_path / "plots")
    assert table in text
    assert "Not measured" in text


def test_a_failed_measurement_says_why():
    row = micro.measure_in_process(Case("asdm", 2, D=8), "no such provider", 0.0, 1)
    assert row["status"].startswith("failed (exit 1): KeyError")


def test_micro_targets_name_what_is_missing():
    case = Case("efa", 64)
    rows = [
        {"case": case.name, "provider": name, "status": "ok", "both": {"median": ms}, "process_mib": mib,
         "above_inputs_mib": mib}
        for name, ms, mib in ((RELEASED, 900.0, 6000), (REFERENCE, 500.0, 3000), (TORCH, 100.0, 600))
    ]  # fmt: skip
    verdicts = [(entry["measured"], entry["met"]) for entry in micro_targets(rows)]
    assert verdicts[:4] == [("9.0x", True), ("5.0x", False), ("10.0x", False), ("10.0x", False)]
    assert verdicts[4:] == [("not measured", None)] * 5


def test_plan_is_ordered_and_complete():
    jobs = gpu_jobs()
    assert len(jobs) == len(set(jobs))
    assert jobs[0] == Job(Case("efa", 128), REFERENCE, "bf16")
    wanted = {(op, provider) for op in ("efa", "asdm") for provider in (REFERENCE, COMPILED, *OURS)}
    wanted |= {("maxsim", peer) for peer in providers.PEERS}
    assert wanted <= {(job.case.op, job.provider) for job in jobs}
    assert {job.case.B for job in jobs if job.case.op == "efa"} == {64, 128, 256, 512, 1024}
    assert {job.case.B for job in jobs if job.case.op == "asdm"} == {64, 256, 1024, 16384, 65536}
    assert {job.precision for job in jobs if job.case.op == "efa"} == {"fp32", "tf32", "bf16", "fp16"}
    # 16-bit peers are compared at 16 bits
    assert {job.precision for job in jobs if job.provider in providers.PEERS} == {"bf16", "fp16"}


def test_plan_keeps_to_its_time():
    """A fake clock: jobs of 30 s, a deadline at 100 s. A job that cannot end is not begun, a shorter one still is."""
    now = [0.0]

    def measure(job):
        now[0] += 30
        return {"status": "ok"}

    efa = Case("efa", 128)
    jobs = [
        Job(efa, TORCH, "fp32"),
        Job(efa, TRITON, "fp32"),
        Job(efa, COMPILED, "fp32"),  # 60 s gone, expected 75
        Job(efa, TORCH, "bf16"),
        Job(efa, "flash-maxsim", "bf16"),
        Job(efa, TRITON, "bf16"),
        Job(efa, TRITON, "fp16"),
    ]
    missing = {"flash-maxsim": "flash-maxsim is not installed"}
    records = list(
        run_plan(jobs, measure, clock=lambda: now[0], deadline=100, why_not=lambda job: missing.get(job.provider))
    )
    assert [record["status"] for record in records] == [
        "ok", "ok", OUT_OF_TIME, "ok", "not run: flash-maxsim is not installed", "ok", OUT_OF_TIME
    ]  # fmt: skip


class FakeEvent:
    """A CUDA event of a device that computes at once."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, later):
        return 1e3 * (later.time - self.time)


@pytest.fixture
def fake_device(monkeypatch):
    """The CPU under the name of a CUDA device, as far as the benchmark looks at one."""
    memory = iter(range(10**9))
    for name, function in {
        "Event": FakeEvent,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 2**30 + next(memory),
        "mem_get_info": lambda: (2**30, 2**31),
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=2**20),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(gpu_worker, "DEVICE", "cpu")
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**10)
    monkeypatch.setattr(roofline, "MATMUL_SIZE", 16)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_measure_on_a_device(fake_device):
    case = Case("asdm", 8, D=16)
    made = []

    def make(seed):
        made.append(seed)
        return inputs(case, seed=seed)

    row = measure_cuda(providers.provider(TORCH, "asdm"), make, seconds=0)
    assert made == list(range(8))  # 1 KiB an input set, 1 MiB of L2: as many sets as are allowed
    assert row["repeats"] == 5
    gradients = sum(leaf.numel() * 4 for leaf in leaves(inputs(case)))
    assert row["above_mib"] == pytest.approx((2**30 - gradients) / 2**20, abs=0.1)
    assert row["both"]["median"] >= row["forward"]["median"] > 0


def small_plan():
    efa = Case("efa", 128, L=3, N=4, D=8)
    jobs = [Job(efa, name, "fp32") for name in (REFERENCE, TORCH, TRITON)]
    jobs += [Job(Case("asdm", 16, D=8), name, "bf16") for name in (REFERENCE, TORCH)]
    return [*jobs, Job(Case("efa", 4096), REFERENCE, "fp32"), Job(Case("maxsim", 4), "no-such-peer", "bf16")]


def test_worker_notes_every_job(fake_device, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_worker, "gpu_jobs", small_plan)
    monkeypatch.setitem(providers.PEERS, "no-such-peer", None)
    records = tmp_path / "records.jsonl"
    gpu_worker.main(["--records", str(records), "--deadline", str(time.time() + 60), "--red", "efa"])
    rows = [line for line in gpu.read_lines(records) if "status" in line]
    assert [row["status"].partition(":")[0] for row in rows] == [
        "ok",
        "ok",
        "not run",
        "ok",
        "ok",
        "not run",
        "not run",
    ]
    assert [row.get("checked") for row in rows[:5]] == [False, True, None, False, True]
    assert rows[2]["status"] == "not run: the kernel tests failed"
    assert "GiB are free" in rows[5]["status"]
    # A second worker has nothing left to do.
    length = len(records.read_text())
    gpu_worker.main(["--records", str(records), "--deadline", str(time.time() + 60)])
    assert len(records.read_text()) == length


def test_a_wrong_result_has_no_speed():
    job = Job(Case("asdm", 8), REFERENCE, "fp32")
    truth = job.identity | {"status": "ok", "value": 1.0, "gradient_norm": 1.0, "both": {"median": 1.0}}
    known = {}
    gpu_worker.checked(truth, known)
    wrong = gpu_worker.checked(truth | {"provider": TRITON, "value": 1.1}, known)
    assert wrong["status"].startswith("failed: value 1.1")
    assert "both" not in wrong


def test_a_dead_worker_costs_one_job(monkeypatch, tmp_path):
    """The process dies at its second job; the next one goes on behind it."""
    records = tmp_path / "records.jsonl"
    monkeypatch.setattr(gpu, "gpu_jobs", small_plan)

    class Worker:
        starts = 0

        def __init__(self, command, cwd):
            Worker.starts += 1

        def wait(self, timeout=None):
            done = sum("status" in line for line in gpu.read_lines(records))
            for job in small_plan()[done:]:
                gpu.append(records, {"begun": 0})
                if Worker.starts == 1 and job.provider == TORCH:
                    return -6
                gpu.append(records, job.identity | {"status": "ok"})
            return 0

    monkeypatch.setattr(gpu.subprocess, "Popen", Worker)
    gpu.run_worker(records, time.time() + 60, [])
    statuses = [line["status"] for line in gpu.read_lines(records) if "status" in line]
    assert statuses == ["ok", "failed: the process died with exit code -6", *["ok"] * 5]


def fake_result():
    """A GPU result whose figures are invented, from the whole plan."""
    rows = []
    for place, job in enumerate(gpu_jobs()[:-3]):
        slowness = {REFERENCE: 12.0, COMPILED: 5.0, TORCH: 7.0, TRITON: 1.0}.get(job.provider, 1.3)
        both = 1e-4 * job.case.B**2 * slowness * (2 if job.precision == "fp32" else 1)
        times = {"forward": 0.4 * both, "backward": 0.6 * both, "both": both}
        spreads = {key: {"median": ms, "p20": 0.95 * ms, "p80": 1.05 * ms} for key, ms in times.items()}
        memory = job.case.B**2 * (0.3 if job.provider in (REFERENCE, COMPILED) else 0.001)
        rows.append(job.identity | {"status": "ok", "checked": True, "above_mib": memory, **spreads, "place": place})
    ceilings = {"copy": 4e12, "fp32": 5e13, "tf32": 4e14, "bf16": 8e14, "fp16": 8e14}
    rows = gpu.complete(rows, gpu_jobs())
    return {
        "kind": "gpu", "command": "python -m benchmarks gpu", "date": "2000-01-01", "machine": MACHINE,
        "versions": {"torch": "0"}, "tests": {"test_gpu_efa.py": "passed: 1 passed"}, "ceilings": ceilings,
        "targets": gpu_targets(rows, ceilings), "measurements": rows,
    }  # fmt: skip


def test_gpu_report(tmp_path):
    result = fake_result()
    assert sum(row["status"] == OUT_OF_TIME for row in result["measurements"]) == 3
    assert {entry["met"] for entry in result["targets"]} <= {True, False}
    results.write(tmp_path / "gpu_fake.json", result)
    out = tmp_path / "docs" / "benchmarks.md"
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    text = out.read_text()
    assert "On a GPU: FAKE DEVICE" in text
    assert "Not measured" not in text
    assert gpu_tables(result) in text
    for name in ("time", "memory", "roof"):
        assert f"(benchmarks/gpu_fake_{name}.png)" in text
        assert (out.parent / f"benchmarks/gpu_fake_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_gpu_targets_without_a_figure():
    assert {(entry["measured"], entry["met"]) for entry in gpu_targets([], None)} == {("not measured", None)}
    assert plots.draw_gpu({"measurements": [], "machine": MACHINE, "ceilings": None}, None or report.ROOT, "none") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it does without a CUDA device")
def test_gpu_needs_a_device(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "gpu")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "gpu").exists()


def test_commands(capsys):
    assert __main__.main([]) == 0
    assert __main__.main(["nonsense"]) == 2
    assert "compile-check" in capsys.readouterr().out
    for command in ("micro", "gpu", "report"):
        with pytest.raises(SystemExit) as exit:
            __main__.main([command, "--help"])
        assert exit.value.code == 0
    assert "usage: python -m benchmarks report" in capsys.readouterr().out
