"""`model.generate(..., custom_generate=...)` gives transformers' own greedy output, token for token, or samples with
its law, or refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, make_heads, refused, save_tiny_base
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

import rescore
from lm.base.catalog import load_base
from rescore.acceptance.sampling import Sampling

TOKENIZER = byte_tokenizer()
PROMPTS = ("A prompt, a prompt", "the bridge was built in the bridge", "x")


def llama(seed: int = 3, *, eos: Any = 256) -> PreTrainedModel:
    """A random two-layer Llama in float64, of no file."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.6, eos_token_id=eos, bos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def gpt2() -> PreTrainedModel:
    """Another architecture, with places of its own."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=256, bos_token_id=256,
        pad_token_id=0, initializer_range=0.6,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


MODELS = {"llama": llama(), "gpt2": gpt2()}


def inputs(prompt: str = PROMPTS[0]) -> dict[str, torch.Tensor]:
    return {"input_ids": TOKENIZER(prompt, return_tensors="pt")["input_ids"]}


def of_heads(model: PreTrainedModel) -> Any:
    """With heads, and several tokens a step."""
    heads = make_heads(load_base(model, TOKENIZER))
    return rescore.custom_generate(heads=heads, rescorer="context-ngram:none", k=4, p=4, tokenizer=TOKENIZER)


CUSTOM = {
    ("llama", "heads"): of_heads(MODELS["llama"]),
    ("gpt2", "heads"): of_heads(MODELS["gpt2"]),
    ("llama", "lookup"): rescore.custom_generate(tokenizer=TOKENIZER, drafters=("lookup",), p=2),
    ("gpt2", "lookup"): rescore.custom_generate(tokenizer=TOKENIZER),
}


class EndsAtSum(StoppingCriteria):
    """A criterion of a user's own: it looks at all tokens so far."""

    def __call__(self, input_ids, scores, **_):
        return input_ids.sum(dim=1) % 11 == 0


def first_new(model: PreTrainedModel, place: int) -> int:
    """The token that greedy decoding puts at a place of the output."""
    return int(model.generate(**inputs(), do_sample=False, max_new_tokens=place + 1)[0, -1])


def text_of(token: int) -> str:
    return str(TOKENIZER.decode(token))


LIMITS: dict[str, Any] = {
    "new tokens": {"max_new_tokens": 24},
    "length": {"max_length": 50},
    "one": {"max_new_tokens": 1},
    "default": {},
    "eos": lambda model: {"max_new_tokens": 24, "eos_token_id": first_new(model, 7)},
    "several eos": lambda model: {"max_new_tokens": 24, "eos_token_id": [first_new(model, 9), first_new(model, 3)]},
    "criterion": {"max_new_tokens": 24, "stopping_criteria": StoppingCriteriaList([EndsAtSum()])},
    "own length": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(40)])},
    "own eos": lambda model: {
        "max_new_tokens": 24, "stopping_criteria": StoppingCriteriaList([EosTokenCriteria(first_new(model, 5))])
    },
    "stop string": lambda model: {
        "max_new_tokens": 24,
        "stopping_criteria": StoppingCriteriaList([StopStringCriteria(TOKENIZER, [text_of(first_new(model, 6))])]),
    },
    "normalised": {"max_new_tokens": 9, "renormalize_logits": True},
    "time": {"max_new_tokens": 9, "max_time": 1000.0},
    "no cache": {"max_new_tokens": 9, "use_cache": False},
    "empty cache": lambda model: {"max_new_tokens": 9, "cache": DynamicCache(config=model.config)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a criterion given twice
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(("name", "drafts"), CUSTOM, ids=str)
def test_the_output_is_transformers_greedy(name: str, drafts: str, limits: str):
    model, custom = MODELS[name], CUSTOM[name, drafts]
    for prompt in PROMPTS:
        asked = [LIMITS[limits](model) if callable(LIMITS[limits]) else LIMITS[limits] for _ in range(2)]
        greedy = model.generate(**inputs(prompt), do_sample=False, **asked[0])
        ours = model.generate(**inputs(prompt), do_sample=False, **asked[1], custom_generate=custom)
        assert ours.dtype == greedy.dtype and ours.tolist() == greedy.tolist()
        new = ours.shape[1] - inputs(prompt)["input_ids"].shape[1]
        assert custom.decoded.output_ids == ours[0, -new:].tolist() and sum(custom.decoded.accepted) == new


def test_it_takes_several_tokens_a_step():
    MODELS["llama"].generate(**inputs(), max_new_tokens=60, custom_generate=CUSTOM["llama", "heads"])
    decoded = CUSTOM["llama", "heads"].decoded
    assert len(decoded.accepted) < len(decoded.output_ids) == 60 and decoded.seconds.total > 0


def test_the_length_by_default_is_transformers_own():
    model = llama()
    model.generation_config.max_length = 33
    custom = rescore.custom_generate(tokenizer=TOKENIZER)
    assert model.generate(**inputs(), custom_generate=custom).shape[1] <= 33


def test_a_dictionary_where_it_is_asked_for():
    model, how = MODELS["llama"], {"max_new_tokens": 9, "return_dict_in_generate": True}
    ours = model.generate(**inputs(), **how, custom_generate=CUSTOM["llama", "heads"])
    greedy = model.generate(**inputs(), do_sample=False, **how)
    assert type(ours) is type(greedy) and ours.sequences.tolist() == greedy.sequences.tolist()


@pytest.mark.parametrize("skip", [True, False])
def test_a_streamer_prints_what_transformers_would(skip: bool, capsys: pytest.CaptureFixture[str]):
    model = MODELS["llama"]
    printed = []
    for how in ("transformers", "ours"):
        streamer = TextStreamer(TOKENIZER, skip_prompt=skip)
        given = {"streamer": streamer} if how == "transformers" else {
            "custom_generate": CUSTOM["llama", "heads"], "stream_to": streamer
        }  # fmt: skip
        model.generate(**inputs(), max_new_tokens=24, do_sample=False, **given)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and len(printed[0]) > 5


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"do_sample": True, "min_p": 0.1}, "as min_p does; leave it out"),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p"),
        ({"do_sample": True, "epsilon_cutoff": 0.01}, "epsilon_cutoff"),
        ({"do_sample": True, "eta_cutoff": 0.01}, "eta_cutoff"),
        ({"do_sample": True, "top_h": 0.5}, "top_h"),
        ({"do_sample": True, "repetition_penalty": 1.1}, "repetition_penalty"),
        ({"do_sample": True, "num_beams": 2}, "asks for beam_sample"),
        ({"do_sample": True, "num_return_sequences": 2}, "one prompt a call, and there are 2"),
        ({"num_beams": 2}, "asks for beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "asks for assisted_generation"),
        ({"repetition_penalty": 1.1}, "as repetition_penalty does; leave it out"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"min_new_tokens": 3}, "min_new_tokens"),
        ({"min_length": 30}, "min_length"),
        ({"bad_words_ids": [[65]]}, "bad_words_ids"),
        ({"sequence_bias": [[[65], -1.0]]}, "sequence_bias"),
        ({"suppress_tokens": [65]}, "suppress_tokens"),
        ({"begin_suppress_tokens": [65]}, "begin_suppress_tokens"),
        ({"forced_eos_token_id": 65}, "forced_eos_token_id"),
        ({"forced_bos_token_id": 65}, "forced_bos_token_id"),
        ({"exponential_decay_length_penalty": (2, 1.5)}, "exponential_decay_length_penalty"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"prefix_allowed_tokens_fn": lambda *_: [65]}, "prefix_allowed_tokens_fn"),
        ({"remove_invalid_values": True}, "remove_invalid_values"),
        ({"logits_processor": [lambda ids, scores: -scores]}, "as function does"),
        ({"output_scores": True, "return_dict_in_generate": True}, "leave out output_scores"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "leave out output_hidden_states"),
        ({"input_ids": torch.tensor([[1, 2], [3, 4]])}, "one prompt a call, and there are 2"),
        ({"attention_mask": torch.tensor([[0, *[1] * (len(PROMPTS[0]) - 1)]])}, "the prompt is padded"),
        ({"max_new_tokens": 400}, "do not fit into the context of 256"),
        ({"inputs_embeds": torch.zeros(1, 3, 32, dtype=torch.float64), "input_ids": None}, "input_ids"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value),  # a function has no name that stays
)
def test_what_can_not_be_had_is_refused_by_name(asked: dict[str, Any], told: str):
    model, custom = MODELS["llama"], CUSTOM["llama", "heads"]
    given = {**inputs(), "max_new_tokens": 8, **asked}
    if given["input_ids"] is None:
        del given["input_ids"]
    refused(lambda: model.generate(**given, custom_generate=custom), told)


LAWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what the call says, and the model's generation_config
    "defaults": ({}, {}),
    "all tokens": ({"top_k": 0}, {}),
    "temperature": ({"temperature": 0.6}, {}),
    "all three": ({"temperature": 1.7, "top_k": 20, "top_p": 0.8}, {}),
    "the model's": ({}, {"temperature": 0.5, "top_k": 7}),
    "of both": ({"top_p": 0.6, "renormalize_logits": True}, {"top_k": 30, "do_sample": True}),
}


@pytest.mark.parametrize("name", LAWS)
def test_what_is_sampled_has_the_law_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch):
    asked, of_model = LAWS[name]
    model, laws = llama(), []

    def first(rule: Sampling, logits: torch.Tensor) -> int:
        laws.append(rule.law(logits))
        return int(laws[-1].argmax())

    monkeypatch.setattr(Sampling, "first", first)
    for key, value in of_model.items():
        setattr(model.generation_config, key, value)
    how = {"max_new_tokens": 1} | ({} if "do_sample" in of_model else {"do_sample": True}) | asked
    theirs = model.generate(**inputs(), **how, return_dict_in_generate=True, output_scores=True)
    model.generate(**inputs(), **how, custom_generate=rescore.custom_generate(tokenizer=TOKENIZER))
    np.testing.assert_allclose(laws[0], torch.softmax(theirs.scores[0][0], -1).numpy(), atol=1e-6)
    assert (laws[0] > 0).sum() == (theirs.scores[0][0] > -torch.inf).sum()


def test_torchs_seed_decides_what_is_sampled():
    model, outputs = MODELS["llama"], []
    how = {"max_new_tokens": 12, "custom_generate": CUSTOM["llama", "heads"]}
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append([model.generate(**inputs(), do_sample=True, **how).tolist() for _ in range(2)])
    assert outputs[0] == outputs[1] != outputs[2] and outputs[0][0] != outputs[0][1]
    state = torch.get_rng_state()
    greedy = model.generate(**inputs(), do_sample=False, max_new_tokens=12)
    assert model.generate(**inputs(), do_sample=False, **how).tolist() == greedy.tolist()
    assert torch.equal(torch.get_rng_state(), state), "greedy decoding draws nothing"


def test_drafts_that_are_drawn_are_for_sampling():
    model = MODELS["llama"]
    heads, run = make_heads(load_base(model, TOKENIZER)), rescore.Run("draws", k=4)
    custom = rescore.custom_generate(heads=heads, rescorer=run, tokenizer=TOKENIZER)
    how = {**inputs(), "max_new_tokens": 4, "custom_generate": custom}
    refused(lambda: model.generate(**how), "draws its drafts, which is for sampled output only; add", "do_sample=True")
    assert model.generate(**how, do_sample=True).shape[1] > inputs()["input_ids"].shape[1]
    refused(lambda: model.generate(**how), "draws its drafts, which is for sampled output only")


def test_a_cache_with_something_in_it_is_refused():
    model, cache = MODELS["llama"], DynamicCache(config=MODELS["llama"].config)
    model(input_ids=torch.tensor([[1, 2, 3]]), cache=cache)
    given = {**inputs(), "cache": cache, "max_new_tokens": 3, "custom_generate": CUSTOM["llama", "heads"]}
    refused(lambda: model.generate(**given), "keeps a cache of its own; leave out cache")


def test_the_model_stays_the_users(tiny_folder: Path):
    model = llama()
    model.train()
    custom = rescore.custom_generate(tokenizer=TOKENIZER)
    refused(lambda: model.generate(**inputs(), max_new_tokens=3, custom_generate=custom), "call model.eval() first")
    model.eval()
    model.model.embed_tokens.requires_grad_(False)
    model.generate(**inputs(), max_new_tokens=3, custom_generate=custom)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters()} - {"model.embed_tokens.weight"}
    assert model(**inputs()).logits.requires_grad


def test_one_callable_serves_several_models():
    custom = rescore.custom_generate(tokenizer=TOKENIZER)
    for model in (llama(5), llama(6), llama(5)):
        greedy = model.generate(**inputs(), max_new_tokens=12, do_sample=False)
        assert model.generate(**inputs(), max_new_tokens=12, custom_generate=custom).tolist() == greedy.tolist()


def test_the_tokenizer_is_found_or_asked_for(tmp_path: Path):
    folder = save_tiny_base(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    make_heads(load_base(model, TOKENIZER)).save(tmp_path / "heads", dtype=torch.float32)
    custom = rescore.custom_generate(heads=str(tmp_path / "heads"))
    greedy = model.generate(**inputs(), max_new_tokens=12, do_sample=False)
    assert model.generate(**inputs(), max_new_tokens=12, custom_generate=custom).tolist() == greedy.tolist()
    refused(
        lambda: llama().generate(**inputs(), max_new_tokens=3, custom_generate=rescore.custom_generate()),
        "no tokenizer is found for LlamaForCausalLM", "give custom_generate(tokenizer=...)",
    )  # fmt: skip


def test_a_run_says_it_all():
    run = rescore.Run("none", drafters=("lookup",), p=2)
    custom, model = rescore.custom_generate(rescorer=run, tokenizer=TOKENIZER), MODELS["llama"]
    greedy = model.generate(**inputs(), max_new_tokens=12, do_sample=False)
    assert model.generate(**inputs(), max_new_tokens=12, custom_generate=custom).tolist() == greedy.tolist()
    refused(lambda: rescore.custom_generate(rescorer=run, p=4), "a Run says its own drafters, k and p")
    assert json.dumps(custom.decoded.accepted)
