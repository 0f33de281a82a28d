"""Training on a grammar: tokens a second and utilisation of every architecture, and the trainer against a bare loop.

    python -m benchmarks.training [--quick] [--out FILE]

Peer: the same model, windows, optimiser and schedule in a loop of plain PyTorch. Seconds are those of the steps by the
wall clock (which counts on a GPU too), data included; setting up and saving, which a run does once, are left out. The
logits of the two trained models are compared. Utilisation is 6 N + 12 layers hidden window operations a token
(`agents.grammar_training.flops_per_token`) over what a large matrix product reaches on the same device.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import Peer, Result, Timed, compare, finish, parse
from nextstate.agents.architectures import ARCHITECTURES, new_model
from nextstate.agents.grammar_training import Windows, load, train
from nextstate.agents.training_config import SPECIAL, Architecture, GrammarTraining, ModelSpec
from nextstate.envs.grammar.sources import published

GRAMMAR = published("cfg3b")
IDS = torch.arange(200)[None] % 3 + len(SPECIAL)
SMALL = {"hidden_size": 96, "layers": 4, "heads": 4, "rows": 8}
LARGE = {"hidden_size": 768, "layers": 12, "heads": 12, "rows": 32}  # the published size, on a GPU only; 96 rows there


def settings(steps: int, **shape: int) -> GrammarTraining:
    """Return a config that trains and does nothing else."""
    return GrammarTraining(**shape, steps=steps, evaluate_every=10**9, save_every=10**9)  # type: ignore[arg-type]


def ours(config: GrammarTraining, architecture: Architecture) -> tuple[torch.Tensor, dict[str, Any]]:
    """Train; return logits, and what the trainer told."""
    with tempfile.TemporaryDirectory() as folder:
        spec = ModelSpec(architecture=architecture)
        final = train(config, spec, GRAMMAR, Path(folder), mode="disabled", progress=lambda step: None)
        model = load(final, architecture)
        with torch.no_grad():
            logits = model(IDS.to(model.device)).logits.cpu()
        return logits, json.loads((Path(folder) / "history.json").read_text())


def bare(config: GrammarTraining, architecture: Architecture) -> tuple[torch.Tensor, float]:
    """Train in a loop of plain PyTorch; return logits, and the seconds of the steps."""
    set_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = new_model(
        architecture, len(SPECIAL) + 3, config.hidden_size, config.layers, config.heads, config.window
    ).to(device)
    data = Windows(GRAMMAR, config.window, config.rows * config.steps, 0, None, masked=False)
    rates = {"lr": config.learning_rate, "betas": (0.9, 0.98), "fused": True}
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or "norm" in name]
    decayed = [p for name, p in model.named_parameters() if not (p.ndim < 2 or "norm" in name)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, **rates)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / config.steps)
    begun = perf_counter()
    for step in range(config.steps):
        rows = range(step * config.rows, (step + 1) * config.rows)
        ids = torch.stack([data[i]["input_ids"] for i in rows]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken = perf_counter() - begun
    with torch.no_grad():
        return model.eval()(IDS.to(device)).logits.float().cpu(), taken


def beside(config: GrammarTraining, repeats: int) -> list[Result]:
    """Train both ways in turn."""

    def mine() -> Timed[torch.Tensor]:
        logits, told = ours(config, "rotary")
        return Timed(logits, told["tokens"] / told["tokens_per_second"])

    loop: Peer[torch.Tensor] = Peer("a loop of plain PyTorch", "usual", lambda: Timed(*bare(config, "rotary")))
    name = f"training on cfg3b, {config.rows} x {config.window} tokens a step"
    shape = f"{config.hidden_size} x {config.layers}"
    return compare(name, mine, [loop], lambda a, b: float((a - b).abs().max()), repeats, shape)


def main() -> None:
    """Measure and print."""
    args = parse(__doc__ or "")
    torch.set_num_threads(1)
    disable_progress_bar()
    small = SMALL | {"rows": 2} if args.quick else SMALL
    shapes = {4 if args.quick else 20: small} | ({30: LARGE} if torch.cuda.is_available() else {})  # by number of steps
    results = [r for steps, shape in shapes.items() for r in beside(settings(steps, **shape), args.repeats)]
    rates: dict[str, float] = {}
    for steps, shape in shapes.items():
        for architecture in ARCHITECTURES if shape is small else ("rotary",):
            told = ours(settings(steps, **shape), architecture)[1]  # type: ignore[arg-type]
            name = f"training on cfg3b, {architecture}, {shape['hidden_size']} x {shape['layers']}"
            rates[f"{name}: tokens/s"] = told["tokens_per_second"]
            rates[f"{name}: utilisation"] = told["utilisation"]
    finish(args, "training", results, ("torch", "transformers", "accelerate"), rates)


if __name__ == "__main__":
    main()
