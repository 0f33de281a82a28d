"""Tokenizers are asked, not assumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nextstate.agents.rollout import episodes_of
from nextstate.agents.text import Encoder, TokenizerError
from nextstate.envs.games import GAMES, make_game


@pytest.mark.parametrize("name", GAMES)
def test_pieces_are_the_tokens_of_the_whole_text(folders: dict[str, Path], name: str) -> None:
    for architecture, folder in folders.items():
        encoder = Encoder(AutoTokenizer.from_pretrained(folder))
        for episode in episodes_of(make_game(name), range(5), 3):
            pieces = (episode.opening, *episode.told)
            ids = encoder.opening(pieces[0]) + tuple(t for p in pieces[1:] for t in encoder.piece(p))
            assert encoder.tokenizer.decode(ids, skip_special_tokens=True) == "".join(pieces)
            assert encoder.natural(pieces), architecture


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
