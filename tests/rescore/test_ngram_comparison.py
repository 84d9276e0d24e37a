"""N-gram models compared by corpus and order: the numbers are those of the parts, and every model is built once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_tiny_base, write_lines

from lattices.errors import IncompatibleError, RescoreError
from lm.base.own_output import OwnOutput
from lm.ngram.build import NgramOptions, build_ngram
from rescore.accounting import account, paired_gain
from rescore.replay import replay
from rescore.rescorers import load_rescorer
from rescore.rescorers.ngram import Ngram
from rescore.runs.evaluation import EvalOptions, trace_task
from rescore.runs.tuning import tune
from rescore.runs.weights import target_of
from rescore.studies import ngram_comparison as module
from rescore.studies.ngram_comparison import NgramCorpus, compare_ngrams, read_corpus
from rescore.studies.tables import ngram_comparison_table
from rescore.tracing import load_trace

ALPHAS = (0.25, 1.0, 4.0)
Compare = Callable[..., module.NgramComparison]


@pytest.fixture
def options(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path) -> EvalOptions:
    return EvalOptions(
        base=str(tiny_folder), heads=str(tiny_heads_folder), data=str(squad_file), dtype="float64", device="cpu",
        max_new_tokens=14, k=8, p=(1, 4),
    )  # fmt: skip


@pytest.fixture
def corpora(tmp_path: Path, squad_file: Path) -> list[NgramCorpus]:
    """A text, the questions of the task, and the base's own output."""
    (tmp_path / "x.txt").write_text("a text of no consequence\nand another line\n" * 3)
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "x" * n} for n in range(1, 20)])
    return [
        NgramCorpus("text", str(tmp_path / "x.txt")),
        NgramCorpus("task", str(squad_file), "question"),
        NgramCorpus("output", f"own:{prompts}"),
    ]


def test_the_numbers_are_those_of_building_tuning_and_replaying(options, corpora, tmp_path: Path):
    found = compare_ngrams(options, corpora, orders=(2, 3), held_out=2, alphas=ALPHAS)
    assert (found.task, found.k) == ("squad", 8)
    assert found.examples == ("q0", "q1", "q2", "q3") and found.held_out == ("q4", "q5")
    places = [(n.corpus, n.order, n.p) for n in found.ngrams]
    assert places == [(c.name, order, p) for c in corpora for order in (2, 3) for p in (1, 4)]

    trace = trace_task(options, tmp_path / "trace")
    own = OwnOutput(base=options.base, dtype=options.dtype, device=options.device)
    for n in found.ngrams[::3]:
        (corpus,) = (c for c in corpora if c.name == n.corpus)
        folder = tmp_path / f"{n.corpus}-{n.order}"
        if not folder.exists():
            built = build_ngram(
                [corpus.source], folder,
                NgramOptions(
                    order=n.order, tokenizer=options.base, discount_fallback=(0.5, 1.0, 1.5), field=corpus.field
                ),
                own=own,
            )  # fmt: skip
            assert (n.tokens, n.ngrams) == (built.tokens, sum(built.ngrams))
        chosen = dataclasses.replace(options, rescorers=(f"ngram:{folder}",), limit=2)
        (tuned,) = tune(chosen, alphas=ALPHAS, ks=(8,), ps=(n.p,))
        assert tuned.held_out == found.held_out and n.alpha == tuned.alpha
        rescorer = Ngram(str(folder)).fit(target_of(trace)).weighted(n.alpha)
        accepted = replay(trace.examples[:4], rescorer, k=8, p=n.p)
        plain = replay(trace.examples[:4], load_rescorer("none"), k=8, p=n.p)
        accounting, gain = account(accepted, trace.header.h), paired_gain(accepted, plain)
        assert (n.block_efficiency, n.block_efficiency_ci95) == (
            accounting.block_efficiency, accounting.block_efficiency_ci95
        )  # fmt: skip
        assert (n.gain, n.gain_ci95) == (gain.gain, gain.gain_ci95)
        (unrescored,) = (u for u in found.unrescored if u.p == n.p)
        assert unrescored.block_efficiency == account(plain, trace.header.h).block_efficiency


def test_every_model_is_built_once(options, corpora, monkeypatch: pytest.MonkeyPatch, cache_folder: Path):
    first = compare_ngrams(options, corpora, orders=(2, 3, 2), alphas=ALPHAS)
    assert len({n.path for n in first.ngrams}) == 6 == len(list((cache_folder / "compared-ngrams").iterdir()))
    monkeypatch.setattr(module, "build_ngram", lambda *_, **__: pytest.fail("built again"))
    renamed = [dataclasses.replace(c, name=f"{c.name}-2") for c in corpora]
    again = compare_ngrams(options, renamed, orders=(2, 3), alphas=ALPHAS)
    assert [dataclasses.replace(n, corpus="") for n in again.ngrams] == [
        dataclasses.replace(n, corpus="") for n in first.ngrams
    ]
    Path(corpora[0].source).write_text("other words\n")
    with pytest.raises(BaseException, match="built again"):
        compare_ngrams(options, corpora[:1], alphas=ALPHAS)


def test_a_given_trace_and_the_first_examples(options, corpora, tmp_path: Path):
    trace_task(options, tmp_path / "trace")
    given = dataclasses.replace(options, trace=str(tmp_path / "trace"), data=None, heads=None, limit=2)
    recorded = dataclasses.replace(options, limit=2)
    by_trace, by_data = (compare_ngrams(o, corpora[:1], held_out=3, alphas=ALPHAS) for o in (given, recorded))
    assert by_trace == by_data and by_trace.examples == ("q0", "q1")


def test_only_what_is_used_is_recorded(options, corpora, cache_folder: Path):
    compare_ngrams(dataclasses.replace(options, limit=2), corpora[:1], held_out=1, alphas=ALPHAS)
    (folder,) = (cache_folder / "traces").iterdir()
    assert sorted(e.id for e in load_trace(folder).examples) == ["q0", "q1", "q5"]


def test_half_is_held_out_at_most(options, corpora):
    found = compare_ngrams(options, corpora[:1], alphas=ALPHAS)
    assert len(found.examples) == len(found.held_out) == 3


def test_own_is_the_shipped_model(options, tmp_path: Path):
    with pytest.raises(IncompatibleError, match="another tokenizer"):  # it is smollm2-135m's
        compare_ngrams(options, [NgramCorpus("own", "shipped")], alphas=ALPHAS)
    (shipped,) = module._train(NgramCorpus("own", "shipped"), (2, 4), options.base, "", OwnOutput(), None)
    assert (shipped.order, shipped.tokens) == (4, 399_425) and shipped.ngrams == 475_428


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("c4=c4.txt", NgramCorpus("c4", "c4.txt")),
        ("in-domain:document=a=b.jsonl", NgramCorpus("in-domain", "a=b.jsonl", "document")),
        ("h=hub:name:train:text", NgramCorpus("h", "hub:name:train:text")),
        ("mine=own:prompts.jsonl", NgramCorpus("mine", "own:prompts.jsonl")),
    ],
)
def test_corpora_as_typed(text: str, expected: NgramCorpus):
    assert read_corpus(text) == expected


@pytest.mark.parametrize("text", ["c4.txt", "=c4.txt", "c4=", "a/b=c", ":text=c4", "own:x.jsonl"])
def test_what_is_no_corpus(text: str):
    with pytest.raises(RescoreError, match="NAME=SOURCE"):
        read_corpus(text)


def test_mistakes_are_told_before_any_work(options, corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trace_task(options, tmp_path / "trace")
    monkeypatch.setattr("lm.base.catalog.load_base", lambda *_, **__: pytest.fail("the base LM was loaded"))
    tokenizer = save_tiny_base(tmp_path / "other") / "tokenizer.json"
    document = json.loads(tokenizer.read_text())
    ids = document["model"]["vocab"]
    ids["!"], ids["#"] = ids["#"], ids["!"]
    tokenizer.write_text(json.dumps(document))
    given = EvalOptions(base=str(tmp_path / "other"), trace=str(tmp_path / "trace"), k=8)
    one = dataclasses.replace(options, data=str(write_lines(tmp_path / "one.jsonl", [{
        "id": "q", "context": "c", "question": "q", "answers": {"text": ["a"]}
    }])))  # fmt: skip
    missing = NgramCorpus("none", str(tmp_path / "none.txt"))
    for chosen, compared, more, said in (
        (options, [], {}, "no corpus to compare"),
        (options, [corpora[0], corpora[0]], {}, "two corpora are called text"),
        (options, corpora, {"orders": (2, 7)}, "order 7 is not supported"),
        (options, [missing], {}, "can't read .*none.txt"),
        (options, corpora, {"held_out": 0}, "--held-out 0"),
        (options, corpora, {"held_out": 6}, "more than the 6 there are; lower --limit or --held-out"),
        (dataclasses.replace(options, limit=4), corpora, {"held_out": 3}, "4 examples .* and 3 held out are more than"),
        (dataclasses.replace(options, limit=0), corpora, {}, "--limit 0"),
        (dataclasses.replace(options, p=(1, 0)), corpora, {}, "p = 0"),
        (options, corpora, {"alphas": (100.0,)}, "--alpha 100"),
        (dataclasses.replace(options, tasks=("squad", "gsm8k")), corpora, {}, "one task"),
        (one, corpora, {}, "give more data"),
        (given, corpora[:1], {}, "another tokenizer than .*other's; give --base"),
    ):
        with pytest.raises(RescoreError, match=said) as caught:
            compare_ngrams(chosen, compared, **more)
        assert "\n" not in str(caught.value)


def test_the_table(options, corpora):
    found = compare_ngrams(options, corpora[:2], orders=(2,), alphas=ALPHAS)
    lines = ngram_comparison_table(found).text().splitlines()
    assert lines[0] == "squad, k = 8: 3 examples (3 groups) replayed, alpha tuned on 3 others"
    assert lines[2].split()[:7] == ["corpus", "tokens", "n-grams", "order", "p", "alpha", "block"]
    assert [line.split()[0] for line in lines[4:10]] == ["none", "none", "text", "text", "task", "task"]
    for p in (1, 4):
        best = max((n for n in found.ngrams if n.p == p), key=lambda n: n.block_efficiency)
        assert f"  p = {p}: --rescorer ngram:{best.path} --alpha {best.alpha:g}" in lines
    assert sum("*" in line for line in lines[4:10]) == 2
