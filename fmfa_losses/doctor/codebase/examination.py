"""Reads a tree and puts its files' facts together: which function a call reaches, and what to write for it.

A published name is taken for the published function when the call fits its parameters and, where the tree has the
definition, so do the definition's. Where the body differs from the published equation, the finding says so.
"""

from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from .differences import own_defaults, published_shape, why_not
from .files import LeftOut, Limits, Unreadable, files
from .findings import Examination, Finding, Import, Suggestion
from .imports import Imported, import_advice
from .parser import Parser
from .ranking_advice import ranking_advice
from .shape_advice import SHAPES, shape_advice
from .source.published import BODIES, MODULES, PUBLISHED, USES
from .suggestions import advice
from .tree import Tree

__all__ = ["examine", "scan"]

NOT_OURS = "fmfa_losses.compat has no function of this name"
NOT_READ = "which metrics your own code makes of the ranking is not read: compare one evaluation before you replace it"


def scan(path: Path | str, limits: Limits | None = None) -> Iterator[Finding | Import | Unreadable | LeftOut]:
    """Every line under `path` that this library can replace, then imports to change, then what was not read."""
    found = examine(Path(path), limits)
    yield from found.findings
    yield from found.imports
    yield from found.unreadable
    yield from found.left_out


def examine(path: Path, limits: Limits | None = None) -> Examination:
    """Every line under `path` that this library can replace, and what was not read.

    Python files and notebooks are parsed, in another process; nothing is imported or run. Hidden, built and installed
    folders are left out, links to folders are not followed, and `limits` bound files, bytes and seconds.
    """
    found = Examination(path)
    limits = limits or Limits()
    calls = 0
    tree = Tree(path)
    parser = Parser()
    try:
        for item in files(path, limits):
            if isinstance(item, Unreadable):
                found.unreadable.append(item)
            elif isinstance(item, LeftOut):
                found.left_out.append(item)
            else:
                file, source = item
                found.files += 1
                facts, unread = parser(source, notebook=file.suffix == ".ipynb")
                if unread is not None:
                    found.unreadable.append(Unreadable(file, unread))
                if facts is not None:
                    tree.add(file, facts)
                    calls += sum(len(facts[kind]) for kind in ("calls", "rankings", "aggregations"))
                    if facts["cut"]:
                        found.left_out.append(LeftOut(file, "more calls than a report needs: the rest was left out"))
                if calls >= limits.calls:
                    reason = f"the limit of {limits.calls} calls is reached: what comes after was not read"
                    found.left_out.append(LeftOut(file, reason))
                    break
    finally:
        parser.end()
    for file, facts in tree.files.items():
        if not tree.is_left_behind(file):
            _judge(file, facts, tree, found)
    return found


def _judge(file: Path, facts: dict[str, Any], tree: Tree, found: Examination) -> None:
    findings: list[Finding] = []
    imports: dict[tuple[int, str], Imported] = {}
    calls = [call for call in facts["calls"] if not _is_other_framework(call)]
    for call in calls:
        _judge_call(file, call, tree, findings, imports)
    for other in facts["others"]:
        _miss(other["callee"], other["line"], imports)
    findings += (_aggregation(file, item) for item in facts["aggregations"])
    called = {item["callee"]["name"] for item in facts["rankings"] if item["callee"] and item["callee"]["defined"]}
    for item in facts["rankings"]:
        if not (item["inline"] and item.get("function") in called):  # the calls are reported
            findings += _ranking(file, item, tree)
    found.findings += sorted(findings, key=lambda finding: (finding.cell or 0, finding.line))
    found.imports += (import_advice(file, imported) for imported in imports.values() if imported.called)


def _is_other_framework(call: dict[str, Any]) -> bool:
    """ViLT and its descendants have `objectives.compute_mlm(self, batch)`."""
    return bool(call["arguments"][:1]) and call["arguments"][0] in ("self", "pl_module") and not call["shapes"]


def _judge_call(
    file: Path, call: dict[str, Any], tree: Tree, findings: list[Finding], imports: dict[tuple[int, str], Imported]
) -> None:
    callee = call["callee"]
    name = callee["name"]
    if call["class"] is not None:
        definition, shapes = None, tree.method(file, call["class"], callee["name"])
    else:
        definition = tree.definition(file, callee)
        shapes = call["shapes"] or (definition or {}).get("shapes", [])
    imported = _imported(imports, call) if callee["module"] is not None else None
    if call["class"] is not None or name not in PUBLISHED:
        found = shape_advice(shapes, call) if shapes and shapes[0]["name"] not in ("identity", "words") else None
        if found is not None:  # cross-entropies are everywhere: by the published names alone
            findings.append(_finding(file, call, *found))
        elif imported is not None and callee["name"].startswith("compute_"):
            imported.missing[callee["name"], NOT_OURS].append(call["line"])
        return
    other = why_not(call, name, definition)
    changed = {} if other is not None else own_defaults(call, name, definition)
    if changed:
        ours = ", ".join(f"{key}={PUBLISHED[name].defaults[key]}" for key in changed)
        other = f"yours has {', '.join(f'{key}={value}' for key, value in changed.items())}, the published one {ours}"
    if other is not None and imported is not None:
        imported.missing[callee["name"], other].append(call["line"])
        imported = None
    if other is not None and not changed:
        found = shape_advice(shapes, call) if shapes else None
        if found is not None:  # by position or name it is another function, and yet the same equation
            findings.append(_finding(file, call, *found))
        return
    if changed and not call["unpacked"]:
        call = {**call, "keywords": call["keywords"] | changed}
    elif changed:
        return
    if not call["unpacked"]:
        arguments, passed = _arguments(call, name)
        returns, _, suggestions = advice(name, passed, arguments)
    else:
        arguments = {}
        module = next(module for module, names in MODULES.items() if name in names)
        passed = "(" + call["code"].partition("(")[2]
        suggestions = (Suggestion(f"compat.{module}.{name}{passed}", True, "its arguments are unpacked: not read"),)
        returns = "what the published function returns"
    weighted = name == "compute_sdm" and arguments.get("use_weight", "False") != "False"
    note = _note(name, definition, weighted)
    findings.append(_finding(file, call, name, returns, suggestions, note))
    if imported is not None:
        imported.notes += [note] if note else []
        if imported.names:
            imported.aliases[name] = call["function"]
        imported.called["compute_sdm(use_weight)" if weighted else name].append(call["line"])


def _miss(callee: dict[str, Any], line: int, imports: dict[tuple[int, str], Imported]) -> None:
    """What a module of objectives has besides, such as a class: its import must stay."""
    imported = imports.get((callee["line"], callee["text"]))
    if imported is not None:
        lines = imported.missing[callee["name"], NOT_OURS]
        if line not in lines:
            lines.append(line)


def _imported(imports: dict[tuple[int, str], Imported], call: dict[str, Any]) -> Imported:
    callee = call["callee"]
    key = callee["line"], callee["text"]
    if key not in imports:
        local, dot, _ = call["function"].rpartition(".")
        imports[key] = Imported(callee["line"], callee["text"], call["cell"], callee["star"], not dot, local)
    return imports[key]


def _arguments(call: dict[str, Any], name: str) -> tuple[dict[str, str], str]:
    """The text of every argument, defaults included, and what the call passes, in brackets."""
    published = PUBLISHED[name]
    given = dict(zip(published.parameters, call["arguments"], strict=False)) | call["keywords"]
    passed = [*call["arguments"], *(f"{key}={value}" for key, value in call["keywords"].items())]
    return published.defaults | given, f"({', '.join(passed)})"


def _note(name: str, definition: dict[str, Any] | None, weighted: bool) -> str:
    """What to compare first: a body that is neither the equation nor written as published, its own or one it calls."""
    if definition is None:
        return ""
    published = "compute_mlm" if name == "compute_mcm_or_mlm" else name
    other = None
    if published in SHAPES.values() and published_shape(published, definition) is None:
        other = name
    for part in (name, *USES.get(name, ())):
        there = definition["beside"].get(part)
        if other is None and there is not None and part in BODIES and (part != "compute_sdm" or weighted):
            other = None if there["digest"] in BODIES[part] else part
    if other is None:
        return ""
    where = f"{PurePath(definition['file']).name}:{definition['beside'][other]['line']}"
    return f"your {other} ({where}) is not written as the published one: compare both on a batch before you replace it"


def _finding(
    file: Path, call: dict[str, Any], name: str, returns: str, suggestions: tuple[Suggestion, ...], note: str = ""
) -> Finding:
    return Finding(file, call["line"], call["code"], "objective", name, returns, suggestions, note, call["cell"])


def _aggregation(file: Path, item: dict[str, Any]) -> Finding:
    text, image = item["text_tokens"], item["image_tokens"]
    suggestions = (
        Suggestion(f"compat.fmfa.compute_agg_v({text}, {image})", True, f"for lines {item['line']} to {item['end']}"),
        Suggestion(
            f"sparse_aggregate({image}, {text})",
            False,
            "the paper keeps a patch from the threshold 1/N on, the code above it; EFALoss does it itself",
        ),
    )
    code = item["code"]
    return Finding(file, item["line"], code, "aggregation", "compute_agg_v", "[B, L, D]", suggestions, "", item["cell"])


def _ranking(file: Path, item: dict[str, Any], tree: Tree) -> Iterator[Finding]:
    published, note = False, NOT_READ
    if not item["inline"]:
        parameters = list(PUBLISHED["rank"].parameters)
        definition = tree.definition(file, item["callee"])
        if definition is None:
            published = item["named"]
        else:
            published = definition["parameters"] == parameters
        # A rank of other parameters may sort distances: it must sort similarities, the highest first.
        alike = definition is not None and definition["ranks"] and definition["parameters"][:3] == parameters[:3]
        if not published and not alike:
            return
        if published and (definition is None or definition["digest"] in BODIES["rank"]):
            note = ""
    returns, suggestions = ranking_advice(item, published)
    yield Finding(file, item["line"], item["code"], "ranking", "rank", returns, suggestions, note, item["cell"])
