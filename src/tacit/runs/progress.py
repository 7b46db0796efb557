"""Where a run over sites is, in a file of its folder that other processes may read while it trains."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from tacit.errors import DataError

if TYPE_CHECKING:
    from tacit.runtimes.flower.board import Board

NAME = "progress.json"


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What the file says.

    Args:
        at: when it was written, in seconds since 1970.
        rounds: how many there are to be.
        names: of the sites, by index.
        round, stage, here, awaited, answered, up, down, notes: see `tacit.runtimes.flower.board.Board`.
        ended: why the run is over; empty while it goes on.
    """

    at: float
    rounds: int
    names: tuple[str, ...]
    round: Annotated[int, Meta(ge=0)] = 0
    stage: str = ""
    here: tuple[int, ...] = ()
    awaited: tuple[int, ...] = ()
    answered: tuple[int, ...] = ()
    up: dict[str, int] = msgspec.field(default_factory=dict)
    down: dict[str, int] = msgspec.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ended: str = ""

    @classmethod
    def read(cls, folder: Path) -> Progress:
        """What a run's folder says.

        Raises:
            DataError: there is no such file, as in a run that is simulated, or it is damaged.
        """
        try:
            return msgspec.json.decode((folder / NAME).read_bytes(), type=cls)
        except FileNotFoundError:
            raise DataError(f"{folder / NAME} is not there: only a run over sites has one, once it has begun") from None
        except (OSError, msgspec.MsgspecError) as error:
            raise DataError(f"{folder / NAME} cannot be read: {error}") from error


@dataclass
class ProgressFile:
    """Keeps the file up to date.

    Args:
        folder: of the run.
        rounds, names: see `Progress`.
    """

    folder: Path
    rounds: int
    names: Sequence[str]

    def show(self, board: Board, ended: str = "") -> None:
        """Write what is on the board; readers see it whole."""
        shown = {
            "at": time.time(),
            "rounds": self.rounds,
            "names": list(self.names),
            "round": board.round,
            "stage": board.stage,
            "here": board.here,
            "awaited": board.awaited,
            "answered": board.answered,
            "up": board.up,
            "down": board.down,
            "notes": board.notes,
            "ended": ended,
        }
        partial = self.folder / f".{NAME}.partial"
        partial.write_text(json.dumps(shown), encoding="utf-8")
        os.replace(partial, self.folder / NAME)
