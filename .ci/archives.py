"""Checks the two archives of a release in a folder: python .ci/archives.py dist build/unpacked [v0.1.0]

- The source archive has every file under version control, and nothing else.
- The wheel in the folder was built from the source archive. One built from the checkout has the same bytes.
- With a tag: it is that of the version, and the changelog has a date for it.

Unpacks the source archive into the second folder, for whoever goes on with its tests.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|fmfa_losses\.egg-info/.*")


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def unpack(archive: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return only(folder, "fmfa_losses-*")


def wheel_contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def check_sources(unpacked: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    packed = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if file.is_file()}
    missing, more = tracked - packed, {name for name in packed - tracked if not GENERATED.fullmatch(name)}
    assert not missing, f"MANIFEST.in must include every file under version control; missing: {sorted(missing)}"
    assert not more, f"the source archive must have no other files; commit or remove: {sorted(more)}"
    for name in tracked:
        assert (ROOT / name).read_bytes() == (unpacked / name).read_bytes(), name


def check_wheel(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        from_checkout = wheel_contents(only(Path(folder), "*.whl"))
    from_archive = wheel_contents(wheel)
    differ = {name for name in {*from_checkout, *from_archive} if from_checkout.get(name) != from_archive.get(name)}
    assert not differ, f"the source archive must build the wheel that the checkout builds; different: {sorted(differ)}"


def check_tag(wheel: Path, tag: str) -> None:
    """tests/test_package.py compares the versions and dates of the three files; here they meet the tag."""
    version = wheel.name.split("-")[1]
    assert tag == f"v{version}", f"the tag must be v and fmfa_losses.__version__, got {tag} for {version}"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.M)
    assert dated, f"CHANGELOG.md must have a heading with the date of its release: ## [{version}] - YYYY-MM-DD"


def main(dist: Path, unpacked: Path, *tag: str) -> None:
    archive, wheel = only(dist, "*.tar.gz"), only(dist, "*.whl")
    sources = unpack(archive, unpacked)
    check_sources(sources)
    check_wheel(wheel)
    for name in tag:
        check_tag(wheel, name)
    megabytes = archive.stat().st_size / 1e6
    print(f"{archive.name}, {megabytes:.1f} MB: every file; {wheel.name}: the same from it and from the checkout")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), *sys.argv[3:])
