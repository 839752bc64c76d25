"""Whole steps on a CUDA device: EFA in one operator, the ranking, captured graphs, matches in one loop over tiles."""

import pytest
import torch
from helpers.compare import value_and_grads
from helpers.gpu import (
    DTYPES,
    assert_function_within_budget,
    captured_step,
    clear_tokens,
    directions,
    matmul_precision,
    needs_cuda,
)

from benchmarks.budget import allowed_error, relative_error
from benchmarks.gpu.exact import poisoned
from benchmarks.providers import plain_asdm
from fmfa_losses import ASDMLoss, EFALoss
from fmfa_losses.functional import asdm_loss, efa_loss, hard_similarity
from fmfa_losses.ops.aggregation import sparse_aggregate_reference
from fmfa_losses.ops.alignment import alignment_similarities
from fmfa_losses.ops.hard_similarity import hard_similarity_reference
from fmfa_losses.ops.ranking import ranking, ranking_reference

pytestmark = needs_cuda

PAPER_LIKE, SMALL = (4, 192, 77, 512), (5, 65, 29, 64)  # B, N, L, D
# Every combination would spend its time in the compiler.
STEPS = [(SMALL, precision) for precision in DTYPES] + [(PAPER_LIKE, precision) for precision in ("bf16", "fp32")]
# What of SMALL it is where 16-bit tokens behind masks fail: its patches, its width, or neither.
STEPS += [(shape, "bf16") for shape in ((5, 192, 29, 64), (5, 65, 29, 512), (5, 96, 29, 64), (4, 192, 77, 64))]


def pairs(B, N, L, D, masked):
    """Image and text tokens with clear winners, also among the joint embeddings, and masks.

    Joint embeddings of two tokens that point along one direction are nearly equal. So each text has one token along
    each direction, and what else it has is masked out; half of the directions are in the lower half of the tokens.
    """
    M = L // 2 if masked else L
    shared = directions(M, D)
    image, text = clear_tokens(B, N, D, directions=shared, seed=1), clear_tokens(B, L, D, directions=shared, seed=2)
    if not masked:
        return image.cuda(), text.cuda(), None, None
    generator = torch.Generator().manual_seed(3)
    first = torch.rand(B, M, generator=generator) < 0.5
    text_mask = torch.cat([first, ~first, torch.zeros(B, L - 2 * M, dtype=torch.bool)], dim=1)
    image_mask = (torch.rand(B, N, generator=generator) < 0.6) | (torch.arange(N) < M)
    return image.cuda(), text.cuda(), image_mask.cuda(), text_mask.cuda()


def one_operator(image_mask, text_mask, pool_scale):
    def similarities(image, text):
        arguments = (image, text, image_mask, text_mask)
        return torch.stack(
            alignment_similarities(*arguments, sparsity=0.5, pool="lse", pool_scale=pool_scale, backend="triton")
        )

    return similarities


def references(image_mask, text_mask, pool_scale):
    def similarities(image, text):
        joint = sparse_aggregate_reference(image, text, image_mask=image_mask, sparsity=0.5)
        return torch.stack([
            hard_similarity_reference(x, joint, x_mask=mask, e_mask=text_mask, pool_scale=pool_scale)
            for x, mask in ((text, text_mask), (image, image_mask))
        ])  # fmt: skip

    return similarities


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "precision"), STEPS)
def test_similarities_of_efa_in_one_operator(shape, precision, masked):
    """What the masks leave out holds NaN where the kernels read it, and gets no gradient."""
    image, text, *masks = pairs(*shape, masked)
    held = [image.clone(), text.clone()]
    for tokens, mask in zip(held, masks, strict=True):
        if mask is not None:
            tokens[~mask] = float("nan")
    for pool_scale in (1.0, 4.0):
        ours, plain = one_operator(*masks, pool_scale), references(*masks, pool_scale)
        options = {"amplification": 8 * pool_scale, "held": held}
        assert_function_within_budget(ours, plain, [image, text], precision, **options)
    if masked:
        with matmul_precision(precision):
            _, *gradients = value_and_grads(one_operator(*masks, 1.0), [t.to(DTYPES[precision]) for t in held])
        for gradient, mask in zip(gradients, masks, strict=True):
            assert not gradient[~mask].any()


def test_three_products_of_tf32_match_like_ieee():
    """The value of hard similarity by "high" has the budget of IEEE; "medium" does not, and that is seen here."""
    image, text, *_ = pairs(*PAPER_LIKE, False)
    exact = hard_similarity_reference(image.double(), text.double(), pool_scale=50.0)
    plain_error = relative_error(hard_similarity_reference(image, text, pool_scale=50.0), exact)
    errors = {}
    for precision in ("fp32", "tf32x3", "tf32"):
        with matmul_precision(precision), torch.no_grad():
            errors[precision] = relative_error(hard_similarity(image, text, pool_scale=50.0, backend="triton"), exact)
    budget = allowed_error(plain_error, "fp32", amplification=8)
    assert max(errors["fp32"], errors["tf32x3"]) <= budget < errors["tf32"], errors


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
def test_the_same_bits_on_memory_full_of_nan(precision, masked):
    image, text, image_mask, text_mask = pairs(*SMALL, masked)
    inputs = [t.to(DTYPES[precision]) for t in (image, text)]
    loss = lambda v, t: efa_loss(v, t, image_mask=image_mask, text_mask=text_mask, backend="triton")  # noqa: E731
    with matmul_precision(precision):
        clean = value_and_grads(loss, inputs)
        with poisoned():
            runs = [value_and_grads(loss, inputs) for _ in range(2)]
    assert all(torch.isfinite(t).all() for t in clean)
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run, clean, strict=True))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("identities", [False, True])
@pytest.mark.parametrize("B", [1, 2, 77, 193, 1000])
def test_ranking(B, identities, learned):
    generator = torch.Generator().manual_seed(0)
    sims = [torch.randn(B, B, generator=generator).cuda() for _ in range(2)]
    pids = torch.arange(B, device="cuda") // 2 if identities else None
    inputs = [*sims, torch.tensor(7.0, device="cuda")] if learned else sims

    def of(function, **backend):
        def run(text, image, scale=7.0):
            return function(text, image, pids, margin=0.3, logit_scale=scale, **backend)

        return run

    ours = of(ranking, backend="triton")
    # Differences of up to 10, times 7, are rounded before exp.
    assert_function_within_budget(ours, of(ranking_reference), inputs, "fp32", amplification=70)
    assert all(
        torch.equal(a, b) for a, b in zip(value_and_grads(ours, inputs), value_and_grads(ours, inputs), strict=True)
    )


def test_ranking_of_what_is_no_number():
    """As `masked_fill(excluded, lowest).logsumexp()` of PyTorch has it; in a later tile, too."""
    B = 131
    for entry in (float("inf"), -float("inf"), float("nan"), 3e38):
        text, image = (torch.randn(B, B, device="cuda") for _ in range(2))
        text[2, B - 1] = entry
        ours = value_and_grads(lambda t, i: ranking(t, i, logit_scale=2.0, backend="triton"), [text, image])
        plain = value_and_grads(lambda t, i: ranking_reference(t, i, logit_scale=2.0), [text, image])
        for got, expected in zip(ours, plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def replays(step, change, runs=2):
    """A captured step gives what the step gives, to the bit, each time that its inputs have changed."""
    graph, results = captured_step(step)
    previous = None
    for number in range(runs):
        with torch.no_grad():
            change(number)
        graph.replay()
        expected = step()
        assert all(torch.isfinite(t).all() for t in expected)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), f"replay {number}"
        assert previous is None or not torch.equal(previous, expected[0])  # the change made a difference
        previous = expected[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32", "tf32x3"])
def test_a_captured_step_of_efa_replays(precision, masked):
    """With other tokens, masks and scale than those of the capture."""
    B, N, L, D = 16, 65, 33, 64
    image, text = (torch.randn(B, T, D, device="cuda").to(DTYPES[precision]).requires_grad_() for T in (N, L))
    text_mask = torch.arange(L, device="cuda") < torch.arange(5, 5 + B, device="cuda")[:, None] if masked else None
    scale, loss = torch.tensor(20.0, device="cuda", requires_grad=True), EFALoss(backend="triton")
    leaves = image, text, scale

    def step():
        value = loss(image, text, text_mask=text_mask, logit_scale=scale)
        # Without its graph: one that lives on binds the leaves to the stream that it was made on.
        return value.detach(), *torch.autograd.grad(value, leaves)

    def change(number):
        image.normal_()
        text.normal_()
        scale.fill_(11.0 + 30 * number)
        if masked:
            text_mask.copy_(torch.rand(B, L, device="cuda") < 0.2 + 0.6 * number)

    with matmul_precision(precision):
        replays(step, change)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "tf32"])
@pytest.mark.parametrize("B", [64, 512])
def test_a_captured_step_of_asdm_replays(B, precision):
    """One launch for the gradient, and [B, B] kept; the scale is on the device, learnable."""
    image, text = (torch.randn(B, 64, device="cuda").to(DTYPES[precision]).requires_grad_() for _ in range(2))
    scale, loss = torch.tensor(50.0, device="cuda", requires_grad=True), ASDMLoss(backend="triton")
    pids = torch.arange(B, device="cuda") // 2
    leaves = image, text, scale

    def step():
        value = loss(image, text, pids, logit_scale=scale)
        return value.detach(), *torch.autograd.grad(value, leaves)

    def change(number):
        image.normal_()
        text.normal_().add_(image, alpha=0.15)
        scale.fill_(20.0 + 15 * number)
        pids.copy_(torch.randint(B // 2 + number, (B,), device="cuda"))

    torch.manual_seed(0)
    with matmul_precision(precision):
        replays(step, change, runs=3)
        # And what it replays is right. The scale makes 50 roundings of one, and alpha's weight follows the hardest
        # negative, which a rounding may exchange: plain PyTorch in that precision says how far both bring it.
        plain = lambda v, t, s: asdm_loss(v, t, pids, logit_scale=s, backend="torch")  # noqa: E731
        one = torch.ones((), device="cuda")
        exact = value_and_grads(plain, [t.double() for t in leaves], one)
        theirs = value_and_grads(lambda v, t, s: plain_asdm(v, t, pids, scale=s), [t.detach() for t in leaves], one)
        for got, other, truth in zip(step(), theirs, exact, strict=True):
            error, budget = relative_error(got, truth), allowed_error(relative_error(other, truth), precision, 200.0)
            assert error <= budget, (error, budget)


@pytest.mark.parametrize("B", [64, 512])
def test_asdm_on_two_streams_at_once(B):
    """The counter by which the last program adds up the losses belongs to one call alone."""
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(B, 64, generator=generator).cuda() for _ in range(2)] for _ in range(2)]
    pids = torch.arange(B, device="cuda") // 2
    run = lambda v, t: asdm_loss(v, t, pids, backend="triton")  # noqa: E731
    expected = [value_and_grads(run, batch) for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        for stream, batch, right in zip(streams, batches, expected, strict=True):
            with torch.cuda.stream(stream):
                found.append((value_and_grads(run, batch), right))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for got, right in found for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 16), (7, 5, 193, 77, 96), (16, 16, 192, 77, 512), (40, 40, 77, 29, 64)])
def test_one_loop_over_all_tiles_matches_alike(monkeypatch, shape, dtype, save):
    """To the bit, NaN included: as many tiles as there are multiprocessors, fewer, and more."""
    from fmfa_losses.kernels import match, persistent_match
    from fmfa_losses.kernels._matches import sections_of

    Bx, Be, P, Q, D = shape
    x, e = (
        torch.nn.functional.normalize(torch.randn(B, T, D, device="cuda"), dim=-1).to(dtype)
        for B, T in ((Bx, P), (Be, Q))
    )
    x[0, 0, 0] = float("nan")
    nothing, launched = sections_of(None, 1, 1), []
    expected = match.match(x, e, nothing, nothing, save, True)
    launch = persistent_match.launch
    monkeypatch.setattr(persistent_match, "launch", lambda *args, **kw: launched.append(0) or launch(*args, **kw))
    monkeypatch.setattr(match, "PERSISTENT", True)
    got = match.match(x, e, nothing, nothing, save, True)
    assert len(launched) == 1
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("power", [-100, -40, -14, 14, 40, 100])
def test_float16_sums_gradients_of_any_size(power):
    """de in float32 of a gradient times a power of two is de times that power, to the bit."""
    from fmfa_losses.kernels import hard_similarity as kernels
    from fmfa_losses.kernels import winner_gradient

    x, e, *_ = pairs(*SMALL, False)
    x, e = (torch.nn.functional.normalize(t, dim=-1).half() for t in (x, e))
    _, matches = kernels.forward(x, e, None, None, "lse", 4.0, True)

    def de(factor):
        dsim = torch.linspace(-1, 2, len(x) * len(e), device="cuda").view(len(x), len(e)) * factor
        out = torch.full(e.shape, float("nan"), device="cuda")
        winner_gradient.de(dsim, matches, x, None, None, e.shape[1], out, False)
        return out

    assert de(1.0).any()
    assert torch.equal(de(2.0**power), de(1.0) * 2.0**power)


@pytest.mark.parametrize("factor", [2.0**-12, 1.0, 2.0**14])
def test_float16_gradients_end_where_its_numbers_end(factor):
    """A loss scale; what is too small for float16 comes as near as its smallest numbers."""
    image, text, *_ = (t if t is None else t.half() for t in pairs(*SMALL, False))
    B = len(image)
    cotangent = factor * torch.linspace(-1, 2, 2 * B * B, dtype=torch.float64, device="cuda").view(2, B, B)
    exact = value_and_grads(references(None, None, 1.0), [image.double(), text.double()], cotangent)
    got = value_and_grads(one_operator(None, None, 1.0), [image, text], cotangent)
    for a, b in zip(got[1:], exact[1:], strict=True):
        assert torch.isfinite(a).all()
        lost = 2.0**-25 * a.numel() ** 0.5  # half of the smallest number, in every entry
        assert torch.linalg.vector_norm(a.double() - b) <= 2.0**-8 * torch.linalg.vector_norm(b) + lost
