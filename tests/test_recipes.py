"""What the recipes of Stern et al.'s experiments make of results."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from conftest import byte_tokenizer, write_lines

# torch's own, at the import of what it compiles by.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs" / "recipes"))


@pytest.mark.parametrize("ids", [("a", "b"), (None, None)])
def test_bleu_is_of_outputs_beside_their_references(ids: tuple[str | None, ...], tmp_path: Path):
    """By the ids of the data, or where they have none by their lines."""
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.save_pretrained(tmp_path / "base")
    texts = ["Zwei Hunde laufen im Schnee.", "Ein Mann steht am Haus und liest."]
    rows = [{"source": text.upper(), "reference": text} for text in texts]
    named = [{"id": identity} | row if identity else row for identity, row in zip(ids, rows, strict=True)]
    write_lines(tmp_path / "multi30k_test.jsonl", named)
    (tmp_path / "results").mkdir()
    lines = [
        {"id": identity or str(place), "rescorer": rescorer, "output_ids": tokenizer.encode(text)}
        for place, (identity, text) in enumerate(zip(ids, texts, strict=True), start=1)
        for rescorer, text in (("none [lossy: top-k:2]", text), ("oracle", "Unsinn"))
    ]
    write_lines(tmp_path / "results" / "examples.jsonl", lines[::-1])
    bleu_of = import_module("stern_translation").bleu_of
    assert bleu_of(tmp_path / "results", tmp_path / "base", tmp_path) == pytest.approx(100)


def test_results_are_told_by_rescorers_without_models_and_rules(tmp_path: Path):
    names = ["none", "context-ngram:/out/ngram", "ngram:/out/ngram", "oracle"]
    results = [{"rescorer": name, "block_efficiency": 1.0 + place} for place, name in enumerate(names)]
    write_lines(tmp_path / "results.json", [{"results": results}])
    found = import_module("stern").results_of(tmp_path)
    assert {name: each["block_efficiency"] for name, each in found.items()} == {
        "none": 1.0, "context-ngram": 2.0, "ngram": 3.0, "oracle": 4.0,
    }  # fmt: skip
