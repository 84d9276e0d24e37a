"""Text and numbers of reports: tokens, tables, looks, intervals, the sentences of the first screen."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import byte_tokenizer

from rescore.accounting import account
from rescore.report.exports import _escaped, _plain
from rescore.report.figures import safe
from rescore.report.headline import make_headline, recovered
from rescore.report.intervals import marginal_ci95
from rescore.report.sources import json_text
from rescore.report.style import COLOURS, looks
from rescore.report.token_text import excerpt, harmless, token_texts, tokenizer_of, visible


def test_every_character_of_a_token_shows():
    assert visible(" a\n\tb\u200b\u202e\x00\ud800\xa0") == ("␣a↵⇥b⟨U+200B⟩⟨U+202E⟩⟨U+0000⟩⟨U+D800⟩⟨U+00A0⟩")
    assert harmless("שלום \U0001f469\u200d\U0001f680\n") == "שלום \U0001f469\u200d\U0001f680\n"


def test_long_text_is_cut_in_the_middle():
    cut = excerpt("a" * 5000 + "z" * 5000)
    assert cut.head + cut.tail == "a" * len(cut.head) + "z" * len(cut.tail)
    assert cut.left_out == 10_000 - len(cut.head) - len(cut.tail)
    assert excerpt("short").left_out == 0


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


def test_json_for_a_script_element():
    text = json_text({"a": "</script><!--\u2028\ud800"})
    assert "<" not in text and "\u2028" not in text
    assert json.loads(text)["a"] == "</script><!--\u2028\ud800"


def test_text_for_other_readers():
    assert safe("<b>&") == "&lt;b&gt;&amp;"
    assert _escaped("a|b\n<i>`x`") == r"a\|b \<i\>\`x\`"
    assert _plain("=1+1") == "'=1+1" and _plain("ngram") == "ngram"


def test_a_rescorer_looks_the_same_whatever_else_was_run():
    found = looks(["none", *map(str, range(30)), "oracle", "none"])
    assert len({(look.colour, look.marker) for look in found.values()}) == 32
    assert found["none"] == looks(["oracle", "none"])["none"] and found["0"].colour == COLOURS[0]


def test_the_middle_of_intervals_of_acceptance():
    rng = np.random.default_rng(1)
    accepted = [rng.integers(1, 5, size=20).tolist() for _ in range(50)]
    marginal = account(accepted, 4).marginal
    found = marginal_ci95(accepted, 4)
    assert found is not None and found[0] == (1.0, 1.0)
    assert all(low <= m <= high for (low, high), m in zip(found, marginal, strict=True))
    assert all(high - low > 0.01 for low, high in found[1:])
    assert marginal_ci95([[1, 2]], 4) is None and marginal_ci95([[1], []], 4) is None


def result(rescorer: str, value: float, *, p: int = 1, gain: float | None = None, low: float = 0.0) -> dict:
    return {
        "task": "squad", "rescorer": rescorer, "p": p, "block_efficiency": value, "oracle_block_efficiency": 2.0,
        "gain": gain, "gain_ci95": None if gain is None else (low, gain + 0.1), "latency": None,
    }  # fmt: skip


def view(*results: dict):
    plain = next((r for r in results if r["rescorer"] == "none" and r["p"] == 1), None)
    return SimpleNamespace(label="squad", results=results, unrescored=plain)


def test_the_first_screen_says_who_is_best_and_how_much_is_left():
    best, other = result("b", 1.5, gain=0.25, low=0.2), result("a", 1.3, gain=0.1, low=-0.05)
    found = make_headline([view(result("none", 1.2), other, best, result("oracle", 2.0, gain=0.6))])
    assert [row.rescorer for row in found.rows] == ["oracle", "none", "a", "b"]
    assert [cell.best for row in found.rows for cell in row.cells] == [False, False, False, True]
    assert recovered(best, result("none", 1.2)) == pytest.approx(0.375)
    assert "accepts 1.20 tokens" in found.sentences[0] and "2.00" in found.sentences[0]
    assert "the best of 2 rescorers is b, with +25.0% tokens a step, 38% of the way" in found.sentences[1]
    assert "without times" in found.sentences[-1]


def test_a_gain_that_is_none_is_said():
    found = make_headline([view(result("none", 1.2), result("a", 1.1, gain=-0.08, low=-0.2))])
    assert "no rescorer gains anything" in found.sentences[1] and not found.rows[1].cells[0].best
    found = make_headline([view(result("none", 1.2), result("a", 1.3, gain=0.08, low=-0.2))])
    assert "includes no gain" in found.sentences[1]


def test_a_page_without_unrescored_drafts_or_a_gap():
    found = make_headline([view(result("oracle", 2.0))])
    assert "perfect choice" in found.sentences[0] and found.rows[0].cells[0].share is None
    assert recovered(result("a", 2.0), result("none", 2.0)) is None
    assert not re.search(r"nan|None", " ".join(found.sentences))
