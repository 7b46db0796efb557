"""Equality, maxima over a dimension, sorting.

A sort of a few elements compares all pairs at once. An element's rank is how many go before it, a sum of comparisons; a
one-time table turns the rank into a row of a permutation matrix, and the matrix sorts whatever it is multiplied with.
"""

from __future__ import annotations

import torch

from tacit.errors import UnsupportedOperator
from tacit.mpc.linear import MatMul, times
from tacit.mpc.shares import Share
from tacit.mpc.sign import MAX_CHUNKS, maximum, nonnegative
from tacit.mpc.steps import Protocol, together
from tacit.mpc.tables import indicator

MAX_SORTED = 128
"""All pairs of more elements than this are refused."""


def equal(x: Share, y: Share, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """1{X = Y} as 1{X ≥ Y} + 1{Y ≥ X} - 1.

    Args:
        x: a share.
        y: a share that broadcasts against it.
        chunks: the comparison window's size; it must hold x - y.

    Returns:
        A share of 0 or 1, scale 0.

    Guarantees: exact at 16 fractional bits and below. At a higher scale, values less than 2^-16 apart may count as
        equal.
    Leakage: none.
    Cost: 3 rounds and the bytes of two comparisons.
    """
    above, below = yield from together(nonnegative(x - y, chunks), nonnegative(y - x, chunks))
    return (above + below).plus_public(-1)


def largest(x: Share, dim: int, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """The largest element along a dimension, which is kept at size 1, by a tournament.

    Args:
        x: a share.
        dim: which dimension.
        chunks: the comparison window's size; it must hold the difference of any two elements.

    Returns:
        A share at x's scale: one of the elements, within 2^-16 of the largest.

    Leakage: none.
    Cost: 3·ceil(log2 n) rounds and n - 1 comparisons (`tacit.mpc.sign.maximum`) for n elements.
    """
    while (size := x.shape[dim]) > 1:
        half = size // 2
        sides = torch.split(x.words, [half, half, size - 2 * half], dim)
        left, right, rest = (x.with_words(side) for side in sides)
        winners = yield from maximum(left, right, chunks)
        x = winners.with_words(torch.cat([winners.words, rest.words], dim))
    return x


def ranks(x: Share, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """For each element of the last dimension, how many of the others go before it: larger ones, and equal ones to its
    left.

    Args:
        x: a share of shape ``(..., n)``, n at most 128.
        chunks: the comparison window's size; it must hold the difference of any two elements.

    Returns:
        A share of integers of the same shape, scale 0: a permutation of 0 … n-1 along the last dimension.

    Guarantees: exact at 16 fractional bits and below, and then stable. At a higher scale, elements less than 2^-16
        apart may stand in any order, and if three of them do, two may be given one rank: truncate first.
    Leakage: none.
    Cost: 3 rounds, n·(n-1)/2 comparisons.
    Raises:
        UnsupportedOperator: n is more than 128.
    """
    size = x.shape[-1]
    if size > MAX_SORTED:
        raise UnsupportedOperator(f"{size} elements are too many to sort: at most {MAX_SORTED}")
    left, right = torch.triu_indices(size, size, 1).to(x.words.device).unbind()
    differences = x.map(lambda own: own[..., left] - own[..., right])
    bits = (yield from nonnegative(differences, chunks)).words
    # Where the left one of a pair wins or ties, the right one has one more before it; otherwise the left one has.
    counts = torch.zeros_like(x.words).index_add(-1, right, bits).index_add(-1, left, -bits)
    return x.with_words(counts, scale=0).plus_public(torch.arange(size - 1, -1, -1, device=x.words.device))


def order(x: Share, count: int, largest_first: bool = True, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """The permutation that sorts the last dimension, as a matrix of zeros and ones.

    1. `ranks`; 2. `indicator`.

    Args:
        x: a share of shape ``(..., n)`` at 16 fractional bits or fewer, n at most 128.
        count: how many of the first places are wanted.
        largest_first: or else smallest first; equal elements keep their order.
        chunks: as in `ranks`.

    Returns:
        A share P of shape ``(..., count, n)``, scale 0; P·x is sorted and P·(0, …, n-1) are the indices.

    Guarantees: exact.
    Leakage: none.
    Cost: 4 rounds; n·(n-1)/2 comparisons; 8 bytes an element each way, and 8·2^ceil(log2 n) dealt.
    """
    if x.shape[-1] == 1:
        return x.with_words(torch.zeros_like(x.words).unsqueeze(-1), scale=0).plus_public(1)
    positions = yield from ranks(x if largest_first else -x, chunks)
    # The rank counts up to n - 1, and the table is as wide as that takes, whatever part of it is wanted.
    matrix = yield from indicator(positions, x.shape[-1])
    return matrix.map(lambda own: own[..., :count].transpose(-1, -2))


def indices(matrix: Share) -> Share:
    """Where the elements that `order` picks come from: ``(..., count)`` integers, scale 0; local."""
    places = torch.arange(matrix.shape[-1], device=matrix.words.device)
    return matrix.map(lambda own: (own * places).sum(-1))


def picked(matrix: Share, x: Share) -> Protocol[Share]:
    """The elements that `order` picks: ``(..., count)``, exact, at x's scale; one round."""
    columns = x.map(lambda own: own.unsqueeze(-1))
    return (yield from times(matrix, columns, MatMul())).map(lambda own: own.squeeze(-1))
