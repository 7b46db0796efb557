"""A model version ready for use: its plans, and at alice and bob the runs themselves."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence

import torch
from torch import Tensor

from tacit.errors import InputError
from tacit.mpc.linear import Weight
from tacit.mpc.lockstep import Trio
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol, Role
from tacit.party.driver import Pool
from tacit.party.models import ModelPart
from tacit.party.planned import Planned, expansion
from tacit.party.programs import Program
from tacit.program.run import Cost, execute, factors, load, with_weights
from tacit.ring.fixed_point import FRACTION_BITS


class PlannedModel(Planned):
    """What a ticket of a model version takes, for every batch size; planned when it is first asked for.

    Args:
        part: of the model version.
    """

    def __init__(self, part: ModelPart) -> None:
        super().__init__()
        self.part = part

    @property
    def digest(self) -> str:
        """The model version's."""
        return self.part.digest

    def program(self, batch: int) -> Program:
        """The program for a batch size.

        Raises:
            InputError: the model was not pushed for it.
        """
        if batch not in self.part.programs:
            sizes = ", ".join(map(str, self.part.batch_sizes))
            raise InputError(f"{self.part.name} was pushed for batches of {sizes}, not of {batch}")
        return self.part.programs[batch]

    def plan(self, batch: int) -> Cost:
        """Work out what a run costs.

        Raises:
            InputError: the model was not pushed for this batch size.
        """
        return self.program(batch).cost()

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
        """All that a run takes, from what a ticket holds; see `expanding`."""
        steps = self.expanding(batch, seed, corrections)
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                pool: Pool = stop.value
                return pool

    def expanding(self, batch: int, seed: bytes, corrections: Iterable[Tensor]) -> Generator[None, None, Pool]:
        """All that a run takes, from what a ticket holds, worked out in steps for who has other things to do.

        Args:
            batch: the ticket's batch size.
            seed: the ticket's.
            corrections: the ticket's; none at alice.

        Raises:
            InputError: the model was not pushed for this batch size.
            CorrelationError: the corrections are not those of such a ticket.
        """
        weights = {value.number: value for value in self._state(batch).values() if isinstance(value, Weight)}
        pool = Pool()
        for correlation, part in expansion(self.role, self.cost(batch).correlations, seed, corrections, weights):
            pool.put(correlation, part)
            yield
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

    def rehearse(self, batch: int) -> None:
        """Run once alone, as both parties, on zeros and with randomness of its own, which are thrown away.

        What is compiled, loaded or allocated by a first run is then there before a client waits for one. No ticket, no
        share and no mask of the model's has a part in it.

        Raises:
            InputError: the model was not pushed for this batch size.
        """
        program, trio = self.program(batch), Trio()

        def zeros(shape: Sequence[int], role: Role) -> Share:
            return Share(torch.zeros(tuple(shape), dtype=torch.int64), FRACTION_BITS, role)

        states = [{name: zeros(shape, role) for name, shape in program.state.items()} for role in Role]
        first, second = (load(program.graph, state, program.first_number) for state in states)
        loaded = trio.load(first, second)
        inputs = [[zeros(shape, role) for shape in program.inputs] for role in Role]
        alice, bob = (
            execute(program.graph, state, given, program.context, program.ready)
            for state, given in zip(loaded, inputs, strict=True)
        )
        trio.run(alice, bob)

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
