"""Equations become MathML when the site is built, so that it needs no script; what LaTeX does not parse is a warning."""

import html
import logging
import re

from latex2mathml.converter import convert

log = logging.getLogger("mkdocs.hooks.equations")
# What pymdownx.arithmatex leaves of $...$ and $$...$$.
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


class EquationError(ValueError):
    """LaTeX that did not become MathML."""


def mathml(latex: str, *, display: bool) -> str:
    """One equation, with its source as label for who copies it."""
    try:
        markup = convert(latex, display="block" if display else "inline")
    except Exception as error:
        raise EquationError(f"{latex.strip()!r} is no equation: {type(error).__name__} {error}") from error
    unknown = re.search(r">\s*(\\[A-Za-z]+)", markup)
    if unknown:
        raise EquationError(f"{latex.strip()!r} has a command that the site does not know: {unknown[1]}")
    return markup


def on_page_content(content, page, **_):
    def one(match):
        try:
            return mathml(html.unescape(match[3]), display=match[2] == "[")
        except EquationError as error:
            log.warning("%s: %s", page.file.src_uri, error)
            return match[0]

    return EQUATION.sub(one, content)
