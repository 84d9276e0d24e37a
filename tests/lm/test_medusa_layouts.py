"""Medusa heads that others wrote, read as they are: every layout gives what its formula says, and what breaks one is
refused."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from conftest import make_heads, refused, save_tiny_base
from hypothesis import given, settings
from hypothesis import strategies as st
from medusa_files import FILES, LAYOUTS, changed, made, mapped, tensors_of, write
from safetensors.torch import load_file, save_file

from lattices.errors import IncompatibleError, InvalidDataError
from lm.base.catalog import load_base
from lm.heads import block_heads
from lm.heads.block_heads import (
    BlockHeads,
    entropies_of,
    heads_sha256,
    known_heads,
    lattice_of,
    load_heads,
    of_other_weights,
    read_config,
)
from lm.heads.layouts.medusa import find_medusa

few = settings(deadline=None, derandomize=True, max_examples=25)


@pytest.fixture
def states(tiny_base) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states `[n, d]` and logits `[n, vocab]` of the tiny base LM."""
    logits, hidden = tiny_base.forward(torch.tensor([list(range(20))]))
    return hidden[0], logits[0]


@pytest.fixture
def notices(monkeypatch) -> list[str]:
    """What is told while heads are loaded."""
    lines: list[str] = []
    monkeypatch.setattr(block_heads, "_told", set())
    monkeypatch.setattr(block_heads, "warn", lines.append)
    return lines


def same(heads: BlockHeads, theirs, tiny_base, states) -> None:
    """Their logits are those of the formula, slot 1 the base's."""
    hidden, first = states
    said = heads.slots(tiny_base, hidden, first)[0].logits
    torch.testing.assert_close(said[:, 0], first)
    expected = theirs.logits(hidden, tiny_base.output_embeddings.weight)
    torch.testing.assert_close(said[:, 1:], expected, rtol=1e-9, atol=1e-9)


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(("heads", "layers", "bias"), [(3, 1, True), (2, 2, False), (1, 1, True), (5, 0, False)])
    def test_each_gives_its_formula(self, tiny_base, tmp_path, states, layout, heads, layers, bias):
        theirs = made(heads=heads, layers=layers, bias=bias)
        folder = write(tmp_path / "theirs", theirs, layout)
        loaded = load_heads(tiny_base, str(folder))
        assert (loaded.h, loaded.config.blocks, loaded.config.vocab_size) == (heads + 1, layers, 257)
        assert find_medusa(folder).layout.name == layout
        same(loaded, theirs, tiny_base, states)

    @few
    @given(
        layout=st.sampled_from(sorted(LAYOUTS)), heads=st.integers(1, 4), layers=st.integers(1, 3), bias=st.booleans(),
        of_base=st.booleans(), pickled=st.booleans(), seed=st.integers(0, 99),
    )  # fmt: skip
    def test_any_shape(self, tiny_base, tmp_path_factory, layout, heads, layers, bias, of_base, pickled, seed):
        theirs = made(heads=heads, layers=layers, bias=bias, projections=0 if of_base else None, seed=seed)
        folder = tmp_path_factory.mktemp("theirs")
        file = folder / ("heads.pt" if pickled else "heads.safetensors")
        write(folder, theirs, layout, file=file.name)
        hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        same(load_heads(tiny_base, str(file)), theirs, tiny_base, (hidden, tiny_base.project(hidden)))

    @pytest.mark.parametrize("layout", ["medusa-1", "vllm"])
    def test_without_projections_it_is_the_bases(self, tiny_base, tmp_path, states, notices, layout):
        theirs = made(projections=0)
        loaded = load_heads(tiny_base, str(write(tmp_path, theirs, layout)))
        assert loaded.projection is None and loaded.config.vocab_size is None
        same(loaded, theirs, tiny_base, states)
        assert any("checked by hidden size 32 alone" in line for line in notices)

    @pytest.mark.parametrize("name", ["lm_heads.0.weight", "lm_head.weight"])
    def test_one_projection_for_all(self, tiny_base, tmp_path, states, name):
        theirs = made(projections=1)
        folder = write(tmp_path, theirs, "vllm")
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors.pop("lm_heads.0.weight")
        save_file(tensors, folder / "model.safetensors")
        loaded = load_heads(tiny_base, str(folder))
        assert loaded.config.own_projection.shared and len(loaded.projection.weight) == 1
        same(loaded, theirs, tiny_base, states)

    def test_a_logit_scale(self, tiny_base, tmp_path, states):
        theirs = made()
        loaded = load_heads(tiny_base, str(write(tmp_path, theirs, "vllm", config={"logit_scale": 0.25})))
        said = loaded.slots(tiny_base, *states)[0].logits[:, 1:]
        torch.testing.assert_close(said, 0.25 * theirs.logits(states[0], tiny_base.output_embeddings.weight))

    def test_when_the_vocabulary_is_as_large_as_a_state(self, tmp_path):
        folder = write(tmp_path, made(d=32, vocabulary=32))
        assert read_config(folder).own_projection.rows == 32 == read_config(folder).hidden_size

    def test_heads_cut_to_a_smaller_block(self, tiny_base, tmp_path, states):
        hidden, first = states
        loaded = load_heads(tiny_base, str(write(tmp_path, made(heads=4))))
        cut = loaded.first(3)
        torch.testing.assert_close(
            cut.slots(tiny_base, hidden, first)[0].logits, loaded.slots(tiny_base, hidden, first)[0].logits[:, :3]
        )
        assert cut.projection.weight.data_ptr() == loaded.projection.weight.data_ptr()

    def test_heads_of_an_eagle_draft_are_refused(self, tmp_path):
        save_file(
            {"parallel_draft_heads.0.medusa_layers.0.linear.weight": torch.zeros(4, 4)}, tmp_path / "x.safetensors"
        )
        assert "EAGLE" in refused(lambda: find_medusa(tmp_path / "x.safetensors"), InvalidDataError)


class TestTruncatedVocabulary:
    @pytest.mark.parametrize("cut", [True, False], ids=["rows of the map", "all rows"])
    @pytest.mark.parametrize("projections", [None, 1])
    def test_other_tokens_are_never_proposed(self, tiny_base, tmp_path, states, cut, projections):
        whole = made(projections=projections)
        ids = [200, 3, 7, 9, 100, 256]
        theirs = mapped(whole, ids)
        written = theirs if cut else dataclasses.replace(theirs, projections=whole.projections)
        loaded = load_heads(tiny_base, str(write(tmp_path, written, "vllm")))
        assert loaded.config.own_projection.rows == 6 and loaded.config.vocab_size == (None if cut else 257)
        hidden, first = states
        said = loaded.slots(tiny_base, hidden, first)[0].logits
        expected = theirs.logits(hidden, tiny_base.output_embeddings.weight)
        torch.testing.assert_close(said[:, 1:], expected, rtol=1e-9, atol=1e-9)
        lattice = lattice_of(said, 6)
        lattice.validate(257)
        assert set(lattice.token_ids[:, 1:].ravel()) == set(ids) and np.isfinite(entropies_of(said)).all()
        assert "choose --k from 1 to 6" in refused(lambda: loaded.lattice(tiny_base, hidden, first, 7))

    @pytest.mark.parametrize("ids", [[1, 1, 2], [0, 5, -1]])
    def test_a_map_that_is_none(self, tiny_base, tmp_path, ids):
        folder = write(tmp_path, mapped(made(), [1, 2, 3]), "vllm")
        changed(folder / "model.safetensors", token_map=torch.tensor(ids))
        assert "no list of different token ids" in refused(lambda: load_heads(tiny_base, str(folder)), InvalidDataError)

    def test_a_map_beyond_the_base(self, tiny_base, tmp_path):
        folder = write(tmp_path, mapped(made(), [1, 2, 3]), "vllm")
        changed(folder / "model.safetensors", token_map=torch.tensor([1, 2, 257]))
        assert "beyond the 257 tokens" in refused(lambda: load_heads(tiny_base, str(folder)), IncompatibleError)

    def test_a_map_of_more_tokens_than_rows(self, tmp_path):
        folder = write(tmp_path, mapped(made(), [1, 2, 3]), "vllm")
        changed(folder / "model.safetensors", token_map=torch.arange(4))
        assert "token_map of 4 tokens for 3 rows" in refused(lambda: find_medusa(folder), InvalidDataError)


class TestWithTheirBase:
    def test_the_heads_in_a_models_folder_are_its_own(self, tmp_path, notices):
        folder = save_tiny_base(tmp_path / "whole")
        theirs = made()
        weights = load_file(folder / "model.safetensors")
        write(folder, theirs, "medusa-2", beside=weights)
        base = load_base(str(folder), dtype="float64", device="cpu")
        assert known_heads(str(folder)) == folder
        heads = load_heads(base)
        _, hidden = base.forward(torch.tensor([[1, 2, 3]]))
        same(heads, theirs, base, (hidden[0], base.project(hidden[0])))
        assert of_other_weights(None, base.identity) is None
        other = dataclasses.replace(base.identity, weights_sha256="0" * 64)
        assert "other weights" in of_other_weights(str(folder), other)

    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    def test_shards(self, tiny_base, tmp_path, states, kind):
        theirs = made(heads=2)
        tensors = tensors_of(theirs, *LAYOUTS["medusa-2"])
        names = sorted(tensors)
        stem = "model" if kind == "safetensors" else "pytorch_model"
        shards = {f"{stem}-0000{i}-of-00003.{kind}": names[i - 1 :: 2] for i in (1, 2)}
        base_shard = f"{stem}-00003-of-00003.{kind}"  # is not even looked at
        where = {name: file for file, held in shards.items() for name in held} | {"model.norm.weight": base_shard}
        (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": where}))
        for file, held in shards.items():
            part = {name: tensors[name] for name in held}
            save_file(part, tmp_path / file) if kind == "safetensors" else torch.save(part, tmp_path / file)
        if kind == "safetensors":
            save_file({"model.norm.weight": torch.ones(32)}, tmp_path / base_shard)
        same(load_heads(tiny_base, str(tmp_path)), theirs, tiny_base, states)
        (tmp_path / next(iter(shards))).unlink()
        assert next(iter(shards)) in refused(lambda: find_medusa(tmp_path))


class TestNumbers:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("file", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
    def test_precisions(self, tiny_base, tmp_path, states, dtype, file):
        theirs = made(dtype=dtype)
        loaded = load_heads(tiny_base, str(write(tmp_path, theirs, file=file)))
        same(loaded, theirs, tiny_base, states)
        half = dataclasses.replace(tiny_base.identity, dtype="bfloat16")
        loaded = load_heads(half, str(tmp_path))
        assert loaded.dtype == torch.float32 and loaded.projection.weight.dtype == torch.bfloat16

    def test_int8_with_its_scales(self, tiny_base, tmp_path, states):
        theirs = made(projections=0, bias=False)
        stored: dict[str, torch.Tensor] = {}
        for head, (weight,) in enumerate(theirs.weights):
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            stored[f"{head}.0.linear.weight"] = (weight / scale).round().to(torch.int8)
            stored[f"{head}.0.linear.weight.scale"] = scale
            theirs.weights[head][0] = stored[f"{head}.0.linear.weight"].float() * scale
        save_file(stored, tmp_path / FILES["medusa-1"])
        same(load_heads(tiny_base, str(tmp_path)), theirs, tiny_base, states)
        del stored["1.0.linear.weight.scale"]
        save_file(stored, tmp_path / FILES["medusa-1"])
        assert "no scale that fits 1.0.linear" in refused(
            lambda: load_heads(tiny_base, str(tmp_path)), InvalidDataError
        )

    def test_whole_numbers_are_refused(self, tiny_base, tmp_path):
        folder = write(tmp_path, made())
        changed(folder / FILES["medusa-1"], at__0__0__linear__weight=torch.zeros(32, 32, dtype=torch.int32))
        assert "as int32" in refused(lambda: load_heads(tiny_base, str(folder)), InvalidDataError)

    def test_the_hash_follows_the_file(self, tmp_path):
        hashes = [heads_sha256(write(tmp_path / str(n), made(seed=seed))) for n, seed in enumerate((0, 0, 1))]
        assert hashes[0] == hashes[1] != hashes[2]


class TestNotices:
    def test_blocks_that_are_one_block(self, tiny_base, tmp_path, notices):
        theirs = made(heads=2, layers=3)
        for weights, biases in zip(theirs.weights, theirs.biases, strict=True):
            weights[:], biases[:] = [weights[0]] * 3, [biases[0]] * 3
        tensors = {name: value.clone() for name, value in tensors_of(theirs, *LAYOUTS["medusa-1"]).items()}
        save_file(tensors, tmp_path / FILES["medusa-1"])
        load_heads(tiny_base, str(tmp_path))
        assert sum("3 blocks of each head" in line for line in notices) == 1
        load_heads(tiny_base, str(tmp_path))
        assert len(notices) == len(set(notices)) == 2  # that one, and what could not be checked

    @pytest.mark.parametrize(
        ("layout", "config", "said"),
        [
            (
                "medusa-1",
                {"medusa_num_heads": 2, "medusa_num_layers": 1},
                ["medusa_num_heads = 2, and there are 3 heads"],
            ),
            ("medusa-1", {"medusa_num_heads": 3, "medusa_num_layers": 2}, ["medusa_num_layers = 2"]),
            ("medusa-2", {"num_hidden_layers": 32, "medusa_num_heads": 3}, []),
            ("modelopt", {"medusa": {"num_medusa_heads": 4, "num_medusa_layers": 1}}, ["num_medusa_heads = 4"]),
            ("tensorrt-llm", {"pretrained_config": {"num_medusa_heads": 3}}, []),
            ("vllm", {"num_heads": 5, "num_hidden_layers": 1, "medusa_fc_bias": True}, ["num_heads = 5"]),
            ("vllm", {"num_heads": 3, "num_hidden_layers": 1}, ["vLLM would drop their biases"]),
        ],
    )
    def test_a_configuration_that_says_otherwise(self, tiny_base, tmp_path, notices, layout, config, said):
        loaded = load_heads(tiny_base, str(write(tmp_path, made(), layout, config=config)))
        assert loaded.h == 4
        assert len(notices) == len(said) + 1 and all(any(text in line for line in notices) for text in said)
        assert "hidden size 32 and 257 tokens alone" in notices[-1]


class Evil:
    def __reduce__(self):
        return print, ("run",)


class TestRefused:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_missing_head_or_tensor(self, tmp_path, layout):
        folder = write(tmp_path, made(), layout)
        path = folder / FILES[layout]
        whole = load_file(path)
        block, own = LAYOUTS[layout]
        for names, said in (
            ([block.replace("%p", part) for part in ("weight", "bias")] + [own], "a head 2, but no head 1"),
            ([block.replace("%p", "weight")], "lacks"),
            ([block.replace("%p", "bias")], "lacks"),
            ([own], "lacks"),
        ):
            gone = [name.replace("%h", "1").replace("%l", "0").replace("%n", "1") for name in names]
            save_file({name: value for name, value in whole.items() if name not in gone}, path)
            assert said in refused(lambda: find_medusa(folder), InvalidDataError)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_wrong_shapes(self, tmp_path, layout):
        folder = write(tmp_path, made(), layout)
        block, own = (name.replace("%h", "1").replace("%l", "0").replace("%n", "1") for name in LAYOUTS[layout])
        for name, value in (
            (block.replace("%p", "weight"), torch.zeros(32, 31)), (block.replace("%p", "bias"), torch.zeros(31)),
            (own, torch.zeros(256, 32)), (block.replace("%p", "weight"), torch.zeros(())),
        ):  # fmt: skip
            whole = load_file(folder / FILES[layout])
            save_file({**whole, name: value}, folder / "broken.safetensors")
            said = refused(lambda: find_medusa(folder / "broken.safetensors"), InvalidDataError)
            assert f"{name} of shape {list(value.shape)}, not" in said

    @pytest.mark.parametrize("name", ["0.1.bias", "0.2.weight", "x", "0.0.other.weight", "lm_head.bias"])
    def test_tensors_too_many(self, tmp_path, name):
        folder = write(tmp_path, made())
        whole = load_file(folder / FILES["medusa-1"])
        save_file({**whole, name: torch.zeros(1)}, folder / FILES["medusa-1"])
        assert f"holds {name}" in refused(lambda: find_medusa(folder), InvalidDataError)

    def test_two_files_that_may_differ(self, tiny_base, tmp_path, states):
        theirs = made()
        write(tmp_path, theirs, file="medusa_lm_head.pt")
        write(tmp_path, made(seed=1), file="medusa_lm_head.safetensors")
        assert "give one of them: --heads" in refused(lambda: find_medusa(tmp_path))
        same(load_heads(tiny_base, str(tmp_path / "medusa_lm_head.pt")), theirs, tiny_base, states)

    def test_ranks(self, tmp_path):
        write(tmp_path, made(), "tensorrt-llm")
        write(tmp_path, made(), "tensorrt-llm", file="rank1.safetensors")
        assert "cut into 2 ranks" in refused(lambda: find_medusa(tmp_path), InvalidDataError)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_pickle_with_code(self, tmp_path, capsys, zipped):
        path = tmp_path / "medusa_lm_head.pt"
        tensors = {"0.0.linear.weight": torch.zeros(4, 4), "x": Evil()}
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        assert "more than tensors" in refused(lambda: find_medusa(tmp_path), InvalidDataError)
        path.write_bytes(pickle.dumps(Evil()))
        refused(lambda: find_medusa(tmp_path), InvalidDataError)
        assert capsys.readouterr().out == ""

    def test_a_pickle_in_the_old_format(self, tiny_base, tmp_path, states):
        theirs = made()
        torch.save(
            tensors_of(theirs, *LAYOUTS["medusa-1"]),
            tmp_path / "medusa_lm_head.pt",
            _use_new_zipfile_serialization=False,
        )
        same(load_heads(tiny_base, str(tmp_path)), theirs, tiny_base, states)

    @pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state": {"0.0.linear.weight": torch.zeros(2, 2)}}])
    def test_a_pickle_of_something_else(self, tmp_path, content):
        torch.save(content, tmp_path / "medusa_lm_head.pt")
        assert "no state dict" in refused(lambda: find_medusa(tmp_path), InvalidDataError)

    @pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "model.safetensors"])
    @pytest.mark.parametrize("keep", [0, 9, -20])
    def test_a_file_cut_short(self, tiny_base, tmp_path, file, keep):
        layout = "vllm" if file == "model.safetensors" else "medusa-1"
        path = write(tmp_path, made(), layout, file=file) / file
        path.write_bytes(path.read_bytes()[:keep])
        refused(lambda: load_heads(tiny_base, str(tmp_path)))

    def test_a_file_of_something_else(self, tmp_path):
        save_file({"layer.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
        assert "its first tensor is layer.weight" in refused(lambda: find_medusa(tmp_path / "x.safetensors"))
        (tmp_path / "heads.txt").write_text("")
        assert "no folder of heads" in refused(lambda: find_medusa(tmp_path / "heads.txt"))

    def test_an_empty_folder(self, tiny_base, tmp_path):
        assert "no block heads in" in refused(lambda: load_heads(tiny_base, str(tmp_path)))

    @pytest.mark.parametrize(
        ("d", "vocabulary", "field"), [(16, 257, "hidden_size is 16"), (32, 300, "vocab_size is 300")]
    )
    def test_another_base(self, tiny_base, tmp_path, d, vocabulary, field):
        config = {"base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
        folder = write(tmp_path, made(d=d, vocabulary=vocabulary), config=config)
        message = refused(lambda: load_heads(tiny_base, str(folder)), IncompatibleError)
        assert field in message and "made for lmsys/vicuna-7b-v1.3" in message


class TestOurOwn:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
    @pytest.mark.parametrize("projections", [0, 1, None])
    def test_projections_are_saved_with_them(self, tiny_base, tmp_path, states, projections, dtype):
        theirs = mapped(made(projections=projections), [5, 6, 9]) if projections != 0 else made(projections=0)
        loaded = load_heads(tiny_base, str(write(tmp_path / "theirs", theirs, "vllm")))
        loaded.save(tmp_path / "ours", dtype=dtype)
        again = load_heads(tiny_base, str(tmp_path / "ours"))
        assert again.config == loaded.config
        said, expected = (heads.slots(tiny_base, *states)[0].logits for heads in (again, loaded))
        torch.testing.assert_close(said, expected, rtol=1e-6, atol=1e-9 if dtype == torch.float32 else 0.2)

    def test_a_configuration_without_them_keeps_its_key(self, tiny_base):
        """A trace that was recorded by an earlier version is found again."""
        from lm.keys import key_of

        config = make_heads(tiny_base).config
        names = (
            "h", "hidden_size", "inner_size", "vocab_size", "base_name", "tokenizer_sha256", "architecture",
            "token_size", "blocks", "base_weights_sha256",
        )  # fmt: skip
        assert config.sha256 == key_of({name: getattr(config, name) for name in names})
