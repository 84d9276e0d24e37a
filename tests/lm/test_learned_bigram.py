"""The learned bigram: its loss against all paths, what it learns, and which checkpoints it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import make_heads, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lattices.errors import IncompatibleError, InvalidDataError
from lattices.lattice import Lattice
from lm.neural.learned_bigram import load_bigram
from lm.training import bigram
from lm.training.bigram import BigramOptions, BigramTrainer, TargetLattices, lattices_of_corpus
from lm.training.data import read_head_data

SMALL = BigramOptions(
    rank=4, k=3, rows=50, batch=8, steps=6, learning_rate=1e-2, warmup=2, held_out=0.2, evaluate_every=2
)  # fmt: skip


class StopError(Exception):
    """An interruption from outside, like a kill."""


def change(**options) -> BigramOptions:
    return dataclasses.replace(SMALL, **options)


def drawn(seed: int, n: int, h: int, k: int, *, tokens: int = 257) -> TargetLattices:
    """Lattices whose targets are in a slot's tokens or not, in the first place or not, and end before h or not."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((n, h, tokens)), axis=-1)[..., :k].astype(np.int32)
    logps = -np.sort(rng.uniform(0, 3, (n, h, k)), axis=-1).astype(np.float32)
    targets = np.take_along_axis(ids, rng.integers(0, k, (n, h, 1)), axis=-1)[..., 0].astype(np.int64)
    targets[:, 0] = np.where(rng.random(n) < 0.8, ids[:, 0, 0], targets[:, 0])
    targets = np.where(rng.random((n, h)) < 0.15, rng.integers(0, tokens, (n, h)), targets)
    length = rng.integers(1, h + 1, n)
    targets = np.where(np.arange(h) < length[:, None], targets, -1)
    return TargetLattices(Lattice(ids, logps), targets, np.arange(n), "made", f"seed {seed}")


def planted(seed: int, n: int, *, h: int = 4, k: int = 4, tokens: int = 8) -> TargetLattices:
    """Heads that know nothing; every token of the target follows from the one before it."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((n, h, tokens)), axis=-1)[..., :k].astype(np.int32)
    targets = np.empty((n, h), dtype=np.int64)
    for i in range(n):
        targets[i, 0] = ids[i, 0, 0]
        for slot in range(1, h):
            targets[i, slot] = (3 * targets[i, slot - 1] + 1) % tokens
            if targets[i, slot] not in ids[i, slot]:
                ids[i, slot, rng.integers(k)] = targets[i, slot]
    logps = np.full((n, h, k), -math.log(k), dtype=np.float32)
    return TargetLattices(Lattice(ids, logps), targets, np.arange(n), "planted", f"seed {seed}")


def by_all_paths(data: TargetLattices, left: np.ndarray, right: np.ndarray, weight: float) -> list[float]:
    """-log of the share of the paths that hold the target as far as the lattice does."""
    losses = []
    for ids, logps, target in zip(data.lattice.token_ids, data.lattice.logps, data.targets, strict=True):
        h, k = ids.shape
        reach = 0
        while reach < h and target[reach] in (ids[reach] if reach else ids[0, :1]):
            reach += 1
        every, right_ones = [], []
        for path in itertools.product(range(k), repeat=h - 1):
            places = (0, *path)
            tokens = [int(ids[slot, place]) for slot, place in enumerate(places)]
            score = sum(float(logps[slot, place]) for slot, place in enumerate(places))
            score += weight * sum(float(left[a] @ right[b]) for a, b in itertools.pairwise(tokens))
            every.append(score)
            if tokens[:reach] == target[:reach].tolist():
                right_ones.append(score)
        losses.append(np.logaddexp.reduce(every) - np.logaddexp.reduce(right_ones))
    return losses


def random_scores(trainer: BigramTrainer, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gives a training random weights; what each token then says as first and as second of a pair."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.normal_(std=0.3)
        embeddings = trainer.base.output_embeddings.weight.float()
        return (embeddings @ trainer.left).numpy(), (embeddings @ trainer.right).numpy()


class TestLoss:
    @settings(deadline=None, derandomize=True, max_examples=40)
    @given(seed=st.integers(0, 2**32 - 1), h=st.integers(2, 4), k=st.integers(2, 4), weight=st.sampled_from([0.0, 1.0]))
    def test_it_is_that_of_all_paths(self, tiny_base, seed, h, k, weight):
        data = drawn(seed, 6, h, k, tokens=20)
        trainer = BigramTrainer(tiny_base, [data], SMALL)
        left, right = random_scores(trainer, seed)
        losses = trainer._path_losses(np.arange(6), weight=weight)
        np.testing.assert_allclose(
            losses.detach().numpy(), by_all_paths(data, left, right, weight), rtol=1e-4, atol=1e-4
        )
        losses.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.parameters.values())

    def test_a_first_token_that_is_not_the_target_counts_nothing(self, tiny_base):
        """Slot 1 is fixed; on text that the base did not write, the target may stand at another place there."""
        data = drawn(0, 5, 3, 3)
        targets = data.targets.copy()
        targets[:, 0] = data.lattice.token_ids[:, 0, 1]
        trainer = BigramTrainer(tiny_base, [dataclasses.replace(data, targets=targets)], SMALL)
        random_scores(trainer)
        assert trainer._path_losses(np.arange(5), weight=1.0).tolist() == [0.0] * 5

    def test_a_step_is_the_mean_over_its_rows(self, tiny_base):
        trainer = BigramTrainer(tiny_base, [drawn(1, 20, 3, 3)], SMALL)
        random_scores(trainer)
        rows = trainer.rows[np.random.default_rng([0, 5]).integers(len(trainer.rows), size=SMALL.batch)]
        (loss,) = trainer._losses(5)
        assert float(loss.detach()) == pytest.approx(float(trainer._path_losses(rows, weight=1.0).mean().detach()))

    def test_held_out_lattices_are_apart_and_measured_with_and_without(self, tiny_base):
        data = [drawn(1, 20, 3, 3), drawn(2, 10, 3, 3)]
        trainer = BigramTrainer(tiny_base, data, SMALL)
        left, right = random_scores(trainer)
        assert sorted([*trainer.held_out, *trainer.rows]) == list(range(30)) and len(trainer.held_out) == 6
        found = trainer.evaluate()
        for weight, told in ((1.0, found.loss), (0.0, found.unrescored_loss)):
            losses = np.concatenate([by_all_paths(d, left, right, weight) for d in data])
            assert told == pytest.approx(np.mean(losses[trainer.held_out]), abs=1e-3)
        assert found.lattices == 6


class TestTraining:
    def test_it_learns_pairs(self, tiny_base, tmp_path):
        options = change(rank=8, steps=60, batch=64, learning_rate=3e-2, evaluate_every=60)
        found = BigramTrainer(tiny_base, [planted(0, 200)], options).train(tmp_path)
        # Heads that know nothing leave 3 choices of 4 tokens (or fewer, where a target stands there twice).
        assert found.unrescored_loss > 3.0
        assert found.loss < 0.25 * found.unrescored_loss

    def test_untrained_it_changes_nothing(self, tiny_base):
        found = BigramTrainer(tiny_base, [drawn(0, 20, 3, 3)], SMALL).evaluate()
        assert found.loss == found.unrescored_loss

    @pytest.mark.parametrize("stop", [1, 2, 5])
    def test_an_interrupted_training_is_the_same_training(self, tiny_base, tmp_path, stop):
        data = [planted(3, 30)]
        expected = BigramTrainer(tiny_base, data, SMALL).train(tmp_path / "whole")

        def interrupt(step: int, *_: object) -> None:
            if step == stop:
                raise StopError

        with pytest.raises(StopError):
            BigramTrainer(tiny_base, data, SMALL).train(tmp_path / "parts", progress=interrupt)
        assert BigramTrainer(tiny_base, data, SMALL).train(tmp_path / "parts") == expected
        for name in ("model.safetensors", "training_log.jsonl", "training.json"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()

    def test_other_settings_are_shown(self, tiny_base, tmp_path):
        BigramTrainer(tiny_base, [planted(3, 30)], SMALL).train(tmp_path)
        message = refused(
            lambda: BigramTrainer(tiny_base, [planted(3, 30)], change(rank=5)).train(tmp_path), IncompatibleError
        )
        assert "(options.rank: 4 -> 5); use another --out" in message

    def test_out_of_memory_names_the_option(self, tiny_base, tmp_path, monkeypatch):
        def full(*_args: object, **_options: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(BigramTrainer, "_path_losses", full)
        message = refused(lambda: BigramTrainer(tiny_base, [planted(3, 30)], SMALL).train(tmp_path))
        assert "a smaller --batch needs less" in message

    @pytest.mark.parametrize("n", [0, 1])
    def test_too_few_lattices(self, tiny_base, n):
        assert "a bigram needs" in refused(
            lambda: BigramTrainer(tiny_base, [drawn(0, 2, 3, 3)][:n] if not n else [cut(drawn(0, 2, 3, 3))], SMALL),
            InvalidDataError,
        )

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"rank": 0}, "rank = 0; it must be at least 1"),
            ({"k": 1}, "k = 1; it must be at least 2"),
            ({"rows": 1}, "rows = 1"),
            ({"batch": 0}, "batch = 0"),
            ({"steps": 0}, "steps = 0"),
            ({"warmup": -1}, "warmup = -1"),
            ({"evaluate_every": 0}, "evaluate_every = 0"),
            ({"seed": -1}, "seed = -1"),
            ({"weight_decay": -1.0}, "weight_decay = -1.0"),
            ({"held_out": 0.0}, "held_out = 0.0"),
            ({"learning_rate": math.nan}, "learning_rate = nan"),
        ],
    )
    def test_options_out_of_range(self, options, named):
        assert named in refused(change(**options).check)


def cut(data: TargetLattices) -> TargetLattices:
    """The first lattice alone."""
    lattice = Lattice(data.lattice.token_ids[:1], data.lattice.logps[:1])
    return dataclasses.replace(data, lattice=lattice, targets=data.targets[:1], segments=data.segments[:1])


class TestCorpus:
    @pytest.mark.parametrize("rows", [5, 10_000])
    def test_the_heads_lattices_and_what_the_corpus_goes_on_with(self, tiny_base, tmp_path, rows):
        pairs = [{"prompt": "p" * (1 + i), "response": "the cat sat"[: 3 + i]} for i in range(6)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        data = read_head_data(tiny_base, tmp_path / "pairs.jsonl", tmp_path)
        heads, seen = make_heads(tiny_base), []
        found = lattices_of_corpus(
            tiny_base, heads, data, k=3, rows=rows, seed=0, cache=tmp_path, progress=lambda *now: seen.append(now)
        )
        every = []
        for start, end in data.segments():
            for row in range(start, end):
                tokens = data.targets[row : min(end, row + 4)].tolist()
                every.append(tokens + [-1] * (4 - len(tokens)))
        hidden = torch.from_numpy(data.states[:]).to(tiny_base.dtype)
        whole = heads.lattice(tiny_base, hidden, tiny_base.project(hidden), 3)
        count = min(rows, len(data))
        assert seen[-1] == (count, count) and found.targets.shape == (count, 4)
        assert found.source == "pairs.jsonl" and found.sha256 == data.sha256
        places = []
        for ids, target in zip(found.lattice.token_ids, found.targets.tolist(), strict=True):
            (at,) = [i for i in range(len(data)) if every[i] == target and (whole.token_ids[i] == ids).all()][:1]
            places.append(at)
        assert len(set(places)) == count or rows > len(data)
        np.testing.assert_allclose(found.lattice.logps, whole.logps[places], rtol=1e-5)
        again = lattices_of_corpus(tiny_base, heads, data, k=3, rows=rows, seed=0, cache=tmp_path / "again")
        assert (again.targets == found.targets).all()
        BigramTrainer(tiny_base, [found], SMALL).train(tmp_path / "out")  # a text that the base did not write

    def test_what_a_stopped_run_made_is_kept(self, tiny_base, tmp_path, monkeypatch):
        monkeypatch.setattr(bigram, "SHARD_ROWS", 4)
        (tmp_path / "text.txt").write_text("the cat sat on the mat")
        data, heads = read_head_data(tiny_base, tmp_path / "text.txt", tmp_path), make_heads(tiny_base)
        expected = lattices_of_corpus(tiny_base, heads, data, k=3, rows=10, seed=0, cache=tmp_path / "whole")
        made = []

        def interrupt(done: int, total: int) -> None:
            made.append((done, total))
            if len(made) == 3:
                raise StopError

        def again(heads, progress=None):
            return lattices_of_corpus(
                tiny_base, heads, data, k=3, rows=10, seed=0, cache=tmp_path / "out", progress=progress
            )

        with pytest.raises(StopError):
            again(heads, interrupt)
        resumed = []
        found = again(heads, lambda *now: resumed.append(now))
        assert made == [(4, 10), (8, 10), (10, 10)] and resumed == [(10, 10)]
        assert (found.lattice.token_ids == expected.lattice.token_ids).all()
        assert (found.lattice.logps == expected.lattice.logps).all() and found.inputs_sha256 == expected.inputs_sha256
        other = again(make_heads(tiny_base, seed=7), lambda *now: resumed.append(now))
        assert len(resumed) == 4 and other.inputs_sha256 != found.inputs_sha256  # other heads' lattices are other ones
        shard = sorted((tmp_path / "out").glob("*/*.npz"))[0]
        shard.write_bytes(b"broken")
        for told in (heads, make_heads(tiny_base, seed=7)):
            again(told)
        assert (again(heads).lattice.logps == expected.lattice.logps).all(), "what is broken is made again"
        assert np.load(shard)["token_ids"].shape == (4, 4, 3)

    def test_what_was_kept_of_less_text_is_not_taken_for_more(self, tiny_base, tmp_path):
        (tmp_path / "text.txt").write_text("the cat sat on the mat and so did the dog. " * 30)
        heads, found = make_heads(tiny_base), {}
        for most in (300, 600):
            data = read_head_data(tiny_base, tmp_path / "text.txt", tmp_path, max_tokens=most)
            kept = lattices_of_corpus(tiny_base, heads, data, k=3, rows=40, seed=0, cache=tmp_path / "out")
            fresh = lattices_of_corpus(tiny_base, heads, data, k=3, rows=40, seed=0, cache=tmp_path / str(most))
            assert (kept.lattice.token_ids == fresh.lattice.token_ids).all()
            assert (kept.targets == fresh.targets).all()
            found[most] = kept.inputs_sha256
        assert found[300] != found[600]

    def test_k_above_the_vocabulary(self, tiny_base, tmp_path):
        (tmp_path / "text.txt").write_text("the cat sat")
        data = read_head_data(tiny_base, tmp_path / "text.txt", tmp_path)
        assert "k = 258" in refused(
            lambda: lattices_of_corpus(tiny_base, make_heads(tiny_base), data, k=258, rows=5, seed=0, cache=tmp_path)
        )


class TestCheckpoint:
    @pytest.fixture
    def folder(self, tiny_base, tmp_path):
        BigramTrainer(tiny_base, [planted(3, 30)], SMALL).train(tmp_path)
        return tmp_path

    def test_it_comes_back(self, tiny_base, folder):
        trainer = BigramTrainer(tiny_base, [planted(3, 30)], SMALL)
        trainer.train(folder)
        model = load_bigram(folder)
        assert model.config.base_weights_sha256 == tiny_base.identity.weights_sha256
        assert (model.config.hidden_size, model.config.rank) == (32, 4)
        for found, kept in ((model.left, trainer.left), (model.right, trainer.right)):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, kept.detach(), rtol=1e-3, atol=1e-5)  # float16 on disk
        embeddings = tiny_base.output_embeddings.weight
        for table, factor in zip(model.tables(embeddings), (model.left, model.right), strict=True):
            assert table.dtype == np.float32 and table.shape == (257, 4)
            np.testing.assert_allclose(table, (embeddings.float() @ factor).numpy(), rtol=1e-6)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_missing_file_says_what_trains_it(self, folder, name):
        (folder / name).unlink()
        message = refused(lambda: load_bigram(folder))
        assert f"no learned bigram in {folder}; train one: rescore train-bigram" in message

    def test_a_broken_configuration(self, folder):
        (folder / "config.json").write_text('{"rank": 4}')
        message = refused(lambda: load_bigram(folder), InvalidDataError)
        assert "is not the configuration of a bigram: Object missing required field `hidden_size`" in message

    @pytest.mark.parametrize("keep", [0, 30, -1])
    def test_truncated_weights(self, folder, keep):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        assert f"can't read {path}" in refused(lambda: load_bigram(folder), InvalidDataError)

    @pytest.mark.parametrize("change", ["shape", "name", "more"])
    def test_tensors_that_do_not_fit(self, folder, change):
        tensors = load_file(folder / "model.safetensors")
        if change == "shape":
            tensors["left"] = tensors["left"][:, :3].contiguous()
        elif change == "name":
            tensors["middle"] = tensors.pop("left")
        else:
            tensors["middle"] = torch.zeros(2)
        save_file(tensors, folder / "model.safetensors")
        assert "does not fit its config.json" in refused(lambda: load_bigram(folder), InvalidDataError)
