"""Train a model of any architecture on fresh strings of a grammar ("Physics of Language Models: Part 1")."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field
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

from nextstate.agents.architectures import ARCHITECTURES, Architecture, new_model
from nextstate.agents.config import ConfigError, Strict
from nextstate.agents.generation import Codes, divergences, right, write
from nextstate.agents.text import begins_with
from nextstate.agents.trainer import TRAINING_STREAM, Optimisation, claim, fit
from nextstate.envs.grammar.derivation import sample
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.perturb import Perturbation, draw
from nextstate.envs.grammar.sizes import bounds, length_moments

BEGIN, END, PAD, MASK = SPECIAL = ("<begin>", "<end>", "<pad>", "<mask>")
BLOCK = 64  # windows cut from one stream
HIDDEN = (
    0.15  # of the tokens, for masked models; of these 80 % become the mask, 10 % a random token (Devlin et al. 2019)
)


class GrammarTraining(Optimisation):
    """Shape of the models and how they are trained; the defaults are the paper's."""

    hidden_size: int = Field(default=768, ge=1)
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    window: int = Field(default=512, ge=4, description="tokens of a row, cut from strings one after another")
    rows: int = Field(default=96, ge=1, description="of a step, over all processes")
    steps: int = Field(default=100_000, ge=1)
    learning_rate: float = 3e-4
    warmup: int = 0
    weight_decay: float = 0.1
    evaluate_every: int = Field(default=2000, ge=1)
    evaluation_strings: int = Field(default=200, ge=1, description="written, and scored, each time")


class ModelSpec(Strict):
    """One model of a study.

    Args:
        architecture: one of `agents.architectures`.
        untrained: leave the weights as they are drawn, a control for probes.
        perturbation: how some of its training strings are spoilt.
        name: in tables and figures; made from the others by default.
    """

    class Spoilt(Strict):
        """See `nextstate.envs.grammar.perturb.Perturbation`."""

        kind: Literal["token", "symbol", "permutation"]
        fraction: float = Field(ge=0, le=1)
        rate: float = Field(ge=0, le=1)

    architecture: Architecture = "rotary"
    untrained: bool = False
    perturbation: Spoilt | None = None
    name: str = ""

    @property
    def title(self) -> str:
        """The model's name."""
        if self.name or self.perturbation is None:
            return self.name or ("random" if self.untrained else self.architecture)
        spoilt = self.perturbation
        return f"{self.architecture}, {spoilt.fraction:g} with {spoilt.kind} {spoilt.rate:g}"

    @property
    def spoils(self) -> Perturbation | None:
        """What spoils its training strings."""
        return Perturbation(**self.perturbation.model_dump()) if self.perturbation else None


def make_tokenizer(grammar: Grammar) -> PreTrainedTokenizerFast:
    """Return a tokenizer of terminals with spaces between; it puts the begin token before a text by itself.

    Raises:
        ConfigError: a terminal has the name of a special token.
    """
    taken = set(SPECIAL) & set(grammar.terminals)
    if taken:
        raise ConfigError(f"terminals {', '.join(sorted(taken))} have names of special tokens; give them other names")
    words = {word: i for i, word in enumerate((*SPECIAL, *grammar.terminals))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = begins_with(BEGIN, words[BEGIN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, mask_token=MASK
    )


def codes_of(grammar: Grammar) -> Codes:
    """Return which tokens of `make_tokenizer` stand for what."""
    return Codes(0, 1, tuple(range(len(SPECIAL), len(SPECIAL) + len(grammar.terminals))))


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Window `i` of an endless text; a function of grammar, seed, perturbation and `i` alone.

    Strings, each between its begin and its end token, are laid one after another and cut into windows, 64 from one
    stream, which begins anywhere in a string.
    """

    def __init__(
        self, grammar: Grammar, window: int, rows: int, seed: int, perturbation: Perturbation | None, masked: bool
    ) -> None:
        self.grammar, self.codes = grammar, codes_of(grammar)
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
    """Logs every so many steps how well the model writes; keeps the time of steps, data included, without that."""

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
            model = self.trainer.accelerator.unwrap_model(self.trainer.model).eval()
            found = glance(model, self.grammar, np.random.default_rng(self.seed), self.config.evaluation_strings)
            model.train()
            self.trainer.log(found)
        self.mark = time.perf_counter()


def glance(model: Any, grammar: Grammar, rng: np.random.Generator, strings: int) -> dict[str, float]:
    """Return how many of the strings that a model writes are right, and how far its next tokens are (nats a token)."""
    codes, longest = codes_of(grammar), bounds(grammar)[0][1]
    written = write(model, codes, [np.zeros(0, dtype=np.int64)] * strings, rng, longest)
    kl = divergences(model, codes, grammar, [each.tokens for each in sample(grammar, rng, strings)])
    return {"accuracy": right(grammar, written) / strings, "kl": float(np.mean(kl))}


def check(config: GrammarTraining, grammar: Grammar) -> None:
    """Raise `ConfigError` where a window is shorter than a string, or a terminal is called as a special token is."""
    make_tokenizer(grammar)
    longest = bounds(grammar)[0][1]
    if config.window < longest + 2:
        raise ConfigError(
            f"window={config.window} is shorter than a string: this grammar has strings of {longest:,} tokens, and two "
            f"more stand at their ends; expected at least {longest + 2}, or a grammar with shorter strings"
        )


def train(
    config: GrammarTraining,
    spec: ModelSpec,
    grammar: Grammar,
    out: Path,
    seed: int = 0,
    mode: Literal["offline", "online", "disabled"] = "offline",
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Train a model, going on where a killed run left off; return its folder, which also holds `history.json`.

    Args:
        config: how.
        spec: which.
        grammar: on what.
        out: folder of checkpoints and model.
        seed: of weights and data.
        mode: of W&B.
        progress: told how many steps are done; the trainer's own bar is not shown then.

    Raises:
        ConfigError: `out` holds a run of another config or grammar, or a window is shorter than a string.
    """
    check(config, grammar)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        claim({**config.model_dump(), **spec.model_dump(), "grammar": str(grammar), "seed": seed}, out)
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
    found |= {"tokens_per_second": None, "utilisation": None, "device": "cpu", "curve": []}
    if not spec.untrained:
        watch = Watch(grammar, config, seed, masked, progress)
        data = Windows(grammar, config.window, config.rows * config.steps, seed, spec.spoils, masked)
        trainer = fit(
            Trainer, config, out, spec.title, seed, [watch], mode, progress is not None,
            model=model, train_dataset=data, data_collator=default_data_collator,
        )  # fmt: skip
        if not first:
            return final
        found |= _told(trainer, watch, config, model)
    model = model.to("cpu", torch.float32)
    model.config.use_cache = True  # the trainer turned it off
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    history.write_text(json.dumps(found, indent=1))  # last: with it the model is done
    return final


def _told(trainer: Trainer, watch: Watch, config: GrammarTraining, model: Any) -> dict[str, Any]:
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
    """Load a trained model, in evaluation mode; `eager` for one that returns its attention."""
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"architecture={architecture!r} is not possible: expected one of {', '.join(ARCHITECTURES)}")
    disable_progress_bar()  # ours shows what goes on
    cls = AutoModelForMaskedLM if architecture == "masked" else AutoModelForCausalLM
    given = {"attn_implementation": "eager"} if eager else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return cls.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **given).eval().to(device)
