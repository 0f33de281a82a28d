"""The built-in model shows the phenomenon: it tracks small systems and loses large ones."""

from __future__ import annotations

import pytest

from nextstate.agents.language import BUILT_IN, LanguageModel
from nextstate.agents.rollout import accuracy, episodes_of, replay, seeds_for
from nextstate.envs.games import make_game

EPISODES = 60


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("nextstate/tiny", device="cpu")


def determined(agent: LanguageModel, game: str, steps: int, **settings: object) -> float:
    """Greedy accuracy on determined questions, where the ceiling is 1."""
    episodes = episodes_of(make_game(game, **settings), seeds_for(77, EPISODES), steps)
    return accuracy([r for r in replay(agent, episodes).rows if r["determined"]])


def test_it_is_small(tiny: LanguageModel) -> None:
    assert tiny.describe()["parameters"] <= 4_000_000
    assert sum(f.stat().st_size for f in BUILT_IN["nextstate/tiny"].iterdir()) <= 10_000_000
    assert (BUILT_IN["nextstate/tiny"] / "README.md").is_file()


@pytest.mark.parametrize("boxes", [2, 3, 4])
def test_few_boxes_and_moves_are_easy(tiny: LanguageModel, boxes: int) -> None:
    assert determined(tiny, "Box", 4, boxes=boxes) >= 0.9


@pytest.mark.parametrize("states", [2, 3, 4])
def test_few_states_are_easy(tiny: LanguageModel, states: int) -> None:
    assert determined(tiny, "DFA", 20, states=states) >= 0.9


def test_many_boxes_and_states_are_clearly_harder(tiny: LanguageModel) -> None:
    assert determined(tiny, "Box", 10, boxes=16, objects=10) < determined(tiny, "Box", 4, boxes=4) - 0.15
    assert determined(tiny, "DFA", 20, states=16) < determined(tiny, "DFA", 20, states=4) - 0.15


def test_any_text_can_be_encoded(tiny: LanguageModel) -> None:
    for text in ("Ωmega \N{SNOWMAN} naïve", "\x00\x01", "日本語"):
        assert tiny.tokenizer.decode(tiny.encoder.opening(text), skip_special_tokens=True) == text
