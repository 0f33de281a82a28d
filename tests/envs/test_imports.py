"""The modules of envs import each other in one direction: there is no cycle, function-local imports included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import nextstate.envs

ROOM = Path(nextstate.envs.__file__).resolve().parent
PACKAGE = "nextstate.envs"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOM).with_suffix("").parts
    return ".".join([PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def imported(source: str, known: set[str]) -> set[str]:
    """Return the known modules that a module imports, anywhere in its text.

    Of `from package import module` that is the module; the package around it, which Python runs first, is not counted.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {node.module} & known
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_there_is_no_cycle() -> None:
    sources = {module_name(p): p.read_text(encoding="utf-8") for p in ROOM.rglob("*.py")}
    graph = {name: imported(source, set(sources)) for name, source in sources.items()}
    assert sum(map(len, graph.values())) > 50
    assert not cycle(graph), " -> ".join(cycle(graph))


BACK = ("from a import c", "import a.c", "def f():\n    from a.c import x", "if TYPE_CHECKING:\n    import a.c")


@pytest.mark.parametrize("back", BACK)
def test_a_cycle_is_found_wherever_it_is_imported(back: str) -> None:
    sources = {"a": "", "a.b": back, "a.c": "from a.b import x"}
    assert set(cycle({name: imported(source, set(sources)) for name, source in sources.items()})) == {"a.b", "a.c"}
