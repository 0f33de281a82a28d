"""Episodes: the steps of a game from an initial state, and the texts that players and readers see."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np

from nextstate.envs.rules import Distribution, Rules, State, Step, require_whole, uniform


@dataclass(frozen=True)
class Episode:
    """An opening and a sequence of steps. Environments produce episodes; agents and analyses read them."""

    game: Rules
    seed: int
    start: State
    opening: str
    steps: tuple[Step, ...]
    _beliefs: dict[str, list[list[Distribution]]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _ceilings: list[list[float]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def texts(self) -> tuple[str, ...]:
        """The text that each step adds to the transcript: narration, inline questions with answers, outcome."""
        if self.game.feedback == "branch":
            return tuple([s.narration + s.outcome for s in self.steps])
        texts = []
        for _, _, _, words, asked, outcome in self.steps:
            for _, stem, choices, truth, _, closing in asked:
                words = f"{words}{stem}{choices[truth]}{closing}"
            texts.append(words + outcome)
        return tuple(texts)

    @property
    def transcripts(self) -> tuple[str, ...]:
        """The transcript before each step, followed by the complete transcript; T + 1 strings."""
        return tuple(accumulate(self.texts, initial=self.opening))

    def prompt(self, step: int, question: int = 0) -> str:
        """Return the text up to the answer of a question; `step` and `question` are counted from 0."""
        now = self.steps[step]
        asked = now.questions[: question + 1]
        head = self.opening + "".join(self.texts[:step]) + now.narration
        if self.game.feedback == "inline":
            head += "".join(q.stem + q.choices[q.truth] + q.closing for q in asked[:-1])
        return head + asked[-1].stem

    def prompts(self) -> list[list[str]]:
        """Return `prompt` of every question, by step and question, in time linear in the length of the texts."""
        inline = self.game.feedback == "inline"
        out = []
        for head, (_, _, _, narration, asked, _) in zip(self.transcripts, self.steps, strict=False):
            head += narration
            row = []
            for _, stem, choices, truth, _, closing in asked:
                row.append(head + stem)
                if inline:
                    head = f"{head}{stem}{choices[truth]}{closing}"
            out.append(row)
        return out

    def beliefs(self, name: str) -> list[list[Distribution]]:
        """Return the distributions of `name` ("ideal", "lookup", "chance" or a shortcut), by step and question.

        The results are cached for each name.
        """
        if name not in self._beliefs:
            self.read([name])
        return self._beliefs[name]

    @property
    def ceilings(self) -> list[list[float]]:
        """The accuracy that the ideal reader expects of its answers, given the text; by step and question."""
        if not self._ceilings:
            self.read(ceilings=True)
        return self._ceilings

    def read(self, names: Iterable[str] = (), ceilings: bool = False) -> None:
        """Read the transcript once for several `beliefs`, and for `ceilings`; later calls of these return the results.

        Args:
            names: whose beliefs.
            ceilings: also compute the ceilings.
        """
        wanted = [name for name in names if name not in self._beliefs]
        if "chance" in wanted:
            wanted.remove("chance")
            self._beliefs["chance"] = [[uniform(len(q.choices)) for q in step.questions] for step in self.steps]
        found: dict[str, list[list[Distribution]]] = {name: [] for name in wanted}
        ceiling = ceilings and not self._ceilings
        if not found and not ceiling:
            return
        reader = self.game.reader(self.start)
        observe, observe_answer, guess, lookup = reader.observe, reader.observe_answer, reader.guess, reader.lookup
        inline = self.game.feedback == "inline"
        guessed = [(name, out.append) for name, out in found.items() if name != "lookup"]
        looked_up = found.get("lookup")
        for _, action, _, _, asked, _ in self.steps:
            observe(action)
            if len(asked) == 1:  # most episodes: written out, since this loop runs for each question of each experiment
                question = asked[0]
                for name, add in guessed:
                    add([guess(name, question)])
                if looked_up is not None:
                    looked_up.append([lookup(question)])
                if ceiling:
                    self._ceilings.append([reader.ceiling(question)])
                if inline:
                    observe_answer(question.truth)
                continue
            rows: dict[str, list[Distribution]] = {name: [] for name in found}
            tops: list[float] = []
            for question in asked:
                for name, row in rows.items():
                    row.append(lookup(question) if name == "lookup" else guess(name, question))
                if ceiling:
                    tops.append(reader.ceiling(question))
                if inline:
                    observe_answer(question.truth)
            for name, row in rows.items():
                found[name].append(row)
            if ceiling:
                self._ceilings.append(tops)
        self._beliefs.update(found)


def check_steps(game: Rules, steps: int) -> None:
    """Raise `GameError` if episodes of `steps` steps are not possible."""
    require_whole("steps", steps, 1, game.max_steps or 1_000_000)


def unroll(
    game: Rules, seed: int, steps: int, ask: int | Literal["all"] = 1, rng: np.random.Generator | None = None
) -> Episode:
    """Play one episode by the game's policy.

    Args:
        game: the game to play.
        seed: determines the episode on every computer; stored in the episode.
        steps: number of transitions.
        ask: number of questions after each step, drawn without replacement from `game.questions`, or "all".
        rng: the generator to draw from; by default the one that `gym.Env.reset(seed=seed)` creates.
    """
    check_steps(game, steps)
    if rng is None:
        rng = np.random.default_rng(seed)
    state = start = game.initial(rng)
    draws = rng.random((steps, 2)).tolist()
    step, most = game.step, sys.maxsize if ask == "all" else ask
    done: list[Step] = []
    for u, v in draws:
        now = step(state, u, v, most)
        done.append(now)
        state = now.next_state
    return Episode(game, seed, start, game.opening(start), tuple(done))
