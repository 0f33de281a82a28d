"""Whole checkpoints load, broken ones are refused in one line that says what is wrong and what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nextstate.agents.agent import AgentError
from nextstate.agents.checkpoints import sort_unexpected
from nextstate.agents.failures import Broken, guarded, one_line
from nextstate.agents.language import LanguageModel
from nextstate.agents.loading import Loading, load
from nextstate.agents.rollout import episodes_of, replay
from nextstate.agents.text import Encoder, TokenizerError, before_text
from nextstate.envs.games import make_game
from tests.checkpoints import KINDS, Tensors, build, edit_config, edit_tensors, save, words

CPU = Loading(device="cpu")
BLOCK = {"gpt2": "transformer.h.1.", "llama": "model.layers.1."}
FURTHER = {"gpt2": "transformer.h.2.", "llama": "model.layers.2."}
MATRIX = {"gpt2": "transformer.h.1.mlp.c_fc.weight", "llama": "model.layers.1.mlp.up_proj.weight"}
BIAS = {"gpt2": "transformer.h.0.attn.c_attn.offset", "llama": "model.layers.0.self_attn.q_proj.bias"}


def refused(folder: Path, how: Loading = CPU) -> str:
    with pytest.raises(AgentError) as caught:
        load(str(folder), how)
    said = str(caught.value)
    assert "\n" not in said
    assert str(folder) in said  # what was given
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_whole_checkpoints_load_with_the_weights_they_were_saved_with(tmp_path: Path, kind: str) -> None:
    model = build(kind)
    found = load(str(save(kind, tmp_path)), CPU)
    assert found.incomplete == ""
    assert found.fit.ignored == ()
    ours = dict(found.model.named_parameters())
    assert all(torch.equal(weight, ours[name]) for name, weight in model.named_parameters())


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


BREAKS: dict[str, tuple[Callable[[str], Callable[[Tensors], Tensors]], str]] = {
    "missing layer": (lambda kind: without(BLOCK[kind]), r"tensors are missing \({block}"),
    "missing matrix": (lambda kind: without(MATRIX[kind]), r"1 tensor is missing \({matrix}\)"),
    "extra layer": (
        lambda kind: lambda t: t | {k.replace(BLOCK[kind], FURTHER[kind]): v for k, v in t.items() if BLOCK[kind] in k},
        r"tensors have no place in it \({further}",
    ),
    "extra bias": (lambda kind: lambda t: t | {BIAS[kind]: torch.zeros(32)}, r"1 tensor has no place in it \({bias}\)"),
    "other prefix": (lambda kind: lambda t: {f"foo.{k}": v for k, v in t.items()}, "tensors are missing"),
    "other shape": (
        lambda kind: lambda t: t | {MATRIX[kind]: t[MATRIX[kind]][:-1]},
        r"1 tensor has another shape \({matrix}: \[\d+, \d+\] in the checkpoint, \[\d+, \d+\] by config.json\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("how", BREAKS)
def test_checkpoints_that_do_not_fit_their_config_are_refused(tmp_path: Path, kind: str, how: str) -> None:
    change, message = BREAKS[how]
    edit_tensors(save(kind, tmp_path), change(kind))
    names = {"block": BLOCK, "matrix": MATRIX, "further": FURTHER, "bias": BIAS}
    for key, known in names.items():
        message = message.replace(f"{{{key}}}", re.escape(known[kind]))
    said = refused(tmp_path)
    assert re.search(message, said), said
    assert said.endswith("give a complete checkpoint, or set allow_incomplete=true to load it anyway")


def test_experts_that_are_missing_or_too_many_are_refused(tmp_path: Path) -> None:
    for part in ("layers.0.block_sparse_moe.experts.2.w1", "layers.0.block_sparse_moe.experts.3."):
        edit_tensors(save("mixtral", tmp_path), without(part))
        assert "another shape" in refused(tmp_path)
    save("mixtral", tmp_path)
    edit_config(tmp_path, num_local_experts=3)
    assert "another shape" in refused(tmp_path)


def test_what_is_beside_the_model_is_noted_and_old_buffers_are_nothing(tmp_path: Path) -> None:
    more = {
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "rotary_emb.inv_freq": torch.zeros(4),
        "vision_tower.blocks.0.weight": torch.zeros(3),
        "mtp.layers.0.weight": torch.zeros(3),
    }
    edit_tensors(save("gpt2", tmp_path), lambda t: t | more)
    agent = LanguageModel(str(tmp_path), device="cpu")
    told = agent.describe()
    assert told["ignored_weights"] == {"count": 2, "names": ["mtp.layers.0.weight", "vision_tower.blocks.0.weight"]}
    assert told["incomplete"] == agent.incomplete == ""
    assert agent.warnings() == ()


def test_names_without_the_prefix_of_the_model_are_found_too(tmp_path: Path) -> None:
    edit_tensors(save("gpt2", tmp_path), lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})
    assert load(str(tmp_path), CPU).incomplete == ""  # as GPT-2 itself was published
    model = build("llama")
    names = ["layers.0.self_attn.q_norm.weight", "layers.9.mlp.up_proj.weight", "norm.bias", "score.weight"]
    foreign, ignored = sort_unexpected(model, names)
    assert (sorted(foreign), ignored) == (sorted(names[:3]), ("score.weight",))


def test_an_incomplete_checkpoint_loads_where_that_is_asked_for_and_is_marked(tmp_path: Path) -> None:
    edit_tensors(save("llama", tmp_path), without(MATRIX["llama"]))
    one, two = (LanguageModel(str(tmp_path), device="cpu", allow_incomplete=True) for _ in range(2))
    assert one.incomplete == one.describe()["incomplete"] == f"1 tensor is missing ({MATRIX['llama']})"
    (warning,) = one.warnings()
    assert "incomplete checkpoint (1 tensor is missing" in warning
    episode = episodes_of(make_game("Cycle"), range(1), 3)[0]
    assert warning in one.episode_warnings(episode)
    # What is missing is random, and the same each time.
    assert torch.equal(one.model.state_dict()[MATRIX["llama"]], two.model.state_dict()[MATRIX["llama"]])
    assert replay(one, [episode]).rows == replay(two, [episode]).rows


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(tensors: Tensors) -> Tensors:
        tensors[name][3, 5] = value
        return tensors

    edit_tensors(save("llama", tmp_path), spoil)
    for how in (CPU, Loading(device="cpu", dtype="bfloat16")):
        assert f"its tensor {name} holds NaN or infinity" in refused(tmp_path, how)


def test_weights_too_large_for_the_precision_are_refused(tmp_path: Path) -> None:
    edit_tensors(save("llama", tmp_path), lambda t: t | {MATRIX["llama"]: t[MATRIX["llama"]] + 1e30})
    load(str(tmp_path), CPU)
    assert "float16 is too narrow for it" in refused(tmp_path, Loading(device="cpu", dtype="float16"))


# --- folders


def test_headers_that_are_cut_off_or_have_a_flipped_bit_are_refused(tmp_path: Path) -> None:
    path = save("llama", tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for cut in (0, 4, header // 2, header, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert f"model.safetensors ({cut:,} bytes) is cut off or damaged" in refused(tmp_path)
    for at in [0, 1, 7, 8, *range(9, header, 101)]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 7
        path.write_bytes(flipped)
        refused(tmp_path)


def test_folders_that_are_no_models_are_refused(tmp_path: Path) -> None:
    assert "but there is no such folder" in refused(tmp_path / "nowhere")
    assert "but the folder has no config.json" in refused(tmp_path)
    save("llama", tmp_path)
    kept = (tmp_path / "config.json").read_text()
    for text, message in (("{'a': 1", "is not JSON"), ("\x00", "is not JSON"), ("[1]", "holds list")):
        (tmp_path / "config.json").write_text(text)
        assert message in refused(tmp_path)
    (tmp_path / "config.json").write_text(kept)
    (tmp_path / "model.safetensors").unlink()
    assert "the folder holds no weights" in refused(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert "only pytorch_model.bin, which can run code when it is read" in refused(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ("gpt2", {"n_head": 5}, "must be divisible by num_heads"),
        ("llama", {"num_attention_heads": "four"}, "expected int, got str"),
        ("llama", {"num_hidden_layers": 3}, "9 tensors are missing"),
        ("llama", {"num_hidden_layers": 1}, "9 tensors have no place in it"),
        ("llama", {"vocab_size": 100}, "2 tensors have another shape"),
        ("llama", {"model_type": "unheard_of"}, "model type `unheard_of`"),
        ("llama", {"model_type": None}, "should have a `model_type` key"),
        ("llama", {"model_type": "t5"}, "for this kind of AutoModel: AutoModelForCausalLM"),
        (
            "llama",
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
            "custom code (own.Config, own.Model), which is never run",
        ),
    ],
)
def test_configs_that_cannot_be_are_refused(tmp_path: Path, kind: str, change: dict[str, Any], message: str) -> None:
    edit_config(save(kind, tmp_path), **change)
    (tmp_path / "own.py").write_text("raise SystemExit('this ran')")
    assert message.lower() in refused(tmp_path).lower()


def test_code_beside_a_model_that_transformers_has_is_not_run(tmp_path: Path) -> None:
    edit_config(save("llama", tmp_path), auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (tmp_path / "own.py").write_text("raise SystemExit('this ran')")
    assert type(load(str(tmp_path), CPU).model).__name__ == "LlamaForCausalLM"


# --- keys


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Loading(device="cpu", device_map="auto"), "device='cpu' and device_map='auto' cannot be combined"),
        (Loading(device="cpu", quantization="4bit"), "quantization needs a GPU and the package bitsandbytes"),
        (Loading(device="cpu", quantization="3bit"), "expected 4bit or 8bit"),  # type: ignore[arg-type]
        (Loading(device="cpu", attn_implementation="thin_air"), "give eager, or leave the key out"),
        (Loading(device_map="nonsense"), "nonsense"),
    ],
)
def test_keys_that_cannot_be_are_refused(tmp_path: Path, how: Loading, message: str) -> None:
    if how.quantization == "4bit" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert message in refused(save("llama", tmp_path), how)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", *([] if torch.cuda.is_available() else ["cuda"])])
def test_devices_that_are_not_there_are_refused(tmp_path: Path, device: str) -> None:
    with pytest.raises(AgentError, match=f"device='{device}' is not possible"):
        load(str(save("llama", tmp_path)), Loading(device=device))


def test_attention_is_what_is_asked_for_or_what_the_class_can(tmp_path: Path) -> None:
    save("llama", tmp_path / "llama"), save("gpt_neo", tmp_path / "gpt_neo")
    given = {"device": "cpu"}
    assert LanguageModel(str(tmp_path / "llama"), **given).describe()["attention"] == "sdpa"  # type: ignore[arg-type]
    eager = LanguageModel(str(tmp_path / "llama"), device="cpu", attn_implementation="eager")
    assert eager.describe()["attention"] == "eager"
    assert load(str(tmp_path / "gpt_neo"), CPU).model.config._attn_implementation == "eager"
    assert "GPTNeoForCausalLM does not support" in refused(tmp_path / "gpt_neo", Loading(attn_implementation="sdpa"))


def test_a_device_map_puts_inputs_where_the_embedding_is(tmp_path: Path) -> None:
    save("llama", tmp_path)
    plain = LanguageModel(str(tmp_path), device="cpu")
    mapped = LanguageModel(str(tmp_path), device_map={"": "cpu"})
    assert mapped.device == plain.device == torch.device("cpu")
    episodes = episodes_of(make_game("Cycle"), range(2), 3)
    assert replay(mapped, episodes).rows == replay(plain, episodes).rows


# --- tokenizers


def test_a_tokenizer_without_pad_bos_and_eos_will_do(tmp_path: Path) -> None:
    agent = LanguageModel(str(save("llama", tmp_path)), device="cpu")
    assert [agent.tokenizer.pad_token_id, agent.tokenizer.bos_token_id, agent.tokenizer.eos_token_id] == [None] * 3
    assert agent.encoder.bos == ()
    assert replay(agent, episodes_of(make_game("Cycle"), range(3), 3)).rows


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["Box"])
    tokenizer.save_pretrained(tmp_path)
    assert "161 tokens, but its embedding 160 rows (token 160 is 'Box')" in refused(tmp_path)


def test_a_special_token_beyond_the_embedding_does_no_harm_unless_texts_begin_with_it(tmp_path: Path) -> None:
    save("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    agent = LanguageModel(str(tmp_path), device="cpu")
    episodes = [e for n in (2, 5) for e in episodes_of(make_game("Cycle"), range(2), n)]  # padded to one length
    assert len(replay(agent, episodes).rows) == 14
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(tmp_path)
    assert "(token 162 is '<s>')" in refused(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, file: str) -> None:
    (save("llama", tmp_path) / file).write_text("{")
    assert "its tokenizer cannot be loaded" in refused(tmp_path)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    (save("llama", tmp_path) / "tokenizer.json").unlink()
    assert "there is no tokenizer.json" in refused(tmp_path)


def pieces_like(prefix: bool) -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece makes them, with tokens that go on over spaces and full stops.

    Llama's puts a space before a text, Gemma's does not.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    specials = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    text = " Take action A, go to state b. Take action C, go to state a."
    tokenizer.train_from_iterator([text * 3] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("prefix", [True, False])
def test_tokens_that_merge_across_a_boundary_are_kept_apart_and_said(prefix: bool) -> None:
    encoder = Encoder(pieces_like(prefix))
    assert encoder.bos == (1,)
    told = ("Take action A,", " go to state", " b.", " Take action C,", " go to state", " a.")
    assert not encoder.natural(told)  # "state b. Take" are fewer tokens together
    tokens = [encoder.opening(told[0]), *(encoder.piece(p) for p in told[1:])]
    assert tokens[1] == tokens[4]  # whatever stands before
    assert all(tokens)
    text = "".join(encoder.tokenizer.convert_ids_to_tokens([t for part in tokens for t in part][1:]))
    assert text.replace("▁", " ").removeprefix(" ") == "".join(told)


# --- what stands before a text


def test_what_stands_before_a_text_is_what_the_tokenizer_puts_there() -> None:
    bare = words()
    bare.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    begin, end = bare.bos_token_id, bare.eos_token_id
    assert before_text(bare) == ()  # as GPT-2's and Pythia's
    assert Encoder(bare).opening("a") == tuple(bare.encode("a"))
    assert Encoder(bare).opening("") == (begin,)  # something has to be read from
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> </s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    assert before_text(bare) == (begin, end)
    assert Encoder(bare).opening("a b") == tuple(bare.encode("a b"))[:-1]
    bare.bos_token = None
    assert Encoder(bare, False).opening("") == (end,)


def test_bos_as_a_config_asks_for_is_remarked_where_it_differs(tmp_path: Path) -> None:
    tokenizer = words(150)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    build("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    none, off, on = (LanguageModel(str(tmp_path), device="cpu", bos=bos) for bos in (None, False, True))
    assert none.warnings() == off.warnings() == ()
    assert none.encoder.bos == off.encoder.bos == ()
    assert on.encoder.bos == (tokenizer.bos_token_id,)
    (said,) = on.warnings()
    assert "read transcripts with <s> before them (bos=True); its tokenizer puts nothing there" in said
    episode = episodes_of(make_game("Cycle"), range(1), 3)[0]
    assert said in on.episode_warnings(episode)
    lengths = [replay(agent, [episode]).rows[0]["prompt_tokens"] for agent in (none, on)]
    assert lengths[1] == lengths[0] + 1
    with pytest.raises(TokenizerError, match="bos=True is not possible"):
        Encoder(words(), True)
    words().save_pretrained(tmp_path)
    with pytest.raises(AgentError, match="cannot be used: bos=True is not possible"):
        LanguageModel(str(tmp_path), device="cpu", bos=True)


def test_the_built_in_model_reads_the_tokens_it_was_trained_on() -> None:
    agent = LanguageModel("nextstate/tiny", device="cpu")
    text = "Box A contains the hat."
    assert agent.encoder.opening(text) == (0, 497, 332, 331, 263, 355, 15) == tuple(agent.tokenizer.encode(text))
    assert agent.encoder.piece(text[3:]) == (332, 331, 263, 355, 15)
    assert agent.describe()["bos"] is True
    assert agent.warnings() == ()


# --- one line


def test_whatever_is_raised_is_one_line() -> None:
    def fail(error: BaseException) -> Callable[[], None]:
        def do() -> None:
            raise error

        return do

    for error, message in (
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
        (ValueError("Announced:\n   the  thing\nmore"), "ValueError: Announced: the thing"),
        (KeyError(), "KeyError"),
        (TokenizerError("ours says it all"), "ours says it all"),
        (torch.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError: CUDA out of memory."),
        (MemoryError(), "MemoryError"),
    ):
        assert one_line(error) == message
        with pytest.raises(Broken) as caught:
            guarded(fail(error))
        assert str(caught.value) == message
        assert caught.value.__cause__ is error
    with pytest.raises(AgentError, match="as it is") as known:
        guarded(fail(AgentError("as it is")))
    assert not isinstance(known.value, Broken)
    for stop in (KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(stop)):
            guarded(fail(stop))
