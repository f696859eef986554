"""Compiles the Triton kernels for GPUs that are not here: registers, spills, shared memory, occupancy, instructions.

    python -m tools.aot [--target sm_90 ...] [--kernel TEXT] [--quick] [--json FILE]
    python -m tools.aot --roofline [--against FILE]    the time that bytes, FLOPs and instructions allow each op
    python -m tools.aot --record [FILE]                 figures of the kernels in bf16, which a test compares with

Compiles every configuration that ships (`configurations(target)` in each module of `selfgen_kernels/backends/triton`)
for every target and reads the machine code. It needs no GPU. It exits with 1 if a kernel breaks a rule of `faults`.
Compiled kernels stay in Triton's cache, so a second run is short. `--target` may be any of `CHIPS`: other GPUs
take the choices of a target.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import selfgen_kernels.backends.triton as kernels
from selfgen_kernels.backends.triton.configuration import TARGETS, Configuration

from . import static_roofline


class Chip(NamedTuple):
    """What one multiprocessor (CUDA) or compute unit (AMD) has, and the names of the instructions to look for."""

    tiles: str  # the target whose choices it takes
    warps: int
    blocks: int
    shared: int  # bytes, of which a block of CUDA may have all but 1 KiB
    tensor_core: str  # pattern of its opcode
    wide_load: str  # 128 bits or more from global memory; TMA copies are as wide
    narrow_load: str  # less
    lanes: int = 32

    @property
    def shared_per_block(self) -> int:
        return self.shared - (1024 if self.lanes == 32 else 0)


# CUDA Programming Guide, 5.1 "Compute Capabilities", technical specifications. Each has 65,536 registers, given
# to warps by 256; a block takes 1 KiB of shared memory for the system beside its own.
# CDNA: 4 SIMDs of 8 wavefronts of 64 lanes and 64 KiB of LDS, CDNA 4 160 (LLVM's AMDGPUBaseInfo.cpp: getMaxWavesPerEU,
# getAddressableLocalMemorySize); LLVM writes the wavefronts that registers allow into the assembly.
CUDA_LOADS = r"LDG\.\S*(128|256)|LDGSTS\.\S*128|UTMALDG", r"LDG(STS)?(?!\S*(128|256|DEPBAR))(\.|$)"
AMD_LOADS = (
    r"(global|buffer)_load_(lds_)?dwordx4",
    r"(global|buffer)_load_(lds_)?(dword|dwordx2|dwordx3|[us]?byte|[us]?short)(_d16\w*)?$",
)
CHIPS = {
    "sm_80": Chip("sm_80", 64, 32, 164 << 10, "HMMA", *CUDA_LOADS),
    "sm_86": Chip("sm_86", 48, 16, 100 << 10, "HMMA", *CUDA_LOADS),
    "sm_89": Chip("sm_89", 48, 24, 100 << 10, "HMMA", *CUDA_LOADS),
    "sm_90": Chip("sm_90", 64, 32, 228 << 10, "HGMMA", *CUDA_LOADS),
    "sm_100": Chip("sm_100", 64, 32, 228 << 10, "UTCHMMA", *CUDA_LOADS),
    "sm_120": Chip("sm_120", 48, 24, 100 << 10, "HMMA", *CUDA_LOADS),
    "gfx942": Chip("gfx942", 32, 32, 64 << 10, "v_mfma", *AMD_LOADS, lanes=64),
    # Not targets: they take the choices of one. Orin, B300, Thor, GB10, MI250, MI350.
    "sm_87": Chip("sm_86", 48, 16, 164 << 10, "HMMA", *CUDA_LOADS),
    "sm_103": Chip("sm_100", 64, 32, 228 << 10, "UTCHMMA", *CUDA_LOADS),
    "sm_110": Chip("sm_86", 48, 24, 228 << 10, "UTCHMMA|HMMA", *CUDA_LOADS),
    "sm_121": Chip("sm_120", 48, 24, 100 << 10, "HMMA", *CUDA_LOADS),
    "gfx90a": Chip("gfx942", 32, 32, 64 << 10, "v_mfma", *AMD_LOADS, lanes=64),
    "gfx950": Chip("gfx942", 32, 32, 160 << 10, "v_mfma", *AMD_LOADS, lanes=64),
}
RECORDED = Path(__file__).parents[1] / "benchmarks/results/kernels.json"
OTHER_DTYPES = re.compile("fp(16|32|64)")  # than bf16, in names of configurations
OF_INTEREST = {  # what the table counts, under the name it prints
    "HMMA": r"HMMA",
    "HGMMA": r"HGMMA",
    "UTCHMMA": r"UTCHMMA",
    "LDG.128": r"LDG\.\S*(128|256)",
    "LDGSTS.128": r"LDGSTS\.\S*128",
    "UTMALDG": r"UTMALDG",
    "narrow LDG": CUDA_LOADS[1],
    "mfma": r"v_mfma",
    "load_dwordx4": AMD_LOADS[0],
    "narrow load": AMD_LOADS[1],
    "ds": r"ds_(read|write)",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of one configuration for one target."""

    target: str
    name: str
    registers: int = 0  # per thread; on AMD vector registers, accumulation ones included
    scalar_registers: int = 0  # per wavefront; AMD only
    spill_stores: int = 0  # on CUDA the instructions that write local memory; on AMD the registers spilled
    spill_loads: int = 0  # the instructions that read local memory
    local_bytes: int = 0  # per thread: stack and local memory
    shared_bytes: int = 0  # per block
    warps: int = 0  # a multiprocessor holds at most this many
    tensor_core_instructions: int = 0
    wide_loads: int = 0
    narrow_loads: int = 0
    loops: tuple[tuple[int, int], ...] = ()  # (wide loads, narrow loads) of each loop that loads
    instructions: dict[str, int] = dataclasses.field(default_factory=dict)
    faults: tuple[str, ...] = ()
    size: int = 0  # instructions
    streams: tuple[tuple[int, int], ...] = ()  # see `streams_of`
    num_warps: int = 0  # of a program
    constants: dict[str, int] = dataclasses.field(default_factory=dict)
    triton: str = ""  # the compiler's version

    @property
    def slots(self) -> tuple[float, ...]:
        """Instructions that a warp issues for each element, in each of the `streams` whose elements are known."""
        return tuple(count / elements for count, elements in self.streams if elements)


def inspect(configuration: Configuration, target: str) -> Report:
    """Compile `configuration` for `target`, one of `CHIPS`, and read the machine code."""
    from triton import compile as triton_compile

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where Triton writes the whole program if ptxas refuses it
            compiled = triton_compile(source(configuration), target=gpu_target(target), options=configuration.options)
    except Exception as error:  # whatever a stage of the compiler raises
        reason = " ".join(str(error).split())[:300]
        return Report(target, configuration.name, faults=(f"does not compile: {type(error).__name__}: {reason}",))
    metadata = compiled.metadata
    chip = CHIPS[target]
    if target.startswith("sm_"):
        usage, code = disassemble(compiled.asm["cubin"])
        count = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        instructions = cuda_instructions(code)
        registers, scalar_registers, local_bytes = count["REG"], 0, count["STACK"] + count["LOCAL"]
        spills = count_matching(instructions, "STL"), count_matching(instructions, "LDL")
        by_registers = 65536 // (-(-registers * 32 // 256) * 256)  # warps
    else:
        code = compiled.asm["amdgcn"]
        count = {name: int(value) for name, value in re.findall(r"^ +\.(\w+): +(\d+)$", code, re.M)}
        instructions = amd_instructions(code)
        registers, scalar_registers = count["vgpr_count"], count["sgpr_count"]
        local_bytes = count["private_segment_fixed_size"]
        spills = count["vgpr_spill_count"] + count["sgpr_spill_count"], count_matching(instructions, "scratch_load")
        by_registers = 4 * int(re.findall(r"; Occupancy: (\d+)", code)[-1])

    blocks = [chip.blocks, min(chip.warps, by_registers) // metadata.num_warps]
    if metadata.shared:
        blocks.append(chip.shared // (metadata.shared + chip.shared - chip.shared_per_block))
    if getattr(metadata, "tmem_size", 0):  # 512 columns of tensor memory per multiprocessor (PTX ISA, tcgen05)
        blocks.append(512 // metadata.tmem_size)
    loops = (
        (count_matching(loop, chip.wide_load), count_matching(loop, chip.narrow_load))
        for loop in loops_of(instructions)
    )
    report = Report(
        target=target,
        name=configuration.name,
        registers=registers,
        scalar_registers=scalar_registers,
        spill_stores=spills[0],
        spill_loads=spills[1],
        local_bytes=local_bytes,
        shared_bytes=metadata.shared,
        warps=min(blocks) * metadata.num_warps,
        tensor_core_instructions=count_matching(instructions, chip.tensor_core),
        wide_loads=count_matching(instructions, chip.wide_load),
        narrow_loads=count_matching(instructions, chip.narrow_load),
        loops=tuple(loads for loads in loops if any(loads)),
        size=size_of(instructions),
        streams=tuple(streams_of(instructions, configuration, chip)),
        num_warps=metadata.num_warps,
        triton=version("triton"),
        constants={name: value for name, value in configuration.constants.items() if isinstance(value, int)},
        instructions={name: n for name, like in OF_INTEREST.items() if (n := count_matching(instructions, like))},
    )
    return dataclasses.replace(report, faults=tuple(faults(report, configuration)))


def faults(report: Report, configuration: Configuration) -> Iterable[str]:
    """The rules of every kernel that ships: what `report` breaks of them."""
    chip = CHIPS[report.target]
    if report.spill_stores or report.spill_loads:
        yield f"spills registers: {report.spill_stores} stores, {report.spill_loads} loads"
    if report.local_bytes:
        yield f"{report.local_bytes} bytes of local memory per thread"
    if report.shared_bytes > chip.shared_per_block:
        yield f"{report.shared_bytes} bytes of shared memory, {report.target} has {chip.shared_per_block}"
    if report.warps == 0:
        yield "no block fits a multiprocessor"
    if configuration.streams:
        yield from narrow_streams(report)
    if configuration.tensor_cores and not report.tensor_core_instructions:
        yield f"no {chip.tensor_core} instruction"


def narrow_streams(report: Report) -> Iterable[str]:
    """What is streamed is loaded in loops, all of it by 128 bits; ids, biases and thresholds are loaded outside.

    Beside its streams a kernel may search, by one narrow load per round in a separate loop. What has no loop streams by
    all its loads: most must be wide.
    """
    if not report.wide_loads:
        yield "no load of 128 bits"
    elif report.loops and not any(wide for wide, _ in report.loops):
        yield "no load of 128 bits in a loop"
    elif not report.loops and report.narrow_loads > report.wide_loads:
        yield f"{report.narrow_loads} narrow loads beside {report.wide_loads} of 128 bits"
    for wide, narrow in report.loops:
        if narrow > (0 if wide else 1):
            yield f"{narrow} narrow loads in a loop" + (f" beside {wide} of 128 bits" if wide else "")


def streams_of(program: list[Instruction], configuration: Configuration, chip: Chip) -> Iterable[tuple[int, int]]:
    """(instructions, elements that a warp loads by 128 bits) of a round of each innermost loop that loads so.

    What has no such loop is one round by itself. Elements are of the kernel's first tensor; 0 where TMA copies them,
    whose instructions don't tell how many. Both sides of a branch count.
    """
    loops = [loop for loop in innermost_loops(program) if count_matching(loop, chip.wide_load)]
    kinds = (configuration.types.get(name, "") for name in configuration.kernel.arg_names)
    bits = int(next(kind for kind in kinds if kind.startswith("*")).lstrip("*bfpiu"))
    for part in loops or [program] * bool(count_matching(program, chip.wide_load)):
        loaded = 128 * chip.lanes * (count_matching(part, chip.wide_load) + count_matching(part, r"LDG\.\S*256"))
        yield size_of(part), 0 if count_matching(part, "UTMALDG") else loaded // bits


def source(configuration: Configuration, types: dict[str, str] | None = None) -> Any:
    """`configuration` as the compiler takes it, with other `types` if given."""
    from triton.compiler import ASTSource

    kernel = configuration.kernel
    types = configuration.types if types is None else types
    missing = set(kernel.arg_names) ^ (set(types) | set(configuration.constants))
    if missing:
        raise ValueError(f"configuration {configuration.name!r}: arguments {sorted(missing)} are not the kernel's")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in configuration.aligned
    }
    return ASTSource(kernel, signature, configuration.constants, aligned)


def gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump says of the resources of a cubin, and its assembly; both tools are in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        commands = ["cuobjdump", "--dump-resource-usage"], ["nvdisasm", "--print-code", "--no-dataflow"]
        usage, code = (
            subprocess.run([tools / tool, *flags, path], capture_output=True, text=True, check=True).stdout
            for tool, *flags in commands
        )
    return usage, code


class Instruction(NamedTuple):
    """One of a program, and where control goes from there."""

    opcode: str
    targets: tuple[int, ...]  # that it may jump to, as places in the program
    falls_through: bool  # may continue with the next one


def cuda_instructions(code: str) -> list[Instruction]:
    """The instructions of a disassembled cubin."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str, str]] = []  # predicate, opcode, operands
    line_like = re.compile(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]+)([^;]*)", re.M)
    for label, *instruction in line_like.findall(code):
        if label:
            labels[label] = len(found)
        else:
            found.append(tuple(instruction))
    met: dict[str, list[int]] = {}  # where the threads that a barrier divides meet again
    for _, opcode, operands in found:
        if opcode.startswith("BSSY"):
            met.setdefault(operands.split(",")[0].strip(), []).extend(places_of(operands, labels))
    program = []
    for predicate, opcode, operands in found:
        name = opcode.split(".")[0]
        ends = name in ("EXIT", "RET", "BSYNC") or (name in ("BRA", "JMP") and operands.strip().startswith("`"))
        targets = places_of(operands, labels) if name in ("BRA", "JMP") else ()
        if name == "BSYNC":
            targets = tuple(met.get(operands.strip(), ()))
        program.append(Instruction(opcode, targets, bool(predicate) or not ends))
    return program


def amd_instructions(code: str) -> list[Instruction]:
    """The instructions of an AMD assembly."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []  # opcode, operands
    line_like = re.compile(r"^(\.LBB\w+):|^\s+((?:[vs]|global|buffer|flat|scratch|ds)_\w+)([^;\n]*)", re.M)
    for label, opcode, operands in line_like.findall(code):
        if label:
            labels[label] = len(found)
        else:
            found.append((opcode, operands))
    ends = "s_branch", "s_endpgm", "s_setpc_b64"
    return [
        Instruction(
            opcode,
            places_of(operands, labels) if opcode.startswith(("s_branch", "s_cbranch")) else (),
            opcode not in ends,
        )
        for opcode, operands in found
    ]


def places_of(operands: str, labels: dict[str, int]) -> tuple[int, ...]:
    return tuple(labels[label] for label in re.findall(r"\.L\w+", operands) if label in labels)


def loops_of(program: list[Instruction]) -> list[list[Instruction]]:
    """The outermost loops of a program: its strongly connected parts, wherever the compiler has put their pieces."""
    return [[program[i] for i in places] for places in cycles(program, range(len(program)))]


def innermost_loops(program: list[Instruction]) -> list[list[Instruction]]:
    """The loops of a program that have none within, in the order of the program."""

    def within(loop: list[int]) -> list[list[int]]:
        inside = set(loop)
        entered = {j for i in range(len(program)) if i not in inside for j in after(program, i) if j in inside}
        nested = cycles(program, [i for i in loop if i not in (entered or {loop[0]})])
        return [innermost for inner in nested for innermost in within(inner)] or [loop]

    found = [loop for outer in cycles(program, range(len(program))) for loop in within(outer)]
    return [[program[i] for i in loop] for loop in sorted(found)]


def after(program: list[Instruction], i: int) -> list[int]:
    """Where control may go from instruction `i`."""
    following = [i + 1] if program[i].falls_through and i + 1 < len(program) else []
    return [*program[i].targets, *following]


def cycles(program: list[Instruction], places: Iterable[int]) -> list[list[int]]:
    """The strongly connected parts, of more than one instruction, of the part of a program at `places`."""
    among = set(places)
    onward = {i: [j for j in after(program, i) if j in among] for i in among}
    back: dict[int, list[int]] = {i: [] for i in among}
    for i, following in onward.items():
        for j in following:
            back[j].append(i)

    def visit(start: int, edges: dict[int, list[int]], seen: set[int]) -> list[int]:
        """All that is not `seen` and can be reached from `start`, each after what it leads to."""
        seen.add(start)
        done, path = [], [(start, iter(edges[start]))]
        while path:
            place, following = path[-1]
            for j in following:
                if j not in seen:
                    seen.add(j)
                    path.append((j, iter(edges[j])))
                    break
            else:
                done.append(place)
                path.pop()
        return done

    seen: set[int] = set()
    order = [place for start in sorted(among) if start not in seen for place in visit(start, onward, seen)]
    seen = set()
    parts = [visit(start, back, seen) for start in reversed(order) if start not in seen]  # Kosaraju
    return [sorted(part) for part in parts if len(part) > 1]


def size_of(program: list[Instruction]) -> int:
    """Instructions that are issued: none that only fills a line of the instruction cache."""
    return len(program) - count_matching(program, "NOP")


def count_matching(instructions: Iterable[Instruction], pattern: str) -> int:
    return sum(bool(re.match(pattern, instruction.opcode)) for instruction in instructions)


def shipped_modules() -> list[str]:
    """The modules with `configurations(target)`."""
    names = [f"{kernels.__name__}.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    return [name for name in names if hasattr(import_module(name), "configurations")]


class Job(NamedTuple):
    """The address of a configuration: kernels cannot be sent to another process."""

    module: str
    target: str
    place: int  # in the list of configurations

    def configuration(self) -> Configuration:
        return import_module(self.module).configurations(CHIPS[self.target].tiles)[self.place]

    def run(self) -> Report:
        return inspect(self.configuration(), self.target)


def jobs(modules: Iterable[str], targets: Iterable[str], kernel: str, quick: bool) -> list[Job]:
    """Every configuration whose name holds `kernel`. If `quick`, one of each kernel: its first or its last one and one
    target after the other, by turns, so that every kernel and every target has its part."""
    targets = list(targets)
    chosen, turn = [], 0
    for module in modules:
        every = {target: import_module(module).configurations(CHIPS[target].tiles) for target in targets}
        found = [Job(module, target, i) for target in targets for i, c in enumerate(every[target]) if kernel in c.name]
        if quick:
            functions = dict.fromkeys(every[job.target][job.place].kernel.__name__ for job in found)
            for function in functions:
                mine = [job for job in found if every[job.target][job.place].kernel.__name__ == function]
                target = targets[turn % len(targets)]
                chosen += [[job for job in mine if job.target == target][-(turn // len(targets) % 2)]]
                turn += 1
        else:
            chosen += found
    return list(dict.fromkeys(chosen))


def compile_all(todo: list[Job], processes: int) -> list[Report]:
    """A report for each job, in their order."""
    # Forked before any kernel is compiled: the children need not import torch and triton once more.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        running = [pool.submit(job.run) for job in todo]
        for done in tqdm(as_completed(running), total=len(todo), unit="kernel", disable=None):
            done.result()  # raises at once what a compiler raised
    return [done.result() for done in running]


def table(reports: list[Report]) -> str:
    """Reports as aligned text, faults below."""
    head = "target", "configuration", "registers", "spills", "local B", "shared B", "warps", "slots", "instructions"
    rows = [head]
    for r in reports:
        registers = f"{r.registers}+{r.scalar_registers}s" if r.scalar_registers else str(r.registers)
        instructions = "  ".join(f"{name} {count}" for name, count in r.instructions.items())
        spills = f"{r.spill_stores}/{r.spill_loads}"
        numbers = spills, str(r.local_bytes), f"{r.shared_bytes:,}", f"{r.warps}/{CHIPS[r.target].warps}"
        slots = " ".join(f"{count:.2f}" for count in r.slots)
        rows.append((r.target, r.name, registers, *numbers, slots, instructions))
    lines = columns(rows, left=(0, 1, 8))
    lines += [f"FAULT {r.target} {r.name}: {fault}" for r in reports for fault in r.faults]
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]], left: Container[int]) -> list[str]:
    """Lines with cells below one another; `left` are columns of text."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]

    def aligned(i: int, cell: str) -> str:
        return cell.ljust(widths[i]) if i in left else cell.rjust(widths[i])

    return ["  ".join(aligned(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows]


def record(reports: list[Report]) -> str:
    """JSON, a line for each kernel: what `read` takes, without what no figure is made of."""
    names = "target", "name", "registers", "shared_bytes", "size", "streams", "num_warps", "constants", "triton"
    lines = [json.dumps({name: getattr(report, name) for name in names}) for report in reports]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def read(file: Path) -> list[Report]:
    """The reports in a file that `--json` or `--record` wrote."""
    return [Report(**fields) for fields in json.loads(file.read_text())]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.aot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--target", nargs="+", choices=CHIPS, help="default: all that tiles are chosen for")
    parser.add_argument("--kernel", default="", help="only configurations whose name holds this text")
    parser.add_argument("--quick", action="store_true", help="only one configuration of each kernel")
    parser.add_argument("--module", nargs="+", help="modules with configurations(target); default: all that ship")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    parser.add_argument("--roofline", action="store_true", help="print ops in place of kernels; default target: sm_90")
    parser.add_argument("--against", type=Path, help="with --roofline: a file of --json or --record of other code")
    parser.add_argument(
        "--record",
        type=Path,
        nargs="?",
        const=RECORDED,
        help="write figures of what is in bf16; default target: sm_90",
    )
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set, and interpreted kernels are not compiled; unset it")
    targets = args.target or (["sm_90"] if args.roofline or args.record else TARGETS)
    todo = jobs(args.module or shipped_modules(), targets, args.kernel, args.quick)
    if args.roofline or args.record:
        todo = [job for job in todo if not OTHER_DTYPES.search(job.configuration().name)]
    reports = compile_all(todo, args.processes)
    if args.roofline:
        lines = static_roofline.table(reports, read(args.against) if args.against else [])
        print("\n".join(columns(lines, left=(0, 1, 2, 11, 14))))
    else:
        print(table(reports))
    if args.record:
        args.record.write_text(record(reports))
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(report) for report in reports], indent=1))
    return int(any(report.faults for report in reports))


if __name__ == "__main__":
    sys.exit(main())
