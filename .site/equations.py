"""Equations become MathML when the site is built, so that it needs no script. What does not become MathML is a warning.

latex2mathml lets pass what it does not know, so what it makes is checked.
"""

import html
import logging
import re
from xml.etree import ElementTree

from latex2mathml.converter import convert

log = logging.getLogger("mkdocs.hooks.equations")
# What pymdownx.arithmatex leaves of $...$ and $$...$$.
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
CHILDREN = {
    **dict.fromkeys(("mfrac", "mroot", "msub", "msup", "munder", "mover"), 2),
    **dict.fromkeys(("msubsup", "munderover"), 3),
}
# Browsers no longer style letters by attribute (MathML Core); a bold digit has a character of its own.
# log, max, softmax: names of functions, with the space that TeX has around them.
FUNCTION = re.compile(r"<m([io])>([A-Za-z]{2,})</m\1>(?=((?:</m\w+>|<mrow>)*<mo[^>]*>(?:&#x00028;|&#x0005B;|[(\[])<)?)")
DOUBLE_STRUCK = str.maketrans("0123456789", "𝟘𝟙𝟚𝟛𝟜𝟝𝟞𝟟𝟠𝟡")


class EquationError(ValueError):
    """LaTeX that the site cannot show."""


def mathml(latex: str, *, display: bool) -> str:
    """One equation."""
    latex = latex.strip()
    braces = re.sub(r"\\.", "", latex)
    if braces.count("{") != braces.count("}"):
        raise EquationError(f"{latex!r} has {braces.count('{')} opening braces and {braces.count('}')} closing ones")
    if r"\operatorname*" in latex:
        raise EquationError(f"{latex!r}: write \\operatorname{{...}} with \\limits, not \\operatorname*")
    try:
        markup = convert(latex, display="block" if display else "inline")
        tree = ElementTree.fromstring(markup)
    except Exception as error:
        raise EquationError(f"{latex!r} is no equation: {type(error).__name__} {error}") from error
    for element in tree.iter():
        name, text = element.tag.rpartition("}")[2], element.text or ""
        if len(element) != CHILDREN.get(name, len(element)):
            raise EquationError(f"{latex!r} lacks an argument of a command ({name} needs {CHILDREN[name]})")
        if (name in ("mi", "mo", "mn") and not text.strip()) or (name != "mtext" and re.search(r"[\\&]\w*", text)):
            raise EquationError(f"{latex!r} has something the site does not know: {text or 'an empty symbol'}")
    markup = FUNCTION.sub(_spaced, markup)
    return re.sub(
        r'<m([nio]) mathvariant="double-struck">(\d+)<',
        lambda digits: f"<m{digits[1]}>{digits[2].translate(DOUBLE_STRUCK)}<",
        markup,
    )


def _spaced(name: re.Match) -> str:
    after = "0" if name[3] else "0.167em"
    return f'<mo lspace="0.167em" rspace="{after}" movablelimits="false">{name[2]}</mo>'


def on_page_content(content, page, **_):
    def one(match):
        try:
            display = match[2] == "["
            markup = mathml(html.unescape(match[3]), display=display)
            return markup if display else f'<span class="inline-equation">{markup}</span>'
        except EquationError as error:
            log.warning("%s: %s", page.file.src_uri, error)
            return match[0]

    return EQUATION.sub(one, content)
