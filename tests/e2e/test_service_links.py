"""A running service whose connections to alice go through a relay that cuts, stalls and changes what passes."""

import itertools
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

import relay
from crashes import Asking, Books, Points, crashing, tell
from faults import injected
from relay import Fault, Relay
from serving import cluster_of, model, pushed, until
from tacit.party import cluster_file
from tacit.party.address import Address, parse_address
from tacit.party.local import CLUSTER, LocalService
from tacit.ring.prg import Prg

pytestmark = pytest.mark.slow
FAULTS: dict[str, Callable[[int], Fault]] = {
    "flip a bit": relay.flip,
    "drop a byte": lambda at: relay.drop(at, 1),
    "drop some bytes": lambda at: relay.drop(at, 40),
    "send some bytes twice": lambda at: relay.duplicate(at, 40),
    "reorder": lambda at: relay.reorder(at, 20),
    "insert an oversized record": lambda at: relay.insert(at, b"\x17\x03\x03\xff\xff" + bytes(200)),
    "cut": relay.cut,
    "reset": relay.reset,
    "stall": relay.stall,
    "slow": lambda at: relay.slow(at, 20_000.0),
}
PLACES = (range(100), range(1500, 3000), range(12_000, 24_000))
"""In TLS's handshake, where sessions are opened, and among requests. (The first message of a handshake is short: bytes
that wait for others behind them, to be changed together, would wait for ever.)"""


class Behind(LocalService):
    """A service whose alice has a cluster file of her own."""

    def command(self, name: str, lifeline: int) -> list[str]:
        everybodys, hers = str(self.folder / CLUSTER), str(self.folder / "alice.toml")
        plain = super().command(name, lifeline)
        return [hers if (name, one) == ("alice", everybodys) else one for one in plain]


@pytest.fixture
def relayed(tmp_path: Path) -> Iterator[tuple[LocalService, Relay, Points]]:
    """alice listens elsewhere than all others think, and the relay where they think."""
    folder = tmp_path / "service"
    cluster = cluster_of(folder)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        elsewhere = Address("127.0.0.1", listener.getsockname()[1])
    alice = msgspec.structs.replace(cluster.parties.alice, address=str(elsewhere))
    hers = msgspec.structs.replace(cluster, parties=msgspec.structs.replace(cluster.parties, alice=alice))
    cluster_file.write(hers, folder / "alice.toml")
    with (
        crashing(tmp_path / "points") as points,
        Relay(elsewhere, listen=parse_address(cluster.parties.alice.address)) as between,
        Behind(folder) as running,
    ):
        running.wait_ready()
        pushed(running)
        yield running, between, points


def test_faults_on_the_way_to_alice(
    relayed: tuple[LocalService, Relay, Points], capsys: pytest.CaptureFixture[str]
) -> None:
    running, between, points = relayed
    prg, books, count, happened = Prg(b"where faults are"), Books(running, points), 0, [0]

    def counted(fault: Fault) -> Fault:
        def change(data: bytes) -> bytes:
            happened[0] += 1
            return fault.change(data)

        return replace(fault, change=change)

    with Asking(running, model()) as asking:
        asking.recovered()
        for kind, direction, place in itertools.product(FAULTS, range(2), PLACES):
            # On each connection that is opened from now on, until it has happened to some of them.
            fault, happened[0] = counted(FAULTS[kind](place[prg.below(len(place))])), 0
            between.faults = ([fault], []) if direction == 0 else ([], [fault])
            between.break_all()
            until(lambda: happened[0] >= 2)
            between.faults = ([], [])
            between.break_all()
            count += happened[0]
            injected(f"connections of a running service: {kind}", happened[0])
            running.wait_ready()
            asking.recovered()
            books.in_step()
            books.check()
    with capsys.disabled():
        print("\n" + tell("connections to alice", asking.outcomes, count, books))
