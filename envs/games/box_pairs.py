"""Minimal pairs of the boxes: two stories that differ in where one object is."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from nextstate.envs.contrast import Pair, Span, fair, last, roles, spot, tell
from nextstate.envs.game import Action, Episode, require_whole
from nextstate.envs.games.box import LETTERS, OBJECTS, Box, Move, Places


def draw_pair(game: Box, rng: np.random.Generator, kind: str, design: str, steps: int | None, distance: int) -> Pair:
    """Draw a pair about one object, the subject; see `Game.contrast`. Before the last step nothing is asked.

    - "state", "noop": an earlier move puts the subject into another box; after it (for `distance` moves) only other
      objects are moved. One letter differs.
    - "action": the last step moves the subject into a box, or another object into the same box. One noun differs.
    - "name": the subject's last box, which the opening does not name and another object comes into too, is called by a
      letter that is not in the story.
    """
    objects = game.objects or 0
    steps = 6 + distance if steps is None else steps
    require_whole("objects", objects, 2, len(OBJECTS))
    require_whole("boxes", game.boxes, {"action": 2, "name": 4}.get(kind, 3), len(LETTERS))
    require_whole("steps", steps, {"state": 2, "action": 1, "name": 3, "noop": 1 + distance}[kind], 10_000)
    return fair(lambda: _draw(game, rng, kind, steps, distance), ("last_mention",))


def _draw(game: Box, rng: np.random.Generator, kind: str, steps: int, distance: int) -> Pair | None:
    subject, other = rng.permutation(game.objects or 0)[:2].tolist()
    here, there, *more = rng.permutation(game.boxes).tolist()
    start, renamed = game.initial(rng), dict[int, int]()
    if kind == "action":
        fixed = {steps - 1: (Move(subject, here), Move(other, here))}
    elif kind == "name":
        start, renamed = tuple([more[b % len(more)] for b in start]), {here: there}
        arrivals = zip(rng.permutation(steps)[:2].tolist(), (subject, other), strict=True)
        fixed = {t: (Move(o, here), Move(o, there)) for t, o in arrivals}
    else:
        after = int(rng.integers(1, steps)) if kind == "state" else distance
        fixed = {steps - 1 - after: (Move(subject, here), Move(subject, there))}
    moves = _twin_moves(game, rng, start, steps, fixed, renamed, None if kind == "action" else subject)
    if moves is None:
        return None
    seed, noun = int(rng.integers(2**31)), OBJECTS[subject]
    clean, corrupted = (tell(game, start, side, noun, seed) for side in moves)
    if kind == "action" and rng.random() < 0.5:  # which side has the later answer is left to chance
        clean, corrupted = corrupted, clean
    return Pair(kind, "balanced", clean, corrupted, roles(_spans(kind, clean), _spans(kind, corrupted)))


def _twin_moves(
    game: Box,
    rng: np.random.Generator,
    start: Places,
    steps: int,
    fixed: Mapping[int, tuple[Move, Move]],
    renamed: Mapping[int, int],
    subject: int | None,
) -> tuple[list[Move], list[Move]] | None:
    """Draw two stories that differ in `fixed` moves and in the names of `renamed` boxes; None where one cannot be told.

    Once `subject` has made its fixed move it stays.
    """
    at, told = (list(start), list(start)), (list[Move](), list[Move]())
    settled: set[int] = set()
    for t in range(steps):
        two = fixed.get(t)
        if two is None:
            free = [
                (Move(o, b), Move(o, renamed.get(b, b)))
                for o in range(len(start))
                for b in range(game.boxes)
                if o not in settled and b not in renamed.values()
            ]
            legal = [(m, n) for m, n in free if at[0][m.object] != m.box and at[1][n.object] != n.box]
            if not legal:
                return None
            two = legal[int(rng.integers(len(legal)))]
        elif two[0].object == subject:
            settled.add(subject)
        for side, move in enumerate(two):
            if at[side][move.object] == move.box:
                return None
            at[side][move.object] = move.box
            told[side].append(move)
    return told


def _told(episode: Episode, noun: str, steps: int) -> Span:
    """Return the letter of the box in the last sentence about an object, in the opening and the first `steps` steps."""
    about = re.compile(rf"[^.]*\b{noun}\b[^.]*\.")
    texts = [episode.opening, *(step.narration for step in episode.steps[:steps])]
    piece, found = [(i, sentence) for i, text in enumerate(texts) for sentence in about.finditer(text)][-1]
    letter = re.search(r"Box ([A-Z])", found[0])
    assert letter is not None
    return Span(piece, found.start() + letter.start(1), found.start() + letter.end(1))


def _moved(action: Action) -> str:
    assert isinstance(action, Move)
    return OBJECTS[action.object]


def _spans(kind: str, side: Episode) -> dict[str, Span]:
    now, n = side.steps[-1], len(side.steps)
    noun = now.questions[0].variable
    state, match, word = _told(side, noun, n - 1), _told(side, noun, n), _moved(now.action)
    return {
        "state": state,
        "action": spot(side, n, word),
        "match": match,
        **({"distractor": state if match != state else _told(side, word, n)} if kind == "action" else {}),
        "subject": spot(side, n + 1, noun if noun in now.questions[0].stem else noun.capitalize()),
        "last": last(side),
    }
