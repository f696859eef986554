"""Whether the offsets of Triton kernels can wrap, for `compiling.py`.

The compiler types an integer argument by its value, so a stride below 2^31 arrives as i32 and a product with it is i32
unless the kernel widens a factor first. Every configuration is lowered to TTIR with all its integers as i32. What is
looked for, on the way back from each `tt.addptr` offset and each tensor descriptor's index: a 32-bit product of two
values neither of which is constant (row * stride), or of an argument and a constant (stride * BLOCK). Widening a
wrapped product afterwards does not hide it. A product of a constant and an index, such as block * BLOCK, is not looked
for: its result is bounded by the size that it counts up to.
"""

import re
from importlib import import_module

from triton.compiler.compiler import make_backend

from tools.aot import gpu_target, shipped_modules, source

DEFINITION = re.compile(r"^\s*(%[\w:-]+) = \"?([\w.]+)\"?(.*)$")
PRODUCTS = ("arith.muli", "arith.shli")


def ttir(configuration) -> str:
    """The TTIR of `configuration` with every scalar integer but the seed 32 bits wide, functions inlined."""
    from triton._C.libtriton import ir

    types = {n: "i32" if t == "i64" and n != "seed" else t for n, t in configuration.types.items()}
    ast, target = source(configuration, types), gpu_target("sm_90")
    backend = make_backend(target)
    options = backend.parse_options(dict(configuration.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    made = backend.get_codegen_implementation(options), backend.get_module_map()
    module = ast.make_ir(target, options, *made, context)
    stages: dict = {}
    backend.add_stages(stages, options, ast.language)
    return str(stages["ttir"](module, {}))


def narrow_products(text: str) -> list[str]:
    """The lines of `text`, a TTIR module, with a 32-bit product that reaches an address."""
    made_by: dict[str, tuple[str, list[str], str]] = {}  # value -> operation, operands, line
    arguments, addresses, open_blocks = set(), [], []
    for line in text.splitlines():
        line = re.sub(r" loc\(.*\)$", "", line)
        arguments |= set(re.findall(r"(%\w+): i32", line)) if "tt.func" in line else set()
        carried: list[list[str]] = []  # by position, the values that each result of a loop or branch may have
        if match := DEFINITION.match(line):
            results, operation, rest = match.groups()
            if operation in ("scf.for", "scf.if"):
                pairs = re.findall(r"(%\w+) = (%[\w-]+(?:#\d+)?)", rest.split("iter_args")[-1])
                base, _, number = results.partition(":")
                carried = [[first] for _, first in pairs] or [[] for _ in range(int(number or 1))]
                for i, values in enumerate(carried):
                    for name in (f"{base}#{i}" if number else base, *(pair[0] for pair in pairs[i : i + 1])):
                        made_by[name] = operation, values, line.strip()
            else:
                operands = re.findall(r"%[\w-]+(?:#\d+)?", rest)
                made_by[results] = operation, operands, line.strip()
                if operation == "tt.addptr":
                    addresses.append(operands[1])
                elif operation.startswith("tt.descriptor"):
                    addresses += operands[1:]
        elif "scf.yield" in line and open_blocks:
            for values, value in zip(open_blocks[-1], re.findall(r"%[\w-]+(?:#\d+)?", line), strict=False):
                values.append(value)
        elif "tt.descriptor_store" in line:
            addresses += re.findall(r"%[\w-]+(?:#\d+)?", line.partition("[")[2].partition("]")[0])
        if re.match(r"\s*\}", line) and open_blocks:
            closed = open_blocks.pop()
            carried = closed if "else" in line else carried
        if line.rstrip().endswith("{"):
            open_blocks.append(carried)

    def is_constant(name: str) -> bool:
        operation, operands, _ = made_by.get(name, ("argument", [], ""))
        through = "tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi"
        return operation == "arith.constant" or (operation in through and is_constant(operands[0]))

    def is_argument(name: str) -> bool:
        operation, operands, _ = made_by.get(name, ("argument", [], ""))
        through = "tt.splat", "tt.broadcast", "tt.expand_dims"
        return name in arguments or (operation in through and is_argument(operands[0]))

    found, seen, waiting = [], set(), addresses
    while waiting:
        name = waiting.pop()
        if name in seen or name not in made_by:
            continue
        seen.add(name)
        operation, operands, line = made_by[name]
        if operation in PRODUCTS and re.search(r": (tensor<[\dx]*)?i32\b", line):
            a, b = operands
            if (not is_constant(a) and not is_constant(b)) or is_argument(a) or is_argument(b):
                found.append(line)
        if operation != "tt.load":  # what is stored in memory was some other kernel's or the caller's
            waiting += operands
    return found


def all_products() -> dict[str, dict[str, list[str]]]:
    """{module: {configuration: its narrow products}}"""
    found: dict[str, dict[str, list[str]]] = {}
    for module in (*shipped_modules(), "specimens"):
        done, found[module] = set(), {}
        for configuration in import_module(module).configurations("sm_90"):
            # Tiles and element types change no offset's type: one configuration for each set of arguments.
            scalars = tuple(name for name, kind in configuration.types.items() if not kind.startswith("*"))
            if (key := (configuration.kernel.__name__, scalars, tuple(configuration.constants))) not in done:
                done.add(key)
                found[module][configuration.name] = narrow_products(ttir(configuration))
    return found
