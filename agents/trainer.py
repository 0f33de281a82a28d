"""Shared training code: `transformers.Trainer` on data that is a function of config and row number.

It resumes from its last checkpoint, logs to W&B (offline by default), and runs on several GPUs under
torchrun, where the rows of a step are shared out. On a GPU, worker processes make the next rows during a step, matrix
products are in bfloat16 (weights stay in float32), and blocks can be compiled.

On CPUs of one kind, one process with the same number of threads gives the same weights bit by bit, whether or not it
was interrupted, with any number of workers. Another number of threads adds up in another order. GPUs use algorithms
that do not repeat.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import get_last_checkpoint

from nextstate.agents.config import ConfigError
from nextstate.agents.training_config import Optimisation, Precision

# Training draws from children of the seed, evaluation from the seed itself: the two streams never meet.
TRAINING_STREAM = 1
_log = logging.getLogger(__name__)


def init_train_dir(decides: Mapping[str, Any], out: Path) -> None:
    """Initialise `out` as the folder of a training run; `decides` is the full configuration, in JSON types.

    Raises:
        ConfigError: `out` contains a run with another configuration.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = out / "train.json"
    if record.exists() and json.loads(record.read_text()) != decides:
        raise ConfigError(f"{out} contains a run of another config ({record}); give another --out, or remove it")
    record.write_text(json.dumps(decides, indent=2))


def fit(
    make: Callable[..., Trainer],
    settings: Optimisation,
    out: Path,
    name: str,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
    mode: Literal["offline", "online", "disabled"] = "offline",
    quiet: bool = False,
    **given: Any,
) -> Trainer:
    """Train, from the last checkpoint in `out` if there is one.

    Args:
        make: `transformers.Trainer`, or a subclass.
        settings: optimisation settings.
        out: folder of the run, which will contain the checkpoints.
        name: name of the W&B run.
        seed: seed of the trainer's own random numbers.
        callbacks: trainer callbacks; if one has an attribute `trainer`, it is set to the trainer.
        mode: W&B mode; unless it is "disabled", the environment variable WANDB_MODE overrides it.
        quiet: print nothing.
        given: further arguments of the trainer: model, train_dataset, data_collator.

    Raises:
        ConfigError: the rows of a step cannot be divided among the processes, or the settings need a GPU, or bfloat16
            on a GPU, that this machine does not have.
    """
    torch.set_num_threads(settings.threads)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.rows % processes:
        raise ConfigError(f"rows={settings.rows} cannot be divided among {processes} processes: expected a multiple")
    gpu = torch.cuda.is_available()
    if settings.compile and not gpu:
        raise ConfigError("compile=true needs a GPU, and this machine has none: remove it, or set compile=false")
    bf16 = uses_bfloat16(settings.precision)
    workers = settings.workers if settings.workers is not None else 2 * gpu
    wandb_run = None if int(os.environ.get("RANK", "0")) else _mirror(out, name, mode, quiet)
    if settings.compile:
        compile_blocks(given["model"])
    trainer = make(
        args=TrainingArguments(
            output_dir=str(out / "checkpoints"),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.rows // processes,
            train_sampling_strategy="sequential",
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup,
            lr_scheduler_type="linear",
            weight_decay=settings.weight_decay,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            save_steps=settings.save_every,
            save_total_limit=2,
            logging_steps=min(50, settings.steps),
            remove_unused_columns=False,
            bf16=bf16,
            report_to=[],
            seed=seed,
            dataloader_num_workers=workers,
            dataloader_pin_memory=gpu,
            use_cpu=(processes > 1 or bf16) and not gpu,
            disable_tqdm=quiet,
            ddp_backend=None if gpu or processes == 1 else "gloo",
        ),
        callbacks=[*callbacks, *([_Logger(wandb_run)] if wandb_run else [])],
        **given,
    )
    if quiet:
        trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        if hasattr(callback, "trainer"):
            callback.trainer = trainer
    saved = out / "checkpoints"
    with _deterministic(not gpu):
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(saved)) if saved.exists() else None)
    if wandb_run is not None:
        wandb_run.finish()
    return trainer


def uses_bfloat16(precision: Precision) -> bool:
    """Return whether matrix products are in bfloat16 on this machine.

    Raises:
        ConfigError: bfloat16 is wanted on a GPU that does not support it.
    """
    gpu = torch.cuda.is_available()
    supported = not gpu or torch.cuda.is_bf16_supported()
    if precision == "bfloat16" and not supported:
        raise ConfigError("precision=bfloat16 is not supported by this GPU: use float32 or auto")
    return precision == "bfloat16" or (precision == "auto" and gpu and supported)


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile each block of a model of transformers, in place: names of modules and weights stay as they are."""
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):  # which all blocks of transformers are
            block.compile(backend=backend)


@contextmanager
def evaluating(trainer: Trainer) -> Iterator[Any]:
    """Give the trainer's model in evaluation mode, for a time.

    Nothing is compiled: evaluations have many shapes, each of which would be compiled anew.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield model
    finally:
        model.train()


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Let torch use only algorithms that repeat bit by bit."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class _Logger(TrainerCallback):  # type: ignore[misc]
    """Logs the trainer's numbers to a W&B run of its own; that of transformers would use any run that is active."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        numbers = {f"train/{key}": value for key, value in logs.items()}
        self.run.log(numbers | {"train/global_step": state.global_step})


def _mirror(out: Path, name: str, mode: str, quiet: bool) -> Any:
    """Start a W&B run for the trainer's logs; None if W&B is disabled or cannot start."""
    wanted: Any = mode if mode == "disabled" else os.environ.get("WANDB_MODE", mode)
    if wanted == "disabled":
        return None
    import wandb

    settings = wandb.Settings(silent=quiet, console="off", disable_git=True, save_code=False, init_timeout=20)
    project = os.environ.get("WANDB_PROJECT", "nextstate")
    try:
        return wandb.init(mode=wanted, dir=str(out), project=project, name=name, settings=settings, reinit="create_new")
    except (wandb.errors.Error, OSError) as error:
        _log.warning("W&B cannot start %s (%s); the files of %s are not affected", wanted, error, out)
        return None
