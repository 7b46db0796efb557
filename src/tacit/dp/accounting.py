"""What a run of noised releases has cost: from events that say what was done to ε at a given δ.

An event records a mechanism that really ran, nothing that was hoped for: Poisson sampling is written down only where
each member was taken independently with the stated probability. How events are accounted is `dp_accounting`'s business:
by Rényi differential privacy (Mironov 2017; Mironov, Talwar and Zhang 2019 for the sampled Gaussian) or, tighter and
slower, by privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022). The Rényi divergences of integer
noise come from `tacit.dp.distributed`.

`dp_accounting` is imported when it is first asked: it brings SciPy with it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from tacit.dp.distributed import DiscreteGaussianSum, SkellamSum
from tacit.errors import InputError

Accountant = Literal["rdp", "pld"]

_SMALLEST_NOISE, _LARGEST_NOISE = 2.0**-6, 2.0**13
_PRECISION = 1e-4


class SampledGaussian(msgspec.Struct, frozen=True, tag="sampled-gaussian", forbid_unknown_fields=True):
    """A Gaussian mechanism on a Poisson sample, applied some number of times.

    Each time, every member of a population is taken independently with probability ``sampling_rate``, vectors of
    Euclidean norm at most S are summed over those taken, and N(0, (S ``noise_multiplier``)²) is added to every entry. A
    rate of 1 is no sampling, and is what to write where a sample was not Poisson.

    Raises:
        InputError: a field is out of range.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    times: int = 1

    def __post_init__(self) -> None:
        if not (self.noise_multiplier >= 0 and math.isfinite(self.noise_multiplier)):
            raise InputError(f"noise_multiplier={self.noise_multiplier}: give a number of 0 (no privacy) or more")
        if not 0 < self.sampling_rate <= 1:
            raise InputError(f"sampling_rate={self.sampling_rate}: a probability above 0 and at most 1")
        if self.times < 1:
            raise InputError(f"times={self.times}: an event happened at least once")


NoisedSum = SkellamSum | DiscreteGaussianSum
Event = SampledGaussian | NoisedSum


class Budget(msgspec.Struct, frozen=True):
    """How much may be spent: no more than ``epsilon`` at ``delta``.

    Raises:
        InputError: a number is out of range.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise InputError(f"epsilon={self.epsilon}: a budget is above 0 and finite; ε = 0 allows no release at all")
        check_delta(self.delta)


def check_delta(delta: float) -> None:
    """Refuse a δ that is not a probability strictly between 0 and 1.

    Raises:
        InputError: it is not.
    """
    if not 0 < delta < 1:
        raise InputError(f"delta={delta}: choose it above 0 and well below one over the number of those protected")


def privacy_spent(events: Iterable[Event], delta: float, accountant: Accountant = "rdp") -> float:
    """The ε at ``delta`` of all events together, however each depended on what came before; inf if one had no noise.

    Neighbouring data sets differ in one member that is there or not (Poisson sampling), or whose vector is replaced by
    zero (no sampling).

    Args:
        events: what was run on data that the same member may be part of.
        delta: δ.
        accountant: ``"rdp"``, 10–20 ms for each new kind of event; ``"pld"``, an ε some 10 % lower in 0.1–3 s a call,
            for Gaussian events alone.

    Raises:
        InputError: δ or the accountant is not one, or the accountant does not know one of the events.
    """
    check_delta(delta)
    if accountant not in get_args(Accountant):
        raise InputError(f"accountant={accountant!r}: choose one of {', '.join(get_args(Accountant))}")
    sampled: Counter[tuple[float, float]] = Counter()
    unsampled = 0.0
    sums: Counter[NoisedSum] = Counter()
    for event in events:
        if not isinstance(event, SampledGaussian):
            if accountant != "rdp":
                raise InputError(f"accountant={accountant!r} does not know sums with integer noise: choose 'rdp'")
            if not event.private:
                return math.inf
            sums[msgspec.structs.replace(event, times=1)] += event.times
            continue
        if event.noise_multiplier == 0:
            return math.inf
        if event.sampling_rate < 1:
            sampled[event.noise_multiplier, event.sampling_rate] += event.times
        else:
            unsampled += event.times / event.noise_multiplier**2
    kinds = sorted((*kind, times) for kind, times in sampled.items())
    if unsampled:
        # Gaussian mechanisms on the same data are exactly one, of which the inverse squares of the multipliers add up.
        kinds.append((unsampled**-0.5, 1.0, 1))
    noised = tuple(sorted(sums.items(), key=repr))
    return _spent(tuple(kinds), noised, delta, accountant) if kinds or noised else 0.0


def noise_for(
    target_epsilon: float, delta: float, times: int, sampling_rate: float = 1.0, accountant: Accountant = "rdp"
) -> float:
    """The least noise multiplier with which ``times`` releases stay within a target, or up to 10⁻⁴ of it more.

    Multipliers below 0.016 are not looked at.

    Raises:
        InputError: only absurd noise reaches the target, or an argument is out of range.
    """
    Budget(target_epsilon, delta)

    def spent(noise: float, how: Accountant = "rdp") -> float:
        return privacy_spent([SampledGaussian(noise, sampling_rate, times)], delta, how)

    most = least_noise(spent, target_epsilon)
    if accountant == "pld":
        # What Rényi accounting allows, loss distributions allow too.
        most = _least(lambda noise: spent(noise, "pld") - target_epsilon, 0.6 * most, most)
    return most


def least_noise(spent: Callable[[float], float], target_epsilon: float) -> float:
    """The least noise multiplier that stays within a target, or up to 10⁻⁴ of it more.

    Multipliers below 0.016 are not looked at.

    Args:
        spent: the ε of a multiplier, the less the larger it is.
        target_epsilon: what it has to be within.

    Raises:
        InputError: only absurd noise reaches the target.
    """

    def excess(noise: float) -> float:
        return spent(noise) - target_epsilon

    most = 1.0
    while excess(most) > 0:
        most *= 2
        if most > _LARGEST_NOISE:
            raise InputError(
                f"target_epsilon={target_epsilon} asks for noise of over {_LARGEST_NOISE:g} times the bound, in which "
                "nothing is left: allow a larger epsilon, or release less often"
            )
    while most > _SMALLEST_NOISE and excess(most / 2) <= 0:
        most /= 2
    return _least(excess, most / 2, most)


def dp_event(event: SampledGaussian) -> Any:
    """``event`` as `dp_accounting` writes it."""
    library = import_module("dp_accounting")
    once = library.GaussianDpEvent(event.noise_multiplier)
    if event.sampling_rate < 1:
        once = library.PoissonSampledDpEvent(event.sampling_rate, once)
    return library.SelfComposedDpEvent(once, event.times) if event.times > 1 else once


@lru_cache(maxsize=4096)
def _spent(
    kinds: tuple[tuple[float, float, int], ...],
    sums: tuple[tuple[NoisedSum, int], ...],
    delta: float,
    accountant: Accountant,
) -> float:
    events = [SampledGaussian(*kind) for kind in kinds]
    if accountant == "pld":
        if [rate for _, rate, _ in kinds] == [1.0]:
            # Exact (Balle and Wang 2018).
            return float(import_module("dp_accounting").get_epsilon_gaussian(events[0].noise_multiplier, delta))
        loss = import_module("dp_accounting.pld").PLDAccountant()
        for event in events:
            loss.compose(dp_event(event))
        return float(loss.get_epsilon(delta))
    total = sum((event.times * _curve(event.noise_multiplier, event.sampling_rate) for event in events), 0 * _orders())
    total = total + sum(times * _noised_curve(event) for event, times in sums)
    epsilon, _ = import_module("dp_accounting.rdp").compute_epsilon(_orders(), total, delta)
    return float(epsilon)


@lru_cache(maxsize=4096)
def _curve(noise_multiplier: float, sampling_rate: float) -> NDArray[np.float64]:
    """The Rényi divergences of one application, order by order; infinite at an order whose series does not converge."""
    accountant = import_module("dp_accounting.rdp").RdpAccountant()
    log = import_module("absl.logging")
    said = log.get_verbosity()
    # It reports every order that it leaves out, which only makes the least over all others no smaller.
    log.set_verbosity(log.ERROR)
    try:
        accountant.compose(dp_event(SampledGaussian(noise_multiplier, sampling_rate)))
    finally:
        log.set_verbosity(said)
    return np.asarray(accountant.rdp)


@lru_cache(maxsize=4096)
def _noised_curve(event: NoisedSum) -> NDArray[np.float64]:
    """The Rényi divergences of one noised sum, order by order."""
    return event.divergences(_orders())


@cache
def _orders() -> NDArray[np.float64]:
    return np.asarray(import_module("dp_accounting.rdp").RdpAccountant().orders)


def _least(excess: Callable[[float], float], low: float, high: float) -> float:
    """A number whose excess is not positive, at most a part in 10⁴ above the least such; that of ``high`` is not."""
    if excess(low) <= 0:
        return low
    root = import_module("scipy.optimize").brentq(excess, low, high, xtol=_PRECISION / 4 * low)
    while excess(root) > 0:
        root += _PRECISION / 4 * low
    return float(min(root, high))
