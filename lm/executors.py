"""Where the shards of a large task are done: here, one after the other, or by the workers of a Ray cluster.

What a shard gives depends on the shard alone, so that it does not matter who does it, nor how many do: results are the
same to the last bit for one worker and for many. A worker that dies loses the shards it was at; these are done again.
Who asks writes what it gets in the order of the shards, so that one who is killed goes on like any other.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from lattices.errors import IncompatibleError, RescoreError, first_line
from lm.environment import versions
from lm.locks import warn

Shard = TypeVar("Shard")
Result = TypeVar("Result")
LOCAL = "local"
AGAIN = 3  # times that a shard is done again whose worker died
CONNECT_SECONDS = 10.0
AHEAD = 4  # shards for each worker that are done or at work, while the first of them is not
# What of the environment workers on other machines need to do the same; there the folders must be the same, too.
PASSED = ("RESCORE_CACHE", "HF_HOME", "HF_HUB_OFFLINE")
# How Ray is started: it says nothing to its makers, nor of later versions to us, and its workers are as urgent as the
# command that they work for (their usual niceness leaves them nothing of a machine that has other work).
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0", "RAY_task_oom_retries": str(AGAIN),
}  # fmt: skip
# How HTTP/2 begins, which Ray's servers speak: the client's first words with settings; the kind of the first answer.
HELLO, SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5), 4


class Executor:
    """Does shards here."""

    is_local = True
    workers = 1  # at a time

    def begin(self) -> None:
        """Gets ready to do shards, before models are loaded for them. Raises `RescoreError` where it can't."""

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

    def check(self, device: str = "cpu") -> None:
        """Raises `RescoreError` for what makes no sense together, where there is no Ray, and where nothing that could
        be Ray answers at the address; starts and loads nothing. device: as the user named it."""
        if self.workers is not None and self.workers < 1:
            raise RescoreError(f"--workers {self.workers}; at least one is needed")
        for name in ("address", "workers"):
            if self.executor == LOCAL and getattr(self, name) is not None:
                raise RescoreError(f"--{name} is of a Ray cluster; add --executor ray, or drop it")
        if self.executor == LOCAL:
            return
        if device.startswith("cuda:"):
            raise RescoreError(
                f"--device {device} is one GPU of this machine, and each worker has one of its own; give --device cuda"
            )
        if importlib.util.find_spec("ray") is None:
            raise RescoreError("--executor ray needs Ray: pip install 'rescore[ray]'")
        host, _, port = (self.address or "").rpartition(":")
        if self.address not in (None, "auto") and not (host and port.isdigit()):
            raise RescoreError(f"--address {self.address}; give HOST:PORT of a Ray cluster, or auto")
        if port.isdigit() and not _is_connected():
            try:  # Ray itself would wait for minutes, print what it thinks, and end the process
                _knock(host.rpartition("://")[2].strip("[]"), int(port))
            except (OSError, OverflowError, ValueError) as error:
                raise self._no_cluster(error) from error

    @contextmanager
    def started(self, device: str = "cpu") -> Iterator[Executor]:
        """The executor, as long as the work goes on; device: as the user named it, of which a worker needs one.

        Ray is started, or connected to, when there is work for it. Raises as `check`.
        """
        self.check(device)
        if self.executor == LOCAL:
            yield HERE
            return
        executor = RayExecutor(self, device)
        try:
            yield executor
        finally:
            executor.close()

    def connect(self) -> Callable[[], object]:
        """Connects this process to the cluster; gives what leaves it (nothing does where it was connected before).

        Raises `RescoreError` where there is no cluster, or another one.
        """
        for name, value in RAY_SETTINGS.items():
            os.environ.setdefault(name, value)
        import ray

        if _is_connected():
            if self.address not in (None, "auto", there := ray.get_runtime_context().gcs_address):
                raise RescoreError(f"this process is connected to the Ray cluster at {there}, not to {self.address}")
            return lambda: None
        passed = {name: os.environ[name] for name in PASSED if name in os.environ}
        own: dict[str, Any] = {"num_cpus": self.workers, "include_dashboard": False}
        there = {"runtime_env": {"env_vars": passed}} if self.address else own
        with ExitStack() as undone:
            if is_main := threading.current_thread() is threading.main_thread():
                undone.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
            try:
                with _silent():  # Ray's own library says each of its attempts
                    ray.init(
                        address=self.address or LOCAL,  # not what RAY_ADDRESS says
                        log_to_driver=False, logging_level=logging.CRITICAL, configure_logging=True, **there,
                    )  # fmt: skip
            except (OSError, RuntimeError, ValueError) as error:
                # Ray sends a token to no address that it is given, unless it is told to.
                hint = "; where it asks for a token, set RAY_AUTH_MODE=token"
                raise self._no_cluster(error, hint if self.address else "") from error
            undone.callback(ray.shutdown)
            if is_main:
                # As Ctrl-C. Ray's own handler says where its libraries stood, aborts, and leaves processes behind.
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            teller: Any = ray._private.worker
            if hasattr(teller, "print_to_stdstream"):  # else what a cluster has to say stands in the results on stdout
                undone.callback(setattr, teller, "print_to_stdstream", teller.print_to_stdstream)
                teller.print_to_stdstream = _told
            return undone.pop_all().close

    def _no_cluster(self, error: Exception, hint: str = "") -> RescoreError:
        where = f"no Ray cluster answers at {self.address}" if self.address else "Ray can't be started here"
        return RescoreError(f"{where} ({first_line(error)}){hint}")


def _is_connected() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing is written to the process's stderr meanwhile."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _knock(host: str, port: int) -> None:
    """Raises `OSError` where nothing listens, and where what listens does not speak as Ray does."""
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as there:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        there.sendall(HELLO)
        answer = b""
        while len(answer) < 4 and (more := there.recv(4 - len(answer))):
            answer += more
        if len(answer) < 4 or answer[3] != SETTINGS:
            raise ConnectionError("what listens there is no cluster")


def _told(message: dict[str, Any], **_: Any) -> None:
    """Says in one line what of a cluster's messages matters."""
    lines = message.get("lines", ())
    if any("worker died" in line for line in lines):
        warn("a worker of the Ray cluster died; what it was at is done again")
    elif any("memory" in line and "killed" in line for line in lines):
        warn("a worker of the Ray cluster was ended for want of memory; what it was at is done again")


LOCALLY = ExecutorOptions()


class RayExecutor(Executor):
    """Has shards done by the workers of a cluster, which this process connects to when there are some.

    device: of which a worker needs one, as the user named it. On a CPU that is one core. A worker counts in one thread,
    whatever the machine: sums in other parts would be rounded otherwise.
    """

    is_local = False

    def __init__(self, options: ExecutorOptions, device: str = "cpu") -> None:
        self._options, self._device = options, device
        self._needs: dict[str, int] = {}  # of each worker; empty: not connected yet
        self._workers = 0
        self._leave: Callable[[], object] | None = None  # None: not connected by `begin`

    @property
    def workers(self) -> int:  # type: ignore[override]
        """Workers at a time."""
        self.begin()
        return self._workers

    def begin(self) -> None:
        """Starts or finds the cluster. Raises `RescoreError` where there is none, or no machine of it has what a worker
        needs."""
        if self._needs:
            return
        kind = "CPU"
        if self._device != "cpu":
            from lm.base.catalog import choose_device  # torch, which n-gram counts do without

            kind = "GPU" if choose_device(self._device).startswith("cuda") else "CPU"
        self._leave = self._leave or self._options.connect()
        import ray

        needs = {"num_cpus": 1, **({"num_gpus": 1} if kind == "GPU" else {})}
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        for name in ("CPU", kind):
            machines = [each for each in machines if each.get(name, 0) >= 1]
            if not machines:
                raise RescoreError(f"the Ray cluster has no {name} for a worker")
        self._workers = self._options.workers or sum(int(each[kind]) for each in machines)
        self._needs = needs

    def close(self) -> None:
        """Leaves the cluster that `begin` connected to."""
        if self._leave:
            self._leave()
        self._needs, self._leave = {}, None

    def map(self, function: Callable[[Shard], Result], shards: Iterable[Shard]) -> Iterator[Result]:
        """See `Executor.map`. Raises what the function raises, `RescoreError` for a shard whose workers die."""
        waiting = iter(shards)
        if not (first := list(islice(waiting, 1))):
            return
        waiting = chain(first, waiting)
        self.begin()
        import ray
        from ray.exceptions import RayError, RayTaskError

        remote: Any = ray.remote  # its annotations know a function alone, or its options alone
        call = remote(max_retries=AGAIN, **self._needs)(_done)
        shared, folder, here = ray.put(function), os.getcwd(), versions()
        asked, running = deque[Any](), set[Any]()  # in the order of the shards; those that are not done yet
        try:
            while True:
                for shard in islice(waiting, min(self.workers - len(running), AHEAD * self.workers - len(asked))):
                    asked.append(call.remote(folder, here, shared, shard))
                    running.add(asked[-1])
                if not asked:
                    return
                if asked[0] in running:
                    running -= set(ray.wait(list(running))[0])
                    continue
                try:
                    result = ray.get(asked.popleft())
                except RayTaskError as error:
                    raise _as_here(error) from error
                except RayError as error:
                    raise RescoreError(
                        f"a worker died {AGAIN + 1} times at the same shard ({type(error).__name__}); is there memory "
                        "enough for so many (--workers)?"
                    ) from error
                yield result
        finally:
            for each in running if ray.is_initialized() else ():  # else Ray would be started for it once more
                ray.cancel(each, force=True)


def _as_here(error: Any) -> Exception:
    """What a worker raised, as it would have been raised here."""
    cause = getattr(error.cause, "client_exc", error.cause)  # what could not be read in a worker is wrapped once more
    if isinstance(cause, ModuleNotFoundError):
        return RescoreError(f"a worker of the Ray cluster finds no module {cause.name}; install it on all its machines")
    return cause if isinstance(cause, Exception) else error


def _done(folder: str, here: dict[str, str], function: Callable[[Any], Any], shard: Any) -> Any:
    """One shard, in a worker; folder, here: the command's working folder, in which its paths begin, and its versions of
    what counts."""
    other = [f"{name} {there}, here {here[name]}" for name, there in versions().items() if there != here[name]]
    if other:
        raise IncompatibleError(f"a worker of the Ray cluster has {'; '.join(other)}; give all its machines the same")
    # Results are the same to the last bit whatever the environment of a machine says of threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    with chdir(folder if Path(folder).is_dir() else "."):
        return function(shard)
