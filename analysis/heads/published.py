"""The published way of adding up patches on published pairs (arXiv 2505.14892, as the authors' code does it).

For each length there are five trials with letters of their own. A trial is patched with probability 1/2, and at most
one trial of a length is. A patched trial is a batch of two rows: clean (prompt, counterfactual) and corrupted, the same
with the rows exchanged. Its logit difference is the mean over both rows of logit(answer) - logit(other answer), and the
score of a patch is (patched - corrupted) / (clean - corrupted), or 0 where that denominator is at most 1e-20. Heads are
patched at the last position, and their scores *summed* over the patched trials, not averaged; the residual stream is
patched before each layer at each position, with one map for each length.

The sum depends on how many trials happen to be patched, weighs each trial alike however little its prompts differ, and
has no interval. `nextstate.analysis.heads.recovery` is our way, on any number of pairs of the same design.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float

from nextstate.agents.language import LanguageModel
from nextstate.agents.sites import Site
from nextstate.analysis.heads.config import PAPER_TRIALS
from nextstate.analysis.heads.pairs import TokenPair
from nextstate.analysis.heads.patch import sweep
from nextstate.analysis.heads.routing import ONE_ANSWER, token_pairs
from nextstate.envs.contrast import Pair

LEAST_GAP = 1e-20  # scores of trials with a smaller denominator are 0
PUBLISHED: dict[str, Any] = {
    "kind": pl.String, "size": pl.Int64, "trial": pl.Int64, "site": pl.String, "layer": pl.Int64, "head": pl.Int64,
    "position": pl.Int64, "token": pl.String, "score": pl.Float64, "reason": pl.String,
}  # fmt: skip


class Trial(NamedTuple):
    """A patched trial: its length (steps or distance), its number among those of the length, and its pair."""

    size: int
    number: int
    pair: Pair


def trials(
    sizes: Sequence[dict[str, int]], draw: Callable[[dict[str, int]], Pair], rng: np.random.Generator
) -> Iterator[Trial]:
    """Draw the trials of each length in turn, and yield those that are patched."""
    for size in sizes:
        for number in range(PAPER_TRIALS):
            pair = draw(size)
            if rng.random() < 0.5:
                yield Trial(sum(size.values()), number, pair)  # steps or distance
                break


def scores(
    model: LanguageModel, pair: TokenPair, site: Site, positions: str, max_bytes: int
) -> tuple[Float[np.ndarray, "layer head column"], tuple[str, ...]]:
    """Return the score of patching each cell in a trial, and the names of the columns (see `sweep`)."""
    rows = (pair, TokenPair(pair.corrupted, pair.clean, pair.other, pair.answer))
    found = sweep(
        model, rows, site=site, positions=positions, failures="include", vocabulary=False, max_bytes=max_bytes
    )
    patched, corrupted, clean = (part.difference.mean(0) for part in (found.patched, found.base, found.source))
    gap = float(clean - corrupted)
    return (patched - corrupted) / gap if gap > LEAST_GAP else np.zeros_like(patched), found.columns


def trial_rows(model: LanguageModel, kind: str, trial: Trial, sites: Sequence[str], max_bytes: int) -> pl.DataFrame:
    """Return one row for each cell that is patched in a trial; one row with the reason if it cannot be used.

    Of `sites`, `head` and `resid_pre` are patched.
    """
    about = {"kind": kind, "size": trial.size, "trial": trial.number}
    layers, heads = (
        model.sites.layers_with("head"),
        [model.sites.shape("head", n)[0] for n in range(model.sites.layers)],
    )
    if len(set(trial.pair.answers)) == 1:  # clean - corrupted is 0
        cells = [(layer, head) for layer in layers for head in range(heads[layer])]
        rows = [about | {"site": "head", "layer": layer, "head": head, "score": 0.0, "reason": ONE_ANSWER}
                for layer, head in cells]  # fmt: skip
        return pl.DataFrame(rows, schema=PUBLISHED)
    found, excluded = token_pairs(model.encoder, [trial.pair])
    if excluded:
        return pl.DataFrame([about | {"reason": excluded[0].reason}], schema=PUBLISHED)
    pair, rows = found[0], []
    patched: tuple[tuple[Site, str], ...] = (("head", "last"), ("resid_pre", "each"))
    for site, positions in (one for one in patched if one[0] in sites):
        value, columns = scores(model, pair, site, positions, max_bytes)
        for (n, head, c), score in np.ndenumerate(value):
            row = about | {"site": site, "layer": model.sites.layers_with(site)[n], "score": float(score)}
            if site == "head":
                rows.append(row | {"head": head})
            else:
                token = model.tokenizer.decode([pair.clean[int(columns[c])]])
                rows.append(row | {"position": int(columns[c]), "token": token})
    return pl.DataFrame(rows, schema=PUBLISHED)


def summed(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the published head map: the sum of each head's scores over the patched trials of each kind."""
    heads = rows.filter(site="head").group_by("kind", "layer", "head", maintain_order=True)
    return heads.agg(pl.col("score").sum(), trials=pl.len().cast(pl.Int64))
