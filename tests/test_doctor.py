"""`python -m fmfa_losses doctor`: its report, its self-test, and what it finds in a codebase of IRRA's shape."""

import subprocess
import sys
import time
from pathlib import Path

import codebases
import pytest
import torch

from fmfa_losses import doctor
from fmfa_losses.__main__ import main
from fmfa_losses.doctor import Finding, Unreadable, scan

ROOT = Path(__file__).parents[1]

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
        ("model/build.py", 11): "IDHead(embed_dim, num_identities)(image_features, text_features, batch['pids']).loss",
        ("model/build.py", 12): "sparse_aggregate(image_tokens, text_tokens)",
        ("model/build.py", 13): "EFALoss()(image_feats[:, 1:, :], text_feats, text_mask=caption_ids != 0)",
        ("model/build.py", 14): "IRRHead(embed_dim, vocab_size)",
        ("model/losses.py", 7): 'tal_loss_from_scores(scores, pid, temperature=0.02, margin=0.1, reduction="none")',
        ("model/losses.py", 8): "TALLoss(reduction=\"sum\")(i, t, pids, sample_weight=batch['label_hat'])",
        ("model/losses.py", 10): "CMPMLoss()(image_features, text_features, pids)",
        ("utils/metrics.py", 3): "fmfa_losses.retrieval.retrieval_metrics",
        ("utils/metrics.py", 4): "fmfa_losses.retrieval.retrieval_metrics",
        ("utils/metrics.py", 8): "fmfa_losses.retrieval.retrieval_metrics",
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
    assert unreadable["python2.py"].startswith("SyntaxError")


def test_every_replacement_is_public_and_fills_its_places():
    import fmfa_losses.compat as compat

    for name, replacement in doctor.REPLACEMENTS.items():
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


def test_the_self_test_is_quick_and_fails_when_an_operator_is_wrong(monkeypatch, capsys):
    start = time.perf_counter()
    assert all(passed for _, passed in doctor.self_test())
    assert time.perf_counter() - start < 2 * (1 + torch.cuda.device_count() * 30)  # kernels compile once a device
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
