"""Every family of causal LMs that transformers knows: decoded as `generate` would, or refused in one line."""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, make_heads
from tiny_models import CONTEXT, VARIANTS, families, tiny_config, tiny_model, tried
from transformers import LlamaConfig, LlamaForCausalLM

from lattices.errors import IncompatibleError
from lm.base.catalog import load_base
from lm.base.generation import generate
from lm.base.machine import Work
from lm.base.model import BaseIdentity, BaseLM
from lm.heads.block_heads import load_heads
from rescore.decoding import decode
from rescore.rescorers import load_rescorer

SHORT, LONG = [5], [31, 7, 50, 12, 44, 3, 19, 25, 58, 9, 37, 6, 41, 28, 14, 33, 22]
# Which transformers 5.20 reads as other texts where later tokens follow, so that there it is refused.
CAUSAL = [name for name in VARIANTS if name != "big_bird, full"]
ORDINARY = [
    "llama",
    "mistral",
    "qwen2",
    "gpt2",
    "opt",
    "bloom",
    "falcon",
    "mixtral",
    "gemma2",
    "phi3",
    "gpt_neox",
    "mpt",
]
DOCS = Path(__file__).parents[2] / "docs"


def greedy(base: BaseLM, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy output, to the last token."""
    ids = torch.tensor([prompt])
    output = base.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", [*families(), *VARIANTS])
def test_output_is_that_of_generate_or_refused_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch):
    found = tried(name)
    if found.not_built:
        pytest.skip(found.not_built)
    if (base := found.base) is None:
        assert name in found.refused and "\n" not in found.refused and len(found.refused) > len(name) + 20
        return
    monkeypatch.setattr(base, "eos_token_ids", frozenset())
    assert not base.model.training and base.hidden_size == base.output_embeddings.weight.shape[1]
    heads, rescorer = make_heads(base), load_rescorer("none")
    expected = []
    # to the end of the context, where there is one: positions run out there
    for prompt, count in ((SHORT, 10), (LONG, min(base.context_length, CONTEXT) - len(LONG))):
        expected.append(greedy(base, prompt, count))
        assert decode(base, None, prompt, max_new_tokens=count).output_ids == expected[-1]
        for p, verify in ((1, "tree"), (4, "batch"), (4, "tree")):
            decoded = decode(base, heads, prompt, rescorer=rescorer, k=4, p=p, max_new_tokens=count, verify=verify)
            assert decoded.output_ids == expected[-1], (p, verify)
            assert decoded.verify == (verify if p == 1 or base.supports_tree else "batch")
    for generated in generate(base, [SHORT, LONG], max_new_tokens=3):
        assert generated.output_ids.tolist() == expected[generated.index][:3]
    Work(base).add(tokens=1, projected=1, cached=1)


def test_the_ordinary_ones_are_not_refused():
    assert all(tried(name).base is not None for name in [*ORDINARY, *CAUSAL])
    assert sum(tried(name).base is not None for name in families()) >= 50


def test_which_take_trees():
    taken = {name: tried(name).base.supports_tree for name in [*ORDINARY, *CAUSAL]}
    for name in ("llama", "qwen2", "gpt2", "opt", "opt, projected", "falcon", "falcon, new decoder", "mixtral", "phi3"):
        assert taken[name], name
    for name in ("mistral", "qwen2, windows", "bloom", "mpt", "falcon, alibi", "gpt_neo, global", "gemma2"):
        assert not taken[name], name


def test_the_page_about_models_says_the_same():
    module = runpy.run_path(str(DOCS / "make_models.py"))
    written = (DOCS / "models.md").read_text(encoding="utf-8")
    if f"Tried with transformers {module['version']()}," not in written:
        pytest.skip("the page is about another version of transformers")
    assert written == module["page"](), "run python docs/make_models.py"


class TestContext:
    @pytest.mark.parametrize("name", ["llama, dynamic", "phi3, longrope"])
    def test_rotary_positions_that_depend_on_the_length_end_it(self, name: str):
        assert tried(name).base.context_length == 20

    @pytest.mark.parametrize("name", ["whisper", "mpt", "gpt2", "opt, projected", "roberta"])
    def test_it_has_other_names_too(self, name: str):
        assert tried(name).base.context_length == CONTEXT

    def test_there_may_be_none(self):
        assert tried("bloom").base.context_length == 1 << 30


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("mamba", "is recurrent"),
            ("lfm2", "has conv layers"),
            ("deepseek_v32", "has indexed_attention layers"),
            ("openai-gpt", "has no cache of keys and values"),
            ("xlnet", "has no cache of keys and values"),
            ("moshi", "has windows that are no masks"),
            ("big_bird", '"attention_type": "original_full"'),
            ("prophetnet", "changes its logits"),
        ],
    )
    def test_why(self, name: str, why: str):
        assert why in tried(name).refused

    def test_a_model_that_reads_later_tokens(self):
        model = tiny_model("bert")
        model.config.is_decoder = False
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
        with pytest.raises(IncompatibleError, match=r"^b ") as caught:
            BaseLM(model, byte_tokenizer(), identity=BaseIdentity("b", "w", "t", 32, 61, "float64"))
        assert "\n" not in str(caught.value)

    def test_logits_that_are_no_numbers(self):
        model = tiny_model("llama")
        torch.nn.init.constant_(model.lm_head.weight, torch.inf)
        with pytest.raises(IncompatibleError, match="b gives logits that are not finite in float64"):
            BaseLM(model, byte_tokenizer(), identity=BaseIdentity("b", "w", "t", 32, 61, "float64"))

    def test_a_projection_of_another_size_than_the_configuration_says(self):
        with pytest.raises(IncompatibleError, match="projects 32 numbers to 61 tokens"):
            BaseLM(tiny_model("llama"), byte_tokenizer(), identity=BaseIdentity("b", "w", "t", 32, 60, "float64"))


class TestLoading:
    def save(self, name: str, folder: Path) -> str:
        tiny_model(name).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return str(folder)

    def test_states_of_another_size_than_the_layers(self, tmp_path: Path):
        """OPT projects its states before the vocabulary does; heads are made for what it reads then."""
        base = load_base(self.save("opt, projected", tmp_path / "opt"), dtype="float64", device="cpu")
        assert base.hidden_size == base.identity.hidden_size == 24
        made = make_heads(base)
        made.save(tmp_path / "heads")
        assert load_heads(base.identity, str(tmp_path / "heads")).config.hidden_size == 24

    @pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
    def test_experts_in_float64(self, tmp_path: Path, name: str):
        base = load_base(self.save(name, tmp_path / "moe"), dtype="float64", device="cpu")
        assert decode(base, None, SHORT, max_new_tokens=6).output_ids == greedy(base, SHORT, 6)

    def test_a_family_without_a_cache(self, tmp_path: Path):
        with pytest.raises(IncompatibleError, match="has no cache of keys and values"):
            load_base(self.save("openai-gpt", tmp_path / "gpt"), device="cpu")


def test_the_argument_of_the_cache_has_the_name_that_the_model_knows(monkeypatch: pytest.MonkeyPatch):
    """Before transformers 5.24 it was `past_key_values`."""
    model = LlamaForCausalLM(LlamaConfig(**tiny_config("llama").to_diff_dict())).double()
    forward = type(model).forward

    def older(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        name = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
        return forward(self, input_ids, attention_mask, position_ids, use_cache=use_cache, **{name: past_key_values})

    monkeypatch.setattr(LlamaForCausalLM, "forward", older)
    base = BaseLM(model, byte_tokenizer(), identity=BaseIdentity("b", "w", "t", 32, 61, "float64"))
    assert base.supports_tree
    logits, hidden = base.forward(torch.tensor([LONG]), last=2)
    assert logits.shape[1] == hidden.shape[1] == 2
