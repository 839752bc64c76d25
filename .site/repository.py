"""The repository in the site: CHANGELOG.md and CONTRIBUTING.md as pages, and links out of docs/ that lead to files.

In Markdown every link is relative and works in any checkout, branch and fork; on the site, what is no page is a file of
the repository's main branch.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def rewritten(text: str, page: str, repository: str) -> str:
    """The links of a page of the site, `page` being its path from docs/ ("../CHANGELOG.md" for one of the root)."""
    folder = posixpath.dirname(page)

    def one(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))  # from docs/
        outside = target.removeprefix("../")
        if outside in PAGES:
            target = PAGES[outside]
        elif outside.startswith("docs/"):
            target = outside.removeprefix("docs/")
        elif target == outside:
            return match[0]
        else:
            return f"]({repository}/blob/main/{outside}{match[2] or ''})"
        start = "" if folder == ".." else folder
        return f"]({posixpath.relpath(target, start or '.')}{match[2] or ''})"

    return LINK.sub(one, text)


def on_files(files, config, **_):
    root = Path(config.config_file_path).parent
    for source, page in PAGES.items():
        text = rewritten((root / source).read_text(encoding="utf-8"), f"../{source}", config.repo_url)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, **_):
    return rewritten(markdown, page.file.src_uri, config.repo_url)
