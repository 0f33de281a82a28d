"""The models of the benchmarks: GPT-2 with random weights, on which time does not depend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nextstate.agents.language import LanguageModel
from nextstate.agents.training import TrainConfig, train_tokenizer


class Shape(NamedTuple):
    """Layers, heads and width of a GPT-2, and the size of its vocabulary."""

    layers: int
    heads: int
    width: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.layers} x {self.heads} x {self.width}"


SMALL, GPT2_SMALL = Shape(4, 4, 256, 8000), Shape(12, 12, 768, 50257)


def shapes(quick: bool) -> tuple[Shape, ...]:
    """Return the shapes to measure."""
    return (SMALL,) if quick else (GPT2_SMALL, SMALL)


def random_gpt2(shape: Shape) -> LanguageModel:
    """Return an agent with random weights of seed 0, on one thread; its tokenizer is that of the built-in model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config: Any = GPT2Config(
        n_layer=shape.layers, n_head=shape.heads, n_embd=shape.width, vocab_size=shape.vocabulary, n_positions=1024,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LanguageModel(f"GPT-2 of {shape}", loaded=(GPT2LMHeadModel(config).eval(), train_tokenizer(TrainConfig())))
