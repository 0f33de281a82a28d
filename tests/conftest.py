"""Settings for all tests, and tiny models with the real architectures, saved to folders and loaded by path."""

from __future__ import annotations

import os
from pathlib import Path

# The models in tests are tiny: one thread is faster than two that wait for each other, and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Games that take a while to make are kept beside what pytest keeps, not in the user's own folder.
os.environ.setdefault("NEXTSTATE_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "nextstate"))

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from nextstate.agents.architectures import DistanceConfig, DistanceForCausalLM
from nextstate.agents.language import LanguageModel
from nextstate.agents.training import TrainConfig, corpus, train_tokenizer

ARCHITECTURES = ("gpt2", "gpt_neox", "llama", "gemma2", "nextstate_distances")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return list(corpus(TrainConfig(), episodes=300))


def byte_level(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer as GPT-2 and Pythia have it."""
    return train_tokenizer(TrainConfig(model={"vocabulary": 420}))  # type: ignore[arg-type]


def metaspace(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama-2 and Gemma have it: spaces are letters, and nothing is split beforehand. No pad token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def build(architecture: str, vocabulary: int) -> Any:
    """A model of the real class, two layers, wide enough that its logits differ from token to token."""
    torch.manual_seed(0)
    shape = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {"intermediate_size": 64, "max_position_embeddings": 512, "initializer_range": 0.3}
    if architecture == "nextstate_distances":
        config = DistanceConfig(**shape, n_positions=512, initializer_range=0.3, distances="relative")
        return DistanceForCausalLM(config)
    if architecture == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**shape, n_positions=512, initializer_range=0.3))
    if architecture == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **wide))
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, **wide, num_key_value_heads=2))
    return Gemma2ForCausalLM(
        Gemma2Config(**shape, **wide, num_key_value_heads=2, head_dim=8, sliding_window=400, query_pre_attn_scalar=8)
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> dict[str, Path]:
    """One saved model an architecture."""
    out = {}
    for architecture in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(architecture)
        tokenizer = (byte_level if architecture not in ("llama", "gemma2") else metaspace)(texts)
        build(architecture, len(tokenizer)).eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        out[architecture] = folder
    return out


@pytest.fixture(scope="session", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LanguageModel:
    return LanguageModel(str(folders[request.param]), device="cpu")
