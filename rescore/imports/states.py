"""Hidden states that training tools stored, as a trace: block heads need nothing else of the base LM.

    speculators      hs_N.safetensors   token_ids [T], hidden_states [T, layers + 1, d]: the last entry is the last
                                        layer's output *before* the final norm, which is applied here
    model-optimizer  ID.pt              input_ids [T], hidden_states [T, d] after the final norm, loss_mask [T]
    specforge        data_N.ckpt        input_ids [T], hidden_state [1, T, d] after the final norm, loss_mask [T]

The state at token t chose token t + 1, if the output is greedy and the states are this base's: that is checked for all
output tokens. `loss_mask` is 1 at the tokens of answers: each run of them is an example, with all before it as its
prompt. Files are read as plain tensors: a pickle that would run code is refused. Sources: docs/interop.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, first_line, unreadable
from lm.base.catalog import load_base, read_model_config
from lm.base.model import BaseLM
from lm.files import sha256_of_file
from lm.heads.block_heads import load_heads
from lm.heads.layouts.tensor_files import unpickled
from rescore.checks import NEAR_TIE, check_k
from rescore.imports.importing import Imported, Row, SourceFormat
from rescore.runs.inputs import Inputs
from rescore.runs.models import Models
from rescore.tasks.base import Example
from rescore.tasks.groups import digest
from rescore.traced_rows import row_of_states
from rescore.tracing import TraceHeader, recorded_by

# Share of an example's output tokens that its states must choose. A token whose logit is below the best by no more than
# a near-tie of the precision in which the states are stored counts as chosen.
LEAST_AGREEMENT = 0.99
PROJECTED = 64  # positions whose logits are alive at a time
NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")  # what families call the final norm
TOKENS = {"speculators": "token_ids"}  # elsewhere input_ids
STATES = {"specforge": "hidden_state"}  # elsewhere hidden_states
MASK = "loss_mask"


@dataclass(frozen=True)
class Stored:
    """One file: token_ids int64 `[T]`, states `[T, d]` as stored, answers bool `[T]` (None: it does not say)."""

    name: str
    token_ids: torch.Tensor
    states: torch.Tensor
    answers: torch.Tensor | None


class StatesImport:
    """Base, heads and split with which files of stored states become rows; of the base, one layer is loaded."""

    def __init__(self, source: SourceFormat, inputs: Inputs, *, k: int, prompt_tokens: int | None) -> None:
        if prompt_tokens is not None and prompt_tokens < 1:
            raise RescoreError(f"--prompt-tokens {prompt_tokens}; a prompt needs at least one token")
        self.source, self.k, self.prompt_tokens = source, k, prompt_tokens
        config = read_model_config(inputs.base)
        config.get_text_config(decoder=True).num_hidden_layers = 1  # the rest made the states already
        self.base = load_base(inputs.base, dtype=inputs.dtype, device=inputs.device, config=config)
        self.models = Models(inputs)
        check_k(k, self.base.vocab_size)
        # By the whole base's identity: that of one layer would be another one.
        self.heads = load_heads(
            self.models.identity, inputs.heads, device=self.base.device, dtype=self.base.heads_dtype
        )
        self.norm = final_norm(self.base) if source == "speculators" else None
        self.dtypes: set[str] = set()
        self.chosen = self.tokens = 0  # output tokens that are their states' arg-max, and all of them

    def of_files(self, files: Sequence[Path], *, limit: int | None) -> Imported:
        """The examples of files, in their order."""
        return Imported(islice(self._rows(files), limit), len(files), lambda: self._header(files))

    def _header(self, files: Sequence[Path]) -> TraceHeader:
        content = hashlib.sha256("".join(map(sha256_of_file, files)).encode()).hexdigest()
        settings = {
            "base": asdict(self.models.identity),
            **self.models.heads_facts(),
            "data_sha256": content,
            "imported": {
                "from": self.source,
                "files": len(files),
                "states": sorted(self.dtypes),
                "agreement": self.chosen / self.tokens,
            },
            "recorded_by": recorded_by(self.models.device),
        }
        eos = sorted(self.base.eos_token_ids)
        return TraceHeader(self.heads.h, self.k, self.base.vocab_size, eos, settings, [])

    def _rows(self, files: Sequence[Path]) -> Iterator[Row]:
        for path in files:
            stored = self._read(path)
            for number, (start, end) in enumerate(turns := self._turns(stored), start=1):
                yield self._row(stored, f"{stored.name}:{number}" if len(turns) > 1 else stored.name, start, end)

    def _read(self, path: Path) -> Stored:
        tensors = _safetensors(path) if self.source == "speculators" else _pickled(path)
        tokens = _tensor(path, tensors, TOKENS.get(self.source, "input_ids"), floating=False)
        states = _tensor(path, tensors, STATES.get(self.source, "hidden_states"), floating=True)
        if self.source == "speculators":
            if states.ndim != 3:
                raise InvalidDataError(f"{path}: hidden_states has shape {list(states.shape)}, not [T, layers + 1, d]")
            states = states[:, -1]
        tokens = tokens[0] if tokens.ndim == 2 and len(tokens) == 1 else tokens
        states = states[0] if states.ndim == 3 and len(states) == 1 else states
        if tokens.ndim != 1 or states.ndim != 2 or len(tokens) != len(states) or len(tokens) < 2:
            raise InvalidDataError(
                f"{path}: {list(tokens.shape)} tokens and states of shape {list(states.shape)}; [T] and [T, d] belong "
                "together, T of at least 2"
            )
        if states.shape[1] != self.base.hidden_size:
            raise IncompatibleError(
                f"{path} holds states of {states.shape[1]} numbers, and those of {self.models.identity.name} have "
                f"{self.base.hidden_size}; give the --base that wrote them"
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.base.vocab_size:
            raise IncompatibleError(
                f"{path} holds token ids outside the {self.base.vocab_size} of {self.models.identity.name}; give the "
                "--base that wrote them"
            )
        if not bool(states.isfinite().all()):
            raise InvalidDataError(f"{path}: the states hold NaN or infinity; get or make it again")
        answers = None
        if MASK in tensors:
            mask = tensors[MASK]
            if not isinstance(mask, torch.Tensor) or mask.numel() != len(tokens):
                raise InvalidDataError(f"{path}: {MASK} does not fit {len(tokens)} tokens; get or make it again")
            answers = mask.reshape(-1) > 0
        self.dtypes.add(str(states.dtype).removeprefix("torch."))
        return Stored(path.stem, tokens.long(), states, answers)

    def _turns(self, stored: Stored) -> list[tuple[int, int]]:
        """Where outputs begin and end; each ends after its end-of-text."""
        length = len(stored.token_ids)
        if self.prompt_tokens is not None:
            runs = [(self.prompt_tokens, length)] if self.prompt_tokens < length else []
        elif stored.answers is None:
            raise RescoreError(f"{stored.name} has no {MASK} that says where its output begins; give --prompt-tokens")
        else:
            edges = np.flatnonzero(np.diff(np.r_[0, stored.answers.cpu().numpy().astype(np.int8), 0]))
            runs = [(max(1, a), b) for a, b in edges.reshape(-1, 2).tolist() if b > max(1, a)]  # state 0 chose token 1
        ends = [int(token) in self.base.eos_token_ids for token in stored.token_ids.tolist()]
        return [(a, next((i + 1 for i in range(a, b) if ends[i]), b)) for a, b in runs]

    @torch.inference_mode()
    def _row(self, stored: Stored, name: str, start: int, end: int) -> Row:
        output = stored.token_ids[start:end].to(self.base.device)
        # In the precision that the norm and the heads compute in; stored ones are often bfloat16.
        hidden = stored.states[start - 1 : end - 1].to(self.base.device, self.base.dtype)
        hidden = hidden if self.norm is None else self.norm(hidden)
        margins = self._margins(hidden, output)
        tie = NEAR_TIE.get(str(stored.states.dtype).removeprefix("torch."), NEAR_TIE["float32"])
        agreeing, count = int((margins >= -tie).sum()), len(margins)
        if agreeing < LEAST_AGREEMENT * count:
            raise IncompatibleError(
                f"{name}: {agreeing / count:.1%} of its {count} output tokens are what the stored states choose, and "
                f"{LEAST_AGREEMENT:.0%} are needed: the output is not greedy, or begins elsewhere, or the states are "
                f"not those of {self.models.identity.name}"
            )
        self.chosen, self.tokens = self.chosen + int((margins > 0).sum()), self.tokens + count
        prompt = stored.token_ids[:start].tolist()
        example = Example(name, self.base.tokenizer.decode(prompt), (), group=digest(stored.name))
        return row_of_states(
            self.base, self.heads, example, prompt, output.cpu().numpy(),
            hidden=hidden.to(self.base.heads_dtype).cpu().numpy(), margins=margins.cpu().numpy(), k=self.k,
        )  # fmt: skip

    def _margins(self, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The logit of each output token less that of the best other one, float32 `[t]`."""
        margins = []
        for at in range(0, len(output), PROJECTED):
            logits, tokens = self.base.project(hidden[at : at + PROJECTED]), output[at : at + PROJECTED, None]
            own = logits.gather(-1, tokens)[:, 0]
            margins.append((own - logits.scatter(-1, tokens, -torch.inf).amax(-1)).float())
        return torch.cat(margins)


def final_norm(base: BaseLM) -> torch.nn.Module:
    """The norm that a base LM applies to its last layer's output. Raises `IncompatibleError` where it has none by a
    known name."""
    body: Any = base.model.base_model
    for part in (body, getattr(body, "decoder", None)):
        for name in NORMS:
            if isinstance(found := getattr(part, name, None), torch.nn.Module):
                return found
    raise IncompatibleError(f"{base.identity.name} has no final norm by a known name, which these states still need")


def _tensor(path: Path, tensors: Mapping[str, Any], name: str, *, floating: bool) -> torch.Tensor:
    value = tensors.get(name)
    if not isinstance(value, torch.Tensor):
        raise InvalidDataError(
            f"{path} has no tensor {name!r} (it has {', '.join(map(str, tensors))}); is --from right?"
        )
    if value.dtype.is_floating_point != floating:
        raise InvalidDataError(f"{path}: {name!r} is {value.dtype}; get or make it again")
    return value


def _safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return load_file(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise InvalidDataError(f"can't read {path} as safetensors: {first_line(error)}; is --from right?") from error


def _pickled(path: Path) -> Mapping[str, Any]:
    loaded = unpickled(path, "give plain tensors by name")
    if not isinstance(loaded, Mapping):
        raise InvalidDataError(f"{path} holds no tensors by name; is --from right?")
    return loaded
