"""Predictions of whole batches in columns, against loops over questions and plain forward passes of single prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextstate.agents.agent import Prediction, Predictions, Prompt
from nextstate.agents.branches import Branch, Tree
from nextstate.agents.forward import Scores, Want, Wants
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, prompts_of
from nextstate.agents.scoring import Queries, in_order
from nextstate.agents.text import Cloze, Encoder, TokenizerError
from nextstate.envs.game import Episode, Question
from nextstate.envs.games import make_game
from tests.exactness import lived, truth

INTEGERS = ("greedy", "choice", "choice_token", "choice_byte")


def words(rng: np.random.Generator, n: int) -> tuple[str, ...]:
    """Draw different choices: some begin with another one, share their first tokens, or are not ASCII."""
    parts = (" a", " b", " Box", "es", "é", " 名", "前", " 🙂", " to", "to", " 1")
    out: list[str] = []
    while len(out) < n:
        head = out[int(rng.integers(len(out)))] if out and rng.random() < 0.5 else ""
        text = head + "".join(rng.choice(parts, size=int(rng.integers(1, 4))))
        if text.strip() and text not in out:
            out.append(text)
    return tuple(out)


def asked_otherwise(episode: Episode, rng: np.random.Generator) -> Episode:
    """Return an episode with other questions: up to three a step, of two to seven choices."""
    steps = []
    for step in episode.steps:
        questions = []
        for _ in range(int(rng.integers(1, 4))):
            choices = words(rng, int(rng.integers(2, 8)))
            stem = str(rng.choice([" The", " The hat", " The hat is in", " Où est", step.questions[0].stem]))
            truth_ = int(rng.integers(len(choices)))
            questions.append(Question("it", stem, choices, truth_, (truth_,)))
        steps.append(step._replace(questions=tuple(questions)))
    return replace(episode, steps=tuple(steps))


def drawn(seed: int, count: int = 4, steps: int = 3) -> list[Prompt]:
    """Draw prompts of several episodes, in no order; questions stay in the transcripts of some."""
    rng = np.random.default_rng(seed)
    made = [make_game("Box", boxes=3), make_game("Box", boxes=3, feedback="inline", style="plain")]
    episodes = [asked_otherwise(episodes_of(made[k % 2], [k], steps + k)[0], rng) for k in range(count)]
    prompts = [p for e in episodes for p in prompts_of(e)]
    return [prompts[i] for i in rng.permutation(len(prompts))]


def same_columns(one: Predictions, two: Predictions) -> None:
    for name in (*INTEGERS, "prompt_tokens"):
        assert getattr(one, name).tolist() == getattr(two, name).tolist(), name
    assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
    assert one.written == two.written
    assert one.ends.tolist() == two.ends.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_columns_equal_plain_passes_of_each_prompt(model: LanguageModel, seed: int) -> None:
    prompts = drawn(seed)
    counts = {len(p.asked.choices) for p in prompts}
    lengths = {len(model.encoder.piece(c)) for p in prompts for c in p.asked.choices}
    assert len(counts) > 3
    assert len(lengths) > 3
    found = model.predict(prompts)
    assert isinstance(found, Predictions)
    assert len(found) == len(prompts)
    assert found.written.keys() == {i for i, c in enumerate(found.greedy) if c < 0}
    for i, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
        known = truth(model.model, model.encoder, prompt)
        assert one.logprobs == pytest.approx(known.logprobs, abs=1e-4)
        assert one.greedy == known.greedy or known.margin < 1e-3
        choices = prompt.asked.choices
        tokens = [len(model.encoder.piece(c)) for c in choices]
        for pick, per in (
            (one.choice, [1] * len(choices)),
            (one.choice_token, tokens),
            (one.choice_byte, [len(c.encode("utf-8")) for c in choices]),
        ):
            scores = np.array(known.logprobs) / per
            assert scores[pick] == pytest.approx(scores.max(), abs=1e-4)
        assert found[i] == one


def test_greedy_answers_that_are_choices_and_that_are_not(folders: dict[str, Path]) -> None:
    """Half of the questions offer what the model writes itself, after one to three tokens, among other choices."""
    agent, rng = LanguageModel(str(folders["gpt2"]), device="cpu"), np.random.default_rng(5)
    prompts = list[Prompt]()
    for k, episode in enumerate(episodes_of(make_game("Box", boxes=3), range(24), 1)):
        step = episode.steps[0]
        own = list[int]()
        row = [*agent.encoder.opening(episode.opening), *agent.encoder.piece(step.narration)]
        row += agent.encoder.piece(step.questions[0].stem)
        for _ in range(int(rng.integers(1, 4))):
            with torch.inference_mode():
                own.append(int(agent.model(torch.tensor([[*row, *own]])).logits[0, -1].argmax()))
        text = agent.tokenizer.decode(own)
        offered = [*words(rng, 3), *([text] if k % 2 and text.strip() else [])]
        asked = step.questions[0]._replace(choices=tuple(offered), truth=0, accepted=(0,))
        prompts.append(Prompt(replace(episode, steps=(step._replace(questions=(asked,)),)), 0))
    found = agent.predict(prompts)
    assert isinstance(found, Predictions)
    known = [truth(agent.model, agent.encoder, p).greedy for p in prompts]
    assert found.greedy.tolist() == known
    assert {-1, 3} <= set(known)
    for i, prompt in enumerate(prompts):
        assert found[i].greedy < 0 or found[i].answer == prompt.asked.choices[found[i].greedy].strip()
        assert (i in found.written) == (found[i].greedy < 0)


def test_of_equal_choices_the_first_one_is_chosen(folders: dict[str, Path]) -> None:
    agent = LanguageModel(str(folders["gpt2"]), device="cpu")
    with torch.no_grad():
        agent.model.get_output_embeddings().weight.zero_()  # each token is equally likely
    episode = episodes_of(make_game("Box", boxes=3), range(1), 1)[0]
    step, vocabulary = episode.steps[0], len(agent.model.get_output_embeddings().weight)
    for choices in ((" a b", " b", " a", " b"), (" Box", " a", " 1"), (" 1 a b", " a b 1", " 1 a")):
        lengths = [len(agent.encoder.piece(c)) for c in choices]
        sizes = [len(c.encode()) for c in choices]
        asked = step.questions[0]._replace(choices=choices, truth=0, accepted=(0,))
        found = agent.predict([Prompt(replace(episode, steps=(step._replace(questions=(asked,)),)), 0)])[0]
        assert found.logprobs == pytest.approx([-n * np.log(vocabulary) for n in lengths], rel=1e-6)
        assert found.choice == lengths.index(min(lengths))
        per_byte = [n / size for n, size in zip(lengths, sizes, strict=True)]
        assert found.choice_byte == next(i for i, x in enumerate(per_byte) if x < min(per_byte) + 1e-9)
        assert found.greedy == -1


def test_no_prompts(model: LanguageModel) -> None:
    assert list(model.predict([])) == []
    assert list(model.live().predict([])) == []


def test_one_call_equals_a_call_for_each_prompt_and_live(model: LanguageModel) -> None:
    prompts = sorted(drawn(7), key=lambda p: (p.episode.seed, p.step, p.question))
    whole = model.predict(prompts)
    assert isinstance(whole, Predictions)
    alone = Predictions.of(prompts, [model.predict([p])[0] for p in prompts])
    step_by_step = Predictions.of(prompts, lived(model, prompts))
    for other in (alone, step_by_step):
        same_columns(whole, Predictions(**{**vars_of(other), "written": only_written(other)}))


def vars_of(predictions: Predictions) -> dict[str, Any]:
    return {name: getattr(predictions, name) for name in predictions.__dataclass_fields__}


def only_written(predictions: Predictions) -> dict[int, str]:
    return {i: text for i, text in predictions.written.items() if predictions.greedy[i] < 0}


def looped(branch: Branch, tree: Tree, argmax: Any, logprob: Any) -> Prediction:
    """Score one question by loops over its choices; `argmax` and `logprob` are functions of a path of tokens."""
    head = [tree.tokens[n] for n in tree.path(branch.node)]
    sums, greedy, matched, begin = list[float](), -1, 0, 0
    for c, n in enumerate(branch.cloze.lengths.tolist()):
        tokens = branch.cloze.wanted[begin : begin + n].tolist()
        begin += n
        paths = [tuple([*head, *tokens[:k]]) for k in range(n)]
        sums.append(sum(logprob(path, t) for path, t in zip(paths, tokens, strict=True)))
        if n > matched and all(argmax(path) == t for path, t in zip(paths, tokens, strict=True)):
            greedy, matched = c, n
    per_token, per_byte = (np.array(sums) / x for x in (branch.cloze.lengths, branch.cloze.sizes))
    best = [int(np.argmax(x)) for x in (sums, per_token, per_byte)]
    return Prediction("", greedy, best[0], best[1], best[2], tuple(sums), len(head))


def a_cloze(rng: np.random.Generator, letters: int) -> Cloze:
    choices = [tuple(rng.integers(letters, size=n).tolist()) for n in rng.integers(1, 4, size=int(rng.integers(1, 7)))]
    stem = tuple(rng.integers(letters, size=int(rng.integers(3))).tolist())
    return Cloze.of(stem, choices, rng.integers(1, 9, size=len(choices)).tolist())


@pytest.mark.parametrize("letters", [2, 3, 10])
def test_scores_in_arrays_equal_loops_over_choices(letters: int) -> None:
    """Tokens are few, so that questions share nodes, choices begin with others, are equal, and are often written."""
    rng = np.random.default_rng(letters)
    hits = 0
    for _ in range(60):
        trees = [Tree() for _ in range(3)]
        at: list[tuple[int, Branch]] = []
        for _ in range(8):
            t = int(rng.integers(3))
            end = trees[t].grow(-1, rng.integers(letters, size=int(rng.integers(1, 5))).tolist())
            at.append((t, trees[t].graft(end, a_cloze(rng, letters))))
        likely: dict[Any, int] = {}
        values: dict[Any, float] = {}

        def argmax(key: Any, likely: dict[Any, int] = likely) -> int:
            return likely.setdefault(key, int(rng.integers(letters)))

        def logprob(key: Any, token: int, values: dict[Any, float] = values) -> float:
            return values.setdefault((key, token), -float(rng.integers(1, 4)))  # whole numbers: many ties

        expected = [
            looped(q, trees[t], lambda p, t=t: argmax((t, p)), lambda p, x, t=t: logprob((t, p), x)) for t, q in at
        ]
        queries = Queries.of([t for t, _ in at], [q for _, q in at])
        keys = list(zip(queries.wanted.tree.tolist(), queries.wanted.node.tolist(), strict=True))
        assert keys == sorted(set(keys))
        paths = [(t, tuple([trees[t].tokens[k] for k in trees[t].path(n)])) for t, n in keys]
        numbers = [
            logprob(paths[k], x)
            for k, x in zip(queries.wanted.at.tolist(), queries.wanted.tokens.tolist(), strict=True)
        ]
        questions = [Question("x", "", ("c",) * len(q.cloze.lengths), 0, (0,)) for _, q in at]
        lengths = np.array([one.prompt_tokens for one in expected])
        found = queries.predictions(
            questions, Scores(np.array([argmax(p) for p in paths]), np.array(numbers)), str, lengths
        )
        for i, ((t, q), one) in enumerate(zip(at, expected, strict=True)):
            answer = (
                "c" if one.greedy >= 0 else str(argmax((t, tuple([trees[t].tokens[k] for k in trees[t].path(q.node)]))))
            )
            assert found[i] == replace(one, answer=answer)
            hits += one.greedy >= 0
        # Cut into parts and joined again, in whatever order.
        order = rng.permutation(len(at)).tolist()
        cut = int(rng.integers(len(at) + 1))
        parts = []
        for own in (order[:cut], order[cut:]):
            if own:
                some = Queries.of([at[i][0] for i in own], [at[i][1] for i in own])
                here = [
                    (t, tuple([trees[t].tokens[k] for k in trees[t].path(n)]))
                    for t, n in zip(some.wanted.tree, some.wanted.node, strict=True)
                ]
                logs = [
                    logprob(here[k], x)
                    for k, x in zip(some.wanted.at.tolist(), some.wanted.tokens.tolist(), strict=True)
                ]
                likeliest = np.array([argmax(p) for p in here])
                asked = [questions[i] for i in own]
                parts.append((own, some.predictions(asked, Scores(likeliest, np.array(logs)), str, lengths[own])))
        same_columns(in_order(parts, questions), found)
    assert hits > 50


@pytest.mark.parametrize("letters", [2, 5])
def test_a_tree_is_the_set_of_its_paths(letters: int) -> None:
    """Growing, grafting, cutting and copying, against a dictionary of all paths in the order of their growth."""
    rng = np.random.default_rng(letters)
    for _ in range(40):
        tree, known = Tree(), dict[tuple[int, ...], int]()

        def add(path: tuple[int, ...], known: dict[tuple[int, ...], int] = known) -> int:
            for k in range(len(path)):
                known.setdefault(path[: k + 1], len(known))
            return known[path] if path else -1

        for _ in range(25):
            places = [(), *known]
            start = places[int(rng.integers(len(places)))]
            what = rng.random()
            if what < 0.5:
                tokens = tuple(rng.integers(letters, size=int(rng.integers(5))).tolist())
                assert tree.grow(known.get(start, -1), tokens) == add(start + tokens)
            elif what < 0.85 and start:
                cloze = a_cloze(rng, letters)
                branch = tree.graft(known[start], cloze)
                assert branch.node == add(start + cloze.stem)
                for c in range(len(cloze.lengths)):
                    choice = branch.choice(c)
                    heads = [start + cloze.stem + choice.tokens[:k] for k in range(len(choice.tokens))]
                    assert list(choice.nodes) == [add(path) for path in heads]
            elif what < 0.95:
                keep = int(rng.integers(len(known) + 1))
                tree.cut(keep)
                for path in [path for path, node in known.items() if node >= keep]:
                    del known[path]
            else:
                other, tree = tree, tree.copy()
                other.grow(-1, (letters, letters))
            assert len(tree) == len(known) == len(tree.parents) == len(tree.depths)
            for path, node in known.items():
                assert tree.tokens[node] == path[-1]
                assert tree.parents[node] == known.get(path[:-1], -1)
                assert tree.depths[node] == len(path) - 1
                assert [tree.tokens[n] for n in tree.path(node)] == list(path)
            longer = (*start, *rng.integers(letters, size=4).tolist())
            expected = [known[longer[:k]] for k in range(len(start) + 1, len(longer) + 1) if longer[:k] in known]
            if start in known or not start:
                assert tree.follow(known.get(start, -1), longer[len(start) :]) == expected


def test_tokens_of_a_question_are_those_of_its_pieces(folders: dict[str, Path]) -> None:
    encoder: Encoder = LanguageModel(str(folders["llama"]), device="cpu").encoder
    rng = np.random.default_rng(0)
    for _ in range(50):
        choices = words(rng, 5)
        cloze = encoder.cloze(" The hat", choices)
        assert cloze is encoder.cloze(" The hat", choices)
        pieces = [encoder.piece(c) for c in choices]
        assert cloze.stem == encoder.piece(" The hat")
        assert cloze.wanted.tolist() == [token for piece in pieces for token in piece]
        assert cloze.lengths.tolist() == [len(piece) for piece in pieces]
        assert cloze.sizes.tolist() == [len(c.encode("utf-8")) for c in choices]
    with pytest.raises(TokenizerError, match="an empty one"):
        encoder.cloze(" The hat", (" a", ""))


def test_wanted_nodes_in_columns_are_the_same_sequence() -> None:
    nodes = [Want(0, 3), Want(2, 1), Want(2, 4)]
    wanted = Wants.of(nodes)
    assert list(wanted) == list(wanted[:]) == [wanted[i] for i in range(len(wanted))] == nodes
    assert wanted[-1] == nodes[-1]
    assert Wants.of(wanted) is wanted
    assert len(Wants.of([])) == len(wanted.at) == len(wanted.tokens) == 0
