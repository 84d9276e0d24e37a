"""Tables of costs on disk: those measured on this machine, in the cache under all that they are of; users' files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lattices.errors import IncompatibleError, InvalidDataError, OutputError, RescoreError, first_line
from lattices.paths import user_path
from lm.files import write_json
from lm.keys import cache_entry
from lm.locks import warn
from lm.records import plain, read_record
from rescore.costs.table import SCHEMA, Costs, Machine
from rescore.options import written
from rescore.runs.inputs import Inputs

if TYPE_CHECKING:
    from lm.base.model import BaseIdentity
    from rescore.rescorers import Target
    from rescore.runs.recording import Recording
    from rescore.runs.run import Choosing

HERE = "here"
COMMAND = "rescore bench costs"
CPUINFO = Path("/proc/cpuinfo")
HeadsKey = tuple[str, int]  # sha256 of block heads' weights, and how many are used


def this_machine(device: str) -> Machine:
    """The machine of this process, for work on a device."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return Machine(
        cpu=_cpu(), cores=cores, threads=torch.get_num_threads(), torch=str(torch.__version__),
        transformers=importlib.metadata.version("transformers"), gpu=gpu,
    )  # fmt: skip


def _cpu() -> str:
    """The model of the CPU; where that is not told, its architecture."""
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:  # another system than Linux
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def keep_costs(costs: Costs, out: Path | None = None) -> None:
    """Writes a table into a file, if one is given, and where `costs_here` finds it; where the cache directory can't be
    written, a line says so. Raises `OutputError` for the file."""
    if out:
        write_json(out, plain(costs))
    heads = (costs.heads.sha256, costs.heads.h) if costs.heads else None
    # What needs no heads finds it, whatever heads were measured last.
    places = {_place(costs, costs.machine, costs.device, costs.compiles, each) for each in (heads, None)}
    try:
        for path in places:
            write_json(path, plain(costs))
    except OutputError as error:  # it took minutes to measure them, and they are shown
        warn(f"these costs are not kept for --costs {HERE} and --nodes auto: {first_line(error)}")


def read_costs(path: str | Path) -> Costs:
    """The table in a file. Raises `RescoreError` if there is none, `InvalidDataError` for a broken or older one."""
    place = user_path(path, "--costs")
    return _read(place, missing=f"no costs in {place}; measure them: {COMMAND} --out FILE", command=COMMAND)


def costs_here(
    base: BaseIdentity | None, heads: HeadsKey | None, device: str, *, compiles: bool, inputs: Inputs | None = None
) -> Costs:
    """The table that was measured on this machine for a base LM with these heads (None: none are needed).

    compiles: as `lm.base.model.BaseLM` has it. inputs: as the user named them, for the command that measures it.
    Raises `RescoreError` if it was not measured, `InvalidDataError` if what is kept of it is broken.
    """
    if base is None:
        advice = f"give a file of {COMMAND} --out (--costs FILE)"
        raise RescoreError(f"the trace does not name its base LM, whose costs are needed; {advice}")
    names = ("base", "heads", "h", "dtype", "device", "compile") if inputs else ("base",)
    given = {name: getattr(inputs, name) if inputs else base.name for name in names}
    changed = {name: value for name, value in given.items() if value != getattr(Inputs, name)}
    command = written("bench costs", changed)
    which = f"{base.name} with these heads" if heads else base.name
    missing = f"no costs of {which} are measured on this machine (with {this_machine(device)}); run: {command}"
    return _read(_place(base, this_machine(device), device, compiles, heads), missing=missing, command=command)


def _place(base: BaseIdentity | Costs, machine: Machine, device: str, compiles: bool, heads: HeadsKey | None) -> Path:
    of = {
        "schema": SCHEMA,
        "base": [base.weights_sha256, base.dtype, base.config_sha256],
        "machine": machine,
        "device": device,
        "compiles": compiles,
        "heads": heads,
    }
    name = base.base if isinstance(base, Costs) else base.name  # it may be a path
    return cache_entry("costs", re.sub(r"[^\w.-]", "_", Path(name).name), of, suffix=".json")


def _read(path: Path, *, missing: str, command: str) -> Costs:
    if not path.exists():  # it says what to do by itself
        raise RescoreError(missing)
    advice = f"measure them again: {command}"
    costs = read_record(path, Costs, missing=f"no table of costs in {path}", advice=advice, schema=SCHEMA)
    shape = (len(costs.contexts), len(costs.nodes))
    rising = all((np.diff([0, *sizes]) > 0).all() for sizes in (costs.contexts, costs.nodes))
    if {len(row) for row in costs.step_ms} != {shape[1]} or len(costs.step_ms) != shape[0] or not rising:
        raise InvalidDataError(f"{path} has other sizes than it says, or they do not rise; {advice}")
    return costs


def costs_for(
    recording: Recording, base: Target, choosing: Mapping[str, Choosing], asked: Costs | str | None
) -> Costs | None:
    """The table by which the runs of a task are planned and predicted.

    base: the task's; asked: a table, its file, or `here`; None: `here` where a rescorer drafts by costs, else none.
    Raises `RescoreError` for one of another base LM or of other heads, and as `read_costs` and `costs_here`.
    """
    from rescore.drafters.heads import Heads

    if asked is None and not any(rescorer.plans for rescorer, _ in choosing.values()):
        return None
    name, said = recording.name, recording.settings
    heads = None
    if any(isinstance(drafter, Heads) for _, drafters in choosing.values() for drafter in drafters):
        if base.traced or not isinstance(said.get("heads_sha256"), str):
            raise RescoreError(
                f"the trace of {name} does not hold what block heads of a known base LM proposed, so that no costs are "
                "known of them; give other drafters, or drop --costs"
            )
        heads = said["heads_sha256"], recording.h
    if asked is None or asked == HERE:
        models = recording.models
        return costs_here(base.base, heads, models.device, compiles=models.compiles, inputs=recording.inputs)
    costs = asked if isinstance(asked, Costs) else read_costs(asked)
    check_costs(costs, name, base.base, heads)
    return costs


def check_costs(costs: Costs, name: str, base: BaseIdentity | None, heads: HeadsKey | None) -> None:
    """Raises `IncompatibleError` for a table of another base LM, or of other heads than those that draft (None: none
    do), than `name` is decoded with. Of another precision or machine it may be (`of_elsewhere`)."""
    of = (costs.weights_sha256, costs.config_sha256)
    if base is not None and of != (base.weights_sha256, base.config_sha256):
        raise IncompatibleError(
            f"the costs are of {costs.base}, and {name} is decoded by {base.name} (or one of them has changed); "
            f"{COMMAND} --base measures those of another"
        )
    if heads is not None and (costs.heads is None or heads != (costs.heads.sha256, costs.heads.h)):
        there = f"h = {costs.heads.h} heads" if costs.heads else "no heads"
        raise IncompatibleError(
            f"the costs were measured with {there}, and {name} is decoded with {'others' if costs.heads else 'some'}, "
            f"h = {heads[1]}; {COMMAND} --heads --h measures those of others"
        )


def of_elsewhere(costs: Costs, recording: Recording, base: Target, *, live: bool) -> str | None:
    """A line about a table that is of another precision than what is decoded, or of a base LM that is not known; if
    that is decoded `live`, beside times of this machine, of another machine too. None where there is nothing to say.

    base: as `costs_for` takes it.
    """
    if base.base is None:
        return (
            f"the trace of {recording.name} does not name its base LM; whether the costs, of {costs.base}, are of that "
            "can't be checked"
        )
    there, here = f"in {costs.dtype}", f"in {base.base.dtype}"
    if live:
        models = recording.models
        there += _where(costs.machine, compiles=costs.compiles)
        here += _where(this_machine(models.device), compiles=models.compiles)
    if there == here:
        return None
    return (
        f"the costs are of decoding {there}, and {recording.name} is decoded {here}: what is planned and predicted is "
        f"for there; {COMMAND} measures those of here"
    )


def _where(machine: Machine, *, compiles: bool) -> str:
    return f" on {machine}" + ("" if compiles else ", layers not compiled")
