"""Readers against roads that share nothing with it: text parsed by regular expressions, published ceilings."""

from __future__ import annotations

import re

import numpy as np
import pytest

from nextstate.envs import expected_accuracy, make_game, unroll
from nextstate.envs.games.machine import Place

# References/state-dynamics: exact lookup, else uniform over the other states; middle density, 200 samples a cell.
STEPS = (5, 10, 20, 30, 50, 100)
CEILING = {
    5: (0.70, 0.94, 0.95, 1.0, 1.0, 1.0),
    10: (0.28, 0.51, 0.76, 0.84, 0.93, 0.97),
    12: (0.20, 0.42, 0.59, 0.69, 0.84, 0.94),
    15: (0.19, 0.28, 0.51, 0.54, 0.70, 0.88),
    20: (0.08, 0.20, 0.30, 0.39, 0.59, 0.76),
}


def read_dfa(prompt: str) -> dict[str, float]:
    """Return the probability of each next state for a reader who only looks up what a DFA prompt shows."""
    states = re.match(r"States: \{([a-z,]+)\}\n", prompt)[1].split(",")
    at = re.search(r"Start at state ([a-z]+)\.", prompt)[1]
    told = "Actions:" in prompt
    seen: dict[tuple[str, str], list[str]] = {}
    step = r"Take action ([A-Z]+), go to state ([a-z]+)\." if told else r"(Go) to state ([a-z]+)\."
    for action, target in re.findall(step, prompt):
        seen.setdefault((at, action), []).append(target)
        at = target
    action = re.search(r"Take action ([A-Z]+), go to state$", prompt)[1] if told else "Go"
    left = set(seen.get((at, action), [s for s in states if s != at]))
    return {s: (s in left) / len(left) for s in states}


def read_box(prompt: str) -> str:
    """Return the box that the words of a Box prompt put the object of the question in."""
    sentence = r"Box ([A-Z]) contains the (\w+)\.|(?:Move the|The) (\w+) (?:into|goes to|is in) Box ([A-Z])\."
    places = {b or c: a or d for a, b, c, d in re.findall(sentence, prompt)}
    return places[re.search(r"(\w+) is in (?:the )?Box$", prompt)[1].lower()]


@pytest.mark.parametrize("kind", ["state-action", "state-state"])
@pytest.mark.parametrize(("states", "actions", "symbols"), [(3, 3, "letters"), (8, 26, "letters"), (30, 40, "pairs")])
def test_dfa_read_from_text(kind: str, states: int, actions: int, symbols: str) -> None:
    game = make_game("DFA", states=states, actions_listed=actions, symbols=symbols, kind=kind, ideal="lookup")
    for seed in range(40):
        episode = unroll(game, seed, 40)
        assert episode.beliefs("ideal") == episode.beliefs("lookup")
        for t, row in enumerate(episode.beliefs("lookup")):
            choices = [c.strip() for c in episode.steps[t].questions[0].choices]
            assert dict(zip(choices, row[0], strict=True)) == pytest.approx(read_dfa(episode.prompt(t)))


@pytest.mark.parametrize("style", ["paper", "plain"])
@pytest.mark.parametrize("feedback", ["branch", "inline"])
def test_box_read_from_text(style: str, feedback: str) -> None:
    game = make_game("Box", boxes=6, style=style, feedback=feedback)
    for seed in range(40):
        episode = unroll(game, seed, 20)
        for t, step in enumerate(episode.steps):
            assert read_box(episode.prompt(t)) == step.questions[0].answer


@pytest.mark.parametrize("states", CEILING)
def test_lookup_in_dfa_is_right_as_often_as_published(states: int) -> None:
    game, n, theirs = make_game("DFA", states=states), 400, 200
    mine = np.zeros(len(STEPS))
    for seed in range(n):
        episode = unroll(game, seed, max(STEPS))
        beliefs = episode.beliefs("lookup")
        mine += [expected_accuracy(beliefs[t - 1][0], episode.steps[t - 1].questions[0].accepted) for t in STEPS]
    for t, ours, published in zip(STEPS, mine / n, CEILING[states], strict=True):
        p = (ours * n + published * theirs) / (n + theirs)
        z = (ours - published) / np.sqrt(max(p * (1 - p), 0.005) * (1 / n + 1 / theirs))
        assert abs(z) < 3.5, f"{states} states, {t} steps: {ours:.3f}, published {published}"


@pytest.mark.parametrize("states", [4, 5, 8, 10])
def test_dfa_at_minimum_density_is_known_from_ten_steps_on(states: int) -> None:
    game = make_game("DFA", states=states, density="min")
    for t in (10, 15, 30):
        ceilings = []
        for seed in range(200):
            episode = unroll(game, seed, t)
            belief, question = episode.beliefs("lookup")[-1][0], episode.steps[-1].questions[0]
            ceilings.append(expected_accuracy(belief, question.accepted))
        assert np.mean(ceilings) > 0.97


@pytest.mark.parametrize("density", ["min", "middle", "max"])
@pytest.mark.parametrize(
    ("states", "actions", "symbols"), [(2, 1, "letters"), (7, 9, "letters"), (26, 26, "letters"), (40, 60, "pairs")]
)
def test_dfa_construction(states: int, actions: int, symbols: str, density: str) -> None:
    game = make_game("DFA", states=states, density=density, actions_listed=actions, symbols=symbols, ideal="lookup")
    assert states <= game.n_edges <= states * (states - 1) // 2 + 1
    starts = set()
    for seed in range(30):
        place = game.initial(np.random.default_rng(seed))
        assert isinstance(place, Place)
        machine = place.machine
        assert place.at == machine.start
        assert len(set(machine.states)) == states
        assert len(set(machine.actions)) == actions
        assert sum(map(len, machine.table)) == game.n_edges
        degrees = sorted(map(len, machine.table))
        sinks = [row for row in machine.table if len(row) == 1 and row[0][1] == machine.start]
        assert sinks
        assert degrees[-1] - (degrees[1] if states > 1 else 0) <= 1  # round-robin over all but the sink
        for at, row in enumerate(machine.table):
            labels, targets = [a for a, _ in row], [t for _, t in row]
            assert labels == sorted(set(labels))
            assert len(set(targets)) == len(targets)
            assert at not in targets
            assert all(0 <= a < actions for a in labels)
        starts.add(machine.states[machine.start])
    assert len(starts) > 1  # a random start each time
    sink = {at for at in range(states) if not reaches_more(machine.table, at)}
    assert machine.start not in sink


def reaches_more(table: tuple[tuple[tuple[int, int], ...], ...], at: int) -> bool:
    return len(table[at]) > 1 or table[at][0][1] != at


def test_dfa_walks_can_reach_the_sink_and_come_back() -> None:
    game = make_game("DFA", states=6, density="max")
    for seed in range(20):
        place = game.initial(np.random.default_rng(seed))
        visited = {place}
        queue = [place]
        for now in queue:
            for action in game.actions(now):
                after = game.transition(now, action)
                if after not in visited:
                    visited.add(after)
                    queue.append(after)
        alone = [p for p in visited if len(game.actions(p)) == 1]
        assert any(game.transition(p, game.actions(p)[0]) == place for p in alone)
