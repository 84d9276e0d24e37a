"""Heads that draft from a part of the vocabulary: live as in replay, known by it, and swept against all of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, make_heads, refused, save_tiny_base, write_lines
from evaluating import Options, evaluated, opened, recorded_trace
from made_costs import costs_for
from test_learned_bigram_rescorer import folder as bigram  # noqa: F401 (a fixture)
from test_ngram_rescorer import bigram_model, save

from lattices.errors import IncompatibleError
from lm.base.catalog import load_base
from lm.base.own_output import OwnOutput
from lm.draft_vocabulary import build_draft_vocabulary, read_draft_vocabulary
from lm.heads.block_heads import BlockHeads
from rescore.acceptance import load_rule
from rescore.costs.measuring import measure_costs
from rescore.decoding import decode
from rescore.drafters import load_drafter
from rescore.drafters.drafting import check_drafters
from rescore.drafters.heads import Heads
from rescore.drafters.recorded import recorded_already
from rescore.generation.live import generate
from rescore.runs.evaluated import load_run
from rescore.runs.inputs import Inputs
from rescore.runs.recording import load_trace, record_task
from rescore.runs.records import Identical
from rescore.runs.run import Run, runs_of
from rescore.runs.tuning import fit_joint
from rescore.runs.weights import target_of
from rescore.studies.draft_vocabulary import VocabularySweep
from rescore.tracing import read_trace

SIZE = 40


@pytest.fixture
def options(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path) -> Options:
    return dict(
        base=str(tiny_folder), heads=str(tiny_heads_folder), data=str(squad_file), dtype="float64", device="cpu", k=8,
        max_new_tokens=24,
    )  # fmt: skip


@pytest.fixture
def ranking(options: Options, tmp_path: Path) -> Path:
    """A ranking of the tokens that the base says."""
    said = [{"text": e.output_ids.tolist()} for recording in opened(options) for e in recording.trace().examples]
    rows = write_lines(tmp_path / "said.jsonl", said)
    out = tmp_path / "ranking.json"
    build_draft_vocabulary(corpus=[str(rows)], out=out, tokenizer=options["base"], own=OwnOutput())
    return out


@pytest.fixture
def heads(ranking: Path) -> str:
    """The spec of heads that draft from few tokens."""
    return f"heads:vocabulary={SIZE},ranking={ranking}"


def projected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes from how many tokens heads draft, every time that they are asked."""
    sizes: list[int] = []
    slots = BlockHeads.slots

    def noted(self, *given, **how):
        found = slots(self, *given, **how)
        sizes.append(found[-1].logits.shape[-1])
        return found

    monkeypatch.setattr(BlockHeads, "slots", noted)
    return sizes


@pytest.mark.parametrize(("p", "verify"), [(1, "tree"), (5, "tree"), (4, "batch")])
def test_replay_equals_live_for_all_rescorers(
    options: Options, heads: str, bigram: Path, tmp_path: Path, monkeypatch, p: int, verify: str  # noqa: F811
):  # fmt: skip
    ngram = save(tmp_path / "ngram", bigram_model())
    small = str(save_tiny_base(tmp_path / "small", seed=3, hidden_size=16))
    fit_joint(opened(options), tmp_path / "w", f"joint:ngram={ngram}", drafters=[heads, "lookup"], k=8, held_out=2)
    joint = f"joint:{tmp_path / 'w'},ngram={ngram}"
    rescorers = [
        "none", f"ngram:{ngram}", "context-ngram:none", f"context-ngram:{ngram}", f"learned-bigram:{bigram}",
        f"neural:{small}", f"ngram-neural:{small},first=ngram,ngram={ngram}",
    ]  # fmt: skip
    runs = [Run(each, p=p, k=8, drafters=(heads,), label=f"{place}") for place, each in enumerate(rescorers)]
    runs += [Run(each, p=p, k=8, drafters=(heads, "lookup"), label=f"joined {each[:5]}") for each in (joint, "none")]
    runs += [Run("oracle", k=8, drafters=among, label=f"best {len(among)}") for among in ((heads,), (heads, "lookup"))]
    sizes = projected(monkeypatch)
    replayed = evaluated(options | {"rescorers": [*runs, "none"]})
    assert len(set(sizes)) > 1 and all(SIZE <= size < 100 for size in sizes), "recorded with few tokens"
    sizes.clear()
    live = evaluated(options | {"rescorers": [*runs, "none"], "mode": "live", "verify": verify})
    assert sizes, "they are asked"
    assert {r.identical for r in live} == {Identical(n=6, identical=6)}
    assert [r.accepted_histogram for r in live] == [r.accepted_histogram for r in replayed]
    by_key = {(e.rescorer, e.p, e.id): e for e in replayed.examples}
    for example in live.examples:
        same = by_key[example.rescorer, example.p, example.id]
        assert (example.accepted, example.origins) == (same.accepted, same.origins)
        # Live a draft ends where the output must.
        assert all(a == b[: len(a)] for a, b in zip(example.drafts, same.drafts, strict=True))
    plain, few = replayed.result("none", p=1), replayed.result("0")
    assert plain.accepted_histogram != few.accepted_histogram, "they draft otherwise than from all tokens"


def test_what_is_recorded_is_what_live_decoding_sees(options: Options, heads: str, monkeypatch):
    (recording,) = opened(options)
    trace = recording.trace()
    seen = {}
    lattice = BlockHeads.lattice

    def noted(self, base, hidden, *given, **how):
        found = lattice(self, base, hidden, *given, **how)
        seen[tuple(hidden[0, :4].tolist())] = found
        return found

    monkeypatch.setattr(BlockHeads, "lattice", noted)
    evaluated(options | {"rescorers": [Run("none", k=8, drafters=(heads,))], "mode": "live"})
    drafter = load_drafter(heads).fit(dataclasses.replace(target_of(trace), models=recording.loads))
    known = recorded_already(trace, drafter, task="squad", settings=recording.all_settings)
    assert known is not None
    positions = np.concatenate([known[e.id].token_ids[:, :, :8] for e in trace.examples])
    logps = np.concatenate([known[e.id].logps[:, :, :8] for e in trace.examples])
    assert len(seen) > 20
    for found in seen.values():
        (at,) = np.flatnonzero((positions == found.token_ids).all(axis=(1, 2)))[:1]
        np.testing.assert_allclose(logps[at], found.logps[0], rtol=1e-5, atol=1e-6)
    prompts = {e.id: set(e.prompt_ids.tolist()) for e in trace.examples}
    common = set(read_draft_vocabulary(Path(heads.partition("ranking=")[2])).ranked(257)[:SIZE].tolist())
    for name, found in known.items():
        assert set(found.token_ids[:, 1:].ravel().tolist()) <= common | prompts[name]


def test_all_tokens_are_as_no_vocabulary(options: Options, monkeypatch):
    sizes = projected(monkeypatch)
    whole = "heads:vocabulary=257"
    runs = ["none", *(Run("none", k=8, drafters=drafters) for drafters in ((whole,), (whole, "lookup")))]
    for mode in ("replay", "live"):
        plain, same, joined = evaluated(options | {"rescorers": runs, "mode": mode}).results
        assert plain.accepted_histogram == same.accepted_histogram and joined.h == 4
    assert set(sizes) == {257}
    assert load_drafter("heads:257").fit(target_of(opened(options)[0].trace())).identity == "heads"


def test_a_shorter_block_is_recorded_apart(options: Options, heads: str):
    run = Run("none", k=8, drafters=(heads,))
    found = {h: evaluated(options | {"rescorers": [run], "h": h}).results[0] for h in (None, 3, 2, None, 3)}
    for h in (3, 2):
        live = evaluated(options | {"rescorers": [run], "h": h, "mode": "live"}).results[0]
        assert live.accepted_histogram == found[h].accepted_histogram and live.h == h


def test_a_folder_belongs_to_a_vocabulary(options: Options, ranking: Path, tmp_path: Path):
    def of(size: int, ranks: Path = ranking):
        run = Run("none", k=8, drafters=(f"heads:vocabulary={size},ranking={ranks}",), label="few")
        return evaluated(options | {"rescorers": [run]}, out=tmp_path / "out")

    first = of(SIZE)
    (identity,) = first.config.runs["squad"][0].drafters
    assert identity.startswith(f"heads of {SIZE} tokens ")
    assert of(SIZE).results == first.results and load_run(tmp_path / "out").results == first.results
    refused(lambda: of(SIZE + 1), IncompatibleError, "holds results of another configuration", "drafters")
    document = json.loads(ranking.read_text())
    document["token_ids"] = document["token_ids"][::-1]
    document["counts"] = [1] * len(document["counts"])
    document["tokens"] = len(document["counts"])
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    refused(lambda: of(SIZE, other), IncompatibleError, "holds results of another configuration")


class TestSweep:
    def test_each_size_beside_all_tokens(self, options: Options, ranking: Path):
        asked = runs_of(
            ["none", "lookup", "context-ngram:none", "oracle"], ks=(8,), drafters=(f"heads:ranking={ranking}",)
        )
        sweep = VocabularySweep.of(asked, (10, SIZE, 257))
        assert [run.label for run in sweep.runs][:2] == ["none", f"none:drafters=heads:vocabulary=10,ranking={ranking}"]
        assert len(sweep.runs) == 3 * 4 + 1 and Run("lookup", k=8) in sweep.runs
        evaluation = evaluated(options | {"rescorers": sweep.runs})
        rows = sweep.of_evaluation(evaluation)
        assert [(row.rescorer, row.vocabulary) for row in rows] == [
            (name, size) for name in ("none", "context-ngram:none", "oracle") for size in (None, 10, SIZE, 257)
        ]
        for row in rows:
            all_tokens = evaluation.result(row.rescorer).block_efficiency
            if row.vocabulary is None:
                assert row.block_efficiency == all_tokens and row.change is None
            else:
                assert row.change == pytest.approx(row.block_efficiency / all_tokens - 1)
        changes = {(row.rescorer, row.vocabulary): row.change for row in rows}
        assert changes["none", 257] == changes["oracle", 257] == 0.0 != changes["oracle", 10]

    def test_by_a_lossy_rule(self, options: Options, ranking: Path):
        """The results are found under the labels that say the rule, which the sizes have as well."""
        sweep = VocabularySweep.of(runs_of(["none"], ks=(8,), drafters=(f"heads:ranking={ranking}",)), (SIZE,))
        few = options | {"limit": 2, "max_new_tokens": 6, "mode": "live"}
        evaluation = evaluated(few | {"rescorers": sweep.runs}, rule=load_rule("top-k:2"))
        rows = [(row.rescorer, row.vocabulary) for row in sweep.of_evaluation(evaluation)]
        assert rows == [("none [lossy: top-k:2]", None), ("none [lossy: top-k:2]", SIZE)]

    def test_nothing_without_sizes(self):
        runs = runs_of(["none", "joint"])
        sweep = VocabularySweep.of(runs, ())
        assert sweep.runs == runs and not sweep.sizes

    def test_the_drafters_of_a_run_stay(self, tmp_path: Path):
        ngram = save(tmp_path / "ngram", bigram_model())
        runs = runs_of(["none:drafters=lookup+heads", "heads", f"ngram:alpha=0.5,path={ngram}"])
        sweep = VocabularySweep.of(runs, (9,))
        assert [run.label for run in sweep.runs] == [
            "none:drafters=lookup+heads", "none:drafters=lookup+heads:vocabulary=9", "heads", "heads:vocabulary=9",
            runs[2].label, f"{runs[2].label},drafters=heads:vocabulary=9",
        ]  # fmt: skip
        assert sweep.runs[5].alpha == 0.5 and sweep.runs[1].drafters == ("lookup", "heads:vocabulary=9")

    def test_where_it_says_nothing(self):
        refused(lambda: VocabularySweep.of(runs_of(["lookup"]), (9,)), "no --rescorer drafts with them; drop it")
        twice = runs_of(["none"], drafters=["heads:vocabulary=8"])
        refused(lambda: VocabularySweep.of(twice, (9,)), "says its vocabulary; drop that, or --draft-vocabulary")


def test_costs_by_size_plan_live_as_in_replay(options: Options, heads: str, tmp_path: Path):
    ngram = save(tmp_path / "ngram", bigram_model())
    fit_joint(opened(options), tmp_path / "w", f"joint:ngram={ngram}", drafters=["heads", "lookup"], k=8, held_out=2)
    sizes = {30: 0.5, 50: 2.5, 257: 40.0}
    costs = costs_for(options, [[10, 12, 20], [11, 13, 22]], heads_ms=40.0, vocabulary_ms=sizes)
    assert costs.heads is not None
    assert [costs.heads.of(size) for size in (None, 1, 40, 50, 257)] == [40.0, 0.5, 1.5, 2.5, 40.0]
    alone = costs_for(options, [[10, 12, 20], [11, 13, 22]]).heads
    assert alone is not None and alone.of(40) == 10.0, "nothing of it was measured"
    spec = f"joint:{tmp_path / 'w'},ngram={ngram},nodes=auto"
    runs = [Run(spec, p=32, k=8, drafters=(each, "lookup"), label=each[:7]) for each in ("heads", heads)]
    modes = ("replay", "live")
    replayed, live = (evaluated(options | {"rescorers": runs, "mode": mode}, costs=costs) for mode in modes)
    assert [r.accepted_histogram for r in live] == [r.accepted_histogram for r in replayed]
    drafted = [sum(len(d) for e in replayed.records("squad", run.label, 32) for d in e.drafts) for run in runs]
    assert drafted[0] != drafted[1], "cheap heads are asked more often"


def test_measured_costs_have_the_sizes_that_the_base_has(tiny_base, monkeypatch):
    monkeypatch.setattr("rescore.costs.measuring.VOCABULARIES", (16, 64, 1024))
    heads = measure_costs(tiny_base, make_heads(tiny_base), contexts=(8,), nodes=(1, 2), repeats=1).heads
    assert heads is not None
    assert list(heads.vocabulary_ms) == [16, 64, 257] and heads.ms == heads.vocabulary_ms[257]
    assert measure_costs(tiny_base, None, contexts=(8,), nodes=(1, 2), repeats=1).heads is None


def test_generation_drafts_from_the_prompt_s_tokens_as_well(options: Options, heads: str, tiny_base, monkeypatch):
    sizes = projected(monkeypatch)
    some = BlockHeads.first(make_heads(tiny_base), 4)
    prompt = "A prompt with tokens of its own: #~%"
    run = Run("none", k=8, drafters=(heads,))
    text = generate(tiny_base, some, prompt, rescorer=run, max_new_tokens=16).text
    ids = tiny_base.encode_prompt(prompt, chat=True)
    assert text == tiny_base.decode_text(decode(tiny_base, None, ids, max_new_tokens=16).output_ids)
    common = set(read_draft_vocabulary(Path(heads.partition("ranking=")[2])).ranked(257)[:SIZE].tolist())
    assert set(sizes) == {len(common | set(ids))} and len(common | set(ids)) > SIZE


def test_weights_in_memory_that_change_are_seen(tiny_base, options: Options, heads: str):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(tiny_base.model.config).double()
    base = load_base(model, tokenizer=tiny_base.tokenizer)
    drafter = load_drafter(heads).fit(target_of(opened(options)[0].trace()))
    assert isinstance(drafter, Heads)
    state = torch.ones(1, base.hidden_size, dtype=torch.float64)
    before, again = (drafter.projection(base, [1, 2]) for _ in range(2))
    assert before is not None and again is not None and torch.equal(before(state), again(state))
    with torch.no_grad():
        base.output_embeddings.weight.mul_(2.0)
    after = drafter.projection(base, [1, 2])
    assert after is not None and torch.allclose(after(state), 2 * before(state))
    of_files = load_base(options["base"], dtype="float64", device="cpu")
    kept = [drafter.projection(of_files, [place]) for place in range(2)]
    assert kept[0] is not None and kept[1] is not None and kept[0].rows is kept[1].rows, "laid out once"


def test_a_trace_of_what_they_propose(options: Options, heads: str, tmp_path: Path):
    inputs = Inputs(**{name: value for name, value in options.items() if name != "k"}, task="squad")
    trace = record_task(inputs, heads, tmp_path / "few", k=8)
    assert trace.header.settings["drafter"].startswith(f"heads of {SIZE} tokens")
    again = record_task(inputs, heads, tmp_path / "few", k=8)
    for one, other in zip(trace.examples, again.examples, strict=True):
        assert one.lattice.token_ids.tolist() == other.lattice.token_ids.tolist()
    (result,) = evaluated({"trace": str(tmp_path / "few"), "k": 8, "rescorers": ["none"]}).results
    (own,) = evaluated(options | {"rescorers": [Run("none", k=8, drafters=(heads,))]}).results
    assert result.accepted_histogram == own.accepted_histogram
    assert read_trace(tmp_path / "few").header.k == 8


class TestRefused:
    @pytest.mark.parametrize("size", [0, -3])
    def test_sizes_that_are_none(self, size: int):
        refused(lambda: load_drafter(f"heads:vocabulary={size}"), f"vocabulary = {size}; give 1 token or more")

    def test_other_texts(self):
        refused(lambda: load_drafter("heads:vocabulary=many"), "vocabulary is a whole number, and 'many' is none")
        refused(lambda: load_drafter("heads:ranking=x"), "add vocabulary=N")
        refused(lambda: load_drafter("heads:width=3"), "takes no width; it takes vocabulary, ranking")
        both = [load_drafter("heads"), load_drafter("heads:vocabulary=9")]
        refused(lambda: check_drafters(both, live=False), "--drafter heads is there twice")

    def test_more_than_there_are(self, options: Options, ranking: Path):
        run = Run("none", k=8, drafters=(f"heads:vocabulary=258,ranking={ranking}",))
        asked = options | {"rescorers": [run]}
        refused(lambda: evaluated(asked), IncompatibleError, "vocabulary = 258, but", "has 257 tokens")
        few = options | {"rescorers": [Run("none", k=8, drafters=(f"heads:vocabulary=7,ranking={ranking}",))]}
        refused(lambda: evaluated(few), "k = 8, but heads:vocabulary=7", "top 7 of each slot")

    def test_without_a_ranking(self, options: Options):
        run = Run("none", k=8, drafters=(f"heads:vocabulary={SIZE}",))
        refused(
            lambda: evaluated(options | {"rescorers": [run]}), "no draft vocabulary is shipped for the tokenizer of"
        )
        lost = Run("none", k=8, drafters=(f"heads:vocabulary={SIZE},ranking=/nowhere.json",))
        refused(lambda: evaluated(options | {"rescorers": [lost]}), "no draft vocabulary in /nowhere.json")

    def test_a_given_trace_has_no_states(self, options: Options, heads: str, tmp_path: Path):
        recorded_trace(options, tmp_path / "t")
        given = {"trace": str(tmp_path / "t"), "k": 8, "rescorers": [Run("none", k=8, drafters=(heads,))]}
        refused(lambda: evaluated(given), "drafts with the base and its heads", "drop --trace")
        assert load_trace(tmp_path / "t").loads is None

    def test_a_base_without_heads(self, options: Options, ranking: Path):
        without = {name: value for name, value in options.items() if name != "heads"}
        run = Run("none", k=8, drafters=(f"heads:vocabulary={SIZE},ranking={ranking}",))
        refused(lambda: evaluated(without | {"rescorers": [run]}), "no block heads are shipped for")
        assert run.needs_heads


class TestCommand:
    def test_a_row_a_size(self, rescore: Command, model: list[object], ranking: Path):
        run = rescore(
            "eval", *model, "--k", 8, "--rescorer", "none", "--drafter", f"heads:ranking={ranking}",
            "--draft-vocabulary", f"{SIZE},257",
        )  # fmt: skip
        assert run.code == 0, run.err
        lines = [line.split() for line in run.out.splitlines()[-5:-1]]
        assert [line[:4] for line in lines] == [
            ["-----", "--------", "-", "------"], ["squad", "none", "1", "all"], ["squad", "none", "1", str(SIZE)],
            ["squad", "none", "1", "257"],
        ]  # fmt: skip
        assert lines[3][5] == "+0.0%"

    def test_the_table_of_a_build(self, rescore: Command, tiny_folder: Path, tmp_path: Path):
        corpus = tmp_path / "x.txt"
        corpus.write_text("one two\n")
        run = rescore("build-draft-vocabulary", corpus, "--tokenizer", tiny_folder, "--out", tmp_path / "v.json")
        assert (run.code, run.err) == (0, "")
        assert f"{tmp_path / 'v.json'}: 8 tokens, 7 of them distinct; next:" in run.out
        assert f"--base {tiny_folder} --draft-vocabulary 7 --drafter heads:ranking={tmp_path / 'v.json'}" in run.out
        document = rescore(
            "build-draft-vocabulary", corpus, "--tokenizer", tiny_folder, "--out", tmp_path / "v.json", "--json"
        ).document
        assert document["coverage"] == {"7": 1.0} and document["tokens"] == 8

    def test_mistakes_in_one_line(self, rescore: Command, model: list[object], ranking: Path, tmp_path: Path):
        rescore("eval", *model, "--draft-vocabulary", "0").refused("vocabulary = 0; give 1 token or more")
        rescore("eval", *model, "--draft-vocabulary", "few").refused("whole numbers with commas")
        rescore("eval", *model, "--rescorer", "lookup", "--draft-vocabulary", 9).refused("drop it")
        rescore("eval", *model, "--draft-vocabulary", 100).refused("no draft vocabulary is shipped")
        ranking.write_text("{")
        rescore("eval", *model, "--k", 8, "--drafter", f"heads:vocabulary=9,ranking={ranking}").refused(
            "not valid JSON"
        )
        rescore("build-draft-vocabulary", tmp_path / "no.txt", "--out", tmp_path / "v").refused("can't read")
