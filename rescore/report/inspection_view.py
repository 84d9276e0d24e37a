"""An inspected example as styled lines for a terminal; the marks say the same without colour."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from rescore.report.inspection import Block, Draft, Inspection
from rescore.terminal import isolated, printable, shortened

WIDEST_TOKEN = 14  # cells
HEAD, TAIL = 500, 200  # characters of a long prompt that are shown
ACCEPTED, REJECTED, UNSEEN, WANTED = "green", "bold red", "dim", "cyan"
LEGEND = (
    "[token] accepted, !token! rejected: the base wanted another; behind it: not looked at; * in the lattice: what the "
    "base wanted; rank: its place there"
)
Cell = tuple[str, str]  # text and style


def inspection_lines(inspection: Inspection, *, width: int) -> list[Text]:
    """The lines, each within `width` cells but for the prompt's and single columns that are wider."""
    lines = _head(inspection)
    for block in inspection.blocks:
        lines += [Text(), *_block(inspection, block, width)]
    shown = len(inspection.blocks)
    if shown < inspection.total:
        last = inspection.blocks[-1].number
        more = f"--show {last + 1}- shows more" if last < inspection.total else "--show all shows all"
        lines += [Text(), Text(f"{shown} of {inspection.total} blocks; {more}", style=UNSEEN)]
    return lines


def _head(inspection: Inspection) -> list[Text]:
    name = printable(inspection.id)
    lines = [
        Text(
            f"{printable(inspection.task)}, example {name} ({inspection.number} of {inspection.examples}), "
            f"h = {inspection.h}, k = {inspection.k}",
            style="bold",
        )
    ]
    texts = [("prompt", inspection.prompt), ("output", inspection.output)]
    texts += [("reference", reference) for reference in inspection.references[:3]]
    for label, text in texts:
        if text is not None:
            shown = isolated(printable(shortened(text, head=HEAD, tail=TAIL), joiners=True))
            lines.append(Text.assemble((f"{label}: ", "bold"), shown))
    for decode in inspection.decodes:
        weight = "" if decode.alpha is None else f", alpha {decode.alpha:g}"
        lines.append(
            Text(
                f"{_name(decode.rescorer, decode.p)}{weight}: {decode.tokens} tokens in {decode.steps} steps, "
                f"{decode.tokens / decode.steps:.2f} a step"
            )
        )
    return [*lines, Text(LEGEND, style=UNSEEN)]


def _name(rescorer: str, p: int) -> str:
    return f"{printable(rescorer)} p={p}"


def _block(inspection: Inspection, block: Block, width: int) -> list[Text]:
    accepted = ", ".join(f"{_name(d.rescorer, d.p)} accepts {d.accepted}" for d in block.drafts)
    title = Text(f"block {block.number}, output token {block.position + 1}: {accepted}", style="bold")
    fixed = [_column("slot", [(str(n), UNSEEN) for n in range(1, len(block.slots) + 1)])]
    fixed.append(_column("base wanted", [(_token(inspection, slot.wanted), WANTED) for slot in block.slots]))
    lattice = _lattice(inspection, block)
    drafts = [_column(_name(d.rescorer, d.p), _cells(inspection, block, d)) for d in block.drafts]
    lines = [title]
    for band in _bands(fixed, [*lattice, *drafts], width):
        lines += _rows([*fixed, *band])
    return lines


def _lattice(inspection: Inspection, block: Block) -> list[list[Cell]]:
    """Columns of the lattice's best tokens, and the wanted token's rank."""
    if not any(slot.best for slot in block.slots):
        return []
    ranks = ["" if slot.wanted is None else str(slot.rank or "-") for slot in block.slots]
    columns = [_column("rank", [(rank, WANTED) for rank in ranks])]
    for place in range(max(len(slot.best) for slot in block.slots)):
        cells = []
        for slot in block.slots:
            token, probability = slot.best[place] if place < len(slot.best) else (None, 0.0)
            mark = "*" if token is not None and token == slot.wanted else ""
            text = "" if token is None else f"{_token(inspection, token)}{mark} {probability:.2f}".replace(" 0.", " .")
            cells.append((text, WANTED if mark else ""))
        columns.append(_column(f"lattice {place + 1}", cells))
    return columns


def _cells(inspection: Inspection, block: Block, draft: Draft) -> list[Cell]:
    cells = []
    for place, token in enumerate(draft.tokens):
        text = _token(inspection, token)
        if place < draft.accepted:
            cells.append((f"[{text}]", ACCEPTED))
        elif place == draft.accepted and place < len(block.slots) and block.slots[place].wanted is not None:
            cells.append((f"!{text}!", REJECTED))
        else:
            cells.append((f" {text} ", UNSEEN))
    return cells


def _token(inspection: Inspection, token: int | None) -> str:
    if token is None:
        return ""
    text = printable(inspection.texts[token])
    if cell_len(text) > WIDEST_TOKEN:
        text = set_cell_size(text, WIDEST_TOKEN - 1).rstrip() + "\u2026"
    return isolated(text)


def _column(title: str, cells: Sequence[Cell]) -> list[Cell]:
    return [(title, "underline"), *cells]


def _bands(fixed: Sequence[list[Cell]], columns: Sequence[list[Cell]], width: int) -> list[list[list[Cell]]]:
    """The columns in groups that fit beside the fixed ones; at least one in each."""
    room = width - sum(_width(column) + 2 for column in fixed)
    bands: list[list[list[Cell]]] = [[]]
    used = 0
    for column in columns:
        needed = _width(column) + 2
        if bands[-1] and used + needed > room + 2:
            bands.append([])
            used = 0
        bands[-1].append(column)
        used += needed
    return bands


def _width(column: Sequence[Cell]) -> int:
    return max(cell_len(text) for text, _ in column)


def _rows(columns: Sequence[list[Cell]]) -> list[Text]:
    widths = [_width(column) for column in columns]
    rows = []
    for place in range(max(map(len, columns))):
        row = Text("  ")
        for column, width in zip(columns, widths, strict=True):
            text, style = column[place] if place < len(column) else ("", "")
            row.append(text, style=style or None)
            row.append(" " * (width - cell_len(text) + 2))
        row.rstrip()
        rows.append(row)
    return rows
