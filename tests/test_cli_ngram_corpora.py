"""The command mix-ngram, and own output as a corpus, end to end on the tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import Command, write_lines

FABLE = Path(__file__).parent / "lm" / "reference" / "fable.txt"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", [{"prompt": "x" * n} for n in range(1, 9)])


@pytest.fixture
def model(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path) -> list[object]:
    return [
        "--base", tiny_folder, "--heads", tiny_heads_folder, "--data", squad_file, "--max-new-tokens", 12,
        "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture
def two(rescore: Command, tiny_folder: Path, prompts: Path, tmp_path: Path) -> list[Path]:
    """A trigram model of a text and one of own output, over the tiny base's tokens."""
    for name, corpus in (("fable", FABLE), ("own-output", f"own:{prompts}")):
        run = rescore(
            "build-ngram", corpus, "--tokenizer", tiny_folder, "--order", 3, "--discount-fallback",
            "--max-new-tokens", 10, "--device", "cpu", "--out", tmp_path / name,
        )  # fmt: skip
        assert run.code == 0, run
    return [tmp_path / "fable", tmp_path / "own-output"]


@pytest.fixture
def trace(rescore: Command, model: list[object], tmp_path: Path) -> Path:
    assert rescore("trace", *model, "--k", 16, "--out", tmp_path / "trace").code == 0
    return tmp_path / "trace"


class TestOwnOutput:
    def test_as_generate_corpus_makes_it(self, rescore: Command, two, prompts, tiny_folder, tmp_path: Path):
        options = ["--prompts", prompts, "--max-new-tokens", 10, "--device", "cpu", "--out", tmp_path / "own"]
        assert rescore("generate-corpus", "--base", tiny_folder, *options).code == 0
        rest = ["--order", 3, "--discount-fallback", "--out", tmp_path / "m"]
        assert rescore("build-ngram", tmp_path / "own", "--tokenizer", tiny_folder, *rest).code == 0
        assert (tmp_path / "m" / "model.arpa").read_bytes() == (two[1] / "model.arpa").read_bytes()

    def test_the_base_is_the_tokenizer_unless_told(self, rescore: Command, two, prompts, tiny_folder):
        options = [f"own:{prompts}", "--base", tiny_folder, "--order", 3, "--discount-fallback", "--max-new-tokens", 10]
        before = (two[1] / "model.arpa").read_bytes()
        assert rescore("build-ngram", *options, "--device", "cpu", "--out", two[1]).code == 0
        assert (two[1] / "model.arpa").read_bytes() == before

    @pytest.mark.usefixtures("converted")
    def test_mistakes(self, rescore: Command, prompts, tiny_folder, tmp_path: Path):
        out = ["--out", tmp_path / "m"]
        for arguments, message in (
            ([f"own:{tmp_path}/none", "--tokenizer", tiny_folder], "can't read .*none"),
            ([f"own:{prompts}", "--tokenizer", "words"], "counted by the base's tokens, not by words"),
            ([f"own:{prompts}", "--tokenizer", tiny_folder, "--max-new-tokens", 0], "max_new_tokens = 0"),
            ([f"own:{prompts}", "--tokenizer", tiny_folder, "--max-new-tokens", 9999], "exceed the context of 512"),
            ([f"own:{prompts}", "--tokenizer", "smollm2-135m", "--base", tiny_folder], "choose --tokenizer .*tiny"),
            ([f"own:{prompts}", "--tokenizer", tiny_folder, "--base", "nonsense"], "unknown model 'nonsense'"),
        ):
            rescore("build-ngram", *arguments, *out).refused(message)
            assert not (tmp_path / "m").exists()


class TestMix:
    def test_given_weights(self, rescore: Command, two, trace, tmp_path: Path):
        run = rescore("mix-ngram", *two, "--weights", "7,3", "--out", tmp_path / "mixed")
        assert (run.code, run.err) == (0, "rescore: the weights add up to 10; they are scaled to 1\n")
        lines = run.out.splitlines()
        assert re.fullmatch(rf"{tmp_path}/mixed: n-grams: [\d,]+ of order 1, .* of order 3", lines[0])
        assert [line.split()[-1] for line in lines[4:6]] == ["0.700", "0.300"]
        assert lines[-1].startswith("files: automaton.bin (")
        found = rescore("mix-ngram", *two, "--weights", "0.7,0.3", "--out", tmp_path / "mixed", "--json").document
        assert found["weights"] == pytest.approx([0.7, 0.3]) and found["tuned"] is None and len(found["ngrams"]) == 3
        names = [f"ngram:{path}" for path in (*two, tmp_path / "mixed")]
        chosen = [argument for name in names for argument in ("--rescorer", name)]
        results = rescore("eval", "--trace", trace, *chosen, "--alpha", 1, "--k", 8, "--json").document["results"]
        assert [r["rescorer"] for r in results] == names

    def test_tuned_weights(self, rescore: Command, two, trace, tmp_path: Path):
        command = ["mix-ngram", *two, "--trace", trace, "--held-out", 2, "--k", 8, "--out", tmp_path / "mixed"]
        run = rescore(*command)
        assert (run.code, run.err) == (0, "")
        lines = run.out.splitlines()
        assert lines[0].split() == ["fable", "own-output", "block", "eff."]
        assert [line.split()[0] for line in lines[2:13]] == ["1", "0", *(f"0.{n}" for n in range(1, 10))]
        (best,) = (line for line in lines[2:13] if "*" in line)
        assert "on 2 held-out examples at k = 8, p = 1, alpha = 0.5" in lines[13]
        manifest = json.loads((tmp_path / "mixed" / "manifest.json").read_text())
        weights = [part["weight"] for part in manifest["mixture"]]
        assert weights == pytest.approx([float(cell) for cell in best.split()[:2]])
        document = rescore(*command, "--json").document
        assert document["weights"] == pytest.approx(weights) == document["tuned"]["weights"]
        assert manifest["tuned"] == document["tuned"]

    def test_mistakes(self, rescore: Command, two, trace, tmp_path: Path):
        out, weights = ["--out", tmp_path / "x"], ["--weights", "1,1"]
        for arguments, message in (
            ([*two, *out], "give the weights of the mixture .* or a trace"),
            ([*two, *weights, "--trace", trace, *out], "give the weights of the mixture .* or a trace"),
            ([two[0], *weights, *out], "two n-gram models or more"),
            ([*two, "--weights", "1", *out], "1 weights for 2 n-gram models; give one for each"),
            ([*two, "--weights", "1,x", *out], "--weights 1,x: give numbers"),
            ([*two, "--weights", "1,-1", *out], "must be numbers above 0"),
            ([two[0], "shipped", *weights, *out], "mix models that were built with one tokenizer"),
            ([two[0], tmp_path / "none", *weights, *out], "no n-gram model at .*none"),
            ([*two, *weights, "--out", two[0]], "one of the models to mix"),
            ([*two, *weights, "--out", "/proc/none/x"], "can't write /proc/none/x"),
            ([*two, "--trace", tmp_path / "none", *out], "no trace in .*none"),
            ([*two, "--trace", trace, "--k", 99, *out], "k = 99, but the trace holds"),
        ):
            rescore("mix-ngram", *arguments).refused(message)
        assert not (tmp_path / "x").exists()


def test_models_side_by_side(rescore: Command, two, model, tiny_folder, tiny_heads_folder, squad_file, tmp_path: Path):
    """The recipe docs/suites/ngrams.yaml, with two models over the tiny base's tokens."""
    recipe = (Path(__file__).parents[1] / "docs" / "suites" / "ngrams.yaml").read_text()
    names = re.findall(r"^  - (ngram:\S+)$", recipe, re.MULTILINE)
    assert all(f"--out {name[6:]}\n" in recipe for name in names), "the recipe builds what it compares"
    for old, new in (
        ("base: smollm2-135m", f"base: {tiny_folder}\nheads: {tiny_heads_folder}\ndevice: cpu"),
        ("limit: 100", "limit: 3\nmax_new_tokens: 12"), ("k: 16", "k: 8"), ("[1, 16]", "[1, 4]"), ("50", "2"),
        ("- xsum", f"- {{name: squad, data: {squad_file}}}"), ("  - ngram #", "  #"),
        (f"  - {names[0]}\n", f"  - ngram:{two[0]}\n"), (f"  - {names[1]}\n", f"  - ngram:{two[1]}\n"),
        *((f"  - {name}\n", "") for name in names[2:]),
    ):  # fmt: skip
        assert old in recipe
        recipe = recipe.replace(old, new)
    (tmp_path / "ngrams.yaml").write_text(recipe)
    document = rescore("suite", tmp_path / "ngrams.yaml", "--out", tmp_path / "out", "--json").document
    results = {(r["rescorer"], r["p"]): r for r in document["results"]}
    assert set(results) == {(name, p) for name in ("none", f"ngram:{two[0]}", f"ngram:{two[1]}") for p in (1, 4)}
    for sweep in document["tuned"]:  # a weight for each model and p, on examples that are not evaluated
        result = results[sweep["rescorer"], sweep["p"]]
        assert result["alpha"] == sweep["alpha"] and sweep["held_out"] == ["q4", "q5"] and result["n"] == 3
        chosen = ["--rescorer", sweep["rescorer"], "--p", sweep["p"], "--alpha", sweep["alpha"]]
        (again,) = rescore("eval", *model, "--k", 8, "--limit", 3, *chosen, "--json").document["results"]
        assert again["block_efficiency"] == result["block_efficiency"]
    found = rescore("analyse", "--results", tmp_path / "out", "--against", f"ngram:{two[0]}=none", "--json").document
    for contrast in found["contrasts"]:  # at the same p
        ours, plain = (results[name, contrast["p"]]["block_efficiency"] for name in (f"ngram:{two[0]}", "none"))
        assert contrast["gain"] == pytest.approx(ours / plain - 1)
    assert [contrast["p"] for contrast in found["contrasts"]] == [1, 4]


def test_help(rescore: Command):
    run = rescore("mix-ngram", "--help")
    assert (run.code, run.err) == (0, "") and run.out.startswith("Usage: rescore mix-ngram ")
