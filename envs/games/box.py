"""Objects that are moved between boxes ("Scaling Laws for State Dynamics", arXiv 2505.14892, box tracking)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import getitem
from typing import ClassVar, NamedTuple, final

import numpy as np

from nextstate.envs.contrast import Pair, Span, build_episode, draw_balanced, find_span, last, roles
from nextstate.envs.game import (
    Action,
    Distribution,
    Episode,
    Feedback,
    Frequencies,
    Game,
    Question,
    Reader,
    Sample,
    State,
    Step,
    one_hot,
    require_whole,
    split_uniform,
)

OBJECTS = ("hat", "glove", "ball", "key", "pen", "book", "coin", "card", "ring", "watch")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Words(NamedTuple):
    """Templates of one style."""

    fact: str
    move: str
    stem: str


STYLES = {
    "paper": Words("Box {box} contains the {object}.", " Move the {object} into Box {box}.", " {Object} is in the Box"),
    "plain": Words("The {object} is in Box {box}.", " The {object} goes to Box {box}.", " The {object} is in Box"),
}


class Move(NamedTuple):
    """Move an object into a box; both are given as indices."""

    object: int
    box: int


Places = tuple[int, ...]  # the index of each object's box


@final
@dataclass(frozen=True)
class Box(Game):
    """Objects are in boxes; each step moves one object to another box.

    State: the box of every object, |Q| = boxes ** objects. Each object starts in a uniformly random box. A step draws a
    non-empty box, an object in it, and a different box. There is one question for each object: which box is it in?

    Ideal reader: the opening names the box of every object and each move the new one, so that all answers are
    determined. (The last mention of an object gives its box, so retrieval is enough: the shortcut `last_mention`.)

    Args:
        boxes: number of boxes, 2 to 26.
        objects: number of objects, 1 to 10; by default as many as boxes (at most 10).
        style: "paper" (the published wording) or "plain".
        feedback: "branch" (questions do not appear in the transcript) or "inline" (questions and answers stay in it).
    """

    name: ClassVar[str] = "Box"
    size: ClassVar[str] = "boxes"
    sizes: ClassVar[range] = range(2, 13)
    shortcuts: ClassVar[tuple[str, ...]] = ("last_mention", "action_only", "most_frequent", "stay")
    feedbacks: ClassVar[tuple[Feedback, ...]] = ("branch", "inline")
    styles: ClassVar[tuple[str, ...]] = tuple(STYLES)
    contrasts: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
        ("state", "action", "name", "noop"), ("balanced",)
    )

    boxes: int = 4
    objects: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("boxes", self.boxes, 2, len(LETTERS))
        if self.objects is None:
            object.__setattr__(self, "objects", min(self.boxes, len(OBJECTS)))
        require_whole("objects", self.objects, 1, len(OBJECTS))

    @classmethod
    def sample(cls, rng: np.random.Generator, size: int, level: int) -> Sample:
        objects = min(size, 10) if rng.random() < 0.5 else int(rng.integers(1, min(level, 10) + 1))
        style = "paper" if rng.random() < 0.8 else "plain"
        feedback = "branch" if rng.random() < 0.8 else "inline"
        game = cls(boxes=size, objects=objects, style=style, feedback=feedback)
        return Sample(game, int(rng.integers(1, 13)), 2)

    @property
    def max_choices(self) -> int:
        return self.boxes

    @cached_property
    def _nouns(self) -> tuple[str, ...]:
        return OBJECTS[: self.objects]

    @cached_property
    def _values(self) -> list[list[tuple[str, str]]]:
        return [[(noun, LETTERS[b]) for b in range(self.boxes)] for noun in self._nouns]

    @cached_property
    def _actions(self) -> list[list[Move]]:
        return [[Move(o, b) for b in range(self.boxes)] for o in range(len(self._nouns))]

    @cached_property
    def _moves(self) -> list[list[str]]:
        move = STYLES[self.style].move
        return [[move.format(object=noun, box=LETTERS[b]) for b in range(self.boxes)] for noun in self._nouns]

    @cached_property
    def _questions(self) -> list[list[Question]]:
        stem, choices = STYLES[self.style].stem, tuple(f" {LETTERS[b]}" for b in range(self.boxes))
        stems = [stem.format(object=noun, Object=noun.capitalize()) for noun in self._nouns]
        return [
            [Question(noun, text, choices, b, (b,)) for b in range(self.boxes)]
            for noun, text in zip(self._nouns, stems, strict=True)
        ]

    @cached_property
    def _alone(self) -> list[list[tuple[Question]]]:
        return [[(question,) for question in row] for row in self._questions]

    def initial(self, rng: np.random.Generator) -> Places:
        return tuple(rng.integers(self.boxes, size=len(self._nouns)).tolist())

    def actions(self, state: State) -> Sequence[Move]:
        places = _places(state)
        return [Move(o, b) for o, at in enumerate(places) for b in range(self.boxes) if b != at]

    def transition(self, state: State, action: Action) -> Places:
        assert isinstance(state, tuple)
        assert isinstance(action, tuple)
        after = list(state)
        after[action[0]] = action[1]
        return tuple(after)

    def policy(self, state: State, u: float) -> Move:
        assert isinstance(state, tuple)
        source: int
        full = sorted(set(state))
        u *= len(full)  # `split`, written out: this is the hottest line of the game
        source = full[int(u)]
        u -= int(u)
        which, count = state.index(source), state.count(source)
        if count > 1:
            i, u = split_uniform(u, count)
            for _ in range(i):
                which = state.index(source, which + 1)
        target: int = int(u * (self.boxes - 1))
        return self._actions[which][target + (target >= source)]

    def values(self, state: State) -> Mapping[str, str]:
        assert isinstance(state, tuple)
        return dict(map(getitem, self._values, state))

    def opening(self, state: State) -> str:
        places, fact = _places(state), STYLES[self.style].fact
        order = [(b, o) for b in range(self.boxes) for o, at in enumerate(places) if at == b]
        return " ".join(fact.format(box=LETTERS[b], object=self._nouns[o]) for b, o in order)

    def narrate(self, state: State, action: Action, next_state: State) -> str:
        assert isinstance(action, tuple)
        return self._moves[action[0]][action[1]]

    def questions(self, state: State, action: Action, next_state: State) -> tuple[Question, ...]:
        assert isinstance(next_state, tuple)
        return tuple(map(getitem, self._questions, next_state))

    def step(self, state: State, u: float, v: float, ask: int) -> Step:
        if ask > 1:
            return super().step(state, u, v, ask)
        action = self.policy(state, u)
        after = self.transition(state, action)
        which = int(v * len(after))  # only the question that is asked is looked up
        words = self._moves[action[0]][action[1]]
        return tuple.__new__(Step, (state, action, after, words, self._alone[which][after[which]], ""))

    def size_of(self, state: State) -> int:
        return int(self.boxes ** len(self._nouns))

    def command(self, state: State, action: Action) -> str:
        move = _move(action)
        return f"move the {self._nouns[move[0]]} into Box {LETTERS[move[1]]}"

    def reader(self, state: State) -> Reader:
        return BoxReader(self, _places(state))

    def draw_pair(self, rng: np.random.Generator, kind: str, design: str, steps: int | None, distance: int) -> Pair:
        return _draw_pair(self, rng, kind, design, steps, distance)


class BoxReader(Reader):
    """Knows the state: the opening gives the box of every object, and each narration the new one."""

    def __init__(self, game: Box, start: Places) -> None:
        self.start, self.places = start, list(start)
        self.last, self.frequencies = start[-1], Frequencies(start)  # every object's fact named its box
        self.n, self.index = game.boxes, {noun: o for o, noun in enumerate(game._nouns)}

    def observe(self, action: Action) -> None:
        assert isinstance(action, tuple)
        self.places[action[0]] = action[1]
        self.last = action[1]
        self.frequencies.add(action[1])

    def guess(self, name: str, question: Question) -> Distribution:
        at = self.index[question.variable]
        if name in ("ideal", "last_mention"):  # the last sentence about an object names its box
            return one_hot(self.n, self.places[at])
        if name == "action_only":
            return one_hot(self.n, self.last)
        if name == "stay":
            return one_hot(self.n, self.start[at])
        if name == "most_frequent":
            return self.frequencies.belief(self.n)
        raise KeyError(name)


def _places(state: State) -> Places:
    assert isinstance(state, tuple)
    return state


def _move(action: Action) -> tuple[int, int]:
    assert isinstance(action, tuple)
    return action


def _draw_pair(game: Box, rng: np.random.Generator, kind: str, design: str, steps: int | None, distance: int) -> Pair:
    """Draw a pair about one object, the subject; see `Game.contrast`. Only the last step has a question.

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
    return draw_balanced(lambda: _draw(game, rng, kind, steps, distance), ("last_mention",))


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
    clean, corrupted = (build_episode(game, start, side, noun, seed) for side in moves)
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
    """Draw two stories that differ in `fixed` moves and in the names of `renamed` boxes; None if one is not possible.

    After its fixed move, `subject` is not moved again.
    """
    at, moves = (list(start), list(start)), (list[Move](), list[Move]())
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
            moves[side].append(move)
    return moves


def _location(episode: Episode, noun: str, steps: int) -> Span:
    """Return the span of the box letter in the last sentence about an object, up to the first `steps` steps."""
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
    state, match, word = _location(side, noun, n - 1), _location(side, noun, n), _moved(now.action)
    return {
        "state": state,
        "action": find_span(side, n, word),
        "match": match,
        **({"distractor": state if match != state else _location(side, word, n)} if kind == "action" else {}),
        "subject": find_span(side, n + 1, noun if noun in now.questions[0].stem else noun.capitalize()),
        "last": last(side),
    }
