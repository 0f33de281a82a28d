"""Minimal pairs of adventures: two stories in which one or another of two things is taken, dropped or put somewhere."""

from __future__ import annotations

import re
from itertools import permutations

import numpy as np

from nextstate.envs.contrast import (
    Pair,
    Span,
    build_episode,
    differences,
    draw_balanced,
    find_span,
    last,
    piece_of,
    roles,
    segments,
)
from nextstate.envs.episode import Episode
from nextstate.envs.rules import Action, GameError, Rules, State, require_whole
from nextstate.envs.textworld.world import Situation


def draw_pair(game: Rules, rng: np.random.Generator, kind: str, steps: int | None) -> Pair:
    """Draw a pair about one thing, the subject; see `Game.contrast`. Before the last step nothing is asked.

    On one side a command does something to the subject, on the other the same to another thing, which is in the same
    place and has a name of one word too. In an "action" pair that is the last command; in a "state" pair one step
    earlier, and the last command changes nothing. The words differ in the one name, wherever it stands.
    """
    steps = 8 if steps is None else steps
    require_whole("steps", steps, {"action": 1, "state": 2}[kind], 10_000)
    # What was told last is where a thing is, and a command's own effect is its answer: no pair can defeat these.
    return draw_balanced(
        lambda: _draw(game, rng, kind, steps), ("last_mention", *(["action_only"] if kind == "action" else []))
    )


def _draw(game: Rules, rng: np.random.Generator, kind: str, steps: int) -> Pair | None:
    start = game.initial(rng)
    state, story = _situation(start), list[Action]()
    for u in rng.random(steps - {"action": 1, "state": 2}[kind]).tolist():
        story.append(game.policy(state, u))
        state = _situation(game.transition(state, story[-1]))
    twins = _twins(state)
    if not twins:
        return None
    subject, mine, theirs = twins[int(rng.integers(len(twins)))]
    tails: list[list[Action]] = [[mine], [theirs]]
    if kind == "state":
        after = [game.transition(state, tail[0]) for tail in tails]
        idle = [[_index(c) for c in game.actions(s) if game.transition(s, c) == s] for s in after]
        both = sorted({*idle[0]} & {*idle[1]})
        both = [
            c for c in both if not any(word in state.world.commands[c].words for word in _names(state, mine, theirs))
        ]
        if not both:
            return None
        ended = both[int(rng.integers(len(both)))]
        tails = [[*tail, ended] for tail in tails]
    seed = int(rng.integers(2**31))
    sides = [build_episode(game, start, [*story, *tail], subject, seed) for tail in tails]
    if rng.random() < 0.5:  # which side has the later answer is left to chance
        sides.reverse()
    clean, corrupted = sides
    pair = Pair(
        kind, "balanced", clean, corrupted, roles(_spans(kind, clean, subject), _spans(kind, corrupted, subject))
    )
    return pair if _differ_in_one_name(pair) else None


def _differ_in_one_name(pair: Pair) -> bool:
    """Tell whether the stories differ in one name alone, told so often as the kind has it.

    Other words differ too where a command shows something: what is in a container, say, as it is opened.
    """
    try:
        found = differences(pair)
    except GameError:  # not the same sentences
        return False
    clean, corrupted = (segments(side) for side in pair.sides)
    words = {(clean[a.piece][a.start : a.end], corrupted[b.piece][b.start : b.end]) for a, b in found}
    return len(found) == {"action": 1, "state": 2}[pair.kind] and len(words) == 1


def _names(state: Situation, *commands: int) -> set[str]:
    """Return the names of what commands name."""
    return {state.world.names[e] for c in commands for e in state.world.commands[c].named}


def _twins(state: Situation) -> list[tuple[str, int, int]]:
    """Return (subject, command about it, command about another thing) for all commands that differ in one name."""
    world, out = state.world, []
    asked = {v.name for v in world.variables}
    for a, b in permutations(world.legal(state.facts), 2):
        ours, theirs = world.commands[a], world.commands[b]
        one, two = ours.words.split(), theirs.words.split()
        if ours.rule != theirs.rule or len(one) != len(two) or not ours.adds:
            continue
        differing = [(x, y) for x, y in zip(one, two, strict=True) if x != y]
        subjects = [e for e in ours.named if e not in theirs.named and [world.names[e]] == [x for x, _ in differing]]
        ends = any(world.won(done) or world.lost(done) for done in (_done(state, a), _done(state, b)))
        if len(differing) == 1 and subjects and world.names[subjects[0]] in asked and not ends:
            out.append((world.names[subjects[0]], a, b))
    return out


def _done(state: Situation, command: int) -> int:
    return state.world.settle(state.world.after(state.facts, command), state.done)


def _spans(kind: str, side: Episode, subject: str) -> dict[str, Span]:
    parts = segments(side)
    narration = piece_of(side, -1, "narration")
    *_, word = parts[narration].split("\n")[-2].split() if kind == "state" else ("", _thing(side))
    found = {
        "action": find_span(side, narration, word),
        "subject": find_span(side, narration + 1, subject),
        "last": last(side),
    }
    places = [
        (i, m) for i, text in enumerate(parts[:narration]) for m in re.finditer(rf"The {subject} is ([^.]*)\.", text)
    ]
    if places:
        piece, match = places[-1]
        found["state"] = Span(piece, *match.span(1))
        if match[1] == side.steps[-1].questions[0].answer:
            found["match"] = found["state"]
    return found


def _thing(side: Episode) -> str:
    """Return the name of the thing that the last command moves: the first one that it names."""
    world = _situation(side.steps[-1].state).world
    return str(world.names[world.commands[_index(side.steps[-1].action)].named[0]])


def _situation(state: State) -> Situation:
    assert isinstance(state, Situation)
    return state


def _index(action: Action) -> int:
    assert isinstance(action, int)
    return action
