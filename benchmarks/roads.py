"""The roads on which models are run, against one plain forward pass a question; and what a certificate costs.

    python -m benchmarks.roads [--quick] [--out FILE]

Models of several kinds with random weights answer the same questions: those whose branches fit into one tree (Llama),
and those that carry a state on and fork it (Qwen3-Next, Mamba-2, LFM2) or are read token by token (Jamba). The peer
runs each question's prompt by itself, with logits of the last token alone. Log-probabilities and greedy answers must
agree. The certificate, the proof that a road gives what plain passes give, is timed apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import process_time
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from benchmarks.common import Peer, Result, compare, finish, parse
from benchmarks.peers import Answer
from benchmarks.replay import difference, ours, requests_of
from nextstate.agents.agent import Prompt
from nextstate.agents.certificate import certify
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, prompts_of
from nextstate.agents.training import TrainConfig, train_tokenizer
from nextstate.envs.games import make_game

LAYERS, WIDTH = 6, 256
LINEAR = {
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 384, "shared_expert_intermediate_size": 384,
}  # fmt: skip
MODELS: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "Llama": lambda given: LlamaForCausalLM(LlamaConfig(**given)),
    "Qwen3-Next": lambda given: Qwen3NextForCausalLM(Qwen3NextConfig(**given, **LINEAR)),
    "LFM2": lambda given: Lfm2ForCausalLM(
        Lfm2Config(**{k: v for k, v in given.items() if k != "head_dim"}, layer_types=["conv", "full_attention"] * 3)
    ),
    "Mamba-2": lambda given: Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=given["vocab_size"], hidden_size=WIDTH, num_hidden_layers=LAYERS, num_heads=8, head_dim=64,
            n_groups=1, state_size=32, chunk_size=64,
        )
    ),
    "Jamba": lambda given: JambaForCausalLM(
        JambaConfig(**{k: v for k, v in given.items() if k != "head_dim"}, use_mamba_kernels=False, num_experts=2)
    ),
}  # fmt: skip


@torch.inference_mode()
def one_pass_a_question(agent: LanguageModel, prompts: Sequence[Prompt]) -> list[Answer]:
    """Answer questions whose choices are one token each, each by a pass of its own."""
    out = []
    for context, choices in requests_of(agent.encoder, prompts):
        logits = agent.model(torch.tensor([context]), use_cache=False, logits_to_keep=1).logits[0, -1]
        answers = [choice[0] for choice in choices]
        greedy = int(logits.argmax())
        out.append(Answer(logits.log_softmax(-1)[answers].tolist(), answers.index(greedy) if greedy in answers else -1))
    return out


def main() -> None:
    """Run the comparisons."""
    args = parse(__doc__ or "")
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(TrainConfig())
    given = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "head_dim": 32,
        "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 2048, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    episodes = episodes_of(make_game("Box", boxes=8), range(1), 10, ask=6)
    prompts = [p for e in episodes for p in prompts_of(e)]
    results: list[Result] = []
    rates: dict[str, float] = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        agent = LanguageModel(name, loaded=(make(given).eval(), tokenizer))
        assert all(len(agent.encoder.piece(c)) == 1 for p in prompts for c in p.asked.choices)
        agent.predict(prompts[:1])  # proved for the small one first, then for all, as a run would
        agent.predict(prompts)
        assert agent.certificate is not None
        road, seconds = agent.certificate.road, agent.certificate.seconds
        what = f"Box, {len(prompts)} questions on {agent.certificate.depth} tokens"
        work = partial(one_pass_a_question, agent, prompts)
        plain: Peer[Any] = Peer("one plain forward pass for each question", "usual", work)
        results += compare(
            what,
            partial(ours, agent, episodes),
            [plain],
            partial(difference, prompts),
            args.repeats,
            f"{name} ({road})",
        )
        rates[f"certificate of {name}, s"] = seconds
    for name, agent in (
        ("nextstate/tiny", LanguageModel("nextstate/tiny", device="cpu")),
        ("GPT-2 small's shape", _gpt2(tokenizer)),
    ):
        for depth, columns in ((48, 120), (100, 150), (400, 800)):
            begun = process_time()
            certify(agent.forward, depth, columns, False, None)
            rates[f"certificate of {name} for {depth} tokens a path and {columns} nodes, s"] = process_time() - begun
    finish(args, "roads", results, ("torch", "transformers"), rates)


def _gpt2(tokenizer: Any) -> LanguageModel:
    return LanguageModel("GPT-2 small's shape", loaded=(GPT2LMHeadModel(GPT2Config()).eval(), tokenizer))


if __name__ == "__main__":
    main()
