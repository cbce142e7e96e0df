"""Scatter matrices of token states, prompt by prompt, through the inner products that bootstrap resamples need.

A cloud of states splits over prompts: its scatter matrix is A = sum_r A_r with A_r = sum of y y^T over the tokens y of
prompt r. A resample that draws prompt r w_r times has A_w = sum_r w_r A_r, hence

    tr A_w = sum_r w_r tr A_r,        ||A_w||_F^2 = sum_rs w_r w_s <A_r, A_s>_F,

and these two give its participation ratio. So R x R numbers per cloud are kept in the place of R matrices d x d.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: columns of the scatter matrices that are formed at a time: R * d * BLOCK numbers in memory
BLOCK = 256


def scatter_products(rows: Tensor, counts: Sequence[int], block: int = BLOCK) -> Tensor:
    """Frobenius inner products <A_r, A_s> of the prompts' scatter matrices [R, R].

    Args:
        rows: states [N, d], ordered by prompt, float64.
        counts: tokens of each prompt, R of them, which sum to N; may be 0.
        block: columns formed at a time.
    """
    products = rows.new_zeros(len(counts), len(counts))
    parts = torch.split(rows, list(counts))
    for start in range(0, rows.shape[1], block):
        stop = start + block
        columns = torch.stack([part[:, :stop].T @ part[:, start:stop] for part in parts])
        columns[:, :start] *= 2**0.5  # A_r is symmetric: what lies above the diagonal block stands for both sides
        flat = columns.flatten(1)
        products += flat @ flat.T
    return products


def scatters(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Traces of the prompts' scatter matrices, tr A_r: summed squared norms [R]."""
    return prompt_sums(rows.square().sum(1), counts)


def deflated(
    products: Tensor, traces: Tensor, rows: Tensor, counts: Sequence[int], directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Inner products [R, R] and traces [R] of the same scatter matrices after directions were projected out.

    With P = I - V V^T and m orthonormal directions V,

        <P A_r P, P A_s P> = <A_r, A_s> - 2 <A_r V, A_s V> + <V^T A_r V, V^T A_s V>.

    Args:
        products: `scatter_products(rows, counts)`.
        traces: `scatters(rows, counts)`.
        rows: states [N, d], ordered by prompt.
        counts: tokens of each prompt.
        directions: V [d, m], orthonormal columns.
    """
    along = torch.split(rows @ directions, list(counts))
    applied = torch.stack(
        [part.T @ own for part, own in zip(torch.split(rows, list(counts)), along, strict=True)]
    ).flatten(1)
    inner = torch.stack([own.T @ own for own in along])
    both = inner.flatten(1)
    return products - 2 * applied @ applied.T + both @ both.T, traces - inner.diagonal(dim1=1, dim2=2).sum(1)


def prompt_sums(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Sums over the tokens of each prompt [R, ...] of values [N, ...] ordered by prompt."""
    return torch.stack([part.sum(0) for part in torch.split(values, list(counts))])


def principal_directions(rows: Tensor) -> Tensor:
    """Principal directions of states [N, d], columns [d, d], the one of most variance first.

    Eigenvectors of the float64 Gram matrix: a third of the time of a singular value decomposition at 2048 x 576.
    """
    vectors: Tensor = torch.linalg.eigh(rows.T @ rows).eigenvectors
    return vectors.flip(1)
