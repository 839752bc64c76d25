"""A linear layer over many classes and its cross-entropy in one: the logits [M, V] are never in memory.

    z = h W^T + b,   loss = sum over counted rows i of log sum_j exp(z_ij) - z_i,t(i)

Row i counts where its target t(i) is not `ignore_index`. With p_ij = exp(z_ij - top_i) / total_i, where top is the
largest logit of a row and total = sum_j exp(z_ij - top_i), and g the gradient of the loss,

    dz_ij = g (p_ij - [j = t(i)]),   dh = dz W,   dW = dz^T h,   db_j = sum_i dz_ij

The forward goes over blocks of columns and keeps the running top and total of each row: two numbers a row are all that
is saved, and the backward makes each block of logits again. A gradient of W formed in the forward, as others do, would
save that product, and hold [V, D] until the backward multiplies it with g.

A few rows in PyTorch are the exception, at most 3 D / 4: their logits are kept, which are smaller than the gradient of
W that follows, and the backward needs two products of three.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .backend import select_backend
from .checks import check_float, check_integer, check_same, check_shape, integer_ids
from .operator import differentiable_once, operator
from .options import Backend
from .precision import accumulation_dtype, full_precision

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference", "summed_cross_entropy"]

# Logits of one block in PyTorch: as many as stay in the caches of a processor; an accelerator wants few launches.
BLOCK, BLOCK_ON_ACCELERATOR = 2**18, 2**23
ROWS = 512  # of one block at most; then the columns that the rows leave, and never fewer than this
COLUMNS = 512
# The probability of one word of 49408 is below the least normal number of float16. Times this it is not, and a
# product with weights up to 200 is still a number.
HALF_FACTOR = 256.0


def linear_cross_entropy_reference(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """The specification of `linear_cross_entropy`."""
    logits = torch.nn.functional.linear(states, weight, bias)
    logits = logits.to(accumulation_dtype(logits))
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    right = (logits.argmax(dim=1) == targets) & (targets != ignore_index)
    return loss, right.sum()


def linear_cross_entropy(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the classes of a linear layer, summed over rows, and how many rows it predicts.

        loss = sum_i log sum_j exp(h_i W_j + b_j) - (h_i W_t(i) + b_t(i))

    Args:
        states: [M, D] h, any float dtype.
        weight: [V, D] W, of the dtype of states; under autocast of any.
        bias: [V] b or None, likewise.
        targets: [M] t, integers in [0, V) or `ignore_index`. Another one makes the loss NaN.
        ignore_index: target of the rows that do not count.
        backend: "auto", "triton" or "torch".

    Returns:
        Loss, a scalar, float32 (float64 when an input is), differentiable once; number of rows whose largest logit is
        that of the target, int64 (of equal logits the first one is the prediction).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: backend="triton" cannot run; the message says why.

    Example:
        >>> loss, right = linear_cross_entropy(torch.eye(2, 4), torch.eye(3, 4), None, torch.tensor([0, 2]))
        >>> loss, right                                                    # 2 log(e + 2) - 1
        (tensor(2.1029), tensor(1))

    Reference: Wijmans et al., arXiv 2411.09009, has the idea for language models.
    """
    check_float("states", states, "M D")
    check_float("weight", weight, "V D")
    check_same("states and weight", states, weight, dims=[("D", 1)])
    if bias is not None:
        check_float("bias", bias, "V")
        check_same("weight and bias", weight, bias, dims=[("V", 0)])
    targets = integer_ids("targets", targets, "M")
    check_shape("targets", targets, (states.shape[0],), "one a row")
    check_same("states and targets", states, targets)
    for name, one in (("states", states), ("bias", bias)):
        if one is not None and product_dtype(one) != product_dtype(weight):
            raise TypeError(
                f"{name} and weight must have one dtype, or two that autocast makes one (it leaves float64 alone), got "
                f"{one.dtype} and {weight.dtype}; call {name}.to(weight.dtype)"
            )
    ignore_index = check_integer("ignore_index", ignore_index)
    return summed_cross_entropy(states, weight, bias, targets.long(), ignore_index, backend)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which F.linear would multiply x: under autocast that of autocast, which leaves float64 alone."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def summed_cross_entropy(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` of checked inputs; M may be 0."""
    states = states.to(product_dtype(states))
    chosen = select_backend(backend, states, weight)
    # Compiled code would be bound to the numbers of rows for which it was decided.
    keep = not torch.compiler.is_compiling() and 4 * states.shape[0] <= 3 * states.shape[1]
    loss, correct, *_ = _linear_cross_entropy(states, weight, bias, targets, ignore_index, keep, False, chosen)
    return loss, correct


# The operator: one schema, one fake kernel, one gradient formula for both backends. What the backward needs besides the
# inputs:
#   statistics  [2, M]  top and total of every row; infinite total where the row does not count, NaN where its target is
#                       no class
#   logits      [M, V]  where they are kept, of the rows that count, which on the CPU come first; else [0]


@operator(
    "linear_cross_entropy(Tensor states, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, bool keep,"
    " bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
def linear_cross_entropy_op(  # type: ignore[no-untyped-def]
    states, weight, bias, targets, ignore_index, keep, save, backend
):
    if backend == "triton":
        from fmfa_losses.kernels import linear_cross_entropy as kernels

        return *kernels.forward(states, weight, bias, targets, ignore_index), weight.new_empty(0)
    acc = accumulation_dtype(states, weight)
    logits = states.new_empty((len(states), len(weight)) if keep and save else 0, dtype=acc)
    kept = logits if keep and save else None
    if not on_processor(states):
        return *_rows(states, weight, bias, targets, targets != ignore_index, kept), logits
    statistics = states.new_empty(2, len(states), dtype=acc)
    statistics[0], statistics[1] = 0, torch.inf
    counted = (targets != ignore_index).nonzero().squeeze(1)  # the others cost nothing
    every = torch.ones_like(counted, dtype=torch.bool)
    loss, right, found = _rows(states[counted], weight, bias, targets[counted], every, kept)
    statistics[:, counted] = found
    return loss, right, statistics, logits


@operator(
    "linear_cross_entropy_backward(Tensor dloss, Tensor statistics, Tensor logits, Tensor states, Tensor weight,"
    " Tensor? bias, Tensor targets, int ignore_index, bool of_states, bool of_weight, bool of_bias, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
def linear_cross_entropy_backward_op(  # type: ignore[no-untyped-def]
    dloss, statistics, logits, states, weight, bias, targets, ignore_index, of_states, of_weight, of_bias, backend
):
    wanted = (of_states, of_weight, of_bias)
    if backend == "triton":
        from fmfa_losses.kernels import linear_cross_entropy_gradient as kernels

        return kernels.backward(dloss, statistics, states, weight, bias, targets, ignore_index, *wanted)
    kept = logits if logits.numel() else None
    if not on_processor(states):
        return _gradients(dloss, statistics, kept, states, weight, bias, targets, *wanted)
    counted = (targets != ignore_index).nonzero().squeeze(1)
    own, *rest = _gradients(
        dloss, statistics[:, counted], kept, states[counted], weight, bias, targets[counted], *wanted
    )
    dstates = states.new_zeros(states.shape if of_states else 0)
    if of_states:
        dstates[counted] = own
    return dstates, *rest


@torch.library.register_fake(linear_cross_entropy_op)
def _fake(states, weight, bias, targets, ignore_index, keep, save, backend):  # type: ignore[no-untyped-def]
    acc, M = accumulation_dtype(states, weight), states.shape[0]
    kept = keep and save and backend == "torch"
    return (
        states.new_empty((), dtype=acc),
        states.new_empty((), dtype=torch.int64),
        states.new_empty(2, M, dtype=acc),
        states.new_empty((M, weight.shape[0]) if kept else 0, dtype=acc),
    )


@torch.library.register_fake(linear_cross_entropy_backward_op)
def _backward_fake(  # type: ignore[no-untyped-def]
    dloss, statistics, logits, states, weight, bias, targets, ignore_index, of_states, of_weight, of_bias, backend
):
    return (
        states.new_empty(states.shape if of_states else 0),
        weight.new_empty(weight.shape if of_weight else 0),
        weight.new_empty(0) if bias is None or not of_bias else bias.new_empty(bias.shape),
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.ignore_index, _, _, ctx.backend = inputs
    ctx.save_for_backward(*output[2:], *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):  # type: ignore[no-untyped-def]
    if dloss is None:
        return (None,) * 8
    wanted = ctx.needs_input_grad[:3]
    gradients = _linear_cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.ignore_index, *wanted, ctx.backend)
    found = (gradient if asked else None for gradient, asked in zip(gradients, wanted, strict=True))
    return *found, None, None, None, None, None


_linear_cross_entropy, _linear_cross_entropy_backward = differentiable_once(
    linear_cross_entropy_op,
    linear_cross_entropy_backward_op,
    _backward,
    _setup_context,
    "linear_cross_entropy",
    "IRR",
)


def on_processor(x: Tensor) -> bool:
    """Whether the host may look which rows count, and blocks are to fit in caches."""
    return x.device.type == "cpu"


def _blocks(states: Tensor, V: int) -> tuple[list[slice], list[slice]]:
    """Blocks of rows and of columns."""
    M, block = len(states), BLOCK if on_processor(states) else BLOCK_ON_ACCELERATOR
    rows = ROWS if on_processor(states) else max(ROWS, block // COLUMNS)
    columns = max(COLUMNS, block // max(1, min(M, rows)))
    return list(_slices(M, rows)), list(_slices(V, columns))


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _logits(
    states: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """h W^T + b, made in the dtype of the states and then of `dtype`; in `out` where it is given."""
    if states.dtype == dtype:
        if bias is not None:
            return torch.addmm(bias.to(dtype), states, weight.T, out=out)
        return torch.mm(states, weight.T, out=out)
    logits = (states @ weight.T).to(dtype)
    if bias is not None:
        logits += bias
    return logits if out is None else out.copy_(logits)


def _rows(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    counted: Tensor,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, number of right predictions and statistics of the forward, over all rows; those not counted add nothing.

    The logits are left in `kept`.
    """
    acc, M = accumulation_dtype(states, weight), len(states)
    top, total = states.new_full((M,), -torch.inf, dtype=acc), states.new_zeros(M, dtype=acc)
    own, best = torch.full_like(total, torch.nan), torch.zeros_like(targets)  # the target's logit, and the best column
    row_blocks, column_blocks = _blocks(states, len(weight))
    with full_precision(states):
        for columns in column_blocks:
            W, b = weight[columns].to(states.dtype), None if bias is None else bias[columns]
            for rows in row_blocks:
                z = _logits(states[rows], W, b, acc, out=None if kept is None else kept[rows, columns])
                column = targets[rows] - columns.start
                inside = (column >= 0) & (column < len(W))
                found = z.gather(1, column.clamp(0, len(W) - 1).unsqueeze(1)).squeeze(1)
                own[rows] = torch.where(inside, found, own[rows])
                largest, index = z.max(dim=1)  # of equal ones the first
                best[rows] = torch.where(largest > top[rows], index + columns.start, best[rows])
                new = torch.maximum(largest, top[rows])  # NaN stays
                base = new.masked_fill(new == -torch.inf, 0)
                total[rows] = total[rows] * (top[rows] - base).exp() + z.sub(base.unsqueeze(1)).exp_().sum(dim=1)
                top[rows] = new
    loss = (top - own + total.log()).masked_fill(~counted, 0).sum()
    right = (counted & (best == targets) & (own == top)).sum()
    total = total.masked_fill(own.isnan(), torch.nan).masked_fill(~counted, torch.inf)
    return loss, right, torch.stack([top.masked_fill(~counted, 0), total])


def _gradients(
    dloss: Tensor,
    statistics: Tensor,
    kept: Tensor | None,
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    of_states: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of states, weight and bias, [0] for those not wanted; sums are made in the statistics' dtype."""
    acc, (top, total), (M, D), V = statistics.dtype, statistics.unsqueeze(2), states.shape, len(weight)
    # What the logits' gradient is multiplied with before it is rounded to the states' dtype, and what comes after.
    first, last = (HALF_FACTOR, dloss / HALF_FACTOR) if states.dtype == torch.float16 else (dloss, None)
    each = first / total  # 0 for rows that do not count,
    top = top.masked_fill(each == 0, torch.inf)  # whose exp(z) might overflow, and inf * 0 is NaN
    # A processor adds up the gradient of half weights in float32, also within a product. So does float16 everywhere: of
    # a word that many rows have, `first` times their sum is beyond its largest number.
    wide = on_processor(states) or states.dtype == torch.float16
    summed = states.to(acc) if of_weight and wide else states
    dstates = states.new_zeros(states.shape if of_states else 0, dtype=acc)
    dweight = weight.new_empty(weight.shape if of_weight else 0)
    dbias = weight.new_empty(0) if bias is None or not of_bias else bias.new_empty(V)
    row_blocks, column_blocks = _blocks(states, V)
    with full_precision(states):
        for columns in column_blocks:
            W, b = weight[columns].to(states.dtype), None if bias is None else bias[columns]
            # Straight to the result where that has the dtype of the sums.
            direct = of_weight and weight.dtype == acc
            dW = dweight[columns] if direct else states.new_empty((len(W), D) if of_weight else 0, dtype=acc)
            db = states.new_zeros(len(W), dtype=acc)
            for rows in row_blocks:
                column = (targets[rows] - columns.start).unsqueeze(1)
                z = _logits(states[rows], W, b, acc) if kept is None else kept[rows, columns]
                dz = z.sub(top[rows]).exp_().mul_(each[rows])
                inside = (column >= 0) & (column < len(W)) & (each[rows] != 0)
                dz.scatter_add_(1, column.clamp(0, len(W) - 1), torch.where(inside, -first, 0.0).to(acc))
                if dbias.numel():
                    db += dz.sum(dim=0)
                if of_states:
                    _add_product(dstates[rows], dz.to(states.dtype), W, fresh=False)
                if of_weight:
                    _add_product(dW, dz.to(summed.dtype).T, summed[rows], fresh=rows.start == 0)
            if of_weight and M == 0:
                dW.zero_()
            if last is not None:
                dW, db = dW.mul_(last), db.mul_(last)
            if of_weight and not direct:
                dweight[columns] = dW
            if dbias.numel():
                dbias[columns] = db
    if last is not None:
        dstates *= last
    return dstates.to(states.dtype), dweight, dbias


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """out += a b, or out = a b where it is fresh memory; the sum in the dtype of `out`."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=0 if fresh else 1)
    elif fresh:
        out.copy_(a @ b)
    else:
        out.add_(a @ b)
