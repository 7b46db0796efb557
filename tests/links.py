"""Two ends of a connection, for tests: plain or encrypted, as links or as raw sockets."""

import socket
import threading
from collections.abc import Callable
from typing import Any

from tacit.identity import Identity
from tacit.party import dialing, tls
from tacit.party.address import Address
from tacit.party.streams import Plain
from tacit.party.transport import Link

ALICE, BOB, MALLORY = (Identity(bytes([number]) * 32) for number in range(1, 4))
PINS = {"alice": ALICE.public, "bob": BOB.public}
PATIENCE_S = 20.0
Links = tuple[Link, Link]


def both(*work: Callable[[], Any]) -> list[Any]:
    """Run pieces of work at the same time; what each returned or raised."""
    results: list[Any] = [None] * len(work)

    def run(number: int) -> None:
        try:
            results[number] = work[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    return results


def sockets() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        called = socket.create_connection(listener.getsockname())
        return listener.accept()[0], called


def plain_links() -> Links:
    """alice's link to bob and bob's to alice, as they are between processes of one machine."""
    alice, bob = sockets()
    return Link(Plain(alice), "bob", PATIENCE_S), Link(Plain(bob), "alice", PATIENCE_S)


def unix_links() -> Links:
    """The same over a socket pair."""
    alice, bob = socket.socketpair()
    return Link(Plain(alice), "bob", PATIENCE_S), Link(Plain(bob), "alice", PATIENCE_S)


def tls_links() -> Links:
    """The same over TLS."""
    pins = {"bob": BOB.public}
    with dialing.listen(Address("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        alice, bob = both(
            lambda: dialing.answer(listener.accept()[0], tls.server_context(ALICE, pins), ALICE, pins, PATIENCE_S),
            lambda: dialing.dial(Address("127.0.0.1", port), BOB, "alice", ALICE.public, patience=PATIENCE_S),
        )
    for link in (alice, bob):
        if isinstance(link, Exception):
            raise link
    return alice, bob


KINDS = {"plain": plain_links, "unix": unix_links, "tls": tls_links}
