"""Draws docs/joined.svg: one position of a joined lattice, made up, with what each source proposes and what is drafted.

`python docs/make_joined.py` writes it anew.
"""

from pathlib import Path

WIDTH, ROW, COLUMN, LEFT, TOP = 108, 46, 128, 20, 64
COLOURS = {"base": "#444444", "heads": "#2f6fb7", "lookup": "#2e8b57", "both": "#b3651b"}
# name: (slot, row, token, source, probability that the base says exactly the path up to here)
NODES = {
    "the": (1, 1.5, "the", "base", ""),
    "tower": (2, 0.5, "tower", "both", "0.71"),
    "bridge": (2, 1.5, "bridge", "heads", "0.12"),
    "city": (2, 2.5, "city", "heads", "0.05"),
    "was": (3, 0.5, "was", "both", "0.62"),
    "of": (3, 1.5, "of", "heads", "0.06"),
    "hall": (3, 2.5, "hall", "lookup", "0.03"),
    "built": (4, 0, "built", "lookup", "0.43"),
    "opened": (4, 1, "opened", "heads", "0.11"),
    "built2": (4, 2.5, "burnt", "lookup", "0.02"),
    "in": (5, 0, "in", "lookup", "0.40"),
    "in2": (5, 1, "in", "lookup", "0.09"),
    "1889": (6, 0, "1889", "lookup", "0.37"),
    "1889b": (6, 1, "1889", "lookup", "0.05"),
    "by": (7, 0, "by", "lookup", "0.24"),
}
EDGES = [
    ("the", "tower"), ("the", "bridge"), ("the", "city"), ("tower", "was"), ("bridge", "of"), ("city", "hall"),
    ("was", "built"), ("was", "opened"), ("hall", "built2"), ("built", "in"), ("opened", "in2"), ("in", "1889"),
    ("in2", "1889b"), ("1889", "by"),
]  # fmt: skip
DRAFTED = {"the", "tower", "was", "built", "in", "1889", "by", "opened", "in2", "1889b"}
LEGEND = [
    ("base", "chosen by the base already"), ("heads", "a head's entry"), ("lookup", "followed in the text so far"),
    ("both", "proposed by both"),
]  # fmt: skip


def place(name: str) -> tuple[float, float]:
    """Left upper corner of a node."""
    slot, row, *_ = NODES[name]
    return LEFT + (slot - 1) * COLUMN, TOP + row * ROW


def main() -> None:
    """Writes the picture."""
    width, height = LEFT * 2 + 6 * COLUMN + WIDTH, TOP + 4 * ROW + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13" role="img" aria-label="A joined lattice">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for slot in range(1, 8):
        x = LEFT + (slot - 1) * COLUMN + WIDTH / 2
        note = f"slot {slot}" if slot < 5 else f"slot {slot} (no head)"
        out.append(f'<text x="{x}" y="{TOP - 22}" text-anchor="middle" fill="#777777">{note}</text>')
    for one, other in EDGES:
        (x1, y1), (x2, y2) = place(one), place(other)
        strong = one in DRAFTED and other in DRAFTED
        style = 'stroke="#333333" stroke-width="2"' if strong else 'stroke="#bbbbbb" stroke-dasharray="4 3"'
        out.append(f'<line x1="{x1 + WIDTH}" y1="{y1 + 15}" x2="{x2}" y2="{y2 + 15}" {style}/>')
    for name, (_, _, token, source, probability) in NODES.items():
        x, y = place(name)
        fill = COLOURS[source] if name in DRAFTED else "#ffffff"
        ink = "#ffffff" if name in DRAFTED else COLOURS[source]
        out.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="30" rx="6" fill="{fill}" stroke="{COLOURS[source]}" '
            f'stroke-width="1.5"/><text x="{x + 10}" y="{y + 20}" fill="{ink}">{token}</text>'
            f'<text x="{x + WIDTH - 8}" y="{y + 20}" text-anchor="end" fill="{ink}">{probability}</text>'
        )
    x = LEFT
    for source, text in LEGEND:
        y = height - 24
        out.append(
            f'<rect x="{x}" y="{y}" width="14" height="14" rx="3" fill="{COLOURS[source]}"/>'
            f'<text x="{x + 20}" y="{y + 12}" fill="#333333">{text}</text>'
        )
        x += 40 + 7 * len(text)
    out.append(f'<text x="{x}" y="{height - 12}" fill="#333333">filled: drafted</text></svg>')
    (Path(__file__).parent / "joined.svg").write_text("\n".join(out) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
