"""Tokenizers are asked, not assumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nextstate.agents.rollout import episodes_of
from nextstate.agents.text import Encoder, TokenizerError
from nextstate.envs.contrast import Span, segments
from nextstate.envs.game import Episode
from nextstate.envs.games import GAMES, make_game


@pytest.mark.parametrize("name", GAMES)
def test_pieces_are_the_tokens_of_the_whole_text(folders: dict[str, Path], name: str) -> None:
    for architecture, folder in folders.items():
        encoder = Encoder(AutoTokenizer.from_pretrained(folder))
        for episode in episodes_of(make_game(name), range(5), 3):
            segments = (episode.opening, *episode.texts)
            ids = encoder.opening(segments[0]) + tuple(t for p in segments[1:] for t in encoder.piece(p))
            # Not `skip_special_tokens`: letters that a tokenizer has never seen are special tokens, one a byte.
            told = encoder.tokenizer.decode(ids).removeprefix(encoder.tokenizer.bos_token)
            assert told == "".join(segments)
            assert encoder.natural(segments), architecture


def words(*vocabulary: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=vocabulary[0])


def test_without_bos_an_empty_opening_is_an_error() -> None:
    encoder = Encoder(words("?", "a", "b"))
    assert encoder.bos == ()
    with pytest.raises(TokenizerError, match="no BOS"):
        encoder.opening("")


def test_a_piece_without_tokens_of_its_own_is_an_error() -> None:
    encoder = Encoder(words("?", "a", "b"))
    assert encoder.piece(" b") == (2,)
    with pytest.raises(TokenizerError, match="no tokens of its own"):
        encoder.piece(" ")


@pytest.mark.parametrize("name", GAMES)
def test_spans_are_located_at_their_last_token(folders: dict[str, Path], name: str) -> None:
    for architecture, folder in folders.items():
        encoder = Encoder(AutoTokenizer.from_pretrained(folder))
        for kind, design in [(k, d) for k, designs in GAMES[name].contrasts.items() for d in designs]:
            pair = make_game(name).contrast(np.random.default_rng(0), kind, design)
            for episode, spans in zip(pair.sides, zip(*pair.roles.values(), strict=True), strict=True):
                parts = segments(episode)
                assert "".join(parts) == episode.prompt(len(episode.steps) - 1)
                tokens = tokens_of(encoder, episode)
                starts = [len(encoder.opening(parts[0]))]
                for part in parts[1:]:
                    starts.append(starts[-1] + len(encoder.piece(part)))
                for span in spans:
                    at = encoder.locate(parts, span)
                    first = (len(encoder.bos), *starts)[span.piece]
                    assert first <= at < starts[span.piece], architecture
                    # What is told up to that token holds the span, and what is told before it does not.
                    told = [encoder.tokenizer.decode(tokens[first:end]).strip() for end in (at, at + 1)]
                    word = parts[span.piece][: span.end].strip()
                    assert len(told[0]) < len(word) <= len(told[1])
                    assert told[1].startswith(word)


def tokens_of(encoder: Encoder, episode: Episode) -> tuple[int, ...]:
    parts = segments(episode)
    return encoder.opening(parts[0]) + tuple(t for p in parts[1:] for t in encoder.piece(p))


def test_the_end_of_a_pair_is_its_last_token_and_equal_symbols_give_equal_lengths(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        encoder = Encoder(AutoTokenizer.from_pretrained(folder))
        pair = make_game("DFA").contrast(np.random.default_rng(1), "state")
        lengths = [len(tokens_of(encoder, side)) for side in pair.sides]
        assert lengths[0] == lengths[1]
        for side, span, n in zip(pair.sides, pair.roles["last"], lengths, strict=True):
            assert encoder.locate(segments(side), span) == n - 1


@pytest.mark.parametrize("span", [Span(0, 0, 0), Span(0, 2, 9), Span(5, 0, 1), Span(-1, 0, 1)])
def test_a_span_that_is_not_in_the_prompt_is_an_error(folders: dict[str, Path], span: Span) -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(folders["gpt2"]))
    with pytest.raises(TokenizerError, match="not in the prompt"):
        encoder.locate(("Box A.", " Go"), span)
