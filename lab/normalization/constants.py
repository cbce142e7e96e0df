"""Constants that stand in for a norm's per-token statistics, collected on texts that are not scored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lab.corpora.batches import TokenBatch
from lab.normalization.replacements import Calibrating, FixedStatistics
from lab.normalization.sites import Norm, Norms
from lab.normalization.surgery import real_positions, tapped, walk, with_modules
from lab.subjects.anatomy import Decoder

#: (layer, role); the final norm has the number of layers as its layer
Place = tuple[int, str]


def place_of(norm: Norm) -> Place:
    """Where a norm stands."""
    return norm.layer, norm.role


def later_tokens(x: Tensor, real: Tensor, token_axis: int) -> Tensor:
    """Vectors [n, d] of all real positions but the first, of x with tokens along an axis.

    Args:
        x: [B, T, d], or with an axis of heads before or behind that of the tokens.
        real: [B, T].
        token_axis: axis of x along which the T tokens lie.
    """
    later = real.clone()
    later[:, 0] = False
    return x.movedim(token_axis, 1)[later].flatten(0, -2)


@torch.no_grad()
def median_rms(decoder: Decoder, norms: Norms, batch: TokenBatch) -> dict[Place, float]:
    """Median over tokens, the first of each text left out, of the root mean square at every norm of the intact model.

    At query and key norms the median is over head vectors.
    """
    batch = batch.to(decoder.device)
    real, found = real_positions(batch), {}

    def median(norm: Norm, given: Tensor) -> float:
        vectors = later_tokens(given.float(), real, norm.token_axis)
        return float(vectors.square().mean(-1).sqrt().median())

    def layer_of(index: int) -> nn.Module:
        def sink(role: str, given: Tensor, _: Tensor) -> None:
            found[index, role] = median(norms.layers[index][role], given)

        return tapped(decoder, norms, index, sink)

    *_, (_, state) = walk(decoder, batch, layer_of)
    found[place_of(norms.final)] = median(norms.final, state)
    return found


@torch.no_grad()
def pooled_statistics(
    decoder: Decoder, norms: Norms, roles: Sequence[str], batch: TokenBatch
) -> dict[Place, FixedStatistics]:
    """Batch norms with the exact mean and variance of every channel over the batch's tokens.

    Collected norm by norm in the already replaced model, so that each sees the inputs that it will have.
    """
    return _collected(decoder, norms, roles, [batch], momentum=1.0)


@torch.no_grad()
def running_statistics(
    decoder: Decoder, norms: Norms, roles: Sequence[str], batches: Sequence[TokenBatch], momentum: float
) -> dict[Place, FixedStatistics]:
    """Batch norms after one pass in training mode over each of some texts, from mean 0 and variance 1.

    After k passes a share of (1 - momentum)^k of every statistic is still what it began with.
    """
    return _collected(decoder, norms, roles, batches, momentum)


def _collected(
    decoder: Decoder, norms: Norms, roles: Sequence[str], batches: Sequence[TokenBatch], momentum: float
) -> dict[Place, FixedStatistics]:
    kept: dict[Place, Calibrating] = {}

    def collecting(norm: Norm, real: Tensor) -> Calibrating:
        before = kept.get(place_of(norm))
        mean, variance = (before.mean, before.variance) if before else (None, None)
        kept[place_of(norm)] = Calibrating(norm, real, momentum=momentum, mean=mean, variance=variance)
        return kept[place_of(norm)]

    for batch in batches:
        batch = batch.to(decoder.device)
        real = real_positions(batch)

        def layer_of(index: int, real: Tensor = real) -> nn.Module:
            own = norms.layers[index]
            others = {own[role].path: collecting(own[role], real) for role in roles if role in own}
            return with_modules(decoder.layers[index], others)

        *_, (_, state) = walk(decoder, batch, layer_of)
        if norms.final.role in roles:
            collecting(norms.final, real)(state)
    return {place: module.fixed() for place, module in kept.items()}
