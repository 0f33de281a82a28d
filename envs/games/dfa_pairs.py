"""Minimal pairs of the DFA: walks on automata drawn as they are walked, and the published designs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from nextstate.envs.contrast import Pair, Span, answered, build_episode, draw_balanced, find_span, last, piece_of, roles
from nextstate.envs.game import Episode, GameError, require, require_whole
from nextstate.envs.games.machine import LOWER, UPPER, DFASettings, Machine, Place

Edges = dict[int, dict[int, int]]  # state -> action -> target
PAPER_STEPS = (6, 10, 14, 18, 22, 26, 30)  # lengths of state pairs
PAPER_LENGTHS = (1, 5, 10, 20, 40)  # lengths of noop pairs


def draw_pair(
    game: DFASettings, rng: np.random.Generator, kind: str, design: str, steps: int | None, distance: int
) -> Pair:
    """Draw a pair; see `Game.contrast`.

    The walks of a balanced pair are random ones in which two or three actions lead through some of the states:

    - "state": the last shown step leads to one of two states, in both of which the queried action was taken before. The
      automata differ in that one edge, the words in that one name.
    - "noop": as "state", and then `distance` times an action that leads back to the state. (So these automata have a
      loop; the names differ wherever the state is narrated again.)
    - "action": one of two actions is queried, both taken before in the current state. One automaton; one name differs.
    - "name": the state that is the answer is called by the name of one that the walk does not visit.

    Published pairs ("state" and "noop") have no lists of states and actions, and letters drawn anew for each pair:

    - "state": `steps` is the number of transitions before the question, 6, 10, 14, ... or 30. At 10, 18 and 26 both
      sides have the same answer, so that the pair has a problem (`nextstate.envs.contrast.problems`).
    - "noop": `distance` is the published length, 1, 5, 10, 20 or 40, of which the first three transitions are others:
      the loop is taken 0, 2, 7, 17 or 37 times.

    With `kind="state-state"` actions are hidden: "state" and "name" only, and the two states have one successor each.
    """
    if game.kind == "state-state" and (kind not in ("state", "name") or design == "paper"):
        raise GameError(f"kind={kind!r} is not possible: state-state has no {design} contrast of kind {kind}")
    if design == "paper":
        if kind == "state":
            return _published_state(game, rng, steps)
        return _published_noop(game, rng, steps, distance)
    steps = 12 + distance if steps is None else steps
    fewest = 4 if kind == "name" or game.kind == "state-state" else 3
    require_whole("states", game.states, fewest, len(LOWER[game.symbols]))
    require_whole("actions_listed", game.actions_listed, 3 if kind == "noop" else 2, len(UPPER[game.symbols]))
    require_whole("steps", steps, 5 + distance, 10_000)
    hopeless = ("state_only",) if game.kind == "state-state" else ()
    return draw_balanced(lambda: _draw(game, rng, kind, steps, distance), hopeless)


def _draw(game: DFASettings, rng: np.random.Generator, kind: str, steps: int, distance: int) -> Pair | None:
    """Draw a walk and end it in two ways; None where this walk cannot be ended so."""
    n, names = game.states, game.actions_listed
    listed, actions = rng.permutation(n).tolist(), rng.permutation(names).tolist()
    parts, alone = kind in ("state", "noop"), game.kind == "state-state"
    fewest = 4 if parts and alone else 3
    used = listed[: int(rng.integers(fewest, max(fewest, min(n - (kind == "name"), steps // 3)) + 1))]
    taken = actions[: int(rng.integers(2, min(3, names - (kind == "noop")) + 1))]
    # The two states of a state pair, and the one before: until then no edge of it leads to either. In half of the walks
    # (in all where there are no other states) it has no edge at all and is not come to before. In the other kinds of
    # pairs it is the current state.
    p, q, at = (used[i] for i in rng.permutation(len(used))[:3].tolist())
    closed = {at: {p, q} if len(used) > 3 and rng.random() < 0.5 else set(used)} if parts else {}
    walked = _wander(rng, used, taken, steps - 1 - (1 + distance) * parts, at, closed, {p, q, at} if alone else set())
    if walked is None:
        return None
    path, edges = walked
    exits, first, second = edges.setdefault(at, {}), edges.get(p, {}), edges.get(q, {})
    if parts:
        ends = [(a, b) for a in first for b in second if first[a] != second[b] and (alone or a == b)]
    else:
        ends = [(a, b) for a in exits for b in exits if (a == b) == (kind == "name")]
    new = [c for c in actions[: -1 if distance else None] if c not in exits]
    ends = [(a, b) for a, b in ends if not parts or {*new} - {a}]
    if not ends:
        return None
    a, b = ends[int(rng.integers(len(ends)))]
    for state in range(n):  # the walk could go on from everywhere
        if state != at and not edges.get(state):
            edges[state] = {actions[0]: int((state + rng.integers(1, n)) % n)}
    start, twin_start, twin = used[0], used[0], {state: dict(row) for state, row in edges.items()}
    if kind == "name":
        called = {exits[a]: listed[-1], listed[-1]: exits[a]}
        twin = {called.get(s, s): {c: called.get(t, t) for c, t in row.items()} for s, row in edges.items()}
        twin_start = called.get(start, start)
    if parts:
        step, loop = next(c for c in new if c != a), actions[-1]
        for table, end in ((edges, p), (twin, q)):
            table[at][step] = end
            if distance:
                table[p][loop], table[q][loop] = p, q
        path = [*path, step, *[loop] * distance]
    lower, upper = LOWER[game.symbols], UPPER[game.symbols]
    states = tuple([lower[i] for i in rng.permutation(len(lower))[:n].tolist()])
    symbols = tuple([upper[i] for i in rng.permutation(len(upper))[:names].tolist()])
    seed = int(rng.integers(2**31))
    clean = _episode(game, Machine(states, symbols, _table(edges), start), [*path, a], seed)
    corrupted = _episode(game, Machine(states, symbols, _table(twin), twin_start), [*path, b], seed)
    return _pair(kind, "balanced", clean, corrupted, distance)


def _wander(
    rng: np.random.Generator,
    states: list[int],
    actions: list[int],
    steps: int,
    end: int,
    closed: Mapping[int, set[int]],
    single: set[int],
) -> tuple[list[int], Edges] | None:
    """Walk at random, drawing edges when they are needed; return the actions and the edges, None where there is no way.

    As in every automaton of the game, no edge is a loop and no two edges of a state lead to the same one.

    Args:
        rng: where to draw from.
        states: those to walk through; the walk begins in the first.
        actions: those to take.
        steps: how many to take.
        end: the state to end in.
        closed: for a state, where no edge of it may lead. Where that is everywhere, only the last step leads to it.
        single: states with at most one edge.
    """
    edges: Edges = {}
    path, at = [], states[0]
    shut = {s for s, to in closed.items() if len(to) >= len(states)}
    for left, (u, v) in zip(range(steps - 1, -1, -1), rng.random((steps, 2)).tolist(), strict=True):
        row = edges.setdefault(at, {})
        never = {at, *row.values(), *closed.get(at, ()), *(shut if left else ())}
        known = [(action, t) for action, t in row.items() if left or t == end]
        free = [t for t in states if t not in never and (left or t == end)] if not (row and at in single) else []
        action = actions[int(u * len(actions))]
        if action in row or not free:
            if not known:
                return None
            action = action if left and action in row else known[int(v * len(known))][0]
        else:
            row[action] = free[int(v * len(free))]
        path.append(action)
        at = row[action]
    return path, edges


def _table(edges: Edges) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple([tuple(sorted(edges[state].items())) for state in range(len(edges))])


def _episode(game: DFASettings, machine: Machine, path: list[int], seed: int = 0) -> Episode:
    return build_episode(game, machine.places[machine.start], path, seed=seed)


def _pair(kind: str, design: str, clean: Episode, corrupted: Episode, distance: int) -> Pair:
    places = [_spans(*sides, distance) for sides in ((clean, corrupted), (corrupted, clean))]
    return Pair(kind, design, clean, corrupted, roles(*places))


def _spans(side: Episode, other: Episode, distance: int) -> dict[str, Span]:
    now, n = side.steps[-1], len(side.steps)
    spans = {"state": answered(side, n - 2), "last": last(side)}
    if distance:
        spans["origin"] = answered(side, n - 2 - distance)
    steps = {_key(side, t): t for t in range(n - 1)}  # the last time each was narrated
    for name, key in (("match", _key(side, n - 1)), ("distractor", _key(other, n - 1))):
        if key in steps and (name == "match" or key != _key(side, n - 1)):
            spans[name] = answered(side, steps[key])
    if now.narration:
        assert isinstance(now.action, int)
        assert isinstance(now.state, Place)
        spans["action"] = find_span(side, piece_of(side, -1, "narration"), now.state.machine.actions[now.action])
    return spans


def _key(episode: Episode, step: int) -> tuple[str, int]:
    """Return what settles the answer after a step: the state by its name, and the action where it is told."""
    now = episode.steps[step]
    assert isinstance(now.state, Place)
    assert isinstance(now.action, int)
    return now.state.machine.states[now.state.at], now.action if now.narration else -1


def _published_state(game: DFASettings, rng: np.random.Generator, steps: int | None) -> Pair:
    """Return the published pair of another state and the same action, with T = `steps` transitions before the question.

    Both sides begin in x1. The clean side goes through four parts of two transitions, over and over: A1 to x3 and A2 to
    x1; A1 to x3 and A3 to x2; A1 to x4 and A2 to x2; A1 to x4 and A3 to x1. The corrupted side is the same text with x1
    for x2 and x3 for x4. Both are asked for A1 at last. At T = 10, 18 and 26 the clean side is back in x1, and both
    sides have the answer x3. At every T the answer is also where A1 led the last time, whatever the state.
    """
    steps = PAPER_STEPS[0] if steps is None else steps
    require(steps in PAPER_STEPS, "steps", steps, f"one of {', '.join(map(str, PAPER_STEPS))} (design paper)")
    states, actions = _letters(rng, 4, 3)
    edges: Edges = {0: {0: 2}, 1: {0: 3}, 2: {1: 0, 2: 1}, 3: {1: 1, 2: 0}}
    twin: Edges = {0: {0: 2}, 1: {}, 2: {1: 0, 2: 0}, 3: {}}
    path = [*([0, 1, 0, 2] * steps)[:steps], 0]
    sides = [_bare(game, Machine(states, actions, _table(each), 0), path) for each in (edges, twin)]
    return _pair("state", "paper", sides[0], sides[1], 0)


def _published_noop(game: DFASettings, rng: np.random.Generator, steps: int | None, length: int) -> Pair:
    """Return the published noop pair of length T = `length`.

    x1 -A1-> x2 -A2-> x1 -A1-> x2, then T - 3 times the loop A on x2 (never at T = 1), and at last A2 is asked for. In
    the corrupted text a third state stands for x1. At T = 1 the published text has two blanks in the place of loops.
    (The source fixes A within a text; that it is drawn for each pair, from the letters left, is our reading.)
    """
    require(steps is None, "steps", steps, "None, since the length of published noop pairs is their distance")
    lengths = ", ".join(map(str, PAPER_LENGTHS))
    require(length in PAPER_LENGTHS, "distance", length, f"one of {lengths} (design paper)")
    states, actions = _letters(rng, 3, 3)
    edges: Edges = {0: {0: 1}, 1: {1: 0, 2: 1}, 2: {}}
    twin: Edges = {0: {}, 1: {1: 2, 2: 1}, 2: {0: 1}}
    loops = max(length - 3, 0)
    sides = []
    for each, start in ((edges, 0), (twin, 2)):
        side = _bare(game, Machine(states, actions, _table(each), start), [0, 1, 0, *[2] * loops, 1])
        if not loops:
            asked = side.steps[-1]
            side = replace(side, steps=(*side.steps[:-1], asked._replace(narration=f" {asked.narration}")))
        sides.append(side)
    return _pair("noop", "paper", sides[0], sides[1], loops)


def _letters(rng: np.random.Generator, states: int, actions: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    lower, upper = LOWER["letters"], UPPER["letters"]
    return (
        tuple([lower[i] for i in rng.permutation(len(lower))[:states].tolist()]),
        tuple([upper[i] for i in rng.permutation(len(upper))[:actions].tolist()]),
    )


def _bare(game: DFASettings, machine: Machine, path: list[int]) -> Episode:
    """Return an episode without lists of states and actions, as published pairs are; its choices are all states."""
    small = replace(game, states=len(machine.states), density="middle", edges=None, actions_listed=len(machine.actions),
                    symbols="letters", generator="default")  # fmt: skip
    return replace(_episode(small, machine, path), opening=f"Start at state {machine.states[machine.start]}.")
