"""Training of rescorers on the tiny base: it learns, resumes, stops where it should, and adds up its parts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, files_of_at_most, refused, save_tiny_base
from safetensors.torch import load_file
from torch.nn import functional

from lattices.errors import IncompatibleError, InvalidDataError, OutputError
from lm.base.cache import TreeCache
from lm.base.catalog import load_base
from lm.heads.block_heads import load_heads
from lm.neural import model as neural
from lm.neural.model import (
    DeltaConfig,
    NeuralLM,
    NeuralSize,
    check_fits,
    find_neural,
    load_neural,
    save_delta,
    some_layers,
)
from lm.training import rescorer as rescorer_training
from lm.training.data import HeadData, read_head_data, tokens_read
from lm.training.rescorer import RescorerOptions, RescorerTrainer

TINY = "neural-tiny"
SMALL = RescorerOptions(
    size="neural-32m", steps=6, positions=240, micro_batch=120, vocabulary=None, negatives=8, learning_rate=3e-3,
    warmup=2, held_out=0.2, evaluate_every=2, precision="float32",
)  # fmt: skip
SCRATCH = dataclasses.replace(SMALL, size=TINY, init="scratch")
LOW_RANK = dataclasses.replace(SMALL, tuned_layers=0, lora_rank=3, learning_rate=1e-2)


class StopError(Exception):
    """An interruption from outside, like a kill."""


def change(of: RescorerOptions = SMALL, **options) -> RescorerOptions:
    return dataclasses.replace(of, **options)


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch):
    """A size that starts from scratch on a CPU in no time."""
    monkeypatch.setitem(neural.SIZES, TINY, NeuralSize(1, 16, 24, 1, 2))


@pytest.fixture(scope="module")
def data(tiny_base, tmp_path_factory) -> HeadData:
    """Ragged pairs: prompts and answers of different lengths."""
    folder = tmp_path_factory.mktemp("corpus")
    pairs = [{"prompt": "p" * (1 + i % 4), "response": "the cat sat on the mat, " * (1 + i % 3)} for i in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return read_head_data(tiny_base, folder / "pairs.jsonl", folder)


def interrupted_at(stop: int):
    def interrupt(step: int, *_: object) -> None:
        if step == stop:
            raise StopError

    return interrupt


def texts_of(trainer: RescorerTrainer, segments) -> Iterator[tuple[list[int], list[int], np.ndarray]]:
    """Context, targets and the base's states of segments, straight from the data."""
    for place, i, _, _ in segments:
        data = trainer.data[place]
        start, end = data.segments()[i]
        yield data.context(i).tolist(), data.targets[start:end].tolist(), data.states[start:end].astype(np.float32)


def plain_logits(trainer: RescorerTrainer, context: list[int], targets: list[int]) -> torch.Tensor:
    """The rescorer's logits before each target, by the model's own forward."""
    ids = torch.tensor([context + targets[:-1]])
    return trainer.model(input_ids=ids).logits[0, len(context) - 1 :].float()


class TestLoss:
    @pytest.mark.parametrize("options", [SMALL, SCRATCH], ids=["base", "scratch"])
    @pytest.mark.parametrize("soft", [0.0, 0.5, 1.0])
    def test_a_step_is_the_mean_over_the_targets_of_its_segments(self, tiny_base, data, options, soft):
        trainer = RescorerTrainer(tiny_base, [data], change(options, soft=soft))
        segments = trainer._batch(np.random.default_rng([options.seed, 3]))
        weight = tiny_base.output_embeddings.weight.float()
        losses = []
        for context, targets, states in texts_of(trainer, segments):
            logps = torch.log_softmax(plain_logits(trainer, context, targets), -1)
            teacher = torch.softmax(torch.from_numpy(states) @ weight.T, -1)
            goal = (1 - soft) * functional.one_hot(torch.tensor(targets), 257) + soft * teacher
            losses.append(-(goal * logps).sum(-1))
        found = sum(float(loss.detach()) for loss in trainer._losses(3))
        assert found == pytest.approx(float(torch.cat(losses).mean().detach()), rel=1e-4)

    @pytest.mark.parametrize("options", [SMALL, SCRATCH], ids=["base", "scratch"])
    @pytest.mark.parametrize("micro", [1, 160, 300])
    def test_micro_batches_give_the_step_of_one_batch(self, tiny_base, data, options, micro):
        def gradients(micro_batch: int) -> tuple[int, float, dict[str, torch.Tensor]]:
            trainer = RescorerTrainer(
                tiny_base, [data], change(options, positions=600, micro_batch=micro_batch, vocabulary=20)
            )
            total, count = 0.0, 0
            for loss in trainer._losses(1):
                loss.backward()
                total, count = total + float(loss.detach()), count + 1
            return count, total, {n: p.grad for n, p in trainer.parameters.items()}

        (one, whole, theirs), (several, parts, ours) = gradients(10_000), gradients(micro)
        assert one == 1 and several > 1 and parts == pytest.approx(whole, rel=1e-6)
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)

    def test_a_batch_holds_so_many_positions_with_its_padding(self, tiny_base, data):
        for positions in (1, 60, 120, 500, 10_000):
            trainer = RescorerTrainer(tiny_base, [data], change(positions=positions))
            for step in range(20):
                batch = trainer._batch(np.random.default_rng(step))
                longest = max(tokens_read(trainer.data, s) for s in batch)
                assert len(set(batch)) == len(batch) and set(batch) <= set(trainer.segments)
                assert len(batch) == 1 or longest * len(batch) <= positions
            assert positions > 1 or len(batch) == 1
        assert len(batch) == len(trainer.segments)

    def test_a_step_is_drawn_by_seed_and_number(self, tiny_base, data):
        trainer, other = (RescorerTrainer(tiny_base, [data], change(seed=seed, vocabulary=9)) for seed in (0, 1))
        losses = [sum(float(x.detach()) for x in t._losses(s)) for t, s in ((trainer, 3), (trainer, 3), (trainer, 4))]
        assert losses[0] == losses[1] != losses[2] and trainer.segments != other.segments

    def test_empty_segments_are_passed_over(self, tiny_base, data):
        ends = np.concatenate([data.ends[:3], data.ends[2:]])
        context_ends = np.concatenate([data.context_ends[:3], data.context_ends[2:]])
        holed = dataclasses.replace(data, ends=ends, context_ends=context_ends)
        trainer = RescorerTrainer(tiny_base, [holed], SMALL)
        assert all(s.targets for s in trainer.segments + trainer.held_out)
        assert len(trainer.segments) + len(trainer.held_out) == len(data.ends)


class TestHeldOut:
    @pytest.mark.parametrize("options", [SMALL, SCRATCH], ids=["base", "scratch"])
    def test_perplexity_and_agreement_by_plain_forwards(self, tiny_base, data, options):
        trainer = RescorerTrainer(tiny_base, [data], change(options, held_out=0.4))
        assert not set(trainer.held_out) & set(trainer.segments)
        weight = tiny_base.output_embeddings.weight.float()
        ours, base, agree = [], [], []
        for context, targets, states in texts_of(trainer, trainer.held_out):
            wanted = torch.tensor(targets)
            logits = plain_logits(trainer, context, targets)
            ours.append(functional.cross_entropy(logits, wanted, reduction="none"))
            base.append(functional.cross_entropy(torch.from_numpy(states) @ weight.T, wanted, reduction="none"))
            agree.append((logits.argmax(-1) == wanted).float())
        found = trainer.evaluate()
        loss = float(torch.cat(ours).mean().detach())
        assert found.loss == pytest.approx(loss, abs=1e-3)
        assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-3)
        assert found.base_perplexity == pytest.approx(math.exp(float(torch.cat(base).mean())), rel=1e-2)
        assert found.agreement == pytest.approx(float(torch.cat(agree).mean()), abs=1e-3)
        assert found.tokens == len(torch.cat(ours))

    def test_all_of_the_bases_layers_have_the_bases_perplexity(self, tiny_base, data, monkeypatch):
        monkeypatch.setitem(neural.SIZES, TINY, NeuralSize(2, 16, 24, 1, 2))
        found = RescorerTrainer(tiny_base, [data], change(size=TINY)).evaluate()
        assert found.perplexity == pytest.approx(found.base_perplexity, rel=2e-2)  # states are kept as float16

    def test_a_loss_beyond_what_a_perplexity_can_say(self):
        assert rescorer_training._perplexity(0.0) == 1.0
        assert math.isfinite(rescorer_training._perplexity(5000.0))


class TestTraining:
    @pytest.mark.parametrize("options", [SMALL, LOW_RANK, SCRATCH], ids=["base", "low-rank", "scratch"])
    def test_it_learns_and_is_found_again(self, tiny_base, data, tmp_path, options):
        """The result, loaded as a rescorer, has the held-out perplexity that was told."""
        trainer = RescorerTrainer(tiny_base, [data], change(options, steps=40, soft=0.0, evaluate_every=20, patience=9))
        before, losses = trainer.evaluate(), []
        after = trainer.train(tmp_path, progress=lambda _step, _steps, loss: losses.append(loss))
        assert np.mean(losses[-5:]) < 0.7 * losses[0] and after.loss < 0.7 * before.loss
        source = find_neural(str(tmp_path))
        check_fits(source, tiny_base.identity)
        loaded = load_neural(source, vocab_size=257, base_name=tiny_base.identity.name)
        assert (source.delta is None) == (options is SCRATCH)
        sums = []
        for context, targets, _ in texts_of(trainer, trainer.held_out):
            logits, _ = loaded.model.forward(torch.tensor([context + targets[:-1]]))
            sums.append(
                functional.cross_entropy(logits[0, len(context) - 1 :], torch.tensor(targets), reduction="none")
            )
        assert float(torch.cat(sums).mean()) == pytest.approx(after.loss, rel=1e-2)  # a delta is rounded to int8

    def test_only_the_last_layers_and_the_norm_move(self, tiny_base, data, tmp_path, monkeypatch):
        monkeypatch.setitem(neural.SIZES, TINY, NeuralSize(2, 16, 24, 1, 2))
        trainer = RescorerTrainer(tiny_base, [data], change(size=TINY, tuned_layers=1))
        trainer.train(tmp_path)
        assert all(name.startswith(("model.layers.1.", "model.norm.")) for name in trainer.parameters)
        whole = dict(tiny_base.model.named_parameters())
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, whole[name].float()) == (name not in trainer.parameters), name
        config = find_neural(str(tmp_path)).delta
        assert (config.size, config.layers, config.tuned_layers) == (TINY, (0, 1), 1)
        assert config.base_weights_sha256 == tiny_base.identity.weights_sha256

    def test_layers_below_the_tuned_ones_change_by_products_of_low_rank(self, tiny_base, data, tmp_path, monkeypatch):
        monkeypatch.setitem(neural.SIZES, TINY, NeuralSize(2, 16, 24, 1, 2))
        RescorerTrainer(tiny_base, [data], change(LOW_RANK, size=TINY, tuned_layers=1)).train(tmp_path)
        config = find_neural(str(tmp_path)).delta
        assert (config.layers, config.tuned_layers, config.lora_rank) == ((0, 1), 1, 3)
        stored = load_file(tmp_path / "model.safetensors")
        loaded = load_neural(find_neural(str(tmp_path)), vocab_size=257, base_name=tiny_base.identity.name)
        whole = dict(tiny_base.model.named_parameters())
        for name, parameter in loaded.model.model.named_parameters():
            moved = (parameter - whole[name]).float()
            if name.startswith("model.layers.0.") and parameter.ndim == 2:
                assert name not in stored and stored[name + ".up"].shape == (len(parameter), 3)
                assert torch.linalg.matrix_rank(moved, atol=1e-5) in (1, 2, 3), name
            else:
                assert bool(moved.any()) == (name in stored), name

    def test_any_of_the_bases_layers(self, tmp_path):
        """A rescorer of layers 0 and 2 of three is the base without the middle one, trained or not."""
        folder = save_tiny_base(tmp_path / "three", layers=3)
        base = load_base(str(folder))
        cut = some_layers(str(folder), (0, 2))
        whole: Any = base.model
        ids = torch.tensor([[5, 9, 3, 7]])
        expected = some_layers(str(folder), (0, 1))
        expected.model.model.layers[1].load_state_dict(whole.model.layers[2].state_dict())  # type: ignore[attr-defined]
        assert torch.equal(cut.forward(ids)[0], expected.forward(ids)[0])
        assert not torch.equal(cut.forward(ids)[0], some_layers(str(folder), (0, 1)).forward(ids)[0])

        identity = base.identity
        config = DeltaConfig(
            size=TINY, layers=(0, 2), tuned_layers=1, base_name=str(folder),
            base_weights_sha256=identity.weights_sha256, tokenizer_sha256=identity.tokenizer_sha256,
        )  # fmt: skip
        name = "model.layers.1.mlp.down_proj.weight"
        with torch.no_grad():
            cut.model.get_parameter(name).sign_()  # which int8 keeps as they are
        save_delta(cut.model, [name], config, tmp_path / "delta")
        for shared in (None, base):
            kept = load_neural(
                find_neural(str(tmp_path / "delta")), vocab_size=257, base_name=str(folder), shared=shared
            ).model
            torch.testing.assert_close(kept.forward(ids)[0], cut.forward(ids)[0], rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                tree = TreeCache(kept.model.config, 1, kept.device)
                states = NeuralLM(kept).read(tree, ids.numpy(), np.array([[-1, 0, 1, 2]]))
            torch.testing.assert_close(kept.project(states), cut.forward(ids)[0], rtol=1e-5, atol=1e-5)
        mine, theirs = (model.get_parameter("model.norm.weight") for model in (kept.model, whole))
        assert mine is theirs

    @pytest.mark.parametrize("soft", [0.0, 0.3])
    def test_the_loss_of_a_choice_among_a_heads_tokens(self, tiny_base, tiny_heads_folder, data, soft, monkeypatch):
        """Against the definition, a target at a time: cross-entropy among the head's best tokens, by both scores."""
        monkeypatch.setattr(rescorer_training, "TOP_K", 5)
        tiny_heads = load_heads(tiny_base, str(tiny_heads_folder), dtype=torch.float32)
        options = change(lattice=1.0, soft=soft, vocabulary=257, precision="float32")
        trainer = RescorerTrainer(tiny_base, [data], options, heads=tiny_heads)
        chosen = trainer.segments[:3]
        for head in (2, 3):
            found = trainer._loss(chosen, np.arange(257), head)
            hidden, states, targets = trainer._forward(chosen)
            expected, row = 0.0, 0
            for segment in chosen:
                for place in range(segment.targets):
                    before = row - (head - 1)
                    if place >= head - 1:
                        slots = tiny_heads.slots(
                            tiny_base, states[before : before + 1].to(tiny_base.dtype),
                            tiny_base.project(states[before : before + 1].to(tiny_base.dtype)),
                            tokens=torch.tensor([int(targets[before])]),
                        )  # fmt: skip
                        logps = torch.log_softmax(slots[0].logits[0, head - 1].float(), -1)
                        best = logps.topk(5).indices
                        weight = trainer.model.get_output_embeddings().weight
                        chances = torch.log_softmax(logps[best] + weight[best].float() @ hidden[row], -1)
                        of_base = torch.softmax(states[row].float() @ trainer.projection.float().T, -1)
                        for token, chance in zip(best.tolist(), chances.tolist(), strict=True):
                            goal = soft * float(of_base[token]) + (1 - soft) * (token == targets[row])
                            expected -= goal * chance
                    row += 1
            assert float(found.detach()) == pytest.approx(expected, rel=2e-3)
        measured = trainer.evaluate()
        assert measured.chosen is not None and measured.unrescored is not None
        assert 0 <= measured.unrescored <= 1

    @pytest.mark.parametrize("options", [SMALL, LOW_RANK, SCRATCH], ids=["base", "low-rank", "scratch"])
    @pytest.mark.parametrize("stop", range(1, 7))
    def test_an_interrupted_training_is_the_same_training(self, tiny_base, data, tmp_path, options, stop):
        curves: dict[str, dict[int, float]] = {"whole": {}, "parts": {}}
        expected = RescorerTrainer(tiny_base, [data], options).train(
            tmp_path / "whole", progress=lambda step, _, loss: curves["whole"].update({step: loss})
        )
        with pytest.raises(StopError):
            RescorerTrainer(tiny_base, [data], options).train(tmp_path / "parts", progress=interrupted_at(stop))
        found = RescorerTrainer(tiny_base, [data], options).train(
            tmp_path / "parts", progress=lambda step, _, loss: curves["parts"].update({step: loss})
        )
        assert found == expected
        assert sorted(curves["parts"]) == list(range((stop - 1) // 2 * 2 + 1, 7))
        assert curves["whole"].items() >= curves["parts"].items()
        for name in ("model.safetensors", "checkpoint.safetensors", "best.safetensors"):
            whole, parts = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
            assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
        for name in ("training_log.jsonl", "training.json"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()

    def test_it_stops_early_and_keeps_the_best(self, tiny_base, data, tmp_path, monkeypatch):
        """Held-out loss is best at the second evaluation; two worse ones end the training."""
        evaluate, told = RescorerTrainer.evaluate, iter([5.0, 3.0, 4.0, 3.5])
        monkeypatch.setattr(
            RescorerTrainer, "evaluate", lambda self: dataclasses.replace(evaluate(self), loss=next(told, 3.0))
        )
        best: dict[str, torch.Tensor] = {}
        steps: list[int] = []
        trainer = RescorerTrainer(tiny_base, [data], change(steps=99, patience=2))

        def evaluated(step: int, *_: object) -> None:
            steps.append(step)
            if step == 4:
                best.update({n: p.detach().clone() for n, p in trainer.parameters.items()})

        trainer.train(tmp_path, evaluated=evaluated)
        assert steps == [2, 4, 6, 8]
        assert all(torch.equal(p, best[n]) for n, p in trainer.parameters.items())
        assert json.loads((tmp_path / "training.json").read_text())["held_out"]["loss"] == 3.0
        again = RescorerTrainer(tiny_base, [data], change(steps=99, patience=2))
        again.train(tmp_path, progress=lambda *_: pytest.fail("trained"))
        assert all(torch.equal(p, best[n]) for n, p in again.parameters.items())

    def test_what_it_writes(self, tiny_base, data, tmp_path):
        found = RescorerTrainer(tiny_base, [data], SMALL).train(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "best.safetensors", "checkpoint.safetensors", "config.json", "model.safetensors", "training.json",
            "training_log.jsonl",
        ]  # fmt: skip
        document = json.loads((tmp_path / "training.json").read_text())
        assert document["options"] == dataclasses.asdict(SMALL)
        assert document["held_out"] == dataclasses.asdict(found)
        assert document["data"] == [{"source": "pairs.jsonl", "sha256": data.sha256, "tokens": len(data)}]


class TestTrouble:
    def test_other_settings_are_shown(self, tiny_base, data, tmp_path):
        RescorerTrainer(tiny_base, [data], SMALL).train(tmp_path)
        message = refused(
            lambda: RescorerTrainer(tiny_base, [data], change(soft=0.1, patience=7)).train(tmp_path), IncompatibleError
        )
        assert "(options.soft: 0.5 -> 0.1; options.patience: 5 -> 7); use another --out" in message
        message = refused(lambda: RescorerTrainer(tiny_base, [data], SCRATCH).train(tmp_path), IncompatibleError)
        assert "options.size: neural-32m -> neural-tiny; options.init: base -> scratch" in message
        changed = dataclasses.replace(data, sha256="0")
        message = refused(lambda: RescorerTrainer(tiny_base, [changed], SMALL).train(tmp_path), IncompatibleError)
        assert data.sha256 in message

    @pytest.mark.parametrize("step", [1, 3, 4])
    def test_nan_stops_it_with_the_last_checkpoint_kept(self, tiny_base, data, tmp_path, monkeypatch, step):
        RescorerTrainer(tiny_base, [data], SMALL).train(tmp_path / "whole")
        loss_of = RescorerTrainer._loss

        def broken(self, *arguments):
            return loss_of(self, *arguments) * (math.nan if self.step == step else 1.0)

        monkeypatch.setattr(RescorerTrainer, "_loss", broken)
        message = refused(lambda: RescorerTrainer(tiny_base, [data], SMALL).train(tmp_path / "parts"))
        assert f"the loss is nan and its gradient nan at step {step + 1}" in message
        kept = tmp_path / "parts" / "checkpoint.safetensors"
        assert kept.is_file() == (step >= 2)
        if step >= 2:
            assert all(value.isfinite().all() for value in load_file(kept).values())
        monkeypatch.undo()
        monkeypatch.setitem(neural.SIZES, TINY, NeuralSize(1, 16, 24, 1, 2))
        RescorerTrainer(tiny_base, [data], SMALL).train(tmp_path / "parts")
        logs = [(tmp_path / place / "training_log.jsonl").read_text() for place in ("whole", "parts")]
        assert logs[0] == logs[1]

    def test_a_held_out_loss_that_is_no_number(self, tiny_base, data, tmp_path, monkeypatch):
        evaluate = RescorerTrainer.evaluate
        monkeypatch.setattr(
            RescorerTrainer, "evaluate", lambda self: dataclasses.replace(evaluate(self), loss=math.nan)
        )
        message = refused(lambda: RescorerTrainer(tiny_base, [data], SMALL).train(tmp_path))
        assert "the held-out loss is nan at step 2" in message and "lower learning rate" in message

    def test_out_of_memory_names_the_option(self, tiny_base, data, tmp_path, monkeypatch):
        def full(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

        monkeypatch.setattr(RescorerTrainer, "_forward", full)
        message = refused(lambda: RescorerTrainer(tiny_base, [data], SMALL).train(tmp_path))
        assert "out of memory at step 1" in message and "a smaller --micro-batch needs less" in message

    def test_the_best_weights_are_gone(self, tiny_base, data, tmp_path):
        RescorerTrainer(tiny_base, [data], SMALL).train(tmp_path)
        (tmp_path / "best.safetensors").unlink()
        assert "can't read the best weights" in refused(
            lambda: RescorerTrainer(tiny_base, [data], SMALL).train(tmp_path), InvalidDataError
        )

    def test_a_corpus_of_one_segment(self, tiny_base, data):
        one = dataclasses.replace(data, ends=data.ends[:1], context_ends=data.context_ends[:1])
        assert "fewer than two segments" in refused(lambda: RescorerTrainer(tiny_base, [one], SMALL), InvalidDataError)
        refused(lambda: RescorerTrainer(tiny_base, [], SMALL), InvalidDataError)

    def test_a_size_that_wants_more_layers_than_the_base_has(self, tiny_base, data):
        assert "has 2 layers, and layer 8 of it is asked for" in refused(
            lambda: RescorerTrainer(tiny_base, [data], change(size="neural-61m"))
        )

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"size": "neural-60m"}, "unknown rescorer size 'neural-60m'"),
            ({"init": "bases"}, "unknown init 'bases'; did you mean base"),
            ({"tuned_layers": -1}, "tuned_layers = -1; it must be at least 0"),
            ({"lora_rank": -1}, "lora_rank = -1; it must be at least 0"),
            ({"layers": (1, 1)}, "layers = 1,1; neural-32m takes 1 layers"),
            ({"layers": (-1,)}, "layers = -1; neural-32m takes 1 layers"),
            ({"layers": (1,), "init": "scratch"}, "layers = (1,) is for one that begins as the base's layers"),
            ({"lattice": 1.5}, "lattice = 1.5; it is a share"),
            ({"lattice": 0.5}, "there are no heads to choose among"),
            ({"lora_rank": 2, "tuned_layers": 1}, "neural-32m has 1 in all; lower tuned_layers"),
            ({"lora_rank": 2, "init": "scratch"}, "lora_rank = 2 is for one that begins as the base's layers"),
            ({"steps": 0}, "steps = 0"),
            ({"positions": 0}, "positions = 0"),
            ({"micro_batch": 0}, "micro_batch = 0"),
            ({"vocabulary": 0}, "vocabulary = 0"),
            ({"negatives": -1}, "negatives = -1"),
            ({"patience": 0}, "patience = 0"),
            ({"warmup": -1}, "warmup = -1"),
            ({"evaluate_every": 0}, "evaluate_every = 0"),
            ({"seed": -1}, "seed = -1"),
            ({"soft": 1.5}, "soft = 1.5"),
            ({"soft": math.nan}, "soft = nan"),
            ({"held_out": 1.0}, "held_out = 1.0"),
            ({"learning_rate": math.inf}, "learning_rate = inf"),
            ({"precision": "float16"}, "unknown precision 'float16'"),
        ],
    )
    def test_options_out_of_range(self, tiny_base, data, options, named):
        assert named in refused(lambda: RescorerTrainer(tiny_base, [data], change(**options)))


def test_other_tokens_than_the_bases_are_refused_later(tiny_base, data, tmp_path):
    """What is trained from scratch carries the base's tokenizer, so that another base can be told from it."""
    RescorerTrainer(tiny_base, [data], SCRATCH).train(tmp_path / "out")
    folder = save_tiny_base(tmp_path / "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(folder)
    source = find_neural(str(tmp_path / "out"))
    check_fits(source, tiny_base.identity)
    assert "tokenizer" in refused(
        lambda: check_fits(source, load_base(str(folder), device="cpu").identity), IncompatibleError
    )


def test_a_disk_that_is_full_at_the_end(tiny_base, data, tmp_path, monkeypatch):
    """The whole model is larger than a checkpoint of some of its weights: it may be the first that does not fit."""
    trainer = RescorerTrainer(tiny_base, [data], SCRATCH)
    save = trainer._save

    def on_a_full_disk(out: Path) -> None:
        with files_of_at_most(1000):
            save(out)

    monkeypatch.setattr(trainer, "_save", on_a_full_disk)
    assert "can't write" in refused(lambda: trainer.train(tmp_path), OutputError)
    assert not (tmp_path / "config.json").exists()


def test_bfloat16_trains_too(tiny_base, data, tmp_path: Path):
    found = RescorerTrainer(tiny_base, [data], change(precision="bfloat16", steps=2)).train(tmp_path)
    whole = RescorerTrainer(tiny_base, [data], change(steps=2)).train(tmp_path / "whole")
    assert found.loss == pytest.approx(whole.loss, rel=0.05)
