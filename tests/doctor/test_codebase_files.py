"""What doctor reads of a tree that nobody vouches for: it opens nothing dangerous, ends, and names what it left out."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fmfa_losses.doctor import Finding, Unreadable, diagnosis, scan
from fmfa_losses.doctor.codebase import LeftOut, Limits, examine, parser
from fmfa_losses.doctor.codebase.report import as_text


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "python2.py").write_text("print 'hello'\n")
    (tmp_path / "latin.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "null.py").write_bytes(b"x = 1\0\n")
    unreadable = {item.file.name: item.reason for item in scan(str(tmp_path)) if isinstance(item, Unreadable)}
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
    (tmp_path / "zz.py").write_text("from model import objectives\nobjectives.compute_cmpm(a, b, c)")
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
    (found,) = examine(tmp_path).findings
    assert found.code == "compute_cmpm(a, b, c)"


@pytest.mark.parametrize("body", ["import os; os.abort()", "import time; time.sleep(1000)", "raise SystemExit(3)"])
def test_a_parser_that_dies_or_hangs_costs_one_file(tmp_path, monkeypatch, body):
    monkeypatch.setattr(parser, "SECONDS", 5 if "sleep" in body else 60)
    dies = f"""
import ast
parse = ast.parse
def dying(source, *options):
    if b"die" in source:
        {body}
    return parse(source, *options)
ast.parse = dying
"""
    monkeypatch.setattr(parser, "PROGRAM", dies + parser.PROGRAM)
    for name in ("a.py", "c.py"):
        (tmp_path / name).write_text("compute_cmpm(a, b, c)")
    (tmp_path / "b.py").write_text("die = 1")
    first, last, broken = scan(tmp_path)
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
    examine(tmp_path)
    assert [process.returncode for process in started] == [0]


def test_notebooks(tmp_path):
    imports = "from fmfa_losses import y\n", "from model import objectives as o"
    cells = [
        {"cell_type": "markdown", "source": "compute_sdm(a, b, c, d)"},
        {
            "cell_type": "code",
            "source": ["%matplotlib inline\n", "!pip install \\\n", "  x\n", *imports],
        },
        {"cell_type": "code", "source": "%%time\nfiles = !ls\nif files:\n    %cd x\n    z?\ny.compute_cmpm(1, 2, 3)"},
        {"cell_type": "code", "source": "%%bash\nfor f in *; do echo; done"},
        {"cell_type": "code", "source": ["s = (a\n", "     % b)\n", "# is this it?\n", "o.compute_cmpm(a, b, c)"]},
        {"cell_type": "code", "source": "print 'hello'"},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "nbformat": 4}))
    code = {"cell_type": "code", "input": "compute_cmpm(a, b, c)"}
    (tmp_path / "old.ipynb").write_text(json.dumps({"worksheets": [{"cells": [code]}]}))
    finding, old = examine(tmp_path).findings
    (unread,) = examine(tmp_path).unreadable
    assert (finding.cell, finding.line, finding.code) == (5, 4, "o.compute_cmpm(a, b, c)")
    assert unread.reason.startswith("1 of 5 code cells, cell 6: SyntaxError") and "<unknown>" not in unread.reason
    assert (old.cell, old.line) == (1, 1)
    report = "\n".join(as_text(examine(tmp_path)))
    assert f"{tmp_path / 'a.ipynb'}:cell 5:4: o.compute_cmpm(a, b, c)" in report


def test_names_that_a_terminal_cannot_show_are_escaped(tmp_path, capsys):
    name = os.fsdecode(b"a\x1b[31m\xff\nb.py")
    (tmp_path / name).write_text("compute_cmpm(a, b, c)")
    assert diagnosis.diagnose(tmp_path) == 0
    assert "a\\x1b[31m\\udcff\\nb.py:1: compute_cmpm" in capsys.readouterr().out


def write(folder, *names, text="compute_cmpm(a, b, c)"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(files=3), "the limit of 3 files"),
        (Limits(entries=4), "the limit of 4 names in folders"),
        (Limits(size=60), "the limit of 60 bytes"),
        (Limits(seconds=0.0), "the limit of 0 s"),
        (Limits(calls=2), "the limit of 2 calls"),
    ],
)
def test_a_tree_beyond_a_limit_is_read_up_to_it(tmp_path, limits, words):
    write(tmp_path, *(f"{folder}/{name}.py" for folder in "abc" for name in "xyz"))
    found = examine(tmp_path, limits)
    assert len(found.findings) <= 3 and found.files == len(found.findings)
    (left_out,) = found.left_out
    assert left_out.reason.startswith(words) and "was not read" in left_out.reason
    assert any(isinstance(item, LeftOut) for item in scan(tmp_path, limits))


def test_a_file_of_many_calls_is_cut_and_says_so(tmp_path):
    write(tmp_path, "a.py", text="compute_cmpm(a, b, c)\n" * 2100)
    found = examine(tmp_path)
    assert len(found.findings) == 2000 and found.left_out[0].file.name == "a.py"


def test_an_expression_that_grows_without_end_is_given_up(tmp_path):
    doubled = "def f(x, y):\n" + "    x = x + x\n" * 500 + "    return x\n"
    write(tmp_path, "a.py", text=doubled + "compute_cmpm(a, b, c)\nz = f(1, 2)\n")
    assert len(examine(tmp_path).findings) == 1


def test_packages_of_others_are_left_out_and_named(tmp_path):
    write(tmp_path, "model/build.py", "setup.py", "own/setup.py", "own/pyproject.py", "clip/build.py")
    copies = {
        "third_party": ["reid/metrics.py"],
        "lib/clip": ["clip.py", "simple_tokenizer.py", "__init__.py", "model.py"],
        "transformers": ["modeling_utils.py", "__init__.py"],
        "torchreid": ["__init__.py", "metrics/rank.py"],
    }
    for folder, names in copies.items():
        write(tmp_path / folder, *names)
    write(tmp_path, "target/some_package/a.py", "target/some_package-1.0.dist-info/x.py", "target/mine/a.py")
    write(tmp_path, "env/lib/site-packages/a.py", "venv/a.py", ".git/a.py", "a/node_modules/a.py")  # not even named
    found = examine(tmp_path)
    read = {str(finding.file.relative_to(tmp_path)) for finding in found.findings}
    assert read == {
        "model/build.py",
        "setup.py",
        "own/setup.py",
        "own/pyproject.py",
        "clip/build.py",
        "target/mine/a.py",
    }
    left_out = {str(item.file.relative_to(tmp_path)) for item in found.left_out}
    assert left_out == {*copies, "target/some_package"}
    assert examine(tmp_path / "lib/clip").findings  # asked for by name, it is read


def test_an_odd_reduction_does_not_lose_the_rest_of_its_file(tmp_path):
    file = tmp_path / "odd.py"
    odd = "def f(a, b):\n    return {}\n\nfrom model import objectives\nobjectives.compute_sdm(i, t, pids, scale)\n"
    for expression in (
        "torch.sum(a * b, dim=[1, 2])",
        "a.view(*b)",
        "a.view(dtype=b)",
        "a.mean(dim=None)",
        "F.cross_entropy(a, b, ignore_index=a)",
        "a / 1e-400",
        "a * 1e999 * 0",
        "a[:, None][b:c]",
        "a.view()",
        "F.one_hot(a)",
        "torch.cat()",
        "f()()",
    ):
        file.write_text(odd.format(expression))
        found = examine(file)
        assert not found.unreadable and [item.line for item in found.findings] == [5]
