"""The relay of the fault tests does what it says, and nothing else."""

import socket
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import relay
from links import both
from relay import LAN, NONE, WAN, Pipe, Relay
from tacit.party.address import Address

STREAM = bytes(range(100))
EFFECTS = {
    "nothing": ([], STREAM, ""),
    "flip": ([relay.flip(10, 3)], STREAM[:10] + bytes([10 ^ 8]) + STREAM[11:], ""),
    "flip the first": ([relay.flip(0)], b"\1" + STREAM[1:], ""),
    "drop": ([relay.drop(10, 5)], STREAM[:10] + STREAM[15:], ""),
    "duplicate": ([relay.duplicate(10, 5)], STREAM[:15] + STREAM[10:], ""),
    "reorder": ([relay.reorder(10, 5)], STREAM[:10] + STREAM[15:20] + STREAM[10:15] + STREAM[20:], ""),
    "insert": ([relay.insert(10, b"xyz")], STREAM[:10] + b"xyz" + STREAM[10:], ""),
    "cut": ([relay.cut(10)], STREAM[:10], "cut"),
    "cut at once": ([relay.cut(0)], b"", "cut"),
    "reset": ([relay.reset(99)], STREAM[:99], "reset"),
    "stall": ([relay.stall(10)], STREAM[:10], "stall"),
    "slow": ([relay.slow(10, 5.0)], STREAM, ""),
    "two": ([relay.cut(20), relay.flip(10)], STREAM[:10] + b"\x0b" + STREAM[11:20], "cut"),
    "beyond the end": ([relay.cut(1000), relay.flip(101)], STREAM, ""),
}


@pytest.mark.parametrize("name", EFFECTS)
@given(pieces=st.lists(st.integers(1, 40), max_size=20))
def test_faults_do_not_depend_on_how_the_stream_is_cut(name: str, pieces: list[int]) -> None:
    faults, expected, state = EFFECTS[name]
    pipe, left, out = Pipe(list(faults)), STREAM, b""
    for size in [*pieces, 100]:
        out, left = out + pipe.pass_on(left[:size]), left[size:]
    assert (out + pipe.held, pipe.state) == (expected, state)


def through(network: Any, data: bytes, **faults: Any) -> tuple[bytes, float, list[int]]:
    """What an echo gives back through a relay, and how long it takes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo() -> None:
            with listener.accept()[0] as sock:
                while got := sock.recv(1 << 16):
                    sock.sendall(got)

        def call() -> tuple[bytes, float]:
            with socket.create_connection((between.address.host, between.address.port)) as sock:
                began, got = time.monotonic(), b""
                sock.settimeout(20)
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while piece := sock.recv(1 << 16):
                    got += piece
                return got, time.monotonic() - began

        with Relay(Address("127.0.0.1", listener.getsockname()[1]), network, **faults) as between:
            _, (got, seconds) = both(echo, call)
        return got, seconds, between.passed


def test_passes_everything_on() -> None:
    data = bytes(300_000)
    got, _, passed = through(NONE, data)
    assert (got, passed) == (data, [len(data)] * 2)


@pytest.mark.parametrize("network", [LAN, WAN], ids=["lan", "wan"])
def test_is_at_least_as_slow_as_the_network(network: Any) -> None:
    assert through(network, b"ping")[1] >= network.round_trip
    got, seconds, _ = through(network, bytes(250_000))
    assert len(got) == 250_000
    assert seconds >= network.round_trip + 8 * 250_000 / network.bandwidth


def test_is_slow_after_a_while() -> None:
    _, seconds, _ = through(NONE, bytes(1000), to_target=[relay.slow(500, 5000.0)])
    assert seconds >= 0.1


@pytest.mark.parametrize("direction", ["to_target", "to_caller"])
def test_alters_one_direction(direction: str) -> None:
    assert through(NONE, STREAM, **{direction: [relay.drop(10, 5)]})[0] == STREAM[:10] + STREAM[15:]


def test_only_some_connections_are_faulty() -> None:
    assert through(NONE, STREAM, to_target=[relay.flip(0)], connections={1})[0] == STREAM


@pytest.mark.parametrize("make", [relay.cut, relay.reset])
def test_both_ends_see_a_cut(make: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = Address("127.0.0.1", listener.getsockname()[1])
        with Relay(target, to_target=[make(10)]) as between:
            caller = socket.create_connection((between.address.host, between.address.port))
            called, _ = listener.accept()
            with caller, called:
                caller.settimeout(10)
                called.settimeout(10)
                caller.sendall(STREAM)
                got = b""
                try:
                    while piece := called.recv(100):
                        got += piece
                except ConnectionResetError:
                    assert make is relay.reset
                assert got in (STREAM[:10], b"")
                try:
                    assert caller.recv(100) == b""
                except ConnectionResetError:
                    assert make is relay.reset
