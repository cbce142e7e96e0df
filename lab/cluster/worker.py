"""A worker: a process that has loaded a subject and computes shards on it."""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.errors import NotApplicable, UserError

if TYPE_CHECKING:
    from lab.cluster.parcels import Parcel
    from lab.store import Arrays
    from lab.subjects.facts import Facts
    from lab.subjects.loading import LoadedSubject


@dataclass(frozen=True)
class Briefing:
    """What a worker needs to know before it can compute.

    Attributes:
        facts, dtype, device: the subject, as `lab.subjects.loading.load` takes them.
        module: dotted name of the module of the experiment.
        libraries: whose versions its numbers depend on.
    """

    facts: Facts
    dtype: str
    device: str
    module: str
    libraries: tuple[str, ...]


class Worker:
    """Lives in a process of its own. Errors are handed back: they are what came of a shard."""

    def __init__(self) -> None:
        self._subject: LoadedSubject | None = None
        self._loaded: tuple[Any, ...] = ()

    def prepare(self, briefing: Briefing) -> dict[str, str] | UserError:
        """Load the subject, unless it is loaded; what numbers depend on here, and the process' id."""
        from lab.cluster.agreement import conditions
        from lab.subjects.several_devices import load

        wanted = (briefing.facts, briefing.dtype, briefing.device)
        try:
            if self._subject is None or self._loaded != wanted:
                self._subject = None  # one model in memory at a time
                self._subject, self._loaded = load(*wanted), wanted
            return conditions(self._subject, briefing.module, briefing.libraries) | {"process": str(os.getpid())}
        except UserError as error:
            return error

    def compute(self, parcel: Parcel) -> Arrays | Exception:
        """The arrays of a shard, or the exception that its work ended in."""
        import torch
        from threadpoolctl import threadpool_limits

        from lab.cluster.parcels import unpack

        assert self._subject is not None
        torch.set_num_threads(parcel.threads)
        try:
            with threadpool_limits(parcel.blas_threads, user_api="blas"):
                return dict(unpack(parcel, self._subject)())
        except (UserError, NotApplicable) as error:
            return error
        except Exception as error:
            error.add_note(f"in a worker, process {os.getpid()}:\n{traceback.format_exc()}")
            return error
