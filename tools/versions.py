"""Run selfgen with other versions of the libraries that it depends on, each set in its own environment.

`newest` runs the first command of the README with the newest versions that pip takes, except for torch. `all` runs the
core tests with the newest set and with the oldest one. pyproject.toml alone says which versions these are. The packages
of the current environment are visible in the new ones, so only what differs is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import venv
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "versions"
SET = ("torch", "transformers", "accelerate", "datasets", "pyarrow", "peft", "trl")  # floors installed together
WORDS = "one two three four five six seven one six two"  # which the tokenizer of tiny_model.py knows
CORE = (
    "tests/test_upstream.py",
    "tests/test_contexts.py",
    "tests/test_graphs.py",
    "tests/test_generation.py",
    "tests/test_losses.py",
    "tests/test_data.py",
    "tests/test_trainer.py",
    "tests/test_streams.py",
    "tests/test_reuse.py",
    "tests/test_reuse_training.py",
    "tests/test_rac.py",
    "tests/test_stored_contexts.py",
    "tests/test_rounds.py",
    "tests/test_cli.py",
    "tests/test_bad_input.py",
    "tests/test_refusals.py",
    "tests/test_guards.py",
    "tests/test_trl.py",
    # Several processes
    "tests/test_ranks.py",
    "tests/test_ddp.py",
    "tests/test_fsdp.py",
    "tests/test_fsdp_loading.py",
    "tests/test_fsdp_saving.py",
    "tests/test_fsdp_steps.py",
    "tests/test_lockstep.py",
    "tests/test_tensor_parallel.py",
    "tests/test_launch.py",
    "tests/test_sharing.py",
)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    """By name; with those of an ``extra``, too."""
    lines = PROJECT["project"]["dependencies"]
    if extra:
        lines = lines + PROJECT["project"]["optional-dependencies"][extra]
    found = map(Requirement, lines)
    return {requirement.name: requirement for requirement in found}


def floors() -> list[str]:
    """The oldest supported version of each package in SET, as pip takes it."""
    known = requirements("dev")
    return [f"{name}=={one.version}" for name in SET for one in known[name].specifier if one.operator == ">="]


def bounds() -> list[str]:
    """What pyproject.toml accepts of each package in SET."""
    known = requirements("dev")
    return [str(known[name]) for name in SET]


class Environment:
    """A virtual environment in FOLDER, and a copy of the working tree beside it."""

    def __init__(self, name: str):
        self.name, self.tree, self.prefix = name, FOLDER / name / "tree", FOLDER / name / "venv"
        self.python = str(self.prefix / "bin" / "python")
        if not Path(self.python).exists():
            venv.create(self.prefix, with_pip=True)
        own = subprocess.check_output(
            [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        Path(own.strip(), "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
        shutil.rmtree(self.tree, ignore_errors=True)
        files = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, text=True)
        for file in filter(None, files.split("\0")):
            if (ROOT / file).is_file():
                (self.tree / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, self.tree / file)

    def pip(self, *arguments: str, **variables: str) -> None:
        say(f"{self.name}: pip install {' '.join(arguments)}")
        command = [self.python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments]
        subprocess.run(command, check=True, cwd=self.tree, env=os.environ | variables)

    def build(self) -> None:
        """The C++ kernels, for the torch of this environment."""
        say(f"{self.name}: building the C++ kernels")
        log = self.prefix.parent / "build.log"
        with log.open("w") as file:
            command = [self.python, "setup.py", "build_ext", "--inplace"]
            subprocess.run(command, check=True, cwd=self.tree, stdout=file, stderr=file)
        if not list(self.tree.glob("selfgen_kernels/**/*.so")):
            raise SystemExit(f"the C++ kernels were not built: {log}")

    def versions(self, *names: str) -> dict[str, str]:
        code = (
            "import json, sys; from importlib.metadata import version; print(json.dumps([*map(version, sys.argv[1:])]))"
        )
        found = subprocess.check_output([self.python, "-c", code, *names], text=True)
        return dict(zip(names, json.loads(found), strict=True))

    def test(self, arguments: list[str]) -> dict[str, str]:
        """Run the core tests; what became of them, for the table."""
        report = self.prefix.parent / "tests.xml"
        report.unlink(missing_ok=True)
        started = time.perf_counter()
        command = [self.python, "-m", "pytest", "-q", f"--junitxml={report}", *CORE, *arguments]
        code = subprocess.run(command, cwd=self.tree).returncode
        counts = ElementTree.parse(report).getroot()[0].attrib if report.exists() else {}
        bad, skipped = (sum(int(counts.get(key, 0)) for key in keys) for keys in (("failures", "errors"), ("skipped",)))
        passed = int(counts.get("tests", 0)) - bad - skipped
        return {
            "passed": str(passed),
            "failed": str(bad),
            "skipped": str(skipped),
            "minutes": f"{(time.perf_counter() - started) / 60:.1f}",
            "exit": str(code),
        }


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def all_versions(names: list[str], arguments: list[str]) -> int:
    """The core tests in each environment, and a table of what they were run with."""
    lines = []
    for name in names:
        environment = Environment(name)
        wanted = floors() if name == "oldest" else ["--upgrade", "--upgrade-strategy", "eager", *bounds()]
        environment.pip(*wanted, *PROJECT["build-system"]["requires"])
        environment.build()
        lines.append({"set": name, **environment.versions(*SET), **environment.test(arguments)})
    print("| " + " | ".join(lines[0]) + " |\n|" + "---|" * len(lines[0]))
    for line in lines:
        print("| " + " | ".join(line.values()) + " |")
    return max(int(line["exit"]) for line in lines)


def newest() -> int:
    """Install selfgen with the newest of all that it needs, and run the README's command: no constraints, no hub.

    torch and triton stay, as they are large and built for each other. The C++ kernels are left out: the tests cover
    them.
    """
    environment = Environment("newest-but-torch")
    kept = environment.prefix.parent / "kept.txt"
    kept.write_text("".join(f"{name}=={version(name)}\n" for name in ("torch", "triton")))
    upgrade = ["--upgrade", "--upgrade-strategy", "eager", "--constraint", str(kept)]
    environment.pip(*upgrade, ".", SELFGEN_NO_CPP="1")
    names = [name for name in requirements() if name in _pinned()]
    found = environment.versions(*names)
    say(", ".join(f"{name} {found[name]}" for name in names))
    newer = [f"{name} (pinned: {_pinned()[name]})" for name in names if found[name].split("+")[0] != _pinned()[name]]
    if newer:
        say("other than in constraints.txt: " + ", ".join(newer))
    with tempfile.TemporaryDirectory() as folder:
        command = readme_command((ROOT / "README.md").read_text(), Path(folder))
        subprocess.run([environment.python, ROOT / "tools" / "tiny_model.py", Path(folder, "model")], check=True)
        say(shlex.join(command))
        command[0] = str(environment.prefix / "bin" / command[0])
        subprocess.run(command, check=True, cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        logged = json.loads(Path(folder, "out", "trainer_state.json").read_text())["log_history"]
        if not any(entry.get("self_share", 0) > 0 for entry in logged):
            raise SystemExit(f"the command ran, but no step was trained on self tokens: {logged}")
        code = "from importlib.util import find_spec; print(find_spec('selfgen').origin)"
        where = subprocess.check_output([environment.python, "-c", code], cwd=folder, text=True).strip()
        if not Path(where).is_relative_to(environment.prefix):
            raise SystemExit(f"the command ran {where}, which is not what was installed")
    say("the README's first command trains with these versions")
    return 0


def _pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {name.lower(): pin for name, _, pin in (line.partition("==") for line in lines) if pin}


def readme_command(readme: str, folder: Path) -> list[str]:
    """The first `selfgen train` of the README, with a tiny model, few rows in ``folder`` and two steps."""
    text = re.search(r"^selfgen train (?:.*\\\n)*.*", readme, re.MULTILINE)
    if text is None:
        raise SystemExit("README.md shows no command that begins with: selfgen train")
    parts = shlex.split(text.group().replace("\\\n", " "), comments=True)
    options: dict[str, list[str]] = {}
    for part in parts[2:]:
        if part.startswith("--"):
            name, equals, value = part[2:].partition("=")
            options[name.replace("-", "_")] = [value] if equals else []
        else:
            options[next(reversed(options))].append(part)
    columns = [options.get(f"{name}_column", [name])[0] for name in ("prompt", "completion")]
    rows = [dict(zip(columns, row, strict=True)) for row in (("one two", WORDS), ("six", f"seven {WORDS}")) * 8]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("dataset_config", "num_train_epochs"):
        options.pop(name, None)
    options |= {
        "model": [str(folder / "model")],
        "dataset": [str(folder / "rows.jsonl")],
        "output_dir": [str(folder / "out")],
        "max_steps": ["2"],
        "logging_steps": ["1"],
        "use_cpu": [],
    }
    return parts[:2] + [part for name, values in options.items() for part in (f"--{name}", *values)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("newest", "all"))
    parser.add_argument("--only", choices=("newest", "oldest"), help="with all: run one of the two sets")
    options, others = parser.parse_known_args()
    os.chdir(ROOT)
    sets = [options.only] if options.only else ["newest", "oldest"]
    sys.exit(newest() if options.what == "newest" else all_versions(sets, others))
