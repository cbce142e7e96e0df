"""Results of layer programs, on the device until the batch is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lab.residual.streams import beside, mark
from lab.residual.tree import Node

#: Bytes of results that may wait on a device, with all that they keep alive: sums may, states are fetched at once.
WAITING_BYTES = 2**26


class Results:
    """Collects [k, ...] results of nodes into [n_programs, ...] per name, on the CPU.

    To fetch a result from a device takes until all that is queued there is done; so they wait for each other.
    """

    def __init__(self, n_programs: int):
        self.n_programs = n_programs
        self._fetched: dict[str, Tensor] = {}
        self._waiting: list[tuple[Sequence[Node], Mapping[str, Tensor]]] = []
        self._bytes = 0

    def __len__(self) -> int:
        return self.n_programs

    def add(self, nodes: Sequence[Node], results: Mapping[str, Tensor]) -> None:
        """Take the results of some nodes, in their order."""
        self._waiting.append((nodes, results))
        self._bytes += sum(values.untyped_storage().nbytes() for values in results.values())
        if self._bytes > WAITING_BYTES or any(values.device.type == "cpu" for values in results.values()):
            self.fetch()

    def fetch(self) -> dict[str, Tensor]:
        """All results so far."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        for name in dict.fromkeys(name for _, results in waiting for name in results):
            found = [(nodes, results[name]) for nodes, results in waiting if name in results]
            self._put(name, [node for nodes, _ in found for node in nodes], _joined([values for _, values in found]))
        return self._fetched

    def _put(self, name: str, nodes: Sequence[Node], results: Tensor) -> None:
        if name not in self._fetched:
            self._fetched[name] = torch.empty((self.n_programs, *results.shape[1:]), dtype=results.dtype)
        for node, result in zip(nodes, results, strict=True):
            self._fetched[name][node.programs] = result


class Started:
    """A batch of layer programs that a device has been told to run.

    Args:
        device: which.
        results: of the batch; all work that gives them is queued.
        held: what that work reads, held until the results are here.
    """

    def __init__(self, device: torch.device, results: Results, held: object):
        self._device, self._results, self._held = device, results, held
        self._end = mark(device)

    def results(self) -> dict[str, Tensor]:
        """Each result [n_programs, ...] in the order of the programs, on the CPU; waits for this batch alone."""
        with beside(self._device, self._end):
            results = self._results.fetch()
        self._held = None
        return results


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts [k, ...] one after the other, on the CPU."""
    return (torch.cat(list(parts)) if len(parts) > 1 else parts[0]).cpu()
