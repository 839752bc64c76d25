"""`python -m fmfa_losses doctor`: its report, its self-test, its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fmfa_losses
from fmfa_losses.__main__ import main
from fmfa_losses.doctor import diagnosis as doctor

ROOT = Path(__file__).parents[2]

MODEL = """
from model import objectives

loss = objectives.compute_sdm(image, text, pids, scale)
triplet = objectives.compute_triplet(image, text)
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
    files = {"model/build.py": MODEL, "adopted.py": ADOPTED, "python2.py": "print 'hello'\n"}
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return tmp_path


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


def test_report(codebase, capsys):
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in codebase.rglob("*") if file.is_file()}
    assert main(["doctor", str(codebase)]) == 0
    out = capsys.readouterr().out
    assert f"torch        {torch.__version__}" in out and "triton       " in out
    assert "device       cpu\nbackend      torch, not triton: " in out
    assert "self-test    cpu torch: sparse_aggregate, hard_similarity, sdm_loss ok" in out
    build = codebase / "model/build.py"
    assert f"{build}:4: objectives.compute_sdm(image, text, pids, scale)" in out
    assert "same value    SDMLoss()(image, text, pids, logit_scale=scale)\n" in out
    assert f"{build}:2: from model import objectives" in out
    assert "keep yours    compute_triplet, line 5: " in out
    assert f"{codebase / 'python2.py'}: not read: SyntaxError" in out
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in before} == before


def test_json_is_one_object_and_has_all_of_the_report(codebase, capsys):
    assert main(["doctor", str(codebase), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"schema", "version", "healthy", "environment", "codebase"}
    assert found["schema"] == 1 and found["healthy"] and found["version"] == fmfa_losses.__version__
    assert all(line["passed"] for line in found["environment"])
    inside = found["codebase"]
    assert inside.keys() == {"path", "files", "findings", "imports", "unreadable", "left_out"}
    assert inside["files"] == 3 and inside["path"] == str(codebase)
    (finding,) = inside["findings"]
    assert finding["line"] == 4 and finding["cell"] is None and finding["kind"] == "objective"
    assert finding["suggestions"][0]["same_value"] is True
    (imported,) = inside["imports"]
    assert imported["keep"] and imported["missing"][0]["lines"] == [5]
    assert imported["calls"][0]["write"] == "irra_objectives.compute_sdm"
    assert inside["unreadable"][0]["file"].endswith("python2.py")
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["codebase"] is None


def test_check_fails_where_a_line_can_be_replaced(codebase, capsys, monkeypatch):
    assert main(["doctor", str(codebase), "--check"]) == 3
    assert main(["doctor", str(codebase / "adopted.py"), "--check"]) == 0
    assert "no call that this library replaces" in capsys.readouterr().out
    for wrong in (["--check"], [str(codebase / "nowhere")]):
        with pytest.raises(SystemExit) as stopped:
            main(["doctor", *wrong])
        assert stopped.value.code == 2
    right = doctor.hard_similarity
    monkeypatch.setattr(doctor, "hard_similarity", lambda x, e, **kwargs: 1.001 * right(x, e, **kwargs))
    assert main(["doctor", str(codebase), "--check"]) == 1  # a wrong operator matters more


def test_help_names_what_is_tested(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    tested = next(doctor.self_test())[0].split(": ")[1].partition(" ok")[0]
    first, second, third = tested.split(", ")
    assert f"tests {first}, {second} and {third} on small tensors" in words
    for code in ("0, all is well", "1, the self-test fails", "2, a wrong argument", "3, with --check"):
        assert code in words


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


def test_a_reader_that_has_seen_enough_gets_no_traceback(codebase):
    command = [sys.executable, "-m", "fmfa_losses", "doctor", str(codebase)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
