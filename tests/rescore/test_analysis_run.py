"""Analyses of finished runs: repetition before and after, wins and losses with causes, tables, contrasts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from analysis_traces import small_trace
from evaluating import evaluated
from made_records import example_record, made_latency, made_result, run_config
from msgspec.structs import replace

from lattices.errors import RescoreError, UnknownNameError
from rescore.runs.evaluated import load_run
from rescore.runs.records import Alpha, RunRecord
from rescore.studies.analysis import analyse_run
from rescore.studies.analysis.collect import _pairs_of
from rescore.studies.analysis.drafts import before_after, outcomes_of
from rescore.studies.analysis.runs import Wallclock, alpha_source, contrast, curves_of_results, efficiency_table
from rescore.studies.records import record_of

# A decode of `small_trace` (output 1 2 3 4 5, unrescored drafts 1 1 1, 2 3 3, 3 8 5, 4 5 5, 5 5 8):
#   at 0 the draft 1 2 3 is accepted whole; the unrescored 1 1 1 for 1: a win, and its wrong token repeats: repair.
#   at 3 the draft 4 4 5 is accepted for 1; the unrescored 4 5 5 for 2: a loss, and its wrong token repeats: regress.
#   at 4 the draft 5 5 8 is the unrescored one: a tie.
RECORD = example_record(
    id="a", accepted=[3, 1, 1], unrescored_accepted=[1, 2, 1], output_ids=[1, 2, 3, 4, 5], h=3,
    drafts=[[1, 2, 3], [4, 4, 5], [5, 5, 8]],
)  # fmt: skip


class TestOutcomes:
    def test_by_hand(self):
        found = outcomes_of([RECORD], 3, small_trace().examples)
        assert (found.steps, found.won, found.tied, found.lost) == (3, 1, 1, 1)
        assert (found.tokens_won, found.tokens_lost) == (2, 1)
        # Unrescored 1, chosen 3; unrescored 2, chosen 1; both 1.
        assert found.joint == ((1, 0, 1), (1, 0, 0), (0, 0, 0))
        assert (found.repairs, found.regressions) == (1, 1) and found.repair_share == found.regress_share == 1
        # Equal neighbours 2 -> 0 in the win; 1 -> 1 (5 5, then 4 4) in the loss.
        assert (found.fewer_repeats, found.more_repeats) == (1, 0)

    def test_other_causes(self):
        # At 0 the unrescored draft repeats behind the token that decides nothing: here 1 2 8 wins (2 against 1), and
        # the wrong token 1 repeats 1: repair. At 2 the draft 3 4 5 wins over 3 8 5, which repeats nothing.
        record = replace(RECORD, accepted=[2, 3], unrescored_accepted=[1, 1], drafts=[[1, 2, 8], [3, 4, 5]])
        found = outcomes_of([record], 3, small_trace().examples)
        assert (found.won, found.repairs, found.repair_share) == (2, 1, 0.5)
        assert found.lost == 0 and found.regress_share is None and found.fewer_repeats == 1

    def test_causes_need_trace_and_drafts(self):
        without = replace(RECORD, drafts=[])
        for found in (outcomes_of([RECORD], 3), outcomes_of([without], 3, small_trace().examples)):
            assert (found.won, found.repairs, found.repair_share) == (1, None, None)

    def test_another_output_is_left_out(self):
        other = replace(RECORD, unrescored_accepted=None)
        assert outcomes_of([other], 3, small_trace().examples) is None and outcomes_of([], 3) is None


class TestBeforeAfter:
    def test_by_hand(self):
        found = before_after([RECORD], small_trace().examples)
        # Before, at 0, 3, 4: 1 1 1, 4 5 5, 5 5 8: 4 of 6 pairs, runs 3 2 2. After: 1 2 3, 4 4 5, 5 5 8: 2 of 6, 1 2 2.
        assert found.examples == 1
        assert found.before.share == pytest.approx(4 / 6) and found.before.mean_longest_run == pytest.approx(7 / 3)
        assert found.after.share == pytest.approx(2 / 6) and found.after.mean_longest_run == pytest.approx(5 / 3)

    def test_live_drafts_that_were_cut_do_not_count(self):
        record = replace(RECORD, drafts=[[1, 2, 3], [4, 4], [5]])
        found = before_after([record], small_trace().examples)
        # Before: 1 1 1: 2 of 2 pairs. After: 1 2 3: none. 4 5 against 4 4 and 5 against 5 are cut.
        assert (found.before.drafts, found.before.share, found.before.mean_longest_run) == (1, 1.0, 3.0)
        assert (found.after.drafts, found.after.share, found.after.repeating) == (1, 0.0, 0.0)

    def test_other_outputs_are_left_out(self):
        assert before_after([replace(RECORD, output_ids=[1, 2, 9])], small_trace().examples) is None
        assert before_after([replace(RECORD, id="b")], small_trace().examples) is None


@pytest.fixture
def run(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path, tmp_path: Path, cache_folder: Path):
    options = dict(
        base=str(tiny_folder), heads=str(tiny_heads_folder), data=str(squad_file), device="cpu", k=4, p=(1, 3),
        max_new_tokens=8, limit=6, rescorers=("none", "context-ngram:none", "oracle"),
    )  # fmt: skip
    evaluated(options, out=tmp_path / "run")
    return load_run(tmp_path / "run")


class TestRun:
    def test_everything_is_in_it(self, run):
        found = analyse_run(run, "squad")
        json.dumps(found.as_dict(), allow_nan=False)
        assert (found.task, found.h, found.k, found.examples, found.mode) == ("squad", 4, 4, 6, "replay")
        for part, result in zip(found.rescorers, run.results, strict=True):
            shares, outcomes = result.against_unrescored, part.outcomes
            assert (part.rescorer, part.p, part.alpha) == (result.rescorer, result.p, result.alpha)
            assert part.efficiency.block_efficiency == result.block_efficiency
            assert outcomes.won / outcomes.steps == pytest.approx(shares.won)
            assert outcomes.lost / outcomes.steps == pytest.approx(shares.lost)
            assert np.array(outcomes.joint).sum() == outcomes.steps == result.steps
            assert outcomes.repairs is not None and part.wallclock is None
            assert part.repetition.examples == 6
        plain = found.rescorers[0]
        assert plain.repetition.before == plain.repetition.after == found.trace.repetition.decode
        assert found.trace.oracle.unrescored.block_efficiency == plain.efficiency.block_efficiency
        by_k = dict(zip(found.trace.oracle.ks, found.trace.oracle.by_k, strict=True))
        assert by_k[4].block_efficiency == found.rescorers[-1].efficiency.block_efficiency
        sources = {r.rescorer: r.alpha_source for r in found.rescorers}
        assert sources == {"none": None, "context-ngram:none": "default", "oracle": None}
        curves = {curve.rescorer: curve for curve in found.by_p}
        assert set(curves) == {"none", "context-ngram:none"} and curves["none"].ps == (1, 3)

    def test_a_trace_that_is_gone(self, run):
        inputs = {"squad": dataclasses.replace(run.config.inputs["squad"], trace="/gone")}
        config = dataclasses.replace(run.config, inputs=inputs)
        gone = dataclasses.replace(run, document=dataclasses.replace(run.document, config=config), traces={})
        found = analyse_run(gone, "squad")
        assert found.trace is None and found.rescorers[0].repetition is None
        assert found.rescorers[0].outcomes.won == 0 and found.rescorers[0].outcomes.repairs is None

    def test_refused(self, run):
        with pytest.raises(UnknownNameError, match="did you mean squad"):
            analyse_run(run, "squat")
        with pytest.raises(UnknownNameError, match="rescorer of these results on squad at p = 1"):
            contrast(run, "squad", "none", "ngram")

    def test_table_and_contrast(self, run):
        found = efficiency_table([run])
        assert found.tasks == ("squad",) and len(found.rows) == 5
        assert [(row.rescorer, row.p, row.h, row.k) for row in found.rows][:2] == [("none", 1, 4, 4), ("none", 3, 4, 4)]
        assert found.rows[0].mean_gain is None and found.rows[-1].mean_gain == run.results[-1].gain
        paired = contrast(run, "squad", "oracle", "none")
        assert paired.gain == run.results[-1].gain and paired.gain_ci95 == run.results[-1].gain_ci95
        with pytest.raises(RescoreError, match="in two of the folders"):
            efficiency_table([run, run])


def result(rescorer: str, p: int, efficiency: float, *, task: str = "squad", h: int = 3, gain: float | None = None):
    return made_result(task=task, rescorer=rescorer, p=p, block_efficiency=efficiency, gain=gain, marginal=[1.0] * h)


def test_rows_of_several_runs(tmp_path):
    from rescore.runs.evaluated import Evaluation
    from rescore.runs.records import ResultsDocument

    runs = [
        Evaluation(ResultsDocument(config=run_config(), results=results), folder=tmp_path)
        for results in (
            [result("none", 1, 1.2), result("ngram", 1, 1.3, gain=0.08)],
            [result("ngram", 1, 1.5, task="xsum", gain=0.1)],
            [result("ngram", 1, 1.6, h=9, gain=0.2)],
        )
    ]
    found = efficiency_table(runs)
    assert found.tasks == ("squad", "xsum")
    assert [(row.rescorer, row.h) for row in found.rows] == [("none", 3), ("ngram", 3), ("ngram", 9)]
    assert [cell and cell.block_efficiency for cell in found.rows[1].cells] == [1.3, 1.5]
    assert found.rows[1].mean_gain == pytest.approx(0.09)  # (0.08 + 0.1) / 2
    assert found.rows[2].cells[1] is None


def test_curves_are_sorted_by_p_and_need_several():
    found = curves_of_results([result("none", 16, 1.5), result("none", 1, 1.2), result("oracle", 1, 2.0)])
    assert len(found) == 1 and found[0].ps == (1, 16)
    assert [point.block_efficiency for point in found[0].points] == [1.2, 1.5]


def test_what_results_say_beside():
    weighted = RunRecord(rescorer="ngram", k=16, p=1, alpha=Alpha(alpha=0.5, source="tuned"))
    config = run_config(runs={"squad": [RunRecord(rescorer="none", k=16, p=1), weighted]})
    assert [alpha_source(config, made_result(rescorer=name)) for name in ("ngram", "none")] == ["tuned", None]
    found = record_of(Wallclock, made_latency())
    assert (found.rescore_p95_ms, found.speedup) == (0.4, 1.752)


class TestFolders:
    def test_traces_and_results(self, run):
        from rescore.studies.analysis.collect import analyse_folders
        from rescore.studies.analysis.text import findings_tables
        from rescore.table import joined

        found = analyse_folders(results=[run.folder], against=[("oracle", "none")])
        json.dumps(found.as_dict(), allow_nan=False)
        assert [c.rescorer for c in found.contrasts] == ["oracle"] and found.table is not None
        text = joined(findings_tables(found))
        for line in (
            "squad: 6 examples (6 groups), replay",
            "entropy of head",
            "recall of head",
            "repair",
            "mean gain",
            "against",
        ):
            assert line in text
        folder = next(path for path in cache_of().glob("traces/*") if path.is_dir())
        traces = analyse_folders(traces=[folder, folder], h=2, limit=2, only=("entropy", "oracle"))
        assert [(t.examples, t.h, t.ranks) for t in traces.traces] == [(2, 2, None)] * 2 and traces.table is None
        assert len(traces.h_max.points) == 1 and "Pearson's R" not in joined(findings_tables(traces))  # one task, twice

    def test_pairs_are_cut_where_both_sides_are_known(self):
        known = {"none", "ngram", "context-ngram:alpha=1", "ngram:path=x,alpha=2"}
        given = [("none=context-ngram:alpha", "1"), ("context-ngram:alpha=1", "none"), ("none=ngram:path", "x"),
                 ("alpha", "2"), ("ngram", "none")]  # fmt: skip
        assert _pairs_of(given, known) == [
            ("none", "context-ngram:alpha=1"), ("context-ngram:alpha=1", "none"), ("none", "ngram:path=x,alpha=2"),
            ("ngram", "none"),
        ]  # fmt: skip
        assert _pairs_of([("oracle", "ngram:p=16")], known) == [("oracle", "ngram:p=16")], "refused as it was given"

    @pytest.mark.parametrize("option", ["h", "k", "limit", "bins"])
    def test_options_of_traces_are_refused_for_runs(self, run, option):
        from rescore.studies.analysis.collect import analyse_folders

        with pytest.raises(RescoreError, match=f"--{option} is for traces"):
            analyse_folders(results=[run.folder], **{option: 2})
        with pytest.raises(RescoreError, match="give its folder: --results"):
            analyse_folders(traces=[run.folder], against=[("oracle", "none")])


def cache_of() -> Path:
    from lm.files import cache_directory

    return cache_directory()


def test_texts_of_nothing():
    from analysis_traces import trace_of

    from rescore.studies.analysis.text import trace_tables
    from rescore.studies.analysis.traces import analyse_trace
    from rescore.table import joined

    assert "0 examples" in joined(trace_tables(analyse_trace(trace_of([]))))


def test_names_of_others_stay_on_their_line():
    from analysis_traces import trace_of

    from rescore.studies.analysis.text import trace_tables
    from rescore.studies.analysis.traces import analyse_trace

    title = trace_tables(analyse_trace(trace_of([]), name="a\nb\x1b[2J"))[0].text()
    assert title.startswith("a\\nb\\x1b[2J: 0 examples (0 groups), ") and "\n" not in title


def test_traces_and_evaluations_as_objects(run):
    from rescore.studies.analysis import analyse
    from rescore.studies.analysis.collect import analyse_folders

    found = analyse(run, run.trace("squad"), against=[("oracle", "none")])
    by_folder = analyse_folders(results=[run.folder], against=[("oracle", "none")])
    assert (found.runs, found.contrasts, found.table) == (by_folder.runs, by_folder.contrasts, by_folder.table)
    assert found.traces[0].ranks == found.runs[0].trace.ranks and "mean gain" in str(found)
