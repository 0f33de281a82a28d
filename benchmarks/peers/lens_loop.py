"""Usual, for head patching: TransformerLens's `generic_activation_patch`, one forward pass for each head.

It runs in an environment of its own, which has TransformerLens 4 and no nextstate:

    python -I benchmarks/peers/lens_loop.py MODEL_FOLDER PAIRS.json RESULT.json LAYER ...
"""

import json
import sys
from pathlib import Path
from time import process_time
from typing import Any


def main(folder: str, pairs: str, result: str, *layers: str) -> None:
    """Patch each head of the layers at the last token; write CPU seconds and logit differences, [patch pair]."""
    import pandas as pd
    import torch
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(1)
    model = TransformerBridge.boot_transformers(folder, hf_model=GPT2LMHeadModel.from_pretrained(folder), device="cpu")
    heads = model.cfg.n_heads
    given = {name: torch.tensor(x) for name, x in json.loads(Path(pairs).read_text()).items()}
    rows = torch.arange(len(given["clean"]))
    patches = pd.DataFrame([(int(layer), head) for layer in layers for head in range(heads)], columns=["layer", "head"])
    found: list[list[float]] = []

    def metric(logits: torch.Tensor) -> torch.Tensor:
        last = logits[:, -1]
        found.append((last[rows, given["answer"]] - last[rows, given["other"]]).tolist())
        return logits.new_zeros(())

    def at_last(value: torch.Tensor, index: Any, clean: torch.Tensor) -> torch.Tensor:
        _, head = index
        split = value.view(*value.shape[:2], heads, -1)
        split[:, -1, head] = clean.view(split.shape)[:, -1, head]
        return value

    with torch.inference_mode():
        begun = process_time()
        _, cache = model.run_with_cache(given["clean"], names_filter=lambda name: name.endswith("hook_z"))
        patching.generic_activation_patch(model, given["corrupted"], cache, metric, at_last, "z", index_df=patches)
        taken = process_time() - begun
    Path(result).write_text(json.dumps({"seconds": taken, "difference": found[-len(patches) :]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
