"""`own:PROMPTS` as a corpus: the base LM's own greedy output for a file of prompts, generated once and kept.

The folder (of `lm.base.corpus.generate_corpus`, without the hidden states) lies in the cache directory, under a key of
all that the output depends on. A killed generation goes on where it stopped, a broken folder is made again, and of
several processes one generates it for all.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lattices.paths import user_path
from lm.base.corpus import (
    CORPUS_FILE,
    GENERATION,
    HIDDEN_FILE,
    MANIFEST_FILE,
    GenerationOptions,
    generate_corpus,
    read_prompts,
    read_settings,
)
from lm.files import read_json_object, sha256_of_file
from lm.keys import cache_entry, cached, software
from lm.locks import warn
from lm.options import Device, Dtype

OWN_PREFIX = "own:"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class OwnOutput(GenerationOptions):
    """How own output is generated (greedy)."""

    base: str = "smollm2-135m"
    dtype: Dtype = "float32"
    device: Device = "auto"


def own_output(
    prompts: Path, settings: OwnOutput, *, tokenizer_sha256: str | None, progress: Progress | None = None
) -> Path:
    """The folder of the base's output for `prompts` (a file as `lm.base.corpus.read_prompts` takes it), generated if
    it is not there or not whole.

    `tokenizer_sha256`: of the tokenizer that its words are counted by, None for words at white space. Raises
    `RescoreError` for options that can't be used, `IncompatibleError` if the base has another tokenizer.
    """
    from lm.base.catalog import choose_device, identify, load_base, load_tokenizer

    settings.check()
    prompts = user_path(prompts, OWN_PREFIX)
    if tokenizer_sha256 is None:
        raise RescoreError(
            f"{OWN_PREFIX}{prompts} is counted by the base's tokens, not by words; choose its --tokenizer"
        )
    identity = identify(settings.base, dtype=settings.dtype)
    if tokenizer_sha256 != identity.tokenizer_sha256:
        raise IncompatibleError(
            f"{OWN_PREFIX}{prompts} is output of {settings.base} and counted by its tokens; choose --tokenizer "
            f"{settings.base}, or another --base"
        )
    chosen = read_prompts(prompts, default_chat=bool(load_tokenizer(settings.base).chat_template))
    document = {
        "base": dataclasses.asdict(identity),
        # The batch size too: a sum of other lengths is rounded otherwise, and a near-tie may turn.
        **{name: getattr(settings, name) for name in ("max_new_tokens", "max_prompt_tokens", "batch_size")},
        "prompts": [[prompt.text, prompt.chat] for prompt in chosen],
        "generation": GENERATION,
        "device": choose_device(settings.device).partition(":")[0],
        **software(),
    }

    def generated(folder: Path) -> Path:
        base = load_base(settings.base, dtype=settings.dtype, device=settings.device)
        if base.identity != identity:  # replaced since, perhaps while another process was waited for
            raise IncompatibleError(f"the files of {settings.base} were replaced while they were read; run it again")
        generate = partial(
            generate_corpus, base, chosen, folder, settings,
            progress=partial(progress, f"generate {prompts.name}") if progress else None,
        )  # fmt: skip
        try:
            generate()
        except (InvalidDataError, IncompatibleError) as error:
            if not folder.is_dir():
                raise
            warn(f"what was generated for {prompts.name} before can't be gone on with ({error}); it is made again")
            shutil.rmtree(folder, ignore_errors=True)
            generate()
        # The states are for training heads, and a hundred times the text.
        (folder / HIDDEN_FILE).unlink(missing_ok=True)
        return folder

    entry = cache_entry("own-output", prompts.stem, document)
    what = f"the output for {prompts.name}"
    return cached(entry, what, read=_whole, make=generated, is_broken=lambda folder: (folder / MANIFEST_FILE).is_file())


def _whole(folder: Path) -> Path | None:
    """The folder, if its generation is finished and its corpus is what its manifest says."""
    try:
        read_settings(folder)
        manifest = read_json_object(folder / MANIFEST_FILE, missing="")
        return folder if manifest.get("corpus_sha256") == sha256_of_file(folder / CORPUS_FILE) else None
    except (RescoreError, OSError):
        return None
