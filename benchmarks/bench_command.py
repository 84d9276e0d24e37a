"""What a user waits for and what it takes: `rescore --help`, loading the base LM again, and the memory of `eval`.

    python benchmarks/bench_command.py [--task squad] [--data squad.jsonl] [--limit 8] [--max-new-tokens 64]

Each is measured in processes of its own. `eval` records its trace anew (the models stay in the cache) on the first
examples of the data, by default of the sample embedded for the task; its memory is the largest that the process ever
held. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lm.files import cache_directory
from rescore.table import text_table
from rescore.tasks import load_task

COMMAND = [sys.executable, "-m", "rescore"]
REPEATS = 5
LOAD = """
import time
start = time.perf_counter()
from lm.base.catalog import load_base
imported = time.perf_counter()
load_base({base!r})
print(imported - start, time.perf_counter() - imported)
"""


def help_seconds() -> float:
    """Seconds of the fastest `rescore --help`."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def load_seconds(base: str) -> tuple[float, float]:
    """Seconds of imports and of the load, of the second process that loads a base LM: the first may convert it."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", LOAD.format(base=base)], check=True, capture_output=True, text=True
        )
    imports, load = map(float, done.stdout.split())
    return imports, load


def peak_gb(arguments: list[str]) -> float:
    """Largest resident memory of `rescore` with these arguments, in GB (10^9 bytes)."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").symlink_to(cache_directory().resolve() / "models")  # no trace, but the model
        environment = {**os.environ, "RESCORE_CACHE": folder}
        process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"rescore {' '.join(arguments)} failed with exit code {process.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="squad")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    data = arguments.data or load_task(arguments.task).sample
    if data is None:
        parser.error(f"no sample is embedded for {arguments.task}; give --data")
    helped = help_seconds()
    imports, load = load_seconds(arguments.base)
    peak = peak_gb([
        "eval", "--task", arguments.task, "--data", str(data), "--limit", str(arguments.limit),
        "--base", arguments.base, "--max-new-tokens", str(arguments.max_new_tokens),
        "--rescorer", "none", "--rescorer", "oracle",
    ])  # fmt: skip
    rows = [
        ["rescore --help", f"{helped:.2f} s", "0.5 s"],
        [f"load of {arguments.base}, warm", f"{load:.2f} s", "2 s"],
        ["imports before it", f"{imports:.2f} s", "-"],
        [f"peak memory of eval, {arguments.task}, {arguments.limit} examples", f"{peak:.2f} GB", "3 GB"],
    ]
    print(text_table(["what", "measured", "target below"], rows))
    print(json.dumps({
        "benchmark": "command", "task": arguments.task, "limit": arguments.limit, "base": arguments.base,
        "help_seconds": helped, "load_seconds": load, "import_seconds": imports, "eval_peak_gb": peak,
        "threads": torch.get_num_threads(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
