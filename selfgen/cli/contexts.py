"""``selfgen contexts``: mixed contexts as a data set, for BASH."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from ..context.masks import check_probability
from ..files import check_folder
from ..sharing import in_turn, is_first, let_first_speak
from ..stored_contexts import write_contexts
from ..training.config import AUTO, GENTLE, GeneratorOptions
from .options import (
    ROWS,
    DataArguments,
    ModelArguments,
    check_least,
    check_seed,
    device,
    fail,
    make_parser,
    parse,
    show_log,
    source_of,
)

logger = logging.getLogger(__name__)

PROG = "selfgen contexts"


@dataclass
class ContextArguments:
    """What to write, and how."""

    _argument_group_name = "contexts"

    output_dir: str = field(
        metadata={"help": "Folder for the contexts; if it has a part of them, the rest is added. Required."}
    )
    self_prob: float | str = field(
        default=GENTLE,
        metadata={
            "help": "Probability that a context token is a self token, in [0, 1]. The default is that of selfgen train "
            "--method bash."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the contexts; another one gives other self tokens."})
    shard_rows: int = field(default=512, metadata={"help": "Rows per file; a kill loses at most the work on one file."})
    batch_size: int = field(default=32, metadata={"help": "Rows whose contexts are made at once."})
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU even if there is an accelerator."})

    def __post_init__(self) -> None:
        if isinstance(self.self_prob, str):
            raise ValueError(
                f"self_prob is {AUTO}, which follows a training step by step, and here nothing is trained: give a "
                "probability, or train with selfgen train --method bss"
            )
        check_probability("self_prob", self.self_prob)
        check_seed(self.seed)
        check_least(self, 1, "shard_rows", "batch_size")


def run(arguments: list[str]) -> int:
    show_log()
    let_first_speak()
    parser = make_parser(
        (ModelArguments, DataArguments, ContextArguments, GeneratorOptions),
        prog=PROG,
        usage="selfgen contexts [CONFIG.yaml] --model NAME --dataset NAME --output-dir DIR [options]",
        description="Write mixed contexts as a data set, for selfgen train --method bash --contexts DIR.",
        epilog="After a kill, the same command continues where it stopped. Processes that have one --output-dir, under "
        "torchrun or not, share the work.",
        first=("model", *ROWS, "output_dir", "self_prob"),
    )
    try:
        model_arguments, data, options, how = parse(parser, arguments)
        how.check_generator()
        check_folder(options.output_dir, "output_dir")
        if data.assistant_turns != "last":
            raise ValueError("assistant_turns=all is for selfgen train --method bss: stored contexts are of one answer")
        tokenizer = model_arguments.load_tokenizer()
        with in_turn():
            rows, report = data.tokenize(data.load(), tokenizer)
        if is_first():
            logger.log(report.level, "data: %s", report)
        generator = how.generator(model_arguments.load_model().to(device(options.use_cpu)), tokenizer)
        record = write_contexts(
            generator,
            rows,
            options.output_dir,
            self_prob=options.self_prob,
            seed=options.seed,
            batch_size=options.batch_size,
            shard_rows=options.shard_rows,
            method=how.context_method,
            provenance={"revision": model_arguments.commit(), **source_of(data)},
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error, PROG)
    if is_first():
        statistics = record["statistics"]
        print(
            f"contexts of {len(rows)} rows are in {options.output_dir}: {statistics['self_share']:.1%} self tokens, "
            f"{statistics['agreement']:.1%} of them equal to the reference"
        )
    return 0
