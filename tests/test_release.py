"""The check list of a release: its points see what is wrong, and the distributions hold what they must."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import release
from tools.release import IN_BOTH, IN_SDIST, IN_WHEEL, ReleaseError, check_contents, check_versions

ROOT = Path(__file__).resolve().parents[1]
CITATION = "title: selfgen\nversion: 0.2.0\n"


def test_versions_that_agree():
    check_versions("0.2.0", "# Changelog\n\n## 0.2.0\n\n## 0.1.0\n", CITATION)


@pytest.mark.parametrize(
    ("changelog", "citation", "told"),
    [
        ("## 0.2.0 (unreleased)\n", CITATION, "CHANGELOG.md has no heading '## 0.2.0'"),
        ("## 0.1.0\n", CITATION, "CHANGELOG.md has no heading"),
        ("## 0.2.0\n", "\nversion: 0.1.0\n", "CITATION.cff is not of version 0.2.0"),
    ],
)
def test_a_version_that_was_forgotten(changelog, citation, told):
    with pytest.raises(ReleaseError, match=re.escape(told)):
        check_versions("0.2.0", changelog, citation)


def test_contents():
    whole = {*IN_BOTH, *IN_WHEEL, "selfgen-0.2.0.dist-info/licenses/LICENSE"}
    check_contents(whole, IN_WHEEL)
    with pytest.raises(ReleaseError, match=r"_C\.torch: missing"):
        check_contents(whole - {IN_WHEEL[1]}, IN_WHEEL)
    with pytest.raises(ReleaseError, match=r"tests/test_cli\.py: don't belong"):
        check_contents(whole | {"tests/test_cli.py"}, IN_WHEEL)
    with pytest.raises(ReleaseError, match="the licence is missing"):
        check_contents({*IN_BOTH, *IN_WHEEL}, IN_WHEEL)


def test_a_point_that_fails_does_not_hide_the_others(monkeypatch, capsys):
    def fail():
        raise ReleaseError("it is broken")

    monkeypatch.setattr(release, "POINTS", {"one": fail, "two": lambda: None})
    assert release.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["FAILED one: it is broken", "ok     two"]
    assert lines[2:] == [f"not looked at, as it needs the network: {name}" for name in release.LEFT]


@pytest.mark.slow
def test_without_a_compiler_there_is_a_package_without_kernels(tmp_path):
    """The source distribution has their sources, though; and so it does where there is no torch."""
    pytest.importorskip("build")
    source = tmp_path / "source"
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for file in filter(lambda name: (ROOT / name).is_file(), files):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist"],
        cwd=source, env=os.environ | {"CXX": "/bin/false"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C++ kernels, CPU ops will run on the torch reference" in done.stdout + done.stderr
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as sdist:
        check_contents({name.partition("/")[2] for name in sdist.getnames()}, IN_SDIST)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        check_contents({*wheel.namelist()}, ())
        assert not [name for name in wheel.namelist() if "/_C." in name]
