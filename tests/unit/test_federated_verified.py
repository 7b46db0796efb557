"""Federated runs whose two servers verify the norm of every update on shares."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tacit import CentralDP, DistributedDP, SumSettings, federate
from tacit.data.examples import Examples
from tacit.dp.clipping import AdaptiveClipping
from tacit.errors import InputError, TrainingError
from tacit.federated.compression import Compressed
from tacit.federated.compression_schemes import Float16
from tacit.federated.fedavg import FedAvg
from tacit.federated.fedopt import fed_avg_m
from tacit.federated.fedprox import FedProx
from tacit.federated.robust import ClippedMean
from tacit.federated.scaffold import Scaffold
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.interface import Summed, VectorOf
from tacit.federated.secure_sum.masked import MaskedSum
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.secure_sum.ring import Ring, Words
from tacit.federated.secure_sum.shared import APART, TOO_LONG, SharedSum
from tacit.federated.secure_sum.shared_bounds import SLACK
from tacit.federated.secure_sum.shared_client import Parts
from tacit.federated.secure_sum.shared_messages import Terms
from tacit.runtimes.simulation import FederatedRun

NORM, D = 0.05, 21


def examples(n: int, seed: int = 0) -> Examples:
    g = torch.Generator().manual_seed(seed)
    return Examples(torch.rand(n, 6, generator=g), torch.randint(3, (n,), generator=g))


CLIENTS = [examples(n, n) for n in (8, 12, 20, 6, 10, 9)]
CLIPPED = FedAvg(batch_size=4, mean=ClippedMean(NORM))


def run(**changes: object) -> FederatedRun:
    given = {"model": nn.Linear(6, 3), "clients": CLIENTS, "algorithm": CLIPPED, "rounds": 2, "cohort": 6}
    given |= {"solver": "plain", "secure_sum": SumSettings("shared", 3, verified=True)}
    return federate(**(given | changes))


def weights(run: FederatedRun) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


class Cheated(SharedSum):
    """A shared sum to which client 2 sends what `vector` makes of its integers."""

    vector: Callable[[NDArray[np.int64], Ring, int], NDArray[np.int64]]

    def sum(self, ring: Ring, length: int, cohort: Sequence[int], vector_of: VectorOf, *rest: object) -> Summed:
        def sent(client: int) -> Words | None:
            words = vector_of(client)
            if client != 2 or words is None:
                return words
            return ring.residues(type(self).vector(ring.signed(words), ring, self.bound))

        return super().sum(ring, length, cohort, sent, *rest)


@pytest.mark.parametrize(
    "algorithm",
    [
        CLIPPED,
        FedProx(batch_size=4, mu=0.1, mean=ClippedMean(NORM)),
        fed_avg_m(CLIPPED),
        Compressed(CLIPPED, Float16()),
    ],
    ids=["fedavg", "fedprox", "momentum", "float16"],
)
def test_honest_clients_give_the_clipped_mean(algorithm: FedAvg) -> None:
    plain, verified = run(algorithm=algorithm, secure_sum=None), run(algorithm=algorithm)
    torch.testing.assert_close(weights(verified), weights(plain), rtol=0, atol=1e-5)
    assert float((weights(plain) - weights(run(algorithm=FedAvg(batch_size=4), secure_sum=None))).norm()) > NORM
    assert all(record.cohort == tuple(range(6)) and not record.lost for record in verified.history)
    assert all((record.examples, record.train_loss) == (0, None) for record in verified.history)


def zeros(at: dict[int, int], size: int = D) -> NDArray[np.int64]:
    result = np.zeros(size, np.int64)
    for place, value in at.items():
        result[place] = value
    return result


def wrapping(bits: int) -> NDArray[np.int64]:
    """Two or four entries of an eighth of the ring: no square is 0 modulo 2^b, but their sum is."""
    count = 2 if bits % 2 else 4
    half = (bits - count.bit_length() + 1) // 2
    entry = (1 << (bits - 3)) + (1 << half)
    assert entry**2 % (1 << bits) != 0
    assert count * entry**2 % (1 << bits) == 0
    return zeros(dict.fromkeys(range(count), entry))


CHEATS = {
    # Of twice the length, and of a hundred thousand times.
    "twice": lambda own, ring, bound: zeros({0: 2 * bound}),
    "too long by far": lambda own, ring, bound: zeros({0: 1 << (ring.bits - 1)}),
    "spread": lambda own, ring, bound: np.full(D, math.ceil(SLACK * bound / math.sqrt(D)) + 1),
    # Squares, and sums of squares, that are 0 modulo 2^b.
    "a square that wraps": lambda own, ring, bound: zeros({3: 1 << (ring.bits - 2)}),
    "squares that wrap together": lambda own, ring, bound: wrapping(ring.bits),
    "uniform": lambda own, ring, bound: np.random.default_rng(1).integers(0, 1 << ring.bits, D),
}


@pytest.mark.parametrize("vector", CHEATS.values(), ids=CHEATS.keys())
def test_an_update_beyond_the_norm_is_left_out_unseen_and_the_history_says_so(vector: object) -> None:
    secure = SecureMean(type("Cheating", (Cheated,), {"vector": staticmethod(vector)}).among(6, 3), verified=True)
    history = run(secure_sum=secure).history
    for record in history:
        assert record.cohort == (0, 1, 3, 4, 5)
        assert record.lost == {2: TOO_LONG}
    without = [
        own if client != 2 else Examples(own.inputs * math.nan, own.targets) for client, own in enumerate(CLIENTS)
    ]
    torch.testing.assert_close(
        weights(run(secure_sum=secure)), weights(run(clients=without, secure_sum=None)), rtol=0, atol=1e-5
    )


def test_the_same_cheats_spoil_a_sum_that_is_not_verified() -> None:
    cheating = type(
        "Cheating", (Cheated,), {"vector": staticmethod(lambda own, ring, bound: zeros({0: 9000}, len(own)))}
    )
    secure = SecureMean(cheating.among(6, 3))
    assert all(record.cohort == tuple(range(6)) for record in run(secure_sum=secure).history)
    assert float((weights(run(secure_sum=secure)) - weights(run(secure_sum=None))).abs().max()) > 1e-3


def flipped(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


MALFORMED = {
    "a box that was changed": (lambda parts, _: Parts(flipped(parts.alice), parts.bob), "alice refused its part"),
    "the other box": (lambda parts, _: Parts(parts.alice, flipped(parts.bob)), "bob refused its part"),
    "no frame": (lambda parts, _: Parts(b"nonsense", parts.bob), "alice refused its part"),
    "too short": (lambda parts, _: Parts(parts.alice, parts.bob[:-8]), "bob refused its part"),
    "swapped": (lambda parts, _: Parts(parts.bob, parts.alice), "refused its part"),
    "of two uploads": (lambda parts, again: Parts(parts.alice, again.bob), APART),
}


@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize(("change", "reason"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_part_costs_its_sender_the_round(
    change: Callable[[Parts, Parts], Parts], reason: str, verified: bool
) -> None:
    class Malformed(SharedSum):
        def parts_of(self, terms: Terms, number: int, client: int, words: Words) -> Parts:
            made = super().parts_of(terms, number, client, words)
            return made if client != 4 else change(made, super().parts_of(terms, number, client, words))

    secure = SecureMean(Malformed.among(6, 3), verified=verified)
    for record in run(secure_sum=secure).history:
        assert record.cohort == (0, 1, 2, 3, 5)
        assert record.lost.keys() == {4}
        assert reason in record.lost[4]


def test_too_few_within_the_norm_reveal_nothing() -> None:
    class Cheating(SharedSum):
        def sum(self, ring: Ring, length: int, cohort: Sequence[int], vector_of: VectorOf, *rest: object) -> Summed:
            def sent(client: int) -> Words | None:
                words = vector_of(client)
                return words if client < 2 else ring.residues(zeros({0: 2 * self.bound}))

            return super().sum(ring, length, cohort, sent, *rest)

    opened = []
    with pytest.raises(TrainingError, match="2 vectors were accepted and 3 are needed"):
        run(rounds=3, secure_sum=SecureMean(Cheating.among(6, 3), verified=True), on_round=opened.append)
    assert all(record.cohort == () for record in opened)


def test_central_privacy_whose_bound_is_verified_keeps_it_after_rounding() -> None:
    norms: list[float] = []

    class Watching(SharedSum):
        def sum(self, ring: Ring, length: int, cohort: Sequence[int], vector_of: VectorOf, *rest: object) -> Summed:
            def sent(client: int) -> Words | None:
                words = vector_of(client)
                if words is not None:
                    norms.append(float(np.linalg.norm(ring.signed(words)) / self.bound))
                return words

            return super().sum(ring, length, cohort, sent, *rest)

    private = CentralDP(NORM, 1e-3, noise_multiplier=0.5, noise_seed=3)
    plain = run(algorithm=FedAvg(batch_size=4), privacy=private, secure_sum=None)
    secure = SecureMean(Watching.among(6, 3), bits=8, verified=True)
    verified = run(algorithm=FedAvg(batch_size=4), privacy=private, secure_sum=secure)
    torch.testing.assert_close(weights(verified), weights(plain), rtol=0, atol=2e-3)
    assert verified.privacy_spent == plain.privacy_spent
    assert 0.9 < max(norms) <= 1


def test_distributed_privacy_and_verified_norms_go_together() -> None:
    private = DistributedDP(NORM, 1e-3, noise_multiplier=1e-4, noise_seed=3)
    cheating = type("Cheating", (Cheated,), {"vector": staticmethod(CHEATS["squares that wrap together"])})
    secure = SecureMean(cheating.among(6, 3), bits=12, verified=True)
    ran = run(algorithm=FedAvg(batch_size=4), privacy=private, secure_sum=secure)
    assert all(record.cohort == (0, 1, 3, 4, 5) for record in ran.history)
    without = [
        own if client != 2 else Examples(own.inputs * math.nan, own.targets) for client, own in enumerate(CLIENTS)
    ]
    torch.testing.assert_close(weights(ran), weights(run(clients=without, secure_sum=None)), rtol=0, atol=1e-4)


def test_the_smallest_cohort_has_the_room_to_verify() -> None:
    plain = run(clients=CLIENTS[:3], cohort=3, secure_sum=None)
    torch.testing.assert_close(weights(run(clients=CLIENTS[:3], cohort=3)), weights(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"algorithm": FedAvg(batch_size=4)}, r"one that every client clips to: FedAvg\(mean=ClippedMean"),
        ({"algorithm": Scaffold(mean=ClippedMean(1.0))}, "nothing beside the model"),
        ({"secure_sum": SumSettings("masked", 3, verified=True)}, "take two servers"),
        ({"secure_sum": SumSettings("shared", 3, clip=1.0, verified=True)}, r"clip=1\.0.*leave clip out"),
        ({"secure_sum": SumSettings("shared", 3, bits=24, verified=True)}, "rings of up to 26 bits"),
        (
            {
                "algorithm": FedAvg(),
                "privacy": CentralDP(0.1, 1e-3, 1.0, adaptive=AdaptiveClipping(count_noise=5.0)),
            },
            "use a bound that does not adapt",
        ),
    ],
)
def test_what_cannot_be_verified_is_refused_by_name(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        run(**changes)
    with pytest.raises(InputError, match="take two servers"):
        SecureMean(MaskedSum.among(6, Policy(3)), verified=True)
