"""A base LM of ten tokens, all that can draft for it, and every way of drafting; weights are random."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lattices.automaton import Automaton
from lattices.joined.candidates import WEIGHTS
from lattices.ngrams import SPECIAL_WORDS, NgramArrays, NgramModel
from lm.base.catalog import load_base
from lm.base.model import BaseLM
from lm.checkpoint import write_checkpoint
from lm.draft_vocabulary import DraftVocabulary
from lm.files import write_json
from lm.heads.block_heads import BlockHeads
from lm.heads.nets import BlockHeadsConfig
from lm.lookup_index import LookupOptions, build_lookup
from lm.neural.learned_bigram import BigramConfig
from lm.records import plain
from rescore.costs.table import Costs, HeadsCost, Machine
from rescore.drafters import load_drafter
from rescore.rescorers import load_rescorer
from rescore.rescorers.joint_weights import JointFit, write_weights
from rescore.runs.run import Run

LETTERS, END = "abcdefghi", "|"
PROMPT = [LETTERS.index(letter) for letter in "abcabdabceabfab"]
K, H = 4, 4


@dataclass(frozen=True)
class Tiny:
    """A base with its heads, and the places of the other models beside it."""

    base: BaseLM
    heads: BlockHeads
    folder: Path

    def at(self, name: str) -> Path:
        return self.folder / name


def make_tiny(folder: Path) -> Tiny:
    """Models with random weights over ten tokens, in float64."""
    _save_model(folder / "base", seed=0, hidden_size=32)
    _save_model(folder / "small", seed=7, hidden_size=16)
    base = load_base(str(folder / "base"), dtype="float64", device="cpu")
    tiny, identity = Tiny(base, _heads_of(base), folder), base.identity
    vocabulary = base.vocab_size
    words = (*SPECIAL_WORDS, *map(str, range(vocabulary)))
    random, v = np.random.default_rng(0), len(words)
    pairs = np.argwhere(random.random((v, v)) < 0.4).astype(np.int32)
    pairs = pairs[(pairs >= len(SPECIAL_WORDS)).all(axis=1)]
    unigrams = NgramArrays(np.arange(v, dtype=np.int32)[:, None], *-random.uniform(0.5, 2, (2, v)).astype(np.float32))
    bigrams = NgramArrays(
        pairs, -random.uniform(0, 1, len(pairs)).astype(np.float32), np.zeros(len(pairs), dtype=np.float32)
    )
    tiny.at("ngram").mkdir()
    Automaton.compile(NgramModel(words, (unigrams, bigrams))).save(tiny.at("ngram") / "automaton.bin")
    write_json(tiny.at("ngram") / "manifest.json", {"tokenizer_sha256": identity.tokenizer_sha256})
    of_pairs = BigramConfig(
        hidden_size=base.hidden_size, rank=4, base_name=identity.name, base_weights_sha256=identity.weights_sha256,
        tokenizer_sha256=identity.tokenizer_sha256,
    )  # fmt: skip
    tiny.at("bigram").mkdir()
    write_checkpoint(
        tiny.at("bigram"), {side: torch.randn(base.hidden_size, 4) for side in ("left", "right")}, of_pairs
    )
    (folder / "corpus.txt").write_text("abcab\nbcadab\nabfghabce\n")
    build_lookup([folder / "corpus.txt"], tiny.at("corpus"), LookupOptions(tokenizer=str(folder / "base")))
    ranking = DraftVocabulary(
        version="0", tokenizer=identity.name, tokenizer_sha256=identity.tokenizer_sha256, vocab_size=vocabulary,
        corpora=(), tokens=vocabulary, token_ids=random.permutation(vocabulary).tolist(), counts=[1] * vocabulary,
    )  # fmt: skip
    write_json(folder / "ranking.json", plain(ranking))
    write_json(folder / "choices.json", [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [1, 0, 2]])
    _save_eagle(tiny.at("eagle"), vocabulary, base.hidden_size)
    _save_joint(tiny, random)
    return tiny


def _save_model(folder: Path, *, seed: int, hidden_size: int) -> None:
    tokenizer = Tokenizer(BPE(vocab={letter: place for place, letter in enumerate(LETTERS)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(LETTERS) + 1, hidden_size=hidden_size, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.25,
        tie_word_embeddings=True, eos_token_id=len(LETTERS), bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def _heads_of(base: BaseLM) -> BlockHeads:
    """Heads that have learned a little from sampled text, so that more than a few of their tokens are accepted."""
    config = BlockHeadsConfig(
        h=H, hidden_size=base.hidden_size, inner_size=32, vocab_size=base.vocab_size, base_name=base.identity.name,
        tokenizer_sha256=base.identity.tokenizer_sha256, token_size=8,
    )  # fmt: skip
    torch.manual_seed(1)
    heads = BlockHeads(config).to(base.heads_dtype)
    prompts = torch.tensor([PROMPT]).expand(200, -1)
    mask = torch.ones_like(prompts)
    text = base.model.generate(prompts, attention_mask=mask, do_sample=True, max_new_tokens=8, pad_token_id=0)
    start, end = len(PROMPT) - 1, text.shape[1] - H
    hidden = base.forward(text)[1][:, start:end].reshape(-1, base.hidden_size).clone()
    ahead = torch.stack([text[:, start + i : end + i] for i in range(1, H + 1)]).reshape(H, -1)  # [h, n]
    rows, projection = base.output_embeddings.weight[ahead[0]][:, None], base.output_embeddings.weight
    optimizer = torch.optim.Adam(heads.net.parameters(), lr=0.02)
    for _ in range(60):
        loss = functional.cross_entropy((heads(hidden, rows) @ projection.T).flatten(0, 1), ahead[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads.eval().requires_grad_(False)


def _save_eagle(folder: Path, vocabulary: int, d: int) -> None:
    """A checkpoint of EAGLE-1."""
    inner, half = 40, d // 2
    shapes = {
        "embed_tokens": (vocabulary, d), "fc": (d, 2 * d), "layers.0.self_attn.q_proj": (d, d),
        "layers.0.self_attn.k_proj": (half, d), "layers.0.self_attn.v_proj": (half, d),
        "layers.0.self_attn.o_proj": (d, d), "layers.0.mlp.gate_proj": (inner, d), "layers.0.mlp.up_proj": (inner, d),
        "layers.0.mlp.down_proj": (d, inner),
    }  # fmt: skip
    torch.manual_seed(5)
    tensors = {f"{name}.weight": torch.randn(shape) * 1.5 / shape[1] ** 0.5 for name, shape in shapes.items()}
    tensors |= {"fc.bias": torch.randn(d), "layers.0.post_attention_layernorm.weight": torch.ones(d)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": d, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": inner, "num_hidden_layers": 1, "vocab_size": vocabulary,
        "max_position_embeddings": 128,
    })  # fmt: skip


def _many(folder: Path) -> tuple[str, ...]:
    """Drafters of all kinds, to be joined."""
    others = (f"corpus-lookup:{folder / 'corpus'}", f"draft-model:{folder / 'small'}", f"eagle:{folder / 'eagle'}")
    return ("heads", "lookup", *others)


def _save_joint(tiny: Tiny, random: np.random.Generator) -> None:
    """Weights for the joined drafters, drawn: any weights must leave the law."""
    tiny.at("joint").mkdir()
    ngram, bigram = load_rescorer(f"ngram:{tiny.at('ngram')}"), load_rescorer(f"learned-bigram:{tiny.at('bigram')}")
    for drafters in (["lookup"], ["heads", "lookup"], _many(tiny.folder)):
        fit = JointFit(
            drafters=[load_drafter(spec).source for spec in drafters], k=K, examples=1, groups=1, prefixes=1,
            ngram=ngram.identity.split()[-1], bigram=bigram.identity.split()[-1], counts=[], confidences=[],
            weights=random.normal(0, 0.3, WEIGHTS).tolist(), log_loss=None, calibration_error=None, accuracies=[],
        )  # fmt: skip
        write_weights(tiny.at("joint"), fit)


def costs_of(tiny: Tiny) -> Costs:
    """What steps of the tiny base may cost."""
    of, heads = tiny.base.identity, tiny.heads
    return Costs(
        base=of.name, weights_sha256=of.weights_sha256, config_sha256=of.config_sha256, dtype=of.dtype, device="cpu",
        compiles=False, contexts=[1, 64], nodes=[1, 8],
        machine=Machine(cpu="none", cores=1, threads=1, torch="", transformers="", gpu=None),
        step_ms=[[1.0, 2.0], [1.0, 2.0]], tree_ms=0.1, heads=HeadsCost(sha256=heads.sha256, h=heads.h, ms=0.5),
    )  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A way of drafting: a run (None: no drafts), verified as a tree or as a batch."""

    label: str
    run: Run | None = None
    verify: str = "tree"


def ways_of(folder: Path) -> list[Way]:
    """Every rescorer that can generate, and drafters alone and joined, with the models in a folder (`make_tiny`)."""
    eagle, small, ngram = (str(folder / name) for name in ("eagle", "small", "ngram"))
    context = f"context-ngram:{ngram}"
    neural, both = f"neural:{small}", f"ngram-neural:{small},first=context-ngram,ngram={ngram}"
    joint = f"joint:{folder / 'joint'},ngram={ngram},bigram={folder / 'bigram'}"

    def way(label: str, spec: str, p: int = 1, *drafters: str, k: int = K, verify: str = "tree") -> Way:
        how = f", {verify} of {p}" if p > 1 else ""
        return Way(f"{label}{how}", Run(spec, p=p, k=k, drafters=drafters), verify)

    return [
        Way("no drafts"),
        way("heads", "none"),
        way("heads", "none", 4),
        way("heads", "none", 4, verify="batch"),
        way("heads of 5 tokens", "none", 4, f"heads:vocabulary=5,ranking={folder / 'ranking.json'}"),
        way("draws", "draws", k=3),  # few: what is drawn makes many ways that a decode can go
        way("draws", "draws", 2, k=3),
        way("draws", "draws", 3, k=3),
        way("draws", "draws:temperature=2", 2, k=3, verify="batch"),
        way("draws of a draft model", "draws", 2, f"draft-model:{small},tokens=3", k=3),
        way("draws of eagle", "draws", 2, f"eagle:{eagle},tokens=3", k=3),
        way("ngram", f"ngram:{ngram}"),
        way("ngram", f"ngram:{ngram}", 4),
        way("context-ngram", context),
        way("context-ngram", context, 4),
        way("learned-bigram", f"learned-bigram:{folder / 'bigram'}", 4),
        way("neural", neural),
        way("neural", neural, 4),
        way("ngram-neural", both, 3),
        way("medusa-tree", f"medusa-tree:{folder / 'choices.json'}", 4),
        way("eagle2-tree", "eagle2-tree:nodes=8,depth=3,beams=2", 4),
        way("lookup", "lookup"),
        way("lookup", "lookup", 3),
        way("draft model", f"draft-model:{small}"),
        way("eagle", "none", 4, f"eagle:{eagle}"),
        way("heads and lookup", "none", 4, "heads", "lookup"),
        way("joint", joint),
        way("joint", joint, 4),
        way("joint", joint, 4, verify="batch"),
        way("joint, 12 nodes", f"{joint},nodes=12", 12),
        way("joint, nodes by cost", f"{joint},nodes=auto", 32),
        way("joint of five drafters", joint, 6, *_many(folder)),
    ]
