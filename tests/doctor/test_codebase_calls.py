"""Which calls doctor takes for published functions, whose arguments it carries over, and what it says of imports."""

import pytest

from fmfa_losses.doctor.codebase import examine
from fmfa_losses.doctor.codebase.report import as_text


@pytest.fixture
def codebase(tmp_path):
    """Writes files and examines them: {"model/build.py": text, ...}."""

    def examined(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return examine(tmp_path)

    return examined


def writes(found):
    return [finding.suggestions[0].write for finding in found.findings]


OURS = "from fmfa_losses.compat import irra"
IMPORTS = {
    "from model import objectives\nobjectives.compute_itc(i, t, s)": f"{OURS} as objectives",
    "import model.objectives as O\nO.compute_itc(i, t, s)": "from fmfa_losses.compat import irra as O",
    "import model.objectives\nmodel.objectives.compute_itc(i, t, s)": "from fmfa_losses.compat import irra",
    "from .objectives import compute_itc\ncompute_itc(i, t, s)": "from fmfa_losses.compat.irra import compute_itc",
    "from o import compute_itc as itc\nitc(i, t, s)": "from fmfa_losses.compat.irra import compute_itc as itc",
    "from model.objectives import *\ncompute_itc(i, t, s)": "from fmfa_losses.compat.irra import compute_itc",
    "def f():\n    from m import objectives as o\n    o.compute_itc(i, t, s)": f"{OURS} as o",
}


@pytest.mark.parametrize("source", IMPORTS)
def test_a_published_function_is_known_by_its_import(codebase, source):
    found = codebase({"build.py": source})
    assert writes(found) == ["ITCLoss()(i, t, logit_scale=s)"]
    (imported,) = found.imports
    assert imported.write == (IMPORTS[source],) and imported.calls[0].lines == (source.count("\n") + 1,)
    assert source.splitlines()[imported.line - 1].strip() == imported.code


NOT_PUBLISHED = [
    "model.compute_per_loss(batch)",  # a method of a model, whatever its arguments
    "import model\nm = model.build()\nm.compute_itc(i, t, s)",
    "class A:\n    def f(self):\n        self.compute_itc(i, t, s)",
    "from model import objectives\ndef f(objectives):\n    objectives.compute_itc(i, t, s)",
    "from model import objectives\nobjectives = 3\ndef f(compute_itc):\n    compute_itc(i, t, s)",
    "class A:\n    def compute_itc(self, i, t, s):\n        A.compute_itc(self, i, t, s)",
    "def compute_itc(image, text):\n    pass\ncompute_itc(i, t)",  # a function of the file, with other parameters
    "from vilt.modules import objectives\nret.update(objectives.compute_mlm(self, batch))",
    "from vilt.modules import objectives\nobjectives.compute_itm(self, batch)",
    "from fmfa_losses.compat import irra as objectives\nobjectives.compute_itc(i, t, s)",
    "from fmfa_losses.compat.irra import *\ncompute_itc(i, t, s)",
    "import fmfa_losses.compat.irra\nfmfa_losses.compat.irra.compute_itc(i, t, s)",
    "order = importance_scores.argsort(descending=True)",
    "order = np.argsort(-distmat, axis=1)\nmatches = g_pids[order] == q_pids[:, None]",
    "order = torch.argsort(lengths)\nmatches = ids[order] == q_pids[:, None]",  # shortest first
    "order = torch.argsort(preds, descending=True)\nmatches = targets[order] == positive",  # of one query
    "order = torch.argsort(similarity, dim=1, descending=True)\nnearest = order[:, :5]",  # neighbours, no metric
    "import torch\nrank = torch.distributed.get_rank()\nrank(distmat, q_pids, g_pids)",
    "from m import rank\nrank(distmat, q_pids, g_pids)",  # distances or similarities: nothing says it
    "def rank(distmat, q_pids, g_pids):\n    return distmat.argsort()\nrank(d, q_pids, g_pids)",
    "from sklearn.utils import compute_class_weight\ncompute_class_weight(a, b, c)",
]


@pytest.mark.parametrize("source", NOT_PUBLISHED)
def test_what_is_not_the_published_function_is_left_alone(codebase, source):
    found = codebase({"build.py": source})
    assert not found.findings and not found.imports and not found.unreadable


def test_the_bodies_of_published_functions_are_not_reported(codebase):
    body = "def compute_rbs(a, b):\n    return compute_per_loss(a, b, 3)\n\ndef compute_per_loss(x, y, z):\n    pass\n"
    assert not codebase({"objectives.py": body}).findings


CARRIED = {
    "compute_per_loss(i, t, p, tau=args.tau, margin=args.margin, loss_type='TRL')": (
        "compat.rde.compute_per_loss(i, t, p, tau=args.tau, margin=args.margin, loss_type='TRL')",
        '(TRLLoss(args.tau, args.margin, negatives="released", reduction="none")(i, t, p), '
        "torch.nn.functional.cosine_similarity(i, t))",
    ),
    "compute_TAL_per(s, p, tau=a, margin=b)": (
        'tal_loss_from_scores(s, p, temperature=a, margin=b, reduction="none")',
    ),
    "compute_cmpm(image_embeddings=i, labels=p, text_embeddings=t)": ('CMPMLoss(normalize="released")(i, t, p)',
                                                                      "CMPMLoss()(i, t, p)"),
    "compute_sdm(i, t, p, s, **options)": ("compat.irra.compute_sdm(i, t, p, s, **options)",),
    "compute_itc(*features, s)": ("compat.irra.compute_itc(*features, s)",),
    "compute_itc((x for x in y), t, s)": ("ITCLoss()((x for x in y), t, logit_scale=s)",),
}  # fmt: skip


@pytest.mark.parametrize("call", CARRIED)
def test_arguments_are_carried_over(codebase, call):
    (finding,) = codebase({"build.py": f"from model import objectives\nobjectives.{call}"}).findings
    assert tuple(s.write for s in finding.suggestions) == CARRIED[call]
    assert finding.returns


MISSING = """
from model import objectives

class Model:
    def forward(self, batch):
        a = objectives.compute_sdm(i, t, pids, scale)
        b = objectives.compute_triplet(i, t)
        c = objectives.compute_sdm_ddp(self.args, i, t, pids, scale)
        d = objectives.compute_id(logits, pids)
        e, f, g = objectives.compute_rbs(i, t, i2, t2, pids, label_hat=w)
        h = objectives.compute_mcm_or_mlm(scores, labels)
"""


def test_names_that_are_missing_are_said_and_the_own_import_stays(codebase):
    found = codebase({"model/build.py": MISSING})
    assert [finding.line for finding in found.findings] == [6, 11]
    (imported,) = found.imports
    assert imported.keep and imported.line == 2
    assert imported.write == ("from fmfa_losses.compat import irra as irra_objectives",)
    assert [(call.write, call.name, call.lines) for call in imported.calls] == [
        ("irra_objectives.compute_sdm", "compute_sdm", (6,)),
        ("irra_objectives.compute_mcm_or_mlm", "compute_mcm_or_mlm", (11,)),
    ]
    missing = {item.name: (item.lines, item.why) for item in imported.missing}
    assert missing.keys() == {"compute_triplet", "compute_sdm_ddp", "compute_id", "compute_rbs"}
    assert missing["compute_triplet"][0] == (7,) and "no function of this name" in missing["compute_triplet"][1]
    assert "needs labels too" in missing["compute_id"][1]
    assert "3 results are taken, the published one has 2" == missing["compute_rbs"][1]
    report = "\n".join(as_text(found))
    assert "keep yours    compute_triplet, line 7: " in report and "write below" in report


def test_whatever_else_is_used_of_the_module_keeps_its_import(codebase):
    source = "from model import objectives\na = objectives.compute_itc(i, t, s)\n"
    source += "b = objectives.IMAL(i, t)\nc = objectives.TAU\n"
    (imported,) = codebase({"build.py": source + "d = np.sum(a)\n"}).imports
    assert imported.keep and {(item.name, item.lines) for item in imported.missing} == {("IMAL", (3,)), ("TAU", (4,))}


def test_a_line_that_imports_more_names_stays(codebase):
    (imported,) = codebase({"build.py": "from m import compute_itc, IMAL\nx = compute_itc(i, t, s)\n"}).imports
    assert imported.keep and imported.write == ("from fmfa_losses.compat.irra import compute_itc",)


def test_one_import_cannot_serve_two_codebases(codebase):
    source = (
        "from model import objectives\nobjectives.compute_sdm(i, t, p, s)\nobjectives.compute_TAL_per(s, p, a, b)\n"
    )
    (imported,) = codebase({"build.py": source}).imports
    assert not imported.keep and not imported.missing
    assert set(imported.write) == {
        "from fmfa_losses.compat import irra as irra_objectives",
        "from fmfa_losses.compat import rde as rde_objectives",
    }
    assert {call.write for call in imported.calls} == {"irra_objectives.compute_sdm", "rde_objectives.compute_TAL_per"}


@pytest.mark.parametrize(
    ("calls", "module"),
    [
        ("compute_sdm(i, t, p, s)", "irra"),
        ("compute_sdm(i, t, p, s, use_weight=args.w)", "fmfa"),
        ("compute_minmax_info_loss(t, i, a)\nobjectives.compute_id(a, b, c)", "fmfa"),
        ("compute_a_sdm(i, t, p, s, a, b)\nobjectives.compute_sdm(i, t, p, s)", "fmfa_2025_04"),
        ("compute_rbs(i, t, a, b, p)", "rde"),
    ],
)
def test_the_module_that_has_every_name_is_the_import(codebase, calls, module):
    (imported,) = codebase({"build.py": f"from model import objectives\nobjectives.{calls}\n"}).imports
    assert imported.write == (f"from fmfa_losses.compat import {module} as objectives",)


RBS = """
def compute_rbs(i_feats, t_feats, i_tse_f, t_tse_f, pid, label_hat=None, tau=0.02, margin=0.1):
    return {}
"""
OTHERS = {
    RBS.format("bge, tse, rrr"): "yours returns 3 results",
    "def compute_rbs(features, pid, label_hat=None):\n    return 1, 2\n": "yours takes (features, pid, label_hat)",
}


@pytest.mark.parametrize("definition", OTHERS)
def test_another_function_of_a_published_name_is_kept(codebase, definition):
    calls = "objectives.compute_rbs(i, t, a, b, p)\nobjectives.compute_TAL_per(s, p, 1, 2)"
    call = f"from model import objectives\n{calls}"
    found = codebase({"model/objectives.py": definition, "model/build.py": call})
    assert [finding.name for finding in found.findings] == ["compute_TAL_per"]
    (missing,) = found.imports[0].missing
    assert missing.name == "compute_rbs" and OTHERS[definition] in missing.why


def test_the_nearest_definition_counts(codebase):
    call = "from model import objectives\nobjectives.compute_itc(i, t, s)"
    right, wrong = (
        "def compute_itc(image_features, text_features, logit_scale):\n    pass\n",
        "def compute_itc(x):\n    pass\n",
    )
    files = {"a/model/objectives.py": right, "a/model/build.py": call}
    found = codebase(files | {"b/model/objectives.py": wrong, "b/model/build.py": call})
    assert [finding.file.parts[-3] for finding in found.findings] == ["a"]


SDM = """
def compute_sdm(image_features, text_features, pid, logit_scale, image_id=None, factor=0.3, epsilon=1e-8):
    same = (pid.view(-1, 1) == pid.view(1, -1)).float()
    if image_id is not None:
        image = (image_id.view(-1, 1) == image_id.view(1, -1)).float()
        same = (same - image) * factor + image
    image = F.normalize(image_features, dim=1)
    text = F.normalize(text_features, dim=1)
    logits = logit_scale * text @ image.t()
    goal = torch.log(same / same.sum(dim=1) + epsilon)
    a = (logits.softmax(1) * (logits.log_softmax(1) - goal)).sum(1).mean()
    b = (logits.t().softmax(1) * (logits.t().log_softmax(1) - goal)).sum(1).mean()
    return a + b
"""
BY_LINE = "SDMLoss()(i, t, p, logit_scale=s)"
SMALL = "SDMLoss(eps=0.001)(i, t, p, logit_scale=s)"
# What is changed in the published function and its call: what to write, and why the import does not do.
CHANGES = {
    (): ("i, t, p, s", BY_LINE, None),  # IRRA's image_fetures, corrected
    ("factor=0.3", "factor=0.5"): ("i, t, p, s", BY_LINE, None),  # not used without image_id
    ("epsilon=1e-8", "epsilon=0.00000001"): ("i, t, p, s", BY_LINE, None),
    ("epsilon=1e-8", "epsilon=0.001"): ("i, t, p, s", SMALL, "yours has epsilon=0.001, the published one epsilon=1e-8"),
    ("+ epsilon", "+ 0.001", ", epsilon=1e-8", ""): ("i, t, p, s", SMALL, "yours has epsilon=0.001"),
    ("image_features, text_features, pid", "pid, text_features, image_features"): (
        "p, t, i, s",
        BY_LINE,
        "yours takes",
    ),
    ("factor=0.3,", "factor=0.3, *,"): ("i, t, pid=p, logit_scale=s, epsilon=0.001", SMALL, None),
    ("pid", "ids"): ("i, t, ids=p, logit_scale=s", BY_LINE, "the published one takes no ids"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_published_body_with_other_names_or_defaults(codebase, change):
    arguments, write, why = CHANGES[change]
    body = SDM
    for old, new in zip(change[::2], change[1::2], strict=True):
        body = body.replace(old, new)
    call = f"from model import objectives\nobjectives.compute_sdm({arguments})\nobjectives.compute_id(a, b, c)"
    found = codebase({"model/objectives.py": body, "model/build.py": call})
    assert writes(found)[0] == write and not found.findings[0].note
    (imported,) = found.imports
    assert [why in missing.why for missing in imported.missing] == [True] if why else not imported.missing


@pytest.mark.parametrize("default", ["0.015", "TAU"])
def test_the_defaults_of_another_body_are_passed_on(codebase, default):
    body = f"def compute_TRL_per(scores, pid, margin=0.2, tau={default}):\n    return scores\n"
    call = "from model import objectives\nobjectives.compute_TRL_per(s, p)\nobjectives.compute_TAL_per(s, p, 1, 2)"
    found = codebase({"model/objectives.py": body, "model/build.py": call})
    (missing,) = found.imports[0].missing
    assert missing.name == "compute_TRL_per" and f"yours has tau={default}" in missing.why
    assert [finding.name for finding in found.findings] == ["compute_TRL_per", "compute_TAL_per"]
    assert f"temperature={default}" in found.findings[0].suggestions[0].write


@pytest.mark.parametrize(
    ("source", "written", "called"),
    [
        ("import model.objectives\nmodel.objectives.{}", "from fmfa_losses.compat import irra", "irra.compute_itc"),
        ("import model.objectives as o\no.{}", "from fmfa_losses.compat import irra as o", None),
        ("from model.objectives import compute_itc\n{}", "from fmfa_losses.compat.irra import compute_itc", None),
    ],
)
def test_a_call_that_must_change_is_said(codebase, source, written, called):
    report = "\n".join(as_text(codebase({"build.py": source.format("compute_itc(i, t, s)")})))
    assert f"    write         {written}\n" in report
    assert ("    call          " in report) == (called is not None)
    assert called is None or f"    call          {called} for compute_itc, line 2" in report
