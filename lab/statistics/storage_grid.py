"""Weights that lie on a grid: how coarsely a matrix was stored, and how much of it is rounding.

A file that holds weights in few bits keeps, for every short block of a row, a step and an offset; dequantized, the
block's values are offset + step * integer. The step can be read back from the values themselves, whatever the
file's format was, and with it the size of the rounding: independent errors, uniform within half a step either way.
"""

from __future__ import annotations

import numpy as np

#: weights in a row that share one step in every format of GGUF and in the usual group sizes (32, 64, 128)
BLOCK = 16
MOST_LEVELS = 64  #: six bits; a finer grid cannot be told from float rounding by 16 values, and hardly matters
CLOSE = 2e-3  #: how far from an integer number of steps dequantized float32 values may lie


def steps(weight: np.ndarray) -> np.ndarray:
    """Step of the grid of each aligned block of 16 weights in a row [rows, columns // 16]; 0 where there is none.

    The smallest difference of two of the block's values, if all of them lie an integer number of these apart, at
    most 64 in all. Blocks of one value only have no step either. Where one large weight has made a block's step larger
    than the matrix's weights, the others' errors are their own size, not the step's: steps are cut at the one whose
    error, step^2 / 12, is the median block's mean square.

    Args:
        weight: [rows, columns] as stored, float32 or finer.
    """
    rows, columns = weight.shape
    blocks = np.sort(np.asarray(weight[:, : columns - columns % BLOCK], dtype=np.float32).reshape(rows, -1, BLOCK))
    size = np.abs(blocks[..., [0, -1]]).max(-1, keepdims=True)
    gaps = np.diff(blocks)
    gaps[gaps <= 1e-5 * size] = 0  # one value, rounded twice
    smallest = np.where(gaps > 0, gaps, np.inf).min(-1, keepdims=True)
    distances = (blocks - blocks[..., :1]) / smallest
    on_grid = (np.abs(distances - np.round(distances)).max(-1) <= CLOSE) & (distances[..., -1] < MOST_LEVELS)
    typical = np.sqrt(12 * np.median(np.square(blocks).mean(-1)))
    found: np.ndarray = np.where(on_grid & np.isfinite(smallest[..., 0]), np.minimum(smallest[..., 0], typical), 0)
    return found


def rounding_share(weight: np.ndarray, found: np.ndarray) -> float:
    """Share of a matrix's energy that is rounding: 16 step^2 / 12 summed over blocks, over ||W||_F^2."""
    energy = float(np.square(weight, dtype=np.float64).sum())
    return float(BLOCK * np.square(found, dtype=np.float64).sum() / 12) / energy if energy else 0.0


def levels(weight: np.ndarray, found: np.ndarray) -> float:
    """Median number of grid points that a block spans; NaN if fewer than half of the blocks lie on a grid."""
    rows, columns = weight.shape
    if not (found > 0).mean() >= 0.5:
        return float("nan")
    blocks = weight[:, : columns - columns % BLOCK].reshape(rows, -1, BLOCK)
    spans = (blocks.max(-1) - blocks.min(-1))[found > 0] / found[found > 0]
    return float(np.median(np.round(spans) + 1))


def rounded_again(weight: np.ndarray, found: np.ndarray, seed: int) -> np.ndarray:
    """The matrix with as much rounding added once more: uniform within half a step of each block's grid.

    What it does to a statistic is, to first order, what the storing has done to it already.
    """
    rows, columns = weight.shape
    noise = np.random.default_rng(seed).random((rows, columns - columns % BLOCK), dtype=np.float32) - np.float32(0.5)
    noise *= np.repeat(found, BLOCK, axis=1)
    again = np.array(weight, dtype=np.float64)
    again[:, : noise.shape[1]] += noise
    return again
