"""What an agent is: it reads prompts and predicts answers. What a prediction says of a question is a row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nextstate.envs.game import Distribution, Episode, Question, expected_accuracy

WRITTEN = 32  # tokens of an answer that is written, at most


class AgentError(RuntimeError):
    """An agent cannot be loaded or cannot answer; the message says which, why and what to do."""


class ContextError(AgentError):
    """Prompts are longer than the agent can read; `prompts` are their indices in the call. Nothing is ever cut."""

    def __init__(self, message: str, prompts: tuple[int, ...]) -> None:
        super().__init__(message)
        self.prompts = prompts


class OutOfMemory(AgentError):
    """Episodes side by side need more memory than there is; fewer of them may fit."""


class Prompt(NamedTuple):
    """One question in its episode; the agent sees the transcript up to it, `episode.prompt(step, question)`."""

    episode: Episode
    step: int  # from 0
    question: int = 0  # from 0

    @property
    def asked(self) -> Question:
        """The question itself; one without choices is answered by writing, up to the end of the line."""
        return self.episode.steps[self.step].questions[self.question]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What an agent answers, by each rule. Choices are indices into the question's choices."""

    answer: str  # the greedy answer as text, over everything the agent could have said
    greedy: int  # the choice that it is exactly, -1 where it is none
    choice: int  # the choice with the largest log-probability, summed over its tokens
    choice_token: int  # ... per token
    choice_byte: int  # ... per byte
    logprobs: tuple[float, ...]  # natural log, summed over tokens, one a choice
    prompt_tokens: int | None = None


class Agent(ABC):
    """Predicts the answers to questions.

    `name` identifies it in tables. `kind` is a name that `nextstate.agents.registry` knows, such as "ideal", "shortcut"
    or "model", or that of the plugin which the agent comes from; agents made from a config get both from there.
    """

    name: str
    kind: str
    batch_size: int = 64  # most episodes that it reads side by side
    incomplete: str = ""  # what a model's checkpoint lacks, where it was loaded all the same

    @abstractmethod
    def predict(self, prompts: Sequence[Prompt]) -> list[Prediction]:
        """Answer all prompts, in their order.

        Raises:
            ContextError: some prompts are too long for this agent.
            AgentError: the agent failed otherwise.
        """

    def live(self) -> Agent:
        """Return an agent that answers step by step and may keep what it has read; by default this one."""
        return self

    def warnings(self) -> tuple[str, ...]:
        """Return what a reader of any result of this agent should know."""
        return ()

    def episode_warnings(self, episode: Episode) -> str:
        """Return what a reader of the results should know of how this agent reads such an episode, "" if nothing.

        Each remark is a line; `warnings` are among them.
        """
        return "\n".join(self.warnings())

    def describe(self) -> dict[str, Any]:
        """Return what `run.json` records about this agent: at least `name` and `kind`."""
        return {"name": self.name, "kind": self.kind}


def from_belief(belief: Distribution, question: Question, tie: float) -> Prediction:
    """Turn a belief over the choices into a prediction; `tie` in [0, 1) picks among equally likely ones."""
    top = max(belief)
    best = [i for i, p in enumerate(belief) if p >= top - 1e-12]
    pick = best[int(tie * len(best))]
    logprobs = tuple(math.log(p) if p > 0 else -math.inf for p in belief)
    return Prediction(question.choices[pick].strip(), pick, pick, pick, pick, logprobs)


def question_row(prompt: Prompt, ideal: Distribution) -> dict[str, Any]:
    """Return what is known of a question before anybody answers it; `nextstate.analysis.predict.tables.QUESTIONS`.

    Args:
        prompt: where the question is asked.
        ideal: the ideal reader's belief over the choices.
    """
    question, ceiling = prompt.asked, expected_accuracy(ideal, prompt.asked.accepted)
    return {
        "episode": prompt.episode.seed,
        "step": prompt.step + 1,
        "question": prompt.question,
        "variable": question.variable,
        "stem": question.stem,
        "choices": list(question.choices),
        "truth": question.answer,
        "accepted": [question.choices[i].strip() for i in question.accepted],
        "ceiling": ceiling,
        "determined": ceiling == 1,
        "chance": question.chance,
    }


def answer_row(prompt: Prompt, prediction: Prediction) -> dict[str, Any]:
    """Return how an agent answered a question; the columns are in `nextstate.analysis.predict.tables.ANSWERS`."""
    question, logprobs = prompt.asked, prediction.logprobs
    accepted = question.accepted
    best = max(logprobs[i] for i in accepted)
    return {
        "episode": prompt.episode.seed,
        "step": prompt.step + 1,
        "question": prompt.question,
        "greedy": prediction.answer,
        "greedy_correct": prediction.greedy in accepted,
        "choice": question.choices[prediction.choice].strip(),
        "choice_correct": prediction.choice in accepted,
        "choice_token_correct": prediction.choice_token in accepted,
        "choice_byte_correct": prediction.choice_byte in accepted,
        "logprobs": list(logprobs),
        "p_accepted": min(1.0, sum(math.exp(logprobs[i]) for i in accepted)),
        "rank": 1 + sum(p > best for p in logprobs),
        "prompt_tokens": prediction.prompt_tokens,
    }
