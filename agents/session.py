"""Live sessions of a language model: keys and values are cached, so that each step only computes its new tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nextstate.agents.agent import WRITTEN, Agent, AgentError, OutOfMemory, Prediction, Prompt
from nextstate.agents.branches import Branch, Trunk, size_of
from nextstate.agents.forward import Memory, Road, Want, out_of_memory
from nextstate.agents.scoring import in_order
from nextstate.envs.game import Episode

if TYPE_CHECKING:
    from nextstate.agents.language import LanguageModel


class Session(Agent):
    """A language model that reads episodes step by step and caches keys and values between steps.

    The first call sets the episodes; later calls continue some of them. If the course of an episode depends on the
    answers, each call gets a new episode object with the same seed and opening, in which the actual steps replace the
    last step of the previous object. It replaces the previous episode; branches of the replaced step are dropped, and
    so are episodes without prompts in the call.

    Answers to questions without choices are generated greedily, up to the end of the line or 32 tokens.

    Raises:
        AgentError: an episode does not belong to this session, a question was already answered, or a forward pass
            failed.
        OutOfMemory: the episodes need more memory than is available.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.name = model, model.name
        self.trunks: dict[int, Trunk] = {}  # by the id of its episode, which the trunk keeps alive
        self.memory: Memory | None = None  # of these trunks, in their order

    def predict(self, prompts: Sequence[Prompt]) -> Sequence[Prediction]:
        if not prompts:
            return []
        self._go_on([p.episode for p in prompts])
        unknown = {id(p.episode) for p in prompts} - self.trunks.keys()
        if unknown and self.trunks:
            raise AgentError(f"this session reads {len(self.trunks)} episodes; start a new session for other episodes")
        self.trunks, planted = self.model.add_question(prompts, self.trunks)
        asked = [(r, i, q) for r, key in enumerate(self.trunks) for i, q in planted.get(key, [])]
        if self.memory is not None and any(q.node < self.memory.read[row] for row, _, q in asked):
            raise AgentError("this session has already answered that question; pass the episode with its next step")
        with self._guarded():
            if all(p.asked.choices for p in prompts):
                trunks, (road, memory) = list(self.trunks.values()), self._road()
                found = self.model.score(road, trunks, asked, prompts, memory)()
                return in_order([([i for _, i, _ in asked], found)], [p.asked for p in prompts])
            return self._write(asked, prompts)

    def _road(self) -> tuple[Road, Memory]:
        """Return how the model is run, verified for the current size of the trees, and the cache."""
        road = self.model.forward.require(*size_of(self.trunks.values()), live=True)
        if self.memory is None or self.memory.road != road:  # a longer text may need another road: read it anew
            self.memory = Memory.of(road, len(self.trunks))
        return road, self.memory

    def _write(self, asked: Sequence[tuple[int, int, Branch]], prompts: Sequence[Prompt]) -> list[Prediction]:
        tokenizer, trees = self.model.tokenizer, [t.tree for t in self.trunks.values()]
        written: dict[int, list[int]] = {i: [] for _, i, _ in asked}
        lines = dict.fromkeys(written, "")
        lengths = {i: trees[row].depths[q.node] + 1 for row, i, q in asked}
        while asked:
            trunks, (road, memory) = list(self.trunks.values()), self._road()
            wants = [Want(row, q.node) for row, _, q in asked]
            scores = self.model.read(road, trunks, wants, asked, prompts, memory)()
            going = []
            for (row, i, q), token in zip(asked, scores.argmax.tolist(), strict=True):
                if token != tokenizer.eos_token_id:
                    written[i].append(token)
                    lines[i] = tokenizer.decode(written[i])
                    if "\n" not in lines[i] and len(written[i]) < WRITTEN:
                        going.append((row, i, q._replace(node=trees[row].grow(q.node, (token,)))))
            asked = going
        answers = [lines[i].partition("\n")[0].strip() for i in range(len(prompts))]
        return [Prediction(answer, -1, -1, -1, -1, (), lengths[i]) for i, answer in enumerate(answers)]

    def _go_on(self, episodes: Sequence[Episode]) -> None:
        """Replace episodes by the episodes that continue them."""
        known = {(t.episode.seed, t.episode.opening): key for key, t in self.trunks.items()}
        new = {known.get((e.seed, e.opening)): e for e in episodes if id(e) not in self.trunks}
        new = {key: e for key, e in new.items() if key is not None and self.trunks[key].leads_to(e)}
        if not new:
            return
        asked = {id(e) for e in episodes}
        rows = [row for row, key in enumerate(self.trunks) if key in new or key in asked]
        trunks = {}
        for key, trunk in self.trunks.items():
            if key in new:
                trunk.go_on(new[key])
            if key in new or key in asked:
                trunks[id(trunk.episode)] = trunk
        self.trunks = trunks
        if self.memory is not None:
            self.memory.keep(rows, [len(t.tree) for t in trunks.values()])

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Convert exceptions of a forward pass to `AgentError`."""
        try:
            yield
        except AgentError:
            raise
        except (RuntimeError, MemoryError) as error:
            most = max((len(t.tree) for t in self.trunks.values()), default=0)
            where = f"on {self.model.device}, with {len(self.trunks)} parallel episodes of {most:,} tokens"
            if out_of_memory(error):
                raise OutOfMemory(f"{self.name} runs out of memory {where}") from error
            raise AgentError(f"{self.name} failed {where}: {error}") from error
