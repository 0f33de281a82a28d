"""Gymnasium environments for all games: `PredictionEnv` for predicting states, `PlayEnv` for playing."""

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
    own_accuracy,
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
    """Return the game and the length of its episodes; raises `GameError` if an argument is not possible.

    If `steps` is None, an episode has 10 steps, or the game's maximum if that is smaller.
    """
    if isinstance(game, Game):
        require(not settings, "settings", settings, f"none, since {game.name} was passed as a game object")
        made = game
    else:
        made = make_game(game, **settings)
    if steps is None:
        steps = min(DEFAULT_STEPS, made.max_steps or DEFAULT_STEPS)
    check_steps(made, steps)
    require(render_mode is None or render_mode in RENDER_MODES, "render_mode", render_mode, "None or 'ansi'")
    return made, steps


def text_space(steps: int) -> gym.spaces.Text:
    """Return the space of transcripts of `steps` steps; Gymnasium requires a maximum length, which is set generously.

    Asynchronous vector environments pad texts to this length unless they are created with `shared_memory=False`.
    """
    return gym.spaces.Text(16_384 + 1_024 * steps, min_length=0, charset=PRINTABLE | {"\n"})


def answer_space(game: Game, answer: str) -> gym.Space[Any]:
    """Return the space of answers: text, or the index of a choice."""
    require(answer in ANSWERS, "answer", answer, f"one of {', '.join(ANSWERS)}")
    if answer == "choice":
        return gym.spaces.Discrete(game.max_choices)
    return gym.spaces.Text(MAX_ANSWER, min_length=0, charset=PRINTABLE)


def ceilings(episode: Episode) -> list[tuple[float, float]]:
    """Return the expected accuracy of the lookup and the ideal reader on the first question of each step."""
    rows = zip(episode.steps, episode.beliefs("lookup"), episode.ceilings, strict=True)
    return [(own_accuracy(low[0], step.questions[0].accepted), high[0]) for step, low, high in rows]


class PredictionEnv(gym.Env[str, Any]):
    """Predict the next state of a game whose actions are drawn by its own policy.

    The whole episode is drawn at reset, by `unroll(game, seed, steps)`; answers do not affect it.

    Observation: the transcript up to the answer of a question (`Episode.prompt`); after the last question, the complete
    transcript.
    Action: the answer, as text (surrounding white space is ignored) or, with `answer="choice"`, as an index into
    `info["choices"]`. An answer that is none of the choices scores 0 and sets `info["illegal"]`.
    Reward: 1 if the answer is accepted, else 0.
    End: terminated after `steps` questions.
    Info: `step` and `choices` of the question shown. After a step also, for the question just answered: `answer` (the
    truth), `accepted` (indices of all right choices), `state` (the value of each variable), `lookup` and
    `ceiling` (the expected accuracy of the lookup and of the ideal reader), `determined` (whether `ceiling` is 1),
    `chance`, `correct` and `illegal`.

    A reset without a seed draws one from `np_random`, so that `episode.seed` always identifies the episode.

    Args:
        game: the name of a game, see `nextstate.envs.make_game`; or a game object.
        steps: questions in an episode; by default 10, or the game's maximum if that is smaller.
        answer: "text" or "choice".
        render_mode: None or "ansi", which renders the observation.
        settings: keyword arguments of the game.
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
        """Draw a new episode and return its first question; `options` is ignored."""
        super().reset(seed=seed)
        if seed is None:
            self.episode = unroll(self.game, int(self.np_random.integers(2**31)), self.steps)
        else:
            self.episode = unroll(self.game, seed, self.steps, rng=self.np_random)
        self._texts, self._ceilings = self.episode.texts, ceilings(self.episode)
        self._head, self._at = self.episode.opening, 0
        info: dict[str, Any] = {}
        self._show(info)
        return self._shown, info

    def step(self, action: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answer the current question and return the next one; raises `ResetNeeded` if there is no current question."""
        at = self._at if self.episode is not None else self.steps
        if self.episode is None or at == self.steps:
            raise ResetNeeded(f"there is no question to answer (step {at} of {self.steps}): call reset()")
        now = self.episode.steps[at]
        question = now.questions[0]
        index = self._index(action, question)
        correct = index in question.accepted
        lookup, ceiling = self._ceilings[at]
        info = {
            "answer": question.answer,
            "accepted": question.accepted,
            "state": dict(self.game.values(now.next_state)),
            "lookup": lookup,
            "ceiling": ceiling,
            "determined": ceiling == 1.0,
            "chance": question.chance,
            "correct": correct,
            "illegal": index < 0,
        }
        self._head += self._texts[at]
        self._at = at + 1
        self._show(info)
        return self._shown, float(correct), self._at == self.steps, False, info

    def render(self) -> str | None:
        """Return the current observation if `render_mode="ansi"`, else None."""
        return self._shown if self.render_mode == "ansi" else None

    def _index(self, action: Any, question: Question) -> int:
        """Return the index of the choice that `action` gives, -1 if it is none of them."""
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
    """Play a game by text commands, towards an aim that is stated at the start.

    Observation: at reset the aim, an empty line, and the game's opening; after a command the text it adds to the
    transcript, with all questions and answers if feedback is inline (" Nothing happens." after an illegal command).
    Action: one of `info["admissible_commands"]`; case and extra white space are ignored. Any other text leaves the
    state unchanged, sets `info["illegal"]`, and counts as a step.
    Aim: the game's own objective, if it has one. Otherwise a goal is drawn: a hidden walk of `steps` steps follows the
    game's policy, and the goal is a random variable and value among those that differ from the start at the end of the
    walk, or, if none does, at the last of its states where one differs. (If nothing differs on the whole walk, the goal
    is the initial value of a random variable, which the first command reaches.)
    Reward: with the game's own objective, the points gained by the command; otherwise 1 if the goal is reached, else 0.
    End: terminated when the aim is reached or no command is left; truncated after `steps` commands.
    Info: `admissible_commands`, `state` (the value of each variable), `goal` ((variable, value), or ("", objective) for
    the game's own objective), `illegal`, `score` (the sum of all rewards so far), `max_score` (the maximum score; 1 for
    drawn goals), `won` (whether the aim is reached).

    Args:
        game: the name of a game, see `nextstate.envs.make_game`; or a game object.
        steps: commands in an episode; by default 10, or the game's maximum if that is smaller.
        render_mode: None or "ansi", which renders the observation.
        settings: keyword arguments of the game.
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
        """The episode so far: an opening with the aim, and one step for each command.

        `seed` is the seed of the last reset, or -1 if it was given none.
        """
        if self.aim is None:
            raise ResetNeeded("no episode has started: call reset()")
        return Episode(self.game, self._seed, self.aim.start, self._opening, tuple(self._steps))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Draw an initial state, and a goal if the game has no objective; return their text. Ignores `options`."""
        super().reset(seed=seed)
        self.state = self.game.initial(self.np_random)
        self.aim = Aim.draw(self.game, self.state, self.steps, self.np_random)
        self._seed = -1 if seed is None else seed
        self._steps: list[Step] = []
        self._open, self._score = True, 0.0
        self._shown = self._opening = f"{self.aim.words}\n\n{self.game.opening(self.state)}"
        return self._shown, self._info(self.aim, illegal=False, won=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Execute a command; raises `ResetNeeded` if no episode is in progress."""
        if not self._open or self.aim is None:
            raise ResetNeeded("no episode is in progress: call reset()")
        chosen = self._commands.get(_plain(action)) if isinstance(action, str) else None
        reward, won = 0.0, False
        if chosen is None:
            self._steps.append(refuse(self.state, " ".join(str(action)[:MAX_ANSWER].split())))
            self._shown = NOTHING
        else:
            now = take(self.game, self.state, chosen)
            reward, won = self.aim.reward(self.state, now.next_state), self.aim.reached(now.next_state)
            self._steps.append(now)
            self.state, self._shown = now.next_state, words(now)
        self._score += reward
        info = self._info(self.aim, illegal=chosen is None, won=won)
        terminated = won or not info["admissible_commands"]
        truncated = not terminated and len(self._steps) >= self.steps
        self._open = not (terminated or truncated)
        return self._shown, reward, terminated, truncated, info

    def render(self) -> str | None:
        """Return the last observation if `render_mode="ansi"`, else None."""
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
