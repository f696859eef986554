"""The demo's promises: a table, a coloured context, a plot, figures and an ordinary checkpoint."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from tools import real_parts


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    from examples.demo import main

    main(["--steps", "3", "--batch", "1", "--held-out", "2", "--output-dir", str(tmp_path)])
    out, _ = capsys.readouterr()
    figures = json.loads((tmp_path / "demo.json").read_text())["results"]
    for name in ("SFT", "BSS"):
        losses = figures[name]["held_out"]["3"]
        assert f"{losses['reference']:.4f}" in out
        assert f"{losses['mixed']:.4f}" in out
        assert len(figures[name]["log"]) == 3
    assert figures["SFT"]["held_out"]["0"] == figures["BSS"]["held_out"]["0"]  # the same start
    assert "\033[1;31m" in out
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "BSS").num_parameters() > 100_000_000


def test_a_killed_conversion_leaves_nothing_half_done(tmp_path, monkeypatch):
    """The converted model appears whole or not at all, and other processes' leftovers don't matter."""
    monkeypatch.setenv("SELFGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(real_parts.AutoTokenizer, "from_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        real_parts.smollm2_path()
    assert list(tmp_path.iterdir()) == []
