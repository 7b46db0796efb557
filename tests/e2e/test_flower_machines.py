"""A federation whose sites are machines with networks of their own, and one whose cable is pulled."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

import namespaces
from namespaces import Namespaces
from processes import EVERYBODY, LONG, NAMES, OnMachines, write
from tacit.errors import DataError
from tacit.runs.folder import RunFolder
from tacit.runtimes.flower.client_app import BEGIN
from tacit.sites.launch import environment, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(namespaces.missing()), reason=namespaces.missing() or "available"),
]
EVERYONE, OTHERS = (0, 1, 2, 3), (0, 1, 2)
# A coordinator that waits in a stage of its second round until a cable is pulled, and takes its time between rounds.
COORDINATOR = """
import sys, time
from pathlib import Path
from tacit.runs.train import start

folder = Path(sys.argv[1])

def on_board(board):
    if (board.stage, board.round) == (sys.argv[2], 2):
        (folder / "now").touch()
        while not (folder / "cut").exists():
            time.sleep(0.05)

start(folder / "run.toml", folder / "run", lambda record, experiment: time.sleep(1), None, on_board)
"""


@pytest.fixture
def machines() -> Iterator[Namespaces]:
    with Namespaces(["superlink", "coordinator", *NAMES]) as made:
        made.forward()
        yield made


def test_a_site_cut_off_from_the_network_is_lost_and_the_same_process_comes_back(machines, tmp_path):
    federation, _ = write(tmp_path / "all", host=machines.address("superlink"), allow='privacy = "none"\n')
    folder, run = federation.folder, federation.folder / "run"
    (folder / "run.toml").write_text(LONG)
    (folder / "coordinator.toml").write_text(f"[wait]\nwork = 60.0\nstage = 60.0\njoin = {EVERYBODY}\n")
    with running(OnMachines(federation, machines)) as started, (folder / "coordinator.log").open("wb") as log:
        command = [sys.executable, "-c", COORDINATOR, str(folder), BEGIN["train"]]
        coordinator = machines.start(
            "coordinator", command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(folder)
        )
        try:
            await_that(lambda: (folder / "now").exists(), coordinator)
            machines.unplug("s3")
            (folder / "cut").touch()
            await_that(lambda: len(cohorts(run)) >= 4, coordinator)
            assert cohorts(run)[:4] == [EVERYONE, OTHERS, OTHERS, OTHERS]
            machines.plug("s3")
            await_that(lambda: cohorts(run)[-1] == EVERYONE, coordinator)
        finally:
            coordinator.kill()
            coordinator.wait()
        assert started.running["s3"].poll() is None
    history = RunFolder.open(run).history()
    assert "did not answer" in history[1].lost[3]
    assert all(record.note == "" and record.secure_sum.minimum == 3 for record in history)
    assert federation.journal("s3").read_text().count(" started  site s3") == 1
    assert "cannot be reached" in started.log("s3").read_text()


def cohorts(run) -> list[tuple[int, ...]]:
    """Who finished each round so far."""
    try:
        return [record.cohort for record in RunFolder.open(run).history()]
    except DataError:
        return []


def await_that(holds, coordinator: subprocess.Popen) -> None:
    end = time.monotonic() + 600
    while not holds():
        assert coordinator.poll() is None
        assert time.monotonic() < end
        time.sleep(0.2)
