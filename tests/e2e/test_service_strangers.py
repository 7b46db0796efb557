"""Who is let in to a running service, and how long: keys, versions, expired sessions, others' models and results."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

import tacit
from crashes import crashing
from faults import injected
from serving import close, cluster_of, inputs, model, pushed
from tacit.errors import PeerError
from tacit.identity import Identity, key_text
from tacit.party import calling, cluster_file, dialing, messages
from tacit.party.channel import Channel
from tacit.party.client import Client
from tacit.party.cluster_file import PARTIES
from tacit.party.local import CLUSTER, LocalService
from tacit.party.messages import Answer, Ask, Begin, Cancel, ClientReply, Describe, Described, Refused
from tacit.party.refusal import Reason
from tacit.party.session import Session
from tacit.party.session_messages import NONCE_BYTES, Greeting, Purpose, Welcome, decode, encode
from tacit.party.session_messages import Refused as SessionRefused
from tacit.party.tickets import Ticket
from tacit.party.transport import Link
from tacit.ring.prg import Prg
from tacit.wire import Kind

pytestmark = pytest.mark.slow
MODEL = model()
LIFETIME_S = 10
BOTH = ("alice", "bob")
Channels = dict[str, Channel]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    folder = tmp_path_factory.mktemp("strangers")
    cluster = cluster_of(folder / "service", ("clinic", "lab", "outsider"))
    outsider = msgspec.structs.replace(cluster.clients["outsider"], models=("other",))
    (folder / "service" / CLUSTER).unlink()
    clients = {**cluster.clients, "outsider": outsider}
    cluster_file.write(msgspec.structs.replace(cluster, clients=clients), folder / "service" / CLUSTER)
    with crashing(folder / "points", LIFETIME_S=str(LIFETIME_S)), LocalService(folder / "service") as service:
        service.wait_ready()
        pushed(service)
        yield service


@pytest.fixture(autouse=True)
def nobody_else_notices(service: LocalService) -> Iterator[None]:
    yield
    with tacit.connect(service.cluster, service.key("clinic")) as parties:
        assert close(parties.model("small")(inputs(2)), MODEL(inputs(2)))


async def connected(service: LocalService, name: str) -> tuple[Channels, Session]:
    return await calling.call(service.cluster, name, service.key(name), Purpose.CLIENT, BOTH)


async def reply(channel: Channel) -> ClientReply:
    frame = await asyncio.wait_for(channel.receive(Kind.REPLY), 30)
    return messages.decode(messages.client_replies, frame.body, channel.peer)


def say(channel: Channel, message: messages.ClientCall, *tensors: torch.Tensor) -> None:
    channel.send(Kind.CALL, tensors, messages.encode(message))


def share() -> torch.Tensor:
    return Prg.fresh().words((1, 6))


async def digest_of(service: LocalService) -> str:
    client = Client(service.cluster, service.key("clinic"))
    try:
        return (await client.describe("small")).digest
    finally:
        await client.close()


def met(scenario: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await scenario()

    asyncio.run(run())
    injected("clients out of order")


def test_an_expired_session_is_ended_and_the_library_opens_another(service: LocalService) -> None:
    async def scenario() -> None:
        client = Client(service.cluster, service.key("clinic"))
        channels, session = await connected(service, "lab")
        for number in range(2):
            assert close(await client.ask("small", inputs(1, number)), MODEL(inputs(1, number)))  # type: ignore[arg-type]
            await asyncio.sleep(1.2 * LIFETIME_S)
        # A client that goes on with its session is not answered.
        assert asyncio.get_running_loop().time() > session.expires
        for channel in channels.values():
            say(channel, Describe(0, "small"))
            with pytest.raises(PeerError, match="closed the connection"):
                await reply(channel)
        await client.close()

    met(scenario)


def test_another_s_model_is_refused_though_its_digest_is_known(service: LocalService) -> None:
    async def scenario() -> None:
        digest = await digest_of(service)
        channels, _ = await connected(service, "outsider")
        for channel in channels.values():
            say(channel, Ask(0, digest, 1, 5000.0), share())
        for channel in channels.values():
            refused = await reply(channel)
            assert isinstance(refused, Refused)
            assert refused.refusal.reason is Reason.FORBIDDEN
            assert "does not let outsider ask model 'small'" in refused.refusal.text
            channel.abort()

    met(scenario)


def test_nobody_gets_or_cancels_another_s_request(service: LocalService) -> None:
    """A client can name numbers alone, and numbers are of its own session: also for another session of its own."""

    async def scenario() -> None:
        digest = await digest_of(service)
        client = Client(service.cluster, service.key("clinic"))
        theirs, _ = await connected(service, "lab")
        asked = [asyncio.create_task(client.ask("small", inputs(1, number))) for number in range(20)]
        for number in range(40):
            for channel in theirs.values():
                say(channel, Cancel(number))
            await asyncio.sleep(0.01)
        for number, task in enumerate(asked):
            assert close(await task, MODEL(inputs(1, number)))  # type: ignore[arg-type]
        await client.close()
        # Halves of a request that come over different sessions do not meet.
        one, other = theirs, (await connected(service, "lab"))[0]
        say(one["alice"], Ask(50, digest, 1, 3000.0), share())
        say(other["bob"], Ask(50, digest, 1, 3000.0), share())
        refused = await reply(one["alice"])
        assert isinstance(refused, Refused)
        assert refused.refusal.reason in (Reason.MISSING, Reason.DEADLINE)
        for channel in (*one.values(), *other.values()):
            channel.abort()

    met(scenario)


def test_a_number_that_was_used_and_what_belongs_to_another_session_end_the_session(service: LocalService) -> None:
    async def scenario() -> None:
        digest = await digest_of(service)
        begin = messages.encode(Begin(0, 1, Ticket(digest, 1, 0), [(bytes(32), 0)], [1]))
        for wrong in ("number", "begin", "kind", "large"):
            channels, _ = await connected(service, "lab")
            channel = channels["alice"]
            if wrong == "number":
                say(channels["bob"], Ask(3, digest, 1, 5000.0), share())
                say(channel, Ask(3, digest, 1, 5000.0), share())
                assert isinstance(await reply(channel), Answer | Refused)
                say(channel, Ask(3, digest, 1, 5000.0), share())
            elif wrong == "begin":
                channel.send(Kind.CALL, body=begin)
            elif wrong == "kind":
                channel.send(Kind.REPLY, body=messages.encode(Describe(0, "small")))
            else:
                say(channel, Ask(0, digest, 1, 5000.0), Prg.fresh().words((1 << 16,)))
            with pytest.raises(PeerError, match="closed the connection"):
                await reply(channel)
            for one in channels.values():
                one.abort()

    met(scenario)


def test_shares_of_another_shape_are_refused_and_the_session_goes_on(service: LocalService) -> None:
    async def scenario() -> None:
        digest = await digest_of(service)
        channels, _ = await connected(service, "lab")
        for number, tensors in enumerate(
            ([], [share().to(torch.int32)], [share(), share()], [Prg.fresh().words((1, 5))])
        ):
            for channel in channels.values():
                say(channel, Ask(number, digest, 1, 5000.0), *tensors)
                refused = await reply(channel)
                assert isinstance(refused, Refused)
                assert refused.refusal.reason is Reason.INVALID
        # A seed stands in the place of shares: not beside them.
        for channel in channels.values():
            say(channel, Ask(5, digest, 1, 5000.0, bytes(16)), share())
            refused = await reply(channel)
            assert isinstance(refused, Refused)
            assert refused.refusal.reason is Reason.INVALID
        for channel in channels.values():
            say(channel, Describe(9, "small"))
            assert isinstance(await reply(channel), Described)
            channel.abort()

    met(scenario)


def welcomed(service: LocalService, party: str, name: str) -> tuple[Link, Welcome]:
    member = service.cluster.party(party)
    link = dialing.dial(member.reached_at, service.key(name), party, member.public, patience=30)
    welcome = decode(link.receive(Kind.HELLO).body)
    assert isinstance(welcome, Welcome)
    return link, welcome


def greeted(link: Link, greeting: bytes) -> str:
    link.send(Kind.HELLO, body=greeting)
    refused = decode(link.receive(Kind.HELLO).body)
    assert isinstance(refused, SessionRefused)
    with pytest.raises(PeerError):
        link.receive(Kind.HELLO)
    link.close()
    return refused.reason


@pytest.mark.parametrize("party", BOTH)
def test_sessions_of_another_version_purpose_or_caller_are_refused_with_the_reason(
    service: LocalService, party: str
) -> None:
    nonce = Prg.fresh().bytes(NONCE_BYTES)
    for change, why in (
        ({"version": 2}, "version 2"),
        ({"purpose": Purpose.CONTROL}, "does not let lab call as control"),
        ({"purpose": Purpose.OWNER}, "does not let lab call as owner"),
        ({"purpose": Purpose.POOL}, "does not let lab call as pool"),
        ({"caller": "clinic"}, "this key is lab's, not clinic's"),
    ):
        legs = {one: welcomed(service, one, "lab") for one in BOTH}
        welcomes = tuple(welcome for _, welcome in legs.values())
        greeting = Greeting(1, Purpose.CLIENT, "lab", nonce, welcomes, b"", 0)
        assert why in greeted(legs[party][0], encode(msgspec.structs.replace(greeting, **change)))
        injected("sessions that must not be opened")
        for link, _ in legs.values():
            link.close()


@pytest.mark.parametrize("party", BOTH)
def test_a_greeting_that_somebody_else_made_is_refused(service: LocalService, party: str) -> None:
    """Replayed on a connection of another client's, and on a later one of the same client's."""
    theirs = {one: welcomed(service, one, "clinic") for one in BOTH}
    welcomes = tuple(welcome for _, welcome in theirs.values())
    greeting = encode(Greeting(1, Purpose.CLIENT, "clinic", Prg.fresh().bytes(NONCE_BYTES), welcomes, b"", 0))
    mine, _ = welcomed(service, party, "lab")
    assert "this key is lab's, not clinic's" in greeted(mine, greeting)
    later, _ = welcomed(service, party, "clinic")
    assert "replayed or crossed" in greeted(later, greeting)
    injected("sessions that must not be opened", 2)
    for link, _ in theirs.values():
        link.close()


@pytest.mark.parametrize("party", PARTIES)
def test_a_key_that_is_not_pinned_is_refused_on_either_side(service: LocalService, party: str) -> None:
    member, stranger = service.cluster.party(party), Identity.fresh()
    # TLS 1.3 tells a caller that it is refused with the first bytes that follow the handshake.
    with (
        pytest.raises(PeerError, match=r"refused this side's key|closed the connection"),
        contextlib.closing(dialing.dial(member.reached_at, stranger, party, member.public, patience=30)) as link,
    ):
        link.receive(Kind.HELLO)
    with pytest.raises(PeerError, match="does not hold the key"):
        dialing.dial(member.reached_at, service.key("clinic"), party, stranger.public)
    injected("wrong keys", 2)


def test_a_client_whose_file_pins_another_key_for_a_party_says_so(service: LocalService) -> None:
    other = msgspec.structs.replace(service.cluster.parties.bob, key=key_text(Identity.fresh().public))
    changed = msgspec.structs.replace(
        service.cluster, parties=msgspec.structs.replace(service.cluster.parties, bob=other)
    )
    with tacit.connect(changed, service.key("clinic")) as parties, pytest.raises(PeerError, match=r"bob at .*pinned"):
        parties.model("small")
    injected("wrong keys")


def timers(port: int) -> list[str]:
    """Which timer runs, of both ends of every connection to a port of this machine, as Linux tells."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [row[5][:2] for row in rows if f":{port:04X}" in row[1] + row[2] and row[3] == "01"]


def test_the_kernel_asks_whether_silent_machines_are_there(service: LocalService) -> None:
    """Else a client that is cut off would have its sessions, of which there are not many, for a day."""
    keepalive = "02"

    async def scenario() -> None:
        channels, _ = await connected(service, "lab")
        for party in BOTH:
            port = service.cluster.party(party).reached_at.port
            for _ in range(100):  # other timers run for a moment after something was sent
                found = timers(port)
                if len(found) >= 2 and {*found} == {keepalive}:
                    break
                await asyncio.sleep(0.05)
            else:
                pytest.fail(f"the timers of connections to {party}: {found}")
        for channel in channels.values():
            channel.abort()

    asyncio.run(scenario())


def test_what_was_turned_away_is_logged_by_its_reason(service: LocalService) -> None:
    log = Path(service.folder / "alice.log").read_text()
    for reason in ("version 2", "call as control", "this key is lab's", "used a request's number twice"):
        assert reason in log
