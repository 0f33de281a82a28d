"""Who takes part in a run: agents and players by their names, each with how it is made and what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, model_validator

from nextstate.agents.agent import Agent, AgentError
from nextstate.agents.config import Strict
from nextstate.agents.failures import guarded, one_line
from nextstate.agents.play import Player
from nextstate.agents.reference import SHORTCUT, Reference
from nextstate.folder import ExperimentError
from nextstate.grid import Setting
from nextstate.playing import PlaySetting, reference

if TYPE_CHECKING:
    from nextstate.agents.intervene import Intervention
    from nextstate.agents.language import LanguageModel

REFERENCES = ("ideal", "chance")


class ModulesConfig(Strict):
    """Names of a model's modules, for one in which they are not found by structure.

    The keys are those of `nextstate.agents.sites.Names`.
    """

    blocks: str = Field(description="path of the list of decoder blocks in the model")
    attention: str = Field(description="path of the attention module in a block")
    projection: str = Field(description="path of the output projection in the attention module")
    mlp: str = Field(description="path of the MLP in a block")
    attn_out: str = ""
    mlp_out: str = ""
    adds: bool = True


class AgentConfig(Strict):
    """A language model and how to load it; a bare name in `agents` means all defaults.

    The keys are those of `nextstate.agents.language.LanguageModel`.
    """

    name: str
    device: str | None = None
    device_map: str | dict[str, int | str] | None = Field(default=None, description="such as auto; instead of device")
    dtype: str | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    attn_implementation: str | None = None
    revision: str | None = None
    allow_incomplete: bool = False
    bos: bool | None = Field(default=None, description="begin with BOS, or not; by default as the tokenizer does")
    modules: ModulesConfig | None = Field(default=None, description="by default they are found by structure")
    batch_size: int = Field(default=64, ge=1)
    batch_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_place(self) -> AgentConfig:
        if self.device is not None and self.device_map is not None:
            raise ValueError(f"{self.name}: device and device_map exclude each other; give one")
        return self


class InterveneConfig(Strict):
    """Heads to do without; every language model is then asked twice, as it is and without them."""

    heads: list[tuple[NonNegativeInt, NonNegativeInt]] = Field(min_length=1, description="layer and head, from 0")
    mode: Literal["zero", "mean", "resample"] = "zero"
    episodes: int = Field(16, ge=1, le=10_000, description="reference episodes of mean and resample")


def is_reference(agent: str) -> bool:
    """Tell whether a name in `agents` is that of a reference and not of a language model."""
    return agent in (*REFERENCES, "shortcuts") or agent.startswith(SHORTCUT)


class Entrant(NamedTuple):
    """An agent or player of a run: how to make it, the settings it is asked about, and what it plays."""

    name: str
    load: Callable[[], Agent | Player]
    asked: list[Setting]
    plays: list[PlaySetting]
    model: bool = False  # a language model, which may fail in ways of its own


def entrants(
    agents: Sequence[str | AgentConfig],
    players: Sequence[Literal["random", "walkthrough"]],
    intervene: InterveneConfig | None,
    settings: list[Setting],
    plays: list[PlaySetting],
) -> Iterator[Entrant]:
    """Yield who takes part, in order; "shortcuts" stands for all. Language models play, and so do `players`."""
    for entry in agents:
        if entry == "shortcuts":
            for name in dict.fromkeys(s for setting in settings for s in setting.game.shortcuts):
                mine = [s for s in settings if name in s.game.shortcuts]
                yield Entrant(SHORTCUT + name, partial(Reference, SHORTCUT + name), mine, [])
        elif isinstance(entry, str) and is_reference(entry):
            mine = [s for s in settings if entry in REFERENCES or entry.removeprefix(SHORTCUT) in s.game.shortcuts]
            if not mine and settings:
                known = sorted({s for setting in settings for s in setting.game.shortcuts})
                raise ExperimentError(f"no game of this run has {entry!r}: expected one of {', '.join(known)}")
            yield Entrant(entry, partial(Reference, entry), mine, [])
        else:
            model = AgentConfig(name=entry) if isinstance(entry, str) else entry
            once = _Once(model)
            yield Entrant(model.name, once, settings, plays, True)
            if intervene:
                what = _intervention(intervene)
                yield Entrant(what.named(model.name), partial(_without, once, what), settings, plays, True)
    for name in players if plays else []:
        yield Entrant(name, partial(reference, name, plays), [], plays)


class _Once:
    """Loads a model whenever it is called, until that fails once: then it says so again and does not try."""

    def __init__(self, entry: AgentConfig) -> None:
        self.entry = entry
        self.reason = ""

    def __call__(self) -> LanguageModel:
        if self.reason:
            raise AgentError(self.reason)
        try:
            return guarded(partial(load_model, self.entry), lambda error: f"{self.entry.name}: {one_line(error)}")
        except AgentError as error:
            self.reason = str(error)
            raise


def load_model(entry: str | AgentConfig) -> LanguageModel:
    """Load the model that a config names.

    Raises:
        AgentError: it cannot be loaded, or its modules are not what the config says.
    """
    from nextstate.agents.language import LanguageModel  # torch and transformers take seconds to import
    from nextstate.agents.sites import SiteError

    given = AgentConfig(name=entry) if isinstance(entry, str) else entry
    try:
        return LanguageModel(**given.model_dump())
    except SiteError as error:
        raise AgentError(f"{given.name}: {error}") from error


def _intervention(how: InterveneConfig) -> Intervention:
    from nextstate.agents.intervene import Intervention  # imports torch, as the model does

    return Intervention(tuple(how.heads), how.mode, how.episodes)


def _without(load: _Once, what: Intervention) -> Agent:
    from nextstate.agents.intervene import Intervened
    from nextstate.agents.sites import SiteError

    try:
        return Intervened(load(), what)
    except SiteError as error:
        raise AgentError(f"{load.entry.name} cannot be asked without these heads: {error}") from error
