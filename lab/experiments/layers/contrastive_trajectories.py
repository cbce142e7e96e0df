"""T-17 contrastive trajectories: where do two answers to one prompt move apart, and does it matter how they differ?

Two completions are forced onto the same prompt. At the pivot, the first token that differs, their residual streams
are compared at every depth, as vectors and through the logit lens; the state before the pivot, which both share, tells
which of the two tokens the model was about to say.

The source compares unmatched groups, most of which go on behind the pivot: there the lens reads the rest of a word or
phrase, and two rests differ whatever the words mean. Measured here are matched families, one prompt with an anchor word
and one contrast word per relationship, each one token, once at once (`immediate`) and once behind a stem (`shared`), so
that relationships and prefixes are compared within a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import xarray as xr

from lab.corpora.contrastive_groups import CONTRASTS, PREFIXES, RELATIONSHIPS, TRUTHS, default_path
from lab.errors import NotApplicable
from lab.experiments import Experiment, Tolerance
from lab.records import Record
from lab.statistics import contrasts
from lab.statistics.contrasts import Contrast

if TYPE_CHECKING:
    from lab.corpora.corpus import Corpus
    from lab.store import Sweep
    from lab.subjects.loading import LoadedSubject

#: below so many families or groups in a cell, a comparison of relationships is noise
FEWEST_GROUPS = 12
#: below so many tokens CKA is ruled by their number
FEWEST_ROWS_OF_CKA = 8
#: depths within rounding of each other are one depth: 13/36 must not fall out of "up to 13/36"
SAME_DEPTH = 1e-9


class ContrastiveTrajectories(Record):
    """Pairs of completions over depth, and what claims derive from them.

    Dimensions: `slot` (-1 the embedding, l the residual stream after layer l), `layer`, `relationship`, `prefix`. A
    measured record holds matched families [family, contrast, prefix, ...] and style entries [style, prefix, ...];
    published figures are means by relationship and by condition, and the KL divergence of every pair.
    """

    sampling: ClassVar = {"family": None, "style": None}
    profiles: ClassVar = ("cosine_profile", "divergence_profile", "js_profile")

    def __init__(self, data: xr.Dataset, draws: Mapping[str, np.ndarray] | None = None):
        """Wrap a record.

        Args:
            data: arrays of families and style entries, or figures.
            draws: drawn families and style entries of a bootstrap resample; None is each once.
        """
        super().__init__(data)
        self._draws = dict(draws or {})

    def _resampled(self, generators: Mapping[str, np.random.Generator]) -> Self:
        # The arrays are shared: five hundred copies of them would fill the memory.
        sizes = self.sampling_sizes
        return type(self)(self.data, {name: generators[name].integers(n, size=n) for name, n in sizes.items()})

    def variable(self, name: str) -> xr.DataArray:
        """A variable, with the drawn families and style entries; see `Record.variable`."""
        array = super().variable(name)
        draws = {dimension: self._draws[dimension] for dimension in array.dims if dimension in self._draws}
        return array.isel(draws) if draws else array

    # ---- depth

    @cached_property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.data.sizes["layer"])

    @property
    def last(self) -> int:
        """The last layer, L - 1."""
        return self.n_layers - 1

    def layers(self, above: float, up_to: float = 1.0) -> range:
        """Layers at relative depths above < (l + 1) / L <= up_to."""
        first, stop = (int(np.floor(depth * self.n_layers + SAME_DEPTH)) for depth in (above, up_to))
        return range(first, stop)

    def layers_from(self, least: float, up_to: float = 1.0) -> range:
        """Layers at relative depths least <= (l + 1) / L <= up_to."""
        first = max(0, int(np.ceil(least * self.n_layers - SAME_DEPTH)) - 1)
        return range(first, self.layers(0, up_to).stop)

    def require_depth(self, layer: int, above: float, up_to: float = 1.0) -> None:
        """Raise NotApplicable unless the layer lies at depths above < z <= up_to."""
        if layer not in self.layers(above, up_to):
            # The layer stays unnamed, so that pytest lists all layers outside in one line.
            raise NotApplicable(f"the claim speaks of layers at depths {above:.2f} to {up_to:.2f}")

    # ---- means

    @cached_property
    def _kept(self) -> dict[Any, Any]:
        return {}

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def rows(self, name: str) -> np.ndarray:
        """A variable's values, drawn families (or style entries) first.

        Raises:
            NotApplicable: the record does not hold it, or only its means.
        """
        array = super().variable(name)
        if array.dims[0] not in self.sampling:
            raise NotApplicable(f"the record of {self.subject} holds means of {name} only")
        drawn = self._draws.get(str(array.dims[0]))
        values: np.ndarray = array.values
        return values if drawn is None else values[drawn]

    def average(self, name: str) -> np.ndarray:
        """A variable's values, averaged over families or style entries; as they are where that is done already."""
        return np.asarray(self._once(("average", name), lambda: self._average(name)))

    def _average(self, name: str) -> np.ndarray:
        array = super().variable(name)
        if array.dims[0] not in self.sampling:
            return np.asarray(array.values)
        rows = self.rows(name)
        # style entries may be fewer in one prefix than in the other, and are NaN there
        return np.asarray(np.nanmean(rows, axis=0) if array.dims[0] == "style" else rows.mean(axis=0))

    def curve(self, name: str, relationship: str, prefix: str | None = None) -> np.ndarray:
        """Mean of a quantity over the pairs of a relationship [slot] or [layer]; of both prefixes if None is named.

        Raises:
            NotApplicable: the record does not hold it.
        """
        return np.asarray(self._once((name, relationship, prefix), lambda: self._curve(name, relationship, prefix)))

    def _curve(self, name: str, relationship: str, prefix: str | None) -> np.ndarray:
        if self.source == "published":
            figure = f"{name}_mean" if prefix is None else f"{name}_mean_by_condition"
            label = relationship if prefix is None else f"{relationship}_{prefix}"
            figures = self.variable(figure)
            places = figures[figures.dims[0]].values.tolist()
            if label not in places:
                raise NotApplicable(f"the {self.source} record of {self.subject} holds no {label} pairs")
            return np.asarray(figures.values[places.index(label)])
        if relationship == "style":
            values = self.average(f"style_{name}")
        else:
            values = self.average(name)[CONTRASTS.index(relationship)]
        return np.asarray(values.mean(0) if prefix is None else values[PREFIXES.index(prefix)])

    @cached_property
    def conditions(self) -> list[tuple[str, str]]:
        """Pairs of relationship and prefix that the record holds."""
        every = [(relationship, prefix) for relationship in RELATIONSHIPS for prefix in PREFIXES]
        if self.source == "published":
            here = set(self.variable("kl_divergence_mean_by_condition")["condition"].values.tolist())
            return [(relationship, prefix) for relationship, prefix in every if f"{relationship}_{prefix}" in here]
        return every

    def cosine(self, relationship: str, slot: int, prefix: str | None = None) -> float:
        """Mean cosine at the pivot; slot -1 is the embedding."""
        return float(self.curve("cosine_similarity", relationship, prefix)[slot + 1])

    def distance(self, relationship: str, slot: int) -> float:
        """Mean distance at the pivot over the mean norm; slot -1 is the embedding."""
        return float(self.curve("l2_distance_normalized", relationship)[slot + 1])

    def kl(self, relationship: str, layer: int, prefix: str | None = None) -> float:
        """Mean KL divergence at the pivot, nat."""
        return float(self.curve("kl_divergence", relationship, prefix)[layer])

    def ratio(self, prefix: str | None = None, name: str = "kl_divergence") -> np.ndarray:
        """Mean divergence of antonyms over that of synonyms [layer]."""
        ratio: np.ndarray = self.curve(name, "antonym", prefix) / self.curve(name, "synonym", prefix)
        return ratio

    @property
    def divergences(self) -> list[str]:
        """The divergences that the record holds: KL, and the bounded and symmetric one where it was measured."""
        return ["kl_divergence", *(["js_divergence"] if self.has("js_divergence") else [])]

    def _profile(self, name: str, depth: str) -> xr.DataArray:
        values = np.stack([self.curve(name, relationship) for relationship in RELATIONSHIPS])
        coords = {"relationship": list(RELATIONSHIPS), depth: self.data[depth].values}
        return xr.DataArray(values, coords, ("relationship", depth))

    @cached_property
    def cosine_profile(self) -> xr.DataArray:
        """Mean cosine at the pivot [relationship, slot]."""
        return self._profile("cosine_similarity", "slot")

    @cached_property
    def divergence_profile(self) -> xr.DataArray:
        """Mean KL divergence at the pivot [relationship, layer], nat."""
        return self._profile("kl_divergence", "layer")

    @cached_property
    def js_profile(self) -> xr.DataArray:
        """Mean Jensen-Shannon divergence at the pivot [relationship, layer], nat."""
        return self._profile("js_divergence", "layer")

    def interior_peak(self, relationship: str) -> float:
        """Largest mean cosine at the pivot after a layer other than the last."""
        return float(self.curve("cosine_similarity", relationship)[1:-1].max())

    def cosine_traces(self, relationship: str) -> np.ndarray:
        """Cosine at the pivot of every pair of a relationship [pair, slot]; single pairs are not published."""
        values = self.rows("cosine_similarity")[:, CONTRASTS.index(relationship)]
        return values.reshape(-1, values.shape[-1])

    def falling_share(self) -> float:
        """Share of all word pairs whose cosine the last layer lowers."""
        values = self.rows("cosine_similarity")
        return float((values[..., -1] < values[..., -2]).mean())

    def steepness(self, relationship: str, prefix: str) -> float:
        """KL at the last layer but one over the smallest KL of any layer."""
        curve = self.curve("kl_divergence", relationship, prefix)
        return float(curve[-2] / curve.min())

    def share_of_slots(self, holds: Callable[[int], bool]) -> float:
        """Share of all slots, the embedding among them, of which a predicate holds."""
        slots = range(-1, self.n_layers)
        return sum(map(holds, slots)) / len(slots)

    def spread(self, name: str, relationship: str, prefix: str | None = None) -> np.ndarray:
        """Standard deviation over pairs (ddof 0) of a quantity [slot] or [layer]."""
        if self.source == "published":
            figure = self.variable(f"{name}_std" if prefix is None else f"{name}_std_by_condition")
            label = relationship if prefix is None else f"{relationship}_{prefix}"
            return np.asarray(figure.values[figure[figure.dims[0]].values.tolist().index(label)])
        values = self.rows(name)[:, CONTRASTS.index(relationship)]
        chosen = values if prefix is None else values[:, [PREFIXES.index(prefix)]]
        return np.asarray(chosen.reshape(-1, chosen.shape[-1]).std(0))

    # ---- antonyms against synonyms

    def contrast(self, name: str = "kl_divergence", prefix: str | None = None, *, complete: bool = False) -> Contrast:
        """Antonyms less synonyms, with a permutation test over groups.

        Matched families are compared pair by pair. The source's groups are not matched: their labels are permuted,
        within the prefix condition where both are taken.

        Args:
            name: `kl_divergence`, `reverse_kl_divergence` or `js_divergence`.
            prefix: `immediate`, `shared` or both.
            complete: only pairs whose completions both end at the pivot. Measured families have no others.

        Raises:
            NotApplicable: the record does not hold the divergence of single groups, or too few of them.
        """
        found: Contrast = self._once(
            ("contrast", name, prefix, complete), lambda: self._contrast(name, prefix, complete)
        )
        return found

    def _contrast(self, name: str, prefix: str | None, complete: bool) -> Contrast:
        if self.source != "published":
            differences = self.family_differences(name, prefix)
            self.require_groups(len(differences))
            return contrasts.paired_contrast(differences)
        values, kinds, shared, groups = self.pairs(name, prefix, complete=complete)
        means, first = contrasts.group_means(values, groups)
        for kind in ("antonym", "synonym"):
            self.require_groups(int((kinds[first] == kind).sum()))
        return contrasts.grouped_contrast(means, kinds[first] == "antonym", shared[first])

    def family_differences(self, name: str, prefix: str | None = None) -> np.ndarray:
        """Antonym minus synonym of every family [family, layer]; mean of both prefixes if None is named."""
        values = self.rows(name)
        difference = values[:, CONTRASTS.index("antonym")] - values[:, CONTRASTS.index("synonym")]
        return np.asarray(difference.mean(1) if prefix is None else difference[:, PREFIXES.index(prefix)])

    def require_groups(self, number: int) -> None:
        """Raise NotApplicable if a cell holds too few groups for a comparison."""
        if number < FEWEST_GROUPS:
            raise NotApplicable(f"{self.subject} has {number} groups in a cell; {FEWEST_GROUPS} are needed")

    def pairs(
        self, name: str = "kl_divergence", prefix: str | None = None, *, complete: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Single antonym and synonym pairs: values [n, layer], relationship, whether shared, and group, each [n]."""
        if self.source != "published":
            values = self.rows(name)[:, : CONTRASTS.index("unrelated")]
            families, kinds, prefixes, depth = values.shape
            group, kind, shared = (index.ravel() for index in np.indices((families, kinds, prefixes)))
            chosen = np.ones(len(group), bool) if prefix is None else shared == PREFIXES.index(prefix)
            flat = values.reshape(-1, depth)[chosen]
            return flat, np.array(CONTRASTS)[kind[chosen]], shared[chosen].astype(bool), group[chosen]
        kinds = np.array(RELATIONSHIPS)[self.variable("pair_relationship").values]
        shared = self.variable("pair_tagged_shared").values.astype(bool)
        chosen = np.isin(kinds, ("antonym", "synonym"))
        if prefix is not None:
            chosen &= shared == bool(PREFIXES.index(prefix))
        if complete:
            chosen &= self.variable("pair_complete_pivots").values == 2
        values, groups = self.variable(f"pair_{name}").values, self.variable("pair_group_id").values
        return values[chosen], kinds[chosen], shared[chosen], groups[chosen]

    def explained(self, factor: str) -> np.ndarray:
        """Share of the variance of KL over antonym and synonym pairs that a factor explains, eta squared [layer].

        Args:
            factor: `relationship`, `prefix`, or `completeness` (how many completions end at the pivot).

        Raises:
            NotApplicable: the factor does not vary.
        """
        return np.asarray(self._once(("explained", factor), lambda: self._explained(factor)))

    def _explained(self, factor: str) -> np.ndarray:
        values, kinds, shared, _ = self.pairs()
        if factor == "completeness":
            if self.source != "published":
                raise NotApplicable("all measured pairs have two complete pivots")
            chosen = self.variable("pair_relationship").values < RELATIONSHIPS.index("style")
            return contrasts.eta_squared(values, self.variable("pair_complete_pivots").values[chosen])
        return contrasts.eta_squared(values, kinds if factor == "relationship" else shared)

    def onset(self, prefix: str) -> int | None:
        """First layer whose mean cosine of antonyms lies two standard deviations below that of synonyms, if any."""
        gap = self.onset_gap(prefix)
        return int(np.argmax(gap > 2)) if (gap > 2).any() else None

    def onset_gap(self, prefix: str) -> np.ndarray:
        """How far the antonyms' mean cosine lies below the synonyms', in the latter's standard deviations [layer]."""
        means = [self.curve("cosine_similarity", kind, prefix)[1:] for kind in ("synonym", "antonym")]
        gap: np.ndarray = (means[0] - means[1]) / self.spread("cosine_similarity", "synonym", prefix)[1:]
        return gap

    # ---- beside other prompts

    def cosine_excess(self, relationship: str, prefix: str) -> np.ndarray:
        """Mean cosine at the pivot less that of words of other prompts [slot]: what the prompt leaves of likeness."""
        common = self.average("cross_prompt_cosine")[PREFIXES.index(prefix)]
        excess: np.ndarray = self.curve("cosine_similarity", relationship, prefix) - common
        return excess

    def centred_cosine(self, contrast: str) -> np.ndarray:
        """Mean cosine at the pivot after the slot's mean vector is taken off [slot]."""
        centred: np.ndarray = self.average("centred_cosine")[CONTRASTS.index(contrast)].mean(0)
        return centred

    def style_alignment(self, estimator: str, *, strangers: bool = False) -> np.ndarray:
        """CKA over the tokens of two registers that differ from the first token on [slot].

        Args:
            estimator: `linear_cka` or `unbiased_cka`.
            strangers: compare with the text of another content instead.
        """
        aligned = self.average(f"style_{estimator}" + "_of_strangers" * strangers)
        immediate: np.ndarray = aligned[PREFIXES.index("immediate")]
        return immediate

    # ---- commitment before the pivot

    def commitment_depths(self, contrast: str) -> np.ndarray:
        """Relative depth from which the preferred one of anchor and contrast stays preferred [family, prefix].

        The first layer from which the sign of the preference margin no longer changes; 1 / L is the first layer.
        """
        agrees = self._agrees_with_the_last(contrast)
        since = np.argmin(agrees[..., ::-1], axis=-1)
        first = np.where(agrees.all(-1), 0, self.n_layers - since)
        depth: np.ndarray = (first + 1) / self.n_layers
        return depth

    def commitment_by_chance(self, contrast: str) -> np.ndarray:
        """Mean of `commitment_depths` over all orders of the layers before the last [family, prefix].

        Of n = L - 1 layers in random order, k of which disagree with the last layer, the last to disagree stands at
        place k (n + 1) / (k + 1) of 1..n on average (the largest of k numbers drawn from n).
        """
        disagree = (~self._agrees_with_the_last(contrast)).sum(-1)
        depth: np.ndarray = (disagree * self.n_layers / (disagree + 1) + 1) / self.n_layers
        return depth

    def _agrees_with_the_last(self, contrast: str) -> np.ndarray:
        """Whether the sign of the preference margin is that after the last layer [family, prefix, layer]."""
        signs = np.sign(self.rows("preference_margin")[:, CONTRASTS.index(contrast)])
        agrees: np.ndarray = signs == signs[..., -1:]
        return agrees

    def preferred_share(self, contrast: str, truth: str) -> float:
        """Share of families and prefixes in which the model at last prefers the anchor to the contrast word."""
        margins = self.rows("preference_margin")[:, CONTRASTS.index(contrast), :, -1]
        return float((margins[self.rows("truth") == TRUTHS.index(truth)] > 0).mean())


@dataclass(frozen=True)
class Budget:
    """What is measured.

    Attributes:
        families: matched families, in the order of the data, of which any prefix is balanced; None is all.
        batch_tokens: padded tokens per batch.
        head_dtype: precision of norm and head; the source read bfloat16 logits.
    """

    families: int | None
    batch_tokens: int = 2048
    head_dtype: str = "float32"


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """Trace every word of every family and every style completion, and compare them pair by pair.

    The corpus is not read: contrastive groups are prompts of their own, rendered as the subject's prompts are.
    """
    from lab.experiments.layers.measuring import contrastive_trajectories

    return contrastive_trajectories.measure(subject, budget, sweep)


EXPERIMENT = Experiment(
    id="T-17",
    title="Contrastive trajectories",
    question="Where do two different answers to one prompt move apart, and does it matter how they differ?",
    record=ContrastiveTrajectories,
    measure=measure,
    budgets={"quick": Budget(families=None), "full": Budget(families=None, batch_tokens=8192)},
    tolerances={
        "": Tolerance(0.02, 0.01, "cosines of bfloat16 states move by up to 1 % between kernels; means by less"),
        "kl_divergence": Tolerance(0.03, 0.1, "KL is unbounded: a state that moves by 1 % moves single pairs by 5 %"),
        "reverse_kl_divergence": Tolerance(0.03, 0.1, "as KL in the other direction"),
        "style_kl_divergence": Tolerance(0.05, 0.2, "as KL, over 12 pairs instead of 40"),
        "style_reverse_kl_divergence": Tolerance(0.05, 0.2, "as KL, over 12 pairs instead of 40"),
        "preference_margin": Tolerance(0.03, 0.1, "logit differences of bfloat16 states move by up to 0.05"),
        "alternative_rank": Tolerance(0.1, 20, "ranks in the thousands, of lens distributions without a peak"),
        "entropy": Tolerance(0.02, 0.05, "entropies of lens distributions, up to 12 nat"),
        "cosine_last_shared_min": Tolerance(0, 1e-4, "1 but for rounding"),
    },
    data=(default_path(),),
)
