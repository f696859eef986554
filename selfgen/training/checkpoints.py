"""What a checkpoint says of the run that wrote it, which one a run is resumed from, and what a run may write over."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, TrainingArguments

from ..context import NOISE_VERSION
from ..files import LOCK, SaveError, alone_in, check_folder, code_in
from ..provenance import differences
from .config import FOLLOWING, BSSConfig
from .shards import MODEL, OPTIMIZER, fault_of_shards
from .streams import sorts_by_length

logger = logging.getLogger(__name__)

SETTINGS = "selfgen.json"  # next to the weights of every checkpoint
STATE = "trainer_state.json"  # what the Trainer writes last
SELF_PROB = "selfgen_self_prob.json"  # in every checkpoint of a run whose self-probability follows its steps
COUNTED = ("losses", "self_tokens", "differing", "expected")  # what it has
UNFINISHED = ".model.whole"  # in an output folder whose model is about to be put in its place, file by file
_OBJECTS = (SETTINGS, STATE, "config.json", "generation_config.json", "adapter_config.json")
_LATEST = "latest"  # what DeepSpeed writes last, with the name of its folder
_CODE_OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
}  # fmt: skip
"""Classes without side effects in the states of its optimizers."""
_SMALL = 2**26  # bytes of a file that is read as a whole to find damage
_MAY_CHANGE = {
    "context_method", "token_budget", "balance", "context_micro_batches", "own_answer_batch_size", "cuda_graphs",
    "graph_memory", "reuse_passes", "lean_loss", "weights", "eval_corrections",
}  # fmt: skip


_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_model*")
_OF_MODELS = (
    *_WEIGHTS, "config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "chat_template*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", SETTINGS,
    "training_args.bin", "trainer_state.json",
)  # fmt: skip
_TELLING = (*_WEIGHTS, "config.json", "adapter_config.json", SETTINGS, "training_args.bin", "trainer_state.json",
            "provenance.json")  # fmt: skip
"""Files by which a folder is known to hold a model, what a run left, or contexts."""


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


@contextmanager
def output_of(
    args: BSSConfig, *, overwrite: bool = False, rounds: bool = False, error: type[ValueError] = ValueError
) -> Iterator[None]:
    """Keep other runs out of ``args.output_dir`` until the block ends.

    Args:
        overwrite: allow a model there, but no checkpoints and no rounds, which would be taken for those of this run.
        rounds: this run has rounds.

    Raises:
        SaveError: it can't be written to.
        error: another run is writing there, or it holds something else than the run that ``args`` continues, if any.
    """
    folder = Path(args.output_dir)
    check_folder(folder, "output_dir")
    if not (folder / LOCK).exists():  # so that a folder that is refused gets none
        _check_output(args, overwrite, rounds, error)
    with alone_in(folder, error):
        _check_output(args, overwrite, rounds, error)
        yield


def _check_output(args: BSSConfig, overwrite: bool, rounds: bool, error: type[ValueError]) -> None:
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    earlier = {
        "rounds already": any(folder.glob("round-*")),
        "checkpoints of an earlier run": any(folder.glob("checkpoint-*/trainer_state.json")),
    }
    own, other = earlier if rounds else reversed(earlier)
    if earlier[other]:
        raise error(f"{folder} has {other}, of another method: give another output_dir, or remove them")
    if earlier[own] and resume is None:
        raise error(
            f"{folder} has {own}; continue them (--resume-from-checkpoint last), or give another output_dir, or remove "
            "them"
        )
    if (earlier[own] and resume == "last") or (resume and Path(resume).resolve().parent == folder.resolve()):
        return
    found = [file.name for file in _files(folder, _TELLING)]
    if found and not overwrite and not (folder / UNFINISHED).is_dir():
        raise error(
            f"{folder} holds a model or another run ({', '.join(found[:3])}{', ...' * (len(found) > 3)}), which this "
            "run would write over: give another output_dir, or --overwrite-output-dir yes to lose what is there"
        )


def remove_model(folder: str | Path) -> None:
    """Remove the files of a model from ``folder``: what is left of one would be taken for a part of the next."""
    for file in _files(Path(folder), _OF_MODELS):
        file.unlink()


class ResumeError(ValueError):
    """A run can't be continued from a checkpoint."""


def resumed_checkpoint(asked: str | Path | None, folder: str | Path) -> str | None:
    """The checkpoint that ``asked`` means: its folder, or with "last" the newest whole one in ``folder``, if any.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ResumeError: it is not whole.
    """
    if not asked:
        return None
    if asked == "last":
        return last_checkpoint(folder)
    if not (Path(asked) / STATE).is_file():
        raise FileNotFoundError(
            f"resume_from_checkpoint is {str(asked)!r}: no checkpoint there; give the folder of one, or last for the "
            "newest"
        )
    check_whole(asked)
    return str(asked)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in ``folder``; a warning names newer ones that are not, and what is wrong with them.

    None, if there is none at all, or if writing the only one was broken off.

    Raises:
        ResumeError: there are checkpoints, but none of them is whole.
    """
    steps = {int(path.name.rpartition("-")[2]): path for path in Path(folder).glob("checkpoint-*") if _has_step(path)}
    passed_over: dict[Path, str] = {}
    for _, checkpoint in sorted(steps.items(), reverse=True):
        fault = fault_of(checkpoint)
        if fault is None:
            for broken, what in passed_over.items():
                logger.warning("%s is passed over, as %s; the run goes on from %s", broken.name, what, checkpoint)
            return str(checkpoint)
        passed_over[checkpoint] = fault
    for checkpoint, fault in passed_over.items():
        if _step_of(checkpoint) is not None:  # it was written to its end once
            raise ResumeError(
                f"there is no whole checkpoint in {folder} to continue from: in {checkpoint.name}, {fault}. Start "
                "another run, with the checkpoint as its model if its weights are whole, or remove the checkpoints"
            )
        logger.warning("%s is passed over, as %s; the run begins anew", checkpoint.name, fault)
    return None


def _has_step(checkpoint: Path) -> bool:
    return checkpoint.is_dir() and checkpoint.name.rpartition("-")[2].isdecimal()


def check_whole(checkpoint: str | Path) -> None:
    """Raise ResumeError if a run can't be continued from ``checkpoint``; the file at fault is named."""
    if fault := fault_of(Path(checkpoint)):
        raise ResumeError(f"{checkpoint} can't be continued from, as {fault}: give an earlier checkpoint, or last")


def fault_of(checkpoint: Path) -> str | None:
    """The first file that is broken or missing in ``checkpoint``, and what is wrong with it.

    Large files are not read: a weights' file tells its length, and an archive of torch has its directory at its end.
    """
    if _step_of(checkpoint) is None:  # the Trainer writes this file last
        return f"{STATE} is not there as a whole, so writing the checkpoint was broken off"
    for file in sorted(checkpoint.glob("*.json")):
        if file.name in _OBJECTS or file.name.endswith(".index.json") or file.name.startswith("selfgen_"):
            try:
                if not isinstance(json.loads(file.read_text()), dict):
                    return f"{file.name} is no JSON object"
            except (ValueError, OSError) as error:
                return f"{file.name} is broken ({error})"
    weights = [file for pattern in ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
               for file in sorted(checkpoint.glob(pattern))]  # fmt: skip
    shards: set[str] = set()
    for index in checkpoint.glob("*.index.json"):
        shards |= set(json.loads(index.read_text()).get("weight_map", {}).values())
    if missing := sorted(shards - {file.name for file in weights}):
        return f"{missing[0]} is missing"
    in_shards = [checkpoint / name for name in (MODEL, OPTIMIZER) if (checkpoint / name).is_dir()]
    if not weights and not in_shards and not any(checkpoint.glob("*/adapter_model.*")):
        return "the weights (model.safetensors) are missing"
    if len(in_shards) == 1:
        return f"{({MODEL, OPTIMIZER} - {in_shards[0].name}).pop()} is missing"
    states = [*checkpoint.glob("optimizer.*"), *checkpoint.glob("scheduler.pt"), *checkpoint.glob("scaler.pt")]
    states += checkpoint.glob("rng_state*.pth")
    there, processes = {state.name for state in states}, _processes_of(checkpoint)
    of_deepspeed = checkpoint / _LATEST
    if of_deepspeed.is_file():
        if missing_part := _missing_of_deepspeed(checkpoint, processes):
            return missing_part
        states += checkpoint.glob(f"{of_deepspeed.read_text().strip()}/*_states.pt")
        there.add("scheduler.pt")  # which may be DeepSpeed's own
    elif not in_shards and not any(name.startswith("optimizer.") for name in there):
        return "optimizer.pt is missing (save_only_model writes none)"
    of_generators = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for name in ("scheduler.pt", *of_generators):
        if name not in there:
            return f"{name} is missing"
    if fault := _fault_of_counts(checkpoint):
        return fault
    for file in (*weights, *sorted(states)):
        if broken := _broken(file):
            return f"{file.name} is broken ({broken})"
    return next(filter(None, map(fault_of_shards, in_shards)), None)


def _fault_of_counts(checkpoint: Path) -> str | None:
    """What lacks of that which the self-probability of the run follows, if it follows anything."""
    settings = _settings_of(checkpoint)
    if all(settings.get(name) != word for name, word in FOLLOWING.items()):
        return None
    if not (checkpoint / SELF_PROB).is_file():
        return f"{SELF_PROB} is missing"
    counted = json.loads((checkpoint / SELF_PROB).read_text())
    lacks = [name for name in COUNTED if name not in counted]
    return f"{SELF_PROB} lacks {', '.join(lacks)}" if lacks else None


def _missing_of_deepspeed(checkpoint: Path, processes: int) -> str | None:
    """What lacks of the folder that DeepSpeed writes, with a part of the optimizer's state for each process."""
    folder = checkpoint / (checkpoint / _LATEST).read_text().strip()
    optimizers, models = (list(folder.glob(f"*{kind}_states.pt")) for kind in ("optim", "model"))
    if len(optimizers) < processes:
        return f"{len(optimizers)} of {processes} parts of the optimizer are in {folder.name}"
    return None if models else f"the weights ({folder.name}/*model_states.pt) are missing"


def _step_of(checkpoint: Path) -> int | None:
    try:
        found = json.loads((checkpoint / STATE).read_text())
    except (ValueError, OSError):
        return None
    step = found.get("global_step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else None


def _settings_of(checkpoint: Path) -> dict[str, Any]:
    """Of the run that wrote it; none, if another program did."""
    file = checkpoint / SETTINGS
    return json.loads(file.read_text()) if file.is_file() else {}


def _processes_of(checkpoint: Path) -> int:
    try:
        return int(_settings_of(checkpoint)["trainer"]["processes"])
    except (KeyError, TypeError):  # of another program
        return max(1, len(list(checkpoint.glob("rng_state_*.pth"))))


def _broken(file: Path) -> str | None:
    """What is wrong with a file of tensors."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return None
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip() if file.stat().st_size <= _SMALL else None
        if damaged is not None:
            return f"{damaged} in it is damaged"
        code = [name for name in code_in(file) if name not in _CODE_OF_DEEPSPEED]
        return f"loading it would run {code[0]}, so it isn't loaded" if code else None
    except (SafetensorError, zipfile.BadZipFile, OSError) as error:
        return str(error)


def load_renamed(checkpoint: str | Path, model: nn.Module) -> bool:
    """Load the weights of ``checkpoint`` if their names in the file are others than in ``model``; whether they are.

    transformers saves some models (experts, and models that also see) under the names of earlier versions, and knows
    how to read these. Its Trainer doesn't: it would leave such weights as they are before training, with a warning.

    Raises:
        ResumeError: they are the weights of another model.
    """
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    if not isinstance(model, PreTrainedModel) or not files or _has_names(model, files):
        return False
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
    other = f"{checkpoint} has the weights of another model"
    try:
        loaded, info = type(model).from_pretrained(
            str(checkpoint), config=copy.deepcopy(model.config), dtype=dtype, output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:  # as where shapes are others
        raise ResumeError(f"{other}: give --model as it was, or start another run ({error})") from error
    if wrong := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise ResumeError(f"{other} ({wrong[0]} is in one of them only): give --model as it was, or start another run")
    model.load_state_dict(loaded.state_dict())
    return True


def _has_names(model: PreTrainedModel, files: Collection[Path]) -> bool:
    """Whether ``files`` have the weights of ``model`` under its names, and in its shapes; tied ones once or more."""
    there: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            there |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    state = model.state_dict()
    if any(name not in state or list(state[name].shape) != shape for name, shape in there.items()):
        return False
    saved = {state[name].data_ptr() for name in there}
    return all(name in there or weight.data_ptr() in saved for name, weight in state.items())


@contextmanager
def whole_or_not_at_all(checkpoint: Path) -> Iterator[None]:
    """Inside, a checkpoint is written. It counts as one only when the block has ended, also where one was before.

    Raises:
        SaveError: it can't be written, as on a full disk; what there is of it is removed.
    """
    (checkpoint / STATE).unlink(missing_ok=True)
    try:
        with saving(checkpoint):
            yield
    except SaveError:
        if _step_of(checkpoint) is None:  # and not when removing older ones has failed
            shutil.rmtree(checkpoint, ignore_errors=True)
        raise


def check_savable(model: PreTrainedModel, *, adapter: bool) -> None:
    """Try to save the configurations of ``model``, before anything is trained.

    transformers refuses to save a generation configuration with settings that have no effect, such as a temperature
    without sampling, which published models have. They are taken out, and a warning names them.

    Args:
        adapter: only an adapter of the model is saved, without the model's own configuration.

    Raises:
        ValueError: a configuration can't be saved.
    """
    config = getattr(model, "generation_config", None)
    idle = {} if config is None or _is_valid(config) else _idle_settings(config)
    default = GenerationConfig()
    for name in idle:
        setattr(config, name, getattr(default, name, None))
    if idle:
        told = ", ".join(f"{name}={value!r}" for name, value in idle.items())
        logger.warning("the generation configuration has settings without effect, which are left out: %s", told)
    with tempfile.TemporaryDirectory() as folder:
        for what, one in (("generation_config", config), ("config", None if adapter else model.config)):
            try:
                if one is not None:
                    one.save_pretrained(folder)
            except ValueError as error:
                raise ValueError(
                    f"transformers refuses to save model.{what} ({' '.join(str(error).split())}): change it before "
                    "training"
                ) from error


_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_OF_BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "constraints")
_OF_DICTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def _idle_settings(config: GenerationConfig) -> dict[str, object]:
    """Settings that have no effect, as others are off, and are not the default."""
    names = [
        *(() if config.do_sample else _OF_SAMPLING),
        *(() if (config.num_beams or 1) > 1 else _OF_BEAMS),
        *(() if config.return_dict_in_generate else _OF_DICTS),
    ]
    default = GenerationConfig()
    found = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in found.items() if value not in (None, getattr(default, name, None))}


@contextmanager
def saving(folder: str | Path) -> Iterator[None]:
    """Raise SaveError where ``folder`` can't be written, which torch and safetensors say in their own ways."""
    try:
        yield
    except SaveError:
        raise
    except BaseException as met:
        error = _of_one_process(met)
        if not isinstance(error, Exception):
            raise
        said = str(error)
        of_system = isinstance(error, OSError) and error.errno is not None  # and none of the hub's
        if of_system or any(sign in said for sign in _NOT_WRITTEN):
            reason = said.splitlines()[0] if said else type(error).__name__
            if "inline_container" in reason and "No space" not in reason:  # which is all that torch says
                reason = f"torch could not write a file, as on a full disk: {reason}"
            raise SaveError(
                f"{folder} can't be written ({reason}): make room or "
                "give the right to write there, and continue with --resume-from-checkpoint last. Earlier checkpoints "
                "are as they were"
            ) from met
        raise


def _of_one_process(error: BaseException) -> BaseException:
    """What the first of the processes has met that failed to write their parts of a checkpoint together."""
    failures = getattr(error, "failures", None)  # of torch.distributed.checkpoint, whose errors are no Exception
    return next(iter(failures.values()))[0] if isinstance(failures, dict) and failures else error


_NOT_WRITTEN = ("os error", "I/O error", "PytorchStreamWriter", "inline_container", "No space left", "write failed")


# ---------------------------------------------------------------------------------------------------------------------
# The run that wrote a checkpoint, compared with the one that goes on from it


def resumed_settings(args: BSSConfig) -> dict[str, object]:
    """What contexts and losses depend on, which must be the same in a resumed run."""
    of_trainer = {field.name for field in fields(TrainingArguments)} - {"seed"}
    names = [field.name for field in fields(args) if field.name not in of_trainer | _MAY_CHANGE]
    more = {"self_prob_warmup": args.warm_up, "self_prob_curve": args.masks.curve}  # what is used where none is given
    return {name: getattr(args, name) for name in names} | more | {"noise_version": NOISE_VERSION}


def _method_of(settings: Collection[str]) -> str:
    """The method of a run, by the names of its settings; the rows tell bash from bss, as they have contexts."""
    return "rac" if "own_answer" in settings else "bss or bash"


def trainer_settings(args: BSSConfig) -> dict[str, object]:
    """The Trainer's options that the result depends on, and how many rows a step has."""
    sizes = [args.train_batch_size, args.gradient_accumulation_steps, args.row_share[1]]
    settings: dict[str, object] = {"rows_per_step": math.prod(sizes), "processes": args.world_size}
    if sorts_by_length(args):
        settings["sorted_batches"] = sizes
    for one in fields(TrainingArguments):
        value = getattr(args, one.name, None)
        if one.name in _HARMLESS or (one.name.startswith(_HARMLESS_KINDS) and one.name not in _OTHER_RUN):
            continue
        settings[one.name] = getattr(value, "value", value)  # of an enumeration
    if args.max_steps > 0:
        settings["num_train_epochs"] = None  # not used
    return settings


def record_of(args: BSSConfig, rows: str | None, models: dict[str, str | None] | None = None) -> dict[str, object]:
    """What a checkpoint says of the run that writes it.

    ``rows`` is the hash of its training rows, and ``models`` has those of the weights of the models that it compares
    with: ``frozen`` of one that it stays near, ``teacher`` of one that it learns from.
    """
    return {**resumed_settings(args), "rows": rows, **(models or {}), "trainer": trainer_settings(args)}


def check_resumed(
    checkpoint: str | Path,
    args: BSSConfig,
    rows: Callable[[], str | None] | None = None,
) -> None:
    """Compare the run that wrote ``checkpoint`` with that of ``args`` and of the hash ``rows``.

    A warning tells which options of the Trainer are others, where users may want that.

    Raises:
        ResumeError: the checkpoint is not whole, or it comes from a run with other settings or rows.
    """
    check_whole(checkpoint)
    try:
        before = json.loads((Path(checkpoint) / SETTINGS).read_text())
    except FileNotFoundError:  # of another program
        if rows is not None:
            logger.warning(
                "%s has no %s, so whether its run had these settings and rows can't be told", checkpoint, SETTINGS
            )
        return
    before.setdefault("noise_version", 1)  # of checkpoints that do not name it
    before_trainer, before_rows = before.pop("trainer", {}), before.pop("rows", None)
    now, now_trainer = resumed_settings(args), trainer_settings(args)
    known = before_trainer.keys() & now_trainer.keys()  # another version may have other ones
    changed = {name for name in known if differences({name: before_trainer[name]}, {name: now_trainer[name]})}

    def told(names: Collection[str]) -> list[str]:
        return differences({n: before_trainer[n] for n in sorted(names)}, {n: now_trainer[n] for n in sorted(names)})

    other = differences({"method": _method_of(before)}, {"method": _method_of(now)})
    other += differences(before, now, ignore=before.keys() ^ now.keys()) + told(changed & _OTHER_RUN)
    if other:
        raise ResumeError(
            f"{checkpoint} comes from a run with other settings ({'; '.join(other)}): resume with the former "
            "ones, or start another run with the checkpoint as its model"
        )
    if rows is None:
        return
    if before_rows is not None and before_rows != rows():
        raise ResumeError(
            f"{checkpoint} comes from a run on other rows (or the same in another order, or tokenized otherwise): "
            "resume with the former data set, or start another run with the checkpoint as its model"
        )
    if args.process_index > 0:  # the first process tells the rest
        return
    if kept := changed & _KEPT:
        logger.warning(
            "%s: no effect in a resumed run, as the optimizer and its schedule are the checkpoint's; for the new "
            "value, start another run with the checkpoint as its model",
            "; ".join(told(kept)),
        )
    if rest := changed - _KEPT - _OTHER_RUN:
        logger.warning("the resumed run differs from an unbroken one: %s", "; ".join(told(rest)))


def check_same_models(checkpoint: str | Path, models: dict[str, str | None]) -> None:
    """Raise ResumeError unless the run that wrote ``checkpoint`` compared with the ``models``, as in `record_of`."""
    try:
        before = json.loads((Path(checkpoint) / SETTINGS).read_text())
    except FileNotFoundError:  # of another program
        return
    for name, (does, option) in _COMPARED_WITH.items():
        if name in before and before[name] != models[name]:
            raise ResumeError(
                f"{checkpoint} comes from a run that {does}: resume with the former {option}, or start another run "
                "with the checkpoint as its model"
            )


_COMPARED_WITH = {
    "frozen": ("stays near another model (kl_weight)", "--model or --kl-model"),
    "teacher": ("learns from another model (target=teacher)", "--teacher-model"),
}
_OTHER_RUN = {
    "rows_per_step", "sorted_batches", "optim", "optim_args", "optim_target_modules", "label_smoothing_factor",
    "neftune_noise_alpha", "train_sampling_strategy", "group_by_length", "dataloader_drop_last", "data_seed",
    "average_tokens_across_devices",
}  # fmt: skip
"""Options of the Trainer that make another run: other rows in a step, another loss or another optimizer."""
_KEPT = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
"""What the states of the optimizer and of its schedule bring with them."""
_HARMLESS_KINDS = (
    "logging_", "log_", "eval_", "save_", "hub_", "push_", "dataloader_", "ddp_", "trackio_", "torch_empty_cache",
    "activation_checkpointing", "gradient_checkpointing", "fsdp", "do_", "past_",
)  # fmt: skip
_HARMLESS = {
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size",
    "report_to", "run_name", "project", "disable_tqdm", "resume_from_checkpoint", "use_cpu", "remove_unused_columns",
    "local_rank", "debug", "skip_memory_metrics", "deepspeed", "parallelism_config", "include_for_metrics",
    "include_num_input_tokens_seen", "batch_eval_metrics", "prediction_loss_only", "enable_jit_checkpoint",
    "full_determinism", "label_names", "use_cache", "bf16_full_eval", "fp16_full_eval", "auto_find_batch_size",
    "length_column_name", "accelerator_config", "liger_kernel_config", "restore_callback_states_from_checkpoint",
    "seed", "ignore_data_skip", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
}  # fmt: skip
"""Options of the Trainer that the weights do not depend on, those that count rows in another way, and the seed, which
is compared as a setting."""
