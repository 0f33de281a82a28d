"""Activation patching on minimal pairs: exact sweeps over heads, residual stream, attention and MLP outputs.

`sweep` patches every head (or layer) of a model at chosen positions, one at a time and exactly; `attribution` estimates
the same from one gradient. Both return a `Sweep`, which `nextstate.analysis.heads.recovery` turns into recoveries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nextstate.agents.forward import out_of_memory
from nextstate.agents.language import LanguageModel
from nextstate.agents.sites import ATTENTIONS, Activation, Site
from nextstate.analysis.heads.copies import Copy, Values
from nextstate.analysis.heads.pairs import DIRECTIONS, PATCHES, Direction, Group, PatchError, TokenPair, plan, tokens_of
from nextstate.analysis.heads.recovery import Readout, Recovery, Sweep, rank_agreement, read, recovery
from nextstate.analysis.heads.sweep import PASS_TOKENS, Runs, effective, passes, run_copies, run_pairs, site_values

__all__ = [
    "DIRECTIONS", "Direction", "PatchError", "Readout", "Recovery", "Sweep", "TokenPair", "attribution",
    "rank_agreement", "recovery", "sweep", "tokens_of",
]  # fmt: skip

Failures = Literal["exclude", "include"]
Donor = Callable[[Group], Values]  # what is patched into the pairs of a group


class _Results(NamedTuple):
    """Intermediate results of a sweep, for all pairs."""

    base: Readout
    source: Readout
    patched: Readout
    control: Float[np.ndarray, "pair layer head column"] | None
    kept: Bool[np.ndarray, " pair"]


def sweep(
    model: LanguageModel,
    pairs: Sequence[TokenPair],
    *,
    site: Site = "head",
    positions: str | Sequence[str] = "last",
    direction: Direction = "denoise",
    layers: Sequence[int] | None = None,
    failures: Failures = "exclude",
    controls: bool = False,
    vocabulary: bool = True,
    max_bytes: int | None = None,
    rng: np.random.Generator | None = None,
) -> Sweep:
    """Patch each head (or layer) at each position asked for, one at a time, exactly.

    Args:
        model: a language model that has the site.
        pairs: the prompts; pairs of equal length and positions share forward passes.
        site: `head`, `resid_pre`, `attn_out` or `mlp_out`.
        positions: a role, several roles, "each" position from the first difference on, one at a time, or "all" of them
            at once. (Before the first difference both runs are equal, so patches have no effect there. Ablations have:
            for them "all" begins at the first token, and "each" at the earliest difference of any pair.)
        direction: "denoise" patches clean activations into the corrupted run, "noise" the reverse. The others ablate
            in the clean run: "zero" with zeros, "mean" with the mean over the clean prompts of all pairs, "resample"
            with the activations of another pair; the corrupted run is then only used for scaling.
        layers: layers to sweep, by default all that have the site; they must have equal numbers of heads.
        failures: whether to "exclude" or "include" pairs in which the model prefers the wrong answer. They are counted
            in `Sweep.failed` in both cases.
        controls: also patch from each pair's `control` prompt, into the same base run, for `Sweep.control_patched` and
            the test of `nextstate.analysis.heads.recovery`. This doubles the number of copies. It needs pairs that have
            a control, a direction that patches, and positions other than "all".
        vocabulary: also compute the probability of the answer and the greedy token. This needs the logits of the whole
            vocabulary for every copy, a considerable part of the work in small models.
        max_bytes: bound on the memory of a sweep in addition to the model: keys, values and kept activations of the
            current pairs, plus activations, scores and logits of the copies in one pass. (At least one copy is always
            run.) By default 2 GiB on a CPU, and 60 % of the free memory of a GPU. If memory runs out nevertheless,
            passes are halved.
        rng: draws the partners of "resample".

    Raises:
        PatchError: the model fails on all pairs (with failures="exclude"), pairs do not fit the positions, controls
            are asked for where there are none, memory runs out for a single copy, or a control run fails.
        AgentError: no road reproduces the plain forward passes of the model.
        SiteError: the model or a layer has no such site.
    """
    chosen = _checked(model, pairs, site, direction, layers, failures)
    columns, groups = plan(pairs, positions, direction)
    donor = _donor(model, pairs, groups, site, direction, rng)
    unrelated = _unrelated(model, pairs, groups, site, direction) if controls else None
    places = [(layer, head) for layer in chosen for head in range(model.sites.shape(site, layer)[0])]
    found = _results(model, pairs, chosen, site, columns, controls)
    worst = 0.0

    def work(group: Group, room: Room) -> None:
        nonlocal worst
        runs, answer, other = _base(model, pairs, group, site, direction, failures, found)
        rows = np.array(group.pairs)[found.kept[list(group.pairs)]]
        if not len(rows):
            return
        group = replace(group, pairs=tuple(rows.tolist()))
        whole = group.whole

        def run(part: Sequence[Copy], values: Values, full: bool) -> Readout:
            nonlocal worst
            only = None if full else torch.stack([answer, other], 1)
            logits, error = run_copies(model, runs, site, part, values, whole, only)
            worst = max(worst, error)
            got = read(logits, answer, other, full)
            # Relative to the control of the same pass, since rounding in half precision depends on the batch shape.
            drift = got.difference[:, :1] - found.base.difference[rows, None]
            return Readout(got.difference[:, 2:] - drift, got.probability[:, 2:], got.greedy[:, 2:])

        values = donor(group) if donor else runs.values(whole)
        others = unrelated(group) if unrelated else None
        if found.control is not None:
            found.control[rows] = found.base.difference[rows, None, None, None]
        every = [Copy(n, head, start, column) for column, start in group.starts for n, head in places]
        length = group.length

        def fits(copies: Sequence[Copy]) -> bool:
            spans = [length if runs.way == "rows" else length - copy.start for copy in copies]
            return room.fits(sum(spans) + 2 * max(spans), len(spans) + 2, len(rows))

        for part in passes(runs, effective(model, runs, site, every, whole), fits):
            at = (rows[:, None], [chosen.index(c.layer) for c in part], [c.head for c in part],
                  [c.column for c in part])  # fmt: skip
            found.patched.put(at, run(part, values, vocabulary))
            if others is not None and found.control is not None:
                found.control[at] = run(part, others, False).difference

    for group in groups:
        for part, room in _fitting(model, group, max_bytes):
            _halving(model, work, part, room)
    return _finish(model, pairs, site, direction, chosen, columns, found, True, worst)


def attribution(
    model: LanguageModel,
    pairs: Sequence[TokenPair],
    *,
    site: Site = "head",
    positions: str | Sequence[str] = "last",
    direction: Direction = "denoise",
    layers: Sequence[int] | None = None,
    failures: Failures = "exclude",
    rng: np.random.Generator | None = None,
) -> Sweep:
    """Estimate a sweep from one gradient: (source - base activation) times d(logit difference)/d(activation).

    Arguments and result are those of `sweep`; probabilities and greedy tokens are not computed. The estimate is
    of first order, so it is inaccurate where the network saturates (Nanda 2023, "Attribution patching"; Syed, Rager &
    Conmy 2023, arXiv 2310.10348).
    """
    chosen = _checked(model, pairs, site, direction, layers, failures)
    columns, groups = plan(pairs, positions, direction)
    donor = _donor(model, pairs, groups, site, direction, rng)
    found = _results(model, pairs, chosen, site, columns)

    def work(group: Group, _: Room) -> None:
        runs, answer, other = _base(model, pairs, group, site, direction, failures, found)
        rows = np.array(group.pairs)[found.kept[list(group.pairs)]]
        if not len(rows):
            return
        group = replace(group, pairs=tuple(rows.tolist()))
        own, slopes = _gradient(model, runs.tokens, site, chosen, answer, other)
        values = donor(group) if donor else runs.values(group.whole)
        for column, start in group.starts:
            end = None if group.whole else start + 1
            for i, layer in enumerate(chosen):
                moved = values(layer, Copy(layer, 0, start, column)) - own[layer][:, start:end]
                effect = (moved * slopes[layer][:, start:end]).float().sum((1, 3))  # [pair head]
                found.patched.difference[rows, i, :, column] += effect.cpu().numpy()
        found.patched.probability[rows], found.patched.greedy[rows] = np.nan, -1

    for group in groups:
        size = max(1, model.batch_tokens // (8 * group.length))  # the graph keeps activations in memory
        for k in range(0, len(group.pairs), size):
            _halving(model, work, replace(group, pairs=group.pairs[k : k + size]), Room())
    return _finish(model, pairs, site, direction, chosen, columns, found, False, float("nan"))


def _gradient(
    model: LanguageModel, tokens: Tensor, site: Site, layers: Sequence[int], answer: Tensor, other: Tensor
) -> tuple[dict[int, Activation], dict[int, Activation]]:
    """Return the activations at a site and the gradient of the logit difference with respect to them, by layer."""
    kept: dict[int, Tensor] = {}

    def root(_: nn.Module, __: object, out: Tensor) -> Tensor:
        return out.detach().requires_grad_()  # also where the weights are frozen

    with torch.enable_grad(), ExitStack() as stack:
        stack.callback(model.model.get_input_embeddings().register_forward_hook(root).remove)
        for layer in layers:

            def keep(x: Tensor, layer: int = layer) -> Tensor:
                kept[layer] = x
                return x

            stack.enter_context(model.sites.hook(site, layer, keep))
        logits = model.forward.plain(tokens, [tokens.shape[1] - 1])[:, 0]
        rows = torch.arange(len(tokens), device=tokens.device)
        total = (logits[rows, answer] - logits[rows, other]).float().sum()
        slopes = torch.autograd.grad(total, [kept[layer] for layer in layers])
    return {layer: x.detach() for layer, x in kept.items()}, dict(zip(layers, slopes, strict=True))


def _checked(
    model: LanguageModel,
    pairs: Sequence[TokenPair],
    site: Site,
    direction: Direction,
    layers: Sequence[int] | None,
    failures: Failures,
) -> tuple[int, ...]:
    for name, value, legal in (("direction", direction, DIRECTIONS), ("failures", failures, get_args(Failures))):
        if value not in legal:
            raise PatchError(f"{name}={value!r} is not possible: expected one of {', '.join(legal)}")
    model.sites.check(site)
    chosen = model.sites.layers_with(site) if layers is None else tuple(sorted(set(layers)))
    for layer in chosen:
        model.sites.check(site, layer)
    by_heads: dict[int, list[int]] = {}
    for layer in chosen:
        by_heads.setdefault(model.sites.shape(site, layer)[0], []).append(layer)
    if len(by_heads) > 1:
        groups = "; ".join(f"{heads} in layers {own}" for heads, own in by_heads.items())
        raise PatchError(f"layers of one sweep must have equally many heads, but have {groups}: sweep them separately")
    if not pairs or not chosen:
        raise PatchError(f"{len(pairs)} pairs and {len(chosen)} layers: expected at least one of each")
    longest = max(len(p.clean) for p in pairs)
    if model.context is not None and longest > model.context:
        raise PatchError(
            f"a pair has {longest:,} tokens, but the context of {model.name} is {model.context:,}; ask for fewer steps"
        )
    return chosen


def _results(
    model: LanguageModel,
    pairs: Sequence[TokenPair],
    layers: tuple[int, ...],
    site: Site,
    columns: tuple[str, ...],
    controls: bool = False,
) -> _Results:
    n, heads = len(pairs), model.sites.shape(site, layers[0])[0]
    patched = Readout.empty(n, len(layers), heads, len(columns))
    control = np.full(patched.difference.shape, np.nan) if controls else None
    return _Results(Readout.empty(n), Readout.empty(n), patched, control, np.zeros(n, dtype=bool))


def _base(
    model: LanguageModel,
    pairs: Sequence[TokenPair],
    group: Group,
    site: Site,
    direction: Direction,
    failures: Failures,
    found: _Results,
) -> tuple[Runs, Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """Run both prompts of a group and store their readouts; return the runs to patch, with the tokens of both answers.

    Patched readouts are initialised with those of the base run, which holds where no patch is made.
    """
    clean, corrupted = (np.array([getattr(pairs[i], w) for i in group.pairs]) for w in ("clean", "corrupted"))
    answer, other = (
        torch.tensor([getattr(pairs[i], w) for i in group.pairs], device=model.device) for w in ("answer", "other")
    )
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    runs = run_pairs(model, base, source, site, group.first)
    rows = np.array(group.pairs)
    for readout, logits in ((found.base, runs.base_logits), (found.source, runs.source_logits)):
        got = read(logits[:, None], answer, other)
        readout.put(rows, Readout(got.difference[:, 0], got.probability[:, 0], got.greedy[:, 0]))
    kept = np.full(len(rows), failures == "include") | ~_failed(found, direction)[rows]
    found.kept[rows] = kept
    start = (
        x[rows[kept], None, None, None] for x in (found.base.difference, found.base.probability, found.base.greedy)
    )
    found.patched.put(rows[kept], Readout(*start))
    if kept.all():
        return runs, answer, other
    pick = torch.from_numpy(kept.nonzero()[0]).to(model.device)
    return runs.select(pick), answer[pick], other[pick]


def _failed(found: _Results, direction: Direction) -> Bool[np.ndarray, " pair"]:
    clean, corrupted = (found.source, found.base) if direction == "denoise" else (found.base, found.source)
    return np.asarray(~((clean.difference > 0) & (corrupted.difference < 0)))


def _finish(
    model: LanguageModel,
    pairs: Sequence[TokenPair],
    site: Site,
    direction: Direction,
    layers: tuple[int, ...],
    columns: tuple[str, ...],
    found: _Results,
    exact: bool,
    control: float,
) -> Sweep:
    if not found.kept.any():
        raise PatchError(
            f"{model.name} fails on all {len(pairs)} pairs: it never prefers the correct answer in both prompts; "
            'use an easier game setting, or failures="include"'
        )
    answers, failed = tuple(p.answer for p in pairs), _failed(found, direction)
    if found.control is not None:
        found.control[[not pair.control for pair in pairs]] = np.nan
    return Sweep(
        site, direction, layers, columns, found.base, found.source, found.patched, failed, found.kept, answers, exact,
        control, found.control,
    )  # fmt: skip


def _donor(
    model: LanguageModel,
    pairs: Sequence[TokenPair],
    groups: Sequence[Group],
    site: Site,
    direction: Direction,
    rng: np.random.Generator | None,
) -> Donor | None:
    """Return a function that gives the activations of an ablation; None for directions that take the source run's.

    Its values start at the group's first position and are set at the positions of the column that is patched.
    """
    if direction in PATCHES:
        return None
    sites, n = model.sites, len(pairs)
    like: dict[str, Any] = {"dtype": model.model.dtype, "device": model.device}
    seen: dict[int, Float[Tensor, "pair column head dim"]] = {}
    if direction != "zero":
        seen = _seen(model, [pair.clean for pair in pairs], groups, site)
        if direction == "mean":
            seen = {layer: x.float().mean(0, keepdim=True).to(x.dtype).expand_as(x) for layer, x in seen.items()}
        elif rng is None or n < 2:
            raise PatchError(f"resample needs an rng and at least 2 pairs, got rng={rng} and {n}")
        else:
            order = rng.permutation(n)
            partner = torch.from_numpy(np.roll(order, 1)[order.argsort()]).to(model.device)  # never itself
            seen = {layer: x[partner] for layer, x in seen.items()}

    def of(group: Group) -> Values:
        rows, deep = list(group.pairs), group.length - group.first if group.whole else 1

        def values(layer: int, copy: Copy) -> Activation:
            if direction == "zero":
                return torch.zeros(len(rows), deep, *sites.shape(site, layer), **like)
            return seen[layer][rows] if group.whole else seen[layer][rows, copy.column, None]

        return values

    return of


def _unrelated(
    model: LanguageModel, pairs: Sequence[TokenPair], groups: Sequence[Group], site: Site, direction: Direction
) -> Donor:
    """Return a function that gives the activations of the pairs' control prompts, as `_donor` does."""
    if direction not in PATCHES or groups[0].whole or not any(pair.control for pair in pairs):
        raise PatchError(
            f"controls=True is not possible with direction={direction!r}, positions="
            f"{'all' if groups[0].whole else 'given'!r} and {sum(bool(p.control) for p in pairs)} pairs that have a "
            "control: expected denoise or noise, positions other than 'all', and at least one such pair"
        )
    seen = _seen(model, [pair.control or pair.clean for pair in pairs], groups, site)

    def of(group: Group) -> Values:
        rows = list(group.pairs)
        return lambda layer, copy: seen[layer][rows, copy.column, None]

    return of


def _seen(
    model: LanguageModel, prompts: Sequence[tuple[int, ...]], groups: Sequence[Group], site: Site
) -> dict[int, Float[Tensor, "pair column head dim"]]:
    """Return the activations of one prompt for each pair, at the positions of the columns (or at all), by layer."""
    width = groups[0].length if groups[0].whole else 1 + max(column for g in groups for column, _ in g.starts)
    like = {"dtype": model.model.dtype, "device": model.device}
    out = {
        layer: torch.zeros(len(prompts), width, *model.sites.shape(site, layer), **like)
        for layer in model.sites.layers_with(site)
    }
    for group in groups:
        cells = [(i, i) for i in range(group.length)] if group.whole else group.starts
        columns, where = (list(x) for x in zip(*cells, strict=True))
        size = max(1, model.batch_tokens // group.length)
        for k in range(0, len(group.pairs), size):
            rows = list(group.pairs[k : k + size])
            for layer, x in site_values(model, np.array([prompts[i] for i in rows]), site).items():
                out[layer][torch.tensor(rows)[:, None], columns] = x[:, where]
    return out


class Room(NamedTuple):
    """How much one pass may hold. A single copy of one pair is always run.

    Attributes:
        bytes: of memory, besides the model and what is kept of the base and source runs.
        tokens: of copies and controls, all pairs together.
        token: bytes for each of these.
        copy: further bytes for each copy or control.
    """

    bytes: int = 0
    tokens: int = 0
    token: int = 1
    copy: int = 1

    def fits(self, tokens: int, copies: int, pairs: int) -> bool:
        """Return whether copies and controls fit; numbers of tokens and copies are those of one pair."""
        return pairs * (tokens * self.token + copies * self.copy) <= self.bytes and pairs * tokens <= self.tokens


def _fitting(model: LanguageModel, group: Group, max_bytes: int | None) -> Iterator[tuple[Group, Room]]:
    """Split a group into parts that fit into memory; yield each with the room for its passes."""
    config, sites, device = model.model.config.get_text_config(), model.sites, model.device
    if max_bytes is None:
        max_bytes = 2 << 30 if device.type != "cuda" else int(0.6 * torch.cuda.mem_get_info(device)[0])
    tokens = PASS_TOKENS if device.type == "cpu" else model.batch_tokens
    size, span, length = model.model.dtype.itemsize, group.length - group.first, group.length
    mlp = max([4 * sites.hidden, *(getattr(config, k, None) or 0 for k in ("intermediate_size", "n_inner", "ffn_dim"))])
    wide = max(sites.hidden, sites.heads * sites.head_dim)
    held = (
        size * sites.layers * (4 * length * wide + span * (4 * wide + 3 * wide))
    )  # keys; streams, patches, projections
    scores = ATTENTIONS.get(model.model.config._attn_implementation, 3) * sites.heads * 2 * length
    token = size * (24 * wide + 4 * mlp) + 4 * scores
    copy = int(config.vocab_size) * (2 * size + 8)
    rows = min(max_bytes // (held + 3 * (length * token + copy)), tokens // (16 * span), len(group.pairs))
    rows = max(1, rows)
    room = Room(max_bytes - rows * held, tokens, token, copy)
    for k in range(0, len(group.pairs), rows):
        yield replace(group, pairs=group.pairs[k : k + rows]), room


def _halving(model: LanguageModel, work: Callable[[Group, Room], None], group: Group, room: Room) -> None:
    """Do the work; if memory runs out, do it in smaller pieces."""
    try:
        work(group, room)
        return
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not out_of_memory(error):
            raise
        single = not room.fits(4, 4, 1)  # not even two copies of a token, beside the controls
        if single and len(group.pairs) == 1:
            raise PatchError(
                f"{model.name} runs out of memory on one copy of a pair of {group.length:,} tokens on {model.device}"
            ) from error
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(group.pairs) == 1:
        _halving(model, work, group, room._replace(bytes=room.bytes // 2, tokens=room.tokens // 2))
        return
    middle = len(group.pairs) // 2
    for half in (group.pairs[:middle], group.pairs[middle:]):
        _halving(model, work, replace(group, pairs=half), room)
