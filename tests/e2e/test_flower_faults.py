"""What becomes of a training over Flower when processes die, lines are cut or bits change: real processes."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file
from torch import nn

from processes import EVERYBODY, MASKED, coordinated, everybody, largest_difference, write
from relay import Relay, flip
from tacit.federated.fedavg import FedAvg
from tacit.federated.secure_sum.attestation import Attestation
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.masked import MaskedSum
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.transcript import unseal
from tacit.party.address import Address
from tacit.runs.evidence import Evidence
from tacit.runtimes.flower.asking import Timing
from tacit.runtimes.simulation import federate
from tacit.sites.launch import environment, processes

pytestmark = pytest.mark.slow
SHORT = Timing(work=40, stage=40, linger=2, gather=EVERYBODY, join=EVERYBODY)
MAIN = "from tacit.cli.main import main; main()"


@pytest.mark.parametrize("stage", ["train.begin", "query.share", "query.mask", "query.confirm", "query.unmask"])
def test_a_site_killed_in_a_stage_is_a_drop_out_and_comes_back(tmp_path, stage):
    federation, _ = write(tmp_path / "all")
    with processes(federation) as running, coordinated(federation, MASKED, SHORT) as over:
        everybody(over)
        killed = []

        def kill(board):
            if board.stage == stage and not killed:
                killed.append(stage)
                running.kill("s3")

        over.sites.asking.board.changed = kill
        record = over.advance()
        counted = stage in ("query.confirm", "query.unmask")
        assert record.cohort == ((0, 1, 2, 3) if counted else (0, 1, 2))
        assert counted or "did not answer" in record.lost[3]
        assert record.secure_sum.minimum == 3
        running.start_site("s3")
        everybody(over)
        assert over.advance().cohort == (0, 1, 2, 3)


def test_a_coordinator_killed_goes_on_from_its_last_round_with_other_masks(tmp_path):
    federation, examples = write(tmp_path / "all")
    (federation.folder / "run.toml").write_text(MASKED)
    run = federation.folder / "run"
    with processes(federation):
        first = train(federation, ["train", str(federation.folder / "run.toml"), "--run", str(run)])
        wait_for_rounds(run, 2)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        again = train(federation, ["resume", str(run)])
        assert again.wait(600) == 0
    assert rounds_of(run) == 6
    secure = SecureMean(MaskedSum.among(4, Policy(3)))
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    algorithm = FedAvg(lr=0.3, batch_size=8)
    simulated = federate(network, examples, algorithm=algorithm, rounds=6, cohort=4, seed=3, secure_sum=secure)
    assert largest_difference(load_file(run / "model.safetensors"), simulated.model.state_dict()) <= 1e-6
    entries = [unseal(entry)[0] for entry in Evidence(run).entries()]
    summed = [Attestation.parse(entry.attestation) for entry in entries if entry.attestation]
    assert len({attestation.invite.round for attestation in summed}) == len(summed) >= 6
    assert {entry.purpose.round for entry in entries} == set(range(1, 7))
    audit = subprocess.run([sys.executable, "-c", MAIN, "audit", str(run)], capture_output=True, text=True)
    assert audit.returncode == 0, audit.stdout + audit.stderr


def test_a_superlink_that_dies_ends_the_run_which_goes_on_when_it_is_back(tmp_path):
    federation, _ = write(tmp_path / "all")
    (federation.folder / "run.toml").write_text(MASKED)
    run = federation.folder / "run"
    with processes(federation) as running:
        first = train(federation, ["train", str(federation.folder / "run.toml"), "--run", str(run)])
        wait_for_rounds(run, 1)
        running.kill("superlink")
        assert first.wait(300) == 2
        assert rounds_of(run) < 6
        running.start_superlink()
        assert train(federation, ["resume", str(run)]).wait(600) == 0
    assert rounds_of(run) == 6
    assert "the SuperLink at 127.0.0.1" in (federation.folder / "coordinator.log").read_text()


def test_a_site_cut_off_is_lost_and_the_same_process_comes_back(tmp_path):
    federation, _ = write(tmp_path / "all")
    with Relay(Address("127.0.0.1", federation.port)) as relay:
        port = relay.address.port
        behind(federation, "s3", port)
        with processes(federation) as running, coordinated(federation, MASKED, SHORT) as over:
            everybody(over)
            assert over.advance().cohort == (0, 1, 2, 3)
            relay.__exit__()
            record = over.advance()
            assert record.cohort == (0, 1, 2)
            assert running.running["s3"].poll() is None
            with Relay(Address("127.0.0.1", federation.port), listen=Address("127.0.0.1", port)):
                everybody(over)
                assert over.advance().cohort == (0, 1, 2, 3)
                running.kill("s3")
    assert re.search("cannot be reached", running.log("s3").read_text())


def test_bits_changed_on_the_way_are_noticed_by_tls_and_never_reach_a_round(tmp_path):
    federation, _ = write(tmp_path / "all")
    flips = [flip(at) for at in range(4_000, 400_000, 4_000)]
    with Relay(Address("127.0.0.1", federation.port), to_target=flips, to_caller=flips) as relay:
        behind(federation, "s3", relay.address.port)
        with processes(federation) as running, coordinated(federation, MASKED, SHORT) as over:
            assert len(over.sites.asking.presence.await_some(3, EVERYBODY)) >= 3
            for _ in range(2):
                record = over.advance()
                assert set(record.cohort) >= {0, 1, 2}
            running.kill("s3")
            notes = " ".join(over.sites.asking.board.notes)
    assert "changed on its way" not in notes
    assert relay.passed[0] > 4_000
    assert re.search("cannot be reached|not accept", running.log("s3").read_text())


def test_a_superlink_with_another_certificate_is_not_spoken_to(tmp_path):
    federation, _ = write(tmp_path / "all")
    other, _ = write(tmp_path / "other")
    (federation.folder / "theirs.pem").write_bytes((other.folder / "superlink.pem").read_bytes())
    behind(federation, "s3", federation.port, certificates="theirs.pem")
    with processes(federation, ["s3"]) as running:
        assert running.running["s3"].wait(EVERYBODY) == 2
    assert "is not who it must be" in running.log("s3").read_text().replace("\n", " ")


def test_a_site_with_damaged_data_does_not_join_and_says_where(tmp_path):
    federation, _ = write(tmp_path / "all")
    (federation.folder / "table.csv").write_text("a,b\n1,0\nprivate,1\n")
    federation.site("s3", 'format = "csv"\npath = "table.csv"\ntarget = "b"\n', 'privacy = "none"\n')
    arguments = ["site", "join", "--config", str(federation.folder / "s3.toml")]
    done = subprocess.run([sys.executable, "-c", MAIN, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "line 3, column 'a': expected a number" in done.stderr
    assert "private" not in done.stderr + federation.journal("s3").read_text()


def behind(federation, name: str, port: int, certificates: str = "superlink.pem") -> None:
    """Have a site reach the SuperLink at another port."""
    folder = federation.folder
    text = (folder / "federation.toml").read_text()
    text = text.replace(f"127.0.0.1:{federation.port}", f"127.0.0.1:{port}").replace("superlink.pem", certificates)
    (folder / f"{name}.federation.toml").write_text(text)
    own = (folder / f"{name}.toml").read_text()
    (folder / f"{name}.toml").write_text(own.replace('"federation.toml"', f'"{name}.federation.toml"'))


def train(federation, arguments: list[str]) -> subprocess.Popen[bytes]:
    with (federation.folder / "coordinator.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, *arguments], stdout=log, stderr=log, env=environment(federation.folder)
        )


def rounds_of(run) -> int:
    try:
        database = sqlite3.connect(f"file:{run / 'history.sqlite'}?mode=ro", uri=True)
        try:
            return database.execute("SELECT count(*) FROM rounds").fetchone()[0]
        finally:
            database.close()
    except sqlite3.Error:
        return 0


def wait_for_rounds(run, wanted: int) -> None:
    end = time.monotonic() + 600
    while rounds_of(run) < wanted:
        assert time.monotonic() < end
        time.sleep(0.2)
