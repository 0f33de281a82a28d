"""Minimal pairs: two episodes that differ in one respect, so that a difference in a model's behaviour has one cause.

Games draw pairs with `Game.contrast`. This module has the types, and the conditions that a pair must satisfy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from nextstate.envs.episode import Episode
from nextstate.envs.rules import Action, GameError, Question, Rules, State, Step, expected_accuracy

KINDS = ("state", "action", "name", "noop")
DESIGNS = ("balanced", "paper")
Part = Literal["narration", "stem", "answer", "closing"]
_PARTS: tuple[Part, ...] = ("narration", "stem", "answer", "closing")
_TRIES = 2000


class Span(NamedTuple):
    """Characters `start` up to `end` (exclusive) of segment number `piece` of a prompt (see `segments`)."""

    piece: int
    start: int
    end: int


class Role(NamedTuple):
    """The spans of a role in the two prompts of a pair."""

    clean: Span
    corrupted: Span


@dataclass(frozen=True)
class Pair:
    """Two episodes that differ in one respect. The question of each side is question 0 of its last step.

    The kinds of pairs, by what differs (in the balanced design, nothing else does):
    - "state": the same last action in another state, so that the answer changes;
    - "action": another last action in the same state, so that the answer changes;
    - "name": one name, at each of its occurrences, and therefore the answer;
    - "noop": as "state", with steps in between that do not change the answer.

    The roles, as far as a game has them: "state" (the last mentioned value of the queried variable), "action" (the
    effect of the last step), "match" (the right answer in the transcript), "distractor" (the same place for the other
    side's answer), "subject" (what the question is about), "origin" (in noop pairs of the DFA: the mention of the state
    before the steps that change nothing), "last" (the end of the prompt).
    """

    kind: str
    design: str
    clean: Episode
    corrupted: Episode
    roles: Mapping[str, Role] = field(hash=False)

    @property
    def sides(self) -> tuple[Episode, Episode]:
        """The two episodes: clean, corrupted."""
        return self.clean, self.corrupted

    @property
    def questions(self) -> tuple[Question, Question]:
        """The question of each side."""
        return self.clean.steps[-1].questions[0], self.corrupted.steps[-1].questions[0]

    @property
    def answers(self) -> tuple[str, str]:
        """The right answer of each side, as a continuation of the prompt."""
        clean, corrupted = self.questions
        return clean.choices[clean.truth], corrupted.choices[corrupted.truth]

    def swapped(self) -> Pair:
        """Return the pair with its two sides exchanged."""
        roles = {name: Role(role.corrupted, role.clean) for name, role in self.roles.items()}
        return Pair(self.kind, self.design, self.corrupted, self.clean, roles)


def segments(episode: Episode, step: int = -1, question: int = 0) -> tuple[str, ...]:
    """Return the segments whose concatenation is `episode.prompt(step, question)`; agents tokenize each one separately.

    The segments are the opening; for each earlier step its narration, with inline feedback the stem, answer and closing
    of each question, and its outcome if it has one; then the narration and earlier questions of the step itself, and
    finally the stem. Some segments are empty.
    """
    step = range(len(episode.steps))[step]
    inline = episode.game.feedback == "inline"
    out = [episode.opening]
    for i, now in enumerate(episode.steps[: step + 1]):
        out.append(now.narration)
        if inline:
            for q in now.questions[: question if i == step else None]:
                out += (q.stem, q.choices[q.truth], q.closing)
        if now.outcome and i < step:
            out.append(now.outcome)
    return (*out, episode.steps[step].questions[question].stem)


def piece_of(episode: Episode, step: int, part: Part) -> int:
    """Return the index of the segment with `part` (of question 0) of `step` in the prompt of the last step."""
    inline = episode.game.feedback == "inline"
    earlier = episode.steps[: range(len(episode.steps))[step]]
    before = sum(1 + 3 * len(s.questions) * inline + bool(s.outcome) for s in earlier)
    return 1 + before + _PARTS.index(part)


def find_span(episode: Episode, piece: int, word: str) -> Span:
    """Return the last occurrence of `word` in a segment of the last step's prompt; raises `GameError` if absent."""
    text = segments(episode)[piece]
    found = [*re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", text)]
    if not found:
        raise GameError(f"word={word!r} is not in segment {piece} of the prompt: expected a word of {text!r}")
    return Span(piece, found[-1].start(), found[-1].end())


def answered(episode: Episode, step: int) -> Span:
    """Return the span of the answer to question 0 of `step` (inline feedback only)."""
    return find_span(episode, piece_of(episode, step, "answer"), episode.steps[step].questions[0].answer)


def last(episode: Episode) -> Span:
    """Return the span of the last character of the last step's prompt."""
    texts = segments(episode)
    piece = max(i for i, text in enumerate(texts) if text)
    return Span(piece, len(texts[piece]) - 1, len(texts[piece]))


def differences(pair: Pair) -> list[Role]:
    """Return the spans of words that differ between the two prompts; raises `GameError` if sentences differ."""
    clean, corrupted = (segments(side) for side in pair.sides)
    out = []
    for i, texts in enumerate(zip(clean, corrupted, strict=False)):
        ours, theirs = (re.findall(r"\w+|\W", text) for text in texts)
        if len(ours) != len(theirs):
            raise GameError(f"segment {i} of the prompts is not the same sentence: found {texts[0]!r} and {texts[1]!r}")
        at = [0, 0]
        for words in zip(ours, theirs, strict=True):
            spans = [Span(i, a, a + len(word)) for a, word in zip(at, words, strict=True)]
            at = [span.end for span in spans]
            if words[0] != words[1]:
                out.append(Role(*spans))
    if len(clean) != len(corrupted):
        raise GameError(f"the prompts have {len(clean)} and {len(corrupted)} segments: expected equal numbers")
    return out


def problems(pair: Pair) -> tuple[str, ...]:
    """Return descriptions of what makes a pair unusable for measurements; empty if the pair is sound.

    In a sound pair the sides have the same number of steps and different answers; each answer is settled by its
    transcript, and is a choice on the other side.
    """
    found = []
    clean, corrupted = pair.answers
    if clean == corrupted:
        found.append(f"both sides have the answer {clean.strip()}")
    if len(pair.clean.steps) != len(pair.corrupted.steps):
        found.append(f"the sides have {len(pair.clean.steps)} and {len(pair.corrupted.steps)} steps")
    names = ("clean", "corrupted")
    for name, side, question, other in zip(names, pair.sides, pair.questions, pair.answers[::-1], strict=True):
        if other not in question.choices:
            found.append(f"{other.strip()} is not a choice on the {name} side")
        if expected_accuracy(side.beliefs("lookup")[-1][0], question.accepted) < 1 or len(question.accepted) > 1:
            found.append(f"the {name} transcript does not determine the answer")
    return tuple(found)


def shortcuts(pair: Pair) -> dict[str, float]:
    """Return the accuracy of each of the game's shortcuts on the pair, averaged over its sides."""
    return {
        name: sum(
            expected_accuracy(side.beliefs(name)[-1][0], question.accepted)
            for side, question in zip(pair.sides, pair.questions, strict=True)
        )
        / 2
        for name in pair.clean.game.shortcuts
    }


def draw_balanced(draw: Callable[[], Pair | None], hopeless: tuple[str, ...] = ()) -> Pair:
    """Draw until there is a sound pair on which no shortcut, except the `hopeless` ones, scores more than one half."""
    for _ in range(_TRIES):
        pair = draw()
        if pair is None or problems(pair):
            continue
        if all(value <= 0.5 for name, value in shortcuts(pair).items() if name not in hopeless):
            return pair
    raise GameError(f"all pairs found in {_TRIES:,} draws can be solved by a shortcut: expected more steps")


def roles(clean: Mapping[str, Span], corrupted: Mapping[str, Span]) -> dict[str, Role]:
    """Combine the spans of two sides into roles; roles that only one side has are left out."""
    return {name: Role(span, corrupted[name]) for name, span in clean.items() if name in corrupted}


def build_episode(game: Rules, start: State, actions: Sequence[Action], variable: str = "", seed: int = 0) -> Episode:
    """Return the episode of these actions.

    If `variable` is given, only the last step has a question, about this variable; otherwise each step has all
    questions.
    """
    steps: list[Step] = []
    state = start
    for i, action in enumerate(actions):
        after = game.transition(state, action)
        asked = game.questions(state, action, after)
        if variable:
            asked = tuple(q for q in asked if q.variable == variable and i == len(actions) - 1)
        words = game.narrate(state, action, after)
        steps.append(Step(state, action, after, words, asked, game.outcome(state, action, after)))
        state = after
    return Episode(game, seed, start, game.opening(start), tuple(steps))
