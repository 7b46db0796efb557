"""Ways to split a data set over clients.

Each function takes the int64 class labels of shape ``(n,)`` and returns one int64 index tensor a client. The
parts are disjoint, cover every example, and hold at least one each. The same generator state gives the same
split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def _check_clients(labels: Tensor, clients: int) -> None:
    if not 1 <= clients <= len(labels):
        raise InputError(f"clients={clients}: choose between 1 and the number of examples, {len(labels)}")
