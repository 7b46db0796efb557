"""A model version ready for use: its plans, and at alice and bob the runs themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from tacit.errors import CorrelationError, InputError
from tacit.mpc.correlation import Correlation, Party, layout
from tacit.mpc.linear import Weight
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol, Role
from tacit.party.driver import Pool
from tacit.party.models import ModelPart
from tacit.party.programs import Program
from tacit.program.run import Cost, execute, factors, with_weights
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.ring.prg import Prg
from tacit.wire import Item, items_of


def dealt_items(correlation: Correlation) -> tuple[Item, ...]:
    """What bob is sent for a correlation."""
    return tuple(Item(field.dtype, field.shape) for field in layout(correlation).dealt.values())


class PlannedModel:
    """What a ticket of a model version takes, for every batch size; planned when it is first asked for.

    Args:
        part: of the model version.
    """

    def __init__(self, part: ModelPart) -> None:
        self.part = part
        self._costs: dict[int, Cost] = {}

    def program(self, batch: int) -> Program:
        """The program for a batch size.

        Raises:
            InputError: the model was not pushed for it.
        """
        if batch not in self.part.programs:
            sizes = ", ".join(map(str, self.part.batch_sizes))
            raise InputError(f"{self.part.name} was pushed for batches of {sizes}, not of {batch}")
        return self.part.programs[batch]

    def cost(self, batch: int) -> Cost:
        """What a run costs; its correlations are what a ticket holds, in order."""
        program = self.program(batch)
        if batch not in self._costs:
            self._costs[batch] = program.cost()
        return self._costs[batch]

    def items(self, batch: int) -> tuple[Item, ...]:
        """The tensors that bob is sent with a ticket."""
        return tuple(item for correlation in self.cost(batch).correlations for item in dealt_items(correlation))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.part})"


class LoadedModel(PlannedModel):
    """A model version as alice or bob runs it.

    Args:
        part: the party's.
    """

    def __init__(self, part: ModelPart) -> None:
        super().__init__(part)
        self.role = Role(part.role)
        self._states: dict[int, dict[str, Share | Weight]] = {}

    def expand(self, batch: int, seed: bytes, corrections: Iterable[Tensor]) -> Pool:
        """All that a run takes, from what a ticket holds.

        Args:
            batch: the ticket's batch size.
            seed: the ticket's.
            corrections: the ticket's; none at alice.

        Raises:
            InputError: the model was not pushed for this batch size.
            CorrelationError: the corrections are not those of such a ticket.
        """
        weights = {value.number: value for value in self._state(batch).values() if isinstance(value, Weight)}
        party, pool, rest = Party(self.role, Prg(seed), weights), Pool(), iter(corrections)
        for number, correlation in enumerate(self.cost(batch).correlations):
            wanted = layout(correlation).dealt if self.role is Role.BOB else {}
            sent = dict(zip(wanted, rest, strict=False))
            if items_of(sent.values()) != dealt_items(correlation)[: len(wanted)]:
                raise _not_of_this(batch)
            pool.put(correlation, party.receive(number, correlation, sent))
        if next(rest, None) is not None:
            raise _not_of_this(batch)
        return pool

    def run(self, batch: int, inputs: Sequence[Share]) -> Protocol[tuple[Share, ...]]:
        """The protocol of a run on this party's shares of a batch, to be driven with the pool of a ticket.

        Raises:
            InputError: the shares are not of such a batch.
        """
        program = self.program(batch)
        if tuple(tuple(one.shape) for one in inputs) != program.inputs:
            raise InputError(f"the shares are not those of a batch of {batch} for {self.part.name}")
        return execute(program.graph, self._state(batch), inputs, program.context, program.ready)

    def _state(self, batch: int) -> dict[str, Share | Weight]:
        if batch not in self._states:
            program = self.program(batch)
            held = self.part.variants[self.part.variant_of[batch]]
            state = {name: Share(words, FRACTION_BITS, self.role) for name, words in held.state.items()}
            weights = {
                name: Weight(state[name], number, held.differences[name])
                for number, name in enumerate(factors(program.graph))
            }
            self._states[batch] = with_weights(program.graph, state, weights)
        return self._states[batch]


def _not_of_this(batch: int) -> CorrelationError:
    return CorrelationError(f"the corrections are not those of a ticket for a batch of {batch}: it was thrown away")
