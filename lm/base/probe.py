"""What an architecture can do, tried out on a few tokens instead of taken from a list of names.

A base LM is run as the decoders run it: with a cache, on several drafts of one past, on a tree, on prompts of
different lengths; and everything is compared with plain forwards of the same texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import DynamicCache

from lattices.errors import IncompatibleError, RescoreError

if TYPE_CHECKING:
    from lm.base.cache import KVCache
    from lm.base.model import BaseLM

# Share of the largest logit by which two ways of computing it may differ. Half precision differs by more from one
# kernel to another; what is wrong differs by more than that.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.02
REFUSED_FROM = 0.1  # in half precision: only what is surely wrong is refused, not what rounds badly

Result = TypeVar("Result")
CONTEXT_LENGTHS = ("max_position_embeddings", "max_decoder_position_embeddings", "max_target_positions", "max_seq_len")
WINDOWS = ("sliding_window", "attention_chunk_size")  # what masks read when they are made


@dataclass(frozen=True)
class Scaling:
    """What an architecture does to its projection's logits: a `factor`, a `divisor`, a soft `cap` of their size."""

    factor: float | None = None
    divisor: float | None = None
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits if self.factor is None else logits * self.factor
        logits = logits if self.divisor is None else logits / self.divisor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def scalings(config: Any) -> list[Scaling]:
    """What a configuration may mean by its numbers, most of them first: the same names stand for other things too."""
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    numbers = [float(v) if isinstance(v := getattr(config, name, None), int | float) and v else None for name in names]
    choices = [(number, None) if number is not None else (None,) for number in numbers]
    return [Scaling(*chosen) for chosen in itertools.product(*choices)]


def state_size(config: Any) -> int:
    """What a text configuration says of the size of the states that the vocabulary projection reads."""
    sizes = [getattr(config, name, None) for name in ("word_embed_proj_dim", "output_embedding_size", "embedding_size")]
    return int(next((size for size in sizes if type(size) is int), None) or config.hidden_size)


def context_length(config: Any) -> int:
    """Positions of a decoder, as its text configuration says; 2^30 where there is no limit."""
    sizes = [getattr(config, name, None) for name in CONTEXT_LENGTHS]
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        # Beyond the original context these change how every token is turned, by the longest text seen so far: what is
        # cached was turned otherwise, and a block would be where single tokens are not yet.
        if isinstance(part, dict) and part.get("rope_type", part.get("type")) in ("dynamic", "longrope"):
            sizes.append(part.get("original_max_position_embeddings"))
            sizes.append(getattr(config, "original_max_position_embeddings", None))
    return min((size for size in sizes if type(size) is int and size > 0), default=1 << 30)


class Probe:
    """A past of three tokens with two drafts of two tokens after it, and what a base LM says of them without cache.

    Raises `IncompatibleError` where the base LM can't be decoded exactly.
    """

    def __init__(self, base: BaseLM) -> None:
        self.base, self.name = base, base.identity.name
        size = base.vocab_size
        ids = ((torch.arange(7, device=base.device) + 0.5) * size / 7).long().clamp(max=size - 1)  # none is special
        self.past, self.drafts = ids[None, :3], ids[3:].reshape(2, 2)
        with refusal(self.name):
            self.source = base.encoded(self.past.tolist())
            self.plain, hidden = self._without_cache()
        if not bool(self.plain.isfinite().all()):
            raise IncompatibleError(
                f"{self.name} gives logits that are not finite in {base.identity.dtype}; choose another --dtype"
            )
        for scaling in scalings(base.config):
            base.scaling = scaling
            if self._same(base.project(hidden), self.plain):
                return
        raise IncompatibleError(f"{self.name} changes its logits in a way that block heads can't follow")

    def _without_cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and states of both drafts after the past."""
        return self.base.forward(torch.cat([self.past.expand(2, -1), self.drafts], dim=1), source=self.source)

    def check_cache(self, *, tree: bool) -> bool:
        """Raises `IncompatibleError` if drafts after a cached past are not read as the same texts without cache.

        Returns whether they may stand there as a tree, which is tried if `tree`.
        """
        with refusal(self.name):
            cache = self.base.new_cache(9)
            cache.source = self.source
            past, _ = self.base.forward(self.past, cache)
            cache.keep(range(3))
            tree = tree and self._follows_tree(cache)
            drafts, _ = self.base.forward(self.drafts, cache)
            cache.keep([0], row=1)  # of the second draft the first token is right
            rest, _ = self.base.forward(self.drafts[1:, 1:], cache)
        if not self._same(past, self.plain[:1, :3], half=REFUSED_FROM):
            raise IncompatibleError(f"{self.name} lets tokens see later ones, so its drafts can't be verified")
        expected = torch.cat([*self.plain[:, 3:], self.plain[1, 4:]])
        if not self._same(torch.cat([drafts[0], drafts[1], rest[0]]), expected, half=REFUSED_FROM):
            raise IncompatibleError(f"{self.name} can't forget rejected tokens: its cache is not only keys and values")
        pairs = [layer.buffers for layer in cache.buffers]
        self.position_size = sum(k.shape[1] * k.shape[3] + v.shape[1] * v.shape[3] for k, v in pairs)
        return tree

    def _follows_tree(self, cache: KVCache) -> bool:
        """Whether a 4D mask means to this architecture what it says; some add it to the scores, some refuse it.

        A causal mask would also pass where it is ignored, so both drafts stand after the past as one tree.
        """
        sees = torch.zeros(4, 7, dtype=torch.bool, device=self.base.device)
        sees[:, :3] = sees[[0, 1, 2, 3], [3, 4, 5, 6]] = sees[[1, 3], [3, 5]] = True
        positions = torch.tensor([[3, 4, 3, 4]], device=self.base.device)
        nodes = self.drafts.reshape(1, 4)
        logits = attempt(
            lambda: self.base.forward(nodes, cache, position_ids=positions, attention_mask=sees[None, None])[0]
        )
        return logits is not None and self._same(logits.reshape(2, 2, -1), self.plain[:, 3:])

    def check_window(self) -> None:
        """Raises `IncompatibleError` if layers with a window have it from transformers' own cache, not from a mask.

        That cache drops what the window has left behind; to one that keeps everything the mask must say so. So with a
        smaller window the plain forward must change.
        """
        config = self.base.config
        if "sliding" not in " ".join(type(layer).__name__ for layer in DynamicCache(config=config).layers).lower():
            return
        sizes = {n: v for n in WINDOWS if type(v := getattr(config, n, None)) is int and v > 2}
        try:
            for name in sizes:
                setattr(config, name, 2)
            with refusal(self.name):
                narrow, _ = self._without_cache()
        finally:
            for name, value in sizes.items():
                setattr(config, name, value)
        if sizes and self._same(narrow, self.plain):
            raise IncompatibleError(
                f"{self.name} has windows that are no masks, so its output can't be verified in blocks"
            )

    def body_gives_states(self) -> bool:
        """Whether what the projection reads is the output of the model's body, with nothing in between."""
        base, prompt = self.base, self.past.tolist()

        @torch.inference_mode()
        def states() -> tuple[torch.Tensor, torch.Tensor]:
            ids = self.past if self.source is None else self.drafts[:1]
            body = base.model.base_model
            return body(**base.body_arguments(prompt, ids))[0], base.forward(ids, source=self.source)[1]

        both = attempt(states)
        return both is not None and self._same(*both)

    def follows_padding(self, *, mask_4d: bool) -> bool:
        """Whether a prompt that is padded on its left, to stand in a batch with a longer one, is read as if alone."""
        base = self.base
        if base.is_half and not base.takes_positions:
            return False  # what its own positions change may be no more than rounding does
        ids = torch.zeros(2, 4, dtype=torch.long, device=base.device)
        ids[0, 1:], ids[1, :3], ids[1, 3] = self.past[0], self.past[0], self.drafts[1, 0]
        attended = torch.ones(2, 5, dtype=torch.bool, device=base.device)
        attended[0, 0] = False
        positions = torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]], device=base.device)
        mask = attended[:, None, None] if mask_4d else attended

        def logits() -> torch.Tensor:
            cache = base.new_cache(5)
            prompts, _ = base.forward(ids, cache, position_ids=positions, attention_mask=attended[:, :4], last=1)
            cache.keep_all()
            more = torch.stack([self.drafts[0, :1], self.drafts[1, 1:]])
            after, _ = base.forward(more, cache, position_ids=positions[:, -1:] + 1, attention_mask=mask)
            return torch.cat([prompts, after], dim=1)

        expected = torch.stack([self.plain[0, 2:4], self.plain[1, 3:5]])
        both = attempt(logits)
        return both is not None and self._same(both, expected)

    def _same(self, computed: torch.Tensor, expected: torch.Tensor, *, half: float = HALF_TOLERANCE) -> bool:
        if computed.shape != expected.shape:
            return False
        difference = (computed.double() - expected.double()).abs()
        tolerance = half if self.base.is_half else TOLERANCE
        return bool(difference.max() <= tolerance * expected.double().abs().max())


def attempt(call: Callable[[], Result]) -> Result | None:
    """What a call gives; None where it fails, with whatever error: architectures fail in their own ways."""
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


@contextmanager
def refusal(name: str) -> Iterator[None]:
    """One line for whatever an architecture raises that is run as the decoders run it."""
    try:
        yield
    except IncompatibleError as error:
        text = str(error)
        raise IncompatibleError(text if text.startswith(name) else f"{name} {text}") from error
    except (RescoreError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = "".join(f": {line}" for line in str(error).strip().splitlines()[:1])
        raise IncompatibleError(f"{name} can't be decoded in blocks ({type(error).__name__}{reason})") from error
