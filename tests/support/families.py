"""Makes tiny models with random weights of many families of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
    # Dropout would make training differ from the reference.
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "hidden_dropout": 0.0,
    "embed_dropout": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
    "residual_dropout": 0.0, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0,
    "dropout_p": 0.0, "classifier_dropout": 0.0,
}  # fmt: skip
"""Sizes that most families share. A family's own value of None removes the key."""

EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "n_shared_experts": 1,
    "decoder_sparse_step": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 6, "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
SCAN: dict[str, Any] = {
    "state_size": 4, "ssm_state_size": 4, "mamba_d_state": 4, "mamba_n_heads": 4,
    "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_conv": 4, "mamba_n_groups": 1,
    "mamba_chunk_size": 8, "chunk_size": 8,
}  # fmt: skip
OLD: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48}
WINDOW: dict[str, Any] = {"sliding_window": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    # transformers' name of the family, perhaps with a variant, and its own sizes
    "afmoe": EXPERTS | WINDOW | {"num_dense_layers": 1},
    "apertus": {},
    "arcee": {},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "bailing_hybrid": EXPERTS | LATENT,
    "bamba": SCAN | {"attn_layer_indices": [1]},
    "beam": {},
    "bert": {"is_decoder": False},
    "bert (decoder)": {"is_decoder": True},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": OLD | {"rotary_dim": 4},
    "cohere": {"logit_scale": 0.25},
    "cohere2": WINDOW | {"logit_scale": 0.25},
    "cohere2_moe": EXPERTS | WINDOW,
    "cpmant": {"dim_head": 8, "dim_ff": 48, "prompt_length": 4},
    "ctrl": {"dff": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "cwm": WINDOW,
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": EXPERTS | LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": EXPERTS | LATENT,
    "deepseek_v32": EXPERTS | LATENT | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 64},
    "deepseek_v4": EXPERTS | LATENT,
    "diffllama": {},
    "doge": {},
    "dory": {},
    "dots1": EXPERTS | WINDOW,
    "ernie4_5": {},
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4, "moe_k": 2},
    "exaone4": WINDOW | {"sliding_window_pattern": 2},
    "exaone_moe": EXPERTS | WINDOW,
    "falcon (multi-query)": {"head_dim": None, "ffn_hidden_size": 48},
    "falcon (ALiBi)": {"head_dim": None, "ffn_hidden_size": 48, "alibi": True},
    "falcon (new)": {
        "head_dim": None, "ffn_hidden_size": 48, "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "falcon_h1": SCAN | {"mamba_d_ssm": 64},
    "falcon_mamba": SCAN,
    "flex_olmo": EXPERTS,
    "flint": {},
    "gemma": {},
    "gemma2": WINDOW | {
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0, "query_pre_attn_scalar": 8,
    },
    "gemma3_text": WINDOW | {"query_pre_attn_scalar": 8},
    "gemma3n_text": WINDOW | {
        "num_hidden_layers": 4, "vocab_size_per_layer_input": 259, "hidden_size_per_layer_input": 8,
        "laurel_rank": 8, "num_kv_shared_layers": 2, "altup_num_inputs": 2,
        "activation_sparsity_pattern": None,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text": WINDOW | {
        "num_hidden_layers": 4, "vocab_size_per_layer_input": 259, "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_unified_text": WINDOW,
    "glm": {},
    "glm4": {},
    "glm4_moe": EXPERTS,
    "glm4_moe_lite": EXPERTS | LATENT,
    "gpt2": OLD,
    "gpt_bigcode": OLD,
    "gpt_neo": {
        "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_neox_japanese": {"rotary_pct": 0.5},
    "gpt_oss": EXPERTS | WINDOW,
    "gptj": OLD | {"rotary_dim": 4},
    "granite": {
        "logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5,
        "embedding_multiplier": 4.0,
    },
    "granite_swa": WINDOW,
    "granitemoe": EXPERTS,
    "granitemoe_swa": EXPERTS | WINDOW,
    "granitemoehybrid": EXPERTS | SCAN | {
        "shared_intermediate_size": 40, "layer_types": ["mamba", "attention"],
    },
    "granitemoeshared": EXPERTS | {"shared_intermediate_size": 40},
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": EXPERTS | {"moe_topk": 2},
    "hyperclovax": {},
    "jais2": {},
    "jamba": EXPERTS | SCAN | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_dt_rank": 4,
    },
    "jetmoe": EXPERTS | {"kv_channels": 8},
    "kimi_linear": EXPERTS | LATENT | {
        "linear_head_dim": 8, "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "laguna": EXPERTS | WINDOW,
    "lara_mini": EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "llama4_text": EXPERTS | {
        "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": 8,
    },
    "llama4_text (no chunks)": EXPERTS | {
        "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": None,
        "no_rope_layers": [1, 0], "floor_scale": 40, "attn_scale": 0.5,
    },
    "longcat_flash": EXPERTS | LATENT | {
        "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "zero_expert_num": 1,
        "moe_topk": 2,
    },
    "mamba": SCAN,
    "mamba2": SCAN | {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "mellum": EXPERTS | WINDOW,
    "mimo_v2_flash": EXPERTS | WINDOW,
    "minicpm3": LATENT | {"v_head_dim": 8},
    "minimax": EXPERTS | {"block_size": 16, "layer_types": ["linear_attention", "full_attention"]},
    "minimax_m2": EXPERTS,
    "ministral": WINDOW,
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16,
            "rope_theta": 10000.0, "llama_4_scaling_beta": 0.9, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
    "mistral": WINDOW,
    "mixtral": EXPERTS,
    "modernbert-decoder": {"local_attention": 8},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": EXPERTS | SCAN | {
        "hybrid_override_pattern": "M*-", "num_hidden_layers": 3, "mamba_num_heads": 4,
        "mamba_head_dim": 16, "n_groups": 1,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmo_hybrid": LINEAR,
    "olmoe": EXPERTS,
    "openai-gpt": OLD,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": EXPERTS | WINDOW,
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": {},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": EXPERTS | LINEAR,
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | LINEAR,
    "recurrent_gemma": {
        "attention_window_size": 8, "lru_width": 32, "block_types": ["recurrent", "attention"],
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "sarvam_moe": EXPERTS,
    "seed_oss": {},
    "smollm3": {},
    "solar_open": EXPERTS,
    "stablelm": {},
    "starcoder2": WINDOW,
    "vaultgemma": WINDOW | {"query_pre_attn_scalar": 8},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "xlstm": {"num_heads": 4, "chunk_size": 8},
    "youtu": LATENT,
    "zamba2": SCAN | {
        "num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"], "mamba_headdim": 16,
        "mamba_ngroups": 1, "n_mamba_heads": 4, "num_mem_blocks": 1,
    },
    "zaya": EXPERTS | {"num_experts_per_tok": 1},
}  # fmt: skip


ROWS = [[*range(3 + i, 3 + i + 7 * size, 7)] for i, size in enumerate((23, 9, 14))]
"""Token ids of rows; all differ."""

NEW = 6
"""The tokens to sample."""

NOISE = [key for key in COMMON if "drop" in key or "jitter" in key]
"""The settings of random noise in training."""


def make_family(name: str, directory: Path, **others: Any) -> Path:
    """Writes a model of a family, perhaps with other sizes, into a directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kept = {"attention_chunk_size"}  # for which None means something
    wanted = (COMMON | FAMILIES[name] | others).items()
    sizes = {key: value for key, value in wanted if value is not None or key in kept}
    config = AutoConfig.for_model(name.partition(" ")[0], **sizes)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            elif "bias" in parameter_name or "sink" in parameter_name:
                parameter.normal_(std=0.3)
    model.save_pretrained(directory)
    return directory
