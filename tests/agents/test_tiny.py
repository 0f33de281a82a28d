"""The built-in model shows the phenomenon: it tracks small systems and loses large ones."""

from __future__ import annotations

import pytest

from nextstate.agents.identity import BUILT_IN
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import determined_accuracy, episodes_of, prompts_of, seeds_for
from nextstate.envs.games import make_game

EPISODES = 60


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("nextstate/tiny", device="cpu")


def determined(agent: LanguageModel, game: str, steps: int, **settings: object) -> float:
    """Greedy accuracy on determined questions, where the ceiling is 1."""
    episodes = episodes_of(make_game(game, **settings), seeds_for(77, EPISODES), steps)
    return determined_accuracy(agent, episodes)


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
    assert determined(tiny, "DFA", 50, states=20) < determined(tiny, "DFA", 20, states=4) - 0.15


def test_any_text_can_be_encoded(tiny: LanguageModel) -> None:
    for text in ("Ωmega \N{SNOWMAN} naïve", "\x00\x01", "日本語"):
        assert tiny.tokenizer.decode(tiny.encoder.opening(text), skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("game", "settings", "steps"), [("Box", {"boxes": 4}, 4), ("DFA", {"states": 4, "symbols": "pairs"}, 8)]
)
def test_greedy_answers_are_what_generation_writes(
    tiny: LanguageModel, game: str, settings: dict[str, object], steps: int
) -> None:
    """An independent road: the plain prompt through tokenizer and `generate`, as any user of transformers would."""
    for episode in episodes_of(make_game(game, **settings), seeds_for(5, 4), steps):
        prompts = prompts_of(episode)
        for prompt, prediction in zip(prompts, tiny.predict(prompts), strict=True):
            text = tiny.tokenizer.bos_token + episode.prompt(prompt.step, prompt.question)
            inputs = tiny.tokenizer(text, return_tensors="pt", add_special_tokens=False)
            right = prompt.asked.choices[max(prediction.greedy, 0)]
            wanted = tiny.encoder.piece(right)
            out = tiny.model.generate(**inputs, max_new_tokens=len(wanted), do_sample=False)
            written = tiny.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
            assert (written == right) == (prediction.greedy >= 0), (written, prediction)
