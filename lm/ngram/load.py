"""N-gram models as they are used: from a folder of `build-ngram`, an automaton, an ARPA file or a KenLM binary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from lattices.automaton import MAGIC as AUTOMATON_MAGIC
from lattices.automaton import Automaton
from lattices.errors import InvalidDataError, RescoreError, unreadable
from lattices.ngram_search import NgramSearch
from lattices.ngrams import SENTENCE_END
from lm.files import SHIPPED, atomic_file, sha256_of_file
from lm.keys import cache_entry, cached, remembered_sha256
from lm.ngram.arpa import KENLM_MAGIC
from lm.ngram.build import ARPA_FILE, AUTOMATON_FILE, MANIFEST_FILE
from lm.ngram.kenlm import KenlmModel, KenlmSearch
from lm.records import read_record

COMPILATION = 1  # changes with what `Automaton.compile` makes of a model
SUM_SUFFIX = ".sha256"
SHIPPED_FILE = "model.arpa.gz"  # a third of the automaton's size
SHIPPED_NGRAM = SHIPPED / "smollm2-135m" / "ngram"
ARPA_SUFFIXES = (".arpa", ".arpa.gz", ".lm", ".gz")


class Manifest(msgspec.Struct, frozen=True):
    """What the manifest of a model's folder says of its words, and of its estimation."""

    tokenizer: str | None = None  # the base LM's name, or `words`; None: not known
    tokenizer_sha256: str | None = None
    surface: bool = False  # words are token strings, not ids
    smoothing: str = ""
    discounts: tuple[tuple[float, ...], ...] = ()  # by order
    files: dict[str, str] | None = None  # sha256 by name; None: an earlier version's, or a shipped model's


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a model's folder. Raises `RescoreError` if there is none, `InvalidDataError` if it is broken."""
    return read_record(
        folder / MANIFEST_FILE, Manifest, missing=f"no n-gram model in {folder}", advice="build the model again"
    )


@dataclass(frozen=True)
class LoadedNgram:
    """An n-gram model as it is used."""

    file: Path
    model: Automaton | KenlmModel  # KenLM's, of a KenLM binary
    tokenizer_sha256: str | None  # that it was made for; None: not known

    @property
    def order(self) -> int:
        """Length of the longest n-grams."""
        return self.model.order

    @cached_property
    def sha256(self) -> str:
        """sha256 of the file."""
        return remembered_sha256(self.file)

    def search(
        self, vocab_size: int, eos_token_ids: Sequence[int], *, end_token: int | None = None
    ) -> NgramSearch | KenlmSearch:
        """The search with this model over the lattices of a base LM, whose end-of-text is `</s>`.

        After `end_token` (a token id) nothing is scored, and drafts that differ there only are one. Raises
        `InvalidDataError` if the model's words are no token ids.
        """
        if isinstance(self.model, KenlmModel):
            return KenlmSearch(self.model, eos_token_ids, end_token=end_token)
        return NgramSearch(self.model, self.words_of_tokens(vocab_size, eos_token_ids), end_token=end_token)

    def words_of_tokens(self, vocab_size: int, eos_token_ids: Sequence[int]) -> np.ndarray:
        """The model's word of every base token id, int32 `[vocab_size]`. Raises as `search`: the numbers in a text are
        no token ids either."""
        assert isinstance(self.model, Automaton), "KenLM takes words as they are"
        words = self.model.words_of_tokens(vocab_size)
        if (foreign := next((word for word in self.model.vocabulary if not _may_be_id(word)), None)) is not None:
            raise InvalidDataError(
                f"the words of the n-gram model {self.file} are no token ids, {foreign!r:.40} is one; build it with "
                "--tokenizer BASE, and without --surface"
            )
        words[[token for token in eos_token_ids if token < vocab_size]] = SENTENCE_END
        return words


def _may_be_id(word: str) -> bool:
    """Whether a word is a number, or one of those in angle brackets that stand for no text."""
    return (word.isascii() and word.isdecimal()) or (word.startswith("<") and word.endswith(">"))


def load_ngram(path: Path) -> LoadedNgram:
    """Loads an n-gram model. Raises `RescoreError` if there is none, `InvalidDataError` if it is broken."""
    file, manifest = find_ngram(path, AUTOMATON_FILE)
    if is_arpa(file):
        model: Automaton | KenlmModel = _compiled(file)
    else:
        model = KenlmModel.load(file) if _begins(file, KENLM_MAGIC) else Automaton.load(file)
    check_files(file, manifest)
    return LoadedNgram(file, model, manifest.tokenizer_sha256)


def find_ngram(path: Path, name: str) -> tuple[Path, Manifest]:
    """The file of a model and what is known of its words: `path` itself, or of a model's folder the file called
    `name`, in place of which a shipped model has its packed ARPA file.

    Raises `RescoreError` if there is none, and as `read_manifest`.
    """
    if not path.is_dir():
        if not path.is_file():
            raise RescoreError(f"no n-gram model at {path}; give a folder of rescore build-ngram or an ARPA file")
        return path, Manifest()
    manifest = read_manifest(path)
    file = next((path / each for each in (name, SHIPPED_FILE) if (path / each).is_file()), None)
    if file is None:
        raise RescoreError(f"no n-gram model in {path}: it has no {name}; make one: rescore build-ngram")
    return file, manifest


def check_files(file: Path, manifest: Manifest) -> None:
    """Whether the ARPA file and the automaton beside `file` are one model: those that the manifest was written with.

    One of them may be missing, or the manifest not say (an earlier version's, a shipped model's). Raises
    `InvalidDataError` with the file that was replaced, `RescoreError` for one that can't be read.
    """
    for name in (ARPA_FILE, AUTOMATON_FILE):
        path, built = file.parent / name, (manifest.files or {}).get(name)
        try:
            is_replaced = built is not None and path.is_file() and remembered_sha256(path) != built
        except OSError as error:
            raise unreadable(path, error) from error
        if is_replaced:
            raise InvalidDataError(
                f"{path} was replaced after the model in its folder was built, the rest of the folder is of another "
                f"model; build the model again, or give the file itself, {path}, in place of the folder"
            )


def is_arpa(path: Path) -> bool:
    """Whether a file is an ARPA file, by its name in any case; neither a KenLM binary nor an automaton."""
    named = path.name.lower().endswith(ARPA_SUFFIXES)
    return named and not _begins(path, KENLM_MAGIC) and not _begins(path, AUTOMATON_MAGIC)


def _begins(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(magic)) == magic
    except OSError as error:
        raise unreadable(path, error) from error


def _compiled(arpa: Path) -> Automaton:
    """The automaton of an ARPA file: compiled once and kept in the cache directory, keyed by the file's sha256."""
    from lm.ngram.arpa import read_arpa

    before = remembered_sha256(arpa)
    document = {"arpa": before, "packed": arpa.suffix == ".gz", "compilation": COMPILATION}

    def compiled(file: Path) -> Automaton:
        automaton = Automaton.compile(read_arpa(arpa))
        if remembered_sha256(arpa) != before:
            raise RescoreError(f"{arpa} changed while it was read; give it once it is whole")
        with atomic_file(file) as temporary:
            automaton.save(temporary)
        with atomic_file(file.with_suffix(SUM_SUFFIX)) as temporary:
            temporary.write_text(sha256_of_file(file))
        return Automaton.load(file)

    entry = cache_entry("ngrams", "automaton", document, suffix=".bin")
    return cached(entry, f"the automaton of {arpa.name}", read=_intact, make=compiled)


def _intact(file: Path) -> Automaton | None:
    """A compiled automaton, if it is there and holds the very bytes that were written."""
    try:
        if sha256_of_file(file) == file.with_suffix(SUM_SUFFIX).read_text():
            return Automaton.load(file)
    except (OSError, ValueError, RescoreError):
        pass
    return None
