"""Acceptance rules by themselves: the law of sampled output, exactly, and what the lossy rules keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled.enumerated import decided_by, outcomes

from lattices.errors import RescoreError
from rescore.acceptance import Greedy, load_rule
from rescore.acceptance.rules import Drawn, RandomSource, Verdict
from rescore.acceptance.sampling import Sampling, try_candidates
from tests.conftest import refused


@dataclass
class Said:
    """What a base says after every token of drafts, `[p, l, vocab]`, as a batch of rows."""

    logits: torch.Tensor

    def __post_init__(self) -> None:
        self.choices = self.logits.argmax(-1).numpy()
        p, length = self.choices.shape
        self.rows = np.broadcast_to(np.arange(p)[:, None], (p, length))
        self.columns = np.broadcast_to(np.arange(length), (p, length))

    def best(self, k: int) -> np.ndarray:
        """The k likeliest after each, equal ones by lowest id."""
        return np.argsort(-self.logits.numpy(), axis=-1, kind="stable")[..., :k]


class Told:
    """Random numbers that are given, and 0.5 afterwards."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0) if self.numbers else 0.5


def told(*numbers: float) -> RandomSource:
    source = RandomSource(0)
    source._numbers = Told(*numbers)  # type: ignore[assignment]
    return source


REJECTS = 1 - 2.0**-53  # the largest random number


def acceptance(law: np.ndarray, candidates: list[int], drawn: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """The law of the next token as the code has it: every outcome of every verdict, and of the draw after them."""

    def next_token(source: RandomSource) -> int:
        accepted, left = try_candidates(law, candidates, source, drawn)
        return source.draw(left) if accepted is None else accepted

    out = np.zeros(len(law))
    for token, probability in outcomes(next_token):
        out[token] += probability
    return out


laws = st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(any).map(lambda x: np.array(x) / sum(x))


@given(laws, st.permutations(range(5)), st.integers(0, 5))
@settings(deadline=None)
def test_given_candidates_leave_the_law(law: np.ndarray, order: list[int], count: int):
    np.testing.assert_allclose(acceptance(law, order[:count], None), law, atol=1e-9)


@given(laws, laws, st.integers(1, 3))
@settings(deadline=None)
def test_drawn_candidates_leave_the_law(law: np.ndarray, q: np.ndarray, count: int):
    """Over all ways in which so many candidates can be drawn without replacement."""
    ids = np.arange(5)
    out = np.zeros(5)

    def every(chosen: list[int], weight: float) -> None:
        left = q.copy()
        left[chosen] = 0.0
        if len(chosen) == count or left.sum() == 0:
            nonlocal out
            out += weight * acceptance(law, chosen, (ids, q))
            return
        for token in np.flatnonzero(left):
            every([*chosen, int(token)], weight * left[token] / left.sum())

    every([], 1.0)
    np.testing.assert_allclose(out, law, atol=1e-9)


@given(laws, st.floats(0.01, 1))
def test_a_random_source_answers_with_these_probabilities(law: np.ndarray, q: float):
    """How far the random number may go for each answer, found by halving."""

    def bound(holds: Callable[[RandomSource], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(told(middle)) else (low, middle)
        return low

    for p in law.tolist():
        assert bound(lambda source, p=p: source.accepts(p, q)) == pytest.approx(min(1.0, p / q), abs=1e-12)
    for place in range(len(law)):
        for probs in (law, 3 * law):
            upper = bound(lambda source, place=place, probs=probs: source.draw(probs) <= place)
            assert upper == pytest.approx(law[: place + 1].sum(), abs=1e-12)


def test_what_has_no_probability_never_comes():
    law = np.array([0.0, 0.0, 1.0, 0.0])
    assert try_candidates(law, [0], told(0.0))[0] is None
    assert try_candidates(law, [0], told(0.0), (np.array([0]), np.array([1.0])))[0] is None
    for number in (0.0, 0.5, REJECTS):
        assert told(number).draw(law) == 2


@pytest.mark.parametrize("q", [None, 1.0])
def test_a_rejection_by_rounding_leaves_something_to_draw_from(q: float | None):
    law = np.array([0.0, REJECTS])
    accepted, left = try_candidates(law, [1], told(REJECTS), q and (np.array([1]), np.array([q])))
    assert accepted is None and told().draw(left) == 1


@given(laws, st.lists(st.permutations(range(5)), min_size=1, max_size=3), laws, st.booleans())
@settings(deadline=None)
def test_random_numbers_of_0_accept_nothing_without_probability(
    law: np.ndarray, drafts: list[list[int]], q: np.ndarray, drawn: bool
):
    """Tokens 0 to 4 follow each other after token 5, each of the same law: "at most p" would accept one of p = 0."""
    rows = np.array([[5, *draft] for draft in drafts])
    with np.errstate(divide="ignore"):
        said = Said(torch.from_numpy(np.log([*law, 0.0])).expand(len(rows), 6, -1))
    rule = Sampling()
    rule.random_source = told(*[0.0] * 40)
    of_slots = Drawn(np.tile(np.arange(5), (6, 1)), np.tile(q, (6, 1))) if drawn else None
    row, n, choice = rule.judge(rows, said, 7, (), of_slots)
    assert all(law[token] > 0 for token in [*rows[row, 1:n].tolist(), choice])
    if not drawn:  # the first candidate that has any is accepted
        possible = [next((t for t in dict.fromkeys(rows[:, 1].tolist()) if law[t] > 0), None)]
        assert (rows[row, 1] if n > 1 else None) == possible[0]


def test_a_tree_has_the_law_of_its_tokens():
    """Three drafts of two tokens after the first: the probabilities of the two tokens that come next."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 6, generator=generator)  # after the first token, and after each of six that may follow
    drafts = np.array([[0, 1, 2], [0, 1, 3], [0, 4, 2]])
    said = Said(torch.stack([torch.stack([logits[0], logits[1 + d[1]], logits[0]]) for d in drafts.tolist()]))
    rule = Sampling(0.8, top_k=5)
    after = [rule.law(logits[1 + token]) for token in range(6)]

    def next_two(source: RandomSource) -> tuple[int, int]:
        row, n, choice = decided_by(rule, source).judge(drafts, said, 9, ())
        two = [*drafts[row, 1:n].tolist(), choice][:2]
        return two[0], two[1] if len(two) == 2 else source.draw(after[choice])

    found = np.zeros((6, 6))
    for two, probability in outcomes(next_two):
        found[two] += probability
    np.testing.assert_allclose(found, rule.law(logits[0])[:, None] * np.stack(after), atol=1e-12)


def test_the_laws_are_those_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    ids = torch.tensor([[1, 2, 3]])
    for settings_ in (
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.7},
        {"temperature": 1.4, "top_k": 6, "top_p": 0.8},
    ):
        asked = {"top_k": 0, **settings_}
        out = model.generate(
            ids,
            do_sample=True,
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=0,
            **asked,
        )
        theirs = torch.softmax(out.scores[0][0].double(), -1).numpy()
        ours = Sampling(**settings_).law(model(ids).logits[0, -1].detach())
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_same_seed_and_key_draw_the_same():
    law, rule = np.full(100, 0.01), Sampling(seed=3)
    one, again, other = (rule.started(key).random_source.draw(law) for key in ("a", "a", "b"))
    assert one == again != other


LOGITS = torch.tensor([[2.0, 1, 0, 0, -1], [0, 3, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
ROWS = np.array([[4, 0, 1, 2], [4, 1, 1, 2], [4, 2, 1, 2]])
SAID = Said(LOGITS[None].expand(3, -1, -1))


class TestLossy:
    """The vectors of the reference implementations' rules, where there are some."""

    def test_greedy(self):
        assert Greedy().judge(ROWS, SAID, 9, ()) == Verdict(0, 3, 0)

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_typical(self, temperature: float):
        rule = load_rule(f"typical:temperature={temperature}")
        assert rule.lossy and rule.judge(ROWS, SAID, 9, ()) == Verdict(0, 4, 0)

    def test_typical_takes_the_likeliest_of_equally_long_ones(self):
        logits = torch.zeros(2, 2, 4)
        logits[:, 0] = torch.tensor([0.0, 1.0, 2.0, 0.0])
        drafts = np.array([[0, 1], [0, 2]])
        assert load_rule("typical:eps=0.05,alpha=1").judge(drafts, Said(logits), 9, ())[:2] == (1, 2)

    @pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 2), (3, 3), (4, 4)])
    def test_top_k(self, k: int, n: int):
        logits = torch.tensor([[0.0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
        drafts = np.array([[0, 3, 2, 3]])  # ranks 2, 3, 4 (of equal ones)
        assert load_rule(f"top-k:{k}").judge(drafts, Said(logits[None]), 9, ()).n == n

    @pytest.mark.parametrize(("eps", "n"), [(0, 1), (1, 2), (2, 2), (3, 3)])
    def test_distance(self, eps: int, n: int):
        logits = torch.eye(5)[[4, 0, 0]][None]
        assert load_rule(f"distance:eps={eps}").judge(np.array([[0, 3, 3]]), Said(logits), 9, ()).n == n

    def test_min_block(self):
        logits = torch.eye(5)[[4, 0, 0]][None]
        drafts = np.array([[0, 3, 3]])
        assert load_rule("min-block:2").judge(drafts, Said(logits), 9, ()) == Verdict(0, 2, 0)
        assert load_rule("min-block:3").judge(drafts, Said(logits), 9, ()).n == 3
        assert load_rule("min-block:3").judge(drafts, Said(logits), 9, (3,)).n == 2  # nothing follows end-of-text
        assert load_rule("min-block:9").judge(drafts, Said(logits), 3, ()).n == 3
        short = np.array([[0, 3, -1]])
        assert load_rule("min-block:3").judge(short, Said(logits), 3, ()).n == 2  # as far as the draft goes

    def test_a_step_with_the_greedy_tokens_is_the_greedy_one(self):
        logits = torch.eye(5)[[3, 2, 0]][None]
        for spec in ("typical", "top-k:2", "distance:0", "min-block:2"):
            assert load_rule(spec).judge(np.array([[0, 3, 2]]), Said(logits), 9, ()) == Verdict(0, 3, 0)

    def test_the_limit_holds(self):
        logits = torch.eye(5)[[3, 2, 0]][None]
        for spec in ("greedy", "typical", "top-k:2", "distance:0", "min-block:3"):
            assert load_rule(spec).judge(np.array([[0, 3]]), Said(logits[:, :2]), 2, ()).n == 2

    @pytest.mark.parametrize(
        ("spec", "told"),
        [
            ("typical:eps=0", "eps between 0 and 1"), ("typical:alpha=-1", "alpha and temperature above 0"),
            ("typical:temperature=0", "temperature above 0"), ("top-k:0", "k and least of 1 or more"),
            ("distance:eps=-1", "eps of 0 or more"), ("min-block:1", "with 1 it is greedy"),
            ("nucleus", "unknown acceptance rule 'nucleus'"), ("top-k:k=x", "k is a whole number"),
        ],
    )  # fmt: skip
    def test_bad_input(self, spec: str, told: str):
        refused(lambda: load_rule(spec), told)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"temperature": 0.0}, "--temperature 0"), ({"temperature": -1.0}, "--temperature -1"),
        ({"top_p": 0.0}, "--top-p 0"), ({"top_p": 1.5}, "--top-p 1.5"), ({"top_k": -1}, "--top-k -1"),
        ({"seed": -1}, "--sampling-seed -1"), ({"temperature": float("nan")}, "--temperature nan"),
    ],
)  # fmt: skip
def test_sampling_that_makes_no_sense_is_refused(asked: dict[str, float], told: str):
    with pytest.raises(RescoreError, match=told):
        Sampling(**asked)  # type: ignore[arg-type]


def test_drawn_is_by_slot():
    """The second slot's distribution is that of the tokens after the first."""
    logits = torch.zeros(1, 2, 3)
    drawn = Drawn(np.array([[0, 1], [1, 2]]), np.array([[1.0, 0.0], [0.5, 0.5]]))
    rule = Sampling()
    rule.random_source = told(0.6, 0.5)
    assert rule.judge(np.array([[0, 1]]), Said(logits), 9, (), drawn).n == 2  # 0.6 * 0.5 < 1/3
    rule.random_source = told(0.7, 0.5)
    assert rule.judge(np.array([[0, 1]]), Said(logits), 9, (), drawn).n == 1
