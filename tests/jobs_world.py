"""alice and bob run a job in a world without time, disks or links, in which anything may break at any moment.

The two state machines are the real ones. What is on a disk survives; what is in a process does not. The workers' shares
are modelled by what they belong to: a step and the run that took it, back to the beginning.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import msgspec
from torch import nn

from tacit.identity import Identity, key_text
from tacit.party.jobs.actions import Agree, Claim, Discard, Halt, Launch, Rebase, Save, Settle, Take, Tell
from tacit.party.jobs.agreeing import JobFromAlice, JobFromBob
from tacit.party.jobs.description import Contributor, Job
from tacit.party.jobs.following import Following
from tacit.party.jobs.leading import Leading
from tacit.party.jobs.states import ACTIVE, Checkpoint, Entry, Held, State, initial, require_transition
from tacit.party.jobs.submission import Training, prepare
from tacit.party.tickets import Ticket

OWNER = key_text(Identity(bytes(range(32))).public)
Lineage = tuple[tuple[int, bytes], ...]


@cache
def job(steps: int = 5, every: int = 2) -> Job:
    return prepare(
        Training(nn.Linear(1, 1, bias=False), lambda output, labels: (output - labels).sum()),
        (1,),
        name="job",
        owner=OWNER,
        data=[Contributor(OWNER, 1)],
        steps=steps,
        batch_size=1,
        checkpoint_every=every,
    ).job


class Killed(Exception):
    """The process that was at work is gone."""


@dataclass
class Worker:
    run: bytes
    step: int
    lineage: Lineage
    up: bool = False
    calls: deque[Any] = field(default_factory=deque)


class Party:
    """One of the two: a disk, and a process that may be gone."""

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name = world, name
        self.entries = {
            one.digest: Entry(
                one,
                number,
                State.SUBMITTED,
                "",
                initial(one.digest),
                0.0,
                Held(one.digest, {OWNER: bytes(16)}, [initial(one.digest)]),
            )
            for number, one in enumerate(world.jobs)
        }
        self.lineages: dict[tuple[str, Checkpoint], Lineage] = {(d, initial(d)): () for d in self.entries}
        self.used: list[Ticket] = []
        self.taken: set[Ticket] = set()
        self.machine: Any = None
        self.worker: Worker | None = None
        self.job = ""
        self.start()

    def start(self) -> None:
        self.machine = Leading(self.world.draw) if self.name == "alice" else Following()
        self.machine.known(self.entries.values())

    def kill(self) -> None:
        self.machine = self.worker = None

    def put(self, digest: str, **changes: Any) -> None:
        self.entries[digest] = replace(self.entries[digest], **changes)
        self.machine.known(self.entries.values())

    def keep(self, digest: str, checkpoints: list[Checkpoint], **changes: Any) -> None:
        held = msgspec.structs.replace(self.entries[digest].held, checkpoints=checkpoints)
        self.put(digest, held=held, **changes)

    def act(self, *, survives: int = 1 << 30) -> None:
        """Carry out what the machine wants; be killed after so many actions."""
        while self.machine is not None:
            actions = self.machine.pump(self.world.now) if self.name == "alice" else self.machine.pump()
            if self.name == "alice" and not actions and self.machine.wanted[2] and self.world.tickets:
                self.world.tickets -= 1
                ticket = Ticket(self.machine.wanted[0], self.machine.wanted[1], self.world.serial)
                self.world.serial += 1
                self.taken.add(ticket)
                self.machine.leased([ticket])
                continue
            if not actions:
                return
            for action in actions:
                if not survives:
                    self.kill()
                    raise Killed
                survives -= 1
                self.do(action)

    def do(self, action: Any) -> None:
        match action:
            case Tell(message):
                self.world.send(self.name, message)
            case Settle(digest, state, reason):
                entry = self.entries[digest]
                if (entry.state, entry.reason) != (state, reason):
                    if self.name == "alice":
                        require_transition("job", entry.state, state)
                    assert entry.state is not State.DONE
                    self.put(digest, state=state, reason=reason)
            case Rebase(digest, base) | Agree(digest, base):
                assert base in self.entries[digest].held.checkpoints
                assert base.step >= self.entries[digest].agreed.step, "what was agreed on is never taken back"
                self.keep(digest, [base], agreed=base)
            case Launch(digest, run, base):
                assert self.worker is None
                self.worker, self.job = Worker(run, base.step, self.lineages[digest, base]), digest
            case Take() | Save():
                assert self.worker is not None
                self.worker.calls.append(action)
            case Halt():
                self.worker = None
            case Claim(tickets):
                found = [one for one in tickets if not self.world.refusing]
                self.taken |= set(found)
                self.machine.claimed(found)
            case Discard(tickets):
                self.taken -= set(tickets)

    def work(self) -> None:
        """Have the worker do the next thing that it can do, and say so."""
        worker, other = self.worker, self.world.other(self).worker
        if worker is None or self.machine is None:
            return
        if not worker.up:
            worker.up = True
            self.machine.ready()
        elif worker.calls:
            match worker.calls[0]:
                case Take(step, ticket):
                    # Its last message may arrive after the sender is gone, so the other one may be a step ahead.
                    if other is None or other.run != worker.run or not self.reached(other, step, ticket):
                        return
                    assert step == worker.step + 1
                    self.taken.remove(ticket)
                    assert ticket not in self.used, "a ticket serves once"
                    self.used.append(ticket)
                    worker.step, worker.lineage = step, (*worker.lineage, (step, worker.run))
                    if self.name == "alice":
                        self.machine.stepped(step)
                case Save(checkpoint):
                    assert checkpoint == Checkpoint(worker.step, worker.run)
                    self.lineages[self.job, checkpoint] = worker.lineage
                    self.keep(self.job, [*self.entries[self.job].held.checkpoints, checkpoint])
                    self.machine.saved() if self.name == "alice" else self.machine.saved(checkpoint)
            worker.calls.popleft()

    def reached(self, other: Worker, step: int, ticket: Ticket) -> bool:
        if other.step >= step:
            return True
        return other.up and other.step == step - 1 and bool(other.calls) and other.calls[0] == Take(step, ticket)


class World:
    def __init__(self, jobs: list[Job]) -> None:
        self.jobs, self.now, self.runs, self.serial, self.tickets = jobs, 0.0, 0, 0, 3
        self.refusing = False
        self.link: dict[str, deque[bytes]] | None = None
        self.alice, self.bob = Party(self, "alice"), Party(self, "bob")

    def draw(self) -> bytes:
        self.runs += 1
        return self.runs.to_bytes(16, "big")

    def other(self, party: Party) -> Party:
        return self.bob if party is self.alice else self.alice

    def send(self, name: str, message: Any) -> None:
        if self.link is not None:
            self.link[name].append(msgspec.msgpack.encode(message))

    def cut(self) -> None:
        if self.link is not None:
            self.link = None
            for party in (self.alice, self.bob):
                if party.machine is not None:
                    party.machine.disconnected()

    def connect(self) -> None:
        if self.link is None and self.alice.machine and self.bob.machine:
            self.link = {"alice": deque(), "bob": deque()}
            self.bob.machine.connected()
            self.alice.machine.connected()

    def deliver(self, sender: Party) -> None:
        if self.link is not None and self.link[sender.name] and self.other(sender).machine:
            data = self.link[sender.name].popleft()
            if sender is self.alice:
                self.bob.machine.heard(msgspec.msgpack.decode(data, type=JobFromAlice))
            else:
                self.alice.machine.heard(self.now, msgspec.msgpack.decode(data, type=JobFromBob))

    def kill(self, party: Party) -> None:
        party.kill()
        self.cut()

    def kill_worker(self, party: Party) -> None:
        if party.worker is not None:
            party.worker = None
            if party is self.alice:
                party.machine.broke(self.now, "its worker has ended", hopeless=False)
            else:
                party.machine.broke("its worker has ended", hopeless=False)

    def settle(self) -> None:
        """Both act until nothing more is to be done by them."""
        for party in (self.alice, self.bob):
            if party.machine is not None:
                party.act()

    def steps(self) -> dict[str, Callable[[], object]]:
        """What may happen next."""
        return {
            "alice hears": lambda: self.deliver(self.bob),
            "bob hears": lambda: self.deliver(self.alice),
            "alice works": self.alice.work,
            "bob works": self.bob.work,
            "connect": self.connect,
            "time": lambda: setattr(self, "now", self.now + 20.0),
            "tickets": lambda: setattr(self, "tickets", self.tickets + 3),
        }

    def faults(self) -> dict[str, Callable[[], object]]:
        return {
            "cut": self.cut,
            "kill alice": lambda: self.kill(self.alice),
            "kill bob": lambda: self.kill(self.bob),
            "kill alice's worker": lambda: self.kill_worker(self.alice),
            "kill bob's worker": lambda: self.kill_worker(self.bob),
            "bob refuses": lambda: setattr(self, "refusing", not self.refusing),
        }

    def check(self) -> None:
        """What holds at every moment."""
        for digest in self.alice.entries:
            here, there = (set(party.entries[digest].held.checkpoints) for party in (self.alice, self.bob))
            assert here & there, "there is always a checkpoint that both have"
            for checkpoint in here & there:
                pair = {party.lineages[digest, checkpoint] for party in (self.alice, self.bob)}
                assert len(pair) == 1, "shares of one checkpoint belong together"
                assert [step for step, _ in pair.pop()] == list(range(1, checkpoint.step + 1))
            assert len(here) <= 2
            assert len(there) <= 2
            for party in (self.alice, self.bob):
                if party.entries[digest].state is State.DONE:
                    assert party.entries[digest].agreed.step == party.entries[digest].job.steps

    def finish(self) -> Iterator[None]:
        """Whatever has happened, all jobs come to their end once nothing more breaks."""
        self.refusing = False
        for _ in range(2000):
            for party in (self.alice, self.bob):
                if party.machine is None:
                    party.start()
            for happen in self.steps().values():
                happen()
                self.settle()
                yield
            for entry in list(self.alice.entries.values()):
                if entry.state not in (*ACTIVE, State.DONE):
                    self.alice.machine.resume(entry.digest)
            if all(one.state is State.DONE for party in (self.alice, self.bob) for one in party.entries.values()):
                return
        raise AssertionError("a job has not come to its end")
