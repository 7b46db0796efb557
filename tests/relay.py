"""A network between two ends, for tests: as slow as is asked for, and as faulty.

    python tests/relay.py LISTEN_HOST:PORT TARGET_HOST:PORT lan|wan|ROUND_TRIP_MS,MBPS      # until it is killed

>>> with Relay(target, LAN, to_target=[flip(900)], to_caller=[cut(5000)]) as relay:
...     connect(relay.address)

A fault sits at a place in the stream of one direction of one connection, counted in bytes from its start. Bytes are
delayed, not packets: TCP above sees no loss and no reordering. Reordering means that blocks of bytes arrive in another
order, which TCP never does, and whoever sits on the path may.
"""

import contextlib
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tacit.party.address import Address, parse_address
from tacit.program.network import NETWORKS, Network, parse_network

LAN, WAN = NETWORKS["lan"], NETWORKS["wan"]
NONE = Network(0.0, float("inf"))
_CHUNK = 1 << 14
_BUFFERED_S = 0.25
"""What a path of a router's size of queue holds at most."""


@dataclass
class Fault:
    """Something that happens to bytes ``at`` to ``at + size`` of a stream.

    Args:
        at: the first byte.
        size: how many bytes are changed together.
        change: what becomes of them; None if the stream does not go on.
        then: what happens after them: nothing, "cut" or "reset" the connection, "stall" it, or "slow" it down.
        rate: bytes a second if it is slowed down.
    """

    at: int
    size: int = 0
    change: Callable[[bytes], bytes] = bytes
    then: str = ""
    rate: float = 0.0


def flip(at: int, bit: int = 0) -> Fault:
    """Another bit than was sent."""
    return Fault(at, 1, lambda data: bytes([data[0] ^ 1 << bit]))


def drop(at: int, size: int) -> Fault:
    """Bytes that do not arrive."""
    return Fault(at, size, lambda data: b"")


def duplicate(at: int, size: int) -> Fault:
    """Bytes that arrive twice."""
    return Fault(at, size, lambda data: data + data)


def reorder(at: int, size: int) -> Fault:
    """Two blocks of ``size`` bytes that arrive in the other order."""
    return Fault(at, 2 * size, lambda data: data[size:] + data[:size])


def insert(at: int, data: bytes) -> Fault:
    """Bytes that nobody sent."""
    return Fault(at, 1, lambda there: data + there)


def cut(at: int) -> Fault:
    """Both ends see an orderly end of the connection."""
    return Fault(at, then="cut")


def reset(at: int) -> Fault:
    """Both ends see a broken connection."""
    return Fault(at, then="reset")


def stall(at: int) -> Fault:
    """Nothing more arrives, and nobody is told."""
    return Fault(at, then="stall")


def slow(at: int, rate: float) -> Fault:
    """What follows trickles, as towards a reader that takes its time."""
    return Fault(at, then="slow", rate=rate)


@dataclass
class Pipe:
    """What a stream becomes on its way: pure, so that it can be tested by itself."""

    faults: list[Fault]
    position: int = 0
    held: bytes = b""
    state: str = ""
    rate: float = float("inf")

    def __post_init__(self) -> None:
        self.faults = sorted(self.faults, key=lambda fault: fault.at)

    def pass_on(self, data: bytes) -> bytes:
        """What comes out for what goes in; `state` says whether more will."""
        data, out = self.held + data, []
        self.held = b""
        while self.state not in ("cut", "reset", "stall"):
            fault = self.faults[0] if self.faults else None
            if fault is None or self.position + len(data) < fault.at:
                out.append(data)
                self.position += len(data)
                return b"".join(out)
            before = max(0, fault.at - self.position)
            out.append(data[:before])
            self.position, data = self.position + before, data[before:]
            if len(data) < fault.size:
                self.held = data
                return b"".join(out)
            self.faults.pop(0)
            out.append(fault.change(data[: fault.size]))
            self.position, data = self.position + fault.size, data[fault.size :]
            if fault.then == "slow":
                self.rate = fault.rate
            elif fault.then:
                self.state = fault.then
        return b"".join(out)


class Relay:
    """Passes connections on to a target; a context manager, which ends them.

    Args:
        target: where to.
        network: how long it takes, and how wide it is.
        to_target, to_caller: faults of the two directions, for connections whose number is in ``connections``.
        connections: which connections are faulty, counted from 0; None for all.
        listen: where the relay listens.
    """

    def __init__(
        self,
        target: Address,
        network: Network = NONE,
        *,
        to_target: Iterable[Fault] = (),
        to_caller: Iterable[Fault] = (),
        connections: Iterable[int] | None = None,
        listen: Address = Address("127.0.0.1", 0),  # noqa: B008 -- frozen
    ) -> None:
        self.target, self.network = target, network
        self.faults = (list(to_target), list(to_caller))
        self.faulty = None if connections is None else set(connections)
        self.passed = [0, 0]
        """Bytes that arrived at the target and at the caller."""
        self._listener = socket.create_server((listen.host, listen.port), backlog=64)
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._count = 0

    @property
    def address(self) -> Address:
        """Where to call instead of the target."""
        return Address(*self._listener.getsockname()[:2])

    def __enter__(self) -> "Relay":
        self._start(self._accept)
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        for sock in (self._listener, *self._open):
            _shut(sock)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        for sock in (self._listener, *self._open):
            sock.close()

    def break_all(self) -> None:
        """Cut every connection that is open now, as when a cable is pulled and both ends are told."""
        for sock in list(self._open):
            _shut(sock)

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            try:
                target = socket.create_connection((self.target.host, self.target.port), timeout=10)
            except OSError:
                caller.close()
                continue
            target.settimeout(None)
            self._open += [caller, target]
            faulty = self.faulty is None or self._count in self.faulty
            self._count += 1
            for direction, (source, sink) in enumerate(((caller, target), (target, caller))):
                with contextlib.suppress(OSError):  # another thread has cut it already
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                line = _Line(queue.Queue(), Pipe(list(self.faults[direction]) if faulty else []))
                self._start(self._receive, source, line)
                self._start(self._send, source, sink, line, direction)

    def _receive(self, source: socket.socket, line: "_Line") -> None:
        """Take bytes in, and note when they arrive at the other end."""
        free, data = 0.0, b"more"
        while data:
            try:
                data = source.recv(_CHUNK)
            except OSError:
                data = b""
            free = max(time.monotonic(), free) + 8 * len(data) / self.network.bandwidth
            line.queue.put((free + self.network.round_trip / 2, data))
            # A full queue holds the sender up, as a full router does.
            _sleep_until(free - _BUFFERED_S, self._closed)

    def _send(self, source: socket.socket, sink: socket.socket, line: "_Line", direction: int) -> None:
        data = b"more"
        while data and not line.pipe.state:
            due, data = line.queue.get()
            _sleep_until(due, self._closed)
            out = line.pipe.pass_on(data) if data else line.pipe.held
            for start in range(0, len(out), _CHUNK):
                piece = out[start : start + _CHUNK]
                _sleep_until(time.monotonic() + len(piece) / line.pipe.rate, self._closed)
                try:
                    sink.sendall(piece)
                except OSError:
                    _shut(source, socket.SHUT_RD)
                    return
                self.passed[direction] += len(piece)
        if line.pipe.state == "stall":
            self._closed.wait()
        elif line.pipe.state == "reset":
            for sock in (source, sink):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                _shut(sock, socket.SHUT_RD)  # or the thread that waits on it would keep it open
                sock.close()
        elif line.pipe.state == "cut":
            _shut(source)
            _shut(sink)
        else:
            _shut(sink, socket.SHUT_WR)


@dataclass
class _Line:
    queue: "queue.Queue[tuple[float, bytes]]"
    pipe: Pipe = field(default_factory=lambda: Pipe([]))


def _sleep_until(due: float, closed: threading.Event) -> None:
    left = due - time.monotonic()
    if left > 0.005:
        closed.wait(left - 0.002)  # its wake-up is late by less than this
        left = due - time.monotonic()
    if left > 0:
        time.sleep(left)


def _shut(sock: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(how)


def main() -> None:
    """Relay between two addresses until killed."""
    listen, target, network = sys.argv[1:]
    with Relay(parse_address(target), parse_network(network), listen=parse_address(listen)):
        print("ready", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
