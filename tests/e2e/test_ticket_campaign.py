"""A provider, an alice and a bob that deal, store and use tickets over TLS while all of them are killed again.

Each is a process of its own that is killed with SIGKILL at random moments and started anew on what its disk holds.
While one is down, its folder is sometimes damaged, emptied, or put back to an earlier copy. alice and bob write down
every mask that they open, before they open it, and what came of it: afterwards no ticket, no seed and no mask may be
there twice, and every result must be right.
"""

import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

import tacit
from faults import injected
from tacit.errors import CorrelationError, DataError, PeerError
from tacit.identity import Identity, key_text
from tacit.mpc.correlation import expand, layout
from tacit.mpc.lockstep import Meter
from tacit.mpc.shares import Share, reconstruct
from tacit.mpc.steps import Role
from tacit.party import dialing, tls
from tacit.party.address import Address
from tacit.party.dealing import Dealer
from tacit.party.driver import drive
from tacit.party.loaded import LoadedModel
from tacit.party.pool import Holding, PoolStore
from tacit.party.push import Push, prepare
from tacit.party.refilling import Refilling, take_seeds
from tacit.party.tickets import DealtLedger, Ticket
from tacit.party.transport import Link
from tacit.party.vault import Vault
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import Prg
from tacit.wire import Kind

NAMES = ("provider", "alice", "bob")
IDENTITIES = {name: Identity(bytes([number]) * 32) for number, name in enumerate(NAMES)}
PINS = {name: identity.public for name, identity in IDENTITIES.items()}
BATCH, AHEAD, LIMIT = 2, 6, 1 << 20
PATIENCE_S = 10.0


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def inputs(ticket: Ticket) -> torch.Tensor:
    """What a ticket is used for: a value of its own."""
    prg = Prg(hashlib.sha256(msgspec.msgpack.encode(ticket)).digest()[:16])
    return prg.words((BATCH, 3)).double() * 2.0**-62


def input_share(ticket: Ticket, role: Role) -> Share:
    words, mask = encode(inputs(ticket)), Prg(ticket.serial.to_bytes(16, "big")).words((BATCH, 3))
    return Share(mask if role is Role.ALICE else words - mask, FRACTION_BITS, role)


class Actor:
    """What the three have in common: a folder, listeners that outlive them, and a log that does too."""

    def __init__(self, name: str, folder: Path, ports: dict[str, int], listener: socket.socket, pushed: Push) -> None:
        self.name, self.folder, self.ports, self.listener, self.pushed = name, folder, ports, listener, pushed
        self.log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **entry: Any) -> None:
        os.write(self.log, json.dumps(entry).encode() + b"\n")

    def dial(self, peer: str) -> Link:
        address = Address("127.0.0.1", self.ports[peer])
        return dialing.dial(address, IDENTITIES[self.name], peer, PINS[peer], patience=PATIENCE_S)

    def answer(self, *peers: str) -> Link:
        pins = {peer: PINS[peer] for peer in peers}
        identity = IDENTITIES[self.name]
        sock, _ = self.listener.accept()
        return dialing.answer(sock, tls.server_context(identity, pins), identity, pins, PATIENCE_S)

    def store(self) -> PoolStore:
        return PoolStore(self.folder / self.name, IDENTITIES[self.name].storage_key("pool"), LIMIT)


def persevering(work: Callable[[], None]) -> None:
    """Do it again whenever a peer is gone."""
    while True:
        try:
            work()
        except PeerError:
            time.sleep(0.002)


class Party(Actor):
    """What alice and bob have in common: a run with a ticket that both took."""

    def run(self, link: Link, store: PoolStore, model: LoadedModel, ticket: Ticket) -> None:
        try:
            seed, corrections = store.read(ticket)
            pool = model.expand(BATCH, seed, corrections)
        except (DataError, CorrelationError) as error:
            self.write(lost=ticket.serial, why=str(error))
            raise PeerError("this side has lost the ticket") from error
        first = model.cost(BATCH).correlations[0]
        mask = expand(Prg(seed).derive("correlation", 0), layout(first).uniform).a
        digests = [hashlib.sha256(data).hexdigest() for data in (seed, mask.numpy().tobytes())]
        self.write(opened=ticket.serial, seed=digests[0], mask=digests[1])
        (output,) = drive(model.run(BATCH, [input_share(ticket, model.role)]), pool, link, Meter())
        self.write(result=ticket.serial, words=output.words.tolist(), scale=output.scale)


class Alice(Party):
    def live(self) -> None:
        store, model = self.store(), LoadedModel(self.pushed.alice)
        threading.Thread(target=lambda: persevering(lambda: self.seeds(store)), daemon=True).start()
        persevering(lambda: self.session(store, model))

    def seeds(self, store: PoolStore) -> None:
        link = self.dial("provider")
        try:
            take_seeds(link, store)
        finally:
            link.close()

    def session(self, store: PoolStore, model: LoadedModel) -> None:
        link = self.answer("bob")
        try:
            link.send(Kind.CALL, body=msgspec.msgpack.encode(store.holdings()))
            store.reconcile(msgspec.msgpack.decode(link.receive(Kind.REPLY).body, type=list[Holding]))
            while True:
                tickets = store.lease(self.pushed.digest, BATCH)
                if not tickets:
                    time.sleep(0.002)
                    link.send(Kind.HELLO)  # is he there?
                for ticket in tickets:
                    link.send(Kind.CALL, body=msgspec.msgpack.encode(ticket))
                    if link.receive(Kind.REPLY).body == b"claimed":
                        self.run(link, store, model, ticket)
        finally:
            link.close()


class Bob(Party):
    def live(self) -> None:
        store, model = self.store(), LoadedModel(self.pushed.bob)
        self.seen = -1
        refilling = Refilling(lambda: self.dial("provider"), store, self.never, lambda line: self.seen)
        refilling.want(model, {BATCH: AHEAD})
        threading.Thread(target=refilling.run, daemon=True).start()
        persevering(lambda: self.session(store, model, refilling))

    def never(self, tickets: list[Ticket]) -> list[Ticket]:
        raise AssertionError("nothing is to be trimmed")

    def session(self, store: PoolStore, model: LoadedModel, refilling: Refilling) -> None:
        link = self.dial("alice")
        try:
            hers = msgspec.msgpack.decode(link.receive(Kind.CALL).body, type=list[Holding])
            link.send(Kind.REPLY, body=msgspec.msgpack.encode(store.holdings()))
            store.reconcile(hers)
            self.seen = max([-1, *(one.seen for one in hers)])
            while True:
                frame = link.receive(Kind.CALL, Kind.HELLO)
                refilling.wake()
                if frame.kind is Kind.HELLO:
                    continue
                ticket = msgspec.msgpack.decode(frame.body, type=Ticket)
                try:
                    store.claim([ticket])
                except CorrelationError:
                    self.write(refused=ticket.serial)
                    link.send(Kind.REPLY, body=b"refused")
                    continue
                link.send(Kind.REPLY, body=b"claimed")
                self.run(link, store, model, ticket)
        finally:
            link.close()


class Provider(Actor):
    def live(self) -> None:
        vault = Vault(self.folder / "models", IDENTITIES["provider"].storage_key("vault"), "provider")
        vault.save(self.pushed.provider)
        dealer = Dealer(vault, DealtLedger(self.folder / self.name))
        while True:
            try:
                link = self.answer("alice", "bob")
            except PeerError:
                continue
            if link.peer == "alice":
                dealer.attach_alice(link)
            else:
                threading.Thread(target=lambda link=link: dealer.serve_bob(link), daemon=True).start()


ROLES: dict[str, type[Alice] | type[Bob] | type[Provider]] = {"alice": Alice, "bob": Bob, "provider": Provider}


class Campaign:
    """The three processes, and whoever kills them.

    Args:
        folder: of all of them.
        luck: decides who is hit by what, and when.
    """

    def __init__(self, folder: Path, luck: random.Random) -> None:
        self.folder, self.luck = folder, luck
        owner = key_text(Identity(bytes([9]) * 32).public)
        self.pushed = prepare(build(), [torch.zeros(1, 3)], name="m", owner=owner, batch_sizes=[BATCH])
        # What is compiled now, the processes need not compile each time that they are started.
        tacit.cluster().encrypt(build(), torch.zeros(BATCH, 3))(torch.zeros(BATCH, 3))
        self.listeners = {name: dialing.listen(Address("127.0.0.1", 0)) for name in NAMES}
        self.ports = {name: listener.getsockname()[1] for name, listener in self.listeners.items()}
        self.pids: dict[str, int] = {}

    def start(self, name: str) -> None:
        pid = os.fork()
        if not pid:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # not to outlive the tests
            try:
                ROLES[name](name, self.folder, self.ports, self.listeners[name], self.pushed).live()
            finally:
                os._exit(1)
        self.pids[name] = pid

    def kill(self, name: str) -> None:
        pid = self.pids.pop(name)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), f"{name} ended by itself"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def entries(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.log"
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def results(self) -> int:
        return sum("result" in entry for entry in self.entries("alice"))

    def progress(self) -> None:
        """Wait until another ticket has been used from end to end: only ever as long as that takes."""
        before, deadline = self.results(), time.monotonic() + 60
        while self.results() <= before:
            assert time.monotonic() < deadline, "nothing goes on any more"
            time.sleep(0.005)

    def harm(self, name: str) -> None:
        """Do something to the folder of a party that is down."""
        folder, copy = self.folder / name, self.folder / f"{name}.copy"
        files = [*(folder / "tickets").glob("*")] if name != "provider" else []
        what = self.luck.choice(["nothing", "nothing", "copy", "put back", "emptied", "truncated", "flipped"])
        if what == "copy":
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
        elif what == "put back" and copy.exists():
            shutil.rmtree(folder)
            shutil.copytree(copy, folder)
            injected("folders put back to an earlier copy")
        elif what == "emptied":
            shutil.rmtree(folder)
            injected("folders lost")
        elif what in ("truncated", "flipped") and files:
            path = self.luck.choice(files)
            content = bytearray(path.read_bytes())
            if what == "truncated":
                del content[self.luck.randrange(len(content)) :]
            else:
                content[self.luck.randrange(len(content))] ^= 1 << self.luck.randrange(8)
            path.write_bytes(content)
            injected("ticket files damaged")
        else:
            return
        self.start(name)
        # Both parties' disks put back at once, with no session between, is more than anybody can see.
        self.progress()

    def run(self, kills: int) -> None:
        for name in NAMES:
            self.start(name)
        self.progress()
        for _ in range(kills):
            if self.luck.random() < 0.8:
                self.progress()
            time.sleep(self.luck.random() * 0.01)
            name = self.luck.choice(NAMES)
            self.kill(name)
            injected(f"kill -9 of {name}")
            self.harm(name)
            if name not in self.pids:
                self.start(name)
        self.progress()
        for name in NAMES:
            self.kill(name)

    def check(self) -> dict[str, int]:
        """Nothing twice, nothing wrong; what happened, in numbers."""
        logs = {name: self.entries(name) for name in ("alice", "bob")}
        opened = {name: [one["opened"] for one in log if "opened" in one] for name, log in logs.items()}
        for name, log in logs.items():
            assert len(opened[name]) == len({*opened[name]}), f"{name} used a ticket twice"
            masks = [one[key] for one in log if "opened" in one for key in ("seed", "mask")]
            assert len(masks) == len({*masks}), f"{name} opened under one mask twice"
        results = {
            name: {one["result"]: (one["words"], one["scale"]) for one in log if "result" in one}
            for name, log in logs.items()
        }
        both = results["alice"].keys() & results["bob"].keys()
        model = build()
        for serial in both:
            halves = [results[role.value][serial] for role in Role]
            pair = [Share(torch.tensor(words), scale, role) for (words, scale), role in zip(halves, Role, strict=True)]
            expected = model(inputs(Ticket(self.pushed.digest, BATCH, serial)).float())
            assert (reconstruct(*pair) - expected).abs().max() < 1e-3, "a wrong result"
        for name in ("alice", "bob"):
            store = PoolStore(self.folder / name, IDENTITIES[name].storage_key("pool"), LIMIT)
            used = {*opened["alice"], *opened["bob"]}
            assert not used & {*opened[name]} & {*store.serials(self.pushed.digest, BATCH)}, "offered after use"
            store.close()
        ledger = DealtLedger(self.folder / "provider")
        dealt = ledger.dealt()[self.pushed.digest, BATCH]
        ledger.close()
        refused = sum("refused" in one for one in logs["bob"])
        lost = sum("lost" in one for log in logs.values() for one in log)
        return {"dealt": dealt, "used": len(both), "refused": refused, "lost": lost}

    def close(self) -> None:
        for pid in self.pids.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for listener in self.listeners.values():
            listener.close()


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_no_ticket_is_used_twice_whoever_is_killed(
    tmp_path: Path, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = Campaign(tmp_path, random.Random(kills))
    try:
        campaign.run(kills)
        numbers = campaign.check()
    finally:
        campaign.close()
    assert numbers["used"] > kills // 2
    with capsys.disabled():
        print(f"\n{kills} kills: {numbers}")
