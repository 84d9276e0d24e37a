"""The report as one HTML file that needs nothing else, with the same as Markdown and CSV beside it.

All text is escaped by the templates; data travels as JSON in elements that are never run. The page forbids itself every
connection and every script but its own three, which it names by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lattices.errors import RescoreError
from lm.files import atomic_file
from rescore.bootstrap import LEAST_GROUPS
from rescore.report.charts.figures import Section, interval, number, percent
from rescore.report.charts.head_charts import head_sections
from rescore.report.charts.rescorer_charts import rescorer_sections
from rescore.report.charts.style import Look, dashes, decode_name, looks
from rescore.report.explorer import SHOWN, explorer_data
from rescore.report.exports import csv_text, markdown_text
from rescore.report.headline import Headline, make_headline
from rescore.report.sources import Sources, TaskView, json_text, load_sources
from rescore.report.token_text import harmless, tokenizer_of
from rescore.runs.environment import versions
from rescore.runs.inputs import Progress
from rescore.runs.records import Result

TEMPLATES = Path(__file__).parent / "templates"
DEFAULT_EXAMPLES = 8
SWATCHES = {"circle": "●", "circle-open": "○", "square": "■", "diamond": "◆", "triangle-up": "▲", "triangle-down": "▼",
            "star": "★", "cross": "✚", "pentagon": "⬟", "hexagon2": "⬢"}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """The files of a report and what it could not show."""

    html: Path
    markdown: Path
    csv: Path
    missing: tuple[str, ...]


def write_report(
    folders: Sequence[Path], out: Path, *, examples: int = DEFAULT_EXAMPLES, progress: Progress | None = None
) -> Written:
    """Reads results folders and writes `out` (.html), and .md and .csv beside it.

    `examples`: of each task, in the lattice explorer (0: no explorer). Raises `RescoreError` for folders without
    finished results, another suffix or a negative number, `OutputError` if a file can't be written.
    """
    if out.suffix != ".html":
        raise RescoreError(f"--out {out} must end with .html; Markdown and CSV get the same name")
    if examples < 0:
        raise RescoreError(f"--examples {examples} is negative; give 0 or more")
    sources = load_sources(folders, progress=progress)
    found = looks(r.rescorer for view in sources.views for r in view.results)
    sections = [
        *rescorer_sections(sources.views, found),
        *head_sections(sources.views, sources.h_max),
    ]
    headline = make_headline(sources.views)
    explorers, notes = _explorers(sources.views, found, examples)
    samples = (
        f"{view.label}: the examples are those embedded for the task, whose numbers do not compare with the real data "
        "set's (rescore eval --data PATH)"
        for view in sources.views if view.is_sample
    )  # fmt: skip
    missing = (*samples, *sources.missing, *notes)
    texts = {
        out: page_html(sources, headline, sections, explorers, missing, found),
        out.with_suffix(".md"): markdown_text(sources.views, headline, sections, missing),
        out.with_suffix(".csv"): csv_text(sources.views),
    }
    for path, text in texts.items():
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    return Written(out, out.with_suffix(".md"), out.with_suffix(".csv"), missing)


def _explorers(views: Sequence[TaskView], found: dict[str, Look], examples: int) -> tuple[list[Any], list[str]]:
    """The explorer's data of every view, and sentences on tokenizers that are lacking."""
    if examples == 0:
        return [], []
    tokenizers: dict[str, Any] = {}
    notes: dict[str, None] = {}
    data = []
    for view in views:
        base = view.run.config.traces[view.task].get("base")
        if (key := repr(base)) not in tokenizers:
            tokenizers[key], note = tokenizer_of(base)
            if note:
                notes[note] = None
        data.append(explorer_data(view, found, tokenizers[key], examples=examples))
    return data, list(notes)


def page_html(
    sources: Sources,
    headline: Headline,
    sections: Sequence[Section],
    explorers: Sequence[dict[str, Any]],
    missing: Sequence[str],
    found: dict[str, Look],
) -> str:
    """The page; a function of its arguments alone, so that equal results give equal pages."""
    from plotly.offline import get_plotlyjs

    views = sources.views
    library = get_plotlyjs()
    assert "</script" not in library.lower()
    scripts = [_template("charts.js")]
    if explorers:
        scripts.append(_template("explorer.js"))
    ps = sorted({r.p for view in views for r in view.results})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(
        number=number, percent=percent, interval=interval, json=_json, harmless=lambda text: harmless(str(text))
    )
    figures = {f"{section.key}-{i}": chart.figure for section in sections for i, chart in enumerate(section.charts)}
    return environment.get_template("page.html").render(
        views=views,
        headline=headline,
        sections=sections,
        missing=missing,
        figures=figures,
        explorers=explorers,
        looks=found,
        swatches=SWATCHES,
        dashes=dashes(ps),
        ps=ps,
        style=Markup(_template("page.css")),
        library=Markup(library),
        scripts=[Markup(script) for script in scripts],
        policy=_policy([library, *scripts]),
        decode_name=decode_name,
        shown=SHOWN,
        facts=_facts(views),
        few_groups=all(r.groups < LEAST_GROUPS for view in views for r in view.results),
        version=versions()["rescore"],
    )


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _json(value: Any) -> Any:
    return Markup(json_text(value))


def _policy(scripts: Sequence[str]) -> str:
    """The page's own security policy: its scripts by hash, styles and images of its own, and no connection."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    named = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {named}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _facts(views: Sequence[TaskView]) -> list[tuple[str, list[tuple[str, str]]]]:
    """How each view's numbers were made, as (name, value) pairs."""
    found = []
    for view in views:
        config, inputs = view.run.config, view.run.config.inputs[view.task]
        made_of = config.traces[view.task]
        base = made_of.get("base")
        data = config.data.get(view.task, {})
        facts: list[tuple[str, Any]] = [
            ("results", str(view.run.folder)),
            ("mode", config.mode),
            ("base model", base.get("name") if isinstance(base, dict) else None if inputs.trace else inputs.base),
            ("base weights (sha256)", base.get("weights_sha256") if isinstance(base, dict) else None),
            ("tokenizer (sha256)", base.get("tokenizer_sha256") if isinstance(base, dict) else None),
            ("heads (sha256)", made_of.get("heads_sha256")),
            ("data", " ".join(str(data[name]) for name in ("kind", "path", "sha256") if data.get(name))),
            ("trace", inputs.trace),
            ("examples", max(r.n for r in view.results)),
            ("groups (sources that examples share)", max(r.groups for r in view.results)),
            ("h, k", f"{view.analysis.h}, {view.analysis.k}"),
            ("new tokens, at most", made_of.get("max_new_tokens")),
            ("prompt tokens, at most", made_of.get("max_prompt_tokens")),
            ("precision", base.get("dtype") if isinstance(base, dict) else None if inputs.trace else inputs.dtype),
            ("device", f"{config.device}, {config.threads} threads"),
            ("weights (alpha)", "; ".join(_alphas(view))),
            ("quality of the output", _quality(view.results)),
            ("notices of the run", "; ".join(config.notices)),
            ("versions", ", ".join(f"{name} {of}" for name, of in config.versions.items())),
            ("git revision", config.git_revision),
        ]
        found.append((view.label, [(name, str(value)) for name, value in facts if value not in (None, "")]))
    return found


def _alphas(view: TaskView) -> list[str]:
    return [
        f"{decode_name(a.rescorer, a.p)}: {a.alpha:g} ({a.alpha_source or 'given'})"
        for a in view.analysis.rescorers
        if a.alpha is not None
    ]


def _quality(results: Sequence[Result]) -> str:
    """Metrics of the task; the same for every exact rescorer, so those of the first result that has any."""
    for result in results:
        if result.quality:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in result.quality.items())
            cut = result.cut_at_limit
            return shown if cut is None else f"{shown} ({cut:.0%} of the outputs cut at the token limit)"
    return ""
