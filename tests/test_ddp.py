"""Training in several processes, each with the whole model (DDP): as in one process with the same global batch."""

from __future__ import annotations

import pytest
from helpers.processes import WORLD, in_ranks
from helpers.runs import CASES, EVEN, FAST, compare, make_expected


def compared(rank, folder, names, world):
    compare(rank, folder, names, world)


def check(folder, names, world=WORLD):
    make_expected(folder, names, world)
    in_ranks(compared, folder, names, world, world=world)


def test_two_processes(tmp_path):
    check(tmp_path, FAST)


@pytest.mark.slow
def test_all_in_two_processes(tmp_path):
    check(tmp_path, tuple(CASES))


@pytest.mark.slow
def test_four_processes(tmp_path):
    check(tmp_path, EVEN, world=4)
