"""Base LMs with an encoder: every path gives transformers' greedy output, and replay the live decoder's steps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_hydra
import torch
from tokenizers import processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    LEDConfig,
    LEDForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from lattices.errors import IncompatibleError
from lm.base.catalog import load_base
from lm.base.encoder_decoder import EncoderDecoderLM
from lm.base.generation import generate
from lm.base.model import BaseLM
from lm.base.perplexity import perplexity
from lm.neural.model import scratch_model
from lm.training.data import read_head_data
from rescore.costs.measuring import verify_curve
from rescore.decoding import decode, margin_at
from rescore.generation.custom import custom_generate
from rescore.rescorers import load_rescorer
from tests.conftest import Command, byte_tokenizer, make_heads, refused

pytestmark = pytest.mark.usefixtures("shipped_ngram")

SIZES = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 96,
    "init_std": 0.4, "eos_token_id": 256, "pad_token_id": 257, "decoder_start_token_id": 257,
    "forced_eos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "bart": (BartForConditionalGeneration, BartConfig, {**SIZES, "bos_token_id": None}),
    "marian": (MarianMTModel, MarianConfig, SIZES),
    "mbart": (MBartForConditionalGeneration, MBartConfig, {**SIZES, "bos_token_id": None}),
    "t5": (T5ForConditionalGeneration, T5Config, {
        "d_model": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48,
        "eos_token_id": 256, "pad_token_id": 257, "decoder_start_token_id": 257, "initializer_factor": 4.0,
    }),
}  # fmt: skip
TEXTS = ["Zwei Hunde laufen.", "Ein Mann steht am Haus und liest.", "Der Hund"]


def save(
    folder: Path,
    family: str,
    *,
    forced: int | None = None,
    never: int | None = None,
    biased: bool = True,
    template: str | None = None,
    **changes: Any,
) -> Path:
    """A random model of a family over bytes, as a model folder; template: for chat; changes: of its configuration."""
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    torch.manual_seed(1)
    model_class, config_class, sizes = FAMILIES[family]
    model: Any = model_class(config_class(vocab_size=len(tokenizer), **sizes | changes))
    if biased and "final_logits_bias" in dict(model.named_buffers()):
        model.final_logits_bias.normal_()
    model.generation_config.forced_bos_token_id = forced
    model.generation_config.bad_words_ids = None if never is None else [[never]]
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseLM:
    folder = save(tmp_path_factory.mktemp("models") / request.param, request.param)
    return load_base(str(folder), dtype="float64", device="cpu")


def greedy(base: BaseLM, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy output."""
    ids = torch.tensor([prompt])
    out = base.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, max_new_tokens=count, min_length=0
    )
    return out[0, 1:].tolist()


def prompts_of(base: BaseLM) -> list[list[int]]:
    return [base.encode_prompt(text, chat=False) for text in TEXTS]


def test_its_prompt_is_read_by_the_encoder(base: BaseLM):
    assert isinstance(base, EncoderDecoderLM) and not base.supports_tree and base.supports_padding
    assert base.prefix([1, 2, 3]) == [257] and not base.is_chat
    ids = base.encode_prompt("abcdef", chat=False, max_tokens=4)
    assert ids == [*base.encode_prompt("abc", chat=False)] and ids[-1] == 256, "what ends a prompt is not cut off"
    refused(lambda: base.encode_prompt("", chat=False), "empty")
    refused(lambda: base.encode_prompt("a", chat=True), "no chat template")


def test_a_limit_without_room_for_text_is_refused(base: BaseLM):
    assert len(base.encode_prompt("abc", chat=False, max_tokens=2)) == 2
    refused(lambda: base.encode_prompt("abc", chat=False, max_tokens=1), "limit of 1 prompt tokens leaves no room")


def test_ids_that_are_no_tokens_are_refused(base: BaseLM):
    for ids, told in (([], "no tokens"), ([5, 258], "token 258, and"), ([-1], "token -1, and")):
        refused(lambda ids=ids: decode(base, None, ids, max_new_tokens=4), told)  # type: ignore[misc]


def test_no_library_speaks_of_a_tokenizers_own_limit(base: BaseLM, monkeypatch: pytest.MonkeyPatch):
    told: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = told.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.tokenization_utils_base")
    monkeypatch.setattr(base.tokenizer, "model_max_length", 2)
    monkeypatch.setattr(base.tokenizer, "deprecation_warnings", {})
    monkeypatch.setattr(logger, "level", logging.WARNING)
    monkeypatch.setattr(logger, "handlers", [handler])
    assert len(base.encode_prompt("abcdef", chat=False)) > 2 and not told
    base.tokenizer.encode("abcdef")
    assert told, "which it would"


def test_greedy_output_is_transformers(base: BaseLM):
    for prompt in prompts_of(base):
        assert decode(base, None, prompt, max_new_tokens=20).output_ids == greedy(base, prompt, 20)


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("rescorer", ["none", "oracle"])
def test_blocks_change_nothing(base: BaseLM, rescorer: str, p: int):
    heads = make_heads(base, h=4, strength=0.05)
    for prompt in prompts_of(base):
        expected = greedy(base, prompt, 20)
        loaded = load_rescorer(rescorer)
        how: dict[str, Any] = {"future": np.array(expected)} if rescorer == "oracle" else {}
        decoded = decode(base, heads, prompt, rescorer=loaded, k=4, p=p, max_new_tokens=20, **how)
        assert decoded.output_ids == expected
        assert sum(decoded.accepted) == len(expected)


def test_a_pair_has_the_room_of_both_sides(base: BaseLM, tmp_path: Path):
    pair = {"prompt": "x" * 90, "response": "y" * 90}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    data = read_head_data(base, tmp_path / "pairs.jsonl", tmp_path / "cache")
    assert (len(data.context(0)), len(data)) == (91, 91), "the text and what ends it, twice"


def test_a_response_is_cut_into_tokens_as_what_is_written(
    base: BaseLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By tokenizers that cut what is read otherwise, Marian's with two models of pieces."""
    plain = type(base.tokenizer).__call__

    def cut(self: Any, text: Any = None, text_target: Any = None, **how: Any) -> Any:
        return plain(self, text if text_target is None else text_target.upper(), **how)

    monkeypatch.setattr(type(base.tokenizer), "__call__", cut)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "abc", "response": "def"}) + "\n")
    data = read_head_data(base, tmp_path / "pairs.jsonl", tmp_path / "cache")
    assert base.decode_text(data.context(0).tolist()) == "abc" and base.decode_text(data.targets.tolist()) == "DEF"


def test_a_rescorer_from_scratch_reads_prompt_and_output(base: BaseLM):
    with torch.device("meta"):
        config = scratch_model("neural-32m", base).config
    assert config.max_position_embeddings == base.prompt_length + base.context_length


def test_batches_read_prompts_of_several_lengths_as_if_alone(base: BaseLM):
    prompts = prompts_of(base)
    for made in generate(base, prompts, max_new_tokens=16):
        assert made.output_ids.tolist() == greedy(base, prompts[made.index], 16)
        assert made.hidden is not None
        (states,) = base.states_before([prompts[made.index]], [made.output_ids.tolist()])
        torch.testing.assert_close(torch.from_numpy(made.hidden), states)
        chosen = base.project(states).argmax(-1)
        assert chosen.tolist() == made.output_ids.tolist()
        margin = margin_at(base, prompts[made.index], made.output_ids.tolist(), 2)
        assert margin == pytest.approx(float(made.margins[2]), rel=1e-4)  # type: ignore[index]


def test_several_prompts_states_in_one_call(base: BaseLM):
    prompts, outputs = prompts_of(base), [[5, 9, 70], [1], [33, 2]]
    together = base.states_before(prompts, outputs)
    for prompt, output, states in zip(prompts, outputs, together, strict=True):
        torch.testing.assert_close(base.states_before([prompt], [output])[0], states)


@pytest.mark.parametrize("family", ["marian", "t5"])
def test_in_float32_with_packed_weights(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lm.base.model.LEAST_WEIGHTS", 0)
    monkeypatch.setattr("lm.base.model.compile_layers", lambda base: pytest.fail("its layers are not compiled"))
    base = load_base(str(save(tmp_path / "model", family)), device="cpu")
    exact = load_base(base.identity.name, dtype="float64", device="cpu")
    for prompt in prompts_of(base):
        assert decode(base, None, prompt, max_new_tokens=12).output_ids == greedy(exact, prompt, 12)


def test_a_forced_first_token_is_no_output(tmp_path: Path):
    base = load_base(str(save(tmp_path / "model", "mbart", forced=70)), dtype="float64", device="cpu")
    (prompt, *_) = prompts_of(base)
    assert base.prefix(prompt) == [257, 70]
    assert [70, *decode(base, None, prompt, max_new_tokens=11).output_ids] == greedy(base, prompt, 12)


def test_what_is_forbidden_never_comes(tmp_path: Path):
    plain = load_base(str(save(tmp_path / "plain", "marian")), dtype="float64", device="cpu")
    (prompt, *_) = prompts_of(plain)
    never = decode(plain, None, prompt, max_new_tokens=4).output_ids[2]
    base = load_base(str(save(tmp_path / "model", "marian", never=never)), dtype="float64", device="cpu")
    heads = make_heads(base, strength=0.05)
    decoded = decode(base, heads, prompt, rescorer=load_rescorer("none"), k=258, max_new_tokens=12)
    assert decoded.output_ids == greedy(base, prompt, 12) and never not in decoded.output_ids


def test_the_end_of_an_output_is_never_forbidden(tmp_path: Path):
    """transformers passes it over, too."""
    base = load_base(str(save(tmp_path / "model", "marian", never=256)), dtype="float64", device="cpu")
    assert base.output_bias is not None and base.output_bias.min() > -100
    plain = load_base(str(save(tmp_path / "plain", "marian")), dtype="float64", device="cpu")
    for prompt in prompts_of(base):
        assert decode(base, None, prompt, max_new_tokens=8).output_ids == greedy(plain, prompt, 8)


def test_beginning_with_no_token_is_refused(rescore: Command, tmp_path: Path):
    for changed, number in ({"forced": 5000}, 5000), ({"decoder_start_token_id": 300}, 300):
        folder = save(tmp_path / str(number), "mbart", **changed)  # type: ignore[arg-type]
        rescore("generate", "--base", folder, "--prompt", "a").refused(f"token {number}, and writes 0 to 257; mend")


@pytest.mark.parametrize("family", ["marian", "t5"])
def test_chat_goes_through_the_template(rescore: Command, family: str, tmp_path: Path):
    folder = save(
        tmp_path / "model", family, template="{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    base = load_base(str(folder), dtype="float64", device="cpu")
    ids = base.encode_prompt("abc", chat=base.is_chat)
    assert base.is_chat and ids == base.encode_messages([{"role": "user", "content": "abc"}])
    assert base.decode_text(ids) == "<user>abc"
    (tmp_path / "translation.jsonl").write_text(json.dumps({"source": "abc", "reference": "d"}))
    how = ["--base", folder, "--dtype", "float64", "--device", "cpu", "--max-new-tokens", 8]
    run = rescore(
        "eval", *how, "--task", "translation", "--data", tmp_path / "translation.jsonl", "--rescorer", "lookup",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert run.code == 0, run.err
    (example,) = map(json.loads, (tmp_path / "run" / "examples.jsonl").open())
    assert example["output_ids"] == greedy(base, ids, 8)


def test_lengths_by_other_names(tmp_path: Path):
    """Of LED, and of an encoder and a decoder with configurations of their own."""
    tokenizer = byte_tokenizer(chat=False)
    led = LEDForConditionalGeneration(LEDConfig(
        vocab_size=257, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, pad_token_id=0,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_encoder_position_embeddings=48,
        max_decoder_position_embeddings=20, attention_window=8, decoder_start_token_id=1,
    ))  # fmt: skip
    sizes: dict[str, Any] = {
        "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    }  # fmt: skip
    pairs = []
    # Roberta's first token stands where its table has one after the padding token's.
    for config, before in ((BertConfig, 0), (RobertaConfig, 2)):
        decoder, encoder = (
            config(**sizes, **more, max_position_embeddings=before + length)
            for length, more in ((20, {"is_decoder": True, "add_cross_attention": True}), (48, {}))
        )
        both = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
        both.generation_config.decoder_start_token_id = 2
        pairs.append(both)
    for model in (led, *pairs):
        base = load_base(model.double(), tokenizer)
        assert (base.prompt_length, base.context_length) == (48, 20)
        for count in (3, 48):
            output = decode(base, make_heads(base), [5] * count, rescorer=load_rescorer("none"), max_new_tokens=19)
            assert output.output_ids == greedy(base, [5] * count, 19)
        refused(lambda base=base: decode(base, None, [5] * 49, max_new_tokens=4), "49 tokens")  # type: ignore[misc]
        refused(lambda base=base: decode(base, None, [5], max_new_tokens=20), "--max-new-tokens")  # type: ignore[misc]


def test_whatever_an_architecture_lacks_is_one_line():
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 1)
    config = FSMTConfig(src_vocab_size=257, tgt_vocab_size=257, d_model=8, langs=["en", "de"], **sizes)
    model = FSMTForConditionalGeneration(config)
    refused(lambda: load_base(model, byte_tokenizer(chat=False)), "can't be decoded in blocks", IncompatibleError)


def test_a_decoder_without_a_beginning_is_refused(tmp_path: Path):
    base = load_base(str(save(tmp_path / "model", "bart")), device="cpu")
    for settings in (base.model.config, base.model.generation_config):
        settings.decoder_start_token_id = settings.bos_token_id = None
    refused(lambda: load_base(base.model, base.tokenizer), "decoder_start_token_id")


def test_a_text_alone_has_no_perplexity(base: BaseLM):
    refused(lambda: perplexity(base, ["a text"]), "has an encoder")


def test_layers_that_read_on_from_the_prompt_are_refused(rescore: Command, options, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(test_hydra, "VOCABULARY", 258)
    folder = test_hydra.save_hydra(tmp_path / "hydra", test_hydra.tensors_of())
    for mode in ("replay", "live"):
        rescore("eval", *options, "--rescorer", f"hydra:{folder}", "--mode", mode).refused("with an encoder")


def test_what_is_for_causal_models_alone_is_refused(rescore: Command, base: BaseLM, tmp_path: Path):
    folder, prompt = base.identity.name, torch.tensor([prompts_of(base)[0]])
    custom = custom_generate(tokenizer=base.tokenizer)
    refused(
        lambda: base.model.generate(prompt, max_new_tokens=4, custom_generate=custom),
        "has an encoder",
        "takes decoders only",
    )
    generate = ["generate", "--base", folder, "--prompt", "a", "--max-new-tokens", 4]
    rescore(*generate, "--drafter", f"draft-model:{folder}").refused("has an encoder; give a causal LM")
    make_heads(base, h=4).save(tmp_path / "heads")
    convert = ["convert-heads", tmp_path / "heads", tmp_path / "out", "--base", folder, "--to"]
    for layout in ("medusa-vllm", "medusa-tgi", "medusa-original", "vllm-plugin"):
        rescore(*convert, layout).refused("has an encoder, .*give --to rescore")
    assert rescore(*convert, "rescore").code == 0


def test_a_command_for_costs_has_the_models_as_they_were_given(rescore: Command, base: BaseLM, tmp_path: Path):
    make_heads(base, h=4).save(tmp_path / "heads")
    models = ["--base", base.identity.name, "--heads", tmp_path / "heads", "--dtype", "float64", "--device", "cpu"]
    asked = rescore("generate", *models, "--nodes", "auto", "--prompt", "a")
    asked.refused("run: rescore bench costs " + " ".join(map(str, models)))


def test_the_verify_curve_is_of_the_decoder(base: BaseLM):
    curve = verify_curve(base, cached=20, sizes=(1, 4), repeats=1)
    size, apart = 8, {id(base.output_embeddings.weight), id(base.model.get_input_embeddings().weight)}
    body = sum({id(w): w.numel() for w in base.decoder.parameters() if id(w) not in apart}.values())
    read = size * (body + base.output_embeddings.weight.numel() + 20 * base.position_size)
    for milliseconds, speed in zip(curve.milliseconds, curve.gb_per_second, strict=True):
        assert speed * milliseconds * 1e6 == pytest.approx(read)
    if base.prompt_length < 1000:
        message = refused(lambda: verify_curve(base, cached=97, sizes=(1,), repeats=1), "the 96 that the encoder reads")
        assert message.endswith("lower --cached")
        refused(
            lambda: verify_curve(base, cached=20, sizes=(96,), repeats=1), "calls of up to 96", "give another --base"
        )


@pytest.mark.parametrize("options", ["t5"], indirect=True)
def test_its_costs_are_found_again(rescore: Command, options: list[object]):
    how = ["--cached", 4, "--repeats", 1, "--rescorer", "none", "--k", 4]
    measured = rescore("bench", "costs", *options[4:12], *how)
    assert measured.code == 0, measured.err
    predicted = rescore("eval", *options, "--rescorer", "none", "--costs", "here", "--json")
    assert predicted.code == 0, predicted.err
    assert predicted.document["results"][0]["predicted_speedup"] > 0


def test_too_long_a_prompt_is_refused(base: BaseLM):
    if base.prompt_length < 1000:
        refused(lambda: decode(base, None, [5] * 97, max_new_tokens=4), "97 tokens", "encoder reads")
        message = "an output of 96 tokens does not fit into the decoder's context of 96; lower --max-new-tokens to 95"
        refused(lambda: decode(base, None, [5, 256], max_new_tokens=96), message)


def test_what_is_generated_by_default_fits_into_the_decoder(rescore: Command, tmp_path: Path):
    folder = save(tmp_path / "model", "marian")
    done = rescore("generate", "--base", folder, "--prompt", "a b a b", "--dtype", "float64", "--json")
    assert done.code == 0, done.err
    assert 1 <= len(done.document["token_ids"]) <= SIZES["max_position_embeddings"] - 1
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a"}))
    own = ("generate-corpus", "--base", folder, "--prompts", prompts, "--out", tmp_path / "own")
    rescore(*own, "--max-new-tokens", 96).refused(
        f"the decoder's start and an output of 97 tokens exceed the context of 96 of {folder}; lower --max-new-tokens"
    )


@pytest.fixture(params=FAMILIES)
def options(request: pytest.FixtureRequest, tmp_path: Path) -> list[object]:
    folder = save(tmp_path / "model", request.param, biased=request.param != "marian")  # which none could train with
    base = load_base(str(folder), dtype="float64", device="cpu")
    make_heads(base, h=4, strength=0.05).save(tmp_path / "heads", dtype=torch.float32)
    rows = [json.dumps({"source": text, "reference": text.lower()}) for text in TEXTS]
    (tmp_path / "translation.jsonl").write_text("\n".join(rows))
    return [
        "--task", "translation", "--data", tmp_path / "translation.jsonl", "--base", folder, "--heads",
        tmp_path / "heads", "--dtype", "float64", "--device", "cpu", "--max-new-tokens", 12, "--k", 4,
    ]  # fmt: skip


def test_replay_is_live(rescore: Command, options: list[object], tmp_path: Path):
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    built = rescore(
        "build-ngram", tmp_path / "corpus.txt", "--tokenizer", tmp_path / "model", "--out", tmp_path / "ngram",
        "--order", 2,
    )  # fmt: skip
    assert built.code == 0, built.err
    rescorers = f"none,context-ngram:{tmp_path / 'ngram'},lookup,none:drafters=lookup+heads"
    run = ["eval", *options, "--rescorer", rescorers, "--p", "1,3", "--json"]
    replayed = rescore(*run, "--out", tmp_path / "replay")
    live = rescore(*run, "--mode", "live", "--out", tmp_path / "live", "--peer", "transformers")
    assert (replayed.code, live.code) == (0, 0), replayed.err + live.err
    of_replay = {(r["rescorer"], r["p"]): r for r in replayed.document["results"]}
    of_live = {(r["rescorer"], r["p"]): r for r in live.document["results"]}
    assert len(of_replay) == 8 and of_live.keys() == {*of_replay, ("transformers", 1)}
    for key, result in of_live.items():
        assert result["identical"] == {"n": 3, "identical": 3}, key
        if key in of_replay:
            assert result["block_efficiency"] == of_replay[key]["block_efficiency"], key


@pytest.mark.parametrize("options", ["marian"], indirect=True)
@pytest.mark.parametrize("command", ["trace", "frozen", "lora", "full"])
def test_other_commands(rescore: Command, options: list[object], tmp_path: Path, command: str):
    where = dict(zip(options[::2], options[1::2], strict=True))
    if command == "trace":
        made = rescore("trace", *options[:-2], "--out", tmp_path / "trace", "--k", 8)
        assert made.code == 0, made.err
        again = rescore("eval", "--trace", tmp_path / "trace", "--rescorer", "none", "--k", 4, "--json")
        assert again.code == 0, again.err
    else:
        tuned = [] if command == "frozen" else ["--tune", command]
        (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in TEXTS))
        own = rescore(
            "generate-corpus", "--base", where["--base"], "--prompts", tmp_path / "prompts.jsonl", "--out",
            tmp_path / "own", "--max-new-tokens", 12,
        )  # fmt: skip
        assert own.code == 0, own.err
        pairs = [json.dumps({"prompt": text, "response": text.upper()}) for text in TEXTS * 3]
        (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
        trained = rescore(
            "train-heads", "--base", where["--base"], "--corpus", tmp_path / "own",
            "--corpus", tmp_path / "pairs.jsonl", "--out", tmp_path / "trained", "--h", 3, "--steps", 3,
            "--positions", 16, "--inner-size", 8, *tuned,
        )  # fmt: skip
        assert trained.code == 0 and "shards" not in trained.err, trained.err
        if tuned:
            how = [*options[:4], "--base", tmp_path / "trained", "--max-new-tokens", 8, "--rescorer", "none"]
            with_heads = rescore("eval", *how, "--mode", "live", "--json")
            assert with_heads.code == 0, with_heads.err
            assert with_heads.document["results"][0]["identical"] == {"n": 3, "identical": 3}
            return
        text = tmp_path / "plain.txt"
        text.write_text("some text\n" * 50)
        how = ["--base", where["--base"], "--out", tmp_path / "no", "--steps", 1]
        rescore("train-heads", *how, "--corpus", text).refused("pairs")
