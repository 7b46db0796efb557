"""alice's and bob's jobs with real records, pools and worker processes; a test in the place of the service."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from tacit.identity import Identity, key_text
from tacit.mpc.shares import Share, reconstruct
from tacit.mpc.steps import Role
from tacit.party.address import Address
from tacit.party.cluster_file import ClusterFile, Parties, member
from tacit.party.jobs.agreeing import JobFromAlice, JobFromBob
from tacit.party.jobs.description import Contributor, Job
from tacit.party.jobs.desk import JobDesk, Surroundings
from tacit.party.jobs.planned import PlannedJob
from tacit.party.jobs.states import State
from tacit.party.jobs.store import JobStore
from tacit.party.jobs.submission import Rows, Submission, Training, prepare, restore
from tacit.party.metrics import Metrics
from tacit.party.pool import PoolStore
from tacit.party.tickets import Ticket
from tacit.ring.prg import Prg

IDENTITIES = {name: Identity(bytes([number]) * 32) for number, name in enumerate(("alice", "bob", "provider", "owner"))}
OWNER = key_text(IDENTITIES["owner"].public)
ROLES = ("alice", "bob")
PATIENCE_S = 120.0


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def examples(rows: int = 24) -> tuple[Tensor, Tensor]:
    prg = Prg(bytes(16))
    inputs = prg.words((rows, 4)).double() * 2.0**-63
    return inputs.float(), (inputs.sum(1) > 0).long()


def submission(
    steps: int = 6, every: int = 2, training: Training | None = None, rows: int = 24, **settings: Any
) -> Submission:
    return prepare(
        training or Training(network()),
        (4,),
        name="job",
        owner=OWNER,
        data=settings.pop("data", [Contributor(OWNER, rows)]),
        steps=steps,
        batch_size=settings.pop("batch_size", 8),
        checkpoint_every=every,
        seed=bytes(16),
        **settings,
    )


class Side:
    """One party: what is on its disk, and its process, which can be killed and started."""

    def __init__(self, parties: "JobParties", role: str) -> None:
        self.parties, self.role, self.folder = parties, role, parties.folder / role
        self.up = False
        self.events: list[tuple[str, dict[str, Any]]] = []

    def start(self) -> None:
        key = bytes([7]) * 32
        self.store = JobStore(self.folder / "jobs", key, self.role, 10**8)
        self.pool = PoolStore(self.folder / "pool", key, 10**8)
        identity, cluster = IDENTITIES[self.role], self.parties.cluster
        self.metrics = Metrics()
        around = Surroundings(
            self.role, identity, cluster, 1, self.pool, self._send, self.parties.want, self._log, self.metrics
        )
        self.desk = JobDesk(self.store, around)
        self.up = True
        self.desk.start()

    def kill(self) -> None:
        """As `kill -9` does: the workers see it by their closed sockets, and nothing is written any more."""
        with self.parties.dealing:
            self.up = False
        self.desk._stopped.set()
        self.desk._thread.join()
        with self.parties.dealing:
            self.pool.close()
            self.store.close()

    def _send(self, message: Any) -> None:
        if self.up and self.parties.linked:
            data = msgspec.msgpack.encode(message)
            other = self.parties.other(self)
            kind = JobFromAlice if self.role == "alice" else JobFromBob
            if other.up:
                other.desk.heard(msgspec.msgpack.decode(data, type=kind))

    def _log(self, event: str, **facts: Any) -> None:
        self.events.append((event, facts))

    @property
    def used(self) -> list[int]:
        """Serials of the tickets of the steps that were taken."""
        return [facts["ticket"] for event, facts in self.events if event == "job_step"]

    @property
    def worker(self) -> int | None:
        process = self.desk._process
        return process.pid if process else None


class JobParties:
    """Both parties, with a provider that deals at once what is wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.linked, self.serial = folder, False, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = self.listener.getsockname()[1]
        members = {
            name: member(IDENTITIES[name].public, Address("127.0.0.1", port + number))
            for number, name in enumerate(("alice", "bob", "provider"))
        }
        self.cluster = ClusterFile(parties=Parties(**members))
        self.alice, self.bob = Side(self, "alice"), Side(self, "bob")
        self.sides = {"alice": self.alice, "bob": self.bob}
        self.dealing = threading.RLock()

    @contextlib.contextmanager
    def running(self) -> Iterator["JobParties"]:
        door = threading.Thread(target=self._door, daemon=True)
        door.start()
        self.start("alice")
        self.start("bob")
        try:
            yield self
        finally:
            for side in self.sides.values():
                if side.up:
                    side.kill()
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
            door.join()

    def start(self, role: str) -> None:
        self.sides[role].start()
        self.link()

    def link(self) -> None:
        if self.alice.up and self.bob.up:
            # The pools are compared at the start of a session.
            here, there = self.alice.pool.holdings(), self.bob.pool.holdings()
            self.alice.pool.reconcile(there)
            self.bob.pool.reconcile(here)
            self.linked = True
            for side in (self.bob, self.alice):
                side.desk.connected()

    def kill(self, role: str) -> None:
        self.sides[role].kill()
        self.cut()

    def cut(self) -> None:
        self.linked = False
        for side in self.sides.values():
            if side.up:
                side.desk.disconnected()

    def kill_worker(self, role: str) -> None:
        pid = self.sides[role].worker
        if pid:
            os.kill(pid, signal.SIGKILL)

    def other(self, side: Side) -> Side:
        return self.bob if side is self.alice else self.alice

    def submit(self, submitted: Submission, inputs: Tensor, labels: Tensor) -> str:
        for role, side in self.sides.items():
            side.store.submit(submitted.parts[role])
        self.share(submitted, OWNER, inputs, labels)
        return submitted.job.digest

    def share(self, submitted: Submission, contributor: str, inputs: Tensor, labels: Tensor) -> None:
        upload = Prg.fresh().bytes(16)
        for first, halves in Rows(submitted.job, inputs, labels).pieces():
            for role, side in self.sides.items():
                side.store.add_rows(submitted.job.digest, contributor, upload, first, halves[role])
        for side in self.sides.values():
            side.desk.changed()

    def want(self, job: PlannedJob, ahead: int) -> None:
        """Deal, as the provider does, until there are as many tickets as are wanted."""
        batch = job.job.batch
        while self._low(job.digest, batch, ahead):
            with self.dealing:
                if not (self.alice.up and self.bob.up):
                    return
                ticket = Ticket(job.digest, batch, self.serial)
                self.serial += 1
                draw = job.draw(batch)
                self.bob.pool.put(ticket, draw.bob, [tensor for tensors in draw.corrections for tensor in tensors])
                self.alice.pool.put_seeds({ticket: draw.alice})

    def _low(self, digest: str, batch: int, ahead: int) -> bool:
        with self.dealing:
            return self.bob.up and self.alice.up and len(self.bob.pool.serials(digest, batch)) < min(4, ahead)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, f"nothing comes of it: {what}"
            time.sleep(0.01)

    def until_state(self, digest: str, *states: State, roles: Sequence[str] = ROLES) -> None:
        for role in roles:
            side = self.sides[role]
            self.until(lambda side=side: side.up and side.store.entry(digest).state in states, f"{role}: {states}")  # type: ignore[misc]

    def until_step(self, digest: str, step: int) -> None:
        def reached() -> bool:
            progress = self.alice.desk.progress(digest)
            return bool(progress and progress[0] >= step) or self.alice.store.entry(digest).agreed.step >= step

        self.until(reached, f"step {step}")

    def result(self, submitted: Submission) -> dict[str, Tensor]:
        digest = submitted.job.digest
        agreed = self.alice.store.entry(digest).agreed
        return restore(submitted.job, *(side.store.model_share(digest, agreed) for side in self.sides.values()))

    def losses(self, digest: str) -> dict[int, float]:
        shares = [
            {step: (run, words) for step, run, words in side.store.losses(digest, 0)} for side in self.sides.values()
        ]
        assert [(step, run) for step, (run, _) in shares[0].items()] == [
            (step, run) for step, (run, _) in shares[1].items()
        ]
        return {
            step: float(
                reconstruct(
                    Share(shares[0][step][1], self.alice.store.job(digest).loss_bits, Role.ALICE),
                    Share(shares[1][step][1], self.alice.store.job(digest).loss_bits, Role.BOB),
                )
            )
            for step in shares[0]
        }

    def _door(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                if self.alice.up:
                    self.alice.desk.hand_over(sock)
                else:
                    sock.close()


def in_the_clear(job: Job, training: Training, inputs: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """The same steps on the same rows, by PyTorch in float64."""
    module = training.recipe().module.double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(1, steps + 1):
        rows = job.order(step)
        optimizer.zero_grad()
        training.loss(module(inputs[rows].double()), labels[rows]).backward()
        optimizer.step()
    return module
