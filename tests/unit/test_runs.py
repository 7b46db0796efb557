"""Runs from a config: the folder, interruption and resuming, listing, and mistakes."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tacit.errors import DataError, InputError
from tacit.federated.history import RoundRecord
from tacit.runs import listing
from tacit.runs.folder import RunFolder
from tacit.runs.train import Outcome, resume, start

pytest.importorskip("sklearn")

MODEL = """
from torch import nn

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
"""
BASE = """
seed = 3
[data]
held_out = 0.2
[split]
name = "dirichlet"
clients = 6
[model]
name = "model.py:small"
initial = "xavier"
[selection]
name = "uniform"
cohort = 4
[rounds]
number = 5
evaluate_clients_every = 2
"""


def written(folder: Path, text: str = BASE) -> Path:
    (folder / "model.py").write_text(MODEL)
    path = folder / "run.toml"
    path.write_text(text)
    return path


def comparable(history: tuple[RoundRecord, ...]) -> list[RoundRecord]:
    return [replace(record, seconds=0.0) for record in history]


def models(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def assert_same_run(a: tuple[Path, Outcome], b: tuple[Path, Outcome]) -> None:
    assert comparable(a[1].history) == comparable(b[1].history)
    first, second = models(a[0]), models(b[0])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_everything_in_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = start(written(tmp_path), run)
    assert len(outcome.history) == 5
    kept = {path.name for path in run.iterdir()}
    expected = {"config.toml", "history.sqlite", "history.csv", "snapshot.safetensors", "best.safetensors"}
    assert expected | {"model.safetensors"} <= kept
    assert (run / "config.toml").read_text() == BASE
    assert RunFolder.open(run).history() == outcome.history
    with (run / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["round"]) for row in rows] == [1, 2, 3, 4, 5]
    assert [float(row["accuracy"]) for row in rows] == [record.accuracy for record in outcome.history]
    assert [record.clients is not None for record in outcome.history] == [False, True, False, True, True]
    assert outcome.history[-1].clients is not None
    assert outcome.history[-1].clients.count == 6


def _private(keys: str, *more: str) -> str:
    """The beginning of a config with distributed privacy, or that of another level."""
    level = more[0] if more and more[0] in ("client", "record") else "distributed"
    rest = "\n".join(more[level != "distributed" :])
    return f'[privacy]\nlevel = "{level}"\n{keys}\n{rest}\n[data]'


VARIANTS = {
    "scaffold": '[algorithm]\nname = "scaffold"\n',
    "ditto with top-k": '[algorithm]\nname = "ditto"\n[compression]\nscheme = "topk"\nfraction = 0.1\n',
    "adam": '[server]\noptimizer = "adam"\nlr = 0.01\n',
    "devices": "[devices]\nover_selection = 1.5\n",
    "asynchronous": '[devices]\n[algorithm]\nname = "fedbuff"\nbuffer = 2\nconcurrency = 3\n',
    "asynchronous and quantised": '[devices]\n[compression]\nscheme = "quantise"\n[algorithm]\nname = "fedbuff"\n'
    "buffer = 2\nconcurrency = 3\n",
    "masked": "[secure_sum]\nminimum = 3\n",
    "adaptive": '[privacy]\nnoise_multiplier = 0.3\nquantile = 0.5\naccountant = "pld"\nnoise_seed = 7\n',
    "record": '[privacy]\nlevel = "record"\ntarget_epsilon = 8.0\nparticipations = 3\nnoise_seed = 7\n',
    "distributed": '[secure_sum]\nminimum = 3\n[privacy]\nlevel = "distributed"\ntarget_epsilon = 8.0\nclip = 0.5\n'
    "noise_seed = 7\n",
    "distributed, verified": '[secure_sum]\nprotocol = "shared"\nminimum = 3\nbits = 12\nverified = true\n[privacy]\n'
    'level = "distributed"\nnoise = "discrete-gaussian"\nnoise_multiplier = 2.0\nclip = 0.5\nnoise_seed = 7\n',
    "private": "[privacy]\nnoise_multiplier = 1.0\nclip = 0.5\nnoise_seed = 7\n",
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_an_interrupted_run_goes_on_bit_by_bit_the_same(tmp_path: Path, variant: str) -> None:
    config = written(tmp_path, BASE + variant)
    whole = start(config, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def interrupt(record: RoundRecord, _experiment: object) -> None:
        if record.round == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        start(config, tmp_path / "broken", interrupt)
    assert_same_run((tmp_path / "whole", whole), (tmp_path / "broken", resume(tmp_path / "broken")))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", VARIANTS["scaffold"], VARIANTS["distributed"], "[execution]\nprocesses = 2\n"])
def test_a_killed_run_goes_on_bit_by_bit_the_same(tmp_path: Path, variant: str) -> None:
    rounds = 100  # enough that a run is killed before its end even where this process waits long for its turn
    config = written(tmp_path, BASE.replace("number = 5", f"number = {rounds}\ncheckpoint_every = 3") + variant)
    whole = start(config, tmp_path / "whole")
    run = tmp_path / "killed"
    for attempt in range(4):
        command = ["train", str(config), "--run", str(run)] if attempt == 0 else ["resume", str(run)]
        program = Path(sys.executable).parent / "tacit"
        before = rounds_done(run)
        deadline = time.monotonic() + 60
        with subprocess.Popen([program, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and rounds_done(run) < before + 3 and time.monotonic() < deadline:
                time.sleep(0.01 * (attempt + 1))
            process.send_signal(signal.SIGKILL)
    assert 0 < rounds_done(run) < rounds
    # What was spent on rounds that are run again stays spent, so a round may report more than it did at first.
    resumed = resume(run)
    spent = [record.epsilon or 0.0 for record in resumed.history]
    assert all(first <= again for first, again in zip((r.epsilon or 0.0 for r in whole.history), spent, strict=True))
    both = (replace(o, history=tuple(replace(r, epsilon=None) for r in o.history)) for o in (whole, resumed))
    assert_same_run(*zip((tmp_path / "whole", run), both, strict=True))


def rounds_done(run: Path) -> int:
    try:
        with sqlite3.connect(f"file:{run / 'history.sqlite'}?mode=ro", uri=True) as database:
            return int(database.execute("SELECT count(*) FROM rounds").fetchone()[0])
    except sqlite3.Error:
        return 0


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = start(written(tmp_path), run)
    again = resume(run)
    assert again.history == outcome.history


def test_early_stop_is_kept_when_resuming(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = start(written(tmp_path, BASE.replace("number = 5", "number = 50\ntarget_accuracy = 0.2")), run)
    assert 1 <= len(outcome.history) < 50
    assert "reached" in outcome.reason
    assert resume(run).history == outcome.history


def test_a_folder_that_is_taken_or_no_run(tmp_path: Path) -> None:
    config = written(tmp_path)
    run = tmp_path / "run"
    start(config, run)
    before = (run / "history.sqlite").read_bytes()
    with pytest.raises(InputError, match="is there already"):
        start(config, run)
    assert (run / "history.sqlite").read_bytes() == before
    with pytest.raises(DataError, match="is not a run's folder"):
        resume(tmp_path / "nothing")


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tacit.runs.folder.LOCK_PATIENCE", 0.2)
    run = tmp_path / "run"
    start(written(tmp_path), run)
    with RunFolder.open(run).locked(), pytest.raises(InputError, match="another process"):
        resume(run)


def test_a_changed_config_or_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(written(tmp_path), run)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("seed = 3", "seed = 4"))
    with pytest.raises(DataError, match="belongs to other settings"):
        resume(run)
    (run / "config.toml").write_text(text)
    snapshot = run / "snapshot.safetensors"
    whole = snapshot.read_bytes()
    snapshot.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a readable snapshot"):
        resume(run)
    snapshot.write_bytes(whole)
    assert len(resume(run).history) == 5


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"model.py:small"', '"resnet"', "model.name='resnet': choose one of 2nn"),
        ('"model.py:small"', '"nothing.py:small"', "not a Python file"),
        ('"model.py:small"', '"model.py:large"', "has no function large"),
        ('"model.py:small"', '"logistic"\nweights = "none.safetensors"', "cannot be loaded"),
        ('"dirichlet"\nclients = 6', '"natural"', "not divided by itself"),
        ("held_out = 0.2", "held_out = 0.0", "needs examples that clients keep back"),
        ("held_out = 0.2", "held_out = 1.5", "data.held_out=1.5"),
        ('"uniform"', '"availability"', r"add \[devices\]"),
        ("cohort = 4", "cohort = 30", "cohort=30: choose between 1 and the number of clients, 6"),
        ("number = 5", "number = 0", "rounds.number=0"),
        ("[data]", _private("noise_multiplier = 1.0\nquantile = 0.5"), "privacy.quantile lets the bound .* 'client'"),
        ("[data]", _private("noise_multiplier = 1.0\nparticipations = 2"), "privacy.participations .* 'record'"),
        ("[data]", _private("noise_multiplier = 1.0", "client", 'noise = "skellam"'), "privacy.noise .* 'distributed'"),
        ("[data]", _private("noise_multiplier = 1.0", "record", "colluding = 2"), "privacy.colluding .* 'distributed'"),
        ("[data]", _private("noise_multiplier = 1.0", '[mean]\nname = "weighted"'), "mean.by = 'examples' weighs"),
        ("[data]", _private("noise_multiplier = 0.0"), "that is no privacy"),
        ("[data]", _private('noise_multiplier = 1.0\naccountant = "pld"'), "does not know sums with integer noise"),
        ("[data]", _private("target_epsilon = 8.0"), "give secure_sum='masked' or 'shared'"),
        ("[data]", _private("target_epsilon = 8.0", "[secure_sum]\nminimum = 5"), "asks for 5 updates, and 4 clients"),
        ("[data]", "[secure_sum]\nverified = true\n[data]", "take two servers"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in BASE
    with pytest.raises(InputError, match=complaint):
        start(written(tmp_path, BASE.replace(old, new)), tmp_path / "run")
    assert not (tmp_path / "run" / "snapshot.safetensors").exists()


@pytest.mark.parametrize("level", ["client", "distributed"])
def test_the_budget_stops_the_run_before_the_round_and_the_run_is_kept(tmp_path: Path, level: str) -> None:
    from tacit.errors import BudgetExceeded  # noqa: PLC0415

    run = tmp_path / "run"
    text = BASE.replace("number = 5", "number = 50") + "[privacy]\nnoise_multiplier = 2.0\nbudget = 6.0\n"
    text += f'level = "{level}"\n' + ("" if level == "client" else "[secure_sum]\nminimum = 3\n")
    with pytest.raises(BudgetExceeded):
        start(written(tmp_path, text), run)
    history = RunFolder.open(run).history()
    assert 1 <= len(history) < 50
    assert all(record.epsilon is not None and record.epsilon <= 6 for record in history)
    with pytest.raises(BudgetExceeded):
        resume(run)
    assert len(RunFolder.open(run).history()) == len(history)


def test_listing_shows_what_differs(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 4)):
        start(written(tmp_path, BASE.replace("seed = 3", f"seed = {seed}")), tmp_path / "runs" / name)
    found = listing.find([tmp_path / "runs"])
    rows = listing.overview(found)
    assert [(row["run"], row["algorithm"], row["rounds"]) for row in rows] == [
        ("a", "fedavg", "5"),
        ("b", "fedavg", "5"),
    ]
    assert all(row["accuracy"].endswith("%") and "ε" not in row for row in rows)
    assert listing.differences(found) == [{"setting": "seed", "a": "3", "b": "4"}]
    with pytest.raises(InputError, match="there is no run in"):
        listing.find([tmp_path / "runs" / "a" / "none"])


def test_the_terminal(tmp_path: Path) -> None:
    environment = os.environ | {"COLUMNS": "200"}
    config = written(tmp_path)

    def tacit(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).parent / "tacit", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    trained = tacit("train", str(config), "--run", "runs/one", "--json")
    assert trained.returncode == 0, trained.stderr
    figures = json.loads(trained.stdout.splitlines()[-1])
    assert figures["rounds"] == 5
    page = (tmp_path / "runs" / "one" / "report.html").read_text()
    assert "What it met and spent" in page
    listed = tacit("runs")
    assert "one" in listed.stdout
    wrong = tacit("train", "missing.toml")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: missing.toml cannot be read")
