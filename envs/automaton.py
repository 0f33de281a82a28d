"""Games explored breadth-first into explicit automata: exact sizes, diameter, minimal automaton, fast steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np

from nextstate.envs.game import Action, Feedback, Game, GameError, Question, Reader, State, require_whole
from nextstate.envs.games import make_game

SEEDS = 10_000  # searched for an episode that starts in state 0 of an automaton
CHUNK = 4_000_000  # distances held in memory while the diameter is computed: 32 MB


@final
@dataclass(frozen=True, eq=False)
class Automaton(Game):
    """The part of a game that can be reached from one state, as tables. An automaton is itself a game.

    Its states are integers, in the order of a breadth-first search that takes actions in the game's order. Actions and
    texts are those of the game. An episode starts in the state that the game draws, if the automaton has it, and else
    in state 0; an automaton of a whole game therefore plays the same episodes for the same seeds.

    Created by `Automaton.explore`. Automata are compared by identity.
    """

    name: ClassVar[str] = "Automaton"
    size: ClassVar[str] = "n_states"
    shortcuts: ClassVar[tuple[str, ...]] = ()  # each instance has those of its game
    feedbacks: ClassVar[tuple[Feedback, ...]] = ("branch", "inline")

    game: Game | None = None
    states: tuple[State, ...] = ()
    legal: tuple[tuple[Action, ...], ...] = ()  # the legal actions of each state
    targets: tuple[tuple[int, ...], ...] = ()  # the next state of each of these actions

    def __post_init__(self) -> None:
        # The texts are those of the game, and so are its styles and feedbacks.
        for field in ("style", "feedback", "shortcuts", "feedbacks", "styles"):
            object.__setattr__(self, field, getattr(self._game, field))

    @classmethod
    def explore(cls, game: Game, max_states: int = 100_000, seed: int = 0, start: State | None = None) -> Automaton:
        """Explore `game` from `start`, by default the initial state of the episode of `seed`.

        Raises:
            GameError: more than `max_states` states can be reached.
        """
        require_whole("max_states", max_states, 1, 100_000_000)
        first = game.initial(np.random.default_rng(seed)) if start is None else start
        index: dict[State, int] = {first: 0}
        queue, legal, targets = [first], list[tuple[Action, ...]](), list[tuple[int, ...]]()
        for state in queue:  # the loop appends to the queue
            actions = tuple(game.actions(state))
            row = []
            for action in actions:
                after = game.transition(state, action)
                at = index.get(after)
                if at is None:
                    at = index[after] = len(queue)
                    if at == max_states:
                        raise GameError(
                            f"max_states={max_states} is too small for {game}: more states can be reached "
                            f"(found after exploring {len(legal)} of them). Raise max_states, or make the game smaller."
                        )
                    queue.append(after)
                row.append(at)
            legal.append(actions)
            targets.append(tuple(row))
        return cls(game=game, states=tuple(queue), legal=tuple(legal), targets=tuple(targets))

    def save(self, path: str | Path) -> None:
        """Write the automaton as JSON: the game's name and settings, a seed that starts in state 0, and the targets.

        Raises:
            GameError: no episode of the first 10,000 seeds starts in state 0.
        """
        game, first = self._game, self.states[0]
        seeds = (seed for seed in range(SEEDS) if game.initial(np.random.default_rng(seed)) == first)
        seed = next(seeds, None)
        if seed is None:
            raise GameError(f"{path}: no episode of {game.name} with a seed below {SEEDS:,} starts at {first!r}")
        data = {"game": game.name, "settings": game.settings, "seed": seed, "targets": self.targets}
        written = Path(path).with_name(f".{Path(path).name}.part")
        written.write_text(json.dumps(data), encoding="utf-8")
        written.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Automaton:
        """Read a file written by `save`; states are recovered by following the table, without exploring again.

        Raises:
            GameError: the file does not exist, or does not match its game.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            game, rows = make_game(data["game"], **data["settings"]), data["targets"]
            states: dict[int, State] = {0: game.initial(np.random.default_rng(data["seed"]))}
            legal = []
            for i, row in enumerate(rows):  # each state is a target of an earlier state
                actions = tuple(game.actions(states[i]))
                legal.append(actions)
                for action, target in zip(actions, row, strict=True):
                    if target not in states:
                        states[target] = game.transition(states[i], action)
            ordered = tuple([states[i] for i in range(len(rows))])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GameError(f"{path} is not an automaton of this version: {error}; explore it again") from error
        return cls(game=game, states=ordered, legal=tuple(legal), targets=tuple(tuple(row) for row in rows))

    @property
    def _game(self) -> Game:
        if self.game is None:
            raise GameError("this automaton has no game: create one with Automaton.explore(game)")
        return self.game

    @property
    def n_states(self) -> int:
        """|Q|, the number of states."""
        return len(self.states)

    @property
    def n_transitions(self) -> int:
        """|T|, the number of pairs (state, legal action)."""
        return sum(map(len, self.targets))

    @cached_property
    def diameter(self) -> int:
        """The largest distance from a state to another that it can reach; 0 if there are no such states."""
        # Imported here, since environments do not need it.
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import shortest_path

        n = self.n_states
        begins = np.cumsum([0, *map(len, self.targets)])
        flat = np.array([t for row in self.targets for t in row], dtype=np.int64)
        graph = csr_array((np.ones(len(flat)), flat, begins), shape=(n, n))
        graph.sum_duplicates()
        longest = 0
        rows = max(1, CHUNK // n)
        for low in range(0, n, rows):
            far = shortest_path(graph, unweighted=True, indices=np.arange(low, min(low + rows, n)))
            longest = max(longest, int(far[np.isfinite(far)].max()))
        return longest

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """The equivalence class of each state; equivalent states have the same commands and cannot be distinguished.

        A sequence of commands distinguishes two states if `values` differ after it. Classes are numbered in the order
        of their first states. Computed by partition refinement (Moore 1956, Gedanken-experiments).
        """
        game = self._game
        commands = [[game.command(s, a) for a in actions] for s, actions in zip(self.states, self.legal, strict=True)]
        edges = [sorted(zip(words, row, strict=True)) for words, row in zip(commands, self.targets, strict=True)]
        seen = [
            (tuple(sorted(game.values(state).items())), tuple([word for word, _ in row]))
            for state, row in zip(self.states, edges, strict=True)
        ]
        now, count = _number(seen)
        while True:
            finer = [(now[i], tuple([now[t] for _, t in row])) for i, row in enumerate(edges)]
            now, more = _number(finer)
            if more == count:
                return tuple(now)
            count = more

    def minimal(self) -> Automaton:
        """Return the smallest equivalent automaton: one state for each class, the first of its states."""
        classes = self.classes
        firsts = [classes.index(c) for c in range(max(classes) + 1)]
        return Automaton(
            game=self._game,
            states=tuple([self.states[i] for i in firsts]),
            legal=tuple([self.legal[i] for i in firsts]),
            targets=tuple([tuple([classes[t] for t in self.targets[i]]) for i in firsts]),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the explored game, and its name."""
        return {"game": self._game.name, **self._game.settings}

    @property
    def max_steps(self) -> int | None:
        return self._game.max_steps

    @property
    def max_choices(self) -> int:
        return self._game.max_choices

    @cached_property
    def _after(self) -> tuple[dict[Action, int], ...]:
        rows = zip(self.legal, self.targets, strict=True)
        return tuple([dict(zip(actions, row, strict=True)) for actions, row in rows])

    @cached_property
    def _index(self) -> dict[State, int]:
        return {state: i for i, state in enumerate(self.states)}

    def initial(self, rng: np.random.Generator) -> int:
        return self._index.get(self._game.initial(rng), 0)

    def actions(self, state: State) -> Sequence[Action]:
        return self.legal[_at(state)]

    def transition(self, state: State, action: Action) -> int:
        return self._after[_at(state)][action]

    def policy(self, state: State, u: float) -> Action:
        return self._game.policy(self.states[_at(state)], u)

    def values(self, state: State) -> Mapping[str, str]:
        return self._game.values(self.states[_at(state)])

    def opening(self, state: State) -> str:
        return self._game.opening(self.states[_at(state)])

    def narrate(self, state: State, action: Action, next_state: State) -> str:
        return self._game.narrate(self.states[_at(state)], action, self.states[_at(next_state)])

    def questions(self, state: State, action: Action, next_state: State) -> tuple[Question, ...]:
        return self._game.questions(self.states[_at(state)], action, self.states[_at(next_state)])

    def command(self, state: State, action: Action) -> str:
        return self._game.command(self.states[_at(state)], action)

    def outcome(self, state: State, action: Action, next_state: State) -> str:
        return self._game.outcome(self.states[_at(state)], action, self.states[_at(next_state)])

    def size_of(self, state: State) -> int:
        return self.n_states

    def objective(self, state: State) -> str:
        return self._game.objective(self.states[_at(state)])

    def points(self, state: State) -> int:
        return self._game.points(self.states[_at(state)])

    def most_points(self, state: State) -> int:
        return self._game.most_points(self.states[_at(state)])

    def won(self, state: State) -> bool:
        return self._game.won(self.states[_at(state)])

    def walkthrough(self, state: State) -> tuple[Action, ...]:
        return self._game.walkthrough(self.states[_at(state)])

    @property
    def ideal_is_bayes(self) -> bool:
        return self._game.ideal_is_bayes

    def reader(self, state: State) -> Reader:
        return self._game.reader(self.states[_at(state)])


def _number(keys: Sequence[object]) -> tuple[list[int], int]:
    """Number distinct keys in order of first appearance; return the number of each key, and the count."""
    seen: dict[object, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys], len(seen)


def _at(state: State) -> int:
    assert isinstance(state, int)
    return state
