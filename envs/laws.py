"""The laws that every game must satisfy. `check_game` tests them by playing; authors of games should call it."""

from __future__ import annotations

import math
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from nextstate.envs.contrast import problems, segments
from nextstate.envs.environments import PRINTABLE, PlayEnv, PredictionEnv
from nextstate.envs.game import (
    Action,
    Distribution,
    Episode,
    Game,
    GameError,
    State,
    Step,
    expected_accuracy,
    own_accuracy,
    unroll,
)
from nextstate.envs.games import game_class
from nextstate.envs.rules import Rules

TOLERANCE = 1e-9
SIGMA = 4.0  # tolerance of averages, in standard errors
EXCESS = 0.02  # by how much a shortcut may beat a reader that ignores small clues, on average
MOST_ACTIONS = 32  # tested in one state
UNITS = (0.0, 0.123, 0.5, 0.987, math.nextafter(1.0, 0.0))


class LawError(AssertionError):
    """A game violates a law; the message names the law, the game's settings, the seed, and what was expected."""


class Case(NamedTuple):
    """The input of a law: a game, the seeds and length of its episodes, and the number of states to visit."""

    game: Game
    seeds: Sequence[int]
    steps: int
    states: int

    @property
    def episodes(self) -> list[Episode]:
        """The episodes, with all questions asked."""
        return [unroll(self.game, seed, self.steps, ask="all") for seed in self.seeds]

    @property
    def visited(self) -> list[State]:
        """The states of the episodes, and further ones that a breadth-first search from the first start reaches."""
        walked = [s for e in self.episodes for s in (e.start, *(step.next_state for step in e.steps))]
        seen = dict.fromkeys(walked)
        queue = [walked[0]]
        for state in queue:  # the loop appends to the queue
            for action in self.actions(state) if len(queue) < self.states else ():
                after = self.game.transition(state, action)
                if after not in seen and len(queue) < self.states:
                    queue.append(after)
                seen[after] = None
        return list(seen)

    def actions(self, state: State) -> Sequence[Action]:
        """Return the legal actions of a state; if there are very many, an evenly spaced selection."""
        legal = self.game.actions(state)
        return legal[:: -(-len(legal) // MOST_ACTIONS) or 1]


Law = Callable[[Case], Iterator[str]]  # yields descriptions of violations


def check_game(
    game: str | type[Game] | Game,
    *,
    seeds: Sequence[int] = range(30),
    steps: int = 12,
    sizes: Sequence[int] | None = None,
    states: int = 50,
    **settings: Any,
) -> None:
    """Check that a game satisfies all laws; returns None if it does.

    A game given by name or class is tested in all styles and feedbacks, and in several sizes. A game object is tested
    as it is.

    Args:
        game: a name (see `nextstate.envs.make_game`), a class, or a game object.
        seeds: seeds of the episodes to play. Laws about averages are more sensitive with more seeds.
        steps: length of the episodes; capped at the game's maximum.
        sizes: values of the size setting; by default the smallest, the middle and the largest of `Game.sizes`.
        states: the number of states to visit from the first start, in addition to those of the episodes.
        settings: further settings of the game.

    Raises:
        LawError: a law is violated. The message names the law, the settings, the seed, and what was expected.
        GameError: the game does not exist, or does not have these settings.
    """
    for made in _variants(game, sizes, settings):
        length = min(steps, made.max_steps or steps)
        for law in (*LAWS_OF_AN_EPISODE, *LAWS_OF_A_GAME, *LAWS_OF_MANY_EPISODES):
            batches = [[seed] for seed in seeds] if law in LAWS_OF_AN_EPISODE else [seeds]
            for i, batch in enumerate(batches):
                _apply(law, Case(made, batch, length, 0 if i else states))


def _variants(game: str | type[Game] | Game, sizes: Sequence[int] | None, settings: dict[str, Any]) -> Iterator[Game]:
    if isinstance(game, Game):
        yield game
        return
    cls = game_class(game) if isinstance(game, str) else game
    chosen = [cls.sizes[0], cls.sizes[len(cls.sizes) // 2], cls.sizes[-1]] if sizes is None else sizes
    for size, style, feedback in product(dict.fromkeys(chosen), cls.styles, cls.feedbacks):
        given: dict[str, Any] = {cls.size: size, "style": style, "feedback": feedback}
        yield cls(**settings | given)


def _apply(law: Law, case: Case) -> None:
    seeds = f"seed {case.seeds[0]}" if len(case.seeds) == 1 else f"seeds {case.seeds[0]} to {case.seeds[-1]}"
    where = f"law {law.__name__.replace('_', ' ')!r} is broken by {case.game!r}, {seeds}"
    try:
        problem = next(law(case), None)
    except Exception as error:
        raise LawError(f"{where}: expected no exception, found {type(error).__name__}: {error}") from error
    if problem is not None:
        raise LawError(f"{where}: {problem}")


def states_are_values(case: Case) -> Iterator[str]:
    """States and actions are hashable; a pickled copy equals the original and has the same hash."""
    for state in case.visited:
        for thing in (state, *case.actions(state)):
            copy = pickle.loads(pickle.dumps(thing))
            if copy != thing or hash(copy) != hash(thing):
                yield f"expected a pickled copy to be equal and to have the same hash, found {copy!r} for {thing!r}"


def actions_are_legal(case: Case) -> Iterator[str]:
    """Legal actions are distinct and in a fixed order; the policy draws legal ones; only games that end have none."""
    game = case.game
    for state in case.visited:
        legal = tuple(game.actions(state))
        if tuple(game.actions(state)) != legal:
            yield f"expected the same actions in the same order each time, found others for {state!r}"
        if len(set(legal)) < len(legal):
            yield f"expected each legal action once, found {legal!r} for {state!r}"
        if not legal and game.max_steps is None and not game.objective(state):
            yield f"expected legal actions, since the game has no end, found none for {state!r}"
        drawn = [game.policy(state, u) for u in UNITS] if legal else []
        wrong = [action for action in drawn if action not in legal]
        if wrong:
            yield f"expected the policy to draw one of {legal!r}, found {wrong[0]!r} for {state!r}"


def transitions_are_pure(case: Case) -> Iterator[str]:
    """A transition depends only on state and action, and modifies neither."""
    game = case.game
    for state in case.visited:
        before = pickle.dumps(state)
        for action in case.actions(state):
            after = game.transition(state, action)
            if game.transition(state, action) != after or game.transition(pickle.loads(before), action) != after:
                yield f"expected action {action!r} to lead from {state!r} to one state, found several"
        if pickle.loads(before) != state:
            yield f"expected a transition not to modify its state, found {state!r}"


def commands_are_distinct(case: Case) -> Iterator[str]:
    """Each legal action has a distinct command (ignoring case), on one line and with single spaces."""
    for state in case.visited:
        commands = [case.game.command(state, action) for action in case.game.actions(state)]
        if len({c.casefold() for c in commands}) < len(commands):
            yield f"expected a command for each action, found {commands!r} for {state!r}"
        for command in commands:
            if not command or not command.isprintable() or command != " ".join(command.split()):
                yield f"expected printable words with single spaces, found the command {command!r}"


def variables_stay_the_same(case: Case) -> Iterator[str]:
    """Every state of an episode has the same variables, and questions are about them."""
    game = case.game
    names = [*game.values(case.episodes[0].start)]
    for state in case.visited:
        values = game.values(state)
        if [*values] != names or not all(isinstance(value, str) for value in values.values()):
            yield f"expected a text for each of the variables {names}, found {dict(values)!r}"
        for action in case.actions(state):
            for question in game.questions(state, action, game.transition(state, action)):
                if question.variable not in names:
                    yield f"expected questions about {names}, found one about {question.variable!r}"


def questions_can_be_answered(case: Case) -> Iterator[str]:
    """Each step has questions; each question has distinct choices, and the true one is accepted."""
    for step in (step for episode in case.episodes for step in episode.steps):
        if not step.questions:
            yield f"expected a question after each step, found none after {step.action!r}"
        for q in step.questions:
            if len({choice.strip() for choice in q.choices}) < len(q.choices):
                yield f"expected distinct choices, found {q.choices!r}"
            elif len(q.choices) > case.game.max_choices:
                yield f"expected at most max_choices={case.game.max_choices} choices, found {len(q.choices)}"
            elif not 0 <= q.truth < len(q.choices) or q.truth not in q.accepted:
                yield f"expected the truth among the accepted choices {q.accepted!r}, found {q.truth!r}"
            elif q.accepted != tuple(sorted(set(q.accepted))) or not set(q.accepted) <= set(range(len(q.choices))):
                yield f"expected ascending indices of the {len(q.choices)} choices as accepted, found {q.accepted!r}"
            elif not q.accepts(q.answer) or q.accepts("no such answer"):
                yield f"expected the answer {q.answer!r} alone to be accepted"


def text_is_exact(case: Case) -> Iterator[str]:
    """Prompts are concatenations of their segments, begin with the transcript so far, and are printable ASCII."""
    game = case.game
    for episode in case.episodes:
        transcripts = episode.transcripts
        if episode.opening != game.opening(episode.start) or transcripts[0] != episode.opening:
            yield f"expected the transcript to begin with the opening of its start, found {transcripts[0]!r}"
        if not set(transcripts[-1]) <= PRINTABLE | {"\n"}:
            yield f"expected printable ASCII, found {sorted(set(transcripts[-1]) - PRINTABLE)!r}"
        for t, step in enumerate(episode.steps):
            for i, question in enumerate(step.questions):
                prompt = episode.prompt(t, i)
                if prompt != "".join(segments(episode, t, i)) or not prompt.endswith(question.stem):
                    yield f"expected a prompt that joins its segments and ends with its stem, found {prompt!r}"
                if not prompt.startswith(transcripts[t] + step.narration):
                    yield f"expected a prompt that begins with the transcript and narration, found {prompt!r}"
                answered = prompt + question.choices[question.truth]
                if game.feedback == "inline" and not transcripts[t + 1].startswith(answered):
                    yield f"expected inline answers to stay in the transcript, found {transcripts[t + 1]!r}"


def seeds_decide(case: Case) -> Iterator[str]:
    """The seed determines an episode, and a shorter episode is a prefix of a longer one."""
    game, seed, steps = case.game, case.seeds[0], case.steps
    episode, again = unroll(game, seed, steps), unroll(type(game)(**_arguments(game)), seed, steps)
    if episode != unroll(game, seed, steps) or episode.transcripts != again.transcripts:
        yield "expected the same episode from the same seed and settings, found another"
    copy = pickle.loads(pickle.dumps(episode))
    if copy != episode:
        yield "expected a pickled episode to be equal to the original"
    for shorter in range(1, steps):
        if unroll(game, seed, shorter).steps != episode.steps[:shorter]:
            yield f"expected {steps} steps to begin with the {shorter} steps of the same seed"


def steps_are_the_common_ones(case: Case) -> Iterator[str]:
    """A game that overrides `step` returns the same steps as the default implementation."""
    game = case.game
    draws = np.random.default_rng(case.seeds[0]).random((case.steps, 2)).tolist()
    for ask in (1, 2, 10**6):
        state = case.episodes[0].start
        for u, v in draws:
            if not game.actions(state):
                break
            step, common = game.step(state, u, v, ask), Rules.step(game, state, u, v, ask)
            if step != common or type(step) is not Step:
                yield f"expected {common!r} from step(state, {u}, {v}, {ask}), found {step!r}"
            state = step.next_state


def beliefs_are_distributions(case: Case) -> Iterator[str]:
    """Beliefs are distributions over the choices; those of ideal and lookup reader do not rule out right answers."""
    game = case.game
    for episode, name in product(case.episodes, ("ideal", "lookup", "chance", *game.shortcuts)):
        for step, row in zip(episode.steps, episode.beliefs(name), strict=True):
            for question, belief in zip(step.questions, row, strict=True):
                if len(belief) != len(question.choices):
                    yield f"expected a probability for each of {question.choices!r} from {name}, found {belief!r}"
                elif min(belief) < 0 or not math.isclose(sum(belief), 1, abs_tol=TOLERANCE):
                    yield f"expected probabilities from {name} that add up to 1, found {belief!r}"
                elif name in ("ideal", "lookup") and not sum(belief[i] for i in question.accepted) > 0:
                    answers = [question.choices[i].strip() for i in question.accepted]
                    yield f"expected the {name} reader not to rule out the right answer {answers!r}, found {belief!r}"


def what_the_text_settles_is_certain(case: Case) -> Iterator[str]:
    """Where every answer that the lookup reader may give is right, the ideal reader is certain."""
    for episode in case.episodes:
        rows = zip(episode.steps, episode.beliefs("lookup"), episode.ceilings, strict=True)
        for t, (step, beliefs, ceilings) in enumerate(rows):
            for question, belief, ceiling in zip(step.questions, beliefs, ceilings, strict=True):
                if not 0 < ceiling <= 1:
                    yield f"expected a ceiling above 0 and up to 1, found {ceiling} at step {t + 1}"
                elif ceiling < own_accuracy(belief, question.accepted) == 1:
                    yield f"expected a ceiling of 1 where lookup is certain, found {ceiling} at step {t + 1}"


def readers_know_only_the_text(case: Case) -> Iterator[str]:
    """For equal prompts the ideal and the lookup reader have equal beliefs."""
    known: dict[tuple[str, str, tuple[str, ...]], Distribution] = {}
    for episode, name in product(case.episodes, ("ideal", "lookup")):
        for t, row in enumerate(episode.beliefs(name)):
            for i, belief in enumerate(row):
                prompt, choices = episode.prompt(t, i), episode.steps[t].questions[i].choices
                first = known.setdefault((name, prompt, choices), belief)
                if not np.allclose(first, belief, atol=TOLERANCE):
                    yield f"expected one belief of {name} after {prompt!r}, found {first!r} and {belief!r}"


def the_ideal_reader_scores_what_it_expects(case: Case) -> Iterator[str]:
    """The ideal reader is right as often as the ceiling says."""
    rng = np.random.default_rng(0)
    error, variance, most = 0.0, 0.0, 0
    for episode in case.episodes:
        spread, unsure = 0.0, 0
        for step, row, ceilings in zip(episode.steps, episode.beliefs("ideal"), episode.ceilings, strict=True):
            for question, belief, p in zip(step.questions, row, ceilings, strict=True):
                # Ties are broken by noise far below any real difference.
                named = int(np.argmax(np.array(belief) + TOLERANCE * rng.random(len(belief))))
                error += (named in question.accepted) - p
                spread += math.sqrt(p * (1 - p))
                unsure += p < 1
        variance += spread**2  # an upper bound: all questions of an episode right or wrong together
        most = max(most, unsure)
    # Bernstein's inequality: about 1 in 1,500 games that satisfy the law exceeds these bounds.
    bound = SIGMA * math.sqrt(variance) + SIGMA**2 / 6 * most + 1e-6
    if abs(error) > bound:
        yield (
            f"expected the ideal reader to be right as often as it believes, within {bound:.3g} answers, "
            f"found {error:+.3g} answers"
        )


def no_reader_beats_the_ideal_one(case: Case) -> Iterator[str]:
    """On average no other reader scores more than the ideal one, up to sampling error and a small tolerance."""
    rows = defaultdict[str, list[list[float]]](list)
    names = ("lookup", "chance", *case.game.shortcuts)
    for episode in case.episodes:
        best = episode.beliefs("ideal")
        for name in names:
            rows[name].append(
                [
                    expected_accuracy(belief, question.accepted) - expected_accuracy(ideal, question.accepted)
                    for step, row, top in zip(episode.steps, episode.beliefs(name), best, strict=True)
                    for question, belief, ideal in zip(step.questions, row, top, strict=True)
                ]
            )
    for name in names:
        excess, questions = sum(map(sum, rows[name])), sum(map(len, rows[name]))
        error = math.sqrt(sum(sum(map(abs, row)) ** 2 for row in rows[name]))
        if excess > SIGMA * error + EXCESS * questions:
            yield f"expected {name} to be right no more often than the ideal reader, found {excess:+.3g} answers more"


def environments_pass_the_checker(case: Case) -> Iterator[str]:
    """Gymnasium's `check_env` gives no warnings."""
    from gymnasium.utils.env_checker import check_env  # not needed to use environments

    if case.game.max_steps == 1:  # `check_env` needs two steps
        return
    for env in (PredictionEnv(case.game), PredictionEnv(case.game, answer="choice"), PlayEnv(case.game)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(env, skip_render_check=True)
    yield from ()


def pairs_are_sound(case: Case) -> Iterator[str]:
    """Minimal pairs are two episodes of the game with determined, different answers; the seed determines them."""
    game = case.game
    for kind in (kind for kind, designs in game.contrasts.items() if "balanced" in designs):
        for seed in case.seeds[:3]:
            try:
                pair, again = (game.contrast(np.random.default_rng(seed), kind) for _ in range(2))
            except GameError:  # the game may be too small for this kind
                break
            if pair != again:
                yield f"expected the same {kind} pair from the same seed {seed}, found another"
            for problem in problems(pair):
                yield f"expected a sound {kind} pair, found that {problem} (seed {seed})"
            for side, episode in enumerate(pair.sides):
                yield from _side_problems(game, episode, f"{kind} pair of seed {seed}")
                texts = segments(episode)
                for name, role in pair.roles.items():
                    span = role[side]
                    if not texts[span.piece][span.start : span.end]:
                        yield f"expected text at role {name!r} of the {kind} pair of seed {seed}, found none"


def _side_problems(game: Game, episode: Episode, where: str) -> Iterator[str]:
    state = episode.start
    for step in episode.steps:
        legal = step.state == state and step.action in game.actions(state)
        if not legal or step.next_state != game.transition(state, step.action):
            yield f"expected the {where} to follow the rules, found {step.action!r} in {state!r}"
            return
        possible = game.questions(state, step.action, step.next_state)
        if step.narration != game.narrate(state, step.action, step.next_state) or not {*step.questions} <= {*possible}:
            yield f"expected the {where} to have the game's text and questions, found {step.narration!r}"
        state = step.next_state


def samples_can_be_played(case: Case) -> Iterator[str]:
    """Training episodes can be drawn and played at each level."""
    cls = type(case.game)
    for size, seed in product((cls.sizes[0], cls.sizes[-1]), case.seeds[:3]):
        sample = cls.sample(np.random.default_rng(seed), size, max(2, size))
        if not isinstance(sample.game, cls):
            yield f"expected a {cls.name} from sample, found {sample.game!r}"
        elif not 1 <= sample.steps <= (sample.game.max_steps or sample.steps) or sample.questions < 1:
            yield f"expected a possible length and at least one question, found {sample!r}"
        else:
            unroll(sample.game, seed, sample.steps, ask=sample.questions)


def _arguments(game: Game) -> dict[str, Any]:
    """Return the settings of a game, after a round trip through JSON."""
    import json

    settings: dict[str, Any] = json.loads(json.dumps(game.settings))
    return settings


LAWS_OF_AN_EPISODE: tuple[Law, ...] = (
    states_are_values,
    actions_are_legal,
    transitions_are_pure,
    commands_are_distinct,
    variables_stay_the_same,
    questions_can_be_answered,
    text_is_exact,
    seeds_decide,
    steps_are_the_common_ones,
    beliefs_are_distributions,
    what_the_text_settles_is_certain,
)
LAWS_OF_A_GAME: tuple[Law, ...] = (environments_pass_the_checker, pairs_are_sound, samples_can_be_played)
LAWS_OF_MANY_EPISODES: tuple[Law, ...] = (
    readers_know_only_the_text,
    the_ideal_reader_scores_what_it_expects,
    no_reader_beats_the_ideal_one,
)
