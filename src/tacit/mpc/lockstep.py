"""Drivers of protocols that need no network: both parties in one process, and a dry run that only counts.

`Trio` is alice, bob and the crypto provider in this process. It runs the very generators that real processes would
run, and moves exactly what would cross the wire, so that what it counts is what a network would carry. `plan` runs one
party's generator on shape-only tensors and counts the same things without computing any.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from tacit.errors import CorrelationError, InputError
from tacit.mpc.correlation import Correlation, Part, Party, Provider
from tacit.mpc.linear import Weight
from tacit.mpc.shares import Share
from tacit.mpc.steps import Enter, Open, Protocol, Role, Take
from tacit.ring.prg import Prg

T = TypeVar("T")
Loaded = dict[str, Share | Weight]
Dealt = deque[tuple[Correlation, Part, Part]]


@dataclass
class LayerCount:
    """What one layer of a program costs.

    Args:
        rounds: messages that each party sends in which this layer took part.
        bytes_online: bytes that each party sends to the other.
        bytes_dealt: bytes that the provider sends, all of them to bob.
        multiplications: words that each party multiplies in products.
        seconds: computing time of both parties together; 0 in a plan or without a clock.
    """

    rounds: int = 0
    bytes_online: int = 0
    bytes_dealt: int = 0
    multiplications: int = 0
    seconds: float = 0.0


@dataclass
class Meter:
    """Counts what a protocol costs, in all and layer by layer, whether it runs or is planned.

    Args:
        clock: gives seconds; without one no time is taken.
    """

    clock: Callable[[], float] | None = None
    rounds: int = 0
    layers: dict[str, LayerCount] = field(default_factory=dict)
    correlations: list[Correlation] = field(default_factory=list)
    _current: str = ""
    _since: float = 0.0

    def enter(self, label: str) -> None:
        """What follows belongs to the layer that ``label`` starts with."""
        self._stop_clock()
        self._current = label.partition("/")[0]

    def took(self, correlation: Correlation) -> None:
        """A correlation was used."""
        self.correlations.append(correlation)
        layer = self._layer(self._current)
        layer.bytes_dealt += correlation.nbytes
        layer.multiplications += correlation.multiplications

    def opened(self, step: Open) -> None:
        """A round: every layer in it is charged for its own bytes."""
        self._stop_clock()
        self.rounds += 1
        names = [label.partition("/")[0] for label in step.labels]
        for name in dict.fromkeys(names):
            self._layer(name).rounds += 1
        for name, value in zip(names, step.values, strict=True):
            self._layer(name).bytes_online += wire_bytes(value)

    def start_clock(self) -> None:
        """Computing goes on."""
        if self.clock:
            self._since = self.clock()

    def _stop_clock(self) -> None:
        if self.clock:
            now = self.clock()
            self._layer(self._current).seconds += now - self._since
            self._since = now

    def _layer(self, name: str) -> LayerCount:
        return self.layers.setdefault(name, LayerCount())

    @property
    def bytes_online(self) -> int:
        """Bytes that each party sends to the other."""
        return sum(layer.bytes_online for layer in self.layers.values())

    @property
    def bytes_dealt(self) -> int:
        """Bytes that the provider sends."""
        return sum(layer.bytes_dealt for layer in self.layers.values())


def wire_bytes(value: Tensor) -> int:
    """Bytes that a share takes in a message: bits travel eight to a byte."""
    return -(-value.numel() // 8) if value.dtype == torch.bool else value.numel() * value.element_size()


def plan(protocol: Protocol[T], meter: Meter) -> T:
    """Run one party's protocol on ``meta`` tensors and count what it will take, open and cost.

    Args:
        protocol: a generator whose inputs are on the ``meta`` device.
        meter: counts; its ``correlations`` are what the provider has to deal, in order.
    """
    answer: Any = None
    while True:
        try:
            step = protocol.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        answer = None
        if isinstance(step, Take):
            meter.took(step.correlation)
            answer = step.correlation.blank()
        elif isinstance(step, Open):
            meter.opened(step)
            answer = step.values
        elif isinstance(step, Enter):
            meter.enter(step.label)


Tap = Callable[[Role, Open], None]


class Trio:
    """alice, bob and the crypto provider in one process.

    Args:
        prg: where the parties' and the provider's seeds come from; the operating system if not given.
        tap: called with every message a party sends, for tests and demonstrations of what the other one sees.
    """

    def __init__(self, prg: Prg | None = None, tap: Tap | None = None) -> None:
        root = prg or Prg.fresh()
        alice, bob = root.derive("alice"), root.derive("bob")
        self.alice, self.bob = Party(Role.ALICE, alice), Party(Role.BOB, bob)
        self.provider = Provider(alice, bob, root.derive("provider"))
        self.alice.cluster = self.bob.cluster = self
        self.tap = tap

    @staticmethod
    def of(alice: Party, bob: Party, provider: Provider) -> Trio:
        """The trio that these three make up.

        Raises:
            InputError: they are not alice, bob and the provider of one cluster.
        """
        trio: Trio | None = getattr(alice, "cluster", None)
        if trio is None or (trio.alice, trio.bob, trio.provider) != (alice, bob, provider):
            raise InputError("give alice, bob and the crypto provider of one cluster, in this order")
        return trio

    def deal(self, correlations: Iterable[Correlation]) -> Dealt:
        """Deal ahead of need for one `run`, in the order in which it will take them."""
        return deque((correlation, *self._deal(correlation)) for correlation in correlations)

    def run(
        self, alice: Protocol[T], bob: Protocol[T], meter: Meter | None = None, dealt: Dealt | None = None
    ) -> tuple[T, T]:
        """Run both parties' generators step by step.

        Args:
            alice: the protocol on alice's shares.
            bob: the same protocol on bob's.
            meter: counts the cost.
            dealt: what `deal` dealt for this run; it is used up. Without it, everything is dealt on the spot.

        Returns:
            What each of the two computed.

        Raises:
            CorrelationError: the two parties' steps differ, or something else was dealt than what is asked for.
        """
        meter = meter or Meter()
        meter.start_clock()
        answers: tuple[Any, Any] = (None, None)
        while True:
            left, left_result = _advance(alice, answers[0])
            right, right_result = _advance(bob, answers[1])
            if left is None and right is None:
                meter.enter("")
                if dealt:
                    raise CorrelationError(f"{len(dealt)} dealt correlations were left over: they were for another run")
                return left_result, right_result
            answers = (None, None)
            if isinstance(left, Take) and left == right:
                meter.took(left.correlation)
                answers = self._deal(left.correlation) if dealt is None else _taken(dealt, left.correlation)
            elif isinstance(left, Open) and isinstance(right, Open) and _alike(left, right):
                meter.opened(left)
                answers = self._exchange(left, right)
            elif isinstance(left, Enter) and left == right:
                meter.enter(left.label)
            else:
                raise CorrelationError("alice and bob do not run the same protocol: their steps differ")

    def load(self, alice: Protocol[Loaded], bob: Protocol[Loaded]) -> tuple[Loaded, Loaded]:
        """Run a protocol that loads weights, and leave them with the parties for the dealing of later products."""
        loaded = self.run(alice, bob)
        for party, state in zip((self.alice, self.bob), loaded, strict=True):
            party.weights |= {value.number: value for value in state.values() if isinstance(value, Weight)}
        return loaded

    def _deal(self, correlation: Correlation) -> tuple[Part, Part]:
        number, corrections = self.provider.deal(correlation)
        alice = self.alice.receive(number, correlation, {})
        return alice, self.bob.receive(number, correlation, corrections)

    def _exchange(self, left: Open, right: Open) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if self.tap:
            self.tap(Role.ALICE, left)
            self.tap(Role.BOB, right)
        opened = tuple(
            x + y if x.dtype == torch.int64 else x ^ y for x, y in zip(left.values, right.values, strict=True)
        )
        return opened, opened


def _taken(dealt: Dealt, correlation: Correlation) -> tuple[Part, Part]:
    """The parts dealt next, if they are what is asked for."""
    if not dealt or dealt[0][0] != correlation:
        found = dealt[0][0] if dealt else "nothing"
        dealt.clear()
        raise CorrelationError(f"{correlation} is asked for, but {found} was dealt: it was for another run")
    _, alice, bob = dealt.popleft()
    return alice, bob


def _alike(left: Open, right: Open) -> bool:
    """Whether two openings are of the same values."""
    shapes = ([(value.shape, value.dtype) for value in step.values] for step in (left, right))
    return left.labels == right.labels and next(shapes) == next(shapes)


def _advance(protocol: Protocol[T], answer: Any) -> tuple[Any, Any]:
    try:
        return protocol.send(answer), None
    except StopIteration as stop:
        return None, stop.value


def both(trio: Trio, protocol: Callable[..., Protocol[T]], *inputs: Sequence[Any], **options: Any) -> tuple[T, T]:
    """Run ``protocol(*shares, **options)`` where every input is a pair of alice's and bob's share."""
    alice, bob = (protocol(*(pair[i] for pair in inputs), **options) for i in range(2))
    return trio.run(alice, bob)
