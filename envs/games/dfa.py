"""Abstract automata, walked and told ("Scaling Laws for State Dynamics", arXiv 2505.14892, abstract DFA)."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import ClassVar, NamedTuple, final

import numpy as np

from nextstate.envs.game import (
    Action,
    Distribution,
    Feedback,
    Game,
    Question,
    Reader,
    State,
    point,
    require,
    require_whole,
    uniform,
)

LOWER = {"letters": tuple(string.ascii_lowercase), "pairs": tuple(map("".join, product(string.ascii_lowercase, repeat=2)))}
UPPER = {kind: tuple(s.upper() for s in symbols) for kind, symbols in LOWER.items()}
DENSITIES = ("min", "middle", "max")
KINDS = ("state-action", "state-state")


@dataclass(frozen=True)
class Machine:
    """One drawn automaton: its symbols in the order in which they are listed, its table, and where walks begin."""

    states: tuple[str, ...]
    actions: tuple[str, ...]
    table: tuple[tuple[tuple[int, int], ...], ...]  # for each state the pairs (action, target), actions ascending
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
    def targets(self) -> tuple[dict[int, int], ...]:
        """For each state the target of each action."""
        return tuple([dict(row) for row in self.table])

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """The states as answers."""
        return tuple([f" {s}" for s in self.states])


class Place(NamedTuple):
    """A state: which automaton, and where in it."""

    machine: Machine
    at: int


@final
@dataclass(frozen=True)
class DFA(Game):
    """A walk through a random automaton whose table is not given; each transition is told after it was asked about.

    A new automaton is drawn for each episode. Its states are put in random order: the first is the start, the last the
    sink, whose only action leads back to the start. The others get their edges round-robin; all targets of a state
    differ, and come first from the states later in the order (so that the sink can be reached), then from the earlier
    ones; no self-loops; a state's actions are different random ones. Each legal action of the walk is drawn alike.

    State: where the walk is, |Q| <= states. One question a step: the next state. With `kind="state-state"` actions are
    not told, and every successor of the current state is accepted.

    Ideal reader: knows that the automaton is deterministic and has no self-loops, and remembers every transition shown.
    A pair (state, action) shown before is determined; otherwise it is uniform over the other states. (state-state:
    the successors shown before, else the other states.) It does not use how automata are drawn beyond this.

    Args:
        states: number of states listed, 2 to 26 (to 676 with `symbols="pairs"`).
        density: "min" (E = Q edges), "max" (Q (Q - 1) / 2 + 1) or "middle"; not used where `edges` is given.
        edges: number of edges, Q to Q (Q - 1) / 2 + 1, as long as no state needs more actions than there are.
        actions: number of actions listed, 1 to 26 (to 676). Few actions make many questions on which the action alone
            does not settle the answer.
        symbols: "letters" (a, b, ...; A, B, ...) or "pairs" (aa, ab, ...; AA, AB, ...).
        kind: "state-action" or "state-state".
    """

    name: ClassVar[str] = "DFA"
    size: ClassVar[str] = "states"
    shortcuts: ClassVar[tuple[str, ...]] = ("last_mention", "action_only", "state_only", "most_frequent", "stay")
    feedbacks: ClassVar[tuple[Feedback, ...]] = ("inline",)

    states: int = 4
    density: str = "middle"
    edges: int | None = None
    actions_listed: int = 26
    symbols: str = "letters"
    kind: str = "state-action"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.symbols in LOWER, "symbols", self.symbols, f"one of {', '.join(LOWER)}")
        require(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        require(self.density in DENSITIES, "density", self.density, f"one of {', '.join(DENSITIES)}")
        require_whole("states", self.states, 2, len(LOWER[self.symbols]))
        require_whole("actions_listed", self.actions_listed, 1, len(UPPER[self.symbols]))
        if self.edges is not None:
            require_whole("edges", self.edges, self.states, self._most)
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
        """The number of edges of each automaton drawn."""
        if self.edges is not None:
            return self.edges
        return {"min": self.states, "middle": (self.states + self._most) // 2, "max": self._most}[self.density]

    @property
    def max_choices(self) -> int:
        return self.states

    def initial(self, rng: np.random.Generator) -> Place:
        n = self.states
        lower, upper = LOWER[self.symbols], UPPER[self.symbols]
        states = tuple([lower[i] for i in rng.permutation(len(lower))[:n].tolist()])
        actions = tuple([upper[i] for i in rng.permutation(len(upper))[: self.actions_listed].tolist()])
        order = rng.permutation(n).tolist()  # the last one is the sink
        degrees = [(self.n_edges - 1) // (n - 1) + (i < (self.n_edges - 1) % (n - 1)) for i in range(n - 1)]
        # One row of keys a state: sorting them shuffles targets and draws actions without a call for each.
        keys = rng.random((n, n + self.actions_listed))
        table: list[tuple[tuple[int, int], ...]] = [()] * n
        for i, degree in enumerate(degrees):
            at, key = order[i], keys[i]
            rank = key[:n].argsort().tolist()
            later, earlier = order[i + 1 :], order[:i]
            later.sort(key=rank.index)
            earlier.sort(key=rank.index)
            labels = sorted(key[n:].argsort()[:degree].tolist())
            targets = (later + earlier)[:degree]
            targets.sort(key=lambda t, by=key: by[t])
            table[at] = tuple(zip(labels, targets, strict=True))
        start = order[0]
        table[order[-1]] = ((int(keys[-1, n:].argmin()), start),)
        return Place(Machine(states, actions, tuple(table), start), start)

    def actions(self, state: State) -> Sequence[int]:
        machine, at = _place(state)
        return machine.legal[at]

    def transition(self, state: State, action: Action) -> Place:
        machine, at = _place(state)
        return Place(machine, machine.targets[at][_index(action)])

    def values(self, state: State) -> Mapping[str, str]:
        machine, at = _place(state)
        return {"state": machine.states[at]}

    def opening(self, state: State) -> str:
        machine, at = _place(state)
        listed = f"States: {{{','.join(machine.states)}}}\n"
        if self.kind == "state-action":
            listed += f"Actions:{{{','.join(machine.actions)}}}\n"
        return f"{listed}Sequence: Start at state {machine.states[at]}."

    def narrate(self, state: State, action: Action, next_state: State) -> str:
        if self.kind == "state-state":
            return ""
        return f" Take action {_place(state).machine.actions[_index(action)]},"

    def questions(self, state: State, action: Action, next_state: State) -> tuple[Question, ...]:
        machine, after = _place(next_state)
        if self.kind == "state-action":
            return (Question("state", " go to state", machine.choices, after, (after,)),)
        accepted = tuple(sorted({target for _, target in machine.table[_place(state).at]}))
        return (Question("state", " Go to state", machine.choices, after, accepted),)

    def command(self, state: State, action: Action) -> str:
        return f"take action {_place(state).machine.actions[_index(action)]}"

    def reader(self, state: State) -> Reader:
        return DFAReader(self.kind == "state-action", _place(state).at)


class DFAReader(Reader):
    """Remembers every transition shown, by (state, action), by action and by state."""

    def __init__(self, told: bool, start: int) -> None:
        self.told, self.at, self.action, self.before = told, start, -1, -1
        self.pairs: dict[tuple[int, int], int] = {}
        self.by_action: dict[int, int] = {}
        self.by_state: dict[int, list[int]] = {}
        self.named = Counter((start,))

    def hear(self, action: Action) -> None:
        if self.told:
            self.action = _index(action)

    def learn(self, answer: int) -> None:
        if self.told:
            self.pairs[self.at, self.action] = self.by_action[self.action] = answer
        self.by_state.setdefault(self.at, []).append(answer)
        self.named[answer] += 1
        self.before, self.at = self.at, answer

    def guess(self, name: str, question: Question) -> Distribution:
        n = len(question.choices)
        if name == "ideal":
            if self.told and (self.at, self.action) in self.pairs:
                return point(n, self.pairs[self.at, self.action])
            if not self.told and self.at in self.by_state:
                return uniform(n, tuple(sorted(set(self.by_state[self.at]))))
            return uniform(n, tuple(i for i in range(n) if i != self.at))
        if name == "stay":
            return point(n, self.at)
        if name == "last_mention":  # the most recently named state that is not the current one
            return point(n, self.before) if self.before >= 0 else uniform(n)
        if name == "action_only":
            return point(n, self.by_action[self.action]) if self.action in self.by_action else uniform(n)
        if name == "state_only":
            return point(n, self.by_state[self.at][-1]) if self.at in self.by_state else uniform(n)
        if name == "most_frequent":
            top = max(self.named.values())
            return uniform(n, tuple(sorted(s for s, k in self.named.items() if k == top)))
        raise KeyError(name)


def _place(state: State) -> Place:
    assert isinstance(state, Place)
    return state


def _index(action: Action) -> int:
    assert isinstance(action, int)
    return action
