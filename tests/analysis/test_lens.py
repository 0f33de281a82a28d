"""The logit lens: its last layer is the model itself, and the others are what norm and unembedding give by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

from nextstate.agents.agent import AgentError, Prompt
from nextstate.agents.identity import BUILT_IN
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, prompts_of
from nextstate.analysis.lens import SHARE, Lens, LensConfig, knows_from, lens, next_tokens, read_layers
from nextstate.analysis.run import ModelFailed
from nextstate.analysis.study import go, open_run, verify, write_page
from nextstate.envs.games import make_game
from tests import zoo
from tests.circuits import circuit
from tests.idle import start_again, times
from tests.pages import loads_nothing, shown

GAMES = [
    {"game": "DFA", "game_args": {"states": 3}, "steps": 5, "episodes": 6},
    {"game": "Box", "grid": {"boxes": [3, 4]}, "steps": 4, "episodes": 5},
]
TOKENS = torch.randint(5, 250, (3, 14), generator=torch.Generator().manual_seed(0))


def config(**more: Any) -> LensConfig:
    return LensConfig(**{"name": "lens", "model": "nextstate/tiny", "games": GAMES, "wandb": "disabled", **more})


def built(name: str) -> LanguageModel:
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN["nextstate/tiny"])
    return LanguageModel(name, loaded=(zoo.build(name, len(tokenizer)), tokenizer))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lens") / "run"
    go(Lens(), config(), out)
    return out


@pytest.mark.parametrize("name", [name for name in zoo.FAST if name != "gemma3n_text"])
def test_the_last_layer_is_the_model_in_every_architecture(name: str) -> None:
    model = built(name)
    found = list(lens(model, TOKENS))
    own = model.model(input_ids=TOKENS, use_cache=False).logits[:, -1].detach()
    assert len(found) == model.sites.layers + 1
    assert torch.allclose(found[-1], own, atol=1e-5 * float(own.max() - own.min()))
    assert not torch.allclose(found[0], own, atol=1e-2 * float(own.max() - own.min()))


@pytest.mark.parametrize(("name", "norm"), [("gpt2", "transformer.ln_f"), ("llama", "model.norm"), ("opt", "")])
def test_each_layer_is_the_norm_and_the_unembedding_of_its_hidden_states(name: str, norm: str) -> None:
    model = built(name)
    norm = norm or "model.decoder.final_layer_norm"
    states = model.model(input_ids=TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    *found, _ = lens(model, TOKENS)  # what transformers gives of the last layer has been through the norm
    for layer, logits in enumerate(found):
        by_hand = model.model.lm_head(model.model.get_submodule(norm)(states[layer][:, -1]))
        assert torch.allclose(logits, by_hand, atol=1e-4), layer


def test_the_last_layer_answers_as_the_agent_does(done: Path) -> None:
    model = LanguageModel("nextstate/tiny", device="cpu")
    _, run = open_run(done, "")
    for key, made in (("DFA-states=3", make_game("DFA", states=3)), ("Box-boxes=4", make_game("Box", boxes=4))):
        rows = run.table(f"answers/{key}").drop_nulls("layer")
        last = rows.filter(pl.col("layer") == 4)
        assert last["layer"].len() * 5 == len(rows)
        seeds, steps = last["episode"].unique().sort().to_list(), last["step"].max()
        prompts = [p for e in episodes_of(made, seeds, steps) for p in prompts_of(e)]  # type: ignore[arg-type]
        for row, prompt, answer in zip(last.rows(named=True), prompts, model.predict(prompts), strict=True):
            whole = np.array(answer.logprobs)  # over the vocabulary; all choices here are one token
            accepted = list(prompt.asked.accepted)
            among = whole - np.logaddexp.reduce(whole)
            assert row["logprob"] == pytest.approx(among[prompt.asked.truth], abs=1e-3)
            assert row["p_accepted"] == pytest.approx(np.exp(among[accepted]).sum(), abs=1e-3)
            assert row["correct"] == (answer.choice in accepted)
            assert row["rank"] == 1 + sum(p > max(whole[i] for i in accepted) for p in whole)


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_layer_whose_head_writes_the_answer(tmp_path: Path, seed: int) -> None:
    made = circuit("DFA", seed)
    games = [{"game": "DFA", "game_args": {"states": 5, "actions_listed": 4}, "steps": 12, "episodes": 8}]
    run = go(Lens(), config(model="circuit", games=games), tmp_path / "run", model=made.agent)
    (row,) = run.summary("games").rows(named=True)
    assert row["knows_from"] == made.heads["match"][0] + 1
    layers = run.summary("layers")
    before, after = (layers["accuracy"][row["knows_from"] + k] for k in (-1, 0))
    assert after - before > 0.2
    assert layers["accuracy"][row["knows_from"] :].n_unique() == 1  # no later head writes to the output


class Leaking(nn.Module):
    """A final norm to which the mean over all tokens is added, which no single token's stream has."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + x.mean(1, keepdim=True)  # type: ignore[no-any-return]


def test_a_model_whose_head_reads_more_is_refused_in_one_line(tmp_path: Path) -> None:
    model = built("llama")
    assert isinstance(model.model, LlamaForCausalLM)
    model.model.model.norm = Leaking(model.model.model.norm)
    message = "the head of llama reads more than the last block's output"
    with pytest.raises(AgentError, match=message):
        list(lens(model, TOKENS))
    with pytest.raises(ModelFailed, match=message) as raised:
        go(Lens(), config(model="llama"), tmp_path / "run", model=model)
    assert "\n" not in str(raised.value)
    with pytest.raises(AgentError, match="no decoder blocks found"):
        list(lens(built("gemma3n_text"), TOKENS))


def test_questions_that_one_token_does_not_decide_are_left_out_and_counted() -> None:
    model = LanguageModel("nextstate/tiny", device="cpu")
    piece = model.encoder.piece
    assert next_tokens(model.encoder, [" a", " b"]) == ((), [piece(" a")[0], piece(" b")[0]])
    common, other = piece(" zx"), piece(" zy")
    assert common[0] == other[0]
    assert next_tokens(model.encoder, [" zx", " zy"]) == (common[:1], [common[1], other[1]])
    assert next_tokens(model.encoder, [" zx", " zy", " a"]) is None  # two of three begin alike
    assert next_tokens(model.encoder, [" z", " zx"]) is None  # one is how the other begins
    assert next_tokens(model.encoder, []) is None
    (episode,) = episodes_of(make_game("DFA", states=3), [0], 2)
    first, second = episode.steps
    (question,) = second.questions
    hard = question._replace(choices=(" zx", " zy", " a"))
    doctored = replace(episode, steps=(first, second._replace(questions=(hard,))))
    rows = [row for part in read_layers(model, [Prompt(doctored, t) for t in range(2)]) for row in part]
    assert [(row["step"], row["layer"], row["correct"] is None) for row in rows] == [
        (2, None, True), *((1, layer, False) for layer in range(5)),
    ]  # fmt: skip


def test_summaries_are_those_of_the_rows(done: Path) -> None:
    _, run = open_run(done, "")
    games, layers = run.summary("games"), run.summary("layers")
    assert games["game"].to_list() == ["DFA-states=3", "Box-boxes=3", "Box-boxes=4"]
    for row in layers.rows(named=True):
        own = run.table(f"answers/{row['game']}").filter(layer=row["layer"])
        assert (row["n"], row["accuracy"]) == (len(own), pytest.approx(own["correct"].mean()))
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert (row["ceiling"], row["chance"]) == pytest.approx((own["ceiling"].mean(), own["chance"].mean()))
    assert games["left_out"].to_list() == [0, 0, 0]


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [((0.2, 0.3, 0.9, 1.0), 2), ((0.2, 0.95, 0.5, 1.0), 3), ((1.0, 1.0, 1.0, 1.0), 0), ((0.1, 0.1, 0.2, 0.25), None)],
)
def test_knows_from(accuracy: tuple[float, ...], expected: int | None) -> None:
    low = [a - 0.1 for a in accuracy]
    table = pl.DataFrame({"layer": range(4), "accuracy": accuracy, "accuracy_low": low, "chance": 0.25})
    assert SHARE == 0.9
    assert knows_from(table) == expected


def test_a_second_run_does_nothing_and_imports_no_torch(done: Path) -> None:
    before = times(done)
    assert start_again(Lens, config(), done) == []
    assert times(done) == before


def test_page_and_verify_work_on_the_folder(done: Path) -> None:
    page = (done / "report.html").read_text(encoding="utf-8")
    assert loads_nothing(page)
    assert "DFA-states=3: the answer can be read off" in shown(page)
    assert all(not x.found for x in verify(done))
    for path in (done / "answers").iterdir():
        path.rename(path.with_suffix(".away"))
    try:
        write_page(*open_run(done))
        assert (done / "report.html").read_text(encoding="utf-8") == page
    finally:
        for path in (done / "answers").iterdir():
            path.rename(path.with_suffix(".parquet"))
