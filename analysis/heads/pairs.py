"""Tokenised minimal pairs, and their grouping into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from nextstate.agents.agent import AgentError, Prompt
from nextstate.agents.branches import Trunk
from nextstate.agents.text import Encoder

Direction = Literal["denoise", "noise", "zero", "mean", "resample"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
PATCHES: tuple[Direction, ...] = ("denoise", "noise")  # the other directions ablate
_WORDS = ("each", "all")


class PatchError(AgentError):
    """Pairs cannot be patched, or a control failed; the message gives the reason and what to do."""


@dataclass(frozen=True)
class TokenPair:
    """Two tokenised prompts of equal length with different answers.

    Args:
        clean: tokens of the clean prompt.
        corrupted: tokens of the corrupted prompt.
        answer: the token that answers the clean prompt.
        other: the token that answers the corrupted one.
        roles: positions by name, the same in both prompts; "last" is always included.
        control: tokens of an unrelated prompt of the same length, whose activations `sweep` can patch in for
            comparison; empty if there is none.

    Raises:
        PatchError: the prompts do not form a pair.
    """

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answer: int
    other: int
    roles: Mapping[str, int] = field(default_factory=dict)
    control: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.clean)
        if n != len(self.corrupted):
            raise PatchError(f"a pair of unequal length: clean has {n} tokens, corrupted has {len(self.corrupted)}")
        if self.control and len(self.control) != n:
            raise PatchError(f"the control has {len(self.control)} tokens: expected {n}, as in the pair, or none")
        if self.clean == self.corrupted:
            raise PatchError(f"clean and corrupted are the same {n} tokens: there is nothing to patch")
        if self.answer == self.other:
            raise PatchError(f"both prompts are answered by token {self.answer}: no difference could be measured")
        roles = {"last": n - 1, **self.roles}
        wrong = {k: v for k, v in roles.items() if not 0 <= v < n} or {
            k: v for k, v in roles.items() if k in _WORDS or (k == "last" and v != n - 1)
        }
        if wrong:
            raise PatchError(f"roles {wrong} are not possible: expected positions 0 to {n - 1}, last = {n - 1}, and "
                             f"names other than {', '.join(_WORDS)}")  # fmt: skip
        object.__setattr__(self, "roles", roles)

    @property
    def first_difference(self) -> int:
        """The first position at which the prompts differ."""
        return next(i for i, (a, b) in enumerate(zip(self.clean, self.corrupted, strict=True)) if a != b)


def tokens_of(encoder: Encoder, prompt: Prompt) -> tuple[int, ...]:
    """Return the tokens of a prompt, exactly as a language model reads it to answer."""
    trunk = Trunk(encoder, prompt.episode)
    node = trunk.add_question(prompt.step, prompt.question).node
    return tuple(trunk.tree.tokens[n] for n in trunk.tree.path(node))


@dataclass(frozen=True)
class Group:
    """Pairs that share forward passes: equal length and equal starts."""

    pairs: tuple[int, ...]
    length: int
    starts: tuple[tuple[int, int], ...]  # (column, position)
    whole: bool

    @property
    def first(self) -> int:
        return min(start for _, start in self.starts)


def plan(
    pairs: Sequence[TokenPair], positions: str | Sequence[str], direction: Direction
) -> tuple[tuple[str, ...], list[Group]]:
    """Return the names of the columns, and the groups of pairs that can share forward passes."""
    patches = direction in ("denoise", "noise")
    lengths = sorted({len(p.clean) for p in pairs})
    earliest = min(p.first_difference for p in pairs)
    if (positions == "each" or (positions == "all" and direction in ("mean", "resample"))) and len(lengths) > 1:
        raise PatchError(
            f"positions={positions!r} with {direction} needs pairs of one length, but there are {len(lengths)}, from "
            f"{lengths[0]} to {lengths[-1]} tokens; sweep each length separately, or use roles"
        )
    columns = (positions,) if isinstance(positions, str) else tuple(positions)
    if positions == "each":
        columns = tuple(str(p) for p in range(earliest, lengths[0]))
    together: dict[tuple[int, tuple[tuple[int, int], ...]], list[int]] = {}
    for i, pair in enumerate(pairs):
        n = len(pair.clean)
        if positions == "each":
            begin = pair.first_difference if patches else earliest
            starts = tuple((p - earliest, p) for p in range(begin, n))
        elif positions == "all":
            starts = ((0, pair.first_difference if patches else 0),)
        else:
            missing = [c for c in columns if c not in pair.roles]
            if missing or not columns:
                raise PatchError(f"positions={positions!r} is not possible: pair {i} has the roles "
                                 f"{', '.join(pair.roles)}; expected some of them, 'each' or 'all'")  # fmt: skip
            starts = tuple((c, pair.roles[name]) for c, name in enumerate(columns))
        together.setdefault((n, starts), []).append(i)
    return columns, [Group(tuple(who), n, starts, positions == "all") for (n, starts), who in together.items()]
