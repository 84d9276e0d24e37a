"""Writes an n-gram automaton, and a lattice of a trace with their exact composition, as OpenFst text (docs/formats.md).

The texts themselves: `lattices.openfst`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lattices import openfst
from lattices.automaton import Automaton
from lattices.errors import IncompatibleError, RescoreError, UnknownNameError
from lattices.lattice import Lattice
from lm.files import atomic_file
from lm.ngram.load import load_ngram
from rescore.checks import check_held_k
from rescore.runs.weights import target_of
from rescore.tracing import Trace, load_trace


def export_openfst(
    ngram: Path,
    out: Path,
    *,
    trace: Path | None = None,
    example: str | None = None,
    position: int = 0,
    k: int = 16,
    alpha: float = 1.0,
    phi: bool = False,
) -> list[Path]:
    """Writes the files into the folder `out` and gives their paths.

    `ngram`: folder of build-ngram, automaton or ARPA file; `alpha`: weight of its log-probabilities; `phi`: back-off
    arcs get a label of their own. With a `trace`: also the lattice `[h, k]` that stands before output token `position`
    of the `example` (an id, default the first), and the automaton then starts where the tokens before it lead to.

    Raises `RescoreError` for a KenLM binary, a position or k that the trace does not hold; `IncompatibleError` for a
    model made for another tokenizer than the trace's; `UnknownNameError` for an example that is not there.
    """
    ngram_model = load_ngram(ngram)
    if not isinstance(automaton := ngram_model.model, Automaton):
        raise RescoreError(f"{ngram} is a KenLM binary, which can't be written out; give its ARPA file")
    start, files = automaton.start, dict[str, Iterable[str]]()
    if trace is not None:
        traced = load_trace(trace)
        header, of_ngram = traced.header, ngram_model.tokenizer_sha256
        lattice, before = _lattice_at(traced, example, position, k)
        if of_ngram and target_of(traced).tokenizer_sha256 not in (None, of_ngram):
            raise IncompatibleError(f"{ngram} was made for another tokenizer than the base LM's of {trace}")
        words = ngram_model.words_of_tokens(header.vocab_size, header.eos_token_ids)
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


def _lattice_at(trace: Trace, name: str | None, position: int, k: int) -> tuple[Lattice, list[int]]:
    """The lattice `[h, k]` before an output token of the example with that id (None: the first), and the token ids
    before it."""
    example = next((of for of in trace.examples if name in (None, of.id)), None)
    if example is None:
        raise UnknownNameError("example", str(name), [of.id for of in trace.examples])
    last = len(example.output_ids) - 1
    if not 0 <= position <= last:
        raise RescoreError(f"--position {position}: the example {example.id} has the positions 0 to {last}")
    check_held_k(example.lattice.k, k)
    return example.lattice[position].top(k), [*example.prompt_ids.tolist(), *example.output_ids[:position].tolist()]
