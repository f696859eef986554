"""Does each fault that one could make get caught? `python -m tools.planted_faults [--only NAME ...] [--jobs 2]`.

Each fault is a replacement of a few lines in a copy of the packages. The tests that should catch it run there, and the
table says which of them failed. The exit status is 1 if a fault survives, or if these tests fail without any. A
replacement whose lines are not there any more (or twice) is an error: correct it here.

Tests run in processes that are forked from this one, which has imported what takes seconds to import.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("selfgen", "selfgen_kernels", "tests", "tools", "pyproject.toml")
IMPORTED = ("torch", "pytest", "hypothesis.stateful", "transformers", "datasets", "accelerate", "peft")
FOR_KERNELS = 3  # of them are enough for the tests of kernels
DEADLINE = 600  # seconds for the tests of a fault; a loop without an end is a failure, too

MACHINE = "tests/test_state_machine.py::test_some_cases[{}]"
PLAIN, RECORDED = MACHINE.format("llama-plain"), MACHINE.format("llama-graphs")
LORA, WINDOW = MACHINE.format("lora-plain"), MACHINE.format("mistral-plain")
RECORDINGS = "tests/test_recorded_generations.py::"
SURVIVORS = (
    "tests/kernels/test_exact.py::test_survivors_of_large_odd_vocabularies_are_equal[32001-torch.float32-top_p-triton]"
)
COMMIT = "tests/kernels/test_passes.py::test_commit_place_by_place"
INVARIANT = "tests/test_invariant.py::"
BY_NAME = INVARIANT + "test_what_may_depend_on_the_batch_is_refused_by_name"
REUSE = "tests/test_reuse.py::test_loss_and_gradients_are_those_of_the_ordinary_step[llama]"
RANKS = "tests/test_ranks.py"

CONTEXT, TRAINING, REFERENCE = "selfgen/context/", "selfgen/training/", "selfgen_kernels/backends/reference/"
TRITON = "selfgen_kernels/backends/triton/"


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    compiled: bool = True  # False: the copy has no C++ kernels, so that the reference runs in their place


FAULTS = [
    Fault(
        "rms_norm: squares are summed as floats",
        REFERENCE + "norm.py",
        "weights(scaled.mul_(scaled)).sum(1).float().mul_(1 / WEIGHT)",
        "scaled.mul_(scaled).sum(1)",
        ("tests/kernels/test_norm.py::test_no_order_changes_a_bit[reference]",),
        compiled=False,
    ),
    Fault(
        "late: changes in place are not counted",
        CONTEXT + "late.py",
        "        if func._schema.is_mutable:",
        "        if False:",
        ("tests/test_fused.py::test_what_is_changed_before_a_late_sum_is_computed_is_an_error",),
    ),
    Fault(
        "late: kernels of others change what was added before it is",
        CONTEXT + "late.py",
        "if func in _HAND_OUT or _is_of_others(func):",
        "if False:",
        ("tests/test_late.py::test_a_kernel_of_others_gets_sums_and_rotations_that_are_computed",),
    ),
    Fault(
        "late: passes that are not recorded have late tensors",
        CONTEXT + "late.py",
        "return not (_watch.get() is None or torch.is_grad_enabled()",
        "return not (torch.is_grad_enabled()",
        ("tests/test_late.py::test_a_pass_that_is_not_recorded_makes_no_late_tensor",),
    ),
    Fault(
        "graphs: those with late tensors stay in use where these have failed",
        CONTEXT + "graphs.py",
        "        may_be_late(model),\n",
        "",
        ("tests/test_late.py::test_recordings_are_made_anew_without_late_tensors",),
    ),
    Fault(
        "fused: a norm is tried in fp32 alone",
        CONTEXT + "fused.py",
        "given = [rows.to(weight.device, dtype) for dtype in _dtypes(weight.device)]",
        "given = [rows.to(weight.device, torch.float32)]",
        ("tests/test_fused.py::test_what_computes_something_else_keeps_its_forward[Rounding]",),
    ),
    Fault(
        "fused: an MLP is not tried with large numbers",
        CONTEXT + "fused.py",
        "for size in (1, 100)]",
        "for size in (1,)]",
        ("tests/test_fused.py::test_gated_mlps_are_known_by_what_they_compute",),
    ),
    Fault(
        "graphs: a generation without them reads copies of older weights",
        CONTEXT + "graphs.py",
        "if self._current is None:  # no copy of a weight has been refreshed",
        "if False:",
        ("tests/test_graphs.py::test_a_generation_without_graphs_casts_weights_as_they_are",),
    ),
    Fault(
        "fused: hooks are passed by",
        CONTEXT + "fused.py",
        "if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):",
        "if False:",
        ("tests/test_fused.py::test_what_has_hooks_keeps_its_forward",),
    ),
    Fault(
        "fused: another model's rotation is replaced, too",
        CONTEXT + "fused.py",
        "names = {**names, _ROTARY: turn}",
        "names[_ROTARY] = turn",
        ("tests/test_fused.py::test_a_rotation_is_replaced_in_its_module_alone",),
    ),
    Fault(
        "filters: runs are not enough until they weigh enough as a whole",
        TRITON + "filters.py",
        "enough = (weight >= needed) | (taken == runs)",
        "enough = (weight >= 0.0) | (taken == runs)",
        (SURVIVORS,),
    ),
    Fault(
        "filters: what ties with the k-th logit is left out of top_p's sum",
        TRITON + "filters.py",
        "inv_temperature >= cutoff  # once",
        "inv_temperature > cutoff  # once",
        ("tests/kernels/test_exact.py::test_what_ties_with_the_kth_counts_in_top_p[triton]",),
    ),
    Fault(
        "sample_mix: the first program of a row to come draws its token",
        TRITON + "sampling.py",
        "== tl.num_programs(1) - 1:",
        "== 0:",
        ("tests/kernels/test_sample_mix.py::test_programs_may_run_in_any_order[triton]",),
    ),
    Fault(
        "plan: windows that take one token too many pass for all that is worth it",
        TRITON + "passes.py",
        "fits = tl.sum(free_end - begin, 0) <= token_budget",
        "fits = tl.sum(free_end - begin, 0) <= token_budget + 1",
        ("tests/kernels/test_passes.py::test_plan_of_long_rows",),
    ),
    Fault(
        "commit: final one too far after a change",
        REFERENCE + "passes.py",
        "final[row] = slots[last] + 1",
        "final[row] = slots[last] + (2 if last < end - 1 else 1)",
        (PLAIN,),
        compiled=False,
    ),
    Fault(
        "commit: final one too short",
        REFERENCE + "passes.py",
        "final[row] = slots[last] + 1",
        "final[row] = max(slots[last], slots[begin] + 1)",
        (COMMIT,),
        compiled=False,
    ),
    Fault(
        "commit: final at the last change, not at the first",
        REFERENCE + "passes.py",
        "last = begin + int(wrong[0])",
        "last = begin + int(wrong[-1])",
        (PLAIN,),
        compiled=False,
    ),
    Fault(
        "commit: the guess after a change is not carried on",
        REFERENCE + "passes.py",
        "        tokens[at] = sampled[places]\n",
        "        first = changed[begin:end].long().argmax() + begin\n"
        "        tokens[at[places <= first]] = sampled[places[places <= first]]\n",
        (COMMIT,),
        compiled=False,
    ),
    Fault(
        "K/V: a slot is not written again",
        CONTEXT + "ragged.py",
        "        kv_append(self.keys, self.values, key, value, self.cache.current.slots)\n",
        "        slots, seen = self.cache.current.slots, vars(self).setdefault('seen', set())\n"
        "        new = torch.tensor([-1 if slot in seen else slot for slot in slots.tolist()])\n"
        "        kv_append(self.keys, self.values, key, value, new)\n"
        "        seen.update(slots.tolist())\n",
        (PLAIN,),
    ),
    Fault(
        "invariant: a sum whose order is the library's",
        REFERENCE + "linear.py",
        "        total += left[:, None] * right\n",
        "        pass\n    total += hidden.float() @ weight.float().T\n",
        ("tests/kernels/test_linear.py::test_a_row_does_not_depend_on_its_batch",),
    ),
    Fault(
        "invariant: few tokens without the table of activations",
        CONTEXT + "invariant.py",
        "    if hidden.dtype != table.dtype:\n",
        "    if hidden.dtype != table.dtype or hidden.shape[1] < 3:\n",
        (INVARIANT + "test_activations_of_few_tokens",),
    ),
    Fault(
        "invariant: bits are not compared",
        CONTEXT + "invariant.py",
        "if not torch.equal(found[where].view(torch.uint8), output.view(torch.uint8)):",
        "if found[where].shape != output.shape:",
        (BY_NAME,),
    ),
    Fault(
        "invariant: every mean is taken for one of a row",
        CONTEXT + "invariant.py",
        "return dims in ([-1], [given.dim() - 1]) and given.shape[-1] < _MOST_WIDTH and given.is_cpu",
        "return given.shape[-1] < _MOST_WIDTH",
        (BY_NAME,),
    ),
    Fault(
        "invariant: the loop runs without it",
        CONTEXT + "generator.py",
        "            return one_by_one(self._forward(), batch)\n",
        "            return sequential(self.model, batch)\n",
        (INVARIANT + "test_ordinary_products_do_not_give_the_loop_s_contexts",),
    ),
    Fault(
        "position: counted over all rows",
        CONTEXT + "fixed_point.py",
        "RaggedPass(slots, self.positions[slots][None], self.cu_seqlens_q, self.kv_ranges)",
        "RaggedPass(slots, slots[None], self.cu_seqlens_q, self.kv_ranges)",
        ("tests/test_contexts.py::test_fixed_point_equals_sequential[gpt2]",),
    ),
    Fault(
        "position: one too late in contexts' answers",
        CONTEXT + "fixed_point.py",
        "ragged_pass = RaggedPass(slots, self.positions[slots][None], self.cu_seqlens_q, self.kv_ranges)",
        "late = self.positions + (self.draws[2] >= 0)\n"
        "        ragged_pass = RaggedPass(slots, late[slots][None], self.cu_seqlens_q, self.kv_ranges)",
        (PLAIN,),
    ),
    Fault(
        "position: one too early in free answers",
        CONTEXT + "free_running.py",
        "position_ids=positions[None],",
        "position_ids=(positions - (positions > 7).long())[None],",
        (PLAIN,),
    ),
    Fault(
        "stream: the noise of the first row for all",
        CONTEXT + "fixed_point.py",
        "sample_ids=sample_ids,",
        "sample_ids=self.draws[1, :1].expand(len(before)),",
        (PLAIN,),
    ),
    Fault(
        "stream: positions counted from the prompt",
        CONTEXT + "fixed_point.py",
        "positions=answer_positions,",
        "positions=following(self.positions)[before],",
        (PLAIN,),
    ),
    Fault(
        "stream: another seed than the mask's",
        CONTEXT + "fixed_point.py",
        "seed=self.seed,",
        "seed=self.seed ^ 1,",
        (PLAIN,),
    ),
    Fault(
        "stream: the place in the batch for the row's id",
        CONTEXT + "free_running.py",
        "sample_ids=self.sample_ids[place],",
        "sample_ids=place,",
        (PLAIN, RECORDED, LORA, WINDOW),
    ),
    Fault(
        "window: one too long where attention is called",
        CONTEXT + "ragged.py",
        "        sliding_window,\n        softcap,\n        s_aux,\n    )",
        "        sliding_window and sliding_window + 1,\n        softcap,\n        s_aux,\n    )",
        (WINDOW,),
    ),
    Fault(
        "window: one too long in attention itself",
        REFERENCE + "attention.py",
        "visible & (distance < sliding_window)",
        "visible & (distance <= sliding_window)",
        (WINDOW,),
        compiled=False,
    ),
    Fault(
        "budget: not kept",
        CONTEXT + "fixed_point.py",
        "token_budget = min(budget.tokens, room)",
        "token_budget = room",
        ("tests/test_contexts.py::test_nothing_final_is_computed_twice[7]",),
    ),
    Fault(
        "budget: a rank's own decides its contexts",
        TRAINING + "mixing.py",
        "seed=step_seed(self.args.seed, self.state.global_step),",
        "seed=step_seed(self.args.seed + self.generator.budget.tokens, self.state.global_step),",
        (RANKS,),
    ),
    Fault(
        "seed: a rank has its own",
        TRAINING + "mixing.py",
        "seed=step_seed(self.args.seed, self.state.global_step),",
        "seed=step_seed(self.args.seed + self.args.process_index, self.state.global_step),",
        (RANKS,),
    ),
    Fault(
        "seed: of another step after resuming",
        TRAINING + "mixing.py",
        "seed=step_seed(self.args.seed, self.state.global_step),",
        "seed=step_seed(self.args.seed, self.state.global_step - (self._resumed_from is not None)),",
        ("tests/test_trainer.py::test_resume_repeats_the_uninterrupted_run",),
    ),
    Fault(
        "candidates: shifted by one",
        CONTEXT + "fixed_point.py",
        "candidates=of_slots(may_be_self),",
        "candidates=of_slots(may_be_self.roll(1)),",
        (PLAIN,),
    ),
    Fault(
        "candidates: drawn of the next positions",
        CONTEXT + "masks.py",
        "mask = self_mask(seed, ids, positions, prob)",
        "mask = self_mask(seed, ids, positions + 1, prob)",
        (PLAIN,),
    ),
    Fault(
        "loss: shifted by one",
        TRAINING + "losses.py",
        "targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].to(states.device)",
        "targets = labels.to(states.device)",
        ("tests/test_losses.py::test_lean_training_is_plain_training",),
    ),
    Fault(
        "reuse: a layer leaves what entered it",
        TRAINING + "reuse.py",
        "partial(kept.at, index + 1, slots)",
        "partial(kept.at, index, slots)",
        (REUSE,),
    ),
    Fault(
        "reuse: a layer's backward begins at the one before",
        TRAINING + "reuse.py",
        "entering, leaving = partial(kept.at, index, slots)",
        "entering, leaving = partial(kept.at, max(0, index - 1), slots)",
        (REUSE,),
    ),
    Fault(
        "reuse: one layer has no gradient",
        TRAINING + "reuse.py",
        "for parameter in layer.parameters() if parameter.requires_grad]",
        "for parameter in layer.parameters() if parameter.requires_grad and index != 1]",
        (REUSE,),
    ),
    Fault(
        "temperature: left out in contexts",
        CONTEXT + "fixed_point.py",
        "temperature=batch.temperature,",
        "temperature=1.0,",
        (PLAIN,),
    ),
    Fault(
        "temperature: left out in answers",
        CONTEXT + "generator.py",
        '"seed": seed, "temperature": self.temperature,',
        '"seed": seed, "temperature": 1.0,',
        (PLAIN,),
    ),
    Fault(
        "top_k: one too few",
        REFERENCE + "scaling.py",
        "gather(1, top_k[:, None] - 1)",
        "gather(1, (top_k[:, None] - 2).clamp(min=0))",
        ("tests/kernels/test_sample_mix.py::test_filters_are_those_of_transformers",),
        compiled=False,
    ),
    Fault(
        "vocabulary: padding is sampled",
        CONTEXT + "fixed_point.py",
        "vocab_size=batch.vocab_size,",
        "vocab_size=None,",
        (PLAIN,),
    ),
    Fault(
        "weights: packed once, and stale after a step",
        CONTEXT + "packed.py",
        "weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), _BATCH_HINT)",
        "weight = vars(module).setdefault(\n"
        "                    '_once', torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), _BATCH_HINT)\n"
        "                )",
        (PLAIN,),
    ),
    Fault(
        "weights: cast once, and stale after a step",
        CONTEXT + "packed.py",
        "        if copies:\n            torch._foreach_copy_(copies, self._weights())",
        "        if copies and not vars(self).setdefault('_once', False):\n"
        "            self._once = True\n"
        "            torch._foreach_copy_(copies, self._weights())",
        ("tests/test_graphs.py",),
    ),
    Fault(
        "weights: replayed from where they were",
        CONTEXT + "graphs.py",
        "if state != self._state:",
        "if self._state is None or state[0] != self._state[0]:",
        ("tests/test_graphs.py::test_what_changes_the_computation_is_recorded_anew[moved]", RECORDED),
    ),
    Fault(
        "graphs: the seed that they were recorded with",
        CONTEXT + "fixed_point.py",
        "seed=self.seed,",
        "seed=int(self.seed),",
        (RECORDINGS + "test_a_seed_of_each_step",),
    ),
    Fault(
        "graphs: the balance that they were recorded with",
        CONTEXT + "fixed_point.py",
        "least_log_chance(required, self_left, self.balance)",
        "least_log_chance(required, self_left, float(self.balance))",
        (RECORDINGS + "test_another_budget_and_balance",),
    ),
    Fault(
        "graphs: padding is sampled",
        CONTEXT + "fixed_point.py",
        "            following(self.candidates)[before],\n",
        "            1.0,\n",
        (RECORDINGS + "test_logits_that_are_not_finite_are_counted_once",),
    ),
    Fault(
        "graphs: the slot that the loop was recorded at",
        CONTEXT + "sequential.py",
        "self.slot.copy_(self.next_slot[slot])",
        "self.slot.fill_(int(self.next_slot[slot]))",
        ("tests/test_graphs.py::test_the_loop_is_one_replay_per_token[llama]",),
    ),
    Fault(
        "graphs: what is being run is freed",
        CONTEXT + "forward.py",
        'self._check_free("release it when that is done")',
        "pass",
        ("tests/test_graphs.py::test_one_generation_at_a_time",),
    ),
    Fault(
        "graphs: padding is written to the last token",
        CONTEXT + "free_running.py",
        "self.tokens[torch.where(taken, self.starts + self.computed, PADDING)]",
        "self.tokens[torch.where(taken, self.starts + self.computed, self.starts[0])]",
        ("tests/test_graphs.py::test_answers_are_those_of_the_plain_passes",),
    ),
    Fault(
        "graphs: a pass of a new size counts before it is one",
        CONTEXT + "graphs.py",
        "with passes.idle(), not_waiting():",
        "with not_waiting():",
        (RECORDINGS + "test_logits_that_are_not_finite_are_counted_once",),
    ),
    Fault(
        "graphs: the host launches something between passes",
        CONTEXT + "fixed_point.py",
        "state.passes += 1",
        "state.passes += int(state.final.sum() >= 0)",
        (RECORDINGS + "test_the_host_only_reads_numbers_between_two_passes",),
    ),
    Fault(
        "graphs: hidden states that are wanted yet are written to",
        CONTEXT + "graphs.py",
        "last.move_away()",
        "pass",
        (RECORDINGS + "test_kept_hidden_states_are_written_once",),
    ),
    Fault(
        "graphs: hidden states of an earlier generation are left",
        CONTEXT + "hidden_states.py",
        "self.memory = memory.zero_()",
        "self.memory = memory",
        (RECORDINGS + "test_kept_hidden_states_are_written_once",),
    ),
    Fault(
        "graphs: a context is what the next generation writes",
        CONTEXT + "fixed_point.py",
        "torch.split(of_slots[: sum(lengths)].clone(), lengths)",
        "torch.split(of_slots[: sum(lengths)], lengths)",
        (RECORDINGS + "test_memory_of_a_generation_serves_the_next",),
    ),
    Fault(
        "mode: dropout is on while contexts are made",
        CONTEXT + "models.py",
        "    model.eval()\n    try:\n        with torch.no_grad(),",
        "    try:\n        with torch.no_grad(),",
        ("tests/test_contexts.py::test_dropout_is_off_while_contexts_are_made", LORA),
    ),
    Fault(
        "targets: a GPU takes sizes that ask for more shared memory than it has",
        "selfgen_kernels/backends/triton/configuration.py",
        " if SHARED_MEMORY[target] <= room]",
        "]",
        ("tests/kernels/test_triton_targets.py::test_a_device_takes_tiles_that_fit_it",),
    ),
]


def plant(fault: Fault | None, root: Path) -> None:
    """Copy the packages to ``root``, with the fault in them.

    Raises:
        ValueError: its lines are not there once.
    """
    left_out = ["__pycache__", *([] if fault is None or fault.compiled else ["_C*.so"])]
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(*left_out))
        else:
            shutil.copy(ROOT / name, root / name)
    if fault is not None:
        (root / fault.file).write_text(replaced(fault))


def replaced(fault: Fault) -> str:
    """The text of the file with the fault."""
    text = (ROOT / fault.file).read_text()
    if (count := text.count(fault.old)) != 1:
        raise ValueError(f"the fault {fault.name!r} can't be planted: {fault.file} has {fault.old!r} {count} times")
    return text.replace(fault.old, fault.new)


class _Failed:
    """A plugin of pytest that notes down which tests fail, and not those that can't be run at all."""

    def __init__(self, file: Path):
        self.file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and report.when == "call":
            with self.file.open("a") as stream:
                stream.write(f"{report.nodeid}\n")


def run_tests(root: Path, tests: tuple[str, ...]) -> None:
    """In a process of its own: run the tests of the copy in ``root``; the failed ones are listed in a file there."""
    sys.path[:] = [str(root), *(folder for folder in sys.path if Path(folder or ".").resolve() != ROOT)]
    os.environ |= {"PYTHONPATH": str(root), "HYPOTHESIS_PROFILE": "unshrunk"}
    os.chdir(root)
    sys.dont_write_bytecode = True
    output = os.open(root / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import pytest

    os._exit(
        int(
            pytest.main(
                ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(root), *tests], [_Failed(root / "failed.txt")]
            )
        )
    )


class Outcome(NamedTuple):
    failed: str  # the test that failed, or what else became of them
    caught: bool
    seconds: float


def outcome_of(root: Path, status: int | None, seconds: float) -> Outcome:
    file = root / "failed.txt"
    if status is None:
        return Outcome("no end", True, seconds)
    if file.exists():
        return Outcome(file.read_text().split()[0], True, seconds)
    if status == 0:
        return Outcome("none", False, seconds)
    last = (root / "output.txt").read_text().strip().splitlines()[-1:]
    return Outcome(f"the tests did not run: {last}", False, seconds)


def check(faults: list[Fault], jobs: int) -> bool:
    """Print the table; whether each fault is caught, and nothing fails where there is none."""
    clean = [
        Fault(f"nothing{kind}", "", "", "", tuple(sorted({test for fault in faults for test in fault.tests})), compiled)
        for compiled, kind in ((True, ""), (False, " (no C++ kernels)"))
        if any(fault.compiled == compiled for fault in faults)
    ]
    waiting, running, right = [*faults, *clean], dict[int, tuple[Fault, Path, float]](), True
    print(f"| {'fault':52} | {'caught':6} | seconds | by |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            if waiting and len(running) < jobs:
                fault, root = waiting.pop(0), Path(folder) / str(len(waiting))
                root.mkdir()
                plant(fault if fault.file else None, root)
                if not fault.compiled and not fault.file:
                    for file in root.rglob("_C*.so"):
                        file.unlink()
                pid = os.fork()
                if pid == 0:
                    try:
                        run_tests(root, fault.tests)
                    finally:
                        os._exit(99)
                running[pid] = fault, root, time.monotonic()
                continue
            time.sleep(0.05)
            for pid, (fault, root, started) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                seconds = time.monotonic() - started
                late = not done and seconds > DEADLINE * (1 if fault.file else 5)
                if late:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                if done or late:
                    del running[pid]
                    outcome = outcome_of(root, None if late else os.waitstatus_to_exitcode(status), seconds)
                    good = outcome.caught if fault.file else outcome.failed == "none"
                    right &= good
                    said = ("yes" if outcome.caught else "NO") if fault.file else ("-" if good else "FAILS")
                    print(f"| {fault.name:52} | {said:6} | {seconds:7.0f} | {outcome.failed} |", flush=True)
                    shutil.rmtree(root)
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="faults with one of these in their names")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if any(part in fault.name for part in args.only)]
    for fault in faults:
        replaced(fault)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    of_kernels = all(test.startswith("tests/kernels/") for fault in faults for test in fault.tests)
    for name in IMPORTED[: FOR_KERNELS if of_kernels else None]:
        importlib.import_module(name)
    return 0 if check(faults, args.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
