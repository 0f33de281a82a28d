"""Heads that carry state and heads that carry action: tokenised pairs, a model's answers to them, the routing score.

A game's minimal pairs (`Game.contrast`) become `TokenPair`s by `token_pairs`; `nextstate.analysis.heads.patch` sweeps
them; `nextstate.analysis.heads.recovery` tests which heads carry what the prompts differ in; `routing` compares state
pairs with action pairs, head by head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nextstate.agents.agent import Prompt
from nextstate.agents.language import LanguageModel
from nextstate.agents.text import Encoder
from nextstate.analysis import stats
from nextstate.analysis.attention import Look, attention_hooks
from nextstate.analysis.heads.config import MIN_EFFECT
from nextstate.analysis.heads.pairs import PatchError, TokenPair, tokens_of
from nextstate.analysis.heads.recovery import Readout, Recovery, Sweep, changes, read
from nextstate.envs.contrast import Pair, problems, segments

ONE_ANSWER = "both sides have the same answer"
_WHAT = ("state", "action", "origin", "subject")  # roles of the content of a prompt, as opposed to places
_MAY = {"state": {"state"}, "noop": {"state", "origin"}, "action": {"action"}, "name": {"state", "action", "origin"}}


@dataclass(frozen=True)
class Excluded:
    """A pair that cannot be used: its index among the given pairs, and the reason."""

    pair: int
    reason: str


def token_pairs(encoder: Encoder, pairs: Sequence[Pair]) -> tuple[list[TokenPair], list[Excluded]]:
    """Tokenise pairs, each prompt exactly as a language model reads it; return the usable and the excluded pairs.

    Answers are compared at the first token in which they differ; the tokens that they begin with in common are appended
    to both prompts. A role keeps its name if it is at the same token in both prompts; otherwise it is split into two,
    such as "match (clean)" and "match (corrupted)".

    A pair is excluded if it has `problems`; if its prompts differ in the wrong roles (a state pair must have different
    states and the same action, an action pair the reverse; published noop pairs only rename, and need not differ in any
    role); if its prompts have different numbers of tokens, or the same tokens; or if one answer begins the other. A
    published pair is also excluded if a state's letter is several tokens, since it is measured by single tokens.
    """
    kept, out = [], []
    for i, pair in enumerate(pairs):
        reason = _unsound(pair) or _misfit(pair) or _split(encoder, pair)
        if not reason:
            try:
                kept.append(_joined(encoder, pair))
                continue
            except PatchError as error:
                reason = str(error)
        out.append(Excluded(i, reason))
    return kept, out


def _unsound(pair: Pair) -> str:
    # Without the letter, so that pairs which are left out for this reason are counted together.
    return ONE_ANSWER if len(set(pair.answers)) == 1 else "; ".join(problems(pair))


def _misfit(pair: Pair) -> str:
    texts = [segments(side) for side in pair.sides]
    differ = {
        name for name, role in pair.roles.items()
        if name in _WHAT and len({text[s.piece][s.start : s.end] for text, s in zip(texts, role, strict=True)}) > 1
    }  # fmt: skip
    wrong = sorted(differ - _MAY[pair.kind])
    if wrong:
        return f"the prompts of {_a(pair.kind)} pair differ in {', '.join(wrong)}"
    must = {"state": "state", "noop": "state", "action": "action"}.get(pair.kind)
    if must in pair.roles and must not in differ and pair.design != "paper":
        return f"the prompts of {_a(pair.kind)} pair have the same {must}"
    return ""


def _split(encoder: Encoder, pair: Pair) -> str:
    choices = pair.questions[0].choices if pair.design == "paper" else ()
    split = any(len(encoder.piece(choice)) > 1 for choice in choices)
    return "a letter of this published pair is several tokens to this tokenizer" if split else ""


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _joined(encoder: Encoder, pair: Pair) -> TokenPair:
    clean, corrupted = (tokens_of(encoder, Prompt(side, len(side.steps) - 1)) for side in pair.sides)
    answers = [encoder.piece(answer) for answer in pair.answers]
    common = next((i for i, (a, b) in enumerate(zip(*answers, strict=False)) if a != b), min(map(len, answers)))
    if common == min(map(len, answers)):
        both = " and ".join(repr(a) for a in pair.answers)
        raise PatchError(f"the tokens of one answer are a prefix of those of the other: {both}")
    shared, texts = answers[0][:common], [segments(side) for side in pair.sides]
    roles: dict[str, int] = {}
    for name, role in pair.roles.items():
        places = [encoder.locate(text, span) for text, span in zip(texts, role, strict=True)]
        if name == "last":
            continue
        if places[0] == places[1]:
            roles[name] = places[0]
        elif len(clean) == len(corrupted):
            roles |= {f"{name} ({side})": at for side, at in zip(("clean", "corrupted"), places, strict=True)}
    return TokenPair(clean + shared, corrupted + shared, answers[0][common], answers[1][common], roles)


def place_of_content(pair: TokenPair) -> tuple[int, ...]:
    """Return the number of tokens of a pair, and the positions of the roles for content (-1 where it has none)."""
    return len(pair.clean), *(pair.roles.get(role, -1) for role in _WHAT)


def layout(pairs: Sequence[TokenPair]) -> str | tuple[str, ...]:
    """Return which positions to sweep so that a column means the same in all pairs.

    "each" (every position) if all pairs have the same length and the same positions of the roles for content; otherwise
    the names of the roles that all pairs have.
    """
    if len({place_of_content(pair) for pair in pairs}) == 1:
        return "each"
    common = set.intersection(*(set(p.roles) for p in pairs))
    where = {r: float(np.mean([p.roles[r] for p in pairs])) for r in common}
    return tuple(sorted(common, key=lambda r: (where[r], r)))


@torch.no_grad()
def baseline(model: LanguageModel, pairs: Sequence[TokenPair]) -> tuple[Readout, Readout]:
    """Return a model's unpatched predictions for the clean and for the corrupted prompt of each pair.

    Raises:
        PatchError: a prompt is longer than the model reads.
    """
    longest = max(len(p.clean) for p in pairs)
    if model.context is not None and longest > model.context:
        raise PatchError(f"a pair has {longest:,} tokens, but the context of {model.name} is {model.context:,}; "
                         "ask for fewer steps")  # fmt: skip
    out = Readout.empty(len(pairs)), Readout.empty(len(pairs))
    by_length: dict[int, list[int]] = {}
    for i, pair in enumerate(pairs):
        by_length.setdefault(len(pair.clean), []).append(i)
    for length, mine in by_length.items():
        size = max(1, model.batch_tokens // length)
        for rows in (mine[k : k + size] for k in range(0, len(mine), size)):
            answer, other = (
                torch.tensor([getattr(pairs[i], w) for i in rows], device=model.device) for w in ("answer", "other")
            )
            for side, found in zip(("clean", "corrupted"), out, strict=True):
                tokens = torch.tensor([getattr(pairs[i], side) for i in rows], device=model.device)
                got = read(model.forward.plain(tokens, [length - 1]), answer, other)
                found.put(rows, Readout(got.difference[:, 0], got.probability[:, 0], got.greedy[:, 0]))
    return out


def prefers(clean: Readout, corrupted: Readout) -> Bool[np.ndarray, " pair"]:
    """Return for each pair whether the model prefers the correct one of the two answers in both prompts."""
    return np.asarray((clean.difference > 0) & (corrupted.difference < 0))


@dataclass(frozen=True)
class Routing(stats.Band):
    """State against action, for each head (or layer): arrays with axes [layer head column].

    `value` is the recovery on state pairs minus the recovery on action pairs: 1 if the site alone carries the whole
    difference between two states and nothing of that between two actions, -1 in the reverse case, and 0 if it carries
    both equally (such as a head that looks up the next state) or neither.

    `share` is max(state, 0) / (max(state, 0) + max(action, 0)), or NaN where both recoveries are below `MIN_EFFECT`.
    Value, intervals and band are descriptions; `labels` states the result of the two tests.
    """

    state: Recovery
    action: Recovery

    @property
    def share(self) -> Float[np.ndarray, "layer head column"]:
        """Share of the recovery on state pairs in the sum of both recoveries, for each site."""
        state, action = np.maximum(self.state.value, 0), np.maximum(self.action.value, 0)
        known = np.maximum(state, action) >= MIN_EFFECT
        return np.asarray(np.divide(state, state + action, out=np.full_like(state, np.nan), where=known))

    @property
    def labels(self) -> np.ndarray[Any, Any]:
        """What each site carries by the tests: "state", "action", "both" or "" (neither, or not tested).

        "state" means that the test on state pairs finds the site and the test on action pairs does not, which with few
        pairs is no proof that it carries no action. The tests are those of
        `nextstate.analysis.heads.recovery.carried`, each corrected for all sites.
        """
        state, action = self.state.test.carries, self.action.test.carries
        return np.select([state & action, state, action], ["both", "state", "action"], "")


def routing(
    state: tuple[Sweep, Recovery],
    action: tuple[Sweep, Recovery],
    rng: np.random.Generator,
    *,
    level: float = stats.LEVEL,
    resamples: int = 2000,
) -> Routing:
    """Compare the recoveries on state pairs and on action pairs, given the sweep of the same cells over each.

    Intervals and band of the difference are those of `nextstate.analysis.stats.ratio_difference_band`: the two kinds of
    pairs are drawn independently, so they are resampled independently.

    Raises:
        PatchError: the sweeps do not have the same cells, or one has no difference to recover.
    """
    places = [(s.site, s.direction, s.layers, s.columns) for s, _ in (state, action)]
    if places[0] != places[1]:
        raise PatchError(f"sweeps of different cells: {places[0]} and {places[1]}")
    one, two = changes(state[0]), changes(action[0])
    *_, band = stats.ratio_difference_band(one, two, rng, level=level, draws=resamples)
    return Routing(**vars(band), state=state[1], action=action[1])


def head_table(found: Routing, layers: Sequence[int]) -> pl.DataFrame:
    """Return one row for each head (or layer, at sites without heads) and column: recoveries, tests and routing."""
    layer, head, _ = (x.ravel() for x in np.indices(found.value.shape))
    columns: dict[str, Any] = {"layer": np.array(layers)[layer], "head": head}
    for name, one in (("state", found.state), ("action", found.action)):
        columns |= {name: one.value.ravel(), f"{name}_low": one.low.ravel(), f"{name}_high": one.high.ravel()}
        columns |= {f"{name}_{end}": getattr(one, end).ravel() for end in ("band_low", "band_high")}
        columns |= {f"{name}_p": one.test.p.ravel(), f"{name}_carries": one.test.carries.ravel()}
    columns |= {"routing": found.value.ravel()}
    columns |= {f"routing_{k}": getattr(found, k).ravel() for k in ("low", "high", "band_low", "band_high")}
    frame = pl.DataFrame(columns | {"share": found.share.ravel(), "carries": found.labels.ravel().tolist()})
    return frame.with_columns(pl.col("state_p", "action_p").fill_nan(None))


def top_heads(table: pl.DataFrame, most: int = 3) -> list[tuple[int, int]]:
    """Return the heads that carry the most state, then those that carry the most action, without duplicates.

    Args:
        table: the result of `head_table`.
        most: largest number of heads for each of the two.
    """
    out: list[tuple[int, int]] = []
    for kind in ("state", "action"):
        best = table.filter(pl.col(f"{kind}_carries")).sort(kind, descending=True).head(most)
        out += [row for row in best.select("layer", "head").iter_rows() if row not in out]
    return out


@torch.no_grad()
def attention_of(
    model: LanguageModel, tokens: Sequence[int], heads: Sequence[tuple[int, int]]
) -> Float[np.ndarray, "head position"]:
    """Return the attention of the last token to every token of a prompt, for each (layer, head)."""
    last = len(tokens) - 1
    look = Look([0], [last], [list(range(len(tokens)))], len(tokens))
    chosen = {layer: sorted({h for at, h in heads if at == layer}) for layer, _ in heads}
    seen: dict[tuple[int, int], np.ndarray] = {}

    def attend(layer: int, weights: Float[Tensor, "place head position"]) -> None:
        seen.update({(layer, head): w.float().cpu().numpy() for head, w in zip(chosen[layer], weights[0], strict=True)})

    with attention_hooks(model, chosen, lambda: look, attend):
        model.forward.plain(torch.tensor([list(tokens)], device=model.device), [last])
    return np.array([seen[head] for head in heads])
