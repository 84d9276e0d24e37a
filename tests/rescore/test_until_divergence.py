"""Lossy acceptance from a trace: what it says is what live decoding does, as far as it says anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command, refused, save_tiny_base
from evaluating import Options, opened, recorded_trace

from lattices.lattice import Lattice
from lm.base.model import BaseLM
from lm.files import write_json
from lm.heads.block_heads import load_heads
from rescore.acceptance import Rule, load_rule
from rescore.acceptance.lossy import Lossy
from rescore.decoding import decode
from rescore.drafters.drafting import HEADS_ALONE, Drafting
from rescore.replaying import Limits, _Along, replay_steps
from rescore.rescorers import load_rescorer
from rescore.runs.run import Run
from rescore.studies.until_divergence import LIVE, UntilDivergence, until_divergence
from rescore.tracing import TracedExample

RULES = ["top-k:2", "top-k:3", "top-k:2,least=3", "distance:eps=40", "min-block:2"]


@pytest.mark.parametrize("spec", RULES)
@pytest.mark.parametrize("p", [1, 4])
def test_live_decoding_takes_the_same_steps(
    spec: str, p: int, options: Options, tiny_base: BaseLM, tiny_heads_folder: Path, tmp_path: Path
):
    """Up to the first token that is not greedy decoding's; of the step that keeps it, at least so many tokens."""
    trace = recorded_trace(options, tmp_path / "trace")
    rule, heads = load_rule(spec), load_heads(tiny_base, str(tiny_heads_folder))
    limits = Limits.of(trace.header)
    drafting = Drafting(load_rescorer("none"), HEADS_ALONE, 4, p)
    how: dict[str, Any] = {"limits": limits, "rule": rule}
    replayed = replay_steps(trace.examples, drafting, **how)
    whole = replay_steps(trace.examples, drafting, limits=limits)
    ended = 0
    for example, steps, greedy in zip(trace.examples, replayed, whole, strict=True):
        live = decode(
            tiny_base, heads, example.prompt_ids.tolist(), rescorer=load_rescorer("none"), k=4, p=p,
            max_new_tokens=24, rule=rule,
        )  # fmt: skip
        output = example.output_ids.tolist()
        assert steps.accepted == greedy.accepted[: len(steps.accepted)]
        if steps.diverged is None:
            assert (live.output_ids, live.accepted) == (output, steps.accepted)
            continue
        ended += 1
        before, last = steps.accepted[:-1], len(steps.accepted) - 1
        known = sum(before) + steps.diverged
        assert live.accepted[:last] == before and live.accepted[last] >= steps.diverged > steps.accepted[-1] - (p > 1)
        assert live.output_ids[: sum(before)] == output[: sum(before)]
        if p == 1:
            assert live.output_ids[: known - 1] == output[: known - 1]
            assert live.output_ids[known - 1 : known] != output[known - 1 : known]
    assert ended, "the test would say nothing"
    if rule.least == 1:
        assert max(len(steps.accepted) for steps in replayed) > 1


def traced(output: list[int], seconds: list[int], heads: list[list[int]]) -> TracedExample:
    """An example whose base says `output`, or (second) `seconds`; of the other heads only the first entries are told,
    by position."""
    t, h = len(output), 1 + len(heads[0])
    token_ids = np.full((t, h, 2), 90, dtype=np.int32)
    token_ids[:, :, 1] = 91
    token_ids[:, 0] = np.stack([output, seconds], axis=1)
    token_ids[:, 1:, 0] = heads
    logps = np.tile(np.array([-0.5, -1.5], dtype=np.float32), (t, h, 1))
    return TracedExample(
        "a", "", (), None, np.array([1], dtype=np.int32), np.array(output, dtype=np.int32), Lattice(token_ids, logps),
        np.zeros((t, h), dtype=np.float32), np.zeros(t, dtype=np.float32),
    )  # fmt: skip


class TestByHand:
    """The base says 5 6 7 8, or second 15 16 17 18."""

    def steps(self, heads: list[list[int]], rule: str, **limits: Any) -> tuple[list[int], int | None]:
        example = traced([5, 6, 7, 8], [15, 16, 17, 18], heads)
        drafting = Drafting(load_rescorer("none"), HEADS_ALONE, 1, 1)
        (steps,) = replay_steps([example], drafting, limits=Limits(**limits), rule=load_rule(rule))  # type: ignore[arg-type]
        return steps.accepted, steps.diverged

    def test_all_right(self):
        assert self.steps([[6, 7], [7, 8], [8, 9], [9, 9]], "top-k:2") == ([3, 1], None)

    def test_the_second_best_is_kept_and_ends_it(self):
        assert self.steps([[16, 7], [7, 8], [8, 9], [9, 9]], "top-k:2") == ([1], 2)
        assert self.steps([[6, 17], [7, 8], [8, 9], [9, 9]], "top-k:2") == ([2], 3)
        assert self.steps([[6, 9], [9, 9], [18, 9], [9, 9]], "top-k:2") == ([2, 1], 2)

    def test_what_is_neither_is_not(self):
        assert self.steps([[9, 17], [7, 8], [8, 9], [9, 9]], "top-k:2") == ([1, 3], None)

    def test_distance(self):
        assert self.steps([[7, 9], [7, 9], [8, 9], [9, 9]], "distance:eps=1") == ([1], 2)
        assert self.steps([[9, 9], [9, 9], [9, 9], [9, 9]], "distance:eps=1") == ([1, 1, 1], 2)
        assert self.steps([[9, 9], [9, 9], [6, 9], [9, 9]], "distance:eps=1") == ([1, 1, 1, 1], None)

    def test_the_least_of_a_block(self):
        assert self.steps([[6, 9], [7, 9], [9, 9], [9, 9]], "min-block:2") == ([2, 1], 2)
        assert self.steps([[6, 9], [7, 9], [9, 9], [9, 9]], "min-block:3") == ([2], 3)

    def test_of_several_drafts_the_longest_counts(self):
        """One is greedy decoding's for three tokens; another has a token that is not, and more after it, or not."""
        right, other, short = [5, 6, 7, 9], [5, 16, 9, -1], [5, 16, -1, -1]
        example = traced([5, 6, 7, 8], [15, 16, 17, 18], [[90]] * 4)

        def diverges(*drafts: list[int]) -> int | None:
            rule: Any = load_rule("top-k:2")
            return rule.diverges(np.array(drafts), _Along(example, 0, 4), 9, ())

        assert diverges(short) == 2
        assert diverges(right, short) is None and diverges(short, right) is None, "it is shorter"
        assert diverges(right, other) is None, "the first one of one length wins"
        assert diverges(other, right) == 3, "whether its end fits is in no trace"

    def test_nothing_is_kept_beyond_the_end(self):
        """The output ends with 8: by itself, or by the limit."""
        heads = [[9, 9], [9, 9], [8, 9], [9, 9]]
        for limits in ({"eos_token_ids": (8,)}, {"max_new_tokens": 4}):
            assert self.steps(heads, "distance:eps=100", **limits)[0][0] == 1
            assert self.steps(heads, "min-block:3", **limits) == ([1], 2)
        assert self.steps([[9, 9], [9, 9], [8, 0], [0, 0]], "top-k:2", max_new_tokens=4) == ([1, 1, 2], None)
        assert self.steps([[9, 9], [9, 9], [8, 0], [0, 0]], "distance:eps=0", eos_token_ids=(8,)) == ([1, 1, 2], None)


class TestStudy:
    def study(self, options: Options, rule: Rule | str, *runs: str | Run) -> list[UntilDivergence]:
        rule = load_rule(rule) if isinstance(rule, str) else rule
        return until_divergence(opened(options), runs or ("none",), rule).rows

    def test_its_numbers(self, options: Options, tmp_path: Path):
        (row,) = self.study(options, "top-k:2")
        trace = recorded_trace(options, tmp_path / "trace")
        drafting = Drafting(load_rescorer("none"), HEADS_ALONE, 4, 1)
        steps = replay_steps(trace.examples, drafting, limits=Limits.of(trace.header), rule=load_rule("top-k:2"))  # type: ignore[arg-type]
        whole = replay_steps(trace.examples, drafting)
        kept = [sum(s.accepted[:-1]) + (s.diverged or s.accepted[-1]) for s in steps]
        count = sum(len(s.accepted) for s in steps)
        assert (row.n, row.diverged) == (6, sum(s.diverged is not None for s in steps))
        assert row.steps == count and row.hit_rate == sum(kept) / count
        assert row.greedy == sum(sum(s.accepted) for s in steps) / count < row.hit_rate
        assert row.of_steps == count / sum(len(s.accepted) for s in whole)
        assert row.rescorer == "none [lossy: top-k:2]"

    def test_a_rule_that_keeps_what_greedy_acceptance_keeps(self, options: Options):
        """The whole decode, and its block efficiency."""
        (row,) = self.study(options, "top-k:1")
        assert (row.diverged, row.of_steps) == (0, 1.0) and row.hit_rate == row.greedy

    @pytest.mark.parametrize(
        ("rule", "told"),
        [
            ("typical", "goes by the base's whole distribution, its entropy too, and a trace keeps the 32 likeliest"),
            ("top-k:33", "goes by the 33 likeliest tokens, and the trace of squad keeps 32; give fewer, or --k 33"),
        ],
    )
    def test_what_a_trace_does_not_tell_is_refused(self, options: Options, rule: str, told: str):
        refused(lambda: self.study(options, rule), told, "--mode live")

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"imported": {"missing": ["other entries of slot 1"]}}, "they were not logged"),
        ],
    )
    def test_a_trace_whose_first_slot_is_not_the_bases(
        self, options: Options, tmp_path: Path, settings: dict[str, Any], told: str
    ):
        recorded_trace(options, tmp_path / "trace")
        header = json.loads((tmp_path / "trace" / "trace.json").read_text())
        header["settings"] |= settings
        write_json(tmp_path / "trace" / "trace.json", header)
        given = {"trace": str(tmp_path / "trace"), "device": "cpu", "k": 8}
        refused(lambda: self.study(given, "top-k:2"), told)

    def test_a_drafters_trace_with_the_bases_first_slot(
        self, options: Options, rescore: Command, model: list[object], tmp_path: Path
    ):
        """It is told by the margins: a trace that says a drafter's name but has the base's slot 1 is as good as any;
        that of a draft model has this model's guesses in slot 1."""
        recorded_trace(options, tmp_path / "trace")
        header = json.loads((tmp_path / "trace" / "trace.json").read_text())
        header["settings"] |= {"drafter": "mine"}
        write_json(tmp_path / "trace" / "trace.json", header)
        given, run = {"trace": str(tmp_path / "trace"), "device": "cpu", "k": 8}, Run("none", k=4)
        assert self.study(given, "top-k:2", run) == self.study(options, "top-k:2", run)
        other = save_tiny_base(tmp_path / "other", seed=5)
        ran = rescore("trace", *model, "--task", "squad", "--drafter", f"draft-model:{other}", "--out", tmp_path / "of")
        assert ran.code == 0, ran.err
        given = given | {"trace": str(tmp_path / "of")}
        refused(lambda: self.study(given, "top-k:2", run), "its slot 1 is a drafter's but for the first entry", LIVE)
        assert self.study(given, "min-block:2", run)

    def test_other_rules_of_a_package_are_live_only(self, options: Options):
        class Whole(Lossy):
            name = "whole"

            def fits(self, drafts: np.ndarray, said: Any) -> np.ndarray:
                return np.ones(drafts[:, 1:].shape, dtype=bool)

        refused(lambda: self.study(options, Whole()), "whole acceptance goes by the base's whole distribution")


class TestCommand:
    def test_the_table_says_what_it_is(self, rescore: Command, model: list[object]):
        asked = ("eval", *model, "--rescorer", "none", "--k", 4, "--p", "1,2", "--acceptance", "top-k:2")
        run = rescore(*asked)
        assert run.code == 0, run.err
        assert run.out.startswith("LOSSY, until first divergence: top-k:2 acceptance")
        assert "none [lossy: top-k:2]" in run.out and "until then" in run.out and "block eff." not in run.out
        rows = rescore(*asked, "--json").document["rows"]
        assert [row["p"] for row in rows] == [1, 2] and all(1 <= row["greedy"] <= row["hit_rate"] for row in rows)

    def test_what_is_for_whole_outputs_is_refused(self, rescore: Command, model: list[object], tmp_path: Path):
        asked = ("eval", *model, "--acceptance", "top-k:2")
        rescore(*asked, "--out", tmp_path / "out").refused("--out is for whole evaluations, and a trace knows no whole")
        rescore(*asked, "--details").refused("--details is for whole evaluations")
        rescore(*asked, "--verify", "batch").refused("--verify batch is for whole evaluations")
        rescore(*asked, "--peer", "transformers").refused("--peer is for whole evaluations")
        rescore(*asked, "--rescorer", "oracle").refused("the oracle knows greedy decoding's output")
