"""Text that examples share with training corpora: what counts, what is written, what is left out."""

from __future__ import annotations

import gzip
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, squad_records, write_lines
from evaluating import evaluated, recorded_trace
from hypothesis import given
from hypothesis import strategies as st

from lattices.errors import InvalidDataError, RescoreError
from rescore.studies.overlap import Overlap, find_overlap
from rescore.suites.plan import read_plan
from rescore.suites.run import run_suite
from rescore.tasks import load_task, task_names
from rescore.tasks.data import load_examples
from rescore.tasks.groups import digest
from rescore.tasks.leave_out import SHIPPED, SHIPPED_FILE, read_leave_out, write_leave_out

TASK = """\
source: {file: FILE}
prompt: "{text}"
reference: answer
"""


def words(first: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


@pytest.fixture
def task(tmp_path: Path) -> str:
    write_lines(tmp_path / "examples.jsonl", [
        {"id": "none", "text": words(100, 20), "answer": "no"},
        {"id": "prompt", "text": words(0, 20), "answer": "no"},
        {"id": "reference", "text": words(200, 20), "answer": words(30, 14)},
        {"id": "short", "text": words(0, 12), "answer": "no"},
    ])  # fmt: skip
    (tmp_path / "mine.yaml").write_text(TASK.replace("FILE", "examples.jsonl"))
    return str(tmp_path / "mine.yaml")


def corpus(tmp_path: Path, text: str, name: str = "corpus.txt") -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


def shares(found: Overlap) -> dict[str, float]:
    return {shared.id: shared.share for of in found.tasks for shared in of.found}


class TestRuns:
    def test_runs_of_13_words_in_prompt_and_reference(self, task: str, tmp_path: Path):
        text = f"x {words(0, 14)} y\n{words(30, 13)}\n{words(100, 12)} z"
        found = find_overlap([task], [corpus(tmp_path, text)])
        # 2 of the 8 runs of the prompt; of the third example 8 of the prompt and 2 of the reference, one of them there.
        assert shares(found) == {"prompt": pytest.approx(2 / 8), "reference": pytest.approx(1 / 10)}
        assert found.tasks[0].examples == 4 and found.corpora == ("corpus.txt",) and found.n == 13
        assert found.tasks[0].found[0].prompt == digest(words(0, 20))

    def test_case_marks_and_line_ends_do_not_matter(self, task: str, tmp_path: Path):
        text = words(0, 13).upper().replace(" W5", ",\n\n'w5'").replace(" W9", " -- w9!")
        assert shares(find_overlap([task], [corpus(tmp_path, text)])) == {"prompt": pytest.approx(1 / 8)}

    @pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
    @pytest.mark.parametrize("change", [str, str.upper, str.casefold])
    def test_nor_does_the_form_of_unicode(self, tmp_path: Path, form: Any, change: Any):
        text = "Ça a été fêté à Ávila, où l\u2019\ufb01n \u0390 \u01f0 Straße \uff21 \u1e9b\u0323 måned ñ \uac00"
        write_lines(tmp_path / "e.jsonl", [{"id": "1", "text": text, "answer": "no"}])
        (tmp_path / "mine.yaml").write_text(TASK.replace("FILE", "e.jsonl"))
        held = corpus(tmp_path, unicodedata.normalize(form, change(text)))
        assert shares(find_overlap([str(tmp_path / "mine.yaml")], [held])) == {"1": 1.0}

    def test_a_word_more_is_another_run(self, task: str, tmp_path: Path):
        text = words(0, 20).replace("w9", "w9 and")
        assert shares(find_overlap([task], [corpus(tmp_path, text)])) == {}
        assert shares(find_overlap([task], [corpus(tmp_path, text)], n=10)) == {
            "prompt": pytest.approx(2 / 11), "short": pytest.approx(1 / 3)
        }  # fmt: skip

    def test_every_string_of_a_record_apart(self, task: str, tmp_path: Path):
        records: list[dict[str, Any]] = [{"a": words(0, 7), "b": words(7, 7)}, {"deep": [{"c": words(2, 13)}]}]
        path = write_lines(tmp_path / "corpus.jsonl", records)
        found = find_overlap([task], [path])
        assert shares(found) == {"prompt": pytest.approx(1 / 8)}

    def test_several_corpora_packed_ones_and_folders(self, task: str, tmp_path: Path):
        folder = tmp_path / "corpora"
        folder.mkdir()
        (folder / "a.txt.gz").write_bytes(gzip.compress(words(0, 13).encode()))
        corpus(folder, words(1, 14), "b.txt")
        found = find_overlap([task], [folder])
        (shared,) = found.tasks[0].found
        assert shared.corpora == {"a.txt.gz": pytest.approx(1 / 8), "b.txt": pytest.approx(2 / 8)}
        assert shared.share == pytest.approx(3 / 8)
        assert shares(find_overlap([task], [folder], threshold=3 / 8)) == {}

    def test_runs_go_on_over_the_blocks_in_which_a_corpus_is_read(
        self, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("rescore.studies.overlap.BATCH", 5)
        monkeypatch.setattr("lm.text_files.BLOCK_BYTES", 16)
        found = find_overlap([task], [corpus(tmp_path, words(0, 20).replace(" ", "\n"))])
        assert shares(found) == {"prompt": 1.0}

    def test_examples_that_are_too_short_to_be_found_are_counted(self, task: str, tmp_path: Path):
        (of_task,) = find_overlap([task], [corpus(tmp_path, words(0, 40))], n=30).tasks
        assert of_task.found == () and of_task.too_short == of_task.examples > 0
        assert find_overlap([task], [corpus(tmp_path, words(0, 40))]).tasks[0].too_short < of_task.examples

    def test_a_corpus_without_words_is_refused(self, task: str, tmp_path: Path):
        for text in ("", "\n \n", "...\n"):
            with pytest.raises(RescoreError, match=r"holds no words, so nothing can be shared with it; give another"):
                find_overlap([task], [corpus(tmp_path, text)])

    @given(
        st.lists(st.integers(0, 3), min_size=1, max_size=60),
        st.lists(st.integers(0, 3), max_size=40),
        st.integers(1, 5),
    )
    def test_as_a_set_of_runs_has_it(self, tmp_path_factory: pytest.TempPathFactory, trained, asked, n):
        folder = tmp_path_factory.mktemp("overlap")
        write_lines(folder / "e.jsonl", [{"text": " ".join(map(str, asked)) + ".", "answer": "x"}])
        (folder / "t.yaml").write_text(TASK.replace("FILE", "e.jsonl"))
        text = " ".join(map(str, trained))
        found = find_overlap([str(folder / "t.yaml")], [corpus(folder, text + "\n")], n=n)

        def runs(of: list[int]) -> set[tuple[int, ...]]:
            return {tuple(of[i : i + n]) for i in range(len(of) - n + 1)}

        own = len(runs(asked)) + (n == 1)  # the reference, x, is a run of one word
        wanted = len(runs(asked) & runs(trained)) / own if own else 0.0
        assert shares(found) == ({"1": pytest.approx(wanted)} if wanted else {})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n": 0}, "--n 0; a run has at least one word"),
            ({"threshold": 1.0}, "--threshold 1; a share is from 0 to below 1"),
            ({"corpora": [Path("none.txt")]}, "can't read none.txt"),
            ({"corpora": ["hub:x/y"]}, "a corpus is a file or a folder here"),
            ({"tasks": []}, "no task is given"),
        ],
    )
    def test_mistakes_are_told_in_one_line(self, task: str, tmp_path: Path, options: dict[str, Any], message: str):
        with pytest.raises(RescoreError, match=message) as caught:
            find_overlap(**{"tasks": [task], "corpora": [corpus(tmp_path, "x\n")], **options})
        assert "\n" not in str(caught.value)


class TestList:
    def test_what_is_written_is_read(self, task: str, tmp_path: Path):
        found = find_overlap([task], [corpus(tmp_path, words(0, 20), 'odd "name": [x].txt')])
        write_leave_out(found, tmp_path / "list.yaml", about="made\nof text")
        assert read_leave_out(str(tmp_path / "list.yaml")) == {digest(words(0, 20))}
        text = (tmp_path / "list.yaml").read_text()
        assert text.startswith("# made\n# of text\nschema: rescore.overlap/1\nn: 13\ntasks:\n") and "w0" not in text
        nothing = find_overlap([task], [corpus(tmp_path, "x\n")])
        write_leave_out(nothing, tmp_path / "empty.yaml")
        assert read_leave_out(str(tmp_path / "empty.yaml")) == read_leave_out(None) == frozenset()

    def test_the_one_in_the_package(self):
        shipped = read_leave_out(SHIPPED)
        assert len(shipped) > 50
        names = [line.strip(' :"') for line in SHIPPED_FILE.read_text().splitlines() if line.endswith('":')]
        assert set(names) <= set(task_names()) and names == sorted(names)
        assert '{id: "54", prompt:' in SHIPPED_FILE.read_text(), "the article of CNN/DailyMail that was learned"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("schema: rescore.overlap/9\n", "line 1: schema: 'rescore.overlap/9' is not 'rescore.overlap/1'"),
            ("tasks: {}\n", "the key 'schema' is missing"),
            ("schema: rescore.overlap/1\ntasks:\n  a:\n  - {id: x}\n", "line 4: .*the key 'prompt' is missing"),
            ("schema: rescore.overlap/1\ntasks:\n  a:\n  - {prompt: abc}\n", "line 4: .*no digest of a prompt"),
        ],
    )
    def test_other_files_are_refused_with_the_line(self, tmp_path: Path, text: str, message: str):
        (tmp_path / "list.yaml").write_text(text)
        with pytest.raises(InvalidDataError, match=message):
            read_leave_out(str(tmp_path / "list.yaml"))

    def test_no_file_and_no_name(self, tmp_path: Path):
        with pytest.raises(RescoreError, match=r"no such file: .*none\.yaml"):
            read_leave_out(str(tmp_path / "none.yaml"))
        with pytest.raises(RescoreError, match="--leave-out is empty"):
            read_leave_out(" ")


@pytest.fixture
def left_out(squad_file: Path, tmp_path: Path) -> str:
    """A list with the second and the fourth of the six examples."""
    lines = []
    for example in load_examples(load_task("squad"), data=squad_file).examples:
        if example.id in ("q1", "q3"):
            lines.append(f"  - {{id: other, prompt: '{digest(example.prompt)}'}}\n")
    path = tmp_path / "list.yaml"
    path.write_text("schema: rescore.overlap/1\ntasks:\n  squad:\n" + "".join(lines))
    return str(path)


class TestLeftOut:
    @pytest.fixture
    def options(self, tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path) -> dict[str, Any]:
        return {
            "base": str(tiny_folder), "heads": str(tiny_heads_folder), "data": str(squad_file), "device": "cpu", "k": 4,
            "max_new_tokens": 6,
        }  # fmt: skip

    def test_the_prompt_decides_before_the_limit(self, squad_file: Path, left_out: str):
        task = load_task("squad")
        found = load_examples(task, data=squad_file, limit=3, leave_out=read_leave_out(left_out))
        assert [e.id for e in found.examples] == ["q0", "q2", "q4"] and found.source["left_out"] == ["q1", "q3"]
        assert "left_out" not in load_examples(task, data=squad_file).source
        every = {digest(e.prompt) for e in load_examples(task, data=squad_file).examples}
        with pytest.raises(RescoreError, match="all 6 examples of squad are to be left out"):
            load_examples(task, data=squad_file, leave_out=every)

    def test_an_evaluation_says_so(self, options: dict[str, Any], left_out: str):
        whole = evaluated(dict(**options))
        found = evaluated(dict(**options, leave_out=left_out))
        assert (whole.document.results[0].n, found.document.results[0].n) == (6, 4)
        assert found.notices == ["squad: 2 examples of the data are left out (q1, q3)"] and whole.notices == []
        assert found.document.config.data["squad"]["left_out"] == ["q1", "q3"]
        assert found.config.inputs["squad"].leave_out == left_out

    def test_of_a_given_trace(self, options: dict[str, Any], left_out: str, tmp_path: Path):
        recorded_trace(dict(**options), tmp_path / "trace")
        given = dict(trace=str(tmp_path / "trace"), k=4, leave_out=left_out)
        assert evaluated(given).document.results[0].n == 4

    def test_in_a_suite(self, options: dict[str, Any], left_out: str, tmp_path: Path):
        body = "".join(f"{name}: {options[name]}\n" for name in ("base", "heads", "device", "k", "max_new_tokens"))
        body += f"tasks: [{{name: squad, data: {options['data']}}}]\nrescorers: none\n"
        (tmp_path / "table.yaml").write_text(body + f"leave_out: {left_out}\n")
        suite = run_suite(read_plan(tmp_path / "table.yaml"), tmp_path / "out")
        assert [r.n for r in suite.document.results] == [4]
        (tmp_path / "table.yaml").write_text(body + "leave_out: none.yaml\n")
        with pytest.raises(RescoreError, match=r"line 8: leave_out: no such file: none.yaml"):
            read_plan(tmp_path / "table.yaml")


class TestCommand:
    def test_table_document_and_list(self, rescore: Command, task: str, tmp_path: Path):
        path = corpus(tmp_path, words(0, 14))
        run = rescore("overlap", "--task", task, "--corpus", path, "--out", tmp_path / "list.yaml")
        assert run.code == 0 and "mine  prompt   corpus.txt   25.0%" in run.out
        assert "13 words in a row with the corpora: mine 1 of 4" in run.out
        assert read_leave_out(str(tmp_path / "list.yaml"))
        document = rescore("overlap", "--task", task, "--corpus", path, "--json").document
        assert document["schema"] == "rescore.overlap/1"
        assert document["tasks"][0]["found"][0]["corpora"] == {"corpus.txt": pytest.approx(0.25)}
        rescore("overlap", "--task", task, "--corpus", tmp_path / "none.txt").refused("can't read .*none.txt")

    def test_a_folder_of_data(self, rescore: Command, tmp_path: Path):
        write_lines(tmp_path / "squad.jsonl", squad_records(2))
        path = corpus(tmp_path, json.dumps(squad_records(1)[0]["context"]))
        run = rescore("overlap", "--task", "squad", "--data", tmp_path, "--corpus", path, "--n", 4)
        assert run.code == 0 and "squad 2 of 2" in run.out
