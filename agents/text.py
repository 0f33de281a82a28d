"""Tokenization by segments, so that the tokens of a transcript do not change when text is appended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from tokenizers import processors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nextstate.envs.contrast import Span

_ANCHORS = ("a", ".", "1", "\n", "A b")
WIDE = 1 << 32  # above all tokens
_CLOZES = 4096  # questions whose tokens are kept


class TokenizerError(ValueError):
    """A tokenizer cannot encode a text as required; the message names the text."""


def before_text(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the special tokens that a tokenizer puts before a text by default, as `tokenizer(text)` does.

    GPT-2's adds none, though it has a BOS; Llama's adds its BOS. Tokens after the text are left out.
    """
    for text in _ANCHORS:
        whole, bare = tuple(tokenizer.encode(text)), tuple(tokenizer.encode(text, add_special_tokens=False))
        for start in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
    return ()


def begins_with(token: str, number: int) -> processors.TemplateProcessing:
    """Return a post-processor that puts a token before each text."""
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )


def _id(token: Any) -> int | None:
    return None if token is None else int(token)


@dataclass(frozen=True, slots=True, eq=False)
class Cloze:
    """The tokens of a question: its stem, and the choices as a trie below it, without tokens whose logits are not read.

    Nodes of the trie are numbered from 1; 0 is the last node of the prompt.

    Attributes:
        stem: the tokens of the stem.
        tokens, parents, depths: token, parent and depth of each node of the trie, from node 1 on.
        forks: `parent * WIDE + token` and number of the nodes that do not directly follow their parent.
        at: for each token of each choice the node whose logits predict it.
        wanted: the tokens of all choices, those of the first choice first.
        lengths: the number of tokens of each choice.
        sizes: the number of UTF-8 bytes of each choice.
    """

    stem: tuple[int, ...]
    tokens: list[int]
    parents: list[int]
    depths: list[int]
    forks: list[tuple[int, int]]
    at: Int[np.ndarray, " token"]
    wanted: Int[np.ndarray, " token"]
    lengths: Int[np.ndarray, " choice"]
    sizes: Int[np.ndarray, " choice"]

    @classmethod
    def of(cls, stem: tuple[int, ...], choices: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> Cloze:
        """Return the trie of choices, given as tokens and numbers of bytes."""
        index: dict[tuple[int, int], int] = {}
        depths, at = [0], list[int]()
        for choice in choices:
            node = 0
            at.append(node)
            for token in choice[:-1]:
                child = index.setdefault((node, token), len(depths))
                if child == len(depths):
                    depths.append(depths[node] + 1)
                node = child
                at.append(node)
        forks = [(parent * WIDE + token, node) for (parent, token), node in index.items() if node != parent + 1]
        tokens, parents = [token for _, token in index], [parent for parent, _ in index]
        flat = np.array([token for choice in choices for token in choice], dtype=np.int64)
        lengths = np.array([len(choice) for choice in choices], dtype=np.int64)
        return cls(
            stem, tokens, parents, depths[1:], forks,
            np.array(at, dtype=np.int64), flat, lengths, np.array(sizes, dtype=np.int64),
        )  # fmt: skip


class Encoder:
    """Encodes an opening, and pieces that continue a text.

    A piece is encoded after a short anchor whose tokens are then removed, so that the tokenizer itself determines how
    the piece is encoded in the middle of a text (leading spaces, SentencePiece markers). Pieces never merge with their
    neighbours, so that live and replayed transcripts, and all choices of a question, have the same tokens.

    Args:
        tokenizer: a tokenizer of transformers.
        bos: whether transcripts begin with BOS; by default as the tokenizer does.

    Raises:
        TokenizerError: `bos` is true, but the tokenizer has no BOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> None:
        self.tokenizer = tokenizer
        natural = before_text(tokenizer)
        self.bos: tuple[int, ...] = natural  # special tokens before each transcript
        self.differs = ""  # a warning if these are not the tokenizer's default
        if bos is not None:
            begin = _id(tokenizer.bos_token_id)
            if bos and begin is None:
                raise TokenizerError(f"bos={bos} is not possible: {type(tokenizer).__name__} has no BOS; leave it out")
            self.bos = () if begin is None or not bos else (begin,)
            if self.bos != natural:
                own = tokenizer.decode(list(natural)) if natural else "nothing"
                given = tokenizer.decode(list(self.bos)) if self.bos else "nothing"
                self.differs = f"read transcripts with {given} before them (bos={bos}); its tokenizer puts {own} there"
        self._cache: dict[str, tuple[int, ...]] = {}
        self._clozes: dict[tuple[str, tuple[str, ...]], Cloze] = {}
        self._anchors = [(a, self._raw(a)) for a in _ANCHORS]

    def _raw(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def opening(self, text: str) -> tuple[int, ...]:
        """Return the first tokens of a transcript: the special tokens before a text, then `text`.

        If there are none, returns BOS, or else EOS, since a model needs at least one token.
        """
        tokens = self.bos + self._raw(text)
        if not tokens:
            first = [_id(x) for x in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)]
            tokens = tuple(i for i in first if i is not None)[:1]
        if not tokens:
            raise TokenizerError(
                f"the opening {text!r} has no tokens and the tokenizer has no BOS or EOS: the input would be empty"
            )
        return tokens

    def piece(self, text: str) -> tuple[int, ...]:
        """Return the tokens of `text` as the continuation of some other text."""
        found = self._cache.get(text)
        if found is None:
            found = self._cache[text] = self._encode(text) if text else ()
        return found

    def cloze(self, stem: str, choices: tuple[str, ...]) -> Cloze:
        """Return the tokens of a question.

        Raises:
            TokenizerError: a choice is empty.
        """
        found = self._clozes.get((stem, choices))
        if found is None:
            if "" in choices:
                raise TokenizerError(
                    f"choices {choices} of {stem!r} are not possible: expected texts, not an empty one"
                )
            if len(self._clozes) == _CLOZES:
                self._clozes.clear()
            pieces = [self.piece(text) for text in choices]
            found = Cloze.of(self.piece(stem), pieces, [len(text.encode()) for text in choices])
            self._clozes[stem, choices] = found
        return found

    def _encode(self, text: str) -> tuple[int, ...]:
        _, head, whole = self._anchored(text)
        return whole[head:]

    def _anchored(self, text: str) -> tuple[str, int, tuple[int, ...]]:
        """Return an anchor that does not merge with `text`, its number of tokens, and the tokens of both."""
        for anchor, head in self._anchors:
            whole = self._raw(anchor + text)
            if whole[: len(head)] == head and len(whole) > len(head):
                return anchor, len(head), whole
        raise TokenizerError(f"the tokenizer gives {text!r} no tokens of its own behind any of {_ANCHORS}")

    def locate(self, pieces: Sequence[str], span: Span) -> int:
        """Return the position of the last token that overlaps `span`, in the tokens of a prompt made of `segments`.

        Args:
            pieces: opening and continuations, as `nextstate.envs.contrast.segments` cuts a prompt.
            span: characters of one of them.

        Raises:
            TokenizerError: the span is not within its piece, or the tokenizer has no offsets (slow tokenizers).
        """
        number, start, end = span
        if not (0 <= number < len(pieces) and 0 <= start < end <= len(pieces[number])):
            lengths = [len(p) for p in pieces]
            raise TokenizerError(f"{span} is not in the prompt: expected characters of pieces of lengths {lengths}")
        if not self.tokenizer.is_fast:
            raise TokenizerError(f"{type(self.tokenizer).__name__} has no token offsets; use a fast tokenizer")
        text = pieces[number]
        if number == 0:
            anchor, head, before = "", 0, len(self.bos)
        else:
            anchor, head, _ = self._anchored(text)
            before = len(self.opening(pieces[0])) + sum(len(self.piece(p)) for p in pieces[1:number])
        found = self.tokenizer(anchor + text, add_special_tokens=False, return_offsets_mapping=True)
        places = [(a - len(anchor), b - len(anchor)) for a, b in found["offset_mapping"][head:]]
        return before + max(i for i, (a, b) in enumerate(places) if a < end and b > start)

    def natural(self, pieces: tuple[str, ...]) -> bool:
        """Return whether encoding the pieces separately gives the tokens of the whole text."""
        one_by_one = self.opening(pieces[0]) + tuple(t for p in pieces[1:] for t in self.piece(p))
        return one_by_one == self.opening("".join(pieces))
