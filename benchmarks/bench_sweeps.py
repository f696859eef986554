"""What contexts cost against p, batch, answer length and model size, in units of one teacher-forced forward.

    make bench            (or: pytest benchmarks/bench_sweeps.py)

The forward is over the same rows, with logits at the answers, and alternates with the generation. fp32. Beside them,
where rows are few, one whole step of ``BSSTrainer`` over these rows; `bench_step` has steps over p.
"""

from __future__ import annotations

import time
from functools import cache

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from selfgen import BSSConfig, BSSTrainer, ContextGenerator, MixedContext
from selfgen.data import tokenize_rows
from tools.real_parts import DEVICE, gsm8k, load_smollm2

from .bench_step import Step
from .peers import Grid, Rows

ROUNDS = 2  # the faster one counts: whatever else the machine does only adds to a time
SELF_PROBS = (0.1, 0.25, 0.5, 1.0)
BATCHES = (1, 8, 32)
LENGTHS, LENGTH_PROMPT, LENGTH_ROWS, DEPTH_ROWS = (64, 128, 256, 512, 1024), 16, 4, 2
LARGEST_SLOWDOWN = 1.3  # of a token from the shortest to the longest answer
STEP_TOKENS = 1700  # of rows that are few enough for a whole step, which takes ten seconds for so many
Shape = tuple[int, int, int, int, int]  # hidden size, layers, intermediate size, heads, K/V heads
SMALLER: dict[str, Shape] = {"10M": (128, 16, 384, 2, 1), "50M": (384, 20, 1024, 6, 2)}
LARGER: dict[str, Shape] = {"350M": (960, 32, 2560, 15, 5), "1B": (1728, 30, 4608, 27, 9)}
SIZE_ROWS, SIZE_PROMPT, SIZE_ANSWER = 4, 64, 96
AGREEMENT = 0.27  # of SmolLM2's own tokens with these rows: what random weights are brought to


@cache
def smollm2() -> tuple[ContextGenerator, PreTrainedTokenizerBase]:
    model, tokenizer = load_smollm2()
    return ready(ContextGenerator(model)), tokenizer


def ready(generator: ContextGenerator) -> ContextGenerator:
    """A generator whose budget is measured and whose model is probed: both happen once, before the clock starts."""
    generator.contexts([[1, 2]], [[3, 4]], 1.0, seed=0, sample_ids=[0])
    return generator


def tokenized(data: Dataset) -> Rows:
    data, _ = tokenize_rows(data, smollm2()[1], max_length=2048)
    return Rows(list(data["prompt_ids"]), list(data["answer_ids"]), list(data["sample_id"]))


@cache
def long_rows() -> Rows:
    """Text of any length: problems and solutions, one after the other; all but the first few tokens are the answer.

    The prompts are short, as this measures what the length of an answer costs.
    """
    texts = []
    for row in range(LENGTH_ROWS):
        problems = gsm8k("train", 1000 + 12 * row, 1012 + 12 * row)
        text = "\n\n".join(f"{problem['prompt']}\n{problem['completion']}" for problem in problems)
        texts.append(smollm2()[1](text).input_ids)
    prompts, answers = ([text[part] for text in texts] for part in (slice(LENGTH_PROMPT), slice(LENGTH_PROMPT, None)))
    return Rows(prompts, answers, list(range(LENGTH_ROWS)))


class Training(Step):
    """Whole optimizer steps over any rows; at a learning rate of 0, so that the weights stay."""

    def __init__(self, folder: str) -> None:
        generator, tokenizer = smollm2()
        budget = generator.budget.tokens
        how = BSSConfig(
            folder,
            self_prob=0.25,
            learning_rate=0.0,
            use_cpu=DEVICE == "cpu",
            report_to=[],
            token_budget=budget,
        )
        self.trainer = BSSTrainer(generator.model, how, train_dataset=long_rows().dataset(), processing_class=tokenizer)
        self.trainer.create_optimizer()
        self.loss = self.trainer._answer_loss
        self.over(long_rows().shortened(1, 8))  # the optimizer's state, the check of reuse

    def over(self, rows: Rows) -> dict[str, float | None]:
        """Columns with the seconds of a step, where rows are few."""
        seconds = contexts = None
        if sum(map(len, rows.prompts + rows.references)) <= STEP_TOKENS:
            self.batches = [self.trainer.data_collator([*rows.dataset()])]
            seconds, contexts = (round(value, 2) for value in self(0.25)[:2])
        return {"whole step, s": seconds, "of it contexts, s": contexts}


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Training:
    return Training(str(tmp_path_factory.mktemp("training")))


@pytest.fixture
def cost(benchmark, report):
    """Time contexts and the forward, alternating, and add a row to the sweep's table; returns the row."""

    def run(sweep: str, value: float | str, generator: ContextGenerator, rows: Rows, p: float, **extra) -> dict:
        model = generator.model
        grid = Grid(rows, model.device)
        forwards: list[float] = []
        mixed: list[MixedContext] = []

        def generate() -> None:
            mixed.append(generator.contexts(rows.prompts, rows.references, p, seed=0, sample_ids=rows.sample_ids))

        def time_forward() -> None:  # before each round and outside its clock
            started = time.perf_counter()
            forward(model, grid)
            forwards.append(time.perf_counter() - started)

        benchmark.pedantic(generate, setup=time_forward, rounds=ROUNDS)
        stats = mixed[0].stats
        contexts = min(one.stats.seconds for one in mixed)
        once = min(forwards)
        row = {
            sweep: value,
            "contexts, s": round(contexts, 2),
            "one forward, s": round(once, 2),
            "contexts / forward": round(contexts / once, 2),
            "ms a context token": round(contexts / stats.context_tokens * 1e3, 2),
            "context tokens": stats.context_tokens,
            "passes": stats.passes,
            "budget": generator.budget.tokens,
            "computed per token": round(stats.computed_per_context_token, 2),
            "agreement": round(stats.agreement, 2),
            **extra,
        }
        benchmark.extra_info.update(row, sweep=sweep, value=value, ratios={"one forward": once / contexts})
        report(f"contexts against {sweep}, best of {ROUNDS}", [row])
        return row

    return run


@torch.no_grad()
def forward(model: PreTrainedModel, grid: Grid) -> Tensor:
    """Logits [R, T, V]."""
    return model(
        input_ids=grid.tokens,
        attention_mask=grid.mask,
        position_ids=grid.positions,
        use_cache=False,
        logits_to_keep=grid.width,
    ).logits


@pytest.mark.parametrize("self_prob", SELF_PROBS)
def test_self_prob(cost, self_prob):
    cost("p", self_prob, smollm2()[0], tokenized(gsm8k("train", 1000, 1008)), self_prob)


@pytest.mark.parametrize("batch", BATCHES)
def test_batch(cost, training, batch):
    rows = tokenized(gsm8k("train", 1000, 1000 + batch))
    cost("rows", batch, smollm2()[0], rows, 0.25, **training.over(rows))


_by_length: dict[int, dict] = {}


@pytest.mark.parametrize("length", LENGTHS)
def test_answer_length(cost, training, length):
    """The depth is the number of passes when each may compute all tokens: the length of the chain of corrections."""
    generator, _ = smollm2()
    rows = long_rows().shortened(LENGTH_ROWS, length)
    everything = ContextGenerator(generator.model, token_budget=1_000_000, balance=125000)
    deep = rows.shortened(DEPTH_ROWS, length)
    chain = everything.contexts(deep.prompts, deep.references, 0.25, seed=0, sample_ids=deep.sample_ids).stats
    depth = {"depth": chain.passes, "self tokens a row and deep pass": chain.self_tokens / DEPTH_ROWS / chain.passes}
    _by_length[length] = cost("answer tokens", length, generator, rows, 0.25, **depth, **training.over(rows))


@pytest.fixture
def growth() -> list[dict]:
    """Growth of the depth and of the time per token, from the shortest answers on."""
    if _by_length.keys() != set(LENGTHS):
        pytest.skip("growth is told from every length, and -k left some out; run the sweep as a whole")
    shortest = _by_length[LENGTHS[0]]
    return [
        {
            "answer tokens": length,
            "depth": row["depth"] / shortest["depth"],
            "depth, target below": (length / LENGTHS[0]) ** 0.5,
            "time a token": row["ms a context token"] / shortest["ms a context token"],
            "time a token, target": LARGEST_SLOWDOWN,
        }
        for length, row in _by_length.items()
    ]


def test_long_answers_cost_no_more_a_token(growth, report):
    report(
        f"growth from {LENGTHS[0]} answer tokens on",
        [{name: round(value, 2) for name, value in row.items()} for row in growth],
    )
    assert growth[-1]["time a token"] <= LARGEST_SLOWDOWN


@pytest.mark.xfail(strict=True, reason="a pass settles about as many self tokens of a row at any length (NOTES.md)")
def test_depth_grows_slower_than_the_root_of_the_length(growth):
    assert growth[-1]["depth"] < growth[-1]["depth, target below"]


@pytest.mark.parametrize("size", [*SMALLER, "135M", *LARGER])
def test_model_size(cost, size):
    """SmolLM2; larger ones are SmolLM2 among zeros, which computes the same, and smaller ones have random weights."""
    generator, _ = smollm2()
    if size in SMALLER:
        generator, rows = random_weights(SMALLER[size])
    else:
        rows = tokenized(gsm8k("train", 1000, 1000 + SIZE_ROWS)).shortened(SIZE_ROWS, SIZE_ANSWER)
    if size in LARGER:
        generator = ready(ContextGenerator(among_zeros(generator.model, LARGER[size])))
    parameters = sum(parameter.numel() for parameter in generator.model.parameters())
    cost("model size", size, generator, rows, 0.25, parameters=f"{parameters / 1e6:.0f}M")


def shaped(model: PreTrainedModel, shape: Shape) -> LlamaForCausalLM:
    """A random-weight Llama with the vocabulary, the head's size and all else of ``model``."""
    names = "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"
    own = model.config.to_dict()
    eps = own["rms_norm_eps"] * own["hidden_size"] / shape[0]  # see `among_zeros`
    head_dim = own["hidden_size"] // own["num_attention_heads"]
    config = AutoConfig.for_model(
        **own | dict(zip(names, shape, strict=True)) | {"rms_norm_eps": eps, "head_dim": head_dim}
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def among_zeros(model: PreTrainedModel, shape: Shape) -> LlamaForCausalLM:
    """A larger model that computes what ``model`` does, at its own price: the weights in the corners of zeros.

    The mean square of a normalization is over more numbers, zeros: its weight makes up for that, as does its epsilon.
    """
    larger, own = shaped(model, shape), model.state_dict()
    scale = (model.config.hidden_size / shape[0]) ** 0.5
    for name, weight in larger.state_dict().items():
        weight.zero_()
        if name in own:
            corner = own[name] * scale if "norm" in name else own[name]
            weight[tuple(slice(size) for size in corner.shape)] = corner
    return larger


def random_weights(shape: Shape) -> tuple[ContextGenerator, Rows]:
    """A random-weight Llama and its own text, at a temperature at which it agrees as often as SmolLM2 with GSM8K."""
    model = shaped(smollm2()[0].model, shape)
    prompts = torch.randint(3, model.config.vocab_size, (SIZE_ROWS, SIZE_PROMPT)).tolist()
    ids, nothing = list(range(SIZE_ROWS)), [[0] * SIZE_ANSWER] * SIZE_ROWS
    budget = ready(ContextGenerator(model)).budget.tokens
    low, high = 1e-3, 1.0
    for _ in range(8):  # bisection
        temperature = (low * high) ** 0.5
        generator = ready(ContextGenerator(model, temperature=temperature, token_budget=budget, balance=budget / 8))
        text = [row.tolist() for row in generator.contexts(prompts, nothing, 1.0, seed=1, sample_ids=ids).tokens]
        agreement = generator.contexts(prompts, text, 0.25, seed=0, sample_ids=ids).stats.agreement
        low, high = (temperature, high) if agreement > AGREEMENT else (low, temperature)
    return generator, Rows(prompts, text, ids)
