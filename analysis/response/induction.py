"""The induction signature of a response: on a block of random tokens that is repeated, who answers to a push on whom?

A prompt is BOS and a block of B random tokens, no two the same, repeated. An induction head at the second occurrence of
a token looks at what came after the first: the token at i answers to j = i - (B - 1). So the response at offset B - 1
(and at B, the same token again) is set against the mean of the other offsets, in cells (i, j) of a block and the one
before it; and all that against a control, a prompt that begins with the same block and repeats nothing. This signature
is ours (see `nextstate.analysis.response`).
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
        """The positions of all blocks but the last: those that have a block after them."""
        return list(range(self.lead, self.lead + self.block * (self.repeats - 1)))


def vocabulary_of(model: LanguageModel, alphabet: Sequence[str] = ()) -> list[int]:
    """Return the tokens that random blocks are drawn from: those of `alphabet`, else all that are not special.

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
        model: that reads them; where its tokenizer has a BOS, prompts begin with it.
        rng: where to draw from.
        block: tokens in a block, at least 3, so that there are other offsets.
        repeats: blocks in a prompt, at least 2.
        prompts: how many to draw.
        vocabulary: tokens to draw from; by default all that are not special.

    Raises:
        ResponseError: there are too few tokens, or a prompt is longer than the model reads.
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
            f"{model.name} reads {model.context:,}; ask for a block of at most {most}"
        )
    drawn = np.stack([rng.permutation(known)[: block * repeats] for _ in range(prompts)]).astype(np.int64)
    begin = np.tile(np.array(model.encoder.bos, dtype=np.int64), (prompts, 1))
    again = np.tile(drawn[:, :block], (1, repeats))
    return Repeated(block, repeats, lead, *(np.concatenate([begin, x], 1) for x in (again, drawn)))


def profile(
    value: Float[np.ndarray, "prompt layer position target"], given: Repeated
) -> Float[np.ndarray, "prompt layer offset"]:
    """Return the mean response at each offset i - j = 1 ... 2B - 1, over cells of a block and the one before it.

    Args:
        value: responses to pushes at `given.sources`, in this order.
        given: what the prompts are made of.
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
    """Return by how much the offsets B - 1 and B exceed the mean over the cells of all others, and that mean.

    Offset 2B - 1 is not among the others: between later blocks it is B - 1, one block further.
    """
    offsets = np.arange(1, 2 * block)
    cells = block - np.abs(offsets - block)
    ours = [block - 2, block - 1]  # places of B - 1 and B
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
    """Return a context in which a head gives zeros, or its `mean`, at every token."""

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
    """Return what is left of the excess at offset B - 1, in the last layer, without each head of a layer.

    Args:
        model: any.
        given: prompts; the control is not used.
        layer: of the heads.
        strength: of the pushes.
        directions: of the pushes.
        ablation: the head gives zeros at every token, or its mean over all of them.
        injected: the layer whose input is pushed.
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
    """Return the share of a response that is gone without each head, a ratio of means; None where there is none.

    1 where it vanishes, 0 where the head does not matter, negative where it grows. Axes [layer head 1].
    """
    if abs(whole.mean()) < 1e-9 * max(1.0, float(np.abs(whole).max())):
        return None
    return stats.ratio_band(((left - whole[:, None, None])[..., None], -whole), rng, draws=resamples)
