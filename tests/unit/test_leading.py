"""Alice and bob as they decide what runs, with a test in the place of workers, of each other and of clients."""

import asyncio
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tacit.errors import StorageFull
from tacit.identity import Identity
from tacit.party import messages, worker_calls
from tacit.party.cluster_file import Serving
from tacit.party.crew import Served
from tacit.party.following import Follower
from tacit.party.front import setups
from tacit.party.house import House
from tacit.party.leading import Leader
from tacit.party.local import prepare
from tacit.party.logs import Log
from tacit.party.messages import Answer, Ask, Begin, Broke, Claimed, Drop, Refused, Stock
from tacit.party.refusal import Reason
from tacit.party.session import Session
from tacit.party.session_messages import Purpose
from tacit.party.stocking import TOGETHER
from tacit.party.tasks import Tasks
from tacit.party.tickets import Ticket
from tacit.party.worker_calls import Plan
from tacit.wire import Frame, Kind
from workers import pushed

SIZE = 4
OUTPUT = torch.arange(SIZE * 3).reshape(SIZE, 3)


class AClient:
    """A client's end at a party, in the place of a `Channel`."""

    peer, closed = "clinic", False

    def __init__(self) -> None:
        self.asked: asyncio.Queue[Frame] = asyncio.Queue()
        self.told: list[Any] = []

    async def receive(self, *kinds: Kind, limit: int = 0) -> Frame:
        return await self.asked.get()

    def send(self, kind: Kind, tensors: Sequence[Tensor] = (), body: bytes = b"") -> None:
        self.told.append(messages.decode(messages.client_replies, body, "a party"))


class Party:
    """What alice's and bob's sides have in common here.

    Args:
        name: of the party.
        folder: for its disk.
        kind: `Leader` or `Follower`.
        settings: of serving.
    """

    def __init__(self, name: str, folder: Path, kind: Any, **settings: Any) -> None:
        cluster = prepare(folder, clients=("clinic",), serving=Serving(batch_sizes=(SIZE,), workers=2, **settings))
        identity = Identity.load(folder / f"{name}.key")
        self.house = House(name, cluster, identity, folder / name, Log(name, io.StringIO()))
        self.said: list[Any] = []
        self.tasks = Tasks()
        self.side = kind(self.house, setups(self.house), self.said.append, self.tasks)
        self.calls: list[list[Any]] = [[], []]
        self.expected: list[int] = []
        for worker in self.side.crew.workers:
            number = worker.number
            worker.call = lambda call, tensors=(), number=number: self.calls[number].append(call)
            worker.expect = lambda seconds, number=number: self.expected.append(number)
        part = pushed(sizes=(SIZE,)).alice
        self.digest = part.digest
        self.side.crew.served[self.digest] = Served(part, {SIZE: Plan(SIZE, 4, 100, 100, 100)})
        self.client, self.session = AClient(), Session(bytes(32), Purpose.CLIENT, "clinic", 1, float("inf"))
        self.tasks.start(self.side.clients.serve(self.client, self.session))

    async def ask(self, number: int) -> tuple[bytes, int]:
        ask = messages.encode(Ask(number, self.digest, 1, 60_000.0))
        await self.client.asked.put(Frame(Kind.CALL, number, ask, (np.zeros((1, 6), np.int64),)))
        await settled()
        return self.session.id, number

    def heard(self, worker: int, answer: Any, *tensors: Tensor) -> None:
        self.side.worker_heard(self.side.crew.workers[worker], answer, tensors)

    def of(self, kind: type) -> list[Any]:
        """What was said to the other party, of one kind."""
        return [one for one in self.said if isinstance(one, kind)]

    async def close(self) -> None:
        await self.tasks.close()
        self.house.pool.close()
        self.house.jobs.close()


async def settled() -> None:
    """Let tasks and threads come to their end."""
    for _ in range(20):
        await asyncio.sleep(0.005)


def ran(batch: int) -> worker_calls.Ran:
    return worker_calls.Ran(batch, [16], 0.001, 0.0, 4, 100)


async def alice_with_two_pairs(folder: Path, **settings: Any) -> Party:
    alice = Party("alice", folder, Leader, **settings)
    leader, pool = alice.side, alice.house.pool
    pool.put_seeds({Ticket(alice.digest, SIZE, serial): bytes(16) for serial in range(200)})
    leader.model_served(alice.digest)
    leader.pairing.connect()
    leader.pairing.refresh(pool.levels())
    for number, worker in enumerate(leader.crew.workers):
        leader.worker_started(worker)
        leader.pairing.bob_said(messages.Up(number))
        linked(alice, number)
    await settled()
    return alice


def linked(alice: Party, number: int) -> None:
    pairing = alice.side.pairing
    token = pairing.pairs[number].token
    assert token
    alice.heard(number, worker_calls.Installed(alice.digest, []))
    pairing.bob_said(messages.Installed(number, alice.digest))
    alice.heard(number, worker_calls.Paired(token))
    pairing.bob_said(messages.Paired(number, token))


async def stocked(alice: Party) -> None:
    """Bob claims what he was told to, and all workers expand it."""
    for stock in alice.of(Stock):
        alice.side.pairing.bob_said(Claimed(stock.worker, stock.token, stock.tickets, stock.tickets))
        await settled()
        for ticket in stock.tickets:
            alice.heard(stock.worker, worker_calls.Stocked(ticket))
            alice.side.pairing.bob_said(messages.Stocked(stock.worker, stock.token, ticket, True))
    alice.said.clear()
    await settled()


def test_what_bob_s_worker_has_left_is_run_at_the_other_pair_though_alice_s_says_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        alice = await alice_with_two_pairs(tmp_path)
        await stocked(alice)
        alice.side.bob_has([await alice.ask(0)])
        await settled()
        [first] = alice.of(Begin)
        alice.side.bob_broke(first.batch)
        await settled()
        [_, second] = alice.of(Begin)
        assert second.requests == first.requests
        assert second.worker != first.worker
        assert second.ticket != first.ticket
        assert alice.expected == [first.worker], "a worker that does not notice hangs"
        # What hers says of the first run after all is of no use; the second run answers.
        alice.heard(first.worker, ran(first.batch), OUTPUT)
        assert not alice.client.told
        alice.heard(second.worker, ran(second.batch), OUTPUT)
        await settled()
        [answer] = alice.client.told
        assert isinstance(answer, Answer)
        assert answer.run == second.batch
        # Nothing begins at a pair that is not linked anew.
        assert alice.side.pairing.pairs[first.worker].token == b""
        await alice.close()

    asyncio.run(scenario())


def test_nothing_begins_at_a_pair_whose_worker_has_broken_off_a_run(tmp_path: Path) -> None:
    """It has thrown its tickets away, as it says a moment later; a request has one more try, which must not be lost."""

    async def scenario() -> None:
        alice = await alice_with_two_pairs(tmp_path)
        await stocked(alice)
        alice.side.bob_has([await alice.ask(0)])
        await settled()
        [first] = alice.of(Begin)
        token = alice.side.pairing.pairs[first.worker].token
        alice.heard(first.worker, worker_calls.Broke(first.batch, "bob was silent"))
        await settled()
        [_, second] = alice.of(Begin)
        assert second.worker != first.worker
        alice.heard(first.worker, worker_calls.Unpaired(token, "bob was silent"))
        alice.heard(second.worker, ran(second.batch), OUTPUT)
        await settled()
        [answer] = alice.client.told
        assert isinstance(answer, Answer)
        await alice.close()

    asyncio.run(scenario())


def test_who_has_alice_s_half_of_a_result_alone_is_told_that_there_will_be_no_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        alice = await alice_with_two_pairs(tmp_path)
        await stocked(alice)
        alice.side.bob_has([await alice.ask(0)])
        await settled()
        [begin] = alice.of(Begin)
        alice.heard(begin.worker, ran(begin.batch), OUTPUT)
        alice.side.bob_broke(begin.batch)
        alice.side.bob_broke(begin.batch)
        answer, refused = alice.client.told
        assert isinstance(answer, Answer)
        assert isinstance(refused, Refused)
        assert refused.refusal.reason is Reason.FAILED
        assert len(alice.of(Begin)) == 1
        await alice.close()

    asyncio.run(scenario())


def test_bob_is_told_of_tickets_that_were_taken_for_a_pair_that_is_no_more(tmp_path: Path) -> None:
    """He may not have come to claim them; what alice has not, he must not go on offering."""

    async def scenario() -> None:
        alice = await alice_with_two_pairs(tmp_path)
        named = {ticket for stock in alice.of(Stock) for ticket in stock.tickets if stock.worker == 0}
        assert named
        alice.side.pairing.bob_said(messages.Down(0))
        await settled()
        assert named <= {ticket for drop in alice.of(Drop) for ticket in drop.tickets}
        # Also of those that were just being taken.
        pair = alice.side.pairing.pairs[1]
        await stocked(alice)
        before = {*alice.house.pool.serials(alice.digest, SIZE)}
        for _ in range(TOGETHER):
            alice.side.pairing.take(pair, alice.digest, SIZE)
        alice.side.pairing.stock(pair)
        await asyncio.sleep(0)
        alice.side.pairing.part(pair, "the test says so")
        await settled()
        taken = before - {*alice.house.pool.serials(alice.digest, SIZE)}
        told = {one.serial for kind in (Stock, Drop) for said in alice.of(kind) for one in said.tickets}
        assert taken
        assert taken <= told
        await alice.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("ends", ["broke", "ended"])
def test_bob_says_that_a_run_has_failed_and_sends_nothing_of_another_one(tmp_path: Path, ends: str) -> None:
    async def scenario() -> None:
        bob = Party("bob", tmp_path, Follower)
        ids = [await bob.ask(0)]
        begin = Begin(1, 5, Ticket(bob.digest, SIZE, 3), ids, [1])
        bob.side.alice_said(begin)
        assert isinstance(bob.calls[1][-1], worker_calls.Run)
        # Another worker's batch of this number was begun by an alice who is no more.
        bob.heard(0, ran(5), OUTPUT)
        bob.heard(0, worker_calls.Broke(5, "it failed"))
        assert not bob.client.told
        assert not bob.of(Broke)
        if ends == "broke":
            bob.heard(1, worker_calls.Broke(5, "it failed"))
        else:
            bob.side.worker_ended(bob.side.crew.workers[1])
        assert bob.of(Broke) == [Broke(5)]
        assert not bob.client.told, "alice decides what becomes of the request"
        bob.side.alice_said(Begin(0, 6, Ticket(bob.digest, SIZE, 4), ids, [1]))
        bob.heard(0, ran(6), OUTPUT)
        [answer] = bob.client.told
        assert isinstance(answer, Answer)
        assert answer.run == 6
        await bob.close()

    asyncio.run(scenario())


def test_bob_s_worker_is_expected_to_notice_that_alice_s_has_left_its_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        bob = Party("bob", tmp_path, Follower)
        bob.side.alice_said(messages.Pair(0, bytes(32)))
        assert bob.expected == []
        bob.side.alice_said(Begin(0, 5, Ticket(bob.digest, SIZE, 3), [await bob.ask(0)], [1]))
        bob.side.alice_said(messages.Pair(1, bytes(32)))
        assert bob.expected == []
        bob.side.alice_said(messages.Pair(0, bytes([1] * 32)))
        assert bob.expected == [0]
        await bob.close()

    asyncio.run(scenario())


def test_a_model_that_comes_or_goes_is_known_to_all_of_alice_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        alice = await alice_with_two_pairs(tmp_path)
        crew, leader = alice.side.crew, alice.side
        ticks: list[int] = []

        async def opened(digest: str) -> Any:
            # The disk takes its time, and meanwhile everything else goes on.
            await asyncio.sleep(0.01)
            leader.set_stock({})
            ticks.append(len(crew.served))
            return pushed(sizes=(SIZE,)).alice if digest == alice.digest else None

        crew._opened = opened
        await alice.ask(0)
        await crew.serve([])
        leader.set_stock({})
        await crew.serve([alice.digest, "0" * 64])
        leader.set_stock({})
        assert ticks == [0, 1]
        assert list(crew.served) == [alice.digest]
        await alice.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("when_empty", ["wait", "fail"])
def test_where_bob_s_disk_is_full_he_is_asked_for_the_same_tickets_again_and_none_is_burned(
    tmp_path: Path, when_empty: str
) -> None:
    async def scenario() -> None:
        alice = await alice_with_two_pairs(tmp_path, when_empty=when_empty)
        leader, pool = alice.side, alice.house.pool

        async def refused() -> list[Ticket]:
            """Bob has no room for anything that he has been asked for since; what that was."""
            asked, alice.said[:] = alice.of(Stock), []
            for stock in asked:
                leader.pairing.bob_said(Claimed(stock.worker, stock.token, stock.tickets, [], True))
            await settled()
            return sorted(ticket for stock in asked for ticket in stock.tickets)

        pair = leader.pairing.pairs[0]
        assert leader.pairing.coming(pair) == {alice.digest: {SIZE}}
        first = await refused()
        assert leader.pairing.coming(pair) == {}, "nobody is to wait for these"
        left = pool.serials(alice.digest, SIZE)
        assert len(first) + len(left) == 200
        for _ in range(5):
            leader.pairing.refresh(pool.levels())
            await settled()
            assert await refused() == first
        assert not alice.of(Drop)
        assert pool.serials(alice.digest, SIZE) == left
        # There is nothing to answer with.
        leader.set_stock({})
        leader.bob_has([await alice.ask(0)])
        await settled()
        told = [one.refusal.reason for one in alice.client.told if isinstance(one, Refused)]
        assert told == ([Reason.EMPTY] if when_empty == "fail" else [])
        # Once he has room everything goes on, with what was asked for first.
        leader.pairing.refresh(pool.levels())
        await stocked(alice)
        leader.set_stock({})
        leader.bob_has([await alice.ask(1)])
        await settled()
        runs = [pair.running for pair in leader.pairing.pairs if pair.running]
        assert {one.ticket for one in runs} <= {*first}
        asked = sorted(request.id[1] for one in runs for request in one.batch.requests)
        assert asked == ([1] if when_empty == "fail" else [0, 1])
        alice.said.clear()
        for _ in range(TOGETHER):
            leader.pairing.take(leader.pairing.pairs[0], alice.digest, SIZE)
        leader.pairing.stock(leader.pairing.pairs[0])
        await settled()
        assert alice.of(Stock), "no more tickets are taken"
        await alice.close()

    asyncio.run(scenario())


def test_bob_says_that_he_has_no_room_and_takes_the_tickets_once_he_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        bob = Party("bob", tmp_path, Follower)
        tickets = [Ticket(bob.digest, SIZE, serial) for serial in range(3)]
        bob.house.pool.put_seeds(dict.fromkeys(tickets[:2], bytes(16)))
        token = bytes(worker_calls.TOKEN_BYTES)
        bob.side.alice_said(messages.Pair(0, token))

        def full(*_: object) -> None:
            raise StorageFull("the disk is full")

        with monkeypatch.context() as patched:
            patched.setattr(bob.house.pool._ledger, "transaction", full)
            bob.side.alice_said(Stock(0, token, tickets))
            await settled()
        bob.side.alice_said(Stock(0, token, tickets))
        await settled()
        assert bob.of(Claimed) == [
            Claimed(0, token, tickets, [], True),
            Claimed(0, token, tickets, tickets[:2], False),
        ]
        assert [call.voucher.ticket for call in bob.calls[0] if isinstance(call, worker_calls.Stock)] == tickets[:2]
        await bob.close()

    asyncio.run(scenario())
