"""Perplexity and its counts: KenLM's own scores summed up as its `query` does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import kenlm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattices.errors import RescoreError
from lattices.ngrams import SENTENCE_END
from lm.ngram.corpus import EncodedCorpus
from lm.ngram.counting import BREAK, no_progress
from lm.ngram.kenlm import KenlmModel
from lm.ngram.score import AutomatonScorer, NgramScore, _sentences, score_file, score_text

TINY = Path(__file__).parent / "reference" / "kenlm" / "tiny.arpa"
VOCABULARY = ("<unk>", "<s>", "</s>", "the", "cat", "sat", "7", "é")
thorough = settings(deadline=None, derandomize=True, max_examples=100)
texts = st.lists(st.lists(st.sampled_from([*VOCABULARY[3:], "zebra", "<unk>"]), max_size=6), min_size=1, max_size=4)


def ended(text: list[list[str]]) -> list[list[str]]:
    return [[*line, "</s>"] for line in text]


@pytest.fixture(scope="module")
def model() -> KenlmModel:
    return KenlmModel(kenlm.Model(str(TINY)))


@dataclass(frozen=True)
class FakeAutomaton:
    """An automaton over word ids with integer states: KenLM's states, numbered."""

    model: KenlmModel
    states: list

    @property
    def start(self) -> int:
        return self._number(self.model.begin_sentence())

    def advance(self, state: int, word: int) -> tuple[float, int]:
        log10p, after = self.model.score(self.states[state], VOCABULARY[word])
        return log10p, self._number(after)

    def _number(self, state) -> int:
        if state not in self.states:
            self.states.append(state)
        return self.states.index(state)


@thorough
@given(text=texts, end=st.booleans())
def test_as_kenlms_query(model: KenlmModel, text: list[list[str]], end: bool):
    reference = kenlm.Model(str(TINY))
    scores = [score for line in text for score in reference.full_scores(" ".join(line), bos=True, eos=end)]
    total, known = (math.fsum(s[0] for s in chosen) for chosen in (scores, [s for s in scores if not s[2]]))
    unknown = sum(s[2] for s in scores)
    score = score_text(model, ended(text) if end else text)
    assert (score.sentences, score.tokens, score.unknown) == (len(text), len(scores), unknown)
    assert score.hits == tuple(sum(s[1] == n for s in scores) for n in (1, 2, 3))
    assert score.log10p == pytest.approx(total)
    if scores:
        assert score.perplexity == pytest.approx(10 ** (-total / len(scores)))
        assert score.unknown_share == unknown / len(scores)
    if len(scores) > unknown:
        assert score.perplexity_known == pytest.approx(10 ** (-known / (len(scores) - unknown)))


@thorough
@given(text=texts)
def test_an_automaton_scores_the_same_without_lengths(model: KenlmModel, text: list[list[str]]):
    ids = [[VOCABULARY.index(word) if word in VOCABULARY else 0 for word in line] for line in ended(text)]
    found = score_text(AutomatonScorer(FakeAutomaton(model, [])), ids)
    expected = score_text(model, ended(text))
    assert found.hits is None
    assert (found.tokens, found.unknown) == (expected.tokens, expected.unknown)
    assert found.log10p == pytest.approx(expected.log10p)
    assert found.perplexity_known == pytest.approx(expected.perplexity_known)


def test_by_hand(model: KenlmModel):
    score = score_text(model, ended([["the", "cat", "sat"], ["zebra"]]))
    # <s> the; <s> the cat; the cat sat; cat sat </s> | back-off of <s> and <unk>; </s> alone
    assert score.log10p == pytest.approx(-0.3 - 0.2 - 0.1 - 0.15 - (0.4 + 1.6) - 0.9)
    assert score.log10p_unknown == pytest.approx(-2.0)
    assert (score.sentences, score.tokens, score.unknown, score.hits) == (2, 6, 1, (2, 1, 3))
    assert score.perplexity == pytest.approx(10 ** (3.65 / 6))
    assert score.perplexity_known == pytest.approx(10 ** (1.65 / 5))


def test_an_empty_line_is_a_sentence_of_its_end(model: KenlmModel):
    score = score_text(model, ended([[]]))
    assert (score.sentences, score.tokens, score.log10p) == (1, 1, pytest.approx(-0.4 - 0.9))


def test_no_text_is_one_line(model: KenlmModel):
    with pytest.raises(RescoreError, match="no text") as caught:
        score_text(model, [])
    assert "\n" not in str(caught.value)


def test_extremes():
    nothing = NgramScore(1, 0, 0, 0.0, 0.0, None)
    assert all(map(math.isnan, (nothing.perplexity, nothing.perplexity_known, nothing.unknown_share)))
    assert NgramScore(1, 1, 0, -1e6, 0.0, None).perplexity == math.inf
    assert math.isnan(NgramScore(1, 2, 2, -4.0, -4.0, None).perplexity_known)


def test_a_score_as_a_document():
    assert NgramScore(1, 0, 0, 0.0, 0.0, None).as_dict() == {
        "sentences": 1,
        "tokens": 0,
        "unknown": 0,
        "log10p": 0.0,
        "log10p_unknown": 0.0,
        "hits": None,
        "perplexity": None,
        "perplexity_known": None,
        "unknown_share": None,
    }
    assert NgramScore(1, 2, 1, -2.0, -1.5, (1, 1)).as_dict()["perplexity"] == pytest.approx(10)


def test_a_file_is_scored_line_by_line(model: KenlmModel, tmp_path: Path):
    text = tmp_path / "x.txt"
    text.write_text("the cat sat\n\nzebra the\n")
    by_ours = score_file(text, TINY)
    expected = score_text(model, ended([["the", "cat", "sat"], [], ["zebra", "the"]]))
    assert (by_ours.sentences, by_ours.tokens, by_ours.unknown) == (3, expected.tokens, 1)
    assert by_ours.log10p == pytest.approx(expected.log10p, abs=1e-5)
    by_kenlm = score_file(text, TINY.with_name("trie.bin"))
    assert by_kenlm.hits == expected.hits and by_kenlm.log10p == pytest.approx(expected.log10p)


def test_progress_counts_up(tmp_path: Path):
    calls: list[tuple[str, int, int]] = []
    (tmp_path / "x.txt").write_text("the cat\n" * 3)
    score_file(tmp_path / "x.txt", TINY, progress=lambda *call: calls.append(call))
    assert {call[0] for call in calls} == {"reading", "scoring"}
    assert all(0 <= done <= total for _, done, total in calls)


def test_a_cut_document_has_no_end(tmp_path: Path):
    encoded = EncodedCorpus(tmp_path / "ids", ("<unk>", "<s>", "</s>", "a"), 3, 3)
    np.array([3, SENTENCE_END, 3, 3, BREAK, SENTENCE_END], np.int32).tofile(encoded.path)
    found = list(_sentences(encoded, np.array([0, 1, 2, 7]), no_progress))
    assert found == [[7, 2], [7, 7], [2]]
