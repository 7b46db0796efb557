"""The coordinator's questions to sites: signed, sent, and their answers read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tacit.errors import PeerError
from tacit.identity import Identity
from tacit.runtimes.flower.board import Board
from tacit.runtimes.flower.courier import Courier, Deadline, Question, Unanswered
from tacit.runtimes.flower.messages import Answer, Refusal, Request, frame_digest, seal, unpack, unseal
from tacit.runtimes.flower.presence import Presence


@dataclass(frozen=True)
class Timing:
    """How long the coordinator waits, in seconds.

    Args:
        work: for an answer that takes training, or trying the model.
        stage: for any other.
        linger: for the rest, when as many have answered as are needed; or as long again as those took, if that is more.
        gather: for as many sites to be there as a round needs.
        join: for all sites to be there, when a run begins or goes on.
    """

    work: float = 600.0
    stage: float = 30.0
    linger: float = 2.0
    gather: float = 600.0
    join: float = 30.0


@dataclass(frozen=True, repr=False)
class Heard:
    """A site's answer, verified.

    Args:
        answer: what it says.
        tensors: that came with it, by name.
        nbytes: of the whole frame.
    """

    answer: Answer
    tensors: Mapping[str, Tensor]
    nbytes: int

    def __repr__(self) -> str:
        return f"Heard({self.nbytes} bytes)"


@dataclass
class Asking:
    """Asks sites, by their index, and hears only what they have signed.

    Args:
        courier: carries frames.
        presence: says where sites are; is told of those that do not answer.
        coordinator: signs the questions.
        timing: how long to wait.
        board: told of each stage.
    """

    courier: Courier
    presence: Presence
    coordinator: Identity
    timing: Timing
    board: Board
    lost: dict[int, str] = field(default_factory=dict, init=False)
    """Why sites that were asked did not answer as they should, since this was last cleared."""
    disclosed: dict[int, dict[str, float]] = field(default_factory=dict, init=False)
    """What sites told of themselves lately."""

    def ask(
        self,
        kind: str,
        round: int,
        requests: Mapping[int, tuple[Request, tuple[Tensor, ...]]],
        enough: int | None = None,
        seconds: float | None = None,
        take: Callable[[int, Heard], None] = lambda site, heard: None,
    ) -> Iterator[tuple[int, Heard]]:
        """Ask, and give the answers as they come; of whoever gives none, `lost` says why.

        Args:
            kind: of the stage, in Flower's name for it.
            round: that it belongs to.
            requests: what to ask each site.
            enough: when so many have answered, wait for the rest only for a moment; ``None`` for all.
            seconds: how long to wait for all.
            take: called with each answer before it counts.

        Raises:
            PeerError: the SuperLink failed.
        """
        here, courier = self.presence.here, self.courier
        began = courier.clock()
        deadline = Deadline(began + (self.timing.stage if seconds is None else seconds))
        nodes, frames, questions = {}, {}, {}
        self.board.enter(round, kind, requests)
        for site, (request, tensors) in requests.items():
            if site not in here:
                self._lose(site, "is not connected")
                continue
            frame = seal(self.coordinator, self.presence.sites[site], request, tensors)
            node = here[site]
            nodes[node], frames[site], questions[node] = site, frame_digest(frame), Question(kind, frame)
            self.board.count(site, down=len(frame))
        answered = 0
        for node, frame_or_reason in courier.ask(questions, deadline, f"{round}"):
            site = nodes[node]
            if isinstance(frame_or_reason, Unanswered):
                self._lose(site, frame_or_reason.reason)
                self.presence.missed(site)
                continue
            heard = self._hear(site, frame_or_reason, frames[site])
            if heard is None:
                continue
            try:
                take(site, heard)
            except PeerError as error:
                self._lose(site, f"answered wrongly: {error}")
                continue
            answered += 1
            self.board.answer(site)
            yield site, heard
            if enough is not None and answered >= enough:
                now = courier.clock()
                deadline.bring_forward(now + max(self.timing.linger, now - began))
        self.board.leave()

    def _hear(self, site: int, frame: bytes, about: bytes) -> Heard | None:
        self.board.count(site, up=len(frame))
        reader, writer = frozenset({self.coordinator.public}), frozenset({self.presence.sites[site]})
        try:
            opened = unseal(frame, reader, writer, about)
            said = opened.reply()
            if isinstance(said, Refusal):
                self._lose(site, f"refused: {said.reason}")
                return None
            if not isinstance(said, Answer):
                raise PeerError("it answers something else")
            tensors = unpack(said.tensors, opened.tensors)
        except PeerError as error:
            self._lose(site, f"answered what cannot be accepted: {error}")
            return None
        self.disclosed.setdefault(site, {}).update(said.disclosed)
        return Heard(said, tensors, len(frame))

    def _lose(self, site: int, reason: str) -> None:
        self.lost[site] = reason
        self.board.say(f"site {site} {reason}")
