"""Federated runs whose server sees sums only."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from tacit import CentralDP, federate
from tacit.data.examples import Examples
from tacit.errors import InputError, TrainingError
from tacit.federated.compression import Compressed
from tacit.federated.compression_schemes import TopK
from tacit.federated.devices import AlwaysOn, Fleet, Speeds
from tacit.federated.devices_schedule import RoundPolicy
from tacit.federated.fedavg import FedAvg, uniform
from tacit.federated.fedopt import fed_adam
from tacit.federated.fedprox import FedProx
from tacit.federated.robust import coordinate_median
from tacit.federated.scaffold import Scaffold
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.interface import PlainSum, Summed, VectorOf
from tacit.federated.secure_sum.masked import MaskedSum
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.secure_sum.ring import Ring, Words
from tacit.federated.secure_sum.server import Stage
from tacit.federated.secure_sum.shared import SharedSum
from tacit.runtimes.federation import Devices
from tacit.runtimes.simulation import FederatedRun


def examples(n: int, seed: int = 0) -> Examples:
    g = torch.Generator().manual_seed(seed)
    return Examples(torch.rand(n, 6, generator=g), torch.randint(3, (n,), generator=g))


CLIENTS = [examples(n, n) for n in (8, 12, 20, 6, 10, 9)]
CLIP = 0.25


def run(**changes: object) -> FederatedRun:
    settings = {"model": nn.Linear(6, 3), "clients": CLIENTS, "algorithm": FedAvg(batch_size=4), "rounds": 3}
    settings |= {"cohort": 5, "test": examples(40, 99), "solver": "plain"}
    return federate(**(settings | changes))


def weights(run: FederatedRun) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.mark.parametrize(
    "algorithm",
    [
        FedAvg(batch_size=4),
        FedAvg(batch_size=4, weighting=uniform),
        FedProx(batch_size=4, mu=0.1),
        fed_adam(FedAvg(batch_size=4), server_lr=0.05),
        Compressed(FedAvg(batch_size=4), TopK(0.5)),
    ],
    ids=["fedavg", "uniform", "fedprox", "adam", "top-k"],
)
def test_a_masked_run_is_the_plain_run_to_the_rounding(algorithm: FedAvg) -> None:
    plain = run(algorithm=algorithm)
    bits = 20
    masked = run(algorithm=algorithm, secure_sum=SecureMean(MaskedSum.among(6, Policy(3)), CLIP, bits))
    unit = CLIP / 2 ** (bits - 1)
    # n/s over a sum of weights of at least n/4; a factor of 3 rounds and of the adaptive step on top.
    torch.testing.assert_close(
        weights(masked), weights(plain), rtol=0, atol=60 * unit if "dam" not in repr(algorithm) else 0.02
    )
    for ours, theirs in zip(masked.history, plain.history, strict=True):
        assert (ours.cohort, ours.examples) == (theirs.cohort, theirs.examples)
        assert ours.train_loss == pytest.approx(theirs.train_loss, abs=1e-3)
        assert ours.bytes_down > theirs.bytes_down


def test_masks_leave_no_trace_in_the_sum() -> None:
    runs = [
        run(secure_sum=SecureMean(protocol, CLIP))
        for protocol in (PlainSum(), MaskedSum.among(6, Policy(3)), SharedSum.among(6, 3))
    ]
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert torch.equal(weights(runs[0]), weights(runs[2]))
    again = run(secure_sum=SecureMean(MaskedSum.among(6, Policy(3)), CLIP), processes=2)
    assert torch.equal(weights(runs[1]), weights(again))


@pytest.mark.parametrize("protocol", ["masked", "shared"])
def test_by_name(protocol: str) -> None:
    secure = run(secure_sum=protocol)
    torch.testing.assert_close(weights(secure), weights(run()), rtol=0, atol=5e-3)
    assert [record.cohort for record in secure.history] == [record.cohort for record in run().history]


def test_clients_that_drop_out_of_the_protocol_are_recovered_and_named() -> None:
    lost = {(0, Stage.MASK), (3, Stage.CONFIRM)}
    protocol = MaskedSum(
        MaskedSum.among(6, Policy(3)).identities, Policy(3), lost=lambda client, stage: (client, stage) in lost
    )
    history = run(cohort=6, secure_sum=SecureMean(protocol, CLIP)).history
    for record in history:
        assert 0 in record.lost
        assert set(record.cohort) | set(record.lost) == set(range(6))
        assert 3 in record.cohort


def test_a_client_that_diverges_drops_out_of_the_sum() -> None:
    poisoned = [*CLIENTS[:5], Examples(torch.full((10, 6), math.nan), CLIENTS[4].targets)]
    history = run(clients=poisoned, cohort=6, secure_sum="masked").history
    assert all(record.cohort == (0, 1, 2, 3, 4) and "not finite" in record.lost[5] for record in history)


def test_below_the_minimum_nothing_is_revealed_and_the_round_fails() -> None:
    secure = SecureMean(MaskedSum.among(6, Policy(5)), CLIP)
    poisoned = [*CLIENTS[:4], *[Examples(torch.full((10, 6), math.nan), CLIENTS[4].targets)] * 2]
    seen: list[str] = []
    with pytest.raises(TrainingError, match="3 rounds in a row"):
        run(clients=poisoned, cohort=6, secure_sum=secure, on_round=lambda record: seen.append(record.note))
    assert len(seen) == 2
    assert all(seen)
    with pytest.raises(TrainingError, match="their policy asks for 5 vectors"):
        run(cohort=4, secure_sum=secure)


def test_devices_that_drop_out_mid_round_drop_out_of_the_protocol() -> None:
    devices = Devices(Fleet(AlwaysOn(6), speeds=Speeds(examples=10.0, failures=60.0)), RoundPolicy())
    settings = {"cohort": 6, "devices": devices, "rounds": 6}
    plain, masked = run(**settings), run(**settings, secure_sum=SecureMean(MaskedSum.among(6, Policy(3)), CLIP, 20))
    assert any(record.lost for record in plain.history)
    assert [record.cohort for record in plain.history] == [record.cohort for record in masked.history]
    assert [record.lost for record in plain.history] == [record.lost for record in masked.history]


def test_central_privacy_over_a_masked_sum() -> None:
    private = CentralDP(clip=0.1, delta=1e-3, noise_multiplier=0.5, noise_seed=3)
    plain = run(privacy=private)
    masked = run(privacy=private, secure_sum=SecureMean(MaskedSum.among(6, Policy(3)), 0.1, 20))
    torch.testing.assert_close(weights(masked), weights(plain), rtol=0, atol=1e-4)
    assert masked.privacy_spent == plain.privacy_spent
    with pytest.raises(InputError, match=r"may add .* to the norm of an update that is clipped to 0\.1"):
        run(privacy=private, secure_sum=SecureMean(MaskedSum.among(6, Policy(3)), 1.0, 4))


def test_rounding_never_takes_an_update_beyond_the_bound_of_its_noise() -> None:
    class Watching(PlainSum):
        def sum(
            self, ring: Ring, length: int, cohort: Sequence[int], vector_of: VectorOf, application: bytes = bytes(32)
        ) -> Summed:
            def watched(client: int) -> Words | None:
                words = vector_of(client)
                assert words is not None
                norms.append(float(torch.from_numpy(ring.signed(words)[:21] * unit).norm()))
                return words

            return super().sum(ring, length, cohort, watched, application)

    norms: list[float] = []
    unit = 0.1 / (2**7 - 1)
    private = CentralDP(clip=0.1, delta=1e-3, noise_multiplier=0.5, noise_seed=3)
    run(privacy=private, secure_sum=SecureMean(Watching(), 0.1, 8), cohort=6, rounds=5)
    assert len(norms) == 30
    assert 0.09 < max(norms) <= 0.1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"algorithm": Scaffold(batch_size=4)}, "scaffold.* beside the model's update"),
        ({"algorithm": FedAvg(mean=coordinate_median)}, "reveals no single update"),
        (
            {"model": nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))},
            "buffers.*running_mean.*GroupNorm",
        ),
        ({"secure_sum": "shredded"}, "secure_sum='shredded'"),
        ({"clients": CLIENTS[:3], "cohort": 3}, "3"),
    ],
)
def test_what_a_secure_sum_cannot_carry_is_refused_by_name(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises((InputError, TrainingError), match=f"(?i){complaint}"):
        run(**({"secure_sum": "masked"} | changes))
