"""Ways to split a data set over clients.

Each function takes the int64 class labels of shape ``(n,)``, or a column of values, and returns one int64 index
tensor a client. The parts are disjoint, cover every example, and hold at least one each. The same generator state
gives the same split.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from tacit.errors import InputError


def iid(labels: Tensor, clients: int, generator: torch.Generator) -> list[Tensor]:
    """Shuffle, then deal equal parts (sizes differ by at most one).

    Raises:
        InputError: ``clients`` is not between 1 and the number of examples.
    """
    _check_clients(labels, clients)
    return list(torch.randperm(len(labels), generator=generator).tensor_split(clients))


def shards(labels: Tensor, clients: int, generator: torch.Generator, shards_per_client: int = 2) -> list[Tensor]:
    """Sort by label, cut into equal shards and deal ``shards_per_client`` at random to each client.

    The pathological split of McMahan et al. 2017: with two shards most clients see two classes only.

    Raises:
        InputError: ``clients`` or ``shards_per_client`` is not positive, or there are more shards than
            examples.
    """
    _check_clients(labels, clients)
    most = len(labels) // clients
    if not 1 <= shards_per_client <= most:
        raise InputError(
            f"shards_per_client={shards_per_client}: choose between 1 and {most}, "
            f"so that each of {clients} clients' shards holds one of the {len(labels)} examples"
        )
    pieces = labels.argsort(stable=True).tensor_split(clients * shards_per_client)
    hands = torch.randperm(len(pieces), generator=generator).view(clients, shards_per_client).tolist()
    return [torch.cat([pieces[shard] for shard in hand]) for hand in hands]


def dirichlet(labels: Tensor, clients: int, alpha: float, generator: torch.Generator) -> list[Tensor]:
    """Equal parts (sizes differ by at most one), each with its own mixture of classes from a Dirichlet.

    Client by client, q ~ Dirichlet(α p) with p the data set's own class frequencies, then each example's
    class from q and the example from those of the class not yet dealt (Hsu et al. 2019, *Measuring the
    Effects of Non-Identical Data Distribution for Federated Visual Classification*, section 3). When a class
    runs out, q is renormalised over the others. Small α: one class a client; large α: the split approaches
    `iid`.

    Raises:
        InputError: ``clients`` is not between 1 and the number of examples, or ``alpha`` is not a positive
            number.
    """
    _check_clients(labels, clients)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise InputError(f"alpha={alpha}: the concentration must be a number above 0, such as 0.5")
    _, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    shuffled = torch.randperm(len(labels), generator=generator)
    pools = torch.split(shuffled[inverse[shuffled].argsort(stable=True)], counts.tolist())
    concentration = alpha * counts.double() / len(labels)
    dealt = torch.zeros_like(counts)
    parts = []
    for size in (len(labels) // clients + (client < len(labels) % clients) for client in range(clients)):
        mixture = _sample_dirichlet(concentration, generator)
        taken = _sample_classes(mixture, counts - dealt, size, generator)
        parts.append(torch.cat([pool[start : start + k] for pool, start, k in zip(pools, dealt, taken, strict=True)]))
        dealt = dealt + taken
    return parts


def dirichlet_sizes(labels: Tensor, clients: int, alpha: float, generator: torch.Generator) -> list[Tensor]:
    """Quantity skew: a shuffle cut into parts whose shares of the examples are one draw from Dirichlet(α, …, α).

    Li et al. 2022, *Federated Learning on Non-IID Data Silos: An Experimental Study*. Small α: a few
    clients hold nearly everything; large α: the split approaches `iid`.

    Raises:
        InputError: ``clients`` is not between 1 and the number of examples, or ``alpha`` is not a positive
            number.
    """
    _check_clients(labels, clients)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise InputError(f"alpha={alpha}: the concentration must be a number above 0, such as 0.5")
    shares = _sample_dirichlet(torch.full((clients,), alpha, dtype=torch.float64), generator)
    return _shuffled_parts(len(labels), shares, generator)


def power_law_sizes(labels: Tensor, clients: int, exponent: float, generator: torch.Generator) -> list[Tensor]:
    """Quantity skew: a shuffle cut into parts, the r-th largest in proportion to r^-exponent (Zipf's law).

    Which client gets which size is random. With exponent 0 the split is that of `iid`; at 1 the largest of 100
    clients holds about a fifth of the examples.

    Raises:
        InputError: ``clients`` is not between 1 and the number of examples, or ``exponent`` is negative or not
            finite.
    """
    _check_clients(labels, clients)
    if not (exponent >= 0 and math.isfinite(exponent)):
        raise InputError(f"exponent={exponent}: give 0 (equal sizes) or more, such as 1")
    ranks = torch.randperm(clients, generator=generator).double() + 1
    return _shuffled_parts(len(labels), (-exponent * ranks.log()).softmax(dim=0), generator)


def by_column(values: Tensor | Sequence[Hashable]) -> dict[Hashable, Tensor]:
    """The natural split: a client for each value of a column, such as the hospital or the writer of an example.

    Args:
        values: of each example; a tensor of shape ``(n,)`` without NaN, or any values that can be compared for
            equality and order.

    Returns:
        The examples of each value in their order, by value, ascending.

    Raises:
        InputError: there is no value, or the values cannot be ordered.
    """
    column = values.tolist() if isinstance(values, Tensor) else list(values)
    if not column:
        raise InputError("the column has no values: give one for each example")
    positions: dict[Hashable, list[int]] = {}
    for position, value in enumerate(column):
        if value != value:  # only NaN differs from itself
            raise InputError(f"the column's value of example {position} is NaN: say whose it is, or leave it out")
        positions.setdefault(value, []).append(position)
    try:
        ordered = sorted(positions.items(), key=lambda item: item[0])  # type: ignore[arg-type, return-value]
    except TypeError as error:
        raise InputError(f"the column's values cannot be ordered ({error}): give values of one type") from error
    return {value: torch.tensor(found) for value, found in ordered}


def stratified(labels: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two disjoint sets of indices, both ascending: ⌊fraction · n⌋ examples and the rest, classes in proportion.

    Each class gives its share rounded down; those with the largest remainders give one more.

    Raises:
        InputError: ``fraction`` is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction={fraction}: give the first set's share, from 0 to 1")
    first = torch.zeros(len(labels), dtype=torch.bool)
    classes, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    taken = _apportion(counts.double() / max(1, len(labels)), math.floor(fraction * len(labels)))
    for label in range(len(classes)):
        members = (inverse == label).nonzero().flatten()
        first[members[torch.randperm(len(members), generator=generator)[: int(taken[label])]]] = True
    return first.nonzero().flatten(), (~first).nonzero().flatten()


def label_counts(labels: Tensor, parts: Sequence[Tensor], classes: int) -> Tensor:
    """How many examples of each class each part holds: int64, shape ``(len(parts), classes)``.

    Raises:
        InputError: a label lies outside 0 to ``classes`` − 1.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise InputError(f"classes={classes}: expected labels 0 to {classes - 1}, found {found}")
    return torch.stack([labels[part].bincount(minlength=classes) for part in parts])


def _sample_dirichlet(concentration: Tensor, generator: torch.Generator) -> Tensor:
    """One draw: gamma variates, normalised; in the logarithm, since they underflow when little concentrated.

    Gamma(a) = Gamma(a + 1) U^(1/a) (Marsaglia and Tsang 2000, section 6).
    """
    uniform = torch.rand(len(concentration), generator=generator, dtype=concentration.dtype)
    log_gamma = torch._standard_gamma(concentration + 1, generator=generator).log()
    return (log_gamma + (-uniform).log1p() / concentration).softmax(dim=0)


def _sample_classes(mixture: Tensor, left: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Counts by class of ``size`` examples drawn from ``mixture``, no class giving more than ``left``."""
    taken = torch.zeros_like(left)
    while missing := size - int(taken.sum()):
        weights = torch.where(taken < left, mixture, 0.0)
        if not weights.any():
            weights = (left - taken).to(mixture.dtype)
        drawn = weights.multinomial(missing, replacement=True, generator=generator)
        taken = torch.minimum(taken + drawn.bincount(minlength=len(left)), left)
    return taken


def _shuffled_parts(examples: int, shares: Tensor, generator: torch.Generator) -> list[Tensor]:
    """A shuffle cut into parts of these shares, each with one example at least."""
    sizes = 1 + _apportion(shares, examples - len(shares))
    return list(torch.split(torch.randperm(examples, generator=generator), sizes.tolist()))


def _apportion(shares: Tensor, total: int) -> Tensor:
    """Whole numbers of sum ``total`` in proportion to ``shares`` (of sum 1), by largest remainders."""
    exact = shares * total
    whole = exact.floor().long()
    missing = total - int(whole.sum())
    whole[(exact - whole).argsort(descending=True, stable=True)[:missing]] += 1
    return whole


def _check_clients(labels: Tensor, clients: int) -> None:
    if not 1 <= clients <= len(labels):
        raise InputError(f"clients={clients}: choose between 1 and the number of examples, {len(labels)}")
