"""Block heads: from states to lattices, cut to smaller blocks, on disk and back; ties go to the lowest token id."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from conftest import make_heads, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file

from lattices.errors import IncompatibleError, InvalidDataError, OutputError, UnknownNameError
from lm.files import FETCH
from lm.heads import block_heads
from lm.heads.block_heads import (
    BlockHeads,
    entropies_of,
    heads_folder,
    heads_sha256,
    known_heads,
    lattice_of,
    load_heads,
    of_other_weights,
    read_config,
    top_k_lowest_ids,
)

exhaustive = settings(deadline=None, derandomize=True, max_examples=100)


@pytest.fixture
def folder(tiny_base, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    make_heads(tiny_base).save(tmp_path / "heads")
    return tmp_path / "heads"


@pytest.fixture
def states(tiny_base) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states `[n, d]` and logits `[n, vocab]` of the tiny base LM."""
    logits, hidden = tiny_base.forward(torch.tensor([list(range(20))]))
    return hidden[0], logits[0]


class TestLattice:
    def test_fresh_heads_are_head_1(self, tiny_base, states):
        hidden, logits = states
        fresh = BlockHeads(make_heads(tiny_base, h=5).config).double().requires_grad_(False)
        for output in fresh(hidden, hidden[:, None]):
            torch.testing.assert_close(output, hidden)
        every = fresh.slots(tiny_base, hidden, logits)[0].logits
        lattice, entropies = lattice_of(every, 7), entropies_of(every)
        for slot in range(1, 5):
            np.testing.assert_array_equal(lattice.token_ids[:, slot], lattice.token_ids[:, 0])
            np.testing.assert_allclose(lattice.logps[:, slot], lattice.logps[:, 0], rtol=1e-6)
            np.testing.assert_allclose(entropies[:, slot], entropies[:, 0], rtol=1e-5)

    @pytest.mark.parametrize("k", [1, 6, 257])
    def test_it_is_the_top_of_the_log_softmax(self, tiny_base, states, k):
        hidden, logits = states
        heads = make_heads(tiny_base, h=4)
        every = heads.slots(tiny_base, hidden, logits)[0].logits
        lattice, entropies = lattice_of(every, k), entropies_of(every)
        lattice.validate(tiny_base.vocab_size)
        assert lattice.token_ids.shape == (20, 4, k) and entropies.shape == (20, 4)
        assert lattice.token_ids.dtype == np.int32 and entropies.dtype == np.float32
        rows = tiny_base.output_embeddings.weight[logits.argmax(-1)]
        outputs = torch.stack([hidden, *heads(hidden, rows[:, None])], dim=1)  # [n, h, d]
        logps = torch.log_softmax(tiny_base.project(outputs), dim=-1)
        best = logps.topk(k, dim=-1)
        np.testing.assert_array_equal(lattice.token_ids, best.indices.numpy())
        np.testing.assert_allclose(lattice.logps, best.values.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(entropies, -(logps.exp() * logps).sum(-1).numpy(), rtol=1e-4, atol=1e-6)

    def test_heads_see_the_token_that_head_1_chose(self, tiny_base, states):
        hidden, logits = states
        heads = make_heads(tiny_base)
        chosen = heads.slots(tiny_base, hidden, logits, logits.argmax(-1))[0].logits
        torch.testing.assert_close(chosen, heads.slots(tiny_base, hidden, logits)[0].logits)
        other = heads.slots(tiny_base, hidden, logits, torch.zeros(20, dtype=torch.long))[0].logits
        assert not torch.allclose(other[:, 1:], chosen[:, 1:]) and torch.equal(other[:, 0], chosen[:, 0])
        blind = BlockHeads(msgspec.structs.replace(heads.config, token_size=0)).double().requires_grad_(False)
        zero = torch.zeros(20, dtype=torch.long)
        torch.testing.assert_close(
            blind.slots(tiny_base, hidden, logits, zero)[0].logits, blind.slots(tiny_base, hidden, logits)[0].logits
        )

    def test_slot_1_is_the_logits_as_given(self, tiny_base, states):
        hidden, logits = states
        lattice = make_heads(tiny_base).lattice(tiny_base, hidden, logits.flip(-1), 3)
        np.testing.assert_array_equal(lattice.token_ids[:, 0], logits.flip(-1).topk(3).indices.numpy())

    def test_a_certain_head_has_log_probability_0_and_no_entropy(self, tiny_base, states):
        hidden, _ = states
        certain = torch.full((20, 257), -1e4, dtype=torch.float64)
        certain[:, 5] = 0
        every = make_heads(tiny_base).slots(tiny_base, hidden, certain)[0].logits
        lattice, entropies = lattice_of(every, 2), entropies_of(every)
        assert (lattice.token_ids[:, 0, 0] == 5).all() and (lattice.logps[:, 0, 0] == 0).all()
        np.testing.assert_allclose(entropies[:, 0], 0, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_summed_in_float32(self, tiny_base, states, dtype, monkeypatch):
        hidden, logits = (x.to(dtype) for x in states)
        monkeypatch.setattr(tiny_base, "project", lambda x: (x.float() @ torch.ones(32, 257)).to(dtype))
        every = make_heads(tiny_base).float().slots(tiny_base, hidden, logits)[0].logits
        lattice, entropies = lattice_of(every, 4), entropies_of(every)
        lattice.validate(257)
        expected = torch.log_softmax(logits.float(), -1).max(-1).values
        np.testing.assert_allclose(lattice.logps[:, 0, 0], expected.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(entropies[:, 1], np.log(257), rtol=1e-5)  # all tokens alike

    @pytest.mark.parametrize("k", [0, -1, 258])
    def test_a_k_outside_the_vocabulary_is_refused(self, tiny_base, states, k):
        assert f"k = {k}" in refused(lambda: make_heads(tiny_base).lattice(tiny_base, *states, k))


class TestFirst:
    def test_heads_do_not_depend_on_later_ones(self, tiny_base, states):
        hidden, logits = states
        heads = make_heads(tiny_base, h=5)
        for h in range(2, 6):
            cut = heads.first(h)
            assert cut.h == cut.config.h == h
            torch.testing.assert_close(cut(hidden, hidden[:, None]), heads(hidden, hidden[:, None])[: h - 1])
            whole = heads.lattice(tiny_base, hidden, logits, 3)
            np.testing.assert_array_equal(cut.lattice(tiny_base, hidden, logits, 3).token_ids, whole.token_ids[:, :h])

    def test_chosen_heads_only(self, tiny_base, states):
        heads = make_heads(tiny_base, h=5)
        torch.testing.assert_close(
            heads(states[0], states[0][:, None], [1, 3]), heads(states[0], states[0][:, None])[[1, 3]]
        )

    @pytest.mark.parametrize("h", [1, 0, 6])
    def test_a_block_that_they_do_not_propose_is_refused(self, tiny_base, h):
        assert "choose h from 2 to 5" in refused(lambda: make_heads(tiny_base, h=5).first(h))


class TestTopK:
    @exhaustive
    @given(
        logits=arrays.arrays(
            np.float32,
            arrays.array_shapes(min_dims=1, max_dims=3, max_side=12),
            elements=st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.5, -np.inf]) | st.floats(-3, 3, width=16),
        ),
        data=st.data(),
    )
    def test_the_lowest_ids_win_ties(self, logits: np.ndarray, data: st.DataObject):
        k = data.draw(st.integers(1, logits.shape[-1]))
        values, ids = top_k_lowest_ids(torch.from_numpy(logits), k)
        expected = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
        np.testing.assert_array_equal(ids.numpy(), expected)
        np.testing.assert_array_equal(values.numpy(), np.take_along_axis(logits, expected, -1))

    @exhaustive
    @given(
        levels=st.sampled_from([1, 2, 3, 40, 300]),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        k=st.sampled_from([1, 5, 40, 1999, 2000]),
        seed=st.integers(0, 99),
    )
    def test_in_a_large_vocabulary_full_of_ties_too(self, levels, dtype, k, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = (torch.randint(0, levels, (2, 3, 2000), generator=generator) - levels // 2).to(dtype)
        logits[logits == 0] *= torch.where(torch.rand(int((logits == 0).sum()), generator=generator) < 0.5, -1, 1)
        expected = np.argsort(-logits.double().numpy(), axis=-1, kind="stable")[..., :k]
        values, ids = top_k_lowest_ids(logits, k)
        np.testing.assert_array_equal(ids.numpy(), expected)
        assert torch.equal(values, logits.gather(-1, torch.from_numpy(expected)))

    @exhaustive
    @given(data=st.data(), seed=st.integers(0, 99), size=st.integers(1, 20))
    def test_of_some_tokens_in_any_order(self, data: st.DataObject, seed: int, size: int):
        rng = np.random.default_rng(seed)
        token_ids = rng.permutation(100)[:size]
        k = data.draw(st.integers(1, size))
        logits = rng.integers(3, size=(4, size)).astype(np.float32)
        values, ids = top_k_lowest_ids(torch.from_numpy(logits), k, torch.from_numpy(token_ids))
        expected = np.stack([np.lexsort((token_ids, -row))[:k] for row in logits])
        np.testing.assert_array_equal(ids.numpy(), token_ids[expected])
        np.testing.assert_array_equal(values.numpy(), np.take_along_axis(logits, expected, -1))

    def test_ties_do_not_sort_the_vocabulary(self, monkeypatch: pytest.MonkeyPatch):
        """In half precision almost every lattice has some."""
        sort, sorted_sizes = torch.Tensor.sort, []

        def spy(tensor: torch.Tensor, *arguments: object, **options: object) -> object:
            sorted_sizes.append(tensor.shape[-1])
            return sort(tensor, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, "sort", spy)
        monkeypatch.setattr(torch, "sort", spy)
        logits = torch.randn(4, 9, 20_000, generator=torch.Generator().manual_seed(0)).mul(3).bfloat16().float()
        top = top_k_lowest_ids(logits, 16)[0]
        assert bool((top[..., 1:] == top[..., :-1]).any()) and max(sorted_sizes) <= 17 * 4**2


class TestFiles:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
    def test_what_is_saved_is_loaded(self, tiny_base, tmp_path, states, dtype, tolerance):
        heads = make_heads(tiny_base, h=3)
        heads.save(tmp_path / "new" / "heads", dtype=dtype)
        loaded = load_heads(tiny_base.identity, str(tmp_path / "new" / "heads"), dtype=torch.float64)
        assert loaded.config == heads.config
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        both = states[0], states[0][:, None]
        torch.testing.assert_close(loaded(*both), heads(*both), rtol=tolerance, atol=10 * tolerance)
        assert sorted(p.name for p in (tmp_path / "new" / "heads").iterdir()) == ["config.json", "model.safetensors"]
        tensors = load_file(tmp_path / "new" / "heads" / "model.safetensors")
        assert {name: tuple(t.shape) for name, t in tensors.items()} == {
            "inner.weight": (2, 32, 16), "inner.bias": (2, 16), "outer.weight": (2, 16, 32), "outer.bias": (2, 32),
            "token.shared": (32, 8), "token.weight": (2, 8, 16),
        }  # fmt: skip
        assert {t.dtype for t in tensors.values()} == {dtype}

    def test_the_weights_hash_follows_the_weights(self, tiny_base, tmp_path):
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            make_heads(tiny_base, seed=seed).save(tmp_path / name)
        a, b, c = (heads_sha256(tmp_path / name) for name in "abc")
        assert a == b != c

    def test_a_place_that_cannot_be_written_is_one_line(self, tiny_base, tmp_path):
        (tmp_path / "file").write_text("")
        (tmp_path / "heads" / "model.safetensors").mkdir(parents=True)
        for place in (tmp_path / "file", tmp_path / "heads"):
            assert "can't write" in refused(lambda place=place: make_heads(tiny_base).save(place), OutputError)
        assert [p.name for p in (tmp_path / "heads").iterdir()] == ["model.safetensors"]

    @pytest.mark.parametrize(
        ("field", "value"), [("hidden_size", 33), ("vocab_size", 300), ("tokenizer_sha256", "0" * 64)]
    )
    def test_heads_of_another_base_are_refused(self, tiny_base, folder, field, value):
        identity = dataclasses.replace(tiny_base.identity, name="other", **{field: value})
        message = refused(lambda: load_heads(identity, str(folder)), IncompatibleError)
        assert field in message and "not for other" in message

    def test_another_name_or_precision_of_the_base_is_no_matter(self, tiny_base, folder):
        load_heads(dataclasses.replace(tiny_base.identity, name="other", dtype="bfloat16"), str(folder))

    @pytest.mark.parametrize(
        ("change", "kind", "named"),
        [
            ({"colour": "red"}, InvalidDataError, "colour"),
            ({"h": None}, InvalidDataError, "Expected `int`, got `null` - at `h`"),
            ({"h": "4"}, InvalidDataError, "Expected `int`, got `str` - at `h`"),
            ({"h": True}, InvalidDataError, "Expected `int`, got `bool` - at `h`"),
            ({"h": 1}, InvalidDataError, "Expected `int` >= 2 - at `h`"),
            ({"h": 4.0}, InvalidDataError, "Expected `int`, got `float` - at `h`"),
            ({"inner_size": 0}, InvalidDataError, "Expected `int` >= 1 - at `inner_size`"),
            ({"token_size": 10**30}, InvalidDataError, "at `token_size`"),
            ({"vocab_size": 10**30}, InvalidDataError, "at `vocab_size`"),
            ({"inner_size": 1 << 32}, InvalidDataError, "at `inner_size`"),
            ({"architecture": "sequential", "token_size": 0}, InvalidDataError, "token_size is 0"),
            ({"architecture": "feed_forwards"}, UnknownNameError, "did you mean feed_forward?"),
            ({"architecture": 3}, InvalidDataError, "Expected `str`, got `int` - at `architecture`"),
            ({"inner_size": 17}, InvalidDataError, "inner.bias has shape [3, 16], not [3, 17]"),
            ({"h": 5}, InvalidDataError, "inner.bias has shape [3, 16], not [4, 16]"),
        ],
    )
    def test_a_config_that_is_wrong(self, tiny_base, folder, change, kind, named):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        assert named in refused(lambda: load_heads(tiny_base.identity, str(folder)), kind)

    @pytest.mark.parametrize(
        ("content", "message"),
        [("{", "is not valid JSON"), ("[]", "is not a JSON object"), ("{}", "is not a block heads configuration"),
         ('{"h": 4}', "is not a block heads configuration")],
    )  # fmt: skip
    def test_a_config_that_is_none(self, folder, content, message):
        (folder / "config.json").write_text(content)
        assert f"config.json {message}" in refused(lambda: read_config(folder), InvalidDataError)

    def test_missing_files(self, tiny_base, tmp_path, folder):
        said = refused(lambda: load_heads(tiny_base.identity, str(tmp_path / "none")))
        assert "no block heads in" in said and said.endswith(FETCH), "heads are not fetched"
        (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        assert f"--drafter eagle:{tmp_path} or hydra:{tmp_path}" in refused(lambda: read_config(tmp_path))
        (folder / "model.safetensors").unlink()
        assert "model.safetensors" in refused(lambda: load_heads(tiny_base.identity, str(folder)))
        assert "model.safetensors" in refused(lambda: heads_sha256(folder))

    @pytest.mark.parametrize("keep", [0, 7, 200, -1])
    def test_truncated_weights(self, tiny_base, folder, keep):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        assert str(path) in refused(lambda: load_heads(tiny_base.identity, str(folder)), InvalidDataError)

    @pytest.mark.parametrize(
        ("name", "tensor", "named"),
        [
            ("outer.bias", torch.zeros(3, 31), "outer.bias has shape [3, 31], not [3, 32]"),
            ("outer.bias", None, "outer.bias has shape none, not [3, 32]"),
            ("more", torch.zeros(1), "more has shape [1], not none"),
        ],
    )
    def test_weights_of_another_shape(self, tiny_base, folder, name, tensor, named):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensor
        save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")
        assert named in refused(lambda: load_heads(tiny_base.identity, str(folder)), InvalidDataError)


class TestShipped:
    def test_heads_come_with_a_base_by_its_name(self, tiny_base, tmp_path, monkeypatch):
        monkeypatch.setattr(block_heads, "SHIPPED", tmp_path)
        make_heads(tiny_base).save(tmp_path / "tiny" / "heads")
        identity = dataclasses.replace(tiny_base.identity, name="tiny")
        assert heads_folder(None, identity) == tmp_path / "tiny" / "heads"
        assert load_heads(identity).h == 4
        assert heads_folder("~/mine", identity) == Path.home() / "mine"

    def test_heads_of_other_weights_are_told(self, tiny_base, tmp_path, monkeypatch):
        monkeypatch.setattr(block_heads, "SHIPPED", tmp_path)
        heads = make_heads(tiny_base)
        heads.save(tmp_path / "tiny" / "heads")
        identity = dataclasses.replace(tiny_base.identity, name="tiny")
        assert of_other_weights(None, identity) is None  # of an earlier version, which did not say
        heads.config = msgspec.structs.replace(heads.config, base_weights_sha256=identity.weights_sha256)
        heads.save(tmp_path / "mine")
        assert of_other_weights(str(tmp_path / "mine"), identity) is None
        other = dataclasses.replace(identity, weights_sha256="0" * 64)
        said = of_other_weights(str(tmp_path / "mine"), other)
        assert "other weights than tiny's" in said and f"its own lie in {tmp_path / 'tiny' / 'heads'}" in said

    def test_those_of_a_tuned_base_lie_in_its_folder(self, tiny_base, tmp_path):
        make_heads(tiny_base).save(tmp_path / "tuned" / "heads")
        said = refused(lambda: load_heads(tiny_base.identity, str(tmp_path / "tuned")))
        assert f"(but in {tmp_path / 'tuned' / 'heads'})" in said

    def test_without_any_the_command_to_train_some_is_shown(self, tiny_base, tmp_path, monkeypatch):
        monkeypatch.setattr(block_heads, "SHIPPED", tmp_path)
        identity = dataclasses.replace(tiny_base.identity, name="owner/other")
        message = refused(lambda: heads_folder(None, identity))
        assert "rescore train-heads --base owner/other" in message and "only for" not in message
        make_heads(tiny_base).save(tmp_path / "tiny" / "heads")
        assert "(only for tiny)" in refused(lambda: heads_folder(None, identity))

    def test_a_built_in_name_is_no_folder_of_that_name(self, tiny_base, tmp_path, monkeypatch):
        """As the catalog has it: heads of another training must not stand in for the shipped ones."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(block_heads, "SHIPPED", tmp_path / "shipped")
        for folder in (tmp_path / "tiny", tmp_path / "shipped" / "tiny"):
            make_heads(tiny_base).save(folder / "heads")
            (folder / "tuned.json").write_text("{}")
        assert known_heads("tiny") == tmp_path / "shipped" / "tiny" / "heads"
        assert known_heads("./tiny") == Path("tiny/heads")

    def test_a_models_folder_is_no_place_for_shipped_heads(self, tiny_base, tmp_path):
        """A path as a name must not lead out of the package."""
        make_heads(tiny_base).save(tmp_path / "model" / "heads")
        identity = dataclasses.replace(tiny_base.identity, name=str(tmp_path / "model"))
        assert "no block heads are shipped" in refused(lambda: heads_folder(None, identity))
