"""The language in which protocols are written.

A protocol is a generator that one party runs on its own shares. Where it needs the other party it *yields* a step and
is resumed with the answer:

``opened = yield Open(x - a, y - b)``
    both parties send each other these shares; the answer is the tuple of sums (the XOR for bits and bytes). One round.
``part = yield Take(correlation)``
    the answer is this party's part of the correlated randomness that the crypto provider dealt ahead of time. No round.

Nothing else leaves a party. The same body therefore runs in one process (`tacit.mpc.lockstep`), across a network, and
on shape-only tensors to plan what it will cost; and a reader of a protocol sees everything that the other side learns
by looking at its ``Open`` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from tacit.errors import InputError

if TYPE_CHECKING:
    from tacit.mpc.correlation import Correlation


class Role(Enum):
    """Which of the two computing parties."""

    ALICE = "alice"
    BOB = "bob"


@dataclass(frozen=True, eq=False, repr=False)
class Open:
    """Send these shares to the other party; be answered with the tuple of reconstructed values.

    Args:
        values: int64 tensors add in Z/2^64 (8 bytes an element on the wire); uint8 tensors XOR (1 byte); bool tensors
            XOR and travel eight to a byte.
        labels: for each value, the layer it is accounted to; filled in by `dataflow`.
    """

    values: tuple[Tensor, ...]
    labels: tuple[str, ...]

    def __init__(self, *values: Tensor, labels: tuple[str, ...] | None = None) -> None:
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "labels", labels if labels is not None else ("",) * len(values))


@dataclass(frozen=True)
class Take:
    """Be answered with this party's part of one piece of correlated randomness, never handed out again."""

    correlation: Correlation


@dataclass(frozen=True)
class Enter:
    """Tell the driver that the steps and the computing that follow belong to layer ``label``; no answer."""

    label: str


Step = Open | Take | Enter
T = TypeVar("T")
Protocol = Generator[Step, Any, T]


@dataclass(frozen=True)
class Task:
    """One protocol in a graph of them.

    Args:
        name: unique; also the label its costs are accounted to.
        needs: names of the tasks whose results it takes; they stand earlier in the list.
        start: given those results in order, gives the protocol, or the result itself where nothing need be exchanged.
    """

    name: str
    needs: tuple[str, ...]
    start: Callable[..., Any]


def dataflow(tasks: Sequence[Task], keep: Sequence[str]) -> Protocol[dict[str, Any]]:
    """Run a graph of protocols in the fewest rounds: those that wait at the same time open in one message.

    A task starts as soon as what it needs is there, and everything that has come to an `Open` travels together. Both
    parties run the same graph, so both come to the same merged steps. A result is dropped after its last use.

    Args:
        tasks: in an order in which every task comes after those it needs.
        keep: names of the tasks whose results are returned.

    Returns:
        The results of ``keep`` by name.
    """
    results: dict[str, Any] = {}
    uses = dict.fromkeys(keep, 1)
    users: dict[str, list[int]] = {}
    for position, task in enumerate(tasks):
        for name in task.needs:
            uses[name] = uses.get(name, 0) + 1
            users.setdefault(name, []).append(position)
    missing = [len(task.needs) for task in tasks]
    # A heap of positions: those that are ready start in the order of the list, at both parties.
    ready = [position for position, task in enumerate(tasks) if not task.needs]
    running: list[_Running] = []

    def finish(task: Task, result: Any) -> None:
        if task.name in uses:
            results[task.name] = result
        for name in task.needs:
            uses[name] -= 1
            if not uses[name]:
                del results[name]
        for position in users.get(task.name, ()):
            missing[position] -= 1
            if not missing[position]:
                heappush(ready, position)

    def advance(run: _Running, answer: Any) -> Protocol[None]:
        """Go on to the next opening, or finish."""
        while True:
            try:
                step = run.protocol.send(answer)
            except StopIteration as stop:
                finish(run.task, stop.value)
                return
            if isinstance(step, Open):
                run.opening = step
                running.append(run)
                return
            if isinstance(step, Enter):
                step = Enter(f"{run.task.name}/{step.label}")
            answer = yield step

    while ready or running:
        while ready:
            task = tasks[heappop(ready)]
            enter = Enter(task.name)
            yield enter
            outcome = task.start(*[results[name] for name in task.needs])
            if isinstance(outcome, Generator):
                yield from advance(_Running(task, outcome, enter), None)
            else:
                finish(task, outcome)
        if running:
            answers = yield _merged(running)
            resumed, start = running.copy(), 0
            running.clear()
            for run in resumed:
                end = start + len(run.opening.values)
                yield run.enter
                yield from advance(run, answers[start:end])
                start = end
    blocked = next((task for task, count in zip(tasks, missing, strict=True) if count), None)
    if blocked:
        raise InputError(f"task {blocked.name} needs {blocked.needs}, which no task before it gives")
    return {name: results[name] for name in keep}


class _Running:
    """A task that has started, and the opening at which it waits."""

    __slots__ = ("enter", "opening", "protocol", "task")
    opening: Open

    def __init__(self, task: Task, protocol: Protocol[Any], enter: Enter) -> None:
        self.task, self.protocol, self.enter = task, protocol, enter


def _merged(running: Sequence[_Running]) -> Open:
    """The openings of all of them as one."""
    values = tuple(value for run in running for value in run.opening.values)
    labels = tuple(
        f"{run.task.name}/{label}" if label else run.task.name for run in running for label in run.opening.labels
    )
    return Open(*values, labels=labels)


def together(*protocols: Protocol[T]) -> Protocol[list[T]]:
    """Run independent protocols side by side, their openings merged round by round."""
    names = [str(number) for number in range(len(protocols))]
    tasks = [
        Task(name, (), lambda protocol=protocol: protocol) for name, protocol in zip(names, protocols, strict=True)
    ]
    results: Mapping[str, T] = yield from dataflow(tasks, names)
    return [results[name] for name in names]
