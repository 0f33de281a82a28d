"""Does a language model know what state a system is in, and which of its heads carry that knowledge?

Importing this package registers the Gymnasium environments: `nextstate/Box-v0` (predict) and `nextstate/BoxPlay-v0`
(play), and the same for every other game. It loads neither torch nor transformers.
"""

from nextstate.envs.registration import register_environments

__version__ = "0.1.0"

register_environments()
