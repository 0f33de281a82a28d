"""A response experiment: windows, response matrices, the induction signature and its heads, the bridge to the games."""

from __future__ import annotations

import copy
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from nextstate.agents.config import AgentConfig, Strict
from nextstate.agents.registry import load_model
from nextstate.envs.contrast import Pair
from nextstate.envs.games import make_game
from nextstate.folder import (
    ExperimentError,
    Progress,
    RunConfig,
    begin,
    now,
    of_one_model,
    remembered,
    write_json,
    write_parquet,
)

SHOWN = 24  # heads of a patching run that are looked at again


class BridgeConfig(Strict):
    """Transcripts of a game: the clean sides of its minimal pairs."""

    game: str
    settings: dict[str, Any] = {}
    kinds: list[Literal["state", "action", "name", "noop"]] = Field(default=["state"], min_length=1)
    pairs: int = Field(16, ge=2, le=100_000, description="of each kind")
    steps: int | None = Field(None, ge=1)


class ResponseConfig(RunConfig):
    """Everything that decides what a response run finds."""

    model: str | AgentConfig
    block: int = Field(24, ge=3, description="random tokens in a block, no two the same")
    repeats: int = Field(2, ge=2)
    prompts: int = Field(16, ge=2, le=10_000, description="with repeated blocks, and as many controls")
    alphabet: list[str] = Field(default=[], description="texts of one token to draw from; by default all tokens")
    layer: int = Field(0, ge=0, description="whose input is pushed; 0 is the embedding")
    directions: int = Field(3, ge=1, le=1000, description="random ones, for each prompt others")
    strengths: list[float] = Field(
        default=[float(f"{x:.4g}") for x in np.geomspace(1e-4, 1, 8)], min_length=3,
        description="shares of the norm of what is pushed, in rising order",
    )  # fmt: skip
    window_prompts: int = Field(2, ge=1, description="on which the windows are measured")
    head_prompts: int = Field(8, ge=2, description="on which heads are left out, at most")
    flat: float = Field(0.05, gt=0, description="largest slope of log response against log strength in a window")
    alike: float = Field(0.99, gt=0, le=1, description="smallest cosine between neighbouring strengths in a window")
    ablation: Literal["mean", "zero"] = "mean"
    bridge: list[BridgeConfig] = []
    patching: str | None = Field(None, description="folder of a patching run of the same model, to compare heads with")
    resamples: int = Field(2000, ge=100, le=100_000)
    max_gigabytes: float = Field(2.0, gt=0, description="bound on the memory of a pass beside the model")

    @model_validator(mode="after")
    def _fits(self) -> ResponseConfig:
        if self.strengths != sorted(set(self.strengths)) or self.strengths[0] <= 0:
            raise ValueError(f"strengths={self.strengths} are not possible: expected rising ones above 0")
        if self.window_prompts > self.prompts:
            raise ValueError(f"window_prompts={self.window_prompts} is more than prompts={self.prompts}")
        return self

    @property
    def max_bytes(self) -> int:
        """The bound in bytes."""
        return int(self.max_gigabytes * 2**30)


def draw(config: ResponseConfig) -> dict[str, list[Pair]]:
    """Draw the pairs whose clean sides the bridge reads, by game and kind.

    Raises:
        GameError: a game cannot make such pairs.
        ExperimentError: one game and kind is asked for twice.
    """
    out: dict[str, list[Pair]] = {}
    for entry in config.bridge:
        game = make_game(entry.game, **entry.settings)
        for kind in entry.kinds:
            name = f"{entry.game}-{kind}"
            if name in out:
                raise ExperimentError(f"bridge asks for {kind} pairs of {entry.game} twice; give each once")
            rng = _rng(config.seed, "bridge", name)
            out[name] = [game.contrast(rng, kind, steps=entry.steps) for _ in range(entry.pairs)]
    return out


def _rng(seed: int, *names: str) -> np.random.Generator:
    return np.random.default_rng([seed, *(zlib.crc32(name.encode()) for name in names)])


def run(
    config: ResponseConfig, out: Path, progress: Progress | None = None, command: str = "", model: Any = None
) -> Path:
    """Run a response experiment, or finish one that was begun in `out`; return the report page.

    Args:
        config: what to do.
        out: the run's folder.
        progress: told what goes on.
        command: that began it, for `run.json`.
        model: a `LanguageModel` to use instead of loading the one that the config names.

    Raises:
        ExperimentError: `out` belongs to another config.
        ModelFailed: the model cannot be loaded, or its responses not measured; the message says why, and so does
            `run.json`.
        GameError, RunError: something asked for cannot be.
    """
    from nextstate.agents.sites import SiteError
    from nextstate.analysis.heads.tables import load
    from nextstate.analysis.response import ResponseError

    drawn = draw(config)  # before anything is written
    patched = load(Path(config.patching)) if config.patching else None
    record = begin(config, [{"bridge": name, "pairs": len(pairs)} for name, pairs in drawn.items()], out, command)
    name = config.model if isinstance(config.model, str) else config.model.name

    def do() -> Path:
        return _Run(config, out, progress or Progress(), record, model, patched).go(drawn)

    return of_one_model(do, name if model is None else model.name, out, record, ResponseError, SiteError)


class _Run:
    """A run while it goes on. Each stage writes a table, and is skipped where that is there."""

    def __init__(
        self, config: ResponseConfig, out: Path, progress: Progress, record: dict[str, Any], model: Any, patched: Any
    ) -> None:
        from nextstate.analysis import log

        self.config, self.out, self.progress, self.record, self.patched = config, out, progress, record, patched
        self.began, self.before = time.monotonic(), float(record["seconds"])
        progress.on("loading the model")
        self.model: Any = load_model(config.model) if model is None else model
        if patched is not None and patched.info["agents"][0]["name"] != self.model.name:
            raise ExperimentError(
                f"patching={config.patching} is a run of {patched.info['agents'][0]['name']}, expected one of "
                f"{self.model.name}"
            )
        self.describe()
        for warning in self.model.warnings():
            self.remark(warning)
        self.log = log.Log(config.wandb)
        self.log.start(out, config.name, config.model_dump())

    def note(self, **changes: Any) -> None:
        self.record.update(changes, seconds=round(self.before + time.monotonic() - self.began, 1))
        write_json(self.out / "run.json", self.record)

    def describe(self, *more: dict[str, Any]) -> None:
        """Write down what is known of the model, and more that was proved of copies of it."""
        sites, found = self.model.sites, self.model.describe()
        size = {"layers": sites.layers, "heads": sites.heads, "layers_with_heads": len(sites.layers_with("head"))}
        found |= size | {"certificates": [*found["certificates"], *more]}
        self.note(agents=[remembered(self.record["agents"], found)])

    def path(self, name: str) -> Path:
        return self.out / "response" / f"{name}.parquet"

    def directions(self, *names: str, prompts: int) -> Any:
        from nextstate.analysis.response import unit_directions

        rng = _rng(self.config.seed, "directions", *names)
        return unit_directions(rng, prompts, self.config.directions, self.model.sites.hidden)

    def go(self, drawn: dict[str, list[Pair]]) -> Path:
        from nextstate.analysis import response_report
        from nextstate.analysis.response_bridge import transcripts
        from nextstate.analysis.response_induction import repeated, vocabulary_of
        from nextstate.analysis.response_tables import load

        config, model = self.config, self.model
        model.sites.check("resid_pre", config.layer)
        given = repeated(
            model, _rng(config.seed, "blocks"), block=config.block, repeats=config.repeats, prompts=config.prompts,
            vocabulary=vocabulary_of(model, config.alphabet),
        )  # fmt: skip
        told = {name: transcripts(model.encoder, pairs) for name, pairs in drawn.items()}
        self.progress.begin(self.steps(told))
        main = self.windows(given)
        half = self.record["agents"][0]["dtype"] in ("bfloat16", "float16")
        if half and not any(w.common for w in main.values()):
            from nextstate.analysis.response import ResponseError

            raise ResponseError(
                f"{model.name} has no scale-invariant window in {self.record['agents'][0]['dtype']}, in no layer and "
                "direction: rounding and saturation meet; load it with dtype=float32"
            )
        self.exact(given, main)
        self.signature(given, main)
        self.describe()
        random = main["random"]
        deep = random.middle is not None and random.layers[-1] in random.holds(random.middle)
        if deep:
            self.heads(given, random.middle)
        for name, chosen in told.items():
            flat = self.bridge(name, chosen)
            if name in self.compared(told) and flat.middle is not None:
                self.bridge_heads(name, chosen, flat)
            self.describe()
        self.progress.on("report")
        self.note(finished=now())
        page = response_report.write(self.out)
        self.log.close(response_report.mirrored(load(self.out)) if config.wandb != "disabled" else {})
        return page

    def steps(self, told: dict[str, list[Any]]) -> int:
        """Return how often the progress bar advances."""
        bridges = sum(map(len, told.values())) + len(self.compared(told))
        return 6 + 2 * len(self.dtypes()) + len(self.model.sites.layers_with("head")) + bridges

    def compared(self, told: dict[str, list[Any]]) -> list[str]:
        """Return the transcripts of the game that patching was done on."""
        return [n for n in told if self.patched is not None and n.split("-")[0] == self.patched.info["config"]["game"]]

    def dtypes(self) -> list[str]:
        return list(dict.fromkeys([self.record["agents"][0]["dtype"], "float32", "bfloat16"]))

    def windows(self, given: Any) -> dict[str, Any]:
        """Measure windows side by side in the model's own precision, float32 and bfloat16; return those of its own."""
        import torch

        from nextstate.agents.language import LanguageModel
        from nextstate.agents.sites import Sites
        from nextstate.analysis.response import responses
        from nextstate.analysis.response_window import KINDS, restored, window

        config, own = self.config, self.dtypes()[0]
        n = config.window_prompts
        push = self.directions("blocks", prompts=config.prompts)[:n]
        for dtype in self.dtypes():
            path, kind = self.path(f"windows-{dtype}"), getattr(torch, dtype)
            self.progress.on(f"window in {dtype}")
            if not path.exists():
                twin = self.model
                strengths = config.strengths
                if dtype != own:
                    loaded = copy.deepcopy(self.model.model).to(kind)
                    twin = LanguageModel(self.model.name, loaded=(loaded, self.model.tokenizer))
                    twin.sites = Sites.of(loaded, self.model.sites.names)
                    strengths = [s for s in strengths if s > float(torch.finfo(kind).eps)]
                    if len(strengths) < 3:
                        self.remark(f"{dtype} has no window: fewer than three strengths are above its rounding")
                        self.progress.advance(2)
                        continue
                found = responses(twin, given.tokens[:n], directions=push, strengths=strengths, layer=config.layer,
                                  max_bytes=config.max_bytes)  # fmt: skip
                flat = {k: window([found], k, flat=config.flat, alike=config.alike) for k in KINDS}
                write_parquet(path, pl.concat([flat[k].table(dtype) for k in KINDS]))
                proved = twin.describe()["certificates"] if dtype != own else []
                self.describe(*(c | {"dtype": dtype} for c in proved))
            rows = pl.read_parquet(path)
            for k in KINDS:
                edges = restored(rows.filter(kind=k))
                ends = (edges.common[0], edges.common[-1]) if edges.common else (None, None)
                self.log.cell({f"window/{dtype}/{k}/low": ends[0], f"window/{dtype}/{k}/high": ends[1]})
            self.progress.advance(2)
        rows = pl.read_parquet(self.path(f"windows-{own}"))
        return {k: restored(rows.filter(kind=k)) for k in KINDS}

    def remark(self, text: str) -> None:
        if text not in self.record["remarks"]:
            self.progress.warn(text)
            self.note(remarks=[*self.record["remarks"], text])

    def exact(self, given: Any, main: dict[str, Any]) -> None:
        """Measure the limit of no strength, and how far the strength that is used is from it."""
        from nextstate.analysis.response import exact, responses
        from nextstate.analysis.response_tables import exact_rows
        from nextstate.analysis.response_window import KINDS

        config, n, path = self.config, self.config.window_prompts, self.path("exact")
        self.progress.on("the exact limit")
        if not path.exists():
            push = self.directions("blocks", prompts=config.prompts)[:n]
            limit = exact(self.model, given.tokens[:n], directions=push, layer=config.layer, max_bytes=config.max_bytes)
            parts = []
            for kind in KINDS:
                strength, found = main[kind].middle, None
                if strength is not None:
                    found = responses(self.model, given.tokens[:n], directions=push, strengths=(strength,),
                                      layer=config.layer, max_bytes=config.max_bytes)  # fmt: skip
                parts.append(exact_rows(kind, limit, found))
            write_parquet(path, pl.concat(parts))
        self.progress.advance(2)

    def signature(self, given: Any, main: dict[str, Any]) -> None:
        """Measure matrices and offsets of repeated prompts and controls, at a strength in the window."""
        from nextstate.analysis.response import responses
        from nextstate.analysis.response_induction import averaged, profile
        from nextstate.analysis.response_tables import matrix_rows, profile_rows

        config, push = self.config, self.directions("blocks", prompts=self.config.prompts)
        for condition, tokens in (("repeated", given.tokens), ("control", given.control)):
            for kind, edges in main.items():
                self.progress.on(f"response of {condition} blocks, {kind}")
                path = self.path(f"signature-{condition}-{kind}")
                if edges.middle is not None and not path.exists():
                    found = responses(
                        self.model, tokens, strengths=(edges.middle,), along=kind == "along", layer=config.layer,
                        directions=None if kind == "along" else push, max_bytes=config.max_bytes,
                    )  # fmt: skip
                    self.note(control=max(found.control, self.record.get("control", 0.0)))
                    both = [averaged(found, kind, relative) for relative in (False, True)]
                    offsets = [profile(value[:, :, given.sources], given) for value in both]
                    write_parquet(self.path(f"matrix-{condition}-{kind}"), matrix_rows(found.layers, both[0]))
                    write_parquet(path, profile_rows(found.layers, *offsets))
                self.progress.advance(1)

    def heads(self, given: Any, strength: float) -> None:
        """Leave out each head by itself, and see what is left of the signature after the last layer."""
        from nextstate.analysis.attention import copying, prefix_matching
        from nextstate.analysis.response_induction import head_excess
        from nextstate.analysis.response_tables import left_rows, score_rows

        config, n = self.config, self.config.head_prompts
        few = replace(given, tokens=given.tokens[:n], control=given.control[:n])
        push = self.directions("blocks", prompts=config.prompts)[:n]
        if not self.path("scores").exists():
            scores = (f(self.model, few.tokens, few.block, few.lead) for f in (prefix_matching, copying))
            write_parquet(self.path("scores"), score_rows(*scores))
        for layer in self.model.sites.layers_with("head"):
            self.progress.on(f"without each head of layer {layer}")
            path = self.path(f"left-{layer:03d}")
            if not path.exists():
                left = head_excess(
                    self.model, few, layer, strength=strength, directions=push, ablation=config.ablation,
                    injected=config.layer, max_bytes=config.max_bytes,
                )  # fmt: skip
                write_parquet(path, left_rows(layer, left))
            self.progress.advance(1)

    def bridge(self, name: str, chosen: list[Any]) -> Any:
        """Push the tokens of transcripts, and read the answering token; return the window on these transcripts."""
        from nextstate.analysis.response_bridge import pushed, role_rows
        from nextstate.analysis.response_window import restored, window

        config, path, edges = self.config, self.path(f"bridge-{name}"), self.path(f"edges-{name}")
        push = self.directions("bridge", name, prompts=len(chosen))
        more = {"layer": config.layer, "max_bytes": config.max_bytes}
        self.progress.on(f"bridge: {name.replace('-', ', ')} pairs")
        if not edges.exists():
            few = zip(chosen[: config.window_prompts], push, strict=False)
            wide = [pushed(self.model, one, strengths=config.strengths, directions=u[None], **more) for one, u in few]
            write_parquet(edges, window(wide, flat=config.flat, alike=config.alike).table(self.dtypes()[0]))
        flat = restored(pl.read_parquet(edges))
        if not path.exists() and flat.middle is not None:
            rows = []
            for one, u in zip(chosen, push, strict=True):
                rows.append(
                    role_rows(one, pushed(self.model, one, strengths=[flat.middle], directions=u[None], **more))
                )
                self.progress.advance(1)
            write_parquet(path, pl.concat(rows))
        else:
            self.progress.advance(len(chosen))
        return flat

    def bridge_heads(self, name: str, chosen: list[Any], edges: Any) -> None:
        """Do the same without each of the heads that patching names first."""
        from nextstate.analysis.response_bridge import response_without
        from nextstate.analysis.response_tables import bridge_head_rows

        path, found = self.path(f"bridgeheads-{name}"), self.patched.path / "heads.parquet"
        self.progress.on(f"heads of the bridge: {name.replace('-', ', ')} pairs")
        deep = edges.layers[-1] in edges.holds(edges.middle)  # the answer is read after the last layer
        if deep and found.is_file() and not path.exists():
            top = pl.read_parquet(found).sort(pl.max_horizontal(pl.col("state", "action").abs()), descending=True)
            heads = top.head(SHOWN).select("layer", "head").rows()
            lost = response_without(
                self.model, chosen, heads, strength=edges.middle, ablation=self.config.ablation,
                layer=self.config.layer, directions=self.directions("bridge", name, prompts=len(chosen)),
                max_bytes=self.config.max_bytes,
            )  # fmt: skip
            write_parquet(self.path("patching"), top.head(SHOWN).select("layer", "head", "state", "action"))
            write_parquet(path, bridge_head_rows(name, heads, lost))
        self.progress.advance(1)
