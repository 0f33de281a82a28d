"""Checks of a checkpoint before a model is used: its files, its tensors and its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nextstate.agents.agent import AgentError
from nextstate.agents.failures import one_line
from nextstate.agents.text import before_text

# Buffers that older versions of transformers wrote and newer ones compute.
_OLD = re.compile(
    r"(^|\.)(attn\.bias|attention\.bias|masked_bias|inv_freq|position_ids|cos_cached|sin_cached|rope\.freqs)$"
)
_SHOWN = 3  # names in a message
_CHUNK = 1 << 24  # numbers looked at together


@dataclass(frozen=True)
class Fit:
    """The differences between the tensors of a checkpoint and those of the model that its config describes."""

    missing: tuple[str, ...] = ()  # of the model but not the checkpoint
    mismatched: tuple[str, ...] = ()  # of another shape
    foreign: tuple[str, ...] = ()  # of the checkpoint but not the model, named as in one of the model's modules
    ignored: tuple[str, ...] = ()  # of other parts, such as vision towers

    @property
    def problems(self) -> str:
        """The problems as text, "" for a complete checkpoint."""
        found = [
            _many(self.missing, "tensor is missing", "tensors are missing"),
            _many(self.mismatched, "tensor has another shape", "tensors have another shape"),
            _many(self.foreign, "tensor has no place in it", "tensors have no place in it"),
        ]
        return "; ".join(filter(None, found))

    def describe(self) -> dict[str, Any]:
        """Return the entry of `run.json` about ignored tensors: their number, and the first few names."""
        return {"count": len(self.ignored), "names": list(self.ignored[:8])}


def _many(names: tuple[str, ...], one: str, more: str) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{len(names):,} {one if len(names) == 1 else more} ({', '.join(names[:_SHOWN])}{rest})"


def fit_of(model: Any, info: Mapping[str, Any]) -> Fit:
    """Return how a checkpoint fits, from the information of `from_pretrained(..., output_loading_info=True)`."""
    foreign, ignored = sort_unexpected(model, info.get("unexpected_keys", ()))
    shapes = [
        f"{name}: {list(given)} in the checkpoint, {list(wanted)} by config.json"
        for name, given, wanted in sorted(info.get("mismatched_keys", ()))
    ]
    return Fit(tuple(sorted(info.get("missing_keys", ()))), tuple(shapes), foreign, ignored)


def sort_unexpected(model: Any, names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split unexpected tensors into those that belong to the model's modules and those of other parts.

    A tensor belongs to the model if its name is in one of the model's lists of modules, at any index, or directly in
    one of its other modules: a superfluous layer, or a bias or norm that the config disables. The others are ignored:
    vision towers, heads for other tasks. Buffers that transformers now computes itself are in neither group.
    """
    modules = dict(model.named_modules())
    lists = tuple(f"{name}." for name, module in modules.items() if isinstance(module, torch.nn.ModuleList) and name)
    base = str(getattr(model, "base_model_prefix", ""))
    foreign: list[str] = []
    ignored: list[str] = []
    for name in sorted(names):
        if _OLD.search(name):
            continue
        spellings = [name, f"{base}.{name}"] if base else [name]
        parents = {spelling.rpartition(".")[0] for spelling in spellings} - {""}
        own = any(spelling.startswith(lists) for spelling in spellings) or not parents.isdisjoint(modules)
        (foreign if own else ignored).append(name)
    return tuple(foreign), tuple(ignored)


def check_finite(name: str, model: Any) -> None:
    """Raise `AgentError` if a weight is NaN or infinite."""
    for key, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point():
            continue
        for part in weight.detach().reshape(-1).split(_CHUNK):
            float_part = part.float() if part.dtype.itemsize == 1 else part  # eight bits have no test of their own
            if not bool(torch.isfinite(float_part).all()):
                raise AgentError(
                    f"cannot load {name}: its tensor {key} holds NaN or infinity; the checkpoint is damaged, or "
                    f"{str(weight.dtype).removeprefix('torch.')} is too narrow for it: get it again, or give another "
                    "dtype"
                )


def check_tokenizer(name: str, tokenizer: Any, rows: int) -> None:
    """Raise `AgentError` if a tokenizer produces tokens for which the model has no embedding.

    Special tokens beyond the embedding are accepted if they start no text, since plain text is never encoded as one:
    some text models have the tokenizer of a larger multimodal model, and some tokenizers add a pad token.
    """
    if len(tokenizer) <= rows:
        return
    first = {*before_text(tokenizer), tokenizer.bos_token_id}
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    spare = {i for i, token in added.items() if token.special and i not in first}
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows and i not in spare)
    if beyond:
        raise AgentError(
            f"cannot load {name}: its tokenizer has {len(tokenizer):,} tokens, but its embedding {rows:,} rows "
            f"(token {beyond[0][0]:,} is {beyond[0][1]!r}); give the tokenizer that belongs to these weights"
        )


def read_config_json(name: str, folder: Path) -> dict[str, Any]:
    """Return the content of a model's `config.json`; raises `AgentError` if it is missing or cannot be read."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AgentError(
            f"cannot load {name}: its config.json is not JSON ({one_line(error)}); get the file again"
        ) from error
    if not isinstance(found, dict):
        raise AgentError(f"cannot load {name}: its config.json holds {type(found).__name__}, expected keys and values")
    return found


def check_files(name: str, folder: Path) -> None:
    """Raise `AgentError` if a folder has no safetensors files, or one with an unreadable or wrong header."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = _weights(folder)
        has = f"only {', '.join(others)}, which can run code when it is read" if others else "no weights"
        raise AgentError(
            f"cannot load {name}: the folder holds {has}; expected *.safetensors, as `save_pretrained` writes them"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise AgentError(
                f"cannot load {name}: {file.name} ({file.stat().st_size:,} bytes) is cut off or damaged "
                f"({one_line(error)}); get the file again"
            ) from error


def _weights(folder: Path) -> Collection[str]:
    endings = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf"}
    return sorted(f.name for f in folder.iterdir() if f.suffix in endings)
