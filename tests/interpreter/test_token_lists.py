"""Lists of kept tokens against the formulas in torch that define them."""

import pytest
import torch
from fmfa_losses.kernels import match, token_lists
from helpers.compare import assert_close, value_and_grads

from fmfa_losses import functional
from fmfa_losses.ops.hard_similarity import hard_similarity_backward_op, hard_similarity_op, token_lists_op


def formulas(mask):
    gone = mask.logical_not().to(torch.uint8)
    counts = mask.sum(dim=1)
    widths = (0, token_lists.SHORT, token_lists.PACKED, mask.shape[1])
    granules = (counts.sort().values + token_lists.GRANULE - 1) // token_lists.GRANULE
    return (
        torch.argsort(gone, dim=1, stable=True),
        counts,
        torch.argsort(counts, stable=True),
        torch.stack([(counts <= width).sum() if i < 3 else torch.tensor(len(mask)) for i, width in enumerate(widths)]),
        granules.cumsum(0),
        torch.argsort(gone.flatten(), stable=True),
        mask.sum().view(1),
    )


def masks(B, T):
    yield torch.rand(B, T) < torch.rand(B, 1)  # some samples with few tokens, some with all but a few
    yield torch.zeros(B, T, dtype=torch.bool)
    yield torch.ones(B, T, dtype=torch.bool)
    yield torch.arange(T) < torch.randint(0, T + 1, (B, 1))


@pytest.mark.parametrize("blocks", [None, (16, 4)])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 77), (13, 35), (3, 300)])
def test_lists_are_what_the_formulas_say(monkeypatch, B, T, blocks):
    if blocks is not None:
        monkeypatch.setattr(token_lists, "BLOCK_T", blocks[0])
        monkeypatch.setattr(token_lists, "BLOCK_B", blocks[1])
    for mask in masks(B, T):
        lists = token_lists.sections(token_lists.make(mask), B, T)
        for name, got, right in zip(lists._fields, lists, formulas(mask), strict=True):
            assert got.dtype == torch.int32
            assert got.data_ptr() % 16 == 0
            assert torch.equal(got.long(), right), name


def test_a_strided_mask():
    mask = torch.rand(7, 9) < 0.5
    for strided in (mask[:, 1:], mask[1::2], mask.T, mask[:1].expand(4, 9)):
        lists = token_lists.sections(token_lists.make(strided), *strided.shape)
        assert all(torch.equal(got.long(), right) for got, right in zip(lists, formulas(strided), strict=True))


def launched(monkeypatch):
    """The names of the kernels that are launched from now on."""
    names = []
    for module in (token_lists, match):
        launch = module.launch
        monkeypatch.setattr(
            module,
            "launch",
            lambda kernel, *a, launch=launch, **k: names.append(kernel.__name__) or launch(kernel, *a, **k),
        )
    return names


def test_one_step_of_efa_makes_the_lists_of_a_mask_once(monkeypatch):
    image, text = (torch.randn(3, tokens, 8, requires_grad=True) for tokens in (6, 5))
    text_mask = torch.rand(3, 5) < 0.7
    names = launched(monkeypatch)
    loss = functional.efa_loss(image, text, text_mask=text_mask, backend="triton")
    assert [names.count(name) for name in ("_tokens_kernel", "_samples_kernel")] == [1, 1]
    assert names.count("_match_kernel") == 2  # one class of width each: no caption is long
    torch.autograd.grad(loss, (image, text))
    assert [names.count(name) for name in ("_tokens_kernel", "_samples_kernel")] == [1, 1]


def test_the_operator_takes_lists_or_makes_them():
    x, e = (torch.nn.functional.normalize(torch.randn(3, tokens, 8), dim=-1) for tokens in (6, 5))
    masks = torch.rand(3, 6) < 0.7, torch.rand(3, 5) < 0.7
    lists = [token_lists_op(mask) for mask in masks]
    torch.library.opcheck(token_lists_op, (masks[0],), test_utils=("test_schema", "test_faketensor"))
    args = (x.requires_grad_(), e.requires_grad_(), *masks, "mean", 1.0, True, "triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(hard_similarity_op, (*args, *lists), test_utils=tests)
    with_lists, without = ([t.detach() for t in hard_similarity_op(*args, *more)] for more in (lists, ()))
    assert all(torch.equal(a, b) for a, b in zip(with_lists, without, strict=True))
    backward = (torch.randn(3, 3), *without[1:], x.detach(), e.detach(), *args[2:5], "triton")
    torch.library.opcheck(hard_similarity_backward_op, (*backward, *lists), test_utils=tests)
    for a, b in zip(
        hard_similarity_backward_op(*backward, *lists), hard_similarity_backward_op(*backward), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.of_torch
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@pytest.mark.parametrize("dynamic", [False, True])
def test_lists_under_torch_compile(dynamic):
    def loss(image, text, image_mask, text_mask):
        masks = {"image_mask": image_mask, "text_mask": text_mask}
        return functional.efa_loss(image, text, backend="triton", **masks)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for B, N, L in ((3, 6, 5), (4, 7, 3)):
        image, text = torch.randn(B, N, 8), torch.randn(B, L, 8)
        masks = torch.rand(B, N) < 0.7, torch.rand(B, L) < 0.7
        got, right = (value_and_grads(lambda i, t, f=f: f(i, t, *masks), (image, text)) for f in (compiled, loss))  # noqa: B023
        assert_close(got, right, 1e-6)
