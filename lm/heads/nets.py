"""The networks of block heads 2..h: four architectures behind one interface.

All read the base LM's final hidden state and give what its vocabulary projection reads; all start as copies of head 1.

    feed_forward  one hidden layer per head, residual                                     ([A] section 3)
    shared        one hidden layer for all heads, an output layer per head, residual       ([B] section 6)
    medusa        per head `blocks` times x + SiLU(W x + b)                                ([C])
    sequential    feed_forward that also sees every token drafted before its own           (Hydra: Ankner et al. 2024)

The first three see, beside the state, at most the token that head 1 chose (`token_size`); so their lattice belongs to
the state. A sequential head sees the arg-max of all heads before it: its lattice is conditioned on the best path.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

import torch
from msgspec import Meta
from msgspec.structs import asdict
from torch import nn
from torch.nn import functional

from lm.checkpoint import Config
from lm.heads.projection import OwnProjection
from lm.keys import key_of

FEED_FORWARD, SHARED, MEDUSA, SEQUENTIAL = "feed_forward", "shared", "medusa", "sequential"


Size = Annotated[int, Meta(ge=1, le=1 << 31)]
TokenSize = Annotated[int, Meta(ge=0, le=1 << 16)]


class BlockHeadsConfig(Config, frozen=True, kw_only=True):
    """What heads are and for which base LM."""

    h: Annotated[int, Meta(ge=2)]  # head 1 is counted
    hidden_size: Size  # of the base
    inner_size: Size  # width of the hidden layer (medusa: the hidden size)
    vocab_size: Size | None  # None: heads of others that use the base's projection do not say
    base_name: str
    tokenizer_sha256: str | None  # None: those of others do not say
    architecture: str = FEED_FORWARD
    token_size: TokenSize = 0  # width in which heads see drafted tokens; 0: they see the state only
    blocks: Annotated[int, Meta(ge=0)] = 1  # residual blocks of a medusa head
    base_weights_sha256: str | None = None  # the weights they were trained for; None: not known
    own_projection: OwnProjection | None = None  # None: heads read through the base's vocabulary projection

    def __post_init__(self) -> None:
        if self.architecture == SEQUENTIAL and not self.token_size:
            raise ValueError("token_size is 0; sequential heads see drafted tokens and need a width for them")
        if not self.blocks and (self.architecture != MEDUSA or self.own_projection is None):
            raise ValueError("blocks is 0; only medusa heads with a projection of their own may have none")

    @property
    def sha256(self) -> str:
        """Of all that it says; one without a projection of its own keeps that of before there were any."""
        fields = asdict(self)
        if self.own_projection is None:
            fields.pop("own_projection")
        return key_of(fields)


class HeadNet(nn.Module):
    """Heads 2..h, batched. `sees`: how many of the drafted tokens they can see (0, 1, or h - 1)."""

    def __init__(self, config: BlockHeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.sees = 1 if config.token_size else 0

    def _see_tokens(self, *shape: int) -> None:
        """Adds the weights by which heads see tokens, `token.weight` of this shape; they weigh nothing at first."""
        d, size = self.config.hidden_size, self.config.token_size
        if size:
            self.token = nn.ParameterDict({"shared": torch.randn(d, size) * d**-0.5, "weight": torch.zeros(*shape)})

    @abstractmethod
    def forward(self, hidden: torch.Tensor, rows: torch.Tensor, heads: list[int]) -> torch.Tensor:
        """States `[n, d]` -> what the projection reads for each of `heads` (from 0 for head 2), `[len(heads), n, d]`.

        `rows` `[n, s, d]`: the projection's rows of the tokens 1..s of the draft, s = `sees`; head i of a sequential
        net reads the first i + 1 of them, and there may be no more.
        """

    def cut(self, name: str, value: torch.Tensor, h: int) -> torch.Tensor:
        """A tensor of the state, as the first h heads have it."""
        return value if name == "token.shared" else value[: h - 1]

    def of(self, weights: torch.Tensor, heads: list[int]) -> torch.Tensor:
        """The rows of weights `[h-1, ...]` that are these heads'; those of all are not copied, which would take longer
        than a step's products."""
        return weights if heads == list(range(len(weights))) else weights[heads]

    def seen(self, rows: torch.Tensor) -> torch.Tensor:
        """What heads see of the tokens: `[n, s, token_size]`."""
        seen: torch.Tensor = functional.layer_norm(rows, rows.shape[-1:]) @ self.token["shared"]
        return seen


class FeedForward(HeadNet):
    """`inner.weight [h-1, d, inner]`, `inner.bias [h-1, inner]`, `outer.weight [h-1, inner, d]`, `outer.bias [h-1, d]`;
    with a token size `token.shared [d, size]`, `token.weight [h-1, size, inner]`."""

    own_layer = True  # whether each head has a hidden layer of its own

    def __init__(self, config: BlockHeadsConfig) -> None:
        super().__init__(config)
        heads, d, inner = config.h - 1, config.hidden_size, config.inner_size
        own = (heads,) if self.own_layer else ()
        self.inner = nn.ParameterDict(
            {"weight": nn.Parameter(torch.randn(*own, d, inner) * d**-0.5), "bias": torch.zeros(*own, inner)}
        )
        self.outer = nn.ParameterDict({"weight": torch.zeros(heads, inner, d), "bias": torch.zeros(heads, d)})
        self._see_tokens(*([self._token_weights()] if own else []), config.token_size, inner)

    def _token_weights(self) -> int:
        return self.config.h - 1

    def _of_inner(self, weights: torch.Tensor, heads: list[int]) -> torch.Tensor:
        """The weights of these heads in the hidden layer."""
        return self.of(weights, heads) if self.own_layer else weights

    def forward(self, hidden: torch.Tensor, rows: torch.Tensor, heads: list[int]) -> torch.Tensor:
        weight, bias = (self._of_inner(self.inner[name], heads) for name in ("weight", "bias"))
        inner = torch.matmul(hidden, weight) + bias[..., None, :]
        if self.sees:
            inner = inner + self._seen_tokens(rows, heads)
        weight, bias = (self.of(self.outer[name], heads) for name in ("weight", "bias"))
        read: torch.Tensor = hidden + torch.matmul(functional.silu(inner), weight) + bias[:, None]
        return read

    def _seen_tokens(self, rows: torch.Tensor, heads: list[int]) -> torch.Tensor:
        """What the tokens add to the hidden layer, `[len(heads), n, inner]`."""
        return torch.matmul(self.seen(rows)[:, 0], self._of_inner(self.token["weight"], heads))


class Shared(FeedForward):
    """`inner.weight [d, inner]`, `inner.bias [inner]`, `outer.weight [h-1, inner, d]`, `outer.bias [h-1, d]`; with a
    token size `token.shared [d, size]`, `token.weight [size, inner]`."""

    own_layer = False

    def cut(self, name: str, value: torch.Tensor, h: int) -> torch.Tensor:
        return value[: h - 1] if name.startswith("outer.") else value


class Sequential(FeedForward):
    """As feed-forward, but `token.weight [h(h-1)/2, size, inner]`: head 2's token 1, head 3's tokens 1 and 2, ..."""

    def __init__(self, config: BlockHeadsConfig) -> None:
        super().__init__(config)
        self.sees = config.h - 1

    def _token_weights(self) -> int:
        return self.config.h * (self.config.h - 1) // 2

    def _seen_tokens(self, rows: torch.Tensor, heads: list[int]) -> torch.Tensor:
        seen = self.seen(rows)  # [n, s, size]
        tokens = []
        for head in heads:
            first = head * (head + 1) // 2
            weight = self.token["weight"][first : first + head + 1]  # [head + 1, size, inner]
            tokens.append(seen[:, : head + 1].flatten(1) @ weight.flatten(0, 1))
        return torch.stack(tokens)

    def cut(self, name: str, value: torch.Tensor, h: int) -> torch.Tensor:
        return value[: h * (h - 1) // 2] if name == "token.weight" else super().cut(name, value, h)


def as_sequential(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a sequential net that does what the feed-forward net of `state`, which sees a token, does: it weighs
    nothing but the first token yet."""
    of_first = state["token.weight"]  # [h-1, size, inner]
    count = len(of_first)
    weight = of_first.new_zeros(count * (count + 1) // 2, *of_first.shape[1:])
    weight[[head * (head + 1) // 2 for head in range(count)]] = of_first
    return {**state, "token.weight": weight}


class Medusa(HeadNet):
    """`block.weight [h-1, blocks, d, d]`, `block.bias [h-1, blocks, d]`; with a token size `token.shared [d, size]`,
    `token.weight [h-1, size, d]`, which joins the first block."""

    def __init__(self, config: BlockHeadsConfig) -> None:
        super().__init__(config)
        count, d, blocks = config.h - 1, config.hidden_size, config.blocks
        self.block = nn.ParameterDict(
            {"weight": torch.zeros(count, blocks, d, d), "bias": torch.zeros(count, blocks, d)}
        )
        self._see_tokens(count, config.token_size, d)

    def forward(self, hidden: torch.Tensor, rows: torch.Tensor, heads: list[int]) -> torch.Tensor:
        weight, bias = (self.of(self.block[name], heads) for name in ("weight", "bias"))
        x = hidden.expand(len(heads), -1, -1)
        for block in range(self.config.blocks):
            inner = torch.matmul(x, weight[:, block]) + bias[:, block, None]
            if block == 0 and self.sees:
                inner = inner + torch.matmul(self.seen(rows)[:, 0], self.of(self.token["weight"], heads))
            x = x + functional.silu(inner)
        return x


NETS: dict[str, type[HeadNet]] = {
    FEED_FORWARD: FeedForward, SHARED: Shared, MEDUSA: Medusa, SEQUENTIAL: Sequential,
}  # fmt: skip
