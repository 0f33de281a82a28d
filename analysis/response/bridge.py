"""Response of the answering token of a game transcript to pushes on the state, the action and other tokens.

Each token of a transcript is pushed alone, and the response is measured at the answering token, the last one. The roles
of tokens come from the game's minimal pairs (`nextstate.envs.contrast.Pair`): the current state, the queried action,
the match (where the correct answer is written) and a distractor (a place of the same kind where another answer is
written). Tokens without a role are the baseline. No activation is patched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float

from nextstate.agents.agent import Prompt
from nextstate.agents.language import LanguageModel
from nextstate.agents.text import Encoder
from nextstate.analysis.heads.pairs import tokens_of
from nextstate.analysis.heads.sweep import site_values
from nextstate.analysis.response.induction import Ablation, averaged, without
from nextstate.analysis.response.measure import Response, responses
from nextstate.envs.contrast import Pair, segments

OTHERS = "others"
MOST = 16  # most other tokens of a transcript
ROLES = ("state", "action", "match", "distractor")
COLUMNS = {
    "game": pl.String, "kind": pl.String, "transcript": pl.Int64, "role": pl.String, "layer": pl.Int64,
    "response": pl.Float64, "relative": pl.Float64,
}  # fmt: skip


@dataclass(frozen=True)
class Transcript:
    """A tokenised prompt, with the positions of its roles."""

    game: str
    kind: str  # kind of the pair that it comes from
    number: int
    tokens: tuple[int, ...]
    roles: dict[str, int]

    @property
    def others(self) -> list[int]:
        """Up to `MOST` positions without a role, evenly spread; never the first (BOS or its substitute) or the last."""
        free = [p for p in range(1, len(self.tokens) - 1) if p not in self.roles.values()]
        return [free[int(i)] for i in np.linspace(0, len(free) - 1, min(MOST, len(free)))]


def transcripts(encoder: Encoder, pairs: Sequence[Pair]) -> list[Transcript]:
    """Return the clean prompt of each pair, with the roles that occur before the answering token.

    If one token has two roles (in state pairs of the boxes game the state is the match), it gets the first of `ROLES`.
    """
    out = []
    for number, pair in enumerate(pairs):
        side, texts, roles = pair.clean, segments(pair.clean), dict[str, int]()
        tokens = tokens_of(encoder, Prompt(side, len(side.steps) - 1))
        for name in ROLES:
            if name in pair.roles:
                at = encoder.locate(texts, pair.roles[name].clean)
                if at not in roles.values() and at < len(tokens) - 1:
                    roles[name] = at
        out.append(Transcript(side.game.name, pair.kind, number, tokens, roles))
    return out


def pushed(
    model: LanguageModel,
    one: Transcript,
    *,
    strengths: Sequence[float],
    directions: Float[np.ndarray, "one direction hidden"],
    layer: int = 0,
    max_bytes: int = 2 << 30,
) -> Response:
    """Push each token of a transcript that has a role, in the order of `roles`, then the others.

    Raises:
        ResponseError: as `nextstate.analysis.response.responses`.
    """
    chosen = [*one.roles.values(), *one.others]
    return responses(model, np.array([one.tokens]), positions=chosen, strengths=strengths, directions=directions,
                     along=False, layer=layer, max_bytes=max_bytes)  # fmt: skip


def role_rows(one: Transcript, found: Response) -> pl.DataFrame:
    """Return a row for each role and layer: the mean response of the answering token to pushes on that role.

    Args:
        one: the transcript.
        found: the result of `pushed` at one strength.
    """
    value, relative = (averaged(found, "random", r)[0, :, :, -1] for r in (False, True))  # [layer position]
    n, rows = len(one.roles), []
    where = {role: slice(k, k + 1) for k, role in enumerate(one.roles)} | {OTHERS: slice(n, None)}
    for role, own in where.items():
        for k, layer in enumerate(found.layers):
            if value[k, own].size:
                rows.append((one.game, one.kind, one.number, role, layer, float(value[k, own].mean()),
                             float(relative[k, own].mean())))  # fmt: skip
    return pl.DataFrame(rows, schema=COLUMNS, orient="row")


def response_without(
    model: LanguageModel,
    chosen: Sequence[Transcript],
    heads: Sequence[tuple[int, int]],
    *,
    strength: float,
    directions: Float[np.ndarray, "transcript direction hidden"],
    ablation: Ablation = "mean",
    layer: int = 0,
    max_bytes: int = 2 << 30,
) -> dict[str, tuple[Float[np.ndarray, " transcript"], Float[np.ndarray, "transcript head"]]]:
    """Return for each role the answering token's response after the last layer, with all heads and without each head.

    Args:
        model: the language model.
        chosen: transcripts; each role is measured in those that have it.
        heads: (layer, head) of the heads to ablate, one at a time.
        strength: strength of the pushes.
        directions: random directions for each transcript.
        ablation: what replaces the head's output at every token: zeros, or its mean over the transcript.
        layer: layer whose input is pushed.
        max_bytes: as in `responses`.
    """
    whole: dict[str, list[float]] = {}
    left: dict[str, list[list[float]]] = {}
    for i, one in enumerate(chosen):
        names, at = list(one.roles), list(one.roles.values())
        if not at:
            continue
        values = site_values(model, np.array([one.tokens]), "head") if ablation == "mean" else {}

        def answered(one: Transcript = one, i: int = i, at: list[int] = at) -> Float[np.ndarray, " position"]:
            found = responses(
                model, np.array([one.tokens]), positions=at, strengths=(strength,), along=False, layer=layer,
                directions=directions[i : i + 1], max_bytes=max_bytes,
            )  # fmt: skip
            return averaged(found, "random")[0, -1, :, -1]

        base, cut = answered(), []
        for block, head in heads:
            with without(model, block, head, values[block][0].float().mean(0) if values else None):
                cut.append(answered())
        for k, name in enumerate(names):
            whole.setdefault(name, []).append(float(base[k]))
            left.setdefault(name, []).append([float(c[k]) for c in cut])
    return {name: (np.array(whole[name]), np.array(left[name])) for name in whole}
