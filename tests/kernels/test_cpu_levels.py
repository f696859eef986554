"""The C++ kernels at each level of x86 that this machine has, each in a process of its own: SELFGEN_CPU_LEVEL."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import require_cpp

from selfgen_kernels.backends.cpu import LEVELS

SCRIPT = """
import os
import sys
import torch

for level in ("", *sys.argv[2:]):  # each in a child of this process, which has imported torch
    if not (child := os.fork()):
        os.environ["SELFGEN_CPU_LEVEL"] = level
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(f"level {level} failed")
else:
    sys.exit()

from selfgen_kernels import gumbel_noise, linear_sample_mix, linear_sample_shard, ragged_attention, rms_norm, sample_mix

def normal(*shape):
    return torch.randn(shape, generator=generator).to(dtype)

generator, ids = torch.Generator().manual_seed(0), torch.arange(21)
keys = {"seed": 3, "sample_ids": ids, "positions": ids, "temperature": torch.linspace(0, 2, 21)}
tokens = {"noise": gumbel_noise(3, ids, ids, 130, stream=1)}
close, cuts = {}, {}
for name in ("float32", "bfloat16", "float16", "float64"):
    dtype = getattr(torch, name)
    hidden, weight = normal(21, 40), normal(3001, 40)
    for filters in ({}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 500, "top_p": 0.9, "min_p": 0.01}):
        of = f"{name} {'+'.join(filters)}"
        tokens[f"sample_mix {of}"] = sample_mix(hidden @ weight.T, ids, 0.9, **keys, **filters)[0]
        tokens[f"head {of}"] = linear_sample_mix(hidden, weight, ids, 0.9, softcap=30.0, **keys, **filters)[0]
    logits = (hidden @ weight.T).to(torch.float32 if name == "float64" else dtype)
    keyed = torch.full((21,), 2**32), 3, ids, ids
    if dtype != torch.float64:
        tokens[f"rms_norm {name}"] = rms_norm(logits, logits[0], 1e-6)
    tokens[f"log_prob {name}"] = torch.ops.selfgen.reference_log_prob(logits, ids, *keyed)
    head = hidden, weight, None, 30.0, 1.0
    close[f"head log_prob {name}"] = torch.ops.selfgen.linear_reference_log_prob(*head, ids, *keyed)
    close[f"shard {name}"] = linear_sample_shard(hidden, weight, 0.9, first_id=77, **keys)[0]
    query, key, value = normal(19, 6, 32), normal(50, 2, 32), normal(50, 2, 32)
    whole = [0, 19], [[3, 40]]
    cut = [0, 1, 2, 12, 19], [[3, 22], [3, 23], [3, 33], [3, 40]]
    close[f"attention {name}"], cuts[name] = (
        ragged_attention(query, key, value, torch.tensor(bounds, dtype=torch.int32), torch.tensor(ranges), softcap=9.0)
        for bounds, ranges in (whole, cut)
    )
    cuts[name] = torch.equal(close[f"attention {name}"], cuts[name])
torch.save((torch.ops.selfgen._cpu_level(), tokens, close, cuts), f"{sys.argv[1]}/level_{level}.pt")
sys.stdout.flush()
os._exit(0)
"""
# avx512_bf16 adds the products of a bf16 head in pairs, so some of its logits round to a neighbour: near ties may turn.
TIES = {"head bfloat16": 1}
ROUNDS_APART = "shard bfloat16"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By level, "" for the best: what ran, tokens, floats, and whether attention had the same bits however cut."""
    require_cpp()
    folder = tmp_path_factory.mktemp("levels")
    command = [sys.executable, "-c", SCRIPT, str(folder), *LEVELS]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=300)
    return {level: torch.load(folder / f"level_{level}.pt") for level in ("", *LEVELS)}


@pytest.mark.parametrize("level", LEVELS)
def test_levels_agree(level, runs):
    best = runs[""]
    ran, tokens, close, cuts = runs[level]
    assert LEVELS.index(ran) == max(LEVELS.index(level), LEVELS.index(best[0]))  # never more than the machine has
    for name, got in tokens.items():
        assert (got != best[1][name]).sum() <= TIES.get(name.rpartition(" ")[0], 0), name
    for name, got in close.items():
        tolerance = TOLERANCE[got.dtype] * (10 if name.startswith("shard") else 1)
        tolerance = TOLERANCE[torch.bfloat16] if name == ROUNDS_APART else tolerance
        torch.testing.assert_close(got, best[2][name], rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
    assert all(cuts.values()), cuts


def test_an_unknown_level_is_named():
    command = [sys.executable, "-c", "import selfgen_kernels"]
    done = subprocess.run(command, env=os.environ | {"SELFGEN_CPU_LEVEL": "sse9"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "SELFGEN_CPU_LEVEL=sse9 is not accepted; set one of avx512_bf16, avx512, avx2, default" in done.stderr
