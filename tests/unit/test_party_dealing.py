"""The provider, bob and alice deal and store tickets over real links; what they get predicts."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from tacit.errors import CodecError, InputError, PeerError, StorageFull
from tacit.identity import Identity, key_text
from tacit.mpc.lockstep import Meter
from tacit.mpc.shares import reconstruct, share
from tacit.party import dealing_messages as messages
from tacit.party.dealing import Dealer, DealtModel, ahead
from tacit.party.dealing_messages import Coming, Dealt, Seeds, Want, decode, encode
from tacit.party.driver import drive
from tacit.party.loaded import LoadedModel
from tacit.party.pool import ROW_BYTES, PoolStore
from tacit.party.push import Push, prepare
from tacit.party.refilling import Refilling, fetch, take_seeds, ticket_bytes
from tacit.party.tickets import DealtLedger, Ticket
from tacit.party.transport import Link, accept, connect, listen
from tacit.party.vault import Vault
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.ring.fixed_point import encode as encode_values
from tacit.ring.prg import Prg
from tacit.wire import Kind

KEY = bytes(range(32))
TOKEN = bytes(16)
OWNER = key_text(Identity(bytes(32)).public)
PATIENCE_S = 20.0


def linked(one: str, other: str) -> tuple[Link, Link]:
    """The two ends of a connection; the first is ``one``'s."""
    with listen() as listener:
        port = listener.getsockname()[1]
        ends = running(
            lambda: accept(listener, one, {other}, TOKEN, PATIENCE_S),
            lambda: connect(port, other, one, TOKEN, PATIENCE_S),
        )()
    return ends[0], ends[1]


def running(*work: Callable[[], Any]) -> Callable[[], list[Any]]:
    """Start pieces of work; a function that waits for what each of them returned, and raises what one raised."""
    results: list[Any] = [None] * len(work)
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            results[number] = work[number]()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()

    def wait() -> list[Any]:
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "deadlock"
        if failures:
            raise failures[0]
        return results

    return wait


@pytest.fixture(scope="module")
def pushed() -> Push:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    return prepare(model, [torch.zeros(1, 1, 6, 6)], name="m", owner=OWNER, batch_sizes=[1, 4])


class Trio:
    """A provider, and alice's and bob's pools, connected."""

    def __init__(self, folder: Path, pushed: Push) -> None:
        self.vault = Vault(folder / "provider", KEY, "provider")
        self.vault.save(pushed.provider)
        self.dealer = Dealer(self.vault, DealtLedger(folder / "provider"))
        self.alice = PoolStore(folder / "alice", KEY, 1 << 20)
        self.bob = PoolStore(folder / "bob", KEY, 1 << 20)
        self.models = LoadedModel(pushed.alice), LoadedModel(pushed.bob)
        self.waits: list[Callable[[], list[Any]]] = []
        self.links: list[Link] = []

    def connect_alice(self) -> None:
        provider, alice = linked("provider", "alice")
        self.links.append(alice)
        self.dealer.attach_alice(provider)
        self.waits.append(running(lambda: quietly(lambda: take_seeds(alice, self.alice))))

    def connect_bob(self) -> Link:
        provider, bob = linked("provider", "bob")
        self.links += [provider, bob]
        self.waits.append(running(lambda: quietly(lambda: self.dealer.serve_bob(provider))))
        return bob

    def close(self) -> None:
        self.dealer.stop()
        for link in self.links:
            link.close()
        self.dealer.close()
        for wait in self.waits:
            wait()
        self.alice.close()
        self.bob.close()


def quietly(work: Callable[[], None]) -> None:
    """A link that the test closed ends the work at its other end."""
    with contextlib.suppress(PeerError, ValueError):
        work()


@pytest.fixture
def trio(tmp_path: Path, pushed: Push) -> Iterator[Trio]:
    made = Trio(tmp_path, pushed)
    yield made
    made.close()


def predict(trio: Trio, batch: int, inputs: torch.Tensor) -> torch.Tensor:
    """A run over a link with the next ticket of both pools."""
    (ticket,) = trio.alice.lease(trio.models[0].part.digest, batch)
    trio.bob.claim([ticket])
    pools = [
        model.expand(batch, *store.read(ticket))
        for model, store in zip(trio.models, (trio.alice, trio.bob), strict=True)
    ]
    shares = share(encode_values(inputs), FRACTION_BITS, Prg.fresh())
    links = linked("alice", "bob")
    results = running(
        *(lambda i=i: drive(trio.models[i].run(batch, [shares[i]]), pools[i], links[i], Meter()) for i in range(2))
    )()
    for link in links:
        link.close()
    assert not any(map(len, pools)), "a ticket is exactly what a run takes"
    return reconstruct(results[0][0], results[1][0])


def test_tickets_that_were_dealt_over_links_predict(trio: Trio, pushed: Push) -> None:
    trio.connect_alice()
    bob = trio.connect_bob()
    dealt = fetch(bob, trio.bob, trio.models[1], Want(pushed.digest, 4, 3))
    assert dealt == Dealt([Ticket(pushed.digest, 4, serial) for serial in range(3)], [])
    dealt = fetch(bob, trio.bob, trio.models[1], Want(pushed.digest, 1, 1))
    assert trio.alice.levels() == trio.bob.levels() == {(pushed.digest, 4): 3, (pushed.digest, 1): 1}
    assert 0 <= 3 * ticket_bytes(trio.models[1], 4) + ticket_bytes(trio.models[1], 1) - trio.bob.nbytes < 4 * 10
    assert trio.alice.nbytes == 4 * ROW_BYTES
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    for batch in (4, 4, 1):
        inputs = Prg(bytes(16)).words((batch, 1, 6, 6)).double() * 2.0**-62
        assert (predict(trio, batch, inputs) - model(inputs.float())).abs().max() < 1e-3


def test_no_two_tickets_share_anything(pushed: Push) -> None:
    model = DealtModel(pushed.provider)
    seen = set()
    for _ in range(4):
        draw = model.draw(1)
        blocks = [draw.alice, draw.bob, *(t.numpy().tobytes() for ts in draw.corrections for t in ts if t.numel() > 8)]
        assert not seen.intersection(blocks)
        seen.update(blocks)
        assert repr(draw) == "Draw(hidden)"
    assert len(seen) > 20


def test_the_provider_keeps_nothing_of_what_it_dealt(trio: Trio, pushed: Push, tmp_path: Path) -> None:
    trio.connect_alice()
    bob = trio.connect_bob()
    dealt = fetch(bob, trio.bob, trio.models[1], Want(pushed.digest, 1, 3)).complete
    trio.bob.claim(dealt)
    secrets = [trio.alice.read(ticket)[0] for ticket in trio.alice.lease(pushed.digest, 1, 3)]
    for ticket in dealt:
        seed, corrections = trio.bob.read(ticket)
        secrets += [
            seed,
            *(value.numpy().tobytes()[:64] for value in corrections if value.numel() * value.itemsize >= 64),
        ]
    assert len(secrets) > 9
    on_disk = b"".join(path.read_bytes() for path in (tmp_path / "provider").rglob("*") if path.is_file())
    assert pushed.digest.encode() in on_disk
    assert not any(secret in on_disk for secret in secrets)
    trio.dealer.stop()


def test_what_cannot_be_dealt_is_answered_with_the_reason(trio: Trio, pushed: Push) -> None:
    bob = trio.connect_bob()

    def reason(model: str, batch: int) -> str:
        dealt = fetch(bob, trio.bob, trio.models[1], Want(model, batch, 1))
        assert (len(dealt.complete), dealt.lost) == (0 if dealt.reason else 1, [])
        return dealt.reason

    assert "alice is not connected" in reason(pushed.digest, 4)
    trio.connect_alice()
    assert "has it been pushed" in reason("0" * 64, 4)
    assert "not of 3" in reason(pushed.digest, 3)
    assert reason(pushed.digest, 4) == ""
    trio.dealer.delete(pushed.digest)
    assert "has it been pushed" in reason(pushed.digest, 4)
    trio.dealer.push(pushed.provider)
    assert reason(pushed.digest, 4) == ""
    assert trio.bob.serials(pushed.digest, 4) == [0, 1]


def test_a_full_pool_of_bob_s_loses_what_does_not_fit_and_stays_in_step(trio: Trio, pushed: Push) -> None:
    trio.connect_alice()
    bob = trio.connect_bob()
    trio.bob.limit_bytes = 2 * ticket_bytes(trio.models[1], 4) + 10
    dealt = fetch(bob, trio.bob, trio.models[1], Want(pushed.digest, 4, 9))
    assert [ticket.serial for ticket in dealt.complete] == [0, 1]
    assert dealt.reason.startswith("bob: ")
    assert "do not fit the pool" in dealt.reason
    assert trio.alice.serials(pushed.digest, 4) == trio.bob.serials(pushed.digest, 4) == [0, 1]
    assert fetch(bob, trio.bob, trio.models[1], Want(pushed.digest, 1, 1)).complete == []
    trio.bob.limit_bytes *= 2
    later = fetch(bob, trio.bob, trio.models[1], Want(pushed.digest, 4, 1))
    assert later.complete[0].serial > 2, "names that were taken are not used again"


def test_what_alice_cannot_store_bob_throws_away(trio: Trio, pushed: Push) -> None:
    trio.connect_alice()
    bob = trio.connect_bob()
    trio.alice.limit_bytes = 2 * ROW_BYTES
    dealt = fetch(bob, trio.bob, trio.models[1], Want(pushed.digest, 1, 3))
    assert (dealt.complete, len(dealt.lost)) == ([], 3)
    assert dealt.reason.startswith("alice: ")
    assert trio.alice.levels() == trio.bob.levels() == {}
    assert trio.bob.nbytes == 0
    gone, alice = linked("provider", "alice")
    alice.close()
    trio.dealer.attach_alice(gone)
    trio.waits[0]()
    dealt = fetch(bob, trio.bob, trio.models[1], Want(pushed.digest, 1, 1))
    assert (dealt.complete, len(dealt.lost)) == ([], 1)
    assert trio.bob.levels() == {}
    trio.alice.limit_bytes = 1 << 20
    trio.connect_alice()
    assert len(fetch(bob, trio.bob, trio.models[1], Want(pushed.digest, 1, 3)).complete) == 3


def test_a_record_that_was_put_back_deals_above_what_the_parties_have_seen(trio: Trio, pushed: Push) -> None:
    trio.connect_alice()
    bob = trio.connect_bob()
    assert fetch(bob, trio.bob, trio.models[1], Want(pushed.digest, 1, 1, above=40)).complete[0].serial == 41
    assert fetch(bob, trio.bob, trio.models[1], Want(pushed.digest, 1, 1)).complete[0].serial == 42


def test_bob_keeps_his_pool_filled_and_makes_room(trio: Trio, pushed: Push) -> None:
    trio.connect_alice()
    trimmed: list[Ticket] = []

    def trim(tickets: list[Ticket]) -> list[Ticket]:
        trimmed.extend(tickets)
        return trio.alice.discard_ready(tickets)

    refilling = Refilling(trio.connect_bob, trio.bob, trim)
    refilling.want(trio.models[1], {4: 6})
    size = ticket_bytes(trio.models[1], 4), ticket_bytes(trio.models[1], 1)
    wait = running(refilling.run)

    def level(line: tuple[str, int], count: int) -> None:
        for _ in range(2000):
            if trio.bob.levels().get(line) == trio.alice.levels().get(line) == count:
                return
            threading.Event().wait(0.01)
        pytest.fail(f"{trio.bob.levels()}, {trio.alice.levels()}: {refilling.trouble}")

    level((pushed.digest, 4), 6)
    tickets = trio.alice.lease(pushed.digest, 4, 2)
    trio.bob.claim(tickets)
    refilling.wake()
    level((pushed.digest, 4), 6)
    assert refilling.per_minute(pushed.digest, 4) > 0
    assert refilling.per_minute(pushed.digest, 1) == 0
    trio.bob.discard(tickets)
    trio.bob.limit_bytes = trio.bob.nbytes + size[1] // 2
    refilling.want(trio.models[1], {1: 4})
    level((pushed.digest, 1), 4)
    assert {ticket.batch for ticket in trimmed} == {4}
    assert len(trimmed) == len(set(trimmed))
    refilling.forget(pushed.digest)
    refilling.stop()
    wait()
    assert refilling.trouble == ""


def test_bob_keeps_what_alice_has_taken_already_when_he_makes_room(trio: Trio, pushed: Push) -> None:
    """She has told him which tickets she took, and he has not heard it yet."""
    trio.connect_alice()
    size = ticket_bytes(trio.models[1], 4)
    trio.bob.limit_bytes = 3 * size
    fetch(trio.connect_bob(), trio.bob, trio.models[1], Want(pushed.digest, 4, 3))
    taken = trio.alice.lease(pushed.digest, 4, 2)
    asked: list[list[Ticket]] = []

    def trim(tickets: list[Ticket]) -> list[Ticket]:
        asked.append(tickets)
        return trio.alice.discard_ready(tickets)

    refilling = Refilling(trio.connect_bob, trio.bob, trim)
    refilling.want(trio.models[1], {1: 9})
    wait = running(refilling.run)
    for _ in range(2000):
        if trio.alice.levels().get((pushed.digest, 1)):
            break
        threading.Event().wait(0.01)
    refilling.stop()
    wait()
    assert {*taken} & {ticket for tickets in asked for ticket in tickets}, "they were not among those to throw away"
    trio.bob.claim(taken)
    for ticket in taken:
        for store, model in zip((trio.alice, trio.bob), trio.models, strict=True):
            model.expand(4, *store.read(ticket))


def test_bob_goes_on_when_the_provider_is_away_for_a_while(trio: Trio, pushed: Push) -> None:
    trio.connect_alice()
    reached = threading.Event()
    attempts = []

    def dial() -> Link:
        attempts.append(1)
        if len(attempts) < 3:
            raise PeerError("the provider cannot be reached")
        if len(attempts) == 3:  # a provider that dies in the middle of a ticket
            provider, bob = linked("provider", "bob")

            def half() -> None:
                want = decode(provider.receive(Kind.CALL).body)
                assert isinstance(want, Want)
                provider.send(Kind.SEED, body=encode(Coming(Ticket(want.model, want.batch, 7), bytes(16))))
                provider.close()

            trio.links.append(bob)
            trio.waits.append(running(half))
            return bob
        reached.set()
        return trio.connect_bob()

    refilling = Refilling(dial, trio.bob, lambda tickets: [])
    refilling.want(trio.models[1], {1: 2})
    wait = running(refilling.run)
    assert reached.wait(20)
    for _ in range(1000):
        if trio.bob.levels() == {(pushed.digest, 1): 2}:
            break
        threading.Event().wait(0.01)
    refilling.stop()
    wait()
    assert trio.bob.serials(pushed.digest, 1) == [0, 1]


def test_what_bob_s_full_disk_does_not_let_go_of_goes_before_he_asks_for_more(
    trio: Trio, pushed: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider leaves in the middle of a portion, and bob's disk is full: alice has nothing of it."""
    trio.connect_alice()
    line, failed, room = (pushed.digest, 1), threading.Event(), threading.Event()
    put, discard = trio.bob.put, trio.bob.discard

    def put_and_lose_the_provider(*ticket: Any) -> None:
        put(*ticket)
        if not failed.is_set():
            trio.links[-1].close()

    def discard_where_there_is_room(tickets: Iterable[Ticket]) -> None:
        with trio.bob._guard, monkeypatch.context() as patched:
            if not room.is_set():
                patched.setattr(trio.bob._ledger, "transaction", full)
                failed.set()
            discard(tickets)

    monkeypatch.setattr(trio.bob, "put", put_and_lose_the_provider)
    monkeypatch.setattr(trio.bob, "discard", discard_where_there_is_room)
    refilling = Refilling(trio.connect_bob, trio.bob, lambda tickets: [])
    refilling.want(trio.models[1], {1: 3})
    wait = running(refilling.run)
    assert failed.wait(20)
    threading.Event().wait(0.5)
    assert trio.bob.serials(*line) == [0]
    assert trio.alice.serials(*line) == []
    assert "full" in refilling.trouble
    room.set()
    for _ in range(2000):
        if trio.alice.levels().get(line) == 3:
            break
        threading.Event().wait(0.01)
    refilling.stop()
    wait()
    assert len(trio.bob.serials(*line)) == 3
    assert trio.bob.serials(*line) == trio.alice.serials(*line)
    assert trio.bob.nbytes <= 3 * ticket_bytes(trio.models[1], 1)


def full() -> NoReturn:
    raise StorageFull("the disk is full")


@pytest.mark.parametrize("data", [b"", b"\x00", b"x" * 40])
def test_messages_that_do_not_parse_are_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(data)


def test_messages_out_of_place_and_out_of_range_are_refused(trio: Trio, pushed: Push) -> None:
    ticket = Ticket(pushed.digest, 1, 0)
    for message in (
        Want(pushed.digest, 1, 0),
        Want(pushed.digest, 1, 10**6),
        Want("x", 1, 1),
        Seeds([(ticket, b"short")]),
        Seeds([]),
        Coming(Ticket("../x", 1, 0), bytes(16)),
    ):
        with pytest.raises(CodecError):
            decode(encode(message))
    provider, bob = linked("provider", "bob")
    wait = running(lambda: trio.dealer.serve_bob(provider))
    bob.send(Kind.CALL, body=encode(messages.Stored()))
    with pytest.raises(CodecError, match="another message than what he wants"):
        wait()
    bob.close()
    for sent, why in (
        ((Kind.SEED, Coming(Ticket("0" * 64, 1, 0), bytes(16))), "not asked for"),
        ((Kind.REPLY, messages.Stored()), "something else than a ticket"),
        ((Kind.SEED, Dealt([], [])), "something else than a ticket"),
    ):
        provider, bob = linked("provider", "bob")
        provider.send(sent[0], body=encode(sent[1]))
        with pytest.raises(CodecError, match=why):
            fetch(bob, trio.bob, trio.models[1], Want(pushed.digest, 1, 1))
        provider.close()
        bob.close()
    provider, alice = linked("provider", "alice")
    provider.send(Kind.SEED, body=encode(Want(pushed.digest, 1, 1)))
    with pytest.raises(CodecError, match="something else than seeds"):
        take_seeds(alice, trio.alice)
    provider.close()
    alice.close()
    assert trio.bob.levels() == trio.alice.levels() == {}


def test_seeds_do_not_show() -> None:
    ticket, seed = Ticket("0" * 64, 1, 0), b"0123456789abcdef"
    for message in (Coming(ticket, seed), Seeds([(ticket, seed)])):
        assert "0123456789abcdef" not in repr(message)


def test_making_ahead_keeps_order_passes_errors_on_and_can_be_left() -> None:
    assert list(ahead(iter(range(100)), 3)) == list(range(100))

    def failing() -> Iterator[int]:
        yield 1
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        list(ahead(failing(), 3))
    made = []

    def noting() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    items = ahead(noting(), 2)
    assert next(items) == 0
    items.close()
    assert len(made) < 10
    assert not any(thread.name == "dealing" for thread in threading.enumerate())
