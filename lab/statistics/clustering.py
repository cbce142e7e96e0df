"""Clusters of layers: zones of a distance matrix, how far two divisions agree, and the null of mere distance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import scipy
import xarray as xr

LINKAGES = ("ward", "average", "complete")

Labels = Sequence[int] | np.ndarray


def clusters(distances: np.ndarray | xr.DataArray, count: int, method: str = "ward") -> list[int]:
    """Cluster of each item, numbered in the order of first members [n].

    Args:
        distances: symmetric [n, n]; negative entries count as 0, the diagonal is not read.
        count: number of clusters wanted; ties in the tree may leave fewer.
        method: linkage. Ward's assumes Euclidean distances, so believe no cut that average and
            complete linkage do not share.
    """
    tree = scipy.cluster.hierarchy.linkage(condensed(distances), method)
    return in_order_of_appearance(scipy.cluster.hierarchy.fcluster(tree, count, "maxclust"))


def condensed(distances: np.ndarray | xr.DataArray) -> np.ndarray:
    """The pairs i < j of a distance matrix [n, n] as scipy wants them [n(n-1)/2], negative ones set to 0."""
    square = np.clip(np.asarray(distances, dtype=float), 0, None)
    pairs: np.ndarray = scipy.spatial.distance.squareform(square, checks=False)
    return pairs


def in_order_of_appearance(labels: Labels) -> list[int]:
    """The same division with clusters numbered 0, 1, 2... in the order of their first members."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(int(label), len(numbers)) for label in labels]


def runs(labels: Labels) -> list[range]:
    """Maximal stretches of neighbours with one label; as many as clusters if every cluster is contiguous."""
    starts = [0, *(i for i in range(1, len(labels)) if labels[i] != labels[i - 1]), len(labels)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def agreement(labels: Labels, others: Labels) -> float:
    """Adjusted Rand index of two divisions of the same items: 1 if they are equal, 0 on average by chance."""
    from sklearn.metrics import adjusted_rand_score  # a second to import, so not at collection

    return float(adjusted_rand_score(labels, others))


def components(linked: np.ndarray | xr.DataArray) -> list[set[int]]:
    """Connected components of a graph given as a symmetric boolean matrix [n, n], by first member."""
    count, labels = scipy.sparse.csgraph.connected_components(np.asarray(linked), directed=False)
    return sorted(({int(i) for i in np.flatnonzero(labels == label)} for label in range(count)), key=min)


def separation(n: int) -> np.ndarray:
    """How far apart two of n items in a row are: |i - j| as a matrix [n, n]."""
    items = np.arange(n)
    apart: np.ndarray = np.abs(items[:, None] - items[None, :])
    return apart


def distance_only(matrix: np.ndarray | xr.DataArray) -> np.ndarray:
    """The null of a symmetric matrix [n, n] in which only separation counts: every entry the mean at its |i - j|.

    Clusters of such a matrix are contiguous by construction: contiguity alone says nothing about the
    items, only the place of the boundaries can.
    """
    values = np.asarray(matrix, dtype=float)
    n = len(values)
    means = np.array([np.diagonal(values, k).mean() for k in range(n)])
    spread: np.ndarray = means[separation(n)]
    return spread
