"""What tickets are for: something that takes the same correlated randomness whenever it runs on a batch of one size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from tacit.errors import CorrelationError
from tacit.mpc.correlation import Correlation, Part, Party, layout
from tacit.mpc.steps import Role
from tacit.program.run import Cost
from tacit.ring.prg import Prg
from tacit.wire import Item, items_of


class Planned(ABC):
    """A model version, or a training job; planned when it is first asked for."""

    def __init__(self) -> None:
        self._costs: dict[int, Cost] = {}

    @property
    @abstractmethod
    def digest(self) -> str:
        """What its tickets name."""

    @abstractmethod
    def plan(self, batch: int) -> Cost:
        """Work out what a run costs.

        Raises:
            InputError: it does not run on batches of this size.
        """

    def cost(self, batch: int) -> Cost:
        """What a run costs; its correlations are what a ticket holds, in order.

        Raises:
            InputError: it does not run on batches of this size.
        """
        if batch not in self._costs:
            self._costs[batch] = self.plan(batch)
        return self._costs[batch]

    def items(self, batch: int) -> tuple[Item, ...]:
        """The tensors that bob is sent with a ticket."""
        return tuple(item for correlation in self.cost(batch).correlations for item in dealt_items(correlation))


def dealt_items(correlation: Correlation) -> tuple[Item, ...]:
    """What bob is sent for a correlation."""
    return tuple(Item(field.dtype, field.shape) for field in layout(correlation).dealt.values())


def expansion(
    role: Role,
    correlations: Sequence[Correlation],
    seed: bytes,
    corrections: Iterable[Tensor],
    weights: Mapping[int, Any] = MappingProxyType({}),
) -> Iterator[tuple[Correlation, Part]]:
    """A party's parts of a ticket, worked out one by one as they are asked for.

    Args:
        role: whose.
        correlations: what the ticket holds, in order.
        seed: the ticket's.
        corrections: the ticket's; none at alice.
        weights: the loaded weights that correlations refer to, by number.

    Raises:
        CorrelationError: the corrections are not those of such a ticket.
    """
    party, rest = Party(role, Prg(seed), dict(weights)), iter(corrections)
    for number, correlation in enumerate(correlations):
        wanted = layout(correlation).dealt if role is Role.BOB else {}
        sent = dict(zip(wanted, rest, strict=False))
        if items_of(sent.values()) != dealt_items(correlation)[: len(wanted)]:
            raise _other()
        yield correlation, party.receive(number, correlation, sent)
    if next(rest, None) is not None:
        raise _other()


def _other() -> CorrelationError:
    return CorrelationError("the corrections of a ticket are not those of what it is for: it was thrown away")
