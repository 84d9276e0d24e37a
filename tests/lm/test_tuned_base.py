"""A base LM fine-tuned with its heads: it learns, resumes, and what it leaves is a base LM of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused, save_tiny_base
from safetensors.torch import load_file, save_file
from test_training import SMALL
from transformers import GPT2Config, GPT2LMHeadModel

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm.base.catalog import identify, load_base, load_projection
from lm.heads.block_heads import heads_folder, load_heads, of_other_weights
from lm.neural.model import DeltaConfig, check_fits, find_neural, load_neural, save_delta, some_layers
from lm.training.data import read_head_data
from lm.training.heads import HeadTrainer, TrainingOptions
from rescore.acceptance import first_difference
from rescore.decoding import decode
from rescore.rescorers import load_rescorer

TUNED = dataclasses.replace(
    SMALL, tune="lora", heads_per_step=None, vocabulary=None, steps=6, evaluate_every=2, micro_batch=120,
    learning_rate=5e-3, base_learning_rate=2e-2,
)  # fmt: skip
SENTENCE = "the cat sat on the mat, and so did the dog; "


def lora_of_last_layer(folder: str, pairs: Path, tmp_path: Path) -> Path:
    out = tmp_path / "adapter"
    trainer_of(folder, pairs, dataclasses.replace(TUNED, tuned_layers=1), tmp_path).train(out)
    return out


def test_a_base_cut_below_its_changed_layers_is_the_untuned_one(folder, pairs, tmp_path):
    tuned = lora_of_last_layer(folder, pairs, tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    cut, of_base = some_layers(str(tuned), [0]), some_layers(folder, [0])
    assert torch.equal(cut.forward(ids)[1], of_base.forward(ids)[1])
    embeddings = [load_projection(name).output_embeddings.weight for name in (str(tuned), folder)]
    assert torch.equal(*embeddings)
    assert not torch.equal(load_base(str(tuned)).forward(ids)[1], load_base(folder).forward(ids)[1])


def test_a_delta_of_the_untuned_base_rescores_for_the_tuned_one(folder, pairs, tmp_path):
    base, tuned = load_base(folder), load_base(str(lora_of_last_layer(folder, pairs, tmp_path)))
    config = DeltaConfig(
        size="neural-32m", layers=(0,), tuned_layers=1, base_name=folder,
        base_weights_sha256=base.identity.weights_sha256, tokenizer_sha256=base.identity.tokenizer_sha256,
    )  # fmt: skip
    save_delta(some_layers(folder, [0]).model, ["model.norm.weight"], config, tmp_path / "delta")
    source = find_neural(str(tmp_path / "delta"))
    check_fits(source, tuned.identity)
    given = {"vocab_size": base.vocab_size, "base_name": tuned.identity.name}
    found = load_neural(source, **given, shared=tuned)
    found.model.unpack()
    expected = load_neural(source, vocab_size=base.vocab_size, base_name=folder)
    for (name, a), (_, b) in zip(*(m.model.model.named_parameters() for m in (found, expected)), strict=True):
        assert torch.equal(a, b), name
    other = str(save_tiny_base(tmp_path / "other", seed=5))
    with pytest.raises(IncompatibleError, match="needs the weights"):
        check_fits(source, identify(other))
    trainer_of(other, pairs, dataclasses.replace(TUNED, steps=1), tmp_path).train(tmp_path / "of-other")
    with pytest.raises(IncompatibleError, match="needs the weights"):
        check_fits(source, identify(str(tmp_path / "of-other")))


def test_a_delta_of_the_tuned_base_is_of_its_own_layers(folder, pairs, tmp_path):
    trainer_of(folder, pairs, TUNED, tmp_path).train(tmp_path / "adapter")  # changes all layers
    name = str(tmp_path / "adapter")
    tuned, cut = load_base(name), some_layers(name, [0])
    for (at, a), (_, b) in zip(
        cut.model.model.layers[0].named_parameters(), tuned.model.model.layers[0].named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=at)
    identity = tuned.identity
    config = DeltaConfig(
        size="neural-32m", layers=(0,), tuned_layers=1, base_name=name,
        base_weights_sha256=identity.weights_sha256, tokenizer_sha256=identity.tokenizer_sha256,
    )  # fmt: skip
    save_delta(cut.model, ["model.norm.weight"], config, tmp_path / "delta")
    source = find_neural(str(tmp_path / "delta"))
    check_fits(source, identity)
    found = load_neural(source, vocab_size=tuned.vocab_size, base_name=name, shared=tuned)
    for model in (found.model, tuned):
        model.unpack()
    weight = found.model.model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(weight, tuned.model.model.layers[0].mlp.up_proj.weight)


def test_an_adapter_for_more_layers_is_refused(folder, pairs, tmp_path):
    adapter = lora_of_last_layer(folder, pairs, tmp_path) / "adapter_model.safetensors"
    tensors = load_file(adapter)
    more = {name.replace(".layers.1.", ".layers.7."): value.clone() for name, value in tensors.items()}
    save_file(tensors | more, adapter)
    with pytest.raises(InvalidDataError, match="does not fit its base LM"):
        load_base(str(adapter.parent))


class StopError(Exception):
    """An interruption from outside."""


@pytest.fixture
def folder(tiny_folder: Path) -> str:
    """The tiny base LM's, which a training does not change."""
    return str(tiny_folder)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": "p" * (1 + i % 4), "response": SENTENCE * (1 + i % 2)} for i in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def trainer_of(folder: str, pairs: Path, options: TrainingOptions, cache: Path) -> HeadTrainer:
    """A trainer with a base of its own, which it may change."""
    base = load_base(folder, device="cpu")
    return HeadTrainer(base, [read_head_data(base, pairs, cache, precision=options.precision)], options)


def test_an_untouched_adapter_changes_nothing(folder, pairs, tmp_path):
    """Before the first step the states are the cached ones, so the losses of heads 2..h are those of a frozen base."""
    tuned = trainer_of(folder, pairs, TUNED, tmp_path)
    segments = tuned.segments[:5]
    states = tuned.tuned.states(tuned.data, segments)
    cached = np.concatenate([tuned.data[0].states[s.start : s.end] for s in segments]).astype(np.float32)
    np.testing.assert_allclose(states.detach().numpy(), cached, rtol=5e-3, atol=5e-3)
    parts = tuned._micro_batches(segments)
    assert len(parts) > 1 and sorted(s for part in parts for s in part) == sorted(segments)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", ["lora", "full"])
def test_micro_batches_and_checkpointing_do_not_change_the_gradients(folder, pairs, tmp_path, how, checkpointing):
    def gradients(**change) -> dict[str, torch.Tensor]:
        trainer = trainer_of(folder, pairs, dataclasses.replace(TUNED, tune=how, positions=300, **change), tmp_path)
        torch.manual_seed(3)
        for name, parameter in trainer.parameters.items():
            if "lora_B" in name or "outer" in name or name == "token.weight":
                torch.nn.init.normal_(parameter, std=0.1)
        for loss in trainer._losses(0):
            loss.backward()
        return {name: parameter.grad for name, parameter in trainer.parameters.items()}

    whole, parts = gradients(micro_batch=10_000), gradients(micro_batch=70, gradient_checkpointing=checkpointing)
    assert whole.keys() == parts.keys() and any(name.startswith("base.") for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6)
        assert bool((gradient != 0).any()), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_with_dropout_is_trained_without(tmp_path, pairs, checkpointing):
    save_tiny_base(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    options = dataclasses.replace(TUNED, gradient_checkpointing=checkpointing)
    trainer = trainer_of(str(tmp_path / "base"), pairs, options, tmp_path)
    states = [trainer.tuned.states(trainer.data, trainer.segments[:3]) for _ in range(2)]
    assert torch.equal(*states)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_propagated_below_the_last_layers(folder, pairs, tmp_path, checkpointing):
    options = dataclasses.replace(TUNED, tuned_layers=1, gradient_checkpointing=checkpointing)
    trainer = trainer_of(folder, pairs, options, tmp_path)
    seen = {}
    for place, layer in enumerate(trainer.base.model.model.layers):
        layer.register_forward_hook(lambda _m, _i, out, place=place: seen.__setitem__(place, out.requires_grad))
    trainer.tuned.states(trainer.data, trainer.segments[:2])
    assert seen == {0: False, 1: True}


def test_in_full_everything_moves_but_the_embeddings(folder, pairs, tmp_path):
    trainer = trainer_of(folder, pairs, dataclasses.replace(TUNED, tune="full"), tmp_path)
    moving = {name for name in trainer.parameters if name.startswith("base.")}
    model = {f"base.{name}" for name, _ in trainer.base.model.named_parameters()}
    assert model - moving == {"base.model.embed_tokens.weight"}


@pytest.mark.parametrize("how", ["lora", "full"])
def test_only_the_last_layers(folder, pairs, tmp_path, how):
    def moving(layers: int | None) -> set[str]:
        options = dataclasses.replace(TUNED, tune=how, tuned_layers=layers)
        return {n for n in trainer_of(folder, pairs, options, tmp_path).parameters if n.startswith("base.")}

    every, last = moving(None), moving(1)
    assert last < every
    assert {n for n in last if ".layers." in n} == {n for n in every if ".layers.1." in n}
    with pytest.raises(RescoreError, match="has 2 layers"):
        moving(3)


@pytest.mark.parametrize("how", ["lora", "full"])
def test_from_training_to_a_base_of_its_own(folder, pairs, tmp_path, how):
    """The tuned base has learned the sentence, its heads more of it than heads of a frozen base; decoding is exact."""
    options = dataclasses.replace(TUNED, tune=how, steps=120, evaluate_every=120, soft=0.0, base_learning_rate=2e-2)
    trainer = trainer_of(folder, pairs, options, tmp_path)
    before = trainer.evaluate()
    after = trainer.train(tmp_path / "out")
    assert after.top[1][0] > before.top[1][0] + 0.3  # head 1, the base itself
    assert after.accepted > before.accepted + 0.5
    frozen = trainer_of(folder, pairs, dataclasses.replace(SMALL, steps=120, evaluate_every=120), tmp_path)
    assert after.accepted > frozen.train(tmp_path / "frozen").accepted + 0.3

    name = str(tmp_path / "out")
    tuned = load_base(name, device="cpu")
    assert tuned.identity.weights_sha256 not in ("", trainer.base.identity.weights_sha256)
    assert tuned.identity == identify(name) and tuned.identity.name == name
    segments = trainer.held_out
    with torch.no_grad():
        expected = trainer.tuned.states(trainer.data, segments)
    ids = [trainer.data[0].context(s.number).tolist() + trainer.data[0].targets[s.start : s.end - 1].tolist()
           for s in segments]  # fmt: skip
    found = torch.cat(
        [tuned.forward(torch.tensor([i]))[1][0, -s.targets :] for i, s in zip(ids, segments, strict=True)]
    )
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # the adapter was rounded to float16

    if how == "lora":  # by the name it was loaded by, not by where that lies here
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == folder
    assert heads_folder(None, tuned.identity) == tmp_path / "out" / "heads"
    assert of_other_weights(None, tuned.identity) is None
    assert "other weights" in of_other_weights(str(tmp_path / "out" / "heads"), identify(folder))
    heads = load_heads(tuned.identity)
    prompt = tuned.encode_prompt("pp", chat=True)
    greedy = decode(tuned, None, prompt, max_new_tokens=24)
    ours = decode(tuned, heads, prompt, rescorer=load_rescorer("none"), k=4, max_new_tokens=24)
    assert first_difference(ours.output_ids, greedy.output_ids) is None
    assert len(ours.accepted) < len(greedy.accepted)


@pytest.mark.parametrize("how", ["lora", "full"])
def test_an_interrupted_training_is_the_same_training(folder, pairs, tmp_path, how):
    options = dataclasses.replace(TUNED, tune=how)
    trainer_of(folder, pairs, options, tmp_path).train(tmp_path / "whole")

    def interrupt(step: int, _steps: int, _loss: float) -> None:
        if step == 5:
            raise StopError

    with pytest.raises(StopError):
        trainer_of(folder, pairs, options, tmp_path).train(tmp_path / "parts", progress=interrupt)
    trainer_of(folder, pairs, options, tmp_path).train(tmp_path / "parts")
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "parts" / path.relative_to(tmp_path / "whole")), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), path
    log = (tmp_path / "parts" / "training_log.jsonl").read_text()
    assert log == (tmp_path / "whole" / "training_log.jsonl").read_text()


class TestTrouble:
    @pytest.fixture
    def adapter(self, folder, pairs, tmp_path) -> Path:
        out = tmp_path / "adapter"
        trainer_of(folder, pairs, dataclasses.replace(TUNED, steps=1), tmp_path).train(out)
        return out

    def test_an_adapter_of_other_weights_is_refused(self, adapter, tmp_path):
        other = save_tiny_base(tmp_path / "other", seed=5)
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))
        assert "other weights" in refused(lambda: load_base(str(adapter)), IncompatibleError)

    @pytest.mark.parametrize(
        ("change", "named"),
        [({"peft_type": "PREFIX_TUNING"}, "only LORA"), ({"base_model_name_or_path": None}, "does not name its base")],
    )
    def test_a_config_that_is_wrong(self, adapter, change, named):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
        assert named in refused(lambda: load_base(str(adapter)), InvalidDataError)

    def test_an_adapter_of_an_adapter_is_refused(self, adapter, tmp_path):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (tmp_path / "second").mkdir()
        second = {**config, "base_model_name_or_path": str(adapter)}
        (tmp_path / "second" / "adapter_config.json").write_text(json.dumps(second))
        assert "itself an adapter" in refused(lambda: load_base(str(tmp_path / "second")), InvalidDataError)

    def test_an_adapter_on_an_adapter_is_not_trained(self, adapter, pairs, tmp_path):
        said = refused(lambda: trainer_of(str(adapter), pairs, TUNED, tmp_path), IncompatibleError)
        assert "adapter itself" in said and "tune: full" in said
        trainer_of(str(adapter), pairs, dataclasses.replace(TUNED, tune="full", steps=1), tmp_path).train(
            tmp_path / "f"
        )
        load_base(str(tmp_path / "f"))

    def test_a_base_without_linear_layers_takes_no_adapter(self, pairs, tmp_path):
        folder = save_tiny_base(tmp_path / "gpt2")
        config = GPT2Config(
            vocab_size=load_base(str(folder)).vocab_size, n_embd=32, n_layer=1, n_head=2, n_positions=64,
            bos_token_id=256, eos_token_id=256,
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(folder)
        said = refused(lambda: trainer_of(str(folder), pairs, TUNED, tmp_path), IncompatibleError)
        assert "no linear layers" in said

    @pytest.mark.parametrize("keep", [0, 9, -5])
    def test_a_truncated_adapter(self, adapter, keep):
        path = adapter / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        refused(lambda: load_base(str(adapter)), InvalidDataError)

    def test_an_adapter_without_weights(self, adapter):
        (adapter / "adapter_model.safetensors").unlink()
        assert "adapter_model.safetensors" in refused(lambda: load_base(str(adapter)))

    def test_an_adapter_of_other_shapes(self, adapter):
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        first = sorted(tensors)[0]
        save_file({**tensors, first: torch.zeros(2, 2)}, path)
        refused(lambda: load_base(str(adapter)), InvalidDataError)

    def test_no_rescorer_is_an_adapter(self, adapter):
        assert "merge it" in refused(lambda: find_neural(str(adapter)))

    def test_other_options_are_shown(self, folder, pairs, tmp_path):
        trainer_of(folder, pairs, dataclasses.replace(TUNED, steps=2), tmp_path).train(tmp_path / "out")
        other = trainer_of(folder, pairs, dataclasses.replace(TUNED, steps=2, lora_rank=4), tmp_path)
        message = refused(lambda: other.train(tmp_path / "out"), IncompatibleError)
        assert "lora_rank" in message and "4" in message
