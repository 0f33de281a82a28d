"""What is recorded is what one plain forward pass over the prompt computes, on both roads and in constant memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from circuits import circuit
from safetensors import safe_open

from nextstate.agents.agent import Prompt
from nextstate.agents.intervene import Intervened
from nextstate.agents.intervention import Intervention
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, live, prompts_of, replay
from nextstate.agents.sites import SITES, SiteError
from nextstate.analysis.record import INDEX, RecordError, load, record, spans
from nextstate.envs import Episode, make_game
from nextstate.envs.contrast import segments

CASES: list[tuple[str, dict[str, Any], int]] = [
    ("Box", {"boxes": 4}, 4),
    ("Box", {"boxes": 3, "feedback": "inline", "style": "plain"}, 3),
    ("DFA", {"states": 4, "actions_listed": 3}, 5),
    ("Cycle", {"period": 3}, 5),
    ("FruitStore", {"people": 5}, 4),
]
KEYS = ["episode", "step", "question", "role", "site", "layer", "head"]


def tokens(agent: LanguageModel, prompt: Prompt) -> list[int]:
    first, *others = segments(*prompt)
    return [*agent.encoder.opening(first), *(t for p in others for t in agent.encoder.piece(p))]


@contextmanager
def eager(agent: LanguageModel) -> Iterator[None]:
    before = agent.model.config._attn_implementation
    agent.model.set_attn_implementation("eager")
    yield
    agent.model.set_attn_implementation(before)


@torch.inference_mode()
def plain(agent: LanguageModel, prompt: Prompt) -> dict[tuple[str, int], torch.Tensor]:
    """Activations [token, head, dim] and attention [head, token, token] of a plain forward pass over a prompt."""
    seen: dict[tuple[str, int], torch.Tensor] = {}
    hooks = [
        agent.sites.hook(site, layer, lambda x, k=(site, layer): seen.__setitem__(k, x[0].clone()))
        for site in SITES
        for layer in range(agent.sites.layers)
    ]
    with eager(agent):
        out = agent.model(torch.tensor([tokens(agent, prompt)]), output_attentions=True)
    for hook in hooks:
        hook.close()
    return seen | {("attention", layer): a[0] for layer, a in enumerate(out.attentions)}


def words(prompt: Prompt, role: str) -> str:
    piece, start, end = spans(prompt)[role]
    return segments(*prompt)[piece][start:end]


def ordered(index: pl.DataFrame) -> pl.DataFrame:
    return index.sort(KEYS)


@pytest.mark.parametrize(("name", "settings", "steps"), CASES)
@pytest.mark.parametrize("road", ["replay", "live"])
def test_what_is_recorded_is_what_a_plain_forward_computes(
    model: LanguageModel, tmp_path: Path, road: str, name: str, settings: dict[str, Any], steps: int
) -> None:
    game, at = make_game(name, **settings), ["state", "action", "last", 0, -2]
    before = model.predict(prompts_of(episodes_of(game, [0], steps)[0]))
    with record(model, tmp_path / "r", sites=SITES, at=at, attention=True, shard_bytes=9_000):  # type: ignore[arg-type]
        if road == "live":
            live(model, game, range(2), steps)
        else:
            replay(model, episodes_of(game, range(2), steps))
    index, tensors = load(tmp_path / "r")
    assert dict(index.schema) == INDEX
    about = json.loads((tmp_path / "r" / "record.json").read_text())
    assert about["finished"]
    prompts = [Prompt(e, t) for e in episodes_of(game, range(2), steps) for t in range(steps)]
    per_place = model.sites.layers * (2 * model.sites.heads + 3)
    asked = sum(3 + len(spans(p)) - (len(tokens(model, p)) < 2) for p in prompts)
    assert len(index) == asked * per_place
    assert about["shards"] > 1
    assert sum(about["missing"].values()) == 5 * len(prompts) - asked
    for prompt in prompts[:: 1 if name == "Box" else 2]:
        mine = index.filter(episode=prompt.episode.seed, step=prompt.step + 1)
        expected = plain(model, prompt)
        for (site, layer, head), rows in mine.group_by("site", "layer", "head"):
            found, places = tensors(rows), rows["position"].to_list()
            if site == "attention":
                theirs = expected[site, layer][head]
                for x, p in zip(found, places, strict=True):
                    assert torch.allclose(x[: p + 1], theirs[p, : p + 1], atol=1e-5)
                    assert not x[p + 1 :].any()
            else:
                theirs = expected[site, layer][places, head or 0]
                assert torch.allclose(found, theirs, atol=1e-4 * max(1.0, float(theirs.abs().max())))
        for role in ("state", "action"):
            for p in mine.filter(role=role)["position"].unique():
                said = model.tokenizer.decode(tokens(model, prompt)[: p + 1])
                assert said.endswith(words(prompt, role)) or words(prompt, role) in said[-12:]
        assert set(mine.filter(role="last")["position"]) == {len(tokens(model, prompt)) - 1}
    after = model.predict(prompts_of(episodes_of(game, [0], steps)[0]))
    assert [p.logprobs for p in before] == [p.logprobs for p in after]


@pytest.mark.parametrize(("name", "settings", "steps"), CASES)
def test_live_equals_replay(
    model: LanguageModel, tmp_path: Path, name: str, settings: dict[str, Any], steps: int
) -> None:
    game, at = make_game(name, **settings), ["state", "action", "last", 1]
    with record(model, tmp_path / "replay", at=at, attention=True):  # type: ignore[arg-type]
        replay(model, episodes_of(game, range(4), steps))
    with record(model, tmp_path / "live", at=at, attention=True):  # type: ignore[arg-type]
        live(model, game, range(4), steps)
    (one, ours), (two, theirs) = load(tmp_path / "replay"), load(tmp_path / "live")
    one, two = ordered(one), ordered(two)
    assert one.drop("shard", "row").equals(two.drop("shard", "row"))
    for site in ("head", "attention"):
        assert torch.allclose(ours(one.filter(site=site)), theirs(two.filter(site=site)), atol=1e-4)


def test_nnsight_reads_the_same_head_inputs(folders: dict[str, Path], tmp_path: Path) -> None:
    paths = {"gpt2": "transformer.h.1.attn.c_proj", "llama": "model.layers.1.self_attn.o_proj"}
    for architecture, path in paths.items():
        agent = LanguageModel(str(folders[architecture]), device="cpu")
        episode = episodes_of(make_game("Box", boxes=3), [5], 3)[0]
        with record(agent, tmp_path / architecture, layers=[1]):
            replay(agent, [episode])
        index, tensors = load(tmp_path / architecture)
        for t in range(3):
            ids = torch.tensor([tokens(agent, Prompt(episode, t))])
            module = agent.traced.get(path) if hasattr(agent.traced, "get") else None
            assert module is not None
            with agent.traced.trace(ids):
                seen = module.input.save()
            found = tensors(index.filter(step=t + 1).sort("head")).flatten()
            assert torch.allclose(found, seen[0, -1], atol=1e-4)


def test_what_is_told_where() -> None:
    def found_roles(name: str, steps: int, **settings: Any) -> list[dict[str, str]]:
        episode = episodes_of(make_game(name, **settings), [3], steps)[0]
        prompts = [Prompt(episode, t) for t in range(steps)]
        return [{role: words(p, role) for role in spans(p)} for p in prompts]

    episode = episodes_of(make_game("DFA", states=4), [3], 5)[0]
    for t, (step, found) in enumerate(zip(episode.steps, found_roles("DFA", 5, states=4), strict=True)):
        machine = step.state.machine  # type: ignore[attr-defined]
        assert found == {"state": machine.states[step.state.at], "action": machine.actions[step.action]}  # type: ignore[attr-defined,index]
        span = spans(Prompt(episode, t))["state"]
        assert span.piece == (0 if t == 0 else 4 * t - 1)  # the opening, or the last answer
    for step, found in zip(
        episodes_of(make_game("Box", boxes=4), [3], 5)[0].steps, found_roles("Box", 5, boxes=4), strict=True
    ):
        asked = step.questions[0]
        assert found["state"] == make_game("Box", boxes=4).values(step.state)[asked.variable]
        assert found["action"] == step.narration[-2]
    assert all(set(found) == {"state"} for found in found_roles("Cycle", 5, period=3))
    assert all(set(found) == {"action"} for found in found_roles("FruitStore", 3, people=4))


def test_memory_does_not_grow_with_the_number_of_episodes(folders: dict[str, Path], tmp_path: Path) -> None:
    agent, game = LanguageModel(str(folders["gpt2"]), device="cpu"), make_game("Box", boxes=3)
    agent.sites.check("head")
    most: dict[int, int] = {}
    for n in (50, 200):
        gc.collect()
        peak, before = [0], live_bytes()
        with record(agent, tmp_path / str(n), attention=True, at=["state", "last"], shard_bytes=50_000) as recorder:

            def measure(_: torch.Tensor, peak: list[int] = peak, before: int = before) -> None:
                peak[0] = max(peak[0], live_bytes() - before)

            def held(_: Any, recorder: Any = recorder) -> None:
                assert recorder.held <= 50_000
                assert len(recorder._pending) * len(recorder.kept) < 1_000_000

            with agent.hooks(("mlp_out", 1, measure), done=held):
                for k in range(0, n, 25):
                    replay(agent, episodes_of(game, range(k, k + 25), 3))
            gc.collect()
            assert len(recorder._known) == 0  # nothing is kept of episodes that are over
        most[n] = peak[0]
        index, _ = load(tmp_path / str(n))
        assert index["episode"].n_unique() == n
    assert 0 < most[200] <= 1.1 * most[50]
    shards = sorted((tmp_path / "200").glob("*.safetensors"))
    assert len(shards) > 4
    for shard in shards:
        assert sum(v.nbytes for v in _values(shard)) <= 60_000  # padding of attention included
    assert not list((tmp_path / "200").glob("*.partial"))


def live_bytes() -> int:
    """Bytes of all tensors that anybody holds."""
    seen = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:  # neither weights nor what a compiler in another test left behind
            seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(seen.values())


def _values(shard: Path) -> list[torch.Tensor]:
    with safe_open(shard, framework="pt") as file:
        return [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118


def test_the_match_head_of_a_circuit_looks_at_what_was_told(tmp_path: Path) -> None:
    found, rng = circuit("DFA", 0), np.random.default_rng(0)
    sides = [
        s for _ in range(3) for s in make_game("DFA", states=5, actions_listed=4).contrast(rng, "state", steps=10).sides
    ]
    with record(found.agent, tmp_path / "r", heads=[found.heads["match"]], attention=True):
        found.agent.predict([Prompt(s, 9) for s in sides])
    index, tensors = load(tmp_path / "r")
    rows = index.filter(site="attention")
    assert len(rows) == len(sides)
    for side, weights in zip(sides, tensors(rows), strict=True):
        answer = side.steps[-1].questions[0].answer
        token = tokens(found.agent, Prompt(side, 9))[int(weights.argmax())]
        assert found.agent.tokenizer.decode([token]).strip() == answer


def test_an_ablated_agent_can_be_recorded_too(folders: dict[str, Path], tmp_path: Path) -> None:
    agent = LanguageModel(str(folders["llama"]), device="cpu")
    episodes = episodes_of(make_game("Box", boxes=3), range(2), 3)
    kept = {}
    for name, asked in (("with", agent), ("without", Intervened(agent, Intervention(((0, 1),))))):
        with record(agent, tmp_path / name, sites=["head", "attn_out"], layers=[0, 1]):
            replay(asked, episodes)
        index, tensors = load(tmp_path / name)
        kept[name] = {k: tensors(rows) for k, rows in index.group_by("site", "layer")}
    for key, same in {("head", 0): True, ("attn_out", 0): False, ("head", 1): False}.items():
        assert torch.allclose(kept["with"][key], kept["without"][key], atol=1e-6) == same


def test_several_questions_a_step_and_a_recording_of_no_finish(model: LanguageModel, tmp_path: Path) -> None:
    episodes = episodes_of(make_game("Box", boxes=4), range(2), 3, ask=2)

    def cut_off() -> None:
        with record(model, tmp_path / "r", shard_bytes=1000):
            replay(model, episodes[:1])
            replay(model, episodes[1:])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    index, tensors = load(tmp_path / "r")
    assert not json.loads((tmp_path / "r" / "record.json").read_text())["finished"]
    assert index["question"].max() == 1
    assert tensors(index).isfinite().all()
    for prompt in [p for e in episodes[:1] for p in prompts_of(e)]:
        mine = index.filter(episode=0, step=prompt.step + 1, question=prompt.question, layer=1, head=2)
        if len(mine):
            assert torch.allclose(tensors(mine)[0], plain(model, prompt)["head", 1][-1, 2], atol=1e-4)


def test_flipped_bits_and_missing_files_are_always_noticed(folders: dict[str, Path], tmp_path: Path) -> None:
    agent, folder = LanguageModel(str(folders["gpt2"]), device="cpu"), tmp_path / "r"
    with record(agent, folder, shard_bytes=2_000):
        agent.predict([Prompt(e, t) for e in episodes_of(make_game("Box"), range(6), 4) for t in range(4)])
    rng, files = np.random.default_rng(0), sorted([*folder.glob("*.safetensors"), *folder.glob("*.parquet")])
    assert len(files) >= 3

    def read() -> torch.Tensor:
        index, shards = load(folder)
        return shards(index.filter(site="head", layer=0, head=0))

    whole = read()
    for k in range(200):
        path = files[int(rng.integers(len(files)))]
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged) if k % 10 else path.unlink()
        with pytest.raises(RecordError, match=f"{path.name} is (damaged|missing).*record again"):
            read()
        path.write_bytes(content)
    assert torch.equal(read(), whole)


def test_memory_that_runs_out_records_nothing_twice(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, episodes = LanguageModel(str(folders["gpt2"]), device="cpu"), episodes_of(make_game("Box"), range(6), 2)
    in_tree = agent.forward.in_tree

    def narrow(tokens: Any, *args: Any) -> Any:
        out = in_tree(tokens, *args)
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return out

    monkeypatch.setattr(agent.forward, "in_tree", narrow)
    with record(agent, tmp_path / "r"):
        replay(agent, episodes)
    index, _ = load(tmp_path / "r")
    assert len(index) == 6 * 2 * 8
    assert index.select("shard", "row", "layer", "head").n_unique() == len(index)


def test_bad_input(model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("precious")
    for arguments, words in [
        ({"folder": tmp_path / "there"}, "is there already: give another folder"),
        ({"at": ["stat"]}, "at='stat' is not possible: expected one of state, action, last"),
        ({"at": []}, "nothing to record"),
        ({"sites": []}, "nothing to record"),
    ]:
        with pytest.raises(RecordError, match=words), record(model, **{"folder": tmp_path / "r"} | arguments):
            pass
    for arguments, words in [
        ({"layers": [2]}, "layers 0 to 1"),
        ({"heads": [(0, 4)]}, "heads 0 to 3"),
        ({"sites": ["resid_post"]}, "expected one of resid_pre"),
    ]:
        with pytest.raises(SiteError, match=words), record(model, tmp_path / "r", **arguments):
            pass
    assert not (tmp_path / "r").exists()
    with pytest.raises(RecordError, match="has no recording"):
        load(tmp_path / "there")


def test_an_empty_recording_and_mixed_widths(model: LanguageModel, tmp_path: Path) -> None:
    with record(model, tmp_path / "empty"):
        pass
    index, tensors = load(tmp_path / "empty")
    assert index.is_empty()
    with pytest.raises(RecordError, match="no rows"):
        tensors(index)
    episodes: list[Episode] = episodes_of(make_game("Box"), range(1), 2)
    with record(model, tmp_path / "r", sites=["head", "resid_pre"]):
        replay(model, episodes)
    index, tensors = load(tmp_path / "r")
    with pytest.raises(RecordError, match="different widths"):
        tensors(index)
