"""Block heads: from one final hidden state of the base LM to the lattice of the next h tokens.

Head 1 is the base LM's own vocabulary projection. Heads 2..h are a network (`lm.heads.nets`) followed by the same
projection ([A] section 3), or by projections of their own, as others' have them (`lm.heads.projection`). Head 1's
choice is known before the other heads are asked, so they can see it beside the state (`token_size`), which neither
paper does. A checkpoint is a folder: `model.safetensors`, the network's tensors, and `config.json`
(`BlockHeadsConfig`); or what others wrote (`lm.heads.layouts`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from torch import nn

from lattices.errors import IncompatibleError, RescoreError, UnknownNameError
from lattices.lattice import Lattice, put_first, side_by_side
from lattices.paths import user_path
from lm.base.adapters import TUNED_FILE
from lm.base.model import BaseIdentity, BaseLM
from lm.checkpoint import CONFIG_FILE, WEIGHTS_FILE, check_shapes, read_weights, write_checkpoint
from lm.checkpoint import read_config as read_checkpoint_config
from lm.files import FETCH, SHIPPED, sha256_of_file
from lm.heads.layouts.medusa import find_medusa, medusa_of_model
from lm.heads.nets import NETS, SEQUENTIAL, BlockHeadsConfig
from lm.heads.projection import DraftProjection, Projection
from lm.locks import warn

HEADS_FOLDER = "heads"
PROJECTION = "lm_head."  # begins the names of its tensors in a checkpoint
_told: set[str] = set()  # notices of this process


class Slots(NamedTuple):
    """Slots of one vocabulary that follow each other: logits `[n, s, v]`, in float32 at least, of the tokens `[v]`
    (None: of all, by id)."""

    logits: torch.Tensor
    token_ids: torch.Tensor | None = None

    def lattice(self, k: int) -> Lattice:
        """As `lattice_of` has it, `[n, s, k]`."""
        return lattice_of(self.logits, k, self.token_ids)


class BlockHeads(nn.Module):
    """Heads 2..h; they start as copies of head 1."""

    def __init__(self, config: BlockHeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.net = NETS[config.architecture](config)
        own = config.own_projection
        self.projection = Projection(own, config.h - 1, config.hidden_size) if own else None
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
        return self._file_sha256 or _tensors_sha256(self.tensors())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its weights under the names of a checkpoint."""
        own = {PROJECTION + n: value for n, value in self.projection.state_dict().items()} if self.projection else {}
        return {**self.net.state_dict(), **own}

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Makes these weights its own; they fit."""
        self.net.load_state_dict({n: value for n, value in tensors.items() if not n.startswith(PROJECTION)})
        if self.projection is not None:  # which is large: not copied
            own = {n.removeprefix(PROJECTION): value for n, value in tensors.items() if n.startswith(PROJECTION)}
            self.projection.load_state_dict(own, assign=True)

    def forward(self, hidden: torch.Tensor, rows: torch.Tensor, heads: list[int] | None = None) -> torch.Tensor:
        """Final hidden states `[n, d]` -> what the projection reads for heads 2..h, `[h-1, n, d]`.

        `rows` `[n, s, d]`: the projection's rows of the draft's first tokens, as many as the network sees (more are
        ignored). `heads` chooses some of the heads, counted from 0 for head 2.
        """
        read: torch.Tensor = self.net(hidden, rows, list(range(self.h - 1)) if heads is None else heads)
        return read

    @torch.inference_mode()
    def slots(
        self,
        base: BaseLM,
        hidden: torch.Tensor,
        first: torch.Tensor,
        tokens: torch.Tensor | None = None,
        *,
        projection: DraftProjection | None = None,
    ) -> list[Slots]:
        """The slots of all heads after each of n states; those of one vocabulary together.

        `hidden` `[n, d]` and head 1's logits `first` `[n, vocab]`, as the base's forward gave them. `tokens` `[n]`:
        what head 1 chose, where that is known better than by the arg-max of `first` (after rounding, for example).
        `projection`: of the tokens that heads 2 to h draft from (None: all); raises `RescoreError` if the heads have
        projections of their own.
        """
        if projection is not None and self.projection is not None:
            raise RescoreError(
                "these heads have vocabulary projections of their own, and a draft vocabulary takes rows of the "
                "base's; leave it out"
            )
        rows = base.output_embeddings.weight[first.argmax(-1) if tokens is None else tokens][:, None].to(self.dtype)
        project, token_ids = (projection, projection.token_ids) if projection else (base.project, None)
        every = []
        # A sequential head is asked when the tokens before its own are known; the others are asked at once.
        sequential = self.config.architecture == SEQUENTIAL
        for heads in [[i] for i in range(self.h - 1)] if sequential else [None]:
            read = self(hidden.to(self.dtype), rows, heads).to(hidden.dtype)  # [heads, n, d]
            if self.projection is None:
                ahead = project(read)  # [heads, n, v]
            else:
                ahead = self.projection(read, heads or range(self.h - 1), first.shape[-1])
            every.append(ahead.transpose(0, 1))
            if sequential:
                _, best = top_k_lowest_ids(ahead[0], 1, token_ids)
                rows = torch.cat([rows, base.output_embeddings.weight[best].to(self.dtype)], dim=1)
        slots = [Slots(first[:, None]), Slots(torch.cat(every, dim=1), token_ids)]
        if projection is None:
            slots = [Slots(torch.cat([each.logits for each in slots], dim=1))]
        half = (torch.float16, torch.bfloat16)
        return [Slots(logits.float() if logits.dtype in half else logits, ids) for logits, ids in slots]

    def lattice(
        self,
        base: BaseLM,
        hidden: torch.Tensor,
        first: torch.Tensor,
        k: int,
        *,
        tokens: torch.Tensor | None = None,
        projection: DraftProjection | None = None,
    ) -> Lattice:
        """The lattice `[n, h, k]` after each of n states; arguments as for `slots`. Slot 1 begins with `tokens`, where
        they are given."""
        of_heads = self.slots(base, hidden, first, tokens, projection=projection)
        lattice = side_by_side([slots.lattice(k) for slots in of_heads])
        if tokens is not None:
            put_first(lattice.token_ids[:, 0], lattice.logps[:, 0], tokens.cpu().numpy())
        return lattice

    def first(self, h: int) -> BlockHeads:
        """The same heads cut to a block of h tokens (no head depends on later ones)."""
        if not 2 <= h <= self.h:
            raise RescoreError(f"h = {h}, but these heads propose blocks of {self.h}; choose h from 2 to {self.h}")
        cut = BlockHeads(replace(self.config, h=h)).to(next(self.net.parameters()).device, self.dtype)
        cut.net.load_state_dict({name: self.net.cut(name, value, h) for name, value in self.net.state_dict().items()})
        cut.projection = self.projection and self.projection.first(h - 1)
        cut._file_sha256 = self._file_sha256
        return cut.eval().requires_grad_(False)

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Writes `model.safetensors` and then `config.json` into a folder, each whole or not at all.

        `dtype` int8: as `lm.checkpoint` has it, half the size. Raises `OutputError` if the folder can't be written.
        """
        write_checkpoint(folder, self.tensors(), self.config, dtype=dtype)


def lattice_of(logits: torch.Tensor, k: int, token_ids: torch.Tensor | None = None) -> Lattice:
    """The lattice `[n, h, k]` of logits `[n, h, v]`; of the tokens `token_ids` `[v]` (None: of all, by id).

    Raises `RescoreError` for a k outside the vocabulary.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise RescoreError(f"k = {k} is outside 1 to the vocabulary's {logits.shape[-1]}; choose another k")
    values, ids = top_k_lowest_ids(logits, k, token_ids)
    logps = (values - torch.logsumexp(logits, dim=-1, keepdim=True)).clamp(max=0.0).float().cpu().numpy()
    if logps.min(initial=0.0) == -np.inf:  # tokens outside a head's token map
        least = int(np.isfinite(logps).sum(axis=-1).min())
        raise RescoreError(f"k = {k}, but a head proposes {least} tokens only; choose --k from 1 to {least}")
    return Lattice(ids.to(torch.int32).cpu().numpy(), logps)


def entropies_of(logits: torch.Tensor) -> np.ndarray:
    """Entropies in nats, float32 `[n, h]`, of logits `[n, h, vocab]`."""
    entropies = torch.special.entr(torch.softmax(logits, dim=-1)).sum(-1)
    return np.asarray(entropies.float().cpu())


def top_k_lowest_ids(
    logits: torch.Tensor, k: int, token_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest of the last axis, falling, ties by lowest id: values and ids `[..., k]`; `token_ids` `[v]`: of the
    axis, where it is not by id."""
    size = logits.shape[-1]
    taken = min(k + 1, size)
    values, ids = torch.topk(logits, taken, dim=-1)
    # torch.topk orders equal values as it likes, also across its last place: take more until all that equal the k-th
    # are in. In half precision ties are common, but few tokens share a value this high.
    while taken < size and bool((values[..., -1] == values[..., k - 1]).any()):
        taken = min(4 * taken, size)
        values, ids = torch.topk(logits, taken, dim=-1)
    ids, by_id = (ids if token_ids is None else token_ids[ids]).sort(dim=-1)
    values, order = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return values[..., :k], ids.gather(-1, order)[..., :k]


def _tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(raw.data)
    return digest.hexdigest()


def known_heads(name: str) -> Path | None:
    """Where the heads lie that were tuned with the base LM of this name, or are shipped for it; None without any."""
    if (shipped := _shipped().get(name)) is not None:  # a built-in name is no folder that happens to be called so
        return shipped
    beside = Path(os.path.expanduser(name)) / HEADS_FOLDER
    if (beside.parent / TUNED_FILE).is_file() and (beside / CONFIG_FILE).is_file():
        return beside  # trained together with this base
    return beside.parent if medusa_of_model(beside.parent) else None


def _shipped() -> dict[str, Path]:
    return {config.parents[1].name: config.parent for config in SHIPPED.glob(f"*/heads/{CONFIG_FILE}")}


def heads_folder(path: str | None, identity: BaseIdentity) -> Path:
    """The place that `path` names; without one, that of heads tuned with the base, or shipped for its name."""
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

    path: a checkpoint folder, or Medusa heads as others write them (a folder, or a file of one); None: those shipped
        with the base's name.
    device, dtype: by default the base's own, or without one the CPU and float32. A projection of the heads' own has
        the base's precision.
    What can't be checked of others' heads is told, once. Raises `IncompatibleError` if they were made for another
    hidden size, vocabulary or tokenizer, `InvalidDataError` for a broken file, `RescoreError` if there are none.
    """
    identity = base.identity if isinstance(base, BaseLM) else base
    device = device or (base.device if isinstance(base, BaseLM) else "cpu")
    dtype = dtype or (base.heads_dtype if isinstance(base, BaseLM) else torch.float32)
    folder = heads_folder(path, identity)
    config = read_config(folder)
    check_fit(config, folder, identity)
    heads = BlockHeads(config)
    tensors, notices = read_tensors(folder, config)
    own_map = tensors.get(f"{PROJECTION}token_map")
    if own_map is not None and not 0 <= int(own_map.min()) <= int(own_map.max()) < identity.vocab_size:
        raise IncompatibleError(
            f"the heads in {folder} have a token map beyond the {identity.vocab_size} tokens of {identity.name}; give "
            "other --heads"
        )
    heads.take(tensors)
    heads._file_sha256 = heads_sha256(folder)
    for line in (*notices, *_unchecked(config, folder, identity)):
        if line not in _told:
            _told.add(line)
            warn(line)
    heads.net.to(device, dtype)
    if heads.projection is not None:
        heads.projection.to(device, getattr(torch, identity.dtype))
    return heads.eval().requires_grad_(False)


def check_fit(config: BlockHeadsConfig, folder: Path, identity: BaseIdentity) -> None:
    """Raises `IncompatibleError` if heads were made for another hidden size, vocabulary or tokenizer than a base's."""
    for field in ("hidden_size", "vocab_size", "tokenizer_sha256"):
        made_for, actual = getattr(config, field), getattr(identity, field)
        if made_for not in (None, actual):
            raise IncompatibleError(
                f"the heads in {folder} were made for {config.base_name}, not for {identity.name}: "
                f"{field} is {made_for}, the base's is {actual}; give other --heads"
            )


def _unchecked(config: BlockHeadsConfig, folder: Path, identity: BaseIdentity) -> list[str]:
    """What could not be checked, in a line."""
    if config.tokenizer_sha256 is not None:
        return []
    sizes = f"hidden size {config.hidden_size}"
    if config.vocab_size is not None:
        sizes += f" and {config.vocab_size} tokens"
    return [
        f"the heads in {folder} (h = {config.h}) do not say which tokenizer they are for; that they fit "
        f"{identity.name} was checked by {sizes} alone"
    ]


def read_tensors(folder: Path, config: BlockHeadsConfig) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The weights at a place of heads, as `BlockHeads.tensors` names them, and what the user should know of them.

    Raises as `load_heads`.
    """
    if (theirs := find_medusa(folder)) is not None:
        return theirs.tensors()
    tensors = read_weights(folder, missing=f"no block heads in {folder}", what="the heads")
    with torch.device("meta"):
        expected = {name: value.shape for name, value in BlockHeads(config).tensors().items()}
    check_shapes(folder, {name: value.shape for name, value in tensors.items()}, expected, CONFIG_FILE)
    return tensors, ()


def read_config(folder: Path) -> BlockHeadsConfig:
    """What the heads at a place are: `config.json` of a checkpoint folder, or what others' tensors say.

    Raises `RescoreError` if there is none, `InvalidDataError` for anything but a `BlockHeadsConfig`,
    `UnknownNameError` for an architecture from elsewhere.
    """
    if (theirs := find_medusa(folder)) is not None:
        return theirs.config
    what = "a block heads configuration"
    drafters = f"an EAGLE layer or Hydra's heads are drafters, --drafter eagle:{folder} or hydra:{folder}"
    advice = f"get or make it again; {drafters}" if folder.is_dir() else FETCH
    config = read_checkpoint_config(folder, BlockHeadsConfig, what=what, missing=_no_heads(folder), advice=advice)
    if config.architecture not in NETS:
        raise UnknownNameError("block head architecture", config.architecture, NETS)
    return config


def _no_heads(folder: Path) -> str:
    inside = folder / HEADS_FOLDER
    return f"no block heads in {folder}" + (f" (but in {inside})" if (inside / CONFIG_FILE).is_file() else "")


def of_other_weights(path: str | None, identity: BaseIdentity) -> str | None:
    """A line about heads (`path` as for `load_heads`) that were trained for other weights of a base; None if not.

    Raises as `check_fit` for those that fit no such base at all: nobody need wait for it to load.
    """
    folder = heads_folder(path, identity)
    config = read_config(folder)
    check_fit(config, folder, identity)
    if config.base_weights_sha256 in (None, identity.weights_sha256):
        return None
    own = known_heads(identity.name)
    hint = f"; its own lie in {own}" if own is not None else ""
    return f"the heads in {folder} were trained for other weights than {identity.name}'s and will accept less{hint}"


def heads_sha256(folder: Path) -> str:
    """sha256 of the weights at a place of heads."""
    if (theirs := find_medusa(folder)) is not None:
        return theirs.sha256
    try:
        return sha256_of_file(folder / WEIGHTS_FILE)
    except OSError as error:
        raise RescoreError(f"{_no_heads(folder)}: can't read {WEIGHTS_FILE} ({error.strerror})") from error
