"""Norms of shared vectors, verified without seeing them and without trusting that their squares do not wrap.

A client's vector x lies in Z/2^b as two shares. A sum of squares of its entries in any ring can be made small by a
cheater: the squares of large entries wrap. So no square of an entry is ever taken. After the vectors of a batch
have arrived at both servers, these toss a public coin that expands to k = 256 rows r of independent entries

    r_i = u_i - v_i,  u_i and v_i fair bits        (-1, 0, 0, 1),

and each computes its share of the k projections y = <r, x> locally. Each y is lifted exactly from Z/2^b to Z/2^64,
squared, summed and compared with τ on shares, and one bit a client is opened: 256 values instead of D.

Let |.| be the centred representative in Z/2^b, B the bound, τ = floor(0.8·k·B²). *A vector within the bound passes*
but for 2^-24: y is sub-Gaussian with variance proxy B²/2, so Pr[Σ y² > t·k·B²/2] ≤ (t·e^(1-t))^(k/2), t = 1.6.

*A vector of L2 norm L = 1.87·B or more fails* but for 2^-40, however it was built, squares that wrap included, in a
ring of 32·B elements or more. Let h = u / L² and G(y) = Σ_m exp(-h·(y + m·2^b)²), which is at least exp(-h·|y|²).
G is periodic with non-negative Fourier coefficients, and the characteristic function of <r, x> is Π cos²(t·x_i / 2),
not negative either, so leaving coordinates out of x never lowers E G(<r, x>): it is at most E G(<r, x_S>) for every
subset S. If some |x_i| ≥ L take S = {i}: then E G ≤ (1 + e^-u)/2 + ε. Otherwise add coordinates until L² ≤ ‖x_S‖² and
‖x_S‖² < 2L². Their sum cannot wrap but for ε < 2^-40, and E exp(-h·<r, x_S>²) = E_g Π cos²(g·x_i·√(h/2)), g normal, is
by Hölder's inequality at most the largest E_g |cos(g·√(u/2n))|^(2n), n ≥ 1, which is its limit (1 + u)^(-1/2): that
step was evaluated numerically, for the u used, and is a test. By Chernoff, Pr[Σ |y|² ≤ τ] ≤ (e^(u·θ/2) / √(1 + u))^k
with θ = 1.6·B²/L²; at u = 1/θ - 1 and L = 1.87·B that is below 2^-42.

So |x_i| < 1.87·B holds for each entry as well. The step from 1 to 1.87 is what 256 rows cost: a client may send a
vector up to 1.87 times as long as allowed and have it counted. Modular Johnson–Lindenstrauss projections as proofs of
norms are due to Gentry, Halevi and Lyubashevsky (EUROCRYPT 2022, section 3) and used in LaBRADOR (Beullens and Seiler,
CRYPTO 2023, section 4); verification by two servers that hold shares follows ELSA (Rathee et al., S&P 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tacit.federated.secure_sum.encoding import Encoding
from tacit.federated.secure_sum.ring import Words
from tacit.mpc import exact
from tacit.mpc.coin import toss
from tacit.mpc.linear import Multiply, times
from tacit.mpc.shares import Share
from tacit.mpc.sign import truncate
from tacit.mpc.steps import Open, Protocol, Role
from tacit.ring.integers import WORD_BITS
from tacit.ring.prg import Prg

ROWS = 256
SLACK = 1.87
"""A vector longer than this many times the bound is excluded but for a chance of 2^-40."""

_BLOCK = 1024
_SCALE = 46
"""At this scale `tacit.mpc.exact.nonnegative` compares numbers of up to 60 bits."""


def threshold(bound: int) -> int:
    """τ, the largest sum of squared projections that passes."""
    return ROWS * bound * bound * 4 // 5


def norm_bound(encoding: Encoding, clip_norm: float) -> int:
    """The bound B for vectors of a real L2 norm of at most ``clip_norm``, rounded at random and with their scalars.

    With probability 1 - 2^-34 or more over the rounding, an honest client's integers are within it.

    Args:
        encoding: of the round; its clip should not exceed ``clip_norm``. Noise that clients add is not provided for.
        clip_norm: the largest L2 norm of a client's real vector.
    """
    length = clip_norm * encoding.scale
    # Errors e of mean 0 in an interval of length 1: ‖x + e‖² is ‖x‖² + D/4 at most on average; its two random terms
    # are sub-Gaussian of deviations ‖x‖ and √D/2, of which seven are allowed.
    rounding = encoding.size / 4 + 7 * (length + encoding.size**0.5 / 2)
    largest = (1 << (encoding.bits - 1)) - 1
    scalars = (encoding.length - encoding.size) * largest**2
    return int((length**2 + rounding + scalars) ** 0.5) + 1


def project(vectors: Sequence[Words], seed: Tensor) -> Tensor:
    """The projections of shares of vectors; local and linear.

    Args:
        vectors: residues of one length D each, of 26 bits or fewer; bits above are as they come from an addition.
        seed: what `tacit.mpc.coin.toss` gave.

    Returns:
        int64 of shape ``(len(vectors), ROWS)``: the projections in Z.

    Cost: a matrix product of float64, exact since its sums stay below 2^43; 2·ROWS bits of generator an entry.
    """
    stream = Prg(seed.numpy().astype("<i8").tobytes()).derive("norm rows")
    result = torch.zeros((len(vectors), ROWS), dtype=torch.int64)
    rows = torch.empty((_BLOCK, ROWS), dtype=torch.float64)
    entries = torch.empty((len(vectors), _BLOCK), dtype=torch.float64)
    for start in range(0, len(vectors[0]), _BLOCK):
        size = min(_BLOCK, len(vectors[0]) - start)
        bits = np.unpackbits(stream.array(2 * ROWS // 8 * size)).reshape(size, 2, ROWS)
        rows[:size] = torch.from_numpy((bits[:, 0] - bits[:, 1]).view(np.int8))
        for row, vector in zip(entries.numpy(), vectors, strict=True):
            row[:size] = vector[start : start + size]
        result += (entries[:, :size] @ rows[:size]).to(torch.int64)
    return result


def lift(residues: Tensor, bits: int, holder: Role) -> Protocol[Share]:
    """From shares in Z/2^b to shares in Z/2^64.

    1. y·2^(64-b) has the shares of y, moved up; 2. drop 64 - b bits of it, all of them zero, by
    `tacit.mpc.sign.truncate`.

    Args:
        residues: this server's share of y, int64 of any shape; only its low b bits count.
        bits: b, from 2 to 62.
        holder: whose share it is.

    Returns:
        A share, at scale 0, of v = y modulo 2^b.

    Guarantees: v is the centred y if |y| < 2^(b-2). Otherwise, where truncation may miss a wrap, it is one of the
        representatives of y between -3·2^(b-2) and 3·2^(b-2), none of which is smaller than the centred one.
    Leakage: none.
    Cost: one round, 8 bytes an element each way; 12 to 16 bytes an element dealt, to bob.
    """
    shift = WORD_BITS - bits
    lifted: Share = yield from truncate(Share(residues << shift, shift, holder), 0)
    return lifted


def within(vectors: Sequence[Words], bits: int, bound: int, holder: Role) -> Protocol[tuple[bool, ...]]:
    """Whether each of several shared vectors is within the bound.

    1. toss a coin for the rows; 2. project locally; 3. `lift` the projections; 4. square, sum; 5. compare with τ;
    6. open the answers.

    Args:
        vectors: this server's shares, fixed before the coin is tossed; at least one.
        bits: b, at most 26.
        bound: B, at most 2^b / 32.
        holder: whose shares they are.

    Guarantees: an answer is yes for a vector of norm B or less but for 2^-24, and no for one of SLACK·B or more but
        for 2^-40; see above. In between it is either.
    Leakage: the answers. An honest client's is yes.
    Cost: 8 rounds; 6.2 KiB a client each way and as much dealt, to bob, whatever D is.
    """
    seed = yield from toss()
    lifted = yield from lift(project(vectors, seed), bits, holder)
    squares = yield from times(lifted, lifted, Multiply())
    room = (-Share(squares.words.sum(dim=1), _SCALE, holder)).plus_public(threshold(bound))
    good = yield from exact.nonnegative(room)
    (opened,) = yield Open(good.words)
    return tuple(answer == 1 for answer in opened.tolist())
