"""A report holds every number once, escapes all text, and says what it can't show."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import refused
from evaluating import evaluated

from lattices.errors import InvalidDataError, OutputError
from rescore.reports.page import report as write_report
from rescore.runs.evaluated import load_run
from rescore.studies.cost.decoders import decoder_of, heads_of
from rescore.studies.cost.model import cost_table

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} \u202eevil\u0007 "
    "\u05e9\u05dc\u05d5\u05dd \U0001f469\u200d\U0001f680"
)


def run_into(folder: Path, options: dict, **changes) -> Path:
    evaluated(dict(**{**options, **changes}), out=folder)
    return folder


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    contexts = ["The tower is tall.", HOSTILE, "x" * 100_000, "Four", "Five"]
    lines = [
        {
            "id": f"id {i} {HOSTILE if i == 1 else ''}",
            "question": f"What, {i}?",
            "context": text,
            "answers": [text[:50]],
        }
        for i, text in enumerate(contexts)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


@pytest.fixture
def options(tiny_folder: Path, tiny_heads_folder: Path, data_file: Path) -> dict:
    return {
        "base": str(tiny_folder), "heads": str(tiny_heads_folder), "data": str(data_file), "device": "cpu", "k": 4,
        "max_new_tokens": 8, "max_prompt_tokens": 64, "rescorers": ("none", "oracle"), "p": (1, 2),
    }  # fmt: skip


@pytest.fixture
def results(options, tmp_path: Path, cache_folder: Path) -> Path:
    return run_into(tmp_path / "run", options)


class Page(HTMLParser):
    """Tags and JSON blocks of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.blocks: list[tuple[dict, str]] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.blocks.append((dict(attrs), ""))

    def handle_data(self, data):
        if self.cdata_elem == "script" and data:
            attributes, text = self.blocks[-1]
            self.blocks[-1] = attributes, text + data

    def json(self, **wanted) -> list:
        return [
            json.loads(text)
            for attributes, text in self.blocks
            if attributes.get("type") == "application/json"
            and all(attributes.get(name.rstrip("_")) == value for name, value in wanted.items())
        ]


def report(results: Path | list[Path], tmp_path: Path, **options):
    folders = results if isinstance(results, list) else [results]
    return write_report(folders, tmp_path / "out" / "report.html", **options)


def test_three_files_with_the_same_numbers(results, tmp_path):
    written = report(results, tmp_path)
    document = json.loads((results / "results.json").read_text())
    rows = list(csv.DictReader(written.csv.open(newline="")))
    assert [(r["rescorer"], r["p"]) for r in rows] == [("none", "1"), ("none", "2"), ("oracle", "1")]
    page, markdown = written.html.read_text(), written.markdown.read_text()
    for row, result in zip(rows, document["results"], strict=True):
        assert float(row["block_efficiency"]) == pytest.approx(result["block_efficiency"], rel=1e-5)
        shown = f"{result['block_efficiency']:.3f}"
        assert shown in page and shown in markdown
    assert {(r["examples"], r["groups"], r["cut_at_limit"]) for r in rows} == {("5", "5", "1.0")}
    assert "5 examples (5 groups), replay" in page and "squad (examples: 5, groups: 5)" in markdown
    assert "(100% of the outputs cut at the token limit)" in page
    assert float(rows[-1]["oracle_gap_recovered"]) == pytest.approx(1.0)
    assert not written.missing


def test_the_embedded_sample_is_told_at_the_top(options, tmp_path, cache_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {name: value for name, value in options.items() if name != "data"}
    written = report(run_into(tmp_path / "run", given, limit=2, max_prompt_tokens=400), tmp_path)
    head = written.html.read_text().split("<main")[0]
    assert "squad: the examples are those embedded for the task" in head
    assert "replay, embedded sample" in written.html.read_text()
    assert "embedded for the task" in written.markdown.read_text()


def test_equal_results_give_equal_pages(results, tmp_path):
    first = report(results, tmp_path).html.read_bytes()
    assert report(results, tmp_path).html.read_bytes() == first


def test_nothing_is_loaded_from_elsewhere(results, tmp_path):
    page = Page(report(results, tmp_path).html)
    for tag, attributes in page.tags:
        assert not attributes.keys() & {"src", "onerror", "onclick", "onload"}, (tag, attributes)
        assert tag != "link" and attributes.get("href", "#").startswith("#")
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "Policy" in a.get("http-equiv", ""))
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-eval" not in policy
    assert "base-uri 'none'" in policy and "form-action 'none'" in policy


def test_names_cannot_reach_the_terminal_or_a_spreadsheet(results, tmp_path):
    """A rescorer's name comes from the results; here with an escape sequence, a mark of direction and a formula."""
    for name in ("results.json", "examples.jsonl"):
        text = (results / name).read_text()
        (results / name).write_text(text.replace('"oracle"', json.dumps("=o\x1b[2J\u202e")))
    written = report(results, tmp_path)
    assert "'=o\\x1b[2J\\u202e" in written.csv.read_text()
    page = Page(written.html)
    library = next(text for attributes, text in page.blocks if attributes.get("id") == "plotly")
    for text in (page.text.replace(library, ""), written.csv.read_text(), written.markdown.read_text()):
        assert not any(c in text for c in "\x1b\u202e")
    shown = [attributes["data-rescorer"] for _, attributes in page.tags if "data-rescorer" in attributes]
    (figures,) = page.json(id="figures")
    drawn = {trace["meta"]["rescorer"] for trace in figures["efficiency-0"]["data"]}
    assert drawn == set(shown) == {"none", "=o\u27e8U+001B\u27e9[2J\u27e8U+202E\u27e9"}


def test_positions_that_no_step_reached_have_no_conditional_share(results, tmp_path):
    document = json.loads((results / "results.json").read_text())
    document["results"][0].update(marginal=[1.0, 0.5, 0.0, 0.0], conditional=[1.0, 0.5, 0.0, None])
    (results / "results.json").write_text(json.dumps(document))
    markdown = report(results, tmp_path).markdown.read_text()
    assert "| squad | none | 1 | i, given i - 1 | 1.000 | 0.500 | 0.000 | - |" in markdown


def test_untrusted_text_stays_text(results, tmp_path):
    written = report(results, tmp_path)
    page = Page(written.html)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 5  # figures, explorer, the library, two of ours
    assert not [tag for tag, _ in page.tags if tag == "img"]
    library = next(text for attributes, text in page.blocks if attributes.get("id") == "plotly")
    ours = page.text.replace(library, "")
    assert "\u202e" not in ours and "\u0007" not in ours and "\\u202e" not in ours
    (data,) = page.json(class_="explorer-data")
    texts = [example["prompt"]["head"] for example in data["examples"]]
    hostile = next(text for text in texts if "alert(1)" in text)
    assert "</script>" in hostile and "\u27e8U+202E\u27e9" in hostile and "\U0001f469\u200d\U0001f680" in hostile


def test_a_long_document_is_cut_in_the_middle(results, tmp_path):
    (data,) = Page(report(results, tmp_path).html).json(class_="explorer-data")
    left_out = max(example["prompt"]["leftOut"] for example in data["examples"])
    assert 97_000 < left_out < 100_000


def test_the_explorer_holds_what_the_decodes_did(results, tmp_path):
    (data,) = Page(report(results, tmp_path).html).json(class_="explorer-data")
    records = [json.loads(line) for line in (results / "examples.jsonl").read_text().splitlines()]
    first = next(e for e in data["examples"] if e["id"].startswith("id 0"))
    assert data["lattices"] and data["shown"] == data["k"] == data["h"] == 4
    for place, decode in enumerate(data["decodes"]):
        record = next(
            r
            for r in records
            if r["id"].startswith("id 0") and (r["rescorer"], r["p"]) == (decode["rescorer"], decode["p"])
        )
        assert first["accepted"][place] == record["accepted"] and first["output"] == record["output_ids"]
        start = 0
        assert first["drafts"][place] == record["drafts"]
        for n in record["accepted"]:
            slots = first["lattice"][str(start)]
            assert slots["r"][0] == 0  # slot 1 is the base's own choice
            assert all(sum(slot) <= 10_001 and slot == sorted(slot, reverse=True) for slot in slots["p"])
            start += n
    assert all(str(token) in data["vocabulary"] for token in first["output"])


def test_fewer_examples_and_none(results, tmp_path):
    (data,) = Page(report(results, tmp_path, examples=2).html).json(class_="explorer-data")
    assert len(data["examples"]) == 2 and "2 of 5 examples" in data["chosen"]
    page = Page(report(results, tmp_path, examples=0).html)
    assert (
        not page.json(class_="explorer-data") and "explorer-app" not in page.text.split("<main")[1].split("</main")[0]
    )


def test_one_example_has_no_interval_and_the_page_says_so(options, tmp_path, cache_folder):
    written = report(run_into(tmp_path / "one", options, limit=1), tmp_path)
    assert "too few groups (sources that examples share) for an interval" in written.missing[0]
    assert "too few groups of examples for an interval" in written.html.read_text()
    row = next(csv.DictReader(written.csv.open(newline="")))
    assert row["block_efficiency"] and row["block_efficiency_low"] == ""


def test_a_trace_that_is_gone_costs_only_what_is_read_from_it(results, tmp_path, cache_folder):
    for header in cache_folder.rglob("trace.json"):
        header.unlink()
    written = report(results, tmp_path)
    assert "no longer there" in written.missing[0]
    command = re.search(r"rescore trace .*", written.missing[0]).group(0)
    for part in ("--task squad", "--limit 5", "--max-new-tokens 8", "--max-prompt-tokens 64", "--out "):
        assert part in command
    page = Page(written.html)
    (data,) = page.json(class_="explorer-data")
    assert not data["lattices"] and data["examples"][0]["accepted"][0] and "1.000" in page.text
    (figures,) = page.json(id="figures")
    assert any(name.startswith("acceptance") for name in figures)
    assert not any(name.startswith("entropy") for name in figures)


def test_a_broken_trace_is_told_and_passed_over(results, tmp_path, cache_folder):
    header = next(cache_folder.rglob("trace.json"))
    header.write_text(header.read_text().replace("rescore.trace/1", "rescore.trace/0"))
    assert "can't be used" in report(results, tmp_path).missing[0]


def test_a_tokenizer_that_is_gone_leaves_ids(results, tmp_path, tiny_folder):
    moved = tiny_folder.rename(tiny_folder.with_name("elsewhere"))
    try:
        written = report(results, tmp_path)
    finally:
        moved.rename(tiny_folder)
    assert "shown as ids" in written.missing[0]
    (data,) = Page(written.html).json(class_="explorer-data")
    assert all(text == f"#{token}" for token, text in data["vocabulary"].items())


def test_several_runs_and_what_was_not_run(results, options, tmp_path):
    other = run_into(tmp_path / "other", options, p=(1,))
    written = report([results, other], tmp_path)
    page = written.html.read_text()
    assert "squad (run)" in page and "squad (other)" in page and ">not run</td>" in page
    assert any(
        "squad (other): not run there, so its cells of the tables are empty: none (p = 2)" in line
        for line in written.missing
    )


def test_a_folder_of_results_folders(results, options, tmp_path):
    (tmp_path / "all").mkdir()
    results.rename(tmp_path / "all" / "a")
    run_into(tmp_path / "all" / "b", options, limit=2)
    assert len(list(csv.DictReader(report(tmp_path / "all", tmp_path).csv.open(newline="")))) == 6


def test_an_example_without_steps_is_passed_over(results, tmp_path):
    lines = [json.loads(line) for line in (results / "examples.jsonl").read_text().splitlines()]
    for line in lines:
        if line["id"] == lines[0]["id"]:
            line.update(accepted=[], drafts=[], oracle_accepted=[], unrescored_accepted=[], output_ids=[])
    (results / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (data,) = Page(report(results, tmp_path).html).json(class_="explorer-data")
    assert len(data["examples"]) == 4


def test_live_results_have_times(options, tmp_path, cache_folder):
    written = report(run_into(tmp_path / "live", options, mode="live", limit=2), tmp_path)
    page = Page(written.html)
    (figures,) = page.json(id="figures")
    assert "x autoregressive speed" in page.text and "time-0" in figures and "Measured live" in page.text
    assert next(csv.DictReader(written.csv.open(newline="")))["verify_ms"]


class TestTrouble:
    def test_no_results(self, tmp_path):
        assert "rescore eval --out" in refused(lambda: report(tmp_path / "none", tmp_path))

    def test_still_being_written(self, results, tmp_path):
        (results / "results.json").unlink()
        assert "has not finished" in refused(lambda: report(results, tmp_path))
        assert not (tmp_path / "out").exists()

    def test_another_schema(self, results, tmp_path):
        document = json.loads((results / "results.json").read_text())
        (results / "results.json").write_text(json.dumps({**document, "schema": "rescore.results/1"}))
        assert "rescore.results/1" in refused(lambda: report(results, tmp_path), InvalidDataError)

    @pytest.mark.parametrize("change", [{"marginal": None}, {"block_efficiency": "much"}, {"task": 7}, {"gain": "x"}])
    def test_results_with_something_else_in_them(self, results, tmp_path, change):
        document = json.loads((results / "results.json").read_text())
        document["results"][0].update(change)
        (results / "results.json").write_text(json.dumps(document))
        refused(lambda: report(results, tmp_path), InvalidDataError)

    def test_names_and_numbers_that_do_not_fit(self, results, tmp_path):
        assert ".html" in refused(lambda: write_report([results], tmp_path / "report.pdf"))
        assert "--examples -1" in refused(lambda: report(results, tmp_path, examples=-1))

    def test_a_place_that_cannot_be_written(self, results, tmp_path):
        (tmp_path / "file").write_text("")
        refused(lambda: write_report([results], tmp_path / "file" / "report.html"), OutputError)


def test_the_cost_model_has_the_methods_that_were_run(options, tmp_path, cache_folder):
    """Per token: what a step costs by `rescore.studies.cost.model`, over the tokens of a step."""
    folder = run_into(tmp_path / "run", options, rescorers=("none", "oracle"), p=(1, 16))
    written = write_report([folder], tmp_path / "report.html")
    run = load_run(folder)
    decoder = decoder_of(options["base"])
    table = cost_table(
        decoder, h=4, heads=heads_of(decoder, Path(options["heads"]), 4), neural=None, dtype="float32",
        block_efficiency={"unrescored": run.results[0].block_efficiency}, contexts=(512,),
    )  # fmt: skip
    (cost,) = [c for c in table.costs if c.method == "unrescored"]
    page = written.html.read_text()
    section = page[page.index('<section id="cost-model"') :]
    section = section[: section.index("</section>")]
    cells = re.findall(r"<td>(.*?)</td>", section)
    place = cells.index("unrescored")
    row = next(
        cells[i - 1 : i + 10] for i in range(place, len(cells)) if cells[i : i + 3] == ["unrescored", "1", "512"]
    )
    assert row[5:8] == [
        f"{cost.weight_bytes / 1e9:.3f}", f"{cost.kv_bytes / 1e6:.2f}", f"{cost.flops / 1e9:.2f}",
    ]  # fmt: skip
    assert "16-best 0-gram" in cells and "autoregressive" in cells and "4-gram" not in cells
