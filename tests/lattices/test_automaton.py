"""The automaton against the definition of back-off, against KenLM, and its file."""

from __future__ import annotations

from pathlib import Path

import kenlm
import numpy as np
import pytest
from ngram_models import BackOff, random_model, with_holes

from lattices.automaton import (
    BACKOFF,
    BOUND,
    LINEAR,
    LN10,
    LOWEST,
    MAGIC,
    MAX_ORDER,
    NEXT,
    ROOT,
    ROOT_BOUND,
    ROOT_NEXT,
    ROOT_SCORE,
    SCORE,
    SCORE_SCALE,
    SLOTS,
    STATE_BOUND,
    SUFFIX,
    WORD,
    Automaton,
    find_arc,
)
from lattices.errors import InvalidDataError, RescoreError
from lattices.ngrams import SENTENCE_END, SENTENCE_START, SPECIAL_WORDS, UNKNOWN, NgramArrays, NgramModel
from lm.ngram.arpa import read_arpa, write_arpa

ORDERS = range(1, MAX_ORDER + 1)
REFERENCE = Path(__file__).parents[1] / "lm" / "reference"


def model_of(order: int, *, holes: bool, seed: int = 0, words: int = 6, density: float = 0.3) -> NgramModel:
    rng = np.random.default_rng([order, holes, seed])
    return random_model(rng, order=order, words=words, density=density, holes=holes)


def headers_of(automaton: Automaton) -> list[int]:
    """All states."""
    states, state = [], ROOT
    while state < len(automaton.cells):
        states.append(state)
        state += 1 + int(automaton.cells[state, SLOTS])
    assert state == len(automaton.cells)
    return states


def context_of_states(automaton: Automaton, words: int) -> dict[int, tuple[int, ...]]:
    """The shortest words that lead to every state, by breadth-first search from the root."""
    contexts: dict[int, tuple[int, ...]] = {ROOT: ()}
    upcoming = [ROOT]
    for state in upcoming:
        for word in range(words):
            after = automaton.state_after([word], state=state)
            if after not in contexts:
                contexts[after] = (*contexts[state], word)
                upcoming.append(after)
    return contexts


def arcs_of(automaton: Automaton, state: int) -> np.ndarray:
    cells = automaton.cells[state + 1 : state + 1 + automaton.cells[state, SLOTS]]
    return cells[cells[:, WORD] >= 0]


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_every_word_after_every_context_is_scored_as_back_off_is_defined(order: int, holes: bool) -> None:
    for seed in range(3):
        words = 6 if order < 5 else 4
        model = model_of(order, holes=holes, seed=seed, words=words, density=[0.15, 0.3, 0.8][seed])
        automaton, definition = Automaton.compile(model), BackOff(model)
        assert automaton.order == order
        assert automaton.counts == tuple(len(ngrams) for ngrams in model.orders)
        assert automaton.vocabulary == list(model.vocabulary)
        contexts = definition.contexts(words)
        pairs = [(context, word) for context in contexts for word in range(words)]
        states = np.array([automaton.state_after(context) for context, _ in pairs])
        scores, after = automaton.advance_many(states, np.array([word for _, word in pairs]))
        assert scores.tolist() == [definition.units(*pair) for pair in pairs]
        assert after.tolist() == [automaton.state_after((*context, word)) for context, word in pairs]
        for i in range(0, len(pairs), 97):
            log10p, state = automaton.advance(int(states[i]), pairs[i][1])
            assert log10p == pytest.approx(definition.score(*pairs[i]), abs=1e-6)
            assert state == after[i]


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("order", range(2, MAX_ORDER + 1))
def test_scores_are_those_of_kenlm(order: int, holes: bool, tmp_path: Path) -> None:
    model = model_of(order, holes=False, words=12, density=0.25 if order < 5 else 0.15)
    if holes:  # few, or KenLM's tables overflow
        model = with_holes(model, np.random.default_rng(order), share=0.1)
    write_arpa(model, tmp_path / "model.arpa")
    assert_is_kenlm(tmp_path / "model.arpa", pairs=10_000)


@pytest.mark.parametrize("name", ["fable-3-prune-1-1-2", "fable-4", "fable-5-prune-0-0-1", "tiny-3-fallback"])
def test_scores_of_what_lmplz_makes_are_those_of_kenlm(name: str) -> None:
    assert_is_kenlm(REFERENCE / f"{name}.arpa.gz", pairs=5_000)


def assert_is_kenlm(arpa: Path, *, pairs: int) -> None:
    """Random (context, word) pairs, a tenth of the words unknown; contexts follow `<s>` or nothing."""
    config = kenlm.Config()
    config.show_progress, config.arpa_complain = False, kenlm.ARPALoadComplain.NONE
    scorer = kenlm.Model(str(arpa), config)
    automaton = Automaton.compile(read_arpa(arpa))
    vocabulary = automaton.vocabulary
    rng = np.random.default_rng(0)
    inside, outside = kenlm.State(), kenlm.State()
    for i in range(pairs):
        *context, word = rng.integers(0, len(vocabulary), rng.integers(1, automaton.order + 3)).tolist()
        unknown = rng.random(len(context) + 1) < 0.1
        spelled = ["never-seen" if u else vocabulary[w] for u, w in zip(unknown, (*context, word), strict=True)]
        *ids, last = np.where(unknown, UNKNOWN, [*context, word]).tolist()
        state = automaton.start if i % 2 else ROOT
        (scorer.BeginSentenceWrite if i % 2 else scorer.NullContextWrite)(inside)
        for name in spelled[:-1]:
            scorer.BaseScore(inside, name, outside)
            inside, outside = outside, inside
        expected = scorer.BaseScore(inside, spelled[-1], outside)
        assert automaton.advance(automaton.state_after(ids, state=state), last)[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_the_state_after_words_is_the_longest_suffix_that_matters(order: int, holes: bool) -> None:
    words = 5 if order < 5 else 4
    model = model_of(order, holes=holes, words=words)
    automaton, definition = Automaton.compile(model), BackOff(model)
    state_of = {context: automaton.state_after(context) for context in definition.contexts(words)}
    apart = [context for context in state_of if definition.tells_apart(context)]
    matters = {context[start:] for context in apart for start in range(len(context))}
    for context, state in state_of.items():
        if context:
            assert (state != state_of[context[1:]]) == (context in matters)
    contexts = context_of_states(automaton, words)
    assert sorted(contexts) == headers_of(automaton)
    assert len(set(contexts.values())) == len(contexts)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_states_are_closed_under_suffixes_and_stand_by_length(order: int, holes: bool) -> None:
    words = 5
    automaton = Automaton.compile(model_of(order, holes=holes, words=words))
    assert len(automaton.level_starts) == MAX_ORDER + 1
    assert automaton.level_starts[0] == ROOT
    assert automaton.level_starts[order:] == (len(automaton.cells),) * (MAX_ORDER + 1 - order)
    assert automaton.cells[ROOT].tolist() == [0, 0, 0, 0]
    assert automaton.start == automaton.state_after([SENTENCE_START])
    for state, context in context_of_states(automaton, words).items():
        level = len(context)
        assert automaton.level_starts[level] <= state
        assert level == MAX_ORDER or state < automaton.level_starts[level + 1] or state == ROOT
        # Words that lead to a state lead to it from everywhere or to one that ends in it; their suffix to its suffix.
        if level:
            assert automaton.cells[state, SUFFIX] == automaton.state_after(context[1:])
        for arc in arcs_of(automaton, state):
            suffix = automaton.cells[state, SUFFIX]
            shorter = find_arc(automaton.cells, int(suffix), int(arc[WORD])) if suffix != ROOT else ROOT
            assert shorter >= 0  # every suffix of an n-gram is an n-gram
            assert arc[NEXT] == automaton.state_after([int(arc[WORD])], state=state)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_bounds_are_what_the_best_longer_context_gives(order: int, holes: bool) -> None:
    words = 6 if order < 4 else 4
    for seed in range(3):
        model = model_of(order, holes=holes, seed=seed, words=words)
        automaton, definition = Automaton.compile(model), BackOff(model)
        everywhere = definition.contexts(words)
        best = {(c, w): definition.units(c, w) for c in everywhere for w in range(words)}
        for n in range(order - 1):  # from the longest: the best over all contexts that end in c
            for context in [c for c in everywhere if len(c) == order - 1 - n]:
                for word in range(words):
                    key = (context[1:], word)
                    best[key] = max(best[key], best[(context, word)])
        for word in range(words):
            assert automaton.roots[word, ROOT_BOUND] >= best[((), word)]
        for state, context in context_of_states(automaton, words).items():
            backoff_bound = int(automaton.cells[state, STATE_BOUND])
            assert backoff_bound >= 0
            arcs = {int(arc[WORD]): arc for arc in arcs_of(automaton, state)}
            for word in range(words):
                if word in arcs:
                    assert arcs[word][BOUND] >= best[(context, word)]
                    assert arcs[word][BOUND] >= arcs[word][SCORE]
                elif context:
                    # A word without an arc is scored by the suffix in every longer context too.
                    shorter = definition.units(context[1:], word)
                    assert shorter + automaton.cells[state, BACKOFF] + backoff_bound >= best[(context, word)]


def test_states_with_few_arcs_are_rows_and_those_with_many_are_hash_tables() -> None:
    model = model_of(3, holes=False, words=60, density=0.15)
    automaton, definition = Automaton.compile(model), BackOff(model)
    sizes = {state: (len(arcs_of(automaton, state)), automaton.cells[state, SLOTS]) for state in headers_of(automaton)}
    assert {arcs > LINEAR for arcs, _ in sizes.values()} == {False, True}
    for state, (arcs, slots) in sizes.items():
        if arcs <= LINEAR:
            assert slots == arcs
            assert (np.diff(arcs_of(automaton, state)[:, WORD]) > 0).all()
        else:
            assert slots & (slots - 1) == 0
            assert slots >= 1.5 * arcs
    rng = np.random.default_rng(0)
    pairs = [(tuple(rng.integers(0, 60, 2).tolist()), int(rng.integers(60))) for _ in range(20_000)]
    states = np.array([automaton.state_after(context) for context, _ in pairs])
    scores = automaton.advance_many(states, np.array([word for _, word in pairs]))[0]
    assert scores.tolist() == [definition.units(*pair) for pair in pairs]


def model_from(vocabulary: tuple[str, ...], *orders: dict[tuple[int, ...], tuple[float, float]]) -> NgramModel:
    """A model of n-grams -> (log10 probability, log10 back-off)."""
    arrays = []
    for n, ngrams in enumerate(orders, start=1):
        grams = sorted(ngrams)
        values = np.array([ngrams[g] for g in grams], dtype=np.float32).reshape(-1, 2)
        arrays.append(NgramArrays(np.array(grams, dtype=np.int32).reshape(-1, n), values[:, 0], values[:, 1]))
    return NgramModel(vocabulary, tuple(arrays))


def test_a_missing_suffix_is_scored_by_back_off() -> None:
    # "a b c" without "b c", and "b" is followed by nothing else.
    model = model_from(
        (*SPECIAL_WORDS, "a", "b", "c"),
        {(w,): (-1.0 - w / 4, -0.5) for w in range(6)},
        {(3, 4): (-0.25, -0.125)},
        {(3, 4, 5): (-0.0625, 0.0)},
    )
    automaton = Automaton.compile(model)
    assert automaton.counts == (6, 1, 1)  # those of the model
    after = automaton.state_after([3, 4])
    assert automaton.advance(after, 5)[0] == pytest.approx(-0.0625, abs=1e-6)
    assert automaton.advance(automaton.state_after([4]), 5)[0] == pytest.approx(-0.5 - 2.25, abs=1e-6)
    assert automaton.advance(after, 3)[0] == pytest.approx(-0.125 - 0.5 - 1.75, abs=1e-6)


def test_a_model_without_unknown_word_gives_it_what_kenlm_gives() -> None:
    model = model_from((*SPECIAL_WORDS, "a"), {(w,): (-0.5, 0.0) for w in (1, 2, 3)})
    automaton = Automaton.compile(model)
    assert automaton.advance(ROOT, UNKNOWN)[0] == pytest.approx(-100, abs=1e-5)
    assert automaton.advance(ROOT, 3)[0] == pytest.approx(-0.5, abs=1e-6)


def test_scores_are_kept_from_leaving_32_bits() -> None:
    model = model_from((*SPECIAL_WORDS, "a"), {(w,): (-3e38 if w == 3 else -0.5, 0.0) for w in range(4)})
    automaton = Automaton.compile(model)
    assert automaton.roots[3, ROOT_SCORE] == LOWEST
    assert automaton.advance(ROOT, 3)[0] == pytest.approx(LOWEST / SCORE_SCALE / LN10)


def test_orders_that_hold_no_ngram_do() -> None:
    empty = {}
    model = model_from((*SPECIAL_WORDS, "a"), {(w,): (-0.5, -0.25) for w in range(4)}, empty, empty, empty)
    automaton = Automaton.compile(model)
    assert automaton.counts == (4, 0, 0, 0)
    assert automaton.advance(automaton.state_after([3]), 3)[0] == pytest.approx(-0.75, abs=1e-6)


@pytest.mark.parametrize("order", [0, 7, 8])
def test_orders_outside_1_to_6_are_refused(order: int) -> None:
    orders = ({(w,): (-0.5, 0.0) for w in range(3)}, *({(1,) * n: (-0.5, 0.0)} for n in range(2, order + 1)))
    model = model_from(SPECIAL_WORDS, *orders[:order])
    with pytest.raises(RescoreError, match=f"an n-gram model of order {order}; orders 1 to 6 can be used"):
        Automaton.compile(model)


@pytest.mark.parametrize("order", [1, 4])
def test_saved_and_loaded_it_is_the_same_and_memory_mapped(order: int, tmp_path: Path) -> None:
    automaton = Automaton.compile(model_of(order, holes=True))
    path = tmp_path / "automaton.bin"
    automaton.save(path)
    loaded = Automaton.load(path)
    assert (loaded.order, loaded.counts, loaded.level_starts) == (order, automaton.counts, automaton.level_starts)
    assert loaded.vocabulary == automaton.vocabulary
    for name in ("cells", "roots", "vocabulary_bytes"):
        array = getattr(loaded, name)
        np.testing.assert_array_equal(array, getattr(automaton, name))
        assert array.dtype == getattr(automaton, name).dtype
        assert array.ctypes.data % 64 == 0
        assert not array.flags.owndata
        assert not array.flags.writeable
    assert loaded.advance(loaded.start, 3) == automaton.advance(automaton.start, 3)
    loaded.save(tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "again.bin", path]


def test_words_of_any_language_come_back(tmp_path: Path) -> None:
    vocabulary = (*SPECIAL_WORDS, "naïve", "日本", "\u2028", "\x85", "a\x0bb")
    Automaton.compile(model_from(vocabulary, {(w,): (-1.0, 0.0) for w in range(8)})).save(tmp_path / "automaton.bin")
    assert Automaton.load(tmp_path / "automaton.bin").vocabulary == list(vocabulary)


def test_a_place_that_can_not_be_written_to_is_left_as_it_was(tmp_path: Path) -> None:
    automaton = Automaton.compile(model_of(2, holes=False))
    with pytest.raises(OSError):
        automaton.save(tmp_path / "missing" / "automaton.bin")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        automaton.save(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_file_cut_anywhere_is_refused_in_one_line(tmp_path: Path) -> None:
    path, cut = tmp_path / "automaton.bin", tmp_path / "cut.bin"
    Automaton.compile(model_of(3, holes=False)).save(path)
    whole = path.read_bytes()
    end = len(whole) - len(whole) % 64  # padding behind the vocabulary may go
    vocabulary_end = whole.rindex(b"\n") + 1
    assert end - vocabulary_end < 64
    for length in [*range(0, 300), *range(300, vocabulary_end, 61), vocabulary_end - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(RescoreError) as caught:
            Automaton.load(cut)
        assert str(cut) in str(caught.value)
        assert "\n" not in str(caught.value)


HEADER_OF_LIST = b"[1, 2, 3]".ljust(48)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\\data\\\nngram 1=3\n",
        bytes(4096),
        b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(4096),
        MAGIC,
        MAGIC + (48).to_bytes(8, "little") + b"{}".ljust(48),
        MAGIC + (48).to_bytes(8, "little") + HEADER_OF_LIST,
        MAGIC + (48).to_bytes(8, "little") + b"\xff" * 48,
        MAGIC + (1 << 63).to_bytes(8, "little") + b"{}".ljust(48),
        MAGIC + (112).to_bytes(8, "little") + b'{"order": 2, "counts": null, "level_starts": 3}'.ljust(112),
    ],
)
def test_other_files_are_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "automaton.bin"
    path.write_bytes(content)
    with pytest.raises(RescoreError) as caught:
        Automaton.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RescoreError, match=r"can't read .*no\.bin: No such file"):
        Automaton.load(tmp_path / "no.bin")
    with pytest.raises(RescoreError, match=r"can't read .*: Is a directory"):
        Automaton.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        (b'"shape": [', b'"shape": [9'),
        (b'"shape": [', b'"shape": [-'),
        (b'"offset": 0', b'"offset":-8'),
        (b'"order"', b'"ordre"'),
        (b'"cells"', b'"celsl"'),
        (b'"level_starts": [0', b'"level_starts": [x'),
        (b'"order": 3', b'"order": 1e999'),
        (b'"order": 3', b'"order": 2'),
        (b'"counts": [', b'"counts": [1, '),
        (b'"offset": 0', b'"offset": 1e9'),
        (b'"shape": [', b'"shape": [1.5, '),
    ],
)
def test_a_damaged_header_is_refused_in_one_line(change: tuple[bytes, bytes], tmp_path: Path) -> None:
    path = tmp_path / "automaton.bin"
    Automaton.compile(model_of(3, holes=False)).save(path)
    content = path.read_bytes()
    length = 16 + int.from_bytes(content[8:16], "little")
    header = content[16:length].replace(*change, 1)[: length - 16].ljust(length - 16)
    path.write_bytes(content[:16] + header + content[length:])
    with pytest.raises(InvalidDataError, match="is not a whole n-gram automaton; build it again"):
        Automaton.load(path)


def test_tokens_are_mapped_to_the_words_that_are_their_ids() -> None:
    vocabulary = (*SPECIAL_WORDS, "7", "0", "the", "2", "٣", "-1", "1.5")
    automaton = Automaton.compile(model_from(vocabulary, {(w,): (-1.0, 0.0) for w in range(10)}))
    words = automaton.words_of_tokens(9)
    assert words.dtype == np.int32
    assert words.tolist() == [4, 0, 6, 0, 0, 0, 0, 3, 0]
    assert automaton.words_of_tokens(8).tolist() == [4, 0, 6, 0, 0, 0, 0, 3]


def test_token_ids_beyond_the_vocabulary_are_another_tokenizers() -> None:
    automaton = Automaton.compile(model_from((*SPECIAL_WORDS, "7", "0"), {(w,): (-1.0, 0.0) for w in range(5)}))
    with pytest.raises(
        InvalidDataError, match=r"has token id 7, the base LM's vocabulary ends at 6.*another tokenizer"
    ):
        automaton.words_of_tokens(7)


def test_words_that_are_no_token_ids_can_not_be_mapped() -> None:
    automaton = Automaton.compile(model_from((*SPECIAL_WORDS, "the", "fox"), {(w,): (-1.0, 0.0) for w in range(5)}))
    with pytest.raises(InvalidDataError, match="are no token ids; build it with --tokenizer"):
        automaton.words_of_tokens(100)


def test_numbers_too_large_for_a_token_id_are_words() -> None:
    vocabulary = (*SPECIAL_WORDS, "3", str(1 << 31), "9" * 5000)
    automaton = Automaton.compile(model_from(vocabulary, {(w,): (-1.0, 0.0) for w in range(6)}))
    assert automaton.words_of_tokens(5).tolist() == [0, 0, 0, 3, 0]


def test_the_end_of_text_word_is_no_token_id() -> None:
    automaton = Automaton.compile(model_of(2, holes=False))
    assert (automaton.words_of_tokens(100) != SENTENCE_END).all()
    assert automaton.roots[SENTENCE_END, ROOT_NEXT] in headers_of(automaton)
