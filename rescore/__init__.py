"""Draft-refinement rescoring for blockwise parallel decoding.

The main path, and where it lies:

    tasks/        load_task                    prompts and references, and the metrics of outputs
    tracing       record_trace, read_trace     one greedy run of the base LM, with the lattice of every position
    replaying     replay                       decodes again from the trace, without the base LM
    decoding      decode                       decodes live: propose, verify, accept, advance
    generation/   generate, custom_generate    prompts, from text to text; the same inside transformers' generate
    peers/        Peer, load_peer              other libraries' decoders, measured beside ours
    acceptance/   accept                       which draft wins, and how many of its tokens
    drafters/     Drafter, load_drafter        what may come next: heads, lookup, a draft model, a trace
    rescorers/    Rescorer, load_rescorer      what they propose in, drafts out; drafters/drafting.py joins the two
    accounting    account                      accepted lengths -> block efficiency, gains, intervals
    runs/         record, load_trace           a task's examples and its trace
                  Run, evaluate, tune          whole evaluations; load_run reads them back
    suites/                                    tables of evaluations from one YAML file
    studies/      analyse, compare             what traces and results say
    reports/      report                       a page of them
    exports/      export                       what other programs read
    imports/      import_trace                 what they write, as traces
    costs/                                     what a step takes on a machine, and the speed-up that this predicts

Beside them: `calls` (what a verify call reads), `traced_rows` (what is recorded), `bootstrap` (intervals), `checks`
(limits), `specs` and `options` (text to objects), `table` and `terminal` (what is printed).
The models lie beside it in `lm`, the ground floor (lattices and exact search) in `lattices`. Public names are imported
when they are first used.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm.base.catalog import load_base as load_base
    from lm.heads.block_heads import load_heads as load_heads
    from rescore.accounting import account as account
    from rescore.decoding import decode as decode
    from rescore.drafters import Drafter as Drafter
    from rescore.drafters import load_drafter as load_drafter
    from rescore.exports.result import export as export
    from rescore.generation.custom import custom_generate as custom_generate
    from rescore.generation.live import Generator as Generator
    from rescore.generation.live import generate as generate
    from rescore.imports.importing import import_trace as import_trace
    from rescore.replaying import replay as replay
    from rescore.reports.page import report as report
    from rescore.rescorers import Context as Context
    from rescore.rescorers import Rescorer as Rescorer
    from rescore.rescorers import load_rescorer as load_rescorer
    from rescore.runs.evaluated import Evaluation as Evaluation
    from rescore.runs.evaluated import load_run as load_run
    from rescore.runs.evaluation import evaluate as evaluate
    from rescore.runs.recording import load_trace as load_trace
    from rescore.runs.recording import record as record
    from rescore.runs.run import Run as Run
    from rescore.runs.tuning import tune as tune
    from rescore.studies.analysis import analyse as analyse
    from rescore.studies.comparison import compare as compare
    from rescore.tasks import load_task as load_task

_PLACES = {
    "Context": "rescore.rescorers",
    "Drafter": "rescore.drafters",
    "Evaluation": "rescore.runs.evaluated",
    "Generator": "rescore.generation.live",
    "Rescorer": "rescore.rescorers",
    "Run": "rescore.runs.run",
    "account": "rescore.accounting",
    "analyse": "rescore.studies.analysis",
    "compare": "rescore.studies.comparison",
    "custom_generate": "rescore.generation.custom",
    "decode": "rescore.decoding",
    "evaluate": "rescore.runs.evaluation",
    "export": "rescore.exports.result",
    "generate": "rescore.generation.live",
    "import_trace": "rescore.imports.importing",
    "load_base": "lm.base.catalog",
    "load_drafter": "rescore.drafters",
    "load_heads": "lm.heads.block_heads",
    "load_rescorer": "rescore.rescorers",
    "load_run": "rescore.runs.evaluated",
    "load_task": "rescore.tasks",
    "load_trace": "rescore.runs.recording",
    "record": "rescore.runs.recording",
    "replay": "rescore.replaying",
    "report": "rescore.reports.page",
    "tune": "rescore.runs.tuning",
}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'rescore' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


def import_neighbours(*names: str) -> None:
    """Imports top-level packages of this project from the folder that `rescore` itself lies in.

    `lm` and `cli` are names that a user's own files have too, in the working folder or on PYTHONPATH: those come
    earlier on the path, and would be taken in silence. Raises `ImportError` if one of another project is loaded.
    """
    root = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(root))
    try:
        for name in names:
            module = importlib.import_module(name)
            if Path(module.__file__ or "").resolve().parent not in (root, root / name):
                raise ImportError(f"rescore needs its own {name}, but {module.__file__} is loaded under that name")
    finally:
        sys.path.remove(str(root))


import_neighbours("lattices", "lm")
