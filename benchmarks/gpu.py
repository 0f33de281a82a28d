"""Everything that has to be known of a GPU, in one call of under 20 minutes: whether answers are exact, and times.

    python -m benchmarks.gpu [--out FILE] [--small] [--minutes 20]

`--small` runs the same on tiny shapes, on a CPU if there is no GPU; without a GPU it is the default. Weights are random
and made here, except those of nextstate/tiny, on which answers in bfloat16 are compared with those in float32: between
random weights, the first two tokens are as good as tied.

What is checked and measured:

- peak: matrix products of the GPU alone, to which the others are compared.
- predict: Pythia-1B's shape in bfloat16: the operations that the trees need, over time, as a share of the peak;
  what one plain pass of the transcripts takes; the share of the time in which kernels run.
- heads, positions, response: sweeps against one forward pass a head, and against pushed prompts as rows. Some of the
  peers' passes are timed, and scaled up.
- precision: the share of questions with the same greedy answer and the same choice in bfloat16 and float32.
- exactness: answers of trees, by FlexAttention and by SDPA, against one plain forward pass a choice.
- roads: FlexAttention in one row, SDPA in padded rows, and one row a path, in games with branches.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import DeviceType, ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.common import versions
from nextstate.agents import flex
from nextstate.agents.agent import AgentError, Prediction, Prompt
from nextstate.agents.failures import guarded
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, prompts_of
from nextstate.analysis.heads.pairs import TokenPair
from nextstate.analysis.heads.patch import sweep
from nextstate.analysis.response.measure import responses
from nextstate.analysis.run import hardware
from nextstate.envs.games import make_game

Record = dict[str, Any]
SAMPLED = 8  # forward passes of a peer that are timed, of those that it needs
ONCE = 20.0  # seconds; work that takes longer is timed once


class Shape(NamedTuple):
    """The shape of a model: its family, layers, heads, width and vocabulary."""

    family: str
    layers: int
    heads: int
    width: int
    vocabulary: int


class Game(NamedTuple):
    """Episodes of a game: its settings, number of steps, questions after each step, and number of episodes."""

    name: str
    settings: Record
    steps: int
    ask: Any
    episodes: int

    @property
    def prompts(self) -> list[Prompt]:
        """All questions of all episodes."""
        made = make_game(self.name, **self.settings)
        return [p for e in episodes_of(made, range(self.episodes), self.steps, self.ask) for p in prompts_of(e)]


@dataclass(frozen=True)
class Plan:
    """What is measured: shapes, games, and numbers of pairs, tokens and repeats."""

    device: str
    checked: tuple[Shape, ...]
    predict: Shape
    sweep: Shape
    each: Shape
    games: dict[str, Game]
    pairs: int
    tokens: int
    shared: int
    sampled: int  # questions that are compared with plain passes
    repeats: int
    product: int  # rows of the matrices whose product is the peak
    until: float  # on the clock of `time.perf_counter`


def plan(small: bool, device: str, minutes: float) -> Plan:
    """Return what to measure."""
    until = time.perf_counter() + 60 * minutes
    n, world = (2, {"games": 1, "rooms": 2, "objects": 3, "quest": 2}) if small else (256, {})
    games = {
        "DFA, 50 steps": Game("DFA", {"states": 10}, 6 if small else 50, 1, n),
        "DFA, two-token choices": Game("DFA", {"states": 5, "symbols": "pairs"}, 3 if small else 10, 1, n),
        "Box, 10 moves": Game("Box", {"boxes": 8}, 3 if small else 10, 1, n),
        "TextWorld, all questions": Game("TextWorld", world, 2 if small else 10, "all", n // 2),
    }
    if small:
        tiny = tuple(Shape(family, 2, 4, 64, 1536) for family in ("gpt2", "gpt_neox", "llama"))
        return Plan(device, tiny, tiny[1], tiny[0], tiny[0], games, 3, 24, 12, 4, 1, 256, until)
    checked = tuple(Shape(family, 6, 8, 512, 32_000) for family in ("gpt2", "gpt_neox", "llama"))
    pythia, xl, gpt2 = (
        Shape("gpt_neox", 16, 8, 2048, 50_304), Shape("gpt2", 48, 25, 1600, 50_257), Shape("gpt2", 12, 12, 768, 50_257),
    )  # fmt: skip
    return Plan(device, checked, pythia, xl, gpt2, games, 64, 96, 64, 16, 3, 8192, until)


def made(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """Return a model with random weights."""
    common = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    wide = common | {"intermediate_size": 4 * shape.width, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    with torch.device(device):
        if shape.family == "gpt2":
            model: Any = GPT2LMHeadModel(GPT2Config(**common, n_positions=2048))
        elif shape.family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**wide, num_key_value_heads=shape.heads // 2))
        else:
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**wide))
    return model.to(dtype).eval()


def asked_by(model: Any, attention: str) -> LanguageModel:
    """Return an agent that answers by "flex" or "sdpa"."""
    if attention == "flex":
        flex.use(model)
    else:
        flex.give_up(model)
    return LanguageModel("random weights", loaded=(model, tokenizer()))


@cache
def tokenizer() -> Any:
    """Return the tokenizer of the built-in model."""
    return LanguageModel("nextstate/tiny", device="cpu").tokenizer


def wait(device: str) -> None:
    """Wait until all kernels have run."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], plan: Plan) -> float:
    """Return the median seconds of some repeats, after one that is not counted unless it takes long."""
    times = list[float]()
    while len(times) <= plan.repeats and (len(times) != 1 or times[0] < ONCE):
        wait(plan.device)
        begun = time.perf_counter()
        work()
        wait(plan.device)
        times.append(time.perf_counter() - begun)
    return median(times[1:] or times)


# --- exactness


def agreement(one: Sequence[Prediction], two: Sequence[Prediction]) -> Record:
    """Return on which share of questions two lists of answers agree, and how far their log-probabilities are apart."""
    pairs = list(zip(one, two, strict=True))
    return {
        "questions": len(pairs),
        "greedy_equal": float(np.mean([a.answer == b.answer for a, b in pairs])),
        "choice_equal": float(np.mean([a.choice == b.choice for a, b in pairs])),
        "largest_difference_nats": max(
            (abs(x - y) for a, b in pairs for x, y in zip(a.logprobs, b.logprobs, strict=True)), default=0.0
        ),
    }


@torch.inference_mode()
def plain_error(agent: LanguageModel, prompts: Sequence[Prompt], found: Sequence[Prediction], most: int) -> Record:
    """Compare answers with one plain forward pass for each choice."""
    trunks, planted = agent.add_question(prompts)
    trees = {i: (trunks[key].tree, branch) for key, own in planted.items() for i, branch in own}
    errors, spreads, equal = [], [], []
    for i in np.linspace(0, len(prompts) - 1, most).astype(int).tolist():
        tree, branch = trees[i]
        sums = []
        for c in range(len(prompts[i].asked.choices)):
            choice = branch.choice(c)
            path = [tree.tokens[n] for n in tree.path(choice.nodes[-1])]
            logs = agent.model(torch.tensor([path], device=agent.device), use_cache=False).logits[0].float()
            logs = logs[-len(choice.tokens) :].log_softmax(-1)
            sums.append(float(sum(row[token] for row, token in zip(logs, choice.tokens, strict=True))))
            spreads.append(float(logs[0].std()))
        errors += [abs(a - b) for a, b in zip(sums, found[i].logprobs, strict=True)]
        equal.append(int(np.argmax(sums)) == found[i].choice)
    return {
        "largest_error_nats": max(errors), "spread_nats": float(np.mean(spreads)), "questions": len(equal),
        "choice_equal": float(np.mean(equal)),
    }  # fmt: skip


def exactness(plan: Plan) -> Record:
    """Check trees against plain passes, in both precisions and by both attention functions."""
    prompts = [p for game in plan.games.values() for p in game._replace(episodes=2).prompts]
    out: Record = {}
    for dtype, attention in ((torch.float32, "flex"), (torch.bfloat16, "flex"), (torch.float32, "sdpa")):
        for shape in dict.fromkeys((plan.predict, *plan.checked)):
            name = f"{shape.family} {shape.layers} x {shape.width}, {str(dtype).removeprefix('torch.')}, {attention}"
            if time.perf_counter() > plan.until:
                out[name] = {"skipped": "time is over"}
                continue
            agent = asked_by(made(shape, plan.device, dtype), attention)
            found = agent.predict(prompts)
            assert agent.certificate is not None
            proof, said = agent.certificate.describe(), list(agent.warnings())
            out[name] = plain_error(agent, prompts, found, plan.sampled) | {"certificate": proof, "warnings": said}
            del agent
            freed()
    return out


def precision(plan: Plan) -> Record:
    """Compare answers of the trained built-in model in bfloat16 and float32."""
    prompts = [p for game in plan.games.values() for p in game._replace(episodes=game.episodes // 2).prompts]
    agents = [LanguageModel("nextstate/tiny", device=plan.device, dtype=dtype) for dtype in ("float32", "bfloat16")]
    fits = [p for p in prompts if p.step < 6]
    return agreement(*(agent.predict(fits) for agent in agents)) | {"required": 0.99}


# --- times


def peak(plan: Plan) -> Record:
    """Return the operations a second of matrix products alone."""
    out = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(plan.product, plan.product, device=plan.device, dtype=dtype) for _ in range(2))
        work: Callable[[], Any] = lambda a=a, b=b: [a @ b for _ in range(10)]  # noqa: E731
        out[str(dtype).removeprefix("torch.")] = 20 * plan.product**3 / timed(work, plan)
    return out


def operations(agent: LanguageModel, prompts: Sequence[Prompt]) -> tuple[float, int]:
    """Return the floating-point operations that the trees of some questions need, and the number of their tokens."""
    trunks, planted = agent.add_question(prompts)
    config, model = agent.model.config, agent.model
    depths = [d + 1 for trunk in trunks.values() for d in trunk.tree.depths]
    read = sum(len({n for _, branch in own for n in branch.nodes}) for own in planted.values())
    tables = {id(x.weight): x.weight for x in (model.get_input_embeddings(), model.get_output_embeddings())}
    tables |= {id(m.weight): m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    inside = sum(p.numel() for p in model.parameters()) - sum(w.numel() for w in tables.values())
    width, vocabulary = config.hidden_size, model.get_output_embeddings().weight.shape[0]
    attention = 4 * width * config.num_hidden_layers * sum(depths)  # scores and values of what is seen
    return float(2 * inside * len(depths) + attention + 2 * width * vocabulary * read), len(depths)


def kernels(work: Callable[[], Any], plan: Plan) -> float | None:
    """Return the seconds in which kernels run, by the profiler of torch; None without a GPU."""
    if not plan.device.startswith("cuda"):
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    return float(sum(e.device_time_total for e in found.events() if e.device_type == DeviceType.CUDA)) / 1e6


@torch.inference_mode()
def transcripts(agent: LanguageModel, prompts: Sequence[Prompt]) -> Callable[[], Any]:
    """Return what runs the transcripts in plain causal passes, all tokens of one length."""
    trunks, _ = agent.add_question(prompts)
    length = min(len(t.tree) for t in trunks.values())
    rows = torch.tensor([t.tree.tokens[:length] for t in trunks.values()], device=agent.device)
    most = max(1, agent.batch_tokens // length)

    @torch.inference_mode()
    def run() -> None:
        for part in rows.split(most):
            agent.model.base_model(part, use_cache=False)

    return run


def predict(plan: Plan) -> Record:
    """Measure the questions of DFA on one model, as a share of the peak."""
    model = made(plan.predict, plan.device, torch.bfloat16)
    prompts, out = plan.games["DFA, 50 steps"].prompts, dict[str, Any]()
    for attention in ("flex", "sdpa"):
        agent = asked_by(model, attention)
        work = partial(agent.predict, prompts)
        seconds = timed(work, plan)
        flop, tokens = operations(agent, prompts)
        running = kernels(work, plan)
        out[attention] = {
            "seconds": seconds, "questions": len(prompts), "tokens": tokens, "flop": flop,
            "flop_per_second": flop / seconds, "batch_tokens": agent.batch_tokens,
            "kernel_share": None if running is None else running / seconds, "warnings": list(agent.warnings()),
        }  # fmt: skip
    out["plain_transcripts_seconds"] = timed(transcripts(agent, prompts), plan)
    return out


def roads(plan: Plan) -> Record:
    """Measure games with branches on one model, each in three ways."""
    model, out = made(plan.predict, plan.device, torch.bfloat16), dict[str, Any]()
    for name, game in plan.games.items():
        prompts, own = game.prompts, dict[str, Any]()
        for way in ("flex", "sdpa", "rows"):
            agent = asked_by(model, "flex" if way == "flex" else "sdpa")
            if way == "rows":
                agent.forward.require = lambda *_, **__: "rows"  # type: ignore[method-assign]
            own[way] = timed(partial(agent.predict, prompts), plan)
        flop, tokens = operations(agent, prompts)
        out[name] = {"seconds": own, "questions": len(prompts), "tokens": tokens, "flop": flop}
    return out


def pairs_of(plan: Plan, shape: Shape) -> list[TokenPair]:
    """Return pairs of random tokens that share their first tokens and the last one."""
    rng, size = np.random.default_rng(0), (plan.pairs, plan.tokens)
    clean = rng.integers(0, shape.vocabulary, size)
    corrupted = clean.copy()
    corrupted[:, plan.shared : -1] = rng.integers(0, shape.vocabulary, size)[:, plan.shared : -1]
    corrupted[:, plan.shared] = (clean[:, plan.shared] + 1) % shape.vocabulary
    return [TokenPair(tuple(c), tuple(k), 1, 2) for c, k in zip(clean.tolist(), corrupted.tolist(), strict=True)]


@torch.inference_mode()
def one_forward(agent: LanguageModel, pairs: Sequence[TokenPair]) -> None:
    """Run all pairs with one head of one layer overwritten at the last token."""
    rows = torch.tensor([p.corrupted for p in pairs], device=agent.device)
    layer, size = agent.sites.layers // 2, agent.sites.head_dim

    def write(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, -1, 0] = torch.zeros(size, dtype=x.dtype, device=x.device)
        return x

    with agent.sites.hook("head", layer, write):
        agent.forward.plain(rows, [rows.shape[1] - 1])


def swept(plan: Plan, shape: Shape, dtype: torch.dtype, positions: str) -> Record:
    """Measure a sweep of all heads against one forward pass a head, some of which are timed."""
    agent, pairs = asked_by(made(shape, plan.device, dtype), "flex"), pairs_of(plan, shape)
    count = shape.layers * shape.heads * (1 if positions == "last" else plan.tokens - plan.shared)
    # A hook that holds one value for all heads: the time does not depend on it.
    each = timed(lambda: [one_forward(agent, pairs) for _ in range(SAMPLED)], plan) / SAMPLED
    size = 2 << 30 if plan.device == "cpu" else torch.cuda.mem_get_info()[0] // 2
    ours = timed(lambda: sweep(agent, pairs, positions=positions, failures="include", max_bytes=size), plan)
    return {
        "seconds": ours, "patches": count, "pairs": len(pairs), "one_forward_seconds": each,
        "one_forward_each_seconds": each * count, "ratio": each * count / ours, "warnings": list(agent.warnings()),
    }  # fmt: skip


def response(plan: Plan) -> Record:
    """Measure responses to pushes on all positions against pushed prompts as rows, some of which are timed."""
    agent = asked_by(made(plan.each, plan.device, torch.float32), "flex")
    tokens = np.random.default_rng(0).integers(0, plan.each.vocabulary, (1, plan.tokens))
    found = responses(agent, tokens)
    pushes, rows = found.value.shape[0] * found.value.shape[1] * plan.tokens, SAMPLED * SAMPLED
    batch = torch.from_numpy(tokens).to(agent.device).expand(rows, -1)
    each = timed(lambda: agent.forward.plain(batch, [0]), plan) / rows
    ours = timed(lambda: responses(agent, tokens), plan)
    return {"seconds": ours, "pushes": pushes, "row_seconds": each, "ratio": each * pushes / ours}


# --- all of it


def freed() -> None:
    """Give back the memory of models that are gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(plan: Plan, keep: Callable[[Record], None]) -> Record:
    """Run all parts; one that fails is recorded and the others go on, and none begins after the time is over.

    Args:
        plan: what to measure.
        keep: called with all results after each part, so that none are lost.
    """
    out = dict[str, Any]()
    parts: dict[str, Callable[[Plan], Record]] = {
        "peak": peak, "predict": predict, "heads": lambda p: swept(p, p.sweep, torch.bfloat16, "last"),
        "precision": precision, "exactness": exactness, "roads": roads,
        "positions": lambda p: swept(p, p.each, torch.float32, "each"), "response": response,
    }  # fmt: skip
    for name, part in parts.items():
        begun = time.perf_counter()
        if begun > plan.until:
            out[name] = {"skipped": "time is over"}
        else:
            try:
                out[name] = guarded(partial(part, plan))
            except AgentError as error:
                out[name] = {"failed": str(error)}
            out[name]["part_seconds"] = time.perf_counter() - begun
            freed()
        if name == "predict" and "bfloat16" in out["peak"]:
            for own in (out[name][attention] for attention in ("flex", "sdpa") if attention in out[name]):
                own["share_of_peak"] = own["flop_per_second"] / out["peak"]["bfloat16"]
        print(f"{name}: {json.dumps(out[name])}", flush=True)
        keep(out)
    return out


def main() -> None:
    """Measure, print each part, and write one JSON."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the file to write")
    parser.add_argument("--small", action="store_true", help="tiny shapes; the default without a GPU")
    parser.add_argument("--minutes", type=float, default=18, help="no part begins later than this; default 18")
    args = parser.parse_args()
    small = args.small or not gpu
    about = {
        "small": small, "device": torch.cuda.get_device_name() if gpu else "cpu", "cuda": torch.version.cuda,
        "hardware": hardware(), "versions": versions(("torch", "transformers")),
    }  # fmt: skip

    def keep(found: Record) -> None:
        if args.out is not None:
            args.out.write_text(json.dumps({**about, "parts": found}, indent=1) + "\n")

    measure(plan(small, "cuda" if gpu else "cpu", args.minutes), keep)


if __name__ == "__main__":
    main()
