"""What a generation asks of a machine is counted as it was done; limits are what a machine gives; running out
of memory is one line that says where and what to do."""

from __future__ import annotations

import math

import pytest
import torch

from lattices.errors import RescoreError
from lm.base.catalog import load_base
from lm.base.generation import generate
from lm.base.machine import Work, enough_memory, measure_limits

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [14, 15, 16]]


def parameters(base) -> tuple[int, int]:
    """Weights of the body and of the projection, from a forward's own modules."""
    projection = base.output_embeddings.weight.numel()
    linear = [m for m in base.model.modules() if isinstance(m, torch.nn.Linear) and m is not base.output_embeddings]
    norms = [p for n, p in base.model.named_parameters() if "norm" in n]
    return sum(m.weight.numel() for m in linear) + sum(p.numel() for p in norms), projection


def test_a_generation_counts_the_tokens_that_are_of_use(tiny_base):
    work = Work(tiny_base)
    made = list(generate(tiny_base, PROMPTS, max_new_tokens=6, batch_size=3, work=work))
    body, projection = parameters(tiny_base)
    again = sum(len(of.output_ids) - 1 for of in made)  # the last token of an output is not read
    tokens, projected = sum(map(len, PROMPTS)) + again, len(PROMPTS) + again
    assert work.flops == 2 * (body * tokens + projection * projected)


def test_weights_are_read_once_a_call_and_the_cache_by_every_row(tiny_base):
    work = Work(tiny_base)
    list(generate(tiny_base, [[5, 6, 7], [8, 9]], max_new_tokens=2, work=work))
    body, projection = parameters(tiny_base)
    config = tiny_base.config
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert tiny_base.dtype == torch.float64
    assert work.bytes_read == 8 * (2 * (body + projection) + position * (3 + 1 + 2 + 1))


def test_half_precision_reads_half(tiny_folder):
    def read(dtype: str) -> float:
        work = Work(load_base(str(tiny_folder), dtype=dtype))
        work.add(tokens=3, projected=1, cached=10)
        return work.bytes_read

    assert read("bfloat16") == read("float32") / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_are_positive(dtype):
    assert all(1e6 < limit < math.inf for limit in measure_limits(torch.device("cpu"), dtype))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_running_out_of_memory_is_one_line(error: BaseException):
    with (
        pytest.raises(RescoreError, match=r"^out of memory at step 3; take less$"),
        enough_memory("take less", at="step 3"),
    ):
        raise error


def test_real_cpu_memory():
    with pytest.raises(RescoreError, match="out of memory"), enough_memory("take less", at="here"):
        torch.empty(1 << 60)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), RescoreError("no"), ValueError("x")])
def test_errors_other_than_of_memory_stay(error: Exception):
    with pytest.raises(type(error), match=str(error)), enough_memory("take less", at="here"):
        raise error
