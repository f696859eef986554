"""Every family of decoders: contexts are those of the model's own forward over every prefix, or it is refused by name.

The whole zoo (``-m slow``) writes docs/models.md.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import transformers as t
from datasets import Dataset
from helpers.training import make_trainer, weights
from zoo.definition import contexts, rows, wrong_tokens
from zoo.families import families, tiny, tiny_config, variants

from selfgen import UnsupportedModelError
from selfgen.context.hidden_states import ReuseError

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
LENGTHS = [(30, 9), (3, 9), (5, 30), (40, 4)]  # beyond every window and chunk, begun and grown
BUDGETS = (1, 7, None)
FAST = {
    "llama", "mistral", "gemma3_text", "gpt_oss", "phimoe, windows", "qwen2_moe, windows", "roberta, decoder", "bert",
    "mamba", "gpt_neo", "llama4_text", "llama4_text, full attention", "doge, experts", "llama, dynamic", "llama, yarn",
}  # fmt: skip


@dataclass
class Entry:
    name: str
    status: str  # exact, sequential only, refused, not built; WRONG or CRASH must not occur
    why: str = ""
    reuse: str = ""

    @property
    def good(self) -> bool:
        return self.status not in ("WRONG", "CRASH") and "WRONG" not in self.reuse


def names() -> Iterator[str]:
    for family, config_class in families().items():
        yield family
        yield from (f"{family}, {variant}" for variant in variants(config_class))


def look_at(name: str) -> Entry:
    """Try a family, or a variant of it, with both methods."""
    family, _, variant = name.partition(", ")
    config_class = families()[family]
    try:
        model = tiny(tiny_config(config_class, **(variants(config_class)[variant] if variant else {})))
    except Exception as error:
        return Entry(name, "not built", reason(error))
    prompts, references = rows(LENGTHS)
    try:
        sequential = contexts(model, prompts, references, method="sequential")
    except UnsupportedModelError as error:
        return Entry(name, "refused", reason(error))
    except Exception as error:
        return Entry(name, "CRASH", reason(error))
    wrong = wrong_tokens(model, prompts, references, sequential)
    if wrong:
        return Entry(name, "WRONG", f"sequential: {wrong} of {sequential.stats.self_tokens}")
    for budget in BUDGETS:
        try:
            found = contexts(model, prompts, references, budget=budget)
        except UnsupportedModelError as error:
            return Entry(name, "sequential only", reason(error))
        except Exception as error:
            return Entry(name, "CRASH", reason(error))
        wrong = sum(int((a != b).sum()) for a, b in zip(found.tokens, sequential.tokens, strict=True))
        if wrong:
            return Entry(name, "WRONG", f"budget {budget}: {wrong} of {found.stats.self_tokens}")
    try:
        return Entry(name, "exact", reuse=reuse(model))
    except Exception as error:
        return Entry(name, "CRASH", f"training: {reason(error)}")


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def reuse(model) -> str:
    """What one training step says that takes what the passes computed, compared with one that does not."""
    prompts, references = ([row.tolist() for row in column] for column in rows(LENGTHS))
    data = Dataset.from_list(
        [
            {"sample_id": number, "prompt_ids": prompt, "answer_ids": reference}
            for number, (prompt, reference) in enumerate(zip(prompts, references, strict=True))
        ]
    )
    log, logger = Lines(), logging.getLogger("selfgen.training.bss")
    logger.addHandler(log)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        after = []
        for on in (True, False):
            with TemporaryDirectory() as folder:
                trainer = make_trainer(
                    folder, copy.deepcopy(model), data, max_steps=1, optim="sgd", learning_rate=1e-2, reuse_passes=on,
                    report_to=[],
                )  # fmt: skip
                trainer.train()
                after.append(weights(trainer.model))
    except (ReuseError, ValueError) as error:
        return f"not trained: {reason(error)}"
    finally:
        logger.removeHandler(log)
        logger.setLevel(level)
    off = float((after[0] - after[1]).abs().max() / (after[1] - weights(model)).abs().max())
    if not off < 1e-3:
        return f"WRONG by {off:.1e}"
    said = [line for line in log.lines if line.startswith("passes are not reused")]
    return f"no: {reason(ValueError(said[0].rpartition('own forward: ')[2]))}" if said else "yes"


def reason(error: BaseException) -> str:
    """What an error says, without numbers that change from machine to machine and what to do instead."""
    text = " ".join(str(error).split()).replace("|", "/").replace("<", "(").replace(">", ")")
    text = re.sub(r"; (use|give) .*|: the ragged path of .*| \(logits differ by [^)]*\)", "", text)
    text = re.sub(r" by [0-9.]+% of their standard deviation.*", "", text)
    text = re.sub(r"^\w+ (uses|computes|looks|does|can't|restricts)", r"\1", text)
    return text[:140] or type(error).__name__


@pytest.mark.parametrize("name", sorted(FAST))
def test_a_few(name):
    entry = look_at(name)
    assert entry.good, entry
    assert entry.status != "not built", entry


def test_what_is_expected_of_a_few():
    expected = {
        "llama": "exact",
        "phimoe, windows": "sequential only",
        "roberta, decoder": "sequential only",
        "bert": "refused",
        "doge, experts": "refused",
    }
    assert {name: look_at(name).status for name in expected} == expected


@pytest.mark.slow
def test_the_whole_zoo(caplog):
    caplog.set_level(logging.ERROR)
    entries = [look_at(name) for name in names()]
    DOCUMENT.write_text(document(entries))
    assert not [entry for entry in entries if not entry.good]
    assert sum(entry.status == "not built" for entry in entries) <= len(entries) // 20


STATUS = ("exact", "sequential only", "refused", "not built", "WRONG", "CRASH")


def document(entries: list[Entry]) -> str:
    counts = {status: sum(entry.status == status for entry in entries) for status in STATUS}
    total = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    lines = [
        "# Models",
        "",
        "Every family of decoders in transformers that `AutoModelForCausalLM` knows, with options that change what",
        "is computed. The table is written by a slow test, tests/zoo/test_zoo.py, which makes tiny models of random",
        "weights and compares contexts of ragged rows, longer than every window and chunk, with the model's own",
        "forward over each prefix.",
        "",
        "- **exact**: `fixed_point` and `sequential` give the same tokens, at every token budget.",
        "- **sequential only**: `--context-method sequential` is exact; `fixed_point` refuses the model and says why.",
        "- **refused**: no method makes contexts, and the trainer refuses the model, too.",
        "- **not built**: the test could make no tiny model that runs on tokens alone. That says nothing of the",
        "  family: any model is tried before its first contexts.",
        "- **reuse**: whether a training step takes what the passes computed as its forward. Its gradients were",
        "  compared with those of a step that does not.",
        "",
        f"transformers {t.__version__}, {len(entries)} entries: {total}.",
        "",
        "| family | contexts | reuse |",
        "|---|---|---|",
    ]
    for entry in entries:
        contexts_are = f"{entry.status} ({entry.why})" if entry.why else entry.status
        lines.append(f"| {entry.name} | {contexts_are} | {entry.reuse} |")
    return "\n".join(lines) + "\n"
