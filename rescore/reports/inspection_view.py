"""An inspected example as styled lines for a terminal; the marks say the same without colour."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from rescore.acceptance.rules import kind_of
from rescore.reports.inspection import Block, Draft, Inspection, Joined
from rescore.runs.records import SOURCES
from rescore.terminal import isolated, printable, shortened

WIDEST_TOKEN = 14  # cells
GAP = 2  # cells between columns
HEAD, TAIL = 500, 200  # characters of a long prompt that are shown
ACCEPTED, REJECTED, UNSEEN, WANTED = "green", "bold red", "dim", "cyan"
REASONS = {  # for which a token is not accepted, by the kind of acceptance
    "greedy": "rejected: the base wanted another",
    "sampled": "not accepted: another was drawn",
    "lossy": "rejected: it does not fit",
}
MARKS = {name: name[0].upper() for name in SOURCES.values()}  # of drafters
Column = list[tuple[str, str]]  # text and style of each cell, the title first


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
    title = (
        f"{printable(inspection.task)}, example {printable(inspection.id)} ({inspection.number} of "
        f"{inspection.examples}), h = {inspection.h}, k = {inspection.k}"
    )
    lines = [Text(title, style="bold")]
    texts = [("prompt", inspection.prompt), ("output", inspection.output)]
    texts += [("reference", reference) for reference in inspection.references[:3]]
    for label, text in texts:
        if text is not None:
            shown = isolated(printable(shortened(text, head=HEAD, tail=TAIL), joiners=True))
            lines.append(Text.assemble((f"{label}: ", "bold"), shown))
    for of in inspection.decodes:
        weight = "" if of.alpha is None else f", alpha {of.alpha:g}"
        each = f"{of.tokens / of.steps:.2f} a step"
        lines.append(Text(f"{_name(of.rescorer, of.p)}{weight}: {of.tokens} tokens in {of.steps} steps, {each}"))
    legend = f"[token] accepted, !token! {REASONS[_kind(inspection)]}; after it: not looked at"
    lines.append(Text(f"{legend}; * in the lattice: {_wanted(inspection)}; rank: its place there", style=UNSEEN))
    slots = [slot for block in inspection.blocks for joined in block.joined for slot in joined.slots]
    of_drafts = [names for block in inspection.blocks for draft in block.drafts for names in draft.sources]
    if found := {name for names in [*of_drafts, *(of.sources for slot in slots for of in slot)] for name in names}:
        marks = ", ".join(f"{mark} {name}" for name, mark in MARKS.items() if name in found)
        lines.append(Text(f"behind a token, which drafters had proposed it there: {marks}", style=UNSEEN))
    return lines


def _kind(inspection: Inspection) -> str:
    """Of the acceptance that all its decodes are by."""
    return kind_of(inspection.decodes[0].rescorer)


def _wanted(inspection: Inspection) -> str:
    """What the tokens are that stand beside the lattice."""
    if _kind(inspection) == "greedy":
        return "what the base wanted"
    return "greedy decoding's token" if inspection.output is not None else "the output's token"


def _name(rescorer: str, p: int) -> str:
    return f"{printable(rescorer)} p={p}"


def _block(inspection: Inspection, block: Block, width: int) -> list[Text]:
    accepted = ", ".join(f"{_name(d.rescorer, d.p)} accepts {d.accepted}" for d in block.drafts)
    lines = [Text(f"block {block.number}, output token {block.position + 1}: {accepted}", style="bold")]
    fixed = [
        _column("slot", [(str(n), UNSEEN) for n in range(1, len(block.slots) + 1)]),
        _column(
            _wanted(inspection).removeprefix("what the "),
            [(_token(inspection, slot.wanted), WANTED) for slot in block.slots],
        ),
    ]
    drafts = [_column(_name(d.rescorer, d.p), _cells(inspection, block, d)) for d in block.drafts]
    for band in _bands(fixed, [*_lattice(inspection, block), *drafts], width):
        lines += _rows([*fixed, *band])
    for joined in block.joined:
        names = printable("+".join(joined.drafters))
        lines.append(Text(f"  what {names} proposed after each of the tokens accepted there", style=UNSEEN))
        beside = [[title, *cells[1 : 1 + len(joined.slots)]] for title, *cells in fixed]
        for band in _bands(beside, _joined(inspection, block, joined), width):
            lines += _rows([*beside, *band])
    return lines


def _lattice(inspection: Inspection, block: Block) -> list[Column]:
    """Columns of the lattice's best tokens, and of the place of what the base wanted."""
    most = max(len(slot.best) for slot in block.slots)
    ranks = ["" if slot.wanted is None or not slot.best else str(slot.rank or "-") for slot in block.slots]
    columns = [_column("rank", [(rank, WANTED) for rank in ranks])]
    for place in range(most):
        cells = []
        for slot in block.slots:
            if not slot.best:  # beyond the heads
                cells.append(("", ""))
                continue
            token, probability = slot.best[place]
            mark = "*" if token == slot.wanted else ""
            shown = f"{probability:.2f}".removeprefix("0")
            cells.append((f"{_token(inspection, token)}{mark} {shown}", WANTED if mark else ""))
        columns.append(_column(f"lattice {place + 1}", cells))
    return columns if most else []


def _joined(inspection: Inspection, block: Block, joined: Joined) -> list[Column]:
    columns = []
    for place in range(max(map(len, joined.slots), default=0)):
        cells = []
        for number, slot in enumerate(joined.slots, start=1):
            if place >= len(slot):
                cells.append(("", ""))
                continue
            of = slot[place]
            wanted = number < len(block.slots) and of.token == block.slots[number].wanted
            shown = "" if of.probability is None else f" {of.probability:.2f}".replace(" 0.", " .")
            text = f"{_token(inspection, of.token)}{'*' if wanted else ''} {_marks(of.sources)}{shown}"
            cells.append((text, WANTED if wanted else ""))
        columns.append(_column(f"proposed {place + 1}", cells))
    return columns


def _marks(sources: Sequence[str]) -> str:
    return "".join(MARKS[name] for name in sources)


def _cells(inspection: Inspection, block: Block, draft: Draft) -> Column:
    cells = []
    for place, token in enumerate(draft.tokens):
        text = _token(inspection, token)
        if place < draft.accepted:
            marks = _marks(draft.sources[place]) if place < len(draft.sources) else ""
            cells.append((f"[{text}]{marks}", ACCEPTED))
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


def _column(title: str, cells: Column) -> Column:
    return [(title, "underline"), *cells]


def _width(column: Column) -> int:
    return max(cell_len(text) for text, _ in column) + GAP


def _bands(fixed: Sequence[Column], columns: Sequence[Column], width: int) -> list[list[Column]]:
    """The columns in groups that fit beside the fixed ones; at least one in each."""
    room = width - sum(map(_width, fixed)) + GAP  # none after the last column
    bands: list[list[Column]] = [[]]
    for column in columns:
        if bands[-1] and sum(map(_width, [*bands[-1], column])) > room:
            bands.append([])
        bands[-1].append(column)
    return bands


def _rows(columns: Sequence[Column]) -> list[Text]:
    rows = []
    for place in range(max(map(len, columns))):
        row = Text("  ")
        for column in columns:
            text, style = column[place] if place < len(column) else ("", "")
            row.append(text, style=style or None)
            row.append(" " * (_width(column) - cell_len(text)))
        row.rstrip()
        rows.append(row)
    return rows
