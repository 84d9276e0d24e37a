"""Neural rescorers: local rescoring, its beam and the rescoring of n-gram drafts against plain forwards, no cache."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused, save_tiny_base
from evaluating import evaluated
from made_costs import costs_of
from test_ngram_rescorer import bigram_model, save
from test_replay import traced

from lattices.errors import IncompatibleError, RescoreError
from lattices.lattice import Lattice
from lattices.search import p_best
from lm.base.catalog import load_base
from lm.base.model import BaseLM
from lm.neural.model import DeltaConfig, save_delta, some_layers
from rescore.replaying import replay
from rescore.rescorers import Context, Rescorer, Target, load_rescorer, neural_state
from rescore.rescorers.ngram_neural import CANDIDATES, path_logps

H, K = 4, 5


def both(small: Path, ngram: Path) -> str:
    return f"ngram-neural:{small},first=ngram,ngram={ngram}"


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory) -> str:
    """A whole model over the tiny base's tokens."""
    return str(save_tiny_base(tmp_path_factory.mktemp("models") / "small", seed=7, hidden_size=16))


@pytest.fixture(scope="module")
def small(small_folder) -> BaseLM:
    return load_base(small_folder, dtype="float64", device="cpu")


def target(base: BaseLM) -> Target:
    return Target(base.vocab_size, (256,), base.identity.tokenizer_sha256, base.identity)


def lattices_at(seed: int, n: int) -> Lattice:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((n, H, 256)), axis=-1)[..., :K].astype(np.int32)
    logps = -np.sort(rng.uniform(0, 3, (n, H, K)), axis=-1).astype(np.float32)
    return Lattice(ids, logps)


def contexts_at(seed: int, n: int) -> list[Context]:
    rng = np.random.default_rng(seed)
    return [
        Context(rng.integers(256, size=3 + 5 * i).tolist(), rng.integers(256, size=i % 3).tolist()) for i in range(n)
    ]


def plain_logits(model: BaseLM, tokens: list[int]) -> np.ndarray:
    """Logits after tokens, from one forward without cache."""
    logits, _ = model.forward(torch.tensor([tokens]), last=1)
    return logits[0, -1].numpy()


def greedy(model: BaseLM, lattice: Lattice, context: Context, alpha: float) -> list[int]:
    """METHOD section 4, word for word."""
    draft = [int(lattice.token_ids[0, 0])]
    for slot in range(1, lattice.h):
        ids = lattice.token_ids[slot]
        r = plain_logits(model, [*context.prompt_ids, *context.output_ids, *draft])[ids]
        z = lattice.logps[slot] + alpha * r if alpha < np.inf else r
        draft.append(min((-score, int(token)) for score, token in zip(z, ids, strict=True))[1])
    return draft


def path_score(model: BaseLM, lattice: Lattice, context: Context, path: tuple[int, ...], alpha: float) -> float:
    """Sum of the heads' log-probs and alpha x the LM's log-probs among each slot's tokens."""
    total, draft = 0.0, [int(lattice.token_ids[0, 0])]
    for slot, place in enumerate(path, start=1):
        ids = lattice.token_ids[slot]
        r = plain_logits(model, [*context.prompt_ids, *context.output_ids, *draft])[ids]
        logps = r - np.logaddexp.reduce(r)
        total += float(lattice.logps[slot, place]) + alpha * logps[place]
        draft.append(int(ids[place]))
    return total


class TestLocal:
    @pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
    def test_one_draft_is_chosen_slot_by_slot(self, tiny_base, small, small_folder, alpha):
        rescorer = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base)).weighted(alpha)
        lattices, contexts = lattices_at(1, 5), contexts_at(2, 5)
        drafts = rescorer.draft(lattices, contexts, 1)
        assert drafts[:, 0].tolist() == [
            greedy(small, lattices[i], context, alpha) for i, context in enumerate(contexts)
        ]

    @pytest.mark.parametrize("alpha", [0.3, 4.0])
    def test_a_rescored_lattice_is_in_the_order_of_its_scores(self, tiny_base, small, small_folder, alpha):
        """Slot by slot along the draft, whose tokens come first; what a tree of it is made of."""
        rescorer = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base)).weighted(alpha)
        lattices, contexts = lattices_at(11, 4), contexts_at(12, 4)
        rescored = rescorer.rescored(lattices, contexts_at(12, 4))
        rescored.validate(257)
        assert (rescored.token_ids[:, :, 0] == rescorer.draft(lattices, contexts_at(12, 4), 1)[:, 0]).all()
        for i, context in enumerate(contexts):
            draft = greedy(small, lattices[i], context, alpha)
            for slot in range(1, H):
                ids = lattices.token_ids[i, slot]
                r = plain_logits(small, [*context.prompt_ids, *context.output_ids, *draft[:slot]])[ids]
                z = lattices.logps[i, slot] + alpha * r
                order = sorted(range(K), key=lambda place: (-z[place], ids[place]))
                assert rescored.token_ids[i, slot].tolist() == ids[order].tolist()
                assert rescored.logps[i, slot] == pytest.approx((z - np.logaddexp.reduce(z))[order], abs=1e-4)
        assert rescorer.weighted(0.0).rescored(lattices, contexts) is lattices
        tree = load_rescorer(f"eagle2-tree:nodes=9,scores=neural:{small_folder}").fit(target(tiny_base))
        plain = load_rescorer("eagle2-tree:nodes=9")
        drafts = tree.weighted(alpha).draft(lattices, contexts_at(12, 4), 9)
        assert drafts.tolist() == plain.draft(rescored, contexts, 9).tolist()
        assert tree.weighted(0.0).draft(lattices, contexts, 9).tolist() == plain.draft(lattices, contexts, 9).tolist()

    def test_a_huge_weight_is_the_rescorers_own_choice_within_each_slot(self, tiny_base, small, small_folder):
        rescorer = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base)).weighted(1e9)
        lattices, contexts = lattices_at(3, 4), contexts_at(4, 4)
        own = [greedy(small, lattices[i], context, np.inf) for i, context in enumerate(contexts)]
        assert rescorer.draft(lattices, contexts, 1)[:, 0].tolist() == own

    @pytest.mark.parametrize("p", [1, 16])
    @pytest.mark.parametrize("kind", ["neural", "ngram-neural"])
    def test_weight_0_gives_the_unrescored_drafts(self, tiny_base, small_folder, tmp_path, kind, p):
        ngram = save(tmp_path / "ngram", bigram_model())
        name = f"neural:{small_folder}" if kind == "neural" else both(small_folder, ngram)
        rescorer = load_rescorer(name).fit(target(tiny_base)).weighted(0.0)
        lattices = lattices_at(5, 6)
        drafts = rescorer.draft(lattices, contexts_at(6, 6), p)
        assert drafts.tolist() == p_best(lattices, p).drafts.tolist()

    def test_a_wide_beam_finds_the_best_paths(self, tiny_base, small, small_folder):
        rescorer = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base)).weighted(0.7)
        lattices, contexts = lattices_at(7, 2), contexts_at(8, 2)
        drafts = rescorer.draft(lattices, contexts, K ** (H - 1))
        for i, context in enumerate(contexts):
            paths = list(itertools.product(range(K), repeat=H - 1))
            scores = [path_score(small, lattices[i], context, path, 0.7) for path in paths]
            best = sorted(range(len(paths)), key=lambda j: -scores[j])
            wanted = [
                [lattices.token_ids[i, 0, 0], *(lattices.token_ids[i, s + 1, a] for s, a in enumerate(paths[j]))]
                for j in best
            ]
            assert drafts[i].tolist() == np.array(wanted).tolist()

    @pytest.mark.parametrize("p", [1, 4])
    def test_a_lattice_of_the_whole_vocabulary(self, tiny_base, small, small_folder, p):
        rescorer = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base)).weighted(0.7)
        rng = np.random.default_rng(0)
        ids = np.argsort(rng.random((3, H, 257)), axis=-1).astype(np.int32)
        lattices = Lattice(ids, -np.sort(rng.uniform(0, 3, (3, H, 257)), axis=-1).astype(np.float32))
        contexts = contexts_at(1, 3)
        drafts = rescorer.draft(lattices, contexts, p)
        if p == 1:
            wanted = [greedy(small, lattices[i], context, 0.7) for i, context in enumerate(contexts)]
            assert drafts[:, 0].tolist() == wanted
        else:
            assert len({tuple(draft) for draft in drafts[0].tolist()}) == p

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("p", [1, 4])
    def test_half_precision(self, tiny_base, small_folder, dtype, p):
        half = dataclasses.replace(target(tiny_base), base=dataclasses.replace(tiny_base.identity, dtype=dtype))
        rescorer = load_rescorer(f"neural:{small_folder}").fit(half).weighted(0.7)
        assert rescorer.draft(lattices_at(1, 5), contexts_at(2, 5), p).shape == (5, p, H)

    def test_rescorers_of_one_base_share_the_lm(self, tiny_base, small_folder):
        """Whatever else they are told: what they choose among, and what a step costs."""
        plain = target(tiny_base)
        other = dataclasses.replace(plain, sources=("lookup",), costs=costs_of([[1, 2, 3], [4, 5, 6]]))
        first, second = (load_rescorer(f"neural:{small_folder}").fit(each).model for each in (plain, other))
        assert first.load() is second.load()

    def test_examples_without_a_prompt(self, tiny_base, small, small_folder):
        rescorer = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base)).weighted(0.7)
        lattices, contexts = lattices_at(1, 2), [Context([]), Context([])]
        drafts = rescorer.draft(lattices, contexts, 1)[:, 0]
        assert drafts.tolist() == [greedy(small, lattices[i], c, 0.7) for i, c in enumerate(contexts)]

    def test_long_prompts_share_a_group_with_fewer(self, tiny_base, small_folder, monkeypatch):
        monkeypatch.setattr(neural_state, "GROUP_TOKENS", 60)
        fitted = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base)).weighted(0.7)
        contexts = [Context(list(range(n))) for n in (5, 100, 30, 31, 7, 29)]
        groups = neural_state.groups_of(fitted.model.load(), "x", contexts)
        found = sorted(sorted(len(c.prompt_ids) for c in group.contexts) for group, _ in groups)
        assert all(max(lengths) * len(lengths) <= 60 or len(lengths) == 1 for lengths in found) and len(found) < 6
        for group, rows in groups:
            assert [id(contexts[i]) for i in rows] == [id(c) for c in group.contexts]

    def test_a_prompt_beyond_the_rescorers_context(self, tiny_base, small_folder):
        rescorer = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base)).weighted(0.7)
        with pytest.raises(RescoreError, match="--max-prompt-tokens"):
            rescorer.draft(lattices_at(1, 1), [Context([1] * 600)], 1)

    def test_the_last_tokens_of_the_context(self, tiny_base, small, small_folder):
        """A draft that goes on beyond it is no reason to stop: nothing of that can be accepted."""
        rescorer = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base)).weighted(0.7)
        lattices, contexts = lattices_at(1, 2), [Context([1] * 511), Context([1] * 509)]
        drafts = rescorer.draft(lattices, contexts, 1)[:, 0]
        assert drafts[0, :2].tolist() == greedy(small, lattices[0], contexts[0], 0.7)[:2]
        assert drafts[1].tolist() == greedy(small, lattices[1], contexts[1], 0.7)
        with pytest.raises(RescoreError, match="513 tokens exceed the context"):
            rescorer.draft(lattices_at(1, 1), [Context([1] * 512)], 1)

    def test_equal_scores_go_to_the_lowest_ids(self, tiny_base, small_folder):
        rescorer = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base)).weighted(1e-30)
        ids = np.tile(np.array([9, 4, 7, 1, 5], dtype=np.int32), (1, H, 1))
        flat = Lattice(ids, np.full((1, H, K), -1.0, dtype=np.float32))
        drafts = rescorer.draft(flat, contexts_at(0, 1), 6)[0]
        assert drafts[:3].tolist() == [[9, 1, 1, 1], [9, 1, 1, 4], [9, 1, 1, 5]]


class TestAhead:
    """One draft for one example: all slots are guessed and read together."""

    @pytest.mark.parametrize("h", [2, 3, 6, 9])
    @pytest.mark.parametrize("alpha", [0.05, 0.3, 4.0])
    def test_drafts_are_those_of_reading_slot_by_slot(self, tiny_base, small, small_folder, h, alpha):
        rescorer = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base)).weighted(alpha)
        rng = np.random.default_rng(h)
        for context in contexts_at(h, 6):
            for _ in range(3):  # three blocks, of which a part is accepted
                ids = np.argsort(rng.random((h, 256)), axis=-1)[:, :K].astype(np.int32)
                lattice = Lattice(ids, -np.sort(rng.uniform(0, 3, (h, K)), axis=-1).astype(np.float32))
                one = Lattice(lattice.token_ids[None], lattice.logps[None])
                wanted = greedy(small, lattice, context, alpha)
                assert rescorer.draft(one, [context], 1)[0].tolist() == [wanted]
                beside = Context([7, 8, 9])  # of two examples every slot is read by itself
                two = Lattice(one.token_ids.repeat(2, axis=0), one.logps.repeat(2, axis=0))
                alone = Context(context.prompt_ids, list(context.output_ids))
                assert rescorer.draft(two, [alone, beside], 1)[0].tolist() == [wanted]
                context.output_ids += [*wanted[: rng.integers(1, h + 1)], *rng.integers(256, size=rng.integers(2))]

    def test_right_guesses_take_one_forward_and_wrong_ones_no_more_than_there_are_slots(
        self, tiny_base, small_folder, monkeypatch
    ):
        fitted = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base))
        model, forwards = fitted.model.load(), []
        forward = model.model.forward
        monkeypatch.setattr(model.model, "forward", lambda *a, **k: (forwards.append(1), forward(*a, **k))[1])
        for alpha, most in ((1e-9, 1), (1e9, H - 1)):
            counts = []
            for seed in range(8):
                (context,) = contexts_at(seed, 1)
                fitted.weighted(alpha).prefill([context])
                forwards.clear()
                fitted.weighted(alpha).draft(lattices_at(seed, 1), [context], 1)
                counts.append(len(forwards))
            assert max(counts) == most

    def test_equal_scores_go_to_the_lowest_ids(self, tiny_base, small_folder):
        rescorer = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base)).weighted(1e-30)
        ids = np.tile(np.array([9, 4, 7, 1, 5], dtype=np.int32), (1, H, 1))
        flat = Lattice(ids, np.full((1, H, K), -1.0, dtype=np.float32))
        assert rescorer.draft(flat, contexts_at(0, 1), 1)[0].tolist() == [[9, 1, 1, 1]]


class TestNgramFirst:
    @pytest.mark.parametrize("p", [1, 3, 16])
    def test_the_ngrams_drafts_are_put_in_order(self, tiny_base, small, small_folder, tmp_path, p):
        ngram = save(tmp_path / "ngram", bigram_model())
        rescorer = load_rescorer(both(small_folder, ngram)).fit(target(tiny_base)).weighted(0.8)
        lattices, contexts = lattices_at(9, 4), contexts_at(10, 4)
        drafts = rescorer.draft(lattices, contexts, p)
        first = load_rescorer(f"ngram:{ngram}").fit(target(tiny_base))
        count = max(p, CANDIDATES)
        best = first.best(lattices, contexts, count)
        for i, context in enumerate(contexts):
            ids = lattices.token_ids[i]
            scores = []
            for draft, score in zip(best.drafts[i], best.scores[i], strict=True):
                path = tuple(int(np.flatnonzero(ids[s] == draft[s])[0]) for s in range(1, H))
                heads = sum(float(lattices.logps[i, s, place]) for s, place in enumerate(path, start=1))
                scores.append(score + path_score(small, lattices[i], context, path, 0.8) - heads)
            order = sorted(range(count), key=lambda j: -scores[j])[:p]
            assert drafts[i].tolist() == best.drafts[i][order].tolist()

    def test_what_stands_behind_end_of_text_counts_nothing(self, tiny_base, small, small_folder):
        fitted = load_rescorer(f"ngram-neural:{small_folder}").model.fit(target(tiny_base))
        model = fitted.load()
        lattices, contexts = lattices_at(9, 1), contexts_at(10, 1)
        lattices.token_ids[0, 2, 0] = 256
        ids = lattices.token_ids[0]
        drafts = np.array([[[ids[0, 0], ids[1, 1], 256, ids[3, 0]], [ids[0, 0], ids[1, 1], 256, ids[3, 4]]]])
        ((group, _),) = neural_state.groups_of(model, "x", contexts)
        first, second = path_logps(model, group, lattices, drafts, (256,))[0]
        total = 0.0
        draft = [int(ids[0, 0])]
        for slot, place in ((1, 1), (2, 0)):
            r = plain_logits(small, [*contexts[0].prompt_ids, *contexts[0].output_ids, *draft])[ids[slot]]
            total += r[place] - np.logaddexp.reduce(r)
            draft.append(int(ids[slot, place]))
        assert first == second == pytest.approx(total)


class TestTheCache:
    @pytest.mark.parametrize("p", [1, 3])
    @pytest.mark.parametrize("kind", ["neural", "ngram-neural"])
    def test_a_replay_reads_on_where_it_was(self, tiny_base, small_folder, tmp_path, kind, p):
        """Contexts that grow and leave, against fresh ones at every step."""
        ngram = save(tmp_path / "ngram", bigram_model())
        name = f"neural:{small_folder}" if kind == "neural" else both(small_folder, ngram)
        fitted = load_rescorer(name).fit(target(tiny_base)).weighted(0.6)

        class Fresh(Rescorer):
            def draft(self, lattices, contexts, p):
                anew = [Context(c.prompt_ids, list(c.output_ids)) for c in contexts]
                return fitted.draft(lattices, anew, p)

        examples = [traced(i, t=6 + 5 * i, h=3, k=4, name=str(i)) for i in range(5)]
        examples = [dataclasses.replace(e, prompt_ids=np.arange(2 + 3 * i)) for i, e in enumerate(examples)]
        assert replay(examples, fitted, k=4, p=p) == replay(examples, Fresh(), k=4, p=p)

    def test_no_token_of_the_output_is_read_twice(self, tiny_base, small_folder, monkeypatch):
        fitted = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base)).weighted(0.6)
        model, read = fitted.model.load(), []
        forward = model.model.forward
        monkeypatch.setattr(
            model.model, "forward", lambda ids, *a, **k: (read.append(ids.shape[1]), forward(ids, *a, **k))[1]
        )
        example = dataclasses.replace(traced(3, t=30, h=3, k=4), prompt_ids=np.arange(11))
        accepted = replay([example], fitted, k=4)[0]
        h = 3
        begin = [1, *(1 if n < h else 2 for n in accepted[:-1])]  # the draft's last token was never read
        prompt, *blocks = read
        assert prompt == 11 and [n for n in blocks if n > 1] == [n + h - 2 for n in begin]
        assert 0 < blocks.count(1) < len(begin), "some guesses were wrong, and some right"

    def test_a_sweep_reads_prompts_once(self, tiny_base, small_folder, monkeypatch):
        fitted = load_rescorer(f"neural:{small_folder}").fit(target(tiny_base))
        model, read = fitted.model.load(), []
        forward = model.model.forward
        monkeypatch.setattr(
            model.model, "forward", lambda ids, *a, **k: (read.append(ids.shape[1]), forward(ids, *a, **k))[1]
        )
        examples = [dataclasses.replace(traced(i, t=9, h=3, k=4), prompt_ids=np.arange(20 + i)) for i in range(3)]
        first = replay(examples, fitted.weighted(0.5), k=4)
        assert max(read) == 22
        read.clear()
        assert replay(examples, fitted.weighted(0.5), k=4) == first
        assert max(read) <= 2


class TestEndToEnd:
    def test_live_takes_the_steps_of_replay_and_gives_greedy_output(
        self, tiny_folder, tiny_heads_folder, squad_file, small_folder, tmp_path
    ):
        ngram = save(tmp_path / "ngram", bigram_model())
        tree = f"eagle2-tree:nodes=12,scores=neural:{small_folder}"
        names = ("none", f"neural:{small_folder}", both(small_folder, ngram), tree)
        options = dict(
            base=str(tiny_folder), heads=str(tiny_heads_folder), data=str(squad_file), dtype="float64", device="cpu",
            max_new_tokens=14, k=8, p=(1, 3), rescorers=names, alpha=0.8,
        )  # fmt: skip
        replayed = evaluated(options).document.results
        live = evaluated(dict(options, mode="live")).document.results
        assert [r.accepted_histogram for r in replayed] == [r.accepted_histogram for r in live]
        assert all(r.identical and r.identical.identical == r.n for r in live)
        assert len({tuple(r.accepted_histogram) for r in replayed}) > 2, "rescoring changes something"


@pytest.fixture(params=["whole", "delta"])
def replaced(request, tiny_base, tmp_path) -> tuple[str, Callable[[int], None]]:
    """A rescorer, and what puts other weights (by a seed) into its folder."""
    folder = tmp_path / "model"

    def replace(seed: int) -> None:
        if request.param == "whole":
            save_tiny_base(folder, seed=seed, hidden_size=16)
            return
        identity = tiny_base.identity
        config = DeltaConfig(
            size="neural-32m", layers=(0,), tuned_layers=1, base_name=identity.name,
            base_weights_sha256=identity.weights_sha256, tokenizer_sha256=identity.tokenizer_sha256,
        )  # fmt: skip
        cut = some_layers(identity.name, [0])
        torch.manual_seed(seed)
        weight = cut.model.get_parameter("model.layers.0.mlp.down_proj.weight")
        weight.copy_(torch.randn(weight.shape))
        save_delta(cut.model, ["model.layers.0.mlp.down_proj.weight"], config, folder)

    replace(1)
    return f"neural:{folder}", replace


class TestReplaced:
    """Weights that are replaced while the process goes on never score under another identity."""

    def test_a_retrained_model_is_loaded_anew(self, tiny_base, replaced):
        name, replace = replaced
        lattices = lattices_at(1, 5)
        before = load_rescorer(name).fit(target(tiny_base)).weighted(2.0)
        old = before.draft(lattices, contexts_at(2, 5), 1)
        replace(2)
        after = load_rescorer(name).fit(target(tiny_base)).weighted(2.0)
        assert after.identity != before.identity
        new = after.draft(lattices, contexts_at(2, 5), 1)
        assert not np.array_equal(new, old)
        assert np.array_equal(before.draft(lattices, contexts_at(2, 5), 1), old)  # which is in memory
        del before, after
        gc.collect()
        fresh = load_rescorer(name).fit(target(tiny_base)).weighted(2.0)
        assert np.array_equal(fresh.draft(lattices, contexts_at(2, 5), 1), new)

    def test_one_that_changed_before_it_was_loaded_is_refused(self, tiny_base, replaced):
        name, replace = replaced
        found = load_rescorer(name).fit(target(tiny_base)).weighted(2.0)
        replace(2)
        with pytest.raises(RescoreError, match="has changed since this run began"):
            found.draft(lattices_at(1, 5), contexts_at(2, 5), 1)
        replace(1)
        assert len(found.draft(lattices_at(1, 5), contexts_at(2, 5), 1)) == 5


class TestRefusals:
    def test_another_tokenizer(self, tiny_base, small_folder):
        other = dataclasses.replace(tiny_base.identity, tokenizer_sha256="0" * 64)
        with pytest.raises(IncompatibleError, match="tokenizer"):
            load_rescorer(f"neural:{small_folder}").fit(Target(257, (), None, other))

    def test_a_trace_that_names_only_another_tokenizer(self, small_folder):
        with pytest.raises(IncompatibleError, match="another tokenizer"):
            load_rescorer(f"neural:{small_folder}").fit(Target(257, (), "0" * 64))

    def test_a_torch_file(self):
        with pytest.raises(RescoreError, match="folder that train-rescorer"):
            load_rescorer("neural:weights.pt")

    def test_no_model(self, tmp_path):
        refused(lambda: load_rescorer("neural"), "neural:FOLDER")
        for name in (f"neural:{tmp_path}", f"neural:{tmp_path}/none"):
            with pytest.raises(RescoreError, match="train-rescorer"):
                load_rescorer(name)

    def test_something_else_first(self, small_folder):
        with pytest.raises(RescoreError, match="ngram or context-ngram"):
            load_rescorer(f"ngram-neural:{small_folder},first=oracle")
