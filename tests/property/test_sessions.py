"""Sessions under an adversary who holds keys of its own and moves everybody's messages about as it likes."""

from dataclasses import dataclass
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from tacit.errors import PeerError
from tacit.identity import Identity
from tacit.party.session import Called, Session, State, session_id
from tacit.party.session_messages import Greeting, Purpose, Welcome, decode, encode

KEYS = {name: Identity(name.encode().ljust(32)).public for name in ("clinic", "lab", "hospital", "bob")}
ALLOWED = {
    "clinic": {Purpose.CLIENT},
    "lab": {Purpose.CLIENT, Purpose.OWNER},
    "hospital": {Purpose.OWNER},
    "bob": {Purpose.CONTROL, Purpose.DATA},
}
NAMES = st.sampled_from(sorted(KEYS))
PURPOSES = st.sampled_from(Purpose)
M = TypeVar("M")


def parsed(data: bytes, kind: type[M]) -> M:
    message = decode(data)
    assert isinstance(message, kind)
    return message


@dataclass
class Connection:
    """One that TLS has let in."""

    called: Called
    welcome: bytes
    session: Session | None = None
    accepted: bytes = b""
    greeting: bytes = b""


class Adversary(RuleBasedStateMachine):
    """Opens connections under any name, and delivers on each any Greeting that was ever made, or one made up."""

    alices, bobs, greetings = Bundle("alices"), Bundle("bobs"), Bundle("greetings")

    def __init__(self) -> None:
        super().__init__()
        self.opened: dict[str, list[Connection]] = {"alice": [], "bob": []}
        self.number = 0

    def nonce(self) -> bytes:
        self.number += 1
        return self.number.to_bytes(32, "big")

    def connected(self, party: str, name: str) -> Connection:
        called = Called(party, name, KEYS[name], ALLOWED[name], nonce=self.nonce())
        connection = Connection(called, called.welcome())
        self.opened[party].append(connection)
        return connection

    @rule(target=alices, name=NAMES)
    def connect_to_alice(self, name: str) -> Connection:
        return self.connected("alice", name)

    @rule(target=bobs, name=NAMES)
    def connect_to_bob(self, name: str) -> Connection:
        return self.connected("bob", name)

    @rule(target=greetings, alice=alices, bob=bobs, name=NAMES, purpose=PURPOSES)
    def compose(self, alice: Connection, bob: Connection, name: str, purpose: Purpose) -> bytes:
        return self.greeting(purpose, name, [alice, bob])

    @rule(target=greetings, alice=alices, bob=bobs)
    def compose_as_alice_expects(self, alice: Connection, bob: Connection) -> bytes:
        return self.greeting(sorted(alice.called.allowed)[0], alice.called.caller, [alice, bob])

    @rule(target=greetings, alice=alices, purpose=PURPOSES, parent=st.sampled_from([b"", bytes(32)]))
    def compose_for_alice_alone(self, alice: Connection, purpose: Purpose, parent: bytes) -> bytes:
        return self.greeting(purpose, alice.called.caller, [alice], parent)

    def greeting(self, purpose: Purpose, name: str, legs: list[Connection], parent: bytes = b"") -> bytes:
        welcomes = tuple(parsed(leg.welcome, Welcome) for leg in legs)
        return encode(Greeting(1, purpose, name, self.nonce(), welcomes, parent, 0))

    @rule(connection=alices | bobs, greeting=greetings)
    def deliver(self, connection: Connection, greeting: bytes) -> None:
        self.given(connection, greeting)

    @rule(greeting=greetings, everywhere=st.booleans())
    def deliver_where_it_may_be_taken(self, greeting: bytes, everywhere: bool) -> None:
        message = parsed(greeting, Greeting)
        for connection in [*self.opened["alice"], *self.opened["bob"]]:
            answered = parsed(connection.welcome, Welcome) in message.welcomes
            if answered or (everywhere and connection.called.caller == message.caller):
                self.given(connection, greeting)

    @rule(connection=alices | bobs, greeting=greetings, place=st.integers(0, 400), bit=st.integers(0, 7))
    def deliver_changed(self, connection: Connection, greeting: bytes, place: int, bit: int) -> None:
        changed = bytearray(greeting)
        changed[place % len(changed)] ^= 1 << bit
        self.given(connection, bytes(changed))

    def given(self, connection: Connection, greeting: bytes) -> None:
        try:
            session, accepted = connection.called.greeted(greeting, 0.0)
        except PeerError:
            assert connection.called.leg.state in (State.REFUSED, State.OPEN)
            return
        assert connection.session is None, "a connection has one session"
        connection.session, connection.accepted, connection.greeting = session, accepted, greeting

    @invariant()
    def sessions_are_of_one_caller_one_purpose_and_one_pair_of_connections(self) -> None:
        by_party = {party: [one for one in opened if one.session] for party, opened in self.opened.items()}
        for opened in by_party.values():
            ids = [one.session.id for one in opened]
            assert len(set(ids)) == len(ids), "replayed"
            for one in opened:
                assert one.session.caller == one.called.caller
                assert one.session.purpose in ALLOWED[one.called.caller]
                assert one.session.id == session_id(KEYS[one.called.caller], one.greeting)
        for alice in by_party["alice"]:
            for bob in by_party["bob"]:
                if alice.session.id == bob.session.id:
                    assert alice.session == bob.session
                    welcomes = parsed(alice.greeting, Greeting).welcomes
                    assert [encode(one) for one in welcomes] == [alice.welcome, bob.welcome]


TestAdversary = Adversary.TestCase
TestAdversary.settings = settings(max_examples=50, stateful_step_count=30)
