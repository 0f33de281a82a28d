"""Every causal architecture of transformers, made tiny: is what the engine says what a plain forward pass says?

    python -m benchmarks.architectures [--quick] [--names gpt2,llama] [--out FILE.json] [--docs docs/architectures.md]

For each architecture a random model plays four jobs, far beyond its windows, and answers once by replay (all questions
of an episode at once) and once live (step by step). The truth is one forward pass over one row for each choice, with no
tree, no mask, no cache and no batch. `--quick` takes the architectures that stand for all kinds, and fewer questions.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer
from transformers.utils.logging import set_verbosity_error

from benchmarks.common import parse, versions
from nextstate.agents.agent import AgentError
from nextstate.agents.identity import BUILT_IN
from nextstate.agents.language import LanguageModel
from nextstate.agents.sites import SiteError
from nextstate.analysis.run import hardware
from tests.exactness import DFA, JOBS, ROADS, Job, measure, noise, tolerance, truths
from tests.zoo import BOTH_WAYS, FAST, NAMES, build

ORDER = ("tree", "fork", "step", "rows")
INTRODUCTION = """# Architectures

Which causal language models of transformers {transformers} are read exactly, and on which road.

`nextstate` reads a whole episode at once and scores every question in it. How far that can be shared between questions
depends on the model, so each model is first compared with its own plain forward passes, and takes the first road on
which they agree: **tree** (everything in one pass), **fork** (the transcript once, questions as rows that go on from a
copy of its state), **step** (the same, token by token) or **rows** (one row for each question). A model for
which none is exact is refused, with a reason. Where live sessions take another road, both are given, as `tree / rows`.

This table checks that comparison. For each architecture a tiny random model (2 to 4 layers, at least one of each
kind that it mixes; windows, chunks and convolutions of {window} tokens or so) plays
{jobs},
up to {depth} tokens and so far beyond every window, once by replay and once live ("two tokens" is DFA with names of two
tokens). The truth is one forward pass over
one row for each choice: no tree, no mask, no cache, no batch. A number is the largest difference of a choice's
log-probability in nats, by replay / live. *Exact* means that no difference is above 1e-4 of the standard deviation of
log-probabilities over the vocabulary, or above 4 times what batching alone changes in that model, and that no greedy
answer differs. "Heads" are the layers whose attention heads can be read and patched.

Measured with torch {torch} on a CPU in float32, by `python -m benchmarks.architectures`.

"""


@dataclass(frozen=True)
class Line:
    """One architecture: what was measured, or why it was refused."""

    name: str
    kind: str  # the class of the model
    verdict: str  # "exact", "wrong", "refused", "failed"
    roads: tuple[str, ...] = ()  # by replay and live
    reason: str = ""
    tolerance: float = 0.0
    spread: float = 0.0
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # job -> road -> largest error
    greedy: int = 0
    depth: int = 0
    layers: int = 0
    heads: tuple[int, ...] = ()
    certificates: tuple[dict[str, Any], ...] = ()
    seconds: float = 0.0


def examine(name: str, tokenizer: Any, jobs: Sequence[Job] = JOBS, most: int = 25) -> Line:
    """Build an architecture, let it play the jobs on both roads, and compare."""
    begun = perf_counter()
    model = build(name, len(tokenizer))
    agent = LanguageModel(name, loaded=(model, tokenizer))
    kind, found = type(model).__name__, {}
    try:
        own = noise(model, agent.encoder, DFA.prompts)
        for job in jobs:
            known = truths(model, agent.encoder, job, most)
            found[job.name] = {road: measure(agent, job, known, road) for road in ROADS}
    except AgentError as error:
        seconds = perf_counter() - begun
        return Line(name, kind, "refused", reason=str(error).splitlines()[0], seconds=seconds)
    except Exception as error:  # noqa: BLE001 - whatever a model raises is what this table is to say
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        return Line(name, kind, "failed", reason=told, seconds=perf_counter() - begun)
    measured = [m for by_road in found.values() for m in by_road.values()]
    spread = min(m.spread for m in measured)
    bound, greedy = tolerance(model, spread, own), sum(m.greedy for m in measured)
    exact = max(m.error for m in measured) <= bound and not greedy
    certificates = {c["live"]: c for c in agent.describe()["certificates"]}
    return Line(
        name,
        kind,
        "exact" if exact else "wrong",
        tuple(certificates[live]["road"] for live in (False, True)),
        "",
        bound,
        spread,
        {job: {road: m.error for road, m in by_road.items()} for job, by_road in found.items()},
        greedy,
        max(m.depth for m in measured),
        *_layers(agent),
        tuple(certificates.values()),
        perf_counter() - begun,
    )


def _layers(agent: LanguageModel) -> tuple[int, tuple[int, ...]]:
    """Return the number of layers, and those that have heads."""
    try:
        return agent.sites.layers, agent.sites.layers_with("head")
    except SiteError:
        return int(agent.model.config.get_text_config().num_hidden_layers), ()


def summary(lines: Sequence[Line]) -> str:
    """Return the one line that counts verdicts and roads."""
    verdicts = Counter(line.verdict for line in lines)
    roads = Counter(line.roads[0] for line in lines if line.verdict == "exact")
    shares = ", ".join(f"{road} {roads[road]}" for road in ORDER)
    rest = f"{verdicts['refused']} refused, {verdicts['wrong']} wrong"
    failed = f", {verdicts['failed']} failed" if verdicts["failed"] else ""
    return f"{verdicts['exact']} exact ({shares}), {rest}{failed}"


def page(lines: Sequence[Line]) -> str:
    """Return the table as a page in Markdown."""
    jobs = ", ".join(f"{job.name} ({job.steps} steps)" for job in JOBS)
    told = versions(["transformers", "torch"])
    out = [INTRODUCTION.format(**told, jobs=jobs, window=8, depth=max(line.depth for line in lines))]
    out.append(f"**{summary(lines)}**\n\n")
    out.append("| architecture | road | " + " | ".join(job.name for job in JOBS) + " | heads | verdict |\n")
    out.append("|---" * (len(JOBS) + 4) + "|\n")
    for line in lines:
        errors = [" / ".join(f"{e:.0e}" for e in line.errors[j.name].values()) if line.errors else "" for j in JOBS]
        layers = f"{len(line.heads)} of {line.layers}" if line.layers else ""
        told = line.reason.removeprefix(f"{line.name} is refused: ").replace("|", "\\|")
        verdict = f"{line.verdict}: {told}" if told else line.verdict
        road = " / ".join(dict.fromkeys(line.roads))
        out.append(f"| {line.name} | {road} | {' | '.join(errors)} | {layers} | {verdict} |\n")
    return "".join(out)


def write(lines: Sequence[Line], out: str | None, docs: str | None) -> None:
    """Write the record and the page, where a file is given."""
    if out:
        machine = {"hardware": hardware(), "versions": versions(["torch", "transformers"])}
        rows = ",\n".join(json.dumps(asdict(line)) for line in lines)
        head = json.dumps({"summary": summary(lines), **machine})
        Path(out).write_text(f'{head[:-1]}, "architectures": [\n{rows}\n]}}\n')
    if docs:
        Path(docs).parent.mkdir(parents=True, exist_ok=True)
        Path(docs).write_text(page(lines))


def main() -> None:
    """Examine the architectures."""
    args = parse(
        __doc__ or "",
        names="architectures, with commas between them",
        docs="write the table as a page (Markdown)",
    )
    warnings.filterwarnings("ignore")
    set_verbosity_error()
    torch.set_num_threads(1)
    names = args.names.split(",") if args.names else FAST if args.quick else NAMES
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN["nextstate/tiny"])
    lines = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            line = examine(name, tokenizer, most=8 if args.quick else 25)
            lines.append(line)
            if line.verdict != "exact" and not (line.verdict == "refused" and name in BOTH_WAYS):
                worst = max((max(by_road.values()) for by_road in line.errors.values()), default=0)
                progress.console.print(
                    f"{name}: {line.verdict} {line.roads} {worst:.1e} {line.reason}", highlight=False, soft_wrap=True
                )
            progress.advance(task)
            write(lines, args.out, args.docs)  # each time, so that a run that is stopped leaves what it has
    print(summary(lines))


if __name__ == "__main__":
    main()
