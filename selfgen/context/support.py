"""Which models the ragged path computes correctly: by their configuration, and by a probe for the rest."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .models import cache_argument, vocab_size_of
from .ragged import RaggedCache, RaggedPass, UnsupportedModelError, ragged_logits, ragged_model


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
    if not getattr(model, "_supports_attention_backend", False):
        missing.append("an attention that does not go through transformers' AttentionInterface")
    accepted = inspect.signature(model.forward).parameters
    if cache_argument(model) not in accepted:
        missing.append("a state that is not a transformers KV cache")
        isolate = True
    if "position_ids" not in accepted:
        missing.append("positions that can't be given (its forward takes no position_ids)")
        isolate = True
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        missing.append("cross-attention (encoder-decoder)")
    if getattr(config, "use_bidirectional_attention", None):
        missing.append("bidirectional attention")
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


def verify_model(model: PreTrainedModel) -> None:
    """Compare the ragged path with the model's own forward on a probe, for what ``inspect_model`` can't know.

    The probe is two rows, one of them in two passes. A model that computes something else over the ragged cache is off
    by as much as its logits vary; rounding is off by far less than the tolerance. In half precision, rounding alone may
    put a few positions off as far as that, so there the median of a window counts.
    """
    vocab_size, device = vocab_size_of(model), model.device
    rows = [torch.arange(length, device=device) % vocab_size for length in (21, 6)]
    tokens = torch.cat(rows)
    cache = RaggedCache(model, len(tokens))
    found = torch.empty(0)
    try:
        with ragged_model(model):
            for windows in ([(0, 0, 13), (21, 0, 6)], [(0, 13, 21), (21, 6, 6)]):  # row start, begin, end
                ragged_pass = RaggedPass(
                    torch.cat([torch.arange(row + begin, row + end, device=device) for row, begin, end in windows]),
                    torch.cat([torch.arange(begin, end, device=device) for _, begin, end in windows])[None],
                    torch.tensor([0, *(end - begin for _, begin, end in windows)], device=device).cumsum(0).int(),
                    torch.tensor([(row, end) for row, _, end in windows], device=device),
                )
                everything = torch.arange(ragged_pass.num_tokens, device=device)
                logits = ragged_logits(model, cache, ragged_pass, tokens[ragged_pass.slots], everything).float()
                if not len(found):
                    found = logits.new_empty(len(tokens), logits.shape[1])
                found[ragged_pass.slots] = logits
    except UnsupportedModelError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f'{type(model).__name__} does not run over the ragged cache ({error}); use method="sequential"'
        ) from error
    own = torch.cat(
        [model(input_ids=r[None], attention_mask=torch.ones_like(r)[None], use_cache=False).logits[0] for r in rows]
    ).float()
    usual = own.isfinite() & (own.abs() < 1e30)  # some models mask logits with -inf or the smallest number
    if not usual.any():
        return
    off = (found - own).abs().where(usual, 0.0).sum(1) / usual.sum(1).clamp(min=1) / own[usual].std()
    full_precision = model.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    summary, tolerance = (Tensor.mean, 1e-3) if full_precision else (Tensor.median, 0.1)
    difference = float(torch.stack([summary(window) for window in off.split([13, 8, 6])]).max())
    if not difference <= tolerance:  # NaN is a difference, too
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something else over the ragged cache than in its own forward (logits "
            f'differ by {difference:.1%} of their standard deviation); use method="sequential"'
        )


def _rope_parameters(config) -> list[dict]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
