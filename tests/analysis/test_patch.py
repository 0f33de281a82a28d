"""Exact sweeps against two other roads, one run a patch: bare PyTorch hooks, and nnsight."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nextstate.agents.agent import Prompt
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, prompts_of
from nextstate.agents.sites import SITES, SiteError
from nextstate.analysis.heads import copies as copying
from nextstate.analysis.heads import patch as patching
from nextstate.analysis.heads import sweep as engine
from nextstate.analysis.heads.patch import (
    PatchError,
    Readout,
    Sweep,
    TokenPair,
    attribution,
    rank_agreement,
    recovery,
    sweep,
    tokens_of,
)
from nextstate.analysis.heads.recovery import table
from nextstate.envs.games import make_game
from tests import zoo

EXACT = 1e-4  # of a logit, in float32
# How each architecture calls its modules, written down a second time, as paths from the model.
RAW = {
    "gpt2": ("transformer.h.{}", "attn.c_proj", "attn", "mlp"),
    "nextstate_distances": ("transformer.h.{}", "attn.c_proj", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers.{}", "attention.dense", "attention", "mlp"),
    "llama": ("model.layers.{}", "self_attn.o_proj", "self_attn", "mlp"),
    "gemma2": (
        "model.layers.{}", "self_attn.o_proj", "post_attention_layernorm", "post_feedforward_layernorm",
    ),
}  # fmt: skip


def make_pairs(shapes: Sequence[tuple[int, int]] = ((12, 8), (12, 8), (12, 6), (9, 5))) -> list[TokenPair]:
    """Pairs of random tokens, given by length and first difference; the last token is the same in both prompts."""
    rng, out = np.random.default_rng(0), []
    for length, first in shapes:
        clean = rng.integers(5, 400, length)
        corrupted = clean.copy()
        corrupted[first:-1] = (clean[first:-1] + rng.integers(1, 100, length - 1 - first)) % 400
        answer, other = rng.choice(400, 2, replace=False).tolist()
        out.append(TokenPair(tuple(clean.tolist()), tuple(corrupted.tolist()), answer, other, {"state": first + 1}))
    return out


class Raw:
    """Runs with bare hooks: every site as [layer][token, head, dim], and runs with some of them overwritten."""

    def __init__(self, model: LanguageModel) -> None:
        self.model: Any = model.model
        self.names = RAW[self.model.config.model_type]
        self.layers = self.model.config.num_hidden_layers
        self.heads = self.model.config.num_attention_heads

    def module(self, root: Any, site: str, layer: int) -> Any:
        """Works for the model and for nnsight's view of it."""
        block, projection, attention, mlp = self.names
        path = block.format(layer)
        path += {"resid_pre": "", "head": "." + projection, "attn_out": "." + attention, "mlp_out": "." + mlp}[site]
        for part in path.split("."):
            root = root[int(part)] if part.isdigit() else getattr(root, part)
        return root

    def hook(self, site: str, layer: int, edit: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        module = self.module(self.model, site, layer)
        if site in ("resid_pre", "head"):
            return module.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
        return module.register_forward_hook(
            lambda _, __, out: (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)
        )

    @torch.no_grad()
    def values(self, tokens: Sequence[int], site: str) -> list[torch.Tensor]:
        seen: dict[int, torch.Tensor] = {}
        hooks = [
            self.hook(site, n, lambda x, n=n: seen.setdefault(n, x.clone()) if n not in seen else x)
            for n in range(self.layers)
        ]
        self.model(torch.tensor([tokens]))
        for hook in hooks:
            hook.remove()
        return [self.split(seen[n][0], site) for n in range(self.layers)]

    def split(self, x: torch.Tensor, site: str) -> torch.Tensor:
        return x.unflatten(-1, (self.heads if site == "head" else 1, -1))

    @torch.no_grad()
    def patched(
        self, tokens: Sequence[int], site: str, layer: int, head: int, at: Sequence[int], new: torch.Tensor
    ) -> torch.Tensor:
        """Return the last token's logits; `new` has the positions of `at` on its first axis."""

        def edit(x: torch.Tensor) -> torch.Tensor:
            cut = self.split(x.clone(), site)
            cut[0, list(at), head] = new
            return cut.flatten(2)

        hook = self.hook(site, layer, edit)
        logits = self.model(torch.tensor([tokens])).logits[0, -1]
        hook.remove()
        return logits


def positions_of(pair: TokenPair, column: str, start: int) -> list[int]:
    if column == "all":
        return list(range(start, len(pair.clean)))
    return [pair.roles[column]] if column in pair.roles else [int(column)]


def by_hand(
    model: LanguageModel, pairs: Sequence[TokenPair], found: Sweep, donor: Callable[..., torch.Tensor] | None = None
) -> Readout:
    """Do a whole sweep with one run a patch. `donor` says what goes in, by default what the source run has there."""
    raw, shape = Raw(model), found.patched.difference.shape
    out = Readout.empty(*shape)
    for i, pair in enumerate(pairs):
        base, source = (pair.corrupted, pair.clean) if found.direction == "denoise" else (pair.clean, pair.corrupted)
        values = raw.values(source, found.site)
        for n, layer in enumerate(found.layers):
            for head in range(shape[2]):
                for c, column in enumerate(found.columns):
                    at = positions_of(pair, column, pair.first_difference if donor is None else 0)
                    new = values[layer][at, head] if donor is None else donor(i, layer, head, column, at)
                    logits = raw.patched(base, found.site, layer, head, at, new)
                    out.difference[i, n, head, c] = logits[pair.answer] - logits[pair.other]
                    out.probability[i, n, head, c] = logits.softmax(-1)[pair.answer]
                    out.greedy[i, n, head, c] = logits.argmax()
    return out


def same(found: Sweep, expected: Readout) -> None:
    assert np.abs(found.patched.difference - expected.difference).max() < EXACT
    assert np.abs(found.patched.probability - expected.probability).max() < EXACT
    assert (found.patched.greedy == expected.greedy).all()
    assert found.control < 1e-5


def moves(found: Sweep) -> bool:
    """Tell whether the patches do something, without which equality would show nothing."""
    return bool((np.abs(found.patched.difference - found.base.difference[:, None, None, None]) > 0.01).mean() > 0.1)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", SITES)
def test_sweeps_equal_one_run_a_patch(model: LanguageModel, site: Any, direction: Any) -> None:
    pairs = make_pairs()
    for positions, use in ((("state", "last"), pairs), ("each", pairs[1:3]), ("all", pairs[2:])):
        found = sweep(model, use, site=site, positions=positions, direction=direction, failures="include")
        assert moves(found)
        same(found, by_hand(model, use, found))


def test_one_role_is_one_column_and_each_position_has_its_own(model: LanguageModel) -> None:
    pairs = make_pairs()[:3]
    each = sweep(model, pairs, positions="each", failures="include")
    last = sweep(model, pairs, positions="last", failures="include")
    assert each.columns == ("6", "7", "8", "9", "10", "11")
    assert last.columns == ("last",)
    assert np.abs(each.patched.difference[..., -1:] - last.patched.difference).max() < EXACT
    # Before its prompts differ, patching a pair does nothing at all.
    assert (each.patched.difference[0, ..., :2] == each.base.difference[0]).all()
    some = sweep(model, pairs, layers=[1], failures="include")
    assert some.layers == (1,)
    assert np.abs(some.patched.difference - last.patched.difference[:, 1:]).max() < EXACT


def test_the_vocabulary_can_be_left_out(model: LanguageModel) -> None:
    pairs = make_pairs()
    whole = sweep(model, pairs, failures="include")
    found = sweep(model, pairs, failures="include", vocabulary=False)
    assert np.abs(whole.patched.difference - found.patched.difference).max() < EXACT
    assert found.control < 1e-5
    assert np.isnan(found.patched.probability).all()
    with pytest.raises(PatchError, match="greedy tokens were not computed"):
        _ = found.flips
    for one, known in ((found, False), (whole, True)):
        clear = replace(one, source=replace(one.source, difference=one.base.difference + 1))  # a gap beyond noise
        rows = table(clear, recovery(clear, np.random.default_rng(0), resamples=20))
        assert ("flips" in rows.columns) == known


def nnsight_heads(agent: LanguageModel, raw: Raw, pair: TokenPair, size: int) -> torch.Tensor:
    """One trace a head, denoising at the last token; [layer, head, vocabulary]."""
    clean, corrupted = torch.tensor([pair.clean]), torch.tensor([pair.corrupted])
    with agent.traced.trace(clean):
        seen = list().save()
        for layer in range(raw.layers):
            seen.append(raw.module(agent.traced, "head", layer).input[:, -1])
    rows = []
    for layer in range(raw.layers):
        for head in range(raw.heads):
            cut = slice(head * size, (head + 1) * size)
            with agent.traced.trace(corrupted):
                raw.module(agent.traced, "head", layer).input[:, -1, cut] = seen[layer][:, cut]
                logits = agent.traced.output.logits[0, -1].save()
            rows.append(logits)
    return torch.stack(rows).view(raw.layers, raw.heads, -1)


@pytest.mark.parametrize("name", [*RAW, "built-in"])
def test_heads_equal_nnsights_loop(name: str, folders: dict[str, Path]) -> None:
    agent = LanguageModel("nextstate/tiny" if name == "built-in" else str(folders[name]), device="cpu")
    pair = make_pairs()[0]
    found = sweep(agent, [pair], failures="include").patched
    logits = nnsight_heads(agent, Raw(agent), pair, agent.sites.head_dim).detach()
    assert (
        np.abs(found.difference[0, :, :, 0] - (logits[..., pair.answer] - logits[..., pair.other]).numpy()).max()
        < EXACT
    )
    assert np.abs(found.probability[0, :, :, 0] - logits.softmax(-1)[..., pair.answer].numpy()).max() < EXACT
    by_hooks = by_hand(agent, [pair], sweep(agent, [pair], failures="include"))
    assert np.abs(found.difference - by_hooks.difference).max() < EXACT


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out"])
def test_layers_equal_nnsights_loop(model: LanguageModel, site: str) -> None:
    agent, raw, pair, at = model, Raw(model), make_pairs()[2], 8
    clean, corrupted = torch.tensor([pair.clean]), torch.tensor([pair.corrupted])
    found = sweep(agent, [replace(pair, roles={"here": at})], site=site, positions="here", failures="include")  # type: ignore[arg-type]
    for layer in range(raw.layers):
        module = raw.module(agent.traced, site, layer)
        with agent.traced.trace(clean):
            out = module.input if site == "resid_pre" else module.output
            new = (out[0] if isinstance(out, tuple) else out)[0, at].clone().save()
        with agent.traced.trace(corrupted):
            out = module.input if site == "resid_pre" else module.output
            (out[0] if isinstance(out, tuple) else out)[0, at] = new
            logits = agent.traced.output.logits[0, -1].save()
        expected = float((logits[pair.answer] - logits[pair.other]).detach())
        assert found.patched.difference[0, layer, 0, 0] == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("positions", ["all", ("state", "last")])
def test_ablations_equal_one_run_a_patch(model: LanguageModel, site: Any, positions: Any) -> None:
    pairs, raw = make_pairs()[:3], Raw(model)
    if positions != "all":
        pairs = make_pairs()
    values = [raw.values(p.clean, site) for p in pairs]

    def zero(i: int, layer: int, head: int, column: str, at: list[int]) -> torch.Tensor:
        return torch.zeros_like(values[i][layer][at, head])

    def of(j: int, layer: int, head: int, column: str, at: list[int]) -> torch.Tensor:
        return values[j][layer][positions_of(pairs[j], column, 0), head]

    def mean(i: int, *where: Any) -> torch.Tensor:
        return torch.stack([of(j, *where) for j in range(len(pairs))]).mean(0)

    order = np.random.default_rng(3).permutation(len(pairs))
    partner = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))

    def resample(i: int, *where: Any) -> torch.Tensor:
        return of(partner[i], *where)

    for direction, donor in (("zero", zero), ("mean", mean), ("resample", resample)):
        found = sweep(
            model, pairs, site=site, positions=positions, direction=direction, failures="include",  # type: ignore[arg-type]
            rng=np.random.default_rng(3),
        )  # fmt: skip
        assert moves(found)
        same(found, by_hand(model, pairs, found, donor))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_control_is_one_run_a_patch_from_the_unrelated_prompt(model: LanguageModel, direction: Any) -> None:
    rng, pairs = np.random.default_rng(8), make_pairs()
    pairs = [
        replace(pair, control=tuple(rng.integers(5, 400, len(pair.clean)).tolist()) if i != 2 else ())
        for i, pair in enumerate(pairs)
    ]
    raw = Raw(model)

    def donor(i: int, layer: int, head: int, column: str, at: list[int]) -> torch.Tensor:
        return raw.values(pairs[i].control or pairs[i].clean, "head")[layer][at, head]

    for positions in ("last", ("state", "last")):
        found = sweep(model, pairs, positions=positions, direction=direction, failures="include", controls=True)
        plain = sweep(model, pairs, positions=positions, direction=direction, failures="include")
        assert plain.control_patched is None
        assert found.patched.difference == pytest.approx(plain.patched.difference, abs=EXACT)
        assert found.control_patched is not None
        expected = by_hand(model, pairs, found, donor).difference
        others = [0, 1, 3]
        assert np.abs(found.control_patched[others] - expected[others]).max() < EXACT
        assert np.isnan(found.control_patched[2]).all()
        assert np.abs(found.control_patched[others] - found.patched.difference[others]).max() > 0.01


def test_controls_that_are_not_possible(model: LanguageModel) -> None:
    pairs = make_pairs()
    own = [replace(pair, control=pair.clean) for pair in pairs]
    for use, more in ((pairs, {}), (own, {"positions": "all"}), (own, {"direction": "mean"})):
        with pytest.raises(PatchError, match=r"controls=True is not possible with .* expected denoise or noise"):
            sweep(model, use, controls=True, failures="include", **more)  # type: ignore[arg-type]
    with pytest.raises(PatchError, match="the control has 3 tokens: expected 12"):
        replace(pairs[0], control=(1, 2, 3))


@pytest.mark.parametrize("architecture", ["opt", "opt-350m", "qwen2", "qwen3", "mistral"])
def test_other_architectures_too(architecture: str, folders: dict[str, Path]) -> None:
    from tests.agents.test_sites import make

    tokenizer = LanguageModel(str(folders["gpt2"]), device="cpu").tokenizer
    model = LanguageModel(architecture, loaded=(make(architecture), tokenizer))
    pairs = [
        TokenPair(tuple(t % 60 for t in p.clean), tuple(t % 60 for t in p.corrupted), 3, 4, p.roles)
        for p in make_pairs()
    ]
    for site in SITES:
        found = sweep(model, pairs, site=site, positions=("state", "last"), failures="include")
        for i, pair in enumerate(pairs):
            seen: list[torch.Tensor] = []
            for layer in range(2):
                with model.sites.hook(site, layer, seen.append), torch.no_grad():
                    model.model(torch.tensor([pair.clean]))
            for layer, head, c in np.ndindex(found.patched.difference.shape[1:]):
                at = pair.roles[found.columns[c]]

                def edit(x: torch.Tensor, where: Any = (0, at, head), layer: int = layer) -> torch.Tensor:
                    x = x.clone()
                    x[where] = seen[layer][where]  # noqa: B023
                    return x

                with model.sites.hook(site, layer, edit), torch.no_grad():
                    logits = model.model(torch.tensor([pair.corrupted])).logits[0, -1]
                expected = float(logits[3] - logits[4])
                assert found.patched.difference[i, layer, head, c] == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("max_bytes", [1, 1_000_000])
def test_any_split_gives_the_same_numbers(
    model: LanguageModel, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs()
    for positions, use in (("last", pairs), ("each", pairs[:3]), ("all", pairs)):
        whole = sweep(model, use, positions=positions, failures="include")
        sizes: list[int] = []
        run = engine.run_copies

        def counted(*args: Any, run: Any = run, sizes: list[int] = sizes) -> Any:
            sizes.append(len(args[3]))
            return run(*args)

        monkeypatch.setattr(patching, "run_copies", counted)
        parts = sweep(model, use, positions=positions, failures="include", max_bytes=max_bytes)
        monkeypatch.undo()
        assert np.abs(whole.patched.difference - parts.patched.difference).max() < EXACT
        assert max_bytes > 1 or set(sizes) == {1}


class Peak(TorchDispatchMode):
    """The most bytes that tensors made in this context hold at once."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                where = storage.data_ptr()
                if where not in self.live and where not in self.known:
                    self.live[where] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, where, None)
                    self.most = max(self.most, sum(self.live.values()))
        return out


@pytest.mark.parametrize("positions", ["last", "all"])
def test_memory_stays_within_its_bound(model: LanguageModel, positions: str) -> None:
    pairs = make_pairs(((40, 20),) * 12)
    sweep(model, pairs[:1], failures="include")
    used = []
    least = 1 << (20 if model.model.config.model_type == "nextstate_distances" else 19)  # what one copy takes
    for bound in (least, 1 << 21, 1 << 30):
        with Peak(model.model) as peak:
            sweep(model, pairs, positions=positions, failures="include", max_bytes=bound)
        assert peak.most < bound
        used.append(peak.most)
    assert used == sorted(used)
    assert used[0] < used[2]


def test_memory_that_runs_out_halves_the_passes(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, run = make_pairs(), engine.run_copies
    whole = sweep(model, pairs, failures="include")

    def narrow(model: Any, runs: Any, site: Any, copies: Any, *rest: Any) -> Any:
        if len(copies) * len(runs.tokens) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return run(model, runs, site, copies, *rest)

    monkeypatch.setattr(patching, "run_copies", narrow)
    for most in (3, 1):  # noqa: B007
        parts = sweep(model, pairs, failures="include")
        assert np.abs(whole.patched.difference - parts.patched.difference).max() < EXACT
    most = 0
    with pytest.raises(PatchError, match="runs out of memory on one copy of a pair of 12 tokens"):
        sweep(model, pairs, failures="include")


def test_a_broken_patch_is_caught_by_a_control(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, write = make_pairs(), engine.overwrite
    for site in SITES:
        sweep(model, pairs, site=site, layers=[0], failures="include")  # what a model is proved on is not broken here

    def nothing(target: Any, chosen: Any, values: Any) -> None:
        """Does not write."""

    def shifted(target: Any, chosen: Any, values: Any) -> None:
        write(target, chosen, values.roll(1, -1))

    def elsewhere(target: Any, chosen: Any, values: Any) -> None:
        write(target, chosen, values.roll(1, 0))  # another pair's

    for broken in (nothing, shifted, elsewhere):
        monkeypatch.setattr(engine, "overwrite", broken)
        for site in SITES:
            with pytest.raises(PatchError, match=r"control failed: with everything patched, .* the source run"):
                sweep(model, pairs[:2], site=site, failures="include")
    monkeypatch.undo()

    def greedy(target: Any, chosen: Any, values: Any) -> None:
        target._base[:] = target._base.roll(1, 1) if target._base is not None else target  # other copies' rows

    monkeypatch.setattr(engine, "overwrite", greedy)
    with pytest.raises(PatchError, match="control failed"):
        sweep(model, pairs[:2], failures="include")
    monkeypatch.undo()
    if model.model.config.model_type == "nextstate_distances":
        return  # computes attention on its own

    attend = copying._partial

    def alone(q: Any, k: Any, v: Any, hide: Any, causal: bool, *rest: Any) -> Any:
        out, total = attend(q, k, v, hide, causal, *rest)
        return out, total - 9 if len(q) == 2 else total  # tokens before the copies count for less

    def others(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return attend(q, *(x.roll(1, 0) if len(q) == 2 else x for x in (k, v)), *rest)  # another pair's

    def neighbours(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return attend(q, *(x if len(q) == 2 else x.roll(1, 0) for x in (k, v)), *rest)  # another copy's

    for wrong in (alone, others, neighbours):
        monkeypatch.setattr(copying, "_partial", wrong)
        with pytest.raises(PatchError, match=r"control failed: with (no|every)thing patched"):
            sweep(model, make_pairs()[:2], positions="each", failures="include")


DEEP = ("llama", "gpt_neox", "opt", "gemma2", "mistral", "qwen3", "olmo2", "phi3", "mixtral")


def deep_model(name: str, tokenizer: Any) -> LanguageModel:
    """Four layers, so that copies run all of their tokens in layers between the first and the last; short windows."""
    return LanguageModel(name, loaded=(zoo.build(name, len(tokenizer), 0), tokenizer))


@pytest.mark.parametrize("name", DEEP)
def test_copies_resumed_in_their_layers_equal_rows(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep_model(name, LanguageModel(str(folders["gpt2"]), device="cpu").tokenizer)
    pairs = make_pairs(((26, 14), (26, 14), (21, 3)))
    for site in ("head", "resid_pre", "mlp_out"):
        assert engine.way_of(model, site, 26) == "layers"  # type: ignore[arg-type]
        for positions, use in ((("state", "last"), pairs), ("each", pairs[:2]), ("all", pairs)):
            found = sweep(model, use, site=site, positions=positions, failures="include")  # type: ignore[arg-type]
            with monkeypatch.context() as patched:
                patched.setattr(engine, "way_of", lambda *_: "rows")
                rows = sweep(model, use, site=site, positions=positions, failures="include")  # type: ignore[arg-type]
            scale = max(1.0, float(np.abs(rows.patched.difference).max()))
            assert np.abs(found.patched.difference - rows.patched.difference).max() < EXACT * scale
            assert moves(rows)


def test_attention_to_later_tokens_of_a_copy_is_caught(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep_model("llama", LanguageModel(str(folders["gpt2"]), device="cpu").tokenizer)
    pairs, attend = make_pairs()[:2], copying._partial
    sweep(model, pairs, positions="each", failures="include")
    monkeypatch.setattr(copying, "_partial", lambda q, k, v, hide, causal, *rest: attend(q, k, v, hide, False, *rest))
    with pytest.raises(PatchError, match="control failed: with nothing patched"):
        sweep(model, pairs, positions="each", failures="include")


def test_most_models_resume_copies_in_their_layers(model: LanguageModel) -> None:
    known = "fork" if model.model.config.model_type == "nextstate_distances" else "layers"
    assert {site: engine.way_of(model, site, 12) for site in SITES} == dict.fromkeys(SITES, known)


def test_a_site_that_is_never_reached_is_caught(model: LanguageModel) -> None:
    class Deaf:
        def __getattr__(self, name: str) -> Any:
            return getattr(sites, name)

        def hook(self, site: Any, layer: int, edit: Any) -> Any:
            return sites.hook(site, layer, lambda x: None if edit.__name__ == "patch" else edit(x))

    sites = model.sites
    model.__dict__["sites"] = Deaf()
    try:
        with pytest.raises(PatchError, match="control failed: layers \\[\\] were patched, expected \\[0, 1\\]"):
            sweep(model, make_pairs(), failures="include")
    finally:
        model.__dict__["sites"] = sites


def test_a_model_is_left_as_it_was(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.arange(10, 20)[None]
    before = model.model(tokens).logits
    sweep(model, make_pairs(), failures="include", max_bytes=1)
    attribution(model, make_pairs(), failures="include")
    monkeypatch.setattr(engine, "overwrite", lambda *_: None)
    with pytest.raises(PatchError):
        sweep(model, make_pairs(), failures="include", max_bytes=1)
    assert torch.equal(model.model(tokens).logits, before)
    hooks = [m for m in model.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks or "traced" in model.__dict__
    assert not any("forward" in b.__dict__ for b in model.sites.blocks) or "traced" in model.__dict__
    assert all(p.grad is None for p in model.model.parameters())


def test_eager_attention_and_half_precision(folders: dict[str, Path]) -> None:
    pairs = make_pairs()
    for name in ("gpt2", "llama"):
        plain = LanguageModel(str(folders[name]), device="cpu")
        expected = sweep(plain, pairs, failures="include").patched.difference
        plain.model.set_attn_implementation("eager")
        assert np.abs(sweep(plain, pairs, failures="include").patched.difference - expected).max() < EXACT
        half = LanguageModel(str(folders[name]), device="cpu", dtype="bfloat16")
        found = sweep(half, pairs, failures="include")
        assert found.control < 0.1
        assert np.abs(found.patched.difference - expected).max() < 0.1 * np.ptp(expected) + 0.5


def test_pairs_on_which_the_model_fails_are_counted(model: LanguageModel) -> None:
    pairs = make_pairs(((12, 8),) * 8)
    included = sweep(model, pairs, failures="include")
    raw = Raw(model)
    wrong = []
    for pair in pairs:
        clean, corrupted = (
            raw.patched(t, "head", 0, 0, [0], raw.values(t, "head")[0][[0], 0]) for t in (pair.clean, pair.corrupted)
        )
        wrong.append(not (clean[pair.answer] > clean[pair.other] and corrupted[pair.answer] < corrupted[pair.other]))
    assert included.failed.tolist() == wrong
    assert included.kept.all()
    # Name the answers so that the model is right about the first and the third pair alone.
    raw_logits = [[raw.model(torch.tensor([t])).logits[0, -1] for t in (p.clean, p.corrupted)] for p in pairs]
    made = []
    for i, (pair, (clean, corrupted)) in enumerate(zip(pairs, raw_logits, strict=True)):
        gap = clean - corrupted
        right = (int(gap.argmax()), int(gap.argmin()))
        made.append(replace(pair, answer=right[i not in (0, 2)], other=right[i in (0, 2)]))
    made[0], made[2] = _decisive(made[0], raw_logits[0]), _decisive(made[2], raw_logits[2])
    found = sweep(model, made)
    assert found.kept.tolist() == [i in (0, 2) for i in range(8)]
    assert (found.failed == ~found.kept).all()
    assert np.isnan(found.patched.difference[1]).all()
    assert (found.patched.greedy[1] == -1).all()
    alone = sweep(model, [made[0], made[2]])
    assert np.abs(found.patched.difference[[0, 2]] - alone.patched.difference).max() < EXACT
    assert (int(found.kept.sum()), int(found.failed.sum())) == (2, 6)
    with pytest.raises(PatchError, match="fails on all 6 pairs: it never prefers the correct answer"):
        sweep(model, [p for i, p in enumerate(made) if i not in (0, 2)])
    with pytest.raises(PatchError, match="fails on all 6 pairs"):
        attribution(model, [p for i, p in enumerate(made) if i not in (0, 2)])
    screened = attribution(model, made)
    assert (screened.kept == found.kept).all()
    assert np.isnan(screened.patched.difference[1]).all()


def _decisive(pair: TokenPair, logits: list[torch.Tensor]) -> TokenPair:
    """Give a pair two tokens that its prompts rank differently."""
    clean, corrupted = logits
    order = clean.argsort(descending=True).tolist()
    for a in order[:50]:
        for b in order:
            if clean[a] > clean[b] + 0.01 and corrupted[a] < corrupted[b] - 0.01:
                return replace(pair, answer=a, other=b)
    raise AssertionError("the prompts rank all tokens alike")


@pytest.mark.parametrize("site", SITES)
def test_a_gradient_is_the_slope_of_the_exact_effect(model: LanguageModel, site: Any) -> None:
    pair, raw, step = make_pairs()[2], Raw(model), 1e-2
    found = attribution(model, [pair], site=site, positions=("state", "last"), failures="include")
    base, source = raw.values(pair.corrupted, site), raw.values(pair.clean, site)
    for layer, head, c in np.ndindex(found.patched.difference.shape[1:]):
        at = [pair.roles[found.columns[c]]]
        away = step * (source[layer][at, head] - base[layer][at, head])
        up, down = (
            raw.patched(pair.corrupted, site, layer, head, at, base[layer][at, head] + s * away) for s in (1, -1)
        )
        slope = float((up - down)[pair.answer] - (up - down)[pair.other]) / (2 * step)
        estimate = float(found.patched.difference[0, layer, head, c] - found.base.difference[0])
        assert estimate == pytest.approx(slope, abs=0.02 + 0.02 * abs(slope))
    whole = attribution(model, [pair], site=site, positions="all", failures="include")
    each = attribution(model, [pair], site=site, positions="each", failures="include")
    start = each.base.difference[0]
    assert (each.patched.difference - start).sum(-1) == pytest.approx(
        whole.patched.difference[..., 0] - start, abs=1e-3
    )


def test_a_gradient_ranks_heads_like_the_sweep(folders: dict[str, Path]) -> None:
    agent = LanguageModel(str(folders["gpt2"]), device="cpu")
    with torch.no_grad():  # small weights, so that the network is nearly linear
        for block in agent.model.transformer.h:
            block.attn.c_proj.weight.mul_(0.02)
            block.mlp.c_proj.weight.mul_(0.02)
    pairs = make_pairs()
    for direction in ("denoise", "zero", "mean"):
        exact = sweep(agent, pairs, direction=direction, failures="include")  # type: ignore[arg-type]
        screen = attribution(agent, pairs, direction=direction, failures="include")  # type: ignore[arg-type]
        assert rank_agreement(exact, screen) > 0.95
        assert (screen.patched.greedy == -1).all()
    with pytest.raises(PatchError, match="greedy tokens were not computed"):
        _ = screen.flips
    with pytest.raises(PatchError, match="sweeps of different cells"):
        rank_agreement(exact, sweep(agent, pairs, site="mlp_out", failures="include"))


def made_up(effects: np.ndarray, gap: np.ndarray, **more: Any) -> Sweep:
    """A sweep in which the base run is at 0, the source run at `gap`, and patches bring `effects` [pair head]."""
    n = len(effects)
    patched = effects[:, None, :, None]
    zero, ids = np.zeros(n), np.zeros(n, dtype=np.int64)
    everyone = np.ones(n, dtype=bool)
    return Sweep(
        "head", "denoise", (0,), ("last",), Readout(zero, zero + 0.1, ids), Readout(gap, zero + 0.8, ids + 1),
        Readout(patched, patched * 0 + 0.4, np.where(patched > 0.5, 1, 0)), ~everyone, everyone, (1,) * n, True, 0.0,
        **more,
    )  # fmt: skip


def test_recovery_is_a_ratio_of_means() -> None:
    effects, gap = np.array([[1.0, 0.0, 4.0], [3.0, 0.0, 0.0]]), np.array([3.9, 4.1])
    found = made_up(effects, gap)
    done = recovery(found, np.random.default_rng(0))
    assert done.value[0, :, 0] == pytest.approx([0.5, 0.0, 0.5])
    assert found.flips[0, :, 0].tolist() == [1.0, 0.0, 0.5]
    assert found.probability[0, :, 0] == pytest.approx([0.3] * 3)
    assert (done.low <= done.value).all()
    assert (done.high >= done.value).all()
    assert not done.nonzero[0, 1, 0]
    assert table(found, done)["head"].to_list() == [0, 1, 2]
    assert table(found, done).columns[:5] == ["site", "direction", "layer", "head", "position"]


def test_a_gap_within_noise_is_refused() -> None:
    """A gap whose interval over pairs holds 0 is not divided by."""
    for gap, words in (
        ([2.0], r"is 2 \(95 % interval nan to nan\) over 1 pair, which cannot be distinguished from 0"),
        ([1.0, -1.0], r"is 0 \(95 % interval -12.7 to 12.7\) over 2 pairs"),
        ([1.0, -1.0, 0.1], "nothing to recover"),
        ([1.0, 0.02, 0.3], "nothing to recover"),
    ):
        with pytest.raises(PatchError, match=words):
            recovery(made_up(np.ones((len(gap), 1)), np.array(gap)), np.random.default_rng(0))
    found = recovery(made_up(np.ones((3, 1)), np.array([1.0, 1.2, 0.9])), np.random.default_rng(0))
    assert np.isfinite(found.low).all()
    assert not found.test.known
    assert np.isnan(found.test.p).all()
    assert not found.test.carries.any()


def test_tokens_are_those_a_model_reads(model: LanguageModel) -> None:
    for game in ("Box", "DFA", "Cycle", "FruitStore"):
        (episode,) = episodes_of(make_game(game), range(1), 2)
        for prompt in prompts_of(episode):
            tokens = tokens_of(model.encoder, prompt)
            (prediction,) = model.predict([Prompt(*prompt)])
            assert len(tokens) == prediction.prompt_tokens
            pieces = tokens[: len(model.encoder.opening(episode.opening))]
            assert pieces == model.encoder.opening(episode.opening)


def test_bad_pairs() -> None:
    for arguments, words in [
        (((1, 2, 3), (1, 2), 5, 6), "unequal length: clean has 3 tokens, corrupted has 2"),
        (((1, 2), (1, 2), 5, 6), "the same 2 tokens"),
        (((1, 2), (1, 3), 5, 5), "both prompts are answered by token 5"),
        (((1, 2), (1, 3), 5, 6, {"state": 2}), r"roles \{'state': 2\} are not possible: expected positions 0 to 1"),
        (((1, 2), (1, 3), 5, 6, {"last": 0}), r"roles \{'last': 0\}"),
        (((1, 2), (1, 3), 5, 6, {"each": 0}), r"names other than each, all"),
    ]:
        with pytest.raises(PatchError, match=words):
            TokenPair(*arguments)  # type: ignore[arg-type]


def test_bad_sweeps(folders: dict[str, Path]) -> None:
    agent, pairs = LanguageModel(str(folders["gpt2"]), device="cpu"), make_pairs()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"site": "resid_post"}, SiteError, "site='resid_post' is not possible"),
        ({"layers": [0, 2]}, SiteError, "layer=2 is not possible: gpt2 has layers 0 to 1"),
        ({"layers": []}, PatchError, "4 pairs and 0 layers"),
        ({"direction": "both"}, PatchError, "direction='both' is not possible: expected one of denoise, noise, zero"),
        ({"failures": "drop"}, PatchError, "failures='drop' is not possible: expected one of exclude, include"),
        ({"positions": "action"}, PatchError, "positions='action' is not possible: pair 0 has the roles last, state"),
        ({"positions": ()}, PatchError, "positions=()"),
        ({"positions": "each"}, PatchError, "needs pairs of one length, but there are 2, from 9 to 12 tokens"),
        ({"positions": "all", "direction": "mean"}, PatchError, "needs pairs of one length"),
        ({"direction": "resample"}, PatchError, "resample needs an rng and at least 2 pairs, got rng=None and 4"),
    ]
    for arguments, kind, words in cases:
        for work in (sweep, attribution):
            with pytest.raises(kind) as caught:
                work(agent, pairs, **{"failures": "include", **arguments})
            assert words in str(caught.value)
    with pytest.raises(PatchError, match="0 pairs"):
        sweep(agent, [])
    with pytest.raises(PatchError, match=r"a pair has 600 tokens, but the context of .* is 512"):
        sweep(agent, make_pairs(((600, 3),)))
