"""Scales and shifts of replaced norms trained on texts that are not scored, and what it recovers on those that are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from lab.corpora.batches import TokenText
from lab.experiments.surgery.measuring.normalization_losses import Scorer, unpadded
from lab.experiments.surgery.measuring.normalization_whole import Rules
from lab.normalization.recovery import train
from lab.normalization.settings import Training
from lab.normalization.surgery import Renormed
from lab.records import variable
from lab.store import Arrays

#: `rms_norm` is the control: the model's own norms in the same places, trained alike
TRAINED = ("rms_norm", "layer_norm", "group_norm_8", "batch_norm")


def trained(rules: Rules) -> list[str]:
    """What is trained: those of `TRAINED` that the model's width allows."""
    return [name for name in TRAINED if name in rules.whole]


def coords(training: Training | None, rules: Rules) -> dict[str, Any]:
    """Labels of the recovery's dimensions; none if nothing is trained."""
    return {} if training is None else {"recovery_variant": trained(rules), "step": [0, *training.steps]}


def measured(scorer: Scorer, rules: Rules, texts: Sequence[TokenText]) -> dict[str, xr.Variable]:
    """Losses on the scored texts before and after steps of training [recovery_variant, step, prompt]."""
    training = scorer.budget.training
    if training is None:
        return {}
    losses = []
    for name in trained(rules):
        compute = partial(_trained, scorer, rules, name, texts, training)
        losses.append(scorer.sweep.shard(f"training {name}", compute)["loss"])
    words = "loss on held-out texts after steps of training the norms' scales and shifts"
    return {
        "recovery_loss": variable(("recovery_variant", "step", "prompt"), np.stack(losses), "nat/token", words),
    }


def _trained(scorer: Scorer, rules: Rules, name: str, texts: Sequence[TokenText], training: Training) -> Arrays:
    # The whole-model variant of the control forms query and key norms anew as well, which no swap here touches.
    swapped = Renormed(scorer.decoder, scorer.norms, rules.whole["layer_norm"].roles, rules.whole[name].rule)
    losses: list[np.ndarray] = []

    def read(step: int, state: Renormed) -> None:
        losses.append(scorer.trained(state))
        scorer.sweep.progress(step, training.steps[-1], f"steps of training {name}")

    # One text per step: joint group norms must see no padding.
    train(swapped, unpadded(texts), training, read)
    return {"loss": np.stack(losses)}
