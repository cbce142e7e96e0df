"""The local half of T-7: every layer's response to small moves of its input, beside its exact derivative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from lab.corpora.batches import TokenBatch, TokenText, token_batches
from lab.experiments.layers.linearization_gap import EPS, Budget
from lab.records import variable
from lab.residual.executor import Executor
from lab.residual.local_linearity import (
    LocalReadings,
    Tokens,
    log_log_fit,
    power_iteration_gain,
    rounded_gaps,
    spectral_norm,
)
from lab.residual.replay import LayerReplay
from lab.residual.sweeps import Sample
from lab.statistics.jackknife import pair_mean_pseudovalues
from lab.store import Arrays, Sweep
from lab.subjects.anatomy import Decoder
from lab.subjects.calls import Captured

SEED = 20260707
Variables = dict[str, xr.Variable]


@dataclass(frozen=True)
class Batch:
    """Some texts on their way through the layers.

    Attributes:
        texts: index of each row in the sample.
        captured, states: call arguments, and the residual stream before every layer, each [B, T, d].
        row, position: of the scored tokens' own positions, where their states are moved and read.
        alone: call arguments of the scored tokens without their context, as published.
        place: position of each scored token among those.
    """

    texts: tuple[int, ...]
    captured: Captured
    states: tuple[Tensor, ...]
    row: Tensor
    position: Tensor
    alone: Captured
    place: Tensor

    def tokens(self, layer: int) -> Tokens:
        """The scored tokens in their full context."""
        return Tokens(self.states[layer], self.row, self.position)

    def lone_tokens(self, layer: int) -> Tokens:
        """The scored tokens of each text as if nothing stood before them."""
        full = self.states[layer]
        cut = full.new_zeros((len(self.texts), self.alone.entry.shape[1], full.shape[-1]))
        cut[self.row, self.place] = full[self.row, self.position]
        return Tokens(cut, self.row, self.place)


def measured(
    executor: Executor, sample: Sample, principal: np.ndarray, layers: Sequence[int], budget: Budget, sweep: Sweep
) -> Variables:
    """The local variables.

    Args:
        executor: of the subject.
        sample: texts whose scored tokens are moved and read.
        principal: leading principal directions of every layer's input [L, TOP, d].
        layers: where singular values are iterated.
        budget: see there.
        sweep: keeps one shard per layer.
    """
    batches = _batches(executor, sample.texts, budget)
    first = sample.texts[: budget.iterated_prompts]
    few = _batches(executor, first, budget)
    n_layers = executor.decoder.n_layers
    parts: list[Arrays] = []
    for layer in range(n_layers):
        leading = torch.from_numpy(principal[layer])
        compute = partial(_layer, executor.decoder, batches, few if layer in layers else [], layer, leading, budget)
        parts.append(sweep.shard(f"local linearity, layer {layer}", compute))
        sweep.progress(layer + 1, n_layers, "layers differentiated")
    like = {name: values for part in parts for name, values in part.items()}
    # A hybrid's layers may differ in kind: those without two branches have no branch gaps.
    found = {
        name: np.stack([part.get(name, np.full_like(values, np.nan)) for part in parts])
        for name, values in like.items()
    }
    return _variables(found, sample, budget)


def _batches(executor: Executor, texts: Sequence[TokenText], budget: Budget) -> list[Batch]:
    return [_batch(executor, batch) for batch in token_batches(texts, budget.batch_tokens)]


def _batch(executor: Executor, batch: TokenBatch) -> Batch:
    batch = batch.to(executor.decoder.device)
    states = tuple(state for _, state in executor.trace(batch))[:-1]
    row, position = batch.scored.row, batch.scored.position + 1  # the token itself, not the one that predicts it
    place = torch.cat([torch.arange(int(count), device=row.device) for count in torch.bincount(row)])
    alone = batch.ids.new_zeros((len(batch.texts), int(place.max()) + 1))
    alone[row, place] = batch.ids[row, position]
    decoder = executor.decoder
    return Batch(batch.texts, decoder.capture(batch.ids), states, row, position, decoder.capture(alone), place)


def _layer(
    decoder: Decoder, batches: Sequence[Batch], few: Sequence[Batch], layer: int, principal: Tensor, budget: Budget
) -> Arrays:
    """Readings of one layer, means per prompt [..., prompt]; `few` holds the texts to iterate on, or none."""
    replay = LayerReplay(decoder.layers[layer], layer, batches[0].captured)
    rounded = LayerReplay(decoder.layers[layer], layer, batches[0].alone, decoder.dtype)
    parts = []
    for number, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(SEED + 1000 * layer + number)
        part = _readings(replay.on(batch.captured), batch, layer, principal, budget, generator)
        units = batch.lone_tokens(layer).random(budget.rounded_directions, generator)
        for name, values in rounded_gaps(rounded.on(batch.alone), batch.lone_tokens(layer), budget.eps, units).items():
            part[f"rounded_{name}"] = _per_prompt(values, batch)
        part["text"] = np.array(batch.texts)
        parts.append(part)
    joined = _joined(parts)
    joined |= _consistency(joined.pop("unit_sum"), joined.pop("slope_sum"), joined.pop("count"))
    joined |= _iterated(replay, few, layer, budget)
    return joined


def _readings(
    replay: LayerReplay, batch: Batch, layer: int, principal: Tensor, budget: Budget, generator: torch.Generator
) -> Arrays:
    tokens = batch.tokens(layer)
    # The same directions in every batch: consistency compares prompts.
    same = torch.Generator().manual_seed(SEED - 1 - layer)
    leading = principal[np.linspace(0, len(principal) - 1, budget.principal).round().astype(int)]
    units = {
        "independent": tokens.random(budget.directions, generator),
        "shared": tokens.random(budget.directions, same, shared=True),
        "principal": leading[:, None].to(tokens.states.device).expand(-1, len(tokens.row), -1),
    }
    readings = LocalReadings(replay, tokens, units)
    by_eps = [readings.gaps("independent", eps) for eps in budget.eps]
    found = {name: torch.stack([gaps[name] for gaps in by_eps]) for name in by_eps[0]}
    found |= {"even": readings.even_gap(EPS)} | readings.gains() | readings.sizes()
    found |= {kind: readings.gaps(kind, EPS)["update"] for kind in ("shared", "principal")}
    return {name: _per_prompt(values, batch) for name, values in found.items()} | _sums(readings, batch)


def _per_prompt(values: Tensor, batch: Batch) -> np.ndarray:
    """Means over each prompt's tokens [..., B] of values [..., m]."""
    sums = values.new_zeros((*values.shape[:-1], len(batch.texts)), dtype=torch.float64)
    sums.index_add_(-1, batch.row, values.double())
    means: np.ndarray = (sums / torch.bincount(batch.row)).cpu().numpy()
    return means


def _sums(readings: LocalReadings, batch: Batch) -> Arrays:
    """Per prompt the sums of J u over tokens, raw and at unit length [direction, d, B], and the tokens' count."""
    slopes = readings.slopes["shared"].update
    units = slopes / slopes.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(slopes.dtype).tiny)
    sums = {}
    for name, values in (("slope_sum", slopes), ("unit_sum", units)):
        total = values.new_zeros((len(values), len(batch.texts), values.shape[-1]))
        sums[name] = total.index_add_(1, batch.row, values).transpose(1, 2).double().cpu().numpy()
    return sums | {"count": torch.bincount(batch.row).cpu().numpy()}


def _joined(parts: Sequence[Arrays]) -> Arrays:
    # Batches are sorted by length, the sample by prompt.
    order = np.argsort(np.concatenate([part.pop("text") for part in parts]))
    return {name: np.concatenate([part[name] for part in parts], axis=-1)[..., order] for name in parts[0]}


def _consistency(unit_sum: np.ndarray, slope_sum: np.ndarray, count: np.ndarray) -> Arrays:
    """How alike J u is in different inputs, for directions that all tokens share; one value per prompt.

    Over pairs of prompts k, l, and averaged over directions: the cosine of the token means of J u (published), and
    the mean cosine over pairs of their tokens, which sums of unit vectors give exactly:
    sum_ij cos(a_i, b_j) = (sum_i a_i) . (sum_j b_j). Within a prompt, over pairs of different tokens.
    """
    products = np.einsum("kdi,kdj->ij", unit_sum, unit_sum) / len(unit_sum)
    means = slope_sum / np.linalg.norm(slope_sum, axis=1, keepdims=True)
    within = (np.diagonal(products) - count) / np.where(count > 1, count * (count - 1), np.nan)
    averaged = np.einsum("kdi,kdj->ij", means, means) / len(means)
    return {
        "consistency": pair_mean_pseudovalues(averaged),
        "consistency_token": pair_mean_pseudovalues(products / np.outer(count, count)),
        "consistency_within": np.where(np.isnan(within), np.nanmean(within), within),
    }


def _iterated(replay: LayerReplay, batches: Sequence[Batch], layer: int, budget: Budget) -> Arrays:
    """Gains of each prompt's tokens, and the norm at its last one [prompt]; NaN where the layer is not iterated."""
    found = {name: np.full(budget.iterated_prompts, np.nan) for name in ITERATED}
    generator = torch.Generator().manual_seed(SEED + layer)
    for batch in batches:
        here, tokens = replay.on(batch.captured), batch.tokens(layer)
        gains = power_iteration_gain(here, tokens, tokens.random(1, generator), budget.power_steps)
        found["power_iteration_gain"][list(batch.texts)] = _per_prompt(gains, batch)
        last = torch.stack([batch.position[batch.row == row].max() for row in range(len(batch.texts))])
        start = torch.randn(len(last), tokens.states.shape[-1], generator=generator).to(tokens.states.device)
        norms = spectral_norm(here.blocks(tokens.states, last), start, budget.spectral_steps)
        found["spectral_norm"][list(batch.texts)] = norms.cpu().numpy()
    return found


PER_PROMPT = ("layer", "prompt")
BY_EPS = ("layer", "eps", "prompt")
#: reading -> name in the record, dimensions, unit, description
READINGS: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "update": ("perturbation_gap_by_eps", BY_EPS, "1", "|D+ - J d| / |D+|, exact J d, float32, random directions"),
    "attention": ("attention_gap_by_eps", BY_EPS, "1", "the same of the attention branch"),
    "mlp": ("mlp_gap_by_eps", BY_EPS, "1", "the same of the MLP branch as a function of the layer's input"),
    "rounded_update": (
        "bfloat16_perturbation_gap_by_eps",
        BY_EPS,
        "1",
        "published form: even part over response, in the model's dtype, completion tokens alone",
    ),
    "rounded_attention": ("bfloat16_attention_gap_by_eps", BY_EPS, "1", "the same of the attention branch"),
    "rounded_mlp": ("bfloat16_mlp_gap_by_eps", BY_EPS, "1", "the same of the MLP branch"),
    "even": ("even_gap", PER_PROMPT, "1", "published form at eps 0.05, in float32 and full context"),
    "shared": ("shared_direction_gap", PER_PROMPT, "1", "gap along random directions that all tokens share"),
    "principal": ("on_manifold_gap", PER_PROMPT, "1", "gap along principal directions of the layer's input"),
    "mean_amplification": ("mean_amplification", PER_PROMPT, "1", "mean |J u| over random unit directions"),
    "layer_gain_squared": ("layer_gain_squared", PER_PROMPT, "1", "mean |(I + J) u|^2 over random unit directions"),
    "direction_kept": ("direction_kept", PER_PROMPT, "1", "mean cosine of (I + J) u with u"),
    "input_norm": ("input_norm", PER_PROMPT, "norm", "mean norm of the layer's input"),
    "update_norm": ("update_norm", PER_PROMPT, "norm", "mean norm of the layer's update"),
    "scale_response": (
        "scale_response",
        PER_PROMPT,
        "1",
        "|J x| / |g|: 0 if the update ignores the scale of its input",
    ),
    "homogeneity_gap": ("homogeneity_gap", PER_PROMPT, "1", "|g - J x| / |g|: 1 if it ignores it, 0 if g is linear"),
    "order": ("nonlinearity_order", PER_PROMPT, "1", "1 + slope of ln gap on ln eps, float32"),
    "order_r2": ("nonlinearity_order_r2", PER_PROMPT, "1", "squared correlation of that fit"),
    "rounded_order": ("bfloat16_nonlinearity_order", PER_PROMPT, "1", "the same fit to the published form of the gap"),
    "rounded_order_r2": ("bfloat16_nonlinearity_order_r2", PER_PROMPT, "1", "squared correlation of that fit"),
    "consistency": ("jacobian_consistency", PER_PROMPT, "1", "cosine of the token means of J u of two prompts"),
    "consistency_token": ("jacobian_consistency_token", PER_PROMPT, "1", "cosine of J u at tokens of two prompts"),
    "consistency_within": ("jacobian_consistency_within", PER_PROMPT, "1", "cosine of J u at two tokens of a prompt"),
}
ITERATED = {
    "power_iteration_gain": "|J v| after power iteration on J alone, all tokens together, as published",
    "spectral_norm": "largest singular value of the last token's own Jacobian block",
}
#: one number per prompt however many tokens it has; pseudo-values of a mean over pairs of prompts
EQUALLY_WEIGHTED = ("consistency", "consistency_token", "consistency_within")


def _variables(found: Arrays, sample: Sample, budget: Budget) -> Variables:
    for prefix in ("", "rounded_"):
        gaps = np.moveaxis(found[f"{prefix}update"], 1, 0)
        found[f"{prefix}order"], found[f"{prefix}order_r2"] = log_log_fit(budget.eps, gaps)
    variables = {
        "analysed_tokens": variable("prompt", sample.scored_tokens, "token", "tokens moved and read"),
        "prompt_weight": variable("prompt", np.ones(len(sample.texts)), "1", "equal weights of the prompts"),
    }
    for key, (name, dims, unit, description) in READINGS.items():
        if key in found:
            weights = {"weights": "prompt_weight"} if key in EQUALLY_WEIGHTED else {}
            variables[name] = variable(dims, found[key], unit, description, **weights)
    for name, description in ITERATED.items():
        variables[name] = variable(("layer", "iterated_prompt"), found[name], "1", description)
    return variables
