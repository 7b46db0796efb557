import contextlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from links import BOB, both, tls_links
from tacit.errors import CodecError, InputError, PeerError
from tacit.identity import Identity
from tacit.party import cluster_file, dialing, session
from tacit.party.session import TABLE, Called, Caller, Event, Leg, Session, State, permitted
from tacit.party.session_messages import (
    MAX_BODY_BYTES,
    Accepted,
    Greeting,
    Purpose,
    Refused,
    Welcome,
    decode,
    encode,
    refusal,
)

CLINIC = Identity(bytes([9]) * 32)
CLIENT = frozenset({Purpose.CLIENT})


def called(party: str, nonce: int, **changes: Any) -> Called:
    settings = {"caller": "clinic", "caller_key": CLINIC.public, "allowed": CLIENT, "nonce": bytes([nonce]) * 32}
    return Called(party, **{**settings, **changes})


def calling(**changes: Any) -> Caller:
    settings = {"purpose": Purpose.CLIENT, "parties": ("alice", "bob"), "nonce": bytes([7]) * 32}
    return Caller("clinic", CLINIC.public, **{**settings, **changes})


def greet(caller: Caller, parties: dict[str, Called]) -> bytes:
    for name, party in parties.items():
        caller.welcomed(name, party.welcome())
    return caller.greeting()


def greeting_of(data: bytes) -> Greeting:
    message = decode(data)
    assert isinstance(message, Greeting)
    return message


def pair(**changes: Any) -> dict[str, Called]:
    return {"alice": called("alice", 1, **changes), "bob": called("bob", 2, **changes)}


class TestOpening:
    def test_one_session_at_all_three(self) -> None:
        caller, parties = calling(), pair(lifetime_s=60)
        greeting = greet(caller, parties)
        found = []
        for name, party in parties.items():
            theirs, accepted = party.greeted(greeting, 100.0)
            found += [theirs, caller.accepted(name, accepted, 100.0)]
        assert len(set(found)) == 1
        assert found[0] == Session(found[0].id, Purpose.CLIENT, "clinic", 1, 160.0)
        assert {party.leg.state for party in parties.values()} == {State.OPEN}
        assert {leg.state for leg in caller.legs.values()} == {State.OPEN}
        assert repr(found[0]) == f"Session(client, clinic, {found[0].id.hex()[:8]}…)"

    @pytest.mark.parametrize(
        ("purpose", "party", "caller"),
        [(Purpose.CONTROL, "alice", "bob"), (Purpose.DATA, "alice", "bob"), (Purpose.POOL, "provider", "alice")],
    )
    def test_with_one_party(self, purpose: Purpose, party: str, caller: str) -> None:
        extra = {"parent": bytes(32), "worker": 3} if purpose is Purpose.DATA else {}
        side = Called(party, caller, CLINIC.public, {purpose}, parent=bytes(32))
        client = Caller(caller, CLINIC.public, purpose, (party,), **extra)
        theirs, accepted = side.greeted(greet(client, {party: side}), 0.0)
        ours = client.accepted(party, accepted, 0.0)
        assert (ours, ours.parent, ours.worker) == (theirs, extra.get("parent", b""), extra.get("worker", 0))

    def test_every_message_counts_in_the_id(self) -> None:
        def opened(alice: int = 1, bob: int = 2, own: int = 7, key: bytes = CLINIC.public, lifetime: int = 5) -> bytes:
            caller = Caller("clinic", key, Purpose.CLIENT, ("alice", "bob"), nonce=bytes([own]) * 32)
            parties = {
                "alice": called("alice", alice, caller_key=key, lifetime_s=lifetime),
                "bob": called("bob", bob, caller_key=key),
            }
            return parties["alice"].greeted(greet(caller, parties), 0.0)[0].id

        others = [opened(alice=3), opened(bob=3), opened(own=3), opened(key=bytes(32)), opened(lifetime=6)]
        assert len({opened(), *others}) == 6
        assert opened() == opened()

    def test_nonces_are_drawn_for_each(self) -> None:
        nonces = {
            called("alice", 1).nonce,
            Called("alice", "clinic", CLINIC.public, CLIENT).nonce,
            Called("alice", "clinic", CLINIC.public, CLIENT).nonce,
        }
        assert len(nonces) == 3

    def test_ends_with_the_shorter_lifetime(self) -> None:
        caller = calling()
        parties = {"alice": called("alice", 1, lifetime_s=60), "bob": called("bob", 2, lifetime_s=30)}
        opened, _ = parties["alice"].greeted(greet(caller, parties), 1000.0)
        opened.require_live(1029.9)
        with pytest.raises(PeerError, match="the session of clinic has expired: connect again"):
            opened.require_live(1030.0)


class TestRefused:
    def refused(self, change: Callable[[Greeting], dict[str, Any]], match: str, **changes: Any) -> None:
        caller, parties = calling(), pair(**changes)
        greeting = greeting_of(greet(caller, parties))
        changed = encode(msgspec.structs.replace(greeting, **change(greeting)))
        with pytest.raises(PeerError, match=match) as caught:
            parties["alice"].greeted(changed, 0.0)
        assert parties["alice"].leg.state is State.REFUSED
        with pytest.raises(PeerError, match=f"alice refused the session: .*{match}"):
            caller.accepted("alice", refusal(caught.value), 0.0)
        assert caller.legs["alice"].state is State.REFUSED

    def test_under_another_name(self) -> None:
        self.refused(lambda g: {"caller": "lab"}, "this key is clinic's, not lab's")

    def test_for_another_purpose(self) -> None:
        self.refused(lambda g: {"purpose": Purpose.OWNER}, r"alice's cluster\.toml does not let clinic call as owner")
        self.refused(lambda g: {}, r"does not let clinic call as client", allowed=frozenset())

    def test_with_other_parties(self) -> None:
        self.refused(lambda g: {"welcomes": g.welcomes[:1]}, "a session as client is not with these parties")
        self.refused(lambda g: {"welcomes": g.welcomes[::-1]}, "a session as client is not with these parties")
        self.refused(lambda g: {"welcomes": g.welcomes[:1] * 2}, "a session as client is not with these parties")

    def test_replayed_from_another_connection(self) -> None:
        old = greet(calling(), pair())
        caller, fresh = calling(), called("alice", 5)
        caller.welcomed("alice", fresh.welcome())
        with pytest.raises(PeerError, match="answers another connection's welcome: it was replayed or crossed"):
            fresh.greeted(old, 0.0)

    def test_a_second_time_on_the_same_connection(self) -> None:
        parties = pair()
        greeting = greet(calling(), parties)
        parties["alice"].greeted(greeting, 0.0)
        with pytest.raises(PeerError, match="greeting came out of turn: the session is open"):
            parties["alice"].greeted(greeting, 0.0)

    def test_of_another_version(self) -> None:
        self.refused(lambda g: {"version": 2}, "of version 2, not the highest that all have in common")

    def test_with_what_only_workers_have(self) -> None:
        self.refused(lambda g: {"parent": bytes(32)}, "a session as client has no parent and no worker")
        self.refused(lambda g: {"worker": 1}, "a session as client has no parent and no worker")

    def test_a_worker_of_another_control_session(self) -> None:
        side = Called("alice", "bob", BOB.public, {Purpose.DATA}, parent=bytes(31) + b"1")
        for parent in (b"", bytes(32)):
            caller = Caller("bob", BOB.public, Purpose.DATA, ("alice",), parent=parent)
            side.leg = Leg()
            with pytest.raises(PeerError, match="bob's worker belongs to another control session than alice's"):
                side.greeted(greet(caller, {"alice": side}), 0.0)

    def test_reasons_are_cut_and_those_of_others_are_not_told(self) -> None:
        assert decode(refusal(PeerError("é" * 400))) == Refused("é" * 250)
        assert decode(refusal(RuntimeError("secret"))) == Refused("it failed")


class TestCaller:
    def test_no_version_in_common(self, monkeypatch: pytest.MonkeyPatch) -> None:
        caller, parties = calling(), pair()
        monkeypatch.setattr(session, "VERSIONS", (2, 3))
        caller.welcomed("bob", parties["bob"].welcome())
        monkeypatch.setattr(session, "VERSIONS", (1,))
        caller.welcomed("alice", parties["alice"].welcome())
        with pytest.raises(PeerError, match="in common: alice speaks 1; bob speaks 2, 3; this side speaks 1"):
            caller.greeting()

    def test_the_highest_common_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        caller, parties = calling(), pair()
        for name, versions in (("alice", (1, 2, 3)), ("bob", (1, 2, 5))):
            monkeypatch.setattr(session, "VERSIONS", versions)
            caller.welcomed(name, parties[name].welcome())
        monkeypatch.setattr(session, "VERSIONS", (1, 2, 3, 4))
        assert greeting_of(caller.greeting()).version == 2

    def test_a_party_under_another_name(self) -> None:
        with pytest.raises(PeerError, match="alice welcomes under another name"):
            calling().welcomed("alice", called("bob", 1).welcome())

    def test_a_party_at_another_session(self) -> None:
        caller, parties = calling(), pair()
        greet(caller, parties)
        with pytest.raises(PeerError, match="alice is at another session than this side"):
            caller.accepted("alice", encode(Accepted(bytes(32))), 0.0)

    def test_parties_that_do_not_belong_together(self) -> None:
        for parties in (("alice",), ("bob", "alice"), ("provider",)):
            with pytest.raises(InputError, match="a session as client is not with"):
                calling(parties=parties)

    def test_out_of_turn(self) -> None:
        caller, parties = calling(), pair()
        with pytest.raises(PeerError, match="greeting came out of turn: the session is new"):
            caller.greeting()
        with pytest.raises(PeerError, match="accepted came out of turn"):
            calling().accepted("alice", encode(Accepted(bytes(32))), 0.0)
        with pytest.raises(PeerError, match="greeting came out of turn: the session is new"):
            parties["alice"].greeted(greet(calling(), pair()), 0.0)


def test_the_table_is_walked_and_nothing_else() -> None:
    for state in State:
        for event in Event:
            leg = Leg(state)
            if (state, event) in TABLE:
                leg.step(event)
                assert leg.state is TABLE[state, event]
            else:
                with pytest.raises(PeerError, match=f"{event} came out of turn: the session is {state}"):
                    leg.step(event)
                assert leg.state is state
    reached = {State.NEW} | set(TABLE.values())
    assert reached == set(State)
    assert not {state for state, _ in TABLE} & {State.OPEN, State.REFUSED}


class TestBytes:
    MESSAGES = (
        Welcome((1, 2), "alice", bytes(32), 60),
        Greeting(1, Purpose.DATA, "bob", bytes(32), (Welcome((1,), "alice", bytes(32), 60),), bytes(32), 2),
        Accepted(bytes(32)),
        Refused("no"),
    )

    @pytest.mark.parametrize("message", MESSAGES)
    def test_round_trip(self, message: Any) -> None:
        assert decode(encode(message)) == message

    @given(st.sampled_from(MESSAGES), st.data())
    def test_changed_messages_parse_to_themselves_or_are_refused(self, message: Any, data: st.DataObject) -> None:
        changed = bytearray(encode(message))
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        changed = changed[: data.draw(st.integers(0, len(changed)))] + data.draw(st.binary(max_size=2))
        with contextlib.suppress(CodecError):
            assert encode(decode(bytes(changed))) == changed

    @given(st.binary(max_size=300))
    def test_any_bytes_parse_or_are_refused(self, data: bytes) -> None:
        with pytest.raises(CodecError):
            decode(data)

    @pytest.mark.parametrize(
        "fields",
        [
            ["Welcome", [2, 1], "alice", bytes(32), 60],
            ["Welcome", [1, 1], "alice", bytes(32), 60],
            ["Welcome", [], "alice", bytes(32), 60],
            ["Welcome", [1], "", bytes(32), 60],
            ["Welcome", [1], "alice", bytes(31), 60],
            ["Welcome", [1], "alice", bytes(32), 0],
            ["Welcome", [1], "alice", bytes(32), 60, 0],
            ["Welcome", [1], "alice", bytes(32)],
            ["Welcome", [1], "alice", "0" * 32, 60],
            ["Accepted", bytes(33)],
            ["Accept", bytes(32)],
            ["Refused", "x" * 501],
            ["Greeting", 1, "data", "bob", bytes(32), [], bytes(32), 0],
            ["Greeting", 1, "date", "bob", bytes(32), [[[1], "alice", bytes(32), 60]], bytes(32), 0],
            ["Greeting", 1, "data", "bob", bytes(32), [["Welcome", [1], "alice", bytes(32), 60]], bytes(1), 0],
        ],
    )
    def test_fields_outside_their_ranges(self, fields: list[Any]) -> None:
        with pytest.raises(CodecError):
            decode(msgspec.msgpack.encode(fields))

    def test_longer_than_any_message(self) -> None:
        for data in (b"\x91" * 100_000, msgspec.msgpack.encode(["Refused", "x" * MAX_BODY_BYTES])):
            with pytest.raises(CodecError):
                decode(data)

    def test_the_longest_message_fits(self) -> None:
        welcome = Welcome(tuple(range(1, 17)), "x" * 63, bytes(32), 2**32 - 1)
        longest = Greeting(255, Purpose.CONTROL, "x" * 63, bytes(32), (welcome, welcome), bytes(32), 65535)
        assert decode(encode(longest)) == longest


def test_what_the_cluster_file_permits() -> None:
    def key(number: int) -> str:
        return cluster_file.key_text(Identity(bytes([number]) * 32).public)

    parties = {
        name: cluster_file.Member(key=key(number), address=f"{name}:1")
        for number, name in enumerate(cluster_file.PARTIES)
    }
    cluster = cluster_file.ClusterFile(
        parties=cluster_file.Parties(**parties),
        owners={"hospital": cluster_file.Owner(key=key(4))},
        clients={"clinic": cluster_file.Client(key=key(5)), "hospital": cluster_file.Client(key=key(4))},
    )
    found = {
        (party, caller): sorted(permitted(cluster, party, caller))
        for party in cluster_file.PARTIES
        for caller in (*cluster_file.PARTIES, "hospital", "clinic", "mallory")
    }
    assert {pair: purposes for pair, purposes in found.items() if purposes} == {
        ("alice", "bob"): ["control", "data"],
        ("alice", "hospital"): ["client", "owner"],
        ("alice", "clinic"): ["client"],
        ("bob", "hospital"): ["client", "owner"],
        ("bob", "clinic"): ["client"],
        ("provider", "alice"): ["pool"],
        ("provider", "bob"): ["pool"],
        ("provider", "hospital"): ["owner"],
    }


class TestOverLinks:
    def test_a_session_over_tls(self) -> None:
        alice, bob = tls_links()
        party = Called("alice", "bob", BOB.public, {Purpose.CONTROL})
        caller = Caller("bob", BOB.public, Purpose.CONTROL, ("alice",))
        theirs, ours = both(
            lambda: dialing.accept_session(alice, party), lambda: dialing.open_session({"alice": bob}, caller)
        )
        assert (theirs.id, theirs.purpose, theirs.caller) == (ours.id, Purpose.CONTROL, "bob")
        alice.close()
        bob.close()

    def test_no_version_in_common_is_told_to_the_party(self, monkeypatch: pytest.MonkeyPatch) -> None:
        alice, bob = tls_links()
        party = Called("alice", "bob", BOB.public, {Purpose.CONTROL})
        caller = Caller("bob", BOB.public, Purpose.CONTROL, ("alice",))
        welcome = Welcome((2,), "alice", bytes(32), 60)
        monkeypatch.setattr(Called, "_welcome", welcome)
        theirs, ours = both(
            lambda: dialing.accept_session(alice, party), lambda: dialing.open_session({"alice": bob}, caller)
        )
        assert "bob refused the session: no version in common" in str(theirs)
        assert "no version in common" in str(ours)

    def test_a_refusal_reaches_the_caller_and_closes_both(self) -> None:
        alice, bob = tls_links()
        party = Called("alice", "bob", BOB.public, {Purpose.DATA})
        caller = Caller("bob", BOB.public, Purpose.CONTROL, ("alice",))
        theirs, ours = both(
            lambda: dialing.accept_session(alice, party), lambda: dialing.open_session({"alice": bob}, caller)
        )
        assert "does not let bob call as control" in str(theirs)
        assert "alice refused the session: alice's cluster.toml does not let bob call as control" in str(ours)
        assert alice.fileno() == bob.fileno() == -1

    def test_a_long_first_message_is_refused_before_it_is_read(self) -> None:
        alice, bob = tls_links()
        party = Called("alice", "bob", BOB.public, {Purpose.CONTROL})
        refused, _ = both(
            lambda: dialing.accept_session(alice, party),
            lambda: bob.send(dialing.Kind.HELLO, body=bytes(1 << 20)),
        )
        assert isinstance(refused, CodecError)
        assert "announces" in str(refused)
        bob.close()
