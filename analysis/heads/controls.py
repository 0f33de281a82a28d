"""Control prompts: for each pair an unrelated prompt of the same design, with the same token layout.

What a head recovers when its activation comes from the pair's other prompt is compared with what it recovers when the
activation comes from the control prompt (see `nextstate.analysis.heads.recovery.carried`). For the two to be
exchangeable if the head says nothing of the answer, the control is a fresh draw of the same game and design, which the
model must answer as it must answer the pair, and which has the same number of tokens and the same positions of state,
action, origin and subject.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nextstate.agents.language import LanguageModel
from nextstate.analysis.heads.pairs import TokenPair
from nextstate.analysis.heads.routing import baseline, place_of_content, prefers, token_pairs
from nextstate.envs.contrast import Pair


def control_prompts(
    model: LanguageModel, pairs: Sequence[tuple[int, TokenPair]], draw: Callable[[int], Pair], rounds: int
) -> dict[int, tuple[int, ...]]:
    """Return the tokens of a control prompt for each pair; pairs for which none is found are left out.

    Each control is the clean prompt of a pair of its own, so controls are independent of the pairs and of each other.

    Args:
        model: the model, which must prefer the right answer in both prompts of the pair that a control is from.
        pairs: number and tokens of each pair.
        draw: draws a pair with the length of the pair of that number.
        rounds: most draws for each pair. A draw serves any pair of its layout.
    """
    waiting, out = dict(pairs), dict[int, tuple[int, ...]]()
    for _ in range(rounds):
        if not waiting:
            break
        drawn = token_pairs(model.encoder, [draw(number) for number in waiting])[0]
        right = prefers(*baseline(model, drawn)) if drawn else ()
        for one in (pair for pair, ok in zip(drawn, right, strict=True) if ok):
            number = next((n for n, pair in waiting.items() if place_of_content(pair) == place_of_content(one)), None)
            if number is not None:
                out[number] = one.clean
                del waiting[number]
    return out
