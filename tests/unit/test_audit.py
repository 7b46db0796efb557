"""`tacit audit`: a run's folder passes as it was left, and whatever is changed in it is named."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tacit.cli.main import app
from tacit.errors import DataError, InputError
from tacit.federated.history import RoundRecord
from tacit.federated.parties import Parties
from tacit.federated.transcript import unseal
from tacit.identity import Identity
from tacit.runs.evidence import read_pins
from tacit.runs.folder import RunFolder
from tacit.runs.train import resume, start
from transcripts import resealed

pytest.importorskip("sklearn")

MODEL = """
from torch import nn

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.Linear(4, 10))
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
"""
MASKED = "[secure_sum]\nminimum = 3\n[privacy]\nnoise_multiplier = 1.0\n"
SHARED = '[secure_sum]\nprotocol = "shared"\nminimum = 3\n'


class Interrupted(Exception):
    pass


def trained(folder: Path, text: str, interrupt_at: int | None = None) -> Path:
    (folder / "model.py").write_text(MODEL)
    (folder / "run.toml").write_text(CONFIG + text)
    run = folder / "run"

    def interrupt(record: RoundRecord, _experiment: object) -> None:
        if record.round == interrupt_at:
            raise Interrupted

    if interrupt_at is None:
        start(folder / "run.toml", run)
    else:
        with pytest.raises(Interrupted):
            start(folder / "run.toml", run, interrupt)
    return run


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with masked sums and privacy, interrupted after a round that no snapshot has, and resumed."""
    run = trained(tmp_path_factory.mktemp("masked"), MASKED, interrupt_at=3)
    resume(run)
    return run


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run with the same configuration."""
    return trained(tmp_path_factory.mktemp("other"), MASKED)


@pytest.fixture
def run(left: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(left, tmp_path / "run"))


def audit(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)], env={"COLUMNS": "200"})
    if isinstance(result.exception, InputError):
        raise result.exception
    return result.exit_code, result.output


def figures(*arguments: str | Path) -> dict:
    code, output = audit(*arguments, "--json")
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert (code == 0) == found["in_order"]
    return found


def change(run: Path, file: str, *statements: str) -> None:
    database = sqlite3.connect(run / file)
    with database:
        for statement in statements:
            assert database.execute(statement).rowcount
    database.close()


class TestInOrder:
    def test_a_run_as_it_was_left(self, left: Path) -> None:
        code, output = audit(left)
        assert code == 0
        # Rounds 1 to 3, an interruption, and rounds 3 and 4 from the snapshot of round 2.
        assert "In order: 4 rounds in 5 entries, model.safetensors is the model after round 4" in output
        assert output.count("run again after an interruption") == 1
        assert output.count("5 of 5") == 5
        assert "Give --pinned" in output

    def test_in_figures(self, left: Path) -> None:
        found = figures(left, "--pinned", left / "pins.toml")
        assert (found["rounds"], found["entries"], found["own_pins"], found["wrong"]) == (4, 5, False, "")
        assert found["participants"] == [0, 1, 2, 3, 4, 5]
        history = RunFolder.open(left).history()
        assert found["epsilon"] == history[-1].epsilon
        assert found["models"]["model.safetensors"] == 4
        # The round that was run twice was paid for twice: its noise was drawn anew.
        assert history[2].epsilon > history[1].epsilon * 1.2
        assert figures(left, "--head", found["head"])["in_order"]

    def test_shared_sums(self, tmp_path: Path) -> None:
        code, output = audit(trained(tmp_path, SHARED))
        assert code == 0
        assert output.count("shared") == 4
        assert "In order: 4 rounds in 4 entries" in output

    def test_a_run_that_is_going_on(self, tmp_path: Path) -> None:
        run = trained(tmp_path, SHARED, interrupt_at=3)
        RunFolder.open(run).forget_after(2)
        code, output = audit(run)
        assert code == 0
        assert "The history ends 1 rounds before the transcript" in output

    def test_the_history_says_how_sums_were_taken(self, left: Path) -> None:
        for record in RunFolder.open(left).history():
            facts = record.secure_sum
            assert facts is not None
            assert (facts.protocol, facts.invited, facts.holders, facts.threshold) == ("masked", 5, 4, 3)
            assert facts.minimum == 4

    def test_an_audit_changes_nothing_and_needs_no_secret(self, run: Path) -> None:
        (run / "identity.pem").unlink()
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        assert audit(run)[0] == 0
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before

    def test_the_secret_key_is_the_owners_to_read(self, left: Path) -> None:
        assert (left / "identity.pem").stat().st_mode & 0o077 == 0


def without(number: int) -> Callable[[Path], None]:
    return lambda run: change(
        run,
        "transcript.sqlite",
        f"DELETE FROM transcript WHERE place = {number}",
        f"UPDATE transcript SET place = place - 1 WHERE place > {number}",
    )


def exchanged(run: Path) -> None:
    change(
        run,
        "transcript.sqlite",
        "UPDATE transcript SET place = 100 WHERE place = 2",
        "UPDATE transcript SET place = 2 WHERE place = 1",
        "UPDATE transcript SET place = 1 WHERE place = 100",
    )


def cut(run: Path) -> None:
    change(run, "transcript.sqlite", "DELETE FROM transcript WHERE place = 5")


def of_history(statement: str) -> Callable[[Path], None]:
    return lambda run: change(run, "history.sqlite", statement)


def of_ledger(statement: str) -> Callable[[Path], None]:
    return lambda run: change(run, "ledger.sqlite", statement)


def other_weights(run: Path) -> None:
    path = run / "model.safetensors"
    with torch.no_grad():
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] += 1e-6
    save_file(tensors, path, {"format": "pt", "trained": json.dumps(list(tensors))})


def other_config(run: Path) -> None:
    path = run / "config.toml"
    path.write_text(path.read_text().replace("noise_multiplier = 1.0", "noise_multiplier = 1.1"))


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a round removed": (without(2), "entry 2 (round 3): it does not follow"),
    "the first round removed": (without(1), "entry 1 (round 2): it does not follow"),
    "a row removed": (
        lambda run: change(run, "transcript.sqlite", "DELETE FROM transcript WHERE place = 2"),
        "has no entry 2: it was removed",
    ),
    "rounds exchanged": (exchanged, "entry 1 (round 2): it does not follow"),
    "the last round removed": (cut, "round 4 stands in the history and not in the transcript"),
    "a round repeated": (
        lambda run: change(
            run, "transcript.sqlite", "INSERT INTO transcript SELECT 6, entry FROM transcript WHERE place = 5"
        ),
        "entry 6 (round 4): it does not follow",
    ),
    "an entry that is no entry": (
        lambda run: change(run, "transcript.sqlite", "UPDATE transcript SET entry = x'c0' WHERE place = 3"),
        "entry 3: an entry of a transcript does not parse",
    ),
    "no transcript file": (
        lambda run: (run / "transcript.sqlite").write_bytes(b"not a database at all"),
        "transcript.sqlite is damaged",
    ),
    "another configuration": (other_config, "entry 1 (round 1): it is of another run"),
    "a participant added": (
        of_history("UPDATE rounds SET cohort = '[0, 1, 2, 3, 4, 5]' WHERE round = 1"),
        "round 1: the history names other participants",
    ),
    "less privacy spent": (
        of_history("UPDATE rounds SET epsilon = 0.5 WHERE round = 4"),
        "round 4: the history reports another ε",
    ),
    "a row of the history removed": (
        of_history("DELETE FROM rounds WHERE round = 2"),
        "round 2 stands in the transcript and not in the history",
    ),
    "the ledger emptied": (
        lambda run: (run / "ledger.sqlite").unlink(),
        "the run's ledger is missing",
    ),
    "a ledger's row changed": (of_ledger("UPDATE spending SET subject = 'nobody'"), "the privacy ledger"),
    "the ledger's last row removed": (
        of_ledger("DELETE FROM spending WHERE number = 5"),
        "the privacy ledger holds other charges",
    ),
    "one bit of the model": (other_weights, "model.safetensors is not the model that came of any round"),
    "a model that says nothing of its tensors": (
        lambda run: save_file({"x": torch.zeros(1)}, run / "best.safetensors"),
        "best.safetensors is not the file of a model",
    ),
}


class TestTampered:
    @pytest.mark.parametrize("name", TAMPERED)
    def test_is_named(self, run: Path, name: str) -> None:
        tamper, complaint = TAMPERED[name]
        tamper(run)
        code, output = audit(run)
        assert code == 1
        assert "audit failed: " in output
        assert complaint in output

    @pytest.mark.parametrize("file", ["transcript.sqlite", "model.safetensors", "pins.toml", "ledger.sqlite"])
    def test_a_file_of_another_run_with_the_same_configuration(self, run: Path, other: Path, file: str) -> None:
        shutil.copy(other / file, run / file)
        assert audit(run)[0] == 1

    def test_everything_of_another_run_but_the_pins(self, other: Path, left: Path) -> None:
        assert audit(other)[0] == 0
        code, output = audit(other, "--pinned", left / "pins.toml")
        assert code == 1
        assert "audit failed: entry 1 (round 1): it is not signed by the coordinator that is pinned" in output

    def test_the_transcript_that_an_earlier_audit_saw(self, run: Path) -> None:
        head = figures(run)["head"]
        cut(run)
        change(run, "history.sqlite", "DELETE FROM rounds WHERE round = 4")
        for path in run.glob("*.safetensors"):
            path.unlink()
        # All of the last round is gone, and nothing is left that contradicts it but what was seen before.
        assert audit(run)[0] == 0
        code, output = audit(run, "--head", head)
        assert code == 1
        assert "entries are missing at the end" in output

    def test_a_figure_of_privacy_that_the_charges_do_not_give(self, run: Path) -> None:
        folder = RunFolder.open(run)
        coordinator = Identity.load(run / "identity.pem")
        entries = folder.evidence.entries()
        last = unseal(entries[-1])[0]
        lower = msgspec.structs.replace(last.spent, epsilon=last.spent.epsilon * 0.9999)
        forged = resealed(entries, 4, msgspec.structs.replace(last, spent=lower), Parties.simulated(coordinator, 6))
        change(run, "transcript.sqlite", f"UPDATE transcript SET entry = x'{forged[4].hex()}' WHERE place = 5")
        code, output = audit(run)
        assert code == 1
        assert "entry 5 (round 4): it reports ε = " in output


class TestMistakes:
    def test_a_run_without_secure_sums(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"only runs with .secure_sum. keep one"):
            audit(trained(tmp_path, ""))

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="not a run's folder"):
            audit(tmp_path)

    @pytest.mark.parametrize("head", ["", "12", "g" * 64])
    def test_no_digest(self, left: Path, head: str) -> None:
        with pytest.raises(InputError, match="64 hexadecimal digits"):
            audit(left, "--head", head)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "coordinator = 3",
            'coordinator = "ed25519:AAAA"\nclients = []',
            'coordinator = "{key}"\nclients = ["{key}"]',
            'coordinator = "{key}"\nclients = []\nothers = 1',
            'coordinator = "ed25519:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="\nclients = []',
        ],
    )
    def test_no_pins(self, left: Path, tmp_path: Path, text: str) -> None:
        path = tmp_path / "pins.toml"
        path.write_text(text.replace("{key}", (left / "pins.toml").read_text().split('"')[1]))
        with pytest.raises(InputError, match="is not a file of pins"):
            audit(left, "--pinned", path)

    def test_a_resumed_run_with_exchanged_keys(self, run: Path, other: Path) -> None:
        shutil.copy(other / "pins.toml", run / "pins.toml")
        assert read_pins(run / "pins.toml") == read_pins(other / "pins.toml")
        with pytest.raises(DataError, match="one of them was exchanged"):
            RunFolder.open(run).evidence.parties(6)
        (run / "identity.pem").unlink()
        with pytest.raises(InputError, match="cannot be read"):
            RunFolder.open(run).evidence.parties(6)
