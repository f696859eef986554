"""``selfgen inspect``: a few rows token by token, in the terminal and as one HTML file."""

from __future__ import annotations

import io
import logging
import sys
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from ..context import ContextGenerator
from ..context.masks import Masks, check_probability
from ..context.models import unpadded_vocab_size
from ..evaluation.gap import SELF_TEMPERATURE
from ..evaluation.inspection import TokenTexts, inspect_rows
from ..evaluation.inspection.page import MADE_BY, page
from ..evaluation.inspection.terminal import show
from ..files import SaveError, check_file, write_whole, writing
from ..sharing import let_first_speak
from ..training.config import GeneratorOptions
from .options import (
    ROWS,
    DataArguments,
    ModelArguments,
    check_least,
    check_seed,
    check_temperature,
    device,
    fail,
    make_parser,
    parse,
    show_log,
)

logger = logging.getLogger(__name__)

PROG = "selfgen inspect"


@dataclass
class InspectArguments:
    """What is looked at."""

    _argument_group_name = "inspection"

    output_file: str = field(
        default="inspect.html",
        metadata={"help": "File for the page; one that was written by this command before is replaced."},
    )
    rows: int = field(
        default=4,
        metadata={"help": "Rows to look at, the first ones; --dataset-split 'train[100:]' has others."},
    )
    self_prob: float = field(
        default=0.25,
        metadata={
            "help": "Probability that a context token is a self token, in [0, 1]. The default is above that of "
            "contexts to train on, 0.1, so that a few rows show some."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of all that is sampled; another one gives other self tokens."})
    max_new_tokens: int = field(
        default=256, metadata={"help": "Most tokens of a free-running answer; longer ones are broken off."}
    )
    temperature: float = field(default=0.0, metadata={"help": "Temperature of free-running answers; 0 is greedy."})
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU even if there is an accelerator."})

    def __post_init__(self) -> None:
        check_least(self, 1, "rows", "max_new_tokens")
        check_probability("self_prob", self.self_prob)
        check_temperature(self, "temperature")
        check_seed(self.seed)


@dataclass
class InspectedContexts(GeneratorOptions):
    """How contexts are made: as in training by default."""

    sampling_temperature: float = field(
        default=SELF_TEMPERATURE,
        metadata={
            "help": "Temperature of self tokens; 0 is greedy. 0.7 is that of training without --self-prob; give 1 for "
            "a model that was trained with a number for it."
        },
    )


def run(arguments: list[str]) -> int:
    show_log()
    let_first_speak()
    parser = make_parser(
        (ModelArguments, DataArguments, InspectArguments, InspectedContexts),
        prog=PROG,
        usage="selfgen inspect MODEL DATA [options], or selfgen inspect [CONFIG.yaml] --model NAME --dataset NAME "
        "[options]",
        description="Look at a few rows token by token: mixed contexts and the passes that made them, probabilities, "
        "losses, and the free-running answer beside the reference.",
        first=("model", *ROWS, "output_file", "rows", "self_prob"),
    )
    try:
        found = parse(parser, _named(arguments))
        inspect(*found)
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error, PROG)
    return 0


def _named(arguments: list[str]) -> list[str]:
    """MODEL and DATA as options, where the arguments begin with them."""
    places = list(takewhile(lambda one: not one.startswith("-"), arguments))
    if not places or (len(places) == 1 and places[0].endswith((".yaml", ".yml"))):
        return arguments
    if len(places) != 2:
        wrong = "DATA is missing" if len(places) == 1 else f"there is more than these: {' '.join(places)}"
        raise ValueError(f"begin with MODEL and DATA, then the options, or with a CONFIG.yaml; {wrong}")
    return ["--model", places[0], "--dataset", places[1], *arguments[2:]]


def inspect(
    model_arguments: ModelArguments, data: DataArguments, what: InspectArguments, how: InspectedContexts
) -> None:
    how.check_generator()
    file = Path(what.output_file)
    _check_file(file)
    if data.assistant_turns != "last":
        raise ValueError("assistant_turns=all is for selfgen train: rows are inspected at one answer, the last turn")
    tokenizer = model_arguments.load_tokenizer()
    given = data.load()
    rows, report = data.tokenize(given.select(range(min(what.rows, len(given)))), tokenizer)
    logger.log(report.level, "data: %s", report)
    model = model_arguments.load_model()
    vocab_size = unpadded_vocab_size(model, tokenizer)
    model = model.to(device(what.use_cpu))
    generator = how.generator(model, tokenizer)
    found = inspect_rows(
        generator,
        list(rows),
        what.self_prob,
        answering=ContextGenerator(model, temperature=what.temperature, vocab_size=vocab_size),
        seed=what.seed,
        method=how.context_method,
        max_new_tokens=what.max_new_tokens,
        eos_token_ids=sorted(data.answer_ends(tokenizer, generator.eos_token_ids)),
    )
    settings = {
        "model": model_arguments.model,
        "data": " ".join(filter(None, [data.dataset, data.dataset_config, f"({data.dataset_split})"])),
        "rows": f"{len(found)} of {len(given)}",
        "p": f"{what.self_prob:g}",
        "temperature of self tokens": f"{how.sampling_temperature:g}",
        "answers": "greedy" if what.temperature == 0 else f"at temperature {what.temperature:g}",
        "seed": str(what.seed),
    }
    if how.masks != Masks():
        settings["positions of self tokens"] = ", ".join(
            f"{key} {value}" for key, value in how.masks.describe().items()
        )
    texts = TokenTexts(tokenizer)
    warnings = [str(report)] if report.level > logging.INFO else []
    content = page(found, texts, settings, warnings).encode()
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda stream: stream.write(content))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a pipe may lack some of the signs; the page has them
    show(found, texts, settings)
    print(f"the page is in {file}")


def _check_file(file: Path) -> None:
    """Raise OSError, before any work, if the page can't be written there, or another program has."""
    check_file(file, "output_file")
    if file.exists() and MADE_BY.encode() not in file.read_bytes()[:1000]:
        raise SaveError(f"{PROG} did not write {file}: give another output_file, or remove it")
