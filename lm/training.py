"""Trains block heads on a frozen base LM, from cached hidden states; the base itself is never run here.

Loss of head i at a position: cross-entropy against (1 - soft) x the token that stands i steps ahead + soft x the base's
own distribution there, which the cached state of that position gives through the vocabulary projection. A step draws
whole segments and a few of the heads. Everything random follows from (seed, step), so a resumed training is the same
training. Sources: [A] section 3 (sum of the heads' cross-entropies), [B] section 6 (distilled data, random heads).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, UnknownNameError
from lm.base import BaseLM
from lm.block_heads import BlockHeads, BlockHeadsConfig, heads_sha256, load_heads
from lm.files import append_json_line, atomic_file, changed_settings, open_appending, write_json, writing
from lm.head_data import HeadData

CHECKPOINT_FILE, LOG_FILE = "checkpoint.safetensors", "training_log.jsonl"
CHUNK_ROWS = 512  # rows of logits that are alive at a time: 512 x vocabulary floats
HELD_OUT_POSITIONS = 4096
ACCURACY_AT = (1, 4, 16)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingOptions:
    """How heads are trained. `positions` per step (whole segments), `heads_per_step` drawn with odds 1/i for head i,
    `vocabulary` most frequent target tokens in the loss plus `negatives` others drawn per step (None: all tokens),
    `soft` share of the base's distribution in the target, `precision` of the vocabulary products."""

    h: int = 9
    inner_size: int = 560
    token_size: int = 128
    steps: int = 2000
    positions: int = 2048
    heads_per_step: int = 4
    vocabulary: int | None = 8192
    negatives: int = 1024
    soft: float = 0.5
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    held_out: float = 0.03
    evaluate_every: int = 200
    seed: int = 0
    precision: str = "auto"

    def check(self) -> None:
        """Raises `RescoreError` for the first option that is out of its range."""
        for name, least in (
            ("h", 2), ("inner_size", 1), ("token_size", 0), ("steps", 1), ("positions", 1), ("heads_per_step", 1),
            ("vocabulary", 1), ("negatives", 0), ("warmup", 0), ("evaluate_every", 1), ("seed", 0), ("weight_decay", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise RescoreError(f"{name} = {value}; it must be at least {least}")
        if not 0 <= self.soft <= 1:
            raise RescoreError(f"soft = {self.soft}; it is a share, from 0 to 1")
        if not 0 < self.held_out < 1:
            raise RescoreError(f"held_out = {self.held_out}; it is a share, above 0 and below 1")
        if not 0 < self.learning_rate < math.inf:
            raise RescoreError(f"learning_rate = {self.learning_rate}; it must be above 0")
        if self.precision not in ("auto", *PRECISIONS):
            raise UnknownNameError("precision", self.precision, ("auto", *PRECISIONS))


@dataclass(frozen=True)
class HeldOutAccuracy:
    """On held-out positions: `top[n][i]` = share where the token is among head i+1's best n (list of length h);
    `accepted` = mean accepted prefix of the arg-max draft, `accepted_16` = of the best path in the top 16."""

    top: dict[int, list[float]]
    accepted: float
    accepted_16: float


class _SoftCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `states @ projection.T` against mixed targets, without keeping the logits.

    The projection is frozen, so the gradient to the states is (softmax - target) @ projection, computed chunk by chunk
    while the logits are at hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,  # [n, d]
        projection: torch.Tensor,  # [v, d]
        targets: torch.Tensor,  # [n], place in the vocabulary subset or -1
        teacher: torch.Tensor,  # [n, v] probabilities
        soft: float,
    ) -> torch.Tensor:
        gradient = torch.empty_like(states)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for start in range(0, len(states), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = (states[rows].to(projection.dtype) @ projection.T).float()
            log_normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
            known = targets[rows] >= 0
            hard = (1.0 - soft) * known.float()
            place = targets[rows].clamp(min=0)[:, None]
            wanted = teacher[rows].float() * (soft * known.float())[:, None]
            wanted.scatter_add_(1, place, hard[:, None])
            mass = wanted.sum(-1, keepdim=True)
            total += (mass * log_normaliser).sum() - (wanted * logits).sum()
            error = torch.exp(logits - log_normaliser).mul_(mass).sub_(wanted)
            gradient[rows] = (error.to(projection.dtype) @ projection).to(states.dtype)
        count = max(1, len(states))
        ctx.save_for_backward(gradient / count)
        return total / count

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None


class HeadTrainer:
    """One training: data, heads, optimiser. `train` runs it; `evaluate` measures the heads as they are.

    `initial` is a folder of heads to start from instead of untrained ones: the same h, at least this inner size (the
    units that weigh most stay), this token size or none.
    """

    def __init__(
        self, base: BaseLM, data: Sequence[HeadData], options: TrainingOptions, *, initial: Path | None = None
    ) -> None:
        options.check()
        self.dtype = _precision(options.precision, base.device)
        # What `auto` stands for depends on the machine; the record and a resumed run need the precision itself.
        options = dataclasses.replace(options, precision=str(self.dtype).removeprefix("torch."))
        self.base, self.data, self.options = base, list(data), options
        segments = [(place, int(a), int(b)) for place, d in enumerate(self.data) for a, b in d.segments() if b - a > 1]
        if len(segments) < 2:
            raise InvalidDataError("the corpus has fewer than two segments of text; heads need more to learn from")
        order = np.random.default_rng([options.seed, 0xDA7A]).permutation(len(segments))
        held = max(1, min(int(len(segments) * options.held_out), len(segments) - 1))
        self.held_out = _until(HELD_OUT_POSITIONS, [segments[i] for i in order[:held]])
        self.segments = [segments[i] for i in order[held:]]
        self.sizes = np.array([b - a for _, a, b in self.segments])
        config = BlockHeadsConfig(
            h=options.h,
            hidden_size=base.hidden_size,
            inner_size=options.inner_size,
            vocab_size=base.vocab_size,
            base_name=base.identity.name,
            tokenizer_sha256=base.identity.tokenizer_sha256,
            token_size=options.token_size,
        )
        torch.manual_seed(options.seed)
        self.heads = BlockHeads(config).to(base.device)
        self.initial_sha256: str | None = None
        if initial is not None:
            self._start_from(initial)
        self.optimizer = torch.optim.AdamW(
            self.heads.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.98)
        )
        self.frequent = self._frequent_tokens()
        self.weight = self._projection()
        self.step = 0

    def _start_from(self, folder: Path) -> None:
        earlier = load_heads(str(folder), self.base.identity, device=self.base.device)
        found, wanted = earlier.config, self.heads.config
        if (
            found.h != wanted.h
            or found.inner_size < wanted.inner_size
            or found.token_size not in (0, wanted.token_size)
        ):
            raise IncompatibleError(
                f"the heads in {folder} have h = {found.h}, inner size {found.inner_size} and token size "
                f"{found.token_size}; they can't become heads with {wanted.h}, {wanted.inner_size}, {wanted.token_size}"
            )
        weights = earlier.state_dict()
        if found.inner_size > wanted.inner_size:  # the units that weigh least go
            size = weights["inner.weight"].norm(dim=1) * weights["outer.weight"].norm(dim=2)  # [h-1, inner]
            kept = size.topk(wanted.inner_size, dim=1).indices.sort(dim=1).values
            for name, inner_last in (("inner.weight", True), ("outer.weight", False), ("token.weight", True)):
                if name in weights:
                    index = kept[:, None, :] if inner_last else kept[:, :, None]
                    weights[name] = torch.take_along_dim(weights[name], index, dim=2 if inner_last else 1)
            weights["inner.bias"] = torch.take_along_dim(weights["inner.bias"], kept, dim=1)
        self.heads.load_state_dict({**self.heads.state_dict(), **weights})
        self.initial_sha256 = heads_sha256(folder)

    def _projection(self) -> torch.Tensor:
        """The base's vocabulary projection `[vocab, d]`, which must be all that makes logits of states."""
        weight: torch.Tensor = self.base.output_embeddings.weight.detach()
        # Large: a cap bends large logits only.
        probe = torch.full((1, self.base.hidden_size), 100.0, dtype=weight.dtype, device=weight.device)
        if not torch.allclose(self.base.project(probe), probe @ weight.T, rtol=1e-2, atol=1e-2):
            name = self.base.identity.name
            raise IncompatibleError(f"{name} scales, caps or shifts its logits; heads can't be trained on that yet")
        return weight.to(self.dtype)

    def _frequent_tokens(self) -> np.ndarray:
        counts = sum(np.bincount(d.targets, minlength=self.base.vocab_size) for d in self.data)
        limit = self.options.vocabulary or self.base.vocab_size
        return np.sort(np.argsort(-np.asarray(counts), kind="stable")[:limit])

    def _draw_vocabulary(self, rng: np.random.Generator) -> np.ndarray:
        if len(self.frequent) == self.base.vocab_size:
            return self.frequent
        others = np.setdiff1d(np.arange(self.base.vocab_size), self.frequent)
        extra = rng.choice(others, min(self.options.negatives, len(others)), replace=False)
        return np.concatenate([self.frequent, extra])

    def _batch(self, segments: Sequence[tuple[int, int, int]]) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """States `[n, d]`, targets `[n]` and each row's distance to its segment's end `[n]`."""
        states = np.concatenate([self.data[p].states[a:b] for p, a, b in segments])
        targets = np.concatenate([self.data[p].targets[a:b] for p, a, b in segments])
        remaining = np.concatenate([np.arange(b - a, 0, -1) for _, a, b in segments])
        return torch.from_numpy(states).to(self.base.device).float(), targets, remaining

    def _rows(self, tokens: np.ndarray) -> torch.Tensor:
        """The projection's rows of the tokens that head 1 chose, float32 `[n, d]`."""
        return self.weight[torch.from_numpy(tokens.astype(np.int64)).to(self.base.device)].float()

    def _loss(self, step: int) -> torch.Tensor:
        options = self.options
        rng = np.random.default_rng([options.seed, step])
        chosen = rng.permutation(len(self.segments))[: max(1, 4 * options.positions // int(self.sizes.mean()) + 1)]
        segments = _until(options.positions, [self.segments[i] for i in chosen])
        states, targets, remaining = self._batch(segments)
        tokens = self._draw_vocabulary(rng)
        projection = self.weight[torch.from_numpy(tokens).to(self.base.device)]  # [v, d]
        place_of = np.full(self.base.vocab_size, -1, dtype=np.int64)
        place_of[tokens] = np.arange(len(tokens))
        places = torch.from_numpy(place_of[targets]).to(self.base.device)
        with torch.no_grad():
            chunks = ((rows.to(self.dtype) @ projection.T).float() for rows in states.split(CHUNK_ROWS))
            teacher = torch.cat([torch.softmax(logits, -1).to(self.dtype) for logits in chunks])  # [n, v]
        odds = 1.0 / np.arange(2, options.h + 1)
        count = min(options.heads_per_step, options.h - 1)
        heads = np.sort(rng.choice(options.h - 1, count, replace=False, p=odds / odds.sum()))
        outputs = self.heads(states, self._rows(targets), heads.tolist())  # [count, n, d]
        losses = []
        for output, head in zip(outputs, heads.tolist(), strict=True):
            ahead = head + 1
            rows = torch.from_numpy(np.flatnonzero(remaining > ahead)).to(self.base.device)
            if len(rows):
                goals = places[rows + ahead], teacher[rows + ahead], options.soft
                losses.append(_SoftCrossEntropy.apply(output[rows], projection, *goals))  # type: ignore[no-untyped-call]
        return torch.stack(losses).sum() if losses else outputs.sum() * 0.0

    def train(
        self,
        out: Path,
        *,
        progress: Callable[[int, int, float], None] | None = None,
        evaluated: Callable[[int, int, HeldOutAccuracy], None] | None = None,
    ) -> HeldOutAccuracy:
        """Trains to the last step, writing checkpoints, the log and at the end the heads to `out`.

        Goes on from a checkpoint in `out` if its options and data are the same (else `IncompatibleError` shows the
        difference). A loss or gradient that is not a number stops the training (`RescoreError`) with the last good
        checkpoint kept. `progress(step, steps, loss)` is called after every step, `evaluated(step, steps, accuracy)`
        after every checkpoint; an exception from one of them interrupts.
        """
        options = self.options
        with writing(out):  # a place that can't be written to shows now, not at the first checkpoint
            out.mkdir(parents=True, exist_ok=True)
        self._resume(out)
        accuracy = None
        while self.step < options.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = options.learning_rate * _schedule(self.step, options)
            loss = self._loss(self.step)
            value = float(loss.detach())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(self.heads.parameters(), 1.0))
            if not math.isfinite(value + norm):
                raise RescoreError(
                    f"the loss is {value} and its gradient {norm} at step {self.step + 1}; {out} keeps its last "
                    f"checkpoint; begin again with a lower learning rate and another --out"
                )
            self.optimizer.step()
            self.step += 1
            if progress:
                progress(self.step, options.steps, value)
            if self.step % options.evaluate_every == 0 or self.step == options.steps:
                accuracy = self.evaluate()
                record = {"step": self.step, "loss": value, **dataclasses.asdict(accuracy)}
                with writing(out), open_appending(out / LOG_FILE) as stream:
                    append_json_line(stream, record)
                self._checkpoint(out)
                if evaluated:
                    evaluated(self.step, options.steps, accuracy)
        accuracy = accuracy or self.evaluate()
        self.heads.save(out)
        write_json(out / "training.json", {**self._settings(), "held_out": dataclasses.asdict(accuracy)})
        return accuracy

    @torch.no_grad()
    def evaluate(self) -> HeldOutAccuracy:
        """Accuracy on the held-out segments, over the whole vocabulary."""
        hits = {n: np.zeros(self.options.h) for n in ACCURACY_AT}
        counts = np.zeros(self.options.h)
        accepted = {1: 0.0, 16: 0.0}
        states, targets, remaining = self._batch(self.held_out)
        h = self.options.h
        for start in range(0, len(states), 256):
            rows = np.arange(start, min(start + 256, len(states)))
            block = states[rows]
            every = torch.cat([block[None], self.heads(block, self._rows(targets[rows]))]).to(self.dtype)  # [h, n, d]
            best = torch.stack([(x @ self.weight.T).topk(max(ACCURACY_AT), dim=-1).indices for x in every], dim=1)
            wanted = np.stack([targets[np.minimum(rows + i, len(targets) - 1)] for i in range(h)], axis=1)
            there = remaining[rows][:, None] > np.arange(h)  # [n, h]
            match = (best.cpu().numpy() == wanted[..., None]) & there[..., None]  # [n, h, 16]
            match[:, 0, 0] = True  # head 1 is the base LM: what it chose is the target
            counts += there.sum(0)
            for n in ACCURACY_AT:
                hits[n] += match[:, :, :n].any(-1).sum(0)
            for n in accepted:
                accepted[n] += np.cumprod(match[:, :, :n].any(-1), axis=1).sum()
        total = len(states)
        return HeldOutAccuracy(
            {n: (hits[n] / np.maximum(counts, 1)).round(4).tolist() for n in ACCURACY_AT},
            round(float(accepted[1]) / total, 4),
            round(float(accepted[16]) / total, 4),
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "options": dataclasses.asdict(self.options),
            "initial_sha256": self.initial_sha256,
            "base": dataclasses.asdict(self.base.identity),
            "data": [{"source": d.source, "sha256": d.sha256, "tokens": len(d)} for d in self.data],
        }

    def _checkpoint(self, out: Path) -> None:
        tensors = {f"heads.{name}": value.detach() for name, value in self.heads.state_dict().items()}
        for name, parameter in self.heads.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = self.optimizer.state[parameter][key]
        metadata = {"state": json.dumps({"step": self.step, **self._settings()})}
        with atomic_file(out / CHECKPOINT_FILE) as temporary:
            temporary.write_bytes(to_bytes({n: v.cpu().contiguous() for n, v in tensors.items()}, metadata=metadata))

    def _resume(self, out: Path) -> None:
        path = out / CHECKPOINT_FILE
        if not path.is_file():
            return
        try:
            with safe_open(path, framework="pt", device=str(self.base.device)) as stream:
                state = json.loads((stream.metadata() or {})["state"])
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InvalidDataError(f"can't read the checkpoint {path}; remove it to begin again ({error})") from error
        settings = json.loads(json.dumps(self._settings()))
        if changed := changed_settings(state, settings):
            raise IncompatibleError(
                f"{out} holds a training with other settings ({'; '.join(changed)}); use another --out"
            )
        self.heads.load_state_dict({n.removeprefix("heads."): v for n, v in tensors.items() if n.startswith("heads.")})
        self.step = state["step"]
        for name, parameter in self.heads.named_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }


def _until(positions: int, segments: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The first segments that hold `positions` positions, the last one cut."""
    taken, left = [], positions
    for place, start, end in segments:
        if left <= 0:
            break
        taken.append((place, start, min(end, start + left)))
        left -= end - start
    return taken


def _schedule(step: int, options: TrainingOptions) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    share = (step - options.warmup) / max(1, options.steps - options.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return PRECISIONS[name]
