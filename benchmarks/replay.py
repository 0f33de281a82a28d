"""Scoring whole episodes in one forward pass, against one forward pass a question.

    python -m benchmarks.replay [--quick]

The peer is what evaluation harnesses do: each question is its own prompt; prompts of like length go through in
left-padded batches of 16, with logits of the last token alone; choices of several tokens need a row of their own. Both
score the same questions with the same weights (random ones; the time does not depend on them), and their
log-probabilities and greedy answers must agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import Result, compare, finish, parse
from nextstate.agents.agent import Prediction, Prompt
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, prompts_of
from nextstate.agents.training import TrainConfig, train_tokenizer
from nextstate.envs.contrast import segments
from nextstate.envs.games import make_game

BATCH = 16


@torch.inference_mode()
def one_forward_a_question(agent: LanguageModel, prompts: Sequence[Prompt]) -> list[tuple[list[float], int]]:
    """Return, for each prompt, the summed log-probability of each choice and the greedy choice (-1: none)."""
    rows: list[tuple[int, int, list[int], list[int]]] = []  # prompt, choice (-1: all of one token), head, tail
    for i, prompt in enumerate(prompts):
        opening, *rest = segments(*prompt)
        head = [*agent.encoder.opening(opening), *(token for text in rest for token in agent.encoder.piece(text))]
        rows.append((i, -1, head, []))
        tails = [list(agent.encoder.piece(c)) for c in prompt.asked.choices]
        rows += [(i, c, head + tail[:-1], tail) for c, tail in enumerate(tails) if len(tail) > 1]
    out = [([math.nan] * len(p.asked.choices), -1) for p in prompts]
    rows.sort(key=lambda r: len(r[2]))
    for k in range(0, len(rows), BATCH):
        batch = rows[k : k + BATCH]
        width = max(len(r[2]) for r in batch)
        longest = max([1, *(len(r[3]) for r in batch)])
        tokens = torch.tensor([[0] * (width - len(r[2])) + r[2] for r in batch])
        mask = torch.tensor([[0] * (width - len(r[2])) + [1] * len(r[2]) for r in batch])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = agent.model(
            tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=longest
        ).logits
        for (i, c, _, tail), row in zip(batch, logits.float().log_softmax(-1), strict=True):
            sums, greedy = out[i]
            if c >= 0:
                ends = row[-len(tail) :]
                sums[c] = sum(float(ends[j, token]) for j, token in enumerate(tail))
                hit = all(int(ends[j].argmax()) == token for j, token in enumerate(tail))
                out[i] = (sums, c if hit else greedy)
                continue
            for j, choice in enumerate(prompts[i].asked.choices):
                piece = agent.encoder.piece(choice)
                if len(piece) == 1:
                    sums[j] = float(row[-1, piece[0]])
                    greedy = j if int(row[-1].argmax()) == piece[0] else greedy
            out[i] = (sums, greedy)
    return out


def difference(ours: Sequence[Prediction], peer: Sequence[tuple[list[float], int]]) -> float:
    """Return the largest difference of any log-probability; infinite where a greedy answer differs."""
    if any(o.greedy != greedy for o, (_, greedy) in zip(ours, peer, strict=True)):
        return math.inf
    return max(
        abs(a - b) for o, (sums, _) in zip(ours, peer, strict=True) for a, b in zip(o.logprobs, sums, strict=True)
    )


def main() -> None:
    """Run the comparisons."""
    args = parse(__doc__ or "")
    tokenizer = train_tokenizer(TrainConfig())
    torch.manual_seed(0)
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 256} if args.quick else {"n_layer": 12, "n_head": 12, "n_embd": 768}
    model = GPT2LMHeadModel(GPT2Config(**shape, n_positions=1024, vocab_size=50257)).eval()
    agent = LanguageModel("random GPT-2", loaded=(model, tokenizer))
    told = f"GPT-2 of {shape['n_layer']} x {shape['n_head']} x {shape['n_embd']}"
    cells = [
        ("DFA", {"states": 10}, 50, 1),
        ("DFA", {"states": 10, "symbols": "pairs"}, 10, 1),
        ("Box", {"boxes": 8}, 10, 1),
    ]
    results: list[Result] = []
    for game, settings, steps, episodes in cells:
        made = make_game(game, **settings)
        prompts = [p for e in episodes_of(made, range(episodes), steps) for p in prompts_of(e)]
        name = f"{game} {settings}, {steps} steps, {made.max_choices} choices, {told}"
        repeats = 3 if args.quick else 1  # minutes each
        ours, peer = (lambda p=prompts: agent.predict(p)), (lambda p=prompts: one_forward_a_question(agent, p))
        results.append(compare(name, ours, peer, difference, repeats))
    finish("Replay against one forward pass a question (CPU, float32)", results, ("torch", "transformers"))


if __name__ == "__main__":
    main()
