"""README as a package page shows it: every link is absolute and leads somewhere, the table says what was measured."""

import re
from typing import Any

import pytest

from benchmarks import ROOT, results
from benchmarks.tables import number

README = (ROOT / "README.md").read_text(encoding="utf-8")
REPOSITORY = "https://github.com/fmfa-losses/fmfa-losses"
SITE = "https://fmfa-losses.github.io/fmfa-losses/"
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
LINKS = re.findall(r"\]\(([^)\s]+)\)", PROSE)

CPU, GPU = "micro_cpu.json", "gpu_h200.json"
DEVICES = {CPU: "EPYC, 2 cores", GPU: "H200"}
# The step as the table calls it -> where it was measured.
ROWS = {
    "EFA, bfloat16, batch 128": (GPU, "efa, B 128 L 77 N 192 D 512", "bf16"),
    "EFA, bfloat16, batch 512": (GPU, "efa, B 512 L 77 N 192 D 512", "bf16"),
    "EFA, float32, batch 128 (1)": (GPU, "efa, B 128 L 77 N 192 D 512", "fp32"),
    "A-SDM, float32, batch 256 (2)": (GPU, "asdm, B 256 D 512", "fp32"),
    "A-SDM, float32, batch 16384": (GPU, "asdm, B 16384 D 512", "fp32"),
    "EFA, float32, batch 64": (CPU, "efa, B 64 L 77 N 192 D 512", "fp32"),
    "the same with `text_mask`, captions of 25 tokens": (CPU, "efa, B 64 L 77 N 192 D 512, captions of 25", "fp32"),
    "IRR, float32, batch 16": (CPU, "irr, B 16 L 77 N 193 D 512 V 49408", "fp32"),
    "A-SDM, float32, batch 4096": (CPU, "asdm, B 4096 D 512", "fp32"),
}


def record(file: str, case: str, dtype: str, provider: str, mode: str = "eager") -> dict[str, Any]:
    """The one measurement of both passes together; those of a CPU have no mode."""
    records = results.read(ROOT / "benchmarks/results" / file)["records"]
    wanted = {"case": case, "dtype": dtype, "provider": provider, "mode": mode}
    fits = [r for r in records if "both" in r and all(r.get(key, value) == value for key, value in wanted.items())]
    (found,) = fits
    return found


def ours(file: str) -> str:
    return "fmfa-losses (triton)" if file == GPU else "fmfa-losses (torch)"


def time(row: dict[str, Any]) -> str:
    milliseconds = row["both"]["median"]
    return f"{number(milliseconds)} ms" if milliseconds < 1000 else f"{number(milliseconds / 1000)} s"


def memory(row: dict[str, Any]) -> str:
    return f"{row['above_mib'] if 'above_mib' in row else row['above_inputs_mib']:.0f} MiB"


def line(step: str) -> str:
    file, case, dtype = ROWS[step]
    plain, library = (record(file, case, dtype, provider) for provider in ("reference", ours(file)))
    speedup = plain["both"]["median"] / library["both"]["median"]
    cells = [f"{time(row)}, {memory(row)}" for row in (plain, library)]
    return f"| {DEVICES[file]} | {step} | {cells[0]} | {cells[1]} | {speedup:.2f}x |"


def test_the_table_has_what_was_measured():
    table = re.findall(r"^(?:\|[^|\n]+){5}\|$", README, re.M)[2:]
    assert table == [line(step) for step in ROWS]
    for file in DEVICES:
        assert f"{REPOSITORY}/blob/main/benchmarks/results/{file}" in LINKS


def test_a_row_that_loses_says_when_that_matters():
    case = ROWS["EFA, float32, batch 128 (1)"]
    lost = [step for step in ROWS if float(line(step).split("|")[-2].strip(" x")) < 1]
    assert all(re.search(r"\(\d\)$", step) for step in lost)
    for number_of_note in re.findall(r"\((\d)\)", "".join(ROWS)):
        assert re.search(rf"^{number_of_note}\. ", README, re.M)
    assert time(record(*case, "fmfa-losses (torch)")) in README
    graphs = [record(*ROWS["A-SDM, float32, batch 256 (2)"], p, "graph") for p in (ours(GPU), "reference")]
    assert "{} ms against {} ms".format(*(number(row["both"]["median"]) for row in graphs)) in README


def test_the_training_step_is_what_was_measured():
    records = [r for r in results.read(ROOT / "benchmarks/results" / GPU)["records"] if r.get("stage") == "i"]
    of = {(r["case"], r["provider"]): r for r in records}
    ours, released = ((name, of["step, B 128", name]) for name in ("fmfa-losses (triton)", "released formulation"))
    step = " ".join(README.split())
    for _, row in (ours, released):
        assert f"{number(row['step']['median'])} ms and {row['peak_gib']:.1f} GiB" in step
    for card in (24, 80):
        pairs, before = (of[f"step, card of {card} GB", name]["largest"] for name, _ in (ours, released))
        assert re.search(rf"{card} GB (?:takes )?{pairs} (?:pairs a step )?instead of {before}", step)


def test_no_link_and_no_picture_is_relative():
    assert LINKS
    assert [link for link in LINKS if not link.startswith("https://")] == []
    assert not re.search(r"<(?:a|img)\b", PROSE)


def pages_of_the_site() -> set[str]:
    """The files in docs/, and what the navigation names besides: two pages are made of files of the root."""
    docs = ROOT / "docs"
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return {str(file.relative_to(docs)) for file in docs.rglob("*.md")} | set(re.findall(r"[\w/]+\.md", navigation))


@pytest.mark.parametrize("link", sorted({link for link in LINKS if link.startswith((REPOSITORY, SITE))}))
def test_a_link_into_this_repository_or_its_site_leads_somewhere(link):
    address, _, anchor = link.partition("#")
    if address.startswith(SITE):
        page = address.removeprefix(SITE)
        assert page.endswith(".html"), "the site has its pages as NAME.html"
        assert page.replace(".html", ".md") in pages_of_the_site()
        assert not anchor, "anchors are checked on the pages, not from here"
    elif address != REPOSITORY:
        kind, _, path = address.removeprefix(REPOSITORY + "/").partition("/main/")
        assert kind in ("blob", "tree") and (ROOT / path).exists()


def test_the_addresses_are_those_of_the_package():
    package = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'Source = "{REPOSITORY}"' in package
    assert f'Documentation = "{SITE}"' in package


def test_the_first_screen():
    """What it is, the six lines, where the documentation is; and the whole is short."""
    lines = README.splitlines()
    assert len(lines) <= 115
    first = "\n".join(lines[:30])
    for part in ("pip install fmfa-losses", "from fmfa_losses import", SITE, REPOSITORY, "arxiv.org/abs/2509.13754"):
        assert part in first


def test_the_command_of_the_tests_is_that_of_ci():
    """`make X` of the README exists, and its `make test` is what .ci/run calls."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    used = re.findall(r"^make ([a-z-]+)", README, re.M)
    assert "test" in used and set(used) <= set(targets)
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.M)
