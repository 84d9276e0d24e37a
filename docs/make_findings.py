"""Writes the pictures of docs/findings.md from the documents in docs/evidence: `python docs/make_findings.py`.

A test compares the pictures with what this would write, so they can't fall behind.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))  # the test that runs this does not look here
from make_tables import TREES  # noqa: E402
from measured import TASKS, results  # noqa: E402

WIDTH, LEFT, RIGHT, TOP, ROW = 920, 130, 40, 64, 26  # pixels
INK, SOFT, LINE = "#1f2937", "#6b7280", "#e5e7eb"
GREY, GREEN, AMBER, BLUE, RED = "#9ca3af", "#059669", "#d97706", "#2563eb", "#dc2626"


@dataclass(frozen=True)
class Series:
    """One kind of mark: its values by row, with their bounds where there are any."""

    name: str
    colour: str
    values: Sequence[float]
    bounds: Sequence[tuple[float, float]] | None = None
    hollow: bool = False


def dots(
    title: str,
    unit: str,
    rows: Sequence[str],
    series: Sequence[Series],
    *,
    apart: float = 0.0,
) -> str:
    """A picture: a row of marks on one scale for each of the rows, the intervals as lines; `apart`: pixels between the
    marks of a row, from top to bottom."""
    values = [value for each in series for pair in (each.bounds or []) for value in pair]
    values += [value for each in series for value in each.values]
    low, high = math.floor(min(values)), math.ceil(max(values))
    height = ROW + apart * (len(series) - 1)
    legend_lines = -(-len(series) // 4)
    top = TOP + 22 * legend_lines
    bottom = top + height * len(rows)
    scale = (WIDTH - LEFT - RIGHT) / (high - low)

    def place(value: float) -> float:
        return LEFT + (value - low) * scale

    parts = [f'<rect width="{WIDTH}" height="{bottom + 48}" fill="#ffffff"/>']
    for tick in range(low, high + 1):
        x = place(tick)
        parts.append(f'<path d="M{x:.1f} {top - 6}V{bottom}" stroke="{SOFT if tick == 1 else LINE}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" fill="{SOFT}" text-anchor="middle">{tick}</text>')
    for number, name in enumerate(rows):
        y = top + height * (number + 0.5)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{LINE}"/>')
        parts.append(f'<text x="{LEFT - 12}" y="{y + 5:.1f}" fill="{INK}" text-anchor="end">{escape(name)}</text>')
        y -= apart * (len(series) - 1) / 2
        for place_in_row, each in enumerate(series):
            y += apart * bool(place_in_row)
            value, colour = each.values[number], each.colour
            said = f"{name}, {each.name}: {value:.2f}"
            if each.bounds:
                a, b = each.bounds[number]
                said += f" ({a:.2f} to {b:.2f})"
                parts.append(
                    f'<path d="M{place(a):.1f} {y:.1f}H{place(b):.1f}" stroke="{colour}" stroke-width="2" '
                    'opacity="0.45"/>'
                )
            fill = "#ffffff" if each.hollow else colour
            parts.append(
                f'<circle cx="{place(value):.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2">'
                f"<title>{escape(said)}</title></circle>"
            )
    for number, each in enumerate(series):
        x, y = LEFT + 195 * (number % 4), 52 + 22 * (number // 4)
        fill = "#ffffff" if each.hollow else each.colour
        parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{fill}" stroke="{each.colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 12}" y="{y + 5}" fill="{INK}">{escape(each.name)}</text>')
    parts.append(f'<text x="{LEFT}" y="{bottom + 38}" fill="{SOFT}">{escape(unit)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 48}" '
        f'font-family="system-ui, sans-serif" font-size="14" role="img" aria-label="{escape(title)}">\n'
        + "\n".join(parts[:1])
        + f'\n<text x="{LEFT}" y="28" fill="{INK}" font-weight="600" font-size="16">{escape(title)}</text>\n'
        + "\n".join(parts[1:])
        + "\n</svg>\n"
    )


def lattices() -> str:
    """What a step accepts, and what it could, by what is proposed."""
    of_p = {p: results("evidence", p=p, h=9) for p in (1, 16)}

    def series(name: str, colour: str, rescorer: str, p: int = 1, *, hollow: bool = False) -> Series:
        return Series(name, colour, [of_p[p][task, rescorer]["block_efficiency"] for task in TASKS], hollow=hollow)

    chosen = [
        series("heads", GREY, "none"),
        series("heads, context-ngram", GREEN, "context-ngram"),
        series("lookup", AMBER, "lookup"),
        series("joint", BLUE, "joint"),
        series("joint, 16 drafts", RED, "joint", 16),
        series("oracle of the heads", GREY, "oracle", hollow=True),
        series("oracle of heads + lookup", BLUE, "oracle:drafters=heads+lookup", hollow=True),
    ]
    title = "Widen the lattice first: heads and lookup joined accept what neither proposes alone"
    return dots(title, "tokens a step accepts (replayed decode, h = 9)", TASKS, chosen)


def speed() -> str:
    """Speed-ups of live decoding."""
    found = results("live")

    def series(name: str, colour: str, rescorer: str, *, interval: bool = False, hollow: bool = False) -> Series:
        each = [found[task, rescorer]["latency"] for task in TASKS]
        bounds = [tuple(one["speedup_ci95"]) for one in each] if interval else None
        return Series(name, colour, [one["speedup"] for one in each], bounds, hollow)

    chosen = [
        series("heads, one draft", GREY, "none"),
        series("lookup, 8 tokens", AMBER, "lookup:tokens=8"),
        series("joint, one draft", BLUE, "joint"),
        series("joint, trees by cost", RED, TREES, interval=True),
        series("transformers, greedy", GREY, "transformers", hollow=True),
        series("transformers, lookup", AMBER, "transformers:lookup=10", hollow=True),
    ]
    title = "It saves time where the verify call is planned by what it costs"
    return dots(title, "times our own greedy decoding (live, 2 CPU cores, float32)", TASKS, chosen)


def choosers() -> str:
    """Small LMs against n-grams of the text, over the heads' lattice alone."""
    found = results("neural", p=1, h=9)
    tasks = [task for task in TASKS if (task, "none") in found]

    def series(name: str, colour: str, rescorer: str, *, hollow: bool = False) -> Series:
        each = [found[task, rescorer] for task in tasks]
        bounds = [tuple(one["block_efficiency_ci95"]) for one in each]
        return Series(name, colour, [one["block_efficiency"] for one in each], bounds, hollow)

    chosen = [
        series("heads, unrescored", GREY, "none"),
        series("neural-32m", AMBER, "neural-32m"),
        series("neural-61m", RED, "neural-61m"),
        series("neural-94m", BLUE, "neural-94m"),
        series("context-ngram", GREEN, "context-ngram"),
        series("oracle of the heads", GREY, "oracle", hollow=True),
    ]
    title = "Nine layers trained for the choice choose about as well as eighteen that were not"
    return dots(title, "tokens a step accepts, one draft (replayed decode, h = 9)", tasks, chosen, apart=11)


PICTURES: dict[str, Callable[[], str]] = {"lattices": lattices, "speed": speed, "choosers": choosers}

if __name__ == "__main__":
    for name, picture in PICTURES.items():
        (DOCS / f"found-{name}.svg").write_text(picture(), encoding="utf-8")
