"""What a user types and gives: files of any format read the same, options once, lists, streams that end early."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import typer.main
from conftest import Command, once, squad_records, write_lines
from evaluating import evaluated

import cli
from lattices.errors import RescoreError
from lm.base.corpus import Prompt, read_prompts
from lm.ngram import build as build_module
from lm.training.data import read_head_data
from rescore.studies.perplexity import perplexity_of_task
from rescore.tasks import load_task
from rescore.tasks.data import load_examples

FABLE = Path(__file__).parent / "lm" / "reference" / "fable.txt"
FALLBACK = "--discount-fallback"
WORDS = ["--tokenizer", "words", "--order", 2, FALLBACK]


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


def in_formats(folder: Path, records: list[dict[str, object]]) -> list[Path]:
    """The same records in files of every format that holds objects."""
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    array = json.dumps(records, indent=1).encode()
    files = {
        "a.jsonl": lines, "a.JSONL": lines, "a.ndjson": lines, "a.json": lines, "b.json": array, "a.data": lines,
        "a.jsonl.gz": gzip.compress(lines), "a.json.gz": gzip.compress(array), "a.jsonl.zst": zstd(lines),
        "a.ndjson.GZ": gzip.compress(lines), "b.jsonl": b"\xef\xbb\xbf" + lines,
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "a.parquet")
    return [*(folder / name for name in files), folder / "a.parquet"]


class TestFormats:
    def test_the_data_of_a_task(self, rescore: Command, model: list[object], tmp_path: Path):
        paths = in_formats(tmp_path, squad_records(3))
        expected = load_examples(load_task("squad"), data=paths[0]).examples
        for path in paths:
            assert load_examples(load_task("squad"), data=path).examples == expected, path
        document = rescore(*once("eval", *model, "--data", tmp_path / "a.json.gz"), "--json").document
        assert document["results"] == rescore(*once("eval", *model, "--data", paths[0]), "--json").document["results"]

    def test_a_table_as_data_is_text(self, tmp_path: Path):
        with (tmp_path / "a.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["question", "answer"], ["7 + 0?\nSay it", "007"], ["none?", "NA"]])
        examples = load_examples(load_task("gsm8k"), data=tmp_path / "a.csv").examples
        assert [example.references for example in examples] == [("007",), ("NA",)]
        assert "7 + 0?\nSay it" in examples[0].prompt

    def test_a_task_file_names_them(self, tmp_path: Path):
        (tmp_path / "mine.jsonl.zst").write_bytes(zstd(json.dumps({"q": "what?", "a": "that"}).encode()))
        (tmp_path / "mine.yaml").write_text("source: {file: mine.jsonl.zst}\nprompt: '{q}'\nreference: a\n")
        (example,) = load_examples(load_task(str(tmp_path / "mine.yaml"))).examples
        assert (example.prompt, example.references) == ("what?", ("that",))

    def test_a_suites_folder_of_data(self, rescore: Command, model: list[object], tmp_path: Path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "squad.jsonl.gz").write_bytes(
            gzip.compress(write_lines(tmp_path / "x", squad_records(2)).read_bytes())
        )
        plan = tmp_path / "plan.yaml"
        plan.write_text(f"base: {model[1]}\nheads: {model[3]}\ntasks: [squad]\nrescorers: [none]\nmax_new_tokens: 4\n")
        run = rescore("suite", plan, "--data", tmp_path / "data", "--out", tmp_path / "out", "--json")
        assert run.code == 0 and run.document["runs"], run

    def test_a_file_cut_short_is_refused_whatever_the_limit(
        self,
        rescore: Command,
        model: list[object],
        tmp_path: Path,
    ):
        lines = write_lines(tmp_path / "x", squad_records(400)).read_bytes()
        for name, content in (("x.jsonl.gz", gzip.compress(lines)), ("x.jsonl.zst", zstd(lines))):
            (tmp_path / name).write_bytes(content[:-9])
            run = rescore(*once("eval", *model, "--data", tmp_path / name), "--limit", 1)
            run.refused(f"{name} is not a whole (gzip|zstd) file")
            rescore("build-ngram", tmp_path / name, "--field", "context", *WORDS).refused(f"{name} is not a whole")
            rescore("generate-corpus", *model[:2], "--prompts", tmp_path / name, "--out", tmp_path / "o").refused(name)

    def test_prompts(self, tmp_path: Path):
        wanted = [Prompt("one", True), Prompt("two", False)]
        for path in in_formats(tmp_path, [{"prompt": p.text, "chat": p.chat} for p in wanted]):
            assert read_prompts(path, default_chat=False) == wanted, path
        (tmp_path / "a.csv").write_text("prompt,chat\none,True\ntwo,\n")
        assert read_prompts(tmp_path / "a.csv", default_chat=False) == wanted
        (tmp_path / "a.txt.GZ").write_bytes(gzip.compress(b"one\r\n\ntwo"))
        assert [p.text for p in read_prompts(tmp_path / "a.txt.GZ", default_chat=True)] == ["one", "two"]

    def test_what_heads_learn_from(self, tiny_base, tmp_path: Path):
        pairs = [{"prompt": "what?", "response": f"that {i}"} for i in range(3)]
        paths = in_formats(tmp_path, pairs)
        first = read_head_data(tiny_base, paths[0], tmp_path / "cache-0")
        for number, path in enumerate(paths[1:], start=1):
            data = read_head_data(tiny_base, path, tmp_path / f"cache-{number}")
            assert (data.targets == first.targets).all() and (data.ends == first.ends).all(), path
        for name, content in (("t.txt", b"some text\r\nmore\n"), ("t.txt.gz", gzip.compress(b"some text\nmore\n"))):
            (tmp_path / name).write_bytes(content)
        plain, packed = (read_head_data(tiny_base, tmp_path / n, tmp_path / "t") for n in ("t.txt", "t.txt.gz"))
        assert (plain.targets == packed.targets).all()

    def test_corpora_of_n_grams(self, rescore: Command, tmp_path: Path):
        found = {}
        paths = in_formats(tmp_path, [{"text": line} for line in FABLE.read_text().splitlines()])
        (tmp_path / "a.csv").write_text("text\n" + "".join(f'"{line}"\n' for line in FABLE.read_text().splitlines()))
        (tmp_path / "a.TXT.gz").write_bytes(gzip.compress(FABLE.read_bytes()))
        for number, path in enumerate([FABLE, *paths, tmp_path / "a.csv", tmp_path / "a.TXT.gz"]):
            out = tmp_path / f"m{number}"
            assert rescore("build-ngram", path, *WORDS, "--out", out).code == 0, path
            found[path.name] = (out / "model.arpa").read_bytes()
        assert len(set(found.values())) == 1, [name for name, text in found.items() if text != found["fable.txt"]]
        scores = [rescore("score-ngram", path, "--ngram", tmp_path / "m0", "--json").out for path in paths]
        assert len(set(scores)) == 1

    def test_what_is_no_text_is_refused_by_every_command(
        self,
        rescore: Command,
        model: list[object],
        tmp_path: Path,
    ):
        for name, content in (("x.txt", "text\n".encode("utf-16")), ("y.txt", b"PK\3\4..."), ("z.txt", b'{"a": 1}\n')):
            (tmp_path / name).write_bytes(content)
            train = [*model[:2], "--out", tmp_path / "o"]
            rescore("build-ngram", tmp_path / name, *WORDS).refused(name)
            rescore("generate-corpus", *train, "--prompts", tmp_path / name).refused(name)
            rescore("train-heads", *train, "--corpus", tmp_path / name, "--steps", 1).refused(name)
            rescore(*once("eval", *model, "--data", tmp_path / name)).refused(name)


def options_of_all_commands() -> list[tuple[str, str]]:
    """(command, option that takes one value) of the whole application, bench included."""
    found = []
    application = typer.main.get_command(cli.app)
    for name, command in application.commands.items():
        for inner, each in getattr(command, "commands", {"": command}).items():
            for parameter in each.params:
                if parameter.param_type_name == "option" and not parameter.is_flag and parameter.name != "help":
                    found.append((f"{name} {inner}".strip(), parameter.opts[0], parameter.metavar.endswith(",...>")))
    return found


class TestOptions:
    def test_no_option_of_any_command_is_taken_empty(self, rescore: Command, tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        options = options_of_all_commands()
        assert len(options) > 200
        for command, option, _ in options:
            for empty in ("", " "):
                rescore(*command.split(), option, empty).refused(f"^rescore: {option} is empty; give it a value")
        assert os.listdir(tmp_path) == []

    def test_no_option_of_any_command_is_taken_twice(self, rescore: Command):
        for command, option, multiple in options_of_all_commands():
            if not multiple:
                rescore(*command.split(), option, "1", f"{option}=2").refused(
                    f"{option} is there 2 times; give it once"
                )

    def test_an_argument_is_not_empty(self, rescore: Command):
        for command in ("report", "suite", "inspect", "compare", "build-ngram", "score-ngram", "mix-ngram", "tasks"):
            rescore(command, "").refused("is empty; give it a value")

    def test_a_list_is_repeated_or_has_commas(self, rescore: Command, model: list[object]):
        listed = [["--p", "1,2"], ["--p", 1, "--p", 2], ["--p", "1 2"]]
        rescorers = [
            ["--rescorer", "none,oracle"],
            ["--rescorer", "none", "--rescorer", "oracle"],
            ["--rescorer=none,oracle"],
        ]
        documents = [
            rescore("eval", *model, *ps, *specs, "--json").document for ps, specs in zip(listed, rescorers, strict=True)
        ]
        assert documents[0] == documents[1] == documents[2] and len(documents[0]["results"]) == 3

    def test_a_comma_of_a_path_or_of_a_spec_parts_nothing(self, rescore: Command, model: list[object], tmp_path: Path):
        shutil.copy(FABLE, tmp_path / "a,b.txt")
        rescore("train-bigram", *model[:2], "--corpus", tmp_path / "a,b.txt", "--out", FABLE).refused("it is a file")
        rescore("eval", *model, "--rescorer", "context-ngram:none,alpha=7o,none").refused("'7o'|7o")
        rescore("eval", "--rescorer", "none,,oracle").refused("nothing before or after a comma")

    def test_what_adds_up_still_does(self, rescore: Command, model: list[object]):
        run = rescore("eval", *model, "--rescorer", "none", "--rescorer", "oracle", "--p", "1, 2", "--json")
        assert [(r["rescorer"], r["p"]) for r in run.document["results"]] == [("none", 1), ("none", 2), ("oracle", 1)]

    @pytest.mark.parametrize("listed", ["0,0,1", "0, 0, 1", "0 0 1", " 0  0 1 "])
    def test_lists_with_commas_or_spaces(self, rescore: Command, tmp_path: Path, listed: str):
        command = ["build-ngram", FABLE, "--tokenizer", "words", "--order", 3, FALLBACK, "--out", tmp_path / "m"]
        assert rescore(*command, "--prune", listed).code == 0
        assert json.loads((tmp_path / "m" / "manifest.json").read_text())["prune"] == [0, 0, 1]

    @pytest.mark.parametrize("name", ["data", "trace", "heads", "base"])
    def test_the_library_refuses_empty_paths_too(self, name: str):
        with pytest.raises(RescoreError, match=f"^--{name} is empty"):
            evaluated(dict(**{name: ""}))

    def test_a_passage_has_no_empty_data(self):
        with pytest.raises(RescoreError, match=r"^--data is empty"):
            perplexity_of_task("lambada", data="")


class TestBuildAsTyped:
    @pytest.fixture
    def corpus(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        shutil.copy(FABLE, tmp_path / "corpus.txt")
        monkeypatch.chdir(tmp_path)
        return tmp_path / "corpus.txt"

    def test_the_model_lies_beside_its_corpus(
        self,
        rescore: Command,
        corpus: Path,
        tiny_folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        run = rescore("build-ngram", "corpus.txt", "--tokenizer", tiny_folder, FALLBACK)
        assert run.code == 0, run
        assert run.out.startswith("corpus-4gram: ")
        assert run.out.endswith(f"\nnext: rescore eval --base {tiny_folder} --rescorer ngram:corpus-4gram\n")
        assert sorted(os.listdir(tmp_path)) == ["corpus-4gram", "corpus.txt"]
        assert rescore("build-ngram", corpus, *WORDS).out.startswith(f"{tmp_path / 'corpus-2gram'}: ")
        packed = tmp_path / "more.jsonl.gz"
        packed.write_bytes(gzip.compress(b'{"text": "a b c"}\n' * 3))
        assert rescore("build-ngram", packed, *WORDS, "--json").document["path"] == str(tmp_path / "more-2gram")
        (tmp_path / "texts").mkdir()
        shutil.copy(corpus, tmp_path / "texts" / "a.txt")
        assert rescore("build-ngram", "texts/", *WORDS).out.startswith("texts-2gram: ")
        monkeypatch.chdir(tmp_path / "texts")
        assert rescore("build-ngram", ".", *WORDS).out.startswith(f"{tmp_path / 'texts-2gram'}: ")

    def test_another_model_there_is_not_replaced(self, rescore: Command, corpus: Path):
        assert rescore("build-ngram", corpus, *WORDS).code == 0
        kept = (corpus.parent / "corpus-2gram" / "manifest.json").read_bytes()
        again = rescore("build-ngram", corpus, *WORDS)
        assert again.code == 0 and re.search(r"corpus-2gram holds this model already; it is made again\n$", again.err)
        run = rescore("build-ngram", corpus, *WORDS, "--prune", "0 1")
        run.refused(r"corpus-2gram holds another model \(prune: \[0, 0\] -> \[0, 1\]\); remove it, or .*--out DIR")
        corpus.write_text(FABLE.read_text() + "more\n")
        rescore("build-ngram", corpus, *WORDS).refused(r"another model \(corpora.corpus.txt: \w{12} -> \w{12}\)")
        assert (corpus.parent / "corpus-2gram" / "manifest.json").read_bytes() == kept

    def test_a_stopped_build_goes_on(self, rescore: Command, corpus: Path, monkeypatch):
        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as stopped:
            stopped.setattr(build_module, "estimate", stop)
            assert rescore("build-ngram", corpus, *WORDS).code == 130
        assert rescore("build-ngram", corpus, *WORDS, "--json").document["resumed"]

    def test_where_there_is_no_such_place(self, rescore: Command, corpus: Path, monkeypatch):
        for corpora in (["hub:some/text"], ["own:prompts.jsonl"], [corpus, FABLE]):
            rescore("build-ngram", *corpora, *WORDS).refused(
                "no place of (its|their) own; give the model a folder: --out"
            )
        rescore("build-ngram", "none.txt", *WORDS).refused("can't read .*none.txt: No such file")
        monkeypatch.setattr("lm.ngram.build.is_writable", lambda folder: False)
        rescore("build-ngram", corpus, *WORDS).refused("can't write beside .*corpus.txt; .* --out DIR")


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        [sys.executable, "-m", "rescore", *map(str, arguments)], text=True, env=environment, check=False, **options
    )  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("command", ["build-ngram", "build-lookup", "build-draft-vocabulary"])
def test_no_tokenizer_is_loaded_for_a_corpus_that_is_not_there(
    rescore: Command, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lm.base.catalog.load_tokenizer", lambda *_, **__: pytest.fail("a tokenizer was loaded"))
    rescore(command, tmp_path / "no.txt", "--out", tmp_path / "out").refused("can't read .*no.txt")


class TestStreams:
    @pytest.mark.parametrize("arguments", [["tasks"], ["--help"], ["train-heads", "--help"], ["tasks", "--json"]])
    def test_a_full_stdout(self, arguments: list[str]):
        with open("/dev/full", "w") as full:
            run = command(*arguments, stdout=full, stderr=subprocess.PIPE)
        assert run.returncode == 2
        assert (
            run.stderr.startswith("rescore: can't write what is printed: No space left") and run.stderr.count("\n") == 1
        )

    @pytest.mark.parametrize("arguments", [["tasks"], ["--help"], ["--version"]])
    def test_a_reader_that_has_gone(self, arguments: list[str]):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as gone:
            run = command(*arguments, stdout=gone, stderr=subprocess.PIPE)
        assert run.stderr == "" and run.returncode in (0, 1)

    def test_more_than_a_pipe_holds(self, model: list[object]):
        options = ["oracle", *model, "--k", ",".join(map(str, range(1, 200))), "--json"]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        process = subprocess.Popen(
            [sys.executable, "-m", "rescore", *map(str, options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment, text=True,
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(10) == '{"schema":'
        process.stdout.close()
        errors = process.stderr.read()
        assert (process.wait(), "Traceback" in errors, "BrokenPipe" in errors) == (0, False, False)

    def test_another_pipe_that_breaks_is_a_failure(self, rescore: Command, model: list[object], monkeypatch):
        def broken(*_: object, **__: object) -> None:
            raise BrokenPipeError("a worker")

        monkeypatch.setattr("rescore.runs.evaluation.evaluate", broken)
        rescore("oracle", *model).refused("the connection to another process broke", code=1)

    def test_a_stderr_that_is_closed_or_full(self):
        with open("/dev/full", "w") as full:
            assert command("tasks", "nix", stdout=subprocess.PIPE, stderr=full).returncode == 2
        run = command("tasks", "nix", stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2))
        assert (run.returncode, run.stdout) == (2, "")


def test_compiled_code_is_kept_where_it_may_be(tmp_path: Path):
    """An installation that can't be written to and a home that can't either: numba compiles all the same, and keeps."""
    shutil.copytree("lattices", tmp_path / "lattices", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "lattices" / "__pycache__").write_text("")  # in the way, also for root
    program = (
        "import numpy as np; from lattices.oracle import oracle_accepted; import lattices.oracle as o, os;"
        "print(os.environ['NUMBA_CACHE_DIR'])"
    )

    def run(**environment: str) -> Path:
        kept = {name: value for name, value in os.environ.items() if name not in ("RESCORE_CACHE", "NUMBA_CACHE_DIR")}
        found = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, text=True, capture_output=True, check=False,
            env={**kept, "HOME": os.devnull, "TMPDIR": str(tmp_path), **environment},
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        return Path(found.stdout.strip())

    assert run(RESCORE_CACHE=str(tmp_path / "cache")) == tmp_path / "cache" / "numba"
    assert run() == tmp_path / f"rescore-{os.getuid()}" / "numba" and (run().stat().st_mode & 0o777) == 0o755
    (tmp_path / f"rescore-{os.getuid()}").chmod(0o777)  # others could put code there
    assert run() != tmp_path / f"rescore-{os.getuid()}" / "numba"


def test_downloads_go_where_they_may(tmp_path: Path):
    program = "import lm, os; print([os.environ.get(n) for n in ('HF_HOME', 'HF_DATASETS_CACHE')])"

    def run(**environment: str) -> str:
        kept = {n: v for n, v in os.environ.items() if not n.startswith("HF_") and n != "XDG_CACHE_HOME"}
        return subprocess.run(
            [sys.executable, "-c", program], text=True, capture_output=True, check=True,
            env={**kept, "RESCORE_CACHE": str(tmp_path / "cache"), **environment},
        ).stdout.strip()  # fmt: skip

    assert run(HOME=str(tmp_path)) == "[None, None]"
    assert run(HOME=os.devnull) == f"['{tmp_path}/cache/huggingface', None]"
    assert run(HOME=os.devnull, HF_HOME="/mine") == "['/mine', None]"


@pytest.mark.parametrize(
    ("option", "value"), [("--base", "foo"), ("--max-new-tokens", "3"), ("--max-prompt-tokens", "9")]
)
@pytest.mark.parametrize("command", [("eval",), ("oracle",), ("tune", "--rescorer", "ngram")], ids=lambda c: c[0])
def test_a_given_trace_refuses_what_says_how_one_is_recorded(
    rescore: Command, tmp_path: Path, command: tuple[str, ...], option: str, value: str
):
    run = rescore(*command, "--trace", tmp_path, option, value)
    run.refused(f"a given trace is replayed as it was recorded; drop {option} or --trace")


def test_a_gpu_by_another_name(rescore: Command):
    rescore("bench", "verify-curve", "--device", "gpu").refused("unknown device 'gpu'; give cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost", "--base", "paper-1.5b", "--task", "squad"], "--task is a task of --results"),
        (["cost", "--block-efficiency", "unrescored=1.5,2"], "2: give METHOD=NUMBER"),
        (["cost", *["--block-efficiency", "unrescored=2"] * 2], "--block-efficiency gives unrescored twice; keep one"),
        (["analyse", "--trace", "t", "--only", "ranks", "--bins", 3], "--bins is for the analysis calibration"),
        (["analyse", "--trace", "t", "--only", "ranks", "--k", 3], "--k is for the analysis p_curve"),
        (["export-fst", "--ngram", "n", "--out", "o", "--position", 0], "--position chooses a lattice of --trace"),
        (["mix-ngram", "a", "b", "--out", "o", "--weights", "1,1", "--k", 4], "--k is for tuning on a --trace"),
        (["mix-ngram", "a", "b", "--out", "o", "--weights", "1,1", "--held-out", 4], "--held-out is for tuning"),
    ],
)
def test_what_would_change_nothing_is_refused(rescore: Command, arguments: list[object], message: str):
    rescore(*arguments).refused(message)
