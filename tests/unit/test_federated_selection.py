"""Which clients are invited: bounds, distributions, scale."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tacit.errors import InputError
from tacit.federated.selection import AvailabilityAware, ByExamples, Poisson, Selection, Uniform


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everyone(clients: int) -> Tensor:
    return torch.ones(clients, dtype=torch.bool)


def selections(cohort: int, clients: int) -> list[Selection]:
    availability = torch.linspace(0, 1, clients)
    return [Uniform(cohort), ByExamples(cohort), AvailabilityAware(cohort, availability), Poisson(cohort / clients)]


populations = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30).flatmap(
    lambda rows: st.tuples(st.just(rows), st.integers(1, len(rows)), st.integers(0, 2**32))
)


@given(populations)
def test_a_cohort_is_of_clients_that_can_be_asked(case: tuple[list[tuple[int, bool]], int, int]) -> None:
    rows, cohort, seed = case
    sizes, eligible = torch.tensor([size for size, _ in rows]), torch.tensor([able for _, able in rows])
    able = {client for client, (size, eligible) in enumerate(rows) if size and eligible}
    for selection in selections(cohort, len(rows)):
        chosen = selection.select(1, sizes, eligible, seeded(seed))
        assert list(chosen) == sorted(set(chosen))
        assert set(chosen) <= able
        assert chosen == selection.select(1, sizes, eligible, seeded(seed))
        if not isinstance(selection, Poisson):
            assert len(chosen) == min(cohort, len(able))


def frequencies(selection: Selection, sizes: Tensor, draws: int) -> Tensor:
    generator, clients = seeded(1), len(sizes)
    drawn = [c for _ in range(draws) for c in selection.select(1, sizes, everyone(clients), generator)]
    return torch.tensor(drawn).bincount(minlength=clients).double()


def test_uniform_selects_everyone_equally_often() -> None:
    """Chi-squared over 20 clients: 43.8 is the 0.1 % level of 19 degrees of freedom; 4 % of bias is more."""
    draws = 4000

    def chi_squared(counts: Tensor) -> float:
        return float(((counts - draws / 2) ** 2 / (draws / 4)).sum())

    counts = frequencies(Uniform(10), torch.ones(20, dtype=torch.int64), draws)
    assert chi_squared(counts) < 43.8
    counts[:10] += 80
    counts[10:] -= 80
    assert chi_squared(counts) > 43.8


def test_by_examples_follows_the_sizes() -> None:
    """One client a round: proportions 1 : 2 : 3 : 4 within four standard deviations, uniform ones are not."""
    draws, sizes = 5000, torch.tensor([10, 20, 30, 40])

    def deviations(selection: Selection) -> float:
        share = sizes.double() / sizes.sum()
        sigma = (draws * share * (1 - share)).sqrt()
        return float(((frequencies(selection, sizes, draws) - draws * share) / sigma).abs().max())

    assert deviations(ByExamples(1)) < 4
    assert deviations(Uniform(1)) > 20


def test_two_draws_by_examples_are_without_replacement() -> None:
    """Sizes 1, 1, 2: the pair without the large client has probability 2 · 1/4 · 1/3."""
    generator, sizes = seeded(2), torch.tensor([1, 1, 2])
    pairs = [ByExamples(2).select(1, sizes, everyone(3), generator) for _ in range(6000)]
    expected, sigma = 1000, math.sqrt(6000 * 1 / 6 * 5 / 6)
    assert abs(pairs.count((0, 1)) - expected) < 4 * sigma


def test_poisson_cohorts_have_the_binomial_mean_and_variance() -> None:
    generator, clients, q, draws = seeded(3), 200, 0.05, 3000
    ones = torch.ones(clients, dtype=torch.int64)
    counts = [float(len(Poisson(q).select(1, ones, everyone(clients), generator))) for _ in range(draws)]
    sizes = torch.tensor(counts)
    variance = clients * q * (1 - q)
    assert abs(float(sizes.mean()) - clients * q) < 4 * math.sqrt(variance / draws)
    assert float(sizes.var()) == pytest.approx(variance, rel=0.15)
    assert Poisson(1e-9).select(1, ones, everyone(clients), generator) == ()


def test_poisson_draws_do_not_depend_on_who_else_is_eligible() -> None:
    ones, half = torch.ones(50, dtype=torch.int64), torch.arange(50) < 25
    among_all = Poisson(0.3).select(1, ones, everyone(50), seeded())
    assert Poisson(0.3).select(1, ones, half, seeded()) == tuple(c for c in among_all if c < 25)


def test_availability_aware_evens_out_who_takes_part() -> None:
    """Half of the clients are there in one round of five: drawn uniformly they get a fifth of the others' rounds."""
    clients, rounds = 200, 600
    availability = torch.where(torch.arange(clients) < 100, 0.2, 1.0)
    ones, presence = torch.ones(clients, dtype=torch.int64), seeded(4)

    def seldom_over_always(selection: Selection) -> float:
        generator, taken = seeded(5), torch.zeros(clients)
        for number in range(rounds):
            eligible = torch.rand(clients, generator=presence) < availability
            taken[list(selection.select(number, ones, eligible, generator))] += 1
        return float(taken[:100].sum() / taken[100:].sum())

    assert seldom_over_always(Uniform(6)) == pytest.approx(0.2, abs=0.05)
    assert seldom_over_always(AvailabilityAware(6, availability)) == pytest.approx(1.0, abs=0.15)


def test_only_poisson_has_a_sampling_rate() -> None:
    assert [s.sampling_rate for s in selections(2, 10)] == [None, None, None, 0.2]


def test_cohorts_are_of_the_expected_size() -> None:
    """Of 100 clients, every fifth of them without examples; also where a cohort asks for more than have any."""
    sizes = torch.arange(100) % 5
    for cohort in (10, 90):
        for selection in selections(cohort, 100):
            generator = seeded(6)
            mean = sum(len(selection.select(1, sizes, everyone(100), generator)) for _ in range(300)) / 300
            assert mean == pytest.approx(selection.expected(sizes), abs=1.0)


def test_over_selection_invites_more_but_no_more_than_there_are() -> None:
    assert Uniform(100).scaled(1.3, 1000) == Uniform(130)
    assert ByExamples(3).scaled(1.1, 1000) == ByExamples(4)
    assert Uniform(100).scaled(1.3, 120) == Uniform(120)
    assert AvailabilityAware(4, torch.ones(9)).scaled(2, 9).cohort == 8
    assert Poisson(0.6).scaled(2, 10) == Poisson(1.0)


def test_a_million_clients() -> None:
    sizes = torch.arange(1_000_000) % 7
    for selection in selections(1000, len(sizes)):
        chosen = selection.select(1, sizes, everyone(len(sizes)), seeded())
        assert 700 < len(chosen) <= 1200
        assert all(client % 7 for client in chosen)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (
            lambda: Uniform(0).select(1, torch.ones(5), everyone(5), seeded()),
            "cohort=0: choose between 1 and the number of clients, 5",
        ),
        (lambda: ByExamples(-1).select(1, torch.ones(5), everyone(5), seeded()), "cohort=-1"),
        (lambda: Poisson(0.0), "q=0.0: "),
        (lambda: Poisson(1.5), "q=1.5: "),
        (lambda: Poisson(math.nan), "q=nan: "),
        (lambda: AvailabilityAware(1, torch.tensor([0.5, math.nan])), "availability"),
        (lambda: AvailabilityAware(1, torch.tensor([0.5, 1.5])), "availability"),
        (lambda: AvailabilityAware(1, torch.ones(3), floor=0), "floor=0: "),
        (lambda: Uniform(2).scaled(math.nan, 10), "over-selection by nan"),
        (
            lambda: Uniform(6).select(1, torch.ones(5), everyone(5), seeded()),
            "cohort=6: choose between 1 and the number of clients, 5",
        ),
        (
            lambda: AvailabilityAware(1, torch.ones(3)).select(1, torch.ones(5), everyone(5), seeded()),
            "availability of 3 clients was given, but there are 5",
        ),
    ],
)
def test_impossible_selections(make, complaint: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert complaint in str(caught.value)
