"""Transformers built by hand: real GPT-2 modules whose heads carry a known circuit, to check methods that look for one.

The residual stream is cut into subspaces, one for each thing that is known of a token. A head is a sentence about them:
it attends from what one subspace holds to where others hold the same, and copies one subspace into another. Attention
is sharp (the next best place gets less than exp(-30) of the weight). Positions are written as their remainders by 7, 9
and 11, so that "k tokens back" is a permutation. A layer norm divides by sqrt(variance + epsilon): with epsilon a
million and a weight of a thousand it is the identity to six digits; one dimension balances the others, so that the mean
is 0.

`circuit("DFA", seed)`: "state" and "action" bring, at every token, the names 8 and 4 tokens back into the subspaces
`asked_*`: the current state and the action, at the token before the answer. "told_state" and "told_action" bring those
9 and 5 tokens back into `told_*`: the same, at the answer. "match" attends from the former to told states where both
agree, and copies their names to the output. So an answer that was not told before is a guess.

`circuit("Cycle", seed)`: "previous" brings the letter before, "induction" attends to where that is the current letter
and copies the letter there to the output.

Decoys attend as heads of the circuit or at other distances, and copy into a subspace that nothing reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from nextstate.agents.language import LanguageModel
from nextstate.agents.text import begins_with

STATES = (*ascii_lowercase, "x1", "x2", "x3", "x4")  # the last ones are those of the published designs
ACTIONS = (*ascii_uppercase, "A1", "A2", "A3")
WORDS = ("States", "Actions", "Sequence", "Start", "at", "state", "Take", "action", "go", "to")
MARKS = (",", ".", ":", "{", " {", "}", "\n")
REMAINDERS = (7, 9, 11)
EPSILON = 1e6
SHARP = 32.0
GAIN = 20.0
Slot = tuple[int, int]  # layer, head
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Circuit:
    """A model that plays a game, and the truth about it: the slot of each head, by what it does."""

    agent: LanguageModel
    heads: Mapping[str, Slot]
    decoys: tuple[Slot, ...]


class Head(NamedTuple):
    """What a head does: attend from `queries` to where `keys` are the same, and copy one subspace into another.

    A query is a subspace and a permutation of it, the key a subspace; None as a query is the constant 1.
    """

    queries: tuple[tuple[str | None, Array | None], ...]
    keys: tuple[str, ...]
    source: str
    target: str


def back(tokens: int, source: str, target: str) -> Head:
    """Return the head that copies from some tokens back."""
    shift = np.zeros((sum(REMAINDERS),) * 2)
    start = 0
    for n in REMAINDERS:
        shift[start + np.arange(n), start + (np.arange(n) - tokens) % n] = 1
        start += n
    return Head((("position", shift),), ("position",), source, target)


def same(pairs: Sequence[tuple[str, str]], among: str | None, source: str, target: str) -> Head:
    """Return the head that copies from where each pair of subspaces agrees, and `among` is set."""
    queries: list[tuple[str | None, Array | None]] = [(query, None) for query, _ in pairs]
    keys = [key for _, key in pairs]
    if among is not None:
        queries, keys = [*queries, (None, None)], [*keys, among]
    return Head(tuple(queries), tuple(keys), source, target)


GATHER = {
    "DFA": {
        "state": back(8, "state", "asked_state"),
        "action": back(4, "action", "asked_action"),
        "told_state": back(9, "state", "told_state"),
        "told_action": back(5, "action", "told_action"),
    },
    "Cycle": {"previous": back(1, "state", "told_state")},
}
ANSWER = {
    "DFA": (
        "match",
        same((("asked_state", "told_state"), ("asked_action", "told_action")), "is_state", "state", "output"),
    ),
    "Cycle": ("induction", same((("state", "told_state"),), None, "state", "output")),
}
SIZES = {
    **dict.fromkeys(("state", "asked_state", "told_state", "output", "unread"), len(STATES)),
    **dict.fromkeys(("action", "asked_action", "told_action"), len(ACTIONS)),
    "position": sum(REMAINDERS),
    "is_state": 1,
}


class Space:
    """The subspaces of the residual stream, each in random dimensions and in a random orthogonal basis."""

    def __init__(self, rng: np.random.Generator, hidden: int) -> None:
        order = rng.permutation(hidden)
        self.hidden, self.balance = hidden, int(order[-1])
        self.dims, self.bases, start = {}, {}, 0
        for name, size in SIZES.items():
            self.dims[name] = order[start : start + size]
            self.bases[name] = np.linalg.qr(rng.normal(size=(size, size)))[0]
            start += size

    def write(self, name: str) -> Array:
        """Return the map from a subspace's features into the stream; the sum of what it writes is 0."""
        out = np.zeros((SIZES[name], self.hidden))
        out[:, self.dims[name]] = self.bases[name]
        out[:, self.balance] = -out.sum(1)
        return out

    def read(self, name: str) -> Array:
        """Return the map from the stream to a subspace's features."""
        out = np.zeros((self.hidden, SIZES[name]))
        out[self.dims[name]] = self.bases[name].T
        return out


def circuit(game: str, seed: int, layers: int = 4, heads: int = 4, decoys: int = 7) -> Circuit:
    """Build a model that plays "DFA" (state-action, letters) or "Cycle"; the seed deals out slots, dimensions, codes.

    Slots that are neither of the circuit nor decoys stay empty: they add nothing.
    """
    answer, last = ANSWER[game]
    gather = GATHER[game]
    first = -(-len(gather) // heads)  # the earliest layer that has room for the others below it
    if first >= layers or 1 + len(gather) + decoys > layers * heads:
        raise ValueError(f"{layers} layers of {heads} heads have no room for {game} and {decoys} decoys")
    rng = np.random.default_rng(seed)
    width = max(-(-(1 + sum(SIZES.values())) // heads), 1 + len(STATES) + len(ACTIONS))
    space = Space(rng, width * heads)
    tokenizer = word_tokenizer()
    context = int(np.prod(REMAINDERS))
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=context,
            n_embd=space.hidden,
            n_layer=layers,
            n_head=heads,
            n_inner=1,
            layer_norm_epsilon=EPSILON,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(EPSILON**0.5 if ".ln_" in name and name.endswith("weight") else 0.0)
        _embed(model, tokenizer, space, context)
    layer = int(rng.integers(first, layers))
    free = [(a, b) for a in range(layers) for b in range(heads)]
    place = {answer: (layer, int(rng.integers(heads)))}
    free.remove(place[answer])
    for name in gather:
        early = [slot for slot in free if slot[0] < layer]
        place[name] = early[int(rng.integers(len(early)))]
        free.remove(place[name])
    for name, slot in place.items():
        _install(model, space, slot, last if name == answer else gather[name])
    # Decoys see what the circuit sees; one of them even finds the answer, and nobody asks for it.
    twins = [head._replace(target="unread") for head in (last, *gather.values())]
    twins += [back(int(rng.integers(12)), "state", "unread") for _ in range(decoys)]
    shams = [free[i] for i in rng.permutation(len(free))[:decoys].tolist()]
    for slot, head in zip(shams, twins, strict=False):
        _install(model, space, slot, head)
    agent = LanguageModel(f"circuit/{game}-{seed}", loaded=(model, tokenizer))
    return Circuit(agent, place, tuple(sorted(shams)))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for which each word and name is one token, together with the space before it.

    A transcript begins with BOS, where the first letter of a cycle finds no letter before it.
    """
    words = ["<unk>", "<bos>", *MARKS, *(space + word for word in (*WORDS, *STATES, *ACTIONS) for space in ("", " "))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]|\s"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = begins_with("<bos>", 1)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>")


def _embed(model: Any, tokenizer: Any, space: Space, context: int) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens, logits = np.zeros((len(tokenizer), space.hidden)), np.zeros((len(tokenizer), space.hidden))
    for kind, names in (("state", STATES), ("action", ACTIONS)):
        for i, name in enumerate(names):
            for token in (name, f" {name}"):
                tokens[vocabulary[token]] = space.write(kind)[i]
    for i, name in enumerate(STATES):
        tokens[vocabulary[f" {name}"]] += space.write("is_state")[0]
        logits[vocabulary[f" {name}"]] = GAIN * space.read("output")[:, i]
    start, positions = 0, np.zeros((context, space.hidden))
    for n in REMAINDERS:
        positions += space.write("position")[start + np.arange(context) % n]
        start += n
    model.transformer.wte.weight.copy_(torch.from_numpy(tokens))
    model.transformer.wpe.weight.copy_(torch.from_numpy(positions))
    model.lm_head.weight.copy_(torch.from_numpy(logits))


@torch.no_grad()
def _install(model: Any, space: Space, slot: Slot, head: Head) -> None:
    layer, number = slot
    attention = model.transformer.h[layer].attn
    hidden, width = space.hidden, attention.head_dim
    query, key, constant = np.zeros((hidden, width)), np.zeros((hidden, width)), np.zeros(width)
    start = 0
    for (name, order), place in zip(head.queries, head.keys, strict=True):
        part = slice(start, start + SIZES[place])
        key[:, part] = space.read(place)
        if name is None:
            constant[part] = 1
        else:
            query[:, part] = space.read(name) @ (np.eye(SIZES[name]) if order is None else order)
        start = part.stop
    value = np.zeros((hidden, width))
    value[:, : SIZES[head.source]] = space.read(head.source)
    target = np.zeros((width, hidden))
    target[: SIZES[head.target]] = space.write(head.target)
    scale = SHARP * width**0.5  # attention divides by sqrt(width)
    own = np.arange(number * width, (number + 1) * width)
    for k, weight in enumerate((scale * query, key, value)):
        attention.c_attn.weight[:, own + k * hidden] = torch.from_numpy(weight).float()
    attention.c_attn.bias[own] = torch.from_numpy(scale * constant).float()
    attention.c_proj.weight[own] = torch.from_numpy(target).float()
