"""Configs: YAML files with key=value overrides, validated by pydantic; errors suggest the nearest known key."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    Tag,
    ValidationError,
    model_validator,
)

PACKAGED = Path(__file__).resolve().parent.parent / "configs"


class ConfigError(ValueError):
    """A config cannot be read; the message names the file, the key, and what was expected."""


class Strict(BaseModel):
    """A config section that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    close = get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                    hint = f"; did you mean {close[0]!r}?" if close else ""
                    raise ValueError(f"unknown key {key!r}: expected one of {', '.join(cls.model_fields)}{hint}")
        return data


class ModulesConfig(Strict):
    """Names of a model's modules, for models whose modules cannot be found automatically.

    The keys are those of `nextstate.agents.sites.ModuleMap`.
    """

    blocks: str = Field(description="path of the list of decoder blocks in the model")
    attention: str = Field(description="path of the attention module in a block")
    projection: str = Field(description="path of the output projection in the attention module")
    mlp: str = Field(description="path of the MLP in a block")
    attn_out: str = Field(
        default="", description="path of the module that is added to the stream, if not that of attention"
    )
    mlp_out: str = Field(
        default="", description="path of the module that is added to the stream, if not that of the MLP"
    )
    adds: bool = Field(
        default=True, description="whether the block adds these modules' outputs to the stream unchanged"
    )


class AgentConfig(Strict):
    """A language model and how to load it; a plain string is the name of a model that is loaded with the defaults.

    The keys are those of `nextstate.agents.language.LanguageModel`.
    """

    kind: Literal["model"] = Field(default="model", exclude=True)
    name: str = Field(description="nextstate/tiny, a folder, or a name on the Hugging Face hub")
    device: str | None = Field(default=None, description="cpu, cuda or mps; by default the best there is")
    device_map: str | dict[str, int | str] | None = Field(
        default=None,
        description="instead of device: auto, or a mapping from modules to devices, spreads the model over them",
    )
    dtype: str | None = Field(
        default=None,
        description="float32, bfloat16 or float16; by default float32 on a CPU, else that of the checkpoint",
    )
    quantization: Literal["4bit", "8bit"] | None = Field(default=None, description="with bitsandbytes, on a GPU")
    attn_implementation: str | None = Field(
        default=None,
        description="sdpa, eager, nextstate_flex or another one of transformers; by default sdpa where the model has "
        "it, else eager, and on a GPU nextstate_flex where it works",
    )
    revision: str | None = Field(
        default=None, description="branch, tag or commit on the hub; by default the newest commit"
    )
    allow_incomplete: bool = Field(
        default=False, description="load a checkpoint that lacks tensors; its answers and the page are marked"
    )
    bos: bool | None = Field(
        default=None, description="begin transcripts with BOS, or not; by default as the tokenizer does"
    )
    modules: ModulesConfig | None = Field(
        default=None, description="names of modules; by default they are found by structure"
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="episodes in one forward pass, at most; by default 64, and 1,024 on a GPU"
    )
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens in one forward pass, at most; by default 8,192, on a GPU what fits into its free memory",
    )

    @classmethod
    def of(cls, entry: str | AgentConfig) -> AgentConfig:
        """Return the config of a model that is given by its name, or the config itself."""
        return cls(name=entry) if isinstance(entry, str) else entry

    @model_validator(mode="after")
    def _one_place(self) -> AgentConfig:
        if self.device is not None and self.device_map is not None:
            raise ValueError(f"{self.name}: device and device_map cannot be combined; give only one")
        return self


class InterveneConfig(Strict):
    """Heads to ablate. Each language model is evaluated twice: unchanged, and without these heads."""

    heads: list[tuple[NonNegativeInt, NonNegativeInt]] = Field(min_length=1, description="layer and head, from 0")
    mode: Literal["zero", "mean", "resample"] = Field(default="zero", description="what replaces the output of a head")
    episodes: int = Field(default=16, ge=1, le=10_000, description="reference episodes of mean and resample")


class KindConfig(BaseModel):
    """An agent that is not a language model; keys other than `kind` are passed to that kind as arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(self.model_extra or {})


def _tag(entry: Any) -> str | None:
    if isinstance(entry, str):
        return "name"
    if isinstance(entry, (AgentConfig, KindConfig)):
        return "model" if isinstance(entry, AgentConfig) else "kind"
    if isinstance(entry, Mapping):
        return "model" if entry.get("kind", "model") == "model" else "kind"
    return None


AgentEntry = Annotated[
    Annotated[str, Tag("name")] | Annotated[AgentConfig, Tag("model")] | Annotated[KindConfig, Tag("kind")],
    Discriminator(
        _tag,
        custom_error_type="agent",
        custom_error_message="expected the name of an agent, or keys and values such as {kind: shortcut, name: stay}",
    ),
]


C = TypeVar("C", bound=Strict)


def packaged_configs() -> list[str]:
    """Return the names of the configs that are shipped with nextstate."""
    return sorted(f"configs/{p.relative_to(PACKAGED).as_posix()}" for p in PACKAGED.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """Return the file for a path, or for the name of a packaged config with or without its folder and suffix."""
    path = Path(name)
    if path.is_file():
        return path
    bare = name.removeprefix("configs/").removesuffix(".yaml") + ".yaml"
    packaged = (PACKAGED / bare).resolve()
    if packaged.is_file() and packaged.is_relative_to(PACKAGED):
        return packaged
    known = packaged_configs()
    close = get_close_matches(f"configs/{bare}", known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"packaged configs: {', '.join(known)}"
    raise ConfigError(f"there is no config {name!r}; {hint}")


def read_value(name: str, overrides: list[str], key: str) -> Any:
    """Return one top-level entry of a config without validating it, or None if it is missing.

    Raises:
        ConfigError: as `read_config`.
    """
    return _read(name, overrides)[1].get(key)


def read_config(name: str, overrides: list[str], cls: type[C]) -> C:
    """Read a config and apply overrides such as `seed=3`, `games.0.episodes=20`, `agents=[gpt2,ideal]`.

    Raises:
        ConfigError: the file does not exist or is not valid YAML, an override has no matching entry, a key is unknown,
            or a value has the wrong type.
    """
    path, data = _read(name, overrides)
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'top level'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        )
        raise ConfigError(f"{path}: {problems}") from error


def _read(name: str, overrides: list[str]) -> tuple[Path, dict[str, Any]]:
    path = find_config(name)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} contains a {type(data).__name__}, expected keys and values")
    for override in overrides:
        _apply(data, override)
    return path, data


def _apply(data: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"{override!r} is not an override: expected key=value, such as seed=3 or games.0.episodes=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML ({error})") from error
    at: Any = data
    *parents, last = key.split(".")
    for part in parents:
        at = _enter(at, part, override)
    if not (isinstance(at, dict) and last not in at):
        _enter(at, last, override)  # raises if the entry does not exist
    at[int(last) if isinstance(at, list) else last] = value


def _enter(at: Any, part: str, override: str) -> Any:
    if isinstance(at, list):
        if not part.isdigit() or int(part) >= len(at):
            raise ConfigError(f"{override!r}: {part!r} is not an index of a list of {len(at)} (counted from 0)")
        return at[int(part)]
    if not isinstance(at, dict):
        raise ConfigError(f"{override!r}: the value before {part!r} has no entries")
    return at.setdefault(part, {})
