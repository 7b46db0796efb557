"""Federated runs whose server sees sums only."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from tacit import CentralDP, federate
from tacit.data.examples import Examples
from tacit.dp.clipping import AdaptiveClipping
from tacit.errors import InputError, TrainingError
from tacit.federated.algorithm import Algorithm
from tacit.federated.compression import Compressed
from tacit.federated.compression_schemes import TopK
from tacit.federated.devices import AlwaysOn, Fleet, Speeds
from tacit.federated.devices_schedule import RoundPolicy
from tacit.federated.ditto import Ditto
from tacit.federated.fedavg import FedAvg, capped, uniform
from tacit.federated.fedopt import fed_adagrad, fed_adam, fed_avg_m, fed_yogi
from tacit.federated.fedprox import FedProx
from tacit.federated.personal import PersonalLayers
from tacit.federated.robust import ClippedMean, Krum, TrimmedMean, coordinate_median
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


def close(secure: FederatedRun, plain: FederatedRun, tolerance: float) -> None:
    """Both trained the same, to the rounding: models, cohorts, examples, losses."""
    wanted = plain.model.state_dict()
    for name, value in secure.model.state_dict().items():
        scale = max(1.0, float(wanted[name].abs().max()))
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=tolerance * scale, msg=f"{name} differs")
    for ours, theirs in zip(secure.history, plain.history, strict=True):
        assert (ours.cohort, ours.examples) == (theirs.cohort, theirs.examples)
        assert ours.train_loss == pytest.approx(theirs.train_loss, abs=1e-3)
        assert ours.bytes_down > theirs.bytes_down


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))


UNIT = CLIP / 2**19
"""What an entry is rounded to at 20 bits."""
# n / s over a sum of weights of n / 4 at least, in three rounds. Adaptive steps divide by what was rounded.
PLAIN = {
    "fedavg": (FedAvg(batch_size=4), 60 * UNIT),
    "uniform": (FedAvg(batch_size=4, weighting=uniform), 60 * UNIT),
    "capped": (FedAvg(batch_size=4, weighting=capped(7)), 60 * UNIT),
    "falling": (FedAvg(batch_size=4, weighting=lambda n: 1 / n), 60 * UNIT),
    "fedprox": (FedProx(batch_size=4, mu=0.1), 60 * UNIT),
    "momentum": (fed_avg_m(FedAvg(batch_size=4)), 120 * UNIT),
    "adam": (fed_adam(FedAvg(batch_size=4), server_lr=0.05), 1e-4),
    "yogi": (fed_yogi(FedAvg(batch_size=4), server_lr=0.05), 1e-4),
    "adagrad": (fed_adagrad(FedAvg(batch_size=4), server_lr=0.05), 1e-4),
    "top-k": (Compressed(FedAvg(batch_size=4), TopK(0.5)), 60 * UNIT),
    # The controls are rounded twenty times as coarsely. Without them the weights would be off by 0.02.
    "scaffold": (Scaffold(batch_size=4), 200 * UNIT),
    "scaffold and momentum": (fed_avg_m(Scaffold(batch_size=4)), 400 * UNIT),
    "scaffold, compressed": (Compressed(Scaffold(batch_size=4), TopK(0.5)), 200 * UNIT),
    "ditto": (Ditto(batch_size=4), 60 * UNIT),
}


@pytest.mark.parametrize(("algorithm", "tolerance"), PLAIN.values(), ids=PLAIN.keys())
def test_a_masked_run_is_the_plain_run_to_the_rounding(algorithm: Algorithm, tolerance: float) -> None:
    masked = run(algorithm=algorithm, secure_sum=SecureMean(MaskedSum.among(6, Policy(3)), CLIP, 20))
    close(masked, run(algorithm=algorithm), tolerance)


NORMED = {
    "fedavg": FedAvg(batch_size=3),
    "scaffold": Scaffold(batch_size=3),
    "fedper": PersonalLayers(FedAvg(batch_size=3), ("3",)),
    "fedbn": PersonalLayers(FedAvg(batch_size=3), ("1",)),
    "ditto": Ditto(batch_size=3),
}


@pytest.mark.parametrize("algorithm", NORMED.values(), ids=NORMED.keys())
def test_batch_normalisation_goes_through_the_sum(algorithm: Algorithm) -> None:
    # Of sizes that 3 divides, for no batch of one.
    clients = [examples(n, n) for n in (9, 12, 21, 6, 12, 9)]
    settings = {"model": normed(), "clients": clients, "algorithm": algorithm}
    plain = run(**settings)
    masked = run(**settings, secure_sum=SecureMean(MaskedSum.among(6, Policy(3)), 2.0, 20))
    # Counters are the largest in the plain mean, and the mean, rounded up, in the sum.
    counters = {name for name, _ in plain.model.named_buffers() if name.endswith("num_batches_tracked")}
    for name in counters:
        masked.model.get_buffer(name).clamp_(min=plain.model.get_buffer(name))
    close(masked, plain, 3e-4)


def test_statistics_keep_their_digits_whatever_their_size() -> None:
    clients = [Examples(1000 * own.inputs, own.targets) for own in (examples(n, n) for n in (9, 12, 21, 6, 12))]
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    settings = {"model": model, "clients": clients, "algorithm": FedAvg(batch_size=3), "cohort": 5}
    plain, masked = run(**settings), run(**settings, secure_sum="masked")
    means, variances = (plain.model.get_buffer(f"0.running_{which}") for which in ("mean", "var"))
    assert means.min() > 100
    assert variances.min() > 1e4
    torch.testing.assert_close(masked.model.get_buffer("0.running_mean"), means, rtol=1e-6, atol=0)
    torch.testing.assert_close(masked.model.get_buffer("0.running_var"), variances, rtol=1e-6, atol=0)


def test_counters_become_their_mean_rounded_up() -> None:
    clients = [examples(3 * batches, batches) for batches in (1, 2, 2, 4)]
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    settings = {"model": model, "clients": clients, "algorithm": FedAvg(batch_size=3), "cohort": 4, "rounds": 1}
    assert int(run(**settings, secure_sum="masked").model.get_buffer("0.num_batches_tracked")) == 3
    assert int(run(**settings).model.get_buffer("0.num_batches_tracked")) == 4


def test_clipped_means_are_sums_of_what_clients_clip_themselves() -> None:
    algorithm = FedAvg(batch_size=4, mean=ClippedMean(0.05))
    plain = run(algorithm=algorithm)
    masked = run(algorithm=algorithm, secure_sum=SecureMean(MaskedSum.among(6, Policy(3)), bits=20))
    assert float((weights(plain) - weights(run())).norm()) > 0.05
    torch.testing.assert_close(weights(masked), weights(plain), rtol=0, atol=2e-5)


def test_an_adapting_bound_has_its_count_in_the_sum() -> None:
    private = CentralDP(0.1, 1e-3, noise_multiplier=0.5, adaptive=AdaptiveClipping(0.3, 2.0, 1.0), noise_seed=3)
    # At 24 bits: what an update is shrunk by, to leave room for rounding, is too little to change who is within.
    secure = SecureMean(MaskedSum.among(6, Policy(3)), 0.5, 24)
    plain, masked = run(privacy=private), run(privacy=private, secure_sum=secure)
    torch.testing.assert_close(weights(masked), weights(plain), rtol=0, atol=1e-4)
    fixed = run(privacy=replace(private, adaptive=None))
    assert float((weights(plain) - weights(fixed)).norm()) > 0.01


def test_an_update_that_cannot_be_summed_is_left_out_and_says_why() -> None:
    poisoned = [*CLIENTS[:5], Examples(torch.full((10, 6), 1e16), CLIENTS[4].targets)]
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    history = run(model=model, clients=poisoned, cohort=6, algorithm=FedAvg(batch_size=4), secure_sum="masked").history
    for record in history:
        assert record.cohort == (0, 1, 2, 3, 4)
        assert "buffer 0.running_mean is not finite or beyond" in record.lost[5]


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
        def sum(self, ring: Ring, length: int, cohort: Sequence[int], vector_of: VectorOf, *settings: object) -> Summed:
            def watched(client: int) -> Words | None:
                words = vector_of(client)
                assert words is not None
                norms.append(float(torch.from_numpy(ring.signed(words)[:21] * unit).norm()))
                return words

            return super().sum(ring, length, cohort, watched, *settings)

    norms: list[float] = []
    unit = 0.1 / (2**7 - 1)
    private = CentralDP(clip=0.1, delta=1e-3, noise_multiplier=0.5, noise_seed=3)
    run(privacy=private, secure_sum=SecureMean(Watching(), 0.1, 8), cohort=6, rounds=5)
    assert len(norms) == 30
    assert 0.09 < max(norms) <= 0.1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"algorithm": FedAvg(mean=coordinate_median)}, "reveals no single update, which coordinate_median needs"),
        ({"algorithm": FedAvg(mean=Krum(1))}, r"which Krum\(byzantine=1, keep=1\) needs"),
        ({"algorithm": Compressed(FedAvg(mean=TrimmedMean()), TopK())}, "which TrimmedMean"),
        ({"algorithm": PersonalLayers(FedAvg(mean=TrimmedMean()), ("weight",))}, "which TrimmedMean"),
        ({"model": normed(), "algorithm": FedAvg(mean=ClippedMean(1.0))}, "ClippedMean.*median of buffers"),
        ({"algorithm": Scaffold(mean=ClippedMean(1.0))}, "ClippedMean.*nothing beside the model"),
        ({"secure_sum": "shredded"}, "secure_sum='shredded'"),
        ({"clients": CLIENTS[:3], "cohort": 3}, "3"),
    ],
)
def test_what_a_secure_sum_cannot_carry_is_refused_by_name(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises((InputError, TrainingError), match=f"(?i){complaint}"):
        run(**({"secure_sum": "masked"} | changes))
