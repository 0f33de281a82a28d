"""TextWorld games from recipes and files: the same everywhere, made once, told by a process that may die."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nextstate.envs.game import GameError
from nextstate.envs.textworld import generate, zmachine
from nextstate.envs.textworld import pool as pools
from nextstate.envs.textworld.generate import GenerationError, Recipe, make, read
from nextstate.envs.textworld.pool import cache_folder, pool
from nextstate.envs.textworld.story import Story, clean, compile_story
from nextstate.envs.textworld.world import World

EVERY_KIND = (
    Recipe(rooms=3, objects=4, quest=3),
    Recipe(rooms=2, objects=4, quest=3, theme="basic"),
    Recipe(challenge="coin_collector", level=3),
    Recipe(challenge="treasure_hunter", level=4),
    Recipe(challenge="cooking", rooms=1, level=1, skills="cook+cut"),
    Recipe(challenge="simple"),
)
SMALL = Recipe(rooms=2, objects=3, quest=3)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXTSTATE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def compiled() -> Path:
    return compile_story(SMALL, 1)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and nothing in memory."""
    monkeypatch.setenv("NEXTSTATE_CACHE", str(tmp_path / "fresh"))
    pools._pools.clear()
    return tmp_path / "fresh"


def digest(game: Any) -> str:
    return hashlib.sha256(json.dumps(game.serialize(), sort_keys=True).encode()).hexdigest()


def in_another_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_game_is_the_same_in_every_process() -> None:
    chosen = [EVERY_KIND[0], EVERY_KIND[4]]  # cooking goes through sets where it says how one loses
    code = f"""
import hashlib, json, textworld, numpy, random
from nextstate.envs.textworld.generate import Recipe, make
textworld.g_rng.set_seed(4321); numpy.random.seed(7); random.seed(7)
make({SMALL!r}, 5)
for recipe in {chosen!r}:
    print(hashlib.sha256(json.dumps(make(recipe, 3).serialize(), sort_keys=True).encode()).hexdigest())
"""
    here = [digest(make(recipe, 3)) for recipe in chosen]
    assert in_another_process(code, PYTHONHASHSEED="1").split() == here


def test_games_are_made_beside_nnsight() -> None:
    # nnsight gives every object a method `save`, and so hides a function of that name in the interpreter's library.
    code = f"""
import nnsight
from nextstate.envs.textworld.generate import Recipe, make
print(len(make({EVERY_KIND[4]!r}, 3).quests))
"""
    assert int(in_another_process(code)) > 0


def test_another_seed_is_another_game() -> None:
    assert len({digest(make(SMALL, seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize("recipe", EVERY_KIND, ids=lambda r: r.challenge or r.theme)
def test_every_kind_is_made_silently_and_its_walkthrough_wins(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    from textworld import g_rng

    before = g_rng.seed
    game = make(recipe, 11)
    assert g_rng.seed == before, "TextWorld's global generator is as it was"
    assert capsys.readouterr() == ("", "")
    world = World.compile(game)
    facts, done = world.start, world.settle(world.start, 0)
    for words in world.walkthrough:
        legal = {world.commands[i].words: i for i in world.legal(facts)}
        facts = world.after(facts, legal[words])
        done = world.settle(facts, done)
    assert world.won(done), world.walkthrough


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rooms": 0}, "rooms=0 is not possible: expected a whole number from 1 to 20"),
        ({"rooms": True}, "rooms=True is not possible: expected a whole number"),
        ({"objects": 2.0}, "objects=2.0 is not possible: expected a whole number from 0 to 60"),
        ({"quest": 3, "breadth": 2}, "quest=3 is not possible: expected a whole number from 4 to 20 with breadth=2"),
        ({"level": 3}, "level=3 is not possible: expected None with challenge=''"),
        ({"theme": "castle"}, "theme='castle' is not possible: expected one of house, basic"),
        ({"challenge": "chess"}, "challenge='chess' is not possible: expected one of '', 'coin_collector'"),
        ({"challenge": "cooking", "rooms": 3}, "rooms=3 is not possible: expected 1, 6, 9 or 12"),
        ({"challenge": "cooking", "skills": "cook+drop"}, "skills='cook.drop' is not possible: expected '' or some of"),
        ({"challenge": "cooking", "skills": "cut+cut"}, "skills='cut.cut' is not possible"),
        ({"skills": "cook"}, "skills='cook' is not possible: expected '' with challenge=''"),
        ({"challenge": "coin_collector", "level": 151}, "level=151 is not possible: expected 1 to 150 or 201 to 233"),
        ({"challenge": "simple", "objects": 3}, "objects=3 is not possible: expected None with challenge='simple'"),
        ({"file": "a.z8", "rooms": 3}, "rooms=3 is not possible: expected None with file='a.z8'"),
    ],
)
def test_a_recipe_that_cannot_be_says_why(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(GameError, match=says):
        Recipe(**arguments)


@pytest.mark.parametrize("recipe", [*EVERY_KIND, Recipe(file="a.z8")], ids=lambda r: r.challenge or r.theme)
def test_a_recipe_is_again_what_it_says_of_itself(recipe: Recipe) -> None:
    described = json.loads(json.dumps(recipe.describe()))
    assert Recipe(**described) == recipe


def test_a_recipe_that_a_seed_cannot_meet_names_both() -> None:
    recipe = Recipe(rooms=3, objects=5, quest=4, breadth=2)
    with pytest.raises(GenerationError, match=r"'breadth': 2.* with seed=0 .*try another seed"):
        make(recipe, 0)


def test_a_pool_is_read_back_without_textworld(fresh: Path) -> None:
    made = pool(SMALL, 3, 0)
    assert pool(SMALL, 3, 0) is made, "in one process it is read once"
    code = f"""
import json, sys
from nextstate.envs.textworld.generate import Recipe
from nextstate.envs.textworld.pool import pool
print(json.dumps([world.to_json() for world in pool({SMALL!r}, 3, 0)]))
assert not {{"textworld", "jericho", "torch", "transformers"}} & set(sys.modules), "heavy"
"""
    assert json.loads(in_another_process(code)) == json.loads(json.dumps([world.to_json() for world in made]))


def test_a_pool_knows_where_its_worlds_come_from(fresh: Path) -> None:
    told: list[tuple[int, int]] = []
    larger = pool(SMALL, 4, 7, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for one, other in zip(pool(SMALL, 2, 7), larger, strict=False):
        assert one.to_json() == other.to_json(), "a larger pool begins with a smaller one"
    for world in larger:
        again = World.compile(make(Recipe(**world.recipe), world.seed))
        assert (again.facts, again.commands, again.start) == (world.facts, world.commands, world.start)
        assert again.size() == (world.n_states, world.n_transitions)
    assert len({world.seed for world in (*larger, *pool(SMALL, 4, 8))}) == 8


@pytest.mark.parametrize("target", [{"states": 60}, {"states": 20, "transitions": 90}])
def test_sizes_that_are_asked_for_are_met(target: dict[str, int], fresh: Path) -> None:
    for world in pool(Recipe(), 2, 1, **target):  # type: ignore[arg-type]
        sizes = dict(zip(("states", "transitions"), world.size() or (0, 0), strict=True))
        assert sizes == {"states": world.n_states, "transitions": world.n_transitions}
        for name, asked in target.items():
            assert abs(sizes[name] - asked) <= 0.2 * asked
        again = World.compile(make(Recipe(**world.recipe), world.seed))
        assert (again.facts, again.commands) == (world.facts, world.commands)


def test_a_search_is_decided_by_its_seed(fresh: Path) -> None:
    pool(SMALL, 1, 2, states=12)
    path = next(fresh.rglob("pool-*.json"))
    before = path.read_bytes()
    path.unlink()
    pools._pools.clear()
    pool(SMALL, 1, 2, states=12)
    assert path.read_bytes() == before


def test_a_search_that_finds_nothing_says_what_was_nearest(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "SEARCH", 1)
    with pytest.raises(GameError, match=r"no game around .* has about 500 states .*nearest: \|Q\|=\d+, \|T\|=\d+ of"):
        pool(SMALL, 1, 0, states=500)
    with pytest.raises(GameError, match=r"about 2 transitions .*nearest: none below twice that size"):
        pool(Recipe(rooms=3, objects=9), 1, 0, transitions=2)


def test_a_recipe_that_no_seed_meets_is_given_up(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "TRIES", 2)
    with pytest.raises(GameError, match=r"TextWorld makes no game of .* with any of 2 seeds"):
        pool(Recipe(rooms=3, objects=5, quest=4, breadth=2), 30, 0)
    assert not list(fresh.rglob("*")), "nothing is kept of it"


@pytest.mark.parametrize("damage", [b"", b"[{", b'[{"names": {}}]', b'{"a": 1}', b"\xff\xfe"])
def test_a_damaged_pool_is_made_again(damage: bytes, fresh: Path) -> None:
    made = pool(SMALL, 1, 0)
    path = next(fresh.rglob("pool-*.json"))
    whole = path.read_bytes()
    path.write_bytes(damage)
    pools._pools.clear()
    assert pool(SMALL, 1, 0)[0].to_json() == made[0].to_json()
    assert path.read_bytes() == whole


def test_a_full_disk_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(GameError, match=r"pool-\w+\.json cannot be written \(No space left.*set NEXTSTATE_CACHE"):
        pool(SMALL, 1, 0)
    assert not list(cache_folder().iterdir()), "no half of a file stays"
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(GameError, match=r"cannot be compiled to .*No space left.*NEXTSTATE_CACHE"):
        compile_story(SMALL, 2)
    assert not list(cache_folder().iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NEXTSTATE_CACHE", str(tmp_path / "file"))
    with pytest.raises(GameError, match="set NEXTSTATE_CACHE"):
        pool(SMALL, 1, 12345)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.json", None, "expected the path of a file that is there"),
        ("none.z8", None, "expected the path of a file that is there"),
        ("game.ulx", b"Glul", "expected a TextWorld game, a .z8 or its .json"),
        ("cut.json", b'{"version": 1, "world": [', "is not JSON"),
        ("bytes.json", bytes(range(256)), "is not JSON"),
        ("deep.json", b"[" * 100_000, "is not JSON"),
        ("large.json", b" " * (generate.MOST_BYTES + 1), "is too large"),
        ("list.json", b"[1, 2]", "is not the metadata of a TextWorld game"),
        ("foreign.json", b'{"name": "nextstate", "version": 1}', "is not the metadata of a TextWorld game"),
        ("text.z8", b"8" * 500, "is not a compiled game"),
        ("empty.z8", b"", "is not a compiled game"),
    ],
)
def test_a_bad_file_is_named(name: str, content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / name if content is None else write(tmp_path / name, content)
    with pytest.raises(GameError, match=says) as caught:
        make(Recipe(file=str(path)), 0)
    assert name in str(caught.value)
    with pytest.raises(GameError, match=name.replace(".", r"\.")):
        pool(Recipe(file=str(path)), 1, 0)


def altered(compiled: Path, **parts: Any) -> str:
    return json.dumps(json.loads(compiled.with_suffix(".json").read_text()) | parts)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"version": 2}, "has version 2: expected 1"),
        ({"infos": [["P", 3]]}, "infos has"),
        ({"infos": [["P", {"name": "a\u0007b", "id": "P", "type": "P"}]]}, "expected printable text"),
        ({"objective": ["win"]}, "expected printable text"),
        ({"KB": {"logic": "type t : x {", "text_grammars_path": "/"}}, "is not a TextWorld game"),
        ({"KB": {}}, "is not a TextWorld game"),
        ({"world": [{"name": "__import__('os')"}]}, "is not a TextWorld game"),
        ({"quests": [{}]}, "is not a TextWorld game"),
    ],
)
def test_metadata_that_makes_no_game_is_named(parts: dict[str, Any], says: str, compiled: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "odd.json", altered(compiled, **parts))
    with pytest.raises(GameError, match=says) as caught:
        read(path)
    assert "odd.json" in str(caught.value)


def test_a_story_without_metadata_cut_off_or_damaged_is_named(compiled: Path, tmp_path: Path) -> None:
    whole = compiled.read_bytes()
    alone = write(tmp_path / "alone.z8", whole)
    with pytest.raises(GameError, match=r"alone\.z8' has no metadata: expected alone\.json in its folder"):
        read(alone)
    cut = write(tmp_path / "cut.z8", whole[: len(whole) // 2])
    with pytest.raises(GameError, match=r"cut\.z8' is cut off: has [\d,]+ of [\d,]+ bytes"):
        Story(cut)
    spoilt = write(tmp_path / "spoilt.z8", whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(GameError, match=r"spoilt\.z8' is damaged"):
        compile_story(Recipe(file=str(spoilt)), 0)


def test_a_users_file_is_the_game_it_was(compiled: Path, tmp_path: Path) -> None:
    made = make(SMALL, 1)
    ours = World.compile(made)
    for path in (compiled, compiled.with_suffix(".json")):
        recipe = Recipe(file=str(path))
        (world,) = pool(recipe, 5, 3)
        assert (world.facts, world.commands, world.start) == (ours.facts, ours.commands, ours.start)
        assert (world.source, world.recipe) == (str(path), {"file": str(path)})
        with pytest.raises(GameError, match="states=5 is not possible: expected None with file"):
            pool(recipe, 1, 0, states=5)
    assert compile_story(Recipe(file=str(compiled)), 0) == compiled, "a .z8 is used where it is"
    json_only = write(tmp_path / "mine.json", compiled.with_suffix(".json").read_bytes())
    again = compile_story(Recipe(file=str(json_only)), 0)
    assert again.parent == cache_folder()
    assert Story(again).opening() == Story(compiled).opening()


def test_a_changed_file_is_another_pool(compiled: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json", compiled.with_suffix(".json").read_bytes())
    (before,) = pool(Recipe(file=str(path)), 1, 0)
    write(path, altered(compiled, objective="Do as you like."))
    (after,) = pool(Recipe(file=str(path)), 1, 0)
    assert before.objective != after.objective == "Do as you like."


def test_a_game_that_does_not_compile_names_its_file(compiled: Path, tmp_path: Path) -> None:
    infos = json.loads(compiled.with_suffix(".json").read_text())["infos"]
    next(info for _, info in infos if info["type"] == "r")["desc"] = "A room with [no such thing] in it."
    path = write(tmp_path / "wrong.json", altered(compiled, infos=infos))
    with pytest.raises(GameError, match=r"(?s)wrong\.json.* cannot be compiled: .*Inform"):
        compile_story(Recipe(file=str(path)), 0)
    assert not [p for p in cache_folder().iterdir() if p.name.startswith("partial-")]


def commands_of(recipe: Recipe, seed: int) -> tuple[str, ...]:
    walk = World.compile(make(recipe, seed)).walkthrough
    return ("look", "dance wildly", "inventory", "take moon", *walk[:-1], "examine xyzzy", "look", *walk[-1:])


@pytest.mark.parametrize("index", [0, 4], ids=["custom", "cooking"])
def test_the_words_are_those_of_textworlds_own_environment(index: int) -> None:
    import textworld

    recipe = EVERY_KIND[index]
    path = compile_story(recipe, 11)
    commands = commands_of(recipe, 11)
    game = Story(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the interpreter does not know the game by name
        environment = textworld.start(str(path), textworld.EnvInfos(facts=True, admissible_commands=True))
    assert clean(environment.reset()["feedback"]) == game.opening()
    for k, command in enumerate(commands):
        state, _, _ = environment.step(command)
        assert clean(state["feedback"]) == game.say(commands[:k], command)
    assert "*** The End ***" in game.say(commands[:-1], commands[-1])
    environment.close()


def test_words_are_clean(compiled: Path) -> None:
    told = Story(compiled)
    opening = told.opening()
    for text in (opening, told.say((), "look")):
        assert not {"$", ">"} & set(text)
        assert "=-0" not in text
        assert all(letter == "\n" or letter.isprintable() for letter in text)
        assert "-= " in text, "the room's name stays"
    assert opening.count("\n\n") >= 2, "paragraphs stay"


def test_what_is_said_depends_on_the_past_alone(compiled: Path) -> None:
    commands = commands_of(SMALL, 1)
    straight, jumping = Story(compiled), Story(compiled)
    told = {k: straight.say(commands[:k], commands[k]) for k in range(len(commands))}
    for k in (3, 0, len(commands) - 1, 1, 4):
        assert jumping.say(commands[:k], commands[k]) == told[k]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_is_not_noticed(how: signal.Signals, compiled: Path) -> None:
    commands = commands_of(SMALL, 1)
    whole, hurt = Story(compiled), Story(compiled)
    for k, command in enumerate(commands):
        if k == len(commands) // 2:
            assert hurt._process is not None
            before = hurt._process._process
            hurt._process.patience = 0.3
            os.kill(before.pid, how)
        assert hurt.say(commands[:k], command) == whole.say(commands[:k], command)
    assert hurt._process is not None
    assert hurt._process._process.pid != before.pid
    assert before.poll() is not None, "no zombie is left"


def test_a_game_that_breaks_the_machine_is_named(compiled: Path, tmp_path: Path) -> None:
    broken = bytearray(compiled.read_bytes())
    first, length = int.from_bytes(broken[6:8]), int.from_bytes(broken[0x1A:0x1C]) * 8
    broken[first:length] = bytes(length - first)  # nothing but zeros where its code begins
    broken[0x1C:0x1E] = (sum(broken[64:length]) % 2**16).to_bytes(2)
    path = write(tmp_path / "broken.z8", bytes(broken))
    with pytest.raises(GameError, match=r"broken\.z8 cannot be played: .*twice at its beginning"):
        Story(path).opening()


def test_without_an_interpreter_the_reason_is_told(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = write(tmp_path / "dies.py", "import no_such_module_here")
    monkeypatch.setattr(zmachine, "__file__", str(script))
    with pytest.raises(GameError, match=r"cannot be played: .*no_such_module_here.*twice at the command 'look'"):
        Story(compiled).say((), "look")


@pytest.mark.parametrize("command", ["go\nnorth", "x" * 201, "take\x00", "\x1b[2J", 3])
def test_a_command_is_one_line_of_printable_text(command: Any, compiled: Path) -> None:
    told = Story(compiled)
    for past, last in (((), command), ((command,), "look")):
        with pytest.raises(GameError, match="expected one line of at most 200 printable letters"):
            told.say(past, last)
    assert told._process is None, "the game has not seen it"


def test_what_a_game_saves_stays_in_its_own_folder(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(compiled.parent.iterdir())
    told = Story(compiled)
    assert told.say((), "save") == "Ok."
    told.say(("save",), "script")
    assert told._process is not None
    own = told._process._folder
    assert len(list((own / "play").iterdir())) == 2
    assert told.say((), "restore") != "Ok.", "what another past has saved is none of this one's"
    assert not list(tmp_path.iterdir())
    assert sorted(compiled.parent.iterdir()) == before
    told.close()
    assert not own.exists()


def test_no_process_outlives_its_story(compiled: Path) -> None:
    told = Story(compiled)
    told.opening()
    assert told._process is not None
    process = told._process._process
    del told
    gc.collect()
    assert process.poll() is not None
    code = f"""
from pathlib import Path
from nextstate.envs.textworld.story import Story
told = Story(Path({str(compiled)!r})); told.opening(); print(told._process._process.pid)
"""
    with pytest.raises(ProcessLookupError):
        os.kill(int(in_another_process(code)), 0)
