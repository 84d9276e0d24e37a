"""Block efficiency by the vocabulary that heads draft from (`heads:vocabulary=N`), against that of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lattices.errors import RescoreError
from rescore.accounting import paired_difference
from rescore.drafters import HEADS, Drafter
from rescore.runs.evaluated import Evaluation
from rescore.runs.records import Interval
from rescore.runs.run import OF_DRAFTERS, Run, is_drafter, is_heads, label_of
from rescore.specs import format_spec, parse_spec
from rescore.studies.tables import vocabulary_sizes_table
from rescore.table import Table

VOCABULARY, RANKING = "vocabulary", "ranking"  # keys of heads


@dataclass(frozen=True)
class VocabularySize:
    """One size on one task: `vocabulary` tokens beside the prompt's (None: all), and the change against all of them,
    paired (None: it is that)."""

    task: str
    rescorer: str
    k: int
    p: int
    vocabulary: int | None
    block_efficiency: float
    change: float | None
    change_ci95: Interval | None


@dataclass(frozen=True)
class VocabularySweep:
    """Runs with heads of all tokens and of several sizes; those without heads as they are.

    sizes: by the run of all tokens, the runs of each size.
    """

    runs: list[Run]
    sizes: dict[Run, dict[int, Run]]

    @classmethod
    def of(cls, runs: Sequence[Run], sizes: Sequence[int]) -> VocabularySweep:
        """Raises `RescoreError` where no run drafts with heads, and for sizes that are none."""
        every: dict[Run, None] = {}
        swept: dict[Run, dict[int, Run]] = {}
        if not sizes:
            return cls(list(runs), swept)
        for run in runs:
            own = run.load().drafters
            if not any(map(is_heads, run.drafters or own)):
                every[run] = None
                continue
            whole = _with_heads(run, own, None)
            swept[whole] = {size: _with_heads(run, own, size) for size in sizes}
            every |= dict.fromkeys([whole, *swept[whole].values()])
        if not swept:
            raise RescoreError("--draft-vocabulary is of block heads, and no --rescorer drafts with them; drop it")
        return cls(list(every), swept)

    def tables(self, evaluation: Evaluation, *, details: bool = False, seed: int = 0) -> list[Table]:
        """Those of the evaluation, and with sizes that of `of_evaluation`."""
        found = self.of_evaluation(evaluation, seed=seed)
        return [*evaluation.tables(details=details), *([vocabulary_sizes_table(found)] if found else [])]

    def of_evaluation(self, evaluation: Evaluation, *, seed: int = 0) -> list[VocabularySize]:
        """What the sizes come to, task by task; of examples that are finished with all tokens and with the size."""
        found = []
        marked = evaluation.config.marked
        for task in evaluation.tasks:
            for whole, by_size in self.sizes.items():
                base = {r.id: r for r in evaluation.records(task, marked(whole.label), whole.p, whole.k)}
                every: list[tuple[int | None, Run]] = [(None, whole), *by_size.items()]
                for size, run in every:
                    of_size = evaluation.records(task, marked(run.label), run.p, run.k)
                    both = [r for r in of_size if r.id in base]
                    if not both:
                        continue
                    change = paired_difference(
                        [base[r.id].accepted for r in both], [r.accepted for r in both],
                        groups=[r.group for r in both], seed=seed,
                    )  # fmt: skip
                    result = evaluation.result(marked(run.label), p=run.p, k=run.k, task=task)
                    known = size is not None
                    found.append(VocabularySize(
                        task=task, rescorer=marked(whole.label), k=run.k, p=run.p, vocabulary=size,
                        block_efficiency=result.block_efficiency, change=change.gain if known else None,
                        change_ci95=change.gain_ci95 if known else None,
                    ))  # fmt: skip
        return found


def _with_heads(run: Run, own: tuple[str, ...], size: int | None) -> Run:
    """The run with heads that draft from so many tokens (None: from all); own: drafters of its rescorer by itself."""
    drafters = tuple(_sized(drafter, size) for drafter in run.drafters or own)
    if drafters == (run.drafters or own):
        return run
    if is_drafter(run.label):
        return replace(run, drafters=drafters, label=str(drafters[0]))
    name, arguments = parse_spec(run.label)
    arguments.pop(OF_DRAFTERS, None)
    given = () if drafters == own else drafters
    return replace(run, drafters=given, label=label_of(format_spec(name, arguments), given))


def _sized(drafter: str | Drafter, size: int | None) -> str | Drafter:
    if not is_heads(drafter) or not isinstance(drafter, str):
        return drafter
    _, arguments = parse_spec(drafter, "--drafter")
    if VOCABULARY in arguments:
        raise RescoreError(f"--drafter {drafter} says its vocabulary; drop that, or --draft-vocabulary")
    if size is None:
        arguments.pop(RANKING, None)
        return format_spec(HEADS, arguments)
    return format_spec(HEADS, {VOCABULARY: str(size), **arguments})
