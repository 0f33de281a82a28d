"""Games in the terminal: a person, or an agent that is watched, answers questions or gives commands."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from rich.text import Text

from nextstate.agents.agent import Agent, AgentError, Prompt
from nextstate.agents.human import STOP, GivenUp, Human, HumanPlayer
from nextstate.agents.play import AgentPlayer, Player, Playing
from nextstate.agents.registry import HUMAN, PLAYERS, REFERENCES, spec_of
from nextstate.envs.aims import Aim, reply, shortest
from nextstate.envs.environments import DEFAULT_STEPS, PlayEnv
from nextstate.envs.game import Episode, Game, GameError, Reader, unroll

LONG = 100  # default maximum number of commands in a game with an objective
ENDS = {
    "won": "Won",
    "lost": "Lost: no command is left",
    "steps": "Out of time",
    "": "Stopped",
}


@dataclass(frozen=True)
class Terminal:
    """The console that is written to, and the function that asks for a line of input."""

    console: Console

    def ask(self, prompt: str) -> str:
        """Ask for a line of input; raises `GivenUp` on Ctrl-D or Ctrl-C."""
        try:
            return self.console.input(Text(prompt, style="bold"))
        except (EOFError, KeyboardInterrupt):
            self.console.print()
            raise GivenUp from None

    def say(self, text: str, style: str = "") -> None:
        """Print plain text; square brackets are not read as markup."""
        self.console.print(Text(text, style=style), soft_wrap=not style)


def head(terminal: Terminal, game: Game, how: str) -> None:
    """Print the name and settings of the game, and the instructions `how`."""
    settings = ", ".join(f"{k}={v}" for k, v in game.settings.items() if v not in (None, ""))
    terminal.console.print(Text.assemble((game.name, "bold"), f"  {settings}"), soft_wrap=True)
    terminal.say(f"{how}\n", "dim")


def has_objective(game: Game, seed: int) -> bool:
    """Return whether the episode of this seed has an objective defined by the game itself."""
    return bool(game.objective(game.initial(np.random.default_rng(seed))))


def agent_named(name: str, game: Game, terminal: Terminal) -> Agent | Player:
    """Return the agent or player of this name: "human", or a name that `nextstate.agents.registry` knows.

    Raises:
        AgentError: there is no such agent, or the game has no such shortcut.
    """
    return Human(terminal.console, terminal.ask) if name == HUMAN else spec_of(name, [game]).make()


def predict(terminal: Terminal, game: Game, agent: str, steps: int | None, seed: int) -> int:
    """Ask `agent` the questions of one episode, show the right answers and the score; return the episode's length."""
    reader = agent_named(agent, game, terminal)
    if isinstance(reader, Player):
        raise AgentError(f"{agent} gives commands but cannot answer questions: play with --commands")
    reader = reader.live()
    length = steps if steps is not None else min(DEFAULT_STEPS, game.max_steps or DEFAULT_STEPS)
    episode = unroll(game, seed, length)
    tally = Tally()
    if agent == HUMAN:
        answers = {choice.strip().casefold() for step in episode.steps for choice in step.questions[0].choices}
        stop = next(word for word in STOP if word not in answers)
        how = f"Answer what comes next; an unambiguous part of the answer is enough.\n{stop} or Ctrl-D quits."
    else:
        how = f"{agent} answers what comes next.\nCtrl-C quits."
    head(terminal, game, how)
    terminal.say(episode.opening)
    with suppress(GivenUp, KeyboardInterrupt):
        for t, step in enumerate(episode.steps):
            if step.narration.strip():
                terminal.say(step.narration.strip())
            answered(terminal, reader, episode, t, tally, episode.ceilings[t][0])
            if step.outcome.strip():
                terminal.say(step.outcome.strip())
    if tally.asked < length:
        terminal.say(f"Stopped after {tally.asked} of {length} questions.")
    terminal.console.print(
        f"Score: [bold]{tally.right} of {tally.asked}[/]; the best possible reader expects {tally.ceiling:.1f}."
    )
    return length


@dataclass
class Tally:
    """The number of questions asked, the number answered right, and the ideal reader's expected number."""

    asked: int = 0
    right: int = 0
    ceiling: float = 0.0


def answered(terminal: Terminal, reader: Agent, episode: Episode, t: int, tally: Tally, ceiling: float) -> None:
    """Ask the first question of step `t`, show the right answer, and update the tally."""
    question = episode.steps[t].questions[0]
    answer = reader.predict([Prompt(episode, t)])[0]
    ok = answer.greedy in question.accepted
    tally.asked, tally.right, tally.ceiling = tally.asked + 1, tally.right + ok, tally.ceiling + ceiling
    if not isinstance(reader, Human):
        terminal.say(f"{question.stem.strip() or 'Next'} … {answer.answer}", "bold")
    truth = " or ".join(question.choices[i].strip() for i in question.accepted)
    terminal.say(f"  {'✓ right' if ok else f'✗ no: {truth}'}", "green" if ok else "red")


class Examiner:
    """Asks a question after each command, before its outcome is shown, and computes the ideal reader's accuracy.

    Args:
        terminal: where the questions are shown.
        reader: the agent that answers.
        playing: the episode, before its first command.
        rng: draws one of the questions of each step.
    """

    def __init__(self, terminal: Terminal, reader: Agent, playing: Playing, rng: np.random.Generator) -> None:
        self.terminal, self.reader, self.rng, self.tally = terminal, reader, rng, Tally()
        self.game = playing.env.game
        self.ideal: Reader = self.game.reader(playing.view.aim.start)

    def ask(self, episode: Episode) -> None:
        """Ask about the last step played."""
        step, game = episode.steps[-1], self.game
        self.ideal.observe(step.action)
        asked = game.questions(step.state, step.action, step.next_state)
        inline = game.feedback == "inline"
        if asked:
            # With inline feedback the transcript would contain the answers to all questions before the chosen one.
            question = asked[0 if inline else int(self.rng.integers(len(asked)))]
            ceiling = self.ideal.ceiling(question)
            steps = (*episode.steps[:-1], step._replace(questions=(question,)))
            answered(self.terminal, self.reader, replace(episode, steps=steps), len(steps) - 1, self.tally, ceiling)
        for question in asked if inline else ():
            self.ideal.observe_answer(question.truth)


def command(terminal: Terminal, game: Game, agent: str, steps: int | None, seed: int, questions: bool) -> int:
    """Play an episode by giving commands, or watch an agent do so; return the maximum number of commands.

    Raises:
        AgentError: the agent cannot play, or cannot answer questions.
    """
    own = has_objective(game, seed)
    length = steps if steps is not None else min(LONG if own else DEFAULT_STEPS, game.max_steps or LONG)
    playing = Playing(PlayEnv(game.name, length, **game.settings), seed)
    found = agent_named(agent, game, terminal)
    reader = None if isinstance(found, Player) else found
    if questions and reader is None:
        raise AgentError(f"{agent} gives commands but cannot answer questions: leave out --questions")
    if isinstance(found, Player):
        player = found
    elif agent == HUMAN:
        player = HumanPlayer(terminal.console, terminal.ask)
    elif found.kind in REFERENCES:
        raise AgentError(
            f"{agent} answers questions but cannot give commands: expected human, {', '.join(PLAYERS)} or a model"
        )
    else:
        player = AgentPlayer(found).begin()
    examiner = Examiner(terminal, reader, playing, np.random.default_rng([seed, 1])) if questions and reader else None
    if agent == HUMAN:
        how = "Give commands; the beginning or the number of a command is enough.\n? lists them, q or Ctrl-D quits."
    else:
        how = f"{agent} gives the commands.\nCtrl-C quits."
    head(terminal, game, how)
    terminal.say(playing.opening)
    with suppress(GivenUp, KeyboardInterrupt):
        while not playing.ended:
            given = player.choose([playing.view])[0]
            if agent != HUMAN:
                terminal.say(f"> {given}", "bold")
            playing.take(given)
            _show_turn(terminal, playing, given, examiner)
    _sum_up(terminal, playing, examiner)
    return length


def _show_turn(terminal: Terminal, playing: Playing, given: str, examiner: Examiner | None) -> None:
    """Show the outcome of a command; with an examiner, ask its question before the outcome is shown."""
    episode = playing.view.episode
    if examiner is None or not playing.legal[-1]:
        text = reply(given, playing.observations[-1])
        terminal.say(text or "Done.")
        return
    step = episode.steps[-1]
    before = reply(given, step.narration)
    if before:
        terminal.say(before)
    examiner.ask(episode)
    rest = playing.observations[-1].removeprefix(step.narration).strip()
    if rest:
        terminal.say(rest)


def _sum_up(terminal: Terminal, playing: Playing, examiner: Examiner | None) -> None:
    aim, taken = playing.view.aim, len(playing.commands)
    fewest = _fewest(aim)
    terminal.console.print(
        f"[bold]{ENDS[playing.ended]}[/] after {taken} command{'' if taken == 1 else 's'}"
        + (f"; the shortest solution takes {fewest}." if fewest is not None else ".")
    )
    terminal.console.print(f"Score: [bold]{playing.info['score']:g} of {playing.info['max_score']:g}[/].")
    if examiner is not None and examiner.tally.asked:
        tally = examiner.tally
        terminal.console.print(
            f"Questions: [bold]{tally.right} of {tally.asked}[/] right; "
            f"the best possible reader expects {tally.ceiling:.1f}."
        )


def _fewest(aim: Aim) -> int | None:
    try:
        found = shortest(aim)
    except GameError:  # too many states to search
        return None
    return None if found is None else len(found)
