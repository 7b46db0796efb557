"""Whoever carries Flower's messages, in front of a SuperLink without TLS: reads them all, and changes what it likes.

>>> with Carrier(Address("127.0.0.1", federation.port)) as carrier:
...     carrier.change = lambda carried: carried.resealed(…)        # a frame instead of the one that came, or None

It is an HTTP proxy that understands Flower's protocol. Flower signs who asks and not what is said, so what is changed
here passes for a message of Flower's and for a letter of tacit's; only tacit's own signatures are in the way. A
SuperLink that lies can do no more, since it has nobody's key either.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import Any

import msgspec
import torch
from flwr.app import ConfigRecord
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_object_type_from_object_content

from tacit import wire
from tacit.errors import CodecError
from tacit.federated.secure_sum import messages as sums
from tacit.identity import Identity
from tacit.party.address import Address
from tacit.runtimes.flower import messages
from tacit.runtimes.flower.client_app import BYTES
from tacit.runtimes.flower.messages import Letter

LIMIT = 1 << 24
_HOP_BY_HOP = {"accept-encoding", "connection", "content-length", "host", "keep-alive", "transfer-encoding"}
_encoder = msgspec.msgpack.Encoder(order="deterministic")


@dataclass(frozen=True, eq=False)
class Carried:
    """A letter on its way.

    Args:
        frame: as it came.
        letter: in it.
        message: in that.
        tensors: that come with it.
        signature: of the letter, which covers the tensors too.
    """

    frame: bytes
    letter: Letter
    message: messages.Request | messages.Reply
    tensors: tuple[torch.Tensor, ...]
    signature: bytes

    @classmethod
    def parse(cls, frame: bytes) -> Carried:
        """What is in a frame; nothing is verified, for whoever carries it does not care."""
        opened = wire.decode(frame, LIMIT)
        sealed = msgspec.msgpack.decode(opened.body, type=messages._Sealed)
        letter = msgspec.msgpack.decode(sealed.letter, type=Letter)
        message = msgspec.msgpack.decode(letter.message, type=messages.Request | messages.Reply)
        return cls(frame, letter, message, opened.tensors, sealed.signature)

    def saying(self, message: Any) -> Carried:
        """The same letter with another message in it."""
        return replace(self, message=message)

    def with_tensors(self, tensors: tuple[torch.Tensor, ...]) -> Carried:
        """The same letter with other tensors, and the digest that is right for them."""
        return replace(self, tensors=tensors)

    def with_frames(self, change: Callable[[bytes], bytes]) -> Carried:
        """The same letter with each frame of a secure sum in it changed."""
        fields = {name: getattr(self.message, name) for name in self.message.__struct_fields__}
        changed = {name: change(value) for name, value in fields.items() if _is_frame(value)}
        return self.saying(msgspec.structs.replace(self.message, **changed))

    @property
    def sealed(self) -> bytes:
        """The frame under the signature that came, which is that of what was said before."""
        return self._frame(self._letter, self.signature)

    def sealed_by(self, identity: Identity) -> bytes:
        """The frame, signed by somebody else, who says so."""
        letter = msgspec.structs.replace(self._letter, writer=identity.public)
        return self._frame(letter, identity.sign(messages._PURPOSE, _encoder.encode(letter)))

    def forged_by(self, identity: Identity) -> bytes:
        """The frame, signed by somebody else in the writer's name."""
        return self._frame(self._letter, identity.sign(messages._PURPOSE, _encoder.encode(self._letter)))

    @property
    def _letter(self) -> Letter:
        payload = messages._payload_digest(self.tensors)
        return msgspec.structs.replace(self.letter, message=_encoder.encode(self.message), payload=payload)

    def _frame(self, letter: Letter, signature: bytes) -> bytes:
        body = _encoder.encode(messages._Sealed(_encoder.encode(letter), signature))
        return wire.encode(wire.Kind.SITE, 0, self.tensors, body)


Change = Callable[[Carried], bytes | None]
"""What becomes of a letter: another frame, or ``None`` for the one that came."""


def untouched(carried: Carried) -> bytes | None:
    """Only look."""
    return None


def clients_message(carried: Carried, kind: type[msgspec.Struct]) -> Any:
    """The first client's message of a secure sum in a letter that is of this kind; ``None`` if there is none."""
    found = []

    def look(frame: bytes) -> bytes:
        with_kind = _clients(frame, kind)
        if with_kind is not None:
            found.append(with_kind[1])
        return frame

    carried.with_frames(look)
    return found[0] if found else None


def changing_clients(kind: type[msgspec.Struct], change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    """Change clients' messages of a kind in frames of a secure sum; their signatures stay as they are."""

    def changed(frame: bytes) -> bytes:
        opened = _clients(frame, kind)
        if opened is None:
            return frame
        stage, message, envelope, packed = opened
        return sums.client_frame(stage, sums.encode(change(message)), envelope.signature, packed)

    return changed


def changing_servers(kind: type[msgspec.Struct], change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    """Change the server's messages of a kind in frames of a secure sum."""

    def changed(frame: bytes) -> bytes:
        try:
            stage, message = sums.read_server_frame(frame)
        except CodecError:
            return frame
        return sums.server_frame(stage, change(message)) if isinstance(message, kind) else frame

    return changed


def changing_words(frame: bytes) -> bytes:
    """Another vector in a frame with a masked one, and the digest that is right for it."""
    opened = _clients(frame, sums.Masked)
    if opened is None:
        return frame
    stage, message, envelope, packed = opened
    other = packed ^ 1
    message = msgspec.structs.replace(message, digest=sums.digest(b"vector", other.view("u1").data))
    return sums.client_frame(stage, sums.encode(message), envelope.signature, other)


class Carrier:
    """The proxy; a context manager, to be left when those that go through it are gone.

    Args:
        target: where the SuperLink listens.
    """

    def __init__(self, target: Address) -> None:
        self.target = target
        self.change: Change = untouched
        self.spoil: Callable[[Carried, bytes], bytes] = lambda carried, content: content
        """What becomes of the object of Flower's that a letter is in."""
        self.cut: Callable[[Carried], bool] = lambda carried: False
        """Whether the line of a site breaks while it sends this."""
        self.seen: list[Carried] = []
        """The letters that passed, as they came."""
        self.changed: list[Carried] = []
        """Those of them that were changed, as they came."""
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.carrier = self
        self._thread = threading.Thread(target=self._server.serve_forever, name="carrier")

    @property
    def port(self) -> int:
        """Where to call instead of the SuperLink."""
        return int(self._server.server_address[1])

    def __enter__(self) -> Carrier:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def forget(self) -> None:
        """Carry honestly, and begin to look anew."""
        self.change, self.spoil = untouched, lambda carried, content: content
        self.cut = lambda carried: False
        self.seen.clear()
        self.changed.clear()

    def breaks(self, request: bytes) -> bool:
        """Whether the line breaks of a site that sends an object of Flower's."""
        content = PushObjectRequest.FromString(request).object_content
        return _is_record(content) and self.cut(Carried.parse(ConfigRecord.inflate(content)[BYTES]))

    def passed(self, answer: bytes) -> bytes:
        """What becomes of the answer to somebody who fetches an object of Flower's."""
        response = PullObjectResponse.FromString(answer)
        content = response.object_content
        if not response.object_available or not _is_record(content):
            return answer
        record = ConfigRecord.inflate(content)
        carried = Carried.parse(record[BYTES])
        self.seen.append(carried)
        other = self.change(carried)
        spoilt = self.spoil(carried, content if other is None else ConfigRecord({BYTES: other}).deflate())
        if spoilt != content:
            self.changed.append(carried)
        response.object_content = spoilt
        return response.SerializeToString()


class _Handler(BaseHTTPRequestHandler):
    """Passes requests on, and answers back."""

    protocol_version = "HTTP/1.1"
    timeout = 60.0
    server: _Server

    def do_POST(self) -> None:
        carrier = self.server.carrier
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/v1/fleet/push-object" and carrier.breaks(body):
            self.close_connection = True
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        onward = http.client.HTTPConnection(carrier.target.host, carrier.target.port, timeout=self.timeout)
        try:
            onward.request("POST", self.path, body, headers)
            response = onward.getresponse()
            answer = response.read()
        except OSError:
            self.close_connection = True
            return
        finally:
            onward.close()
        if self.path.endswith("/pull-object") and response.status == 200:
            answer = carrier.passed(answer)
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing is logged."""


class _Server(ThreadingMixIn, HTTPServer):
    request_queue_size = 64
    carrier: Carrier


def _clients(frame: bytes, kind: type[msgspec.Struct]) -> tuple[int, Any, sums.Signed, Any] | None:
    """A client's message of this kind in a frame, with its stage, envelope and vector; ``None`` if there is another."""
    try:
        opened = sums.read_client_frame(frame, LIMIT)
    except CodecError:
        return None
    return opened if isinstance(opened[1], kind) else None


def _is_record(content: bytes) -> bool:
    return get_object_type_from_object_content(content) == "ConfigRecord"


def _is_frame(value: object) -> bool:
    return isinstance(value, bytes) and value.startswith(wire.MAGIC)
