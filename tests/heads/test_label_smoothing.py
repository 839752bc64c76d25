"""label_smoothing of IDHead and id_loss against the equation, sample by sample, and at its edges."""

import copy
import math

import pytest
import torch
from torch import Tensor

from fmfa_losses.heads.identity import IDHead, id_loss

D, C = 6, 5


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(dtype: torch.dtype = torch.float64, b: int = 4):
    head = IDHead(D, C).to(dtype)
    torch.nn.init.normal_(head.classifier.weight)
    image, text = (torch.randn(b, D).to(dtype) for _ in range(2))
    return head, image, text, torch.randint(C, (b,))


def smoothed(image: Tensor, text: Tensor, pids: Tensor, s: float) -> Tensor:
    """The equation, sample by sample and class by class."""
    total = torch.zeros((), dtype=torch.float64)
    for logits in (image.double(), text.double()):
        for row, pid in zip(logits, pids.tolist(), strict=True):
            largest = row.max().detach()
            normaliser = (row - largest).exp().sum().log() + largest
            for k, logit in enumerate(row):
                target = (1 - s) * (k == pid) + s / len(row)
                total = total - target * (logit - normaliser)
    return total / (2 * len(pids))


@pytest.mark.parametrize("s", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("b", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_label_smoothing_is_the_equation(dtype, b, s):
    head, image, text, pids = make(dtype, b=b)
    pids[0] = 0
    leaves = [5 * torch.randn(C, b, dtype=torch.float64) for _ in range(2)]  # logits that are no contiguous tensors
    logits = [x.to(dtype).T.requires_grad_() for x in leaves]
    got = id_loss(*logits, pids, label_smoothing=s)
    want = smoothed(*logits, pids, s)
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=16 * eps, atol=eps)
    for a, e in zip(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits), strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=0, atol=4 * torch.finfo(dtype).eps / b)

    head.label_smoothing = s
    classify = head.classifier.double()
    out = head.double()(image.double(), text.double(), pids)
    torch.testing.assert_close(out.loss, smoothed(classify(image.double()), classify(text.double()), pids, s))


def test_label_smoothing_changes_no_accuracy_and_no_default():
    head, image, text, pids = make()
    smooth = IDHead(D, C, label_smoothing=0.2).double()
    smooth.load_state_dict(head.state_dict())
    plain, other = head(image, text, pids), smooth(image, text, pids)
    assert plain[1:] == other[1:]
    assert plain.loss != other.loss
    assert head.label_smoothing == 0.0 and repr(head).count("label_smoothing") == 0
    assert "label_smoothing=0.2" in repr(copy.deepcopy(smooth))


def test_label_smoothing_of_one_identity_and_of_equal_logits():
    image, text = torch.randn(3, 1), torch.randn(3, 1)
    assert id_loss(image, text, torch.zeros(3, dtype=torch.long), label_smoothing=0.3) == 0
    zeros = torch.zeros(3, 7)
    for s in (0.0, 0.3, 1.0):
        loss = id_loss(zeros, zeros, torch.tensor([0, 6, 3]), label_smoothing=s)
        assert loss.item() == pytest.approx(math.log(7))


@pytest.mark.filterwarnings("ignore")
def test_label_smoothing_under_compile_and_autocast():
    head, image, text, pids = make(torch.float32)
    head.label_smoothing = 0.1
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: head(*args).loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, text, pids), head(image, text, pids).loss)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(image, text, pids).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(head(image, text, pids).loss.item(), rel=2e-2)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, True, torch.tensor(0.1), None])
def test_bad_label_smoothing(value):
    zeros, pids = torch.zeros(2, 3), torch.tensor([0, 1])
    for call in (
        lambda: IDHead(4, 4, label_smoothing=value),
        lambda: id_loss(zeros, zeros, pids, label_smoothing=value),
    ):
        with pytest.raises((TypeError, ValueError), match=r"label_smoothing must (be|lie in)"):
            call()
