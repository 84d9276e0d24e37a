"""The rescorer `ngram`, its weight and tuning, end to end on the tiny model."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluating import Options, evaluated, swept

from lattices.automaton import Automaton
from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lattices.lattice import Lattice
from lattices.ngrams import SPECIAL_WORDS, NgramArrays, NgramModel
from lattices.search import p_best
from lm.files import write_json
from lm.ngram.arpa import write_arpa
from lm.ngram.build import NgramOptions, build_ngram
from lm.ngram.load import load_ngram
from rescore.replaying import replay
from rescore.rescorers import Context, Rescorer, Target, load_rescorer
from rescore.runs.records import Identical
from rescore.tracing import read_trace

VOCAB = 257  # of the tiny tokenizer


def bigram_model(seed: int = 0, *, words: range = range(VOCAB)) -> NgramModel:
    """Random bigrams over token ids."""
    rng = np.random.default_rng(seed)
    vocabulary = (*SPECIAL_WORDS, *map(str, words))
    v = len(vocabulary)
    unigrams = NgramArrays(
        np.arange(v, dtype=np.int32)[:, None],
        -rng.uniform(1, 3, v).astype(np.float32),
        -rng.uniform(0, 1, v).astype(np.float32),
    )
    pairs = np.unique(rng.integers(3, v, (40 * v, 2)), axis=0).astype(np.int32)
    bigrams = NgramArrays(pairs, -rng.uniform(0, 2, len(pairs)).astype(np.float32), np.zeros(len(pairs), np.float32))
    return NgramModel(vocabulary, (unigrams, bigrams))


def save(folder: Path, model: NgramModel, *, tokenizer_sha256: str | None = None) -> Path:
    """A folder as `build-ngram` writes it."""
    folder.mkdir()
    Automaton.compile(model).save(folder / "automaton.bin")
    write_json(folder / "manifest.json", {"tokenizer_sha256": tokenizer_sha256})
    return folder


@pytest.fixture
def ngram(tmp_path: Path) -> Path:
    return save(tmp_path / "ngram", bigram_model())


@pytest.fixture
def options(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path, ngram: Path) -> Options:
    return dict(
        base=str(tiny_folder), heads=str(tiny_heads_folder), data=str(squad_file), dtype="float64", device="cpu",
        max_new_tokens=14, k=8, rescorers=("none", f"ngram:{ngram}"),
    )  # fmt: skip


def random_lattices(seed: int, n: int = 20, h: int = 4, k: int = 6) -> Lattice:
    rng = np.random.default_rng(seed)
    token_ids = np.stack([[rng.permutation(VOCAB)[:k] for _ in range(h)] for _ in range(n)]).astype(np.int32)
    return Lattice(token_ids, -np.sort(rng.uniform(0, 5, (n, h, k)), axis=-1).astype(np.float32))


def fitted(path: Path, alpha: float) -> Rescorer:
    rescorer = load_rescorer(f"ngram:{path}")
    assert rescorer.alpha is not None
    return rescorer.fit(Target(VOCAB, (256,), None)).weighted(alpha)


class TestDrafts:
    @pytest.mark.parametrize("p", [1, 16])
    def test_weight_zero_gives_the_unrescored_drafts(self, ngram: Path, p: int):
        lattices = random_lattices(0)
        drafts = fitted(ngram, 0.0).draft(lattices, [Context([1, 2])] * len(lattices), p)
        assert drafts.tolist() == p_best(lattices, p).drafts.tolist()

    def test_the_left_context_counts(self, ngram: Path):
        lattices = random_lattices(1)
        rescorer = fitted(ngram, 1.0)
        apart = [
            rescorer.draft(lattices, [context] * len(lattices), 1)
            for context in (Context([7]), Context([7], [9]), Context([9]), Context([]))
        ]
        assert apart[1].tolist() == apart[2].tolist()
        # Slot 1 is fixed, so in a bigram model what stands before it can't change the choice.
        assert apart[0].tolist() == apart[1].tolist() == apart[3].tolist()

    def test_a_strong_weight_follows_the_model(self, tmp_path: Path):
        model = bigram_model()
        likely = np.array([[3 + i, 3 + (i + 1) % 200] for i in range(200)], dtype=np.int32)
        chain = NgramArrays(likely, np.full(200, -0.001, np.float32), np.zeros(200, np.float32))
        path = save(tmp_path / "chain", dataclasses.replace(model, orders=(model.orders[0], chain)))
        token_ids = np.array([[[10, 50, 60], [80, 11, 90], [70, 30, 12]]], dtype=np.int32)
        lattice = Lattice(token_ids, np.log(np.array([[[0.5, 0.3, 0.2]] * 3], dtype=np.float32)))
        assert fitted(path, 5.0).draft(lattice, [Context([])], 1).tolist() == [[[10, 11, 12]]]

    def test_end_of_text_is_the_end_of_a_sentence(self, ngram: Path):
        assert load_ngram(ngram).words_of_tokens(VOCAB, (256,))[256] == 2

    @pytest.mark.parametrize("eos", [(256,), (9, 256)])
    def test_several_drafts_never_repeat_each_other_up_to_end_of_text(self, ngram: Path, eos: tuple[int, ...]):
        lattices = random_lattices(3, h=6)
        lattices.token_ids[:, 2, 1] = 256  # a likely end-of-text, after which most paths are the same
        lattices.token_ids[:, 4, 0] = 256
        rescorer = load_rescorer(f"ngram:{ngram}").fit(Target(VOCAB, eos, None)).weighted(0.3)
        drafts = rescorer.draft(lattices, [Context([5])] * len(lattices), 16)
        ended = 0
        for of_lattice in drafts.tolist():
            up_to_end = {tuple(d[: d.index(256) + 1]) if 256 in d else tuple(d) for d in of_lattice}
            assert len(up_to_end) == 16
            ended += any(256 in d for d in of_lattice)
        assert ended > 10, "the test is of drafts that end"

    def test_one_draft_is_scored_to_its_end(self, ngram: Path):
        lattices = random_lattices(3, h=6)
        lattices.token_ids[:, 2, 1] = 256
        model = load_ngram(ngram)
        plain = model.search(VOCAB, (256,)).p_best_after(lattices, [[5]] * len(lattices), 1, weight=0.3).drafts
        fitted_to_end = load_rescorer(f"ngram:{ngram}").fit(Target(VOCAB, (256,), None)).weighted(0.3)
        assert fitted_to_end.draft(lattices, [Context([5])] * len(lattices), 1).tolist() == plain.tolist()

    def test_without_end_of_text_nothing_ends(self, ngram: Path):
        lattices, contexts = random_lattices(4), [Context([5])] * 20
        rescorer = load_rescorer(f"ngram:{ngram}").weighted(1.0)
        expected = load_ngram(ngram).search(VOCAB, ()).p_best_after(lattices, [[5]] * 20, 4, weight=1.0).drafts
        for eos in ((), (VOCAB + 3,)):  # none, or one that the base's vocabulary does not hold
            assert rescorer.fit(Target(VOCAB, eos, None)).draft(lattices, contexts, 4).tolist() == expected.tolist()

    def test_it_must_be_fitted(self, ngram: Path):
        with pytest.raises(RescoreError, match="fitted"):
            load_rescorer(f"ngram:{ngram}").draft(random_lattices(0), [Context([])] * 20, 1)


class TestLoading:
    def test_an_arpa_file_gives_the_same_drafts_and_is_compiled_once(self, ngram: Path, tmp_path: Path, monkeypatch):
        plain, arpa = tmp_path / "model.arpa", tmp_path / "model.arpa.gz"
        write_arpa(bigram_model(), plain)
        arpa.write_bytes(gzip.compress(plain.read_bytes()))
        lattices, contexts = random_lattices(2), [Context([5])] * 20
        expected = fitted(ngram, 1.0).draft(lattices, contexts, 4).tolist()
        assert fitted(arpa, 1.0).draft(lattices, contexts, 4).tolist() == expected
        monkeypatch.setattr(Automaton, "compile", lambda *_: pytest.fail("compiled again"))
        assert fitted(arpa, 1.0).draft(lattices, contexts, 4).tolist() == expected

    def test_what_is_no_model_is_refused(self, tmp_path: Path):
        (tmp_path / "text").write_text("no automaton")
        for path in (tmp_path, tmp_path / "absent", tmp_path / "text"):
            with pytest.raises(RescoreError) as caught:
                load_rescorer(f"ngram:{path}")
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    def test_a_model_for_another_tokenizer_is_refused(self, tmp_path: Path):
        path = save(tmp_path / "foreign", bigram_model(), tokenizer_sha256="another")
        with pytest.raises(IncompatibleError, match="tokenizer"):
            load_rescorer(f"ngram:{path}").fit(Target(VOCAB, (), "this one"))

    @pytest.mark.parametrize("surface", [False, True])
    def test_the_numbers_in_a_text_are_no_token_ids(self, tmp_path: Path, tiny_folder: Path, surface: bool):
        """A model of a text's words, or of token strings: 12 is a word of it, not token 12."""
        (tmp_path / "text.txt").write_text("in 1 year the 12 men met 7 cats\nthe 7 men sang 12 songs\n" * 3)
        tokenizer = str(tiny_folder) if surface else "words"
        chosen = NgramOptions(order=2, tokenizer=tokenizer, surface=surface, discount_fallback=(0.5, 1.0, 1.5))
        build_ngram([tmp_path / "text.txt"], tmp_path / "model", chosen)
        for path in (tmp_path / "model", tmp_path / "model" / "model.arpa"):
            for name in ("ngram", "context-ngram"):
                with pytest.raises(InvalidDataError, match=r"are no token ids, .* build it with --tokenizer BASE"):
                    load_rescorer(f"{name}:{path}").fit(Target(VOCAB, (256,), None))

    def test_the_shipped_model_fits_the_built_in_base(self):
        rescorer = load_rescorer("ngram")
        assert rescorer.model.order == 4 and rescorer.model.tokenizer_sha256


class TestEvaluation:
    def test_replay_equals_live_and_the_output_is_exact(self, options: Options):
        for p in (1, 4):
            chosen = dict(options, p=p, alpha=0.7)
            replayed = evaluated(chosen).document.results[1]
            live = evaluated(dict(chosen, mode="live")).document.results[1]
            assert live.identical == Identical(n=6, identical=6)
            assert live.accepted_histogram == replayed.accepted_histogram
            assert live.alpha == replayed.alpha == 0.7
            assert sum(replayed.accepted_histogram) == replayed.steps
            assert sum(i * n for i, n in enumerate(replayed.accepted_histogram)) == replayed.tokens

    def test_weight_zero_is_none(self, options: Options):
        none, ngram = evaluated(dict(options, p=4, alpha=0.0)).document.results
        assert dataclasses.replace(ngram, rescorer="none", alpha=None) == none

    def test_the_default_weight_is_told(self, options: Options):
        evaluation = evaluated(options)
        assert any("by default" in line for line in evaluation.notices)
        assert [run.alpha.source for run in evaluation.config.runs["squad"] if run.alpha] == ["default"]

    def test_results_of_another_model_under_the_same_name_are_not_gone_on_with(self, options, ngram: Path, tmp_path):
        found = evaluated(options, out=tmp_path / "run").document
        assert {run.rescorer: run.identity for run in found.config.runs["squad"] if run.alpha} == {
            options["rescorers"][1]: load_rescorer(options["rescorers"][1]).identity
        }
        Automaton.compile(bigram_model(words=range(50, 90))).save(ngram / "automaton.bin")
        with pytest.raises(IncompatibleError, match=r"another configuration .weights.squad.ngram.*identity"):
            evaluated(options, out=tmp_path / "run")

    @pytest.mark.parametrize(
        "broken", ["", "{}", '{"alpha": "much", "held_out": []}', '{"alpha": 1.0}', '{"alpha": 1e9}']
    )
    def test_a_broken_tuned_weight_is_told_with_the_command(self, options, broken: str, cache_folder: Path):
        chosen = dict(options, rescorers=options["rescorers"][1:], alpha="tuned")
        swept(chosen, alphas=(0.5,), ks=(8,), ps=(1,))
        evaluated(chosen)
        (path,) = (cache_folder / "tuned").iterdir()
        path.write_text(broken)
        with pytest.raises(InvalidDataError, match="run: rescore tune --task squad --rescorer ngram"):
            evaluated(chosen)

    @pytest.mark.parametrize("alpha", ["tune", "", "0.5"])
    def test_a_word_that_is_no_weight_is_refused(self, options: Options, alpha: str):
        with pytest.raises(RescoreError, match=r"a number, or tuned \(rescore tune\)"):
            evaluated(dict(options, alpha=alpha))

    @pytest.mark.parametrize("alpha", [-0.1, 65.0])
    def test_a_weight_out_of_range_is_refused(self, options: Options, alpha: float):
        with pytest.raises(RescoreError, match=f"alpha = {alpha:g}; a rescorer's weight is from 0 to 64"):
            evaluated(dict(options, alpha=alpha))

    def test_little_coverage_is_told(self, options: Options, tmp_path: Path):
        path = save(tmp_path / "small", bigram_model(words=range(5)))
        told: list[str] = []
        evaluated(dict(options, rescorers=(f"ngram:{path}",)), notify=told.append)
        assert any("of the lattices' tokens" in line for line in told)


class TestContext:
    @pytest.mark.parametrize("p", [1, 4])
    def test_replay_equals_live(self, options: Options, ngram: Path, p: int):
        """The counts grow step by step alike, whether examples walk side by side or are decoded one by one."""
        chosen = dict(options, p=p, alpha=1.5, rescorers=(f"context-ngram:{ngram},share=0.6", "context-ngram:none"))
        replayed = evaluated(chosen).document.results
        live = evaluated(dict(chosen, mode="live")).document.results
        assert [r.identical for r in live] == [Identical(n=6, identical=6)] * 2
        assert [r.accepted_histogram for r in live] == [r.accepted_histogram for r in replayed]

    def test_it_copies_from_the_prompt(self):
        token_ids = np.array([[[10, 50, 60], [80, 11, 90], [70, 30, 12]]], dtype=np.int32)
        lattice = Lattice(token_ids, np.log(np.array([[[0.5, 0.3, 0.2]] * 3], dtype=np.float32)))
        rescorer = load_rescorer("context-ngram:none,share=0.9")
        assert rescorer.draft(lattice, [Context([9, 10, 11, 12, 13, 9])], 1).tolist() == [[[10, 11, 12]]]
        assert rescorer.draft(lattice, [Context([9, 8, 7, 9])], 1).tolist() == [[[10, 80, 70]]]

    @pytest.mark.parametrize("text", ["none,share=2", "none,share=-1", "none,share=x"])
    def test_a_share_that_is_none_is_refused(self, text: str):
        with pytest.raises(RescoreError, match=r"share (=|is).* number"):
            load_rescorer(f"context-ngram:{text}")

    def test_shares_and_models_are_told_apart_when_tuned(self, ngram: Path):
        names = (f"{ngram},share=0.5", f"{ngram},share=0.4", "none,share=0.5")
        assert len({load_rescorer(f"context-ngram:{name}").identity for name in names}) == 3


class TestTuning:
    def test_the_best_weight_is_found_and_used(self, options: Options):
        typed = options["rescorers"][1]
        alphas = (0.5, 2.0)
        chosen = dict(options, rescorers=(typed,))
        (tuned,) = swept(chosen, alphas=alphas, ks=(8,), ps=(1,))
        assert tuned.alphas == (0.0, *alphas) and len(tuned.held_out) == 3
        by_alpha = dict(zip(tuned.alphas, tuned.block_efficiency, strict=True))
        assert by_alpha[tuned.alpha] == max(by_alpha.values())
        assert tuned.alpha == min(a for a, b in by_alpha.items() if b == max(by_alpha.values()))
        told: list[str] = []
        assert evaluated(chosen).document.results[0].alpha == 0.5, "what is tuned is used where it is asked for"
        chosen = dict(chosen, alpha="tuned")
        result = evaluated(chosen, notify=told.append).document.results[0]
        assert result.alpha == tuned.alpha
        assert any("tuned on 3 of these 6" in line for line in told)
        assert not any("default" in line for line in told)
        assert evaluated(dict(chosen, alpha=0.9)).document.results[0].alpha == 0.9

    def test_a_weight_of_other_data_is_told(self, options: Options, tmp_path: Path):
        chosen = dict(options, rescorers=options["rescorers"][1:])
        swept(chosen, alphas=(0.5, 2.0), ks=(8,), ps=(1,))
        lines = Path(options["data"]).read_text().splitlines()
        (tmp_path / "less.jsonl").write_text("\n".join(lines[:3]) + "\n")
        told: list[str] = []
        evaluated(dict(chosen, data=str(tmp_path / "less.jsonl"), alpha="tuned"), notify=told.append)
        assert any("was tuned on other data of this task" in line for line in told)

    def test_a_weight_of_another_trace_made_elsewhere_is_told(
        self, options: Options, tmp_path: Path, cache_folder: Path
    ):
        evaluated(options)
        (recorded,) = (cache_folder / "traces").iterdir()
        folders = tmp_path / "one" / "medusa", tmp_path / "other" / "medusa"  # one name, and neither says anything
        for more, folder in enumerate(folders):
            header = json.loads((shutil.copytree(recorded, folder) / "trace.json").read_text())
            changed = {**header, "settings": {}, "vocab_size": header["vocab_size"] + more}
            (folder / "trace.json").write_text(json.dumps(changed))
        chosen = dict(rescorers=("context-ngram:none",), k=8)
        swept(dict(chosen, trace=str(folders[0])), alphas=(0.5, 2.0), ks=(8,), ps=(1,))
        notices = [evaluated(dict(chosen, trace=str(folder), alpha="tuned")).notices for folder in folders]
        assert ["tuned on other data" in " ".join(lines) for lines in notices] == [False, True]

    def test_held_out_examples_are_the_last_ones(self, options: Options):
        (tuned,) = swept(dict(options, rescorers=options["rescorers"][1:], limit=2), alphas=(1.0,), ks=(8,), ps=(1,))
        assert tuned.held_out == ("q4", "q5")

    def test_efficiency_is_that_of_replay(self, options: Options, tmp_path: Path, cache_folder: Path):
        chosen = dict(options, rescorers=options["rescorers"][1:])
        (tuned,) = swept(chosen, alphas=(1.0,), ks=(8,), ps=(2,))
        (folder,) = (cache_folder / "traces").iterdir()
        examples = [e for e in read_trace(folder).examples if e.id in tuned.held_out]
        rescorer = load_rescorer(chosen["rescorers"][0]).fit(Target(VOCAB, (256,), None)).weighted(1.0)
        accepted = replay(examples, rescorer, k=8, p=2)
        tokens, steps = sum(map(sum, accepted)), sum(map(len, accepted))
        assert tuned.block_efficiency[1] == tokens / steps

    def test_a_rescorer_without_weight_is_refused(self, options: Options):
        with pytest.raises(RescoreError, match="no weight"):
            swept(options)
