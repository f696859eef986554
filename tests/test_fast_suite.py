"""What the marks of a test leave in the fast suite."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from helpers.fast import leave_to_slow

AXES = ["cpp", "triton", "reference"], ["fp32", "bf16"], ["1", "63", "1001"]


class Case:
    def __init__(self, values, *marks):
        self.callspec, self.marks = SimpleNamespace(_idlist=list(values)), {*marks}

    def get_closest_marker(self, name):
        return name in self.marks

    def add_marker(self, name):
        self.marks.add(name)


def fast_ones(mark, slow=()):
    cases = [
        Case(values, mark, *["slow"] * ({*slow} <= {*values} and bool(slow))) for values in itertools.product(*AXES)
    ]
    leave_to_slow(cases)
    return [tuple(case.callspec._idlist) for case in cases if "slow" not in case.marks]


def seen(cases, at_once):
    return {some for case in cases for some in itertools.combinations(enumerate(case), at_once)}


@pytest.mark.parametrize(("mark", "at_once", "most"), [("one_case", 0, 1), ("each_value", 1, 3), ("each_pair", 2, 10)])
def test_a_few_cases_show_what_all_of_them_show(mark, at_once, most):
    found = fast_ones(mark)
    assert seen(found, at_once) == seen(itertools.product(*AXES), at_once)
    assert len(found) <= most
    assert found[0] == tuple(values[0] for values in AXES)


def test_without_a_mark_all_are_fast():
    assert fast_ones("other") == list(itertools.product(*AXES))


def test_what_is_slow_by_itself_shows_nothing():
    found = fast_ones("each_value", slow=["triton", "fp32"])
    assert ("triton", "bf16") in {case[:2] for case in found}
    assert seen(found, 1) == seen(itertools.product(*AXES), 1)


def test_a_case_that_is_named_alone_is_run():
    alone = Case(["cpp", "bf16", "63"], "each_value")
    leave_to_slow([alone])
    assert "slow" not in alone.marks
