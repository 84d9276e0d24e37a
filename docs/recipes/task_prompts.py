"""Makes a file of tasks' prompts for `rescore generate-corpus`: to measure heads on tasks while they are trained.

    python docs/recipes/task_prompts.py TASKS OUT.jsonl [--tasks squad,gsm8k,xsum,samsum] [--skip 100] [--count 25]

TASKS is a folder with a file TASK.jsonl for each. The first `--skip` examples are those that results are measured on;
they are left out, and so are those that share text with what the shipped models were trained on. (The heads' `dev` was
made before there were such rules, that of `neural-61m` before the second one.)
The prompts come in turns, so that a part of them is a part of every task.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rescore.tasks import load_task
from rescore.tasks.data import load_examples
from rescore.tasks.leave_out import read_leave_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", default="squad,gsm8k,xsum,samsum")
    parser.add_argument("--skip", type=int, default=100)
    parser.add_argument("--count", type=int, default=25)
    given = parser.parse_args()
    tasks = [load_task(name) for name in given.tasks.split(",")]
    last = given.skip + given.count
    # As the suites of the results choose theirs; otherwise some of what is measured on here is evaluated there.
    left_out = read_leave_out("shipped")
    examples = [
        load_examples(t, data=given.data / f"{t.name}.jsonl", limit=last, leave_out=left_out).examples[given.skip :]
        for t in tasks
    ]
    with given.out.open("w", encoding="utf-8") as stream:
        for turn in zip(*examples, strict=True):
            for task, example in zip(tasks, turn, strict=True):
                print(json.dumps({"prompt": example.prompt, "chat": task.chat}, ensure_ascii=False), file=stream)


if __name__ == "__main__":
    main()
