"""A run with secure sums that is killed (SIGKILL) in the middle of one goes on with new keys, to the same model."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tacit.federated.history import RoundRecord
from tacit.federated.secure_sum.attestation import Attestation
from tacit.federated.secure_sum.server import MaskedServer, Stage
from tacit.federated.secure_sum.shared_attestation import SharedAttestation
from tacit.federated.secure_sum.shared_server import SharedServer
from tacit.federated.transcript import Transcript
from tacit.runs.audit import Auditor
from tacit.runs.folder import RunFolder
from tacit.runs.train import Outcome, resume, start

pytest.importorskip("sklearn")

MODEL = """
from torch import nn

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
"""
CONFIG = """
seed = 3
[split]
name = "iid"
clients = 6
[model]
name = "model.py:small"
[selection]
name = "uniform"
cohort = 5
[rounds]
number = 4
checkpoint_every = 2
[execution]
solver = "plain"
[secure_sum]
minimum = 3
"""
KILLED_ROUND = 4
"""After a snapshot of round 2, so that the third round is run again too."""


NOISE = """
[privacy]
level = "distributed"
noise_multiplier = 1.0
"""


def written(folder: Path, protocol: str, number: int = 4, more: str = "") -> Path:
    (folder / "model.py").write_text(MODEL)
    path = folder / "run.toml"
    path.write_text(CONFIG.replace("number = 4", f"number = {number}") + f'protocol = "{protocol}"\n{more}')
    return path


def killed_and_resumed(config: Path, run: Path, log: Path, arrange: Callable[[], None]) -> None:
    """Two processes: one that is killed in round `KILLED_ROUND`, and one that goes on to the end."""

    def begin() -> None:
        watched(log)
        arrange()
        start(config, run)

    def go_on() -> None:
        watched(log)
        resume(run)

    killed, again = (get_context("fork").Process(target=work) for work in (begin, go_on))
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    assert len(RunFolder.open(run).history()) == KILLED_ROUND - 1
    again.start()
    again.join(120)
    assert again.exitcode == 0
    lines = [line.split() for line in log.read_text().splitlines()]
    assert {int(process) for process, _ in lines} == {killed.pid, again.pid}
    # No advert, masked vector or part came twice, in one life or in the other.
    assert len({frame for _, frame in lines}) == len(lines) > 50


def comparable(history: tuple[RoundRecord, ...]) -> list[RoundRecord]:
    return [replace(record, seconds=0.0) for record in history]


def require_same(whole: tuple[Path, Outcome], other: tuple[Path, Outcome]) -> None:
    """Models bit by bit, histories but for the time."""
    assert comparable(whole[1].history) == comparable(other[1].history)
    first, second = (load_file(run / "model.safetensors") for run, _ in (whole, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def numbers_of_sums(run: Path) -> list[bytes]:
    """What each sum in the transcript is called, which is drawn with its keys."""
    found = []
    for checked in Auditor(run).rounds():
        entry = checked.entry
        if entry.protocol == "masked":
            found.append(Attestation.parse(entry.attestation).invite.round)
        else:
            found.append(SharedAttestation.parse(entry.attestation).terms.round)
    return found


def watched(log: Path) -> None:
    """Note every masked vector, or part of a vector, that a server receives; in this process and its children."""

    def noting(kind: type[MaskedServer] | type[SharedServer]) -> None:
        receive = kind.receive

        def noted(self: MaskedServer | SharedServer, frame: bytes) -> int:
            number = receive(self, frame)
            if not isinstance(self, MaskedServer) or self.stage in (Stage.ADVERTISE, Stage.MASK):
                with log.open("a") as file:
                    file.write(f"{os.getpid()} {frame[-64:].hex()}\n")
            return number

        kind.receive = noted

    noting(MaskedServer)
    noting(SharedServer)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_stage(stage: Stage) -> Callable[[], None]:
    """Die when the server of the round is about to close a stage: all answers of it have come."""

    def arrange() -> None:
        close, rounds = MaskedServer.close, []

        def closing(self: MaskedServer) -> dict[int, bytes]:
            if self.stage is Stage.ADVERTISE:
                rounds.append(self)
            if len(rounds) == KILLED_ROUND and self.stage is stage:
                die()
            return close(self)

        MaskedServer.close = closing

    return arrange


def at_call(name: str, calls: int) -> Callable[[], None]:
    """Die at so many calls of something that the two servers do."""

    def arrange() -> None:
        real, seen = getattr(SharedServer, name), []

        def called(self: SharedServer, *arguments: object) -> object:
            seen.append(name)
            if len(seen) == calls:
                die()
            return real(self, *arguments)

        setattr(SharedServer, name, called)

    return arrange


def when_written_down() -> None:
    """Die when the round stands in the transcript, but not yet in the history."""
    close = Transcript.close

    def closed(self: Transcript, before, *arguments: object) -> None:
        close(self, before, *arguments)
        if before.round + 1 == KILLED_ROUND:
            die()

    Transcript.close = closed


MOMENTS = {
    **{f"masked, {stage.name.lower()}": ("masked", at_stage(stage)) for stage in tuple(Stage)[:5]},
    "masked, written down": ("masked", when_written_down),
    # Five clients send two parts a round; the servers settle and reveal twice a round, once each.
    "shared, parts arriving": ("shared", at_call("receive", 3 * 10 + 4)),
    "shared, settling": ("shared", at_call("settle", 3 * 2 + 2)),
    "shared, revealing": ("shared", at_call("reveal", 3 * 2 + 1)),
    "shared, one share revealed": ("shared", at_call("reveal", 3 * 2 + 2)),
    "shared, both revealed": ("shared", at_call("attest", 3 * 2 + 1)),
    "shared, written down": ("shared", when_written_down),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Outcome]]:
    """Runs that nothing happened to."""
    folders = {protocol: tmp_path_factory.mktemp(protocol) for protocol in ("masked", "shared")}
    return {name: (path / "whole", start(written(path, name), path / "whole")) for name, path in folders.items()}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_within_a_sum(whole: dict[str, tuple[Path, Outcome]], tmp_path: Path, moment: str) -> None:
    protocol, arrange = MOMENTS[moment]
    run = tmp_path / "run"
    killed_and_resumed(written(tmp_path, protocol), run, tmp_path / "log", arrange)
    require_same(whole[protocol], (run, resume(run)))
    auditor = Auditor(run)
    entries = list(auditor.rounds())
    # Rounds 3 and 4 are run again; the fourth had been written down only if it was over.
    written_down = "written down" in moment
    assert [entry.round for entry in entries] == [1, 2, 3, *([4] if written_down else []), 3, 4]
    assert [entry.again for entry in entries] == [False] * (4 if written_down else 3) + [True, written_down]
    assert auditor.finish().models["model.safetensors"] == 4
    numbers = numbers_of_sums(run)
    assert len(set(numbers)) == len(numbers)
    # Without noise, a round that is run again comes to the same sum.
    assert len({(entry.round, entry.entry.after) for entry in entries}) == 4


@pytest.mark.parametrize(
    "moment", ["masked, unmask", "masked, written down", "shared, one share revealed", "shared, written down"]
)
def test_noise_is_drawn_and_paid_for_again(tmp_path: Path, moment: str) -> None:
    protocol, arrange = MOMENTS[moment]
    run = tmp_path / "run"
    killed_and_resumed(written(tmp_path, protocol, more=NOISE), run, tmp_path / "log", arrange)
    auditor = Auditor(run)
    entries = list(auditor.rounds())
    auditor.finish()
    of_round = {number: [entry.entry for entry in entries if entry.round == number] for number in range(1, 5)}
    assert [len(of_round[number]) for number in range(1, 5)] == [1, 1, 2, 2 if "written down" in moment else 1]
    for repeated in of_round.values():
        assert len({entry.after for entry in repeated}) == len(repeated)
    # Charged before the sum was opened: twice each for rounds 3 and 4, whether or not the first time was written down.
    charges = [charge.label.rpartition(" ")[2] for entry in entries for charge in entry.entry.charges]
    assert charges == ["1", "2", "3", "4", "3", "4"]
    assert entries[-1].entry.spent.epsilon > 1.2 * entries[2].entry.spent.epsilon


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["masked", "shared"])
def test_the_command_killed_again_and_again(tmp_path: Path, protocol: str) -> None:
    config, run = written(tmp_path, protocol, number=40), tmp_path / "run"
    whole = start(config, tmp_path / "whole")
    program = Path(sys.executable).parent / "tacit"
    for attempt in range(4):
        command = ["resume", str(run)] if (run / "config.toml").exists() else ["train", str(config), "--run", str(run)]
        before, deadline = rounds_done(run), time.monotonic() + 60
        with subprocess.Popen([program, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and rounds_done(run) < before + 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            # Somewhere in a round.
            time.sleep(0.007 * attempt)
            process.send_signal(signal.SIGKILL)
    assert 0 < rounds_done(run) < 40
    require_same((tmp_path / "whole", whole), (run, resume(run)))
    numbers = numbers_of_sums(run)
    assert len(set(numbers)) == len(numbers) >= 40
    assert subprocess.run([program, "audit", str(run)], stdout=subprocess.DEVNULL).returncode == 0


def rounds_done(run: Path) -> int:
    return len(RunFolder.open(run).history()) if (run / "config.toml").exists() else 0
