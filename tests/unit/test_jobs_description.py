"""Jobs are described once and for all, refused if anything in them does not hold together, and shared in pieces."""

from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jobs_parties import OWNER, examples, network, submission
from tacit.errors import CodecError, InputError, PeerError, RangeError, UnsupportedOperator
from tacit.identity import Identity, key_text
from tacit.party.jobs.description import Contributor, Job, JobPart, pack, unpack
from tacit.party.jobs.submission import Rows, Submission, Training, prepare, require_program, restore
from tacit.program.optimizers import Adam, Sgd

OTHER = key_text(Identity(bytes([9]) * 32).public)


@pytest.fixture(scope="module")
def submitted() -> Submission:
    return submission()


def changed(job: Job, place: int, value: Any, within: int | None = None) -> bytes:
    """The description with another value in one of its fields, or of its terms."""
    fields = msgspec.msgpack.decode(job.description)
    if within is None:
        fields[place] = value
    else:
        fields[place][within] = value
    return msgspec.msgpack.encode(fields)


def as_tensor(description: bytes) -> torch.Tensor:
    return torch.tensor(list(description), dtype=torch.uint8)


def test_all_three_are_sent_the_same_description_and_two_of_them_shares(submitted: Submission) -> None:
    parts = {role: unpack(*pack(part), role) for role, part in submitted.parts.items()}
    assert {part.job.digest for part in parts.values()} == {submitted.job.digest}
    assert parts["provider"].state == {}
    recipe = Training(network()).recipe()
    for name, value in recipe.state.items():
        words = parts["alice"].state[name] + parts["bob"].state[name]
        assert (words.double() * 2.0**-24 - value.double()).abs().max() <= 2.0**-25
    assert submitted.job.model == ("0.weight", "0.bias", "2.weight", "2.bias")
    with pytest.raises(CodecError, match="meant for bob"):
        unpack(*pack(submitted.parts["bob"]), "alice")


def test_two_submissions_of_one_training_are_two_jobs_of_one_program(submitted: Submission) -> None:
    again = submission()
    assert again.job.digest != submitted.job.digest
    assert again.job.program_digest == submitted.job.program_digest == Training(network()).digest((8, 4))
    assert Training(network(), optimizer=Sgd(0.2)).digest((8, 4)) != submitted.job.program_digest


def test_both_parties_take_the_same_rows_and_every_epoch_takes_them_in_another_order() -> None:
    jobs = [submission(rows=27).job for _ in range(2)]
    orders = [torch.cat([job.order(step) for step in range(1, 10)]) for job in jobs]
    assert torch.equal(*orders), "the order follows from the public seed alone"
    for epoch in orders[0].split(24):
        assert len(set(epoch.tolist())) == 24
        assert set(epoch.tolist()) <= set(range(27))
    first, second, third = orders[0].split(24)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_numbers_of_the_optimizer_are_listed_step_by_step() -> None:
    adam = Adam(0.01)
    job = submission(steps=3, training=Training(network(), optimizer=adam)).job
    assert [job.numbers(step) for step in (1, 2, 3)] == [list(adam.numbers(step)) for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("place", "value", "within"),
    [
        (0, 2, None),
        (1, "ed25519:nobody", None),
        (2, b"short", None),
        (4, b"no program", None),
        (5, [], None),
        (5, ["another weight"], None),
        (6, 1, None),
        (7, [0.5], None),
        (3, "no name/", 0),
        (3, 0, 1),
        (3, 1 << 25, 1),
        (3, [], 2),
        (3, [[OWNER, 0]], 2),
        (3, [[OWNER, 7]], 2),
        (3, [[OWNER, 8], [OWNER, 8]], 2),
        (3, [["nobody", 24]], 2),
        (3, b"seed", 3),
        (3, 0, 4),
    ],
)
def test_descriptions_that_do_not_hold_together_are_refused(
    submitted: Submission, place: int, value: Any, within: int | None
) -> None:
    description = changed(submitted.job, place, value, within)
    body, _ = pack(submitted.parts["provider"])
    with pytest.raises(CodecError):
        unpack(body, [as_tensor(description)], "provider")


def test_other_encodings_and_other_shares_are_refused(submitted: Submission) -> None:
    body, (description, *state) = pack(submitted.parts["alice"])
    fields = msgspec.msgpack.decode(description.numpy().tobytes())
    longer = msgspec.msgpack.encode(fields) + b"\0"
    with pytest.raises(CodecError):
        unpack(body, [as_tensor(longer), *state], "alice")
    steps = changed(submitted.job, 3, float(fields[3][1]), 1)
    with pytest.raises(CodecError):
        unpack(body, [as_tensor(steps), *state], "alice")
    wrong: list[list[torch.Tensor]] = [
        [],
        [description],
        [description, *state[:-1]],
        [description, *state, state[0]],
        [description, *state[::-1]],
        [description, *[words.to(torch.int32) for words in state]],
        [description.to(torch.int64), *state],
    ]
    for tensors in wrong:
        with pytest.raises(CodecError):
            unpack(body, tensors, "alice")
    with pytest.raises(CodecError, match="provider is sent no share"):
        JobPart("provider", submitted.job, submitted.parts["alice"].state).check()


@settings(max_examples=200)
@given(st.binary(max_size=400), st.integers(0, 2000), st.integers(0, 7))
def test_any_bytes_are_a_job_or_refused(data: bytes, place: int, bit: int) -> None:
    body, (description, *_) = pack(_provided())
    flipped = bytearray(description.numpy().tobytes())
    flipped[place % len(flipped)] ^= 1 << bit
    for candidate in (data, bytes(flipped), bytes(flipped[: place % len(flipped)])):
        try:
            part = unpack(body, [as_tensor(candidate)], "provider")
        except CodecError:
            continue
        part.check()
        assert part.job.description == candidate


_parts: list[JobPart] = []


def _provided() -> JobPart:
    if not _parts:
        _parts.append(submission().parts["provider"])
    return _parts[0]


def test_what_cannot_be_trained_is_refused_before_anything_is_sent() -> None:
    for wrong, why in (
        ({"steps": 0}, "steps is 0"),
        ({"every": 0}, "checkpoint_every is 0"),
        ({"batch_size": 25}, "batch_size is 25"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"data": []}, "somebody's rows"),
        ({"data": [Contributor(OWNER, 0)]}, "somebody's rows"),
    ):
        with pytest.raises(InputError, match=why):
            submission(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not take inputs of shape"):
        prepare(Training(network()), (5,), name="job", owner=OWNER, data=[Contributor(OWNER, 8)], steps=1, batch_size=8)
    broken = network()
    nn.init.constant_(broken[0].bias, float("nan"))
    with pytest.raises(RangeError, match=r"0\.bias of Sequential holds NaN"):
        submission(training=Training(broken))
    with pytest.raises(UnsupportedOperator):
        submission(training=Training(network(), lambda output, labels: torch.lgamma(output).sum()))
    with pytest.raises(InputError, match="nothing to train"):
        submission(training=Training(nn.Flatten()))


def test_rows_that_do_not_fit_are_refused_before_anything_is_sent(submitted: Submission) -> None:
    inputs, labels = examples()
    nan = inputs.clone()
    nan[23, 3] = float("nan")
    for wrong_inputs, wrong_labels, error, why in (
        (nan, labels, RangeError, "the inputs holds NaN"),
        (inputs * 1e6, labels, RangeError, "outside ±16384"),
        (inputs[:, :3], labels, InputError, "the job takes"),
        (inputs[:0], labels[:0], InputError, "empty"),
        (inputs, labels[:23], InputError, "do not fit"),
        (inputs, labels + 1, InputError, "out of range"),
        (inputs, torch.ones(24, 2), InputError, "does not sum to one"),
        (inputs, torch.full((24, 2), float("nan")), InputError, "does not sum to one"),
        (inputs.bool(), labels, InputError, "real numbers"),
    ):
        with pytest.raises(error, match=why):
            Rows(submitted.job, wrong_inputs, wrong_labels)


def test_rows_are_shared_anew_each_time_in_pieces_that_add_up(
    submitted: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tacit.party.jobs.submission.PIECE_BYTES", 10 * 8 * 6)
    inputs, labels = examples()
    rows = Rows(submitted.job, inputs, labels)
    first, second = list(rows.pieces()), list(rows.pieces())
    assert [start for start, _ in first] == [0, 10, 20]
    assert not torch.equal(first[0][1]["alice"][0], second[0][1]["alice"][0])
    for pieces in (first, second):
        whole = [torch.cat([sum(half[role][i] for role in ("alice", "bob")) for _, half in pieces]) for i in range(2)]
        assert (whole[0].double() * 2.0**-16 - inputs).abs().max() <= 2.0**-17
        assert torch.equal(whole[1].double() * 2.0**-16, torch.eye(2, dtype=torch.float64)[labels])


def test_whoever_contributes_rows_says_what_the_job_is_to_compute(submitted: Submission) -> None:
    require_program(submitted.job, Training(network()))
    require_program(submitted.job, submitted.job.program_digest)
    for other in (Training(network(), optimizer=Sgd(0.2)), "0" * 64):
        with pytest.raises(InputError, match="computes something else"):
            require_program(submitted.job, other)


def test_shares_of_something_else_are_no_model(submitted: Submission) -> None:
    alice = list(submitted.parts["alice"].state.values())
    bob = list(submitted.parts["bob"].state.values())
    assert list(restore(submitted.job, alice, bob)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for wrong in (bob[:-1], [*bob, bob[0]], bob[::-1]):
        with pytest.raises(PeerError, match="something else than the job's model"):
            restore(submitted.job, alice, wrong)
