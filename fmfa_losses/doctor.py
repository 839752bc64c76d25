"""`python -m fmfa_losses doctor`: what runs here, whether it is right, and what a codebase can replace. Never edits."""

import ast
import os
import platform
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from . import __version__
from .ops._backend import select_backend, why_not_triton
from .ops.aggregation import sparse_aggregate, sparse_aggregate_reference
from .ops.hard_similarity import hard_similarity, hard_similarity_reference
from .sdm import sdm_loss, sdm_loss_from_scores

__all__ = ["Finding", "Unreadable", "diagnose", "scan", "self_test"]

SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "build", "dist", "venv", "env"}


def diagnose(path: Path | None = None) -> int:
    """Prints the report; 1 when the self-test fails, else 0."""
    for line in environment():
        print(line)
    healthy = True
    for line, passed in self_test():
        healthy &= passed
        print(line)
    if path is not None:
        print()
        for line in migration(path):
            print(line)
    return 0 if healthy else 1


# What runs here


def environment() -> Iterator[str]:
    yield f"fmfa-losses  {__version__}"
    yield f"python       {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"torch        {torch.__version__}"
    yield f"triton       {_version('triton')}"
    for device in _devices():
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        yield f"device       {device}{name}"
        yield f"backend      {_backend(torch.zeros(1, device=device))}"
    for variable in ("FMFA_LOSSES_BACKEND", "TRITON_INTERPRET"):
        if variable in os.environ:
            yield f"             {variable}={os.environ[variable]} is set"


def _backend(sample: Tensor) -> str:
    """What "auto" picks for tensors like this one, and why not triton."""
    try:
        chosen = select_backend("auto", sample)
    except (RuntimeError, ValueError) as error:  # of FMFA_LOSSES_BACKEND
        return f"none: {error}"
    if chosen == "triton":
        return chosen
    if os.environ.get("FMFA_LOSSES_BACKEND") == "torch":
        return "torch, as FMFA_LOSSES_BACKEND says"
    return f"torch, not triton: {why_not_triton(sample) or 'on the CPU its interpreter is for debugging'}"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return devices


# Whether it is right


def self_test() -> Iterator[tuple[str, bool]]:
    """Every operator on every device and backend against its specification in float64, values and gradients."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(5, 13, 32, generator=generator), torch.randn(5, 7, 32, generator=generator)
    pids = torch.tensor([0, 1, 0, 2, 3])

    def sdm_reference(image: Tensor, text: Tensor) -> Tensor:
        unit_image, unit_text = (x.mean(1) / x.mean(1).norm(dim=1, keepdim=True) for x in (image, text))
        return sdm_loss_from_scores(unit_text @ unit_image.T, pids, temperature=0.1)

    operators: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "sparse_aggregate": (sparse_aggregate, sparse_aggregate_reference),
        "hard_similarity": (hard_similarity, hard_similarity_reference),
        "sdm_loss": (
            lambda i, t, backend: sdm_loss(i.mean(1), t.mean(1), pids.to(i.device), temperature=0.1, backend=backend),
            sdm_reference,
        ),
    }
    expected = {name: _value_and_grads(reference, image.double(), text.double()) for name, (_, reference) in
                operators.items()}  # fmt: skip
    for device in _devices():
        inputs = image.to(device), text.to(device)
        for backend in ("torch",) if why_not_triton(*inputs) else ("torch", "triton"):
            start = perf_counter()
            errors = {}
            for name, (operator, _) in operators.items():
                try:
                    got = _value_and_grads(operator, *inputs, backend=backend)
                    errors[name] = max(_relative_error(a, b) for a, b in zip(got, expected[name], strict=True))
                except Exception as error:  # a broken installation breaks in many ways, and all of them are news
                    yield f"self-test    {device} {backend}: {name} FAILED: {type(error).__name__}: {error}", False
            seconds = perf_counter() - start
            for name, relative in errors.items():
                if not relative < 1e-4:
                    yield f"self-test    {device} {backend}: {name} FAILED: relative error {relative:.1e}", False
            if errors and all(relative < 1e-4 for relative in errors.values()):
                worst = max(errors.values())
                yield (
                    f"self-test    {device} {backend}: {', '.join(errors)} ok, float32 against float64, values and "
                    f"gradients, relative error at most {worst:.1e}, {seconds:.2f} s",
                    True,
                )


def _value_and_grads(fn: Callable[..., Tensor], *inputs: Tensor, **kwargs: str) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = fn(*leaves, **kwargs)
    # Squares make the cotangent depend on the values.
    return [value.detach(), *torch.autograd.grad(value.square().sum(), leaves)]


def _relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.cpu().double() - expected).abs().max() / expected.abs().max())


# What a codebase can replace


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
        "IDHead(embed_dim, num_identities)(image_features, text_features, {pids}).loss, in place of the classifier",
        "irra",
    ),
    "compute_mlm": Replacement(
        "scores labels",
        "IRRHead(embed_dim, vocab_size)(image_tokens, masked_text_tokens, masked_labels).loss, in place of the "
        "cross-former and its head",
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
    "fmfa_losses.retrieval.retrieval_metrics(text_features, image_features, text_pids, image_pids), which sorts nothing"
)


@dataclass(frozen=True)
class Finding:
    """One line that can be replaced: where, what stands there, and what to write."""

    file: Path
    line: int
    code: str
    write: str
    module: str | None = None  # of fmfa_losses.compat that has the same function


@dataclass(frozen=True)
class Unreadable:
    """A Python file that could not be parsed, and why."""

    file: Path
    reason: str


def migration(path: Path) -> Iterator[str]:
    """The lines of the report on a codebase."""
    found = list(scan(path))
    findings = [item for item in found if isinstance(item, Finding)]
    if not findings:
        yield f"{path}: no call that this library replaces"
    for finding in findings:
        yield f"{finding.file}:{finding.line}: {finding.code}"
        yield f"    -> {finding.write}"
    for item in found:
        if isinstance(item, Unreadable):
            yield f"{item.file}: not read: {item.reason}"
    modules = sorted({finding.module for finding in findings if finding.module})
    if modules:
        # The module of a later codebase has all that IRRA's has.
        named = [module for module in modules if module != "irra"] or modules
        yield ""
        yield "The same results as now, by the import alone (see fmfa_losses.compat):"
        for module in named:
            yield f"    from fmfa_losses.compat import {module} as objectives"


def scan(path: Path) -> Iterator[Finding | Unreadable]:
    """Every call of a published objective, every inline aggregation and every sorting evaluator under `path`."""
    unreadable: list[OSError] = []
    for file in _python_files(path, unreadable.append):
        try:
            with tokenize.open(file) as stream, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the code that is read, not ours
                tree = ast.parse(stream.read(), filename=str(file))
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            yield Unreadable(file, f"{type(error).__name__}: {error}")
            continue
        visitor = _Visitor(file, tree)
        visitor.visit(tree)
        yield from visitor.findings
    yield from (Unreadable(Path(error.filename), f"{type(error).__name__}: {error}") for error in unreadable)


def _python_files(path: Path, on_error: Callable[[OSError], None]) -> Iterator[Path]:
    if path.is_file():
        yield path
    for folder, folders, files in os.walk(path, onerror=on_error if path.is_dir() else None):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


class _Visitor(ast.NodeVisitor):
    def __init__(self, file: Path, tree: ast.Module) -> None:
        self.file = file
        self.findings: list[Finding] = []
        self.functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        self.aliases: dict[str, str] = {}  # local name -> imported name
        self.ours: set[str] = set()  # local names that come from this library
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = node.module if isinstance(node, ast.ImportFrom) else None
                for alias in node.names:
                    local = alias.asname or alias.name.partition(".")[0]
                    if (module or alias.name).partition(".")[0] == "fmfa_losses":
                        self.ours.add(local)
                    elif isinstance(node, ast.ImportFrom):
                        self.aliases[local] = alias.name

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        # What a published function calls inside goes with it; a method of that name is the model's own.
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
            values.update(zip(names, map(ast.unparse, node.args), strict=False))
        values.update((k.arg, ast.unparse(k.value)) for k in node.keywords if k.arg in values)
        return replacement.write.format_map(values)

    def _add(self, node: ast.stmt | ast.expr, write: str, module: str | None = None) -> None:
        self.findings.append(Finding(self.file, node.lineno, ast.unparse(node), write, module))
