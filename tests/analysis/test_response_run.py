"""A response run is a folder and a page: on circuits built by hand, without a window, on the command line."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from nextstate.patching import PatchConfig
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from nextstate import cli, patching, responding
from nextstate.agents.config import ConfigError, packaged_configs, read_config
from nextstate.agents.language import LanguageModel
from nextstate.analysis import response_report
from nextstate.analysis.page.page import render
from nextstate.analysis.response_tables import Signature, agreement, load
from nextstate.analysis.tables import RunError
from nextstate.folder import ExperimentError
from nextstate.responding import ResponseConfig
from tests.circuits import STATES, Circuit, circuit
from tests.pages import data, loads_nothing, markup, places

NARROW: dict[str, Any] = {
    "name": "narrow", "model": "circuit", "block": 8, "prompts": 3, "directions": 1, "window_prompts": 1,
    "strengths": [1e-3, 1e-2, 0.05, 0.2], "alphabet": [f" {x}" for x in STATES], "ablation": "zero",
    "resamples": 100, "wandb": "disabled",
}  # fmt: skip


@cache
def built(game: str) -> Circuit:
    return circuit(game, 0, decoys=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("response") / "run"
    bridge = [{"game": "Cycle", "settings": {"period": 5}, "pairs": 3}]
    config = ResponseConfig(**NARROW | {"bridge": bridge})
    responding.run(config, out, command="nextstate response </script>", model=built("Cycle").agent)
    return out


def test_a_run_finds_the_circuit_and_says_so(folder: Path) -> None:
    made, run = built("Cycle"), load(folder)
    told = response_report.headline(run)
    own = told["windows"][0]
    assert (own["dtype"], own["low"]) == ("float32", 1e-3)
    assert own["high"] >= 0.05
    assert told["signature"]["emerges"] == made.heads["induction"][0]
    assert told["signature"]["added"]["low"] > 0.2
    lost = {(r["layer"], r["head"]): r for r in told["heads"]["rows"]}
    assert set(lost) == set(made.heads.values())
    assert lost[made.heads["induction"]]["lost"] == pytest.approx(1, abs=0.1)
    assert lost[made.heads["induction"]]["prefix"] == pytest.approx(1, abs=1e-4)
    assert lost[made.heads["induction"]]["copying"] == 1
    (bridge,) = told["bridges"]
    assert bridge["roles"]["match"]["response"] > 5 * bridge["roles"]["others"]["response"]
    rows = run.bridge["Cycle-state"].filter(role="match", valid=True).sort("layer")
    assert rows["layer"].to_list() == list(range(made.heads["previous"][0], 4))
    assert run.info["finished"]
    assert not list(folder.rglob("*.partial"))


def test_the_exact_limit_is_what_was_measured(folder: Path) -> None:
    rows = load(folder).tables["exact"].drop_nulls()
    assert len(rows)
    assert rows["apart"].max() < 0.05  # type: ignore[operator]


def test_the_page_is_whole_loads_nothing_and_says_whose_recipe_it_is(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = markup(text)
    assert text.count("</script>") == 3
    assert "</script>" not in page
    assert loads_nothing(text)
    for words in ("The recipe is ours, not the paper's", "Bridge to the games", "scale-invariant window", "Copying",
                  "How each model was run"):  # fmt: skip
        assert words.lower() in page.lower()
    figures = data(text, "figures")
    assert places(text) == sorted(figures)
    sliders = [f["layout"]["sliders"][0] for f in figures.values() if "sliders" in f["layout"]]
    assert len(sliders) == 2
    valid = load(folder).holds("random")
    assert [step["label"] for step in sliders[0]["steps"]] == [str(layer) for layer in valid]


def test_where_there_is_no_signature_no_head_carries_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(folder)
    page = render(response_report.make_page(run), run.info)
    assert "heads carry it" in page
    assert "stands out</button>" in page
    assert "figures/heads" in response_report.mirrored(run)
    monkeypatch.setattr(Signature, "emerges", lambda self, column=0: None)
    page = render(response_report.make_page(run), run.info)
    assert "No induction signature stands out." in page
    assert "carry it:" not in page
    assert "carries it:" not in page
    assert "stands out</button>" not in page
    assert "prefix matching</button>" in page
    assert not {"figures/heads", "summary/heads"} & response_report.mirrored(run).keys()


def test_only_what_is_within_the_window_is_drawn(folder: Path) -> None:
    run = load(folder)
    found = run.signature()
    assert found is not None
    assert not all(found.valid)  # nothing reaches the later tokens before the previous-token head
    figure = response_report.figures.depth(found, "x")
    drawn = {x for trace in figure.data for x in trace.x}
    assert drawn == {layer for layer, ok in zip(found.layers, found.valid, strict=True) if ok}
    grid = np.array(response_report.figures.stripes(found, "x").data[0].z, dtype=float)
    assert np.isnan(grid).all(1).tolist() == [not ok for ok in found.valid]


def test_the_same_config_resumes_and_another_is_refused(tmp_path: Path) -> None:
    config, agent = ResponseConfig(**NARROW), built("Cycle").agent
    responding.run(config, tmp_path, model=agent)
    files = sorted((tmp_path / "response").glob("*.parquet"))
    gone = [tmp_path / "response" / f"{name}.parquet" for name in ("left-002", "signature-control-random", "exact")]
    before = {p: pl.read_parquet(p) for p in gone}
    for path in gone:
        path.unlink()
    written = {p: p.stat().st_mtime_ns for p in files if p not in gone and "matrix" not in p.name}
    responding.run(config, tmp_path, model=agent)
    assert written == {p: p.stat().st_mtime_ns for p in written}
    for path in gone:
        assert_frame_equal(before[path], pl.read_parquet(path))
    (told,) = load(tmp_path).info["agents"]
    assert [(c["road"], c.get("dtype")) for c in told["certificates"]] == [("tree", "bfloat16"), ("tree", None)]
    agent.forward.certificates.clear()  # as after loading it again
    responding.run(config, tmp_path, model=agent)
    assert load(tmp_path).info["agents"] == [told]
    assert "In half precision rounding hides small errors" in (tmp_path / "report.html").read_text()
    mirrored = response_report.mirrored(load(tmp_path))
    assert [mirrored[f"certificate/circuit-Cycle-0/{how}/road"] for how in ("replay", "bfloat16/replay")] == [
        "tree",
        "tree",
    ]
    with pytest.raises(ExperimentError, match=r"another config \(different: block\)"):
        responding.run(config.model_copy(update={"block": 9}), tmp_path, model=agent)


def test_no_window_is_said_and_nothing_else_is_shown(tmp_path: Path, folders: dict[str, Path]) -> None:
    agent = LanguageModel(str(folders["llama"]), device="cpu")
    config = ResponseConfig(**NARROW | {"alphabet": [], "strengths": [0.3, 0.6, 1.2, 2.4], "bridge": [{"game": "DFA"}]})
    page = responding.run(config, tmp_path, model=agent).read_text(encoding="utf-8")
    shown = markup(page)
    assert "<strong>No scale-invariant window.</strong>" in shown
    for anchor in ("matrices", "signature", "heads"):
        assert f'id="{anchor}"' not in shown
    assert "No window on transcripts of DFA, state pairs" in shown
    assert not list((tmp_path / "response").glob("signature-*"))
    assert load(tmp_path).signature() is None
    assert load(tmp_path).heads is None


def test_half_precision_without_a_window_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    agent = LanguageModel(str(folders["gpt2"]), device="cpu", dtype="bfloat16")
    config = ResponseConfig(**NARROW | {"alphabet": [], "strengths": [0.02, 0.1, 0.5]})
    with pytest.raises(ExperimentError, match=r"no scale-invariant window in bfloat16.*load it with dtype=float32"):
        responding.run(config, tmp_path / "a", model=agent)
    with pytest.raises(ExperimentError, match=r"expected rising ones above 0.0078.*bfloat16"):
        responding.run(ResponseConfig(**NARROW | {"alphabet": []}), tmp_path / "b", model=agent)


def test_heads_stand_beside_those_of_a_patching_run(tmp_path: Path) -> None:
    made, settings = built("DFA"), {"states": 5, "actions_listed": 4}
    narrow: dict[str, Any] = {
        "name": "heads", "model": "circuit", "settings": settings, "pairs": 5, "steps": 8, "sites": ["head"],
        "kinds": ["state", "action"], "directions": ["denoise"], "resamples": 100, "wandb": "disabled",
    }  # fmt: skip
    patching.run(PatchConfig(**narrow), tmp_path / "heads", model=made.agent)
    bridge = [{"game": "DFA", "settings": settings, "kinds": ["state", "action"], "pairs": 2, "steps": 8}]
    config = ResponseConfig(**NARROW | {"bridge": bridge, "patching": str(tmp_path / "heads")})
    page = responding.run(config, tmp_path / "run", model=made.agent).read_text(encoding="utf-8")
    assert "Beside patching" in page
    found = load(tmp_path / "run").bridge_heads
    for kind in ("state", "action"):
        rows = found[f"DFA-{kind}"].filter(role=kind)
        lost = {(r["layer"], r["head"]): r["lost"] for r in rows.iter_rows(named=True)}
        mine, other = made.heads[kind], made.heads["action" if kind == "state" else "state"]
        assert lost[mine] > 0.3
        assert abs(lost[other]) < 1e-3
    wrong = config.model_copy(update={"name": "wrong"})
    with pytest.raises(ExperimentError, match="is a run of circuit/DFA-0, expected one of circuit/Cycle-0"):
        responding.run(wrong, tmp_path / "other", model=built("Cycle").agent)
    with pytest.raises(RunError, match="is not the folder of a patching run"):
        responding.run(config.model_copy(update={"patching": "nowhere"}), tmp_path / "third", model=made.agent)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strengths": [0.1, 0.01, 0.5]}, "expected rising ones above 0"),
        ({"strengths": [0.1, 0.2]}, "at least 3"),
        ({"window_prompts": 9}, "window_prompts=9 is more than prompts=3"),
        ({"blok": 8}, "unknown key 'blok'.*did you mean 'block'"),
        ({"bridge": [{"game": "Box", "kinds": ["sate"]}]}, "bridge.0.kinds.0"),
    ],
)
def test_wrong_configs(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(NARROW | change))
    with pytest.raises(ConfigError, match=message):
        read_config(str(tmp_path / "c.yaml"), [], ResponseConfig)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 16}, "needs 32 different tokens, but there are 30"),
        ({"layer": 9}, "layer=9 is not possible"),
        ({"alphabet": ["nonsense here"]}, "alphabet="),
        ({"bridge": [{"game": "Cycle"}, {"game": "Cycle"}]}, "state pairs of Cycle twice"),
    ],
)
def test_runs_that_cannot_be(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        responding.run(ResponseConfig(**NARROW | change), tmp_path, model=built("Cycle").agent)


def test_every_packaged_config_can_be_read() -> None:
    found = [name for name in packaged_configs() if name.startswith("configs/response/")]
    assert len(found) == 4
    for name in found:
        config = read_config(name, [], ResponseConfig)
        assert responding.draw(config.model_copy(update={"bridge": [b.model_copy(update={"pairs": 2})
                                                                    for b in config.bridge]}))  # fmt: skip


def test_rank_agreement() -> None:
    assert agreement([1, 2, 3], [2, 3, 9]) == pytest.approx(1)
    assert agreement([1, 2, 3], [5, 5, 5]) is None
    assert agreement([1, 2], [1, 2]) is None


def test_the_command_line_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["prompts=2", "block=4", "directions=1", "window_prompts=1", "resamples=100", "strengths=[0.001,0.01,0.1]",
             'bridge=[{"game": "Cycle", "pairs": 2}]']  # fmt: skip
    runner = CliRunner()
    done = runner.invoke(cli.app, ["response", "configs/response/quickstart.yaml", *small])
    assert done.exit_code == 0, done.exception
    page = tmp_path / "runs" / "response-quickstart" / "report.html"
    assert "report.html" in done.stdout
    assert "bfloat16" in done.stdout
    assert list(page.parent.glob("wandb/offline-run-*"))
    first = page.stat().st_mtime_ns
    assert runner.invoke(cli.app, ["report", str(page.parent)]).exit_code == 0
    assert page.stat().st_mtime_ns > first
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunError, match="there is no window in it"):
        response_report.write(tmp_path)
