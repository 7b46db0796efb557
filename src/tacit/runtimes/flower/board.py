"""What a coordinator can say of a run at any moment, for whoever watches it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

NOTES = 50
"""So many of the last notes are kept."""


@dataclass
class Board:
    """Where a run is.

    Args:
        changed: called with the board after each change, from the thread that trains.
        round: that is under way, or 0.
        stage: of the round, in Flower's name for it; empty between rounds.
        here: the sites that are there, by index.
        awaited: those whose answer is waited for in this stage.
        answered: those that have given it.
        up, down: bytes from and to each site so far, by index.
        notes: what happened, in words, the latest last.
    """

    changed: Callable[[Board], None] = field(default=lambda board: None, repr=False)
    round: int = 0
    stage: str = ""
    here: tuple[int, ...] = ()
    awaited: tuple[int, ...] = ()
    answered: tuple[int, ...] = ()
    up: dict[int, int] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Note something."""
        self.notes.append(text)
        del self.notes[:-NOTES]
        self.changed(self)

    def present(self, sites: Collection[int]) -> None:
        """These are there now."""
        if self.here != (there := tuple(sorted(sites))):
            self.here = there
            self.changed(self)

    def enter(self, round: int, stage: str, sites: Collection[int]) -> None:
        """A stage begins: these are asked."""
        self.round, self.stage, self.awaited, self.answered = round, stage, tuple(sorted(sites)), ()
        self.changed(self)

    def answer(self, site: int) -> None:
        """One of them has answered."""
        self.awaited = tuple(other for other in self.awaited if other != site)
        self.answered = tuple(sorted({*self.answered, site}))
        self.changed(self)

    def leave(self) -> None:
        """Between stages."""
        self.stage, self.awaited, self.answered = "", (), ()
        self.changed(self)

    def count(self, site: int, up: int = 0, down: int = 0) -> None:
        """So many bytes came from, and went to, a site."""
        self.up[site] = self.up.get(site, 0) + up
        self.down[site] = self.down.get(site, 0) + down
