"""The house rules: which room may import which, and what a wheel must hold."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("envs", "agents", "analysis")
FORBIDDEN = {  # the arrows point one way: analysis -> agents -> envs
    "envs": ("nextstate.agents", "nextstate.analysis", "torch", "transformers"),
    "agents": ("nextstate.analysis",),
    "analysis": (),
}
STATISTICS = {"multinomial", "quantile", "nanquantile", "percentile", "nanpercentile", "ndtri", "ndtr", "sem", "ppf"}
NO_INTERVALS = {("analysis/response/figures.py", "quantile")}  # the range of a colour scale
FRONT_DOOR = ("__main__.py",)  # the only modules of the package that may import its command line
DATA = ("*.yaml", "*.json", "*.jinja", "*.js", "*.LICENSE", "*.cfg", "py.typed")


def modules(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*.py")) if "__pycache__" not in p.parts]


def front() -> list[Path]:
    """Return the modules that lie in the package's own folder, not behind its links."""
    return sorted((ROOT / "nextstate").glob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """Return line and full dotted name of everything a module imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by the full name, nextstate..."
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def everything() -> dict[str, Path]:
    """Return all modules of the package by their full names."""
    rooms = [(p.relative_to(ROOT), p) for room in ROOMS for p in modules(ROOT / room)]
    paths = rooms + [(p.relative_to(ROOT / "nextstate"), p) for p in front()]
    return {".".join(("nextstate", *at.with_suffix("").parts)).removesuffix(".__init__"): p for at, p in paths}


def only_for_types(tree: ast.Module) -> set[ast.AST]:
    """Return what is in blocks of `if TYPE_CHECKING`, which never run."""
    blocks = [x for x in ast.walk(tree) if isinstance(x, ast.If) and ast.unparse(x.test) == "TYPE_CHECKING"]
    return {inner for block in blocks for inner in ast.walk(block)}


def arrows() -> dict[str, set[str]]:
    """Return which modules each module imports when it is imported or run, also within functions."""
    paths = everything()
    out: dict[str, set[str]] = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        skipped, found = only_for_types(tree), set()
        for node in ast.walk(tree):
            if node in skipped:
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                found |= {one if one in paths else str(node.module) for one in full.values()}
        out[name] = found & paths.keys()
    return out


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_one_way(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(ROOT / room)
        for line, name in imports(path)
        if any(is_in(name, package) for package in FORBIDDEN[room])
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_but_the_front_door_imports_the_command_line() -> None:
    paths = [p for room in ROOMS for p in modules(ROOT / room)] + [p for p in front() if p.name not in FRONT_DOOR]
    wrong = [
        f"{p.relative_to(ROOT)}:{line}" for p in paths for line, name in imports(p) if is_in(name, "nextstate.cli")
    ]
    assert not wrong, "\n".join(wrong)


def test_intervals_and_tests_are_made_in_one_module() -> None:
    wrong = []
    for path in [p for p in modules(ROOT / "analysis") if p.name != "stats.py"] + front():
        tree, name = ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT))
        named = [(x.lineno, x.attr) for x in ast.walk(tree) if isinstance(x, ast.Attribute)]
        named += [(x.lineno, x.id) for x in ast.walk(tree) if isinstance(x, ast.Name)]
        named += [(x.value.lineno, "ddof") for x in ast.walk(tree) if isinstance(x, ast.keyword) and x.arg == "ddof"]
        wrong += [
            f"{name}:{line} uses {what}"
            for line, what in named
            if what in STATISTICS | {"ddof"} and (name, what) not in NO_INTERVALS
        ]
        wrong += [
            f"{name}:{line} imports {what}"
            for line, what in imports(path)
            if is_in(what, "scipy.stats") or what.split(".")[-1] in STATISTICS
        ]
    assert not wrong, "\n".join([*wrong, "intervals and tests belong in analysis/stats.py"])


def test_no_module_imports_itself_by_way_of_others() -> None:
    # nextstate.envs is not covered: games and their pairs still import each other.
    left = {k: {x for x in v if not is_in(x, "nextstate.envs")} for k, v in arrows().items()}
    left = {name: found for name, found in left.items() if not is_in(name, "nextstate.envs")}
    while ends := {name for name, found in left.items() if not found & left.keys()}:
        left = {name: found for name, found in left.items() if name not in ends}
    # Modules that import a circle without being in it are left too; drop them.
    while heads := left.keys() - {x for found in left.values() for x in found}:
        left = {name: found for name, found in left.items() if name not in heads}
    assert not left, "\n".join(f"{name} imports {', '.join(sorted(v & left.keys()))}" for name, v in left.items())


def test_private_names_stay_in_their_modules() -> None:
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in everything().items()}
    own: dict[str, set[str]] = {}  # private names that each module defines: functions, variables, attributes of self
    for name, tree in trees.items():
        found = {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef | ast.ClassDef)}
        found |= {x.id for x in ast.walk(tree) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        found |= {
            x.attr
            for x in ast.walk(tree)
            if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store) and ast.unparse(x.value) == "self"
        }
        own[name] = {x for x in found if private(x)}
    wrong = []
    for name, tree in trees.items():
        foreign = {x for other, found in own.items() if other != name for x in found} - own[name]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and is_in(str(node.module), "nextstate"):
                wrong += [f"{name}:{node.lineno} imports {x.name}" for x in node.names if private(x.name)]
            elif isinstance(node, ast.Attribute) and node.attr in foreign:  # names of other packages are not ours
                wrong.append(f"{name}:{node.lineno} uses {ast.unparse(node)}")
    assert not wrong, "\n".join([*wrong, "make these names public, or move what they name"])


def test_rooms_are_imported_by_their_package_name_only() -> None:
    folders = (*ROOMS, "benchmarks", "tests")
    paths = [p for folder in folders for p in modules(ROOT / folder)] + front()
    wrong = [
        f"{p.relative_to(ROOT)}:{line} imports {name}"
        for p in paths
        for line, name in imports(p)
        if any(is_in(name, room) for room in (*ROOMS, "configs"))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_links_to_its_rooms() -> None:
    for room in (*ROOMS, "configs"):
        link = ROOT / "nextstate" / room
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{room}"
        assert (ROOT / room / "__init__.py").exists()


def test_a_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    source = tmp_path / "source"  # built from a copy, so that no build folder is left in the tree
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "nextstate", *ROOMS, "configs"):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-R", str(ROOT / name), str(source)], check=True)  # keeps the links as links
    if not (source / "README.md").exists():
        (source / "README.md").write_text("nextstate\n")
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run([*command, "-w", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"pip wheel failed; it needs setuptools>=77 here:\n{done.stderr[-3000:]}"
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    needed = {f"nextstate/{p.name}" for p in front()} | {"nextstate/py.typed"}
    for room in (*ROOMS, "configs"):
        folder = ROOT / room
        data = [p for pattern in DATA for p in folder.rglob(pattern)] + list((folder / "tiny").glob("*"))
        needed |= {f"nextstate/{p.relative_to(ROOT)}" for p in [*modules(folder), *data] if p.is_file()}
    assert not needed - held, "\n".join(sorted(needed - held))
    assert not {name for name in held if name.split("/")[0] in ROOMS}  # no second copy at the top level
