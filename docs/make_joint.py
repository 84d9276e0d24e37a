"""Writes docs/joint.svg, the reliability diagram of the shipped weights of `joint`: `python docs/make_joint.py`.

A test compares the picture with what this would write, so it can't fall behind.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rescore.rescorers.joint_weights import JointFit

PICTURE = Path(__file__).parent / "joint.svg"
NAME = "smollm2-135m/joint/heads+lookup.json"
SIDE, LEFT, TOP = 300, 70, 56  # of the square, in pixels
BARS, GAP = 60, 26  # height of the bars below it, and what is between
INK, SOFT, LINE, COLOUR = "#1f2937", "#6b7280", "#d1d5db", "#2563eb"


def shipped() -> JointFit:
    """The weights, with how well their probabilities hold."""
    from lm.files import SHIPPED
    from lm.records import read_record
    from rescore.rescorers.joint_weights import JointFit

    return read_record(SHIPPED / NAME, JointFit, missing=f"no {NAME}", advice="fit them")


def diagram(fit: JointFit) -> str:
    """The picture: above, what came true of candidates by their probability; below, how many there were."""
    bottom = TOP + SIDE
    base = bottom + GAP + BARS
    most = math.log10(max(fit.counts))
    marks, bars, distances = [], [], []
    for place, (count, said, right) in enumerate(zip(fit.counts, fit.confidences, fit.accuracies, strict=True)):
        if not count or said is None or right is None:
            continue
        x, y = LEFT + said * SIDE, bottom - right * SIDE
        distances.append((place, count, abs(right - said)))
        marks.append((x, y, f"said {said:.1%}, right {right:.1%} ({count:,} candidates)"))
        width = SIDE / len(fit.counts)
        height = max(1.0, math.log10(count) / most * BARS)
        bars.append(
            f'<rect x="{LEFT + place * width + 1:.1f}" y="{base - height:.1f}" width="{width - 2:.1f}" '
            f'height="{height:.1f}"><title>{count:,} candidates</title></rect>'
        )
    above = [(count, distance) for place, count, distance in distances if place]
    likely = sum(count * distance for count, distance in above) / sum(count for count, _ in above)
    grid = "".join(
        f'<path d="M{LEFT + part * SIDE:g} {TOP}v{SIDE}M{LEFT} {bottom - part * SIDE:g}h{SIDE}"/>'
        for part in (0, 0.25, 0.5, 0.75, 1)
    )
    ticks = "".join(
        f'<text x="{LEFT - 8}" y="{bottom - part * SIDE + 5:g}" text-anchor="end">{part:.0%}</text>'
        f'<text x="{LEFT + part * SIDE:g}" y="{base + 18}" text-anchor="middle">{part:.0%}</text>'
        for part in (0, 0.5, 1)
    )
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in marks)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{text}</title></circle>' for x, y, text in marks)
    notes = [
        f"{sum(fit.counts):,} candidates after {fit.prefixes:,} right prefixes",
        f"of {fit.examples} held-out examples ({fit.groups} sources); drafters: {' + '.join(fit.drafters)}",
        "Each half of the sources is judged by weights fitted on the other.",
        f"Calibration error (mean distance from the diagonal): {fit.calibration_error:.4f};",
        f"most candidates are unlikely: of those above {1 / len(fit.counts):.0%} alone {likely:.4f}",
        f"Log-loss: {fit.log_loss:.3f} nats a prefix",
    ]
    beside = "".join(
        f'<text x="{LEFT + SIDE + 34}" y="{TOP + 44 + 24 * row}">{n}</text>' for row, n in enumerate(notes)
    )
    label = "Reliability diagram: points lie near the diagonal, so the probabilities of joint can be believed."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 {base + 46}" font-family="system-ui, sans-serif" '
        f'font-size="14" role="img" aria-label="{label}">\n'
        f'<rect width="920" height="{base + 46}" fill="#ffffff"/>\n'
        f'<g stroke="{LINE}" fill="none">{grid}</g>\n'
        f'<path d="M{LEFT} {bottom}L{LEFT + SIDE} {TOP}" stroke="{SOFT}" stroke-width="1.5" stroke-dasharray="6 5"/>\n'
        f'<polyline points="{points}" fill="none" stroke="{COLOUR}" stroke-width="2"/>\n'
        f'<g fill="{COLOUR}">{dots}</g>\n<g fill="{LINE}">{"".join(bars)}</g>\n'
        f'<g fill="{SOFT}">{ticks}{beside}'
        f'<text x="{LEFT}" y="{base + 38}">probability that joint gives a candidate (bars: how many, log scale)</text>'
        f'<text x="18" y="{bottom}" transform="rotate(-90 18 {bottom})">share that the base then said</text></g>\n'
        f'<g fill="{INK}"><text x="{LEFT}" y="30" font-weight="600" font-size="16">Are the probabilities of joint to '
        f'be believed?</text><text x="{LEFT + SIDE + 34}" y="{TOP + 16}">On the dashed diagonal they hold exactly.'
        "</text></g>\n"
        "</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(diagram(shipped()), encoding="utf-8")
