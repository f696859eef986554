"""The comparison with the committed ratios: what fails, what is only listed."""

from __future__ import annotations

import json

import pytest

from benchmarks.regression import BASELINE, main

CPU = {"brand_raw": "Some CPU", "family": 1, "model": 2, "count": 2}


def write(file, ratios, brand="Some CPU"):
    """A JSON of pytest-benchmark, as far as it is read."""
    benchmarks = [{"fullname": name, "extra_info": {"ratios": peers}} for name, peers in ratios.items()]
    benchmarks.append({"fullname": "without ratios", "extra_info": {"rows": 8}})
    file.write_text(json.dumps({"machine_info": {"cpu": CPU | {"brand_raw": brand}}, "benchmarks": benchmarks}))
    return str(file)


@pytest.fixture
def check(tmp_path):
    """Run on some ratios; the baseline is {"a": {"slow": 4.0, "fast": 0.5}} of the same CPU."""
    baseline = tmp_path / "results" / "baseline.json"
    main([write(tmp_path / "before.json", {"a": {"slow": 4.0, "fast": 0.5}}), f"--baseline={baseline}", "--update"])

    def run(ratios, *arguments, brand="Some CPU"):
        return main([write(tmp_path / "now.json", ratios, brand), f"--baseline={baseline}", *arguments])

    return run


def test_the_same_and_better_ratios_pass(check):
    assert check({"a": {"slow": 4.0, "fast": 0.5}}) == 0
    assert check({"a": {"slow": 9.0, "fast": 0.49}}) == 0


def test_a_worse_ratio_fails_and_is_named(check, capsys):
    assert check({"a": {"slow": 2.9, "fast": 0.5}}) == 1
    out = capsys.readouterr().out
    assert "a: slow / ours is 2.90, was 4.00 (-28%)" in out
    assert "fast / ours" not in out


def test_the_tolerance_can_be_given(check):
    assert check({"a": {"slow": 3.5}}, "--tolerance=0.1") == 1
    assert check({"a": {"slow": 3.5}}, "--tolerance=0.2") == 0


def test_new_and_missing_ratios_are_listed(check, capsys):
    assert check({"a": {"slow": 4.0, "other": 0.1}, "b": {"slow": 0.1}}) == 0
    out = capsys.readouterr().out
    for line in ("not in the baseline", "a: other", "b: slow", "not measured", "a: fast", "1 ratios compared"):
        assert line in out


def test_another_machine_does_not_fail(check, capsys):
    assert check({"a": {"slow": 1.0}}, brand="Other CPU") == 0
    out = capsys.readouterr().out
    assert "another machine" in out
    assert "slow / ours is 1.00" in out


def test_update_keeps_what_was_not_measured(check):
    check({"b": {"slow": 3.0}}, "--update")
    assert check({"a": {"slow": 1.0}}) == 1
    assert check({"b": {"slow": 1.0}}) == 1
    check({"b": {"slow": 3.0}}, "--update", brand="Other CPU")
    assert check({"a": {"slow": 1.0}}, brand="Other CPU") == 0


def test_no_baseline(tmp_path, capsys):
    assert main([write(tmp_path / "now.json", {}), f"--baseline={tmp_path / 'none.json'}"]) == 0
    assert "no baseline" in capsys.readouterr().out


def test_the_committed_baseline_can_be_read():
    if BASELINE.is_file():
        assert all(
            ratio > 0 for peers in json.loads(BASELINE.read_text())["ratios"].values() for ratio in peers.values()
        )
