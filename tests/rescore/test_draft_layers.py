"""Draft layers: their lattices against the published arithmetic written out, and live decoding against replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from eagle_files import VOCABULARY, D, Reference, save_deep_base, save_eagle, tensors_of
from evaluating import evaluated, inputs_of, opened
from test_ngram_rescorer import bigram_model, save
from transformers import LlamaForCausalLM

from lattices.errors import IncompatibleError, InvalidDataError
from lm.base.catalog import load_base
from lm.base.model import BaseLM
from rescore.decoding import decode
from rescore.drafters import draft_layers
from rescore.drafters.draft_layers import Eagle
from rescore.generation.live import generate
from rescore.rescorers import Rescorer, Target, load_rescorer
from rescore.runs.evaluation import evaluate
from rescore.runs.recording import load_trace, record_task
from rescore.runs.records import Identical
from rescore.runs.run import Run
from rescore.runs.tuning import fit_joint
from rescore.specs import named

TOKENS, K = 4, 6
VERSIONS = {"eagle-1": False, "eagle-3": True}


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    return save_deep_base(tmp_path_factory.mktemp("models") / "deep")


@pytest.fixture(scope="module")
def base(deep) -> BaseLM:
    return load_base(str(deep), dtype="float64", device="cpu")


@pytest.fixture(scope="module")
def model(deep) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(deep)


@pytest.fixture(scope="module", params=VERSIONS)
def checkpoint(request, tmp_path_factory) -> tuple[str, dict[str, torch.Tensor]]:
    tensors = tensors_of(VERSIONS[request.param])
    return save_eagle(tmp_path_factory.mktemp("eagle") / request.param, tensors), tensors


def reference(model, tensors) -> Reference:
    return Reference(model, tensors, (2, 4, 5))


def target(base: BaseLM) -> Target:
    made = Target.of(base.identity, base.vocab_size, base.eos_token_ids, shared=base)
    object.__setattr__(made, "models", lambda: (base, None))
    return made


def assert_slots(lattice, slots: torch.Tensor, first: int, drafted: int = VOCABULARY) -> None:
    """A position's lattice `[h, k]` is the top k of these log-probs; slot 1 begins with the base's token."""
    slots = slots.numpy()
    order = np.argsort(-slots, axis=-1, kind="stable")
    highest = [first, *(token for token in order[0].tolist() if token != first)][:K]
    assert lattice.token_ids.tolist() == [highest, *order[1:, :K].tolist()]
    given = np.take_along_axis(slots[1:], order[1:, :K], axis=-1)
    np.testing.assert_allclose(lattice.logps[1:], given, rtol=1e-6, atol=1e-6)


def text_of(seed: int, prompt: int, output: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(256, size=prompt), rng.integers(256, size=output)


class TestArithmetic:
    @pytest.mark.parametrize(("prompt", "nodes"), [(1, 1024), (9, 1024), (6, TOKENS * 3)])
    def test_what_is_recorded_is_the_formula_position_by_position(
        self, base, model, checkpoint, monkeypatch, prompt, nodes
    ):
        folder, tensors = checkpoint
        monkeypatch.setattr(draft_layers, "NODES", nodes)
        drafter = Eagle(folder, tokens=TOKENS).fit(target(base))
        prompt_ids, output_ids = text_of(prompt, prompt, 8)
        lattice, entropies = drafter.record(prompt_ids, output_ids, K)
        lattice.validate(VOCABULARY)
        for i, first in enumerate(output_ids.tolist()):
            text = [*prompt_ids.tolist(), *output_ids[:i].tolist()]
            slots = reference(model, tensors).chain(text, first, TOKENS)
            assert_slots(lattice[i], slots, first)
            own = torch.special.entr(slots.exp()).sum(-1)
            np.testing.assert_allclose(entropies[i], own.numpy(), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("verify", ["tree", "batch"])
    @pytest.mark.parametrize("p", [1, 3])
    def test_what_is_drafted_live_is_what_is_recorded(self, base, checkpoint, p, verify):
        """Steps of all lengths: accepted chains, partly accepted ones, none."""
        drafter = Eagle(checkpoint[0], tokens=TOKENS).fit(target(base))
        drafter = named(drafter, "eagle:x")
        prompt = text_of(3, 12, 0)[0].tolist()
        greedy = decode(base, None, prompt, max_new_tokens=30).output_ids
        recorded, _ = drafter.record(np.array(prompt), np.array(greedy), K)
        asked: dict[int, object] = {}
        computed = drafter.computed

        def noted(contexts, firsts, k):
            lattices = computed(contexts, firsts, k)
            asked[len(contexts[0].output_ids)] = lattices[0]
            return lattices

        drafter.computed = noted
        rescorer = _Partly(greedy)
        decoded = decode(base, None, prompt, rescorer=rescorer, drafters=[drafter], k=K, p=p, max_new_tokens=30,
                         verify=verify)  # fmt: skip
        assert decoded.output_ids == greedy and max(decoded.accepted) > 2 and 1 in decoded.accepted
        for place, lattice in asked.items():
            assert lattice.token_ids.tolist() == recorded[place].token_ids.tolist()
            np.testing.assert_allclose(lattice.logps, recorded[place].logps, rtol=1e-9, atol=1e-9)


class _Partly(Rescorer):
    """Drafts of the real output, some steps wrong after a few tokens: chains are accepted to all lengths."""

    def __init__(self, output: list[int]) -> None:
        self.output = output

    def draft(self, lattices, contexts, p):
        place = len(contexts[0].output_ids)
        ahead = (self.output[place:] + [0] * TOKENS)[: 1 + TOKENS]
        right = np.array(ahead, dtype=np.int32)
        right[1 + place % TOKENS :] = 7
        drafts = np.broadcast_to(right, (p, len(right))).copy()
        drafts[:-1, 1:] = lattices.token_ids[0, 1:, : p - 1].T
        return drafts[None]


@torch.inference_mode()
def nearly_right(model, tensors, said):
    """The tensors changed so that what they draft in these outputs, each after its prompt, is often right."""
    third, known, right = "norm.weight" in tensors, [], []
    reference = Reference(model, tensors)
    for prompt, output in said:
        text, begin = [*prompt, *output], len(prompt) - 1
        hidden = model.double()(torch.tensor([text]), output_hidden_states=True).hidden_states
        if third:
            states = torch.cat([hidden[layer][0, :-2] for layer in (2, 4, 5)], dim=-1)
            after = reference.after(text[1:-1], reference.linear(states, "fc"))
            known.append(reference.norm(after, "norm")[begin:])
            right.append(torch.nn.functional.one_hot(torch.tensor(output[1:]), VOCABULARY).double())
        else:
            embedded = tensors["embed_tokens.weight"].double()[output[:-1]]
            known.append(torch.cat([embedded, hidden[-1][0, begin:-2]], dim=-1))
            right.append(hidden[-1][0, begin + 1 : -1])
    fitted = torch.linalg.lstsq(torch.cat(known), torch.cat(right)).solution.T.float()
    if third:
        return {**tensors, "lm_head.weight": 20 * fitted[torch.arange(200) + tensors["d2t"]]}
    little = {name: 0.02 * value for name, value in tensors.items() if "o_proj" in name or "down_proj" in name}
    return {**tensors, **little, "fc.weight": fitted, "fc.bias": torch.zeros(D)}


def test_without_such_drafters_nothing_is_noted(base):
    cache = base.new_cache(8)
    base.forward(torch.tensor([[1, 2, 3]]), cache)
    assert cache.states is None
    noting = base.new_cache(8, (3,))
    base.forward(torch.tensor([[1, 2, 3]]), noting)
    noting.keep([0, 1])
    assert noting.states.since((3,), 1).shape == (1, D)
    modules = list(base.model.modules())
    assert not any(m._forward_hooks for m in modules) and sum(len(m._forward_pre_hooks) for m in modules) == 1


class TestRuns:
    @pytest.fixture
    def options(self, deep, squad_file):
        return dict(base=str(deep), data=str(squad_file), dtype="float64", device="cpu", k=8, max_new_tokens=16)

    def test_replay_equals_live(self, options, model, checkpoint, tmp_path):
        """Alone, rescored, beside copied text, and in the joined lattice."""
        (recording,) = opened(options, heads_needed=False)
        said = [(e.prompt_ids.tolist(), e.output_ids.tolist()) for e in recording.trace().examples]
        folder = save_eagle(tmp_path / "fitted", nearly_right(model, checkpoint[1], said))
        spec = f"eagle:{folder},tokens=3"
        both = (spec, "lookup")
        ngram = str(save(tmp_path / "ngram", bigram_model()))
        fit_joint([recording], tmp_path / "w", f"joint:ngram={ngram}", drafters=both, k=8, held_out=2)
        chosen = [("none", (spec,)), (f"context-ngram:{ngram}", (spec,)), ("none", both), ("oracle", both),
                  (f"joint:{tmp_path / 'w'},ngram={ngram}", both)]  # fmt: skip
        runs = [Run(name, p=2, k=8, drafters=of, label=f"run {i}") for i, (name, of) in enumerate(chosen)]
        replayed, live = (evaluate([recording], runs, live=live) for live in (False, True))
        assert {r.identical for r in live} == {Identical(n=6, identical=6)} and len(live.results) == len(runs)
        assert [r.accepted_histogram for r in live] == [r.accepted_histogram for r in replayed]
        accepted = {(e.rescorer, e.id): (e.accepted, e.origins) for e in replayed.examples}
        assert {(e.rescorer, e.id): (e.accepted, e.origins) for e in live.examples} == accepted
        assert len({round(r.block_efficiency, 9) for r in replayed}) > 2, "they do not all draft the same"
        assert replayed.results[0].block_efficiency > 1.3, "something is accepted"

    def test_a_prompt_is_generated_with(self, base, checkpoint):
        run = Run("none", drafters=(f"eagle:{checkpoint[0]}",), k=8, p=4)
        output = generate(base, None, "In 1900 the bridge", rescorer=run, max_new_tokens=20, chat=False)
        greedy = decode(base, None, base.encode_prompt("In 1900 the bridge", chat=False), max_new_tokens=20)
        assert output.token_ids == greedy.output_ids

    def test_its_trace_is_replayed(self, options, checkpoint, tmp_path):
        spec = f"eagle:{checkpoint[0]},tokens=3"
        record_task(inputs_of(options), spec, tmp_path / "drafts", k=8)
        of_trace = evaluated({"trace": str(tmp_path / "drafts"), "rescorers": ("none",), "k": 8})
        (recording,) = opened(options, heads_needed=False)
        own = evaluate([recording], [Run("none", k=8, drafters=(spec,))])
        assert [r.accepted_histogram for r in of_trace] == [r.accepted_histogram for r in own]
        with_layers = Run("none", k=8, drafters=(spec,))
        refused(
            lambda: evaluate([load_trace(tmp_path / "drafts", k=8)], [with_layers]), "states inside", "drop --trace"
        )


class TestLayouts:
    def lattice(self, base, folder, **how):
        drafter = Eagle(folder, tokens=2, **how).fit(target(base))
        return drafter.record(*text_of(1, 5, 4), K)[0]

    def same(self, one, other) -> bool:
        return bool((one.token_ids == other.token_ids).all() and np.allclose(one.logps, other.logps, atol=1e-6))

    def test_pickles_and_the_other_name_of_the_layer(self, base, checkpoint, tmp_path):
        folder, tensors = checkpoint
        renamed = {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}
        whole = self.lattice(base, folder)
        assert self.same(self.lattice(base, save_eagle(tmp_path / "a", tensors, pickled=True)), whole)
        assert self.same(self.lattice(base, save_eagle(tmp_path / "b", renamed)), whole)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_on_disk(self, base, checkpoint, tmp_path, dtype):
        halved = {n: v.to(dtype) if v.is_floating_point() else v for n, v in checkpoint[1].items()}
        widened = {n: v.float() if v.is_floating_point() else v for n, v in halved.items()}
        folders = (save_eagle(tmp_path / name, each) for name, each in (("half", halved), ("wide", widened)))
        assert self.same(*(self.lattice(base, folder) for folder in folders))

    def test_the_bases_embeddings_where_there_are_none(self, base, model, checkpoint, tmp_path):
        own = {**checkpoint[1], "embed_tokens.weight": model.model.embed_tokens.weight.data.float()}
        shared = {name: value for name, value in own.items() if name != "embed_tokens.weight"}
        folders = (save_eagle(tmp_path / name, each) for name, each in (("own", own), ("shared", shared)))
        assert self.same(*(self.lattice(base, folder) for folder in folders))

    def test_biases_of_attention_and_none_of_fc(self, base, model, tmp_path):
        tensors = tensors_of(False)
        del tensors["fc.bias"]
        for name, rows in zip("qkv", (32, 16, 16), strict=True):
            tensors[f"layers.0.self_attn.{name}_proj.bias"] = torch.linspace(-1, 1, rows)
        drafter = Eagle(save_eagle(tmp_path, tensors), tokens=TOKENS).fit(target(base))
        lattice, _ = drafter.record(*text_of(2, 6, 1), K)
        first = int(text_of(2, 6, 1)[1][0])
        assert_slots(lattice[0], Reference(model, tensors).chain(text_of(2, 6, 1)[0].tolist(), first, TOKENS), first)

    def test_eagle_3_with_a_whole_vocabulary_and_named_layers(self, base, model, tmp_path):
        tensors = tensors_of(True, drafted=VOCABULARY)
        del tensors["d2t"], tensors["t2d"]
        folder = save_eagle(tmp_path, tensors, eagle_aux_hidden_state_layer_ids=[1, 3, 7])
        lattice, _ = Eagle(folder, tokens=TOKENS).fit(target(base)).record(*text_of(2, 6, 1), K)
        first = int(text_of(2, 6, 1)[1][0])
        slots = Reference(model, tensors, (1, 3, 7)).chain(text_of(2, 6, 1)[0].tolist(), first, TOKENS)
        assert_slots(lattice[0], slots, first)

    def test_fewer_drafted_tokens_than_entries(self, base, tmp_path):
        folder = save_eagle(tmp_path, tensors_of(True, drafted=3))
        refused(lambda: Run("none", k=8, drafters=(f"eagle:{folder}",)).load_drafters(load_rescorer("none")),
                "holds the top 3 of each slot")  # fmt: skip


def without(tensors, *names):
    return {name: value for name, value in tensors.items() if name not in names}


class TestRefusals:
    def test_files(self, tmp_path):
        refused(lambda: Eagle(), "write eagle:FOLDER")
        refused(lambda: Eagle(str(tmp_path)), "no EAGLE checkpoint in", "hf download")
        (tmp_path / "config.json").write_text("{}")
        refused(lambda: Eagle(str(tmp_path)), "has no model.safetensors or pytorch_model.bin")
        folder = save_eagle(tmp_path / "pickle", {"fc.weight": _Code()}, pickled=True)
        refused(lambda: Eagle(folder), InvalidDataError, "may be code")
        folder = save_eagle(tmp_path / "heads", tensors_of(False), num_attention_heads="four")
        refused(lambda: Eagle(folder), InvalidDataError, "is no configuration of a Llama layer")
        later = save_eagle(tmp_path / "later", tensors_of(True), norm_output=True)
        refused(lambda: Eagle(later), IncompatibleError, "its norm_output is set")
        for tokens in (0, 65):
            refused(lambda tokens=tokens: Eagle(folder, tokens=tokens))

    @pytest.mark.parametrize(
        ("third", "change", "said"),
        [
            (False, lambda t: without(t, "fc.weight"), "fc.weight is missing"),
            (True, lambda t: without(t, "d2t"), "d2t is missing"),
            (True, lambda t: without(t, "norm.weight"), "norm.weight is missing"),
            (False, lambda t: {**t, "layers.1.mlp.up_proj.weight": torch.zeros(2, 2)}, "no EAGLE checkpoint read here"),
            (False, lambda t: {**t, "fc.weight": torch.zeros(32, 96)}, "fc.weight has shape [32, 96], not [32, 64]"),
            (True, lambda t: {**t, "midlayer.self_attn.q_proj.weight": torch.zeros(32, 32)}, "not [32, 64]"),
            (True, lambda t: {**t, "d2t": t["d2t"][:5]}, "d2t has shape [5], not [200]"),
        ],
    )
    def test_tensors(self, tmp_path, third, change, said):
        folder = save_eagle(tmp_path, change(tensors_of(third)))
        refused(lambda: Eagle(folder), InvalidDataError, said)

    @pytest.mark.parametrize(("moved", "said"), [(90, "that the base's 257 do not have"), (-1, "a token twice")])
    def test_vocabulary_maps(self, base, tmp_path, moved, said):
        tensors = tensors_of(True)
        tensors["d2t"] = torch.zeros(200, dtype=torch.int64)
        tensors["d2t"][-1] = moved
        drafter = Eagle(save_eagle(tmp_path, tensors), tokens=2).fit(target(base))
        refused(lambda: drafter.record(*text_of(1, 5, 4), K), InvalidDataError, said)

    def test_files_that_were_replaced_meanwhile(self, base, tmp_path):
        drafter = Eagle(save_eagle(tmp_path, tensors_of(False)), tokens=2).fit(target(base))
        save_eagle(tmp_path, tensors_of(False, seed=6))
        refused(lambda: drafter.record(*text_of(1, 5, 4), K), IncompatibleError, "were replaced while they were read")

    def test_the_identity_tells_weights_tokens_and_configurations_apart(self, tmp_path):
        folders = [save_eagle(tmp_path / str(seed), tensors_of(False, seed=seed)) for seed in (5, 6)]
        folders.append(save_eagle(tmp_path / "theta", tensors_of(False), rope_theta=500.0))
        assert len({Eagle(folder, tokens=tokens).identity for folder in folders for tokens in (2, 3)}) == 6

    def test_another_base(self, base, tiny_base, tmp_path):
        wide = save_eagle(tmp_path / "wide", tensors_of(False, d=16), hidden_size=16)
        refused(lambda: Eagle(wide).fit(target(base)), IncompatibleError, "hidden_size is 16, the base's is 32")
        wide = save_eagle(tmp_path / "wide-3", tensors_of(True, base=16))
        refused(lambda: Eagle(wide).fit(target(base)), IncompatibleError, "hidden_size is 16, the base's is 32")
        words = {**tensors_of(False), "embed_tokens.weight": torch.zeros(300, D)}
        fewer = save_eagle(tmp_path / "words", words)
        refused(lambda: Eagle(fewer).fit(target(base)), IncompatibleError, "vocab_size is 300, the base's is 257")
        third = save_eagle(tmp_path / "third", tensors_of(True))
        refused(lambda: Eagle(third).fit(target(tiny_base)), IncompatibleError, "has 2 layers: too few for EAGLE-3")
        named = save_eagle(tmp_path / "named", tensors_of(True), eagle_aux_hidden_state_layer_ids=[1, 2, 8])
        drafter = Eagle(named, tokens=2).fit(target(base))
        refused(lambda: drafter.record(*text_of(1, 5, 4), K), IncompatibleError, "has 8 layers", "1, 2, 8")
        named = save_eagle(tmp_path / "two", tensors_of(True), eagle_aux_hidden_state_layer_ids=[1, 2])
        refused(lambda: Eagle(named), InvalidDataError, "are not three layers")


class _Code:
    def __reduce__(self):
        return print, ("code",)
