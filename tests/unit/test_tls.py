"""Who is let in: TLS between pinned identities, over links and in asyncio."""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from links import ALICE, BOB, MALLORY, both
from tacit.errors import CodecError, InputError, PeerError
from tacit.identity import Identity, key_text
from tacit.party import dialing, tls
from tacit.party.address import Address
from tacit.party.client_hello import route_of
from tacit.party.transport import Link
from tacit.wire import Kind

CLINIC = Identity(bytes([9]) * 32)
PINS = {"bob": BOB.public, "clinic": CLINIC.public}
LOOPBACK = "127.0.0.1"


def meet(
    call: Callable[[int], Any], server: Identity = ALICE, pins: dict[str, bytes] = PINS, host: str = LOOPBACK
) -> tuple[Any, Any]:
    """What the side that is called gets, and what the side that calls does."""
    with dialing.listen(Address(host, 0)) as listener:
        port = listener.getsockname()[1]
        context = tls.server_context(server, pins)
        answered, called = both(
            lambda: dialing.answer(listener.accept()[0], context, server, pins, 10.0), lambda: call(port)
        )
    return answered, called


def dialled(identity: Identity, pin: bytes = ALICE.public, host: str = LOOPBACK) -> Callable[[int], Link]:
    return lambda port: dialing.dial(Address(host, port), identity, "alice", pin, patience=10.0)


def raw(context: ssl.SSLContext) -> Callable[[int], Any]:
    """A caller that is not tacit; what it gets when it reads."""

    def call(port: int) -> bytes:
        with socket.create_connection((LOOPBACK, port)) as sock, context.wrap_socket(sock) as wrapped:
            return wrapped.recv(100)

    return call


@contextmanager
def closing(*links: Any) -> Iterator[None]:
    yield
    for link in links:
        link.close()


@pytest.mark.parametrize(("name", "identity"), [("bob", BOB), ("clinic", CLINIC)])
def test_the_pinned_are_let_in_by_name(name: str, identity: Identity) -> None:
    answered, called = meet(dialled(identity))
    with closing(answered, called):
        assert (answered.peer, called.peer) == (name, "alice")
        called.send(Kind.CALL, body=b"question")
        assert answered.receive(Kind.CALL).body == b"question"


def test_ipv6() -> None:
    try:
        answered, called = meet(dialled(BOB, host="::1"), host="::1")
    except InputError:
        pytest.skip("this machine has no IPv6")
    with closing(answered, called):
        assert (answered.peer, called.peer) == ("bob", "alice")


class TestRefused:
    def test_a_caller_that_is_not_pinned(self) -> None:
        answered, called = meet(dialled(MALLORY))
        assert isinstance(answered, PeerError)
        assert str(answered).startswith("a caller from 127.0.0.1:")
        assert "does not hold any key that is pinned" in str(answered)
        with closing(called), pytest.raises(PeerError) as refused:
            called.receive(Kind.CALL)  # TLS 1.3 tells the caller after its handshake
        assert "alice refused this side's key" in str(refused.value)

    def test_a_server_with_another_key(self) -> None:
        answered, called = meet(dialled(BOB), server=MALLORY)
        assert isinstance(called, PeerError)
        assert "alice at 127.0.0.1:" in str(called)
        assert "does not hold" in str(called)
        assert key_text(ALICE.public) in str(called)
        assert isinstance(answered, PeerError)
        assert "refused this side's key" in str(answered)
        assert key_text(MALLORY.public) in str(answered)

    def test_a_server_with_the_key_of_somebody_else_who_is_pinned(self) -> None:
        answered, called = meet(dialled(CLINIC, pin=ALICE.public), server=BOB, pins={"clinic": CLINIC.public})
        assert isinstance(called, PeerError)
        assert "does not hold" in str(called)
        assert isinstance(answered, PeerError)

    def test_a_caller_without_a_key(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        answered, called = meet(raw(context))
        assert isinstance(answered, PeerError)
        assert "showed no key" in str(answered)
        assert isinstance(called, ssl.SSLError)

    def test_a_caller_of_an_older_tls(self) -> None:
        context = tls.client_context(BOB, ALICE.public)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
        answered, called = meet(raw(context))
        assert isinstance(answered, PeerError)
        assert "does not speak TLS 1.3" in str(answered)
        assert isinstance(called, ssl.SSLError)

    @pytest.mark.parametrize(
        "sent", [b"GET / HTTP/1.0\r\n\r\n", b"tact\1\1" + bytes(99), bytes(400), b"\x16\x03\x01\0\5hello"]
    )
    def test_a_caller_without_tls(self, sent: bytes) -> None:
        def call(port: int) -> None:
            with socket.create_connection((LOOPBACK, port)) as sock:
                sock.sendall(sent)
                sock.settimeout(10)
                while sock.recv(1000):
                    pass

        answered, _ = meet(call)
        assert isinstance(answered, PeerError)
        assert "does not speak TLS 1.3" in str(answered)

    def test_a_caller_that_leaves(self) -> None:
        answered, _ = meet(lambda port: socket.create_connection((LOOPBACK, port)).close())
        assert isinstance(answered, PeerError)
        assert "closed the connection before it authenticated itself" in str(answered)

    @pytest.mark.parametrize("drip", [False, True])
    def test_a_caller_that_takes_its_time(self, drip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dialing, "HANDSHAKE_S", 0.3)
        gone = threading.Event()

        def call(port: int) -> None:
            with socket.create_connection((LOOPBACK, port)) as sock, contextlib.suppress(OSError):
                for sent in HELLO if drip else b"":
                    sock.sendall(bytes([sent]))
                    gone.wait(0.02)
                gone.wait(10)

        def answer(listener: socket.socket) -> Any:
            try:
                return dialing.answer(listener.accept()[0], tls.server_context(ALICE, PINS), ALICE, PINS)
            finally:
                gone.set()

        with dialing.listen(Address(LOOPBACK, 0)) as listener:
            port = listener.getsockname()[1]
            answered, _ = both(lambda: answer(listener), lambda: call(port))
        assert isinstance(answered, PeerError)
        assert "has not authenticated itself within 0.3 seconds" in str(answered)

    def test_nobody_there(self) -> None:
        with socket.create_server((LOOPBACK, 0)) as listener:
            port = listener.getsockname()[1]
        with pytest.raises(PeerError, match=rf"alice at 127\.0\.0\.1:{port} cannot be reached: Connection refused"):
            dialled(BOB)(port)

    def test_an_address_in_use_or_of_another_machine(self) -> None:
        with socket.create_server((LOOPBACK, 0)) as listener:
            taken = Address(LOOPBACK, listener.getsockname()[1])
            with pytest.raises(InputError, match=r"nothing can listen at 127\.0\.0\.1:.*in use"):
                dialing.listen(taken)
        with pytest.raises(InputError, match=r"nothing can listen at 192\.0\.2\.1:7401"):
            dialing.listen(Address("192.0.2.1", 7401))


def certificate(key: Any, signer: Any, issuer: str, authority: bool = False, subject: str = "tacit") -> bytes:
    """A certificate that tacit would not make, and its key."""
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime(1970, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime.now(UTC) + timedelta(days=9))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .sign(signer, SHA256() if isinstance(signer, ec.EllipticCurvePrivateKey) else None)
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return made.public_bytes(Encoding.PEM) + pem


def forger(*pems: bytes, folder: Any) -> ssl.SSLContext:
    """A caller that shows these certificates."""
    path = folder / "forged.pem"
    path.write_bytes(b"".join(pems))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(path)
    return context


class TestForged:
    MINE = Ed25519PrivateKey.from_private_bytes(bytes([3]) * 32)
    OTHER = Ed25519PrivateKey.from_private_bytes(bytes([4]) * 32)
    CURVE = ec.generate_private_key(ec.SECP256R1())

    def forged(self) -> dict[str, tuple[bytes, ...]]:
        bob, clinic = key_text(BOB.public), key_text(CLINIC.public)
        return {
            "bob's name, signed by itself": (certificate(self.MINE, self.MINE, bob),),
            "bob's name as issuer and subject": (certificate(self.MINE, self.MINE, bob, subject=bob),),
            "an authority of bob's name": (
                certificate(self.MINE, self.OTHER, bob),
                certificate(self.OTHER, self.OTHER, bob, authority=True, subject=bob),
            ),
            "self-signed": (certificate(self.MINE, self.MINE, "tacit"),),
            "another kind of key": (certificate(self.CURVE, self.CURVE, bob),),
            "issued by another": (certificate(self.MINE, CLINIC.private_key, bob),),
            "below another's": (
                certificate(self.MINE, self.OTHER, "sub"),
                certificate(self.OTHER, CLINIC.private_key, clinic, authority=True, subject="sub"),
            ),
        }

    def test_certificates_that_chain_to_no_pinned_key(self, tmp_path: Any) -> None:
        for name, pems in self.forged().items():
            answered, called = meet(raw(forger(*pems, folder=tmp_path)))
            assert isinstance(answered, PeerError), name
            assert "does not hold any key that is pinned" in str(answered), name
            assert isinstance(called, ssl.SSLError), name

    @pytest.mark.parametrize("key", [MINE, CURVE], ids=["Ed25519", "P-256"])
    def test_a_pinned_key_cannot_vouch_for_another(self, tmp_path: Any, key: Any) -> None:
        """OpenSSL accepts this chain: the comparison after the handshake does not."""
        issued = certificate(key, CLINIC.private_key, key_text(CLINIC.public))
        answered, called = meet(raw(forger(issued, folder=tmp_path)))
        assert isinstance(answered, PeerError)
        if key is self.MINE:
            assert f"has the key {key_text(MALLORY.public)}, which is not pinned for bob or clinic" in str(answered)
        else:
            assert "of another kind than Ed25519" in str(answered)
        assert called == b"", "it was told something before it was refused"

    def test_the_certificate_names_nobody(self) -> None:
        clinic_as_bob = {"clinic": CLINIC.public, "bob": BOB.public}
        answered, called = meet(dialled(CLINIC), pins=clinic_as_bob)
        with closing(answered, called):
            assert answered.peer == "clinic"


def test_no_clock_locks_anybody_out() -> None:
    for der in (
        tls._anchor(BOB.public),
        ssl.PEM_cert_to_DER_cert(tls._presented(BOB)[0].decode().split("-----BEGIN ENC")[0]),
    ):
        made = x509.load_der_x509_certificate(der)
        assert made.not_valid_before_utc == datetime(1970, 1, 1, tzinfo=UTC)
        assert made.not_valid_after_utc == datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


def test_sessions_are_not_resumed() -> None:
    answered, called = meet(dialled(BOB))
    with closing(answered, called):
        answered.send(Kind.CALL)
        called.receive(Kind.CALL)
        session = called._stream.tls.session
        assert session is None or not session.has_ticket


def test_errors_and_reprs_hold_no_secret() -> None:
    identity = Identity(b"secret seed of thirty two bytes!")
    answered, called = meet(dialled(identity))
    with closing(called), pytest.raises(PeerError) as refused:
        called.receive(Kind.CALL)
    texts = [str(answered), str(refused.value), repr(called)]
    assert not any("secret seed" in text or identity.storage_key("x").hex() in text for text in texts)
    assert "BEGIN ENCRYPTED PRIVATE KEY" in tls._presented(identity)[0].decode()


class TestAsyncio:
    """The same contexts in the event loop that serves clients."""

    async def meet(self, identity: Identity, pin: bytes = ALICE.public) -> tuple[list[Any], Any]:
        seen: list[Any] = []
        done = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append(tls.authenticated(writer.get_extra_info("ssl_object"), PINS))
            writer.write(await reader.readexactly(4))
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            done.set()

        server = await asyncio.start_server(serve, LOOPBACK, 0, ssl=tls.server_context(ALICE, PINS))
        async with server:
            port = server.sockets[0].getsockname()[1]
            context = tls.client_context(identity, pin)
            try:
                reader, writer = await asyncio.open_connection(LOOPBACK, port, ssl=context, server_hostname="")
                seen.append(tls.authenticated(writer.get_extra_info("ssl_object"), {"alice": pin}))
                writer.write(b"ping")
                answer = await reader.read(4)
                await asyncio.wait_for(done.wait(), 10)
                writer.close()
                await writer.wait_closed()
            except (ssl.SSLError, ConnectionError) as error:
                return seen, error
        return seen, answer

    def test_the_pinned_are_let_in_by_name(self) -> None:
        seen, answer = uvloop.run(self.meet(BOB))
        assert (sorted(seen), answer) == (["alice", "bob"], b"ping")

    def test_a_server_with_another_key(self) -> None:
        seen, error = uvloop.run(self.meet(BOB, pin=MALLORY.public))
        assert seen == []
        assert isinstance(error, ssl.SSLCertVerificationError)
        assert "does not hold" in str(tls.refusal(error, "alice"))


class TestRoute:
    def hello(self, route: str) -> bytes:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = tls.client_context(BOB, ALICE.public).wrap_bio(incoming, outgoing, server_hostname=route or None)
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        return outgoing.read()

    @pytest.mark.parametrize("route", ["", "worker-0", "worker-12", "alice.example"])
    def test_is_read_from_what_openssl_sends(self, route: str) -> None:
        data = self.hello(route)
        assert route_of(data) == route
        assert route_of(data + b"more") == route
        assert {route_of(data[:count]) for count in range(len(data))} == {None}

    def test_a_dialled_link_carries_it_and_peeking_takes_nothing(self) -> None:
        with dialing.listen(Address(LOOPBACK, 0)) as listener:
            port = listener.getsockname()[1]

            def answer() -> tuple[str | None, Link]:
                sock, _ = listener.accept()
                route = None
                while route is None:
                    route = route_of(sock.recv(1 << 14, socket.MSG_PEEK))
                return route, dialing.answer(sock, tls.server_context(ALICE, PINS), ALICE, PINS)

            (route, answered), called = both(
                answer, lambda: dialing.dial(Address(LOOPBACK, port), BOB, "alice", ALICE.public, route="worker-3")
            )
        with closing(answered, called):
            assert (route, answered.peer) == ("worker-3", "bob")

    @pytest.mark.parametrize("start", [b"GET / HT", b"\x17\x03\x03", b"\x16\x02", b"\x16\x03\x01\xff\xff", b"\0"])
    def test_what_is_no_tls_is_refused_at_once(self, start: bytes) -> None:
        with pytest.raises(CodecError):
            route_of(start)

    @given(st.data())
    def test_changed_bytes_parse_or_are_refused(self, data: st.DataObject) -> None:
        hello = bytearray(HELLO)
        for _ in range(data.draw(st.integers(1, 4))):
            hello[data.draw(st.integers(0, len(hello) - 1))] = data.draw(st.integers(0, 255))
        try:
            route = route_of(bytes(hello))
        except CodecError:
            return
        assert route is None or len(route) <= 63

    @given(st.binary(max_size=200))
    def test_any_message_parses_or_is_refused(self, body: bytes) -> None:
        message = b"\1" + len(body).to_bytes(3, "big") + body
        try:
            route = route_of(b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message)
        except CodecError:
            return
        assert route is not None


HELLO = TestRoute().hello("worker-1")
