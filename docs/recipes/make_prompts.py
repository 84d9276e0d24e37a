"""Makes the prompts from which `smollm2-135m` wrote the text that its block heads were trained on.

    python docs/recipes/make_prompts.py CORPORA seeds OUT.jsonl        stage 1: ask for questions and dialogues
    python docs/recipes/make_prompts.py CORPORA prompts OUT.jsonl SEEDS_CORPUS    stage 2: all prompts

CORPORA is a folder with the training corpora (c4.txt, wikitext2.txt, gsm8k_train.jsonl ...). Stage 2 builds reading
questions and dialogue summaries out of what the base LM wrote in stage 1. Evaluation examples are never read.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

NAMES = [
    "Amanda", "Tom", "Lucy", "Ben", "Hannah", "Omar", "Eva", "Jack", "Mia", "Leo",
    "Nina", "Paul", "Sara", "Rob", "Kate", "Igor", "Zoe", "Max", "Ann", "Phil",
]  # fmt: skip
TOPICS = """dinner plans for Friday
a missed train|a birthday present|a broken laptop|moving to a new flat|an exam result
a lost phone|holiday photos|a job interview|borrowing a car|a football match|a new film|a sick dog|a late delivery
concert tickets|a school meeting|a recipe|the weekend weather|a gym membership|a flight delay|a wedding invitation
a noisy neighbour|a new haircut|homework help|a doctor's appointment|camping gear|a surprise party|a coffee date
buying shoes online|a parking ticket""".replace("\n", "|").split("|")
ASK = "Write two short questions that the following text answers.\n\n{}"
CHAT = "Write a short chat between {} and {} about {}. Write each line as 'Name: message'."
SUMMARIES = [
    ("Summarize: {}", 6),
    ("summarize: {}", 2),
    ("Write a summary based on this article: {}", 2),
    ("Please write a short summary for the following article: {}", 1),
]


def rows(path: Path, *fields: str) -> list[list[str]]:
    return [[json.loads(line)[f] for f in fields] for line in path.read_text().strip().split("\n")]


def chunks(text: str, low: int, high: int, rng: random.Random) -> Iterator[str]:
    """Cuts text at sentence ends into pieces of low to high words."""
    piece: list[str] = []
    goal = rng.randint(low, high)
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        piece.append(sentence)
        words = sum(len(s.split()) for s in piece)
        if words >= goal:
            if words <= high * 1.5:
                yield " ".join(piece)
            piece, goal = [], rng.randint(low, high)


def passages(corpora: Path, rng: random.Random) -> list[str]:
    """Encyclopedic and web passages of 60 to 160 words."""
    wiki = [line.strip() for line in (corpora / "wikitext2.txt").read_text().strip().split("\n")]
    wiki = [re.sub(r" ([,.;:)'])", r"\1", line.replace(" @-@ ", "-").replace(" @,@ ", ",")) for line in wiki]
    found = [c for line in wiki if len(line.split()) > 60 and "=" not in line[:3] for c in chunks(line, 60, 160, rng)]
    for line in (corpora / "c4.txt").read_text().strip().split("\n"):
        found += list(chunks(line, 60, 160, rng))[:2]
    rng.shuffle(found)
    return found


def seeds(corpora: Path) -> Iterator[dict]:
    rng = random.Random(1)
    for passage in passages(corpora, rng)[:1500]:
        yield {"prompt": ASK.format(passage), "chat": True}
    for _ in range(600):
        first, second = rng.sample(NAMES, 2)
        yield {"prompt": CHAT.format(first, second, rng.choice(TOPICS)), "chat": True}


def prompts(corpora: Path, written: Path) -> Iterator[dict]:
    rng = random.Random(2)
    for (question,) in rng.sample(rows(corpora / "gsm8k_train.jsonl", "question"), 3000):
        yield {"prompt": question, "chat": True}

    dialogues = [d for (d,) in rows(corpora / "samsum_train.jsonl", "dialogue")]
    for line in (written / "corpus.jsonl").read_text().strip().split("\n"):
        record = json.loads(line)
        if record["prompt"].startswith("Write two short questions"):
            context = record["prompt"].split("\n\n", 1)[1]
            questions = re.findall(r"[A-Z][^\n?]{8,120}\?", record["text"])
            for question in list(dict.fromkeys(questions))[:2]:
                yield {"prompt": f"question: {question} context: {context}", "chat": True}
        else:
            turns = re.findall(r"^\W*([A-Z]\w+)\W*: +(.+)$", record["text"], re.M)
            if len(turns) >= 3:
                dialogues.append("\n".join(f"{name}: {said.strip(' *')}" for name, said in turns[:10]))
    instructions = rows(corpora / "instructions.jsonl", "prompt", "response")
    for prompt, response in instructions:
        text = prompt.split("### Instruction:\n")[-1].split("\n\n### Response")[0].strip()
        yield {"prompt": text, "chat": True}
        yield {"prompt": prompt, "chat": False}
        if 8 < len(response.split()) < 150:
            dialogues.append(f"{rng.choice(NAMES)}: {text}\n{rng.choice(NAMES)}: {response}")
    for dialogue in dialogues:
        yield {"prompt": f"Here is a dialogue: {dialogue}\nWrite a short summary!", "chat": True}

    documents = [d for (d,) in rows(corpora / "xsum_train.jsonl", "document")]
    for name, field in (("multi_news_train", "document"), ("cnn_dailymail_train", "article")):
        for (text,) in rows(corpora / f"{name}.jsonl", field):
            documents += list(chunks(" ".join(text.split()), 100, 260, rng))[:3]
    for line in rng.sample((corpora / "c4.txt").read_text().strip().split("\n"), 900):
        documents += list(chunks(line, 100, 260, rng))[:1]
    templates = [t for t, count in SUMMARIES for _ in range(count)]
    for document in documents:
        yield {"prompt": rng.choice(templates).format(document), "chat": True}

    plain = passages(corpora, rng)[:700]
    for name in ("state_of_the_union", "darwin", "dubois"):
        text = " ".join((corpora / f"{name}.txt").read_text().split())
        plain += rng.sample(list(chunks(text, 40, 120, rng)), 120)
    for passage in plain:
        words = passage.split()
        yield {"prompt": " ".join(words[: rng.randint(30, max(31, len(words) - 5))]), "chat": False}


def main() -> None:
    corpora, stage, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    made = list(seeds(corpora)) if stage == "seeds" else list(prompts(corpora, Path(sys.argv[4])))
    random.Random(3).shuffle(made)
    out.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in made))


if __name__ == "__main__":
    main()
