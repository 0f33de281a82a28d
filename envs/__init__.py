"""Games, episodes, Gymnasium environments, and explicit automata."""

from nextstate.envs.automaton import Automaton
from nextstate.envs.environments import PlayEnv, PredictionEnv
from nextstate.envs.game import (
    Episode,
    Game,
    GameError,
    Question,
    Reader,
    Step,
    expected_accuracy,
    own_accuracy,
    unroll,
)
from nextstate.envs.games import GAMES, game_class, game_names, make_game
from nextstate.envs.laws import LawError, check_game
from nextstate.envs.registration import register_environments
from nextstate.envs.vector import PredictionVectorEnv

__all__ = [
    "GAMES",
    "Automaton",
    "Episode",
    "Game",
    "GameError",
    "LawError",
    "PlayEnv",
    "PredictionEnv",
    "PredictionVectorEnv",
    "Question",
    "Reader",
    "Step",
    "check_game",
    "expected_accuracy",
    "game_class",
    "game_names",
    "make_game",
    "own_accuracy",
    "register_environments",
    "unroll",
]
