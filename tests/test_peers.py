"""The programs that we are compared with give our answers: otherwise a comparison of speed would mean nothing.

lm-eval and TransformerLens are not installed here. What the benchmark hands to lm-eval, and how it reads the results,
is tested with the same tokens scored by plain forward passes; the packages themselves run only in the benchmark, which
compares all answers in every round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache as once
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import patching, replay, response, stepping
from benchmarks.common import Peer, Timed, compare
from benchmarks.models import Shape, random_gpt2
from benchmarks.page import PAGE, RESULTS, newest, render, table
from benchmarks.peers import (
    Answer,
    Request,
    answers,
    cache,
    harness,
    hooks,
    one_pass_each,
    prefix,
    push_each,
    push_rows,
    push_suffixes,
    resume,
    rows,
    tables,
    transcript,
)  # fmt: skip
from nextstate.agents.agent import Prompt
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, prompts_of
from nextstate.analysis.heads.patch import TokenPair
from nextstate.analysis.response.config import STRENGTHS
from nextstate.analysis.response.measure import responses
from nextstate.envs.games import make_game
from nextstate.envs.vector import PredictionVectorEnv

TINY = Shape(3, 2, 16, 1600)
JOBS = (
    replay.Job("one token", "DFA", {"states": 4}, 6, inline=True),
    replay.Job("two tokens", "DFA", {"states": 4, "symbols": "pairs"}, 3),
    replay.Job("branches", "Box", {"boxes": 3}, 3, 2),
    replay.Job("text", "TextWorld", {"rooms": 2, "objects": 3, "games": 1}, 2, "all"),
)
Score = Callable[[object, Sequence[Request]], list[Answer]]


@once
def tiny() -> LanguageModel:
    agent = random_gpt2(TINY)
    with torch.no_grad():
        for weight in agent.model.parameters():  # so that log-probabilities differ by nats, and attention matters
            weight.mul_(4 if weight.ndim > 1 else 1)
    return agent


@once
def asked(job: str) -> tuple[list[dict[str, object]], list[Prompt], list[Request]]:
    """Return our rows, prompts and requests of a job."""
    given = next(j for j in JOBS if j.name == job)
    episodes = episodes_of(make_game(given.game, **given.settings), range(1), given.steps, given.ask)
    prompts = [p for e in episodes for p in prompts_of(e)]
    return replay.ours(tiny(), episodes), prompts, replay.requests_of(tiny().encoder, prompts)


@torch.inference_mode()
def logprobs(tokens: Sequence[int]) -> Tensor:
    """Return the log-probabilities after each token, by a plain forward pass."""
    return tiny().model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)  # type: ignore[no-any-return]


def plain(requests: Sequence[harness.HarnessRequest]) -> list[tuple[float, bool]]:
    """Score continuations as lm-eval's documentation says: log-probability, and whether it is the greedy one."""
    out = []
    for _, context, continuation in requests:
        after = logprobs(context + continuation[:-1])[len(context) - 1 :]
        each = after[range(len(continuation)), continuation]
        out.append((float(each.sum()), after.argmax(-1).tolist() == continuation))
    return out


@pytest.mark.parametrize("job", [job.name for job in JOBS])
@pytest.mark.parametrize("score", [cache.score, rows.score, one_pass_each.score])
def test_peers_answer_questions_as_we_do(job: str, score: Score) -> None:
    mine, prompts, requests = asked(job)
    assert replay.difference(prompts, mine, score(tiny().model, requests)) < 1e-5


def test_one_pass_over_a_transcript_answers_questions_as_we_do() -> None:
    mine, prompts, requests = asked("one token")
    assert replay.difference(prompts, mine, transcript.score(tiny().model, requests)) < 1e-5


@pytest.mark.parametrize("job", ["two tokens", "branches"])
def test_one_pass_over_a_transcript_refuses_what_it_cannot_answer(job: str) -> None:
    with pytest.raises(ValueError, match="prefixes of the longest one"):
        transcript.score(tiny().model, asked(job)[2])


@pytest.mark.parametrize("job", [job.name for job in JOBS])
def test_the_harness_gets_our_tokens_and_its_results_are_read_by_question(job: str) -> None:
    mine, prompts, requests = asked(job)
    lm_eval = SimpleNamespace(_loglikelihood_tokens=lambda given, disable_tqdm: plain(given))
    assert replay.difference(prompts, mine, harness.score(lm_eval, requests)) < 1e-5
    texts = [
        tiny().tokenizer.decode(context + continuation) for _, context, continuation in harness.requests_of(requests)
    ]
    whole = [p.episode.prompt(p.step, p.question) + choice for p in prompts for choice in p.asked.choices]
    assert [t.removeprefix(tiny().tokenizer.bos_token) for t in texts] == whole


def test_requests_are_the_prompts_and_choices() -> None:
    kinds = {job.name: asked(job.name)[2] for job in JOBS}
    assert {len(c) for r in kinds["one token"] for c in r.choices} == {1}
    assert {len(c) for r in kinds["two tokens"] for c in r.choices} == {2}


def test_greedy_answers_are_those_of_decoding() -> None:
    """A choice is greedy if each of its tokens is the likeliest; of two, the longer one."""
    request = Request((1,), ((2,), (2, 3), (4,)))
    places = {(0, ()): 0, (0, (2,)): 1}
    logits = torch.zeros(2, 6)
    logits[0, 2] = logits[1, 3] = 5
    (found,) = answers([request], places, logits)
    top = 5 - math.log(math.exp(5) + 5)
    assert found.greedy == 1
    assert found.logprobs == pytest.approx([top, 2 * top, top - 5], abs=1e-6)
    logits[1, 3] = -1
    assert answers([request], places, logits)[0].greedy == 0
    logits[0, 5] = 9
    assert answers([request], places, logits)[0].greedy == -1


def test_a_slow_peer_answers_the_middle() -> None:
    mine, prompts, requests = asked("one token")
    some = replay.middle(lambda r: cache.score(tiny().model, r), requests, 2)
    assert [a is None for a in some] == [True, True, False, False, True, True]
    assert replay.difference(prompts, mine, some) < 1e-5
    shifted = [None, *some[:-1]]
    assert replay.difference(prompts, mine, shifted) > 1e-2


# --- patching


def pairs(n: int, length: int = 12, shared: int = 5) -> list[TokenPair]:
    rng = np.random.default_rng(1)
    clean, corrupted = rng.integers(3, TINY.vocabulary, (2, n, length))
    corrupted[:, :shared] = clean[:, :shared]
    return [TokenPair(tuple(c), tuple(k), 7, 9) for c, k in zip(clean.tolist(), corrupted.tolist(), strict=True)]


@pytest.mark.parametrize("n", [1, 3])
def test_peers_patch_the_last_token_as_we_do(n: int) -> None:
    given, model = pairs(n), tiny().model
    mine, tokens = patching.ours(tiny(), given, "last"), patching.tensors(given)
    assert np.ptp(mine) > 1e-2
    everything = range(TINY.layers)
    for found in (
        resume.differences(model, tokens, [11]),
        prefix.differences(model, tokens),
        hooks.differences(model, tokens, everything, [11]),
        hooks.traced_differences(tiny().traced, tokens, everything),
    ):
        assert found.shape == mine.shape
        assert not found.isnan().any()
        assert patching.difference(mine, found) < 1e-5


@pytest.mark.parametrize("most", [1, 40, 10_000])  # tokens in a batch
def test_peers_patch_each_position_as_we_do(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.gpt2.TOKENS", most)
    given, model = pairs(2), tiny().model
    mine, tokens = patching.ours(tiny(), given, "each"), patching.tensors(given)
    late = range(5, 12)
    for found in (resume.differences(model, tokens, late), hooks.differences(model, tokens, range(3), late)):
        assert found.shape == mine.shape
        assert patching.difference(mine, found) < 1e-5


def test_a_loop_that_patches_some_layers_says_so() -> None:
    given = pairs(1)
    some = hooks.differences(tiny().model, patching.tensors(given), [1], [11])
    assert some[:, 1].isfinite().all()
    assert some[:, [0, 2]].isnan().all()
    assert patching.difference(patching.ours(tiny(), given, "last"), some) < 1e-5


# --- responses


def test_peers_find_our_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.gpt2.TOKENS", 100)
    tokens = np.random.default_rng(2).integers(3, TINY.vocabulary, 9)
    mine, ids, model = responses(tiny(), tokens[None]).value[0, :, 0], torch.from_numpy(tokens), tiny().model
    whole = [push_suffixes.responses(model, ids, STRENGTHS), push_rows.responses(model, ids, STRENGTHS)]
    loops = [
        push_each.responses(model, ids, STRENGTHS, [0, 4]),
        push_each.traced_responses(tiny().traced, ids, STRENGTHS, [0, 4]),
    ]
    for found in (*whole, *loops):
        assert found.shape == mine.shape
        assert response.difference(mine, found) < 1e-5
    for found in whole:
        assert (found.isnan().numpy() == np.isnan(mine)).all()


# --- environments


@pytest.mark.parametrize(
    ("name", "settings"), [("DFA", {}), ("DFA", {"states": 7, "density": "max"}), ("Box", {}), ("Box", {"boxes": 12})]
)
def test_tables_play_our_episodes(name: str, settings: dict[str, object]) -> None:
    game = make_game(name, **settings)
    mine = stepping.play(PredictionVectorEnv(game, num_envs=5, steps=20, answer="choice"), np.zeros(5, dtype=int), 20)
    theirs = stepping.tabulated(game, 5, 20)()
    assert stepping.difference(mine, theirs) == 0
    assert 0 < mine.rewards.sum() < 100
    assert stepping.difference(mine, tables.Played(theirs.shown[::-1], theirs.rewards)) == math.inf


# --- how they are compared, and the page


def test_a_ratio_is_of_medians_and_of_the_whole_job() -> None:
    own, other = iter([100.0, 1, 2, 9]), iter([100.0, 6, 3, 3])  # the first round is not counted
    peers = [Peer("half", "usual", lambda: Timed(1.5, next(other)), 0.5)]
    (found,) = compare("job", lambda: Timed(1.0, next(own)), peers, lambda a, b: abs(a - b), 3, TINY)
    assert found[:4] == ("job", "3 x 2 x 16", "half", "usual")
    assert (found.ours_s, found.peer_s, found.ratio, found.max_difference) == (2, 6, 3, 0.5)


def test_work_is_timed_on_the_processor() -> None:
    (found,) = compare(
        "job", lambda: sum(range(1000)), [Peer("slower", "usual", lambda: sum(range(1_000_000)))], lambda a, b: 0, 1
    )
    assert found.ratio > 1


def test_the_page_is_made_from_its_records() -> None:
    text = PAGE.read_text()
    assert render(text, newest(RESULTS)) == text


def test_the_page_shows_each_comparison_once() -> None:
    (result,) = compare(
        "job", lambda: Timed(0, 1.0), [Peer("it", "strongest", lambda: Timed(0, 2.5))], lambda a, b: 0, 1
    )
    record = {
        "results": [result._asdict()], "rates": {"steps/s": 12345.0}, "date": "2026-01-01", "command": "run",
        "load": {"before": 0, "after": 1}, "hardware": {"cpu": "some", "cores": 2}, "versions": {"torch": "2"},
    }  # fmt: skip
    page = render(PAGE.read_text(), {"replay": record})
    assert page.count("| job |  | it | 2.5 | 1 / 2.5 |") == 1
    assert "| steps/s | 12,345 |" in page
    assert "| `run` | 2026-01-01 | some, 2 cores | 0 to 1 | torch 2 |" in page
    assert table(("a",), []) == "No record yet: `make bench` makes one."
