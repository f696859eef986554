"""Launches of every Triton kernel with small sizes, compiled as for a GPU: prints {case: {kernel: error}} as JSON.

An argument `one` or `more` asks for the cases with sizes of one only, or for the others.

The compiler takes an integer argument of 1 for a constant, which is no tensor: what works for two rows may not compile
for one. The interpreter does not show it, nor does compiling what `configurations` lists. Here launchers run on CPU
tensors, Triton believes in an H100, and each launch ends when its kernel is compiled.
"""

import contextlib
import json
import sys
from unittest import mock

import specimens
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from selfgen_kernels.backends.triton import (
    activation,
    attention,
    head,
    head_log_prob,
    linear,
    noise,
    norm,
    passes,
    rotary,
    sampling,
)


class AnH100:
    """What a launch asks of the driver before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling_only():
    """Inside, launches only compile: yields {kernel: error}, "" where there is none."""
    run, errors = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **options):
        try:
            run(self, *args, grid=grid, warmup=True, **options)
            errors.setdefault(self.__name__, "")
        except Exception as error:
            errors[self.__name__] = str(error)[-500:]

    driver.set_active(AnH100())
    JITFunction.run = compile_only
    try:
        yield errors
    finally:
        JITFunction.run = run


def rows_of(n, seed=5):
    return torch.full((n,), 2**31), seed, torch.arange(n), torch.arange(n), torch.ones(n)


def launch_noise(n, size):
    ids = torch.arange(n)
    noise.gumbel_noise(1, ids, ids, size, 1)
    noise.self_mask(1, ids, ids, ids)
    specimens.words_kernel[(1,)](torch.zeros(4, dtype=torch.int64), 1, ids, ids, 0, STREAM=0)


def launch_sampling(n, vocab_size, seed=5):
    filters = torch.full((n,), 3), torch.full((n,), 0.5).double(), torch.full((n,), 0.1).double()
    for some in (filters, (None, None, None)):
        sampling.sample_mix(torch.zeros(n, vocab_size), torch.arange(n), *rows_of(n, seed), *some)
        numbers = (None if value is None else value[0] for value in some)
        rows = torch.tensor(2**31), *rows_of(n, seed)[1:4], torch.tensor(1.0)
        sampling.sample_mix(torch.zeros(n, vocab_size), torch.arange(n), *rows, *numbers)
    sampling.reference_log_prob(torch.zeros(n, vocab_size), torch.arange(n), *rows_of(n, seed)[:4])


def launch_head(n, vocab_size, first_id, seed=5):
    hidden, weight = torch.zeros(n, vocab_size % 17), torch.zeros(vocab_size, vocab_size % 17)
    rows = rows_of(n, seed)
    for few in (n, 0):
        with mock.patch.object(head, "FEW_ROWS", few), mock.patch.object(head_log_prob, "FEW_ROWS", few):
            head.linear_sample_mix(hidden, weight, None, None, 1.0, torch.arange(n), *rows, None, None, None)
            head.linear_sample_shard(hidden, weight, torch.zeros(vocab_size), 8.0, 1.0, first_id, *rows)
            head.linear_reference_log_prob(hidden, weight, None, None, 1.0, torch.arange(n), *rows[:4])
    selected = torch.arange(n).int(), torch.tensor([n]).int()  # as no kernel runs that could write them
    with mock.patch.object(head, "select_rows", return_value=selected):
        top_k = torch.full((n,), 3)
        head.linear_sample_mix(hidden, weight, None, None, 1.0, torch.arange(n), *rows, top_k, None, None)


def launch_attention(queries, heads, kv_heads, head_dim):
    query, cache = torch.zeros(queries, heads, head_dim), torch.zeros(queries, kv_heads, head_dim)
    chunks, ranges = torch.tensor([0, queries], dtype=torch.int32), torch.tensor([[0, queries]])
    attention.ragged_attention(query, cache, cache, chunks, ranges, 1.0, 1, 1.0, torch.zeros(heads))
    attention.ragged_attention(query, cache, cache, chunks, ranges, 1.0, None, None, None)
    long = torch.zeros(2000, kv_heads, head_dim)
    attention.ragged_attention(query, long, long, chunks, torch.tensor([[0, 2000]]), 1.0, None, None, None)
    attention.kv_append(cache, cache, cache[:1], cache[:1], torch.arange(1))


def launch_linear(rows, width, outputs):
    hidden, weight = torch.zeros(rows, width), torch.zeros(outputs, width)
    linear.invariant_linear(hidden, weight, None)
    linear.invariant_linear(hidden.half(), weight.half(), torch.zeros(outputs).half())


def launch_norm(rows, width):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.zeros(rows, width, dtype=dtype), torch.zeros(width)
        for form in ((False, True), (True, False)):
            norm.rms_norm(x, weight, 1e-6, *form)
            norm.add_rms_norm(x, torch.zeros(rows, width), weight, 1e-6, *form)


def launch_activation(rows, width):
    for gelu in (False, True):
        activation.act_mul(*torch.zeros(2, rows, width), gelu)


def launch_rotary(tokens, heads, kv_heads, head_dim):
    angles = torch.zeros(2, tokens, head_dim)
    for dtype in (torch.float32, torch.bfloat16):
        states = (torch.zeros(tokens, count, head_dim, dtype=dtype) for count in (heads, kv_heads))
        query, key = states
        rotary.rotary(query, key, *angles, True)
        rotary.rotary_append(key, key, query, key, key, *angles, torch.arange(tokens), True)


def launch_passes(rows, token_budget, slots):
    row, slot, place = torch.arange(rows), torch.arange(slots), torch.arange(token_budget)
    passes.plan_pass(row, row, slot, torch.zeros(slots), token_budget)
    passes.commit_pass(slot, row, place, torch.zeros(rows + 1, dtype=torch.int32), slot, place)


CASES = {
    "noise of one row": lambda: launch_noise(1, 1),
    "noise": lambda: launch_noise(3, 5),
    "sampling from one logit": lambda: launch_sampling(1, 1),
    "sampling": lambda: launch_sampling(3, 20),
    "sampling by a seed in memory": lambda: launch_sampling(3, 20, torch.tensor([5])),
    "head by a seed in memory": lambda: launch_head(2, 65, 0, torch.tensor([5])),
    "head of one row": lambda: launch_head(1, 1, 1),
    "head": lambda: launch_head(2, 1, 1),
    "head from the first id": lambda: launch_head(2, 65, 0),
    "attention of one query": lambda: launch_attention(1, 1, 1, 1),
    "attention": lambda: launch_attention(3, 6, 2, 16),
    "linear of one row": lambda: launch_linear(1, 1, 1),
    "linear": lambda: launch_linear(2, 16, 5),
    "activation of one number": lambda: launch_activation(1, 1),
    "activation": lambda: launch_activation(3, 20),
    "rotary of one head": lambda: launch_rotary(1, 1, 1, 2),
    "rotary": lambda: launch_rotary(3, 4, 2, 64),
    "norm of one number": lambda: launch_norm(1, 1),
    "norm": lambda: launch_norm(3, 20),
    "passes over one slot": lambda: launch_passes(1, 1, 1),
    "passes": lambda: launch_passes(2, 5, 3),
}

if __name__ == "__main__":
    found, asked = {}, sys.argv[1:]
    with compiling_only() as errors:
        for case, launch in CASES.items():
            if asked and ("one" if " one " in case else "more") not in asked:
                continue
            errors.clear()
            launch()
            found[case] = dict(errors)
    print(json.dumps(found))
