"""Figures of a logit lens: profiles over depth, from the readings of single tokens.

Every figure is a mean, median or count over all tokens, as the source takes them. Figures of resampled
prompts are the figures of the tokens of the drawn prompts, so medians and ratios resample correctly too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from lab.corpora.token_classes import TOKEN_TYPES
from lab.records import variable
from lab.statistics.correlations import spearman
from lab.statistics.rank_paths import EMBEDDING, below_from, first_below, hurt

#: A lens this sure of its top token would let the token leave the network here.
CONFIDENT = 0.9
SURPRISAL_BINS = 10

Variables = dict[str, xr.Variable]


@dataclass(frozen=True)
class Tokens:
    """Readings of N tokens at S slots, as plain arrays; a token of a prompt drawn twice stands in them twice.

    Numbers are rare and may have been read more often than others: `sample` stands for the text as it is,
    all tokens only within one class.
    """

    data: xr.Dataset
    index: np.ndarray

    @cached_property
    def sample(self) -> Tokens:
        """The tokens read at regular steps, whatever their class."""
        return Tokens(self.data, self.index[self["in_sample"] > 0])

    def __getitem__(self, name: str) -> np.ndarray:
        """A variable, [..., N]."""
        values: np.ndarray = self.data[name].values[..., self.index]
        return values

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def members(self) -> np.ndarray:
        """Membership in each token class [type, N], 0 or 1, float64."""
        members: np.ndarray = (self["token_type"] == np.arange(len(TOKEN_TYPES))[:, None]).astype(float)
        return members

    @cached_property
    def categories(self) -> np.ndarray:
        """Membership in each prompt category [category, N], 0 or 1, float64."""
        of_prompt = self.data["category"].values == categories(self.data)[:, None]
        members: np.ndarray = of_prompt[:, self["token_prompt"]].astype(float)
        return members


def categories(tokens: xr.Dataset) -> np.ndarray:
    """Prompt categories of a token table, in the order of their first prompts."""
    return np.array(list(dict.fromkeys(tokens["category"].values.tolist())))


def lens_figures(tokens: xr.Dataset, prompts: np.ndarray | None = None) -> xr.Dataset:
    """Figures of the tokens of some prompts.

    Args:
        tokens: a measured record: readings [slot, token] with the tokens ordered by prompt, see
            `lab.experiments.layers.logit_lens.measure`.
        prompts: indices of the prompts, repetitions allowed; None takes each once.
    """
    drawn = Tokens(tokens, _tokens_of(tokens["scored_tokens"].values, prompts))
    chosen = tokens["category"].values if prompts is None else tokens["category"].values[prompts]
    found = _sound_figures(drawn) | _category_figures(drawn, chosen)
    found |= {f"bfloat16_{name}": figure for name, figure in _published_figures(drawn).items()}
    slots = tokens["rank"].sizes["slot"]
    coords = {
        "slot": np.arange(slots) + EMBEDDING,
        "layer": np.arange(slots - 1),
        "token_type": list(TOKEN_TYPES),
        "category": categories(tokens),
    }
    return xr.Dataset(found, coords)


def _tokens_of(counts: np.ndarray, prompts: np.ndarray | None) -> np.ndarray:
    if prompts is None:
        return np.arange(counts.sum())
    starts = np.cumsum(counts) - counts
    return np.concatenate([np.arange(starts[prompt], starts[prompt] + counts[prompt]) for prompt in prompts])


def _sound_figures(tokens: Tokens) -> Variables:
    """Figures of the float32 head with mid-ranks."""
    sample = tokens.sample
    ranks = sample["rank"]
    return (
        _reading_figures(ranks, sample["target_log_probability"], sample["entropy"])
        | _path_figures(ranks)
        | _distribution_figures(ranks, sample)
        | _type_figures(tokens["rank"], tokens)
        | _surprisal_figures(tokens)
    )


def _published_figures(tokens: Tokens) -> Variables:
    """Figures of bfloat16 logits with all ties resolved in favour of the target, as published."""
    sample = tokens.sample
    ranks = sample["bfloat16_rank"]
    tied = (sample["bfloat16_ties"] > 0).mean(axis=1)
    return (
        _reading_figures(ranks, sample["bfloat16_target_log_probability"], sample["bfloat16_entropy"])
        | _path_figures(ranks)
        | _type_figures(tokens["bfloat16_rank"], tokens)
        | _figures("slot", {"lens_tied_fraction": (tied, "fraction", "tokens whose target's logit others share")})
    )


def _figures(dims: str | tuple[str, ...], found: Mapping[str, tuple[Any, str, str]]) -> Variables:
    return {name: variable(dims, values, unit, description) for name, (values, unit, description) in found.items()}


def _reading_figures(ranks: np.ndarray, log_probability: np.ndarray, entropy: np.ndarray) -> Variables:
    probability = np.exp(log_probability).mean(axis=1, dtype=np.float64)
    found = {
        "lens_mean_rank": (ranks.mean(axis=1, dtype=np.float64), "rank", "mean rank of the target"),
        "lens_median_rank": (np.median(ranks, axis=1), "rank", "median rank of the target"),
        "lens_log_rank": (_log_rank(ranks).mean(axis=1), "1", "mean log10(1 + rank) of the target"),
        "lens_top1_accuracy": ((ranks < 1).mean(axis=1), "fraction", "tokens with target rank < 1"),
        "lens_top5_accuracy": ((ranks < 5).mean(axis=1), "fraction", "tokens with target rank < 5"),
        "lens_top10_accuracy": ((ranks < 10).mean(axis=1), "fraction", "tokens with target rank < 10"),
        "lens_target_probability": (probability, "probability", "arithmetic mean of the target's probability"),
        "lens_entropy": (entropy.mean(axis=1, dtype=np.float64), "nat", "mean entropy of the lens distribution"),
    }
    return _figures("slot", found)


def _log_rank(ranks: np.ndarray) -> np.ndarray:
    return np.log10(1 + ranks.astype(np.float64))


def _path_figures(ranks: np.ndarray) -> Variables:
    return _hurt_figures(ranks) | _crystallization_figures(ranks)


def _hurt_figures(ranks: np.ndarray) -> Variables:
    harmed, eligible = (mask.sum(axis=1) for mask in hurt(ranks))
    tokens = ranks.shape[1]
    found = {
        "hurt_count": (harmed, "token", "tokens whose rank rises at the layer and was below 100 before it"),
        "hurt_fraction": (harmed / tokens, "fraction", "hurt tokens / all tokens"),
        "eligible_fraction": (eligible / tokens, "fraction", "tokens of rank below 100 before the layer"),
        "conditional_hurt_rate": (_ratio(harmed, eligible), "fraction", "hurt tokens / eligible tokens"),
    }
    return _figures("layer", found)


def _crystallization_figures(ranks: np.ndarray) -> Variables:
    crystallized, first, stable = below_from(ranks), first_below(ranks), below_from(ranks, limit=1)
    slots = np.arange(len(ranks)) + EMBEDDING
    histogram = (crystallized == slots[:, None]).sum(axis=1)
    # A token that leads for good is on the shortlist for good: both events of the same tokens.
    delay = _mean(stable - crystallized)
    found = {
        "crystallization_layer_mean": (_mean(crystallized), "layer", "mean slot of crystallization"),
        "crystallization_layer_median": (_median(crystallized), "layer", "median slot of crystallization"),
        "crystallization_layer_std": (_std(crystallized), "layer", "its standard deviation over tokens, ddof 0"),
        "never_crystallized": (np.isnan(crystallized).sum(), "token", "tokens outside the top 10 at the last slot"),
        "first_top1_layer_mean": (_mean(first), "layer", "mean first slot of rank 0, lasting or not"),
        "first_top1_layer_median": (_median(first), "layer", "median first slot of rank 0"),
        "stable_top1_layer_mean": (_mean(stable), "layer", "mean slot from which rank 0 lasts"),
        "stable_top1_delay": (delay, "layer", "mean of that slot minus crystallization, of tokens that have both"),
    }
    description = "tokens that enter the top 10 for good at the slot"
    return _figures((), found) | _figures("slot", {"crystallization_histogram": (histogram, "token", description)})


def _type_figures(ranks: np.ndarray, tokens: Tokens) -> Variables:
    members, crystallized = tokens.members, below_from(ranks)
    counts = members.sum(axis=1)
    depths = [crystallized[member > 0] for member in members]
    mean = {name: _ratio(members @ values.T, counts[:, None]) for name, values in _rank_scales(ranks).items()}
    of_type = {
        "token_type_count": (counts, "token", "tokens of the class"),
        "token_type_crystallization_mean": ([_mean(of) for of in depths], "layer", "mean crystallization of the class"),
        "token_type_crystallization_median": ([_median(of) for of in depths], "layer", "median crystallization"),
    }
    over_depth = {
        "token_type_mean_rank": (mean["rank"], "rank", "mean rank of the class"),
        "token_type_log_rank": (mean["log"], "1", "mean log10(1 + rank) of the class"),
        "token_type_top1_accuracy": (mean["top1"], "fraction", "tokens of the class with rank < 1"),
    }
    return _figures("token_type", of_type) | _figures(("token_type", "slot"), over_depth)


def _rank_scales(ranks: np.ndarray) -> dict[str, np.ndarray]:
    return {"rank": ranks.astype(float), "log": _log_rank(ranks), "top1": (ranks < 1).astype(float)}


def _distribution_figures(ranks: np.ndarray, tokens: Tokens) -> Variables:
    names = ("kl", "step_kl", "residual_norm", "update_similarity")
    mean = {name: tokens[name].mean(axis=1, dtype=np.float64) for name in names}
    confident = tokens["top_probability"] > CONFIDENT
    right = _ratio((confident & (ranks < 1)).sum(axis=1), confident.sum(axis=1))
    of_slot = {
        "lens_kl": (mean["kl"], "nat", "mean KL(final distribution || lens distribution)"),
        "confident_fraction": (confident.mean(axis=1), "fraction", "tokens whose top token has probability > 0.9"),
        "confident_accuracy": (right, "fraction", "tokens among them whose top token is the target"),
        "residual_norm": (mean["residual_norm"], "norm", "mean norm of the residual stream at scored positions"),
    }
    of_layer = {
        "lens_step_kl": (mean["step_kl"], "nat", "mean KL(lens after the layer || lens before it)"),
        "update_similarity": (mean["update_similarity"], "1", "mean cosine of the layer's update and the one before"),
    }
    counts = {
        "repeated_target_count": (tokens["repeats_input"].sum(), "token", "targets equal to their predecessor"),
        "scored_token_count": (len(tokens), "token", "completion tokens read"),
    }
    return _figures("slot", of_slot) | _figures("layer", of_layer) | _figures((), counts)


def _surprisal_figures(tokens: Tokens) -> Variables:
    number, content = (tokens["token_type"] == TOKEN_TYPES.index(kind) for kind in ("number", "content_word"))
    compared = Tokens(tokens.data, tokens.index[number | content])
    kept, depth, surprisal = _settled(compared)
    delay = _matched_difference(depth, number[number | content][kept], surprisal)
    _, *of_sample = _settled(tokens.sample)
    correlation = spearman(*map(xr.DataArray, of_sample)) if len(of_sample[0]) else float("nan")
    found = {
        "crystallization_surprisal_correlation": (correlation, "1", "Spearman: crystallization and final surprisal"),
        "number_delay_at_equal_surprisal": (delay, "layer", "numbers minus content words of the same tenth"),
    }
    return _figures((), found)


def _settled(tokens: Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which tokens crystallize at all [N], where, and their final surprisal [nat]."""
    crystallized = below_from(tokens["rank"])
    kept = ~np.isnan(crystallized)
    return kept, crystallized[kept], -tokens["target_log_probability"][-1, kept]


def _category_figures(tokens: Tokens, of_prompts: np.ndarray) -> Variables:
    sample, numbers = tokens.sample, tokens.categories @ tokens.members[TOKEN_TYPES.index("number")]
    crystallized, within = below_from(sample["rank"]), sample.categories
    own, others = ([_mean(crystallized[some == inside]) for some in within] for inside in (1, 0))
    prompts = [(of_prompts == name).sum() for name in categories(tokens.data)]
    found = {
        "prompt_count_by_category": (prompts, "prompt", "prompts of the category"),
        "completion_tokens_by_category": (within.sum(axis=1), "token", "tokens of the category"),
        "number_tokens_by_category": (numbers, "token", "number tokens of the category"),
        "category_crystallization_mean": (own, "layer", "mean crystallization of the category"),
        "other_category_crystallization_mean": (others, "layer", "mean crystallization of all other categories"),
    }
    delay = _weighted(_number_delays(tokens), numbers)
    description = "numbers minus content words within categories, weighted by numbers"
    return _figures("category", found) | _figures((), {"number_delay_within_category": (delay, "layer", description)})


def _number_delays(tokens: Tokens) -> np.ndarray:
    """Mean crystallization of numbers minus that of content words, per category [category]."""
    crystallized = below_from(tokens["rank"])
    number, content = (tokens.members[TOKEN_TYPES.index(kind)] for kind in ("number", "content_word"))
    means = [[_mean(crystallized[(some * kind) > 0]) for kind in (number, content)] for some in tokens.categories]
    return np.array([late - early for late, early in means])


def _matched_difference(values: np.ndarray, group: np.ndarray, match: np.ndarray) -> float:
    """Mean difference of a group and the rest within quantile bins of `match`, weighted by the group's size in each."""
    if not len(values):
        return float("nan")
    edges = np.quantile(match, np.linspace(0, 1, SURPRISAL_BINS + 1)[1:-1])
    bins = np.searchsorted(edges, match)
    inside = [(values[(bins == b) & group], values[(bins == b) & ~group]) for b in range(SURPRISAL_BINS)]
    differences = np.array([_mean(ours) - _mean(others) for ours, others in inside])
    return _weighted(differences, np.array([float(len(ours)) for ours, _ in inside]))


def _weighted(values: np.ndarray, weights: np.ndarray) -> float:
    known = ~np.isnan(values)
    return float(_ratio(values[known] @ weights[known], weights[known].sum()))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part, whole = np.broadcast_arrays(np.asarray(part, dtype=float), np.asarray(whole, dtype=float))
    ratio: np.ndarray = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return ratio


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _median(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _std(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.std()) if len(known) else float("nan")
