"""cluster.toml: who alice, bob and the provider are, who may push models to them, and who may ask which.

The same file at all of them. `docs/deploy/cluster.md` documents it key by key. Whatever it does not know is refused, as
is a key that two names share: what a key may do is decided by the name that the file gives it, and by nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from tacit import atomic, toml_file
from tacit.errors import InputError
from tacit.identity import key_text, parse_key
from tacit.party.address import Address, parse_address
from tacit.program.network import Network

ALICE, BOB, PROVIDER = "alice", "bob", "provider"
PARTIES = (ALICE, BOB, PROVIDER)
_DOCUMENTATION = "docs/deploy/cluster.md"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ANY = "*"
T = TypeVar("T")


def require_name(name: str) -> None:
    """Refuse what cannot be the name of a party, an owner, a client or a model.

    Raises:
        InputError: it is no name.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} is no name: give at most 63 letters, digits, dots, dashes and underscores")


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")


def _finite(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise InputError(f"{name} is {value:g}: it must be a number of at least 0")


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A section of the file."""


class _Pinned(_Section, frozen=True):
    """Somebody with a key."""

    key: str

    def __post_init__(self) -> None:
        parse_key(self.key)

    @property
    def public(self) -> bytes:
        """The pinned public key."""
        return parse_key(self.key)


class Member(_Pinned, frozen=True):
    """``[parties.NAME]``: alice, bob or the provider.

    Args:
        key: its public key, as `tacit keys show` prints it.
        address: where the others and the clients reach it.
        http: where it answers health checks and shows its metrics, if anywhere.
    """

    address: str
    http: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_address(self.address)
        if self.http is not None:
            parse_address(self.http)

    @property
    def reached_at(self) -> Address:
        """The address."""
        return parse_address(self.address)

    @property
    def http_at(self) -> Address | None:
        """Where health and metrics are, if anywhere."""
        return None if self.http is None else parse_address(self.http)


class Parties(_Section, frozen=True):
    """``[parties]``: all three of them."""

    alice: Member
    bob: Member
    provider: Member


class Owner(_Pinned, frozen=True):
    """``[owners.NAME]``: may push models, and list, pull and delete its own.

    Args:
        key: its public key.
    """


class Client(_Pinned, frozen=True):
    """``[clients.NAME]``: may ask models for predictions.

    Args:
        key: its public key.
        models: which models it may ask; ``"*"`` is any.
        requests_per_minute: how many requests a minute it may send.
        largest_batch: how many inputs one request may hold.
    """

    models: tuple[str, ...] = ()
    requests_per_minute: int = 6000
    largest_batch: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(requests_per_minute=self.requests_per_minute, largest_batch=self.largest_batch)
        for model in self.models:
            if model != _ANY:
                require_name(model)


class Serving(_Section, frozen=True):
    """``[serving]``: how requests become batches.

    Args:
        batch_sizes: planned sizes, ascending; a batch is padded up to the next one.
        latency_ms: how long a request may wait for company.
        queue: how many requests may wait; beyond that, clients are told when to come back.
        workers: worker processes at each party, one for each of the other's.
        memory_gb: what the tickets that a worker has ready ahead may take, in 10^9 bytes.
        when_empty: whether a request waits for correlated randomness or fails when there is none.
    """

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    latency_ms: float = 4.0
    queue: int = 1024
    workers: int = 1
    memory_gb: float = 0.5
    when_empty: Literal["wait", "fail"] = "wait"

    def __post_init__(self) -> None:
        _positive(
            queue=self.queue, workers=self.workers, **{"the smallest of batch_sizes": min(self.batch_sizes, default=0)}
        )
        _finite(latency_ms=self.latency_ms, memory_gb=self.memory_gb)
        if list(self.batch_sizes) != sorted(set(self.batch_sizes)):
            raise InputError(f"batch_sizes are {list(self.batch_sizes)}: they must ascend, each of them once")


class Pools(_Section, frozen=True):
    """``[pools]``: how much correlated randomness a party keeps.

    Args:
        disk_gb: how much disk it may take, in 10^9 bytes.
        ahead: inputs for which tickets of each model and batch size are wanted, in whole tickets.
    """

    disk_gb: float = 8.0
    ahead: int = 1024

    def __post_init__(self) -> None:
        _positive(ahead=self.ahead)
        _finite(disk_gb=self.disk_gb)


class TrainingJobs(_Section, frozen=True):
    """``[training]``: the training jobs that alice and bob run.

    Args:
        disk_gb: how much disk the rows and checkpoints of all jobs may take at a party, in 10^9 bytes.
        ahead: tickets wanted ahead of a job that runs; they count for ``pools.disk_gb``.
    """

    disk_gb: float = 8.0
    ahead: int = 8

    def __post_init__(self) -> None:
        _positive(ahead=self.ahead)
        _finite(disk_gb=self.disk_gb)


class NetworkFigures(_Section, frozen=True):
    """``[network]``: between alice and bob, by which the planner chooses protocols.

    Args:
        rtt_ms: a round trip.
        mbps: 10^6 bits a second, each way.
    """

    rtt_ms: float = 0.2
    mbps: float = 1000.0

    def __post_init__(self) -> None:
        _finite(rtt_ms=self.rtt_ms, mbps=self.mbps)
        self.for_planning()

    def for_planning(self) -> Network:
        """The network as the planner takes it."""
        return Network(self.rtt_ms / 1000, self.mbps * 1e6)


class ClusterFile(_Section, frozen=True):
    """The whole file."""

    parties: Parties
    owners: Mapping[str, Owner] = msgspec.field(default_factory=dict)
    clients: Mapping[str, Client] = msgspec.field(default_factory=dict)
    serving: Serving = Serving()
    pools: Pools = Pools()
    training: TrainingJobs = TrainingJobs()
    network: NetworkFigures = NetworkFigures()

    def __post_init__(self) -> None:
        holders: dict[str, str] = {}
        for place, name, one in self._everybody():
            if holders.setdefault(one.key, name) != name:
                raise InputError(
                    f"{place}.{name} has the key of {holders[one.key]}: make a key for each by `tacit keys new`"
                )
        for name in self.owners.keys() & self.clients.keys():
            if self.owners[name].key != self.clients[name].key:
                raise InputError(f"owners.{name} and clients.{name} are the same name with different keys")
        addresses = [str(one.reached_at) for one in map(self.party, PARTIES)]
        if len(set(addresses)) < len(addresses):
            raise InputError(f"two of alice, bob and the provider have the same address: {', '.join(addresses)}")

    def _everybody(self) -> list[tuple[str, str, _Pinned]]:
        parties = [("parties", name, self.party(name)) for name in PARTIES]
        owners = [("owners", name, one) for name, one in self.owners.items()]
        return [*parties, *owners, *(("clients", name, one) for name, one in self.clients.items())]

    def party(self, name: str) -> Member:
        """alice, bob or the provider.

        Raises:
            InputError: the name is none of these.
        """
        if name not in PARTIES:
            raise InputError(f"{name} is not one of {', '.join(PARTIES)}")
        found: Member = getattr(self.parties, name)
        return found

    def pins(self) -> dict[str, bytes]:
        """The public key of everybody in the file, by name."""
        return {name: one.public for _, name, one in self._everybody()}

    def may_ask(self, client: str, model: str) -> bool:
        """Whether the file lets this client ask this model."""
        return client in self.clients and not {model, _ANY}.isdisjoint(self.clients[client].models)

    def text(self) -> str:
        """The file's text; `parse` reads the same from it."""
        lines = [f"# Everybody's file: {_DOCUMENTATION} documents it."]
        for place, name, one in self._everybody():
            lines += ["", f"[{place}.{_quoted(name)}]", *_lines(one)]
        for place in ("serving", "pools", "training", "network"):
            lines += ["", f"[{place}]", *_lines(getattr(self, place))]
        return "\n".join(lines) + "\n"


def parse(text: str, name: str = "the cluster file") -> ClusterFile:
    """The cluster that a TOML text describes.

    Args:
        text: the file's content.
        name: what to call it in an error.

    Raises:
        InputError: it is not TOML, has a section or key that does not exist, lacks one, or has a value that cannot be.
    """
    tables = toml_file.tables(text, name)
    people: dict[str, Any] = {}
    # One by one, so that an error can say whose entry is wrong.
    for place, kind in (("owners", Owner), ("clients", Client)):
        people[place] = _entries(tables.pop(place, {}), kind, place, name)
    settled = toml_file.typed(tables, ClusterFile, "", name, _DOCUMENTATION)
    try:
        return msgspec.structs.replace(settled, **people)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def read(path: Path) -> ClusterFile:
    """The cluster that a file describes.

    Raises:
        InputError: the file cannot be read, or see `parse`.
    """
    return parse(toml_file.read(path), str(path))


def write(cluster: ClusterFile, path: Path) -> None:
    """Write the file: all of it or nothing, and never over another one.

    Raises:
        InputError: something is there already, or nothing can be written there.
    """
    try:
        atomic.create(path, cluster.text().encode())
    except FileExistsError:
        raise InputError(f"{path} is there already: choose another name, or remove it") from None
    except OSError as error:
        raise InputError(f"no cluster file can be written to {path}: {error.strerror}") from error


def member(public: bytes, address: Address, http: Address | None = None) -> Member:
    """An entry of ``[parties]``."""
    return Member(key=key_text(public), address=str(address), http=None if http is None else str(http))


def _entries(value: object, kind: type[T], place: str, file: str) -> dict[str, T]:
    if not isinstance(value, dict):
        raise InputError(f"{file}: in {place}: give a table for each, such as [{place}.clinic]")
    for name in value:
        if name in PARTIES:
            raise InputError(f"{file}: in {place}: {name} is a party's name: choose another")
        try:
            require_name(name)
        except InputError as error:
            raise InputError(f"{file}: in {place}: {error}") from None
    return {name: toml_file.typed(one, kind, f"{place}.{name}", file, _DOCUMENTATION) for name, one in value.items()}


def _quoted(name: str) -> str:
    return f'"{name}"' if "." in name else name


def _lines(section: _Section) -> list[str]:
    values = ((name, getattr(section, name)) for name in section.__struct_fields__)
    return [f"{name} = {_toml(value)}" for name, value in values if value is not None]


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # What a text may hold has been checked: letters, digits and punctuation that needs no escape.
    return f'"{value}"' if isinstance(value, str) else f"{value!r}"
