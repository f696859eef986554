"""Kernels compile for the sizes that a launch may have, one included, by `launches`."""

import json

import pytest
from conftest import once_per_run

pytest.importorskip("triton")
from test_triton_compile import FOLDER, run_compiled

KERNELS = {
    "noise": {"gumbel_noise_kernel", "self_mask_kernel", "words_kernel"},
    "sampling": {
        "run_peaks_kernel",
        "run_order_kernel",
        "filter_cutoff_kernel",
        "sample_mix_kernel",
        "mass_kernel",
        "log_prob_kernel",
    },
    "head": {
        "select_rows_kernel",
        "score_tile_kernel",
        "score_span_kernel",
        "logits_kernel",
        "pick_token_kernel",
        "pick_candidates_kernel",
        "tile_mass_kernel",
        "span_mass_kernel",
    },
    "attention": {"ragged_attention_kernel", "merge_kernel", "kv_append_kernel"},
    "passes": {"free_end_kernel", "window_kernel", "slots_kernel", "commit_pass_kernel"},
    "linear": {"linear_kernel"},
    "activation": {"act_mul_kernel"},
    "rotary": {"rotary_kernel", "rotary_append_kernel"},
    "norm": {"rms_norm_kernel", "add_rms_norm_kernel"},
}


@pytest.mark.parametrize("sizes", ["one", pytest.param("more", marks=pytest.mark.slow)])
@pytest.mark.parametrize("module", KERNELS)
def test_launches_compile(tmp_path_factory, module, sizes):
    """The slow ones are of sizes as those that `tools.aot` compiles for."""
    run = once_per_run(tmp_path_factory, f"launched {sizes}.json", lambda: run_compiled(FOLDER / "launches.py", sizes))
    cases = {case: errors for case, errors in json.loads(run).items() if case.startswith(module)}
    assert cases
    for case, errors in cases.items():
        assert errors.keys() >= KERNELS[module], case
        assert {kernel: error for kernel, error in errors.items() if error} == {}, case
