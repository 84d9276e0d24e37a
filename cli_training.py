"""Commands that train: `generate-corpus` writes what is learned from; `train-heads`, `train-rescorer`,
`train-bigram`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Generic, TypeVar

import typer

from cli_options import Base, Device, Dtype, Heads, NewTokens, notify, numbers, progress_bar
from lattices.paths import encodable

if TYPE_CHECKING:
    from lm.base.model import BaseLM
    from lm.training.data import HeadData
    from lm.training.heads import HeldOutAccuracy
    from lm.training.rescorer import HeldOutText
    from lm.training.workers import Workers

Measured = TypeVar("Measured")  # what an evaluation of a training gives
MaxTokens = Annotated[int | None, typer.Option(help="Tokens taken of each text corpus, at most.")]
CacheGB = Annotated[float, typer.Option(help="Limit of a text corpus's cached states, in 10^9 bytes.")]
Precision = Annotated[str, typer.Option(help="float32, bfloat16, or auto: what the machine is fast in.")]

training = typer.Typer(rich_markup_mode=None)


def _read_corpora(
    model: BaseLM,
    corpora: list[Path],
    out: Path,
    max_tokens: int | None,
    cache_gb: float,
    precision: str,
    progress: Callable[[str, int, int], None],
) -> tuple[list[HeadData], Workers]:
    """The training data, and the processes that share the work; the first one runs the base over text, once."""
    from lm.training.data import read_head_data
    from lm.training.workers import start_workers

    encodable(out, "--out")
    workers = start_workers(model.device)
    if not workers.is_first:
        workers.wait()
    data = [
        read_head_data(
            model, path, out, max_tokens=max_tokens, cache_gb=cache_gb, precision=precision,
            progress=lambda done, total: progress("hidden states", done, total),
        )
        for path in corpora
    ]  # fmt: skip
    if workers.is_first:
        workers.wait()
    return data, workers


def _alone_in(out: Path, model: BaseLM) -> AbstractContextManager[None]:
    """Keeps the folder of a training to this one, from the first state that is kept there on: the first of several
    processes holds it for all."""
    from lm.locks import writing_to
    from lm.training.workers import start_workers

    return writing_to(out) if start_workers(model.device).is_first else nullcontext()


class _Told(Generic[Measured]):
    """What a training tells: the loss on its bar, and on a line of its own what `held_out` says of each evaluation."""

    def __init__(
        self, progress: Callable[[str, int, int], None], workers: Workers, held_out: Callable[[Measured], str]
    ) -> None:
        self._show, self._workers, self._held_out = progress, workers, held_out

    def progress(self, step: int, total: int, loss: float) -> None:
        """See `Trainer.train`."""
        self._show(f"train, loss {loss:.3f}", step, total)

    def evaluated(self, step: int, total: int, measured: Measured) -> None:
        """See `Trainer.train`."""
        if self._workers.is_first:
            notify(f"step {step} of {total}, {self._held_out(measured)}")


@training.command(name="generate-corpus")
def generate_corpus_command(
    prompts: Annotated[
        Path, typer.Option(help='JSON lines {"prompt", "chat"} (or CSV, Parquet ...) or text, a prompt a line.')
    ],
    out: Annotated[Path, typer.Option(help="Folder for the corpus; resumable.")],
    base: Base = "smollm2-135m",
    max_new_tokens: NewTokens = 96,
    max_prompt_tokens: Annotated[int, typer.Option(help="Cut prompts to this many tokens.")] = 384,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded side by side.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy; above: tokens are drawn.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Write the base LM's own output for many prompts: what block heads and rescorers learn from."""
    from lm.base.catalog import load_base
    from lm.base.corpus import GenerationOptions, generate_corpus, read_prompts
    from lm.base.machine import measure_limits

    model = load_base(base, dtype=dtype, device=device)
    chosen = read_prompts(prompts, default_chat=model.is_chat)
    with progress_bar() as progress:
        summary = generate_corpus(
            model, chosen, out,
            GenerationOptions(
                max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens, batch_size=batch_size,
                temperature=temperature, seed=seed,
            ),
            progress=lambda done, total: progress("generate", done, total),
        )  # fmt: skip
    told = f"{summary.examples} examples ({summary.made} new, {summary.duplicates} duplicates)"
    print(f"{summary.path}: {told}, {summary.output_tokens} output tokens")
    if summary.made:
        limits = measure_limits(model.device, model.dtype)
        print(
            f"{summary.decoded / summary.seconds:.0f} output tokens a second: "
            f"{summary.work.flops / summary.seconds / limits.flops:.0%} of the {dtype} FLOPs and "
            f"{summary.work.bytes_read / summary.seconds / limits.bytes_read:.0%} of the memory bandwidth "
            "that this machine reaches at best"
        )


@training.command(name="train-heads")
def train_heads_command(
    corpus: Annotated[
        list[Path], typer.Option(help="Folder of generate-corpus, .jsonl or .csv of pairs, or text; several.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the heads; resumable.")],
    base: Base = "smollm2-135m",
    h: Annotated[int, typer.Option(help="Block length: h - 1 heads are trained.")] = 9,
    architecture: Annotated[
        str, typer.Option(help="feed_forward, shared (one hidden layer for all), medusa, or sequential (Hydra-like).")
    ] = "feed_forward",
    inner_size: Annotated[
        int | None, typer.Option(help="Width of the hidden layer; 560 by default, not for medusa.")
    ] = None,
    token_size: Annotated[int, typer.Option(help="Width in which heads see drafted tokens; 0: not at all.")] = 128,
    blocks: Annotated[int, typer.Option(help="Residual blocks of a medusa head.")] = 1,
    initial: Annotated[
        Path | None, typer.Option(help="Folder of heads to start from; sequential from feed_forward ones, too.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    positions: Annotated[int, typer.Option(help="Positions per step.")] = 2048,
    heads_per_step: Annotated[int, typer.Option(help="Heads in a step's loss, drawn anew each time; 0: all.")] = 4,
    head_weights: Annotated[
        str | None, typer.Option(help="Weights of heads 2 to h in the loss, like 1,0.8,0.6; equal by default.")
    ] = None,
    vocabulary: Annotated[int, typer.Option(help="Most frequent tokens in the loss; 0: all.")] = 8192,
    soft: Annotated[float, typer.Option(help="Share of the base's own distribution in the target, 0 to 1.")] = 0.5,
    tune: Annotated[
        str, typer.Option(help="none: the base is frozen; lora or full: it is fine-tuned with the heads.")
    ] = "none",
    lora_rank: Annotated[
        int | None, typer.Option(help="Rank of the base's changes (tune lora); 16 by default.")
    ] = None,
    tuned_layers: Annotated[
        int | None, typer.Option(help="Only so many of a tuned base's last layers: cheaper steps. Default: all.")
    ] = None,
    base_learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of a tuned base; 5e-4 for lora, 3e-5 for full.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for a tuned base, more time.")
    ] = False,
    micro_batch: Annotated[int, typer.Option(help="Tokens that a tuned base reads at a time.")] = 4096,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate (AdamW, cosine).")] = 1e-3,
    evaluate_every: Annotated[int, typer.Option(help="Steps between checkpoints with held-out accuracy.")] = 200,
    weights: Annotated[
        str, typer.Option(help="How the heads are stored: float16, or int8 (half the size).")
    ] = "float16",
    held_out: Annotated[
        Path | None,
        typer.Option(help="Corpus to measure on (4,096 tokens of it), never trained on; default: a share of --corpus."),
    ] = None,
    max_tokens: MaxTokens = None,
    cache_gb: CacheGB = 20.0,
    precision: Precision = "auto",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Device = "auto",
) -> None:
    """Train block heads, on a frozen base LM or together with it. Several GPUs: torchrun --no-python rescore ..."""
    from lm.base.catalog import load_base
    from lm.heads.block_heads import read_config
    from lm.training.data import check_there
    from lm.training.heads import HeadTrainer, TrainingOptions

    chosen = TrainingOptions(
        h=h, architecture=architecture, inner_size=inner_size, token_size=token_size, blocks=blocks, steps=steps,
        positions=positions, micro_batch=micro_batch, heads_per_step=heads_per_step or None,
        head_weights=tuple(numbers("--head-weights", head_weights, float)) if head_weights else None,
        vocabulary=vocabulary or None, soft=soft, tune=tune, lora_rank=lora_rank, tuned_layers=tuned_layers,
        base_learning_rate=base_learning_rate, gradient_checkpointing=gradient_checkpointing,
        learning_rate=learning_rate, evaluate_every=evaluate_every, seed=seed, precision=precision, stored=weights,
    )  # fmt: skip
    chosen.check()
    given = [*corpus, held_out] if held_out else corpus
    check_there(given)
    if initial:
        read_config(initial)
    model = load_base(base, device=device)
    with progress_bar() as progress, _alone_in(out, model):
        data, workers = _read_corpora(model, given, out, max_tokens, cache_gb, precision, progress)
        apart = data.pop() if held_out else None
        told: _Told[HeldOutAccuracy] = _Told(
            progress, workers, lambda of: f"accepted {of.accepted:.3f} (best of top 16: {of.accepted_16:.3f})"
        )
        trainer = HeadTrainer(model, data, chosen, initial=initial, held_out=apart)
        accuracy = trainer.train(out, progress=told.progress, evaluated=told.evaluated)
    if workers.is_first:
        from rescore.studies.tables import accuracy_table

        print(accuracy_table(accuracy).text())
        print(
            f"{out}: heads 2 to {h}; rescore eval "
            + (f"--base {base} --heads {out}" if tune == "none" else f"--base {out}")
        )


@training.command(name="train-rescorer")
def train_rescorer_command(
    size: Annotated[str, typer.Argument(help="neural-32m, neural-61m or neural-94m.")],
    corpus: Annotated[
        list[Path], typer.Option(help="Folder of generate-corpus, .jsonl or .csv of pairs, or text; several.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the rescorer; resumable.")],
    base: Annotated[str, typer.Option("--base", "--tokenizer", help="Base LM it is to rescore for.")] = "smollm2-135m",
    init: Annotated[str, typer.Option(help="base: the base's first layers, the last ones trained; scratch.")] = "base",
    tuned_layers: Annotated[int, typer.Option(help="Last layers that are trained, at most all (init base).")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps, at most.")] = 1000,
    positions: Annotated[int, typer.Option(help="Tokens per step, prompts included.")] = 4096,
    micro_batch: Annotated[int, typer.Option(help="Tokens at a time; fewer need less memory.")] = 4096,
    vocabulary: Annotated[int, typer.Option(help="Most frequent tokens in the loss; 0: all.")] = 16384,
    soft: Annotated[float, typer.Option(help="Share of the base's own distribution in the target, 0 to 1.")] = 0.5,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate (AdamW, cosine).")] = 5e-4,
    evaluate_every: Annotated[int, typer.Option(help="Steps between checkpoints with held-out perplexity.")] = 100,
    patience: Annotated[int, typer.Option(help="Checkpoints without a better one before it stops.")] = 5,
    max_tokens: MaxTokens = None,
    cache_gb: CacheGB = 20.0,
    precision: Precision = "auto",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Device = "auto",
) -> None:
    """Train a small neural LM that rescores drafts. Several GPUs: torchrun --no-python rescore ..."""
    from lm.base.catalog import load_base
    from lm.training.data import check_there
    from lm.training.rescorer import RescorerOptions, RescorerTrainer

    chosen = RescorerOptions(
        size=size, init=init, tuned_layers=tuned_layers, steps=steps, positions=positions, micro_batch=micro_batch,
        vocabulary=vocabulary or None, soft=soft, learning_rate=learning_rate, evaluate_every=evaluate_every,
        patience=patience, precision=precision, seed=seed,
    )  # fmt: skip
    chosen.check()
    check_there(corpus)
    model = load_base(base, device=device)
    with progress_bar() as progress, _alone_in(out, model):
        data, workers = _read_corpora(model, corpus, out, max_tokens, cache_gb, precision, progress)
        told: _Told[HeldOutText] = _Told(
            progress,
            workers,
            lambda of: f"held-out perplexity {of.perplexity:.3f} (the base's own: {of.base_perplexity:.3f})",
        )
        trainer = RescorerTrainer(model, data, chosen)
        text = trainer.train(out, progress=told.progress, evaluated=told.evaluated)
    if workers.is_first:
        print(
            f"{out}: held-out perplexity {text.perplexity:.3f} (the base's own {text.base_perplexity:.3f}), "
            f"{text.agreement:.1%} of {text.tokens} tokens are its first choice"
        )


@training.command(name="train-bigram")
def train_bigram_command(
    corpus: Annotated[
        list[Path], typer.Option(help="Folder of generate-corpus, .jsonl or .csv of pairs, or text; several.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the learned bigram; resumable.")],
    base: Base = "smollm2-135m",
    heads: Heads = None,
    rank: Annotated[int, typer.Option(help="Rank of the pair scores.")] = 128,
    k: Annotated[int, typer.Option(help="Tokens of each head in a lattice.")] = 16,
    rows: Annotated[int, typer.Option(help="Lattices taken of each corpus.")] = 30000,
    batch: Annotated[int, typer.Option(help="Lattices per step.")] = 512,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1500,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate (AdamW, cosine).")] = 2e-3,
    max_tokens: MaxTokens = None,
    cache_gb: CacheGB = 20.0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Device = "auto",
) -> None:
    """Train a learned bigram on the heads' lattices of a corpus."""
    from lm.base.catalog import load_base
    from lm.heads.block_heads import load_heads
    from lm.training.bigram import BigramOptions, BigramTrainer, lattices_of_corpus
    from lm.training.data import check_there

    chosen = BigramOptions(
        rank=rank, k=k, rows=rows, batch=batch, steps=steps, learning_rate=learning_rate, seed=seed
    )  # fmt: skip
    chosen.check()
    check_there(corpus)
    model = load_base(base, device=device)
    block_heads = load_heads(model, heads)
    with progress_bar() as progress, _alone_in(out, model):
        corpora, workers = _read_corpora(model, corpus, out, max_tokens, cache_gb, "auto", progress)
        data = [
            lattices_of_corpus(
                model, block_heads, source, k=k, rows=rows, seed=seed, cache=out,
                progress=lambda done, total: progress("lattices", done, total),
            )
            for source in corpora
        ]  # fmt: skip
        paths = BigramTrainer(model, data, chosen).train(
            out, progress=lambda step, total, loss: progress(f"train, loss {loss:.3f}", step, total)
        )
    if workers.is_first:
        print(
            f"{out}: {paths.loss:.4f} nats a held-out lattice, {paths.unrescored_loss:.4f} without it "
            f"({paths.lattices} lattices)"
        )
