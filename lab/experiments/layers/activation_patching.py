"""T-2 activation patching: which layer moves the information that decides between two answers?

A minimal pair is a clean prompt with its answer and a corrupted prompt with another answer, of the same
length and different in one span of tokens. The model's preference is the logit difference at the last
position, LD = logit(answer) - logit(corrupted answer), read in float32. Restoring a part of the clean
computation in the corrupted run recovers a share of the clean preference,

    recovery = (LD_patched - LD_corrupted) / (LD_clean - LD_corrupted),

taken as a ratio of means over pairs: ratios of single pairs have heavy tails.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import xarray as xr

from lab import paths
from lab.errors import NotApplicable
from lab.experiments import Experiment, Tolerance
from lab.records import Record
from lab.statistics.depth import label_of_largest

if TYPE_CHECKING:
    from lab.corpora.corpus import Corpus
    from lab.store import Sweep
    from lab.subjects.loading import LoadedSubject

FAMILIES = ("factual", "linguistic", "arithmetic")
#: below this many solved pairs a family's profile is noise
FEWEST_PAIRS = 12


class ActivationPatching(Record):
    """Logit differences with parts of the clean run restored in the corrupted one.

    Dimensions: `layer` (L), `position` (`span`, `last`, `between`), `minimal_pair` (those that the
    model solves), `family`.
    """

    sampling: ClassVar = {"minimal_pair": None}
    profiles: ClassVar = ("residual_recovery", "update_recovery", "update_damage")

    @cached_property
    def _range(self) -> xr.DataArray:
        return self.mean("clean_preference") - self.mean("corrupted_preference")

    @cached_property
    def residual_recovery(self) -> xr.DataArray:
        """Recovery when the residual stream after a layer is the clean one at these positions [position, layer]."""
        return (self.mean("residual_patched_preference") - self.mean("corrupted_preference")) / self._range

    @cached_property
    def update_recovery(self) -> xr.DataArray:
        """Recovery when only the layer's update is the clean one, at all positions [layer]."""
        return (self.mean("update_patched_preference") - self.mean("corrupted_preference")) / self._range

    @cached_property
    def update_damage(self) -> xr.DataArray:
        """Share of the clean preference lost when only the layer's update is the corrupted one [layer]."""
        return (self.mean("clean_preference") - self.mean("update_corrupted_preference")) / self._range

    @property
    def causal_bottleneck_layer(self) -> int:
        """The layer whose clean update recovers most."""
        return label_of_largest(self.update_recovery)

    @property
    def later_bottleneck_layer(self) -> int:
        """The layer past the first whose clean update recovers most.

        The first layer's update at all positions carries the changed tokens themselves.
        """
        return label_of_largest(self.update_recovery.isel(layer=slice(1, None)))

    @property
    def handover_layer(self) -> float:
        """First layer after which the last position holds more of the answer than the changed span does.

        NaN if the span holds more after every layer.
        """
        last, span = (self.residual_recovery.sel(position=name).values for name in ("last", "span"))
        ahead = np.flatnonzero(last > span)
        return float(ahead[0]) if len(ahead) else float("nan")

    @property
    def handover_depth(self) -> float:
        """Relative depth of that layer: layer / number of layers."""
        return self.handover_layer / self.residual_recovery.sizes["layer"]

    def of(self, family: str) -> Self:
        """The record of one family of pairs.

        Raises:
            NotApplicable: the model solves fewer than 12 of its pairs.
        """
        rows = np.flatnonzero(self.variable("pair_family").values == FAMILIES.index(family))
        if len(rows) < FEWEST_PAIRS:
            raise NotApplicable(f"{self.subject} solves {len(rows)} of the {family} pairs; {FEWEST_PAIRS} are needed")
        return self._families.setdefault(family, type(self)(self.data.isel(minimal_pair=rows)))

    @cached_property
    def _families(self) -> dict[str, Self]:
        return {}

    @property
    def families(self) -> dict[str, Self]:
        """The records of the three families."""
        return {family: self.of(family) for family in FAMILIES}


@dataclass(frozen=True)
class Budget:
    """How many pairs are patched.

    Attributes:
        pairs: solved pairs per family, in the order of the data; None is all.
        batch_tokens: tokens per batch of equally long pairs.
    """

    pairs: int | None
    batch_tokens: int = 512


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """Patch residual streams and updates between the clean and the corrupted run of every solved pair.

    The corpus is not read: minimal pairs are texts of their own, continued without a chat template.
    """
    from lab.experiments.layers.measuring import activation_patching

    return activation_patching.measure(subject, budget, sweep)


EXPERIMENT = Experiment(
    id="T-2",
    title="Activation patching",
    question="Which layer moves the information that decides between two answers, and is it the most critical one?",
    record=ActivationPatching,
    measure=measure,
    budgets={"quick": Budget(pairs=24), "full": Budget(pairs=None, batch_tokens=8192)},
    tolerances={
        "": Tolerance(
            0.02, 0.05, "logit differences of bfloat16 states move by up to 0.05 between kernels; averages by less"
        ),
        "pair_family": Tolerance(0, 0, "an index"),
        "solved_pairs": Tolerance(0, 4, "pairs with a logit difference near 0: AVX-512 solved 2 more of 56 than AVX2"),
    },
    data=(paths.DATA / "minimal_pairs.json",),
)
