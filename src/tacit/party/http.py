"""Health, readiness and metrics over plain HTTP, for a load balancer and a monitor at the party's own site.

``/healthz`` answers while the process does, ``/readyz`` with 200 if requests can be served and 503 with the reason if
not, ``/metrics`` with the metrics. A connection asks one thing; anything but a short GET is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable

from tacit.errors import InputError
from tacit.party.address import Address
from tacit.party.metrics import CONTENT_TYPE

_PATIENCE_S = 5.0
_REQUEST_BYTES = 8192
Ready = Callable[[], dict[str, object]]
"""What stands in the way of serving; ``ready`` is a key of it, and true if nothing does."""


async def serve(address: Address, metrics: Callable[[], bytes], ready: Ready) -> asyncio.Server:
    """Answer at an address.

    Args:
        address: where.
        metrics: gives the metrics' text.
        ready: says whether requests can be served.

    Raises:
        InputError: nothing can listen there.
    """

    def respond(path: str) -> tuple[str, str, bytes]:
        if path == "/healthz":
            return "200 OK", "text/plain", b"ok\n"
        if path == "/readyz":
            state = ready()
            return "200 OK" if state["ready"] else "503 Service Unavailable", "application/json", _json(state)
        if path == "/metrics":
            return "200 OK", CONTENT_TYPE, metrics()
        return "404 Not Found", "text/plain", b"/healthz, /readyz or /metrics\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_PATIENCE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                method, _, rest = head.decode("latin-1").partition(" ")
                status, kind, body = respond(rest.partition(" ")[0].partition("?")[0])
                if method != "GET":
                    status, kind, body = "405 Method Not Allowed", "text/plain", b"GET\n"
                lines = (f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}")
                writer.write("\r\n".join((*lines, "Connection: close", "", "")).encode() + body)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    try:
        return await asyncio.start_server(answer, address.host, address.port, limit=_REQUEST_BYTES)
    except OSError as error:
        raise InputError(f"nothing can listen at {address}: {error.strerror}") from error


def _json(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
