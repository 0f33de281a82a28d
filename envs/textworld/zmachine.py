"""Play a compiled game: a script that `nextstate.envs.textworld.story` runs in a process of its own.

A game may crash the interpreter, which is a C library, or make it run for ever; then only this process is lost. It
reads one request a line and answers one line for each text, all of them JSON. It is run in an empty folder, as the
interpreter writes the files of "save" and "script" where it is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path

SECONDS = 15  # for one command; the process that asks gives up a little later


def main(story: str) -> None:
    """Answer requests until there are no more: `{"again": whether to begin anew, "commands": [...]}`."""
    # What the interpreter itself may print must not come between the answers.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        from jericho import FrotzEnv

        warnings.simplefilter("ignore")  # it does not know TextWorld's games by name, and need not
        game = FrotzEnv(story, seed=1)

        def answer(text: str) -> None:
            if game.frotz_lib.halted():
                raise SystemExit("the Z-machine has stopped: the game has quit, or is broken")
            answers.write(json.dumps(text) + "\n")
            answers.flush()

        for line in sys.stdin:
            request = json.loads(line)
            if request["again"]:
                for left in Path().iterdir():  # what an earlier game has saved is none of this one's business
                    left.unlink()
                signal.alarm(SECONDS)
                answer(game.reset()[0])
            for command in request["commands"]:
                signal.alarm(SECONDS)
                answer(game.step(command)[0])
            signal.alarm(0)


if __name__ == "__main__":
    main(sys.argv[1])
