"""FMFA's inline aggregation: patches kept above 1/N of a min-max normalised similarity, then summed by their share.

Found by what it does, in this order in one function: `s = matmul(text, patches.transpose(1, 2))`, a
`where(s > threshold, s, zeros)`, a division by the sum of the row, and `matmul(s, patches)`.
"""

import ast
from collections.abc import Iterator
from typing import Any

from .expressions import assignments, called, product

__all__ = ["aggregation"]


def aggregation(function: ast.AST) -> Iterator[dict[str, Any]]:
    """line, last line, name of the result, text and patches of every aggregation in a function's own statements."""
    products: dict[str, tuple[int, str, str]] = {}  # similarity -> (line, text, patches)
    kept: set[str] = set()
    for name, node in assignments(function):
        operands = product(node.value)
        if operands is not None:
            left, right = operands
            text, patches = ast.unparse(left), _transposed(right)
            if patches is not None:
                products[name] = (node.lineno, text, patches)
            elif text in kept and products[text][2] == ast.unparse(right):
                line, tokens, patches = products[text]
                yield {"line": line, "end": node.lineno, "name": name, "text_tokens": tokens, "image_tokens": patches,
                       "code": ast.unparse(node)}  # fmt: skip
        elif name in products and called(node.value) == "where" and isinstance(node.value, ast.Call):
            compared = node.value.args[0] if node.value.args else None
            if isinstance(compared, ast.Compare) and isinstance(compared.left, ast.Name) and compared.left.id == name:
                kept.add(name)


def _transposed(node: ast.expr) -> str | None:
    """x of `x.transpose(1, 2)`, in any order and from the end too."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "transpose":
        return None
    swapped = {ast.unparse(argument) for argument in node.args}
    return ast.unparse(node.func.value) if swapped in ({"1", "2"}, {"-1", "-2"}) else None
