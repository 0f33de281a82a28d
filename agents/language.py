"""Causal Hugging Face models as agents: one forward pass scores all questions of all steps of an episode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch

from nextstate.agents import flex
from nextstate.agents.agent import (
    WRITTEN,
    Agent,
    AgentError,
    ContextError,
    OutOfMemory,
    Prediction,
    Predictions,
    Prompt,
)
from nextstate.agents.branches import Asked, Branch, ForwardContext, Trunk, size_of
from nextstate.agents.certificate import Certificate, certify
from nextstate.agents.checkpoints import Fit
from nextstate.agents.forward import Forward, Memory, Road, Scores, Want, context_of, out_of_memory
from nextstate.agents.identity import files_digest, trained_on
from nextstate.agents.loading import DeviceMap, Loaded, Loading, Quantization, device_of, load
from nextstate.agents.loading import default_device as default_device
from nextstate.agents.scoring import Queries, in_order
from nextstate.agents.sites import Edit, ModuleMap, Site, Sites
from nextstate.agents.text import Encoder, TokenizerError
from nextstate.envs.contrast import segments
from nextstate.envs.game import Episode


class LanguageModel(Agent):
    """A causal language model.

    Args:
        name: a built-in model ("nextstate/tiny"), a folder written by `save_pretrained`, or a name on the hub.
        device: "cpu", "cuda" or "mps"; by default the fastest that is available.
        device_map: placement of the model on several devices, passed to transformers ("auto", or a device for each
            module); cannot be combined with `device`.
        dtype: "float32", "bfloat16" or "float16"; by default float32 on the CPU, and the checkpoint's dtype on a GPU.
        quantization: "4bit" or "8bit", with bitsandbytes on a GPU.
        attn_implementation: "sdpa", "eager", "nextstate_flex" (`nextstate.agents.flex`) or another one of transformers.
            By default sdpa if the model supports it, and on a GPU nextstate_flex where it works.
        revision: branch, tag or commit on the hub.
        allow_incomplete: load the checkpoint even if tensors are missing (these are random) or superfluous.
        bos: whether transcripts begin with the beginning-of-sequence token; by default as the tokenizer does.
        modules: names of the model's modules, see `nextstate.agents.sites.ModuleMap`; by default found automatically.
        batch_size: maximum number of episodes in one forward pass; by default 64, and 1,024 on a GPU.
        batch_tokens: maximum number of tokens in one forward pass, including padding; a longer episode is read alone.
            By default 8,192, and on a GPU what fits into its free memory. Batches are halved if memory runs out.
        loaded: a model and its tokenizer, instead of loading them by name.

    Raises:
        AgentError: the model does not exist or cannot be used. Weights are read from safetensors only, and code that
            comes with a model is never run.
        SiteError: a module named in `modules` does not exist, or does not have the role it is named for.
    """

    kind = "model"

    def __init__(
        self,
        name: str,
        *,
        device: str | None = None,
        device_map: DeviceMap | None = None,
        dtype: str | None = None,
        quantization: Quantization | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        allow_incomplete: bool = False,
        bos: bool | None = None,
        modules: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        loaded: tuple[Any, Any] | None = None,
    ) -> None:
        self.name = name
        self._by_name = loaded is None
        if loaded is None:
            how = Loading(device, device_map, dtype, quantization, attn_implementation, revision, allow_incomplete)
            found = load(name, how)
        else:
            found = Loaded(*loaded, device_of(loaded[0]))
        self.model, self.tokenizer, self.device = found.model, found.tokenizer, found.device
        self.fit: Fit = found.fit
        self.commit = found.commit
        self.incomplete = found.incomplete
        self.quantization = quantization
        self._names = None if modules is None else ModuleMap(**modules)
        self.encoder = _encoder(name, self.tokenizer, bos)
        self.batch_size = batch_size or (1024 if self.device.type == "cuda" else 64)
        self.batch_tokens = batch_tokens or _tokens_of(self.model, self.device)
        self.context = context_of(self.model.config)
        pad = int(self.tokenizer.pad_token_id or 0)
        self.pad = pad if pad < len(self.model.get_input_embeddings().weight) else 0  # padding has no effect
        self.forward = Forward(self.model, name, certify, self.pad, self.batch_tokens)
        self._texts: dict[int, str] = {}  # of single tokens
        if self.device.type == "cuda" and self._by_name and attn_implementation is None and flex.use(self.model):
            self.forward.require(1, 1)  # a first proof now, so that `warnings` can say where it does not work
        self._done: list[Callable[[ForwardContext], None]] = []
        if self._names is not None:
            self.sites.check("resid_pre")  # wrong names raise here, not at the first use

    @cached_property
    def traced(self) -> Any:
        """The model wrapped by nnsight, to read and write activations with `with agent.traced.trace(...)`."""
        from nnsight import TransformersModel

        return TransformersModel(self.model, tokenizer=self.tokenizer)

    @cached_property
    def sites(self) -> Sites:
        """The places where activations can be read and written: found automatically, or given by `modules`."""
        return Sites.of(self.model, self._names)

    @cached_property
    def _hash(self) -> str | None:
        return files_digest(self.name, self.commit) if self._by_name else None  # read once: files may be large

    @contextmanager
    def hooks(
        self, *edits: tuple[Site, int, Edit], done: Callable[[ForwardContext], None] | None = None
    ) -> Iterator[Self]:
        """Read and write activations while this agent answers, live or in replay; both give the same numbers.

        Args:
            edits: tuples of site, layer (from 0) and a function. In each forward pass the function gets the activation,
                a `Float[Tensor, "row token head dim"]`, and returns its replacement, or None to leave it unchanged. It
                must not change the activation in place. `reading` describes the rows and tokens. An edit at a token
                affects everything after it, including later questions of the episode. If a model cannot read a tree in
                one pass, a token of the transcript is computed in several rows or passes: treat all of them alike.
            done: called after each successful forward pass (one that runs out of memory is repeated in parts).

        Raises:
            SiteError: the model has no such site or layer, or its blocks cannot be found.
        """

        def unless_proving(edit: Edit) -> Edit:
            return lambda x: None if self.forward.proving else edit(x)

        with ExitStack() as stack:
            self.forward.hooked += 1
            stack.callback(setattr, self.forward, "hooked", self.forward.hooked - 1)
            for site, layer, edit in edits:
                stack.enter_context(self.sites.hook(site, layer, unless_proving(edit)))
            if done is not None:
                self._done.append(done)
                stack.callback(self._done.remove, done)
            yield self

    @property
    def reading(self) -> ForwardContext:
        """The context of the running forward pass, for use in hooks; raises `AgentError` if none is running."""
        if self.forward.reading is None:
            raise AgentError(f"{self.name} runs no forward pass now: use `reading` inside a hook of `hooks` only")
        return self.forward.reading

    @property
    def certificate(self) -> Certificate | None:
        """The certificate of how this model is run (of replay, if there is one); None before the first answer."""
        found = self.forward.certificates
        return found.get(False) or found.get(True)

    def describe(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "name": self.name,
            "kind": self.kind,
            "architecture": config.architectures[0] if config.architectures else type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.device),
            "quantization": self.quantization,
            "attention": getattr(config, "_attn_implementation", None),
            "context": self.context,
            "certificates": [c.describe() for c in self.forward.certificates.values()],
            "bos": bool(self.encoder.bos),
            "revision": self.commit,
            "hash": self._hash,
            "trained": trained_on(self.name),
            "incomplete": self.incomplete,
            "ignored_weights": self.fit.describe(),
        }

    def warnings(self) -> tuple[str, ...]:
        found = []
        if self.incomplete:
            found.append(
                f"{self.name} was loaded from an incomplete checkpoint ({self.incomplete}); its results do not "
                "represent the model of that name"
            )
        if self.encoder.differs:
            found.append(f"{self.name} {self.encoder.differs}")
        if self.forward.fallback:
            found.append(self.forward.fallback)
        return tuple(found)

    def episode_warnings(self, episode: Episode) -> str:
        found = list(self.warnings())
        if not self.encoder.natural(segments(episode)):
            found.append(
                f"{self.name} tokenizes a transcript as a whole differently from its pieces; it was evaluated on the "
                "tokens of the pieces"
            )
        return "\n".join(found)

    def predict(self, prompts: Sequence[Prompt]) -> Sequence[Prediction]:
        questions = [p.asked for p in prompts]
        if not all(q.choices for q in questions):  # free-form answers are generated token by token
            return self.live().predict(prompts)
        trunks, planted = self.add_question(prompts)
        found: list[tuple[Sequence[int], Predictions]] = []
        if trunks:
            road = self._road(trunks)
            launched = (
                batch
                for episodes in self._batches(trunks, road)
                for batch in self._halving(road, trunks, planted, episodes, prompts)
            )
            # A batch is read when the next one has been launched, so that a GPU computes while the host prepares.
            before: tuple[list[int], Callable[[], Predictions]] | None = None
            for batch in launched:
                if before is not None:
                    found.append((before[0], before[1]()))
                before = batch
            if before is not None:
                found.append((before[0], before[1]()))
        return in_order(found, questions)

    def live(self) -> Agent:
        from nextstate.agents.session import Session  # `session` imports this module

        return Session(self)

    def add_question(
        self, prompts: Sequence[Prompt], trunks: dict[int, Trunk] | None = None
    ) -> tuple[dict[int, Trunk], dict[int, list[tuple[int, Branch]]]]:
        """Build one tree for each episode (keyed by its `id`) with all its prompts; prompts come with their index."""
        trunks = {} if trunks is None else trunks
        planted: dict[int, list[tuple[int, Branch]]] = {}
        for i, (episode, step, question) in enumerate(prompts):
            key = id(episode)
            trunk, own = trunks.get(key), planted.get(key)
            if trunk is None:
                trunk = trunks[key] = Trunk(self.encoder, episode)
            if own is None:
                own = planted[key] = []
            own.append((i, trunk.add_question(step, question)))
        self._check_context(prompts, trunks, planted)
        return trunks, planted

    def _check_context(
        self, prompts: Sequence[Prompt], trunks: dict[int, Trunk], planted: dict[int, list[tuple[int, Branch]]]
    ) -> None:
        if self.context is None:
            return
        long: dict[int, int] = {}
        for key, questions in planted.items():
            depths = trunks[key].tree.depths
            if max(depths) + WRITTEN < self.context:
                continue
            for i, q in questions:
                tokens = 1 + (max(depths[n] for n in q.nodes) if len(q.cloze.at) else depths[q.node] + WRITTEN)
                if tokens > self.context:
                    long[i] = tokens
        if long:
            steps = sorted({prompts[i].step + 1 for i in long})
            game = prompts[min(long)].episode.game
            raise ContextError(
                f"{len(long)} of {len(prompts)} prompts of {game.name} {game.settings}, from step {steps[0]} on, are "
                f"too long for {self.name}: up to {max(long.values()):,} tokens, but it reads {self.context:,} "
                f"({max(long.values()) - self.context:,} too many); ask for fewer steps or a smaller {game.size}",
                tuple(sorted(long)),
            )

    def _road(self, trunks: dict[int, Trunk]) -> Road:
        """Return how the model is run, verified for the largest tree and, where trees share a row, for whole rows."""
        while True:
            batches = self._batches(trunks, "tree") if self.forward.in_one_row else ()
            row = max((sum(len(trunks[k].tree) for k in episodes) for episodes in batches), default=0)
            try:
                return self.forward.require(*size_of(trunks.values()), row=row)
            except OutOfMemory:
                if row <= max(len(t.tree) for t in trunks.values()):
                    raise
                self.batch_tokens = row // 2

    def _batches(self, trunks: dict[int, Trunk], road: Road) -> Iterator[list[int]]:
        """Yield batches of episodes of similar length, within the batch limits; only trees share a forward pass."""
        batch, longest, total = list[int](), 0, 0
        for key in sorted(trunks, key=lambda k: len(trunks[k].tree), reverse=True):
            length = len(trunks[key].tree)
            tokens = total + length if self.forward.in_one_row else max(longest, length) * (len(batch) + 1)
            full = road == "tree" and tokens > self.batch_tokens
            if batch and (len(batch) == self.batch_size or full):
                yield batch
                batch, longest, total = [], 0, 0
            batch.append(key)
            longest, total = max(longest, length), total + length
        if batch:
            yield batch

    def _halving(
        self,
        road: Road,
        trunks: dict[int, Trunk],
        planted: dict[int, list[tuple[int, Branch]]],
        episodes: list[int],
        prompts: Sequence[Prompt],
    ) -> Iterator[tuple[list[int], Callable[[], Predictions]]]:
        """Yield the indices of prompts and what returns their predictions, for all of the episodes or each half."""
        asked = [(r, i, q) for r, k in enumerate(episodes) for i, q in planted[k]]
        try:
            found = self.score(road, [trunks[k] for k in episodes], asked, prompts)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not out_of_memory(error):
                raise
            if len(episodes) == 1:
                n = len(trunks[episodes[0]].tree)
                raise AgentError(
                    f"{self.name} runs out of memory on one episode of {n:,} tokens on {self.device}"
                ) from error
        else:
            yield [i for _, i, _ in asked], found
            return
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch_size = max(1, len(episodes) // 2)
        for half in (episodes[: self.batch_size], episodes[self.batch_size :]):
            yield from self._halving(road, trunks, planted, half, prompts)

    def score(
        self,
        road: Road,
        trunks: Sequence[Trunk],
        asked: Sequence[tuple[int, int, Branch]],
        prompts: Sequence[Prompt],
        memory: Memory | None = None,
    ) -> Callable[[], Predictions]:
        """Read transcripts; return what gives the predictions for questions with choices, in the order of `asked`.

        Args:
            road: how the model is run.
            trunks: the transcripts with their questions as branches.
            asked: index of the transcript, index of the prompt, and the question's branch in the tree.
            prompts: all prompts.
            memory: cached state of earlier calls; updated in place.
        """
        queries = Queries.of([tree for tree, _, _ in asked], [q for _, _, q in asked])
        scores = self.read(road, trunks, queries.wanted, asked, prompts, memory)
        questions = [prompts[i].asked for _, i, _ in asked]
        lengths = np.array([trunks[tree].tree.depths[q.node] + 1 for tree, _, q in asked], dtype=np.int64)
        return lambda: queries.predictions(questions, scores(), self._text_of, lengths)

    def _text_of(self, token: int) -> str:
        found = self._texts.get(token)
        if found is None:
            found = self._texts[token] = self.tokenizer.decode([token]).strip()
        return found

    def read(
        self,
        road: Road,
        trunks: Sequence[Trunk],
        wants: Sequence[Want],
        asked: Sequence[tuple[int, int, Branch]],
        prompts: Sequence[Prompt],
        memory: Memory | None = None,
    ) -> Callable[[], Scores]:
        """Read transcripts by `Forward.scores`, with the context set that hooks can query."""
        questions = tuple([Asked(tree, q.node, prompts[i]) for tree, i, q in asked])
        before = (0,) * len(trunks) if memory is None else tuple(memory.read)
        reading = ForwardContext(tuple(trunks), questions, before, memory is not None)
        trees, spines = [t.tree for t in trunks], [t.end for t in trunks]
        scores = self.forward.scores(road, trees, spines, wants, reading, memory)
        finished, self.forward.finished = self.forward.finished, None
        if self._done:  # called for what was read without an error
            found = scores()
            scores = lambda: found  # noqa: E731
        for done in self._done:
            assert finished is not None
            done(finished)
        return scores


def _tokens_of(model: Any, device: torch.device) -> int:
    """Return how many tokens a pass may have: on an NVIDIA GPU those that take up to half of the memory that is free.

    More than 131,072 are not faster, and with fewer than 8,192 batches are halved where they do not fit.
    """
    if device.type != "cuda":
        return 8192 if device.type == "cpu" else 65536
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    config, size = model.config.get_text_config(), model.dtype.itemsize
    width = int(getattr(config, "hidden_size", 4096))
    inner = max([4 * width, *(getattr(config, key, None) or 0 for key in ("intermediate_size", "n_inner", "ffn_dim"))])
    # Activations of one layer, and logits in a copy or two at every fourth token.
    token = size * (12 * width + 4 * inner + model.get_input_embeddings().weight.shape[0] // 2)
    return int(min(max(free // (2 * token), 8192), 131_072))


def _encoder(name: str, tokenizer: Any, bos: bool | None) -> Encoder:
    try:
        return Encoder(tokenizer, bos)
    except TokenizerError as error:
        raise AgentError(f"{name} cannot be used: {error}") from error
