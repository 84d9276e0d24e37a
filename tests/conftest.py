"""Tiny random models that need no download: a byte tokenizer, a two-layer Llama in float64, random block heads."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread only waits

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lattices.errors import RescoreError
from lm.base.catalog import BUILT_IN, load_base, resolve_base
from lm.base.model import BaseLM
from lm.files import cache_directory
from lm.heads.block_heads import BlockHeads
from lm.heads.nets import BlockHeadsConfig
from lm.ngram.load import SHIPPED_NGRAM, load_ngram
from rescore.__main__ import main

END = "<|end|>"
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end: no collection of garbage need look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache directory of its own."""
    # `mktemp` looks through all folders that there are for the next number: with thousands, most of a test's time.
    folder = Path(tempfile.mkdtemp(prefix="cache-", dir=tmp_path_factory.getbasetemp()))
    monkeypatch.setenv("RESCORE_CACHE", str(folder))
    return folder


def byte_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """256 bytes and an end-of-text token (id 256)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_base(folder: Path, *, seed: int = 0, hidden_size: int = 32, layers: int = 2, chat: bool = True) -> Path:
    """A random Llama with grouped-query attention over bytes, as a model folder."""
    tokenizer = byte_tokenizer(chat=chat)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.6,  # larger than usual: outputs that vary, no near-ties
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_heads(base: BaseLM, *, h: int = 4, seed: int = 0, strength: float = 0.3) -> BlockHeads:
    """Random heads near head 1 that see its token, in the base's precision."""
    torch.manual_seed(seed)
    name, tokenizer = base.identity.name, base.identity.tokenizer_sha256
    heads = BlockHeads(
        BlockHeadsConfig(
            h=h,
            hidden_size=base.hidden_size,
            inner_size=16,
            vocab_size=base.vocab_size,
            base_name=name,
            tokenizer_sha256=tokenizer,
            token_size=8,
        )
    )
    for parameter in (*heads.net.outer.values(), heads.net.token["weight"]):
        torch.nn.init.normal_(parameter, std=strength)
    return heads.to(base.heads_dtype).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny base LM."""
    return save_tiny_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_base(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseLM:
    """The tiny base LM in float64."""
    os.environ["RESCORE_CACHE"] = str(tmp_path_factory.mktemp("session-cache"))
    return load_base(str(tiny_folder), dtype="float64", device="cpu")


@pytest.fixture(scope="session")
def tiny_heads_folder(tiny_base: BaseLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random heads (h = 4) for the tiny base LM."""
    folder = tmp_path_factory.mktemp("heads") / "tiny"
    make_heads(tiny_base).save(folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def converted_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache's `models` with the converted copy of the built-in model, which takes longer to make than to run: one
    of several processes of pytest-xdist makes it for all."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESCORE_CACHE", str(shared / "converted"))
        return resolve_base(BUILT_IN).folder.parent


@pytest.fixture
def converted(cache_folder: Path, converted_models: Path) -> None:
    """The test's own cache has that copy, too."""
    (cache_folder / converted_models.name).symlink_to(converted_models)


@pytest.fixture(scope="session")
def compiled_ngrams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache's `ngrams` with the automaton of the shipped n-gram, which takes longer to compile than a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESCORE_CACHE", str(tmp_path_factory.mktemp("compiled")))
        load_ngram(SHIPPED_NGRAM)
        return cache_directory() / "ngrams"


@pytest.fixture
def shipped_ngram(cache_folder: Path, compiled_ngrams: Path) -> None:
    """The test's own cache has it, too."""
    (cache_folder / compiled_ngrams.name).symlink_to(compiled_ngrams)


def refused(call: Callable[[], object], *expected: str | type[RescoreError]) -> str:
    """The one line with which a call is refused. `expected`: texts that it holds, and the kind of error."""
    kind = next((each for each in expected if isinstance(each, type)), RescoreError)
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(text in message for text in expected if isinstance(text, str)), message
    return message


@dataclass(frozen=True)
class Run:
    """What a run of the command left."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)

    def refused(self, message: str, code: int = 2) -> None:
        """One line on stderr that says `message`, nothing on stdout, no traceback."""
        assert (self.code, self.out) == (code, ""), self
        assert re.fullmatch(r"rescore: [^\n]+\n", self.err), self.err
        assert re.search(message, self.err), self.err


Command = Callable[..., Run]
SETTINGS = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "true"}


@pytest.fixture
def rescore(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process, with this process's stdout and stderr down to the file descriptors."""
    for name, value in SETTINGS.items():  # with the first of them set, the command does not start itself anew
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["rescore", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capfd.readouterr()
        return Run(int(exit_.value.code or 0), out, err)

    return run


@pytest.fixture
def model(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path) -> list[object]:
    """Options for the tiny model (h = 4) and six examples."""
    return [
        "--base", tiny_folder, "--heads", tiny_heads_folder, "--data", squad_file, "--dtype", "float64",
        "--device", "cpu", "--max-new-tokens", 12,
    ]  # fmt: skip


SEVERAL = ("--task", "--rescorer", "--corpus", "--against", "--block-efficiency", "--results")


def once(*arguments: object) -> list[object]:
    """Arguments of a command in which an option that comes again takes the first one's place; the command itself
    refuses it twice."""
    kept = list(arguments)
    for place in range(len(kept) - 1, -1, -1):
        name = kept[place]
        if isinstance(name, str) and name.startswith("--") and name not in SEVERAL and name in kept[:place]:
            first = kept.index(name)
            del kept[first : first + 2]
            return once(*kept)
    return kept


def squad_records(count: int) -> list[dict[str, object]]:
    """Questions of different lengths, so that batches are ragged."""
    return [
        {
            "id": f"q{i}",
            "context": f"In {1900 + i} the bridge was built" + " of stone" * (i % 3) + ".",
            "question": f"When was bridge {i} built?",
            "answers": {"text": [str(1900 + i)], "answer_start": [3]},
        }
        for i in range(count)
    ]


def write_lines(path: Path, records: Iterable[object]) -> Path:
    """A JSON lines file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def squad_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six examples of the task squad."""
    return write_lines(tmp_path_factory.mktemp("data") / "squad.jsonl", squad_records(6))


@pytest.fixture
def options(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path) -> dict[str, Any]:
    """An evaluation of these examples, for `evaluating`: rescorers and the like are added to it."""
    return dict(
        base=str(tiny_folder), heads=str(tiny_heads_folder), data=str(squad_file), dtype="float64", device="cpu", k=8,
        max_new_tokens=24,
    )  # fmt: skip


@contextmanager
def no_root_rights() -> Iterator[None]:
    """Permissions of files hold, also for root: the capabilities that pass over them are laid down meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    kept, fewer = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, kept) == 0
    fewer[:] = kept[:]
    fewer[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, kept) == 0


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does: writes beyond `size` bytes of a file fail, those before succeed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
