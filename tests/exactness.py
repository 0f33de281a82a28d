"""What a model says of a prompt by one plain forward pass a path: the truth that every clever road is held to.

No tree, no mask, no cache, no batch: the tokens of a prompt and of a choice go in as one row, and nothing else. Tokens
are those of `Encoder`, piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from nextstate.agents.agent import Agent, Prediction, Prompt
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, prompts_of
from nextstate.agents.text import Encoder
from nextstate.envs.contrast import segments
from nextstate.envs.games import make_game

RELATIVE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 2e-2}  # tolerance over the standard deviation
NOISE = {torch.float32: 4.0, torch.bfloat16: 3.0, torch.float16: 3.0}  # ... or over the model's own noise


@dataclass(frozen=True, eq=False)
class Job:
    """Episodes to play: a game, its settings, and their number of steps."""

    name: str
    game: str
    settings: dict[str, Any]
    steps: int
    episodes: int = 2

    @cached_property
    def prompts(self) -> list[Prompt]:
        """All questions of all episodes; later episodes are shorter, so that rows side by side differ in length."""
        made = make_game(self.game, **self.settings)
        lengths = [max(1, self.steps - 3 * seed) for seed in range(self.episodes)]
        return [p for seed, n in enumerate(lengths) for p in prompts_of(episodes_of(made, [seed], n)[0])]


BOX = Job("Box", "Box", {"boxes": 10}, 40)
DFA = Job("DFA", "DFA", {"states": 10}, 50)
TEXTWORLD = Job("TextWorld", "TextWorld", {"games": 1, "rooms": 2, "objects": 3, "quest": 2}, 12)
TWO_TOKENS = Job("two tokens", "DFA", {"states": 5, "symbols": "pairs"}, 20)
JOBS = (DFA, BOX, TEXTWORLD, TWO_TOKENS)  # the deepest first: what is proved of it holds for the others


class Truth(NamedTuple):
    """What plain forward passes say of one prompt.

    Args:
        logprobs: of each choice, summed over its tokens.
        spread: standard deviation of the log-probabilities of the whole vocabulary at the answering token.
        greedy: the choice that greedy decoding writes, -1 where it is none.
        margin: by how much the likeliest token is ahead of the second, where that is least.
    """

    logprobs: tuple[float, ...]
    spread: float
    greedy: int
    margin: float


def tokens_of(encoder: Encoder, prompt: Prompt) -> list[int]:
    """Return the tokens of a prompt."""
    opening, *rest = segments(*prompt)
    return [*encoder.opening(opening), *(token for text in rest for token in encoder.piece(text))]


@torch.inference_mode()
def plain(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities after each token, by one forward pass over one row."""
    row = torch.tensor([list(tokens)], device=model.device)
    return model(input_ids=row, use_cache=False).logits[0].float().log_softmax(-1)


def truth(model: Any, encoder: Encoder, prompt: Prompt) -> Truth:
    """Score the choices of a prompt, each beginning of a choice in a pass of its own."""
    head = tokens_of(encoder, prompt)
    tails = [tuple(encoder.piece(choice)) for choice in prompt.asked.choices]
    after = {start: plain(model, [*head, *start])[len(head) - 1 :] for start in {tail[:-1] for tail in tails}}
    sums, greedy, longest, margin = [], -1, 0, np.inf
    for c, tail in enumerate(tails):
        rows = after[tail[:-1]]
        sums.append(sum(float(rows[k, token]) for k, token in enumerate(tail)))
        if len(tail) > longest and rows.argmax(-1).tolist() == list(tail):
            greedy, longest = c, len(tail)
        first, second = rows.topk(2).values.T
        margin = min(margin, float((first - second).min()))
    return Truth(tuple(sums), float(next(iter(after.values()))[0].std()), greedy, margin)


def noise(model: Any, encoder: Encoder, prompts: Sequence[Prompt], tokens: int = 48) -> float:
    """Return the model's own noise: how far rows in a batch are from the same rows alone."""
    rows = [tokens_of(encoder, p)[-tokens:] for p in prompts]
    rows = [row for row in rows if len(row) == tokens][-4:]
    with torch.inference_mode():
        together = model(input_ids=torch.tensor(rows, device=model.device), use_cache=False).logits
    apart = [plain(model, row) for row in rows]
    return max(float((a.float().log_softmax(-1) - b).abs().max()) for a, b in zip(together, apart, strict=True))


def sample(prompts: Sequence[Prompt], most: int, seed: int = 0) -> list[int]:
    """Return the indices of prompts to check: the last one of each episode, and others at random up to `most`."""
    last = {id(p.episode): i for i, p in enumerate(prompts)}
    rest = np.random.default_rng(seed).permutation([i for i in range(len(prompts)) if i not in last.values()])
    return sorted([*last.values(), *rest[: max(0, most - len(last))].tolist()])


def replayed(agent: Agent, prompts: Sequence[Prompt]) -> list[Prediction]:
    """Ask everything at once."""
    return agent.predict(prompts)


def lived(agent: Agent, prompts: Sequence[Prompt]) -> list[Prediction]:
    """Ask step by step, of all episodes that have got so far."""
    session, out = agent.live(), {}
    for step in sorted({p.step for p in prompts}):
        now = [(i, p) for i, p in enumerate(prompts) if p.step == step]
        out.update(zip((i for i, _ in now), session.predict([p for _, p in now]), strict=True))
    return [out[i] for i in range(len(prompts))]


ROADS: dict[str, Callable[[Agent, Sequence[Prompt]], list[Prediction]]] = {"replay": replayed, "live": lived}


class Measured(NamedTuple):
    """How far an agent's answers are from the truth.

    Args:
        error: the largest difference of a choice's log-probability, in nats.
        spread: the mean standard deviation of log-probabilities over the vocabulary, in nats.
        greedy: how many greedy answers differ from the truth's (where tokens are not tied within the error).
        questions: how many were compared.
        depth: tokens of the longest prompt.
    """

    error: float
    spread: float
    greedy: int
    questions: int
    depth: int


def truths(model: Any, encoder: Encoder, job: Job, most: int = 25) -> dict[int, Truth]:
    """Return the truth of some prompts of a job, by their index; `most` bounds the forward passes."""
    passes = max(len({tuple(encoder.piece(c))[:-1] for c in p.asked.choices}) for p in job.prompts)
    return {i: truth(model, encoder, job.prompts[i]) for i in sample(job.prompts, most // passes)}


def measure(agent: LanguageModel, job: Job, known: dict[int, Truth], road: str) -> Measured:
    """Answer all prompts of a job by "replay" or "live", and compare those whose truth is known."""
    found = ROADS[road](agent, job.prompts)
    pairs = [(a, b) for i, t in known.items() for a, b in zip(found[i].logprobs, t.logprobs, strict=True)]
    error = float(np.nan_to_num(max(abs(a - b) for a, b in pairs), nan=np.inf))
    greedy = sum(found[i].greedy != t.greedy and t.margin > 2 * error for i, t in known.items())
    spread = float(np.mean([t.spread for t in known.values()]))
    return Measured(error, spread, greedy, len(known), max(p.prompt_tokens or 0 for p in found))


def tolerance(model: Any, spread: float, own: float) -> float:
    """Return the largest error that is still exact: a share of the spread, or a few times the model's own noise."""
    return max(RELATIVE[model.dtype] * spread, NOISE[model.dtype] * own)
