"""The GPU run, `python -m benchmarks.gpu`, without a GPU: limits, ends of all kinds, resuming, the report, the bundle.

The sections themselves are rehearsed in this process, with tiny sizes; what they measure means nothing here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import bundle, results, runner, summary
from benchmarks.gpu.__main__ import SECTIONS, main
from benchmarks.gpu.lab import Lab, Skip
from benchmarks.gpu.runner import MixedError, Section, run_sections
from benchmarks.gpu.unpack import BundleError, unpack
from selfgen_kernels.ops import OPS

ROOT = Path(__file__).resolve().parent.parent
LATE = 60.0  # seconds that no section takes here, however busy the machine is


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setattr(results, "machine", lambda: {"processor": "x", "cores": 1, "gpu": None, "driver": None})


def section(name: str, seconds: float = LATE) -> Section:
    return Section(name, f"helpers.gpu_sections:{name}", seconds)


def read(folder: Path, name: str) -> results.Result:
    return results.read(results.file_of(folder, name))


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return False


def assert_gone(folder: Path) -> None:
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    begin = time.monotonic()
    while any(map(is_running, pids)) and time.monotonic() - begin < LATE:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


# ---- Limits and ends -------------------------------------------------------------------------------------------------


def test_bad_sections_stop_no_other_and_keep_what_they_wrote(tmp_path, capsys):
    sections = [section(name) for name in ("fail", "crash", "absent", "fine")]
    assert run_sections(sections, tmp_path, command="the command") == 1
    states = {name: read(tmp_path, name).state for name in ("fail", "crash", "absent", "fine")}
    assert states == {"fail": "failed", "crash": "failed", "absent": "skipped", "fine": "ended"}
    assert [len(read(tmp_path, name).rows) for name in states] == [1, 1, 0, 3]
    assert "ValueError: this kernel is wrong" in read(tmp_path, "fail").end["reason"]
    assert "ended with 7" in read(tmp_path, "crash").end["reason"]
    report = (tmp_path / summary.FILE).read_text()
    for told in ("this kernel is wrong", "there is no such tool", "a note", "`the command`", "## fail (failed"):
        assert told in report
    assert "raise ValueError" in capsys.readouterr().out  # the end of its log
    before = results.file_of(tmp_path, "fine").read_bytes(), results.file_of(tmp_path, "absent").read_bytes()
    assert run_sections(sections, tmp_path, chosen=["fine", "absent"]) == 0  # are done
    assert before == (results.file_of(tmp_path, "fine").read_bytes(), results.file_of(tmp_path, "absent").read_bytes())
    assert run_sections(sections, tmp_path, chosen=["fine"], again=True) == 0
    assert read(tmp_path, "fine").attempts == 1


def wait_for(file: Path) -> None:
    begin = time.monotonic()
    while not (file.is_file() and file.read_text()):
        assert time.monotonic() - begin < LATE, f"{file} did not come"
        time.sleep(0.05)


def test_a_section_that_hangs_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    """Its limit comes when it hangs, so that it does not matter how fast this machine is."""
    wait = subprocess.Popen.wait

    def limited(process, timeout=None):
        if timeout is not None:
            assert 0 < timeout <= 5
            wait_for(tmp_path / "pids")
            timeout = 0.1
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", limited)
    assert run_sections([section("hang", 5)], tmp_path) == 1
    assert_gone(tmp_path)
    found = read(tmp_path, "hang")
    assert found.state == "cut off"
    assert "longer than its 5 s" in found.end["reason"]
    assert [row.values for row in found.rows] == [{"value": 1}]
    assert "(cut off: not all of it)" in (tmp_path / summary.FILE).read_text()


def test_time_that_a_section_leaves_goes_to_the_next_and_none_begins_without(tmp_path, monkeypatch):
    limits, clock = [], [0.0]

    def run(section, folder, limit, about):
        limits.append(round(limit))
        clock[0] += {"a": 10, "b": 30, "c": 59}[section.name]

    monkeypatch.setattr(runner, "_run", run)
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    run_sections([Section(name, "", seconds) for name, seconds in zip("abcd", (40, 40, 20, 1), strict=True)], tmp_path)
    assert limits == [40, 60, 58]  # 101 in all; d has 2 left
    assert "not run" in (tmp_path / summary.FILE).read_text()


RUN = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background has not
from benchmarks.gpu.runner import Section, run_sections
names = ("fine", "hang")
run_sections([Section(name, f"helpers.gpu_sections:{name}", 600) for name in names], Path(sys.argv[1]))
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_a_killed_run_leaves_nothing_running_and_goes_on(tmp_path, kill):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "pids")
    with pytest.raises(MixedError, match="another run writes"):
        run_sections([section("fine")], tmp_path)
    process.send_signal(kill)
    process.wait()
    assert_gone(tmp_path)
    assert read(tmp_path, "hang").state == ("killed" if kill == signal.SIGKILL else "cut off")
    assert read(tmp_path, "hang").rows
    before = results.file_of(tmp_path, "fine").read_bytes()
    sections = [section("fine"), Section("hang", "helpers.gpu_sections:fine", LATE)]
    assert run_sections(sections, tmp_path) == 0
    assert results.file_of(tmp_path, "fine").read_bytes() == before
    found = read(tmp_path, "hang")
    assert (found.state, found.attempts) == ("ended", 2)
    assert [row.table for row in found.rows] == ["hang", *["fine"] * 3]  # of both attempts


def test_results_of_other_code_or_of_a_rehearsal_are_not_mixed_in(tmp_path, monkeypatch):
    sections = [Section("absent", "helpers.gpu_sections:absent", LATE)]
    assert run_sections(sections, tmp_path) == 0
    with pytest.raises(MixedError, match="other code"):
        run_sections(sections, tmp_path, rehearsal=True)
    monkeypatch.setattr(results, "source", lambda: "another")
    with pytest.raises(MixedError, match="--again without --section"):
        run_sections(sections, tmp_path, chosen=["absent"], again=True)
    monkeypatch.setattr(runner, "_run", lambda *_: None)
    run_sections(sections, tmp_path, again=True)
    assert json.loads((tmp_path / results.RUN).read_text())["source"] == "another"


# ---- The report ------------------------------------------------------------------------------------------------------


def test_the_report_is_made_from_the_files_alone(tmp_path):
    run = {"sections": ["one", "two", "three"], "rehearsal": True, "source": "abc", "command": "python -m x"}
    (tmp_path / results.RUN).write_text(json.dumps(run))
    one, two = (results.file_of(tmp_path, name) for name in ("one", "two"))
    machine = {"gpu": "Some GPU", "driver": "1.2", "cores": 3, "processor": "x86_64"}
    begin = {"machine": machine, "versions": {"torch": "2.11.0", "triton": None}, "limit_s": 12.3456}
    results.append(one, "begin", **begin)
    results.append(one, "row", table="t", columns={"p": 0.5}, values={"ms": 1.0, "a | b": None})
    results.append(one, "row", table="t", columns={"p": 1}, values={"ms": float("nan")})
    results.append(one, "row", table="t", columns={"p": 0.5}, values={"ms": 3.14159})
    results.append(one, "end", state="ended", reason=None, seconds=1.0)
    results.append(two, "begin", **begin)
    results.append(two, "row", table="u", columns={}, values={"x": 7})
    with two.open("a") as file:
        file.write('{"kind": "row", "table": "u", "colu')  # torn
    text = summary.of(tmp_path)
    assert text.splitlines()[0] == summary.REHEARSAL
    assert "Some GPU (driver 1.2), 3 cores, x86_64; torch 2.11.0, triton not installed" in text
    assert re.search(r"\| one +\| ended +\| 1.0 +\| 12.35 +\| 2 ", text)
    assert re.search(r"\| two +\| killed +\|", text)
    assert re.search(r"\| three +\| not run +\|", text)
    assert re.findall(r"^\| (\S+) +\| (\S*) +\|", text.partition("\nt\n")[2].partition("##")[0], re.MULTILINE)[2:] == [
        ("0.5", "3.142"),
        ("1", ""),
    ]
    results.append(two, "row", table="u", columns={}, values={"x": 8})  # after the torn line
    assert [row.values for row in results.read(two).rows] == [{"x": 8}]
    (tmp_path / results.RUN).write_text(json.dumps(run | {"rehearsal": False}))
    assert summary.REHEARSAL not in summary.of(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert main(["--output", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- The sections ----------------------------------------------------------------------------------------------------


def rehearse(name: str, folder: Path) -> results.Result:
    lab = Lab(name, folder, 600.0, rehearsal=True)
    results.append(results.file_of(folder, name), "begin")
    import_module(next(one.call for one in SECTIONS if one.name == name)).run(lab)
    return read(folder, name)


def test_sections_have_modules_and_fifteen_minutes_are_enough():
    for one in SECTIONS:
        assert (ROOT / (one.call.replace(".", "/") + ".py")).is_file()
    assert sum(one.seconds for one in SECTIONS) <= 13 * 60  # a machine takes time to come


def test_every_op_is_timed_against_the_rates(tmp_path):
    found = rehearse("kernels", tmp_path)
    assert [row for row in found.rows if "did not run" in row.table] == []
    timed = {op for row in found.rows for op in row.columns["op"].split(", ")}
    assert set(OPS) <= timed, "give the new op a case in benchmarks/gpu/ops.py"
    for row in found.rows:
        assert row.values["us"] > 0
        assert row.values["share of copy rate"] > 0
        assert row.values["from Python, us"] > 0


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("constants", {"value", "unit"}),
        ("engine", {"pass, ms", "graph, ms", "outside, ms", "captured", "replayed", "eager", "padding"}),
        ("step", {"BSS / SFT, checkpointing", "BSS / SFT", "of it contexts, ms"}),
        ("answers", {"ms", "tokens", "the same as ours"}),
        ("curves", set()),
        ("lifetime", {"wrong contexts", "replays"}),
    ],
)
def test_a_section_is_rehearsed(tmp_path, name, columns):
    found = rehearse(name, tmp_path)
    assert found.rows
    rows = [row for row in found.rows if not row.table.startswith("the passes of")]
    assert all(columns <= row.values.keys() for row in rows)
    if name == "engine":
        assert any(row.values["replayed"] and row.values["graph, ms"] for row in found.rows)
    if name == "lifetime":
        assert all(row.values["replays"] for row in found.rows)
    if name == "answers":
        assert {row.columns["by"] for row in found.rows} >= {"selfgen", "model.generate"}
    if name == "curves":
        assert any("recorded passes" in row.table for row in found.rows)
        assert any("optimizer step" in row.table for row in found.rows)


def test_a_recorded_pass_is_made_with_its_tokens_places_and_about_its_keys():
    from benchmarks.costs import Pass
    from benchmarks.gpu.sections.curves import a_pass
    from benchmarks.roofline import PASSES

    measured = json.loads(PASSES.read_text())
    lengths, keys, wanted = measured["lengths"], 0, 0
    for work in (Pass(*work) for run in measured["runs"] for work in run["passes"][::5]):
        ragged, index = a_pass(work, lengths, "cpu")
        sizes = ragged.cu_seqlens_q.diff()
        assert ragged.num_tokens == len(ragged.slots.unique()) == work.tokens == int(sizes.sum())
        assert len(index) == max(1, min(work.sampled, work.tokens))
        ends = ragged.kv_ranges.sum(1)
        starts = ragged.kv_ranges[:, 0]
        assert all(ends[row] - starts[row] >= sizes[row] for row in range(len(lengths)))
        assert int(ragged.kv_ranges[sizes == 0, 1].sum()) == 0
        keys, wanted = keys + int(ragged.kv_ranges[:, 1].sum()), wanted + work.keys
    assert 0.8 <= keys / wanted <= 1.25


NCU = """#!/bin/sh
cat <<END
==PROF== Connected to process 1
called linear_sample_mix
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","head_kernel","gpu__time_duration.sum","us","310.2"
"0","1","head_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","91.0"
"1","1","pick_token_kernel","gpu__time_duration.sum","us","12.0"
END
"""
SANITIZER = """#!/bin/sh
echo "called sample_mix"
echo "called kv_append"
test "$2" = "$WRONG" && { echo "========= ERROR SUMMARY: 3 errors"; exit 1; }
test "$2" = racecheck && echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
test "$2" = racecheck || echo "========= ERROR SUMMARY: 0 errors"
"""


def tool(folder: Path, name: str, text: str, monkeypatch) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")


def test_what_ncu_says_is_told_kernel_by_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Skip, match="no ncu"):
        rehearse("profile", tmp_path)
    tool(tmp_path, "ncu", NCU, monkeypatch)
    head, pick = rehearse("profile", tmp_path).rows
    assert head.columns["kernel"] == "head_kernel"
    assert head.values == {"time": "310.2 us", "DRAM, % of peak": "91.0"}
    assert pick.values == {"time": "12.0 us"}


def test_what_the_sanitizer_finds_fails_its_section(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Skip, match="no compute-sanitizer"):
        rehearse("sanitizer", tmp_path)
    tool(tmp_path, "compute-sanitizer", SANITIZER, monkeypatch)
    rows = rehearse("sanitizer", tmp_path).rows
    assert [row.values for row in rows] == [{"errors": 0, "ops": 2, "ended": True}] * 3
    monkeypatch.setenv("WRONG", "memcheck")
    with pytest.raises(Exception, match="memcheck: 3 errors"):
        rehearse("sanitizer", tmp_path)
    assert read(tmp_path, "sanitizer").rows[0].values["errors"] == 3


XML = """<testsuites><testsuite><testcase classname="a" name="fine"/><testcase classname="a" name="wrong"><failure/>
</testcase><testcase classname="a" name="out"><skipped/></testcase><testcase classname="a" name="broken"><error/>
</testcase></testsuite></testsuites>"""


def test_the_gate_tells_what_passed_and_fails_with_a_test(tmp_path, monkeypatch):
    gate = import_module("benchmarks.gpu.sections.correctness")

    class Pytest:
        def __init__(self, command, **_):
            assert "-m" in command
            (tmp_path / "correctness.xml").write_text(XML)

        def wait(self, timeout=None):
            return 1

    monkeypatch.setattr(gate.subprocess, "Popen", Pytest)
    with pytest.raises(gate.GateError, match="2 tests failed"):
        rehearse("correctness", tmp_path)
    counts, *bad = read(tmp_path, "correctness").rows
    assert counts.values == {"passed": 1, "failed": 1, "errors": 1, "skipped": 1}
    assert [row.columns["test"] for row in bad] == ["failed: a::wrong", "errors: a::broken"]
    (tmp_path / "torn.xml").write_text(XML[:60])
    with pytest.raises(gate.GateError, match="no results"):
        gate.counts_of(tmp_path / "torn.xml")


@pytest.mark.slow
def test_all_sections_are_rehearsed_by_the_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--fake", "--output", str(tmp_path), "--seconds", "3600"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    text = (tmp_path / summary.FILE).read_text()
    assert text.startswith(summary.REHEARSAL)
    states = {one.name: read(tmp_path, one.name).state for one in SECTIONS}
    assert {state for name, state in states.items() if name not in ("profile", "sanitizer")} == {"ended"}, done.stdout
    assert done.returncode == 0


# ---- The bundle ------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path):
    """(its folder, its manifest, what was packed): a project in one file, and weights that are cut."""
    files = {"a.py": b"print(1)\n", "deep/b.txt": b"\0" * 5000, "weights.bin": os.urandom(300_000)}
    for name, content in files.items():
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(content)
    groups = [
        bundle.Group("project", [(tmp_path / "from" / name, f"selfgen/{name}") for name in ("a.py", "deep/b.txt")]),
        bundle.Group("smollm2", [(tmp_path / "from" / "weights.bin", "site/weights.bin")], compressed=False),
    ]
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "project.tar.gz.07").write_text("of an earlier bundle")
    manifest = bundle.pack(tmp_path / "bundle", groups, [("GSM8K", "a reason")], 100_000)
    return tmp_path / "bundle", manifest, files


def test_a_bundle_is_cut_and_unpacked_as_it_was(packed, tmp_path):
    folder, manifest, files = packed
    names = [part["file"] for group in manifest["groups"] for part in group["parts"]]
    assert names == ["project.tar.gz.00", *(f"smollm2.tar.0{i}" for i in range(len(names) - 1))]
    assert len(names) >= 4
    assert {file.name for file in folder.iterdir()} == {*names, "manifest.json", "unpack.py"}
    assert all(file.stat().st_size <= 100_000 for file in folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-I", str(folder / "unpack.py"), str(tmp_path / "to")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "all hashes are right" in done.stdout
    for name, content in files.items():
        assert (tmp_path / "to" / ("site" if "weights" in name else "selfgen") / name).read_bytes() == content
    told = bundle.describe(folder, manifest)
    assert f"part 2 of {len(names) - 1}" in told
    assert "left out: GSM8K: a reason" in told


def test_a_damaged_or_incomplete_bundle_is_refused_and_an_optional_part_is_not_needed(packed, tmp_path):
    folder = packed[0]
    part = folder / "smollm2.tar.01"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"smollm2\.tar\.01 has .* not the hash"):
        unpack(folder, tmp_path / "to")
    part.unlink()
    with pytest.raises(BundleError, match=r"smollm2\.tar\.01 is not in"):
        unpack(folder, tmp_path / "to")
    assert not (tmp_path / "to").exists()
    for other in folder.glob("smollm2.*"):
        other.unlink()
    assert unpack(folder, tmp_path / "to") == ["smollm2"]
    (folder / "project.tar.gz.00").unlink()
    with pytest.raises(BundleError, match="project"):
        unpack(folder, tmp_path / "more")


def test_the_bundle_has_what_git_tracks_and_says_what_it_has_not(monkeypatch, tmp_path):
    monkeypatch.setenv("SELFGEN_GSM8K", str(tmp_path))
    monkeypatch.setattr(bundle, "PACKAGES", ("packaging", "numpy", "no-such-package"))
    monkeypatch.setattr(bundle, "SMOLLM2", "no-such-weights")
    found, left_out = bundle.groups()
    assert [group.name for group in found] == ["project", "packages"]
    names = {name for _, name in found[0].files}
    assert {"selfgen/benchmarks/results/passes.json", "selfgen/tests/test_on_gpu.py"} <= names
    assert any(name.endswith("packaging/version.py") for _, name in found[1].files)
    told = dict(left_out)
    assert "compiled parts" in told["numpy"]
    assert "not installed" in told["no-such-package"]
    assert "random weights" in told["SmolLM2's weights"]
    assert "no local copy" in told["GSM8K"]


def test_a_bundle_has_files_of_at_most_64_mib(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        bundle.main(["--output", str(tmp_path), "--most", "65"])
    monkeypatch.setattr(bundle, "groups", lambda: ([bundle.Group("project", [(Path(__file__), "selfgen/a")])], []))
    assert bundle.main(["--output", str(tmp_path / "bundle"), "--most", "0.001"]) == 0
    assert max(file.stat().st_size for file in (tmp_path / "bundle").glob("project.*")) <= 1048
    assert "unpack.py FOLDER" in capsys.readouterr().out
