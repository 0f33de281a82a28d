"""Questions and answers in columns: what all agents share about their prompts, and the tables made from both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Literal, overload

import numpy as np
import polars as pl
from jaxtyping import Bool, Int

from nextstate.agents.agent import Predictions, Prompt
from nextstate.envs.game import Distribution, Episode, Question, own_accuracy

Grid = Literal["episodes", "cells"]


class Asked(Sequence[Prompt]):
    """Prompts, with columns about their questions that are computed once for all agents.

    Games use few question objects many times, so texts are kept once for each distinct object.

    Args:
        prompts: the prompts; those of an episode follow each other.
    """

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._prompts = list(prompts)

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> Asked:
        """Return prompts with their columns."""
        return prompts if isinstance(prompts, Asked) else cls(prompts)

    @classmethod
    def all_of(cls, episodes: Iterable[Episode], grid: Grid = "episodes") -> Asked:
        """Return the prompts of episodes: of every step, or with `grid="cells"` of the last step only."""
        return cls(prompt for episode in episodes for prompt in _prompts_of(episode, grid))

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        return self._prompts[index]

    @cached_property
    def episodes(self) -> list[Episode]:
        """The episodes, each once for each run of prompts about it."""
        found: list[Episode] = []
        for episode, _, _ in self._prompts:
            if not found or found[-1] is not episode:
                found.append(episode)
        return found

    @cached_property
    def at(self) -> Int[np.ndarray, " prompt"]:
        """The index of each prompt's episode in `episodes`."""
        marks = np.fromiter((id(p[0]) for p in self._prompts), np.int64, len(self))
        return np.asarray(np.cumsum(np.diff(marks, prepend=marks[:1]) != 0, dtype=np.int64))

    @cached_property
    def seed(self) -> Int[np.ndarray, " prompt"]:
        """The seeds of the episodes."""
        return np.asarray(np.array([e.seed for e in self.episodes], dtype=np.int64)[self.at])

    @cached_property
    def step(self) -> Int[np.ndarray, " prompt"]:
        """The steps, from 0."""
        return np.fromiter((p[1] for p in self._prompts), np.int64, len(self))

    @cached_property
    def question(self) -> Int[np.ndarray, " prompt"]:
        """The questions within their steps, from 0."""
        return np.fromiter((p[2] for p in self._prompts), np.int64, len(self))

    @cached_property
    def names(self) -> list[bytes]:
        """Step and question of each prompt as text, from which ties are broken."""
        known: dict[tuple[int, int], bytes] = {}
        out = []
        for _, step, question in self._prompts:
            name = known.get((step, question))
            if name is None:
                name = known[step, question] = f"{step} {question}".encode()
            out.append(name)
        return out

    @cached_property
    def questions(self) -> list[Question]:
        """The questions."""
        return [episode.steps[step].questions[question] for episode, step, question in self._prompts]

    @cached_property
    def _coded(self) -> tuple[list[Question], Int[np.ndarray, " prompt"]]:
        return distinct(self.questions)

    @property
    def kinds(self) -> list[Question]:
        """The distinct question objects."""
        return self._coded[0]

    @property
    def kind(self) -> Int[np.ndarray, " prompt"]:
        """The index of each prompt's question in `kinds`."""
        return self._coded[1]

    @cached_property
    def sizes(self) -> Int[np.ndarray, " kind"]:
        """The number of choices of each distinct question."""
        return np.array([len(q.choices) for q in self.kinds], dtype=np.int64)

    @cached_property
    def begins(self) -> Int[np.ndarray, " kind"]:
        """Where the choices of each distinct question begin in `texts` and `right`."""
        return np.asarray(np.cumsum(self.sizes) - self.sizes)

    @cached_property
    def texts(self) -> pl.Series:
        """The choices of all distinct questions, one after the other, without surrounding white space."""
        return pl.Series([c.strip() for q in self.kinds for c in q.choices], dtype=pl.String)

    @cached_property
    def right(self) -> Bool[np.ndarray, " text"]:
        """Whether each choice in `texts` is accepted."""
        out = np.zeros(int(self.sizes.sum()), dtype=np.bool_)
        out[[begin + i for begin, q in zip(self.begins.tolist(), self.kinds, strict=True) for i in q.accepted]] = True
        return out

    @cached_property
    def place(self) -> Int[np.ndarray, " prompt"]:
        """Where the choices of each prompt's question begin in `texts`."""
        return np.asarray(self.begins[self.kind])

    @cached_property
    def counts(self) -> Int[np.ndarray, " prompt"]:
        """The number of choices of each prompt's question."""
        return np.asarray(self.sizes[self.kind])

    @cached_property
    def keys(self) -> dict[str, pl.Series]:
        """Episode, step (from 1) and question (from 0) as columns of a table."""
        return {name: pl.Series(x) for name, x in (("episode", self.seed), ("step", self.step + 1),
                                                   ("question", self.question))}  # fmt: skip

    def beliefs(self, name: str) -> list[Distribution]:
        """Return the distribution of a reader (see `Episode.beliefs`) over the choices of each prompt."""
        read = [e.beliefs(name) for e in self.episodes]
        return [read[i][step][question] for i, (_, step, question) in zip(self.at.tolist(), self._prompts, strict=True)]

    def without(self, gone: Iterable[int]) -> Asked:
        """Return the prompts without those at some indices."""
        left = set(gone)
        return Asked(p for i, p in enumerate(self._prompts) if i not in left)


def _prompts_of(episode: Episode, grid: Grid) -> Iterator[Prompt]:
    first = len(episode.steps) - 1 if grid == "cells" else 0
    for t in range(first, len(episode.steps)):
        for q in range(len(episode.steps[t].questions)):
            yield Prompt(episode, t, q)


def distinct(items: Sequence[Any]) -> tuple[list[Any], Int[np.ndarray, " item"]]:
    """Return the distinct objects among some, by identity, and the index of each item in them."""
    ids = list(map(id, items))
    found = dict(zip(ids, items, strict=True))
    number = dict(zip(found, range(len(found)), strict=True))
    return list(found.values()), np.fromiter(map(number.__getitem__, ids), np.int64, len(ids))


def spread(begins: Int[np.ndarray, " row"], counts: Int[np.ndarray, " row"]) -> Int[np.ndarray, " value"]:
    """Return the indices begin, begin + 1, ... of each row's `count` values, one row after the other."""
    ends = np.cumsum(counts)
    return np.asarray(np.arange(int(counts.sum())) + np.repeat(begins - (ends - counts), counts))


def lists(flat: pl.Series, counts: Int[np.ndarray, " row"]) -> pl.Series:
    """Return a column of lists: the next `count` values for each row."""
    if not len(counts):
        return pl.Series(dtype=pl.List(flat.dtype))
    if counts.min() == counts.max() > 0:
        return flat.reshape((len(counts), int(counts[0]))).arr.to_list()
    row = pl.Series("row", np.repeat(np.arange(len(counts)), counts))
    return pl.DataFrame([row, flat.alias("flat")]).group_by("row", maintain_order=True).agg("flat")["flat"]


def question_frame(asked: Asked, read: Iterable[str] = ()) -> pl.DataFrame:
    """Return the table of questions; columns: `nextstate.analysis.predict.tables.QUESTIONS`.

    `states` is |Q| of the episode's system, `prompt` all that an agent reads, up to and including the stem; `narration`
    is the part that the step added before its questions, `closing` follows the answer where the transcript keeps
    answers, and `outcome` all questions of the step.

    Args:
        asked: the questions.
        read: the names of further beliefs that will be needed, which are read in the same pass.
    """
    for episode in asked.episodes:
        episode.read(("lookup", *read), ceilings=True)
    kinds, kind = asked.kinds, asked.kind
    begun = asked.episodes
    sizes = pl.Series([e.game.size_of(e.start) for e in begun], dtype=pl.Int64).gather(asked.at)
    texts = [e.prompts() for e in begun]
    ceilings = [e.ceilings for e in begun]
    where = list(zip(asked.at.tolist(), asked.step.tolist(), asked.question.tolist(), strict=True))
    steps = [p.episode.steps[p.step] for p in asked]
    ceiling = np.array([ceilings[i][t][q] for i, t, q in where], dtype=np.float64)
    lookup = [own_accuracy(b, q.accepted) for b, q in zip(asked.beliefs("lookup"), asked.questions, strict=True)]

    def named(values: Iterable[str]) -> pl.Series:
        return pl.Series(list(values), dtype=pl.String).gather(kind)

    accepted = [
        i for begin, q in zip(asked.begins.tolist(), kinds, strict=True) for i in (begin + k for k in q.accepted)
    ]
    rights = np.array([len(q.accepted) for q in kinds], dtype=np.int64)
    choices = pl.Series(list(chain.from_iterable(q.choices for q in kinds)), dtype=pl.String)
    chance = np.array([q.chance for q in kinds], dtype=np.float64)
    return pl.DataFrame({
        **asked.keys,
        "variable": named(q.variable for q in kinds),
        "stem": named(q.stem for q in kinds),
        "choices": lists(choices, asked.sizes).gather(kind),
        "truth": named(q.answer for q in kinds),
        "accepted": lists(asked.texts.gather(accepted), rights).gather(kind),
        "lookup": pl.Series(lookup, dtype=pl.Float64),
        "ceiling": ceiling,
        "determined": ceiling == 1,
        "chance": chance[kind],
        "states": sizes,
        "prompt": pl.Series([texts[i][t][q] for i, t, q in where], dtype=pl.String),
        "narration": pl.Series([step.narration for step in steps], dtype=pl.String),
        "closing": named(q.closing for q in kinds),
        "outcome": pl.Series([step.outcome for step in steps], dtype=pl.String),
    })  # fmt: skip


def answer_frame(asked: Asked, answers: Predictions) -> pl.DataFrame:
    """Return the table of answers; columns: `nextstate.analysis.predict.tables.ANSWERS` without those of the agent."""
    place, right, counts = asked.place, asked.right, asked.counts
    greedy = _texts(asked, answers)
    exact = answers.greedy >= 0
    flat, values = answers.logprobs, spread(place, counts)
    accepted = right[values]
    p, rank = np.empty(0), np.empty(0, dtype=np.int64)
    if len(asked):
        starts = np.cumsum(counts) - counts
        row = np.repeat(np.arange(len(asked)), counts)
        p = np.minimum(1.0, np.bincount(row, np.where(accepted, np.exp(flat), 0.0), len(asked)))
        best = np.maximum.reduceat(np.where(accepted, flat, -np.inf), starts)
        rank = 1 + np.bincount(row[flat > best[row]], minlength=len(asked))
    tokens = answers.prompt_tokens
    return pl.DataFrame({
        **asked.keys,
        "greedy": greedy,
        "greedy_correct": right[place + np.maximum(answers.greedy, 0)] & exact,
        "choice": asked.texts.gather(place + answers.choice),
        "choice_correct": right[place + answers.choice],
        "choice_token_correct": right[place + answers.choice_token],
        "choice_byte_correct": right[place + answers.choice_byte],
        "logprobs": lists(pl.Series(flat.astype(np.float32)), counts),
        "p_accepted": p,
        "rank": rank,
        "prompt_tokens": pl.repeat(None, len(asked), dtype=pl.Int64, eager=True) if tokens is None
        else pl.Series(tokens, dtype=pl.Int64),
    })  # fmt: skip


def _texts(asked: Asked, answers: Predictions) -> pl.Series:
    """Return the greedy answers as text."""
    if len(answers.written) == len(asked):
        return pl.Series([answers.written[i] for i in range(len(asked))], dtype=pl.String)
    out = asked.texts.gather(asked.place + np.maximum(answers.greedy, 0))
    return out.scatter(list(answers.written), list(answers.written.values())) if answers.written else out
