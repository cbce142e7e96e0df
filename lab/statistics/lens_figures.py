"""Figures of a logit lens: profiles over depth, from the readings of single tokens.

Every figure is a mean, median or count over all tokens, as the source takes them. Figures of resampled
prompts are the figures of the tokens of the drawn prompts, so medians and ratios resample correctly too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

from lab.corpora.token_classes import TOKEN_TYPES
from lab.records import variable
from lab.statistics.rank_paths import EMBEDDING, SHORTLIST, below_from, first_below, hurt
from lab.statistics.ranks import spearman

#: A lens this sure of its top token would let the token leave the network here.
CONFIDENT = 0.9
SURPRISAL_BINS = 10

Variables = dict[str, xr.Variable]


@dataclass(frozen=True)
class Tokens:
    """Readings of N tokens at S slots, as plain arrays; a token of a prompt drawn twice stands in them twice."""

    data: xr.Dataset
    index: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        """A variable, [..., N]."""
        values: np.ndarray = self.data[name].values[..., self.index]
        return values

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def members(self) -> np.ndarray:
        """Membership in each token class [type, N], 0 or 1, float64."""
        return (self["token_type"] == np.arange(len(TOKEN_TYPES))[:, None]).astype(float)

    @cached_property
    def categories(self) -> np.ndarray:
        """Membership in each prompt category [category, N], 0 or 1, float64."""
        of_prompt = self.data["category"].values
        return (of_prompt[self["token_prompt"]] == categories(self.data)[:, None]).astype(float)


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
    ranks = tokens["rank"]
    return (
        _reading_figures(ranks, tokens["target_log_probability"], tokens["entropy"])
        | _path_figures(ranks)
        | _type_figures(ranks, tokens)
        | _distribution_figures(ranks, tokens)
        | _surprisal_figures(ranks, tokens)
    )


def _published_figures(tokens: Tokens) -> Variables:
    """Figures of bfloat16 logits with all ties resolved in favour of the target, as published."""
    ranks = tokens["bfloat16_rank"]
    tied = variable(
        "slot",
        (tokens["bfloat16_ties"] > 0).mean(axis=1),
        "fraction",
        "share of tokens whose target ties with another entry",
    )
    return (
        _reading_figures(ranks, tokens["bfloat16_target_log_probability"], tokens["bfloat16_entropy"])
        | _path_figures(ranks)
        | _type_figures(ranks, tokens)
        | {"lens_tied_fraction": tied}
    )


def _reading_figures(ranks: np.ndarray, log_probability: np.ndarray, entropy: np.ndarray) -> Variables:
    return {
        "lens_mean_rank": variable("slot", ranks.mean(axis=1, dtype=np.float64), "rank", "mean rank of the target"),
        "lens_median_rank": variable("slot", np.median(ranks, axis=1), "rank", "median rank of the target"),
        "lens_log_rank": variable(
            "slot", np.log10(1 + ranks).mean(axis=1, dtype=np.float64), "1", "mean log10(1 + rank) of the target"
        ),
        "lens_top1_accuracy": variable(
            "slot", (ranks < 1).mean(axis=1), "fraction", "share of tokens with target rank < 1"
        ),
        "lens_top5_accuracy": variable(
            "slot", (ranks < 5).mean(axis=1), "fraction", "share of tokens with target rank < 5"
        ),
        "lens_top10_accuracy": variable(
            "slot", (ranks < 10).mean(axis=1), "fraction", "share of tokens with target rank < 10"
        ),
        "lens_target_probability": variable(
            "slot",
            np.exp(log_probability).mean(axis=1, dtype=np.float64),
            "probability",
            "arithmetic mean of the target's probability",
        ),
        "lens_entropy": variable(
            "slot", entropy.mean(axis=1, dtype=np.float64), "nat", "mean entropy of the lens distribution"
        ),
    }


def _path_figures(ranks: np.ndarray) -> Variables:
    crystallized, first, stable = below_from(ranks), first_below(ranks), below_from(ranks, limit=1)
    harmed, eligible = hurt(ranks)
    slots = np.arange(len(ranks)) + EMBEDDING
    histogram = (crystallized == slots[:, None]).sum(axis=1)
    counts, within = harmed.sum(axis=1), eligible.sum(axis=1)
    # Both events of the same tokens: whoever leads for good at the end is on the shortlist for good, too.
    gap = _mean(stable - crystallized)
    return {
        "hurt_count": variable(
            "layer", counts, "token", "tokens whose rank rises at the layer and was below 100 before it"
        ),
        "hurt_fraction": variable("layer", counts / ranks.shape[1], "fraction", "hurt tokens / all tokens"),
        "eligible_fraction": variable(
            "layer", within / ranks.shape[1], "fraction", "share of tokens of rank below 100 before the layer"
        ),
        "conditional_hurt_rate": variable("layer", _ratio(counts, within), "fraction", "hurt tokens / eligible tokens"),
        "crystallization_histogram": variable(
            "slot", histogram, "token", "tokens that enter the top 10 for good at the slot"
        ),
        "crystallization_layer_mean": variable(
            (), _mean(crystallized), "layer", "mean slot of crystallization, -1 the embedding"
        ),
        "crystallization_layer_median": variable((), _median(crystallized), "layer", "median slot of crystallization"),
        "crystallization_layer_std": variable(
            (), _std(crystallized), "layer", "standard deviation over tokens, ddof 0"
        ),
        "never_crystallized": variable(
            (), np.isnan(crystallized).sum(), "token", "tokens outside the top 10 at the last slot"
        ),
        "first_top1_layer_mean": variable((), _mean(first), "layer", "mean first slot of rank 0, lasting or not"),
        "first_top1_layer_median": variable((), _median(first), "layer", "median first slot of rank 0"),
        "stable_top1_layer_mean": variable((), _mean(stable), "layer", "mean slot from which rank 0 lasts"),
        "stable_top1_delay": variable(
            (), gap, "layer", "mean of stable top-1 minus crystallization over tokens that have both"
        ),
    }


def _type_figures(ranks: np.ndarray, tokens: Tokens) -> Variables:
    members, crystallized = tokens.members, below_from(ranks)
    counts = members.sum(axis=1)
    depths = [crystallized[member > 0] for member in members]
    share = {name: _ratio(members @ values.T, counts[:, None]) for name, values in _rank_scales(ranks).items()}
    return {
        "token_type_count": variable("token_type", counts, "token", "scored tokens of the class"),
        "token_type_crystallization_mean": variable(
            "token_type", [_mean(of) for of in depths], "layer", "mean crystallization of the class"
        ),
        "token_type_crystallization_median": variable(
            "token_type", [_median(of) for of in depths], "layer", "median crystallization"
        ),
        "token_type_mean_rank": variable(("token_type", "slot"), share["rank"], "rank", "mean rank of the class"),
        "token_type_log_rank": variable(("token_type", "slot"), share["log"], "1", "mean log10(1 + rank) of the class"),
        "token_type_top1_accuracy": variable(
            ("token_type", "slot"), share["top1"], "fraction", "share of the class with rank < 1"
        ),
    }


def _rank_scales(ranks: np.ndarray) -> dict[str, np.ndarray]:
    return {"rank": ranks.astype(float), "log": np.log10(1 + ranks.astype(float)), "top1": (ranks < 1).astype(float)}


def _distribution_figures(ranks: np.ndarray, tokens: Tokens) -> Variables:
    confident = tokens["top_probability"] > CONFIDENT
    right = (confident & (ranks < 1)).sum(axis=1)
    means = {
        name: tokens[name].mean(axis=1, dtype=np.float64)
        for name in ("kl", "step_kl", "residual_norm", "update_similarity")
    }
    return {
        "lens_kl": variable("slot", means["kl"], "nat", "mean KL(final distribution || lens distribution)"),
        "lens_step_kl": variable("layer", means["step_kl"], "nat", "mean KL(lens after the layer || lens before it)"),
        "confident_fraction": variable(
            "slot", confident.mean(axis=1), "fraction", "share of tokens whose lens gives its top token more than 0.9"
        ),
        "confident_accuracy": variable(
            "slot", _ratio(right, confident.sum(axis=1)), "fraction", "share of those whose top token is the target"
        ),
        "residual_norm": variable(
            "slot", means["residual_norm"], "norm", "mean norm of the residual stream at scored positions"
        ),
        "update_similarity": variable(
            "layer", means["update_similarity"], "1", "mean cosine of the layer's update with the one before"
        ),
        "repeated_target_count": variable(
            (), tokens["repeats_input"].sum(), "token", "targets equal to the token they are predicted from"
        ),
        "scored_token_count": variable((), len(tokens), "token", "scored completion tokens"),
    }


def _surprisal_figures(ranks: np.ndarray, tokens: Tokens) -> Variables:
    crystallized, surprisal = below_from(ranks), -tokens["target_log_probability"][-1]
    kept = ~np.isnan(crystallized)
    correlation = spearman(xr.DataArray(crystallized[kept]), xr.DataArray(surprisal[kept]))
    number = tokens["token_type"] == TOKEN_TYPES.index("number")
    delay = _matched_difference(crystallized[kept], number[kept], surprisal[kept])
    return {
        "crystallization_surprisal_correlation": variable(
            (), correlation, "1", "Spearman correlation over tokens of crystallization slot and final surprisal"
        ),
        "number_delay_at_equal_surprisal": variable(
            (),
            delay,
            "layer",
            "mean crystallization of numbers minus that of other tokens in the same tenth of final surprisal",
        ),
    }


def _category_figures(tokens: Tokens, of_prompts: np.ndarray) -> Variables:
    crystallized, within = below_from(tokens["rank"]), tokens.categories
    number = TOKEN_TYPES.index("number")
    content = TOKEN_TYPES.index("content_word")
    means = [[_mean(crystallized[(category * member) > 0]) for member in tokens.members] for category in within]
    numbers = within @ tokens.members[number]
    delay = np.array(means)[:, number] - np.array(means)[:, content]
    prompts = [(of_prompts == name).sum() for name in categories(tokens.data)]
    return {
        "prompt_count_by_category": variable("category", prompts, "prompt", "prompts of the category"),
        "completion_tokens_by_category": variable(
            "category", within.sum(axis=1), "token", "scored tokens of the category"
        ),
        "number_tokens_by_category": variable("category", numbers, "token", "number tokens of the category"),
        "category_crystallization_mean": variable(
            "category",
            [_mean(crystallized[member > 0]) for member in within],
            "layer",
            "mean crystallization of the category",
        ),
        "other_category_crystallization_mean": variable(
            "category",
            [_mean(crystallized[member == 0]) for member in within],
            "layer",
            "mean crystallization of all other categories",
        ),
        "number_delay_within_category": variable(
            (),
            _weighted(delay, numbers),
            "layer",
            "numbers minus content words within categories, weighted by number tokens",
        ),
    }


def _matched_difference(values: np.ndarray, group: np.ndarray, match: np.ndarray) -> float:
    """Mean difference of a group and the rest within quantile bins of `match`, weighted by the group's share of each bin."""
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
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _median(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _std(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.std()) if len(known) else float("nan")
