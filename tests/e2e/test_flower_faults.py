"""What becomes of a training over Flower when processes die, keys are wrong or data is damaged: real processes."""

import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from processes import EVERYBODY, LONG, MASKED, coordinated, everybody, in_one_process, largest_difference, write
from tacit.data.examples import Examples
from tacit.data.heart_disease import Moments
from tacit.federated.evaluation import evaluate
from tacit.federated.secure_sum.attestation import Attestation
from tacit.federated.secure_sum.server import Stage
from tacit.federated.transcript import unseal
from tacit.identity import Identity, key_text
from tacit.runs.evidence import Evidence
from tacit.runtimes.flower.asking import Timing
from tacit.runtimes.flower.client_app import BEGIN, STAGES
from tacit.runtimes.flower.federation_file import FederationFile, entry
from tacit.runtimes.flower.superlink import SuperLink
from tacit.sites.config import SiteFile
from tacit.sites.launch import environment, processes

pytestmark = pytest.mark.slow
SHORT = Timing(work=40, stage=40, linger=2, gather=EVERYBODY, join=EVERYBODY)
MAIN = "from tacit.cli.main import main; main()"
ROUND = (BEGIN["train"], *dict.fromkeys(STAGES.values()))
"""The stages of a round, in their order."""
VECTOR_IS_IN = {name for stage, name in STAGES.items() if stage > Stage.MASK}
"""Those in which a site is asked whose vector has arrived."""
DYING = """
import os, signal, sys
from pathlib import Path
from tacit.runs.train import resume, start

def on_board(board):
    if (board.stage, board.round) == (sys.argv[3], int(sys.argv[4])):
        os.kill(os.getpid(), signal.SIGKILL)

config, run = map(Path, sys.argv[1:3])
resume(run, None, on_board) if run.exists() else start(config, run, None, None, on_board)
"""
DEATHS = (
    *((stage, 1) for stage in ROUND if stage not in VECTOR_IS_IN),
    *((stage, number) for number, stage in enumerate(ROUND, 1) if stage in VECTOR_IS_IN),
    (BEGIN["train"], 6),
)
"""In which stage of which round a coordinator dies; what comes before vectors in the first round that it runs."""
EVERYONE, OTHERS = (0, 1, 2, 3), (0, 1, 2)


def test_a_site_killed_in_any_stage_is_a_drop_out_and_comes_back(tmp_path):
    federation, _ = write(tmp_path / "all", training=0.75)
    cohorts = []
    with processes(federation) as running, coordinated(federation, LONG, SHORT) as over:
        board = over.sites.asking.board

        def advance():
            everybody(over)
            record = over.advance()
            cohorts.append(record.cohort)
            return record

        for stage in (*ROUND, BEGIN["train"]):
            with killed(running, board, stage):
                record = advance()
            assert record.cohort == (EVERYONE if stage in VECTOR_IS_IN else OTHERS), stage
            assert stage in VECTOR_IS_IN or "did not answer" in record.lost[3], stage
            assert record.secure_sum.minimum == 3
            assert record.note == ""
            if stage == ROUND[-1]:  # from which the next sum is set up ahead
                assert advance().cohort == EVERYONE
        assert advance().cohort == EVERYONE
        with killed(running, board, BEGIN["evaluate"], again=False):
            loss, accuracy = over.evaluate(None)
        kept = [SiteFile.read(federation.folder / f"s{index}.toml").examples()[1] for index in OTHERS]
        expected = evaluate(over.model(), together(kept))
        assert (loss, accuracy) == (pytest.approx(expected[0], abs=1e-3), pytest.approx(expected[1]))
        found = over.model().state_dict()
    assert largest_difference(found, in_one_process(tmp_path / "one", LONG, cohorts, training=0.75)) <= 1e-6
    journal = federation.journal("s3").read_text()
    assert journal.count(" started  site s3") == len(ROUND) + 2


def test_a_site_killed_while_features_are_summed_is_left_out(tmp_path):
    federation, examples = write(tmp_path / "all")
    text = MASKED.replace("classes = 2\n", "classes = 2\nstandardise = true\n")
    with processes(federation) as running, coordinated(federation, text, SHORT) as over:
        everybody(over)
        with killed(running, over.sites.asking.board, BEGIN["moments"], again=False):
            inputs = over.standardise(4)
        assert over.advance().cohort == OTHERS
    moments = Moments.of(together(examples[:3]).inputs)
    assert torch.allclose(inputs["mean"], moments.mean, atol=1e-6)
    assert torch.allclose(inputs["std"], moments.std, atol=1e-6)


def test_a_coordinator_killed_in_any_stage_goes_on_from_its_last_round_with_other_masks(tmp_path):
    federation, _ = write(tmp_path / "all")
    config, run = federation.folder / "run.toml", federation.folder / "run"
    config.write_text(MASKED)
    with processes(federation):
        for stage, number in DEATHS:
            process = dying(federation, stage, number)
            assert process.wait(600) == -signal.SIGKILL, stage
            assert rounds_of(run) == number - 1
        assert train(federation, ["resume", str(run)]).wait(600) == 0
    assert rounds_of(run) == 6
    expected = in_one_process(tmp_path / "one", MASKED, [EVERYONE] * 6)
    assert largest_difference(load_file(run / "model.safetensors"), expected) <= 1e-6
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
        await_that(lambda: rounds_of(run) >= 1)
        running.kill("superlink")
        assert first.wait(300) == 2
        assert rounds_of(run) < 6
        running.start_superlink()
        assert train(federation, ["resume", str(run)]).wait(600) == 0
    assert rounds_of(run) == 6
    assert "the SuperLink at 127.0.0.1" in (federation.folder / "coordinator.log").read_text()
    expected = in_one_process(tmp_path / "one", MASKED, [EVERYONE] * 6)
    assert largest_difference(load_file(run / "model.safetensors"), expected) <= 1e-6


def test_a_site_with_another_key_is_turned_away_by_the_superlink_and_by_the_coordinator(tmp_path):
    federation, _ = write(tmp_path / "all")
    folder, stranger = federation.folder, Identity.fresh()
    stranger.save(folder / "stranger.key")
    own = Identity.load(folder / "s3.key")
    forged = (folder / "federation.toml").read_text().replace(entry("s3", own), entry("s3", stranger))
    (folder / "forged.toml").write_text(forged)
    site = (folder / "s3.toml").read_text().replace("s3.key", "stranger.key").replace("federation.toml", "forged.toml")
    (folder / "s3.toml").write_text(site)
    patient = Timing(work=60, stage=60, linger=2, gather=EVERYBODY, join=0)
    with processes(federation) as running, coordinated(federation, LONG, patient) as over:
        presence, board = over.sites.asking.presence, over.sites.asking.board
        presence.await_some(3, EVERYBODY)
        await_that(lambda: "does not accept this node" in running.log("s3").read_text())
        assert over.advance().cohort == OTHERS
        # A SuperLink that helps it gets it no further than being asked who it is.
        node = FederationFile.parse(forged, folder / "forged.toml").sites[3].node
        link = FederationFile.read(folder / "federation.toml").superlink
        SuperLink(link, (folder / "superlink.secret").read_bytes()).register(node)
        await_that(lambda: presence.look() and any("not pinned here" in note for note in board.notes))
        assert f"a letter is from {key_text(stranger.public)}" in " ".join(board.notes)
        record = over.advance()
    assert (record.cohort, record.lost) == (OTHERS, {})
    journal = federation.journal("s3").read_text()
    assert "connected to the SuperLink" in journal
    assert not re.search("agreed|sent", journal)


def test_a_superlink_with_another_certificate_is_not_spoken_to(tmp_path):
    federation, _ = write(tmp_path / "all")
    other, _ = write(tmp_path / "other")
    (federation.folder / "theirs.pem").write_bytes((other.folder / "superlink.pem").read_bytes())
    text = (federation.folder / "federation.toml").read_text().replace("superlink.pem", "theirs.pem")
    (federation.folder / "s3.federation.toml").write_text(text)
    own = federation.folder / "s3.toml"
    own.write_text(own.read_text().replace('"federation.toml"', '"s3.federation.toml"'))
    with processes(federation, ["s3"]) as running:
        assert running.running["s3"].wait(EVERYBODY) == 2
    assert "is not who it must be" in running.log("s3").read_text().replace("\n", " ")


def test_a_site_whose_data_is_damaged_is_left_out_with_a_reason_until_it_is_mended(tmp_path):
    federation, examples = write(tmp_path / "all")
    folder, own = federation.folder, examples[3]
    rows = [[*values, label] for values, label in zip(own.inputs.tolist(), own.targets.tolist(), strict=True)]
    lines = ["a,b,c,d,y", *(",".join(map(str, row)) for row in rows)]
    damaged = [*lines[:2], "1,private,3,4,1", *lines[3:]]
    narrower = [",".join(line.split(",")[1:]) for line in lines]
    federation.site("s3", 'format = "csv"\npath = "table.csv"\ntarget = "y"\n', 'privacy = "none"\n')
    (folder / "table.csv").write_text("\n".join(damaged) + "\n")
    patient = Timing(work=60, stage=60, linger=2, gather=EVERYBODY, join=0)
    with processes(federation) as running, coordinated(federation, LONG, patient) as over:
        over.sites.asking.presence.await_some(3, EVERYBODY)
        assert running.running["s3"].wait(EVERYBODY) == 2
        assert over.advance().cohort == OTHERS

        (folder / "table.csv").write_text("\n".join(narrower) + "\n")
        running.start_site("s3")
        everybody(over)
        record = over.advance()
        assert record.cohort == OTHERS
        assert record.lost[3] == "refused: examples of shape (3,) here, expected (4,)"

        running.kill("s3")
        (folder / "table.csv").write_text("\n".join(lines) + "\n")
        running.start_site("s3")
        await_that(lambda: running.log("s3").read_text().count("connected to the SuperLink") == 2)
        everybody(over)
        assert over.advance().cohort == EVERYONE
    written = running.log("s3").read_text() + federation.journal("s3").read_text()
    assert "line 3, column 'b': expected a number" in " ".join(written.split())
    assert "private" not in written


@contextmanager
def killed(running, board, stage, again=True):
    """Have s3 die when a stage begins, and start it again afterwards."""
    died = []

    def changed(shown):
        if shown.stage == stage and not died:
            died.append(stage)
            running.kill("s3")

    board.changed = changed
    yield
    board.changed = lambda shown: None
    assert died == [stage]
    if again:
        running.start_site("s3")


def together(examples: list[Examples]) -> Examples:
    return Examples(torch.cat([own.inputs for own in examples]), torch.cat([own.targets for own in examples]))


def dying(federation, stage: str, number: int) -> subprocess.Popen[bytes]:
    """A coordinator that begins or goes on with a run, and dies when a stage of a round begins."""
    folder = federation.folder
    arguments = [str(folder / "run.toml"), str(folder / "run"), stage, str(number)]
    with (folder / "coordinator.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", DYING, *arguments], stdout=log, stderr=log, env=environment(folder)
        )


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


def await_that(holds) -> None:
    end = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)
