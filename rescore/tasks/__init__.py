"""The tasks by name: those in this folder, and those that other packages bring.

Another package adds a task with an entry point in the group `rescore.tasks` that loads to a `Task`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from lattices.errors import RescoreError, UnknownNameError
from rescore.tasks import cnn_dailymail, gsm8k, lambada, multi_news, samsum, squad, xsum
from rescore.tasks.base import Example, HubSource, Metric, Record, Task

__all__ = ["Example", "HubSource", "Metric", "Record", "Task", "load_task", "task_names"]

ENTRY_POINT_GROUP = "rescore.tasks"
_BUILT_IN: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (cnn_dailymail, gsm8k, lambada, multi_news, samsum, squad, xsum)
}


def load_task(name: str) -> Task:
    """The task called `name`; a built-in one goes before another package's of the same name.

    Raises `UnknownNameError` with the nearest names, `RescoreError` if another package's task can't be loaded.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return _load_entry_point(point)
    raise UnknownNameError("task", name, task_names())


def task_names() -> list[str]:
    """The names that `load_task` knows, sorted."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def _load_entry_point(point: EntryPoint) -> Task:
    origin = f"the task {point.name!r} of the package {point.dist.name if point.dist else point.value}"
    try:
        task: object = point.load()
    except Exception as error:  # another package's code may raise anything
        raise RescoreError(f"can't load {origin} ({error}); mend or uninstall that package") from error
    if not isinstance(task, Task):
        raise RescoreError(f"{origin} is no rescore.tasks.Task ({point.value}); mend or uninstall that package")
    return task
