"""Training of heads: the loss is what it says, heads learn, and an interrupted training is the same training."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import refused, save_tiny_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional

from lattices.errors import IncompatibleError, InvalidDataError, OutputError
from lm import checkpoint
from lm.base.catalog import load_base
from lm.heads.block_heads import heads_sha256, load_heads
from lm.training.data import HeadData, Rows, Segment, read_head_data, segments_of, until
from lm.training.heads import HeadTrainer, TrainingOptions

SMALL = TrainingOptions(
    h=4, inner_size=8, token_size=5, steps=10, positions=96, heads_per_step=2, vocabulary=60, negatives=8, warmup=2,
    evaluate_every=4, held_out=0.2, precision="float32",
)  # fmt: skip


class StopError(Exception):
    """An interruption from outside."""


def change(**options) -> TrainingOptions:
    return dataclasses.replace(SMALL, **options)


def make_data(base, sizes: list[int], *, seed: int = 0) -> HeadData:
    """Segments of these sizes, states and targets at random."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    states = rng.standard_normal((n, base.hidden_size)).astype(np.float16)
    targets = rng.integers(0, base.vocab_size, n).astype(np.int32)
    contexts = np.zeros(len(sizes), dtype=np.int32)  # heads do not look at them
    return HeadData(
        Rows([states]), targets, np.cumsum(sizes), contexts, np.arange(1, len(sizes) + 1), "made", f"seed {seed}"
    )


def loss_of_step(trainer: HeadTrainer, step: int) -> torch.Tensor:
    (loss,) = trainer._losses(step)
    return loss


@pytest.fixture
def data(tiny_base) -> HeadData:
    return make_data(tiny_base, [20, 7, 33, 2, 12, 40, 1, 9])


class TestLoss:
    @pytest.mark.parametrize("soft", [0.0, 0.3, 1.0])
    def test_a_step_sums_the_heads_losses(self, tiny_base, data, soft):
        """With all heads, all positions and all tokens nothing is drawn by chance."""
        options = change(soft=soft, heads_per_step=99, positions=10_000, vocabulary=None, held_out=0.01)
        trainer = HeadTrainer(tiny_base, [data], options)
        for parameter in (*trainer.heads.net.outer.values(), trainer.heads.net.token["weight"]):
            torch.nn.init.normal_(parameter, std=0.3)
        weight = tiny_base.output_embeddings.weight.float()
        losses = {head: [] for head in range(2, options.h + 1)}
        for place, _, start, end in trainer.segments:
            states = torch.from_numpy(trainer.data[place].states[start:end].astype(np.float32))
            targets = torch.from_numpy(trainer.data[place].targets[start:end]).long()
            teacher = torch.softmax(states @ weight.T, -1)
            for head, outputs in enumerate(trainer.heads(states, weight[targets][:, None]), start=2):
                for row in range(len(states) - head + 1):
                    ahead = row + head - 1  # the base chooses token `row` here, head i the token i - 1 further
                    goal = (1 - soft) * functional.one_hot(targets[ahead], 257) + soft * teacher[ahead]
                    losses[head].append(-(goal * torch.log_softmax(outputs[row] @ weight.T, -1)).sum())
        expected = sum(torch.stack(of_head).mean() for of_head in losses.values())
        torch.testing.assert_close(loss_of_step(trainer, 0), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("per_step", "shares"), [(1, [1 / 3] * 3), (2, None)])
    def test_one_head_a_step_is_each_as_often(self, tiny_base, data, monkeypatch, per_step, shares):
        """[B]'s objective: one of the sub-losses, uniformly; several are drawn with odds 1/i instead."""
        trainer = HeadTrainer(tiny_base, [data], change(heads_per_step=per_step, positions=1))
        drawn: list[int] = []
        monkeypatch.setattr(trainer, "_loss", lambda _part, _tokens, heads, _in_all: drawn.extend(heads))
        for step in range(1500):
            list(trainer._losses(step))
        found = [drawn.count(head) / len(drawn) for head in (2, 3, 4)]
        if shares:
            assert found == pytest.approx(shares, abs=0.05)
        else:
            assert found == sorted(found, reverse=True) and found[0] > found[2] + 0.05

    def test_a_step_is_drawn_by_seed_and_number(self, tiny_base, data):
        trainer, other = HeadTrainer(tiny_base, [data], SMALL), HeadTrainer(tiny_base, [data], change(seed=1))
        losses = [
            float(loss_of_step(t, step).detach()) for t, step in ((trainer, 3), (trainer, 3), (trainer, 4), (other, 3))
        ]
        assert losses[0] == losses[1] and len(set(losses)) == 3

    @pytest.mark.parametrize("options", [{"h": 2, "heads_per_step": 5}, {"vocabulary": 1, "negatives": 0}, {"h": 60}])
    def test_small_and_large_options(self, tiny_base, data, options):
        trainer = HeadTrainer(tiny_base, [data], change(**options))
        assert all(bool(loss_of_step(trainer, step).isfinite()) for step in range(5))


class TestInitialHeads:
    def test_training_starts_from_them(self, tiny_base, data, tmp_path):
        first = HeadTrainer(tiny_base, [data], SMALL)
        first.train(tmp_path / "first")
        second = HeadTrainer(tiny_base, [data], change(learning_rate=1e-9, steps=1), initial=tmp_path / "first")
        for name, value in second.heads.state_dict().items():
            torch.testing.assert_close(value, first.heads.state_dict()[name], rtol=1e-3, atol=1e-3)
        second.train(tmp_path / "second")
        record = json.loads((tmp_path / "second" / "training.json").read_text())
        assert record["initial_sha256"] == heads_sha256(tmp_path / "first")

    def test_how_good_they_are_is_measured_before_the_first_step(self, tiny_base, data, tmp_path):
        HeadTrainer(tiny_base, [data], SMALL).train(tmp_path / "first")

        def stop(step: int, _steps: int, _loss: float) -> None:
            if step == 2:
                raise StopError

        def trainer() -> HeadTrainer:
            return HeadTrainer(tiny_base, [data], SMALL, initial=tmp_path / "first")

        expected, seen = trainer().evaluate(), []
        with pytest.raises(StopError):  # before the first checkpoint: all of it begins again
            trainer().train(tmp_path / "second", progress=stop)
        trainer().train(tmp_path / "second", evaluated=lambda step, _steps, measured: seen.append((step, measured)))
        assert [step for step, _ in seen] == [0, 4, 8, 10] and seen[0][1] == expected
        log = [json.loads(line) for line in (tmp_path / "second" / "training_log.jsonl").read_text().splitlines()]
        assert [record["step"] for record in log] == [0, 4, 8, 10] and "loss" not in log[0]
        assert log[0]["accepted"] == expected.accepted

    def test_sequential_heads_go_on_from_feed_forward_ones(self, tiny_base, data, tmp_path):
        first = HeadTrainer(tiny_base, [data], change(token_size=4))
        first.train(tmp_path / "first")
        options = change(token_size=4, architecture="sequential")
        second = HeadTrainer(tiny_base, [data], options, initial=tmp_path / "first")
        found, expected = second.evaluate(), first.evaluate()
        assert found.accepted == pytest.approx(expected.accepted, abs=0.02)  # float16 on the way
        states = torch.randn(3, tiny_base.hidden_size)
        rows = torch.randn(3, 3, tiny_base.hidden_size)
        torch.testing.assert_close(
            second.heads(states, rows), load_heads(tiny_base.identity, str(tmp_path / "first"))(states, rows)
        )
        back = HeadTrainer(tiny_base, [data], options)
        back.train(tmp_path / "sequential")
        assert "architecture = sequential, not feed_forward" in refused(
            lambda: HeadTrainer(tiny_base, [data], change(token_size=4), initial=tmp_path / "sequential"),
            IncompatibleError,
        )

    @pytest.mark.parametrize("options", [{"h": 3}, {"inner_size": 9}, {"token_size": 4}])
    def test_heads_of_another_shape_are_refused(self, tiny_base, data, tmp_path, options):
        HeadTrainer(tiny_base, [data], change(steps=1)).train(tmp_path)
        message = refused(
            lambda: HeadTrainer(tiny_base, [data], change(**options), initial=tmp_path), IncompatibleError
        )
        assert "training starts from the same shape" in message


class TestHeldOut:
    def test_no_segment_is_both_trained_on_and_held_out(self, tiny_base, data):
        trainer = HeadTrainer(tiny_base, [data, make_data(tiny_base, [5, 6], seed=1)], SMALL)
        assert trainer.held_out and trainer.segments and not set(trainer.held_out) & set(trainer.segments)
        together = sorted(trainer.held_out + trainer.segments)
        assert together == segments_of(trainer.data, least=2)  # all but the one of a single token
        assert len(together) == 9 and [s.number for s in together] == [0, 1, 2, 3, 4, 5, 7, 0, 1]

    def test_text_of_another_origin_is_measured_on_and_never_trained_on(self, tiny_base, data):
        apart = make_data(tiny_base, [9, 1, 14], seed=2)
        trainer = HeadTrainer(tiny_base, [data], SMALL, held_out=apart)
        assert trainer.segments == segments_of([data], least=2)
        assert [(s.place, s.number) for s in trainer.held_out] == [(1, 0), (1, 2)]
        alone = HeadTrainer(tiny_base, [data], SMALL)
        assert (trainer.subset.frequent == alone.subset.frequent).all()
        whole = HeadTrainer(tiny_base, [apart, data], SMALL)
        whole.held_out = segments_of([apart], least=2)
        assert trainer.evaluate() == whole.evaluate()
        assert trainer._settings()["data"] == alone._settings()["data"]
        assert trainer._settings()["measured_on"]["sha256"] == "seed 2"
        message = refused(lambda: HeadTrainer(tiny_base, [data], SMALL, held_out=make_data(tiny_base, [1], seed=3)))
        assert "can be measured on" in message
        message = refused(lambda: HeadTrainer(tiny_base, [data], SMALL, held_out=data))
        assert message == "made can't be both trained on and held out"

    def test_accuracy_is_counted_over_the_whole_vocabulary(self, tiny_base, data):
        trainer = HeadTrainer(tiny_base, [data], change(h=3, held_out=0.9))
        for parameter in (*trainer.heads.net.outer.values(), trainer.heads.net.token["weight"]):
            torch.nn.init.normal_(parameter, std=0.3)
        weight = tiny_base.output_embeddings.weight.float()
        found = {n: [[], [], []] for n in (1, 4, 16)}
        accepted = {1: [], 16: []}
        for _, _, start, end in trainer.held_out:
            states = torch.from_numpy(data.states[start:end].astype(np.float32))
            ahead = trainer.heads(states, weight[data.targets[start:end]][:, None])
            ranked = [(x @ weight.T).argsort(-1, descending=True) for x in (states, *ahead)]
            for row in range(end - start):
                for n in found:
                    prefix = True
                    for head in range(min(3, end - start - row)):
                        wanted = data.targets[start + row + head]
                        hit = wanted in ranked[head][row, :n]
                        found[n][head].append(hit)
                        prefix = prefix and (hit or head == 0)  # head 1 is the base's own choice
                        if n in accepted:
                            accepted[n].append(prefix)
        total = sum(end - start for _, _, start, end in trainer.held_out)
        result = trainer.evaluate()
        for n in found:
            assert result.top[n] == pytest.approx([np.mean(of_head) for of_head in found[n]], abs=1e-4)
        assert result.accepted == pytest.approx(sum(accepted[1]) / total, abs=1e-4)
        assert result.accepted_16 == pytest.approx(sum(accepted[16]) / total, abs=1e-4)


class TestTraining:
    @pytest.fixture(scope="class")
    @staticmethod
    def repetitive(tiny_base, tmp_path_factory) -> HeadData:
        folder = tmp_path_factory.mktemp("text")
        (folder / "text.txt").write_text("the cat sat on the mat, " * 200)
        return read_head_data(tiny_base, folder / "text.txt", folder)

    def test_heads_learn(self, tiny_base, repetitive, tmp_path):
        options = change(steps=80, learning_rate=1e-2, inner_size=32, positions=512, heads_per_step=3, soft=0.0)
        trainer = HeadTrainer(tiny_base, [repetitive], options)
        before = trainer.evaluate()
        losses = []
        after = trainer.train(tmp_path / "out", progress=lambda step, total, loss: losses.append((step, total, loss)))
        assert before.top[1][1] < 0.3
        assert after.top[1][1] > before.top[1][1] + 0.3
        assert after.accepted > before.accepted + 0.3
        assert [(step, total) for step, total, _ in losses] == [(n, 80) for n in range(1, 81)]
        assert np.mean([loss for *_, loss in losses[-5:]]) < 0.5 * losses[0][2]

        heads = load_heads(tiny_base.identity, str(tmp_path / "out"))
        assert heads.config.h == 4 and heads.config.inner_size == 32
        trained = torch.cat([p.detach().flatten() for p in trainer.heads.parameters()])
        saved = torch.cat([p.flatten() for p in heads.parameters()])
        torch.testing.assert_close(saved, trained, rtol=1e-3, atol=1e-3)

    def test_what_it_writes(self, tiny_base, data, tmp_path):
        accuracy = HeadTrainer(tiny_base, [data], SMALL).train(tmp_path / "out")
        names = sorted(p.name for p in (tmp_path / "out").iterdir())
        assert names == [
            "checkpoint.safetensors", "config.json", "model.safetensors", "training.json", "training_log.jsonl"
        ]  # fmt: skip
        log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
        assert [record["step"] for record in log] == [4, 8, 10]
        assert log[-1]["accepted"] == accuracy.accepted and log[-1]["top"]["1"] == accuracy.top[1]
        document = json.loads((tmp_path / "out" / "training.json").read_text())
        assert document["options"] == dataclasses.asdict(SMALL)
        assert document["base"] == dataclasses.asdict(tiny_base.identity)
        assert document["data"] == [{"source": "made", "sha256": "seed 0", "tokens": len(data)}]
        assert document["held_out"]["accepted"] == accuracy.accepted

    def test_all_segments_may_be_too_short_for_the_last_heads(self, tiny_base, tmp_path):
        HeadTrainer(tiny_base, [make_data(tiny_base, [2] * 9)], change(h=6, steps=2)).train(tmp_path)

    @pytest.mark.parametrize("stop", range(1, 11))
    def test_an_interrupted_training_is_the_same_training(self, tiny_base, data, tmp_path, stop):
        expected = HeadTrainer(tiny_base, [data], SMALL).train(tmp_path / "whole")

        def interrupt(step: int, _steps: int, _loss: float) -> None:
            if step == stop:
                raise StopError

        with pytest.raises(StopError):
            HeadTrainer(tiny_base, [data], SMALL).train(tmp_path / "parts", progress=interrupt)
        steps = []
        accuracy = HeadTrainer(tiny_base, [data], SMALL).train(
            tmp_path / "parts", progress=lambda step, *_: steps.append(step)
        )
        last_checkpoint = (stop - 1) // 4 * 4
        assert steps == list(range(last_checkpoint + 1, 11))
        assert accuracy == expected
        for name in ("model.safetensors", "checkpoint.safetensors"):
            whole, parts = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
            assert whole.keys() == parts.keys()
            assert all(torch.equal(whole[key], parts[key]) for key in whole)
        logs = [(tmp_path / place / "training_log.jsonl").read_text() for place in ("whole", "parts")]
        assert logs[0] == logs[1]

    def test_a_finished_training_is_left_as_it_is(self, tiny_base, data, tmp_path):
        first = HeadTrainer(tiny_base, [data], SMALL).train(tmp_path)
        before = (tmp_path / "model.safetensors").read_bytes()
        again = HeadTrainer(tiny_base, [data], SMALL).train(tmp_path, progress=lambda *_: pytest.fail("trained"))
        assert again == first and (tmp_path / "model.safetensors").read_bytes() == before


class TestTrouble:
    def test_other_settings_are_shown(self, tiny_base, data, tmp_path):
        HeadTrainer(tiny_base, [data], SMALL).train(tmp_path / "out")
        message = refused(
            lambda: HeadTrainer(tiny_base, [data], change(steps=20, soft=0.1)).train(tmp_path / "out"),
            IncompatibleError,
        )
        assert "options.steps: 10 -> 20; options.soft: 0.5 -> 0.1)" in message and "use another --out" in message
        other_data = make_data(tiny_base, [20, 20], seed=4)
        message = refused(lambda: HeadTrainer(tiny_base, [other_data], SMALL).train(tmp_path / "out"))
        assert "seed 0" in message and "seed 4" in message
        other_base = load_base(str(save_tiny_base(tmp_path / "other", seed=9)), dtype="float64")
        message = refused(lambda: HeadTrainer(other_base, [data], SMALL).train(tmp_path / "out"))
        assert "base.weights_sha256" in message and "options" not in message

    @pytest.mark.parametrize("what", ["loss", "gradient"])
    def test_numbers_that_are_none_stop_it_with_the_checkpoint_kept(self, tiny_base, data, tmp_path, monkeypatch, what):
        losses_of = HeadTrainer._losses

        def broken(self, step):
            for loss in losses_of(self, step):
                if step == 5 and what == "gradient":
                    loss.register_hook(lambda gradient: gradient * math.inf)
                yield loss * math.nan if step == 5 and what == "loss" else loss

        monkeypatch.setattr(HeadTrainer, "_losses", broken)
        message = refused(lambda: HeadTrainer(tiny_base, [data], SMALL).train(tmp_path))
        assert "at step 6" in message and "nan" in message and "lower learning rate" in message
        assert not (tmp_path / "model.safetensors").exists()
        tensors = load_file(tmp_path / "checkpoint.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        monkeypatch.undo()
        steps = []
        HeadTrainer(tiny_base, [data], SMALL).train(tmp_path, progress=lambda step, *_: steps.append(step))
        assert steps == list(range(5, 11))

    def test_states_that_are_no_numbers(self, tiny_base, data, tmp_path):
        bad = dataclasses.replace(data, states=Rows([np.full_like(data.states[:], np.inf)]))
        assert "at step 1" in refused(lambda: HeadTrainer(tiny_base, [bad], SMALL).train(tmp_path))

    @pytest.mark.parametrize("sizes", [[50], [50, 1], [1, 1, 1]])
    def test_a_corpus_of_one_segment(self, tiny_base, sizes):
        message = refused(lambda: HeadTrainer(tiny_base, [make_data(tiny_base, sizes)], SMALL), InvalidDataError)
        assert "fewer than two segments" in message

    def test_a_corpus_that_is_there_twice(self, tiny_base, data):
        """Else what one copy holds out would be learned from the other."""
        assert "is there twice" in refused(lambda: HeadTrainer(tiny_base, [data, data], SMALL))

    def test_the_heads_it_begins_with_are_not_replaced(self, tiny_base, data, tmp_path):
        HeadTrainer(tiny_base, [data], SMALL).train(tmp_path)
        kept = (tmp_path / "model.safetensors").read_bytes()
        again = HeadTrainer(tiny_base, [data], SMALL, initial=tmp_path)
        assert "another --out" in refused(lambda: again.train(tmp_path))
        assert (tmp_path / "model.safetensors").read_bytes() == kept

    def test_no_corpus(self, tiny_base):
        refused(lambda: HeadTrainer(tiny_base, [], SMALL), InvalidDataError)

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"h": 1}, "h = 1; it must be at least 2"),
            ({"h": 0}, "h = 0"),
            ({"inner_size": 0}, "inner_size = 0"),
            ({"steps": 0}, "steps = 0"),
            ({"positions": 0}, "positions = 0"),
            ({"heads_per_step": 0}, "heads_per_step = 0"),
            ({"vocabulary": 0}, "vocabulary = 0"),
            ({"negatives": -1}, "negatives = -1"),
            ({"soft": -0.1}, "soft = -0.1"),
            ({"soft": 1.01}, "soft = 1.01"),
            ({"soft": math.nan}, "soft = nan"),
            ({"learning_rate": 0.0}, "learning_rate = 0.0"),
            ({"learning_rate": math.nan}, "learning_rate = nan"),
            ({"learning_rate": math.inf}, "learning_rate = inf"),
            ({"learning_rate": 1.5}, "learning_rate = 1.5; it must be above 0 and at most 1"),
            ({"weight_decay": -1.0}, "weight_decay = -1.0"),
            ({"warmup": -1}, "warmup = -1"),
            ({"held_out": 0.0}, "held_out = 0.0"),
            ({"held_out": 1.0}, "held_out = 1.0"),
            ({"evaluate_every": 0}, "evaluate_every = 0"),
            ({"seed": -1}, "seed = -1"),
            ({"precision": "float23"}, "unknown precision 'float23'; did you mean float32"),
            ({"precision": "float16"}, "unknown precision 'float16'"),
        ],
    )
    def test_options_out_of_range(self, tiny_base, data, options, named):
        assert named in refused(lambda: HeadTrainer(tiny_base, [data], change(**options)))

    @pytest.mark.parametrize("keep", [0, 20, -1])
    def test_a_broken_checkpoint(self, tiny_base, data, tmp_path, keep):
        HeadTrainer(tiny_base, [data], SMALL).train(tmp_path)
        path = tmp_path / "checkpoint.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        message = refused(lambda: HeadTrainer(tiny_base, [data], SMALL).train(tmp_path), InvalidDataError)
        assert "remove it to begin again" in message

    def test_a_checkpoint_from_elsewhere(self, tiny_base, data, tmp_path):
        trainer = HeadTrainer(tiny_base, [data], SMALL)
        trainer.heads.save(tmp_path)
        os.replace(tmp_path / "model.safetensors", tmp_path / "checkpoint.safetensors")
        assert "can't read the checkpoint" in refused(lambda: trainer.train(tmp_path), InvalidDataError)

    def test_a_full_disk_keeps_the_checkpoint_before(self, tiny_base, data, tmp_path, monkeypatch):
        def full(_tensors, metadata=None):
            if json.loads(metadata["state"])["step"] == 8:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return to_bytes(_tensors, metadata=metadata)

        to_bytes = checkpoint.to_bytes
        monkeypatch.setattr(checkpoint, "to_bytes", full)
        message = refused(lambda: HeadTrainer(tiny_base, [data], SMALL).train(tmp_path), OutputError)
        assert "No space left" in message
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors", "training_log.jsonl"]
        monkeypatch.undo()
        steps = []
        HeadTrainer(tiny_base, [data], SMALL).train(tmp_path, progress=lambda step, *_: steps.append(step))
        assert steps == list(range(5, 11))
        log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
        assert [record["step"] for record in log] == [4, 8, 10]  # 8 only once

    def test_a_place_that_cannot_be_written(self, tiny_base, data, tmp_path):
        (tmp_path / "file").write_text("")
        for out in (tmp_path / "file", tmp_path / "file" / "out"):
            steps: list[int] = []
            trainer = HeadTrainer(tiny_base, [data], SMALL)
            message = refused(
                lambda trainer=trainer, out=out, steps=steps: trainer.train(
                    out, progress=lambda step, *_: steps.append(step)
                ),
                OutputError,
            )
            assert "can't write" in message
            assert not steps  # found out before, not after hours of work


@settings(deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 9), max_size=8), positions=st.integers(1, 60))
def test_until_takes_so_many_positions(sizes, positions):
    ends = np.cumsum([0, *sizes]).tolist()
    segments = [Segment(0, i, a, b) for i, (a, b) in enumerate(itertools.pairwise(ends))]
    taken = until(positions, segments)
    assert sum(s.targets for s in taken) == min(positions, sum(sizes))
    assert [s.start for s in taken] == [s.start for s in segments[: len(taken)]]
    assert taken[:-1] == segments[: max(0, len(taken) - 1)]
