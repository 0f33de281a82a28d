"""Walks through abstract automata ("Scaling Laws for State Dynamics", arXiv 2505.14892, abstract DFA)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, final

import numpy as np

from nextstate.envs.contrast import Pair
from nextstate.envs.game import (
    Action,
    Distribution,
    Feedback,
    Frequencies,
    Question,
    Reader,
    Sample,
    State,
    Step,
    expected_accuracy,
    one_hot,
    uniform,
)
from nextstate.envs.games.dfa_pairs import draw_pair
from nextstate.envs.games.dfa_readers import Posterior, Shown, default_posterior, paper_posterior
from nextstate.envs.games.machine import DENSITIES, DFASettings, Place, draw_machine
from nextstate.envs.rules import CERTAIN


@final
@dataclass(frozen=True)
class DFA(DFASettings):
    """A walk through a random automaton whose table is hidden; each transition is shown after its question.

    A new automaton is drawn for each episode, and the walk draws legal actions uniformly. There are two generators:

    - "default" (ours): the states are put in random order, unrelated to the order in which they are listed: the first
      is the start, the last the sink, whose only action leads back to the start. The others get their edges
      round-robin; all targets of a state are distinct, and are taken first from later states in the order (so that the
      sink can be reached), then from earlier ones; there are no self-loops; the actions of a state are random and
      distinct.
    - "paper": the distribution of the published prompts. States are dealt their edges in the order in which they are
      listed, except for the sink, which may be any of them; the start is any other. The E edges are shared out over Q
      slots, larger ones first, of which the last is not dealt, so that there are fewer than E edges. A state with at
      most as many edges as there are later states in the list leads to different later states; with more edges, to
      every later state and, by draws with replacement, to any other states. Two actions of a state may thus lead to the
      same state (which counts once with `kind="state-state"`), 57 to 70 % of moves go down the list (from 5 states on),
      and some states may be out of reach. There are no self-loops.

    The default stays ours because in the published prompts the order of the list says something about the answer, and
    because there the sink need not be reachable. Three things are not copied from the published code. It lists actions
    in the order of a Python set, which is nearly the same in all prompts of a process; here the order is drawn for each
    episode. Its grid begins at 1 state, which leads to itself, so that there is nothing to predict. It leaves out pairs
    of letters that are several tokens for GPT-2; a game knows no tokenizer, so with `symbols="pairs"` all 676 pairs can
    be drawn. Minimal pairs do not depend on the generator.

    State: the current state of the walk, |Q| <= states. Each step has one question: the next state. With
    `kind="state-state"` actions are not shown, and every successor of the current state is accepted.

    Ideal reader: exact Bayesian inference. It knows how automata and walks are drawn, and sums over all automata that
    agree with the text (`nextstate.envs.games.dfa_readers`). With state-state it answers with the state that is the
    likeliest to be among the successors, and its belief is proportional to these probabilities. The sums over our
    automata double with each state that was visited, so that more than 20 states need `ideal="lookup"`; published
    automata of all sizes have a closed form. Texts that the generator cannot produce, as of minimal pairs with loops,
    are read as by the lookup reader.

    Lookup reader: remembers every transition shown. If a pair (state, action) was shown before, the answer is settled;
    otherwise it is uniform over the other states, since there are no self-loops. (state-state: over the successors
    shown before, else the other states.)

    Args:
        states: number of states listed, 2 to 26 (to 676 with `symbols="pairs"`). More than 20 need `ideal="lookup"` or
            `generator="paper"`.
        density: "min" (E = Q edges), "max" (Q (Q - 1) / 2 + 1) or "middle"; not used where `edges` is given.
        edges: number of edges, Q to Q (Q - 1) / 2 + 1, as long as no state needs more actions than there are.
        actions_listed: number of actions listed, 1 to 26 (to 676). With few actions there are many questions whose
            answer is not determined by the action alone. With `generator="paper"` 26, or 400 with `symbols="pairs"`.
        symbols: "letters" (a, b, ...; A, B, ...) or "pairs" (aa, ab, ...; AA, AB, ...).
        kind: "state-action", or "state-state", where actions are not shown.
        generator: "default" or "paper", the distribution of automata; see above.
        ideal: "bayes", or "lookup" for an ideal reader that answers as the lookup reader does: the ceiling is then that
            of lookup, which readers that know how automata are drawn exceed by up to .15.
    """

    name: ClassVar[str] = "DFA"
    size: ClassVar[str] = "states"
    sizes: ClassVar[range] = range(2, 13)
    shortcuts: ClassVar[tuple[str, ...]] = ("last_mention", "action_only", "state_only", "most_frequent", "stay")
    feedbacks: ClassVar[tuple[Feedback, ...]] = ("inline",)
    contrasts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "state": ("balanced", "paper"),
        "action": ("balanced",),
        "name": ("balanced",),
        "noop": ("balanced", "paper"),
    }

    @classmethod
    def sample(
        cls,
        rng: np.random.Generator,
        size: int,
        level: int,
        densities: Sequence[str] = DENSITIES,
        few_actions: float = 0.5,
    ) -> Sample:
        """Draw a training episode's automaton and length.

        Args:
            rng: the generator to draw from.
            size: the number of states.
            level: not used.
            densities: one of these is drawn.
            few_actions: share of automata that list only a few actions, so that the action alone seldom determines the
                answer.
        """
        kind = "state-state" if rng.random() < 0.1 else "state-action"
        density = densities[int(rng.integers(len(densities)))]
        few = max(int(rng.integers(2, 7)), size // 2 + 1)
        listed = few if rng.random() < few_actions else 26
        symbols = "pairs" if rng.random() < 0.03 else "letters"
        # Training asks only what the text settles, so that sizes have no limit.
        game = cls(states=size, density=density, actions_listed=listed, kind=kind, symbols=symbols, ideal="lookup")
        return Sample(game, int(rng.integers(4, 25)), 1)

    def initial(self, rng: np.random.Generator) -> Place:
        machine = draw_machine(self, rng)
        return machine.places[machine.start]

    def actions(self, state: State) -> Sequence[int]:
        machine, at = _place(state)
        return machine.legal[at]

    def transition(self, state: State, action: Action) -> Place:
        assert isinstance(state, Place)
        assert isinstance(action, int)
        machine, at = state
        return machine.after[at][action]

    def policy(self, state: State, u: float) -> int:
        assert isinstance(state, Place)
        legal = state.machine.legal[state.at]
        return legal[int(u * len(legal))]

    def values(self, state: State) -> Mapping[str, str]:
        machine, at = _place(state)
        return machine.values[at]

    def opening(self, state: State) -> str:
        machine, at = _place(state)
        listed = f"States: {{{','.join(machine.states)}}}\n"
        if self.kind == "state-action":
            listed += f"Actions:{{{','.join(machine.actions)}}}\n"
        return f"{listed}Sequence: Start at state {machine.states[at]}."

    def narrate(self, state: State, action: Action, next_state: State) -> str:
        if self.kind == "state-state":
            return ""
        assert isinstance(state, Place)
        assert isinstance(action, int)
        return state.machine.narrations[action]

    def questions(self, state: State, action: Action, next_state: State) -> tuple[Question, ...]:
        assert isinstance(next_state, Place)
        machine, after = next_state
        if self.kind == "state-action":
            return machine.whither[after]
        return machine.onward[_place(state).at][after]

    def step(self, state: State, u: float, v: float, ask: int) -> Step:
        assert isinstance(state, Place)
        machine, at = state
        key = (at, int(u * len(machine.legal[at])), self.kind)
        step = machine.taken.get(key)
        if step is None:
            step = machine.taken[key] = super().step(state, u, v, ask)
        return step

    def size_of(self, state: State) -> int:
        return self.states

    def command(self, state: State, action: Action) -> str:
        return f"take action {_place(state).machine.actions[_index(action)]}"

    @property
    def ideal_is_bayes(self) -> bool:
        return self.ideal == "bayes"

    def reader(self, state: State) -> Reader:
        return DFAReader(self, _place(state).at)

    def draw_pair(self, rng: np.random.Generator, kind: str, design: str, steps: int | None, distance: int) -> Pair:
        return draw_pair(self, rng, kind, design, steps, distance)


class DFAReader(Reader):
    """Remembers every transition shown, by state and action, by action and by state.

    Args:
        game: the game that is read.
        start: the first state.
    """

    def __init__(self, game: DFASettings, start: int) -> None:
        self.game, self.shown = game, game.kind == "state-action"
        self.at, self.start, self.action = start, start, -1
        self.pairs: dict[int, dict[int, int]] = {start: {}}  # without actions, by state and next state
        self.visits = Counter[int]()  # how often each state was left
        self.by_action: dict[int, int] = {}
        self.by_state: dict[int, int] = {}
        self.named = [start]
        self.frequencies = Frequencies(self.named)
        self._right: Posterior | None = None
        self._known = False  # whether `_right` is that of the next question

    def observe(self, action: Action) -> None:
        self._known = False
        if self.shown:
            assert isinstance(action, int)
            self.action = action

    def observe_answer(self, answer: int) -> None:
        at, action = self.at, self.action if self.shown else answer
        self.pairs[at][action] = self.by_action[action] = self.by_state[at] = self.at = answer
        self.pairs.setdefault(answer, {})
        self.visits[at] += 1
        self.named.append(answer)
        self.frequencies.add(answer)
        self._known = False

    def lookup(self, question: Question) -> Distribution:
        n, known = len(question.choices), self.pairs[self.at]
        if not self.shown:
            return uniform(n, tuple(sorted(known))) if known else elsewhere(n, self.at)
        return one_hot(n, known[self.action]) if self.action in known else elsewhere(n, self.at)

    def ceiling(self, question: Question) -> float:
        right = self._posterior()
        if right is None:
            return expected_accuracy(self.lookup(question), question.accepted)
        return max(right) if max(right) < 1 - CERTAIN else 1.0

    def _posterior(self) -> Posterior | None:
        """Return the probability of each state to be right; None if lookup says it, or in its stead."""
        if not self._known:
            self._right, self._known = self._compute(), True
        return self._right

    def _compute(self) -> Posterior | None:
        known = self.pairs[self.at]
        if self.game.ideal == "lookup" or (self.action in known if self.shown else known):
            return None
        n = self.game.states
        if self.game.generator == "paper":
            rows = [Shown(self.visits[s], tuple(sorted(self.pairs.get(s, {}).values()))) for s in range(n)]
            return paper_posterior(self.game.slots, tuple(rows), self.start, self.at, self.shown)
        number = {s: i for i, s in enumerate(self.pairs)}  # in the order of their first visits
        rows = [
            Shown(self.visits[s], tuple(sorted(map(number.__getitem__, to.values())))) for s, to in self.pairs.items()
        ]
        right = default_posterior(n, self.game.n_edges, tuple(rows), number[self.at], self.shown)
        return None if right is None else tuple([right[number.get(s, len(number))] for s in range(n)])

    def guess(self, name: str, question: Question) -> Distribution:
        n = len(question.choices)
        if name == "ideal":
            right = self._posterior()
            if right is None:
                return self.lookup(question)
            total = sum(right)
            return tuple([p / total for p in right])
        if name == "stay":
            return one_hot(n, self.at)
        if name == "last_mention":  # the most recently named state that is not the current one
            return one_hot(n, self.named[-2]) if len(self.named) > 1 else uniform(n)
        if name == "action_only":
            return one_hot(n, self.by_action[self.action]) if self.action in self.by_action else uniform(n)
        if name == "state_only":
            return one_hot(n, self.by_state[self.at]) if self.at in self.by_state else uniform(n)
        if name == "most_frequent":
            return self.frequencies.belief(n)
        raise KeyError(name)


@lru_cache(maxsize=4096)
def elsewhere(n: int, at: int) -> Distribution:
    """Return the uniform distribution over all of `n` states but `at`."""
    return uniform(n, tuple([s for s in range(n) if s != at]))


def _place(state: State) -> Place:
    assert isinstance(state, Place)
    return state


def _index(action: Action) -> int:
    assert isinstance(action, int)
    return action
