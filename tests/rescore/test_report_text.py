"""Text and numbers of reports: tokens, tables, looks, intervals, the sentences of the first screen."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from conftest import byte_tokenizer
from made_records import made_result, run_config

from lm.training.heads import HeldOutAccuracy
from rescore.reports.charts.head_charts import _label_places
from rescore.reports.charts.style import COLOURS, palette_of, safe
from rescore.reports.headline import make_headline
from rescore.reports.page import json_text
from rescore.reports.sources import sweeps_of
from rescore.reports.token_text import excerpt, harmless, token_texts, tokenizer_of, visible
from rescore.runs.evaluated import Evaluation
from rescore.runs.inputs import Inputs
from rescore.runs.records import Alpha, Result, ResultsDocument, RunRecord
from rescore.studies.tables import accuracy_table
from rescore.table import Column, Table, percent


def test_every_character_of_a_token_shows():
    assert visible(" a\n\tb\u200b\u202e\x00\ud800\xa0") == ("␣a↵⇥b⟨U+200B⟩⟨U+202E⟩⟨U+0000⟩⟨U+D800⟩⟨U+00A0⟩")
    assert harmless("שלום \U0001f469\u200d\U0001f680\n") == "שלום \U0001f469\u200d\U0001f680\n"


def test_long_text_is_cut_in_the_middle():
    head, tail, left_out = excerpt("a" * 5000 + "z" * 5000)
    assert head + tail == "a" * len(head) + "z" * len(tail)
    assert left_out == 10_000 - len(head) - len(tail)
    assert excerpt("short") == ("short", "", 0)


def test_tokens_that_are_part_of_a_character_show_their_bytes():
    tokenizer = byte_tokenizer()
    ids = tokenizer("é a")["input_ids"]
    assert list(token_texts(tokenizer, ids).values()).count("\\xC3") == 1
    assert token_texts(tokenizer, ids)[ids[2]] == "␣"
    assert token_texts(tokenizer, [99_999]) == {99_999: "#99999"}
    assert token_texts(None, [5]) == {5: "#5"}


def test_models_that_are_not_here_are_not_fetched():
    tokenizer, note = tokenizer_of({"name": "nobody/has-this", "tokenizer_sha256": "x"})
    assert tokenizer is None and "is not on this machine" in note
    assert tokenizer_of({"anything": 1})[0] is None


@pytest.mark.parametrize("through_adapter", [False, True])
def test_the_hub_is_asked_for_nothing_even_where_part_of_a_model_is_cached(tmp_path, monkeypatch, through_adapter):
    """The name comes from results of others: it may be a hub id, or a folder whose adapter names one."""
    asked = []

    def snapshot_download(repository, **options):
        asked.append((repository, options["local_files_only"]))
        return str(tmp_path / "cached")  # as the hub's library does with only config.json in its cache

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "cached").mkdir()
    (tmp_path / "cached" / "config.json").write_text("{}")
    fields = {"peft_type": "LORA", "base_model_name_or_path": "somebody/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    name = str(tmp_path) if through_adapter else "somebody/base"
    tokenizer, note = tokenizer_of({"name": name})
    assert tokenizer is None and "can't be loaded" in note and asked == [("somebody/base", True)]


def test_json_for_a_script_element():
    text = json_text({"a": "</script><!--\u2028\ud800"})
    assert "<" not in text and "\u2028" not in text
    assert json.loads(text)["a"] == "</script><!--\u2028\ud800"


def test_text_for_browsers():
    assert safe("<b>&") == "&lt;b&gt;&amp;"


def test_a_rescorer_looks_the_same_whatever_else_was_run():
    found = palette_of((name, p) for name in ("none", *map(str, range(30)), "oracle", "none") for p in (16, 1))
    assert len({(look.colour, look.marker) for look in found.looks.values()}) == 32
    again = palette_of([("oracle", 1), ("none", 1)])
    assert found.looks["none"] == again.looks["none"] and list(again.looks) == ["oracle", "none"]
    assert found.looks["0"].colour == COLOURS[0] and found.dashes == {1: "solid", 16: "dash"}
    assert found.pen("0", 16).name == "0, p = 16" and found.pen("0", 16).meta == {"rescorer": "0", "p": 16}


def result(rescorer: str, value: float, *, p: int = 1, gain: float | None = None, low: float = 0.0) -> Result:
    ci95 = None if gain is None else (low, gain + 0.1)
    return made_result(
        rescorer=rescorer, p=p, block_efficiency=value, oracle_block_efficiency=2.0, gain=gain, gain_ci95=ci95
    )


def view(*results: Result):
    plain = next((r for r in results if r.is_unrescored), None)
    return SimpleNamespace(label="squad", task="squad", results=results, mark="", unrescored=plain)


def test_the_first_screen_says_who_is_best_and_how_much_is_left():
    best, other = result("b", 1.5, gain=0.25, low=0.2), result("a", 1.3, gain=0.1, low=-0.05)
    found = make_headline([view(result("none", 1.2), other, best, result("oracle", 2.0, gain=0.6))])
    assert [row.rescorer for row in found.rows] == ["oracle", "none", "a", "b"]
    assert [cell.best for row in found.rows for cell in row.cells] == [False, False, False, True]
    assert best.gap_share(result("none", 1.2)) == pytest.approx(0.375)
    assert "accepts 1.20 tokens" in found.sentences[0] and "2.00" in found.sentences[0]
    assert "the best of 2 rescorers is b, with +25.0% tokens a step, 38% of the way" in found.sentences[1]
    assert "no time was measured" in found.sentences[-1]


def test_where_no_time_was_measured_the_costs_predict_it():
    found = make_headline([view(made_result(predicted_speedup=1.1), made_result(rescorer="a", predicted_speedup=1.3))])
    assert [cell.predicted for row in found.rows for cell in row.cells] == [1.1, 1.3]
    assert "By the costs of a step the fastest would be a with one draft a step, at 1.30 times" in found.sentences[-1]


def test_what_more_drafts_bring_by_themselves_stands_beside_the_rescorers_gain():
    drafts = result("none", 1.5, p=16, gain=0.25), result("a", 1.8, p=16, gain=0.5, low=0.4)
    (line,) = [s for s in make_headline([view(result("none", 1.2), *drafts)]).sentences if "16 drafts a step" in s]
    assert "+50.0% tokens a step" in line and line.endswith("16 drafts without rescoring bring +25.0%.")


def test_a_gain_that_is_none_is_said():
    found = make_headline([view(result("none", 1.2), result("a", 1.1, gain=-0.08, low=-0.2))])
    assert "no rescorer gains anything" in found.sentences[1] and not found.rows[1].cells[0].best
    found = make_headline([view(result("none", 1.2), result("a", 1.3, gain=0.08, low=-0.2))])
    assert found.sentences[1].endswith("Its gain is not certain: the interval includes zero.")
    assert "the only rescorer is a" in found.sentences[1]


def test_a_loss_on_one_of_several_tasks_is_not_called_uncertain():
    gained, lost = result("a", 1.5, gain=0.25, low=0.2), result("a", 1.1, gain=-0.2, low=-0.3)
    found = make_headline([view(result("none", 1.2), gained), view(result("none", 1.2), lost)])
    assert found.sentences[1].endswith(
        "On 1 of 2 columns its drafts are surely worse: the interval of their gain is below zero."
    )
    assert "includes zero" not in found.sentences[1]


def test_what_is_best_and_what_is_sure():
    """The best of one is none, and what may be chance is not shown as a gain."""
    both = result("a", 1.3, gain=0.08, low=-0.2), result("b", 1.25, gain=0.04, low=0.01)
    cells = {row.rescorer: row.cells[0] for row in make_headline([view(result("none", 1.2), *both)]).rows}
    assert [(cells[name].best, cells[name].sure) for name in ("none", "a", "b")] == [
        (False, False), (True, False), (False, True),
    ]  # fmt: skip
    alone = make_headline([view(result("none", 1.2), both[1])]).rows[1].cells[0]
    assert not alone.best and alone.sure


def test_labels_of_one_column_stand_apart():
    assert _label_places([(8, 1.3), (6, 2.0), (8, 1.5), (8, 1.4), (6, 1.0)]) == [
        "bottom center", "top center", "top center", "middle left", "bottom center",
    ]  # fmt: skip


def test_a_page_without_unrescored_drafts_or_a_gap():
    found = make_headline([view(result("oracle", 2.0))])
    assert "perfect choice" in found.sentences[0] and found.rows[0].cells[0].share is None
    assert result("a", 2.0).gap_share(result("none", 2.0)) is None
    assert not re.search(r"nan|None", " ".join(found.sentences))


def test_sweeps_of_tasks_whose_names_are_patterns(tmp_path, monkeypatch):
    monkeypatch.setenv("RESCORE_CACHE", str(tmp_path))
    sweep = {
        "task": "a[b]", "rescorer": "ngram", "k": 4, "p": 1, "alphas": [0.0, 1.0], "block_efficiency": [1.0, 1.5],
        "alpha": 1.0, "held_out": ["x"],
    }  # fmt: skip
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "a[b]-0.json").write_text(json.dumps(sweep))
    chosen = Alpha(alpha=1.0, source="tuned", held_out=("x",))
    runs = {"a[b]": [RunRecord(rescorer="ngram", k=4, p=1, alpha=chosen)]}
    config = run_config(inputs={"a[b]": Inputs(task="a[b]")}, runs=runs)
    results = [made_result(task="a[b]", rescorer="ngram", k=4)]
    run = Evaluation(ResultsDocument(config=config, results=results), folder=tmp_path)
    (found,) = sweeps_of(run, "a[b]")
    assert found.block_efficiency == (1.0, 1.5)


@pytest.mark.parametrize(
    ("value", "sign", "shown"), [(-0.0004, False, "0%"), (0.25, False, "25%"), (-0.06, True, "-6%"), (None, False, "-")]
)
def test_shares_have_no_negative_zero(value, sign, shown):
    assert Table([Column("share", percent(0, sign=sign))], [[value]]).cells() == [[shown]]


@pytest.mark.parametrize(("positions", "few"), [(999, True), (1000, False)])
def test_accuracy_on_little_text_says_so(positions, few):
    shown = accuracy_table(HeldOutAccuracy({1: [1.0, 0.5]}, 1.5, 1.5, positions, 7)).text()
    assert f"measured on {positions} positions of 7 held-out texts" in shown
    assert ("--held-out-corpus" in shown) == few
