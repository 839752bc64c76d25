"""docs/doctor.md shows what doctor prints, and names its limits and its JSON as they are."""

import dataclasses
import re
from pathlib import Path

from fmfa_losses.doctor import codebase, diagnosis
from fmfa_losses.doctor.codebase import Finding, Import, Limits, Missing, Suggestion, examine, parser
from fmfa_losses.doctor.codebase.report import SCHEMA, as_text

PAGE = (Path(__file__).parents[2] / "docs/doctor.md").read_text(encoding="utf-8")


def test_the_transcript_is_what_doctor_prints(tmp_path, monkeypatch):
    for name, text in re.findall(r"^```python\n# (\S+)\n(.*?)^```", PAGE, re.M | re.S):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    printed = "\n".join(as_text(examine(Path("."))))
    assert printed == re.search(r"^```text\n(The same values.*?)\n```", PAGE, re.M | re.S)[1]


def test_the_limits_and_codes_of_the_page():
    limits = Limits()
    assert (
        f"At most {limits.files:,} files, {limits.size // 2**20} MiB" in PAGE and f"and {limits.seconds:g} s;" in PAGE
    )
    assert limits.entries == 10**6 and f"{parser.SECONDS} s a file" in PAGE
    for code in (0, diagnosis.UNHEALTHY, 2, diagnosis.FOUND):
        assert f"| {code} | " in PAGE
    assert f"schema         {SCHEMA}. " in PAGE


def test_the_json_of_the_page_has_every_field():
    for fields in (Finding, Import, Suggestion, Missing, codebase.Unreadable):
        names = {field.name for field in dataclasses.fields(fields)}
        assert any(set(shown.split(", ")) == names for shown in re.findall(r"\[\{(.*?)\}\]", PAGE)), names
