"""Tables: columns of values, and how they are shown as text, Markdown or CSV.

The one place where a number, an interval or a percentage becomes text. Cells hold values, never text made of them;
None is a value that is not known or makes no sense there.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rescore.terminal import printable

if TYPE_CHECKING:
    from rich.console import Group

NOT_KNOWN = "-"
FORMULA = ("=", "+", "-", "@")  # begins what a spreadsheet would compute


@dataclass(frozen=True)
class Format:
    """How the values of a column are shown: `show` one as text; `left`: aligned left, as text is."""

    show: Callable[[Any], str]
    left: bool = False


def fixed(digits: int, unit: str = "", *, sign: bool = False) -> Format:
    """A number with so many digits after the point and its unit."""
    return Format(lambda value: f"{value:{'+' if sign else ''}.{digits}f}{unit}")


def percent(digits: int = 1, *, sign: bool = False) -> Format:
    """A share (0.25) as a percentage (25.0%)."""
    return Format(lambda value: f"{value:{'+' if sign else ''}z.{digits}%}")  # z: no negative zero


def interval(each: Format) -> Format:
    """A pair of numbers, from the lower to the upper one."""
    return Format(lambda value: " to ".join(map(each.show, value)))


TEXT = Format(str, left=True)
COUNT = Format(lambda value: f"{value:,}")
PLAIN = Format(lambda value: f"{value:g}")  # weights and other settings
NUMBER = fixed(3)
NUMBER_INTERVAL = interval(NUMBER)
SHARE = percent()
GAIN = percent(sign=True)
GAIN_INTERVAL = interval(GAIN)
DIFFERENCE = fixed(3, sign=True)
DIFFERENCE_INTERVAL = interval(DIFFERENCE)
TIMES = fixed(2, "x")
MILLISECONDS = fixed(1)


@dataclass(frozen=True)
class Column:
    """One column: its heading, how its values are shown, its name in CSV (default: the heading), and where the value is
    in a record.

    field: the path of an attribute or of an item (`latency.speedup`, `recall.0`; default: the name), or a function of
    the record.
    """

    heading: str
    format: Format = TEXT
    key: str | None = None
    field: str | Callable[[Any], Any] | None = None

    @property
    def name(self) -> str:
        """What the column is called in CSV."""
        return self.key or re.sub(r"\W+", "_", self.heading.lower()).strip("_")

    def value(self, record: Any) -> Any:
        """The value of a record; None where a part of the path is None or a list ends before the item."""
        if callable(self.field):
            return self.field(record)
        value = record
        for part in (self.field or self.name).split("."):
            if value is not None and part.isdigit():
                value = value[int(part)] if int(part) < len(value) else None
            elif value is not None:
                value = getattr(value, part)
        return value


TASK, RESCORER = Column("task"), Column("rescorer")
K, P, H = Column("k", COUNT), Column("p", COUNT), Column("h", COUNT)
ALPHA = Column("alpha", PLAIN)
EXAMPLES, GROUPS = Column("examples", COUNT, field="n"), Column("groups", COUNT)
EFFICIENCY = (
    Column("block eff.", NUMBER, "block_efficiency"),
    Column("95 %", NUMBER_INTERVAL, "block_efficiency", "block_efficiency_ci95"),
)
GAINS = (Column("gain", GAIN), Column("95 %", GAIN_INTERVAL, "gain", "gain_ci95"))


@dataclass(frozen=True)
class Table:
    """Rows of values under columns; `title` before and `note` after them where text is made.

    `best`: (row, column heading) of cells that are marked with a star; `none`: what stands for None.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    note: str = ""
    best: Collection[tuple[int, str]] = ()
    none: str = NOT_KNOWN

    @classmethod
    def of(cls, columns: Iterable[Column], records: Iterable[Any], **texts: Any) -> Table:
        """A row for each record; `texts`: the other fields."""
        columns = list(columns)
        return cls(columns, [[column.value(record) for column in columns] for record in records], **texts)

    def cells(self) -> list[list[str]]:
        """The text of every cell, row by row, without the headings."""
        return [
            [self._cell(place, column, value) for column, value in zip(self.columns, row, strict=True)]
            for place, row in enumerate(self.rows)
        ]

    def _cell(self, row: int, column: Column, value: Any) -> str:
        shown = self.none if value is None else column.format.show(value)
        return shown + "*" if (row, column.heading) in self.best else shown

    def printable_cells(self, lines: Iterable[Sequence[str]]) -> list[list[str]]:
        """Lines of cells that can't control a terminal; a star hangs out to the right of digits below each other."""
        shown = [[printable(cell) for cell in line] for line in lines]
        for i, column in enumerate(self.columns):
            if not column.format.left and any(line[i].endswith("*") for line in shown):
                for line in shown:
                    line[i] += "" if line[i].endswith("*") else " "
        return shown

    def text(self) -> str:
        """Aligned plain text, safe to paste; no cell can control a terminal."""
        if not self.columns:
            return "\n".join(printable_lines(part) for part in (self.title, self.note) if part)
        head = [column.heading for column in self.columns]
        lines = self.printable_cells([head, *self.cells()])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

        def aligned(line: Sequence[str]) -> str:
            padded = [
                cell.ljust(width) if column.format.left else cell.rjust(width)
                for cell, width, column in zip(line, widths, self.columns, strict=True)
            ]
            return "  ".join(padded).rstrip()

        rule = "  ".join("-" * width for width in widths)
        body = "\n".join([aligned(lines[0]), rule, *map(aligned, lines[1:])])
        return "\n".join(part for part in (printable_lines(self.title), body, printable_lines(self.note)) if part)

    def markdown(self) -> str:
        """A Markdown table without title and note; nothing in a cell becomes markup or HTML."""
        head = [escaped(column.heading) for column in self.columns]
        rule = ["---" if column.format.left else "---:" for column in self.columns]
        body = [[escaped(cell) for cell in line] for line in self.cells()]
        return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])

    def csv(self) -> str:
        """Lines of CSV with all digits; a pair of numbers as `_low` and `_high`, nothing where a value is not known.

        Text can neither control a terminal nor be a formula of a spreadsheet.
        """
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        # A column that shares its name with the one before holds the interval of that one.
        pairs = [
            any(isinstance(row[i], tuple) for row in self.rows)
            or (i > 0 and self.columns[i].name == self.columns[i - 1].name)
            for i in range(len(self.columns))
        ]
        names = [
            [f"{column.name}_low", f"{column.name}_high"] if pair else [column.name]
            for column, pair in zip(self.columns, pairs, strict=True)
        ]
        writer.writerow([name for group in names for name in group])
        for row in self.rows:
            split = [
                value if isinstance(value, tuple) else (value,) * (2 if pair else 1)
                for value, pair in zip(row, pairs, strict=True)
            ]
            writer.writerow([_csv_cell(value) for group in split for value in group])
        return stream.getvalue()


def for_terminal(tables: Iterable[Table]) -> Group:
    """What `rich` prints for tables: with lines and colours, as wide as the terminal lets them be."""
    from rich import box
    from rich.console import Group, RenderableType
    from rich.table import Table as Lines
    from rich.text import Text

    parts: list[RenderableType] = []
    for table in tables:
        parts += [Text()] if parts else []
        parts += [Text(printable_lines(table.title), style="bold")] if table.title else []
        if table.columns:
            lines = Lines(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, padding=(0, 1, 0, 0))
            cells = table.printable_cells(table.cells())
            for number, column in enumerate(table.columns):
                words = [word for row in cells for word in row[number].split()]
                side: Literal["left", "right"] = "left" if column.format.left else "right"
                # Where it is narrow, intervals take several lines and text is cut into pieces; numbers stay whole.
                width = None if column.format.left else max(map(len, words), default=1)
                lines.add_column(printable(column.heading), justify=side, min_width=width, overflow="fold")
            for row in cells:
                lines.add_row(*(Text(cell, style="bold green" if cell.endswith("*") else "") for cell in row))
            parts.append(lines)
        parts += [Text(re.sub(r"(?<![.;:])\n", " ", printable_lines(table.note)), style="dim")] if table.note else []
    return Group(*parts)


def printable_lines(text: str) -> str:
    """Text of several lines, each of which can't control a terminal."""
    return "\n".join(map(printable, text.split("\n"))) if text else ""


def escaped(text: str) -> str:
    """Text that Markdown and the HTML in it leave as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", printable(" ".join(text.split()), joiners=True))


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return "" if value is None else value
    shown = printable(value)
    return f"'{shown}" if shown.startswith(FORMULA) else shown


def joined(tables: Iterable[Table]) -> str:
    """The text of several tables, a blank line between them."""
    return "\n\n".join(table.text() for table in tables)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are text already, the first column aligned left."""
    columns = [Column(name, Format(str, left=place == 0)) for place, name in enumerate(header)]
    return Table(columns, rows).text()
