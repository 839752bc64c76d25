"""Chunks against the whole batch."""

import pytest
import torch
import torch.distributed as dist
from helpers import processes
from helpers.errors import explains
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fmfa_losses.cached import cached_backward
from fmfa_losses.losses.asdm import ASDMLoss
from fmfa_losses.losses.efa import EFALoss

B, N, L, D = 7, 5, 4, 6


class Model(nn.Module):
    """Two towers with dropout, and outputs of every kind that a chunk can have."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(D, D).double(), nn.Linear(D, D).double()
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        image_tokens, text_tokens = self.image(self.dropout(image)), self.text(self.dropout(text))
        return {
            "image_features": image_tokens.mean(1),
            "text_features": text_tokens.mean(1),
            "image_tokens": image_tokens,
            "text_tokens": text_tokens,
            "text_mask": text[..., 0] > -1.0,
        }


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image, text = (torch.randn(B, T, D, generator=generator, dtype=torch.float64) for T in (N, L))
    return image, text


def total(image_features, text_features, image_tokens, text_tokens, text_mask, **gathering) -> Tensor:
    pids = torch.arange(len(image_features)) // 2
    efa = EFALoss(**gathering)(image_tokens, text_tokens, text_mask=text_mask)
    return efa + ASDMLoss(**gathering)(image_features, text_features, pids)


def grads(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters()]


def assert_equal(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 2, 4], [1] * 7])
@pytest.mark.parametrize("as_dict", [True, False])
def test_equals_the_whole_batch(sizes, as_dict):
    model, (image, text) = Model(), inputs()
    expected = total(**model(image, text))
    expected.backward()
    expected_grads = grads(model)

    model.zero_grad()
    if as_dict:
        chunks = [{"image": i, "text": t} for i, t in zip(image.split(sizes), text.split(sizes), strict=True)]
        loss = cached_backward(model, chunks, total)
    else:
        chunks = list(zip(image.split(sizes), text.split(sizes), strict=True))
        loss = cached_backward(lambda *chunk: tuple(model(*chunk).values()), chunks, total)
    assert not loss.requires_grad
    assert_equal([loss, *grads(model)], [expected.detach(), *expected_grads])


def test_adds_to_gradients_that_are_there():
    model, (image, text) = Model(), inputs()
    cached_backward(model, [(image, text)], total)
    once = grads(model)
    cached_backward(model, list(zip(image.split(2), text.split(2), strict=True)), total)
    assert_equal(grads(model), [2 * g for g in once])


def test_dropout_is_the_same_in_both_passes_and_random_numbers_go_on():
    """The whole batch with the masks that the chunks drew: a graph over all chunks, from the same random state."""
    model, (image, text) = Model(dropout=0.5), inputs()
    chunks = list(zip(image.split([3, 4]), text.split([3, 4]), strict=True))
    torch.manual_seed(5)
    outputs = [model(*chunk) for chunk in chunks]
    expected = total(**{name: torch.cat([output[name] for output in outputs]) for name in outputs[0]})
    expected.backward()
    expected_grads, following = grads(model), torch.rand(3)

    model.zero_grad()
    torch.manual_seed(5)
    loss = cached_backward(model, chunks, total)
    assert_equal([loss, *grads(model)], [expected.detach(), *expected_grads])
    assert torch.equal(torch.rand(3), following)


def test_parameters_of_the_loss_receive_their_gradient():
    model, scale, (image, text) = Model(), nn.Parameter(torch.tensor(20.0).double()), inputs()

    def loss_fn(image_features, text_features, **_):
        return ASDMLoss()(image_features, text_features, torch.arange(B), logit_scale=scale)

    loss_fn(**model(image, text)).backward()
    expected, scale.grad = scale.grad, None
    cached_backward(model, list(zip(image.split(3), text.split(3), strict=True)), loss_fn)
    assert_equal([scale.grad], [expected])


def test_autocast_and_scaler():
    """The weights that autocast casts in the first pass must not stand in for those of the second."""
    torch.manual_seed(0)
    tower, x = nn.Linear(D, D), torch.randn(8, D)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with torch.autocast("cpu", torch.bfloat16):
        tower(x).float().square().sum().backward()
    expected = grads(tower)
    tower.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        cached_backward(tower, x.split(4), lambda y: y.float().square().sum(), scaler=scaler)
    assert_equal(grads(tower), [4 * g for g in expected], tolerance=0.02)


def test_frozen_tower():
    model, (image, text) = Model(), inputs()
    model.image.requires_grad_(False)
    cached_backward(model, list(zip(image.split(3), text.split(3), strict=True)), total)
    assert model.image.weight.grad is None and model.text.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("chunks", "loss_fn", "message"),
    [
        ([], torch.sum, "at least one piece"),
        ([torch.ones(2, D).double()], lambda y: y, "must return a scalar"),
        ([torch.ones(2, D).double()], lambda y: y.sum().detach(), "a loss with a gradient"),
    ],
)
def test_errors(chunks, loss_fn, message):
    with pytest.raises(ValueError, match=message):
        cached_backward(nn.Linear(D, D).double(), chunks, loss_fn)


def test_swapped_arguments():
    with explains(
        TypeError, "model and loss_fn must be callable", "a module Linear and list", "model, chunks, loss_fn"
    ):
        cached_backward(nn.Linear(D, D), torch.sum, [torch.ones(2, D)])


def test_outputs_that_are_no_tensors_or_differ():
    with pytest.raises(TypeError, match="output 1: int 3"):
        cached_backward(lambda x: (x, 3), [torch.ones(2)], lambda x, y: x.sum())
    with pytest.raises(ValueError, match="same outputs for every chunk"):
        cached_backward(lambda x: (x,) * len(x), [torch.ones(2), torch.ones(3)], lambda *x: x[0].sum())


def test_a_second_pass_with_other_random_numbers_raises():
    """Numbers from a generator of the model's own are not replayed; those of the default one are."""
    own, tower, x = torch.Generator().manual_seed(0), nn.Linear(4, 4), torch.randn(8, 4)
    for generator in (None, own):

        def model(x, generator=generator):
            drawn = torch.randn(x.shape, generator=generator)
            return x * drawn, tower(x) * (drawn > 0)

        def step(model=model):
            return cached_backward(model, x.split(4), lambda a, b: (a + b).square().sum())

        if generator is None:
            step()
        else:
            with pytest.raises(RuntimeError, match="chunk 0 other values of output 0"):
                step()
    lengths = iter([3, 3, 3, 2])
    with pytest.raises(RuntimeError, match=r"chunk 1 \{0: .*\[4, 3\].*, then \{0: .*\[4, 2\]"):
        cached_backward(lambda x: tower(x)[:, : next(lengths)], x.split(4), torch.sum)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_numbers_that_overflow_in_both_passes_alike_are_no_difference(value):
    tower, x = nn.Linear(4, 4), torch.randn(8, 4)
    x[1, 2] = value
    cached_backward(lambda x: (tower(x), x), x.split(4), lambda y, x: y[x.isfinite().all(dim=1)].sum())
    assert not tower.weight.grad.isfinite().all() or value == 1e30


def test_an_output_without_samples():
    """A scale: the loss sees it once, and its gradient is that of the whole batch."""
    tower, x = nn.Linear(4, 4).double(), torch.randn(7, 4, dtype=torch.float64)

    def model(x):
        return tower(x), tower.weight.mean().exp()

    def loss_fn(features, scale):
        return (scale * features).square().mean()

    loss_fn(*model(x)).backward()
    expected = grads(tower)
    tower.zero_grad()
    cached_backward(model, x.split(3), loss_fn)
    assert_equal(grads(tower), expected)
    with explains(ValueError, ("output 1", "shape []", "every chunk"), (), "loss_fn"):
        cached_backward(lambda x: (x, x.mean()), x.split(3), lambda x, mean: mean)


def test_chunks_padded_to_lengths_of_their_own():
    """Tokens and mask of the longest chunk; what is appended is masked and has no gradient."""
    model, (image, text) = Model(), inputs()
    lengths = [4, 2, 3]
    chunks = [
        {"image": i, "text": t[:, :length]} for i, t, length in zip(image.split(3), text.split(3), lengths, strict=True)
    ]
    mask = torch.cat(
        [(torch.arange(L) < length).expand(len(c["text"]), L) for c, length in zip(chunks, lengths, strict=True)]
    )

    def whole(text_mask, text_features, **outputs):
        return total(text_features=outputs["text_tokens"].sum(1), text_mask=text_mask, **outputs)

    outputs = model(image, text)
    kept = outputs["text_mask"] & mask
    tokens = outputs["text_tokens"] * mask[..., None]
    expected = whole(**outputs | {"text_mask": kept, "text_tokens": tokens})
    expected.backward()
    expected_grads = grads(model)
    model.zero_grad()
    loss = cached_backward(model, chunks, whole)
    assert_equal([loss, *grads(model)], [expected.detach(), *expected_grads])


def cached_under_ddp() -> tuple[float, int]:
    """Error of the gradients against one process, and the number of times that they travelled."""
    model, (image, text) = Model(), inputs()
    expected = total(**model(image, text))
    expected.backward()
    expected_grads = grads(model)
    model.zero_grad()

    ddp = DistributedDataParallel(model)
    travels = []

    def count(state, bucket):
        travels.append(1)
        tensor = bucket.buffer() / dist.get_world_size()
        return dist.all_reduce(tensor, async_op=True).get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, count)
    part = slice(0, 4) if dist.get_rank() == 0 else slice(4, B)
    pids = (torch.arange(B) // 2)[part]

    def loss_fn(image_features, text_features, image_tokens, text_tokens, text_mask):
        efa = EFALoss(gather=True)(image_tokens, text_tokens, text_mask=text_mask)
        return efa + ASDMLoss(gather="ring")(image_features, text_features, pids)

    loss = cached_backward(ddp, list(zip(image[part].split(2), text[part].split(2), strict=True)), loss_fn)
    dist.all_reduce(loss)
    pairs = zip([loss / dist.get_world_size(), *grads(model)], [expected.detach(), *expected_grads], strict=True)
    return max((a - b).abs().max().item() for a, b in pairs), len(travels)


def test_under_ddp_with_gathering():
    for result in processes.run(2, cached_under_ddp):
        assert isinstance(result, tuple), result
        error, travels = result
        assert error <= 1e-9
        assert travels == 1
