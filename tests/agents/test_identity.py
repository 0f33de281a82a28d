"""A model's identity changes with every byte that decides its answers, and with nothing else."""

from __future__ import annotations

import json
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextstate.agents.config import AgentConfig
from nextstate.agents.identity import BUILT_IN, device_kind, files_digest, model_identity, names_of_gpus
from nextstate.agents.language import LanguageModel


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A GPT-2 of the tests in a folder that may be changed."""
    return Path(shutil.copytree(folders["gpt2"], tmp_path / "copy"))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def shards(folder: Path, name: str = "model") -> None:
    """Split the weights of a folder into two files with an index, as large models have them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"{name}-00001-of-00002.safetensors": names[::2], f"{name}-00002-of-00002.safetensors": names[1::2]}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    where = {key: file for file, keys in files.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_any_flipped_bit_changes_it_and_flipping_back_restores_it(copy: Path) -> None:
    shards(copy)
    before = files_digest(str(copy))
    files = [path for path in sorted(copy.iterdir()) if path.name != "generation_config.json"]
    assert len(files) >= 5  # config, index, two shards, tokenizer files
    rng = random.Random(0)
    seen = {before}
    for k in range(50):
        path = files[k % len(files)]
        bit = rng.randrange(path.stat().st_size * 8)
        flip(path, bit)
        seen.add(files_digest(str(copy)))
        flip(path, bit)
        assert files_digest(str(copy)) == before
    assert len(seen) == 51


def test_an_edited_layer_and_swapped_weights_change_it(copy: Path, folders: dict[str, Path]) -> None:
    before = files_digest(str(copy))
    weights = load_file(copy / "model.safetensors")
    layer = next(name for name, tensor in weights.items() if ".1." in name and tensor.ndim == 2)
    weights[layer] = weights[layer] * 2
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    edited = files_digest(str(copy))
    shutil.copy(folders["gpt_neox"] / "model.safetensors", copy / "model.safetensors")
    assert len({before, edited, files_digest(str(copy))}) == 3


def test_files_that_exchange_their_contents_change_it(copy: Path) -> None:
    shards(copy)
    before = files_digest(str(copy))
    one, two = sorted(copy.glob("*.safetensors"))
    one.rename(copy / "aside")
    two.rename(one)
    (copy / "aside").rename(two)
    assert files_digest(str(copy)) != before


def test_an_edited_tokenizer_or_config_changes_it(copy: Path) -> None:
    seen = {files_digest(str(copy))}
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        data = json.loads((copy / name).read_text(encoding="utf-8"))
        (copy / name).write_text(json.dumps(data | {"edited": True}), encoding="utf-8")
        seen.add(files_digest(str(copy)))
    (copy / "added_tokens.json").write_text("{}")
    seen.add(files_digest(str(copy)))
    assert len(seen) == 5


def test_what_decides_no_answer_does_not_change_it(copy: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    (copy / "README.md").write_text("A model.")
    (copy / "generation_config.json").write_text("{}")
    (copy / "optimizer.pt").write_bytes(b"1")
    link = tmp_path / "link"
    link.symlink_to(copy)
    assert files_digest(str(copy)) == files_digest(str(folders["gpt2"])) == files_digest(str(link))


def test_a_model_describes_itself_by_the_same_digest(copy: Path) -> None:
    shards(copy)
    for name in (str(copy), "nextstate/tiny"):
        agent = LanguageModel(name, device="cpu")
        assert agent.describe()["hash"] == files_digest(name)
    assert files_digest("nextstate/tiny") == files_digest(str(BUILT_IN["nextstate/tiny"]))
    assert LanguageModel(str(copy), loaded=(agent.model, agent.tokenizer)).describe()["hash"] is None


def test_a_snapshot_of_the_hub_has_the_digest_of_its_folder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    kept = tmp_path / "models--someone--model"
    shutil.copytree(folders["gpt2"], kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    code = (
        "import sys\nfrom nextstate.agents.identity import files_digest as digest\n"
        "print(digest('someone/model'), digest('someone/model', sys.argv[1]), digest('someone/other'))"
    )
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code, commit], capture_output=True, text=True, check=True)
    digest = files_digest(str(folders["gpt2"]))
    assert done.stdout.split() == [digest, digest, "None"]


def test_the_identity_is_the_files_and_how_they_are_loaded(copy: Path, folders: dict[str, Path]) -> None:
    plain = model_identity(AgentConfig(name=str(folders["gpt2"])))
    assert plain == model_identity(AgentConfig(name=str(copy), batch_size=3, batch_tokens=100, device="cpu"))
    changes = [
        {"dtype": "bfloat16"}, {"attn_implementation": "eager"}, {"quantization": "8bit"}, {"bos": True},
        {"revision": "v1"},
    ]  # fmt: skip
    others = [model_identity(AgentConfig(name=str(copy), **change)) for change in changes]
    assert all(other != plain for other in others)
    assert len({json.dumps(other) for other in others}) == len(changes)


def test_the_identity_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom nextstate.agents.config import AgentConfig\n"
        "from nextstate.agents.identity import device_kind, model_identity\n"
        "for name in ('nextstate/tiny', 'someone/model'): model_identity(AgentConfig(name=name))\n"
        "device_kind(AgentConfig(name='nextstate/tiny'))\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_kind_of_device_agrees_with_torch() -> None:
    found = device_kind(AgentConfig(name="nextstate/tiny"))
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        assert names <= set(found.split(", "))
    elif torch.backends.mps.is_available():
        assert found == "mps"
    else:
        assert found == f"cpu {platform.machine()}"
    assert device_kind(AgentConfig(name="nextstate/tiny", device="cpu")) == f"cpu {platform.machine()}"
    assert device_kind(AgentConfig(name="nextstate/tiny", device="mps")) == "mps"


def test_names_of_gpus_are_read_from_what_the_driver_writes(tmp_path: Path) -> None:
    for slot, name in {"0000:01:00.0": "NVIDIA L4", "0000:02:00.0": "NVIDIA L4", "0000:03:00.0": "Tesla T4"}.items():
        (tmp_path / slot).mkdir()
        (tmp_path / slot / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 16\nGPU UUID: \t GPU-0\n")
    assert names_of_gpus(tmp_path) == ["NVIDIA L4", "Tesla T4"]
