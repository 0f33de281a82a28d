"""Hooks on an agent, and agents without some of their heads, against one plain forward pass a choice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from circuits import circuit
from polars.testing import assert_frame_equal

from nextstate.agents.agent import AgentError, Prompt
from nextstate.agents.config import ConfigError, read_config
from nextstate.agents.intervene import _REFERENCE_SEED, Intervened, drawn
from nextstate.agents.intervention import Intervention, InterventionError
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, live, prompts_of, replay
from nextstate.agents.sites import SiteError
from nextstate.analysis.predict.config import PredictConfig
from nextstate.analysis.predict.study import Predict
from nextstate.analysis.predict.tables import QUESTION
from nextstate.analysis.study import go
from nextstate.envs import make_game, unroll
from nextstate.envs.contrast import segments
from tests.runs import answered, frame, left_out, make, page_of

GAMES: list[tuple[str, dict[str, Any], int]] = [
    ("Box", {"boxes": 4}, 4),
    ("DFA", {"states": 4, "actions_listed": 3}, 5),
]
HEADS = ((1, 2), (0, 3), (1, 0))


def tokens(agent: LanguageModel, prompt: Prompt) -> list[int]:
    first, *others = segments(*prompt)
    return [*agent.encoder.opening(first), *(t for p in others for t in agent.encoder.piece(p))]


@torch.inference_mode()
def plain(agent: LanguageModel, prompt: Prompt) -> list[float]:
    """Log-probabilities of the choices, by one forward pass each."""
    head, out = tokens(agent, prompt), []
    for choice in prompt.asked.choices:
        tail = list(agent.encoder.piece(choice))
        logs = agent.model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].float().log_softmax(-1)
        out.append(float(logs[range(len(tail)), tail].sum()))
    return out


@contextmanager
def raw(agent: LanguageModel, heads: Sequence[tuple[int, int]], put: Callable[[int, int, int], Any]) -> Any:
    """Overwrite heads by hooks of torch, `put(layer, head, tokens)` being what goes there."""
    hooks = []
    dim = agent.sites.head_dim
    for layer, head in heads:

        def write(_: Any, args: Any, layer: int = layer, head: int = head) -> Any:
            x = args[0].clone()
            x[0, :, head * dim : (head + 1) * dim] = put(layer, head, x.shape[1])
            return (x,)

        projection = agent.sites.per_layer[layer].projection
        hooks.append(projection.register_forward_pre_hook(write))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def pool(agent: LanguageModel, game: Any, steps: int, layer: int, head: int) -> torch.Tensor:
    """What a head gives at every token of the reference episodes."""
    out: list[torch.Tensor] = []
    dim = agent.sites.head_dim
    projection = agent.sites.per_layer[layer].projection
    hook = projection.register_forward_pre_hook(
        lambda _, args: out.append(args[0][0, :, head * dim : head * dim + dim])
    )
    for i in range(3):
        agent.model(torch.tensor([tokens(agent, Prompt(unroll(game, _REFERENCE_SEED + i, steps), steps - 1))]))
    hook.remove()
    return torch.cat(out)


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize(("name", "settings", "steps"), GAMES)
def test_an_ablated_agent_is_a_plain_ablation(
    model: LanguageModel, mode: Any, name: str, settings: dict[str, Any], steps: int
) -> None:
    game = make_game(name, **settings)
    agent = Intervened(model, Intervention(HEADS, mode, episodes=3))
    prompts = [p for e in episodes_of(game, range(2), steps) for p in prompts_of(e)]
    pools = {} if mode == "zero" else {h: pool(model, game, steps, *h) for h in HEADS}
    moved = 0.0
    for prompt, found in zip(prompts, agent.predict(prompts), strict=True):

        def put(layer: int, head: int, n: int, seed: Any = prompt.episode) -> Any:
            if mode == "zero":
                return 0
            seen = pools[layer, head]
            return seen.mean(0) if mode == "mean" else seen[drawn(seed, len(seen), n)]

        with raw(model, HEADS, put):
            assert found.logprobs == pytest.approx(plain(model, prompt), abs=1e-4)
        moved = max(moved, float(np.abs(np.subtract(found.logprobs, plain(model, prompt))).max()))
    assert moved > 0.01
    assert model.predict(prompts[:1])[0].logprobs == pytest.approx(plain(model, prompts[0]), abs=1e-4)  # hooks are gone


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize(("name", "settings", "steps"), GAMES)
def test_live_equals_replay(model: LanguageModel, mode: Any, name: str, settings: dict[str, Any], steps: int) -> None:
    game, agent = make_game(name, **settings), Intervened(model, Intervention(HEADS, mode, episodes=2))
    one, two = replay(agent, episodes_of(game, range(5), steps)).rows, live(agent, game, range(5), steps).rows
    for a, b in zip(one, two, strict=True):
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
        assert a["greedy"] == b["greedy"]


def test_hooks_see_the_episodes_and_change_what_is_said(model: LanguageModel) -> None:
    """At the answering tokens alone: as a plain run in which those of this and earlier questions are changed."""
    game, steps = make_game("Box", boxes=3), 4
    episodes = episodes_of(game, range(3), steps)
    prompts = [p for e in episodes for p in prompts_of(e)]
    asked: list[Prompt] = []

    def silence(x: torch.Tensor) -> torch.Tensor:
        rows, places = model.reading.answering
        asked.extend(a.prompt for a in model.reading.asked)
        assert x.shape[2:] == (model.sites.heads, model.sites.head_dim)
        out = x.clone()
        out[rows, places, 1] = 0
        return out

    with model.hooks(("head", 1, silence)) as same:
        assert same is model
        replayed = model.predict(prompts)
        assert set(asked) == set(prompts)
        lived = live(model, game, range(3), steps).rows
    rows = [p.logprobs for p in replayed]
    for now, row in zip(rows, lived, strict=True):
        assert now == pytest.approx(row["logprobs"], abs=1e-4)
    for prompt, found in zip(prompts, replayed, strict=True):
        at, original = len(tokens(model, prompt)) - 1, seen_of(model, prompt)

        def put(layer: int, head: int, n: int, at: int = at, original: Any = original) -> Any:
            keep = torch.ones(n, 1)
            keep[at] = 0
            return keep * original[:n]

        first = [c for c in prompt.asked.choices if len(model.encoder.piece(c)) == 1]
        assert first
        with raw(model, [(1, 1)], put):
            expected = plain(model, prompt)
        for choice, a, b in zip(prompt.asked.choices, found.logprobs, expected, strict=True):
            if choice in first:
                assert a == pytest.approx(b, abs=1e-4)
    with pytest.raises(AgentError, match="runs no forward pass now"):
        _ = model.reading


@torch.inference_mode()
def seen_of(agent: LanguageModel, prompt: Prompt) -> torch.Tensor:
    """What head 1.1 gives at each token of a prompt and of its longest choice."""
    out: list[torch.Tensor] = []
    tails = [list(agent.encoder.piece(c)) for c in prompt.asked.choices]
    with agent.sites.hook("head", 1, lambda x: out.append(x[0, :, 1].clone())):
        agent.model(torch.tensor([tokens(agent, prompt) + max(tails, key=len)]))
    return out[0]


def test_hooks_are_checked(model: LanguageModel) -> None:
    with pytest.raises(SiteError, match="layers 0 to 1"), model.hooks(("head", 7, lambda x: x)):
        pass


@pytest.mark.parametrize(
    ("heads", "words"), [([(2, 0)], "layer=2 .* layers 0 to 1"), ([(0, 1), (1, 4)], "head=4 .* heads 0 to 3")]
)
def test_heads_that_are_not_there(model: LanguageModel, heads: Any, words: str) -> None:
    with pytest.raises(SiteError, match=words):
        Intervened(model, Intervention(tuple(heads)))


def test_interventions_that_cannot_be() -> None:
    for arguments, words in [
        (((),), "at least one"),
        ((((1, 2, 3),),), r"\(layer, head\)"),
        ((((1, 2),), "median"), "zero, mean, resample"),
        ((((1, 2),), "mean", 0), "episodes=0"),
    ]:
        with pytest.raises(InterventionError, match=words):
            Intervention(*arguments)  # type: ignore[arg-type]


def test_names() -> None:
    assert Intervention(((3, 1), (2, 5), (3, 1))).named("m") == "m [without 3.1, 2.5]"
    assert Intervention(tuple((0, h) for h in range(6)), "mean").named("m") == (
        "m [without 0.0, 0.1, 0.2, 0.3 and 2 more: mean]"
    )


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize("seed", range(2))
def test_a_circuit_loses_its_answers_with_its_match_head_and_not_with_decoys(seed: int, mode: Any) -> None:
    found, rng = circuit("DFA", seed), np.random.default_rng(seed)
    game = make_game("DFA", states=5, actions_listed=4)
    sides = [s for _ in range(4) for s in game.contrast(rng, "state", steps=10).sides]
    prompts = [Prompt(s, 9) for s in sides]
    whole = found.agent.predict(prompts)
    assert all(p.greedy in q.asked.accepted for p, q in zip(whole, prompts, strict=True))
    without = Intervened(found.agent, Intervention((found.heads["match"],), mode)).predict(prompts)
    assert np.mean([p.greedy in q.asked.accepted for p, q in zip(without, prompts, strict=True)]) <= 0.5
    shams = Intervened(found.agent, Intervention(found.decoys, mode)).predict(prompts)
    for a, b in zip(whole, shams, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


def test_references_that_do_not_fit_are_asked_earlier(folders: dict[str, Path]) -> None:
    agent = LanguageModel(str(folders["gpt2"]), device="cpu")
    episodes = episodes_of(make_game("DFA", states=4), range(1), 60)
    result = replay(Intervened(agent, Intervention(HEADS, "mean", episodes=2)), episodes)
    assert 0 < len(result.rows) < 60
    assert "too many" in result.left_out


# --- experiments


def config(folders: dict[str, Path], **change: Any) -> dict[str, Any]:
    games = [
        {"game": "Box", "grid": {"boxes": [2, 3]}, "steps": 3, "episodes": 12},
        {"game": "DFA", "grid": {"states": [3]}, "steps": 4, "episodes": 12},
    ]
    return {"name": "i", "agents": [str(folders["gpt2"]), "ideal"], "games": games, "wandb": "disabled"} | change


def test_a_run_asks_each_model_with_and_without(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(config(folders)))
    read = read_config(
        str(tmp_path / "c.yaml"), ["intervene.heads=[[1,2],[0,3]]", "intervene.mode=mean"], PredictConfig
    )
    run = go(Predict(), read, tmp_path / "run")
    page = page_of(tmp_path / "run")
    model = str(folders["gpt2"])
    other = f"{model} [without 1.2, 0.3: mean]"
    rows = frame(tmp_path / "run")
    assert set(rows["agent"]) == {model, other, "ideal"}
    assert rows.filter(agent=model).height == rows.filter(agent=other).height == 12 * (3 + 3 + 4)
    make(config(folders), tmp_path / "plain")
    alone = frame(tmp_path / "plain")
    keys = list(QUESTION)
    assert_frame_equal(rows.filter(agent=model).sort(keys), alone.filter(agent=model).sort(keys))
    assert rows.filter(agent=model)["p_accepted"].to_list() != rows.filter(agent=other)["p_accepted"].to_list()
    shown = run.summary("without").rows(named=True)
    assert [(r["game"], r["subset"]) for r in shown] == [(g, s) for s in ("determined", "all") for g in ("Box", "DFA")]
    for row in shown:
        mine = rows.filter(game=row["game"])
        mine = mine.filter("determined") if row["subset"] == "determined" else mine
        gap = mine.filter(agent=other)["greedy_correct"].mean() - mine.filter(agent=model)["greedy_correct"].mean()
        assert row["difference"] == pytest.approx(gap)
        assert row["low"] <= gap <= row["high"]
        assert row["low"] < row["high"]
        assert row["n"] == mine.filter(agent=model).height
    section = re.search(r'<section id="without">.*?</section>', page, re.DOTALL)
    assert section is not None
    assert "With and without these heads" in section[0]
    assert "heads 1.2, 0.3" in section[0]
    assert section[0].count("<tr>") == 5
    assert 'id="without"' not in page_of(tmp_path / "plain")


def test_a_head_out_of_range_is_left_out_and_said(tmp_path: Path, folders: dict[str, Path]) -> None:
    make(config(folders, intervene={"heads": [[5, 0]]}), tmp_path)
    left = left_out(tmp_path)
    assert len(left) == 3
    assert all("layer=5 is not possible: gpt2 has layers 0 to 1" in x["reason"] for x in left)
    assert answered(tmp_path, str(folders["gpt2"]))
    assert frame(tmp_path)["agent"].n_unique() == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("intervene.heads=[[-1,2]]", "greater than or equal to 0"),
        ("intervene.heads=[]", "at least 1"),
        ("intervene.heads=[3]", "intervene.heads.0"),
        ("intervene.head=[[1,2]]", "did you mean 'heads'"),
        ("intervene.mode=zero", "intervene.heads: Field required"),
        ("agents=[ideal]", "only language models have heads"),
    ],
)
def test_wrong_interventions_are_told(tmp_path: Path, folders: dict[str, Path], override: str, words: str) -> None:
    base = config(folders, intervene={"heads": [[1, 2]]}) if override.startswith("agents") else config(folders)
    (tmp_path / "c.yaml").write_text(json.dumps(base))
    with pytest.raises(ConfigError, match=words):
        read_config(str(tmp_path / "c.yaml"), [override], PredictConfig)
