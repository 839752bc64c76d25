"""README, CONTRIBUTING and docs: links lead somewhere, the examples run, sentences keep to common words."""

import re
import socket
import sys
import types

import numpy as np
import pytest
import torch

import fmfa_losses
from benchmarks import ROOT, distributed, large_batch, results

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EVERY = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
# Words that only this repository used, for what the field has words of its own (CONTRIBUTING.md, "Names and words").
PRIVATE = r"payers?|absorbs?|(?:two|both|of|own|other) sides?|has one owner|walks? (?:over|along|down|round)"


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@EVERY
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


@EVERY
def test_words(page):
    if "do not edit it by hand" in page.read_text(encoding="utf-8")[:200]:
        return  # a command writes it
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = [line for line in text.splitlines() if re.search(rf"\b(?:{PRIVATE})\b", line, re.I)]
    assert not found


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def test_the_first_example_of_the_readme():
    namespace: dict[str, torch.Tensor] = {}
    exec(blocks("README.md")[0], namespace)
    assert namespace["loss"].isfinite()


def test_the_loss_of_contributing(monkeypatch):
    """The file of the example and its tests, as somebody who follows the page would have them."""
    loss, tests = blocks("CONTRIBUTING.md")
    module = types.ModuleType("fmfa_losses.losses.smooth_itc")
    module.__package__ = "fmfa_losses.losses"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(loss, "CONTRIBUTING.md", "exec"), module.__dict__)
    for name in module.__all__:
        monkeypatch.setattr(fmfa_losses, name, getattr(module, name), raising=False)
    namespace: dict[str, object] = {}
    exec(compile(tests, "CONTRIBUTING.md", "exec"), namespace)
    run = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(run) == 3
    for test in run:
        test()


def test_the_page_of_losses_has_all_of_them_and_its_examples_run():
    page = (ROOT / "docs/losses.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \|.*\|$", page, re.M)
    public = [name for name in fmfa_losses.__all__ if name.endswith(("Loss", "Head")) and name != "FMFALoss"]
    assert sorted(table) == sorted(public)
    for block in blocks("docs/losses.md"):
        namespace: dict[str, torch.Tensor] = {}
        exec(block, namespace)
        assert namespace["loss"].isfinite()


@pytest.mark.parametrize("page", ["compat.md", "fine_grained.md", "heads.md", "measuring.md"])
def test_examples_of_a_family_run(page, monkeypatch):
    """Each by itself, as somebody who copies it would run it; measuring.md's from a checkout."""
    monkeypatch.chdir(ROOT)
    for block in blocks(f"docs/{page}"):
        namespace: dict[str, object] = {}
        exec(compile(block, page, "exec"), namespace)
        loss = namespace.get("loss")
        assert loss is None or torch.isfinite(torch.as_tensor(loss))


def test_examples_of_the_global_batch_run_one_after_the_other(monkeypatch):
    """In one process, under the environment of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    namespace: dict[str, object] = {}
    try:
        for block in blocks("docs/distributed.md"):
            exec(compile(block, "distributed.md", "exec"), namespace)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.isfinite(torch.as_tensor(namespace["loss"]))


class Encoder(torch.nn.Module):
    """Every name by which the examples of retrieval.md call a model."""

    def encode(self, x):
        return x

    encode_image = encode_text = encode_image_tse = encode_text_tse = get_image_features = get_text_features = encode


def test_examples_of_retrieval_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, text, pids = torch.randn(4, 64), torch.randn(6, 64), torch.tensor([0, 0, 1, 1, 2, 2])
    np.save("gallery.npy", image.numpy().repeat(3, axis=0))
    namespace = {"image_loader": [(pids[2:], image)], "text_loader": [(pids, text)], "model": Encoder()}
    ours = [block for block in blocks("docs/retrieval.md") if "import faiss" not in block]  # which nothing here needs
    assert len(ours) == len(blocks("docs/retrieval.md")) - 1
    for block in ours:
        exec(compile(block, "retrieval.md", "exec"), namespace)
    assert namespace["scores"].shape == (6, 10)
    assert 0 <= namespace["rank_1"] <= 100


def measured_rows() -> set[str]:
    """Every case of the CPU run as the pages write it: case, provider, milliseconds of both passes, MiB."""
    records = results.read(ROOT / "benchmarks/results/micro_cpu.json")["records"]
    rows = set()
    for record in records:
        if "both" in record:
            ms = record["both"]["median"]
            told = f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"
            memory = f"{record['process_mib']} | {record['above_inputs_mib']}"
            rows.add(f"| {record['case']} | {record['provider']} | {told} | {memory} |")
    return rows


@pytest.mark.parametrize("page", ["fine_grained.md", "heads.md", "losses.md"])
def test_rows_of_measurements_are_those_of_the_results(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| \w+, B \d.*\|$", text, re.M)
    assert len(rows) > 5
    assert set(rows) <= measured_rows()


@pytest.mark.parametrize(
    ("page", "file", "table"),
    [
        ("losses.md", "large_batch_cpu.json", large_batch.table),
        ("distributed.md", "distributed_cpu.json", distributed.table),
    ],
)
def test_tables_of_measurements_are_those_of_the_results(page, file, table):
    records = results.read(ROOT / "benchmarks/results" / file)["records"]
    assert table(records) in (ROOT / "docs" / page).read_text(encoding="utf-8")
