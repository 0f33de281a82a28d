"""A TextWorld game's logic as bit masks: the facts that can change, what commands do to them, and its variables.

A compiled world needs no TextWorld: it steps by a few operations on whole numbers, and is kept as JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Self

from nextstate.envs.game import GameError

Fact = tuple[str, ...]  # a predicate and the ids of what it is about, such as ("in", "o_0", "c_1")

OPPOSITE = {"go north": "go south", "go south": "go north", "go east": "go west", "go west": "go east"}
PLACES = ("at", "in", "on")  # predicates that say where something is
MOST_COMMANDS = 20_000
MOST_STATES = 20_000
_TRIES = 2_000  # groups of facts looked at in search of a variable
_WORDS = {"needs_cooking": "uncooked"}


class Command(NamedTuple):
    """A command with all its names filled in, and what it does: where all of `needs` hold, `adds` and `removes`.

    Masks have bit k set where fact k is meant.
    """

    rule: str  # its name in the game's logic, such as "take/c"
    words: str  # what a player types
    named: tuple[str, ...]  # ids of what the words name
    needs: int
    adds: int
    removes: int


class Variable(NamedTuple):
    """Something that always has one of several values: where a thing is, or what state it is in.

    Value k holds where bit `bits[k]` is set. Where `otherwise`, the last value has a bit beyond all facts, and holds
    where none of the others does.
    """

    name: str
    entity: str
    place: bool  # it says where the entity is
    bits: tuple[int, ...]
    words: tuple[str, ...]  # the text of each value, after "is" ("You are in the" for the player)
    otherwise: bool

    @property
    def mask(self) -> int:
        """The bits of all values."""
        return _mask(self.bits)


class Exit(NamedTuple):
    """A way out of a room: the command that takes it, where it leads, and its door's id ("" where it has none)."""

    words: str
    room: str
    to: str
    door: str


class Quest(NamedTuple):
    """What gives points: done for good where all facts of any of `wins` hold; where those of a `fails` do, all is lost.

    `optional` ones need not be done to win.
    """

    reward: int
    wins: tuple[int, ...]
    fails: tuple[int, ...]
    optional: bool


@dataclass(frozen=True)
class World:
    """One game. Made by `World.compile`, or `World.from_json` of what `to_json` gave; equal by value.

    Args:
        names: the name of each entity by its id; "" where it has none.
        types: the type of each entity by its id: "r" rooms, "d" doors, "c" containers, "s" supporters, and so on.
        facts: those that can change; fact k is bit k.
        fixed: those that cannot and are true.
        start: the facts that are true when the game begins, as bits.
        commands: all that can ever be given, in the order in which TextWorld lists them.
        quests: what gives points.
        objective: the text of the player's objective.
        walkthrough: commands that win, () where the game has none.
        n_states, n_transitions: exact |Q| and |T|; None where not counted, or more than were looked at.
        seed, recipe, source: where the game comes from; `source` is the path of a user's file.
    """

    names: Mapping[str, str]
    types: Mapping[str, str]
    facts: tuple[Fact, ...]
    fixed: tuple[Fact, ...]
    start: int
    commands: tuple[Command, ...]
    variables: tuple[Variable, ...]
    quests: tuple[Quest, ...]
    objective: str = ""
    walkthrough: tuple[str, ...] = ()
    n_states: int | None = None
    n_transitions: int | None = None
    seed: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return World.from_json, (
            self.to_json(),
        )  # without what was worked out: hashes of text differ in other processes

    @cached_property
    def _hash(self) -> int:
        return hash((self.facts, self.start, self.commands, self.seed))

    @classmethod
    def compile(cls, game: Any) -> Self:
        """Compile a `textworld.Game`.

        Every command that might ever be given is found by giving TextWorld's own logic a world in which facts only ever
        become true (a relaxed reachability analysis), until nothing new is found.

        Raises:
            GameError: the game is not one of finitely many states, or too large; the message says why.
        """
        actions, holds = _ground(game)
        names = {entity: info.name or "" for entity, info in game.infos.items()}
        types = {entity: str(info.type) for entity, info in game.infos.items()}
        changing = {f for a in actions for f in (*a.added, *a.removed)}
        facts = sorted(_fact(f) for f in changing)
        bit = {fact: k for k, fact in enumerate(facts)}
        initial = {_fact(f) for f in game.world.facts}
        start = _mask(bit[f] for f in initial if f in bit)
        texts = _command_texts(game, actions)
        commands = tuple(
            Command(
                str(action.name),
                words,
                tuple(dict.fromkeys(re.findall(r"{(\w+)}", action.command_template or ""))),
                _mask(bit[f] for f in map(_fact, action.preconditions) if f in bit),
                _mask(bit[_fact(f)] for f in action.added),
                _mask(bit[_fact(f)] for f in action.removed),
            )
            for action, words in zip(actions, texts, strict=True)
        )
        possible = {_fact(f) for f in holds}
        quests = tuple(_quest(q, bit, initial, possible) for q in game.quests)
        return cls(
            names=names,
            types=types,
            facts=tuple(facts),
            fixed=tuple(sorted(initial - set(facts))),
            start=start,
            commands=commands,
            variables=_variables(facts, start, commands, names, types),
            quests=quests,
            objective=str(game.objective or ""),
            walkthrough=tuple(str(c) for c in game.metadata.get("walkthrough") or ()),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the world as JSON types; masks are hexadecimal, as they have any number of bits."""
        out = {name: getattr(self, name) for name in self.__dataclass_fields__}
        out["start"] = hex(self.start)
        out["commands"] = [(c.rule, c.words, c.named, hex(c.needs), hex(c.adds), hex(c.removes)) for c in self.commands]
        out["quests"] = [(q.reward, [*map(hex, q.wins)], [*map(hex, q.fails)], q.optional) for q in self.quests]
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the world that `to_json` gave."""
        given = dict(data)
        given["facts"] = tuple(map(tuple, data["facts"]))
        given["fixed"] = tuple(map(tuple, data["fixed"]))
        given["start"] = int(data["start"], 16)
        given["commands"] = tuple(
            [Command(r, w, tuple(n), int(p, 16), int(a, 16), int(d, 16)) for r, w, n, p, a, d in data["commands"]]
        )
        given["variables"] = tuple([Variable(n, e, p, tuple(b), tuple(w), o) for n, e, p, b, w, o in data["variables"]])
        given["quests"] = tuple(
            [Quest(r, tuple(int(x, 16) for x in w), tuple(int(x, 16) for x in f), o) for r, w, f, o in data["quests"]]
        )
        given["walkthrough"] = tuple(data["walkthrough"])
        return cls(**given)

    @cached_property
    def bit(self) -> dict[Fact, int]:
        """The number of each fact."""
        return {fact: k for k, fact in enumerate(self.facts)}

    @cached_property
    def whereabouts(self) -> int:
        """The bits that say where the player is."""
        return _mask(k for k, fact in enumerate(self.facts) if fact[:2] == ("at", "P"))

    @cached_property
    def _menus(self) -> dict[int, tuple[tuple[int, int, bool], ...]]:
        """For each place of the player (as a bit): needs, index, and whether other commands have the same words."""
        rooms = [1 << k for k in range(len(self.facts)) if self.whereabouts >> k & 1] or [0]
        count: dict[str, int] = {}
        for command in self.commands:
            count[command.words] = count.get(command.words, 0) + 1
        return {
            room: tuple(
                (c.needs & ~room, i, count[c.words] > 1)
                for i, c in enumerate(self.commands)
                if not c.needs & self.whereabouts & ~room
            )
            for room in rooms
        }

    def legal(self, facts: int) -> tuple[int, ...]:
        """Return the indices of the commands that can be given; of several with the same words TextWorld's first."""
        given: set[str] = set()
        out = []
        for needs, i, shared in self._menus[facts & self.whereabouts]:
            if needs & facts == needs:
                if shared:
                    if self.commands[i].words in given:
                        continue
                    given.add(self.commands[i].words)
                out.append(i)
        return tuple(out)

    def after(self, facts: int, command: int) -> int:
        """Return the facts after a command."""
        _, _, _, _, adds, removes = self.commands[command]
        return facts & ~removes | adds

    def settle(self, facts: int, done: int) -> int:
        """Return which quests are done (bit k: quest k) once `facts` hold; bit `len(quests)` says that all is lost.

        As in the compiled game a quest that fails is looked at before what it wins, and no more once it is done.
        """
        for k, quest in enumerate(self.quests):
            if not done >> k & 1:
                if any(mask & facts == mask for mask in quest.fails):
                    done |= 1 << len(self.quests)
                elif any(mask & facts == mask for mask in quest.wins):
                    done |= 1 << k
        return done

    @cached_property
    def goal(self) -> int:
        """The quests that must be done to win, as bits; 0 where the game cannot be won."""
        return _mask(k for k, q in enumerate(self.quests) if q.wins and not q.optional)

    def won(self, done: int) -> bool:
        """Tell whether the game is won."""
        return bool(self.goal) and not self.lost(done) and done & self.goal == self.goal

    def lost(self, done: int) -> bool:
        """Tell whether the game is lost."""
        return bool(done >> len(self.quests))

    def points(self, done: int) -> int:
        """Return the score."""
        return sum(q.reward for k, q in enumerate(self.quests) if done >> k & 1)

    @property
    def most_points(self) -> int:
        """The score when all quests are done."""
        return sum(q.reward for q in self.quests if q.wins and (q.reward > 0 or not q.optional))

    @cached_property
    def _otherwise(self) -> tuple[tuple[int, int], ...]:
        """Bits of the other values, and the bit beyond the facts, of each variable that has such a value."""
        return tuple([(_mask(v.bits[:-1]), 1 << v.bits[-1]) for v in self.variables if v.otherwise])

    def full(self, facts: int) -> int:
        """Return the facts with the bits of values that hold because no other of their variable does."""
        for others, bit in self._otherwise:
            if not facts & others:
                facts |= bit
        return facts

    def value(self, variable: Variable, facts: int) -> int:
        """Return the index of a variable's value."""
        for k, bit in enumerate(variable.bits):
            if facts >> bit & 1:
                return k
        return len(variable.bits) - 1

    @cached_property
    def exits(self) -> tuple[Exit, ...]:
        """All ways from room to room."""
        doors = {(f[1], f[3]): f[2] for f in self.fixed if f[0] == "link" and len(f) == 4}
        out = []
        for c in self.commands:
            left, entered = self._room(c.removes & self.whereabouts), self._room(c.adds & self.whereabouts)
            if left and entered:
                out.append(Exit(c.words, left, entered, doors.get((left, entered), "")))
        return tuple(dict.fromkeys(out))

    @cached_property
    def symmetric(self) -> bool:
        """Whether every way goes back in the opposite direction, through the same door, and no two join two rooms."""
        ways = {(w.room, w.words): w for w in self.exits}
        back = [ways.get((w.to, OPPOSITE.get(w.words, ""))) for w in self.exits]
        both = zip(self.exits, back, strict=True)
        once = len({(w.room, w.to) for w in self.exits}) == len(ways) == len(self.exits)
        return once and all(b is not None and (b.to, b.door) == (w.room, w.door) for w, b in both)

    def room(self, facts: int) -> str:
        """Return the id of the room the player is in."""
        return self._room(facts & self.whereabouts)

    def _room(self, bit: int) -> str:
        return self.facts[bit.bit_length() - 1][2] if bit else ""

    def describe(self, bits: int) -> list[Fact]:
        """Return the facts whose bits are set."""
        return [fact for k, fact in enumerate(self.facts) if bits >> k & 1]

    def size(self, cap: int = MOST_STATES) -> tuple[int, int] | None:
        """Count |Q| and |T| of the game, played until it ends; None where there are more than `cap` states."""
        first = (self.start, 0)
        seen, queue, transitions = {first}, [first], 0
        for facts, done in queue:  # grows as it is walked
            if self.won(done) or self.lost(done):
                continue
            for command in self.legal(facts):
                transitions += 1
                _, _, _, _, adds, removes = self.commands[command]
                then = facts & ~removes | adds
                after = (then, done if then == facts else self.settle(then, done))
                if after not in seen:
                    if len(seen) == cap:
                        return None
                    seen.add(after)
                    queue.append(after)
        return len(seen), transitions


class _Situation(NamedTuple):
    world: World
    facts: int
    done: int


class Situation(_Situation):
    """A state: the world, the facts that hold (as bits), and the quests that are done (see `World.settle`).

    `past` holds the commands so far. It is kept only where the text is that of the compiled game, which is played
    along. Two situations are equal whatever their past.
    """

    past: tuple[str, ...] = ()


def _mask(bits: Iterable[int]) -> int:
    out = 0
    for k in bits:
        out |= 1 << k
    return out


def _fact(proposition: Any) -> Fact:
    return (str(proposition.name), *(str(v.name) for v in proposition.arguments))


def _ground(game: Any) -> tuple[list[Any], set[Any]]:
    """Return TextWorld's actions that might ever apply, in its order, and the facts that might ever hold."""
    from textworld.logic import State

    rules, constants = list(game.kb.rules.values()), game.kb.types.constants_mapping
    for rule in rules:
        bound = {ph for p in rule.preconditions for ph in p.parameters} | set(constants)
        loose = [str(ph) for ph in rule.placeholders if ph not in bound]
        if loose:
            raise GameError(f"rule {rule.name!r} makes up {', '.join(loose)}: expected rules over what there is")
    holds = set(game.world.facts)
    while True:
        actions: list[Any] = []
        for action in State(game.kb.logic, holds).all_applicable_actions(rules, constants):
            actions.append(action)
            if len(actions) > MOST_COMMANDS:
                raise GameError(f"the game is too large: more than {MOST_COMMANDS:,} commands; expected a smaller one")
        more = holds.union(*(a.postconditions for a in actions))
        if len(more) == len(holds):
            return actions, holds
        holds = more


def _command_texts(game: Any, actions: list[Any]) -> list[str]:
    from textworld.generator.inform7 import Inform7Game

    for action in actions:
        if action.name not in game.kb.inform7_commands:
            raise GameError(f"rule {action.name!r} has no command: expected one for each rule of the game's logic")
    return [str(words) for words in Inform7Game(game).gen_commands_from_actions(actions)]


def _quest(quest: Any, bit: Mapping[Fact, int], initial: set[Fact], possible: set[Fact]) -> Quest:
    if quest.repeatable:
        raise GameError("a quest can be repeated without end, so that the score has no bound: expected finite quests")

    def masks(events: Iterable[Any]) -> tuple[int, ...]:
        wanted = [{_fact(f) for f in e.condition.preconditions} for e in events]
        # What can never hold never triggers; what never changes and holds need not be looked at.
        can = [w for w in wanted if w <= possible and all(f in bit or f in initial for f in w)]
        return tuple(_mask(bit[f] for f in w if f in bit) for w in can)

    return Quest(int(quest.reward), masks(quest.win_events), masks(quest.fail_events), bool(quest.optional))


def _variables(
    facts: list[Fact], start: int, commands: tuple[Command, ...], names: Mapping[str, str], types: Mapping[str, str]
) -> tuple[Variable, ...]:
    """Return the variables of everything that has a name: first the player's, then by kind and name."""
    order = sorted({f[1] for f in facts}, key=lambda e: (e != "P", types[e] in ("d", "c"), names[e], e))
    out: list[Variable] = []
    beyond = len(facts)
    for entity in order:
        if not names[entity] and entity != "P":
            continue
        own = [k for k, fact in enumerate(facts) if fact[1] == entity]
        left = list(own)
        place = [k for k in own if facts[k][0] in PLACES]
        groups = []
        if place:
            group = _group(place, own, facts, start, commands) or place
            groups.append((True, group))
            left = [k for k in left if k not in group]
        while left:
            seeds = [k for k in left if start >> k & 1]
            found = [g for k in seeds if (g := _group([k], left, facts, start, commands)) and len(g) > 1]
            if not found:
                break
            best = max(found, key=len)
            groups.append((False, best))
            left = [k for k in left if k not in best]
        groups += [(False, [k]) for k in left if len(facts[k]) == 2]
        for is_place, group in groups:
            mask = _mask(group)
            otherwise = not start & mask or any(c.removes & mask and not c.adds & mask for c in commands)
            words = [_word(facts[k], names, types, entity == "P") for k in group]
            if otherwise:
                words.append("gone" if is_place else f"not {words[0]}")
                group = [*group, beyond]
                beyond += 1
            taken = any(v.name == names[entity] for v in out)
            name = f"{names[entity]}: {'/'.join(words)}" if taken else names[entity] or "player"
            if len(set(words)) < len(words):
                raise GameError(f"two things have one name: the {names[entity]} can be {', '.join(words)}")
            out.append(Variable(name, entity, is_place, tuple(group), tuple(words), otherwise))
    return tuple(out)


def _group(
    seed: list[int], own: list[int], facts: list[Fact], start: int, commands: tuple[Command, ...]
) -> list[int] | None:
    """Return the largest group of an entity's facts around `seed` of which always exactly one holds, None if none does.

    Where a command takes away a fact of the group and adds none, one of those that it adds is tried as a further one.
    """
    everything = _mask(own)
    effects = {(c.adds & everything, c.removes & everything) for c in commands} - {(0, 0)}
    best: int | None = None
    stack, seen = [_mask(seed)], set[int]()
    while stack and len(seen) < _TRIES:
        mask = stack.pop()
        if mask in seen:
            continue
        seen.add(mask)
        if (start & mask).bit_count() > 1:
            continue
        grow: int | None = None
        balanced = (start & mask).bit_count() == 1
        for adds, removes in effects:
            plus, minus = (adds & mask).bit_count(), (removes & mask).bit_count()
            if plus > 1 or minus > 1 or plus > minus:
                balanced = False
            elif minus > plus:
                balanced = False
                if grow is None and adds:
                    grow = adds
        if balanced and (best is None or mask.bit_count() > best.bit_count()):
            best = mask
        if grow is not None:
            stack += [mask | 1 << k for k in own if grow >> k & 1]
    return None if best is None else [k for k in own if best >> k & 1]


def _word(fact: Fact, names: Mapping[str, str], types: Mapping[str, str], player: bool) -> str:
    predicate, *rest = fact
    if len(fact) == 2:
        return _WORDS.get(predicate, predicate.replace("_", " "))
    other = rest[-1]
    if player:
        return names[other]
    if types[other] == "I":
        return "in your hands"
    return f"{'on' if predicate == 'on' else 'in'} the {names[other]}"
