"""A response run: on circuits built by hand, without a window, resumed, read again, and beside a patching run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from nextstate.agents.config import ConfigError, packaged_configs, read_config
from nextstate.agents.language import LanguageModel
from nextstate.analysis import log
from nextstate.analysis.heads.study import Heads
from nextstate.analysis.page.page import render
from nextstate.analysis.response import figures
from nextstate.analysis.response.config import ResponseConfig, patched
from nextstate.analysis.response.page import headline
from nextstate.analysis.response.study import ResponseStudy
from nextstate.analysis.response.tables import emerges
from nextstate.analysis.run import ModelFailed, Run, RunError
from nextstate.analysis.study import go, open_run, verify, write_page
from tests.circuits import STATES, Circuit, circuit
from tests.pages import loads_nothing, markup, places, shown

NARROW: dict[str, Any] = {
    "name": "narrow", "model": "circuit", "block": 8, "prompts": 3, "directions": 1, "window_prompts": 1,
    "strengths": [1e-3, 1e-2, 0.05, 0.2], "alphabet": [f" {x}" for x in STATES], "ablation": "zero",
    "resamples": 100, "wandb": "disabled",
}  # fmt: skip


@cache
def built(game: str) -> Circuit:
    return circuit(game, 0, decoys=0)


def respond(out: Path, agent: Any, command: str = "", **more: Any) -> Run[ResponseConfig]:
    return go(ResponseStudy(), ResponseConfig(**NARROW | more), out, command=command, model=agent)


def read(folder: Path, keys: str = "summary/") -> Run[ResponseConfig]:
    return open_run(folder, keys)[1]


def tables(folder: Path) -> dict[str, pl.DataFrame]:
    found = (p for p in folder.rglob("*.parquet") if "set-aside" not in p.parts)
    return {str(p.relative_to(folder)): pl.read_parquet(p) for p in found}


def page_of(folder: Path) -> str:
    return markup((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("response") / "run"
    bridge = [{"game": "Cycle", "game_args": {"period": 5}, "pairs": 3}]
    respond(out, built("Cycle").agent, "nextstate response </script>", bridge=bridge)
    return out


def test_a_run_finds_the_circuit(folder: Path) -> None:
    made, run = built("Cycle"), read(folder)
    found = headline(run.summaries())
    own = found["windows"][0]
    assert (own["dtype"], own["low"], own["weakest"]) == ("float32", 1e-3, True)
    assert own["high"] >= 0.05
    assert found["signature"]["emerges"] == made.heads["induction"][0]
    assert found["signature"]["added"]["low"] > 0.2
    lost = {(r["layer"], r["head"]): r for r in found["heads"]["rows"]}
    assert set(lost) == set(made.heads.values())
    assert lost[made.heads["induction"]]["lost"] == pytest.approx(1, abs=0.1)
    assert lost[made.heads["induction"]]["prefix"] == pytest.approx(1, abs=1e-4)
    assert lost[made.heads["induction"]]["copying"] == 1
    (bridge,) = found["bridges"]
    assert bridge["roles"]["match"]["response"] > 5 * bridge["roles"]["others"]["response"]
    rows = run.summary("bridge").filter(role="match", valid=True).sort("layer")
    assert rows["layer"].to_list() == list(range(made.heads["previous"][0], 4))
    assert run.record["finished"]


def test_the_exact_limit_is_what_was_measured(folder: Path) -> None:
    rows = read(folder).summary("exact").drop_nulls()
    assert len(rows)
    assert rows["apart"].max() < 0.05  # type: ignore[operator]


def test_the_page_is_complete_and_says_whose_recipe_it_is(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = markup(text)
    assert loads_nothing(text)
    assert "nextstate response </script>" not in page
    for words in ("may differ from the paper's", "Bridge to the games", "scale-invariant window", "Copying",
                  "How each model was run"):  # fmt: skip
        assert words.lower() in page.lower()
    drawn = ResponseStudy().page(read(folder)).figures.figures
    assert places(text) == sorted(drawn)
    sliders = [figure.layout.sliders[0] for figure in drawn.values() if figure.layout.sliders]
    assert len(sliders) == 2
    windows = read(folder).summary("windows").filter(dtype="float32", kind="random")
    strength = headline(read(folder).summaries())["windows"][0]["strength"]
    valid = windows.filter(pl.col("low") <= strength, pl.col("high") >= strength)["layer"].unique().sort()
    assert [step.label for step in sliders[0].steps] == [str(layer) for layer in valid]


def test_where_there_is_no_signature_no_head_carries_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read(folder)
    assert "heads contribute significantly to it" in page_of(folder)
    assert "significant</button>" in page_of(folder)
    without = run.summaries()
    without["signature"] = without["signature"].with_columns(emerges=pl.lit(None, dtype=pl.Int64))
    monkeypatch.setattr(run, "summaries", lambda: without)
    made = ResponseStudy().page(run)
    page = markup(render(made, run.record))
    assert "No significant induction signature." in page
    assert "contribute significantly to it" not in page
    assert "contributes significantly to it" not in page
    assert "significant</button>" not in page
    assert "prefix matching</button>" in page
    assert not any("left-out" in name for name in made.figures.figures)


@pytest.mark.parametrize(("noise", "swapped"), [(0.0, False), (0.3, False), (1.0, False), (0.3, True), (1.0, True)])
def test_the_page_never_says_yes_in_one_place_and_no_in_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch, noise: float, swapped: bool
) -> None:
    """Every statement about the signature follows from one band, with noise, and with the control as the signal."""
    run, rng = open_run(folder, "")[1], np.random.default_rng(3)
    table = run.table

    def noisy(key: str) -> pl.DataFrame:
        if not key.startswith("signature/"):
            return table(key)
        other = key.replace("repeated", "control") if "repeated" in key else key.replace("control", "repeated")
        found = table(other if swapped else key)
        return found.with_columns(response=pl.col("response") + pl.Series(noise * rng.normal(size=len(found))))

    monkeypatch.setattr(run, "table", cache(noisy))
    found = ResponseStudy().summarise(run)
    monkeypatch.setattr(run, "summaries", lambda: found)
    made = ResponseStudy().page(run)
    text = shown(render(made, run.record))
    (low,) = re.findall(r"Repetition adds −?[\d.]+ \((−?[\d.]+) to", text)
    present = "The induction signature is significant from layer" in text
    assert present == (not low.startswith("−") and float(low) > 0)
    assert present != ("No significant induction signature." in text)
    signature = found["signature"].filter(kind="random").row(0, named=True)
    rows = {row["layer"]: row for row in made.context["signatures"][0]["rows"]}
    assert rows[signature["deepest"]]["before_significant"] == present
    assert present == (signature["emerges"] is not None)
    assert ("There is no significant induction signature" in text) <= (not present)
    assert present or not found["heads"]["significant"].any()
    assert ("of the signature is lost" in text) <= present
    assert present or noise
    assert not (present and swapped)


def test_only_what_is_within_the_window_is_drawn(folder: Path) -> None:
    found = read(folder).summaries()
    lines = found["lines"].filter(kind="random", measure="response")
    valid = set(lines.filter("valid")["layer"])
    assert valid != set(lines["layer"])  # nothing reaches the later tokens before the previous-token head
    assert {x for trace in figures.depth(lines, "x").data for x in trace.x} == valid
    (grid,) = figures.stripes(found["offsets"].filter(kind="random"), NARROW["block"], "x").data
    for layer, row in zip(grid.y, grid.z, strict=True):
        assert all((x is None) == (layer not in valid) for x in row)


def test_the_signature_begins_where_all_later_layers_have_it() -> None:
    def first(*rows: tuple[bool, float]) -> int | None:
        layers = [(layer, valid, valid and low > 0) for layer, (valid, low) in enumerate(rows)]
        return emerges(pl.DataFrame(layers, schema=["layer", "valid", "significant"], orient="row"))

    assert first((True, -1.0), (True, 1.0), (True, 2.0)) == 1
    assert first((True, 1.0), (True, -1.0), (False, -9.0), (True, 2.0)) == 3
    assert first((True, 1.0), (False, -1.0), (True, 1.0)) == 0
    assert first((True, 1.0), (True, float("nan"))) is None
    assert first((False, 1.0)) is None


def test_lost_and_damaged_tables_are_made_again(tmp_path: Path) -> None:
    agent = built("Cycle").agent
    respond(tmp_path, agent)
    before, page = tables(tmp_path), page_of(tmp_path)
    (tmp_path / "heads/2.parquet").unlink()
    (tmp_path / "matrix/control-random.parquet").unlink()  # made together with a signature, which is made again too
    damaged = tmp_path / "exact.parquet"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "windows").glob("*")}
    agent.forward.certificates.clear()  # as in another process
    respond(tmp_path, agent)
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    after = tables(tmp_path)
    assert after.keys() == before.keys()
    for key, table in after.items():
        assert_frame_equal(table, before[key])
    now = read(tmp_path).record
    assert [x["table"] for x in now["set_aside"]] == ["exact", "signature/control-random"]
    certificates = [(c["road"], c.get("dtype")) for c in now["agents"][0]["certificates"]]
    assert certificates == [("tree", "bfloat16"), ("tree", None)]
    assert "In half precision rounding hides small errors" in page_of(tmp_path)
    sent = log.proved(now)
    assert {sent[f"certificate/circuit-Cycle-0/{how}/road"] for how in ("replay", "bfloat16/replay")} == {"tree"}
    lead = slice(page.index("<h1>"), page.index('<section id="run"'))
    assert page[lead] == page_of(tmp_path)[lead]
    with pytest.raises(RunError, match=r"another config \(different: block\)"):
        respond(tmp_path, agent, block=9)


def test_the_page_needs_the_summary_alone(folder: Path, tmp_path: Path) -> None:
    before = page_of(folder)
    for part in ("run.json", "report.html", "summary"):
        subprocess.run(["cp", "-r", folder / part, tmp_path / part], check=True)
    write_page(*open_run(tmp_path))
    assert page_of(tmp_path) == before


def test_the_headline_has_the_windows_and_the_signature(folder: Path) -> None:
    rows = ResponseStudy().headline(read(folder)).rows(named=True)
    assert [row["precision"] for row in rows] == ["float32", "bfloat16"]
    assert rows[0]["weakest"] == 1e-3
    assert rows[0]["from_layer"] == built("Cycle").heads["induction"][0]
    assert 0.2 < rows[0]["signature_low"] < rows[0]["signature"] < rows[0]["signature_high"]
    assert rows[1]["signature"] is None


def test_jobs_done_again_give_the_same_tables(folder: Path) -> None:
    found = verify(folder, cells=6, model=built("Cycle").agent)
    assert len(found) == 6
    assert [(x.key, x.made, x.found) for x in found if x.made or x.found] == []


def test_a_finished_run_is_read_without_torch(tmp_path: Path, folders: dict[str, Path]) -> None:
    config = NARROW | {"model": str(folders["gpt2"]), "alphabet": [], "block": 4}
    go(ResponseStudy(), ResponseConfig(**config), tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.suffix in (".parquet", ".html")}
    code = (
        "import json, sys; from pathlib import Path; from nextstate.analysis.study import find_study, go; "
        "study = find_study('response'); config = study.config(**json.loads(sys.argv[1])); "
        "go(study, config, Path(sys.argv[2])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(config), tmp_path / "run"], check=True)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_without_a_window_nothing_else_is_shown(tmp_path: Path, folders: dict[str, Path]) -> None:
    agent = LanguageModel(str(folders["llama"]), device="cpu")
    run = respond(tmp_path, agent, alphabet=[], strengths=[0.3, 0.6, 1.2, 2.4], bridge=[{"game": "DFA"}])
    page = page_of(tmp_path)
    assert "<strong>No scale-invariant window.</strong>" in page
    for anchor in ("matrices", "signature", "heads"):
        assert f'id="{anchor}"' not in page
    assert "No window on transcripts of DFA, state pairs" in page
    for key in ("signature/repeated-random", "matrix/repeated-along", "scores", "heads/0", "bridge/DFA-state"):
        assert run.table(key).is_empty()
    assert run.summary("signature").is_empty()
    assert run.summary("heads").is_empty()
    assert run.record["left_out"] == []


def test_half_precision_without_a_window_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    agent = LanguageModel(str(folders["gpt2"]), device="cpu", dtype="bfloat16")
    with pytest.raises(ModelFailed, match=r"no scale-invariant window in bfloat16.*load it with dtype=float32$"):
        respond(tmp_path / "a", agent, alphabet=[], strengths=[0.02, 0.1, 0.5])
    with pytest.raises(ModelFailed, match=r"expected increasing values above 0.0078.*bfloat16"):
        respond(tmp_path / "b", agent, alphabet=[])


def test_a_precision_with_too_few_strengths_has_no_window(tmp_path: Path, folders: dict[str, Path]) -> None:
    agent = LanguageModel(str(folders["gpt2"]), device="cpu")
    run = respond(tmp_path, agent, alphabet=[], block=4, strengths=[1e-4, 1e-3, 5e-3])
    assert run.table("windows/bfloat16").is_empty()
    assert run.table("windows/float32").is_empty()  # the model's own, which is measured as such
    assert run.summary("precisions")["dtype"].unique().to_list() == ["float32"]
    warning = "bfloat16 has no window: fewer than three strengths are above its rounding"
    assert warning in run.record["warnings"]
    assert warning in page_of(tmp_path)


def test_heads_are_compared_with_a_patching_run(tmp_path: Path) -> None:
    made, settings = built("DFA"), {"states": 5, "actions_listed": 4}
    narrow: dict[str, Any] = {
        "name": "heads", "model": "circuit", "game_args": settings, "pairs": 5, "steps": 8, "sites": ["head"],
        "kinds": ["state", "action"], "directions": ["denoise"], "resamples": 100, "wandb": "disabled",
    }  # fmt: skip
    go(Heads(), Heads.config(**narrow), tmp_path / "heads", model=made.agent)
    bridge = [{"game": "DFA", "game_args": settings, "kinds": ["state", "action"], "pairs": 2, "steps": 8}]
    more: dict[str, Any] = {"bridge": bridge, "patching": str(tmp_path / "heads")}
    run = respond(tmp_path / "run", made.agent, **more)
    assert "Comparison with patching" in page_of(tmp_path / "run")
    assert run.summary("ranks")["kind"].to_list() == ["state", "action"]
    for kind in ("state", "action"):
        rows = run.summary("bridge_heads").filter(role=kind, pairs=kind)
        lost = {(r["layer"], r["head"]): r["lost"] for r in rows.iter_rows(named=True)}
        mine, other = made.heads[kind], made.heads["action" if kind == "state" else "state"]
        assert lost[mine] > 0.3
        assert abs(lost[other]) < 1e-3
    # Other heads, so the tables that were made from them are set aside.
    go(Heads(), Heads.config(**narrow | {"seed": 1}), tmp_path / "other", model=made.agent)
    (tmp_path / "heads").rename(tmp_path / "before")
    (tmp_path / "other").rename(tmp_path / "heads")
    again = respond(tmp_path / "run", made.agent, **more)
    aside = {x["table"]: x["reason"] for x in again.record["set_aside"] if not x["table"].startswith("summary/")}
    assert aside.keys() == {"bridge_heads/DFA-state", "bridge_heads/DFA-action"}
    assert all("patching" in reason for reason in aside.values())
    with pytest.raises(RunError, match="used other files of circuit than the present ones"):
        patched(ResponseConfig(**NARROW | more), "0" * 64)
    with pytest.raises(RunError, match="is a run of circuit, expected one of another"):
        respond(tmp_path / "third", made.agent, **more, model="another")
    with pytest.raises(RunError, match="is a run of the study 'response', expected one of 'patch'"):
        respond(tmp_path / "third", made.agent, **more | {"patching": str(tmp_path / "run")})
    with pytest.raises(RunError, match="is not the folder of a run"):
        respond(tmp_path / "third", made.agent, **more | {"patching": "nowhere"})
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strengths": [0.1, 0.01, 0.5]}, "expected increasing values above 0"),
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
    with pytest.raises(RunError, match=message):
        respond(tmp_path, built("Cycle").agent, **change)


def test_every_packaged_config_has_jobs() -> None:
    found = [name for name in packaged_configs() if name.startswith("configs/response/")]
    assert len(found) == 4
    for name in found:
        config = read_config(name, [], ResponseConfig)
        jobs = ResponseStudy().jobs(config)
        assert len([job for job in jobs if job.key.startswith("bridge/")]) == 5
