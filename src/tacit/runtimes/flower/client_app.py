"""Flower's view of a site: a ``ClientApp`` that passes each message to the site and its answer back.

What a message says is signed inside (`tacit.runtimes.flower.messages`); its type in Flower is the name of the stage,
so that whoever runs the SuperLink can follow a round in its log.

========================  ==========================================================================================
``query.hello``           who is there
``train.begin``           train on the model that comes with it: the answer, or in a secure sum the keys for it; the
                          masked vector where the sum was set up ahead
``evaluate.begin``        try the model on what the site keeps back; likewise
``query.begin``           count and add up features, for standardising them; likewise
``query.share``           secure sum: here is who takes part, give their shares
``query.mask``            here are your shares, give your masked vector; it is waited for until training is done
``query.confirm``         these are the survivors: agreed? And give keys for the next sum
``query.unmask``          all agreed: give what takes the survivors' masks away. And give shares for the next sum
========================  ==========================================================================================

So a secure sum takes five exchanges, or three where the one before set it up: begin, confirm and unmask.
"""

from __future__ import annotations

from typing import Protocol

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from tacit import wire
from tacit.errors import CodecError
from tacit.federated.secure_sum.server import Stage
from tacit.runtimes.flower.messages import Work

HEAD, PAYLOAD, BYTES = "tacit", "tacit.payload", "bytes"
APART = 1 << 16
HELLO = "query.hello"
BEGIN: dict[Work, str] = {"train": "train.begin", "evaluate": "evaluate.begin", "moments": "query.begin"}
STAGES = {
    Stage.SHARE: "query.share",
    Stage.MASK: "query.mask",
    Stage.CONFIRM: "query.confirm",
    Stage.UNMASK: "query.unmask",
}


class Participant(Protocol):
    """What answers at a site."""

    def answer(self, frame: bytes) -> bytes:
        """The answer to a frame of the coordinator's; a refusal, with its reason, is an answer too."""
        ...


def client_app(participant: Participant) -> ClientApp:
    """A Flower app over a site."""
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        return Message(content_of(participant.answer(frame_of(message)), shared=False), reply_to=message)

    for name in ("hello", "begin", *(kind.removeprefix("query.") for kind in STAGES.values())):
        app.query(name)(handle)
    app.train("begin")(handle)
    app.evaluate("begin")(handle)
    return app


def content_of(frame: bytes, shared: bool = True) -> RecordDict:
    """A frame as the content of a message of Flower's.

    Args:
        frame: the bytes.
        shared: whether others are sent the same payload: a large one is a record of its own then, since Flower stores
            equal records once. Each record costs whoever fetches it a request.
    """
    prefix = wire.parse_prefix(frame[: wire.PREFIX_BYTES])
    at = len(frame) - prefix.payload_bytes if shared and prefix.payload_bytes > APART else len(frame)
    content = RecordDict({HEAD: ConfigRecord({BYTES: frame[:at]})})
    if at < len(frame):
        content[PAYLOAD] = ConfigRecord({BYTES: frame[at:]})
    return content


def frame_of(message: Message) -> bytes:
    """The frame in a message of Flower's.

    Raises:
        CodecError: it holds something else.
    """
    pieces = []
    for name in (HEAD, PAYLOAD)[: len(message.content)]:
        record = message.content.get(name)
        piece = record.get(BYTES) if isinstance(record, ConfigRecord) else None
        if not isinstance(piece, bytes):
            raise CodecError("a message of Flower's does not hold the frame that tacit sends")
        pieces.append(piece)
    if len(pieces) != len(message.content) or not pieces:
        raise CodecError("a message of Flower's holds something beside the frame that tacit sends, or nothing")
    return b"".join(pieces)
