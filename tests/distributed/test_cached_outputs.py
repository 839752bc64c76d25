"""cached_backward: outputs of every kind, and ways to call it, against a graph over the whole batch."""

import pytest
import torch
from helpers.errors import explains
from torch import Tensor, nn

from fmfa_losses.cached import cached_backward

B, D = 8, 4
X = torch.randn(B, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(D, D).double()
        self.scale = nn.Parameter(torch.tensor(0.5).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def assert_whole_batch(model, loss_fn, tower, chunks, whole=(X,)) -> None:
    """Loss and gradients in chunks are those of one graph."""
    expected = loss_fn(*named(model(*whole)))
    expected.backward()
    gradients = {name: p.grad for name, p in tower.named_parameters()}
    tower.zero_grad()
    loss = cached_backward(model, chunks, loss_fn)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close({name: p.grad for name, p in tower.named_parameters()}, gradients)


def named(output) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Every sample with every other one, so that chunks by themselves give another gradient."""
    return (a @ b.T).logsumexp(1).mean()


CHUNKS = {
    "one": [X],
    "halves": X.split(4),
    "a sample each": X.split(1),
    "a generator": None,
    "an empty one": [X[:3], X[3:3], X[3:]],
}


@pytest.mark.parametrize("kind", CHUNKS)
@pytest.mark.parametrize(
    "model",
    [
        lambda tower, x: (tower(x), tower(x) * 2),
        lambda tower, x: (tower(x),) * 2,
        lambda tower, x: (y := tower(x), y[:, :2] @ y[:, :2].new_ones(2, D)),
        lambda tower, x: (y := tower(x), y.view_as(y)),
        lambda tower, x: (tower(x), x),
        lambda tower, x: (tower(x), x[:, :]),
        lambda tower, x: (tower(x), tower(x).detach()),
        lambda tower, x: torch.stack([tower(x), x], 1).unbind(1),
    ],
    ids=["two", "one twice", "of a part", "view", "input", "view of the input", "no gradient", "views of one"],
)
def test_two_outputs(model, kind):
    tower = Tower()
    chunks = (x for x in X.split(3)) if kind == "a generator" else CHUNKS[kind]
    assert_whole_batch(lambda x: model(tower, x), similarity, tower, chunks)


def test_an_output_in_a_buffer_that_the_next_chunk_overwrites():
    tower, buffer = Tower(), torch.empty(B, D, dtype=torch.float64)

    def model(x):
        y = tower(x)
        return y, buffer[: len(x)].copy_(y.detach())

    assert_whole_batch(model, lambda y, copy: similarity(y, copy.clone()), tower, X.split(4))


def test_complex_outputs():
    tower = Tower()

    def loss_fn(y):
        return torch.fft.fft(y, dim=0).abs().sum()

    assert_whole_batch(lambda x: torch.fft.fft(tower(x)), loss_fn, tower, X.split(3))
    assert tower.linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("learned", [True, False])
def test_a_scale_in_one_chunk_and_in_many(learned):
    tower = Tower()
    tower.scale.requires_grad_(learned)

    def loss_fn(y, scale, step):
        return similarity(scale.exp() * y, y) * step

    for chunks in (X.split(8), X.split(3)):
        assert_whole_batch(lambda x: (tower(x), tower.scale, torch.tensor(3)), loss_fn, tower, chunks)
        assert (tower.scale.grad is not None) == learned
        tower.zero_grad()


def test_a_scale_that_is_nan_is_the_same_for_every_chunk():
    tower = Tower()
    nn.init.constant_(tower.scale, float("nan"))
    assert cached_backward(lambda x: (tower(x), tower.scale), X.split(3), lambda y, s: (y * s).sum()).isnan()


def test_a_scale_that_hardly_depends_on_the_chunk():
    tower = Tower()
    with pytest.raises(ValueError, match=r"output 1 without samples, shape \[\], must be the same for every chunk"):
        cached_backward(lambda x: (tower(x), tower.scale + 1e-15 * x.sum()), X.split(3), lambda y, s: (y * s).sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool], ids=str)
def test_two_dimensions_padded_to_lengths_of_their_own(dtype):
    """[b, N, L] with another N and L in every chunk: zeros or False come behind, without a gradient."""
    tower, sizes = Tower(), [(2, 4), (3, 1), (1, 2)]
    chunks = list(zip(X.split(3), sizes, strict=True))

    def model(x, size):
        grid = tower(x)[:, : size[0], None] * torch.ones(size, dtype=torch.float64)
        return tower(x), grid if dtype == torch.float64 else (grid > 0).to(dtype)

    def pad(grid):
        whole = grid.new_zeros(len(grid), 3, 4)
        whole[:, : grid.shape[1], : grid.shape[2]] = grid
        return whole

    def loss_fn(y, grid):
        assert grid.dtype == dtype and grid.shape == (B, 3, 4)
        return similarity(y, y) * grid.cos().sum()

    outputs = [model(*chunk) for chunk in chunks]
    loss_fn(torch.cat([y for y, _ in outputs]), torch.cat([pad(grid) for _, grid in outputs])).backward()
    expected, tower.linear.weight.grad = tower.linear.weight.grad, None
    cached_backward(model, chunks, loss_fn)
    torch.testing.assert_close(tower.linear.weight.grad, expected)


def test_a_loss_that_changes_a_mask_and_ignores_an_output():
    tower = Tower()

    def model(x):
        return {"y": tower(x), "mask": x[:, 0] > 0, "ignored": tower(x).exp()}

    def loss_fn(y, mask, ignored):
        mask &= y[:, 1] > 0
        return (similarity(y, y) * mask).sum()

    loss_fn(**model(X)).backward()
    expected, tower.linear.weight.grad = tower.linear.weight.grad, None
    cached_backward(model, X.split(3), loss_fn)
    torch.testing.assert_close(tower.linear.weight.grad, expected)


def test_calls_add_up():
    """Gradient accumulation: each call has a batch of its own."""
    tower = Tower()
    (similarity(tower(X), tower(X)) + similarity(tower(2 * X), tower(X))).backward()
    expected, tower.linear.weight.grad = tower.linear.weight.grad, None
    for factor in (1, 2):
        cached_backward(lambda x, factor=factor: (tower(factor * x), tower(x)), X.split(3), similarity)
    torch.testing.assert_close(tower.linear.weight.grad, expected)


def test_parameters_from_outside():
    """torch.func.functional_call with parameters of which one is frozen."""
    tower = Tower()
    given = {name: p.detach().clone().requires_grad_(name != "linear.bias") for name, p in tower.named_parameters()}

    def model(x):
        return torch.func.functional_call(tower, given, (x,))

    (expected,) = torch.autograd.grad(similarity(model(X), model(X).detach()), [given["linear.weight"]])
    cached_backward(lambda x: (y := model(x), y.detach()), X.split(3), similarity)
    torch.testing.assert_close(given["linear.weight"].grad, expected)
    assert given["linear.bias"].grad is None
    assert all(p.grad is None for p in tower.parameters())


def test_nothing_to_learn_in_some_chunks():
    """Outputs without a graph in one chunk, as of a model that skips captions without words."""
    tower = Tower()

    def model(x, learns):
        return tower(x) if learns else tower(x).detach()

    loss_fn = torch.logsumexp
    outputs = torch.cat([model(x, learns) for x, learns in zip(X.split(4), (True, False), strict=True)])
    loss_fn(outputs.flatten(), 0).backward()
    expected, tower.linear.weight.grad = tower.linear.weight.grad, None
    chunks = list(zip(X.split(4), (True, False), strict=True))
    cached_backward(model, chunks, lambda y: loss_fn(y.flatten(), 0))
    torch.testing.assert_close(tower.linear.weight.grad, expected)


def test_called_without_gradients():
    tower = Tower()
    with torch.no_grad():
        cached_backward(tower, X.split(3), lambda y: similarity(y, y))
    assert tower.linear.weight.grad.abs().max() > 0


def test_what_leaves_autocast_in_the_forward_leaves_it_in_the_backward():
    """The graph is walked outside of autocast, as after a training step's forward; the same gradients, bit by bit."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 64), torch.randn(32, 64)

    def model(x):
        with torch.autocast("cpu", enabled=False):
            y = linear(x).tanh()
        return linear(y).float()  # and here in bfloat16

    def loss_fn(y):
        with torch.autocast("cpu", enabled=False):
            return (y @ y.T).square().mean()

    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(model(x))
    loss.backward()
    expected, linear.weight.grad = linear.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        cached_backward(model, [x], loss_fn)
        assert torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(linear.weight.grad, expected, rtol=0, atol=0)
    linear.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        cached_backward(model, x.split(8), loss_fn)
    assert (linear.weight.grad - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_a_loss_without_gradient_says_so():
    tower = Tower()
    for loss_fn in (lambda y: y.detach().mean(), lambda y: torch.tensor(1.0)):
        with explains(ValueError, "a loss with a gradient", "without one", "without detach()"):
            cached_backward(tower, X.split(3), loss_fn)
    with torch.inference_mode(), explains(ValueError, "a loss with a gradient", "without one", "inference_mode()"):
        cached_backward(tower, X.split(3), lambda y: similarity(y, y))


def test_chunks_that_share_a_graph_say_so():
    tower, before = Tower(), Tower()
    chunks = before(X).split(3)
    with explains(RuntimeError, "share a graph", "chunk 1", "detach()"):
        cached_backward(tower, chunks, lambda y: similarity(y, y))
    tower.zero_grad()
    separate = [before(x) for x in X.split(3)]  # each has its own
    assert_whole_batch(tower, lambda y: similarity(y, y), tower, separate, (before(X).detach(),))
    assert before.linear.weight.grad is not None
