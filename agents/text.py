"""Text to tokens, piece by piece, so that a transcript always has the same tokens however far it has got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nextstate.envs.contrast import Span

_ANCHORS = ("a", ".", "1", "\n", "A b")


class TokenizerError(ValueError):
    """A tokenizer cannot be used as asked; the message says for which text."""


class Encoder:
    """Encodes an opening, and pieces that continue a text.

    A piece is encoded behind a short anchor whose tokens are then cut off, which asks the tokenizer how it writes the
    piece in the middle of a text (leading spaces, SentencePiece markers) instead of assuming it. Pieces never merge
    with their neighbours, so that live and replayed transcripts, and all choices of one question, have the same tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.bos: tuple[int, ...] = () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)
        self._cache: dict[str, tuple[int, ...]] = {}
        self._anchors = [(a, self._raw(a)) for a in _ANCHORS]

    def _raw(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def opening(self, text: str) -> tuple[int, ...]:
        """Return the tokens a transcript begins with: BOS where the tokenizer has one, then `text`."""
        tokens = self.bos + self._raw(text)
        if not tokens:
            raise TokenizerError(
                f"the opening {text!r} has no tokens and the tokenizer has no BOS: nothing to read from"
            )
        return tokens

    def piece(self, text: str) -> tuple[int, ...]:
        """Return the tokens of `text` as the continuation of some other text."""
        if text not in self._cache:
            self._cache[text] = self._encode(text) if text else ()
        return self._cache[text]

    def _encode(self, text: str) -> tuple[int, ...]:
        _, head, whole = self._anchored(text)
        return whole[head:]

    def _anchored(self, text: str) -> tuple[str, int, tuple[int, ...]]:
        """Return an anchor that stays apart from `text`, how many tokens it has, and the tokens of both."""
        for anchor, head in self._anchors:
            whole = self._raw(anchor + text)
            if whole[: len(head)] == head and len(whole) > len(head):
                return anchor, len(head), whole
        raise TokenizerError(f"the tokenizer gives {text!r} no tokens of its own behind any of {_ANCHORS}")

    def locate(self, pieces: Sequence[str], span: Span) -> int:
        """Return the position of the last token that overlaps `span`, in the tokens of a prompt made of `pieces`.

        Args:
            pieces: opening and continuations, as `nextstate.envs.contrast.pieces` cuts a prompt.
            span: characters of one of them.

        Raises:
            TokenizerError: the span is not within its piece, or the tokenizer does not tell which characters a token
                stands for (a slow one).
        """
        number, start, end = span
        if not (0 <= number < len(pieces) and 0 <= start < end <= len(pieces[number])):
            lengths = [len(p) for p in pieces]
            raise TokenizerError(f"{span} is not in the prompt: expected characters of pieces of lengths {lengths}")
        if not self.tokenizer.is_fast:
            raise TokenizerError(f"{type(self.tokenizer).__name__} does not tell where its tokens are; use a fast one")
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
        """Tell whether encoding the pieces one by one gives the tokens of the whole text."""
        one_by_one = self.opening(pieces[0]) + tuple(t for p in pieces[1:] for t in self.piece(p))
        return one_by_one == self.opening("".join(pieces))
