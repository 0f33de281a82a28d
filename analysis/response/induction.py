"""The induction signature: responses between the occurrences of a repeated block of random tokens.

A prompt is BOS and a repeated block of B distinct random tokens. An induction head at the second occurrence of a token
attends to the token after the first one, so the token at i responds to a push at j = i - (B - 1). The signature is the
response at offset B - 1 (or B, the same token) minus the mean at other offsets, over cells (i, j) of a block and the
previous one, minus the same for a control prompt that begins with the same block and repeats nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from nextstate.agents.language import LanguageModel
from nextstate.agents.sites import Activation
from nextstate.analysis import stats
from nextstate.analysis.heads.sweep import site_values
from nextstate.analysis.response.branches import ResponseError
from nextstate.analysis.response.measure import Response, responses
from nextstate.analysis.response.window import of_kind

Ablation = Literal["zero", "mean"]


@dataclass(frozen=True)
class Repeated:
    """Prompts with a repeated block, and their controls, which begin with the same block."""

    block: int
    repeats: int
    lead: int  # tokens before the first block
    tokens: Int[np.ndarray, "prompt token"]
    control: Int[np.ndarray, "prompt token"]

    @property
    def sources(self) -> list[int]:
        """The positions of all blocks except the last."""
        return list(range(self.lead, self.lead + self.block * (self.repeats - 1)))


def vocabulary_of(model: LanguageModel, alphabet: Sequence[str] = ()) -> list[int]:
    """Return the tokens to draw random blocks from: those of `alphabet`, by default all that are not special.

    Raises:
        ResponseError: a text of the alphabet is not one token.
    """
    if alphabet:
        found = [model.encoder.piece(text) for text in alphabet]
        wrong = [text for text, tokens in zip(alphabet, found, strict=True) if len(tokens) != 1]
        if wrong:
            raise ResponseError(
                f"alphabet={wrong} is not possible: expected texts that are one token each to {model.name}"
            )
        return list(dict.fromkeys(tokens[0] for tokens in found))
    known = min(len(model.tokenizer), model.model.get_input_embeddings().weight.shape[0])
    added = model.tokenizer.added_tokens_decoder
    special = {token for token, about in added.items() if about.special} | set(model.tokenizer.all_special_ids)
    return sorted(set(range(known)) - special)


def repeated(
    model: LanguageModel,
    rng: np.random.Generator,
    *,
    block: int = 24,
    repeats: int = 2,
    prompts: int = 8,
    vocabulary: Sequence[int] | None = None,
) -> Repeated:
    """Draw prompts and their controls.

    Args:
        model: the language model; if its tokenizer has a BOS token, prompts begin with it.
        rng: source of randomness.
        block: tokens in a block, at least 3.
        repeats: blocks in a prompt, at least 2.
        prompts: number of prompts.
        vocabulary: tokens to draw from; by default all that are not special.

    Raises:
        ResponseError: there are too few tokens, or a prompt exceeds the model's context.
    """
    known = vocabulary_of(model) if vocabulary is None else list(vocabulary)
    if block < 3 or repeats < 2 or prompts < 1:
        raise ResponseError(
            f"block={block}, repeats={repeats}, prompts={prompts} is not possible: expected at least 3, 2 and 1"
        )
    if block * repeats > len(known):
        raise ResponseError(
            f"block={block}, repeated {repeats} times, is not possible: its control needs {block * repeats} different "
            f"tokens, but there are {len(known)}; ask for a block of at most {len(known) // repeats}"
        )
    lead, length = len(model.encoder.bos), len(model.encoder.bos) + block * repeats
    if model.context is not None and length > model.context:
        most = (model.context - lead) // repeats
        raise ResponseError(
            f"block={block}, repeated {repeats} times, is not possible: a prompt has {length:,} tokens, but "
            f"the context of {model.name} is {model.context:,}; use a block of at most {most}"
        )
    drawn = np.stack([rng.permutation(known)[: block * repeats] for _ in range(prompts)]).astype(np.int64)
    begin = np.tile(np.array(model.encoder.bos, dtype=np.int64), (prompts, 1))
    again = np.tile(drawn[:, :block], (1, repeats))
    return Repeated(block, repeats, lead, *(np.concatenate([begin, x], 1) for x in (again, drawn)))


def profile(
    value: Float[np.ndarray, "prompt layer position target"], given: Repeated
) -> Float[np.ndarray, "prompt layer offset"]:
    """Return the mean response at each offset i - j = 1 ... 2B - 1, over cells of a block and the previous one.

    Args:
        value: responses to pushes at `given.sources`, in this order.
        given: the prompts.
    """
    size = given.block
    parts = []
    for k in range(given.repeats - 1):
        cells = value[:, :, k * size : (k + 1) * size, given.lead + (k + 1) * size : given.lead + (k + 2) * size]
        parts.append(np.stack([np.diagonal(cells, o, 2, 3).mean(-1) for o in range(1 - size, size)], -1))
    return np.asarray(np.mean(parts, axis=0))


def excess(
    found: Float[np.ndarray, "*any offset"], block: int
) -> tuple[Float[np.ndarray, "*any two"], Float[np.ndarray, "*any"]]:
    """Return the excess at offsets B - 1 and B over the mean of the cells at other offsets, and that mean.

    Offset 2B - 1 is not one of the others: between later blocks it is B - 1 of the block before the previous one.
    """
    offsets = np.arange(1, 2 * block)
    cells = block - np.abs(offsets - block)
    ours = [block - 2, block - 1]  # indices of B - 1 and B
    cells[[*ours, -1]] = 0
    others = (found * cells).sum(-1) / cells.sum()
    return found[..., ours] - others[..., None], others


def averaged(
    found: Response, kind: str, relative: bool = False, at: int = 0
) -> Float[np.ndarray, "prompt layer position target"]:
    """Return the responses to strength number `at`, averaged over the directions of a kind."""
    value = found.relative if relative else found.value
    return np.asarray(value[:, at, of_kind(found, kind)].mean(1))


def means(
    values: Float[np.ndarray, "prompt layer column"], rng: np.random.Generator, *, resamples: int = 2000
) -> stats.Band:
    """Return means over prompts with intervals and a band over all layers and columns; axes [layer 1 column]."""
    return stats.mean_band(values[:, :, None], rng, draws=resamples)


def without(model: LanguageModel, layer: int, head: int, mean: Float[Tensor, "head dim"] | None) -> ExitStack:
    """Return a context in which the output of a head is replaced by zeros, or by its `mean`, at every token."""

    def edit(x: Activation) -> Activation:
        new = x.clone()
        new[:, :, head] = 0 if mean is None else mean[head].to(x.dtype)
        return new

    return model.sites.hook("head", layer, edit)


def head_excess(
    model: LanguageModel,
    given: Repeated,
    layer: int,
    *,
    strength: float,
    directions: Float[np.ndarray, "prompt direction hidden"],
    ablation: Ablation = "mean",
    injected: int = 0,
    max_bytes: int = 2 << 30,
) -> Float[np.ndarray, "prompt head"]:
    """Return the excess at offset B - 1 after the last layer when each head of a layer is ablated alone.

    Args:
        model: the language model.
        given: prompts; the control is not used.
        layer: layer of the heads.
        strength: strength of the pushes.
        directions: directions of the pushes.
        ablation: what replaces the output of a head at every token: zeros, or its mean over all tokens.
        injected: layer whose input is pushed.
        max_bytes: as in `responses`.
    """
    values = site_values(model, given.tokens, "head")[layer]
    mean = values.float().mean((0, 1)) if ablation == "mean" else None
    out = []
    for head in range(model.sites.shape("head", layer)[0]):
        with without(model, layer, head, mean):
            found = responses(
                model, given.tokens, positions=given.sources, strengths=(strength,), directions=directions, along=False,
                layer=injected, max_bytes=max_bytes,
            )  # fmt: skip
        out.append(excess(profile(averaged(found, "random")[:, -1:], given), given.block)[0][:, 0, 0])
    return np.stack(out, 1)


def lost(
    whole: Float[np.ndarray, " prompt"],
    left: Float[np.ndarray, "prompt layer head"],
    rng: np.random.Generator,
    *,
    resamples: int = 2000,
) -> stats.Band | None:
    """Return the share of a response that is lost without each head, a ratio of means; None without a response.

    1: the response vanishes; 0: the head has no effect; negative: the response grows. Axes [layer head 1].
    """
    if abs(whole.mean()) < 1e-9 * max(1.0, float(np.abs(whole).max())):
        return None
    return stats.ratio_band(((left - whole[:, None, None])[..., None], -whole), rng, draws=resamples)
