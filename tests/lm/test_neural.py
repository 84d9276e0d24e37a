"""Small neural LMs: sizes as named, deltas that come back as they were, and a reason for each one that is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, refused, save_tiny_base
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lattices.errors import IncompatibleError, InvalidDataError, UnknownNameError
from lm.base.catalog import load_base
from lm.base.fast.packed import product_of
from lm.base.model import BaseLM
from lm.checkpoint import SCALE
from lm.neural import model as neural
from lm.neural.model import (
    SIZES,
    DeltaConfig,
    NeuralLM,
    check_fits,
    find_neural,
    load_neural,
    named_size,
    save_delta,
    scratch_model,
    some_layers,
)

MILLIONS = {"neural-32m": 32e6, "neural-61m": 61e6, "neural-94m": 94e6}


@pytest.fixture(scope="module")
def base(tiny_folder) -> BaseLM:
    return load_base(str(tiny_folder), device="cpu")


@pytest.fixture(scope="module")
def tuned(tiny_folder) -> BaseLM:
    """The base's first layer, moved a little, as training would."""
    cut = some_layers(str(tiny_folder), [0])
    torch.manual_seed(1)
    for name in names_of(cut):
        parameter = dict(cut.model.named_parameters())[name]
        parameter.data += 0.05 * torch.randn_like(parameter)
    return cut


def names_of(cut: BaseLM) -> list[str]:
    """What training moves: the layer and the final norm."""
    return sorted(n for n, _ in cut.model.named_parameters() if ".layers." in n or n.endswith("norm.weight"))


def config_for(base: BaseLM, **changes) -> DeltaConfig:
    identity = base.identity
    config = DeltaConfig(
        size="neural-32m", layers=(0,), tuned_layers=1, base_name=identity.name,
        base_weights_sha256=identity.weights_sha256, tokenizer_sha256=identity.tokenizer_sha256,
    )  # fmt: skip
    return msgspec.structs.replace(config, **changes)


@pytest.fixture
def delta(base, tuned, tmp_path) -> Path:
    save_delta(tuned.model, names_of(tuned), config_for(base), tmp_path / "delta")
    return tmp_path / "delta"


def weights_of(loaded: NeuralLM) -> int:
    """Number of weights, tied ones once."""
    return sum(p.numel() for p in loaded.model.model.parameters())


def base_logits(folder: Path, dtype: str, ids: np.ndarray) -> torch.Tensor:
    """What the base says after ids, as it is loaded."""
    return load_base(str(folder), dtype=dtype, device="cpu").forward(torch.from_numpy(ids))[0]


def load(folder: Path, base: BaseLM, **options):
    source = find_neural(str(folder))
    check_fits(source, base.identity)
    return load_neural(source, vocab_size=base.vocab_size, base_name=base.identity.name, **options)


class TestSizes:
    @pytest.mark.parametrize("size", SIZES)
    def test_from_scratch(self, size):
        """Embeddings counted, tied ones once, at a vocabulary of 50,000."""
        fake = SimpleNamespace(vocab_size=50_000, context_length=8192, eos_token_ids=frozenset({2}), has_encoder=False)
        with torch.device("meta"):
            model = scratch_model(size, fake)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(MILLIONS[size], rel=0.03)
        assert model.config.num_hidden_layers == SIZES[size].layers and model.config.tie_word_embeddings

    @pytest.mark.parametrize("size", SIZES)
    def test_from_the_built_in_base(self, size):
        """SmolLM2-135M's shape with as many of its 30 layers."""
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_attention_heads=9,
            num_key_value_heads=3,
            num_hidden_layers=SIZES[size].base_layers,
            tie_word_embeddings=True,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(MILLIONS[size], rel=0.03)

    def test_an_unknown_size(self):
        assert "unknown rescorer size 'neural-60m'; did you mean" in refused(
            lambda: named_size("neural-60m"), UnknownNameError
        )

    def test_a_base_with_fewer_layers(self, tiny_folder):
        message = refused(lambda: some_layers(str(tiny_folder), range(9)))
        assert "has 2 layers, and layer 8 of it is asked for" in message and "--init scratch" in message

    def test_the_first_layers_are_the_bases_own(self, base, tiny_folder):
        cut = some_layers(str(tiny_folder), [0])
        whole = dict(base.model.named_parameters())
        assert len(cut.model.model.layers) == 1 and cut.vocab_size == base.vocab_size
        for name, parameter in cut.model.named_parameters():
            assert torch.equal(parameter, whole[name])
        assert len(base.model.model.layers) == 2  # the base itself is left as it is


class TestDelta:
    def test_tensors_come_back_but_for_the_rounding(self, base, tuned, delta):
        loaded = dict(load(delta, base).model.model.named_parameters())
        untouched = dict(base.model.named_parameters())
        for name, parameter in tuned.model.named_parameters():
            if name not in names_of(tuned):
                assert torch.equal(loaded[name], untouched[name])
            elif parameter.ndim < 2:
                assert torch.equal(loaded[name], parameter)
            else:
                bound = parameter.abs().amax(dim=1, keepdim=True) / 127 / 2  # half a step of the row's scale
                assert ((loaded[name] - parameter).abs() <= bound * 1.001).all()
                assert not torch.equal(loaded[name], untouched[name])

    def test_the_file_holds_the_tuned_tensors_only(self, tuned, delta):
        tensors = load_file(delta / "model.safetensors")
        assert {name for name in tensors if not name.endswith(SCALE)} == set(names_of(tuned))
        for name, value in tensors.items():
            is_matrix = name + SCALE in tensors
            assert value.dtype == (torch.int8 if is_matrix else torch.float32)
            assert not is_matrix or tensors[name + SCALE].shape == (len(value), 1)
        assert json.loads((delta / "config.json").read_text())["kind"] == "delta"

    def test_a_row_of_zeros(self, base, tiny_folder, tmp_path):
        cut = some_layers(str(tiny_folder), [0])
        name = "model.layers.0.mlp.up_proj.weight"
        dict(cut.model.named_parameters())[name].data[3] = 0
        save_delta(cut.model, [name], config_for(base), tmp_path)
        loaded = load(tmp_path, base).model.model.state_dict()[name]
        assert (loaded[3] == 0).all() and loaded.isfinite().all()

    @pytest.mark.parametrize("dtype", ["float32", "float64"])  # of which the first is laid out for decoding
    @pytest.mark.parametrize("layers", [1, 2])
    def test_beside_a_base_that_decodes_its_weights_and_products_are_shared(self, tiny_folder, tmp_path, dtype, layers):
        base, cut = load_base(str(tiny_folder), dtype=dtype, device="cpu"), some_layers(str(tiny_folder), range(layers))
        own = [name for name, _ in cut.model.named_parameters() if f".layers.{layers - 1}." in name]
        torch.manual_seed(1)
        for name in own:
            cut.model.get_parameter(name).add_(0.05 * torch.randn_like(cut.model.get_parameter(name)))
        save_delta(cut.model, own, config_for(base, layers=tuple(range(layers))), tmp_path)
        shared, alone = load(tmp_path, base, dtype=dtype, shared=base), load(tmp_path, base, dtype=dtype)
        whole = dict(base.model.named_modules())
        for name, module in shared.model.model.named_modules():
            for part, parameter in module.named_parameters(recurse=False):
                assert (parameter is getattr(whole[name], part)) == (f"{name}.{part}" not in own), name
            product = product_of(module)
            assert (product is None) == (dtype == "float64" or type(module) is not torch.nn.Linear)
            assert product is None or (product is product_of(whole[name])) == (f"{name}.weight" not in own)
        assert shared.model.output_embeddings.weight is shared.model.model.get_input_embeddings().weight
        ids, parents = np.arange(5)[None], np.arange(5)[None] - 1
        read = [m.read(m.new_cache(1), ids, parents) for m in (shared, alone)]
        torch.testing.assert_close(*read, rtol=0, atol=1e-5 * float(read[1].abs().max()))
        shared.model.unpack()  # and the base goes on as it was
        torch.testing.assert_close(base.forward(torch.from_numpy(ids))[0], base_logits(tiny_folder, dtype, ids))
        assert torch.equal(shared.read(shared.new_cache(1), ids, parents), read[1])

    def test_a_base_in_another_precision_is_not_shared(self, base, tiny_base, delta):
        loaded = load(delta, base, shared=tiny_base)
        whole = {p.data_ptr() for p in tiny_base.model.parameters()}
        assert not whole & {p.data_ptr() for p in loaded.model.model.parameters()}

    def test_parameters_are_counted_with_tied_ones_once(self, base, delta):
        model = load(delta, base).model.model
        assert weights_of(load(delta, base)) == sum(p.numel() for p in model.parameters())
        assert weights_of(load(delta, base)) < sum(p.numel() for p in base.model.parameters())

    def test_its_hash_names_weights_and_base(self, base, tuned, delta, tmp_path):
        source = find_neural(str(delta))
        of_another = msgspec.structs.replace(source.delta, base_weights_sha256="another")
        assert dataclasses.replace(source, delta=of_another).sha256 != source.sha256
        save_delta(tuned.model, names_of(tuned)[:2], config_for(base), tmp_path / "less")
        assert find_neural(str(tmp_path / "less")).sha256 != source.sha256


class TestWhole:
    def test_its_hash_names_its_configuration(self, tmp_path):
        folder = save_tiny_base(tmp_path / "small", seed=3, hidden_size=16)
        before = find_neural(str(folder)).sha256
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
        assert find_neural(str(folder)).sha256 != before

    def test_a_folder_of_save_pretrained(self, base, tmp_path):
        folder = save_tiny_base(tmp_path / "small", seed=3, hidden_size=16)
        loaded = load(folder, base)
        assert find_neural(str(folder)).delta is None
        assert weights_of(loaded) == sum(p.numel() for p in load_base(str(folder)).model.parameters())

    def test_scores_are_its_logits(self, base, tmp_path):
        folder = save_tiny_base(tmp_path / "small", seed=3, hidden_size=16)
        loaded = load(folder, base, dtype="float64")
        tokens = np.array([[5, 6, 7], [8, 9, 10]])
        hidden = loaded.read(loaded.new_cache(2), tokens, np.array([[-1, 0, 1]] * 2))
        asked = np.random.default_rng(0).integers(0, 257, (2, 4))
        logits, _ = loaded.model.forward(torch.from_numpy(tokens))
        np.testing.assert_allclose(loaded.score(hidden, asked), np.take_along_axis(logits.numpy(), asked[:, None], -1))


class TestRefusals:
    def test_a_shipped_size_that_is_not_there_says_what_trains_it(self, monkeypatch, tmp_path):
        monkeypatch.setattr(neural, "SHIPPED", tmp_path)
        message = refused(lambda: find_neural("neural-61m"))
        assert "no weights of neural-61m for smollm2-135m" in message
        assert "rescore train-rescorer neural-61m --corpus" in message and "--rescorer neural:DIR" in message

    def test_a_shipped_size_that_is_there(self, monkeypatch, tmp_path, base, tuned):
        monkeypatch.setattr(neural, "SHIPPED", tmp_path)
        save_delta(tuned.model, names_of(tuned), config_for(base), tmp_path / "smollm2-135m" / "neural-32m")
        source = find_neural("neural-32m")
        assert source.name == "neural-32m" and source.delta == config_for(base)

    def test_no_such_folder_or_an_empty_one(self, tmp_path):
        refused(lambda: find_neural(str(tmp_path / "none")))
        (tmp_path / "empty").mkdir()
        assert "has no config.json" in refused(lambda: find_neural(str(tmp_path / "empty")))

    @pytest.mark.parametrize(
        ("content", "message"),
        [("{", "is not valid JSON"), ("[]", "is not a JSON object"),
         ('{"kind": "delta"}', "missing required field `size`"),
         ('{"kind": "delta", "colour": 1}', "contains unknown field `colour`")],
    )  # fmt: skip
    def test_a_broken_configuration(self, delta, content, message):
        (delta / "config.json").write_text(content)
        said = refused(lambda: find_neural(str(delta)), InvalidDataError)
        assert message in said and str(delta) in said and "__init__" not in said

    def test_another_tokenizer(self, base, tmp_path):
        folder = save_tiny_base(tmp_path / "small", seed=3, hidden_size=16)
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["<|more|>"])
        tokenizer.save_pretrained(folder)
        source = find_neural(str(folder))
        message = refused(lambda: check_fits(source, base.identity), IncompatibleError)
        assert "the tokenizer it was made for" in message and "rescore train-rescorer" in message

    def test_a_delta_for_another_tokenizer(self, base, tuned, tmp_path):
        save_delta(tuned.model, names_of(tuned), config_for(base, tokenizer_sha256="0" * 64), tmp_path)
        source = find_neural(str(tmp_path))
        message = refused(lambda: check_fits(source, base.identity), IncompatibleError)
        assert "the tokenizer of" in message

    def test_a_delta_for_another_base(self, delta, tmp_path):
        other = load_base(str(save_tiny_base(tmp_path / "other", seed=9)))
        source = find_neural(str(delta))
        message = refused(lambda: check_fits(source, other.identity), IncompatibleError)
        assert "needs the weights of" in message and f"{other.identity.name} has others" in message

    @pytest.mark.parametrize("keep", [0, 5, 100, -1, -1000])
    def test_truncated_weights(self, base, delta, keep):
        path = delta / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        message = refused(lambda: load(delta, base), InvalidDataError)
        assert f"can't read {path}" in message and "train the rescorer again" in message

    def test_corrupt_weights(self, base, delta):
        path = delta / "model.safetensors"
        path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
        assert f"can't read {path}" in refused(lambda: load(delta, base), InvalidDataError)

    def test_no_weights(self, base, delta):
        (delta / "model.safetensors").unlink()
        assert "no rescorer weights in" in refused(lambda: find_neural(str(delta)))

    @pytest.mark.parametrize("change", ["another shape", "another name", "scale of another shape", "no scale"])
    def test_tensors_that_do_not_fit(self, base, delta, change):
        path = delta / "model.safetensors"
        tensors = load_file(path)
        name = "model.layers.0.mlp.up_proj.weight"
        if change == "another shape":
            tensors[name] = tensors[name][:, :-1].contiguous()
        elif change == "another name":
            tensors[name.replace("0", "7")] = tensors.pop(name)
        elif change == "no scale":
            del tensors[name + SCALE]
        else:
            tensors[name + SCALE] = tensors[name + SCALE][:-1].contiguous()
        save_file(tensors, path)
        message = refused(lambda: load(delta, base), InvalidDataError)
        assert str(path) in message

    @pytest.mark.parametrize(
        ("layers", "said"),
        [
            (2, 'write their numbers instead of 2: "layers": [0, 1, ...] up to 1'),
            ([], "has layers = []"), ([1, 0], "has layers = [1, 0]"), ([-1, 1], "has layers = [-1, 1]"),
        ],
    )  # fmt: skip
    def test_layers_that_are_none(self, base, tuned, tmp_path, layers, said):
        save_delta(tuned.model, names_of(tuned), config_for(base, layers=(0, 1)), tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "layers": layers}))
        assert said in refused(lambda: load(tmp_path, base), InvalidDataError)

    def test_more_layers_than_the_base_has(self, base, tuned, tmp_path):
        save_delta(tuned.model, names_of(tuned), config_for(base, layers=tuple(range(5))), tmp_path)
        assert "has 2 layers, and layer 4 of it is asked for" in refused(lambda: load(tmp_path, base))

    def test_a_vocabulary_that_is_too_small(self, base, tmp_path):
        source = find_neural(str(save_tiny_base(tmp_path / "small", seed=3, hidden_size=16)))
        message = refused(
            lambda: load_neural(source, vocab_size=300, base_name="the base"), IncompatibleError
        )  # fmt: skip
        assert "knows 257 tokens, the base has 300" in message and "rescore train-rescorer" in message

    def test_a_model_without_tree_attention(self, base, tmp_path, monkeypatch):
        source = find_neural(str(save_tiny_base(tmp_path / "small", seed=3, hidden_size=16)))
        monkeypatch.setattr("lm.base.probe.Probe._follows_tree", lambda *_: False)
        message = refused(
            lambda: load_neural(source, vocab_size=257, base_name="the base"), IncompatibleError
        )  # fmt: skip
        assert "takes no tree mask" in message

    def test_pickled_weights(self, base, tmp_path):
        folder = save_tiny_base(tmp_path / "small", seed=3, hidden_size=16)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        assert "only safetensors are read here" in refused(lambda: load(folder, base), InvalidDataError)
