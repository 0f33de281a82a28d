"""Attention masks in path coordinates, so that many branches of a text can share one forward pass.

In a tree of tokens the column of a token is not its position. While `PathMasks` are active, everything that a model
derives from columns is derived from the position of each token on its own path instead: the mask functions of
transformers (causal, sliding window, chunks and whatever else a model combines), the causal buffers that some older
models carry (GPT-Neo, GPT), and ALiBi (Bloom, Falcon, MPT). Each mask is then restricted to what a token may see: a
dense mask, or a block mask where the attention is block-sparse (`nextstate.agents.flex`).

Nothing here decides whether a model is handled correctly: `nextstate.agents.certificate` measures it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
from transformers.masking_utils import causal_mask_function, eager_mask, flex_attention_mask, sdpa_mask

from nextstate.agents import flex

LOCK = threading.RLock()  # the mask functions of transformers are shared by all models of a process


def square_mask(*args: Any, q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
    """Return the boolean mask of transformers; None for a causal one without a cache or padding.

    `sdpa_mask` also returns None for a cache that is longer than what it holds, whose empty columns must be hidden.
    """
    skip = allow_is_causal_skip and q_length == kv_length
    return sdpa_mask(*args, q_length=q_length, kv_length=kv_length, allow_is_causal_skip=skip, **kwargs)


@dataclass(frozen=True)
class Places:
    """The visibility and positions of tokens in a forward pass; columns are cached tokens, then those of the pass.

    Visibility is a dense mask, or two integers for each column (`Places.of_intervals`), from which the dense mask is
    made where it is needed. If all rows are equal, the tensors may have a single row.
    """

    visible: Bool[Tensor, "#row token column"] | None  # what each token may attend to, itself included
    depths: Int[Tensor, "#row column"]  # the position of each column's token on its own path
    enter: Int[Tensor, "#row column"] | None = None
    leave: Int[Tensor, "#row column"] | None = None
    width: int = 0  # columns before those of the pass, where there is no dense mask

    @classmethod
    def of_intervals(
        cls,
        enter: Int[Tensor, "#row column"],
        leave: Int[Tensor, "#row column"],
        depths: Int[Tensor, "#row column"],
        width: int = 0,
    ) -> Places:
        """Return places in which token `q` sees column `k` if `enter[k] <= enter[q] < leave[k]`.

        Args:
            enter: the number of each column's token in depth-first order, see `nextstate.agents.branches.intervals`.
            leave: the first number behind those of its descendants; 0 for columns that nothing sees.
            depths: the position of each column's token on its own path.
            width: the number of cached columns, which come first.
        """
        return cls(None, depths, enter, leave, width)

    @property
    def own(self) -> Int[Tensor, "#row token"]:
        """The positions of the tokens of the pass."""
        return self.depths[:, self.width if self.visible is None else -self.visible.shape[1] :]

    @cached_property
    def seen(self) -> Bool[Tensor, "#row token column"]:
        """What each token may attend to, itself included."""
        if self.visible is not None:
            return self.visible
        assert self.enter is not None
        assert self.leave is not None
        own = self.enter[:, self.width :, None]
        return (self.enter[:, None] <= own) & (own < self.leave[:, None])


class PathMasks:
    """Makes the masks, causal buffers and ALiBi of a model in path coordinates, for one forward pass at a time.

    Pass the model a 2-D attention mask of ones over all columns; a 4-D one would replace the model's own masks.

    Args:
        model: a causal model of transformers.
    """

    def __init__(self, model: Any) -> None:
        modules = list(model.modules())
        self._models = [m for m in modules if isinstance(m, PreTrainedModel)]
        self._buffers = [m for m in modules if _is_triangle(m._buffers.get("bias"))]
        self._alibi = [m for m in modules if _makes_alibi(m)]
        # MPT's ALiBi has no row axis, so all rows of a pass must have the same positions.
        self.one_layout = any(hasattr(m, "build_mpt_alibi_tensor") for m in modules)

    @property
    def attention(self) -> tuple[str, ...]:
        """The attention functions that the model uses, by the names that transformers knows them by."""
        return tuple(sorted({m.config._attn_implementation for m in self._models}))

    @property
    def sparse(self) -> bool:
        """Whether the attention functions of the model skip blocks of a mask in which nothing is seen."""
        return bool(self.attention) and set(self.attention) <= flex.NAMES

    @contextmanager
    def __call__(self, places: Places) -> Iterator[None]:
        """Use path coordinates until the context is closed; `places` are on the model's device."""
        with LOCK, ExitStack() as stack:
            for name in self.attention:
                kind = MASKS.get(name)
                if name in flex.NAMES and places.enter is not None and places.leave is not None and places.width == 0:
                    MASKS[name] = partial(flex.block_mask, places.enter, places.leave, places.depths)
                elif kind in (sdpa_mask, square_mask, eager_mask, flex_attention_mask):
                    MASKS[name] = _masks(places, additive=kind not in (sdpa_mask, square_mask))
                else:
                    continue
                stack.callback(MASKS.__delitem__, name)
            for module in self._buffers:
                _replace_buffer(module, places, stack)
            for module in self._alibi:
                _replace_alibi(module, places, stack)
            yield


def _is_triangle(bias: Tensor | None) -> bool:
    """Return whether a buffer is a causal mask of columns, [1, 1, column, column]."""
    return bias is not None and bias.ndim == 4 and bias.shape[:2] == (1, 1) and bias.shape[2] == bias.shape[3]


def _makes_alibi(module: nn.Module) -> bool:
    own = hasattr(module, "build_alibi_tensor") or hasattr(module, "build_mpt_alibi_tensor")
    return own or getattr(module, "use_alibi", False) is True


def _masks(places: Places, additive: bool) -> Callable[..., Tensor]:
    """Return a mask function as transformers calls it, evaluated at positions instead of columns."""
    queries, keys = places.own[:, None, :, None], places.depths[:, None, None, :]

    def mask(
        batch_size: int, *_: Any, mask_function: Callable[..., Any], dtype: torch.dtype = torch.float32, **__: Any
    ) -> Tensor:
        rows = torch.arange(len(keys), device=keys.device)[:, None, None, None]
        seen = places.seen[:, None]
        if mask_function is not causal_mask_function:  # what is seen is never later
            seen = seen & mask_function(rows, torch.zeros_like(rows[:1]), queries, keys)
        if additive:
            zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            seen = zeros.masked_fill_(~seen, torch.finfo(dtype).min)
        return seen.expand(batch_size, -1, -1, -1)

    return mask


def _replace_buffer(module: nn.Module, places: Places, stack: ExitStack) -> None:
    """Replace a triangular buffer of columns, `bias[1, 1, column, column]`, banded where the layer has a window."""
    bias = module._buffers["bias"]
    assert bias is not None
    window = int(bias[0, 0, -1].sum())
    distances = places.own[:, :, None] - places.depths[:, None, :]
    seen = places.seen if window == bias.shape[-1] else places.seen & (distances < window)
    rows, tokens, columns = seen.shape
    whole = torch.zeros(rows, 1, columns, columns, dtype=bias.dtype, device=bias.device)
    whole[:, 0, columns - tokens :] = seen.to(bias.dtype)
    module._buffers["bias"] = whole
    stack.callback(module._buffers.__setitem__, "bias", bias)


def _replace_alibi(module: nn.Module, places: Places, stack: ExitStack) -> None:
    """Compute a model's ALiBi from positions; a constant over all keys of a query does not change the softmax."""
    last = int(places.depths.max())
    if hasattr(module, "build_mpt_alibi_tensor"):
        builds: Any = module.build_mpt_alibi_tensor

        def one_layout(*args: Any, **kwargs: Any) -> Tensor:
            found = builds(*args, **kwargs)  # [head 1 position], for as many positions as the model reads
            if (places.depths != places.depths[:1]).any():
                raise ValueError("this model's ALiBi needs equal positions in all rows of a batch")
            return torch.as_tensor(found[..., found.shape[-1] - 1 - last + places.depths[0]])

        vars(module)["build_mpt_alibi_tensor"] = one_layout
        stack.callback(module.__dict__.pop, "build_mpt_alibi_tensor")
        return

    def looked_up(builds: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def build(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
            ones = torch.ones(1, last + 1, dtype=torch.long, device=places.depths.device)
            slopes = builds(ones, num_heads, dtype)[:, 0]  # [head position]
            found = slopes[:, places.depths].transpose(0, 1).expand(len(attention_mask), -1, -1)  # [row head column]
            return found.reshape(-1, 1, places.depths.shape[1])

        return build

    if hasattr(module, "build_alibi_tensor"):
        own: Any = module.build_alibi_tensor
        vars(module)["build_alibi_tensor"] = looked_up(own)
        stack.callback(module.__dict__.pop, "build_alibi_tensor")
    elif getattr(module, "use_alibi", False) is True:
        home = vars(sys.modules[type(module).__module__])
        if "build_alibi_tensor" in home:
            stack.callback(home.__setitem__, "build_alibi_tensor", home["build_alibi_tensor"])
            home["build_alibi_tensor"] = looked_up(home["build_alibi_tensor"])
