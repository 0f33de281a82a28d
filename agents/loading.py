"""Load a model and its tokenizer by name: built in, from a folder, or from the hub. Remote code is never run."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from nextstate.agents import architectures  # noqa: F401  (registers our own architectures with transformers)
from nextstate.agents.agent import AgentError
from nextstate.agents.checkpoints import Fit, check_files, check_finite, check_tokenizer, fit_of, read_config_json
from nextstate.agents.failures import guarded, one_line
from nextstate.agents.identity import BUILT_IN, folder_of, snapshot_of

PATIENCE = 5.0  # seconds to wait for the hub, including the DNS lookup

_LONG = 200  # longer messages of other libraries are cut to their first sentence

DeviceMap = str | dict[str, Any]
Quantization = Literal["4bit", "8bit"]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded; `nextstate.agents.language.LanguageModel` documents each field."""

    device: str | None = None
    device_map: DeviceMap | None = None
    dtype: str | None = None
    quantization: Quantization | None = None
    attn_implementation: str | None = None
    revision: str | None = None
    allow_incomplete: bool = False


@dataclass(frozen=True)
class Loaded:
    """A loaded model with its tokenizer, and how its checkpoint fits the model."""

    model: Any
    tokenizer: Any
    device: torch.device  # of the input tokens
    fit: Fit = field(default_factory=Fit)
    commit: str | None = None  # of a model from the hub

    @property
    def incomplete(self) -> str:
        """The problems of the checkpoint as text, "" if it is complete."""
        return self.fit.problems


def default_device() -> str:
    """Return "cuda" if it is available, else "mps" if it is available, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load(name: str, how: Loading) -> Loaded:
    """Load a model and its tokenizer, in evaluation mode.

    Raises:
        AgentError: the model does not exist or cannot be used; the message is one line.
    """
    given = _options(name, how)
    folder = folder_of(name)
    if folder is not None:
        config = _check_folder(name, folder)
        source, offline = str(folder), True
    else:
        config, source, offline = {}, name, _offline(name, how.revision)
    describe = partial(_describe, name, how, config)
    where = {"revision": how.revision, "trust_remote_code": False, "local_files_only": offline}
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # tensors missing from the checkpoint are initialised the same each time
        described = guarded(
            lambda: AutoConfig.from_pretrained(source, **where),
            partial(describe, what="its config.json cannot be used: "),
        )
        tokenizer = guarded(
            lambda: AutoTokenizer.from_pretrained(source, config=described, **where),
            partial(describe, what=_tokens(folder)),
        )
        model, info = guarded(
            lambda: AutoModelForCausalLM.from_pretrained(
                source,
                config=described,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **where,
                **given,
            ),
            describe,
        )
        fit = guarded(lambda: fit_of(model, info), describe)
        if fit.problems and not how.allow_incomplete:
            raise AgentError(
                f"cannot load {name}: the checkpoint does not fit its config.json: {fit.problems}; give a "
                "complete checkpoint, or set allow_incomplete=true to load it anyway"
            )
        snapshot = snapshot_of(name, how.revision) if folder is None else None
        commit = snapshot.name if snapshot is not None else None
        return guarded(lambda: _ready(name, model, tokenizer, how, fit, commit), describe)


def _ready(name: str, model: Any, tokenizer: Any, how: Loading, fit: Fit, commit: str | None) -> Loaded:
    if model.get_output_embeddings() is None:
        raise AgentError(f"{name} ({type(model).__name__}) has no output embeddings: it is not a language model")
    if how.device_map is None and how.quantization is None:
        model = model.to(how.device or default_device())
    table = model.get_input_embeddings()
    check_finite(name, model)
    check_tokenizer(name, tokenizer, int(table.weight.shape[0]))
    return Loaded(model.eval(), tokenizer, device_of(model), fit, commit)


def device_of(model: Any) -> torch.device:
    """Return the device of a model's inputs: that of its input embedding, also if accelerate moves the weights."""
    table = model.get_input_embeddings()
    hook = getattr(table, "_hf_hook", None)
    brought = getattr(hook, "execution_device", None)
    return torch.device(table.weight.device if brought is None else brought)


def _check_folder(name: str, folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        what = "the folder has no config.json" if folder.is_dir() else "there is no such folder"
        raise AgentError(
            f"{name} is not a model: expected a folder with config.json, *.safetensors and a tokenizer, as "
            f"`save_pretrained` writes it, or one of {', '.join(BUILT_IN)}, or a name on the hub, but {what}"
        )
    config = read_config_json(name, folder)
    check_files(name, folder)
    return config


def _options(name: str, how: Loading) -> dict[str, Any]:
    """Return the `from_pretrained` arguments for dtype and device; raise `AgentError` if they are not possible."""
    if how.device is not None and how.device_map is not None:
        raise AgentError(
            f"cannot load {name}: device={how.device!r} and device_map={how.device_map!r} cannot be combined; give one"
        )
    try:
        device = torch.device(how.device or default_device())
    except RuntimeError as error:
        raise AgentError(f"device={how.device!r} is not possible: expected cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise AgentError(f"device={how.device!r} is not possible: torch finds no GPU; leave it out, or give cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        known = torch.cuda.device_count()
        raise AgentError(
            f"device={how.device!r} is not possible: torch finds {known} GPU{'s' * (known > 1)}, from cuda:0"
        )
    if not torch.cuda.is_available() and _names_gpu(how.device_map):
        raise AgentError(
            f"cannot load {name}: device_map={how.device_map!r} is not possible: torch finds no GPU; leave it out"
        )
    mapped = how.device_map is not None and torch.cuda.is_available()
    wanted: Any = getattr(torch, how.dtype or "float32", None)
    if how.dtype is None and (device.type == "cuda" or mapped):
        wanted = "auto"
    if wanted != "auto" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise AgentError(f"dtype={how.dtype!r} is not possible: expected float32, bfloat16 or float16")
    given: dict[str, Any] = {"dtype": wanted}
    if how.attn_implementation is not None:
        given["attn_implementation"] = how.attn_implementation
    if how.device_map is not None:
        given["device_map"] = how.device_map
    if how.quantization is not None:
        given |= {"quantization_config": _quantized(name, how, wanted)}
        given.setdefault("device_map", {"": str(device)})  # quantized models cannot be moved afterwards
    return given


def _names_gpu(device_map: DeviceMap | None) -> bool:
    where = device_map.values() if isinstance(device_map, dict) else [device_map]
    return any(isinstance(device, int) or str(device).startswith("cuda") for device in where)


def _quantized(name: str, how: Loading, wanted: Any) -> Any:
    if how.quantization not in ("4bit", "8bit"):
        raise AgentError(
            f"cannot load {name}: quantization={how.quantization!r} is not possible: expected 4bit or 8bit"
        )
    lacks = "bitsandbytes is not installed" if importlib.util.find_spec("bitsandbytes") is None else ""
    if not lacks and not torch.cuda.is_available():
        lacks = "torch finds no GPU on this computer"
    if lacks:
        raise AgentError(
            f"cannot load {name} with quantization={how.quantization}: {lacks}; quantization needs a GPU "
            "and the package bitsandbytes; otherwise leave the key out"
        )
    from transformers import BitsAndBytesConfig

    if how.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = wanted if isinstance(wanted, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)


def _tokens(folder: Path | None) -> str:
    lacks = folder is not None and not (folder / "tokenizer.json").is_file()
    return f"its tokenizer cannot be loaded{' (there is no tokenizer.json)' if lacks else ''}: "


def _describe(name: str, how: Loading, config: Mapping[str, Any], error: BaseException, what: str = "") -> str:
    text = str(error)
    if "custom code" in text or "trust_remote_code" in text:
        code = config.get("auto_map")
        which = ", ".join(map(str, code.values())) if isinstance(code, dict) else "auto_map"
        return (
            f"cannot load {name}: it needs custom code ({which}), which is never run; give a checkpoint whose "
            "architecture is part of transformers"
        )
    if "automatic conversion of the weights" in text:
        return (
            f"cannot load {name}: tensors that are merged on loading, such as those of experts, do not fit together: "
            "one is missing or has another shape; give a complete checkpoint"
        )
    message = one_line(error)
    message = (message if len(message) <= _LONG else message.partition(". ")[0]).rstrip(".,;: ")
    if how.attn_implementation is not None and ("attention" in text.lower() or "attn" in text):
        return (
            f"cannot load {name} with attn_implementation={how.attn_implementation!r}: {message}; give eager, or leave "
            "the key out"
        )
    return f"cannot load {name}: {what}{message}. Give another folder, a name on the hub, or {', '.join(BUILT_IN)}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log messages and progress bars of transformers; errors are reported as our own."""
    before = logging.get_verbosity()
    logging.disable_progress_bar()  # the command line shows its own
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


# --- the hub


def _offline(name: str, revision: str | None) -> bool:
    """Return whether a hub model has to be read from the local cache; raise `AgentError` if it is not there either.

    The hub is contacted once and must answer within `PATIENCE` seconds, so that computers without a network fail fast.
    """
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable(name, revision)
    if not reason:
        return False
    if snapshot_of(name, revision) is not None:
        return True
    raise AgentError(
        f"cannot load {name}: there is no such folder, it is not in the local cache of downloaded models, and the hub "
        f"cannot be reached ({reason}); give a folder or {', '.join(BUILT_IN)}, or connect to a network"
    )


def _unreachable(name: str, revision: str | None) -> str:
    """Return why the hub cannot be reached, or "" if it answers (also if it answers that the model does not exist)."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(_ask(name, revision)), daemon=True)
    thread.start()  # a thread, since the DNS lookup has no timeout of its own
    thread.join(PATIENCE)
    return found[0] if found else f"no answer from {constants.ENDPOINT} within {PATIENCE:g} seconds"


def _ask(name: str, revision: str | None) -> str:
    def head() -> str:
        with suppress(RepositoryNotFoundError, GatedRepoError, EntryNotFoundError, HFValidationError):
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=PATIENCE)
        return ""  # the hub answered; if the model does not exist, transformers reports it in more detail

    return _reason(head)


def _reason(ask: Callable[[], str]) -> str:
    try:
        return guarded(ask, lambda error: f"{constants.ENDPOINT}: {one_line(error)}")
    except AgentError as error:
        return str(error)
