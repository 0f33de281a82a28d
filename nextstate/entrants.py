"""Who takes part in a run: agents and players, each with how it is made, what it is asked and what it plays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from nextstate.agents.agent import Agent, AgentError
from nextstate.agents.config import AgentEntry, InterveneConfig, KindConfig
from nextstate.agents.play import Player
from nextstate.agents.registry import PLAYERS, Spec, spec_of, specs_of
from nextstate.folder import ExperimentError
from nextstate.grid import Setting
from nextstate.playing import PlaySetting

if TYPE_CHECKING:
    from nextstate.agents.intervene import Intervention


class Entrant(NamedTuple):
    """An agent or player of a run, the settings it is asked about, and what it plays."""

    name: str
    spec: Spec
    load: Callable[[], Agent | Player]
    asked: list[Setting]
    plays: list[PlaySetting]

    @property
    def model(self) -> bool:
        """Whether it is a language model, with or without all of its heads."""
        return self.spec.kind == "model"


def participants(
    agents: Sequence[AgentEntry],
    players: Sequence[Literal["random", "walkthrough"]],
    intervene: InterveneConfig | None,
    settings: list[Setting],
    plays: list[PlaySetting],
) -> list[Entrant]:
    """Return who takes part, in order; with `intervene`, every language model also without those heads.

    Raises:
        AgentError: an entry of `agents` cannot be used; the message is one line.
        ExperimentError: two of them have one name, or one cannot be asked in a run.
    """
    out: list[Entrant] = []
    for spec in specs_of(agents, [s.game for s in settings]):
        if spec.kind in PLAYERS:
            raise ExperimentError(f"{spec.kind} gives commands and answers no questions: put it under `players`")
        asked, played = [s for s in settings if spec.answers(s.game)], plays if spec.plays else []
        load = _Once(spec)
        out.append(Entrant(spec.name, spec, load, asked, played))
        if intervene and spec.kind == "model":
            what = _intervention(intervene)
            out.append(Entrant(what.named(spec.name), spec, partial(_without, load, what), asked, played))
    for name in players if plays else []:
        most = {"max_states": max(p.optima.max_states for p in plays)} if name == "walkthrough" else {}
        spec = spec_of(KindConfig(kind=name, **most))
        out.append(Entrant(name, spec, spec.make, [], plays))
    twice = [name for name, n in Counter(e.name for e in out).items() if n > 1]
    if twice:
        raise ExperimentError(f"{twice[0]} is given twice; give each agent once")
    return out


class _Once:
    """Makes an agent on each call, until that fails once: later calls raise the same message without trying."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.reason = ""

    def __call__(self) -> Agent | Player:
        if self.reason:
            raise AgentError(self.reason)
        try:
            return self.spec.make()
        except AgentError as error:
            self.reason = str(error)
            raise


def _intervention(how: InterveneConfig) -> Intervention:
    from nextstate.agents.intervene import Intervention  # imports torch, as the model does

    return Intervention(tuple(how.heads), how.mode, how.episodes)


def _without(load: _Once, what: Intervention) -> Agent:
    from nextstate.agents.intervene import Intervened
    from nextstate.agents.language import LanguageModel
    from nextstate.agents.sites import SiteError

    model = load()
    assert isinstance(model, LanguageModel)
    try:
        return Intervened(model, what)
    except SiteError as error:
        raise AgentError(f"{load.spec.name} cannot be asked without these heads: {error}") from error
