"""Stores whose process is killed at every system call, or whose machine loses power there: what they said was done is
done, what they did not say is done whole or not at all, and no ticket is ever offered after it was handed out."""

import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from faults import Killed, afresh, at_every_call, injected
from tacit.errors import CorrelationError, DataError, StorageFull
from tacit.identity import Identity, key_text
from tacit.party.pool import Holding, PoolStore
from tacit.party.push import Push, prepare
from tacit.party.tickets import DealtLedger, Ticket
from tacit.party.vault import Vault
from tacit.party.vouchers import redeem
from tacit.ring.prg import Prg

KEY = bytes(range(32))
A, B = "a1" * 32, "b2" * 32
LIMIT = 1 << 20
Say = Callable[[str], None]
Step = tuple[Callable[[Any], None], set[Ticket], set[Ticket]]
EVERY = pytest.param(1, marks=pytest.mark.slow, id="every call")
SOME = pytest.param(11, id="some calls")


def a(serial: int) -> Ticket:
    """One of alice's kind: a seed."""
    return Ticket(A, 1, serial)


def b(serial: int) -> Ticket:
    """One of bob's kind: a seed and corrections."""
    return Ticket(B, 8, serial)


def seed(ticket: Ticket) -> bytes:
    return Prg(ticket.model[:12].encode() + ticket.serial.to_bytes(4, "big")).bytes(16)


def corrections(ticket: Ticket) -> list[Tensor]:
    prg = Prg(ticket.serial.to_bytes(16, "big"))
    return [prg.words((300,)), prg.words((7,)) > 0] if ticket.model == B else []


def put(store: PoolStore, ticket: Ticket) -> None:
    store.put(ticket, seed(ticket), corrections(ticket))


def put_seeds(store: PoolStore, *tickets: Ticket) -> None:
    store.put_seeds({ticket: seed(ticket) for ticket in tickets})


def check_read(store: PoolStore, ticket: Ticket) -> None:
    got, tensors = store.read(ticket)
    assert got == seed(ticket)
    assert len(tensors) == len(corrections(ticket))
    assert all(map(torch.equal, tensors, corrections(ticket)))


def lease(store: PoolStore, *tickets: Ticket) -> None:
    assert store.lease(A, 1, len(tickets)) == list(tickets)


FIRST = {a(0), a(1), a(2), b(0), b(1), b(2), b(3), b(4)}
STEPS: list[Step] = [
    (lambda store: put(store, b(5)), {b(5)}, set()),
    (lambda store: put_seeds(store, a(3), a(4)), {a(3), a(4)}, set()),
    (lambda store: lease(store, a(0), a(1)), set(), {a(0), a(1)}),
    (lambda store: check_read(store, a(1)), set(), set()),
    (lambda store: store.claim([b(1), b(0)]), set(), {b(0), b(1)}),
    (lambda store: check_read(store, b(0)), set(), set()),
    (lambda store: redeem(store.voucher(b(1))), set(), set()),
    (lambda store: store.claim([b(5)]), set(), {b(5)}),
    (lambda store: store.discard([b(2), a(2)]), set(), {b(2), a(2)}),
    (lambda store: store.reconcile([Holding(A, 1, 4, [4]), Holding(B, 8, 3, [])]), set(), {a(3), b(3), b(4)}),
    (lambda store: put(store, b(6)), {b(6)}, set()),
]
"""What a party does with its pool: each step, which tickets become ready by it, and which are gone by it."""


def pool_work(folder: Path) -> Callable[[Say], None]:
    def work(say: Say) -> None:
        store = PoolStore(folder, KEY, LIMIT)
        for step, _, _ in STEPS:
            step(store)
            say("done")
        store.close()

    return work


def check_pool(folder: Path, done: int) -> None:
    """What the pool offers is what it offered after the steps that were done, or after one more."""
    came, gone, states = set(FIRST), set[Ticket](), []
    for _, coming, going in [(None, set[Ticket](), set[Ticket]()), *STEPS]:
        came, gone = came | coming, gone | going
        states.append((came, gone))
    store = PoolStore(folder, KEY, LIMIT)
    offered = {Ticket(*line, serial) for line in store.levels() for serial in store.serials(*line)}
    possible = [came - gone for came, gone in states[done : done + 2]]
    assert offered in possible, f"after {done} steps it offers {sorted(offered)}"
    assert store.lost == 0
    with_file = {f"{B}-8-{ticket.serial}" for ticket in offered if ticket.model == B}
    assert {path.name for path in (folder / "tickets").iterdir()} == with_file, "a file is left over"
    for ticket in states[done][0] - offered:
        with pytest.raises(CorrelationError):
            put(store, ticket)
        with pytest.raises(CorrelationError):
            store.claim([ticket])
    for ticket in offered:
        store.claim([ticket])
        check_read(store, ticket)
    assert (store.levels(), store.nbytes) == ({}, 0)
    store.close()


def outcomes(killed: Killed, folder: Path, scratch: Path) -> Iterator[Path]:
    """What the disk holds after the kill, and might hold if it had been a loss of power."""
    for luck in (None, random.Random(killed.number), random.Random(-killed.number)):
        shutil.rmtree(scratch, ignore_errors=True)
        killed.disk.rebuild(scratch, luck)
        injected("losses of power")
        yield scratch
    yield folder


@pytest.mark.parametrize("every", [SOME, EVERY])
def test_a_pool_offers_nothing_twice_whatever_it_dies_of(tmp_path: Path, every: int) -> None:
    template, folder = tmp_path / "template", tmp_path / "pool"
    store = PoolStore(template, KEY, LIMIT)
    for ticket in sorted(FIRST):
        put(store, ticket)
    store.close()
    calls = []
    for killed in at_every_call(pool_work(folder), folder, lambda: afresh(folder, template), every):
        calls.append(killed.call)
        for outcome in outcomes(killed, folder, tmp_path / "scratch"):
            check_pool(outcome, len(killed.said))
    assert calls[-1] == "exit"
    assert len(killed.said) == len(STEPS)
    assert len(calls) * every > 60
    assert {"fsync", "pwrite64", "rename", "unlink", "openat"} <= {*calls} or every > 1


def until_full(folder: Path, limit: int) -> int:
    """Do what a party does in a process whose files may not grow beyond so many bytes; how many steps went well."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        code = 1
        try:
            pool_work(folder)(lambda text: os.write(tell, b"."))
        except (StorageFull, DataError):
            code = 2
        os._exit(code)
    os.close(tell)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(told, "rb") as stream:
        done = len(stream.read())
    assert code in (1, 2)
    assert (code == 1) == (done == len(STEPS)), "it failed in another way than by saying that the disk is full"
    return done


@pytest.mark.parametrize("every", [pytest.param(640, marks=pytest.mark.slow), 9600])
def test_a_disk_that_is_full_at_any_moment_costs_nothing_else(tmp_path: Path, every: int) -> None:
    template, folder = tmp_path / "template", tmp_path / "pool"
    store = PoolStore(template, KEY, LIMIT)
    for ticket in sorted(FIRST):
        put(store, ticket)
    store.close()
    steps = []
    for limit in range(0, 80_000, every):
        afresh(folder, template)
        steps.append(until_full(folder, limit))
        injected("full disks")
        check_pool(folder, steps[-1])
    assert steps[0] == 0
    assert steps[-1] == len(STEPS)
    assert len({*steps}) > 2


@pytest.mark.slow
def test_a_small_disk_fills_up_and_is_of_use_again(tmp_path: Path) -> None:
    """A file system of its own, where root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        store = PoolStore(folder / "pool", KEY, 1 << 30)
        kept: list[int] = []
        large = [Prg(bytes(16)).words((1 << 14,))]
        for first in range(0, 5000, 1000):
            try:
                for serial in range(first, first + 1000):
                    store.put(b(serial), seed(b(serial)), large)
                    kept.append(serial)
            except StorageFull:
                injected("full disks")
            assert kept[-1] < first + 999, "it was never full"
            assert store.serials(B, 8) == kept
            assert len([*(folder / "pool" / "tickets").iterdir()]) == len(kept) > 20
            for used in kept[:3]:
                store.claim([b(used)])
                assert store.read(b(used))[0] == seed(b(used))
            del kept[:3]
        store.close()
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("every", [SOME, EVERY])
def test_a_new_pool_is_whole_or_not_there(tmp_path: Path, every: int) -> None:
    folder = tmp_path / "party" / "pool"

    def before() -> None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()

    def work(say: Say) -> None:
        store = PoolStore(folder, KEY, LIMIT)
        put(store, b(0))
        say("done")

    for killed in at_every_call(work, folder.parent, before, every):
        for outcome in outcomes(killed, folder.parent, tmp_path / "scratch"):
            store = PoolStore(outcome / "pool", KEY, LIMIT)
            assert store.levels() in ([{}, {(B, 8): 1}] if not killed.said else [{(B, 8): 1}])
            store.close()


@pytest.mark.parametrize("every", [SOME, EVERY])
def test_the_provider_names_no_ticket_twice_whatever_it_dies_of(tmp_path: Path, every: int) -> None:
    template, folder = tmp_path / "template", tmp_path / "provider"
    ledger = DealtLedger(template)
    ledger.next(A, 1, 3)
    ledger.close()

    def work(say: Say) -> None:
        ledger = DealtLedger(folder)
        for count in (1, 4):
            for ticket in ledger.next(A, 1, count):
                say(str(ticket.serial))
            for ticket in ledger.next(B, 8, count):
                say(str(100 + ticket.serial))
        ledger.close()

    for killed in at_every_call(work, folder, lambda: afresh(folder, template), every):
        named = [int(line) for line in killed.said]
        assert len(named) == len({*named})
        for outcome in outcomes(killed, folder, tmp_path / "scratch"):
            ledger = DealtLedger(outcome)
            assert ledger.next(A, 1)[0].serial > max([2, *(number for number in named if number < 100)])
            assert ledger.next(B, 8)[0].serial > max([-1, *(number - 100 for number in named if number >= 100)])
            ledger.close()


@pytest.fixture(scope="module")
def pushes() -> list[Push]:
    owner = key_text(Identity(bytes(32)).public)
    return [
        prepare(nn.Linear(3, 2), [torch.zeros(1, 3)], name=name, owner=owner, batch_sizes=[1])
        for name in ("x", "y", "x")
    ]


@pytest.mark.parametrize("every", [SOME, EVERY])
def test_a_vault_keeps_whole_models_whatever_it_dies_of(tmp_path: Path, pushes: list[Push], every: int) -> None:
    template, folder = tmp_path / "template", tmp_path / "vault"
    Vault(template, KEY, "bob").save(pushes[0].bob)
    first, second, third = (push.digest for push in pushes)
    states = [{first}, {first, second}, {first, second, third}, {second, third}]

    def work(say: Say) -> None:
        vault = Vault(folder, KEY, "bob")
        vault.save(pushes[1].bob)
        say("done")
        vault.save(pushes[2].bob)
        say("done")
        vault.delete(first)
        say("done")

    for killed in at_every_call(work, folder, lambda: afresh(folder, template), every):
        for outcome in outcomes(killed, folder, tmp_path / "scratch"):
            vault = Vault(outcome, KEY, "bob")
            kept = {entry.digest for entry in vault.list()}
            assert kept in states[len(killed.said) : len(killed.said) + 2]
            for digest in kept:
                assert vault.load(digest).digest == digest
            assert len([*outcome.iterdir()]) == len(kept), "half a file is left over"


@pytest.mark.parametrize("count", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_a_disk_that_changes_bytes_yields_no_wrong_and_no_used_ticket(tmp_path: Path, count: int) -> None:
    """What a bit that flips on the disk turns into is refused by the ledger or by a seal, if it is not passed over."""
    template, folder, luck = tmp_path / "template", tmp_path / "pool", random.Random(count)
    store = PoolStore(template, KEY, LIMIT)
    for ticket in sorted(FIRST):
        put(store, ticket)
    store.claim([b(0), a(0)])
    for ticket in (b(0), a(0)):
        check_read(store, ticket)
    store.close()
    ready, read, refused = FIRST - {a(0), b(0)}, 0, 0
    for _ in range(count):
        afresh(folder, template)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
        path = luck.choice([path for path in paths if path.suffix == ".sqlite"] * len(paths) + paths)
        content = bytearray(path.read_bytes())
        for _ in range(luck.choice([1, 1, 8])):
            content[luck.randrange(len(content))] ^= 1 << luck.randrange(8)
        path.write_bytes(content)
        injected("bytes changed on the disk")
        try:
            store = PoolStore(folder, KEY, LIMIT)
        except DataError:
            refused += 1
            continue
        try:
            tickets = [Ticket(*line, serial) for line in store.levels() for serial in store.serials(*line)]
        except (DataError, UnicodeDecodeError):
            refused, tickets = refused + 1, []
        for ticket in tickets:
            try:
                store.claim([ticket])
                check_read(store, ticket)
            except (DataError, CorrelationError):
                refused += 1
                continue
            assert ticket in ready
            read += 1
        store.close()
    assert read > refused > 0
