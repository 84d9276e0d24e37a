"""Estimation of an n-gram model: ours against `lmplz`, the same text, the same order, the same machine.

`python benchmarks/bench_estimation.py --corpus FILE... [--tokens N] [--order N] [--memory BYTES] [--threads N]
[--lmplz PATH]`, with the project installed. The text is made of the corpus's lines, repeated and shuffled (fixed seed)
up to so many words. Both write an ARPA file from it, in a process of their own, whose wall-clock, processor time and
peak memory are reported. Our time is split: reading and numbering words, counting, all orders, smoothing, writing.
Compiling is not counted: a smaller model is built first. Without an lmplz on PATH only ours is measured. Prints a
table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ATTEMPTS = 2  # the better one counts
WARM_UP_TOKENS = 1_200_000  # enough for several runs of n-grams, so that merging is compiled as well


def make_text(corpora: list[Path], tokens: int, path: Path) -> int:
    """Writes shuffled lines with `tokens` words or a few more; returns how many it were."""
    lines: list[tuple[str, int]] = []
    for corpus in corpora:
        for line in corpus.read_text(encoding="utf-8", errors="replace").replace("<unk>", "unk").split("\n"):
            if words := line.split():
                lines.append((" ".join(words), len(words)))
    generator, written = random.Random(0), 0
    with path.open("w", encoding="utf-8", newline="\n") as out:
        while written < tokens:
            generator.shuffle(lines)
            for line, size in lines:
                out.write(line + "\n")
                written += size
                if written >= tokens:
                    break
    return written


def run_measured(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Wall-clock and processor seconds and peak memory (MiB) of a command that must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{command[0]} failed with {os.waitstatus_to_exitcode(status)}")
    result = {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }
    return {**result, **(json.loads(output) if output.strip() else {})}


def estimate_ours(text: Path, work: Path, order: int, memory: int, threads: int) -> dict[str, Any]:
    """Estimates in this process; seconds by stage. What `build_ngram` does, without the automaton."""
    from lm.ngram.arpa import write_arpa
    from lm.ngram.build import OVERHEAD
    from lm.ngram.corpus import encode_corpora, find_sources
    from lm.ngram.counting import Workspace, count_full
    from lm.ngram.estimation import estimate
    from lm.ngram.tables import build_table

    room = max(memory - OVERHEAD, 1)
    times = [time.perf_counter()]
    encoded = encode_corpora(find_sources([text]), work / "stream.i32")
    times.append(time.perf_counter())
    full = count_full(
        encoded.ids(), order=order, vocabulary_size=len(encoded.vocabulary), folder=work, memory=room, threads=threads
    )
    times.append(time.perf_counter())
    workspace = Workspace(work, room // 2)
    table = build_table(full, workspace, threads=threads)
    times.append(time.perf_counter())
    model = estimate(
        table, encoded.vocabulary, smoothing="kneser-ney", prune=(0,) * order, discount_fallback=(0.5, 1.0, 1.5),
        max_ngrams=None, workspace=workspace,
    ).model  # fmt: skip
    times.append(time.perf_counter())
    write_arpa(model, work / "ours.arpa")
    times.append(time.perf_counter())
    stages = ("read_s", "count_s", "orders_s", "smooth_s", "write_s")
    taken = {name: b - a for name, a, b in zip(stages, times, times[1:], strict=False)}
    return {**taken, "estimation_seconds": times[-1] - times[0], "ngrams": sum(map(len, model.orders))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--order", type=int, default=4)
    parser.add_argument("--memory", type=int, default=4 << 30)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--lmplz", default=shutil.which("lmplz"))
    parser.add_argument("--attempts", type=int, default=ATTEMPTS)
    parser.add_argument("--folder", type=Path, help="where the text and the models go for the time (some GB)")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)  # the measured process: the text
    options = parser.parse_args()
    if options.only:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            result = estimate_ours(options.only, Path(name), options.order, options.memory, options.threads)
            print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        text, little = folder / "text.txt", folder / "little.txt"
        tokens = make_text(options.corpus, options.tokens, text)
        make_text(options.corpus, WARM_UP_TOKENS, little)
        shared = ["--order", str(options.order), "--memory", str(options.memory), "--threads", str(options.threads)]
        ours_command = [sys.executable, __file__, "--corpus", "-", *shared, "--folder", str(folder), "--only"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run_measured([*ours_command, str(little)], environment)  # compiles
        runs = [run_measured([*ours_command, str(text)], environment) for _ in range(options.attempts)]
        measured = {"ours": min(runs, key=lambda r: r["seconds"])}
        if options.lmplz:
            command = [options.lmplz, "-o", str(options.order), "-S", f"{options.memory}b", "-T", f"{folder}{os.sep}"]
            command += ["--discount_fallback", "--text", str(text), "--arpa", str(folder / "lmplz.arpa")]
            runs = [run_measured(command, environment) for _ in range(options.attempts)]
            measured["lmplz"] = min(runs, key=lambda r: r["seconds"])
    print(f"{tokens:,} words, order {options.order}, {options.threads} threads, {options.memory >> 20} MiB allowed\n")
    print(f"{'':<8}{'wall s':>9}{'cpu s':>9}{'tokens/s':>13}{'peak MiB':>10}")
    for who, result in measured.items():
        result["tokens_per_s"] = round(tokens / result["seconds"])
        print(
            f"{who:<8}{result['seconds']:>9.2f}{result['cpu_seconds']:>9.2f}{result['tokens_per_s']:>13,}"
            f"{result['peak_mib']:>10.0f}"
        )
    stages = {k: v for k, v in measured["ours"].items() if k.endswith("_s") and k != "tokens_per_s"}
    print("ours, by stage: " + ", ".join(f"{k.removesuffix('_s')} {v:.2f} s" for k, v in stages.items()))
    print()
    rounded = {w: {k: round(v, 3) for k, v in r.items()} for w, r in measured.items()}
    print(json.dumps({"tokens": tokens, "order": options.order, "threads": options.threads, **rounded}))


if __name__ == "__main__":
    main()
