"""Functions of any name that compute an equation of this library are found by what they compute, and only then."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fmfa_losses
from fmfa_losses.doctor.codebase import examine

# In the style of TextReID: a function of another name, with results that are asked for.
FUNCTION = """
def projection_loss(visual, textual, labels, verbose=False, tiny=1e-8):
    ids = labels.reshape((visual.shape[0], 1))
    positive = ((ids - ids.t()) == 0).float()
    v, t = F.normalize(visual, p=2, dim=1), F.normalize(textual, p=2, dim=1)
    target = torch.log(positive / positive.norm(dim=1) + tiny)
    to_text, to_image = visual @ t.T, torch.mm(textual, v.t())
    total = 0
    total = total + torch.sum(F.softmax(to_image, dim=1) * (F.log_softmax(to_image, 1) - target), dim=1).mean()
    total += torch.mean((to_text.softmax(dim=1) * (to_text.softmax(dim=-1).log() - target)).sum(1))
    if verbose:
        return total, (v * t).sum(1).mean()
    return total
"""
# In the style of PLIP and APTM: methods, with attributes and with ids that may be left out.
METHODS = """
class Losses(nn.Module):
    def forward(self, image, text, ids):
        a = self.projection(image, text, ids)
        b = self.contrast(image, text)
        c = self.contrast(image, text, ids=ids)
        return a, b, c

    def projection(self, image, text, ids):
        unit_image = image / image.norm(dim=1, keepdim=True)
        unit_text = text / text.norm(dim=1, keepdim=True)
        same = ids.view(-1, 1).eq(ids.view(1, -1)).float()
        goal = torch.log(self.tiny + same / same.norm(dim=1))
        a, b = unit_text.mm(image.t()).t(), text @ unit_image.t()
        return sum_rows(a, goal) + sum_rows(b, goal)

    def contrast(self, image, text, ids=None):
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        scores = all_gather(image) @ all_gather(text).t() / self.temp
        if ids is None:
            own = torch.arange(scores_rows)
            return 0.5 * F.cross_entropy(scores, own) + 0.5 * F.cross_entropy(scores.t(), own)
        ids = all_gather(ids.view(-1, 1))
        positive = torch.eq(ids, ids.t()).float()
        share = positive / positive.sum(1, keepdim=True)
        to_text = -torch.sum(scores.log_softmax(1) * share, dim=1).mean()
        to_image = -torch.sum(scores.t().log_softmax(1) * share, dim=1).mean()
        return (to_text + to_image) / 2
""".replace("sum_rows(a, goal)", "torch.sum(F.softmax(a, 1) * (F.log_softmax(a, 1) - goal), 1).mean()").replace(
    "sum_rows(b, goal)", "torch.sum(F.softmax(b, 1) * (F.log_softmax(b, 1) - goal), 1).mean()"
).replace("scores_rows", "image.size(0)")  # fmt: skip
# In the style of TBPS-CLIP: features of length 1, a teacher, and two views.
SOFT = """
class CLIP(nn.Module):
    def forward(self, image, text, pids, one, other):
        image_norm, text_norm = F.normalize(image), F.normalize(text)
        v = F.normalize(image)
        t = F.normalize(text, dim=-1)
        with torch.no_grad():
            v_s = F.normalize(image + text)
            t_s = F.normalize(text - image)
        same = torch.eq(pids.view(-1, 1), pids.view(1, -1)).float()
        q = same / same.sum(1, keepdim=True)
        x = F.normalize(one, dim=1)
        y = F.normalize(other, dim=1)
        labels = torch.arange(len(one))
        first = self.soft_contrast(v, t, v_s, t_s, v, t, v_s, t_s, q, 0.3, self.scale)
        return first, two_views(x, y, x, y, labels, 0.1)

    def soft_contrast(self, v, t, v_s, t_s, vs, ts, vs_s, ts_s, hard, ratio, scale):
        with torch.no_grad():
            goal_v = ratio * F.softmax(scale * v_s @ ts_s.t(), dim=1) + (1 - ratio) * hard
            goal_t = hard * (1 - ratio) + F.softmax(scale * t_s @ vs_s.t(), dim=1) * ratio
        a = torch.sum(F.log_softmax(scale * v @ ts.t(), dim=1) * goal_v, dim=1)
        b = torch.sum(goal_t * F.log_softmax(scale * t @ vs.t(), dim=1), dim=1)
        return -(a.mean() + b.mean()) / 2


def two_views(a, b, all_a, all_b, labels, temperature):
    itself = torch.where(F.one_hot(labels, all_a.size(0)) == 0, 0, float("-inf"))
    aa, bb = a @ all_a.t() / temperature + itself, b @ all_b.t() / temperature + itself
    left = torch.cat([a @ all_b.t() / temperature, aa], dim=1)
    right = torch.cat([b @ all_a.t() / temperature, bb], dim=1)
    return (F.cross_entropy(left, labels) + F.cross_entropy(right, labels)) * 0.5
"""


def examined(tmp_path, source):
    (tmp_path / "losses.py").write_text(
        f"import torch\nfrom torch import nn\nimport torch.nn.functional as F\n{source}"
    )
    return examine(tmp_path).findings


def names(**more):
    return {**{name: getattr(fmfa_losses, name) for name in fmfa_losses.__all__}, "torch": torch, "nn": nn, "F": F,
            "all_gather": lambda x: x, **more}  # fmt: skip


def features():
    torch.manual_seed(0)
    return torch.randn(2, 6, 8, dtype=torch.float64).unbind()


PIDS = torch.tensor([0, 1, 0, 2, 3, 1])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "published"),
    [
        ("(x, y, p)", True),
        ("(x, y, p, tiny=0.01)", True),
        ("(x, y, p, False, 0.01)", True),
        ("(x, y, p, verbose=True)", False),
    ],
)
def test_a_function(tmp_path, call, published):
    found = examined(tmp_path, FUNCTION + f"\nloss = projection_loss{call}\n")
    assert [finding.name for finding in found] == ["cmpm"] * published
    if published:
        exact, paper = found[0].suggestions
        known = names(**dict(zip("xyp", (*features(), PIDS), strict=True)))
        exec(FUNCTION, known)
        close(eval(exact.write, known), eval(found[0].code, known))
        assert exact.same_value and not paper.same_value


def test_a_function_of_another_file(tmp_path):
    (tmp_path / "head.py").write_text("from .losses import projection_loss\nx = projection_loss(v, t, ids)\n")
    assert [finding.file.name for finding in examined(tmp_path, FUNCTION)] == ["head.py"]


def test_methods(tmp_path):
    found = examined(tmp_path, METHODS)
    assert [finding.name for finding in found] == ["cmpm", "itc_gather", "nitc_gather"]
    image, text = features()
    known = names(image=image, text=text, ids=PIDS)
    exec(METHODS, known)
    known["self"] = model = known["Losses"]()
    model.tiny, model.temp = 1e-3, 0.07
    for finding, expected in zip(found, model(image, text, PIDS), strict=True):
        write = finding.suggestions[0].write
        assert ("gather=True" in write) == (finding.name != "cmpm")
        close(eval(write.replace("gather=True", "gather=False"), known), expected)  # here one process alone


def test_an_inherited_method(tmp_path):
    """Of a base class that a package hands on; a method that the class has itself is another one."""
    files = {
        "models/__init__.py": "from models.base import Losses\nfrom models.middle import Middle\n",
        "models/base.py": f"import torch\nimport torch.nn.functional as F\n{METHODS}",
        "models/middle.py": "from models import Losses\nclass Middle(Losses):\n    def other(self):\n        pass\n",
        "models/retrieval.py": "from models import Middle\nclass Retrieval(Middle):\n    def forward(self, v, t, p):\n"
        "        return self.contrast(v, t, ids=p), self.other_loss(v)\n",
        "models/own.py": "from models import Middle\nclass Own(Middle):\n    def contrast(self, a, b):\n"
        "        return 0\n    def forward(self, v, t):\n        return self.contrast(v, t)\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = [item for item in examine(tmp_path).findings if item.file.name != "base.py"]
    assert [(item.file.name, item.line, item.name) for item in found] == [("retrieval.py", 4, "nitc_gather")]


def test_soft_labels_and_two_views(tmp_path):
    found = examined(tmp_path, SOFT)
    assert [finding.name for finding in found] == ["unit_nitc_soft", "unit_simclr"]
    image, text = features()
    known = names(image=image, text=text, pids=PIDS)
    exec(SOFT, known)
    model = known["CLIP"]()
    model.scale = 14.0
    expected = model(image, text, PIDS, image + 1, text)
    v, t, v_s, t_s = (F.normalize(x) for x in (image, text, image + text, text - image))
    known |= {"self": SimpleNamespace(scale=14.0), "v": v, "t": t, "v_s": v_s, "t_s": t_s}
    known |= {"x": F.normalize(image + 1), "y": t}
    for finding, value in zip(found, expected, strict=True):
        close(eval(finding.suggestions[0].write, known), value)


OTHERS = {
    "another norm": ("positive.norm(dim=1)", "positive.sum(dim=1).square()"),
    "features not of length 1": ("F.normalize(textual, p=2, dim=1)", "textual"),
    "another length": ("F.normalize(visual, p=2, dim=1)", "visual / textual.norm(dim=1, keepdim=True)"),
    "a longer length": ("F.normalize(visual, p=2, dim=1)", "visual / (1e-8 + visual.norm(dim=1, keepdim=True))"),
    "the other KL": ("F.log_softmax(to_image, 1) - target", "target - F.log_softmax(to_image, 1)"),
    "one direction": ("to_image = visual @ t.T, torch.mm(textual, v.t())", "to_image = visual @ t.T, visual @ t.T"),
    "a weight": ("total = 0\n", "total = 0\n    textual = 2 * textual\n    to_image = 2 * to_image\n"),
    "a sum": (", dim=1).mean()", ", dim=1).sum()"),
    "a branch": ("    total = 0\n", "    if len(labels) > 3:\n        return 0\n    total = 0\n"),
    "a loop": ("    total = 0\n", "    total = 0\n    for x in labels:\n        total = 0\n"),
    "a change in place": ("    total = 0\n", "    total = 0\n    positive.fill_diagonal_(0)\n"),
    "an own function": ("F.normalize(visual, p=2, dim=1)", "normalize(visual)"),
    "no gradient": ("\ndef proj", "\n@torch.no_grad()\ndef proj"),
}  # fmt: skip


@pytest.mark.parametrize("change", OTHERS)
def test_what_computes_something_else_is_left_alone(tmp_path, change):
    old, new = OTHERS[change]
    assert old in FUNCTION
    assert not examined(tmp_path, FUNCTION.replace(old, new, 1) + "\nloss = projection_loss(x, y, p)\n")


def test_features_that_may_have_another_length_are_left_alone(tmp_path):
    source = SOFT.replace("v = F.normalize(image)\n", "v = image\n").replace("x = F.normalize(one, dim=1)", "x = one")
    assert not examined(tmp_path, source)


def test_cross_entropies_are_found_by_published_names_alone(tmp_path):
    ranking = "def clip_loss(a, b, y):\n    return (F.cross_entropy(a, y) + F.cross_entropy(b, y)) / 2\n"
    assert not examined(tmp_path, ranking + "x = clip_loss(a, b, y)\n")


SDM = """
def compute_sdm(image_fetures, text_fetures, pid, logit_scale, image_id=None, factor=0.3, epsilon=1e-8):
    same = (pid.view(-1, 1) == pid.view(1, -1)).float()
    if image_id is not None:
        same = same * factor
    image, text = F.normalize(image_fetures), F.normalize(text_fetures)
    logits = logit_scale * image @ text.t()
    goal = torch.log(same / same.sum(dim=1) + epsilon)
    a = (logits.softmax(1) * (logits.log_softmax(1) - goal)).sum(1).mean()
    b = (logits.t().softmax(1) * (logits.t().log_softmax(1) - goal)).sum(1).mean()
    return a + b
"""


@pytest.mark.parametrize(("body", "noted"), [(SDM, False), (SDM.replace("return a + b", "return a + 2 * b"), True)])
def test_a_published_name_with_another_body_is_noted(tmp_path, body, noted):
    (tmp_path / "build.py").write_text("import losses\nx = losses.compute_sdm(i, t, p, s)\n")
    (finding,) = examined(tmp_path, body)
    assert ("compare both on a batch" in finding.note and "losses.py:5" in finding.note) == noted
    assert bool(finding.note) == noted
    assert examine(tmp_path).imports[0].notes == ((finding.note,) if noted else ())


PER = """
def compute_InfoNCE_per(scores, logit_scale):
    # cosine similarity as logits
    logits_per_image = logit_scale * scores
    logits_per_text = logits_per_image.t()

    p1 = F.softmax(logits_per_image, dim=1)
    p2 = F.softmax(logits_per_text, dim=1)

    loss = (-p1.diag().log() - (p2.diag().log())) / 2
    return loss.cuda()


def compute_rbs(i_feats, t_feats, i_tse_f, t_tse_f, pid, label_hat=None, tau=0.02, margin=0.1, loss_type="TAL",
                logit_scale=50):
    return label_hat, label_hat
"""


def test_a_body_without_an_equation_is_compared_as_text(tmp_path):
    (tmp_path / "build.py").write_text("import losses\nx = losses.compute_InfoNCE_per(scores, scale)\n")
    (finding,) = examined(tmp_path, PER)
    assert not finding.note
    (finding,) = examined(tmp_path, PER.replace("/ 2", "/ 3"))
    assert "your compute_InfoNCE_per (losses.py:" in finding.note
    (tmp_path / "build.py").write_text("import losses\nx, y = losses.compute_rbs(i, t, i2, t2, p, w)\n")
    (finding,) = examined(tmp_path, PER)
    assert "your compute_rbs (losses.py:" in finding.note


INFO = """
def info(image, text, scale):
    logits = scale * F.normalize(image) @ F.normalize(text).t()
    own = torch.arange({}, device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2

loss = info(x, y, 20.0)
"""


@pytest.mark.parametrize(
    ("arguments", "found"),
    [("len_", False), ("image.shape[0]", True), ("0, image.shape[0]", True), ("start=0, end=image.size(0)", True),
     ("1, image.shape[0]", False), ("start=1, end=image.size(0)", False), ("end=image.size(0), step=2", False)],
)  # fmt: skip
def test_targets_that_are_shifted_are_others(tmp_path, arguments, found):
    assert bool(examined(tmp_path, INFO.format(arguments))) == found
