"""The least that a kernel must do, by the arguments of its launches: operations of products, bytes of tensors."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

__all__ = ["FLOPS", "bytes_of", "flops_of", "seconds_at"]

Arguments = dict[str, Any]


def _rows(a: Arguments) -> float:
    """Tokens of x: those that a mask left, where there is one."""
    count = a.get("row_count_ptr")
    return float(count.sum()) if isinstance(count, Tensor) else a["Bx"] * a["P"]


def _columns(a: Arguments) -> float:
    """Tokens of e, likewise."""
    return float(a["counts_ptr"].sum()) if isinstance(a["counts_ptr"], Tensor) else a["Be"] * a["Q"]


def _match(a: Arguments) -> float:
    products = 3 if a.get("SPLIT") else 1  # of TF32, that make one of float32
    return 2.0 * products * _rows(a) * _columns(a) * a["D"]


def _packed_match(a: Arguments) -> float:
    columns = a["columns_ptr"]  # a token of e may be there several times, and -1 is none
    tokens = float(columns[columns >= 0].unique().numel()) if isinstance(columns, Tensor) else a["Be"] * a["Q"]
    return 2.0 * (3 if a.get("SPLIT") else 1) * _rows(a) * tokens * a["D"]


def _gathered(a: Arguments) -> float:
    return 2.0 * _rows(a) * a["Be"] * a["D"]  # one row of D for every winner


def _scores(products: int) -> Callable[[Arguments], float]:
    """So many products of [L, N] with D, a sample."""
    return lambda a: 2.0 * products * a["text_ptr"].shape[0] * a["L"] * a["N"] * a["D"]


def _logits(products: int) -> Callable[[Arguments], float]:
    """So many products of [X, Y] with D, for rows and for columns."""
    return lambda a: 2.0 * products * 2 * a["X"] * a["Y"] * a["D"]


def _kept(products: int) -> Callable[[Arguments], float]:
    """So many products of [R, C] with D, of which both directions are made."""
    return lambda a: 2.0 * products * a["R"] * a["C"] * a["D"]


# The least that gives a kernel's results. Kernels that are not here make no products, or move bytes for longer than
# they compute.
FLOPS: dict[str, Callable[[Arguments], float]] = {
    "_match_kernel": _match,
    "_packed_match_kernel": _packed_match,
    "_persistent_match_kernel": lambda a: 2.0 * a["Bx"] * a["P"] * a["Be"] * a["Q"] * a["D"],
    "_dx_kernel": _gathered,
    "_products_kernel": _gathered,
    "_gather_kernel": _gathered,
    "_forward_kernel": _scores(2),  # s and the weighted sum
    "_rows_kernel": _scores(3),  # s, da, ds v
    "_dimage_product_kernel": _scores(2),  # a^T djoint, ds^T t
    "_statistics_kernel": _scores(2),  # s and da
    "_dtext_kernel": _scores(3),  # s, da, ds v
    "_dimage_kernel": _scores(4),  # s, da, a^T djoint, ds^T t
    "_row_loss_kernel": lambda a: 0.0 if a.get("KEPT") else _logits(1)(a),  # else it reads what _cosines_kernel made
    "_gradient_kernel": _logits(2),  # the logits and one gradient
    "_cosines_kernel": _kept(1),
    "_kept_dlogits_kernel": _kept(1),  # the logits once more
    "_kept_gradient_kernel": _kept(2),  # dz k and dz^T q
}


def _apart(launches: Sequence[Arguments]) -> list[Arguments]:
    """Launches with the very same tensors are parts of one piece of work: a match in two classes of width."""
    found = {}
    for arguments in launches:
        tensors = tuple(value.data_ptr() for value in arguments.values() if isinstance(value, Tensor))
        found.setdefault(tensors, arguments)
    return list(found.values())


def flops_of(kernel: str, launches: Sequence[Arguments]) -> float:
    """0 where they are not counted: a time without its roof is better than none."""
    if kernel not in FLOPS:
        return 0.0
    try:
        return sum(FLOPS[kernel](arguments) for arguments in _apart(launches))
    except KeyError:  # a kernel whose arguments have other names by now; the tests say so
        return 0.0


def bytes_of(launches: Sequence[Arguments]) -> int:
    """Of the tensors that the launches are given, each once: no kernel can move less of what it needs."""
    return sum(
        sum(value.numel() * value.element_size() for value in arguments.values() if isinstance(value, Tensor))
        for arguments in _apart(launches)
    )


def seconds_at(operations: float, moved: float, precision: str, ceilings: dict[str, float]) -> float:
    """The least time: whichever of the two takes longer at the measured ceilings."""
    return max(operations / ceilings[precision], moved / ceilings["copy"])
