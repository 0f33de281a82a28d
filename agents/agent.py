"""The interface of agents, which predict answers to prompts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Float, Int

from nextstate.envs.game import Distribution, Episode, Question

WRITTEN = 32  # maximum number of tokens of a generated answer


class AgentError(RuntimeError):
    """An agent cannot be loaded or cannot answer; the message names the agent, the reason, and what to do."""


class ContextError(AgentError):
    """Prompts exceed the agent's context (they are never cut); `prompts` has their indices in the call."""

    def __init__(self, message: str, prompts: tuple[int, ...]) -> None:
        super().__init__(message)
        self.prompts = prompts


class OutOfMemory(AgentError):
    """A batch of episodes needs more memory than is available; a smaller batch may fit."""


class Prompt(NamedTuple):
    """One question in its episode; the agent sees the transcript up to it, `episode.prompt(step, question)`."""

    episode: Episode
    step: int  # from 0
    question: int = 0  # from 0

    @property
    def asked(self) -> Question:
        """The question; an answer to a question without choices is generated, up to the end of the line."""
        return self.episode.steps[self.step].questions[self.question]


@dataclass(frozen=True, slots=True)
class Prediction:
    """An agent's answer by each scoring rule. Choices are indices into the question's choices."""

    answer: str  # the greedy answer as text, not restricted to the choices
    greedy: int  # the choice that equals `answer` exactly, -1 if none does
    choice: int  # the choice with the largest log-probability, summed over its tokens
    choice_token: int  # ... per token
    choice_byte: int  # ... per byte
    logprobs: tuple[float, ...]  # natural logarithms, summed over tokens, one for each choice
    prompt_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class Predictions(Sequence[Prediction]):
    """Predictions for many prompts, in columns; as a sequence it holds a `Prediction` for each prompt.

    Attributes:
        questions: the questions that were answered.
        greedy, choice, choice_token, choice_byte: as in `Prediction`.
        logprobs: of all choices, those of the first question first.
        written: the greedy answers as text, where they are not the choice `greedy`; by index of the prompt.
        prompt_tokens: numbers of tokens of the prompts; None if they are not known.
    """

    questions: Sequence[Question]
    greedy: Int[np.ndarray, " prompt"]
    choice: Int[np.ndarray, " prompt"]
    choice_token: Int[np.ndarray, " prompt"]
    choice_byte: Int[np.ndarray, " prompt"]
    logprobs: Float[np.ndarray, " choices"]
    written: Mapping[int, str] = field(default_factory=dict)
    prompt_tokens: Int[np.ndarray, " prompt"] | None = None

    @cached_property
    def ends(self) -> Int[np.ndarray, " prompt"]:
        """Where the choices of each question end in `logprobs`."""
        return np.cumsum([len(q.choices) for q in self.questions], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.questions)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prediction]: ...
    def __getitem__(self, index: int | slice) -> Prediction | list[Prediction]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        question, greedy = self.questions[i], int(self.greedy[i])
        answer = self.written[i] if i in self.written else question.choices[greedy].strip()
        end = int(self.ends[i])
        return Prediction(
            answer, greedy, int(self.choice[i]), int(self.choice_token[i]), int(self.choice_byte[i]),
            tuple(self.logprobs[end - len(question.choices) : end].tolist()),
            None if self.prompt_tokens is None else int(self.prompt_tokens[i]),
        )  # fmt: skip

    @classmethod
    def of(cls, prompts: Sequence[Prompt], predictions: Sequence[Prediction]) -> Predictions:
        """Return predictions in columns."""
        if isinstance(predictions, Predictions):
            return predictions
        whole = {name: np.array([getattr(p, name) for p in predictions], dtype=np.int64) for name in _INTEGERS}
        flat = np.array([x for p in predictions for x in p.logprobs], dtype=np.float64)
        written = {i: p.answer for i, p in enumerate(predictions)}
        tokens = [p.prompt_tokens for p in predictions]
        counts = None if any(n is None for n in tokens) else np.array(tokens, dtype=np.int64)
        return cls([p.asked for p in prompts], **whole, logprobs=flat, written=written, prompt_tokens=counts)


_INTEGERS = ("greedy", "choice", "choice_token", "choice_byte")


class Agent(ABC):
    """Predicts the answers to questions.

    `name` identifies it in tables. `kind` is a name that `nextstate.agents.registry` knows, such as "ideal", "lookup",
    "shortcut" or "model", or the name of a plugin. Both are set when an agent is created from a config.
    """

    name: str
    kind: str
    batch_size: int = 64  # maximum number of episodes in a batch
    incomplete: str = ""  # problems of the model's checkpoint, if it was loaded with allow_incomplete

    @abstractmethod
    def predict(self, prompts: Sequence[Prompt]) -> Sequence[Prediction]:
        """Return the predictions for all prompts, in their order: a list, or `Predictions`, which are faster.

        Raises:
            ContextError: some prompts are too long for this agent.
            AgentError: the agent failed for another reason.
        """

    def live(self) -> Agent:
        """Return an agent for step-by-step use, which may cache what it has read; by default this agent itself."""
        return self

    def warnings(self) -> tuple[str, ...]:
        """Return warnings that apply to all results of this agent."""
        return ()

    def episode_warnings(self, episode: Episode) -> str:
        """Return the warnings for results on episodes like this one, one per line; "" if there are none.

        Includes the general `warnings`.
        """
        return "\n".join(self.warnings())

    def describe(self) -> dict[str, Any]:
        """Return what `run.json` records about this agent: at least `name` and `kind`."""
        return {"name": self.name, "kind": self.kind}


def most_likely(belief: Distribution) -> list[int]:
    """Return the indices of the most probable choices; probabilities that differ by rounding are equal."""
    top = max(belief)
    return [i for i, p in enumerate(belief) if p >= top - 1e-12]


def from_belief(belief: Distribution, question: Question, tie: float) -> Prediction:
    """Convert a distribution over the choices into a prediction; `tie` in [0, 1) picks among the most likely ones."""
    best = most_likely(belief)
    pick = best[int(tie * len(best))]
    logprobs = tuple(math.log(p) if p > 0 else -math.inf for p in belief)
    return Prediction(question.choices[pick].strip(), pick, pick, pick, pick, logprobs)
