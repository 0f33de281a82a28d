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
    "envs": ("nextstate.agents", "nextstate.analysis", "nextstate.experiment", "torch", "transformers"),
    "agents": ("nextstate.analysis", "nextstate.experiment"),
    "analysis": (),
}
FRONT_DOOR = ("__main__.py",)  # the only modules of the package that may import its command line
DATA = ("*.yaml", "*.jinja", "*.js", "*.LICENSE", "*.cfg", "py.typed")


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
