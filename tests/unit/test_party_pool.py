"""The pool hands out every ticket once, keeps its limit, and says what is wrong with what lies on its disk."""

import os
import resource
import signal
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tacit import atomic, database
from tacit.errors import CorrelationError, DataError, InputError, PeerError, StorageFull
from tacit.party import dealing, pool, refill, sealing, tickets, vault, vouchers
from tacit.party.pool import ROW_BYTES, Holding, PoolStore
from tacit.party.tickets import DealtLedger, Ticket
from tacit.party.vouchers import redeem
from tacit.ring.prg import Prg
from tacit.wire import items_of

KEY = bytes(range(32))
MODEL, OTHER = "a1" * 32, "b2" * 32
LIMIT = 1 << 20


def ticket(serial: int, model: str = MODEL, batch: int = 8) -> Ticket:
    return Ticket(model, batch, serial)


def seed(serial: int) -> bytes:
    return Prg(serial.to_bytes(16, "big")).bytes(16)


def corrections(serial: int) -> list[Tensor]:
    prg = Prg(serial.to_bytes(16, "big")).derive("corrections")
    return [prg.words((3, 5)), prg.words((40,)).to(torch.uint8), prg.words((0, 2)), prg.words((33,)) > 0]


def filled(folder: Path, serials: Any, limit: int = LIMIT) -> PoolStore:
    store = PoolStore(folder, KEY, limit)
    for serial in serials:
        store.put(ticket(serial), seed(serial), corrections(serial))
    return store


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "tickets").iterdir()}


def holds(store: PoolStore, one: Ticket) -> bool:
    got, tensors = store.read(one)
    expected = corrections(one.serial)
    same = len(tensors) == len(expected) and all(map(torch.equal, tensors, expected))
    return got == seed(one.serial) and same and [t.dtype for t in tensors] == [t.dtype for t in expected]


def test_what_was_put_is_there_once_after_opening_anew(tmp_path: Path) -> None:
    filled(tmp_path, range(5)).close()
    store = PoolStore(tmp_path, KEY, LIMIT)
    assert store.lost == 0
    assert store.levels() == {(MODEL, 8): 5}
    assert store.lease(MODEL, 8, 2) == [ticket(0), ticket(1)], "the lowest serials come first"
    assert holds(store, ticket(1))
    assert holds(store, ticket(0))
    with pytest.raises(CorrelationError, match="given away before"):
        store.read(ticket(0))
    store.claim([ticket(4), ticket(2)])
    assert store.serials(MODEL, 8) == [3]
    assert len(files(tmp_path)) == 3, "what was read is removed, what was claimed lies there until it is read"
    store.close()
    again = PoolStore(tmp_path, KEY, LIMIT)
    assert again.lease(MODEL, 8, 9) == [ticket(3)], "what was taken is never offered again, read or not"
    assert again.lease(MODEL, 8) == []
    assert holds(again, ticket(3))
    assert files(tmp_path) == set()
    assert again.nbytes == 0
    again.close()


def test_seeds_alone_take_no_file(tmp_path: Path) -> None:
    with_seeds = PoolStore(tmp_path, KEY, LIMIT)
    with_seeds.put_seeds({ticket(serial): seed(serial) for serial in (2, 0, 1)})
    with_seeds.put(ticket(3), seed(3))
    assert files(tmp_path) == set()
    assert with_seeds.nbytes == 4 * ROW_BYTES
    with_seeds.close()
    again = PoolStore(tmp_path, KEY, LIMIT)
    for one in again.lease(MODEL, 8, 4):
        assert again.read(one) == (seed(one.serial), [])
    again.close()


def test_unknown_and_used_tickets_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    store = filled(tmp_path, [3, 4])
    with pytest.raises(CorrelationError, match=r"ticket 3 of a1a1a1a1a1a1…, batch 8 was not taken"):
        store.read(ticket(3))
    store.claim([ticket(3)])
    for wrong in (ticket(3), ticket(2), ticket(5), ticket(4, OTHER), ticket(4, batch=1)):
        with pytest.raises(CorrelationError, match="used before, or never came"):
            store.claim([ticket(4), wrong])
    with pytest.raises(CorrelationError):
        store.claim([ticket(4), ticket(4)])
    assert store.levels() == {(MODEL, 8): 1}
    with pytest.raises(InputError, match="1 or more"):
        store.lease(MODEL, 8, 0)
    store.close()


def test_a_ticket_that_came_before_is_refused_for_ever(tmp_path: Path) -> None:
    store = filled(tmp_path, [3, 7])
    size = store.nbytes
    store.claim([ticket(3)])
    for late in (3, 7, 5):
        with pytest.raises(CorrelationError, match="came before, or a later one did"):
            store.put(ticket(late), seed(late), corrections(late))
        with pytest.raises(CorrelationError, match="came before, or a later one did"):
            store.put_seeds({ticket(8): seed(8), ticket(late): seed(late)})
    assert store.nbytes == size
    assert files(tmp_path) == {f"{MODEL}-8-3", f"{MODEL}-8-7"}
    store.put(ticket(5, batch=1), seed(5))
    store.put(ticket(5, OTHER), seed(5))
    store.close()
    again = PoolStore(tmp_path, KEY, LIMIT)
    with pytest.raises(CorrelationError):
        again.put(ticket(7), seed(7))
    assert again.levels() == {(MODEL, 8): 1, (MODEL, 1): 1, (OTHER, 8): 1}
    again.drop_model(MODEL)
    assert again.levels() == {(OTHER, 8): 1}
    assert files(tmp_path) == set()
    with pytest.raises(CorrelationError):
        again.put(ticket(7), seed(7))
    again.close()


@pytest.mark.parametrize(
    "wrong",
    [("../../etc/passwd", 8, 0), (MODEL.upper(), 8, 0), (MODEL + "\n", 8, 0), (MODEL, 0, 0), (MODEL, 8, 1 << 62)],
)
def test_what_names_no_ticket_is_refused(tmp_path: Path, wrong: tuple[str, int, int]) -> None:
    store = PoolStore(tmp_path, KEY, LIMIT)
    with pytest.raises(InputError, match="names no ticket"):
        store.put(Ticket(*wrong), bytes(16), corrections(0))
    with pytest.raises(InputError, match="names no ticket"):
        DealtLedger(tmp_path).next(*wrong[:2], above=wrong[2] - 1)
    with pytest.raises(InputError, match="names no ticket"):
        store.put(ticket(-1), bytes(16))
    with pytest.raises(InputError, match="16 bytes, not 15"):
        store.put(ticket(1), bytes(15))
    store.close()


def test_over_the_limit_nothing_is_kept(tmp_path: Path) -> None:
    store = filled(tmp_path, [0])
    one = store.nbytes
    store.limit_bytes = 3 * one - 1
    store.put(ticket(1), seed(1), corrections(1))
    assert store.room == one - 1
    with pytest.raises(StorageFull, match=r"do not fit the pool: [\d,]+ of [\d,]+ are taken"):
        store.put(ticket(2), seed(2), corrections(2))
    with pytest.raises(StorageFull):
        store.put_seeds({ticket(serial): seed(serial) for serial in range(2, 2 + one // ROW_BYTES + 1)})
    assert store.nbytes == 2 * one
    assert len(files(tmp_path)) == 2
    assert holds(store, store.lease(MODEL, 8)[0])
    store.put(ticket(2), seed(2), corrections(2))
    store.close()


def test_corrections_that_fail_or_differ_leave_nothing_behind(tmp_path: Path) -> None:
    store = filled(tmp_path, [0])
    tensors = corrections(1)

    def breaking() -> Any:
        yield tensors[0]
        raise PeerError("the provider is gone")

    before = store.nbytes
    with pytest.raises(PeerError, match="provider is gone"):
        store.put(ticket(1), seed(1), breaking(), items_of(tensors))
    for wrong in (tensors[:-1], [*tensors, tensors[0]], [tensors[0].T, *tensors[1:]]):
        with pytest.raises(InputError, match="corrections"):
            store.put(ticket(1), seed(1), iter(wrong), items_of(tensors))
    assert store.nbytes == before
    assert files(tmp_path) == {f"{MODEL}-8-0"}
    store.put(ticket(1), seed(1), iter(tensors), items_of(tensors))
    store.claim([ticket(1)])
    assert holds(store, ticket(1))
    store.close()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "longer", "missing", "swapped", "head"])
def test_a_damaged_file_loses_its_ticket_and_no_other(tmp_path: Path, damage: str) -> None:
    store = filled(tmp_path, range(3))
    path = tmp_path / "tickets" / f"{MODEL}-8-0"
    content = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(content[:-1])
        case "flipped":
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
        case "longer":
            path.write_bytes(content + b"\0")
        case "missing":
            path.unlink()
        case "swapped":
            path.write_bytes((tmp_path / "tickets" / f"{MODEL}-8-1").read_bytes())
        case "head":
            path.write_bytes(b"x" + content[1:])
    assert store.lease(MODEL, 8) == [ticket(0)]
    with pytest.raises(DataError, match=r"ticket 0 of .* is lost and will not be used"):
        store.read(ticket(0))
    assert not path.exists()
    assert store.lease(MODEL, 8, 9) == [ticket(1), ticket(2)]
    assert holds(store, ticket(2))
    store.close()


def test_opening_drops_files_without_a_ticket_and_tickets_without_their_file(tmp_path: Path) -> None:
    filled(tmp_path, range(4)).close()
    folder = tmp_path / "tickets"
    (folder / f"{MODEL}-8-0").unlink()
    (folder / f"{MODEL}-8-1").write_bytes(b"short")
    (folder / f"{MODEL}-8-9").write_bytes(b"orphan")
    (folder / f"{MODEL}-8-4.partial").write_bytes(b"half")
    store = PoolStore(tmp_path, KEY, LIMIT)
    assert store.lost == 2
    assert files(tmp_path) == {f"{MODEL}-8-2", f"{MODEL}-8-3"}
    assert store.serials(MODEL, 8) == [2, 3]
    with pytest.raises(CorrelationError):
        store.put(ticket(1), seed(1))
    store.close()


def test_another_key_is_told_at_once_and_seeds_lie_sealed(tmp_path: Path) -> None:
    filled(tmp_path, range(3)).close()
    with pytest.raises(DataError, match="sealed under another key"):
        PoolStore(tmp_path, bytes(32), LIMIT)
    with pytest.raises(InputError, match="32 bytes"):
        PoolStore(tmp_path, bytes(16), LIMIT)
    on_disk = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"ready" in on_disk
    assert not any(seed(serial) in on_disk for serial in range(3))
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0 or path.suffix.startswith(".sqlite"), path
    store = PoolStore(tmp_path, KEY, LIMIT)
    store.close()


def test_seals_are_bound_to_their_ticket(tmp_path: Path) -> None:
    store = PoolStore(tmp_path, KEY, LIMIT)
    store.put_seeds({ticket(serial): seed(serial) for serial in range(2)})
    store.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
        [(first,), (second,)] = ledger.execute("SELECT sealed FROM ready ORDER BY serial").fetchall()
        ledger.execute("UPDATE ready SET sealed = ? WHERE serial = 0", (second,))
        ledger.execute("UPDATE ready SET sealed = ? WHERE serial = 1", (first[:-1] + bytes([first[-1] ^ 1]),))
    ledger.close()
    again = PoolStore(tmp_path, KEY, LIMIT)
    for one in again.lease(MODEL, 8, 2):
        with pytest.raises(DataError, match="lost"):
            again.read(one)
    again.close()


@pytest.mark.parametrize("damage", [b"", b"not a database, but long enough to be taken for one" * 100, None])
def test_a_damaged_ledger_is_an_error_that_says_what_to_do(tmp_path: Path, damage: bytes | None) -> None:
    filled(tmp_path, range(3)).close()
    path = tmp_path / "ledger.sqlite"
    if damage is None:
        content = bytearray(path.read_bytes())
        for start in range(4096, len(content), 512):
            content[start : start + 64] = bytes(64)
        damage = bytes(content)
    path.write_bytes(damage)
    if not damage:
        store = PoolStore(tmp_path, KEY, LIMIT)
        assert store.levels() == {}, "a ledger that is lost offers nothing"
        assert files(tmp_path) == set()
        store.close()
        return
    with pytest.raises(DataError, match=r"cannot be used: .* remove the folder"):
        PoolStore(tmp_path, KEY, LIMIT)
    # The lock went with it.
    path.unlink()
    PoolStore(tmp_path, KEY, LIMIT).close()


def test_a_row_that_names_no_ticket_is_dropped_and_leads_nowhere(tmp_path: Path) -> None:
    filled(tmp_path / "pool", range(2)).close()
    outside = tmp_path / "precious-8-0"
    outside.write_bytes(b"x")
    with sqlite3.connect(tmp_path / "pool" / "ledger.sqlite") as ledger:
        ledger.execute("UPDATE ready SET model = '../../precious' WHERE serial = 0")
        ledger.execute("UPDATE ready SET serial = -5 WHERE serial = 1")
    ledger.close()
    store = PoolStore(tmp_path / "pool", KEY, LIMIT)
    assert (store.lost, store.levels(), store.nbytes) == (2, {}, 0)
    assert outside.exists()
    assert files(tmp_path / "pool") == set()
    store.close()


def test_nothing_that_lasts_depends_on_a_clock() -> None:
    for module in (database, atomic, pool, sealing, tickets, vault, vouchers, dealing, refill):
        assert not {"time", "datetime", "monotonic"} & vars(module).keys(), module.__name__


def test_a_ledger_of_something_else_or_another_version_is_refused(tmp_path: Path) -> None:
    DealtLedger(tmp_path).close()
    (tmp_path / "dealt.sqlite").rename(tmp_path / "ledger.sqlite")
    with pytest.raises(DataError, match="database of something else"):
        PoolStore(tmp_path, KEY, LIMIT)
    (tmp_path / "ledger.sqlite").unlink()
    PoolStore(tmp_path, KEY, LIMIT).close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
        ledger.execute("PRAGMA user_version = 9")
    ledger.close()
    with pytest.raises(DataError, match="format 9"):
        PoolStore(tmp_path, KEY, LIMIT)


def test_two_processes_cannot_have_one_folder_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    filled(tmp_path, range(2)).close()
    ready, opened = os.pipe()
    child = os.fork()
    if not child:
        holder = PoolStore(tmp_path, KEY, LIMIT)
        os.write(opened, str(holder.lease(MODEL, 8)[0].serial).encode())
        signal.pause()
    assert os.read(ready, 1) == b"0"
    with pytest.raises(DataError, match="in use by another process"):
        PoolStore(tmp_path, KEY, LIMIT)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    store = PoolStore(tmp_path, KEY, LIMIT)
    assert store.levels() == {(MODEL, 8): 1}
    with pytest.raises(DataError, match="in use by another process"):
        PoolStore(tmp_path, KEY, LIMIT)
    assert store.lease(MODEL, 8, 2) == [ticket(1)]
    store.close()
    os.close(ready)
    os.close(opened)


def test_a_forked_process_must_not_use_it(tmp_path: Path) -> None:
    store = filled(tmp_path, range(2))
    child = os.fork()
    if not child:
        try:
            store.lease(MODEL, 8)
        except DataError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert store.levels() == {(MODEL, 8): 2}
    store.close()


def test_threads_never_get_the_same_ticket(tmp_path: Path) -> None:
    store = filled(tmp_path, range(40), 1 << 24)
    got: list[list[Ticket]] = [[] for _ in range(4)]
    failed = []

    def take(mine: list[Ticket]) -> None:
        try:
            while tickets := store.lease(MODEL, 8, 3):
                assert all(holds(store, one) for one in tickets)
                mine += tickets
        except BaseException as error:
            failed.append(error)

    def put() -> None:
        for serial in range(40, 60):
            store.put(ticket(serial), seed(serial), corrections(serial))

    threads = [threading.Thread(target=put), *(threading.Thread(target=take, args=(mine,)) for mine in got)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    take(got[0])
    assert not failed
    taken = [one.serial for mine in got for one in mine]
    assert sorted(taken) == list(range(60))
    store.close()


def test_a_worker_in_another_process_uses_a_voucher(tmp_path: Path) -> None:
    store = filled(tmp_path, range(3))
    store.claim([ticket(0), ticket(1)])
    voucher = store.voucher(ticket(0))
    assert seed(0).hex() not in repr(voucher)
    assert repr(voucher) == "Voucher(0 of a1a1a1a1a1a1…, batch 8)"
    child = os.fork()
    if not child:
        got, tensors = redeem(voucher)
        os._exit(7 if got == seed(0) and all(map(torch.equal, tensors, corrections(0))) else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with pytest.raises(DataError, match="lost"):
        redeem(voucher)
    abandoned = store.voucher(ticket(1))
    store.discard([ticket(1), ticket(2), ticket(99)])
    assert not Path(abandoned.path).exists()
    assert files(tmp_path) == set()
    assert store.nbytes == 0
    store.close()


def test_parties_reconcile_what_a_crash_or_an_old_copy_left(tmp_path: Path) -> None:
    alice, bob = PoolStore(tmp_path / "alice", KEY, LIMIT), filled(tmp_path / "bob", range(10))
    alice.put_seeds({ticket(serial): seed(serial) for serial in range(8)})
    alice.put_seeds({ticket(1, OTHER): seed(1)})
    alice.lease(MODEL, 8, 3)  # and a crash: bob never hears of them
    bob.claim([ticket(3), ticket(5)])  # as if alice's disk had been put back since
    mine, theirs = alice.holdings(), bob.holdings()
    assert mine == [Holding(MODEL, 8, 7, [3, 4, 5, 6, 7]), Holding(OTHER, 8, 1, [1])]
    assert alice.reconcile(theirs) == 3
    assert bob.reconcile(mine) == 3
    assert alice.serials(MODEL, 8) == [4, 6, 7]
    assert bob.serials(MODEL, 8) == [4, 6, 7, 8, 9], "8 and 9 may be on their way to alice"
    bob.close()
    bob = PoolStore(tmp_path / "bob", KEY, LIMIT)
    assert bob.reconcile(alice.holdings()) == 2
    assert bob.serials(MODEL, 8) == [4, 6, 7], "what was on its way when a process died never arrives"
    assert alice.serials(OTHER, 8) == []
    assert len(files(tmp_path / "bob")) == 3
    alice.close()
    bob.close()


def test_alice_compares_in_the_middle_of_a_session_what_is_dealt_meanwhile_stays(tmp_path: Path) -> None:
    alice, bob = PoolStore(tmp_path / "alice", KEY, LIMIT), filled(tmp_path / "bob", range(6))
    alice.put_seeds({ticket(serial): seed(serial) for serial in range(6)})
    bob.discard([ticket(4), ticket(5)])  # the provider died before it told him that she has them
    assert alice.lease(MODEL, 8) == [ticket(0)]
    said = bob.holdings()
    for name in (ticket(6), ticket(0, OTHER)):
        bob.put(name, seed(6))
        alice.put_seeds({name: seed(6)})
    assert alice.reconcile(said, begun=True) == 2
    assert alice.serials(MODEL, 8) == [1, 2, 3, 6], "6 came to both after he had said what he holds"
    assert alice.serials(OTHER, 8) == [0], "he had not heard of this model when he said it"
    assert alice.read(ticket(0)) == (seed(0), []), "what she has taken, and he has not yet, stays"
    assert alice.reconcile(bob.holdings(), begun=True) == 0
    bob.drop_model(OTHER)
    assert alice.reconcile(bob.holdings(), begun=True) == 1
    alice.close()
    bob.close()


def test_what_was_taken_is_not_thrown_away_with_what_is_ready(tmp_path: Path) -> None:
    store = filled(tmp_path, range(4))
    assert store.lease(MODEL, 8) == [ticket(0)]
    assert store.discard_ready([ticket(3), ticket(0), ticket(9), ticket(1)]) == [ticket(3), ticket(1)]
    assert store.serials(MODEL, 8) == [2]
    assert holds(store, ticket(0)), "whoever took it has it still"
    assert store.discard_ready([ticket(0), ticket(3)]) == []
    store.claim([ticket(2)])
    assert holds(store, ticket(2))
    assert (files(tmp_path), store.nbytes) == (set(), 0)
    store.close()


def test_a_full_disk_leaves_nothing_behind_and_the_pool_goes_on(tmp_path: Path) -> None:
    store = filled(tmp_path, range(2))
    large = [Prg(bytes(16)).words((1 << 12,))]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(StorageFull, match=r"does not fit the disk: nothing was written"):
            store.put(ticket(2), seed(2), large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(files(tmp_path)) == 2
    store.put(ticket(2), seed(2), large)
    assert [one.serial for one in store.lease(MODEL, 8, 3)] == [0, 1, 2]
    store.close()


def test_the_provider_never_names_a_ticket_twice(tmp_path: Path) -> None:
    ledger = DealtLedger(tmp_path)
    assert ledger.next(MODEL, 8, 2) == [ticket(0), ticket(1)]
    assert ledger.next(MODEL, 1) == [ticket(0, batch=1)]
    other = DealtLedger(tmp_path)
    assert other.next(MODEL, 8) == [ticket(2)], "another process sees it"
    other.close()
    assert ledger.next(MODEL, 8, above=1) == [ticket(3)]
    assert ledger.next(MODEL, 8, above=9) == [ticket(10)], "a party has seen more than a record that was put back"
    assert ledger.next(OTHER, 8) == [ticket(0, OTHER)]
    assert ledger.dealt() == {(MODEL, 8): 11, (MODEL, 1): 1, (OTHER, 8): 1}
    with pytest.raises(InputError, match="1 or more"):
        ledger.next(MODEL, 8, 0)
    ledger.close()
    (tmp_path / "dealt.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(DataError, match=r"record of dealt tickets .* cannot be used"):
        DealtLedger(tmp_path)
