"""The ledger keeps what was spent, whatever happens to the process, and stops before a budget is exceeded."""

import os
import signal
import sqlite3
import time

import msgspec
import pytest

from tacit.dp.accounting import Budget, SampledGaussian, privacy_spent
from tacit.dp.ledger import Ledger, Limit
from tacit.errors import BudgetExceeded, DataError

EVENT = SampledGaussian(1.0, 0.1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "privacy.sqlite"


def test_what_was_spent_is_there_when_the_file_is_opened_again(path):
    ledger = Ledger(path)
    for number in range(3):
        ledger.spend("central", EVENT, f"round {number}")
    ledger.spend("site 4", SampledGaussian(2.0, 0.5, 7), "round 1")
    ledger.close()
    again = Ledger(path)
    assert again.subjects == ("central", "site 4")
    assert again.events("central") == (SampledGaussian(1.0, 0.1, 3),)
    assert again.events("site 4") == (SampledGaussian(2.0, 0.5, 7),)
    assert again.events("nobody") == ()
    assert again.epsilon("central", 1e-5) == privacy_spent([EVENT] * 3, 1e-5) > 0
    assert again.epsilon("nobody", 1e-5) == 0


def test_it_stops_before_the_round_that_would_exceed_the_budget(path):
    delta, allowed = 1e-5, 20
    limit = Limit(Budget(privacy_spent([EVENT] * allowed, delta), delta))
    ledger = Ledger(path)
    for number in range(allowed):
        ledger.spend("central", EVENT, f"round {number}", limit)
    with pytest.raises(
        BudgetExceeded, match=r"round 20 would take 'central' over its privacy budget of ε = .* δ = 1e-05"
    ):
        ledger.spend("central", EVENT, "round 20", limit)
    assert ledger.events("central") == (SampledGaussian(1.0, 0.1, allowed),)
    ledger.spend("other", EVENT, "round 20", limit)
    reopened = Ledger(path)
    with pytest.raises(BudgetExceeded):
        reopened.spend("central", EVENT, "round 20", limit)


def test_a_release_without_noise_exceeds_every_budget():
    with pytest.raises(BudgetExceeded):
        Ledger().spend("central", SampledGaussian(0.0), "round 1", Limit(Budget(1e9, 0.5)))


def test_of_many_subjects_only_those_that_cannot_afford_it_are_refused(path):
    ledger = Ledger(path)
    ledger.spend("client 1", SampledGaussian(1.0, 1.0, 5), "before")
    limit = Limit(Budget(privacy_spent([SampledGaussian(1.0)] * 2, 1e-5), 1e-5))
    events = {f"client {k}": [SampledGaussian(1.0), SampledGaussian(1.0)] for k in range(3)}
    assert ledger.spend_each(events, "round 1", limit) == ("client 1",)
    assert ledger.events("client 1") == (SampledGaussian(1.0, 1.0, 5),)
    assert Ledger(path).events("client 2") == (SampledGaussian(1.0, 1.0, 2),)


def test_only_noise_from_a_seed_is_paid_for_once(path):
    ledger = Ledger(path)
    for repeatable, times in ((True, 1), (True, 1), (False, 2)):
        ledger.spend("central", EVENT, "run, round 1", repeatable=repeatable)
        assert ledger.events("central") == (SampledGaussian(1.0, 0.1, times),)


def test_processes_that_share_a_file_share_the_budget(path):
    limit = Limit(Budget(privacy_spent([EVENT] * 3, 1e-5), 1e-5))
    one, other = Ledger(path), Ledger(path)
    one.spend("central", EVENT, "a", limit)
    other.spend("central", EVENT, "b", limit)
    one.spend("central", EVENT, "c", limit)
    with pytest.raises(BudgetExceeded):
        other.spend("central", EVENT, "d", limit)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE spending SET event = replace(event, '0.1', '0.01') WHERE number = 2",
        "UPDATE spending SET subject = 'someone else' WHERE number = 3",
        "DELETE FROM spending WHERE number = 2",
        "INSERT INTO spending VALUES (4, 'central', 'x', '{}', x'00')",
        "PRAGMA user_version = 2",
        "PRAGMA application_id = 1",
        "DROP TABLE spending",
    ],
)
def test_a_ledger_that_was_tampered_with_is_refused(path, damage):
    ledger = Ledger(path)
    for number in range(3):
        ledger.spend("central", EVENT, f"round {number}")
    ledger.close()
    with sqlite3.connect(path) as file:
        file.execute(damage)
    file.close()
    with pytest.raises(DataError, match=r"privacy ledger .* cannot be used"):
        Ledger(path)


def test_an_event_of_a_later_version_is_refused_even_with_a_right_digest(path, monkeypatch):
    ledger = Ledger(path)
    monkeypatch.setattr("tacit.dp.ledger.msgspec.json.encode", _as_if_of_a_later_version())
    with pytest.raises(DataError, match="no event that this version knows"):
        ledger.spend("central", EVENT, "round 1")
    monkeypatch.undo()
    with pytest.raises(DataError, match="no event that this version knows"):
        Ledger(path)


def _as_if_of_a_later_version():
    encode = msgspec.json.encode

    def later(value):
        return encode({"type": "skew-laplace", "scale": 1.0}) if isinstance(value, SampledGaussian) else encode(value)

    return later


def test_other_files_are_refused_and_left_alone(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to look at" * 10)
    with pytest.raises(DataError, match=r"notes\.txt"):
        Ledger(text)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as file:
        file.execute("CREATE TABLE cats (name TEXT)")
    file.close()
    with pytest.raises(DataError, match="something else"):
        Ledger(other)
    with pytest.raises(DataError, match="missing"):
        Ledger(tmp_path / "missing" / "privacy.sqlite")
    truncated = tmp_path / "truncated.sqlite"
    ledger = Ledger(truncated)
    ledger.spend("central", EVENT, "round 1")
    ledger.close()
    truncated.write_bytes(truncated.read_bytes()[:5000])
    with pytest.raises(DataError):
        Ledger(truncated)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_write_where_nobody_would_see_it(path):
    ledger = Ledger()
    child = os.fork()
    if child == 0:
        try:
            ledger.spend("central", EVENT, "round 1")
        except DataError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_no_release_is_forgotten_when_the_process_is_killed(path, tmp_path):
    released = tmp_path / "released"
    released.touch()
    for kill in range(12):
        spender = os.fork()
        if spender == 0:
            _spend_and_release_forever(path, released)
        time.sleep(0.017 * kill)
        os.kill(spender, signal.SIGKILL)
        os.waitpid(spender, 0)
        releases, ledger = released.stat().st_size, Ledger(path)
        spent = sum(event.times for event in ledger.events("central"))
        ledger.close()
        # Each process that was killed may have paid for one release that it never made.
        assert releases <= spent <= releases + kill + 1
    assert releases > 0


def _spend_and_release_forever(path, released):
    try:
        with open(released, "ab", buffering=0) as file:
            ledger = Ledger(path)
            while True:
                ledger.spend("central", EVENT, "round")
                file.write(b".")
    finally:
        os._exit(1)
