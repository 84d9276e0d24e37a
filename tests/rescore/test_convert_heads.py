"""Heads written in others' layouts: the same numbers after every way there and back, and what a layout can't hold."""

from __future__ import annotations

import itertools
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Command, make_heads, refused, save_tiny_base
from medusa_files import LAYOUTS, Theirs, made, mapped, write
from safetensors.torch import load_file, save_file
from test_learned_bigram_rescorer import folder as bigram  # noqa: F401

from lattices.errors import IncompatibleError
from lm.heads.block_heads import BlockHeads, lattice_of, load_heads, read_config
from lm.heads.nets import BlockHeadsConfig
from lm.neural.learned_bigram import load_bigram
from rescore.exports import vllm_heads
from rescore.exports.heads import convert_heads, narrowed
from rescore.exports.vllm_heads import RescoreHeads


def ours(base, folder: Path, *, dtype: torch.dtype = torch.float16, **changes) -> Path:
    """A checkpoint of random heads as `train-heads` writes it; medusa heads unless said otherwise."""
    settings = {
        "h": 4, "hidden_size": 32, "inner_size": 32, "vocab_size": 257, "base_name": base.identity.name,
        "tokenizer_sha256": base.identity.tokenizer_sha256, "architecture": "medusa",
    }  # fmt: skip
    torch.manual_seed(0)
    heads = BlockHeads(BlockHeadsConfig(**{**settings, **changes}))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    heads.save(folder, dtype=dtype)
    return folder


def write_unigrams(path: Path) -> np.ndarray:
    """A model that finds some tokens far more frequent than others; its log10 probabilities `[257]`."""
    log10p = -np.random.default_rng(0).uniform(0.1, 6, 257).round(3)
    log10p[256] = -5.0  # which is the end of a text
    words = ["-9\t<unk>", "0\t<s>", "-5.0\t</s>", *(f"{value}\t{token}" for token, value in enumerate(log10p[:256]))]
    path.write_text("\n".join(["\\data\\", f"ngram 1={len(words)}", "", "\\1-grams:", *words, "", "\\end\\", ""]))
    return log10p


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Of the only file of weights in a folder."""
    (file,) = [*folder.glob("*.safetensors"), *folder.glob("*.pt")]
    return torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)


def same_tensors(a: Path, b: Path) -> None:
    """The same names, types and bits."""
    a, b = map(tensors_in, (a, b))
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name


class TestOurs:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(
        ("to", "blocks"),
        [("medusa-vllm", 1), ("medusa-vllm", 3), ("medusa-tgi", 1), ("medusa-original", 1), ("rescore", 2)],
    )
    def test_there_and_back(self, tiny_base, tmp_path, dtype, to, blocks):
        base = tiny_base.identity.name
        mine = ours(tiny_base, tmp_path / "mine", dtype=dtype, blocks=blocks)
        convert_heads(mine, tmp_path / "theirs", to=to, base=base)
        convert_heads(tmp_path / "theirs", tmp_path / "again", to="rescore", base=base)
        same_tensors(mine, tmp_path / "again")
        assert read_config(tmp_path / "again") == read_config(mine)

    def test_what_vllm_reads(self, tiny_base, tmp_path):
        """Names, shapes and values as its loader takes them."""
        mine = ours(tiny_base, tmp_path / "mine", blocks=2)
        convert_heads(mine, tmp_path / "theirs", to="medusa-vllm", base=tiny_base.identity.name)
        tensors, own = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(mine / "model.safetensors")
        assert set(tensors) == {
            "lm_heads.0.weight",
            *(f"blocks.{i}.layers.{b}.{part}" for i in range(3) for b in range(2) for part in ("weight", "bias")),
        }
        assert torch.equal(tensors["blocks.2.layers.1.weight"], own["block.weight"][2, 1].T)
        assert torch.equal(tensors["blocks.1.layers.0.bias"], own["block.bias"][1, 0])
        assert torch.equal(tensors["lm_heads.0.weight"].double(), tiny_base.output_embeddings.weight)
        config = json.loads((tmp_path / "theirs" / "config.json").read_text())
        assert {name: config[name] for name in config if name != "base_model_name_or_path"} == {
            "architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": 32, "num_heads": 3,
            "num_hidden_layers": 2, "vocab_size": 257, "truncated_vocab_size": 257, "original_lm_head": True,
            "medusa_fc_bias": True, "logit_scale": 1.0, "torch_dtype": "float16",
        }  # fmt: skip

    def test_what_tgi_reads(self, tiny_base, tmp_path):
        mine = ours(tiny_base, tmp_path / "mine")
        convert_heads(mine, tmp_path / "theirs", to="medusa-tgi")
        tensors = load_file(tmp_path / "theirs" / "medusa_lm_head.safetensors")
        assert set(tensors) == {f"{i}.0.linear.{part}" for i in range(3) for part in ("weight", "bias")}
        config = json.loads((tmp_path / "theirs" / "config.json").read_text())
        assert (config["medusa_num_heads"], config["medusa_num_layers"], config["version"]) == (3, 1, "2")

    def test_what_the_original_reads(self, tiny_base, tmp_path):
        """Its loaders open `medusa_lm_head.pt` alone, and one of them leaves projections that are not there random."""
        base = tiny_base.identity.name
        mine = ours(tiny_base, tmp_path / "mine")
        converted = convert_heads(mine, tmp_path / "theirs", to="medusa-original", base=base)
        assert [file.name for file in sorted((tmp_path / "theirs").iterdir())] == ["config.json", "medusa_lm_head.pt"]
        tensors = tensors_in(tmp_path / "theirs")
        assert set(tensors) == {
            name for i in range(3) for name in (f"{i}.0.linear.weight", f"{i}.0.linear.bias", f"{i}.1.weight")
        }
        for i in range(3):
            assert torch.equal(tensors[f"{i}.1.weight"].double(), tiny_base.output_embeddings.weight)
        assert json.loads((tmp_path / "theirs" / "config.json").read_text()) == {
            "base_model_name_or_path": base, "medusa_num_heads": 3, "medusa_num_layers": 1,
        }  # fmt: skip
        assert converted.use == f"python -m medusa.inference.cli --model {tmp_path / 'theirs'}"
        assert "makes 5 heads" in converted.notices[-1]

    def test_the_base_is_found_from_any_folder(self, tiny_base, tiny_folder, tmp_path, monkeypatch):
        """A folder's name is written whole, a hub id as it is."""
        mine = ours(tiny_base, tmp_path / "mine")
        monkeypatch.chdir(tiny_folder.parent)
        converted = convert_heads(mine, tmp_path / "tgi", to="medusa-tgi", base=tiny_folder.name)
        config = json.loads((tmp_path / "tgi" / "config.json").read_text())
        assert Path(config["base_model_name_or_path"]) == tiny_folder.resolve()
        assert converted.use == f"text-generation-launcher --model-id {tmp_path / 'tgi'}"

    def test_int8_becomes_what_it_stands_for(self, tiny_base, tmp_path):
        mine = ours(tiny_base, tmp_path / "mine", dtype=torch.int8)
        convert_heads(mine, tmp_path / "theirs", to="medusa-tgi")
        a, b = (load_heads(tiny_base, str(tmp_path / name)).tensors() for name in ("mine", "theirs"))
        assert all(torch.equal(value, b[name]) for name, value in a.items())

    @pytest.mark.parametrize(
        ("changes", "to", "reason"),
        [
            ({"architecture": "feed_forward"}, "medusa-vllm", "second matrix each"),
            ({"architecture": "shared"}, "medusa-tgi", "second matrix each"),
            ({"architecture": "sequential", "token_size": 4}, "medusa-vllm", "see the tokens drafted before"),
            ({"token_size": 4}, "medusa-vllm", "token_size 4"),
            ({"token_size": 4}, "medusa-original", "token_size 4"),
            ({"blocks": 2}, "medusa-tgi", "2 blocks a head, not 1"),
            ({"blocks": 2}, "medusa-original", "repeats one block"),
        ],
    )
    def test_what_they_cannot_hold(self, tiny_base, tmp_path, rescore: Command, changes, to, reason):
        mine = ours(tiny_base, tmp_path / "mine", **changes)
        run = rescore("convert-heads", mine, tmp_path / "theirs", "--to", to, "--base", tiny_base.identity.name)
        run.refused(reason)
        assert not (tmp_path / "theirs").exists()

    def test_a_base_is_needed_for_its_projection(self, tiny_base, tmp_path):
        mine = ours(tiny_base, tmp_path / "mine")
        for to in ("medusa-vllm", "medusa-original", "vllm-plugin"):
            assert "give --base" in refused(lambda to=to: convert_heads(mine, tmp_path / "theirs", to=to))

    def test_another_base(self, tiny_base, tmp_path):
        mine = ours(tiny_base, tmp_path / "mine")
        other = save_tiny_base(tmp_path / "other", hidden_size=16)
        refused(lambda: convert_heads(mine, tmp_path / "x", to="medusa-vllm", base=str(other)), IncompatibleError)

    def test_a_folder_with_something_in_it(self, tiny_base, tmp_path):
        mine = ours(tiny_base, tmp_path / "mine")
        assert "give a new folder" in refused(lambda: convert_heads(mine, mine, to="medusa-tgi"))


THEIR_BASE = {"base_model_name_or_path": "someone/base"}


class TestTheirs:
    CASES = (
        ("medusa-1", "medusa-original", made(dtype=torch.bfloat16)),
        ("medusa-1", "medusa-tgi", made(layers=2)),
        ("medusa-1", "medusa-tgi", made(projections=0)),
        ("vllm", "medusa-vllm", made(layers=2, bias=False, dtype=torch.bfloat16)),
        ("vllm", "medusa-vllm", made(layers=2, projections=1)),
        ("vllm", "medusa-vllm", made(layers=0, bias=False)),
        ("vllm", "medusa-vllm", mapped(made(), [9, 4, 250])),
        ("vllm", "medusa-vllm", mapped(made(projections=1), [9, 4, 250])),
    )

    @pytest.mark.parametrize(("layout", "to", "theirs"), CASES, ids=range(len(CASES)))
    def test_there_and_back(self, tiny_base, tmp_path, layout: str, to, theirs: Theirs):
        config = {"vocab_size": 257, "num_hidden_layers": len(theirs.weights[0])} if layout == "vllm" else THEIR_BASE
        first = write(tmp_path / "theirs", theirs, layout, config=config)
        convert_heads(first, tmp_path / "mine", to="rescore")
        convert_heads(tmp_path / "mine", tmp_path / "again", to=to)
        same_tensors(first, tmp_path / "again")
        hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        said = (
            load_heads(tiny_base, str(tmp_path / "mine")).slots(tiny_base, hidden, tiny_base.project(hidden))[0].logits
        )
        expected = theirs.logits(hidden, tiny_base.output_embeddings.weight)
        torch.testing.assert_close(said[:, 1:], expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_of_every_layout_for_vllm(self, tiny_base, tmp_path, layout):
        theirs = made(layers=2)
        convert_heads(write(tmp_path / "theirs", theirs, layout), tmp_path / "vllm", to="medusa-vllm")
        same_tensors(write(tmp_path / "expected", theirs, "vllm"), tmp_path / "vllm")

    def test_heads_that_do_not_say_their_base(self, tmp_path):
        first = write(tmp_path / "theirs", made())
        converted = convert_heads(first, tmp_path / "vllm dir", to="medusa-vllm")
        assert converted.use.startswith('vllm serve MODEL --speculative-config \'{"method":"medusa","model":')
        assert "base_model_name_or_path" not in json.loads((tmp_path / "vllm dir" / "config.json").read_text())
        assert convert_heads(first, tmp_path / "mine", to="rescore").use.endswith(f"{tmp_path / 'mine'} --base MODEL")
        for to in ("medusa-tgi", "medusa-original"):
            assert "give --base" in refused(lambda to=to: convert_heads(first, tmp_path / "x", to=to))
            assert not (tmp_path / "x").exists()

    def test_repeated_blocks_for_the_original(self, tmp_path):
        theirs = made(layers=2)
        for weights, biases in zip(theirs.weights, theirs.biases, strict=True):
            weights[1], biases[1] = weights[0].clone(), biases[0].clone()
        first = write(tmp_path / "theirs", theirs, config=THEIR_BASE)
        assert any("2 blocks" in line for line in convert_heads(first, tmp_path / "x", to="medusa-original").notices)
        same_tensors(first, tmp_path / "x")

    @pytest.mark.parametrize(
        ("theirs", "to", "reason"),
        [(mapped(made(), [1]), "medusa-tgi", "no token map"), (mapped(made(), [1]), "medusa-original", "no token map")],
    )
    def test_what_they_cannot_hold(self, tmp_path, theirs, to, reason):
        first = write(tmp_path / "theirs", theirs, "vllm", config={"vocab_size": 257})
        assert reason in refused(lambda: convert_heads(first, tmp_path / "x", to=to), IncompatibleError)

    def test_16_bits_hold_what_was_read_from_16_bits(self):
        weight = torch.randn(7, 5)
        for dtype in (torch.bfloat16, torch.float16):
            assert narrowed(weight.to(dtype).float()).dtype == dtype
        assert narrowed(weight).dtype == torch.float32


def served(folder: Path, count: int | None = None) -> RescoreHeads:
    """The model as vLLM makes it: its configuration with as many heads as there are speculative tokens."""
    config = json.loads((folder / "config.json").read_text())
    if count is not None:
        config["num_heads"] = count
    draft = SimpleNamespace(hf_config=SimpleNamespace(**config))
    vllm_config = SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=draft))
    model = RescoreHeads(vllm_config=vllm_config)
    loaded = model.load_weights(iter(load_file(folder / "model.safetensors").items()))
    assert loaded == {name for name, _ in model.named_parameters()}
    return model


def proposed(model: RescoreHeads, states: torch.Tensor) -> torch.Tensor:
    """What vLLM's proposer makes of it: the arg-max of each head, `[n, heads]`."""
    return torch.stack([logits.argmax(dim=-1) for logits in model.compute_logits(model(states))], dim=1)


class TestPlugin:
    @pytest.mark.parametrize(
        "changes",
        [
            {"architecture": "feed_forward"}, {"architecture": "feed_forward", "token_size": 8},
            {"architecture": "shared"}, {"architecture": "sequential", "token_size": 8}, {"blocks": 2},
        ],
    )  # fmt: skip
    def test_it_proposes_what_the_heads_do(self, tiny_base, tmp_path, changes):
        mine = ours(tiny_base, tmp_path / "mine", dtype=torch.float32, **changes)
        convert_heads(mine, tmp_path / "served", to="vllm-plugin", base=tiny_base.identity.name)
        _, hidden = tiny_base.forward(torch.tensor([list(range(30))]))
        expected = load_heads(tiny_base, str(mine)).slots(tiny_base, hidden[0], tiny_base.project(hidden[0]))[0].logits
        tokens = proposed(served(tmp_path / "served"), hidden[0].float())
        assert torch.equal(tokens, expected[:, 1:].argmax(-1))
        assert torch.equal(proposed(served(tmp_path / "served", 2), hidden[0].float()), tokens[:, :2])
        assert proposed(served(tmp_path / "served"), hidden[0, :0].float()).shape == (0, 3)

    def test_an_ngram_chooses(self, tiny_base, tmp_path, monkeypatch):
        mine = ours(tiny_base, tmp_path / "mine", dtype=torch.float32, architecture="feed_forward")
        log10p = write_unigrams(tmp_path / "model.arpa")
        monkeypatch.chdir(tmp_path)
        how = {"to": "vllm-plugin", "base": tiny_base.identity.name, "rescorer": "ngram:model.arpa", "k": 257}
        convert_heads(mine, tmp_path / "served", **how)
        monkeypatch.chdir(Path(__file__).parent)
        _, hidden = tiny_base.forward(torch.tensor([list(range(30))]))
        heads = load_heads(tiny_base, str(mine))
        logits = heads.slots(tiny_base, hidden[0], tiny_base.project(hidden[0]))[0].logits
        tokens = proposed(served(tmp_path / "served"), hidden[0].float())
        lattice = lattice_of(logits.float(), 257)
        scores = np.zeros((30, 3, 257))  # by token: heads + 0.5 x ln(10) x log10 p, the best of each slot alone
        np.put_along_axis(scores, lattice.token_ids[:, 1:], lattice.logps[:, 1:], axis=-1)
        expected = (scores + 0.5 * np.log(10) * log10p).argmax(-1)
        np.testing.assert_array_equal(tokens.numpy(), expected)
        assert (expected != logits[:, 1:].argmax(-1).numpy()).mean() > 0.2

    def test_a_learned_bigram_chooses(self, tiny_base, tmp_path, bigram):  # noqa: F811
        mine, base = ours(tiny_base, tmp_path / "mine", dtype=torch.float32, token_size=8), tiny_base.identity.name
        convert_heads(mine, tmp_path / "served", to="vllm-plugin", base=base, rescorer=f"learned-bigram:{bigram}", k=5)
        _, hidden = tiny_base.forward(torch.tensor([list(range(30))]))
        heads = load_heads(tiny_base, str(mine))
        lattice = heads.lattice(tiny_base, hidden[0], tiny_base.project(hidden[0]), 5)
        model, embeddings = load_bigram(bigram), tiny_base.output_embeddings.weight
        left, right = embeddings @ model.left.double(), embeddings @ model.right.double()
        tokens = proposed(served(tmp_path / "served"), hidden[0].float())
        for place in range(30):
            paths = [(0, *rest) for rest in itertools.product(range(5), repeat=3)]
            scores = []
            for path in paths:
                ids = lattice.token_ids[place, range(4), path]
                of_pairs = sum(float(left[a] @ right[b]) for a, b in itertools.pairwise(ids))
                scores.append(lattice.logps[place, range(4), path].sum() + of_pairs)
            best = lattice.token_ids[place, range(4), paths[int(np.argmax(scores))]]
            assert tokens[place].tolist() == best[1:].tolist()

    @pytest.mark.parametrize("rescorer", ["context-ngram", "neural-32m", "oracle"])
    def test_what_needs_the_text_is_refused(self, tiny_base, tmp_path, rescore: Command, rescorer):
        mine, base = ours(tiny_base, tmp_path / "mine"), tiny_base.identity.name
        asked = ["convert-heads", mine, tmp_path / "x", "--base", base, "--rescorer", rescorer, "--to"]
        rescore(*asked, "vllm-plugin").refused("vLLM tells the heads no text")
        rescore(*asked, "medusa-vllm").refused("with --to vllm-plugin only")

    def test_more_tokens_than_heads(self, tiny_base, tmp_path):
        convert_heads(
            ours(tiny_base, tmp_path / "mine"), tmp_path / "served", to="vllm-plugin", base=tiny_base.identity.name
        )
        assert "these heads draft 3 tokens" in refused(lambda: served(tmp_path / "served", 4))

    def test_it_registers_by_name(self, monkeypatch):
        registered = {}
        vllm = types.ModuleType("vllm")
        vllm.ModelRegistry = SimpleNamespace(register_model=registered.__setitem__)
        monkeypatch.setitem(sys.modules, "vllm", vllm)
        vllm_heads.register()
        assert registered == {"RescoreHeads": "rescore.exports.vllm_heads:RescoreHeads"}


class TestCommand:
    def test_theirs_are_taken_everywhere(self, rescore: Command, tiny_base, tiny_folder, squad_file, tmp_path):
        """Four heads of one projection each, and the whole vocabulary in the lattice: a Medusa checkpoint's setting."""
        write(tmp_path / "theirs", made(heads=4), config={"medusa_num_heads": 2, "medusa_num_layers": 1})
        model = ["--base", tiny_folder, "--dtype", "float64", "--device", "cpu", "--max-new-tokens", 10]
        asked = [*model, "--data", squad_file, "--heads", tmp_path / "theirs", "--limit", 3, "--json"]
        write_unigrams(tmp_path / "model.arpa")
        named = f"none,context-ngram:{tmp_path / 'model.arpa'},oracle"
        rescorers = ["--rescorer", named, "--k", "257", "--p", "1,4"]
        replayed = rescore("eval", *asked, *rescorers)
        assert replayed.code == 0 and "medusa_num_heads = 2" in replayed.err and "was checked by" in replayed.err
        live = rescore("eval", *asked, *rescorers, "--mode", "live")
        assert live.code == 0
        for a, b in zip(replayed.document["results"], live.document["results"], strict=True):
            assert (a["h"], a["k"]) == (5, 257) and a["accepted_histogram"] == b["accepted_histogram"]
        assert replayed.document["results"][-1]["block_efficiency"] == 5, "every token is in the oracle's lattice"
        trace = rescore("trace", *asked[:-1], "--k", 257, "--out", tmp_path / "trace")
        assert trace.code == 0 and "h = 5, K = 257" in trace.out
        said = rescore("generate", *model, "--heads", tmp_path / "theirs", "--prompt", "a b", "--rescorer", "none")
        plain = rescore("generate", *model, "--prompt", "a b", "--rescorer", "lookup")
        assert said.code == plain.code == 0 and said.out == plain.out

    def test_convert_and_use(self, rescore: Command, tiny_base, tiny_folder, squad_file, tmp_path):
        write(tmp_path / "theirs", made(heads=2))
        run = rescore("convert-heads", tmp_path / "theirs", tmp_path / "mine", "--to", "rescore", "--base", tiny_folder)
        assert run.code == 0 and f"rescore eval --heads {tmp_path / 'mine'} --base {tiny_folder}" in run.out
        asked = ["--base", tiny_folder, "--data", squad_file, "--max-new-tokens", 8, "--limit", 2, "--json"]
        both = [rescore("eval", *asked, "--heads", tmp_path / name).document["results"] for name in ("theirs", "mine")]
        assert both[0] == both[1]

    @pytest.mark.parametrize(
        ("files", "said"),
        [
            ({}, "no block heads in"),
            ({"medusa_lm_head.pt": made(), "medusa_lm_head.safetensors": made()}, "give one of them"),
            ({"medusa_lm_head.pt": made(d=16)}, "hidden_size is 16, the base's is 32"),
            ({"medusa_lm_head.safetensors": made(vocabulary=300)}, "vocab_size is 300"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, rescore: Command, tiny_folder, squad_file, tmp_path, files, said):
        (tmp_path / "theirs").mkdir()
        for name, theirs in files.items():
            write(tmp_path / "theirs", theirs, file=name)
        for command in (["eval", "--data", squad_file], ["generate", "--prompt", "a"]):
            rescore(*command, "--base", tiny_folder, "--heads", tmp_path / "theirs").refused(said)

    def test_a_pickle_with_code_is_one_line(self, rescore: Command, tiny_folder, tmp_path):
        (tmp_path / "medusa_lm_head.pt").write_bytes(b"cos\nsystem\n(S'echo run'\ntR.")
        rescore("eval", "--base", tiny_folder, "--heads", tmp_path).refused("more than tensors|can't read")


def test_theirs_are_no_start_for_training(rescore: Command, tiny_base, tiny_folder, tmp_path):
    write(tmp_path / "theirs", made(heads=2))
    (tmp_path / "text.txt").write_text("In the beginning there was some text.\n" * 40)
    run = rescore(
        "train-heads", "--base", tiny_folder, "--corpus", tmp_path / "text.txt", "--out", tmp_path / "out", "--initial",
        tmp_path / "theirs", "--architecture", "medusa", "--token-size", 0, "--h", 3,
    )  # fmt: skip
    assert run.code == 2 and "projections of their own" in run.err.splitlines()[-1]


def test_heads_that_see_tokens_are_unchanged(tiny_base, tmp_path):
    """`make_heads`'s own kind, there and back through our layout."""
    make_heads(tiny_base).save(tmp_path / "mine")
    convert_heads(tmp_path / "mine", tmp_path / "again", to="rescore")
    same_tensors(tmp_path / "mine", tmp_path / "again")
    assert read_config(tmp_path / "mine") == read_config(tmp_path / "again")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    refused(lambda: convert_heads(tmp_path / "x.safetensors", tmp_path / "y", to="rescore"))
