"""What training gives back of a swapped norm: the part of T-15's record with losses while norms are trained."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from lab.errors import NotApplicable
from lab.records import Record

#: the model's own norms, trained as the swaps are
CONTROL = "rms_norm"
#: a swap that costs less [nat/token] has nothing to recover: a quick budget knows a small paired difference to 0.02
LEAST_COST = 0.02


class TrainedNorms(Record):
    """Losses while the scales and shifts of swapped norms are trained [recovery_variant, step, prompt]."""

    @cached_property
    def uniform_loss(self) -> float:
        """Loss of a uniform guess, ln V [nat/token]."""
        return float(self.variable("uniform_loss"))

    @cached_property
    def recovery_step(self) -> int:
        """The step of training at which the control's loss is lowest, chosen on the control alone."""
        control = self.mean("recovery_loss").sel(recovery_variant=CONTROL)
        trained = control.sel(step=control.step > 0).fillna(np.inf)
        return int(trained.step[int(np.argmin(trained.values))])

    def recovered(self, variant: str) -> float:
        """Share of a swap's damage that training its scales and shifts has undone at `recovery_step`.

        Relative to what the same training makes of the model's own norms: a model learns the texts' style, too.
        A loss above a uniform guess's counts as that, and so does one that is not finite before training: further
        differences mean nothing, and a swap that stays above has recovered nothing.

        Raises:
            NotApplicable: nothing was trained; training diverged; the swap overflows before training and after it, so
                that there was no gradient to train by; it costs too little to speak of recovering.
        """
        self._require_no_divergence(CONTROL)
        self._require_no_divergence(variant)
        losses = self.mean("recovery_loss").sel(step=[0, self.recovery_step])
        if losses.sel(recovery_variant=variant, step=self.recovery_step).isnull():
            raise NotApplicable(f"{self.subject} with {variant} overflows: training had no gradient to go by")
        capped = losses.fillna(np.inf).clip(max=self.uniform_loss)
        swapped, control = (capped.sel(recovery_variant=name).values for name in (variant, CONTROL))
        cost, left = swapped - control
        if cost < LEAST_COST:
            raise NotApplicable(f"{variant} costs {self.subject} {cost:.2g} nat: too little to speak of recovering it")
        return float(1 - left / cost)

    def _require_no_divergence(self, variant: str) -> None:
        """Raise NotApplicable if training made the loss of texts not finite that was finite before."""
        finite = self.variable("recovery_loss").sel(recovery_variant=variant).notnull()
        lost = int((finite.sel(step=0) & ~finite.sel(step=self.recovery_step)).sum())
        if lost:
            raise NotApplicable(
                f"training {variant} of {self.subject} diverged: after {self.recovery_step} steps its loss is not "
                "finite where it was before"
            )

    def recovered_of(self, *variants: str) -> dict[str, float]:
        """`recovered` of those swaps for which it can be told.

        Raises:
            NotApplicable: it can be told for none.
        """
        found, reasons = {}, []
        for variant in variants:
            try:
                found[variant] = self.recovered(variant)
            except NotApplicable as reason:
                reasons.append(str(reason))
        if not found:
            raise NotApplicable("; ".join(dict.fromkeys(reasons)))
        return found
