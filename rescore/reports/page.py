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
from typing import Annotated, Any

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from lattices.errors import RescoreError
from lattices.paths import user_path
from lm.environment import versions
from lm.files import atomic_file
from rescore.bootstrap import LEAST_GROUPS
from rescore.reports.charts.cost_charts import cost_sections
from rescore.reports.charts.figures import WORDS
from rescore.reports.charts.head_charts import head_sections
from rescore.reports.charts.rescorer_charts import rescorer_sections
from rescore.reports.charts.style import Palette, palette_of
from rescore.reports.explorer import explorer_data
from rescore.reports.headline import make_headline
from rescore.reports.sources import TaskView, load_sources
from rescore.reports.token_text import harmless, tokenizer_of
from rescore.runs.evaluated import Evaluation
from rescore.runs.inputs import Progress
from rescore.runs.tables import results_csv
from rescore.table import GAIN, GAIN_INTERVAL, NUMBER, NUMBER_INTERVAL, Table, escaped, percent

TEMPLATES = Path(__file__).parent / "templates"
DEFAULT_EXAMPLES = 8


@dataclass(frozen=True)
class Written:
    """The files of a report and what it could not show."""

    html: Path
    markdown: Path
    csv: Path
    missing: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of a report."""
        files = [self.html, self.markdown, self.csv]
        return {"files": [str(path) for path in files], "missing": list(self.missing)}

    def lines(self) -> str:
        """Each file with its size."""
        files = (self.html, self.markdown, self.csv)
        return "\n".join(f"{path} ({path.stat().st_size / 1e3:,.0f} kB)" for path in files)


def report(
    results: Annotated[
        Sequence[Evaluation | Path] | Evaluation | Path,
        "Folders of rescore eval --out or rescore suite, or a folder of such folders.",
        "RESULTS",
    ],
    out: Annotated[str | Path, "The page, a name that ends with .html; .md and .csv are written beside it."],
    *,
    examples: Annotated[int, "Examples of each task in the lattice explorer; 0 leaves it out."] = DEFAULT_EXAMPLES,
    progress: Progress | None = None,
) -> Written:
    """Writes a page of results: `out` (.html), and .md and .csv beside it.

    results: evaluations, or the folders of `rescore eval --out` or `rescore suite --out`.
    examples: of each task, in the lattice explorer (0: no explorer).
    Raises `RescoreError` for folders without finished results, another suffix or a negative number, `OutputError` if a
    file can't be written.
    """
    out = user_path(out, "--out")
    if isinstance(results, Evaluation | Path):
        results = [results]
    if out.suffix != ".html":
        raise RescoreError(f"--out {out} must end with .html; Markdown and CSV get the same name")
    if examples < 0:
        raise RescoreError(f"--examples {examples} is negative; give 0 or more")
    sources = load_sources(results, progress=progress)
    views = sources.views
    palette = palette_of((r.rescorer, r.p) for view in views for r in view.results)
    sections = [
        *rescorer_sections(views, palette), *cost_sections(views, palette), *head_sections(views, sources.h_max)
    ]  # fmt: skip
    explorers, notes = _explorers(views, palette, examples)
    content: dict[str, Any] = {
        "views": views,
        "palette": palette,
        "headline": make_headline(views),
        "sections": sorted(sections, key=lambda section: list(WORDS).index(section.key)),
        "explorers": explorers,
        "missing": (*sources.missing, *notes),
    }
    written = Written(out, out.with_suffix(".md"), out.with_suffix(".csv"), content["missing"])
    texts = {
        written.html: _html(**content),
        written.markdown: _environment().get_template("page.md").render(content),
        written.csv: _csv(views),
    }
    for path, text in texts.items():
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    return written


def _explorers(views: Sequence[TaskView], palette: Palette, examples: int) -> tuple[list[Any], list[str]]:
    tokenizers: dict[str, Any] = {}  # and the sentence where there is none, by the base model
    data = []
    for view in views if examples else ():
        key = repr(view.base)
        tokenizers[key] = tokenizers.get(key) or tokenizer_of(view.base)
        data.append(explorer_data(view, palette, tokenizers[key][0], examples=examples))
    notes = [*(note for _, note in tokenizers.values() if note), *(note for each in data for note in each["notices"])]
    return data, list(dict.fromkeys(notes))


def _csv(views: Sequence[TaskView]) -> str:
    """A line for every task, rescorer and p, with a header; empty cells where a number is not known."""
    tables = [
        results_csv(view.results, task=view.label, mode=view.analysis.mode, folder=view.run.folder) for view in views
    ]
    columns = max((table.columns for table in tables), key=len)  # shorter blocks have fewer
    rows = [[*row, *[None] * (len(columns) - len(row))] for table in tables for row in table.rows]
    return Table(columns, rows).csv()


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=lambda name: name != "page.md", trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(
        number=NUMBER.show, interval=NUMBER_INTERVAL.show, gain=GAIN.show, gain_interval=GAIN_INTERVAL.show,
        share=percent(0).show, json=json_text, harmless=lambda text: harmless(str(text)), escaped=escaped,
    )  # fmt: skip
    return environment


def _html(*, views: Sequence[TaskView], sections: Sequence[Any], explorers: Sequence[Any], **content: Any) -> str:
    """The page; a function of its arguments alone, so that equal results give equal pages."""
    library = get_plotlyjs()
    assert "</script" not in library.lower()
    scripts = [(TEMPLATES / name).read_text(encoding="utf-8") for name in ("charts.js", "explorer.js")]
    scripts = scripts if explorers else scripts[:1]
    return _environment().get_template("page.html").render(
        content,
        views=views,
        sections=sections,
        explorers=explorers,
        figures={f"{section.key}-{i}": chart.figure for section in sections for i, chart in enumerate(section.charts)},
        few_groups=all(view.analysis.groups < LEAST_GROUPS for view in views),
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        library=Markup(library),
        scripts=[Markup(script) for script in scripts],
        policy=_policy([library, *scripts]),
        version=versions()["rescore"],
    )  # fmt: skip


def json_text(value: Any) -> Markup:
    """JSON for a script element, in ASCII: no `</`, no `<!--`."""
    return htmlsafe_json_dumps(value, separators=(",", ":"), allow_nan=False)


def _policy(scripts: Sequence[str]) -> str:
    """The page's own security policy: its scripts by hash, styles and images of its own, and no connection."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    named = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {named}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
