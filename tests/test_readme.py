"""The README holds what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert examples
    for example in examples:
        done = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", example], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") >= 9


def test_what_it_links_to_is_there() -> None:
    links = [x for x in re.findall(r"\]\(([^)]+)\)", README) if not x.startswith("http")]
    links += re.findall(r"configs/[\w/]+\.yaml", README) + re.findall(r"envs/games/\w+\.py", README)
    assert len(links) > 5
    assert [x for x in links if not (ROOT / x).exists()] == []


@pytest.mark.parametrize("name", sorted(set(re.findall(r"python -m (benchmarks\.\w+)", README))))
def test_each_benchmark_it_names_can_be_asked_for_help(name: str) -> None:
    done = subprocess.run([sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--quick" in done.stdout


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([\w-]+)", README))))
def test_each_make_target_it_names_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)
