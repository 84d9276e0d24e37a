"""N-gram models as they are used: loaded from a folder of `build-ngram`, an automaton file or an ARPA file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lattices.automaton import Automaton
from lattices.errors import RescoreError
from lattices.ngrams import SENTENCE_END
from lm.build_ngram import AUTOMATON_FILE, MANIFEST_FILE
from lm.files import atomic_file, cache_directory, read_json_object, sha256_of_file

SHIPPED_FILE = "model.arpa.gz"  # a third of the automaton's size
SHIPPED_NGRAM = Path(__file__).parent / "weights" / "smollm2-135m" / "ngram"
ARPA_SUFFIXES = (".arpa", ".arpa.gz", ".lm", ".gz")


@dataclass(frozen=True)
class LoadedNgram:
    """An n-gram model: its file, automaton, and the tokenizer it was made for (None: not known)."""

    file: Path
    automaton: Automaton
    tokenizer_sha256: str | None

    @cached_property
    def sha256(self) -> str:
        """sha256 of the file."""
        return sha256_of_file(self.file)

    def words_of_tokens(self, vocab_size: int, eos_token_ids: Sequence[int]) -> np.ndarray:
        """The model's word of every base token id, int32 `[vocab_size]`: the base's end-of-text is `</s>`.

        Raises `InvalidDataError` if its words are no token ids.
        """
        words = self.automaton.words_of_tokens(vocab_size)
        words[[token for token in eos_token_ids if token < vocab_size]] = SENTENCE_END
        return words


def load_ngram(path: Path) -> LoadedNgram:
    """Loads an n-gram model. Raises `RescoreError` if there is none, `InvalidDataError` if it is broken."""
    if path.is_dir():
        manifest = read_json_object(path / MANIFEST_FILE, missing=f"no n-gram model in {path}")
        tokenizer = manifest.get("tokenizer_sha256")
        made_for = tokenizer if isinstance(tokenizer, str) else None
        if (file := path / AUTOMATON_FILE).is_file():
            return LoadedNgram(file, Automaton.load(file), made_for)
        if (file := path / SHIPPED_FILE).is_file():
            return LoadedNgram(file, _compiled(file), made_for)
        raise RescoreError(f"no n-gram model in {path}: it has no {AUTOMATON_FILE}; make one: rescore build-ngram")
    if not path.is_file():
        raise RescoreError(f"no n-gram model at {path}; give a folder of rescore build-ngram or an ARPA file")
    if path.name.endswith(ARPA_SUFFIXES):
        return LoadedNgram(path, _compiled(path), None)
    return LoadedNgram(path, Automaton.load(path), None)


def _compiled(arpa: Path) -> Automaton:
    """The automaton of an ARPA file: compiled once and kept in the cache directory, keyed by the file's sha256."""
    from lm.arpa import read_arpa

    file = cache_directory() / "ngrams" / f"{sha256_of_file(arpa)}.bin"
    if not file.is_file():
        automaton = Automaton.compile(read_arpa(arpa))
        with atomic_file(file) as temporary:
            automaton.save(temporary)
    return Automaton.load(file)
