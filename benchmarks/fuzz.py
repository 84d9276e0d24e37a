"""Files of twenty kinds, damaged at random: each must be read, or be refused in one line, and in little time.

    python benchmarks/fuzz.py [--minutes 10] [--seed 0] [--only arpa,trace]

Real commands make a small valid file of every kind. Then, kind by kind, in a process of its own and over and over, one
file is changed (by cuts, other bytes, other numbers, words and lines) and read as the product reads it. A finding is
whatever is no `RescoreError` of one line: another exception, a warning, more than `LIMIT_S` seconds or `LIMIT_GB` more
of memory, the end of the process. Each is kept in a folder, with what was read.

Prints a table and one JSON line; exit status 1 if anything was found.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from soak_commands import jobs, lines, prepare, save_base

import rescore
from lattices.errors import RescoreError
from lm.base.catalog import identify
from lm.base.corpus import read_prompts
from lm.draft_vocabulary import read_draft_vocabulary
from lm.lookup_index import open_lookup
from lm.ngram.arpa import read_arpa
from lm.ngram.build import AUTOMATON_FILE
from lm.ngram.load import load_ngram
from lm.training.data import read_head_data
from rescore.costs.kept import read_costs
from rescore.rescorers.trees.choices import load_choices
from rescore.suites.files import load_runs
from rescore.suites.plan import read_plan
from rescore.table import text_table
from rescore.tasks.data import load_examples
from rescore.tasks.task_file import load_task_file
from rescore.terminal import printable
from rescore.tracing import read_trace

LIMIT_S = 75.0  # KenLM is given a minute for a model that may be damaged
LIMIT_GB = 4
LARGEST = 1 << 20  # bytes of a file that is changed
KENLM = Path(__file__).parent.parent / "tests" / "lm" / "reference" / "kenlm"
NUMBER = re.compile(rb"-?\d+(\.\d+)?([eE][+-]?\d+)?")
NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"2",
    b"1e999",
    b"-1e999",
    b"NaN",
    b"1.5",
    b"4294967296",
    str(1 << 63).encode(),
    b"9" * 40,
)
WORDS = (b"null", b"true", b'""', b"[]", b"{}", b'"\\ud800"', b"\xff\xfe", b"\x00", b"\xe2\x80\xa8", b"../x", b"&a *a")


@dataclass(frozen=True)
class Kind:
    """A kind of file: `make` writes a valid one (a file or a folder) from the inputs, `read` reads it."""

    make: Callable[[Path, Path], None]
    read: Callable[[Path], object]


@dataclass
class Tally:
    runs: int = 0
    read: int = 0
    refused: int = 0
    findings: dict[str, str] = field(default_factory=dict)  # by what went wrong and where: the folder it is kept in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="these kinds, with commas between them: " + ", ".join(KINDS))
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)  # of a process that reads one kind
    options = parser.parse_args()
    if options.inputs is not None:
        Fuzzer(options).run()
        return
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    names = options.only.split(",") if options.only else list(KINDS)
    make_inputs(folder, names)
    tallies = {name: in_a_process(name, folder, options, options.minutes / len(names)) for name in names}
    rows = [[name, *map(str, (t.runs, t.read, t.refused, len(t.findings)))] for name, t in tallies.items()]
    print(text_table(["kind", "runs", "read", "refused", "findings"], rows))
    print(json.dumps({"seed": options.seed, **{n: asdict(t) for n, t in tallies.items()}}))
    if any(tally.findings for tally in tallies.values()):
        sys.exit(f"the files are in {folder / 'found'}")
    shutil.rmtree(folder)


def in_a_process(name: str, folder: Path, options: argparse.Namespace, minutes: float) -> Tally:
    """Reads one kind in a process of its own until the time is up; one that ends before is a finding, and another one
    goes on."""
    all_of_it, end, seed = Tally(), time.monotonic() + 60 * minutes, options.seed
    while (left := end - time.monotonic()) > 0:
        arguments = ["--inputs", folder, "--only", name, "--seed", seed, "--minutes", left / 60]
        command = [sys.executable, __file__, *map(str, arguments)]
        with (folder / "stderr").open("w+b") as stderr:  # what libraries say; the end of it tells of a crash
            try:
                code = subprocess.run(
                    command, stdout=subprocess.DEVNULL, stderr=stderr, timeout=left + 2 * LIMIT_S
                ).returncode
            except subprocess.TimeoutExpired:  # in native code, which hears no alarm
                code = signal.SIGKILL
        written = folder / "tally.json"
        part = Tally(**json.loads(written.read_text())) if written.exists() else Tally()
        written.unlink(missing_ok=True)
        if code:
            said = (folder / "stderr").read_bytes().decode("utf-8", "replace").strip()[-300:]
            part.findings[f"the process ended with {code}: {said}"] = keep(folder, name, seed)
        for count in ("runs", "read", "refused"):
            setattr(all_of_it, count, getattr(all_of_it, count) + getattr(part, count))
        all_of_it.findings = part.findings | all_of_it.findings
        seed += 1_000_003
    return all_of_it


def keep(folder: Path, name: str, number: int) -> str:
    """Copies what is read now to the findings."""
    kept = folder / "found" / f"{name}-{number}"
    kept.parent.mkdir(exist_ok=True)
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder / "now", kept)
    return str(kept)


class Fuzzer:
    """Changes the files of one kind in the folder `now`, and reads them there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.name, self.seed = options.only, options.seed
        self.folder = options.inputs
        self.draws, self.tally = random.Random(options.seed), Tally()
        self.read = KINDS[self.name].read
        self.valid, self.now = self.folder / "valid" / self.name, self.folder / "now"
        shutil.rmtree(self.now, ignore_errors=True)
        shutil.copytree(self.valid, self.now)
        files = [path for path in sorted(self.valid.rglob("*")) if path.is_file()]
        self.contents = {p.relative_to(self.valid): c for p in files if len(c := p.read_bytes()) <= LARGEST and c}
        self.end = time.monotonic() + 60 * options.minutes

    def run(self) -> None:
        self._once()  # compiles, imports
        if self.tally.read != 1:
            sys.exit(f"the valid {self.name} is not read: {self.tally}")
        resource.setrlimit(resource.RLIMIT_AS, (in_use() + LIMIT_GB * 10**9, resource.RLIM_INFINITY))
        names = list(self.contents)
        while time.monotonic() < self.end:
            name = self.draws.choice(names)
            self._with(name, changed(self.contents[name], self.draws))
        self._write()

    def _with(self, name: Path, content: bytes) -> None:
        (self.now / name).write_bytes(content)
        self._once()
        if {p.relative_to(self.now) for p in self.now.rglob("*") if p.is_file()} - set(self.contents):
            shutil.rmtree(self.now)  # what the reader put beside it
            shutil.copytree(self.valid, self.now)
        (self.now / name).write_bytes(self.contents[name])

    def _once(self) -> None:
        self.tally.runs += 1
        signal.signal(signal.SIGALRM, too_long)
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                self.read(the_one(self.now))
        except RescoreError as error:
            self.tally.refused += 1
            if len(printable(str(error)).splitlines()) != 1:  # as the command line prints it
                self._found(f"a message of several lines: {error}")
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(f.filename).name}:{f.lineno}" for f in at if "site-packages" not in f.filename]
            self._found(f"{type(error).__name__} at {' '.join(ours[-3:])}: {str(error)[:200]}")
        else:
            self.tally.read += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _found(self, what: str) -> None:
        place = what.split(": ", 1)[0]
        if not any(each.startswith(place) for each in self.tally.findings):
            self.tally.findings[what] = keep(self.folder, self.name, self.seed + self.tally.runs)
            self._write()

    def _write(self) -> None:
        (self.folder / "tally.json").write_text(json.dumps(asdict(self.tally)))


def too_long(*_: object) -> None:
    raise TimeoutError(f"more than {LIMIT_S:g} s")


def in_use() -> int:
    """The process's address space, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def the_one(folder: Path) -> Path:
    """A file alone in its folder, else the folder."""
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_file() else folder


def changed(content: bytes, draws: random.Random) -> bytes:
    """One to four changes of a file."""
    for _ in range(draws.choice((1, 1, 1, 2, 4))):
        at = draws.randrange(len(content) + 1)
        after = min(len(content), at + draws.choice((1, 1, 2, 4, 8, 40, 400)))
        how = draws.randrange(8)
        if how == 0:
            content = content[:at]
        elif how == 1:
            content = content[:at] + content[after:]
        elif how == 2:
            content = content[:after] + content[at:]
        elif how == 3:
            content = content[:at] + draws.randbytes(after - at) + content[after:]
        elif how == 4:
            number = draws.choice((0, 1, -1, 1 << 31, 1 << 62)).to_bytes(8, "little", signed=True)
            content = content[: at // 8 * 8] + number[: draws.choice((4, 8))] + content[at // 8 * 8 + 8 :]
        elif how == 5:
            content = content[:at] + draws.choice(WORDS) + content[draws.choice((at, after)) :]
        elif how == 6:
            places = list(NUMBER.finditer(content[:100_000]))
            if places:
                place = draws.choice(places)
                content = content[: place.start()] + draws.choice(NUMBERS) + content[place.end() :]
        else:
            parts = content.split(b"\n")
            one, other = draws.randrange(len(parts)), draws.randrange(len(parts))
            parts[one], parts[other] = parts[other], parts[one]
            content = b"\n".join(parts)
    return content


# The kinds


def command(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "rescore", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def make_inputs(folder: Path, names: Sequence[str]) -> None:
    inputs = folder / "inputs"
    save_base(inputs / "base")
    prepare(inputs)
    for name in names:
        (folder / "valid" / name).mkdir(parents=True)
        KINDS[name].make(inputs, folder / "valid" / name)


def by_job(name: str) -> Callable[[Path, Path], None]:
    """What a command of the soak leaves."""

    def make(inputs: Path, out: Path) -> None:
        job = next(each for each in jobs(inputs) if each.name == name)
        command(*job.arguments, "--out", out)

    return make


def make_ngram(inputs: Path, out: Path) -> None:
    text = out.parent / "few.txt"
    text.write_text("".join((inputs / "text.txt").read_text().splitlines(keepends=True)[:40]))
    command("build-ngram", text, "--tokenizer", "words", "--order", 3, "--discount-fallback", "--out", out)
    text.unlink()


def made_ngram(name: str, *, pack: bool = False) -> Callable[[Path, Path], None]:
    """One file of an n-gram model."""

    def make(inputs: Path, out: Path) -> None:
        made = out.with_name(f"{out.name}.made")
        make_ngram(inputs, made)
        content = (made / name).read_bytes()
        (out / (f"{name}.gz" if pack else name)).write_bytes(gzip.compress(content) if pack else content)
        shutil.rmtree(made)

    return make


def make_kenlm(_: Path, out: Path) -> None:
    shutil.copy(KENLM / "probing.bin", out)


def make_medusa(_: Path, out: Path) -> None:
    """Two heads in Medusa's layout, as torch pickles them."""
    tensors = {}
    for head in range(2):
        tensors[f"{head}.0.linear.weight"] = torch.zeros(32, 32, dtype=torch.float16)
        tensors[f"{head}.0.linear.bias"] = torch.zeros(32, dtype=torch.float16)
        tensors[f"{head}.1.weight"] = torch.zeros(257, 32, dtype=torch.float16)
    torch.save(tensors, out / "medusa_lm_head.pt")
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "base"}
    (out / "config.json").write_text(json.dumps(config))


def copied(*names: str) -> Callable[[Path, Path], None]:
    def make(inputs: Path, out: Path) -> None:
        for name in names:
            shutil.copy(inputs / name, out)

    return make


def in_folder(name: str) -> Callable[[Path, Path], None]:
    def make(inputs: Path, out: Path) -> None:
        shutil.copytree(inputs / name, out, dirs_exist_ok=True)

    return make


def make_task(_: Path, out: Path) -> None:
    (out / "tickets.yaml").write_text(
        "source: {file: tickets.jsonl}\nprompt: |\n  Summarize this ticket:\n  {body}\nreference: summary\n"
        "metric: [ROUGE-L, chrF]\nlimits: {examples: 200, new_tokens: 96, prompt_tokens: 1024}\ngroup: customer\n"
    )


def make_rows(inputs: Path, out: Path) -> None:
    lines(out / "squad.jsonl", [json.loads(line) for line in (inputs / "data" / "squad.jsonl").open()][:6])


def make_costs(_: Path, out: Path) -> None:
    shutil.copy(Path(__file__).parent.parent / "docs" / "evidence" / "costs.json", out)


def make_choices(_: Path, out: Path) -> None:
    paths = [[0], [1], [0, 0], [0, 1], [1, 0]]
    (out / "choices.json").write_text(json.dumps(paths))


def make_lookup(inputs: Path, out: Path) -> None:
    command("build-lookup", inputs / "text.txt", "--tokenizer", inputs / "base", "--out", out)


def make_vocabulary(inputs: Path, out: Path) -> None:
    where = ["--tokenizer", inputs / "base", "--out", out / "vocabulary.json"]
    command("build-draft-vocabulary", inputs / "text.txt", *where)


def inputs_of(path: Path) -> Path:
    """The folder of inputs, from what is read."""
    return next(parent for parent in path.parents if (parent / "inputs").is_dir()) / "inputs"


def read_heads(path: Path) -> object:
    folder = path if path.is_dir() else path.parent
    return rescore.load_heads(identify(str(inputs_of(folder) / "base")), str(folder))


def read_corpus(path: Path) -> object:
    base = rescore.load_base(str(inputs_of(path) / "base"), device="cpu")
    return read_head_data(base, path, path.parent / "states")


KINDS: dict[str, Kind] = {
    "arpa": Kind(made_ngram("model.arpa"), read_arpa),
    "arpa.gz": Kind(made_ngram("model.arpa", pack=True), read_arpa),
    "automaton": Kind(made_ngram(AUTOMATON_FILE), load_ngram),
    "ngram": Kind(make_ngram, load_ngram),
    "kenlm": Kind(make_kenlm, load_ngram),
    "lookup": Kind(make_lookup, open_lookup),
    "vocabulary": Kind(make_vocabulary, read_draft_vocabulary),
    "trace": Kind(by_job("trace"), lambda path: list(read_trace(path).examples)),
    "results": Kind(by_job("eval"), lambda path: list(rescore.load_run(path).examples)),
    "suite results": Kind(by_job("suite"), load_runs),
    "suite": Kind(copied("suite.yaml"), read_plan),
    "task": Kind(make_task, load_task_file),
    "rows": Kind(make_rows, lambda path: load_examples(rescore.load_task("squad"), data=path)),
    "prompts": Kind(copied("prompts.jsonl"), lambda path: read_prompts(path, default_chat=False)),
    "corpus": Kind(in_folder("corpus"), read_corpus),
    "costs": Kind(make_costs, read_costs),
    "choices": Kind(make_choices, lambda path: load_choices(str(path))),
    "base": Kind(in_folder("base"), lambda path: rescore.load_base(str(path), device="cpu")),
    "heads": Kind(in_folder("heads"), read_heads),
    "medusa": Kind(make_medusa, read_heads),
}

if __name__ == "__main__":
    main()
