"""The studies of this package, as a table that the command line can list without importing them."""

from __future__ import annotations

from typing import NamedTuple

GROUP = "nextstate.studies"  # of entry points of other packages


class Listed(NamedTuple):
    """The location of a study, and the help text and example of its command."""

    path: str  # pkg.module:Name
    help: str
    example: str


STUDIES = {
    "run": Listed(
        "nextstate.analysis.predict.study:Predict",
        "Measure the accuracy of agents on next-state questions over a grid of games, and their success in play.",
        "nextstate run configs/quickstart.yaml games.0.episodes=20 --out runs/short",
    ),
    "patch": Listed(
        "nextstate.analysis.heads.study:Heads",
        "Find the heads that carry state, by activation patching.",
        "nextstate patch configs/heads/quickstart.yaml pairs=32 --out runs/heads",
    ),
    "response": Listed(
        "nextstate.analysis.response.study:ResponseStudy",
        "Perturb single tokens weakly and measure the response: window, induction, games.",
        "nextstate response configs/response/quickstart.yaml prompts=8 --out runs/response",
    ),
    "grammar": Listed(
        "nextstate.analysis.grammar.study:GrammarStudy",
        "Train models on a grammar; measure their generated strings, states and attention. On several GPUs: torchrun "
        "--nproc-per-node 8 -m nextstate.cli grammar CONFIG.",
        "nextstate grammar configs/grammar/quickstart.yaml training.steps=300 --out runs/grammar",
    ),
    "lens": Listed(
        "nextstate.analysis.lens:Lens",
        "Decode the answer from every layer (logit lens), to find where the model knows the next state.",
        "nextstate lens configs/lens.yaml --out runs/lens",
    ),
    "transfer": Listed(
        "nextstate.analysis.transfer:Transfer",
        "Test whether the heads that carry state in one game also do so in another.",
        "nextstate transfer configs/transfer.yaml --out runs/transfer",
    ),
}
