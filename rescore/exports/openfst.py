"""Writes an n-gram automaton, and a lattice of a trace with their exact composition, as OpenFst text (docs/formats.md).

The texts themselves: `lattices.openfst`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from lattices import openfst
from lattices.automaton import Automaton
from lattices.errors import IncompatibleError, RescoreError, UnknownNameError
from lattices.lattice import Lattice
from lm.files import atomic_file
from lm.ngram.load import load_ngram
from rescore.checks import check_held_k
from rescore.runs.weights import target_of
from rescore.tracing import Trace, TracedExample, load_trace


def export_openfst(
    ngram: Annotated[Path, "Folder of build-ngram, automaton or ARPA file."],
    out: Annotated[Path, "Folder for the text files."],
    *,
    trace: Annotated[Path | None, "Trace folder to take a lattice from."] = None,
    example: Annotated[str | None, "Id of the trace's example; default: the first."] = None,
    position: Annotated[int, "Output token before which the lattice stands, from 0."] = 0,
    k: Annotated[int, "Tokens of each head that are in the lattice."] = 16,
    alpha: Annotated[float, "Weight of the n-gram model."] = 1.0,
    phi: Annotated[bool, "Give back-off arcs a label of their own, for phi matchers; else epsilon."] = False,
) -> list[Path]:
    """Writes the files into the folder `out` and gives their paths.

    `ngram`: folder of build-ngram, automaton or ARPA file; `alpha`: weight of its log-probabilities; `phi`: back-off
    arcs get a label of their own. With a `trace`: also the lattice `[h, k]` that stands before output token `position`
    of the `example` (an id, default the first), and the automaton then starts where the tokens before it lead to.

    Raises `RescoreError` for a KenLM binary, a position or k that the trace does not hold; `IncompatibleError` for a
    model made for another tokenizer than the trace's; `UnknownNameError` for an example that is not there.
    """
    found = load_ngram(ngram)
    if not isinstance(automaton := found.model, Automaton):
        raise RescoreError(f"{ngram} is a KenLM binary, which can't be written out; give its ARPA file")
    start, files = automaton.start, dict[str, Iterable[str]]()
    if trace is not None:
        traced = load_trace(trace)
        header, base = traced.header, target_of(traced)
        chosen = _example(traced, example)
        lattice, before = _lattice_at(chosen, position, k)
        if found.tokenizer_sha256 and base.tokenizer_sha256 not in (None, found.tokenizer_sha256):
            raise IncompatibleError(f"{ngram} was made for another tokenizer than the base LM's of {trace}")
        words = found.words_of_tokens(header.vocab_size, header.eos_token_ids)
        start = automaton.state_after(words[before[len(before) - min(len(before), automaton.order - 1) :]].tolist())
        files["lattice.txt"] = [openfst.lattice_text(lattice, words)]
        files["composition.txt"] = [openfst.composition_text(lattice, words, automaton, start, weight=alpha)]
        files["tokens.syms"] = openfst.token_symbols(header.vocab_size)
    label = openfst.phi_label_of(automaton) if phi else None
    files["automaton.txt"] = openfst.automaton_text(automaton, weight=alpha, start=start, phi_label=label)
    files["words.syms"] = openfst.word_symbols(automaton, phi_label=label)
    for name, blocks in files.items():
        with atomic_file(out / name) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(blocks)
    return [out / name for name in files]


def _example(trace: Trace, wanted: str | None) -> TracedExample:
    """The example with that id; None: the first."""
    for example in trace.examples:
        if wanted in (None, example.id):
            return example
    raise UnknownNameError("example", str(wanted), [example.id for example in trace.examples])


def _lattice_at(example: TracedExample, position: int, k: int) -> tuple[Lattice, list[int]]:
    """The lattice `[h, k]` before output token `position`, and the token ids before it."""
    last = len(example.output_ids) - 1
    if not 0 <= position <= last:
        raise RescoreError(f"--position {position}: the example {example.id} has the positions 0 to {last}")
    check_held_k(example.lattice.k, k)
    return example.lattice[position].top(k), [*example.prompt_ids.tolist(), *example.output_ids[:position].tolist()]
