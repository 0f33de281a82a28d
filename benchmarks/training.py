"""Training on a grammar: tokens a second and utilisation of every architecture, and the trainer against a bare loop.

Peer: the same model, windows, optimiser and schedule in a loop of plain PyTorch. Seconds are those of the steps, data
included; setting up and saving, which a run does once, are left out. The logits of the two trained models are compared.
Utilisation is 6 N + 12 layers hidden window operations a
token (`agents.grammar_training.flops_per_token`) over what a large matrix product reaches on the same device.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import Result, finish, parse
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


def beside(config: GrammarTraining, repeats: int) -> Result:
    """Train both ways in turn, once to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    worst = 0.0
    for _ in range(repeats + 1):
        (mine, told), (theirs, taken) = ours(config, "rotary"), bare(config, "rotary")
        times[0].append(told["tokens"] / told["tokens_per_second"])
        times[1].append(taken)
        worst = max(worst, float((mine - theirs).abs().max()))
    own, peer = (median(each[1:]) for each in times)
    told_shape = f"{config.hidden_size} x {config.layers}, {config.rows} x {config.window} tokens a step"
    return Result(told_shape, peer / own, own, peer, worst, repeats)


def main() -> None:
    """Measure and print."""
    quick = parse(__doc__ or "").quick
    disable_progress_bar()
    small = SMALL | {"rows": 2} if quick else SMALL
    shapes = {4 if quick else 20: small} | ({30: LARGE} if torch.cuda.is_available() else {})  # by number of steps
    results = [beside(settings(steps, **shape), 1 if quick else 3) for steps, shape in shapes.items()]
    rates: dict[str, float] = {}
    for steps, shape in shapes.items():
        for architecture in ARCHITECTURES if shape is small else ("rotary",):
            told = ours(settings(steps, **shape), architecture)[1]  # type: ignore[arg-type]
            name = f"{architecture}, {shape['hidden_size']} x {shape['layers']}"
            rates[f"{name}: tokens/s"] = told["tokens_per_second"]
            rates[f"{name}: utilisation"] = told["utilisation"]
    finish("Training on cfg3b", results, ("torch", "transformers", "accelerate"), rates)


if __name__ == "__main__":
    main()
