"""Every family of decoders of the installed transformers, tiny: found by enumeration, made small by rules.

The rules know what sizes are called. A family that they make nothing runnable of says so (``CannotBuild``).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers as t
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB = 131
WINDOW = 24  # the rows of the zoo are longer
POSITIONS = 256

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "head_dim": 8, "d_kv": 8, "kv_channels": 8, "global_head_dim": 8, "swa_head_dim": 8, "attention_head_dim": 8,
    "v_head_dim": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
    "index_head_dim": 8, "index_n_heads": 2, "swa_v_head_dim": 8, "qk_head_dim": 12, "rotary_dim": 4, "o_lora_rank": 8,
    "rope_head_dim": 4,
    "n_embd": 32, "hidden_size": 32, "d_model": 32, "dim_model": 32, "emb_dim": 32, "embedding_size": 32,
    "input_embedding_size": 32, "attention_hidden_size": 32, "model_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "d_inner": 48, "dim_ff": 48, "n_inner": 48, "ffn_hidden_size": 48,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "d_ff": 48, "moe_intermediate_size": 24, "lru_width": 32,
    "shared_expert_intermediate_size": 24, "dense_intermediate_size": 48, "mlp_hidden_size": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "multi_query_group_num": 2,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "num_global_key_value_heads": 2,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "n_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "moe_top_k": 2, "n_group": 1,
    "topk_group": 1, "num_expert_group": 1, "n_shared_experts": 1, "moe_num_shared_experts": 1, "top_k_experts": 2,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1,
    "max_position_embeddings": POSITIONS, "n_positions": POSITIONS, "n_ctx": POSITIONS, "max_seq_len": POSITIONS,
    "seq_length": POSITIONS, "max_sequence_length": POSITIONS, "max_target_positions": POSITIONS,
    "context_length": POSITIONS,
    "sliding_window": WINDOW, "attention_window_size": WINDOW, "attention_chunk_size": WINDOW, "window_size": WINDOW,
    "local_attention": WINDOW, "sliding_window_size": WINDOW, "use_sliding_window": True, "floor_scale": 16,
    "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_num_heads": 8,
    "mamba_head_dim": 8, "mamba_d_ssm": 64, "mamba_expand": 2, "mamba_chunk_size": 16, "chunk_size": 16, "n_groups": 1,
    "ssm_state_size": 8, "state_size": 8, "mamba_dt_rank": 4, "time_step_rank": 4, "n_mamba_heads": 2,
    "num_memory_blocks": 1, "hybrid_layer_ids": [1],
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "initializer_range": 0.3, "init_std": 0.3,
    "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
NO_DROPOUT = ("dropout", "drop", "layerdrop", "jitter")

# What the rules can't know: arguments for one family, by its model_type.
LATENT = {"head_dim": 4, "num_key_value_heads": 4, "qk_head_dim": 12}  # K/V of multi-head latent attention
PARTICULAR: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT | {"index_topk": WINDOW},
    "bailing_hybrid": LATENT | {"linear_head_dim": 8, "linear_num_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 48},
    },
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3]},
    "deepseek_v2": LATENT | {"num_experts_per_tok": 2},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT | {"index_topk": WINDOW},
    "dory": {
        "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "max_window_layers": 1},
    "dots3_note": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_text": LATENT | {"index_topk": WINDOW, "head_dim": 12, "shared_experts_intermediate_size": 24},
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "num_hidden_layers": 4, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB, "intermediate_size": [48] * 4, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT | {"index_topk": WINDOW},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "inkling_text": {"unpadded_vocab_size": VOCAB},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LATENT | {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": LATENT | {"zero_expert_num": 2, "expert_ffn_hidden_size": 24, "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "minicpm3": LATENT,
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "crop_size": 32, "feature_layer": 0,
        },
        "audio_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 2,
            "nemo_conv_channels": 32, "ext_pw_out_channel": 32, "nemo_final_size": 32,
        },
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "roc_bert": {
        "pronunciation_vocab_size": 20, "shape_vocab_size": 20, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "sarvam_mla": LATENT,
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 64, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}  # fmt: skip

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "bloom": {"slow but exact": {"slow_but_exact": True}},
    "doge": {"experts": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4}},
    "falcon": {
        "alibi": {"alibi": True},
        "new decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
    },
    "gemma3_text": {"both directions": {"use_bidirectional_attention": True}},
    "gpt2": {"reordered": {"reorder_and_upcast_attn": True}, "by layer": {"scale_attn_by_inverse_layer_idx": True}},
    "llama": {
        name: {"rope_parameters": {"rope_type": name, "rope_theta": 1e4, "factor": 4.0} | more}
        for name, more in {
            "linear": {},
            "dynamic": {"original_max_position_embeddings": WINDOW},
            "yarn": {"original_max_position_embeddings": WINDOW},
            "longrope": {
                "original_max_position_embeddings": WINDOW, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
            },
            "llama3": {
                "original_max_position_embeddings": WINDOW, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            },
        }.items()
    },
    "llama4_text": {
        "full attention": {"layer_types": ["full_attention"] * 2, "attn_scale": 2.0, "no_rope_layers": [0, 1]},
    },
}  # fmt: skip


def variants(config_class: type[PreTrainedConfig]) -> dict[str, dict[str, Any]]:
    """What is tried of a family beside its defaults: arguments by the name of a variant."""
    try:
        config = config_class()
    except Exception:  # the class has no valid default
        return {}
    found: dict[str, dict[str, Any]] = {}
    has = vars(config)
    kinds = getattr(config, "layer_types", None)
    if "sliding_window" in has and not (kinds and "sliding_attention" in kinds):
        windows: dict[str, Any] = {"sliding_window": WINDOW}
        if "use_sliding_window" in has:
            windows["use_sliding_window"] = True
        if kinds and set(kinds) == {"full_attention"}:
            windows["layer_types"] = ["sliding_attention", "full_attention"]
        found["windows"] = windows
    if has.get("is_decoder") is False and not config.is_encoder_decoder and "add_cross_attention" in has:
        found["decoder"] = {"is_decoder": True}
    if has.get("output_router_logits") is False:
        found["router logits"] = {"output_router_logits": True}
    return found | OPTIONS.get(config_class.model_type, {})


class CannotBuild(Exception):
    """The rules make nothing of a family that runs."""


def families() -> dict[str, type[PreTrainedConfig]]:
    """Every configuration class that ``AutoModelForCausalLM`` knows, by its model_type."""
    found = {}
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        found.setdefault(config_class.model_type, config_class)
    return dict(sorted(found.items()))


def tiny_config(config_class: type[PreTrainedConfig], **extra) -> PreTrainedConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config_class(**_small(config_class(), **PARTICULAR.get(config_class.model_type, {}) | extra))


def _small(config: PreTrainedConfig, **extra) -> dict[str, Any]:
    """Arguments for a small configuration of the same class."""
    arguments: dict[str, Any] = {}
    values = dict(vars(config))
    layers = _number_of_layers(values)
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            arguments[name] = type(value)(**_small(value, **PARTICULAR.get(value.model_type, {}))).to_dict()
        elif name in SIZES and (value is not None or name == "pad_token_id"):
            if isinstance(value, list) and not isinstance(SIZES[name], list):
                arguments[name] = [SIZES[name]] * min(len(value), layers)
            else:
                arguments[name] = SIZES[name]
        elif isinstance(value, float) and any(part in name for part in NO_DROPOUT):
            arguments[name] = 0.0
        elif name.endswith("layer_types") and isinstance(value, list):
            arguments[name] = _kinds(value)
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"):
        if name in arguments:
            arguments[name] = layers
    return arguments | extra


def _number_of_layers(values: dict[str, Any]) -> int:
    kinds = values.get("layer_types")
    return len(_kinds(kinds)) if isinstance(kinds, list) else 2


def _kinds(layer_types: list[str]) -> list[str]:
    """One layer of each kind, in their order, and two at least."""
    kinds = list(dict.fromkeys(layer_types))
    return kinds if len(kinds) > 1 else kinds * 2


def tiny(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of random weights that are wide enough for the context to matter, in eval mode."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = t.AutoModelForCausalLM.from_config(config).float().eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > 3_000_000:
        raise CannotBuild(f"the rules leave {parameters:,} parameters")
    with torch.no_grad():
        model(input_ids=torch.arange(3, 12)[None], attention_mask=torch.ones(1, 9, dtype=torch.int64))
    return model
