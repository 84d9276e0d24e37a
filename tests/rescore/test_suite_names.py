"""Suites with names: one YAML file for several models; that of Vicuna's table runs with small ones in their place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import Command, refused, save_tiny_base, write_lines

from lattices.errors import InvalidDataError, RescoreError
from lm.base.model import BaseLM
from lm.heads.block_heads import BlockHeads
from lm.heads.nets import BlockHeadsConfig
from rescore.runs.evaluated import load_run
from rescore.suites.files import load_runs
from rescore.suites.plan import read_plan

SUITES = Path(__file__).parents[2] / "docs" / "suites"
CATEGORIES = {
    "writing": "mt_bench",
    "summarization": "summarization",
    "qa": "qa",
    "math_reasoning": "gsm8k",
    "rag": "rag",
}
SMALL = """\
names: {what: squad, many: 3, weight: 0.5}
tasks: ${what}
limit: ${many}
k: [4, 16]
rescorers:
  - name: ngram:${what}.arpa
    alpha: ${weight}
    k: 2
"""


@pytest.fixture
def medusa_heads(tiny_base: BaseLM, tmp_path: Path) -> Path:
    """Four random heads of Medusa's kind beside the base's own."""
    identity = tiny_base.identity
    config = BlockHeadsConfig(
        h=5, hidden_size=tiny_base.hidden_size, inner_size=1, vocab_size=tiny_base.vocab_size, architecture="medusa",
        base_name=identity.name, tokenizer_sha256=identity.tokenizer_sha256,
    )  # fmt: skip
    heads = BlockHeads(config)
    torch.manual_seed(0)
    for parameter in heads.net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    heads.save(tmp_path / "heads", dtype=torch.float32)
    return tmp_path / "heads"


def test_the_vicuna_suite_runs_with_small_models(
    rescore: Command, tiny_folder: Path, medusa_heads: Path, tmp_path: Path
):
    """The same file, with models of the same kinds in place of its own: by greedy acceptance the outputs are greedy
    decoding's, and nothing by typical acceptance stands without its mark and its scores."""
    rows = [
        {"question_id": i, "category": category, "turns": [f"{category} {i % 2} {i}?", "And then?"], "reference": ["7"]}
        for i, category in enumerate(category for category in CATEGORIES for _ in range(2))
    ]
    data = write_lines(tmp_path / "question.jsonl", rows)
    lm = save_tiny_base(tmp_path / "lm", seed=3, hidden_size=16)
    (tmp_path / "corpus.txt").write_text("".join(f"{row['turns'][0]}\n" for row in rows))
    build = ("build-ngram", tmp_path / "corpus.txt", "--tokenizer", tiny_folder, "--discount-fallback")
    assert rescore(*build, "--order", 3, "--out", tmp_path / "ngram").code == 0
    names = {
        "base": tiny_folder, "heads": medusa_heads, "rescorer": lm, "ngram": tmp_path / "ngram", "dtype": "float64",
        "vocabulary": 257, "examples": 1, "tokens": 8,
    }  # fmt: skip
    given = [part for name, value in names.items() for part in ("--with", f"{name}={value}")]
    ran = rescore("suite", SUITES / "vicuna.yaml", "--data", data, *given, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    runs = load_runs(tmp_path / "out")
    typical = " [lossy: typical:eps=0.09,alpha=0.3]"
    for mark in ("", typical):
        judged = [run for run in runs if run.config.lossy == bool(mark)]
        assert {task for run in judged for task in run.tasks} == set(CATEGORIES.values())
        for result in (result for run in judged for result in run.results):
            assert result.mark == mark and result.longest == 5 and 1 <= result.block_efficiency <= 5
            assert mark or result.identical.identical == result.identical.n == 1, "exact"
    mt_bench = load_run(tmp_path / "out" / "runs" / "mt_bench-h5").results
    tree = "medusa-tree:mc_sim_7b_63"
    assert [(r.rescorer, r.k, r.p) for r in mt_bench] == [
        ("none", 10, 1), (f"ngram:{tmp_path / 'ngram'}", 10, 1), (tree, 10, 42), ("oracle", 10, 1),
        ("none", 257, 1), (f"neural:{lm}", 257, 1), (f"{tree},scores=neural:{lm}", 257, 42),
    ]  # fmt: skip
    assert [r.alpha for r in mt_bench] == [None, 0.2, None, None, None, 1.0, 1.0]
    lossy = load_run(tmp_path / "out" / "runs" / "mt_bench-h5-typical-eps-0.09-alpha-0.3").results
    assert [(r.rescorer, r.k, r.p) for r in lossy] == [
        (r.rescorer + typical, r.k, r.p) for r in mt_bench if not r.is_oracle
    ]
    page = (tmp_path / "out" / "table.md").read_text()
    exact, rest = page.split("## LOSSY, typical:eps=0.09,alpha=0.3 acceptance: speed-up over greedy decoding")
    assert "## Speed-up over greedy decoding" in exact and "lossy" not in exact.split("##")[1]
    of_lossy = rest.split("##")[0]
    assert "| task | k | greedy tok/s | without drafts | none | quality |" in of_lossy
    assert len(re.findall(r"^\| gsm8k \| \d+ \|.* \d\.\d{3} final answer \|", of_lossy, re.M)) == 2
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["base"] == str(tiny_folder)
    assert "float64" in (tmp_path / "out" / "table.md").read_text()


class TestNames:
    def write(self, tmp_path: Path, *changes: tuple[str, str]) -> Path:
        text = SMALL
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "table.yaml").write_text(text)
        return tmp_path / "table.yaml"

    @pytest.fixture(autouse=True)
    def arpa(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("squad", "xsum"):
            text = "\\data\\\nngram 1=3\n\n\\1-grams:\n-1\t<unk>\n-1\t</s>\n-1\t5\n\n\\end\\\n"
            (tmp_path / f"{name}.arpa").write_text(text)

    def test_a_name_stands_for_its_value(self, tmp_path: Path):
        plan = read_plan(self.write(tmp_path))
        assert (plan.tasks[0].name, plan.limit, plan.k, plan.rescorers[0].name) == (
            "squad",
            3,
            (4, 16),
            "ngram:squad.arpa",
        )
        assert [(run.k, run.alpha) for run in plan.runs] == [(2, 0.5)]
        plan = read_plan(self.write(tmp_path), names={"what": "xsum", "many": "5"})
        assert (plan.tasks[0].name, plan.limit, plan.rescorers[0].name) == ("xsum", 5, "ngram:xsum.arpa")

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("limit: ${many}", "limit: ${man}", "line 3: ${man} stands for nothing; give it a value under names"),
            ("limit: ${many}", "limit: '${many}'", "line 3: limit: text ('3') stands where a whole number is needed"),
            ("limit: ${many}", "limit: ${what}", "line 3: limit: text ('squad') stands where a whole number"),
            ("many: 3", "many: [3]", "line 1: names.many: give a name of letters, digits and _ with one value"),
            ("names: {what", "name: {what", "line 2: ${what} stands for nothing"),
        ],
    )
    def test_what_makes_no_sense_is_refused_with_the_line(self, tmp_path: Path, old: str, new: str, message: str):
        path = self.write(tmp_path, (old, new))
        refused(lambda: read_plan(path), message, InvalidDataError)

    def test_a_name_that_is_not_there_is_refused(self, tmp_path: Path):
        path = self.write(tmp_path)
        refused(
            lambda: read_plan(path, names={"mani": "3"}), "no name 'mani' to be given a value; did you mean 'many'?"
        )
        refused(lambda: read_plan(SUITES / "ngrams.yaml", names={"base": "x"}), "it has no names", RescoreError)
