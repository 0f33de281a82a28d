"""What the paper says, and whether our models agree: one row for each statement that the models of a run can test.

"Physics of Language Models: Part 1" (arXiv 2305.13673), Results 1 to 13. Each statement has a direction: a number that
should be above a bound (0, or what a control gives), or near it. The verdict follows from the interval of the number
alone, by `verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import polars as pl

from nextstate.analysis.findings.verdict import Verdict
from nextstate.analysis.grammar.paper import Published, published, published_robustness
from nextstate.analysis.stats import Estimate, estimate, estimated_difference

AGREES, CONTRADICTS, OPEN = (verdict.value for verdict in Verdict)
HARD = "cfg3f"  # whose numbers show the differences between architectures, where a grammar has none of its own
NEAR = 0.03  # relative difference from the truth that counts as equal: the largest entropy in the paper is 2.7 % off
Tables = Mapping[str, pl.DataFrame]
Paper = tuple[float | None, str]  # a number of the paper, and the grammar that it is of
NONE: Paper = (None, "")


def verdict(found: Estimate, bound: float = 0.0, near: float | None = None) -> str:
    """Return whether a number agrees with a statement: that it is above `bound`, or with `near`, within +- near of it.

    It agrees if all of its interval does, contradicts if none of it does, and otherwise it cannot be said.
    """
    low, high = found.low - bound, found.high - bound
    if math.isnan(low) or math.isnan(high):
        return OPEN
    if near is None:
        return AGREES if low > 0 else CONTRADICTS if high < 0 else OPEN
    return AGREES if low > -near and high < near else CONTRADICTS if low > near or high < -near else OPEN


class Claim(NamedTuple):
    """A statement, and our number for it."""

    result: int  # of the paper
    claim: str
    model: str
    against: str  # the control or other model that the number is a difference from; "" for none
    found: Estimate
    paper: float | None = None  # the same number in the paper
    paper_of: str = ""  # the grammar that it is of
    bound: float = 0.0  # see `verdict`
    near: float | None = None


SCHEMA = {
    "result": pl.Int64, "claim": pl.String, "model": pl.String, "against": pl.String, "value": pl.Float64,
    "low": pl.Float64, "high": pl.Float64, "trainings": pl.Int64, "least": pl.Float64, "most": pl.Float64,
    "paper": pl.Float64, "paper_of": pl.String, "verdict": pl.String,
}  # fmt: skip


def claims(tables: Tables) -> pl.DataFrame:
    """Return all statements of the paper that the models of a run can test.

    Args:
        tables: the other tables of `summary/`.

    Returns:
        One row for each statement and model, by result. `value` with `low` and `high`: our number, over trainings, as
        `stats.estimate` and `stats.estimated_difference` have it; `least` and `most`: its range over trainings;
        `paper`: the paper's number, of the grammar `paper_of`, null where it has only a figure; `verdict`: agrees,
        contradicts or cannot be said.
    """
    evidence = _Evidence(tables)
    found = [claim for results in _RESULTS for claim in results(evidence)]
    rows = [
        (c.result, c.claim, c.model, c.against, *c.found[:6], c.paper, c.paper_of or None,
         verdict(c.found, c.bound, c.near))
        for c in found
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=SCHEMA, orient="row").fill_nan(None).sort("result", maintain_order=True)


class _Evidence:
    """Numbers of families of models."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        models = tables["models"].unique("family", keep="first", maintain_order=True)
        self.models: dict[str, dict[str, Any]] = {row["family"]: row for row in models.iter_rows(named=True)}
        self.grammar = str(tables["grammar"]["name"][0])

    @property
    def clean(self) -> list[str]:
        """Families that were trained on clean strings."""
        return [f for f, model in self.models.items() if not model["perturbation"] and not model["untrained"]]

    @property
    def control(self) -> str | None:
        return next((f for f, model in self.models.items() if model["untrained"]), None)

    def architecture(self, name: str) -> str | None:
        """Return the first clean family of an architecture."""
        return next((f for f in self.clean if self.models[f]["architecture"] == name), None)

    def of(
        self, table: str, family: str | None, value: str, ends: tuple[str, str] = ("low", "high"), **which: Any
    ) -> Estimate | None:
        """Return a number of a family; None where the run does not have it."""
        if family is None or table not in self.tables:
            return None
        rows = self.tables[table]
        names = self.tables["models"].filter(family=family)["name"].implode()
        own = rows.filter(pl.col("name").is_in(names), *(pl.col(k).eq_missing(pl.lit(v)) for k, v in which.items()))
        own = own.drop_nulls(value)
        within = (0.0, 1.0) if value == "accuracy" else (-math.inf, math.inf)
        low, high = (own[end].to_list() for end in ends)
        return estimate(own[value].to_list(), low, high, within) if len(own) else None

    def levels(self) -> range:
        """Return the levels between root and terminals."""
        return range(2, len(self.tables["grammar"]["levels"][0]))

    def paper(self, number: Callable[[Published], float | None]) -> Paper:
        """Return a number of the paper for this grammar, otherwise for `HARD`, and the grammar that it is of."""
        for name in (self.grammar, HARD):
            known = published(name)
            value = None if known is None else number(known)
            if value is not None:
                return value, name
        return NONE


def _less(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one - two


def _against(
    result: int, claim: str, model: str, other: str | None, both: Iterable[Estimate | None], paper: Paper = NONE
) -> Iterator[Claim]:
    one, two = both
    if other is not None and one is not None and two is not None:
        yield Claim(result, claim, model, other, estimated_difference(one, two), *paper)


def _generation(given: _Evidence) -> Iterator[Claim]:
    known = published(given.grammar)
    for family in given.clean if known is not None else ():
        kind = given.models[family]["architecture"]
        for prefix, words in (("nothing", "from nothing"), ("clean", "after a prefix")):
            own = given.of("generation", family, "accuracy", prefix=prefix, temperature=1.0)
            theirs = known.accuracy[prefix].get(kind) if known else None
            if own is not None and theirs is not None:
                yield Claim(1, f"share of strings in the grammar {words} is as published", family, "", own, theirs,
                            given.grammar, theirs, NEAR)  # fmt: skip
        own = given.of("diversity", family, "kl", ("kl_low", "kl_high"))
        theirs = known.kl.get(kind) if known else None
        if own is not None and theirs is not None:
            yield Claim(3, "divergence (nats per token) is as published, or up to twice as large", family, "", own,
                        theirs, given.grammar, theirs, theirs)  # fmt: skip
    absolute = given.architecture("absolute")
    for name in ("rotary", "relative", "position", "uniform"):
        other = given.architecture(name)
        if other is None or absolute is None:
            continue
        written = (given.of("generation", f, "accuracy", prefix="nothing", temperature=1.0) for f in (other, absolute))
        paper = given.paper(lambda p, name=name: p.accuracy["nothing"][name] - p.accuracy["nothing"]["absolute"])  # type: ignore[misc]
        yield from _against(1, "writes more strings of the grammar from nothing", other, absolute, written, paper)
        kl = (given.of("diversity", f, "kl", ("kl_low", "kl_high")) for f in (absolute, other))
        paper = given.paper(lambda p, name=name: p.kl["absolute"] - p.kl[name])  # type: ignore[misc]
        yield from _against(3, "diverges less from the exact next tokens", other, absolute, kl, paper)


def _diversity(given: _Evidence) -> Iterator[Claim]:
    known = published(given.grammar)
    for family in given.clean:
        theirs = known.bits.get(given.models[family]["architecture"]) if known else None
        paper = NONE if known is None or theirs is None else (theirs / known.truth - 1, given.grammar)
        for claim, table, number in (
            ("strings are as diverse as those of the grammar (relative excess of entropy)", "entropy", paper),
            ("rules of a symbol are used as evenly as in the grammar (the same)", "rules", NONE),
        ):
            own = given.of(table, family, "excess")
            if own is not None:
                yield Claim(2, claim, family, "", own, *number, near=NEAR)


def _probes(given: _Evidence) -> Iterator[Claim]:
    def accuracy(family: str | None, reach: str, where: str, level: int) -> Estimate | None:
        return given.of("probes", family, "accuracy", deepest=True, shuffled=False, target="ancestor", reach=reach,
                        where=where, level=level)  # fmt: skip

    def theirs(reach: str, where: str, level: int, one: str, two: str) -> Paper:
        def number(paper: Published) -> float | None:
            rows = paper.probes.get((reach, where), {})
            return _less(rows.get(one, {}).get(level), rows.get(two, {}).get(level))

        return given.paper(number) if len(given.levels()) == 5 else NONE

    control, masked = given.control, given.architecture("masked")
    for family in given.clean:
        kind = given.models[family]["architecture"]
        for level in given.levels():
            for result, reach, where, words in ((4, "full", "all", "all tokens"), (5, "diagonal", "ends", "ends")):
                both = (accuracy(f, reach, where, level) for f in (family, control))
                claim = f"states hold ancestors of level {level} at {words} ({reach} probe)"
                paper = theirs(reach, where, level, kind, "random")
                yield from _against(result, claim, family, control, both, paper)
    causal = given.architecture("rotary") or next((f for f in given.clean if f != masked), None)
    for level in (2, 3):
        if causal is not None and level in given.levels():
            both = (accuracy(f, "diagonal", "ends", level) for f in (causal, masked))
            claim = f"holds ancestors of level {level} at ends better than an encoder (diagonal probe)"
            paper = theirs("diagonal", "ends", level, given.models[causal]["architecture"], "masked")
            yield from _against(5, claim, causal, masked, both, paper)


_ATTENTION = (  # more than in an untrained network
    (6, "scales of heads differ (octaves, nearest to farthest)", "scales", "octaves", ("octaves_low", "octaves_high")),
    (7, "attention peaks at the ends of constituents", "peaks", "residual", ("low", "high")),
    (8, "attention from end to end peaks where both are ends", "centres", "residual", ("low", "high")),
    (9, "attention between ends falls with their distance", "falls", "residual", ("low", "high")),
    (10, "embeddings cluster by bag (AUC)", "embeddings", "auc", ("low", "high")),
)  # fmt: skip


def _attention(given: _Evidence) -> Iterator[Claim]:
    control = given.control
    for family in given.clean:
        if given.models[family]["architecture"] == "masked":
            continue  # the paper's statements are about causal models
        for result, claim, table, value, ends in _ATTENTION:
            mean = {"level": None} if table in ("peaks", "centres", "falls") else {}
            yield from _against(
                result, claim, family, control, (given.of(table, f, value, ends, **mean) for f in (family, control))
            )
        explained = given.of("scales", family, "explained", ("explained_low", "explained_high"))
        if explained is not None:
            yield Claim(6, "distance explains more than half of the variance of attention", family, "", explained,
                        bound=0.5)  # fmt: skip


def _robustness(given: _Evidence) -> Iterator[Claim]:
    temperatures = sorted(set(given.tables["generation"]["temperature"]))
    if not temperatures:
        return
    low, one = temperatures[0], 1.0

    def share(family: str | None, prefix: str, temperature: float) -> Estimate | None:
        return given.of("generation", family, "accuracy", prefix=prefix, temperature=temperature)

    def theirs(model: Mapping[str, Any], *which: tuple[str, float, bool]) -> Paper:
        """Return the difference of two numbers of the paper: prefix, temperature, and whether it is this model's."""
        found = []
        for prefix, temperature, own in which:
            known = published_robustness("cfg3b", prefix, temperature)
            values = known.get(model["perturbation"] if own else "", {})
            found.append(values.get(model["fraction"] if own else 0.0))
        value = _less(*found)
        return value, "" if value is None else "cfg3b"

    for family, model in given.models.items():
        if not model["perturbation"]:
            continue
        clean = given.architecture(model["architecture"])
        both = (share(f, "corrupted", low) for f in (family, clean))
        claim = f"continues corrupted prefixes better at temperature {low:g}"
        paper = theirs(model, ("corrupted", low, True), ("corrupted", low, False))
        yield from _against(11, claim, family, clean, both, paper)
        if 0 < model["fraction"] < 1:
            for better, worse in (("clean", "nothing"), ("nothing", "corrupted")):
                pair = [share(family, prefix, one) for prefix in (better, worse)]
                which = [(prefix, one, True) for prefix in (better, worse)]
                claim = ("writes better after clean prefixes than from nothing (temperature 1)" if better == "clean"
                         else "writes worse after corrupted prefixes than from nothing (temperature 1)")  # fmt: skip
                yield from _against(12, claim, family, "itself", pair, theirs(model, *which))
        if low < one:
            pair = [share(family, "nothing", t) for t in (low, one)]
            claim = f"writes better from nothing at temperature {low:g} than at 1"
            paper = theirs(model, ("nothing", low, True), ("nothing", one, True))
            yield from _against(13, claim, family, "itself", pair, paper)


_RESULTS = (_generation, _diversity, _probes, _attention, _robustness)
