"""Small neural LMs as rescorers: named sizes, how they begin, how they are kept, how they score a tree of drafts.

A rescorer is a causal LM over the base's own tokens, in one of two forms:

    whole  any folder that `save_pretrained` wrote (or a hub id)
    delta  the base's embeddings and some of its layers, of which the last few and the final norm were trained further,
           the others perhaps changed by low-rank products; a folder with `config.json` (`DeltaConfig`) and
           `model.safetensors`, which holds the trained tensors and the factors (`NAME.up` `[out, rank]`, `NAME.down`
           `[rank, in]`) only, int8 with one float32 scale per row (`NAME.scale`), vectors as float32. It needs the
           very base it was trained on (sha256)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, UnknownNameError
from lm.base.cache import TreeCache
from lm.base.catalog import (
    BUILT_IN,
    identify,
    load_base,
    load_tokenizer,
    read_model_config,
    resolve_base,
    under_adapter,
)
from lm.base.fast.packed import product_of
from lm.base.identity import tokenizer_sha256
from lm.base.machine import enough_memory
from lm.base.model import BaseIdentity, BaseLM
from lm.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Config, check_shapes, read_config, read_weights, write_checkpoint
from lm.files import SHIPPED, read_json_object, sha256_of_file
from lm.keys import key_of

DELTA = "delta"
UP, DOWN = ".up", ".down"  # factors of what is added to a weight
ADVICE = "a lower --k, --p or --max-prompt-tokens needs less"
REMEMBERED_BYTES = 1 << 30


@dataclass(frozen=True)
class NeuralSize:
    """A named size, embeddings counted as in [A] section 5: how many of the base's layers it takes, or the shape of a
    model that starts from scratch."""

    base_layers: int
    hidden_size: int
    intermediate_size: int
    layers: int
    attention_heads: int


SIZES = {
    "neural-32m": NeuralSize(1, 512, 1408, 2, 8),
    "neural-61m": NeuralSize(9, 640, 1712, 6, 10),
    "neural-94m": NeuralSize(18, 768, 2048, 8, 12),
}


class DeltaConfig(Config, frozen=True, kw_only=True):
    """What a delta is."""

    size: str  # by name
    layers: tuple[int, ...]  # of the base, numbered from 0, rising
    tuned_layers: int  # the last of these, which were trained further
    lora_rank: int = 0  # of the changes of the others; 0: none
    base_name: str
    base_weights_sha256: str
    tokenizer_sha256: str
    kind: str = DELTA


@dataclass(frozen=True)
class Use:
    """What a small LM serves as, for messages: its name, and the option that takes its folder."""

    name: str
    option: str


RESCORER = Use("rescorer", "--rescorer neural:")
DRAFT_MODEL = Use("draft model", "--drafter draft-model:")


def scratch_model(size: str, base: BaseLM) -> LlamaForCausalLM:
    """A Llama of a named size over the base's tokens, with random weights."""
    shape = named_size(size)
    # It reads a prompt and its output as one text.
    longest = base.prompt_length + base.context_length if base.has_encoder else base.context_length
    config = LlamaConfig(
        vocab_size=base.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=shape.attention_heads,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        eos_token_id=sorted(base.eos_token_ids),
        bos_token_id=None,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


def are_layers(layers: Sequence[int]) -> bool:
    """Whether these can be layers of a base: numbers from 0, rising, at least one."""
    return bool(layers) and all(a < b for a, b in itertools.pairwise((-1, *layers)))


def named_size(name: str) -> NeuralSize:
    """The size called `name`. Raises `UnknownNameError`."""
    if name not in SIZES:
        raise UnknownNameError("rescorer size", name, SIZES)
    return SIZES[name]


def some_layers(
    name: str, layers: Sequence[int], *, prepare: Callable[[PreTrainedModel], object] | None = None, **options: Any
) -> BaseLM:
    """The base `name` with some of its layers only (numbered from 0, rising), on the CPU unless the options of
    `load_base` say otherwise.

    Raises as `load_base`; `RescoreError` if it has fewer.
    """
    config = read_model_config(name)
    text_config = config.get_text_config(decoder=True)
    if text_config.num_hidden_layers <= layers[-1]:
        raise RescoreError(
            f"{name} has {text_config.num_hidden_layers} layers, and layer {layers[-1]} of it is asked for, "
            "counted from 0; use --init scratch, a smaller size or other --layers"
        )
    _set_layers(text_config, range(layers[-1] + 1))

    def keep(model: PreTrainedModel) -> None:
        if len(layers) <= layers[-1]:
            _keep_layers(name, model, layers)
        if prepare is not None:
            prepare(model)

    return load_base(name, config=config, prepare=keep, **{"device": "cpu", **options})


def _set_layers(config: Any, layers: Sequence[int]) -> None:
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]


def _keep_layers(name: str, model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Leaves a model these layers only."""
    body: Any = model.base_model
    if not isinstance(getattr(body, "layers", None), torch.nn.ModuleList):
        raise IncompatibleError(f"{name} does not name its layers as Llama does; take its first ones (no --layers)")
    body.layers = torch.nn.ModuleList(body.layers[layer] for layer in layers)
    for place, layer in enumerate(body.layers):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = place  # where its keys and values lie in a cache
    _set_layers(model.config.get_text_config(decoder=True), layers)


def save_delta(
    model: torch.nn.Module,
    names: Collection[str],
    config: DeltaConfig,
    folder: Path,
    *,
    changes: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> None:
    """Writes the tensors `names` of a model as a delta, weights first, and changes of others by their names (up
    `[out, rank]`, down `[rank, in]`). Raises `OutputError`."""
    state = model.state_dict()
    tensors = {name: state[name] for name in names}
    for name, (up, down) in (changes or {}).items():
        tensors |= {name + UP: up, name + DOWN: down}
    write_checkpoint(folder, tensors, config, dtype=torch.int8)


@dataclass(frozen=True)
class NeuralSource:
    """Where a small LM comes from."""

    name: str  # as the user gave it
    folder: Path
    delta: DeltaConfig | None  # None: a whole model
    use: Use = field(default=RESCORER, compare=False)

    @property
    def sha256(self) -> str:
        """sha256 of all that it scores with: weights and configuration, which names a delta's base."""
        if self.delta is None:
            model = identify(str(self.folder))
            return key_of([model.weights_sha256, model.config_sha256, model.tokenization_sha256])
        return key_of([sha256_of_file(self.folder / WEIGHTS_FILE), self.delta])


def find_neural(text: str, *, use: Use = RESCORER) -> NeuralSource:
    """The small LM that a named size (shipped) or a path or hub id stands for; its weights are not read yet.

    Raises `RescoreError` if there is none, with the command that trains one.
    """
    if text in SIZES:
        folder = SHIPPED / BUILT_IN / text
        if not (folder / CONFIG_FILE).is_file():
            raise RescoreError(
                f"no weights of {text} for {BUILT_IN} in this installation; train them: rescore train-rescorer "
                f"{text} --corpus ... --out DIR, then {use.option}DIR"
            )
    elif text.endswith((".pt", ".pth", ".bin")):
        raise RescoreError(f"{text} is no {use.name}: give the folder that train-rescorer or save_pretrained wrote")
    else:
        try:
            model = resolve_base(text)
        except RescoreError as error:
            raise RescoreError(
                f"no {use.name} {text} ({error}); train one: rescore train-rescorer neural-61m --corpus ... "
                f"--out DIR, then {use.option}DIR"
            ) from error
        if model.adapter is not None:
            raise RescoreError(
                f"{text} is an adapter; a {use.name} must be a whole model: merge it into its base first"
            )
        folder = model.folder
    missing = f"no {use.name} in {folder}"
    config = read_json_object(folder / CONFIG_FILE, missing=missing)
    if config.get("kind") != DELTA:
        return NeuralSource(text, folder, None, use)
    if isinstance(count := config.get("layers"), int):
        raise InvalidDataError(
            f"{folder / CONFIG_FILE} was written by an older version, with the number of layers; write their numbers "
            f'instead of {count}: "layers": [0, 1, ...] up to {count - 1}'
        )
    delta = read_config(folder, DeltaConfig, what="the configuration of a delta", missing=missing)
    if not are_layers(delta.layers):
        raise InvalidDataError(
            f"{folder / CONFIG_FILE} has layers = {list(delta.layers)}, and they are numbers from 0, rising; "
            "get or make it again"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise RescoreError(f"no {use.name} weights in {folder}: {WEIGHTS_FILE} is missing; get or train it again")
    return NeuralSource(text, folder, delta, use)


def check_fits(source: NeuralSource, base: BaseIdentity) -> None:
    """Raises `IncompatibleError` with the reason if a small LM was made for another tokenizer or base."""
    delta = source.delta
    made_for = tokenizer_sha256_of(source.folder) if delta is None else delta.tokenizer_sha256
    other = None
    if made_for != base.tokenizer_sha256:
        other = "tokenizer"
    elif delta is not None and base_with(delta.base_weights_sha256, base) is None:
        other = "weights"
    if other is not None:
        of = f" of {delta.base_name}" if delta else ""
        raise IncompatibleError(
            f"the {source.use.name} {source.name} needs the {other}{of} it was made for, and {base.name} has others; "
            "train one for it: rescore train-rescorer"
        )


def base_with(weights_sha256: str, base: BaseIdentity) -> BaseIdentity | None:
    """Which base LM has these weights: this one, or the one that its adapter changes; None: neither."""
    if base.weights_sha256 == weights_sha256:
        return base
    under = under_adapter(base.name)
    return under if under is not None and under.weights_sha256 == weights_sha256 else None


def tokenizer_sha256_of(folder: Path) -> str:
    """sha256 of what the token ids of a model's folder mean."""
    return tokenizer_sha256(load_tokenizer(str(folder)))


def load_neural(
    source: NeuralSource,
    *,
    vocab_size: int,
    base_name: str,
    dtype: str = "float32",
    device: str = "cpu",
    shared: BaseLM | None = None,
) -> NeuralLM:
    """The small LM for the base `base_name`.

    shared: the base itself, where it decodes: both are made ready for that (`BaseLM.pack`), and share what they can.
    vocab_size: tokens that it must know. `check_fits` comes first. Raises `IncompatibleError` for a vocabulary that is
    too small or a model without tree attention, `InvalidDataError` for broken files.
    """
    compiles = shared is not None and shared.compiles
    options: dict[str, Any] = {"dtype": dtype, "device": device, "compile": "auto" if compiles else "off"}
    if (delta := source.delta) is None:
        model = load_base(str(source.folder), **options)
    else:
        if (base := base_with(delta.base_weights_sha256, identify(base_name))) is None:
            raise IncompatibleError(
                f"what {base_name} stands for has changed: the {source.use.name} {source.name} needs other weights "
                "of it"
            )
        base_name = base.name  # that in memory may be an adapter on it
        model = some_layers(base_name, delta.layers, **options, prepare=lambda cut: _become(cut, source, shared))
    if model.vocab_size < vocab_size:
        raise IncompatibleError(
            f"the {source.use.name} {source.name} knows {model.vocab_size} tokens, {base_name} has {vocab_size}; "
            "train one for it: rescore train-rescorer"
        )
    if not model.supports_tree:
        has_encoder, no_tree = "has an encoder; give a causal LM", "takes no tree mask; give one with full attention"
        why = has_encoder if model.has_encoder else no_tree
        raise IncompatibleError(f"the {source.use.name} {source.name} {why}")
    if shared is not None:
        model.pack()
    return NeuralLM(model)


def _become(cut: PreTrainedModel, source: NeuralSource, shared: BaseLM | None) -> None:
    """Gives a cut base the tensors of a delta, and of the whole base, if that is in memory, all others."""
    assert source.delta is not None
    name = source.use.name
    tensors = read_weights(source.folder, missing=f"no {name} weights in {source.folder}", what=f"the {name}")
    state: dict[str, torch.Tensor] = cut.state_dict()
    rank = source.delta.lora_rank
    expected: dict[str, Collection[int]] = {}
    for weight, value in state.items():
        if weight in tensors:
            expected[weight] = value.shape
        if rank and weight + UP in tensors:
            expected |= {weight + UP: (value.shape[0], rank), weight + DOWN: (rank, value.shape[-1])}
    check_shapes(source.folder, {name: value.shape for name, value in tensors.items()}, expected, "base")
    for weight in [n.removesuffix(UP) for n in tensors if n.endswith(UP)]:
        up, down = (tensors.pop(weight + part) for part in (UP, DOWN))
        tensors[weight] = state[weight].float().cpu() + up @ down
    # Put in place of the base's, whose file is mapped and stays unread.
    cut.load_state_dict({name: value.to(state[name]) for name, value in tensors.items()}, strict=False, assign=True)
    same = shared is not None and shared.identity.weights_sha256 == source.delta.base_weights_sha256
    if shared is not None and same and (shared.dtype, shared.device) == (cut.dtype, cut.device):
        shared.pack()
        _share(cut, shared.model, tensors, source.delta.layers)


def _share(model: torch.nn.Module, base: torch.nn.Module, own: Collection[str], layers: Sequence[int]) -> None:
    """Lets a cut base use the whole base's weights and products in all layers in which it has no tensor of its own."""
    modules = dict(base.named_modules())
    for name, module in model.named_modules():
        parts = [part for part, _ in module.named_parameters(recurse=False)]
        if not any(f"{name}.{part}" in own for part in parts):
            theirs = modules[re.sub(r"(?<=\blayers\.)\d+", lambda place: str(layers[int(place[0])]), name, count=1)]
            for part in parts:
                setattr(module, part, getattr(theirs, part))
            if (product := product_of(theirs)) is not None:
                module.forward = product


class NeuralLM:
    """A small causal LM that scores tokens after nodes of a tree.

    `model` is the LM itself, `tokens_read` counts what went through it.
    """

    def __init__(self, model: BaseLM) -> None:
        self.model = model
        self.tokens_read = 0
        self._read: dict[Hashable, TreeCache] = {}

    def new_cache(self, rows: int) -> TreeCache:
        """An empty cache for so many sequences."""
        return TreeCache(self.model.model.config, rows, self.model.device)

    def remembered(self, prompts: Hashable) -> TreeCache | None:
        """A copy of what `remember` was given for these prompts."""
        cache = self._read.get(prompts)
        return cache.copy() if cache is not None else None

    def remember(self, prompts: Hashable, cache: TreeCache) -> None:
        """Keeps a copy of a cache that holds these prompts: a sweep of weights reads the same ones again and again.

        Up to `REMEMBERED_BYTES`; what does not fit is read anew.
        """
        if sum(c.nbytes for c in self._read.values()) + cache.nbytes <= REMEMBERED_BYTES:
            self._read[prompts] = cache.copy()

    def read(self, cache: TreeCache, tokens: np.ndarray, parents: np.ndarray) -> torch.Tensor:
        """One forward of n new nodes a row, tokens and parents int `[b, n]`; their final states `[b, n, d]`.

        Nodes beyond the context are read at its last place: a base with the same one can't say them anyway.
        """
        self.check_context(int(cache.lengths.max(initial=0)))
        return self._forward(cache, tokens, *cache.place(parents))

    def read_text(self, cache: TreeCache, tokens: np.ndarray) -> torch.Tensor:
        """One forward of n tokens a row, int `[b, n]`, each after the one before; their final states `[b, n, d]`.

        What `read` does with a chain of nodes, without the work that a tree needs; they are settled right after.
        """
        n = tokens.shape[1]  # the row that has so many may be the one with the fewest settled tokens
        self.check_context(max(int(cache.lengths.max(initial=0)), int(cache.lengths.min(initial=1 << 62)) + n))
        return self._forward(cache, tokens, *cache.place_text(n))

    def check_context(self, count: int) -> None:
        """Raises `RescoreError` if so many tokens do not fit into its context."""
        if count > self.model.context_length:
            raise RescoreError(
                f"a prompt and its output of {count} tokens exceed the context of the model "
                f"{self.model.identity.name} ({self.model.context_length}); cut prompts with --max-prompt-tokens"
            )

    def _forward(
        self, cache: TreeCache, tokens: np.ndarray, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        self.tokens_read += tokens.size
        # A base may count tokens beyond its tokenizer's that a draft model does not have, and that nothing says.
        known = np.minimum(tokens, self.model.vocab_size - 1)
        ids = torch.from_numpy(np.ascontiguousarray(known, dtype=np.int64)).to(self.model.device)
        positions = positions.clamp(max=self.model.context_length - 1)
        with enough_memory(ADVICE, at="rescoring"):
            _, hidden = self.model.forward(ids, cache, position_ids=positions, attention_mask=mask, projects=False)
        return hidden

    def score(self, hidden: torch.Tensor, token_ids: np.ndarray) -> np.ndarray:
        """Logits of a lattice slot's tokens after states: `[b, w, d]` and int `[b, k]` -> float64 `[b, w, k]`."""
        ids = torch.from_numpy(np.ascontiguousarray(token_ids, dtype=np.int64)).to(self.model.device)
        with enough_memory(ADVICE, at="rescoring"):
            logits: np.ndarray = self.model.project(hidden, ids).double().cpu().numpy()
        return logits

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of all its tokens after states: `[..., d]` -> `[..., vocab]`, in its own precision."""
        with enough_memory(ADVICE, at="drafting"):
            return self.model.project(hidden)
