"""Models of the same shape that differ in how attention encodes positions, for training from scratch.

The architectures of "Physics of Language Models: Part 1" (arXiv 2305.13673). All are models of transformers: they save
to a folder, load by `from_pretrained` once this module is imported, generate with a cache, and are patched and branched
like any other. "absolute" is GPT-2 itself, "rotary" GPT-NeoX, "masked" DeBERTa-v2, which reads both ways. The other
three are GPT-2 without position embeddings, whose attention function is registered with transformers:

- "relative": scores are q k + q r(d) + k s(d), with vectors r and s learned for each distance d, over sqrt(3 width), as
  in DeBERTa (He et al. 2021, arXiv 2006.03654, equation 4);
- "position": scores are a number learned for each head and distance, whatever the tokens;
- "uniform": nothing is learned, head h averages the last 2^h tokens, its own included (h from 0).

The distance of two tokens is the number of tokens from one to the other that the later one sees: so it is right in
branches, with a cache and with padding, and position ids are not used.

In training on whole rows (causal, no padding, no cache), "relative" runs in blocks of queries that see only earlier
keys.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from nextstate.agents.masks import square_mask
from nextstate.agents.training_config import Architecture

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
ATTENTION = "nextstate_distances"  # the attention function below, as `agents.sites.ATTENTIONS` has it
BLOCK = (
    128  # queries in a block of `causal_relative`: larger wastes scores of later keys, smaller means many operations
)


class DistanceConfig(GPT2Config):  # type: ignore[misc]
    """GPT-2 without position embeddings; `distances` is "relative", "position" or "uniform"."""

    model_type = "nextstate_distances"
    distances: str = "relative"


class Nowhere(nn.Module):
    """Replaces position embeddings by zero."""

    def forward(self, positions: Int[Tensor, "row token"]) -> Float[Tensor, ""]:
        """Return zero."""
        return torch.zeros((), device=positions.device)


class Distances(nn.Module):
    """The learned parameters of the heads of one layer for each distance."""

    def __init__(self, config: DistanceConfig) -> None:
        super().__init__()
        heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.kind = config.distances
        if self.kind == "relative":
            self.key = nn.Parameter(torch.zeros(heads, config.n_positions, width))
            self.query = nn.Parameter(torch.zeros(heads, config.n_positions, width))
        elif self.kind == "position":
            self.score = nn.Parameter(torch.zeros(heads, config.n_positions))
        elif self.kind != "uniform":
            raise ValueError(f"distances={self.kind!r} is not possible: expected relative, position or uniform")

    def scores(
        self,
        query: Float[Tensor, "row head query width"],
        key: Float[Tensor, "row head key width"],
        distance: Int[Tensor, "row 1 query key"],
    ) -> Float[Tensor, "row head query key"]:
        """Return the attention scores of all pairs, without the mask."""
        rows, heads, q, width = query.shape
        k = key.shape[2]
        if self.kind == "uniform":
            window = 2 ** torch.arange(heads, device=query.device)[None, :, None, None]
            return torch.zeros(rows, heads, q, k, device=query.device, dtype=query.dtype).masked_fill(
                distance >= window, torch.finfo(query.dtype).min
            )
        if self.kind == "position":
            at = distance.expand(rows, heads, q, k).clamp(max=self.score.shape[1] - 1)
            return self.score[:, None].expand(rows, heads, q, -1).gather(3, at)
        far = min(int(distance.max()) + 1, self.key.shape[1])
        at = distance.clamp(max=far - 1).expand(rows, heads, q, k)
        found = query @ key.transpose(2, 3)
        found += (query @ self.key[:, :far].transpose(1, 2)).gather(3, at)
        found += (key @ self.query[:, :far].transpose(1, 2)).gather(3, at.transpose(2, 3)).transpose(2, 3)
        return found.mul_((3 * width) ** -0.5)


class DistanceForCausalLM(GPT2LMHeadModel):  # type: ignore[misc]
    """A language model whose attention uses only distances between tokens."""

    config_class = DistanceConfig

    def __init__(self, config: DistanceConfig) -> None:
        super().__init__(config)
        self.transformer.wpe = Nowhere()
        for block in self.transformer.h:
            block.attn.distances = Distances(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Distances):
            for table in module.parameters():
                nn.init.normal_(table, std=self.config.initializer_range)

    def _check_and_adjust_attn_implementation(self, *_: Any, **__: Any) -> str:
        return ATTENTION


def causal_relative(
    query: Float[Tensor, "row head token width"],
    key: Float[Tensor, "row head token width"],
    value: Float[Tensor, "row head token width"],
    by_query: Float[Tensor, "head distance width"],
    by_key: Float[Tensor, "head distance width"],
    dropout: float = 0.0,
    block: int = BLOCK,
) -> Float[Tensor, "row token head width"]:
    """Causal relative attention, with half the operations and half the memory of scores between all pairs.

    Blocks of queries are multiplied by the keys up to their own end only, and by the vectors of distances that occur
    there. Blocks of keys are likewise multiplied by the distances at which later queries see them.

    Args:
        query: queries of whole rows, from the first token on.
        key: their keys.
        value: their values.
        by_query: the vector that queries are multiplied by at each distance, r in the module's formula; as many
            distances as tokens or more.
        by_key: the vector that keys are multiplied by, s in the formula.
        dropout: share of the attention weights set to 0.
        block: number of tokens in a block.
    """
    n, width = query.shape[2:]
    scale = (3 * width) ** -0.5
    query, scaled = query * scale, key * scale
    # Zeros stand for negative distances: of keys after the query, which are hidden.
    descending = nn.functional.pad(by_query[:, :n].flip(1), (0, 0, 0, block - 1)).transpose(1, 2)  # from n - 1
    ascending = nn.functional.pad(by_key[:, :n], (0, 0, block - 1, 0)).transpose(1, 2)  # from 1 - block
    ends = [(start, min(start + block, n)) for start in range(0, n, block)]
    from_keys = []  # for each block of keys: scores [row head query key] of the queries from its first token on
    for start, end in ends:
        found = scaled[:, :, start:end] @ ascending[:, :, block - (end - start) : block - 1 + n - start]
        from_keys.append(_skewed(found).transpose(2, 3))
    out = []
    for start, end in ends:
        own, size = query[:, :, start:end], end - start
        scores = own @ key[:, :, :end].transpose(2, 3)
        scores += _skewed(own @ descending[:, :, n - end : n + size - 1])
        earlier = zip(ends, from_keys, strict=True)
        scores += torch.cat([found[:, :, start - k : end - k] for (k, _), found in earlier if k < end], dim=3)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        later = torch.ones(size, end, dtype=torch.bool, device=scores.device).triu(start + 1)
        scores = scores.masked_fill_(later, torch.finfo(scores.dtype).min)
        out.append(nn.functional.dropout(scores.softmax(-1).to(value.dtype), p=dropout) @ value[:, :, :end])
    return torch.cat(out, dim=2).transpose(1, 2).contiguous()


def _skewed(x: Float[Tensor, "row head token column"]) -> Float[Tensor, "row head token shorter"]:
    """Shift each row of a matrix one column further to the right than the row below it, without a copy.

    Of t rows and c columns, the result has c - t + 1 columns; its element (i, j) is element (i, j + t - 1 - i) of `x`.
    A matrix of products with one vector for each distance becomes a matrix of query and key (Huang et al. 2018, arXiv
    1809.04281). Indexing would keep the products and the indices for the backward pass.
    """
    t, c = x.shape[2:]
    if t == 1:
        return x
    return x.flatten(2)[..., t - 1 : t - 1 + t * (c - 1)].view(*x.shape[:2], t, c - 1)[..., : c - t + 1]


def attend(
    module: Any,
    query: Float[Tensor, "row head query width"],
    key: Float[Tensor, "row head key width"],
    value: Float[Tensor, "row head key width"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "row query head width"], Float[Tensor, "row head query key"] | None]:
    """Attention by distances, with the signature of transformers' attention functions.

    It returns the weights, except from `causal_relative`, which is used in training and never holds them at once.
    """
    own: Distances = module.distances
    tokens = query.shape[2]
    plain = attention_mask is None and tokens == key.shape[2]
    if plain and module.training and own.kind == "relative" and tokens <= own.key.shape[1]:
        return causal_relative(query, key, value, own.key, own.query, dropout), None
    seen = _seen(tokens, key.shape[2], attention_mask, query.device)
    distance = seen.flip(-1).cumsum(-1).flip(-1).sub_(1).clamp_(min=0)
    scores = own.scores(query, key, distance)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # as transformers' own do
    scores = scores.masked_fill_(~seen, torch.finfo(scores.dtype).min)
    weights = nn.functional.dropout(scores.softmax(-1).to(value.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _seen(queries: int, keys: int, mask: Tensor | None, device: torch.device) -> Bool[Tensor, "row 1 query key"]:
    if mask is None:  # merely causal
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, square_mask)
AutoConfig.register(DistanceConfig.model_type, DistanceConfig, exist_ok=True)
AutoModelForCausalLM.register(DistanceConfig, DistanceForCausalLM, exist_ok=True)


def new_model(
    architecture: Architecture,
    vocabulary: int,
    hidden_size: int,
    layers: int,
    heads: int,
    context: int,
    begin: int = 0,
    end: int = 1,
    pad: int = 2,
) -> Any:
    """Return an untrained model with GPT-2 blocks, MLPs of width 4 * hidden_size, no dropout and tied embeddings.

    Args:
        architecture: one of `ARCHITECTURES`.
        vocabulary: number of tokens.
        hidden_size: width of the residual stream.
        layers: number of blocks.
        heads: number of heads in each block, each of width hidden_size / heads.
        context: maximum number of tokens.
        begin: token that starts a string.
        end: token that ends a string.
        pad: padding token.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is not possible: expected one of {', '.join(ARCHITECTURES)}")
    if hidden_size % heads:
        raise ValueError(f"hidden_size={hidden_size} is not possible with heads={heads}: expected a multiple")
    named = {"vocab_size": vocabulary, "bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}
    shape = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": heads}
    long = {"intermediate_size": 4 * hidden_size, "max_position_embeddings": context, "tie_word_embeddings": True}
    if architecture == "rotary":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
        serial = {"use_parallel_residual": False, "rope_parameters": rope}
        return GPTNeoXForCausalLM(GPTNeoXConfig(**named, **shape, **long, **serial))
    if architecture == "masked":
        relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
        plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return DebertaV2ForMaskedLM(DebertaV2Config(**named, **shape, **long, **relative, **plain))
    still = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "n_positions": context}
    if architecture == "absolute":
        return GPT2LMHeadModel(GPT2Config(**named, **shape, **still))
    return DistanceForCausalLM(DistanceConfig(**named, **shape, **still, distances=architecture))
