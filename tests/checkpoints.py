"""Small random models of many architectures, saved to folders whole, and ways to break them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 160
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OLD: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MOE: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16, "head_dim": 4, "num_key_value_heads": 4,
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
# What a config needs beside the shape; the first word is the model type.
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": _OLD,
    "gpt2 untied": {**_OLD, "tie_word_embeddings": False},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {**_OLD, "rotary_dim": 4},
    "gpt_neox": {},
    "gpt_bigcode": _OLD,
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"num_key_value_heads": None},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi": {},
    "phi3": {},
    "gemma2": {},
    "gemma3_text": {},
    "olmo2": {},
    "cohere": {},
    "stablelm": {},
    "starcoder2": {},
    "granite": {},
    "mixtral": _MOE,
    "olmoe": _MOE,
    "qwen3_moe": _MOE,
    "gpt_oss": _MOE,
    "deepseek_v3": _LATENT,
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "qwen3_next": _MOE | _LINEAR,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_MAMBA, **_MOE, "layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"],
        "shared_intermediate_size": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "conv_L_cache": 3},
}  # fmt: skip


def build(kind: str, seed: int = 0) -> Any:
    """Return a random model of one of `KINDS`."""
    model_type, more = kind.split()[0], KINDS[kind]
    default = AutoConfig.for_model(model_type)
    known = set(default.to_dict()) | set(default.attribute_map)
    given = {k: v for k, v in ({k: v for k, v in _SHAPE.items() if k in known} | more).items() if v is not None}
    if model_type in ("gpt2", "gptj", "gpt_bigcode"):  # each name twice is once too often
        given = {k: v for k, v in given.items() if k not in default.attribute_map}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **given)).eval()


def words(many: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes without pad, BOS or EOS."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: many - 1]
    tokenizer = Tokenizer(models.BPE({x: i for i, x in enumerate(["<unk>", *letters])}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save(kind: str, folder: Path) -> Path:
    """Write a whole checkpoint, and return its folder."""
    build(kind).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


Tensors = dict[str, torch.Tensor]


def edit_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Write the weights of a checkpoint again, changed."""
    path = folder / "model.safetensors"
    changed = {k: v.clone().contiguous() for k, v in change(load_file(path)).items()}
    save_file(changed, path, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a checkpoint's `config.json`; None takes one out."""
    path = folder / "config.json"
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
