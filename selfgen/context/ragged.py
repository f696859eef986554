"""transformers decoders, unmodified, over a ragged KV cache.

A pass is a flat batch ``input_ids [1, N]`` of windows from many rows. Two things make an unmodified model compute it:
the attention function ``"selfgen"`` in transformers' ``AttentionInterface`` and a ``Cache`` whose layers keep one
*slot* for each (row, position). Rows lie one after the other in the slots, each exactly as long as it is: nothing is
padded, and a roll-back is a window that begins earlier in the next pass, never a copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

import selfgen_kernels  # noqa: F401  (registers the operators)

from .late import Turned
from .models import UnsupportedModelError, cache_argument, takes, text_inputs
from .precision import autocast_dtype

ATTENTION = "selfgen"
# The operators themselves: they run once per layer and pass, where the checks of the public functions cost a few per
# cent and hold by how a pass is made.
kv_append, ragged_attention = torch.ops.selfgen.kv_append, torch.ops.selfgen.ragged_attention


_WARNING = "warn_if_padding_and_no_attention_mask"


@dataclass
class RaggedPass:
    """The geometry of one pass, shared by all layers: a window of consecutive slots of each row, some empty."""

    slots: Tensor  # [N] int64: the KV slot of each token of the pass
    position_ids: Tensor  # [1, N] int64
    cu_seqlens_q: Tensor  # [R + 1] int32: where each row's tokens begin in the pass
    kv_ranges: Tensor  # [R, 2] int64: first KV slot and number of KV slots that each row sees, its window included

    @property
    def num_tokens(self) -> int:
        return len(self.slots)

    @classmethod
    def of_windows(cls, windows: Sequence[tuple[int, int, int]], device: torch.device) -> RaggedPass:
        """Of each row: its first slot, and the first and one past the last position of its window."""
        positions = torch.cat([torch.arange(begin, end, device=device) for _, begin, end in windows])
        starts = torch.cat([torch.full((end - begin,), row, device=device) for row, begin, end in windows])
        return cls(
            starts + positions,
            positions[None],
            torch.tensor([0, *(end - begin for _, begin, end in windows)], device=device).cumsum(0).int(),
            torch.tensor([(row, end) for row, _, end in windows], device=device),
        )


def _autocast(states: Tensor) -> Tensor:
    """What attention gets under autocast, which casts the arguments of torch's attention but not those of other ops.

    It leaves fp64 as it is.
    """
    dtype = autocast_dtype(states.device)
    return states if dtype is None or states.dtype == torch.float64 else states.to(dtype)


class RaggedLayer(CacheLayerMixin):
    """K/V of one layer: ``[slots, kv_heads, head_dim]``, allocated at the first pass with its dtype and head size."""

    def __init__(self, cache: RaggedCache):
        super().__init__()
        self.cache = weakref.proxy(cache)  # a cycle would keep the K/V until the garbage collector comes by

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def allocate(states: Tensor) -> Tensor:
            return states.new_empty(self.cache.num_slots, states.shape[1], states.shape[3])

        self.keys, self.values = allocate(key_states), allocate(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write ``[1, kv_heads, N, head_dim]`` to the slots of the current pass and return the whole layer."""
        value_states = _autocast(value_states)
        if self._turn_and_append(key_states, value_states):
            return self.keys, self.values
        key_states = _autocast(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key, value = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)  # [N, kv_heads, head_dim]
        kv_append(self.keys, self.values, key, value, self.cache.current.slots)
        return self.keys, self.values

    def _turn_and_append(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Write keys that are turned late in the same launch, rounded as autocast would; False if that can't be."""
        dtype = autocast_dtype(key_states.device) or key_states.dtype
        if not isinstance(key_states, Turned) or (dtype, key_states.shape) != (value_states.dtype, value_states.shape):
            return False
        if not self.is_initialized:
            self.lazy_initialization(value_states, value_states)
        value = value_states[0].transpose(0, 1)
        return key_states.rotation.append(self.keys, self.values, value, self.cache.current.slots)

    def get_seq_length(self) -> int:
        return 0  # positions are always given; rows have lengths of their own

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return self.cache.num_slots

    get_max_cache_shape = get_max_length  # as transformers calls it before 5.14


class RaggedCache(Cache):
    """One ``RaggedLayer`` per decoder layer; ``current`` is the pass being computed."""

    current: RaggedPass

    def __init__(self, model: PreTrainedModel, num_slots: int):
        self.num_slots = num_slots
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[RaggedLayer(self) for _ in range(num_layers)])


_IGNORED = frozenset(
    # Arguments that say nothing about the result of an attention layer in inference over the ragged cache: what (else)
    # to return, positions that are in the states already, and where rows lie in a batch, which the pass itself knows.
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "is_causal",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "seq_idx",
        "use_cache",
    }
)


def _attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, N, head_dim]
    key: Tensor,  # [slots, kv_heads, head_dim]: the whole layer, as RaggedLayer.update returned it
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    ragged_pass: RaggedPass | None = None,
    **features,
) -> tuple[Tensor, None]:
    """The attention of one layer over the ragged cache, under the contract of transformers' ``AttentionInterface``.

    New versions of transformers add keywords, and one that changes nothing must not rule out every model. So a keyword
    that is None, False (a switch that is off) or listed in ``_IGNORED`` is ignored. Any other unknown keyword may
    change the result, and is refused by name. If an ignored one changes it after all, ``verification`` finds other
    logits.
    """
    name = type(module).__name__
    if ragged_pass is None or key.dim() != 3:
        raise UnsupportedModelError(
            f'{name} does not pass keyword arguments or its KV cache to the attention function; use method="sequential"'
        )
    unknown = sorted(
        keyword
        for keyword, given in features.items()
        if given is not None and given is not False and keyword not in _IGNORED
    )
    if attention_mask is not None:
        unknown.append("attention_mask")
    if not getattr(module, "is_causal", True) or features.get("is_causal") is False:
        unknown.append("bidirectional attention")
    if dropout:
        unknown.append("attention dropout")
    if key.shape[-1] != value.shape[-1]:
        unknown.append("value heads of another size than the key heads")
    if unknown:
        raise UnsupportedModelError(
            f'{name} uses {", ".join(unknown)}, which the ragged path does not compute; use method="sequential"'
        )
    output = ragged_attention(
        _autocast(query[0].transpose(0, 1)),
        key,
        value,
        ragged_pass.cu_seqlens_q,
        ragged_pass.kv_ranges,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
        softcap,
        s_aux,
    )
    return output[None], None  # [1, N, heads, head_dim]


AttentionInterface.register(ATTENTION, _attention)


@contextmanager
def ragged_model(model: PreTrainedModel) -> Iterator[None]:
    """Run ``model`` with the ragged attention inside; its own ``attn_implementation`` is restored afterwards.

    Without an attention mask, some models look for padding to warn of, and wait for the device.
    """
    text_inputs(model, torch.zeros(1, 1, dtype=torch.int64))  # found out by the model's own attention
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = {id(m.config): m.config for m in models}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = ATTENTION
        for module in models:
            vars(module)[_WARNING] = lambda *_: None
        yield
    finally:
        for module in models:
            vars(module).pop(_WARNING, None)
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def ragged_logits(
    model: PreTrainedModel, cache: RaggedCache, ragged_pass: RaggedPass, input_ids: Tensor, index: Tensor
) -> Tensor:
    """Compute a pass over ``input_ids`` [N] inside ``ragged_model``; returns logits [M, V] at its places ``index`` [M].

    The pass's K/V goes to its slots. The head, with all that a model does to its logits, runs at ``index`` only, if the
    model takes ``logits_to_keep``.
    """
    cache.current = ragged_pass
    at_index = {"logits_to_keep": index} if takes(model, "logits_to_keep") else {}
    logits = model(
        input_ids=input_ids[None],
        position_ids=ragged_pass.position_ids,
        use_cache=True,
        ragged_pass=ragged_pass,
        **text_inputs(model, input_ids[None]),
        **at_index,
        **{cache_argument(model): cache},
    ).logits[0]
    return logits if at_index else logits[index]
