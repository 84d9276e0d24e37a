"""Trainings from corpora and a base LM's name to the folder of what was trained: what the `train-...` commands do.

With several processes (`lm.training.workers`) each of them calls the same function, and all but the first get None.
Ctrl-C leaves the last checkpoint, from which the same call goes on. Heavy libraries are imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from lattices.errors import RescoreError
from lattices.paths import encodable
from lm.locks import writing_to
from lm.options import Heads
from lm.training.options import BigramOptions, RescorerOptions, TrainingOptions, TrainingText

if TYPE_CHECKING:
    from lm.base.model import BaseLM
    from lm.training.bigram import HeldOutPaths
    from lm.training.data import HeadData
    from lm.training.heads import HeldOutAccuracy
    from lm.training.rescorer import HeldOutText
    from lm.training.trainer import Trainer
    from lm.training.workers import Workers

Progress = Callable[[str, int, int], None]  # what is being done, done, total
Notify = Callable[[str], None]  # takes a line for the user
HeldOut = Annotated[
    Path | None,
    "Corpus to measure on (its first thousands of tokens), never trained on; default: a share of --corpus.",
    "--held-out-corpus",
]
Measured = TypeVar("Measured", bound=Any)  # what a trainer's evaluations give


@dataclass(frozen=True)
class _Session:
    """One training's base LM and folder, and what it reports."""

    base: BaseLM
    workers: Workers
    out: Path
    progress: Progress
    notify: Notify

    def read(
        self, text: TrainingText, held_out: Path | None = None, precision: str = "auto"
    ) -> tuple[list[HeadData], HeadData | None]:
        """The data to learn from, and of the corpus to measure on. The first process runs the base over text, once; the
        others wait for it."""
        from lm.training.data import read_head_data

        encodable(self.out, "--out")
        if not self.workers.is_first:
            self.workers.wait()
        data = [
            read_head_data(
                self.base, path, self.out, max_tokens=text.max_tokens, cache_gb=text.cache_gb, precision=precision,
                progress=lambda done, total: self.progress("hidden states", done, total),
            )
            for path in _corpora(text, held_out)
        ]  # fmt: skip
        if self.workers.is_first:
            self.workers.wait()
        return (data[:-1], data[-1]) if held_out else (data, None)

    def train(self, trainer: Trainer[Measured], line: Callable[[Measured], str] | None = None) -> Measured | None:
        """Trains, and gives the first process what was measured last; each evaluation is told by its `line`."""

        def step(step: int, total: int, loss: float) -> None:
            self.progress(f"train, loss {loss:.3f}", step, total)

        def evaluated(step: int, total: int, measured: Measured) -> None:
            if line and self.workers.is_first:
                self.notify(f"step {step} of {total}, {line(measured)}")

        measured = trainer.train(self.out, progress=step, evaluated=evaluated)
        return measured if self.workers.is_first else None


def _corpora(text: TrainingText, held_out: Path | None) -> list[Path]:
    """All that is read: to learn from, and last what is measured on, if that is a corpus apart."""
    return [*text.corpus, *([held_out] if held_out else [])]


@contextmanager
def _session(text: TrainingText, out: Path, progress: Progress | None, notify: Notify | None) -> Iterator[_Session]:
    """Loads the base LM. The first process keeps the folder to this training."""
    from lm.base.catalog import load_base
    from lm.training.workers import start_workers

    base = load_base(text.base, device=text.device)
    workers = start_workers(base.device)
    with writing_to(out) if workers.is_first else nullcontext():
        yield _Session(base, workers, out, progress or (lambda *_: None), notify or (lambda _: None))


def train_heads(
    text: TrainingText,
    out: Annotated[Path, "Folder for the heads; resumable."],
    options: TrainingOptions,
    *,
    initial: Annotated[Path | None, "Folder of heads to start from; sequential from feed_forward ones, too."] = None,
    held_out: HeldOut = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> HeldOutAccuracy | None:
    """Trains block heads, on a frozen base LM or together with it, into the folder `out`; resumable.

    `initial`: folder of heads to start from; `held_out`: a corpus to measure on instead of a share of the others.
    Raises `RescoreError` for what can't be used, and as `Trainer.train`.
    """
    from lm.heads.block_heads import read_config
    from lm.training.data import check_there
    from lm.training.heads import HeadTrainer

    options.check()
    check_there(_corpora(text, held_out))
    if initial:
        read_config(initial)
    with _session(text, out, progress, notify) as session:
        data, measured_on = session.read(text, held_out, options.precision)
        trainer = HeadTrainer(session.base, data, options, initial=initial, held_out=measured_on)
        return session.train(trainer, lambda of: f"accepted {of.accepted:.3f} (best of top 16: {of.accepted_16:.3f})")


def train_rescorer(
    text: TrainingText,
    out: Annotated[Path, "Folder for the rescorer; resumable."],
    options: RescorerOptions,
    *,
    heads: Heads = None,
    held_out: HeldOut = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> HeldOutText | None:
    """Trains a small neural LM that rescores drafts, into the folder `out`; resumable. Arguments and errors as of
    `train_heads`; heads: whose tokens it learns to choose among (None: those shipped), with `lattice`."""
    from lm.heads.block_heads import load_heads
    from lm.training.data import check_there
    from lm.training.rescorer import RescorerTrainer

    options.check()
    if heads and not options.lattice:
        raise RescoreError("heads are for a loss over their choices; add --lattice 0.5, or leave out --heads")
    check_there(_corpora(text, held_out))
    with _session(text, out, progress, notify) as session:
        block_heads = load_heads(session.base, heads) if options.lattice else None
        data, measured_on = session.read(text, held_out, options.precision)
        return session.train(
            RescorerTrainer(session.base, data, options, heads=block_heads, held_out=measured_on),
            lambda of: f"held-out perplexity {of.perplexity:.3f} (the base's own: {of.base_perplexity:.3f})",
        )


def train_bigram(
    text: TrainingText,
    out: Annotated[Path, "Folder for the learned bigram; resumable."],
    options: BigramOptions,
    *,
    heads: Heads = None,
    progress: Progress | None = None,
) -> HeldOutPaths | None:
    """Trains a learned bigram on the lattices that `heads` (None: those shipped) give for corpora, into `out`."""
    from lm.heads.block_heads import load_heads
    from lm.training.bigram import BigramTrainer, lattices_of_corpus
    from lm.training.data import check_there

    options.check()
    check_there(text.corpus)
    with _session(text, out, progress, None) as session:
        base = session.base
        block_heads = load_heads(base, heads)
        data = [
            lattices_of_corpus(
                base, block_heads, source, k=options.k, rows=options.rows, seed=options.seed, cache=out,
                progress=lambda done, total: session.progress("lattices", done, total),
            )
            for source in session.read(text)[0]
        ]  # fmt: skip
        return session.train(BigramTrainer(base, data, options))
