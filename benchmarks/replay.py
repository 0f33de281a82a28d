"""Answering all questions of an episode: `replay`, from prompts to rows of a table, against peers.

    python -m benchmarks.replay [--quick] [--lm-eval PATH] [--out FILE]

Ours is the whole pipeline after the episodes are drawn: tokens, tree, forward pass, predictions, rows. Peers get the
tokens of each prompt and choice and return log-probabilities and greedy answers, which must agree with ours. The
questions of "DFA, one-token choices" stay in the transcript, so that one plain forward pass over it is the least that
any method can do. With `--lm-eval`, the folder of an installation of lm-eval (`pip install --no-deps --target PATH
lm-eval==0.4.13`), its `HFLM` is timed too. In the large shape, peers that read each question by itself do the questions
in the middle of the episode, whose prompts have the average length, and their time is scaled up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from benchmarks.common import Peer, Result, compare, finish, parse
from benchmarks.models import GPT2_SMALL, Shape, random_gpt2, shapes
from benchmarks.peers import Answer, Request, cache, harness, one_pass_each, rows, transcript
from nextstate.agents.agent import Prompt
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, prompts_of, replay
from nextstate.agents.text import Encoder
from nextstate.envs.contrast import segments
from nextstate.envs.game import Episode
from nextstate.envs.games import make_game


class Job(NamedTuple):
    """The episode that is answered."""

    name: str
    game: str
    settings: Mapping[str, Any]
    steps: int
    ask: int | Literal["all"] = 1
    inline: bool = False  # every prompt is a prefix of the longest one, and choices are one token


JOBS = (
    Job("DFA, 50 steps, one-token choices", "DFA", {"states": 10}, 50, inline=True),
    Job("DFA, 10 steps, two-token choices", "DFA", {"states": 10, "symbols": "pairs"}, 10),
    Job("Box, 10 moves, 8 boxes", "Box", {"boxes": 8}, 10),
    Job("TextWorld, 10 steps, all questions", "TextWorld", {"rooms": 3, "objects": 6, "games": 1}, 10, "all"),
)
TIMED = 16  # questions that a slow peer answers in the large shape


def requests_of(encoder: Encoder, prompts: Sequence[Prompt]) -> list[Request]:
    """Return the tokens of prompts and choices."""
    out = []
    for prompt in prompts:
        opening, *rest = segments(*prompt)
        context = [*encoder.opening(opening), *(token for text in rest for token in encoder.piece(text))]
        out.append(Request(tuple(context), tuple(encoder.piece(choice) for choice in prompt.asked.choices)))
    return out


def ours(agent: LanguageModel, episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    """Answer all questions, on our way."""
    return list(replay(agent, episodes).rows)


def difference(prompts: Sequence[Prompt], mine: Sequence[Mapping[str, Any]], peer: Sequence[Answer | None]) -> float:
    """Return the largest difference of any log-probability; infinite where a greedy answer differs."""
    worst = 0.0
    for prompt, row, answer in zip(prompts, mine, peer, strict=True):
        if answer is None:  # not measured
            continue
        if answer.greedy >= 0 and row["greedy"] != prompt.asked.choices[answer.greedy].strip():
            return math.inf
        worst = max(worst, *(abs(a - b) for a, b in zip(row["logprobs"], answer.logprobs, strict=True)))
    return worst


def middle(
    score: Callable[[Sequence[Request]], list[Answer]], requests: Sequence[Request], count: int
) -> list[Answer | None]:
    """Answer `count` requests in the middle alone."""
    first = (len(requests) - count) // 2
    found = score(requests[first : first + count])
    return [None] * first + found + [None] * (len(requests) - count - first)


def compared(job: Job, agent: LanguageModel, shape: Shape, lm_eval: Any | None, repeats: int) -> list[Result]:
    """Compare one job in one shape with all peers."""
    episodes = episodes_of(make_game(job.game, **job.settings), range(1), job.steps, job.ask)
    prompts = [p for e in episodes for p in prompts_of(e)]
    requests = requests_of(agent.encoder, prompts)
    assert all(len(c) == 1 for r in requests for c in r.choices) or not job.inline
    model = agent.model
    fast: dict[str, Callable[[], Any]] = {
        "key-value cache, cropped and used again": lambda: cache.score(model, requests),
    }
    if job.inline:
        fast = {"one plain forward pass of the transcript": lambda: transcript.score(model, requests), **fast}
    else:
        fast["longest prompt read once, branches as rows"] = lambda: rows.score(model, requests)
    slow: dict[str, Callable[[Sequence[Request]], list[Answer]]] = {}
    if lm_eval is not None:
        slow["lm-eval, HFLM"] = partial(harness.score, lm_eval)
    slow["one forward pass for each question, batches of 16"] = partial(one_pass_each.score, model)
    count = min(TIMED, len(requests)) if shape == GPT2_SMALL else len(requests)
    peers: list[Peer[Any]] = [Peer(name, "strongest", work) for name, work in fast.items()]
    peers += [
        Peer(name, "usual", partial(middle, work, requests, count), count / len(requests))
        for name, work in slow.items()
    ]
    print(f"{job.name}: {len(requests)} questions, up to {max(len(r.context) for r in requests)} tokens")
    return compare(job.name, lambda: ours(agent, episodes), peers, partial(difference, prompts), repeats, shape)


def main() -> None:
    """Run the comparisons."""
    args = parse(__doc__ or "", lm_eval="folder in which lm-eval 0.4.13 is installed")
    results: list[Result] = []
    for shape in shapes(args.quick):
        agent = random_gpt2(shape)
        lm_eval = harness.load(agent.model, agent.tokenizer, args.lm_eval) if args.lm_eval else None
        for job in JOBS:
            results += compared(job, agent, shape, lm_eval, args.repeats)
    finish(args, "replay", results, ("torch", "transformers", "lm-eval"))


if __name__ == "__main__":
    main()
