"""`learned-bigram`: the p best of all paths by the heads and the pair scores, for the base it was made for."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny_base

from lattices.errors import IncompatibleError, RescoreError
from lattices.lattice import Lattice
from lm.base.catalog import load_base
from lm.base.model import BaseLM
from lm.neural import learned_bigram
from lm.neural.learned_bigram import load_bigram
from lm.training.bigram import BigramOptions, BigramTrainer, TargetLattices
from rescore.rescorers import Context, Rescorer, Target, load_rescorer

H, K = 4, 4


def lattices_at(seed: int, n: int) -> Lattice:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((n, H, 257)), axis=-1)[..., :K].astype(np.int32)
    logps = -np.sort(rng.uniform(0, 3, (n, H, K)), axis=-1).astype(np.float32)
    return Lattice(ids, logps)


def contexts(n: int) -> list[Context]:
    return [Context([1, 2]) for _ in range(n)]


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory) -> Path:
    """A checkpoint with random scores of the size of the heads' log-probs."""
    lattice = lattices_at(0, 4)
    options = BigramOptions(rank=3, k=K, rows=4, batch=2, steps=1, evaluate_every=1)
    data = TargetLattices(lattice, lattice.token_ids[:, :, 1].astype(np.int64), np.arange(len(lattice)), "made", "0")
    trainer = BigramTrainer(tiny_base, [data], options)
    torch.manual_seed(0)
    for parameter in trainer.parameters.values():
        torch.nn.init.normal_(parameter, std=0.2)
    made = tmp_path_factory.mktemp("bigram")
    trainer._save(made)
    return made


@pytest.fixture
def rescorer(tiny_base, folder) -> Rescorer:
    found = load_rescorer(f"learned-bigram:{folder}")
    assert found.alpha == 1.0
    return found.fit(target(tiny_base))


def target(base: BaseLM) -> Target:
    return Target(base.vocab_size, (256,), base.identity.tokenizer_sha256, base.identity)


@pytest.mark.parametrize("p", [1, 3, 100])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_drafts_are_the_best_of_all_paths(tiny_base, folder, rescorer, p, alpha):
    lattices, model = lattices_at(1, 8), load_bigram(folder)
    embeddings = tiny_base.output_embeddings.weight.double().numpy()
    left, right = embeddings @ model.left.double().numpy(), embeddings @ model.right.double().numpy()
    drafts = rescorer.weighted(alpha).draft(lattices, contexts(8), p)
    assert drafts.dtype == np.int32 and drafts.shape == (8, min(p, K ** (H - 1)), H)
    for i in range(8):
        every = []
        for path in itertools.product(range(K), repeat=H - 1):
            places = (0, *path)
            tokens = [int(lattices.token_ids[i, slot, place]) for slot, place in enumerate(places)]
            score = sum(float(lattices.logps[i, slot, place]) for slot, place in enumerate(places))
            score += alpha * sum(float(left[a] @ right[b]) for a, b in itertools.pairwise(tokens))
            every.append((-score, tokens))
        assert drafts[i].tolist() == [tokens for _, tokens in sorted(every)[:p]]


@pytest.mark.parametrize("p", [1, 5])
def test_alpha_0_gives_the_unrescored_drafts(rescorer, p):
    lattices = lattices_at(2, 20)
    expected = load_rescorer("none").draft(lattices, contexts(20), p)
    found = rescorer.weighted(0.0).draft(lattices, contexts(20), p)
    assert (found == expected).all() and found.shape == expected.shape
    assert not (rescorer.draft(lattices, contexts(20), p) == expected).all()


def test_drafts_do_not_depend_on_their_batch(rescorer):
    lattices = lattices_at(3, 6)
    whole = rescorer.draft(lattices, contexts(6), 4)
    for i in range(6):
        alone = rescorer.draft(Lattice(lattices.token_ids[i : i + 1], lattices.logps[i : i + 1]), contexts(1), 4)
        assert (alone == whole[i : i + 1]).all()


def test_its_identity_is_that_of_its_weights(folder, rescorer, tmp_path):
    assert rescorer.identity == f"learned-bigram {load_bigram(folder).sha256}"
    assert rescorer.weighted(3.0).identity == rescorer.identity and rescorer.coverage(np.arange(9)) == 1.0


class TestRefusals:
    def test_another_base(self, folder, tmp_path):
        other = load_base(str(save_tiny_base(tmp_path / "other", seed=9)), device="cpu")
        with pytest.raises(IncompatibleError, match=r"was made for .*, not for .*; train one for it: rescore train-bi"):
            load_rescorer(f"learned-bigram:{folder}").fit(target(other))

    def test_an_adapter_of_its_base_is_served(self, folder, tiny_base, tmp_path):
        """Adapters leave the embeddings as they are; and of what it was made for it is enough to have the base."""
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        config = {"peft_type": "LORA", "base_model_name_or_path": tiny_base.identity.name}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        identity = dataclasses.replace(tiny_base.identity, name=str(adapter), weights_sha256="other")
        of_adapter = Target(tiny_base.vocab_size, (256,), tiny_base.identity.tokenizer_sha256, identity)
        lattices = lattices_at(1, 3)
        found = load_rescorer(f"learned-bigram:{folder}").fit(of_adapter).draft(lattices, contexts(3), 2)
        expected = load_rescorer(f"learned-bigram:{folder}").fit(target(tiny_base)).draft(lattices, contexts(3), 2)
        assert (found == expected).all()

    def test_a_trace_that_does_not_name_its_base(self, folder):
        with pytest.raises(IncompatibleError, match="does not name its base LM"):
            load_rescorer(f"learned-bigram:{folder}").fit(Target(257, (256,), None))

    def test_not_fitted(self, folder):
        with pytest.raises(RescoreError, match="must be fitted to a base LM first"):
            load_rescorer(f"learned-bigram:{folder}").draft(lattices_at(0, 1), contexts(1), 1)

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(RescoreError, match=r"no learned bigram in .*; train one: rescore train-bigram"):
            load_rescorer(f"learned-bigram:{tmp_path / 'none'}")

    def test_none_shipped(self, monkeypatch, tmp_path):
        monkeypatch.setattr(learned_bigram, "SHIPPED", tmp_path)
        with pytest.raises(RescoreError, match=r"no learned bigram in .*smollm2-135m.*; train one: rescore train-bi"):
            load_rescorer("learned-bigram")
