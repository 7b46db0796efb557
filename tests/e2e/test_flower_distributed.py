"""Distributed differential privacy between real processes, one of which dies: the account is the in-process run's."""

from contextlib import closing
from pathlib import Path

import pytest
from safetensors.torch import load_file

from processes import DISTRIBUTED, EVERYBODY, largest_difference, write
from sites import answering, grid_of, tables, train_over, write_files
from tacit.dp.ledger import Ledger
from tacit.runs.audit import Auditor
from tacit.runs.train import start
from tacit.runtimes.flower.client_app import BEGIN, HELLO
from tacit.runtimes.flower.presence import Presence
from tacit.sites.launch import processes

EVERYONE, OTHERS = (0, 1, 2, 3), (0, 1, 2)
ALLOW = 'privacy = "distributed"\n'


@pytest.mark.slow
def test_the_account_over_flower_is_the_in_process_runs_with_a_site_that_dies(monkeypatch, tmp_path):
    federation, _ = write(tmp_path / "all", allow=ALLOW)
    folder, run = federation.folder, federation.folder / "run"
    (folder / "run.toml").write_text(DISTRIBUTED)
    (folder / "coordinator.toml").write_text(f"[wait]\nwork = 60.0\nstage = 60.0\njoin = {EVERYBODY}\n")
    looking = lookers(monkeypatch)
    with processes(federation) as running:

        def on_board(board):
            if (board.round, board.stage) == (2, BEGIN["train"]) and "s3" in running.running:
                running.kill("s3")

        def on_round(record, experiment):
            if record.round == 3:
                running.start_site("s3")
                assert len(looking[-1].await_some(4, EVERYBODY)) == 4

        history = start(folder / "run.toml", run, on_round, None, on_board).history
    cohorts = [record.cohort for record in history]
    assert (cohorts[0], cohorts[1], cohorts[-1]) == (EVERYONE, OTHERS, EVERYONE)
    assert "did not answer" in history[1].lost[3]
    assert all(record.secure_sum.noised_by == "clients" for record in history)

    here = make(tmp_path / "here")
    expected = in_one_process(monkeypatch, here, cohorts)
    assert [record.epsilon for record in history] == [record.epsilon for record in expected]
    assert rows(run) == rows(here / "run")
    assert history[-1].epsilon == spent(run)
    alike = in_one_process(monkeypatch, make(tmp_path / "everybody"), [EVERYONE] * 6)
    assert history[-1].epsilon > alike[-1].epsilon
    # The noise is each run's own.
    one, other = (load_file(where / "model.safetensors") for where in (run, here / "run"))
    assert largest_difference(one, other) > 0.05
    auditor = Auditor(run, None, None)
    assert [entry.round for entry in auditor.rounds()] == [1, 2, 3, 4, 5, 6]
    auditor.finish()


def in_one_process(monkeypatch, folder: Path, cohorts):
    """The rounds that these finish, over the same sites in this process."""
    files, at = write_files(folder, tables(4), ALLOW), [0]

    def meddle(stage, node, message):
        return message if stage == HELLO or node - 100 in cohorts[at[0] - 1] else None

    with answering(files, 4) as sites:
        grid = grid_of(sites)
        grid.meddle = meddle
        history = train_over(monkeypatch, files, grid, DISTRIBUTED, lambda board: at.__setitem__(0, board.round))
    assert [record.cohort for record in history] == cohorts
    return history


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def rows(run: Path) -> list[tuple[str, str, str]]:
    with closing(Ledger(run / "ledger.sqlite")) as ledger:
        return ledger.rows()


def spent(run: Path) -> float:
    with closing(Ledger(run / "ledger.sqlite")) as ledger:
        return ledger.epsilon("distributed", 1e-3)


def lookers(monkeypatch) -> list[Presence]:
    """Those that have looked which sites are there, the last one last."""
    found, look = [], Presence.look
    monkeypatch.setattr(Presence, "look", lambda self: (found.append(self), look(self))[1])
    return found
