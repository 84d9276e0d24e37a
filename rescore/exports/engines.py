"""What inference engines and benchmarks take of a result: a record for each schema, which checks itself.

Other programs count a step by its *drafted* tokens and the one that the verify call adds (the bonus token); here a step
counts the base's own token and the drafted ones behind it. Both are the same number: draft token i (from 0) of theirs
is token i + 2 of ours, so what they call rate i is `marginal` of i + 2, K drafted tokens are a block of K + 1, and
their mean length with the bonus is block efficiency. Sources of the schemas: docs/interop.md.

Knows counts only; `rescore.exports.result` takes them out of results.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from lattices.errors import InvalidDataError
from lm.records import Count, Number, plain

DIGITS = 6  # of a rate
Rate = Annotated[float, msgspec.Meta(ge=0, le=1)]
EngineDrafter = tuple[str, str | None]  # method and model, by the engine's names
PROFILE_SCHEMA = "1.0"


@dataclass(frozen=True)
class Counts:
    """The accepted lengths of one result.

    histogram: [i] = steps that accepted i tokens, the base's own included, i = 0..longest.
    drafted: [j] = of steps that drafted j tokens behind the base's own, their histogram by accepted drafted tokens
        (0..j); None where that is not known: of several drafts a step only the winning one is.
    """

    histogram: Sequence[int]
    drafted: dict[int, list[int]] | None = None

    @property
    def draft_tokens(self) -> int:
        """Tokens that a step drafts behind the base's own, at most."""
        return len(self.histogram) - 2

    @property
    def steps(self) -> int:
        return sum(self.histogram)

    @property
    def tokens(self) -> int:
        return sum(length * steps for length, steps in enumerate(self.histogram))

    @property
    def mean(self) -> float:
        """Tokens a step: block efficiency."""
        return self.tokens / self.steps

    @property
    def at_least(self) -> list[int]:
        """Steps that accepted drafted token i, by i from 0."""
        return [sum(self.histogram[i + 2 :]) for i in range(self.draft_tokens)]

    @property
    def rates(self) -> list[float]:
        """Shares of steps that accepted drafted token i."""
        return [round(steps / self.steps, DIGITS) for steps in self.at_least]

    @property
    def conditional(self) -> list[float]:
        """Shares of the steps that accepted drafted token i - 1 which accepted token i too; 0 where there is none."""
        pairs = pairwise([self.steps, *self.at_least])
        return [round(after / before, DIGITS) if before else 0.0 for before, after in pairs]


def _check(holds: bool, schema: str, identity: str) -> None:
    if not holds:
        raise InvalidDataError(f"this is no {schema}: {identity}; run the evaluation again")


def _check_rates(schema: str, rates: Sequence[float], count: int, mean: float | None = None) -> None:
    _check(count > 0 and len(rates) == count, schema, f"{len(rates)} rates for {count} drafted tokens")
    _check(all(a >= b for a, b in pairwise(rates)) and all(0 <= r <= 1 for r in rates), schema, "the rates rise")
    if mean is not None:
        near = abs(1 + sum(rates) - mean) <= (count + 1) * 10**-DIGITS
        _check(near, schema, f"1 and the rates are {1 + sum(rates):.6f}, the mean length {mean:.6f}")


class Exportable(msgspec.Struct, frozen=True, kw_only=True):
    """What a program takes: one JSON document, printed as it is written, where a schema does not say otherwise."""

    def command(self) -> str:
        """What is printed, to be pasted."""
        return self.file()

    def file(self) -> str:
        """What is written."""
        return msgspec.json.encode(self).decode()


class VllmSynthetic(Exportable, frozen=True, kw_only=True):
    """The value of vLLM's `--speculative-config` for synthetic acceptance: unconditional rates of drafted tokens."""

    method: str | UnsetType = UNSET
    model: str | UnsetType = UNSET
    num_speculative_tokens: Count
    rejection_sample_method: Literal["synthetic"] = "synthetic"
    synthetic_acceptance_rates: list[Rate]

    def __post_init__(self) -> None:
        _check_rates("speculative config of vLLM", self.synthetic_acceptance_rates, self.num_speculative_tokens)

    @classmethod
    def of(cls, counts: Counts, drafter: EngineDrafter | None) -> VllmSynthetic:
        """Of a result; drafter: the one that the engine is to run."""
        method, model = drafter or (UNSET, None)
        rates = counts.rates
        return cls(
            method=method, model=model or UNSET, num_speculative_tokens=len(rates), synthetic_acceptance_rates=rates
        )

    def command(self) -> str:
        """The option as it is pasted."""
        return f"--speculative-config {shlex.quote(self.file())}"


class LlamaSynthetic(Exportable, frozen=True, kw_only=True):
    """llama.cpp's option for synthetic acceptance (llama-server, llama-cli): unconditional rates of drafted tokens."""

    rates: list[Rate]

    def __post_init__(self) -> None:
        _check_rates("synthetic acceptance of llama.cpp", self.rates, len(self.rates))

    @classmethod
    def of(cls, counts: Counts) -> LlamaSynthetic:
        return cls(rates=counts.rates)

    def file(self) -> str:
        return f"--spec-synthetic-acceptance-rates {','.join(f'{rate:.{DIGITS}f}' for rate in self.rates)}"


class SglangSimulated(Exportable, frozen=True, kw_only=True):
    """SGLang's environment for simulated acceptance: a mean length, the bonus token counted, and no profile.

    `match-expected` draws between the two whole numbers around the mean; drafts of K tokens accept at most K + 1.
    """

    SGLANG_SIMULATE_ACC_LEN: Annotated[float, msgspec.Meta(ge=1)]
    SGLANG_SIMULATE_ACC_METHOD: Literal["match-expected"] = "match-expected"
    SGLANG_SIMULATE_ACC_TOKEN_MODE: Literal["real-draft-token"] = "real-draft-token"

    @classmethod
    def of(cls, counts: Counts) -> SglangSimulated:
        return cls(SGLANG_SIMULATE_ACC_LEN=round(counts.mean, DIGITS))

    def command(self) -> str:
        """What stands before the command that starts the server."""
        return " ".join(self.file().splitlines())

    def file(self) -> str:
        return "\n".join(f"{name}={value}" for name, value in msgspec.structs.asdict(self).items())


class AcceptanceHistogram(Exportable, frozen=True, kw_only=True):
    """What vLLM reports as `metrics.speculative_decoding`, here of all steps of a result.

    acceptance_histogram: [j] = steps that accepted j drafted tokens.
    mean_acceptance_length: the bonus token counted. num_spec_tokens: drafted by a step, at most.
    draft_acceptance_rate, acceptance_histogram_by_draft_length, num_draft_tokens: absent where it is not known how many
        tokens every step drafted.
    """

    mean_acceptance_length: Number
    draft_acceptance_rate: Rate | UnsetType = UNSET
    acceptance_histogram: list[Count]
    acceptance_histogram_by_draft_length: dict[str, list[Count]] | UnsetType = UNSET
    num_spec_steps: Count
    num_accepted_draft_tokens: Count
    num_draft_tokens: Count | UnsetType = UNSET
    num_spec_tokens: Count

    def __post_init__(self) -> None:
        name, histogram = "acceptance histogram", self.acceptance_histogram
        accepted = sum(j * steps for j, steps in enumerate(histogram))
        _check(len(histogram) == self.num_spec_tokens + 1, name, "its length is not that of a draft and 1")
        _check(sum(histogram) == self.num_spec_steps, name, "it does not sum to the steps")
        _check(accepted == self.num_accepted_draft_tokens, name, "it does not sum to the accepted tokens")
        if self.acceptance_histogram_by_draft_length is not UNSET:
            parts = self.acceptance_histogram_by_draft_length.items()
            _check(all(len(part) == int(j) + 1 for j, part in parts), name, "a part has another length than its drafts")
            sums = [sum(part[i] for _, part in parts if i < len(part)) for i in range(len(histogram))]
            _check(sums == histogram, name, "its parts do not sum to it")

    @classmethod
    def of(cls, counts: Counts) -> AcceptanceHistogram:
        accepted, drafted = counts.tokens - counts.steps, counts.drafted
        total = sum(j * sum(steps) for j, steps in drafted.items()) if drafted is not None else None
        return cls(
            mean_acceptance_length=counts.mean,
            draft_acceptance_rate=UNSET if total is None else accepted / total if total else 0.0,
            acceptance_histogram=list(counts.histogram[1:]),
            acceptance_histogram_by_draft_length=(
                UNSET if drafted is None else {str(j): steps for j, steps in sorted(drafted.items())}
            ),
            num_spec_steps=counts.steps,
            num_accepted_draft_tokens=accepted,
            num_draft_tokens=UNSET if total is None else total,
            num_spec_tokens=counts.draft_tokens,
        )


class SpecBenchChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of a model: of each turn text, steps, tokens and seconds (prompt included); `accept_lengths` of all
    steps, in tokens added."""

    index: Count = 0
    turns: list[str]
    decoding_steps: list[Count]
    new_tokens: list[Count]
    wall_time: list[Number]
    accept_lengths: list[Count]

    def __post_init__(self) -> None:
        name, turns = "answer of Spec-Bench", len(self.turns)
        _check({len(self.decoding_steps), len(self.new_tokens), len(self.wall_time)} == {turns}, name, "turns differ")
        _check(sum(self.decoding_steps) == len(self.accept_lengths), name, "steps and accepted lengths differ")
        _check(sum(self.new_tokens) == sum(self.accept_lengths), name, "tokens and accepted lengths differ")


class SpecBenchAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A line of Spec-Bench's answer files; `tstamp` in seconds since 1970."""

    question_id: int | str
    category: str
    answer_id: str
    model_id: str
    choices: list[SpecBenchChoice]
    tstamp: Number


class SpecBenchAnswers(Exportable, frozen=True, kw_only=True):
    """A whole answer file."""

    answers: list[SpecBenchAnswer]

    def file(self) -> str:
        return "\n".join(msgspec.json.encode(answer).decode() for answer in self.answers)


class SpeculationProfile(Exportable, frozen=True, kw_only=True):
    """NVIDIA's `speculation_profile.json`, of proposals that are not merged: the schema may change.

    Lengths count the bonus token: `marginal_accept_rates[i]` = share of steps with a length of i + 2 or more.
    """

    schema_version: str = PROFILE_SCHEMA
    measured: bool = True
    method: str | None
    draft_checkpoint: dict[str, Any]
    target_model: dict[str, Any]
    num_speculative_tokens: Count
    block_size: Count | None = None
    max_supported_k: Count
    verification_method: Literal["longest_prefix"] = "longest_prefix"
    conditional_accept_rates: list[Rate]
    marginal_accept_rates: list[Rate]
    mean_accept_length: Number
    mean_accept_length_per_request: Number
    accept_length_model: Literal["measured_per_k"] = "measured_per_k"
    accept_length_by_k: dict[str, Number]
    acceptance_length_histogram: dict[str, Count]
    per_category: dict[str, dict[str, Number]]
    measurement_conditions: dict[str, Any]

    def __post_init__(self) -> None:
        name, rates, count = "speculation profile", self.marginal_accept_rates, self.num_speculative_tokens
        _check_rates(name, rates, count, self.mean_accept_length)
        _check(len(self.conditional_accept_rates) == count, name, "its two lists of rates differ in length")
        reached = 1.0
        for rate, conditional in zip(rates, self.conditional_accept_rates, strict=True):
            _check(abs(reached * conditional - rate) <= 2 * 10**-DIGITS, name, "its two lists of rates do not agree")
            reached = rate

    @classmethod
    def of(
        cls,
        counts: Counts,
        drafter: EngineDrafter | None,
        *,
        macro: float,
        category: str,
        draft: dict[str, Any],
        target: dict[str, Any],
        conditions: dict[str, Any],
    ) -> SpeculationProfile:
        """Of a result; macro: its mean over examples; category: what it was measured on."""
        k, mean = counts.draft_tokens, round(counts.mean, DIGITS)
        return cls(
            method=drafter and drafter[0],
            draft_checkpoint=draft,
            target_model=target,
            num_speculative_tokens=k,
            max_supported_k=k,
            conditional_accept_rates=counts.conditional,
            marginal_accept_rates=counts.rates,
            mean_accept_length=mean,
            mean_accept_length_per_request=round(macro, DIGITS),
            accept_length_by_k={str(k): mean},
            acceptance_length_histogram={str(i): steps for i, steps in enumerate(counts.histogram) if steps},
            per_category={category: {"mean_accept_length": mean}},
            measurement_conditions=plain(conditions),
        )
