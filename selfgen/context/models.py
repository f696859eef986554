"""What can be asked of any model of transformers, with or without an adapter of PEFT or a wrapper of accelerate.

Every private name of these libraries that says something about a model is used in this module, with the reason.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, find_adapter_config_file

from .sharding import IN_STEP, is_whole

logger = logging.getLogger(__name__)


class UnsupportedModelError(ValueError):
    """The model has a feature that the ragged path does not support; ``method="sequential"`` works for it.

    Or no method works for it, and the error says so.
    """


_ANSWERS_WITHIN = 10.0  # seconds, of the hub


def check_there(name: str, revision: str | None = None) -> None:
    """Raise FileNotFoundError unless ``name`` is a folder, or may be the name of a model on the hub, which answers.

    The hub is asked once, and only for what its cache does not have: transformers asks for half a minute.
    """
    if Path(name).is_dir():
        return
    if Path(name).is_file():
        raise FileNotFoundError(
            f"{name} is a file: give the folder of a checkpoint that transformers loads (convert a GGUF file to one)"
        )
    near = [str(one) for one in Path(name).absolute().parent.glob("*/") if (one / "config.json").is_file()]
    close = difflib.get_close_matches(str(Path(name).absolute()), near, n=1, cutoff=0.8)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(
            f"there is no folder {name!r}, and a model on the hub can't have that name{meant or '; check the path'}"
        ) from None
    try:
        if constants.HF_HUB_OFFLINE or cached_file(name, "config.json", revision=revision, local_files_only=True):
            return
    except OSError:  # it is not in the cache
        pass
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=_ANSWERS_WITHIN)
    except HfHubHTTPError:  # an answer, of which loading the model says more
        return
    except Exception as error:  # of the network, by whichever client the hub's library has
        raise FileNotFoundError(
            f"there is no folder {name!r}{meant}, and the hub can't be reached to look for a model of that name "
            f"({error}): check the path, or the network"
        ) from error


def auto_class_of(name: str, **hub: Any) -> Any:
    """What loads the model ``name`` (a folder, or on the hub): ``AutoModelForCausalLM``, if that knows it.

    Otherwise the class of transformers for models that see or hear and write text. ``hub`` may have ``revision`` and
    ``trust_remote_code``.

    Raises:
        FileNotFoundError: there is no such folder, and the hub has no such model, or can't be reached.
    """
    check_there(name, hub.get("revision"))
    # Before transformers 5.3 there was none for all of these.
    multimodal = getattr(transformers, "AutoModelForMultimodalLM", transformers.AutoModelForImageTextToText)
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except Exception:  # loading the model says more
        return AutoModelForCausalLM
    # The private name is where from_pretrained looks for the class of a configuration.
    unknown = type(config) not in AutoModelForCausalLM._model_mapping
    return multimodal if unknown and type(config) in multimodal._model_mapping else AutoModelForCausalLM


class MissingWeightsError(ValueError):
    """A model was loaded from files that lack some of its weights, which would be random."""


def load_whole(auto_class: Any, name: str, **options: Any) -> PreTrainedModel:
    """``auto_class.from_pretrained``, which only prints a table where weights are missing.

    Raises:
        MissingWeightsError: some are; they are named.
    """
    model, info = auto_class.from_pretrained(name, output_loading_info=True, **options)
    _check_none_missing(name, model, info)
    found = find_adapter_config_file(name, revision=options.get("revision"))
    base = json.loads(Path(found).read_text()).get("base_model_name_or_path") if found else None
    if base:  # of an adapter's folder, only what the adapter lacks was told
        known = {one: options[one] for one in ("dtype", "trust_remote_code") if one in options}
        on_meta = auto_class.from_pretrained(base, output_loading_info=True, device_map="meta", **known)
        _check_none_missing(base, *on_meta)
    return model


def _check_none_missing(name: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    if missing := sorted(info["missing_keys"]):
        first, more = ", ".join(missing[:3]), ", ..." * (len(missing) > 3)
        raise MissingWeightsError(
            f"model {name!r} lacks {len(missing)} weight{'s' * (len(missing) > 1)} of {type(model).__name__}, which "
            f"would be random ({first}{more}): get the whole checkpoint, or save the model with them, if they are to "
            "be random"
        )


def accepted_arguments(model: PreTrainedModel) -> set[str]:
    """The names of the arguments that ``model.forward`` takes.

    A forward that takes any (``**kwargs``) may hand them on to that of a base class, whose names count, too.
    """
    names: set[str] = set()
    inherited = (vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind))
    for forward in (model.forward, *inherited):
        parameters = inspect.signature(forward).parameters
        names.update(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def cache_argument(model: PreTrainedModel) -> str:
    """What ``model.forward`` calls its KV cache: "cache" since transformers 5.24, "past_key_values" before."""
    return "cache" if "cache" in accepted_arguments(model) else "past_key_values"


def takes(model: PreTrainedModel, name: str) -> bool:
    """Whether ``model.forward`` takes an argument of this name; one that it only hands on does not count."""
    return name in accepted_arguments(model)


def is_multimodal(model: PreTrainedModel) -> bool:
    """Whether the model is more than a decoder of text, by its configuration: it may see images, hear audio, ..."""
    return model.config.get_text_config(decoder=True) is not model.config


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """What computes text in ``model``; the model itself, if it is nothing else."""
    find = getattr(model, "get_decoder", None)
    return (find() if callable(find) else None) or model


def arguments_of(model: PreTrainedModel, **arguments) -> dict[str, Any]:
    """Those of ``arguments`` that ``model.forward`` takes, and what else it needs on rows of text.

    Its losses of routers are kept out of it.
    """
    accepted = accepted_arguments(model)
    if getattr(model.config.get_text_config(decoder=True), "output_router_logits", False):
        arguments["output_router_logits"] = False
    if "input_ids" in arguments:
        arguments = text_inputs(model, arguments["input_ids"]) | arguments
    return {name: value for name, value in arguments.items() if name in accepted}


_TYPES = ("token_type_ids", "mm_token_type_ids")  # 0 says that a token is text
_demanded: WeakKeyDictionary[PreTrainedModel, dict[bool, tuple[str, ...]]] = WeakKeyDictionary()  # by mode


def text_inputs(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Tensor]:
    """What ``model.forward`` demands beside ``input_ids`` [B, L] to know that they are text: zeros [B, L].

    Some models do without in eval mode, but not in training mode. What a model only takes is not given: without it, it
    may compute something else, and rows of text are defined by the forward that is given tokens alone.
    """
    known = _demanded.setdefault(model, {})
    if model.training not in known:
        known[model.training] = _find_demanded(model)
    return {name: torch.zeros_like(input_ids) for name in known[model.training]}


def _find_demanded(model: PreTrainedModel) -> tuple[str, ...]:
    """Which of ``_TYPES`` the model needs in the mode that it is in: the fewest that it runs with."""
    taken = [name for name in _TYPES if takes(model, name)]
    if not taken or not is_multimodal(model):
        return ()
    ids = torch.arange(1, 3, device=model.device)[None] % vocab_size_of(model)
    devices = [model.device] if model.device.type == "cuda" else []
    for names in ((), *((name,) for name in taken), tuple(taken)):
        more = {name: torch.zeros_like(ids) for name in names}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), text_positions(model):
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **more)
            return names
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model does without
            logger.debug("%s does not run with %s", type(model).__name__, names, exc_info=True)
    return ()


@contextmanager
def text_positions(model: PreTrainedModel) -> Iterator[None]:
    """Inside, positions are those of text: what a forward over images left to shift the next ones by is put aside."""
    shifted = [(module, vars(module)["rope_deltas"]) for module in model.modules() if "rope_deltas" in vars(module)]
    try:
        for module, _ in shifted:
            module.rope_deltas = None
        yield
    finally:
        for module, deltas in shifted:
            module.rope_deltas = deltas


_MANY = 256  # logits of more positions are not all kept at a time


def own_logits(model: PreTrainedModel, row: Tensor, at: Tensor) -> Tensor:
    """Logits [M, V] at the places ``at`` [M] of ``row`` [N], by the model's own forward: no cache, no other row.

    This is what a model computes by definition: no positions are given, as it has a first one of its own.
    """
    ids, mask = row[None].clone(), torch.ones_like(row)[None]  # a copy, as some models write into it
    arguments = arguments_of(model, input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=at)
    if len(row) <= _MANY:
        arguments.pop("logits_to_keep", None)
    logits = model(**arguments).logits[0]
    return logits if "logits_to_keep" in arguments and len(logits) == len(at) else logits[at]


@contextmanager
def attention_function(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run ``model`` with another attention of transformers' ``AttentionInterface`` inside."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def vocab_size_of(model: PreTrainedModel) -> int:
    """How many ids the embedding has, with or without an adapter."""
    weight = model.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]  # as ZeRO-3 leaves the shape in parts


def unpadded_vocab_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The ``vocab_size`` of a ``ContextGenerator``: how many ids the tokenizer has, if the embedding has more rows.

    Those rows are padding. None, if there are none, or if the tokenizer is a stand-in without ``get_vocab``. Ids are
    counted up to the highest one: a hole, an id below it that no token has, is sampled like any other.

    Raises:
        ValueError: a token has no row; the one with the highest id is named.
    """
    ids = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    if not ids:
        return None
    token, last = max(ids.items(), key=lambda item: item[1])
    rows = vocab_size_of(model)
    if last >= rows:
        raise ValueError(
            f"the token {token!r} of the tokenizer has id {last}, but the model's embedding has {rows} rows (ids 0 to "
            f"{rows - 1}): call model.resize_token_embeddings({last + 1}) and save the model, or give its own tokenizer"
        )
    return last + 1 if last + 1 < rows else None


def max_positions(model: PreTrainedModel) -> int | None:
    """Most tokens in a row of ``model``; None if its configuration sets no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:  # XLNet says -1
        return None
    # RoBERTa's kinds count positions from the padding id + 1 on.
    first = [m.padding_idx + 1 for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids")]
    return limit - max(first, default=0)


def room_for_answers(model: PreTrainedModel, prompts: Sequence[Sized], cue_length: int = 0) -> list[int]:
    """Positions that each prompt, and a cue of ``cue_length`` tokens after it, leave for an answer.

    2**31 where the configuration sets no limit.

    Raises:
        ValueError: a prompt leaves none; it is named.
    """
    limit = max_positions(model)
    rooms = [(2**31 if limit is None else limit) - len(prompt) - cue_length for prompt in prompts]
    short = next((index for index, room in enumerate(rooms) if room < 1), None)
    if short is not None:
        and_cue, or_cue = (f" and the cue {cue_length}", " or the cue") if cue_length else ("", "")
        raise ValueError(
            f"prompts[{short}] has {len(prompts[short])} tokens{and_cue}; the model has {limit} positions, so none is "
            f"left for an answer: shorten the prompt{or_cue}"
        )
    return rooms


def eos_token_ids_of(model: PreTrainedModel) -> list[int]:
    """The ids that end the model's answers, by its generation configuration, else by its own configuration."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = getattr(model.config, "eos_token_id", None) if ids is None else ids  # RoCBert's has none
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def transformers_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model itself: inside a PEFT model, adapters included."""
    base_model = getattr(model, "get_base_model", None)  # PEFT's
    if hasattr(model, "peft_config"):
        _check_adapters(model)
    if callable(base_model):
        model = base_model()
    elif hasattr(model, "peft_config") and hasattr(model, "base_model"):  # PeftMixedModel
        model = getattr(model.base_model, "model", model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; give a transformers model (AutoModelForCausalLM) or PEFT's"
        )
    try:
        model.get_input_embeddings()
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no embedding of tokens that can be found; give a causal language model"
        ) from error
    return model


def active_adapters(model: torch.nn.Module) -> tuple[str, ...]:
    """The names of PEFT's adapters that are on, as far as ``model`` is one of PEFT's."""
    names: Any = getattr(model, "active_adapters", ()) if hasattr(model, "peft_config") else ()
    if callable(names):  # a transformers model's, which refuses some versions of PEFT that have loaded it
        layers = (module for module in model.modules() if hasattr(module, "adapter_layer_names"))
        names = next((layer.active_adapters for layer in layers), ())
    return tuple(names)


def _check_adapters(model: torch.nn.Module) -> None:
    """Raise ValueError if an adapter that is on acts in the forward of PEFT's own model, which generation goes around.

    ``verification`` finds what isn't known here.
    """
    configs = getattr(model, "peft_config", {})
    for name, config in configs.items():
        kind = getattr(getattr(config, "peft_type", None), "value", None)
        if name not in active_adapters(model) and kind != "XLORA":  # whose own name is never on
            continue
        if getattr(config, "is_prompt_learning", False):
            raise ValueError("prompt-learning adapters of PEFT add positions of their own; use LoRA or another adapter")
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"the adapter {name!r} is an activated LoRA (alora_invocation_tokens), which is on from a position "
                "on that depends on the row; train a LoRA without alora_invocation_tokens"
            )
        if kind in ("ADAPTION_PROMPT", "LILY", "POLY", "SHADOW", "XLORA"):
            raise ValueError(
                f"the adapter {name!r} is of PEFT's type {kind}, which needs more of PEFT's own forward than the "
                "layers that it puts into the model; use LoRA or another adapter"
            )


def check_whole(model: PreTrainedModel) -> None:
    """Raise ValueError if weights of ``model`` are not in this process: they are sharded, and not gathered now.

    Each process makes as many passes as its rows need, but a forward over a part of the weights waits for the same
    forward of the other processes, unless these run along (``lockstep``).
    """
    if not is_whole(model) and model not in IN_STEP:
        raise ValueError(
            "the model's weights are sharded over processes: make contexts and answers inside "
            "`with selfgen.whole_weights(model):`, which all processes enter together (the trainers do so), or inside "
            "`with selfgen.lockstep(model):` where the whole weights don't fit into the memory of a device"
        )


def check_here(model: PreTrainedModel, *, everywhere: bool = False) -> None:
    """Raise ValueError if weights of ``model`` lie elsewhere until a module's own forward fetches them.

    Passes run the layers' own forwards, so it matters for the embedding and the head, or ``everywhere``.
    """
    looked_at = {model, model.get_input_embeddings(), model.get_output_embeddings()}
    for name, module in model.named_modules():
        if module not in looked_at and not everywhere:
            continue
        hook = getattr(module, "_hf_hook", None)  # accelerate's
        for one in getattr(hook, "hooks", (hook,)):  # several, or one
            if getattr(one, "offload", False) or type(one).__name__ == "CpuOffload":
                raise ValueError(
                    f"weights of the model are offloaded to the CPU or a disk (by accelerate: {name or 'the model'}), "
                    "and passes don't fetch them: load the model whole on one device (no device_map that offloads, no "
                    "cpu_offload, no disk_offload), with a smaller dtype or quantized if it does not fit"
                )
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    there = next((name for name, parameter in model.named_parameters() if parameter.device.type == "meta"), None)
    if there is not None and not hooked:
        raise ValueError(f"{there} has no values yet (it is on the meta device): load the model's weights first")


_LAYS_OUT = "support_avx512bf16_for_cpu"


def check_4bit_layout(model: torch.nn.Module) -> None:
    """Raise ValueError if bitsandbytes has laid out 4-bit weights for inference on the CPU (`keep_4bit_layout`)."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} can't be trained through: a forward in eval mode has laid out its 4-bit weights for inference "
                "on this CPU, and no gradient passes through that layout; load the model again, and make its trainer "
                "before any forward in eval mode"
            )


def keep_4bit_layout(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Keep bitsandbytes' 4-bit weights on the CPU as training needs them; returns the modules that it has changed.

    Where the CPU has AVX512-BF16, their first forward in eval mode lays them out anew, for good, and no gradient passes
    through that layout.
    """
    modules = [module for module in model.modules() if getattr(module, _LAYS_OUT, False)]
    for module in modules:
        setattr(module, _LAYS_OUT, False)
    return modules


@contextmanager
def in_training_mode(model: PreTrainedModel) -> Iterator[Callable[[Callable[[], Tensor]], Tensor]]:
    """Training mode inside `inference`; gives what runs a function with the same random numbers each time.

    Buffers are as they were afterwards, and so are random numbers.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def run(function: Callable[[], Tensor]) -> Tensor:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of checkpointing, that nothing needs a gradient
            torch.manual_seed(0)
            return function()

    model.train()
    try:
        yield run
    finally:
        model.eval()
        for buffer, before in buffers:
            buffer.copy_(before)


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own training flag is back afterwards.

    Modules that were compiled in place (``module.compile()``) run as they are, since passes come in ever new sizes.
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    compiled = any(module._compiled_call_impl is not None for module in modules)
    kept = keep_4bit_layout(model)
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True
        for module in kept:
            setattr(module, _LAYS_OUT, True)
