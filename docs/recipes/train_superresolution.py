"""Trains a small model of image super-resolution: 4 x 4 grey pixels in, the 16 x 16 that they were averaged from out.

    pip install scikit-image scikit-learn
    python docs/recipes/train_superresolution.py OUT [--minutes 60] [--seed 1]

The images are those that scikit-image and scikit-learn bring along (`IMAGES`; their licences stand in the help of
`skimage.data`'s functions and in `sklearn/datasets/images/README.txt`). Patches are cut from the training images at
several scales. OUT becomes a model folder as transformers reads it: a BART of float32 whose tokens 0 to 255 are
intensities, with the moving average of its weights. OUT/dev.jsonl and OUT/test.jsonl have patches of images that were
not trained on, for `rescore eval --task superresolution --data OUT/test.jsonl --base OUT`; OUT/log.jsonl has a line for
every evaluation. Stop it whenever you like: the same command goes on at the last evaluation.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from skimage import color, data
from skimage.transform import downscale_local_mean
from sklearn.datasets import load_sample_image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

TRAIN = (
    "astronaut",
    "camera",
    "brick",
    "grass",
    "gravel",
    "moon",
    "page",
    "coins",
    "rocket",
    "hubble_deep_field",
    "china",
)
DEV, TEST = ("flower",), ("chelsea", "coffee")
IMAGES = (*TRAIN, *DEV, *TEST)
OF_SKLEARN = ("china", "flower")
SIZE, LOW = 16, 4
LEVELS = 256
GAP = 8  # ids that nothing has: whoever takes white for a near token (--acceptance distance) must not meet the end
PAD, END, START = (LEVELS + GAP + place for place in range(3))
SCALES = (2, 3, 4)  # by which an image is shrunk before patches are cut
PEAK, WARMUP, DECAY = 1e-3, 500, 0.999
BATCH = 48
EVALUATE_EVERY = 250
HELD_OUT, TESTED = 64, 100  # patches
HIDDEN, SPREAD = 0.9, 2.0
INTENSITY, PLACE = 0.05, 0.5  # amplitudes in the embeddings as they begin


def image(name: str) -> np.ndarray:
    """An image in grey, float32 `[height, width]` in 0..255."""
    pixels = load_sample_image(f"{name}.jpg") if name in OF_SKLEARN else getattr(data, name)()
    grey = color.rgb2gray(pixels[..., :3]) if pixels.ndim == 3 else pixels / 255.0
    return (grey * 255).astype(np.float32)


def shrunk(pixels: np.ndarray) -> list[np.ndarray]:
    """The image at all scales, as numbers 0..255."""
    each = [downscale_local_mean(pixels, (scale, scale)) for scale in SCALES]
    return [np.clip(np.rint(one), 0, LEVELS - 1).astype(np.int64) for one in each if min(one.shape) >= 2 * SIZE]


def patches(images: list[np.ndarray], count: int, rng: np.random.Generator, *, flip: bool) -> np.ndarray:
    """Patches int64 `[count, SIZE, SIZE]` from places drawn evenly over all images."""
    share = np.array([one.size for one in images]) ** 0.5
    found = []
    for which in rng.choice(len(images), size=count, p=share / share.sum()):
        height, width = images[which].shape
        top, left = rng.integers(height - SIZE + 1), rng.integers(width - SIZE + 1)
        patch = images[which][top : top + SIZE, left : left + SIZE]
        if flip and rng.integers(2):
            patch = patch[:, ::-1]
        found.append(patch)
    return np.stack(found)


def low_of(high: np.ndarray) -> np.ndarray:
    """Of patches `[n, SIZE, SIZE]` the means of their squares, `[n, LOW, LOW]`."""
    step = SIZE // LOW
    return np.rint(high.reshape(len(high), LOW, step, LOW, step).mean((2, 4))).astype(np.int64)


def words(pixels: np.ndarray) -> str:
    """Pixels row by row, as text."""
    return " ".join(map(str, pixels.ravel().tolist()))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word for every intensity."""
    vocabulary = {str(level): level for level in range(LEVELS)} | {"<pad>": PAD, "</s>": END, "<s>": START}
    vocabulary |= {f"<{level}>": level for level in range(LEVELS, LEVELS + GAP)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<pad>"
    )


def make_model() -> BartForConditionalGeneration:
    """A BART with weights drawn anew, but for two things that it would take long to find out: near intensities begin
    alike, and so do the places, row and column, of a pixel and of the one that it was averaged into."""
    config = BartConfig(
        vocab_size=START + 1, d_model=128, encoder_layers=2, decoder_layers=4, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=512, decoder_ffn_dim=512, max_position_embeddings=SIZE * SIZE + 8,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=PAD, eos_token_id=END,
        bos_token_id=START, decoder_start_token_id=START, forced_eos_token_id=None, scale_embedding=True,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.generation_config.max_length = None
    step = SIZE // LOW
    given = (np.arange(LOW * LOW)[:, None] // [LOW, 1] % LOW + 0.5) * step - 0.5  # the middles of their squares
    made = np.arange(SIZE * SIZE)[:, None] // [SIZE, 1] % SIZE
    with torch.no_grad():
        model.get_input_embeddings().weight[:LEVELS] = INTENSITY * waves(np.arange(LEVELS), config.d_model, LEVELS)
        for stack, places in ((model.model.encoder, given), (model.model.decoder, made)):
            both = [waves(places[:, axis], config.d_model // 2, SIZE) for axis in range(2)]
            first = stack.embed_positions.offset
            stack.embed_positions.weight[first : first + len(places)] = PLACE * torch.cat(both, dim=1)
    return model


def waves(at: np.ndarray, width: int, span: int) -> torch.Tensor:
    """Sines and cosines of numbers within a span, float32 `[n, width]`: what is near is alike."""
    lengths = np.geomspace(4, 4 * span, width // 2)
    angles = 2 * np.pi * at[:, None] / lengths
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32))


def loss_of(
    model: BartForConditionalGeneration, high: np.ndarray, *, rng: np.random.Generator | None = None
) -> torch.Tensor:
    """Mean cross-entropy of pixels and the end. rng: in training. Then some of the pixels before are hidden from the
    decoder, of each patch another share up to `HIDDEN`: a model that sees them all copies the last one and forgets the
    image it is given. And the intensities beside a pixel's are nearly as good (a normal curve of `SPREAD`), so that the
    likeliest one, which greedy decoding takes, is not one that happened to be seen."""
    ends = np.full((len(high), 1), END)
    source = torch.from_numpy(np.concatenate([low_of(high).reshape(len(high), -1), ends], axis=1))
    target = torch.from_numpy(np.concatenate([high.reshape(len(high), -1), ends], axis=1))
    before = torch.cat([torch.full((len(high), 1), START), target[:, :-1]], dim=1)
    if rng is not None:
        hidden = rng.random(before.shape) < HIDDEN * rng.random((len(high), 1))
        before = before.masked_fill(torch.from_numpy(hidden), START)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=source, decoder_input_ids=before).logits
    logits, target = logits.float().flatten(0, 1), target.flatten()
    if rng is None:
        return torch.nn.functional.cross_entropy(logits, target)
    return torch.nn.functional.cross_entropy(logits, SPREAD_TARGETS[target])


def spread_targets() -> torch.Tensor:
    """What is to be learned where a token stands, `[tokens, tokens]`."""
    levels = torch.arange(LEVELS, dtype=torch.float32)
    targets = torch.eye(START + 1)
    targets[:LEVELS, :LEVELS] = torch.softmax(-0.5 * ((levels[:, None] - levels) / SPREAD) ** 2, dim=1)
    return targets


SPREAD_TARGETS = spread_targets()


@torch.inference_mode()
def enlarged(model: BartForConditionalGeneration, high: np.ndarray) -> np.ndarray:
    """Greedy output for the low resolution of patches, int64 `[n, SIZE, SIZE]`; 0 where it ends too early."""
    ends = np.full((len(high), 1), END)
    source = torch.from_numpy(np.concatenate([low_of(high).reshape(len(high), -1), ends], axis=1))
    out = model.generate(input_ids=source, max_new_tokens=SIZE * SIZE, do_sample=False, num_beams=1)[:, 1:]
    pixels = np.zeros((len(high), SIZE * SIZE), dtype=np.int64)
    pixels[:, : out.shape[1]] = np.where(out.numpy() < LEVELS, out.numpy(), 0)
    return pixels.reshape(high.shape)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over patches, in dB."""
    errors = ((one - other) ** 2).mean((1, 2)).clip(min=0.25)
    return float((10 * np.log10((LEVELS - 1) ** 2 / errors)).mean())


def write(path: Path, high: np.ndarray, names: str) -> None:
    with path.open("w") as stream:
        for number, patch in enumerate(high):
            record = {"id": f"{names}-{number}", "low": words(low_of(patch[None])[0]), "high": words(patch)}
            print(json.dumps(record), file=stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    disable_progress_bar()
    torch.manual_seed(given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    train = [one for name in TRAIN for one in shrunk(image(name))]
    held_out = {}
    for number, (part, names, count) in enumerate((("dev", DEV, HELD_OUT), ("test", TEST, TESTED))):
        images = [one for name in names for one in shrunk(image(name))]
        held_out[part] = patches(images, count, np.random.default_rng([given.seed, number]), flip=False)
        write(given.out / f"{part}.jsonl", held_out[part], "-".join(names))
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.save_pretrained(given.out)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    step, seconds = 0, 0.0
    checkpoint = given.out / "checkpoint.pt"
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        average, step, seconds = kept["average"], kept["step"], kept["seconds"]
    while seconds < 60 * given.minutes:
        losses, begun = [], time.perf_counter()
        model.train()
        for _ in range(EVALUATE_EVERY):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = PEAK * min(step / WARMUP, math.sqrt(WARMUP / step))
            rng = np.random.default_rng([given.seed, 99, step])
            loss = loss_of(model, patches(train, BATCH, rng, flip=True), rng=rng)
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
            held = loss_of(model, held_out["dev"]).item()
        made, low = enlarged(model, held_out["dev"]), low_of(held_out["dev"])
        blocks = low.repeat(SIZE // LOW, axis=1).repeat(SIZE // LOW, axis=2)
        entry = {
            "step": step, "patches": step * BATCH, "train_loss": sum(losses) / len(losses), "held_out_loss": held,
            "held_out_psnr": psnr(made, held_out["dev"]), "psnr_of_blocks": psnr(blocks, held_out["dev"]),
            "training_seconds": round(seconds),
        }  # fmt: skip
        model.save_pretrained(given.out)
        model.load_state_dict(last)
        with (given.out / "log.jsonl").open("a") as log:
            print(json.dumps(entry), file=log)
        print(json.dumps(entry), flush=True)
        state = {"model": last, "optimizer": optimizer.state_dict(), "average": average}
        torch.save({**state, "step": step, "seconds": seconds}, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)


if __name__ == "__main__":
    main()
