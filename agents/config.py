"""Configs: YAML files, overridden by key=value, checked by pydantic; a wrong key is told the nearest right one."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

PACKAGED = Path(__file__).resolve().parent.parent / "configs"


class ConfigError(ValueError):
    """A config cannot be read; the message names the file, the key, and what was expected."""


class Strict(BaseModel):
    """A config section that knows its keys."""

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


C = TypeVar("C", bound=Strict)


def packaged_configs() -> list[str]:
    """Return the configs that come with nextstate, as `nextstate run` takes them."""
    return sorted(f"configs/{p.relative_to(PACKAGED).as_posix()}" for p in PACKAGED.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """Return the file a user means: a path, or one of the packaged configs with or without folder and ending."""
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
    """Return one entry of a config at its top level, unchecked; None where it has none.

    Raises:
        ConfigError: as `read_config`.
    """
    return _read(name, overrides)[1].get(key)


def read_config(name: str, overrides: list[str], cls: type[C]) -> C:
    """Read a config and apply overrides such as `seed=3`, `games.0.episodes=20`, `agents=[gpt2,ideal]`.

    Raises:
        ConfigError: no such file, no YAML, an override that fits nowhere, an unknown key, a value of the wrong kind.
    """
    path, data = _read(name, overrides)
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        told = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'top level'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        )
        raise ConfigError(f"{path}: {told}") from error


def _read(name: str, overrides: list[str]) -> tuple[Path, dict[str, Any]]:
    path = find_config(name)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, expected keys and values")
    for override in overrides:
        _apply(data, override)
    return path, data


def _apply(data: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"{override!r} is no override: expected key=value, such as seed=3 or games.0.episodes=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML ({error})") from error
    at: Any = data
    *parents, last = key.split(".")
    for part in parents:
        at = _enter(at, part, override)
    if not (isinstance(at, dict) and last not in at):
        _enter(at, last, override)  # checks that there is such a place
    at[int(last) if isinstance(at, list) else last] = value


def _enter(at: Any, part: str, override: str) -> Any:
    if isinstance(at, list):
        if not part.isdigit() or int(part) >= len(at):
            raise ConfigError(f"{override!r}: {part!r} is no place in a list of {len(at)} (counted from 0)")
        return at[int(part)]
    if not isinstance(at, dict):
        raise ConfigError(f"{override!r}: there is nothing to enter at {part!r}")
    return at.setdefault(part, {})
