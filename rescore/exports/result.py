"""One result of an evaluation for inference engines and benchmarks: options to paste, or a file (docs/interop.md).

Refuses what another format can't say, and tells what its numbers stand for where they are not a chain's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, UnknownNameError
from lm.files import atomic_file
from rescore.drafters import HEADS
from rescore.exports.engines import (
    AcceptanceHistogram,
    Counts,
    EngineDrafter,
    Exportable,
    LlamaSynthetic,
    SglangSimulated,
    SpecBenchAnswer,
    SpecBenchAnswers,
    SpecBenchChoice,
    SpeculationProfile,
    VllmSynthetic,
)
from rescore.runs.evaluated import Evaluation
from rescore.runs.records import ExampleRecord, Result
from rescore.suites.files import load_runs
from rescore.tasks.groups import digest
from rescore.tasks.spec_bench import MATH, MT_BENCH

Format = Literal["vllm-synthetic", "llama-cpp", "sglang", "spec-bench", "acceptance-histogram", "speculation-profile"]
SHOWN = 8  # results that a message lists
MT_BENCH_FIRST, OF_EACH = 81, 10  # the first question's number, and how many each category of MT-bench has in turn
OF_DRAFTER = ("vllm-synthetic", "speculation-profile")


@dataclass(frozen=True)
class Exported:
    """A result in another program's format.

    record: checked; notices: what its numbers stand for; out: the file that was written, if any.
    """

    record: Exportable
    notices: tuple[str, ...]
    out: Path | None = None

    def __str__(self) -> str:
        return self.record.command()


@dataclass(frozen=True)
class _Chosen:
    """The result that is exported, of the evaluation that has it."""

    run: Evaluation
    result: Result

    @property
    def records(self) -> list[ExampleRecord]:
        return self.run.records(self.result.task, self.result.rescorer, self.result.p, self.result.k)

    @property
    def base(self) -> dict[str, Any]:
        """What the trace says of the base (`RunConfig.base`)."""
        return self.run.config.base(self.result.task)

    def __str__(self) -> str:
        r = self.result
        return f"{r.rescorer} on {r.task} (p = {r.p}, k = {r.k}, h = {r.h})"


def export(
    results: Annotated[Evaluation | Path, "Results folder of rescore eval --out or rescore suite.", "RESULTS"],
    to: Annotated[Format, "What reads it."],
    *,
    out: Annotated[str | Path | None, "Write it into this file instead of printing it."] = None,
    task: Annotated[str | None, "Task of the result, where there are several."] = None,
    rescorer: Annotated[str | None, "Its rescorer, as it was given."] = None,
    p: Annotated[int | None, "Its drafts a step (p)."] = None,
    k: Annotated[int | None, "Its tokens of each head (k)."] = None,
    h: Annotated[int | None, "Its heads (h)."] = None,
    engine_drafter: Annotated[
        str | None,
        "Drafter that the engine is to run, whose time then counts: METHOD:MODEL (medusa:DIR), or METHOD alone (mtp).",
    ] = None,
    unstable: Annotated[bool, "Also write a schema that its authors may still change: speculation-profile."] = False,
) -> Exported:
    """The only result, or the one that is named, in the format of another program.

    results: an evaluation, or the folder of one or of a suite. to: vllm-synthetic, llama-cpp and sglang give options
    that make an engine accept what was measured here; spec-bench an answer file; acceptance-histogram what vLLM reports
    itself. `str` of what is returned is the option or document.
    Raises `UnknownNameError` or `RescoreError` unless one result fits, `RescoreError` for what the format can't say,
    `InvalidDataError` for a result that does not add up, `OutputError` if the file can't be written.
    """
    if to == "speculation-profile" and not unstable:
        raise RescoreError(f"the schema of {to} is a proposal that may still change; give --unstable to write it")
    if engine_drafter is not None and to not in OF_DRAFTER:
        raise RescoreError(f"--engine-drafter is for --to {' or '.join(OF_DRAFTER)}; drop it")
    runs = results.at_each_k() if isinstance(results, Evaluation) else load_runs(results)
    chosen = _choose(runs, {"task": task, "rescorer": rescorer, "p": p, "k": k, "h": h})
    counts = _counts(chosen)
    drafter = _drafter(engine_drafter)
    record = _made(chosen, counts, to, drafter)
    path = None if out is None else Path(out).expanduser()
    if path is not None:
        with atomic_file(path) as temporary:
            temporary.write_text(record.file() + "\n", encoding="utf-8")
    return Exported(record, tuple(_notices(chosen, counts, to, drafter)), path)


def _choose(runs: Iterable[Evaluation], asked: dict[str, Any]) -> _Chosen:
    there = [_Chosen(run, result) for run in runs for result in run.results]
    for name in ("task", "rescorer"):
        known = {getattr(each.result, name) for each in there}
        if asked[name] is not None and asked[name] not in known:
            raise UnknownNameError(f"{name} of these results", asked[name], known)
    fitting = [each for each in there if all(_fits(each.result, name, asked[name]) for name in asked)]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(map(str, (fitting or there)[:SHOWN])) + ("; ..." if len(fitting or there) > SHOWN else "")
    if not fitting:
        raise RescoreError(f"no result is of this --p, --k or --h; there are {listed}")
    options = [f"--{name}" for name in asked if len({getattr(each.result, name) for each in fitting}) > 1]
    raise RescoreError(f"{len(fitting)} results fit; choose one by {', '.join(options) or 'its own folder'}: {listed}")


def _fits(result: Result, name: str, asked: Any) -> bool:
    # The oracle verifies one draft whatever p is asked for.
    return asked is None or getattr(result, name) == asked or (name == "p" and result.is_oracle)


def _counts(chosen: _Chosen) -> Counts:
    """The accepted lengths of a result, checked against what it says of itself and against its examples."""
    result, records = chosen.result, chosen.records
    if chosen.run.config.lossy:
        raise RescoreError(
            f"{chosen} was decoded by {chosen.run.config.acceptance} acceptance, whose outputs are not the base's: no "
            "engine accepts so; export a run with greedy acceptance"
        )
    drafted: dict[int, list[int]] = {}
    for record in records:
        for accepted, draft in zip(record.accepted, record.drafts, strict=True):
            if not 1 <= accepted <= len(draft):
                raise InvalidDataError(
                    f"example {record.id!r} of {chosen} has a step that accepted {accepted} tokens of {len(draft)}; "
                    "run the evaluation again"
                )
            by_accepted = drafted.setdefault(len(draft) - 1, [0] * len(draft))
            by_accepted[accepted - 1] += 1
    counts = Counts(result.accepted_histogram, drafted if result.p == 1 else None)
    lengths = Counter(accepted for record in records for accepted in record.accepted)
    of_examples = [lengths[length] for length in range(len(result.accepted_histogram))]
    if (
        (counts.steps, counts.tokens, of_examples) != (result.steps, result.tokens, result.accepted_histogram)
        or len(result.accepted_histogram) != result.longest + 1
        or abs(counts.mean - result.block_efficiency) > 1e-9
        or abs(sum(result.marginal) - result.block_efficiency) > 1e-9
    ):
        raise InvalidDataError(
            f"{chosen} does not add up: steps, tokens, accepted lengths and block efficiency are not of one run; "
            "run the evaluation again"
        )
    if counts.draft_tokens < 1:
        raise RescoreError(f"{chosen} drafts nothing: there is no acceptance to export; choose another --rescorer")
    return counts


def _drafter(given: str | None) -> EngineDrafter | None:
    if given is None:
        return None
    method, colon, model = given.partition(":")
    if not method or (colon and not model):
        raise RescoreError(f"--engine-drafter {given}: give METHOD:MODEL, like medusa:DIR, or a METHOD without a model")
    return method, model or None


def _made(chosen: _Chosen, counts: Counts, to: Format, drafter: EngineDrafter | None) -> Exportable:
    result, config = chosen.result, chosen.run.config
    match to:
        case "vllm-synthetic":
            return VllmSynthetic.of(counts, drafter)
        case "llama-cpp":
            return LlamaSynthetic.of(counts)
        case "sglang":
            return SglangSimulated.of(counts)
        case "acceptance-histogram":
            return AcceptanceHistogram.of(counts)
        case "spec-bench":
            return SpecBenchAnswers(answers=_answers(chosen))
        case "speculation-profile":
            trace = config.traces[result.task]
            return SpeculationProfile.of(
                counts, drafter, macro=result.block_efficiency_macro, category=result.task, draft=_draft_of(chosen),
                target={"name": chosen.base.get("name"), "weights_sha256": chosen.base.get("weights_sha256")},
                conditions={
                    "dataset": result.task, "osl": trace.get("max_new_tokens"), "num_samples": result.n,
                    "validation": f"{config.mode} of rescore, {config.acceptance}: {chosen}",
                },
            )  # fmt: skip


def _draft_of(chosen: _Chosen) -> dict[str, Any]:
    """What proposed the drafts: the hash of the heads where they did, and the other drafters as the run names them."""
    result, config = chosen.result, chosen.run.config
    of_run = {(run.rescorer, run.k): run.drafters for run in config.runs[result.task]}  # whatever its p
    drafters = of_run[result.rescorer, result.k]
    of_heads = not drafters or any(each.partition(" ")[0] == HEADS for each in drafters)
    heads = {"heads_sha256": config.traces[result.task].get("heads_sha256")} if of_heads else {}
    return heads | ({"drafters": drafters} if drafters else {})


def _notices(chosen: _Chosen, counts: Counts, to: Format, drafter: EngineDrafter | None) -> list[str]:
    """What the numbers stand for where they are not those of one draft of so many tokens at every step."""
    result, tokens = chosen.result, counts.draft_tokens
    several = result.p > 1
    engine = to in ("vllm-synthetic", "llama-cpp", "sglang")
    shorter = counts.drafted is not None and sum(map(sum, counts.drafted.values())) > sum(
        counts.drafted.get(tokens, ())
    )
    profile = f"steps accepted {counts.mean:.3f} tokens each in the mean; the engine's own number should be near that"
    lines = [
        (result.is_oracle, f"{chosen} is a perfect choice, which no engine has: an upper bound"),
        (
            several and to != "spec-bench",
            f"{chosen} verifies more than one draft a step: what is exported are the accepted lengths as they were "
            f"measured, of a chain of {tokens} tokens that accepts as much"
            + ("; what more nodes cost is not in it" if engine else ""),
        ),
        (several and to == "acceptance-histogram", "how many tokens a step drafted is not known, so it is left out"),
        (
            engine and not several and shorter,
            f"some drafts had fewer than {tokens} tokens; the engine drafts and verifies {tokens} at every step",
        ),
        (
            to == "vllm-synthetic" and drafter is None,
            "method and model of the drafter are missing: --engine-drafter METHOD:MODEL adds them (its time counts)",
        ),
        (to == "llama-cpp", f"let the drafter draft {tokens} tokens; {profile}"),
        (to == "sglang", f"the mean alone, no rates by position; let the drafter draft {tokens} tokens or more"),
    ]
    return [line for holds, line in lines if holds]


def _answers(chosen: _Chosen) -> list[SpecBenchAnswer]:
    """Lines of an answer file, in the order of finishing."""
    if chosen.run.config.mode != "live" or any(record.live is None for record in chosen.records):
        raise RescoreError(
            f"spec-bench wants the seconds of every answer, and {chosen} was replayed, which measures none; evaluate "
            "with --mode live"
        )
    texts = _texts(chosen)
    name = f"rescore-{chosen.result.rescorer}-p{chosen.result.p}"
    made = []
    for record, text in zip(chosen.records, texts, strict=True):
        assert record.live is not None
        seconds = record.live.seconds
        choice = SpecBenchChoice(
            turns=[text],
            decoding_steps=[len(record.accepted)],
            new_tokens=[sum(record.accepted)],
            wall_time=[seconds.prefill + seconds.total],
            accept_lengths=record.accepted,
        )
        number = int(record.id) if record.id.isascii() and record.id.isdecimal() else record.id
        made.append(SpecBenchAnswer(
            question_id=number, category=_category(record.task, number), answer_id=digest(f"{name} {record.id}"),
            model_id=name, choices=[choice], tstamp=time.time(),
        ))  # fmt: skip
    return made


def _category(task: str, question: int | str) -> str:
    """Spec-Bench's name for it; of MT-bench's questions by their numbers, 81 to 160."""
    if task == "mt_bench" and isinstance(question, int):
        place = (question - MT_BENCH_FIRST) // OF_EACH
        return MT_BENCH[place] if 0 <= place < len(MT_BENCH) else task
    return MATH if task == "gsm8k" else task


def _texts(chosen: _Chosen) -> list[str]:
    """Outputs as text, special tokens left out. Raises `IncompatibleError` if the tokenizer is another one now."""
    from lm.base.catalog import load_tokenizer
    from lm.base.identity import tokenizer_sha256

    name = str(chosen.base.get("name"))
    tokenizer: Any = load_tokenizer(name)
    if tokenizer_sha256(tokenizer) != chosen.base.get("tokenizer_sha256"):
        raise IncompatibleError(f"the tokenizer of {name} is another one than when {chosen} was decoded")
    return [tokenizer.decode(record.output_ids, skip_special_tokens=True) for record in chosen.records]
