"""The README and docs/ keep their word: snippets run, commands parse, links lead somewhere, figures have a source.

Python blocks of a page run one after the other in one namespace and a temporary folder. What is large in them, or lies
on the hub, is replaced by the texts in ``SUBSTITUTES``. A block that begins with ``# NAME.py`` is written to that file.

Command lines, in blocks and in the text, are read by the parser of the command, and nothing is trained.

Figures: ``<!-- source: FILE, ... -->`` names files of benchmarks/results. From there to the next such line or heading,
every number of a table, every bold one, and every number with a point, a comma or an x must stand in one of them, up
to rounding; those of a table's row, cell or column together, in one line or one column of the file. On the pages in
``MEASURED`` a table with such numbers, or a bold number, must have a source.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from itertools import takewhile, zip_longest
from pathlib import Path

import datasets
import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from selfgen import BSSConfig, RACConfig, cli
from selfgen.context import generator
from selfgen.context.budget import PassBudget

ROOT = Path(__file__).parents[1]
COMMANDS = sorted((ROOT / "docs" / "commands").glob("*.md"))  # made as a whole by tools/reference.py
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page not in COMMANDS),
]
MEASURED = ["README.md", "results.md", "benchmarks.md", "exactness.md", "data.md", "install.md"]
RESULTS = ROOT / "benchmarks" / "results"

SUBSTITUTES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "model",  # a folder with a tiny model of random weights
    "HuggingFaceTB/SmolLM2-360M-Instruct": "model",
    "openai/gsm8k": "gsm8k",  # a folder with a few rows
    "max_steps=1000": "max_steps=2",
    "bf16=True": "bf16=False",  # CPUs that lack it
    "gradient_accumulation_steps=8": "gradient_accumulation_steps=2",
    "max_new_tokens=256": "max_new_tokens=8",
}
NOT_RUN = ("pip install", "lm_eval ", "mkdir ", "hf ")  # they download, or belong to another tool
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    line: int  # of its first line of content
    text: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(one[1], text.count("\n", 0, one.start(2)) + 1, one[2]) for one in found]


def prose_of(page: Path) -> str:
    """A page without its fenced blocks, line for line."""

    def blank(block: re.Match) -> str:
        return "\n" * block[0].count("\n")

    return re.sub(r"^```\w*\n.*?^```$", blank, page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------------
# Snippets


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A folder with a tiny model and a few rows, under the names that the snippets use."""
    folder = tmp_path_factory.mktemp("parts")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    t.LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = [(f"{number} + 1 =", f"It is {number + 1}.") for number in range(8)]
    for file, names in (("train.jsonl", ("prompt", "completion")), ("gsm8k/train.jsonl", ("question", "answer"))):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    (folder / "test.jsonl").write_text((folder / "train.jsonl").read_text())
    return folder


@pytest.fixture
def workplace(parts, tmp_path, monkeypatch) -> Path:
    for part in parts.iterdir():
        (tmp_path / part.name).symlink_to(part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(generator, "measure_budget", lambda *_, **__: PassBudget(256, 32.0))  # which takes seconds
    return tmp_path


@by_page
def test_python_blocks_run(page, workplace):
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language != "python":
            continue
        source = block.text
        if script := re.match(r"# (\w+\.py)\n", source):
            (workplace / script[1]).write_text(source)
            continue
        for large, small in SUBSTITUTES.items():
            source = source.replace(large, small)
        exec(compile("\n" * (block.line - 1) + source, str(page), "exec"), names)  # a traceback names page and line
    for command in commands_of(page):
        if command[0] == "torchrun" and (workplace / command[-1]).is_file():
            assert run_torchrun(command[1:], workplace) == 0


def run_torchrun(arguments: list[str], folder: Path) -> int:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments], cwd=folder, env=environment, check=False
    ).returncode


def test_every_block_has_a_language_that_is_checked():
    for page in PAGES:
        for block in blocks_of(page):
            assert block.language in ("", "python"), f"{page.name}, line {block.line}: nothing runs {block.language!r}"


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command line of a page: lines of blocks, and code in the text that begins like one."""
    commands = []
    for block in blocks_of(page):
        if block.language:
            continue
        text = re.sub(r"<<END\n.*?\nEND$", "", block.text, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
        commands += [shlex.split(line, comments=True) for line in text.splitlines()]
    for code in re.findall(r"`([^`]+)`", prose_of(page)):
        if code.startswith(("selfgen ", "make ", "pytest ", "python -m ", "torchrun ")):
            commands.append(shlex.split(code.replace("\n", " ")))
    return [command for command in commands if command]


class Parsed(Exception):
    """Raised where a command has read its arguments, before it does anything."""


@pytest.fixture
def only_parsed(monkeypatch):
    for name in cli.COMMANDS:
        module = import_module(f"selfgen.cli.{name}")

        def parse(*arguments, parse=module.parse):
            parse(*arguments)
            raise Parsed

        monkeypatch.setattr(module, "parse", parse)


@by_page
def test_commands_are_accepted(page, workplace, only_parsed, capsys):
    (workplace / "bss.yaml").write_text("model: model\ndataset: train.jsonl\noutput_dir: out\n")
    (workplace / "examples").symlink_to(ROOT / "examples")
    for command in commands_of(page):
        line = shlex.join(command)
        if line.startswith(NOT_RUN):
            continue
        name, *arguments = command
        if name == "torchrun":
            name, *arguments = after_torchrun(arguments)
        if name == "selfgen":
            check_selfgen(line, arguments, capsys)
        elif name == "make":
            check_make(line, arguments)
        elif name == "pytest":
            for file in arguments:
                assert file.startswith("-") or (ROOT / file).exists(), f"{line}: there is no {file}"
        elif name == "python" and arguments[0] == "-m":
            check_module(line, *arguments[1:])
        else:
            assert name == "ran as a script" or "=" in name, f"{page.name}: {line!r} is no command that is known here"


def after_torchrun(arguments: list[str]) -> list[str]:
    """The command that torchrun starts."""
    if "-m" in arguments:
        return arguments[arguments.index("-m") + 1 :]
    return ["ran as a script"]  # by test_python_blocks_run


def check_selfgen(line: str, arguments: list[str], capsys) -> None:
    if "..." in arguments or len(arguments) == 1:  # a command as such
        assert arguments[0] in cli.COMMANDS, f"{line}: there is no such command"
        return
    with pytest.raises((Parsed, SystemExit)) as end:
        cli.main(arguments)
    if isinstance(end.value, SystemExit) and end.value.code:
        said = capsys.readouterr().err
        assert "--model" not in arguments, f"{line}: {said}"  # else it is a part of a command: a few options
        assert "arguments are required: --model" in said, f"{line}: {said}"


def check_make(line: str, arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        if argument.startswith("ARGS="):
            continue
        target = re.search(rf"^{re.escape(argument)}:.*\n((?:\t.*\n)*)", makefile, re.MULTILINE)
        assert target, f"{line}: the Makefile has no target {argument}"
        given = [one.removeprefix("ARGS=") for one in arguments if one.startswith("ARGS=")]
        module = re.search(r"-m (\S+) \$\(ARGS\)", target[1])
        if given and module and module[1] != "pytest":
            check_module(line, module[1], *shlex.split(given[0]))


HELP: dict[str, str] = {}


def check_module(line: str, module: str, *arguments: str) -> None:
    """The module is there, and its help has the options."""
    if module == "selfgen":
        return
    if module not in HELP:
        assert find_spec(module), f"{line}: there is no module {module}"
        HELP[module] = help_of(module)
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in HELP[module].split(), f"{line}: {module} has no option {argument}"


def help_of(module: str) -> str:
    from contextlib import redirect_stdout
    from io import StringIO

    before, text = sys.argv, StringIO()
    sys.argv = [module, "--help"]
    try:
        with redirect_stdout(text), pytest.raises(SystemExit) as stop:
            runpy.run_module(module, run_name="__main__")
    finally:
        sys.argv = before
    assert stop.value.code == 0, f"python -m {module} --help fails"
    return re.sub(r"[\[\],=]", " ", text.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Figures

NUMBER = re.compile(r"(?<![\w.])(?P<sign>[-+]?)(?P<digits>\d[\d,]*(?:\.\d+)?(?:e-?\d+)?)(?=x\b|\b|\s|$)(?!\w*[A-Zak])")


@dataclass(frozen=True)
class Figure:
    """A number as it stands on a page."""

    text: str
    sign: str
    value: float
    half: float  # of the last digit

    @classmethod
    def all_in(cls, text: str) -> list[Figure]:
        found = []
        for match in NUMBER.finditer(text):
            digits = match["digits"].rstrip(",").replace(",", "")
            number, _, exponent = digits.partition("e")
            unit = 10.0 ** (int(exponent or 0) - len(number.partition(".")[2]))
            found.append(cls(match[0], match["sign"], float(digits), unit / 2))
        return found

    def stands_in(self, source: list[Figure]) -> bool:
        """Whether one of ``source`` is this number, or becomes it by rounding."""
        return any(
            (not self.sign or self.sign == other.sign) and abs(self.value - other.value) <= self.half * (1 + 1e-9)
            for other in source
        )


@dataclass(frozen=True)
class Source:
    """Files of results, as units within which figures belong together: their lines, and the columns of their tables."""

    units: list[list[Figure]]

    @classmethod
    def of(cls, names: str) -> Source:
        units: list[list[Figure]] = []
        for name in names.split(", "):
            text = (RESULTS / name).read_text(encoding="utf-8")
            units += [Figure.all_in(line) for line in text.splitlines()]
            for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
                columns = zip_longest(*(line.split("|") for line in table.splitlines()), fillvalue="")
                units += [Figure.all_in(" | ".join(column)) for column in columns]
        return cls(units)

    def has(self, figures: list[Figure]) -> bool:
        """Whether all of ``figures`` are in one unit."""
        return not figures or any(all(figure.stands_in(unit) for figure in figures) for unit in self.units)

    def missing_in_row(self, cells: list[list[Figure]], columns: list[list[Figure]], texts: list[str]) -> list[Figure]:
        """Figures of a table's row that do not stand where those beside them, or above and below them, do."""
        label, *values = cells
        missing = [figure for figure in label if not self.has([figure])]
        if self.has([figure for cell in values for figure in cell]):
            return missing
        for cell, column, text in zip(values, columns[1:], texts[1:], strict=True):
            if self.has(cell if len(cell) > 1 else column):
                continue
            for clause in re.split(r"(?<=\D)[.,:;] ", text):
                found = Figure.all_in(clause)
                missing += [] if self.has(found) and len(cell) > 1 else found
        return missing


def without_settings(line: str) -> str:
    """A line without code, addresses, versions and values of p, which are not measured."""
    line = re.sub(r"`[^`]*`|\]\([^)]*\)|\bp = [\d.]+|arXiv [\d.]+", " ", line)
    return re.sub(r"(torch|Triton|transformers|Python|lm_eval) \d[\d.]*", " ", line)


def measured_in(line: str) -> list[list[Figure]]:
    """What of a line of text has to have a source, and what of it belongs together: a number and its p-value."""
    line = without_settings(line)
    bold = re.findall(r"\*\*([-+]?[\d.,]+x?)\*\*", line)
    looks = re.findall(r"(?<![\w.,])[-+]?(?:\d+\.\d+|\d{1,3}(?:,\d{3})+|\d+(?=x\b))(?![\w.]*\d)x?", line)
    pairs = re.findall(r"[-+]\d+\.\d+ \([\de.-]+\)", line)
    return [Figure.all_in(text) for text in (*bold, *looks, *pairs)]


def unsourced(lines: list[str]) -> list[str]:
    """What ``lines`` of a page quote that their source has not."""
    source: Source | None = None
    named, missing = "", []

    def say(number: int, figures: list[Figure]) -> None:
        missing.extend(f"line {number}: {one.sign}{one.text.lstrip('+-')} is not in {named}" for one in figures)

    number = 0
    while number < len(lines):
        line, number = lines[number], number + 1
        if line.startswith("#"):
            source = None
        elif comment := re.fullmatch(r"<!-- source: (.*) -->", line):
            named, source = comment[1], Source.of(comment[1])
        elif source is None:
            if re.match(r"\|.*\d\.\d|.*\*\*[-+]?[\d.]+", without_settings(line)):
                missing.append(f"line {number}: these figures have no source")
        elif line.startswith("|"):
            table = [line, *takewhile(lambda one: one.startswith("|"), lines[number:])]
            texts = [[cell.strip() for cell in without_settings(one).strip().split("|")[1:-1]] for one in table]
            width = len(texts[0])
            rows = [[Figure.all_in(cell) for cell in row] for row in texts]
            columns = [[figure for row in rows[1:] for figure in row[place]] for place in range(width)]
            say(number, [figure for cell in rows[0] for figure in cell if not source.has([figure])])
            for place, (row, text) in enumerate(zip(rows[1:], texts[1:], strict=True), start=2):
                say(number + place, source.missing_in_row(row, columns, text))
            number += len(table) - 1
        else:
            for figures in measured_in(line):
                if not source.has(figures):
                    say(number, figures)
    return missing


@pytest.mark.parametrize("name", MEASURED)
def test_figures_have_a_source(name):
    page = next(page for page in PAGES if page.name == name)
    missing = unsourced(prose_of(page).splitlines())
    assert not missing, f"{name}:\n" + "\n".join(missing)


def test_the_readme_says_what_the_pages_say():
    """Its figures are taken from many runs, so the check above is a weak one for them."""
    pages = [prose_of(page) for page in PAGES if page.name in MEASURED[1:]]
    known = {figure.text for page in pages for figure in Figure.all_in(without_settings(page))}
    readme = prose_of(PAGES[0]).splitlines()
    rows = [without_settings(line) for line in readme if line.startswith("|") and "**" in line]
    unknown = {figure.text for row in rows for figure in Figure.all_in(row)} - known
    assert len(rows) == 4
    assert not unknown


def test_figures_that_are_wrong_are_found():
    source = Figure.all_in("| 0.859 | +12.5 ± 3.2 | 4,763 MiB | 34.5x | 4e-06 | -0.0 |")
    for right in ("0.86", "+12.5", "12.5", "4763", "4,763", "34x", "0.859", "4e-06", "-0.0"):
        assert Figure.all_in(right)[0].stands_in(source), right
    for wrong in ("0.87", "-12.5", "12.6", "4,764", "33x", "4e-05", "+1"):
        assert not Figure.all_in(wrong)[0].stands_in(source), wrong
    assert [figure.text for figure in Figure.all_in("A100, 8B, 32k, 7.4x, 10M (0.02)")] == ["7.4", "0.02"]


def test_the_picture_is_of_the_run_that_the_readme_tells():
    picture = (ROOT / "docs" / "figure.svg").read_text(encoding="utf-8")
    tokens, steps, passes = re.search(r"answer of (\d+) tokens.* takes (\d+) steps.* (\d+) passes", picture).groups()
    told = f"made by {steps} decode steps and by {passes} parallel passes: the same {tokens} tokens"
    assert told in PAGES[0].read_text(encoding="utf-8")


def test_the_picture_is_refused_where_the_contexts_differ():
    from tools.figure import Pass, check

    tokens, mask = torch.tensor([5, 6]), torch.tensor([True, False])
    passes = [Pass(computed=range(2), settled=2, corrected=[0], guess=tokens)]
    check(tokens, mask, tokens, mask, passes)
    with pytest.raises(RuntimeError, match="different contexts"):
        check(tokens, mask, torch.tensor([5, 7]), mask, passes)
    with pytest.raises(RuntimeError, match="after pass 1 had settled it"):
        check(tokens, mask, tokens, mask, [Pass(range(2), 2, [0], torch.tensor([4, 6])), *passes])
    with pytest.raises(RuntimeError, match="before every token"):
        check(tokens, mask, tokens, mask, [])


# ---------------------------------------------------------------------------------------------------------------------
# Links and length


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


OTHERS = [
    ROOT / "ARCHITECTURE.md",
    ROOT / "CHANGELOG.md",
    *(page for folder in ("examples", "benchmarks") for page in sorted((ROOT / folder).rglob("*.md"))),
]


@pytest.mark.parametrize("page", [*PAGES, *COMMANDS, *OTHERS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose_of(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors_of(file), f"{page.name} links to {target}: there is no such heading"


@by_page
def test_files_that_are_named_are_there(page):
    folders = "selfgen|selfgen_kernels|tests|benchmarks|tools|docs|examples"
    for path in re.findall(rf"`((?:{folders})/[\w/.]*)`", prose_of(page)):
        assert (ROOT / path).exists(), f"{page.name} names {path}, which is not there"


def test_every_option_is_explained():
    text = "\n".join(prose_of(page) for page in PAGES)
    inherited = {field.name for field in fields(t.TrainingArguments)} | {"remove_unused_columns"}
    for name in {field.name for field in (*fields(BSSConfig), *fields(RACConfig))} - inherited:
        assert f"`{name}`" in text or f"`--{name.replace('_', '-')}" in text, f"no page tells what {name} does"


def test_what_is_made_from_the_code_is_as_the_code_is():
    from tools import reference

    made = reference.pages()
    assert {*COMMANDS, *(ROOT / "docs" / f"{name}.md" for name in ("api", "commands", "kernels", "options"))} <= {*made}
    for page, text in made.items():
        assert page.exists(), f"{page} is missing: python -m tools.help"
        assert page.read_text(encoding="utf-8") == text, f"{page.name} is not as the code is: python -m tools.help"
    assert {page.stem for page in COMMANDS} == {*cli.COMMANDS}


def test_every_op_has_a_page():
    """Its page runs it, and says when to use it."""
    from tools.reference import ops

    assert {*ops()} == {page.stem for page in (ROOT / "docs" / "kernels").glob("*.md")}
    for family, names in ops().items():
        assert {*names} <= names_in(begins_with_its_use(f"kernels/{family}.md"))


def test_every_trainer_has_a_page():
    from selfgen import training

    pages = {"bss": "BSSTrainer", "bash": "BASHTrainer", "rac": "RACTrainer", "targets": "teacher", "trl": "SFTTrainer"}
    for page, name in pages.items():
        assert name in names_in(begins_with_its_use(f"{page}.md"))
    assert {name for name in training.__all__ if name.endswith("Trainer")} <= {*pages.values()}


def begins_with_its_use(name: str) -> Path:
    """The page, whose first paragraph says when to use what it is about."""
    page = ROOT / "docs" / name
    assert page.read_text(encoding="utf-8").split("\n\n")[1].startswith("**Use "), f"{name}: when to use it?"
    return page


def names_in(page: Path) -> set[str]:
    """Those that its Python code has."""
    return {name for block in blocks_of(page) if block.language == "python" for name in re.findall(r"\w+", block.text)}


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[^)#]+)", PAGES[0].read_text()))
    assert {f"docs/{page.name}" for page in PAGES if page.parent == ROOT / "docs"} <= linked


def test_the_readme_is_short():
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 1300
