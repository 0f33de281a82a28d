"""Processor time that Python and numpy take for a question, beside the model: trees, batches, scoring, predictions.

    python -m benchmarks.host [--before FOLDER] [--profile GAME] [--json]

The model is replaced by one that returns zeros, and its vocabulary by one of a few tokens, so that all time is that of
the host: what a GPU would wait for. With `--before`, another checkout of this project is measured in turn with this
one, each in a process of its own.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from nextstate.agents.certificate import Certificate
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, prompts_of
from nextstate.agents.text import Encoder
from nextstate.agents.training import TrainConfig, train_tokenizer
from nextstate.envs.game import Episode
from nextstate.envs.games import make_game

EPISODES = 64
WIDTH = 61  # of the vocabulary, so that reading logits costs little


class Job(NamedTuple):
    """A game with its settings, the number of steps, and the questions after each step."""

    game: str
    settings: dict[str, Any]
    steps: int
    ask: Any = 1


JOBS = {
    "DFA, 50 steps": Job("DFA", {"states": 10}, 50),
    "DFA, two-token choices, 10 steps": Job("DFA", {"states": 10, "symbols": "pairs"}, 10),
    "Box, 10 moves": Job("Box", {"boxes": 8}, 10),
    "TextWorld, 10 steps, all questions": Job("TextWorld", {}, 10, "all"),
}


class Zeros(GPT2LMHeadModel):
    """A model that computes nothing: its hidden states and logits are zeros."""

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        """Return zeros at the positions that the output embeddings are asked for."""
        return CausalLMOutput(logits=self.lm_head(torch.zeros(*input_ids.shape, 1)))


class Narrow(Encoder):
    """An encoder with a small vocabulary: most tokens share their number with others."""

    def _raw(self, text: str) -> tuple[int, ...]:
        return tuple([token % WIDTH for token in super()._raw(text)])


def stub() -> LanguageModel:
    """Return an agent whose forward passes are free."""
    tokenizer = train_tokenizer(TrainConfig())
    config = GPT2Config(
        n_layer=1, n_head=1, n_embd=1, vocab_size=WIDTH, n_positions=65536, bos_token_id=0, eos_token_id=0
    )
    agent = LanguageModel("zeros", loaded=(Zeros(config).eval(), tokenizer))
    agent.encoder = Narrow(tokenizer)

    def certify(forward: Any, depth: int, columns: int, live: bool, _: Any) -> Certificate:
        return Certificate("tree", live, 0.0, 1.0, depth, columns, forward.masks.attention, 0.0, {})

    agent.forward.certify = certify
    return agent


def drawn(job: Job, number: int) -> list[Episode]:
    """Return episodes of a job; each number gives others."""
    seeds = range(number * EPISODES, (number + 1) * EPISODES)
    return episodes_of(make_game(job.game, **job.settings), seeds, job.steps, job.ask)


def answer(agent: LanguageModel, episodes: Sequence[Episode]) -> int:
    """Ask all questions; return their number."""
    return len(agent.predict([p for e in episodes for p in prompts_of(e)]))


def measure(repeats: int) -> dict[str, float]:
    """Return the microseconds of processor time for a question of each job, the median of several repeats."""
    agent, found = stub(), {}
    for name, job in JOBS.items():
        times = []
        for number in range(repeats + 1):  # the first one fills caches
            episodes = drawn(job, number)
            begun = time.process_time()
            n = answer(agent, episodes)
            times.append(1e6 * (time.process_time() - begun) / n)
        found[name] = median(times[1:])
    return found


def in_process(folder: Path) -> dict[str, float]:
    """Measure the checkout in a folder in a process of its own."""
    settings = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-P", __file__, "--json"], env=settings, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"measuring {folder} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def profile(name: str) -> None:
    """Print where the time of a job goes."""
    agent, episodes = stub(), drawn(JOBS[name], 1)
    answer(agent, drawn(JOBS[name], 0))
    with cProfile.Profile(time.process_time) as found:
        answer(agent, episodes)
    pstats.Stats(found).sort_stats("tottime").print_stats(25)


def main() -> None:
    """Measure, and print a table or one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of this project to compare with")
    parser.add_argument("--profile", choices=JOBS, help="print where the time of one job goes")
    parser.add_argument("--json", action="store_true", help="measure this process alone, and print JSON")
    args = parser.parse_args()
    if args.profile:
        profile(args.profile)
    elif args.json:
        print(json.dumps(measure(3)))
    else:
        folders = [Path(__file__).parents[1], *([args.before.resolve()] if args.before else [])]
        rounds = [[in_process(folder) for folder in folders] for _ in range(3)]
        for name in JOBS:
            times = [median(each[k][name] for each in rounds) for k in range(len(folders))]
            before = f", before {times[1]:.1f}, ratio {times[1] / times[0]:.1f}" if args.before else ""
            print(f"{name}: {times[0]:.1f} microseconds a question{before}")


if __name__ == "__main__":
    main()
