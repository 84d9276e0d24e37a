"""The cost model: a toy model worked out by hand, and parameters as transformers has them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import save_tiny_base
from evaluating import evaluated
from made_records import made_latency, made_result
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, UnknownNameError
from lm.heads.block_heads import BlockHeads
from lm.heads.nets import BlockHeadsConfig
from lm.neural.model import find_neural
from rescore.reports.charts.cost_charts import cost_model_section
from rescore.reports.sources import trace_command
from rescore.runs.evaluated import Evaluation, load_run
from rescore.studies.cost.decoders import (
    _layers,
    decoder_of,
    decoder_of_config,
    decoder_of_file,
    dense_decoder,
    heads_of,
    neural_for,
    paper_base,
)
from rescore.studies.cost.inputs import cost_inputs
from rescore.studies.cost.model import BYTES, METHODS, HeadsShape, block_efficiencies, cost_table, heads_parameters
from rescore.studies.tables import cost_table as cost_text

# Toy base: 2 layers, d = 4, 2 heads of 2, 1 KV head, feed-forward 8 (not gated), 10 tokens, tied.
#   layer: q 4 x 4, k 4 x 2, v 4 x 2, o 4 x 4 = 48; feed-forward 2 x 4 x 8 = 64; norms 8: 120. W = 240 + 4 + V 40 = 284.
#   cache: 2 layers x 2 x 1 x 2 = 8 numbers a token; attention: 2 layers x 4 x 2 x 2 = 32 FLOPs a token and cached one.
TOY = dense_decoder(
    "toy", layers=2, hidden_size=4, heads=2, kv_heads=1, head_size=2, inner_size=8, gated=False, vocab_size=10
)
# Small LM: 1 layer, d = 2, 1 head of 2, feed-forward 4 gated, 10 tokens.
#   layer: 4 x 4 = 16; 3 x 2 x 4 = 24; norms 4: 44. W' = 44 + 2 + 20 = 66. Cache 4 a token; attention 8.
SMALL = dense_decoder(
    "small", layers=1, hidden_size=2, heads=1, kv_heads=1, head_size=2, inner_size=4, gated=True, vocab_size=10
)
HEADS = HeadsShape(50)
GIVEN = {"unrescored": 1.25, "4-gram": 1.5, "neural-61m": 2.0, "16-best 0-gram": 1.6}


def toy_costs(**options):
    arguments = {"h": 3, "heads": HEADS, "neural": SMALL, "block_efficiency": GIVEN, "contexts": (100,)}
    found = cost_table(TOY, **{**arguments, **options})
    return {cost.method: cost for cost in found.costs}


class TestToy:
    def test_shapes(self):
        assert (TOY.read_parameters, TOY.parameters, TOY.projection_parameters) == (284, 284, 40)
        assert (TOY.cached_numbers(100), TOY.attention_flops(100)) == (800, 3200)
        assert (SMALL.read_parameters, SMALL.cached_numbers(100), SMALL.attention_flops(100)) == (66, 400, 800)

    def test_autoregressive(self):
        cost = toy_costs()["autoregressive"]
        # 2 bytes: 284 x 2, 800 x 2; 2 x 284 + 3200.
        assert (cost.weight_bytes, cost.kv_bytes, cost.flops) == (568, 1600, 3768)
        assert cost.weight_bytes_change == cost.kv_bytes_change == cost.flops_change == 0

    def test_unrescored(self):
        cost = toy_costs()["unrescored"]
        # Step: weights 284 + 50 + 40 = 374; cache 800; FLOPs 3 x 3768 + 2 x (50 + 2 x 40) = 11304 + 260.
        assert (cost.step_weight_bytes, cost.step_kv_bytes, cost.step_flops) == (748, 1600, 11564)
        assert cost.weight_bytes == pytest.approx(748 / 1.25) and cost.kv_bytes == pytest.approx(1280)
        assert cost.kv_bytes_change == pytest.approx(-0.2) and cost.flops_change == pytest.approx(
            11564 / 1.25 / 3768 - 1
        )

    def test_an_n_gram_costs_nothing_but_gains(self):
        found = toy_costs()
        assert found["4-gram"].step_flops == found["unrescored"].step_flops
        assert found["4-gram"].kv_bytes_change == pytest.approx(1 / 1.5 - 1)

    def test_a_small_lm_is_called_for_every_slot_behind_the_first(self):
        cost = toy_costs()["neural-61m"]
        # h - 1 = 2 calls: weights 374 + 2 x 66 = 506; cache 800 + 2 x 400; FLOPs 11564 + 2 x (132 + 800) = 13428.
        assert (cost.step_weight_bytes, cost.step_kv_bytes, cost.step_flops) == (1012, 3200, 13428)
        assert cost.weight_bytes == 506

    def test_16_drafts_as_tree_and_batch(self):
        # Tree: 1 + 16 x 2 = 33 tokens, cache read once; batch: 48 tokens, 16 copies.
        tree, batch = (toy_costs(verify=way)["16-best 0-gram"] for way in ("tree", "batch"))
        assert (tree.step_flops, tree.step_kv_bytes) == (33 * 3768 + 260, 1600)
        assert (batch.step_flops, batch.step_kv_bytes) == (48 * 3768 + 260, 25600)
        assert tree.step_weight_bytes == batch.step_weight_bytes == 748

    def test_sequential_heads_read_the_projection_each(self):
        # h = 3: two calls behind one another. Weights 284 + 50 + 2 x 40 = 414; cache and FLOPs as before.
        cost = toy_costs(heads=HeadsShape(50, 2))["unrescored"]
        assert (cost.step_weight_bytes, cost.step_kv_bytes, cost.step_flops) == (828, 1600, 11564)
        found = cost_table(TOY, h=3, heads=HeadsShape(50, 2), neural=None, block_efficiency=GIVEN)
        assert "projection read 2 times" in cost_text(found).text()

    def test_what_is_not_known_shows_the_step_only(self):
        cost = toy_costs()["16-best 4-gram"]
        assert cost.block_efficiency is None and cost.weight_bytes is None and cost.step_weight_bytes == 748

    def test_precision_and_context(self):
        half, full = toy_costs(), toy_costs(dtype="float32")
        for name, cost in half.items():
            assert (
                full[name].step_weight_bytes == 2 * cost.step_weight_bytes and full[name].step_flops == cost.step_flops
            )
        longer = toy_costs(contexts=(200,))["autoregressive"]
        assert (longer.weight_bytes, longer.kv_bytes, longer.flops) == (568, 3200, 568 + 6400)
        assert BYTES["float16"] == 2

    def test_the_text_has_every_row(self):
        found = cost_table(TOY, h=3, heads=HEADS, neural=None, block_efficiency=GIVEN)
        json.dumps(found.as_dict(), allow_nan=False)
        assert len(found.costs) == 4 * len([m for m in METHODS if not m.neural and not m.ours])
        text = cost_text(found).text()
        assert "16-best 4-gram" in text and "neural-61m" not in text and "ASSUMED" not in text
        large = cost_table(TOY, h=3, heads=HEADS, neural=None, block_efficiency=GIVEN, contexts=(1_048_576,))
        assert "  1,048,576  " in cost_text(large).text(), "all digits"

    def test_the_ngrams_of_the_prompt_cost_what_an_ngram_does_and_stand_where_they_were_run(self):
        assert "context n-gram" not in toy_costs()
        results = [made_result(task="t", rescorer="context-ngram", block_efficiency=1.5)]
        given = {"4-gram": 1.5} | block_efficiencies(results, "t")
        found = toy_costs(block_efficiency=given)
        ours, theirs = found["context n-gram"], found["4-gram"]
        assert dataclasses.replace(ours, method="4-gram") == theirs and "16-best context n-gram" not in found


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"h": 1}, "at least 2 tokens"),
            ({"contexts": (0,)}, "at least 1"),
            ({"block_efficiency": {"unrescored": 3.5}}, "between 1 and h = 3"),
            ({"block_efficiency": {"unrescord": 1.5}}, "did you mean unrescored"),
            ({"dtype": "float8"}, "unknown dtype"),
            ({"verify": "trees"}, "did you mean tree"),
        ],
    )
    def test_one_line_says_what(self, options, message):
        with pytest.raises(RescoreError, match=message):
            toy_costs(**options)

    def test_a_small_lm_over_other_tokens(self):
        other = dense_decoder(
            "other", layers=1, hidden_size=2, heads=1, kv_heads=1, head_size=2, inner_size=4, gated=True, vocab_size=11
        )
        with pytest.raises(IncompatibleError, match="reads the base's"):
            toy_costs(neural=other)


class TestDecoders:
    def test_the_small_lm_shipped_for_a_base_has_nine_of_its_layers(self, monkeypatch):
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
        config = LlamaConfig(vocab_size=49152, num_hidden_layers=30, tie_word_embeddings=True, **shape)
        monkeypatch.setattr("lm.base.catalog.read_model_config", lambda name, **options: config)
        base = decoder_of("smollm2-135m")
        found = neural_for(base)
        # 21 of 30 layers less: 576 x (576 x 2 + 192 x 2) + 3 x 576 x 1536 + 2 x 576 = 3,540,096 each.
        assert base.parameters == 134_515_008 and found.layers == base.layers[:9]
        assert found.parameters == base.parameters - 21 * 3_540_096

    @pytest.mark.parametrize(("same", "layers"), [(True, 9), (False, 6)])
    def test_the_shipped_small_lm_serves_copies_and_tuned_kin_of_its_base(self, monkeypatch, same, layers):
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
        config = LlamaConfig(vocab_size=49152, num_hidden_layers=30, tie_word_embeddings=True, **shape)
        made_for = find_neural("neural-61m").delta
        identity = SimpleNamespace(
            name="models/copy", tokenizer_sha256=made_for.tokenizer_sha256,
            weights_sha256=made_for.base_weights_sha256 if same else "other",
        )  # fmt: skip
        monkeypatch.setattr("lm.base.catalog.read_model_config", lambda name, **options: config)
        monkeypatch.setattr("lm.base.catalog.resolve_base", lambda name, **options: None)
        monkeypatch.setattr("lm.base.catalog.identify", lambda name, **options: identity)
        monkeypatch.setattr("lm.neural.model.under_adapter", lambda name: None)
        assert len(neural_for(decoder_of("models/copy")).layers) == layers

    def test_the_paper_s_base_is_marked(self):
        base = paper_base()
        assert base.parameters == pytest.approx(1.5e9, rel=0.02) and "not public" in base.assumption
        small = neural_for(base)
        assert small.parameters == pytest.approx(61e6, rel=0.01) and small.assumption
        found = cost_table(base, heads=heads_of(base, None, 9), neural=small, block_efficiency={})
        assert cost_text(found).text().count("ASSUMED") == 2

    def test_what_the_paper_says_of_its_models_is_not_assumed(self):
        base = paper_base()
        small = neural_for(base)
        assert base.vocab_size == small.vocab_size == 50_257
        assert base.projection_parameters == 50_257 * 2048
        assert {layer.heads for layer in small.layers} == {12}
        # Learned positions: a table of 2,048 rows, of which a token reads one.
        assert base.parameters - base.read_parameters == 2048 * 2048
        assert small.parameters - small.read_parameters == 2048 * 768
        for facts, assumed in (
            (("50,257 tokens", "learned positions"), base.assumption),
            (("12 heads", "learned positions"), small.assumption),
        ):
            known, _, guessed = assumed.partition("are the paper's")
            assert all(fact in known and fact not in guessed for fact in facts)

    def test_a_llama_as_the_formula_has_it(self):
        config = LlamaConfig(
            vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=2, tie_word_embeddings=True,
        )  # fmt: skip
        found = decoder_of_config(config, name="toy")
        by_hand = dense_decoder(
            "toy", layers=2, hidden_size=4, heads=2, kv_heads=1, head_size=2, inner_size=8, gated=True, vocab_size=10
        )
        assert found == by_hand
        assert found.parameters == sum(p.numel() for p in LlamaForCausalLM(config).parameters())
        config.tie_word_embeddings = False
        untied = decoder_of_config(config, name="toy")
        assert untied.read_parameters == found.read_parameters and untied.parameters == found.parameters + 40

    def test_learned_positions_are_rows_and_windows_end_the_cache(self):
        gpt = AutoConfig.for_model("gpt2", n_embd=4, n_layer=1, n_head=2, vocab_size=10, n_positions=16)
        found = decoder_of_config(gpt, name="gpt")
        # q, k, v, o with biases 4 x 16 + 16, feed-forward 2 x 4 x 16 + 16 + 4, three norms of 8; the projection 40.
        assert found.read_parameters == 80 + 148 + 24 + 40 and found.parameters == found.read_parameters + 16 * 4
        mistral = AutoConfig.for_model(
            "mistral", hidden_size=4, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=8, vocab_size=10, sliding_window=64, head_dim=2,
        )  # fmt: skip
        found = decoder_of_config(mistral, name="mistral")
        assert found.cached_numbers(32) == 4 * 32 and found.cached_numbers(1000) == 4 * 64
        assert found.attention_flops(1000) == 4 * 4 * 64

    def test_models_it_says_nothing_about(self):
        experts = AutoConfig.for_model("mixtral", num_local_experts=4)
        with pytest.raises(IncompatibleError, match="has experts"):
            decoder_of_config(experts, name="mixtral")
        with pytest.raises(IncompatibleError, match="no causal LM"):
            decoder_of_config(AutoConfig.for_model("vit"), name="vit")

    def test_attention_of_names_of_its_own(self):
        with pytest.raises(IncompatibleError, match="other has attention that can't be counted"):
            _layers(SimpleNamespace(hidden_size=4, num_hidden_layers=1), "other")

    @pytest.mark.parametrize("kind", ["rwkv", "mamba", "recurrent_gemma"])
    def test_recurrent_layers_are_refused(self, kind):
        small = {"num_hidden_layers": 3, "hidden_size": 64, "vocab_size": 10}
        with pytest.raises(IncompatibleError, match="can't forget"):
            decoder_of_config(AutoConfig.for_model(kind, **small), name=kind)

    def test_encoders_are_refused(self):
        small = {"num_hidden_layers": 1, "hidden_size": 4, "num_attention_heads": 2, "vocab_size": 10}
        small["intermediate_size"] = 8
        for kind in ("bert", "bert-generation", "bart"):
            with pytest.raises(IncompatibleError, match="no causal LM"):
                decoder_of_config(AutoConfig.for_model(kind, **small), name=kind)
        assert decoder_of_config(AutoConfig.for_model("bert", is_decoder=True, **small), name="bert").vocab_size == 10
        assert decoder_of_config(AutoConfig.for_model("gpt_neox", **small), name="neox").vocab_size == 10

    def test_a_configuration_file(self, tiny_folder: Path, tmp_path: Path):
        found = decoder_of_file(tiny_folder / "config.json")
        assert found.layers == decoder_of(str(tiny_folder)).layers and found.hidden_size == 32
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(InvalidDataError, match="no model_type"):
            decoder_of_file(tmp_path / "config.json")
        fields = json.loads((tiny_folder / "config.json").read_text())
        for wrong in ({"model_type": "nothing-like-it"}, {"vocab_size": [None]}, {"intermediate_size": []}):
            (tmp_path / "config.json").write_text(json.dumps(fields | wrong))
            with pytest.raises(InvalidDataError, match="no configuration that transformers knows"):
                decoder_of_file(tmp_path / "config.json")
        with pytest.raises(RescoreError, match="no configuration in"):
            decoder_of_file(tmp_path / "absent.json")

    def test_heads(self, tiny_folder: Path, tiny_heads_folder: Path):
        # Heads 2..3 with d = 4 and a hidden layer of 5: 2 x (4 x 5 + 5 + 5 x 4 + 4) = 98.
        assert heads_parameters(3, 4) == 2 * (16 + 4 + 16 + 4)
        base = decoder_of(str(tiny_folder))
        # Three heads, d = 32, inner 16, token size 8: 3 x (32 x 16 + 16 + 16 x 32 + 32 + 8 x 16) + 32 x 8.
        assert heads_of(base, tiny_heads_folder, 4) == HeadsShape(3 * (512 + 16 + 512 + 32 + 128) + 256)
        assert heads_of(base, tiny_heads_folder, 2) == HeadsShape(1200 + 256)
        assert heads_of(base, None, 3) == HeadsShape(heads_parameters(3, 32))
        with pytest.raises(RescoreError, match="choose h from 2 to 4"):
            heads_of(base, tiny_heads_folder, 5)
        with pytest.raises(IncompatibleError, match="hidden size of 32"):
            heads_of(TOY, tiny_heads_folder, 3)

    def test_sequential_heads(self, tiny_base, tiny_folder: Path, tmp_path: Path):
        config = BlockHeadsConfig(
            h=4, hidden_size=32, inner_size=16, vocab_size=257, base_name="tiny", tokenizer_sha256="0",
            architecture="sequential", token_size=8,
        )  # fmt: skip
        BlockHeads(config).save(tmp_path)
        # Three heads, d = 32, inner 16; tokens seen 1 + 2 + 3, each 8 x 16; 32 x 8 shared.
        shape = heads_of(decoder_of(str(tiny_folder)), tmp_path, 4)
        assert shape == HeadsShape(3 * (512 + 16 + 512 + 32) + 6 * 128 + 256, projection_reads=3)
        assert heads_of(decoder_of(str(tiny_folder)), tmp_path, 2).projection_reads == 1

    def test_a_tuned_base_has_heads_of_its_own(self, tiny_folder: Path, tiny_heads_folder: Path, tmp_path: Path):
        tuned = tmp_path / "tuned"
        shutil.copytree(tiny_folder, tuned)
        shutil.copytree(tiny_heads_folder, tuned / "heads")
        assert heads_of(decoder_of(str(tuned)), None, 4) == HeadsShape(heads_parameters(4, 32))
        (tuned / "tuned.json").write_text("{}")
        assert heads_of(decoder_of(str(tuned)), None, 4) == heads_of(decoder_of(str(tuned)), tiny_heads_folder, 4)


def test_block_efficiencies_of_results():
    results = [
        made_result(task=task, rescorer=rescorer, p=p, block_efficiency=value)
        for task, rescorer, p, value in [
            ("squad", "none", 1, 1.2), ("squad", "none", 16, 1.4), ("squad", "ngram", 1, 1.3), ("xsum", "none", 1, 9.0),
            ("squad", "oracle", 1, 2.0), ("squad", "ngram", 4, 1.35),
        ]
    ]  # fmt: skip
    assert block_efficiencies(results, "squad") == {"unrescored": 1.2, "16-best 0-gram": 1.4, "4-gram": 1.3}
    with pytest.raises(UnknownNameError):
        cost_table(TOY, heads=HEADS, neural=None, block_efficiency={"oracle": 2.0})


@pytest.fixture
def run(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path, tmp_path: Path) -> Evaluation:
    """A finished run with the first three heads, and one and two drafts a step."""
    options = dict(
        base=str(tiny_folder), heads=str(tiny_heads_folder), data=str(squad_file), device="cpu", h=3, k=4, p=(1, 16),
        max_new_tokens=6, limit=2,
    )  # fmt: skip
    evaluated(options, out=tmp_path / "run")
    return load_run(tmp_path / "run")


def changed(run: Evaluation, *, settings: dict | None = None, **options) -> Evaluation:
    """The run with other settings of its trace, other inputs, or decoded in another way."""
    traces = {"squad": {**run.config.traces["squad"], **(settings or {})}}
    how = {name: options.pop(name) for name in ("mode", "verify") if name in options}
    inputs = {"squad": dataclasses.replace(run.config.inputs["squad"], **options)}
    config = dataclasses.replace(run.config, inputs=inputs, traces=traces, **how)
    return dataclasses.replace(run, document=dataclasses.replace(run.document, config=config))


class TestInputs:
    def test_by_hand(self, tiny_folder: Path):
        found = cost_inputs(base=str(tiny_folder), block_efficiency={"4-gram": 1.5})
        assert (found.h, found.verify, found.block_efficiency) == (9, "tree", {"4-gram": 1.5})

    def test_of_a_run(self, run, tiny_folder: Path, tiny_heads_folder: Path):
        found = cost_inputs(run, block_efficiency={"4-gram": 1.5})
        base = decoder_of(str(tiny_folder))
        assert (found.base, found.h, found.verify) == (base, 3, "tree")
        assert found.heads == heads_of(base, tiny_heads_folder, 3)
        assert found.block_efficiency == {**block_efficiencies(run.results, "squad"), "4-gram": 1.5}
        assert cost_inputs(run, "squad", config=tiny_folder / "config.json", h=3).heads == found.heads

    def test_what_is_not_the_run_s_is_refused(self, run, tiny_folder: Path, tiny_heads_folder: Path, tmp_path: Path):
        other = save_tiny_base(tmp_path / "other", seed=1)
        wide = save_tiny_base(tmp_path / "wide", hidden_size=64)
        same = tmp_path / "same"
        shutil.copytree(tiny_folder, same)
        heads = tmp_path / "heads"
        shutil.copytree(tiny_heads_folder, heads)
        assert cost_inputs(run, base=str(same), heads=heads).heads == cost_inputs(run).heads
        (heads / "model.safetensors").write_bytes(b"other")
        for given, message in (
            ({"h": 4}, "decoded blocks of 3"),
            ({"base": str(other)}, "was decoded with"),
            ({"base": "paper-1.5b"}, "was decoded with"),
            ({"config": wide / "config.json"}, "hidden_size 64"),
            ({"heads": heads}, "are not those of"),
        ):
            with pytest.raises(IncompatibleError, match=message):
                cost_inputs(run, **given)

    def test_what_a_run_does_not_say(self, run, tiny_folder: Path):
        with pytest.raises(RescoreError, match="where its heads lie"):  # a run of a given trace
            cost_inputs(changed(run, heads=None))
        for base in (None, "a name", {"name": 5}):  # what other programs wrote
            elsewhere = changed(run, heads=None, settings={"base": base, "heads_sha256": None, "recorded_by": "them"})
            with pytest.raises(RescoreError, match="what its base LM is"):
                cost_inputs(elsewhere)
            assert trace_command(elsewhere, "squad").startswith("rescore trace --task squad --")
        assert cost_inputs(elsewhere, base=str(tiny_folder)).heads == HeadsShape(heads_parameters(3, 32))

    def test_verified_as_the_live_run_was(self, run):
        assert cost_inputs(changed(run, verify="batch")).verify == "tree"  # a replay
        live = changed(run, mode="live", verify="batch")
        assert cost_inputs(live).verify == "batch" and cost_inputs(live, verify="tree").verify == "tree"
        # The base took no tree mask, so several drafts became a batch.
        times = made_latency()
        results = [
            dataclasses.replace(r, latency=dataclasses.replace(times, verify="tree" if r.p == 1 else "batch"))
            for r in run.results
        ]
        fell_back = changed(run, mode="live")
        document = dataclasses.replace(fell_back.document, results=results)
        fell_back = dataclasses.replace(fell_back, document=document)
        assert cost_inputs(fell_back).verify == "batch"


def test_the_report_s_drafts_are_verified_as_the_run_s(run):
    def of(found: Evaluation) -> tuple[str, ...]:
        base = found.config.traces["squad"]["base"]
        view = SimpleNamespace(label="squad", task="squad", run=found, base=base)
        section = cost_model_section([view])
        return next(tuple(row) for row in section.rows if tuple(row[1:4]) == ("16-best 0-gram", 16, 512))

    assert of(changed(run, mode="live", verify="batch"))[6] != of(run)[6]  # the KV cache of 16 rows
