import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tacit.data.partition import dirichlet, iid, label_counts, shards
from tacit.errors import InputError

Split = Callable[[Tensor, int, torch.Generator], list[Tensor]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def balanced(examples: int = 6000, classes: int = 10) -> Tensor:
    return torch.arange(examples) % classes


def entropy(counts: Tensor) -> float:
    """Mean entropy of the clients' class mixtures, in nats."""
    shares = counts / counts.sum(dim=1, keepdim=True)
    return float(torch.special.entr(shares).sum(dim=1).mean())


labels_and_clients = st.lists(st.integers(0, 5), min_size=1, max_size=60).flatmap(
    lambda labels: st.tuples(st.just(torch.tensor(labels)), st.integers(1, len(labels)))
)


@given(
    labels_and_clients,
    st.sampled_from(
        [
            lambda labels, clients, g: iid(labels, clients, g),
            lambda labels, clients, g: shards(labels, clients, g, len(labels) // clients),
            lambda labels, clients, g: shards(labels, clients, g, 1),
            lambda labels, clients, g: dirichlet(labels, clients, 1e-6, g),
            lambda labels, clients, g: dirichlet(labels, clients, 0.5, g),
            lambda labels, clients, g: dirichlet(labels, clients, 1e6, g),
        ]
    ),
    st.integers(0, 2**32),
)
def test_disjoint_covering_non_empty_and_reproducible(case: tuple[Tensor, int], split: Split, seed: int) -> None:
    labels, clients = case
    parts = split(labels, clients, seeded(seed))
    assert len(parts) == clients
    assert all(part.dtype == torch.int64 and len(part) >= 1 for part in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    again = split(labels, clients, seeded(seed))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


@given(labels_and_clients, st.floats(1e-6, 1e6), st.integers(0, 2**32))
def test_iid_and_dirichlet_parts_are_of_equal_size(case: tuple[Tensor, int], alpha: float, seed: int) -> None:
    labels, clients = case
    for parts in (iid(labels, clients, seeded(seed)), dirichlet(labels, clients, alpha, seeded(seed))):
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_another_seed_splits_otherwise() -> None:
    for split in (iid, shards, lambda *a: dirichlet(a[0], a[1], 0.5, a[2])):
        a, b = split(balanced(), 10, seeded(1)), split(balanced(), 10, seeded(2))
        assert not torch.equal(a[0], b[0])


def test_shards_give_two_classes_a_client() -> None:
    counts = label_counts(balanced(), shards(balanced(), 100, seeded()), 10)
    seen = (counts > 0).sum(dim=1)
    assert int(seen.max()) == 2
    assert float((seen == 2).float().mean()) > 0.7
    assert torch.equal(counts.sum(dim=0), torch.full((10,), 600))


def test_dirichlet_mixtures_follow_their_concentration() -> None:
    """The mean entropy of Dirichlet(α/10, …) mixtures is ψ(α + 1) − ψ(α/10 + 1); other α are told apart."""
    labels = balanced(20_000)
    for alpha in (1.0, 10.0, 100.0):
        parts = dirichlet(labels, 200, alpha, seeded(3))[:100]  # before classes run out
        found = entropy(label_counts(labels, parts, 10))
        digamma = torch.tensor([alpha + 1, alpha / 10 + 1]).digamma()
        expected = float(digamma[0] - digamma[1])
        assert found == pytest.approx(expected, abs=0.12)
    assert entropy(label_counts(labels, dirichlet(labels, 200, 1e-4, seeded()), 10)[:100]) < 0.05
    assert entropy(label_counts(labels, dirichlet(labels, 20, 1e5, seeded()), 10)) > math.log(10) - 0.01


def test_dirichlet_follows_the_frequencies_of_the_data() -> None:
    labels = torch.cat([torch.zeros(9000, dtype=torch.int64), torch.ones(1000, dtype=torch.int64)])
    counts = label_counts(labels, dirichlet(labels, 100, 1e5, seeded()), 2)
    assert float((counts[:, 0] - 90).abs().float().mean()) < 5


def test_label_counts_by_hand() -> None:
    counts = label_counts(torch.tensor([2, 0, 2, 1]), [torch.tensor([0, 2]), torch.tensor([3, 1])], 4)
    assert counts.tolist() == [[0, 0, 2, 0], [1, 1, 0, 0]]
    assert counts.dtype == torch.int64


@pytest.mark.parametrize(
    ("split", "complaint"),
    [
        (
            lambda labels: iid(labels, 0, seeded()),
            "clients=0: choose between 1 and the number of examples, 20",
        ),
        (lambda labels: iid(labels, 21, seeded()), "clients=21"),
        (lambda labels: shards(labels, -1, seeded()), "clients=-1"),
        (lambda labels: shards(labels, 5, seeded(), 0), "shards_per_client=0: choose between 1 and 4"),
        (lambda labels: shards(labels, 5, seeded(), 5), "shards_per_client=5"),
        (lambda labels: dirichlet(labels, 0, 1.0, seeded()), "clients=0"),
        (lambda labels: dirichlet(labels, 5, 0.0, seeded()), "alpha=0.0: "),
        (lambda labels: dirichlet(labels, 5, -1.0, seeded()), "alpha=-1.0: "),
        (lambda labels: dirichlet(labels, 5, math.inf, seeded()), "alpha=inf: "),
        (lambda labels: dirichlet(labels, 5, math.nan, seeded()), "alpha=nan: "),
        (lambda labels: label_counts(labels, [], 9), "classes=9: expected labels 0 to 8, found 0 to 9"),
    ],
)
def test_bad_options_are_named(split: Callable[[Tensor], object], complaint: str) -> None:
    with pytest.raises(InputError) as caught:
        split(balanced(20))
    assert complaint in str(caught.value)
