"""The branch engine against one plain forward pass a choice, on the real architectures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from nextstate.agents.agent import AgentError, ContextError, Prompt
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, live, prompts_of, replay, seeds_for
from nextstate.agents.sites import SiteError
from nextstate.envs.games import make_game

CASES: list[tuple[str, dict[str, Any], int]] = [
    ("Box", {"boxes": 4}, 5),
    ("Box", {"boxes": 3, "feedback": "inline", "style": "plain"}, 3),
    ("DFA", {"states": 4, "actions_listed": 3}, 6),
    ("DFA", {"states": 4, "symbols": "pairs"}, 5),
    ("DFA", {"states": 4, "kind": "state-state"}, 5),
    ("Cycle", {"period": 3}, 7),
    ("FruitStore", {"people": 5}, 4),
]


@torch.inference_mode()
def plain(agent: LanguageModel, prompt: Prompt) -> tuple[list[float], int]:
    """Log-probabilities of the choices and the greedy match, by one forward pass a choice and nothing clever."""
    episode, t, q = prompt
    pieces = list(_pieces(episode, t, q))
    head = list(agent.encoder.opening(pieces[0])) + [x for p in pieces[1:] for x in agent.encoder.piece(p)]
    out, greedy, longest = [], -1, 0
    tails = [list(agent.encoder.piece(text)) for text in prompt.asked.choices]
    first = agent.model(torch.tensor([head])).logits[0, -1:].float()
    for c, tail in enumerate(tails):
        rest = (
            agent.model(torch.tensor([head + tail])).logits[0, len(head) : -1].float() if len(tail) > 1 else first[:0]
        )
        logits = torch.cat([first, rest])
        out.append(sum(float(logits[k].log_softmax(-1)[token]) for k, token in enumerate(tail)))
        hit = all(int(logits[k].argmax()) == token for k, token in enumerate(tail))
        if hit and len(tail) > longest:
            greedy, longest = c, len(tail)
    return out, greedy


def _pieces(episode: Any, t: int, q: int) -> Any:
    yield episode.opening
    for s, step in enumerate(episode.steps[: t + 1]):
        yield step.narration
        asked = step.questions if s < t else step.questions[:q]
        if episode.game.feedback == "inline":
            for question in asked:
                yield from (question.stem, question.choices[question.truth], question.closing)
    yield episode.steps[t].questions[q].stem


@pytest.mark.parametrize(("game", "settings", "steps"), CASES)
def test_branches_equal_one_forward_a_choice(
    model: LanguageModel, game: str, settings: dict[str, Any], steps: int
) -> None:
    episodes = episodes_of(make_game(game, **settings), range(3), steps, ask=2)
    prompts = [p for e in episodes for p in prompts_of(e)]
    for prompt, prediction in zip(prompts, model.predict(prompts), strict=True):
        logprobs, greedy = plain(model, prompt)
        assert prediction.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert prediction.greedy == greedy
        lengths = [len(model.encoder.piece(c)) for c in prompt.asked.choices]
        per_token = [x / n for x, n in zip(logprobs, lengths, strict=True)]
        assert per_token[prediction.choice_token] == pytest.approx(max(per_token), abs=1e-4)


def test_some_choices_have_several_tokens_and_different_lengths(model: LanguageModel) -> None:
    lengths = {len(model.encoder.piece(c)) for c in make_fruit().choices}
    pairs = episodes_of(make_game("DFA", states=4, symbols="pairs"), range(1), 1)[0].steps[0].questions[0]
    lengths |= {len(model.encoder.piece(c)) for c in pairs.choices}
    assert len(lengths) > 1


def test_the_choice_per_byte_counts_the_leading_space(folders: dict[str, Path]) -> None:
    """Log-probability over bytes of the choice as it is written; without its space other choices would win."""
    agent, other = LanguageModel(str(folders["gpt2"]), device="cpu"), 0
    prompts = [p for e in episodes_of(make_game("FruitStore", people=12), range(30), 4) for p in prompts_of(e)]
    for prompt, found in zip(prompts, agent.predict(prompts), strict=True):
        choices = prompt.asked.choices
        assert all(text.startswith(" ") for text in choices)
        scores = [
            [x / (len(text.encode()) - k) for x, text in zip(found.logprobs, choices, strict=True)] for k in (0, 1)
        ]
        assert found.choice_byte == scores[0].index(max(scores[0]))
        other += scores[0].index(max(scores[0])) != scores[1].index(max(scores[1]))
    assert other > 0


def test_greedy_decoding_goes_on_to_the_longest_choice(folders: dict[str, Path]) -> None:
    """Choices are what the model itself would write, cut after one, two and three tokens, in either order."""
    agent = LanguageModel(str(folders["gpt2"]), device="cpu")
    tested = 0
    for episode in episodes_of(make_game("Box", boxes=3), range(12), 1):
        step = episode.steps[0]
        tails: list[list[int]] = []
        for _ in range(3):
            text, before = (step.narration, step.questions[0].stem), tails[-1] if tails else []
            row = [*agent.encoder.opening(episode.opening), *(t for x in text for t in agent.encoder.piece(x)), *before]
            tails.append([*before, int(agent.model(torch.tensor([row])).logits[0, -1].argmax())])
        texts = [agent.tokenizer.decode(tail) for tail in tails]
        if [list(agent.encoder.piece(text)) if text.strip() else [] for text in texts] != tails:
            continue  # a text that is tokenised differently cannot be a choice
        tested += 1
        for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
            asked = step.questions[0]._replace(choices=tuple(texts[k] for k in order), truth=0, accepted=(0,))
            prompt = Prompt(replace(episode, steps=(step._replace(questions=(asked,)),)), 0, 0)
            assert agent.predict([prompt])[0].greedy == order.index(2)
    assert tested > 0


def make_fruit() -> Any:
    return episodes_of(make_game("FruitStore", people=21), range(1), 1)[0].steps[0].questions[0]


@pytest.mark.parametrize(("game", "settings", "steps"), [c for c in CASES if c[0] != "Box" or c[1].get("feedback")])
def test_live_equals_replay(model: LanguageModel, game: str, settings: dict[str, Any], steps: int) -> None:
    same(*both_roads(model, game, settings, steps))


def test_live_equals_replay_on_branches(model: LanguageModel) -> None:
    same(*both_roads(model, "Box", {"boxes": 4}, 6))


def both_roads(model: LanguageModel, game: str, settings: dict[str, Any], steps: int) -> tuple[list[Any], list[Any]]:
    made, seeds = make_game(game, **settings), seeds_for(3, 5)
    return replay(model, episodes_of(made, seeds, steps)).rows, live(model, made, seeds, steps).rows


def same(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
        for key in a.keys() - {"logprobs", "p_accepted"}:
            assert a[key] == b[key], key


@pytest.mark.parametrize("size", [1, 7])
def test_rows_do_not_depend_on_the_batch_size(model: LanguageModel, folders: dict[str, Path], size: int) -> None:
    other = LanguageModel(model.name, device="cpu", batch_size=size)
    for game, settings, steps in CASES[:1] + CASES[3:4] + CASES[6:]:
        episodes = episodes_of(make_game(game, **settings), range(10), steps)
        same(replay(model, episodes).rows, replay(other, episodes).rows)


def test_memory_that_runs_out_halves_the_batch(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    agent = LanguageModel(str(folders["gpt2"]), device="cpu")
    episodes = episodes_of(make_game("Box", boxes=3), range(9), 3)
    before = replay(agent, episodes).rows
    in_tree, most = agent.forward.in_tree, 2

    def narrow(tokens: Any, *args: Any) -> Any:
        if len(tokens) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return in_tree(tokens, *args)

    monkeypatch.setattr(agent.forward, "in_tree", narrow)
    same(before, replay(agent, episodes).rows)
    assert agent.batch_size <= 2
    most = 0
    with pytest.raises(AgentError, match="runs out of memory on one episode"):
        replay(agent, episodes)


def test_other_errors_of_a_forward_pass_are_not_swallowed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = LanguageModel(str(folders["gpt2"]), device="cpu")

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    episodes = episodes_of(make_game("Box", boxes=3), range(2), 3)
    replay(agent, episodes)
    monkeypatch.setattr(agent.forward, "in_tree", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        replay(agent, episodes)


def test_a_context_too_short_is_said_and_nothing_is_cut(folders: dict[str, Path]) -> None:
    agent = LanguageModel(str(folders["gpt2"]), device="cpu")
    episodes = episodes_of(make_game("DFA", states=4), range(2), 60)
    with pytest.raises(ContextError, match=r"from step \d+ on.*DFA|DFA.*from step \d+ on") as caught:
        agent.predict([p for e in episodes for p in prompts_of(e)])
    assert "too many" in str(caught.value)
    result = replay(agent, episodes)
    assert 0 < len(result.rows) < 120
    assert result.left_out == str(caught.value)
    assert len(result.rows) + len(caught.value.prompts) == 120
    assert max(r["prompt_tokens"] for r in result.rows) <= 512


def test_a_window_is_no_limit_and_rows_equal_plain_passes(folders: dict[str, Path]) -> None:
    tokenizer = LanguageModel(str(folders["gpt2"]), device="cpu").tokenizer
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, sliding_window=8, initializer_range=0.3,
    )  # fmt: skip
    agent = LanguageModel("windowed", loaded=(MistralForCausalLM(config).eval(), tokenizer))
    assert agent.context == 512
    episodes = episodes_of(make_game("DFA", states=4), range(2), 20)
    result = replay(agent, episodes)
    prompts = [p for e in episodes for p in prompts_of(e)]
    assert result.left_out == ""
    assert len(result.rows) == len(prompts) == 40
    assert max(r["prompt_tokens"] for r in result.rows) > 200
    for row, prompt in zip(result.rows, prompts, strict=True):
        logprobs, greedy = plain(agent, prompt)
        assert row["logprobs"] == pytest.approx(logprobs, abs=1e-4)
        assert row["greedy_correct"] == (greedy in prompt.asked.accepted)


MODULES = {"blocks": "transformer.h", "attention": "attn", "projection": "c_proj", "mlp": "mlp"}


def test_modules_given_by_name_are_those_found_by_structure(folders: dict[str, Path]) -> None:
    name = str(folders["gpt2"])
    found = LanguageModel(name, device="cpu")
    given = LanguageModel(name, device="cpu", modules=MODULES)
    paths = []
    for agent in (found, given):
        path = {module: path for path, module in agent.model.named_modules()}
        paths.append([
            (x.kind, x.heads, x.head_dim, x.adds, path[x.block], *map(path.get, (x.projection, x.attn_out, x.mlp_out)))
            for x in agent.sites.per_layer
        ])  # fmt: skip
    assert paths[0] == paths[1]
    assert paths[0][1][4:] == tuple(f"transformer.h.1{x}" for x in ("", ".attn.c_proj", ".attn", ".mlp"))
    episodes = episodes_of(make_game("Box", boxes=3), range(3), 3)
    answers = []
    for agent in (found, given):
        with agent.hooks(("head", 1, lambda x: x * (torch.arange(4) != 2)[:, None])):
            answers.append(replay(agent, episodes).rows)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "model.layers"}, r"GPT2LMHeadModel has no module 'model\.layers': it holds transformer, lm_head"),
        ({"projection": "o_proj"}, r"has no module 'o_proj': it holds c_attn, c_proj"),
        ({"mlp": "ln_2"}, r"resid_pre \+ attn_out \+ mlp_out is not the block's output"),
    ],
)
def test_wrong_names_of_modules_are_said_when_the_model_is_loaded(
    folders: dict[str, Path], change: dict[str, str], message: str
) -> None:
    with pytest.raises(SiteError, match=message) as caught:
        LanguageModel(str(folders["gpt2"]), device="cpu", modules=MODULES | change)
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite_are_an_error(folders: dict[str, Path]) -> None:
    agent = LanguageModel(str(folders["llama"]), device="cpu")
    with torch.no_grad():
        agent.model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(AgentError, match=r"not finite in torch\.float32"):
        replay(agent, episodes_of(make_game("Cycle"), range(1), 3))


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match=r"is not a model: expected a folder with config\.json"):
        LanguageModel(str(tmp_path))


def test_weights_other_than_safetensors_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["gpt2"].iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(AgentError, match="cannot load"):
        LanguageModel(str(tmp_path), device="cpu")


def test_an_unknown_dtype(folders: dict[str, Path]) -> None:
    with pytest.raises(AgentError, match="dtype='float99' is not possible"):
        LanguageModel(str(folders["gpt2"]), device="cpu", dtype="float99")


def test_a_session_stays_with_its_episodes(model: LanguageModel) -> None:
    one, two = episodes_of(make_game("Box"), range(2), 2)
    session = model.live()
    session.predict([Prompt(one, 0)])
    with pytest.raises(AgentError, match="start a new session"):
        session.predict([Prompt(two, 0)])


def test_nnsight_reads_the_same_activations(folders: dict[str, Path]) -> None:
    agent = LanguageModel(str(folders["llama"]), device="cpu")
    text = "Box A contains the hat."
    tokens = torch.tensor([agent.encoder.opening(text)])
    with agent.traced.trace(tokens):
        seen = agent.traced.model.layers[1].output.save()
    assert torch.equal(seen, agent.model(tokens, output_hidden_states=True).hidden_states[2]) or seen.shape[-1] == 32
