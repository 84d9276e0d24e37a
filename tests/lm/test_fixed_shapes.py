"""Forwards of fixed shapes, which a GPU records, say the same as plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_heads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fast_forwards import PROMPT, base_of, outputs

from lattices.prefix_tree import build_prefix_tree
from lm.base.catalog import load_base
from lm.base.fast.graphs import SIZES, FixedCache, FixedForwards
from lm.base.model import BaseLM
from rescore.decoding import decode
from rescore.rescorers import load_rescorer

few = settings(
    deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class TestFixedShapes:
    @pytest.fixture
    def fixed(self, tiny_base: BaseLM, monkeypatch: pytest.MonkeyPatch) -> BaseLM:
        monkeypatch.setattr(tiny_base, "has_fixed_shapes", True)
        return tiny_base

    @few
    @given(
        past=st.integers(1, 30),
        n=st.integers(1, SIZES[-1]),
        drafts=st.none() | st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=2, max_size=9),
        seed=st.integers(0, 9),
    )
    def test_logits_and_states_are_those_of_the_forward(self, fixed, past, n, drafts, seed):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(0, 256, (1, past), generator=generator)
        ids, how = torch.randint(0, 256, (1, n), generator=generator), {}
        if drafts:
            tree = build_prefix_tree(np.array([[7, *draft] for draft in drafts]))
            sees = torch.ones(1, 1, len(tree.tokens), past + len(tree.tokens), dtype=torch.bool)
            sees[0, 0, :, past:] = torch.from_numpy(tree.mask)
            ids = torch.from_numpy(tree.tokens)[None]
            how = {"attention_mask": sees, "position_ids": torch.from_numpy(tree.depths + past)[None]}
        caches = [fixed.new_decoding_cache(past + 2 * SIZES[-1]), fixed.new_cache(past + 2 * SIZES[-1])]
        assert isinstance(caches[0], FixedCache)
        kept = torch.randperm(ids.shape[1], generator=generator)[: 1 + ids.shape[1] // 2].sort().values.tolist()
        answers = []
        for cache in caches:
            fixed.forward(prompt, cache, last=1)
            cache.keep(range(past))
            first = fixed.forward(ids, cache, **how)
            assert cache.written == past + ids.shape[1]
            cache.keep(kept)  # and so nothing of what padded
            second = fixed.forward(ids[:, :3], cache)
            answers.append([*first, *second])
        for ours, theirs in zip(*answers, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "qwen3", "falcon", "mixtral"])
    def test_decoding_says_the_same_with_them(self, name: str):
        base = base_of(name)
        expected = outputs(base)
        base.has_fixed_shapes = True
        assert outputs(base) == expected

    @pytest.mark.parametrize(("p", "sizes"), [(1, [1, 2, 4]), (4, [1, 2, 4, 8, 16])])
    def test_what_is_recorded_is_recorded_before_the_steps(self, fixed, monkeypatch, p: int, sizes: list[int]):
        """Sizes of all calls that there can be, once, before the first that is timed; nothing of it is seen."""
        recorded, calls, known = list[int](), list[int](), FixedForwards._compute
        expected = decode(fixed, make_heads(fixed), PROMPT, rescorer=load_rescorer("none"), k=4, p=p).output_ids
        init = FixedForwards.__init__

        def with_recording(self: FixedForwards, *args: Any) -> None:
            init(self, *args)
            self._records = True

        def record(self: FixedForwards, size: int, cache: FixedCache) -> None:
            assert not calls, "within a step"
            assert int(self._shapes[size].positions.max()) == cache.length, "the context may end after it"
            recorded.append(size)
            self._recorded[size] = Graph(), known(self, self._shapes[size], cache)

        class Graph:
            """A forward of its size, written over the outputs that are given out, as a CUDA graph does."""

            def replay(self) -> None:
                (size,) = (size for size, (graph, _) in forwards._recorded.items() if graph is self)
                calls.append(size)
                cache = forwards._lent()
                for output, new in zip(
                    forwards._recorded[size][1], known(forwards, forwards._shapes[size], cache), strict=True
                ):
                    output.copy_(new)

        monkeypatch.setattr(FixedForwards, "__init__", with_recording)
        monkeypatch.setattr(FixedForwards, "_record", torch.inference_mode()(record))
        monkeypatch.setattr(fixed, "_fixed", None)
        forwards = FixedForwards(fixed._call, fixed.model.config, 100, fixed.device)
        fixed._fixed = forwards
        for _ in range(2):
            calls.clear()
            found = decode(fixed, make_heads(fixed), PROMPT, rescorer=load_rescorer("none"), k=4, p=p)
            assert found.output_ids == expected and calls
        assert recorded == sizes

    def test_buffers_are_lent_again_when_nobody_has_them(self, fixed):
        def used(capacity: int) -> FixedCache:
            cache = fixed.new_decoding_cache(capacity)
            assert isinstance(cache, FixedCache) and cache.length == 0
            fixed.forward(torch.tensor([PROMPT]), cache)
            cache.keep(range(3))
            return cache

        first = used(20)
        buffer = first.buffers[0].buffers[0]
        second = used(20)  # while the first one is in use
        assert second.buffers[0].buffers[0] is not buffer
        buffer = second.buffers[0].buffers[0]
        del first, second
        for capacity in (20, 30):
            assert used(capacity).buffers[0].buffers[0] is buffer
        large = used(1000)
        assert large.buffers[0].buffers[0].shape[2] == large.capacity >= 1000 + SIZES[-1]

    def test_nothing_of_a_former_decode_is_seen(self, fixed):
        """Half precision overflows to what is no number, which a mask does not keep out."""
        expected = decode(fixed, None, PROMPT, max_new_tokens=8).output_ids
        cache = fixed.new_decoding_cache(20)
        fixed.forward(torch.tensor([PROMPT]), cache)
        kept = cache.buffers[0].buffers[0]
        with torch.inference_mode():
            for buffer in (buffer for layer in cache.buffers for buffer in layer.buffers):
                buffer.fill_(torch.nan)
        del cache
        assert decode(fixed, None, PROMPT, max_new_tokens=8).output_ids == expected
        assert fixed.new_decoding_cache(20).forwards._buffers[0][0] is kept, "the same buffers"

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
    def test_a_gpu_records_them(self, tiny_folder: Path):
        plain, recorded = (load_base(str(tiny_folder), device="cuda", compile=how) for how in ("off", "auto"))
        assert recorded.has_fixed_shapes and not plain.has_fixed_shapes
        for _ in range(2):  # the second time what was recorded is played back on a cache of its own
            assert outputs(recorded) == outputs(plain)
        cache = recorded.new_decoding_cache(20)
        assert cache.forwards._recorded.keys() >= {1, 4}
        recorded.read_prompt(PROMPT, cache)
        cache.prepare(20)
        assert cache.forwards._recorded.keys() == {1, 2, 4, 8, 16, 32}
