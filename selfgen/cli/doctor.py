"""``selfgen doctor``: whether an installation works, what it computes with, and what it allows a model.

It must work where the installation does not, so nothing is imported before the part that needs it, and what fails in a
part is a line of that part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import fail, meant

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROG = "selfgen doctor"
_LONGEST = 2048  # tokens of the rows that a model is looked at for, if it has so many positions
_WIDTH = 20  # of names


@dataclass(frozen=True)
class Finding:
    """One line: of what, what was found, and whether that is a fault. ``data`` is the same for programs."""

    name: str
    text: str
    broken: bool = False
    data: Any = None


Part = Callable[[], Iterator[Finding]]


def make_parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog=PROG,
        allow_abbrev=False,
        usage="selfgen doctor [MODEL] [--weights] [--trust-remote-code] [--json]",
        description="Look at this installation: versions, devices, which kernels compute, whether contexts are exact, "
        "what passes cost, and what a model allows. Ends with exit code 0 if all is well, and 1 if something is "
        "broken, which is marked with !.",
    )
    found.add_argument("model", nargs="?", metavar="MODEL", help="a folder, or a name on the Hugging Face hub")
    found.add_argument("--weights", action="store_true", help="load the weights of MODEL, too, and try what it allows")
    found.add_argument(
        "--trust-remote-code",
        nargs="?",
        const="yes",
        default="no",
        choices=("yes", "no"),
        help="run the code that comes with MODEL, which can do all that you can do: say yes to code that you have read",
    )
    found.add_argument("--json", action="store_true", help="write one JSON object")
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser()
    asked, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        fail(f"unknown argument {unknown[0]!r}{meant(unknown[0], flags)}", PROG)
    if asked.weights and not asked.model:
        fail("--weights goes with a model: selfgen doctor MODEL --weights", PROG)
    return asked


def run(arguments: list[str]) -> int:
    asked = parse(arguments)
    parts: dict[str, Part] = {
        "versions": _versions,
        "devices": _devices,
        "kernels": _kernels,
        "exactness": _exactness,
        "cost of a pass": _cost,
    }
    if asked.model:
        look = _of_weights if asked.weights else _of_configuration
        parts[f"model {asked.model}"] = partial(look, os.path.expanduser(asked.model), asked.trust_remote_code == "yes")
    broken: list[str] = []
    told: dict[str, list[dict[str, Any]]] = {}
    for title, part in parts.items():
        if not asked.json:
            print(title)
        told[title] = []
        for found in _examined(part):
            broken += [f"{title}: {found.name}"] * found.broken
            told[title].append(asdict(found))
            if not asked.json:
                print(_lines(found), flush=True)
    if asked.json:
        print(json.dumps({"ok": not broken, "broken": broken, "parts": told}, indent=1))
    else:
        print(f"\nbroken: {'; '.join(broken)}" if broken else "\nall is well")
    return 1 if broken else 0


def _lines(found: Finding) -> str:
    """A finding as wide as the terminal, the text beside the name."""
    width, indent = max(60, min(120, shutil.get_terminal_size((120, 0)).columns)), " " * (_WIDTH + 3)
    begins = f"{'!' if found.broken else ' '} {found.name:{_WIDTH}} "
    return textwrap.fill(
        found.text, width, initial_indent=begins, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _examined(part: Part) -> Iterator[Finding]:
    """What a part finds; an error in it is a finding, too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from part()
    except Exception as error:
        yield Finding("error", _said(error), broken=True)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ---- The installation ------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    from .. import __version__

    yield Finding("selfgen", f"{__version__} in {os.path.dirname(os.path.dirname(__file__))}", data=__version__)
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}", data=platform.python_version())
    try:
        required = metadata.requires("selfgen") or []
    except metadata.PackageNotFoundError:
        text = "selfgen is not installed, so its requirements are not known: pip install ."
        yield Finding("requirements", text, broken=True)
        return
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Finding("requirements", "can't be read without packaging: pip install packaging", broken=True)
        return
    for one in map(Requirement, required):
        optional = one.marker is not None and "extra" in str(one.marker)
        if one.marker is not None and not optional and not one.marker.evaluate():
            continue  # of another platform
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            if not optional:
                text = f"not installed (supported: {one.specifier}): pip install '{one.name}{one.specifier}'"
                yield Finding(one.name, text, broken=True)
            continue
        fits = one.specifier.contains(version, prereleases=True)
        if fits and optional:
            continue  # any number of them
        remedy = "" if fits else f": pip install '{one.name}{one.specifier}'"
        text = f"{version} ({'' if fits else 'not '}supported: {one.specifier}){remedy}"
        yield Finding(one.name, text, broken=not fits and not optional, data=version)


def _devices() -> Iterator[Finding]:
    import torch

    threads = torch.get_num_threads()
    yield Finding("cpu", f"{_processor()}, {threads} thread{'s' * (threads != 1)} for torch")
    backend = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    built = backend if torch.version.cuda or torch.version.hip else "neither CUDA nor ROCm"
    if not torch.cuda.is_available():
        yield Finding("gpu", f"none that torch sees; it was built for {built}", data=[])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        text = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
        yield Finding(f"gpu {index}", f"{text}; torch was built for {built}", data=found.name)
    for name, package, needed in (("triton", "triton", torch.cuda.is_available()), ("flash-attn", "flash_attn", False)):
        yield _importable(name, package, needed)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _importable(name: str, package: str, needed: bool) -> Finding:
    """Whether a package that ops may use can be imported."""
    if find_spec(package) is None:
        use = "so GPUs run the torch reference, which is slower" if needed else "which nothing here needs"
        return Finding(name, f"not installed, {use}", broken=needed)
    try:
        import_module(package)
    except Exception as error:
        return Finding(name, f"is installed, but can't be imported: {_said(error)}", broken=True)
    return Finding(name, f"{metadata.version(name)} can be imported", data=metadata.version(name))


# ---- What computes ---------------------------------------------------------------------------------------------------


def _kernels() -> Iterator[Finding]:
    import torch

    from selfgen_kernels import backends
    from selfgen_kernels.ops import OPS

    cpu = backends.cpu
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    with_it = f"there is a compiler to build them with ({compiler})" if compiler else "there is no C++ compiler"
    if cpu.missing is None:
        text = f"built; this processor runs those of level {cpu.level()} (there are {', '.join(cpu.LEVELS)})"
        yield Finding("C++", text, data=cpu.level())
    elif cpu.missing == cpu.NOT_BUILT:
        yield Finding("C++", f"not built, so that CPU ops are several times slower (docs/install.md); {with_it}")
    else:
        remedy = "from the source: pip install --force-reinstall --no-deps ."
        yield Finding("C++", f"not used: {cpu.missing}; {with_it}; build them again {remedy}", broken=True)
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        by_choice: dict[backends.Chosen, list[str]] = {}
        for op in OPS:
            by_choice.setdefault(backends.chosen(op, device), []).append(op)
        for choice, ops in by_choice.items():
            by = {"cpu": "C++", "reference": "torch"}.get(choice.backend, choice.backend)
            data = {"backend": choice.backend, "why": choice.why, "ops": ops}
            yield Finding(f"{device}, by {by}", f"{', '.join(ops)} ({choice.why})", data=data)


def _stand_in(device: torch.device, **sizes: int) -> PreTrainedModel:
    """A Llama with random weights, the same at each call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**heads, **sizes, initializer_range=0.3)).to(device)


def _all_devices() -> Iterator[torch.device]:
    import torch

    yield torch.device("cpu")
    if torch.cuda.is_available():
        yield torch.device("cuda")


def _exactness() -> Iterator[Finding]:
    """Both methods on a tiny model."""
    from ..context import ContextGenerator

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    for device in _all_devices():
        generator = ContextGenerator(_stand_in(device, **sizes), token_budget=64, balance=8.0)
        yield _compared(str(device), generator, rows=4, length=40)


def _compared(name: str, generator: Any, rows: int, length: int) -> Finding:
    """Whether the fixed point gives the contexts of the sequential method."""
    import torch

    from ..context.models import vocab_size_of

    started = time.perf_counter()
    most = generator.vocab_size or vocab_size_of(generator.model)
    ids = torch.randint(most, (rows, 8 + length), generator=torch.Generator().manual_seed(0))
    given = list(ids[:, :8]), list(ids[:, 8:])
    how = {"seed": 0, "sample_ids": list(range(rows))}
    loop = generator.contexts(*given, 0.5, method="sequential", **how)
    passes = generator.contexts(*given, 0.5, method="fixed_point", **how)
    pairs = zip((*loop.tokens, *loop.is_self), (*passes.tokens, *passes.is_self), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)
    seconds = time.perf_counter() - started
    what = f"{passes.stats.passes} passes and {loop.stats.passes} steps of the loop gave {rows} contexts"
    verdict = "the same tokens" if same else "other tokens"
    return Finding(name, f"{what}, with {verdict} ({seconds:.1f} s)", broken=not same, data={"same": same})


def _cost() -> Iterator[Finding]:
    """The cost curve of each device, of a small model."""
    from ..context import ContextGenerator

    sizes = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    for device in _all_devices():
        generator = ContextGenerator(_stand_in(device, **sizes))
        yield from _measured(str(device), "a Llama of 4 layers, 256 wide", generator)


def _measured(name: str, model: str, generator: Any) -> Iterator[Finding]:
    budget = generator.budget
    curve = ", ".join(f"{1000 * seconds:.3g} ms with {tokens}" for tokens, seconds in budget.curve.items())
    yield Finding(name, f"a pass of {model} takes {curve} tokens", data=budget.curve)
    data = {"token_budget": budget.tokens, "balance": budget.balance}
    text = f"one more pass costs as much as {budget.balance:.1f} more tokens; a pass has {budget.tokens} tokens at most"
    yield Finding(f"{name}, balance", text, data=data)


# ---- A model ---------------------------------------------------------------------------------------------------------


def _of_configuration(name: str, trust: bool) -> Iterator[Finding]:
    """What a model allows as far as its configuration and its code tell: the weights stay where they are."""
    import torch
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    from ..context.models import auto_class_of, check_there

    check_there(name)
    if adapter := find_adapter_config_file(name):
        name = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
        yield Finding("adapter", f"of {name}, which is looked at here", data=name)
    with _of_code(name):
        auto_class = auto_class_of(name, trust_remote_code=trust)
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
        with torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=trust)
    yield from _looked_at(model)
    text = "only its weights tell: whether it sees later tokens, and whether the passes give its own numbers"
    yield Finding("not known", f"{text} (selfgen doctor MODEL --weights tries it)")


def _looked_at(model: PreTrainedModel) -> Iterator[Finding]:
    """By the functions that the generator and the trainers ask."""
    import torch

    from ..context.hidden_states import ReuseError, decoder_layers
    from ..context.models import max_positions
    from ..context.support import inspect_model

    config, limit = model.config.get_text_config(decoder=True), max_positions(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = getattr(config, "num_hidden_layers", "?")
    size = f"{parameters / 1e6:,.0f} million weights, {layers} layers, {limit or 'any'} positions"
    yield Finding("class", f"{type(model).__name__}, {size}", data=type(model).__name__)
    longest = min(limit or _LONGEST, _LONGEST)
    support = inspect_model(model, longest)
    ragged = not support.missing
    fits = f"yes, by its configuration, for rows of {longest} tokens"
    refused = f"no, it has {'; '.join(support.missing)}"
    yield Finding("fixed_point", fits if ragged else refused, data=ragged)
    how = "one row at a time" if support.isolate_rows else "rows together"
    again = ", without a cache" if support.recompute else ""
    slower = "slower" if ragged else "the only method"
    yield Finding("sequential", f"yes, {how}{again} ({slower}; --context-method sequential)", data=True)
    try:
        decoder_layers(model)
        yield Finding("reuse of passes", "yes" if ragged else "no, without fixed_point", data=ragged)
    except ReuseError as error:
        yield Finding("reuse of passes", f"no: {error}", data=False)
    graphs = ragged and torch.cuda.is_available() and not torch.version.hip
    text = "yes, of weights that are on one GPU" if graphs else "no: they are of fixed_point, on an NVIDIA GPU"
    yield Finding("CUDA graphs", text, data=graphs)
    plan = bool(getattr(model, "supports_tp_plan", False))
    tensor = "yes" if plan else "no, as transformers has no plan for it"
    yield Finding("sharding", f"FSDP2 and DeepSpeed ZeRO: yes; tensor parallelism: {tensor}", data={"tensor": plan})


@contextmanager
def _of_code(name: str) -> Iterator[None]:
    """Say what to do where a model comes with code of its own."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"model {name!r} comes with code of its own, which is not run by itself: read it, and give "
            "--trust-remote-code yes"
        ) from error


def _of_weights(name: str, trust: bool) -> Iterator[Finding]:
    """The same, and what only trying shows."""
    from ..context import ContextGenerator, UnsupportedModelError
    from ..training.losses import why_not_lean
    from .options import ModelArguments, device

    model = ModelArguments(name, trust_remote_code=trust).load_model().to(device(use_cpu=False))
    yield from _looked_at(model)
    try:
        generator = ContextGenerator(model)
        generator.check_causal(in_training=True)
    except ValueError as error:
        yield Finding("refused", str(error), data=True)
        return
    yield Finding("causal", "yes: later tokens change nothing before them", data=True)
    why = why_not_lean(model)
    yield Finding("lean loss", "yes" if why is None else f"no: {why}", data=why is None)
    try:
        yield _compared("exactness", generator, rows=2, length=24)
        yield from _measured(str(model.device), "this model", generator)
    except UnsupportedModelError as error:
        yield Finding("fixed_point, tried", f"no: {error}", data=False)
