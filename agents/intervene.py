"""Ablate heads while a model answers, live or in replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nextstate.agents.agent import Agent, AgentError, ContextError, Prediction, Prompt
from nextstate.agents.branches import ForwardContext
from nextstate.agents.intervention import Intervention
from nextstate.agents.language import LanguageModel
from nextstate.agents.sites import Activation, Edit, Site
from nextstate.envs.game import Episode, unroll
from nextstate.envs.rules import Rules

_REFERENCE_SEED = 2 * 10**18  # beyond every seed that an experiment draws


class _Setting(NamedTuple):
    """The game, settings and length for which reference episodes are drawn."""

    game: Rules
    steps: int

    @classmethod
    def of(cls, episode: Episode) -> _Setting:
        return cls(episode.game, len(episode.steps))


Reference = dict[int, Float[Tensor, "token head dim"]]  # by layer, the heads of the intervention


@dataclass
class _Puts:
    """Applies an intervention to a model; caches the reference values of each setting."""

    model: LanguageModel
    what: Intervention
    known: dict[_Setting, Reference] = field(default_factory=dict)

    def edits(self, prompts: Sequence[Prompt]) -> list[tuple[Site, int, Edit]]:
        """Return the hooks for some prompts, once the reference episodes of their settings have been read."""
        if self.what.mode != "zero":
            for setting in dict.fromkeys(_Setting.of(p.episode) for p in prompts):
                if setting not in self.known:
                    self.known[setting] = self._read(setting)
        return [("head", layer, partial(self._edit, layer)) for layer in self.what.by_layer]

    def _edit(self, layer: int, x: Activation) -> Activation:
        new = x.clone()
        new[:, :, self.what.by_layer[layer]] = self._values(layer, x)
        return new

    def _values(self, layer: int, x: Activation) -> Float[Tensor, "*row_token head dim"]:
        if self.what.mode == "zero":
            return torch.zeros((), dtype=x.dtype, device=x.device)
        reading = self.model.reading
        rows = reading.rows
        seen = [self.known[_Setting.of(trunk.episode)][layer] for trunk in rows]
        if self.what.mode == "mean":
            return torch.stack([s.float().mean(0).to(x.dtype) for s in seen])[:, None]
        positions = reading.positions
        picks = [
            drawn(trunk.episode, len(s), int(positions.max()) + 1)[own]
            for trunk, s, own in zip(rows, seen, positions, strict=True)
        ]
        return torch.stack([s[torch.from_numpy(pick).to(s.device)] for s, pick in zip(seen, picks, strict=True)])

    def _read(self, setting: _Setting) -> Reference:
        episodes = [unroll(setting.game, _REFERENCE_SEED + i, setting.steps) for i in range(self.what.episodes)]
        seen: dict[int, list[tuple[int, Tensor]]] = {layer: [] for layer in self.what.by_layer}
        passed: dict[tuple[int, int], Tensor] = {}  # by layer and tree, for each node

        def look(layer: int, x: Activation) -> None:
            reading, own = self.model.reading, x[:, :, self.what.by_layer[layer]]
            for row, (tree, nodes) in enumerate(zip(reading.now.trees, reading.now.nodes, strict=True)):
                real = nodes >= 0
                if (layer, tree) not in passed:
                    passed[layer, tree] = own.new_zeros(len(reading.trunks[tree].tree), *own.shape[2:])
                passed[layer, tree][nodes[real]] = own[row, torch.from_numpy(real).to(own.device)]

        def done(reading: ForwardContext) -> None:
            for asked in reading.asked:
                path = torch.tensor(reading.path(asked), device=self.model.device)
                for layer in self.what.by_layer:
                    seen[layer].append((asked.prompt.episode.seed, passed[layer, asked.tree][path]))
            passed.clear()

        looks: list[tuple[Site, int, Edit]] = [("head", layer, partial(look, layer)) for layer in self.what.by_layer]
        with self.model.hooks(*looks, done=done):
            self._ask(episodes)
        # In the order of their seeds, not that of the batches.
        return {layer: torch.cat([x for _, x in sorted(parts, key=lambda p: p[0])]) for layer, parts in seen.items()}

    def _ask(self, episodes: Sequence[Episode]) -> None:
        """Ask the last question that fits into the model's context in all episodes."""
        last = len(episodes[0].steps) - 1
        while True:
            try:
                self.model.predict([Prompt(episode, last) for episode in episodes])
                return
            except ContextError as error:
                if last == 0:
                    raise AgentError(f"reference episodes do not fit into the context: {error}") from error
                last -= max(1, last // 8)


def drawn(episode: Episode, tokens: int, positions: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the index (below `tokens`) of the reference token that "resample" uses at each position of an episode."""
    u = np.random.default_rng([_REFERENCE_SEED, episode.seed]).random(positions)
    return (u * tokens).astype(np.int64)


class Intervened(Agent):
    """A language model with some heads ablated, as an agent with its own name.

    Args:
        model: the model; it is not changed, and still answers with all its heads when used directly.
        intervention: the heads and how they are ablated.

    Raises:
        SiteError: the model has no such layer or head, or its blocks cannot be found.
    """

    def __init__(self, model: LanguageModel, intervention: Intervention) -> None:
        intervention.check(model.sites)
        self.model, self.intervention = model, intervention
        self.name, self.batch_size = intervention.named(model.name), model.batch_size
        self._puts = _Puts(model, intervention)
        self.incomplete = model.incomplete
        self._reader: Agent = model

    def predict(self, prompts: Sequence[Prompt]) -> Sequence[Prediction]:
        with self.model.hooks(*self._puts.edits(prompts)):
            return self._reader.predict(prompts)

    def live(self) -> Agent:
        twin = Intervened(self.model, self.intervention)
        twin._puts, twin._reader = self._puts, self.model.live()
        return twin

    def warnings(self) -> tuple[str, ...]:
        return self.model.warnings()

    def episode_warnings(self, episode: Episode) -> str:
        return self.model.episode_warnings(episode)

    def describe(self) -> dict[str, Any]:
        of = {"of": self.model.name, **self.intervention.describe()}
        return self.model.describe() | {"name": self.name, "intervene": of}
