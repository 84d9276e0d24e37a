"""Makes the prompts from which `smollm2-135m` wrote the text that its block heads were trained on.

    python docs/recipes/make_prompts.py CORPORA seeds OUT.jsonl [--round N]     stage 1: ask for questions and dialogues
    python docs/recipes/make_prompts.py CORPORA prompts OUT.jsonl SEEDS_CORPUS [--round N]    stage 2: prompts

CORPORA is a folder with the training corpora (c4.txt, wikitext2.txt, gsm8k_train.jsonl ...). Stage 2 builds reading
questions and dialogue summaries out of what the base LM wrote in stage 1. Round 1 is broad; round 2 asks other things
of the four kinds that the heads are measured on; round 3 is about other passages and has no school problems. What is
evaluated must not be learned: `--without TASKS` (a folder of .jsonl files) leaves out prompts that share 13 words in a
row with an example in it. Rounds 1 to 3 were made before there was this option (docs/heads.md says what it finds).
"""

from __future__ import annotations

import argparse
import json
import random
import re
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


def runs(text: str, length: int = 13) -> set[str]:
    """All runs of so many words."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}


def strings(value: object) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def without(prompts: list[dict], tasks: Path) -> list[dict]:
    """The prompts that have no run of words in common with an example of the tasks."""
    lines = (line for path in tasks.glob("*.jsonl") for line in path.read_text().split("\n") if line)
    evaluated = {run for line in lines for text in strings(json.loads(line)) for run in runs(text)}
    return [prompt for prompt in prompts if not runs(prompt["prompt"]) & evaluated]


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


def passages(corpora: Path, rng: random.Random, web: slice = slice(0, 2)) -> list[str]:
    """Encyclopedic and web passages of 60 to 160 words; `web`: which of a web page's."""
    wiki = [line.strip() for line in (corpora / "wikitext2.txt").read_text().strip().split("\n")]
    wiki = [re.sub(r" ([,.;:)'])", r"\1", line.replace(" @-@ ", "-").replace(" @,@ ", ",")) for line in wiki]
    found = [c for line in wiki if len(line.split()) > 60 and "=" not in line[:3] for c in chunks(line, 60, 160, rng)]
    for line in (corpora / "c4.txt").read_text().strip().split("\n"):
        found += list(chunks(line, 60, 160, rng))[web]
    rng.shuffle(found)
    return found


def seeds(corpora: Path, seed: int, questions: int, chats: int, web: slice = slice(0, 2)) -> Iterator[dict]:
    rng = random.Random(seed)
    for passage in passages(corpora, rng, web)[:questions]:
        yield {"prompt": ASK.format(passage), "chat": True}
    for _ in range(chats):
        first, second = rng.sample(NAMES, 2)
        yield {"prompt": CHAT.format(first, second, rng.choice(TOPICS)), "chat": True}


def school_problems(corpora: Path, rng: random.Random, count: int) -> list[str]:
    return [question for (question,) in rng.sample(rows(corpora / "gsm8k_train.jsonl", "question"), count)]


def written_in_stage_1(written: Path) -> tuple[list[str], list[list[str]]]:
    """Reading questions with their passages, and the turns of chats, out of what the base wrote."""
    questions: list[str] = []
    chats: list[list[str]] = []
    for line in (written / "corpus.jsonl").read_text().strip().split("\n"):
        record = json.loads(line)
        if record["prompt"].startswith("Write two short questions"):
            context = record["prompt"].split("\n\n", 1)[1]
            asked = re.findall(r"[A-Z][^\n?]{8,120}\?", record["text"])
            questions += [f"question: {question} context: {context}" for question in list(dict.fromkeys(asked))[:2]]
        else:
            turns = re.findall(r"^\W*([A-Z]\w+)\W*: +(.+)$", record["text"], re.M)
            if len(turns) >= 3:
                chats.append([f"{name}: {said.strip(' *')}" for name, said in turns[:10]])
    return questions, chats


def broad_prompts(corpora: Path, written: Path) -> Iterator[dict]:
    """Round 1."""
    rng = random.Random(2)
    for question in school_problems(corpora, rng, 3000):
        yield {"prompt": question, "chat": True}

    dialogues = [d for (d,) in rows(corpora / "samsum_train.jsonl", "dialogue")]
    questions, chats = written_in_stage_1(written)
    for question in questions:
        yield {"prompt": question, "chat": True}
    dialogues += ["\n".join(turns) for turns in chats]
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


def more_prompts(corpora: Path, written: Path) -> Iterator[dict]:
    """Round 2: other school problems, other passages, cuts of chats, longer cuts of articles."""
    first = set(school_problems(corpora, random.Random(2), 3000))
    rng = random.Random(102)
    for question in [q for (q,) in rows(corpora / "gsm8k_train.jsonl", "question") if q not in first][:2000]:
        yield {"prompt": question, "chat": True}

    questions, chats = written_in_stage_1(written)
    for question in questions:
        yield {"prompt": question, "chat": True}

    chats += [d.replace("\r", "").split("\n") for (d,) in rows(corpora / "samsum_train.jsonl", "dialogue")]
    for turns in chats:
        for count in {len(turns), rng.randint(2, len(turns))}:
            dialogue = "\n".join(turns[:count])
            yield {"prompt": f"Here is a dialogue: {dialogue}\nWrite a short summary!", "chat": True}

    documents = []
    for name, field in (
        ("xsum_train", "document"),
        ("multi_news_train", "document"),
        ("cnn_dailymail_train", "article"),
    ):
        for (text,) in rows(corpora / f"{name}.jsonl", field):
            documents += list(chunks(" ".join(text.split()), 120, 280, rng))[:6]
    rng.shuffle(documents)
    for document in documents[:1600]:
        yield {"prompt": f"Summarize: {document}", "chat": True}


def still_more_prompts(corpora: Path, written: Path) -> Iterator[dict]:
    """Round 3: questions and chats of a sampled stage 1, web pages, later parts of articles."""
    rng = random.Random(203)
    questions, chats = written_in_stage_1(written)
    for question in questions:
        yield {"prompt": question, "chat": True}
    for turns in chats:
        yield {"prompt": f"Here is a dialogue: {chr(10).join(turns)}\nWrite a short summary!", "chat": True}
    documents = []
    for line in (corpora / "c4.txt").read_text().strip().split("\n"):
        documents += list(chunks(line, 120, 280, rng))[:1]
    for (text,) in rows(corpora / "multi_news_train.jsonl", "document"):
        documents += list(chunks(" ".join(text.split()), 120, 280, rng))[6:9]
    rng.shuffle(documents)
    for document in documents[:900]:
        yield {"prompt": f"Summarize: {document}", "chat": True}


ROUNDS = {  # seeds' arguments, and stage 2
    1: ((1, 1500, 600), broad_prompts),
    2: ((101, 1100, 500), more_prompts),
    3: ((201, 500, 300, slice(2, None)), still_more_prompts),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("stage", choices=("seeds", "prompts"))
    parser.add_argument("out", type=Path)
    parser.add_argument("written", type=Path, nargs="?", help="the corpus of stage 1, for stage 2")
    parser.add_argument("--round", type=int, choices=ROUNDS, default=1)
    parser.add_argument("--without", type=Path, metavar="TASKS", help="leave out what stands in these tasks")
    given = parser.parse_args()
    of_seeds, of_prompts = ROUNDS[given.round]
    made = list(seeds(given.corpora, *of_seeds) if given.stage == "seeds" else of_prompts(given.corpora, given.written))
    random.Random(3).shuffle(made)
    if given.without:
        made = without(made, given.without)
    given.out.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in made))


if __name__ == "__main__":
    main()
