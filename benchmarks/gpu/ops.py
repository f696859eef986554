"""Calls of every op of ``selfgen_kernels`` on inputs of their own, with the bytes and FLOPs that they can't do without.

The shapes are those of ``bench_head``, ``bench_sampling`` and ``bench_attention``; a rehearsal has tiny ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfgen_kernels import (
    act_mul,
    add_rms_norm,
    combine_shards,
    commit_pass,
    gumbel_noise,
    invariant_linear,
    kv_append,
    linear_sample_mix,
    linear_sample_shard,
    plan_pass,
    ragged_attention,
    rms_norm,
    rotary,
    rotary_append,
    sample_mix,
    self_mask,
)

Call = Callable[[], object]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS = {"Qwen3-8B": (4096, 151_936), "SmolLM2-135M": (576, 49_152)}
LINEARS = {"Qwen3-8B": (4096, 12_288), "SmolLM2-135M": (576, 1536)}  # of a gated layer
LINEAR_ROWS = (1, 64, 1024)
HEAD_ROWS, SAMPLING_ROWS = (1, 8, 64, 256), (1, 8, 64, 512)
VOCABULARIES = (49_152, 151_936)
FILTERS: dict[str, dict[str, Any]] = {
    "": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "top-k 50, top-p 0.95": {"top_k": 50, "top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
}
ATTENTION_HEADS = {"9/3 x 64": (9, 3, 64), "32/8 x 128": (32, 8, 128)}  # SmolLM2-135M, Llama-3-8B
LENGTHS = {
    "8 x 200": [200] * 8,
    "32 rows, 100 to 400": [100 + 300 * i // 31 for i in range(32)],
    "2 x 1024": [1024] * 2,
    "4 x 4096": [4096] * 4,
}
CHUNKS = (1, 8, 64)
PASS_ROWS, PASS_LENGTH, PASS_BUDGET = 32, 200, 2048
SHARDS = 4


@dataclass(frozen=True)
class Case:
    """One way to call one or several ops. ``make`` gives a call on inputs of its own, which take ``inputs`` bytes.

    ``nbytes`` and ``flops`` are the least that has to be read and written, and computed.
    """

    op: str
    columns: dict[str, Any]
    make: Callable[[], Call]
    inputs: int
    nbytes: int
    flops: int = 0
    family: str = ""  # ops and peers that are compared


def cases(device: str, *, rehearsal: bool = False) -> Iterator[Case]:
    """Most important first."""
    families = {
        "head": head_cases,
        "linear": linear_cases,
        "sampling": sampling_cases,
        "attention": attention_cases,
        "layer": layer_cases,
        "passes": pass_cases,
        "noise": noise_cases,
    }
    for family, those in families.items():
        for case in those(device, rehearsal=rehearsal):
            yield replace(case, family=family)


def keys_of(rows: int, device: str) -> dict[str, Any]:
    ids = torch.arange(rows, device=device)
    return {"seed": 0, "sample_ids": ids, "positions": ids}


def head_cases(device: str, *, rehearsal: bool = False) -> Iterator[Case]:
    heads = {"tiny": (32, 1000)} if rehearsal else HEADS
    for name, (width, vocab) in heads.items():
        weight = torch.randn(vocab, width, device=device, dtype=torch.bfloat16) / width**0.5
        for rows in (2,) if rehearsal else HEAD_ROWS:
            columns = {"head": name, "rows": rows, "dtype": "bf16"}
            keys, reference = keys_of(rows, device), torch.zeros(rows, dtype=torch.int64, device=device)
            small = 2 * rows * width
            work = {"inputs": weight.nbytes, "nbytes": weight.nbytes + small, "flops": 2 * rows * width * vocab}
            logits = {**work, "nbytes": work["nbytes"] + 2 * rows * vocab}

            case = partial(_head_case, columns=columns, weight=weight, work=work)

            def fused(hidden: Tensor, head: Tensor, self_prob=1.0, reference=reference, keys=keys, **how):
                return linear_sample_mix(hidden, head, reference, self_prob, **keys, **how)

            def product_then_sampler(hidden: Tensor, head: Tensor, reference=reference, keys=keys):
                return sample_mix(hidden @ head.T, reference, 1.0, **keys)

            def shard(hidden: Tensor, head: Tensor, size=vocab // SHARDS, keys=keys):
                return linear_sample_shard(hidden, head[:size], 1.0, first_id=0, **keys)

            yield case("linear_sample_mix", fused)
            yield case("matrix product", lambda hidden, head: hidden @ head.T, work=logits)
            work_of_both = {**logits, "nbytes": logits["nbytes"] + 2 * rows * vocab}
            yield case("matrix product, sample_mix", product_then_sampler, work=work_of_both)
            if rows in (2, 64):
                yield case("linear_sample_mix", partial(fused, self_prob=0.25), "p = 0.25")
                for variant in ("top-k 50, top-p 0.95", "top-p 0.95"):
                    yield case("linear_sample_mix", partial(fused, **FILTERS[variant]), variant)
                yield case(
                    "linear_reference_log_prob, linear_sample_mix",
                    partial(fused, min_reference_prob=1e-3),
                    "min_reference_prob",
                    work={"inputs": work["inputs"], "nbytes": 2 * work["nbytes"], "flops": 2 * work["flops"]},
                )
                a_part = {name: number // SHARDS for name, number in work.items()}
                yield case("linear_sample_shard", shard, f"one of {SHARDS}", work=a_part)
                yield case("combine_shards", combined(device, rows, vocab), f"of {SHARDS}", work=_few_bytes(rows))


def _head_case(
    op: str,
    call: Callable[[Tensor, Tensor], object],
    variant: str = "",
    *,
    columns: dict[str, Any],
    weight: Tensor,
    work: dict[str, Any],
) -> Case:
    def make() -> Call:
        hidden = torch.randn(columns["rows"], weight.shape[1], device=weight.device, dtype=weight.dtype) * 4
        head = weight.clone()
        return lambda: call(hidden, head)

    return Case(op, {**columns, "variant": variant}, make, **work)


def linear_cases(device: str, *, rehearsal: bool = False) -> Iterator[Case]:
    for name, (width, outputs) in ({"tiny": (32, 70)} if rehearsal else LINEARS).items():
        for rows in (2,) if rehearsal else LINEAR_ROWS:
            for op, multiply in (("invariant_linear", invariant_linear), ("matrix product", F.linear)):

                def make(multiply=multiply, rows=rows, width=width, outputs=outputs) -> Call:
                    hidden, weight = (
                        torch.randn(size, width, device=device, dtype=torch.bfloat16) for size in (rows, outputs)
                    )
                    return lambda: multiply(hidden, weight)

                read = 2 * width * (rows + outputs)
                columns = {"layer": name, "rows": rows, "dtype": "bf16"}
                yield Case(op, columns, make, read, read + 2 * rows * outputs, 2 * rows * width * outputs)


def _few_bytes(rows: int) -> dict[str, int]:
    """Of candidates of all shards, read, and what is written."""
    read = SHARDS * rows * (9 * 4 + 3 * 8)
    return {"inputs": read, "nbytes": read + 9 * rows, "flops": 0}


def combined(device: str, rows: int, vocab: int) -> Callable[[Tensor, Tensor], object]:
    """`combine_shards` of candidates of a small head; what it does does not depend on their values."""
    keys, reference = keys_of(rows, device), torch.zeros(rows, dtype=torch.int64, device=device)
    hidden, weight = torch.randn(rows, 16, device=device), torch.randn(SHARDS * 64, 16, device=device)
    found = [
        linear_sample_shard(hidden, weight[first : first + 64], 1.0, first_id=first, **keys)
        for first in range(0, SHARDS * 64, 64)
    ]
    values, ids = (torch.stack(list(part)) for part in zip(*found, strict=True))
    return lambda *_: combine_shards(values, ids, reference, 1.0, vocab_size=vocab, **keys)


def sampling_cases(device: str, *, rehearsal: bool = False) -> Iterator[Case]:
    shapes = [(rows, vocab, "bf16") for vocab in VOCABULARIES[::-1] for rows in SAMPLING_ROWS]
    shapes += [(64, vocab, "fp32") for vocab in VOCABULARIES]
    for rows, vocab, dtype in [(2, 1000, "fp32")] if rehearsal else shapes:
        keys, reference = keys_of(rows, device), torch.zeros(rows, dtype=torch.int64, device=device)
        size = rows * vocab * DTYPES[dtype].itemsize

        def case(op, call, variant="", *, rows=rows, vocab=vocab, dtype=dtype, reads=1, size=size):
            def make() -> Call:
                logits = (torch.randn(rows, vocab, device=device) * 3).to(DTYPES[dtype])
                return lambda: call(logits)

            columns = {"rows": rows, "vocabulary": vocab, "dtype": dtype, "variant": variant}
            return Case(op, columns, make, size, reads * size + 17 * rows)

        for variant, how in FILTERS.items():
            if variant and rows not in (2, 64):
                continue
            yield case(
                "sample_mix",
                lambda logits, how=how, r=reference, keys=keys: sample_mix(logits, r, 1.0, **keys, **how),
                variant,
            )
        if rows in (2, 64):
            yield case("sample_mix", lambda x, r=reference, keys=keys: sample_mix(x, r, 0.25, **keys), "p = 0.25")
            yield case(
                "reference_log_prob, sample_mix",
                lambda x, r=reference, keys=keys: sample_mix(x, r, 1.0, min_reference_prob=1e-3, **keys),
                "min_reference_prob",
                reads=2,
            )
        yield case("argmax", lambda logits: logits.argmax(-1))


def attention_cases(device: str, *, rehearsal: bool = False) -> Iterator[Case]:
    heads = {"tiny": (4, 2, 8)} if rehearsal else ATTENTION_HEADS
    lengths = {"2 rows": [9, 5]} if rehearsal else LENGTHS
    for dtype in ("fp32",) if rehearsal else DTYPES:
        for about, sizes in lengths.items():
            for chunk in (2,) if rehearsal else CHUNKS:
                for name, shape in heads.items():
                    yield from _attention(device, dtype, (name, shape), (about, sizes), chunk)


def _attention(device, dtype, heads, lengths, chunk) -> Iterator[Case]:
    (name, (count, kv_heads, head_dim)), (about, sizes) = heads, lengths
    how: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype]}
    width, rows, keys = DTYPES[dtype].itemsize, len(sizes), sum(sizes)
    bounds = torch.arange(0, rows * chunk + 1, chunk, dtype=torch.int32, device=device)
    ends = torch.tensor(sizes).cumsum(0)
    ranges = torch.stack([ends - torch.tensor(sizes), torch.tensor(sizes)], 1).to(device)
    cache = 2 * keys * kv_heads * head_dim * width
    pairs = sum(chunk * size - chunk * (chunk - 1) // 2 for size in sizes)
    work = {
        "inputs": cache,
        "nbytes": cache + 2 * rows * chunk * count * head_dim * width,
        "flops": 4 * pairs * count * head_dim,
    }
    columns = {"heads": name, "K/V": about, "queries a row": chunk, "dtype": dtype}

    def ours() -> Call:
        query = torch.randn(rows * chunk, count, head_dim, **how)
        key, value = (torch.randn(keys, kv_heads, head_dim, **how) for _ in range(2))
        return lambda: ragged_attention(query, key, value, bounds, ranges)

    def padded() -> Call:
        longest = max(sizes)
        query = torch.randn(rows, count, chunk, head_dim, **how)
        key, value = (torch.randn(rows, kv_heads, longest, head_dim, **how) for _ in range(2))
        last = torch.tensor(sizes, device=device)[:, None] - chunk + torch.arange(chunk, device=device)
        mask = (torch.arange(longest, device=device) <= last[:, :, None])[:, None]
        return lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    yield Case("ragged_attention", columns, ours, **work)
    yield Case("SDPA, padded", columns, padded, **work)
    if chunk in (2, 8) and about in ("8 x 200", "2 rows"):
        tokens = rows * chunk
        size = 2 * tokens * kv_heads * head_dim * width

        def append() -> Call:
            key_cache, value_cache = (torch.zeros(keys, kv_heads, head_dim, **how) for _ in range(2))
            key, value = (torch.randn(kv_heads, tokens, head_dim, **how).transpose(0, 1) for _ in range(2))
            slots = torch.randperm(keys, device=device)[:tokens]
            return lambda: kv_append(key_cache, value_cache, key, value, slots)

        yield Case("kv_append", columns, append, cache, 2 * size + 8 * tokens)


def pass_cases(device: str, *, rehearsal: bool = False) -> Iterator[Case]:
    rows, length = (2, 12) if rehearsal else (PASS_ROWS, PASS_LENGTH)
    for budget in (8,) if rehearsal else (PASS_BUDGET, 256):
        columns = {"rows": rows, "length": length, "budget": budget, "dtype": "", "variant": "p = 0.25"}
        slots = rows * length
        size = slots * (8 + 4) + rows * 8 * 2

        def state(rows=rows, length=length) -> tuple[Tensor, Tensor, Tensor]:
            """What a first pass begins with: row_starts, next_self and log_chance."""
            starts = torch.arange(0, rows * length, length)
            is_self = torch.rand(rows, length) < 0.25
            is_self[:, 0] = False
            places = torch.where(is_self, torch.arange(length), length)
            after = places.flip(1).cummin(1).values.flip(1).roll(-1, 1)  # the first one behind each place
            after[:, -1] = length
            own = torch.arange(length).expand(rows, -1)
            next_self = torch.where(after < length, after, own) + starts[:, None]
            chances = torch.full((rows * length,), 0.5).log()
            return starts.to(device), next_self.flatten().to(device), chances.to(device)

        def plan(budget=budget, state=state) -> Call:
            starts, next_self, chances = state()
            return lambda: plan_pass(starts, starts, next_self, chances, budget)

        def commit(budget=budget, state=state) -> Call:
            """Of tokens that are what the guess was: a second call does what the first one did."""
            starts, next_self, chances = state()
            planned, bounds, _ = plan_pass(starts, starts, next_self, chances, budget)
            tokens, final = torch.zeros_like(next_self), starts.clone()
            sampled = torch.zeros_like(planned)
            return lambda: commit_pass(tokens, final, planned, bounds, next_self, sampled)

        yield Case("plan_pass", columns, plan, size, size + 8 * budget + 20 * rows)
        yield Case("commit_pass", columns, commit, size + 16 * budget, 34 * budget + 20 * rows)


def layer_cases(device: str, *, rehearsal: bool = False) -> Iterator[Case]:
    """What lies between the products of a layer of Llama-3-8B, beside torch's ops for the same."""
    width, inner, (heads, kv_heads, head_dim) = (64, 96, (4, 2, 8)) if rehearsal else (4096, 14_336, (32, 8, 128))
    for rows, dtype in product((2,) if rehearsal else (8, 64, 2048), DTYPES):
        how: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype]}
        size = rows * DTYPES[dtype].itemsize

        def case(op, call, shapes, outputs, *, rows=rows, dtype=dtype, size=size, how=how):
            def make() -> Call:
                given = [torch.randn(rows, *shape, **how) for shape in shapes]
                return lambda: call(*given)

            inputs = size * sum(math.prod(shape) for shape in shapes)
            return Case(op, {"rows": rows, "dtype": dtype}, make, inputs, inputs + size * outputs)

        weight = torch.ones(width, **how)

        def norm_of_torch(x: Tensor, weight=weight) -> Tensor:
            wide = x.float()
            return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

        def turned_by_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

        states = (heads, head_dim), (kv_heads, head_dim), (head_dim,), (head_dim,)
        yield case("rms_norm", lambda x, weight=weight: rms_norm(x, weight, 1e-6), [(width,)], width)
        yield case("norm, torch", norm_of_torch, [(width,)], width)
        both = [(width,), (width,)]
        yield case("add_rms_norm", lambda x, y, weight=weight: add_rms_norm(x, y, weight, 1e-6), both, 2 * width)
        yield case("sum and rms_norm", lambda x, y, weight=weight: rms_norm(x + y, weight, 1e-6), both, 2 * width)
        yield case("act_mul", act_mul, [(inner,), (inner,)], inner)
        yield case("SiLU and product, torch", lambda gate, up: F.silu(gate) * up, [(inner,), (inner,)], inner)
        yield case("rotary", rotary, states, (heads + kv_heads) * head_dim)
        keys, values = torch.zeros(2, rows, kv_heads, head_dim, **how)
        slots, of_append = torch.arange(rows, device=device), ((kv_heads, head_dim), *states)
        appended = (heads + 2 * kv_heads) * head_dim

        def turn_and_append(value, query, key, cos, sin, keys=keys, values=values, slots=slots) -> Tensor:
            return rotary_append(keys, values, query, key, value, cos, sin, slots)

        def turn_then_append(value, query, key, cos, sin, keys=keys, values=values, slots=slots) -> None:
            kv_append(keys, values, rotary(query, key, cos, sin)[1], value, slots)

        yield case("rotary_append", turn_and_append, of_append, appended)
        yield case("rotary and kv_append", turn_then_append, of_append, appended)
        yield case(
            "rotary, torch",
            lambda query, key, *angles: (turned_by_torch(query, *angles), turned_by_torch(key, *angles)),
            states,
            (heads + kv_heads) * head_dim,
        )


def noise_cases(device: str, *, rehearsal: bool = False) -> Iterator[Case]:
    rows, size = (2, 100) if rehearsal else (64, 49_152 // 64)
    keys = keys_of(rows, device)
    columns = {"rows": rows, "numbers a row": size, "dtype": "fp32"}

    def noise() -> Call:
        return lambda: gumbel_noise(0, keys["sample_ids"], keys["positions"], size, stream=1)

    yield Case("gumbel_noise", columns, noise, 16 * rows, 4 * rows * size)
    places = 16 if rehearsal else 8192
    many = keys_of(places, device)

    def mask() -> Call:
        return lambda: self_mask(0, many["sample_ids"], many["positions"], 0.25)

    yield Case("self_mask", {"rows": places, "dtype": "bool"}, mask, 16 * places, 17 * places)
