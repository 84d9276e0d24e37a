"""Traces: what is recorded, how recording goes on after an interruption, and what the loader refuses.

Traces made elsewhere are written here with `datasets` alone, after the description in docs/formats.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import files_of_at_most, make_heads

import lm.base.generation
from lattices.errors import IncompatibleError, InvalidDataError, OutputError, RescoreError
from lattices.lattice import Lattice, put_first
from rescore import tracing
from rescore.replaying import replay
from rescore.rescorers import load_rescorer
from rescore.tasks import Example
from rescore.tracing import read_header, read_trace, record_trace, trace_folder

H, K, VOCAB, EOS = 3, 4, 50, 0
Row = dict[str, Any]


def made_elsewhere(name: str, output_ids: list[int], seed: int = 0) -> Row:
    """One row of a trace: lattices whose slot 1 starts with the output token, the rest drawn at random."""
    rng, t = np.random.default_rng(seed), len(output_ids)
    ids = np.array([[rng.choice(np.arange(1, VOCAB), K, replace=False) for _ in range(H)] for _ in range(t)])
    for position, token in enumerate(output_ids):
        if token in ids[position, 0]:
            ids[position, 0][ids[position, 0] == token] = ids[position, 0, 0]
        ids[position, 0, 0] = token
    logps = -np.sort(rng.random((t, H, K)), axis=-1) * 5 - 0.01
    return {
        "id": name, "prompt": f"prompt {name}", "references": ["right"], "output": None, "prompt_ids": [1, 2],
        "output_ids": output_ids, "token_ids": ids.ravel().tolist(), "logps": logps.ravel().tolist(),
        "entropies": [1.0] * (t * H), "margins": [0.5] * t,
    }  # fmt: skip


FEATURES: dict[str, Any] = {
    "id": datasets.Value("string"), "prompt": datasets.Value("string"),
    "references": datasets.List(datasets.Value("string")), "output": datasets.Value("string"),
    "prompt_ids": datasets.List(datasets.Value("int32")), "output_ids": datasets.List(datasets.Value("int32")),
    "token_ids": datasets.List(datasets.Value("int32")), "logps": datasets.List(datasets.Value("float32")),
    "entropies": datasets.List(datasets.Value("float32")), "margins": datasets.List(datasets.Value("float32")),
}  # fmt: skip
HEADER = {
    "schema": "rescore.trace/1", "h": H, "k": K, "vocab_size": VOCAB, "eos_token_ids": [EOS], "settings": {},
}  # fmt: skip


def write_trace(folder: Path, *parts: list[Row], header: Row | None = None, features: Row | None = None) -> Path:
    names = [f"p{number}" for number in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        schema = datasets.Features({column: (features or FEATURES)[column] for column in columns})
        datasets.Dataset.from_dict(columns, features=schema).save_to_disk(folder / name)
    folder.mkdir(exist_ok=True)
    (folder / "trace.json").write_text(json.dumps({**HEADER, "parts": names, **(header or {})}))
    return folder


def rows() -> list[Row]:
    return [made_elsewhere("a", [7, 8, 9, EOS], seed=1), made_elsewhere("b", [3, 4], seed=2)]


class TestMadeElsewhere:
    def test_it_loads_as_written(self, tmp_path: Path):
        first, second = rows()
        last = made_elsewhere("c", [5] * 6, seed=3) | {"output": "five", "references": []}
        trace = read_trace(write_trace(tmp_path, [first, second], [last]))
        assert [example.id for example in trace.examples] == ["a", "b", "c"]
        for example, row in zip(trace.examples, [first, second, last], strict=True):
            t = len(row["output_ids"])
            assert example.lattice.token_ids.tolist() == np.reshape(row["token_ids"], (t, H, K)).tolist()
            np.testing.assert_allclose(example.lattice.logps, np.reshape(row["logps"], (t, H, K)), rtol=1e-6)
            assert example.entropies.shape == (t, H) and example.margins.shape == (t,)
            assert example.output_ids.tolist() == row["output_ids"] and example.prompt_ids.tolist() == [1, 2]
            assert (example.prompt, example.output) == (row["prompt"], row["output"])
            assert example.references == tuple(row["references"])

    def test_it_replays(self, tmp_path: Path):
        row = made_elsewhere("a", [7, 8, 9, 6])
        ids = np.reshape(row["token_ids"], (4, H, K))
        ids[0, 1:, 0], ids[0, 1:, 1:] = [8, 9], [[11, 12, 13], [11, 12, 13]]  # the first block is right in all slots
        trace = read_trace(write_trace(tmp_path, [row | {"token_ids": ids.ravel().tolist()}]))
        assert replay(trace.examples, load_rescorer("none"), k=K) == [[3, 1]]

    def test_other_columns_are_no_trouble(self, tmp_path: Path):
        features = {**FEATURES, "note": datasets.Value("string")}
        trace = read_trace(write_trace(tmp_path, [row | {"note": "x"} for row in rows()], features=features))
        assert len(trace.examples) == 2


def changed(**columns: Any) -> Callable[[list[Row]], None]:
    """Spoils the second row."""
    return lambda table: table[1].update(columns)


def at(column: str, place: int, value: Any) -> Callable[[list[Row]], None]:
    def spoil(table: list[Row]) -> None:
        table[1][column][place] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed(token_ids=[1] * 23), r"'b' has 23 values in 'token_ids'; 2 output tokens, h = 3 and k = 4 need 24"),
        (changed(logps=[-1.0] * 25), r"'b' has 25 values in 'logps'"),
        (changed(entropies=[1.0]), r"'b' has 1 values in 'entropies'"),
        (changed(margins=[]), r"'b' has 0 values in 'margins'"),
        (changed(output_ids=[], token_ids=[], logps=[], entropies=[], margins=[]), r"'b' has no output tokens"),
        (at("token_ids", 5, VOCAB), r"'b'.*\[0, 1\].*outside the vocabulary"),
        (at("token_ids", 5, -1), r"'b'.*outside the vocabulary"),
        (at("logps", 4, float("nan")), r"'b'.*NaN"),
        (at("logps", 4, float("-inf")), r"'b'.*infinite"),
        (at("logps", 4, 0.5), r"'b'.*positive"),
        (at("logps", 7, -0.001), r"'b'.*log-probs rise"),
        (lambda table: at("token_ids", 5, table[1]["token_ids"][4])(table), r"'b'.*twice in one slot"),
        (at("token_ids", 0, 40), r"'b': the first entry of slot 1 at position 0 is not the output token"),
        (at("prompt_ids", 0, VOCAB), r"'b' has ids outside the vocabulary in 'prompt_ids'"),
        (at("entropies", 2, float("nan")), r"'b' has NaN in 'entropies'"),
        (at("margins", 1, float("nan")), r"'b' has NaN in 'margins'"),
        (at("entropies", 2, float("inf")), r"'b' has a value in 'entropies' that is no entropy"),
        (at("entropies", 2, -0.5), r"'b' has a value in 'entropies' that is no entropy"),
        (at("token_ids", 5, None), r"'b' has an empty entry in 'token_ids'"),
        (changed(logps=None), r"'b' has an empty entry in 'logps'"),
        (changed(prompt=None), r"'b' has an empty entry in 'prompt'"),
        (changed(id=None), r"example None has an empty entry in 'id'"),
        (at("references", 0, None), r"'b' has an empty entry in 'references'"),
        (changed(id="a"), r"the id 'a' is there twice"),
        (lambda table: table.__setitem__(1, made_elsewhere("b", [3, EOS, 4])), r"'b' has output tokens after end-of-t"),
    ],
)
def test_a_wrong_row_is_refused_by_name(tmp_path: Path, spoil: Callable[[list[Row]], None], message: str):
    table = rows()
    spoil(table)
    with pytest.raises(InvalidDataError, match=message) as error:
        read_trace(write_trace(tmp_path / "trace", table))
    assert str(tmp_path / "trace" / "p0") in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        (
            "token_ids",
            datasets.List(datasets.Value("int64")),
            r"'token_ids' is list<.*int64>, not list<.*int32>",
        ),
        ("logps", datasets.List(datasets.Value("float64")), r"column 'logps' is list<.*double>, not list<.*float>"),
        ("output_ids", datasets.List(datasets.Value("string")), r"column 'output_ids' is list<.*string>"),
        ("margins", None, r"has no column 'margins'"),
        ("output", None, r"has no column 'output'"),
    ],
)
def test_a_wrong_column_is_refused_by_name(tmp_path: Path, column: str, kind: Any, message: str):
    table = rows()
    if kind is None:
        table = [{name: value for name, value in row.items() if name != column} for row in table]
    with pytest.raises(InvalidDataError, match=message):
        read_trace(write_trace(tmp_path, table, features={**FEATURES, column: kind}))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"schema": "rescore.trace/9"}, r"has schema 'rescore.trace/9'; this version reads 'rescore.trace/1'"),
        ({"h": 0}, "Expected `int` >= 1 - at `h`"),
        ({"k": "4"}, "Expected `int`, got `str` - at `k`"),
        ({"vocab_size": None}, "Expected `int`, got `null` - at `vocab_size`"),
        ({"eos_token_ids": 0}, "Expected `array`, got `int` - at `eos_token_ids`"),
        ({"parts": "p0"}, "Expected `array`, got `str` - at `parts`"),
        ({"settings": []}, "Expected `object`, got `array` - at `settings`"),
        ({"parts": []}, "is empty"),
        ({"depth": 3}, "unknown field `depth`"),
        ({"parts": ["p0", "p1"]}, "can't read the trace part .*p1"),
        ({"h": H - 1}, "need"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, header: Row, message: str):
    with pytest.raises(InvalidDataError, match=message):
        read_trace(write_trace(tmp_path, rows(), header=header))


def test_damage_anywhere_in_a_part_is_read_or_refused(tmp_path: Path):
    """Its lists begin where the file says: unchecked, that may be outside of it, and end the process."""
    folder = write_trace(tmp_path / "trace", rows())
    arrow = next((folder / "p0").glob("*.arrow"))
    whole, refused = arrow.read_bytes(), 0
    for at in range(0, len(whole), 44):
        arrow.write_bytes(whole[:at] + b"\xff\xff\xff\x7f" + whole[at + 4 :])
        try:
            read_trace(folder)
        except InvalidDataError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_files_that_are_no_trace_are_refused(tmp_path: Path):
    with pytest.raises(RescoreError, match=r"no trace in .*nowhere: can't read trace.json \(No such file"):
        read_trace(tmp_path / "nowhere")
    folder = write_trace(tmp_path / "trace", rows())
    arrow = next((folder / "p0").glob("*.arrow"))
    whole = arrow.read_bytes()
    for content in (whole[:100], b"PK\x03\x04" + whole[4:], b""):
        arrow.write_bytes(content)
        with pytest.raises(InvalidDataError, match=r"can't read the trace part .*p0: ."):
            read_trace(folder)
    shutil.rmtree(folder / "p0")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"id": ["a"]})}).save_to_disk(folder / "p0")
    with pytest.raises(InvalidDataError, match=r"can't read the trace part .*p0: ."):
        read_trace(folder)
    for text in ("{", "[]", "null", '{"schema": "rescore.trace/1"}'):
        (folder / "trace.json").write_text(text)
        with pytest.raises(InvalidDataError, match=r"trace.json"):
            read_header(folder)


# Recording.

EXAMPLES = [Example(f"e{i}", "abcdefgh"[: 1 + 3 * i % 8], (f"r{i}",)) for i in range(7)]


@pytest.fixture
def record(tiny_base, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracing, "PART_EXAMPLES", 2)
    heads = make_heads(tiny_base, h=3)

    def run(folder: Path, count: int = len(EXAMPLES), **changes: Any) -> tracing.Trace:
        options: dict[str, Any] = {"settings": {"made": {"by": "test"}}, "chat": False, "max_new_tokens": 5, "k": 6}
        return record_trace(tiny_base, heads, EXAMPLES[:count], folder, **options | changes)

    return run


def same(one: tracing.Trace, other: tracing.Trace) -> bool:
    return len(one.examples) == len(other.examples) and all(
        (a.id, a.output_ids.tolist()) == (b.id, b.output_ids.tolist())
        and np.array_equal(a.lattice.token_ids, b.lattice.token_ids)
        and np.allclose(a.lattice.logps, b.lattice.logps, atol=1e-6)
        for a, b in zip(one.examples, other.examples, strict=True)
    )


def test_what_is_recorded(tiny_base, record, tmp_path: Path):
    trace = record(tmp_path)
    heads = make_heads(tiny_base, h=3)
    assert [e.id for e in trace.examples] == [e.id for e in EXAMPLES]
    assert (trace.header.h, trace.header.k, trace.header.vocab_size) == (3, 6, tiny_base.vocab_size)
    assert trace.header.eos_token_ids == sorted(tiny_base.eos_token_ids)
    for traced, example in zip(trace.examples, EXAMPLES, strict=True):
        prompt, output = traced.prompt_ids.tolist(), traced.output_ids.tolist()
        assert prompt == tiny_base.encode_prompt(example.prompt, chat=False)
        assert (traced.prompt, traced.references) == (example.prompt, example.references)
        assert traced.output == tiny_base.decode_text(output)
        logits, hidden = tiny_base.forward(torch.tensor([prompt + output]))
        before = slice(len(prompt) - 1, len(prompt) + len(output) - 1)  # the states that chose the output tokens
        chosen = tiny_base.output_embeddings.weight[logits[0, before].argmax(-1)]
        ahead = tiny_base.project(heads(hidden[0, before], chosen[:, None]))
        every = torch.cat([logits[:, before].transpose(0, 1), ahead.transpose(0, 1)], dim=1).numpy()  # [t, h, vocab]
        assert output == every[:, 0].argmax(-1).tolist()
        expected = Lattice.from_logits(every, 6)
        assert traced.lattice.token_ids.tolist() == expected.token_ids.tolist()
        np.testing.assert_allclose(traced.lattice.logps, expected.logps, atol=1e-4)
        probabilities = np.exp(every - np.logaddexp.reduce(every, axis=-1, keepdims=True))
        entropies = -(probabilities * np.log(np.maximum(probabilities, 1e-300))).sum(-1)
        np.testing.assert_allclose(traced.entropies, entropies, atol=1e-4)
        top = np.sort(every[:, 0], axis=-1)
        np.testing.assert_allclose(traced.margins, top[:, -1] - top[:, -2], atol=1e-4)


def test_what_was_recorded_is_not_recorded_again(record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = record(tmp_path)
    monkeypatch.setattr(lm.base.generation, "generate", lambda *_, **__: pytest.fail("the base LM ran again"))
    assert same(record(tmp_path), whole)
    assert [e.id for e in record(tmp_path, 3).examples] == ["e0", "e1", "e2"]


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_an_interrupted_recording_goes_on(record, tmp_path: Path, stop: int):
    whole = record(tmp_path / "whole")

    def interrupt(done: int, total: int) -> None:
        assert total == len(EXAMPLES)
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "cut", progress=interrupt)
    kept = (stop - 1) // 2 * 2  # whole parts of two
    assert (tmp_path / "cut" / "trace.json").is_file() == (kept > 0)
    if kept:
        assert [e.id for e in read_trace(tmp_path / "cut").examples] == [e.id for e in EXAMPLES[:kept]]
    seen: list[int] = []
    assert same(record(tmp_path / "cut", progress=lambda done, _: seen.append(done)), whole)
    assert seen == list(range(kept + 1, len(EXAMPLES) + 1))


def test_more_examples_extend_a_trace(record, tmp_path: Path):
    whole = record(tmp_path / "whole")
    record(tmp_path / "grown", 3)
    assert same(record(tmp_path / "grown"), whole)
    assert [e.id for e in read_trace(tmp_path / "grown").examples] == [e.id for e in EXAMPLES]


def test_other_settings_are_refused_with_the_difference(record, tmp_path: Path):
    record(tmp_path, 1)
    with pytest.raises(IncompatibleError, match=r"other settings \(k: 6 -> 8\); use another --out"):
        record(tmp_path, k=8)
    with pytest.raises(IncompatibleError, match=r"\(settings.made.by: test -> you\)"):
        record(tmp_path, settings={"made": {"by": "you"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 258}, "k = 258 is outside 1 to the vocabulary's 257"),
        ({"k": 0}, "k = 0"),
        ({"max_new_tokens": 505}, r"example e5: a prompt of .* tokens and 505 new ones .* context of 512; cut"),
    ],
)
def test_what_can_not_be_recorded_is_refused_before_work(record, tmp_path: Path, monkeypatch, changes, message):
    monkeypatch.setattr(lm.base.generation, "generate", lambda *_, **__: pytest.fail("the base LM ran"))
    with pytest.raises(RescoreError, match=message):
        record(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_parts_before(record, tmp_path: Path):
    record(tmp_path / "trace", 2)
    full = pytest.raises(OutputError, match=r"can't write .*part-00001: .*; what was written before is kept")
    with files_of_at_most(1000), full:  # the lattices do not fit
        record(tmp_path / "trace")
    assert sorted(f.name for f in (tmp_path / "trace").iterdir()) == ["part-00000", "trace.json"]
    assert same(record(tmp_path / "trace"), record(tmp_path / "whole"))


def test_the_key_of_a_trace_is_its_settings_and_k():
    assert trace_folder("t", {"a": 1, "b": 2}, 32) == trace_folder("t", {"b": 2, "a": 1}, 32)
    assert (
        len({trace_folder(t, {"a": a}, k) for t, a, k in (("t", 1, 32), ("t", 1, 40), ("t", 2, 32), ("u", 1, 32))}) == 4
    )


@pytest.mark.parametrize("place", [1, 3, None])
def test_a_near_tie_rounded_the_other_way_keeps_the_chosen_token_first(place: int | None):
    ids = np.array([[10, 11, 12, 13]], dtype=np.int32)
    logps = np.array([[-1.0, -1.0, -2.0, -3.0]], dtype=np.float32)
    chosen = 99 if place is None else int(ids[0, place])
    put_first(ids, logps, np.array([chosen]))
    rest = {1: [10, 12, 13], 3: [10, 11, 12], None: [10, 11, 12]}[place]
    assert ids.tolist() == [[chosen, *rest]]
    Lattice(ids[None], logps[None]).validate(100)


def test_an_example_without_a_prompt_is_named(tiny_base, tmp_path: Path):
    with pytest.raises(RescoreError, match="example e2: the prompt is empty"):
        record_trace(
            tiny_base, None, [EXAMPLES[0], Example("e2", "", ())], tmp_path, settings={}, chat=False,
            max_new_tokens=2, k=2,
        )  # fmt: skip
