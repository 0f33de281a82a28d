"""Transfer of heads between games: do the heads that carry state in one game carry it in another?

Tables: `heads/KIND/GAME`, an exact sweep with one row for each head and pair (`control_patched`: patched from an
unrelated prompt instead, for the test of which heads carry the kind); `transfer/KIND/GAME-to-GAME`, one row for
each set of heads that is patched together and each pair of the second game. Heads are chosen on half of a game's pairs,
and sets of heads are patched in the other half, so that no set is measured on pairs by which it was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, permutations
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import Field

from nextstate.analysis import stats
from nextstate.analysis.grid import GridConfig, Made, game_identity, games_of
from nextstate.analysis.run import ModelRunConfig, Run, RunError
from nextstate.analysis.study import Job, Skip, Study

if TYPE_CHECKING:
    from nextstate.agents.language import LanguageModel
    from nextstate.analysis.heads.pairs import TokenPair
    from nextstate.analysis.heads.recovery import Carried
    from nextstate.analysis.page.page import Page

Heads = tuple[tuple[int, int], ...]  # layer and head of each
ALPHA = 0.05
MIN_PAIRS = 4  # pairs of a game: two to choose heads by, two to measure


class TransferGame(GridConfig):
    """A game over a grid of settings, and the length of its episodes."""

    steps: int | None = Field(None, ge=1, description="by default that of the game's pairs")


class TransferConfig(ModelRunConfig):
    """Everything that decides what a study of transfer finds."""

    games: list[TransferGame] = Field(min_length=1, description="in which to look")
    kinds: list[Literal["state", "action"]] = Field(
        default=["state", "action"], min_length=1, description="kinds of pairs"
    )
    pairs: int = Field(48, ge=MIN_PAIRS, le=10_000, description="minimal pairs of each game and kind")
    top: int = Field(3, ge=1, description="how many heads of a game are patched together")
    random_sets: int = Field(50, ge=20, le=10_000, description="of as many heads of the same layers, to compare with")


class Given(NamedTuple):
    """What a job is about: the pairs of a game, and the game whose heads are patched in them, together."""

    kind: str
    made: Made
    steps: int | None
    heads_of: Made | None = None  # where there is none, each head is patched by itself


class Transfer(Study[TransferConfig]):
    """Find out whether the heads that carry state in one game do so in another."""

    name = "transfer"
    config = TransferConfig

    def jobs(self, config: TransferConfig) -> list[Job]:
        jobs: list[Job] = []
        games = [(made, entry.steps) for entry in config.games for made in games_of(entry)]
        if len(games) < 2:
            raise RunError(f"the heads of {games[0][0].slug} can be tried in no other game: give at least two games")
        for kind in config.kinds:
            for made, steps in games:
                if "balanced" not in made.game.contrasts.get(kind, ()):
                    raise RunError(f"{made.game.name} has no balanced {kind} pairs; leave it out, or ask for others")
                made.game.contrast(np.random.default_rng(0), kind, steps=steps)  # raises where it cannot make them
                given = Given(kind, made, steps)
                jobs.append(Job(_key(kind, made), f"{kind} heads of {made.slug}", 10, given, agent=config.agent))
            for (one, _), (two, steps) in permutations(games, 2):
                key, needs = f"transfer/{kind}/{one.slug}-to-{two.slug}", (_key(kind, one), _key(kind, two))
                given = Given(kind, two, steps, one)
                jobs.append(Job(key, f"{kind} heads of {one.slug} in {two.slug}", 10, given, needs, config.agent))
        return jobs

    def identity(self, job: Job, run: Run[TransferConfig]) -> dict[str, Any]:
        return run.asks(run.config.model) | game_identity(job.given.made.game)

    def do(self, job: Job, run: Run[TransferConfig]) -> pl.DataFrame:
        model: LanguageModel = run.model(run.config.model)
        given: Given = job.given
        pairs = _pairs(run, model, given)
        if given.heads_of is None:
            frame = _swept(run, model, pairs, given)
            run.describe_model(model)  # with what was proved of longer prompts
            return frame
        theirs, own = (run.table(_key(given.kind, made)) for made in (given.heads_of, given.made))
        sets = [top_heads(theirs, run.config.top), top_heads(own, run.config.top)]
        sets += random_sets(sets[0], theirs, run.config.random_sets, run.rng("random sets", job.key))
        tested = own.filter(~pl.col("chooses")).unique("pair", maintain_order=True)
        kept = tested["pair"].to_list()
        patched = together(model, [pairs[i] for i in kept], sets)
        names = ["theirs", "own", *["random"] * run.config.random_sets]
        base, source = (dict(tested.select("pair", side).iter_rows()) for side in ("base", "source"))
        return _rows({"set": names, "heads": [_named(heads) for heads in sets]}, kept, base, source, patched)

    def metrics(self, job: Job, frame: pl.DataFrame) -> dict[str, float | None]:
        if job.given.heads_of is None:
            return {}
        top, gap = _ratio(frame.filter(set="theirs"))
        return {f"{job.key}/recovery": float(top.mean() / gap.mean())}

    def summarise(self, run: Run[TransferConfig]) -> dict[str, pl.DataFrame]:
        from nextstate.analysis.heads.recovery import too_few

        heads, agreement, transfer = [], [], []
        named: dict[tuple[str, str], set[tuple[int, ...]]] = {}
        for kind in run.config.kinds:
            ratios = {}
            for game, rows in run.tables(f"heads/{kind}/*").items():
                ratios[game] = _ratio(rows)
                band = stats.ratio_band(ratios[game], run.rng("heads", kind, game))
                test = _tested(rows, band.value, run.rng("test", kind, game))
                if reason := too_few(test.pairs):
                    run.warn(f"{kind} pairs of {game}: {reason}")
                cells = rows.unique(["layer", "head"], maintain_order=True).select(
                    pl.lit(kind).alias("kind"), pl.lit(game).alias("game"), "layer", "head"
                )
                names = ("value", "low", "high", "band_low", "band_high")
                numbers = {name.replace("value", "recovery"): getattr(band, name) for name in names}
                counts = {"pairs": pl.lit(len(ratios[game][1])), "tested": pl.lit(test.pairs)}
                known = pl.Series(test.carries) if test.known else pl.lit(None, pl.Boolean)
                cells = cells.with_columns(**numbers, p=pl.Series(test.p).fill_nan(None), carries=known, **counts)
                named[kind, game] = set(cells.filter("carries").select("layer", "head").iter_rows())
                heads.append(cells)
            for one, two in combinations(ratios, 2):
                value, ends = stats.ratio_spearman(ratios[one], ratios[two], run.rng("spearman", kind, one, two))
                agreement.append({"kind": kind, "one": one, "two": two, "spearman": value,
                                  "spearman_low": ends[0], "spearman_high": ends[1]})  # fmt: skip
            for key in run.keys(f"transfer/{kind}/*"):
                one, two = _games(key)
                row = {"kind": kind, "heads_of": one, "pairs_of": two, **_compared(run.table(key), run.rng(key))}
                chosen = {tuple(map(int, name.split("."))) for name in row["heads"].split()}
                transfer.append(row | {"carrying": len(chosen & named[kind, one])})
        tables = {"heads": pl.concat(heads), "agreement": pl.DataFrame(agreement, schema=AGREEMENT)}
        return tables | {"transfer": pl.DataFrame(transfer, schema=TRANSFER)}

    def headline(self, run: Run[TransferConfig]) -> pl.DataFrame:
        shown = ("kind", "heads_of", "pairs_of", "recovery", "recovery_low", "recovery_high", "own", "random_high", "p")
        return run.summary("transfer").select(shown)

    def page(self, run: Run[TransferConfig]) -> Page:
        from nextstate.analysis.page.page import Page, Section

        transfer, agreement, heads = (run.summary(name) for name in ("transfer", "agreement", "heads"))
        lead = []
        for kind in transfer["kind"].unique(maintain_order=True):
            mine = transfer.filter(kind=kind)
            above = int((mine["p"] <= ALPHA).sum())
            lead.append(
                f"In {above} of {len(mine)} ordered pairs of games the {run.config.top} heads with the largest effect "
                f"on {kind} pairs of the first recover more in pairs of the second than random heads of the same "
                f"layers (p ≤ {ALPHA}). {_carrying(heads.filter(kind=kind))}"
            )
        text = (
            f"The {run.config.top} heads with the largest mean effect in one game (down) are patched together, at the "
            "answering token, in minimal pairs of another (right); on the diagonal those are the game's own heads. 0: "
            "nothing of the difference between both prompts is recovered; 1: all of it.\n\nHeads are chosen on "
            "one half of a game's pairs and patched in the other half. Intervals are 95 % over pairs; “random” is the "
            "range that holds 95 % of the random sets of as many heads of the same layers (they may hold some of the "
            "other sets' heads), and p the share of these sets, this one included, that recover as much as the other "
            "game's heads."
        )
        figures = [_matrix(transfer, kind) for kind in transfer["kind"].unique(maintain_order=True)]
        ranks = "Spearman's rank correlation of the recovery of single heads in two games, over all pairs."
        all_heads = (
            "The recovery of each head patched by itself, with 95 % intervals and approximate bands over all heads of "
            "a game, which describe it. A head carries the kind if its effect from the other prompt of a pair exceeds "
            "its effect from an unrelated prompt of the same token layout (sign-flip test of the largest |t| over all "
            "heads of the game, p ≤ 0.05) and its recovery is at least 0.02 in absolute value."
        )
        sections = [Section("Heads of one game in another", text, figures, transfer),
                    Section("Agreement of all heads", ranks, table=agreement),
                    Section("All heads", all_heads, table=heads)]  # fmt: skip
        words = {"recovery": "(patched − base) / (source − base) of the mean logit difference between both answers."}
        return Page(f"{run.config.name}: heads of {run.config.agent} across games", lead, sections, words)


_ENDS = ("", "_low", "_high")
AGREEMENT: dict[str, Any] = {
    "kind": pl.String, "one": pl.String, "two": pl.String, **{f"spearman{end}": pl.Float64 for end in _ENDS},
}  # fmt: skip
TRANSFER: dict[str, Any] = {
    "kind": pl.String, "heads_of": pl.String, "pairs_of": pl.String,
    **{f"{name}{end}": pl.Float64 for name in ("recovery", "own", "difference", "random") for end in _ENDS},
    "p": pl.Float64, "pairs": pl.Int64, "shared": pl.Int64, "heads": pl.String, "own_heads": pl.String,
    "carrying": pl.Int64,
}  # fmt: skip


def _key(kind: str, made: Made) -> str:
    return f"heads/{kind}/{made.slug}"


def _games(key: str) -> list[str]:
    return key.rpartition("/")[2].split("-to-")


def _named(heads: Heads) -> str:
    return " ".join(f"{layer}.{head}" for layer, head in heads)


def _pairs(run: Run[TransferConfig], model: LanguageModel, given: Given) -> list[TokenPair]:
    """Return a game's pairs as tokens; those that cannot be used are left out and counted in `run.json`."""
    from nextstate.analysis.heads.routing import token_pairs

    kind, made = given.kind, given.made
    rng = run.rng("pairs", kind, made.slug)
    pairs = [made.game.contrast(rng, kind, steps=given.steps) for _ in range(run.config.pairs)]
    found, excluded = token_pairs(model.encoder, pairs)
    if not found:
        raise Skip(f"no pair can be used: {excluded[0].reason}")
    if excluded:
        run.warn(f"{len(excluded)} of {len(pairs)} {kind} pairs of {made.slug} cannot be used: {excluded[0].reason}")
    return found


def _carrying(heads: pl.DataFrame) -> str:
    """Return how many heads of each game carry a kind."""
    found = heads.group_by("game", maintain_order=True).agg(pl.col("carries").sum(), pl.col("p").count(), n=pl.len())
    return "Heads that carry it: " + "; ".join(
        f"{carries} of {n} in {game}" if tested else f"not tested in {game}"
        for game, carries, tested, n in found.iter_rows()
    ) + "."  # fmt: skip


def _tested(rows: pl.DataFrame, value: np.ndarray[Any, Any], rng: np.random.Generator) -> Carried:
    from nextstate.analysis.heads.recovery import carried

    n = rows["pair"].n_unique()
    base, patched, control = (
        rows[x].to_numpy().reshape(-1, n).T for x in ("base", "patched", "control_patched")
    )  # [pair head]
    return carried(patched - base, control - base, value, rng)


def _swept(run: Run[TransferConfig], model: LanguageModel, pairs: Sequence[TokenPair], given: Given) -> pl.DataFrame:
    """Patch each head by itself; return one row for each head and pair that the model gets right."""
    from nextstate.analysis.heads.config import CONTROL_ROUNDS
    from nextstate.analysis.heads.controls import control_prompts
    from nextstate.analysis.heads.patch import sweep
    from nextstate.analysis.heads.routing import baseline, prefers

    kind, made, rng = given.kind, given.made, run.rng("controls", given.kind, given.made.slug)
    right = [(i, pairs[i]) for i in prefers(*baseline(model, pairs)).nonzero()[0].tolist()]
    controls = control_prompts(model, right, lambda _: made.game.contrast(rng, kind, steps=given.steps), CONTROL_ROUNDS)
    pairs = [replace(pair, control=controls.get(i, ())) for i, pair in enumerate(pairs)]
    found = sweep(model, pairs, controls=bool(controls), vocabulary=False)
    kept = found.kept.nonzero()[0].tolist()
    if len(kept) < MIN_PAIRS:
        raise Skip(f"{model.name} gets {len(kept)} pairs of {given.made.slug} right, but {MIN_PAIRS} are needed")
    cells = [(layer, head) for layer in found.layers for head in range(found.patched.difference.shape[2])]
    columns = {"layer": [layer for layer, _ in cells], "head": [head for _, head in cells]}
    unrelated = found.control_patched
    if unrelated is None:
        unrelated = np.full_like(found.patched.difference, np.nan)
    patched, control = (x[kept, ..., 0].reshape(len(kept), -1).T for x in (found.patched.difference, unrelated))
    rows = _rows(columns, kept, found.base.difference, found.source.difference, patched)
    return rows.with_columns(chooses=pl.col("pair").is_in(kept[::2]), control_patched=pl.Series(control.ravel()))


def _rows(columns: dict[str, Any], kept: Sequence[int], base: Any, source: Any, patched: Any) -> pl.DataFrame:
    """Return one row for each cell and pair; `patched` has axes [cell pair]."""
    n = len(patched)
    frame = pl.DataFrame({name: np.repeat(values, len(kept)) for name, values in columns.items()})
    return frame.with_columns(
        pair=pl.Series([int(i) for i in kept] * n), base=pl.Series([float(base[i]) for i in kept] * n),
        source=pl.Series([float(source[i]) for i in kept] * n), patched=pl.Series(np.ravel(patched).astype(float)),
    )  # fmt: skip


def top_heads(rows: pl.DataFrame, k: int) -> Heads:
    """Return the heads that change the mean logit difference most, over the pairs by which heads are chosen."""
    effect = (pl.col("patched") - pl.col("base")).mean().alias("effect")
    by_head = rows.filter("chooses").group_by("layer", "head").agg(effect)
    best = by_head.sort("effect", "layer", "head", descending=[True, False, False]).head(k)
    return tuple(best.select("layer", "head").iter_rows())


def random_sets(like: Heads, rows: pl.DataFrame, sets: int, rng: np.random.Generator) -> list[Heads]:
    """Draw sets of heads with as many of each layer as `like` has."""
    layers = sorted(layer for layer, _ in like)
    of = {layer: rows.filter(layer=layer)["head"].unique().sort().to_list() for layer in layers}

    def draw() -> Heads:
        chosen = {layer: rng.permutation(heads)[: layers.count(layer)].tolist() for layer, heads in of.items()}
        return tuple((layer, head) for layer, heads in chosen.items() for head in heads)

    return [draw() for _ in range(sets)]


def together(model: LanguageModel, pairs: Sequence[TokenPair], sets: Sequence[Heads]) -> np.ndarray[Any, Any]:
    """Patch all heads of a set at once, at the last token, from the clean into the corrupted run.

    Returns:
        The logit of the clean answer minus that of the corrupted one, [set pair].
    """
    from contextlib import ExitStack

    import torch

    from nextstate.analysis.heads.sweep import site_values

    out, lengths = np.full((len(sets), len(pairs)), np.nan), [len(pair.clean) for pair in pairs]
    batches = []
    for length in sorted(set(lengths)):
        mine, size = [i for i, n in enumerate(lengths) if n == length], max(1, model.batch_tokens // length)
        batches += [mine[k : k + size] for k in range(0, len(mine), size)]
    for rows in batches:
        clean, corrupted = (np.array([getattr(pairs[i], side) for i in rows]) for side in ("clean", "corrupted"))
        answers = torch.tensor([[pairs[i].answer, pairs[i].other] for i in rows], device=model.device)
        source = {layer: x[:, -1] for layer, x in site_values(model, clean, "head").items()}
        tokens = torch.from_numpy(corrupted).to(model.device)

        def patch(heads: list[int], clean: Any, x: Any) -> Any:
            x = x.clone()
            x[:, -1, heads] = clean[:, heads]
            return x

        for s, heads in enumerate(sets):
            with ExitStack() as stack, torch.no_grad():
                for layer in {layer for layer, _ in heads}:
                    mine = [head for at, head in heads if at == layer]
                    stack.enter_context(model.sites.hook("head", layer, partial(patch, mine, source[layer])))
                logits = model.forward.plain(tokens, [tokens.shape[1] - 1], answers)[:, 0].float()
            out[s, rows] = (logits[:, 0] - logits[:, 1]).cpu().numpy()
    return out


def _ratio(rows: pl.DataFrame) -> stats.Ratio:
    """Return patched - base of each pair and cell, and source - base of each pair."""
    n = rows["pair"].n_unique()
    base, source, patched = (rows[x].to_numpy().reshape(-1, n) for x in ("base", "source", "patched"))
    return (patched - base).T, source[0] - base[0]


def _compared(rows: pl.DataFrame, rng: np.random.Generator) -> dict[str, Any]:
    """Return how much the heads of another game recover, beside the game's own and random sets."""
    top, gap = _ratio(rows)
    sets = rows.select("set", "heads").to_numpy()[:: len(gap)]
    band = stats.ratio_band((np.column_stack([top[:, 0], top[:, 1], top[:, 0] - top[:, 1]]), gap), rng)
    random = top[:, 2:].mean(0) / gap.mean()
    numbers = {
        f"{name}{end}": float(ends[i])
        for i, name in enumerate(("recovery", "own", "difference"))
        for end, ends in zip(_ENDS, (band.value, band.low, band.high), strict=True)
    }
    low, high = stats.percentiles(random)
    more = {"random": float(random.mean()), "random_low": float(low), "random_high": float(high), "pairs": len(gap)}
    p = (1 + int((random >= band.value[0]).sum())) / (1 + len(random))
    shared = len(set(sets[0][1].split()) & set(sets[1][1].split()))
    return numbers | more | {"p": p, "shared": shared, "heads": sets[0][1], "own_heads": sets[1][1]}


def _matrix(transfer: pl.DataFrame, kind: Any) -> Any:
    import plotly.graph_objects as go

    from nextstate.analysis.figures import DARK, LIGHT, SCALE, TURN, layout

    mine = transfer.filter(kind=kind)
    games = mine["pairs_of"].unique(maintain_order=True).to_list()[::-1]
    values = {(a, b): x for a, b, x in mine.select("heads_of", "pairs_of", "recovery").iter_rows()}
    values |= {(b, b): x for b, x in mine.select("pairs_of", "own").iter_rows()}
    known = [(a, b, x) for (a, b), x in values.items()]
    ink = [LIGHT if x >= TURN else DARK for _, _, x in known]
    bar = {"thickness": 10, "outlinewidth": 0}
    traces = [
        go.Heatmap(
            x=games, y=games, z=[[values.get((a, b)) for b in games] for a in games], colorscale=SCALE, zmin=0, zmax=1,
            xgap=1, ygap=1, hovertemplate="heads of %{y}, pairs of %{x}<br>%{z:.3f}<extra></extra>", colorbar=bar,
        ),
        go.Scatter(
            x=[b for _, b, _ in known], y=[a for a, _, _ in known], text=[f"{x:.2f}" for _, _, x in known], mode="text",
            textfont={"size": 11, "color": ink}, hoverinfo="skip", showlegend=False,
        ),
    ]  # fmt: skip
    axis = {"type": "category", "showgrid": False, "range": [-0.5, len(games) - 0.5]}
    title = f"Recovery by {kind} heads, patched together"
    return go.Figure(traces, layout(title, 60 * len(games) + 120, "pairs of", "heads of", xaxis=axis, yaxis=axis))
