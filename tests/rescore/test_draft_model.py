"""Draft models: their chains against transformers' own greedy loop, and what is recorded against what live gives."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, refused, save_tiny_base
from transformers import LlamaForCausalLM

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lattices.lattice import Lattice
from lm.base.model import BaseLM
from lm.neural.model import DeltaConfig, save_delta, some_layers
from rescore.drafters import draft_model
from rescore.drafters.draft_model import DraftModel
from rescore.rescorers import Context, Target

END, VOCABULARY, TOKENS, K = 256, 257, 4, 6


def changed(folder: Path, change) -> str:
    """A tiny model, in the folder, with `change` made to its embeddings (which are its projection as well)."""
    save_tiny_base(folder, seed=7, hidden_size=16)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A draft model that says the end of text now and then."""

    def change(model) -> None:
        model.model.embed_tokens.weight[END] *= 1.7

    return changed(tmp_path_factory.mktemp("models") / "draft", change)


def target(tiny: BaseLM, **changes) -> Target:
    given = dict(vocab_size=tiny.vocab_size, tokenizer_sha256=tiny.identity.tokenizer_sha256, base=tiny.identity)
    return Target(eos_token_ids=(END,), **{**given, **changes})


@pytest.fixture
def draft(tiny_base, folder) -> DraftModel:
    return DraftModel(folder, tokens=TOKENS).fit(target(tiny_base))


def naive(folder: str, text: list[int], first: int, tokens: int, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Log-probs `[1 + tokens, vocabulary]` of slots: a greedy loop with whole forwards of transformers, no cache."""
    model = LlamaForCausalLM.from_pretrained(folder).double()
    slots = []
    for place in range(1 + tokens):
        with torch.inference_mode():
            logits = model(torch.tensor([text])).logits[0, -1, :vocabulary]
        slots.append(torch.log_softmax(logits, dim=-1).numpy())
        text = [*text, first if place == 0 else int(slots[-1].argmax())]
    return np.stack(slots)


def texts(seed: int, lengths: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """Prompts and outputs of these lengths."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(256, size=n).tolist(), rng.integers(256, size=t).tolist()) for n, t in lengths]


def followed(draft: DraftModel, prompt: list[int], tokens: int, seed: int) -> list[int]:
    """An output that goes along with the draft model's chains for a while and then says something else, repeatedly."""
    rng = np.random.default_rng(seed)
    output: list[int] = []
    while len(output) < tokens:
        first = int(rng.integers(256))
        chain = draft.computed([Context(prompt, list(output))], np.array([first]), 1).token_ids[0, 1:, 0]
        output += [first, *chain[: rng.integers(TOKENS + 1)].tolist()]
    return output[:tokens]


def walked(draft: DraftModel, examples, k: int, seed: int = 0) -> list[dict[int, Lattice]]:
    """The lattices at the positions of walks side by side, in steps of any length."""
    rng = np.random.default_rng(seed)
    contexts = [Context(prompt) for prompt, _ in examples]
    draft.prefill(contexts)
    found: list[dict[int, Lattice]] = [{} for _ in examples]
    while walking := [i for i, c in enumerate(contexts) if len(c.output_ids) < len(examples[i][1])]:
        firsts = np.array([examples[i][1][len(contexts[i].output_ids)] for i in walking])
        lattices = draft.computed([contexts[i] for i in walking], firsts, k)
        assert lattices.token_ids.shape == (len(walking), 1 + draft.tokens, k)
        for row, i in enumerate(walking):
            at = len(contexts[i].output_ids)
            found[i][at] = lattices[row]
            contexts[i].output_ids += examples[i][1][at : at + int(rng.integers(1, draft.tokens + 3))]
    return found


def assert_same(recorded: Lattice, live: dict[int, Lattice], *, within: float = 1e-9) -> None:
    for position, lattice in live.items():
        assert recorded[position].token_ids.tolist() == lattice.token_ids.tolist()
        np.testing.assert_allclose(recorded[position].logps, lattice.logps, rtol=within, atol=within)


class TestLattices:
    @pytest.mark.parametrize("tokens", [1, 2, 5])
    def test_a_chain_is_the_models_own_greedy_text_after_the_bases_token(self, tiny_base, folder, tokens):
        fitted = DraftModel(folder, tokens=tokens).fit(target(tiny_base))
        contexts = [Context(prompt, output) for prompt, output in texts(1, [(1, 0), (9, 4), (20, 1)])]
        own = [int(naive(folder, [*c.prompt_ids, *c.output_ids], 0, 0)[0].argmax()) for c in contexts]
        for firsts in (own, [5, 77, 200], [END, END, own[2]]):
            lattices = fitted.computed(contexts, np.array(firsts), K)
            lattices.validate(VOCABULARY)
            for i, context in enumerate(contexts):
                slots = naive(folder, [*context.prompt_ids, *context.output_ids], firsts[i], tokens)
                order = np.argsort(-slots, axis=-1, kind="stable")
                highest = [firsts[i], *(token for token in order[0].tolist() if token != firsts[i])][:K]
                assert lattices.token_ids[i].tolist() == [highest, *order[1:, :K].tolist()]
                given = np.take_along_axis(slots, order[:, :K], axis=-1)
                np.testing.assert_allclose(lattices.logps[i, 1:], given[1:], atol=1e-6)
                # Those of slot 1 don't rise: the base's token has at least the highest of the others.
                others = slots[0][highest[1:]]
                np.testing.assert_allclose(
                    lattices.logps[i, 0], [max(slots[0][highest[0]], others[0]), *others], atol=1e-6
                )

    def test_a_chain_goes_on_behind_end_of_text(self, draft, folder):
        inside = 0
        for prompt, (first, *_) in texts(2, [(5, 1)] * 12):
            chain = draft.computed([Context(prompt)], np.array([first]), 1).token_ids[0, :, 0]
            inside += END in chain[1:-1]
            assert chain[1:].tolist() == naive(folder, prompt, first, TOKENS)[1:].argmax(-1).tolist()
        assert inside

    def test_equal_tokens_stand_by_lowest_id(self, tiny_base, tmp_path):
        def change(model) -> None:
            model.model.embed_tokens.weight[[5, 9]] = model.model.embed_tokens.weight[[END, END]]

        fitted = DraftModel(changed(tmp_path / "ties", change)).fit(target(tiny_base))
        slots = fitted.computed([Context([1, 2, 3])], np.array([4]), VOCABULARY).token_ids[0]
        for slot in slots.tolist():
            place = slot.index(5)
            assert slot[place : place + 2] == [5, 9]

    @pytest.mark.parametrize("k", [1, VOCABULARY])
    def test_the_fewest_and_the_most_entries(self, draft, k):
        (example,) = texts(3, [(7, 9)])
        recorded = draft.record(*example, k)[0]
        recorded.validate(VOCABULARY)
        assert recorded.token_ids[:, 0, 0].tolist() == example[1]
        assert_same(recorded, walked(draft, [example], k)[0])

    def test_k_beyond_the_vocabulary(self, draft):
        for k in (0, VOCABULARY + 1):
            refused(lambda k=k: draft.computed([Context([1])], np.array([2]), k), "--k")
            refused(lambda k=k: draft.record([1], [2], k)[0], "--k")

    def test_no_examples_and_no_output(self, draft):
        assert draft.computed([], np.zeros(0, dtype=np.int32), K).token_ids.shape == (0, 1 + TOKENS, K)
        assert draft.record([1, 2], [], K)[0].token_ids.shape == (0, 1 + TOKENS, K)

    def test_weights_that_are_not_finite(self, tiny_base, tmp_path):
        """As half precision gives where a state overflows; a model that always does is refused when it is loaded."""
        folder = changed(tmp_path / "nan", lambda model: model)
        fitted = DraftModel(folder).fit(target(tiny_base))
        fitted.model.load().model.model.get_input_embeddings().weight[3] = float("nan")
        refused(lambda: fitted.record([1], [2], K)[0], InvalidDataError, folder, "not finite")


class TestRecorded:
    @pytest.mark.parametrize("seed", range(3))
    def test_a_walk_finds_the_recorded_lattices(self, draft, seed):
        """Several examples side by side, of which some leave; steps of any length, on the chain or not."""
        examples = [(prompt, followed(draft, prompt, t, seed)) for t, (prompt, _) in zip(
            (30, 17, 5, 40), texts(seed, [(12, 0), (3, 0), (1, 0), (60, 0)]), strict=True
        )]  # fmt: skip
        for example, live in zip(examples, walked(draft, examples, K, seed), strict=True):
            recorded = draft.record(*example, K)[0]
            recorded.validate(VOCABULARY)
            assert recorded.token_ids[:, 0, 0].tolist() == example[1]
            assert_same(recorded, live)

    @pytest.mark.parametrize("nodes", [1, 3 * TOKENS, 64 * TOKENS])
    def test_whatever_is_read_at_a_time(self, draft, folder, monkeypatch, nodes):
        (prompt, output), *_ = texts(4, [(11, 10)])
        monkeypatch.setattr(draft_model, "NODES", nodes)
        monkeypatch.setattr(draft_model, "LOGIT_ROWS", nodes)
        recorded = draft.record(np.array(prompt), np.array(output), 1)[0]
        for i, first in enumerate(output):
            slots = naive(folder, [*prompt, *output[:i]], first, TOKENS)
            assert recorded.token_ids[i, :, 0].tolist() == [first, *slots[1:].argmax(-1).tolist()]
            np.testing.assert_allclose(recorded.logps[i, :, 0], slots.max(-1), atol=1e-6)

    def test_in_single_precision(self, tiny_base, folder):
        single = target(tiny_base, base=None)
        fitted = DraftModel(folder, tokens=TOKENS).fit(single)
        (example,) = texts(5, [(9, 12)])
        assert_same(fitted.record(*example, K)[0], walked(fitted, [example], K)[0], within=1e-4)

    @pytest.mark.parametrize("nodes", [1, 64 * TOKENS])
    def test_without_a_prompt_nothing_is_known_of_the_first_token(self, draft, folder, monkeypatch, nodes):
        monkeypatch.setattr(draft_model, "NODES", nodes)
        output = texts(6, [(0, 8)])[0][1]
        recorded = draft.record([], output, K)[0]
        assert recorded.token_ids[0, 0].tolist() == [output[0], 0, 1, 2, 3, 4]
        np.testing.assert_allclose(recorded.logps[0, 0], -np.log(VOCABULARY))
        for i in range(1, len(output)):
            slots = naive(folder, output[:i], output[i], TOKENS)
            assert recorded.token_ids[i, 1:, 0].tolist() == slots[1:].argmax(-1).tolist()
        both = [([], output), texts(7, [(6, 8)])[0]]
        assert_same(recorded, walked(draft, both, K)[0])

    def test_up_to_the_end_of_the_context(self, draft):
        """Chains go on beyond it, where nothing can be accepted any more."""
        prompt, output = texts(8, [(500, 12)])[0]
        live = walked(draft, [(prompt, output)], K)[0]
        assert_same(draft.record(prompt, output, K)[0], live)
        refused(
            lambda: draft.record([*prompt, 1, 2], output, K)[0], "514 tokens exceed", "(512)", "--max-prompt-tokens"
        )
        refused(lambda: draft.prefill([Context(prompt * 2)]), "1000 tokens exceed", "--max-prompt-tokens")


class TestTheCache:
    def test_what_was_accepted_of_a_chain_is_not_read_again(self, draft):
        lm, context = draft.model.load(), Context([1, 2, 3, 4, 5, 6, 7])
        draft.prefill([context])
        before = lm.tokens_read
        assert before
        for accepted in (1, 2, TOKENS, TOKENS + 1):
            before = lm.tokens_read
            chain = draft.computed([context], np.array([9]), K).token_ids[0, :, 0].tolist()
            # The token before the base's and the base's (and of a chain that was accepted whole the last, unread
            # one), then all of the chain but the last token.
            assert lm.tokens_read - before == 2 + TOKENS - 1
            context.output_ids += chain[:accepted]
        draft.computed([context], np.array([9]), K)

    def test_the_same_question_twice(self, draft):
        context = Context([1, 2, 3], [4])
        one, other = (draft.computed([context], np.array([first]), K) for first in (7, 8))
        assert_same(draft.record([1, 2, 3], [4, 8], K)[0], {1: other[0]})
        assert_same(draft.record([1, 2, 3], [4, 7], K)[0], {1: one[0]})

    def test_two_lengths_of_chains_follow_the_same_example(self, tiny_base, folder, draft):
        longer = DraftModel(folder, tokens=TOKENS + 3).fit(target(tiny_base))
        context = Context([1, 2, 3])
        short, long = draft.computed([context], np.array([7]), K), longer.computed([context], np.array([7]), K)
        assert long.token_ids[:, : 1 + TOKENS].tolist() == short.token_ids.tolist()
        assert len({draft.identity, longer.identity}) == 2 and longer.model.load() is draft.model.load()


class TestVocabularies:
    def test_a_model_with_more_tokens_is_cut(self, tiny_base, tmp_path):
        def change(model) -> None:
            model.resize_token_embeddings(300)
            model.model.embed_tokens.weight[VOCABULARY:] *= 100  # it would say nothing else

        folder = changed(tmp_path / "padded", change)
        fitted = DraftModel(folder, tokens=2).fit(target(tiny_base))
        lattice = fitted.computed([Context([1, 2, 3])], np.array([4]), VOCABULARY)
        lattice.validate(VOCABULARY)
        np.testing.assert_allclose(np.exp(lattice.logps[0, 1:].astype(np.float64)).sum(-1), 1, atol=1e-5)
        slots = naive(folder, [1, 2, 3], 4, 2)
        assert lattice.token_ids[0, 1:, 0].tolist() == slots[1:].argmax(-1).tolist()

    def test_a_base_with_more_tokens_than_the_tokenizer(self, tiny_base, folder):
        """As models of one family have that are padded to different sizes."""
        fitted = DraftModel(folder, tokens=2).fit(target(tiny_base, vocab_size=300))
        lattice = fitted.computed([Context([1, 2, 3])], np.array([4]), VOCABULARY)
        assert lattice.token_ids.max() == END
        refused(lambda: fitted.record([1], [2], 300)[0], "vocabulary's 257")
        example = ([1, 299, 2], [3, 280, 5, 6])  # which no base says; but a prompt of one's own can hold it
        recorded = fitted.record(*example, K)[0]
        recorded.validate(300)
        assert_same(recorded, walked(fitted, [example], K)[0])

    def test_a_model_that_lacks_tokens_of_its_tokenizer(self, tiny_base, tmp_path):
        folder = changed(tmp_path / "short", lambda model: model.resize_token_embeddings(250))
        message = refused(lambda: DraftModel(folder).fit(target(tiny_base)), IncompatibleError)
        assert folder in message and "knows 250 tokens, fewer than the 257" in message


def save_layers(base: BaseLM, folder: Path, **changes) -> str:
    """A delta of the tiny base: its first layer, changed."""
    identity = base.identity
    given = dict(base_name=identity.name, base_weights_sha256=identity.weights_sha256)
    config = DeltaConfig(
        size="neural-32m",
        layers=(0,),
        tuned_layers=1,
        tokenizer_sha256=identity.tokenizer_sha256,
        **{**given, **changes},
    )
    cut = some_layers(identity.name, [0])
    name = "model.layers.0.mlp.down_proj.weight"
    torch.manual_seed(1)
    weight = cut.model.get_parameter(name)
    weight.copy_(torch.randn(weight.shape))
    save_delta(cut.model, [name], config, folder)
    return str(folder)


class TestModels:
    def test_a_delta_of_the_base(self, tiny_base, tmp_path):
        fitted = DraftModel(save_layers(tiny_base, tmp_path / "delta"), tokens=3).fit(
            target(tiny_base, shared=tiny_base)
        )
        (example,) = texts(9, [(8, 15)])
        assert_same(fitted.record(*example, K)[0], walked(fitted, [example], K)[0])

    def test_the_base_itself_says_what_it_says(self, tiny_base, tiny_folder):
        fitted = DraftModel(str(tiny_folder), tokens=3).fit(target(tiny_base))
        output = naive(str(tiny_folder), [1, 2, 3], int(naive(str(tiny_folder), [1, 2, 3], 0, 0).argmax()), 6).argmax(
            -1
        )
        recorded = fitted.record([1, 2, 3], output.tolist(), 1)[0]
        assert recorded.token_ids[0, :, 0].tolist() == output[:4].tolist()

    def test_the_identity_tells_weights_and_tokens_apart(self, folder, tmp_path):
        other = changed(tmp_path / "other", lambda model: model.model.embed_tokens.weight.mul_(2))
        kinds = {DraftModel(f, tokens=t).identity for f in (folder, other) for t in (4, 8)}
        assert len(kinds) == 4 and DraftModel(folder).identity == DraftModel(folder, tokens=8).identity


class TestRefusals:
    def test_another_tokenizer(self, tiny_base, folder):
        other = dataclasses.replace(tiny_base.identity, tokenizer_sha256="0" * 64)
        message = refused(lambda: DraftModel(folder).fit(target(tiny_base, base=other)), IncompatibleError)
        assert f"the draft model {folder} needs the tokenizer it was made for" in message
        unnamed = target(tiny_base, base=None, tokenizer_sha256="0" * 64)
        message = refused(lambda: DraftModel(folder).fit(unnamed), IncompatibleError)
        assert f"the draft model {folder} has another tokenizer" in message

    def test_a_tokenizer_of_its_own(self, tiny_base, tmp_path):
        save_tiny_base(tmp_path / "own", seed=7, hidden_size=16)
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["another"])
        tokenizer.save_pretrained(tmp_path / "own")
        refused(lambda: DraftModel(str(tmp_path / "own")).fit(target(tiny_base)), IncompatibleError, "tokenizer")

    def test_a_delta_of_another_base(self, tiny_base, tmp_path):
        folder = save_layers(tiny_base, tmp_path / "delta", base_weights_sha256="0" * 64, base_name="another")
        message = refused(lambda: DraftModel(folder).fit(target(tiny_base)), IncompatibleError)
        assert f"the draft model {folder} needs the weights of another it was made for" in message
        unnamed = target(tiny_base, base=None)
        message = refused(lambda: DraftModel(folder).fit(unnamed), IncompatibleError)
        assert message.endswith("give draft-model:FOLDER with a whole model")

    def test_no_model(self, tmp_path):
        assert refused(DraftModel).startswith("draft-model needs a model: draft-model:FOLDER or a hub id")
        refused(lambda: DraftModel(str(tmp_path / "none")), "no draft model", "then --drafter draft-model:DIR")
        refused(lambda: DraftModel("weights.pt"), "weights.pt is no draft model")

    def test_no_weights_of_a_delta(self, tiny_base, tmp_path):
        folder = save_layers(tiny_base, tmp_path / "delta")
        (tmp_path / "delta" / "model.safetensors").unlink()
        refused(lambda: DraftModel(folder), "no draft model weights in")

    def test_a_broken_configuration(self, tmp_path):
        folder = save_tiny_base(tmp_path / "broken", seed=7, hidden_size=16)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config)[:-20])
        refused(lambda: DraftModel(str(folder)))

    @pytest.mark.parametrize("tokens", [0, -1, 65])
    def test_chains_that_are_too_short_or_too_long(self, folder, tokens):
        refused(lambda: DraftModel(folder, tokens=tokens), f"tokens = {tokens}; give 1 to 64")

    def test_one_that_was_not_fitted(self, folder):
        with pytest.raises(RescoreError, match="must be fitted"):
            DraftModel(folder).prefill([Context([1])])
