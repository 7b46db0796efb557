"""Links between machines that reach each other only by a router: over a LAN, over a WAN, and with a cable pulled."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import namespaces
from namespaces import ROUTER, Namespaces
from relay import LAN, WAN
from tacit.program.network import Network

PEER, RELAY = Path(__file__).parent / "link_peer.py", Path(__file__).parents[1] / "relay.py"
PORT = 7401

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(namespaces.missing()), reason=namespaces.missing() or "available"),
]


@pytest.fixture
def machines() -> Iterator[Namespaces]:
    with Namespaces(["alice", "bob"]) as made:
        yield made


class Run:
    """alice and bob on their machines, and a relay on the router."""

    def __init__(self, machines: Namespaces, network: Network, rounds: int, patience: float) -> None:
        self.machines = machines
        self.processes: list[subprocess.Popen[str]] = []
        figures = f"{network.round_trip * 1000},{network.bandwidth / 1e6}"
        at, by = f"{machines.address('alice')}:{PORT}", f"{machines.gateway('bob')}:{PORT}"
        self.alice = self.start("alice", [str(PEER), "alice", at, str(rounds), str(patience)], "ready")
        self.start(ROUTER, [str(RELAY), by, at, figures], "ready")
        self.bob = self.start("bob", [str(PEER), "bob", by, str(rounds), str(patience)], "connected")

    def start(self, name: str, command: list[str], first: str) -> subprocess.Popen[str]:
        process = self.machines.start(name, [sys.executable, *command], stdout=subprocess.PIPE)
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == first
        return process

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()


def test_machines_reach_each_other_only_through_the_router(machines: Namespaces) -> None:
    code = "import socket, sys; socket.create_connection((sys.argv[1], 9), timeout=0.5)"
    for address in (machines.address("alice"), "127.0.0.1", "192.0.2.1"):
        tried = subprocess.run(machines.command("bob", [sys.executable, "-c", code, address]), capture_output=True)
        assert tried.returncode == 1


@pytest.mark.parametrize("network", [LAN, WAN], ids=["lan", "wan"])
def test_rounds_take_as_long_as_the_network(machines: Namespaces, network: Network) -> None:
    run = Run(machines, network, 20, 60.0)
    try:
        output, _ = run.bob.communicate(timeout=120)
    finally:
        run.close()
    rounds = [float(line.split()[2]) for line in output.splitlines() if line.startswith("round")]
    assert len(rounds) == 20
    # A round in which both send at once waits for half a round trip; which of the two began it late is not known.
    assert sum(rounds) >= 19 * network.round_trip / 2


def test_a_pulled_cable_is_noticed_by_both(machines: Namespaces) -> None:
    run = Run(machines, LAN, 1_000_000, 3.0)
    try:
        while not run.bob.stdout.readline().startswith("round 50"):
            pass
        machines.unplug("bob")
        last = {}
        for name, process in (("alice", run.alice), ("bob", run.bob)):
            output, _ = process.communicate(timeout=120)
            last[name] = output.splitlines()[-1]
    finally:
        run.close()
    assert last["alice"] == "error bob has been silent for 3 seconds: is it still running?"
    assert last["bob"] == "error alice has been silent for 3 seconds: is it still running?"


def test_a_cable_that_is_put_back_in_time_is_not(machines: Namespaces) -> None:
    run = Run(machines, LAN, 400, 60.0)
    try:
        while not run.bob.stdout.readline().startswith("round 50"):
            pass
        machines.unplug("bob")
        with pytest.raises(subprocess.TimeoutExpired):
            run.bob.wait(1.0)
        machines.plug("bob")
        output, _ = run.bob.communicate(timeout=120)
    finally:
        run.close()
    assert output.splitlines()[-1].startswith("round 399")
