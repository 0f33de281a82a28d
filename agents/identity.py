"""Digests and names that identify a language model and its device, to compare runs; needs neither torch nor a GPU."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nextstate.agents.config import AgentConfig
from nextstate.envs.files import read_json

BUILT_IN = {"nextstate/tiny": Path(__file__).parent / "tiny"}

_ENDINGS = (".safetensors", ".json", ".txt", ".model", ".tiktoken")  # of configs, weights, their index and tokenizers
TRAINED = "trained.json"  # what a model was trained on; see `nextstate.agents.training.trained_range`
# Probabilities of answers do not depend on these.
_WITHOUT_EFFECT = ("generation_config.json", "trainer_state.json", TRAINED)
_DRIVER = Path("/proc/driver/nvidia/gpus")


def folder_of(name: str) -> Path | None:
    """Return the folder of a model given by name, or None if it is a name on the hub."""
    folder = BUILT_IN.get(name, Path(name).expanduser())
    local = name in BUILT_IN or folder.is_dir() or name.startswith((".", "/", "~"))
    return folder if local else None


def trained_on(name: str) -> dict[str, dict[str, int]]:
    """Return what a model was trained on: of each game and size the largest step; {} if its folder does not say so.

    Examples:
        >>> sorted(trained_on("nextstate/tiny")["DFA"])
        ['2', '3', '4', '5', '6', '7', '8']
    """
    folder = folder_of(name)
    found = read_json(folder / TRAINED) if folder is not None else {}
    # The folder may be anybody's, with another meaning of this file.
    if not all(isinstance(sizes, dict) for sizes in found.values()):
        return {}
    steps = [item for sizes in found.values() for item in sizes.items()]
    return found if all(size.isdecimal() and type(step) is int for size, step in steps) else {}


def files_digest(name: str, revision: str | None = None) -> str | None:
    """Return one SHA-256 over the config, weights and tokenizer files of a model, None if it is not on this computer.

    Every file is read each time, so that the digest changes whenever a byte does; copies in other folders agree.

    Args:
        name: a built-in model, a folder, or a name on the hub, whose downloaded snapshot is read.
        revision: branch, tag or commit on the hub.
    """
    folder = folder_of(name) or snapshot_of(name, revision)
    if folder is None or not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _ENDINGS and path.name not in _WITHOUT_EFFECT:
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def model_identity(config: AgentConfig) -> dict[str, Any]:
    """Return what determines the answers of a language model on a given device: its files and how they are loaded.

    Two configs with equal identities give the same answers, whatever name they use. `files` is None for a model on the
    hub that has not been downloaded; see `device_kind` for the device.
    """
    loading = config.model_dump(include={"revision", "dtype", "attn_implementation", "quantization", "bos"})
    return {"files": files_digest(config.name, config.revision), **loading}


def device_kind(config: AgentConfig) -> str:
    """Return the kind of device a model runs on, such as "NVIDIA A100-SXM4-40GB", "mps" or "cpu x86_64".

    Results are only exactly reproducible on one kind of device. If a computer has different GPUs, all are named.
    """
    wanted = config.device.partition(":")[0] if config.device else None
    if wanted in (None, "cuda") and (gpus := _gpus()):
        return ", ".join(gpus)
    if wanted == "mps" or (wanted is None and sys.platform == "darwin" and platform.machine() == "arm64"):
        return "mps"
    return f"{wanted or 'cpu'} {platform.machine()}"


def _gpus() -> list[str]:
    """Return the model names of the NVIDIA GPUs that torch can use, sorted, each once."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or version("torch").endswith("+cpu"):
        return []
    if _DRIVER.is_dir():
        return names_of_gpus(_DRIVER)
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return sorted(set(answer.stdout.splitlines())) if answer.returncode == 0 else []


def visible_gpus() -> list[str]:
    """Return the NVIDIA GPUs that torch can use, as `CUDA_VISIBLE_DEVICES` names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    if not _gpus():
        return []
    if _DRIVER.is_dir():
        return [str(i) for i, _ in enumerate(_DRIVER.glob("*/information"))]
    answer = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True)
    return [str(i) for i, _ in enumerate(answer.stdout.splitlines())]


def names_of_gpus(folder: Path) -> list[str]:
    """Return the model names in a folder of the NVIDIA driver, which has a subfolder for each GPU."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*/information")))
    return sorted(set(re.findall(r"^Model:\s*(.+?)\s*$", text, re.MULTILINE)))


def snapshot_of(name: str, revision: str | None) -> Path | None:
    """Return the folder of a hub model's downloaded snapshot, None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None
