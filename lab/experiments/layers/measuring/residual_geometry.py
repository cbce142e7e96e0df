"""How T-4 measures: once batch by batch for what single tokens say, once depth by depth for the clouds of all tokens.

Angles with the final state need one token's states at every depth: the states of one batch are kept, for a moment. The
shape of a cloud needs all tokens at one depth: all batches advance together, one layer at a time. So neither pass
holds all tokens at all depths; the price is a second forward pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from lab.corpora.batches import TokenBatch, TokenText, token_batches
from lab.corpora.corpus import Corpus, Text, token_text
from lab.errors import UserError
from lab.experiments.layers.measuring.residual_geometry_variables import GAPS, RECORDED
from lab.experiments.layers.residual_geometry import EMBEDDING, Budget
from lab.memory import keep_freed_memory
from lab.records import variable
from lab.residual.executor import Executor
from lab.residual.scatter import deflated, principal_directions, prompt_sums, scatter_products, scatters
from lab.statistics.category_cosines import largest_gap_p_value, memberships
from lab.statistics.geometry_figures import CENTRINGS, GUARD, WEIGHTINGS
from lab.store import Arrays, Sweep
from lab.subjects.loading import LoadedSubject

#: leading eigenvalues that enter the spectral flatness that can be compared between sites and models
FLATNESS_RANK = 256


@dataclass(frozen=True)
class Tokens:
    """The tokens that are measured.

    Attributes:
        texts: of the corpus, in its order.
        batched: their token ids.
        positions: per text, indices of the tokens whose states are read.
    """

    texts: tuple[Text, ...]
    batched: tuple[TokenText, ...]
    positions: tuple[tuple[int, ...], ...]

    @cached_property
    def counts(self) -> list[int]:
        """Tokens per prompt [R]."""
        return list(map(len, self.positions))

    def of_batch(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Row and position of each measured token of a batch, ordered by row."""
        places = [(row, position) for row, text in enumerate(batch.texts) for position in self.positions[text]]
        row, position = torch.tensor(places, dtype=torch.int64, device=batch.ids.device).unbind(1)
        return row, position

    def order(self, batches: Sequence[TokenBatch]) -> Tensor:
        """Where the tokens of all batches, one batch after the other, stand when they are ordered by prompt [N]."""
        text = np.concatenate([np.repeat(batch.texts, [self.counts[t] for t in batch.texts]) for batch in batches])
        return torch.from_numpy(np.argsort(text, kind="stable"))


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """See `lab.experiments.layers.residual_geometry.measure`."""
    tokens = chosen_tokens(corpus, budget)
    executor = Executor(subject.decoder)
    if subject.device.type == "cpu":
        keep_freed_memory()
    batches = [batch.to(subject.device) for batch in token_batches(tokens.batched, budget.batch_tokens)]
    found = _token_arrays(executor, tokens, batches, sweep)
    found |= _cloud_arrays(executor, tokens, batches, sweep, budget.outlier_factor)
    return _dataset(subject, tokens, found)


def chosen_tokens(corpus: Corpus, budget: Budget) -> Tokens:
    """Texts of the corpus and the tokens of them that a budget asks for; texts without any are left out."""
    kept = []
    for text in corpus.texts[: budget.prompts]:
        scored = token_text(text, max_tokens=budget.tokens, score_repeated=budget.score_repeated)
        everything = tuple(range(len(scored.ids)))
        positions = {"completion": scored.targets, "all": everything, "all_but_first": everything[1:]}[budget.positions]
        if positions:
            kept.append((text, scored, positions))
    if sum(len(positions) for _, _, positions in kept) < 2:
        remedy = f"make it again with python -m lab complete {corpus.subject}"
        raise UserError(f"the corpus of {corpus.subject} has fewer than two tokens to measure; {remedy}")
    texts, scored_texts, of_texts = zip(*kept, strict=True)
    return Tokens(texts, scored_texts, of_texts)


# ---- batch by batch: single tokens


def _token_arrays(executor: Executor, tokens: Tokens, batches: Sequence[TokenBatch], sweep: Sweep) -> Arrays:
    """Means over the tokens of each prompt, per site or layer [..., R], and each prompt's mean updates [L, R, d]."""
    found: Arrays = {}
    for index, batch in enumerate(batches):
        arrays = sweep.shard(f"tokens of batch {index}", partial(_of_batch, executor, tokens, batch))
        for name, values in arrays.items():
            axis = 1 if name == "update_mean" else -1
            shape = list(values.shape)
            shape[axis] = len(tokens.texts)
            target = np.moveaxis(found.setdefault(name, np.full(shape, np.nan)), axis, 0)
            target[list(batch.texts)] = np.moveaxis(values, axis, 0)
        sweep.progress(index + 1, len(batches), "batches, token by token")
    _require_finite(found["norm"], tokens)
    return found


def _of_batch(executor: Executor, tokens: Tokens, batch: TokenBatch) -> Arrays:
    row, position = tokens.of_batch(batch)
    # Texts without their padding, all depths of this batch only.
    states = [state[row, position].double() for _, state in executor.trace(batch)]
    counts = [tokens.counts[text] for text in batch.texts]
    per_token = _site_scalars(states) | _layer_scalars(states)
    means = {name: _prompt_means(values, counts) for name, values in per_token.items()}
    norms = torch.stack([state.norm(dim=1) for state in states])
    parts = torch.split(norms, counts, dim=1)
    updates = [after - before for before, after in pairwise(states)]
    mean_updates = torch.stack([prompt_sums(update, counts) for update in updates])
    mean_updates /= torch.tensor(counts, device=mean_updates.device)[None, :, None]
    return means | {
        "norm_min": torch.stack([part.min(1).values for part in parts], 1).cpu().numpy(),
        "norm_max": torch.stack([part.max(1).values for part in parts], 1).cpu().numpy(),
        "update_mean": mean_updates.float().cpu().numpy(),
        "drift_cosine": _drift(states, counts),
    }


def _site_scalars(states: Sequence[Tensor]) -> dict[str, Tensor]:
    """Per site and token [S, n]."""
    embedding, final = states[0], states[-1]
    final_norm = final.norm(dim=1)
    contributions = [embedding] + [after - before for before, after in pairwise(states)]
    norm = torch.stack([state.norm(dim=1) for state in states])
    projection = torch.stack([(part * final).sum(1) / (final_norm + GUARD) for part in contributions])
    return {
        "norm": norm,
        "norm_square": norm.square(),
        "cosine_to_embedding": torch.stack([_cosine(state, embedding) for state in states]),
        "cosine_to_final": torch.stack([_cosine(state, final) for state in states]),
        "final_projection_signed": projection,
        "final_projection_signed_square": projection.square(),
        "final_norm_fraction": projection / (final_norm + GUARD),
    }


def _layer_scalars(states: Sequence[Tensor]) -> dict[str, Tensor]:
    """Per layer and token [L, n]."""
    final = states[-1]
    found: dict[str, list[Tensor]] = {}
    for before, after in pairwise(states):
        update = after - before
        towards_final = _cosine(update, final)
        values = {
            "update_norm": update.norm(dim=1),
            "cosine_input_output": _cosine(after, before),
            "update_ratio": update.norm(dim=1) / (after.norm(dim=1) + GUARD),
            "update_alignment": _cosine(update, before),
        }
        values |= {f"{name}_square": value.square() for name, value in values.items()}
        values |= {"update_cosine_to_final": towards_final, "update_projection_fraction": towards_final.abs()}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in found.items()}


def _drift(states: Sequence[Tensor], counts: Sequence[int]) -> np.ndarray:
    """Mean cosine of the states after layers l and l - k [gap, L, R]; NaN for l < k. The embedding is never used."""
    layers = len(states) - 1
    drift = np.full((len(GAPS), layers, len(counts)), np.nan)
    for index, gap in enumerate(GAPS):
        for layer in range(gap, layers):
            cosine = _cosine(states[layer + 1], states[layer + 1 - gap])
            drift[index, layer] = _prompt_means(cosine[None], counts)[0]
    return drift


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    cosine: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + GUARD)
    return cosine


def _prompt_means(values: Tensor, counts: Sequence[int]) -> np.ndarray:
    """Means over the tokens of each prompt [..., R] of values [..., n] ordered by prompt."""
    means: np.ndarray = (
        torch.stack([part.mean(-1) for part in torch.split(values, list(counts), dim=-1)], -1).cpu().numpy()
    )
    return means


def _require_finite(norms: np.ndarray, tokens: Tokens) -> None:
    bad = np.argwhere(~np.isfinite(norms))
    if len(bad):
        site, prompt = bad[0]
        raise UserError(
            f"residual geometry: the state at site {site + EMBEDDING} of prompt {tokens.texts[prompt].id} is not "
            "finite; check the weights, or measure with --dtype float32"
        )


# ---- depth by depth: clouds of all tokens


def _cloud_arrays(
    executor: Executor, tokens: Tokens, batches: Sequence[TokenBatch], sweep: Sweep, factor: float
) -> Arrays:
    """What is kept of the cloud at every site, stacked over sites."""
    sites = executor.decoder.n_layers + 1
    parts = []
    for site, rows in enumerate(_clouds(executor, tokens, batches)):
        parts.append(sweep.shard(f"cloud at site {site}", partial(cloud, rows, tokens.counts, factor)))
        sweep.progress(site + 1, sites, "depths, all tokens")
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def _clouds(executor: Executor, tokens: Tokens, batches: Sequence[TokenBatch]) -> Iterator[Tensor]:
    """States of all measured tokens [N, d], ordered by prompt, float64: the embedding, then after each layer."""
    places = [tokens.of_batch(batch) for batch in batches]
    order = tokens.order(batches).to(executor.decoder.device)
    for depth in zip(*(executor.trace(batch) for batch in batches), strict=True):
        rows = [state[row, position] for (_, state), (row, position) in zip(depth, places, strict=True)]
        yield torch.cat(rows)[order].double()


def cloud(rows: Tensor, counts: Sequence[int], factor: float) -> Arrays:
    """What is kept of one cloud of states, about its own centre: enough to resample its prompts.

    The centre is the mean of all tokens; resampled prompts do not move it. Its own error adds a direction that
    holds about 1 / N of the variance, times the design effect of the prompts.

    Args:
        rows: states [N, d], ordered by prompt, float64.
        counts: tokens of each prompt [R].
        factor: a token is an outlier if its norm is more than this many times the median norm.
    """
    norms = rows.norm(dim=1, keepdim=True)
    centred = rows - rows.mean(0)
    unit = rows / (norms + GUARD)
    centred_unit = centred / (centred.norm(dim=1, keepdim=True) + GUARD)
    vectors = principal_directions(centred)
    outlier = (norms > factor * norms.median())[:, 0]
    found = _weightings(rows, unit, counts, vectors, ~outlier)
    found |= {
        "cosine_sum": torch.stack([_sum_products(cosines, counts) for cosines in (unit, centred_unit)]),
        "cosine_square_sum": torch.stack([scatter_products(cosines, counts) for cosines in (unit, centred_unit)]),
        "state_product": _sum_products(rows, counts),
        "direction_scatter": prompt_sums((centred @ vectors).square(), counts).T,
        "outlier_tokens": prompt_sums(outlier.double(), counts),
        "norm_median": norms.median(),
    }
    return {name: values.cpu().numpy() for name, values in found.items()}


def _weightings(
    rows: Tensor, unit: Tensor, counts: Sequence[int], vectors: Tensor, ordinary: Tensor
) -> dict[str, Tensor]:
    """Inner products [weighting, R, R] and traces [weighting, R] of the prompts' scatter matrices."""
    centred = rows - rows.mean(0)
    raw = scatter_products(centred, counts), scatters(centred, counts)
    pairs = {"raw": raw}
    for removed in (1, 2):
        pairs[f"without_top{removed}"] = deflated(*raw, centred, counts, vectors[:, :removed])
    spread = unit - unit.mean(0)
    pairs["unit"] = scatter_products(spread, counts), scatters(spread, counts)
    if bool(ordinary.all()):
        pairs["trimmed"] = raw
    else:
        left = [int(part.sum()) for part in torch.split(ordinary, list(counts))]
        rest = rows[ordinary] - rows[ordinary].mean(0)
        pairs["trimmed"] = scatter_products(rest, left), scatters(rest, left)
    products, traces = zip(*(pairs[weighting] for weighting in WEIGHTINGS), strict=True)
    return {"scatter_product": torch.stack(products), "scatter": torch.stack(traces)}


def _sum_products(rows: Tensor, counts: Sequence[int]) -> Tensor:
    sums = prompt_sums(rows, counts)
    return sums @ sums.T


# ---- the record


def _dataset(subject: LoadedSubject, tokens: Tokens, found: Arrays) -> xr.Dataset:
    categories = np.array([text.category for text in tokens.texts])
    counts = np.array(tokens.counts)
    p_value = largest_gap_p_value(found["cosine_sum"][:, 0], counts, memberships(categories))
    found |= {"scored_tokens": counts, "category_gap_p_value": np.array(p_value)}
    found["flatness_rank"] = np.array(min(FLATNESS_RANK, subject.decoder.width, max(1, sum(tokens.counts) // 4)))
    layers = subject.decoder.n_layers
    coords = {
        "site": np.arange(layers + 1) + EMBEDDING,
        "layer": np.arange(layers),
        "gap": list(GAPS),
        "weighting": list(WEIGHTINGS),
        "centring": list(CENTRINGS),
        "prompt_id": ("prompt", [text.id for text in tokens.texts]),
        "category": ("prompt", categories.tolist()),
    }
    variables = {name: variable(dims, found[name], unit, says) for name, (dims, unit, says) in RECORDED.items()}
    settings = {"hidden_size": subject.decoder.width}
    return xr.Dataset(variables, coords, {"settings": json.dumps(settings)})
