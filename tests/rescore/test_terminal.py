"""Text of others on a terminal: shown, but never obeyed."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from rescore.terminal import INVISIBLE, isolated, printable, shortened


def test_plain_text_emoji_and_other_scripts_stay():
    for text in ("a b <b>&amp;</b> [red]x[/red]", "日本語", "🙂", "שלום", "naïve"):
        assert printable(text) == text
    family = "👨\u200d👩\u200d👧"
    assert printable(family, joiners=True) == family and printable(family) == "👨\\u200d👩\\u200d👧"


def test_what_controls_a_terminal_is_written_as_an_escape():
    assert printable("a\x1b[31mb\nc\td\r\x07\x9b") == "a\\x1b[31mb\\nc\\td\\r\\x07\\x9b"
    assert (
        printable("\u202eabc\u2066\u2028\ufeff\ud800\U000e0041") == "\\u202eabc\\u2066\\u2028\\ufeff\\ud800\\U000e0041"
    )


@given(st.text())
def test_nothing_invisible_is_left(text: str):
    assert not any(unicodedata.category(c) in INVISIBLE for c in printable(text))


def test_text_from_right_to_left_gets_a_mark_behind_it():
    assert isolated("שלום") == "שלום\u200e" and isolated("abc") == "abc"


def test_long_text_is_cut_in_the_middle():
    assert shortened("abc", head=2, tail=1) == "abc"
    assert shortened("a" * 100_000, head=3, tail=2) == "aaa ... (99,995 characters) ... aa"
    assert shortened("abcdef", head=2, tail=0) == "ab ... (4 characters) ..."
