"""Norms replaced in the whole model: the loss, whether the result is causal, and how its states grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import nn

from lab.corpora.batches import TokenBatch, TokenText
from lab.experiments.surgery.measuring.normalization_losses import Scorer, unpadded
from lab.experiments.surgery.normalization import Budget
from lab.normalization.constants import Place, median_rms, place_of, pooled_statistics, running_statistics
from lab.normalization.moments import pooled
from lab.normalization.replacements import (
    FrozenScale,
    Identity,
    JointGroupNorm,
    LayerNorm,
    NoGain,
    RmsNorm,
    TokenGroupNorm,
)
from lab.normalization.sites import FINAL, Norm, Norms
from lab.normalization.surgery import Renormed, Rule, walk
from lab.records import variable
from lab.store import Arrays
from lab.subjects.anatomy import Decoder

Variables = dict[str, xr.Variable]


@dataclass(frozen=True)
class Replacing:
    """What is replaced, and by what.

    Attributes:
        roles: whose norms, in all layers.
        rule: gives the replacement of a norm.
        joint: whether it looks at the whole sequence, so that padding would count.
    """

    roles: tuple[str, ...]
    rule: Rule
    joint: bool = False


@dataclass(frozen=True)
class Rules:
    """All replacements.

    Attributes:
        whole: of the whole model, by variant.
        scales: typical root mean square at every norm.
    """

    whole: Mapping[str, Replacing]
    scales: Mapping[Place, float]

    def frozen(self, norm: Norm) -> nn.Module:
        """A constant scale."""
        return FrozenScale(norm, self.scales[place_of(norm)])

    def frozen_first_exact(self, norm: Norm) -> nn.Module:
        """A constant scale, the first token's own kept."""
        return FrozenScale(norm, self.scales[place_of(norm)], first_exact=True)


def rules(decoder: Decoder, norms: Norms, calibration: TokenBatch, texts: Sequence[TokenText], budget: Budget) -> Rules:
    """The replacements of the whole model; collects the constants that some of them need."""
    block, heads = (*norms.block_roles, FINAL), norms.head_roles
    everywhere = (*block, *heads)
    scales = median_rms(decoder, norms, calibration)
    found = Rules({}, scales)
    exact = pooled_statistics(decoder, norms, block, calibration)
    schedule = unpadded(texts)[: budget.batch_norm_passes]
    published = running_statistics(decoder, norms, block, schedule, budget.batch_norm_momentum)
    whole = {
        "rms_norm": Replacing(everywhere, RmsNorm),
        "rms_norm_eps_10": Replacing(everywhere, lambda norm: RmsNorm(norm, eps_factor=10)),
        "layer_norm": Replacing(block, LayerNorm),
        "layer_norm_all": Replacing(everywhere, LayerNorm),
    }
    if heads:
        whole["layer_norm_qk"] = Replacing(heads, LayerNorm)
    whole |= {f"layer_norm_at_{role}": Replacing((role,), LayerNorm) for role in block}
    for groups in _dividing(budget.groups, decoder.width):
        whole[f"group_norm_{groups}"] = Replacing(block, _grouped(JointGroupNorm, groups), joint=True)
    for groups in _dividing(budget.groups, decoder.width):
        if groups > 1:  # one group per token is layer norm
            whole[f"group_norm_{groups}_token"] = Replacing(block, _grouped(TokenGroupNorm, groups))
    whole |= {
        "batch_norm": Replacing(block, lambda norm: exact[place_of(norm)]),
        "batch_norm_published": Replacing(block, lambda norm: published[place_of(norm)]),
        "frozen_scale": Replacing(block, found.frozen),
        "frozen_scale_first_exact": Replacing(block, found.frozen_first_exact),
        "no_gain": Replacing(block, NoGain),
        "identity": Replacing(everywhere, Identity),
    }
    return Rules(whole, scales)


def _dividing(groups: Sequence[int], width: int) -> list[int]:
    return [count for count in groups if width % count == 0 and count < width]


def _grouped(kind: type[JointGroupNorm] | type[TokenGroupNorm], groups: int) -> Rule:
    return lambda norm: kind(norm, groups)


def measured(scorer: Scorer, rules: Rules) -> Variables:
    """Losses, leaks and growth of every replacement of the whole model, and losses without query and key norms."""
    norms = scorer.norms
    losses: dict[str, np.ndarray] = {}
    for done, (name, what) in enumerate(rules.whole.items()):
        if name == "layer_norm_all" and not norms.head_roles:
            losses[name] = losses["layer_norm"]  # there is nothing more to replace
        else:
            losses[name] = scorer.renormed(name, what.roles, what.rule, alone=what.joint)
        scorer.sweep.progress(done + 1, len(rules.whole), "replacements of the whole model")
    tried = scorer.sweep.shard("causality", lambda: _tried(scorer, rules))
    found = {
        "replacement_loss": variable(
            ("variant", "prompt"), np.stack(list(losses.values())), "nat/token", "loss with norms replaced everywhere"
        ),
        "causality_leak": variable(
            "variant", tried["leak"], "1", "largest change of a logit when later tokens of a text are exchanged"
        ),
        "residual_std_under_replacement": variable(
            ("variant", "layer"), tried["std"], "1", "standard deviation of all elements of one text after each layer"
        ),
    }
    if norms.head_roles:
        for name, rule, described in (
            ("qk_norm_removed_loss", Identity, "loss without query and key norms, their scale gone too"),
            ("qk_frozen_scale_loss", rules.frozen, "loss with a constant scale in query and key norms"),
        ):
            values = scorer.renormed(name, norms.head_roles, rule)
            found[name] = variable("prompt", values, "nat/token", described)
    return found


def _tried(scorer: Scorer, rules: Rules) -> Arrays:
    """Per variant: change of logits before a place when what follows it is exchanged; growth of the states."""
    decoder = scorer.decoder
    batches, place = _exchanged(scorer)
    leaks, spreads = [], []
    for what in rules.whole.values():
        changed = Renormed(decoder, scorer.norms, what.roles, what.rule)
        readable = changed.readable()
        states, logits = [], []
        # One after the other: within a batch, kernels may sum the rows of one text in another order than the next's.
        for batch in batches:
            with torch.no_grad():
                states = [state for _, state in walk(decoder, batch.to(decoder.device), changed.layer)]
                normed = readable.final_norm(states[-1])[:, : place + 1]
                logits.append(readable.unembedding.logits(normed, torch.float32))
        leaks.append(float((logits[0] - logits[1]).abs().max()))
        spreads.append([pooled(state[0])["std"] for state in states])
    return {"leak": _finite(leaks), "std": _finite(spreads)}


def _exchanged(scorer: Scorer) -> tuple[list[TokenBatch], int]:
    """One text with other tokens after a place, and as it is; and that place."""
    ids = scorer.sample.texts[0].ids[-scorer.budget.leak_tokens :]
    place = len(ids) // 2
    # The text's own tokens in another order: nothing that the model has not seen.
    other = ids[: place + 1] + ids[:place:-1]
    if other == ids:
        other = ids[: place + 1] + (ids[0],) * (len(ids) - place - 1)
    return unpadded([TokenText(other, ()), TokenText(ids, ())]), place


def _finite(values: Sequence[float] | Sequence[Sequence[float]]) -> np.ndarray:
    found = np.array(values, dtype=float)
    found[~np.isfinite(found)] = np.nan
    return found
