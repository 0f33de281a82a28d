"""Block-sparse attention over trees of tokens by FlexAttention (Dong et al. 2024, arXiv:2412.05496).

In a tree most pairs of tokens do not see each other. `nextstate_flex` is an attention function of transformers that
skips blocks of 128 x 128 pairs in which nothing is seen, so that trees of any number share one row without padding; a
pass without such a mask (plain passes, caches) is SDPA's. On a GPU it is the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from nextstate.agents.failures import one_line

ATTENTION = "nextstate_flex"
NAMES = {ATTENTION, "flex_attention"}  # attention functions that take a `BlockMask`
BLOCK = 128  # tokens


def length_of(tokens: int) -> int:
    """Return the length to which a row is padded: few lengths, so that kernels are compiled for few, at most 1/16 more.

    It is a multiple of `BLOCK`, and of a 32nd of the power of two above it.
    """
    step = max(BLOCK, 1 << max(0, tokens.bit_length() - 5))
    return -(-tokens // step) * step


def block_mask(
    enter: Int[Tensor, "row token"],
    leave: Int[Tensor, "row token"],
    depths: Int[Tensor, "row token"],
    *_: Any,
    mask_function: Any = causal_mask_function,
    batch_size: int | None = None,
    **__: Any,
) -> BlockMask:
    """Return the mask in which token `q` sees `k` if `enter[k] <= enter[q] < leave[k]` and the model's mask allows it.

    Which blocks are empty or full is decided from the least and largest numbers in a block, without looking at pairs.

    Args:
        enter: the number of each token in depth-first order.
        leave: the first number behind those of its descendants.
        depths: the position of each token on its own path.
        mask_function: the model's mask, by row, head and two positions, as transformers passes it.
        batch_size: rows of the pass, where all have the same mask.
    """
    enter, leave, depths = (x.expand(batch_size or len(x), -1) for x in (enter, leave, depths))
    length = enter.shape[1]
    plain = mask_function is causal_mask_function  # what is seen is never later

    def mask_mod(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (enter[row, k] <= enter[row, q]) & (enter[row, q] < leave[row, k])
        return seen if plain else seen & mask_function(row, head, depths[row, q], depths[row, k])

    some, every = _blocks(enter, leave)
    if not plain:  # windows and chunks of the model's own: no block is known to be full
        every = torch.zeros_like(every)
    partial, full = (_table(blocks) for blocks in (some & ~every, every))
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(length, length), compute_q_blocks=False
    )


def _blocks(
    enter: Int[Tensor, "row token"], leave: Int[Tensor, "row token"]
) -> tuple[Bool[Tensor, "row block block"], Bool[Tensor, "row block block"]]:
    """Return which blocks of pairs may have a pair that is seen, and in which all are seen."""
    short = -enter.shape[1] % BLOCK
    # The last block is filled up with its last token, which adds no number to it.
    first, behind = (torch.cat([x, x[:, -1:].expand(-1, short)], 1).view(len(x), -1, BLOCK) for x in (enter, leave))
    low, high = (x[:, :, None] for x in first.aminmax(dim=2))
    begins, ends = (x[:, None] for x in first.aminmax(dim=2))
    least, most = (x[:, None] for x in behind.aminmax(dim=2))
    return (begins <= high) & (low < most), (ends <= low) & (high < least)


def _table(
    blocks: Bool[Tensor, "row block block"],
) -> tuple[Int[Tensor, "row 1 block"], Int[Tensor, "row 1 block block"]]:
    """Return how many blocks of keys there are for each block of queries, and which ones, these first."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def seen(mask: BlockMask, row: int, tokens: Sequence[int]) -> Bool[Tensor, "token column"]:
    """Return what some tokens of a row see."""
    device = mask.kv_indices.device
    q, k = torch.tensor(tokens, device=device), torch.arange(mask.shape[-1], device=device)
    return mask.mask_mod(torch.tensor(row, device=device), torch.tensor(0, device=device), q[:, None], k)


class FlexError(RuntimeError):
    """FlexAttention failed: it could not be compiled, or its kernel does not run on this device."""


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any) -> Any:
    """Attend as transformers asks an attention function: by FlexAttention with a block mask, else by SDPA.

    Raises:
        FlexError: FlexAttention failed.
    """
    by = attend_in_blocks if isinstance(attention_mask, BlockMask) else sdpa_attention_forward
    return by(module, query, key, value, attention_mask, **given)


def attend_in_blocks(*args: Any, **given: Any) -> Any:
    """Attend by FlexAttention, as transformers does.

    Raises:
        FlexError: FlexAttention failed, other than for lack of memory.
    """
    try:
        return flex_attention_forward(*args, **given)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of a compiler, which has many of its own
        raise FlexError(one_line(error)) from error


def use(model: Any) -> bool:
    """Let a model use `nextstate_flex`; return False if it does not use SDPA by the interface of transformers.

    Its plain passes stay as they are, so that nothing but the passes with a block mask has to be proved.
    """
    if _attention(model) != {"sdpa"} or not model._can_set_attn_implementation():
        return False
    # A kernel is compiled for each width of heads and kind of mask. Beyond the limit none is, and all scores of a row
    # are held in memory.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    model.set_attn_implementation(ATTENTION)
    return True


def give_up(model: Any) -> bool:
    """Let a model use the attention that transformers chooses for it; return False if it does not use FlexAttention."""
    if not _attention(model) & NAMES:
        return False
    model.set_attn_implementation(model.get_correct_attn_implementation(None))
    return True


def _attention(model: Any) -> set[str]:
    return {m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)}


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
ALL_ATTENTION_FUNCTIONS.register("flex_attention", attend_in_blocks)
MASKS.register(ATTENTION, sdpa_mask)
