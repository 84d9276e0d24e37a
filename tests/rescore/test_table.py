"""Tables: one way to write numbers and intervals, in text, Markdown, CSV and JSON."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rescore.table import (
    COUNT,
    GAIN,
    GAIN_INTERVAL,
    NUMBER,
    NUMBER_INTERVAL,
    SHARE,
    Column,
    Table,
    escaped,
    for_terminal,
    joined,
    text_table,
)  # fmt: skip

COLUMNS = [
    Column("task"),
    Column("n", COUNT),
    Column("block eff.", NUMBER),
    Column("95 %", NUMBER_INTERVAL, "block_eff"),
]
ROWS = [["squad", 1200, 1.23456, (1.2, 1.3)], ["a", 3, 2.0, None]]
TABLE = Table(COLUMNS, ROWS, title="two tasks", note="a note")


def test_as_text():
    assert TABLE.text() == (
        "two tasks\n"
        "task       n  block eff.            95 %\n"
        "-----  -----  ----------  --------------\n"
        "squad  1,200       1.235  1.200 to 1.300\n"
        "a          3       2.000               -\n"
        "a note"
    )


def test_the_best_has_a_star_and_digits_stay_below_each_other():
    text = Table([Column("x"), Column("y", NUMBER)], [["a", 1.0], ["b", 2.0]], best=[(1, "y")]).text()
    assert text.splitlines()[2:] == ["a  1.000", "b  2.000*"]


def test_as_markdown():
    assert TABLE.markdown().splitlines() == [
        "| task | n | block eff. | 95 % |", "| --- | ---: | ---: | ---: |",
        "| squad | 1,200 | 1.235 | 1.200 to 1.300 |", "| a | 3 | 2.000 | - |",
    ]  # fmt: skip


def test_as_csv_with_all_digits_and_both_ends_of_an_interval():
    assert TABLE.csv() == "task,n,block_eff,block_eff_low,block_eff_high\nsquad,1200,1.23456,1.2,1.3\na,3,2.0,,\n"


def test_a_csv_of_unknown_intervals_has_their_columns():
    assert Table(COLUMNS[2:], [[1.5, None]]).csv() == "block_eff,block_eff_low,block_eff_high\n1.5,,\n"


@pytest.mark.parametrize(
    ("format", "value", "shown"),
    [
        (GAIN, 0.149, "+14.9%"),
        (GAIN, -0.0001, "+0.0%"),
        (SHARE, -0.0, "0.0%"),
        (GAIN_INTERVAL, (-0.01, 0.2), "-1.0% to +20.0%"),
    ],
)
def test_one_way_to_write_a_value(format, value, shown):
    assert format.show(value) == shown


def test_no_cell_controls_a_terminal():
    assert text_table(["task\x1b[2J", "n"], [["a\u202eb\n", "1"]]) == (
        "task\\x1b[2J  n\n-----------  -\na\\u202eb\\n   1"
    )
    assert Table((), (), title="a\x1b\nb").text() == "a\\x1b\nb"


def test_others_text_is_no_markup_and_no_formula():
    assert escaped("a|b\n<i>`x`") == r"a\|b \<i\>\`x\`"
    rows = [["=1+1", -0.5], ["\x1b[2J\t", 2], ["-x", None]]
    assert Table([Column("a"), Column("b", COUNT)], rows).csv() == "a,b\n'=1+1,-0.5\n\\x1b[2J\\t,2\n'-x,\n"


def test_several_tables_are_apart():
    assert joined([Table((), (), title="a"), Table((), (), title="b")]) == "a\n\nb"


@pytest.mark.parametrize("width", [36, 80])
def test_on_a_terminal_no_column_is_lost(width: int):
    starred = Table(COLUMNS, ROWS, title=TABLE.title, note=TABLE.note, best=[(0, "block eff.")])
    console = Console(width=width, highlight=False, markup=False, color_system=None, record=True, file=io.StringIO())
    console.print(for_terminal([TABLE, starred]))
    shown = console.export_text()
    for text in ("two tasks", "1,200", "1.235", "1.235*", "1.200", "1.300", "2.000", "a note"):
        assert text in shown, text
    assert ("1.200 to 1.300" in shown) == (width == 80)
    assert max(map(len, shown.splitlines())) <= width
