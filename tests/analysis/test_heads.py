"""The heads of circuits built by hand are found and told apart; a patching run is a folder and a page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from nextstate import cli
from nextstate.agents.agent import Prompt
from nextstate.agents.config import ConfigError, read_config
from nextstate.agents.language import LanguageModel
from nextstate.analysis.heads.config import PatchConfig, draw
from nextstate.analysis.heads.pairs import PatchError, TokenPair
from nextstate.analysis.heads.patch import Recovery, Sweep, rank_agreement, recovery, sweep, tokens_of
from nextstate.analysis.heads.recovery import Carried, table, too_few
from nextstate.analysis.heads.routing import (
    Routing,
    attention_of,
    baseline,
    head_table,
    layout,
    place_of_content,
    prefers,
    routing,
    token_pairs,
    top_heads,
)
from nextstate.analysis.heads.study import Heads
from nextstate.analysis.heads.tables import sweep_of
from nextstate.analysis.log import proved
from nextstate.analysis.run import RunError, read_record
from nextstate.analysis.study import go, open_run
from nextstate.envs.contrast import Pair, Role, Span
from nextstate.envs.games import make_game
from tests.circuits import Circuit, circuit
from tests.pages import data, loads_nothing, markup, places

SEEDS = range(10)
PAIRS = 8
NARROW: dict[str, Any] = {
    "name": "narrow", "model": "circuit", "game_args": {"states": 5, "actions_listed": 4}, "pairs": 7, "steps": 8,
    "kinds": ["state", "action"], "directions": ["denoise"], "resamples": 200, "wandb": "disabled",
}  # fmt: skip


@cache
def built(game: str, seed: int) -> Circuit:
    return circuit(game, seed)


@cache
def drawn(game: str, kind: str) -> list[Pair]:
    rng, size = np.random.default_rng(3), {"DFA": {"states": 5, "actions_listed": 4}, "Cycle": {"period": 5}}[game]
    return [make_game(game, **size).contrast(rng, kind, steps=10) for _ in range(2 * PAIRS)]


def joined(agent: LanguageModel, game: str, kind: str) -> list[TokenPair]:
    """Return pairs, each with the clean prompt of another pair as its control."""
    found, excluded = token_pairs(agent.encoder, drawn(game, kind))
    assert not excluded
    assert len({place_of_content(pair) for pair in found}) == 1
    return [replace(pair, control=other.clean) for pair, other in zip(found[:PAIRS], found[PAIRS:], strict=True)]


def named(found: Sweep, made: Circuit) -> set[str]:
    """Return the heads that carry by the test, by their function; a head without one is named by its slot."""
    return _named(recovery(found, np.random.default_rng(0), resamples=200).test.carries, made)


def moved(found: Sweep, made: Circuit) -> set[str]:
    """Return the heads with a recovery of at least a hundredth, as `named` does."""
    return _named(np.abs(recovery(found, np.random.default_rng(0), resamples=50).value) > 0.01, made)


def _named(cells: np.ndarray, made: Circuit) -> set[str]:
    names = {slot: name for name, slot in made.heads.items()}
    return {names.get((int(a), int(b)), f"{a}.{b}") for a, b in np.argwhere(cells[..., 0])}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_sweep_names_exactly_the_heads_of_the_circuit(seed: int) -> None:
    made = built("DFA", seed)
    for kind, gathers in (("state", "state"), ("action", "action")):
        pairs = joined(made.agent, "DFA", kind)
        for direction in ("denoise", "noise"):
            found = sweep(made.agent, pairs, direction=direction, controls=True, vocabulary=False)  # type: ignore[arg-type]
            assert named(found, made) == moved(found, made) == {gathers, "match"}
            rest = np.ones(found.patched.difference.shape[1:3], dtype=bool)
            for name in (gathers, "match"):
                rest[made.heads[name]] = False
            values = recovery(found, np.random.default_rng(0), resamples=100).value[..., 0]
            assert np.abs(values[rest]).max() < 1e-3  # decoys are among them
            assert values[~rest] == pytest.approx(1, abs=1e-3)
    pairs = joined(made.agent, "DFA", "state")
    found = sweep(made.agent, pairs, direction="zero", positions="all", vocabulary=False)
    assert moved(found, made) == set(made.heads)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_cycles_circuit_too(seed: int) -> None:
    made = built("Cycle", seed)
    pairs = joined(made.agent, "Cycle", "state")
    found = sweep(made.agent, pairs, direction="zero", positions="all", vocabulary=False)
    assert moved(found, made) == {"previous", "induction"}
    assert named(found, made) == set()  # an ablation is not tested
    assert named(sweep(made.agent, pairs, controls=True, vocabulary=False), made) == {"induction"}


@pytest.mark.parametrize("seed", SEEDS)
def test_state_and_action_are_told_apart(seed: int) -> None:
    made = built("DFA", seed)
    found = routed(made)
    labels = {slot: label for slot, label in np.ndenumerate(found.labels[..., 0]) if label}
    where = made.heads
    assert labels == {where["state"]: "state", where["action"]: "action", where["match"]: "both"}
    for name, value, share in (("state", 1, 1), ("action", -1, 0), ("match", 0, 0.5)):
        assert found.value[where[name]][0] == pytest.approx(value, abs=1e-3)
        assert found.share[where[name]][0] == pytest.approx(share, abs=1e-3)
    assert np.isnan(found.share[made.decoys[0]][0])
    table = head_table(found, range(4))
    assert set(top_heads(table)) == {where[n] for n in ("state", "action", "match")}


def swept(made: Circuit, kind: str) -> Sweep:
    return sweep(made.agent, joined(made.agent, "DFA", kind), controls=True, vocabulary=False)


def compared(state: Sweep, action: Sweep) -> Routing:
    rng = np.random.default_rng(0)
    both = [(found, recovery(found, rng, resamples=200)) for found in (state, action)]
    return routing(*both, rng, resamples=400)


def routed(made: Circuit) -> Routing:
    return compared(swept(made, "state"), swept(made, "action"))


def test_routing_intervals_hold_the_value_and_need_the_same_cells() -> None:
    made = built("DFA", 0)
    state, action = swept(made, "state"), swept(made, "action")
    noise = np.random.default_rng(1).normal(size=state.patched.difference.shape)
    noisy = replace(state, patched=replace(state.patched, difference=state.patched.difference + noise))
    found = compared(noisy, action)
    assert (found.band_low <= found.low + 1e-6).all()
    assert (found.low <= found.value).all()
    assert (found.value <= found.high).all()
    assert (found.high <= found.band_high + 1e-6).all()
    assert found.value == pytest.approx(found.state.value - found.action.value)
    with pytest.raises(PatchError, match="different cells"):
        compared(state, replace(action, direction="noise"))


def test_a_label_is_what_the_two_tests_say() -> None:
    value = np.zeros((1, 2, 2))
    state, action = (
        Recovery(*[value] * 5, 30, 0, 0, Carried(30, value, np.array(cells)[None]))
        for cells in ([[True, True], [False, False]], [[True, False], [True, False]])
    )
    found = Routing(*[value] * 5, state, action)
    assert found.labels[0].tolist() == [["both", "state"], ["action", ""]]


def test_a_head_that_only_breaks_down_on_unrelated_content_carries_nothing() -> None:
    """A head that gives the same in both prompts of each pair, and something else in unrelated ones, is not named."""
    made, rng = built("DFA", 0), np.random.default_rng(0)
    found, where = swept(made, "state"), made.decoys[0]
    assert found.control_patched is not None
    found.control_patched[:, *where, 0] += 5 + rng.random(PAIRS)
    done = recovery(found, rng, resamples=50)
    assert done.test.p[where][0] < 0.05
    assert not done.test.carries[where][0]
    found.patched.difference[:, *where, 0] += 20 + rng.random(PAIRS)  # now it has the larger effect from the pair
    assert recovery(found, rng, resamples=50).test.carries[where][0]


def test_too_few_pairs_are_not_tested_and_pairs_without_a_control_do_not_count() -> None:
    made = built("DFA", 0)
    pairs = joined(made.agent, "DFA", "state")
    for have, known in ((5, False), (6, True)):
        some = [pair if i < have else replace(pair, control=()) for i, pair in enumerate(pairs)]
        found = sweep(made.agent, some, controls=True, vocabulary=False)
        assert found.control_patched is not None
        assert np.isnan(found.control_patched[have:]).all()
        done = recovery(found, np.random.default_rng(0), resamples=50)
        assert (done.test.pairs, done.pairs, done.test.known) == (have, PAIRS, known)
        assert done.test.carries.any() == known
        rows = table(found, done)
        assert rows["carries"].null_count() == (0 if known else len(rows))
    assert too_few(5) == (
        "not enough pairs to test which heads carry anything: 5 can be tested, at least 6 are needed and 48 advised"
    )
    assert too_few(23).startswith("few pairs to test which heads carry anything: with 23,")
    assert not too_few(24)


def test_a_layer_brings_what_its_heads_bring() -> None:
    made = built("DFA", 2)
    found = [
        recovery(sweep(made.agent, joined(made.agent, "DFA", "state"), site=site, vocabulary=False),  # type: ignore[arg-type]
                 np.random.default_rng(0), resamples=100).value[:, 0, 0]
        for site in ("attn_out", "resid_pre")
    ]  # fmt: skip
    for name in ("state", "match"):
        assert found[0][made.heads[name][0]] == pytest.approx(1, abs=1e-3)
    layer = made.heads["state"][0]
    assert np.abs(found[1][: layer + 1]).max() < 1e-3
    assert found[1][layer + 1 :] == pytest.approx(1, abs=1e-3)


# --- pairs as tokens


def test_pairs_as_tokens_are_the_prompts_that_a_model_reads() -> None:
    encoder = built("DFA", 0).agent.encoder
    pair, (one,) = drawn("DFA", "state")[0], token_pairs(encoder, drawn("DFA", "state")[:1])[0]
    assert one.clean == tokens_of(encoder, Prompt(pair.clean, len(pair.clean.steps) - 1))
    assert [encoder.piece(a) for a in pair.answers] == [(one.answer,), (one.other,)]
    differ = [i for i, (a, b) in enumerate(zip(one.clean, one.corrupted, strict=True)) if a != b]
    assert differ == [one.roles["state"]]
    assert one.roles["state"] < one.roles["action"] < one.roles["last"] == len(one.clean) - 1
    assert {"match (clean)", "match (corrupted)"} <= set(one.roles)


def test_what_cannot_be_measured_with_is_left_out_and_told() -> None:
    encoder, (pair, other) = built("DFA", 0).agent.encoder, drawn("DFA", "state")[:2]
    same = Pair("state", "balanced", pair.clean, pair.clean, {})
    mixed = Pair("action", "balanced", pair.clean, pair.corrupted, pair.roles)
    still = replace(pair, roles=pair.roles | {"state": Role(Span(0, 0, 2), Span(0, 0, 2))})
    longer = make_game("DFA", states=5, actions_listed=4).contrast(np.random.default_rng(0), "state", steps=14)
    short = Pair("state", "balanced", pair.clean, longer.clean, {})
    found, excluded = token_pairs(encoder, [pair, same, mixed, still, short, other])
    assert len(found) == 2
    assert [x.pair for x in excluded] == [1, 2, 3, 4]
    for x, words in zip(
        excluded,
        [
            "both sides have the same answer",
            "an? action pair differ in state",
            "have the same state",
            "10 and 14 steps",
        ],
        strict=True,
    ):
        assert re.search(words, x.reason)


def test_answers_are_compared_where_their_tokens_differ(folders: dict[str, Path]) -> None:
    encoder = LanguageModel(str(folders["gpt2"]), device="cpu").encoder
    rng, game = np.random.default_rng(0), make_game("DFA", symbols="pairs")
    drawn = (game.contrast(rng, "state", steps=12) for _ in range(1000))
    pair = next(p for p in drawn if len({encoder.piece(a)[0] for a in p.answers}) == 1)
    answers = [encoder.piece(a) for a in pair.answers]
    common = next(i for i, (a, b) in enumerate(zip(*answers, strict=False)) if a != b)
    (one,), _ = token_pairs(encoder, [pair])
    prompt = tokens_of(encoder, Prompt(pair.clean, len(pair.clean.steps) - 1))
    assert common > 0  # else this shows nothing
    assert one.clean == prompt + answers[0][:common]
    assert (one.answer, one.other) == (answers[0][common], answers[1][common])
    assert one.roles["last"] == len(one.clean) - 1


def test_positions_are_looked_at_one_by_one_only_where_they_mean_the_same() -> None:
    agent = built("DFA", 0).agent
    pairs = joined(agent, "DFA", "state")
    assert layout(pairs) == "each"
    longer = [replace(p, clean=(1, *p.clean), corrupted=(1, *p.corrupted), control=(),
                      roles={k: v + 1 for k, v in p.roles.items()}) for p in pairs[:1]]  # fmt: skip
    roles = layout([*pairs, *longer])
    assert roles[-1] == "last"
    assert {"state", "action"} <= set(roles)


def test_the_baseline_is_what_each_prompt_says_alone() -> None:
    agent = built("DFA", 0).agent
    pairs = joined(agent, "DFA", "state")
    clean, corrupted = baseline(agent, pairs)
    for i, pair in enumerate(pairs):
        for found, tokens in ((clean, pair.clean), (corrupted, pair.corrupted)):
            with torch.inference_mode():
                logits = agent.model(torch.tensor([tokens])).logits[0, -1]
            assert found.difference[i] == pytest.approx(float(logits[pair.answer] - logits[pair.other]), abs=1e-3)
    assert prefers(clean, corrupted).all()
    assert not prefers(corrupted, clean).any()


def test_attention_is_that_of_the_answering_token_and_the_model_stays_as_it_was() -> None:
    made = built("DFA", 0)
    before = made.agent.model.config._attn_implementation
    pair = joined(made.agent, "DFA", "state")[0]
    weights = attention_of(made.agent, pair.clean, [made.heads["state"], made.heads["action"]])
    assert weights.shape == (2, len(pair.clean))
    assert weights.sum(1) == pytest.approx(1, abs=1e-5)
    assert weights.argmax(1).tolist()[1] == pair.roles["action"]
    assert made.agent.model.config._attn_implementation == before


def test_attention_can_be_read_on_every_architecture(model: LanguageModel) -> None:
    weights = attention_of(model, [5, 6, 7, 8], [(0, 0), (1, 3)])
    assert weights.sum(1) == pytest.approx(1, abs=1e-5)
    assert not np.allclose(weights[0], weights[1])


# --- runs


def narrow(**change: Any) -> PatchConfig:
    return PatchConfig(**NARROW | change)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("heads") / "run"
    config = narrow(directions=["denoise", "zero"])
    go(Heads(), config, out, command="nextstate patch </script>", model=built("DFA", 1).agent)
    return out


def test_a_run_finds_the_circuit_and_says_so(folder: Path) -> None:
    made, (_, run) = built("DFA", 1), open_run(folder, "")
    found = run.summary("heads").filter(pl.col("carries") != "")
    carried = {(r["layer"], r["head"]): r["carries"] for r in found.iter_rows(named=True)}
    assert carried == {made.heads["state"]: "state", made.heads["action"]: "action", made.heads["match"]: "both"}
    layers = run.summary("layers").filter(site="attn_out")
    assert layers["state"][made.heads["state"][0]] == pytest.approx(1, abs=1e-3)
    assert run.record["finished"]
    assert run.summary("counts").filter(kind="state").rows() == [("balanced", "state", 7, 7, 7, 0, 1.0)]
    assert run.summary("excluded").is_empty()
    assert set(Heads().headline(run)["head"]) == {f"{layer}.{head}" for layer, head in carried}
    sweeps = run.tables("sweeps/*")
    assert len(sweeps) == 2 * (4 + 1 + 1 + 1)
    for rows in sweeps.values():
        assert rows["pairs"].unique().to_list() == [7]
        assert not rows["exact"][0] or rows["control"][0] < 1e-4


def test_the_headline_of_the_page_names_the_heads(folder: Path) -> None:
    made, page = built("DFA", 1), Heads().page(open_run(folder)[1])
    assert page.context["headline"]["routing"] == {
        "state": [made.heads["state"]], "action": [made.heads["action"]], "both": [made.heads["match"]],
    }  # fmt: skip


def test_a_sweep_comes_back_from_its_table(folder: Path) -> None:
    run, agent = open_run(folder, "")[1], built("DFA", 1).agent
    pairs = draw(narrow(), make_game("DFA", **NARROW["game_args"]), "balanced", "state", run.rng("balanced", "state"))
    again = sweep(agent, token_pairs(agent.encoder, pairs)[0], vocabulary=False)
    found = sweep_of(run, "balanced", "state", "head", "denoise", "last")
    assert found is not None
    back, recovered = found
    assert back.patched.difference == pytest.approx(again.patched.difference, abs=1e-3)
    assert rank_agreement(back, back) == pytest.approx(1)
    assert recovery(back, np.random.default_rng(0), resamples=50).value.ravel() == pytest.approx(
        run.table("sweeps/balanced-state-head-denoise-last")["recovery"].to_numpy(), abs=1e-4
    )
    assert back.control_patched is not None
    again = recovery(back, np.random.default_rng(5), resamples=50)  # with at most 14 pairs the test draws nothing
    assert again.test.p.tolist() == recovered.test.p.tolist()
    assert again.test.carries.tolist() == recovered.test.carries.tolist()


def test_the_page_is_whole_and_loads_nothing(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = markup(text)
    assert text.count("</script>") == 3
    assert "</script>" not in page
    assert loads_nothing(text)
    assert "url(" not in page
    assert "@import" not in page
    for words in ("heads carry state", "State against action", "Spearman", "Run details", "Positions",
                  "How each model was run"):  # fmt: skip
        assert words in text
    figures = data(text, "figures")
    assert places(text) == sorted(figures)
    maps = [t for f in figures.values() for t in f["data"] if t["type"] == "heatmap"]
    assert len(maps) == 2 * 2 + 2
    assert all(t["zmin"] == -t["zmax"] for t in maps)


def test_the_same_config_resumes_and_another_is_refused(tmp_path: Path) -> None:
    config, agent = narrow(sites=["head"]), built("DFA", 0).agent
    go(Heads(), config, tmp_path, model=agent)
    files = sorted((tmp_path / "sweeps").glob("*.parquet"))
    tables = {p: pl.read_parquet(p) for p in files}
    assert len(files) == 4
    files[0].unlink()
    written = {p: p.stat().st_mtime_ns for p in files[1:]}
    go(Heads(), config, tmp_path, model=agent)
    assert written == {p: p.stat().st_mtime_ns for p in files[1:]}
    assert_frame_equal(tables[files[0]], pl.read_parquet(files[0]))
    (before,) = read_record(tmp_path)["agents"]
    assert [(c["road"], c["live"]) for c in before["certificates"]] == [("tree", False)]
    agent.forward.certificates.clear()  # as after loading it again
    files[0].unlink()
    go(Heads(), config, tmp_path, model=agent)
    (after,) = read_record(tmp_path)["agents"]
    assert [c | {"seconds": 0} for c in after["certificates"]] == [c | {"seconds": 0} for c in before["certificates"]]
    assert proved(read_record(tmp_path))["certificate/circuit-DFA-0/replay/road"] == "tree"
    with pytest.raises(RunError, match=r"another config \(different: pairs\)"):
        go(Heads(), config.model_copy(update={"pairs": 8}), tmp_path, model=agent)


def test_a_layer_that_is_edited_makes_every_table_anew(tmp_path: Path) -> None:
    config, agent = narrow(sites=["head"], directions=["denoise"], kinds=["state"]), built("DFA", 2).agent
    go(Heads(), config, tmp_path, model=agent)
    first = pl.read_parquet(tmp_path / "pairs/balanced-state.parquet")
    weights = next(p for name, p in agent.model.named_parameters() if "ln_f.weight" in name or "norm" in name)
    try:
        with torch.no_grad():
            weights.mul_(0.5)
        run = go(Heads(), config, tmp_path, model=agent)
    finally:
        with torch.no_grad():
            weights.mul_(2)
    second = pl.read_parquet(tmp_path / "pairs/balanced-state.parquet")
    assert not first.equals(second)
    assert {x["table"] for x in run.record["set_aside"]} >= {"pairs/balanced-state"}
    assert all(
        "made with files" in x["reason"] for x in run.record["set_aside"] if x["table"] == "pairs/balanced-state"
    )


def test_a_model_that_fails_on_everything_is_said_and_nothing_is_drawn(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    agent = LanguageModel(str(folders["gpt2"]), device="cpu")
    with torch.no_grad():
        for parameter in agent.model.parameters():
            parameter.fill_(0)  # it likes all tokens the same
    run = go(Heads(), narrow(), tmp_path, model=agent)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r"No result for balanced (?:state|action) pairs", page)) == 2
    assert "fails on all 7 of them" in page
    assert 'data-figure="' not in page
    assert all(table.is_empty() for table in run.tables("sweeps/*").values())
    assert len(run.record["left_out"]) == 2
    assert all(x["failed"] for x in run.record["left_out"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ["sate"]}, "kinds.0"),
        ({"kinds": ["state", "state"]}, "names one twice"),
        ({"site": ["head"]}, "unknown key 'site'.*did you mean 'sites'"),
        ({"pairs": 1}, "greater than or equal to 2"),
    ],
)
def test_wrong_configs(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(NARROW | change))
    with pytest.raises(ConfigError, match=message):
        read_config(str(tmp_path / "c.yaml"), [], PatchConfig)


def test_pairs_that_a_game_has_not(tmp_path: Path) -> None:
    config = narrow(game="Cycle", game_args={}, kinds=["action"])
    with pytest.raises(RunError, match="Cycle has no balanced pairs of kinds action; it has state"):
        go(Heads(), config, tmp_path / "run", model=built("Cycle", 0).agent)
    assert not (tmp_path / "run").exists()


def test_the_command_line_end_to_end(tmp_path: Path) -> None:
    small = ["pairs=3", "steps=6", "sites=[head]", "kinds=[state,action]", "directions=[denoise]", "resamples=100"]
    command = [sys.executable, "-m", "nextstate.cli", "patch", "configs/heads/quickstart.yaml", *small]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = tmp_path / "runs" / "heads-quickstart" / "report.html"
    assert "report.html" in done.stdout
    assert list(page.parent.glob("wandb/offline-run-*"))
    first = page.stat().st_mtime_ns
    assert CliRunner().invoke(cli.app, ["report", str(page.parent)]).exit_code == 0
    assert page.stat().st_mtime_ns > first
    refused = CliRunner().invoke(cli.app, [*command[3:], "seed=1", "--out", str(page.parent)])
    assert isinstance(refused.exception, RunError)
    assert "another config (different: seed)" in str(refused.exception)
