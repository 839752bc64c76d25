"""Docstrings of the package as Markdown for the API reference, and the signatures that Python sees.

Docstrings are plain text for `help()`: sections with a name each, code between backticks, equations indented. An
extension of griffe turns them into Markdown, and warns of arguments that the signature does not have. Losses declare
their hyperparameters as attributes and get their signature when Python imports them, so it is taken from there.
"""

import importlib
import inspect
import logging
import re
import textwrap

import griffe

log = logging.getLogger("mkdocs.hooks.docstrings")
NAMED = ("Args", "Inputs", "Attributes")
SECTION = re.compile(r"^(Args|Inputs|Attributes|Returns|Raises|Example):$")
LABEL = re.compile(r"^(Reference|Source|Quirks?|Memory|Dtypes): ")
NAME = re.compile(r"\b([A-Z]\w*(?:Loss|Head|Queue|Metrics|Selection|Division)(?:\.\w+)?)\b")
CODE = re.compile(r"(`[^`]+`)")
ITEM = re.compile(r"(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*): *(?P<text>.*)", re.S)


def prose(text: str) -> str:
    """Plain text as Markdown: nothing but backticks has a meaning, and names of pages become links."""
    pieces = re.split(CODE, text)
    text = "".join(piece if i % 2 else NAME.sub(r"`\1`", piece) for i, piece in enumerate(pieces))
    pieces = re.split(CODE, text)
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"([*_$\[\]])", r"\\\1", pieces[i]).replace("<", "&lt;")
        pieces[i] = re.sub(r"\bdocs/([\w/\\]+)\.md\b", _page, pieces[i])
    return "".join(pieces)


def _page(match: re.Match) -> str:
    page = match[1].replace("\\", "")
    return f"[{page}.md](../{page}.md)"


def paragraphs(text: str) -> str:
    """Blank lines separate paragraphs; an indented one is an equation or a table, shown as it is."""
    blocks = re.split(r"\n\n+", text.strip("\n"))
    shown = []
    for block in blocks:
        if block.startswith("    ") or ">>> " in block:
            shown.append(f"```text\n{textwrap.dedent(block)}\n```")
        elif label := LABEL.match(block):
            shown.append(f"**{label[1]}** {prose(block[label.end() :])}")
        else:
            shown.append(prose(block))
    return "\n\n".join(shown)


def items(body: str) -> list[tuple[list[str], str]]:
    """`names: text` of every item; text goes on where lines are indented further."""
    found = []
    for item in re.split(r"\n(?=\S)", body):
        match = ITEM.match(item)
        if match is None:
            raise ValueError(f"not `name: text`: {item!r}")
        first, _, rest = match["text"].partition("\n")
        found.append((match["names"].split(", "), f"{first}\n{textwrap.dedent(rest)}".strip()))
    return found


def markdown(docstring: str) -> tuple[str, dict[str, list[str]]]:
    """The docstring as Markdown, and the names that each of its sections documents."""
    shown, names, plain = [], {}, []
    lines = inspect.cleandoc(docstring).split("\n")
    i = 0
    while i < len(lines):
        title = SECTION.match(lines[i])
        if title is None:
            plain.append(lines[i])
            i += 1
            continue
        end = next((j for j in range(i + 1, len(lines)) if lines[j] and lines[j][0] != " "), len(lines))
        shown, plain = [*shown, paragraphs("\n".join(plain))], []
        body = textwrap.dedent("\n".join(lines[i + 1 : end])).strip("\n")
        shown.append(f"**{title[1]}**\n")
        if title[1] in (*NAMED, "Raises"):
            entries = items(body)
            names[title[1]] = [name for group, _ in entries for name in group]
            for group, text in entries:
                heads = ", ".join(f"`{name}`" for name in group)
                shown[-1] += "\n" + textwrap.indent(f"{heads}: {prose(text)}", "    ").replace("    ", "-   ", 1)
        elif title[1] == "Example":
            shown.append(f"```pycon\n{body}\n```")
        else:
            shown.append(paragraphs(body))
        i = end
    return "\n\n".join(block for block in [*shown, paragraphs("\n".join(plain))] if block), names


def takes(one: griffe.Object, section: str) -> set[str]:
    """The names that a section may document: arguments, or for Inputs those of the call, or of a metric's update."""
    if section == "Attributes":
        return set(one.members)
    if section == "Inputs":
        call = one.members.get("update", one.members.get("forward"))
        return set(inspect.signature(_imported(one).forward).parameters) if call is None else names_of(call)
    inherits = one.is_class and "__init__" not in one.members
    return set(inspect.signature(_imported(one)).parameters) if inherits else names_of(one)


def names_of(one: griffe.Object) -> set[str]:
    return {parameter.name for parameter in one.parameters}


def parameters(thing: object, *first: str) -> griffe.Parameters:
    """What Python sees, written as in the source, after the names of `first`."""
    shown = [griffe.Parameter(name, kind=griffe.ParameterKind.positional_or_keyword) for name in first]
    for one in inspect.signature(thing).parameters.values():
        default = None if one.default is one.empty else repr(one.default)
        kind = getattr(griffe.ParameterKind, one.kind.name.lower())
        shown.append(griffe.Parameter(one.name, annotation=_annotation(one.annotation), kind=kind, default=default))
    return griffe.Parameters(*shown)


def _annotation(annotation: object) -> str | None:
    if annotation is inspect.Parameter.empty:
        return None
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\bUnion\[(.*), (Literal\[.*\])\]", r"\1 | \2", text)
    return re.sub(r"\b(?:torch|typing|collections\.abc|fmfa_losses(?:\.\w+)*)\.(?=\w)", "", text)


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        self._visit(pkg)

    def _visit(self, parent: griffe.Object) -> None:
        for one in list(parent.members.values()):
            if one.is_alias or (one.name.startswith("_") and not one.is_module):
                continue
            if one.is_module or one.is_class:
                self._visit(one)
            if one.docstring and not one.path.startswith("fmfa_losses.kernels"):
                self._rewrite(one)

    def _rewrite(self, one: griffe.Object) -> None:
        if one.is_function and any(str(decorator.value).startswith("functional(") for decorator in one.decorators):
            one.parameters = parameters(_imported(one))
        elif one.is_class and one.bases and "__init__" not in one.members:
            thing = _imported(one)
            if hasattr(thing, "of") or hasattr(thing, "_fields"):  # a loss, or a named tuple
                start = griffe.Function("__init__", parameters=parameters(thing, "self"), parent=one)
                one.set_member("__init__", start)
        try:
            one.docstring.value, names = markdown(one.docstring.value)
        except ValueError as error:
            log.warning("%s: %s", one.path, error)
            return
        for section, documented in names.items():
            missing = [name for name in documented if section != "Raises" and name not in takes(one, section)]
            if missing:
                log.warning("%s: %s documents %s, which it does not take", one.path, section, ", ".join(missing))


def _imported(one: griffe.Object) -> object:
    thing = importlib.import_module(one.module.path)
    for name in one.path.removeprefix(one.module.path).split(".")[1:]:
        thing = getattr(thing, name)
    return thing
