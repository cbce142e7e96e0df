"""Workers on a Ray cluster: started, briefed, given shards, and replaced when they are lost."""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import Any

import torch

from lab.cluster.address import LOCAL, require_reachable
from lab.cluster.agreement import conditions, disagreement
from lab.cluster.parcels import Parcel
from lab.cluster.worker import Briefing, Worker
from lab.errors import UserError
from lab.store import Arrays
from lab.subjects.loading import LoadedSubject

#: How often a shard may take its worker with it before it is its own fault.
TRIES = 3
#: How long workers may take to start and load their model, in seconds.
START_SECONDS = 600
#: Shards and results are small; Ray would reserve a third of the memory for them.
LOCAL_OBJECT_STORE = 256 * 2**20


@dataclass
class _Member:
    """One worker: its actor, the shard that it is at (None: it is being briefed, or idle), and what it was told."""

    actor: Any
    task: str | None = None
    briefing: Briefing | None = None
    process: int | None = None


class Cluster:
    """A Ray cluster that this process is connected to.

    Args:
        address: `local` starts one on this machine; else what `ray.init` takes: `HOST:PORT`, `ray://HOST:PORT`, `auto`.
        workers: how many; None takes as many as the cluster has room for.
        threads: threads of each worker; on a CPU it takes so many of the cluster's cores.

    Raises:
        UserError: Ray is not installed, the cluster cannot be reached, or it was started with another version.
    """

    def __init__(self, address: str, workers: int | None, threads: int):
        require_reachable(address)
        import ray

        self.address, self.threads = address, threads
        self._wanted = workers
        self.ray = ray
        self._crew: RayCrew | None = None
        _connect(ray, address, (workers or max(1, (os.cpu_count() or 1) // threads)) * threads)

    def crew(self, subject: LoadedSubject, briefing: Briefing) -> RayCrew:
        """The workers, told to have this subject.

        Raises:
            UserError: the cluster has no room for a worker, or not for as many as were asked for.
        """
        gpus = 1 if subject.device.type == "cuda" else 0
        if self._crew is None or self._crew.gpus != gpus:
            if self._crew is not None:
                self._crew.dismiss()
            self._crew = RayCrew(self, self._count(gpus), gpus)
        here = conditions(subject, briefing.module, briefing.libraries)
        # On the machine of a worker its device is the only one that it sees.
        self._crew.brief(here, replace(briefing, device=subject.device.type))
        return self._crew

    def close(self) -> None:
        """Dismiss the workers, and end the cluster if it was started here."""
        self.ray.shutdown()

    def _count(self, gpus: int) -> int:
        there = self.ray.cluster_resources()
        room = int(there.get("GPU", 0) if gpus else there.get("CPU", 0) // self.threads)
        what = "GPUs" if gpus else f"workers of {self.threads} threads"
        if room < max(1, self._wanted or 1):
            raise UserError(f"the Ray cluster {self.address} has room for {room} {what}, not for {self._wanted or 1}")
        return self._wanted or room


class RayCrew:
    """Workers who hold one subject: each computes one shard at a time.

    A shard whose worker is lost goes to the next one, and another worker is started.

    Args:
        cluster: where they live.
        count: how many.
        gpus: of each.
    """

    def __init__(self, cluster: Cluster, count: int, gpus: int):
        self.gpus, self._cluster, self._count = gpus, cluster, count
        self._ray = cluster.ray
        self._here: dict[str, str] = {}
        self._briefing: Briefing | None = None
        self._queue: deque[str] = deque()
        self._parcels: dict[str, Parcel] = {}
        self._losses: Counter[str] = Counter()
        self._fruitless = 0
        self._running: dict[Any, _Member] = {}
        self._idle: list[_Member] = []
        self._finished: deque[tuple[str, Arrays | Exception]] = deque()

    @property
    def _name(self) -> str:
        return f"the Ray cluster {self._cluster.address}"

    def brief(self, here: dict[str, str], briefing: Briefing) -> None:
        """Have all workers load a subject, unless they have it, and say what its numbers depend on there."""
        self._here, self._briefing = here, briefing
        self._fruitless = 0
        idle, self._idle = self._idle, []
        for member in idle:
            self._prepare(member)
        for _ in range(self._count - len(self._running)):
            self._start()

    def submit(self, name: str, parcel: Parcel) -> None:
        """Have a shard computed, after those that were submitted before."""
        self._parcels[name] = parcel
        self._queue.append(name)
        self._deal()

    def next(self) -> tuple[str, Arrays | Exception]:
        """Wait for the next shard to be done, whichever it is.

        Raises:
            UserError: no worker can be had, one does not fit, or a shard has taken several workers with it.
        """
        while not self._finished:
            self._step()
        return self._finished.popleft()

    def wait_for_workers(self) -> None:
        """Wait until all workers have loaded the subject.

        Raises:
            UserError: as `next`.
        """
        while any(member.task is None for member in self._running.values()):
            self._step()

    def _step(self) -> None:
        """Wait until one worker has finished what it is doing, or is lost."""
        self._deal()
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=START_SECONDS)
        if not done:
            if any(member.task is not None for member in self._running.values()):
                return  # a shard may take as long as it takes
            raise UserError(f"no worker of {self._name} was ready within {START_SECONDS} seconds")
        member = self._running.pop(done[0])
        try:
            result = self._ray.get(done[0])
        except self._ray.exceptions.RayActorError as error:
            self._bury(member, error)
        except self._ray.exceptions.RayError as error:  # it cannot read what it is sent, or send what it found
            raise UserError(f"a worker of {self._name} fails: {_line(error)}") from error
        else:
            self._idle.append(member)
            if member.task is None:
                self._welcome(member, result)
            else:
                self._finished.append((member.task, result if isinstance(result, Exception) else _own(result)))
                del self._parcels[member.task]
                member.task, self._fruitless = None, 0

    def forget(self) -> None:
        """Drop what was submitted and is not done; a worker cannot be stopped in a shard, but it can be dismissed."""
        self._queue.clear()
        self._parcels.clear()
        self._losses.clear()
        self._finished.clear()
        for result, member in list(self._running.items()):
            if member.task is not None:
                del self._running[result]
                self._ray.kill(member.actor)

    def dismiss(self) -> None:
        """End all workers."""
        self.forget()
        for member in [*self._running.values(), *self._idle]:
            self._ray.kill(member.actor)

    def processes(self) -> list[int]:
        """Ids of the workers' processes, as far as they have said."""
        return [member.process for member in [*self._running.values(), *self._idle] if member.process]

    def _start(self) -> None:
        cpus = 1 if self.gpus else self._cluster.threads  # what computes on a GPU needs no share of the cores
        options = {"num_cpus": cpus, "num_gpus": self.gpus, "max_restarts": 0, "max_task_retries": 0}
        self._prepare(_Member(self._ray.remote(Worker).options(**options).remote()))

    def _prepare(self, member: _Member) -> None:
        member.briefing = self._briefing
        self._running[member.actor.prepare.remote(self._briefing)] = member

    def _deal(self) -> None:
        while self._queue and self._idle:
            member = self._idle.pop(0)
            member.task = self._queue.popleft()
            self._running[member.actor.compute.remote(self._parcels[member.task])] = member

    def _welcome(self, member: _Member, there: dict[str, str] | UserError) -> None:
        """Take in a worker that is ready, if its numbers are bound to be the same as those of this process."""
        if member.briefing != self._briefing:  # it has loaded what was wanted before
            self._idle.remove(member)
            self._prepare(member)
            return
        if isinstance(there, UserError):
            raise UserError(f"a worker of {self._name}: {there}")
        differs = disagreement(self._here, there)
        if differs is not None:
            raise UserError(
                f"a worker of {self._name} would measure something else: {differs}; "
                "install the same versions on all machines, and show them the same cache folder"
            )
        member.process = int(there["process"])

    def _bury(self, member: _Member, error: Exception) -> None:
        """Another worker for one that is lost, and its shard first in the queue."""
        self._fruitless += 1
        if member.task is not None:
            self._losses[member.task] += 1
            if self._losses[member.task] == TRIES:
                raise UserError(f"{member.task}: {TRIES} workers were lost over it; the last: {_line(error)}")
            self._queue.appendleft(member.task)
        if self._fruitless > TRIES * self._count:
            raise UserError(f"{self._name} loses all its workers; the last: {_line(error)}")
        self._start()


def _own(arrays: Arrays) -> Arrays:
    """Copies: Ray's arrays cannot be written to, and lie in its object store as long as anyone has them."""
    return {name: values.copy(order="K") for name, values in arrays.items()}


def _connect(ray: Any, address: str, cpus: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": None}
    try:
        with warnings.catch_warnings(action="ignore"):
            if address == LOCAL:
                # They do this process' work while it waits; Ray would have them yield to all others, by 15.
                os.environ.setdefault("RAY_worker_niceness", "0")
                gpus = torch.cuda.device_count()
                own = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": LOCAL_OBJECT_STORE}
                ray.init(address=LOCAL, **own, **quiet | {"include_dashboard": False})
            else:
                ray.init(address=address, **quiet)
    except Exception as error:  # whatever Ray makes of an address, a version or a port is one line to the user
        said = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise UserError(f"cannot join the Ray cluster {address}: {said[:400]}") from error


def _line(error: Exception) -> str:
    """The last of a library's many lines, which says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
