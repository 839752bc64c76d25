"""`python -m fmfa_losses doctor`: its report, its self-test, and what it finds in a codebase of IRRA's shape."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import codebases

import fmfa_losses
from fmfa_losses.__main__ import main
from fmfa_losses.compat import scan as compat_scan
from fmfa_losses.compat import source_calls
from fmfa_losses.doctor import diagnosis as doctor
from fmfa_losses.doctor.diagnosis import Finding, Unreadable, scan

ROOT = Path(__file__).parents[2]

MODEL = """
from model import objectives
from .clip_model import Transformer

class FMFA:
    def forward(self, batch):
        ret = dict()
        ret.update({'itc_loss': objectives.compute_itc(i_feats, t_feats, logit_scale)})
        ret.update({'sdm_loss': objectives.compute_sdm(i_feats, t_feats, batch['pids'], logit_scale)})
        w = objectives.compute_sdm(i_feats, t_feats, batch['pids'], logit_scale, use_weight=self.args.use_weight)
        ret.update({'id_loss': objectives.compute_id(image_logits, text_logits, batch['pids']) * 2})
        agg_v = torch.matmul(t2isim, image_feats[:, 1:, :])
        efa = objectives.compute_minmax_info_loss(text_feats, image_feats[:, 1:, :], agg_v)
        mlm = objectives.compute_mcm_or_mlm(scores, mlm_labels)
"""
LOSSES = """
from model.objectives import compute_TAL_per as tal

def compute_rbs(i_feats, t_feats, pid):
    return compute_per_loss(i_feats, t_feats, pid)

loss = tal(scores, pid, 0.02, margin=0.1)
total = compute_rbs(i, t, i_tse, t_tse, pids, label_hat=batch['label_hat'])
unknown = compute_everything(scores)
starred = compute_cmpm(*arguments)
"""
METRICS = """
def rank(similarity, q_pids, g_pids):
    indices = torch.argsort(similarity, dim=1, descending=True)
    order = scores_t2i.argsort(descending=True)
    unrelated = torch.argsort(lengths)
    return indices

cmc = rank(similarity=similarity, q_pids=qids, g_pids=gids)
position = rank(5)
"""
ADOPTED = """
from fmfa_losses.compat import irra as objectives
from fmfa_losses.compat.rde import compute_TAL_per
import fmfa_losses

a = objectives.compute_sdm(i, t, p, s)
b = compute_TAL_per(scores, pids, 0.02, 0.1)
"""


@pytest.fixture
def codebase(tmp_path):
    files = {"model/build.py": MODEL, "model/losses.py": LOSSES, "utils/metrics.py": METRICS, "adopted.py": ADOPTED}
    files |= {".git/hook.py": MODEL, "venv/x.py": MODEL, "notes.txt": MODEL}
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    (tmp_path / "utils/python2.py").write_text("print 'hello'\n")
    (tmp_path / "utils/latin.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "utils/null.py").write_bytes(b"x = 1\0\n")
    return tmp_path


def test_findings(codebase):
    found = {
        (str(item.file.relative_to(codebase)), item.line): item for item in scan(codebase) if isinstance(item, Finding)
    }
    expected = {
        ("model/build.py", 8): "ITCLoss()(i_feats, t_feats, logit_scale=logit_scale)",
        ("model/build.py", 9): "SDMLoss()(i_feats, t_feats, batch['pids'], logit_scale=logit_scale)",
        ("model/build.py", 10): "ASDMLoss()(i_feats, t_feats, batch['pids'], logit_scale=logit_scale)",
        ("model/build.py", 11): "in __init__: self.identity = IDHead(embed_dim, num_identities); in "
        "forward: self.identity(image_features, text_features, batch['pids']).loss, in place of",
        ("model/build.py", 12): "sparse_aggregate(image_tokens, text_tokens)",
        ("model/build.py", 13): "EFALoss()(image_feats[:, 1:, :], text_feats, text_mask=caption_ids != 0)",
        ("model/build.py", 14): "in __init__: self.irr = IRRHead(embed_dim, vocab_size); in forward: self.irr(",
        ("model/losses.py", 7): 'tal_loss_from_scores(scores, pid, temperature=0.02, margin=0.1, reduction="none")',
        ("model/losses.py", 8): "TALLoss(reduction=\"sum\")(i, t, pids, sample_weight=batch['label_hat'])",
        ("model/losses.py", 10): "CMPMLoss()(image_features, text_features, pids)",
        ("utils/metrics.py", 3): "fmfa_losses.retrieval.similarity_metrics(similarity, ",
        ("utils/metrics.py", 4): "fmfa_losses.retrieval.similarity_metrics(similarity, ",
        ("utils/metrics.py", 8): "fmfa_losses.retrieval.similarity_metrics(similarity, ",
    }
    assert found.keys() == expected.keys()
    for where, start in expected.items():
        assert found[where].write.startswith(start), found[where].write
    assert found["model/build.py", 13].code == (
        "objectives.compute_minmax_info_loss(text_feats, image_feats[:, 1:, :], agg_v)"
    )


@pytest.mark.parametrize(
    ("source", "calls"), [("IRRA", ["itc", "sdm", "cmpm", "sdm", "minmax", "id", "mlm"]), ("RDE", ["per_loss", "rbs"])]
)
def test_finds_every_objective_of_a_whole_model(tmp_path, source, calls):
    text = getattr(codebases, source)
    (tmp_path / "build.py").write_text(text)
    found = [item for item in scan(tmp_path / "build.py") if item.code.startswith("objectives.")]
    assert len(found) == text.count("objectives.compute_") == len(calls)
    for item, call in zip(found, calls, strict=True):
        assert item.code.startswith(f"objectives.compute_{call}")
        assert "objectives.compute_" in text.splitlines()[item.line - 1]


def test_unreadable_files_are_named(codebase):
    unreadable = {item.file.name: item.reason for item in scan(codebase) if isinstance(item, Unreadable)}
    assert unreadable.keys() == {"python2.py", "latin.py", "null.py"}
    assert unreadable["python2.py"].startswith("SyntaxError") and unreadable["python2.py"].endswith(" (line 1)")


HOSTILE = {
    "hex.py": (b"# coding: hex\n", "SyntaxError"),
    "rot13.py": (b"# coding: rot13\n", "SyntaxError"),
    "minus.py": (b"x = " + b"-" * 50_000 + b"1", "MemoryError"),
    "plus.py": (b"x = " + b"1+" * 300_000 + b"1", "RecursionError|the parser died of it"),
    "chain.py": (b"x = a" + b".f()" * 200_000, "RecursionError|the parser died of it"),
    "open.py": (b"x = " + b"(" * 100_000, "SyntaxError|MemoryError"),
    "binary.py": (bytes(range(256)), "SyntaxError|ValueError"),
    "line.py": (b"", "50.0 MiB, more than the 1 MiB that are read"),
    "deep.ipynb": (b"[" * 100_000, "RecursionError"),
    "list.ipynb": (b"[]", "ValueError: not a notebook"),
    "r.ipynb": (b'{"cells": [], "metadata": {"kernelspec": {"language": "R"}}}', "ValueError: a notebook in R"),
    "wrong.ipynb": (b'{"cells": [1]}', "TypeError"),
}


def test_a_hostile_tree_is_unreadable_files_and_the_scan_goes_on(tmp_path):
    for name, (source, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(source)
    os.truncate(tmp_path / "line.py", 50 * 2**20)
    links = {"loop.py": "loop.py", "gone.py": "nowhere", "zero.py": "/dev/zero", "folder.py": str(tmp_path)}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "pipe.py")
    deep = tmp_path / "deep"
    for _ in range(400):  # deeper than the recursion limit / 2
        deep.mkdir()
        deep = deep / "d"
    (tmp_path / "self").symlink_to(tmp_path)
    (tmp_path / "zz.py").write_text("objectives.compute_cmpm(a, b, c)")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 200)
    try:
        found = list(scan(tmp_path))
    finally:
        sys.setrecursionlimit(limit)
    reasons = {item.file.name: item.reason for item in found if isinstance(item, Unreadable)}
    assert reasons.keys() == HOSTILE.keys() | links.keys() | {"pipe.py"}
    for name, (_, reason) in HOSTILE.items():
        assert re.match(reason, reasons[name]), (name, reasons[name])
    assert "not a regular file" == reasons["zero.py"] == reasons["pipe.py"] == reasons["folder.py"]
    assert re.match("FileNotFoundError", reasons["gone.py"])
    assert re.match("OSError|RuntimeError", reasons["loop.py"])
    assert [item.file.name for item in found if isinstance(item, Finding)] == ["zz.py"]
    assert all(len(reason) < 400 for reason in reasons.values())


def test_a_folder_or_file_without_permission_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.py").write_text("")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    real = os.scandir  # a superuser may read whatever the mode says
    monkeypatch.setattr(os, "scandir", lambda path: refuse() if Path(path).name == "locked" else real(path))
    monkeypatch.setattr("builtins.open", refuse)
    found = {item.file.name: item.reason for item in scan(tmp_path)}
    assert found == dict.fromkeys(("locked", "a.py"), "PermissionError: Permission denied")


def test_three_hundred_chained_calls_are_read(tmp_path):
    (tmp_path / "a.py").write_text("x = compute_cmpm(a, b, c)" + ".f()" * 300)
    (found,) = scan(tmp_path)
    assert found.code == "compute_cmpm(a, b, c)"


@pytest.mark.parametrize("body", ["import os; os.abort()", "import time; time.sleep(1000)", "raise SystemExit(3)"])
def test_a_parser_that_dies_or_hangs_costs_one_file(tmp_path, monkeypatch, body):
    monkeypatch.setattr(compat_scan, "SECONDS", 5 if "sleep" in body else 60)
    text = Path(source_calls.__file__).read_text()
    program = tmp_path / "program.py"
    start = "        source = sys.stdin.buffer.read(int(length))\n"
    assert start in text
    program.write_text(text.replace(start, start + f"        if b'die' in source:\n            {body}\n"))
    monkeypatch.setattr(source_calls, "__file__", str(program))
    folder = tmp_path / "codebase"
    folder.mkdir()
    for name in ("a.py", "c.py"):
        (folder / name).write_text("compute_cmpm(a, b, c)")
    (folder / "b.py").write_text("die = 1")
    first, broken, last = scan(folder)
    assert (first.file.name, last.file.name) == ("a.py", "c.py")
    assert broken.reason in (
        "the parser died of it (signal 6)",
        "not parsed within 5 s",
        "the parser died of it (exit status 3)",
    )


def test_the_process_that_parses_ends_with_the_scan(tmp_path, monkeypatch):
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("compute_cmpm(a, b, c)")
    found = scan(tmp_path)
    next(found)
    found.close()
    assert [process.returncode for process in started] == [0]


def test_notebooks(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": "compute_sdm(a, b, c, d)"},
        {
            "cell_type": "code",
            "source": ["%matplotlib inline\n", "!pip install \\\n", "  x\n", "from fmfa_losses import y\n"],
        },
        {"cell_type": "code", "source": "%%time\nfiles = !ls\nif files:\n    %cd x\n    z?\ny.compute_cmpm(1, 2, 3)"},
        {"cell_type": "code", "source": "%%bash\nfor f in *; do echo; done"},
        {"cell_type": "code", "source": ["s = (a\n", "     % b)\n", "# is this it?\n", "o.compute_cmpm(a, b, c)"]},
        {"cell_type": "code", "source": "print 'hello'"},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "nbformat": 4}))
    code = {"cell_type": "code", "input": "compute_cmpm(a, b, c)"}
    (tmp_path / "old.ipynb").write_text(json.dumps({"worksheets": [{"cells": [code]}]}))
    finding, unread, old = scan(tmp_path)
    assert (finding.cell, finding.line, finding.code) == (5, 4, "o.compute_cmpm(a, b, c)")
    assert unread.reason.startswith("1 of 5 code cells, cell 6: SyntaxError") and "<unknown>" not in unread.reason
    assert (old.cell, old.line) == (1, 1)
    report = "\n".join(doctor.migration(tmp_path))
    assert f"{tmp_path / 'a.ipynb'}:cell 5:4: o.compute_cmpm(a, b, c)" in report


def test_names_that_a_terminal_cannot_show_are_escaped(tmp_path, capsys):
    name = os.fsdecode(b"a\x1b[31m\xff\nb.py")
    (tmp_path / name).write_text("compute_cmpm(a, b, c)")
    assert doctor.diagnose(tmp_path) == 0
    assert "a\\x1b[31m\\udcff\\nb.py:1: compute_cmpm" in capsys.readouterr().out


SHADOWS = "raise SystemExit('the scanned tree was executed')"


def _run(*command, cwd, **environment):
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.mark.parametrize("start", [["-m", "fmfa_losses"], ["-mfmfa_losses"], ["-W", "ignore", "-Bm", "fmfa_losses"]])
def test_the_folder_in_which_doctor_starts_is_not_imported(tmp_path, start):
    for name in ("torch", "typing", "einops", "numpy", "triton", "ast", "json", "argparse", "platform", "resource"):
        (tmp_path / f"{name}.py").write_text(SHADOWS)
    run = _run(*start, "doctor", ".", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert "self-test    cpu torch: sparse_aggregate" in run.stdout


def test_other_commands_keep_their_folder(tmp_path):
    (tmp_path / "command.py").write_text("import fmfa_losses, sys; import beside")
    (tmp_path / "beside.py").write_text("print('found')")
    assert _run("-m", "command", "fmfa_losses", cwd=tmp_path).stdout == "found\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"fmfa-losses {fmfa_losses.__version__}\n"


@pytest.mark.parametrize(("choice", "code"), [("auto", 0), ("torch", 0), ("triton", 1), ("tirton", 1), ("", 1)])
def test_a_backend_that_cannot_run_here_is_a_failure(monkeypatch, capsys, choice, code):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FMFA_LOSSES_BACKEND", choice)
    assert main(["doctor"]) == code
    assert ("backend      FAILED on every device: " in capsys.readouterr().out) == bool(code)


def test_every_replacement_is_public_and_fills_its_places():
    import fmfa_losses.compat as compat

    for name, replacement in source_calls.REPLACEMENTS.items():
        places = replacement.parameters.split()
        assert replacement.write.format_map(dict.fromkeys(places, "X"))
        assert hasattr(getattr(compat, replacement.module), name.partition("(")[0])


def test_report(codebase, capsys):
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in codebase.rglob("*") if file.is_file()}
    assert main(["doctor", str(codebase)]) == 0
    out = capsys.readouterr().out
    assert f"torch        {torch.__version__}" in out and "triton       " in out
    assert "device       cpu\nbackend      torch, not triton: " in out
    assert "self-test    cpu torch: sparse_aggregate, hard_similarity, sdm_loss ok" in out
    assert f"{codebase / 'model/build.py'}:9: objectives.compute_sdm(" in out
    assert f"{codebase / 'utils/python2.py'}: not read: SyntaxError" in out
    for module in ("fmfa", "rde"):
        assert f"from fmfa_losses.compat import {module} as objectives" in out
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in before} == before


def test_command_line(codebase):
    run = subprocess.run(
        [sys.executable, "-m", "fmfa_losses", "doctor", str(codebase / "adopted.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "no call that this library replaces" in run.stdout
    with pytest.raises(SystemExit) as missing:
        main(["doctor", str(codebase / "nowhere")])
    assert missing.value.code == 2


def test_help_names_what_is_tested(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    tested = next(doctor.self_test())[0].split(": ")[1].partition(" ok")[0]
    first, second, third = tested.split(", ")
    assert f"tests {first}, {second} and {third} on small tensors" in words


def test_the_self_test_takes_one_thread_and_gives_the_others_back(monkeypatch):
    right, threads, used = doctor.hard_similarity, torch.get_num_threads(), []

    def watched(*args, **kwargs):
        used.append(torch.get_num_threads())
        return right(*args, **kwargs)

    monkeypatch.setattr(doctor, "hard_similarity", watched)
    torch.set_num_threads(2)
    try:
        results = doctor.self_test()
        assert next(results)[1] and torch.get_num_threads() == 2 and set(used) == {1}
    finally:
        torch.set_num_threads(threads)


def test_the_self_test_fails_when_an_operator_is_wrong(monkeypatch, capsys):
    assert all(passed for _, passed in doctor.self_test())
    right = doctor.hard_similarity
    monkeypatch.setattr(doctor, "hard_similarity", lambda x, e, **kwargs: 1.001 * right(x, e, **kwargs))
    assert main(["doctor"]) == 1
    assert "hard_similarity FAILED: relative error" in capsys.readouterr().out

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(doctor, "sparse_aggregate", broken)
    assert main(["doctor"]) == 1
    assert "sparse_aggregate FAILED: RuntimeError: no kernel image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        (None, "backend      torch, not triton: its kernels need"),
        ("torch", "backend      torch, as FMFA_LOSSES_BACKEND says"),
        ("triton", 'backend      none: backend="triton" cannot run: its kernels need'),
        ("tirton", "backend      none: FMFA_LOSSES_BACKEND must be one of"),
    ],
)
def test_environment_names_the_reason(monkeypatch, choice, line):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if choice is None:
        monkeypatch.delenv("FMFA_LOSSES_BACKEND", raising=False)
    else:
        monkeypatch.setenv("FMFA_LOSSES_BACKEND", choice)
    report = "\n".join(doctor.environment())
    assert f"device       cpu\n{line}" in report
    assert (f"FMFA_LOSSES_BACKEND={choice} is set" in report) == (choice is not None)
