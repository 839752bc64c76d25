"""The ranking of EFA, Eq. 11-12: all four terms of a pair in one launch, the gradient of both similarities in another.

    z_ij   = (S_ij - S_ii + margin) scale,   loss_i = sum over four S of log sum_{j kept} exp(z_ij)
    p_ij   = exp(z_ij - top_i) / total_i,    dS_ij += g_i scale p_ij,   dS_ii -= g_i scale

The four S are the similarities of the texts and of the images with the joint embeddings, and both transposed. Column j
is kept for row i when j != i, or with identities when theirs differ. A row with no kept column has loss and gradient 0.

    ranking     one program for BLOCK_M pairs. It goes over the rows of these pairs and over their columns, which are
                the rows of the transposed S, and keeps the running top and total of each
                term: total = sum_j exp(z_ij - top)

                      j: BLOCK_N ->
                i [   S_ij, rows    ]      S_ji, columns: BLOCK_M neighbours of every row of S

    gradient    one program for a tile [BLOCK_M, BLOCK_N] of both dS. Each element gets what it does as an element of a
                row and what it does as one of a column. The diagonal gets minus the sum of p over its row, which is 1

Top and total are saved by themselves: their log-sum-exp would round away log(total) at a small temperature, and p would
not add up to 1.

Launchers: `forward`, `backward`. S are float32 [B, B]; nothing of that size is made but the gradients. What an excluded
column, an infinite logit or NaN does is what `masked_fill(excluded, lowest).logsumexp()` of PyTorch does with it.
Deterministic: see CONTRIBUTING.md, "A kernel file".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Strided, all_registers, by_device, launch, on_device

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: an excluded column counts as this logit

# BLOCK_M, BLOCK_N, num_warps. A few rows a program: 128 pairs are 32 programs, and the columns of a few neighbours
# share the 32 bytes that one access brings.
RANKING = (4, 128, 4)
GRADIENT = (8, 128, 4)


@triton.jit
def _excluded(pids_ptr, rows, cols, B, HAS_PIDS: tl.constexpr):
    """[R, C]: the pairs that are no negatives, among columns that exist; those that do not count as excluded, too."""
    excluded = rows[:, None] == cols[None, :]
    if HAS_PIDS:
        own = tl.load(pids_ptr + rows, mask=rows < B, other=0)
        others = tl.load(pids_ptr + cols, mask=cols < B, other=0)
        excluded = own[:, None] == others[None, :]
    return excluded | (cols >= B)[None, :]


@triton.jit
def _update(
    top,  # [R]
    total,  # [R]: sum of exp(z - top)
    moment,  # [R]: sum of exp(z - top) difference, over kept columns
    differences,  # [R, C]: S_ij - S_ii + margin
    excluded,  # [R, C]
    inside,  # [C]
    scale,
    SCALE_GRADIENT: tl.constexpr,
):
    """The running statistics of some rows after C more columns."""
    z = tl.where(excluded, LOWEST, differences * scale)
    z = tl.where(inside[None, :], z, -float("inf"))
    new = tl.maximum(top, tl.max(z, 1))  # NaN is passed over here and shows in the sum
    base = tl.where(new == float("inf"), 0.0, new)
    e = tl.exp(z - base[:, None])
    # Where an earlier top was infinite, so is the sum already.
    decay = tl.where(top == float("inf"), 1.0, tl.exp(top - base))
    total = total * decay + tl.sum(e, 1)
    if SCALE_GRADIENT:
        moment = moment * decay + tl.sum(tl.where(excluded, 0.0, e * differences), 1)
    return new, total, moment


@triton.jit
def _log_sum_exp(top, total):
    return tl.where(top == float("inf"), 0.0, top) + tl.log(total)


@triton.jit(do_not_specialize=["pids_ptr", "scale_ptr", "B"])
def _ranking_kernel(
    text_ptr,  # [B, B]
    image_ptr,  # [B, B]
    pids_ptr,  # [B], or anything
    scale_ptr,  # [], or anything
    loss_ptr,  # [B]
    statistics_ptr,  # [2, 4, B]: top and total, of rows and columns of text, then of image; LOWEST, 1 without negatives
    moment_ptr,  # [B]: sum over terms of sum_j p_ij (S_ij - S_ii + margin), or anything
    B,
    margin,
    scale,
    HAS_PIDS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SCALE_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (blocks of pairs)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < B
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    wide = rows.to(tl.int64)
    loss = tl.zeros((BLOCK_M,), tl.float32)
    moments = tl.zeros((BLOCK_M,), tl.float32)
    for similarity in tl.static_range(2):
        sim_ptr = text_ptr if similarity == 0 else image_ptr
        own = tl.load(sim_ptr + wide * B + wide, mask=row_mask, other=0.0)[:, None]
        row_top = tl.full((BLOCK_M,), LOWEST, tl.float32)  # reached by the pair itself, which is excluded
        row_total = tl.zeros((BLOCK_M,), tl.float32)
        row_moment = tl.zeros((BLOCK_M,), tl.float32)
        column_top, column_total, column_moment = row_top, row_total, row_moment
        negatives = tl.zeros((BLOCK_M,), tl.int32)
        for start in range(0, B, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            inside = cols < B
            excluded = _excluded(pids_ptr, rows, cols, B, HAS_PIDS)
            mask = row_mask[:, None] & inside[None, :]
            across = tl.load(sim_ptr + wide[:, None] * B + cols[None, :], mask=mask, other=0.0)
            down = tl.load(sim_ptr + cols.to(tl.int64)[None, :] * B + rows[:, None], mask=mask, other=0.0)
            row_top, row_total, row_moment = _update(
                row_top, row_total, row_moment, across - own + margin, excluded, inside, scale, SCALE_GRADIENT
            )
            column_top, column_total, column_moment = _update(
                column_top, column_total, column_moment, down - own + margin, excluded, inside, scale, SCALE_GRADIENT
            )
            negatives += tl.sum((~excluded).to(tl.int32), 1)
        some = negatives > 0
        top_rows = statistics_ptr + 2 * similarity * B + rows
        tl.store(top_rows, tl.where(some, row_top, LOWEST), mask=row_mask)
        tl.store(top_rows + B, tl.where(some, column_top, LOWEST), mask=row_mask)
        tl.store(top_rows + 4 * B, tl.where(some, row_total, 1.0), mask=row_mask)
        tl.store(top_rows + 5 * B, tl.where(some, column_total, 1.0), mask=row_mask)
        # One after the other: their sum may be infinite where the loss is not.
        loss += tl.where(some, _log_sum_exp(row_top, row_total), 0.0)
        loss += tl.where(some, _log_sum_exp(column_top, column_total), 0.0)
        if SCALE_GRADIENT:
            moments += tl.where(some, row_moment / row_total + column_moment / column_total, 0.0)
    tl.store(loss_ptr + rows, loss, mask=row_mask)
    if SCALE_GRADIENT:
        tl.store(moment_ptr + rows, moments, mask=row_mask)


@triton.jit
def _exp(differences, scale, top):
    """exp(z - top) of z = differences scale; NaN where z is infinite, as infinity less infinity is.

    A fused multiply-add rounds no z: it would subtract an infinite top from a number.
    """
    z = differences * scale
    return tl.where(z == float("inf"), float("nan"), tl.exp(z - top))


@triton.jit
def _own_share(top, total):
    """sum_j p_ij: 1, and 0 where no column counts; NaN where a logit is NaN or the top infinite."""
    return tl.where(top <= LOWEST, 0.0, 1.0 / total) * total


@triton.jit(do_not_specialize=["pids_ptr", "scale_ptr", "g_ptr", "B", "g_stride"])
def _ranking_gradient_kernel(
    text_ptr,  # [B, B]
    image_ptr,  # [B, B]
    pids_ptr,  # [B], or anything
    scale_ptr,  # [], or anything
    statistics_ptr,  # [2, 4, B]
    moment_ptr,  # [B], or anything
    g_ptr,  # [B]
    dtext_ptr,  # [B, B]
    dimage_ptr,  # [B, B]
    dscale_ptr,  # [], or anything
    B,
    margin,
    scale,
    g_stride,
    HAS_PIDS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SCALE_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    """Grid (row blocks, column blocks). The first program also makes the gradient of the scale."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < B, cols < B
    mask = row_mask[:, None] & col_mask[None, :]
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    wide, across = rows.to(tl.int64), cols.to(tl.int64)
    g_row = tl.load(g_ptr + wide * g_stride, mask=row_mask, other=0.0)
    g_col = tl.load(g_ptr + across * g_stride, mask=col_mask, other=0.0)
    kept = ~_excluded(pids_ptr, rows, cols, B, HAS_PIDS)
    diagonal = rows[:, None] == cols[None, :]
    at = wide[:, None] * B + across[None, :]
    for similarity in tl.static_range(2):
        sim_ptr = text_ptr if similarity == 0 else image_ptr
        out_ptr = dtext_ptr if similarity == 0 else dimage_ptr
        sim = tl.load(sim_ptr + at, mask=mask, other=0.0)
        own_row = tl.load(sim_ptr + wide * B + wide, mask=row_mask, other=0.0)
        own_col = tl.load(sim_ptr + across * B + across, mask=col_mask, other=0.0)
        tops = statistics_ptr + 2 * similarity * B
        totals = tops + 4 * B
        row_top = tl.load(tops + rows, mask=row_mask, other=0.0)
        row_total = tl.load(totals + rows, mask=row_mask, other=1.0)
        column_top = tl.load(tops + B + cols, mask=col_mask, other=0.0)  # of column j of S, row j of the transposed
        column_total = tl.load(totals + B + cols, mask=col_mask, other=1.0)
        p_row = _exp(sim - own_row[:, None] + margin, scale, row_top[:, None])
        p_col = _exp(sim - own_col[None, :] + margin, scale, column_top[None, :])
        of_row, of_col = g_row / row_total, g_col / column_total
        share = tl.where(kept, of_row[:, None] * p_row + of_col[None, :] * p_col, 0.0)
        own_top = tl.load(tops + B + rows, mask=row_mask, other=0.0)
        own_total = tl.load(totals + B + rows, mask=row_mask, other=1.0)
        own = -g_row * (_own_share(row_top, row_total) + _own_share(own_top, own_total))
        tl.store(out_ptr + at, tl.where(diagonal, own[:, None], share) * scale, mask=mask)
    if SCALE_GRADIENT:  # noqa: SIM102, settled when compiled
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            sums = tl.zeros((BLOCK_SUM,), tl.float32)
            for start in range(0, B, BLOCK_SUM):
                pairs = start + tl.arange(0, BLOCK_SUM)
                g = tl.load(g_ptr + pairs.to(tl.int64) * g_stride, mask=pairs < B, other=0.0)
                sums += g * tl.load(moment_ptr + pairs, mask=pairs < B, other=0.0)
            tl.store(dscale_ptr, tl.sum(sums, 0))


def forward(
    text_sim: Tensor,
    image_sim: Tensor,
    pids: Tensor | None,
    logit_scale: Tensor | None,
    margin: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every pair [B]; for the gradient statistics [2, 4, B] and, with logit_scale, moments [B].

    Args:
        text_sim, image_sim: [B, B] float32.
        pids: [B] identities; other pairs of the same one are no negatives. Without them all other pairs are.
        logit_scale: one element, in place of `scale`; the host does not read one on the device of the similarities.
    """
    text_sim, image_sim = text_sim.contiguous(), image_sim.contiguous()
    B, scale_ptr, scale = len(text_sim), *by_device(scale if logit_scale is None else logit_scale, text_sim)
    like = {"dtype": torch.float32, "device": text_sim.device}
    learned = logit_scale is not None
    loss, statistics = torch.empty(B, **like), torch.empty(2, 4, B, **like)
    moment = torch.empty(B if learned else 0, **like)
    if B == 0:
        return loss, statistics, moment
    M, N, warps = RANKING
    with on_device(text_sim):
        launch(
            _ranking_kernel, (triton.cdiv(B, M),), text_sim, image_sim, *_optional(pids, scale_ptr, loss),
            loss, statistics, moment if learned else loss, B, margin, scale,
            HAS_PIDS=pids is not None, HAS_SCALE=scale_ptr is not None, SCALE_GRADIENT=learned,
            BLOCK_M=M, BLOCK_N=N, num_warps=warps, **all_registers(text_sim.device),
        )  # fmt: skip
    return loss, statistics, moment


def backward(
    dper_sample: Tensor,
    statistics: Tensor,
    moment: Tensor,
    text_sim: Tensor,
    image_sim: Tensor,
    pids: Tensor | None,
    logit_scale: Tensor | None,
    margin: float,
    scale: float,
    scale_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both similarities [B, B], and of the scale, [] (or [0] unless asked).

    Args:
        dper_sample: [B] float32 of any stride: that of a mean is one number.
    """
    text_sim, image_sim = text_sim.contiguous(), image_sim.contiguous()
    B, scale_ptr, scale = len(text_sim), *by_device(scale if logit_scale is None else logit_scale, text_sim)
    dtext, dimage = torch.empty_like(text_sim), torch.empty_like(image_sim)
    if B == 0:
        return dtext, dimage, text_sim.new_zeros(() if scale_gradient else (0,))
    dscale = torch.empty(() if scale_gradient else 0, dtype=torch.float32, device=text_sim.device)
    M, N, warps = GRADIENT
    with on_device(text_sim):
        launch(
            _ranking_gradient_kernel, (triton.cdiv(B, M), triton.cdiv(B, N)), text_sim, image_sim,
            *_optional(pids, scale_ptr, statistics), statistics,
            moment if scale_gradient else statistics, Strided(dper_sample),
            dtext, dimage, dscale if scale_gradient else statistics, B, margin, scale, dper_sample.stride(0),
            HAS_PIDS=pids is not None, HAS_SCALE=scale_ptr is not None, SCALE_GRADIENT=scale_gradient,
            BLOCK_M=M, BLOCK_N=N, BLOCK_SUM=1024, num_warps=warps,
        )  # fmt: skip
    return dtext, dimage, dscale


def _optional(pids: Tensor | None, scale: Tensor | None, unread: Tensor) -> tuple[Tensor, Tensor]:
    """Pointers of the arguments that may be missing."""
    return unread if pids is None else pids.contiguous(), unread if scale is None else scale
