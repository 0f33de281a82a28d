"""Usual, for questions: `HFLM` of lm-evaluation-harness, the program that most published scores come from.

It scores each choice as a continuation of its prompt, in batches; choices of one token of the same prompt share a row.
Its `_loglikelihood_tokens` gets the same tokens as we do, so that nothing but the forward passes and their scores is
compared. The package is not a dependency: `score` needs an installation of lm-eval, by its path. The harness runs in
the process of the benchmark.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.peers import Answer, Request, longest_hit

BATCH = 16
HarnessRequest = tuple[tuple[str, str], list[int], list[int]]  # texts (not used), context, continuation


def load(model: Any, tokenizer: Any, path: str) -> Any:
    """Return an `HFLM` around a model; `path` is the folder that lm-eval was installed in (`pip install --target`)."""
    if path not in sys.path:
        sys.path.append(path)
    module = importlib.import_module("lm_eval.models.huggingface")
    return module.HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH)


def requests_of(requests: Sequence[Request]) -> list[HarnessRequest]:
    """Return one request of the harness for each choice of each question."""
    return [(("", ""), list(r.context), list(choice)) for r in requests for choice in r.choices]


def answers_of(requests: Sequence[Request], found: Sequence[tuple[float, bool]]) -> list[Answer]:
    """Return the answers, given log-probability and "is the greedy continuation" of each choice of each question."""
    out, at = [], 0
    for request in requests:
        own = found[at : at + len(request.choices)]
        at += len(own)
        out.append(Answer([float(logprob) for logprob, _ in own], longest_hit(request, [bool(hit) for _, hit in own])))
    return out


def score(harness: Any, requests: Sequence[Request]) -> list[Answer]:
    """Return the answers to all requests."""
    return answers_of(requests, harness._loglikelihood_tokens(requests_of(requests), disable_tqdm=True))
