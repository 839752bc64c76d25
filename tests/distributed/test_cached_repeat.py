"""cached_backward: a second pass that does not repeat the first raises, and generators that are named are replayed."""

import random

import numpy as np
import pytest
import torch
from helpers.errors import explains
from torch import Tensor, nn

from fmfa_losses.cached import cached_backward
from fmfa_losses.distributed.random_states import RandomStates

B, D = 8, 4
X = torch.randn(B, D, generator=torch.Generator().manual_seed(3))


def tower(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(D, D).to(dtype)


def squares(y: Tensor) -> Tensor:
    return y.square().sum()


def raises(chunk: int, output: object = 0):
    """What the error says: which chunk and output, what became of the gradients, and the remedies."""
    return explains(
        RuntimeError,
        ("model", "same", "both passes"),
        (f"chunk {chunk} ", f"output {output!r}", "gradients that were added"),
        ("generators=", "Inputs", "tolerance="),
    )


# --- random numbers ---------------------------------------------------------------------------------------------------

TORCH, NUMPY, STATE, PYTHON = torch.Generator(), np.random.default_rng(1), np.random.RandomState(1), random.Random(1)
# Some draw normal numbers, of which libraries make two and keep one for the next call.
DRAWS = {
    "torch.Generator": (TORCH, lambda: torch.rand(3, D, generator=TORCH)),
    "numpy.random.Generator": (NUMPY, lambda: torch.from_numpy(NUMPY.random((3, D), dtype=np.float32))),
    "numpy.random.RandomState": (STATE, lambda: torch.from_numpy(STATE.randn(3, D)).float()),
    "numpy.random": (np.random, lambda: torch.from_numpy(np.random.normal(size=(3, D))).float()),  # noqa: NPY002
    "random.Random": (PYTHON, lambda: torch.tensor([[PYTHON.gauss(0, 1)] * D for _ in range(3)])),
    "random": (random, lambda: torch.tensor([[random.gauss(0, 1)] * D for _ in range(3)])),
}


@pytest.mark.parametrize("name", DRAWS)
def test_numbers_of_a_generator_that_is_not_named(name):
    linear, (_, draw) = tower(), DRAWS[name]
    others = [generator for other, (generator, _) in DRAWS.items() if other != name]
    with raises(chunk=0):
        cached_backward(lambda x: linear(x) * draw(), X[:6].split(3), squares, generators=others)


@pytest.mark.parametrize("name", DRAWS)
def test_numbers_of_a_generator_that_is_named(name):
    """The whole batch with the numbers that the chunks drew; and the next number is that after one pass."""
    linear, (generator, draw) = tower(), DRAWS[name]
    draw()
    start = RandomStates([generator])
    states = start.save()
    drawn, in_the_loss, following = torch.cat([draw(), draw()]), draw(), draw()
    assert not torch.equal(drawn[:3], drawn[3:])
    expected = (squares(linear(X[:6]) * drawn) * in_the_loss.mean()).detach()
    (gradient,) = torch.autograd.grad(squares(linear(X[:6]) * drawn) * in_the_loss.mean(), [linear.weight])

    start.restore(states)
    generators = [one for one, _ in DRAWS.values()]
    loss = cached_backward(
        lambda x: linear(x) * draw(), X[:6].split(3), lambda y: squares(y) * draw().mean(), generators=generators
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(linear.weight.grad, gradient)
    assert torch.equal(draw(), following)


def test_one_generator_of_many_draws_in_one_chunk_alone():
    linear, calls = tower(), []

    def model(x):
        calls.append(1)
        return linear(x) * (random.random() if len(calls) in (3, 7) else 1.0)

    with raises(chunk=2):
        cached_backward(model, X.split(2), squares)
    calls.clear()
    cached_backward(model, X.split(2), squares, generators=[random])


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("fails_in", [0, 1])
def test_an_error_in_the_second_pass_leaves_the_states_of_one_pass(fails_in):
    """Also of generators that are named; the chunks before it have added their part of the gradient."""
    linear, calls = tower(), []

    def model(x):
        calls.append(1)
        drawn = torch.rand(len(x), D), torch.from_numpy(NUMPY.random((len(x), D)))
        if len(calls) == 3 + fails_in:
            raise BrokenError
        return linear(x) * drawn[0] * drawn[1]

    def loss_fn(y):
        return squares(y) * torch.rand(()) * PYTHON.random()

    def following():
        return torch.rand(4), NUMPY.random(4).tolist(), PYTHON.random()

    states = RandomStates([NUMPY, PYTHON])
    start = states.save()
    loss_fn(torch.cat([model(x) for x in X.split(4)]))
    expected = following()
    calls.clear()
    states.restore(start)
    with pytest.raises(BrokenError):
        cached_backward(model, X.split(4), loss_fn, generators=(NUMPY, PYTHON))
    assert str(following()) == str(expected)
    assert (linear.weight.grad is not None) == bool(fails_in)


@pytest.mark.parametrize(
    ("generators", "got", "remedy"),
    [
        (torch.Generator(), "Generator", "(generator,)"),
        (random, "random", "(generator,)"),
        ([42], "int 42", "drawn from"),
        ([None], "None", "drawn from"),
        ([random.SystemRandom()], "SystemRandom", "drawn from"),
        ([np.random.RandomState], "RandomState", "drawn from"),
        ([torch.random], "torch.random", "drawn from"),
    ],
)
def test_what_is_no_generator(generators, got, remedy):
    linear = tower()
    with explains(TypeError, "generators must be", got, remedy):
        cached_backward(linear, X.split(4), squares, generators=generators)
    assert linear.weight.grad is None


# --- what the model or its inputs remember ----------------------------------------------------------------------------


def test_an_input_changed_in_place():
    linear, x = tower(), X.clone()
    with raises(chunk=0):
        cached_backward(lambda x: linear(x.mul_(2)), x.split(4), squares)
    with raises(chunk=0, output=1):  # an output that is the input changes with it, in either pass
        cached_backward(lambda x: (linear(X[:4]), x.mul_(2)), x.split(4), lambda y, _: squares(y))
    cached_backward(lambda x: linear(x.relu_()), X.clone().split(4), squares)  # the second time it changes nothing


class Counter(nn.Module):
    """What a model remembers from call to call: its output is another one when `odd` says so."""

    def __init__(self, odd) -> None:
        super().__init__()
        self.linear, self.odd, self.calls = tower(), odd, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.linear(x)
        return y + 1 if self.odd(self.calls - 1) else y


@pytest.mark.parametrize("chunk", range(4))
def test_a_counter_in_the_model(chunk):
    with raises(chunk):
        cached_backward(Counter(lambda calls: calls == 4 + chunk), X.split(2), squares)
    with raises(chunk):
        cached_backward(Counter(lambda calls: calls == chunk), X.split(2), squares)


class RunningMean(nn.Module):
    """Subtracts the mean of all that it has seen, as normalisation by running statistics does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = tower()
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.mean.lerp_(y.detach().mean(0), 0.01)
        return y - self.mean


def test_statistics_that_the_output_depends_on():
    with raises(chunk=0):
        cached_backward(RunningMean(), X.split(4), squares)


def test_batch_normalisation_in_training_mode_repeats_itself():
    """It normalises with the statistics of a chunk, which do not change; its running averages change twice."""
    linear, norm = tower().double(), nn.BatchNorm1d(D).double()
    x = X.double()
    squares(torch.cat([norm(linear(part)).tanh() for part in x.split(4)])).backward()
    expected, linear.weight.grad = linear.weight.grad, None
    norm.reset_running_stats()
    cached_backward(lambda x: norm(linear(x)).tanh(), x.split(4), squares)
    torch.testing.assert_close(linear.weight.grad, expected)
    assert norm.num_batches_tracked == 4


def test_a_power_iteration_in_every_call():
    with raises(chunk=0):
        normed = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64))
        cached_backward(normed, torch.ones(8, 64).split(4), squares)


def test_an_output_that_changes_its_kind_or_its_name():
    linear = tower()
    calls = iter(range(8))
    with pytest.raises(RuntimeError, match=r"chunk 1 .*float32 \[4, 4\].*then .*int64 \[4, 4\]"):
        cached_backward(lambda x: linear(x).to((torch.float32, torch.int64)[next(calls) == 3]), X.split(4), squares)
    calls = iter(range(8))
    with pytest.raises(RuntimeError, match=r"chunk 0 .*'a'.*then .*'b'"):
        cached_backward(lambda x: {"ab"[next(calls) > 1]: linear(x)}, X.split(4), lambda a: squares(a))


# --- how much is a difference -----------------------------------------------------------------------------------------


def changed_in_the_second_pass(change, dtype=torch.float32, shape=(B, D), parameters=True):
    """One step of a model whose last chunk's output is another one in the second pass."""
    linear, calls = tower(dtype), []
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)

    def model(x):
        calls.append(1)
        y = x if x.ndim == 1 else linear(x)
        return torch.cat([change(y[:1].clone()), y[1:]]) if len(calls) == 4 else y

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return model(x)

    return cached_backward(Model() if parameters else model, x.split(B // 2), lambda y: y.float().square().sum())


@pytest.mark.parametrize("shape", [(B, D), (B, 3, D), (B,)])
@pytest.mark.parametrize(
    ("dtype", "seen", "rounding"),
    [
        (torch.float64, 1e-12, 1e-15),
        (torch.float32, 5e-5, 1e-6),
        (torch.float16, 1e-2, 1e-3),
        (torch.bfloat16, 6e-2, 8e-3),
    ],
    ids=str,
)
def test_one_sample_differs_by_more_than_rounding(shape, dtype, seen, rounding):
    large = 1000 if len(shape) == 1 else 1  # where a sample is one number, the largest of a chunk is what counts
    with raises(chunk=1):
        changed_in_the_second_pass(lambda y: y + large * seen * y.abs().max(), dtype, shape)
    changed_in_the_second_pass(lambda y: y + rounding * y.abs().max() / large, dtype, shape)


def test_one_token_of_one_sample():
    def change(y):
        return y + torch.tensor([0, 0, 1e-4])[:, None] * y.abs().max()

    with raises(chunk=1):
        changed_in_the_second_pass(change, shape=(B, 3, D))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_overflows_in_one_pass(value):
    def change(y, value=value):
        y[0, 1] = value
        return y

    for dtype in (torch.float32, torch.float16):
        with raises(chunk=1):
            changed_in_the_second_pass(change, dtype)
    signs = iter([value, value, value, 1.0 if value != value else -value])
    linear = tower()
    with raises(chunk=1, output=1):
        cached_backward(lambda x: (linear(x), x + next(signs)), X.split(4), lambda y, _: squares(y))


def test_integers_and_flags_must_be_equal():
    linear, calls = tower(), []

    def model(x):
        calls.append(1)
        ids = torch.arange(len(x)) + 2**40
        ids[-1] += len(calls) == 3
        return linear(x), ids

    with raises(chunk=0, output=1):
        cached_backward(model, X.split(4), lambda y, _: squares(y))


def fast_path(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A model that PyTorch computes with other kernels where there is no graph."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    return encoder.eval().to(dtype), torch.randn(4, 5, 32).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_kernels_without_a_graph_round_otherwise(dtype):
    encoder, x = fast_path(dtype)
    cached_backward(encoder, x.split(2), squares)
    with raises(chunk=0):
        cached_backward(encoder, x.split(2), squares, tolerance=0)


def test_other_kernels_under_autocast():
    encoder, x = fast_path(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cached_backward(encoder, x.split(2), squares)


def test_half_precision_inside_of_a_model_with_float32_outputs():
    """Its parameters tell; of a function that hides them, `tolerance` does."""
    encoder, x = fast_path(torch.bfloat16)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            return self.encoder(x.bfloat16()).float()

    model = Model()
    cached_backward(model, x.float().split(2), squares)
    with raises(chunk=0):
        cached_backward(lambda x: model(x), x.float().split(2), squares)
    cached_backward(lambda x: model(x), x.float().split(2), squares, tolerance=2**-5)


def test_tolerance():
    changed_in_the_second_pass(lambda y: y)
    linear = tower()
    with explains(ValueError, "tolerance must be a finite number >= 0", "-1"):
        cached_backward(linear, X.split(4), squares, tolerance=-1)
    assert linear.weight.grad is None
    noise = torch.Generator().manual_seed(0)
    cached_backward(
        lambda x: linear(x) + 1e-3 * torch.randn(x.shape, generator=noise), X.split(4), squares, tolerance=1
    )
