"""Errors of the test of heads, by simulation: family-wise error and power of the sign-flipped max-t.

    python -m benchmarks.sign_flips [--quick] [--sweeps N]

Each simulated sweep has effects of null heads from the pair's other prompt and from a control prompt, drawn from the
same distribution, and one true head whose effect from the other prompt is one standard deviation larger. Effects
called `skewed` are exponential. Those called `own` are of the built-in model: the effects of its heads on state pairs,
each head centred at 0, with the pairs drawn again. Printed are the share of sweeps in which a null head is named, and
the share in which the true head is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache

import numpy as np

from nextstate.analysis.stats import LEVEL, sign_flip_test

Draw = Callable[[np.random.Generator, int, int], np.ndarray]
NOISES: dict[str, Draw] = {
    "normal": lambda rng, pairs, heads: rng.standard_normal((pairs, heads)),
    "t3": lambda rng, pairs, heads: rng.standard_t(3, (pairs, heads)),
    "skewed": lambda rng, pairs, heads: rng.standard_exponential((pairs, heads)),
}
SCALE = {"normal": 1.0, "t3": 3**0.5, "skewed": 1.0}  # standard deviations
HEADS, PAIRS = (32, 144, 1200), (24, 48, 96)


def simulate(
    draw: Draw, scale: float, heads: int, pairs: int, sweeps: int, rng: np.random.Generator, flips: int = 299
) -> tuple[float, float]:
    """Return the share of sweeps in which a null head is named, and that in which the true head (the first) is."""
    false = true = 0
    for _ in range(sweeps):
        apart = draw(rng, pairs, heads + 1) - draw(rng, pairs, heads + 1)
        apart[:, 0] += scale
        named = sign_flip_test(apart, rng, flips=flips) <= 1 - LEVEL
        false += bool(named[1:].any())
        true += bool(named[0])
    return false / sweeps, true / sweeps


@cache
def own_effects(pairs: int = 48) -> np.ndarray:
    """Return the effects of the built-in model's heads on state pairs, centred for each head, [pair head]."""
    from nextstate.agents.language import LanguageModel
    from nextstate.analysis.heads.patch import sweep
    from nextstate.analysis.heads.routing import token_pairs
    from nextstate.envs.games import make_game

    model, rng = LanguageModel("nextstate/tiny", device="cpu"), np.random.default_rng(0)
    game = make_game("DFA", states=5, density="middle", actions_listed=4)
    drawn = [game.contrast(rng, "state", steps=12) for _ in range(pairs)]
    found = sweep(model, token_pairs(model.encoder, drawn)[0], vocabulary=False)
    effects = (found.patched.difference - found.base.difference[:, None, None, None])[found.kept].reshape(
        int(found.kept.sum()), -1
    )
    return np.asarray(effects - effects.mean(0))


def own_draw(effects: np.ndarray) -> Draw:
    """Return a function that draws pairs of recorded effects again; the first head has effects of variance 1."""

    def draw(rng: np.random.Generator, pairs: int, heads: int) -> np.ndarray:
        copies = -(-heads // effects.shape[1])  # copies of the heads are drawn from pairs of their own
        parts = [effects[rng.integers(0, len(effects), pairs)] for _ in range(copies)]
        out = np.concatenate(parts, 1)[:, :heads]
        out[:, 0] /= effects[:, 0].std()
        return out

    return draw


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 sweeps a cell, of 24 and 48 pairs")
    parser.add_argument("--sweeps", type=int, default=1000, help="simulated sweeps a cell (default: %(default)s)")
    given = parser.parse_args()
    sweeps, sizes = (40, (24, 48)) if given.quick else (given.sweeps, PAIRS)
    print("| effects | heads | " + " | ".join(f"{n} pairs" for n in sizes) + " |")
    print("|---|---|" + "---|" * len(sizes))
    draws = {name: (draw, SCALE[name]) for name, draw in NOISES.items()} | {"own": (own_draw(own_effects()), 1.0)}
    for name, (draw, scale) in draws.items():
        for heads in HEADS:
            found = [simulate(draw, scale, heads, n, sweeps, np.random.default_rng([heads, n])) for n in sizes]
            cells = [f"{false:.3f} / {true:.2f}" for false, true in found]
            print(f"| {name} | {heads:,} | " + " | ".join(cells) + " |", flush=True)
    print(f"any false head / power for one standard deviation, {sweeps:,} sweeps a cell")


if __name__ == "__main__":
    main()
