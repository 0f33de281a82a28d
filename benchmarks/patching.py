"""Sweeping over all heads in one forward pass, against one forward pass a head.

    python -m benchmarks.patching [--quick] [--transformer-lens PYTHON]

The peers are what interpretability code does: record the source run, then for each head (and position) run the base
prompts again with a hook that overwrites the head's input of the output projection; once with bare PyTorch hooks, once
with one nnsight trace a head. They compute the vocabulary at the last token alone. All patch the same heads of the same
prompts with the same weights (random ones; the time does not depend on them), and all they find must agree: logit
differences, and where asked for probabilities and greedy tokens. (These need the whole vocabulary for every copy, which
in a model this small is a fifth of our work; a peer has it anyway.) With `--transformer-lens` and the interpreter of an
environment that has TransformerLens 4, its own patching loop is timed too, inside that process, once it has started.

Prompts have 96 tokens, and both prompts of a pair share the first two thirds, as prompts of our games do that differ in
their last moves. With a forward pass for each of 144 heads and 32 positions the peer would take most of an hour; there
(full run only) it is timed on every eighth position, since all its forward passes cost the same, and scaled up.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import Result, compare, finish, parse
from nextstate.agents.language import LanguageModel
from nextstate.agents.training import TrainConfig, train_tokenizer
from nextstate.analysis.heads.patch import Readout, TokenPair, sweep

TOKENS, SHARED = 96, 64


def random_pairs(n: int, vocabulary: int) -> list[TokenPair]:
    """Return pairs of random tokens that share their first `SHARED` tokens and the last one."""
    rng = np.random.default_rng(0)
    clean = rng.integers(0, vocabulary, (n, TOKENS))
    corrupted = clean.copy()
    corrupted[:, SHARED:-1] = (clean[:, SHARED:-1] + rng.integers(1, vocabulary, (n, TOKENS - SHARED - 1))) % vocabulary
    answers = rng.permuted(np.tile(np.arange(100), (n, 1)), axis=1)
    rows = zip(clean.tolist(), corrupted.tolist(), answers.tolist(), strict=True)
    return [TokenPair(tuple(c), tuple(k), a[0], a[1]) for c, k, a in rows]


def ours(agent: LanguageModel, pairs: list[TokenPair], positions: str, vocabulary: bool = True) -> Readout:
    """Sweep, on our way."""
    return sweep(agent, pairs, positions=positions, failures="include", vocabulary=vocabulary).patched


def _tokens(pairs: list[TokenPair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    clean, corrupted = torch.tensor([p.clean for p in pairs]), torch.tensor([p.corrupted for p in pairs])
    return clean, corrupted, torch.tensor([p.answer for p in pairs]), torch.tensor([p.other for p in pairs])


@torch.inference_mode()
def raw_hooks(agent: LanguageModel, pairs: list[TokenPair], positions: list[int], vocabulary: bool = True) -> Readout:
    """Run once for each head and position, with a hook of PyTorch's own."""
    model: Any = agent.model
    clean, corrupted, answer, other = _tokens(pairs)
    blocks, heads = model.transformer.h, model.config.n_head
    size, rows = model.config.n_embd // heads, torch.arange(len(pairs))
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        b.attn.c_proj.register_forward_pre_hook(lambda _, args, layer=layer: seen.update({layer: args[0].clone()}))
        for layer, b in enumerate(blocks)
    ]
    model(clean, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    out = Readout.empty(len(pairs), len(blocks), heads, len(positions))
    for layer, block in enumerate(blocks):
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            for column, position in enumerate(positions):

                def write(
                    _: Any, args: tuple[torch.Tensor], layer: int = layer, cut: slice = cut, at: int = position
                ) -> tuple[torch.Tensor]:
                    x = args[0].clone()
                    x[:, at, cut] = seen[layer][:, at, cut]
                    return (x,)

                hook = block.attn.c_proj.register_forward_pre_hook(write)
                logits = model(corrupted, use_cache=False, logits_to_keep=1).logits[:, -1]
                hook.remove()
                out.difference[:, layer, head, column] = (logits[rows, answer] - logits[rows, other]).numpy()
                if vocabulary:
                    out.probability[:, layer, head, column] = logits.softmax(-1)[rows, answer].numpy()
                    out.greedy[:, layer, head, column] = logits.argmax(-1).numpy()
    return out


@torch.inference_mode()
def nnsight_loop(agent: LanguageModel, pairs: list[TokenPair]) -> Readout:
    """Run one trace a head, at the last token, for the logit difference alone."""
    model = agent.traced
    clean, corrupted, answer, other = _tokens(pairs)
    layers, heads = agent.model.config.n_layer, agent.model.config.n_head
    size, rows = agent.model.config.n_embd // heads, torch.arange(len(pairs))
    with model.trace(clean, logits_to_keep=1):
        seen = list().save()
        for block in model.transformer.h:
            seen.append(block.attn.c_proj.input[:, -1])
    out = Readout.empty(len(pairs), layers, heads, 1)
    for layer in range(layers):
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            with model.trace(corrupted, logits_to_keep=1):
                model.transformer.h[layer].attn.c_proj.input[:, -1, cut] = seen[layer][:, cut]
                logits = model.lm_head.output[:, -1].save()
            out.difference[:, layer, head, 0] = (logits[rows, answer] - logits[rows, other]).numpy()
    return out


def transformer_lens(agent: LanguageModel, pairs: list[TokenPair], python: str) -> tuple[Readout, float]:
    """Let TransformerLens patch each head at the last token; return what it found and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "pairs.json"), Path(folder, "result.json")
        agent.model.save_pretrained(folder)
        clean, corrupted, answer, other = (x.tolist() for x in _tokens(pairs))
        given.write_text(json.dumps({"clean": clean, "corrupted": corrupted, "answer": answer, "other": other}))
        script = Path(__file__).with_name("peer_transformer_lens.py")
        subprocess.run([python, str(script), folder, str(given), str(result)], check=True, stderr=subprocess.DEVNULL)
        found = json.loads(result.read_text())
    out = Readout.empty(len(pairs), agent.model.config.n_layer, agent.model.config.n_head, 1)
    out.difference[..., 0] = np.array(found["difference"]).T.reshape(out.difference.shape[:3])
    return out, float(found["seconds"])


def difference(one: Readout, two: Readout) -> float:
    """Return the largest difference of any logit difference or probability; infinite where a greedy token differs."""
    if (one.greedy != two.greedy).any():
        return float("inf")
    probability = 0.0 if np.isnan(one.probability).all() else float(np.abs(one.probability - two.probability).max())
    return max(probability, float(np.abs(one.difference - two.difference).max()))


def _scaled(name: str, ours: Callable[[], Readout], peer: Callable[[], Readout], stride: int) -> Result:
    """Time both once; the peer does every `stride`-th position, and its time counts `stride` times."""
    begun = perf_counter()
    mine = ours()
    middle = perf_counter()
    theirs = peer()
    taken, peers = middle - begun, (perf_counter() - middle) * stride
    some = Readout(mine.difference[..., ::stride], mine.probability[..., ::stride], mine.greedy[..., ::stride])
    return Result(name, peers / taken, taken, peers, difference(some, theirs), 1)


def main() -> None:
    """Run the comparisons."""
    args = parse(__doc__ or "", transformer_lens="interpreter of an environment with TransformerLens 4")
    torch.manual_seed(0)
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 256} if args.quick else {"n_layer": 12, "n_head": 12, "n_embd": 768}
    vocabulary = 8000 if args.quick else 50257
    model = GPT2LMHeadModel(GPT2Config(**shape, n_positions=1024, vocab_size=vocabulary)).eval()
    agent = LanguageModel("random GPT-2", loaded=(model, train_tokenizer(TrainConfig())))
    two, one = random_pairs(2, vocabulary), random_pairs(1, vocabulary)
    told = f"{shape['n_layer']} x {shape['n_head']} x {shape['n_embd']}"
    repeats = 3 if args.quick else 1
    late = list(range(SHARED, TOKENS))
    loops: list[tuple[str, bool, Callable[[], Readout]]] = [
        ("logit differences, bare hooks", False, lambda: raw_hooks(agent, two, [TOKENS - 1], False)),
        ("logit differences, nnsight's loop", False, lambda: nnsight_loop(agent, two)),
        ("also probabilities and greedy tokens, bare hooks", True, lambda: raw_hooks(agent, two, [TOKENS - 1])),
    ]
    results = [
        compare(
            f"last token, {what}, {told}", lambda v=whole: ours(agent, two, "last", v), peer, difference, repeats
        )
        for what, whole, peer in loops
    ]  # fmt: skip
    if args.transformer_lens:
        theirs, seconds = transformer_lens(agent, two, args.transformer_lens)
        begun = perf_counter()
        mine = ours(agent, two, "last", False)
        taken = perf_counter() - begun
        off = float(np.abs(mine.difference - theirs.difference).max())
        results.append(Result(f"last token, TransformerLens, {told}", seconds / taken, taken, seconds, off, 1))
    stride = 1 if args.quick else 8
    name = f"each of {len(late)} positions, also probabilities and greedy tokens, bare hooks, {told}"
    peer = lambda: raw_hooks(agent, one, late[::stride])  # noqa: E731
    results.append(_scaled(name, lambda: ours(agent, one, "each"), peer, stride))
    patches = shape["n_layer"] * shape["n_head"]
    rates = {"patched runs at the last token per second": 2 * patches / results[0].ours_s,
             "patched runs at each position per second": len(late) * patches / results[-1].ours_s}  # fmt: skip
    finish("All heads in one pass against one pass a head (CPU, float32)", results,
           ("torch", "transformers", "nnsight"), rates)  # fmt: skip


if __name__ == "__main__":
    main()
