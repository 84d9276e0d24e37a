"""Lattices and n-gram automata as OpenFst text (AT&T format), for `fstcompile`, `pywrapfst` and what else reads it.

    source TAB target TAB input label TAB output label TAB weight     an arc
    state [TAB weight]                                                a final state

The source of the first line is the start state. Weights are tropical: -weight x log-probability in nats. Labels are
numbers, 0 is epsilon: token id + 1 on the input side of a lattice, word id + 1 everywhere else. `token_symbols` and
`word_symbols` give the tables that name them.

The composition of a lattice with an automaton has the lattice's paths, scored by heads and n-gram model. Its shortest
path's input labels are the best draft *if* back-off is taken only where a state has no arc for the word. That is a
failure (phi) transition; OpenFst's plain composition knows none and takes epsilon arcs freely. So there are two ways to
write a state's back-off arc:

- epsilon (the default): what [A] and most n-gram toolkits compose with. A word can then be scored by back-off although
  its n-gram is there, which gives paths that score too well wherever back-off weight + shorter n-gram beats the n-gram,
  and with n shortest paths the same draft several times.
- a label of its own, phi: exact, for readers with failure transitions (`fstcompose` with a phi matcher).

`composition_text` expands exactly what one lattice needs of the automaton: no epsilon, nothing left to approximate.

`export_openfst` writes the files (docs/formats.md). Source: OpenFst's documentation of `fstcompile`; [A] section 4 for
the composition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np

from lattices.automaton import (
    BACKOFF,
    LN10,
    NEXT,
    ROOT,
    ROOT_NEXT,
    ROOT_SCORE,
    SCORE,
    SCORE_SCALE,
    SLOTS,
    SUFFIX,
    WORD,
    Automaton,
)
from lattices.errors import IncompatibleError, RescoreError, UnknownNameError
from lattices.lattice import Lattice
from lm.files import atomic_file
from lm.ngram.load import load_ngram
from rescore.checks import check_held_k
from rescore.runs.run import DEFAULT_K
from rescore.runs.weights import target_of
from rescore.tracing import TracedExample, read_trace

EPSILON = 0
EPSILON_SYMBOL, PHI_SYMBOL = "<eps>", "<phi>"
BLOCK_ARCS = 100_000  # written at a time


def export_openfst(
    ngram: Annotated[Path, "Folder of build-ngram, automaton or ARPA file."],
    out: Annotated[Path, "Folder for the text files."],
    *,
    trace: Annotated[Path | None, "Trace folder to take a lattice from."] = None,
    example: Annotated[str | None, "Id of the trace's example; default: the first."] = None,
    position: Annotated[int | None, "Output token before which the lattice stands, from 0. Default: 0."] = None,
    k: Annotated[int | None, "Tokens of each head that are in the lattice. Default: 16."] = None,
    alpha: Annotated[float, "Weight of the n-gram model."] = 1.0,
    phi: Annotated[bool, "Give back-off arcs a label of their own, for phi matchers; else epsilon."] = False,
) -> list[Path]:
    """Writes the files into the folder `out` and gives their paths.

    With a `trace`: also the lattice `[h, k]` that stands before output token `position` of the `example`, and the
    automaton then starts where the tokens before it lead to.

    Raises `RescoreError` for a KenLM binary, a lattice without a trace, a position or k that the trace does not hold;
    `IncompatibleError` for a model made for another tokenizer than the trace's; `UnknownNameError` for an example that
    is not there.
    """
    of_lattice = {"example": example, "position": position, "k": k}
    if trace is None and (given := [name for name, value in of_lattice.items() if value is not None]):
        raise RescoreError(f"--{given[0]} chooses a lattice of --trace; give that, or drop it")
    loaded = load_ngram(ngram)
    if not isinstance(automaton := loaded.model, Automaton):
        raise RescoreError(f"{ngram} is a KenLM binary, which can't be written out; give its ARPA file")
    start, files = automaton.start, dict[str, Iterable[str]]()
    if trace is not None:
        traced = read_trace(trace)
        header, base = traced.header, target_of(traced)
        by_id = {e.id: e for e in traced.examples}
        if example is not None and example not in by_id:
            raise UnknownNameError("example", example, by_id)
        k = DEFAULT_K if k is None else k
        lattice, before = _lattice_at(by_id[example or traced.examples[0].id], position or 0, k)
        if loaded.tokenizer_sha256 and base.tokenizer_sha256 not in (None, loaded.tokenizer_sha256):
            raise IncompatibleError(f"{ngram} was made for another tokenizer than the base LM's of {trace}")
        words = loaded.words_of_tokens(header.vocab_size, header.eos_token_ids)
        last = before[max(0, len(before) - automaton.order + 1) :]
        start = automaton.state_after(words[last].tolist())
        files["lattice.txt"] = [lattice_text(lattice, words)]
        files["composition.txt"] = [composition_text(lattice, words, automaton, start, weight=alpha)]
        files["tokens.syms"] = token_symbols(header.vocab_size)
    files["automaton.txt"] = automaton_text(automaton, weight=alpha, start=start, phi=phi)
    files["words.syms"] = word_symbols(automaton, phi=phi)
    for name, blocks in files.items():
        with atomic_file(out / name) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(blocks)
    return [out / name for name in files]


def _lattice_at(example: TracedExample, position: int, k: int) -> tuple[Lattice, list[int]]:
    """The lattice `[h, k]` before output token `position`, and the token ids before it."""
    last = len(example.output_ids) - 1
    if not 0 <= position <= last:
        raise RescoreError(f"--position {position}: the example {example.id} has the positions 0 to {last}")
    check_held_k(example.lattice.k, k)
    return example.lattice[position].top(k), [*example.prompt_ids.tolist(), *example.output_ids[:position].tolist()]


def lattice_text(lattice: Lattice, words: np.ndarray) -> str:
    """One lattice `[h, k]` as a transducer from tokens to words: states 0 to h, the arg-max only in slot 1.

    `words` int32 `[vocab_size]` is the automaton's word of every token id. Raises `RescoreError` for a batch.
    """
    if lattice.token_ids.ndim != 2:
        raise RescoreError(f"a lattice [heads, entries] is written, not {list(lattice.token_ids.shape)}; choose one")
    lines = []
    for j in range(lattice.h):
        ids = lattice.token_ids[j, : None if j else 1]
        costs = -lattice.logps[j, : len(ids)].astype(np.float64) + 0.0
        for token, word, cost in zip(ids.tolist(), words[ids].tolist(), costs.tolist(), strict=True):
            lines.append(f"{j}\t{j + 1}\t{token + 1}\t{word + 1}\t{cost:.9g}\n")
    return "".join(lines) + f"{lattice.h}\n"


def automaton_text(automaton: Automaton, *, weight: float = 1.0, start: int = ROOT, phi: bool = False) -> Iterator[str]:
    """The automaton as an acceptor of words, in blocks of whole lines; `start` is the state it begins in.

    Its states are numbered 0, 1, ... in the automaton's order (`dense_states`); all are final. The root has an arc for
    every word, every other state one for each of its n-grams and one that backs off to its suffix state: epsilon, or
    with `phi` the label `phi_label(automaton)`, on both sides.
    """
    states = dense_states(automaton)
    number = np.zeros(len(automaton.cells), dtype=np.int64)
    number[states] = np.arange(len(states))
    assert states[number[start]] == start, "the automaton begins in one of its states"
    factor, first = -weight / SCORE_SCALE, int(number[start])
    back_off = phi_label(automaton) if phi else EPSILON
    for begin, end in ((first, first + 1), (0, first), (first + 1, len(states))):  # the start state's arcs come first
        for block in _arcs(automaton, states, number, begin, end, back_off):
            costs = (block[:, 3] * factor + 0.0).tolist()
            rows = zip(block[:, :3].tolist(), costs, strict=True)
            yield "".join(f"{a}\t{b}\t{label}\t{label}\t{cost:.9g}\n" for (a, b, label), cost in rows)
    for at in range(0, len(states), BLOCK_ARCS):
        yield "".join(f"{state}\n" for state in range(at, min(at + BLOCK_ARCS, len(states))))


def _arcs(
    automaton: Automaton, states: np.ndarray, number: np.ndarray, begin: int, end: int, back_off: int
) -> Iterator[np.ndarray]:
    """Arcs of the states from number `begin` to `end`: columns source, target, label, score."""
    cells, roots = automaton.cells, automaton.roots
    if begin == 0 < end:
        words = np.arange(len(roots))
        yield np.stack([0 * words, number[roots[:, ROOT_NEXT]], words + 1, roots[:, ROOT_SCORE]], axis=1)
        begin = 1
    if begin >= end:
        return
    headers, source = cells[states[begin:end]], np.arange(begin, end)
    yield np.stack([source, number[headers[:, SUFFIX]], 0 * source + back_off, headers[:, BACKOFF]], axis=1)
    # The cells of these states are a stretch of the array; what is neither header nor empty is an arc.
    low = int(states[begin])
    high = int(states[end]) if end < len(states) else len(cells)
    owner = np.repeat(source, headers[:, SLOTS].astype(np.int64) + 1)
    is_arc = cells[low:high, WORD] >= 0
    is_arc[states[begin:end] - low] = False
    places = np.flatnonzero(is_arc)
    for at in range(0, len(places), BLOCK_ARCS):
        chosen = places[at : at + BLOCK_ARCS]
        arcs = cells[low + chosen]
        yield np.stack([owner[chosen], number[arcs[:, NEXT]], arcs[:, WORD] + 1, arcs[:, SCORE]], axis=1)


def dense_states(automaton: Automaton) -> np.ndarray:
    """The automaton's states `[s]`, rising: state i of the text is `dense_states(...)[i]`."""
    # A header is not told apart from an arc by its content: each gives the place of the next.
    slots = automaton.cells[:, SLOTS].tolist()
    states, state = [], ROOT
    while state < len(slots):
        states.append(state)
        state += 1 + slots[state]
    return np.array(states, dtype=np.int64)


def phi_label(automaton: Automaton) -> int:
    """The lowest label that is no word's."""
    return len(automaton.roots) + 1


def composition_text(lattice: Lattice, words: np.ndarray, automaton: Automaton, state: int, *, weight: float) -> str:
    """The exact composition of one lattice `[h, k]` with the automaton, whose `state` the left context led to.

    A transducer from tokens to words without epsilon and with k^(h-1) paths, each scored as
    `lattices.ngram_search` does; its states are the pairs of slot and automaton state that are reached.
    """
    lines: list[str] = []
    level = {state: 0}
    count = 1
    for j in range(lattice.h):
        ids = lattice.token_ids[j, : None if j else 1].tolist()
        heads = lattice.logps[j].tolist()
        upcoming: dict[int, int] = {}
        for at, source in level.items():
            for e, token in enumerate(ids):
                word = int(words[token])
                log10p, after = automaton.advance(at, word)
                if after not in upcoming:
                    upcoming[after] = count
                    count += 1
                cost = -(heads[e] + weight * log10p * LN10) + 0.0
                lines.append(f"{source}\t{upcoming[after]}\t{token + 1}\t{word + 1}\t{cost:.9g}\n")
        level = upcoming
    return "".join(lines) + "".join(f"{target}\n" for target in level.values())


def token_symbols(vocab_size: int) -> Iterator[str]:
    """The symbol table of token labels, line by line; a token's symbol is its id.

    White space, control characters and backslashes become \\uXXXX; a symbol that was there before ends in its label.
    """
    return _symbols(map(str, range(vocab_size)))


def word_symbols(automaton: Automaton, *, phi: bool = False) -> Iterator[str]:
    """The symbol table of word labels as in `token_symbols`, with `phi` its label too."""
    yield from _symbols(automaton.vocabulary)
    if phi:
        yield f"{PHI_SYMBOL}\t{phi_label(automaton)}\n"


def _symbols(symbols: Iterable[str]) -> Iterator[str]:
    yield f"{EPSILON_SYMBOL}\t{EPSILON}\n"
    taken = {"", EPSILON_SYMBOL, PHI_SYMBOL}
    for label, symbol in enumerate(symbols, start=1):
        if not symbol.isprintable() or " " in symbol or "\\" in symbol:
            symbol = "".join(c if c.isprintable() and c not in " \\" else f"\\u{ord(c):04x}" for c in symbol)
        if symbol in taken:
            symbol += f"\\{label}"
        taken.add(symbol)
        yield f"{symbol}\t{label}\n"
