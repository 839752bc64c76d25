"""What a release is made of: one version, extras that lead somewhere, workflows whose commands exist."""

import re
import subprocess
import sys

import pytest
import yaml

import fmfa_losses
from benchmarks import ROOT

tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
PACKAGE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
WORKFLOWS = {
    file.name: yaml.safe_load(file.read_text(encoding="utf-8")) for file in (ROOT / ".github/workflows").glob("*.yml")
}
JOBS = [(name, job) for name, workflow in WORKFLOWS.items() for job in workflow["jobs"].values()]
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def test_the_version_stands_in_one_place():
    assert "version" in PACKAGE["project"]["dynamic"] and "version" not in PACKAGE["project"]
    assert PACKAGE["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "fmfa_losses.__version__"
    assert CITATION["version"] == fmfa_losses.__version__


def test_the_citation_has_the_date_of_the_changelog():
    """Neither has one before the release."""
    version = re.escape(fmfa_losses.__version__)
    dated = re.findall(rf"^## \[{version}\] - (\d{{4}}-\d\d-\d\d)$", CHANGELOG, re.M)
    released = CITATION.get("date-released")
    assert ([str(released)] if released else []) == dated


def test_the_changelog_is_in_the_form_it_names():
    headings = re.findall(r"^## (.+)$", CHANGELOG, re.M)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading) for heading in headings[1:])
    for heading in headings:
        name = heading.partition("]")[0] + "]"
        assert f"\n{name}: https://" in CHANGELOG, "every heading is a link, defined at the end"


def test_the_citation_names_the_papers():
    papers = {paper["url"].rpartition("/")[2]: paper for paper in CITATION["references"]}
    assert set(papers) == {"2509.13754", "2303.12501", "2401.09865", "2308.09911"}  # FMFA, IRRA, SPARC, RDE
    for number, paper in papers.items():
        assert paper["authors"] and paper["year"] and ("journal" in paper or "collection-title" in paper)
        assert paper["doi"] in ("10.1145/3786798", f"10.48550/arXiv.{number}")


def test_an_extra_is_for_what_a_wheel_has():
    """Whatever belongs to tests/, docs/ and benchmarks/, which are not installed, is a group of a checkout."""
    extras = PACKAGE["project"]["optional-dependencies"]
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "fmfa_losses").rglob("*.py"))
    for extra in extras:
        assert f'pip install "fmfa-losses[{extra}]"' in code, "the error of what is missing names its extra"
    assert not set(extras) & set(PACKAGE["dependency-groups"])


def test_addresses():
    urls = PACKAGE["project"]["urls"]
    assert set(urls) == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    assert CITATION["repository-code"] == urls["Source"] and CITATION["url"] == urls["Documentation"]
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    assert (site["repo_url"], site["site_url"]) == (urls["Source"], urls["Documentation"])


def test_workflows_call_commands_that_exist():
    """Rows of a matrix bring some of them."""
    commands = []
    for _, job in JOBS:
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [])
        commands += [row["command"] for row in rows]
        commands += [step["run"] for step in job["steps"] if "run" in step and "${{" not in step["run"]]
    assert ".ci/run" in commands
    for command in commands:
        first, *words = command.split()
        assert first == ".ci/run" or (first == "make" and words[0] in TARGETS), command
    for target in re.findall(r"^make (\S+)", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.M):
        assert target in TARGETS or target.startswith("test-triton-")


def test_ci_has_every_python_of_the_classifiers():
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", c) for c in PACKAGE["project"]["classifiers"])
    pythons = [match[1] for match in found if match]
    assert WORKFLOWS["ci.yml"]["jobs"]["run"]["strategy"]["matrix"]["python"] == pythons
    assert PACKAGE["project"]["requires-python"] == f">={pythons[0]}"


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_a_workflow_may_read_and_only_its_last_job_more(name):
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    allowed = {"release.yml": {"id-token": "write"}, "docs.yml": {"id-token": "write", "pages": "write"}}
    *others, last = workflow["jobs"].values()
    assert last.get("permissions", {}) == allowed.get(name, {})
    assert not any("permissions" in job for job in others)
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", action) for action in used)


def test_the_archive_check_names_what_is_wrong():
    """A wheel that does not belong to the tag is refused before anything is published."""
    code = (
        "import runpy, pathlib; check = runpy.run_path('.ci/archives.py')['check_tag'];"
        "check(pathlib.Path('fmfa_losses-9.9.9-py3-none-any.whl'), {!r})"
    )
    for tag, said in (("v9.9", "the tag must be v and"), ("v9.9.9", "CHANGELOG.md must have a heading with the date")):
        done = subprocess.run([sys.executable, "-c", code.format(tag)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and said in done.stderr
