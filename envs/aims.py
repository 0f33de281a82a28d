"""Aims of players: a drawn goal or the game's own objective; plans that reach them, and the text of a played step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nextstate.envs.game import Action, Game, GameError, State, Step, require_whole

CUE = "\n\n>"  # precedes a command, as in text adventures
NOTHING = " Nothing happens."
MAX_STATES = 20_000  # maximum number of states that a search for a plan visits


@dataclass(frozen=True)
class Aim:
    """The aim of a player who starts in `start`.

    Args:
        game: the game.
        start: the initial state of the episode.
        goal: (variable, value) of a drawn goal; ("", objective) if the game has its own objective.
        words: the text that states the aim.
    """

    game: Game
    start: State
    goal: tuple[str, str]
    words: str

    @classmethod
    def draw(cls, game: Game, start: State, steps: int, rng: np.random.Generator) -> Aim:
        """Return the game's own objective; if it has none, draw a goal that a walk of `steps` steps reaches."""
        objective = game.objective(start)
        if objective:
            return cls(game, start, ("", objective), objective)
        goal, sentence = draw_goal(game, start, steps, rng)
        return cls(game, start, goal, f"Goal: {sentence}")

    @property
    def own(self) -> bool:
        """Whether the aim is the game's own objective."""
        return not self.goal[0]

    @property
    def most(self) -> float:
        """The maximum score."""
        return float(self.game.most_points(self.start)) if self.own else 1.0

    def reached(self, state: State) -> bool:
        """Return whether a player in `state` has reached the aim."""
        if self.own:
            return self.game.won(state)
        variable, value = self.goal
        return self.game.values(state).get(variable) == value

    def reward(self, state: State, after: State) -> float:
        """Return the reward of the transition from `state` to `after`."""
        if self.own:
            return float(self.game.points(after) - self.game.points(state))
        return float(self.reached(after))


def take(game: Game, state: State, action: Action) -> Step:
    """Return the step of a player's action; with inline feedback it has all questions, otherwise none."""
    after = game.transition(state, action)
    asked = game.questions(state, action, after) if game.feedback == "inline" else ()
    return Step(state, action, after, game.narrate(state, action, after), asked, game.outcome(state, action, after))


def refuse(state: State, typed: str) -> Step:
    """Return the step of an illegal command: the state does not change."""
    return Step(state, None, state, f"{CUE} {typed}", (), NOTHING)


def words(step: Step) -> str:
    """Return the complete text of a step."""
    return step.narration + "".join(q.stem + q.choices[q.truth] + q.closing for q in step.questions) + step.outcome


def reply(command: str, text: str) -> str:
    """Return the text that answers `command`; a first line that only repeats the command is removed."""
    text = text.strip().removeprefix(CUE.strip()).strip()
    first, _, rest = text.partition("\n")
    return rest.strip() if first.strip().casefold() == command.casefold() else text


def shortest(aim: Aim, max_states: int = MAX_STATES) -> tuple[Action, ...] | None:
    """Return a shortest sequence of actions from the start to the aim, by breadth-first search; None if there is none.

    Raises:
        GameError: more than `max_states` states would have to be visited.
    """
    require_whole("max_states", max_states, 1, 100_000_000)
    game = aim.game
    came: dict[State, tuple[State, Action] | None] = {aim.start: None}
    queue = [aim.start]
    for state in queue:  # the loop appends to the queue
        for action in game.actions(state):
            after = game.transition(state, action)
            if aim.reached(after):
                return (*_way(came, state), action)
            if after in came:
                continue
            if len(came) == max_states:
                raise GameError(
                    f"max_states={max_states} is too small to find a solution for {aim.words!r} in {game.name} "
                    f"{game.settings}: raise max_states, or make the game smaller"
                )
            came[after] = (state, action)
            queue.append(after)
    return None


def plan(aim: Aim, max_states: int = MAX_STATES) -> tuple[Action, ...]:
    """Return actions that reach the aim: the game's own walkthrough if it does, else a shortest sequence.

    Raises:
        GameError: the aim cannot be reached, or more than `max_states` states would have to be visited.
    """
    given = aim.game.walkthrough(aim.start) if aim.own else ()
    found = given if leads(aim, given) else shortest(aim, max_states)
    if not found:
        raise GameError(f"no commands lead to {aim.words!r} in {aim.game.name} {aim.game.settings}")
    return found


def leads(aim: Aim, actions: Sequence[Action]) -> bool:
    """Return whether all actions are legal, and the aim is reached with the last one and not before."""
    state = aim.start
    for k, action in enumerate(actions, start=1):
        if action not in aim.game.actions(state):
            return False
        state = aim.game.transition(state, action)
        if aim.reached(state):
            return k == len(actions)
    return False


def draw_goal(game: Game, start: State, steps: int, rng: np.random.Generator) -> tuple[tuple[str, str], str]:
    """Draw a (variable, value) that a walk from `start` reaches; return it with its text, a completed question."""
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
    """Return the index of each choice by its text, without surrounding white space."""
    return {choice.strip(): i for i, choice in enumerate(choices)}


def _sentence(game: Game, start: State, goal: tuple[str, str]) -> str:
    """Complete a question about the goal's variable; some games ask about it only after some of the first steps."""
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
