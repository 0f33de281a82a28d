"""The automata of the DFA game, and the settings that they are drawn with."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np

from nextstate.envs.game import Game, Question, Step, require, require_whole
from nextstate.envs.games.dfa_readers import MOST_STATES

LETTERS = tuple(string.ascii_lowercase)
LOWER = {"letters": LETTERS, "pairs": tuple(map("".join, product(LETTERS, repeat=2)))}
UPPER = {kind: tuple(s.upper() for s in symbols) for kind, symbols in LOWER.items()}
DENSITIES = ("min", "middle", "max")
KINDS = ("state-action", "state-state")
GENERATORS = ("default", "paper")
IDEALS = ("bayes", "lookup")
PUBLISHED_ACTIONS = {"letters": 26, "pairs": 400}  # listed in the published prompts
Row = tuple[tuple[int, int], ...]  # pairs (action, target) of a state, actions ascending


@dataclass(frozen=True)
class Machine:
    """One drawn automaton: its symbols in the order in which they are listed, its table, and where walks begin."""

    states: tuple[str, ...]
    actions: tuple[str, ...]
    table: tuple[Row, ...]
    start: int

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.states, self.actions, self.table, self.start))

    @cached_property
    def legal(self) -> tuple[tuple[int, ...], ...]:
        """For each state the actions it has."""
        return tuple(tuple([a for a, _ in row]) for row in self.table)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """The states of the walk, one object each."""
        return tuple([Place(self, at) for at in range(len(self.states))])

    @cached_property
    def after(self) -> tuple[dict[int, Place], ...]:
        """For each state where each action leads."""
        places = self.places
        return tuple([{a: places[target] for a, target in row} for row in self.table])

    @cached_property
    def values(self) -> tuple[Mapping[str, str], ...]:
        """For each state what it shows."""
        return tuple([{"state": s} for s in self.states])

    @cached_property
    def narrations(self) -> tuple[str, ...]:
        """For each action its words."""
        return tuple([f" Take action {a}," for a in self.actions])

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """The states as answers."""
        return tuple([f" {s}" for s in self.states])

    @cached_property
    def taken(self) -> dict[tuple[int, int, str], Step]:
        """Each step taken so far, by state, index of the action, and kind of game: walks come by again and again."""
        return {}

    @cached_property
    def whither(self) -> tuple[tuple[Question, ...], ...]:
        """For each next state the question after a told action."""
        return tuple([(Question("state", " go to state", self.choices, t, (t,)),) for t in range(len(self.states))])

    @cached_property
    def onward(self) -> tuple[dict[int, tuple[Question, ...]], ...]:
        """For each state and next state the question after an action that was not told."""
        reach = [tuple(sorted({t for _, t in row})) for row in self.table]
        return tuple(
            [{t: (Question("state", " Go to state", self.choices, t, targets),) for t in targets} for targets in reach]
        )


class Place(NamedTuple):
    """A state: which automaton, and where in it."""

    machine: Machine
    at: int


@dataclass(frozen=True)
class DFASettings(Game):
    """The settings of the DFA game; documented in `nextstate.envs.games.dfa.DFA`."""

    states: int = 4
    density: str = "middle"
    edges: int | None = None
    actions_listed: int = 26
    symbols: str = "letters"
    kind: str = "state-action"
    generator: str = "default"
    ideal: str = "bayes"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.symbols in LOWER, "symbols", self.symbols, f"one of {', '.join(LOWER)}")
        require(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        require(self.density in DENSITIES, "density", self.density, f"one of {', '.join(DENSITIES)}")
        require(self.generator in GENERATORS, "generator", self.generator, f"one of {', '.join(GENERATORS)}")
        require(self.ideal in IDEALS, "ideal", self.ideal, f"one of {', '.join(IDEALS)}")
        require_whole("states", self.states, 2, len(LOWER[self.symbols]))
        if self.generator == "default" and self.ideal == "bayes":
            legal = f"2 to {MOST_STATES}, since the exact ideal reader sums over orders of states; give ideal='lookup'"
            require(self.states <= MOST_STATES, "states", self.states, f"{legal} for larger automata")
        require_whole("actions_listed", self.actions_listed, 1, len(UPPER[self.symbols]))
        if self.edges is not None:
            require_whole("edges", self.edges, self.states, self._most)
        if self.generator == "paper":
            listed = PUBLISHED_ACTIONS[self.symbols]
            legal = f"{listed}, since the published prompts with {self.symbols} list that many"
            require(self.actions_listed == listed, "actions_listed", self.actions_listed, legal)
            return
        need = -(-(self.n_edges - 1) // (self.states - 1))
        require(
            need <= self.actions_listed,
            "actions_listed",
            self.actions_listed,
            f"at least {need}, since {self.n_edges} edges give a state that many different actions",
        )

    @property
    def _most(self) -> int:
        return self.states * (self.states - 1) // 2 + 1

    @property
    def n_edges(self) -> int:
        """The number of edges of each automaton drawn; E in `slots` with `generator="paper"`."""
        if self.edges is not None:
            return self.edges
        return {"min": self.states, "middle": (self.states + self._most) // 2, "max": self._most}[self.density]

    @property
    def slots(self) -> tuple[int, ...]:
        """Numbers of edges that `generator="paper"` deals to the states that are not the sink, in listing order.

        The E edges are shared out as evenly as possible over Q slots, larger ones first. One of Q states is the sink,
        so the last slot is not dealt, and automata have fewer than E edges.
        """
        fewest, more = divmod(self.n_edges, self.states)
        return tuple([fewest + (k < more) for k in range(self.states - 1)])

    @property
    def max_choices(self) -> int:
        return self.states


def draw_machine(game: DFASettings, rng: np.random.Generator) -> Machine:
    """Draw an automaton by the game's generator; `nextstate.envs.games.dfa.DFA` documents the distributions."""
    lower, upper = LOWER[game.symbols], UPPER[game.symbols]
    states = tuple([lower[i] for i in rng.permutation(len(lower))[: game.states].tolist()])
    actions = tuple([upper[i] for i in rng.permutation(len(upper))[: game.actions_listed].tolist()])
    table, start = (_published_table if game.generator == "paper" else _table)(game, rng)
    return Machine(states, actions, tuple(table), start)


def _table(game: DFASettings, rng: np.random.Generator) -> tuple[list[Row], int]:
    n = game.states
    order = rng.permutation(n).tolist()  # the last one is the sink
    degrees = [(game.n_edges - 1) // (n - 1) + (i < (game.n_edges - 1) % (n - 1)) for i in range(n - 1)]
    # One row of keys a state: sorting them shuffles targets and draws actions without a call for each.
    keys = rng.random((n, n + game.actions_listed))
    drawn = keys[:, n:].argsort(axis=1).tolist()
    table: list[Row] = [()] * n
    for i, degree in enumerate(degrees):
        by = keys[i, :n].tolist().__getitem__
        targets = sorted(order[i + 1 :], key=by)[:degree]
        if len(targets) < degree:
            targets = sorted(targets + sorted(order[:i], key=by)[: degree - len(targets)], key=by)
        table[order[i]] = tuple(zip(sorted(drawn[i][:degree]), targets, strict=True))
    start = int(order[0])
    table[order[-1]] = ((drawn[-1][0], start),)
    return table, start


def _published_table(game: DFASettings, rng: np.random.Generator) -> tuple[list[Row], int]:
    n, slots = game.states, game.slots
    sink, chosen = int(rng.integers(n)), int(rng.integers(n - 1))
    others = [*range(sink), *range(sink + 1, n)]
    start = others[chosen]
    keys = rng.random((n, n + game.actions_listed))
    drawn = keys[:, n:].argsort(axis=1).tolist()
    elsewhere = rng.integers(n - 1, size=(n, slots[0]))
    elsewhere += elsewhere >= np.arange(n)[:, None]
    extra = elsewhere.tolist()
    table: list[Row] = [()] * n
    for i, slot in zip(others, slots, strict=True):
        later = range(i + 1, n)
        if slot <= len(later):
            targets = sorted(later, key=keys[i, :n].tolist().__getitem__)[:slot]
        else:
            targets = [*later, *extra[i][: slot - len(later)]]
        if game.kind == "state-state":  # the walk is even over different targets
            targets = list(dict.fromkeys(targets))
        # The drawn actions are in random order, so each target gets a random one.
        table[i] = tuple(sorted(zip(drawn[i], targets, strict=False)))
    table[sink] = ((drawn[sink][0], start),)
    return table, start
