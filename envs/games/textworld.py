"""TextWorld adventures (Côté et al. 2018, arXiv 1806.11532) as finite-state systems with exact states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from nextstate.envs.contrast import Pair
from nextstate.envs.game import (
    Action,
    Feedback,
    Game,
    Question,
    Reader,
    Sample,
    State,
    require,
    require_whole,
    split_uniform,
)
from nextstate.envs.textworld.pairs import draw_pair
from nextstate.envs.textworld.reader import AdventureReader, Told
from nextstate.envs.textworld.words import Sight
from nextstate.envs.textworld.world import MOST_STATES, Command, Situation, World

if TYPE_CHECKING:
    from nextstate.envs.textworld.story import Story

WORDS = ("logic", "inform7")
MOST_GAMES = 10_000  # of a pool
TRAINING_GAMES = 777  # game_seed of the adventures that models are trained on; experiments use others
_STORIES = 4  # processes of compiled games that are kept


@final
@dataclass(frozen=True)
class TextWorld(Game):
    """Text adventures made by TextWorld: rooms, doors, keys, containers and a quest, with exact states.

    An episode plays one game of a pool; the pool is generated once and cached. A state consists of the changeable
    logical facts that hold and the quests that are done; |Q| and |T| count states until the game ends. A step is a
    command. Its effect is asked about before the game describes it, with one question for each variable (where the
    player is, where each thing is, open, closed or locked, eaten, cooked, cut, ...). The policy never ends the game; it
    draws one of the verbs of the legal commands (those that change nothing count as one verb), and then a command.

    Ideal reader: even over the values of a variable that the transcript leaves possible
    (`nextstate.envs.textworld.reader.AdventureReader`). It does not know how likely TextWorld's generator makes them:
    on questions that are not determined its ceiling is a lower bound of that of Bayes' rule. The lookup reader is the
    same.

    Args:
        rooms: number of rooms, 1 to 20; 1, 6, 9 or 12 with `challenge="cooking"`.
        objects: number of things besides rooms and doors, 0 to 60; more where the quest needs more.
        quest: number of commands of the shortest solution, 1 to 20.
        breadth: number of branches of the quest, 1 to 2; two need a quest of 4 commands or more.
        theme: names of things: "house", or "basic" (such as "box0").
        challenge: a challenge of TextWorld, which has its own sizes. See `nextstate.envs.textworld.generate.Recipe`.
        level: of the challenge: coin_collector 1 to 150 or 201 to 233, treasure_hunter 1 to 30, cooking 1 to 5.
        skills: skills that a cooking game requires.
        file: path of a TextWorld game, .z8 or .json (with TextWorld's metadata), instead of a pool.
        games: number of games in the pool.
        game_seed: seed of the games in the pool.
        states: approximate number of states of each game; rooms, objects and quest then vary.
        transitions: approximate number of transitions of each game.
        words: "logic" (short sentences generated from the facts) or "inform7" (the text of the compiled game).
    """

    name: ClassVar[str] = "TextWorld"
    sizes: ClassVar[range] = range(2, 9)
    size: ClassVar[str] = "objects"  # of an instance: the first of states, transitions, objects, level that it has
    shortcuts: ClassVar[tuple[str, ...]] = ("last_mention", "action_only", "stay")
    feedbacks: ClassVar[tuple[Feedback, ...]] = ("branch",)
    styles: ClassVar[tuple[str, ...]] = ("plain",)
    contrasts: ClassVar[Mapping[str, tuple[str, ...]]] = {"state": ("balanced",), "action": ("balanced",)}

    style: str = "plain"
    rooms: int | None = None
    objects: int | None = None
    quest: int | None = None
    breadth: int | None = None
    theme: str = "house"
    challenge: str = ""
    level: int | None = None
    skills: str = ""
    file: str = ""
    games: int = 20
    game_seed: int = 0
    states: int | None = None
    transitions: int | None = None
    words: str = "logic"

    def __post_init__(self) -> None:
        from nextstate.envs.textworld.generate import Recipe

        super().__post_init__()
        require(self.words in WORDS, "words", self.words, " or ".join(WORDS))
        require_whole("game_seed", self.game_seed, 0, 2**31 - 1)
        for name in ("states", "transitions"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), 2, MOST_STATES)
        recipe = Recipe(**{f.name: getattr(self, f.name) for f in fields(Recipe)})
        for f in fields(Recipe):
            object.__setattr__(self, f.name, getattr(recipe, f.name))
        if self.file:
            object.__setattr__(self, "games", 1)
        require_whole("games", self.games, 1, MOST_GAMES)
        object.__setattr__(self, "_recipe", recipe)
        sizes = ("states", "transitions", "objects", "level", "games")
        object.__setattr__(self, "size", next(name for name in sizes if getattr(self, name) is not None))

    @classmethod
    def sample(cls, rng: np.random.Generator, size: int, level: int) -> Sample:
        rooms, objects = int(rng.integers(1, min(level, 4) + 1)), int(rng.integers(1, min(level, 8) + 1))
        quest = min(4, 1 + objects // 2)
        game = cls(rooms=rooms, objects=objects, quest=quest, games=40, game_seed=TRAINING_GAMES)
        return Sample(game, int(rng.integers(4, 15)), 3)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that recreate this game, as JSON types."""
        return asdict(self)

    @property
    def ideal_is_bayes(self) -> bool:
        return False  # it is even over possible values

    @cached_property
    def worlds(self) -> tuple[World, ...]:
        """The pool of games; generated, or read from the cache, at first use."""
        from nextstate.envs.textworld.pool import pool

        return pool(self._recipe, self.games, self.game_seed, self.states, self.transitions)  # type: ignore[attr-defined]

    @cached_property
    def max_choices(self) -> int:
        return max(len(v.words) for world in self.worlds for v in world.variables)

    def start(self, index: int = 0) -> Situation:
        """Return the state in which game number `index` of the pool begins."""
        require_whole("index", index, 0, self.games - 1)
        return Situation(self.worlds[index], self.worlds[index].start, 0)

    def initial(self, rng: np.random.Generator) -> Situation:
        return self.start(int(rng.integers(len(self.worlds))))

    def actions(self, state: State) -> Sequence[int]:
        assert isinstance(state, Situation)
        world, facts, done = state
        return () if world.won(done) or world.lost(done) else world.legal(facts)

    def transition(self, state: State, action: Action) -> Situation:
        assert isinstance(state, Situation)
        assert isinstance(action, int)
        world, facts, done = state
        after = world.after(facts, action)
        then = Situation(world, after, done if after == facts else world.settle(after, done))
        if self.words == "inform7":
            then.past = (*state.past, world.commands[action].words)
        return then

    def policy(self, state: State, u: float) -> int:
        assert isinstance(state, Situation)
        kinds = _kinds(state.world, state.facts, state.done)
        i, u = split_uniform(u, len(kinds))
        return kinds[i][split_uniform(u, len(kinds[i]))[0]]

    def values(self, state: State) -> Mapping[str, str]:
        assert isinstance(state, Situation)
        world, facts, _ = state
        return {v.name: v.words[world.value(v, facts)] for v in world.variables}

    def opening(self, state: State) -> str:
        assert isinstance(state, Situation)
        if self.words == "inform7":
            before, room, after = _story(state.world).opening().partition("-= ")  # before it is what to do
            return f"{room}{after}" if room else before
        return _sight(state.world).opening(state.facts)

    def narrate(self, state: State, action: Action, next_state: State) -> str:
        return f"\n\n> {self.command(state, action)}\n"

    def outcome(self, state: State, action: Action, next_state: State) -> str:
        assert isinstance(state, Situation)
        assert isinstance(next_state, Situation)
        command = state.world.commands[_index(action)]
        if self.words == "inform7":
            return _story(state.world).say(state.past, command.words)
        return _sight(state.world).outcome(command, next_state.facts)

    def questions(self, state: State, action: Action, next_state: State) -> tuple[Question, ...]:
        assert isinstance(next_state, Situation)
        world, facts, _ = next_state
        asked = _questions(world)
        return tuple([own[world.value(v, facts)] for v, own in zip(world.variables, asked, strict=True)])

    def command(self, state: State, action: Action) -> str:
        assert isinstance(state, Situation)
        return state.world.commands[_index(action)].words

    def reader(self, state: State) -> Reader:
        assert isinstance(state, Situation)
        world = state.world
        sight = _sight(world)
        opening = Told(state.facts, sight.of_room(state.facts) | sight.inside.get("I", 0))
        if self.words == "logic":
            return AdventureReader(sight, opening, lambda facts, c: Told(facts, sight.of_step(c, facts)))
        story, past = _story(world), list(state.past)

        def tell(facts: int, command: Command) -> Told:
            text = story.say(tuple(past), command.words)
            past.append(command.words)
            return Told(facts, sight.mentioned(sight.of_step(command, facts), facts, text))

        start = Told(state.facts, sight.mentioned(sight.of_room(state.facts), state.facts, self.opening(state)))
        return AdventureReader(sight, start, tell)

    def draw_pair(self, rng: np.random.Generator, kind: str, design: str, steps: int | None, distance: int) -> Pair:
        require(self.words == "logic", "words", self.words, "'logic' for pairs, which must differ in one name only")
        return draw_pair(self, rng, kind, steps)

    def size_of(self, state: State) -> int | None:
        assert isinstance(state, Situation)
        return state.world.n_states

    def objective(self, state: State) -> str:
        assert isinstance(state, Situation)
        return " ".join(state.world.objective.split())

    def points(self, state: State) -> int:
        assert isinstance(state, Situation)
        return state.world.points(state.done)

    def most_points(self, state: State) -> int:
        assert isinstance(state, Situation)
        return state.world.most_points

    def won(self, state: State) -> bool:
        assert isinstance(state, Situation)
        return state.world.won(state.done)

    def walkthrough(self, state: State) -> tuple[int, ...]:
        """Return the game's own solution, as far as its commands are legal; () if it has none."""
        assert isinstance(state, Situation)
        out: list[int] = []
        for words in state.world.walkthrough:
            legal = [a for a in self.actions(state) if state.world.commands[a].words == words]
            if not legal:
                break
            out.append(legal[0])
            state = self.transition(state, legal[0])
        return tuple(out)


@lru_cache(maxsize=8192)
def _kinds(world: World, facts: int, done: int) -> tuple[tuple[int, ...], ...]:
    """Return the commands that do not end the game, by verb; those that change nothing are one kind."""
    kinds: dict[str, list[int]] = {}
    for i in world.legal(facts):
        after = world.after(facts, i)
        then = done if after == facts else world.settle(after, done)
        if not (world.won(then) or world.lost(then)):
            verb = "" if after == facts else world.commands[i].words.split()[0]
            kinds.setdefault(verb, []).append(i)
    return tuple(map(tuple, kinds.values()))


@lru_cache(maxsize=4096)
def _sight(world: World) -> Sight:
    return Sight(world)


@lru_cache(maxsize=4096)
def _questions(world: World) -> tuple[tuple[Question, ...], ...]:
    """Return the question for each variable and true value."""
    sight = _sight(world)
    out = []
    for v in world.variables:
        choices = tuple([f" {w}" for w in v.words])
        out.append(tuple([Question(v.name, sight.stem(v), choices, k, (k,)) for k in range(len(choices))]))
    return tuple(out)


@lru_cache(maxsize=_STORIES)
def _story(world: World) -> Story:
    from nextstate.envs.textworld.generate import Recipe
    from nextstate.envs.textworld.story import Story, compile_story

    return Story(compile_story(Recipe(**world.recipe), world.seed))


def _index(action: Action) -> int:
    assert isinstance(action, int)
    return action
