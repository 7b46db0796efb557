"""How many holders, and how many of their shares, make a round private and let it finish.

In a cohort of n, at most c = floor(γn) clients are corrupt, that is, tell the server everything, and at most
d = ceil(δn) drop out. Every client picks k *holders* uniformly at random and gives each a share of its secrets; t
shares give a secret. The first m picks are its *partners*, and it shares a mask with each, and with whoever picked it.

Private means, but for a probability of 2^-40 (Bell et al. 2020, *Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead*, sections 3 and 4, whose graph is regular where ours has out-degree k):

- the server cannot gather both secrets of an honest client. If it keeps to the protocol, fewer than t of the holders
  are corrupt. If it lies, each honest holder still gives a share of one kind only, so it lacks shares of one kind as
  long as the corrupt holders are fewer than 2t - k;
- the honest survivors stay connected by masks: no set of them has all its partners among corrupt and lost clients and
  itself, so no sum of fewer than all of them is unmasked. A lying server chooses who is lost, but a client goes on
  only if at least `least_partners` of its partners do.

Finishing means that t of every client's holders remain, but for a probability of 2^-20.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tacit.errors import InputError

PRIVACY_BITS = 40.0
COMPLETION_BITS = 20.0


@dataclass(frozen=True)
class Assumption:
    """What a client takes for granted about the others.

    Args:
        corrupt: γ, the largest fraction of the cohort that helps the server, in [0, 1/2).
        dropped: δ, the largest fraction that drops out, in [0, 1/2).
        lying: whether the server may depart from the protocol.

    Raises:
        InputError: a fraction is out of range.
    """

    corrupt: float = 0.1
    dropped: float = 0.1
    lying: bool = True

    def __post_init__(self) -> None:
        for name, value in (("corrupt", self.corrupt), ("dropped", self.dropped)):
            if not 0 <= value < 0.5:
                raise InputError(f"{name}={value}: a fraction of the cohort in [0, 0.5), such as 0.1")


@dataclass(frozen=True)
class Sharing:
    """Who holds shares of whose secrets.

    Args:
        holders: k.
        partners: m.
        threshold: t.
    """

    holders: int
    partners: int
    threshold: int

    def among(self, members: int) -> Sharing:
        """The same where only ``members`` clients are left to choose from."""
        holders = min(self.holders, members - 1)
        return Sharing(holders, min(self.partners, holders), self.threshold)

    @property
    def least_partners(self) -> int:
        """How many of its partners a client insists on when it masks: the fraction t / k of them, at least one."""
        return max(1, -(-self.partners * self.threshold // self.holders))


@lru_cache(maxsize=256)
def privacy_bits(members: int, sharing: Sharing, assumption: Assumption) -> float:
    """-log2 of a bound on the probability that a round is not private; infinite if it certainly is.

    Args:
        members: n, the cohort.
        sharing: k, m and t.
        assumption: γ, δ and whether the server lies.
    """
    corrupt = math.floor(assumption.corrupt * members)
    k, m = sharing.holders, sharing.partners
    gathered = _log2_gathered(members, sharing, assumption)
    if k >= members - 1 and m == k:
        split = -math.inf if members - corrupt >= 2 else 0.0
    else:
        split = _log2_split(members, corrupt, sharing, assumption)
    return max(0.0, -float(np.logaddexp2(gathered, split)))


def completion_bits(members: int, sharing: Sharing, assumption: Assumption) -> float:
    """-log2 of a bound on the probability that fewer than t of some client's holders remain."""
    dropped = math.ceil(assumption.dropped * members)
    k, t = sharing.holders, sharing.threshold
    return max(0.0, -(math.log2(members) + _log2_tail(members - 1, dropped, k, k - t + 1)))


@lru_cache(maxsize=256)
def choose(members: int, assumption: Assumption, complete_up_to: int = 50) -> Sharing:
    """The fewest holders, and the lowest threshold for them, that are private and finish.

    Args:
        members: n, the cohort.
        assumption: γ, δ and whether the server lies.
        complete_up_to: cohorts up to this size share with everybody.

    Raises:
        InputError: no choice withstands so many corrupt and lost clients in so small a cohort.
    """
    fewest = members - 1 if members <= complete_up_to else min(members - 1, 8)
    for holders in range(max(1, fewest), members):
        partners = holders if holders == members - 1 else -(-holders // 2)
        for threshold in range(2, holders + 1):
            sharing = Sharing(holders, partners, threshold)
            if completion_bits(members, sharing, assumption) < COMPLETION_BITS:
                break
            if _log2_gathered(members, sharing, assumption) > -PRIVACY_BITS:
                continue
            if privacy_bits(members, sharing, assumption) >= PRIVACY_BITS:
                return sharing
    raise InputError(
        f"a cohort of {members} clients cannot sum securely if {assumption.corrupt:.0%} are corrupt and "
        f"{assumption.dropped:.0%} drop out{' under a lying server' if assumption.lying else ''}: take more clients"
    )


def _log2_gathered(members: int, sharing: Sharing, assumption: Assumption) -> float:
    """log2 of a bound on the probability that the server gathers both secrets of some honest client."""
    corrupt = math.floor(assumption.corrupt * members)
    too_many = 2 * sharing.threshold - sharing.holders if assumption.lying else sharing.threshold
    if too_many <= 0:
        return 0.0
    return math.log2(members) + _log2_tail(members - 1, corrupt, sharing.holders, too_many)


def _log2_tail(population: int, marked: int, drawn: int, least: int) -> float:
    """log2 of the probability that ``drawn`` of a population without replacement hold ``least`` or more marked."""
    highest = min(marked, drawn)
    if least > highest:
        return -math.inf
    if least <= max(0, drawn - (population - marked)):
        return 0.0
    terms = [
        _log2_choose(marked, x) + _log2_choose(population - marked, drawn - x)
        for x in range(least, highest + 1)
        if drawn - x <= population - marked
    ]
    return min(0.0, float(np.logaddexp2.reduce(terms)) - _log2_choose(population, drawn))


def _log2_split(members: int, corrupt: int, sharing: Sharing, assumption: Assumption) -> float:
    """log2 of a union bound over the sets of honest survivors that could be cut off from the others.

    Each member of a set of s has all its live partners in the set or among the corrupt: drawn with replacement, which
    is no less likely for a set of at most half.
    """
    lost = 0 if assumption.lying else math.ceil(assumption.dropped * members)
    honest = members - corrupt - lost
    sizes = np.arange(1, honest // 2 + 1, dtype=np.float64)[:, None]
    inside = np.minimum(1.0, (sizes + corrupt + lost) / members)
    least = sharing.least_partners if assumption.lying else sharing.partners
    counts = np.arange(least, sharing.partners + 1)
    ways = np.array([_log2_choose(sharing.partners, int(count)) for count in counts])
    outside = np.log2(np.maximum(1 - inside, 1e-300))
    each = np.logaddexp2.reduce(ways + counts * np.log2(inside) + (sharing.partners - counts) * outside, axis=1)
    total = _log2_choices(honest, sizes[:, 0]) + sizes[:, 0] * np.minimum(0.0, each)
    return float(np.logaddexp2.reduce(total))


def _log2_choose(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def _log2_choices(n: int, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([_log2_choose(n, int(size)) for size in sizes])
