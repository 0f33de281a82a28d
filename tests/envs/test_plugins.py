"""Plugins are found by name, imported when first used, and each failure is one line that names the plugin."""

import sys
from pathlib import Path

import pytest

from nextstate.envs import plugins
from tests.outside import write_package

GROUP = "nextstate.things"
COLOURS = "red = 'the colour red'\nblue = 'the colour blue'\n"


def package(folder: Path, name: str, source: str, things: dict[str, str]) -> None:
    write_package(folder, name, source, GROUP, things)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on `sys.path`; what was imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_an_entry_point_and_its_module_and_name_are_one_object(site):
    package(site, "colours", COLOURS, {"red": "colours:red", "blue": "colours:blue"})
    assert list(plugins.names(GROUP)) == ["blue", "red"]
    assert "colours" not in sys.modules
    for name, entry in plugins.names(GROUP).items():
        assert plugins.load(GROUP, name) is plugins.load(GROUP, entry.value)


def test_a_plugin_that_cannot_be_imported_leaves_the_others(site):
    package(site, "colours", COLOURS, {"red": "colours:red"})
    package(site, "broken", "raise OSError('no\\nscreen')", {"grey": "broken:grey"})
    package(site, "leaving", "raise SystemExit(3)", {"white": "leaving:white"})
    assert list(plugins.names(GROUP)) == ["grey", "red", "white"]
    with pytest.raises(
        plugins.PluginError, match=r"'grey' of the package broken \(broken:grey\) .* OSError: no screen"
    ):
        plugins.load(GROUP, "grey")
    with pytest.raises(plugins.PluginError, match=r"'white' of the package leaving .* SystemExit: 3"):
        plugins.load(GROUP, "white")
    assert plugins.load(GROUP, "red") == "the colour red"


def test_two_packages_with_one_name_are_both_named(site):
    package(site, "colours", COLOURS, {"red": "colours:red", "blue": "colours:blue"})
    package(site, "paints", COLOURS, {"red": "paints:red"})
    with pytest.raises(plugins.PluginError, match=r"'red': .*colours \(colours:red\) and .*paints \(paints:red\)"):
        plugins.load(GROUP, "red")
    assert plugins.load(GROUP, "blue") == "the colour blue"
    assert list(plugins.names(GROUP)) == ["blue", "red"]


def test_a_built_in_name_cannot_be_used_by_a_package(site):
    package(site, "colours", COLOURS, {"red": "colours:red"})
    with pytest.raises(plugins.PluginError, match=r"'red': nextstate itself and .*colours"):
        plugins.check_unique(GROUP, "red", built_in=["red", "green"])
    plugins.check_unique(GROUP, "green", built_in=["red", "green"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bleu", "there is no thing 'bleu'; did you mean 'blue'\\?"),
        ("gren", "did you mean 'green'\\?"),
        ("x", "expected one of blue, green, or pkg.module:Name"),
        ("nowhere:red", "No module named 'nowhere'; install its package, or add its folder to PYTHONPATH"),
        ("colours.deep:red", "No module named 'colours.deep'.*; install"),
        ("colours:pink", "module 'colours' has no attribute 'pink'"),
        ("colours:", "'colours:' is not the name of a thing: expected .*pkg.module:Name"),
        (":red", "':red' is not the name of a thing: expected .*pkg.module:Name"),
        ("colours:red:blue", "'colours:red:blue' is not the name of a thing: expected .*pkg.module:Name"),
        ("needs:red", "No module named 'missing_library'$"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_line(site, name, said):
    package(site, "colours", COLOURS, {"blue": "colours:blue"})
    (site / "needs.py").write_text("import missing_library\n")
    with pytest.raises(plugins.PluginError, match=said) as caught:
        plugins.load(GROUP, name, built_in=["green"])
    assert "\n" not in str(caught.value)


def test_the_source_of_a_plugin_is_known_by_its_content(site):
    package(site, "shapes", "def square(): pass\nclass Circle: pass\n", {})
    square, circle = plugins.load(GROUP, "shapes:square"), plugins.load(GROUP, "shapes:Circle")
    before = plugins.source_digest(square)
    assert before == plugins.source_digest(circle)
    assert len(before) == 64
    (site / "shapes.py").write_text("def square(): return 4\n")
    assert plugins.source_digest(square) != before
    assert plugins.source_digest(plugins.load) is None  # part of nextstate
    assert plugins.source_digest(dict) is None  # no file in Python
