"""Norms replaced in one layer at a time: those through which it reads the stream, and each site alone."""

from __future__ import annotations

import numpy as np
import xarray as xr

from lab.experiments.surgery.measuring.normalization_losses import Scorer
from lab.experiments.surgery.measuring.normalization_whole import Rules
from lab.normalization.replacements import Identity
from lab.normalization.surgery import Rule
from lab.records import variable

#: removal -> variable with a layer's reading norms replaced, variable with single sites replaced, and its words
REMOVALS = {
    "identity": ("layer_norm_removed_loss", "site_norm_removed_loss", "replaced by identity"),
    "frozen_scale": ("layer_frozen_scale_loss", "site_frozen_scale_loss", "given a constant scale"),
    "frozen_scale_first_exact": (
        "layer_frozen_scale_first_exact_loss",
        "site_frozen_scale_first_exact_loss",
        "given a constant scale, the first token's own kept",
    ),
}


def measured(scorer: Scorer, rules: Rules) -> dict[str, xr.Variable]:
    """Losses with the norms of one layer after the other replaced [layer, prompt], and [site, layer, prompt]."""
    made: dict[str, Rule] = {
        "identity": Identity,
        "frozen_scale": rules.frozen,
        "frozen_scale_first_exact": rules.frozen_first_exact,
    }
    found: dict[str, xr.Variable] = {}
    for removal in scorer.budget.removals:
        both, single, said = REMOVALS[removal]
        losses = scorer.single_layers(f"{removal} in one layer", scorer.norms.pre_roles, made[removal])
        words = f"loss with the norms before the sublayers of one layer {said}"
        found[both] = variable(("layer", "prompt"), losses, "nat/token", words)
        if scorer.budget.sites_separately:
            stacked = [
                scorer.single_layers(f"{removal} at {role} of one layer", (role,), made[removal])
                for role in scorer.norms.block_roles
            ]
            words = f"loss with one norm of one layer {said}"
            found[single] = variable(("site", "layer", "prompt"), np.stack(stacked), "nat/token", words)
    return found
