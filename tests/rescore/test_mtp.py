"""Multi-token prediction layers of the base's own files: their formula, live decoding against replay, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from evaluating import opened
from mtp_files import FAMILIES, VOCABULARY, MtpReference, save_with_mtp
from safetensors.torch import load_file, save_file
from test_draft_layers import K, assert_slots, target, text_of

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm.base.catalog import load_base
from rescore.drafters.draft_layers import Mtp
from rescore.rescorers import Target
from rescore.runs.evaluation import evaluate
from rescore.runs.records import Identical
from rescore.runs.run import Run

FILE = "model.safetensors"
TOKENS = 4


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return request.param, save_with_mtp(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def base(family):
    return load_base(str(family[1]), dtype="float64", device="cpu")


def test_what_is_recorded_is_the_formula_position_by_position(family, base):
    drafter = Mtp(tokens=TOKENS).fit(target(base))
    reference = MtpReference(family[1], family[0])
    prompt_ids, output_ids = text_of(4, 7, 6)
    lattice, _ = drafter.record(prompt_ids, output_ids, K)
    lattice.validate(VOCABULARY)
    for i, first in enumerate(output_ids.tolist()):
        text = [*prompt_ids.tolist(), *output_ids[:i].tolist()]
        assert_slots(lattice[i], reference.chain(text, first, TOKENS), first)


def test_replay_equals_live(family, squad_file):
    options = dict(base=str(family[1]), data=str(squad_file), dtype="float64", device="cpu", k=8, max_new_tokens=12)
    (recording,) = opened(options, heads_needed=False)
    runs = [Run("none", p=3, k=8, drafters=("mtp",)), Run("oracle", k=8, drafters=("mtp", "lookup"))]
    replayed, live = (evaluate([recording], runs, live=live) for live in (False, True))
    assert {r.identical for r in live} == {Identical(n=6, identical=6)}
    assert [r.accepted_histogram for r in live] == [r.accepted_histogram for r in replayed]
    assert any(n > 1 for e in live.examples for n in e.accepted)


def changed(folder: Path, source: Path, change) -> str:
    """A folder with the same tensors, changed."""
    folder.mkdir()
    save_file(change(load_file(source / FILE)), folder / FILE)
    return str(folder)


P = "model.layers.2."


class TestFiles:
    def test_a_folder_beside_the_base(self, family, base, tmp_path):
        """With the layer alone, in half precision, and without copies of what the base has."""
        only = changed(tmp_path / "only", family[1], lambda t: {
            n: v.half() for n, v in t.items() if n.startswith(P) and "embed" not in n and "head.head" not in n
        })  # fmt: skip
        wide = changed(tmp_path / "wide", family[1], lambda t: {
            n: v.half().float() if n.startswith(P) and "embed" not in n and "head.head" not in n else v
            for n, v in t.items()
        })  # fmt: skip
        one, other = (Mtp(f, tokens=2).fit(target(base)).record(*text_of(4, 7, 6), K)[0] for f in (only, wide))
        assert one.token_ids.tolist() == other.token_ids.tolist() and np.allclose(one.logps, other.logps)

    def test_embeddings_and_head_of_its_own(self, family, base, tmp_path):
        own = changed(tmp_path / "own", family[1], lambda t: {
            **t, f"{P}embed_tokens.weight": t[f"{P}embed_tokens.weight"].flip(0),
            f"{P}shared_head.head.weight": t[f"{P}shared_head.head.weight"].flip(0).contiguous(),
        })  # fmt: skip
        reference = MtpReference(family[1], family[0])
        for name in ("embed_tokens.weight", "shared_head.head.weight"):
            reference.w[name] = reference.w[name].flip(0)
        prompt_ids, output_ids = text_of(4, 7, 1)
        lattice, _ = Mtp(own, tokens=TOKENS).fit(target(base)).record(prompt_ids, output_ids, K)
        first = int(output_ids[0])
        assert_slots(lattice[0], reference.chain(prompt_ids.tolist(), first, TOKENS), first)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda t: {n: v for n, v in t.items() if n != f"{P}enorm.weight"}, "enorm.weight is missing"),
            (lambda t: {n: v for n, v in t.items() if "experts.3.up" not in n}, "experts.3.up_proj.weight is missing"),
            (lambda t: {**t, f"{P}extra.weight": torch.zeros(2)}, "due is no such tensor"),
            (lambda t: {**t, f"{P}self_attn.o_proj.weight": torch.zeros(3, 2)}, "is [3, 2], due is [32, 32]"),
            (lambda t: {**t, f"{P}shared_head.head.weight": torch.zeros(9, 32)}, "is [9, 32], due is [257, 32]"),
        ],
    )
    def test_tensors_that_do_not_fit(self, family, base, tmp_path, change, said):
        drafter = Mtp(changed(tmp_path / "bad", family[1], change)).fit(target(base))
        refused(lambda: drafter.record(*text_of(4, 7, 6), K), InvalidDataError, said)

    def test_folders_without_one_layer(self, family, tmp_path):
        refused(lambda: Mtp(str(tmp_path)), RescoreError, "has no *.safetensors or *.bin")
        none = changed(tmp_path / "none", family[1], lambda t: {n: v for n, v in t.items() if not n.startswith(P)})
        refused(lambda: Mtp(none), RescoreError, "no tensor is called model.layers.N.eh_proj.weight")
        two = changed(
            tmp_path / "two", family[1], lambda t: {**t, "model.layers.3.eh_proj.weight": torch.zeros(32, 64)}
        )
        refused(lambda: Mtp(two), IncompatibleError, "has 2 MTP layers")
        odd = changed(tmp_path / "odd", family[1], lambda t: {**t, f"{P}eh_proj.weight": torch.zeros(32, 32)})
        refused(lambda: Mtp(odd), InvalidDataError, "not [d, 2 d]")

    def test_another_base(self, family, base, tiny_base, tmp_path):
        refused(lambda: Mtp().fit(target(tiny_base)), RescoreError, "no MTP layer in", "give the folder of a base")
        refused(lambda: Mtp().fit(Target(257, (), None)), RescoreError, "the trace does not name its base")
        drafter = Mtp(str(family[1])).fit(target(tiny_base))
        refused(lambda: drafter.record(*text_of(4, 7, 6), K), IncompatibleError, "no MTP layer is known of")
        later = changed(
            tmp_path / "later", family[1], lambda t: {n.replace(P, "model.layers.61."): v for n, v in t.items()}
        )
        refused(lambda: Mtp(later).fit(target(base)), IncompatibleError, "comes after 61 layers", "has 2")
        wide = changed(tmp_path / "wide", family[1], lambda t: {**t, f"{P}eh_proj.weight": torch.zeros(16, 32)})
        refused(lambda: Mtp(wide).fit(target(base)), IncompatibleError, "hidden_size is 16, the base's is 32")
