"""The architectures of block heads: copies of head 1 at first, what each of them sees, cut, saved and trained."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_training import SMALL, make_data

from lattices.errors import RescoreError, UnknownNameError
from lm.heads.block_heads import BlockHeads, entropies_of, lattice_of, load_heads
from lm.heads.nets import NETS, BlockHeadsConfig
from lm.heads.projection import DraftRows
from lm.training.data import Rows
from lm.training.heads import HeadTrainer

ARCHITECTURES = tuple(NETS)


def heads_of(base, architecture: str, *, h: int = 5, token_size: int = 6, blocks: int = 1, random: bool = True):
    """Heads of an architecture, all weights random unless they are to be as fresh."""
    torch.manual_seed(1)
    identity = base.identity
    heads = BlockHeads(
        BlockHeadsConfig(
            h=h, hidden_size=32, inner_size=32 if architecture == "medusa" else 12, vocab_size=257,
            base_name=identity.name, tokenizer_sha256=identity.tokenizer_sha256, architecture=architecture,
            token_size=token_size, blocks=blocks,
        )
    ).double()  # fmt: skip
    if random:
        for parameter in heads.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return heads.eval().requires_grad_(False)


@pytest.fixture
def states(tiny_base):
    """States `[n, d]` and logits `[n, vocab]` of the tiny base LM."""
    logits, hidden = tiny_base.forward(torch.tensor([list(range(20))]))
    return hidden[0], logits[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestEach:
    def test_fresh_heads_are_head_1(self, tiny_base, states, architecture):
        hidden, logits = states
        fresh = heads_of(tiny_base, architecture, random=False, blocks=2 if architecture == "medusa" else 1)
        every = fresh.slots(tiny_base, hidden, logits)[0].logits
        for slot in range(1, 5):
            torch.testing.assert_close(every[:, slot], logits.to(every.dtype))

    def test_fresh_heads_can_learn(self, tiny_base, states, architecture):
        """Every tensor gets a gradient after a step or two: nothing is dead from the start."""
        heads = heads_of(tiny_base, architecture, random=False).requires_grad_(True)
        optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
        rows = torch.randn(20, 4, 32, dtype=torch.float64)
        for _ in range(3):
            optimizer.zero_grad()
            (heads(states[0].clone(), rows) - torch.randn(4, 20, 32)).pow(2).sum().backward()
            optimizer.step()
        assert all(bool((p.grad != 0).any()) for p in heads.parameters())

    def test_a_shorter_block_uses_the_first_heads(self, tiny_base, states, architecture):
        hidden, logits = states
        heads = heads_of(tiny_base, architecture)
        whole = heads.slots(tiny_base, hidden, logits)[0].logits
        for h in range(2, 6):
            cut = heads.first(h)
            assert cut.h == h and cut.config.architecture == architecture
            torch.testing.assert_close(cut.slots(tiny_base, hidden, logits)[0].logits, whole[:, :h])

    def test_drafting_from_some_tokens_is_the_softmax_over_these(self, tiny_base, states, architecture):
        hidden, logits = states
        heads = heads_of(tiny_base, architecture)
        common, prompt = torch.tensor([200, 3, 77, 9, 150, 31]), [9, 256, 5, 5, 4]
        projection = DraftRows(tiny_base, common).with_tokens(prompt)
        inside = sorted({*common.tolist(), *prompt})
        assert sorted(projection.token_ids.tolist()) == inside
        first, ahead = heads.slots(tiny_base, hidden, logits, projection=projection)
        assert torch.equal(first.logits[:, 0], logits) and first.token_ids is None
        entropies = entropies_of(ahead.logits)
        found = heads.lattice(tiny_base, hidden, logits, 6, projection=projection)
        weight, drafted = tiny_base.output_embeddings.weight, [logits.argmax(-1)]
        for slot in range(1, 5):
            seen = torch.stack([weight[tokens] for tokens in drafted], dim=1)
            every = tiny_base.project(heads(hidden, seen, [slot - 1])[0])
            outside = torch.ones(257, dtype=torch.bool)
            outside[inside] = False
            logps = torch.log_softmax(every.masked_fill(outside, -torch.inf), dim=-1)
            best = logps.sort(dim=-1, descending=True, stable=True)
            np.testing.assert_array_equal(found.token_ids[:, slot], best.indices[:, :6])
            np.testing.assert_allclose(found.logps[:, slot], best.values[:, :6], rtol=1e-5, atol=1e-6)
            expected = -(logps.exp() * logps.masked_fill(outside, 0.0)).sum(-1)
            np.testing.assert_allclose(entropies[:, slot - 1], expected, rtol=1e-4, atol=1e-6)
            drafted.append(best.indices[:, 0])
        whole = heads.lattice(tiny_base, hidden, logits, 6)
        np.testing.assert_array_equal(found.token_ids[:, 0], whole.token_ids[:, 0])
        every_token = DraftRows(tiny_base, torch.arange(257).flip(0)).with_tokens([1, 2])
        same = heads.lattice(tiny_base, hidden, logits, 6, projection=every_token)
        np.testing.assert_array_equal(same.token_ids, whole.token_ids)

    def test_chosen_heads_only(self, tiny_base, states, architecture):
        heads, rows = heads_of(tiny_base, architecture), torch.randn(20, 4, 32, dtype=torch.float64)
        torch.testing.assert_close(heads(states[0], rows, [1, 3]), heads(states[0], rows)[[1, 3]])

    def test_what_is_saved_is_loaded(self, tiny_base, states, architecture, tmp_path):
        heads = heads_of(tiny_base, architecture, blocks=2 if architecture == "medusa" else 1)
        heads.save(tmp_path, dtype=torch.float64)
        loaded = load_heads(tiny_base.identity, str(tmp_path), dtype=torch.float64)
        assert loaded.config == heads.config
        ours, theirs = (lattice_of(x.slots(tiny_base, *states)[0].logits, 5) for x in (heads, loaded))
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)

    def test_a_byte_a_weight_is_nearly_the_same(self, tiny_base, architecture, tmp_path):
        heads = heads_of(tiny_base, architecture)
        for name in ("float16", "int8"):
            heads.save(tmp_path / name, dtype=getattr(torch, name))
        sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("int8", "float16")]
        assert sizes[0] < sizes[1]
        loaded = load_heads(tiny_base.identity, str(tmp_path / "int8"), dtype=torch.float64).net.state_dict()
        for name, value in heads.net.state_dict().items():
            bound = value.abs().amax(-1, keepdim=True) / 127 / 2 if value.ndim > 1 else torch.tensor(0.0)
            assert bool(((loaded[name] - value).abs() <= bound + 1e-6).all()), name

    def test_it_learns_what_repeats(self, tiny_base, architecture, tmp_path):
        data = make_data(tiny_base, [30] * 12)
        targets = np.tile(np.arange(10, 16, dtype=np.int32), 60)
        data = dataclasses.replace(data, targets=targets, states=Rows([data.states[:] * np.float16(0.1)]))
        wide = None if architecture == "medusa" else 32
        options = dataclasses.replace(
            SMALL, architecture=architecture, inner_size=wide, token_size=16, steps=60, heads_per_step=None,
            learning_rate=2e-2, evaluate_every=60, positions=360, vocabulary=None, soft=0.0,
        )  # fmt: skip
        trainer = HeadTrainer(tiny_base, [data], options)
        before = trainer.evaluate()
        after = trainer.train(tmp_path)
        # Head 1 says which of six tokens comes, the others can tell the rest of it: what repeats has no other secret.
        assert before.top[1][1] < 0.3 and min(after.top[1][1:]) > 0.9 and after.accepted > 3


class TestSequential:
    def test_each_head_sees_what_those_before_it_drafted(self, tiny_base, states):
        hidden, logits = states
        heads = heads_of(tiny_base, "sequential")
        weight = tiny_base.output_embeddings.weight
        drafted = [logits.argmax(-1)]
        for slot in range(1, 5):
            rows = torch.stack([weight[tokens] for tokens in drafted], dim=1)
            expected = tiny_base.project(heads(hidden, rows, [slot - 1])[0])
            torch.testing.assert_close(heads.slots(tiny_base, hidden, logits)[0].logits[:, slot], expected)
            drafted.append(expected.argmax(-1))

    def test_no_head_sees_its_own_token_or_later_ones(self, tiny_base, states):
        heads, rows = heads_of(tiny_base, "sequential"), torch.randn(20, 4, 32, dtype=torch.float64)
        for place in range(4):
            other = rows.clone()
            other[:, place] += 1
            both = zip(heads(states[0], rows), heads(states[0], other), strict=True)
            same = [bool(torch.equal(a, b)) for a, b in both]
            assert same == [True] * place + [False] * (4 - place)

    def test_the_loss_is_given_the_right_draft(self, tiny_base):
        """A head that must say the sum of the two tokens before it can, only if it is shown these."""
        rng = np.random.default_rng(0)
        targets = np.zeros(1200, dtype=np.int32)
        for start in range(0, 1200, 6):
            a, b = rng.integers(0, 6, 2)
            targets[start : start + 6] = [a, 10 + b, 20 + (a + b) % 6, 40, 41, 42]
        data = dataclasses.replace(make_data(tiny_base, [6] * 200), targets=targets)
        states = np.full((1200, 32), 0.1, dtype=np.float16)
        data = dataclasses.replace(data, states=Rows([states]))

        def third(architecture: str) -> float:
            options = dataclasses.replace(
                SMALL, architecture=architecture, inner_size=48, token_size=16, heads_per_step=None, positions=1200,
                vocabulary=None, soft=0.0, learning_rate=2e-2, steps=150, evaluate_every=150, h=3,
            )  # fmt: skip
            trainer = HeadTrainer(tiny_base, [data], options)
            for step in range(150):
                trainer.optimizer.zero_grad()
                for loss in trainer._losses(step):
                    loss.backward()
                trainer.optimizer.step()
            at = np.arange(0, 1200, 6)
            rows = trainer._rows(targets, at[:, None] + np.arange(2))
            read = trainer.heads(torch.from_numpy(states[at].astype(np.float32)), rows, [1])[0]
            best = (read @ tiny_base.output_embeddings.weight.float().T).argmax(-1).numpy()
            return float((best == targets[at + 2]).mean())

        assert third("sequential") > 0.95 and third("feed_forward") < 0.6


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"architecture": "sequential", "token_size": 0}, "token_size = 0"),
            ({"architecture": "medusa"}, "inner_size is not for them"),
            ({"blocks": 2}, "only medusa"),
            ({"head_weights": (1.0,)}, "heads 2 to 4 need one each"),
            ({"head_weights": (0.0, 0.0, 0.0)}, "one of them above 0"),
            ({"head_weights": (1.0, -1.0, 0.0)}, "0 or more"),
            ({"gradient_checkpointing": True}, "for a tuned base"),
            ({"base_learning_rate": 1e-4}, "for a tuned base"),
            ({"base_learning_rate": 0.0, "tune": "lora"}, "base_learning_rate"),
            ({"tuned_layers": 1}, "for a tuned base"),
            ({"lora_rank": 4}, "tuned by LoRA"),
            ({"lora_rank": 4, "tune": "full"}, "tuned by LoRA"),
        ],
    )
    def test_what_does_not_fit_together_is_refused(self, options, named):
        with pytest.raises(RescoreError, match=named):
            dataclasses.replace(SMALL, **options).check()

    @pytest.mark.parametrize("options", [{"architecture": "hydra"}, {"tune": "loraa"}])
    def test_unknown_names_are_refused(self, options):
        with pytest.raises(UnknownNameError):
            dataclasses.replace(SMALL, **options).check()

    def test_head_weights_weigh_the_heads(self, tiny_base):
        data = make_data(tiny_base, [20, 30, 12])
        shared = {"heads_per_step": None, "positions": 99, "vocabulary": None}

        def loss(weights: tuple[float, ...] | None) -> float:
            options = dataclasses.replace(SMALL, head_weights=weights, **shared)
            (value,) = HeadTrainer(tiny_base, [data], options)._losses(0)
            return float(value.detach())

        singles = [loss(tuple(float(i == j) for i in range(3))) for j in range(3)]
        assert loss(None) == pytest.approx(sum(singles), rel=1e-5)
        assert loss((0.5, 0.0, 2.0)) == pytest.approx(0.5 * singles[0] + 2 * singles[2], rel=1e-5)
