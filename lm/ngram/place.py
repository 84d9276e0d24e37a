"""Where an n-gram model goes if the user does not say: a folder beside its corpus, called after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lattices.errors import IncompatibleError, OutputError, RescoreError
from lattices.paths import is_writable, user_path
from lm.base.own_output import OWN_PREFIX
from lm.files import changed_settings, read_json_object
from lm.ngram.corpus import HUB_PREFIX
from lm.text_files import name_without_endings

MADE_OF = (  # what of a manifest makes one model another
    "order", "tokenizer", "tokenizer_sha256", "surface", "errors", "field", "smoothing", "prune", "discount_fallback",
    "max_ngrams", "estimator", "corpora",
)  # fmt: skip


def default_folder(corpora: Sequence[Path | str], order: int) -> Path:
    """`NAME-4gram` beside a corpus NAME.txt, NAME.jsonl.gz ... or a folder NAME.

    Raises `RescoreError` for a corpus that is no file or folder here and for several, `OutputError` where nothing can
    be written beside it; each asks for --out.
    """
    if len(corpora) != 1:
        raise RescoreError("several corpora have no place of their own; give the model a folder: --out DIR")
    corpus = corpora[0]
    if isinstance(corpus, str) and corpus.startswith((HUB_PREFIX, OWN_PREFIX)):
        raise RescoreError(f"{corpus} has no place of its own; give the model a folder: --out DIR")
    path = user_path(corpus, "the corpus")
    if not path.exists():
        raise RescoreError(f"can't read {path}: No such file or directory")
    path = path.absolute() if path.name not in ("", "..") else path.resolve()  # "." and ".." have no name
    if not is_writable(path.parent):
        raise OutputError(f"can't write beside {corpus}; give the model a folder elsewhere: --out DIR")
    folder = path.with_name(f"{path.name if path.is_dir() else name_without_endings(path)}-{order}gram")
    here = Path.cwd()
    return folder.relative_to(here) if not Path(corpus).is_absolute() and folder.is_relative_to(here) else folder


def check_same(manifest: Path, wanted: Mapping[str, Any]) -> None:
    """Raises `IncompatibleError` with the difference if `manifest` is there and of a model made of other things."""
    if not manifest.is_file():
        return
    found = read_json_object(manifest, missing=f"no n-gram model in {manifest.parent}", advice="give another --out")
    corpora = {source["name"]: source["sha256"][:12] for source in wanted["corpora"]}
    before = {
        source.get("name"): str(source.get("sha256"))[:12]
        for source in found.get("corpora") or ()
        if isinstance(source, dict)
    }
    changed = changed_settings(
        {name: found.get(name) for name in MADE_OF} | {"corpora": before},
        {name: wanted[name] for name in MADE_OF} | {"corpora": corpora},
    )
    if changed:
        raise IncompatibleError(
            f"{manifest.parent} holds another model ({'; '.join(changed)}); remove it, or give this one --out DIR"
        )
