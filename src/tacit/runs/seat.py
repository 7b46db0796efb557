"""coordinator.toml: where a coordinator has what it needs to run rounds over Flower; it never leaves its machine.

::

    federation = "federation.toml"      # which SuperLink, and which sites; the sites have the same file
    identity = "coordinator.key"        # made by `tacit keys new coordinator`
    secret = "superlink.secret"         # what the SuperLink was started with: --superexec-auth-secret-file

    [wait]                              # seconds; may be left out
    work = 600.0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from tacit import toml_file
from tacit.errors import InputError

DOCUMENTATION = "docs/deploy/federation.md"
NAME = "coordinator.toml"


class Wait(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[wait]``: see `tacit.runtimes.flower.asking.Timing`."""

    work: float = 600.0
    stage: float = 30.0
    linger: float = 2.0
    gather: float = 600.0
    join: float = 30.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 0 <= getattr(self, name) < 1e9:
                raise InputError(f"wait.{name}={getattr(self, name)}: give seconds, 0 or more")


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    federation: str = "federation.toml"
    identity: str = "coordinator.key"
    secret: str = "superlink.secret"
    wait: Wait = Wait()


@dataclass(frozen=True)
class Seat:
    """A coordinator's files; all paths are absolute.

    Args:
        federation, identity, secret: see the module.
        wait: how long it waits.
    """

    federation: Path
    identity: Path
    secret: Path
    wait: Wait

    @classmethod
    def read(cls, path: Path) -> Seat:
        """The file at a path.

        Raises:
            InputError: it cannot be read, or says what it cannot.
        """
        if not path.is_file():
            raise InputError(
                f"{path} is not there: with runtime = 'flower' it names the federation's files; see {DOCUMENTATION}"
            )
        tables = toml_file.tables(toml_file.read(path), str(path))
        parsed, folder = toml_file.typed(tables, _File, "", str(path), DOCUMENTATION), path.absolute().parent
        return cls(folder / parsed.federation, folder / parsed.identity, folder / parsed.secret, parsed.wait)

    def write(self, path: Path) -> None:
        """Keep it in a run's folder, so that the run can be resumed from anywhere."""
        named = {"federation": self.federation, "identity": self.identity, "secret": self.secret}
        lines = [f"{name} = {_quoted(str(value))}" for name, value in named.items()]
        lines += ["", "[wait]", *(f"{name} = {value}" for name, value in msgspec.structs.asdict(self.wait).items())]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()
