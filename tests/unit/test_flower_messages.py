"""What coordinator and sites say: signed end to end, bound to its reader and to its question."""

import pytest
import torch

from tacit import wire
from tacit.errors import CodecError, PeerError
from tacit.identity import Identity
from tacit.runtimes.flower.client_app import APART, content_of, frame_of
from tacit.runtimes.flower.messages import (
    ANYBODY,
    PROTOCOL,
    Answer,
    Begin,
    Hello,
    Here,
    Terms,
    frame_digest,
    pack,
    seal,
    unpack,
    unseal,
)

COORDINATOR, SITE, OTHER = Identity(bytes(32)), Identity(b"1" * 32), Identity(b"2" * 32)
HELLO = Hello(PROTOCOL, b"n" * 16)


def read(frame: bytes, **named):
    return unseal(frame, **{"readers": frozenset({SITE.public}), "writers": frozenset({COORDINATOR.public}), **named})


def test_a_question_and_its_tensors_come_back_as_they_were():
    tensors = {
        "parameters": torch.randn(5),
        "buffer/mean": torch.randn(2, 2, dtype=torch.float64),
        "buffer/half": torch.randn(3).half(),
        "buffer/count": torch.tensor(7),
        "shared/mask": torch.tensor([True, False, True]),
    }
    named, wired = pack(tensors)
    terms = Terms(b"r" * 32, "seed = 1", (SITE.public, OTHER.public))
    begin = Begin(terms, 3, b"a" * 16, "train", bytes(32), b"frame", 2, named)
    opened = read(seal(COORDINATOR, SITE.public, begin, wired))
    assert opened.request() == begin
    found = unpack(begin.tensors, opened.tensors)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def test_every_changed_byte_is_noticed():
    frame = seal(COORDINATOR, SITE.public, HELLO, (torch.arange(4, dtype=torch.int32),))
    for at in range(len(frame)):
        changed = bytearray(frame)
        changed[at] ^= 1
        with pytest.raises(PeerError):
            read(bytes(changed))
    for length in range(len(frame)):
        with pytest.raises(PeerError):
            read(frame[:length])


def test_a_letter_is_for_its_reader_from_its_writer_about_its_question():
    frame = seal(COORDINATOR, SITE.public, HELLO)
    with pytest.raises(PeerError, match="came to somebody else"):
        read(frame, readers=frozenset({OTHER.public}))
    with pytest.raises(PeerError, match="not pinned"):
        read(frame, writers=frozenset({OTHER.public}))
    reply = seal(SITE, COORDINATOR.public, Here(b"n" * 16, 1, "0"), about=frame_digest(frame))
    back = {"readers": frozenset({COORDINATOR.public}), "writers": frozenset({SITE.public})}
    assert read(reply, about=frame_digest(frame), **back).reply() == Here(b"n" * 16, 1, "0")
    with pytest.raises(PeerError, match="another question"):
        read(reply, about=frame_digest(frame + b"x"), **back)
    with pytest.raises(PeerError, match="another question"):
        read(reply, **back)


def test_a_letter_to_anybody_is_read_by_who_asks_for_such():
    frame = seal(COORDINATOR, ANYBODY, HELLO)
    assert read(frame, readers=frozenset({SITE.public, ANYBODY})).request() == HELLO
    with pytest.raises(PeerError):
        read(frame)


def test_questions_are_no_answers_and_answers_no_questions():
    opened = read(seal(COORDINATOR, SITE.public, HELLO))
    with pytest.raises(CodecError):
        opened.reply()
    opened = read(seal(COORDINATOR, SITE.public, Answer(b"frame")))
    assert opened.reply() == Answer(b"frame")
    with pytest.raises(CodecError):
        opened.request()


def test_other_frames_are_no_letters():
    with pytest.raises(CodecError, match="kind SECURE_SUM"):
        read(wire.encode(wire.Kind.SECURE_SUM, 0))


@pytest.mark.parametrize(
    ("named", "tensors"),
    [
        ((("a", "f4"),), ()),
        ((("a", "f4"), ("a", "f4")), (torch.zeros(1, dtype=torch.int32),) * 2),
        ((("a", "f4"),), (torch.zeros(1, dtype=torch.int64),)),
        ((("a", "i8"),), (torch.zeros(1, dtype=torch.int32),)),
        ((("a", "c8"),), (torch.zeros(1, dtype=torch.int32),)),
    ],
)
def test_tensors_must_be_what_is_said_of_them(named, tensors):
    with pytest.raises(CodecError):
        unpack(named, tensors)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("entries", [1, APART])
def test_frames_travel_in_records_of_flower(entries, shared):
    frame = seal(COORDINATOR, SITE.public, HELLO, (torch.arange(entries, dtype=torch.int32),))
    content = content_of(frame, shared)
    assert len(content) == 1 + (shared and entries * 4 > APART)

    class Carried:
        pass

    message = Carried()
    message.content = content
    assert frame_of(message) == frame
    content["more"] = content["tacit"]
    with pytest.raises(CodecError):
        frame_of(message)
