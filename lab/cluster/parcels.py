"""Work as bytes: what a shard computes, with the subject left out, which every worker has loaded itself."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ray import cloudpickle
from threadpoolctl import threadpool_info

from lab.cluster.states import state
from lab.store import Arrays, Sweep
from lab.subjects.loading import LoadedSubject

#: stands for the sweep inside of a shard: parts of a shard are not kept, and nobody watches them
SWEEP = "sweep"
#: parts of a subject that are no work on its model
IDLE = ("facts", "tokenizer")


@dataclass(frozen=True)
class Parcel:
    """One shard's work.

    Attributes:
        content: the pickled call; parts of the subject are named in it instead of copied.
        threads: of PyTorch, where the work was packed; other numbers of threads may round sums in another order.
        blas_threads: of the linear algebra of numpy and scipy there; None where that has none to set.
    """

    content: bytes
    threads: int
    blas_threads: int | None


class Packer:
    """Turns the work of shards on one subject into parcels.

    Args:
        subject: the subject that the work refers to; its parts are sent by name.
    """

    def __init__(self, subject: LoadedSubject):
        self._subject = subject
        self._names = {id(part): name for name, part in parts(subject).items()}
        self._state = state(subject.model)

    def pack(self, work: Callable[[], Arrays]) -> Parcel | None:
        """The work as a parcel; None if it is to be done here.

        That is work that does not touch the model, for which its data would only be sent about; work that holds
        what cannot be sent, such as an open file; and work on a model that is, for the time being, not as it was
        loaded (a module replaced, a hook set, an adapter merged into its weights), since a worker's model is.
        """
        if state(self._subject.model) != self._state:
            return None
        stream = io.BytesIO()
        pickler = _Pickler(stream, self._names)
        try:
            pickler.dump(work)
        except (pickle.PicklingError, TypeError, AttributeError):
            return None
        if not pickler.named - {SWEEP, *IDLE}:
            return None
        blas = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
        return Parcel(stream.getvalue(), torch.get_num_threads(), max(blas, default=None))


def unpack(parcel: Parcel, subject: LoadedSubject) -> Callable[[], Arrays]:
    """The work of a parcel, on another process' copy of the subject."""
    work: Callable[[], Arrays] = _Unpickler(io.BytesIO(parcel.content), parts(subject)).load()
    return work


def parts(subject: LoadedSubject) -> Mapping[str, Any]:
    """The parts of a subject that work may refer to, by name: the same names in every process."""
    found = {
        "subject": subject,
        "facts": subject.facts,
        "decoder": subject.decoder,
        "head": subject.decoder.unembedding,
    }
    if subject.tokenizer is not None:
        found["tokenizer"] = subject.tokenizer
    found |= {f"module {name}": module for name, module in subject.model.named_modules()}
    found |= {f"parameter {name}": tensor for name, tensor in subject.model.named_parameters()}
    return found | {f"buffer {name}": tensor for name, tensor in subject.model.named_buffers()}


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped
    """Names parts of the subject instead of copying them, and notes which."""

    def __init__(self, stream: io.BytesIO, names: Mapping[int, str]):
        super().__init__(stream)
        self._names = names
        self.named: set[str] = set()

    def persistent_id(self, part: Any) -> str | None:
        """Name of a part of the subject, or of the sweep."""
        name = SWEEP if isinstance(part, Sweep) else self._names.get(id(part))
        if name is not None:
            self.named.add(name)
        return name


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, own: Mapping[str, Any]):
        super().__init__(stream)
        self._own = own

    def persistent_load(self, name: str) -> Any:
        """The part of this name here."""
        return Sweep() if name == SWEEP else self._own[name]
