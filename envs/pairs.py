"""Minimal pairs for any game, found by search: two episodes that differ in an earlier action or in the last one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from nextstate.envs.contrast import (
    Pair,
    Span,
    build_episode,
    differences,
    draw_balanced,
    last,
    piece_of,
    roles,
    segments,
)
from nextstate.envs.episode import Episode
from nextstate.envs.rules import Action, GameError, Rules, State, require, require_whole

KINDS = ("state", "action")
MOST_IN_OPENING = 2  # maximum number of words of the opening that may differ


def search(
    game: Rules, rng: np.random.Generator, kind: str, steps: int | None = None, hopeless: tuple[str, ...] = ()
) -> Pair:
    """Draw episodes until two of them form a minimal pair.

    The answers of both sides differ and are determined by the text, and no shortcut is right on both sides. The texts
    have the same sentences up to a few words.

    - "state": one earlier action differs, or (if the game offers no other action) the initial state; the last action is
      the same.
    - "action": only the last action differs.

    Args:
        game: the game to draw from.
        rng: the generator to draw from.
        kind: "state" or "action".
        steps: length of both episodes; by default 6, or the game's maximum if that is smaller.
        hopeless: shortcuts that are right on both sides of every pair of this game, which are therefore ignored.

    Raises:
        GameError: no pair was found.
    """
    require(kind in KINDS, "kind", kind, f"one of {', '.join(KINDS)} for pairs that are found by search")
    most = game.max_steps or 10_000
    steps = min(6, most) if steps is None else steps
    require_whole("steps", steps, 1, most)
    return draw_balanced(lambda: _draw(game, rng, kind, steps), hopeless)


def _draw(game: Rules, rng: np.random.Generator, kind: str, steps: int) -> Pair | None:
    """Draw a walk, a variant of it, and a question whose answer differs between the two; None if there is none."""
    start = game.initial(rng)
    walk, states = list[Action](), [start]
    for u in rng.random(steps).tolist():
        if not game.actions(states[-1]):
            return None
        walk.append(game.policy(states[-1], u))
        states.append(game.transition(states[-1], walk[-1]))
    at = steps - 1 if kind == "action" else int(rng.integers(-1, steps - 1))
    twin_start, twin = start, list(walk)
    if at < 0:
        twin_start = game.initial(rng)
    else:
        others = [action for action in game.actions(states[at]) if action != walk[at]]
        if not others:
            return None
        twin[at] = others[int(rng.integers(len(others)))]
    variables = _differing(_last_questions(game, start, walk), _last_questions(game, twin_start, twin))
    if not variables:
        return None
    variable, seed = variables[int(rng.integers(len(variables)))], int(rng.integers(2**31))
    sides = [_episode(game, start, walk, variable, seed), _episode(game, twin_start, twin, variable, seed)]
    if rng.random() < 0.5:  # either side may be the walk that the policy drew
        sides.reverse()
    return _pair(kind, *sides)


def _last_questions(game: Rules, state: State, actions: Sequence[Action]) -> dict[str, str]:
    """Return the answer of each question after the last action; empty if an action is not legal."""
    before, action = state, actions[0]
    for action in actions:
        if action not in game.actions(state):
            return {}
        before, state = state, game.transition(state, action)
    return {q.variable: q.choices[q.truth] for q in game.questions(before, action, state)}


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [variable for variable, answer in one.items() if other.get(variable, answer) != answer]


def _episode(game: Rules, start: State, actions: Sequence[Action], variable: str, seed: int) -> Episode:
    """Return the episode of these actions; its last step asks only about `variable`."""
    if game.feedback == "branch":
        return build_episode(game, start, actions, variable, seed)
    full = build_episode(game, start, actions, seed=seed)
    final = full.steps[-1]
    asked = tuple(q for q in final.questions if q.variable == variable)
    return replace(full, steps=(*full.steps[:-1], final._replace(questions=asked)))


def _pair(kind: str, clean: Episode, corrupted: Episode) -> Pair | None:
    """Return the pair with its roles; None if its texts are equal or differ in more than the kind allows."""
    pair = Pair(kind, "balanced", clean, corrupted, {})
    try:
        found = differences(pair)
    except GameError:  # the texts do not have the same sentences
        return None
    narration = piece_of(clean, -1, "narration")
    earlier = [role for role in found if role.clean.piece < narration]
    final = [role for role in found if role.clean.piece == narration]
    in_opening = [role for role in found if role.clean.piece == 0]
    if (kind == "action" and not final) or (kind == "state" and (not earlier or final)):
        return None
    if len(in_opening) > MOST_IN_OPENING:
        return None
    where = {"state": earlier[-1]} if kind == "state" else {"action": final[-1]}
    return replace(pair, roles=roles(_spans(pair, 0), _spans(pair, 1)) | where)


def _spans(pair: Pair, side: int) -> dict[str, Span]:
    """Return the spans of the roles that both kinds of pairs have."""
    episode, answers = pair.sides[side], pair.answers
    texts = segments(episode)
    narration = piece_of(episode, -1, "narration")
    out = {"last": last(episode)}
    for name, first, end, word in (
        ("action", narration, narration + 1, ""),
        ("match", 0, narration + 1, answers[side]),
        ("distractor", 0, narration + 1, answers[1 - side]),
        ("subject", len(texts) - 1, len(texts), pair.questions[side].variable),
    ):
        pattern = rf"(?<!\w){re.escape(word.strip())}(?!\w)" if word else r"\w+"
        places = [(i, m) for i in range(first, end) for m in re.finditer(pattern, texts[i])]
        if places:
            piece, match = places[-1]
            out[name] = Span(piece, *match.span())
    return out
