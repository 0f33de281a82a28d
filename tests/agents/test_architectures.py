"""Our own attention against loops over its formulas, and every architecture against itself: saved, cached, padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, StaticCache

from nextstate.agents.architectures import (
    ARCHITECTURES,
    DistanceConfig,
    Distances,
    attend,
    causal_relative,
    new_model,
)
from nextstate.agents.masks import PathMasks, Places

CAUSAL = [a for a in ARCHITECTURES if a != "masked"]
OWN = ("relative", "position", "uniform")


def tiny(architecture: Any, context: int = 64) -> Any:
    torch.manual_seed(0)
    model = new_model(architecture, 12, hidden_size=32, layers=2, heads=4, context=context).eval()
    for parameter in model.parameters():  # so wide that all of them matter
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", OWN)
def test_attention_is_its_formula(kind: str) -> None:
    torch.manual_seed(1)
    rows, heads, n, width = 2, 4, 9, 3
    module = torch.nn.Module()
    module.distances = Distances(DistanceConfig(n_head=heads, n_embd=heads * width, n_positions=6, distances=kind))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    module.double().eval()
    q, k, v = (torch.randn(rows, heads, n, width, dtype=torch.float64) for _ in range(3))
    out, weights = attend(module, q, k, v, None)
    assert weights is not None
    own = module.distances
    for row in range(rows):
        for h in range(heads):
            for i in range(n):
                scores = []
                for j in range(i + 1):
                    d = min(i - j, 5)  # the table is as long as the context
                    if kind == "relative":
                        query, key = q[row, h, i], k[row, h, j]
                        score = (query @ key + query @ own.key[h, d] + key @ own.query[h, d]) / (3 * width) ** 0.5
                    elif kind == "position":
                        score = own.score[h, d]
                    else:
                        score = torch.tensor(0.0 if i - j < 2**h else -torch.inf)
                    scores.append(score.double())
                expected = torch.stack(scores).softmax(0)
                assert torch.allclose(weights[row, h, i, : i + 1], expected, atol=1e-12)
                assert weights[row, h, i, i + 1 :].abs().max() < 1e-12 if i + 1 < n else True
                assert torch.allclose(out[row, i, h], expected @ v[row, h, : i + 1], atol=1e-12)


def dense(q: Tensor, k: Tensor, v: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """Relative attention of a whole row from its formula, one distance after another."""
    n, width = q.shape[2:]
    scores = q @ k.transpose(2, 3)
    for d in range(n):
        i, j = torch.arange(d, n), torch.arange(n - d)
        own = (q[:, :, i] * r[:, d, None]).sum(-1) + (k[:, :, j] * s[:, d, None]).sum(-1)
        scores = scores.index_put((torch.tensor(0), torch.arange(q.shape[1])[:, None], i, j), own[0], accumulate=True)
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    return ((scores / (3 * width) ** 0.5).masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(("n", "block"), [(1, 4), (4, 4), (5, 4), (23, 4), (23, 64), (128, 128), (300, 128)])
def test_relative_attention_in_blocks_is_its_formula_with_gradients(n: int, block: int) -> None:
    torch.manual_seed(2)
    heads, width, distances = 3, 5, n + 7
    inputs = [torch.randn(1, heads, n, width) for _ in range(3)] + [torch.randn(heads, distances, width)] * 2
    inputs[4] = torch.randn(heads, distances, width)
    toward = torch.randn(1, n, heads, width)
    found = []
    for attention, dtype in (
        (lambda *x: causal_relative(*x, block=block), torch.float32),
        (lambda *x: causal_relative(*x, block=block), torch.float64),
        (dense, torch.float64),
    ):
        given = [x.to(dtype).requires_grad_() for x in inputs]
        out = attention(*given)
        found.append([out.detach(), *torch.autograd.grad((out * toward.to(dtype)).sum(), given)])
    for single, double, expected in zip(*found, strict=True):
        assert torch.allclose(double, expected, atol=1e-12)
        assert (single - expected).abs().max() < 1e-6 * max(1, float(expected.abs().max()))


def test_relative_attention_drops_weights_out_without_bias() -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, 12, 4) for _ in range(3))
    tables = torch.randn(2, 2, 12, 4)
    whole = causal_relative(q, k, v, *tables)
    dropped = torch.stack([causal_relative(q, k, v, *tables, dropout=0.3, block=5) for _ in range(2000)])
    error = dropped.std(0) / len(dropped) ** 0.5
    assert ((dropped.mean(0) - whole).abs() < 5 * error).all()  # of 96 numbers


def test_training_runs_relative_attention_in_blocks_with_the_same_result() -> None:
    """The dense computation, which other masks use, gives the loss and the gradients of a training step."""
    model = tiny("relative", context=400)
    ids = torch.randint(0, 12, (2, 400))
    causal = torch.ones(400, 400, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    found = []
    for training, mask in ((True, None), (True, torch.ones(2, 400)), (True, causal), (False, None)):
        model.train(training).zero_grad()
        held: dict[int, int] = {}

        def keep(x: Tensor, held: dict[int, int] = held) -> Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(input_ids=ids, labels=ids, attention_mask=mask).loss
        kept = sum(held.values())
        loss.backward()
        found.append((kept, [loss.detach(), *(p.grad.clone() for p in model.parameters())]))
    for _, other in found[1:]:
        for one, two in zip(found[0][1], other, strict=True):
            assert (one - two).abs().max() < 1e-5 * max(1, float(two.abs().max()))
    blocks, ones, given, evaluation = (kept for kept, _ in found)
    assert blocks == ones < 0.5 * min(given, evaluation)  # bytes kept for the backward pass


def test_training_on_padded_rows_hides_the_padding() -> None:
    model, ids = tiny("relative").train(), torch.randint(0, 12, (1, 20))
    left = torch.cat([torch.full((1, 5), 2), ids], dim=1)
    padded = model(left, attention_mask=(torch.arange(25) >= 5).long()[None]).logits[0, 5:]
    assert torch.allclose(padded, model(ids).logits[0], atol=1e-4)


@pytest.mark.parametrize("architecture", OWN)
@pytest.mark.parametrize("training", [False, True])
def test_branches_see_their_own_path(architecture: Any, training: bool) -> None:
    """Two branches of a trunk in one row, with a mask of what each token sees, give what the two texts give alone."""
    model, ids = tiny(architecture).train(training), torch.randint(0, 12, (1, 16))
    trunk, one, other = torch.arange(8), torch.arange(8, 12), torch.arange(12, 16)
    seen = torch.ones(16, 16, dtype=torch.bool).tril()
    seen[12:, 8:12] = False
    depths = torch.cat([torch.arange(12), torch.arange(8, 12)])[None]
    with PathMasks(model)(Places(seen[None], depths)):
        row = model(ids, attention_mask=torch.ones_like(ids), position_ids=depths, use_cache=False).logits[0]
    for branch in (one, other):
        alone = model(ids[:, torch.cat([trunk, branch])]).logits[0]
        assert torch.allclose(row[branch], alone[8:], atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_are_saved_and_loaded(architecture: Any, tmp_path: Path) -> None:
    model, ids = tiny(architecture), torch.randint(0, 12, (2, 20))
    model.save_pretrained(tmp_path)
    kind = AutoModelForMaskedLM if architecture == "masked" else AutoModelForCausalLM
    again = kind.from_pretrained(tmp_path).eval()
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_later_tokens_matter_to_none_before(architecture: Any) -> None:
    model, ids = tiny(architecture), torch.randint(0, 12, (1, 20))
    changed = ids.clone()
    changed[0, 12:] = (ids[0, 12:] + 1) % 12
    one, other = (model(x).logits[0] for x in (ids, changed))
    assert torch.allclose(one[:12], other[:12], atol=1e-5)
    assert (one[12:] - other[12:]).abs().amax(-1).min() > 1e-4


def test_the_masked_model_reads_both_ways() -> None:
    model, ids = tiny("masked"), torch.randint(0, 12, (1, 20))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 12
    assert (model(ids).logits[0, 0] - model(changed).logits[0, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("architecture", CAUSAL)
def test_a_cache_and_padding_change_nothing(architecture: Any) -> None:
    model, ids = tiny(architecture), torch.randint(0, 12, (1, 20))
    whole = model(ids).logits[0]
    cache, parts = None, []
    for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:]):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits[0])
    assert torch.allclose(torch.cat(parts), whole, atol=1e-4)
    left = torch.cat([torch.full((1, 5), 2), ids], dim=1)
    mask = (torch.arange(25) >= 5).long()[None]
    padded = model(left, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[0, 5:]
    assert torch.allclose(padded, whole, atol=1e-4)


@pytest.mark.parametrize("architecture", OWN)
def test_a_cache_longer_than_what_it_holds_changes_nothing(architecture: Any) -> None:
    model, ids = tiny(architecture), torch.randint(0, 12, (1, 10))
    cache = StaticCache(config=model.config, max_cache_len=16)
    parts = [model(part, past_key_values=cache).logits[0] for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:])]
    assert torch.allclose(torch.cat(parts), model(ids).logits[0], atol=1e-4)


@pytest.mark.parametrize("architecture", OWN)
def test_what_comes_before_a_window_of_distances_shifts_nothing(architecture: Any) -> None:
    """Only distances count: the same tokens later in the row, behind others that no one sees, give the same."""
    model, ids = tiny(architecture), torch.randint(0, 12, (1, 20))
    apart = torch.cat([ids, ids], dim=1)
    seen = torch.block_diag(torch.ones(20, 20).tril(), torch.ones(20, 20).tril()).bool()[None, None]
    logits = model(apart, attention_mask=seen).logits[0]
    assert torch.allclose(logits[:20], logits[20:], atol=1e-4)


def test_a_rotary_model_turns_all_of_a_head() -> None:
    assert tiny("rotary").gpt_neox.layers[0].attention.rotary_ndims == 8


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="architecture='rope' is not possible: expected one of absolute, rotary"):
        new_model("rope", 12, 32, 2, 4, 64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hidden_size=30 is not possible with heads=4"):
        new_model("rotary", 12, 30, 2, 4, 64)
    with pytest.raises(ValueError, match="distances='far' is not possible"):
        Distances(DistanceConfig(distances="far"))
