"""Triton's kernels compile for GPUs that are not here, spill no register, and read logits 128 bits at a time."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = r"""
import re, subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from selfgen_kernels.backends.triton import noise, sampling

KEYS = {"seed": "i64", "sample_ids": "*i64", "positions": "*i64"}
ROWS = {
    "logits": "*bf16", "row_stride": "i64", "vocab_size": "i32", "inv_temperatures": "*fp32", "cutoffs": "*fp32",
    "thresholds": "*i64", **KEYS, "best_scores": "*fp32", "best_groups": "*i32", "peaks": "*fp32",
}
RESULTS = {"spans": "i32", "reference": "*i64", "tokens": "*i64", "is_selfs": "*i1", "invalids": "*i1"}
KERNELS = [
    (noise.gumbel_noise_kernel, {"out": "*fp32", **KEYS, "size": "i32", "blocks": "i32"}, {"STREAM": 1, "BLOCK": 1024}),
    (noise.self_mask_kernel, {"out": "*i1", **KEYS, "threshold": "*i64"}, {}),
    (sampling.best_group_kernel, ROWS, {"TILE": sampling.TILE, "SPAN": sampling.SPAN}),
    (sampling.pick_token_kernel, ROWS | RESULTS, {"SPANS": 16}),
]
target = eval(sys.argv[1], {"GPUTarget": GPUTarget})
for kernel, types, constants in KERNELS:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ("row_stride", "vocab_size")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=target, options=dict(noise.OPTIONS))
    if target.backend == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            command = [cuobjdump, "--dump-resource-usage", cubin]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage
        assert int(re.search(r"REG:(\d+)", usage)[1]) <= 128, usage
        if kernel is sampling.best_group_kernel:
            assert "ld.global.v4.b32" in compiled.asm["ptx"], "narrow loads of logits"
    else:
        assert compiled.asm["hsaco"]
        spills = re.findall(r"\.[sv]gpr_spill_count: +(\d+)", compiled.asm["amdgcn"])
        assert spills and set(spills) == {"0"}, spills
"""


@pytest.mark.parametrize(
    "target",
    ['GPUTarget("cuda", 80, 32)', 'GPUTarget("cuda", 90, 32)', 'GPUTarget("hip", "gfx942", 64)'],
    ids=["sm_80", "sm_90", "gfx942"],
)
def test_kernels_compile_without_spills(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, target], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
