"""What can be wrong with drafters: other packages' answers, files that are replaced, sizes beyond reason, Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from evaluating import Options, evaluated, opened
from test_drafting import fitted, index, small  # noqa: F401 (fixtures)

from lattices.errors import IncompatibleError, RescoreError
from lattices.joined.sources import MODEL
from lattices.lattice import Lattice
from rescore.drafters import DRAFTERS, LatticeDrafter, TextDrafter, load_drafter
from rescore.drafters.base import Continuations
from rescore.drafters.recorded import drafted
from rescore.rescorers import Target, load_rescorer
from rescore.runs.inputs import Inputs
from rescore.runs.recording import record_task
from rescore.runs.run import Run, runs_of
from rescore.runs.weights import target_of
from rescore.tracing import HEADER_FILE, read_trace

Change = Callable[[np.ndarray, np.ndarray], Any]


class Slots(LatticeDrafter):
    """Another package's drafter of lattices, whose answer a test changes."""

    kind, longest, identity = MODEL, 3, "slots"
    change: Change = staticmethod(lambda ids, logps: Lattice(ids, logps))

    def computed(self, contexts, firsts, k):
        ids = np.broadcast_to(np.array([7, 8], dtype=np.int32), (len(firsts), 3, 2)).copy()
        ids[:, 0, 0], ids[:, 0, 1] = firsts, (firsts + 1) % 200
        return self.change(ids, np.full(ids.shape, -0.5, dtype=np.float32))


class Text(TextDrafter):
    """Likewise, of text."""

    kind, longest, identity = MODEL, 4, "text"
    change: Change = staticmethod(lambda ids, logps: Continuations(ids, logps, 2))

    def continuations(self, contexts, firsts, count):
        ids = np.full((1, 3), 65, dtype=np.int32)
        return [self.change(ids, np.full(ids.shape, -0.5, dtype=np.float32)) for _ in contexts]


def fails(ids: np.ndarray, logps: np.ndarray) -> None:
    raise ValueError("no luck\nat all")


OF_SLOTS: dict[str, tuple[Change, str]] = {
    "fails": (fails, "failed (ValueError: no luck)"),
    "nan": (lambda ids, logps: Lattice(ids, logps * np.float32(np.nan)), "a log-prob is NaN"),
    "positive": (lambda ids, logps: Lattice(ids, -logps), "a log-prob is positive"),
    "no token": (lambda ids, logps: Lattice(ids + np.int32([[[0], [300], [0]]]), logps), "outside the vocabulary"),
    "fewer slots": (lambda ids, logps: Lattice(ids[:, :2], logps[:, :2]), "of shape"),
    "more entries": (lambda ids, logps: Lattice(ids.repeat(20, axis=2), logps.repeat(20, axis=2)), "of shape"),
    "one slot less, one entry more": (
        lambda ids, logps: Lattice(ids.reshape(-1, 2, 3), logps.reshape(-1, 2, 3)), "where [",
    ),
    "fewer positions": (lambda ids, logps: Lattice(ids[:0], logps[:0]), "of shape"),
    "another first token": (lambda ids, logps: Lattice(ids[:, ::-1], logps), "does not begin with the base"),
    "floats": (lambda ids, logps: Lattice(ids.astype(np.float64), logps), "make them int32"),
}  # fmt: skip
OF_TEXT: dict[str, tuple[Change, str]] = {
    "fails": (fails, "failed (ValueError: no luck)"),
    "nothing": (lambda ids, logps: None, "gave NoneType where Continuations are due"),
    "nan": (lambda ids, logps: Continuations(ids, logps * np.float32(np.nan), 2), "NaN, positive or infinite"),
    "positive": (lambda ids, logps: Continuations(ids, -logps, 2), "NaN, positive or infinite"),
    "no token": (lambda ids, logps: Continuations(ids + 300, logps, 2), "outside the base's vocabulary"),
    "below zero": (lambda ids, logps: Continuations(ids - 70, logps, 2), "outside the base's vocabulary"),
    "many": (lambda ids, logps: Continuations(ids.repeat(99, 0), logps.repeat(99, 0), 2), "where at most [4, 3]"),
    "long": (lambda ids, logps: Continuations(ids.repeat(3, 1), logps.repeat(3, 1), 2), "where at most ["),
    "other shapes": (lambda ids, logps: Continuations(ids, logps[:, :1], 2), "log-probabilities [1, 1]"),
}
OF_TEXT["a hole"] = (
    lambda ids, logps: Continuations(np.array([[65, -1, 65]], dtype=np.int32), logps, 2), "tokens after its end",
)  # fmt: skip
WRONG: dict[type, dict[str, tuple[Change, str]]] = {Slots: OF_SLOTS, Text: OF_TEXT}


class TestOtherPackages:
    @pytest.mark.parametrize("mode", ["replay", "live"])
    @pytest.mark.parametrize(
        ("kind", "change", "message"),
        [
            pytest.param(kind, *row, id=f"{kind.__name__}, {name}")
            for kind in WRONG
            for name, row in WRONG[kind].items()
        ],
    )
    def test_answers(
        self, options: Options, monkeypatch: pytest.MonkeyPatch, kind: type, change: Change, message: str, mode: str
    ):
        made = type("Made", (kind,), {"change": staticmethod(change), "__module__": __name__})
        monkeypatch.setitem(DRAFTERS.built_in, "made", made)
        chosen = options | {"limit": 2, "rescorers": ["made"], "mode": mode}
        refused(lambda: evaluated(chosen), "the drafter made ", message, "mend its package (test_drafter_trouble)")
        monkeypatch.setitem(DRAFTERS.built_in, "made", kind)
        assert len(evaluated(chosen).examples) == 2, "nothing of the broken one was kept"

    @pytest.mark.parametrize(
        ("values", "message"),
        [({"kind": 3}, "has no kind"), ({"longest": 0}, "has longest = 0"), ({"identity": ""}, "set its `identity`")],
    )
    def test_what_a_drafter_must_have(
        self, options: Options, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
    ):  # fmt: skip
        monkeypatch.setitem(DRAFTERS.built_in, "made", type("Made", (Slots,), values))
        refused(lambda: evaluated(options | {"limit": 2, "rescorers": ["made"]}), message)

    def test_an_object_without_a_name(self, options: Options):
        run = Run("none", k=8, drafters=(Slots(), "heads"))
        assert run.label == "none:drafters=Slots+heads"
        (record, _) = evaluated(options | {"limit": 2, "rescorers": [run]}).examples
        assert record.alone_accepted is not None and list(record.alone_accepted) == ["Slots", "heads"]

    def test_entries_that_vary(self, options: Options, monkeypatch: pytest.MonkeyPatch):
        def change(ids: np.ndarray, logps: np.ndarray) -> Lattice:
            width = 1 if len(seen) < 3 else 2
            return Lattice(ids[:, :, :width], logps[:, :, :width])

        class Varies(Slots):
            def record(self, prompt_ids, output_ids, k):
                seen.append(None)
                return super().record(prompt_ids, output_ids, k)

        seen: list[None] = []
        Varies.change = staticmethod(change)
        monkeypatch.setitem(DRAFTERS.built_in, "made", Varies)
        refused(lambda: evaluated(options | {"rescorers": ["made"]}), "gave 2 entries a slot", "1 before")


class TestReplaced:
    def test_a_corpus_index(self, index: str, tiny_base):  # noqa: F811
        drafter = load_drafter(f"corpus-lookup:{index}")
        target = Target.of(tiny_base.identity, tiny_base.vocab_size)
        assert drafter.fit(target).identity == drafter.identity
        record = json.loads((Path(index) / "lookup.json").read_text())
        from lm.lookup_index import LookupOptions, build_lookup

        other = Path(index).parent / "other.txt"
        other.write_text("what was not there before\n")
        build_lookup([other], Path(index), LookupOptions(tokenizer=record["tokenizer"]))
        assert drafter.fit(target).identity != drafter.identity, "so that the run is refused, or begins anew"

    def test_a_trace(self, options: Options, small: str, tmp_path: Path):  # noqa: F811
        inputs = Inputs(task="squad", **{name: value for name, value in options.items() if name != "k"})
        for tokens in (3, 3):
            record_task(inputs, f"draft-model:{small},tokens={tokens}", tmp_path / "drafts", k=8)
        spec = f"trace:{tmp_path / 'drafts'}"
        out = tmp_path / "out"
        evaluated(options | {"rescorers": [spec]}, out=out)
        before = load_drafter(spec)
        # Another draft model's lattices under the very same header.
        record_task(inputs, f"draft-model:{options['base']},tokens=3", tmp_path / "others", k=8)
        shutil.copy(tmp_path / "drafts" / HEADER_FILE, tmp_path / "others" / HEADER_FILE)
        shutil.rmtree(tmp_path / "drafts")
        shutil.move(tmp_path / "others", tmp_path / "drafts")
        assert load_drafter(spec).identity != before.identity
        refused(lambda: evaluated(options | {"rescorers": [spec]}, out=out), "squad", IncompatibleError)
        (recording,) = opened(options)
        refused(lambda: drafted(recording.trace(), [before], task="squad", settings={}), "was replaced meanwhile")

    def test_the_outputs_beneath_what_was_drafted(self, options: Options, small: str, tmp_path: Path):  # noqa: F811
        (recording,) = opened(options)
        trace = recording.trace()
        drafter = load_drafter(f"draft-model:{small},tokens=2").fit(target_of(trace))
        how: dict[str, Any] = {"task": "squad", "settings": recording.all_settings}
        before = drafted(trace, [drafter], **how)[drafter.name]
        cut = [
            dataclasses.replace(
                e, output_ids=e.output_ids[:-1], lattice=e.lattice[:-1], entropies=e.entropies[:-1],
                margins=e.margins[:-1],
            )
            for e in trace.examples
        ]  # fmt: skip
        other = dataclasses.replace(trace, examples=tuple(cut))
        now = drafted(other, [drafter], **how)[drafter.name]
        assert all(len(now[e.id]) == len(e.output_ids) == len(before[e.id]) - 1 for e in cut)


class TestOneFolder:
    def test_a_drafter_s_trace_is_not_the_heads(self, options: Options, small: str, tmp_path: Path):  # noqa: F811
        inputs = Inputs(task="squad", **{name: value for name, value in options.items() if name != "k"})
        record_task(inputs, f"draft-model:{small},tokens=3", tmp_path / "drafts", k=8)  # h = 4, as the heads have
        refused(
            lambda: record_task(inputs, "heads", tmp_path / "drafts", k=8), "with other settings (drafter",
            "-> heads", IncompatibleError,
        )  # fmt: skip
        record_task(inputs, "heads", tmp_path / "heads", k=8)
        refused(lambda: record_task(inputs, f"draft-model:{small},tokens=3", tmp_path / "heads", k=8), "heads -> draft")

    def test_what_was_drafted_before_ctrl_c_is_kept(self, options: Options, small: str, tmp_path: Path):  # noqa: F811
        inputs = Inputs(task="squad", **{name: value for name, value in options.items() if name != "k"})
        spec, done = f"draft-model:{small},tokens=2", []

        def interrupt(stage: str, finished: int, total: int) -> None:
            if stage.startswith("draft"):
                done.append(finished)
                if finished == 4:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            record_task(inputs, spec, tmp_path / "drafts", k=8, progress=interrupt)
        assert len(read_trace(tmp_path / "drafts").examples) == 4
        trace = record_task(inputs, spec, tmp_path / "drafts", k=8, progress=interrupt)
        assert done == [1, 2, 3, 4, 5, 6]
        whole = record_task(inputs, spec, tmp_path / "whole", k=8)
        for one, other in zip(trace.examples, whole.examples, strict=True):
            assert one.id == other.id
            np.testing.assert_array_equal(one.lattice.token_ids, other.lattice.token_ids)
            np.testing.assert_array_equal(one.lattice.logps, other.lattice.logps)


class TestSizes:
    @pytest.mark.parametrize("values", ["tokens=1025", "tokens=1000000000", f"most={10**20}", "least=2000,most=3000"])
    def test_of_text(self, index: str, values: str):  # noqa: F811
        refused(lambda: load_drafter(f"lookup:{values}"), "lookup: give tokens of 1 to 1,024")
        refused(lambda: load_drafter(f"corpus-lookup:{index},{values}"), "corpus-lookup: give tokens of 1 to 1,024")

    def test_of_trees(self, options: Options, tmp_path: Path):
        joint = fitted(options, tmp_path, ["heads", "lookup"])
        refused(lambda: runs_of([joint], nodes=0), "--nodes 0; a tree has")
        for values in ("tokens=1000000000", "nodes=1000000000", "nodes=-1", "nodes=99999999999999999999"):
            refused(lambda values=values: load_rescorer(f"{joint},{values}"), "joint: give tokens of 1 to 1,024")

    def test_more_entries_than_a_drafter_s_trace_holds(self, options: Options, small: str, tmp_path: Path):  # noqa: F811
        inputs = Inputs(task="squad", **{name: value for name, value in options.items() if name != "k"})
        record_task(inputs, f"draft-model:{small},tokens=3", tmp_path / "drafts", k=4)
        spec = f"trace:{tmp_path / 'drafts'}"
        for run in (Run("none", k=8, drafters=("heads", spec)), Run(spec, k=5)):
            refused(lambda run=run: evaluated(options | {"rescorers": [run]}), "holds the top 4 of each slot; choose")
        assert evaluated(options | {"rescorers": [Run(spec, k=4)]}).results


def test_a_path_with_a_plus_in_a_spec(options: Options, index: str, tmp_path: Path):  # noqa: F811
    place = tmp_path / "c++" / "a+lookups"
    shutil.copytree(index, place)
    spec = f"corpus-lookup:{place}"
    run = Run(f"none:drafters=heads+{spec}+lookup", k=8)
    assert run.drafters == ("heads", spec, "lookup")
    assert evaluated(options | {"limit": 2, "rescorers": [run]}).results
    for spec in ("none:drafters=heads+lookup:tokens=3,least=2", "joint:drafters=heads+draft-model:x,tokens=3"):
        refused(lambda spec=spec: Run(spec), "after a comma would be a setting of", "give the drafters by --drafter")
    assert Run("joint:tokens=3,drafters=heads+draft-model:x,nodes=5").drafters == ("heads", "draft-model:x")
    with pytest.raises(RescoreError, match="unknown drafter"):
        evaluated(options | {"rescorers": ["none:drafters=heads+lookp"]})


def test_the_command_that_tunes_names_the_drafters(options: Options):
    run = Run("context-ngram:none", k=8, alpha="tuned", drafters=("heads", "lookup"))
    refused(lambda: evaluated(options | {"rescorers": [run]}), "--drafter heads,lookup --k 8")
