"""The check list of a release, each point by itself: python -m tools.release, or `make release-check`.

Builds a source distribution and a wheel, looks into both, has twine read them, installs the wheel into an environment
of its own and runs `selfgen doctor` there, and compares versions, links and licences. Nothing is uploaded. Exit code 1
if a point fails; all are tried. What needs the network is named at the end, and left to you.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

from selfgen import __version__

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "release"
IN_BOTH = ("selfgen/py.typed", "selfgen/cli/help.json", "selfgen_kernels/py.typed")
IN_SDIST = ("LICENSE", "setup.py", "pyproject.toml", "selfgen_kernels/backends/cpu/head.cpp",
            "selfgen_kernels/backends/cpu/level.h")  # fmt: skip
IN_WHEEL = ("selfgen_kernels/backends/cpu/_C.abi3.so", "selfgen_kernels/backends/cpu/_C.torch")
LEFT_OUT = ("tests", "benchmarks", "tools", "examples", "docs", "outputs", "build")


class ReleaseError(Exception):
    """A point of the list that fails, and what to do."""


def run(*command: object, where: Path = ROOT) -> None:
    done = subprocess.run([*map(str, command)], cwd=where, capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def check_versions(version: str, changelog: str, citation: str) -> None:
    """Raise ReleaseError unless both files are of ``version``."""
    if not re.search(rf"^## {re.escape(version)}$", changelog, re.MULTILINE):
        raise ReleaseError(f"CHANGELOG.md has no heading '## {version}' (without more words): name what it lists so")
    if f"\nversion: {version}\n" not in citation:
        raise ReleaseError(f"CITATION.cff is not of version {version}: change it")


def check_contents(names: set[str], needed: tuple[str, ...]) -> None:
    """Raise ReleaseError if files of a distribution are missing, or don't belong into it."""
    if missing := sorted({*needed, *IN_BOTH} - names):
        raise ReleaseError(f"{', '.join(missing)}: missing; see [tool.setuptools] in pyproject.toml, and MANIFEST.in")
    if others := sorted(name for name in names if name.split("/")[0] in LEFT_OUT):
        raise ReleaseError(f"{', '.join(others[:3])}: don't belong into it; see MANIFEST.in")
    if not any(re.fullmatch(r"(.*/)?LICENSE", name) for name in names):
        raise ReleaseError("the licence is missing; see license-files in pyproject.toml")


def built(kind: str) -> Path:
    return next(FOLDER.glob(kind))


def build() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", FOLDER)


def look_into_both() -> None:
    with tarfile.open(built("*.tar.gz")) as sdist:
        check_contents({name.partition("/")[2] for name in sdist.getnames()}, IN_SDIST)
    with zipfile.ZipFile(built("*.whl")) as wheel:
        check_contents({*wheel.namelist()}, IN_WHEEL)


def read_metadata() -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", built("*.tar.gz"), built("*.whl"))


def install() -> None:
    """The wheel, with the packages of this environment; selfgen itself is that of the new one."""
    venv.create(FOLDER / "venv", with_pip=True)
    new = FOLDER / "venv" / "bin"
    own = subprocess.check_output(
        [new / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    Path(own.strip(), "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(new / "python", "-m", "pip", "install", "--no-deps", "--ignore-installed", built("*.whl"))
    code = f"import selfgen; assert {str(FOLDER)!r} in selfgen.__file__ and selfgen.__version__ == {__version__!r}"
    run(new / "python", "-c", code, where=FOLDER)
    run(new / "selfgen", "doctor", where=FOLDER)


def compare_versions() -> None:
    texts = ((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    check_versions(__version__, *texts)


def follow_links() -> None:
    run(sys.executable, "-m", "pytest", "-q", "tests/test_docs.py", "-k", "links or named or linked")


def check_licences() -> None:
    run(sys.executable, "-m", "tools.licences", "--check")


POINTS: dict[str, Callable[[], None]] = {
    "build both distributions": build,
    "their contents": look_into_both,
    "their metadata, by twine": read_metadata,
    "install the wheel, and selfgen doctor": install,
    "the version in CHANGELOG.md and CITATION.cff": compare_versions,
    "links of the pages within the repository": follow_links,
    "licences of what is installed": check_licences,
}
LEFT = ("links of the pages to other sites", "known vulnerabilities of what is installed: make audit")
"""What needs the network, which this does without."""


def main() -> int:
    failed = False
    for name, check in POINTS.items():
        try:
            check()
            print(f"ok     {name}", flush=True)
        except (ReleaseError, StopIteration, OSError) as error:
            failed = True
            print(f"FAILED {name}: {error or 'nothing was built'}", flush=True)
    for name in LEFT:
        print(f"not looked at, as it needs the network: {name}", flush=True)
    return int(failed)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    sys.exit(main())
