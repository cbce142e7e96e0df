"""Seriation: putting items into a line by their distances, without knowing where it begins.

The published solver (nearest neighbour from every start, then 2-opt) is kept to the letter, with its weakness: its
2-opt never reverses a beginning of the path. A stronger one stands beside it, so that an error of the search can be
told from an error of the distances. Ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import scipy

EPSILON = 1e-10
LONGEST_SEGMENT = 3  #: of the segments that or-opt moves (Or 1976)

Path = list[int]


def path_length(distances: np.ndarray, path: Sequence[int]) -> float:
    """Sum of the distances [n, n] between neighbours on a path."""
    return float(distances[path[:-1], path[1:]].sum())


# ---- the published solver


def nearest_neighbour(distances: np.ndarray, start: int) -> Path:
    """From `start` always on to the nearest item that is left."""
    path, left = [start], np.ones(len(distances), dtype=bool)
    left[start] = False
    while left.any():
        path.append(int(np.where(left, distances[path[-1]], np.inf).argmin()))
        left[path[-1]] = False
    return path


def two_opt(distances: np.ndarray, path: Sequence[int]) -> Path:
    """The published 2-opt of an open path: the first improvement found is made, until a sweep finds none.

    Edges (i, i+1), (j, j+1) become (i, j), (i+1, j+1), and the part between them is reversed; at the last j only the
    first edge is exchanged. The first item of the path never moves.
    """
    path, last = list(path), len(path) - 1
    improved = True
    while improved:
        improved = False
        for i in range(last):
            for j in range(i + 2, last + 1):
                a, b, c = path[i], path[i + 1], path[j]
                change = distances[a, c] - distances[a, b]
                if j < last:
                    change += distances[b, path[j + 1]] - distances[c, path[j + 1]]
                if change < -EPSILON:
                    path[i + 1 : j + 1] = path[i + 1 : j + 1][::-1]
                    improved = True
    return path


def chain(distances: np.ndarray) -> Path:
    """The published chain: the shortest nearest-neighbour path over all starts, improved by 2-opt."""
    paths = [nearest_neighbour(distances, start) for start in range(len(distances))]
    return two_opt(distances, min(paths, key=lambda path: path_length(distances, path)))


def most_similar_first(similarity: np.ndarray) -> Path:
    """From the item of lowest mean similarity [n, n] always on to the most similar one that is left."""
    return nearest_neighbour(-similarity, int(similarity.mean(1).argmin()))


def fiedler(distances: np.ndarray) -> Path:
    """Items by their entry in the Fiedler vector (Atkins, Boman and Hendrickson 1998).

    Weights exp(-D^2 / (2 s^2)) with s the median of the positive distances, no loops; the eigenvector of the second
    smallest eigenvalue of the Laplacian diag(W 1) - W.
    """
    positive = distances[distances > 0]
    if not positive.size:
        return list(range(len(distances)))
    weights = np.exp(-(distances**2) / (2 * np.median(positive) ** 2))
    np.fill_diagonal(weights, 0)
    vectors = np.linalg.eigh(np.diag(weights.sum(1)) - weights).eigenvectors
    return [int(item) for item in np.argsort(vectors[:, 1], kind="stable")]


def mean_rank(paths: Sequence[Sequence[int]]) -> Path:
    """Items by their mean position over several paths."""
    total = sum(np.argsort(path) for path in paths)
    return [int(item) for item in np.argsort(total, kind="stable")]


def by_wins(spreads: np.ndarray) -> Path:
    """Items by the number of others that they had better precede, most first.

    Args:
        spreads: [first, second], what came of applying two items in this order; i beats j where
            spreads[i, j] <= spreads[j, i], and of i < j one of the two wins.
    """
    rows, columns = np.triu_indices(len(spreads), k=1)
    first_wins = spreads[rows, columns] <= spreads[columns, rows]
    wins = np.bincount(np.where(first_wins, rows, columns), minlength=len(spreads))
    return [int(item) for item in np.argsort(-wins, kind="stable")]


def oriented(path: Sequence[int], rising: np.ndarray) -> Path:
    """The path, or its reverse where a quantity [n] that should rise along it falls (Spearman's correlation < 0)."""
    ranks = scipy.stats.rankdata(np.asarray(rising)[list(path)])
    along = float((ranks - ranks.mean()) @ np.arange(len(ranks)))
    return list(path) if along >= 0 else list(path)[::-1]


# ---- the stronger solver


def local_optima(distances: np.ndarray, starts: Iterable[Sequence[int]]) -> list[tuple[float, Path]]:
    """Paths that neither reversing nor moving a segment makes shorter, each once, the shortest first; with lengths."""
    found = {}
    for start in starts:
        path = locally_shortest(distances, start)
        path = min(path, path[::-1])
        found[tuple(path)] = (path_length(distances, path), path)
    return sorted(found.values())


def starting_paths(distances: np.ndarray, random: int, seed: int) -> list[Path]:
    """The nearest-neighbour path of every start, and `random` random orders."""
    generator = np.random.default_rng(seed)
    paths = [nearest_neighbour(distances, start) for start in range(len(distances))]
    return paths + [generator.permutation(len(distances)).tolist() for _ in range(random)]


def locally_shortest(distances: np.ndarray, path: Sequence[int]) -> Path:
    """Best improvement by 2-opt and or-opt until there is none.

    A dummy item at no distance from all others closes the path to a tour, so that beginnings and ends are reversed
    and moved like any other part.
    """
    n = len(distances)
    closed = np.zeros((n + 1, n + 1))
    closed[:n, :n] = distances
    tour = [*path, n]
    while True:
        along = closed[np.ix_(tour, tour)]
        change, shorter = min((_best_reversal(along), _best_move(along)), key=lambda found: found[0])
        if change >= -EPSILON:
            break
        tour = [tour[place] for place in shorter]
    cut = tour.index(n)
    return [int(item) for item in tour[cut + 1 :] + tour[:cut]]


def _best_reversal(along: np.ndarray) -> tuple[float, list[int]]:
    """Largest gain of reversing places i+1..j of a tour, whose distances [m, m] are given in tour order."""
    m = len(along)
    after = (np.arange(m) + 1) % m
    edges = along[np.arange(m), after]
    change = along + along[np.ix_(after, after)] - edges[:, None] - edges[None, :]
    change[np.tril_indices(m)] = np.inf
    i, j = np.unravel_index(int(change.argmin()), change.shape)
    places = list(range(m))
    places[i + 1 : j + 1] = places[i + 1 : j + 1][::-1]
    return float(change[i, j]), places


def _best_move(along: np.ndarray) -> tuple[float, list[int]]:
    """Largest gain of moving a segment of one to three places to another gap of the tour, either way round."""
    m = len(along)
    at, gaps = np.arange(m), np.arange(m)
    edges = along[gaps, (gaps + 1) % m]
    best, places = float("inf"), list(range(m))
    for size in range(1, min(LONGEST_SEGMENT, m - 3) + 1):
        before, last, after = (at - 1) % m, (at + size - 1) % m, (at + size) % m
        gain = along[before, at] + along[last, after] - along[before, after]
        inside = (gaps[None, :] - before[:, None]) % m <= size  # the gaps beside and within the segment
        for first_end, last_end in ((at, last), (last, at)):
            cost = along[gaps][:, first_end].T + along[(gaps + 1) % m][:, last_end].T - edges[None, :]
            change = np.where(inside, np.inf, cost - gain[:, None])
            start, gap = np.unravel_index(int(change.argmin()), change.shape)
            if change[start, gap] < best:
                best = float(change[start, gap])
                segment = [int(place) for place in (start + np.arange(size)) % m]
                rest = [place for place in range(m) if place not in segment]
                put = rest.index(int(gap)) + 1
                places = rest[:put] + (segment if first_end is at else segment[::-1]) + rest[put:]
    return best, places
