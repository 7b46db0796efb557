"""What a party keeps of jobs: whole or not there, sealed, in order, and gone when it is of no use any more."""

import sqlite3
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs_parties import OWNER, examples, submission
from tacit.errors import DataError, InputError, StorageFull
from tacit.identity import Identity, key_text
from tacit.party.jobs.description import Contributor
from tacit.party.jobs.states import Checkpoint, State, initial, require_transition
from tacit.party.jobs.store import JobStore
from tacit.party.jobs.submission import Rows, Submission
from tacit.ring.prg import Prg

KEY, LIMIT = bytes(range(32)), 1 << 20
OTHER = key_text(Identity(bytes([9]) * 32).public)
RUN = bytes([1]) * 16


@pytest.fixture(scope="module")
def submitted() -> Submission:
    return submission(data=[Contributor(OWNER, 14), Contributor(OTHER, 10)])


def opened(folder: Path, role: str = "alice", limit: int = LIMIT) -> JobStore:
    return JobStore(folder, KEY, role, limit)


def filled(folder: Path, submitted: Submission, role: str = "alice") -> JobStore:
    store = opened(folder, role)
    store.submit(submitted.parts[role])
    return store


def share(store: JobStore, submitted: Submission, contributor: str, count: int, upload: bytes = bytes(16)) -> None:
    inputs, labels = examples()
    for first, halves in Rows(submitted.job, inputs[:count], labels[:count]).pieces():
        store.add_rows(submitted.job.digest, contributor, upload, first, halves[store.role])


def write(store: JobStore, digest: str, checkpoint: Checkpoint) -> None:
    """As the worker does."""
    from tacit.party import sealed_frames  # noqa: PLC0415

    path, context = store.checkpoint_file(digest, checkpoint)
    state = [Prg(checkpoint.run).words(shape) for shape in store.job(digest).program.state.values()]
    sealed_frames.write(path, store.key, context, state)


def names(store: JobStore) -> set[str]:
    return {path.name for path in store.files_folder.iterdir()}


def test_a_job_is_there_after_opening_anew_and_submitting_it_again_changes_nothing(
    tmp_path: Path, submitted: Submission
) -> None:
    store = filled(tmp_path, submitted)
    share(store, submitted, OWNER, 14)
    store.settle(submitted.job.digest, State.RUNNING)
    store.submit(submitted.parts["alice"])
    store.close()
    again = opened(tmp_path)
    (entry,) = again.entries()
    assert (entry.digest, entry.name, entry.state) == (submitted.job.digest, "job", State.RUNNING)
    assert entry.held.uploads == {OWNER: bytes(16)}
    assert entry.missing == (OTHER,)
    assert entry.held.checkpoints == [initial(entry.digest)] == [entry.agreed]
    state = again.model_share(entry.digest, entry.agreed)
    assert all(map(torch.equal, state, [submitted.parts["alice"].state[name] for name in entry.job.model]))
    with pytest.raises(InputError, match="meant for bob"):
        again.submit(submitted.parts["bob"])
    with pytest.raises(InputError, match="no job 000000000000"):
        again.entry("0" * 64)
    with pytest.raises(DataError, match="in use by another process"):
        opened(tmp_path)
    again.close()


def test_the_provider_keeps_the_description_alone(tmp_path: Path, submitted: Submission) -> None:
    store = filled(tmp_path, submitted, "provider")
    assert store.job(submitted.job.digest).digest == submitted.job.digest
    assert names(store) == set()
    store.close()


def test_nothing_on_the_disk_shows_a_share(tmp_path: Path, submitted: Submission) -> None:
    store, digest = filled(tmp_path, submitted), submitted.job.digest
    inputs, labels = examples()
    pieces = list(Rows(submitted.job, inputs[:14], labels[:14]).pieces())
    for first, halves in pieces:
        store.add_rows(digest, OWNER, bytes(16), first, halves["alice"])
    loss = Prg(RUN).words((1,))
    write(store, digest, Checkpoint(2, RUN))
    store.saved(digest, Checkpoint(2, RUN), 1.0, [(1, loss), (2, loss)])
    store.close()
    on_disk = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    secrets = [*submitted.parts["alice"].state.values(), *pieces[0][1]["alice"], loss]
    assert b"CREATE TABLE job" in on_disk
    for words in secrets:
        assert words.contiguous().numpy().tobytes()[:8] not in on_disk


def test_rows_come_in_order_once_and_from_those_who_were_named(tmp_path: Path, submitted: Submission) -> None:
    store, digest = filled(tmp_path, submitted), submitted.job.digest
    inputs, labels = examples()

    def halves(count: int) -> list[Tensor]:
        return next(Rows(submitted.job, inputs[:count], labels[:count]).pieces())[1]["alice"]

    assert store.add_rows(digest, OTHER, bytes(16), 0, halves(6)) == 6
    assert store.entry(digest).missing == (OWNER, OTHER), "rows that are not complete do not count"
    for first, count, why in ((0, 2, "where 6 is next"), (7, 2, "where 6 is next"), (6, 5, "takes 10 of yours")):
        with pytest.raises(InputError, match=why):
            store.add_rows(digest, OTHER, bytes(16), first, halves(count))
    with pytest.raises(InputError, match="did not name you"):
        store.add_rows(digest, key_text(Identity(bytes([8]) * 32).public), bytes(16), 0, halves(2))
    words, targets = halves(2)
    for wrong in ([], [words], [words, targets, targets], [words[:, :3], targets], [words, targets[:1]],
                  [words.to(torch.int32), targets], [words[:0], targets[:0]], [words[0], targets[0]]):  # fmt: skip
        with pytest.raises(InputError, match=r"rows"):
            store.add_rows(digest, OTHER, bytes(16), 6, wrong)
    assert store.add_rows(digest, OTHER, bytes(16), 6, halves(4)) == 10
    # Another sharing begins again: shares of the two do not belong together.
    before = names(store)
    assert store.add_rows(digest, OTHER, RUN, 0, halves(10)) == 10
    assert store.entry(digest).held.uploads == {OTHER: RUN}
    assert not names(store) & {name for name in before if name.endswith(".rows")}
    share(store, submitted, OWNER, 14)
    assert [(one.contributor, one.count) for one in store.pieces(digest)] == [(OWNER, 14), (OTHER, 10)]
    store.settle(digest, State.RUNNING)
    with pytest.raises(InputError, match="is running: it takes no more rows"):
        store.add_rows(digest, OTHER, RUN, 0, halves(10))
    store.close()


def test_over_the_limit_nothing_is_kept(tmp_path: Path, submitted: Submission) -> None:
    store = opened(tmp_path, limit=900)
    store.submit(submitted.parts["alice"])
    before = names(store)
    with pytest.raises(StorageFull, match=r"more bytes of training jobs do not fit: [\d,]+ of 900 are taken"):
        share(store, submitted, OWNER, 14)
    assert names(store) == before
    store.limit_bytes = 100
    with pytest.raises(StorageFull):
        store.submit(submission().parts["alice"])
    assert names(store) == before
    assert len(store.entries()) == 1
    store.close()


def test_an_agreed_checkpoint_takes_the_place_of_the_others(tmp_path: Path, submitted: Submission) -> None:
    store, digest = filled(tmp_path, submitted), submitted.job.digest
    second, other = Checkpoint(2, RUN), Checkpoint(2, bytes([2]) * 16)
    for checkpoint in (second, other):
        write(store, digest, checkpoint)
        store.saved(digest, checkpoint, 3.5, [])
    assert set(store.entry(digest).held.checkpoints) == {initial(digest), second, other}
    store.agree(digest, second)
    entry = store.entry(digest)
    assert entry.held.checkpoints == [second] == [entry.agreed]
    assert entry.seconds == 3.5
    assert len(names(store)) == 1
    with pytest.raises(InputError, match="the checkpoint after step 0 of the job job is not here any more"):
        store.model_share(digest, initial(digest))
    with pytest.raises(InputError, match="is not here"):
        store.begin(digest, other)
    with pytest.raises(DataError, match="cannot be used"):
        store.saved(digest, Checkpoint(4, RUN), 4.0, [])
    assert store.entry(digest).held.checkpoints == [second], "a row has its file"
    store.close()


def test_losses_are_kept_up_to_the_checkpoint_that_a_run_begins_from(tmp_path: Path, submitted: Submission) -> None:
    store, digest = filled(tmp_path, submitted), submitted.job.digest
    losses = [(step, Prg(RUN).derive("loss", step).words((1,))) for step in range(1, 5)]
    for at in (2, 4):
        write(store, digest, Checkpoint(at, RUN))
        store.saved(digest, Checkpoint(at, RUN), 1.0, losses[at - 2 : at])
    found = store.losses(digest, 1)
    assert [(step, run) for step, run, _ in found] == [(2, RUN), (3, RUN), (4, RUN)]
    assert all(torch.equal(words, dict(losses)[step]) for step, _, words in found)
    store.begin(digest, Checkpoint(2, RUN))
    assert [step for step, *_ in store.losses(digest, 0)] == [1, 2]
    store.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as record:
        rows = record.execute("SELECT sealed FROM loss ORDER BY step").fetchall()
        record.execute("UPDATE loss SET sealed = ? WHERE step = 1", rows[1])
    record.close()
    again = opened(tmp_path)
    with pytest.raises(DataError, match="the loss of step 1 of a job"):
        again.losses(digest, 0)
    again.close()


def test_what_a_crash_left_is_swept_away(tmp_path: Path, submitted: Submission) -> None:
    store, digest = filled(tmp_path, submitted), submitted.job.digest
    share(store, submitted, OWNER, 14)
    kept = names(store)
    write(store, digest, Checkpoint(2, RUN))
    (store.files_folder / f"{digest}-3.state.partial").write_bytes(b"half")
    store.close()
    again = opened(tmp_path)
    assert names(again) == kept
    again.close()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "swapped"])
def test_a_damaged_checkpoint_is_told(tmp_path: Path, submitted: Submission, damage: str) -> None:
    store, digest = filled(tmp_path, submitted), submitted.job.digest
    path, _ = store.checkpoint_file(digest, initial(digest))
    content = path.read_bytes()
    match damage:
        case "flipped":
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
        case "truncated":
            path.write_bytes(content[:-1])
        case "missing":
            path.unlink()
        case "swapped":
            write(store, digest, Checkpoint(2, RUN))
            path.write_bytes(store.checkpoint_file(digest, Checkpoint(2, RUN))[0].read_bytes())
    with pytest.raises(DataError, match=r"cannot be (used|read)"):
        store.model_share(digest, initial(digest))
    store.close()


def test_a_deleted_job_leaves_nothing(tmp_path: Path, submitted: Submission) -> None:
    store, digest = filled(tmp_path, submitted), submitted.job.digest
    share(store, submitted, OWNER, 14)
    write(store, digest, Checkpoint(2, RUN))
    store.saved(digest, Checkpoint(2, RUN), 1.0, [(1, torch.zeros(1, dtype=torch.int64))])
    store.delete(digest)
    assert store.entries() == []
    assert names(store) == set()
    assert store.nbytes == 0
    write_after = store.files_folder / f"{digest}-4-{RUN.hex()}.state"
    write_after.write_bytes(b"a worker was not told yet")
    with pytest.raises(InputError, match="no job"):
        store.saved(digest, Checkpoint(4, RUN), 1.0, [])
    store.delete(digest)
    assert names(store) == set()
    store.close()


def test_states_follow_on_one_another(tmp_path: Path, submitted: Submission) -> None:
    allowed = {
        (State.SUBMITTED, State.RUNNING), (State.SUBMITTED, State.CANCELLED), (State.SUBMITTED, State.FAILED),
        (State.RUNNING, State.DONE), (State.RUNNING, State.CANCELLED), (State.RUNNING, State.FAILED),
        (State.CANCELLED, State.SUBMITTED), (State.FAILED, State.SUBMITTED),
    }  # fmt: skip
    for before in State:
        for after in State:
            if (before, after) in allowed:
                require_transition("job", before, after)
            else:
                with pytest.raises(InputError, match=f"the job job is {before.value}"):
                    require_transition("job", before, after)
    store, digest = filled(tmp_path, submitted), submitted.job.digest
    with pytest.raises(InputError, match="cannot become done"):
        store.settle(digest, State.DONE)
    store.settle(digest, State.FAILED, "out of luck")
    assert store.entry(digest).reason == "out of luck"
    # Bob may have missed what was in between.
    store.settle(digest, State.DONE, told=True)
    with pytest.raises(InputError, match="is done: it cannot be resumed"):
        store.settle(digest, State.SUBMITTED, told=True)
    store.close()
