"""Responses to pushes on all positions at 8 strengths, as branches, against one forward pass a push.

    python -m benchmarks.response [--quick]

The peers are what one writes without branches: run the prompt, then once again for each position and strength with a
PyTorch hook that pushes the embedding there, read the residual stream of every layer, and compare. One peer calls the
model as it comes, which also computes the vocabulary; the other leaves the vocabulary out, as we do. All find the same
responses, on the same weights (random ones; the time does not depend on them). A prompt has 64 tokens.

Pushed copies differ from position j on alone, so half of all tokens are saved; the rest of the gain comes from passes
of many tokens, and from the vocabulary where a peer computes it. In full, a peer needs 512 passes; it is timed on every
fourth position, since all its passes cost the same, and scaled up. Times are CPU time of one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import process_time
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import Result, finish, parse
from nextstate.agents.language import LanguageModel
from nextstate.agents.training import TrainConfig, train_tokenizer
from nextstate.analysis.response import STRENGTHS, responses

TOKENS = 64
Found = np.ndarray[Any, np.dtype[np.float32]]


def ours(agent: LanguageModel, tokens: Found) -> Found:
    """Measure, on our way: [strength layer position target]."""
    return np.asarray(responses(agent, tokens).value[0, :, 0])


@torch.inference_mode()
def one_forward_each(agent: LanguageModel, tokens: Found, positions: Sequence[int], vocabulary: bool) -> Found:
    """Run the whole prompt once for each position and strength."""
    model: Any = agent.model if vocabulary else agent.model.transformer
    blocks, ids = agent.model.transformer.h, torch.from_numpy(tokens)
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in blocks]
    model(ids, use_cache=False)
    base = torch.stack(seen)[:, 0]
    out = np.full((len(STRENGTHS), len(blocks), len(positions), TOKENS), np.nan, dtype=np.float32)
    for p, position in enumerate(positions):
        for s, eps in enumerate(STRENGTHS):
            size: list[float] = []

            def push(
                _: Any, args: tuple[torch.Tensor], at: int = position, eps: float = eps, size: list[float] = size
            ) -> tuple[torch.Tensor]:
                x = args[0].clone()
                size.append(float(x[0, at].norm()))
                x[0, at] *= 1 + eps
                return (x, *args[1:])

            seen.clear()
            hook = blocks[0].register_forward_pre_hook(push)
            model(ids, use_cache=False)
            hook.remove()
            moved = (torch.stack(seen)[:, 0] - base).norm(dim=-1) / (eps * size[0])
            out[s, :, p, position:] = moved[:, position:].numpy()
    for hook in hooks:
        hook.remove()
    return out


def difference(mine: Found, theirs: Found) -> float:
    """Return how far pushed streams are apart at most, as a share of the norm of what is pushed."""
    strengths = np.array(STRENGTHS)[:, None, None, None]
    return float(np.nanmax(np.abs(mine - theirs) * strengths))


def main() -> None:
    """Run the comparisons."""
    args = parse(__doc__ or "")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 256} if args.quick else {"n_layer": 12, "n_head": 12, "n_embd": 768}
    vocabulary = 8000 if args.quick else 50257
    model = GPT2LMHeadModel(GPT2Config(**shape, n_positions=1024, vocab_size=vocabulary)).eval()
    agent = LanguageModel("random GPT-2", loaded=(model, train_tokenizer(TrainConfig())))
    tokens = np.random.default_rng(0).integers(0, vocabulary, (1, TOKENS))
    stride = 1 if args.quick else 4
    positions = range(0, TOKENS, stride)
    told = f"{shape['n_layer']} x {shape['n_head']} x {shape['n_embd']}"
    results, repeats = [], 3 if args.quick else 1
    responses(agent, tokens, positions=[TOKENS - 2])  # warm up
    one_forward_each(agent, tokens, [0], vocabulary=True)
    for whole, name in ((True, "one forward each"), (False, "one forward each without the vocabulary")):
        times: tuple[list[float], list[float]] = ([], [])
        worst = 0.0
        for _ in range(repeats):
            begun = process_time()
            mine = ours(agent, tokens)
            middle = process_time()
            theirs = one_forward_each(agent, tokens, positions, whole)
            times[0].append(middle - begun)
            times[1].append((process_time() - middle) * stride)
            worst = max(worst, difference(mine[:, :, ::stride], theirs))
        taken, peers = (float(np.median(t)) for t in times)
        title = f"{TOKENS} positions x {len(STRENGTHS)} strengths, {name}, {told}"
        results.append(Result(title, peers / taken, taken, peers, worst, repeats))
    rates = {"pushes per second": TOKENS * len(STRENGTHS) / results[0].ours_s}
    finish("Responses as branches against one forward pass a push (CPU, float32)", results,
           ("torch", "transformers"), rates)  # fmt: skip


if __name__ == "__main__":
    main()
