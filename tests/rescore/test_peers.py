"""Peers: another library's decoder in the turns of live evaluation; its steps are counted as it takes them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, byte_tokenizer, make_heads, refused
from evaluating import evaluated
from evaluation_runs import Make, make_fixture, peek_fixture, run, without_times  # noqa: F401 (fixtures)
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from lattices.errors import IncompatibleError, UnknownNameError
from lm.base.catalog import load_base
from lm.base.model import BaseLM
from rescore import peers
from rescore.accounting import paired_difference, speedup_interval
from rescore.decoding import Decoded, decode
from rescore.peers import Decoder, Peer, load_peer
from rescore.peers.transformers_generate import decoded_by
from rescore.reports.inspection import inspect_example
from rescore.reports.page import report
from rescore.runs import evaluation
from rescore.runs.evaluated import load_run
from rescore.runs.evaluation import evaluate
from rescore.runs.log import ExampleLog
from rescore.runs.recording import record
from rescore.runs.records import ExampleRecord, Identical
from rescore.studies.analysis.collect import analyse_folders
from rescore.studies.comparison import Selection, compare_folders

LOOKUP = "transformers:lookup=5"
BOTH = ("transformers", LOOKUP)
LONG = {"max_new_tokens": 48}  # in which the tiny model says something again
PROMPT = list(b"abc abd abe abc abd abe abc ab")


class Slow(Peer):
    """Our own loop without drafts, as another package might register it."""

    identity = "slow 1"

    def load(self, base: BaseLM, shared: dict[object, Any]) -> Decoder:
        def decoder(prompt_ids: Sequence[int], most: int) -> Decoded:
            return decode(base, None, prompt_ids, max_new_tokens=most)

        return decoder


@dataclasses.dataclass
class Taken:
    """An output, the tokens of each call that led to it, and what each step accepted."""

    output: list[int]
    calls: list[list[int]]
    accepted: list[int]


@st.composite
def taken(draw: st.DrawFn) -> tuple[list[int], Taken]:
    """A prompt, and a decode as assisted decoding takes it: each call has what the last one chose and a draft, and
    chooses a token more than it accepts, up to the limit."""
    token = st.integers(0, 2)
    prompt, base = draw(st.lists(token, min_size=1, max_size=4)), draw(st.lists(token, min_size=1, max_size=12))
    cut = draw(st.integers(0, len(prompt) - 1))  # long prompts may take two calls
    calls, accepted, output = [prompt[:cut]] * (cut > 0), [], []
    fed = prompt[cut:]
    while len(output) < len(base):
        ahead = base[len(output) :]
        right = draw(st.integers(0, len(ahead)))
        draft = ahead[:right] + [3, *draw(st.lists(token, max_size=2))] * draw(st.booleans())
        calls.append(fed + draft)
        chosen = ahead[: right + 1]
        # What the call before chose is this call's first token, and counts with what this call accepts.
        kept = (len(output) > 0) + min(right, len(ahead))
        accepted += [kept] * (kept > 0)
        output += chosen
        fed = chosen[-1:]
        if right == len(ahead):  # the limit cuts what the call itself would choose: no call is left
            return prompt, Taken(output, calls, accepted)
    return prompt, Taken(output, calls, [*accepted, 1])


class TestSteps:
    @given(taken())
    def test_steps_are_those_that_were_taken(self, case: tuple[list[int], Taken]):
        prompt, expected = case
        found = decoded_by(expected.calls, len(prompt), expected.output)
        assert found.output_ids == expected.output and found.accepted == expected.accepted
        assert sum(found.accepted) == len(expected.output)
        start = 0
        for draft, n in zip(found.drafts, found.accepted, strict=True):
            ahead = expected.output[start:]
            assert draft[:n] == ahead[:n] and len(draft) <= len(ahead)
            start += n

    def test_a_decode_of_one_token_a_step(self):
        found = decoded_by([[7, 8, 9], [1], [2]], 3, [1, 2, 3])
        assert found.accepted == [1, 1, 1] and found.drafts == [[1], [2], [3]]

    def test_what_the_prompt_s_call_accepts_is_a_step(self):
        found = decoded_by([[7, 8, 1, 2, 5], [3, 6], [4]], 2, [1, 2, 3, 4, 9])
        assert found.accepted == [2, 1, 1, 1] and found.drafts == [[1, 2, 5], [3, 6], [4], [9]]

    def test_calls_after_the_end_count_for_nothing(self):
        """On a GPU transformers looks only later whether the output has ended."""
        assert decoded_by([[7], [1], [2], [3]], 1, [1, 2]).accepted == [1, 1]


class TestTransformers:
    @pytest.mark.parametrize("limit", [1, 2, 40])
    def test_its_greedy_output_in_steps_of_one_token(self, tiny_base: BaseLM, limit: int):
        found = load_peer("transformers").load(tiny_base, {})(PROMPT, limit)
        own = decode(tiny_base, None, PROMPT, max_new_tokens=limit)
        assert found.output_ids == own.output_ids and found.accepted == own.accepted
        assert found.seconds.prefill > 0 and found.seconds.total >= found.seconds.verify >= 0
        assert (found.seconds.verify > 0) == (limit > 1), "one token needs no call after the prompt"

    @pytest.mark.parametrize(("lookup", "limit"), [(1, 40), (3, 40), (10, 60), (10, 1), (10, 2)])
    def test_its_lookup_s_own_count_of_matches(self, tiny_base: BaseLM, monkeypatch: Any, lookup: int, limit: int):
        """transformers hands the number of matches of each call to its candidate generator."""
        matches: list[int] = []

        def noted(_self: Any, _ids: Any, _scores: Any, count: int) -> None:
            matches.append(count)

        monkeypatch.setattr(PromptLookupCandidateGenerator, "update_candidate_strategy", noted)
        peer = load_peer(f"transformers:lookup={lookup}")
        decoder, accepted = peer.load(tiny_base, {}), []
        for prompt in (PROMPT, PROMPT[:9], list(b"the bridge the bridge the bri")):
            matches.clear()
            found = decoder(prompt, limit)
            own = decode(tiny_base, None, prompt, max_new_tokens=limit)
            assert found.output_ids == own.output_ids
            first, *rest = matches
            # Each call accepts the token before and its matches. The limit may cut what the last one would choose.
            steps = [*[first] * (first > 0), *(1 + n for n in rest)]
            steps += [1] * (sum(steps) < len(own.output_ids))
            if sum(steps) > len(own.output_ids):  # transformers counts matches less the one that the limit left out
                steps[-1] -= sum(steps) - len(own.output_ids)
            assert found.accepted == steps
            assert max(found.accepted) <= peer.longest == lookup + 1
            accepted += found.accepted
        assert limit < 40 or max(accepted) > 1, "some drafts are right"

    def test_the_model_is_as_transformers_loads_it(self, tiny_folder: Path):
        base = load_base(str(tiny_folder), device="cpu")
        base.pack()
        shared: dict[object, Any] = {}
        for spec in BOTH:
            load_peer(spec).load(base, shared)
        (model,) = shared.values()
        assert model is not base.model and model.config._attn_implementation == "sdpa"
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        assert linear and not any("forward" in vars(module) for module in linear)
        assert base.model.config._attn_implementation == "packed"
        packed = [module for module in base.model.modules() if isinstance(module, torch.nn.Linear)]
        assert all("forward" in vars(module) for module in packed)

    def test_a_model_in_memory_keeps_its_settings_and_lends_none(self, tiny_folder: Path):
        model = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)
        own = model.generation_config
        own.repetition_penalty, own.do_sample, own.top_p = 1.9, True, 0.5
        base = load_base(model, byte_tokenizer())
        found = load_peer(LOOKUP).load(base, {})(PROMPT, 30)
        assert found.output_ids == decode(base, None, PROMPT, max_new_tokens=30).output_ids
        assert model.generation_config is own and own.repetition_penalty == 1.9
        assert not model._forward_hooks and not model._forward_pre_hooks

    def test_what_it_can_t_do_is_told(self, tiny_folder: Path):
        model = LlamaForCausalLM.from_pretrained(tiny_folder)
        decoder = load_peer(LOOKUP).load(load_base(model, byte_tokenizer()), {})
        own, model.generate = model.generate, lambda *_, **__: 1 / 0
        message = refused(lambda: decoder(PROMPT, 3), IncompatibleError)
        assert message == f"transformers can't decode with this model (division by zero); drop --peer {LOOKUP}"
        model.generate = own
        assert len(decoder(PROMPT, 3).output_ids) == 3

    def test_one_object_for_all_specs(self, monkeypatch: pytest.MonkeyPatch):
        """As another package may give it: each spec keeps its name."""
        shared = load_peer("transformers")
        monkeypatch.setitem(peers.PEERS.built_in, "theirs", lambda size="": shared)
        found = [load_peer(spec) for spec in ("theirs:1", "theirs:2")]
        assert [peer.name for peer in found] == ["theirs:1", "theirs:2"]

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("transformer", "unknown peer 'transformer'; did you mean transformers?"),
            ("transformers:look=3", "the peer transformers takes no look; it takes lookup"),
            ("transformers:lookup=many", "--peer transformers: lookup is a whole number, and 'many' is none"),
            ("transformers:lookup=-1", "--peer transformers: lookup is 0 to 1024, and -1 is none of these"),
            ("transformers:", "--peer transformers:: nothing stands after the colon"),
        ],
    )
    def test_specs_that_make_no_sense(self, spec: str, message: str):
        refused(lambda: load_peer(spec), message)


class TestEvaluation:
    def test_peers_stand_after_the_runs_which_they_do_not_change(self, make: Make, tmp_path: Path):
        found = evaluated(make(mode="live", **LONG), peers=BOTH, out=tmp_path / "run")
        assert without_times(found.results[:3]) == run(make(**LONG))
        assert [(r.rescorer, r.p, r.k, r.n) for r in found.results[3:]] == [(spec, 1, 8, 6) for spec in BOTH]
        greedy, lookup = found.results[3:]
        assert greedy.accepted_histogram == [0, greedy.tokens] and greedy.block_efficiency == 1.0
        assert len(lookup.marginal) == 6 and lookup.block_efficiency > 1.0
        for r in (greedy, lookup):
            assert r.is_peer and r.oracle_block_efficiency is r.against_unrescored is r.alpha is None
            assert r.identical == Identical(n=6, identical=6) and r.divergence == [] and r.sources == []
            assert r.latency and r.latency.speedup > 0 and r.latency.draft_ms == r.latency.rescore_ms == 0
            assert r.latency.speedup_ci95 and r.latency.speedup_ci95[0] <= r.latency.speedup_ci95[1]
            assert r.quality == found.results[0].quality and r.gap_share(found.results[0]) is None
        assert greedy.gain == pytest.approx(1 / found.results[0].block_efficiency - 1)
        assert not any(r.is_peer for r in found.results[:3])
        version = found.config.versions["transformers"]
        assert found.config.peers == {spec: f"transformers {version}" for spec in BOTH}
        assert load_run(tmp_path / "run").document == found.document

    def test_what_was_stopped_goes_on(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        options, add = make(mode="live", rescorers=("none",)), ExampleLog.add
        finished: list[tuple[str, str]] = []

        def dies(self: ExampleLog, made: ExampleRecord) -> None:
            if len(finished) == 4:  # between the peers of the second example
                raise SystemError("killed")
            finished.append((made.rescorer, made.id))
            add(self, made)

        with monkeypatch.context() as dying:
            dying.setattr(ExampleLog, "add", dies)
            with pytest.raises(SystemError):
                evaluated(options, peers=BOTH, out=tmp_path)
        assert finished == [("none", "q0"), ("transformers", "q0"), (LOOKUP, "q0"), ("none", "q1")]
        again = evaluated(options, peers=BOTH, out=tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
        assert [(line["rescorer"], line["id"]) for line in lines[:5]] == [*finished, ("transformers", "q1")]
        assert len(lines) == 18 and not any("oracle_accepted" in line for line in lines if line["rescorer"] != "none")
        whole = evaluated(options, peers=BOTH)
        assert without_times(again.results) == without_times(whole.results)

    def test_other_peers_do_not_go_on_in_a_folder(self, make: Make, tmp_path: Path):
        options = make(mode="live", rescorers=("none",), limit=1)
        evaluated(options, peers=("transformers",), out=tmp_path)
        difference = rf"\(peers.{LOOKUP}: None -> transformers "
        with pytest.raises(IncompatibleError, match=difference):
            evaluated(options, peers=BOTH, out=tmp_path)

    def test_one_of_another_package(self, make: Make, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(peers.PEERS.built_in, "slow", Slow)
        (found,) = evaluated(make(mode="live", rescorers=("none",), limit=2), peers=("slow",)).results[1:]
        assert (found.rescorer, found.block_efficiency) == ("slow", 1.0)

    def test_an_output_that_differs_is_told(self, make: Make, monkeypatch: pytest.MonkeyPatch):
        class Wrong(Slow):
            def load(self, base: BaseLM, shared: dict[object, Any]) -> Decoder:
                right = super().load(base, shared)

                def decoder(prompt_ids: Sequence[int], most: int) -> Decoded:
                    found = right(prompt_ids, most)
                    found.output_ids[-1] = (found.output_ids[-1] + 1) % 256
                    return found

                return decoder

        monkeypatch.setitem(peers.PEERS.built_in, "wrong", Wrong)
        (found,) = evaluated(make(mode="live", rescorers=("none",), limit=2), peers=("wrong",)).results[1:]
        assert found.identical == Identical(n=2, identical=0)
        assert found.divergence and {each.position for each in found.divergence} == {13}

    def test_refused(self, make: Make):
        for options, asked, message in (
            (make(), BOTH, "peers are timed beside live decoding; drop --peer, or add --mode live"),
            (make(mode="live"), ("transformers",) * 2, "transformers with p = 1 and k = 8 is there twice"),
            (make(mode="live"), ("nine",), "unknown peer 'nine'"),
        ):
            refused(lambda options=options, asked=asked: evaluated(options, peers=asked), message)
        with pytest.raises(UnknownNameError, match="unknown rescorer 'transformers'"):
            run(make(mode="live", rescorers=("transformers",)))

    def test_every_side_is_warm_before_it_is_measured(self, make: Make, monkeypatch: pytest.MonkeyPatch):
        """Also one that is missing in later examples only."""
        limits: dict[str, list[int]] = {}

        class Noted(Slow):
            def load(self, base: BaseLM, shared: dict[object, Any]) -> Decoder:
                def decoder(prompt_ids: Sequence[int], most: int) -> Decoded:
                    limits.setdefault("peer", []).append(most)
                    return Decoded(*vars(true_decode(base, None, prompt_ids, max_new_tokens=most)).values())

                return decoder

        true_decode = decode
        monkeypatch.setitem(peers.PEERS.built_in, "noted", Noted)

        def counted(base: Any, heads: Any, *args: Any, **more: Any) -> Any:
            limits.setdefault("run" if heads else "greedy", []).append(more["max_new_tokens"])
            return true_decode(base, heads, *args, **more)

        monkeypatch.setattr(evaluation, "decode", counted)
        evaluated(make(mode="live", rescorers=("none",), limit=2), peers=("noted",))
        assert limits == {"greedy": [4, 14, 14], "run": [8, 14, 14], "peer": [8, 14, 14]}

    def test_a_loaded_base_of_the_caller_s(self, tiny_folder: Path, squad_file: Path):
        model = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)
        base = load_base(model, byte_tokenizer())
        recording = record(base, make_heads(base), data=str(squad_file), limit=2, max_new_tokens=8)
        found = evaluate(recording, ["none"], live=True, peers=[load_peer("transformers")])
        assert found["transformers"].identical == Identical(n=2, identical=2)


class TestReaders:
    @pytest.fixture
    def folder(self, make: Make, tmp_path: Path) -> Path:
        evaluated(make(mode="live", **LONG), peers=BOTH, out=tmp_path / "run")
        return tmp_path / "run"

    def test_tables(self, folder: Path):
        overview, *details = load_run(folder).tables(details=True)
        assert "oracle" not in [column.heading for column in overview.columns], "the runs' oracle is in the caption"
        assert "squad: 6 examples of 6 groups, oracle " in overview.title
        row = next(line for line in overview.text().splitlines() if f" {LOOKUP} " in line)
        assert row.endswith("x") and row.count(" - ") == 3, "no share of a gap, won and lost"
        assert "ceiling: h, but 6 of transformers:lookup=5)" in overview.note and "30 of 30 outputs" in overview.note
        assert all(any(row[1] == LOOKUP for row in table.rows) for table in details if len(table.rows) == 5)
        assert any("of peers all but the base's calls" in table.note for table in details)

    def test_reports_and_studies(self, folder: Path, tmp_path: Path):
        written = report(folder, tmp_path / "page.html")
        page = written.markdown.read_text()
        assert f"| {LOOKUP} | 1 |" in page and "the best of 1" not in page and "only rescorer is peek" in page
        assert "another library" in written.html.read_text()
        lines = written.csv.read_text().splitlines()
        assert len(lines) == 6 and lines[-1].startswith(f"squad,live,{folder},{LOOKUP},1,")
        (analysed,) = analyse_folders(results=[folder]).runs
        assert [(a.rescorer, a.repetition, a.outcomes) for a in analysed.rescorers[3:]] == [
            (spec, None, None) for spec in BOTH
        ]
        rows = compare_folders(folder, selection=Selection(a_rescorer="transformers", b_rescorer=LOOKUP)).rows
        assert [(row.n, row.a.block_efficiency) for row in rows] == [(6, 1.0)] and rows[0].difference.gain > 0
        shown = inspect_example(folder, rescorers=[LOOKUP], steps="all")
        assert sum(draft.accepted for block in shown.blocks for draft in block.drafts) == shown.decodes[0].tokens


class TestSpeedupInterval:
    @given(st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=2), min_size=4))
    def test_it_is_that_of_a_gain_in_tokens_a_second(self, examples: list[list[tuple[int, int]]]):
        """Which block efficiency's is, with steps for seconds."""
        greedy, own = ([(tokens + steps, steps) for tokens, steps in side] for side in zip(*examples, strict=True))
        a, b = ([[tokens - steps + 1] + [1] * (steps - 1) for tokens, steps in side] for side in (greedy, own))
        low, high = paired_difference(a, b).gain_ci95 or (0, 0)
        assert speedup_interval(own, greedy) == pytest.approx((1 + low, 1 + high))

    def test_few_groups_have_none(self):
        assert speedup_interval([(1, 2.0)] * 3, [(1, 1.0)] * 3) is None
        assert speedup_interval([(1, 2.0)] * 8, [(1, 1.0)] * 8, groups=["a", "b"] * 4) is None


def test_on_the_command_line(rescore: Command, model: list[object]):
    asked = ["eval", *model, "--limit", 2, "--rescorer", "none", "--peer", ",".join(BOTH)]
    live = rescore(*asked, "--mode", "live", "--json")
    assert live.code == 0 and [r["rescorer"] for r in live.document["results"]] == ["none", *BOTH]
    assert "Warning" not in live.err and all(line.startswith("rescore: ") for line in live.err.splitlines())
    rescore(*asked).refused("peers are timed beside live decoding; drop --peer, or add --mode live")
    rescore(*asked[:-1], "transfomers", "--mode", "live").refused("unknown peer 'transfomers'; did you mean transf")
