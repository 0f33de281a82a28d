"""Linear probes for the place of a token in the derivation: which constituents it is in, and which end with it.

"Physics of Language Models: Part 1" (arXiv 2305.13673), Results 4 and 5. The model is frozen; a probe sees its states
of one layer, on fresh strings of the grammar, and mixes them over tokens by their positions alone. So what a probe
finds is linear in the states. The control with shuffled labels is after Hewitt and Liang 2019 (arXiv 1909.03368).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
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
    after_step: Callable[[int, Mapping[Wanted, PositionProbe]], None] = lambda step, probes: None,
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
        after_step: called with the number of completed steps and the probes.

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
        after_step(step + 1, probes)
    for want, probe in probes.items():
        if not all(bool(p.isfinite().all()) for p in probe.parameters()):
            raise GameError(f"{want} diverged: its weights are no numbers; lower learning_rate={config.learning_rate}")
    return probes


class _Group(NamedTuple):
    """What an accuracy is of: a target, and the tokens that count."""

    target: int  # index into `targets`
    where: str  # "all" tokens, or "ends", those with which the ancestor of the level ends


@dataclass(frozen=True)
class Tested:
    """Answers of probes on the same strings, as counts.

    Args:
        targets: what was predicted.
        right: number of right answers of each probe; shape [string group].
        tokens: number of answers; shape [string group].
        chance: share of the most frequent class, NaN without tokens; shape [group].
        seed: of the resamples.
    """

    targets: tuple[Target, ...]
    right: Mapping[Wanted, Float[np.ndarray, "string group"]]
    tokens: Float[np.ndarray, "string group"]
    chance: Float[np.ndarray, " group"]
    seed: int

    @property
    def groups(self) -> list[_Group]:
        """What each column of the arrays is of."""
        return _groups(self.targets)

    def about(self, want: Wanted, group: int) -> dict[str, Any]:
        """Return the columns that say which probe an accuracy is of, and of what."""
        target, where = self.groups[group]
        _, level, _ = self.targets[target]
        return {"layer": want.layer, "reach": want.reach, "shuffled": want.shuffled,
                "target": self.targets[target].target, "level": level, "where": where}  # fmt: skip

    def share(
        self, hits: Float[np.ndarray, "string group"]
    ) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, "2 group"]]:
        """Return hits out of all tokens, and the interval over strings."""
        return stats.pooled_share(hits, self.tokens, np.random.default_rng(self.seed))


def _groups(every: Sequence[Target]) -> list[_Group]:
    half = len(every) // 2  # for each ancestor, then for each boundary
    return [_Group(t, "all") for t in range(2 * half)] + [_Group(t, "ends") for t in range(half)]


@torch.no_grad()
def evaluate_probes(
    model: Any,
    codes: TokenMap,
    grammar: Grammar,
    rng: np.random.Generator,
    probes: Mapping[Wanted, PositionProbe],
    strings: int = 200,
    rows: int = 60,
) -> Tested:
    """Let probes answer on fresh strings, against the true labels, whatever they were trained on.

    Args:
        model: the one that they were trained on.
        codes: its tokens.
        grammar: where strings and labels come from.
        rng: where strings and resamples are drawn from; the same one gives the same strings.
        probes: from `train_probes`.
        strings: number of strings.
        rows: strings in each forward pass.

    Raises:
        GameError: as for `train_probes`.
    """
    _check(model, codes, grammar)
    require_whole("strings", strings, 2, 10_000_000)
    drawn, resampled = rng.spawn(2)
    given, every = sample(grammar, drawn, strings), targets(grammar)
    half, groups = len(every) // 2, _groups(every)
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
    n = tokens.sum(0)
    chance = np.array([own.max() / count if count else np.nan for own, count in zip(classes, n, strict=True)])
    return Tested(every, right, tokens, chance, int(resampled.integers(2**63)))


def accuracies(tested: Tested) -> pl.DataFrame:
    """Return the accuracy of each probe.

    Returns:
        One row for each (layer, reach, shuffled; target, level, where). `where` is "all" tokens, or "ends", those with
        which the ancestor of the level ends (for ancestors only). `accuracy` is a share of `tokens` in `strings`; `low`
        and `high` its 95 % interval, bootstrap over strings (where all strings have the same share, Wilson's of as many
        trials as there are strings); `chance` the share of the most frequent class. Null where there are no tokens.
    """
    out = []
    for want, right in tested.right.items():
        accuracy, ends = tested.share(right)
        out += [
            tested.about(want, g) | {
                "accuracy": accuracy[g], "low": ends[0, g], "high": ends[1, g], "chance": tested.chance[g],
                "tokens": int(tested.tokens[:, g].sum()), "strings": len(tested.tokens),
            }
            for g in range(len(tested.groups))
        ]  # fmt: skip
    return pl.DataFrame(out, schema_overrides={"reach": pl.Int64}).fill_nan(None)


def learning(tested: Mapping[int, Tested]) -> pl.DataFrame:
    """Return how the accuracy of each probe for ancestors grew with its training.

    Args:
        tested: by number of training steps, on the same strings; one or more, in order.

    Returns:
        One row for each number of steps (`step`) and each row of `accuracies` about ancestors, with `accuracy`, `low`,
        `high`, and `gain`, the difference from the fewer steps before, with its interval `gain_low`, `gain_high`,
        paired over strings. Null where there are no tokens, and the gain at the fewest steps.
    """
    out, before = [], None
    for step, now in tested.items():
        for want, right in now.right.items():
            accuracy, ends = now.share(right)
            gain, around = (accuracy * np.nan, ends * np.nan) if before is None else now.share(right - before[want])
            out += [
                {"step": step} | about | {
                    "accuracy": accuracy[g], "low": ends[0, g], "high": ends[1, g], "gain": gain[g],
                    "gain_low": around[0, g], "gain_high": around[1, g],
                }
                for g in range(len(now.groups)) if (about := now.about(want, g))["target"] == "ancestor"
            ]  # fmt: skip
        before = now.right
    return pl.DataFrame(out, schema_overrides={"reach": pl.Int64}).fill_nan(None)


def probe(
    model: Any,
    codes: TokenMap,
    grammar: Grammar,
    rng: np.random.Generator,
    config: ProbeConfig,
    wanted: Sequence[Wanted],
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Train probes, and test them on strings of another stream, at an eighth, a quarter, half and all of the steps.

    Returns:
        The tables of `accuracies`, after all steps, and of `learning`.
    """
    trained, tested = rng.spawn(2)
    due = sorted({max(1, config.steps // part) for part in (8, 4, 2, 1)})
    found: dict[int, Tested] = {}

    def test(step: int, probes: Mapping[Wanted, PositionProbe]) -> None:
        if step in due:
            found[step] = evaluate_probes(model, codes, grammar, deepcopy(tested), probes, config.strings, config.rows)

    train_probes(model, codes, grammar, trained, config, wanted, test)
    return accuracies(found[config.steps]), learning(found)


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
