"""Record activations and attention while a model answers, live or replayed: shards on disk, and an index of them.

    with record(agent, "runs/heads", heads=[(3, 1)], at=["state", "action", "last"], attention=True):
        replay(agent, episodes)
    index, tensors = load("runs/heads")
    x = tensors(index.filter(site="head", layer=3, head=1, role="last"))  # [row, dim]

Memory stays flat: a pass keeps only the tokens asked for, and they go to disk in shards of bounded size.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextstate.agents.agent import Prompt
from nextstate.agents.branches import Asked, ForwardContext, Layout, Trunk
from nextstate.agents.language import LanguageModel
from nextstate.agents.sites import Activation, Edit, Site
from nextstate.analysis.attention import Look, attention_hooks
from nextstate.analysis.roles import ROLES, spans
from nextstate.envs.contrast import Span, piece_of, segments
from nextstate.envs.files import file_digest, write_atomic, write_json

ATTENTION = "attention"
INDEX: dict[str, Any] = {
    "game": pl.String, "setting": pl.String, "episode": pl.Int64, "step": pl.Int64, "question": pl.Int64,
    "role": pl.String, "position": pl.Int64, "site": pl.String, "layer": pl.Int64, "head": pl.Int64,
    "shard": pl.Int64, "row": pl.Int64,
}  # fmt: skip
_PENDING = 1_000_000  # rows of the index that wait at most
_OPEN = 4  # shards that a reader keeps open


class RecordError(ValueError):
    """A recording cannot be made or read; the message says what is possible."""


Place = int | str  # a position in the prompt (negative: from its end), or a role


class Kept(NamedTuple):
    """One tensor of a shard: a site in a layer, for sites with heads of one head."""

    site: str
    layer: int
    head: int | None

    @property
    def key(self) -> str:
        """The name of the tensor in a shard: "head.3.1", "resid_pre.0", "attention.3.1"."""
        return ".".join(str(part) for part in self if part is not None)


@dataclass
class _Pass:
    """The activations kept from one forward pass."""

    layout: Layout  # kept alive, so that its id stays its own
    look: Look
    nodes: list[tuple[int, int]]  # tree and node of each place
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Recorder:
    """Writes activations to a folder; created by `record`."""

    model: LanguageModel
    folder: Path
    kept: tuple[Kept, ...]
    at: tuple[Place, ...]
    where: Callable[[Prompt], Mapping[str, Span]]
    shard_bytes: int
    about: Mapping[str, Any]
    missing: dict[str, int] = field(default_factory=dict)  # number of questions without a role, by role
    digests: dict[str, str] = field(default_factory=dict)  # of the files that were written, by name
    _shards: int = 0
    _parts: int = 0
    _rows: list[dict[str, Tensor]] = field(default_factory=list)  # of the open shard: key -> [row, dim]
    _held: int = 0
    _length: int = 0
    _pending: list[tuple[Any, ...]] = field(default_factory=list)
    _known: WeakKeyDictionary[Trunk, dict[int, tuple[int, int]]] = field(default_factory=WeakKeyDictionary)
    _ahead: WeakKeyDictionary[Trunk, set[int]] = field(default_factory=WeakKeyDictionary)
    _reading: tuple[Trunk, ...] = ()
    _wanted: list[dict[int, list[int]]] = field(default_factory=list)  # of each tree: node -> path to it
    _found: list[list[tuple[str, int]]] = field(default_factory=list)  # of each question that is read
    _passes: dict[int, _Pass] = field(default_factory=dict)  # by the id of a pass's layout

    @property
    def held(self) -> int:
        """Bytes of activations currently in memory."""
        return self._held + sum(_bytes(x) for one in self._passes.values() for x in one.values.values())

    def hooks(self) -> ExitStack:
        """Record until the returned context is closed."""
        stack, edits = ExitStack(), list[tuple[Site, int, Edit]]()
        for site, layer in dict.fromkeys((k.site, k.layer) for k in self.kept):
            if site != ATTENTION:
                edits.append((site, layer, partial(self._take, site, layer)))  # type: ignore[arg-type]
        heads: dict[int, list[int]] = {}
        for _, layer, head in (k for k in self.kept if k.site == ATTENTION):
            assert head is not None
            heads.setdefault(layer, []).append(head)
        stack.enter_context(attention_hooks(self.model, heads, self._now, self._attend))
        stack.enter_context(self.model.hooks(*edits, done=self._done))
        return stack

    def _now(self) -> Look:
        """Return the tokens of this pass that are kept."""
        if self.model.forward.proving:
            return Look([], [], [], 0)
        reading = self.model.reading
        if self._reading is not reading.trunks:
            self._passes.clear()  # left over from a failed reading
            self._reading = reading.trunks
            self._choose(reading)
        if id(reading.now) not in self._passes:
            self._passes[id(reading.now)] = self._places_in(reading.now)
        return self._passes[id(reading.now)].look

    def _places_in(self, layout: Layout) -> _Pass:
        """Choose the tokens of a pass that questions ask for, or (live) that a later one will; each node once."""
        found: dict[tuple[int, int], tuple[int, int]] = {}
        for row, (tree, nodes) in enumerate(zip(layout.trees, layout.nodes, strict=True)):
            for token in np.flatnonzero(np.isin(nodes, list(self._wanted[tree]))).tolist():
                found.setdefault((tree, int(nodes[token])), (row, token))
        columns = [layout.columns(row, self._wanted[tree][node]) for (tree, node), (row, _) in found.items()]
        look = Look([r for r, _ in found.values()], [t for _, t in found.values()], columns, layout.total)
        return _Pass(layout, look, list(found))

    def _choose(self, reading: ForwardContext) -> None:
        """Choose the nodes that the questions ask for, or (live) that a later one will."""
        self._found, self._wanted = [], [{} for _ in reading.trunks]
        for asked in reading.asked:
            trunk, path = reading.trunks[asked.tree], reading.path(asked)
            self._found.append(self._places(asked.prompt, len(path)))
            wanted = {p for _, p in self._found[-1]}
            if reading.live:
                if trunk not in self._ahead:
                    self._ahead[trunk] = self._later(trunk)
                wanted |= self._ahead[trunk]
                # A true answer of several tokens begins on a branch; the transcript continues from there.
                answer = asked.prompt.asked.choices[asked.prompt.asked.truth]
                path = path + trunk.tree.follow(path[-1], self.model.encoder.piece(answer))
            for position in wanted:
                if position < len(path) and path[position] >= reading.before[asked.tree]:
                    self._wanted[asked.tree].setdefault(path[position], path[: position + 1])

    def _later(self, trunk: Trunk) -> set[int]:
        """Return the positions to keep for questions of an episode that are in the text before the question."""
        out, episode, encode = set[int](), trunk.episode, self.model.encoder
        for t, step in enumerate(episode.steps):
            for q in range(len(step.questions)):
                parts = segments(episode, t, q)
                before = piece_of(episode, t, "narration") + 1
                lengths = [len(encode.opening(parts[0])), *(len(encode.piece(p)) for p in parts[1:])]
                found = self._places(Prompt(episode, t, q), sum(lengths))
                out |= {p for _, p in found if p < sum(lengths[:before])}
        return out

    def _places(self, prompt: Prompt, length: int) -> list[tuple[str, int]]:
        """Return the role (or the given number) and the position of each token to keep of a prompt."""
        spans_of = self.where(prompt) if any(isinstance(p, str) and p != "last" for p in self.at) else {}
        out = []
        for place in self.at:
            if isinstance(place, int):
                if -length <= place < length:
                    out.append((str(place), place % length))
            elif place == "last":
                out.append((place, length - 1))
            elif place in spans_of:
                out.append((place, self.model.encoder.locate(segments(*prompt), spans_of[place])))
        return out

    def _take(self, site: str, layer: int, x: Activation) -> None:
        look = self._now()
        if not look.rows:
            return
        kept = [k for k in self.kept if (k.site, k.layer) == (site, layer)]
        own = x[look.rows, look.tokens][:, [k.head or 0 for k in kept]].cpu()
        self._keep({k.key: one.contiguous() for k, one in zip(kept, own.unbind(1), strict=True)})

    def _keep(self, values: dict[str, Tensor]) -> None:
        self._passes[id(self.model.reading.now)].values.update(values)

    def _attend(self, layer: int, weights: Float[Tensor, "place head position"]) -> None:
        kept = [k for k in self.kept if (k.site, k.layer) == (ATTENTION, layer)]
        self._keep({k.key: x.contiguous() for k, x in zip(kept, weights.cpu().unbind(1), strict=True)})

    def _done(self, reading: ForwardContext) -> None:
        """Store the activations of successful passes, each node once."""
        if self._reading is not reading.trunks:
            return
        done = [self._passes[id(layout)] for layout in reading.passes if id(layout) in self._passes]
        places, parts, seen = list[tuple[int, int]](), dict[str, list[Tensor]](), set[tuple[int, int]]()
        for one in done:
            fresh = [i for i, place in enumerate(one.nodes) if place not in seen]
            places += [one.nodes[i] for i in fresh]
            seen.update(one.nodes)
            for key, x in one.values.items():
                parts.setdefault(key, []).append(x[fresh])
        values = {key: _together(xs) for key, xs in parts.items()} if places else {}
        self._passes, self._reading = {}, ()
        begin, n = 0, len(places)
        each = sum(_bytes(x) for x in values.values()) // max(1, n)
        while begin < n:
            room = max(1, (self.shard_bytes - self._held) // max(1, each))
            if self._held and self._held + each > self.shard_bytes:
                self.flush()
                continue
            end = min(n, begin + room)
            part = {key: x[begin:end].clone() for key, x in values.items()}
            for i in range(begin, end):
                tree, node = places[i]
                self._known.setdefault(reading.trunks[tree], {})[node] = (self._shards, self._length + i - begin)
            self._rows.append(part)
            self._length += end - begin
            self._held += sum(_bytes(x) for x in part.values())
            begin = end
        for asked, found in zip(reading.asked, self._found, strict=True):
            self._note(reading, asked, found)
        if len(self._pending) * len(self.kept) >= _PENDING:
            self.flush()

    def _note(self, reading: ForwardContext, asked: Asked, found: Sequence[tuple[str, int]]) -> None:
        path, prompt, game = reading.path(asked), asked.prompt, asked.prompt.episode.game
        known = self._known.get(reading.trunks[asked.tree], {})
        setting = json.dumps(game.settings, sort_keys=True)
        who = (game.name, setting, prompt.episode.seed, prompt.step + 1, prompt.question)
        kept = [(name, position) for name, position in found if path[position] in known]
        self._pending.extend((*who, name, position, *known[path[position]]) for name, position in kept)
        for name in {str(p) for p in self.at} - {name for name, _ in kept}:
            self.missing[name] = self.missing.get(name, 0) + 1

    def flush(self) -> None:
        """Write the open shard, and then the pending part of the index."""
        if self._rows:
            tensors = {k.key: _together([part[k.key] for part in self._rows]) for k in self.kept}
            self._write(f"{self._shards:05d}.safetensors", lambda path: save_file(tensors, path))
            self._shards, self._rows, self._held, self._length = self._shards + 1, [], 0, 0
        if self._pending:
            names = [name for name in INDEX if name not in ("site", "layer", "head")]
            places = pl.DataFrame(self._pending, schema={n: INDEX[n] for n in names}, orient="row")
            which = pl.DataFrame(self.kept, schema={n: INDEX[n] for n in ("site", "layer", "head")}, orient="row")
            index = places.join(which, how="cross").select(*INDEX)
            self._write(f"index-{self._parts:05d}.parquet", index.write_parquet)
            self._parts, self._pending = self._parts + 1, []
        self.save()

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        self.digests[name] = file_digest(write_atomic(self.folder / name, write))

    def save(self, finished: bool = False) -> None:
        """Write `record.json`, with a digest of each file; files that it does not name are never read."""
        counts = {"shards": self._shards, "missing": self.missing}
        write_json(self.folder / "record.json", {**self.about, "finished": finished, **counts, "digests": self.digests})


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _together(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate rows; shorter ones (attention over fewer tokens) are padded with zeros."""
    width = max(x.shape[1] for x in parts)
    return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in parts])


@contextmanager
def record(
    model: LanguageModel,
    folder: Path | str,
    *,
    sites: Sequence[Site] = ("head",),
    layers: Sequence[int] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    at: Sequence[Place] = ("last",),
    attention: bool = False,
    where: Callable[[Prompt], Mapping[str, Span]] = spans,
    shard_bytes: int = 64 << 20,
) -> Iterator[Recorder]:
    """Record activations of `model` while it answers within this context, live or replayed.

    Args:
        model: the model that answers, directly or as an `Intervened` agent (heads are recorded before intervention).
        folder: folder to create, with shards `00000.safetensors`, the index in `index-00000.parquet` and so on, and
            `record.json`.
        sites: sites to keep.
        layers: layers of the sites without heads, and of `head` if `heads` is not given; by default all.
        heads: (layer, head) of each head to keep, for the site `head` and for attention; by default all of `layers`.
        at: positions to keep in each question's prompt: "last" (the answering token, where the answer is predicted),
            "state", "action" or another role that `where` returns, or a position (negative: from the end). A question
            without a role has no row for it; `record.json` counts these.
        attention: also keep the attention weights of these heads at these positions, a probability for each position
            up to the token's own. They are computed from the model's queries and keys for these heads and positions
            only (with eager attention, they are the model's own weights).
        where: returns the roles of a prompt, as spans of its segments.
        shard_bytes: bound on the activations held in memory, and therefore on a shard. (At least one position fits.)

    Raises:
        RecordError: the folder is not empty, or nothing is selected.
        SiteError: the model has no such site, layer or head.
    """
    folder = Path(folder)
    known = model.sites
    for site in sites:
        known.check(site)
        for layer in layers or ():
            known.check(site, layer)
    for layer, head in heads or ():
        known.check("head", layer, head)
    each = list(heads or ())
    if heads is None and ("head" in sites or attention):
        known.check("head")
        own = known.layers_with("head") if layers is None else layers
        each = [(a, b) for a in own for b in range(known.shape("head", a)[0])]
    kept = [Kept("head", a, b) for a, b in each if "head" in sites]
    for site in sites:
        if site != "head":
            kept += [Kept(site, layer, None) for layer in (known.layers_with(site) if layers is None else layers)]
    kept += [Kept(ATTENTION, a, b) for a, b in each if attention]
    if not kept or not at or shard_bytes < 1:
        raise RecordError(f"nothing to record: sites={tuple(sites)}, at={tuple(at)}, shard_bytes={shard_bytes}")
    unknown = [place for place in at if isinstance(place, str) and place not in ROLES]
    if where is spans and unknown:
        raise RecordError(f"at={unknown[0]!r} is not possible: expected one of {', '.join(ROLES)}, or a position")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecordError(f"{folder} is there already: give another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    kept, places = list(dict.fromkeys(kept)), tuple(dict.fromkeys(at))
    about = {"model": model.describe(), "at": list(places), "kept": [k.key for k in kept]}
    recorder = Recorder(model, folder, tuple(kept), places, where, shard_bytes, about)
    recorder.save()
    with recorder.hooks():
        yield recorder
    recorder.flush()
    recorder.save(finished=True)


# --- reading back


@dataclass(frozen=True)
class Shards:
    """The shards of a recording, read lazily."""

    folder: Path
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    _open: OrderedDict[int, Any] = field(default_factory=OrderedDict, repr=False, compare=False)

    def __call__(self, rows: pl.DataFrame) -> Float[Tensor, "row dim"]:
        """Return the tensors of rows of the index, in their order; all must have the same width.

        Attention has a probability for each position; positions after the token itself are 0.
        """
        if rows.is_empty():
            raise RecordError("no rows of the index were given: nothing to read")
        out: list[Tensor | None] = [None] * len(rows)
        numbered = rows.select("site", "layer", "head", "shard", "row").with_row_index("at")
        for (site, layer, head, shard), part in numbered.group_by("site", "layer", "head", "shard"):
            found = self._tensor(int(shard), Kept(site, layer, head).key)
            for at, row in part.select("at", "row").iter_rows():
                out[at] = found[row]
        width = max(len(x) for x in out if x is not None)
        if rows["site"].n_unique() > 1 and len({len(x) for x in out if x is not None}) > 1:
            raise RecordError(f"sites {sorted(set(rows['site']))} have different widths: read them one by one")
        return torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in out if x is not None])

    def _tensor(self, shard: int, key: str) -> Tensor:
        if shard not in self._open:
            path = self.folder / f"{shard:05d}.safetensors"
            check_file(path, self.digests)
            self._open[shard] = safe_open(path, framework="pt")
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        found: Tensor = self._open[shard].get_tensor(key)
        return found


def load(folder: Path | str) -> tuple[pl.DataFrame, Shards]:
    """Open a recording; return its index and its tensors, which are read when rows of the index are requested.

    The index has one row for each question, position and tensor: game, setting (JSON), episode, step (from 1, as in
    the rows of a run), question, role, position in the prompt, site, layer, head, and the shard and row where it is. An
    interrupted recording can be read up to the last complete part.

    Raises:
        RecordError: there is none in `folder`, or a file of it is missing or damaged. Shards are checked when they are
            read for the first time.
    """
    folder = Path(folder)
    if not (folder / "record.json").is_file():
        raise RecordError(f"{folder} has no recording: expected a folder written by `record`")
    try:
        digests: dict[str, str] = json.loads((folder / "record.json").read_text(encoding="utf-8"))["digests"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{folder / 'record.json'} cannot be read: record again") from error
    parts = []
    for name in sorted(name for name in digests if name.startswith("index-")):
        check_file(folder / name, digests)
        parts.append(pl.read_parquet(folder / name))
    return pl.concat(parts) if parts else pl.DataFrame(schema=INDEX), Shards(folder, digests)


def check_file(path: Path, digests: Mapping[str, str]) -> None:
    """Raise `RecordError` if a file of a recording is missing or damaged."""
    if not path.is_file():
        raise RecordError(f"{path} is missing: record again")
    if file_digest(path) != digests.get(path.name):
        raise RecordError(f"{path} is damaged: its content does not match its digest: record again")
