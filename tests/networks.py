"""The whole service over a network: alice, bob, the provider and those who call them, each at a place of its own.

A *place* is a machine of `namespaces`, or, where these are not to be had, this machine. Nobody reaches one of the three
but through a relay of its own, which takes the time that the network takes: so the cluster file of each says of the
others where their relays are, and of itself where it listens. A relay can be killed, which cuts every connection to
whom it leads, and started again.
"""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from namespaces import ROUTER, Namespaces
from tacit.party import cluster_file, service
from tacit.party.address import Address
from tacit.party.cluster_file import PARTIES, ClusterFile, NetworkFigures, Parties, Pools, Serving
from tacit.party.local import CLUSTER, LocalService, free_ports, prepare
from tacit.program.network import Network

CLIENT = "client"
_RELAY = Path(__file__).parent / "relay.py"
_PORT, _HTTP, _RELAYED = 7401, 9401, 7501
T = TypeVar("T")

EXPLAINED: list[str] = []
"""What tests found out about times, for the end of the tests' output: no test asserts it."""


class Place:
    """Where everybody is, and at which addresses: all of them on this machine."""

    def __init__(self, local: ClusterFile) -> None:
        self._local, self._relayed = local, free_ports(len(PARTIES))

    def listens(self, party: str) -> Address:
        """Where a party listens."""
        return self._local.party(party).reached_at

    def http(self, party: str) -> Address:
        """Where a party shows its metrics."""
        found = self._local.party(party).http_at
        assert found
        return found

    def relay(self, party: str) -> tuple[Address, Address]:
        """Where the relay to a party listens, and whom it calls."""
        return Address("127.0.0.1", self._relayed[PARTIES.index(party)]), self.listens(party)

    def reached(self, party: str, caller: str) -> Address:
        """Where a caller reaches a party."""
        return self.relay(party)[0]

    def inside(self, name: str, work: Callable[[], T]) -> T:
        """Do something where somebody is."""
        return work()

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """A command line that runs a command where somebody is, or on the router."""
        return list(command)


class Machines(Place):
    """Each on a machine of its own."""

    def __init__(self, machines: Namespaces) -> None:
        self.machines = machines

    def listens(self, party: str) -> Address:
        return Address(self.machines.address(party), _PORT)

    def http(self, party: str) -> Address:
        return Address("127.0.0.1", _HTTP)

    def relay(self, party: str) -> tuple[Address, Address]:
        return Address("0.0.0.0", self._relayed(party)), self.listens(party)

    def reached(self, party: str, caller: str) -> Address:
        return Address(self.machines.gateway(caller), self._relayed(party))

    def inside(self, name: str, work: Callable[[], T]) -> T:
        return self.machines.inside(name, work)

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        return self.machines.command(name, command)

    @staticmethod
    def _relayed(party: str) -> int:
        return _RELAYED + PARTIES.index(party)


class Spread(LocalService):
    """The service, spread over a network; see the module."""

    def __init__(self, folder: Path, place: Place, network: Network) -> None:
        super().__init__(folder)
        self.place, self.network = place, network
        self._relays: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> "Spread":
        try:
            for party in PARTIES:
                self.connect(party)
            super().__enter__()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        super().close()
        for party in list(self._relays):
            self.cut(party)

    def connect(self, party: str) -> None:
        """Start the relay to a party."""
        listen, target = self.place.relay(party)
        figures = f"{self.network.round_trip * 1000},{self.network.bandwidth / 1e6}"
        relay = subprocess.Popen(
            self.place.command(ROUTER, [sys.executable, str(_RELAY), str(listen), str(target), figures]),
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._relays[party] = relay
        assert relay.stdout
        assert relay.stdout.readline().strip() == "ready"

    def cut(self, party: str) -> None:
        """End the relay to a party, and with it every connection to it."""
        relay = self._relays.pop(party)
        relay.kill()
        relay.wait()
        if relay.stdout:
            relay.stdout.close()

    def command(self, name: str, lifeline: int) -> list[str]:
        key, folder = self.folder / f"{name}.key", self.folder / name
        line = service.command(name, self.folder / f"{name}.toml", key, folder, lifeline)
        return self.place.command(name, line)

    def readiness(self, name: str) -> dict[str, object]:
        return self.place.inside(name, lambda: super(Spread, self).readiness(name))

    def here(self, work: Callable[[], T]) -> T:
        """Do something where the client is."""
        return self.place.inside(CLIENT, work)


@contextlib.contextmanager
def spread(
    folder: Path, network: Network, *, namespaces: bool, batch_sizes: tuple[int, ...], ahead: int
) -> Iterator[Spread]:
    """A service that is ready, over a network, in namespaces or on this machine alone."""
    local = prepare(
        folder, owner="owner", clients=(CLIENT,), serving=Serving(batch_sizes=batch_sizes, memory_gb=0.1),
        pools=Pools(disk_gb=0.2, ahead=ahead),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        place = Machines(stack.enter_context(Namespaces([*PARTIES, CLIENT]))) if namespaces else Place(local)
        figures = NetworkFigures(rtt_ms=1000 * network.round_trip, mbps=network.bandwidth / 1e6)
        (folder / CLUSTER).unlink()
        for name in (*PARTIES, CLIENT):
            members = {
                party: msgspec.structs.replace(
                    local.party(party),
                    address=str(place.listens(party) if party == name else place.reached(party, name)),
                    http=str(place.http(party)),
                )
                for party in PARTIES
            }
            seen = msgspec.structs.replace(local, parties=Parties(**members), network=figures)
            cluster_file.write(seen, folder / (CLUSTER if name == CLIENT else f"{name}.toml"))
        running = stack.enter_context(Spread(folder, place, network))
        running.wait_ready()
        yield running
