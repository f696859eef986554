"""Every family of decoders: contexts are those of the model's own forward over every prefix, or it is refused by name.

The whole zoo (``-m slow``) writes docs/models.md.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers as t
from datasets import Dataset
from helpers.training import make_trainer, weights
from zoo.definition import contexts, rows, wrong_tokens
from zoo.document import reason, table, write_section
from zoo.families import (
    decoder,
    families,
    multimodal,
    multimodal_families,
    multimodal_variants,
    variants,
)

from selfgen import UnsupportedModelError
from selfgen.context.hidden_states import ReuseError

LENGTHS = [(30, 9), (3, 9), (5, 30), (40, 4)]  # beyond every window and chunk, begun and grown
BUDGETS = (1, 7, None)
FAST = {
    "llama", "mistral", "gemma3_text", "gpt_oss", "phimoe, windows", "qwen2_moe, windows", "roberta, decoder", "bert",
    "mamba", "gpt_neo", "llama4_text", "llama4_text, full attention", "doge, experts", "llama, dynamic", "llama, yarn",
}  # fmt: skip
FAST_MULTIMODAL = {"gemma3", "llava_onevision", "mllama", "molmo2", "paligemma", "qwen2_5_vl"}


@dataclass
class Entry:
    name: str
    status: str  # exact, sequential only, refused, not built; WRONG or CRASH must not occur
    why: str = ""
    reuse: str = ""
    model_class: str = ""

    @property
    def good(self) -> bool:
        return self.status not in ("WRONG", "CRASH") and "WRONG" not in self.reuse


def names(of=families, with_variants=variants) -> Iterator[str]:
    for family, config_class in of().items():
        yield family
        yield from (f"{family}, {variant}" for variant in with_variants(config_class))


def look_at(name: str, build=decoder) -> Entry:
    """Try a family, or a variant of it, with both methods."""
    try:
        model = build(name)
    except Exception as error:
        return Entry(name, "not built", reason(error))
    entry = compare(name, model)
    entry.model_class = type(model).__name__
    return entry


def compare(name: str, model) -> Entry:
    prompts, references = rows(LENGTHS)
    shifted = [module for module in model.modules() if "rope_deltas" in vars(module)]
    for module in shifted:
        module.rope_deltas = torch.tensor([[7]])  # a forward over an image leaves this, and text must not see it
    try:
        sequential = contexts(model, prompts, references, method="sequential")
    except UnsupportedModelError as error:
        return Entry(name, "refused", reason(error))
    except Exception as error:
        return Entry(name, "CRASH", reason(error))
    for module in shifted:
        module.rope_deltas = None
    wrong = wrong_tokens(model, prompts, references, sequential)
    for module in shifted:
        module.rope_deltas = torch.tensor([[7]])
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
    log, logger = Lines(), logging.getLogger("selfgen.training")
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


@pytest.mark.parametrize("name", sorted(FAST))
def test_a_few(name):
    entry = look_at(name)
    assert entry.good, entry
    assert entry.status != "not built", entry


@pytest.mark.parametrize("name", sorted(FAST_MULTIMODAL))
@pytest.mark.one_case
def test_a_few_that_see(name):
    if name not in multimodal_families():
        pytest.skip("not in this version of transformers")
    entry = look_at(name, multimodal)
    assert entry.good, entry
    assert (entry.status, entry.reuse) == (("refused", "") if name == "paligemma" else ("exact", "yes")), entry


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
    write_section("Decoders", document(entries, "family"))
    check(entries)


@pytest.mark.slow
def test_all_that_see_or_hear(caplog):
    caplog.set_level(logging.ERROR)
    entries = [look_at(name, multimodal) for name in names(multimodal_families, multimodal_variants)]
    write_section("Models that also see or hear", [*ON_TEXT, "", *document(entries, "family", "class")])
    check(entries)


def check(entries: list[Entry]) -> None:
    assert not [entry for entry in entries if not entry.good]
    assert sum(entry.status == "not built" for entry in entries) <= len(entries) // 20


ON_TEXT = """\
Classes that `AutoModelForMultimodalLM` gives, on rows of text: contexts, answers and training run the decoder of text
alone, and a row with an image or a sound is refused or counted when it is read. What a class demands beside tokens in
training (types that say that a token is text) is given. Multimodal rope has the same position in each dimension, and
shifts that a forward over an image left (`rope_deltas`) are put aside while rows of text are computed. `--model` and
`BSSTrainer` load such a model by its name, as any other.""".splitlines()
STATUS = ("exact", "sequential only", "refused", "not built", "WRONG", "CRASH")


def document(entries: list[Entry], *first: str) -> list[str]:
    counts = {status: sum(entry.status == status for entry in entries) for status in STATUS}
    total = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    found = []
    for entry in entries:
        contexts_are = f"{entry.status} ({entry.why})" if entry.why else entry.status
        found.append([*[entry.name, entry.model_class][: len(first)], contexts_are, entry.reuse])
    return [
        f"transformers {t.__version__}, {len(entries)} entries: {total}.",
        "",
        *table([*first, "contexts", "reuse"], found),
    ]
