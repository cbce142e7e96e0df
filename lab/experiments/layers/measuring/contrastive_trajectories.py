"""How contrastive trajectories are measured: states at a few positions of short sequences, compared pair by pair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from lab.corpora.batches import TokenBatch, TokenText, token_batches
from lab.corpora.contrastive_groups import CONTRASTS, PREFIXES, TRUTHS, WORDS, load_contrastive_groups
from lab.corpora.contrastive_tokens import ContrastivePair, TokenGroups, tokenised
from lab.errors import NotApplicable, UserError
from lab.experiments.layers.contrastive_trajectories import FEWEST_ROWS_OF_CKA, Budget
from lab.memory import keep_freed_memory
from lab.records import variable
from lab.residual.executor import Executor
from lab.residual.pair_lens import PairLens, PairRows
from lab.statistics.alignment import linear_cka, unbiased_cka
from lab.store import Arrays, Sweep
from lab.subjects.anatomy import Decoder
from lab.subjects.loading import DTYPES, LoadedSubject

#: norms below it count as it, as published
SMALLEST_NORM = 1e-8
SMALLEST_SCALE = 1e-10

Point = tuple[int, int]  #: a sequence and a position in it


def measure(subject: LoadedSubject, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """See `lab.experiments.layers.contrastive_trajectories.measure`."""
    content = load_contrastive_groups()
    groups = tokenised(content, subject.tokenizer, subject.facts.frame)
    families = [family for family in content.families if family.id not in groups.dropped][: budget.families]
    style = [entry for entry in content.style if entry.id not in groups.dropped]
    layout = Layout(groups, [family.id for family in families], [entry.id for entry in style])
    truths = {family.id: TRUTHS.index(family.truth) for family in families}
    counts = {
        "family_count": variable((), len(families), "1", "matched families measured"),
        "dropped_count": variable((), len(groups.dropped), "1", "families and style entries this tokenizer splits"),
        "style_count": variable("prefix", layout.style_counts, "1", "style entries measured"),
        "truth": variable("family", [truths[name] for name in layout.families], "1", "0 asserted, 1 open"),
    }
    found = measured(subject.decoder, layout, budget, sweep)
    settings = {"tied_embeddings": subject.facts.tied, "dropped": groups.dropped}
    return found.assign(counts).assign_attrs(settings=json.dumps(settings))


@dataclass(frozen=True)
class Layout:
    """Which pair stands where in the record's arrays.

    Attributes:
        groups: the tokenised groups.
        families: ids of the families, each with all its six pairs.
        style: ids of the style entries.
    """

    groups: TokenGroups
    families: Sequence[str]
    style: Sequence[str]

    @cached_property
    def pairs(self) -> list[ContrastivePair]:
        """The pairs of the families [family, contrast, prefix], flat, then those of the style entries."""
        of = {(p.group.family, p.group.relationship, p.prefix): p for p in self.groups.pairs}
        return [of[f, c, x] for f in self.families for c in CONTRASTS for x in PREFIXES] + self.style_pairs

    @cached_property
    def style_pairs(self) -> list[ContrastivePair]:
        """The pairs of the style entries, in the order of the file."""
        of = {pair.group.family: pair for pair in self.groups.pairs}
        return [of[name] for name in self.style]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of families, contrasts and prefixes."""
        return len(self.families), len(CONTRASTS), len(PREFIXES)

    @property
    def style_counts(self) -> list[int]:
        """Number of style entries of each prefix."""
        return [sum(pair.prefix == prefix for pair in self.style_pairs) for prefix in PREFIXES]

    def completion(self, sequence: int) -> range:
        """Positions of a sequence's completion tokens."""
        found = self.groups.sequences[sequence]
        return range(found.prompt_tokens, len(found.ids))

    @cached_property
    def points(self) -> dict[Point, int]:
        """Where states are read: at the pivot and before it, and at every token of the style completions."""
        wanted = [(s, p.pivot - back) for p in self.pairs for s in (p.a, p.b) for back in (0, 1)]
        wanted += [(s, at) for p in self.style_pairs for s in (p.a, p.b) for at in self.completion(s)]
        return {point: row for row, point in enumerate(dict.fromkeys(wanted))}

    @cached_property
    def rows(self) -> PairRows:
        """The pairs as rows of the points."""
        ids = self.groups.sequences
        columns = [
            [
                self.points[p.a, p.pivot],
                self.points[p.b, p.pivot],
                self.points[p.a, p.pivot - 1],
                ids[p.a].ids[p.pivot],
                ids[p.b].ids[p.pivot],
            ]
            for p in self.pairs
        ]
        return PairRows(*np.array(columns).T)

    def of_families(self, values: np.ndarray) -> np.ndarray:
        """Values [family, contrast, prefix, depth] of values [depth, pair]."""
        n = int(np.prod(self.shape))
        return np.ascontiguousarray(values[:, :n].T).reshape(*self.shape, -1)

    def of_style(self, values: np.ndarray) -> np.ndarray:
        """Values [style, prefix, depth] of values [depth, style pair]; NaN where a prefix has fewer entries."""
        arranged = np.full((max(self.style_counts), len(PREFIXES), len(values)), np.nan, np.float32)
        filled = [0, 0]
        for pair, own in zip(self.style_pairs, values.T, strict=True):
            prefix = PREFIXES.index(pair.prefix)
            arranged[filled[prefix], prefix] = own
            filled[prefix] += 1
        return arranged


def measured(decoder: Decoder, layout: Layout, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """Trajectories of all pairs: geometry at every slot, read-outs after every layer."""
    if not layout.families or not all(layout.style_counts):
        raise NotApplicable("this tokenizer leaves no contrastive families or no style entries to compare")
    states = states_at(decoder, layout, budget.batch_tokens, sweep)
    _require_finite(states)
    lens = PairLens(decoder, DTYPES[budget.head_dtype])
    readings: list[Arrays] = []
    for layer in range(decoder.n_layers):
        readings.append(sweep.shard(f"lens {layer}", partial(lens.read, states[layer + 1], layout.rows)))
        sweep.progress(layer + 1, decoder.n_layers, "layers read out")
    read = {name: np.stack([reading[name] for reading in readings]) for name in readings[0]}
    arrays = _trajectories(geometry(states, layout), read, layout) | _words(states, read, layout) | _cka(states, layout)
    coords = {
        "slot": np.arange(decoder.n_layers + 1) - 1,
        "layer": np.arange(decoder.n_layers),
        "contrast": list(CONTRASTS),
        "word": list(WORDS),
        "prefix": list(PREFIXES),
        "family_id": ("family", list(layout.families)),
    }
    return xr.Dataset(arrays, coords)


# ---- states


def states_at(decoder: Decoder, layout: Layout, batch_tokens: int, sweep: Sweep) -> Tensor:
    """Residual streams [depth, point, d] at the layout's points, float32 on the CPU; depth 0 is the embedding."""
    if decoder.device.type == "cpu":
        keep_freed_memory()
    used = sorted({sequence for sequence, _ in layout.points})
    texts = [TokenText(layout.groups.sequences[index].ids, ()) for index in used]
    states = torch.empty(decoder.n_layers + 1, len(layout.points), decoder.width)
    done, total = 0, sum(len(text.ids) for text in texts)
    for index, batch in enumerate(token_batches(texts, batch_tokens)):
        own = [(row, at) for row, text in enumerate(batch.texts) for s, at in layout.points if s == used[text]]
        part = sweep.shard(f"states {index}", partial(_traced, decoder, batch, own))
        places = [layout.points[used[batch.texts[row]], at] for row, at in own]
        states[:, places] = torch.from_numpy(part["states"])
        done += int(batch.lengths.sum())
        sweep.progress(done, total, "tokens")
    return states


def _traced(decoder: Decoder, batch: TokenBatch, points: Sequence[Point]) -> Arrays:
    rows, positions = (torch.tensor(part) for part in zip(*points, strict=True))
    traced = Executor(decoder).trace(batch.to(decoder.device))
    with torch.no_grad():
        return {"states": torch.stack([state[rows, positions].float().cpu() for _, state in traced]).numpy()}


def _require_finite(states: Tensor) -> None:
    bad = (~torch.isfinite(states)).any(-1).any(-1).nonzero()
    if len(bad):
        where = f"after layer {int(bad[0]) - 1}" if int(bad[0]) else "of the embedding"
        raise UserError(f"contrastive trajectories: states {where} are not finite; measure with --dtype float32")


# ---- arrays


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine [...] of vectors [..., d]."""
    norms = [np.maximum(np.linalg.norm(vectors, axis=-1), SMALLEST_NORM) for vectors in (a, b)]
    value: np.ndarray = np.einsum("...d,...d->...", a, b) / (norms[0] * norms[1])
    return value


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance [...] of vectors [..., d] over their mean norm, 0 to 2."""
    scale = (np.linalg.norm(a, axis=-1) + np.linalg.norm(b, axis=-1)) / 2
    value: np.ndarray = np.linalg.norm(a - b, axis=-1) / (scale + SMALLEST_SCALE)
    return value


def geometry(states: Tensor, layout: Layout) -> Arrays:
    """Cosines and distances [slot, pair] at the pivot, and the cosine before it."""
    rows, values = layout.rows, states.numpy()
    others = np.array([layout.points[p.b, p.pivot - 1] for p in layout.pairs])
    a, b = values[:, rows.a], values[:, rows.b]
    return {
        "cosine_similarity": cosine(a, b),
        "l2_distance_normalized": distance(a, b),
        "cosine_last_shared": cosine(values[:, rows.before], values[:, others]),
    }


#: name -> dimension over depth, unit, description
TRAJECTORIES = {
    "cosine_similarity": ("slot", "1", "cosine of the residual streams at the pivot"),
    "l2_distance_normalized": ("slot", "1", "distance of the residual streams at the pivot over their mean norm"),
    "kl_divergence": ("layer", "nat", "KL(contrast || anchor) of the lens distributions at the pivot"),
    "reverse_kl_divergence": ("layer", "nat", "KL(anchor || contrast) of the lens distributions at the pivot"),
    "js_divergence": ("layer", "nat", "Jensen-Shannon divergence of the lens distributions at the pivot"),
}


def _trajectories(found: Arrays, read: Arrays, layout: Layout) -> dict[str, xr.Variable]:
    """What is measured on every pair, for the families and for the style entries."""
    arrays = {}
    n = int(np.prod(layout.shape))
    for name, (depth, unit, says) in TRAJECTORIES.items():
        values = (found | read)[name]
        arrays[name] = variable(("family", "contrast", "prefix", depth), layout.of_families(values), unit, says)
        style = layout.of_style(values[:, n:])
        arrays[f"style_{name}"] = variable(("style", "prefix", depth), style, unit, f"{says}, of two registers")
    margin = layout.of_families(read["preference_margin"])
    says = "ln p(anchor) - ln p(contrast) of the lens distribution before the pivot"
    arrays["preference_margin"] = variable(("family", "contrast", "prefix", "layer"), margin, "nat", says)
    lowest = float(found["cosine_last_shared"].min())
    says = "smallest cosine of the two sequences' states before the pivot, over all pairs and slots"
    return arrays | {"cosine_last_shared_min": variable((), lowest, "1", says)}


def _words(states: Tensor, read: Arrays, layout: Layout) -> dict[str, xr.Variable]:
    """What is measured on every word, and cosines set beside those of other prompts."""
    families, contrasts, prefixes = layout.shape
    n = families * contrasts * prefixes
    a, b = (rows[:n].reshape(layout.shape) for rows in (layout.rows.a, layout.rows.b))
    rows = np.concatenate([a[:, :1], b], axis=1)  # [family, word, prefix]
    vectors = states.numpy()[:, rows]  # [slot, family, word, prefix, d]
    centred = vectors - vectors.mean((1, 2), keepdims=True)
    unit = (vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), SMALLEST_NORM)).mean(2)
    across = np.einsum("sfpd,sfpd->sfp", unit, unit.sum(1, keepdims=True) - unit) / max(1, families - 1)
    by_pair = ("family", "contrast", "prefix", "slot")
    own = np.moveaxis(cosine(centred[:, :, :1], centred[:, :, 1:]), 0, -1)
    arrays = {
        "centred_cosine": variable(by_pair, own, "1", "cosine at the pivot without the slot's mean vector"),
        "cross_prompt_cosine": variable(
            ("family", "prefix", "slot"), np.moveaxis(across, 0, -1), "1", "mean cosine with words of other prompts"
        ),
    }
    described = {
        "entropy": ("entropy_a", "entropy_b", "nat", "entropy of the lens distribution at the pivot"),
        "alternative_rank": ("rank_a", "rank_b", "rank", "mid-rank of the word in the lens before the pivot"),
    }
    for name, (of_anchor, of_contrast, its_unit, says) in described.items():
        first, second = (layout.of_families(read[key]) for key in (of_anchor, of_contrast))
        values = np.concatenate([first[:, :1], second], axis=1)
        arrays[name] = variable(("family", "word", "prefix", "layer"), values, its_unit, says)
    return arrays


def _cka(states: Tensor, layout: Layout) -> dict[str, xr.Variable]:
    """CKA over the tokens of style completions; of one content, and of one content's text with the next content's."""
    values = states.numpy()
    following = _next_of_same_prefix(layout.style_pairs)
    estimators = {"linear_cka": linear_cka, "unbiased_cka": unbiased_cka}
    arrays = {}
    for name, estimator in estimators.items():
        for end, partners in (("", layout.style_pairs), ("_of_strangers", following)):
            aligned = [
                _aligned(values, layout, first.a, second.b, estimator)
                for first, second in zip(layout.style_pairs, partners, strict=True)
            ]
            which = "different contents" if end else "one content in two registers"
            says = f"{name.replace('_', ' ')} over completion tokens, {which}"
            arrays[f"style_{name}{end}"] = variable(
                ("style", "prefix", "slot"), layout.of_style(np.stack(aligned, axis=1)), "1", says
            )
    return arrays


def _next_of_same_prefix(pairs: Sequence[ContrastivePair]) -> list[ContrastivePair]:
    members = {prefix: [pair for pair in pairs if pair.prefix == prefix] for prefix in PREFIXES}
    turn = {id(pair): of[(place + 1) % len(of)] for of in members.values() for place, pair in enumerate(of)}
    return [turn[id(pair)] for pair in pairs]


def _aligned(values: np.ndarray, layout: Layout, a: int, b: int, estimator: object) -> np.ndarray:
    tokens = [layout.completion(sequence) for sequence in (a, b)]
    n = min(map(len, tokens))
    if n < FEWEST_ROWS_OF_CKA:
        return np.full(len(values), np.nan)
    clouds = ([layout.points[s, at] for at in positions[:n]] for s, positions in zip((a, b), tokens, strict=True))
    assert callable(estimator)
    return np.asarray(estimator(*(values[:, rows] for rows in clouds)))
