"""Responses to pushes on each of 64 tokens at 8 strengths: `responses` against peers.

    python -m benchmarks.response [--quick] [--out FILE]

All push the embedding of one token along itself, read the residual stream after every layer and must find the same
responses. A pushed prompt differs from the plain one from the pushed position on, so half of all tokens need not be
read, and no more can be saved: every later token changes in every layer. Peers that need one forward pass for each
push do some of the positions, evenly spread, since all their passes take equally long, and their time is scaled up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.common import Peer, Result, compare, finish, parse
from benchmarks.models import GPT2_SMALL, Shape, random_gpt2, shapes
from benchmarks.peers import push_each, push_rows, push_suffixes
from nextstate.analysis.response.config import STRENGTHS
from nextstate.analysis.response.measure import responses

TOKENS = 64


def difference(mine: np.ndarray[Any, Any], theirs: torch.Tensor) -> float:
    """Return how far pushed streams are apart at most, as a share of the norm of what is pushed."""
    strengths = np.array(STRENGTHS)[:, None, None, None]
    return float(np.nanmax(np.abs(mine - theirs.numpy()) * strengths))


def compared(shape: Shape, quick: bool, repeats: int) -> list[Result]:
    """Compare one shape with all peers."""
    agent = random_gpt2(shape)
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, TOKENS)
    ids, model = torch.from_numpy(tokens), agent.model
    some = range(4, TOKENS, 16 if quick or shape == GPT2_SMALL else 4)
    whole: dict[str, Callable[[], Any]] = {
        "rows on a cached prefix, strengths and positions as rows": lambda: push_suffixes.responses(
            model, ids, STRENGTHS
        ),
        "strengths as rows, without the vocabulary": lambda: push_rows.responses(model, ids, STRENGTHS),
    }
    loops: dict[str, Callable[[], Any]] = {
        "one forward pass for each push, PyTorch hooks": lambda: push_each.responses(model, ids, STRENGTHS, some),
        "one trace for each push, nnsight": lambda: push_each.traced_responses(agent.traced, ids, STRENGTHS, some),
    }
    peers: list[Peer[Any]] = [Peer(name, "strongest", work) for name, work in whole.items()]
    peers += [Peer(name, "usual", work, len(some) / TOKENS) for name, work in loops.items()]
    name = f"responses, {TOKENS} tokens x {len(STRENGTHS)} strengths"
    return compare(name, lambda: responses(agent, tokens[None]).value[0, :, 0], peers, difference, repeats, shape)


def main() -> None:
    """Run the comparisons."""
    args = parse(__doc__ or "")
    results = [r for shape in shapes(args.quick) for r in compared(shape, args.quick, args.repeats)]
    finish(args, "response", results, ("torch", "transformers", "nnsight"))


if __name__ == "__main__":
    main()
