"""Robust means: by hand, and against clients that lie."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import Update
from tacit.federated.fedavg import FedAvg, Mean
from tacit.federated.mean import weighted_mean
from tacit.federated.robust import ClippedMean, Krum, TrimmedMean, coordinate_median
from tacit.runtimes.simulation import federate


def update(delta: list[float] | Tensor, examples: int = 1, loss: float = 0.0, count: int = 0) -> Update:
    vector = torch.as_tensor(delta)
    buffers = {"mean": vector[:1].clone(), "count": torch.tensor(count)}
    return Update.of_client(vector, buffers, examples, loss)


FIVE = [
    update([1.0, 50.0], 10, 0.1, 4),
    update([2.0, 40.0], 1000, 0.2, 5),
    update([3.0, -10.0], 10, 0.3, 6),
    update([100.0, 30.0], 10, 9.0, 7),
    update([4.0, 20.0], 10, 0.4, 10**12),
]


def test_medians_by_hand() -> None:
    median = coordinate_median(FIVE)
    assert median.delta.tolist() == [3.0, 30.0]
    assert median.buffers["mean"].tolist() == [3.0]
    assert median.buffers["count"] == 6
    assert median.loss == pytest.approx(0.3)
    assert (median.examples, median.weight) == (1040, 5.0)
    assert median.nbytes == sum(u.nbytes for u in FIVE)
    assert coordinate_median(FIVE[:4]).delta.tolist() == [2.5, 35.0]
    assert coordinate_median(FIVE[:1]).delta.tolist() == [1.0, 50.0]


def test_trimmed_means_by_hand() -> None:
    assert TrimmedMean(0.2)(FIVE).delta.tolist() == [3.0, 30.0]
    assert TrimmedMean(0.01)(FIVE).delta.tolist() == [3.0, 30.0]
    torch.testing.assert_close(TrimmedMean(0.01)(FIVE[:4]).delta, torch.tensor([2.5, 35.0]))
    assert TrimmedMean(0.4)(FIVE).delta.tolist() == [3.0, 30.0]


@pytest.mark.parametrize("m", range(3, 60))
def test_a_tenth_is_a_tenth(m: int) -> None:
    """Of the numbers 0 … m − 1 squared, the mean without ⌈m/10⌉ at each end, in whole numbers."""
    dropped = -(-m // 10)
    kept = [i * i for i in range(m)][dropped : m - dropped]
    combined = TrimmedMean(0.1)(update([float(i * i)]) for i in range(m))
    assert combined.delta.item() == pytest.approx(sum(kept) / len(kept))


def krum_by_hand(vectors: list[list[float]], byzantine: int) -> list[int]:
    """Indices by score, best first; section 4 of Blanchard et al. 2017, in loops."""
    scores = []
    for i, a in enumerate(vectors):
        distances = sorted(math.dist(a, b) ** 2 for j, b in enumerate(vectors) if j != i)
        scores.append(sum(distances[: len(vectors) - byzantine - 2]))
    return sorted(range(len(vectors)), key=scores.__getitem__)


@pytest.mark.parametrize("seed", range(5))
def test_krum_by_hand(seed: int) -> None:
    vectors = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = krum_by_hand(vectors.tolist(), 2)
    updates = [update(vector) for vector in vectors]
    assert torch.equal(Krum(2)(updates).delta, vectors[order[0]])
    torch.testing.assert_close(Krum(2, keep=4)(updates).delta, vectors[order[:4]].mean(0))


def test_clipping_by_hand() -> None:
    combined = ClippedMean(5.0)([update([30.0, 40.0]), update([0.3, -0.4]), update([0.0, 0.0])])
    torch.testing.assert_close(combined.delta, torch.tensor([3.3 / 3, 3.6 / 3]))


def cohort(honest: int, liars: int, lie: Callable[[Tensor], Tensor]) -> tuple[list[Update], Tensor]:
    """Honest updates spread by 0.1 around one truth, then liars who know the honest mean and claim many examples."""
    g = torch.Generator().manual_seed(1)
    truth = torch.randn(200, generator=g)
    updates = [update(truth + 0.1 * torch.randn(200, generator=g), 10) for _ in range(honest)]
    mean = torch.stack([u.delta for u in updates]).mean(0)
    return [*updates, *(update(lie(mean), 1000) for _ in range(liars))], truth


LIES = {
    "huge": lambda mean: torch.full_like(mean, 1e6),
    "opposite": lambda mean: -10 * mean,
    "infinite in effect": lambda mean: torch.full_like(mean, 1e30),
}
HOLDING: dict[str, Mean] = {
    "median": coordinate_median,
    "trimmed": TrimmedMean(0.2),
    "krum": Krum(byzantine=3),
    "multi-krum": Krum(byzantine=3, keep=10),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("mean", HOLDING)
def test_they_hold_where_the_weighted_mean_breaks(mean: str, lie: str) -> None:
    updates, truth = cohort(17, 3, LIES[lie])
    size = float(truth.norm())
    assert float((weighted_mean(updates).delta - truth).norm()) > 5 * size
    assert float((FedAvg(mean=HOLDING[mean]).combine(iter(updates)).delta - truth).norm()) < 0.2 * size


@pytest.mark.parametrize("lie", LIES)
def test_clipping_bounds_the_harm(lie: str) -> None:
    updates, truth = cohort(17, 3, LIES[lie])
    clip = 1.1 * float(truth.norm())
    honest = torch.stack([u.delta for u in updates[:17]]).sum(0) / 20
    assert float((ClippedMean(clip)(updates).delta - honest).norm()) <= 3 / 20 * clip * 1.0001


def test_too_many_liars_do_break_them() -> None:
    updates, truth = cohort(4, 6, LIES["huge"])
    for mean in (coordinate_median, TrimmedMean(0.3), Krum(byzantine=3)):
        assert float((mean(updates).delta - truth).norm()) > 1e3


def test_one_pass_over_the_updates_which_stay_as_they_are() -> None:
    before = [u.delta.clone() for u in FIVE]
    for mean in (coordinate_median, TrimmedMean(0.2), Krum(1), ClippedMean(1.0)):
        mean(iter(FIVE))
    assert all(torch.equal(u.delta, b) for u, b in zip(FIVE, before, strict=True))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: TrimmedMean(0.0), r"share=0\.0: "),
        (lambda: TrimmedMean(0.5), r"share=0\.5: "),
        (lambda: Krum(-1), "byzantine=-1: "),
        (lambda: Krum(1, keep=0), "keep=0: "),
        (lambda: ClippedMean(0.0), r"norm=0\.0: "),
        (lambda: ClippedMean(math.nan), "norm=nan: "),
        (lambda: TrimmedMean(0.4)(FIVE[:2]), "drops 1 of 2 updates at either end, which leaves none"),
        (lambda: Krum(2)(FIVE), "needs 7 updates, but 5 came"),
        (lambda: Krum(1, keep=5)(FIVE), "needs 6 updates, but 5 came"),
        (lambda: coordinate_median([]), "no update to combine"),
        (lambda: Krum(1)(iter([])), "no update to combine"),
        (
            lambda: ClippedMean(1.0)([Update.of_client(torch.ones(2), {}, 1, 0.0, None, {"control": torch.ones(2)})]),
            "also carry control",
        ),
    ],
)
def test_the_impossible_is_refused(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        make()
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Sabotaged(FedAvg):
    """Clients whose first label is out of place send the opposite of what they learned, ten times as large."""

    def client_update(self, state, memory, solver, examples, generator):
        lying = int(examples.targets[0]) == LIAR
        honest = Examples(examples.inputs[1:], examples.targets[1:]) if lying else examples
        update, memory = super().client_update(state, memory, solver, honest, generator)
        return (replace(update, delta=-10 * update.delta) if lying else update), memory


LIAR = 99


@pytest.mark.parametrize(
    ("mean", "learns"),
    [(weighted_mean, False), *((mean, True) for mean in HOLDING.values()), (ClippedMean(1.0), True)],
    ids=["weighted", *HOLDING, "clipped"],
)
def test_training_with_saboteurs(mean: Mean, learns: bool) -> None:
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(1200, 4, generator=g)
    everything = Examples(inputs, (inputs[:, :2].sum(1) > 0).long())
    clients = [everything.subset(torch.arange(40 * k, 40 * k + 40)) for k in range(20)]
    for k in (3, 11, 17):
        clients[k].targets[0] = LIAR
    run = federate(
        nn.Linear(4, 2),
        clients,
        algorithm=Sabotaged(lr=0.3, mean=mean),
        rounds=8,
        cohort=20,
        test=everything.subset(torch.arange(800, 1200)),
        evaluate_every=8,
    )
    assert (run.history[-1].accuracy > 0.9) == learns
