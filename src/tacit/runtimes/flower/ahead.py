"""A secure sum among sites that is set up while the one before it ends."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from tacit.errors import PeerError
from tacit.federated.secure_sum.messages import Invite
from tacit.federated.secure_sum.server import MaskedServer, Stage


@dataclass
class Ahead:
    """The next sum, whose keys and shares are exchanged along with the last two stages of the one before.

    It is of use only if its whole cohort stays to the end: whoever is missing could take no part in it any more.

    Args:
        cohort: its sites, by index, ascending.
        invite: its settings.
    """

    cohort: tuple[int, ...]
    invite: Invite
    server: MaskedServer = field(init=False)
    _going: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.server = MaskedServer(self.invite)

    @property
    def ready(self) -> bool:
        """Whether all of the cohort have shared their secrets: what is missing is what the sum is of."""
        return self._going and self.server.stage is Stage.SHARE and not self.server.awaited

    def questions(self, stage: Stage, asked: Collection[int]) -> dict[int, bytes]:
        """What to ask along with a stage of the sum that ends.

        Args:
            stage: CONFIRM or UNMASK; in others there is nothing.
            asked: the sites that are asked in it.

        Returns:
            A frame for each site of the cohort, by index; empty if one of them is lost.
        """
        if stage is not Stage.CONFIRM and stage is not Stage.UNMASK:
            return {}
        confirmed = stage is Stage.UNMASK
        self._going &= set(asked).issuperset(self.cohort) and not (confirmed and self.server.awaited)
        if not self._going:
            return {}
        frames = self.server.close() if confirmed else dict.fromkeys(range(len(self.cohort)), self.server.invite())
        return {self.cohort[number]: frame for number, frame in frames.items()}

    def hear(self, site: int, frame: bytes) -> None:
        """Take a site's answer.

        Raises:
            PeerError: it is not what was asked for.
        """
        if self.cohort[number := self.server.receive(frame)] != site:
            raise PeerError(f"its frame is that of client {number}")
