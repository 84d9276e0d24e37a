"""`lookup` and `joint`: drafts from the text so far, alone and joined with the heads'; weights fitted on traces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command, refused
from evaluating import Options, evaluated, opened, recorded_trace
from test_ngram_rescorer import bigram_model, save

import lm.base.catalog
from lattices.automaton import Automaton
from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lattices.joined.candidates import WEIGHTS
from rescore.drafters import load_drafter
from rescore.drafters.drafting import Drafting
from rescore.rescorers import Rescorer, load_rescorer
from rescore.rescorers import joint as joint_module
from rescore.rescorers.base import Context
from rescore.runs import work
from rescore.runs.records import Identical
from rescore.runs.run import Run
from rescore.runs.tuning import fit_joint
from rescore.suites.plan import read_plan
from rescore.suites.run import run_suite

TEXT = [5, 6, 7, 8, 5, 6, 9, 9, 5, 6]


def drafts_of(spec: str, p: int, first: int = 5, context: Context | None = None) -> list[list[int]]:
    run = Run(spec)
    drafting = Drafting(run.load(), run.load_drafters(run.load()), 1, p)
    at = [context or Context(TEXT)]
    drafts = drafting.choose(drafting.propose(at, np.array([first])), at)
    return [[token for token in draft if token >= 0] for draft in drafts[0].tolist()]


class TestLookup:
    def test_the_longest_match_first_then_the_most_recent(self):
        context = Context(TEXT[:-1])  # ... 9 5, and the base has chosen 6
        assert drafts_of("lookup:tokens=3", 1, 6, context) == [[6, 9, 9, 5]]
        assert drafts_of("lookup:tokens=3", 4, 6, Context(TEXT[:-1])) == [[6, 9, 9, 5], [6, 7, 8, 5]]
        assert drafts_of("lookup:tokens=3,most=1", 1, 6, Context(TEXT[:-1])) == [[6, 9, 9, 5]]
        assert drafts_of("lookup:tokens=3,first=true", 1, 6, Context(TEXT[:-1])) == [[6, 7, 8, 5]]

    def test_without_a_match_the_known_token_alone(self):
        assert drafts_of("lookup", 4, first=11) == [[11]]
        assert drafts_of("lookup:least=3", 1, first=8) == [[8]]

    def test_the_output_is_looked_up_too_and_grows(self):
        context = Context([1, 2], output_ids=[3, 4, 3])
        assert drafts_of("lookup:tokens=2", 1, 4, context) == [[4, 3]]
        context.output_ids.extend([4, 7])
        assert drafts_of("lookup:tokens=2", 1, 4, context) == [[4, 7]]
        assert drafts_of("lookup:tokens=2", 1, 3, context) == [[3, 4, 7]]

    @pytest.mark.parametrize("spec", ["lookup:tokens=0", "lookup:least=0", "lookup:least=3,most=2"])
    def test_sizes_that_make_no_sense(self, spec: str):
        refused(lambda: load_drafter(spec), "lookup: give tokens of 1 to 1,024")


class Ragged(Rescorer):
    """Drafts of one to seven tokens, right to their end or but for their last token; beyond what the heads reach."""

    longest = 7

    def draft(self, lattices, contexts, p):
        drafts = np.full((len(contexts), p, self.longest), -1, dtype=np.int32)
        for rows, context, first in zip(drafts, contexts, lattices.token_ids[:, 0, 0], strict=True):
            done = len(context.output_ids)
            for row in range(p):
                ahead = context.future[done : done + 1 + (2 * done + row) % self.longest]
                rows[row, : len(ahead)] = ahead
                if len(ahead) > 1 and (done + row) % 3 == 0:
                    rows[row, len(ahead) - 1] = (ahead[-1] + 1) % 256
                rows[row, 0] = first
        return drafts


@pytest.fixture
def joint(options: Options, tmp_path: Path) -> str:
    """The spec of weights that were fitted on some of the examples."""
    ngram = save(tmp_path / "ngram", bigram_model())
    fit_joint(opened(options), tmp_path / "weights", f"joint:ngram={ngram}", k=8, held_out=2)
    return f"joint:{tmp_path / 'weights'},ngram={ngram}"


@pytest.mark.parametrize(("p", "verify"), [(1, "tree"), (4, "tree"), (4, "batch")])
def test_replay_equals_live_and_the_output_is_exact(options: Options, joint: str, p: int, verify: str):
    chosen = options | {"rescorers": ("none", "lookup", "lookup:tokens=3", joint, Ragged()), "p": p}
    replayed = evaluated(chosen).results
    live = evaluated(chosen | {"mode": "live", "verify": verify}).results
    assert [r.identical for r in live] == [Identical(n=6, identical=6)] * 5
    assert [r.accepted_histogram for r in live] == [r.accepted_histogram for r in replayed]
    assert [len(r.marginal) for r in replayed] == [4, 17, 4, 16, 7] and {r.h for r in replayed} == {4}
    assert replayed[-1].block_efficiency > 2, "drafts of different lengths, longer than the heads' blocks"
    assert replayed[-1].accepted_histogram[6] > 0


def test_what_is_fitted_is_said_and_read_back(options: Options, tmp_path: Path):
    ngram = save(tmp_path / "ngram", bigram_model())
    fit = fit_joint(opened(options), tmp_path / "weights", f"joint:ngram={ngram}", k=8, held_out=3)
    again = fit_joint(opened(options), tmp_path / "again", f"joint:ngram={ngram}", k=8, held_out=3)
    assert fit == again and (fit.examples, fit.groups) == (3, 3) and len(fit.weights) == WEIGHTS
    assert fit.log_loss is not None and fit.log_loss > 0 and sum(fit.counts) > fit.prefixes
    written = json.loads((tmp_path / "weights" / "heads+lookup.json").read_text())
    assert written["weights"] == fit.weights and written["log_loss"] == fit.log_loss
    one, other = (load_rescorer(f"joint:{tmp_path / name},ngram={ngram}") for name in ("weights", "again"))
    assert one.identity == other.identity


def fit_other_weights(options: Options, joint: str, tmp_path: Path, *, other_ngram: bool = False) -> None:
    """Writes over the weights of the fixture, and over its n-gram model."""
    ngram = joint.partition("ngram=")[2]
    if other_ngram:
        Automaton.compile(bigram_model(seed=1)).save(Path(ngram) / "automaton.bin")
    before = (tmp_path / "weights" / "heads+lookup.json").read_text()
    fit_joint(opened(options), tmp_path / "weights", f"joint:ngram={ngram}", k=8, held_out=2 if other_ngram else 3)
    assert (tmp_path / "weights" / "heads+lookup.json").read_text() != before


class TestReplaced:
    """Results are of the weights and the n-gram model that were there when they were begun."""

    @pytest.mark.parametrize("other_ngram", [False, True])
    def test_a_folder_is_not_gone_on_with(self, options: Options, joint: str, tmp_path: Path, other_ngram: bool):
        chosen = options | {"rescorers": ("none", "lookup", joint)}
        found = evaluated(chosen, out=tmp_path / "run").config.runs["squad"]
        assert [run.identity for run in found[:2]] == ["", ""] and found[1].drafters == ["lookup 16 1 32 False"]
        assert found[2].identity.startswith(load_rescorer(joint).identity) and found[2].drafters[0] == "heads"
        evaluated(chosen, out=tmp_path / "run")
        fit_other_weights(options, joint, tmp_path, other_ngram=other_ngram)
        refused(
            lambda: evaluated(chosen, out=tmp_path / "run"),
            "holds results of another configuration (weights.squad.joint:", ".identity: joint ngram", IncompatibleError,
        )  # fmt: skip

    def test_nor_where_the_weights_are_the_shipped_ones(
        self, options: Options, joint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(joint_module, "shipped_weights", lambda *_: tmp_path / "weights")
        shipped = f"joint:ngram={joint.partition('ngram=')[2]}"
        chosen = options | {"rescorers": (shipped,)}
        (found,) = evaluated(chosen, out=tmp_path / "run").config.runs["squad"]
        assert found.identity.startswith(load_rescorer(shipped).identity)
        fit_other_weights(options, joint, tmp_path)
        message = f"weights.squad.{shipped} (p = 1, k = 8).identity: {found.identity} -> "
        refused(lambda: evaluated(chosen, out=tmp_path / "run"), message, IncompatibleError)

    def test_nor_a_given_trace(self, options: Options, joint: str, tmp_path: Path):
        recorded_trace(options, tmp_path / "trace")
        chosen = dict(trace=str(tmp_path / "trace"), k=8, rescorers=(joint,))
        evaluated(chosen, out=tmp_path / "run")
        fit_other_weights(options, joint, tmp_path)
        refused(lambda: evaluated(chosen, out=tmp_path / "run"), "weights.squad.joint:", IncompatibleError)

    @pytest.mark.parametrize("other_ngram", [False, True])
    def test_nor_a_suite(self, options: Options, joint: str, tmp_path: Path, other_ngram: bool):
        body = "".join(f"{name}: {options[name]}\n" for name in ("base", "heads", "device", "dtype", "k"))
        body += f"max_new_tokens: 8\ntasks: [{{name: squad, data: {options['data']}}}]\n"
        (tmp_path / "table.yaml").write_text(f"{body}rescorers: [none, '{joint}']\n")
        plan = read_plan(tmp_path / "table.yaml")
        first = run_suite(plan, tmp_path / "out")
        assert run_suite(plan, tmp_path / "out").document.results == first.document.results
        fit_other_weights(options, joint, tmp_path, other_ngram=other_ngram)
        refused(lambda: run_suite(plan, tmp_path / "out"), "weights.squad.joint:", "identity", IncompatibleError)

    def test_between_two_looks_at_them(
        self, options: Options, joint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(joint_module, "shipped_weights", lambda *_: tmp_path / "weights")
        evaluated(options)  # the trace is there: only the rescorer is read again
        fitted_to = work.fitted_to

        def replaced(*arguments: Any, **more: Any) -> Any:
            fit_other_weights(options, joint, tmp_path)
            return fitted_to(*arguments, **more)

        monkeypatch.setattr(work, "fitted_to", replaced)
        chosen = options | {"rescorers": (f"joint:ngram={joint.partition('ngram=')[2]}",)}
        refused(lambda: evaluated(chosen, out=tmp_path / "run"), "was replaced while it was read", IncompatibleError)
        assert (tmp_path / "run" / "examples.jsonl").read_text() == ""


def never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.base.catalog, "load_base", lambda *_, **__: pytest.fail("the base LM was loaded"))


class TestTrouble:
    def test_an_n_gram_of_another_tokenizer_before_anything_is_decoded(
        self, options: Options, joint: str, tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
    ):
        (tmp_path / "ngram" / "manifest.json").write_text('{"tokenizer_sha256": "other"}')
        shutil.rmtree(cache_folder)
        never_decoded(monkeypatch)
        chosen, spec = options | {"rescorers": (joint,)}, f"joint:ngram={tmp_path / 'ngram'}"
        refused(lambda: evaluated(chosen), "was made for another tokenizer", IncompatibleError)
        message = "was made for another tokenizer"
        refused(lambda: fit_joint(opened(options), tmp_path / "w", spec, k=8, held_out=2), message, IncompatibleError)

    def test_weights_that_are_broken_or_of_something_else(self, joint: str, tmp_path: Path):
        path = tmp_path / "weights" / "heads+lookup.json"
        whole: dict[str, Any] = json.loads(path.read_text())
        for change, message, kind in (
            ({"schema": "rescore.joint/0"}, "fit some: rescore tune", InvalidDataError),
            ({"weights": ["a"] * WEIGHTS}, "`weights[0]`", InvalidDataError),
            ({"weights": [1.0]}, "at `weights`; fit some", InvalidDataError),
            ({"ngram": "0"}, "was fitted with another n-gram model", IncompatibleError),
        ):
            path.write_text(json.dumps(whole | change))
            refused(lambda: load_rescorer(joint), message, kind)
        path.unlink()
        refused(lambda: load_rescorer(joint), "no weights of joint in", RescoreError)

    def test_none_are_shipped_for_a_base_of_ones_own(
        self, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        ngram = save(tmp_path / "ngram", bigram_model())
        chosen = options | {"rescorers": (f"joint:ngram={ngram}",)}
        never_decoded(monkeypatch)
        refused(
            lambda: evaluated(chosen),
            "no weights of joint are shipped for",
            f"--rescorer joint:ngram={ngram} --out DIR",
        )


def test_weights_that_are_written_are_told_as_json(rescore: Command, model: list[object], tmp_path: Path):
    ngram, out = save(tmp_path / "ngram", bigram_model()), tmp_path / "weights"
    asked = ["--rescorer", f"joint:ngram={ngram}", "--drafter", "lookup", "--held-out", 2, "--k", 8]
    ran = rescore("tune", *model, *asked, "--out", out, "--json")
    assert ran.code == 0, ran.err
    (kept,) = (json.loads(path.read_text()) for path in out.glob("*.json"))
    assert ran.document["drafters"] == kept["drafters"] == ["lookup"] and ran.document["weights"] == kept["weights"]
