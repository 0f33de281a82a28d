"""Training: what rows hold, what the loss counts, and that a run that was cut off goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nextstate.agents.config import ConfigError
from nextstate.agents.text import Encoder
from nextstate.agents.training import (
    Curriculum,
    FreshRows,
    Stage,
    TrainConfig,
    Weights,
    collate,
    new_model,
    predict_targets,
    train,
    train_tokenizer,
)

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
    one, two = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    with pytest.raises(ConfigError, match="another config"):
        train(TrainConfig(**SMALL | {"seed": 1}), cut)


def test_an_unknown_game_in_the_mixture(fresh: FreshRows) -> None:
    config = TrainConfig(**SMALL, stages=[Stage(mixture={"Chess": 1.0})])
    with pytest.raises(ConfigError, match="no training recipe for game 'Chess'"):
        FreshRows(config, fresh.encoder)[0]


def test_training_and_evaluation_draw_from_different_streams() -> None:
    training = {np.random.default_rng(np.random.SeedSequence(0, spawn_key=(1, i))).random() for i in range(2000)}
    evaluation = {np.random.default_rng(seed).random() for seed in range(2000)}
    assert not training & evaluation
    assert Weights().determined > Weights().undetermined > Weights().text
