"""Every family of causal LMs that transformers knows: decoded as `generate` would, or refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from conftest import byte_tokenizer, make_heads
from tiny_models import CONTEXT, VARIANTS, families, tiny_config, tiny_model

from lattices.errors import IncompatibleError, RescoreError
from lm import catalog
from lm.base import BaseIdentity, BaseLM, state_size
from lm.block_heads import load_heads
from lm.generation import generate
from rescore.decoding import decode
from rescore.rescorers import load_rescorer

SHORT, LONG = [5], [31, 7, 50, 12, 44, 3, 19, 25, 58, 9, 37, 6, 41, 28, 14, 33, 22]


def wrapped(name: str, model: torch.nn.Module) -> BaseLM:
    """A base LM around a tiny model. Raises as `load_base`."""
    with catalog._reading(f"can't tell what {name} is"):
        config = model.config.get_text_config(decoder=True)
        identity = BaseIdentity(name, "w", "t", state_size(config), config.vocab_size, str(model.dtype))
    return BaseLM(model, byte_tokenizer(), identity=identity)


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy output, to the last token."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def outcome(name: str) -> str:
    try:
        model = tiny_model(name)
    except Exception as error:
        return f"NOT TRIED {type(error).__name__} {str(error)[:200]!r}"
    try:
        base = wrapped(name, model)
    except RescoreError as error:
        assert "\n" not in str(error) and str(error).count(name), error
        return f"refused {error}"
    base.eos_token_ids = frozenset()
    heads = make_heads(base)
    none = load_rescorer("none")
    bad=[]
    expected = {}
    end = min(base.context_length, CONTEXT) - len(LONG)
    for prompt, count in ((SHORT, 10), (LONG, end)):
        expected[len(prompt)]= ref= greedy(model, prompt, count)
        for mode, p, verify in (("ar",0,"batch"),("p1",1,"tree"),("batch",4,"batch"),("tree",4,"tree")):
            if mode=="tree" and not base.supports_tree: continue
            if p: d=decode(base,heads,prompt,rescorer=none,k=4,p=p,max_new_tokens=count,verify=verify)
            else: d=decode(base,None,prompt,max_new_tokens=count)
            if d.output_ids!=ref: bad.append(mode+str(len(prompt)))
    prompts=[SHORT, LONG]
    for g in generate(base, prompts, max_new_tokens=3):
        if g.output_ids.tolist()!=expected[len(prompts[g.index])][:3]: bad.append("gen%d"%len(prompts[g.index]))
    return f"{'BAD '+' '.join(bad) if bad else 'ok'} {'tree' if base.supports_tree else 'batch'} {'pad' if base.supports_padding else 'nopad'} {'body' if base.body_gives_states else 'nobody'} ctx {base.context_length} {len(set(expected[17]))}"
