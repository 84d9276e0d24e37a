"""Hydra's mlp heads: their formula, live decoding against replay, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import refused
from evaluating import opened
from test_draft_layers import K, assert_slots, target, text_of
from test_ngram_rescorer import bigram_model, save
from torch.nn import functional
from transformers import LlamaForCausalLM

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from rescore.drafters.draft_layers import Hydra
from rescore.runs.evaluation import evaluate
from rescore.runs.records import Identical
from rescore.runs.run import Run

VOCABULARY, D, HEADS = 257, 32, 3


def tensors_of(blocks: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    tensors = {"input_embed_fn.weight": normal(VOCABULARY, D) * 4}
    for i in range(HEADS):
        wide = (i + 2) * D
        for name, width in [
            ("0.linear", wide),
            ("0.res_connection", wide),
            *((f"{b}.linear", D) for b in range(1, blocks)),
        ]:
            tensors[f"hydra_mlp.{i}.{name}.weight"] = 2 * normal(D, width)
            tensors[f"hydra_mlp.{i}.{name}.bias"] = normal(D)
        tensors[f"hydra_lm_head.{i}.weight"] = normal(VOCABULARY, D)
        tensors[f"hydra_lm_head.{i}.bias"] = 10 * normal(VOCABULARY)
    return tensors


def save_hydra(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> str:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps({"hydra_num_heads": HEADS, "hydra_head_arch": "mlp", **config}))
    torch.save(tensors, folder / "hydra_lm_head.pt")
    return str(folder)


@torch.inference_mode()
def chain(model: LlamaForCausalLM, tensors, text: list[int], first: int, offset: int, blocks: int) -> torch.Tensor:
    """Log-probs `[1 + heads, vocabulary]` by the formula, one position at a time."""
    w = {name: value.double() for name, value in tensors.items()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    output = model(torch.tensor([text]), output_hidden_states=True)
    state, drafted = output.hidden_states[-(offset + 1)][0, -1], [first]
    said = [torch.log_softmax(output.logits[0, -1], dim=-1)]
    for i in range(HEADS):
        x = torch.cat([state, *(w["input_embed_fn.weight"][token] for token in drafted)])
        y = linear(x, f"hydra_mlp.{i}.0.res_connection") + functional.silu(linear(x, f"hydra_mlp.{i}.0.linear"))
        for block in range(1, blocks):
            y = y + functional.silu(linear(y, f"hydra_mlp.{i}.{block}.linear"))
        said.append(torch.log_softmax(linear(y, f"hydra_lm_head.{i}"), dim=-1))
        drafted.append(int(said[-1].argmax()))
    return torch.stack(said)


@pytest.mark.parametrize(("offset", "blocks"), [(0, 1), (0, 3), (1, 1), (2, 2)])
def test_what_is_recorded_is_the_formula(tiny_base, tiny_folder, tmp_path, offset, blocks):
    tensors = tensors_of(blocks)
    drafter = Hydra(save_hydra(tmp_path, tensors, hidden_state_offset=offset)).fit(target(tiny_base))
    model = LlamaForCausalLM.from_pretrained(tiny_folder).double()
    prompt_ids, output_ids = text_of(2, 6, 5)
    lattice, _ = drafter.record(prompt_ids, output_ids, K)
    lattice.validate(VOCABULARY)
    for i, first in enumerate(output_ids.tolist()):
        text = [*prompt_ids.tolist(), *output_ids[:i].tolist()]
        assert_slots(lattice[i], chain(model, tensors, text, first, offset, blocks), first)


def test_the_bases_embeddings_where_there_are_none(tiny_base, tmp_path):
    tensors = tensors_of()
    own = tensors | {"input_embed_fn.weight": tiny_base.model.get_input_embeddings().weight.float()}
    del tensors["input_embed_fn.weight"]
    one, other = (
        Hydra(save_hydra(tmp_path / name, each), tokens=2).fit(target(tiny_base)).record(*text_of(2, 6, 5), K)[0]
        for name, each in (("own", own), ("shared", tensors))
    )
    assert one.h == 3 and one.token_ids.tolist() == other.token_ids.tolist()


def test_replay_equals_live(tiny_folder, squad_file, tmp_path):
    """Alone, rescored and with everything together; heads whose biases make the base's commonest tokens likely."""
    options = dict(base=str(tiny_folder), data=str(squad_file), dtype="float64", device="cpu", k=8, max_new_tokens=16)
    (recording,) = opened(options, heads_needed=False)
    said = torch.cat([torch.from_numpy(e.output_ids.astype("int64")) for e in recording.trace().examples])
    tensors = tensors_of()
    for i in range(HEADS):
        tensors[f"hydra_lm_head.{i}.bias"] = 2 * torch.bincount(said, minlength=VOCABULARY).float()
    spec = f"hydra:{save_hydra(tmp_path / 'hydra', tensors)}"
    ngram = f"context-ngram:{save(tmp_path / 'ngram', bigram_model())}"
    chosen = [("none", (spec,)), (ngram, (spec,)), ("none", (spec, "lookup")), ("oracle", (spec, "lookup"))]
    runs = [Run(name, p=4, k=8, drafters=of, label=f"run {i}") for i, (name, of) in enumerate(chosen)]
    replayed, live = (evaluate([recording], runs, live=live) for live in (False, True))
    assert {r.identical for r in live} == {Identical(n=6, identical=6)}
    assert [r.accepted_histogram for r in live] == [r.accepted_histogram for r in replayed]
    assert any(n > 1 for e in live.examples for n in e.accepted)


class TestRefusals:
    def test_folders(self, tmp_path):
        refused(lambda: Hydra(), "write hydra:FOLDER")
        refused(lambda: Hydra(str(tmp_path)), RescoreError, "no Hydra heads in", "hf download")
        (tmp_path / "config.json").write_text("{}")
        refused(
            lambda: Hydra(str(tmp_path)), RescoreError, "has no hydra_lm_head.safetensors or hydra_lm_head.pt", "hf"
        )
        other = save_hydra(tmp_path / "prefix", tensors_of(), hydra_head_arch="prefix-mlp")
        refused(lambda: Hydra(other), IncompatibleError, "hydra_head_arch is prefix-mlp")
        other = save_hydra(tmp_path / "ground", tensors_of(), grounded_heads=False)
        refused(lambda: Hydra(other), IncompatibleError, "grounded_heads is false")
        other = save_hydra(tmp_path / "offset", tensors_of(), hidden_state_offset="one")
        refused(lambda: Hydra(other), InvalidDataError, "hidden_state_offset is no number")
        refused(lambda: Hydra(save_hydra(tmp_path / "few", tensors_of()), tokens=4), "has 3 heads; give tokens from 1")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda t: {"x": torch.zeros(1)}, "has no Hydra mlp heads"),
            (lambda t: {n: v for n, v in t.items() if n != "hydra_lm_head.1.bias"}, "hydra_lm_head.1.bias is missing"),
            (
                lambda t: t | {"prefix_embeding_layer.x": torch.zeros(1)},
                "prefix_embeding_layer.x is [1], due is no such",
            ),
            (lambda t: t | {"hydra_mlp.1.0.linear.weight": torch.zeros(32, 64)}, "is [32, 64], due is [32, 96]"),
        ],
    )
    def test_tensors(self, tmp_path, change, said):
        refused(lambda: Hydra(save_hydra(tmp_path, change(tensors_of()))), InvalidDataError, said)

    def test_another_base(self, tiny_base, tmp_path):
        deep = Hydra(save_hydra(tmp_path / "deep", tensors_of(), hidden_state_offset=3))
        refused(lambda: deep.fit(target(tiny_base)), IncompatibleError, "reads states 3 layers before the last")
        cut = {n: v[:250] if n.startswith(("hydra_lm_head", "input")) else v for n, v in tensors_of().items()}
        fewer = Hydra(save_hydra(tmp_path / "fewer", cut))
        refused(lambda: fewer.fit(target(tiny_base)), IncompatibleError, "vocab_size is 250, the base's is 257")
