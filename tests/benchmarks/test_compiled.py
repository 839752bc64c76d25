"""What is read out of machine code agrees with NVIDIA's own tool, and a kernel that needs more than before is named."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need triton, which has no wheel for this platform")
tl = triton.language

from benchmarks import compile_check, compiled, sass  # noqa: E402


@triton.jit
def loops_kernel(x_ptr, out_ptr, outer, inner, BLOCK: tl.constexpr):
    """Two loops in a loop, and a third after them."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(outer):
        for j in range(inner):
            total += tl.exp2(tl.load(x_ptr + i * inner + j * BLOCK + columns)) * j
        for j in range(inner):
            total = tl.maximum(total, tl.log(tl.load(x_ptr + i + j * BLOCK + columns)))
    for j in range(inner):
        total += tl.sqrt(tl.load(x_ptr + j * BLOCK + columns) + total)
    tl.store(out_ptr + columns, total)


def compile_loops(chip):
    x = torch.empty(4096, device="meta")
    options = {"BLOCK": 256, "num_warps": 4}
    launch = SimpleNamespace(kernel=loops_kernel, grid=(1,), args=(x, x, 5, 7), options=options)
    ((_, kernel),) = compile_check.specialised(chip, [launch])
    return launch, kernel, kernel.compile()


def listing(cubin, tmp_path):
    """(instruction, target) of the branches that cuobjdump prints, and the number of its instructions."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(\w[\w.]*)(.*?);", text)
    jumps = [(int(at, 16) // 16, int(re.findall(r"0x([0-9a-f]+)", rest)[-1], 16) // 16)
             for at, name, rest in lines if name.split(".")[0] == "BRA"]  # fmt: skip
    return jumps, sum(name != "NOP" for _, name, _ in lines)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, triton 3.9 warns


@pytest.mark.parametrize("chip", [chip for chip in compile_check.CHIPS if chip.startswith("sm_")])
def test_machine_code_is_read_as_the_disassembler_reads_it(chip, tmp_path):
    launch, kernel, binary = compile_loops(chip)
    cubin = binary.asm["cubin"]
    jumps, count = listing(cubin, tmp_path)
    (section,) = sass.code(cubin)
    assert sass.branches(section, int(chip[3:])) == jumps
    assert sass.instruction_count(cubin) == count
    back = [(target, here) for here, target in jumps if here + 1 - target >= sass.WAITING]
    inner = [loop for loop in back
             if not any(loop != other and loop[0] <= other[0] and other[1] <= loop[1] for other in back)]  # fmt: skip
    loops = sass.inner_loops(cubin, int(chip[3:]))
    assert loops == tuple(here + 1 - target for target, here in sorted(inner))
    assert len(loops) >= 3  # the compiler may unroll one into two
    report = compile_check.compile_kernel(chip, "float32", launch, kernel)
    assert report.loops == loops
    assert report.failures == []
    assert compile_check.line(report).endswith(",".join(map(str, loops)))


def test_loops_of_amd_assembly():
    _, _, binary = compile_loops("gfx942")
    assert len(sass.amd_inner_loops(binary.asm["amdgcn"])) >= 3
    text = (
        ".LBB0_1:  ; =>This Loop Header: Depth=1\n\tv_mov_b32 v0, v1\n.LBB0_2:\n; =>  This Inner Loop Header: Depth=2\n"
    )
    text += (
        "\t.loc 1 2\n\ts_nop 0\n\tv_mov_b32 v0, v1\n\ts_cbranch_scc1 .LBB0_2\n\ts_cbranch_scc0 .LBB0_1\n\ts_endpgm\n"
    )
    assert sass.amd_inner_loops(text) == (3,)


MATCH = compile_check.Report(
    "sm_90", "bfloat16", "_match_kernel", "128 w8 ", shared=100, limit=200, registers=100, instructions=900,
    loops=(100, 200),
)  # fmt: skip


def against(before, *after):
    return compiled.compare(compiled.rows([before]), compiled.rows(after))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loops": (100, 207)}, "inner loops 100,200 -> 100,207"),
        ({"loops": (104, 150)}, "inner loops 100,200 -> 104,150"),
        ({"loops": (310,)}, "inner loops 100,200 -> 310"),
        ({"loops": ()}, "inner loops 100,200 -> none"),
        ({"registers": 108}, "registers 100 -> 108"),
        ({"config": "64 w8"}, "not compiled any more"),
        ({"error": "no"}, "not compiled any more"),
    ],
)
def test_what_needs_more_is_named_with_both_figures(change, said):
    other = replace(MATCH, kernel="_pool_kernel")  # of the same chip and kind
    worse, _ = against(MATCH, replace(MATCH, **change), other)
    assert len(worse) == 1
    assert "match_kernel 128 w8 bfloat16 sm_90" in worse[0]
    assert said in worse[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loops": (100, 150)}, "better, record it: instructions of inner loops 100,200 -> 100,150"),
        ({"registers": 90}, "better, record it: registers 100 -> 90"),
        ({"shared": 50}, "better, record it: bytes of shared memory 100 -> 50"),
        ({"loops": (103, 200), "registers": 107}, None),
    ],
)
def test_what_needs_less_or_little_more_does_not_fail(change, said):
    worse, notes = against(MATCH, replace(MATCH, **change))
    assert worse == []
    assert [said in note for note in notes] == [True] * bool(said)


def test_only_chips_and_kinds_that_were_compiled_are_compared():
    assert against(MATCH, replace(MATCH, chip="sm_80"))[0] == []
    assert against(MATCH, MATCH, replace(MATCH, kernel="_new_kernel"))[1] == [
        "new_kernel 128 w8 bfloat16 sm_90: new, record it"
    ]


def test_a_table_is_written_and_compared(tmp_path, capsys):
    path = tmp_path / "compiled.json"
    twice = [MATCH, replace(MATCH, loops=(7,))]  # the same blocks for other arguments
    compiled.write(path, compiled.rows(twice), "3.6.0")
    assert compiled.check(twice, path, "3.6.0") == 0
    assert compiled.check([MATCH, replace(MATCH, loops=(8,))], path, "3.6.0") == 1
    assert "worse: match_kernel 128 w8 #2 bfloat16 sm_90" in capsys.readouterr().out
    assert compiled.check(twice[:1], path, "3.6.0") == 1
    assert compiled.check(twice, path, "3.9.0") == 1
    assert "is of Triton 3.6.0, this is 3.9.0" in capsys.readouterr().out
    assert compiled.check(twice, tmp_path / "none.json", "3.6.0") == 1


def test_a_kernel_that_kinds_share_is_compiled_once_and_reported_for_each(monkeypatch):
    compiled_as = []

    def compile_kernel(chip, kind, launch, kernel):
        compiled_as.append((kernel.source.hash(), repr(kernel.options)))
        config = compile_check.describe(launch)
        return compile_check.Report(chip, kind, kernel.name, config, registers=len(compiled_as), seconds=1.0)

    monkeypatch.setattr(compile_check, "compile_kernel", compile_kernel)
    kinds = ("float32", "tf32")
    every = [
        (kind, kernel.name, compile_check.describe(launch))
        for kind in kinds
        for launch, kernel in compile_check.specialised("sm_90", compile_check.record("sm_90", kind))
    ]
    whole = compile_check.check("sm_90", kinds)
    assert [place for place, _ in whole] == list(range(len(every)))
    assert [(report.kind, report.kernel, report.config) for _, report in whole] == every
    assert len(compiled_as) == len(set(compiled_as)) == sum(bool(report.seconds) for _, report in whole) < len(every)
    # Two workers share them evenly and leave none out.
    before = sorted(compiled_as)
    compiled_as.clear()
    halves = [compile_check.check("sm_90", kinds, part, 2) for part in range(2)]
    assert sorted(compiled_as) == before
    assert sorted(place for half in halves for place, _ in half) == list(range(len(every)))
    first, second = (sum(bool(report.seconds) for _, report in half) for half in halves)
    assert 0 <= first - second <= 1


def test_waiting_and_code_moved_to_the_end_are_no_loops(monkeypatch):
    section = [0x7918] * 300
    branch = lambda here, target: ((target - here - 1) * 16 % 2**32) << 32 | 0x7947  # noqa: E731
    section[100] = branch(100, 20)  # a loop of 81
    section[50] = branch(50, 48)  # that waits for a barrier in its middle
    section[200] = sass.EXIT
    section[210] = branch(210, 60)  # seldom needed code goes back into it
    section[299] = branch(299, 299)
    monkeypatch.setattr(sass, "code", lambda cubin: [section])
    assert sass.inner_loops(b"", 80) == (81,)
    section[70] = branch(70, 30)
    assert sass.inner_loops(b"", 80) == (41,)  # the loop in the loop
    section[90] = branch(90, 20)  # another way back to the first instruction is no loop of its own
    assert sass.inner_loops(b"", 80) == (41,)
