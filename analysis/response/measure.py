"""Response: what a weak push on one token's residual stream does to every later token, in every layer.

At the input of layer l0 the stream is pushed at position j, x_j <- x_j + eps * |x_j| * u, with a unit vector u: along
x_j itself, or random. The response is R_l(i, j; eps) = |x'_{l,i} - x_{l,i}| / (eps * |x_{l0,j}|), where x_{l,i} is the
stream as it leaves layer l >= l0 at token i >= j.

The subject is that of "Universal Response and Emergence of Induction in LLMs" (arXiv 2411.07071); the recipe is ours,
since directions, strengths, norm, injection layer and signature of that work are not known to us.

The pushed copy differs from the prompt from position j on alone, so it is a branch: its tokens from j on, which see the
keys and values before j (`nextstate.analysis.response.branches`). `responses` takes differences at finite strengths,
`exact` the limit of none, the Jacobian-vector product, by forward-mode differentiation of the same branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from nextstate.agents.language import LanguageModel
from nextstate.analysis.response.branches import (
    LIMIT,
    ResponseError,
    difference_dtype,
    dtype_of,
    fitting,
    rows_of,
    run_prompt,
    run_rows,
    whole_rows,
)
from nextstate.analysis.response.config import ALONG, STRENGTHS


@dataclass(frozen=True)
class Response:
    """Responses of prompts of one length.

    `value` is R, with NaN where the target comes before the position; `cosine` is that between the responses of all
    later tokens, as one vector, to consecutive strengths (NaN without a later token or a response).
    """

    injected: int  # the layer whose input is pushed
    layers: tuple[int, ...]  # layers after which the residual stream is read
    positions: Int[np.ndarray, " position"]
    directions: tuple[str, ...]
    strengths: tuple[float, ...]  # (0.0,) for the exact product
    value: Float[np.ndarray, "prompt strength direction layer position target"]
    cosine: Float[np.ndarray, "prompt neighbour direction layer position"]
    norms: Float[np.ndarray, "prompt layer target"]  # of the stream without a push
    pushed: Float[np.ndarray, "prompt position"]  # norms of the vectors that are pushed
    control: float  # largest difference of branches without a push from the prompt, relative to its norm

    @property
    def relative(self) -> Float[np.ndarray, "prompt strength direction layer position target"]:
        """The response as a share of the stream it is added to: |x' - x| / (eps * |x_{l,i}|)."""
        scale = self.pushed[:, None, :, None] / self.norms[:, :, None, :]
        return np.asarray(self.value * scale[:, None, None])

    @property
    def total(self) -> Float[np.ndarray, "prompt strength direction layer position"]:
        """The norm of the response of all later tokens as one vector; NaN without later tokens."""
        later = np.arange(self.value.shape[-1]) > self.positions[:, None]
        whole = np.sqrt(np.where(later, np.square(self.value), 0).sum(-1))
        return np.asarray(np.where(later.any(-1), whole, np.nan))


def unit_directions(
    rng: np.random.Generator, prompts: int, directions: int, hidden: int
) -> Float[np.ndarray, "prompt direction hidden"]:
    """Draw random unit vectors, independently for each prompt, so that intervals over prompts cover them."""
    drawn = rng.normal(size=(prompts, directions, hidden))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=-1, keepdims=True))


def responses(
    model: LanguageModel,
    tokens: Int[np.ndarray, "prompt token"],
    *,
    positions: Sequence[int] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    directions: Float[np.ndarray, "prompt direction hidden"] | None = None,
    along: bool = True,
    layer: int = 0,
    max_bytes: int = 2 << 30,
) -> Response:
    """Measure responses at finite strengths.

    Hooks on the model (such as an ablated head) apply to the prompt and to its branches.

    Args:
        model: a language model that has the site `resid_pre`.
        tokens: prompts of one length.
        positions: positions to push, by default all.
        strengths: sizes of pushes relative to the norm of the pushed vector, in increasing order.
        directions: unit vectors to push in, named "random 1" and so on.
        along: also push along the vector itself, as the first direction.
        layer: layer whose input is pushed; 0 is the embedding.
        max_bytes: bound on the memory of one pass in addition to the model; a pass has at least one row.

    Raises:
        ResponseError: a position outside the prompt, a strength at or below float noise, a prompt longer than the
            context, a vector of norm 0, memory runs out for one row, or a control fails.
        SiteError: the model has no such layer, or its architecture is not known.
    """
    floor = float(torch.finfo(model.model.dtype).eps)
    low = [s for s in strengths if not s > floor]
    if low or not strengths or list(strengths) != sorted(set(strengths)):
        raise ResponseError(
            f"strengths={[float(f'{s:.3g}') for s in strengths]} are not possible: expected increasing values above "
            f"{floor:.2g}, the rounding error of {dtype_of(model)}"
            + ("" if dtype_of(model) == "float32" else "; load the model with dtype=float32 for weaker ones")
        )
    return _measure(model, tokens, positions, tuple(map(float, strengths)), directions, along, layer, max_bytes)


def exact(
    model: LanguageModel,
    tokens: Int[np.ndarray, "prompt token"],
    *,
    positions: Sequence[int] | None = None,
    directions: Float[np.ndarray, "prompt direction hidden"] | None = None,
    along: bool = True,
    layer: int = 0,
    max_bytes: int = 2 << 30,
) -> Response:
    """Return the response in the limit of strength 0: the norm of the Jacobian-vector product.

    Arguments, result and errors are those of `responses`, with the single strength 0. Attention by sdpa uses its math
    kernel, which supports forward-mode differentiation. A model without forward-mode derivatives (grouped experts,
    custom functions without a `jvp`) raises a `ResponseError`.
    """
    return _measure(model, tokens, positions, LIMIT, directions, along, layer, max_bytes)


def _measure(
    model: LanguageModel,
    tokens: Int[np.ndarray, "prompt token"],
    positions: Sequence[int] | None,
    strengths: tuple[float, ...],
    directions: Float[np.ndarray, "prompt direction hidden"] | None,
    along: bool,
    layer: int,
    max_bytes: int,
) -> Response:
    sites, (n, length) = model.sites, tokens.shape
    sites.check("resid_pre", layer)
    chosen = np.arange(length) if positions is None else np.array(positions, dtype=np.int64)
    ways = along + (0 if directions is None else directions.shape[1])
    _check(model, tokens, chosen, directions, ways)
    names = (*([ALONG] if along else []), *(f"random {i + 1}" for i in range(ways - along)))
    after, s = tuple(range(layer, sites.layers)), len(strengths)
    kind = np.float64 if model.model.dtype == torch.float64 else np.float32
    value = np.full((n, s, ways, len(after), len(chosen), length), np.nan, dtype=kind)
    dots = np.zeros((n, s - 1, *value.shape[2:]), dtype=kind)
    norms, pushed, worst = np.zeros((n, len(after), length)), np.zeros((n, len(chosen))), 0.0
    possible = len(sites.layers_with("resid_pre")) == sites.layers and not model.forward.masks.one_layout
    in_tree = possible and model.forward.require(length, 2 * length) == "tree"
    spans = [length - p for p in chosen.tolist()]
    rows = (rows_of if in_tree else whole_rows)(spans, ways, length)
    most = fitting(model, length, rows, s, max_bytes)
    for i in range(n):
        base = run_prompt(model, tokens[i], layer, in_tree)
        norms[i] = torch.stack(base.stream[1:]).norm(dim=-1, dtype=difference_dtype(model)).cpu().numpy()
        vectors = base.stream[0][torch.from_numpy(chosen).to(model.device)].to(difference_dtype(model))
        pushed[i] = vectors.norm(dim=-1).cpu().numpy()
        if not (pushed[i] > 0).all():
            raise ResponseError(
                f"position {int(chosen[int(pushed[i].argmin())])} has norm {pushed[i].min()} at layer {layer}: "
                "expected a vector to push; leave the position out"
            )
        push = torch.zeros(ways, len(chosen), sites.hidden, dtype=difference_dtype(model), device=model.device)
        if along:
            push[0] = vectors
        if directions is not None:
            own = torch.from_numpy(directions[i]).to(push)
            push[along:] = own[:, None] * vectors.norm(dim=-1, keepdim=True)
        worst = max(worst, run_rows(model, base, rows, most, strengths, push, layer, value[i], dots[i]))
    later = np.arange(length) > chosen[:, None]
    square = np.where(later, np.square(value), 0).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.where(later, dots, 0).sum(-1) / np.sqrt(square[:, :-1] * square[:, 1:])
    sizes = np.array([eps or 1.0 for eps in strengths])[None, :, None] * pushed[:, None]
    value /= sizes[:, :, None, None, :, None].astype(kind)
    return Response(layer, after, chosen, names, strengths, value, cosine, norms, pushed, worst)


def _check(
    model: LanguageModel,
    tokens: Int[np.ndarray, "prompt token"],
    positions: Int[np.ndarray, " position"],
    directions: Float[np.ndarray, "prompt direction hidden"] | None,
    ways: int,
) -> None:
    n, length = tokens.shape
    if model.context is not None and length > model.context:
        raise ResponseError(f"a prompt has {length:,} tokens, but {model.name} reads {model.context:,}; ask for fewer")
    outside = [p for p in positions.tolist() if not 0 <= p < length]
    if outside or not len(positions) or len(set(positions.tolist())) < len(positions):
        raise ResponseError(
            f"positions={outside or positions.tolist()} are not possible: expected some of 0 to {length - 1}, each once"
        )
    shape = None if directions is None else directions.shape
    if not ways or (shape is not None and (shape[0] != n or shape[2] != model.sites.hidden)):
        raise ResponseError(
            f"directions of shape {shape} are not possible: expected {n} prompts, any number of directions, "
            f"{model.sites.hidden} numbers, or none and along=True"
        )
