"""What kills, interrupts, full disks, damaged files and second processes leave: real commands, drawn at random.

    python benchmarks/soak.py [--minutes 30] [--seed 0] [--only eval,suite]

Each command runs once undisturbed on a tiny model with random weights: that result is the reference. Then, round by
round, one command and one fault are drawn:

    kill      SIGKILL at a random moment, up to three times
    stop      Ctrl-C (SIGINT) at a random moment
    disk      the disk is full after a random number of bytes (a small tmpfs where one can be mounted, else a limit on
              the size of files)
    damage    a kill or a whole run, then one random file of its folder or of the cache is cut short, or some of its
              bytes are changed
    race      two to four processes of the same command at once, in one cache, into one folder or each into its own

and the same command runs again, undisturbed. Whatever happened, that must end with the result of the reference, or
refuse in one line that names what is damaged; then that is removed, and it must end with it the next time. No finished
example may be gone or changed, no traceback come.

Prints a table and one JSON line; exit status 1 if anything was wrong, and the folder is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soak_commands import COMMAND, Job, jobs, prepare, save_base

from rescore.table import text_table

FAULTS = ("kill", "stop", "disk", "damage", "race")
LIMIT = 300.0  # seconds, of a command that took some: longer is a fault, too
PASSED = (0, 2, 130)  # done, refused, stopped by Ctrl-C
KEPT = ".rescore.lock"


@dataclass
class Place:
    """A cache and a folder for results, in which one round takes place."""

    root: Path

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def out(self) -> Path:
        return self.root / "out"


@dataclass
class Ran:
    code: int
    out: str
    err: str
    seconds: float

    @property
    def is_clean(self) -> bool:
        """Whether it ended as a command may: killed by us, done, or refused in one line without a traceback."""
        said = [line for line in self.err.replace("\r", "\n").split("\n") if line.strip()]
        told = all(line.startswith(("rescore: ", "rescore ")) for line in said)
        return self.code == -signal.SIGKILL or (self.code in PASSED and told)


@dataclass
class Tally:
    """What the rounds of one command and fault came to."""

    rounds: int = 0
    runs: int = 0
    refused: int = 0  # of the runs after the fault: they said what to remove
    wrong: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="these commands, with commas between them")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(folder, random.Random(options.seed))
    names = [job.name for job in soak.jobs]
    only = options.only.split(",") if options.only else names
    if unknown := set(only) - set(names):
        parser.error(f"no command {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    soak.jobs = [job for job in soak.jobs if job.name in only]
    soak.run(60 * options.minutes)
    report(soak, options)
    if soak.wrong:
        sys.exit(f"wrong: {len(soak.wrong)}; see {folder}")
    shutil.rmtree(folder)


class Soak:
    """The rounds; `tallies` by command and fault."""

    def __init__(self, folder: Path, draws: random.Random) -> None:
        self.folder, self.draws = folder, draws
        self.inputs = folder / "inputs"
        save_base(self.inputs / "base")
        self.jobs = jobs(self.inputs)
        self.tallies: dict[tuple[str, str], Tally] = {}
        self.references: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.began = time.monotonic()

    @property
    def wrong(self) -> list[str]:
        return [line for tally in self.tallies.values() for line in tally.wrong]

    def run(self, seconds: float) -> None:
        prepare(self.inputs)
        for job in self.jobs:
            place = self._place(f"reference-{job.name}")
            ran = self._command(job, place)
            assert ran.code == 0 and ran.is_clean, (job.name, ran)
            self.references[job.name], self.seconds[job.name] = job.result(place.out, ran.out), ran.seconds
            shutil.rmtree(place.root)
        self.began = time.monotonic()
        number = 0
        while time.monotonic() - self.began < seconds:
            job, fault = self.draws.choice(self.jobs), self.draws.choice(FAULTS)
            if fault != "race" or job.has_out:
                number += 1
                self._round(number, job, fault)

    def _round(self, number: int, job: Job, fault: str) -> None:
        tally = self.tallies.setdefault((job.name, fault), Tally())
        tally.rounds += 1
        place = self._place(f"{number:05d}-{job.name}-{fault}")
        before = len(tally.wrong)
        try:
            getattr(self, f"_{fault}")(job, place, tally)
            self._finish(job, place, tally, damaged=fault == "damage")
        except Exception as error:  # of what is checked here: it is a finding like others
            tally.wrong.append(f"{place.root.name}: {type(error).__name__}: {error}")
        if len(tally.wrong) == before:
            shutil.rmtree(place.root)
        else:
            print(tally.wrong[before:], file=sys.stderr, flush=True)

    def _kill(self, job: Job, place: Place, tally: Tally) -> None:
        for _ in range(self.draws.randint(1, 3)):
            self._interrupted(job, place, tally, signal.SIGKILL)

    def _stop(self, job: Job, place: Place, tally: Tally) -> None:
        self._interrupted(job, place, tally, signal.SIGINT)

    def _disk(self, job: Job, place: Place, tally: Tally) -> None:
        size = int(2 ** self.draws.uniform(10, 21))
        with small_disk(place.root, size) as mounted:
            limit = None if mounted else size
            self._check(job, self._command(job, place, file_limit=limit), place, tally)
            if mounted:  # what there is stays there when there is room again
                shutil.copytree(place.root, place.root.with_suffix(".kept"), symlinks=True)
        if mounted:
            shutil.copytree(place.root.with_suffix(".kept"), place.root, dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(place.root.with_suffix(".kept"))

    def _damage(self, job: Job, place: Place, tally: Tally) -> None:
        if self.draws.random() < 0.5:
            self._interrupted(job, place, tally, signal.SIGKILL)
        else:
            self._check(job, self._command(job, place), place, tally)
        files = [p for p in sorted(place.root.rglob("*")) if p.is_file() and p.name != KEPT and p.stat().st_size]
        if not files:
            return
        path = self.draws.choice(files)
        content = bytearray(path.read_bytes())
        at = self.draws.randrange(len(content))
        if self.draws.random() < 0.5:
            path.write_bytes(content[:at])
            (place.root / "damage").write_text(f"{path.relative_to(place.root)} cut to {at} of {len(content)} bytes")
        else:
            content[at : at + 16] = self.draws.randbytes(len(content[at : at + 16]))
            path.write_bytes(content)
            (place.root / "damage").write_text(f"{path.relative_to(place.root)} other bytes from {at}")

    def _race(self, job: Job, place: Place, tally: Tally) -> None:
        count, shared = self.draws.randint(2, 4), self.draws.random() < 0.5
        places = [place] * count if shared else [place, *(Apart(place.root, n) for n in range(1, count))]
        started = [(self._start(job, each), each) for each in places]
        done = 0
        for process, each in started:
            ran = self._ended(process)
            self._check(job, ran, each, tally)
            done += ran.code == 0
            if ran.code == 0 and job.result(each.out, ran.out) != self.references[job.name]:
                tally.wrong.append(f"{place.root.name}: a process beside others has another result")
        if not done or (not shared and done < count):
            tally.wrong.append(f"{place.root.name}: {done} of {count} processes ended well")

    def _interrupted(self, job: Job, place: Place, tally: Tally, what: signal.Signals) -> None:
        process = self._start(job, place)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.draws.uniform(0.3, 1.0) * self.seconds[job.name])
        finished = finished_lines(place.out)
        if process.poll() is None:
            os.killpg(process.pid, what)
        ran = self._ended(process)
        self._check(job, ran, place, tally)
        if (now := finished_lines(place.out))[: len(finished)] != finished:
            tally.wrong.append(f"{place.root.name}: {len(finished)} examples were finished, of which {now} are left")

    def _finish(self, job: Job, place: Place, tally: Tally, *, damaged: bool) -> None:
        """Runs the command to its end, three times at most; the result must be the reference's."""
        finished = finished_lines(place.out)
        for _ in range(3):
            ran = self._command(job, place)
            self._check(job, ran, place, tally)
            if ran.code == 0:
                break
            if not damaged:
                tally.wrong.append(f"{place.root.name}: exit status {ran.code} after the fault: {ran.err.strip()}")
                return
            tally.refused += 1
            if not self._follow(ran.err, place):
                tally.wrong.append(f"{place.root.name}: refused, and named nothing: {ran.err.strip()}")
                return
        else:
            tally.wrong.append(f"{place.root.name}: still refused: {ran.err.strip()}")
            return
        if not damaged and finished_lines(place.out)[: len(finished)] != finished:
            tally.wrong.append(f"{place.root.name}: finished examples are gone or changed")
        if job.result(place.out, ran.out) != self.references[job.name]:
            tally.wrong.append(f"{place.root.name}: another result")

    @staticmethod
    def _follow(line: str, place: Place) -> bool:
        """Does what a refusal says: removes what it names of the cache, else the results; whether it names anything."""
        words = (word.rstrip(".:") for word in re.findall(r"[^\s();,']+", line))
        named = [path for path in map(Path, words) if place.root in path.parents and path.exists()]
        for path in named:
            if place.cache in path.parents:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                return True
        shutil.rmtree(place.out, ignore_errors=True)
        return bool(named)

    def _check(self, job: Job, ran: Ran, place: Place, tally: Tally) -> None:
        tally.runs += 1
        if not ran.is_clean:
            tally.wrong.append(f"{place.root.name}: {job.name} ended with {ran.code} and said {ran.err.strip()[-500:]}")

    def _place(self, name: str) -> Place:
        place = Place(self.folder / name)
        place.cache.mkdir(parents=True)
        return place

    def _command(self, job: Job, place: Place, *, file_limit: int | None = None) -> Ran:
        return self._ended(self._start(job, place, file_limit=file_limit))

    def _start(self, job: Job, place: Place, *, file_limit: int | None = None) -> subprocess.Popen[str]:
        def limited() -> None:
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))

        arguments = [*map(str, job.arguments), *(["--out", str(place.out)] if job.has_out else [])]
        environment = {"RESCORE_CACHE": str(place.cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        # Files, not pipes: a process that is killed leaves nobody who reads on.
        streams = [tempfile.TemporaryFile("w+", dir=self.folder) for _ in range(2)]  # noqa: SIM115 (`_ended` closes)
        process = subprocess.Popen(
            [*COMMAND, *arguments], stdout=streams[0], stderr=streams[1], text=True, start_new_session=True,
            env={**os.environ, **environment}, preexec_fn=limited,
        )  # fmt: skip
        process.streams, process.began = streams, time.monotonic()  # type: ignore[attr-defined]
        return process

    def _ended(self, process: Any) -> Ran:
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)
            process.wait()
        texts = []
        for stream in process.streams:
            stream.seek(0)
            texts.append(stream.read())
            stream.close()
        return Ran(process.returncode, texts[0], texts[1], time.monotonic() - process.began)


class Apart(Place):
    """A folder for results beside the first one's, with the same cache."""

    def __init__(self, root: Path, number: int) -> None:
        super().__init__(root)
        self.number = number

    @property
    def out(self) -> Path:
        return self.root / f"out-{self.number}"


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A disk at `folder` with so many bytes, if one can be mounted; whether it is."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size // 4096 * 4096 + 4096}", "soak", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield False
        return
    try:
        (folder / "cache").mkdir()
        yield True
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def finished_lines(out: Path) -> list[str]:
    """The finished examples of an evaluation or a corpus, line by line, of all such files in a folder."""
    lines = []
    for name in ("examples.jsonl", "corpus.jsonl"):
        for path in sorted(out.rglob(name)):
            lines += [f"{path}: {line}" for line in path.read_bytes().decode("utf-8", "replace").splitlines(True)]
    return [line for line in lines if line.endswith("\n")]


def report(soak: Soak, options: argparse.Namespace) -> None:
    rows, totals = [], Counter[str]()
    for (job, fault), tally in sorted(soak.tallies.items()):
        counts = {"rounds": tally.rounds, "runs": tally.runs, "refused": tally.refused, "wrong": len(tally.wrong)}
        rows.append([job, fault, *map(str, counts.values())])
        totals.update(counts)
    rows.append(["all", "", *(str(totals[name]) for name in ("rounds", "runs", "refused", "wrong"))])
    print(text_table(["command", "fault", "rounds", "runs", "refused first", "wrong"], rows))
    minutes = (time.monotonic() - soak.began) / 60
    print(json.dumps({"minutes": round(minutes, 1), "seed": options.seed, **totals, "findings": soak.wrong}))


if __name__ == "__main__":
    main()
