"""Records: what one experiment found on one subject, as labelled arrays with units and provenance.

A record comes from a measurement or from published figures, and a claim cannot tell which. The
variables have the same names in both; a measured variable has a sampling dimension more (`prompt`,
`pair_prompt`, `group`, ...), over which the record averages and the bootstrap resamples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import xarray as xr

from lab.errors import NotApplicable

RESAMPLES = 500
SEED = 20260704
INTERVAL = (2.5, 97.5)  #: percentiles between which 95 % of the resamples lie
BOUNDS = xr.Variable("bound", ["low", "high"])


class Record:
    """One experiment's labelled arrays on one subject.

    Subclasses name the sampling dimensions and turn variables into the quantities that claims
    speak of. Everything a subclass derives must come from `self.data`, so that a resampled record
    derives it again.
    """

    #: sampling dimension -> variable that holds its weights (scored tokens), or None for equal weights;
    #: a variable whose tokens are others says so in its attribute `weights`
    sampling: ClassVar[Mapping[str, str | None]] = {"prompt": "scored_tokens"}

    #: names of properties that figures draw with their bootstrap interval; a snapshot keeps these intervals
    profiles: ClassVar[tuple[str, ...]] = ()

    def __init__(self, data: xr.Dataset):
        self.data = data

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.subject} ({self.condition})>"

    @property
    def subject(self) -> str:
        """Catalog name of the subject."""
        return str(self.data.attrs["subject"])

    @property
    def source(self) -> str:
        """`published` or `measured`."""
        return str(self.data.attrs["source"])

    @property
    def condition(self) -> str:
        """Budget, dtype and device of a measurement (`quick-bfloat16`), or `published`."""
        return str(self.data.attrs["condition"])

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Digests, settings, library versions, seconds; for published figures their source."""
        return dict(json.loads(self.data.attrs.get("provenance", "{}")))

    def has(self, name: str) -> bool:
        """Whether the record holds this variable."""
        return name in self.data

    def variable(self, name: str) -> xr.DataArray:
        """The variable as recorded, sampling dimension included.

        Raises:
            NotApplicable: the record does not hold it.
        """
        if name not in self._variables:
            if name not in self.data:
                raise NotApplicable(f"the {self.source} record of {self.subject} holds no {name}")
            self._variables[name] = self.data[name]
        return self._variables[name]

    def mean(self, name: str) -> xr.DataArray:
        """The variable averaged over its sampling dimension, weighted by scored tokens.

        A per-prompt mean weighted by the prompt's token count is the mean over all tokens:
        sum_r n_r m_r / sum_r n_r. Published figures have no sampling dimension and come back as
        they are. What is returned is kept for all who ask, and not to be written to.
        """
        if name not in self._means:
            self._means[name] = self._averaged(self.variable(name))
        return self._means[name]

    def _averaged(self, array: xr.DataArray) -> xr.DataArray:
        own = array.attrs.get("weights")
        for dimension, usual in self.sampling.items():
            if dimension in array.dims:
                weights = own or usual
                array = array.mean(dimension) if weights is None else _weighted(array, self.data[weights], dimension)
        return array

    # Dozens of claims, most of them once per layer, ask each of 500 resamples for the same few arrays.

    @cached_property
    def _variables(self) -> dict[str, xr.DataArray]:
        return {}

    @cached_property
    def _means(self) -> dict[str, xr.DataArray]:
        return {}

    @property
    def sampling_sizes(self) -> dict[str, int]:
        """Sampling dimensions that this record has, with their sizes; empty for published figures."""
        return {name: self.data.sizes[name] for name in self.sampling if name in self.data.sizes}

    @cached_property
    def resamples(self) -> Sequence[Self]:
        """Bootstrap resamples: whole prompts drawn with replacement, all arrays together.

        Prompts are drawn, not tokens: tokens of one completion are correlated. Pairing is kept,
        because every variable sees the same draw; and another record whose sampling dimension has
        the same name and size sees it too. Empty for published figures.
        """
        generators = {name: np.random.default_rng([SEED, *name.encode()]) for name in self.sampling_sizes}
        return [self._resampled(generators) for _ in range(RESAMPLES)] if generators else []

    def band(self, name: str) -> xr.DataArray | None:
        """The 95 % bootstrap interval of a property [bound: low, high; ...]; None where nothing was sampled.

        The percentile interval over `resamples`. A record that was read from a snapshot has those of its
        `profiles` that the snapshot keeps.
        """
        if not self.resamples:
            kept: xr.DataArray | None = self.kept_bands.get(name)
            return kept
        if name not in self._bands:
            values = [getattr(resample, name) for resample in self.resamples]
            with np.errstate(all="ignore"):
                low, high = np.nanpercentile(np.stack([np.asarray(value) for value in values]), INTERVAL, axis=0)
            like = getattr(self, name)
            self._bands[name] = xr.concat([like.copy(data=low), like.copy(data=high)], BOUNDS)
        return self._bands[name]

    @cached_property
    def _bands(self) -> dict[str, xr.DataArray]:
        return {}

    @cached_property
    def kept_bands(self) -> dict[str, xr.DataArray]:
        """Intervals that came with the numbers: those of a snapshot, else none."""
        return dict(self.data.attrs.get("bands", {}))

    def summary(self) -> xr.Dataset:
        """The record without sampling dimensions: the numbers that a snapshot holds."""
        names = [str(name) for name in self.data.data_vars if str(name) not in self.sampling.values()]
        means = {name: self.mean(name).copy(deep=False) for name in names}
        for name, mean in means.items():
            mean.attrs = dict(self.data[name].attrs)
        return xr.Dataset(means)

    def _resampled(self, generators: Mapping[str, np.random.Generator]) -> Self:
        draws = {name: generators[name].integers(size, size=size) for name, size in self.sampling_sizes.items()}
        return type(self)(self.data.isel(draws))


def variable(dims: str | Sequence[str], values: Any, unit: str, description: str, **attrs: str) -> xr.Variable:
    """A variable of a record: labelled values with their unit and a one-line description.

    Args:
        dims: names of the dimensions, in the order of the axes of `values`; `()` for a single number.
        values: array-like.
        unit: e.g. `nat/token`, `layer`, `1` for pure numbers.
        description: what it is, in one line.
        attrs: further attributes, e.g. `weights`, the variable that holds the token counts.
    """
    return xr.Variable(dims, np.asarray(values), {"unit": unit, "description": description, **attrs})


def _weighted(array: xr.DataArray, weights: xr.DataArray, dimension: str) -> xr.DataArray:
    # xarray's own weighted() costs a millisecond a call, its dot() half of one, its copy() of a label a tenth.
    axes = list(range(array.ndim))
    along = array.dims.index(dimension)
    kept = axes[:along] + axes[along + 1 :]
    sums = np.einsum(array.values, axes, weights.values, [along], kept)
    mean: xr.DataArray = array.isel({dimension: 0}, drop=True).copy(deep=False, data=sums / float(weights.values.sum()))
    return mean
