import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tacit.data.partition import (
    by_column,
    dirichlet,
    dirichlet_sizes,
    iid,
    label_counts,
    power_law_sizes,
    shards,
    stratified,
)
from tacit.errors import InputError
from tacit.report import plots

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
            lambda labels, clients, g: dirichlet_sizes(labels, clients, 1e-6, g),
            lambda labels, clients, g: dirichlet_sizes(labels, clients, 1.0, g),
            lambda labels, clients, g: power_law_sizes(labels, clients, 0.0, g),
            lambda labels, clients, g: power_law_sizes(labels, clients, 50.0, g),
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


def test_every_split_has_a_picture() -> None:
    """Very uneven sizes, more clients than are drawn, two classes at named clients: a cell for each class held."""
    labels = balanced(2000)
    for parts, classes, drawn in (
        (dirichlet_sizes(labels, 10, 0.3, seeded()), 10, 10),
        (power_law_sizes(labels, 300, 1.5, seeded()), 10, 200),
        (list(by_column(["Basel", "Zurich", "Basel", "Budapest"] * 500).values()), 10, 3),
    ):
        counts = label_counts(labels, parts, classes)
        picture = plots.partition(counts)
        assert f"{classes} classes at each of {drawn} clients" in picture
        assert picture.count("fill: var(--clear)") == int((counts[:drawn] > 0).sum())


def sizes(parts: list[Tensor]) -> Tensor:
    return torch.tensor([len(part) for part in parts]).double()


def test_dirichlet_sizes_have_the_variance_of_their_concentration() -> None:
    """A share of Dirichlet(α, …, α) over m clients has variance (m − 1) / m² / (mα + 1); other α are told apart."""
    labels, clients = balanced(100_000), 500
    for alpha in (0.3, 3.0):
        shares = sizes(dirichlet_sizes(labels, clients, alpha, seeded(7))) / len(labels)
        found = float(shares.var(unbiased=False))
        assert found == pytest.approx((clients - 1) / clients**2 / (clients * alpha + 1), rel=0.35)
    even = sizes(dirichlet_sizes(labels, clients, 1e9, seeded()))
    assert float(even.max() - even.min()) <= 2


def test_power_law_sizes_follow_the_power_law() -> None:
    labels = balanced(100_000)
    found = sizes(power_law_sizes(labels, 100, 1.0, seeded())).sort(descending=True).values
    ranks = torch.arange(1, 101).double()
    assert torch.allclose(found, 1 + (len(labels) - 100) / ranks / (1 / ranks).sum(), atol=1)
    assert (
        sizes(power_law_sizes(labels, 100, 1.0, seeded(1))).argmax()
        != sizes(power_law_sizes(labels, 100, 1.0, seeded(2))).argmax()
    )
    assert set(sizes(power_law_sizes(labels, 100, 0.0, seeded())).tolist()) == {1000.0}


def test_quantity_skew_leaves_the_classes_alone() -> None:
    counts = label_counts(balanced(50_000), power_law_sizes(balanced(50_000), 10, 1.0, seeded()), 10).double()
    expected = counts.sum(dim=1, keepdim=True) / 10
    assert float(((counts - expected) ** 2 / expected).sum()) < 137  # the 0.1 % level of chi-squared with 90


@given(st.lists(st.sampled_from(["Basel", "Budapest", "Cleveland"]), min_size=1))
def test_natural_splits_by_hand(column: list[str]) -> None:
    parts = by_column(column)
    assert list(parts) == sorted(set(column))
    assert all(column[i] == value for value, part in parts.items() for i in part.tolist())
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(len(column)))
    assert all(torch.equal(part, part.sort().values) for part in parts.values())
    numbers = by_column(torch.tensor([len(value) for value in column]))
    assert list(numbers) == sorted({len(value) for value in column})


@given(st.lists(st.integers(0, 4), max_size=60), st.floats(0, 1), st.integers(0, 2**32))
def test_a_stratified_split_keeps_every_class_in_proportion(column: list[int], fraction: float, seed: int) -> None:
    labels = torch.tensor(column, dtype=torch.int64)
    first, rest = stratified(labels, fraction, seeded(seed))
    assert sorted((*first.tolist(), *rest.tolist())) == list(range(len(labels)))
    assert len(first) == math.floor(fraction * len(labels))
    for label in set(column):
        members = column.count(label)
        assert abs(int((labels[first] == label).sum()) - members * len(first) / len(labels)) < 1
    assert torch.equal(first, stratified(labels, fraction, seeded(seed))[0])


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
        (lambda labels: dirichlet_sizes(labels, 21, 1.0, seeded()), "clients=21"),
        (lambda labels: dirichlet_sizes(labels, 5, math.nan, seeded()), "alpha=nan: "),
        (lambda labels: power_law_sizes(labels, 0, 1.0, seeded()), "clients=0"),
        (lambda labels: power_law_sizes(labels, 5, -1.0, seeded()), "exponent=-1.0: "),
        (lambda labels: power_law_sizes(labels, 5, math.inf, seeded()), "exponent=inf: "),
        (lambda labels: by_column([]), "the column has no values"),
        (lambda labels: by_column(["a", 1]), "cannot be ordered"),
        (lambda labels: by_column(torch.tensor([1.0, math.nan])), "example 1 is NaN"),
        (lambda labels: stratified(labels, 1.1, seeded()), "fraction=1.1"),
        (lambda labels: stratified(labels, math.nan, seeded()), "fraction=nan"),
        (lambda labels: label_counts(labels, [], 9), "classes=9: expected labels 0 to 8, found 0 to 9"),
    ],
)
def test_bad_options_are_named(split: Callable[[Tensor], object], complaint: str) -> None:
    with pytest.raises(InputError) as caught:
        split(balanced(20))
    assert complaint in str(caught.value)
