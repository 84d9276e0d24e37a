"""Runs a whole table of evaluations, and goes on where it was stopped, at the next example.

Each task, h and acceptance rule has a results folder of its own, as `rescore eval --out` writes them; weights are tuned
first (by greedy acceptance) and kept; every trace is recorded once. The tables and the manifest are written when all is
finished.
"""

from __future__ import annotations

import dataclasses
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lattices.errors import IncompatibleError, RescoreError
from lm.environment import environment
from lm.executors import LOCAL, LOCALLY, Executor, ExecutorOptions
from lm.files import (
    append_json_line,
    atomic_file,
    open_appending,
    read_json_lines,
    write_json,
    writing,
)
from lm.keys import key_of
from lm.locks import writing_to
from lm.records import convert_record, plain
from rescore.acceptance.options import Acceptance
from rescore.costs.kept import costs_here
from rescore.costs.table import Costs
from rescore.peers import load_peer
from rescore.runs.evaluated import Evaluation, load_run
from rescore.runs.evaluation import LIVE_IS_HERE, evaluate
from rescore.runs.inputs import Notify, Progress, add_notice
from rescore.runs.log import RESULTS_FILE, claim
from rescore.runs.recording import Recording, check_names, open_recording
from rescore.runs.records import RunConfig
from rescore.runs.run import Choosing, Run, load_choosing
from rescore.runs.tables import results_csv
from rescore.runs.tuning import tune
from rescore.runs.weights import fit_with_costs, identities_of
from rescore.runs.work import check_choosing
from rescore.suites.files import (
    CSV_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    RUNS_FOLDER,
    TABLE_FILE,
    TUNED_FILE,
    SuiteDocument,
    SuiteRun,
    SuiteSweep,
)  # fmt: skip
from rescore.suites.plan import Plan, SuiteTuning
from rescore.suites.tables import suite_page


@dataclass
class Suite:
    """What `run_suite` gives: its document, and whether Ctrl-C cut it short."""

    plan: Plan
    document: SuiteDocument
    interrupted: bool = False


@dataclass(frozen=True)
class _Part:
    """One evaluation of the suite: a task with one h and one acceptance rule, every rescorer that has the rule, with
    every k and p."""

    recording: Recording
    h: int | None
    rule: Acceptance
    folder: str


def run_suite(
    plan: Plan,
    out: Path,
    *,
    source: str = "",
    execution: ExecutorOptions = LOCALLY,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Suite:
    """Runs what `out` lacks of a plan; `source` is the name of its file, `execution` who records and replays.

    What the plan and its files say is checked before the first model runs. Ctrl-C keeps what is finished and returns it
    with `interrupted` set. Raises `IncompatibleError` with the difference if `out` belongs to another plan,
    `OutputError` if another process is writing to it.
    """
    if plan.mode == "live" and execution.executor != LOCAL:
        raise RescoreError(LIVE_IS_HERE)
    execution.check(plan.device)
    with writing_to(out), execution.started(plan.device) as executor:
        _check_place(out)
        suite = SuiteDocument(source=source, plan=plain(plan.as_dict()), **environment())
        interrupted = False
        configs: list[RunConfig] = []
        parts = _parts(plan)  # refused before the folder is this plan's
        claim(out / PLAN_FILE, suite.plan, holds="a suite of another plan", whole=True)
        add = partial(add_notice, suite.notices, notify)
        running = _SuiteRun(plan, out, executor, progress, add, _kept_sweeps(out / TUNED_FILE))
        try:
            for part in parts:
                evaluation = running.evaluate(part)
                suite.results += evaluation.results
                configs.append(evaluation.config)
                if interrupted := evaluation.interrupted:
                    break
                suite.runs.append(SuiteRun(task=part.recording.name, h=part.h, folder=part.folder))
        except KeyboardInterrupt:
            interrupted = True
        suite.tuned = running.used
        if not interrupted:
            with atomic_file(out / TABLE_FILE) as temporary:
                page = suite_page(suite.results, plan, source, configs=configs, costs=_costs(plan, parts[0]))
                temporary.write_text(page, encoding="utf-8")
            with atomic_file(out / CSV_FILE) as temporary:
                temporary.write_text(results_csv(suite.results).csv(), encoding="utf-8", newline="")
            write_json(out / MANIFEST_FILE, plain(suite))
    return Suite(plan, suite, interrupted)


def _check_place(out: Path) -> None:
    """Raises `RescoreError` unless `out` holds a suite, or nothing yet."""
    if (out / PLAN_FILE).is_file():
        return
    with writing(out):
        # A killed writer's temporary file begins with a dot.
        if out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
            raise RescoreError(f"{out} holds something else than a suite; use another --out")


def _parts(plan: Plan) -> list[_Part]:
    """All evaluations, each of them checked."""
    parts: list[_Part] = []
    made: dict[str, tuple[str, Acceptance]] = {}  # by folder
    k, heads_needed = max(run.k for run in plan.runs), any(run.needs_heads for run in plan.runs)
    for task in plan.tasks:
        for h in plan.h:
            recording = open_recording(plan.inputs(task, h), k=k, heads_needed=heads_needed)
            for rule in plan.rules:
                name = re.sub(r"[^\w.-]", "_", recording.name) + (f"-h{h}" if h else "") + _folder_of(rule)
                parts.append(_Part(recording, h, rule, f"{RUNS_FOLDER}/{name}"))
                if (other := made.setdefault(name, (recording.name, rule))) != (recording.name, rule):
                    raise RescoreError(
                        f"the tasks {other[0]} and {recording.name} would share a folder; rename one of them"
                    )
    check_names([part.recording for part in parts if (part.h, part.rule) == (plan.h[0], plan.rules[0])])
    for part in parts:
        _fitted(plan, part)
    return parts


def _folder_of(rule: Acceptance) -> str:
    """What a folder's name ends with; nothing for greedy acceptance."""
    if rule == Acceptance():
        return ""
    seed = f"-seed-{rule.sampling_seed}" if rule.sampling_seed else ""
    return "-" + re.sub(r"[^\w.]+", "-", rule.rule().name) + seed


def _fitted(plan: Plan, part: _Part) -> tuple[dict[str, Choosing], Costs | None]:
    """The rescorers of a part with their drafters by name, from the files as they are now, fitted to its base; and the
    costs that its runs are planned and predicted by."""
    choosing = load_choosing(Run(r.name) for r in plan.rescorers if part.rule in r.rules)
    check_choosing(choosing, part.rule.rule(), live=plan.mode == "live")
    return fit_with_costs(part.recording, choosing, plan.costs)


def _kept_sweeps(path: Path) -> list[SuiteSweep]:
    with writing(path):
        open_appending(path).close()  # which cuts off a torn last line
    return [
        convert_record(fields, SuiteSweep, where=f"{path} line {number} is no tuned weight", advice="use another --out")
        for number, fields in read_json_lines(path)
    ]


@dataclass
class _SuiteRun:
    """What the parts of a plan are run with.

    sweeps: all that are kept in the suite's folder, also those of other data or models; none is run twice.
    used: those that this run has taken, in their order.
    """

    plan: Plan
    out: Path
    executor: Executor
    progress: Progress | None
    notify: Notify
    sweeps: list[SuiteSweep]
    used: list[SuiteSweep] = field(default_factory=list)

    def _weighted(self, part: _Part, choosing: dict[str, Choosing]) -> list[Run]:
        """The runs of one evaluation, with tuned weights where the plan asks for them."""
        runs = []
        for run in self.plan.runs_by(part.rule):
            chosen, tuning = choosing[run.label], self.plan.tuning(run.label)
            if run.alpha is None and chosen[0].alpha is not None and tuning is not None:
                sweep = self._sweep(part, run, chosen, tuning)
                run = dataclasses.replace(run, alpha=sweep.as_alpha(data_sha256=sweep.data_sha256))
            runs.append(run)
        return runs

    def _sweep(self, part: _Part, run: Run, choosing: Choosing, tuning: SuiteTuning) -> SuiteSweep:
        """The sweep of one run's weight, made now if it is missing: also where the model, the data or the rescorer is
        another one than when it was made."""
        evaluated = part.recording
        # Not all of it is in the settings: what a trace made elsewhere holds, and a list of examples to leave out.
        examples = [evaluated.data_sha256, evaluated.source.get("left_out")]
        identity, drafters = identities_of(choosing)
        key = key_of([evaluated.settings, examples, {run.label: identity}, *drafters], 24)
        asked = {"task": evaluated.name, "rescorer": run.label, "k": run.k, "h": part.h, "p": run.p, "key": key}
        fitting = (s for s in self.sweeps if all(getattr(s, name) == value for name, value in asked.items()))
        sweep = next(fitting, None)
        if sweep is None:
            inputs = dataclasses.replace(evaluated.inputs, limit=None)
            recording = open_recording(inputs, k=evaluated.k, heads_needed=evaluated.models.heads_needed)
            (tuned,) = tune(
                recording, [run.label], alphas=tuning.alphas, ks=(run.k,), ps=(run.p,),
                held_out=tuning.limit, evaluated=set(evaluated.groups), keep=False, executor=self.executor,
                progress=self.progress, notify=self.notify,
            )  # fmt: skip
            if not evaluated.given:  # a sweep of other files must not be kept under this key
                evaluated.models.check_unchanged(evaluated.settings)
            if tuned.identity != identity:
                raise IncompatibleError(f"{run.label} was replaced while it was tuned; run the command again")
            sweep = SuiteSweep(**vars(tuned), h=part.h, key=key)
            path = self.out / TUNED_FILE
            with writing(path), open_appending(path) as stream:
                append_json_line(stream, plain(sweep))
            self.sweeps.append(sweep)
        if sweep not in self.used:  # which other rules of acceptance may have taken before
            self.used.append(sweep)
        return sweep

    def evaluate(self, part: _Part) -> Evaluation:
        """One evaluation, as far as Ctrl-C let it come."""
        plan, folder = self.plan, self.out / part.folder
        choosing, costs = _fitted(plan, part)  # for each part: files of rescorers may be replaced in between
        runs = self._weighted(part, choosing)
        if (folder / RESULTS_FILE).is_file():
            finished = load_run(folder)
            if _is_same(plan, part, choosing, costs, finished.config):
                for line in finished.notices:
                    self.notify(line)
                return finished
        evaluation = evaluate(
            part.recording, runs, live=plan.mode == "live", verify=plan.verify, rule=part.rule.rule(),
            peers=_peers(plan, part), costs=plan.costs, seed=plan.seed, out=folder, executor=self.executor,
            progress=self.progress, notify=self.notify,
        )  # fmt: skip
        part.recording.models.release()  # many tasks: each would keep a base LM of its own in memory
        return evaluation


def _peers(plan: Plan, part: _Part) -> tuple[str, ...]:
    """The peers, which decode greedily, stand beside the runs that do."""
    return plan.peers if part.rule == Acceptance() else ()


def _costs(plan: Plan, part: _Part) -> Costs | None:
    """What a step costs on this machine, where that is measured and the suite is about time."""
    with suppress(RescoreError):
        if plan.mode == "live":
            recording, models = part.recording, part.recording.models
            sha256 = recording.settings.get("heads_sha256")
            heads = (sha256, recording.h) if sha256 else None
            return costs_here(models.identity, heads, models.device, compiles=models.compiles)
    return None


def _is_same(plan: Plan, part: _Part, choosing: dict[str, Choosing], costs: Costs | None, config: RunConfig) -> bool:
    """Whether these results are of the data, base, heads, rescorers, peers, rule and costs that are there now; if not,
    `evaluate` tells the change, or predicts by the costs of now."""
    rule = part.rule.rule()
    name, recording = part.recording.name, part.recording
    of_now = [recording.source, {"k": recording.k, **recording.settings}, recording.inputs, costs]
    of_then = [config.data.get(name), config.traces.get(name), config.inputs.get(name), config.costs.get(name)]
    then = {r.rescorer: (r.identity, r.drafters) for r in config.runs.get(name, ())}
    now = {rule.marked(label): identities_of(each) for label, each in choosing.items()}
    peers = {spec: load_peer(spec).identity for spec in _peers(plan, part)}
    judged = (config.acceptance, config.sampling_seed) == (rule.name, part.rule.sampling_seed)
    return plain(of_now) == plain(of_then) and then == now and config.peers == peers and judged
