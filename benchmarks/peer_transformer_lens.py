"""TransformerLens's side of `benchmarks.patching`; it runs in an environment of its own, which has no nextstate.

python benchmarks/peer_transformer_lens.py MODEL_FOLDER PAIRS.json RESULT.json
"""

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel


def main(folder: str, pairs: str, result: str) -> None:
    """Patch each head at the last token, one forward pass a head, and write seconds and logit differences."""
    model = TransformerBridge.boot_transformers(folder, hf_model=GPT2LMHeadModel.from_pretrained(folder), device="cpu")
    heads = model.cfg.n_heads
    given = json.loads(Path(pairs).read_text())
    clean, corrupted = torch.tensor(given["clean"]), torch.tensor(given["corrupted"])
    answer, other, rows = torch.tensor(given["answer"]), torch.tensor(given["other"]), torch.arange(len(clean))
    found: list[list[float]] = []

    def metric(logits: torch.Tensor) -> torch.Tensor:
        last = logits[:, -1]
        found.append((last[rows, answer] - last[rows, other]).tolist())
        return logits.new_zeros(())

    def at_last(value: torch.Tensor, index: Any, clean: torch.Tensor) -> torch.Tensor:
        _, head = index
        split = value.view(*value.shape[:2], heads, -1)
        split[:, -1, head] = clean.view(split.shape)[:, -1, head]
        return value

    with torch.inference_mode():
        begun = perf_counter()
        _, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_z"))
        patching.generic_activation_patch(model, corrupted, cache, metric, at_last, "z", ["layer", "head"])
        taken = perf_counter() - begun
    Path(result).write_text(json.dumps({"seconds": taken, "difference": found[-model.cfg.n_layers * heads :]}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
