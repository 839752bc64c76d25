"""The site: built once without a warning; what its pages link to is there; the reference has every public name."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from html import unescape
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

import fmfa_losses
from benchmarks import ROOT

# What a user imports from besides the package itself.
MODULES = ("functional", "retrieval", "distributed", "noise", "plot", "doctor", *(
    f"compat.{name}" for name in fmfa_losses.compat.__all__))  # fmt: skip


def hook(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / f".site/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, and of every page its text."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder, {page: page.read_text(encoding="utf-8") for page in folder.rglob("*.html")}


def test_links_of_the_site_lead_somewhere(site):
    folder, pages = site
    anchors = {page: set(re.findall(r'\b(?:id|name)="([^"]+)"', text)) for page, text in pages.items()}
    missing = []
    for page, text in pages.items():
        if page.name == "404.html":
            continue  # its links begin at the address of the site
        for target in re.findall(r'\b(?:href|src)="([^"]+)"', text):
            link = urlsplit(target)
            if link.scheme or link.netloc:
                continue
            file = (page.parent / unquote(link.path)).resolve() if link.path else page
            file = file / "index.html" if file.is_dir() else file
            here = anchors.get(file, set())
            known = (
                not link.fragment or link.fragment.startswith("__") or {link.fragment, unquote(link.fragment)} & here
            )
            if not file.exists() or not known:
                missing.append(f"{page.relative_to(folder)}: {target}")
    assert not missing


def test_a_page_asks_no_other_host(site):
    _, pages = site
    text = "".join(pages.values())
    loads = re.findall(r'<(?:script|img|iframe)\b[^>]*\bsrc="([^"]+)"', text)
    loads += re.findall(r'<link\b[^>]*rel="stylesheet"[^>]*href="([^"]+)"', text)
    assert len(loads) > len(pages)
    assert not [target for target in loads if urlsplit(target).netloc]


def test_nothing_is_left_unread(site):
    folder, pages = site
    raw = re.compile(r'```|class="arithmatex"|<autoref|::: fmfa|<p>\$\$')
    left = []
    for page, text in pages.items():
        shown = re.sub(r"<script.*?</script>", "", text, flags=re.S)
        left += [f"{page.relative_to(folder)}: {shown[found.start() :][:60]}" for found in raw.finditer(shown)]
    assert not left
    assert any("<math" in text for text in pages.values())


def test_the_reference_has_every_public_name(site):
    _, pages = site
    text = "".join(text for page, text in pages.items() if page.parent.name == "api")
    shown = {unescape(name) for name in re.findall(r'<h[23] id="([^"]+)" class="doc', text)}
    public = {f"fmfa_losses.{name}" for name in fmfa_losses.__all__ if name != "functional"} | {
        "fmfa_losses.cached.cached_backward"
    }
    for name in MODULES:
        public |= {f"fmfa_losses.{name}.{each}" for each in importlib.import_module(f"fmfa_losses.{name}").__all__}
    for file in (ROOT / "fmfa_losses/integrations").glob("[!_]*.py"):
        names = re.search(r"^__all__ = \[(.*?)\]", file.read_text(encoding="utf-8"), re.M | re.S)
        public |= {f"fmfa_losses.integrations.{file.stem}.{each}" for each in re.findall(r'"(\w+)"', names[1])}
    missing = sorted(public - shown)
    assert not missing


@pytest.mark.parametrize(
    ("latex", "says"),
    [
        (r"\foo x", "does not know: "),
        (r"\frac{1}", "lacks an argument"),
        (r"x_", "no equation"),
        (r"{a", "braces"),
        (r"\begin{aligned} a &= b \end{aligned}", "no equation"),
        (r"\operatorname*{arg\,max}_k x", "operatorname"),
        (r"\left( a", "no equation"),
    ],
)
def test_a_wrong_equation_is_refused(latex, says):
    equations = hook("equations")
    with pytest.raises(equations.EquationError, match=re.escape(says)):
        equations.mathml(latex, display=True)


def test_equations_become_mathml():
    mathml = hook("equations").mathml
    text = mathml(r"f = \begin{cases} \frac{1}{2} & x \ge 0 \\ 0 & \text{else} \end{cases}", display=True)
    assert 'display="block"' in text and text.count("<mtr>") == 2 and "<mfrac>" in text
    assert "𝟙" in mathml(r"\mathbb{1}", display=False) and "{" not in mathml(r"\mathbf{v}", display=False)
    assert mathml(r"\{a, b\}", display=False).count("<mo") == 3


def test_links_out_of_docs_lead_to_the_repository():
    rewritten = hook("repository").rewritten
    assert rewritten("[a](../benchmarks/x.json)", "cpu.md", "R") == "[a](R/blob/main/benchmarks/x.json)"
    assert rewritten("[a](../../CONTRIBUTING.md#b)", "recipes/rde.md", "R") == "[a](../contributing.md#b)"
    assert rewritten("[a](docs/recipes/rde.md#b)", "../CHANGELOG.md", "R") == "[a](recipes/rde.md#b)"
    for same in ("[a](rde.md#b)", "[a](#b)", "[a](https://x.org/../y)"):
        assert rewritten(same, "recipes/irra.md", "R") == same


def test_what_github_reads_otherwise(caplog):
    github, page = hook("github"), SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    assert github.on_page_markdown("A:\n- b\n- c", page) == "A:\n\n- b\n- c"
    assert github.on_page_markdown("- a\n  goes on\n- b", page) == "- a\n  goes on\n- b"
    assert github.on_page_markdown("```diff same\n-a\n```", page) == "```diff\n-a\n```"
    assert github.on_page_content(r"<td><code>a \| b</code></td>") == "<td><code>a | b</code></td>"
    github.on_page_markdown("$$\na +\nb\n$$", page)
    assert not caplog.records
    github.on_page_markdown("$$\na\n+ b\n$$", page)
    assert "equation for a list" in caplog.text
    github.on_page_markdown("- a\n  - b", page)
    assert "indent by 4" in caplog.text


def test_names_lead_to_the_reference():
    linked = hook("references").linked
    names = {"TALLoss": "fmfa_losses.TALLoss"}
    assert linked("<p><code>TALLoss(margin=1)</code></p>", names).startswith(
        '<p><autoref identifier="fmfa_losses.TALLoss"'
    )
    for same in ("<h2><code>TALLoss</code></h2>", "<a href='x'><code>TALLoss</code></a>", "<code>Other</code>"):
        assert linked(same, names) == same


def test_paths_lead_to_files():
    def of(text):
        return hook("references").leading_to_files(text, ROOT, "https://host/us")

    file, folder = "benchmarks/results/micro_cpu.json", "tests/gpu"
    assert of(f"<code>{file}</code>") == f'<a href="https://host/us/blob/main/{file}"><code>{file}</code></a>'
    assert of(f"<code>{folder}</code>") == f'<a href="https://host/us/tree/main/{folder}"><code>{folder}</code></a>'
    for text in (
        "<code>benchmarks/none.json</code>",
        f"<pre><code>{file}</code></pre>",
        f'<a href="x"><code>{file}</code></a>',
    ):
        assert of(text) == text


def test_names_of_files_become_titles():
    titled = hook("references").titled
    shown = titled('<a href="../pitfalls.html#x">pitfalls.md</a>', "recipes/irra.md", ROOT / "docs")
    assert shown == '<a href="../pitfalls.html#x">Mistakes without an error message</a>'
    for same in ('<a href="pitfalls.html">here</a>', '<a href="https://x.org/a.html">a.md</a>'):
        assert titled(same, "irra.md", ROOT / "docs") == same


def test_a_docstring_becomes_markdown():
    text, names = hook("docstrings").markdown(
        """Says it, with p_i * q_i < 1; ITCLoss too.

            L = p_i * q_i

        Args:
            a, b: [B, D], as in
                two lines.
        Example:
            >>> 1
            1

        Reference: Somebody.
        """
    )
    assert names == {"Args": ["a", "b"]}
    assert r"p\_i \* q\_i &lt; 1; `ITCLoss` too" in text and "```text\nL = p_i * q_i\n```" in text
    assert "-   `a`, `b`: \\[B, D\\], as in" in text and "```pycon\n>>> 1\n1\n```" in text
    assert "**Reference** Somebody." in text


def test_the_example_of_the_first_page():
    page = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    namespace = {}
    exec(example, namespace)
    assert namespace["loss"].isfinite()
