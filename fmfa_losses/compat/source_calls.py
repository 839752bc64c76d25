"""Finds the calls in one source file that this library replaces. It runs as a program and uses the standard library.

A file can crash the process that parses it: CPython 3.10 overflows the C stack on 400,000 chained calls. And a parse
cannot be interrupted. So `scan.py` starts this file as a program, sends it one source after the other, and starts it
again when it has crashed or taken too long.
"""

import ast
import json
import re
import sys
import warnings
from typing import Any, NamedTuple

RECURSION = 5000  # a thousand chained calls
MEMORY = 2**30  # bytes of address space, where the system can limit it
LENGTH = 300  # characters of code that are quoted


class Replacement(NamedTuple):
    """`write` names the published arguments, which are those of `parameters` in their order."""

    parameters: str
    write: str
    module: str  # of fmfa_losses.compat


REPLACEMENTS = {
    "compute_sdm": Replacement(
        "image_features text_features pids logit_scale",
        "SDMLoss()({image_features}, {text_features}, {pids}, logit_scale={logit_scale})",
        "irra",
    ),
    "compute_sdm(use_weight)": Replacement(
        "image_features text_features pids logit_scale",
        "ASDMLoss()({image_features}, {text_features}, {pids}, logit_scale={logit_scale})",
        "fmfa",
    ),
    "compute_a_sdm": Replacement(
        "image_features text_features pids logit_scale alpha_i2t alpha_t2i",
        "ASDMLoss(alpha={alpha_t2i})({image_features}, {text_features}, {pids}, logit_scale={logit_scale})",
        "fmfa_2025_04",
    ),
    "compute_itc": Replacement(
        "image_features text_features logit_scale",
        "ITCLoss()({image_features}, {text_features}, logit_scale={logit_scale})",
        "irra",
    ),
    "compute_cmpm": Replacement(
        "image_features text_features pids", "CMPMLoss()({image_features}, {text_features}, {pids})", "irra"
    ),
    "compute_id": Replacement(
        "image_logits text_logits pids",
        "in __init__: self.identity = IDHead(embed_dim, num_identities); in forward: "
        "self.identity(image_features, text_features, {pids}).loss, in place of the classifier",
        "irra",
    ),
    "compute_mlm": Replacement(
        "scores labels",
        "in __init__: self.irr = IRRHead(embed_dim, vocab_size); in forward: "
        "self.irr(image_tokens, masked_text_tokens, masked_labels).loss, in place of the cross-former and its head",
        "irra",
    ),
    "compute_efa": Replacement(
        "text_tokens image_tokens joint margin_text margin_image",
        "EFALoss({margin_text}, {margin_image})({image_tokens}, {text_tokens}, text_mask=caption_ids != 0), in place "
        "of the aggregation too",
        "fmfa_2025_04",
    ),
    "compute_minmax_info_loss": Replacement(
        "text_tokens image_tokens joint",
        "EFALoss()({image_tokens}, {text_tokens}, text_mask=caption_ids != 0), in place of the aggregation too",
        "fmfa",
    ),
    "compute_TAL_per": Replacement(
        "scores pids tau margin",
        'tal_loss_from_scores({scores}, {pids}, temperature={tau}, margin={margin}, reduction="none")',
        "rde",
    ),
    "compute_TRL_per": Replacement(
        "scores pids margin tau",
        'trl_loss_from_scores({scores}, {pids}, margin={margin}, temperature={tau}, reduction="none")',
        "rde",
    ),
    "compute_sdm_per": Replacement(
        "scores pids logit_scale",
        'sdm_loss_from_scores({scores}, {pids}, logit_scale={logit_scale}, reduction="none")',
        "rde",
    ),
    "compute_InfoNCE_per": Replacement(
        "scores logit_scale",
        'itc_loss_from_scores({scores}, logit_scale={logit_scale}, reduction="none")',
        "rde",
    ),
    "compute_per_loss": Replacement(
        "image_features text_features pids",
        'TALLoss(reduction="none")({image_features}, {text_features}, {pids})',
        "rde",
    ),
    "compute_rbs": Replacement(
        "image_features text_features image_tse text_tse pids label_hat",
        'TALLoss(reduction="sum")({image_features}, {text_features}, {pids}, sample_weight={label_hat}), and again '
        "for {image_tse}, {text_tse}",
        "rde",
    ),
}
AGGREGATION = "sparse_aggregate(image_tokens, text_tokens), in place of the lines from the similarity on"
EVALUATION = (
    "fmfa_losses.retrieval.similarity_metrics(similarity, query_pids, gallery_pids), which sorts nothing; or, without "
    "the similarity, ranking_metrics(query_features, gallery_features, query_pids, gallery_pids)"
)


class _Call(NamedTuple):
    """Fields of a Finding, without the file."""

    line: int
    code: str
    write: str
    module: str | None
    cell: int | None


def calls_of_module(source: bytes) -> tuple[list[_Call], str | None]:
    """The calls of a Python file, and why it could not be read."""
    return _calls([(None, _parse(source))]), None


def calls_of_notebook(source: bytes) -> tuple[list[_Call], str | None]:
    """The calls in the code cells of a notebook; a cell that is no Python is named and the others are read."""
    cells = _code_cells(json.loads(source))
    trees: list[tuple[int | None, ast.Module]] = []
    failed = []
    for number, text in cells:
        try:
            trees.append((number, _parse_cell(text)))
        except Exception as error:  # the parser of foreign code fails in many ways
            failed.append(f"cell {number}: {_reason(error)}")
    unread = f"{len(failed)} of {len(cells)} code cells, {failed[0]}" if failed else None
    return _calls(trees), unread


def _calls(trees: list[tuple[int | None, ast.Module]]) -> list[_Call]:
    visitor = _Visitor([tree for _, tree in trees])
    for visitor.cell, tree in trees:
        visitor.visit(tree)
    return visitor.calls


def _parse(source: str | bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the code that is parsed
        return ast.parse(source)


# Notebooks

PYTHON_MAGICS = {"%%capture", "%%prun", "%%time", "%%timeit"}  # what follows is Python; after any other it is not
MAGIC_LINE = re.compile(r"\s*[%!?]|[^#'\"]*\?\s*$")
MAGIC_VALUE = re.compile(r"([\w.,\s]+=\s*)[%!]")


def _code_cells(notebook: Any) -> list[tuple[int, str]]:
    """(number among all cells from 1, text) of the code cells, format 3 or 4."""
    if not isinstance(notebook, dict):
        raise ValueError("not a notebook")
    metadata = notebook.get("metadata", {})
    language = metadata.get("language_info", {}).get("name") or metadata.get("kernelspec", {}).get("language")
    if language and "python" not in language.lower():
        raise ValueError(f"a notebook in {language}")
    sheets = [notebook] if "cells" in notebook else notebook.get("worksheets", [])
    cells = [cell for sheet in sheets for cell in sheet["cells"]]
    if not sheets:
        raise ValueError("a notebook without cells")
    found = []
    for number, cell in enumerate(cells, start=1):
        if cell["cell_type"] == "code":
            text = cell.get("source", cell.get("input", ""))
            found.append((number, text if isinstance(text, str) else "".join(text)))
    return found


def _parse_cell(text: str) -> ast.Module:
    try:
        return _parse(text)
    except SyntaxError:
        return _parse(_without_magics(text))


def _without_magics(text: str) -> str:
    """Lines of IPython become `pass`, so that the numbers of the others stay."""
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if line.strip()), 0)
    if lines[first].startswith("%%"):
        if lines[first].split()[0] not in PYTHON_MAGICS:
            return ""
        lines[first] = ""
    continued = False
    for i, line in enumerate(lines):
        value = MAGIC_VALUE.match(line)
        if continued:
            lines[i] = ""
        elif value:
            lines[i] = value[1] + "None"
        elif MAGIC_LINE.match(line):
            lines[i] = line[: len(line) - len(line.lstrip())] + "pass"
        else:
            continue
        continued = line.rstrip().endswith("\\")
    return "\n".join(lines)


# What is called


class _Visitor(ast.NodeVisitor):
    def __init__(self, trees: list[ast.Module]) -> None:
        self.cell: int | None = None
        self.calls: list[_Call] = []
        self.functions = {node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
        self.aliases: dict[str, str] = {}  # local name -> imported name
        self.ours: set[str] = set()  # local names that come from this library
        for node in (node for tree in trees for node in ast.walk(tree)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = node.module if isinstance(node, ast.ImportFrom) else None
                for alias in node.names:
                    local = alias.asname or alias.name.partition(".")[0]
                    if (module or alias.name).partition(".")[0] == "fmfa_losses":
                        self.ours.add(local)
                    elif isinstance(node, ast.ImportFrom):
                        self.aliases[local] = alias.name

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        # The body of a published function is replaced with it; a method of the same name belongs to the model.
        if node.name not in REPLACEMENTS or node not in self.functions:
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        product = isinstance(node.value, ast.BinOp) and isinstance(node.value.op, ast.MatMult)
        if "agg_v" in names and (product or (isinstance(node.value, ast.Call) and self._name(node.value) == "matmul")):
            self._add(node, AGGREGATION)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        name = self._name(node)
        if name is None:
            return
        if name == "compute_mcm_or_mlm":  # what IRRA's model calls it in some versions
            name = "compute_mlm"
        if name == "compute_sdm" and self._uses_weight(node):
            name = "compute_sdm(use_weight)"
        if name in REPLACEMENTS:
            replacement = REPLACEMENTS[name]
            self._add(node, self._fill(replacement, node), replacement.module)
        elif name == "argsort" and self._sorts_similarities(node):
            self._add(node, EVALUATION)
        elif name == "rank" and {"q_pids", "g_pids"} & {keyword.arg for keyword in node.keywords}:
            self._add(node, EVALUATION, "irra")

    def _name(self, node: ast.Call) -> str | None:
        """Name of the function as its module calls it; None for this library's own."""
        function, root = node.func, node.func
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id in self.ours:
            return None
        if isinstance(function, ast.Attribute):
            return function.attr
        return self.aliases.get(function.id, function.id) if isinstance(function, ast.Name) else None

    def _uses_weight(self, node: ast.Call) -> bool:
        return any(
            keyword.arg == "use_weight" and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
            for keyword in node.keywords
        )

    def _sorts_similarities(self, node: ast.Call) -> bool:
        method = isinstance(node.func, ast.Attribute) and not (
            isinstance(node.func.value, ast.Name) and node.func.value.id in ("torch", "np", "numpy")
        )
        sorted_value = node.func.value if method and isinstance(node.func, ast.Attribute) else None
        if sorted_value is None and node.args:
            sorted_value = node.args[0]
        text = "" if sorted_value is None else ast.unparse(sorted_value).lower()
        return any(part in text for part in ("sim", "score", "dist"))

    def _fill(self, replacement: Replacement, node: ast.Call) -> str:
        names = replacement.parameters.split()
        values = dict(zip(names, names, strict=True))
        if not any(isinstance(argument, ast.Starred) for argument in node.args):
            values.update(zip(names, map(_quoted, node.args), strict=False))
        values.update((k.arg, _quoted(k.value)) for k in node.keywords if k.arg in values)
        return replacement.write.format_map(values)

    def _add(self, node: ast.stmt | ast.expr, write: str, module: str | None = None) -> None:
        self.calls.append(_Call(node.lineno, _quoted(node), write, module, self.cell))


def _quoted(node: ast.AST) -> str:
    return _short(ast.unparse(node))


def _short(text: str) -> str:
    return text if len(text) <= LENGTH else text[:LENGTH] + " ..."


def _reason(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        error.filename = None  # "<unknown>": the parser got no file
    return _short(f"{type(error).__name__}: {error}".removesuffix(": "))


def serve() -> None:
    """Answers each request, a line (notebook or module, number of bytes) and the bytes, with one line of JSON."""
    sys.setrecursionlimit(RECURSION)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):  # a system without such limits
        pass
    for line in iter(sys.stdin.buffer.readline, b""):
        kind, length = line.split()
        source = sys.stdin.buffer.read(int(length))
        try:
            answer = (calls_of_notebook if kind == b"notebook" else calls_of_module)(source)
        except Exception as error:  # the parser fails in many ways on foreign bytes
            answer = [], _reason(error)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
