"""Parts of the documentation that are made from the code when it is built; `mkdocs.yml` names this file as a hook.

A line such as `<!-- tables: run -->` in a page is replaced by what `PARTS` makes of it.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"^<!-- (\w+)(?:: ([\w:.]+))? -->$", re.MULTILINE)
RESPONSE, GRAMMAR = "nextstate.analysis.response", "nextstate.analysis.grammar.tables:SCHEMAS"
TABLES = {  # of each study: keys of its tables, and where their columns are
    "run": {
        "questions/CELL": "nextstate.analysis.predict.tables:QUESTIONS",
        "answers/AGENT/CELL": "nextstate.analysis.predict.tables:ANSWERS",
        "plays/AGENT/CELL": "nextstate.analysis.play.tables:PLAYS",
    },
    "patch": {
        "pairs/DESIGN-KIND": "nextstate.analysis.heads.tables:PAIRS",
        "sweeps/DESIGN-KIND-SITE-DIRECTION-WHERE": "nextstate.analysis.heads.tables:SWEEP",
        "attention/DESIGN": "nextstate.analysis.heads.tables:ATTENTION",
        "published/KIND": "nextstate.analysis.heads.published:PUBLISHED",
    },
    "response": {
        "windows/PRECISION": f"{RESPONSE}.window:COLUMNS",
        "exact": f"{RESPONSE}.tables:EXACT",
        "matrix/CONDITION": f"{RESPONSE}.tables:MATRIX",
        "signature/CONDITION-KIND": f"{RESPONSE}.tables:SIGNATURE",
        "heads/PART": f"{RESPONSE}.tables:LEFT",
        "scores": f"{RESPONSE}.tables:SCORES",
        "edges/GAME-KIND": f"{RESPONSE}.window:COLUMNS",
        "bridge/GAME-KIND": f"{RESPONSE}.bridge:COLUMNS",
        "bridge_heads/GAME-KIND": f"{RESPONSE}.tables:BRIDGE_HEADS",
    },
    "grammar": {"PART/MODEL": GRAMMAR},  # one table for each part
    "lens": {"answers/GAME": "nextstate.analysis.lens:ANSWERS"},
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the parts that are made from the code (called by MkDocs for each page)."""
    if page.file.src_uri == "index.md":
        markdown = from_root("README.md")
    return filled(markdown)


def filled(markdown: str) -> str:
    """Return a page with its marks replaced.

    Raises:
        KeyError: a mark names a part that there is not.
    """

    def part(mark: re.Match[str]) -> str:
        name, argument = mark.groups()
        return PARTS[name](argument) if argument else PARTS[name]()

    return MARK.sub(part, markdown)


def from_root(name: str) -> str:
    """Return a page of the repository's top folder, with links that hold within `docs/`."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    return text.replace("](CONTRIBUTING.md", "](contributing.md").replace("](CHANGELOG.md", "](changelog.md")


# --- tables of a run


def tables(study: str) -> str:
    """Return the columns of the tables that the jobs of a study make, with what they mean."""
    meanings = yaml.safe_load((ROOT / "docs" / "columns.yaml").read_text(encoding="utf-8"))
    out = []
    for key, columns in schemas(study).items():
        rows = [(f"`{name}`", f"`{kind}`", meaning(meanings, study, key, name)) for name, kind in columns.items()]
        out.append(f"`{key}.parquet`\n\n" + table(("column", "type", "meaning"), rows))
    return "\n\n".join(out)


def schemas(study: str) -> dict[str, Mapping[str, Any]]:
    """Return the columns, with their types, of each table that the jobs of a study make, by its key."""
    out: dict[str, Mapping[str, Any]] = {}
    for key, where in TABLES[study].items():
        found = resolve_name(where)
        out |= {f"{part}/MODEL": columns for part, columns in found.items()} if where == GRAMMAR else {key: found}
    return out


def meaning(meanings: Mapping[str, Mapping[str, str]], study: str, key: str, column: str) -> str:
    """Return what a column means: in this table, in this study, or everywhere.

    Raises:
        KeyError: `columns.yaml` does not say it.
    """
    for section in (f"{study} {key.split('/')[0]}", study, "all"):
        if column in meanings.get(section, {}):
            return meanings[section][column]
    raise KeyError(f"docs/columns.yaml has no meaning for {column!r} of {key!r} in the study {study!r}")


# --- configs


def config(where: str) -> str:
    """Return the keys of a config: those that only this study has, or those of a class, as `pkg.module:Name`."""
    from nextstate.analysis.run import RunConfig
    from nextstate.analysis.study import find_study

    cls = resolve_name(where) if ":" in where else find_study(where).config
    shared = () if ":" in where else tuple(RunConfig.model_fields)
    out = [table(("key", "type", "default", "meaning"), list(_keys(cls, shared)))]
    for name, nested in _nested(cls):
        if name in shared:
            continue
        out.append(f"Keys of `{name}`:\n\n" + table(("key", "type", "default", "meaning"), list(_keys(nested))))
    return "\n\n".join(out)


def _keys(cls: type[BaseModel], left_out: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str, str]]:
    for name, field in cls.model_fields.items():
        if not field.exclude and name not in left_out:
            yield f"`{name}`", _type(field.annotation), _default(field), field.description or ""


def _nested(cls: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the configs within a config, with the path to each; those of agents have a page of their own."""
    for name, field in cls.model_fields.items():
        for one in _models(field.annotation):
            if not one.__module__.startswith("nextstate.agents.config") or one.__name__ == "InterveneConfig":
                yield f"{path}{name}", one
                yield from _nested(one, f"{path}{name}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _type(annotation: Any) -> str:
    """Return a type as a reader of YAML understands it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        names = dict.fromkeys(_type(part) for part in parts if part is not type(None))
        return "agent" if "agent" in names else " or ".join(names)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is tuple:
        return "list: " + ", ".join(_type(part) for part in parts)
    if origin is dict:
        return "mapping"
    if origin is not None:  # Annotated
        return _type(parts[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "agent" if annotation.__name__ in ("AgentConfig", "KindConfig") else "mapping, see below"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(annotation, "any value")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value in (None, "", PydanticUndefined) or isinstance(value, BaseModel):
        return ""
    if isinstance(value, list) and any(isinstance(one, BaseModel) for one in value):
        return ""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return f"`{text.strip().removesuffix('...').strip()}`"


# --- games and studies


def games() -> str:
    """Return all built-in games with their settings."""
    from nextstate.envs.games import load_games
    from nextstate.envs.settings import listed

    out = []
    for name, cls in load_games()[0].items():
        about = " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())
        kinds = ", ".join(cls.contrasts) or "none"
        rows = [
            (f"`{x.name}`", x.type, "" if x.default is None else f"`{x.default}`", x.legal, x.meaning)
            for x in listed(cls)
        ]
        out.append(
            f'### {name}\n\n{about}\n\n`gym.make("nextstate/{name}-v0")` predicts, '
            f'`gym.make("nextstate/{name}Play-v0")` plays. Shortcuts: {", ".join(cls.shortcuts) or "none"}. '
            f"Kinds of minimal pairs: {kinds}.\n\n" + table(("setting", "type", "default", "legal", "meaning"), rows)
        )
    return "\n\n".join(out)


def command(study: str) -> str:
    """Return what the command line says of a study, with an example."""
    from nextstate.analysis.studies import STUDIES

    listed = STUDIES[study]
    return f"{listed.help}\n\n    {listed.example}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


PARTS: dict[str, Callable[..., str]] = {
    "tables": tables, "config": config, "games": games, "command": command, "root": from_root,
}  # fmt: skip
