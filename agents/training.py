"""Train a small language model on fresh episodes of the project's own games (`nextstate train CONFIG`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    set_seed,
)

from nextstate.agents.branches import Tree, Trunk, pack
from nextstate.agents.config import ConfigError, Strict
from nextstate.agents.identity import TRAINED, trained_on
from nextstate.agents.language import LanguageModel
from nextstate.agents.masks import PathMasks, Places
from nextstate.agents.rollout import determined_accuracy, episodes_of, seeds_for
from nextstate.agents.text import Encoder, begins_with
from nextstate.agents.trainer import TRAINING_STREAM, evaluating, fit, init_train_dir
from nextstate.agents.training_config import Optimisation
from nextstate.envs.files import write_json
from nextstate.envs.game import Episode, GameError, Sample, expected_accuracy, unroll
from nextstate.envs.games import game_class, make_game

BOS, PAD = "<|bos|>", "<|pad|>"
EVALUATION_SIZES = (2, 4, 6, 8, 10)
EVALUATION_STEPS = 16


class ModelConfig(Strict):
    """Dimensions of the model to train."""

    hidden_size: int = 128
    layers: int = 4
    heads: int = 8
    intermediate_size: int = 384
    context: int = 1024
    rope_theta: float = 1000.0
    vocabulary: int = 640


class Weights(Strict):
    """Weights of tokens in the loss, by the role of the token."""

    determined: float = 1.0
    undetermined: float = 0.05
    text: float = 0.02


class Curriculum(Strict):
    """The maximum game size (states, boxes, people) by step: `start`, plus one every `every` steps, up to `most`."""

    start: int = 2
    every: int = 500
    most: int = 8

    def level(self, step: int) -> int:
        """Return the maximum game size at an optimiser step."""
        return min(self.most, self.start + step // self.every)


class Stage(Strict):
    """The training data up to an optimiser step (exclusive).

    Args:
        until: the step at which the next stage begins; None for the last stage.
        mixture: share of episodes of each game, given by name or as "package.module:Class".
        largest: the maximum size of a game, if it should be smaller than the curriculum's.
        options: for each game, keyword arguments of its `sample` method.
        resist: names of shortcuts. Determined questions that one of them answers wrongly are weighted by
            `resist_weight`, since a model that relies on a shortcut learns little from other questions.
    """

    until: int | None = None
    mixture: dict[str, float] = {"DFA": 3, "Box": 3, "Cycle": 1, "FruitStore": 1}
    largest: dict[str, int] = {}
    options: dict[str, dict[str, Any]] = {}
    resist: list[str] = []
    resist_weight: float = 1.0


class TrainConfig(Optimisation):
    """The complete configuration of a training run."""

    name: str = "tiny"
    seed: int = 0
    start: str = Field("", description="a model of the same shape to start from; known tokens keep their embeddings")
    model: ModelConfig = ModelConfig()
    row_tokens: int = Field(256, ge=16)
    weights: Weights = Weights()
    curriculum: Curriculum = Curriculum()
    stages: list[Stage] = Field(default=[Stage()], min_length=1)
    evaluation_episodes: int = 48

    @model_validator(mode="after")
    def _known_options(self) -> TrainConfig:
        for stage in self.stages:
            for name, options in stage.options.items():
                if name not in stage.mixture:
                    raise ValueError(f"options for {name!r}, which is not in the mixture: {', '.join(stage.mixture)}")
                known = [*signature(game_class(name).sample).parameters][3:]
                unknown = [key for key in options if key not in known]
                if unknown:
                    expected = f"one of {', '.join(known)}" if known else "none"
                    raise ValueError(f"unknown option {unknown[0]!r} of {name}: expected {expected}")
        return self

    def stage(self, step: int) -> Stage:
        """Return the stage at an optimiser step."""
        return next((s for s in self.stages if s.until is None or step < s.until), self.stages[-1])


def draw_sample(stage: Stage, level: int, rng: np.random.Generator) -> Sample:
    """Draw the game of one training episode, its length, and the questions per step, at a curriculum level.

    Raises:
        ConfigError: the mixture names a game that does not exist, or `options` an option that the game does not have.
    """
    names = list(stage.mixture)
    shares = np.array([stage.mixture[n] for n in names])
    name = names[int(rng.choice(len(names), p=shares / shares.sum()))]
    size = int(rng.integers(2, min(level, stage.largest.get(name, level)) + 1))
    try:
        return game_class(name).sample(rng, size, level, **stage.options.get(name, {}))
    except GameError as error:
        raise ConfigError(f"mixture: {error}") from error


@dataclass(frozen=True)
class Row:
    """A packed row and its prediction targets: token `target[k]` is predicted from node `context[k]`."""

    tree: Tree
    context: list[int]
    target: list[int]
    weight: list[float]


def plant_episode(
    row: Row, encoder: Encoder, episode: Episode, weights: Weights, stage: Stage, rng: np.random.Generator
) -> list[int]:
    """Add an episode to a row, with the loss on an accepted answer (drawn if there are several) of each question.

    Returns the first node of each step from which an answer is predicted.
    """
    first = []
    trunk = Trunk(encoder, episode, row.tree)
    beliefs = episode.beliefs("ideal")
    tempting = [episode.beliefs(name) for name in stage.resist if name in episode.game.shortcuts]
    for t, step in enumerate(episode.steps):
        first.append(len(row.context))
        for q, question in enumerate(step.questions):
            planted = trunk.add_question(t, q)
            settled = expected_accuracy(beliefs[t][q], question.accepted) == 1
            weight = weights.determined if settled else weights.undetermined
            if settled and any(expected_accuracy(b[t][q], question.accepted) < 1 for b in tempting):
                weight *= stage.resist_weight
            right = question.truth
            if len(question.accepted) > 1 and episode.game.feedback == "branch":
                right = question.accepted[int(rng.integers(len(question.accepted)))]
            choice = planted.choice(right)
            row.context.extend(choice.nodes)
            row.target.extend(choice.tokens)
            row.weight.extend([weight] * len(choice.tokens))
    trunk.add_question(len(episode.steps) - 1, 0)
    return [row.context[k] for k in first]


def finish(row: Row, limit: int, weights: Weights) -> Row:
    """Cut a row to `limit` tokens, and add the loss on the tokens of the story."""
    tree = row.tree
    del tree.tokens[limit:], tree.parents[limit:], tree.depths[limit:]
    keep = [k for k, node in enumerate(row.context) if node < len(tree)]
    context = [row.context[k] for k in keep]
    target = [row.target[k] for k in keep]
    weight = [row.weight[k] for k in keep]
    story = [node for node, parent in enumerate(tree.parents) if parent >= 0]
    context += [tree.parents[node] for node in story]
    target += [tree.tokens[node] for node in story]
    weight += [weights.text] * len(story)
    return Row(tree, context, target, weight)


class FreshRows(torch.utils.data.Dataset[Row]):
    """Training rows. Row `i` depends only on the config and `i`, so that a resumed run sees the same data."""

    def __init__(self, config: TrainConfig, encoder: Encoder) -> None:
        self.config, self.encoder = config, encoder

    def __len__(self) -> int:
        return self.config.rows * self.config.steps

    def __getitem__(self, i: int) -> Row:
        row = Row(Tree(), [], [], [])
        for _ in self.planted(i, row):
            pass
        return finish(row, self.config.row_tokens, self.config.weights)

    def planted(self, i: int, row: Row) -> Iterator[tuple[Episode, list[int]]]:
        """Fill an empty row with the episodes of row `i`; yield each, with the result of `plant_episode`."""
        config = self.config
        rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(TRAINING_STREAM, i)))
        level, stage = config.curriculum.level(i // config.rows), config.stage(i // config.rows)
        while len(row.tree) < config.row_tokens:
            drawn = draw_sample(stage, level, rng)
            episode = unroll(drawn.game, 0, drawn.steps, ask=drawn.questions, rng=rng)
            yield episode, plant_episode(row, self.encoder, episode, config.weights, stage, rng)


def trained_range(config: TrainConfig, encoder: Encoder, rows: int = 1000) -> dict[str, dict[str, int]]:
    """Return what a model is trained on: of each game and size, the largest step whose answer is in a training row.

    Rows are cut to `row_tokens`, so that large systems are seen for fewer steps than their episodes have.

    Args:
        config: of the training.
        encoder: of the tokenizer that is trained with.
        rows: number of training rows that are looked at, evenly spaced over the training; all if it has fewer.
    """
    data = FreshRows(config, encoder)
    found: dict[str, dict[str, int]] = {}
    for i in np.unique(np.linspace(0, len(data) - 1, min(rows, len(data))).astype(int)):
        for episode, nodes in data.planted(int(i), Row(Tree(), [], [], [])):
            game = episode.game
            steps = found.setdefault(game.name, {})
            size, step = str(getattr(game, game.size)), sum(node < config.row_tokens for node in nodes)
            steps[size] = max(step, steps.get(size, 0))
    return joined(found)


def joined(*ranges: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Return the union of what `trained_range` returned for trainings that follow each other, sorted by size."""
    out: dict[str, dict[str, int]] = {}
    for game, sizes in (item for one in ranges for item in one.items()):
        for size, step in sizes.items():
            out.setdefault(game, {})[size] = max(step, out.get(game, {}).get(size, 0))
    return {
        game: {size: out[game][size] for size in sorted(out[game], key=int) if out[game][size]} for game in sorted(out)
    }


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return tensors for `predict_targets`: tokens and positions by row and node, and the flattened targets."""
    batch = pack([r.tree for r in rows])
    where = [(i, node) for i, r in enumerate(rows) for node in r.context]
    out = {
        "input_ids": torch.from_numpy(batch.tokens),
        "depths": torch.from_numpy(batch.depths),
        "where": torch.tensor(where),
        "target": torch.tensor([t for r in rows for t in r.target]),
        "weight": torch.tensor([w for r in rows for w in r.weight]),
    }
    if batch.seen is not None:
        out["seen"] = torch.from_numpy(batch.seen)
    return out


def predict_targets(
    model: Any, inputs: dict[str, Tensor], masks: PathMasks | None = None
) -> Float[Tensor, "target vocabulary"]:
    """Return the logits at the nodes from which targets are predicted; `masks` is created if it is not given."""
    masks = masks or PathMasks(model)
    depths = inputs["depths"]
    given = {"input_ids": inputs["input_ids"], "position_ids": depths, "attention_mask": torch.ones_like(depths)}
    with masks(Places(inputs["seen"], depths)) if "seen" in inputs else nullcontext():
        logits = model(**given, use_cache=False).logits
    picked: Tensor = logits[inputs["where"][:, 0], inputs["where"][:, 1]]
    return picked


class EpisodeTrainer(Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` with a loss weighted by the role of each token."""

    masks: PathMasks | None = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.masks is None:
            self.masks = PathMasks(self.accelerator.unwrap_model(model))
        logits = predict_targets(model, inputs, self.masks)
        losses = torch.nn.functional.cross_entropy(logits.float(), inputs["target"], reduction="none")
        loss = (losses * inputs["weight"]).sum() / inputs["weight"].sum()
        return (loss, logits) if return_outputs else loss


class CellAccuracy(TrainerCallback):  # type: ignore[misc]
    """Logs the greedy accuracy on determined questions of unseen episodes by cell, at regular step intervals."""

    def __init__(self, config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        self.every, self.tokenizer, self.cells = config.evaluate_every, tokenizer, evaluation_cells(config)
        self.trainer: Trainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer is None or (state.global_step % self.every and state.global_step != state.max_steps):
            return
        with evaluating(self.trainer) as model:
            agent = LanguageModel("in training", loaded=(model, self.tokenizer))
            found = {name: determined_accuracy(agent, episodes) for name, episodes in self.cells.items()}
        self.trainer.log({f"accuracy/{name}": share for name, share in found.items() if not math.isnan(share)})


def evaluation_cells(config: TrainConfig) -> dict[str, list[Episode]]:
    """Return evaluation episodes of each game in the mixtures, by size, with seeds that training never uses."""
    seeds = seeds_for(config.seed, config.evaluation_episodes, cell=999)
    cells: dict[str, list[Episode]] = {}
    for name in dict.fromkeys(name for stage in config.stages for name in stage.mixture):
        cls = game_class(name)
        for size in (n for n in EVALUATION_SIZES if n in cls.sizes):
            game = make_game(name, **{cls.size: size})
            steps = min(EVALUATION_STEPS, game.max_steps or EVALUATION_STEPS)
            cells[f"{cls.name} {cls.size} {size}"] = episodes_of(game, seeds, steps)
    return cells


def corpus(config: TrainConfig, episodes: int = 4000) -> Iterator[str]:
    """Yield transcripts of all games and sizes, for the tokenizer."""
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(TRAINING_STREAM + 1,)))
    for _ in range(episodes):
        drawn = draw_sample(config.stages[0], 12, rng)
        episode = unroll(drawn.game, 0, drawn.steps, ask=drawn.questions, rng=rng)
        yield episode.prompt(len(episode.steps) - 1)


def train_tokenizer(config: TrainConfig) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer, which encodes any text, with the words of the games as single tokens.

    It prepends BOS to each text, as in training.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.model.vocabulary,
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(config), trainer)
    tokenizer.post_processor = begins_with(BOS, tokenizer.get_vocab()[BOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=PAD,
        model_max_length=config.model.context,
        clean_up_tokenization_spaces=False,
    )


def start_from(start: str, config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a model with the weights of `start`; embeddings of tokens that `start` does not have are untrained.

    Raises:
        ConfigError: `start` has another shape.
        AgentError: the model does not exist or cannot be loaded.
    """
    other = LanguageModel(start, device="cpu", dtype="float32")
    model = new_model(config, len(tokenizer))
    weights = other.model.state_dict()
    fresh = model.get_input_embeddings().weight
    old, new = other.tokenizer.get_vocab(), tokenizer.get_vocab()
    shared = [token for token in new if token in old]
    try:
        table = fresh.detach().clone()
        table[[new[t] for t in shared]] = weights["model.embed_tokens.weight"][[old[t] for t in shared]]
        model.load_state_dict(weights | {"model.embed_tokens.weight": table, "lm_head.weight": table})
    except (RuntimeError, KeyError) as error:
        raise ConfigError(f"start: {start} is not a model of the shape in `model`: {error}") from error
    return model


def new_model(config: ModelConfig, vocabulary: int) -> LlamaForCausalLM:
    """Return an untrained Llama of the configured shape, embeddings tied."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.context,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def train(config: TrainConfig, out: Path) -> Path:
    """Train, resuming from the last checkpoint in `out`; return the folder of the finished model.

    Raises:
        ConfigError: `out` contains a training run with another config.
    """
    init_train_dir(config.decisive, out)
    set_seed(config.seed)
    tokenizer = train_tokenizer(config)
    started = start_from(config.start, config.model, tokenizer) if config.start else None
    trainer = fit(
        EpisodeTrainer,
        config,
        out,
        config.name,
        config.seed,
        callbacks=[CellAccuracy(config, tokenizer)],
        model=started or new_model(config.model, len(tokenizer)),
        train_dataset=FreshRows(config, Encoder(tokenizer)),
        data_collator=collate,
    )
    final = out / "model"
    model = trainer.accelerator.unwrap_model(trainer.model).to(torch.float32)
    model.config.use_cache = True  # disabled by the trainer
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    before = trained_on(config.start) if config.start else {}
    whole = joined(before, trained_range(config, Encoder(tokenizer)))
    write_json(final / TRAINED, whole)
    return final
