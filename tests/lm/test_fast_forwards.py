"""Faster forwards say the same: joined products, programs of layers, compiled ones, fixed shapes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, make_heads
from tiny_models import VARIANTS, tiny_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lattices.errors import IncompatibleError, RescoreError
from lm.base import model as model_module
from lm.base.cache import TreeCache
from lm.base.catalog import load_base
from lm.base.fast import compiled as compiling
from lm.base.fast.compiled import Layers, compiled, install, remove
from lm.base.fast.compiled_layer import CompiledLayer, Run
from lm.base.fast.packed import PackedProduct, Sibling, pack_joined, products_in
from lm.base.model import BaseIdentity, BaseLM
from lm.base.probe import state_size
from rescore.decoding import decode
from rescore.rescorers import load_rescorer

HAS_COMPILER = shutil.which("g++") is not None
needs_packing = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
PROMPT = [3, 9, 27, 11, 40]


def base_of(name: str) -> BaseLM:
    model = tiny_model(name).eval()
    config = model.config.get_text_config(decoder=True)
    dtype = str(model.dtype).removeprefix("torch.")
    identity = BaseIdentity(name, "w", "t", state_size(config), config.vocab_size, dtype)
    return BaseLM(model, byte_tokenizer(), identity=identity)


def outputs(base: BaseLM) -> list[list[int]]:
    """Greedy, then in blocks: one draft and four, as a tree and as a batch, and drafts that are accepted whole."""
    heads, found = make_heads(base, h=4, strength=0.05), [decode(base, None, PROMPT, max_new_tokens=18)]
    future = np.array(found[0].output_ids)
    for rescorer, k, p, verify in (("none", 4, 1, "tree"), ("none", 4, 4, "tree"), ("none", 4, 4, "batch"),
                                   ("oracle", base.vocab_size, 1, "tree")):  # fmt: skip
        found.append(
            decode(base, heads, PROMPT, rescorer=load_rescorer(rescorer), k=k, p=p, max_new_tokens=18, verify=verify,
                   future=future)
        )  # fmt: skip
    assert max(found[-1].accepted) == 4
    return [each.output_ids for each in found]


class Programs:
    """Makes programs that run as torch traced them, and counts their calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, exported: torch.export.ExportedProgram, path: Path) -> Run:
        module = exported.module(check_guards=False)  # the compiled ones have no guards either: calls are checked
        of_call = exported.call_spec.in_spec.child(0).child(3).num_children

        def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            self.calls += 1
            past, keys, values, *rest = tensors
            return [module(past, keys, values, rest[:of_call], rest[of_call:])]

        return run


@pytest.fixture
def float32_base(tiny_folder: Path) -> BaseLM:
    return load_base(str(tiny_folder), dtype="float32", device="cpu", compile="off")


@needs_packing
class TestSiblings:
    def test_what_reads_the_same_rows_is_one_product(self, tiny_folder: Path, float32_base: BaseLM):
        float32_base.pack()
        layer = float32_base.model.model.layers[0]
        assert [len(products_in(part)) for part in (layer.self_attn, layer.mlp, layer)] == [2, 2, 4]
        shared = {id(each.forward.siblings) for each in (layer.self_attn.q_proj, layer.self_attn.v_proj)}
        assert len(shared) == 1 and not isinstance(layer.self_attn.o_proj.forward, Sibling)
        plain = load_base(str(tiny_folder), dtype="float32", device="cpu")
        for n in (1, 3, 9, 64, 100):
            ids = torch.randint(0, 256, (1, n), generator=torch.Generator().manual_seed(n))
            torch.testing.assert_close(float32_base.forward(ids)[0], plain.forward(ids)[0], rtol=1e-3, atol=1e-3)

    def test_weights_come_back_bit_for_bit(self, tiny_folder: Path, float32_base: BaseLM):
        plain = dict(load_base(str(tiny_folder), dtype="float32", device="cpu").model.named_parameters())
        float32_base.pack()
        assert float32_base.model.model.layers[0].mlp.gate_proj.weight.is_meta
        float32_base.unpack()
        for name, weight in float32_base.model.named_parameters():
            assert torch.equal(weight, plain[name]), name

    @staticmethod
    def joined(*sizes: int, bias: bool = True) -> torch.nn.ModuleList:
        torch.manual_seed(0)
        return torch.nn.ModuleList([torch.nn.Linear(8, n, bias=bias) for n in sizes]).requires_grad_(False)

    def test_rows_are_multiplied_anew_whenever_they_are_others(self):
        pair, rows = self.joined(4, 6), torch.randn(3, 8)
        plain = [layer(rows) for layer in pair]
        pack_joined(pair, torch.nn.Linear(1, 1), lambda: torch.cat([layer(rows) for layer in pair], dim=-1))
        assert all(isinstance(layer.forward, Sibling) for layer in pair)
        first, second = pair
        with torch.inference_mode():
            torch.testing.assert_close(second(rows), plain[1])  # in any order
            torch.testing.assert_close(second(rows), plain[1])  # twice, before the other
            torch.testing.assert_close(first(rows + 1), first(rows.clone() + 1))
            torch.testing.assert_close(first(rows), plain[0])
            torch.testing.assert_close(second(rows), plain[1])
            rows.mul_(2)  # both were given out: the same tensor is multiplied anew
            assert not torch.allclose(first(rows), plain[0]) and not torch.allclose(second(rows), plain[1])

    def test_only_products_of_one_module_and_of_one_kind_are_joined(self):
        trio, other, rows = self.joined(4, 5), self.joined(3, bias=False), torch.randn(2, 8)
        model = torch.nn.ModuleList([trio, other, *self.joined(7, 7)])

        def forward() -> torch.Tensor:
            first, second = (model[2](rows), model[2](rows))  # twice
            parts = [trio[0](rows), trio[1](rows), other[0](rows), first, second, model[3](rows + 0)]
            return torch.cat(parts, dim=-1)

        pack_joined(model, torch.nn.Linear(1, 1), forward)
        layers = [*trio, other[0], model[2], model[3]]
        assert [isinstance(layer.forward, Sibling) for layer in layers] == [True, True, False, False, False]

    def test_a_model_that_needs_products_of_their_own_has_them(self):
        class Viewed(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = TestSiblings.joined(4, 4)

            def forward(self, rows: torch.Tensor) -> torch.Tensor:
                return self.a(rows).view(-1) + self.b(rows).view(-1)

        model, rows = Viewed(), torch.randn(3, 8)
        expected = model(rows)
        pack_joined(model, torch.nn.Linear(1, 1), lambda: model(rows))
        assert [isinstance(layer.forward, PackedProduct) for layer in (model.a, model.b)] == [True, True]
        with torch.inference_mode():
            torch.testing.assert_close(model(rows), expected)


class TestPrograms:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "qwen3", "phi3", "gemma2", "gemma3_text"])
    def test_decoding_says_the_same_with_them(self, name: str, tmp_path: Path):
        base = base_of(name)
        expected, make = outputs(base), Programs()
        layers, runs = compiled(base, tmp_path, make)
        assert len(layers.layers) == base.config.num_hidden_layers
        install(base, layers, runs)
        make.calls = 0
        assert outputs(base) == expected
        # Of all that is called only prompts, and four drafts as a batch, are no programs'.
        assert make.calls >= 17 * base.config.num_hidden_layers
        remove(base.model)
        make.calls = 0
        assert outputs(base) == expected and make.calls == 0

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("mixtral", "a layer can't be traced"),
            ("bloom", "take or give more than their states"),
            ("falcon", "has numbers that are no weights"),
            ("doge", "computes otherwise where the text is longer"),  # whose attention has a window of its own
        ],
    )
    def test_what_has_none_is_told_why(self, name: str, reason: str, tmp_path: Path):
        with pytest.raises(IncompatibleError, match=reason):
            compiled(base_of(name), tmp_path, Programs())

    @pytest.mark.parametrize("long", [2, 9, 33])
    def test_a_layer_that_asks_for_the_length_has_none(self, long: int, tmp_path: Path, monkeypatch):
        """Tracing takes one of the branches, and a compiled program does not tell for which sizes that is right."""
        forward = LlamaDecoderLayer.forward

        def branching(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            states = forward(self, hidden_states, *args, **kwargs)
            return states * 2 if hidden_states.shape[1] > long else states

        base = base_of("llama")
        monkeypatch.setattr(LlamaDecoderLayer, "forward", branching)
        with pytest.raises(IncompatibleError, match="computes otherwise where the text is longer"):
            compiled(base, tmp_path, Programs())

    def test_layers_that_are_called_twice_have_none(self, tmp_path: Path):
        base = base_of("llama")
        layers = base.model.model.layers
        forward = layers[0].forward
        layers[0].forward = lambda *args, **kwargs: layers[1](forward(*args, **kwargs), *args[1:], **kwargs)
        with pytest.raises(IncompatibleError, match="does not call every layer once"):
            compiled(base, tmp_path, Programs())

    def test_after_a_single_token_the_layers_read_by_themselves(self, tmp_path: Path):
        """0 and 1 are no sizes that a trace leaves open."""
        base, make = base_of("llama"), Programs()
        expected = decode(base, None, PROMPT[:1], max_new_tokens=6).output_ids
        install(base, *compiled(base, tmp_path, make))
        make.calls = 0
        assert decode(base, None, PROMPT[:1], max_new_tokens=6).output_ids == expected
        assert make.calls == 4 * base.config.num_hidden_layers  # of five calls after the prompt's

    def test_a_model_that_is_given_in_memory_has_none(self, tmp_path: Path):
        """It may be that of a base LM that decoded, and its weights may change."""
        base, make = base_of("llama"), Programs()
        install(base, *compiled(base, tmp_path, make))
        with torch.no_grad():
            for layer in base.model.model.layers:
                layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight * 3, requires_grad=False)
        other = load_base(base.model, base.tokenizer)
        prompt = torch.tensor([PROMPT])
        said = other.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        make.calls = 0
        assert decode(other, None, PROMPT, max_new_tokens=8).output_ids == said[0, len(PROMPT) :].tolist()
        assert make.calls == 0

    def test_layers_of_other_sizes_have_programs_of_their_own(self, tmp_path: Path):
        """DeepSeek's first layer is dense; its others have experts, which can't be programs."""
        with pytest.raises(IncompatibleError, match="traced"):
            compiled(base_of("deepseek_v3"), tmp_path, Programs())

    def test_a_wrong_program_is_found_out(self, tmp_path: Path):
        make = Programs()

        def wrong(exported: torch.export.ExportedProgram, path: Path) -> Run:
            run = make(exported, path)
            return lambda tensors: [each * 1.01 for each in run(tensors)]

        with pytest.raises(IncompatibleError, match="does not compute what the layer does"):
            compiled(base_of("llama"), tmp_path, wrong)

    def test_trees_of_a_growing_cache(self, tmp_path: Path):
        """A rescorer's cache: rows of their own length, with nodes after what is settled."""
        base, make = base_of("llama"), Programs()

        def read() -> list[torch.Tensor]:
            cache = TreeCache(base.model.config, 1, base.device)
            found = []
            for parents in ([-1, 0, 1, 2, 3], [-1], [-1, -1, 0], [1, 2, 3]):
                positions, mask = cache.place(np.array([parents]))
                ids = torch.arange(len(parents))[None] + 5
                found.append(base.forward(ids, cache, position_ids=positions, attention_mask=mask)[0])
                if parents[-1] == 3 or len(parents) == 1:
                    cache.settle([range(len(parents))])
            return found

        expected = read()
        layers, runs = compiled(base, tmp_path, make)
        install(base, layers, runs)
        make.calls = 0
        for ours, theirs in zip(read(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert make.calls == 3 * base.config.num_hidden_layers  # the first call makes the buffers

    def test_calls_that_do_not_fit_are_the_layers_own(self, tmp_path: Path):
        base, make = base_of("llama"), Programs()
        install(base, *compiled(base, tmp_path, make))
        make.calls = 0
        cache = base.new_cache(200)
        base.forward(torch.arange(7)[None], cache)  # a prompt
        cache.keep(range(7))
        base.forward(torch.arange(8).reshape(2, 4), cache)  # two drafts
        base.forward(torch.arange(7)[None])  # no cache
        base.forward(torch.arange(9)[None] % 7, cache, attention_mask=torch.ones(1, 16, dtype=torch.bool))
        assert make.calls == base.config.num_hidden_layers  # the last one, whose mask becomes an ordinary one


@needs_packing
class TestCompiling:
    @pytest.fixture
    def lines(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
        """What was told since it was asked last."""
        monkeypatch.setattr(model_module, "LEAST_WEIGHTS", 0)

        def told() -> list[str]:
            found = [record.getMessage() for record in caplog.records if record.name == "rescore"]
            caplog.clear()
            return found

        return told

    @pytest.fixture
    def load(self, tiny_folder: Path) -> Callable[..., BaseLM]:
        return lambda **how: load_base(str(tiny_folder), dtype="float32", device="cpu", **how)

    @staticmethod
    def are_compiled(base: BaseLM) -> bool:
        return all(isinstance(layer.forward, CompiledLayer) for layer in base.model.model.layers)

    @pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
    def test_it_is_done_once_for_a_machine(self, load, lines, monkeypatch: pytest.MonkeyPatch, cache_folder: Path):
        expected = outputs(load(compile="off"))
        first = load()
        assert outputs(first) == expected and self.are_compiled(first)
        (line,) = lines()
        assert line.startswith("compiling the layers of ") and "--compile off" in line
        assert not list(cache_folder.rglob("*.cpp"))

        def fails(*_: object) -> Run:
            raise IncompatibleError("the compiler failed (for a test)")

        monkeypatch.setattr(compiling, "compile_program", fails)
        second = load()
        assert outputs(second) == expected and self.are_compiled(second) and not lines()
        torch.testing.assert_close(second.forward(torch.tensor([PROMPT]))[0], first.forward(torch.tensor([PROMPT]))[0])
        (program,) = cache_folder.rglob("*.pt2")
        program.write_bytes(b"broken")
        third = load()
        assert outputs(third) == expected and not self.are_compiled(third)
        again, _, failed = lines()
        assert "is broken; it is made again" in again
        assert "decodes without compiled layers: the compiler failed (for a test) (kept: remove " in failed

    def test_without_a_compiler_it_says_so(self, load, lines, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        base = load()
        assert outputs(base) == outputs(load(compile="off")) and not self.are_compiled(base)
        (line,) = lines()
        assert "decodes without compiled layers: there is no C++ compiler" in line

    @pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
    def test_what_failed_is_not_tried_again(self, load, lines, monkeypatch: pytest.MonkeyPatch):
        tried = []

        def fails(*_: object) -> Layers:
            tried.append(1)
            raise IncompatibleError("a layer can't be traced (for a test)")

        monkeypatch.setattr(compiling, "compiled", fails)
        for _ in range(2):
            base = load()
            base.pack()
            assert not self.are_compiled(base)
        assert len(tried) == 1
        assert ["a layer can't be traced (for a test) (kept: " in line for line in lines()] == [False, True, True]
        monkeypatch.setenv("CXX", "gcc")  # another compiler may do better
        load().pack()
        assert len(tried) == 2
        monkeypatch.setattr(compiling, "versions", lambda: {"rescore": "0.0.0"})  # and so may another version of ours
        load().pack()
        assert len(tried) == 3

    def test_what_failed_with_other_weights_is_tried(self, load, lines, monkeypatch: pytest.MonkeyPatch):
        """A model that fails by its weights (numbers that are none) switches compiling off for no other checkpoint of
        its architecture, nor takes the place of the programs of one that was compiled."""
        make, runs = Programs(), list[Run]()

        def keeps(exported: torch.export.ExportedProgram, path: Path) -> Run:
            path.write_text(str(len(runs)))
            runs.append(make(exported, path))
            return runs[-1]

        monkeypatch.setattr(compiling, "compile_program", keeps)
        monkeypatch.setattr(compiling, "load_program", lambda path: runs[int(path.read_text())])
        monkeypatch.setattr(compiling.shutil, "which", lambda name: sys.executable)

        def of(weights: str) -> BaseLM:
            base = load()
            base.identity = dataclasses.replace(base.identity, weights_sha256=weights)
            if weights == "broken":
                for layer in base.model.model.layers:
                    layer.input_layernorm.weight = torch.nn.Parameter(
                        torch.full_like(layer.input_layernorm.weight, torch.nan), requires_grad=False
                    )
            compiling.compile_layers(base)
            return base

        expected = [("broken", False, 1), ("one", True, 2), ("broken", False, 2), ("other", True, 2), ("one", True, 2)]
        for weights, compiles, count in expected:
            assert (self.are_compiled(of(weights)), len(runs)) == (compiles, count), weights
        failed = [line for line in lines() if "decodes without" in line]
        assert len(failed) == 2 and all("does not compute what the layer does (kept: remove" in line for line in failed)

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("no memory")])
    def test_what_a_machine_fails_with_is_tried_again(self, load, lines, monkeypatch, cache_folder: Path, error):
        tried = []

        def fails(*_: object) -> Layers:
            tried.append(1)
            raise error

        monkeypatch.setattr(compiling, "compiled", fails)
        monkeypatch.setattr(compiling.shutil, "which", lambda name: sys.executable)
        for _ in range(2):
            load().pack()
        assert len(tried) == 2 and not list(cache_folder.rglob("*failed*"))
        assert all("decodes without compiled layers: " in line and "kept: " not in line for line in lines()[1::2])

    def test_any_damage_has_them_made_again(
        self, load, lines, monkeypatch: pytest.MonkeyPatch, cache_folder: Path, tmp_path: Path
    ):
        made, library = list[Path](), b"a program"
        layers, runs = compiled(load(), tmp_path, Programs())

        def makes(base: BaseLM, folder: Path, _: object) -> tuple[Layers, list[Run]]:
            made.append(folder)
            (folder / "0.pt2").write_bytes(library)
            return layers, runs

        monkeypatch.setattr(compiling, "compiled", makes)
        monkeypatch.setattr(compiling, "load_program", lambda path: runs[0])
        monkeypatch.setattr(compiling.shutil, "which", lambda name: sys.executable)
        fresh = load()
        compiling.compile_layers(fresh)
        (record,), (program,) = cache_folder.rglob(compiling.RECORD), cache_folder.rglob("*.pt2")
        whole = json.loads(record.read_text())
        lines()
        made.clear()
        (kind,), (_, *rest) = whole["kinds"], whole["layers"]
        damages = [
            {"layers": [[7, 0], *rest]}, {"layers": [[-1, 0], *rest]}, {"layers": [[0, 99], *rest]}, {"layers": rest},
            {"layers": []}, {"kinds": []}, {"kinds": [kind, kind]}, {"kinds": [kind | {"states": 9}]},
            {"kinds": [kind | {"cache": ["nowhere"]}]}, {"programs": []}, {"checksum": ""}, {"schema": "older"},
            {"kinds": [kind | {"inputs": [each | {"dtype": "none"} for each in kind["inputs"]]}]}, {"weights": 3},
        ]  # fmt: skip
        texts = [json.dumps(whole | damage) for damage in damages] + ["", "{", "[]", "null", record.read_text()[:-40]]
        for count, text in enumerate(texts, start=1):
            record.write_text(text)
            compiling.compile_layers(fresh)
            assert self.are_compiled(fresh) and len(made) == count, text
            again, compiling_again = lines()
            assert "is broken; it is made again" in again and compiling_again.startswith("compiling the layers of ")
            assert json.loads(record.read_text()) == whole
        for damage in (lambda: program.write_bytes(library[:-1]), program.unlink, record.unlink):
            damage()
            compiling.compile_layers(fresh)
            assert "is broken" in lines()[0]
        compiling.compile_layers(fresh)
        assert not lines() and len(made) == len(texts) + 3

    def test_whatever_an_architecture_fails_with_is_told_in_a_line(self, load, lines, monkeypatch):
        monkeypatch.setattr(compiling, "watch", lambda base: {}["what it lacks"])
        monkeypatch.setattr(compiling.shutil, "which", lambda name: sys.executable)
        base = load()
        assert outputs(base) == outputs(load(compile="off")) and not self.are_compiled(base)
        assert "decodes without compiled layers: KeyError: 'what it lacks' is missing (kept: remove " in lines()[-1]

    def test_kept_programs_are_compared_with_layers_of_other_weights(self, monkeypatch, cache_folder: Path):
        """Layers that scale their attention by their place are alike while attention adds nothing: a program that was
        compiled then is no other checkpoint's."""
        monkeypatch.setitem(VARIANTS, "gpt2, by place", ("gpt2", {"scale_attn_by_inverse_layer_idx": True}))
        make, runs = Programs(), []

        def keeps(exported: torch.export.ExportedProgram, path: Path) -> Run:
            path.write_text(str(len(runs)))
            runs.append(make(exported, path))
            return runs[-1]

        monkeypatch.setattr(compiling, "compile_program", keeps)
        monkeypatch.setattr(compiling, "load_program", lambda path: runs[int(path.read_text())])
        trained, untrained = base_of("gpt2, by place"), base_of("gpt2, by place")
        with torch.no_grad():
            for layer in trained.model.transformer.h:
                layer.attn.c_attn.weight.mul_(20)  # so that the scale matters
            for layer in untrained.model.transformer.h:
                layer.attn.c_proj.weight.zero_()
        expected = outputs(trained)
        for base, weights, programs in ((untrained, "untrained", 1), (trained, "trained", 3), (untrained, "other", 3)):
            base.identity = dataclasses.replace(base.identity, weights_sha256=weights)
            compiling.compile_layers(base)
            assert len(runs) == programs  # the last one finds those of the second, which fit
        make.calls = 0
        assert outputs(trained) == expected and make.calls
        assert len(list(cache_folder.rglob("*.pt2"))) == 2

    def test_small_models_and_those_in_memory_are_left_alone(self, load, lines, monkeypatch, tiny_base):
        monkeypatch.setattr(model_module, "LEAST_WEIGHTS", 1 << 24)
        bases = [load(), load_base(load().model, tiny_base.tokenizer), tiny_base]
        for base in bases:
            base.pack()
            assert not self.are_compiled(base)
        assert not lines()

    def test_a_choice_that_there_is_not(self, load):
        with pytest.raises(RescoreError, match="choice of compile 'on'"):
            load(compile="on")
