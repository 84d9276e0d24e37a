"""The n-gram commands end to end on small texts: models that score and compose, one line per mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kenlm
import pytest
from conftest import Command, files_of_at_most, save_tiny_base, write_lines

from lattices.automaton import Automaton
from lm.ngram.arpa import read_arpa

REFERENCE = Path(__file__).parent / "lm" / "reference"
FABLE = REFERENCE / "fable.txt"
WORDS = ["--tokenizer", "words"]
FALLBACK = "--discount-fallback"


@pytest.fixture
def built(rescore: Command, tmp_path: Path) -> Path:
    """A trigram model of words."""
    assert rescore("build-ngram", FABLE, *WORDS, "--order", 3, "--out", tmp_path / "built").code == 0
    return tmp_path / "built"


@pytest.fixture
def tokens(rescore: Command, tiny_folder: Path, tmp_path: Path) -> Path:
    """A trigram model of the tiny base's token ids (bytes)."""
    options = ["--tokenizer", tiny_folder, "--order", 3, FALLBACK, "--out", tmp_path / "tokens"]
    assert rescore("build-ngram", FABLE, *options).code == 0
    return tmp_path / "tokens"


class TestBuild:
    def test_the_table_and_the_folder(self, rescore: Command, tmp_path: Path):
        run = rescore("build-ngram", FABLE, *WORDS, "--order", 3, "--prune", "0,0,1", "--out", tmp_path / "m")
        assert (run.code, run.err) == (0, "")
        model = read_arpa(tmp_path / "m" / "model.arpa")
        lines = run.out.splitlines()
        assert re.fullmatch(rf"{tmp_path}/m: \d+ n-grams from 224 tokens in \d+ documents", lines[0])
        assert lines[2].split() == ["order", "n-grams", "D1", "D2", "D3+", "from"]
        for n, line in enumerate(lines[4:7], start=1):
            assert re.fullmatch(rf"{n} +{len(model.orders[n - 1])}( +\d\.\d{{4}}){{3}} +corpus", line), line
        assert re.fullmatch(r"files: automaton.bin \(.* B\), manifest.json \(.* B\), model.arpa \(.* B\)", lines[-2])
        assert lines[-1] == f"next: rescore score-ngram TEXT --ngram {tmp_path / 'm'}"
        assert sorted(os.listdir(tmp_path / "m")) == ["automaton.bin", "manifest.json", "model.arpa"]

    def test_the_document(self, rescore: Command, tmp_path: Path):
        command = ["build-ngram", FABLE, *WORDS, "--order", 5, "--out", tmp_path / "m"]
        rescore(*command).refused("discounts of the 5-grams.*--discount-fallback")
        found = rescore(*command, FALLBACK, "--json").document
        assert found["tokens"] == 224 and found["resumed"] and found["fallback_orders"] == [5]
        assert len(found["ngrams"]) == len(found["discounts"]) == 5
        assert "fallback" in rescore(*command, FALLBACK).out

    def test_katz_and_entropy_pruning(self, rescore: Command, tmp_path: Path):
        options = [FABLE, *WORDS, "--order", 3]
        run = rescore("build-ngram", *options, "--smoothing", "katz", "--prune", "0", "--out", tmp_path / "katz")
        assert run.code == 0 and run.out.splitlines()[2].split()[2:-1] == ["d1", "d2", "d3", "d4", "d5"]
        pruned = rescore("build-ngram", *options, "--max-ngrams", "0.2K", "--out", tmp_path / "pruned", "--json")
        assert sum(pruned.document["ngrams"]) <= 200

    def test_several_sources_and_fields(self, rescore: Command, tmp_path: Path):
        lines = write_lines(tmp_path / "x.jsonl", [{"body": "one two\nthree"}, {"body": "four"}])
        run = rescore(
            "build-ngram", FABLE, lines, *WORDS, "--field", "body", "--order", 2, FALLBACK, "--out", tmp_path / "m",
            "--json",
        )  # fmt: skip
        assert run.document["tokens"] == 228

    def test_the_bases_own_output_is_a_corpus(self, rescore: Command, tiny_folder: Path, tmp_path: Path):
        prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "x" * n} for n in range(1, 7)])
        made = rescore(
            "generate-corpus", "--base", tiny_folder, "--prompts", prompts, "--out", tmp_path / "own",
            "--max-new-tokens", 12, "--device", "cpu",
        )  # fmt: skip
        assert made.code == 0
        options = [tmp_path / "own", "--order", 2, FALLBACK, "--out", tmp_path / "m", "--json"]
        run = rescore("build-ngram", *options, "--tokenizer", tiny_folder)
        assert (run.code, run.document["documents"], run.document["tokens"]) == (0, 6, 6 * (12 + 1))
        manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
        assert [source["kind"] for source in manifest["corpora"]] == ["own"]
        other = save_tiny_base(tmp_path / "other")
        document = json.loads((other / "tokenizer.json").read_text())
        vocabulary = document["model"]["vocab"]
        a, b = sorted(vocabulary)[:2]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
        (other / "tokenizer.json").write_text(json.dumps(document))
        rescore("build-ngram", *options, "--tokenizer", other).refused("was made with the tokenizer of .*tiny; choose")
        rescore("build-ngram", *options, *WORDS).refused("holds token ids; choose the tokenizer of its base")

    def test_surface_words(self, rescore: Command, tiny_folder: Path, tmp_path: Path):
        options = ["--tokenizer", tiny_folder, "--surface", "--order", 2, FALLBACK, "--out", tmp_path / "m"]
        assert rescore("build-ngram", FABLE, *options).code == 0
        assert "a" in read_arpa(tmp_path / "m" / "model.arpa").vocabulary
        score = rescore("score-ngram", FABLE, "--ngram", tmp_path / "m", "--json").document
        assert score["unknown"] == 0

    def test_line_ends_marks_and_nul_are_no_words(self, rescore: Command, tmp_path: Path):
        (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone two\r\nthree\0four\r\n")
        options = [tmp_path / "x.txt", *WORDS, "--order", 2, FALLBACK, "--out", tmp_path / "m"]
        assert rescore("build-ngram", *options).code == 0
        assert read_arpa(tmp_path / "m" / "model.arpa").vocabulary[3:] == ("one", "two", "three", "four")

    @pytest.mark.parametrize("where", ["encode_corpora", "count_full", "estimate", "write_model"])
    def test_a_killed_build_leaves_no_model_and_goes_on(
        self,
        rescore: Command,
        tmp_path: Path,
        where: str,
    ):
        out = tmp_path / "m"
        command = ["build-ngram", FABLE, *WORDS, "--order", 3, "--out", out]
        program = (
            "import os, signal, sys, lm.ngram.build as module, rescore.__main__\n"
            f"module.{where} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"sys.argv = ['rescore', *{list(map(str, command))!r}]\n"
            "rescore.__main__.main()"
        )
        killed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert os.listdir(out) == [".counting"]
        rescore("score-ngram", FABLE, "--ngram", out).refused("no n-gram model in")
        whole = rescore(*command, "--json")
        assert whole.code == 0 and whole.document["resumed"] == (where != "encode_corpora")
        assert sorted(os.listdir(out)) == ["automaton.bin", "manifest.json", "model.arpa"]
        again = rescore(*command[:-1], tmp_path / "again", "--json")
        assert again.document["ngrams"] == whole.document["ngrams"]
        assert (out / "model.arpa").read_bytes() == (tmp_path / "again" / "model.arpa").read_bytes()

    def test_ctrl_c_is_told(self, rescore: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("lm.ngram.build.estimate", interrupt)
        run = rescore("build-ngram", FABLE, *WORDS, "--out", tmp_path / "m")
        assert run.code == 130 and run.err.endswith("what is finished is kept, the same command goes on\n")
        assert not (tmp_path / "m" / "manifest.json").exists()

    def test_a_full_disk_leaves_the_earlier_model(self, rescore: Command, built: Path):
        before = {path.name: path.read_bytes() for path in built.iterdir()}
        for room in (400, 2000):  # the settings, then the counts or the model
            with files_of_at_most(room):
                rescore("build-ngram", FABLE, *WORDS, "--order", 2, "--out", built).refused("can't write .*too large")
            assert {p.name: p.read_bytes() for p in built.iterdir() if p.is_file()} == before
        fresh = built.parent / "fresh"
        with files_of_at_most(2000):
            rescore("build-ngram", FABLE, *WORDS, "--out", fresh).refused("can't write ")
        assert not (fresh / "manifest.json").exists() and not (fresh / "model.arpa").exists()
        assert rescore("build-ngram", FABLE, *WORDS, "--order", 3, "--out", fresh).code == 0


def build_refusals(tiny: Path, folder: Path) -> Iterator[tuple[str, list[object], str]]:
    """(what is wrong, arguments of build-ngram but --out, what the one line says)."""

    def text(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    fable = [FABLE, *WORDS]
    yield "empty corpus", [text("empty.txt", b""), *WORDS], "there is no word in .*empty.txt"
    yield "blank lines", [text("blank.txt", b"\n \r\n\n"), *WORDS], "there is no word in "
    yield "blank lines of tokens", [folder / "blank.txt", "--tokenizer", tiny], "there is no word in "
    yield "one line", [text("one.txt", b"one line\n"), *WORDS], "discounts of the 1-grams.*--discount-fallback"
    yield "too small", [*fable, "--order", 6], "discounts of the 5-grams.*--discount-fallback"
    for word in ("<s>", "</s>", "<unk>"):
        path = text("special.txt", f"one\ntwo {word}\n".encode())
        yield word, [path, *WORDS], f"special.txt line 2 holds {word} as a word"
    bad = text("bad.txt", b"one\ntwo\nthr\xffee\n")
    yield "invalid UTF-8", [bad, *WORDS], "bad.txt line 3 is not UTF-8 text .*--errors replace"
    yield "invalid UTF-8 of tokens", [bad, "--tokenizer", tiny], "bad.txt line 3 is not UTF-8"
    yield "no such errors", [bad, *WORDS, "--errors", "ignore"], "known: replace, strict"
    ids = text("ids.jsonl", b'{"text": [1, 2]}\n{"text": [3, 257]}\n')
    yield "ids above", [ids, "--tokenizer", tiny], "ids.jsonl line 2 has the token id 257; .* from 0 to 256"
    yield "no JSON", [text("x.jsonl", b'{"text": "a"}\n{\n'), *WORDS], "x.jsonl line 2 is not valid JSON"
    yield "no field", [folder / "ids.jsonl", *WORDS, "--field", "body"], "has no field 'body' .*choose --field"
    yield "broken gzip", [text("x.txt.gz", b"\x1f\x8bxx"), *WORDS], "x.txt.gz"
    yield "order above 6", [*fable, "--order", 7], "order 7 is not supported; choose 1 to 6"
    yield "order 0", [*fable, "--order", 0], "choose 1 to 6"
    yield "no such file", [folder / "none.txt", *WORDS], "can't read .*none.txt: No such file"
    (folder / "nothing").mkdir()
    yield "empty folder", [folder / "nothing", *WORDS], "holds no .txt or .jsonl"
    yield "no such tokenizer", [FABLE, "--tokenizer", "smollm2-135n"], r"did you mean smollm2-135m or"
    yield "no such smoothing", [*fable, "--smoothing", "kats"], "did you mean katz"
    yield "no such estimator", [*fable, "--estimator", "lmpls"], "did you mean lmplz"
    for option, value in (("--memory", "4X"), ("--memory", "-4G"), ("--max-ngrams", "many")):
        yield f"{option} {value}", [*fable, option, value], f"{option} {value}: give a number"
    yield "too little memory", [*fable, "--memory", "100M"], "give at least 512M"
    yield "no n-grams", [*fable, "--max-ngrams", "0"], "must be at least 1"
    yield "prune", [*fable, "--prune", "0;1"], "--prune 0;1: give whole numbers with commas"
    yield "prune falls", [*fable, "--prune", "1,0"], "nor fall"
    yield "prune too long", [*fable, "--order", 2, "--prune", "0,0,0"], "give at most 2"
    yield "no threads", [*fable, "--threads", 0], "threads = 0"
    yield "no corpus", [*WORDS], "Missing argument"


def test_every_mistake_in_building_is_one_line(rescore: Command, tiny_folder: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    for what, arguments, message in build_refusals(tiny_folder, tmp_path / "in"):
        try:
            rescore("build-ngram", *arguments, "--out", tmp_path / "out").refused(message)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error
        assert not (tmp_path / "out" / "manifest.json").exists(), what
    replaced = [tmp_path / "in" / "bad.txt", *WORDS, "--errors", "replace", FALLBACK, "--out", tmp_path / "out"]
    assert rescore("build-ngram", *replaced).code == 0
    assert "thr\ufffdee" in read_arpa(tmp_path / "out" / "model.arpa").vocabulary


class TestPlaces:
    def test_other_files_are_never_replaced(self, rescore: Command, tmp_path: Path):
        (tmp_path / "thesis.tex").write_text("all my work")
        command = ["build-ngram", FABLE, *WORDS, "--out"]
        rescore(*command, tmp_path).refused("holds files that are no n-gram model, which would be lost")
        rescore(*command, tmp_path / "thesis.tex").refused("is a file; the model is a folder")
        rescore(*command, tmp_path / "thesis.tex" / "below").refused("can't write ")
        assert (tmp_path / "thesis.tex").read_text() == "all my work"

    def test_a_place_that_can_not_be_written(self, rescore: Command):
        rescore("build-ngram", FABLE, *WORDS, "--out", "/proc/none/model").refused("can't write /proc/none/model")

    def test_a_model_takes_the_place_of_an_earlier_one(self, rescore: Command, built: Path):
        assert rescore("build-ngram", FABLE, *WORDS, "--order", 2, "--out", built).code == 0
        assert read_arpa(built / "model.arpa").order == 2


class TestScore:
    def test_as_kenlm_scores_it(self, rescore: Command, built: Path, tmp_path: Path):
        text = tmp_path / "x.txt"
        text.write_text(FABLE.read_text() + "zebra the xylophone\n\n")
        run = rescore("score-ngram", text, "--ngram", built, "--json")
        assert (run.code, run.err) == (0, "")
        reference = kenlm.Model(str(built / "model.arpa"))
        scores = [score for line in text.read_text().splitlines() for score in reference.full_scores(line)]
        found = run.document
        assert found["log10p"] == pytest.approx(sum(s[0] for s in scores), abs=1e-3)
        assert (found["tokens"], found["unknown"]) == (len(scores), 2) and found["hits"] is None
        assert found["perplexity"] == pytest.approx(10 ** (-found["log10p"] / found["tokens"]))
        for name in ("model.arpa", "automaton.bin"):
            assert rescore("score-ngram", text, "--ngram", built / name, "--json").document == found
        table = rescore("score-ngram", text, "--ngram", built).out
        assert re.search(r"\nunknown tokens +2 \(\d+\.\d\d%\)\n", table)
        assert re.search(rf"\nperplexity +{found['perplexity']:.2f}\n", table)

    def test_tokens_of_a_base(self, rescore: Command, tokens: Path, tmp_path: Path):
        found = rescore("score-ngram", FABLE, "--ngram", tokens, "--json").document
        vocabulary = read_arpa(tokens / "model.arpa").vocabulary
        reference = kenlm.Model(str(tokens / "model.arpa"))
        assert all(word.isdecimal() for word in vocabulary[3:])
        assert found["unknown"] == 0 and found["tokens"] > 1000 and found["perplexity"] < 20
        assert reference.order == 3

    def test_a_kenlm_binary_tells_lengths(self, rescore: Command, tmp_path: Path):
        (tmp_path / "x.txt").write_text("the cat sat\nzebra\n")
        binary = REFERENCE / "kenlm" / "trie.bin"
        run = rescore("score-ngram", tmp_path / "x.txt", "--ngram", binary, "--json")
        assert run.document["hits"] == [2, 1, 3] and run.document["unknown"] == 1
        assert "scored by 3-grams" in rescore("score-ngram", tmp_path / "x.txt", "--ngram", binary).out

    def test_nothing_known_is_told(self, rescore: Command, built: Path, tmp_path: Path):
        (tmp_path / "x.txt").write_text("12 34 56\n" * 5 + "78\n" * 20)
        run = rescore("score-ngram", tmp_path / "x.txt", "--ngram", built / "model.arpa", "--json")
        assert run.code == 0 and run.document["perplexity_known"] > 0
        many = tmp_path / "y.txt"
        many.write_text("12 34 " * 50)
        run = rescore("score-ngram", many, "--ngram", built)
        assert run.code == 0 and re.fullmatch(r"rescore: .* does not know 99% of the words; is this .*\n", run.err)

    def test_mistakes(self, rescore: Command, built: Path, tokens: Path, tiny_folder: Path, tmp_path: Path):
        (tmp_path / "empty.txt").write_text("\n")
        (tmp_path / "bad.txt").write_bytes(b"one\n\xff\n")
        (tmp_path / "special.txt").write_text("<unk>\n")
        broken = tmp_path / "broken"
        shutil.copytree(built, broken)
        (broken / "automaton.bin").write_bytes((built / "automaton.bin").read_bytes()[:-100])
        unknown = tmp_path / "unknown"
        shutil.copytree(built, unknown)
        (unknown / "manifest.json").write_text("{}")
        arpa = tmp_path / "cut.arpa"
        arpa.write_bytes((built / "model.arpa").read_bytes()[:-50])
        for arguments, message in (
            ([tmp_path / "none.txt", "--ngram", built], "can't read .*none.txt"),
            ([FABLE, "--ngram", tmp_path / "none"], "no n-gram model at .*none; give a folder of rescore build-ngram"),
            ([FABLE, "--ngram", tmp_path], "no n-gram model in "),
            ([FABLE, "--ngram", FABLE], "fable.txt"),
            ([FABLE, "--ngram", arpa], "cut.arpa"),
            ([FABLE, "--ngram", broken], "is not a whole n-gram automaton; build it again"),
            ([FABLE, "--ngram", built, "--tokenizer", tiny_folder], "was made with the tokenizer words; give that"),
            ([FABLE, "--ngram", tokens, *WORDS], "was made with the tokenizer .*tiny; give that, or leave"),
            ([FABLE, "--ngram", built, "--tokenizer", "nonsense"], "tokenizer words"),
            ([tmp_path / "empty.txt", "--ngram", built], "there is no word in "),
            ([tmp_path / "bad.txt", "--ngram", built], "bad.txt line 2 is not UTF-8"),
            ([tmp_path / "special.txt", "--ngram", built], "special.txt line 1 holds <unk> as a word"),
            ([FABLE], "Missing option '--ngram'"),
        ):
            rescore("score-ngram", *arguments).refused(message)


class TestExport:
    def test_the_automaton(self, rescore: Command, built: Path, tmp_path: Path):
        run = rescore("export-fst", "--ngram", built, "--out", tmp_path / "fst")
        assert run.code == 0 and re.fullmatch(r".*/fst: automaton.txt \(.*\), words.syms \(.*\)\n", run.out)
        automaton = Automaton.load(built / "automaton.bin")
        words = [line.split("\t")[0] for line in (tmp_path / "fst" / "words.syms").read_text().splitlines()]
        assert words == ["<eps>", *automaton.vocabulary]
        arcs = [line.split("\t") for line in (tmp_path / "fst" / "automaton.txt").read_text().splitlines()]
        assert {len(arc) for arc in arcs} == {1, 5}
        assert any(arc[2] == "0" for arc in arcs if len(arc) == 5)
        rescore("export-fst", "--ngram", built, "--phi", "--out", tmp_path / "phi")
        assert "<phi>" in (tmp_path / "phi" / "words.syms").read_text()

    def test_a_lattice_of_a_trace(
        self,
        rescore: Command,
        tokens: Path,
        tiny_folder: Path,
        tiny_heads_folder: Path,
        squad_file: Path,
        tmp_path: Path,
    ):
        model = ["--base", tiny_folder, "--heads", tiny_heads_folder, "--data", squad_file, "--max-new-tokens", 6]
        trace, out = tmp_path / "trace", tmp_path / "fst"
        assert rescore("trace", *model, "--limit", 2, "--out", trace, "--device", "cpu").code == 0
        chosen = ["export-fst", "--ngram", tokens, "--trace", trace, "--out", out]
        run = rescore(*chosen, "--example", "q1", "--position", 3, "--k", 2, "--alpha", 0.5)
        assert run.code == 0, run
        assert sorted(os.listdir(out)) == [
            "automaton.txt", "composition.txt", "lattice.txt", "tokens.syms", "words.syms"
        ]  # fmt: skip
        assert len((out / "lattice.txt").read_text().splitlines()) == 1 + 3 * 2 + 1
        assert len((out / "tokens.syms").read_text().splitlines()) == 1 + 257
        for arguments, message in (
            (["--example", "q9"], "unknown example 'q9'; did you mean"),
            (["--position", 6], "--position 6: the example q0 has the positions 0 to 5"),
            (["--position", -1], "--position -1"),
            (["--k", 99], "k = 99, but the trace holds the top"),
        ):
            rescore(*chosen, *arguments).refused(message)
        rescore(*chosen[:4], tmp_path / "none", *chosen[5:]).refused("no trace in ")
        manifest = json.loads((tokens / "manifest.json").read_text())
        (tokens / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_sha256": "0" * 64}))
        rescore(*chosen).refused("was made for another tokenizer than the base LM's of .*trace")
        rescore("score-ngram", FABLE, "--ngram", tokens).refused("is not what .* was made with: it has changed since")

    def test_mistakes(self, rescore: Command, built: Path, tmp_path: Path):
        binary = REFERENCE / "kenlm" / "trie.bin"
        rescore("export-fst", "--ngram", binary, "--out", tmp_path / "x").refused("is a KenLM binary, which can't be")
        rescore("export-fst", "--ngram", tmp_path / "none", "--out", tmp_path / "x").refused("no n-gram model at")
        (tmp_path / "file").write_text("")
        rescore("export-fst", "--ngram", built, "--out", tmp_path / "file").refused("can't write ")
        with files_of_at_most(400):
            rescore("export-fst", "--ngram", built, "--out", tmp_path / "full").refused("can't write ")
        assert not list((tmp_path / "full").iterdir())


class TestHelp:
    @pytest.mark.parametrize("command", ["build-ngram", "score-ngram", "export-fst"])
    def test_every_command_has_help(self, rescore: Command, command: str):
        run = rescore(command, "--help")
        assert (run.code, run.err) == (0, "") and run.out.startswith(f"Usage: rescore {command} ")
        assert command == "export-fst" or "generate-corpus" in "".join(run.out.split())  # it may be cut at its hyphen

    def test_help_imports_no_heavy_library(self):
        program = (
            "import contextlib, io, sys, rescore.__main__\n"
            "for command in ('build-ngram', 'score-ngram'):\n"
            "    sys.argv = ['rescore', command, '--help']\n"
            "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
            "        rescore.__main__.main()\n"
            "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
        )
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert found.stdout == "[]\n"
