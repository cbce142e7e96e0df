"""A sweep whose shards are computed by workers; the process that measures keeps what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from threading import RLock
from typing import Any, NoReturn, Protocol

import numpy as np

from lab.cluster.parcels import Packer, Parcel
from lab.residual.sweeps import ProgramLosses
from lab.store import Arrays, Sweep

Work = Callable[[], Arrays]


class Crew(Protocol):
    """Workers who have the subject; `lab.cluster.crew` has those of a Ray cluster."""

    def submit(self, name: str, parcel: Parcel) -> None:
        """Have a shard computed, after those that were submitted before."""

    def next(self) -> tuple[str, Arrays | Exception]:
        """Wait for the next shard to be done, whichever it is."""

    def forget(self) -> None:
        """Drop what was submitted and is not done."""


class SpreadSweep(Sweep):
    """Sends the shards of a measurement to workers.

    A shard that was sent is a `Pending` dict, so that loops which only collect shards send all of them before the
    first is done. Where a loop looks into each shard before it asks for the next, shards are known ahead for layer
    programs (`ProgramLosses`), which are most of the work: one for every batch of texts. Results are kept by the sweep
    underneath, so that a killed run resumes, spread or not.

    Args:
        kept: the store's sweep.
        packer: of the subject that is measured.
        crew: who computes.
    """

    def __init__(self, kept: Sweep, packer: Packer, crew: Crew):
        super().__init__(kept.folder)
        self._kept, self._packer, self._crew = kept, packer, crew
        self._sent: set[str] = set()
        self._done: dict[str, Arrays | Exception] = {}
        self._lock = RLock()  # some measurements ask for shards from several threads

    def shard(self, name: str, compute: Work) -> Arrays:
        """The arrays of this shard: read back, or on their way from a worker, or computed here if no worker can."""
        with self._lock:
            if name not in self._sent:
                saved = self._saved(name)
                if saved is not None:
                    return saved
                for each, work in siblings(name, compute).items():
                    self._send(each, work)
            if name in self._sent:
                return Pending(partial(self._arrays, name))
        return self._kept.shard(name, compute)

    def begin(self, name: str, compute: Work, start: Callable[[], Work]) -> Work:
        """Nothing is begun here before it is asked for: workers are, by then, at all that can be sent."""
        return partial(self.shard, name, compute)

    def progress(self, done: float, total: float, what: str) -> None:
        """Progress of what is measured here; while shards are on their way, they are what is counted."""
        if len(self._done) == len(self._sent):
            self._kept.progress(done, total, what)

    def _send(self, name: str, work: Work) -> None:
        if name in self._sent or self._saved(name) is not None:
            return
        parcel = self._packer.pack(work)
        if parcel is not None:
            self._crew.submit(name, parcel)
            self._sent.add(name)

    def _saved(self, name: str) -> Arrays | None:
        try:
            return self._kept.shard(name, _absent)
        except _Absent:
            return None

    def _arrays(self, name: str) -> Arrays:
        """Wait for a shard; others that are done before it are kept too."""
        with self._lock:
            while name not in self._done:
                arrived, outcome = self._crew.next()
                self._done[arrived] = outcome
                if not isinstance(outcome, Exception):
                    self._kept.shard(arrived, partial(dict, outcome))
                self._kept.progress(len(self._done), len(self._sent), "shards, by workers")
            outcome = self._done[name]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def siblings(name: str, compute: Work) -> dict[str, Work]:
    """The shards of a loop that has come to this one, by name: those of all batches of a set of layer programs.

    Others cannot be told before the loop asks for them, and are alone.
    """
    losses = getattr(getattr(compute, "func", None), "__self__", None)
    if not (isinstance(compute, partial) and isinstance(losses, ProgramLosses)):
        return {name: compute}
    batch, sample, *rest = compute.args
    programs, _, user_words = rest
    batches = losses.batches(sample, programs, user_words)
    (place,) = [index for index, each in enumerate(batches) if each.texts == batch.texts]
    what = name.removesuffix(f" {place}")
    return {f"{what} {index}": partial(compute.func, each, sample, *rest) for index, each in enumerate(batches)}


class _Absent(Exception):
    """A shard has not been saved."""


def _absent() -> NoReturn:
    raise _Absent


class Pending(dict[str, np.ndarray]):
    """The arrays of a shard that a worker computes: a dict that waits for them when it is first looked into.

    Args:
        wait: gives the arrays, or raises what kept them from being computed.
    """

    def __init__(self, wait: Callable[[], Arrays]):
        super().__init__()  # stays empty: what it holds is asked for through the methods below
        self._wait = wait
        self._arrays: Arrays | None = None

    def _here(self) -> Arrays:
        if self._arrays is None:
            self._arrays = self._wait()
        return self._arrays

    # All ways of reading a dict; with `__iter__` overridden, `dict(pending)`, `{**pending}` and `|=` come here too.
    def __getitem__(self, key: str) -> np.ndarray:
        return self._here()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._here())

    def __len__(self) -> int:
        return len(self._here())

    def __contains__(self, key: object) -> bool:
        return key in self._here()

    def __or__(self, other: Any) -> Any:
        return self._here() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._here()

    def __repr__(self) -> str:
        return repr(self._here())

    def __reduce__(self) -> Any:
        return dict, (self._here(),)

    def keys(self) -> Any:
        return self._here().keys()

    def values(self) -> Any:
        return self._here().values()

    def items(self) -> Any:
        return self._here().items()

    def get(self, key: str, default: Any = None) -> Any:
        return self._here().get(key, default)

    def copy(self) -> Arrays:
        return self._here().copy()
