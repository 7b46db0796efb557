"""Questions to many sites at once, and their answers as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from tacit.errors import CodecError
from tacit.runtimes.flower.client_app import content_of, frame_of

SLACK = 5.0
"""Seconds that Flower keeps a message beyond the time that its answer is waited for."""
BRISK, LONGEST_PAUSE = 0.02, 0.25


@dataclass(frozen=True)
class Question:
    """A frame for a node, under the name of its stage in Flower."""

    kind: str
    frame: bytes = field(repr=False)


@dataclass(frozen=True)
class Unanswered:
    """Why there is no answer."""

    reason: str


@dataclass
class Deadline:
    """When waiting ends, which who waits may move closer.

    Args:
        at: by the clock of the `Courier`.
    """

    at: float

    def bring_forward(self, at: float) -> None:
        """End earlier, if that is earlier."""
        self.at = min(self.at, at)


@dataclass
class Courier:
    """Carries frames to nodes and back by a `Grid` of Flower's.

    Args:
        grid: of the run.
        clock: seconds that only go up.
        sleep: waits.
    """

    grid: Grid
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def nodes(self) -> frozenset[int]:
        """The nodes that are connected."""
        return frozenset(self.grid.get_node_ids())

    def send(self, questions: Mapping[int, Question], seconds: float, group: str = "") -> dict[str, int]:
        """Post questions, which are kept for so many seconds.

        Returns:
            The nodes, by the numbers under which `fetch` knows the questions; without those that cannot be posted to.
        """
        messages = [
            Message(content_of(question.frame), node, question.kind, ttl=seconds + SLACK, group_id=group)
            for node, question in questions.items()
        ]
        posted = self.grid.push_messages(messages) if messages else ()
        return {number: node for number, node in zip(posted, questions, strict=True) if number}

    def fetch(self, numbers: Iterable[str]) -> dict[str, bytes | Unanswered]:
        """The answers to these questions that have come."""
        wanted = list(numbers)
        found = self.grid.pull_messages(wanted) if wanted else ()
        return {message.metadata.reply_to_message_id: _answer(message) for message in found}

    def ask(
        self, questions: Mapping[int, Question], deadline: Deadline, group: str = ""
    ) -> Iterator[tuple[int, bytes | Unanswered]]:
        """Post questions and give each node's answer when it comes; then, of those who did not answer, why.

        Whoever has enough answers may stop listening; the others' are never fetched then.

        Args:
            questions: by node.
            deadline: until when to wait; looked at again after each answer.
            group: what Flower calls the questions together, such as the round.
        """
        began = self.clock()
        waiting = self.send(questions, max(deadline.at - began, 0.0), group)
        for node in questions.keys() - set(waiting.values()):
            yield node, Unanswered("is not connected any more")
        pause = BRISK
        while waiting and self.clock() < deadline.at:
            answers = self.fetch(waiting)
            for number, answer in answers.items():
                if number in waiting:
                    yield waiting.pop(number), answer
            pause = BRISK if answers else min(1.5 * pause, LONGEST_PAUSE)
            if waiting:
                self.sleep(min(pause, max(deadline.at - self.clock(), 0.0)))
        for node in waiting.values():
            yield node, Unanswered(f"did not answer within {self.clock() - began:.1f} s")


def _answer(message: Message) -> bytes | Unanswered:
    if message.has_error() and message.error.code == ErrorCode.NODE_UNAVAILABLE:
        return Unanswered("did not answer: its node gives no sign of life any more")
    if message.has_error():
        return Unanswered(message.error.reason or f"failed with Flower's error {message.error.code}")
    try:
        return frame_of(message)
    except CodecError as error:
        return Unanswered(str(error))
