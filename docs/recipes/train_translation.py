"""Trains a small translation model, from English to German: an encoder-decoder for two cores.

    python docs/recipes/train_translation.py TRAIN.jsonl DEV.jsonl OUT [--epochs N] [--size 256] [--layers 3]
    python docs/recipes/train_translation.py TRAIN.jsonl DEV.jsonl OUT --initial MODEL    # goes on from a model

TRAIN and DEV have lines `{"source": ..., "reference": ...}` (Multi30k: 29,000 and 1,014 of them). OUT becomes a model
folder as transformers reads it: a Marian of float32, with a vocabulary of 8,192 byte-level pieces of the training part,
that has the moving average of the weights at the epoch whose greedy translations of DEV have the best BLEU. Its
`log.jsonl` has a line for each epoch. Stop it whenever you like: the same command goes on at the epoch it was in.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import sacrebleu
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
VOCABULARY = 8192
MOST_TOKENS = 128  # of a sentence, with its end
BATCH = 3000  # target tokens of a step, padding included
SMOOTHING, DECAY = 0.1, 0.999
DROPOUT, DROPOUT_LATER, LATER = 0.3, 0.1, 15  # until that epoch and after it, where the model still learns too little
WARMUP, PEAK = 1000, 2e-3  # steps, learning rate
COOLDOWN = 0.25  # share of the epochs, the last ones, over which it falls to nothing
PARTS = 8  # of a file that are sorted by length apart

Pair = tuple[list[int], list[int]]


def read(path: Path) -> list[tuple[str, str]]:
    """Pairs of source and reference."""
    records = [json.loads(line) for line in path.open(encoding="utf-8")]
    return [(record["source"], record["reference"]) for record in records]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair pieces of these texts; every text ends with `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, END, UNKNOWN], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=MOST_TOKENS
    )


def make_model(tokenizer: PreTrainedTokenizerFast, size: int, layers: int) -> MarianMTModel:
    """A Marian with weights drawn anew."""
    config = MarianConfig(
        vocab_size=len(tokenizer), decoder_vocab_size=len(tokenizer), d_model=size, encoder_layers=layers,
        decoder_layers=layers, encoder_attention_heads=size // 64, decoder_attention_heads=size // 64,
        encoder_ffn_dim=4 * size, decoder_ffn_dim=4 * size, dropout=DROPOUT,  # within layers it costs a fifth of a step
        attention_dropout=0.0, activation_dropout=0.0, activation_function="relu", scale_embedding=True,
        max_position_embeddings=2 * MOST_TOKENS,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id, forced_eos_token_id=None, bos_token_id=None, init_std=size**-0.5,
        attn_implementation="eager",  # the others' gradients take longer on texts this short
    )  # fmt: skip
    model = MarianMTModel(config)
    model.generation_config.bad_words_ids = None
    model.generation_config.num_beams = 1
    return model


def batches(pairs: list[Pair], order: random.Random) -> Iterator[list[Pair]]:
    """All pairs once, those of like length together, in a new order."""
    shuffled = order.sample(pairs, len(pairs))
    size, found = math.ceil(len(shuffled) / PARTS), []
    for start in range(0, len(shuffled), size):
        batch: list[Pair] = []
        for pair in sorted(shuffled[start : start + size], key=lambda each: (len(each[1]), len(each[0]))):
            if batch and (len(batch) + 1) * max(len(pair[0]), len(pair[1])) > BATCH:
                found.append(batch)
                batch = []
            batch.append(pair)
        found.append(batch)
    order.shuffle(found)
    yield from found


def padded(rows: list[list[int]], pad: int) -> torch.Tensor:
    """Rows `[n, longest]`."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


@partial(torch.compile, dynamic=True)  # a third of a step, left to one pass over the logits after another
def cross_entropy(
    states: torch.Tensor, projection: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Mean over the states `[n, d]` with labels `[n]`."""
    logits = torch.nn.functional.linear(states, projection).float()
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)


def loss_of(model: MarianMTModel, batch: list[Pair]) -> torch.Tensor:
    """Mean cross-entropy of the reference's tokens, smoothed while the model learns."""
    pad, start = model.config.pad_token_id, model.config.decoder_start_token_id
    source, target = padded([s for s, _ in batch], pad), padded([t for _, t in batch], pad)
    before = torch.cat([torch.full((len(batch), 1), start), target[:, :-1]], dim=1)
    there = torch.arange(target.shape[1]) < torch.tensor([[len(t)] for _, t in batch])
    with torch.autocast("cpu", torch.bfloat16):
        states = model.model(input_ids=source, attention_mask=(source != pad).long(), decoder_input_ids=before)[0]
    halves = states[there].bfloat16(), model.lm_head.weight.bfloat16()
    return cross_entropy(*halves, target[there], SMOOTHING if model.training else 0.0)


@torch.inference_mode()
def translate(
    model: MarianMTModel, tokenizer: PreTrainedTokenizerFast, sources: list[list[int]], *, beams: int = 1
) -> list[str]:
    """Greedy translations, or by beam search."""
    texts: dict[int, str] = {}
    by_length = sorted(range(len(sources)), key=lambda place: len(sources[place]))
    for start in range(0, len(by_length), 64):
        places = by_length[start : start + 64]
        ids = padded([sources[place] for place in places], tokenizer.pad_token_id)
        mask = (ids != tokenizer.pad_token_id).long()
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=80, do_sample=False, num_beams=beams)
        texts.update(zip(places, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True))
    return [texts[place].strip() for place in range(len(sources))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("dev", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=28)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--initial", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    disable_progress_bar()
    torch.manual_seed(given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    train, dev = read(given.train), read(given.dev)
    if given.initial is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(given.initial)
        model = MarianMTModel.from_pretrained(given.initial, attn_implementation="eager")
    else:
        tokenizer = make_tokenizer([text for pair in train for text in pair])
        model = make_model(tokenizer, given.size, given.layers)
    model.generation_config.max_length = None

    def encode(pairs: list[tuple[str, str]]) -> list[Pair]:
        sides = [tokenizer(list(side), truncation=True)["input_ids"] for side in zip(*pairs, strict=True)]
        return list(zip(*sides, strict=True))

    pairs, held_out = encode(train), encode(dev)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0)
    done, best, step, seconds = 0, -1.0, 0, 0.0
    checkpoint = given.out / "checkpoint.pt"
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        average, done, best, step, seconds = (kept[key] for key in ("average", "done", "best", "step", "seconds"))
    for epoch in range(done, given.epochs):
        model.train()
        for layer in (
            *model.model.encoder.layers,
            *model.model.decoder.layers,
            model.model.encoder,
            model.model.decoder,
        ):
            layer.dropout = DROPOUT if epoch < LATER and given.initial is None else DROPOUT_LATER
        losses, begun = [], time.perf_counter()
        torch.manual_seed(given.seed + 1 + epoch)
        epoch_batches = list(batches(pairs, random.Random(given.seed * 1000 + epoch)))
        for place, batch in enumerate(epoch_batches):
            step += 1
            left = 1 - (epoch + place / len(epoch_batches)) / given.epochs
            for group in optimizer.param_groups:
                group["lr"] = PEAK * min(step / WARMUP, math.sqrt(WARMUP / step)) * min(1.0, left / COOLDOWN)
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay = min(DECAY, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    average[name].lerp_(value, 1 - decay)
            losses.append(loss.item())
        seconds += time.perf_counter() - begun
        last = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(average)
        model.eval()
        with torch.inference_mode():
            held = [float(loss_of(model, held_out[i : i + 64])) for i in range(0, len(held_out), 64)]
        bleu = sacrebleu.corpus_bleu(translate(model, tokenizer, [s for s, _ in held_out]), [[r for _, r in dev]]).score
        entry = {
            "epoch": epoch + 1, "steps": step, "train_loss": sum(losses) / len(losses),
            "held_out_loss": sum(held) / len(held), "held_out_bleu": bleu, "training_seconds": round(seconds),
        }  # fmt: skip
        if bleu > best:
            best = bleu
            model.save_pretrained(given.out)
            tokenizer.save_pretrained(given.out)
        model.load_state_dict(last)
        with (given.out / "log.jsonl").open("a") as log:
            print(json.dumps(entry), file=log)
        print(json.dumps(entry), flush=True)
        state = {"model": last, "optimizer": optimizer.state_dict(), "average": average}
        numbers = {"done": epoch + 1, "best": best, "step": step, "seconds": seconds}
        torch.save({**state, **numbers}, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)


if __name__ == "__main__":
    main()
