"""Weights that are laid out for decoding, and memory of mapped ones: the same numbers, once in memory, and back."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_heads, save_tiny_base, squad_records
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from lm.base.catalog import load_base
from lm.base.fast.packed import can_pack, pack, product_of, unpack
from lm.base.model import BaseLM
from lm.pages import release, trim_heap
from lm.training.tuned_base import TunedBase
from rescore.decoding import decode
from rescore.tasks.base import Example
from rescore.tracing import record_trace

PROMPT = list(b"the bridge was built in")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def loaded(folder: Path, **options) -> BaseLM:
    return load_base(str(folder), device="cpu", **{"dtype": "float32", **options})


def layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear}


@needs_onednn
class TestPacked:
    def test_the_products_are_the_same_but_for_rounding(self):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Linear(40, 8, bias=False))
        model.requires_grad_(False)
        assert can_pack(model) and not can_pack(model.double())
        model.float()
        rows = [torch.randn(*shape, 24) for shape in ((1, 1), (1, 3), (2, 9), (1, 0), (64,), (1, 700), (3, 2, 5))]
        plain = [model(each) for each in rows]
        pack(model, model[2])
        assert model[0].weight.is_meta and model[0].weight.shape == (40, 24) and not model[2].weight.is_meta
        with torch.inference_mode():
            for each, expected in zip(rows, plain, strict=True):
                torch.testing.assert_close(model(each), expected)
        unpack(model)
        assert all(torch.equal(model(each), expected) for each, expected in zip(rows, plain, strict=True))

    @pytest.mark.parametrize("saved", ["float32", "bfloat16"])  # of which the first is mapped, the second converted
    def test_every_weight_comes_back_bit_for_bit(self, tmp_path: Path, saved: str):
        folder = save_tiny_base(tmp_path / "base", hidden_size=128)
        loaded(folder, dtype=saved).model.save_pretrained(folder)
        plain, base = loaded(folder), loaded(folder)
        base.pack()
        base.pack()
        dropped = {name for name, layer in layers(base.model).items() if layer.weight.is_meta}
        assert all(product_of(layer) for layer in layers(base.model).values())
        if saved == "bfloat16":
            assert dropped == set(layers(base.model)) - {"lm_head"}
        elif sys.platform == "linux":
            assert not dropped, "a file holds them"
        assert base.device.type == "cpu" and base.dtype == torch.float32
        parameters = dict(plain.model.named_parameters())
        for name, weight in base.model.named_parameters():
            assert weight.shape == parameters[name].shape
            assert weight.is_meta or torch.equal(weight, parameters[name]), name
        base.unpack()
        for name, weight in base.model.named_parameters():
            assert torch.equal(weight, parameters[name]), name
        ids = torch.tensor([PROMPT])
        assert torch.equal(base.forward(ids)[0], plain.forward(ids)[0])
        base.pack()
        torch.testing.assert_close(base.forward(ids)[0], plain.forward(ids)[0], rtol=1e-4, atol=1e-4)

    def test_decoding_says_the_same_with_them(self, tiny_folder: Path):
        plain, base = loaded(tiny_folder), loaded(tiny_folder)
        said = decode(base, None, PROMPT, max_new_tokens=12).output_ids
        assert all(product_of(layer) for layer in layers(base.model).values())
        assert said == plain.model.generate(torch.tensor([PROMPT]), max_new_tokens=12)[0, len(PROMPT) :].tolist()
        hidden, ids = torch.randn(1, 2, base.hidden_size), torch.tensor([[5, 9, 70]])
        assert torch.equal(base.project(hidden, ids), plain.project(hidden, ids)), "single rows are there as they were"

    def test_a_model_in_memory_is_left_as_it_is(self, tiny_base: BaseLM):
        model = LlamaForCausalLM(tiny_base.model.config)
        base = load_base(model, tokenizer=tiny_base.tokenizer)
        base.pack()
        assert not any(product_of(module) for module in model.modules())

    def test_the_model_of_a_base_that_decoded_makes_another(self, tmp_path: Path):
        folder = save_tiny_base(tmp_path / "base")
        loaded(folder, dtype="bfloat16").model.save_pretrained(folder)
        base = loaded(folder)
        said = decode(base, None, PROMPT, max_new_tokens=12).output_ids
        other = load_base(base.model, tokenizer=base.tokenizer)
        assert decode(other, None, PROMPT, max_new_tokens=12).output_ids == said
        assert decode(base, None, PROMPT, max_new_tokens=12).output_ids == said

    def test_an_architecture_that_reads_weights_itself_is_left_as_it_is(self, tmp_path: Path, monkeypatch):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
            return torch.nn.functional.linear(inner, self.down_proj.weight)

        monkeypatch.setattr(LlamaMLP, "forward", forward)
        folder = save_tiny_base(tmp_path / "base")
        loaded(folder, dtype="bfloat16").model.save_pretrained(folder)
        plain, base = loaded(folder), loaded(folder)
        for _ in range(2):
            base.pack()
            assert not any(product_of(layer) for layer in layers(base.model).values())
        assert torch.equal(base.forward(torch.tensor([PROMPT]))[0], plain.forward(torch.tensor([PROMPT]))[0])

    def test_what_is_trained_has_its_weights(self, tiny_folder: Path):
        base = loaded(tiny_folder)
        decode(base, None, PROMPT, max_new_tokens=2)
        tuned = TunedBase(base, "full", torch.float32, rank=8, layers=None, gradient_checkpointing=False)
        assert len(tuned.parameters) > 9 and not any(weight.is_meta for weight in tuned.parameters.values())

    def test_a_trace_is_the_same_whatever_was_decoded_before(self, tiny_folder: Path, tmp_path: Path):
        examples = [Example(str(r["id"]), str(r["question"]), (), str(r["id"])) for r in squad_records(3)]
        traces = []
        for name in ("before", "after"):
            base = loaded(tiny_folder)
            if name == "after":
                decode(base, None, PROMPT, max_new_tokens=4)
            heads = make_heads(base)
            how = {"settings": {}, "chat": True, "max_new_tokens": 8, "k": 8}
            traces.append(record_trace(base, heads, examples, tmp_path / name, **how))
        for before, after in zip(*(trace.examples for trace in traces), strict=True):
            assert np.array_equal(before.lattice.logps, after.lattice.logps)
            assert np.array_equal(before.lattice.token_ids, after.lattice.token_ids)


def pages_of(tensor: torch.Tensor) -> int:
    """How many of a tensor's pages are in memory."""
    first, last = tensor.data_ptr() // mmap.PAGESIZE + 1, (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
    entries = np.fromfile("/proc/self/pagemap", dtype=np.uint64, count=last - first, offset=first * 8)
    return int((entries >> np.uint64(63)).sum())


@pytest.mark.skipif(sys.platform != "linux", reason="pages are told by Linux")
class TestRelease:
    @pytest.fixture
    def weight(self, tmp_path: Path) -> torch.Tensor:
        """Four megabytes, mapped from a file and read."""
        save_file({"weight": torch.arange(1 << 20, dtype=torch.float32)}, tmp_path / "weights.safetensors")
        with safe_open(tmp_path / "weights.safetensors", framework="pt") as stream:
            weight = stream.get_tensor("weight")
        weight.sum()
        assert pages_of(weight) == (4 << 20) // mmap.PAGESIZE - 1
        return weight

    def test_pages_of_a_file_go_and_come_back(self, weight: torch.Tensor):
        assert release(weight) and pages_of(weight) == 0
        assert torch.equal(weight, torch.arange(1 << 20, dtype=torch.float32))

    def test_what_was_written_to_stays(self, weight: torch.Tensor):
        weight[3000:3010] = -1
        assert not release(weight)
        assert (weight[3000:3010] == -1).all() and weight[2999] == 2999

    def test_what_no_file_holds_stays(self):
        weight = torch.arange(1 << 20, dtype=torch.float32)
        assert not any(release(each) for each in (weight, weight[:3], weight.reshape(1024, 1024).T))
        assert torch.equal(weight, torch.arange(1 << 20, dtype=torch.float32))

    @needs_onednn
    def test_the_projection_is_in_memory_as_it_is_laid_out_only(self, tmp_path: Path):
        base = loaded(save_tiny_base(tmp_path / "base", hidden_size=512))
        embeddings = base.output_embeddings.weight
        assert pages_of(embeddings) > 100
        base.pack()
        assert pages_of(embeddings) < 32  # Linux maps some beside those of what lies next to it
        decode(base, None, PROMPT, max_new_tokens=4)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc here")
def test_freed_memory_goes_back_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    blocks = [torch.ones(6000) for _ in range(4000)]  # 24 kB each, which the C library gives no mapping of its own
    kept = blocks[::100]
    del blocks
    before = resident()
    assert trim_heap()
    assert before - resident() > 3000 * 24000
    assert all(bool((block == 1).all()) for block in kept)
