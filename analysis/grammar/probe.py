"""Linear probes for the place of a token in the derivation: which constituents it is in, and which end with it.

"Physics of Language Models: Part 1" (arXiv 2305.13673), Results 4 and 5. The model is frozen; a probe sees its states
of one layer, on fresh strings of the grammar, and mixes them over tokens by their positions alone. So what a probe
finds is linear in the states. The control with shuffled labels is after Hewitt and Liang 2019 (arXiv 1909.03368).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nextstate.agents.generation import Strings, TokenMap
from nextstate.analysis import stats
from nextstate.analysis.grammar.config import ProbeConfig
from nextstate.envs.game import GameError, require, require_whole
from nextstate.envs.grammar.derivation import Derivation, sample
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.sizes import bounds

BETAS = (0.9, 0.98)
_OUT = -100  # what functional.cross_entropy leaves out


@dataclass(frozen=True)
class Wanted:
    """A probe to train.

    Args:
        layer: whose states it sees; 0 is the embedding, -1 what the model's head reads.
        reach: to how many tokens on either side it may look: 0 is the diagonal probe, 1 the tridiagonal one, None the
            full one.
        shuffled: train on labels of other strings, so that only positions and base rates can be learned. This holds
            exactly where the probe can read a token's position off its states; elsewhere labels are evidence about the
            position, and accuracy may be higher. Where all classes are equally likely, answers follow noise.
    """

    layer: int = -1
    reach: int | None = None
    shuffled: bool = False

    def __post_init__(self) -> None:
        if self.reach is not None:
            require_whole("reach", self.reach, 0, 1_000_000)


class Target(NamedTuple):
    """What a probe predicts for each token: its ancestor at a level (which symbol), or whether that one ends here."""

    target: str  # "ancestor" or "boundary"
    level: int  # from the root, which is 1
    classes: int


def targets(grammar: Grammar) -> tuple[Target, ...]:
    """Return what can be predicted: ancestors, then boundaries, of all levels between the root and the terminals."""
    require(
        len(grammar.levels) > 2, "levels", len(grammar.levels), "a grammar with 3 or more, so that some are between"
    )
    inner = list(enumerate(grammar.levels, start=1))[1:-1]
    ancestors = [Target("ancestor", level, len(symbols)) for level, symbols in inner]
    return (*ancestors, *[Target("boundary", level, 2) for level, _ in inner])


class PositionProbe(nn.Module):
    """The multi-head linear probe G_i(x) = sum over heads r and tokens k of w_{r,i->k} f_r(E_k(x)).

    E_k are states, f_r linear maps to the classes of all targets, and w_{r,i->k} = softmax over k of <P_{r,i}, P_{r,k}>
    for a vector P_{r,i} of each position that is trained. k goes over the tokens of the string, later ones too, but
    not further from i than `reach`. With `reach` 0 every w is 1, so that probe is one linear map and has no P.

    Args:
        hidden: width of a state.
        targets: what to predict.
        positions: the longest string.
        heads: how many maps.
        dim: width of P.
        reach: see `Wanted`.
        generator: draws the weights at the start: P so short that each w begins about even over the tokens.
    """

    def __init__(
        self,
        hidden: int,
        targets: Sequence[Target],
        positions: int,
        heads: int,
        dim: int,
        reach: int | None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.targets, self.positions, self.reach = tuple(targets), positions, reach
        self.heads = 1 if reach == 0 else heads
        self.classes = [t.classes for t in targets]
        self.maps = nn.utils.skip_init(nn.Linear, hidden, self.heads * sum(self.classes))  # type: ignore[no-untyped-call]
        self.places: nn.Parameter | None = None
        with torch.no_grad():
            for weight in self.maps.parameters():
                weight.uniform_(-(hidden**-0.5), hidden**-0.5, generator=generator)
            if reach != 0:
                drawn = torch.randn(heads, positions, dim, generator=generator)
                self.places = nn.Parameter(drawn * dim**-0.5)

    def forward(
        self, states: Float[Tensor, "string token hidden"], present: Bool[Tensor, "string token"]
    ) -> Float[Tensor, "string token class"]:
        """Return the logits of all targets after each other; those of tokens that are not present mean nothing.

        Raises:
            GameError: the strings are longer than `positions`.
        """
        rows, n = states.shape[:2]
        if n > self.positions:
            raise GameError(f"strings of {n} tokens are too long for a probe of {self.positions} positions")
        mapped: Tensor = self.maps(states)
        if self.places is None:
            return mapped
        places = self.places[:, :n]
        scores = torch.einsum("rid,rkd->irk", places, places)
        seen = present[:, None]
        if self.reach is not None:
            at = torch.arange(n, device=states.device)
            apart = (at[:, None] - at).abs()
            seen = (seen & (apart <= self.reach)) | (apart == 0)  # a token that sees none would become NaN
        weights = scores.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
        return weights.flatten(2) @ mapped.view(rows, n, self.heads, -1).transpose(1, 2).flatten(1, 2)

    def each(self, logits: Float[Tensor, "*rows class"]) -> tuple[Float[Tensor, "*rows own"], ...]:
        """Return the logits of each target."""
        return torch.split(logits, self.classes, dim=-1)


def padded(
    codes: TokenMap, strings: Strings, device: torch.device
) -> tuple[Int[Tensor, "string place"], Int[Tensor, "string place"]]:
    """Return the prompts of strings as tokens, filled up on the right, and the attention mask."""
    rows = [codes.encode(string) for string in strings]
    width = max(map(len, rows))
    ids = torch.tensor([row + [codes.end] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids.to(device), mask.to(device)


def room(model: Any) -> int:
    """Return how many tokens of a string the model has positions for, beside that of the begin token."""
    return int(model.config.max_position_embeddings) - 1


def train_probes(
    model: Any,
    codes: TokenMap,
    grammar: Grammar,
    rng: np.random.Generator,
    config: ProbeConfig,
    wanted: Sequence[Wanted],
    progress: Callable[[int], None] = lambda step: None,
) -> dict[Wanted, PositionProbe]:
    """Train probes of a frozen model on fresh strings; all see the same ones, so that the model runs once a step.

    A probe does not depend on which others are trained with it. The loss is the mean cross entropy over targets and
    tokens. Of a string longer than the model's positions, only the beginning counts, with the labels of the whole. For
    a shuffled probe, the labels are those of another string of the batch at the same positions; tokens beyond its end
    do not count.

    Args:
        model: causal or bidirectional model of transformers, in evaluation mode, on any device.
        codes: its tokens.
        grammar: where strings and labels come from.
        rng: where strings and first weights are drawn from.
        config: sizes of probes and training.
        wanted: what to train.
        progress: is called with the number of steps done.

    Raises:
        GameError: the model is in training mode or has no such layer, the grammar has other terminals than `codes`, a
            probe is wanted twice, or training diverged.
    """
    _check(model, codes, grammar)
    twice = len(wanted) - len(set(wanted))
    require(bool(wanted) and not twice, "wanted", list(wanted), "one or more probes, each once")
    drawn, first = rng.spawn(2)
    seed, positions = int(first.integers(2**63)), min(bounds(grammar)[0][1], room(model))
    probes: dict[Wanted, PositionProbe] = {}
    for step in range(config.steps):
        batch = _run(model, codes, sample(grammar, drawn, config.rows), [w.layer for w in wanted])
        if not probes:
            for want, states in zip(wanted, batch.states, strict=True):
                made = torch.Generator().manual_seed(seed)
                sizes = (states.shape[-1], targets(grammar), positions, config.heads, config.dim, want.reach)
                probes[want] = PositionProbe(*sizes, made).to(model.device)
            optimizer = torch.optim.AdamW(
                [p for probe in probes.values() for p in probe.parameters()],
                lr=config.learning_rate,
                betas=BETAS,
                weight_decay=config.weight_decay,
            )
        optimizer.zero_grad()
        for want, states in zip(wanted, batch.states, strict=True):
            labels = batch.labels.roll(1, 0) if want.shuffled else batch.labels
            labels = labels.masked_fill(~batch.present[:, :, None], _OUT)
            logits = probes[want].each(probes[want](states, batch.present))
            losses = [functional.cross_entropy(x.flatten(0, 1), labels[..., t].flatten()) for t, x in enumerate(logits)]
            torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress(step + 1)
    for want, probe in probes.items():
        if not all(bool(p.isfinite().all()) for p in probe.parameters()):
            raise GameError(f"{want} diverged: its weights are no numbers; lower learning_rate={config.learning_rate}")
    return probes


@torch.no_grad()
def evaluate_probes(
    model: Any,
    codes: TokenMap,
    grammar: Grammar,
    rng: np.random.Generator,
    probes: Mapping[Wanted, PositionProbe],
    strings: int = 200,
    rows: int = 60,
) -> pl.DataFrame:
    """Test probes on fresh strings, against the true labels, whatever they were trained on.

    Args:
        model: the one that they were trained on.
        codes: its tokens.
        grammar: where strings and labels come from.
        rng: where strings are drawn from.
        probes: from `train_probes`.
        strings: how many.
        rows: strings at once.

    Returns:
        a row a (layer, reach, shuffled; target, level, where). `where` is "all" tokens, or "ends", those with which
        the ancestor of the level ends (for ancestors only). `accuracy` is a share of `tokens` in `strings`; `low` and
        `high` its 95 % interval over strings, from `stats.accuracy`; `chance` the share of the commonest class. Null
        where there are no tokens.

    Raises:
        GameError: as for `train_probes`.
    """
    _check(model, codes, grammar)
    require_whole("strings", strings, 2, 10_000_000)
    (drawn,) = rng.spawn(1)
    given, every = sample(grammar, drawn, strings), targets(grammar)
    half = len(every) // 2  # for each ancestor, then for each boundary
    groups = [(t, "all") for t in range(2 * half)] + [(t, "ends") for t in range(half)]
    right = {want: np.zeros((strings, len(groups))) for want in probes}
    tokens, classes = np.zeros((strings, len(groups))), [np.zeros(every[t].classes) for t, _ in groups]
    for low in range(0, strings, rows):
        batch = _run(model, codes, given[low : low + rows], [want.layer for want in probes])
        own = slice(low, low + len(batch.present))
        guesses = {
            want: [x.argmax(-1) for x in probe.each(probe(states, batch.present))]
            for (want, probe), states in zip(probes.items(), batch.states, strict=True)
        }
        for g, (t, where) in enumerate(groups):
            counted, labels = batch.present, batch.labels[..., t]
            if where == "ends":
                counted = batch.labels[..., half + t] == 1
            tokens[own, g] = counted.sum(1).cpu().numpy()
            classes[g] += torch.bincount(labels[counted], minlength=every[t].classes).cpu().numpy()
            for want in probes:
                right[want][own, g] = (counted & (guesses[want][t] == labels)).sum(1).cpu().numpy()
    out = []
    for want in probes:
        accuracy, ends = stats.accuracy(right[want], tokens)
        for g, (t, where) in enumerate(groups):
            n = tokens[:, g].sum()
            out.append(
                {"layer": want.layer, "reach": want.reach, "shuffled": want.shuffled, "target": every[t].target,
                 "level": every[t].level, "where": where, "accuracy": accuracy[g], "low": ends[0, g],
                 "high": ends[1, g], "chance": classes[g].max() / n if n else np.nan, "tokens": int(n),
                 "strings": strings}
            )  # fmt: skip
    return pl.DataFrame(out, schema_overrides={"reach": pl.Int64}).fill_nan(None)


def probe(
    model: Any,
    codes: TokenMap,
    grammar: Grammar,
    rng: np.random.Generator,
    config: ProbeConfig,
    wanted: Sequence[Wanted],
    progress: Callable[[int], None] = lambda step: None,
) -> pl.DataFrame:
    """Train probes and test them on strings from another stream; see `train_probes` and `evaluate_probes`."""
    trained, tested = rng.spawn(2)
    probes = train_probes(model, codes, grammar, trained, config, wanted, progress)
    return evaluate_probes(model, codes, grammar, tested, probes, config.strings, config.rows)


@dataclass(frozen=True)
class _Batch:
    """Strings as a model has them: states for each probe, labels for each target (left out: -100), which are tokens."""

    states: list[Float[Tensor, "string token hidden"]]
    labels: Int[Tensor, "string token target"]
    present: Bool[Tensor, "string token"]


@torch.no_grad()
def _run(model: Any, codes: TokenMap, strings: Sequence[Derivation], layers: Sequence[int]) -> _Batch:
    most = room(model)
    ids, mask = padded(codes, [x.tokens[:most] for x in strings], model.device)
    hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for layer in layers:
        require_whole("layer", layer, -len(hidden), len(hidden) - 1)
    labels = np.full((len(strings), ids.shape[1] - 1, 2 * (len(strings[0].symbols) - 2)), _OUT)
    for row, x in zip(labels, strings, strict=True):
        both = np.concatenate([x.symbols[1:-1], x.ends[1:-1]])[:, :most].T
        row[: len(both)] = both
    # Labels beyond a string's end stay out; the begin token is no token of it.
    return _Batch(
        [hidden[layer][:, 1:].float() for layer in layers],
        torch.from_numpy(labels).to(model.device),
        mask[:, 1:].bool(),
    )


def _check(model: Any, codes: TokenMap, grammar: Grammar) -> None:
    require(not model.training, "model.training", True, "a model in evaluation mode: call model.eval()")
    if len(codes.terminals) != len(grammar.terminals):
        raise GameError(f"{codes} has {len(codes.terminals)} terminals: expected {len(grammar.terminals)}")
