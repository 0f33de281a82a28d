"""Training: what rows hold, what the loss counts, and that a run that was cut off goes on as if it had not been."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from nextstate.agents.config import ConfigError, read_config
from nextstate.agents.identity import BUILT_IN, trained_on
from nextstate.agents.text import Encoder
from nextstate.agents.training import (
    Curriculum,
    FreshRows,
    Stage,
    TrainConfig,
    Weights,
    collate,
    draw_sample,
    evaluation_cells,
    joined,
    new_model,
    predict_targets,
    train,
    train_tokenizer,
    trained_range,
)
from tests.outside import write_game

SMALL: dict[str, Any] = {
    "model": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32, "vocabulary": 400},
    "rows": 2, "row_tokens": 96, "steps": 4, "warmup": 1, "evaluate_every": 4, "evaluation_episodes": 2,
    "save_every": 2, "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def fresh() -> FreshRows:
    config = TrainConfig(**SMALL)
    return FreshRows(config, Encoder(train_tokenizer(config)))


def test_a_row_depends_on_its_number_alone(fresh: FreshRows) -> None:
    one, again, other = fresh[5], fresh[5], fresh[6]
    assert (one.tree.tokens, one.target, one.weight) == (again.tree.tokens, again.target, again.weight)
    assert one.tree.tokens != other.tree.tokens


def test_rows_fit_and_targets_lie_inside(fresh: FreshRows) -> None:
    for i in range(8):
        row = fresh[i]
        assert len(row.tree) == fresh.config.row_tokens
        assert len(row.context) == len(row.target) == len(row.weight)
        assert all(0 <= node < len(row.tree) for node in row.context)
        assert all(parent < node for node, parent in enumerate(row.tree.parents))
        assert set(row.weight) <= {1.0, 0.05, 0.02}


def test_the_trained_range_is_counted_in_the_tokens_of_the_rows(fresh: FreshRows) -> None:
    """A shorter row holds fewer steps of an episode."""
    found = trained_range(fresh.config, fresh.encoder, rows=10_000)
    sizes = {game: {int(size) for size in steps} for game, steps in found.items()}
    most = fresh.config.curriculum.level(fresh.config.steps - 1)
    assert sizes["Box"] <= set(range(2, most + 1))
    for steps in found.values():
        assert all(step >= 1 for step in steps.values())
    short = trained_range(fresh.config.model_copy(update={"row_tokens": 60}), fresh.encoder, rows=10_000)
    assert max(short["Box"].values()) < max(found["Box"].values())
    union = joined(found, short, {"Box": {"99": 7}})
    assert union["Box"]["99"] == 7
    assert {game: {k: v for k, v in steps.items() if k != "99"} for game, steps in union.items()} == joined(
        found, short
    )


def test_the_built_in_model_says_what_it_was_trained_on() -> None:
    config = read_config("train/tiny", [], TrainConfig)
    known = trained_on("nextstate/tiny")
    assert {game: max(map(int, sizes)) for game, sizes in known.items()} == {
        "Box": 8, "Cycle": 12, "DFA": 8, "FruitStore": 8, "TextWorld": 8,
    }  # fmt: skip
    encoder = Encoder(AutoTokenizer.from_pretrained(BUILT_IN["nextstate/tiny"]))
    some = trained_range(config, encoder, rows=100)
    assert joined(known, some) == known  # a part of the rows shows nothing beyond


@pytest.mark.parametrize("text", ["{", "[1]", '{"Box": 3}', '{"Box": {"two": 3}}', '{"Box": {"2": "<b>"}}'])
def test_a_file_of_the_same_name_with_another_meaning_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "trained.json").write_text(text, encoding="utf-8")
    assert trained_on(str(tmp_path)) == {}
    (tmp_path / "trained.json").write_text('{"Box": {"2": 3}}', encoding="utf-8")
    assert trained_on(str(tmp_path)) == {"Box": {"2": 3}}


def test_targets_are_predicted_as_in_a_plain_forward_pass(fresh: FreshRows) -> None:
    torch.manual_seed(0)
    model = new_model(fresh.config.model, len(fresh.encoder.tokenizer)).eval()
    row = fresh[1]
    with torch.inference_mode():
        packed = predict_targets(model, collate([row, fresh[2]]))
        for k in range(0, len(row.context), 7):
            path, node = [], row.context[k]
            while node >= 0:
                path.append(row.tree.tokens[node])
                node = row.tree.parents[node]
            plain = model(torch.tensor([path[::-1]])).logits[0, -1]
            assert torch.allclose(packed[k], plain, atol=1e-5)


def test_curriculum_rises_to_its_most() -> None:
    rising = Curriculum(start=2, every=10, most=4)
    assert [rising.level(step) for step in (0, 9, 10, 25, 1000)] == [2, 2, 3, 4, 4]


def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = TrainConfig(**SMALL)
    whole = train(config, tmp_path / "whole")
    cut = tmp_path / "cut"
    train(config, cut)
    for path in (cut / "model").iterdir():
        path.unlink()
    import shutil

    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    resumed = train(config, cut)
    assert trained_on(str(whole)) == trained_on(str(resumed)) == trained_range(config, Encoder(train_tokenizer(config)))
    one, two = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    with pytest.raises(ConfigError, match="another config"):
        train(TrainConfig(**SMALL | {"seed": 1}), cut)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
def test_workers_change_no_weight_of_a_model_of_games(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: FreshRows
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    found = [train(TrainConfig(**SMALL, workers=workers), tmp_path / str(workers)) for workers in (0, 2)]
    one, two = (load_file(final / "model.safetensors") for final in found)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [json.loads((tmp_path / k / "train.json").read_text()) for k in "02"] == [TrainConfig(**SMALL).decisive] * 2
    sent = pickle.loads(pickle.dumps(fresh))  # as where worker processes are spawned and not forked
    assert sent[3].tree.tokens == fresh[3].tree.tokens


def test_an_unknown_game_in_the_mixture(fresh: FreshRows) -> None:
    config = TrainConfig(**SMALL, stages=[Stage(mixture={"Chess": 1.0})])
    with pytest.raises(ConfigError, match="mixture: there is no game 'Chess'"):
        FreshRows(config, fresh.encoder)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"DFA": {"few": 1}}, "unknown option 'few' of DFA: expected one of densities, few_actions"),
        ({"Box": {"few_actions": 1}}, "unknown option 'few_actions' of Box: expected none"),
        ({"CFG": {}}, "options for 'CFG', which is not in the mixture: DFA, Box"),
    ],
)
def test_an_option_that_a_game_does_not_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**SMALL, stages=[Stage(mixture={"DFA": 1, "Box": 1}, options=options)])


def test_options_decide_what_is_drawn() -> None:
    stage = Stage(mixture={"DFA": 1}, options={"DFA": {"densities": ["max"], "few_actions": 1.0}})
    rng = np.random.default_rng(0)
    drawn = [draw_sample(stage, 8, rng).game.settings for _ in range(40)]
    assert {game["density"] for game in drawn} == {"max"}
    assert max(game["actions_listed"] for game in drawn) < 26
    assert {game["states"] for game in drawn} == set(range(2, 9))


# Digests of the rows that the shipped configs gave before games drew their own training episodes.
ROWS = {
    "train/tiny": "d0e2ef144aa7490b",
    "train/tiny-textworld": "c20e22fe2c2c3642",
}


@pytest.mark.parametrize("name", ROWS)
def test_the_shipped_configs_give_the_rows_that_the_built_in_model_was_trained_on(name: str) -> None:
    config = read_config(name, [], TrainConfig)
    rows = FreshRows(config, Encoder(AutoTokenizer.from_pretrained(BUILT_IN["nextstate/tiny"])))
    found = hashlib.sha256()
    for step in (0, 2000, 4500, 6000):
        if step < config.steps:
            row = rows[step * config.rows]
            found.update(repr((row.tree.tokens, row.tree.parents, row.context, row.target, row.weight)).encode())
    assert found.hexdigest()[:16] == ROWS[name]


def test_every_game_can_be_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: FreshRows) -> None:
    """A model learns from strings of grammars, and from a game in a package of its own, at every level."""
    monkeypatch.syspath_prepend(write_game(tmp_path))
    for name in ("CFG", "Cups", "cups_pkg.game:Cups"):
        config = TrainConfig(
            **SMALL,
            curriculum=Curriculum(start=2, every=1, most=12),
            stages=[Stage(mixture={name: 1.0})],
        )
        rows = FreshRows(config, fresh.encoder)
        assert all(len(rows[i].tree) == config.row_tokens for i in range(0, 24, 5))
        cells = evaluation_cells(config)
        assert len(cells) == {"CFG": 5}.get(name, 4)
        assert all(e.game.name in name for episodes in cells.values() for e in episodes)


def test_a_short_training_on_a_game_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.syspath_prepend(write_game(tmp_path / "package"))
    written = tmp_path / "cups.yaml"
    written.write_text(yaml.safe_dump({**SMALL, "stages": [{"mixture": {"cups_pkg.game:Cups": 1.0}}]}))
    final = train(read_config(str(written), [], TrainConfig), tmp_path / "out")
    assert (final / "model.safetensors").is_file()


def test_training_and_evaluation_draw_from_different_streams() -> None:
    training = {np.random.default_rng(np.random.SeedSequence(0, spawn_key=(1, i))).random() for i in range(2000)}
    evaluation = {np.random.default_rng(seed).random() for seed in range(2000)}
    assert not training & evaluation
    assert Weights().determined > Weights().undetermined > Weights().text
