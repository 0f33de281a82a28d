"""Sites of eight architectures: what they hand out is what the model computes with, and wrong names are told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
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
from nextstate.agents.sites import KNOWN, SITES, Names, SiteError, Sites
from tests.conftest import ARCHITECTURES, build

MORE = ("opt", "opt-350m", "qwen2", "qwen3", "mistral")


def make(architecture: str) -> Any:
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
    return MistralForCausalLM(MistralConfig(**shape, **wide, sliding_window=None)).eval()


@pytest.fixture(scope="module", params=(*ARCHITECTURES, *MORE))
def any_model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def test_every_known_architecture_is_tested() -> None:
    assert set(KNOWN) == {a.removesuffix("-350m") for a in (*ARCHITECTURES, *MORE)}


def test_shapes(any_model: Any) -> None:
    sites = Sites.of(any_model)
    assert (sites.layers, sites.heads, sites.hidden) == (2, 4, 32)
    assert sites.head_dim == (16 if any_model.config.model_type == "qwen3" else 8)
    for site in SITES:
        seen: list[torch.Tensor] = []
        with sites.hook(site, 1, seen.append), torch.no_grad():
            any_model(torch.arange(10, 24).view(2, 7))
        any_model(torch.arange(7)[None])  # the hook is gone
        (x,) = seen
        assert x.shape == (2, 7, *sites.shape(site))


@pytest.mark.parametrize("site", SITES)
def test_what_a_hook_returns_goes_on(any_model: Any, site: Any) -> None:
    """Writing what was there changes nothing, zeros at one token change only what comes after it."""
    sites, tokens = Sites.of(any_model), torch.arange(10, 24).view(2, 7)

    def zeros(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[1, 4] = 0
        return x

    with torch.no_grad():
        plain = any_model(tokens).logits
        with sites.hook(site, 0, lambda x: x.clone()):
            assert torch.equal(any_model(tokens).logits, plain)
        with sites.hook(site, 0, zeros):
            changed = any_model(tokens).logits
    assert torch.equal(changed[0], plain[0])
    assert torch.equal(changed[1, :4], plain[1, :4])
    assert (changed[1, 4:] - plain[1, 4:]).abs().amax(-1).min() > 1e-4


def test_a_head_is_what_its_own_weights_give(any_model: Any) -> None:
    """Zeroing the value weights of the last head's group silences the heads of this group and no other."""
    sites = Sites.of(any_model)
    attention = dict(any_model.named_modules())[f"{sites.names.blocks}.0.{sites.names.attention}"]
    group = sites.heads // (getattr(any_model.config, "num_key_value_heads", None) or sites.heads)
    seen: list[torch.Tensor] = []
    fused = any_model.config.model_type in ("gpt2", "gpt_neox", "nextstate_distances")
    weights = attention.c_attn if hasattr(attention, "c_attn") else getattr(attention, "query_key_value", None)
    value = weights if fused else attention.v_proj
    saved = {k: v.clone() for k, v in value.state_dict().items()}
    with torch.no_grad():
        weight = value.weight.T if hasattr(value, "nx") else value.weight  # [out, in]
        weight[-sites.head_dim :] = 0
        if value.bias is not None:
            value.bias[-sites.head_dim :] = 0
        with sites.hook("head", 0, seen.append):
            any_model(torch.arange(7)[None])
        value.load_state_dict(saved)
    silent = seen[0][0].abs().amax((0, 2)) < 1e-9
    assert silent.tolist() == [False] * (sites.heads - group) + [True] * group


def test_the_built_in_model_and_any_agent_have_sites(folders: dict[str, Path]) -> None:
    agent = LanguageModel("nextstate/tiny", device="cpu")
    assert agent.sites is agent.sites
    assert agent.sites.heads == agent.model.config.num_attention_heads


def test_half_precision_is_within_tolerance() -> None:
    assert Sites.of(make("llama").to(torch.bfloat16)).heads == 4


def test_an_unknown_architecture_says_how_to_name_its_modules() -> None:
    model = make("llama")
    model.config.model_type = "novel"
    with pytest.raises(SiteError, match=r"'novel' .* is not known.*Names\(blocks=\"model\.layers\""):
        Sites.of(model)
    sites = Sites.of(model, Names(blocks="model.layers", attention="self_attn", projection="o_proj", mlp="mlp"))
    assert (sites.architecture, sites.heads) == ("novel", 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks": "model.h"}, "has no module 'model.h'"),
        ({"blocks": "model.norm"}, "has no blocks in it"),
        ({"attention": "attn"}, "LlamaDecoderLayer has no module 'attn': it holds self_attn, mlp"),
        ({"projection": "q_proj"}, "attention's output is not that of its output projection"),
        ({"mlp": "input_layernorm"}, "is not the next resid_pre"),
        ({"mlp": ""}, "is not the next resid_pre"),
    ],
)
def test_wrong_names(change: dict[str, str], words: str) -> None:
    with pytest.raises(SiteError, match=words):
        Sites.of(make("llama"), replace(KNOWN["llama"], **change))


def test_gemma_adds_what_comes_after_its_norms() -> None:
    with pytest.raises(SiteError, match="is not the next resid_pre"):
        Sites.of(make("gemma2"), replace(KNOWN["gemma2"], attn_out="", mlp_out=""))


def test_what_a_model_has_not_got() -> None:
    sites = Sites.of(make("gpt2"))
    for arguments, words in [
        (("resid_post",), "site='resid_post' is not possible: expected one of resid_pre, head, attn_out, mlp_out"),
        (("head", 2), "layer=2 is not possible: gpt2 has layers 0 to 1"),
        (("head", -1), "layer=-1"),
        (("head", 0, 4), "head=4 is not possible: gpt2 has heads 0 to 3"),
        (("mlp_out", 0, 0), "mlp_out has no heads"),
    ]:
        with pytest.raises(SiteError, match=words):
            sites.check(*arguments)  # type: ignore[arg-type]
        if len(arguments) == 2:
            with pytest.raises(SiteError, match=words):
                sites.hook(*arguments, lambda x: x)  # type: ignore[arg-type]
    bare = replace(sites, names=replace(sites.names, mlp=""))
    with pytest.raises(SiteError, match="gpt2 has no mlp_out"):
        bare.check("mlp_out")
