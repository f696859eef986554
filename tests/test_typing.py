"""The public API under type checkers, by a consumer's file in their strictest modes, and the names that it has."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONSUMER = ROOT / "tests" / "consumer.py"
PUBLIC = ("selfgen", "selfgen.context", "selfgen.data", "selfgen.evaluation", "selfgen.training", "selfgen_kernels",
          "selfgen_kernels.backends")  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_all_names_what_is_public(name):
    """In order, without a name that is private, missing, or there twice."""
    module = import_module(name)
    names = module.__all__
    assert len({*names}) == len(names)
    assert not [one for one in names if one.startswith("_") or not hasattr(module, one)]
    assert (Path(import_module(name.split(".")[0]).__file__).parent / "py.typed").is_file()


def test_the_consumer_uses_every_public_name():
    text = CONSUMER.read_text()
    for name in import_module("selfgen").__all__:
        assert text.count(name) > 1, f"tests/consumer.py imports {name} and does not use it, or lacks it"


@pytest.mark.slow
def test_mypy_takes_a_consumer(tmp_path):
    (tmp_path / "mypy.ini").write_text("[mypy]\n")  # that of the project is more lenient
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--config-file", str(tmp_path / "mypy.ini"), str(CONSUMER)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_pyright_takes_a_consumer(tmp_path):
    pytest.importorskip("pyright")
    settings = {
        "include": ["consumer.py"],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "strict",
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    (tmp_path / "consumer.py").write_text(CONSUMER.read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    assert (found["summary"]["filesAnalyzed"], found["generalDiagnostics"]) == (1, [])
