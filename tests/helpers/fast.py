"""Which cases of a test are in the fast suite, by its marks; the others are slow."""

from __future__ import annotations

import itertools

AT_ONCE = {"one_case": 0, "each_value": 1, "each_pair": 2}
"""By the name of a mark: of how many parameters values are to be seen together."""


def leave_to_slow(cases: list) -> None:
    """Mark the ``cases`` of a test slow, but for a few that together show what its mark says, or all without one.

    Cases that are slow by themselves show nothing.
    """
    for name, at_once in AT_ONCE.items():
        if not cases[0].get_closest_marker(name):
            continue
        left = {case: shown(case, at_once) for case in cases if not case.get_closest_marker("slow")}
        todo = set().union(*left.values())
        while todo:
            best = max(left, key=lambda case: len(left[case] & todo))  # the first one of the best
            todo -= left.pop(best)
        for case in left:
            case.add_marker("slow")


def shown(case, at_once: int) -> set:
    """What a case shows: each ``at_once`` values of its parameters, by their names in its id."""
    return set(itertools.combinations(enumerate(case.callspec._idlist), at_once))
