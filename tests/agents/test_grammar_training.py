"""Training on grammars: what the windows hold, what spoils them, that runs go on and refuse what is not theirs."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from nextstate.agents.architectures import ARCHITECTURES, new_model
from nextstate.agents.config import ConfigError
from nextstate.agents.grammar_training import (
    Windows,
    flops_per_token,
    load,
    make_tokenizer,
    matmul_peak,
    token_map,
    train,
)
from nextstate.agents.trainer import compile_blocks, evaluating
from nextstate.agents.training_config import SPECIAL, GrammarTraining, ModelSpec, check_training
from nextstate.envs import GameError
from nextstate.envs.grammar.derivation import sample
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.inside import member
from nextstate.envs.grammar.perturb import Perturbation, corrupt, draw
from nextstate.envs.grammar.sources import published, random_grammar

GRAMMAR = random_grammar(np.random.default_rng(0), levels=3)
TINY: dict[str, Any] = {
    "hidden_size": 16, "layers": 1, "heads": 2, "window": 24, "rows": 4, "steps": 6, "learning_rate": 1e-2,
    "evaluate_every": 3, "save_every": 3, "evaluation_strings": 8,
}  # fmt: skip


def test_windows_are_strings_one_after_another() -> None:
    data = Windows(GRAMMAR, 24, 200, seed=3, perturbation=None, masked=False)
    codes, strings = token_map(GRAMMAR), []
    for first in (0, 64):
        stream = [t for i in range(first, first + 64) for t in data[i]["input_ids"].tolist()]
        assert len(stream) == 64 * 24
        cuts = [i for i, t in enumerate(stream) if t == codes.begin]
        for a, b in pairwise(cuts):
            assert stream[b - 1] == codes.end
            strings.append([t - len(SPECIAL) for t in stream[a + 1 : b - 1]])
    assert len(strings) > 150
    assert member(GRAMMAR, strings).all()
    assert data[70]["labels"].tolist() == data[70]["input_ids"].tolist()


def test_a_window_is_a_function_of_its_number() -> None:
    one, other = (Windows(GRAMMAR, 24, 200, 3, None, True) for _ in range(2))
    order = [5, 130, 64, 5]
    assert [one[i]["input_ids"].tolist() for i in order] == [other[i]["input_ids"].tolist() for i in reversed(order)][
        ::-1
    ]
    assert one[5]["input_ids"].tolist() != one[6]["input_ids"].tolist()
    elsewhere = Windows(GRAMMAR, 24, 200, 4, None, True)
    assert elsewhere[5]["input_ids"].tolist() != one[5]["input_ids"].tolist()


def test_masked_windows_hide_what_is_to_be_told() -> None:
    plain, hidden = (Windows(GRAMMAR, 24, 640, 0, None, masked) for masked in (False, True))
    given = np.array([hidden[i]["input_ids"].tolist() for i in range(640)])
    wanted = np.array([hidden[i]["labels"].tolist() for i in range(640)])
    true = np.array([plain[i]["input_ids"].tolist() for i in range(640)])
    told = wanted >= 0
    assert (wanted[told] == true[told]).all()
    assert (given[~told] == true[~told]).all()
    assert told.mean() == pytest.approx(0.15, abs=0.01)
    assert (given[told] == SPECIAL.index("<mask>")).mean() == pytest.approx(0.8, abs=0.03)
    assert not (given[~told] == SPECIAL.index("<mask>")).any()


@pytest.mark.parametrize("kind", ["token", "symbol", "permutation"])
def test_perturbations_replace_as_often_as_they_say(kind: Any) -> None:
    grammar, n = published("cfg3b"), 400
    fraction, rate = 0.5, 0.1
    spoilt = draw(grammar, np.random.default_rng(1), n, Perturbation(kind, fraction, rate))
    valid = member(grammar, [d.tokens for d in spoilt])
    # A string of some 275 tokens, or 110 symbols above them, of which a tenth is replaced, is as good as never right.
    assert valid.mean() == pytest.approx(1 - fraction, abs=0.08)
    level = 6 if kind == "token" else 5
    changed = total = 0
    for each in spoilt:
        above, own, index = each.symbols[level - 1], each.symbols[level], each.index[level]
        first = np.flatnonzero(np.diff(index, prepend=0))
        rules = [tuple(right) for e in grammar.expansions[grammar.first[level - 1] :][:3] for right, _ in e]
        assert rules
        parents = each.index[level - 1][first]
        for p in range(1, int(parents.max()) + 1):
            body = tuple((own[first][parents == p] + grammar.first[level]).tolist())
            left = int(above[first][parents == p][0]) + grammar.first[level - 1]
            fits = [right for right, _ in grammar.expansions[left] if len(right) == len(body)]
            apart = min((sum(a != b for a, b in zip(right, body, strict=True)) for right in fits), default=0)
            changed, total = changed + apart, total + len(body)
    expected = fraction * rate * (1 if kind == "permutation" else 2 / 3)  # a draw from three is the same one in three
    assert changed / total == pytest.approx(expected, rel=0.15)


def test_no_perturbation_is_a_plain_draw_and_none_at_rate_0() -> None:
    plain = [d.tokens.tolist() for d in sample(GRAMMAR, np.random.default_rng(5), 50)]
    assert [d.tokens.tolist() for d in draw(GRAMMAR, np.random.default_rng(5), 50)] == plain
    for kind in ("token", "symbol", "permutation"):
        for fraction, rate in ((1.0, 0.0), (0.0, 1.0)):
            drawn = draw(GRAMMAR, np.random.default_rng(5), 50, Perturbation(kind, fraction, rate))  # type: ignore[arg-type]
            assert member(GRAMMAR, [d.tokens for d in drawn]).all()


def test_corrupted_tokens_are_drawn_anew() -> None:
    x = np.zeros(9000, dtype=np.int64)
    y = corrupt(x, np.random.default_rng(0), 0.15, 3)
    assert (y != 0).mean() == pytest.approx(0.1, abs=0.01)
    assert corrupt(x[:0], np.random.default_rng(0), 0.15, 3).tolist() == []


@pytest.mark.parametrize("rate", [1e-9, 0.3, 1.0])
def test_corruption_is_conditional_on_a_change(rate: float) -> None:
    """Frequencies of all corrupted strings equal those of independent redraws, given that one token differs."""
    x, n, many = np.array([0, 2, 1]), 3, 20_000
    chances = {}
    for y in itertools.product(range(n), repeat=len(x)):
        same = [1 - rate + rate / n if a == b else rate / n for a, b in zip(x, y, strict=True)]
        chances[y] = float(np.prod(same)) if y != tuple(x) else 0.0
    rng = np.random.default_rng(1)
    drawn = Counter(tuple(corrupt(x, rng, rate, n).tolist()) for _ in range(many))
    for y, chance in chances.items():
        p = chance / sum(chances.values())
        assert drawn[y] == pytest.approx(many * p, abs=4 * np.sqrt(many * p * (1 - p)) + 1e-9), y
    assert drawn[tuple(x.tolist())] == 0


@pytest.mark.parametrize("architecture", ["rotary", "relative", "masked"])
def test_a_run_goes_on_where_it_was_killed(architecture: Any, tmp_path: Path) -> None:
    spec, config = ModelSpec(architecture=architecture), GrammarTraining(**TINY)
    whole = train(config, spec, GRAMMAR, tmp_path / "whole", seed=1, mode="disabled")
    cut = tmp_path / "cut"
    train(config, spec, GRAMMAR, cut, seed=1, mode="disabled")
    (cut / "history.json").unlink()  # as if killed after the checkpoint of step 3
    for left in (cut / "checkpoints" / "checkpoint-6").rglob("*"):
        left.unlink()
    (cut / "checkpoints" / "checkpoint-6").rmdir()
    again = train(config, spec, GRAMMAR, cut, seed=1, mode="disabled")
    ids = torch.tensor([[0, 4, 5, 6, 4]])
    one, other = (load(folder, architecture).cpu()(ids).logits for folder in (whole, again))
    assert torch.allclose(one, other, atol=1e-5)
    told = json.loads((cut / "history.json").read_text())
    assert told["steps"] == 6
    assert told["tokens"] == 6 * 4 * 24
    assert told["tokens_per_second"] > 0
    if architecture != "masked":
        assert [row["step"] for row in told["curve"] if "kl" in row] == [3, 6]
        assert all(0 <= row["accuracy"] <= 1 for row in told["curve"] if "accuracy" in row)
    tokenizer = make_tokenizer(GRAMMAR)
    codes = token_map(GRAMMAR)
    assert tokenizer.encode("1 2 3", add_special_tokens=False) == list(codes.terminals)
    assert tokenizer.encode("1 2 3") == [codes.begin, *codes.terminals]


@pytest.mark.parametrize("masked", [False, True])
def test_windows_can_be_sent_to_other_processes(masked: bool) -> None:
    """Where worker processes are spawned and not forked, they are given a pickled copy."""
    data = Windows(GRAMMAR, 24, 200, 3, Perturbation("symbol", 0.5, 0.1), masked)
    copy = pickle.loads(pickle.dumps(data))
    for i in (130, 5):
        assert all(torch.equal(data[i][key], copy[i][key]) for key in ("input_ids", "labels"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
@pytest.mark.parametrize("architecture", ["rotary", "relative", "masked"])
def test_workers_change_no_weight(architecture: Any, tmp_path: Path) -> None:
    """Neither from the start nor when a training resumes with another number of them."""
    digests = []
    for workers in (0, 1, 2):
        out, config = tmp_path / str(workers), GrammarTraining(**TINY, workers=workers)
        train(config, ModelSpec(architecture=architecture), GRAMMAR, out, seed=1, mode="disabled")
        digests.append(json.loads((out / "history.json").read_text())["weights"])
    (out / "history.json").unlink()
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    again = GrammarTraining(**TINY, workers=1)
    train(again, ModelSpec(architecture=architecture), GRAMMAR, out, seed=1, mode="disabled")
    digests.append(json.loads((out / "history.json").read_text())["weights"])
    assert len(set(digests)) == 1


@pytest.mark.parametrize("architecture", ["absolute", "rotary", "relative", "masked"])
def test_bfloat16_trains_nearly_alike_with_float32_weights(architecture: Any, tmp_path: Path) -> None:
    longer = TINY | {"steps": 52, "evaluate_every": 52, "save_every": 26, "learning_rate": 3e-3}
    losses, spec = {}, ModelSpec(architecture=architecture)
    for precision in ("float32", "bfloat16"):
        out, config = tmp_path / precision, GrammarTraining(**longer, precision=precision)
        final = train(config, spec, GRAMMAR, out, mode="disabled")
        assert {x.dtype for x in load_file(final / "model.safetensors").values()} == {torch.float32}
        losses[precision] = json.loads((out / "history.json").read_text())["curve"][0]["loss"]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.02)
    weights = json.loads((out / "history.json").read_text())["weights"]
    (out / "history.json").unlink()
    shutil.rmtree(out / "checkpoints" / "checkpoint-52")
    train(config, spec, GRAMMAR, out, mode="disabled")
    assert json.loads((out / "history.json").read_text())["weights"] == weights


def test_folders_of_trainings_before_a_key_was_added_are_recognised(tmp_path: Path) -> None:
    old = set(GrammarTraining.model_fields) - {"workers", "precision", "compile"}
    assert set(GrammarTraining().decisive) == set(GrammarTraining(workers=3).decisive) == old
    assert GrammarTraining(precision="bfloat16").decisive == GrammarTraining().decisive | {"precision": "bfloat16"}
    assert GrammarTraining(compile=True).decisive == GrammarTraining().decisive | {"compile": True}
    train(GrammarTraining(**TINY), ModelSpec(untrained=True), GRAMMAR, tmp_path, mode="disabled")
    bf16 = GrammarTraining(**TINY, precision="bfloat16")
    with pytest.raises(ConfigError, match="contains a run of another config"):
        train(bf16, ModelSpec(untrained=True), GRAMMAR, tmp_path, mode="disabled")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which tracing reads
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_blocks_keep_names_and_results(architecture: Any, tmp_path: Path) -> None:
    """With the backend that runs what was traced as it is, as others need a C++ compiler."""
    torch.compiler.reset()  # after a number of models, nothing more is compiled
    torch.manual_seed(0)
    plain = new_model(architecture, 12, 16, 2, 2, 24).train()
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, backend="eager")
    assert sum(module._compiled_call_impl is not None for module in compiled.modules()) == 2
    ids = torch.randint(4, 12, (2, 24))
    gradients = []
    for model in (plain, compiled):
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
    compiled.save_pretrained(tmp_path)
    again = load(tmp_path, architecture).cpu()
    assert torch.equal(again(ids).logits, plain.eval()(ids).logits)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_evaluations_during_training_are_not_compiled(tmp_path: Path) -> None:
    torch.compiler.reset()
    model = new_model("rotary", 12, 16, 2, 2, 24)
    traced: list[int] = []
    for block in model.gpt_neox.layers:
        block.compile(backend=lambda graph, _: traced.append(len(traced)) or graph.forward)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model=model, args=arguments)
    with evaluating(trainer) as same, torch.no_grad():
        assert same is model
        assert not model.training
        model(torch.randint(4, 12, (2, 20)))
    assert model.training
    assert not traced
    model(torch.randint(4, 12, (2, 20)))
    assert traced


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles on a GPU")
def test_compilation_is_refused_without_a_gpu(tmp_path: Path) -> None:
    config = GrammarTraining(**TINY, compile=True)
    with pytest.raises(ConfigError, match="compile=true needs a GPU, and this machine has none"):
        train(config, ModelSpec(), GRAMMAR, tmp_path, mode="disabled")


def fresh_training(out: Path, threads: int, architecture: str) -> dict[str, Any]:
    """Train a small model in a process of its own; return its history."""
    shape = TINY | {"hidden_size": 32, "rows": 32, "steps": 60, "threads": threads, "evaluate_every": 60}
    code = f"""
from pathlib import Path
import numpy as np
import torch
from nextstate.agents.grammar_training import train
from nextstate.agents.trainer import compile_blocks, evaluating
from nextstate.agents.training_config import GrammarTraining, ModelSpec
from nextstate.envs.grammar.sources import random_grammar
train(GrammarTraining(**{shape | {"evaluation_strings": 100}!r}), ModelSpec(architecture={architecture!r}),
      random_grammar(np.random.default_rng(0), levels=3), Path({str(out)!r}), mode="disabled")
assert torch.get_num_threads() == {threads}
assert not torch.are_deterministic_algorithms_enabled()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads((out / "history.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["rotary", "relative"])
def test_a_training_repeats_bit_by_bit_at_a_fixed_number_of_threads(architecture: str, tmp_path: Path) -> None:
    found = [fresh_training(tmp_path / str(k), threads, architecture) for k, threads in enumerate((2, 2, 1))]
    assert [x["threads"] for x in found] == [2, 2, 1]
    assert found[0]["weights"] == found[1]["weights"]
    losses = [x["curve"][0]["loss"] for x in found]
    assert losses[0] == pytest.approx(losses[2], abs=0.02)  # rounding apart, the same training


def test_an_untrained_model_is_that_which_training_begins_with(tmp_path: Path) -> None:
    config = GrammarTraining(**TINY | {"steps": 1, "learning_rate": 0.0, "weight_decay": 0.0})
    begun = train(config, ModelSpec(), GRAMMAR, tmp_path / "begun", mode="disabled")
    random = train(config, ModelSpec(untrained=True), GRAMMAR, tmp_path / "random", mode="disabled")
    ids = torch.tensor([[0, 4, 5, 6, 4]])
    one, other = (load(folder, "rotary").cpu()(ids).logits for folder in (begun, random))
    assert torch.equal(one, other)


def test_processes_share_the_rows(tmp_path: Path) -> None:
    """Two processes under torchrun train the model that one trains, to rounding."""
    code = f"""
from pathlib import Path
import numpy as np
from nextstate.agents.grammar_training import train
from nextstate.agents.trainer import compile_blocks, evaluating
from nextstate.agents.training_config import GrammarTraining, ModelSpec
from nextstate.envs.grammar.sources import random_grammar
train(GrammarTraining(**{TINY!r}), ModelSpec(), random_grammar(np.random.default_rng(0), levels=3),
      Path({str(tmp_path / "two")!r}), mode="disabled")
"""
    script = tmp_path / "train.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    one = train(GrammarTraining(**TINY), ModelSpec(), GRAMMAR, tmp_path / "one", mode="disabled")
    ids = torch.tensor([[0, 4, 5, 6, 4]])
    logits = [load(folder, "rotary").cpu()(ids).logits for folder in (one, tmp_path / "two" / "model")]
    assert torch.allclose(*logits, atol=1e-3)


def test_operations_are_counted_as_a_linear_layer_does_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = GrammarTraining(**TINY | {"hidden_size": 64, "layers": 2, "window": 128})
    for architecture in ("absolute", "rotary"):
        model = new_model(architecture, 7, 64, 2, 2, 128)  # type: ignore[arg-type]
        model.set_attn_implementation("eager")
        ids = torch.randint(0, 7, (2, 128))
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        # What is counted by hand holds for all but the biases and norms, which have parameters and no products.
        assert counter.get_total_flops() / ids.numel() == pytest.approx(flops_per_token(model, config), rel=0.05)
    assert matmul_peak(torch.device("cpu"), torch.float32, repeats=1) > 1e8


def test_bad_input_is_named(tmp_path: Path) -> None:
    config = GrammarTraining(**TINY)
    with pytest.raises(ConfigError, match=r"window=10 is shorter than a string: .* 9 tokens.*expected at least 11"):
        train(GrammarTraining(**TINY | {"window": 10}), ModelSpec(), GRAMMAR, tmp_path / "short", mode="disabled")
    train(config, ModelSpec(untrained=True), GRAMMAR, tmp_path / "a", mode="disabled")
    other = random_grammar(np.random.default_rng(1), levels=3)
    for changed in (
        (config, ModelSpec(untrained=True), other),
        (config, ModelSpec(architecture="absolute", untrained=True), GRAMMAR),
        (GrammarTraining(**TINY | {"layers": 2}), ModelSpec(untrained=True), GRAMMAR),
    ):
        with pytest.raises(ConfigError, match="contains a run of another config"):
            train(*changed, tmp_path / "a", mode="disabled")
    with pytest.raises(ConfigError, match="terminals <mask> have names of special tokens"):
        check_training(config, Grammar.read("S -> <mask> b"))
    with pytest.raises(GameError, match=r"rate=1\.5 is not possible"):
        Perturbation("token", 0.5, 1.5)
    with pytest.raises(GameError, match=r"rate=0 is not possible: expected a number above 0"):
        corrupt(np.zeros(3, dtype=np.int64), np.random.default_rng(0), 0, 3)
    with pytest.raises(GameError, match=r"terminals=1 is not possible: expected 2 or more"):
        corrupt(np.zeros(3, dtype=np.int64), np.random.default_rng(0), 0.1, 1)
    with pytest.raises(GameError, match="kind='word' is not possible"):
        Perturbation("word", 0.5, 0.5)  # type: ignore[arg-type]
