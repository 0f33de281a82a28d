"""The visible facts of a world, and short sentences that describe them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from nextstate.envs.textworld.world import Command, Exit, Variable, World


@dataclass(frozen=True, eq=False)
class Sight:
    """What a player of a world sees, and the sentences that describe it.

    A scope is a mask of facts whose truth, yes or no, the words settle. The words are made of it and the reader learns
    from it, so that nobody knows more than what stands in the transcript.
    """

    world: World

    @cached_property
    def variables(self) -> dict[str, list[Variable]]:
        """The variables of each entity."""
        out: dict[str, list[Variable]] = {}
        for variable in self.world.variables:
            out.setdefault(variable.entity, []).append(variable)
        return out

    @cached_property
    def inside(self) -> dict[str, int]:
        """For each room, container, supporter, and the player's hands ("I"), the facts that something is there."""
        out: dict[str, int] = {}
        for k, (predicate, *rest) in enumerate(self.world.facts):
            if predicate in ("at", "in", "on") and len(rest) == 2 and rest[0] != "P":
                out[rest[1]] = out.get(rest[1], 0) | 1 << k
        return out

    @cached_property
    def states(self) -> dict[str, int]:
        """For each entity the facts about what state it is in."""
        return {
            entity: _union(v.mask for v in own if not v.place)
            for entity, own in self.variables.items()
            if any(not v.place for v in own)
        }

    @cached_property
    def opened(self) -> dict[str, int]:
        """For each container the fact that it is open; those without can always be looked into."""
        return {f[1]: 1 << k for k, f in enumerate(self.world.facts) if f[0] == "open" and len(f) == 2}

    @cached_property
    def furniture(self) -> dict[str, tuple[str, ...]]:
        """For each room the things with names that cannot be moved out of it."""
        names, out = self.world.names, dict[str, list[str]]()
        for predicate, *rest in self.world.fixed:
            if predicate == "at" and len(rest) == 2 and names[rest[0]]:
                out.setdefault(rest[1], []).append(rest[0])
        return {room: tuple(sorted(things, key=lambda t: names[t])) for room, things in out.items()}

    @cached_property
    def exits(self) -> dict[str, tuple[Exit, ...]]:
        """For each room the ways out."""
        out: dict[str, list[Exit]] = {}
        for way in self.world.exits:
            out.setdefault(way.room, []).append(way)
        return {room: tuple(ways) for room, ways in out.items()}

    def can_see_into(self, holder: str, facts: int) -> bool:
        """Tell whether the contents of a container or supporter can be seen from beside it."""
        closed = self.opened.get(holder)
        if closed is None:
            return ("closed", holder) not in self.world.fixed and ("locked", holder) not in self.world.fixed
        return bool(facts & closed)

    def of_room(self, facts: int) -> int:
        """Return the scope of a look at the room the player is in."""
        room = self.world.room(facts)
        scope = self.world.whereabouts | self.inside.get(room, 0)
        for thing in self.furniture.get(room, ()):
            scope |= self.of_thing(thing, facts)
        for way in self.exits.get(room, ()):
            scope |= self.states.get(way.door, 0)
        return scope

    def of_thing(self, thing: str, facts: int) -> int:
        """Return the scope of a look at a thing: its state, and what is in or on it, if that can be seen."""
        scope = self.states.get(thing, 0)
        if self.can_see_into(thing, facts):
            scope |= self.inside.get(thing, 0)
        return scope

    def of_step(self, command: Command, facts: int) -> int:
        """Return the scope of the outcome of a command, after which `facts` hold."""
        touched = command.adds | command.removes
        if touched & self.world.whereabouts or command.rule == "look":
            return self.of_room(facts)
        if command.rule == "inventory":
            return self.inside.get("I", 0)
        if not touched:
            return _union(
                self.of_thing(thing, facts) | _union(v.mask for v in self.variables.get(thing, ()))
                for thing in command.named
            )
        scope = 0
        for variable in self.world.variables:
            if touched & variable.mask:
                scope |= variable.mask
                if touched & facts & self.opened.get(variable.entity, 0):
                    scope |= self.inside.get(variable.entity, 0)
        return scope

    def mentioned(self, scope: int, facts: int, text: str) -> int:
        """Return the part of a scope that a text of somebody else settles.

        That something is not in the scope's places goes without saying. That it is there, or what state it is in, is
        determined if the text contains its name, and for a state also the word for the state.
        """
        text, full = text.casefold(), self.world.full(facts)
        for v in self.world.variables:
            if scope & full & v.mask:
                word = v.words[self.world.value(v, facts)]
                wanted = [word] if v.entity == "P" else [self.world.names[v.entity], *([] if v.place else [word])]
                if not all(w.casefold() in text for w in wanted):
                    scope &= ~v.mask
        return scope

    def opening(self, facts: int) -> str:
        """Return our words for the start: the room, and what the player holds."""
        return " ".join([*self._room(facts), *self._contents("I", facts)])

    def outcome(self, command: Command, facts: int) -> str:
        """Return our words for the outcome of a command, after which `facts` hold."""
        touched = command.adds | command.removes
        if touched & self.world.whereabouts or command.rule == "look":
            return " ".join(self._room(facts))
        if command.rule == "inventory":
            return " ".join(self._contents("I", facts) or ["You have nothing in your hands."])
        sentences: list[str] = []
        if not touched:
            for thing in command.named:
                sentences += [self.sentence(v, facts) for v in self.variables.get(thing, ())]
                sentences += self._contents(thing, facts) if self.can_see_into(thing, facts) else []
            return " ".join(sentences or ["You see nothing special."])
        for variable in self.world.variables:
            if touched & variable.mask:
                sentences.append(self.sentence(variable, facts))
                if touched & facts & self.opened.get(variable.entity, 0):
                    sentences += self._contents(variable.entity, facts)
        return " ".join(sentences)

    def stem(self, variable: Variable) -> str:
        """Return the words that a value of the variable completes."""
        return "You are in the" if variable.entity == "P" else f"The {self.world.names[variable.entity]} is"

    def sentence(self, variable: Variable, facts: int) -> str:
        """Return a variable's value in words."""
        return f"{self.stem(variable)} {variable.words[self.world.value(variable, facts)]}."

    def _room(self, facts: int) -> list[str]:
        world, room = self.world, self.world.room(facts)
        sentences = [f"You are in the {world.names[room]}."] if room else []
        for thing in self.furniture.get(room, ()):
            own = [self.sentence(v, facts) for v in self.variables.get(thing, ()) if not v.place]
            if self.can_see_into(thing, facts):
                own += self._contents(thing, facts)
            sentences += own or [f"The {world.names[thing]} is in the {world.names[room]}."]
        sentences += self._contents(room, facts, empty=False)
        for way in self.exits.get(room, ()):
            where = way.words.removeprefix("go ")
            if way.door:
                sentences.append(f"The {world.names[way.door]} leads {where}.")
                sentences += [self.sentence(v, facts) for v in self.variables.get(way.door, ())]
            else:
                sentences.append(f"You can go {where}." if where != way.words else f"You can {where}.")
        return sentences

    def _contents(self, holder: str, facts: int, empty: bool = True) -> list[str]:
        held = facts & self.inside.get(holder, 0)
        sentences = [
            self.sentence(v, facts)
            for v in self.world.variables
            if v.place and held & v.mask and v.entity != "P"
        ]  # fmt: skip
        if not sentences and empty and holder in self.inside and self.world.types[holder] != "I":
            supports = self.world.types[holder] == "s" or any(
                f[0] == "on" and f[2] == holder for f in self.world.describe(self.inside[holder])
            )
            sentences = [f"Nothing is {'on' if supports else 'in'} the {self.world.names[holder]}."]
        return sentences


def _union(masks: Iterable[int]) -> int:
    out = 0
    for mask in masks:
        out |= mask
    return out
