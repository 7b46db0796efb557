"""TLS links on a network that cuts, stalls and alters them: the documented error at both ends, never a wrong value."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

import relay
from links import ALICE, BOB, both
from relay import Fault, Relay
from tacit.errors import PeerError
from tacit.party import dialing, tls
from tacit.party.address import Address
from tacit.party.session import Called, Caller, Session
from tacit.party.session_messages import Purpose
from tacit.party.transport import Link
from tacit.program.network import Network
from tacit.ring.prg import Prg
from tacit.wire import Kind

PATIENCE_S, LONG_S = 0.4, 30.0
"""A fault may be noticed by waiting; where there is none, a busy machine must not look like one."""
SIZES = (1, 40, 3000, 60_000)
FAULTS: dict[str, Callable[[int], Fault]] = {
    "flip": relay.flip,
    "flip the last bit": lambda at: relay.flip(at, 7),
    "drop a byte": lambda at: relay.drop(at, 1),
    "drop a record": lambda at: relay.drop(at, 600),
    "duplicate a byte": lambda at: relay.duplicate(at, 1),
    "duplicate a record": lambda at: relay.duplicate(at, 600),
    "reorder": lambda at: relay.reorder(at, 300),
    "insert zeros": lambda at: relay.insert(at, bytes(20)),
    "insert a record": lambda at: relay.insert(at, b"\x17\x03\x03\x00\x20" + bytes(32)),
    "insert an oversized record": lambda at: relay.insert(at, b"\x17\x03\x03\xff\xff" + bytes(200)),
    "insert an alert": lambda at: relay.insert(at, b"\x15\x03\x03\x00\x02\x01\x00"),
    "cut": relay.cut,
    "reset": relay.reset,
    "stall": relay.stall,
}


@dataclass
class Talk:
    """What one end made of a session and some rounds."""

    session: Session | None = None
    opened: int = 0
    error: Exception | None = None


def shares(seed: int) -> list[list[torch.Tensor]]:
    prg = Prg(seed.to_bytes(16, "big"))
    return [[prg.words((size,)), prg.bits((size % 100,)) > 0] for size in SIZES]


MINE = {"alice": shares(1), "bob": shares(2)}
VALUES = [[x[0] + y[0], x[1] ^ y[1]] for x, y in zip(MINE["alice"], MINE["bob"], strict=True)]


def talk(name: str, connect: Callable[[], Link], greet: Callable[[Link], Session]) -> Talk:
    done, link = Talk(), None
    try:
        link = connect()
        done.session = greet(link)
        for mine, value in zip(MINE[name], VALUES, strict=True):
            opened = link.exchange(mine)
            assert all(map(torch.equal, opened, value)), "a wrong value was opened"
            done.opened += 1
        link.send(Kind.CALL, body=name.encode())
        link.receive(Kind.CALL)
        done.opened += 1
    except PeerError as error:
        done.error = error
    finally:
        if link is not None:
            link.close()
    return done


def met(patience: float, network: Network = relay.NONE, **faults: Any) -> tuple[Talk, Talk, list[int]]:
    """alice and bob through a relay; what each made of it, and the bytes that arrived at alice and at bob."""
    pins = {"bob": BOB.public}
    context = tls.server_context(ALICE, pins)
    with dialing.listen(Address("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        target = Address("127.0.0.1", listener.getsockname()[1])

        def answer() -> Link:
            return dialing.answer(listener.accept()[0], context, ALICE, pins, patience)

        def dial() -> Link:
            return dialing.dial(between.address, BOB, "alice", ALICE.public, patience=patience)

        with pytest.MonkeyPatch.context() as patched, Relay(target, network, **faults) as between:
            patched.setattr(dialing, "HANDSHAKE_S", patience)
            alice, bob = both(lambda: talk("alice", answer, accept), lambda: talk("bob", dial, open_))
        for end in (alice, bob):
            if isinstance(end, Exception):
                raise end
    return alice, bob, between.passed


def accept(link: Link) -> Session:
    return dialing.accept_session(link, Called("alice", "bob", BOB.public, {Purpose.CONTROL}))


def open_(link: Link) -> Session:
    return dialing.open_session({"alice": link}, Caller("bob", BOB.public, Purpose.CONTROL, ("alice",)))


@cache
def total(direction: str) -> int:
    """How many bytes go this way when nothing happens."""
    return met(LONG_S)[2][direction == "to_caller"]


@pytest.mark.parametrize("network", [relay.NONE, relay.LAN, relay.WAN], ids=["at once", "lan", "wan"])
def test_nothing_happens_without_a_fault(network: Network) -> None:
    alice, bob, _ = met(LONG_S, network)
    assert (alice.error, bob.error) == (None, None)
    assert alice.opened == bob.opened == len(SIZES) + 1
    assert alice.session.id == bob.session.id


@pytest.mark.parametrize("direction", ["to_target", "to_caller"])
def test_a_slow_reader_is_waited_for(direction: str) -> None:
    alice, bob, _ = met(LONG_S, **{direction: [relay.slow(3000, 4e6)]})
    assert (alice.error, bob.error) == (None, None)
    assert alice.opened == bob.opened == len(SIZES) + 1


def inject(kind: str, direction: str, at: int) -> None:
    """One fault: an end that misses something learns it by an error that names the other, and opened nothing wrong."""
    alice, bob, _ = met(PATIENCE_S, **{direction: [FAULTS[kind](at)]})
    assert alice.error or bob.error, "the fault was not noticed"
    for end, other in ((alice, "bob"), (bob, "alice")):
        if end.error is None:
            assert end.opened == len(SIZES) + 1, "it had not all that it waited for"
        else:
            assert other in str(end.error) or "caller" in str(end.error), str(end.error)
    if alice.session and bob.session:
        assert alice.session.id == bob.session.id


@pytest.mark.parametrize("share", [0.001, 0.5])
@pytest.mark.parametrize("direction", ["to_target", "to_caller"])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_in_the_handshake_and_one_in_the_middle_of_a_round(kind: str, direction: str, share: float) -> None:
    inject(kind, direction, int(share * total(direction)))


@pytest.mark.slow
def test_a_thousand_faults_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    prg, count = Prg(b"where faults are"), 0
    for kind, direction, number in itertools.product(FAULTS, ("to_target", "to_caller"), range(36)):
        # Every other one in the handshake or in the session's opening, which are short.
        inject(kind, direction, prg.below(total(direction) - 1 if number % 2 else 4000))
        count += 1
    with capsys.disabled():
        print(f"\n{count} faults injected into TLS links: no wrong value, every one noticed")
