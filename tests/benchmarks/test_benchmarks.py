"""The benchmark's own logic: counted work, the plan and its time, tables, plots, report. No speed is judged."""

import itertools
import json
import re
import zipfile
from contextlib import closing, contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ROOT, __main__, machine, measure, micro, providers, report, results, stand_in
from benchmarks.cases import SIZES, Case, inputs, leaves, lengths, work
from benchmarks.gpu import alternatives, exact, kernel_work, plots, preflight, stand_in_cuda, triton_cache, wheels
from benchmarks.gpu import run as gpu
from benchmarks.gpu import worker as gpu_worker
from benchmarks.gpu.book import Book, checked
from benchmarks.gpu.cuda_clock import CaptureError, measure_cuda
from benchmarks.gpu.lines import record_line
from benchmarks.gpu.plan import STAGES, Job, gpu_jobs, stage_jobs
from benchmarks.gpu.predictions import PREDICTIONS, predicted
from benchmarks.gpu.tables import gpu_report, gpu_tables
from benchmarks.gpu.targets import gpu_targets
from benchmarks.measure import DTYPES, PASSES, disagreement, fingerprint, matmul_precision, measure_cpu, sample, spread
from benchmarks.person_retrieval import __main__ as person_retrieval
from benchmarks.providers import AUTOTUNED, COMPILED, OURS, REFERENCE, RELEASED, TORCH, TRITON, UNMASKED, plain_asdm
from benchmarks.tables import micro_tables
from benchmarks.targets import micro_targets

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


@contextmanager
def gpu_precision(name):
    before = torch.get_float32_matmul_precision()
    try:
        matmul_precision(name)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
        # 6 text tokens against 3 images of 5 patches; 3 x 6 winners
        (Case("maxsim", 2, **SMALL, images=3), (1260, 588), (504, 1176)),
        # one 3 x 3 product of width 4, three in the backward
        (Case("asdm", 3, D=4), (72, 96), (216, 192)),
        # [6, 4] [4, 5] for texts and images, and two such products; the weights and 6 rows
        (Case("id", 3, D=4, V=5), (240, 176), (480, 352)),
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


def test_work_of_irr_is_that_of_its_products():
    """Those of the dense head, as torch counts them, without what masked words alone need, and with attention."""
    case = Case("irr", 2, L=5, N=6, D=64, V=30)
    arguments = inputs(case)
    masked = int((arguments["labels"] != 0).sum())
    assert 2 <= masked < 10
    with FlopCounterMode(display=False) as counter:
        providers.provider(REFERENCE, "irr")(**arguments)
    dense = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    # Of the last block q, out and the MLP, then the head.
    saved = (10 - masked) * (2 * 64 * 64 * (1 + 1 + 8 + 1) + 2 * 64 * 30)
    attention = 4 * 64 * (10 * 6 + 3 * (2 * 5 * 5) + masked * 5)
    assert work(case, 4)["forward"].flops == dense - saved + attention
    assert work(case, 4)["backward"].flops == 2 * work(case, 4)["forward"].flops


def test_a_case_comes_back_from_its_measurement():
    for case in (Case("maxsim", 4, images=3, gradients=False), Case("efa", 4, mean_length=3), Case("asdm", 5)):
        row = case.as_dict() | {"case": case.name, "provider": TORCH}
        assert Case.of(row).name == case.name
        assert work(Case.of(row), 4) == work(case, 4)


def test_a_forward_alone_collects_no_gradient():
    arguments = inputs(Case("maxsim", 4, **SMALL, images=3, gradients=False))
    assert arguments["image_tokens"].shape == (3, 5, 7)
    assert leaves(arguments) == []
    row = measure_cpu(providers.provider(TORCH, "maxsim"), arguments, seconds=0)
    assert "forward" in row
    assert "both" not in row


def test_long_steps_are_not_repeated(monkeypatch):
    """Three repeats, one where they are long, none where the warm-up was; a warm-up that compiles is no measurement."""
    calls = []

    def step(image_features, text_features, pids):
        calls.append(1)
        return plain_asdm(image_features, text_features, pids)

    arguments = inputs(Case("asdm", 4, D=8))
    for clock, options, repeats, total in ((1.0, {}, 3, 4), (4.0, {}, 2, 3), (11.0, {}, 1, 1),
                                           (11.0, {"compiled": True}, 1, 2)):  # fmt: skip
        calls.clear()
        ticks = itertools.count()
        monkeypatch.setattr(measure.time, "perf_counter", lambda clock=clock, ticks=ticks: next(ticks) * clock / 2)
        row = measure_cpu(step, arguments, seconds=0, **options)
        assert (row["repeats"], len(calls)) == (repeats, total)
        assert row["both"]["median"] == 1e3 * clock


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


def test_a_wrong_result_has_no_time():
    """The first of a case is what the others are compared with; what computes something else is left alone."""
    row = {"op": "efa", "status": "ok", "value": 1.0, "gradient_norm": 1.0, "sample": [1.0], "both": {}, "repeats": 3}
    rows = [row | {"provider": UNMASKED, "value": 9.0}, row | {"provider": REFERENCE},
            row | {"provider": TORCH, "value": 1.1}, row | {"provider": COMPILED}]  # fmt: skip
    found = micro.agreed(rows)
    assert [entry["status"] for entry in found] == [
        "ok", "ok", "failed: value 1.1, where reference has 1", "ok"
    ]  # fmt: skip
    assert ["both" in entry for entry in found] == [True, True, False, True]
    assert not any("sample" in entry for entry in found)


def test_exchanged_rows_and_columns_are_seen():
    """A forward alone has no gradient that would show it."""
    scores = torch.randn(6, 6)
    rows = [{"provider": "a", **fingerprint(x, ()), "sample": sample(x)} for x in (scores, scores.T.contiguous())]
    assert disagreement(rows[0], rows[0], 1e-3) is None
    assert disagreement(rows[1], rows[0], 1e-3).startswith("one of the outputs")


def test_micro_writes_every_field(tmp_path, capsys):
    out = tmp_path / "micro.json"
    assert micro.main(["--quick", "--only", "asdm", "--seconds", "0", "--threads", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["kind"] == "micro"
    assert {"cpu", "cores", "threads", "memory_gib"} <= result["machine"].keys()
    assert {"python", "torch", "fmfa-losses"} <= result["versions"].keys()
    assert {*results.HEAD, "records"} <= result.keys()
    for row in result["records"]:
        assert row["status"] == "ok"
        assert {"case", "op", "B", "D", "provider", "dtype", "repeats", "process_mib", "above_inputs_mib"} <= row.keys()
        for part in ("forward", "backward", "both"):
            assert 0 < row[part]["p20"] <= row[part]["median"] <= row[part]["p80"]
    assert result["mm_gflops"] > 0
    table = micro_tables(result["records"], result["mm_gflops"])
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
    assert verdicts[4:] == [("not measured", None)] * (len(verdicts) - 4)
    short = Case("efa", 64, mean_length=25)
    rows += [rows[0] | {"case": short.name, "provider": name, "both": {"median": ms}, "above_inputs_mib": mib}
             for name, ms, mib in ((UNMASKED, 960.0, 6000), (TORCH, 60.0, 290))]  # fmt: skip
    verdicts = [
        (entry["measured"], entry["met"])
        for entry in micro_targets(rows)
        if "EFA, B 64, captions of 25:" in entry["goal"]
    ]
    assert verdicts == [("16.0x", True), ("1.7x", False), ("0.30 GB", False)]


def test_a_whole_run_judges_every_target():
    """No target names a case or a provider that the plan leaves out, and no case is there twice."""
    assert len({case for case, _ in micro.FULL}) == len(micro.FULL)
    figure = {"forward": {"median": 1.0}, "both": {"median": 1.0}, "process_mib": 1, "above_inputs_mib": 1}
    rows = [
        {"case": case.name, "provider": name, "status": "ok"} | figure for case, names in micro.FULL for name in names
    ]
    assert [entry["goal"] for entry in micro_targets(rows) if entry["met"] is None] == []


def figures():
    return [job for job in gpu_jobs() if job.kind == "figure"]


def test_plan_is_ordered_and_complete():
    jobs = gpu_jobs()
    assert len(jobs) == len(set(jobs))
    assert [job.stage for job in jobs] == sorted(job.stage for job in jobs)
    assert [stage.letter for stage in STAGES] == list("abcdefghi") == sorted({job.stage for job in jobs})
    assert {job.case.name.split(",")[0] for job in stage_jobs("a")} == {
        "sparse_aggregate", "hard_similarity", "maxsim", "asdm"
    }  # fmt: skip
    both = ("eager", "graph")
    assert figures()[0] == Job("d", "figure", Case("efa", 128), REFERENCE, "bf16", both, 5, 3)
    wanted = {(64, "efa", "bf16"), (128, "efa", "bf16")}
    wanted |= {(B, "asdm", "fp32") for B in (64, 256, 1024, 16384, 65536)}
    for provider in (TORCH, TRITON):
        jobs_d = [job for job in stage_jobs("d") if job.provider == provider and job.modes == both]
        assert wanted - {(16384, "asdm", "fp32")} <= {(job.case.B, job.case.op, job.precision) for job in jobs_d}
    wanted = {(op, provider) for op in ("efa", "asdm") for provider in (REFERENCE, AUTOTUNED, *OURS)}
    wanted |= {("asdm", COMPILED), *(("maxsim", peer) for peer in providers.PEERS)}
    assert wanted <= {(job.case.op, job.provider) for job in figures()}
    assert {(128, 1024), (128, 192), (512, 192)} == {(job.case.D, job.case.N) for job in stage_jobs("e")}
    assert {job.case.B for job in figures() if job.case.op == "efa"} == {64, 128, 256, 512, 1024}
    assert {job.precision for job in figures() if job.case.op == "efa"} == set(DTYPES)
    for stage in "abf":  # float32 in each of its three ways
        chosen = {job.precision for job in stage_jobs(stage) if job.case.op in ("efa", "hard_similarity")}
        assert {"fp32", "tf32", "tf32x3"} <= chosen
    assert stage_jobs("h")[0] == Job("h", "figure", Case("efa", 128), AUTOTUNED, "bf16", guess=75, prebuilt=75)


def test_the_minutes_have_room_for_every_stage():
    """With prebuilt kernels the first jobs of each fit into what it is given, and so do the two peers at two shapes."""
    begins = 15  # seconds until the worker is there
    minutes = gpu.options_of(["--out", "somewhere"]).minutes
    assert begins + sum(stage.seconds for stage in STAGES) + gpu.REPORT_SECONDS <= minutes * 60 < 10 * 60
    first = {"a": 13, "b": 5, "c": 6, "d": 12, "e": 8, "f": 6, "g": 1, "h": 1, "i": 9}
    for stage in STAGES:
        seconds = [job.seconds(prebuilt=True) for job in stage_jobs(stage.letter)]
        assert sum(seconds[: first[stage.letter]]) <= stage.seconds, stage


@pytest.mark.parametrize("stage", [stage.letter for stage in STAGES])
def test_a_stage_alone_has_its_ceilings(stage):
    """Shares of the roof need them, whichever stage is chosen; and a reference comes before its rivals."""
    jobs = gpu_jobs([stage])
    kinds = [job.kind for job in jobs]
    assert kinds.count("ceilings") == int(any(kind in ("figure", "kernels") for kind in kinds))
    if "ceilings" in kinds:
        assert kinds.index("ceilings") <= min(kinds.index(kind) for kind in ("figure", "kernels") if kind in kinds)
    first = {}
    for job in jobs:
        if job.kind == "figure":
            first.setdefault((job.case, job.precision), job.provider)
    if stage != "h":  # which comes after d and f
        assert set(first.values()) <= {REFERENCE, TORCH, TRITON}
        alone = {case.B for (case, _), provider in first.items() if provider == TRITON}
        assert alone <= {1024}  # too large for the others


@pytest.mark.parametrize("row", alternatives.ALTERNATIVES, ids=lambda row: row.name)
def test_alternatives_change_an_entry(row):
    before = alternatives.value(row)
    plain = tuple(before) if isinstance(before, tuple) else before
    assert plain != row.other
    assert not isinstance(before, tuple) or len(before) == len(row.other)
    with alternatives.swapped(row, row.other):
        assert alternatives.value(row) == row.other
        assert type(alternatives.value(row)) is type(before)
    assert alternatives.value(row) is before
    with pytest.raises(RuntimeError, match="inside"), alternatives.swapped(row, row.other):
        raise RuntimeError("inside")
    assert alternatives.value(row) is before


def test_predictions_are_of_kernels_that_are_timed():
    timed = {(job.case.op, job.case.B, job.precision) for job in stage_jobs("b")}
    assert {row[:3] for row in PREDICTIONS} <= timed
    for op, B, precision in sorted({row[:3] for row in PREDICTIONS}):
        sizes = {"D": 32} if op == "asdm" else {"L": 77, "N": 192, "D": 32}
        arguments = inputs(Case(op, B if op == "asdm" else 4, **sizes), dtype=DTYPES[precision])
        with stand_in.gpu() as device, gpu_precision(precision):
            torch.autograd.grad(providers.provider(TRITON, op)(**arguments), leaves(arguments))
        launched = {launch.kernel for launch in device.launches}
        assert {row.kernel for row in PREDICTIONS if row[:3] == (op, B, precision)} <= launched
    assert predicted("efa", 128, "bf16", "_products_kernel").after == (0.70, 0.85)
    assert predicted("efa", 64, "bf16", "_products_kernel") is None


@pytest.mark.parametrize("precision", DTYPES)
def test_a_precision_is_what_torch_is_told_and_what_the_kernels_make_of_it(precision):
    from fmfa_losses.kernels._launch import match_precision
    from fmfa_losses.kernels._launch import precision as of_products

    like = torch.empty(0, dtype=DTYPES[precision])
    with gpu_precision(precision):
        assert torch.get_float32_matmul_precision() == {"tf32": "medium", "tf32x3": "high"}.get(precision, "highest")
        found = of_products(like.dtype), match_precision(like)
    assert found == {"fp32": ("ieee", "ieee"), "tf32": ("tf32", "tf32"), "tf32x3": ("tf32", "tf32x3")}.get(
        precision, ("half", "half")
    )


def test_kernel_work_by_hand():
    """2 samples of 5 tokens against 3 of 4, 7 wide: all, and what masks leave; two classes of width are one match."""
    x, e = torch.zeros(2, 5, 7), torch.zeros(3, 4, 7)
    sizes = {"Bx": 2, "Be": 3, "P": 5, "Q": 4, "D": 7, "x_ptr": x, "e_ptr": e}
    whole = sizes | {"row_count_ptr": None, "counts_ptr": None}
    assert kernel_work.flops_of("_match_kernel", [whole]) == 2 * 10 * 12 * 7
    assert kernel_work.flops_of("_dx_kernel", [whole]) == 2 * 10 * 3 * 7
    assert kernel_work.flops_of("_match_kernel", [whole | {"SPLIT": True}]) == 3 * 2 * 10 * 12 * 7
    pairs = {"R": 3, "C": 5, "D": 7, "X": 3, "Y": 5, "q_ptr": x}
    names = ("_cosines_kernel", "_kept_dlogits_kernel", "_kept_gradient_kernel", "_row_loss_kernel")
    assert [kernel_work.flops_of(name, [pairs]) / (2 * 3 * 5 * 7) for name in names] == [1, 1, 2, 2]
    assert kernel_work.flops_of("_row_loss_kernel", [pairs | {"KEPT": True}]) == 0
    left = sizes | {"row_count_ptr": torch.tensor(6), "counts_ptr": torch.tensor([1, 0, 4])}
    assert kernel_work.flops_of("_match_kernel", [left | {"CLASS": 0}, left | {"CLASS": 1}]) == 2 * 6 * 5 * 7
    other = whole | {"x_ptr": torch.zeros(2, 5, 7)}
    assert kernel_work.flops_of("_match_kernel", [whole, other]) == 2 * 2 * 10 * 12 * 7
    assert kernel_work.bytes_of([whole, whole]) == 4 * (70 + 84)
    assert kernel_work.flops_of("_pool_kernel", [whole]) == kernel_work.flops_of("_match_kernel", [{}]) == 0
    ceilings = {"copy": 10.0, "bf16": 100.0}
    assert [kernel_work.seconds_at(f, m, "bf16", ceilings) for f, m in ((100, 1), (100, 50))] == [1, 5]


@pytest.fixture
def fake_device(monkeypatch):
    """The CPU under the name of a CUDA device, as far as the benchmark looks at one."""
    stand_in_cuda.install(monkeypatch.setattr)
    memory = iter(range(10**9))
    properties = SimpleNamespace(L2_cache_size=2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30 + next(memory))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**31))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_measure_on_a_device(fake_device):
    case = Case("asdm", 8, D=16)
    made = []

    def make(seed):
        made.append(seed)
        return inputs(case, seed=seed)

    fn = providers.provider(TORCH, "asdm")
    rows = dict(measure_cuda(fn, make, modes=("eager", "graph"), seconds=0))
    assert made == list(range(8))  # 1 KiB an input set, 1 MiB of L2: as many sets as are allowed
    assert rows["eager"]["repeats"] == rows["graph"]["repeats"] == 5
    gradients = sum(leaf.numel() * 4 for leaf in leaves(inputs(case)))
    assert rows["eager"]["above_mib"] == pytest.approx((2**30 - gradients) / 2**20, abs=0.1)
    assert rows["eager"]["both"]["median"] >= rows["eager"]["forward"]["median"] > 0
    assert rows["graph"]["value"] == rows["eager"]["value"]
    assert "forward" not in rows["graph"]


def test_a_step_that_waits_is_not_captured(fake_device, monkeypatch):
    """Found before the capture, which would leave the allocator in a state of its own."""
    mode, fn = ["default"], providers.provider(TORCH, "asdm")
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)

    def waits(**arguments):
        if mode[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return fn(**arguments)

    measured = measure_cuda(waits, lambda seed: inputs(Case("asdm", 8, D=16)), modes=("eager", "graph"), seconds=0)
    assert next(measured)[0] == "eager"
    with pytest.raises(CaptureError):
        next(measured)
    assert mode[-1] == "default"
    # In the run it is a record, not an error.
    monkeypatch.setattr(providers, "provider", lambda name, op: waits)
    written = []
    job = Job("d", "figure", Case("asdm", 8, D=16), TORCH, "fp32", ("eager", "graph"))
    assert gpu_worker.do(job, written.append, dry=False)
    assert [record["status"] for record in written] == ["ok", "not run: no CUDA graph: the step waits for the device"]


def test_a_kernel_compiled_while_timed_costs_the_figure(fake_device, monkeypatch):
    """Warm-up goes on until a round compiles nothing; what compiles later all the same is refused."""
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(JITFunction, "_do_compile", lambda *arguments: None)
    calls = [0]

    def compiles(first, always=False):
        def fn(**arguments):
            calls[0] += 1
            if calls[0] <= first or always:
                JITFunction._do_compile(None)
            return providers.provider(TORCH, "asdm")(**arguments)

        return fn

    make = lambda seed: inputs(Case("asdm", 8, D=16), seed=seed)  # noqa: E731
    row = dict(measure_cuda(compiles(20), make, seconds=0))["eager"]
    assert row["compiled"] == 20
    assert "both" in row
    calls[0] = 0
    row = dict(measure_cuda(compiles(0, always=True), make, seconds=0))["eager"]
    assert row["status"] == "failed: 6 kernels were compiled while it was timed"
    assert "both" not in row


def test_a_backward_that_was_left_out_costs_the_figure(fake_device):
    """torch.compile of the reference, on the first GPU run: gradients of zeros, in 3 microseconds."""

    def half(image_features, text_features, pids):
        return providers.provider(TORCH, "asdm")(image_features, text_features.detach(), pids) + 0 * text_features.sum()

    rows = dict(measure_cuda(half, lambda seed: inputs(Case("asdm", 8, D=16)), modes=("eager", "graph"), seconds=0))
    for row in rows.values():
        assert row["status"] == "failed: 1 gradients are zero everywhere"
        assert "both" not in row
        assert "zeros" not in row


def test_worker_writes_every_record(fake_device, monkeypatch):
    efa = Case("efa", 128, L=3, N=4, D=8)
    jobs = [Job("d", "figure", efa, TORCH, "fp32", ("eager", "graph")), Job("d", "figure", efa, TRITON, "fp32"),
            Job("d", "figure", Case("efa", 4096), REFERENCE, "fp32"),
            Job("e", "figure", Case("maxsim", 4), "no-such-peer", "bf16"), Job("b", "ceilings")]  # fmt: skip
    monkeypatch.setitem(providers.PEERS, "no-such-peer", None)
    written = []
    for job in jobs:
        before = len(written)
        assert gpu_worker.do(job, written.append, dry=False)
        assert written[before]["status"].startswith("failed") or set(job.identities[0].items()) <= set(
            {key: value for key, value in written[before].items() if not isinstance(value, dict)}.items()
        )
    statuses = [record["status"] for record in written]
    assert statuses[:2] == ["ok", "ok"]
    assert [record.get("mode") for record in written[:2]] == ["eager", "graph"]
    assert statuses[2].startswith('failed: RuntimeError: backend="triton" cannot run')  # no device, no interpreter
    assert "GiB are free" in statuses[3]
    assert statuses[4] == "not run: no-such-peer is not installed"
    assert set(written[5]["ceilings"]) == {"copy", *DTYPES}


@pytest.mark.parametrize("message", ["CUBLAS_STATUS_EXECUTION_FAILED", "operation failed during capture", "a bug"])
def test_a_lost_device_ends_the_worker(fake_device, monkeypatch, message):
    """A fault that one call reports comes back from the next one; an error of ours leaves the device as it was."""
    lost = []

    def broken(job, dry):
        lost.append(message.startswith("CUBLAS"))
        raise RuntimeError(message)
        yield

    def synchronize():
        if lost and lost[0]:
            raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setitem(gpu_worker.KINDS, "figure", broken)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    written = []
    usable = gpu_worker.do(Job("d", "figure", Case("asdm", 8)), written.append, dry=False)
    assert usable == (message == "a bug")
    assert message in written[0]["status"]


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_wrong_result_has_no_speed(mode):
    job = Job("d", "figure", Case("asdm", 8), REFERENCE, "fp32")
    truth = job.identities[0] | {"status": "ok", "value": 1.0, "gradient_norm": 1.0, "both": {"median": 1.0}}
    known = {}
    assert checked(truth, known) == truth | {"checked": False}
    ours = truth | {"provider": TRITON, "mode": mode}
    assert checked(ours, known) == ours | {"checked": True}
    for wrong in ({"value": 1.1}, {"gradient_norm": 0.9}, {"value": float("nan")}):
        record = checked(ours | wrong, known)
        assert record["status"].startswith(f"failed: {next(iter(wrong))}")
        assert "both" not in record


def test_exactness_can_fail(monkeypatch):
    """Against float64: a result that is a little off, one that nobody wrote, one that changes from run to run."""
    case = Case("sparse_aggregate", 4, L=5, N=6, D=32)
    right = exact.sparse_aggregate

    def check(change):
        def fn(*tensors, backend, **options):
            return change(right(*tensors, backend="torch", **options))

        monkeypatch.setattr(exact, "sparse_aggregate", fn)
        return exact.check(case, "fp32", "cpu")["status"]

    assert check(lambda value: value) == "ok"
    assert check(lambda value: value * (1 + 1e-5)).startswith("failed: value errs by 1.00e-05")
    assert "value is not finite" in check(lambda value: torch.empty_like(value) + 0 * value)
    noise = iter((0.0, 1e-9))
    assert check(lambda value: value + next(noise)) == "failed: value differs between two runs"


def test_poison_is_taken_away_again():
    empty = torch.empty
    with exact.poisoned():
        assert torch.empty(2).isnan().all()
        assert torch.empty_like(torch.ones(2, dtype=torch.int32)).eq(-12345).all()
        assert torch.ones(1).new_empty(2).isnan().all()
    assert torch.empty is empty


def test_a_cache_is_used_or_named(monkeypatch, tmp_path):
    """A cache that does not fit is never used, and the reason is said."""
    assert triton_cache.prepare(None) == (None, "no prebuilt Triton cache: kernels are compiled here")
    installed, prebuild = [], pytest.importorskip("benchmarks.gpu.prebuild")
    monkeypatch.setattr(prebuild, "install", lambda *folders: installed.append(folders))
    monkeypatch.setattr(prebuild, "contents", lambda folder: "3 kernels")
    monkeypatch.setattr(prebuild, "usable", lambda folder: "another triton")
    assert triton_cache.prepare(tmp_path) == (
        None,
        f"{tmp_path} is not used: another triton; kernels are compiled here",
    )
    assert installed == []
    monkeypatch.setattr(prebuild, "usable", lambda folder: None)
    folder, sentence = triton_cache.prepare(tmp_path)
    assert installed == [(tmp_path, folder)]
    assert sentence.endswith("its key agrees; 3 kernels")
    monkeypatch.setattr(prebuild, "usable", lambda folder: 1 / 0)
    assert "is not used: ZeroDivisionError" in triton_cache.prepare(tmp_path)[1]
    assert len(triton_cache.triton_key_sha256()) == 64


def test_wheels_without_a_pure_one(tmp_path):
    (tmp_path / "a-1-cp312-cp312-linux_x86_64.whl").touch()
    assert wheels.unpack(tmp_path)[0] is None
    assert wheels.on_path({"PYTHONPATH": "b"}, tmp_path)["PYTHONPATH"] == f"{tmp_path}:b"


def test_results_are_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    head = results.head("test", "c")
    results.write(path, head | {"records": [1]})
    monkeypatch.setattr(results.os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results.write(path, head | {"records": [2]})
    assert results.read(path) == head | {"records": [1]}


def test_every_result_has_the_same_head(tmp_path):
    committed = results.load_all(ROOT / "benchmarks/results")
    assert all(result["records"] for result in committed.values())
    assert all({"cpu", "cores", "threads"} <= result["machine"].keys() for result in committed.values())
    text = report.render(committed, tmp_path)
    for name, result in committed.items():
        file = f"benchmarks/results/{name}"
        assert f"[`{file}`](../{file}), `{result['command']}`" in text
    results.write(tmp_path / "half.json", {"kind": "micro", "records": []})
    with pytest.raises(ValueError, match=r"half\.json lacks command, date"):
        results.load_all(tmp_path)


def head():
    """Of an invented GPU run."""
    values = ("gpu", "python -m benchmarks gpu", "2000-01-01", "abc", MACHINE, {"torch": "0"}, "")
    return dict(zip(results.HEAD, values, strict=True))


def fake_result():
    """A GPU result whose figures are invented, from the whole plan."""
    rows = []
    for job in figures():
        slowness = {REFERENCE: 12.0, COMPILED: 5.0, AUTOTUNED: 5.0, TORCH: 7.0, TRITON: 1.0}.get(job.provider, 1.3)
        both = 1e-4 * job.case.B**2 * slowness * (2 if job.precision == "fp32" else 1)
        times = {"forward": 0.4 * both, "backward": 0.6 * both, "both": both}
        spreads = {key: {"median": ms, "p20": 0.95 * ms, "p80": 1.05 * ms} for key, ms in times.items()}
        memory = job.case.B**2 * (0.3 if job.provider in (REFERENCE, COMPILED, AUTOTUNED) else 0.001)
        found = {"status": "ok", "checked": True, "above_mib": memory, "first_call_s": 1.0, "compiled": 2}
        rows += [identity | found | spreads for identity in job.identities]
    rows[-1] = {key: value for key, value in rows[-1].items() if key not in spreads} | {"status": "not run: why"}
    ceilings = {"copy": 4e12, "fp32": 5e13, "tf32": 4e14, "tf32x3": 4e14, "bf16": 8e14, "fp16": 8e14}
    test = {"kind": "tests", "test": "tests/gpu/test_gpu_efa.py::test_x", "status": "ok"}
    failed = test | {"outcome": "failed", "why": "assert 1 == 2"}
    end = {"kind": "tests", "summary": "1 failed, 1 passed", "status": "failed: exit code 1"}
    tests = [failed, test | {"outcome": "passed"}, end]
    return head() | {"records": [{"kind": "ceilings", "ceilings": ceilings}, *rows, *tests]}


def test_gpu_report(tmp_path):
    result = fake_result()
    # Every target has its jobs in the plan.
    targets = gpu_targets(results.of_kind(result, "figure"), results.ceilings_of(result))
    assert {entry["met"] for entry in targets} <= {True, False}
    results.write(tmp_path / "gpu_fake.json", result)
    out = tmp_path / "docs" / "benchmarks.md"
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    text = out.read_text()
    assert "On a GPU: FAKE DEVICE, commit abc\n" in text
    assert "Not measured" not in text
    assert gpu_report(result) in text
    assert gpu_tables(result) in gpu_report(result)
    assert "- tests/gpu/test_gpu_efa.py::test_x: failed: assert 1 == 2" in text
    assert "| 1 of 2 |" in text  # beside the kernels' figures of EFA, and of nothing else
    assert "not run: why" in text
    for name in ("time", "memory", "roof"):
        assert f"(benchmarks/gpu_fake_{name}.png)" in text
        assert (out.parent / f"benchmarks/gpu_fake_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_two_gpu_runs_have_two_headings_and_one_legend(tmp_path):
    result = head() | {"records": [fake_result()["records"][0]]}
    text = report.render({"gpu_a.json": result, "gpu_b.json": result | {"commit": "def"}}, tmp_path)
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## On a GPU: FAKE DEVICE, commit {commit}" for commit in ("abc", "def")
    ]
    assert text.count(report.LEGEND) == 1
    for commit in ("abc", "def"):
        assert f"[On a GPU: FAKE DEVICE, commit {commit}](#on-a-gpu-fake-device-commit-{commit})" in text


def test_two_results_of_one_kind_have_two_headings():
    files = {name: head() | {"kind": "step", "records": []} for name in ("step.json", "step_before.json")}
    host = {"host.json": head() | {"kind": "host", "records": []}}
    headings = re.findall(r"^### .*", report.render(files | host, ROOT), re.M)
    assert headings == [
        "### [One training step: kernels, launches, bytes](kernels.md): step.json",
        "### [One training step: kernels, launches, bytes](kernels.md): step_before.json",
        "### [Host time of a step](kernels.md)",
    ]


def test_gpu_targets_without_a_figure():
    assert {(entry["measured"], entry["met"]) for entry in gpu_targets([], None)} == {("not measured", None)}
    assert plots.gpu_figures({"records": [], "machine": MACHINE}) == {}


def test_one_provider_is_no_picture():
    result = fake_result()
    assert plots.gpu_figures(result)
    result["records"] = [row for row in result["records"] if row.get("provider") in (None, "reference")]
    assert plots.gpu_figures(result) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it does without a CUDA device")
def test_gpu_needs_a_device(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "gpu")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "gpu").exists()


def test_commands(capsys):
    assert __main__.main([]) == 0
    assert __main__.main(["nonsense"]) == 2
    assert "compile-check" in capsys.readouterr().out
    several = "person-retrieval"  # has commands of its own
    for command in __main__.COMMANDS.keys() - {several}:
        with pytest.raises(SystemExit) as exit:
            __main__.main([command, "--help"])
        assert exit.value.code == 0
    help = capsys.readouterr().out
    assert all(f"usage: python -m benchmarks {command} " in help for command in __main__.COMMANDS if command != several)
    assert __main__.main([several, "--help"]) == 0 and "Table 6" in capsys.readouterr().out
    for command in person_retrieval.COMMANDS:
        with pytest.raises(SystemExit) as exit:
            __main__.main([several, command, "--help"])
        assert exit.value.code == 0
        assert f"usage: python -m benchmarks.person_retrieval {command} " in capsys.readouterr().out


def test_a_line_compares_within_a_mode(tmp_path):
    """A replayed graph with the reference's graph; with nothing where there is none."""
    said = []
    with closing(Book(tmp_path, head())) as book:
        book.say = lambda text, aloud=True: said.append(text)
        for provider, mode, ms in ((REFERENCE, "eager", 8.0), (TRITON, "eager", 4.0), (TRITON, "graph", 1.0),
                                   (REFERENCE, "graph", 3.0), (TORCH, "graph", 1.0)):  # fmt: skip
            job = Job("d", "figure", Case("asdm", 8), provider, "fp32", (mode,))
            spread = {"median": ms, "p20": ms, "p80": ms}
            book.note(job.identities[0] | {"status": "ok", "value": 1.0, "gradient_norm": 1.0, "both": spread,
                                           "first_call_s": 0.0, "compiled": 0})  # fmt: skip
    ratios = [re.findall(r"[0-9.]+x reference", line) for line in said]
    assert ratios == [[], ["2.00x reference"], [], [], ["3.00x reference"]]


def test_predictions_name_the_code_that_is_measured():
    kernel = {"stage": "b", "kind": "kernels", "status": "ok", "at_s": 0.0, "kernel": "_k", "launches": 1, "flops": 0.0,
              "bytes": 0, "ms": {"median": 1.0, "p20": 1.0, "p80": 1.0}, "config": "w4", "case": "c", "dtype": "bf16",
              "predicted": [0.65, 0.8], "before_ms": 0.747, "change": "four stages"}  # fmt: skip
    older = kernel | {"predicted": [0.75, 0.95], "after": [0.65, 0.8]}  # two predictions, as in records before 2.0 ms
    table = re.compile(r"\| +0.65-0.80 \| +(0.75|0.75-0.95) \|")
    for record, before in ((kernel, "0.75"), (older, "0.75-0.95")):
        assert f"predicted 0.65-0.80 (before the change {before})" in record_line(record, {}, None)
        assert table.search(gpu_report({"records": [record]}))[1] == before
    assert "predicted 0.65-0.80  [" in record_line(kernel | {"before_ms": None}, {}, None)
    assert "predicted 0.005  [" in record_line(kernel | {"before_ms": None, "predicted": [0.005, 0.005]}, {}, None)
    assert "predicted" not in record_line({key: kernel[key] for key in kernel if key != "predicted"}, {}, None)


def test_a_peer_in_a_dry_run_needs_cuda(fake_device, monkeypatch):
    def peer():
        raise AssertionError("libcuda.so cannot found!\nand more")

    monkeypatch.setitem(providers.PEERS, "flash-maxsim", peer)
    monkeypatch.setattr(providers, "why_not", lambda name: None)
    job, written = Job("e", "figure", Case("maxsim", 4, L=3, N=4, D=8), "flash-maxsim", "fp32"), []
    for dry in (True, False):
        assert gpu_worker.do(job, written.append, dry=dry)
    assert [record["status"] for record in written] == [
        "not run: needs CUDA (AssertionError: libcuda.so cannot found!)",
        "failed: AssertionError: libcuda.so cannot found!",
    ]


def test_commit_of_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == "unknown"
    (tmp_path / ".commit").write_text("v1-3-gabc\n")
    assert machine.commit() == "v1-3-gabc"


def test_the_driver_is_asked_once_and_may_be_missing(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.nvidia_smi() is None
    tool.write_text('#!/bin/sh\necho "A GPU, 580.1, 1980 MHz, 2619 MHz"\n')
    tool.chmod(0o755)
    assert machine.nvidia_smi() == "A GPU, 580.1, 1980 MHz, 2619 MHz"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine.nvidia_smi() is None


def test_preflight_says_what_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "late_interaction_kernels-9.9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("late_interaction_kernels/__init__.py", "")
    command = ["--preflight", "--wheels", str(tmp_path / "wheels"), "--prebuilt", str(tmp_path)]
    assert gpu.main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    good, bad = ([line for line in lines if line.startswith(word)] for word in ("ok", "NO"))
    assert len(good) + len(bad) == len(lines)
    assert any("tests/gpu are collected: " in line for line in good)
    assert any("imports of the run" in line for line in good)
    assert len(bad) == 2
    assert "No module named 'flash_maxsim'" in bad[0]
    assert "holds no prebuilt kernels" in bad[1]
    monkeypatch.setitem(preflight.PACKAGES, "no_such_package", "everything")
    monkeypatch.setitem(preflight.PACKAGES, "no_such_luxury", "(luxury) comfort")
    monkeypatch.setattr(preflight, "tried", lambda *arguments, **options: (True, "tried"))
    gpu.main(command)
    out = capsys.readouterr().out
    assert "NO  no_such_package is not installed: everything" in out
    assert "ok  no_such_luxury is not installed" in out


def test_targets_are_goals_with_predictions():
    targets = gpu_targets([], None)
    assert {entry["predicted"] for entry in targets} == {"met", "missed", "-"}
    for words, prediction in (("eager: 2.0 ms", "missed"), ("MaxSim, D 512", "met"), ("33 ms", "missed"),
                              ("under 1 GB", "met"), ("tf32x3", "met"), ("max-autotune", "-")):  # fmt: skip
        assert next(entry for entry in targets if words in entry["goal"])["predicted"] == prediction


def test_targets_are_judged():
    """By the figure that they name, on the side of the bound where it lies."""
    rows = fake_result()["records"]

    def judged(words, **fields):
        """What is said of one target after the figures of one case have changed."""
        for row in rows:
            if "both" in row and all(row.get(key) == value for key, value in fields.items() if key not in PASSES):
                row.update({key: {"median": ms} for key, ms in fields.items() if key in PASSES and key in row})
        return [entry["met"] for entry in gpu_targets(rows, None) if words in entry["goal"]]

    ours = {"op": "efa", "B": 128, "D": 512, "provider": TRITON, "dtype": "bf16"}
    for mode, how in (("eager", "eager"), ("graph", "as a CUDA graph")):
        assert judged(f"{how}: 2.0 ms", **ours, mode=mode, both=2.0) == [True]
        assert judged(f"{how}: 2.0 ms", **ours, mode=mode, both=2.1) == [False]
    assert judged("0.8 ms", **ours, mode="eager", forward=0.8) == [True]
    assert judged("0.8 ms", **ours, mode="eager", forward=0.9) == [False]
    assert judged("0.7 ms", **ours | {"B": 64}, mode="graph", both=0.71) == [False]
    small = {"op": "asdm", "B": 64, "provider": TRITON, "dtype": "fp32"}
    assert judged("0.03 ms", **small, mode="graph", both=0.03) == [True]
    assert judged("0.15 ms", **small, mode="eager", both=0.2) == [False]
    large = {"op": "asdm", "B": 65536, "provider": TRITON, "mode": "eager"}
    assert judged("33 ms", **large, dtype="bf16", both=32.0) == [True]
    assert judged("33 ms", **large, dtype="fp32", both=400.0) == [True]
    peer = {"op": "maxsim", "D": 128, "N": 1024, "provider": next(iter(providers.PEERS)), "dtype": "bf16"}
    assert judged("not slower", **peer) == [True]
    assert judged("not slower", **peer, both=0.1) == [False]
    without = [row for row in rows if row.get("provider") not in providers.PEERS]
    assert [entry["met"] for entry in gpu_targets(without, None) if "MaxSim" in entry["goal"]] == [None, None]


@pytest.mark.parametrize("precisions", [("fp32",), ("bf16", "fp32")])
def test_plots_have_labels_and_a_whole_legend(precisions):
    """Values within one power of ten: the axis has labels all the same, and the legend is inside the picture."""
    result = fake_result()
    for row in result["records"]:
        if "both" in row:
            row["both"] = dict.fromkeys(("median", "p20", "p80"), 2.1 + row["B"] / 1000)
    result["records"] = [row for row in result["records"] if row.get("dtype") in (None, *precisions)]
    figure = plots.gpu_figures(result)["time"]
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    low, high = figure.axes[0].get_ylim()
    shown = [label for label, y in zip(labels, figure.axes[0].get_yticks(), strict=True) if label and low <= y <= high]
    assert len(shown) >= 2
    box, page = figure.legends[0].get_window_extent(), figure.bbox
    assert box.x0 >= page.x0
    assert box.x1 <= page.x1
