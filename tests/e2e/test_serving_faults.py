"""Processes of the service killed while clients ask: what clients see, that all come back, that nothing is wrong."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from serving import close, cluster_of, inputs, model, pushed, until
from tacit.errors import Busy, PeerError, Refused
from tacit.party.client import Client
from tacit.party.local import LocalService

MODEL = model()


def worker_of(service: LocalService, party: str) -> int:
    children = Path(f"/proc/{service.pid(party)}/task/{service.pid(party)}/children").read_text().split()
    return int(children[0])


async def _asking(service: LocalService, done: Callable[[], bool], answered: list[bool], failed: list[str]) -> None:
    """A client that asks on, whatever happens; only documented errors may come, and only right answers."""
    client, number = Client(service.cluster, service.key("clinic")), 0
    try:
        while not done():
            number += 1
            given = inputs(1 + number % 3, number)
            try:
                output = await client.ask("small", given, timeout=20.0)
            except (PeerError, Busy, Refused) as error:
                failed.append(type(error).__name__)
                await asyncio.sleep(0.2)
                continue
            answered.append(close(output, MODEL(given)))  # type: ignore[arg-type]
    finally:
        await client.close()


@pytest.mark.slow
def test_killed_processes_cost_requests_but_no_answer_is_wrong_and_all_come_back(tmp_path: Path) -> None:
    cluster_of(tmp_path)
    with LocalService(tmp_path) as service:
        service.wait_ready()
        pushed(service)

        async def scenario(kill: Callable[[], None], back: Callable[[], None]) -> list[str]:
            answered: list[bool] = []
            failed: list[str] = []
            enough = 0
            asking = asyncio.create_task(
                _asking(service, lambda: bool(enough) and len(answered) >= enough, answered, failed)
            )
            while len(answered) < 5 and not asking.done():
                await asyncio.sleep(0.01)
            kill()
            await asyncio.to_thread(back)
            enough = len(answered) + 5
            await asyncio.wait_for(asking, 180)
            assert all(answered), "an answer was wrong"
            return failed

        for party in ("alice", "bob", "provider"):

            def restart(party: str = party) -> None:
                service.start(party)
                service.wait_ready()

            asyncio.run(scenario(lambda party=party: service.stop(party, signal.SIGKILL) and None, restart))  # type: ignore[misc]
        for party in ("alice", "bob"):
            before = worker_of(service, party)

            def came_back(party: str = party, before: int = before) -> None:
                until(lambda: worker_of(service, party) != before)
                service.wait_ready()

            failed = asyncio.run(scenario(lambda before=before: os.kill(before, signal.SIGKILL), came_back))  # type: ignore[misc]
            # A batch that was running is tried once more: a client sees at most that its second try failed.
            assert len(failed) <= 2, failed
