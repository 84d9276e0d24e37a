"""Evaluations end to end on the tiny model: replay and live agree, traces are kept, interruptions lose nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_heads, save_tiny_base, squad_records, write_lines
from evaluating import evaluated, inputs_of, opened, recorded_trace
from evaluation_runs import Make, make_fixture, no_base, peek_fixture, run, without_times  # noqa: F401 (fixtures)

import lm.base.catalog
from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, UnknownNameError
from lm.files import cache_directory
from lm.records import plain
from rescore import tracing
from rescore.runs import evaluation
from rescore.runs.evaluation import evaluate
from rescore.runs.records import Divergence, Identical
from rescore.tracing import read_header


class TestNumbers:
    @pytest.mark.parametrize("verify", ["tree", "batch"])
    @pytest.mark.parametrize("p", [1, 4])
    def test_replay_gives_the_live_numbers_and_live_is_exact(self, make: Make, p: int, verify: str):
        replayed = run(make(p=p))
        live = run(make(p=p, verify=verify, mode="live"))
        assert [r.identical for r in replayed] == [None] * 3 and [r.latency for r in replayed] == [None] * 3
        assert [r.identical for r in live] == [Identical(n=6, identical=6)] * 3
        assert [r.divergence for r in live] == [[]] * 3 and [r.divergence for r in replayed] == [None] * 3
        assert [r.latency and r.latency.verify for r in live] == [verify] * 3
        assert without_times(live) == replayed
        assert replayed[2].accepted_histogram[2] and replayed[2].accepted_histogram[4], "long blocks occur"

    @pytest.mark.parametrize("changes", [{}, {"p": 4}, {"k": 1}, {"k": 257}, {"h": 2}, {"h": 3, "p": 16}])
    def test_the_identities_hold_for_every_rescorer(self, make: Make, changes: dict[str, Any]):
        results = run(make(**changes))
        h = changes.get("h", 4)
        assert [r.rescorer for r in results] == ["none", "oracle", "peek"]
        for r in results:
            p = 1 if r.rescorer == "oracle" else changes.get("p", 1)  # the oracle verifies one draft
            assert (r.task, r.k, r.p, r.alpha, r.n) == ("squad", changes.get("k", 8), p, None, 6)
            assert len(r.accepted_histogram) == h + 1 and len(r.marginal) == len(r.conditional) == h
            assert sum(r.accepted_histogram) == r.steps and r.accepted_histogram[0] == 0
            assert sum(i * n for i, n in enumerate(r.accepted_histogram)) == r.tokens
            assert r.block_efficiency == r.tokens / r.steps == pytest.approx(sum(r.marginal))
            assert np.cumprod([c or 0.0 for c in r.conditional]) == pytest.approx(r.marginal)
            assert all(a >= b for a, b in itertools.pairwise([1.0, *r.marginal]))
            low, high = r.block_efficiency_ci95 or (0, 0)
            assert low <= r.block_efficiency <= high
            assert r.oracle_block_efficiency == results[1].block_efficiency
        assert len({r.tokens for r in results}) == 1, "every rescorer decodes the same output"
        assert results[0].block_efficiency <= results[1].block_efficiency

    def test_h_uses_the_first_heads_only(self, make: Make, tiny_base, tmp_path: Path):
        make_heads(tiny_base).first(3).save(tmp_path / "heads", dtype=tiny_base.dtype)
        cut = run(make(heads=str(tmp_path / "heads")))
        assert run(make(h=3)) == cut == without_times(run(make(h=3, mode="live")))
        with pytest.raises(RescoreError, match="h = 5, but these heads propose blocks of 4; choose h from 2 to 4"):
            run(make(h=5))

    def test_the_oracle_of_the_whole_vocabulary_fills_blocks(self, make: Make):
        (oracle,) = run(make(k=257, rescorers=("oracle",)))
        assert oracle.accepted_histogram == [0, 0, 6, 0, 18], "14 tokens: three blocks of 4 and a rest of 2, six times"
        assert oracle.block_efficiency == oracle.oracle_block_efficiency

    def test_several_tasks_and_rescorers_in_the_order_given(self, make: Make, tmp_path: Path):
        data = write_lines(tmp_path / "both.jsonl", [r | {"answer": "42"} for r in squad_records(3)])
        found = run(make(tasks=("gsm8k", "squad", "gsm8k"), rescorers=("oracle", "none", "oracle"), data=str(data)))
        names = [("gsm8k", "oracle"), ("gsm8k", "none"), ("squad", "oracle"), ("squad", "none")]
        assert [(r.task, r.rescorer) for r in found] == names
        assert found[2:] == run(make(rescorers=("oracle", "none"), data=str(data)))

    def test_the_metric_scores_the_output(self, make: Make, tmp_path: Path):
        trace = recorded_trace(make(), tmp_path / "trace")
        records = squad_records(6)
        for record, example in list(zip(records, trace.examples, strict=True))[:3]:
            record["answers"] = {"text": [example.output]}
        (none,) = run(make(rescorers=("none",), data=str(write_lines(tmp_path / "right.jsonl", records))))
        assert list(none.quality) == ["exact match", "F1"] and none.quality["exact match"] == none.quality["F1"] == 0.5

    def test_an_output_that_differs_is_told_with_its_place_and_margin(self, make: Make, tiny_base, monkeypatch):
        true_decode = evaluation.decode

        def decode(base, heads, prompt, *, max_new_tokens, **request):
            """As in half precision: one prompt's blocks go another way at token 5."""
            decoded = true_decode(base, heads, prompt, max_new_tokens=max_new_tokens, **request)
            if heads is not None and max_new_tokens == 14 and "bridge 2 " in base.decode_text(prompt):
                decoded.output_ids[5] = (decoded.output_ids[5] + 1) % 256
            return decoded

        monkeypatch.setattr(evaluation, "decode", decode)
        (found,) = run(make(mode="live", rescorers=("none",)))
        assert found.identical == Identical(n=6, identical=5)
        ((place,),) = [found.divergence]
        records = squad_records(6)[2]
        text = f"question: {records['question']} context: {records['context']}"
        prompt = tiny_base.encode_prompt(text, chat=True)
        output = true_decode(tiny_base, None, prompt, max_new_tokens=14).output_ids
        logits, _ = tiny_base.forward(torch.tensor([prompt + output[:5]]))
        best = logits[0, -1].topk(2).values
        assert place == Divergence(id="q2", position=5, margin=place.margin)
        assert place.margin == pytest.approx(float(best[0] - best[1]), rel=1e-6)

    def test_live_quality_is_that_of_the_live_output(self, make: Make, tmp_path: Path, monkeypatch):
        """Which in half precision need not be the trace's."""
        trace = recorded_trace(make(), tmp_path / "trace")
        records = squad_records(6)
        for record, example in zip(records, trace.examples, strict=True):
            record["answers"] = {"text": [example.output]}
        data = str(write_lines(tmp_path / "right.jsonl", records))
        true_decode, broken = evaluation.decode, []

        def decode(base, heads, prompt, *, max_new_tokens, **request):
            decoded = true_decode(base, heads, prompt, max_new_tokens=max_new_tokens, **request)
            if heads is not None and max_new_tokens == 14 and len(broken) < 2:
                broken.append(prompt)
                decoded.output_ids[:] = [ord("x")] * 14
            return decoded

        monkeypatch.setattr(evaluation, "decode", decode)
        (live,) = run(make(mode="live", rescorers=("none",), data=data))
        (replayed,) = run(make(rescorers=("none",), data=data))
        assert replayed.quality == {"exact match": 1.0, "F1": 1.0}
        assert live.quality == {"exact match": pytest.approx(4 / 6), "F1": pytest.approx(4 / 6)}

    def test_the_seed_moves_the_interval_and_nothing_else(self, make: Make, tmp_path: Path):
        data = str(write_lines(tmp_path / "squad.jsonl", squad_records(25)))
        one, other, again = (run(make(data=data, k=32, rescorers=("oracle",), seed=s))[0] for s in (0, 1, 0))
        assert one == again and one.block_efficiency_ci95 != other.block_efficiency_ci95
        assert dataclasses.replace(one, block_efficiency_ci95=other.block_efficiency_ci95) == other

    @pytest.mark.parametrize("limit", [1, 2])
    def test_the_shortest_outputs_can_be_timed(self, make: Make, limit: int):
        (result,) = run(make(mode="live", max_new_tokens=limit, rescorers=("none",)))
        assert result.latency is not None and result.identical == Identical(n=6, identical=6)

    def test_times_are_made_of_their_parts(self, make: Make):
        (result,) = run(make(mode="live", rescorers=("none",)))
        assert result.latency is not None
        t = result.latency
        assert t.verify == "tree" and all(v > 0 for v in vars(t).values() if isinstance(v, float))
        spent = t.verify_ms + t.draft_ms + t.rescore_ms
        assert spent / (1 - t.glue_share) * result.steps == pytest.approx(1e3 * result.tokens / t.tokens_per_second)
        assert t.autoregressive_ms * t.autoregressive_tokens_per_second == pytest.approx(1e3)
        assert t.speedup == pytest.approx(t.tokens_per_second / t.autoregressive_tokens_per_second)


class TestOracleByK:
    def test_a_result_for_each_k_and_task(self, make: Make):
        found = evaluated(make(rescorers=("oracle",), k=(1, 2, 4, 40), p=3)).document.results
        assert [(r.rescorer, r.k, r.p) for r in found] == [("oracle", k, 1) for k in (1, 2, 4, 40)]
        for r in found:
            (alone,) = run(make(rescorers=("oracle",), k=r.k))
            assert r == alone
        (unrescored,) = run(make(rescorers=("none",), k=1))
        assert found[0].accepted_histogram == unrescored.accepted_histogram

    def test_k_that_makes_no_sense_is_refused(self, make: Make):
        for ks, message in (([0, 2], "k = 0"), ([4, 258], "k = 258 is outside 1 to the vocabulary's 257")):
            with pytest.raises(RescoreError, match=message):
                evaluated(make(rescorers=("oracle",), k=ks))


class TestTraces:
    def test_the_second_run_needs_no_model(self, make: Make, monkeypatch: pytest.MonkeyPatch):
        first = run(make())
        no_base(monkeypatch)
        assert run(make()) == first
        assert run(make(limit=2)) != first
        assert [r.k for r in run(make(k=32, p=3, h=2))] == [32] * 3

    def test_k_above_what_is_cached_records_anew_and_both_stay(self, make: Make, monkeypatch: pytest.MonkeyPatch):
        narrow, wide = run(make(k=16, limit=3)), run(make(k=40, limit=3))
        assert [r.k for r in wide] == [40] * 3
        both = (make(k=16, limit=5), make(k=40, limit=5))  # both can be extended
        extended = [run(options) for options in both]
        no_base(monkeypatch)
        assert [run(make(k=16, limit=3)), run(make(k=40, limit=3))] == [narrow, wide]
        assert [run(options) for options in both] == extended
        kept = [read_header(folder) for folder in (cache_directory() / "traces").iterdir()]
        assert sorted(header.k for header in kept) == [32, 40]

    def test_k_above_the_vocabulary_is_refused_before_work(self, make: Make, monkeypatch: pytest.MonkeyPatch):
        no_base(monkeypatch)
        with pytest.raises(RescoreError, match="k = 300 is outside 1 to the vocabulary's 257; choose another --k"):
            run(make(k=300))

    def test_a_longer_limit_records_only_what_is_missing(self, make: Make):
        seen: list[tuple[str, int, int]] = []
        run(make(limit=2))
        some = run(make(limit=5), progress=lambda *what: seen.append(what))
        assert [what for what in seen if what[0] == "trace squad"] == [("trace squad", n, 5) for n in (3, 4, 5)]
        assert [r.n for r in some] == [5, 5, 5]
        whole = run(make())
        assert whole == run(make(trace=str(next((cache_directory() / "traces").iterdir())), data=None, heads=None))

    def test_extending_a_trace_reads_each_part_once(self, make: Make, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(tracing, "PART_EXAMPLES", 2)
        read_part, read = tracing._read_part, []
        monkeypatch.setattr(tracing, "_read_part", lambda folder, *a: read.append(folder.name) or read_part(folder, *a))
        run(make(limit=4))
        assert read == ["part-00000", "part-00001"]
        read.clear()
        run(make())
        assert read == ["part-00000", "part-00001", "part-00002"]

    def test_other_heads_data_and_limits_have_traces_of_their_own(self, make: Make, tiny_base, tmp_path: Path):
        make_heads(tiny_base, seed=5).save(tmp_path / "heads")
        other = write_lines(tmp_path / "other.jsonl", squad_records(7)[1:])
        for changes in ({}, {"heads": str(tmp_path / "heads")}, {"data": str(other)}, {"max_new_tokens": 9},
                        {"max_prompt_tokens": 30}, {"dtype": "float32"}):  # fmt: skip
            run(make(rescorers=("none",), limit=1, **changes))
        assert len(list((cache_directory() / "traces").iterdir())) == 6

    def test_a_recorded_trace_gives_the_same_results(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        options = make(p=2)
        trace = recorded_trace(make(k=16), tmp_path / "trace")
        assert (len(trace.examples), trace.header.k, trace.header.h) == (6, 16, 4)
        direct, shorter = run(options), run(make(limit=4, h=3))
        no_base(monkeypatch)
        given = {"trace": str(tmp_path / "trace"), "data": None, "heads": None}
        assert run(dict(options, **given)) == direct
        assert run(make(limit=4, h=3, **given)) == shorter
        assert [r.k for r in evaluated(make(**given, rescorers=("oracle",), k=(1, 16))).document.results] == [1, 16]

    def test_a_trace_refuses_what_it_does_not_hold(self, make: Make, tmp_path: Path):
        recorded_trace(make(k=8, tasks=("squad",)), tmp_path / "trace")
        given = {"trace": str(tmp_path / "trace"), "data": None, "heads": None}
        for changes, message in (
            ({"k": 16}, "k = 16, but the trace holds the top 8 of each head; choose --k from 1 to 8"),
            ({"h": 5}, "h = 5, but these heads propose blocks of 4"),
            ({"tasks": ("gsm8k",)}, "trace is a trace of squad, not of gsm8k; drop --task"),
            ({"mode": "live"}, "can be replayed, not decoded live"),
            ({"data": "x.jsonl"}, "has its own examples and lattices; drop --data or --trace"),
            ({"heads": "x"}, "drop --heads or --trace"),
        ):
            with pytest.raises(RescoreError, match=message):
                run(make(**{**given, **changes}))
        with pytest.raises(IncompatibleError, match=r"\(k: 8 -> 16\); use another --out"):
            recorded_trace(make(k=16), tmp_path / "trace")

    def test_a_trace_made_elsewhere_is_called_as_the_user_likes(self, make: Make, tmp_path: Path):
        recorded_trace(make(), tmp_path / "medusa")
        header = json.loads((tmp_path / "medusa" / "trace.json").read_text())
        (tmp_path / "medusa" / "trace.json").write_text(json.dumps(header | {"settings": {}}))
        given = make(trace=str(tmp_path / "medusa"), data=None, heads=None)
        assert {r.task for r in run(given)} == {"medusa"} and not any(r.quality for r in run(given))
        assert {r.task for r in run(dict(given, tasks=("mine",)))} == {"mine"}
        with pytest.raises(RescoreError, match="is the trace of one task; give one --task, or none"):
            run(dict(given, tasks=("mine", "yours")))


class TestConfiguration:
    def test_the_document_carries_all_that_the_numbers_depend_on(self, make: Make, squad_file: Path, tmp_path: Path):
        run(make(seed=3), out=tmp_path / "run")
        document = json.loads((tmp_path / "run" / "results.json").read_text())
        config = document["config"]
        inputs = inputs_of(dict(make(), task="squad"))
        assert config["inputs"] == {"squad": json.loads(json.dumps(dataclasses.asdict(inputs)))}
        assert (config["mode"], config["verify"], config["seed"]) == ("replay", "tree", 3)
        assert [(r["rescorer"], r["p"], r["k"]) for r in config["runs"]["squad"]] == [
            (name, 1, 8) for name in make()["rescorers"]
        ]
        assert {"rescore", "torch", "transformers"} <= set(config["versions"])
        assert "git_revision" in config
        assert (config["device"], config["threads"]) == ("cpu", torch.get_num_threads())
        identity = lm.base.catalog.identify(make()["base"], dtype="float64")
        trace = config["traces"]["squad"]
        assert trace["base"] == dataclasses.asdict(identity)
        assert {len(trace["base"][name]) for name in ("weights_sha256", "tokenizer_sha256")} == {64}
        assert len(trace["heads_sha256"]) == 64 and (trace["h"], trace["k"]) == (4, 32)
        assert trace["template"] == "question: {question} context: {context}" and trace["chat"] is True
        assert config["data"]["squad"]["path"] == str(squad_file)
        assert config["data"]["squad"]["sha256"] == trace["data_sha256"]
        assert config["notices"] == []
        assert document["results"] == plain(run(make(seed=3)))

    def test_a_given_trace_is_identified_by_its_content(self, make: Make, tmp_path: Path):
        recorded_trace(make(limit=2), tmp_path / "trace")
        given = make(trace=str(tmp_path / "trace"), data=None, heads=None)
        one, again = (evaluated(given).document.config for _ in range(2))
        assert one.data["squad"] == again.data["squad"]
        assert one.device == "cpu"
        assert one.data["squad"]["kind"] == "trace" and len(one.data["squad"]["sha256"]) == 64
        assert one.traces["squad"]["base"]["name"] == make()["base"]
        recorded_trace(make(limit=3), tmp_path / "trace")
        assert evaluated(given).document.config.data["squad"] != one.data["squad"]

    def test_the_sample_stands_in_with_a_notice(self, make: Make, monkeypatch: pytest.MonkeyPatch):
        found = evaluated(make(data=None, limit=2, max_prompt_tokens=200))
        (notice,) = found.notices
        assert "is not in the local cache; using 2 examples of the sample embedded for task squad" in notice
        assert found.document.config.notices == [notice]
        assert found.document.config.data["squad"]["kind"] == "sample"
        assert [r.n for r in found.document.results] == [2, 2, 2]

    def test_notices_come_once_and_before_the_work(self, make: Make, tmp_path: Path):
        happened: list[str] = []
        listen: dict[str, Any] = {"notify": happened.append, "progress": lambda what, *_: happened.append(what)}
        options = make(data=None, limit=2, max_prompt_tokens=200)
        found = evaluated(options, **listen)
        assert happened[0] == found.notices[0] and happened.count(found.notices[0]) == 1
        assert set(happened[1:]) == {"trace squad", "replay squad"}
        several = dict(options, rescorers=("oracle",), k=(1, 2))
        for do in (lambda: evaluated(several, **listen), lambda: recorded_trace(options, tmp_path, **listen)):
            happened.clear()
            do()
            assert happened[0] == found.notices[0] and happened.count(found.notices[0]) == 1

    @pytest.mark.parametrize(("p", "said"), [(4, True), (1, False)])
    def test_a_base_without_tree_masks_is_told_before_the_work(self, make: Make, monkeypatch, p: int, said: bool):
        monkeypatch.setattr("lm.base.probe.Probe._follows_tree", lambda *_: False)
        happened: list[str] = []
        found = evaluated(
            make(mode="live", p=p, rescorers=("none", "oracle")),
            notify=happened.append,
            progress=lambda what, *_: happened.append(what),
        )
        line = f"{make()['base']} takes no tree mask; its 4 drafts a step are verified as a batch"
        assert found.notices == found.document.config.notices == [line] * said
        assert (happened[0] == line) == said and happened.count(line) == said
        none, oracle = found.document.results
        assert none.latency and none.latency.verify == ("batch" if said else "tree")
        assert oracle.latency and oracle.latency.verify == "tree", "one draft needs no mask"
        assert without_times([none, oracle]) == run(make(p=p, rescorers=("none", "oracle")))

    def test_everything_is_checked_before_the_model_runs(self, make: Make, tmp_path: Path, monkeypatch):
        data = write_lines(tmp_path / "squad.jsonl", squad_records(2))  # gsm8k lacks its field `answer`
        no_base(monkeypatch)
        with pytest.raises(InvalidDataError, match="line 1: no field 'answer'"):
            run(make(tasks=("squad", "gsm8k"), data=str(data)))
        with pytest.raises(UnknownNameError, match="unknown rescorer 'nine'"):
            run(make(rescorers=("none", "nine")))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"p": 0}, "p = 0"),
            ({"p": (1, 0)}, "p = 0"),
            ({"rescorers": ()}, "nothing is to be run"),
            ({"k": 0}, "k = 0"),
            ({"h": 1}, "h = 1; a block has at least 2 heads"),
            ({"limit": 0}, "--limit 0"),
            ({"seed": -1}, "--seed -1"),
            ({"max_new_tokens": 0}, "--max-new-tokens 0"),
            ({"max_prompt_tokens": 0}, "--max-prompt-tokens 0"),
            ({"verify": "trees"}, "unknown verify mode 'trees'; did you mean tree"),
            ({"tasks": ("squat",)}, "unknown task 'squat'; did you mean squad"),
            ({"device": "foo"}, "unknown device 'foo'; known: auto, cpu, cuda"),
            ({"dtype": "float23"}, "unknown dtype 'float23'; did you mean float32"),
            ({"heads": "/nowhere"}, "no block heads in /nowhere"),
            ({"base": "/nowhere"}, "/nowhere"),
        ],
    )
    def test_options_that_make_no_sense_are_refused(self, make: Make, changes: dict[str, Any], message: str):
        with pytest.raises(RescoreError, match=message):
            run(make(**changes))

    def test_no_recordings_and_tasks_without_runs_are_refused(self, make: Make):
        with pytest.raises(RescoreError, match="nothing is to be evaluated; give a recording at least"):
            evaluate([], ["none"])
        with pytest.raises(RescoreError, match="no runs are given for squad; give them by the name of each task"):
            evaluate(opened(make()), {"gsm8k": ["none"]})

    def test_the_warm_up_stays_within_the_limit(self, make: Make, monkeypatch):
        limits, decode = [], evaluation.decode

        def counted(*args: Any, **more: Any) -> Any:
            limits.append(more["max_new_tokens"])
            return decode(*args, **more)

        monkeypatch.setattr(evaluation, "decode", counted)
        run(make(mode="live", max_new_tokens=2, limit=1))
        assert max(limits) == 2

    def test_heads_of_another_base_are_refused(self, make: Make, tmp_path: Path):
        other = save_tiny_base(tmp_path / "wide", hidden_size=48)
        with pytest.raises(IncompatibleError, match="hidden_size is 32, the base's is 48; give other --heads"):
            run(make(base=str(other)))
