"""tools/versions.py, but for the installing: pyproject.toml has the versions, the README the command."""

from __future__ import annotations

import json
from pathlib import Path

from packaging.requirements import Requirement

from tools.versions import CORE, ROOT, SET, bounds, floors, readme_command


def test_the_core_tests_are_there():
    assert [file for file in CORE if not (ROOT / file).is_file()] == []


def test_the_oldest_set_is_what_pyproject_accepts():
    for name, floor, bound in zip(SET, map(Requirement, floors()), map(Requirement, bounds()), strict=True):
        assert floor.name == bound.name == name
        (oldest,) = floor.specifier
        assert oldest.operator == "=="
        assert bound.specifier.contains(oldest.version)


def test_the_readmes_command_is_made_small(tmp_path):
    command = readme_command((ROOT / "README.md").read_text(), tmp_path)
    assert command[:2] == ["selfgen", "train"]
    options = dict(zip(command[2::2], command[3::2], strict=False))
    assert options["--model"] == str(tmp_path / "model")
    assert not {"--dataset_config", "--num_train_epochs"} & set(command)
    (rows,) = {len(row) for row in map(json.loads, Path(options["--dataset"]).read_text().splitlines())}
    assert rows == 2


def test_any_spelling_of_a_command(tmp_path):
    shown = "selfgen train --model a/b --dataset=c/d --dataset-config main \\\n    --self-prob 0.1  # few"
    command = " ".join(readme_command(f"text\n\n```\n{shown}\n```\n", tmp_path))
    assert command.startswith(
        f"selfgen train --model {tmp_path / 'model'} --dataset {tmp_path / 'rows.jsonl'} --self_prob 0.1"
    )
    assert "main" not in command
