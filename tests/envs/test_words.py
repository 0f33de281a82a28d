"""Words, to the byte: published formats, and a golden playthrough of every game in every wording.

After a change of words that is meant: `NEXTSTATE_GOLDEN=write pytest tests/envs/test_words.py`; read what changed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from every_game import label, variants

from nextstate.envs import Episode, Game, Step, make_game, unroll
from nextstate.envs.game import Action, State
from nextstate.envs.games.cycle import Phase
from nextstate.envs.games.fruit import FRUITS, NAMES, Clue, Store
from nextstate.envs.games.machine import Machine, Place

GOLDEN = Path(__file__).parent / "golden"


def play(game: Game, start: State, actions: Sequence[Action]) -> Episode:
    """Return the episode of these actions, with every question."""
    steps, state = [], start
    for action in actions:
        after = game.transition(state, action)
        asked = game.questions(state, action, after)
        steps.append(Step(state, action, after, game.narrate(state, action, after), asked))
        state = after
    return Episode(game, 0, start, game.opening(start), tuple(steps))


def ask(episode: Episode, variable: str) -> str:
    """Return the prompt of the question about `variable` after the last step."""
    last = len(episode.steps) - 1
    return episode.prompt(last, [q.variable for q in episode.steps[last].questions].index(variable))


def test_box_as_published() -> None:
    episode = play(make_game("Box", boxes=3, objects=2), (0, 2), [(1, 1)])
    facts = "Box A contains the hat. Box C contains the glove."
    assert ask(episode, "hat") == f"{facts} Move the glove into Box B. Hat is in the Box"
    assert ask(episode, "glove") == f"{facts} Move the glove into Box B. Glove is in the Box"
    assert [q.choices[q.truth] for q in episode.steps[0].questions] == [" A", " B"]


def test_box_facts_are_in_box_order() -> None:
    assert make_game("Box", boxes=3, objects=3).opening((2, 0, 2)) == (
        "Box A contains the glove. Box C contains the hat. Box C contains the ball."
    )


def test_box_inline_keeps_the_answer() -> None:
    game = make_game("Box", boxes=2, objects=1, feedback="inline")
    episode = play(game, (0,), [(0, 1), (0, 0)])
    assert episode.prompt(1) == (
        "Box A contains the hat. Move the hat into Box B. Hat is in the Box B. "
        "Move the hat into Box A. Hat is in the Box"
    )


def test_box_plain() -> None:
    episode = play(make_game("Box", boxes=2, objects=1, style="plain"), (0,), [(0, 1)])
    assert episode.prompt(0) == "The hat is in Box A. The hat goes to Box B. The hat is in Box"


MACHINE = Machine(("a", "c", "x", "m"), ("L", "K", "Z", "O"), (((3, 2),), ((0, 3),), ((1, 3),), ((2, 1), (3, 0))), 3)


def test_dfa_state_action_as_published() -> None:
    episode = play(make_game("DFA", actions_listed=4), Place(MACHINE, 3), [2, 0, 3])
    assert episode.prompt(2) == (
        "States: {a,c,x,m}\nActions:{L,K,Z,O}\nSequence: Start at state m. Take action Z, go to state c. "
        "Take action L, go to state m. Take action O, go to state"
    )
    assert episode.transcripts[-1] == episode.prompt(2) + " a."


def test_dfa_state_state_as_published() -> None:
    episode = play(make_game("DFA", kind="state-state", actions_listed=4), Place(MACHINE, 3), [2, 0])
    assert episode.prompt(1) == "States: {a,c,x,m}\nSequence: Start at state m. Go to state c. Go to state"
    assert episode.steps[0].questions[0].accepted == (0, 1)  # every successor counts
    assert episode.steps[1].questions[0].accepted == (3,)


def test_cycle_as_published() -> None:
    episode = play(make_game("Cycle", period=3), Phase((3, 0, 25), 0), ["next"] * 4)
    assert episode.prompt(3) == "d a z d"
    assert episode.steps[3].questions[0].choices[0] == " a"
    assert episode.steps[3].questions[0].accepted == (0,)


def test_fruit_store_as_published() -> None:
    people = tuple(map(NAMES.index, ("Jack", "Dean", "Sarah")))
    fruits = tuple(map(FRUITS.index, ("peach", "pear", "apple")))
    start = Store(people, fruits, (None, None, None))
    episode = play(make_game("FruitStore", people=3), start, [Clue(2, 2, None), Clue(0, 0, 1)])
    assert ask(episode, "Dean") == (
        "Jack, Dean, Sarah walk into a fruit store. There are only 3 fruits peach, pear, apple. Each person gets a "
        "different fruit. Sarah gets the apple. Dean gives Jack the peach. Dean can have the"
    )
    assert [q.variable for q in episode.steps[0].questions] == ["Jack", "Dean"]
    assert episode.steps[0].questions[0].accepted == (0, 1)
    assert episode.steps[1].questions[0].accepted == (1,)


def playthrough(game: Game) -> str:
    """Tell three episodes with all their questions; the blank is where the answer belongs."""
    lines = [f"{game.name} {game.settings}"]
    for seed in range(3):
        episode = unroll(game, seed, min(4, game.max_steps or 4), ask="all")
        lines += ["", f"== seed {seed}", episode.opening]
        for step, belief in zip(episode.steps, episode.beliefs("ideal"), strict=True):
            lines += ["", f"> {game.command(step.state, step.action)}", f"  {step.narration!r}"]
            for question, ideal in zip(step.questions, belief, strict=True):
                right = "|".join(question.choices[i].strip() for i in question.accepted)
                likely = "|".join(
                    c.strip() for c, p in zip(question.choices, ideal, strict=True) if p > max(ideal) - 1e-9
                )
                lines.append(f"  {question.stem!r} ___{question.closing}  {question.answer} of {right}; ideal {likely}")
        lines += ["", "= " + episode.transcripts[-1]]
    return "\n".join(lines) + "\n"


def test_golden_playthrough(game: Game) -> None:
    path = GOLDEN / f"{label(game)}.txt"
    if os.environ.get("NEXTSTATE_GOLDEN") == "write":
        path.write_text(playthrough(game), encoding="utf-8", newline="\n")
    assert path.read_bytes().decode() == playthrough(game)


def test_every_golden_file_is_of_a_game_that_there_is() -> None:
    assert {p.stem for p in GOLDEN.glob("*.txt")} == {label(game) for game in variants(5)}
