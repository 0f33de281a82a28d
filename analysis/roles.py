"""Positions of the state and the action in the prompt of any question, found from its words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nextstate.agents.agent import Prompt
from nextstate.envs.contrast import Span, piece_of, segments

ROLES = ("state", "action", "last")  # "last" is the answering token, the end of the prompt


def spans(prompt: Prompt) -> dict[str, Span]:
    """Return the spans of "state" and "action" in a prompt; a role that the prompt does not mention is omitted.

    - "state": the last mention before this step of the current value of the variable asked about, in the last sentence
      that names both (or, if no sentence does, the last mention of the value).
    - "action": the last word of the step's command, in its narration: an action's name, the box moved into, the fruit.
    """
    episode, t, _ = prompt
    step, game, parts = episode.steps[t], episode.game, segments(*prompt)
    narration = piece_of(episode, t, "narration")
    out = {}
    value = game.values(step.state).get(prompt.asked.variable, "")
    at = _mention("".join(parts[:narration]), value, prompt.asked.variable) if value else None
    if at is not None:
        out["state"] = _span(parts, *at)
    word = re.findall(r"\w+", game.command(step.state, step.action))[-1]
    found = [*re.finditer(rf"\b{re.escape(word)}\b", parts[narration])]
    if found:
        out["action"] = Span(narration, *found[-1].span())
    return out


def _mention(text: str, value: str, variable: str) -> tuple[int, int] | None:
    named = re.compile(rf"\b{re.escape(variable)}\b", re.IGNORECASE)
    places = [m.span() for m in re.finditer(rf"\b{re.escape(value)}\b", text)]
    for start, end in reversed(places):
        sentence = slice(max(text.rfind(mark, 0, start) for mark in ".\n") + 1, end)
        if named.search(text[sentence]):
            return start, end
    return places[-1] if places else None


def _span(parts: Sequence[str], start: int, end: int) -> Span:
    for piece, text in enumerate(parts):
        if start < len(text):
            return Span(piece, start, end)
        start, end = start - len(text), end - len(text)
    raise AssertionError("a position outside the prompt")
