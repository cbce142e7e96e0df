"""The methods that need no text: each makes an order of slots from features of what the slots hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy

from lab.experiments.layers.layer_shuffle_recovery import CHAINS, ENSEMBLE
from lab.statistics import seriation
from lab.statistics.seriation import Path

RANDOM_STARTS = 20
NEAR_OPTIMAL = 1.01  #: paths at most this much longer than the best count as alternatives to it


@dataclass(frozen=True)
class SlotFeatures:
    """Features of what each slot holds; see `WeightFeatures` for those of the parameters.

    Attributes:
        norms: Euclidean norm of all parameters [slot].
        statistics, gains, spectrum, fingerprints: features [slot, n].
        similarity: cosine of all parameters of two slots [slot, slot].
        spreads: see `pair_spreads` [slot, slot].
        query_values: columns of `spectrum` that are the first matrix's.
    """

    norms: np.ndarray
    statistics: np.ndarray
    gains: np.ndarray
    spectrum: np.ndarray
    fingerprints: np.ndarray
    similarity: np.ndarray
    spreads: np.ndarray
    query_values: slice

    @cached_property
    def distances(self) -> dict[str, np.ndarray]:
        """Distances [slot, slot] of the methods that build a chain."""
        return {
            "weight_stats_continuity": euclidean(self.statistics),
            "svd_spectrum": euclidean(self.spectrum),
            "layernorm_progression": euclidean(self.gains),
            "tsp_full_weights": 1 - self.similarity,
            "activation_flow": euclidean(self.fingerprints),
        }

    def oriented(self, path: Path) -> Path:
        """The path in the direction in which norms rise."""
        return seriation.oriented(path, self.norms)


Method = Callable[[SlotFeatures], Path]


def _chain(name: str) -> Method:
    return lambda features: features.oriented(seriation.chain(features.distances[name]))


def _ensemble(features: SlotFeatures) -> Path:
    return seriation.mean_rank([WITHOUT_TEXT[name](features) for name in ENSEMBLE])


def _sorted_by_norm(features: SlotFeatures) -> Path:
    return [int(slot) for slot in np.argsort(features.norms, kind="stable")]


#: the nine published methods that need no text, and the norm alone
WITHOUT_TEXT: dict[str, Method] = {
    **{name: _chain(name) for name in CHAINS},
    "greedy_cosine": lambda features: features.oriented(seriation.most_similar_first(features.similarity)),
    "fiedler_spectral": lambda features: features.oriented(
        seriation.fiedler(features.distances["weight_stats_continuity"])
    ),
    "ensemble_rank": _ensemble,
    "causal_pairwise": lambda features: features.oriented(seriation.by_wins(features.spreads)),
    "sort_by_norm": _sorted_by_norm,
}


def variants(features: SlotFeatures) -> dict[str, Path]:
    """Chains on other features that the source mentions, and on standardised statistics."""
    distances = {
        "gains_by_cosine": cosine_distance(features.gains),
        "query_spectrum": euclidean(features.spectrum[:, features.query_values]),
        "standardised_statistics": euclidean(standardised(features.statistics)),
    }
    return {name: features.oriented(seriation.chain(matrix)) for name, matrix in distances.items()}


def alternatives(distances: np.ndarray, seed: int) -> list[tuple[float, Path]]:
    """Paths within 1 % of the shortest that the stronger solver finds, the shortest first, with their lengths."""
    optima = seriation.local_optima(distances, seriation.starting_paths(distances, RANDOM_STARTS, seed))
    return [found for found in optima if found[0] <= NEAR_OPTIMAL * optima[0][0]]


def euclidean(features: np.ndarray) -> np.ndarray:
    """Euclidean distances of rows [n, n]; all 0 where there are no features."""
    distance = scipy.spatial.distance
    found: np.ndarray = distance.squareform(distance.pdist(features))
    return found if features.shape[1] else np.zeros((len(features),) * 2)


def cosine_distance(features: np.ndarray) -> np.ndarray:
    """1 - cosine of rows [n, n]."""
    distances: np.ndarray = 1 - cosines(features @ features.T)
    return distances


def cosines(products: np.ndarray) -> np.ndarray:
    """Cosines [n, n] from inner products [n, n]; 0 for rows of norm 0."""
    norms = np.sqrt(products.diagonal())
    scale = np.outer(norms, norms)
    found: np.ndarray = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return found


def standardised(features: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and deviation 1; a constant column stays 0."""
    centred = features - features.mean(0)
    deviation = centred.std(0)
    scaled: np.ndarray = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
    return scaled
