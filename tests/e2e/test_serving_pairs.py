"""Two pairs of workers behind one address of each party."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tacit
from serving import close, cluster_of, inputs, model, pushed, until
from tacit.party.local import LocalService

MODEL = model()


def workers_of(service: LocalService, party: str) -> list[int]:
    pid = service.pid(party)
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_two_pairs_answer_and_one_goes_on_when_the_other_is_killed(tmp_path: Path) -> None:
    cluster_of(tmp_path, workers=2)
    with LocalService(tmp_path) as service:
        service.wait_ready()
        pushed(service)
        until(lambda: all(len(workers_of(service, party)) == 2 for party in ("alice", "bob")))
        with tacit.connect(service.cluster, service.key("clinic")) as parties, ThreadPoolExecutor(6) as threads:
            small = parties.model("small")

            def ask(number: int) -> bool:
                given = inputs(1 + number % 3, number)
                return close(small(given, timeout=60.0), MODEL(given))

            assert all(threads.map(ask, range(24)))
            for worker in workers_of(service, "alice"):
                os.kill(worker, signal.SIGKILL)
                assert all(ask(number) for number in range(6))
                until(lambda gone=worker: gone not in (now := workers_of(service, "alice")) and len(now) == 2)
