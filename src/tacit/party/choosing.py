"""Which model versions alice serves: of each name the newest that both parties have, unless its owner unloaded it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from tacit import atomic
from tacit.errors import DataError
from tacit.party.vault import Entry

_FILE = "unloaded.json"


def chosen(entries: Iterable[Entry], there: Collection[str], unloaded: Collection[str]) -> list[str]:
    """The digests to serve.

    Args:
        entries: the versions that alice has, the oldest first.
        there: the digests that bob has.
        unloaded: names that are not to be served.
    """
    newest = {one.name: one.digest for one in entries if one.digest in there and one.name not in unloaded}
    return list(newest.values())


class Unloaded:
    """The names that owners do not want served, on alice's disk.

    Args:
        folder: where.

    Raises:
        DataError: the file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        try:
            self._names = msgspec.json.decode(self._path.read_bytes(), type=set[str])
        except FileNotFoundError:
            self._names = set()
        except (OSError, msgspec.MsgspecError) as error:
            raise DataError(f"{self._path} cannot be read: delete it, and unload models again") from error

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return frozenset(self._names)

    def set(self, name: str, unloaded: bool) -> None:
        """Remember whether a model is unloaded; when this returns, that is on the disk."""
        names = self._names | {name} if unloaded else self._names - {name}
        if names != self._names:
            atomic.write(self._path, [msgspec.json.encode(sorted(names))])
            self._names = names
