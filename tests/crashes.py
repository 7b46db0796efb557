"""A running service whose processes die where a test says, a client that asks all the time, and books of what was used.

`tests/crashing/sitecustomize.py` is the part of it that runs inside the service's processes.
"""

import json
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import tacit
from serving import close, inputs, until
from tacit.errors import Busy, PeerError, Refused, TacitError
from tacit.party.cluster_file import PARTIES
from tacit.party.local import LocalService
from tacit.party.tickets import Ticket

TIMEOUT_S = 60.0
ENOUGH = 3
"""Right answers after which a service counts as recovered."""
POOLS = ("alice", "bob")


@dataclass(frozen=True)
class Outcome:
    """What a client saw of one question.

    Args:
        what: ``right`` or ``wrong``, or the class of the error.
        text: of the error.
        seconds: how long it took to learn that.
    """

    what: str
    text: str = ""
    seconds: float = 0.0


class Asking:
    """A client that asks on whatever happens, in a thread of its own.

    Args:
        service: whom.
        model: what the answers should be.
        name: the client's.
    """

    def __init__(self, service: LocalService, model: torch.nn.Module, name: str = "clinic") -> None:
        self._service, self._model, self._name = service, model, name
        self.outcomes: list[Outcome] = []
        self._done, self._turn, self._failure = threading.Event(), threading.Lock(), None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Asking":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(TIMEOUT_S + 30)
        assert not self._thread.is_alive(), "a question was never answered in any way"
        if self._failure:
            raise self._failure

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Have it ask nothing for a while."""
        with self._turn:
            yield

    @property
    def right(self) -> int:
        return sum(one.what == "right" for one in self.outcomes)

    def recovered(self) -> None:
        """Wait for answers to questions that are asked from now on."""
        enough = self.right + ENOUGH
        until(lambda: self.right >= enough or not self._thread.is_alive(), 180.0)

    def _run(self) -> None:
        try:
            with tacit.connect(self._service.cluster, self._service.key(self._name)) as parties:
                number = 0
                while not self._done.is_set():
                    number += 1
                    with self._turn:
                        self.outcomes.append(self._asked(parties, number))
                    # Long enough for the parties to stock what is used, and for pools to be compared.
                    self._done.wait(0.02 if self.outcomes[-1].what == "right" else 0.1)
        except BaseException as error:
            self._failure = error

    def _asked(self, parties: Any, number: int) -> Outcome:
        given, began = inputs(1 + number % 3, number), time.monotonic()
        try:
            output = parties.run(parties.client.ask("small", given, timeout=TIMEOUT_S))
        except (PeerError, Busy, Refused) as error:
            return Outcome(type(error).__name__, str(error), time.monotonic() - began)
        with torch.inference_mode():
            right = close(output, self._model(given))
        return Outcome("right" if right else "wrong", "", time.monotonic() - began)


@dataclass
class Points:
    """Where processes are to die or to stop; see `tests/crashing/sitecustomize.py`."""

    folder: Path

    def arm(self, *lines: str) -> None:
        (self.folder / "hit").unlink(missing_ok=True)
        (self.folder / "armed.test").write_text("\n".join(lines))
        (self.folder / "armed.test").replace(self.folder / "armed")

    @property
    def left(self) -> list[str]:
        """Points that no process has come to yet."""
        return (self.folder / "armed").read_text().splitlines()

    def disarm(self) -> None:
        self.arm()


@contextmanager
def crashing(folder: Path, **environment: str) -> Iterator[Points]:
    """Have processes that are started from now on look out for points.

    Args:
        folder: for its files.
        environment: further variables, such as ``LIFETIME_S`` of sessions.
    """
    folder.mkdir()
    here = str(Path(__file__).parent / "crashing")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", "")))))
        patched.setenv("TACIT_CRASHES", str(folder))
        for name, value in environment.items():
            patched.setenv(f"TACIT_CRASHES_{name}", value)
        points = Points(folder)
        points.disarm()
        yield points


def workers_of(service: LocalService, party: str) -> list[int]:
    """The process ids of a party's workers."""
    pid = service.pid(party)
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def alive(service: LocalService, party: str) -> bool:
    """Whether a party's front process runs, and has not ended unnoticed."""
    try:
        return Path(f"/proc/{service.pid(party)}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def restarted(service: LocalService, dead: str) -> None:
    """Start a party that was killed again, and wait until everything is ready; nobody else may have died of it."""
    for party in PARTIES:
        assert party == dead or alive(service, party), f"{party} has ended: see {service.folder / party}.log"
    if dead in PARTIES:
        until(lambda: not alive(service, dead), 30.0)
        service.stop(dead)  # collects its exit code
        service.start(dead)
    service.wait_ready()


def ready(service: LocalService, party: str) -> set[Ticket]:
    """The tickets that a party's ledger offers, read beside the process that has it."""
    path = service.folder / party / "pool" / "ledger.sqlite"
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30.0)
    try:
        return {Ticket(*row) for row in connection.execute("SELECT model, batch, serial FROM ready")}
    finally:
        connection.close()


@dataclass
class Books:
    """What workers have noted of what they used.

    Args:
        service: whose.
        points: where the notes are.
    """

    service: LocalService
    points: Points
    tickets: int = 0
    requests: int = 0
    _notes: list[dict[str, Any]] = field(default_factory=list)

    def check(self) -> None:
        """No ticket, seed or mask is there twice, none that was used is offered, no request has run too often."""
        path = self.points.folder / "notes"
        self._notes = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        used = {Ticket(*one["runs"]) for one in self._notes if "runs" in one}
        offered = {party: ready(self.service, party) for party in POOLS}
        for party in POOLS:
            mine = [one for one in self._notes if one["who"] == f"{party}'s worker"]
            self._once(Ticket(*one["redeems"]) for one in mine if "redeems" in one)
            self._once(Ticket(*one["runs"]) for one in mine if "runs" in one)
            runs = Counter(request for one in mine if "runs" in one for request in one["requests"])
            assert max(runs.values(), default=0) <= 2, "a request has run more than twice"
            assert not used & offered[party], f"{party} offers what was used"
        self._once(one["seed"] for one in self._notes if "seed" in one)
        self._once(one["masked"] for one in self._notes if "masked" in one)
        self._same_runs()
        self.tickets, self.requests = len(used), len({one for note in self._notes for one in note.get("requests", ())})

    def rounds(self) -> int:
        """How many rounds a run of the smallest batch takes."""
        self.check()
        return next(one["rounds"] for one in self._notes if "ran" in one and one["ran"][1] == 1)

    def in_step(self) -> None:
        """Wait until both pools offer the same: nothing has been lost on one side that the other one keeps."""

        deadline = time.monotonic() + 60
        while (alices := ready(self.service, "alice")) != (bobs := ready(self.service, "bob")):
            assert time.monotonic() < deadline, f"alice alone has {alices - bobs}, bob alone has {bobs - alices}"
            time.sleep(0.01)

    def _same_runs(self) -> None:
        """The two workers used a ticket for the same batch, over the same link."""
        met: dict[Ticket, set[tuple[int, str]]] = {}
        for one in self._notes:
            if "runs" in one:
                met.setdefault(Ticket(*one["runs"]), set()).add((one["batch"], one["token"]))
        assert all(len(runs) == 1 for runs in met.values()), "the two workers used a ticket for different runs"

    def _once(self, things: Any) -> None:
        counted = Counter(things)
        twice = [thing for thing, count in counted.items() if count > 1]
        assert not twice, f"used twice: {twice[0]}"


def seen(outcomes: list[Outcome]) -> Counter[str]:
    """What a client saw, in numbers; nothing may be wrong, come late, or be an error that is not documented."""
    for one in outcomes:
        assert one.what != "wrong", "an answer was wrong"
        assert one.what == "right" or one.text, "an error says nothing"
        assert one.seconds < TIMEOUT_S + 5, "a question hung"
    return Counter(one.what for one in outcomes)


def tell(kind: str, outcomes: list[Outcome], count: int, books: Books) -> str:
    """One line about a campaign."""
    saw = ", ".join(f"{number} {what}" for what, number in sorted(seen(outcomes).items()))
    return (
        f"{count} faults in {kind}: the client saw {saw}; {books.requests} requests ran under {books.tickets} tickets, "
        "none of them twice; no answer was wrong"
    )


def quietly(work: Any) -> TacitError | None:
    """Do something that a killed party may spoil; the error, if it did."""
    try:
        work()
    except TacitError as error:
        return error
    return None
