"""Block heads: from one final hidden state of the base LM to the lattice of the next h tokens.

Head 1 is the base LM's own vocabulary projection. Heads 2..h are a network (`lm.heads.nets`) followed by the same
projection ([A] section 3). Head 1's choice is known before the other heads are asked, so they can see it beside the
state (`token_size`), which neither paper does. A checkpoint is a folder: `model.safetensors`, the network's tensors,
and `config.json` (`BlockHeadsConfig`).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace
from torch import nn

from lattices.errors import IncompatibleError, RescoreError, UnknownNameError
from lattices.lattice import Lattice
from lattices.paths import user_path
from lm.base.adapters import TUNED_FILE
from lm.base.model import BaseIdentity, BaseLM
from lm.checkpoint import CONFIG_FILE, WEIGHTS_FILE, check_shapes, read_weights, write_checkpoint
from lm.checkpoint import read_config as read_checkpoint_config
from lm.files import SHIPPED, sha256_of_file
from lm.heads.nets import NETS, SEQUENTIAL, BlockHeadsConfig

HEADS_FOLDER = "heads"


class BlockHeads(nn.Module):
    """Heads 2..h; they start as copies of head 1."""

    def __init__(self, config: BlockHeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.net = NETS[config.architecture](config)
        self._file_sha256: str | None = None

    @property
    def h(self) -> int:
        return self.config.h

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(self.net.parameters()).dtype

    @property
    def sha256(self) -> str:
        """Of the file that the weights were read from, else of the weights in memory."""
        return self._file_sha256 or _tensors_sha256(self.net)

    def forward(self, hidden: torch.Tensor, rows: torch.Tensor, heads: list[int] | None = None) -> torch.Tensor:
        """Final hidden states `[n, d]` -> what the projection reads for heads 2..h, `[h-1, n, d]`.

        `rows` `[n, s, d]`: the projection's rows of the draft's first tokens, as many as the network sees (more are
        ignored). `heads` chooses some of the heads, counted from 0 for head 2.
        """
        read: torch.Tensor = self.net(hidden, rows, list(range(self.h - 1)) if heads is None else heads)
        return read

    @torch.inference_mode()
    def logits(
        self, base: BaseLM, hidden: torch.Tensor, first: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """All heads' logits after each of n states, `[n, h, vocab]`, in float32 at least.

        `hidden` `[n, d]` and head 1's logits `first` `[n, vocab]`, as the base's forward gave them. `tokens` `[n]`:
        what head 1 chose, where that is known better than by the arg-max of `first` (after rounding, for example).
        """
        rows = base.output_embeddings.weight[first.argmax(-1) if tokens is None else tokens][:, None].to(self.dtype)
        every = [first[:, None]]
        # A sequential head is asked when the tokens before its own are known; the others are asked at once.
        sequential = self.config.architecture == SEQUENTIAL
        for heads in [[i] for i in range(self.h - 1)] if sequential else [None]:
            ahead = base.project(self(hidden.to(self.dtype), rows, heads).to(hidden.dtype))  # [heads, n, vocab]
            every.append(ahead.transpose(0, 1))
            if sequential:
                best = base.output_embeddings.weight[ahead[0].argmax(-1)]
                rows = torch.cat([rows, best[:, None].to(self.dtype)], dim=1)
        logits = torch.cat(every, dim=1)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def lattice(self, base: BaseLM, hidden: torch.Tensor, first: torch.Tensor, k: int) -> Lattice:
        """The lattice `[n, h, k]` after each of n states; arguments as for `logits`."""
        return lattice_of(self.logits(base, hidden, first), k)

    def first(self, h: int) -> BlockHeads:
        """The same heads cut to a block of h tokens (no head depends on later ones)."""
        if not 2 <= h <= self.h:
            raise RescoreError(f"h = {h}, but these heads propose blocks of {self.h}; choose --h from 2 to {self.h}")
        cut = BlockHeads(replace(self.config, h=h)).to(next(self.net.parameters()).device, self.dtype)
        cut.net.load_state_dict({name: self.net.cut(name, value, h) for name, value in self.net.state_dict().items()})
        cut._file_sha256 = self._file_sha256
        return cut.eval().requires_grad_(False)

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Writes `model.safetensors` and then `config.json` into a folder, each whole or not at all.

        `dtype` int8: as `lm.checkpoint` has it, half the size. Raises `OutputError` if the folder can't be written.
        """
        write_checkpoint(folder, self.net.state_dict(), self.config, dtype=dtype)


def lattice_of(logits: torch.Tensor, k: int) -> Lattice:
    """The lattice `[n, h, k]` of logits `[n, h, vocab]`. Raises `RescoreError` for a k outside the vocabulary."""
    if not 1 <= k <= logits.shape[-1]:
        raise RescoreError(f"k = {k} is outside 1 to the vocabulary's {logits.shape[-1]}; choose another k")
    values, token_ids = top_k_lowest_ids(logits, k)
    logps = (values - torch.logsumexp(logits, dim=-1, keepdim=True)).clamp(max=0.0)
    return Lattice(token_ids.to(torch.int32).cpu().numpy(), logps.float().cpu().numpy())


def entropies_of(logits: torch.Tensor) -> np.ndarray:
    """Entropies in nats, float32 `[n, h]`, of logits `[n, h, vocab]`."""
    entropies = torch.special.entr(torch.softmax(logits, dim=-1)).sum(-1)
    return np.asarray(entropies.float().cpu())


def top_k_lowest_ids(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest of the last axis, falling, ties by lowest id: values and ids `[..., k]`."""
    size = logits.shape[-1]
    taken = min(k + 1, size)
    values, ids = torch.topk(logits, taken, dim=-1)
    # torch.topk orders equal values as it likes, also across its last place: take more until all that equal the k-th
    # are in. In half precision ties are common, but few tokens share a value this high.
    while taken < size and bool((values[..., -1] == values[..., k - 1]).any()):
        taken = min(4 * taken, size)
        values, ids = torch.topk(logits, taken, dim=-1)
    ids = ids.sort(dim=-1).values
    values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values[..., :k], ids.gather(-1, order)[..., :k]


def _tensors_sha256(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def known_heads(name: str) -> Path | None:
    """The checkpoint folder of the heads tuned with the base LM of this name, or shipped for it; None without any."""
    if (shipped := _shipped().get(name)) is not None:  # a built-in name is no folder that happens to be called so
        return shipped
    beside = Path(os.path.expanduser(name)) / HEADS_FOLDER
    if (beside.parent / TUNED_FILE).is_file() and (beside / CONFIG_FILE).is_file():
        return beside  # trained together with this base
    return None


def _shipped() -> dict[str, Path]:
    return {config.parents[1].name: config.parent for config in SHIPPED.glob(f"*/heads/{CONFIG_FILE}")}


def heads_folder(path: str | None, identity: BaseIdentity) -> Path:
    """The checkpoint folder of `path`; without one, of the heads tuned with the base, or shipped for its name."""
    if path is not None:
        return user_path(path, "--heads")
    if (folder := known_heads(identity.name)) is not None:
        return folder
    shipped = _shipped()
    known = f" (only for {', '.join(sorted(shipped))})" if shipped else ""
    raise RescoreError(
        f"no block heads are shipped for {identity.name}{known}; train some: "
        f"rescore train-heads --base {identity.name} --corpus ... --out DIR, then --heads DIR"
    )


def load_heads(
    base: BaseLM | BaseIdentity,
    path: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> BlockHeads:
    """Heads for a base LM, or for what is known of one.

    path: a checkpoint folder; None: those shipped with the base's name.
    device, dtype: by default the base's own, or without one the CPU and float32.
    Raises `IncompatibleError` if they were made for another hidden size, vocabulary or tokenizer, `InvalidDataError`
    for a broken file, `RescoreError` if there are none.
    """
    identity = base.identity if isinstance(base, BaseLM) else base
    device = device or (base.device if isinstance(base, BaseLM) else "cpu")
    dtype = dtype or (base.heads_dtype if isinstance(base, BaseLM) else torch.float32)
    folder = heads_folder(path, identity)
    config = read_config(folder)
    for field in ("hidden_size", "vocab_size", "tokenizer_sha256"):
        if (made_for := getattr(config, field)) != (actual := getattr(identity, field)):
            raise IncompatibleError(
                f"the heads in {folder} were made for {config.base_name}, not for {identity.name}: "
                f"{field} is {made_for}, the base's is {actual}; give other --heads"
            )
    heads = BlockHeads(config)
    tensors = read_weights(folder, missing=f"no block heads in {folder}", what="the heads")
    shapes, expected = ({n: v.shape for n, v in state.items()} for state in (tensors, heads.net.state_dict()))
    check_shapes(folder, shapes, expected, CONFIG_FILE)
    heads.net.load_state_dict(tensors)
    heads._file_sha256 = heads_sha256(folder)
    return heads.to(device, dtype).eval().requires_grad_(False)


def read_config(folder: Path) -> BlockHeadsConfig:
    """`config.json` of a checkpoint folder.

    Raises `RescoreError` if there is none, `InvalidDataError` for anything but a `BlockHeadsConfig`,
    `UnknownNameError` for an architecture from elsewhere.
    """
    what = "a block heads configuration"
    config = read_checkpoint_config(folder, BlockHeadsConfig, what=what, missing=_no_heads(folder))
    if config.architecture not in NETS:
        raise UnknownNameError("block head architecture", config.architecture, NETS)
    return config


def _no_heads(folder: Path) -> str:
    inside = folder / HEADS_FOLDER
    return f"no block heads in {folder}" + (f" (but in {inside})" if (inside / CONFIG_FILE).is_file() else "")


def of_other_weights(path: str | None, identity: BaseIdentity) -> str | None:
    """A line about heads (`path` as for `load_heads`) that were trained for other weights of a base; None if not."""
    folder = heads_folder(path, identity)
    if read_config(folder).base_weights_sha256 in (None, identity.weights_sha256):
        return None
    own = known_heads(identity.name)
    hint = f"; its own lie in {own}" if own is not None else ""
    return f"the heads in {folder} were trained for other weights than {identity.name}'s and will accept less{hint}"


def heads_sha256(folder: Path) -> str:
    """sha256 of a checkpoint's weights."""
    try:
        return sha256_of_file(folder / WEIGHTS_FILE)
    except OSError as error:
        raise RescoreError(f"{_no_heads(folder)}: can't read {WEIGHTS_FILE} ({error.strerror})") from error
