"""Patching every head, at the last token or at each of 32 positions: `sweep` against peers.

    python -m benchmarks.patching [--quick] [--transformer-lens PYTHON] [--out FILE]

All patch the same heads of the same prompts and must find the same logit differences. Prompts have 96 tokens, and both
prompts of a pair share the first 64 and the last one, as prompts of our games do that differ in their last moves. With
`--transformer-lens` and the interpreter of an environment that has TransformerLens 4, its own patching loop is timed
too, in that process, once it has started. Peers that need one forward pass for each head patch some layers (and
positions), since all their passes take equally long, and their time is scaled up.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Peer, Result, Timed, compare, finish, parse
from benchmarks.models import GPT2_SMALL, Shape, random_gpt2, shapes
from benchmarks.peers import Pairs, hooks, prefix, resume
from nextstate.agents.language import LanguageModel
from nextstate.analysis.heads.patch import TokenPair, sweep

TOKENS, SHARED = 96, 64
LATE = range(SHARED, TOKENS)
Found = np.ndarray[Any, np.dtype[np.float64]]  # logit differences, [pair layer head position]; NaN: not measured


def random_pairs(n: int, vocabulary: int) -> list[TokenPair]:
    """Return pairs of random tokens that share their first `SHARED` tokens and the last one."""
    rng = np.random.default_rng(0)
    clean = rng.integers(0, vocabulary, (n, TOKENS))
    corrupted = clean.copy()
    corrupted[:, SHARED:-1] = (clean[:, SHARED:-1] + rng.integers(1, vocabulary, (n, TOKENS - SHARED - 1))) % vocabulary
    answers = rng.permuted(np.tile(np.arange(100), (n, 1)), axis=1)
    rows = zip(clean.tolist(), corrupted.tolist(), answers.tolist(), strict=True)
    return [TokenPair(tuple(c), tuple(k), a[0], a[1]) for c, k, a in rows]


def tensors(pairs: list[TokenPair]) -> Pairs:
    """Return the pairs as the peers get them."""
    columns = ([p.clean for p in pairs], [p.corrupted for p in pairs], [p.answer for p in pairs])
    return Pairs(*map(torch.tensor, columns), torch.tensor([p.other for p in pairs]))


def ours(agent: LanguageModel, pairs: list[TokenPair], positions: str) -> Found:
    """Sweep, on our way."""
    return np.asarray(sweep(agent, pairs, positions=positions, failures="include", vocabulary=False).patched.difference)


def transformer_lens(agent: LanguageModel, pairs: Pairs, python: str, layers: range) -> Timed[torch.Tensor]:
    """Let TransformerLens patch the heads of some layers at the last token, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "pairs.json"), Path(folder, "result.json")
        agent.model.save_pretrained(folder)
        given.write_text(json.dumps({name: x.tolist() for name, x in pairs._asdict().items()}))
        script = Path(__file__).parent / "peers" / "lens_loop.py"
        command = [python, "-I", str(script), folder, str(given), str(result), *map(str, layers)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        found = json.loads(result.read_text())
    out = torch.full((len(pairs.clean), agent.model.config.n_layer, agent.model.config.n_head, 1), torch.nan)
    out[:, layers, :, 0] = torch.tensor(found["difference"]).T.reshape(len(out), len(layers), -1)
    return Timed(out, found["seconds"])


def difference(mine: Found, theirs: torch.Tensor) -> float:
    """Return the largest difference of any logit difference that the peer measured."""
    return float(np.nanmax(np.abs(mine - theirs.numpy())))


def last_token(agent: LanguageModel, shape: Shape, pairs: int, python: str | None, repeats: int) -> list[Result]:
    """Compare sweeps at the last token; with 2 pairs also with what is in use."""
    given = random_pairs(pairs, shape.vocabulary)
    tokens, model = tensors(given), agent.model
    peers: list[Peer[Any]] = [
        Peer("resumed at the patched layer, last token alone", "strongest",
             lambda: resume.differences(model, tokens, [TOKENS - 1])),
        Peer("prefix cached, heads as rows of one token", "strongest", lambda: prefix.differences(model, tokens)),
    ]  # fmt: skip
    if pairs == 2:
        layers = range(0, shape.layers, 4 if shape == GPT2_SMALL else 1)
        share = len(layers) / shape.layers
        loops = {
            "one forward pass for each head, PyTorch hooks": lambda: hooks.differences(
                model, tokens, layers, [TOKENS - 1]
            ),
            "one trace for each head, nnsight": lambda: hooks.traced_differences(agent.traced, tokens, layers),
        }
        peers += [Peer(name, "usual", work, share) for name, work in loops.items()]
        if python:
            work = partial(transformer_lens, agent, tokens, python, layers)
            peers.append(Peer("TransformerLens's patching loop", "usual", work, share))
    name = f"all heads, last token, {pairs} pair" + "s" * (pairs > 1)
    return compare(name, lambda: ours(agent, given, "last"), peers, difference, repeats, shape)


def each_position(agent: LanguageModel, shape: Shape, quick: bool, repeats: int) -> list[Result]:
    """Compare sweeps of one pair at each position after the first difference."""
    given = random_pairs(1, shape.vocabulary)
    tokens, model = tensors(given), agent.model
    layers, positions = range(0, shape.layers, 4), [*LATE[:: 8 if quick or shape == GPT2_SMALL else 2]]

    def loop() -> torch.Tensor:
        out = torch.full((1, shape.layers, shape.heads, len(LATE)), torch.nan)
        out[..., [p - SHARED for p in positions]] = hooks.differences(model, tokens, layers, positions)
        return out

    peers: list[Peer[Any]] = [
        Peer("resumed at the patched layer, all shortcuts", "strongest",
             lambda: resume.differences(model, tokens, LATE)),
        Peer("one forward pass for each head and position, PyTorch hooks", "usual", loop,
             len(layers) * len(positions) / shape.layers / len(LATE)),
    ]  # fmt: skip
    name = f"all heads, each of {len(LATE)} positions, 1 pair"
    return compare(name, lambda: ours(agent, given, "each"), peers, difference, repeats, shape)


def main() -> None:
    """Run the comparisons."""
    args = parse(__doc__ or "", transformer_lens="interpreter of an environment with TransformerLens 4")
    results: list[Result] = []
    for shape in shapes(args.quick):
        agent = random_gpt2(shape)
        for pairs in (1, 2, 8):
            results += last_token(agent, shape, pairs, args.transformer_lens, args.repeats)
        results += each_position(agent, shape, args.quick, args.repeats)
    finish(args, "patching", results, ("torch", "transformers", "nnsight"))


if __name__ == "__main__":
    main()
