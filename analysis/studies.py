"""The studies of this package: a light table, so that the command line can list them without importing any."""

from __future__ import annotations

from typing import NamedTuple

GROUP = "nextstate.studies"  # of entry points of other packages


class Listed(NamedTuple):
    """Where a study is, and what its command says of it."""

    path: str  # pkg.module:Name
    help: str
    example: str


STUDIES = {
    "run": Listed(
        "nextstate.analysis.predict.study:Predict",
        "Ask agents what the next state is, over a grid of games; and let them play.",
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
        "Train models on a grammar; measure what they write, hold and attend to. On several GPUs: torchrun "
        "--nproc-per-node 8 -m nextstate.cli grammar CONFIG.",
        "nextstate grammar configs/grammar/quickstart.yaml training.steps=300 --out runs/grammar",
    ),
    "lens": Listed(
        "nextstate.analysis.lens:Lens",
        "Read the answer off every layer (logit lens): where does the model know the next state?",
        "nextstate lens configs/lens.yaml --out runs/lens",
    ),
    "transfer": Listed(
        "nextstate.analysis.transfer:Transfer",
        "Find out whether the heads that carry state in one game do so in another.",
        "nextstate transfer configs/transfer.yaml --out runs/transfer",
    ),
}
