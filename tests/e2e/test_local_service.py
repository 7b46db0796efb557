"""`LocalService`, and so `tacit up`: what becomes of the three processes when the one that started them is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serving import cluster_of, until

PARENT = """
import sys, time
from pathlib import Path
from tacit.party.cluster_file import PARTIES
from tacit.party.local import LocalService

with LocalService(Path(sys.argv[1])) as service:
    if sys.argv[2] == "ready":
        service.wait_ready()
    print(*(service.pid(name) for name in PARTIES), flush=True)
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["started", "ready"])
def test_the_three_and_their_workers_end_when_their_parent_is_killed(tmp_path: Path, when: str) -> None:
    cluster_of(tmp_path)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), when], stdout=subprocess.PIPE, text=True)
    fronts: list[int] = []
    try:
        assert parent.stdout
        fronts = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(fronts) == 3
        workers = [pid for front in fronts for pid in children(front)]
        assert len(workers) == (2 if when == "ready" else 0)
        assert all(map(alive, (*fronts, *workers)))
        os.kill(parent.pid, signal.SIGKILL)
        until(lambda: not any(map(alive, (*fronts, *workers))))
    finally:
        parent.kill()
        parent.wait()
        if parent.stdout:
            parent.stdout.close()
        for pid in filter(alive, fronts):
            os.kill(pid, signal.SIGKILL)
    for name in ("alice", "bob", "provider"):
        lines = (tmp_path / f"{name}.log").read_text().splitlines()
        assert '"event":"stopped"' in lines[-1].replace(" ", ""), lines[-3:]
