"""Where the shards of a large task are done: here, one after the other, or by the workers of a Ray cluster.

What a shard gives depends on the shard alone, so that it does not matter who does it, nor how many do: results are the
same to the last bit for one worker and for many. A worker that dies loses the shards it was at; these are done again.
Who asks writes what it gets in the order of the shards, so that one who is killed goes on like any other.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from lattices.errors import RescoreError
from lm.locks import warn

Shard = TypeVar("Shard")
Result = TypeVar("Result")
LOCAL, RAY = "local", "ray"
AGAIN = 3  # times that a shard is done again whose worker died
CONNECT_SECONDS = 10.0
AHEAD = 4  # shards for each worker that are done or at work, while the first of them is not
# What of the environment workers on other machines need to do the same; there the folders must be the same, too.
PASSED = ("RESCORE_CACHE", "HF_HOME", "HF_HUB_OFFLINE")
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}


class Executor:
    """Does shards here."""

    is_local = True
    workers = 1  # at a time

    def map(self, function: Callable[[Shard], Result], shards: Iterable[Shard]) -> Iterator[Result]:
        """What the function gives for each of the shards, in their order."""
        return map(function, shards)


HERE = Executor()


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """Who does the work; the help of the command line is on the fields."""

    executor: Annotated[
        Literal["local", "ray"], "Do the work in this process, or by the workers of a Ray cluster (rescore[ray])."
    ] = "local"
    address: Annotated[
        str | None, "Of a Ray cluster that runs (HOST:PORT, or auto). Default: one on this machine, for this command."
    ] = None
    workers: Annotated[int | None, "Workers at a time. Default: one for each core, or GPU, of the cluster."] = None

    def check(self) -> None:
        """Raises `RescoreError` for what makes no sense together."""
        if self.workers is not None and self.workers < 1:
            raise RescoreError(f"--workers {self.workers}; at least one is needed")
        for name in ("address", "workers"):
            if self.executor == LOCAL and getattr(self, name) is not None:
                raise RescoreError(f"--{name} is of a Ray cluster; add --executor ray, or drop it")

    @contextmanager
    def started(self, device: str = "cpu") -> Iterator[Executor]:
        """The executor, as long as the work goes on; device: as the user named it, of which a worker needs one.

        Raises `RescoreError` where there is no Ray, or no cluster at the address.
        """
        self.check()
        if self.executor == LOCAL:
            yield HERE
            return
        os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
        try:
            import ray
        except ImportError as error:
            raise RescoreError("--executor ray needs Ray: pip install 'rescore[ray]'") from error
        mine = not ray.is_initialized()  # else this process is connected to a cluster, which is used as it is
        if mine:
            self._connect()
        elif self.address not in (None, "auto", there := ray.get_runtime_context().gcs_address):
            raise RescoreError(f"this process is connected to the Ray cluster at {there}, not to {self.address}")
        try:
            has: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            kind = "GPU" if device != "cpu" and on_gpu(device) else "CPU"
            if not has.get(kind):
                raise RescoreError(f"the Ray cluster has no {kind} for a worker")
            yield RayExecutor(self.workers or int(has[kind]), {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1})
        finally:
            if mine:
                ray.shutdown()

    def _connect(self) -> None:
        import ray

        passed = {name: os.environ[name] for name in PASSED if name in os.environ}
        own: dict[str, Any] = {} if self.address else {"num_cpus": self.workers, "include_dashboard": False}
        host, _, port = (self.address or "").rpartition(":")
        try:
            if port.isdigit() and "://" not in host:  # Ray itself would wait for minutes, and end the process
                socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
            ray.init(
                address=self.address, runtime_env={"env_vars": passed} if self.address else None, log_to_driver=False,
                logging_level=logging.CRITICAL, configure_logging=True, **own,
            )  # fmt: skip
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            where = f"no Ray cluster answers at {self.address}" if self.address else "Ray can't be started here"
            raise RescoreError(f"{where} ({str(error).splitlines()[0]})") from error
        with suppress(AttributeError):  # else what a cluster has to say would stand in the results on stdout
            ray._private.worker.print_to_stdstream = _told  # type: ignore[assignment]


def _told(message: dict[str, Any], **_: Any) -> None:
    """Says in one line what of a cluster's messages matters."""
    if any("worker died" in line for line in message.get("lines", ())):
        warn("a worker of the Ray cluster died; what it was at is done again")


LOCALLY = ExecutorOptions()


def on_gpu(device: str) -> bool:
    """Whether work on this device, as a user names it, is done on a GPU here."""
    from lm.base.catalog import choose_device

    return choose_device(device).startswith("cuda")


class RayExecutor(Executor):
    """Has shards done by the workers of the cluster that this process is connected to.

    workers: at a time; needs: what Ray reserves for each. On a CPU that is one core, so that a worker counts in one
    thread, whatever the machine: sums in other parts would be rounded otherwise.
    """

    is_local = False

    def __init__(self, workers: int, needs: dict[str, float]) -> None:
        self.workers, self.needs = workers, needs

    def map(self, function: Callable[[Shard], Result], shards: Iterable[Shard]) -> Iterator[Result]:
        """See `Executor.map`. Raises what the function raises, `RescoreError` for a shard whose workers die."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        remote: Any = ray.remote  # its annotations know a function alone, or its options alone
        call = remote(max_retries=AGAIN, **self.needs)(_done)
        shared, waiting = ray.put(function), iter(shards)
        asked, running = deque[Any](), set[Any]()  # in the order of the shards; those that are not done yet
        try:
            while True:
                for shard in islice(waiting, min(self.workers - len(running), AHEAD * self.workers - len(asked))):
                    asked.append(call.remote(shared, shard))
                    running.add(asked[-1])
                if not asked:
                    return
                if asked[0] in running:
                    running -= set(ray.wait(list(running))[0])
                    continue
                try:
                    result = ray.get(asked.popleft())
                except RayTaskError as error:
                    raise error.cause if isinstance(error.cause, RescoreError) else error from None
                except RayError as error:
                    raise RescoreError(
                        f"a worker died {AGAIN + 1} times at the same shard ({type(error).__name__}); is there memory "
                        "enough for so many (--workers)?"
                    ) from error
                yield result
        finally:
            for each in running:
                ray.cancel(each, force=True)


def _done(function: Callable[[Any], Any], shard: Any) -> Any:
    return function(shard)
