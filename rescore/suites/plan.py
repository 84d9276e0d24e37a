"""What a suite is to run: tasks x rescorers x k (x h) from one YAML file, checked with line numbers before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from lattices.errors import RescoreError
from lm.yaml_input import Value, named_values, read_yaml
from rescore.acceptance.options import Acceptance
from rescore.checks import MAX_ALPHA, VERIFY_MODES
from rescore.costs.kept import HERE, read_costs
from rescore.options import Spec
from rescore.peers import load_peer
from rescore.rescorers import WEIGHT
from rescore.runs.inputs import Inputs
from rescore.runs.records import is_oracle
from rescore.runs.run import DEFAULT_K, Run, branches_of
from rescore.runs.tuning import DEFAULT_ALPHAS, HELD_OUT
from rescore.specs import parse_spec
from rescore.tasks import load_task
from rescore.tasks.data import file_in
from rescore.tasks.leave_out import read_leave_out
from rescore.tracing import read_header

MODES = ("replay", "live")
LIMITS = ("limit", "max_new_tokens", "max_prompt_tokens")
OF_SAMPLING = ("top_k", "top_p", "sampling_seed")  # keys that are for a temperature only
OF_RULES = ("acceptance", "temperature", *OF_SAMPLING)
KEYS = (
    "base", "heads", "dtype", "device", "compile", "mode", "verify", "seed", "tasks", "rescorers", "k", "p", "h",
    "tune", "leave_out", "peers", "costs", *LIMITS, *OF_RULES,
)  # fmt: skip
NAMES = "names"
Readers = Mapping[str, Callable[[Value], Any]]
OF_LIMITS: Readers = dict.fromkeys(LIMITS, lambda value: value.whole(least=1))
Made = TypeVar("Made")
AskedRule = tuple[Value | None, Acceptance]  # and what asks for it; None: nothing does


@dataclass(frozen=True)
class SuiteTask:
    """A task (a name or a YAML file), where its examples come from, and its own limits (None: the suite's)."""

    name: str
    data: str | None = None
    trace: str | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None


@dataclass(frozen=True)
class SuiteTuning:
    """Weights are tuned first, on `limit` examples of the last groups of the data, over `alphas`."""

    limit: int = HELD_OUT
    alphas: tuple[float, ...] = DEFAULT_ALPHAS


@dataclass(frozen=True)
class SuiteRescorer:
    """A rescorer's spec, each p and k that it is run with, its weight (None: in the spec, tuned, or the default), how
    it is tuned if not as the suite says, and each way in which its outputs come about."""

    name: str
    p: tuple[int, ...]
    k: tuple[int, ...]
    alpha: float | None = None
    tune: SuiteTuning | None = None
    rules: tuple[Acceptance, ...] = (Acceptance(),)


@dataclass(frozen=True)
class Plan:
    """A whole suite: fields as in `Inputs`, `Run` and `evaluate` of `rescore.runs`; each of `k` and of `h` (None: all
    heads) is run."""

    tasks: tuple[SuiteTask, ...]
    rescorers: tuple[SuiteRescorer, ...]
    base: str = Inputs.base
    heads: str | None = None
    k: tuple[int, ...] = (DEFAULT_K,)
    h: tuple[int | None, ...] = (None,)
    tune: SuiteTuning | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None
    mode: str = "replay"
    verify: str = "tree"
    dtype: str = Inputs.dtype
    device: str = Inputs.device
    compile: str = Inputs.compile
    seed: int = 0
    leave_out: str | None = None
    peers: tuple[str, ...] = ()
    costs: str | None = None

    def inputs(self, task: SuiteTask, h: int | None) -> Inputs:
        """One task with one h."""
        inputs = Inputs(
            task=task.name, trace=task.trace, h=h, limit=task.limit or self.limit, leave_out=self.leave_out,
            device=self.device,
        )  # fmt: skip
        if task.trace:
            return inputs
        return dataclasses.replace(
            inputs, data=task.data, base=self.base, heads=self.heads,
            dtype=self.dtype, compile=self.compile,  # type: ignore[arg-type]  # checked when the file was read
            max_new_tokens=task.max_new_tokens or self.max_new_tokens,
            max_prompt_tokens=task.max_prompt_tokens or self.max_prompt_tokens,
        )  # fmt: skip

    @property
    def rules(self) -> list[Acceptance]:
        """How outputs come about, in each way that a rescorer is run with."""
        return list(dict.fromkeys(rule for r in self.rescorers for rule in r.rules))

    @property
    def runs(self) -> list[Run]:
        """All runs, whatever judges them."""
        return list(dict.fromkeys(run for rule in self.rules for run in self.runs_by(rule)))

    def runs_by(self, rule: Acceptance) -> list[Run]:
        """Every rescorer that is run with a rule, with each of its p and every k, with the weight that the file
        says."""
        ks = dict.fromkeys([*self.k, *(k for r in self.rescorers for k in r.k)])
        judged = [r for r in self.rescorers if rule in r.rules]
        return [Run(r.name, p=p, k=k, alpha=r.alpha) for k in ks for r in judged if k in r.k for p in r.p]

    def tuning(self, rescorer: str) -> SuiteTuning | None:
        """How the weight of a rescorer that has one is tuned; None: it is given, or the rescorer's own."""
        (chosen,) = (r for r in self.rescorers if r.name == rescorer)
        is_given = chosen.alpha is not None or WEIGHT in parse_spec(chosen.name)[1]
        return None if is_given else chosen.tune or self.tune

    def as_dict(self) -> dict[str, Any]:
        """For `plan.json`: tasks and rescorers by name, so that a difference names them."""
        document = dataclasses.asdict(self)
        for rescorer, entry in zip(self.rescorers, document["rescorers"], strict=True):
            if rescorer.rules == SuiteRescorer.rules:  # a folder that was begun before there were others goes on
                del entry["rules"]
        for name in ("tasks", "rescorers"):
            document[name] = {entry.pop("name"): entry for entry in document[name]}
        return document


def read_plan(
    path: Annotated[Path, "Tasks, rescorers, k: see docs/formats.md.", "TABLE.yaml"],
    *,
    data: Annotated[
        Path | None,
        "Folder with TASK.jsonl (or .csv ...) for each task whose data the YAML does not name, or a file for all.",
    ] = None,
    names: Annotated[
        Mapping[str, str], "Values instead of those that the YAML has under names.", "--with", "<NAME=VALUE>"
    ] = MappingProxyType({}),
) -> Plan:
    """The suite in a YAML file (docs/formats.md).

    Raises `RescoreError` with the line of what is wrong: unknown keys with the nearest, wrong types, unknown tasks and
    rescorers.
    """
    top = named_values(read_yaml(path), NAMES, names).fields(KEYS, required=("tasks", "rescorers"))
    mode = top["mode"].choice(MODES) if "mode" in top else "replay"
    readers: Readers = {
        "base": Value.text, "heads": Value.text, "k": _wholes, "h": partial(_wholes, least=2), "tune": _tuning,
        "verify": lambda value: value.choice(VERIFY_MODES),
        "dtype": lambda value: value.choice(("float32", "float64", "bfloat16", "float16")),
        "device": Value.text, "compile": lambda value: value.choice(("auto", "off")), "seed": _natural,
        "leave_out": partial(_text, check=read_leave_out),
        "peers": lambda value: tuple(_text(each, check=load_peer) for each in value.items()),
        "costs": partial(_text, check=lambda text: text == HERE or read_costs(text)), **OF_LIMITS,
    }  # fmt: skip
    plan = Plan(
        tasks=_distinct(top["tasks"], lambda value: _task(value, data), "task"),
        rescorers=_rescorers(top, live=mode == "live"),
        mode=mode,
        **_read(top, readers),
    )
    if mode == "replay" and plan.verify != Plan.verify and plan.costs is None:
        raise top["verify"].wrong(f"{plan.verify} is how live decoding verifies; drop it, or add mode: live (or costs)")
    if mode == "replay" and plan.peers:
        raise top["peers"].wrong("peers are timed beside live decoding; drop them, or add mode: live")
    if plan.peers and Acceptance() not in plan.rules:
        raise top["peers"].wrong("peers are timed decoding greedily; drop them, or let acceptance have greedy")
    for task, value in zip(plan.tasks, top["tasks"].items(), strict=True):
        if task.trace and mode == "live":
            raise value.wrong("a trace can be replayed, not decoded live; drop trace, or mode: live")
    return plan


def _task(value: Value, data: Path | None) -> SuiteTask:
    fields = {"name": value} if not value.is_mapping else value.fields(
        ("name", "data", "trace", *LIMITS), required=() if "trace" in value.fields(None) else ("name",)
    )  # fmt: skip
    trace = fields["trace"].text() if "trace" in fields else None
    given = fields["data"].text() if "data" in fields else None
    if trace and given:
        raise fields["data"].wrong("a trace has its own examples; drop data or trace")
    if trace:
        for limit in LIMITS[1:]:
            if limit in fields:
                raise fields[limit].wrong(f"a trace is replayed as it was recorded; drop {limit} or trace")
        if "name" in fields:
            name = fields["name"].text()
        else:  # the task of a trace that does not go by another name in the file
            name = _at(fields["trace"], lambda: read_header(Path(trace)).task) or Path(trace).resolve().name
    else:
        name = fields["name"].text()
        known = _at(fields["name"], lambda: load_task(name))
        if given is None and data is not None:
            given = str(data if data.is_file() else file_in(data, known))
    return SuiteTask(name, given, trace, **_read(fields, OF_LIMITS))


def _rescorers(top: dict[str, Value], *, live: bool) -> tuple[SuiteRescorer, ...]:
    ps = _wholes(top["p"]) if "p" in top else ()
    ks = _wholes(top["k"]) if "k" in top else Plan.k
    of_suite = {key: top[key] for key in OF_RULES if key in top}
    all_rules = _rules(of_suite, live=live)

    def rescorer(value: Value) -> SuiteRescorer:
        fields = (
            value.fields(("name", "p", "k", "alpha", "tune", *OF_RULES), required=("name",))
            if value.is_mapping
            else {"name": value}
        )
        name = fields["name"].text()
        loaded = _at(fields["name"], lambda: Run(name).load())
        for key in ("alpha", "tune"):
            if key in fields and loaded.alpha is None:
                raise fields[key].wrong(f"the rescorer {name} has no weight; drop {key}")
        arguments = parse_spec(name)[1]
        if WEIGHT in arguments and "alpha" in fields:
            raise fields["alpha"].wrong(f"{name} says its weight; drop alpha")
        if (WEIGHT in arguments or "alpha" in fields) and "tune" in fields:
            raise fields["tune"].wrong("a weight that is given is not tuned; drop tune or alpha")
        read = _read(fields, {"alpha": _weight, "p": _wholes, "tune": _tuning, "k": _wholes})
        own = read.get("p", ps) or (max(1, branches_of(name, arguments)),)
        of_own = {key: fields[key] for key in OF_RULES if key in fields}
        rules = _rules(of_own, of_suite, live=live) if of_own else all_rules
        if is_oracle(name):
            own, rules = (1,), tuple(rule for rule in rules if rule == Acceptance())
            if not rules:
                raise fields["name"].wrong("the oracle knows greedy decoding's output; drop it, or let it have greedy")
        return SuiteRescorer(
            name, own, k=read.get("k", ks), alpha=read.get("alpha"), tune=read.get("tune"), rules=rules
        )

    return _distinct(top["rescorers"], rescorer, "rescorer")


def _rules(
    given: dict[str, Value], of_suite: Mapping[str, Value] = MappingProxyType({}), *, live: bool
) -> tuple[Acceptance, ...]:
    """Each way in which the outputs of a rescorer come about: by every acceptance rule, or drawn at every temperature.

    given: the keys that say it; of_suite: those of the suite, which hold for a rescorer that does not say it otherwise.
    """
    said = _said(given, of_suite)
    of_acceptance = said["acceptance"].items() if "acceptance" in said else []
    kept: list[AskedRule] = [(value, Acceptance(Spec(value.text()))) for value in of_acceptance]
    if "temperature" in said:
        asked = [each for value in said["temperature"].items() for each in _at_temperature(value, said, kept)]
        if kept and kept[0] not in asked:
            raise said["acceptance"].wrong("it draws nothing; drop it, or let temperature have 0 as well")
    else:
        asked = kept or [(None, Acceptance())]
    for value, rule in asked:
        if value is not None:
            _at(value, rule.rule)
            if not live and rule != Acceptance():
                raise value.wrong(
                    "what is not greedy leaves a trace at its first token that is not greedy decoding's; add mode: live"
                )
    if unused := [key for key in OF_SAMPLING if key in given and not any(rule.temperature for _, rule in asked)]:
        raise given[unused[0]].wrong("it is for sampling; drop it, or add temperature")
    return tuple(dict.fromkeys(rule for _, rule in asked))


def _said(given: dict[str, Value], of_suite: Mapping[str, Value]) -> dict[str, Value]:
    """What is said of a rescorer's rules: whoever names one of acceptance and temperature passes the suite's other."""
    said = {**of_suite, **given}
    for own, other in (("acceptance", "temperature"), ("temperature", "acceptance")):
        if own in given and other not in given:
            said.pop(other, None)
    return said


def _at_temperature(value: Value, said: Mapping[str, Value], kept: list[AskedRule]) -> list[AskedRule]:
    """The rules of one temperature: at 0 what is kept, greedily if nothing is said."""
    temperature = value.number()
    if not temperature:
        return kept or [(value, Acceptance())]
    drawn = _read(said, {"top_k": _natural, "top_p": Value.number, "sampling_seed": _natural})
    return [(value, Acceptance(temperature=temperature, **drawn))]


def _read(fields: Mapping[str, Value], readers: Readers) -> dict[str, Any]:
    """What is given under these keys, each read by its reader."""
    return {name: read(fields[name]) for name, read in readers.items() if name in fields}


def _text(value: Value, *, check: Callable[[str], object]) -> str:
    text = value.text()
    _at(value, lambda: check(text))
    return text


def _tuning(value: Value) -> SuiteTuning:
    readers: Readers = {
        "alphas": lambda entries: tuple(dict.fromkeys(map(_weight, entries.items()))),
        "limit": OF_LIMITS["limit"],
    }
    return SuiteTuning(**_read(value.fields(("limit", "alphas")), readers))


def _weight(value: Value) -> float:
    alpha = value.number()
    if not 0 <= alpha <= MAX_ALPHA:
        raise value.wrong(f"{alpha:g} is outside 0 to {MAX_ALPHA:g}, where a weight is")
    return alpha


def _natural(value: Value) -> int:
    return value.whole(least=0)


def _wholes(value: Value, *, least: int = 1) -> tuple[int, ...]:
    return tuple(dict.fromkeys(entry.whole(least=least) for entry in value.items()))


def _distinct(value: Value, read: Callable[[Value], Made], kind: str) -> tuple[Made, ...]:
    """What a list holds, no name twice."""
    by_name: dict[str, Made] = {}
    for entry in value.items():
        made = read(entry)
        name = str(getattr(made, "name", ""))
        if name in by_name:
            raise entry.wrong(f"the {kind} {name} is there twice; keep one")
        by_name[name] = made
    return tuple(by_name.values())


def _at(value: Value, call: Callable[[], Made]) -> Made:
    """What a call gives; what it refuses is raised with the line of the value."""
    try:
        return call()
    except RescoreError as error:
        raise value.wrong(str(error)) from error
