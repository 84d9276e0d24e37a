"""`rescore import-trace`: what others stored becomes the trace that we would have recorded, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, refused, save_tiny_base, write_lines
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm.base.catalog import load_base
from lm.base.model import BaseLM
from rescore import evaluate, import_trace, load_trace, record
from rescore.imports.llama_cpp import of_dump
from rescore.imports.states import final_norm
from rescore.replaying import replay
from rescore.rescorers import load_rescorer
from rescore.runs.run import runs_of
from rescore.tracing import Trace, TracedExample

Write = Callable[..., Path]
KINDS = ("speculators", "model-optimizer", "specforge")


@pytest.fixture
def recorded(tiny_base: BaseLM, tiny_heads_folder: Path, squad_file: Path) -> Trace:
    """What we record ourselves: greedy outputs of six prompts."""
    return record(tiny_base, str(tiny_heads_folder), data=str(squad_file), max_new_tokens=12, k=8).trace()


def dump(base: BaseLM, example: TracedExample, folder: Path, kind: str, *, dtype: torch.dtype = torch.float64) -> Path:
    """One example as a training tool stores it."""
    ids = torch.tensor([*example.prompt_ids.tolist(), *example.output_ids.tolist()])
    before: list[torch.Tensor] = []
    hook = final_norm(base).register_forward_pre_hook(lambda _, args: before.append(args[0]))
    _, states = base.forward(ids[None])
    hook.remove()
    mask = torch.zeros(len(ids), dtype=torch.long)
    mask[len(example.prompt_ids) :] = 1
    states, early = states[0].to(dtype), before[-1][0].to(dtype)
    folder.mkdir(exist_ok=True, parents=True)
    if kind == "speculators":
        path = folder / f"hs_{example.id[1:]}.safetensors"
        layers = torch.stack([torch.full_like(early, 9.0), early], dim=1).contiguous()
        save_file({"token_ids": ids, "hidden_states": layers, "loss_mask": mask}, path)
    elif kind == "model-optimizer":
        path = folder / f"{example.id}.pt"
        aux = torch.zeros(len(ids), 2)
        torch.save({"input_ids": ids, "hidden_states": states, "aux_hidden_states": aux, "loss_mask": mask,
                    "conversation_id": example.id}, path)  # fmt: skip
    else:
        path = folder / f"data_{example.id[1:]}.ckpt"
        torch.save({"input_ids": ids, "loss_mask": mask, "hidden_state": states[None]}, path)
    return path


@pytest.fixture
def imports(tiny_folder: Path, tiny_heads_folder: Path, tmp_path: Path) -> Callable[..., Trace]:
    """Imports with the tiny base and heads."""

    def call(path: Path, kind: str, name: str = "out", **more: Any) -> Trace:
        how = {"base": str(tiny_folder), "heads": str(tiny_heads_folder), "dtype": "float64", "device": "cpu", "k": 8}
        return import_trace(path, kind, tmp_path / name, **{**how, **more})  # type: ignore[arg-type]

    return call


class TestStates:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_trace_is_the_recorded_one(
        self, kind: str, tiny_base: BaseLM, recorded: Trace, imports: Callable[..., Trace], tmp_path: Path
    ):
        for example in recorded.examples:
            dump(tiny_base, example, tmp_path / "dump", kind)
        found = imports(tmp_path / "dump", kind)
        assert (found.header.h, found.header.k, found.header.vocab_size) == (4, 8, tiny_base.vocab_size)
        assert found.header.settings["imported"]["agreement"] == 1
        assert len(found.examples) == len(recorded.examples) == 6
        for own, other in zip(recorded.examples, found.examples, strict=True):
            assert np.array_equal(own.prompt_ids, other.prompt_ids) and np.array_equal(own.output_ids, other.output_ids)
            assert np.array_equal(own.lattice.top(8).token_ids, other.lattice.token_ids) and own.output == other.output
            np.testing.assert_allclose(own.lattice.top(8).logps, other.lattice.logps, atol=1e-5)
            np.testing.assert_allclose(own.entropies, other.entropies, atol=1e-5)
            np.testing.assert_allclose(own.margins, other.margins, atol=1e-5)
        # What it says of its base is the whole base's identity: results of both compare.
        assert found.header.settings["base"] == recorded.header.settings["base"]
        run = evaluate(load_trace(tmp_path / "out"), runs_of(["none", "lookup"], ks=[8]))
        assert run["none"].n == 6 and run["none"].groups == 6

    def test_turns_of_a_conversation(
        self, tiny_base: BaseLM, recorded: Trace, imports: Callable[..., Trace], tmp_path: Path
    ):
        example = recorded.examples[0]
        path = dump(tiny_base, example, tmp_path / "dump", "specforge")
        stored = torch.load(path, weights_only=True)
        start = len(example.prompt_ids)
        stored["loss_mask"][start + 4] = 0
        torch.save(stored, path)
        first, second = imports(path, "specforge").examples
        assert (first.id, second.id) == ("data_0:1", "data_0:2") and first.group == second.group
        assert first.output_ids.tolist() == example.output_ids[:4].tolist()
        assert second.prompt_ids.tolist() == [*example.prompt_ids.tolist(), *example.output_ids[:5].tolist()]
        assert second.output_ids.tolist() == example.output_ids[5:].tolist()
        whole = imports(path, "specforge", "whole", prompt_tokens=start)
        assert whole.examples[0].output_ids.tolist() == example.output_ids.tolist()
        assert len(imports(path, "specforge", "one", limit=1).examples) == 1
        path.with_stem("data_1").write_bytes(b"not read")
        assert len(imports(path.parent, "specforge", "two", limit=2).examples) == 2

    def test_outputs_that_are_not_greedy(
        self, tiny_base: BaseLM, recorded: Trace, imports: Callable[..., Trace], tmp_path: Path
    ):
        path = dump(tiny_base, recorded.examples[0], tmp_path / "dump", "model-optimizer")
        refused(
            lambda: imports(path, "model-optimizer", prompt_tokens=3), "% of its ", "99% are needed", IncompatibleError
        )
        stored = torch.load(path, weights_only=True)
        stored["input_ids"][-1] = (stored["input_ids"][-1] + 1) % 256
        torch.save(stored, path)
        share = f"{11 / 12:.1%} of its 12 output tokens"
        refused(lambda: imports(path, "model-optimizer"), share, IncompatibleError)
        assert not (tmp_path / "out").exists()

    def test_a_near_tie_of_the_stored_precision_counts(
        self, tiny_base: BaseLM, recorded: Trace, imports: Callable[..., Trace], tmp_path: Path
    ):
        example = recorded.examples[0]
        path = dump(tiny_base, example, tmp_path / "dump", "model-optimizer", dtype=torch.bfloat16)
        stored = torch.load(path, weights_only=True)
        # Between the states of two tokens there is one where both have the same logit.
        weight = tiny_base.output_embeddings.weight
        row, last = stored["hidden_states"][-2].double(), int(example.output_ids[-1])
        logits = weight @ row
        logits[last] = -torch.inf
        second = int(logits.argmax())
        apart = weight[second] - weight[last]
        tie = row - apart * (apart @ row - 0.1) / (apart @ apart)  # the other one leads by 0.1
        stored["hidden_states"] = stored["hidden_states"].double()
        stored["hidden_states"][-2] = tie
        torch.save(stored, path)
        refused(lambda: imports(path, "model-optimizer"), f"{11 / 12:.1%}", IncompatibleError)
        torch.save({**stored, "hidden_states": stored["hidden_states"].to(torch.bfloat16)}, path)
        found = imports(path, "model-optimizer")
        assert found.examples[0].output_ids.tolist() == example.output_ids.tolist()
        assert found.header.settings["imported"]["states"] == ["bfloat16"]

    def test_files_that_do_not_fit(
        self, tiny_base: BaseLM, recorded: Trace, imports: Callable[..., Trace], tmp_path: Path
    ):
        path = dump(tiny_base, recorded.examples[0], tmp_path / "dump", "model-optimizer")
        right = torch.load(path, weights_only=True)

        def with_(expected: str, kind: type[RescoreError] = InvalidDataError, **changes: Any) -> None:
            torch.save({name: v for name, v in {**right, **changes}.items() if v is not None}, path)
            refused(lambda: imports(path, "model-optimizer"), expected, kind)

        with_("no tensor 'hidden_states'", hidden_states=None)
        with_("has no tensor 'input_ids'", input_ids=[1, 2])
        with_("'input_ids' is torch.float64", input_ids=right["hidden_states"])
        with_("tokens and states of shape", hidden_states=right["hidden_states"][:-1])
        with_("states of 16 numbers", IncompatibleError, hidden_states=right["hidden_states"][:, :16])
        with_("token ids outside the 257", IncompatibleError, input_ids=right["input_ids"] + 257)
        with_("NaN or infinity", hidden_states=right["hidden_states"] * torch.nan)
        with_("does not fit", loss_mask=right["loss_mask"][:-1])
        with_("give --prompt-tokens", RescoreError, loss_mask=None)
        with_("no output to make a trace of", loss_mask=right["loss_mask"] * 0)
        torch.save([1, 2], path)
        refused(lambda: imports(path, "model-optimizer"), "no tensors by name", InvalidDataError)
        torch.save(right, path)
        for content in (path.read_bytes()[:-200], b"", b"\x80\x02}q\x00.", bytes(range(256))):
            path.write_bytes(content)
            refused(lambda: imports(path, "model-optimizer"), str(path), "; ", InvalidDataError)

    def test_a_pickle_with_code_is_not_run(self, imports: Callable[..., Trace], tmp_path: Path):
        class Runs:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "ran",))

        torch.save({"input_ids": Runs()}, tmp_path / "a.pt")
        refused(
            lambda: imports(tmp_path / "a.pt", "model-optimizer"),
            "may be code and is not read; give plain tensors",
            InvalidDataError,
        )
        assert not (tmp_path / "ran").exists()

    def test_another_base(self, tiny_base: BaseLM, recorded: Trace, imports: Callable[..., Trace], tmp_path: Path):
        path = dump(tiny_base, recorded.examples[0], tmp_path / "dump", "speculators")
        other = save_tiny_base(tmp_path / "other", seed=1)
        refused(lambda: imports(path, "speculators", base=str(other)), "of its 12 output tokens", IncompatibleError)
        refused(lambda: imports(path, "specforge"), "is --from right?", InvalidDataError)
        broken = tmp_path / "dump" / "hs_1.safetensors"
        broken.write_bytes(path.read_bytes()[:-9])
        refused(lambda: imports(broken, "speculators"), "as safetensors", InvalidDataError)


def test_the_final_norm_is_what_makes_states(tiny_base: BaseLM):
    ids = torch.tensor([[1, 2, 3]])
    seen: list[torch.Tensor] = []
    hook = final_norm(tiny_base).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _, states = tiny_base.forward(ids)
    hook.remove()
    torch.testing.assert_close(final_norm(tiny_base)(seen[0]), states)


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[list[int]]]:
    """A server's dump of up to four outputs in two slots, the outputs, and each output's accepted lengths."""
    steps: list[dict[str, Any]] = []
    outputs, accepted = [], []
    for _ in range(draw(st.integers(1, 4))):
        output = draw(st.lists(st.integers(0, 9), min_size=1, max_size=9))
        seq, at, lengths = draw(st.integers(0, 1)), 0, []
        while at < len(output) - 1:
            ahead = output[at + 1 :]
            n = draw(st.integers(0, 4))
            drafted = draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
            right = 0
            while right < min(n, len(ahead)) and drafted[right] == ahead[right]:
                right += 1
            top = draw(st.permutations(range(10)))[:3]
            steps.append({
                "step": len(steps), "seq": seq, "n_draft": n, "n_accepted": right, "pmin_drop": 0, "pos": [
                    {"i": i, "tok": tok, "p": 0.6, "logp": -0.5, "acc": i < right,
                     "top": [{"tok": tok, "p": 0.6}, *({"tok": t, "p": 0.1} for t in top if t != tok)]}
                    for i, tok in enumerate(drafted)
                ],
            })  # fmt: skip
            lengths.append(right + 1)
            at += right + 1
        if at == len(output) - 1:
            lengths.append(1)  # the last token is the target's own, for which no step is left
        outputs.append({"seq": seq, "output_ids": output})
        accepted.append(lengths)
    return steps, outputs, accepted


class TestLlamaCpp:
    @given(log=logs())
    def test_none_replays_the_steps(self, log: Any, tmp_path_factory: pytest.TempPathFactory):
        steps, outputs, accepted = log
        folder = tmp_path_factory.mktemp("dump")
        if not steps:
            refused(lambda: _imported(folder, steps, outputs), "is empty", InvalidDataError)
            return
        trace = _imported(folder, steps, outputs)
        assert [e.output_ids.tolist() for e in trace.examples] == [o["output_ids"] for o in outputs]
        assert replay(trace.examples, load_rescorer("none"), k=1) == accepted
        vocab_size = trace.header.vocab_size - trace.header.k
        for example in trace.examples:
            assert (example.lattice.token_ids[:, 1:] >= vocab_size).any(-1).all() or trace.header.k <= 4

    def test_lattices_are_the_logged_ones(self, tmp_path: Path):
        top = [{"tok": 7, "p": 0.5}, {"tok": 3, "p": 0.25}]
        step = {"step": 0, "seq": 0, "n_draft": 1, "n_accepted": 0, "pos": [{"i": 0, "tok": 7, "p": 0.5, "top": top}]}
        trace = _imported(tmp_path, [step], [{"output_ids": [1, 3]}])
        (example,) = trace.examples
        assert (trace.header.h, trace.header.k, trace.header.vocab_size) == (2, 2, 8 + 2)
        assert example.lattice.token_ids.tolist() == [[[1, 9], [7, 3]], [[3, 9], [8, 9]]]
        np.testing.assert_allclose(example.lattice.logps[0, 1], np.log([0.5, 0.25]), rtol=1e-6)
        run = evaluate(load_trace(tmp_path / "out"), runs_of(["none", "oracle"], ks=[2]))
        assert (run["none"].block_efficiency, run["oracle"].block_efficiency) == (1.0, 2.0)
        assert any("lower bound" in line for line in run.notices)

    def test_what_is_not_enough(self, tmp_path: Path):
        draft = {"i": 0, "tok": 2, "p": 0.5, "top": []}
        step = {"step": 0, "seq": 0, "n_draft": 1, "n_accepted": 1, "pos": [draft]}
        good = [{"output_ids": [1, 2, 3]}]
        path = write_lines(tmp_path / "alone.jsonl", [step])
        refused(lambda: import_trace(path, "llama-cpp", tmp_path / "out"), "give --outputs", RescoreError)

        def wrong(expected: str, kind: type[RescoreError], steps: list[Any], outputs: list[Any]) -> None:
            refused(lambda: _imported(tmp_path, steps, outputs), expected, kind)

        wrong("not those of output 0", IncompatibleError, [step], [{"output_ids": [1, 4, 3]}])
        wrong("not those of output 0", IncompatibleError, [{**step, "n_accepted": 0}], good)  # it was right
        wrong("ends before the outputs", IncompatibleError, [step], [{"output_ids": [1, 2, 3, 4]}])
        wrong("belongs to no output", IncompatibleError, [step, {**step, "step": 1}], good)
        wrong("belongs to no output", IncompatibleError, [{**step, "seq": 5}], good)
        wrong("1 drafted tokens, 0 in pos", InvalidDataError, [{**step, "pos": []}], good)
        wrong("2 accepted", InvalidDataError, [{**step, "n_accepted": 2}], good)
        wrong("not in order", InvalidDataError, [{**step, "pos": [{**draft, "i": 1}]}], good)
        wrong("is no probability", InvalidDataError, [{**step, "pos": [{**draft, "p": 1.5}]}], good)
        wrong(
            "missing required field `pos`",
            InvalidDataError,
            [{"step": 0, "seq": 0, "n_draft": 0, "n_accepted": 0}],
            good,
        )
        wrong("has no tokens", InvalidDataError, [step], [{"output_ids": []}])
        wrong("unknown field", InvalidDataError, [step], [{"output_ids": [1], "tokens": [1]}])
        (tmp_path / "dump.jsonl").write_text(json.dumps(step)[:-9])
        refused(
            lambda: of_dump(tmp_path / "dump.jsonl", tmp_path / "outputs.jsonl", k=4, limit=None), "line 1 is not valid"
        )


def _imported(folder: Path, steps: list[Any], outputs: list[Any]) -> Trace:
    path = write_lines(folder / "dump.jsonl", steps)
    return import_trace(path, "llama-cpp", folder / "out", outputs=write_lines(folder / "outputs.jsonl", outputs))


def test_the_command(
    rescore: Command, tiny_base: BaseLM, recorded: Trace, tiny_folder: Path, tiny_heads_folder: Path, tmp_path: Path
):
    dump(tiny_base, recorded.examples[0], tmp_path / "dump", "specforge")
    asked = [
        "import-trace", tmp_path / "dump", "--base", tiny_folder, "--heads", tiny_heads_folder, "--dtype", "float64",
        "--device", "cpu", "--k", 8, "--out", tmp_path / "out",
    ]  # fmt: skip
    run = rescore(*asked, "--from", "specforge")
    assert (run.code, run.err) == (0, "") and run.out == f"{tmp_path / 'out'}: 1 examples, 12 positions, h = 4, K = 8\n"
    assert rescore("eval", "--trace", tmp_path / "out", "--k", 4, "--rescorer", "none").code == 0
    rescore(*asked, "--from", "specforge").refused("not empty; give another --out")
    rescore(*asked[:-1], tmp_path / "new", "--from", "speculators").refused(r"holds no \*.safetensors")
    rescore(*asked[:-1], tmp_path / "new", "--from", "llama-cpp").refused("--heads is of no use for --from llama-cpp")
    rescore(*asked, "--from", "specforge", "--limit", 0).refused("at least one example")
    rescore(*asked, "--from", "specforge", "--prompt-tokens", -1).refused("at least one token|not empty")
    rescore("import-trace", tmp_path / "none", "--from", "specforge", "--out", tmp_path / "new").refused("no such file")
    assert not (tmp_path / "new").exists()


def test_only_one_layer_of_the_base_is_loaded(tiny_folder: Path, tiny_heads_folder: Path):
    from rescore.imports.states import StatesImport
    from rescore.runs.inputs import Inputs

    inputs = Inputs(base=str(tiny_folder), heads=str(tiny_heads_folder), dtype="float64", device="cpu")
    reading = StatesImport("specforge", inputs, k=4, prompt_tokens=None)
    whole = load_base(str(tiny_folder), dtype="float64", device="cpu")
    layers = [len(base.model.model.layers) for base in (reading.base, whole)]  # type: ignore[attr-defined]
    assert layers == [1, 2] and reading.models.identity == whole.identity
