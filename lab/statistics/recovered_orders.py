"""Records of orders: what several methods made of shuffled layers, in one run or in several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import xarray as xr

from lab.errors import NotApplicable
from lab.records import Record
from lab.statistics import orders


class RecoveredOrders(Record):
    """A record that holds, per method, where each layer was put and how good that is.

    Measured: `recovered_position` [method, seed, layer]; published: `recovered_order` [method, position], one run.
    Beside it `kendall_tau`, `position_accuracy` and whatever else is known per method [method, seed].
    """

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return int(self._positions.shape[-1])

    @cached_property
    def methods(self) -> list[str]:
        """The methods that the record holds."""
        return [str(method) for method in self.variable("kendall_tau")["method"].values]

    @cached_property
    def tau(self) -> xr.DataArray:
        """Kendall's tau of each method, mean over runs [method]."""
        return self.mean("kendall_tau")

    @cached_property
    def exact_share(self) -> xr.DataArray:
        """Share of positions that hold the right layer, mean over runs [method]."""
        return self.mean("position_accuracy")

    def of(self, name: str, method: str) -> float:
        """A variable [method] of one method, mean over runs."""
        return float(self.runs(name, method).mean())

    def runs(self, name: str, method: str) -> np.ndarray:
        """A variable [method] of one method in every run [seed]; one entry for published figures.

        Raises:
            NotApplicable: the record does not hold the method.
        """
        values: np.ndarray = self._table(name)[self._row(method)]
        return values

    def magnitude(self, method: str) -> float:
        """|tau| of a method, mean over runs: how much order it found, in whichever direction."""
        return float(np.abs(self.runs("kendall_tau", method)).mean())

    def positions(self, method: str) -> np.ndarray:
        """The position at which a method put each layer [seed, layer]."""
        found: np.ndarray = self._positions[self._row(method)]
        return found

    def orders(self, method: str) -> np.ndarray:
        """The layers in the order in which a method put them [seed, position]."""
        return orders.positions_of(self.positions(method))

    def inverted(self, method: str) -> np.ndarray:
        """Which pairs of layers a method put in the wrong order [seed, layer, layer], the lower layer first."""
        positions = self.positions(method)
        return np.triu(positions[:, :, None] > positions[:, None, :], k=1)

    def ranking(self, methods: Sequence[str]) -> list[str]:
        """Methods by tau, the best first; of equals the one named first."""
        return sorted(methods, key=lambda method: -self.of("kendall_tau", method))

    @cached_property
    def _positions(self) -> np.ndarray:
        """[method, seed, layer]"""
        if self.has("recovered_order"):
            return orders.positions_of(self.data["recovered_order"].values)[:, None]
        found = self.variable("recovered_position")
        values: np.ndarray = found.values if "seed" in found.dims else found.values[:, None]
        # The mean over runs, which a snapshot keeps, ranks the layers as well as it can.
        return values if "seed" in found.dims else orders.positions_of(orders.positions_of(values))

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {method: row for row, method in enumerate(self.methods)}

    def _row(self, method: str) -> int:
        if method not in self._rows:
            raise NotApplicable(f"the {self.source} record of {self.subject} holds no {method}")
        return self._rows[method]

    def _table(self, name: str) -> np.ndarray:
        if name not in self._tables:
            values = self.variable(name).values
            self._tables[name] = values if values.ndim == 2 else values[:, None]
        return self._tables[name]

    @cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        return {}
