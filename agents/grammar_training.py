"""Train a model of any architecture on fresh strings of a grammar ("Physics of Language Models: Part 1")."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    default_data_collator,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from nextstate.agents.architectures import new_model
from nextstate.agents.generation import TokenMap, divergences, right, write
from nextstate.agents.identity import files_digest
from nextstate.agents.text import begins_with
from nextstate.agents.trainer import TRAINING_STREAM, evaluating, fit, init_train_dir
from nextstate.agents.training_config import (
    BEGIN,
    END,
    MASK,
    PAD,
    SPECIAL,
    Architecture,
    GrammarTraining,
    ModelSpec,
    check_training,
)
from nextstate.envs.files import write_json
from nextstate.envs.grammar.derivation import sample
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.perturb import Perturbation, draw
from nextstate.envs.grammar.sizes import bounds, length_moments

BLOCK = 64  # windows cut from one stream
HIDDEN = (
    0.15  # of the tokens, for masked models; of these 80 % become the mask, 10 % a random token (Devlin et al. 2019)
)


def make_tokenizer(grammar: Grammar) -> PreTrainedTokenizerFast:
    """Return a tokenizer for terminals that are separated by spaces; it puts the begin token before each text."""
    words = {word: i for i, word in enumerate((*SPECIAL, *grammar.terminals))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = begins_with(BEGIN, words[BEGIN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, mask_token=MASK
    )


def token_map(grammar: Grammar) -> TokenMap:
    """Return the `TokenMap` of the tokenizer from `make_tokenizer`."""
    return TokenMap(0, 1, tuple(range(len(SPECIAL), len(SPECIAL) + len(grammar.terminals))))


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Window `i` of an endless text; a function of grammar, seed, perturbation and `i` alone.

    Strings, each between its begin and its end token, are laid one after another and cut into windows, 64 from one
    stream, which begins anywhere in a string.
    """

    def __init__(
        self, grammar: Grammar, window: int, rows: int, seed: int, perturbation: Perturbation | None, masked: bool
    ) -> None:
        self.grammar, self.codes = grammar, token_map(grammar)
        self.window, self.rows, self.seed, self.perturbation, self.masked = window, rows, seed, perturbation, masked
        self._kept: tuple[int, Int[np.ndarray, "row token"]] | None = None

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        block, k = divmod(i, BLOCK)
        if self._kept is None or self._kept[0] != block:
            self._kept = block, self.block(np.random.default_rng([self.seed, TRAINING_STREAM, block]))
        ids = self._kept[1][k]
        if not self.masked:
            return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids)}
        rng = np.random.default_rng([self.seed, TRAINING_STREAM + 1, i])
        hidden, how = rng.random(len(ids)) < HIDDEN, rng.random(len(ids))
        other = len(SPECIAL) + rng.integers(len(self.grammar.terminals), size=len(ids))
        shown = np.where(how < 0.8, SPECIAL.index(MASK), np.where(how < 0.9, other, ids))
        given, wanted = np.where(hidden, shown, ids), np.where(hidden, ids, -100)
        return {"input_ids": torch.from_numpy(given), "labels": torch.from_numpy(wanted)}

    def block(self, rng: np.random.Generator) -> Int[np.ndarray, "row token"]:
        """Draw a stream and cut it."""
        offset = int(rng.integers(self.window))
        tokens = np.array(self.codes.terminals)
        wanted, parts, have = offset + BLOCK * self.window, [], 0
        while have < wanted:
            many = 1 + int((wanted - have) / (length_moments(self.grammar)[0] + 2))
            for each in draw(self.grammar, rng, many, self.perturbation):
                parts += [[self.codes.begin], tokens[each.tokens], [self.codes.end]]
                have += len(each.tokens) + 2
        return np.concatenate(parts)[offset:wanted].reshape(BLOCK, self.window)


class Watch(TrainerCallback):  # type: ignore[misc]
    """Logs how well the model writes, every `evaluate_every` steps; times steps and their data, without evaluations."""

    def __init__(
        self, grammar: Grammar, config: GrammarTraining, seed: int, masked: bool, progress: Callable[[int], None] | None
    ) -> None:
        self.grammar, self.config, self.seed, self.masked, self.progress = grammar, config, seed, masked, progress
        self.trainer: Trainer | None = None
        self.seconds, self.steps, self.mark = 0.0, 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = state.global_step % self.config.evaluate_every == 0 or state.global_step == state.max_steps
        if due and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.mark
        self.steps += 1
        if self.progress is not None:
            self.progress(state.global_step)
        if due and not self.masked and self.trainer is not None:  # in all processes, as logging gathers from all
            strings = self.config.evaluation_strings
            with evaluating(self.trainer) as model:
                found = quick_evaluation(model, self.grammar, np.random.default_rng(self.seed), strings)
            self.trainer.log(found)
        self.mark = time.perf_counter()


def quick_evaluation(model: Any, grammar: Grammar, rng: np.random.Generator, strings: int) -> dict[str, float]:
    """Return the accuracy of a model's strings, and the divergence of its next tokens in nats per token."""
    codes, longest = token_map(grammar), bounds(grammar)[0][1]
    written = write(model, codes, [np.zeros(0, dtype=np.int64)] * strings, rng, longest)
    kl = divergences(model, codes, grammar, [each.tokens for each in sample(grammar, rng, strings)])
    return {"accuracy": right(grammar, written) / strings, "kl": float(np.mean(kl))}


def settings(config: GrammarTraining, spec: ModelSpec, grammar: Grammar, seed: int) -> dict[str, Any]:
    """Return everything that decides the weights, besides code, versions and device, in JSON types."""
    return {**config.decisive, **spec.model_dump(exclude={"name"}), "grammar": str(grammar), "seed": seed}


def train(
    config: GrammarTraining,
    spec: ModelSpec,
    grammar: Grammar,
    out: Path,
    seed: int = 0,
    mode: Literal["offline", "online", "disabled"] = "offline",
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Train a model, from the last checkpoint in `out` if there is one; return the folder of the trained model.

    Once it is trained, `out` holds `history.json`: parameters, steps, tokens, threads, seconds, the learning curve, and
    `weights`, the digest of the trained model's files.

    Args:
        config: shape and optimisation settings.
        spec: architecture and perturbation.
        grammar: the grammar whose strings are the training data.
        out: folder for checkpoints and the model.
        seed: seed of weights and data.
        mode: W&B mode.
        progress: called with the number of completed steps; the trainer's own progress bar is then hidden.

    Raises:
        ConfigError: `out` contains a run of another config or grammar, or a window is shorter than a string.
    """
    check_training(config, grammar)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        init_train_dir(settings(config, spec, grammar, seed), out)
    final, history = out / "model", out / "history.json"
    if history.exists() or (spec.untrained and not first):
        return final
    if progress is not None:
        disable_progress_bar()
    set_seed(seed)
    masked = spec.architecture == "masked"
    tokenizer = make_tokenizer(grammar)
    model = new_model(
        spec.architecture, len(tokenizer), config.hidden_size, config.layers, config.heads, config.window,
        *map(SPECIAL.index, (BEGIN, END, PAD)),
    )  # fmt: skip
    found: dict[str, Any] = {"parameters": model.num_parameters(), "steps": 0, "tokens": 0, "seconds": 0.0}
    found |= {"threads": config.threads, "tokens_per_second": None, "utilisation": None, "device": "cpu", "curve": []}
    if not spec.untrained:
        watch = Watch(grammar, config, seed, masked, progress)
        data = Windows(grammar, config.window, config.rows * config.steps, seed, spec.perturbs, masked)
        trainer = fit(
            Trainer, config, out, spec.title, seed, [watch], mode, progress is not None,
            model=model, train_dataset=data, data_collator=default_data_collator,
        )  # fmt: skip
        if not first:
            return final
        found |= _history(trainer, watch, config, model)
    model = model.to("cpu", torch.float32)
    model.config.use_cache = True  # disabled by the trainer
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    write_json(history, found | {"weights": files_digest(str(final.resolve()))})  # last: marks the run as complete
    return final


def _history(trainer: Trainer, watch: Watch, config: GrammarTraining, model: Any) -> dict[str, Any]:
    size = config.rows * config.window  # tokens of a step
    rows: dict[int, dict[str, Any]] = {}
    for entry in trainer.state.log_history:
        row = rows.setdefault(entry["step"], {"step": entry["step"], "tokens": entry["step"] * size})
        row |= {key: entry[key] for key in ("loss", "accuracy", "kl") if key in entry}
    speed = watch.steps * size / watch.seconds if watch.seconds else None
    device = trainer.args.device
    half = trainer.args.bf16
    peak = matmul_peak(device, torch.bfloat16 if half else torch.float32) * trainer.args.world_size
    return {
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * size,
        "seconds": round(watch.seconds, 1),
        "tokens_per_second": speed,
        "utilisation": speed * flops_per_token(model, config) / peak if speed else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "curve": list(rows.values()),
    }


def flops_per_token(model: Any, config: GrammarTraining) -> float:
    """Return the operations of a training step for each token: 6 N + 12 layers hidden window.

    After Chowdhery et al. 2022 (arXiv 2204.02311, appendix B).
    N leaves out what is only looked up: positions, distances, embeddings that do not also make the logits.
    """
    own = model.get_output_embeddings()
    tied = own is not None and own.weight is model.get_input_embeddings().weight
    looked_up = 0 if tied else model.get_input_embeddings().weight.numel()
    tables = (p.numel() for name, p in model.named_parameters() if "wpe." in name or ".distances." in name)
    n = model.num_parameters() - looked_up - sum(tables)
    return float(6 * n + 12 * config.layers * config.hidden_size * config.window)


def matmul_peak(device: torch.device, dtype: torch.dtype, repeats: int = 8) -> float:
    """Return the operations a second that a large matrix product reaches on a device; the best of a few."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        _ = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def load(folder: Path, architecture: Architecture, eager: bool = False) -> Any:
    """Load a trained model in evaluation mode; with `eager` it can return its attention weights."""
    disable_progress_bar()
    cls = AutoModelForMaskedLM if architecture == "masked" else AutoModelForCausalLM
    given = {"attn_implementation": "eager"} if eager else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return cls.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **given).eval().to(device)
