"""A secure sum among sites: the server's state machine, its frames carried as questions and answers.

The last two stages also carry what sets up the sum after it, see `tacit.runtimes.flower.ahead`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tacit.errors import PeerError
from tacit.federated.secure_sum.interface import Opening, Safeguards, Summed, Traffic
from tacit.federated.secure_sum.server import MaskedServer, Stage
from tacit.runtimes.flower.ahead import Ahead
from tacit.runtimes.flower.asking import Asking, Heard
from tacit.runtimes.flower.client_app import STAGES
from tacit.runtimes.flower.messages import Begin, Go

Requests = dict[int, tuple[Begin | Go, tuple[Tensor, ...]]]
BeginOf = Callable[[int, bytes], tuple[Begin, tuple[Tensor, ...]]]
"""What a site, by its index, is asked first, given the server's first frame for it."""


@dataclass(frozen=True)
class SiteSum:
    """One secure sum.

    Args:
        asking: reaches the sites.
        kind: what Flower calls the first stage.
        round: that the sum belongs to.
        cohort: the sites that are invited, by index, ascending.
        attempt: the number of the first question, under which the later ones go.
        begin_of: the first question.
        close_at: take no more vectors than so many; ``None`` for all.
        opening: told whose vectors are summed before anybody can see the sum.
        following: the sum to set up meanwhile; ``None`` for none.
    """

    asking: Asking
    kind: str
    round: int
    cohort: Sequence[int]
    attempt: bytes
    begin_of: BeginOf
    close_at: int | None
    opening: Opening
    following: Ahead | None = None

    def run(self, server: MaskedServer) -> Summed:
        """Run it to its end.

        Args:
            server: new, or one that was set up ahead; what is summed is settled.

        Raises:
            PeerError: too few sites are left: nothing is revealed. `Asking.lost` says what became of the others.
        """
        up, down = dict.fromkeys(self.cohort, 0), dict(self.asking.board.down)
        numbers = range(len(self.cohort))
        first = server.close() if server.stage is Stage.SHARE else dict.fromkeys(numbers, server.invite())
        requests: Requests = {site: self.begin_of(site, first[number]) for number, site in enumerate(self.cohort)}
        kind = self.kind
        while server.stage is not Stage.DONE:
            self._stage(server, kind, requests, up)
            frames = server.close()
            if server.stage is Stage.CONFIRM:
                self.opening(tuple(self.cohort[number] for number in server.survivors))
            kind = STAGES.get(server.stage, "")
            asked = {self.cohort[number]: frame for number, frame in frames.items()}
            ahead = {} if self.following is None else self.following.questions(server.stage, asked)
            requests = {site: (Go(self.attempt, asked[site], ahead.get(site, b"")), ()) for site in asked}
        outcome, invite, lost = server.outcome, server.settings, self.asking.lost
        return Summed(
            outcome.total,
            tuple(self.cohort[number] for number in outcome.survivors),
            {self.cohort[number]: lost.get(self.cohort[number], why) for number, why in outcome.lost.items()},
            Traffic(up, {site: self.asking.board.down.get(site, 0) - down.get(site, 0) for site in self.cohort}),
            Safeguards("masked", len(self.cohort), invite.minimum, invite.holders, invite.threshold),
            outcome.attestation.encoded(),
        )

    def _stage(self, server: MaskedServer, kind: str, requests: Requests, up: dict[int, int]) -> None:
        """Have the server hear who is asked."""
        working = server.stage is Stage.MASK
        # Once vectors are in, the sum waits for nobody whom it can do without.
        enough = self.close_at if server.stage <= Stage.MASK else server.threshold

        def take(site: int, heard: Heard) -> None:
            if self.cohort[number := server.receive(heard.answer.frame)] != site:
                raise PeerError(f"its frame is that of client {number}")
            up[site] += heard.nbytes
            if self.following is not None and heard.answer.ahead:
                try:
                    self.following.hear(site, heard.answer.ahead)
                except PeerError as error:
                    self.asking.board.say(f"site {site} does not set up the next sum as it should: {error}")

        seconds = self.asking.timing.work if working else None
        asked = self.asking.ask(kind, self.round, dict(requests), enough, seconds, take)
        for answered, _ in enumerate(asked, 1):
            if working and answered == self.close_at:
                break
