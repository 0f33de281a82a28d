"""Gymnasium environments over games: one class for predicting every game's states, one for playing every game."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium as gym
from gymnasium.error import ResetNeeded

from nextstate.envs.aims import NOTHING, Aim, positions, refuse, take, words
from nextstate.envs.game import (
    Action,
    Episode,
    Game,
    Question,
    State,
    Step,
    check_steps,
    expected_accuracy,
    require,
    unroll,
)
from nextstate.envs.games import make_game

PRINTABLE = frozenset(map(chr, range(32, 127)))
ANSWERS = ("text", "choice")
RENDER_MODES = ("ansi",)
DEFAULT_STEPS = 10
MAX_ANSWER = 256  # characters


def set_up(game: str | Game, steps: int | None, render_mode: str | None, settings: dict[str, Any]) -> tuple[Game, int]:
    """Return the game and the length of its episodes; `GameError` names any argument that is not possible.

    If `steps` is None, an episode has 10 steps, or as many as the game has if those are fewer.
    """
    if isinstance(game, Game):
        require(not settings, "settings", settings, f"none, since the game {game.name} is made already")
        made = game
    else:
        made = make_game(game, **settings)
    if steps is None:
        steps = min(DEFAULT_STEPS, made.max_steps or DEFAULT_STEPS)
    check_steps(made, steps)
    require(render_mode is None or render_mode in RENDER_MODES, "render_mode", render_mode, "None or 'ansi'")
    return made, steps


def text_space(steps: int) -> gym.spaces.Text:
    """Return the space of transcripts of `steps` steps; its bound is generous, since Gymnasium asks for one.

    Gymnasium's asynchronous vectors fill texts up to that bound, unless made with `shared_memory=False`.
    """
    return gym.spaces.Text(16_384 + 1_024 * steps, min_length=0, charset=PRINTABLE | {"\n"})


def answer_space(game: Game, answer: str) -> gym.Space[Any]:
    """Return the space of answers: words, or the index of a choice."""
    require(answer in ANSWERS, "answer", answer, f"one of {', '.join(ANSWERS)}")
    if answer == "choice":
        return gym.spaces.Discrete(game.max_choices)
    return gym.spaces.Text(MAX_ANSWER, min_length=0, charset=PRINTABLE)


def ceilings(episode: Episode) -> list[float]:
    """Return what the ideal reader is expected to score on the first question of each step."""
    beliefs = episode.beliefs("ideal")
    return [
        expected_accuracy(row[0], step.questions[0].accepted) for row, step in zip(beliefs, episode.steps, strict=True)
    ]


class PredictionEnv(gym.Env[str, Any]):
    """Predict the next state of a game that plays itself.

    The whole episode is drawn at reset, by `unroll(game, seed, steps)`; answers do not change it.

    Observation: the transcript up to a question's blank (`Episode.prompt`); after the last question the transcript.
    Action: the answer, as text (surrounding white space does not count) or, with `answer="choice"`, as an index into
    `info["choices"]`. An answer that is none of the choices scores 0 and is marked `info["illegal"]`.
    Reward: 1 where the answer is accepted, else 0.
    End: terminated after `steps` questions.
    Info: `step` and `choices` of the question shown; after a step also, of the question just answered, `answer` (the
    truth), `accepted` (indices of all right choices), `state` (the value of each variable), `ceiling` (what the ideal
    reader is expected to score), `determined` (that is 1), `chance`, `correct` and `illegal`.

    A reset without a seed draws one from `np_random`, so that `episode.seed` always names the episode.

    Args:
        game: its name, as `nextstate.envs.make_game` takes it; or a game, made already.
        steps: questions in an episode; by default 10, or as many as the game has.
        answer: "text" or "choice".
        render_mode: None or "ansi", which renders the observation.
        settings: the game's own.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 1}

    def __init__(
        self,
        game: str | Game,
        steps: int | None = None,
        answer: Literal["text", "choice"] = "text",
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        self.game, self.steps = set_up(game, steps, render_mode, settings)
        self.render_mode, self.answer = render_mode, answer
        self.observation_space: gym.Space[str] = text_space(self.steps)
        self.action_space: gym.Space[Any] = answer_space(self.game, answer)
        self.episode: Episode | None = None
        self._shown = ""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Draw a new episode and show its first question; options are not used."""
        super().reset(seed=seed)
        if seed is None:
            self.episode = unroll(self.game, int(self.np_random.integers(2**31)), self.steps)
        else:
            self.episode = unroll(self.game, seed, self.steps, rng=self.np_random)
        self._told, self._ceilings = self.episode.texts, ceilings(self.episode)
        self._head, self._at = self.episode.opening, 0
        info: dict[str, Any] = {}
        self._show(info)
        return self._shown, info

    def step(self, action: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answer the question shown, and show the next one; raises `ResetNeeded` where none is open."""
        at = self._at if self.episode is not None else self.steps
        if self.episode is None or at == self.steps:
            raise ResetNeeded(f"no question is open (step {at} of {self.steps}): call reset()")
        now = self.episode.steps[at]
        question = now.questions[0]
        index = self._index(action, question)
        correct = index in question.accepted
        ceiling = self._ceilings[at]
        info = {
            "answer": question.answer,
            "accepted": question.accepted,
            "state": dict(self.game.values(now.next_state)),
            "ceiling": ceiling,
            "determined": ceiling == 1.0,
            "chance": question.chance,
            "correct": correct,
            "illegal": index < 0,
        }
        self._head += self._told[at]
        self._at = at + 1
        self._show(info)
        return self._shown, float(correct), self._at == self.steps, False, info

    def render(self) -> str | None:
        """Return the text now shown where `render_mode="ansi"`, else None."""
        return self._shown if self.render_mode == "ansi" else None

    def _index(self, action: Any, question: Question) -> int:
        """Return which choice `action` means, -1 where it means none."""
        if self.answer == "text":
            return positions(question.choices).get(action.strip(), -1) if isinstance(action, str) else -1
        return int(action) if self.action_space.contains(action) and action < len(question.choices) else -1

    def _show(self, info: dict[str, Any]) -> None:
        info["step"] = self._at
        if self._at == self.steps:
            self._shown, info["choices"] = self._head, ()
            return
        assert self.episode is not None
        now = self.episode.steps[self._at]
        self._shown = f"{self._head}{now.narration}{now.questions[0].stem}"
        info["choices"] = now.questions[0].choices


class PlayEnv(gym.Env[str, str]):
    """Play a game in words, towards an aim that is told at the start.

    Observation: at reset the aim, an empty line, and the game's opening; after a command the words it adds to the
    transcript, with each question and its answer where feedback is inline (" Nothing happens." where it is illegal).
    Action: one of `info["admissible_commands"]`; case and extra white space do not count. Anything else leaves the
    state as it is, is marked `info["illegal"]`, and counts as a step.
    Aim: the game's own objective, where it has one. Else a goal is drawn: a walk of `steps` steps by the game's own
    policy is drawn and hidden; the goal is a random one of the values that differ from the start's at its end, or,
    where none does, at the last of its states where one does. (Where nothing differs on the whole walk it is the
    present value of a random variable, reached by the first command.)
    Reward: with the game's own objective the points that the command brings; else 1 where the goal is reached, else 0.
    End: terminated when the aim is reached or no command is left; truncated after `steps` commands.
    Info: `admissible_commands`, `state` (the value of each variable), `goal` ((variable, value); ("", objective) where
    it is the game's own), `illegal`, `score` (the sum of all rewards so far), `max_score` (the most there is; 1 where
    a goal is drawn), `won` (the aim is reached).

    Args:
        game: its name, as `nextstate.envs.make_game` takes it; or a game, made already.
        steps: commands in an episode; by default 10, or as many as the game has.
        render_mode: None or "ansi", which renders the observation.
        settings: the game's own.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 1}

    def __init__(
        self, game: str | Game, steps: int | None = None, render_mode: str | None = None, **settings: Any
    ) -> None:
        self.game, self.steps = set_up(game, steps, render_mode, settings)
        self.render_mode = render_mode
        self.observation_space: gym.Space[str] = text_space(self.steps)
        self.action_space: gym.Space[str] = gym.spaces.Text(MAX_ANSWER, min_length=0, charset=PRINTABLE)
        self.state: State = None
        self.aim: Aim | None = None
        self._open, self._shown = False, ""

    @property
    def episode(self) -> Episode:
        """What has been told so far: an opening with the aim, and a step for each command, with no question to come.

        `seed` is that of the last reset, or -1 where it was given none.
        """
        if self.aim is None:
            raise ResetNeeded("no episode has begun: call reset()")
        return Episode(self.game, self._seed, self.aim.start, self._opening, tuple(self._told))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Draw a start, and a goal where the game has no objective, and tell both; options are not used."""
        super().reset(seed=seed)
        self.state = self.game.initial(self.np_random)
        self.aim = Aim.draw(self.game, self.state, self.steps, self.np_random)
        self._seed = -1 if seed is None else seed
        self._told: list[Step] = []
        self._open, self._score = True, 0.0
        self._shown = self._opening = f"{self.aim.words}\n\n{self.game.opening(self.state)}"
        return self._shown, self._info(self.aim, illegal=False, won=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take a command; raises `ResetNeeded` where no episode is open."""
        if not self._open or self.aim is None:
            raise ResetNeeded("no episode is open: call reset()")
        chosen = self._commands.get(_plain(action)) if isinstance(action, str) else None
        reward, won = 0.0, False
        if chosen is None:
            self._told.append(refuse(self.state, " ".join(str(action)[:MAX_ANSWER].split())))
            self._shown = NOTHING
        else:
            now = take(self.game, self.state, chosen)
            reward, won = self.aim.reward(self.state, now.next_state), self.aim.reached(now.next_state)
            self._told.append(now)
            self.state, self._shown = now.next_state, words(now)
        self._score += reward
        info = self._info(self.aim, illegal=chosen is None, won=won)
        terminated = won or not info["admissible_commands"]
        truncated = not terminated and len(self._told) >= self.steps
        self._open = not (terminated or truncated)
        return self._shown, reward, terminated, truncated, info

    def render(self) -> str | None:
        """Return the text last shown where `render_mode="ansi"`, else None."""
        return self._shown if self.render_mode == "ansi" else None

    def _info(self, aim: Aim, illegal: bool, won: bool) -> dict[str, Any]:
        legal = self.game.actions(self.state)
        commands = [self.game.command(self.state, action) for action in legal]
        self._commands: dict[str, Action] = dict(zip(map(_plain, commands), legal, strict=True))
        return {
            "admissible_commands": commands,
            "state": dict(self.game.values(self.state)),
            "goal": aim.goal,
            "illegal": illegal,
            "score": self._score,
            "max_score": aim.most,
            "won": won,
        }


def _plain(command: str) -> str:
    return " ".join(command.split()).casefold()
