"""All kinds of agents, built in or from other packages, and how an entry of a config becomes an agent.

An entry of `agents` is a string or a mapping. A string is the name of a kind ("ideal", "lookup", "chance", or one
that an installed package registers as an entry point of the group `nextstate.agents`), "shortcut:NAME", "shortcuts" for
all shortcuts of the run's games, `pkg.module:Name`, or else the name or folder of a language model. A mapping
`{kind: ngram, n: 2}` gives a kind with its arguments; without `kind` it is a language model with its options.

A plugin agent is a subclass of `nextstate.agents.agent.Agent`, or a function that returns one. Torch and other
packages are only imported when an agent that needs them is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

from nextstate.agents.agent import Agent, AgentError
from nextstate.agents.config import AgentConfig, AgentEntry, KindConfig
from nextstate.agents.failures import guarded, one_line
from nextstate.agents.play import Player, RandomPlayer, WalkthroughPlayer
from nextstate.agents.reference import Reference
from nextstate.envs import plugins
from nextstate.envs.game import Game

if TYPE_CHECKING:
    from nextstate.agents.language import LanguageModel

GROUP = "nextstate.agents"  # of entry points

Maker = Callable[..., Agent | Player]


def shortcut(name: str) -> Agent:
    """Return the agent that answers with a shortcut of the game."""
    return Reference(name)


def load_model(entry: str | AgentConfig) -> LanguageModel:
    """Load the language model that a config names.

    Raises:
        AgentError: the model cannot be loaded, or its modules do not match the config.
    """
    from nextstate.agents.language import LanguageModel  # torch and transformers take seconds to import
    from nextstate.agents.sites import SiteError

    config = AgentConfig.of(entry)
    try:
        return LanguageModel(**config.model_dump())
    except SiteError as error:
        raise AgentError(f"{config.name}: {error}") from error


def _model(**options: Any) -> Agent:
    return load_model(AgentConfig(**options))


BUILT_IN: dict[str, Maker] = {
    "ideal": partial(Reference, "ideal"),
    "lookup": partial(Reference, "lookup"),
    "chance": partial(Reference, "chance"),
    "shortcut": shortcut,
    "model": _model,
    "random": RandomPlayer,
    "walkthrough": WalkthroughPlayer,
}
HUMAN = "human"  # made by `nextstate.terminal`, which has the console
PLAYERS = ("random", "walkthrough")  # give commands only
_RESERVED = (*BUILT_IN, HUMAN)
REFERENCES = ("ideal", "lookup", "chance", "shortcut")  # answer questions only
_SHORTCUT = "shortcut:"
_WITH_ARGUMENTS = ("shortcut", "model")  # kinds that need arguments


@dataclass(frozen=True)
class Spec:
    """The specification of an agent or player: validated, but not created yet.

    Args:
        name: its name in tables.
        kind: a key of `BUILT_IN`, the name of an entry point, or `pkg.module:Name`.
        arguments: keyword arguments of that kind; for a language model, the fields of its `AgentConfig`.
        maker: function that takes the arguments and returns the agent or player.
    """

    name: str
    kind: str
    arguments: Mapping[str, Any]
    maker: Maker

    def make(self) -> Agent | Player:
        """Return a new agent or player; loads the model if it is a language model.

        Raises:
            AgentError: the agent cannot be created; the message is one line.
        """
        made = guarded(
            lambda: self.maker(**self.arguments), lambda error: f"{self.name} cannot be created: {one_line(error)}"
        )
        if self.kind not in BUILT_IN:
            if not isinstance(made, Agent):
                raise AgentError(f"{self.kind} returned {type(made).__name__}, expected a nextstate.agents.agent.Agent")
            made.name, made.kind = self.name, self.kind
        return made

    def answers(self, game: Game) -> bool:
        """Return whether it can answer questions of this game; false for players, and for shortcuts of other games."""
        if self.kind == "shortcut":
            return self.arguments["name"] in game.shortcuts
        return self.kind not in PLAYERS

    @property
    def plays(self) -> bool:
        """Whether it can give commands; false for reference agents, which only answer questions."""
        return self.kind not in REFERENCES


def kind_of(entry: AgentEntry) -> str:
    """Return the kind of an entry of a config, without importing plugins.

    Examples:
        >>> [kind_of(entry) for entry in ("ideal", "shortcut:stay", "shortcuts", "openai-community/gpt2")]
        ['ideal', 'shortcut', 'shortcut', 'model']
    """
    if not isinstance(entry, str):
        return entry.kind
    if entry == "shortcuts" or entry.startswith(_SHORTCUT):
        return "shortcut"
    known = {*_RESERVED, *plugins.names(GROUP)}.difference(_WITH_ARGUMENTS)
    return entry if entry in known or ":" in entry else "model"


def spec_of(entry: AgentEntry, games: Sequence[Game] = ()) -> Spec:
    """Return the specification for an entry of a config; imports only the plugin that the entry names.

    Args:
        entry: any entry except "shortcuts", which stands for several agents.
        games: the games of the run, if known; a shortcut must belong to one of them.

    Raises:
        AgentError: the kind does not exist, two packages provide it, its plugin cannot be imported or is not an agent,
            an argument is unknown or missing, or no game has the shortcut; the message is one line.
    """
    kind = kind_of(entry)
    if kind == "model":
        config = AgentConfig(name=entry) if isinstance(entry, str) else entry
        assert isinstance(config, AgentConfig)
        return Spec(config.name, kind, config.model_dump(), _model)
    arguments = entry.arguments if isinstance(entry, KindConfig) else {}
    if isinstance(entry, str) and kind == "shortcut":
        arguments = {"name": entry.removeprefix(_SHORTCUT)}
    maker = _maker(kind)
    _check_arguments(kind, maker, arguments)
    if kind == "shortcut":
        spec = Spec(f"{_SHORTCUT}{arguments['name']}", kind, arguments, maker)
        if games and not any(spec.answers(game) for game in games):
            known = ", ".join(f"{_SHORTCUT}{name}" for name in _shortcuts(games))
            raise AgentError(f"no game of this run has {spec.name!r}: expected one of {known}")
        return spec
    given = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return Spec(f"{kind}({given})" if given else kind, kind, arguments, maker)


def specs_of(entries: Sequence[AgentEntry], games: Sequence[Game]) -> Iterator[Spec]:
    """Yield the specifications for the entries of a config, in order; "shortcuts" gives every shortcut of the games.

    Raises:
        AgentError: an entry cannot be used; see `spec_of`.
    """
    for entry in entries:
        names = [f"{_SHORTCUT}{name}" for name in _shortcuts(games)] if entry == "shortcuts" else [entry]
        yield from (spec_of(name, games) for name in names)


def _shortcuts(games: Sequence[Game]) -> list[str]:
    return list(dict.fromkeys(name for game in games for name in game.shortcuts))


def _maker(kind: str) -> Maker:
    if kind == HUMAN:
        raise AgentError("human is available in the terminal only: use `nextstate play`")
    try:
        plugins.check_unique(GROUP, kind, _RESERVED)
        if kind in BUILT_IN:
            return BUILT_IN[kind]
        found = plugins.load(GROUP, kind, _RESERVED)
    except plugins.PluginError as error:
        raise AgentError(str(error)) from error
    missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
    if missing:
        raise AgentError(f"{kind} is an incomplete agent: it does not define {missing}")
    if (isinstance(found, type) and not issubclass(found, Agent)) or not callable(found):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"an object of type {type(found).__name__}"
        raise AgentError(
            f"{kind} is not an agent: expected a subclass of nextstate.agents.agent.Agent or a function returning one, "
            f"but it is {what}"
        )
    return found


def _check_arguments(kind: str, maker: Maker, arguments: Mapping[str, Any]) -> None:
    """Raise `AgentError` if `maker` does not accept these keyword arguments, or requires others."""
    try:
        parameters = inspect.signature(maker).parameters.values()
    except ValueError:  # some callables written in C have no signature
        return
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        for key in arguments:
            if key not in (known := [p.name for p in named]):
                raise AgentError(f"{kind} has no argument {key!r}; {_expected(key, known)}")
    missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
    if missing:
        raise AgentError(f"{kind} needs {', '.join(missing)}: give {{kind: {kind}, {missing[0]}: ...}}")


def _expected(key: str, known: Collection[str]) -> str:
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}" if known else "it has none"
