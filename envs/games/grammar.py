"""Strings of a layered context-free grammar, read token by token ("Physics of Language Models: Part 1", 2305.13673)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, final

import numpy as np

from nextstate.envs.game import (
    Action,
    Distribution,
    Feedback,
    Game,
    Question,
    Reader,
    Sample,
    State,
    require,
    require_whole,
)
from nextstate.envs.grammar import sources
from nextstate.envs.grammar.frequencies import frequencies
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.reading import read
from nextstate.envs.grammar.sizes import bounds, n_beginnings, n_states
from nextstate.envs.grammar.walk import Place, ancestors, chosen, draw, ends, following

END: Place = ()  # the action that closes a string
CLOSED = "end"
BOOL = (" no", " yes")
LARGEST = 2**63 - 1  # that a table holds
LONGEST = 1_000_000  # tokens of a string
MOST_ACTIONS = 1_000_000  # in a state
DRAWN: Mapping[str, Any] = {  # the settings of grammars that are drawn, and what they are by default
    "levels": 4,
    "symbols": 3,
    "rules_min": 2,
    "rules_max": 2,
    "length_min": 2,
    "length_max": 3,
    "distinct_symbols": False,
    "distinct_bodies": True,
    "game_seed": 0,
}


@final
@dataclass(frozen=True)
class CFG(Game):
    """Strings of a layered context-free grammar, one after another; each step adds a token or ends the string.

    A state is the derivation of the string so far: for each token its place in the rules that led to it
    (`nextstate.envs.grammar.walk`). Nothing ahead is drawn before it is reached. An action is the place of the next
    token; the game's own draws are the grammar's, so that tokens are as likely as they are in its strings. After the
    end a new string begins. |Q| is `nextstate.envs.grammar.sizes.n_states`, given as long as it fits 63 bits.

    Questions, each on a branch: "next", a token with which the string can go on (every one that some string of the
    grammar has there is right, "end" where it can be over); "level l", the ancestor of the token at each level between
    root and terminals; "end l", whether that ancestor ends here; "complete", whether the tokens so far are a string of
    the grammar.

    Ideal reader: knows the grammar and the tokens; its beliefs are the exact posterior
    (`nextstate.envs.grammar.reading`). Shortcuts know the grammar too, but of the tokens none ("most_frequent") or the
    last one only ("bigram").

    Args:
        style: "plain", or "rules", where the opening lists all rules.
        grammar: name of a published grammar, cfg3b to cfg3k; "" for none.
        file: path of a grammar file. See `nextstate.envs.grammar.grammar.Grammar.read`.
        levels: number of levels of symbols, including root and terminals, 2 to 12. If neither `grammar` nor `file` is
            given, a grammar is drawn with this and the settings up to `distinct_bodies`
            (`nextstate.envs.grammar.sources.random_grammar`).
        symbols: number of symbols at each level but the root's.
        rules_min: the fewest rules of a symbol.
        rules_max: the most rules of a symbol.
        length_min: the shortest length of a rule.
        length_max: the greatest length of a rule.
        distinct_symbols: no symbol twice in a rule.
        distinct_bodies: no body twice at a level, so that a body determines its symbol.
        game_seed: seed of the grammar that is drawn, and of the tokens in overlapping bags.
        vocabulary: number of tokens that replace the terminals, each by a bag of tokens. See `sources.implicit`.
        overlap: bags share tokens.
        skewed: the tokens of a bag have different probabilities.
    """

    name: ClassVar[str] = "CFG"
    size: ClassVar[str] = "levels"
    sizes: ClassVar[range] = range(2, 13)
    shortcuts: ClassVar[tuple[str, ...]] = ("most_frequent", "bigram")
    feedbacks: ClassVar[tuple[Feedback, ...]] = ("branch",)
    styles: ClassVar[tuple[str, ...]] = ("plain", "rules")
    contrasts: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # one other token seldom changes one answer alone

    style: str = "plain"
    grammar: str = ""
    file: str = ""
    levels: int | None = None
    symbols: int | None = None
    rules_min: int | None = None
    rules_max: int | None = None
    length_min: int | None = None
    length_max: int | None = None
    distinct_symbols: bool | None = None
    distinct_bodies: bool | None = None
    game_seed: int = 0
    vocabulary: int | None = None
    overlap: bool = False
    skewed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("game_seed", self.game_seed, 0, 2**31 - 1)
        for name in ("distinct_symbols", "distinct_bodies", "overlap", "skewed"):
            value = getattr(self, name)
            require(value is None or isinstance(value, bool), name, value, "true or false")
        require(not (self.grammar and self.file), "file", self.file, f"'' with grammar={self.grammar!r}")
        if self.vocabulary is None:
            require(not self.overlap, "overlap", self.overlap, "false without a vocabulary")
            require(not self.skewed, "skewed", self.skewed, "false without a vocabulary")
        if self.grammar or self.file:
            made = sources.published(self.grammar) if self.grammar else sources.read_file(self.file)
            self._fixed(made)
        else:
            for name, default in DRAWN.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, default)
            drawn = {name: getattr(self, name) for name in DRAWN if name != "game_seed"}
            made = sources.random_grammar(np.random.default_rng(self.game_seed), **drawn)
        if self.vocabulary is not None:
            bags = np.random.default_rng([self.game_seed, 1])
            made = sources.implicit(made, bags, self.vocabulary, self.overlap, self.skewed)
        longest, widest = bounds(made)[0][1], n_beginnings(made)
        require(
            longest <= LONGEST, "levels", self.levels, f"fewer, or shorter rules: strings have up to {longest:,} tokens"
        )
        require(
            widest <= MOST_ACTIONS, "levels", self.levels, f"fewer, or fewer rules: strings begin in {widest:,} ways"
        )
        for word in made.symbols:
            require(word.isascii() and word.isprintable(), "symbol", word, "printable ASCII")
        require(CLOSED not in made.terminals, "terminal", CLOSED, f"another word, since {CLOSED!r} closes strings")
        object.__setattr__(self, "_rules", made)

    def _fixed(self, made: Grammar) -> None:
        """Refuse settings that a given grammar does not have, but for the number of levels that it does have."""
        kind = f"grammar={self.grammar!r}" if self.grammar else f"file={self.file!r}"
        for name in DRAWN:
            value = getattr(self, name)
            if name == "levels":
                many = len(made.levels)
                require(value in (None, many), name, value, f"None or {many} with {kind}, which has that many")
                object.__setattr__(self, name, many)
            elif name != "game_seed":
                require(value is None, name, value, f"None with {kind}, which has no such setting")

    @classmethod
    def sample(cls, rng: np.random.Generator, size: int, level: int) -> Sample:
        """Draw strings of the default grammar with up to 5 levels, whose rules are given in half of the episodes."""
        game = cls(levels=min(size, 5), style=cls.styles[int(rng.integers(2))])
        return Sample(game, int(rng.integers(4, 25)), 2)

    @property
    def rules(self) -> Grammar:
        """The grammar, with the terminals' bags where they are hidden."""
        made: Grammar = self._rules  # type: ignore[attr-defined]
        return made

    @cached_property
    def max_choices(self) -> int:
        return max(2, len(self.rules.terminals) + 1, *map(len, self.rules.levels))

    def initial(self, rng: np.random.Generator) -> tuple[Place, ...]:
        return ()

    def actions(self, state: State) -> Sequence[Place]:
        places = _places(state)
        return following(self.rules, places[-1] if places else ()) or (END,)

    def transition(self, state: State, action: Action) -> tuple[Place, ...]:
        place = _place(action)
        return () if place == END else (*_places(state), place)

    def policy(self, state: State, u: float) -> Place:
        places = _places(state)
        return draw(self.rules, places[-1] if places else (), u) or END

    def tokens(self, state: State) -> tuple[int, ...]:
        """Return the string so far, as indices of terminals."""
        first = self.rules.first[-1]
        return tuple([ancestors(self.rules, place)[-1] - first for place in _places(state)])

    def values(self, state: State) -> Mapping[str, str]:
        places, rules = _places(state), self.rules
        now = read(rules, self.tokens(state)).following
        out = {"next": _next_choices(rules)[now.index(max(now))].strip()}  # of those that are right the likeliest
        above = ancestors(rules, places[-1]) if places else ()
        over = ends(rules, places[-1]) if places else ()
        for level in range(2, len(rules.levels)):
            out[f"level {level}"] = rules.symbols[above[level - 1]] if above else "none"
        for level in range(2, len(rules.levels)):
            out[f"end {level}"] = BOOL[bool(over) and over[level - 1]].strip()
        return {**out, "complete": BOOL[now[-1] > 0].strip()}

    def opening(self, state: State) -> str:
        return _opening(self.rules, self.style) + "".join([f" {self.rules.terminals[t]}" for t in self.tokens(state)])

    def narrate(self, state: State, action: Action, next_state: State) -> str:
        return f" {self._word(action)}"

    def _word(self, action: Action) -> str:
        place = _place(action)
        return CLOSED if place == END else self.rules.symbols[ancestors(self.rules, place)[-1]]

    def questions(self, state: State, action: Action, next_state: State) -> tuple[Question, ...]:
        places, rules = _places(next_state), self.rules
        now = read(rules, self.tokens(next_state)).following
        # What follows is drawn when it is reached: the likeliest one stands for all that are right.
        right = tuple([i for i, p in enumerate(now) if p])
        asked = [Question("next", "", _next_choices(rules), now.index(max(now)), right, "")]
        if not places:
            return tuple(asked)
        above, over = ancestors(rules, places[-1]), ends(rules, places[-1])
        for level in range(2, len(rules.levels)):
            truth = above[level - 1] - rules.first[level - 1]
            stem = f"\nAt level {level} that is within"
            asked.append(Question(f"level {level}", stem, _level_choices(rules, level), truth, (truth,)))
        for level in range(2, len(rules.levels)):
            truth = int(over[level - 1])
            asked.append(Question(f"end {level}", f"\nA part of level {level} ends here:", BOOL, truth, (truth,)))
        truth = int(now[-1] > 0)
        asked.append(Question("complete", "\nThat can be a whole string:", BOOL, truth, (truth,)))
        return tuple(asked)

    def command(self, state: State, action: Action) -> str:
        place = _place(action)
        if place == END:
            return CLOSED
        places = _places(state)
        rules = chosen(self.rules, places[-1] if places else (), place)
        by = f" by {'rule' if len(rules) == 1 else 'rules'} {' '.join([str(r + 1) for r in rules])}" if rules else ""
        return f"write {self._word(place)}{by}"

    def size_of(self, state: State) -> int | None:
        """Return |Q|; None where it needs more than 63 bits, which no table holds."""
        return self._states if self._states <= LARGEST else None

    @cached_property
    def _states(self) -> int:
        return n_states(self.rules)

    def reader(self, state: State) -> Reader:
        return CFGReader(self.rules, self.tokens(state))


class CFGReader(Reader):
    """Knows the grammar, and remembers the tokens of the string."""

    def __init__(self, rules: Grammar, tokens: tuple[int, ...]) -> None:
        self.rules, self.tokens = rules, tokens

    def observe(self, action: Action) -> None:
        place = _place(action)
        # Only the token of the place is known.
        token = ancestors(self.rules, place)[-1] - self.rules.first[-1]
        self.tokens = () if place == END else (*self.tokens, token)

    def guess(self, name: str, question: Question) -> Distribution:
        kind, _, number = question.variable.partition(" ")
        level = int(number or 0)
        if name == "ideal":
            known = read(self.rules, self.tokens)
            if kind == "complete":
                return (0.0, 1.0) if known.complete else (1.0, 0.0)
            if kind == "end":
                return _yes(known.ends[level - 1])
            return known.following if kind == "next" else known.ancestors[level - 1]
        if name not in CFG.shortcuts:
            raise KeyError(name)
        seen = self.tokens[-1] if self.tokens else len(self.rules.terminals)
        return _frequent(self.rules, kind, level, seen if name == "bigram" else None)


@lru_cache(maxsize=4096)
def _frequent(rules: Grammar, kind: str, level: int, last: int | None) -> Distribution:
    """Return how often the answers to a question are right in strings, of all tokens or only of `last`."""
    table = frequencies(rules)
    those = slice(None) if last is None else slice(last, last + 1)
    if kind == "level":
        counts = table.under[level - 1][:, those].sum(axis=1)
        return tuple((counts / counts.sum()).tolist())
    if kind == "next":
        counts = table.pairs[those].sum(axis=0)
        return tuple((counts / counts.sum()).tolist())
    whole = table.ends[0 if kind == "complete" else level - 1, those].sum()
    return _yes(float(whole / table.under[0][0, those].sum()))


def _yes(p: float) -> Distribution:
    p = min(1.0, p)  # sums of rounded numbers
    return 1 - p, p


@lru_cache(maxsize=256)
def _opening(rules: Grammar, style: str) -> str:
    head = f"Strings are made of {', '.join(rules.terminals)}, and closed by {CLOSED}.\nStrings:"
    return f"Rules, from level 1 down:\n{rules}{head}" if style == "rules" else head


@lru_cache(maxsize=256)
def _next_choices(rules: Grammar) -> tuple[str, ...]:
    return tuple([f" {word}" for word in (*rules.terminals, CLOSED)])


@lru_cache(maxsize=256)
def _level_choices(rules: Grammar, level: int) -> tuple[str, ...]:
    return tuple([f" {word}" for word in rules.levels[level - 1]])


def _places(state: State) -> tuple[Place, ...]:
    assert isinstance(state, tuple)
    return state


def _place(action: Action) -> Place:
    assert isinstance(action, tuple)
    return action
