"""The reader of TextWorld games, who knows TextWorld's rules and which values the transcript leaves possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from nextstate.envs.game import Action, Distribution, Question, Reader, one_hot, uniform
from nextstate.envs.textworld.words import Sight
from nextstate.envs.textworld.world import OPPOSITE, Command, Variable


class Told(NamedTuple):
    """The content of a segment of the transcript: the facts that hold, and which of them it determines."""

    facts: int
    scope: int


class AdventureReader(Reader):
    """Keeps the possible values of each variable.

    It knows the effects of every command, that only legal commands are given, and that facts only change by commands.
    Unknown variables are uniform over the values that the transcript does not rule out. A door seen from two rooms
    leads from one to the other. If all exits of the game are symmetric, and no two join the same rooms, it uses this
    too: an exit not taken yet leads to a room not seen yet, or to one with an unexplored exit in the opposite
    direction. It uses no other knowledge of how TextWorld generates worlds, so that it is a reader of possible values
    and not Bayes' rule.

    Args:
        sight: the world, and the facts that its texts determine.
        start: the content of the opening.
        step: maps (facts, command) to the content of the command's outcome.
    """

    def __init__(self, sight: Sight, start: Told, step: Callable[[int, Command], Told]) -> None:
        self.sight, self.world, self.step = sight, sight.world, step
        self.index = {v.name: v for v in self.world.variables}
        self.last: dict[str, int] = {}  # the last value told of each variable
        self.first: dict[str, int] = {}
        self.links: dict[tuple[str, str], str] = {}  # (room, words of an exit) -> where it leads
        self.doors: dict[str, set[str]] = {}  # for each door the rooms from which it was seen
        self.visited: set[str] = set()
        self.effect: dict[str, int] = {}  # values that the words of the last command alone settle
        self.maybe = self._unread()
        self.pending: Told | None = start
        self.came: tuple[str, str] | None = None  # room and command of a move whose outcome is not yet read
        self.facts = start.facts

    def _unread(self) -> int:
        """Return the values that may be before anything was read: each thing is somewhere, in some state."""
        world, maybe = self.world, 0
        for v in world.variables:
            if not v.place:
                maybe |= v.mask
            elif v.otherwise and not world.start & v.mask:
                maybe |= 1 << v.bits[-1]  # what is made during the game is not there before
            else:
                maybe |= sum(1 << b for b in v.bits if b < len(world.facts) and len(world.facts[b]) > 2)
        return maybe

    def observe(self, action: Action) -> None:
        assert isinstance(action, int)
        self._read()
        command = self.world.commands[action]
        self._follow(command)
        self.facts = self.world.after(self.facts, action)
        self.pending = self.step(self.facts, command)

    def _read(self) -> None:
        """Take in what was told after the last questions."""
        assert self.pending is not None
        facts, scope = self.pending
        full = self.world.full(facts)
        for v in self.world.variables:
            seen = scope & v.mask
            if not seen:
                continue
            if v.otherwise and seen == v.mask & ~(1 << v.bits[-1]):
                seen = v.mask
            if seen & full:
                self._settle(v, seen & full)
                self.last[v.name] = self.world.value(v, facts)
                self.first.setdefault(v.name, self.last[v.name])
            else:
                self.maybe &= ~seen
        if scope & self.world.whereabouts:
            self._arrive(self.world.room(facts))

    def _arrive(self, room: str) -> None:
        ways = {way.words: way for way in self.sight.exits.get(room, ())}
        if self.came is not None:
            left, words = self.came
            if left != room:
                self.links[left, words] = room
                back = OPPOSITE.get(words, "")
                if back in ways and self.world.symmetric:
                    self.links[room, back] = left
            self.came = None
        self.visited.add(room)
        for way in ways.values():
            if way.door:
                self.doors.setdefault(way.door, set()).add(room)

    def _settle(self, variable: Variable, bit: int) -> None:
        self.maybe = self.maybe & ~variable.mask | bit

    def _follow(self, command: Command) -> None:
        """Take in a command: that it could be given, and what it does."""
        world, room = self.world, self.world.room(self.facts)
        known = {"P", "I", room, *command.named}
        self.effect = {}

        def stated(bit: int) -> bool:
            return all(e in known or (world.names[e] and world.names[e] in command.words) for e in world.facts[bit][1:])

        for v in world.variables:
            needed = [b for b in v.bits if command.needs >> b & 1 and stated(b)] if command.needs & v.mask else []
            if needed:
                self._settle(v, 1 << needed[0])
            if not (command.adds | command.removes) & v.mask:
                continue
            if v.entity == "P":
                self.came = room, command.words
                self._settle(v, self._ahead(v, room, command.words))
                continue
            new = [b for b in v.bits if command.adds >> b & 1] or [v.bits[-1]]
            if stated(new[0]) if new[0] < len(world.facts) else v.entity in known:
                self._settle(v, 1 << new[0])
                self.effect[v.name] = v.bits.index(new[0])
            else:
                self.maybe |= 1 << new[0]  # it may be what the command did, which its words do not say

    def _ahead(self, player: Variable, room: str, words: str) -> int:
        """Return the rooms to which an exit may lead, as values of where the player is."""
        rooms = {self.world.facts[b][2]: 1 << b for b in player.bits if b < len(self.world.facts)}
        if (room, words) in self.links:
            return rooms[self.links[room, words]]
        here = {way.words: way for way in self.sight.exits.get(room, ())}
        way = here.get(words)
        door = way.door if way else ""
        beyond = self.doors.get(door, set()) - {room} if door else set()
        if len(beyond) == 1:
            return rooms[next(iter(beyond))]
        if not self.world.symmetric:
            return sum(rooms.values())
        taken = {room, *(to for (left, _), to in self.links.items() if left == room)}
        return sum(bit for r, bit in rooms.items() if r not in taken and self._may_lead_to(r, words, door))

    def _may_lead_to(self, other: str, words: str, door: str) -> bool:
        if other not in self.visited:
            return True
        back = next((w for w in self.sight.exits.get(other, ()) if w.words == OPPOSITE[words]), None)
        return back is not None and back.door == door and (other, back.words) not in self.links

    def guess(self, name: str, question: Question) -> Distribution:
        variable, n = self.index[question.variable], len(question.choices)
        if name == "ideal":
            possible = tuple([k for k, bit in enumerate(variable.bits) if self.maybe >> bit & 1])
            return uniform(n, possible)
        if name == "last_mention":
            return one_hot(n, self.last[variable.name]) if variable.name in self.last else uniform(n)
        if name == "stay":
            return one_hot(n, self.first[variable.name]) if variable.name in self.first else uniform(n)
        if name == "action_only":
            return one_hot(n, self.effect[variable.name]) if variable.name in self.effect else uniform(n)
        raise KeyError(name)
