"""The public losses on the kernels: what the torch path says, through the same operators."""

import pytest
import torch
from helpers.compare import relative_error, value_and_grads

from fmfa_losses.functional import asdm_loss, efa_loss, hard_similarity, itc_loss, length_mask, sparse_aggregate
from fmfa_losses.ops.aggregation import sparse_aggregation_backward_op, sparse_aggregation_op
from fmfa_losses.ops.hard_similarity import hard_similarity_backward_op, hard_similarity_op

B, N, L, D = 5, 21, 9, 24


def inputs(dtype=torch.float32):
    image, text = torch.randn(B, N, D), torch.randn(B, L, D)
    return image.to(dtype), text.to(dtype)


def masks():
    image_mask, text_mask = torch.rand(B, N) > 0.3, torch.rand(B, L) > 0.3
    image_mask[1] = text_mask[2] = False
    return {"image_mask": image_mask, "text_mask": text_mask}


@pytest.mark.table
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float16, 6e-3)])
def test_efa(dtype, tolerance, masked):
    kwargs = masks() if masked else {}
    tokens = inputs(dtype)
    exact = value_and_grads(lambda i, t: efa_loss(i, t, **kwargs), [x.double() for x in tokens])
    got = value_and_grads(lambda i, t: efa_loss(i, t, backend="triton", **kwargs), tokens)
    for a, b in zip(got, exact, strict=True):
        assert torch.isfinite(a).all()
        assert relative_error(a, b) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_efa_of_real_lengths_is_efa_with_the_mask(dtype):
    image, text = inputs(dtype)
    lengths = torch.tensor([4, 0, 9, 1, 4])
    mask, starts = length_mask(lengths, L), torch.tensor([0, 4, 4, 13, 14, 18])
    expected = value_and_grads(lambda i, t: efa_loss(i, t, text_mask=mask, backend="triton"), [image, text])
    by_length = value_and_grads(lambda i, t: efa_loss(i, t, text_lengths=lengths, backend="triton"), [image, text])
    packed = value_and_grads(
        lambda i, t: efa_loss(i, t, text_cu_seqlens=starts, text_max_seqlen=L, backend="triton"), [image, text[mask]]
    )
    assert all(torch.equal(a, b) for a, b in zip(by_length, expected, strict=True))
    assert torch.equal(packed[2], expected[2][mask])
    assert all(torch.equal(a, b) for a, b in zip(packed[:2], expected[:2], strict=True))


@pytest.mark.parametrize("loss", [asdm_loss, lambda i, t, p, **k: itc_loss(i, t, p, targets="identity", **k)])
def test_rows_of_the_similarity_distribution(loss):
    image, text = (x[:, 0] for x in inputs())
    text = image + text / 2
    pids = torch.tensor([0, 1, 0, 2, 3])
    scale = torch.tensor(5.0)  # not saturated: p of 1 - 1e-5 has lost its digits in any float32
    exact, plain, got = (
        value_and_grads(lambda i, t, s: loss(i, t, pids, logit_scale=s, backend=backend), leaves)  # noqa: B023
        for backend, leaves in (
            ("torch", [image.double(), text.double(), scale.double()]),
            ("torch", [image, text, scale]),
            ("triton", [image, text, scale]),
        )
    )
    for a, b, c in zip(got, plain, exact, strict=True):
        assert relative_error(a, c) <= relative_error(b, c) + 2e-5


def test_the_environment_chooses_the_kernels(monkeypatch):
    image, text = inputs()
    monkeypatch.setenv("FMFA_LOSSES_BACKEND", "triton")
    calls = []
    from fmfa_losses.kernels import aggregation
    from fmfa_losses.kernels import hard_similarity as kernels

    for module in (aggregation, kernels):
        forward = module.forward
        monkeypatch.setattr(
            module, "forward", lambda *a, forward=forward, **k: calls.append(forward) or forward(*a, **k)
        )
    efa_loss(image, text)
    assert len(calls) == 3  # one aggregation, two hard similarities


def test_explicit_torch_stays_torch():
    image, text = inputs()
    assert torch.equal(efa_loss(image, text), efa_loss(image, text, backend="torch"))


@pytest.mark.of_torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pool", ["lse", "sum"])
def test_opcheck_hard_similarity(dtype, pool):
    x, e = (torch.nn.functional.normalize(t.float(), dim=-1).to(dtype) for t in inputs(dtype))
    args = (x.requires_grad_(), e.requires_grad_(), *masks().values(), pool, 1.0, True, "triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(hard_similarity_op, args, test_utils=tests)
    sim, *saved = (t.detach() for t in hard_similarity_op(*args))
    torch.library.opcheck(
        hard_similarity_backward_op,
        (torch.ones_like(sim), *saved, x.detach(), e.detach(), *args[2:5], "triton"),
        test_utils=tests,
    )


@pytest.mark.of_torch
def test_opcheck_sparse_aggregate():
    image, text = inputs()
    given, options = tuple(masks().values()), (0.1, False, "triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = (image.requires_grad_(), text.requires_grad_(), *given, *options)
    torch.library.opcheck(sparse_aggregation_op, args, test_utils=tests)
    joint, total = (t.detach() for t in sparse_aggregation_op(*args))
    torch.library.opcheck(
        sparse_aggregation_backward_op,
        (torch.ones_like(joint), image.detach(), text.detach(), *given, total, *options),
        test_utils=tests,
    )


def test_mixed_dtypes_and_rectangular_batches():
    x, e = torch.randn(3, 7, D, dtype=torch.float16), torch.randn(4, 6, D)
    exact = value_and_grads(lambda x, e: hard_similarity(x, e, pool="mean"), [x.double(), e.double()])
    got = value_and_grads(lambda x, e: hard_similarity(x, e, pool="mean", backend="triton"), [x, e])
    for a, b in zip(got, exact, strict=True):
        assert relative_error(a, b) <= 6e-3
    image, text = inputs()
    torch.testing.assert_close(
        sparse_aggregate(image.half(), text, backend="triton"),
        sparse_aggregate(image.half(), text),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("loss", [asdm_loss, lambda i, t, p, **k: itc_loss(i, t, p, targets="identity", **k)])
def test_every_integer_dtype_holds_ids(loss, dtype):
    image, text = (x[:, 0] for x in inputs())
    pids = torch.tensor([0, 1, 0, 2, 3])
    given = torch.stack([pids, pids], dim=1).to(getattr(torch, dtype))[:, 0]  # a column of a table
    assert torch.equal(loss(image, text, given, backend="triton"), loss(image, text, pids, backend="triton"))


@pytest.mark.parametrize("operation", [hard_similarity, sparse_aggregate])
def test_products_in_tf32_read_rounded_operands(operation):
    """The interpreter multiplies exactly what it is given: an error of TF32 is that of the operands."""
    directions = torch.linalg.qr(torch.randn(32, 5))[0].T  # so that the same tokens win
    image, text = (directions[torch.arange(T) % 5] + 0.05 * torch.randn(3, T, 32) for T in (20, 10))
    options = {"pool_scale": 4.0} if operation is hard_similarity else {"sparsity": 0.0}

    def run(dtype, **backend):
        return value_and_grads(lambda v, t: operation(v, t, **backend, **options), [image.to(dtype), text.to(dtype)])

    exact = run(torch.float64)
    torch.set_float32_matmul_precision("medium")  # "high" matches with three products
    try:
        got = run(torch.float32, backend="triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b in zip(got, exact, strict=True):
        assert 1e-7 < (a.double() - b).norm() / b.norm() < 2e-3
    assert max((a.double() - b).norm() / b.norm() for a, b in zip(got, exact, strict=True)) > 5e-5
