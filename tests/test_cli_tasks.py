"""The commands `tasks` and `perplexity` on the tiny model: what they print and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command, write_lines

from lm.base.perplexity import perplexity
from rescore.tasks import task_names

MINE = "source: {file: texts.jsonl}\nprompt: |\n  Go on: {text}\n  Now!\npassage: text\nlimits: {examples: 2}\n"
TEXTS = ["The bridge was built of stone.", "It stands.", "Nobody knows why."]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    (tmp_path / "mine.yaml").write_text(MINE)
    return tmp_path / "mine.yaml"


class TestTasks:
    def test_all_are_listed_with_their_metrics(self, rescore: Command):
        run = rescore("tasks")
        lines = [line.split() for line in run.out.splitlines()]
        assert run.code == 0 and [line[0] for line in lines[2:-1]] == task_names()
        assert next(line for line in lines if line[0] == "translation")[-2:] == ["chrF,", "BLEU"]
        assert max(map(len, run.out.splitlines())) <= 120
        listed = json.loads(rescore("tasks", "--json").out)
        assert [task["name"] for task in listed] == task_names()
        assert next(t for t in listed if t["name"] == "squad")["metrics"] == ["exact match", "F1"]

    def test_one_is_shown_in_full(self, rescore: Command, mine: Path):
        run = rescore("tasks", "newsroom", mine)
        assert run.code == 0
        for text in ("may not be redistributed", "{title} {text}", "the fields title, text, summary", "Go on: {text}",
                     "Now!", "texts.jsonl", "examples 2",
                     r"2, the first prompt: Go on: The bridge was built of stone.\nNow!"):  # fmt: skip
            assert text in run.out

    def test_the_data_of_a_file_are_read(self, rescore: Command, mine: Path):
        write_lines(mine.parent / "texts.jsonl", [{"text": "fine"}, {"txt": "a typing error"}])
        rescore("tasks", mine).refused("texts.jsonl line 2: .*text")

    def test_an_unknown_task_whose_file_is_there(self, rescore: Command, mine: Path, monkeypatch):
        rescore("eval", "--task", "mine").refused("unknown task 'mine'; .*a YAML file, like ./mine.yaml")
        monkeypatch.chdir(mine.parent)
        rescore("eval", "--task", "mine").refused("unknown task 'mine'; .*there is a file mine.yaml")

    def test_a_mistake_in_a_file_is_one_line(self, rescore: Command, mine: Path):
        mine.write_text(MINE.replace("passage", "pasage"))
        rescore("tasks", mine).refused(r"mine.yaml line 5: unknown key 'pasage'; did you mean 'passage'\?")
        rescore("eval", "--task", mine).refused("line 5: unknown key")

    def test_another_packages_broken_task_is_told_in_its_place(self, rescore, monkeypatch):
        from rescore import tasks
        from rescore.tasks import listing

        monkeypatch.setattr(listing, "task_names", lambda: ["gone", *tasks.task_names()])
        run = rescore("tasks")
        assert run.code == 0 and "unknown task 'gone'" in run.out and "squad" in run.out


class TestPerplexity:
    def test_it_is_that_of_the_passages(self, rescore, mine, tiny_folder, tiny_base):
        exact = perplexity(tiny_base, TEXTS[:2])
        options = ["--base", tiny_folder, "--dtype", "float64", "--device", "cpu"]
        found = json.loads(rescore("perplexity", "--task", mine, *options, "--json").out)
        assert (found["task"], found["passages"], found["tokens"]) == ("mine", 2, exact.tokens)
        assert found["perplexity"] == pytest.approx(exact.perplexity, rel=1e-12)
        assert found["source"]["kind"] == "file" and found["base"]["dtype"] == "float64"
        run = rescore("perplexity", "--task", "lambada", "--data", mine.with_name("texts.jsonl"), *options,
                      "--window", 9, "--stride", 4)  # fmt: skip
        expected = perplexity(tiny_base, TEXTS, window=9, stride=4)
        assert run.out.startswith(
            f"lambada: perplexity {expected.perplexity:.3f} over {expected.tokens} tokens of 3 pas"
        )
        assert run.out.endswith("(" + f"{tiny_folder} in float64, window 9, stride 4)\n")

    def test_a_task_without_passages_is_refused(self, rescore: Command, tiny_folder: Path):
        rescore("perplexity", "--task", "xsum", "--base", tiny_folder).refused(
            "task xsum has no passages to score; lambada has, and a YAML file may name its field: passage: text"
        )

    def test_a_stride_out_of_range_is_refused(self, rescore, mine, tiny_folder):
        rescore("perplexity", "--task", mine, "--base", tiny_folder, "--stride", 0).refused(
            "--stride 0; a window of 512"
        )
