"""YAML files of users: values with lines, the nearest key for an unknown one, types checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import refused

from lattices.errors import RescoreError
from lm.yaml_input import Value, read_yaml

Write = Callable[[str | bytes], Value]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def read(content: str | bytes) -> Value:
        (tmp_path / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_yaml(tmp_path / "a.yaml")

    return read


def test_values_of_all_kinds(write: Write):
    top = write(
        "name: squad  # a comment\nk: [1, 16]\np: 4\nalpha: 1e-1\nrate: 0.5\nexact: true\nlimit:\n"
        'text: "12"\nprompt: |\n  Q: {question}\n  A:\ntasks:\n  - name: a\n  - b\n'
    ).fields(None)
    assert (
        top["name"].text() == "squad" and top["text"].text() == "12" and top["prompt"].text() == "Q: {question}\nA:\n"
    )
    assert [v.whole(least=1) for v in top["k"].items()] == [1, 16] and [v.whole() for v in top["p"].items()] == [4]
    assert top["alpha"].number() == 0.1 and top["rate"].number() == 0.5 and top["p"].number() == 4.0
    assert top["exact"].flag() is True and "limit" not in top
    first, second = top["tasks"].items()
    assert first.is_mapping and first.fields(("name",))["name"].text() == "a" and second.text() == "b"
    places = [str(value.wrong("x")).partition(" line ")[2] for value in (first, second)]
    assert places == ["13: tasks[1]: x", "14: tasks[2]: x"]


@pytest.mark.parametrize("number", ["010", "0x10", "0b11", "1:30", "190:20:30", "00", "1__0"])
def test_a_number_that_yaml_reads_in_a_way_of_its_own_is_refused(write: Write, number: str):
    value = write(f"a: {number}\n").fields(None)["a"]
    refused(value.whole, f"line 1: a: {number!r} can be read in two ways")
    refused(value.number, f"line 1: a: {number!r} can be read in two ways")
    refused(write("a: 1:30.5\n").fields(None)["a"].number, "'1:30.5' can be read in two ways")


def test_numbers_in_plain_digits(write: Write):
    assert [v.whole() for v in write("a: [0, 12, +5, -3, 1_000]\n").fields(None)["a"].items()] == [0, 12, 5, -3, 1000]
    read = [v.number() for v in write("a: [0, .5, 1., 0.25, -.5, 2.5e-3, 1e-3]\n").fields(None)["a"].items()]
    assert read == [0.0, 0.5, 1.0, 0.25, -0.5, 0.0025, 0.001]


def test_an_unknown_key_is_refused_with_the_nearest_and_its_line(write: Write):
    top = write("base: x\nresorers: [none]\n")
    refused(lambda: top.fields(("base", "rescorers")), "line 2: unknown key 'resorers'; did you mean 'rescorers'?")
    refused(lambda: top.fields(("zebra", "base")), "line 2: unknown key 'resorers'; known: base, zebra")
    refused(lambda: top.fields(None, required=("tasks",)), "line 1: the key 'tasks' is missing")
    nested = write("tune:\n  limt: 3\n").fields(("tune",))["tune"]
    refused(lambda: nested.fields(("limit",)), "line 2: unknown key 'limt' in 'tune'; did you mean 'limit'?")


@pytest.mark.parametrize(
    ("content", "method", "message"),
    [
        ("a: 3", "text", "line 1: a: a number ('3') stands where text is needed; put it in quotes"),
        ("a: yes", "text", "true or false ('yes') stands where text is needed; put it in quotes"),
        ("a: 2020-01-01", "text", "a timestamp ('2020-01-01') stands where text is needed"),
        ("a: [x]", "text", "a list stands where text is needed"),
        ("a: ' '", "text", "the text is empty"),
        ("a: {b: 1}", "whole", "a mapping (key: value) stands where a whole number is needed"),
        ("a: 1.5", "whole", "a number ('1.5') stands where a whole number is needed"),
        ("a: true", "whole", "true or false ('true') stands where a whole number"),
        ("a: x", "number", "text ('x') stands where a finite number is needed"),
        ("a: '1'", "number", "text ('1') stands where a finite number is needed"),
        ("a: .nan", "number", "a number ('.nan') stands where a finite number is needed"),
        ("a: 1", "flag", "a number ('1') stands where true or false is needed"),
        ("a: []", "items", "the list is empty"),
        ("a: b", "fields", "text ('b') stands where keys with values"),
    ],
)
def test_wrong_types(write: Write, content: str, method: str, message: str):
    value = write(content).fields(None)["a"]
    arguments = (None,) if method == "fields" else ()
    refused(lambda: getattr(value, method)(*arguments), message)


def test_ranges_and_choices(write: Write):
    top = write("k: 0\nmode: lives\n").fields(None)
    refused(lambda: top["k"].whole(least=1), "line 1: k: 0 is too small; give 1 or more")
    refused(lambda: top["mode"].choice(("live", "replay")), "line 2: mode: 'lives' is not known; did you mean 'live'?")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("a: [1\nb: 2\n", "line 2:"),
        ("a: 1\n\tb: 2\n", "line 2:"),
        ("a: 1\n---\nb: 2\n", "line 2:"),
        ("a: &x 1\nb: *x\n", "line 1: anchors and aliases"),
        ("a: !!python/object:os.system x\n", "line 1: the tag"),
        ("a: 1\nb: \x07\n", "line 2: a control character"),
        (b"a: 1\nb: \xff\n", "line 2: no valid UTF-8"),
        ("[" * 1500 + "]" * 1500, "nested too deep"),
        ("a: " + "x" * (1 << 20), "larger than 1 MB"),
    ],
)
def test_what_is_no_yaml_of_ours(write: Write, content: str | bytes, message: str):
    refused(lambda: write(content), message)


def test_keys(write: Write):
    refused(lambda: write("a: 1\na: 2\n").fields(None), "line 2: the key 'a' is there twice")
    refused(lambda: write("[1]: 2\n").fields(None), "line 1: a key must be a plain word")


def test_no_file(tmp_path: Path):
    with pytest.raises(RescoreError, match="can't read"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(RescoreError, match="give a YAML file"):
        read_yaml(tmp_path)
