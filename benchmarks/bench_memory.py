"""Peak memory of live decoding, against transformers' own greedy `generate` of the same tokens in the same precision.

    python benchmarks/bench_memory.py [--base NAME] [--rescorer SPEC ...] [--prompt-tokens N] [--max-new-tokens N]

Each is a process of its own that loads the model and decodes one prompt; its peak is the largest resident memory that
it ever had, as `/usr/bin/time -v` prints it, pages of mapped files included. `generate` is given the prompt's tokens,
and so needs no tokenizer. The prompt is made of the passages of the sample embedded for squad. Prints a table and one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from lm.base.catalog import load_tokenizer, resolve_base
from rescore.table import text_table
from rescore.tasks import load_task
from rescore.tasks.data import load_examples

THEIRS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
given = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(given["folder"], dtype=getattr(torch, given["dtype"]))
prompt = torch.tensor([given["prompt"]])
output = model.generate(
    prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=given["limit"], pad_token_id=0
)
print(json.dumps(output[0, prompt.shape[1] :].tolist()))
"""
OURS = """
import json, sys
from lm.base.catalog import load_base
from rescore.decoding import decode
given = json.load(sys.stdin)
base = load_base(given["base"], dtype=given["dtype"], device="cpu")
if given["rescorer"]:
    from lm.heads.block_heads import load_heads
    from rescore.generation.live import Generator
    decoded = Generator.of(base, load_heads(base), given["rescorer"]).decode(given["prompt"], given["limit"])
else:
    decoded = decode(base, None, given["prompt"], max_new_tokens=given["limit"])
print(json.dumps(decoded.output_ids))
"""


def measured(code: str, given: dict[str, object]) -> tuple[float, list[int]]:
    """Peak memory of a Python process in MB (10^6 bytes), and the tokens that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(json.dumps(given))
    process.stdin.close()
    tokens, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(errors)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6, json.loads(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rescorer", action="append", default=[])
    arguments = parser.parse_args()
    task = load_task("squad")
    examples = load_examples(task, data=task.sample, limit=None).examples
    text = "\n\n".join(dict.fromkeys(example.prompt for example in examples))
    prompt = load_tokenizer(arguments.base)(text)["input_ids"][: arguments.prompt_tokens]
    given = {
        "base": arguments.base, "folder": str(resolve_base(arguments.base).folder), "dtype": arguments.dtype,
        "prompt": prompt, "limit": arguments.max_new_tokens,
    }  # fmt: skip
    theirs, output = measured(THEIRS, given)
    rows, results = [["transformers generate", f"{theirs:.0f} MB", "1.00x", "-"]], []
    for rescorer in ("", *arguments.rescorer):
        peak, tokens = measured(OURS, given | {"rescorer": rescorer})
        name = rescorer or "greedy, one token a step"
        rows.append([name, f"{peak:.0f} MB", f"{peak / theirs:.2f}x", "yes" if tokens == output else "no"])
        results.append({"rescorer": rescorer, "peak_mb": peak, "ratio": peak / theirs, "same": tokens == output})
    print(f"{arguments.base} in {arguments.dtype}, {len(prompt)} tokens and {len(output)} new ones\n")
    print(text_table(["decoded by", "peak memory", "ratio", "same output"], rows))
    print(json.dumps({"benchmark": "memory", "base": arguments.base, "transformers_mb": theirs, "results": results}))


if __name__ == "__main__":
    main()
