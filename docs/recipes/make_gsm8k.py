"""Makes what the table of training variants in docs/heads.md was trained on, of GSM8K's training problems.

    python docs/recipes/make_gsm8k.py gsm8k_train.jsonl OUT [--count 2500]

writes OUT/prompts.jsonl (for `rescore generate-corpus`: the base's own answers) and OUT/gold.jsonl (the data set's
answers, for `rescore train-heads`), of the same problems.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=2500)
    given = parser.parse_args()
    records = [json.loads(line) for line in given.data.open(encoding="utf-8")]  # not splitlines: U+2028
    chosen = random.Random(7).sample(records, given.count)
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "prompts.jsonl").open("w") as prompts, (given.out / "gold.jsonl").open("w") as gold:
        for record in chosen:
            answer = re.sub(r"<<.*?>>", "", record["answer"])  # the calculator's notes
            print(json.dumps({"prompt": record["question"], "chat": True}), file=prompts)
            print(json.dumps({"prompt": record["question"], "response": answer}), file=gold)


if __name__ == "__main__":
    main()
