"""Strongest, for stepping environments: all episodes at once in NumPy tables.

Who needs one game, and nothing else of an environment, writes its rules as arrays: one look-up moves all episodes on,
and words come from tables of strings. These programs do less than an environment: start states, automata and random
numbers are given, there are no ceilings and no `info`, and an answer is an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Integers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Boxes = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Played(NamedTuple):
    """What the episodes showed, a tuple of texts for each step, and the rewards, [step episode]."""

    shown: list[tuple[str, ...]]
    rewards: Floats


class Automata(NamedTuple):
    """One automaton for each episode, as arrays."""

    target: Integers  # [episode state edge]
    action: Integers  # index of the action of each edge, [episode state edge]
    degree: Integers  # number of edges, [episode state]
    start: Integers  # [episode]
    states: Sequence[Sequence[str]]  # names, by episode
    actions: Sequence[Sequence[str]]


def play_dfa(automata: Automata, openings: Sequence[str], draws: Floats, answer: int) -> Played:
    """Walk all automata and answer each question with the same choice; `draws` is [episode step 2], in [0, 1)."""
    episodes, steps, _ = draws.shape
    rows, at, heads = np.arange(episodes), automata.start, list(openings)
    shown, rewards = [], np.zeros((steps, episodes))
    for t in range(steps):
        edge = (draws[:, t, 0] * automata.degree[rows, at]).astype(np.int64)
        actions = automata.action[rows, at, edge].tolist()
        at = automata.target[rows, at, edge]
        rewards[t] = at == answer
        asked = [
            f"{head} Take action {names[a]}, go to state"
            for head, names, a in zip(heads, automata.actions, actions, strict=True)
        ]
        shown.append(tuple(asked))
        heads = [f"{text} {names[s]}." for text, names, s in zip(asked, automata.states, at.tolist(), strict=True)]
    return Played(shown, rewards)


def play_box(
    start: Integers, boxes: int, nouns: Sequence[str], openings: Sequence[str], draws: Floats, answer: int
) -> Played:
    """Move objects between boxes in all episodes, and answer each question with the same box.

    Args:
        start: the box of each object, [episode object].
        boxes: number of boxes.
        nouns: names of the objects.
        openings: the first text of each episode.
        draws: numbers in [0, 1), [episode step 2]: one for the move, one for the question.
        answer: index of a box.
    """
    episodes, steps, _ = draws.shape
    rows, places, heads = np.arange(episodes), start.copy(), list(openings)
    moves = [[f" Move the {noun} into Box {box}." for box in Boxes[:boxes]] for noun in nouns]
    stems = [f" {noun.capitalize()} is in the Box" for noun in nouns]
    shown, rewards = [], np.zeros((steps, episodes))
    for t in range(steps):
        filled = (places[:, :, None] == np.arange(boxes)).any(1)  # [episode box]
        u, source = pick(filled, draws[:, t, 0])
        u, moved = pick(places == source[:, None], u)
        target = (u * (boxes - 1)).astype(np.int64)
        target += target >= source
        places[rows, moved] = target
        asked = (draws[:, t, 1] * len(nouns)).astype(np.int64)
        rewards[t] = places[rows, asked] == answer
        told = zip(heads, moved.tolist(), target.tolist(), strict=True)
        heads = [f"{head}{moves[o][b]}" for head, o, b in told]
        shown.append(tuple([f"{head}{stems[o]}" for head, o in zip(heads, asked.tolist(), strict=True)]))
    return Played(shown, rewards)


def pick(open_: np.ndarray[Any, np.dtype[np.bool_]], u: Floats) -> tuple[Floats, Integers]:
    """Pick one of the true columns of each row by a number in [0, 1); return what is left of it, and the column."""
    u = u * open_.sum(1)
    number = u.astype(np.int64)
    column = ((open_.cumsum(1) == number[:, None] + 1) & open_).argmax(1)
    return u - number, column
