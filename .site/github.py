"""What GitHub reads otherwise than Python-Markdown does: pages are written for GitHub and built with the other.

Lists that follow a paragraph without an empty line, a label after the language of a block of code, and `\\|` inside
code in a table, are mended; what is inside a list and indented by less than 4 is a warning.
"""

import logging
import re

log = logging.getLogger("mkdocs.hooks.github")
LABEL = re.compile(r"^(```\w+) [\w-]+$", re.M)
FENCED = re.compile(r"(^```.*?^```$|^\$\$$.*?^\$\$$)", re.M | re.S)
NARROW = re.compile(r"^ {1,3}(?:[-*+] |\d+\. |```)", re.M)
LIST = re.compile(r"^(?![-*+] |\d+\. | |#|$)(.+)\n(?=(?:[-*+]|1\.) )", re.M)
CELL = re.compile(r"<td.*?</td>", re.S)


def on_page_markdown(markdown, page, **_):
    pieces = FENCED.split(LABEL.sub(r"\1", markdown))
    for equation in pieces[1::2]:
        if equation.startswith("$$") and (found := re.search(r"^[-+*] .*", equation, re.M)):
            log.warning("%s: GitHub takes a line of an equation for a list: %r", page.file.src_uri, found[0])
    for i in range(0, len(pieces), 2):
        for found in NARROW.finditer(pieces[i]):
            log.warning("%s: indent by 4 what is inside a list: %r", page.file.src_uri, found[0])
        pieces[i] = LIST.sub(r"\1\n\n", pieces[i])
    return "".join(pieces)


def on_page_content(content, **_):
    return CELL.sub(lambda cell: cell[0].replace("\\|", "|"), content)
