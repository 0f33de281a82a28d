"""Players and played episodes: laws over every game, and the commands of a model against plain forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from corridor import register

from nextstate.agents.agent import Agent, AgentError, ContextError, OutOfMemory, Prediction, Prompt
from nextstate.agents.human import GivenUp, HumanPlayer, meant
from nextstate.agents.intervene import Intervened
from nextstate.agents.intervention import Intervention
from nextstate.agents.language import LanguageModel
from nextstate.agents.play import (
    AgentPlayer,
    Player,
    Playing,
    RandomPlayer,
    View,
    WalkthroughPlayer,
    asking,
    play,
)
from nextstate.agents.rollout import seeds_for
from nextstate.envs import PlayEnv, make_game
from nextstate.envs.aims import CUE, Aim, shortest
from nextstate.envs.game import Episode, GameError

CASES: list[tuple[str, dict[str, Any], int]] = [
    ("Box", {"boxes": 4}, 6),
    ("Box", {"boxes": 3, "feedback": "inline"}, 5),
    ("DFA", {"states": 6}, 15),
    ("DFA", {"states": 5, "kind": "state-state"}, 12),
    ("Cycle", {"period": 5}, 8),
    ("FruitStore", {"people": 4}, 3),
    ("Corridor", {"rooms": 5}, 12),
    ("Corridor", {"rooms": 6, "helpful": True}, 15),
]


@pytest.fixture(autouse=True)
def corridor(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def optimum(aim: Aim) -> int | None:
    return len(shortest(aim) or ()) or None


def rows(player: Player, case: tuple[str, dict[str, Any], int], episodes: int = 12) -> list[dict[str, Any]]:
    name, settings, steps = case
    return play(player, make_game(name, **settings), seeds_for(1, episodes), steps, optimum).rows


def transcript(episode: Episode) -> list[str]:
    """The pieces of an episode that end in the prompt for the next command."""
    out = [episode.opening]
    for step in episode.steps[:-1]:
        out.append(step.narration)
        for q in step.questions:
            out += [q.stem, q.choices[q.truth], q.closing]
        out.append(step.outcome)
    return [*out, CUE]


def tokens(agent: LanguageModel, pieces: Sequence[str]) -> list[int]:
    first, *others = pieces
    return [*agent.encoder.opening(first), *(t for p in others for t in agent.encoder.piece(p))]


@torch.inference_mode()
def plain(agent: LanguageModel, episode: Episode, choices: Sequence[str]) -> list[float]:
    """Log-probability of each choice behind the transcript, a forward pass each, and nothing clever."""
    head = tokens(agent, transcript(episode))
    out = []
    for text in choices:
        tail = list(agent.encoder.piece(text))
        logits = agent.model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].float().log_softmax(-1)
        out.append(sum(float(logits[k, token]) for k, token in enumerate(tail)))
    return out


class Watched(AgentPlayer):
    """A model that plays, and remembers what it was asked and what it answered."""

    def begin(self) -> Player:
        self.seen: list[tuple[Prompt, Prediction]] = []
        self._reader = Watch(self.agent.live(), self.seen)
        return self


class Watch(Agent):
    def __init__(self, reader: Agent, seen: list[tuple[Prompt, Prediction]]) -> None:
        self.name, self.reader, self.seen = reader.name, reader, seen

    def predict(self, prompts: Sequence[Prompt]) -> list[Prediction]:
        found = self.reader.predict(prompts)
        self.seen += zip(prompts, found, strict=True)
        return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_walkthrough_wins_and_nobody_wins_in_fewer_commands(case: tuple[str, dict[str, Any], int]) -> None:
    known = rows(WalkthroughPlayer(), case)
    drawn = rows(RandomPlayer(), case)
    for way, row in zip(known, drawn, strict=True):
        assert way["optimum"] == row["optimum"]
        if way["optimum"] <= case[2]:
            assert (way["success"], way["ended"], way["score"]) == (True, "won", way["max_score"])
        assert way["illegal"] == row["illegal"] == 0
        for one in (way, row):
            assert one["ended"] in ("won", "lost", "steps")
            assert one["success"] == (one["ended"] == "won")
            assert len(one["commands"]) == len(one["observations"]) == one["steps"] <= case[2]
            assert one["steps_over"] == (one["steps"] - one["optimum"] if one["success"] else None)
            if one["success"]:
                assert one["steps"] >= one["optimum"]
    if not case[1].get("helpful"):
        assert all(way["steps"] == way["optimum"] for way in known)
    assert [d["episode"] for d in drawn] == list(seeds_for(1, 12))


def test_a_walkthrough_of_the_games_own_is_followed_though_there_is_a_shorter_way() -> None:
    known = rows(WalkthroughPlayer(), CASES[-1])
    assert all(row["success"] for row in known)
    assert max(row["steps_over"] for row in known) > 0


def test_a_search_that_grows_too_large_is_said_and_the_optimum_is_unknown() -> None:
    game = make_game("Corridor", rooms=6)
    env = PlayEnv("Corridor", 20, rooms=6)
    env.reset(seed=1)
    assert env.aim is not None
    with pytest.raises(GameError, match=r"max_states=3 is too small to find a solution for 'Take both treasures\.'"):
        shortest(env.aim, 3)
    with pytest.raises(AgentError, match=r"walkthrough of episode .*max_states=3 is too small"):
        play(WalkthroughPlayer(3), game, [1], 20, optimum)


def test_some_episodes_of_a_random_player_are_lost_and_score_in_part() -> None:
    found = rows(RandomPlayer(), ("Corridor", {"rooms": 5}, 30), 60)
    assert {row["ended"] for row in found} >= {"won", "lost"}
    assert {row["score"] for row in found} == {0.0, 1.0, 2.0}
    assert all(row["success"] == (row["score"] == row["max_score"] == 2) for row in found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_random_rows_are_the_same_however_many_are_played_side_by_side(case: tuple[str, dict[str, Any], int]) -> None:
    name, settings, steps = case
    game, seeds = make_game(name, **settings), seeds_for(1, 9)
    whole = play(RandomPlayer(), game, seeds, steps, optimum).rows
    assert whole == [play(RandomPlayer(), game, [seed], steps, optimum).rows[0] for seed in seeds]


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[2], CASES[6]], ids=str)
def test_a_model_that_plays_live_scores_commands_as_plain_forward_passes_do(
    model: LanguageModel, case: tuple[str, dict[str, Any], int]
) -> None:
    player = Watched(model)
    found = rows(player, case, 4)
    assert len({row["steps"] for row in found}) > 1 or case[0] == "Corridor"  # some end earlier than others
    for prompt, prediction in player.seen[:: max(1, len(player.seen) // 8)]:
        choices = prompt.asked.choices
        expected = plain(model, prompt.episode, choices)
        assert prediction.logprobs == pytest.approx(expected, abs=2e-4)
        assert expected[prediction.choice] == pytest.approx(max(expected), abs=2e-4)


def test_a_model_plays_the_same_however_many_are_played_side_by_side(folders: dict[str, Path]) -> None:
    model = LanguageModel(str(folders["gpt2"]), device="cpu")
    name, settings, steps = CASES[2]
    game, seeds = make_game(name, **settings), seeds_for(2, 6)
    whole = play(AgentPlayer(model), game, seeds, steps, optimum).rows
    assert whole == [play(AgentPlayer(model), game, [seed], steps, optimum).rows[0] for seed in seeds]


def test_only_the_transcript_is_kept_between_commands(folders: dict[str, Path]) -> None:
    model = LanguageModel(str(folders["gpt2"]), device="cpu")
    env = PlayEnv("DFA", 12, states=6)
    playing, reader = Playing(env, 3), model.live()
    longest = 0
    while not playing.ended:
        asked = asking(playing.view)
        reader.predict([Prompt(asked, len(asked.steps) - 1)])
        longest = max(longest, len(tokens(model, transcript(asked))))
        playing.take("no command")
    branches = max(len(model.encoder.piece(f" {c}\n")) for c in playing.info["admissible_commands"]) * 6
    assert reader.memory.width <= longest + branches  # type: ignore[attr-defined]
    assert playing.ended == "steps"


@pytest.mark.parametrize("name", ["Corridor", "TextWorld"])
def test_commands_are_asked_for_as_adventures_tell_them(name: str) -> None:
    playing = Playing(PlayEnv(name, 4), 3)
    question = asking(playing.view).steps[-1].questions[0]
    assert question.choices == tuple(f" {command}\n" for command in playing.view.commands)
    before = playing.view.episode.transcripts[-1]
    playing.take(playing.view.commands[0])
    assert playing.view.episode.transcripts[-1].startswith(before + question.stem + question.choices[0])
    assert asking(playing.view, writes=True).steps[-1].questions[0].choices == ()


def test_a_session_answers_a_question_once(folders: dict[str, Path]) -> None:
    model = LanguageModel(str(folders["gpt2"]), device="cpu")
    playing, reader = Playing(PlayEnv("Box", 4), 3), model.live()
    asked = asking(playing.view)
    reader.predict([Prompt(asked, 0)])
    with pytest.raises(AgentError, match="has already answered that question"):
        reader.predict([Prompt(asked, 0)])
    other = replace(asked, seed=99)
    with pytest.raises(AgentError, match="start a new session"):
        reader.predict([Prompt(other, 0)])


def test_hooks_work_while_a_model_plays(folders: dict[str, Path]) -> None:
    model = LanguageModel(str(folders["llama"]), device="cpu")
    case = ("DFA", {"states": 6}, 8)
    without = rows(AgentPlayer(Intervened(model, Intervention(((0, 1), (1, 2))))), case)
    seen = []

    def edit(x: torch.Tensor) -> torch.Tensor:
        seen.append(model.reading.live)
        new = x.clone()
        new[:, :, 1] = 0
        return new

    def second(x: torch.Tensor) -> torch.Tensor:
        new = x.clone()
        new[:, :, 2] = 0
        return new

    whole = rows(AgentPlayer(model), case)
    with model.hooks(("head", 0, edit), ("head", 1, second)):
        hooked = rows(AgentPlayer(model), case)
    assert all(seen)
    assert [r["commands"] for r in hooked] == [r["commands"] for r in without]
    assert [r["commands"] for r in hooked] != [r["commands"] for r in whole]


def test_written_commands_are_what_the_model_generates(folders: dict[str, Path]) -> None:
    for architecture in ("gpt2", "llama"):
        model = LanguageModel(str(folders[architecture]), device="cpu")
        player = Watched(model, writes=True)
        found = rows(player, ("DFA", {"states": 4}, 3), 4)
        assert sum(row["illegal"] for row in found) > 0
        prompts = [prompt for prompt, _ in player.seen[4:8]]
        assert [p.answer for p in model.predict(prompts)] == [p.answer for _, p in player.seen[4:8]]
        for prompt, prediction in player.seen[::3]:
            head = tokens(model, transcript(prompt.episode))
            done = model.model.generate(
                torch.tensor([head]), attention_mask=torch.ones(1, len(head)), max_new_tokens=32, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
            line = model.tokenizer.decode(done[0, len(head) :]).partition("\n")[0].strip()
            eos = model.tokenizer.eos_token
            assert prediction.answer == (line.partition(eos)[0].strip() if eos else line)


def test_what_is_written_in_vain_is_in_the_transcript() -> None:
    playing = Playing(PlayEnv("Box", 4), 3)
    playing.take("sing a song")
    assert playing.view.episode.transcripts[-1] == f"{playing.opening}{CUE} sing a song Nothing happens."
    assert playing.row(1)["illegal"] == 1


def test_transcripts_that_grow_too_long_end_their_episodes_and_it_is_said(folders: dict[str, Path]) -> None:
    model = LanguageModel(str(folders["gpt2"]), device="cpu")
    model.context = 150
    game = make_game("DFA", states=6)
    result = play(AgentPlayer(model, writes=True), game, range(4), 30, optimum)
    assert {row["ended"] for row in result.rows} == {"context"}
    assert "too many" in result.left_out
    assert all(0 < row["steps"] < 30 for row in result.rows)
    assert not any(row["success"] for row in result.rows)


def test_memory_that_runs_out_halves_the_episodes_side_by_side(folders: dict[str, Path]) -> None:
    model = LanguageModel(str(folders["gpt2"]), device="cpu")
    case = ("DFA", {"states": 4}, 6)
    before = rows(AgentPlayer(model), case, 8)
    in_tree, most = model.forward.in_tree, 2

    def small(tokens: Any, *arguments: Any) -> Any:
        if len(tokens) > most:
            raise RuntimeError("CUDA out of memory")
        return in_tree(tokens, *arguments)

    model.forward.in_tree = small  # type: ignore[method-assign]
    assert rows(AgentPlayer(model), case, 8) == before
    most = 0
    with pytest.raises(OutOfMemory, match="1 parallel episodes"):
        rows(AgentPlayer(model), case, 2)


def test_a_model_that_crashes_says_so_as_an_agent(folders: dict[str, Path]) -> None:
    model = LanguageModel(str(folders["gpt2"]), device="cpu")

    def broken(x: torch.Tensor) -> torch.Tensor:
        return x[:, :1]

    with (
        model.hooks(("resid_pre", 1, broken)),
        pytest.raises(AgentError, match="failed on cpu, with 12 parallel episodes"),
    ):
        rows(AgentPlayer(model), ("Box", {"boxes": 4}, 6))


class Said:
    """A person who says what they are told to say; the null twin of a console takes what is printed."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.printed = list(lines), []

    def ask(self, prompt: str) -> str:
        return self.lines.pop(0)

    def print(self, text: Any) -> None:
        self.printed.append(str(text))


def test_a_person_gives_commands_by_words_beginning_or_number() -> None:
    playing = Playing(PlayEnv("Corridor", 9, rooms=5), 2)
    view: View = playing.view
    assert len(view.commands) >= 2
    said = Said("go", "GO  EAST", "dance", "?", "1", "go e", "quit")
    player = HumanPlayer(said, said.ask)  # type: ignore[arg-type]
    assert player.choose([view]) == ["go east"]
    assert said.printed == [f"Which one: {', '.join(c for c in view.commands if c.startswith('go'))}?"]
    assert player.choose([view]) == [view.commands[0]]
    assert "Unknown command" in said.printed[1]
    assert said.printed[2:] == [f"{i}  {c}" for i, c in enumerate(view.commands, start=1)]
    assert player.choose([view]) == ["go east"]
    with pytest.raises(GivenUp):
        player.choose([view])


def test_an_exact_command_wins_over_one_that_it_begins() -> None:
    commands = ["open door", "open door with key", "wait"]
    assert meant("open door", commands) == ["open door"]
    assert meant("open", commands) == commands[:2]
    assert meant("3", commands) == ["wait"]
    assert meant("4", commands) == []


def test_a_prompt_that_is_too_long_names_its_episode(folders: dict[str, Path]) -> None:
    model = LanguageModel(str(folders["gpt2"]), device="cpu")
    model.context = 40
    views = [Playing(PlayEnv("DFA", 4), seed).view for seed in (1, 2)]
    with pytest.raises(ContextError) as caught:
        AgentPlayer(model).begin().choose(views)
    assert caught.value.prompts == (0, 1)
