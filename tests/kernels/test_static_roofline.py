"""The roofline that is read off machine code: what is counted, and the arithmetic, on programs made up here."""

import dataclasses

import pytest

pytest.importorskip("triton")
from selfgen_kernels.backends.triton.configuration import SHARED_MEMORY
from selfgen_kernels.backends.triton.sampling import configurations
from tools import static_roofline
from tools.aot import CHIPS, RECORDED, Report, cuda_instructions, innermost_loops, loops_of, read, streams_of
from tools.static_roofline import Launch, Rates

BASELINE = RECORDED.with_name("kernels_before_exact.json")

NESTED = """
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   IADD R3, R3, 1 ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, [R2] ;
        /*0030*/                   FADD R8, R8, R4 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/                   FMUL R8, R8, R9 ;
        /*0060*/              @!P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0070*/                   LDG.E R4, [R2] ;
        /*0080*/              @!P0 BRA `(.L_x_2) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
        /*00b0*/                   NOP ;
"""
CHIP = Rates("sm_90", multiprocessors=10, clock=1e9, tensor=1e12, bandwidth=1e11)


def opcodes(loops):
    return [[instruction.opcode for instruction in loop] for loop in loops]


def test_loops_within_loops():
    program = cuda_instructions(NESTED)
    outermost = [["IADD", "LDG.E.128", "FADD", "BRA", "FMUL", "BRA"], ["LDG.E", "BRA"]]
    assert sorted(opcodes(loops_of(program))) == sorted(outermost)
    assert opcodes(innermost_loops(program)) == [["LDG.E.128", "FADD", "BRA"], ["LDG.E", "BRA"]]


def test_a_stream_is_a_loop_with_wide_loads_or_all_there_is():
    in_bf16, in_fp32 = (
        next(one for one in configurations("sm_90") if one.name == name) for name in ("mass[bf16]", "mass[fp32]")
    )
    program = cuda_instructions(NESTED)
    assert list(streams_of(program, in_bf16, CHIPS["sm_90"])) == [(3, 32 * 8)]
    assert list(streams_of(program, in_fp32, CHIPS["sm_90"])) == [(3, 32 * 4)]
    straight = cuda_instructions(NESTED.replace("@!P0 BRA `(.L_x_1)", "NOP").replace("@!P1 BRA `(.L_x_0)", "NOP"))
    size = sum(one.opcode != "NOP" for one in straight)
    assert list(streams_of(straight, in_bf16, CHIPS["sm_90"])) == [(size, 32 * 8)]
    copied = cuda_instructions(NESTED.replace("LDG.E.128 R4", "UTMALDG.2D [UR4]"))
    assert list(streams_of(copied, in_bf16, CHIPS["sm_90"])) == [(3, 0)]  # how many is not told


def test_the_longest_of_three_times():
    report = Report("sm_90", "kernel", size=110, streams=((10, 256),), num_warps=4)
    launch = Launch("kernel", programs=100, elements=(256_000,), nbytes=10**6, flops=10**9)
    assert static_roofline.slots(launch, report) == 100 * 4 * 100 + 10 * 1000
    found = static_roofline.seconds(launch, report, CHIP)
    assert found["memory"] == pytest.approx(1e6 / 0.9e11)
    assert found["tensor cores"] == pytest.approx(1e9 / 0.8e12)
    assert found["issue"] == pytest.approx(50_000 / (40 * 1e9))
    few = static_roofline.seconds(launch._replace(programs=1), report, CHIP)
    assert few["issue"] == pytest.approx((400 + 10_000) / (4 * 1e9))  # one program has the schedulers of its warps
    wide = dataclasses.replace(report, num_warps=8)
    few = static_roofline.seconds(launch._replace(programs=1), wide, CHIP)
    assert few["issue"] == pytest.approx((800 + 10_000) / (4 * 1e9))  # and no more than a multiprocessor has
    assert static_roofline.seconds(launch, report, CHIP._replace(cycles=4))["issue"] == 4 * found["issue"]

    row = static_roofline.row(lambda _: iter([launch, launch]), {"kernel": report}, CHIP)
    assert (row.launches, row.nbytes, row.bound) == (2, 2 * 10**6, "tensor cores")
    assert row.time == pytest.approx(2 * found["tensor cores"])
    assert static_roofline.row(lambda found: iter([Launch("other", 1, (0,), 0)]), {"kernel": report}, CHIP) is None


def test_loops_may_stream_different_amounts():
    report = Report("sm_90", "kernel", size=30, streams=((10, 100), (20, 100)), num_warps=1)
    assert static_roofline.slots(Launch("kernel", 1, (1000, 0), 0), report) == 100
    assert static_roofline.slots(Launch("kernel", 1, (1000, 500), 0), report) == 200
    assert static_roofline.slots(Launch("kernel", 1, (1000,), 0), report) == 200  # not known which: the dearer one


def test_chips_are_the_targets_and_their_kin():
    for target, shared in SHARED_MEMORY.items():
        assert CHIPS[target].tiles == target
        assert CHIPS[target].shared_per_block == shared
    assert {chip.tiles for chip in CHIPS.values()} == set(SHARED_MEMORY)
    assert {chip.target for chip in static_roofline.CHIPS.values()} == set(SHARED_MEMORY)


@pytest.mark.parametrize("file", [RECORDED, BASELINE])
def test_ops_are_found_in_what_is_recorded(file):
    """Or the table would have fewer rows, silently, once a kernel has another name."""
    reports = static_roofline.kernels_of(read(file), "sm_90")
    rows = {
        name: static_roofline.row(op, reports, static_roofline.CHIPS["H200"])
        for name, op in static_roofline.OPS.items()
    }
    assert [name for name, row in rows.items() if row is None] == []
    assert all(row.time > 0 for row in rows.values())
    streamed = rows["linear_sample_mix", "64 x 4096 x 151,936"]
    assert streamed.nbytes == pytest.approx(2 * 4096 * 151_936, rel=0.05)
