"""Clients and servers that are killed (SIGKILL) at every stage of a secure sum, and started again.

What a process knew is gone with it: a round that it was in goes on without it or ends without a sum, it cannot be taken
up again, and the next round has other keys and masks.
"""

import copy
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tacit.errors import InputError, PeerError, TacitError
from tacit.federated.secure_sum import messages
from tacit.federated.secure_sum.agreement import KeyPair
from tacit.federated.secure_sum.client import MaskedClient, Policy, Task
from tacit.federated.secure_sum.messages import Advert, Invite, Unmask
from tacit.federated.secure_sum.parameters import choose
from tacit.federated.secure_sum.ring import Ring, Words
from tacit.federated.secure_sum.server import MaskedServer, Stage
from tacit.federated.secure_sum.shared_client import Parts, upload
from tacit.federated.secure_sum.shared_messages import Terms
from tacit.federated.secure_sum.shared_server import SharedServer, total_of
from tacit.identity import Identity
from tacit.mpc.steps import Role
from tacit.ring.prg import Prg

N, VICTIM, LENGTH, RING = 5, 1, 50, Ring(20)
STAGES = tuple(Stage)[:5]
IDENTITIES = tuple(Identity(bytes([i + 1]) * 32) for i in range(N))
POLICY, TASK = Policy(3), Task(RING, LENGTH)
PINNED = frozenset(identity.public for identity in IDENTITIES)
Serve = Callable[[bytes, bytes], bytes]
"""What a process does with a command and its argument."""


def vector(number: int) -> Words:
    return np.full(LENGTH, 1000 * number + 7, np.uint32)


def plain(numbers: Iterator[int] | tuple[int, ...]) -> Words:
    return RING.reduce_(np.sum([vector(number) for number in numbers], axis=0, dtype=np.uint32))


def invitation() -> Invite:
    sharing = choose(N, POLICY.assumption)
    return Invite(
        Prg.fresh().bytes(16),
        tuple(identity.public for identity in IDENTITIES),
        sharing.holders,
        sharing.partners,
        sharing.threshold,
        sharing.threshold + 1,
    )


def new_client(number: int) -> MaskedClient:
    """What a client has when its process starts: its long-term identity."""
    return MaskedClient(IDENTITIES[number], PINNED, POLICY, TASK, Prg.fresh())


class Process:
    """Somebody in a process of its own, who answers commands until it is killed."""

    def __init__(self, make: Callable[[], Serve]) -> None:
        context = get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=self._work, args=(make, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def _work(self, make: Callable[[], Serve], pipe: Connection) -> None:
        self._ours.close()
        serve = make()
        while True:
            command = pipe.recv_bytes()
            try:
                answer = b"+" + serve(command[:1], command[1:])
            except TacitError as error:
                answer = b"-" + str(error).encode()
            # A command in capitals has been carried out when it is answered; one in small letters never is.
            pipe.send_bytes(answer if command[:1].isupper() else b"+")
            if command[:1].islower():
                signal.pause()

    def ask(self, command: bytes, argument: bytes = b"") -> bytes:
        self._ours.send_bytes(command + argument)
        answer = self._ours.recv_bytes()
        if answer[:1] == b"-":
            raise PeerError(answer[1:].decode())
        return answer[1:]

    def kill(self) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()
        assert self._process.exitcode == -signal.SIGKILL
        self._ours.close()


@contextmanager
def process(make: Callable[[], Serve]) -> Iterator[Process]:
    started = Process(make)
    try:
        yield started
    finally:
        if started._process.is_alive():
            started.kill()


def serving_client() -> Serve:
    client = new_client(VICTIM)

    def serve(command: bytes, frame: bytes) -> bytes:
        if command.upper() == b"R":
            return client.receive(frame) or b""
        return client.mask(vector(VICTIM))

    return serve


class Round:
    """A round whose victim is a process, and the others objects here."""

    def __init__(self, victim: Process) -> None:
        self.server = MaskedServer(invitation(), TASK.subject)
        self.victim = victim
        self.others = {number: new_client(number) for number in range(N) if number != VICTIM}
        self.sent: dict[tuple[Stage, int], bytes] = {}
        self.received: dict[tuple[Stage, int], bytes] = {}
        self.frames = dict.fromkeys(range(N), self.server.invite())

    def step(self, kill: str = "") -> None:
        """A stage; the victim may be killed before it answers, or when it has."""
        stage = self.server.stage
        for number, frame in self.frames.items():
            self.received[stage, number] = frame
            if number == VICTIM:
                if kill == "before":
                    # It has done its work, and dies before the answer is out.
                    if stage is Stage.MASK:
                        self.victim.ask(b"R", frame)
                        self.victim.ask(b"m")
                    else:
                        self.victim.ask(b"r", frame)
                    self.victim.kill()
                    continue
                answer = self.victim.ask(b"R", frame)
                if stage is Stage.MASK:
                    answer = self.victim.ask(b"M")
                if kill == "after":
                    self.victim.kill()
            else:
                answer = self.others[number].receive(frame) or b""
                if stage is Stage.MASK:
                    answer = self.others[number].mask(vector(number))
            self.sent[stage, number] = answer
            self.server.receive(answer)
        self.frames = self.server.close()
        if kill == "after":
            self.frames.pop(VICTIM, None)

    def keys(self) -> set[bytes]:
        """All the ephemeral keys that were advertised."""
        adverts = [message_of(frame) for (stage, _), frame in self.sent.items() if stage is Stage.ADVERTISE]
        return {key for advert in adverts if isinstance(advert, Advert) for key in (advert.mask_key, advert.seal_key)}


def message_of(frame: bytes) -> messages.FromClient:
    return messages.read_client_frame(frame, 1 << 20)[1]


def require_fresh(first: Round, second: Round) -> None:
    """No key and no mask of one round is in the other."""
    assert not first.keys() & second.keys()
    for number in range(N):
        if (Stage.MASK, number) in first.sent and (Stage.MASK, number) in second.sent:
            one, other = (
                messages.read_client_frame(each.sent[Stage.MASK, number], 1 << 20)[3] for each in (first, second)
            )
            # The same vector under two masks: 50 residues of 20 bits in 32 words.
            assert np.count_nonzero(one == other) <= 2


class TestClient:
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("stage", STAGES)
    def test_a_killed_client_is_lost_to_its_round_and_joins_the_next(
        self, stage: Stage, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with process(serving_client) as victim:
            first = Round(victim)
            while first.server.stage is not Stage.DONE:
                first.step(when if first.server.stage is stage else "")
        counted = stage > Stage.MASK or (stage, when) == (Stage.MASK, "after")
        assert first.server.outcome.survivors == tuple(i for i in range(N) if counted or i != VICTIM)
        assert np.array_equal(first.server.outcome.total, plain(first.server.outcome.survivors))
        assert counted == (VICTIM not in first.server.outcome.lost)
        # Nothing but its long-term identity outlives it.
        assert list(tmp_path.iterdir()) == []
        with process(serving_client) as again:
            second = Round(again)
            while second.server.stage is not Stage.DONE:
                second.step()
        assert second.server.outcome.survivors == tuple(range(N))
        assert np.array_equal(second.server.outcome.total, plain(tuple(range(N))))
        require_fresh(first, second)

    @pytest.mark.parametrize("stage", STAGES[1:])
    def test_a_restarted_client_cannot_take_up_the_round(self, stage: Stage) -> None:
        with process(serving_client) as victim:
            first = Round(victim)
            while first.server.stage is not stage:
                first.step()
            victim.kill()
        following = first.frames[VICTIM]
        with process(serving_client) as again, pytest.raises(PeerError, match="in state NEW"):
            again.ask(b"R", following)
        with process(serving_client) as again:
            # A server that has it start the old round once more gets other keys, which the others do not know.
            advert = again.ask(b"R", first.received[Stage.ADVERTISE, VICTIM])
            assert message_of(advert).mask_key != message_of(first.sent[Stage.ADVERTISE, VICTIM]).mask_key
            with pytest.raises(PeerError, match="came in stage"):
                first.server.receive(advert)
            if stage is Stage.SHARE:
                with pytest.raises(PeerError, match="other keys than this client's own"):
                    again.ask(b"R", following)
            else:
                with pytest.raises(PeerError, match="other keys than this client's own"):
                    again.ask(b"R", first.received[Stage.SHARE, VICTIM])
            with pytest.raises(PeerError, match="state FAILED has no vector to mask"):
                again.ask(b"M")


def serving_server() -> Serve:
    server = MaskedServer(invitation(), TASK.subject)

    def serve(command: bytes, argument: bytes) -> bytes:
        if command == b"I":
            return server.invite()
        if command == b"F":
            return str(server.receive(argument)).encode()
        if command.upper() == b"C":
            return msgspec.msgpack.encode(server.close())
        return server.outcome.total.tobytes()

    return serve


class TestServer:
    def through(self, server: Process, upto: Stage, half: bool = False) -> Round:
        """The clients of a round that a process runs, up to a stage; ``half``: of which some have answered."""
        played = Round.__new__(Round)
        played.sent, played.received = {}, {}
        played.others = {number: new_client(number) for number in range(N)}
        played.frames = dict.fromkeys(range(N), server.ask(b"I"))
        for stage in STAGES[: upto + 1]:
            for number, frame in played.frames.items():
                if stage is upto and (not half or number > N // 2):
                    continue
                answer = played.others[number].receive(frame) or b""
                if stage is Stage.MASK:
                    answer = played.others[number].mask(vector(number))
                played.received[stage, number], played.sent[stage, number] = frame, answer
                server.ask(b"F", answer)
            if stage is not upto:
                played.frames = msgspec.msgpack.decode(server.ask(b"C"), type=dict[int, bytes])
        return played

    @pytest.mark.parametrize("half", [False, True], ids=["before any answer", "after some answers"])
    @pytest.mark.parametrize("stage", STAGES)
    def test_a_killed_servers_round_is_over_and_the_next_has_new_keys(self, stage: Stage, half: bool) -> None:
        with process(serving_server) as server:
            first = self.through(server, stage, half)
            server.kill()
        with process(serving_server) as again:
            for frame in first.sent.values():
                with pytest.raises(PeerError, match=r"not signed by|came in stage|over 16777216"):
                    again.ask(b"F", frame)
            # Clients that were left in the middle of a round are of no use for another.
            fresh_invite = again.ask(b"I")
            for number, client in first.others.items():
                if (Stage.ADVERTISE, number) in first.sent:
                    with pytest.raises(PeerError, match=r"belongs to another round|Invite came to a client in state"):
                        client.receive(fresh_invite)
                    with pytest.raises(PeerError, match="in state FAILED"):
                        client.receive(first.frames[number])
        with process(serving_server) as again:
            second = self.through(again, Stage.UNMASK, half=False)
            for number, frame in second.frames.items():
                again.ask(b"F", second.others[number].receive(frame) or b"")
            assert again.ask(b"C") == msgspec.msgpack.encode({})
            total = np.frombuffer(again.ask(b"T"), np.uint32)
        assert np.array_equal(total, plain(tuple(range(N))))
        require_fresh(first, second)

    def test_what_was_told_before_the_crash_cannot_be_told_otherwise_after_it(self) -> None:
        """A server that kept everything but its memory: it has all frames, and tells other survivors this time."""
        with process(serving_server) as server:
            first = self.through(server, Stage.UNMASK)
            server.kill()
        invite = messages.read_server_frame(first.received[Stage.ADVERTISE, 0])[1]
        assert isinstance(invite, Invite)
        otherwise = messages.Survivors(invite.context, messages.bit_mask(range(N - 1), N))
        released = []
        for number, client in first.others.items():
            with pytest.raises(PeerError, match="Survivors came to a client in state CONFIRMED"):
                client.receive(messages.server_frame(3, otherwise))
            try:
                released.append(client.receive(first.frames[number]))
            except PeerError:
                continue
        assert released == []

    def test_shares_are_released_once(self) -> None:
        with process(serving_server) as server:
            first = self.through(server, Stage.UNMASK)
            released = [message_of(first.others[i].receive(frame) or b"") for i, frame in first.frames.items()]
            server.kill()
        assert all(isinstance(message, Unmask) for message in released)
        for number, client in first.others.items():
            with pytest.raises(PeerError, match="in state DONE"):
                client.receive(first.frames[number])


SERVERS = {Role.ALICE: Identity(bytes([81]) * 32), Role.BOB: Identity(bytes([82]) * 32)}


def terms_of(keys: dict[Role, bytes]) -> Terms:
    return Terms(
        Prg.fresh().bytes(16),
        tuple(identity.public for identity in IDENTITIES),
        keys[Role.ALICE],
        keys[Role.BOB],
        LENGTH,
        RING.bits,
        3,
        0,
        bytes(32),
    )


def noise(length: int) -> np.ndarray:
    return Prg.fresh().array(8 * length).view(np.int64) % 1000


def serving_alice() -> Serve:
    """alice, with the key of a round that she draws when she is started; her identity is on disk."""
    pair, servers = KeyPair(Prg.fresh()), list[SharedServer]()

    def serve(command: bytes, argument: bytes) -> bytes:
        if command == b"K":
            return pair.public
        if command == b"T":
            servers.append(SharedServer(Role.ALICE, msgspec.msgpack.decode(argument, type=Terms), pair))
            return servers[-1].endorse(SERVERS[Role.ALICE])
        if command == b"P":
            return str(servers[-1].receive(argument)).encode()
        if command == b"S":
            servers[-1].settle(msgspec.msgpack.decode(argument, type=tuple[int, ...]))
            return b""
        return servers[-1].reveal(noise)

    return serve


MOMENTS = ("agreed", "holding", "settled", "revealed")


class TestShared:
    def through(self, alice: Process, upto: str) -> tuple[Terms, SharedServer, list[Parts], bytes]:
        """A round up to a moment in alice's life."""
        pair = KeyPair(Prg.fresh())
        terms = terms_of({Role.ALICE: alice.ask(b"K"), Role.BOB: pair.public})
        bob = SharedServer(Role.BOB, terms, pair)
        assert alice.ask(b"T", msgspec.msgpack.encode(terms))
        parts = [upload(terms, number, IDENTITIES[number], vector(number), Prg.fresh()) for number in range(N)]
        revealed = b""
        for number in range(N):
            if upto != "agreed":
                alice.ask(b"P", parts[number].alice)
            bob.receive(parts[number].bob)
        if upto in ("settled", "revealed"):
            alice.ask(b"S", msgspec.msgpack.encode(tuple(range(N))))
            bob.settle(range(N))
        if upto == "revealed":
            revealed = alice.ask(b"R")
        return terms, bob, parts, revealed

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_a_killed_servers_round_cannot_be_summed_again(self, moment: str) -> None:
        with process(serving_alice) as alice:
            terms, bob, parts, revealed = self.through(alice, moment)
            alice.kill()
        with process(serving_alice) as again:
            # All that others have kept of the round is there: the terms, every part, even her own share of the sum.
            with pytest.raises(PeerError, match="another key for alice than the one it has"):
                again.ask(b"T", msgspec.msgpack.encode(terms))
            following, second, _, share = self.through(again, "revealed")
            for old in parts:
                with pytest.raises(PeerError, match="not a client's part for alice in this round"):
                    again.ask(b"P", old.alice)
        assert following.alice != terms.alice
        total = total_of(following, share, second.reveal())
        difference = RING.signed(RING.reduce_(total - plain(tuple(range(N)))))
        assert difference.min() >= 0
        assert 0 < difference.max() < 1000
        if revealed:
            # The round had ended for her: bob ends it too, and the two sums have noise of their own.
            earlier = total_of(terms, revealed, bob.reveal())
            assert np.count_nonzero(earlier == total) < LENGTH // 2
            with pytest.raises(PeerError, match="not alice's share of this round's sum"):
                total_of(following, revealed, share)

    @pytest.mark.parametrize("arrived", [(), (Role.ALICE,), (Role.BOB,), (Role.ALICE, Role.BOB)])
    def test_a_client_that_is_killed_while_it_sends(self, arrived: tuple[Role, ...]) -> None:
        pairs = {role: KeyPair(Prg.fresh()) for role in Role}
        terms = terms_of({role: pair.public for role, pair in pairs.items()})
        servers = {role: SharedServer(role, terms, pairs[role]) for role in Role}

        def serving_uploader() -> Serve:
            parts: list[Parts] = []

            def serve(command: bytes, argument: bytes) -> bytes:
                if not parts:
                    parts.append(upload(terms, VICTIM, IDENTITIES[VICTIM], vector(VICTIM), Prg.fresh()))
                both = parts[0]
                return both.alice if command == b"A" else both.bob

            return serve

        def send(client: Process, role: Role) -> bytes:
            return client.ask(b"A" if role is Role.ALICE else b"B")

        with process(serving_uploader) as victim:
            before = {role: send(victim, role) for role in arrived}
            for role, frame in before.items():
                servers[role].receive(frame)
            victim.kill()
        with process(serving_uploader) as again:
            for role in Role:
                frame = send(again, role)
                assert frame != before.get(role)
                if role in arrived:
                    with pytest.raises(PeerError, match="has sent its part before"):
                        servers[role].receive(frame)
                else:
                    servers[role].receive(frame)
        for number in range(N):
            if number != VICTIM:
                parts = upload(terms, number, IDENTITIES[number], vector(number), Prg.fresh())
                servers[Role.ALICE].receive(parts.alice)
                servers[Role.BOB].receive(parts.bob)
        common = servers[Role.ALICE].common(servers[Role.BOB].claims)
        # Parts of two lives do not belong together: it is lost, or all of one life is there.
        assert (VICTIM in common) == (len(arrived) != 1)
        for server in servers.values():
            server.settle(common)
        total = total_of(terms, servers[Role.ALICE].reveal(), servers[Role.BOB].reveal())
        assert np.array_equal(total, plain(common))

    def test_a_server_cannot_be_copied(self) -> None:
        pairs = {role: KeyPair(Prg.fresh()) for role in Role}
        server = SharedServer(
            Role.ALICE, terms_of({role: pair.public for role, pair in pairs.items()}), pairs[Role.ALICE]
        )
        for duplicate in (copy.copy, copy.deepcopy):
            with pytest.raises(InputError, match="cannot be copied"):
                duplicate(server)
