"""What a player is to reach, a drawn goal or the game's own objective; what leads there, and how it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nextstate.envs.game import Action, Game, GameError, State, Step, require_whole

CUE = "\n\n>"  # before a command, as text adventures have it
NOTHING = " Nothing happens."
MAX_STATES = 20_000  # states that a search for a plan visits


@dataclass(frozen=True)
class Aim:
    """What a player who starts in `start` is to reach.

    Args:
        game: what is played.
        start: where the episode starts.
        goal: (variable, value) of a drawn goal; ("", objective) where the game has an aim of its own.
        words: how the player is told.
    """

    game: Game
    start: State
    goal: tuple[str, str]
    words: str

    @classmethod
    def draw(cls, game: Game, start: State, steps: int, rng: np.random.Generator) -> Aim:
        """Return the game's own aim; where it has none draw one that a walk of `steps` steps reaches."""
        objective = game.objective(start)
        if objective:
            return cls(game, start, ("", objective), objective)
        goal, sentence = draw_goal(game, start, steps, rng)
        return cls(game, start, goal, f"Goal: {sentence}")

    @property
    def own(self) -> bool:
        """Whether it is the game's own."""
        return not self.goal[0]

    @property
    def most(self) -> float:
        """The score of a player who reaches all there is to reach."""
        return float(self.game.most_points(self.start)) if self.own else 1.0

    def reached(self, state: State) -> bool:
        """Tell whether a player who has come to `state` has won."""
        if self.own:
            return self.game.won(state)
        variable, value = self.goal
        return self.game.values(state).get(variable) == value

    def reward(self, state: State, after: State) -> float:
        """Return what is scored on the way from `state` to `after`."""
        if self.own:
            return float(self.game.points(after) - self.game.points(state))
        return float(self.reached(after))


def take(game: Game, state: State, action: Action) -> Step:
    """Return the step that a player takes, with the questions whose answers are told: all where feedback is inline."""
    after = game.transition(state, action)
    asked = game.questions(state, action, after) if game.feedback == "inline" else ()
    return Step(state, action, after, game.narrate(state, action, after), asked, game.outcome(state, action, after))


def refuse(state: State, typed: str) -> Step:
    """Return the step of a player who has typed what is no command here: told, in vain."""
    return Step(state, None, state, f"{CUE} {typed}", (), NOTHING)


def words(step: Step) -> str:
    """Return all that a player reads of a step."""
    return step.narration + "".join(q.stem + q.choices[q.truth] + q.closing for q in step.questions) + step.outcome


def reply(command: str, told: str) -> str:
    """Return what a player reads who has typed `command`: without the command, where the first line tells it again."""
    said = told.strip().removeprefix(CUE.strip()).strip()
    again, _, rest = said.partition("\n")
    return rest.strip() if again.strip().casefold() == command.casefold() else said


def shortest(aim: Aim, max_states: int = MAX_STATES) -> tuple[Action, ...] | None:
    """Return as few actions as lead from the start to the aim, breadth first; None where none do.

    Raises:
        GameError: more than `max_states` states would have to be visited.
    """
    require_whole("max_states", max_states, 1, 100_000_000)
    game = aim.game
    came: dict[State, tuple[State, Action] | None] = {aim.start: None}
    queue = [aim.start]
    for state in queue:  # grows as it is walked
        for action in game.actions(state):
            after = game.transition(state, action)
            if aim.reached(after):
                return (*_way(came, state), action)
            if after in came:
                continue
            if len(came) == max_states:
                raise GameError(
                    f"max_states={max_states} is not enough to find a way to {aim.words!r} in {game.name} "
                    f"{game.settings}: raise max_states, or make the game smaller"
                )
            came[after] = (state, action)
            queue.append(after)
    return None


def plan(aim: Aim, max_states: int = MAX_STATES) -> tuple[Action, ...]:
    """Return actions that lead to the aim: the game's own walkthrough where it gives one that does, else the fewest.

    Raises:
        GameError: no actions lead there, or more than `max_states` states would have to be visited to find some.
    """
    given = aim.game.walkthrough(aim.start) if aim.own else ()
    found = given if leads(aim, given) else shortest(aim, max_states)
    if not found:
        raise GameError(f"no commands lead to {aim.words!r} in {aim.game.name} {aim.game.settings}")
    return found


def leads(aim: Aim, actions: Sequence[Action]) -> bool:
    """Tell whether some actions, all of them legal, lead from the start to the aim, and no fewer of them do."""
    state = aim.start
    for k, action in enumerate(actions, start=1):
        if action not in aim.game.actions(state):
            return False
        state = aim.game.transition(state, action)
        if aim.reached(state):
            return k == len(actions)
    return False


def draw_goal(game: Game, start: State, steps: int, rng: np.random.Generator) -> tuple[tuple[str, str], str]:
    """Draw a (variable, value) that a walk from `start` reaches, and say it in the words of the game's own question."""
    walk = [start]
    for u in rng.random(steps).tolist():
        if not game.actions(walk[-1]):
            break
        walk.append(game.transition(walk[-1], game.policy(walk[-1], u)))
    now = game.values(start)
    new: list[tuple[str, str]] = []
    while len(walk) > 1 and not new:
        new = [item for item in game.values(walk.pop()).items() if now.get(item[0]) != item[1]]
    new = new or list(now.items())
    goal = new[int(rng.integers(len(new)))]
    return goal, _sentence(game, start, goal)


@lru_cache(maxsize=4096)
def positions(choices: tuple[str, ...]) -> dict[str, int]:
    """Return the index of each choice by its words, without surrounding white space."""
    return {choice.strip(): i for i, choice in enumerate(choices)}


def _sentence(game: Game, start: State, goal: tuple[str, str]) -> str:
    """Fill the blank of a question about the goal's variable; a game may ask it only after some of the first steps."""
    variable, value = goal
    for action in game.actions(start):
        for question in game.questions(start, action, game.transition(start, action)):
            index = positions(question.choices).get(value)
            if question.variable == variable and index is not None:
                return f"{question.stem}{question.choices[index]}{question.closing}".strip()
    return f"{variable}: {value}"


def _way(came: dict[State, tuple[State, Action] | None], state: State) -> tuple[Action, ...]:
    out: list[Action] = []
    while (step := came[state]) is not None:
        state, action = step
        out.append(action)
    return tuple(out[::-1])
