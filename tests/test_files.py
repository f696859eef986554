"""Files that one process writes at a time, as a whole; what tells two records of settings apart."""

from __future__ import annotations

import json
import time
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.processes import begun

from selfgen.files import alone, at_home, expand_home, to_json, write_json, write_whole
from selfgen.provenance import differences
from selfgen.stored_contexts import OfflineError


def hold(ready, path):
    with alone(path):
        ready.set()
        time.sleep(120)


@pytest.mark.parametrize("name", ["folder", "file"])
def test_another_process_keeps_out(tmp_path, name):
    """Until it dies, whatever it dies of."""
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    other = begun(hold, path)
    with pytest.raises(OfflineError, match=f"another process is writing {path}: wait"), alone(path, OfflineError):
        pass
    with pytest.raises(ValueError, match="another process"), alone(path):
        pass
    other.kill()
    other.join()
    with alone(path):
        pass


def test_an_error_inside_ends_the_lock(tmp_path):
    with pytest.raises(KeyError), alone(tmp_path):
        raise KeyError
    with alone(tmp_path):
        pass


def test_a_file_that_fails_leaves_the_one_before(tmp_path):
    file = tmp_path / "file"
    write_whole(file, lambda stream: stream.write(b"before"))

    def fail(stream):
        stream.write(b"half")
        raise KeyError

    with pytest.raises(KeyError):
        write_whole(file, fail)
    assert file.read_bytes() == b"before"


def test_differences_are_named():
    before = {"seed": 3, "name": "a", "gone": None, "curve": [1, 2]}
    assert differences(before, {"seed": 3, "name": "a", "curve": (1, 2)}) == []  # as JSON gives it back
    now = {"seed": 4, "name": "b", "new": 0.5}
    assert differences(before, now, ignore=["curve"]) == [
        "seed was 3, is 4",
        "name was 'a', is 'b'",
        "new was None, is 0.5",
    ]
    assert differences(before, now, ignore=now.keys() | before.keys()) == []
    assert differences({"a": None}, {"a": float("nan")}) == []  # as JSON gives that back


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": float("nan"), "b": [float("inf"), (-float("inf"), 0.5)]}, '{"a": null, "b": [null, [null, 0.5]]}'),
        ({1: True, None: "ä", date(2024, 1, 5): date(2024, 1, 5)},
         '{"1": true, "null": "\\u00e4", "2024-01-05": "2024-01-05"}'),
        ([Decimal("1.10"), b"text", b"\xff", Path("a/b")], '["1.10", "text", "\\\\xff", "a/b"]'),
        ([np.float32("nan"), np.int64(3), np.array([1.0, np.nan]), torch.tensor([2])], "[null, 3, [1.0, null], [2]]"),
    ],
    ids=["numbers that are none", "keys", "values", "arrays"],
)  # fmt: skip
def test_json_is_strict(tmp_path, value, text):
    assert to_json(value) == text
    write_json(tmp_path / "file.json", value)
    content = (tmp_path / "file.json").read_text()
    assert json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == json.loads(text)


def test_home_is_expanded_in_paths_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = SimpleNamespace(
        model="~/m", dataset=["~/a", "b~"], output_dir=Path("~/o"), prompt_column="~/p", contexts=None
    )
    expand_home(options)
    assert options.model == "/home/me/m"
    assert options.dataset == ["/home/me/a", "b~"]
    assert options.output_dir == Path("/home/me/o")
    assert options.prompt_column == "~/p"
    assert at_home(True) is True
