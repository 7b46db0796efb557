"""Who takes part in a run, by long-term identity: the public halves that others pin, and simulated parties."""

from __future__ import annotations

from dataclasses import dataclass, field

from tacit.errors import InputError
from tacit.identity import Identity, key_text


@dataclass(frozen=True)
class Pins:
    """The public keys of everybody who may sign in a run.

    Args:
        coordinator: of whoever runs the rounds and keeps the transcript.
        clients: by index.
        alice, bob: of the two servers of a shared sum; empty if there are none.

    Raises:
        InputError: two parties have one key.
    """

    coordinator: bytes
    clients: tuple[bytes, ...]
    alice: bytes = b""
    bob: bytes = b""

    def __post_init__(self) -> None:
        servers = [key for key in (self.alice, self.bob) if key]
        everybody = [self.coordinator, *servers, *self.clients]
        if len(set(everybody)) != len(everybody):
            twice = next(key for at, key in enumerate(everybody) if key in everybody[:at])
            raise InputError(f"the key {key_text(twice)} is pinned for two parties: each has one of its own")

    def index_of(self) -> dict[bytes, int]:
        """The clients' indices, by key."""
        return {key: client for client, key in enumerate(self.clients)}


@dataclass(frozen=True)
class Parties:
    """The identities of simulated parties, which are all in one process.

    Args:
        coordinator: runs the rounds and keeps the transcript.
        alice, bob: the two servers of a shared sum.
        clients: by index.
    """

    coordinator: Identity
    alice: Identity = field(repr=False)
    bob: Identity = field(repr=False)
    clients: tuple[Identity, ...] = field(repr=False)

    @classmethod
    def simulated(cls, coordinator: Identity, clients: int) -> Parties:
        """Parties whose keys are derived from the coordinator's, so that a resumed run has the same ones.

        They are apart for everybody but the coordinator, in whose process they are anyway.
        """

        def derived(name: str) -> Identity:
            return Identity(coordinator.storage_key(f"simulated {name}"))

        return cls(coordinator, derived("alice"), derived("bob"), tuple(derived(f"client {i}") for i in range(clients)))

    @property
    def pins(self) -> Pins:
        """Their public keys."""
        clients = tuple(client.public for client in self.clients)
        return Pins(self.coordinator.public, clients, self.alice.public, self.bob.public)
