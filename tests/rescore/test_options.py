"""Options that records and functions declare: what is read from text, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from conftest import refused

from lattices.errors import UnknownNameError
from lm.options import Size
from rescore.options import REQUIRED, Option, Source, Spec, with_options


def declared(hint: Any, default: Any = None) -> Option:
    option = Option.declared("some_name", hint, default)
    assert option is not None
    return option


def test_only_what_has_help_is_an_option():
    assert Option.declared("name", int, 1) is None
    option = declared(Annotated[int | None, "Some help.", "--other"], 4)
    assert (option.spelled, option.help, option.label, option.shown_default) == (
        ("--other",),
        "Some help.",
        "<int>",
        ["4"],
    )
    assert declared(Annotated[str, "Some help."]).spelled == ("--some-name",)
    assert declared(Annotated[Sequence[Path], "Some help.", "CORPUS"]).is_argument
    assert declared(Annotated[int, "Some help."], REQUIRED).full_help == "Some help.  [required]"


@pytest.mark.parametrize(
    ("hint", "given", "value"),
    [
        (int, ["7"], 7),
        (Sequence[int], ["1,2", "4"], (1, 2, 4)),
        (Sequence[float], ["0.5 1"], (0.5, 1.0)),
        (Sequence[str], ["a,b", "c"], ("a", "b", "c")),
        (Sequence[Spec], ["ngram:p=16,alpha=0.5,none"], ("ngram:p=16,alpha=0.5", "none")),
        (Sequence[tuple[str, str]], ["ngram:own=ngram,a=b"], (("ngram:own", "ngram"), ("a", "b"))),
        (Mapping[str, float], ["4-gram=1.5,x=2"], {"4-gram": 1.5, "x": 2.0}),
        (float | Literal["tuned"] | None, ["tuned"], "tuned"),
        (float | Literal["tuned"] | None, ["0.5"], 0.5),
        (Literal["tree", "batch"], ["tree"], "tree"),
        (Path, ["~/x"], Path.home() / "x"),
    ],
)
def test_values(hint: Any, given: list[str], value: Any):
    assert declared(Annotated[hint, "Some help.", "<A=B>"]).value(given) == value


def test_sizes():
    option = declared(Annotated[int, "Some help.", Size(1024)], 4 << 30)
    assert option.shown_default == ["4G"] and option.value(["1.5M"]) == 3 << 19
    assert declared(Annotated[int | None, "Some help.", Size(1000)]).value(["500K"]) == 500_000
    refused(lambda: option.value(["4X"]), "--some-name 4X: give a number, with K, M, G or T after it")


def test_zero_is_none_where_another_number_is_the_default():
    assert declared(Annotated[int | None, "Some help."], 8192).value(["0"]) is None
    assert declared(Annotated[int | None, "Some help."]).value(["0"]) == 0
    assert declared(Annotated[int, "Some help."], 3).value(["0"]) == 0


def test_a_path_with_a_comma_is_one(tmp_path: Path):
    (tmp_path / "a,b").touch()
    assert declared(Annotated[Sequence[Path], "Some help."]).value([f"{tmp_path}/a,b"]) == (tmp_path / "a,b",)
    assert declared(Annotated[Sequence[Spec], "Some help."]).value([f"ngram:{tmp_path}/a,b"]) == (
        f"ngram:{tmp_path}/a,b",
    )


def test_what_is_refused():
    numbers, word = (
        declared(Annotated[Sequence[int], "Some help."]),
        declared(Annotated[Literal["tree", "batch"], "Some help."]),
    )
    refused(lambda: numbers.value(["1,,2"]), "--some-name 1,,2: give whole numbers with commas between them")
    refused(lambda: declared(Annotated[float, "Some help."]).value(["x"]), "--some-name x: give a number, like 0.5")
    refused(lambda: word.value(["three"]), "unknown --some-name 'three'; did you mean tree?", UnknownNameError)
    refused(lambda: word.check(["tree", "batch"]), "--some-name is there 2 times; give it once")
    refused(lambda: word.check([" "]), "--some-name is empty")
    refused(lambda: declared(Annotated[int, "Some help."], REQUIRED).value([]), "Missing option '--some-name'")
    pairs = declared(Annotated[Mapping[str, float], "Some help.", "<METHOD=NUMBER>"])
    for text in ("1.5", "a=b", "=1", "a="):
        refused(lambda text=text: pairs.value([text]), f"--some-name {text}: give METHOD=NUMBER")


@dataclass(frozen=True)
class Inner:
    size: Annotated[int, "Some help."] = 2
    hidden: int = 5


def outer(name: Annotated[str, "Some help."], inner: Inner, *, flag: Annotated[bool, "Some help."] = False) -> None:
    """Declares options, some of them by a record."""


def test_a_command_gets_records_and_keywords():
    seen: list[Any] = []

    def body(asked: Any, k: Annotated[int, "Some help."] = 1) -> None:
        seen.append((asked, k))

    options, run = with_options(body, {"asked": Source(f"{__name__}:outer")})
    assert [option.name for option in options] == ["name", "size", "flag", "k"]
    run(name=["x"], size=["3"], flag=True, k=None)
    ((asked, k),) = seen
    assert (asked.func, asked.keywords, k) == (outer, {"name": "x", "inner": Inner(size=3), "flag": True}, 1)
    refused(lambda: run(name=None, size=["3", "4"], flag=False, k=None), "--size is there 2 times")


def test_a_whole_number_or_a_word():
    option = declared(Annotated[int | Literal["auto"] | None, "Some help."])
    assert (option.value(["8"]), option.value(["auto"]), option.label) == (8, "auto", "<number|auto>")
    refused(lambda: option.value(["many"]), "--some-name many: give a whole number, like 16, or auto")
