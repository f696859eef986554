"""Every family of decoders of the installed transformers, tiny: found by enumeration, made small by rules.

The rules know what sizes are called. A family that they make nothing runnable of says so (``CannotBuild``).
"""

from __future__ import annotations

import copy
import warnings
from contextlib import suppress
from typing import Any

import torch
import transformers as t
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

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
TOWER: dict[str, Any] = {  # sizes of what sees and hears, which rows of text do not run
    "depth": 2, "layers": 2, "attention_heads": 4, "embed_dim": 32, "hidden_dim": 32, "dim_head": 8, "image_size": 32,
    "out_hidden_size": 32, "text_hidden_size": 32, "output_dim": 32, "projection_dim": 32, "output_channels": 32,
    "num_position_embeddings": 64, "num_embeddings": 64, "codebook_size": 64, "base_channels": 32, "num_filters": 4,
    "channel_multiplier": [1, 1], "num_res_blocks": 1, "mlp_ratio": 1, "mlp_dim": 48, "downsample_channels": [32, 32],
    "max_source_positions": 64, "downsample_hidden_size": 32, "num_pos_feats": 16, "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "projection_hidden_dim": 32, "projection_intermediate_size": 48, "encoder_hidden_size": 32,
    "audio_hidden_size": 32, "codebook_dim": 32, "adapter_input_size": 32, "context_size": 16,
    "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    "deepstack_visual_indexes": [0, 1], "fullatt_block_indexes": [1], "global_attn_indexes": [1],
    "img_max_token_num": 64, "max_vit_seq_len": 64, "max_image_size": 64, "max_img_size": 64, "min_image_size": 32,
    "posemb_grid_size": 4, "pos_emb_height": 4, "pos_emb_width": 4, "max_pos_emb": 32, "image_token_embed_dim": 32,
    "vision_feature_layer": [1, 0], "conv_dim": [32] * 7, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4, "num_patches": 16, "hidden_sizes": [32] * 4,
}  # fmt: skip
NO_DROPOUT = ("dropout", "drop", "layerdrop", "jitter")

# What the rules can't know: arguments for one family, by its model_type.
LATENT = {"head_dim": 4, "num_key_value_heads": 4, "qk_head_dim": 12}  # K/V of multi-head latent attention
MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
HALF_MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]},
}
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
    # What sees and hears, too.
    "apertus1p5": {
        "image_token_offset": 3, "audio_token_offset": 67, "image_token_id": 120, "audio_token_id": 121,
    },
    "chameleon": {"vocabulary_map": {"<image>": 120, "IMGIMGAZ": 121}},
    "cohere2_vision": {"alignment_intermediate_size": 48},
    "cosmos3_edge_text": MROPE,
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 24], "rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [1, 1, 2]},
    },
    "florence_vision": {
        "embed_dim": [32] * 4, "num_heads": [4] * 4, "num_groups": [4] * 4, "depths": [1] * 4, "projection_dim": 32,
    },
    "fast_vlm": {
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 32,
        },
    },
    "fun_asr_nano": {
        "adaptor_config": {
            "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 8, "num_hidden_layers": 2,
            "projector_hidden_size": 32,
        },
    },
    "glm5_next_text": {
        "num_key_value_heads": 4, "qk_rope_head_dim": 0, "qk_head_dim": 8, "head_dim": 0, "linear_head_dim": 8,
        "linear_num_heads": 4, "index_topk": WINDOW, "index_kpool": 8,
    },
    "granite4_vision": {
        "deepstack_layer_map": [], "spatial_target_layers": [0, 1], "downsample_rate": "4/8",
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 224, "patch_size": 32,
        },
    },
    "hunyuan_vl_text": MROPE | {"head_dim": 8},
    "kyutai_speech_to_text": {
        "codebook_vocab_size": 20, "num_codebooks": 4, "audio_bos_token_id": 19, "audio_pad_token_id": 120,
    },
    "emu3": {"vocabulary_map": {"<image>": 120}},
    "glm46v_text": MROPE,
    "glm4v_moe_text": HALF_MROPE | {"head_dim": 8},
    "glm4v_text": MROPE,
    "glm_ocr_text": MROPE,
    "hy_v4_vl_text": LATENT | HALF_MROPE | {"index_topk": WINDOW},
    "kosmos_2_5_text_model": {"embed_dim": 32, "layers": 2, "attention_heads": 4},
    "kosmos_2_text_model": {"embed_dim": 32, "layers": 2, "attention_heads": 4},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mistral4": LATENT | {
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": WINDOW,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mistral_large4_text": LATENT | {"index_topk": WINDOW},
    "muse_glimmer": {"out_hidden_size": 32, "projector_hidden_size": 32},
    "nemotron_h_omni": {"vision_hidden_size": 32, "projector_hidden_size": 32},
    "muse_spark": {"out_hidden_size": 32, "projector_hidden_size": 32},
    "muse_spark_audio": {"num_hidden_layers": 4, "depths": [1] * 4},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 130},
    "paddleocr_vl_text": MROPE,
    "pp_formulanet_vision": {
        "post_conv_in_channels": 32, "post_conv_out_channels": 32, "post_conv_mid_channels": 32,
        "decoder_hidden_size": 32,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 120},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},
    "qwen2_5_omni_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "perception_lm": {"vision_config": {"model_type": "timm_wrapper", "model_args": {"embed_dim": 32}}},
    "radio": {"video_temporal_patch_size": 2},
    "step3p5": {"sliding_window": WINDOW},
    "vibevoice_acoustic_tokenizer_encoder": {"downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
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
    return _of(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING)


def multimodal_families() -> dict[str, type[PreTrainedConfig]]:
    """Every configuration class that ``AutoModelForMultimodalLM`` knows: models that see or hear, and write text."""
    older = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return _of(getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING", older))


def _of(mapping) -> dict[str, type[PreTrainedConfig]]:
    found: dict[str, type[PreTrainedConfig]] = {}
    for config_class in mapping:
        found.setdefault(config_class.model_type, config_class)
    return dict(sorted(found.items()))


def tiny_config(config_class: type[PreTrainedConfig], **extra) -> PreTrainedConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config_class(**_small(config_class(), **_particular(config_class) | extra))


def _particular(config: PreTrainedConfig | type[PreTrainedConfig]) -> dict[str, Any]:
    return copy.deepcopy(PARTICULAR.get(config.model_type, {}))  # configurations change what they are given


_TEXT = ("text_config", "decoder", "generator", "thinker_config")


def _small(config: PreTrainedConfig, sizes: dict[str, Any] = SIZES, **extra) -> dict[str, Any]:
    """Arguments for a small configuration of the same class."""
    arguments: dict[str, Any] = {}
    values = dict(vars(config))
    layers = _number_of_layers(values)
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            inside = SIZES if name in _TEXT else SIZES | TOWER
            arguments[name] = type(value)(**_small(value, inside, **_particular(value))).to_dict()
        elif name in sizes and (value is not None or name == "pad_token_id"):
            if isinstance(value, list) and not isinstance(sizes[name], list):
                arguments[name] = [sizes[name]] * min(len(value), layers)
            elif isinstance(value, list | tuple) == isinstance(sizes[name], list):
                arguments[name] = type(value)(sizes[name]) if isinstance(value, float) else sizes[name]
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


def decoder(name: str) -> PreTrainedModel:
    """The tiny model of a family, or of a variant of it ("family, variant")."""
    family, _, variant = name.partition(", ")
    config_class = families()[family]
    config = tiny_config(config_class, **(variants(config_class)[variant] if variant else {}))
    model = _tiny(config, t.AutoModelForCausalLM)
    _run(model)
    return model


def multimodal(name: str) -> PreTrainedModel:
    """The tiny model of a family of `multimodal_families`, or of a variant of its text.

    It may be one that does not run on tokens alone.
    """
    family, _, variant = name.partition(", ")
    config_class = multimodal_families()[family]
    config = tiny_config(config_class)
    if variant:
        text = type(config.get_text_config(decoder=True))
        changed = _small(text(), **_particular(text) | variants(text)[variant])
        config = tiny_config(config_class, text_config=text(**changed).to_dict())
    model = _tiny(config, getattr(t, "AutoModelForMultimodalLM", t.AutoModelForImageTextToText))
    with suppress(AttributeError, NotImplementedError, TypeError, ValueError):  # it asks for more than tokens
        _run(model)  # other errors say that its sizes don't go together
    return model


def multimodal_variants(config_class: type[PreTrainedConfig]) -> dict[str, dict[str, Any]]:
    """Those of the text that such a model computes."""
    try:
        text = config_class().text_config
    except Exception:
        return {}
    if not isinstance(text, PreTrainedConfig):
        return {}
    kinds = ("windows", "router logits", "both directions")
    return {name: options for name, options in variants(type(text)).items() if name in kinds}


def _register_towers() -> None:
    """Stand in for the towers of timm, which rows of text do not run, where it is not installed."""
    for config_class in (t.TimmWrapperConfig, t.Gemma3nVisionConfig):
        kind = {"config_class": config_class, "__init__": lambda self, config: t.PreTrainedModel.__init__(self, config)}
        t.AutoModel.register(config_class, type("Tower", (PreTrainedModel,), kind), exist_ok=True)


if not t.utils.is_timm_available():
    _register_towers()


def _tiny(config: PreTrainedConfig, auto_class, seed: int = 0) -> PreTrainedModel:
    """A model of random weights that are wide enough for the context to matter, in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in auto_class.from_config(config).parameters())
        if parameters > 4_000_000:
            raise CannotBuild(f"the rules leave {parameters:,} parameters")
        torch.manual_seed(seed)
        return auto_class.from_config(config).float().eval()


def _run(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model(input_ids=torch.arange(3, 12)[None], attention_mask=torch.ones(1, 9, dtype=torch.int64))
