"""Which models the ragged path computes correctly by their configuration; ``verification`` tries the rest."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from .models import accepted_arguments, cache_argument, decoder_of, is_multimodal


@dataclass(frozen=True)
class Support:
    """What the ragged path does not support in a model, and how the model has to be run instead."""

    missing: list[str] = field(default_factory=list)
    isolate_rows: bool = False  # decode rows one by one
    recompute: bool = False  # no cache is valid, as its content depends on the final length of a row


def inspect_model(model: PreTrainedModel, longest_row: int) -> Support:
    """Name the features of ``model`` that rule out the ragged path for rows of up to ``longest_row`` tokens."""
    config = model.config.get_text_config(decoder=True)
    missing, isolate, recompute = [], False, False
    devices = set((getattr(model, "hf_device_map", None) or {}).values()) - {"cpu", "disk"}
    if len(devices) > 1:
        missing.append(f"layers on {len(devices)} devices (device_map)")
    # A vision tower with an attention of its own does not matter.
    if not any(getattr(one, "_supports_attention_backend", False) for one in (model, decoder_of(model))):
        missing.append("an attention that does not go through transformers' AttentionInterface")
    accepted = accepted_arguments(model)
    if cache_argument(model) not in accepted:
        missing.append("a state that is not a transformers KV cache")
        isolate = True
    parameters = inspect.signature(model.forward).parameters.values()
    hands_on = is_multimodal(model) and any(one.kind == one.VAR_KEYWORD for one in parameters)
    if "position_ids" not in accepted and not hands_on:
        missing.append("positions that can't be given (its forward takes no position_ids)")
        isolate = True
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        missing.append("cross-attention (encoder-decoder)")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        missing.append("layers of type " + ", ".join(sorted(kinds)))
        isolate = True
    if getattr(config, "num_kv_shared_layers", None):
        missing.append("KV shared between layers (num_kv_shared_layers)")
    if getattr(config, "kv_lora_rank", None):
        missing.append("latent K/V (multi-head latent attention)")
    if getattr(config, "reorder_and_upcast_attn", False):
        missing.append("reorder_and_upcast_attn")
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if longest_row > original:
            missing.append(
                f"rope_type {kind!r} beyond {original} positions, where frequencies depend on the longest row"
            )
            isolate = recompute = True
    return Support(missing, isolate, recompute)


def _rope_parameters(config) -> list[dict]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def lengths_of(model: PreTrainedModel) -> list[int]:
    """The numbers of the configuration that a row may grow beyond, in order: windows, chunks, switches of rope, ..."""
    return sorted(set(_lengths_in(model.config.get_text_config(decoder=True).to_dict())))


_NO_LENGTHS = (
    "vocab", "token", "hidden", "intermediate", "head", "num_", "dim", "rank", "expert", "layer", "theta",
    "embd", "ffn", "max_position", "id2label", "seed", "size",
)  # fmt: skip
_LENGTHS = ("window", "chunk", "block_size", "local", "original_max_position")


def _lengths_in(config: object, key: str = "") -> Iterator[int]:
    """All numbers but those whose name says that they count something else."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _lengths_in(value, str(name))
    elif isinstance(config, list | tuple) and len(config) <= 64:
        for value in config:
            yield from _lengths_in(value, key)
    elif isinstance(config, int | float) and not isinstance(config, bool) and 1 < config < 2**31:
        is_length = any(part in key for part in _LENGTHS) and "layers" not in key
        counts = key.startswith("n_") or any(part in key for part in _NO_LENGTHS)
        if config == int(config) and (is_length or not counts):
            yield int(config)
