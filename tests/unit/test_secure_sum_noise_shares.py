"""Clients make a private sum together: bounded, noised, exact in the ring, and accounted for who finished."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from tacit.dp.accounting import SampledGaussian, privacy_spent
from tacit.dp.discrete import LARGEST_VARIANCE
from tacit.dp.ledger import Ledger
from tacit.errors import InputError, RangeError
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.interface import PlainSum
from tacit.federated.secure_sum.masked import MaskedSum
from tacit.federated.secure_sum.noise_shares import NoiseShares, calibrated, fitting_bits
from tacit.federated.secure_sum.parameters import Assumption
from tacit.federated.secure_sum.server import Stage
from tacit.ring.prg import Prg

SEED = b"0123456789abcdef"
SIZE, CLIENTS, FEWEST, CLIP = 3000, 20, 16, 0.5
KINDS = ["skellam", "discrete-gaussian"]


def shares(**changes):
    return NoiseShares(
        **{"size": SIZE, "clip": CLIP, "clients": CLIENTS, "fewest": FEWEST, "noise_multiplier": 1.0, **changes}
    )


def updates(scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(SIZE, generator=generator) / math.sqrt(SIZE) for _ in range(CLIENTS)]


def opened(plan, finished, scale=1.0):
    """The decoded sum of that many clients, in the ring as the protocols compute it."""
    total = plan.encoding.ring.zeros(SIZE)
    for i, update in enumerate(updates(scale)[:finished]):
        total += plan.encode(update, Prg(SEED).derive("client", i))
    return plan.encoding.decode(plan.encoding.ring.reduce_(total))[0].double()


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("finished", [FEWEST, CLIENTS])
@pytest.mark.parametrize("bits", [12, 16])
def test_the_sum_is_that_of_the_clipped_updates_and_noise_of_the_stated_variance(noise, finished, bits):
    plan = shares(noise=noise, bits=bits)
    clipped = sum(update.double() * min(1, CLIP / float(update.norm())) for update in updates()[:finished])
    squares = float(((opened(plan, finished) - clipped) ** 2).sum())
    # Every rounding adds between 0 and ¼ of a squared step.
    rounding = finished * (CLIP / (2 ** (bits - 1) - 1)) ** 2

    def accepted(variance):
        return all(
            test > 1e-6
            for test in (
                stats.chi2.sf(squares / (variance + rounding / 4), SIZE),
                stats.chi2.cdf(squares / variance, SIZE),
            )
        )

    stated = CLIP**2 * finished / FEWEST
    assert accepted(stated)
    assert not accepted(stated * 1.2)
    assert not accepted(stated / 1.2)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_rounded_updates_keep_their_bound_and_their_expectation(bits):
    plan, prg = shares(bits=bits, noise_multiplier=3.0), Prg(SEED)
    steps = (2 ** (bits - 1) - 1) / CLIP
    update = updates()[0]
    update *= CLIP / float(update.norm())
    drawn = [plan.bounded.integers(update, prg) for _ in range(60)]
    assert all(int(np.dot(one, one)) <= plan.bound**2 for one in drawn)
    assert len({one.tobytes() for one in drawn}) == 60
    mean = torch.from_numpy(np.mean(drawn, axis=0))
    error = float((mean - steps * update.double()).norm())
    # Without bias, every entry's mean of 60 has a variance of at most ¼ / 60.
    assert error < 1.2 * math.sqrt(SIZE / 4 / 60) < 0.5 * math.sqrt(SIZE / 4)


def test_roundings_beyond_the_bound_are_drawn_again(monkeypatch):
    plan = shares(bits=4, noise_multiplier=3.0)
    prg = Prg(SEED)
    update = torch.full((SIZE,), CLIP / math.sqrt(SIZE))
    likely = [int(np.dot(one, one)) for one in (plan.bounded.integers(update, prg) for _ in range(50))]
    # A bound in the middle of what the norms are: half of the first roundings exceed it, and none is sent.
    middle = math.sqrt(sorted(likely)[25])
    monkeypatch.setitem(vars(plan.bounded), "bound", middle)
    again = [int(np.dot(one, one)) for one in (plan.bounded.integers(update, prg) for _ in range(50))]
    assert max(again) <= middle**2 + 1e-6 < max(likely)


def test_a_huge_update_is_clipped_and_the_sum_does_not_wrap():
    plan = shares(noise_multiplier=0.02)
    total = opened(plan, CLIENTS, scale=1e6)
    clipped = sum(update.double() * (CLIP / float(update.norm())) for update in updates())
    assert float((total - clipped).norm()) < 0.02 * CLIP * math.sqrt(SIZE) * 1.3


@pytest.mark.parametrize("noise", KINDS)
def test_the_ring_holds_the_sum_and_the_largest_noise(noise):
    plan = shares(noise=noise, noise_multiplier=4.0)
    quiet = shares(noise=noise, noise_multiplier=0.01)
    std = 4.0 * (2**15 - 1) * math.sqrt(CLIENTS / FEWEST)
    # 2^-60 over 3,000 entries are ten standard deviations.
    assert 9.5 * std < CLIENTS * plan.encoding.headroom < 11 * std
    assert plan.encoding.ring.bits > quiet.encoding.ring.bits
    worst = CLIENTS * (2**15 - 1) + CLIENTS * plan.encoding.headroom
    assert worst < 2 ** (plan.encoding.ring.bits - 1)


@pytest.mark.parametrize("noise", KINDS)
def test_epsilon_is_that_of_who_really_finished(noise):
    plan = shares(noise=noise)
    spent = [privacy_spent([plan.event(finished)], 1e-5) for finished in range(1, CLIENTS + 1)]
    assert all(fewer > more for fewer, more in pairwise(spent))
    # The noise was provisioned for the fewest: they have the Gaussian's ε, but for rounding.
    gaussian = privacy_spent([SampledGaussian(1.0)], 1e-5)
    assert gaussian < spent[FEWEST - 1] < 1.02 * gaussian


@pytest.mark.parametrize("noise", KINDS)
def test_masked_sums_carry_the_noise_of_those_who_finished(noise):
    plan = shares(noise=noise, noise_multiplier=0.5)
    ring, words = (
        plan.encoding.ring,
        [plan.encode(update, Prg(SEED).derive("client", i)) for i, update in enumerate(updates())],
    )
    policy = Policy(FEWEST, Assumption(corrupt=0.1, dropped=0.2, lying=False))
    ledger = Ledger()
    spent = []
    for missing in ((), (3, 11, 19)):
        protocol = replace(
            MaskedSum.among(CLIENTS, policy), lost=lambda client, stage, m=missing: client in m and stage is Stage.MASK
        )
        summed = protocol.sum(ring, SIZE, range(CLIENTS), words.__getitem__)
        plain = PlainSum().sum(ring, SIZE, summed.survivors, words.__getitem__)
        assert np.array_equal(summed.total, plain.total)
        assert len(summed.survivors) == CLIENTS - len(missing)
        clipped = sum(updates()[i].double() * min(1, CLIP / float(updates()[i].norm())) for i in summed.survivors)
        noised = plan.encoding.decode(summed.total)[0].double() - clipped
        stated = (0.5 * CLIP) ** 2 * len(summed.survivors) / FEWEST
        assert float((noised**2).mean()) == pytest.approx(stated, rel=0.15)
        ledger.spend(f"missing {len(missing)}", plan.event(len(summed.survivors)), "round 1")
        spent.append(ledger.epsilon(f"missing {len(missing)}", 1e-5))
    assert spent[0] < spent[1] < privacy_spent([plan.event(FEWEST)], 1e-5)


@pytest.mark.parametrize("noise", KINDS)
def test_shares_that_are_known_do_not_count(noise):
    alone, colluding = shares(noise=noise), shares(noise=noise, colluding=4)
    assert colluding.share.variance == pytest.approx(alone.share.variance * 16 / 12)
    same = privacy_spent([alone.event(FEWEST)], 1e-5), privacy_spent([colluding.event(FEWEST)], 1e-5)
    assert same[0] == pytest.approx(same[1], rel=1e-6)
    with pytest.raises(InputError, match="finished=4"):
        colluding.event(4)
    with pytest.raises(InputError, match=f"finished={CLIENTS + 1}"):
        colluding.event(CLIENTS + 1)


@pytest.mark.parametrize("noise", KINDS)
def test_noise_is_found_for_a_target(noise):
    plan = calibrated(6.0, 1e-5, 25, lambda z: shares(noise_multiplier=z, noise=noise))
    assert privacy_spent([plan.event(FEWEST, 25)], 1e-5) <= 6.0
    less = replace(plan, noise_multiplier=0.999 * plan.noise_multiplier)
    assert privacy_spent([less.event(FEWEST, 25)], 1e-5) > 6.0


def test_an_impossible_target_is_refused():
    with pytest.raises(InputError, match="epsilon"):
        calibrated(0.0, 1e-5, 1, lambda z: shares(noise_multiplier=z))
    with pytest.raises(InputError, match="choose fewer bits"):
        calibrated(1e-4, 1e-5, 1000, lambda z: shares(noise_multiplier=z))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fewest": 0}, "fewest=0"),
        ({"fewest": 21}, "fewest=21"),
        ({"colluding": 16}, "colluding=16"),
        ({"colluding": -1}, "colluding=-1"),
        ({"noise_multiplier": 0.0}, "noise_multiplier=0.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"noise": "laplace"}, "noise='laplace'"),
        ({"added_by": "nobody"}, "added_by='nobody'"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"clip": math.inf}, "clip=inf"),
        ({"size": 0}, "size=0"),
        ({"bits": 1}, "bits=1"),
        ({"bits": 24, "clients": 1000}, "overflow"),
        ({"bits": 2, "noise": "discrete-gaussian"}, "share_variance=0.0625"),
    ],
)
def test_a_setting_out_of_range_is_named(changes, named):
    with pytest.raises(InputError, match=named):
        shares(**changes)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_refused(value):
    update = torch.zeros(SIZE)
    update[7] = value
    with pytest.raises(RangeError, match="NaN or infinity"):
        shares().encode(update, Prg(SEED))


def test_an_update_of_another_shape_is_refused():
    with pytest.raises(InputError, match="shape"):
        shares().encode(torch.zeros(SIZE + 1), Prg(SEED))


@pytest.mark.parametrize("by", ["clients", "servers"])
def test_noise_too_fine_to_draw_is_refused_and_fewer_bits_draw_it(by):
    given = {"clients": 3, "fewest": 2, "noise_multiplier": 8.0, "added_by": by}
    with pytest.raises(InputError, match=r"bits=24.*choose fewer bits"):
        shares(bits=24, **given)
    bits = fitting_bits(24, 8.0, 2 if by == "clients" else 1)
    plan = shares(bits=bits, **given)
    assert LARGEST_VARIANCE / 5 < plan.share.variance <= LARGEST_VARIANCE
    with pytest.raises(InputError, match=f"bits={bits + 1}"):
        shares(bits=bits + 1, **given)
    assert fitting_bits(16, 0.01, 1) == 16
    assert fitting_bits(16, 1e9, 1) == 2


def test_alice_and_bob_each_add_what_is_needed_alone():
    plan = shares(added_by="servers")
    std = plan.bounded.norm
    assert plan.share.variance == pytest.approx(std**2)
    assert all(plan.event(finished) == plan.event(1) for finished in range(1, CLIENTS + 1))
    gaussian = privacy_spent([SampledGaussian(1.0)], 1e-5)
    assert gaussian < privacy_spent([plan.event(FEWEST)], 1e-5) < 1.02 * gaussian
    # Clients add none.
    assert np.array_equal(plan.integers(updates()[0], Prg(SEED)), plan.bounded.integers(updates()[0], Prg(SEED)))
    drawn = np.concatenate([plan.server_noise(Prg(SEED).derive("server", i)) for i in range(2)]).astype(float)
    assert 1e-6 < stats.chi2.cdf(float((drawn**2).sum()) / std**2, 2 * SIZE) < 1 - 1e-6
    # The ring holds both servers' noise, and no more than that.
    assert 2 * 9.5 * std / 2**0.5 < CLIENTS * plan.encoding.headroom < 2 * 11 * std / 2**0.5
    with pytest.raises(InputError, match="the clients of this sum"):
        shares().server_noise(Prg(SEED))
