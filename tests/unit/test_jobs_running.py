"""Jobs in real worker processes: what they train, and what is left of them when something is killed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jobs_parties import (
    OWNER,
    ROLES,
    JobParties,
    examples,
    in_the_clear,
    network,
    submission,
)
from tacit.errors import InputError
from tacit.identity import Identity, key_text
from tacit.party.jobs.description import Contributor
from tacit.party.jobs.states import State, initial
from tacit.party.jobs.submission import Submission, Training
from tacit.party.metrics import Metrics

LR = 0.1
STEP = 2 * LR * 2.0**-11
"""How far a step may take a weight from where PyTorch would, at most; see `tests/unit/test_party_training.py`."""


def trained_as_in_the_clear(
    parties: JobParties, submitted: Submission, inputs: Tensor, labels: Tensor, steps: int
) -> nn.Module:
    plain = in_the_clear(submitted.job, Training(network()), inputs, labels, steps)
    found = parties.result(submitted)
    assert found.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert (found[name] - value).abs().max() < steps * STEP
    return plain


def shown(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """What Prometheus reads, by name and labels."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_a_job_trains_what_pytorch_does_in_the_clear(tmp_path: Path) -> None:
    submitted, (inputs, labels) = submission(steps=5, every=2, reveal_loss=True), examples()
    with JobParties(tmp_path).running() as parties:
        digest = parties.submit(submitted, inputs, labels)
        parties.until_state(digest, State.DONE)
        trained_as_in_the_clear(parties, submitted, inputs, labels, 5)
        losses = parties.losses(digest)
        for side in parties.sides.values():
            assert len(set(side.used)) == 5
            assert side.store.pieces(digest) == [], "rows are of no use any more"
            assert side.pool.levels() == {}
            assert [path.suffix for path in side.store.files_folder.iterdir()] == [".state"]
            parties.until(lambda side=side: shown(side.metrics)["tacit_jobs", "done"] == 1, "to be shown as done")
            counted, cost = shown(side.metrics), submitted.job.cost(8)
            assert [counted["tacit_jobs", state.value] for state in State] == [0, 0, 1, 0, 0]
            assert counted["tacit_job_step_seconds_count",] == 5
            assert counted["tacit_job_rounds_total",] == 5 * cost.rounds
            assert counted["tacit_job_bytes_online_total",] == 5 * cost.bytes_online
            assert 0 < counted["tacit_job_waited_seconds_total",] < counted["tacit_job_step_seconds_sum",]
    assert list(losses) == [1, 2, 3, 4, 5]
    before = in_the_clear(submitted.job, Training(network()), inputs, labels, 0)
    rows = submitted.job.order(1)
    assert losses[1] == pytest.approx(cross_entropy(before(inputs[rows].double()), labels[rows]).item(), abs=2.0**-10)


def killed(role: str) -> Callable[[JobParties], None]:
    def kill(parties: JobParties) -> None:
        parties.kill(role)
        parties.start(role)

    return kill


def cut(parties: JobParties) -> None:
    parties.cut()
    parties.link()


FAULTS = {
    "alice": killed("alice"),
    "bob": killed("bob"),
    "alice's worker": lambda parties: parties.kill_worker("alice"),
    "bob's worker": lambda parties: parties.kill_worker("bob"),
    "the link": cut,
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_breaks_costs_steps_and_tickets_and_nothing_else(tmp_path: Path, fault: str) -> None:
    submitted, (inputs, labels) = submission(steps=9, every=3, reveal_loss=True), examples()
    with JobParties(tmp_path).running() as parties:
        digest = parties.submit(submitted, inputs, labels)
        for step in (2, 5):
            parties.until_step(digest, step)
            FAULTS[fault](parties)
        parties.until_state(digest, State.DONE)
        trained_as_in_the_clear(parties, submitted, inputs, labels, 9)
        assert list(parties.losses(digest)) == list(range(1, 10))
        for side in parties.sides.values():
            assert len(side.used) == len(set(side.used)), "no ticket is used twice"
            assert len(side.used) >= 9
        assert len([event for event, _ in parties.alice.events if event == "job_runs"]) == 3


@pytest.mark.slow
def test_a_cancelled_job_keeps_its_last_step_and_goes_on_from_there(tmp_path: Path) -> None:
    submitted, (inputs, labels) = submission(steps=8, every=50), examples()
    with JobParties(tmp_path).running() as parties:
        digest = parties.submit(submitted, inputs, labels)
        parties.until_step(digest, 2)
        parties.alice.desk.cancel(digest).result(60)
        parties.until_state(digest, State.CANCELLED)
        taken = parties.alice.store.entry(digest).agreed.step
        assert 2 <= taken < 8
        trained_as_in_the_clear(parties, submitted, inputs, labels, taken)
        assert parties.alice.worker is None
        with pytest.raises(InputError, match="is cancelled: it cannot be cancelled"):
            parties.alice.desk.cancel(digest).result(60)
        # It stays so when the parties are started again.
        for role in ROLES:
            parties.kill(role)
        for role in ROLES:
            parties.start(role)
        parties.alice.desk.resume(digest).result(60)
        parties.until_state(digest, State.DONE)
        trained_as_in_the_clear(parties, submitted, inputs, labels, 8)
        with pytest.raises(InputError, match="is done: it cannot be resumed"):
            parties.alice.desk.resume(digest).result(60)
        for side in parties.sides.values():
            assert len(side.used) == len(set(side.used)) == 8


@pytest.mark.slow
def test_a_job_waits_for_the_rows_of_all_its_contributors(tmp_path: Path) -> None:
    other = key_text(Identity(bytes([9]) * 32).public)
    inputs, labels = examples()
    submitted = submission(steps=4, every=2, data=[Contributor(OWNER, 15), Contributor(other, 9)])
    with JobParties(tmp_path).running() as parties:
        digest = parties.submit(submitted, inputs[:15], labels[:15])
        parties.until(lambda: parties.alice.desk.waiting(digest) == f"for the rows of {other}", "to wait")
        parties.share(submitted, other, inputs[15:], labels[15:])
        parties.until_state(digest, State.DONE)
        trained_as_in_the_clear(parties, submitted, inputs, labels, 4)


@pytest.mark.slow
def test_a_damaged_checkpoint_fails_the_job_with_the_reason(tmp_path: Path) -> None:
    submitted, (inputs, labels) = submission(steps=4, every=2), examples()
    with JobParties(tmp_path).running() as parties:
        path, _ = parties.bob.store.checkpoint_file(submitted.job.digest, initial(submitted.job.digest))
        for role, side in parties.sides.items():
            side.store.submit(submitted.parts[role])
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        digest = parties.submit(submitted, inputs, labels)
        parties.until_state(digest, State.FAILED)
        reason = parties.alice.store.entry(digest).reason
        assert reason.startswith("bob: ")
        assert "does not open" in reason
        assert parties.alice.used == []
