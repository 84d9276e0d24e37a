"""`rescore export`: what engines and benchmarks read of a result, held to the identities of their schemas."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, byte_tokenizer, refused, write_lines
from hypothesis import given
from hypothesis import strategies as st
from made_records import example_record, made_result, run_config

from lattices.errors import InvalidDataError, RescoreError, UnknownNameError
from rescore import export
from rescore.accounting import account
from rescore.exports.engines import AcceptanceHistogram, SpecBenchChoice, VllmSynthetic
from rescore.runs.evaluated import Evaluation
from rescore.runs.records import ResultsDocument, RunRecord

Steps = list[list[tuple[int, int]]]  # of each example, of each step: tokens of its draft and accepted ones


@st.composite
def all_steps(draw: st.DrawFn) -> Steps:
    """Steps of one to four examples, drafts of 1 to 8 tokens with the base's own, one at least of two or more."""
    lengths = draw(st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=12), min_size=1, max_size=4))
    lengths[0].append(draw(st.integers(2, 8)))
    return [[(length, draw(st.integers(1, length))) for length in example] for example in lengths]


def evaluation(
    steps: Steps, *, p: int = 1, changed: dict[str, Any] | None = None, longest: int = 0, drafters: Sequence[str] = (),
) -> Evaluation:  # fmt: skip
    """Results of a made decode with these steps."""
    longest = max(longest, *(length for example in steps for length, _ in example))
    accepted = [[n for _, n in example] for example in steps]
    of = account(accepted, longest)
    result = made_result(
        p=p, n=len(steps), groups=of.groups, block_efficiency=of.block_efficiency, marginal=of.marginal,
        block_efficiency_macro=of.block_efficiency_macro, steps=of.steps, tokens=of.tokens,
        accepted_histogram=of.accepted_histogram, conditional=of.conditional, **changed or {},
    )  # fmt: skip
    records = [
        example_record(
            id=str(i), p=p, rescorer=result.rescorer, accepted=lengths, drafts=[[5] * length for length, _ in example]
        )
        for i, (example, lengths) in enumerate(zip(steps, accepted, strict=True))
    ]
    run = RunRecord(rescorer=result.rescorer, k=result.k, p=p, drafters=list(drafters))
    traces = {"squad": {"k": 16, "heads_sha256": "f0"}}
    return Evaluation(
        ResultsDocument(config=run_config(runs={"squad": [run]}, traces=traces), results=[result]), records
    )


def document(run: Evaluation, to: Any, **how: Any) -> dict[str, Any]:
    return json.loads(str(export(run, to, **how)))


@given(steps=all_steps(), p=st.sampled_from([1, 4]))
def test_rates_that_engines_take(steps: Steps, p: int):
    run = evaluation(steps, p=p)
    lengths = [n for example in steps for _, n in example]
    k = max(length for example in steps for length, _ in example) - 1
    mean = sum(lengths) / len(lengths)
    option, value = shlex.split(str(export(run, "vllm-synthetic", engine_drafter="medusa:a b's")))
    config = json.loads(value)
    assert option == "--speculative-config" and config["rejection_sample_method"] == "synthetic"
    assert (config["method"], config["model"], config["num_speculative_tokens"]) == ("medusa", "a b's", k)
    rates = config["synthetic_acceptance_rates"]
    # Drafted token i, from 0, stands behind the base's own: a step that accepted it accepted i + 2 tokens.
    assert rates == [pytest.approx(sum(n >= i + 2 for n in lengths) / len(lengths), abs=1e-6) for i in range(k)]
    assert all(a >= b for a, b in pairwise(rates)) and 1 + sum(rates) == pytest.approx(mean, abs=1e-6 * (k + 1))
    option, listed = str(export(run, "llama-cpp")).split()
    assert option == "--spec-synthetic-acceptance-rates" and list(map(float, listed.split(","))) == rates
    variables = dict(each.split("=") for each in str(export(run, "sglang")).split())
    assert float(variables["SGLANG_SIMULATE_ACC_LEN"]) == pytest.approx(mean, abs=1e-6)


@given(steps=all_steps(), p=st.sampled_from([1, 4]))
def test_histograms_sum_to_steps_and_tokens(steps: Steps, p: int):
    found = document(evaluation(steps, p=p), "acceptance-histogram")
    every = [step for example in steps for step in example]
    histogram = found["acceptance_histogram"]
    assert histogram == [sum(n == j + 1 for _, n in every) for j in range(found["num_spec_tokens"] + 1)]
    assert sum(histogram) == found["num_spec_steps"] == len(every)
    accepted = sum(j * count for j, count in enumerate(histogram))
    assert accepted == found["num_accepted_draft_tokens"] == sum(n - 1 for _, n in every)
    assert found["mean_acceptance_length"] == pytest.approx(1 + accepted / len(every))
    if p > 1:  # what the other drafts of a step had is not known
        assert not found.keys() & {"num_draft_tokens", "draft_acceptance_rate", "acceptance_histogram_by_draft_length"}
        return
    drafted = sum(length - 1 for length, _ in every)
    assert found["num_draft_tokens"] == drafted and found["draft_acceptance_rate"] == accepted / drafted
    by_length = found["acceptance_histogram_by_draft_length"]
    assert set(by_length) == {str(length - 1) for length, _ in every}
    for length, counts in by_length.items():
        of_length = [n - 1 for drafts, n in every if drafts - 1 == int(length)]
        assert counts == [of_length.count(j) for j in range(int(length) + 1)]


@given(steps=all_steps())
def test_profile(steps: Steps):
    found = document(evaluation(steps), "speculation-profile", unstable=True)
    lengths = [n for example in steps for _, n in example]
    marginal, conditional = found["marginal_accept_rates"], found["conditional_accept_rates"]
    assert found["mean_accept_length"] == pytest.approx(1 + sum(marginal), abs=1e-5)
    per_request = [sum(n for _, n in example) / len(example) for example in steps]
    assert found["mean_accept_length_per_request"] == pytest.approx(sum(per_request) / len(steps), abs=1e-6)
    assert found["acceptance_length_histogram"] == {str(n): lengths.count(n) for n in sorted(set(lengths))}
    before = 1.0
    for rate, given_rate in zip(marginal, conditional, strict=True):
        assert before * given_rate == pytest.approx(rate, abs=2e-6)
        before = rate


@pytest.mark.parametrize(
    ("drafters", "draft"),
    [
        ([], {"heads_sha256": "f0"}),
        (["lookup 16 1 32 False"], {"drafters": ["lookup 16 1 32 False"]}),
        (["heads of 9 tokens ab", "mtp c"], {"heads_sha256": "f0", "drafters": ["heads of 9 tokens ab", "mtp c"]}),
    ],
)
def test_a_profile_names_what_drafted(drafters: list[str], draft: dict[str, Any]):
    """The heads of the trace did not draft where something else did."""
    run = evaluation([[(3, 2), (3, 1)]], drafters=drafters)
    assert document(run, "speculation-profile", unstable=True)["draft_checkpoint"] == draft


class TestRefusals:
    def test_records_check_themselves(self):
        def made(kind: Any, **changes: Any) -> Any:
            right: dict[Any, dict[str, Any]] = {
                VllmSynthetic: {"num_speculative_tokens": 2, "synthetic_acceptance_rates": [0.5, 0.25]},
                AcceptanceHistogram: {
                    "mean_acceptance_length": 1.5, "acceptance_histogram": [2, 2], "num_spec_steps": 4,
                    "num_accepted_draft_tokens": 2, "num_spec_tokens": 1,
                },
                SpecBenchChoice: {
                    "turns": ["a"], "decoding_steps": [2], "new_tokens": [3], "wall_time": [0.1],
                    "accept_lengths": [1, 2],
                },
            }  # fmt: skip
            return kind(**right[kind] | changes)

        for kind, wrong in (
            (VllmSynthetic, {"synthetic_acceptance_rates": [0.25, 0.5]}),
            (VllmSynthetic, {"num_speculative_tokens": 3}),
            (VllmSynthetic, {"synthetic_acceptance_rates": [1.5, 0.5]}),
            (AcceptanceHistogram, {"num_spec_steps": 5}),
            (AcceptanceHistogram, {"num_spec_tokens": 2}),
            (AcceptanceHistogram, {"num_accepted_draft_tokens": 3}),
            (AcceptanceHistogram, {"acceptance_histogram_by_draft_length": {"1": [2, 1]}}),
            (AcceptanceHistogram, {"acceptance_histogram_by_draft_length": {"1": [2, 2, 0]}}),
            (SpecBenchChoice, {"new_tokens": [4]}),
            (SpecBenchChoice, {"decoding_steps": [3]}),
            (SpecBenchChoice, {"wall_time": []}),
        ):
            made(kind)
            refused(lambda kind=kind, wrong=wrong: made(kind, **wrong), "run the evaluation again", InvalidDataError)

    def test_results_that_do_not_add_up(self):
        steps: Steps = [[(3, 1), (3, 2), (3, 3)]]
        for field, wrong in (("steps", 4), ("tokens", 7), ("accepted_histogram", [0, 1, 2, 0]),
                             ("block_efficiency", 1.9), ("marginal", [1.0, 0.5, 0.25])):  # fmt: skip
            run = evaluation(steps)
            broken = made_result(**{**vars(run.results[0]), field: wrong})
            run.document.results[0] = broken
            refused(lambda run=run: export(run, "sglang"), "does not add up", InvalidDataError)
        run = evaluation(steps)
        run.examples[0].accepted[0] = 4
        refused(lambda: export(run, "sglang"), "accepted 4 tokens of 3", InvalidDataError)

    def test_what_a_format_can_not_say(self):
        steps: Steps = [[(3, 1), (3, 2)]]
        refused(lambda: export(evaluation(steps), "speculation-profile"), "--unstable")
        refused(lambda: export(evaluation(steps), "spec-bench"), "was replayed", "--mode live")
        refused(lambda: export(evaluation([[(1, 1)]]), "sglang"), "drafts nothing")
        refused(lambda: export(evaluation(steps), "sglang", engine_drafter="mtp"), "--engine-drafter is for --to vllm")
        for wrong in ("", "medusa:", ":DIR"):
            refused(lambda wrong=wrong: export(evaluation(steps), "vllm-synthetic", engine_drafter=wrong), "METHOD")

    def test_only_one_result(self):
        run = evaluation([[(3, 1), (3, 2)]])
        run.document.results.append(made_result(rescorer="lookup"))
        refused(lambda: export(run, "sglang"), "2 results fit; choose one by --rescorer: none on squad (p = 1")
        refused(lambda: export(run, "sglang", rescorer="lookupp"), "did you mean lookup", UnknownNameError)
        refused(lambda: export(run, "sglang", task="xsum"), "known: squad", UnknownNameError)
        refused(lambda: export(run, "sglang", p=4), "no result is of this --p", RescoreError)
        assert "=1.5 " in str(export(run, "sglang", rescorer="none"))


def test_what_the_numbers_stand_for():
    tree = export(evaluation([[(3, 1), (3, 2)]], p=4), "vllm-synthetic", engine_drafter="mtp").notices
    assert "verifies more than one draft a step" in tree[0] and "a chain of 2 tokens" in tree[0] and len(tree) == 1
    assert any("left out" in line for line in export(evaluation([[(3, 1)]], p=4), "acceptance-histogram").notices)
    shorter = export(evaluation([[(3, 1), (2, 2)]]), "vllm-synthetic").notices
    assert "fewer than 2 tokens" in shorter[0] and "--engine-drafter" in shorter[1]
    oracle = export(evaluation([[(3, 1)]], changed={"rescorer": "oracle"}), "acceptance-histogram").notices
    assert "upper bound" in oracle[0]


class TestCommand:
    def test_a_folder(self, rescore: Command, model: list[object], tmp_path: Path):
        out = tmp_path / "results"
        assert rescore("eval", *model, "--rescorer", "none,oracle", "--p", "1,2", "--out", out).code == 0
        run = rescore("export", out, "--to", "acceptance-histogram", "--rescorer", "none", "--p", 1)
        assert (run.code, run.err) == (0, "") and run.document["num_spec_tokens"] == 3
        (result,) = [
            r
            for r in json.loads((out / "results.json").read_text())["results"]
            if (r["rescorer"], r["p"]) == ("none", 1)
        ]
        assert run.document["mean_acceptance_length"] == result["block_efficiency"]
        run = rescore("export", out, "--to", "sglang", "--rescorer", "none", "--p", 1, "--out", tmp_path / "env")
        assert run.out == f"{tmp_path / 'env'}\n" and "let the drafter draft 3" in run.err
        assert (tmp_path / "env").read_text().startswith("SGLANG_SIMULATE_ACC_LEN=")
        rescore("export", out, "--to", "sglang").refused("3 results fit; choose one by --rescorer, --p")
        rescore("export", out, "--to", "sgland").refused("did you mean sglang")
        rescore("export", tmp_path / "none", "--to", "sglang").refused("no such folder")
        document = json.loads((out / "results.json").read_text())
        (out / "results.json").write_text(json.dumps(document | {"schema": "rescore.results/1"}))
        rescore("export", out, "--to", "sglang").refused("has schema 'rescore.results/1'")

    def test_spec_bench(self, rescore: Command, model: list[object], tmp_path: Path):
        ids = [85, 95, 200]
        questions = [{"question_id": i, "category": "writing", "turns": [f"Say {i}"]} for i in ids]
        asked = [*model[:4], "--data", write_lines(tmp_path / "q.jsonl", questions), *model[6:]]
        out = tmp_path / "results"
        assert rescore("eval", *asked, "--task", "mt_bench", "--mode", "live", "--out", out).code == 0
        run = rescore("export", out, "--to", "spec-bench")
        answers = [json.loads(line) for line in run.out.splitlines()]
        assert [(a["question_id"], a["category"]) for a in answers] == [
            (85, "writing"), (95, "roleplay"), (200, "mt_bench"),
        ]  # fmt: skip
        lines = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
        for answer, line in zip(answers, lines, strict=True):
            (choice,) = answer["choices"]
            assert choice["accept_lengths"] == line["accepted"] and choice["decoding_steps"] == [len(line["accepted"])]
            assert choice["new_tokens"] == [len(line["output_ids"])]
            seconds = line["live"]["seconds"]
            assert choice["wall_time"] == [seconds["prefill"] + seconds["total"]]
            assert choice["turns"] == [byte_tokenizer().decode(line["output_ids"], skip_special_tokens=True)]
