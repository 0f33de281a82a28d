"""Sites found by structure: each is what the model computes with, by a road of its own, and nothing wrong is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nextstate.agents.language import LanguageModel
from nextstate.agents.sites import SITES, ModuleMap, SiteError, Sites
from tests.conftest import ARCHITECTURES, build

MORE = ("opt", "opt-350m", "qwen2", "qwen3", "mistral")
LLAMA = ModuleMap(blocks="model.layers", attention="self_attn", projection="o_proj", mlp="mlp")
GEMMA2 = replace(LLAMA, attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")

SHAPE = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 8, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
MLA = {
    "head_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 12, "num_key_value_heads": 4,
}  # fmt: skip
BUILT: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_bigcode": GPT,
    "ctrl": GPT | {"dff": 48},
    "openai-gpt": GPT,
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
    "falcon-alibi": {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "phi": {},
    "phi3": {},
    "mixtral": {},
    "qwen3_moe": {},
    "gemma": {},
    "gemma3_text": ALTERNATE,
    "gpt_oss": ALTERNATE,
    "llama4_text": {
        "intermediate_size_mlp": 32, "num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 8,
    },
    "cohere": {},
    "cohere2": ALTERNATE,
    "olmo2": {},
    "glm4": {},
    "starcoder2": {},
    "stablelm": {},
    "granite": {"residual_multiplier": 0.22},
    "deepseek_v3": MLA | {"first_k_dense_replace": 1},
    "minicpm3": MLA,
    "diffllama": {},
    "gemma4_text": ALTERNATE | {
        "vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
        "global_head_dim": 8,
    },
    "qwen3_next": LINEAR,
    "olmo_hybrid": LINEAR,
    "jamba": {
        "mamba_d_state": 8, "mamba_dt_rank": 8, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "zamba2": {
        "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 8,
        "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "attention_head_dim": 16,
        "num_key_value_heads": 4, "adapter_rank": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "conv_L_cache": 3},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "recurrent_gemma": {
        "lru_width": 32, "attention_window_size": 8, "block_types": ("recurrent", "attention"),
        "num_key_value_heads": 1,
    },
}  # fmt: skip
ALONE = {
    "gpt_neo",
    "gptj",
    "gpt_bigcode",
    "ctrl",
    "openai-gpt",
    "bloom",
    "mpt",
    "mamba2",
    "rwkv",
}  # none of SHAPE's keys
ALL = (*ARCHITECTURES, *MORE, *BUILT)

# What differs from: attention with 4 heads of 8 in all layers, all sites, block = resid_pre + attn_out + mlp_out.
NO_HEADS = {"bloom", "diffllama", "mamba2", "rwkv"}
SECOND_ONLY = {
    "qwen3_next": "linear_attention", "olmo_hybrid": "linear_attention", "jamba": "mamba", "bamba": "mamba",
    "zamba2": "mamba", "lfm2": "conv", "recurrent_gemma": "recurrent",
}  # fmt: skip
WIDTHS = {"qwen3": 16, "deepseek_v3": 12, "minicpm3": 12, "zamba2": 16}
MULTIPLIERS = {"granite": 0.22, "minicpm3": 1.4 / 2**0.5}
NO_SUM = {"opt-350m", "openai-gpt", "falcon_h1", "gemma4_text", "rwkv"}
NO_ATTN_OUT, NO_MLP_OUT = {"falcon_h1"}, {"mamba2", "zamba2"}


def make(architecture: str) -> Any:
    """Return a model of two layers with four heads, width 32, and 60 tokens."""
    if architecture in ARCHITECTURES:
        return build(architecture, 60).eval()
    torch.manual_seed(0)
    shape = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {"intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.3, "num_key_value_heads": 2}
    if architecture.startswith("opt"):
        late = architecture == "opt-350m"  # which normalises after adding, and embeds into fewer numbers
        more = {"do_layer_norm_before": not late, "word_embed_proj_dim": 16 if late else 32}
        return OPTForCausalLM(OPTConfig(**shape, **more, ffn_dim=64, max_position_embeddings=64, init_std=0.3)).eval()
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape, **wide)).eval()
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, **wide, head_dim=16)).eval()
    if architecture == "mistral":
        return MistralForCausalLM(MistralConfig(**shape, **wide, sliding_window=None)).eval()
    kind = architecture.split("-alibi")[0]
    base, own = AutoConfig.for_model(kind), BUILT[architecture]
    always = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    known = {"vocab_size"} | set(base.to_dict()) | set(base.attribute_map)
    known -= set() if architecture not in ALONE else always - {"vocab_size", "hidden_size"}
    known -= {"attention_chunk_size"} | ({"hidden_size"} if own.keys() & {"n_embd", "d_model"} else set())
    settings = {k: v for k, v in SHAPE.items() if k in known or (architecture not in ALONE and k in always)} | own
    if architecture in ("mamba2", "rwkv"):
        settings |= {"num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module", params=ALL)
def named(request: pytest.FixtureRequest) -> tuple[str, Any, Sites]:
    model = make(request.param)
    return request.param, model, Sites.of(model)


TOKENS = torch.arange(10, 24).view(2, 7)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits  # type: ignore[no-any-return]


def test_what_is_found(named: tuple[str, Any, Sites]) -> None:
    name, _, sites = named
    assert (sites.layers, sites.hidden) == (2, 32)
    heads = () if name in NO_HEADS else (1,) if name in SECOND_ONLY else (0, 1)
    assert sites.layers_with("head") == heads
    assert sites.layers_with("resid_pre") == (0, 1)
    assert sites.layers_with("attn_out") == (() if name in NO_ATTN_OUT else (0, 1))
    assert sites.layers_with("mlp_out") == (() if name in NO_MLP_OUT else (0, 1))
    for layer, own in enumerate(sites.per_layer):
        assert (own.heads, own.head_dim) == ((4, WIDTHS.get(name, 8)) if layer in heads else (0, 0))
        assert own.multiplier == pytest.approx(MULTIPLIERS.get(name, 1.0))
        assert own.adds == (name not in NO_SUM or (name, layer) == ("rwkv", 1))
        assert own.block is sites.blocks[layer]
    kinds = {"mamba2": ["mamba"] * 2, "rwkv": ["recurrent"] * 2, "falcon_h1": ["hybrid"] * 2}
    second = "hybrid" if name == "zamba2" else "attention"
    expected = kinds.get(name, [SECOND_ONLY.get(name, "attention"), second])
    assert [own.kind for own in sites.per_layer] == expected


def test_nothing_is_left_behind(named: tuple[str, Any, Sites]) -> None:
    _, model, sites = named
    plain = logits(model)
    for site in SITES:
        for layer in sites.layers_with(site):
            with sites.hook(site, layer, lambda x: x * 0):
                pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(model), plain)


def test_shapes_and_what_a_hook_returns(named: tuple[str, Any, Sites]) -> None:
    """Writing what was there changes nothing; zeros at one token change what comes after it, and no other row."""
    _, model, sites = named
    plain = logits(model)

    def zeros(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[1, 4] = 0
        return x

    for site in SITES:
        for layer in sites.layers_with(site):
            seen: list[torch.Tensor] = []
            with sites.hook(site, layer, seen.append):  # type: ignore[arg-type]
                logits(model)
            (x,) = seen
            assert x.shape == (2, 7, *sites.shape(site, layer))
            with sites.hook(site, layer, lambda x: x.clone()):
                assert torch.equal(logits(model), plain)
            with sites.hook(site, layer, zeros):
                changed = logits(model)
            assert torch.allclose(changed[0], plain[0], atol=1e-5)
            assert torch.allclose(changed[1, :4], plain[1, :4], atol=1e-5)
            assert (changed[1, 4:] - plain[1, 4:]).abs().amax(-1)[0] > 1e-6


@torch.no_grad()
def test_a_head_is_what_its_own_columns_of_the_projection_read(named: tuple[str, Any, Sites]) -> None:
    """A head zeroed by the hook is the same as its columns of the projection's weights zeroed by hand."""
    _, model, sites = named
    plain = logits(model)
    for layer in sites.layers_with("head"):
        own = sites.per_layer[layer]
        for head in (0, own.heads - 1):
            where = slice(head * own.head_dim, (head + 1) * own.head_dim)

            def zeros(x: torch.Tensor, head: int = head) -> torch.Tensor:
                x = x.clone()
                x[:, :, head] = 0
                return x

            with sites.hook("head", layer, zeros):
                hooked = logits(model)
            assert own.projection is not None
            weight: Any = own.projection.weight
            saved = weight.clone()
            (weight[where] if hasattr(own.projection, "nx") else weight[:, where]).zero_()
            by_hand = logits(model)
            weight.copy_(saved)
            assert torch.allclose(hooked, by_hand, atol=1e-5)
            assert (hooked - plain).abs().max() > 1e-4


@torch.no_grad()
def test_the_stream_is_what_the_model_says_its_hidden_states_are(named: tuple[str, Any, Sites]) -> None:
    name, model, sites = named
    states = model(TOKENS, use_cache=False, output_hidden_states=True).hidden_states
    if name in ("rwkv", "mamba2"):  # their states are those that leave the blocks
        states = (model.get_input_embeddings()(TOKENS) if name == "mamba2" else None, *states)
    for layer in range(2):
        if states[layer] is None:
            continue
        seen: list[torch.Tensor] = []
        with sites.hook("resid_pre", layer, seen.append):  # type: ignore[arg-type]
            logits(model)
        assert torch.equal(seen[0][:, :, 0], states[layer])


@torch.no_grad()
def test_a_block_adds_its_terms(named: tuple[str, Any, Sites]) -> None:
    """The block's output is the sum of its sites, also when other numbers have been written there."""
    _, model, sites = named
    for layer, own in enumerate(sites.per_layer):
        if not own.adds:
            continue
        for patched in ("resid_pre", "attn_out", "mlp_out"):
            if layer not in sites.layers_with(patched):  # type: ignore[arg-type]
                continue
            terms: dict[str, torch.Tensor] = {}
            out: list[Any] = []
            hook = own.block.register_forward_hook(lambda _, __, y, out=out: out.append(y))
            edits = []
            for site in ("resid_pre", "attn_out", "mlp_out"):
                if layer in sites.layers_with(site):  # type: ignore[arg-type]

                    def edit(
                        x: torch.Tensor, site: str = site, patched: str = patched, terms: dict[str, Any] = terms
                    ) -> torch.Tensor | None:
                        new = x * 0.5 + 1 if site == patched else None
                        terms[site] = (x if new is None else new)[:, :, 0].clone()
                        return new

                    edits.append(sites.hook(site, layer, edit))  # type: ignore[arg-type]
            logits(model)
            for closing in (hook.remove, *(e.close for e in edits)):
                closing()
            assert isinstance(out[0], tuple) == own.returns_tuple
            total = terms.pop("resid_pre") + own.multiplier * sum(terms.values())
            assert torch.allclose(total, out[0][0] if own.returns_tuple else out[0], atol=1e-4)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE])
def test_a_head_is_what_its_own_value_weights_give(architecture: str) -> None:
    """Zeroing the value weights of the last head's group silences the heads of this group and no other."""
    model: Any = make(architecture)
    sites = Sites.of(model)
    attention: Any = sites.per_layer[0].attention
    group = sites.heads // (getattr(model.config, "num_key_value_heads", None) or sites.heads)
    seen: list[torch.Tensor] = []
    value = next(getattr(attention, n) for n in ("c_attn", "query_key_value", "v_proj") if hasattr(attention, n))
    with torch.no_grad():
        weight = value.weight.T if hasattr(value, "nx") else value.weight  # [out, in]
        weight[-sites.head_dim :] = 0
        if value.bias is not None:
            value.bias[-sites.head_dim :] = 0
        with sites.hook("head", 0, seen.append):  # type: ignore[arg-type]
            model(torch.arange(7)[None])
    silent = seen[0][0].abs().amax((0, 2)) < 1e-9
    assert silent.tolist() == [False] * (sites.heads - group) + [True] * group


def test_the_built_in_model_and_any_agent_have_sites(folders: dict[str, Path]) -> None:
    agent = LanguageModel("nextstate/tiny", device="cpu")
    assert agent.sites is agent.sites
    assert agent.sites.heads == agent.model.config.num_attention_heads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "falcon", "qwen3_next", "granite", "opt-350m"])
def test_other_dtypes_give_the_same_sites(architecture: str, dtype: torch.dtype) -> None:
    model = make(architecture)
    plain = Sites.of(model)
    assert Sites.of(model.to(dtype)).per_layer == plain.per_layer


def test_eager_attention_and_training_give_the_same_sites() -> None:
    model = make("phi3")
    plain = Sites.of(model)
    model.set_attn_implementation("eager")
    model.train()
    assert Sites.of(model).per_layer == plain.per_layer
    assert all(m.training for m in model.modules())


def test_names_given_by_hand() -> None:
    for architecture, names in (("llama", LLAMA), ("gemma2", GEMMA2)):
        model = make(architecture)
        found = Sites.of(model, names)
        assert found.per_layer == Sites.of(model).per_layer
        assert found.names == names
    bare = Sites.of(make("llama"), replace(LLAMA, mlp="", adds=False))
    assert bare.layers_with("mlp_out") == ()
    headless = Sites.of(make("llama"), replace(LLAMA, projection=""))
    assert headless.layers_with("head") == ()
    hybrid = Sites.of(make("qwen3_next"), replace(LLAMA, adds=False))
    assert hybrid.layers_with("head") == hybrid.layers_with("attn_out") == (1,)


def test_heads_of_two_attentions_in_a_block_are_not_told_apart() -> None:
    model = make("llama")
    for block in model.model.layers:
        block.mlp = Twice(block.self_attn, block.mlp)
    sites = Sites.of(model)
    assert sites.layers_with("head") == ()


class Twice(nn.Module):
    """A block with a second attention where its MLP was."""

    def __init__(self, like: Any, mlp: nn.Module) -> None:
        super().__init__()
        import copy

        self.attention, self.mlp, self.calls = copy.deepcopy(like), mlp, list[Any]()
        nn.init.normal_(self.attention.o_proj.weight)
        like.register_forward_pre_hook(self.listen, with_kwargs=True)

    def listen(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls[:] = [kwargs]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.attention(**{**self.calls[0], "hidden_states": x})[0]
        return self.mlp(inner)  # type: ignore[no-any-return]


def test_a_module_that_blocks_share_is_hooked_in_one_of_them() -> None:
    model = make("llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    sites = Sites.of(model)
    assert sites.per_layer[0].projection is sites.per_layer[1].projection
    for site in ("head", "attn_out"):
        seen: list[torch.Tensor] = []
        with sites.hook(site, 1, seen.append):  # type: ignore[arg-type]
            logits(model)
        assert len(seen) == 1


def test_a_model_without_blocks_says_how_to_name_them() -> None:
    model = make("llama")
    model.config.num_hidden_layers = 3
    with pytest.raises(
        SiteError, match=r"no decoder blocks found in LlamaForCausalLM .*ModuleMap\(blocks=\"model\.layers\""
    ):
        Sites.of(model)
    sites = Sites.of(model, LLAMA)
    assert (sites.architecture, sites.heads) == ("llama", 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks": "model.h"}, "has no module 'model.h'"),
        ({"blocks": "model.norm"}, "has no blocks in it"),
        ({"attention": "attn"}, "LlamaDecoderLayer has no module 'attn': it holds self_attn, mlp"),
        ({"projection": "o"}, "LlamaAttention has no module 'o': it holds q_proj"),
        ({"projection": "q_proj"}, "attention's output is not that of its output projection"),
        ({"projection": "k_proj"}, "'k_proj' is no linear layer that returns the stream's width"),
        ({"mlp": "input_layernorm"}, "is not the block's output"),
        ({"mlp": ""}, "is not the block's output"),
    ],
)
def test_wrong_names(change: dict[str, str], words: str) -> None:
    with pytest.raises(SiteError, match=words):
        Sites.of(make("llama"), replace(LLAMA, **change))  # type: ignore[arg-type]


def test_gemma_adds_what_comes_after_its_norms() -> None:
    with pytest.raises(SiteError, match="is not the block's output"):
        Sites.of(make("gemma2"), LLAMA)


def test_what_a_model_has_not_got() -> None:
    sites = Sites.of(make("gpt2"))
    for arguments, words in [
        (("resid_post",), "site='resid_post' is not possible: expected one of resid_pre, head, attn_out, mlp_out"),
        (("head", 2), "layer=2 is not possible: gpt2 has layers 0 to 1"),
        (("head", -1), "layer=-1"),
        (("head", 0, 4), "head=4 is not possible: layer 0 of gpt2 has heads 0 to 3"),
        (("mlp_out", 0, 0), "mlp_out has no heads"),
    ]:
        with pytest.raises(SiteError, match=words):
            sites.check(*arguments)  # type: ignore[arg-type]
        if len(arguments) == 2:
            with pytest.raises(SiteError, match=words):
                sites.hook(*arguments, lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match=r"bloom has no verified heads .* kind attention"):
        Sites.of(make("bloom")).check("head")


def test_what_a_layer_has_not_got() -> None:
    sites = Sites.of(make("qwen3_next"))
    sites.check("head")
    sites.check("head", 1, 3)
    with pytest.raises(
        SiteError, match="layer 0 of qwen3_next has no heads: it is linear_attention; layers with heads: 1"
    ):
        sites.check("head", 0)
    with pytest.raises(SiteError, match="layer 0 of qwen3_next has no heads"):
        sites.hook("head", 0, lambda x: x)
    assert sites.shape("head") == sites.shape("head", 1) == (4, 8)
    first, second = sites.per_layer
    other = replace(sites, per_layer=(replace(second, heads=2, head_dim=16), second))
    with pytest.raises(SiteError, match=r"differ between layers.*layer 0: 2 heads of 16, layer 1: 4 heads of 8"):
        other.shape("head")
    assert (other.heads, other.head_dim) == (4, 16)
    assert first.heads == 0
