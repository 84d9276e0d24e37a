"""The page in a real browser: no errors, no sideways scrolling, the explorer by mouse and keyboard, tables without
JavaScript, paper. Skipped where there is no Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluating import evaluated
from test_report_page import data_file, options, results, run_into  # noqa: F401 (fixtures)

from rescore.acceptance import load_rule
from rescore.acceptance.sampling import Sampling
from rescore.reports.page import report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install rescore[dev])")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def address(results: Path, tmp_path: Path) -> str:  # noqa: F811
    return report([results], tmp_path / "report.html").html.as_uri()


def opened(browser, address: str, **context):
    """A page with the messages and requests that it made."""
    page = browser.new_context(**context).new_page()
    page.complaints, page.requests = [], []
    page.on("console", lambda m: page.complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("dialog", lambda dialog: (page.complaints.append(dialog.message), dialog.dismiss()))
    page.goto(address)
    return page


def show_all(page) -> int:
    """Scrolls to every chart; how many there are."""
    plots = page.locator(".plot")
    for i in range(plots.count()):
        plots.nth(i).scroll_into_view_if_needed()
        page.wait_for_selector(f".plot >> nth={i} >> .main-svg >> nth=0", state="attached")
    return plots.count()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_opens_cleanly_at_any_width(browser, address, width, scheme):
    page = opened(browser, address, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert show_all(page) >= 8
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.complaints == [] and all(url.startswith(("file:", "data:", "blob:")) for url in page.requests)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)")
    drawn = page.locator(".plot .main-svg").first.evaluate("svg => svg.style.background")
    assert drawn == ground


def test_the_explorer_by_keyboard(browser, address):
    page = opened(browser, address)
    page.locator("#explorer-app").focus()
    status = page.locator("#ex-status")
    assert status.text_content().startswith("Step 1 of ")
    page.keyboard.press("ArrowRight")
    assert status.text_content().startswith("Step 2 of ")
    assert page.locator(".block").nth(1).get_attribute("aria-pressed") == "true"
    page.keyboard.press("End")
    steps = page.locator(".block").count()
    assert status.text_content().startswith(f"Step {steps} of {steps}")
    assert page.locator("#ex-drafts td.why", has_text="the output ends here").count() > 0
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert status.text_content().startswith("Step 1 of ")
    assert page.complaints == []


def test_the_explorer_by_mouse(browser, address):
    page = opened(browser, address)
    page.click("#ex-next")
    page.locator(".block").last.click()
    assert page.locator("#ex-next").is_disabled()
    page.select_option("#ex-decode", label="oracle")
    assert "of oracle" in page.text_content("#ex-status")
    page.select_option("#ex-example", index=2)
    page.click("summary:has-text('Prompt and reference')")
    assert page.text_content("#ex-status").startswith("Step 1 of ")
    assert page.locator("#ex-lattice tbody tr").count() == 4
    assert page.locator("#ex-lattice td.wanted").count() >= 1
    rows = page.locator("#ex-drafts tbody tr")
    assert "base" in rows.first.text_content() and rows.count() >= 3
    assert page.complaints == []


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Sampling(3.0), " was not accepted; drawn instead: "),
        (load_rule("top-k:2"), " does not fit; the base"),
    ],
)
def test_a_draft_stops_by_its_rule(browser, options, tmp_path, rule, words):  # noqa: F811
    evaluated(options | {"mode": "live", "rescorers": ("none",), "p": (1,)}, rule=rule, out=tmp_path / "live")
    page = opened(browser, report([tmp_path / "live"], tmp_path / "live.html").html.as_uri())
    reasons = []
    for step in range(page.locator(".block").count()):
        page.locator(".block").nth(step).click()
        reasons.append(page.locator("#ex-drafts tr.walked td.why").text_content())
    assert any(words in reason for reason in reasons), reasons
    assert not any("the base wants" in reason for reason in reasons)
    assert page.complaints == []


def test_the_joined_lattice_of_several_drafters(browser, options, tmp_path, cache_folder):  # noqa: F811
    specs = ("none", "lookup", "oracle:drafters=heads+lookup")
    folder = run_into(tmp_path / "joined", options, rescorers=specs, p=1, max_new_tokens=24)
    page = opened(browser, report([folder], tmp_path / "joined.html").html.as_uri())
    page.select_option("#ex-decode", label="oracle:drafters=heads+lookup")
    part, seen = page.locator("#ex-joined-part"), set()
    for place in range(page.locator("#ex-example option").count()):
        page.select_option("#ex-example", index=place)
        for step in range(page.locator(".block").count()):
            page.locator(".block").nth(step).click()
            assert part.is_visible() and part.locator("table").count() == 1
            assert "heads+lookup, of oracle:drafters=heads+lookup" in part.text_content()
            accepted = int(page.locator("#ex-drafts tr.walked td").first.text_content())
            assert part.locator("thead th").count() == 1 + accepted
            assert part.locator("td.wanted").count() == accepted - 1, "it stops where nobody proposes the right one"
            marks = page.locator("#ex-drafts tr.walked td.token-accepted .marks")
            assert marks.count() == accepted and marks.first.text_content() == ""
            seen |= {mark for text in marks.all_text_contents() for mark in text}
            # Drafts of other lengths keep their columns below the others'.
            cells = "rows => rows.map(row => row.cells.length)"
            assert len(set(page.locator("#ex-drafts tr").evaluate_all(cells))) == 1
    assert seen and seen <= {"H", "L"}
    page.select_option("#ex-decode", label="lookup")
    page.keyboard.press("End")
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]
    assert page.complaints == []


def test_hostile_prompts_are_shown_as_text(browser, address):
    page = opened(browser, address)
    names = page.locator("#ex-example option").all_text_contents()
    hostile = next(i for i, name in enumerate(names) if "id 1" in name)
    page.select_option("#ex-example", index=hostile)
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in page.text_content("#ex-prompt")
    assert page.complaints == [] and page.locator("main img").count() == 0


def test_switches_of_the_legend_hide_a_rescorer(browser, address):
    page = opened(browser, address)
    show_all(page)
    page.locator("#legend input[data-rescorer='oracle']").uncheck()
    page.wait_for_function(
        "document.querySelector('#acceptance .plot').data.filter(t => t.visible === false).length === 1"
    )
    assert page.complaints == []


def test_tables_are_readable_without_javascript(browser, address):
    page = opened(browser, address, java_script_enabled=False)
    assert page.locator("table.headline td .number").count() == 3
    assert page.locator("table.headline").is_visible()
    assert page.locator("noscript").count() == 2 and not page.locator("#explorer-app").is_visible()
    page.click("#acceptance summary")
    assert page.locator("#acceptance table").is_visible()


def test_prints_with_all_charts(browser, address):
    page = opened(browser, address, color_scheme="dark")
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and page.complaints == []
    assert page.locator(".plot[data-drawn]").count() == page.locator(".plot").count()
