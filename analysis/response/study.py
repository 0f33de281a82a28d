"""The response study: changes of all later tokens in every layer after a weak push on one token.

Tables: `windows/PRECISION` and `exact`, the scale-invariant windows and the limit at strength 0; for each condition and
direction `signature/` and `matrix/`; `scores` and `heads/PART`, scores of heads and the signature that remains without
each; for each game and kind of pairs `edges/`, `bridge/` and `bridge_heads/`. Without a window, tables are empty.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from nextstate.analysis.response.config import (
    CONDITIONS,
    HALF,
    KINDS,
    PRECISIONS,
    RANDOM,
    Bridge,
    ResponseConfig,
    bridges_of,
    patched,
)
from nextstate.analysis.run import Run
from nextstate.analysis.study import Job, Study

if TYPE_CHECKING:
    from nextstate.analysis.page.page import Page
    from nextstate.analysis.response.bridge import Transcript
    from nextstate.analysis.response.induction import Repeated
    from nextstate.analysis.response.window import Window

PARTS = 8  # jobs of the head ablations, so that an interrupted run can be resumed
SHOWN = 24  # heads of a patching run that are ablated on transcripts
Tables = pl.DataFrame | dict[str, pl.DataFrame]


class ResponseStudy(Study[ResponseConfig]):
    """Measure the responses of a language model to weak pushes on single tokens."""

    name = "response"
    config = ResponseConfig

    def jobs(self, config: ResponseConfig) -> list[Job]:
        bridges, other = bridges_of(config), patched(config)
        for one in bridges:  # raises before anything is written if the game cannot make such pairs
            one.draw(np.random.default_rng(0), 1)
        jobs: list[Job] = []

        def add(key: str, title: str, cost: int, do: Callable[..., Tables], *needs: str) -> None:
            jobs.append(Job(key, title, cost, do, needs, config.agent))

        for dtype in PRECISIONS:
            title = f"window in {'the precision of the model' if dtype == 'own' else dtype}"
            add(f"windows/{dtype}", title, 2, partial(_window, dtype), *(["windows/own"] if jobs else []))
        add("exact", "the exact limit", 2, _exact, "windows/own")
        for condition in CONDITIONS:
            for kind in KINDS:
                title, do = f"response of {condition} blocks, {kind}", partial(_signature, condition, kind)
                add(f"signature/{condition}-{kind}", title, 1, do, "windows/own")
        add("scores", "scores of the heads", 1, _scores, "windows/own")
        for part in range(PARTS):
            title = f"heads left out, part {part + 1} of {PARTS}"
            add(f"heads/{part}", title, 3, partial(_heads, part), "windows/own")
        for one in bridges:
            add(f"edges/{one.key}", f"window on {one.title}", 1, partial(_edges, one), "windows/own")
            cost = one.config.pairs
            add(f"bridge/{one.key}", f"bridge to {one.title}", cost, partial(_bridge, one), f"edges/{one.key}")
            if other is not None and other.config.game == one.config.game:
                title = f"heads of the bridge to {one.title}"
                add(f"bridge_heads/{one.key}", title, cost, partial(_bridge_heads, one), f"edges/{one.key}")
        return jobs

    def identity(self, job: Job, run: Run[ResponseConfig]) -> dict[str, Any]:
        found = run.asks(run.config.model)
        other = run.once(
            "patching", lambda: patched(run.config, found["model"]["files"])
        )  # refused before the first job
        if other is None or not job.key.startswith("bridge_heads/"):
            return found
        return found | {"patching": other.about["summary/heads"]["content"]}

    def do(self, job: Job, run: Run[ResponseConfig]) -> Tables:
        found: Tables = job.given(run)
        return found

    def metrics(self, job: Job, frame: pl.DataFrame) -> dict[str, float | None]:
        if not job.key.startswith("windows/") or frame.is_empty():
            return {}
        from nextstate.analysis.response.tables import precision_rows

        rows = precision_rows(frame).rows(named=True)
        return {f"window/{row['dtype']}/{row['kind']}/{end}": row[end] for row in rows for end in ("low", "high")}

    def summarise(self, run: Run[ResponseConfig]) -> dict[str, pl.DataFrame]:
        from nextstate.analysis.response.tables import summaries

        return summaries(run)

    def headline(self, run: Run[ResponseConfig]) -> pl.DataFrame:
        windows = run.summary("precisions").filter(kind=RANDOM)
        rows = windows.select(precision="dtype", weakest="low", strongest="high", layers="layers", of="of")
        added = run.summary("added").filter(kind=RANDOM, at="before").select("layer", "value", "band_low", "band_high")
        found = run.summary("signature").filter(kind=RANDOM).join(added, left_on="deepest", right_on="layer")
        names = {"signature": "value", "signature_low": "band_low", "signature_high": "band_high"}
        names |= {"from_layer": "emerges"}  # by the same band
        own = found.select(precision=pl.lit(windows["dtype"][0]), **names)
        return rows.join(own, on="precision", how="left", maintain_order="left")

    def page(self, run: Run[ResponseConfig]) -> Page:
        from nextstate.analysis.response.page import page

        return page(run)


def _model(run: Run[ResponseConfig]) -> Any:
    return run.model(run.config.model)


def _blocks(run: Run[ResponseConfig]) -> Repeated:
    """Draw the prompts of repeated blocks and their controls."""
    from nextstate.analysis.response.induction import repeated, vocabulary_of

    config, model = run.config, _model(run)
    model.sites.check("resid_pre", config.layer)
    return repeated(
        model, run.rng("blocks"), block=config.block, repeats=config.repeats, prompts=config.prompts,
        vocabulary=vocabulary_of(model, config.alphabet),
    )  # fmt: skip


def _directions(run: Run[ResponseConfig], prompts: int, *names: str) -> Any:
    from nextstate.analysis.response.measure import unit_directions

    return unit_directions(run.rng("directions", *names), prompts, run.config.directions, _model(run).sites.hidden)


def _first(run: Run[ResponseConfig], n: int) -> tuple[Repeated, dict[str, Any]]:
    """Return the first `n` prompts, and the arguments of their pushes."""
    config = run.config
    given, push = run.once("blocks", lambda: _blocks(run)), _directions(run, config.prompts, "blocks")
    few = replace(given, tokens=given.tokens[:n], control=given.control[:n])
    return few, {"directions": push[:n], "max_bytes": config.max_bytes}


def _windows(run: Run[ResponseConfig]) -> dict[str, Window]:
    """Return the windows of the model in its own precision, by kind of direction."""
    from nextstate.analysis.response.window import restored

    rows = run.table("windows/own")
    return {kind: restored(rows.filter(kind=kind)) for kind in KINDS}


def _window(dtype: str, run: Run[ResponseConfig]) -> pl.DataFrame:
    """Measure the windows in a precision; the table is empty if it is the model's own, which is already measured."""
    import torch

    from nextstate.agents.language import LanguageModel
    from nextstate.agents.sites import Sites
    from nextstate.analysis.response.branches import ResponseError, dtype_of
    from nextstate.analysis.response.measure import responses
    from nextstate.analysis.response.window import COLUMNS, window

    config, model = run.config, _model(run)
    own, twin, strengths, nothing = dtype_of(model), model, config.strengths, pl.DataFrame(schema=COLUMNS)
    if dtype == own:
        return nothing
    if dtype != "own":
        kind = getattr(torch, dtype)
        strengths = [s for s in strengths if s > float(torch.finfo(kind).eps)]
        if len(strengths) < 3:
            run.warn(f"{dtype} has no window: fewer than three strengths are above its rounding")
            return nothing
        loaded = copy.deepcopy(model.model).to(kind)
        twin = LanguageModel(model.name, loaded=(loaded, model.tokenizer))
        twin.sites = Sites.of(loaded, model.sites.names)
    given, how = _first(run, config.window_prompts)
    found = responses(twin, given.tokens, strengths=strengths, layer=config.layer, **how)
    flat = {kind: window([found], kind, flat=config.flat, alike=config.alike) for kind in KINDS}
    run.describe_model(model)
    if dtype != "own":
        (known,) = (a for a in run.record["agents"] if a["name"] == model.name)
        proved = twin.describe()["certificates"]
        run.describe(known | {"certificates": [c | {"dtype": dtype} for c in proved]})
    elif own in HALF and not any(w.common for w in flat.values()):
        raise ResponseError(
            f"{model.name} has no scale-invariant window in {own}, in any layer or direction: rounding and saturation "
            "overlap; load it with dtype=float32"
        )
    return pl.concat([flat[kind].table(own if dtype == "own" else dtype) for kind in KINDS])


def _exact(run: Run[ResponseConfig]) -> pl.DataFrame:
    """Measure the limit at strength 0, and the relative error of the response at the strength used."""
    from nextstate.analysis.response.measure import exact, responses
    from nextstate.analysis.response.tables import exact_rows

    config, model = run.config, _model(run)
    given, how = _first(run, config.window_prompts)
    how["layer"] = config.layer
    limit, parts = exact(model, given.tokens, **how), []
    for kind, edges in _windows(run).items():
        used = None if edges.middle is None else responses(model, given.tokens, strengths=(edges.middle,), **how)
        parts.append(exact_rows(kind, limit, used))
    return pl.concat(parts)


def _signature(condition: str, kind: str, run: Run[ResponseConfig]) -> Tables:
    """Measure matrices and offsets of repeated prompts or controls, at a strength in the window."""
    from nextstate.analysis.response.induction import averaged, profile
    from nextstate.analysis.response.measure import responses
    from nextstate.analysis.response.tables import MATRIX, SIGNATURE, matrix_rows, profile_rows

    config, strength, name = run.config, _windows(run)[kind].middle, f"{condition}-{kind}"
    found = {f"signature/{name}": pl.DataFrame(schema=SIGNATURE), f"matrix/{name}": pl.DataFrame(schema=MATRIX)}
    if strength is None:
        return found
    given, how = _first(run, config.prompts)
    along = kind == "along"
    measured = responses(
        _model(run), given.tokens if condition == "repeated" else given.control, strengths=(strength,), along=along,
        layer=config.layer, **(how | {"directions": None} if along else how),
    )  # fmt: skip
    run.describe_model(_model(run))
    value, share = (averaged(measured, kind, relative) for relative in (False, True))
    offsets, shares = (profile(x[:, :, given.sources], given) for x in (value, share))
    return {
        f"signature/{name}": profile_rows(measured.layers, offsets, shares, measured.control),
        f"matrix/{name}": matrix_rows(measured.layers, value),
    }


def _deep(edges: Window) -> float | None:
    """Return the strength to measure at, or None if it is outside the window of the last layer."""
    return edges.middle if edges.middle is not None and edges.layers[-1] in edges.holds(edges.middle) else None


def _scores(run: Run[ResponseConfig]) -> pl.DataFrame:
    """Score the attention and values of each head on repeated blocks."""
    from nextstate.analysis.attention import copying, prefix_matching
    from nextstate.analysis.response.tables import SCORES, score_rows

    if _deep(_windows(run)[RANDOM]) is None:
        return pl.DataFrame(schema=SCORES)
    few, _ = _first(run, run.config.head_prompts)
    return score_rows(*(f(_model(run), few.tokens, few.block, few.lead) for f in (prefix_matching, copying)))


def _heads(part: int, run: Run[ResponseConfig]) -> pl.DataFrame:
    """Ablate each head of some layers alone, and measure the remaining signature after the last layer."""
    from nextstate.analysis.response.induction import head_excess
    from nextstate.analysis.response.tables import LEFT, left_rows

    config, strength, rows = run.config, _deep(_windows(run)[RANDOM]), [pl.DataFrame(schema=LEFT)]
    if strength is not None:
        model = _model(run)
        few, how = _first(run, config.head_prompts)
        for layer in map(int, np.array_split(model.sites.layers_with("head"), PARTS)[part]):
            run.progress.on(f"without each head of layer {layer}")
            rows.append(left_rows(layer, head_excess(model, few, layer, strength=strength, ablation=config.ablation,
                                                     injected=config.layer, **how)))  # fmt: skip
    return pl.concat(rows)


def _transcripts(one: Bridge, run: Run[ResponseConfig]) -> list[tuple[Transcript, Any]]:
    """Return transcripts, each with the directions in which its tokens are pushed."""
    from nextstate.analysis.response.bridge import transcripts

    def draw() -> list[tuple[Transcript, Any]]:
        chosen = transcripts(_model(run).encoder, one.draw(run.rng("bridge", one.name)))
        push = _directions(run, len(chosen), "bridge", one.name)
        return [(each, push[i : i + 1]) for i, each in enumerate(chosen)]

    return run.once(("transcripts", one.name), draw)


def _edges(one: Bridge, run: Run[ResponseConfig]) -> pl.DataFrame:
    """Measure the windows of pushes on transcripts."""
    from nextstate.analysis.response.branches import dtype_of
    from nextstate.analysis.response.bridge import pushed
    from nextstate.analysis.response.window import window

    config, model = run.config, _model(run)
    found = [
        pushed(model, each, strengths=config.strengths, directions=push, layer=config.layer, max_bytes=config.max_bytes)
        for each, push in _transcripts(one, run)[: config.window_prompts]
    ]
    return window(found, flat=config.flat, alike=config.alike).table(dtype_of(model))


def _bridge(one: Bridge, run: Run[ResponseConfig]) -> pl.DataFrame:
    """Measure the response of the answering token to pushes on each role of the transcripts."""
    from nextstate.analysis.response.bridge import COLUMNS, pushed, role_rows
    from nextstate.analysis.response.window import restored

    config, strength = run.config, restored(run.table(f"edges/{one.key}")).middle
    rows = [pl.DataFrame(schema=COLUMNS)]
    if strength is not None:
        for each, push in _transcripts(one, run):
            found = pushed(_model(run), each, strengths=[strength], directions=push, layer=config.layer,
                           max_bytes=config.max_bytes)  # fmt: skip
            rows.append(role_rows(each, found))
            run.advance(1)
        run.describe_model(_model(run))
    return pl.concat(rows)


def _bridge_heads(one: Bridge, run: Run[ResponseConfig]) -> pl.DataFrame:
    """Measure the response without each of the heads with the largest recoveries in the patching run."""
    from nextstate.analysis.response.bridge import response_without
    from nextstate.analysis.response.tables import BRIDGE_HEADS, bridge_head_rows
    from nextstate.analysis.response.window import restored

    config, strength = run.config, _deep(restored(run.table(f"edges/{one.key}")))
    other = patched(run.config)
    assert other is not None
    top = other.summary("heads").sort(pl.max_horizontal(pl.col("state", "action").abs()), descending=True)
    top = top.head(SHOWN).select("layer", "head", "state", "action")
    if strength is None or top.is_empty():
        return pl.DataFrame(schema=BRIDGE_HEADS)
    chosen, push = zip(*_transcripts(one, run), strict=True)
    lost = response_without(
        _model(run), chosen, top.select("layer", "head").rows(), strength=strength, ablation=config.ablation,
        layer=config.layer, directions=np.concatenate(push), max_bytes=config.max_bytes,
    )  # fmt: skip
    return bridge_head_rows(top, lost)
