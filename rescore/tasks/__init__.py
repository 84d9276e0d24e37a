"""The tasks by name: built-in ones, those that other packages bring, and YAML files of the user's own.

`base` says what a task is. To add one that comes with this package, put it into `built_in` or `spec_bench`; `task_file`
reads users' YAML files. `data` gives a task's examples (file, hub or sample), `metrics` score outputs, `listing` shows
tasks in words. `groups` says which examples come of one source, `leave_out` which were trained on. Must not import
`rescore.runs`, nor know base LMs or traces.

Another package adds a task with an entry point in the group `rescore.tasks` that loads to a `Task`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

from lattices.errors import InvalidDataError, RescoreError, UnknownNameError
from lattices.paths import user_path
from rescore.specs import plug_ins
from rescore.tasks import built_in, spec_bench
from rescore.tasks.base import Example, HubSource, Limits, Metric, Record, Task
from rescore.tasks.task_file import SUFFIXES, is_task_file, load_task_file

__all__ = ["Example", "HubSource", "Limits", "Metric", "Record", "Task", "is_task_file", "load_task", "task_names"]

ENTRY_POINT_GROUP = "rescore.tasks"
_BUILT_IN: dict[str, Task] = {task.name: task for task in (*built_in.TASKS, *spec_bench.TASKS)}


def load_task(name: str) -> Task:
    """The task called `name`, or of the YAML file that `name` is the path of (it ends in .yaml or .yml).

    A built-in one goes before another package's of the same name. Raises `UnknownNameError` with the nearest names,
    `RescoreError` if another package's task can't be loaded, `InvalidDataError` for what is wrong in a YAML file.
    """
    if is_task_file(name):
        task = load_task_file(user_path(name, "the task"))
        if task.name in task_names():
            raise InvalidDataError(f"{name}: {task.name!r} is the name of another task; give it one with name: my-task")
        return task
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    for point in plug_ins(ENTRY_POINT_GROUP).select(name=name):
        return _load_entry_point(point)
    files = [file for suffix in SUFFIXES if (file := Path(f"{name}{suffix}")).is_file()]
    hint = f"there is a file {files[0]}" if files else "a task of your own is a YAML file, like ./mine.yaml"
    raise UnknownNameError("task", name, task_names(), hint)


def task_names() -> list[str]:
    """The names that `load_task` knows, sorted."""
    return sorted({*_BUILT_IN, *plug_ins(ENTRY_POINT_GROUP).names})


def _load_entry_point(point: EntryPoint) -> Task:
    origin = f"the task {point.name!r} of the package {point.dist.name if point.dist else point.value}"
    try:
        task: object = point.load()
    except Exception as error:  # another package's code may raise anything
        raise RescoreError(f"can't load {origin} ({error}); mend or uninstall that package") from error
    if not isinstance(task, Task):
        raise RescoreError(f"{origin} is no rescore.tasks.Task ({point.value}); mend or uninstall that package")
    return task
