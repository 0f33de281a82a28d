"""Responses to pushes on all positions at 8 strengths, as branches, against one forward pass a push.

    python -m benchmarks.response [--quick]

The peers are what one writes without branches: run the prompt, then once again for each position and strength, push the
embedding there, read the residual stream of every layer, and compare. One does it with an nnsight trace a push, one
with PyTorch hooks, calling the model as it comes, which also computes the vocabulary; one leaves the vocabulary out, as
we do. All find the same responses, on the same weights (random ones; the time does not depend on them). A prompt has 64
tokens.

Pushed copies differ from position j on alone, so half of all tokens are saved, and no more can be: every later token
changes in every layer. The rest of the gain comes from passes of many tokens, and from the vocabulary where a peer
computes it. A peer needs 512 passes; in GPT-2 small's shape (and in `--quick`) it is timed on some of the positions,
evenly spread, since all its passes cost the same, and scaled up. Times are CPU time of one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import Result, finish, parse
from nextstate.agents.language import LanguageModel
from nextstate.agents.training import TrainConfig, train_tokenizer
from nextstate.analysis.response.config import STRENGTHS
from nextstate.analysis.response.measure import responses

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


@torch.inference_mode()
def one_trace_each(agent: LanguageModel, tokens: Found, positions: Sequence[int]) -> Found:
    """Do the same with one nnsight trace a push."""
    model, ids = agent.traced, torch.from_numpy(tokens)
    blocks = model.transformer.h
    out = np.full((len(STRENGTHS), len(blocks), len(positions), TOKENS), np.nan, dtype=np.float32)
    with model.trace(ids):
        plain = list().save()
        start = blocks[0].input.save()
        for block in blocks:
            plain.append(block.output)
    base, sizes = torch.stack(list(plain))[:, 0], start[0].norm(dim=-1)
    for p, position in enumerate(positions):
        for s, eps in enumerate(STRENGTHS):
            with model.trace(ids):
                blocks[0].input[:, position] *= 1 + eps
                seen = list().save()
                for block in blocks:
                    seen.append(block.output)
            moved = (torch.stack(list(seen))[:, 0] - base).norm(dim=-1) / (eps * float(sizes[position]))
            out[s, :, p, position:] = moved[:, position:].numpy()
    return out


def difference(mine: Found, theirs: Found) -> float:
    """Return how far pushed streams are apart at most, as a share of the norm of what is pushed."""
    strengths = np.array(STRENGTHS)[:, None, None, None]
    return float(np.nanmax(np.abs(mine - theirs) * strengths))


def compared(layers: int, heads: int, width: int, vocabulary: int, stride: int, repeats: int) -> list[Result]:
    """Time one shape against all peers, in turn; these do every `stride`-th position, and count `stride` times."""
    config = GPT2Config(
        n_layer=layers, n_head=heads, n_embd=width, n_positions=1024, vocab_size=vocabulary, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    agent = LanguageModel("random GPT-2", loaded=(GPT2LMHeadModel(config).eval(), train_tokenizer(TrainConfig())))
    tokens = np.random.default_rng(0).integers(0, vocabulary, (1, TOKENS))
    responses(agent, tokens, positions=[TOKENS - 2])  # warm up
    one_forward_each(agent, tokens, [0], vocabulary=True)
    one_trace_each(agent, tokens, [0])
    peers: dict[str, Callable[[LanguageModel, Found, Sequence[int]], Found]] = {
        "one nnsight trace each": one_trace_each,
        "one forward each": partial(one_forward_each, vocabulary=True),
        "one forward each without the vocabulary": partial(one_forward_each, vocabulary=False),
    }
    taken: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in peers}
    worst = dict.fromkeys(peers, 0.0)
    for _ in range(repeats):
        begun = process_time()
        mine = ours(agent, tokens)
        taken.append(process_time() - begun)
        for name, peer in peers.items():
            begun = process_time()
            theirs = peer(agent, tokens, range(0, TOKENS, stride))
            times[name].append((process_time() - begun) * stride)
            worst[name] = max(worst[name], difference(mine[:, :, ::stride], theirs))
    own, told = median(taken), f"{TOKENS} positions x {len(STRENGTHS)} strengths"
    return [
        Result(f"{told}, {name}, {layers} x {heads} x {width}", median(times[name]) / own, own, median(times[name]),
               worst[name], repeats)
        for name in peers
    ]  # fmt: skip


def main() -> None:
    """Run the comparisons."""
    args = parse(__doc__ or "")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    results = [] if args.quick else compared(12, 12, 768, 50257, stride=8, repeats=1)
    results += compared(4, 4, 256, 8000, stride=4 if args.quick else 2, repeats=1 if args.quick else 3)
    rates = {"pushes per second": TOKENS * len(STRENGTHS) / results[0].ours_s}
    finish("Responses as branches against one forward pass a push (CPU, float32)", results,
           ("torch", "transformers", "nnsight"), rates)  # fmt: skip


if __name__ == "__main__":
    main()
