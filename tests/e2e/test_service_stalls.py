"""A running service of which one process stands still, or whose client does not read: who is held up, how long."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tacit
from crashes import Asking, Books, Points, crashing, ready, seen, workers_of
from faults import injected
from serving import POOLS, close, cluster_of, inputs, model, pushed, until
from tacit.errors import DeadlineExceeded, PeerError
from tacit.identity import key_text
from tacit.party import calling, messages, push
from tacit.party.client import Client
from tacit.party.local import LocalService
from tacit.party.messages import Ask
from tacit.party.owning import Owner
from tacit.party.session_messages import Purpose
from tacit.ring.prg import Prg
from tacit.wire import Kind

pytestmark = pytest.mark.slow
MODEL = model()
WIDE = 20_000
UNREAD_BYTES = 1 << 26
"""What a party keeps for a client that does not read."""


@contextlib.contextmanager
def running(folder: Path, workers: int = 1) -> Iterator[tuple[LocalService, Points]]:
    cluster_of(folder / "service", workers=workers)
    with crashing(folder / "points") as points, LocalService(folder / "service") as service:
        service.wait_ready()
        pushed(service)
        yield service, points


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    with running(tmp_path_factory.mktemp("stalls")) as (service, _):
        yield service


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    injected("processes stopped")
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def right(given: torch.Tensor, output: Any) -> bool:
    with torch.inference_mode():
        return close(output, MODEL(given))


@pytest.mark.parametrize("party", ["alice", "bob"])
def test_a_party_that_stands_still_costs_time_and_no_answer(service: LocalService, party: str) -> None:
    with tacit.connect(service.cluster, service.key("clinic")) as parties:
        small = parties.model("small")
        assert right(inputs(1), small(inputs(1)))
        other = "bob" if party == "alice" else "alice"
        with stopped(service.pid(party)):
            # Who gives little time is told so; who gives more is answered when the party goes on.
            began, patient = time.monotonic(), small.submit(inputs(2), timeout=60.0)
            with pytest.raises(DeadlineExceeded, match=r"within 3 seconds|deadline"):
                small(inputs(1), timeout=3.0)
            assert time.monotonic() - began < 15
            until(lambda: not service.readiness(other).get("ready"), 30)
        assert right(inputs(2), patient.result(90))
        service.wait_ready()
        assert right(inputs(3), small(inputs(3)))


def test_while_the_provider_stands_still_clients_are_served_from_the_pools(service: LocalService) -> None:
    def fours() -> list[int]:
        return [ticket.serial for ticket in ready(service, "bob") if ticket.batch == 4]

    with tacit.connect(service.cluster, service.key("clinic")) as parties:
        small, answered, full = parties.model("small"), 0, POOLS.ahead // 4
        until(lambda: len(left := fours()) == full and max(left) > full)  # as many again as workers have taken
        with stopped(service.pid("provider")):
            with contextlib.suppress(DeadlineExceeded):
                for answered in range(1000):
                    given = inputs(4, answered)
                    assert right(given, small(given, timeout=3.0))
            assert answered < 999, "tickets came from somewhere else"
        assert answered > full, "the pools were full, and workers had tickets besides"
        assert right(inputs(1), small(inputs(1), timeout=60.0))


@pytest.mark.parametrize("party", ["alice", "bob"])
def test_a_request_whose_worker_hangs_is_answered_by_the_other_pair(tmp_path: Path, party: str) -> None:
    with running(tmp_path, workers=2) as (service, points):
        until(lambda: all(len(workers_of(service, one)) == 2 for one in ("alice", "bob")))
        with tacit.connect(service.cluster, service.key("clinic")) as parties, Asking(service, MODEL, "lab") as asking:
            small, before = parties.model("small"), workers_of(service, party)
            assert right(inputs(1), small(inputs(1)))
            points.arm(f"stop {party}'s worker opens round 2")
            asked: list[Future[Any]] = []
            while points.left:
                asked.append(small.submit(inputs(1, len(asked)), timeout=60.0))
                time.sleep(0.1)
            injected("workers stopped in a run")
            # The other worker of its pair waits for ten seconds; what ran is run again at the other pair.
            for number, future in enumerate(asked):
                assert right(inputs(1, number), future.result(30))
            asking.recovered()
            # Its party finds out that it hangs, and starts another one.
            until(lambda: len([pid for pid in workers_of(service, party) if pid in before]) == 1, 60)
            until(lambda: len(workers_of(service, party)) == 2)
            Books(service, points).check()
        assert {*seen(asking.outcomes)} == {"right"}


@pytest.mark.parametrize("party", ["alice", "bob"])
def test_where_there_is_one_pair_a_hanging_worker_is_replaced_in_time(tmp_path: Path, party: str) -> None:
    with running(tmp_path) as (service, points), tacit.connect(service.cluster, service.key("clinic")) as parties:
        small = parties.model("small")
        points.arm(f"stop {party}'s worker opens round 3")
        assert right(inputs(1), small(inputs(1), timeout=60.0))
        assert not points.left
        injected("workers stopped in a run")
        Books(service, points).check()


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("sessions", [1, 4])
def test_a_client_that_does_not_read_is_left_and_holds_up_nobody(service: LocalService, sessions: int) -> None:
    """Its answers are far larger than what it asks, and it asks on and on, in all its sessions in turn."""
    identity = service.key("owner")
    examples = [torch.zeros(1, 2)]
    wide = push.prepare(nn.Linear(2, WIDE), examples, name="wide", owner=key_text(identity.public), batch_sizes=(4,))
    with Owner(service.cluster, identity) as owner:
        digest = owner.push(wide)
        until(lambda: any(one.model == digest and all(one.tickets.values()) for one in owner.list()["alice"]))
    before = {party: resident(service.pid(party)) for party in ("alice", "bob")}
    largest = dict(before)

    async def scenario() -> int:
        client = Client(service.cluster, service.key("lab"))
        await client.ask("wide", torch.ones(4, 2))
        await client.close()
        parties = ("alice", "bob")
        key = service.key("lab")
        called = [await calling.call(service.cluster, "lab", key, Purpose.CLIENT, parties) for _ in range(sessions)]
        left = [channels for channels, _ in called]
        for number in range(1500):
            channels = left.pop(0)
            with contextlib.suppress(PeerError):
                for channel in channels.values():
                    channel.send(Kind.CALL, [Prg.fresh().words((4, 2))], messages.encode(Ask(number, digest, 4, 6e4)))
                left.append(channels)
            if not left:
                break
            await asyncio.sleep(0.05)
            for party in largest:
                largest[party] = max(largest[party], resident(service.pid(party)))
        for channels, _ in called:
            for channel in channels.values():
                channel.abort()
        return number

    with Asking(service, MODEL) as asking:
        asked = asyncio.run(scenario())
    injected("clients that do not read")
    assert UNREAD_BYTES // (8 * 4 * WIDE) < asked < 1499, "it was not left, or too soon"
    for party in before:
        assert largest[party] - before[party] < 1.5 * UNREAD_BYTES
    outcomes = asking.outcomes
    assert {*seen(outcomes)} == {"right"}
    assert len(outcomes) >= 5
    with Owner(service.cluster, identity) as owner:
        owner.delete("wide")
