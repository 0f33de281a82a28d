"""Tiny random models of the causal architectures of transformers: all whose configurations can be made small enough.

`build(name, vocabulary, seed)` returns a model of 2 to 4 layers that mixes every kind of layer that the architecture
has. Windows, chunks and convolutions are a few tokens long, so that a prompt of a hundred tokens goes far beyond all of
them, while the context takes thousands. Weights are drawn so wide that every layer matters to the logits.

A name is transformers' `model_type`, with a variant after "+". `ODD` are models of our own which break an assumption
that masks and positions alone would let an engine make, each with weights and sizes by its seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaAttention

CONTEXT = 2048
WINDOW = 8
SPREAD = 0.12  # standard deviation of the weights
LARGEST = 30_000_000  # parameters: more than that is a setting that was forgotten
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}

Settings = Mapping[str, Any]

# What most architectures call their sizes. Of these an architecture gets those that its configuration has.
SIZES: Settings = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "sliding_window": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
}


def _alternating(local: str, other: str = "full_attention", **more: Any) -> Settings:
    return {"layer_types": [local, other] * 2, **more}


def _one_each(local: str, **more: Any) -> Settings:
    return {"layer_types": [local, "full_attention"], "num_hidden_layers": 2, **more}


_SLIDING = _alternating("sliding_attention")
_ROTARY: Settings = {"rope_type": "default", "rope_theta": 10000.0}
_LATENT: Settings = {  # keys and values behind a bottleneck, as DeepSeek has them
    "head_dim": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
# Keys chosen by their scores. These sum over heads what is above 0: with few heads many scores would be 0, and how ties
# fall depends on columns.
_CHOSEN: Settings = {**_LATENT, "index_topk": 2 * WINDOW, "index_head_dim": 16, "index_n_heads": 16}
_DELTA: Settings = {  # linear attention by the delta rule
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_DELTA_MIX = _one_each("linear_attention", **_DELTA)
_MAMBA: Settings = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 2 * WINDOW,
}
_TWO_LAYERS: Settings = {"num_hidden_layers": 2}
_PER_LAYER: Settings = {"vocab_size_per_layer_input": None, "hidden_size_per_layer_input": 16}  # None: the vocabulary
_DECODER: Settings = {  # the decoder of an encoder-decoder, or an encoder used as a decoder
    "is_decoder": True,
    "d_model": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "embedding_size": 64,
    "max_target_positions": CONTEXT,
}

_INKLING = _alternating(
    "hybrid_sliding", "hybrid", swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16
)

# name -> settings beyond `SIZES`, for which an architecture has its own names or which it mixes layers by.
TABLE: dict[str, Settings] = {
    # Causal attention over everything, positions learned or sinusoidal
    "gpt2": _TWO_LAYERS,
    "gpt-sw3": _TWO_LAYERS,
    "gpt_bigcode": _TWO_LAYERS,
    "openai-gpt": _TWO_LAYERS,
    "ctrl": {"dff": 96, **_TWO_LAYERS},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "xglm": {"ffn_dim": 96, **_TWO_LAYERS},
    "biogpt": {},
    # ... positions by rotation
    "gptj": {"rotary_dim": 8, **_TWO_LAYERS},
    "codegen": {"rotary_dim": 8, **_TWO_LAYERS},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "falcon": {"num_kv_heads": 1},
    "phi": {},
    "stablelm": {},
    "persimmon": {},
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "olmo": {},
    "olmo2": {},
    "gemma": {},
    "cohere": {},
    "glm": {},
    "glm4": {},
    "granite": {},
    "helium": {},
    "nemotron": {},
    "seed_oss": {},
    "nanochat": {},
    "arcee": {},
    "apertus": {},
    "bitnet": {},
    "diffllama": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "hyperclovax": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "hrm_text": _TWO_LAYERS,
    "smollm3": {},
    # ... positions by distance
    "bloom": _TWO_LAYERS,
    "falcon+alibi": {"alibi": True, "num_kv_heads": 1},
    "falcon+alibi+grouped": {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"max_seq_len": CONTEXT, **_TWO_LAYERS},
    # ... experts
    "aria_text": {"moe_num_experts": 4},
    "olmoe": {},
    "flex_olmo": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "jetmoe": {},
    "ernie4_5_moe": {},
    "hunyuan_v1_moe": {},
    "glm4_moe": {},
    "glm4_moe_lite": _LATENT,
    "minimax_m2": {},
    "solar_open": {},
    "dots1": {},
    "hy_v3": {},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "axk1": _LATENT,
    "longcat_flash": {
        **_LATENT,
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 1,
        "moe_topk": 2,
    },
    # A window or chunks of attention, in some layers or in all
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "mistral": {},
    "mixtral": {},
    "ministral": _SLIDING,
    "ministral3": {},
    "phi3": {},
    "phimoe": {},
    "qwen2+window": {"use_sliding_window": True, "max_window_layers": 2},
    "starcoder2": {},
    "gemma2": {},
    "gemma3_text": _SLIDING,
    "gemma3n_text": {
        **_SLIDING,
        **_PER_LAYER,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [96] * 4,
    },
    "gemma3n_text+shared": {
        **_SLIDING,
        **_PER_LAYER,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 2,
        "intermediate_size": [96] * 4,
    },
    "gemma4_text": {**_SLIDING, **_PER_LAYER, "num_kv_shared_layers": 0, "global_head_dim": 16},
    "gemma4_unified_text": {**_SLIDING, "global_head_dim": 16},
    "vaultgemma": {},
    "gpt_oss": {},
    "olmo3": _SLIDING,
    "cohere2": _SLIDING,
    "cohere2_moe": {},
    "cohere_compass_text": {**_SLIDING, "rope_parameters": {"sliding_attention": _ROTARY, "full_attention": _ROTARY}},
    "exaone4": {**_SLIDING, "sliding_window_pattern": 2},
    "exaone_moe": {},
    "afmoe": {},
    "beam": {},
    "cwm": {},
    "doge": {"keep_window_size": 2 * WINDOW},
    "flint": {},
    "granite_swa": {},
    "granitemoe_swa": {},
    "kolibri1": _SLIDING,
    "mimo_v2_flash": {},
    "laguna": {},
    "laguna+window": _SLIDING,
    "mellum": {},
    "mellum+window": _SLIDING,
    "dots1+window": _SLIDING,
    "smollm3+window": {**_SLIDING, "use_sliding_window": True},
    "modernbert-decoder": {"local_attention": 2 * WINDOW},
    "llama4_text": {
        "attention_chunk_size": WINDOW,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    # Keys chosen by a score
    "axk2": _CHOSEN,
    "deepseek_v32": _CHOSEN,
    "deepseek_v4": {
        **_CHOSEN,
        **_alternating("heavily_compressed_attention", "compressed_sparse_attention"),
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": WINDOW},
        "o_lora_rank": 16,
    },
    "glm_moe_dsa": _CHOSEN,
    "hy_v4": _CHOSEN,
    "dots3_note_text": {
        **_CHOSEN,
        "shared_experts_intermediate_size": 32,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "per_layer_config": {i: {**_LATENT, "num_attention_heads": 4, "head_dim": 24} for i in (1, 3)},
    },
    "minimax_m3_vl_text": {
        **_alternating("minimax_m3_sparse"),
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 32,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 4,
    },
    # Attention mixed with convolutions and recurrences
    "inkling_text": _INKLING,
    "inkling2_text": _INKLING,
    "lfm2": _one_each("conv", block_multiple_of=16, conv_L_cache=3),
    "lfm2_moe": _one_each("conv", num_dense_layers=1),
    "lfm3": {},
    "zaya+window": {**_alternating("hybrid_sliding", "hybrid"), "num_experts_per_tok": 1, "router_hidden_size": 16},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "qwen3_next": _DELTA_MIX,
    "qwen3_5_text": _DELTA_MIX,
    "qwen3_5_moe_text": _DELTA_MIX,
    "olmo_hybrid": _DELTA_MIX,
    "kimi_linear": {**_LATENT, **_one_each("linear_attention", linear_head_dim=16, linear_num_heads=4)},
    "bailing_hybrid": {**_LATENT, **_one_each("linear_attention", linear_head_dim=16, linear_num_heads=4)},
    "minimax": _one_each("linear_attention", block_size=2 * WINDOW),
    "jamba": {
        "num_hidden_layers": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1], "num_hidden_layers": 2},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["mamba", "attention"],
        "num_hidden_layers": 2,
        "shared_intermediate_size": 32,
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128, **_TWO_LAYERS},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "chunk_size": 2 * WINDOW,
    },
    "zamba": {
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "n_mamba_heads": 2,
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_hidden_layers": 2,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "num_hidden_layers": 2,
        "mamba_d_state": 16,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "chunk_size": 2 * WINDOW,
        "num_mem_blocks": 1,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "adapter_rank": 8,
        "use_shared_attention_adapter": False,
        "use_mamba_kernels": False,
        "num_logits_to_keep": 0,
    },
    "recurrent_gemma": {
        "block_types": ("recurrent", "attention"),
        "num_hidden_layers": 2,
        "lru_width": 64,
        "attention_window_size": WINDOW,
        "num_key_value_heads": 1,
    },
    # No attention
    "mamba": _TWO_LAYERS,
    "falcon_mamba": _TWO_LAYERS,
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16, "chunk_size": 16, **_TWO_LAYERS},
    "rwkv": {"attention_hidden_size": 64, "context_length": CONTEXT, **_TWO_LAYERS},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "num_hidden_layers": 2, "chunk_size": 16},
    # Decoders of models that have an encoder too, and encoders with a causal mask
    **{
        f"{name}+decoder": _DECODER
        for name in (
            "bart",
            "bert",
            "bert-generation",
            "blenderbot",
            "blenderbot-small",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "marian",
            "mbart",
            "megatron-bert",
            "mvp",
            "pegasus",
            "plbart",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roformer",
            "trocr",
            "whisper",
            "xlm-roberta",
            "xlm-roberta-xl",
        )
    },
    "xmod+decoder": {**_DECODER, "default_language": "en_XX"},
    # Both ways: no language models, whatever class loads them
    "bert": {},
    "ernie": {},
    "xmod": {"default_language": "en_XX"},
    "xlm": {"emb_dim": 64, "n_layers": 2, "n_heads": 4},
}
NAMES = tuple(TABLE)
BOTH_WAYS = ("bert", "ernie", "xmod", "xlm")
FAST = (
    *("gpt2", "openai-gpt", "opt", "gpt_neox", "llama", "qwen3", "phi3", "mixtral", "deepseek_v3"),
    *("bloom", "falcon+alibi", "mpt", "gpt_neo", "mistral", "qwen2+window", "starcoder2", "llama4_text", "gpt_oss"),
    *("gemma2", "gemma3_text", "gemma3n_text", "cohere2", "olmo3"),
    *("qwen3_next", "mamba", "mamba2", "jamba", "bamba", "lfm2", "rwkv", "zamba2", "recurrent_gemma", "xlstm"),
    *("minimax", "nemotron_h", "ernie"),
)


def configuration(name: str, vocabulary: int) -> Any:
    """Return the tiny configuration of an architecture."""
    made = CONFIG_MAPPING[name.partition("+")[0]]
    own = {k: vocabulary if v is None else v for k, v in TABLE[name].items()}
    aliases = made.attribute_map
    known = {f.name for f in fields(made)} | set(aliases)
    given = {k: v for k, v in SIZES.items() if k in known and k not in own and aliases.get(k) not in own}
    own = {k: v for k, v in own.items() if k in known or k not in _DECODER}
    return made(vocab_size=vocabulary, **ENDS, **given, **own)


@torch.no_grad()
def widen(model: Any, seed: int) -> Any:
    """Draw all weights anew, so wide that all of them matter; return the model, ready to answer."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=SPREAD)
        else:  # a norm's weights stay about 1 and biases about 0
            parameter.add_(SPREAD * torch.randn_like(parameter))
    return model.eval()


def build(name: str, vocabulary: int, seed: int = 0) -> Any:
    """Return a tiny random model of an architecture, in float32 on the CPU."""
    config = configuration(name, vocabulary)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{name} has {size:,} parameters: some of its sizes have another name")
    torch.manual_seed(seed)
    return widen(AutoModelForCausalLM.from_config(config), seed)


class Mixing(nn.Module):
    """A norm, and then a causal convolution over neighbouring tokens, added to what the norm gives."""

    def __init__(self, norm: nn.Module, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = norm
        self.conv = nn.Conv1d(width, width, kernel, groups=width, padding=kernel - 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Canon(LlamaForCausalLM):
    """A Llama that mixes each token with those just before it, ahead of attention and of the MLP; it keeps no state."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for block in self.model.layers:
            block.input_layernorm = Mixing(block.input_layernorm, config.hidden_size, config.odd)
            block.post_attention_layernorm = Mixing(block.post_attention_layernorm, config.hidden_size, config.odd)


class NearColumns(LlamaAttention):
    """Attention to the last columns alone, whatever the mask says."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **more: Any) -> Any:
        cache = more.get("past_key_values")
        first = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        columns = torch.arange(first + hidden_states.shape[1], device=hidden_states.device)
        distance = columns[first:, None] - columns
        seen = (distance < self.config.odd)[None, None]
        if attention_mask is None:
            attention_mask = seen & (distance >= 0)
        elif attention_mask.dtype == torch.bool:
            attention_mask = attention_mask & seen
        else:
            attention_mask = attention_mask.masked_fill(~seen, torch.finfo(attention_mask.dtype).min)
        return super().forward(hidden_states, position_embeddings, attention_mask, **more)


class HiddenWindow(LlamaForCausalLM):
    """A Llama with a window of columns of which neither its configuration nor its masks know."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for number, block in enumerate(self.model.layers):
            block.self_attn = NearColumns(config, number)


class Columns(LlamaForCausalLM):
    """A Llama that takes columns for positions, whatever positions it is given."""

    def forward(self, input_ids: Tensor, position_ids: Any = None, past_key_values: Any = None, **more: Any) -> Any:
        first = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = first + torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return super().forward(input_ids, position_ids=position_ids, past_key_values=past_key_values, **more)


ODD = {"canon": Canon, "hidden window": HiddenWindow, "columns": Columns}


def build_odd(name: str, vocabulary: int, seed: int) -> Any:
    """Return an odd model; the seed draws its weights, its sizes, and how far it mixes or sees."""
    rng = random.Random(f"{name} {seed}")
    heads = rng.choice([2, 4])
    config = LlamaConfig(
        vocab_size=vocabulary,
        **ENDS,
        hidden_size=heads * rng.choice([8, 16, 24]),
        intermediate_size=rng.choice([48, 96]),
        num_hidden_layers=rng.randint(1, 4),
        num_attention_heads=heads,
        num_key_value_heads=rng.choice([1, heads]),
        max_position_embeddings=CONTEXT,
        odd=rng.randint(2, 6) if name == "canon" else round(4 * 2 ** rng.uniform(0, 6)),  # 4 to 256 columns
    )
    torch.manual_seed(seed)
    return widen(ODD[name](config), seed)
