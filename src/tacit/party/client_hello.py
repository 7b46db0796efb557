"""The route that a caller asks for, read from the first bytes of its TLS handshake before they are answered.

A party has one address. Which of its processes a connection is for is in the server name of the ClientHello (RFC 6066,
section 3), which is not encrypted: it says nothing but ``worker-0``, and proves nothing. The process that it is handed
to authenticates the caller.
"""

from __future__ import annotations

import re

from tacit.errors import CodecError

MAX_HELLO_BYTES = 1 << 14
_RECORD_BYTES = 5
_HANDSHAKE, _CLIENT_HELLO, _SERVER_NAME, _HOST_NAME = 22, 1, 0, 0
_ROUTE = re.compile(rb"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")


class _Reader:
    """Big-endian numbers and counted strings from the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bool__(self) -> bool:
        return bool(self._data)

    def take(self, count: int) -> bytes:
        taken, self._data = self._data[:count], self._data[count:]
        if len(taken) < count:
            raise CodecError("the first message of a TLS connection ends in the middle of a field")
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def counted(self, size: int) -> bytes:
        return self.take(self.number(size))


def route_of(data: bytes) -> str | None:
    """The route in the first bytes that a caller sent.

    Args:
        data: all that has come so far, as a socket shows it under ``MSG_PEEK``.

    Returns:
        The route, empty for a caller that named none; ``None`` while the ClientHello is not there in full.

    Raises:
        CodecError: the bytes do not begin with a ClientHello in one record of at most `MAX_HELLO_BYTES`.
    """
    size = int.from_bytes(data[3:_RECORD_BYTES], "big")
    if not b"\x16\x03".startswith(data[:2]) or size > MAX_HELLO_BYTES:
        raise CodecError("the caller does not speak TLS: its first bytes are not a ClientHello")
    if len(data) < _RECORD_BYTES or len(data) < _RECORD_BYTES + size:
        return None
    message = _Reader(data[_RECORD_BYTES : _RECORD_BYTES + size])
    if message.number(1) != _CLIENT_HELLO:
        raise CodecError("the caller's first message is not a ClientHello")
    hello = _Reader(message.counted(3))
    hello.take(2 + 32)  # version and random
    hello.counted(1)  # session id
    hello.counted(2)  # cipher suites
    hello.counted(1)  # compression methods
    extensions = _Reader(hello.counted(2))
    if message or hello:
        raise CodecError("the caller's ClientHello has bytes too many")
    while extensions:
        kind, content = extensions.number(2), extensions.counted(2)
        if kind == _SERVER_NAME:
            return _named(_Reader(content))
    return ""


def _named(content: _Reader) -> str:
    names = _Reader(content.counted(2))
    kind, name = names.number(1), names.counted(2)
    if content or names or kind != _HOST_NAME or not _ROUTE.fullmatch(name):
        raise CodecError("the caller's ClientHello asks for something that is no route")
    return name.decode()
