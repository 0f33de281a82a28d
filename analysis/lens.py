"""The logit lens: the answer to each question, read off the residual stream after each block of a model.

The stream at the answering token goes straight to the model's own final norm and unembedding (nostalgebraist 2020,
"interpreting GPT: the logit lens"). Table: `answers/GAME`, one row for each layer and question; layer 0 is the stream
as it enters the first block. A question of which two choices begin with the same token has one row, without a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from pydantic import Field

from nextstate.agents.agent import AgentError, Prompt
from nextstate.agents.rollout import episodes_of, prompts_of, seeds_for
from nextstate.analysis import stats
from nextstate.analysis.grid import GridConfig, game_identity, games_of
from nextstate.analysis.run import ModelRunConfig, Run
from nextstate.analysis.study import Job, Skip, Study
from nextstate.envs.episode import check_steps

if TYPE_CHECKING:
    from torch import Tensor

    from nextstate.agents.language import LanguageModel
    from nextstate.agents.text import Encoder
    from nextstate.analysis.page.page import Page

ANSWERS: dict[str, Any] = {
    "layer": pl.Int64, "episode": pl.Int64, "step": pl.Int64, "question": pl.Int64, "p_accepted": pl.Float64,
    "logprob": pl.Float64, "correct": pl.Boolean, "rank": pl.Int64, "ceiling": pl.Float64, "chance": pl.Float64,
}  # fmt: skip
SHARE = 0.9  # of the last layer's accuracy, from which on the model counts as knowing


class LensGame(GridConfig):
    """A game over a grid of settings, and the episodes that are asked about."""

    steps: int = Field(12, ge=1, description="length of an episode")
    episodes: int = Field(24, ge=1, le=10_000, description="of each cell")


class LensConfig(ModelRunConfig):
    """Everything that decides what the logit lens finds."""

    games: list[LensGame] = Field(min_length=1, description="in which to look")


class Lens(Study[LensConfig]):
    """Read the answer off every layer: where does the model know the next state?"""

    name = "lens"
    config = LensConfig

    def jobs(self, config: LensConfig) -> list[Job]:
        jobs: list[Job] = []
        for entry in config.games:
            for made in games_of(entry):
                check_steps(made.game, entry.steps)
                given = made.game, entry.steps, seeds_for(config.seed, entry.episodes, len(jobs))
                cost = entry.steps * entry.episodes
                jobs.append(Job(f"answers/{made.slug}", made.slug, cost, given, agent=config.agent))
        return jobs

    def identity(self, job: Job, run: Run[LensConfig]) -> dict[str, Any]:
        return run.asks(run.config.model) | game_identity(job.given[0])

    def do(self, job: Job, run: Run[LensConfig]) -> pl.DataFrame:
        game, steps, seeds = job.given
        model: LanguageModel = run.model(run.config.model)
        episodes = episodes_of(game, seeds, steps)
        run.warn(model.episode_warnings(episodes[0]))
        rows: list[dict[str, Any]] = []
        for part in read_layers(model, [prompt for episode in episodes for prompt in prompts_of(episode)]):
            rows += part
            run.advance(len({(row["episode"], row["step"], row["question"]) for row in part}))
        if all(row["layer"] is None for row in rows):
            raise Skip(f"in none of {len(rows)} questions do the choices differ in one token")
        frame = pl.DataFrame(rows, schema=ANSWERS)
        return frame.sort("episode", "step", "question", "layer")

    def metrics(self, job: Job, frame: pl.DataFrame) -> dict[str, float | None]:
        last = frame.filter(pl.col("layer") == pl.col("layer").max())
        return {f"{job.title}/accuracy": last["correct"].cast(pl.Float64).mean()}  # type: ignore[dict-item]

    def summarise(self, run: Run[LensConfig]) -> dict[str, pl.DataFrame]:
        layers, games = [], []
        for game, rows in run.tables("answers/*").items():
            asked = rows.drop_nulls("layer")
            by = asked.group_by("episode", "layer").agg(hits=pl.col("correct").sum(), n=pl.len())
            cells = by.sort("episode", "layer").select("hits", "n").to_numpy().astype(float)
            hits, n = cells.reshape(by["episode"].n_unique(), -1, 2).transpose(2, 0, 1)
            share, ends = stats.pooled_share(hits, n, run.rng("lens", game))
            found = asked.group_by("layer").agg(pl.col("p_accepted", "rank", "ceiling", "chance").mean(), n=pl.len())
            found = found.sort("layer").with_columns(accuracy=share, accuracy_low=ends[0], accuracy_high=ends[1])
            layers.append(found.select(pl.lit(game).alias("game"), pl.all()))
            last = found.tail(1).select("n", "accuracy", "accuracy_low", "accuracy_high", "chance", "ceiling")
            more = {
                "game": game,
                "episodes": len(hits),
                "layers": found["layer"].max(),
                "knows_from": knows_from(found),
            }
            games.append({**more, **last.row(0, named=True), "left_out": rows["layer"].null_count()})
        schema = {"knows_from": pl.Int64}
        return {"layers": pl.concat(layers), "games": pl.DataFrame(games, schema_overrides=schema)}

    def headline(self, run: Run[LensConfig]) -> pl.DataFrame:
        ends = ("accuracy", "accuracy_low", "accuracy_high")
        return run.summary("games").select("game", *ends, "ceiling", "chance", "layers", "knows_from")

    def page(self, run: Run[LensConfig]) -> Page:
        from nextstate.analysis.page.page import Page, Section

        layers, games = run.summary("layers"), run.summary("games")
        lead = []
        for row in games.rows(named=True):
            where = f"after {row['knows_from']} of {row['layers']} blocks"
            if row["knows_from"] is None:
                where = "nowhere: the last layer is not above chance"
            lead.append(f"{row['game']}: the answer can be read off {where}.")
        text = (
            "Accuracy of the answer that the model's own final norm and unembedding read off the residual stream at "
            "the answering token, against the number of blocks that have run. The band is the 95 % interval over "
            "episodes. Dashed: the ceiling, which is the accuracy of an ideal reader of the transcript; dotted: "
            f"chance.\n\n“Knows from”: from there on accuracy is at least {round(100 * SHARE)} % of the last layer's. "
            "It is not given where the last layer's interval reaches down to chance. “Left out”: questions two of "
            "whose choices begin with the same token."
        )
        figures = [_figure(rows, game) for (game,), rows in layers.group_by("game", maintain_order=True)]
        words = {"logit lens": "What a model would answer if the blocks that are still to come were skipped."}
        sections = [Section("Accuracy by layer", text, figures, games), Section("All layers", table=layers)]
        return Page(f"{run.config.name}: {run.config.agent} through the logit lens", lead, sections, words)


def knows_from(layers: pl.DataFrame) -> int | None:
    """Return the first layer from which on accuracy is `SHARE` of the last layer's; None if that is not above chance.

    Args:
        layers: one row for each layer of one game, in order.
    """
    accuracy, last = layers["accuracy"].to_numpy(), layers.row(-1, named=True)
    if last["accuracy_low"] <= last["chance"]:
        return None
    below = np.flatnonzero(accuracy < SHARE * accuracy[-1])
    return int(layers["layer"][int(below[-1]) + 1 if len(below) else 0])


def _figure(rows: pl.DataFrame, game: Any) -> Any:
    import plotly.graph_objects as go

    from nextstate.analysis.figures import layout, plain, rgba

    x, colour = rows["layer"].to_list(), "#0072b2"
    band = [*rows["accuracy_high"], *rows["accuracy_low"][::-1]]
    flat = {"mode": "lines", "hoverinfo": "skip"}
    traces = [
        go.Scatter(x=x + x[::-1], y=band, fill="toself", fillcolor=rgba(colour, 0.18), line={"width": 0}, **flat),
        go.Scatter(x=x, y=rows["accuracy"].to_list(), name="accuracy", mode="lines+markers", line={"color": colour}),
        go.Scatter(x=x, y=rows["ceiling"].to_list(), name="ceiling", line={"color": "#009e73", "dash": "dash"}, **flat),
        go.Scatter(x=x, y=rows["chance"].to_list(), name="chance", line={"color": "#8c8c8c", "dash": "dot"}, **flat),
    ]
    ticks = {"dtick": 1 if len(x) <= 16 else 4, "showgrid": False}
    axes = {"xaxis": ticks, "yaxis": {"range": [0, 1.02]}}
    return go.Figure(traces, layout(plain(f"{game} (n = {rows['n'][0]})"), 320, "blocks", "accuracy", **axes))


# --- what is asked of the model


def read_layers(model: LanguageModel, prompts: Sequence[Prompt]) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of `ANSWERS`, for some of the questions at a time.

    Choices are compared at the first token in which they differ: the tokens that all begin with end the prompt.

    Raises:
        AgentError: a prompt is too long for the model, or see `lens`.
    """
    import torch

    from nextstate.analysis.heads.pairs import tokens_of

    by_length: dict[int, list[tuple[Prompt, tuple[int, ...], list[int]]]] = {}
    for prompt in prompts:
        found = next_tokens(model.encoder, prompt.asked.choices)
        if found is None:
            yield [dict.fromkeys(ANSWERS) | _place(prompt)]
            continue
        tokens = tokens_of(model.encoder, prompt) + found[0]
        by_length.setdefault(len(tokens), []).append((prompt, tokens, found[1]))
    if model.context is not None and max(by_length, default=0) > model.context:
        raise AgentError(
            f"a question needs {max(by_length):,} tokens, but {model.name} reads {model.context:,}: ask for fewer steps"
        )
    for length, questions in sorted(by_length.items()):
        size = max(1, model.batch_tokens // length)
        for part in (questions[k : k + size] for k in range(0, len(questions), size)):
            rows = []
            for layer, logits in enumerate(lens(model, torch.tensor([q[1] for q in part], device=model.device))):
                for (prompt, _, choices), own in zip(part, logits[:, None], strict=True):
                    logprobs = own[0, choices].float().log_softmax(0).double().cpu().numpy()
                    rows.append({"layer": layer} | _place(prompt) | _answer(prompt, logprobs))
            yield rows


def next_tokens(encoder: Encoder, choices: Sequence[str]) -> tuple[tuple[int, ...], list[int]] | None:
    """Return the tokens that all choices begin with, and for each choice the one after these; None if two are equal."""
    pieces = [encoder.piece(choice) for choice in choices]
    shared = tuple(tokens[0] for tokens in takewhile(lambda t: len(set(t)) == 1, zip(*pieces, strict=False)))
    after = [piece[len(shared)] for piece in pieces if len(piece) > len(shared)]
    return (shared, after) if pieces and len(set(after)) == len(pieces) else None


def _place(prompt: Prompt) -> dict[str, Any]:
    return {"episode": prompt.episode.seed, "step": prompt.step + 1, "question": prompt.question}


def _answer(prompt: Prompt, logprobs: np.ndarray[Any, Any]) -> dict[str, Any]:
    asked = prompt.asked
    accepted = list(asked.accepted)
    return {
        "p_accepted": float(np.exp(logprobs[accepted]).sum()), "logprob": float(logprobs[asked.truth]),
        "correct": int(logprobs.argmax()) in accepted,
        "rank": 1 + int((logprobs > logprobs[accepted].max()).sum()),
        "ceiling": prompt.episode.ceilings[prompt.step][prompt.question],
        "chance": asked.chance,
    }  # fmt: skip


def lens(model: LanguageModel, tokens: Tensor) -> Iterator[Tensor]:
    """Yield the logits that the model's head reads off the residual stream at the last token, [row vocabulary].

    First those of the stream as it enters the first block, then those after each block. To stay independent of the
    architecture, the model itself is run a second time on one token, with the output of its last block replaced.

    Args:
        model: any whose blocks are known.
        tokens: prompts of one length, [row token].

    Raises:
        AgentError: the last logits are not the model's own, so its head reads more than the last block's output.
    """
    from contextlib import ExitStack

    import torch

    from nextstate.analysis.heads.sweep import TOLERANCE

    sites, end = model.sites, model.sites.blocks[-1]
    streams: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda x: streams.__setitem__(layer, x[:, -1, 0])

    def output(_: Any, __: Any, out: Any) -> None:
        streams[sites.layers] = (out[0] if isinstance(out, tuple | list) else out)[:, -1]

    def head(stream: Tensor) -> Tensor:
        def replace(_: Any, __: Any, out: Any) -> Any:
            several = isinstance(out, tuple | list)
            new = stream.to(out[0].device if several else out.device)[:, None]
            return type(out)((new, *out[1:])) if several else new

        handle = end.register_forward_hook(replace)
        try:
            return model.forward.plain(tokens[:, -1:], [0])[:, 0]
        finally:
            handle.remove()

    with torch.no_grad():
        with ExitStack() as stack:
            for layer in range(sites.layers):
                stack.enter_context(sites.hook("resid_pre", layer, keep(layer)))
            stack.callback(end.register_forward_hook(output).remove)
            own = model.forward.plain(tokens, [tokens.shape[1] - 1])[:, 0]
        last = head(streams[sites.layers])
        apart = float((last - own).abs().max()) / max(1.0, float(own.max() - own.min()))
        if not apart <= TOLERANCE.get(own.dtype, 1e-1):  # so also where it is not a number
            raise AgentError(
                f"the head of {model.name} reads more than the last block's output: its logits are off by {apart:.2g} "
                "of their spread, so no answer can be read off a layer"
            )
        for layer in range(sites.layers):
            yield head(streams[layer])
        yield last
