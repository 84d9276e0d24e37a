"""Where accepted tokens came from, in results and in all that reads them; results of other drafters than heads."""

from __future__ import annotations

import csv
import io
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import refused
from evaluating import Options, evaluated, recorded_trace
from made_records import example_record, made_result, run_config

from lattices.joined import sources as candidates
from lattices.lattice import Lattice
from lm.files import write_json
from lm.records import plain
from rescore import drafters
from rescore.drafters import LatticeDrafter, load_drafter
from rescore.drafters.provenance import provenance
from rescore.reports.inspection import Inspection, inspect_example
from rescore.reports.inspection_view import inspection_lines
from rescore.reports.page import report
from rescore.runs.evaluated import Evaluation, load_run
from rescore.runs.records import SOURCES, ResultsDocument, SourceShare, sources_of
from rescore.runs.run import runs_of
from rescore.runs.summary import summarize
from rescore.runs.tables import results_csv, results_tables
from rescore.studies.analysis import analyse
from rescore.studies.comparison import Selection, compare
from rescore.studies.cost.inputs import cost_inputs
from rescore.suites.plan import read_plan
from rescore.suites.run import run_suite
from rescore.table import joined
from rescore.tracing import HEADER_FILE, TracedExample, write_part

BOTH = "drafters=heads+lookup"
BOTH_P = Selection(a_rescorer="none", b_rescorer="draft-model:x")


@pytest.fixture
def run(options: Options, tmp_path: Path) -> Evaluation:
    specs = ("none", "oracle", "lookup", f"oracle:{BOTH}", f"none:{BOTH}")
    return evaluated(options | {"rescorers": specs, "p": (1, 4)}, out=tmp_path / "run")


class Counting(LatticeDrafter):
    """Proposes the first tokens of the vocabulary."""

    kind, longest, identity = candidates.MODEL, 3, "counting"

    def __init__(self, path: str = "") -> None: ...

    def computed(self, contexts: Any, firsts: np.ndarray, k: int) -> Lattice:
        ids = np.broadcast_to(np.arange(k, dtype=np.int32), (len(firsts), 3, k)).copy()
        ids[:, 0] = firsts[:, None] * (np.arange(k) == 0) + (np.arange(k) > 0) * (
            (firsts[:, None] + np.arange(k)) % 256
        )
        return Lattice(
            ids, np.broadcast_to(np.float32(np.log(0.5)) * np.arange(1, k + 1, dtype=np.float32), ids.shape).copy()
        )


def one_head(options: Options, folder: Path) -> str:
    """A trace of the base's own tokens alone, as it is made without block heads."""
    trace = recorded_trace(options, folder / "whole").first_heads(1)
    rows = [
        {
            **{name: getattr(e, name) for name in ("id", "prompt", "output", "prompt_ids", "output_ids", "margins")},
            "references": list(e.references), "token_ids": e.lattice.token_ids.ravel(), "group": e.group,
            "logps": e.lattice.logps.ravel(), "entropies": e.entropies.ravel(),
        }
        for e in trace.examples
    ]  # fmt: skip
    write_part(folder / "one" / "part-00000", rows)
    settings = {name: value for name, value in trace.header.settings.items() if "heads" not in name} | {"h": 1}
    header = msgspec.structs.replace(trace.header, parts=["part-00000"], settings=settings)
    write_json(folder / "one" / HEADER_FILE, plain(header))
    return str(folder / "one")


class TestShares:
    def test_of_the_accepted_tokens_after_the_first_of_each_step(self):
        records = [
            example_record(
                accepted=[3, 1, 2], drafts=[[1, 2, 3], [4], [5, 6]], output_ids=[1, 2, 3, 4, 5, 6],
                oracle_accepted=[3, 1, 2], longest=5, origins=[[0, 1, 3], [0], [0, 2]],
                alone_accepted={"heads": [3, 1, 1], "lookup:tokens=2": [1, 1, 2], "lookup": [1, 4, 1]},
            ),
            example_record(id="b"),  # a live output that is not the trace's
        ]  # fmt: skip
        chosen = [load_drafter(name) for name in ("heads", "lookup:tokens=2", "lookup")]
        assert summarize(records, seed=0, drafters=chosen).sources == [
            SourceShare(source="heads", proposed=2 / 3, only=1 / 3, alone=5 / 3),
            SourceShare(source="lookup", proposed=2 / 3, only=1 / 3, alone=7 / 3),  # the better of two at each step
        ]
        assert summarize([example_record()], seed=0, drafters=chosen[:1]).sources == []

    def test_nothing_drafted_was_accepted(self):
        of = example_record(origins=[[0]], alone_accepted={"heads": [1], "lookup": [2]})
        (heads, _) = summarize([of], seed=0, drafters=[load_drafter("heads"), load_drafter("lookup")]).sources
        assert heads == SourceShare(source="heads", proposed=None, only=None, alone=1.0)

    def test_bits_have_one_name_each(self):
        assert sources_of(0) == () and sources_of(1 + 2 + 8) == ("heads", "lookup", "corpus-lookup")
        own = {"eagle", "hydra", "mtp"}  # which count as draft models
        assert sorted(SOURCES.values()) == sorted(set(drafters.DRAFTERS.built_in) - own)
        bits = [candidates.HEADS, candidates.LOOKUP, candidates.MODEL, candidates.CORPUS, candidates.TRACED]
        assert sources_of(sum(bits)) == tuple(map(SOURCES.get, bits)) and load_drafter("lookup").kind == 2

    def test_a_copied_token_that_the_joined_lattice_lacks_has_its_source(self):
        """Of a token with many continuations the lattice holds the most recent ones; the earliest is drafted here."""
        prompt = [token for after in range(10, 30) for token in (5, after)]
        lattice = Lattice(np.array([[[5]], [[10]], [[5]]], dtype=np.int32), np.zeros((3, 1, 1), dtype=np.float32))
        example = TracedExample(
            id="a", prompt="", references=(), output=None, prompt_ids=np.array(prompt, dtype=np.int32),
            output_ids=np.array([5, 10, 5], dtype=np.int32), lattice=lattice,
            entropies=np.zeros((3, 1), dtype=np.float32), margins=np.zeros(3, dtype=np.float32),
        )  # fmt: skip
        of = provenance(example, [3], [load_drafter("lookup:first=true,tokens=2")], 1, None)
        assert (of.origins, list(of.alone.values())) == ([[0, 2, 2]], [[3]])

    def test_of_a_run(self, run: Evaluation):
        for r in run:
            several = "drafters" in r.rescorer
            assert [share.source for share in r.sources] == (["heads", "lookup"] if several else [])
            for record in run.records("squad", r.rescorer, r.p) if several else ():
                assert record.alone_accepted is not None and record.origins is not None
                assert record.alone_accepted["heads"] == record.unrescored_accepted
                assert [len(step) for step in record.origins] == record.accepted
                assert all(all(step[1:]) and not step[0] for step in record.origins), "each token was proposed"
        (oracle,) = [r for r in run if r.rescorer == f"oracle:{BOTH}"]
        heads, lookup = oracle.sources
        assert heads.proposed and lookup.proposed and heads.only and lookup.only
        assert heads.proposed + lookup.only == pytest.approx(1) and lookup.proposed + heads.only == pytest.approx(1)
        reread = load_run(run.folder).results if run.folder else []
        assert [r.sources for r in reread] == [r.sources for r in run]

    def test_live_results_have_the_same(self, options: Options):
        chosen = options | {"rescorers": ("none", f"none:{BOTH}"), "p": 4, "limit": 3}
        assert evaluated(chosen | {"mode": "live"}).results[1].sources == evaluated(chosen).results[1].sources != []


class TestTables:
    def test_details_have_a_line_for_each_source(self, run: Evaluation):
        shown = joined(results_tables(run.document, details=True))
        part = shown.partition("where accepted tokens came from")[2].partition("proposed: of the accepted")[0]
        assert len(re.findall(rf"^squad +\S+:{re.escape(BOTH)} +8 +[14] +(heads|lookup) ", part, re.M)) == 6
        assert "where accepted tokens came from" not in joined(results_tables(run.document))
        document = ResultsDocument(config=run.config, results=[r for r in run if not r.sources])
        assert "came from" not in joined(results_tables(document, details=True))

    def test_the_csv_has_them(self, run: Evaluation):
        rows = list(csv.DictReader(io.StringIO(results_csv(run.results).csv())))
        assert [bool(row["sources"]) for row in rows] == [bool(r.sources) for r in run]
        assert re.fullmatch(r"heads \(proposed 0\.\d+, only 0\.\d+, alone 1\.\d+\); lookup .*", rows[-1]["sources"])
        assert [row["longest"] for row in rows] == [str(len(r.marginal)) for r in run]

    def test_analyses_have_them(self, run: Evaluation):
        (found,) = analyse(run).runs
        assert [list(of.sources) for of in found.rescorers] == [r.sources for r in run]
        assert "where accepted tokens came from" in str(analyse(run))
        assert found.as_dict()["rescorers"][-1]["sources"][1]["source"] == "lookup"

    def test_times_of_a_live_run_are_shown(self, options: Options):
        run = evaluated(options | {"rescorers": ("none", "lookup"), "mode": "live", "limit": 1})
        (found,) = analyse(run).runs
        assert found.rescorers[1].wallclock is not None
        assert re.search(r"^ms +p +greedy token +verify +draft +rescore", str(analyse(run)), re.M)


class TestCaption:
    def test_the_ceiling_is_the_longest_draft(self):
        def note(*results: Any) -> str:
            document = ResultsDocument(config=run_config(inputs=made_inputs()), results=list(results))
            return " ".join(results_tables(document)[0].note.split())

        none, lookup = made_result(), made_result(rescorer="lookup", h=3, marginal=[1.0] * 5)
        joint = made_result(rescorer="joint", h=3, marginal=[1.0] * 4, oracle_block_efficiency=3.5)
        assert "(1 = no gain, h = ceiling)" in note(none)
        assert "(1 = no gain, ceiling: h, but 5 of lookup, 4 of joint)" in note(none, lookup, joint)
        assert "5 of lookup, other)" in note(none, lookup, made_result(rescorer="other", h=3, marginal=[1.0] * 5))
        alone = made_result(rescorer="eagle:layer", h=1, marginal=[1.0] * 8)
        assert "(1 = no gain, ceiling: 8)" in note(made_result(h=1, marginal=[1.0]), alone)

    def test_the_gap_is_to_the_oracle_of_the_runs_own_drafters(self, run: Evaluation):
        note = " ".join(results_tables(run.document)[0].note.split())
        assert "of the gap = share of the way from there to the oracle of the run's own drafters;" in note
        plain = next(r for r in run if r.is_unrescored)
        oracles = {r.rescorer: r.oracle_block_efficiency for r in run}
        assert oracles["none"] == oracles["oracle"] < oracles[f"none:{BOTH}"] == oracles[f"oracle:{BOTH}"]
        of = next(r for r in run if (r.rescorer, r.p) == (f"none:{BOTH}", 4))
        gap = oracles[f"oracle:{BOTH}"] - plain.block_efficiency
        assert of.gap_share(plain) == pytest.approx((of.block_efficiency - plain.block_efficiency) / gap)

    def test_every_oracle_is_run_once(self, run: Evaluation):
        assert [r.p for r in run if r.is_oracle] == [1, 1]
        assert [r.p for r in runs_of([f"oracle:{BOTH}"], ps=(1, 4))] == [1]
        assert [r.p for r in runs_of(["none", "oracle"], ps=(4,), drafters=("lookup",))] == [4, 1]


def made_inputs() -> dict[str, Any]:
    from rescore.runs.inputs import Inputs

    return {"squad": Inputs(trace="t")}


def shown(inspection: Inspection, width: int = 200) -> str:
    return "\n".join(line.plain for line in inspection_lines(inspection, width=width))


class TestInspect:
    def test_what_was_proposed_along_the_accepted_tokens(self, run: Evaluation):
        trace = run.trace("squad")
        assert trace is not None and run.folder is not None
        seen = 0
        for number, example in enumerate(trace.examples, start=1):
            found = inspect_example(run.folder, str(number), steps="all", rescorers=(f"oracle:{BOTH}",), top=3)
            output = example.output_ids.tolist()
            for block in found.blocks:
                (draft,), (of,) = block.drafts, block.joined
                assert of.drafters == ["heads", "lookup"] and len(of.slots) == draft.accepted
                assert len(draft.sources) == draft.accepted and draft.sources[0] == ()
                for place, proposed in enumerate(of.slots, start=1):
                    at = block.position + place
                    right = [c for c in proposed if at < len(output) and c.token == output[at]]
                    assert len(right) == (place < draft.accepted), (
                        "the oracle stops where nobody proposes the right one"
                    )
                    assert [c.sources for c in right] == draft.sources[place : place + 1]
                    by_heads = {c.token: c.probability for c in proposed if "heads" in c.sources}
                    assert len(by_heads) >= (3 if place < 4 else 0) and (place < 4 or not by_heads)
                    for token, probability in by_heads.items():
                        entry = example.lattice.token_ids[block.position, place].tolist().index(token)
                        logp = example.lattice.logps[block.position, place, entry]
                        assert probability == pytest.approx(float(np.exp(logp)))
                    seen += sum("lookup" in c.sources for c in proposed)
        assert seen > 20

    def test_the_view_marks_who_proposed_a_token(self, run: Evaluation):
        assert run.folder is not None
        numbers = range(1, 7)
        views = [
            shown(inspect_example(run.folder, str(n), steps="all", rescorers=(f"oracle:{BOTH}",))) for n in numbers
        ]
        text = "\n".join(views)
        assert "behind a token, which drafters had proposed it there: H heads, L lookup" in text
        assert "what heads+lookup proposed after each of the tokens accepted there" in text
        assert re.search(r"\]L\b", text) and re.search(r"\]H\b", text) and re.search(r"\* H \.\d\d", text)

    def test_by_the_spec_of_a_drafter_and_of_a_rescorer_with_drafters(self, run: Evaluation):
        assert run.folder is not None
        found = inspect_example(run.folder, "1", steps="all", rescorers=("lookup", f"none:{BOTH}"), p=4)
        assert [(d.rescorer, d.p) for d in found.decodes] == [("lookup", 4), (f"none:{BOTH}", 4)]
        found = inspect_example(run.folder, "1", rescorers=("lookup", f"oracle:{BOTH}"), p=4)
        assert [(d.rescorer, d.p) for d in found.decodes] == [("lookup", 4), (f"oracle:{BOTH}", 1)]
        alone = inspect_example(run.folder, "1", rescorers=("lookup",))
        assert all(not block.joined for block in alone.blocks) and "which drafters" not in shown(alone)
        assert run.folder and refused(lambda: inspect_example(run.folder, "1", rescorers=("loookup",)), "lookup")

    def test_drafts_longer_than_the_heads_blocks_have_what_the_base_wanted(self, run: Evaluation):
        assert run.folder is not None
        found = inspect_example(run.folder, "1", steps="all", rescorers=("lookup",), p=1)
        trace = run.trace("squad")
        assert trace is not None and found.h == 4
        output = trace.examples[0].output_ids.tolist()
        longest = max(found.blocks, key=lambda block: len(block.drafts[0].tokens))
        assert len(longest.slots) == len(longest.drafts[0].tokens) > 4
        wanted = [slot.wanted for slot in longest.slots]
        ahead = output[longest.position : longest.position + len(wanted)]
        assert wanted == ahead + [None] * (len(wanted) - len(ahead))
        assert all(slot.best for slot in longest.slots[:4]) and not any(slot.best for slot in longest.slots[4:])
        assert "block 1" in shown(found)

    def test_what_a_draft_model_gave_is_read_from_the_cache(
        self, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path
    ):
        monkeypatch.setitem(drafters.DRAFTERS.built_in, "draft-model", Counting)
        spec = "oracle:drafters=heads+lookup+draft-model:x"
        run = evaluated(options | {"rescorers": ("none", spec), "limit": 2}, out=tmp_path / "run")
        assert [share.source for share in run.results[1].sources] == ["heads", "lookup", "draft-model"]
        monkeypatch.setitem(drafters.DRAFTERS.built_in, "draft-model", lambda path: pytest.fail("it was loaded"))
        found = inspect_example(tmp_path / "run", "1", steps="all", rescorers=(spec,))
        proposed = [c for block in found.blocks for slot in block.joined[0].slots for c in slot]
        assert any("draft-model" in c.sources for c in proposed) and not found.notices
        for folder in (cache_folder / "traces").glob("squad-draft-*"):
            (folder / HEADER_FILE).unlink()
        gone = inspect_example(tmp_path / "run", "1", rescorers=(spec,))
        assert not any(block.joined for block in gone.blocks)
        assert "what draft-model:x drafted is not in the cache" in gone.notices[0]
        written = report([tmp_path / "run"], tmp_path / "report.html")
        assert any("what draft-model:x drafted is not in the cache" in line for line in written.missing)

    def test_not_of_a_drafter_that_was_replaced(self, options: Options, tmp_path: Path):
        recorded_trace(options, tmp_path / "drafts")
        spec = f"oracle:drafters=heads+trace:{tmp_path / 'drafts'}"
        evaluated(options | {"rescorers": ("none", spec)}, out=tmp_path / "run")
        assert not inspect_example(tmp_path / "run", "1", rescorers=(spec,)).notices
        recorded_trace(options | {"k": 4}, tmp_path / "other")
        shutil.rmtree(tmp_path / "drafts")
        (tmp_path / "other").rename(tmp_path / "drafts")
        assert "is no longer what drafted" in inspect_example(tmp_path / "run", "1", rescorers=(spec,)).notices[0]


def test_a_comparison_says_that_one_name_stands_for_other_drafters(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(drafters.DRAFTERS.built_in, "draft-model", Counting)
    one = evaluated(options | {"rescorers": ("none", "draft-model:x"), "limit": 2}, out=tmp_path / "a")
    monkeypatch.setattr(Counting, "identity", "another")
    other = evaluated(options | {"rescorers": ("none", "draft-model:x"), "limit": 2}, out=tmp_path / "b")
    told = "squad: draft-model:x chose among other drafters in A than in B"
    assert told in compare(one, other).notices and told not in compare(one, one, selection=BOTH_P).notices


class TestReport:
    def test_a_bar_for_each_run_of_several_drafters(self, run: Evaluation, tmp_path: Path):
        from test_report_page import Page

        written = report([run], tmp_path / "report.html")
        page = Page(written.html)
        (figures,) = page.json(id="figures")
        bars = figures["sources-0"]["data"]
        assert figures["sources-0"]["layout"]["barmode"] == "stack"
        joined_runs = [r for r in run if r.sources]
        assert [bar["name"] for bar in bars] == ["only heads", "only lookup", "several of them"] * len(joined_runs)
        for place, r in enumerate(joined_runs):
            widths = [bar["x"][0] for bar in bars[3 * place : 3 * place + 3]]
            assert widths[:2] == pytest.approx([share.only or 0.0 for share in r.sources], rel=1e-4)
            assert sum(widths) == pytest.approx(1)
        markdown = written.markdown.read_text()
        assert "## Where accepted tokens came from" in markdown
        share = joined_runs[0].sources[1]
        assert f"| lookup | {share.proposed:.1%} | {share.only:.1%} | {share.alone:.3f} |" in markdown

    def test_the_explorer_has_the_joined_lattice(self, run: Evaluation, tmp_path: Path):
        from test_report_page import Page

        (data,) = Page(report([run], tmp_path / "report.html").html).json(class_="explorer-data")
        names = [source["name"] for source in data["sources"]]
        place = next(i for i, d in enumerate(data["decodes"]) if d["name"] == f"oracle:{BOTH}")
        found = set()
        for example in data["examples"]:
            assert example["among"][place] == "heads+lookup" and example["among"][0] is None
            assert set(example["joined"]) == {"heads+lookup"}
            start = 0
            for accepted, origins in zip(example["accepted"][place], example["origins"][place], strict=True):
                slots = example["joined"]["heads+lookup"][str(start)]
                assert len(slots) >= accepted == len(origins)
                for i in range(1, accepted):
                    token = example["output"][start + i]
                    (sources,) = [sources for id, sources, _ in slots[i - 1] if id == token]
                    assert sources == origins[i]
                    found |= {names[source] for source in sources}
                assert all(str(token) in data["vocabulary"] for slot in slots for token, _, _ in slot)
                start += accepted
        assert found == {"heads", "lookup"}

    def test_oracles_are_ceilings_and_the_sentences_name_what_is_best(self, run: Evaluation, tmp_path: Path):
        written = report([run], tmp_path / "report.html")
        head = written.markdown.read_text()
        assert "From what several drafters propose together a perfect choice would get 1.0" in head
        assert re.search(r"With 4 drafts a step the best of 2 rescorers and drafters is \S+", head)
        page = written.html.read_text()
        ceilings = page.partition("The ceiling: ")[2].partition('<tr class="group">')[0]
        assert f"oracle:{BOTH}" in ceilings and "</span> oracle" in ceilings and "lookup:" not in ceilings


class TestWithoutHeads:
    """A trace of the base's own tokens alone (h = 1), where lookup drafts."""

    @pytest.fixture
    def run(self, options: Options, tmp_path: Path) -> Evaluation:
        specs = ("none", "lookup", "lookup:tokens=3", "oracle:drafters=lookup")
        trace = one_head(options, tmp_path)
        return evaluated({"trace": trace, "k": 8, "rescorers": specs, "p": (1, 4)}, out=tmp_path / "run")

    def test_everything_that_reads_results_reads_them(self, run: Evaluation, tmp_path: Path):
        assert {r.h for r in run} == {1} and run.result("lookup", p=4).block_efficiency > 1
        assert run.result("none", p=1).block_efficiency == 1 == run.result("none", p=1).oracle_block_efficiency
        assert run.result("oracle:drafters=lookup").gain == pytest.approx(
            run.result("oracle:drafters=lookup").block_efficiency - 1
        )
        note = " ".join(results_tables(run.document, details=True)[0].note.split())
        assert "ceiling: 17 of lookup, oracle:drafters=lookup, 4 of lookup:tokens=3" in note
        assert "without block heads" in results_tables(run.document)[0].title
        (found,) = analyse(run).runs
        won = [of.outcomes and of.outcomes.won for of in found.rescorers]
        assert won[0] == 0 and max(w or 0 for w in won) > 0 and str(analyse(run))
        assert shown(inspect_example(tmp_path / "run", "1", steps="all"))
        rows = compare(run, selection=Selection(a_rescorer="none", b_rescorer="lookup", p=1)).rows
        assert [(row.h, row.b.block_efficiency > 1) for row in rows] == [(1, True)]
        written = report([tmp_path / "run"], tmp_path / "report.html")
        assert "lookup" in written.markdown.read_text() and not written.missing
        assert len(run.to_pandas()) == len(run.results)
        refused(lambda: cost_inputs(run), "was decoded without block heads")


def test_a_suite_of_drafters(options: Options, tmp_path: Path):
    path = tmp_path / "table.yaml"
    given = {name: options[name] for name in ("base", "heads", "dtype", "device", "max_new_tokens", "k")}
    lines = [f"{name}: {value}" for name, value in given.items()]
    lines += ["p: [1, 4]", "tasks:", f"  - {{name: squad, data: {options['data']}, limit: 3}}", "rescorers:"]
    lines += [f"  - '{name}'" for name in ("none", "lookup", f"none:{BOTH}", "oracle", f"oracle:{BOTH}")]
    path.write_text("\n".join(lines) + "\n")
    suite = run_suite(read_plan(path), tmp_path / "out")
    assert [r.p for r in suite.document.results if r.is_oracle] == [1, 1]
    assert f"none:{BOTH}" in (tmp_path / "out" / "table.md").read_text()
    assert "heads (proposed" in (tmp_path / "out" / "table.csv").read_text()
    found = inspect_example(tmp_path / "out", "1", steps="all", rescorers=(f"oracle:{BOTH}",))
    assert all(block.joined for block in found.blocks)


def test_a_suite_of_a_base_without_heads(options: Options, tmp_path: Path):
    path = tmp_path / "table.yaml"
    lines = [f"{name}: {options[name]}" for name in ("base", "dtype", "device", "max_new_tokens", "k")]
    lines += ["tasks:", f"  - {{name: squad, data: {options['data']}, limit: 3}}", "rescorers: [lookup]"]
    path.write_text("\n".join(lines) + "\n")
    (result,) = run_suite(read_plan(path), tmp_path / "out").document.results
    assert (result.rescorer, result.h) == ("lookup", 1)
