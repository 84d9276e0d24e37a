"""Drafters together: live decoding and replay take the same steps, whoever proposes and whoever chooses."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from conftest import make_heads, refused, save_tiny_base
from evaluating import Options, evaluated, opened, recorded_trace
from test_ngram_rescorer import bigram_model, save
from test_several_p import HalfRight

from lattices.errors import IncompatibleError, RescoreError, UnknownNameError
from lattices.joined.sources import HEADS, LOOKUP, MODEL
from lm.lookup_index import LookupOptions, build_lookup
from rescore.decoding import decode
from rescore.drafters import DRAFTERS, Drafter, LatticeDrafter, load_drafter
from rescore.drafters.drafting import Drafting
from rescore.drafters.lookup import PromptLookup
from rescore.drafters.recorded import record_drafter, recorded_already
from rescore.generation.live import generate
from rescore.rescorers import RESCORERS, Context, load_rescorer
from rescore.rescorers.joint_weights import read_fits
from rescore.rescorers.ngram import Ngram
from rescore.runs.evaluation import evaluate
from rescore.runs.inputs import Inputs
from rescore.runs.recording import load_trace, record_task
from rescore.runs.records import Identical
from rescore.runs.run import Run, runs_of
from rescore.runs.tuning import fit_joint, is_joint, tune
from rescore.runs.weights import fitted_to, target_of, tuned_path
from rescore.tracing import HEADER_FILE, Trace, read_trace


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A draft model: another tiny one."""
    folder = tmp_path_factory.mktemp("models") / "small"
    save_tiny_base(folder, seed=3, hidden_size=16)
    return str(folder)


@pytest.fixture
def index(options: Options, tmp_path: Path) -> str:
    """The index of a corpus that has what the base says in it."""
    said = [example.output for recording in opened(options) for example in recording.trace().examples]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"so {text} and on"}) + "\n" for text in said[:4]))
    build_lookup([corpus], tmp_path / "index", LookupOptions(tokenizer=options["base"]))
    return str(tmp_path / "index")


def fitted(options: Options, tmp_path: Path, drafters: list[str]) -> str:
    """The spec of joint with weights for these drafters."""
    ngram = str(tmp_path / "ngram") if (tmp_path / "ngram").exists() else save(tmp_path / "ngram", bigram_model())
    fit_joint(opened(options), tmp_path / "w", f"joint:ngram={ngram}", drafters=drafters, k=8, held_out=2)
    return f"joint:{tmp_path / 'w'},ngram={ngram}"


@pytest.mark.parametrize(("p", "verify"), [(1, "tree"), (5, "tree"), (4, "batch")])
def test_replay_equals_live_for_all_drafters_and_rescorers(
    options: Options, small: str, index: str, tmp_path: Path, p: int, verify: str
):
    drafters = ["heads", "lookup", f"corpus-lookup:{index},least=1", f"draft-model:{small},tokens=3"]
    joint = fitted(options, tmp_path, drafters)
    sets = [drafters, *([each] for each in drafters[1:]), drafters[:2], drafters[1::-1]]
    runs = [
        Run(rescorer, p=p, k=8, drafters=chosen, label=f"{rescorer.partition(':')[0]} {place}")
        for place, chosen in enumerate(map(tuple, sets))
        for rescorer in ("none", "context-ngram:none")
    ]
    runs += [Run(joint, p=p, k=8, drafters=tuple(drafters)), Run("oracle", k=8, drafters=tuple(drafters), label="best")]
    chosen = options | {"rescorers": runs}
    replayed = evaluated(chosen)
    live = evaluated(chosen | {"mode": "live", "verify": verify})
    assert {r.identical for r in live} == {Identical(n=6, identical=6)} and len(live.results) == len(runs)
    assert [r.accepted_histogram for r in live] == [r.accepted_histogram for r in replayed]
    by_key = {(e.rescorer, e.id): e for e in replayed.examples}
    for example in live.examples:
        same = by_key[example.rescorer, example.id]
        assert (example.accepted, example.origins, example.alone_accepted) == (
            same.accepted, same.origins, same.alone_accepted,
        )  # fmt: skip
    assert all(r.block_efficiency <= r.oracle_block_efficiency + 1e-9 for r in replayed if r.rescorer == "best")
    assert len({round(r.block_efficiency, 9) for r in replayed}) > 4, "they do not all draft the same"


def test_who_proposed_what_was_accepted(options: Options):
    drafters = ("heads", "lookup", f"draft-model:{options['base']},tokens=3")
    run = Run("none", p=6, k=8, drafters=drafters, label="all")
    evaluation = evaluated(options | {"rescorers": ["none", "lookup", run]})
    assert all(e.origins is None and e.alone_accepted is None for e in evaluation.examples if e.rescorer != "all")
    traces = {e.id: e for e in opened(options)[0].trace().examples}
    for record in evaluation.records("squad", "all", 6):
        assert record.origins is not None and record.alone_accepted is not None
        assert [len(step) for step in record.origins] == record.accepted
        assert all(step[0] == 0 and all(step[1:]) for step in record.origins), "what is accepted was proposed"
        example, position = traces[record.id], 0
        for step, alone, n in zip(record.origins, record.alone_accepted["heads"], record.accepted, strict=True):
            best = example.lattice.token_ids[position, :, 0]
            ahead = example.output_ids[position : position + len(best)]
            same = best[: len(ahead)] == ahead
            assert alone == (len(ahead) if same.all() else max(1, int(same.argmin())))
            for depth in range(1, n):
                in_head = depth < 4 and ahead[depth] in example.lattice.token_ids[position, depth, :8]
                assert bool(step[depth] & HEADS) == in_head
            position += n
    every = [bits for e in evaluation.records("squad", "all", 6) for step in e.origins or () for bits in step]
    assert {kind for kind in (HEADS, LOOKUP, MODEL) if any(bits & kind for bits in every)} == {HEADS, LOOKUP, MODEL}


def test_shares_of_several_drafters(options: Options):
    both = ("heads", "lookup")
    one, two = (Run("none", p=p, k=8, drafters=both) for p in (1, 2))
    evaluation = evaluated(options | {"rescorers": ["none", "lookup", one, two]})
    (recording,) = opened(options)
    for example in recording.trace().examples:
        alone = {e.rescorer: e for e in evaluation.examples if e.id == example.id and e.p == 1}
        together = next(e for e in evaluation.examples if e.id == example.id and e.p == 2)
        assert together.alone_accepted is not None
        most = [max(steps) for steps in zip(*together.alone_accepted.values(), strict=True)]
        assert together.accepted == most, "one draft of each: the longer one wins"
        assert sum(alone[one.label].accepted) == len(example.output_ids)


class Asked(PromptLookup):
    """Notes how many continuations it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.counts = "asked", list[int]()

    def continuations(self, contexts, firsts, count):
        self.counts.append(count)
        return super().continuations(contexts, firsts, count)


def test_text_is_looked_up_once_and_while_drafters_propose():
    """Live decoding times apart what drafters and what rescorers take."""
    drafter, context, firsts = Asked(), Context([5, 6, 7, 5, 8]), np.array([5])
    for in_context, joined in ((True, []), (False, [4])):
        drafter.in_context = in_context
        for rescorer, counts in (("none", [3]), ("oracle", joined)):
            drafting = Drafting(load_rescorer(rescorer), [drafter], p=3)
            drafter.counts.clear()
            proposals = drafting.propose([context], firsts)
            assert drafter.counts == counts
            if rescorer == "none":
                assert drafting.choose(proposals, [context])[0, :, 1].tolist() == [8, 6] and drafter.counts == counts


def test_a_tree_of_so_many_nodes(options: Options, tmp_path: Path):
    joint = fitted(options, tmp_path, ["heads", "lookup"])
    (run,) = runs_of([joint], ks=(8,), nodes=5)
    assert (run.p, run.label.endswith("nodes=5")) == (5, True)
    (record, *_) = evaluated(options | {"rescorers": [run]}, out=tmp_path / "out").examples
    assert all(len(draft) <= 5 for draft in record.drafts)
    with pytest.raises(RescoreError, match="--nodes is used by no --rescorer"):
        runs_of(["none"], nodes=5)
    with pytest.raises(RescoreError, match="--nodes 0; a tree has the base's own token at least"):
        runs_of([joint], nodes=0)
    assert [run.p for run in runs_of([f"{joint},nodes=0"])] == [1], "0: as many as p branches have"
    with pytest.raises(RescoreError, match=r"joint: give .* nodes of 1 to"):
        runs_of([f"{joint},nodes=-2"])[0].load()


class TestATraceOfAnotherDrafter:
    """It holds lattices in the place of the heads'."""

    SAYS: ClassVar = {"drafter": "draft-model 0123456789abcdef 8"}

    def test_weights_for_the_heads_are_none_for_it(self, options: Options):
        (recording,) = opened(options)
        trace = recording.trace()
        other = replace(trace, header=msgspec.structs.replace(trace.header, settings=trace.header.settings | self.SAYS))
        chosen = {"": (load_rescorer("none"), (load_drafter("heads"), load_drafter("lookup")))}
        sources = [[drafter.source for drafter in fitted_to(target_of(of), chosen)[""][1]] for of in (trace, other)]
        assert sources == [["heads", "lookup"], ["heads-of-draft-model 0123456789ab 8", "lookup"]]

    def test_what_is_tuned_on_it_is_not_for_the_heads(self, options: Options):
        (recording,) = opened(options)
        other = replace(recording, settings=recording.settings | self.SAYS)
        chosen = (HalfRight(), (load_drafter("heads"),))
        assert tuned_path(recording, chosen, k=8, p=1) != tuned_path(other, chosen, k=8, p=1)


class TestTuning:
    def test_it_is_of_the_drafters_that_are_given(self, options: Options, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(RESCORERS.built_in, "weighted", HalfRight)
        how: dict[str, Any] = {"alphas": (1.0,), "ks": (8,), "ps": (1,), "drafters": ("lookup", "heads")}
        sweeps = tune(opened(options), ["weighted", "weighted:drafters=heads"], **how)
        assert [sweep.rescorer for sweep in sweeps] == ["weighted:drafters=lookup+heads", "weighted"]
        run = Run("weighted", k=8, alpha="tuned", drafters=("lookup", "heads"))
        assert evaluated(options | {"rescorers": [run]}).document.results[0].alpha is not None
        with pytest.raises(RescoreError, match=r"run: rescore tune .*--rescorer weighted --drafter lookup,heads "):
            evaluated(options | {"rescorers": [replace(run, p=3)]})

    def test_what_joint_alone_takes_is_refused_for_others(self, tmp_path: Path):
        assert is_joint(["joint"], tmp_path, ["recency"]) and not is_joint(["ngram"], None)
        with pytest.raises(RescoreError, match="--without is for the weights of joint"):
            is_joint(["ngram"], None, ["recency"])
        with pytest.raises(RescoreError, match="drop --alphas"):
            is_joint(["joint"], tmp_path, (), (1.0,))


def test_a_base_without_heads_drafts_with_the_text(options: Options, small: str):
    chosen = {**options, "heads": None} | {"rescorers": ("lookup", f"draft-model:{small},tokens=3")}
    (recording,) = opened({**options, "heads": None}, heads_needed=False)
    evaluation = evaluate(recording, runs_of(chosen["rescorers"], ks=(8,)))
    with_heads = evaluated(options | {"rescorers": chosen["rescorers"]})
    assert [r.accepted_histogram for r in evaluation] == [r.accepted_histogram for r in with_heads]
    assert {r.h for r in evaluation} == {1}
    live = evaluate(recording, runs_of(chosen["rescorers"], ks=(8,)), live=True)
    assert [r.accepted_histogram for r in live] == [r.accepted_histogram for r in with_heads]
    refused(lambda: evaluate(recording, ["none"]), "none needs block heads")


def test_a_weight_is_tuned_for_what_is_chosen_among(options: Options, small: str):
    spec = f"draft-model:{small},tokens=3"
    (recording,) = opened({**options, "heads": None}, heads_needed=False)
    how = {"alphas": (0.5,), "ks": (8,), "ps": (1,), "held_out": 2}
    (tuned,) = tune(recording, ["context-ngram:none"], drafters=(spec,), **how)
    assert tuned.rescorer == f"context-ngram:none,drafters={spec}"
    run = Run("context-ngram:none", drafters=(spec,), k=8, alpha="tuned")
    alpha = evaluate(recording, [run]).config.runs["squad"][0].alpha
    assert alpha is not None and (alpha.source, alpha.alpha) == ("tuned", tuned.alpha)
    other = dataclasses.replace(run, p=2)
    refused(
        lambda: evaluate(recording, [other]), "no weight of", f"--rescorer context-ngram:none --drafter {spec} --k 8"
    )
    refused(lambda: is_joint(["ngram"], None, ["recency"]), "--without is for the weights of joint")


def test_weights_have_a_file_for_each_set_of_drafters(options: Options, small: str, tiny_folder: Path, tmp_path: Path):
    fitted(options, tmp_path, ["heads", "lookup"])
    fitted(options, tmp_path, ["lookup", "heads"])
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["heads+lookup.json"]
    for model in (small, str(tiny_folder)):
        fitted(options, tmp_path, [f"draft-model:{model},tokens=2", "heads"])
    assert len(list((tmp_path / "w").iterdir())) == 3


class TestIdentities:
    """What is drafted with is known again, and nothing that was drafted by something else passes for it."""

    def of(self, drafter: Drafter, trace: Trace) -> str:
        return drafter.fit(target_of(trace)).identity

    def test_a_trace_by_all_that_is_in_it(self, options: Options, tmp_path: Path):
        trace = recorded_trace(options, tmp_path / "a")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        one, other = (load_drafter(f"trace:{tmp_path / name}") for name in "ab")
        assert self.of(one, trace) == self.of(other, trace)
        arrow = next((tmp_path / "b").glob("part-*/*.arrow"))
        arrow.write_bytes(arrow.read_bytes()[:-1] + b"?")
        assert self.of(one, trace) != self.of(other, trace)

    def test_a_trace_of_a_larger_vocabulary_is_refused(self, options: Options, tmp_path: Path):
        trace = recorded_trace(options, tmp_path / "a")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        header = json.loads((tmp_path / "b" / HEADER_FILE).read_text())
        (tmp_path / "b" / HEADER_FILE).write_text(json.dumps(header | {"vocab_size": 1 << 20}))
        other = load_drafter(f"trace:{tmp_path / 'b'}")
        refused(lambda: self.of(other, trace), "has a vocabulary of 1048576, more than", IncompatibleError)

    def test_an_index_that_was_built_again(self, options: Options, index: str, tmp_path: Path):
        drafter, trace = load_drafter(f"corpus-lookup:{index}"), recorded_trace(options, tmp_path / "a")
        assert self.of(drafter, trace) == drafter.identity
        (tmp_path / "other.txt").write_text("quite another text\n")
        build_lookup([tmp_path / "other.txt"], Path(index), LookupOptions(tokenizer=options["base"]))
        assert self.of(drafter, trace) == load_drafter(f"corpus-lookup:{index}").identity != drafter.identity

    def test_drafts_of_other_outputs_are_not_read_from_the_cache(self, options: Options, small: str, tmp_path: Path):
        trace = recorded_trace(options, tmp_path / "a")
        drafter = load_drafter(f"draft-model:{small},tokens=2").fit(target_of(trace))
        assert isinstance(drafter, LatticeDrafter)
        how = {"task": "squad", "settings": {"of": "this"}}
        record_drafter(trace, drafter, **how)
        record_drafter(trace, drafter, **how, folder=tmp_path / "drafts")
        first, *others = trace.examples
        changed = dataclasses.replace(
            first, output_ids=first.output_ids[:-1], lattice=first.lattice[:-1], entropies=first.entropies[:-1],
            margins=first.margins[:-1],
        )  # fmt: skip
        other = Trace(trace.header, (changed, *others))
        assert recorded_already(other, drafter, **how) is None
        refused(lambda: record_drafter(other, drafter, **how, folder=tmp_path / "drafts"), "another prompt or output")
        made = record_drafter(other, drafter, **how)
        assert len(made.examples[0].lattice) == len(changed.output_ids)
        assert (recorded_already(other, drafter, **how) or {}).keys() == {e.id for e in other.examples}

    def test_drafts_beside_a_given_trace_are_those_of_these_libraries(
        self, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        recorded_trace(options, tmp_path / "a")
        before = load_trace(tmp_path / "a").all_settings
        monkeypatch.setattr("rescore.tracing.software", lambda: {"torch": "0.1"})
        after = load_trace(tmp_path / "a").all_settings
        assert after["recorded_by"]["torch"] == "0.1" != before["recorded_by"]["torch"]
        assert {**after, "recorded_by": 0} == {**before, "recorded_by": 0}

    def test_a_drafter_without_one(self, options: Options, tmp_path: Path, small: str):
        trace = recorded_trace(options, tmp_path / "a")
        drafter = load_drafter(f"draft-model:{small},tokens=2").fit(target_of(trace))
        assert isinstance(drafter, LatticeDrafter)
        drafter.identity = ""
        refused(lambda: record_drafter(trace, drafter, task="squad", settings={}), "set its `identity`")
        nameless = PromptLookup()
        nameless.identity = ""
        run = Run("none", drafters=(nameless,), k=8)
        refused(lambda: evaluated(options | {"rescorers": (run,)}, out=tmp_path / "out"), "set its `identity`")


class TestTraces:
    def test_a_drafter_s_trace_is_a_trace_and_a_drafter(self, options: Options, small: str, tmp_path: Path):
        spec = f"draft-model:{small},tokens=3"
        inputs = Inputs(task="squad", **{name: value for name, value in options.items() if name != "k"})
        made = record_task(inputs, spec, tmp_path / "trace", k=8)
        again = record_task(inputs, spec, tmp_path / "trace", k=8)
        read = read_trace(tmp_path / "trace")
        assert [e.id for e in made.examples] == [e.id for e in again.examples] == [e.id for e in read.examples]
        assert read.header.h == 4 and np.isfinite(read.examples[0].entropies).all()
        own = evaluated(dict(trace=str(tmp_path / "trace"), k=8, rescorers=("none", "context-ngram:none", "oracle")))
        drafted = evaluated(options | {"rescorers": [
            spec, Run("context-ngram:none", drafters=(spec,), k=8), Run("oracle", drafters=(spec,), k=8),
            f"trace:{tmp_path / 'trace'}",
        ]})  # fmt: skip
        histograms = [r.accepted_histogram for r in drafted]
        assert histograms[:3] == [r.accepted_histogram for r in own] and histograms[3] == histograms[0]

    def test_a_trace_of_other_outputs_is_refused(self, options: Options, tmp_path: Path):
        recorded_trace(options | {"max_new_tokens": 9}, tmp_path / "short")
        chosen = options | {"rescorers": [f"trace:{tmp_path / 'short'}"]}
        refused(lambda: evaluated(chosen), "has another output for the example", IncompatibleError)
        refused(lambda: evaluated(chosen | {"mode": "live"}), "can be replayed only; drop --mode live")
        recorded_trace(options | {"limit": 2}, tmp_path / "few")
        chosen = options | {"rescorers": [f"trace:{tmp_path / 'few'}"]}
        refused(lambda: evaluated(chosen), "lacks the example", IncompatibleError)
        refused(lambda: load_drafter("trace"), "write trace:FOLDER")
        refused(lambda: load_drafter(f"trace:{tmp_path}"), "no trace in")


class TestTrouble:
    def test_what_is_no_drafter(self, options: Options):
        refused(lambda: load_drafter("head"), "unknown drafter 'head'; did you mean heads", UnknownNameError)
        refused(lambda: Run("lookp").load(), "unknown rescorer 'lookp'; did you mean lookup", UnknownNameError)
        refused(lambda: load_drafter("lookup:depth=3"), "the drafter lookup takes no depth; it takes tokens, least")
        refused(lambda: load_drafter("corpus-lookup"), "needs an index (rescore build-lookup)")
        for twice in (("lookup", "lookup"), ("heads", "lookup", "heads")):
            refused(
                lambda twice=twice: evaluated(options | {"rescorers": [Run("none", drafters=twice)]}), "is there twice"
            )
        refused(lambda: Run("lookup", drafters=("heads",)), "lookup is a drafter, whose own drafts are asked for")
        refused(lambda: Run("none:drafters=lookup", drafters=("heads",)), "are given twice")

    def test_weights_for_other_drafters(self, options: Options, small: str, tmp_path: Path):
        joint = fitted(options, tmp_path, ["heads", "lookup"])
        for drafters in (("lookup",), ("heads", "lookup", f"draft-model:{small}")):
            run = Run(joint, k=8, drafters=drafters)
            refused(
                lambda run=run: evaluated(options | {"rescorers": [run]}),
                "were fitted for the drafters heads+lookup, not for lookup" if len(drafters) == 1 else "not for heads",
                IncompatibleError,
            )  # fmt: skip
        fitted(options, tmp_path, ["lookup"])
        assert len(read_fits(tmp_path / "w", Ngram(joint.partition("ngram=")[2]))) == 2
        evaluated(options | {"rescorers": [Run(joint, k=8, drafters=("lookup",)), Run(joint, k=8)]})

    def test_an_index_and_a_draft_model_of_another_tokenizer(self, options: Options, index: str, small: str):
        path = Path(index) / "lookup.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"tokenizer_sha256": "0" * 64}))
        chosen = options | {"rescorers": [f"corpus-lookup:{index}"]}
        refused(lambda: evaluated(chosen), "was built with the tokenizer of", IncompatibleError)
        tokens = Path(index) / "tokens.npy"
        tokens.write_bytes(tokens.read_bytes()[:-4])
        path.write_text(json.dumps(record))
        refused(lambda: evaluated(chosen), "bytes where", "build it again")

    def test_a_prompt_of_one_token(self, options: Options, tmp_path: Path, index: str, small: str, tiny_base):
        drafters = ["heads", "lookup", f"corpus-lookup:{index}", f"draft-model:{small},tokens=2"]
        joint = fitted(options, tmp_path, drafters)
        greedy = decode(tiny_base, None, tiny_base.encode_prompt("a", chat=False), max_new_tokens=12).output_ids
        for run in (Run(joint, k=8, drafters=tuple(drafters)), *map(Run, drafters[1:])):
            given = {"heads": make_heads(tiny_base), "prompt": "a", "chat": False, "max_new_tokens": 12}
            assert generate(tiny_base, **given, rescorer=run).token_ids == greedy


def test_the_example_of_the_docs_is_one(options: Options, monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[2] / "docs" / "drafters.md").read_text()
    example = next(code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "class " in code)
    made: dict[str, type] = {}
    exec(example, made)
    monkeypatch.setitem(DRAFTERS.built_in, "again", made["Again"])
    runs = ["again:times=2", Run("none", p=4, k=8, drafters=("heads", "again"))]
    replayed, live = (evaluated(options | {"rescorers": runs, "mode": mode}) for mode in ("replay", "live"))
    assert [r.accepted_histogram for r in live] == [r.accepted_histogram for r in replayed]
    assert {r.identical for r in live} == {Identical(n=6, identical=6)}
    assert len(replayed.results[0].marginal) == 3 and replayed.results[0].block_efficiency > 1
