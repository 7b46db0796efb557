"""Federated runs whose sums carry noise before anybody sees them: what is computed, charged, stopped and refused."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import nn

from tacit import CentralDP, DistributedDP, SumSettings, federate
from tacit.data.examples import Examples
from tacit.dp.accounting import SampledGaussian, privacy_spent
from tacit.dp.ledger import Ledger
from tacit.errors import BudgetExceeded, InputError, TrainingError
from tacit.federated.algorithm import Algorithm, Memory, ServerState, Update
from tacit.federated.compression import Compressed
from tacit.federated.compression_schemes import TopK
from tacit.federated.devices import AlwaysOn, Fleet, Speeds
from tacit.federated.devices_schedule import RoundPolicy
from tacit.federated.distributed_privacy import DistributedPrivacy
from tacit.federated.fedavg import FedAvg, capped
from tacit.federated.fedopt import fed_adam, fed_avg_m
from tacit.federated.fedprox import FedProx
from tacit.federated.personal import PersonalLayers
from tacit.federated.robust import ClippedMean, TrimmedMean
from tacit.federated.scaffold import Scaffold
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.interface import PlainSum, Summed
from tacit.federated.secure_sum.masked import MaskedSum
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.secure_sum.noise_shares import NoiseShares
from tacit.federated.secure_sum.server import Stage
from tacit.federated.secure_sum.shared import SharedSum
from tacit.mpc.steps import Role
from tacit.runtimes.federation import Devices
from tacit.runtimes.simulation import FederatedRun

DELTA, CLIP, BITS, WIDE = 1e-3, 0.1, 12, 50 * 61


def examples(n: int, seed: int = 0, features: int = 6, classes: int = 3) -> Examples:
    g = torch.Generator().manual_seed(seed)
    return Examples(torch.rand(n, features, generator=g), torch.randint(classes, (n,), generator=g))


CLIENTS = [examples(n, n) for n in (8, 12, 20, 6, 10, 9)]


def settings(**changes: object) -> DistributedDP:
    return DistributedDP(**({"clip": CLIP, "delta": DELTA, "noise_multiplier": 1.0, "noise_seed": 5} | changes))


def run(**changes: object) -> FederatedRun:
    given = {"model": nn.Linear(6, 3), "clients": CLIENTS, "algorithm": FedAvg(batch_size=4), "rounds": 3}
    given |= {"cohort": 5, "solver": "plain", "secure_sum": SumSettings(bits=BITS, minimum=4), "privacy": settings()}
    return federate(**(given | changes))


def weights(run: FederatedRun) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def shares(**changes: object) -> NoiseShares:
    given = {"size": 21, "clip": CLIP, "clients": 5, "fewest": 4, "noise_multiplier": 1.0, "colluding": 1, "bits": BITS}
    return NoiseShares(**(given | changes))


ALGORITHMS = {
    "fedavg": (FedAvg(batch_size=4), 2e-4),
    "fedprox": (FedProx(batch_size=4, mu=0.1), 2e-4),
    "momentum": (fed_avg_m(FedAvg(batch_size=4)), 4e-4),
    # Its steps divide by what was rounded.
    "adam": (fed_adam(FedAvg(batch_size=4), server_lr=0.05), 0.02),
    "top-k": (Compressed(FedAvg(batch_size=4), TopK(0.5)), 2e-4),
    "fedper": (PersonalLayers(FedAvg(batch_size=4), ("0",)), 2e-4),
}


@pytest.mark.parametrize("protocol", ["masked", "shared"])
@pytest.mark.parametrize(("algorithm", "tolerance"), ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_next_to_no_noise_leaves_the_mean_of_clipped_updates(
    algorithm: Algorithm, tolerance: float, protocol: str
) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    central = CentralDP(CLIP, DELTA, noise_multiplier=0.0)
    plain = run(model=model, algorithm=algorithm, privacy=central, secure_sum=None)
    noised = run(
        model=model,
        algorithm=algorithm,
        privacy=settings(noise_multiplier=1e-4, delta=1e-5),
        secure_sum=SumSettings(protocol, 4, bits=BITS),
    )
    torch.testing.assert_close(weights(noised), weights(plain), rtol=0, atol=tolerance)
    assert float((weights(plain) - weights(run(model=model, rounds=1, privacy=central, secure_sum=None))).norm()) > 0.01


@pytest.mark.parametrize("noise", ["skellam", "discrete-gaussian"])
@pytest.mark.parametrize("protocol", ["masked", "shared"])
def test_the_released_mean_has_the_noise_that_is_stated(protocol: str, noise: str) -> None:
    clients = [examples(4, seed, 60, 50) for seed in range(6)]
    given = {"model": nn.Linear(60, 50), "clients": clients, "cohort": 6, "rounds": 1}
    # Of no length to speak of: what comes out is noise.
    still = FedAvg(lr=1e-12, batch_size=4)
    private = settings(noise=noise, noise_multiplier=0.7)
    noised = run(**given, algorithm=still, privacy=private, secure_sum=SumSettings(protocol, 4, bits=BITS))
    before = run(**given, algorithm=still, privacy=None, secure_sum=None)
    squares = float((weights(noised) - weights(before)).double().square().sum())
    # Six shares where three of four suffice; or two servers', each of whom suffices.
    stated = (0.7 * CLIP / 6) ** 2 * (6 / 3 if protocol == "masked" else 2)

    def accepted(variance: float) -> bool:
        return 1e-6 < stats.chi2.cdf(squares / variance, WIDE) < 1 - 1e-6

    assert accepted(stated)
    assert not accepted(stated * 1.2)
    assert not accepted(stated / 1.2)


def test_alice_and_bob_add_different_noise_and_another_every_round() -> None:
    drawn = []

    class Watching(SharedSum):
        def sum(self, *given: object) -> Summed:
            noise = self.noise

            def watched(role: Role, length: int) -> object:
                drawn.append(noise(role, length))
                return drawn[-1]

            return SharedSum.sum(replace(self, noise=watched), *given)

    for seed in (5, None):
        run(secure_sum=SecureMean(Watching.among(6, 4), bits=BITS), privacy=settings(noise_seed=seed))
    assert len(drawn) == 12
    assert len({one.tobytes() for one in drawn}) == 12
    assert {len(one) for one in drawn} == {21}


@pytest.mark.parametrize("noise", ["skellam", "discrete-gaussian"])
def test_a_round_is_charged_what_those_who_finished_have_made_of_it(noise: str) -> None:
    lost = {(0, Stage.MASK), (3, Stage.CONFIRM)}
    identities = MaskedSum.among(6, Policy(4)).identities
    protocol = MaskedSum(identities, Policy(4), lost=lambda client, stage: (client, stage) in lost)
    ledger = Ledger()
    ran = run(
        cohort=6, secure_sum=SecureMean(protocol, bits=BITS), privacy=settings(noise=noise), ledger=ledger, rounds=2
    )
    # Client 3 confirmed nothing, but its vector, and its noise, is in the sum.
    assert [record.cohort for record in ran.history] == [(1, 2, 3, 4, 5)] * 2
    assert ledger.events("distributed") == (shares(noise=noise, clients=6).event(5, times=2),)
    whole = run(cohort=6, privacy=settings(noise=noise), rounds=2)
    assert whole.history[-1].epsilon < ran.history[-1].epsilon
    assert whole.history[-1].epsilon == privacy_spent([shares(noise=noise, clients=6).event(6, times=2)], DELTA)
    assert ran.privacy_spent.unit == "client"
    assert ran.privacy_spent.epsilon == ran.history[-1].epsilon > ran.history[0].epsilon > 0


def test_epsilon_of_the_fewest_is_the_gaussians() -> None:
    lost = lambda client, stage: client in (0, 1) and stage is Stage.MASK  # noqa: E731
    protocol = MaskedSum(MaskedSum.among(6, Policy(4)).identities, Policy(4), lost=lost)
    spent = run(
        cohort=6, secure_sum=SecureMean(protocol, bits=BITS), privacy=settings(noise_multiplier=3.0)
    ).privacy_spent
    gaussian = privacy_spent([SampledGaussian(3.0, times=3)], DELTA)
    assert gaussian < spent.epsilon < 1.02 * gaussian


def test_two_servers_noise_does_not_depend_on_who_finished() -> None:
    ledger = Ledger()
    poisoned = [*CLIENTS[:5], Examples(torch.full((10, 6), math.nan), CLIENTS[4].targets)]
    history = run(clients=poisoned, cohort=6, secure_sum=SumSettings("shared", 4, bits=BITS), ledger=ledger).history
    assert all(record.cohort == (0, 1, 2, 3, 4) for record in history)
    assert {record.secure_sum.noised_by for record in history} == {"servers"}
    assert {record.secure_sum.noised_by for record in run().history} == {"clients"}
    std = shares(colluding=0).bounded.norm
    (event,) = ledger.events("distributed")
    assert (event.variance, event.times) == (pytest.approx(std**2), 3)


@pytest.mark.parametrize("protocol", ["masked", "shared", "plain"])
def test_the_event_is_written_before_the_sum_is_opened(protocol: str) -> None:
    ledger, secret = Ledger(), MaskedSum.among(6, Policy(4))
    written: dict[Stage, int] = {}

    def look(client: int, stage: Stage) -> bool:
        written[stage] = len(ledger.events("distributed"))
        return False

    class Closed(Exception):
        pass

    class Refusing(Ledger):
        def spend(self, *_: object, **__: object) -> None:
            raise Closed

    if protocol == "masked":
        run(secure_sum=SecureMean(replace(secret, lost=look), bits=BITS), ledger=ledger, rounds=1)
        assert written == {stage: int(stage in (Stage.CONFIRM, Stage.UNMASK)) for stage in tuple(Stage)[:5]}
    written.clear()
    protocols = {
        "masked": replace(secret, lost=look),
        "shared": SharedSum.among(6, 4),
        "plain": PlainSum(4),
    }
    rounds = []
    with pytest.raises(Closed):
        run(secure_sum=SecureMean(protocols[protocol], bits=BITS), ledger=Refusing(), on_round=rounds.append)
    assert not rounds
    # Nobody was asked to unmask.
    assert Stage.CONFIRM not in written


def test_a_round_that_fails_reveals_nothing_and_costs_nothing() -> None:
    ledger, notes = Ledger(), []
    poisoned = [*CLIENTS[:3], *[Examples(torch.full((10, 6), math.nan), CLIENTS[4].targets)] * 3]
    with pytest.raises(TrainingError, match="3 rounds in a row"):
        run(clients=poisoned, cohort=6, ledger=ledger, on_round=lambda record: notes.append(record))
    assert ledger.events("distributed") == ()
    assert [record.epsilon for record in notes] == [0.0, 0.0]
    assert all(record.note for record in notes)


def test_the_budget_stops_a_run_before_the_round_whose_dearest_outcome_would_exceed_it() -> None:
    twice = [shares().event(5, times=2)]
    likely, dearest = (privacy_spent([*twice, shares().event(finished)], DELTA) for finished in (5, 4))
    assert likely < dearest
    rounds: list[object] = []
    trained: list[int] = []

    class Watched(FedAvg):
        def client_update(self, state: ServerState, *rest: object) -> tuple[Update, Memory]:
            trained.append(state.round + 1)
            return super().client_update(state, *rest)

    watched, private = Watched(batch_size=4), settings(budget=(likely + dearest) / 2)
    # A third round of five would fit, but five are not sure to finish.
    with pytest.raises(BudgetExceeded, match=r"round 3 would take 'distributed' over its privacy budget"):
        run(algorithm=watched, privacy=private, on_round=rounds.append)
    assert len(rounds) == 2
    assert set(trained) == {1, 2}
    run(privacy=settings(budget=1.0001 * dearest))


def test_a_target_is_kept_by_the_fewest_and_is_the_budget() -> None:
    lost = lambda client, stage: client in (0, 1) and stage is Stage.MASK  # noqa: E731
    protocol = MaskedSum(MaskedSum.among(6, Policy(4)).identities, Policy(4), lost=lost)
    target = settings(noise_multiplier=None, target_epsilon=2.0)
    ran = run(cohort=6, secure_sum=SecureMean(protocol, bits=BITS), privacy=target)
    assert 1.99 < ran.privacy_spent.epsilon <= 2.0
    assert run(cohort=6, privacy=target).privacy_spent.epsilon < 1.9
    ledger = Ledger()
    run(cohort=6, secure_sum=SecureMean(protocol, bits=BITS), privacy=replace(target, noise_seed=None), ledger=ledger)
    with pytest.raises(BudgetExceeded, match="round 1"):
        run(cohort=6, privacy=replace(target, noise_seed=None), ledger=ledger)


def test_equal_seeds_repeat_a_run_and_fresh_noise_does_not() -> None:
    assert torch.equal(weights(run()), weights(run(processes=2)))
    masked, shared = run(), run(secure_sum=SumSettings("shared", 4, bits=BITS))
    assert not torch.equal(weights(masked), weights(shared))
    fresh = [run(privacy=settings(noise_seed=None)) for _ in range(2)]
    assert not torch.equal(weights(fresh[0]), weights(fresh[1]))


def test_masks_leave_no_trace_in_the_noised_sum() -> None:
    plain = run(secure_sum=SecureMean(PlainSum(4), bits=BITS))
    assert torch.equal(weights(plain), weights(run()))


def test_nobody_is_told_losses_or_numbers_of_examples() -> None:
    assert all((record.examples, record.train_loss) == (0, None) for record in run().history)


def test_an_update_that_diverged_and_one_of_zero() -> None:
    poisoned = [*CLIENTS[:5], Examples(torch.full((10, 6), math.nan), CLIENTS[4].targets)]
    history = run(clients=poisoned, cohort=6).history
    assert all("not finite" in record.lost[5] and len(record.cohort) == 5 for record in history)
    still = run(algorithm=FedAvg(lr=1e-30, batch_size=4), rounds=1)
    assert weights(still).isfinite().all()


def test_devices_that_drop_out_mid_round_are_drop_outs_of_the_sum() -> None:
    devices = Devices(Fleet(AlwaysOn(6), speeds=Speeds(examples=10.0, failures=60.0)), RoundPolicy())
    ledger = Ledger()
    ran = run(cohort=6, devices=devices, rounds=6, secure_sum=SumSettings(bits=BITS, minimum=3), ledger=ledger)
    finished = [len(record.cohort) for record in ran.history if record.cohort]
    assert min(finished) < 6
    expected = [shares(fewest=3, clients=6).event(n) for n in finished]
    assert ran.privacy_spent.epsilon == pytest.approx(privacy_spent(expected, DELTA), rel=1e-9)


def test_more_finish_than_were_expected() -> None:
    # Over-selection lets cohorts be larger than what the privacy plan expects.
    devices = Devices(Fleet(AlwaysOn(6)), RoundPolicy(over_selection=1.5))
    ran = run(cohort=4, devices=devices, secure_sum=SumSettings(bits=BITS, minimum=4))
    assert {len(record.cohort) for record in ran.history} == {6}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"secure_sum": None}, r"give secure_sum='masked' or 'shared'.*CentralDP"),
        ({"algorithm": FedAvg(weighting=capped(5))}, "weighs clients by their examples"),
        ({"algorithm": Compressed(FedAvg(weighting=lambda n: n**0.5), TopK())}, "weighs clients by their examples"),
        ({"algorithm": Scaffold(batch_size=4)}, "scaffold.control beside the model's update, which no noise"),
        ({"algorithm": FedAvg(mean=TrimmedMean())}, "has to be a plain sum"),
        ({"algorithm": FedAvg(mean=ClippedMean(1.0))}, "has to be a plain sum"),
        ({"model": nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))}, "BatchNorm1d.*GroupNorm"),
        ({"secure_sum": SumSettings(bits=BITS, minimum=6)}, "asks for 6 updates, and 5 clients are expected"),
        ({"secure_sum": SumSettings(bits=BITS, minimum=4, clip=1.0)}, r"clip=1\.0: updates are clipped to a norm here"),
        ({"privacy": settings(noise_multiplier=None, target_epsilon=1e-4, delta=1e-9)}, "in which nothing is left"),
        ({"privacy": settings(colluding=4)}, "colluding=4, fewest=4"),
        (
            {
                "secure_sum": SumSettings(bits=4, minimum=4),
                "privacy": settings(noise="discrete-gaussian", clip=1.0, noise_multiplier=0.05),
            },
            "share_variance=.*finer scale",
        ),
    ],
)
def test_what_distributed_privacy_cannot_do_is_refused_by_name(changes: dict[str, object], complaint: str) -> None:
    ran: list[object] = []
    with pytest.raises(InputError, match=complaint):
        run(**changes, on_round=ran.append)
    assert not ran


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier=0.0: that is no privacy"),
        ({"accountant": "pld"}, "does not know sums with integer noise"),
        ({"noise_multiplier": None}, "either noise_multiplier"),
        ({"target_epsilon": 1.0}, "either noise_multiplier"),
        ({"budget": -1.0}, "epsilon=-1.0"),
        ({"delta": 1.0}, "delta=1.0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        settings(**changes)


def test_updates_without_noise_are_never_combined() -> None:
    private = DistributedPrivacy(FedAvg(), CLIP, shares(clients=4))
    state = private.init(nn.Linear(6, 3), 6)
    raw = Update(torch.zeros(21), {}, 8, 0.5, 0, 1.0)
    with pytest.raises(InputError, match="carry no noise"):
        private.combine([raw, raw])
    secure = SecureMean(MaskedSum.among(6, Policy(3)))
    with pytest.raises(InputError, match="provisioned for another secure sum"):
        secure.check(private, state)
    with pytest.raises(InputError, match="provisioned for another secure sum"):
        SecureMean(SharedSum.among(6, 4)).check(private, state)
    with pytest.raises(InputError, match=r"clipped to 0\.1"):
        DistributedPrivacy(FedAvg(), 2 * CLIP, shares(clients=4))
