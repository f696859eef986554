"""Files that one process writes at a time, as a whole; what tells two records of settings apart."""

from __future__ import annotations

import time

import pytest
from helpers.processes import begun

from selfgen.files import alone, write_whole
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
