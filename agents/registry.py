"""Every kind of agent, built in or from other packages, and how an entry of a config becomes an agent.

An entry of `agents` is a string or a mapping. A string is the name of a kind ("ideal", "chance", or one that an
installed package registers as an entry point of the group `nextstate.agents`), "shortcut:NAME", "shortcuts" for all
shortcuts of the run's games, `pkg.module:Name`, or else the name or folder of a language model. A mapping
`{kind: ngram, n: 2}` gives a kind with its arguments; without `kind` it is a language model with its options.

An agent from outside is a subclass of `nextstate.agents.agent.Agent`, or a function that returns one. Torch and other
packages are imported when an agent that needs them is used, not before.
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
    """Return the agent that answers by a shortcut of a game."""
    return Reference(name)


def load_model(entry: str | AgentConfig) -> LanguageModel:
    """Load the language model that a config names.

    Raises:
        AgentError: it cannot be loaded, or its modules are not what the config says.
    """
    from nextstate.agents.language import LanguageModel  # torch and transformers take seconds to import
    from nextstate.agents.sites import SiteError

    config = AgentConfig(name=entry) if isinstance(entry, str) else entry
    try:
        return LanguageModel(**config.model_dump())
    except SiteError as error:
        raise AgentError(f"{config.name}: {error}") from error


def _model(**options: Any) -> Agent:
    return load_model(AgentConfig(**options))


BUILT_IN: dict[str, Maker] = {
    "ideal": partial(Reference, "ideal"),
    "chance": partial(Reference, "chance"),
    "shortcut": shortcut,
    "model": _model,
    "random": RandomPlayer,
    "walkthrough": WalkthroughPlayer,
}
HUMAN = "human"  # made by `nextstate.terminal`, which knows where to ask
PLAYERS = ("random", "walkthrough")  # they give commands and answer no questions
_RESERVED = (*BUILT_IN, HUMAN)
REFERENCES = ("ideal", "chance", "shortcut")  # they answer questions and give no commands
_SHORTCUT = "shortcut:"
_WITH_ARGUMENTS = ("shortcut", "model")  # a name alone does not make one


@dataclass(frozen=True)
class Spec:
    """An agent or player of a config, checked but not made yet.

    Args:
        name: what it is called in tables.
        kind: a key of `BUILT_IN`, the name of an entry point, or `pkg.module:Name`.
        arguments: of that kind; those of a language model are the fields of its `AgentConfig`.
        maker: called with the arguments, returns the agent or player.
    """

    name: str
    kind: str
    arguments: Mapping[str, Any]
    maker: Maker

    def make(self) -> Agent | Player:
        """Return a new agent or player; a language model is loaded.

        Raises:
            AgentError: it cannot be made; the message is one line.
        """
        made = guarded(
            lambda: self.maker(**self.arguments), lambda error: f"{self.name} cannot be made: {one_line(error)}"
        )
        if self.kind not in BUILT_IN:
            if not isinstance(made, Agent):
                raise AgentError(f"{self.kind} returned {type(made).__name__}, expected a nextstate.agents.agent.Agent")
            made.name, made.kind = self.name, self.kind
        return made

    def answers(self, game: Game) -> bool:
        """Tell whether it can be asked about this game: a shortcut only where the game has it, a player never."""
        if self.kind == "shortcut":
            return self.arguments["name"] in game.shortcuts
        return self.kind not in PLAYERS

    @property
    def plays(self) -> bool:
        """Whether it can give commands; references only answer questions."""
        return self.kind not in REFERENCES


def kind_of(entry: AgentEntry) -> str:
    """Return the kind of an entry of a config; no plugin is imported.

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
    """Return what an entry of a config means; of plugins, only the one that it names is imported.

    Args:
        entry: any but "shortcuts", which means several agents.
        games: what it will be asked about, if that is known: a shortcut must be one of theirs.

    Raises:
        AgentError: there is no such kind, two packages provide it, its plugin cannot be imported or is no agent, an
            argument is unknown or missing, or no game has the shortcut; the message is one line.
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
            raise AgentError(f"no game here has {spec.name!r}: expected one of {known}")
        return spec
    given = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return Spec(f"{kind}({given})" if given else kind, kind, arguments, maker)


def specs_of(entries: Sequence[AgentEntry], games: Sequence[Game]) -> Iterator[Spec]:
    """Yield what the entries of a config mean, in order; "shortcuts" becomes every shortcut of the games.

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
        raise AgentError("human answers in the terminal only: use `nextstate play`")
    try:
        plugins.check_unique(GROUP, kind, _RESERVED)
        if kind in BUILT_IN:
            return BUILT_IN[kind]
        found = plugins.load(GROUP, kind, _RESERVED)
    except plugins.PluginError as error:
        raise AgentError(str(error)) from error
    missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
    if missing:
        raise AgentError(f"{kind} is no agent yet: it does not define {missing}")
    if (isinstance(found, type) and not issubclass(found, Agent)) or not callable(found):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"an object of type {type(found).__name__}"
        raise AgentError(
            f"{kind} is no agent: expected a subclass of nextstate.agents.agent.Agent or a function that returns one, "
            f"but it is {what}"
        )
    return found


def _check_arguments(kind: str, maker: Maker, arguments: Mapping[str, Any]) -> None:
    """Raise `AgentError` if `maker` does not take these arguments by name, or needs more."""
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
