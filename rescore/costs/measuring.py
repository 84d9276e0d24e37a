"""Measures a table of costs, each part as a decode has it; and the forwards of many sizes alone.

Steps are whole ones of the decoder at one length of context: call, accepting, keeping. Heads and trees are what a step
takes more with them than without: the forward after the heads is slower as well. What choosing drafts takes is told by
decodes of real text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch

from lattices.errors import RescoreError
from lm.base.catalog import load_base
from lm.base.machine import Work
from lm.base.model import BaseLM
from lm.heads.block_heads import BlockHeads
from lm.heads.projection import DraftRows
from rescore import options as shared
from rescore.checks import check_timing
from rescore.costs.kept import keep_costs, this_machine
from rescore.costs.table import ChoiceCost, Costs, HeadsCost
from rescore.decoding import GREEDY, VERIFY, Last
from rescore.generation.live import Generator
from rescore.options import Spec
from rescore.runs.inputs import Inputs, Progress
from rescore.runs.models import Models
from rescore.runs.run import DEFAULT_K, Run, runs_of
from rescore.tasks import load_task
from rescore.tasks.data import load_examples

CONTEXTS = (64, 256, 640)  # cached tokens
NODES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 72, 144)
VERIFY_SIZES = (1, 2, 4, 5, 9, 16, 32, 64, 144)  # tokens of forwards alone
ADDED_TO = (5, 9, 16)  # tokens of the steps that heads or a tree are added to
ADDED_AT = 256  # cached tokens there, at most
VOCABULARIES = (2048, 4096, 8192, 16384)  # tokens that heads draft from
# What a base can have by what is shipped, as far as it is for this base.
RESCORERS = ("none", "context-ngram", "lookup", "joint", "joint:nodes=auto", "neural-61m")
Made = Callable[[], object]  # a call that is timed
SAMPLE, EXAMPLES, PROMPT_TOKENS, NEW_TOKENS = "squad", 3, 256, 32  # that each of them decodes


@dataclass(frozen=True)
class VerifyCurve:
    """Median `milliseconds` of a forward of `tokens[i]` tokens on `cached` cached ones, and the bytes of weights and
    cache read over that time."""

    base: str
    dtype: str
    device: str
    cached: int
    tokens: list[int]
    milliseconds: list[float]
    gb_per_second: list[float]


def costs_of(
    *,
    inputs: Inputs,
    out: Annotated[Path | None, "Write the table into this file, too."] = None,
    rescorer: Annotated[
        Sequence[Spec],
        "Rescorers and drafters whose time is measured as well, like those of rescore eval. Default: "
        f"{', '.join(RESCORERS)}, as far as the base has what they need.",
    ] = (),
    drafter: shared.Drafters = (),
    k: Annotated[shared.Ks, "Tokens of each head that are in the lattice. Default: 16."] = (),
    p: Annotated[shared.Ps, "Drafts that one step verifies. Default: 1."] = (),
    cached: Annotated[
        Sequence[int], "Tokens in the cache. Default: of 64, 256 and 640 those that the base has room for."
    ] = (),
    repeats: shared.Repeats = 5,
    progress: Progress | None = None,
) -> Costs:
    """Measures the costs of a base LM with its heads, if it has some, and keeps them on this machine.

    Raises `RescoreError` for models that can't be loaded, for rescorers and drafters that can't be had, and as
    `measure_costs` and `keep_costs`; what needs no model to be refused, before one is loaded.
    """
    inputs.check()
    check_timing(cached or CONTEXTS, repeats)
    runs = runs_of(rescorer or RESCORERS, ks=k, ps=p, drafters=drafter)
    for run in runs:
        run.load_drafters(run.load())
    models = Models(inputs, heads_needed=False)
    base, heads = models.base, models.heads
    if inputs.h is not None:
        if heads is None:
            raise RescoreError(f"--h {inputs.h} is of block heads, and {base.identity.name} has none; drop it")
        heads = heads.first(inputs.h)
    room = base.prompt_room(max(NODES))
    contexts = cached or [each for each in CONTEXTS if each <= room] or CONTEXTS[:1]  # which says what room there is
    costs = measure_costs(
        base, heads, runs, contexts=contexts, k=max(k, default=DEFAULT_K), repeats=repeats, must=bool(rescorer),
        progress=progress,
    )  # fmt: skip
    keep_costs(costs, out)
    return costs


def measure_costs(
    base: BaseLM,
    heads: BlockHeads | None,
    runs: Sequence[Run] = (),
    *,
    contexts: Sequence[int] = CONTEXTS,
    nodes: Sequence[int] = NODES,
    k: int = DEFAULT_K,
    repeats: int = 5,
    must: bool = True,
    progress: Progress | None = None,
) -> Costs:
    """Measures them with the weights laid out as decoding has them.

    runs: whose drafting and rescoring is measured; those that can't be had are refused if they `must` be, else left
    out. k: lattice entries of a slot, of the heads. Raises `RescoreError` for contexts that do not fit.
    """
    check_timing(contexts, repeats)
    contexts, nodes, identity = sorted(set(contexts)), sorted(set(nodes)), base.identity
    # What can't be had is refused before the work; what plans is made when there are costs to plan by.
    made = {run: _generator(base, heads, run, must) for run in runs if not run.load().plans}

    def told(done: int) -> None:
        if progress:
            progress("costs", done, repeats + 1 + len(runs))

    decodes = [StandingDecode(base, cached, max(nodes)) for cached in contexts]
    groups = [step_calls(decode, nodes) for decode in decodes]
    beside = StandingDecode(base, max(1, min(ADDED_AT, base.prompt_room(max(ADDED_TO)))), max(ADDED_TO))
    if base.supports_tree:
        # Steps of one draft, each beside one of two drafts as a tree of as many tokens: with its mask, which is made.
        groups.append([partial(beside.step, drafts) for n in ADDED_TO for drafts in (np.arange(n)[None], _fork(n))])
    if heads:
        groups.append(heads_calls(beside, heads, k))
    times = times_of(groups, repeats, told)
    steps, added = times[: len(decodes)], times[len(decodes) :]
    costs = Costs(
        base=identity.name, weights_sha256=identity.weights_sha256, config_sha256=identity.config_sha256,
        dtype=identity.dtype, device=str(base.device), compiles=base.compiles,
        machine=this_machine(str(base.device)), contexts=contexts, nodes=nodes,
        step_ms=[np.median(each, axis=0).tolist() for each in steps],
        tree_ms=max(0.0, added_by(added[0])) if base.supports_tree else None,
        heads=heads_cost(base, heads, beside, added[-1], k, repeats) if heads else None,
    )  # fmt: skip
    choices = []
    for done, run in enumerate(runs, start=1):
        if generator := made[run] if run in made else _generator(base, heads, run, must, costs):
            ms = choice_milliseconds(generator)
            choices.append(ChoiceCost(rescorer=run.chooses, k=run.k, p=run.p, ms=ms))
        told(repeats + 1 + done)
    return msgspec.structs.replace(costs, choices=choices)


def _generator(
    base: BaseLM, heads: BlockHeads | None, run: Run, must: bool, costs: Costs | None = None
) -> Generator | None:
    try:
        return Generator.of(base, heads, run, costs=costs)
    except RescoreError:
        if must:
            raise
    return None


class StandingDecode:
    """A decode at one length of context: it makes steps of any drafts and forgets what they accepted.

    cached: tokens of the context; longest: tokens of a call. Raises `RescoreError` where these do not fit.
    """

    def __init__(self, base: BaseLM, cached: int, longest: int) -> None:
        prompt = torch.randint(base.vocab_size, (cached,), generator=torch.Generator().manual_seed(0)).tolist()
        if len(base.prefix(prompt[:1])) + longest > base.context_length:
            raise RescoreError(
                f"calls of up to {longest} tokens are measured, and the context of {base.identity.name} is "
                f"{base.context_length}; give another --base"
            )
        if cached > base.prompt_room(longest):
            context = f"do not fit into the context of {base.context_length} with a call of {longest}"
            encoder = f"are more than the {base.prompt_length} that the encoder reads"
            raise RescoreError(f"{cached} cached tokens {encoder if base.has_encoder else context}; lower --cached")
        base.pack()
        self.base, self.cached = base, len(base.prefix(prompt))
        self.cache = base.new_decoding_cache(self.cached + longest)
        self.last = Last(*base.read_prompt(prompt, self.cache), 0)

    def step(self, drafts: np.ndarray, heads: BlockHeads | None = None, k: int = 1) -> None:
        """A step of drafts int64 `[p, l]` as a tree, the heads asked before it if they are given."""
        if heads is not None:
            heads.lattice(self.base, self.last.hidden, self.last.logits, k)
        verified = VERIFY["tree"](self.base, self.cache, drafts)
        row, n, choice = GREEDY.judge(drafts, verified, drafts.shape[1], self.base.eos_token_ids)
        self.last = verified.keep(self.cache, row, n, choice)
        self.cache.length = self.cached


def step_calls(decode: StandingDecode, sizes: Sequence[int]) -> list[Made]:
    """Steps of one draft of each of the sizes (rising)."""
    return [partial(decode.step, np.arange(n)[None]) for n in sizes]


def heads_calls(decode: StandingDecode, heads: BlockHeads, k: int, sizes: Sequence[int] = ADDED_TO) -> list[Made]:
    """Steps of one draft, each beside one that asks heads for a lattice of k entries a slot; and asking alone."""
    alone = partial(heads.lattice, decode.base, decode.last.hidden, decode.last.logits, k)
    drafts = [np.arange(n)[None] for n in sizes]
    return [*(partial(decode.step, d, *more) for d in drafts for more in ((), (heads, k))), alone]


def added_by(times: np.ndarray) -> float:
    """The median of what the second of each pair of calls takes more than the first; times `[turns, 2 x pairs]`."""
    return float(np.median(times[:, 1::2] - times[:, 0::2]))


def heads_added(times: np.ndarray) -> float:
    """What heads add to a step, of the times of `heads_calls`; it is not less than what they take alone."""
    return max(added_by(times[:, :-1]), float(np.median(times[:, -1])))


def heads_cost(
    base: BaseLM, heads: BlockHeads, decode: StandingDecode, times: np.ndarray, k: int, repeats: int
) -> HeadsCost:
    """What heads add to a step, of the times of `heads_calls`: with fewer tokens to draft from so much less as asking
    them alone takes less."""
    whole, alone = heads_added(times), float(np.median(times[:, -1]))
    sizes = [size for size in VOCABULARIES if k <= size < base.vocab_size] if heads.projection is None else []
    projections = [DraftRows(base, torch.arange(size)).with_tokens(()) for size in sizes]
    state = (base, decode.last.hidden, decode.last.logits, k)
    asks = [partial(heads.lattice, *state, projection=projection) for projection in projections]
    fewer = np.median(times_of([asks], repeats)[0], axis=0).tolist() if asks else []
    vocabulary_ms = {size: max(ms, whole - alone + ms) for size, ms in zip(sizes, fewer, strict=True)}
    if vocabulary_ms:
        vocabulary_ms[base.vocab_size] = whole
    return HeadsCost(sha256=heads.sha256, h=heads.h, ms=whole, vocabulary_ms=vocabulary_ms)


def choice_milliseconds(generator: Generator) -> float:
    """The median of what drafting and rescoring take in a step, the heads apart, over steps of some of the task's
    embedded sample."""
    base, task = generator.base, load_task(SAMPLE)
    most = min(PROMPT_TOKENS, base.prompt_room(NEW_TOKENS))
    seconds = []
    for place, example in enumerate(load_examples(task, data=task.sample, limit=EXAMPLES).examples):
        prompt_ids = base.encode_prompt(example.prompt, chat=task.chat and base.is_chat, max_tokens=most)
        if not place:  # the first steps of a process allocate and compile
            generator.decode(prompt_ids, NEW_TOKENS)
        seconds += generator.decode(prompt_ids, NEW_TOKENS).rescore_seconds
    return float(np.median(seconds)) * 1e3 if seconds else 0.0


def times_of(
    groups: Sequence[Sequence[Made]], repeats: int, told: Callable[[int], object] = lambda turn: None
) -> list[np.ndarray]:
    """Milliseconds of each call in each turn, float64 `[repeats, calls]` of each group.

    All calls take turns, so that noise falls on all alike; one turn before warms up. The first call of a group is made
    once more before each turn, untimed: what a larger one leaves in the caches makes a small one slower, and in a
    decode calls of about the same size follow each other. So a group is in the order of size. told: after each turn.
    """
    times = [np.zeros((repeats + 1, len(group))) for group in groups]
    for turn in range(repeats + 1):
        for group, of in zip(groups, times, strict=True):
            group[0]()
            for place, call in enumerate(group):
                start = time.perf_counter()
                call()
                of[turn, place] = (time.perf_counter() - start) * 1e3
        told(turn + 1)
    return [of[1:] for of in times]


def _fork(n: int) -> np.ndarray:
    """Two drafts of n different tokens together, the first of them shared: int64 `[2, l]`."""
    first = np.arange(n // 2 + 1)
    second = np.concatenate([[0], np.arange(len(first), n)])
    return np.stack([first, np.pad(second, (0, len(first) - len(second)), constant_values=-1)])


def verify_curve_of(inputs: Inputs, *, cached: int = 256, repeats: int = 7) -> VerifyCurve:
    """`verify_curve` of a base LM by its name. Raises `RescoreError` as that and `load_base`."""
    check_timing([cached], repeats)
    base = load_base(inputs.base, dtype=inputs.dtype, device=inputs.device, compile=inputs.compile)
    return verify_curve(base, cached=cached, repeats=repeats)


def verify_curve(
    base: BaseLM, *, cached: int = 256, repeats: int = 7, sizes: Sequence[int] = VERIFY_SIZES
) -> VerifyCurve:
    """Times one forward of 1 to 144 tokens on a cache, with the weights laid out as decoding has them.

    Raises `RescoreError` for a cache that does not fit.
    """
    check_timing([cached], repeats)
    decode = StandingDecode(base, cached, max(sizes))
    ids = torch.randint(base.vocab_size, (1, max(sizes)), generator=torch.Generator().manual_seed(0)).to(base.device)

    def verify(n: int) -> None:
        base.forward(ids[:, :n], decode.cache)
        if base.device.type == "cuda":
            torch.cuda.synchronize()

    (times,) = times_of([[partial(verify, n) for n in sizes]], repeats)
    medians = np.median(times, axis=0).tolist()
    work = Work(base)
    work.add(tokens=0, projected=0, cached=cached)
    return VerifyCurve(
        base=base.identity.name,
        dtype=base.identity.dtype,
        device=str(base.device),
        cached=cached,
        tokens=list(sizes),
        milliseconds=medians,
        gb_per_second=[work.bytes_read / ms / 1e6 for ms in medians],
    )
