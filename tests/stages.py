"""The stages of a service's protocols at which a process can die, from the code's own tables, and how to come to each.

A stage is a *point* (`tests/crashing/crash_points.py`) and a *provocation*: what makes somebody come to it.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import tacit
from crashes import Asking, Books, Points, quietly, ready, restarted, workers_of
from faults import injected
from serving import inputs, until
from tacit.errors import InputError, TacitError
from tacit.party import calling, dealing_messages, dialing, messages, session
from tacit.party.client import Client
from tacit.party.cluster_file import PARTIES
from tacit.party.local import LocalService
from tacit.party.messages import Ask
from tacit.party.owning import Owner
from tacit.party.push import Push
from tacit.party.session import State
from tacit.party.session_messages import NONCE_BYTES, Greeting, Purpose, Welcome
from tacit.party.session_messages import decode as decode_said
from tacit.party.session_messages import encode as encode_said
from tacit.ring.prg import Prg
from tacit.wire import Kind

COMPUTING = ("alice", "bob")


class World:
    """A service in which processes die, and whoever makes happen what they die of.

    Args:
        service: running, with a model that is served.
        points: where processes are to die.
        asking: a client.
        extra: another model of the owner's, which comes and goes. Tickets for both do not fit the pools.
        full: how many tickets for one fill them.
    """

    def __init__(self, service: LocalService, points: Points, asking: Asking, extra: Push, full: int) -> None:
        self.service, self.points, self.asking, self.extra, self.full = service, points, asking, extra, full
        self.books, self.kills = Books(service, points), 0

    def kill(self, stage: "Stage") -> None:
        """Have processes die at a stage, start them again, and see that all is well."""
        began, before = time.monotonic(), len(self.asking.outcomes)
        self.points.arm(*(f"kill {point}" for point in stage.points))
        failure = quietly(lambda: stage.provocation(self))
        deadline = time.monotonic() + 60
        while self.points.left:
            assert time.monotonic() < deadline, f"nobody came to: {self.points.left[0]} ({failure})"
            time.sleep(0.02)
        self.kills, died = self.kills + len(stage.points), time.monotonic()
        injected("kill -9 at a stage of a protocol", len(stage.points))
        restarted(self.service, stage.points[-1].split()[0])
        with contextlib.suppress(InputError), self.owner() as owner:
            owner.delete("extra")
        self.asking.recovered()
        recovered = time.monotonic()
        self.books.in_step()
        self.books.check()
        failed = [f"{one.what}: {one.text}" for one in self.asking.outcomes[before:] if one.what != "right"]
        saw = " | ".join(sorted({*failed})) or "right answers alone"
        took = f"reached in {died - began:.1f} s, answers after {recovered - died:.1f}"
        print(f"{stage}: {took}, pools the same after {time.monotonic() - recovered:.1f}; {saw}")
        if all("'s worker " in point for point in stage.points):
            # A batch that was running is tried once more: a client sees at most that its second try failed.
            assert len(failed) <= 2, failed

    def owner(self) -> Owner:
        return Owner(self.service.cluster, self.service.key("owner"))

    def lab(self) -> Any:
        return tacit.connect(self.service.cluster, self.service.key("lab"))


# What makes somebody come to a point.


def nothing(world: World) -> None:
    """The client asks, tickets are used and dealt, workers are pinged, everybody reports every second."""


def asks(world: World) -> None:
    with world.lab() as parties:
        parties.model("small")(inputs(1))


def asks_for_nothing(world: World) -> None:
    with world.lab() as parties:
        parties.model("nobody")


def cancels(world: World) -> None:
    with world.lab() as parties:
        small = parties.model("small")
        while world.points.left:
            asked = small.submit(inputs(1))
            time.sleep(0.005)
            asked.cancel()


def owns(world: World) -> None:
    """All that an owner can do."""
    with world.owner() as owner:
        digest = owner.push(world.extra)
        until(
            lambda: not world.points.left or any(one.model == digest and one.loaded for one in owner.list()["bob"]), 30
        )
        until(lambda: not world.points.left or all(owner.list()["alice"][-1].tickets.get(size) for size in (1, 4)), 30)
        owner.pull("extra")
        owner.load("extra", False)
        owner.load("extra")
        owner.delete("extra")
        owner.pull("nobody")


def needs_room(world: World) -> None:
    """Full pools, and a new model: tickets of the other one are thrown away."""
    with world.asking.pause():
        until(lambda: len(ready(world.service, "bob")) == world.full)
        with world.owner() as owner:
            owner.push(world.extra)
            until(lambda: not world.points.left)


def sends_half(world: World) -> None:
    """A client whose shares came to bob before they came to alice, and then come to alice alone."""

    async def scenario() -> None:
        client = Client(world.service.cluster, world.service.key("lab"))
        digest = (await client.describe("small")).digest
        await client.close()
        channels, _ = await calling.call(
            world.service.cluster, "lab", world.service.key("lab"), Purpose.CLIENT, COMPUTING
        )
        for number in range(400):
            # It takes many shares that come in time until a request is begun before bob is known to have his.
            for party in ("alice",) if number % 40 == 39 else ("bob", "alice"):
                ask = messages.encode(Ask(number, digest, 1, 60_000.0))
                channels[party].send(Kind.CALL, [Prg.fresh().words((1, 6))], ask)
                await asyncio.sleep(0.02)
            if not world.points.left:
                break
        for channel in channels.values():
            channel.abort()

    asyncio.run(scenario())


def spoils(world: World) -> None:
    """Bob's ticket files change: of every model and batch size those that are taken next, until one has been read."""
    deadline = time.monotonic() + 60
    while world.points.left and time.monotonic() < deadline:
        lines: dict[str, list[tuple[int, Path]]] = {}
        for path in (world.service.folder / "bob" / "pool" / "tickets").iterdir():
            line, _, serial = path.name.rpartition("-")
            if serial.isdigit():
                lines.setdefault(line, []).append((int(serial), path))
        for path in [path for numbered in lines.values() for _, path in sorted(numbered)[:6]]:
            with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
                file.seek(-16, os.SEEK_END)
                file.write(os.urandom(16))  # twice the same change would undo itself
        time.sleep(0.5)


def greets_wrong(greeting: bool) -> Callable[[World], None]:
    """An owner who answers a Welcome with a Greeting of another version, or with nonsense."""

    def provocation(world: World) -> None:
        cluster, identity = world.service.cluster, world.service.key("owner")
        for party in PARTIES:
            member = cluster.party(party)
            link = dialing.dial(member.reached_at, identity, party, member.public)
            welcome = decode_said(link.receive(Kind.HELLO).body)
            assert isinstance(welcome, Welcome)
            said = Greeting(9, Purpose.OWNER, "owner", bytes(NONCE_BYTES), (welcome,), b"", 0)
            with contextlib.suppress(TacitError):
                link.send(Kind.HELLO, body=encode_said(said) if greeting else b"nonsense")
                link.receive(Kind.HELLO)
            link.close()

    return provocation


def dies(who: str) -> Callable[[World], None]:
    """A process dies, which comes back: the others notice, and meet it anew."""

    def provocation(world: World) -> None:
        party, worker = who.split("'")[0], who.endswith("worker")
        if worker:
            for pid in workers_of(world.service, party):
                os.kill(pid, signal.SIGKILL)
        else:
            world.service.stop(party, signal.SIGKILL)
            world.service.start(party)

    return provocation


# The stages.


@dataclass(frozen=True)
class Stage:
    """Where to die: at the last of the points, after others have died at those before."""

    points: tuple[str, ...]
    provocation: Callable[[World], None]

    def __str__(self) -> str:
        return self.points[-1]


def names(union: Any, *without: Any) -> list[str]:
    left_out = {one for other in without for one in get_args(other)}
    return [one.__name__ for one in get_args(union) if one not in left_out]


OF_REQUESTS = {"Begin", "Run", "Ran", "Answer"}
OF_TICKETS = {
    "Stock",
    "Claimed",
    "Stocked",
    "Want",
    "Coming",
    "Seeds",
    "Stored",
    "Dealt",
    "Trim",
    "Trimmed",
    "Holdings",
}
DECIDING = OF_REQUESTS | OF_TICKETS
"""By these a request or a ticket goes from one state to another."""
OF_OWNERS = {"Push", "Pull", "List", "Load", "Delete", "Done", "Pulled", "Models", "Failed"}
OWNED = OF_OWNERS | {"Remove", "Serve"}
"""What is said because of what an owner does."""
NOT_HERE = {
    ("owner", "provider", "Pull"), ("owner", "provider", "Load"), ("owner", "bob", "Load"),  # not asked for these
    ("provider", "owner", "Pulled"), ("provider", "owner", "Failed"), ("bob", "owner", "Failed"),
    ("alice's worker", "alice", "Spoiled"),  # her tickets have no file that could change
}  # fmt: skip
"""What nobody says, though others say it."""


def provoked(sender: str, receiver: str, name: str) -> tuple[tuple[str, ...], Callable[[World], None]]:
    """Points at which others die first, and what else it takes for a message to be said."""
    party = next((one for one in COMPUTING if one in (sender.split("'")[0], receiver.split("'")[0])), "")
    other = "bob" if party == "alice" else "alice"
    if name in ("Broke", "Unpaired"):
        breaks = "alice" if (sender, receiver) == ("bob", "alice") else other
        return (f"{breaks}'s worker opens round 2",), nothing
    if name in ("Setup", "Install", "Pair", "Installed", "Paired", "Up", "Down"):
        return (), dies(
            "bob's worker" if (sender, receiver) in (("alice", "bob"), ("bob", "alice")) else f"{party}'s worker"
        )
    if "a client" in (sender, receiver) and name in ("Describe", "Described", "Ask", "Answer"):
        return (), asks
    special = {"Cancel": cancels, "Absent": sends_half, "Drop": spoils, "Spoiled": spoils, "Holdings": dies("bob")}
    special |= {"Trim": needs_room, "Trimmed": needs_room}
    if name == "Refused":
        return (), asks_for_nothing
    return (), owns if name in OWNED else special.get(name, nothing)


def said(sender: str, receiver: str, all_of: list[str]) -> list[Stage]:
    """The stages of what one says to another: when it has come; also before and after it is sent, if it decides."""
    stages = []
    to, by = (_called(one, other) for one, other in ((receiver, sender), (sender, receiver)))
    for name in all_of:
        if (sender, receiver, name) in NOT_HERE:
            continue
        before, provocation = provoked(sender, receiver, name)
        points = []
        if sender not in ("a client", "owner"):
            moments = ("sends", "sent") if name in DECIDING else ("sends",) * (receiver in ("a client", "owner"))
            points += [f"{sender} {moment} {name} to {to}" for moment in moments]
        if receiver not in ("a client", "owner"):
            points.append(f"{receiver} got {name} from {by}")
        stages += [Stage((*before, point), provocation) for point in points]
    return stages


def _called(one: str, by: str) -> str:
    """What a process calls another one."""
    return "the front" if by == f"{one}'s worker" else "the worker" if one == f"{by}'s worker" else one


def dealing() -> list[Stage]:
    spoken = {
        ("bob", "provider"): ["Want", "Stored"],
        ("provider", "bob"): ["Coming", "CORRECTIONS", "Dealt"],
        ("provider", "alice"): ["Seeds"],
        ("alice", "provider"): ["Stored"],
    }
    # A full disk, which is refused, is in test_party_crashes.py and test_party_dealing.py.
    assert {*names(dealing_messages.Message)} == {one for row in spoken.values() for one in row} - {"CORRECTIONS"} | {
        "Refused"
    }
    return [stage for (sender, receiver), row in spoken.items() for stage in said(sender, receiver, row)]


def sessions() -> list[Stage]:
    """Every step of a session's table, at whoever is called; and again where a party is the one that calls."""
    stages = []
    for state, event in session.TABLE:
        if event is not session.Event.REFUSED:
            ways = [
                *(("alice", asks), ("bob", asks), ("provider", owns)),
                *(("alice", dies("provider")), ("bob", dies("alice")), ("provider", dies("provider"))),
                *(("alice's worker", dies("bob's worker")), ("bob's worker", dies("alice's worker"))),
            ]
        elif state is State.NEW:
            continue  # no party refuses anybody before it has welcomed him
        else:
            ways = [(party, greets_wrong(state is State.GREETED)) for party in PARTIES]
        stages += [Stage((f"{who} in a session that is {state}: {event}",), way) for who, way in ways]
    return stages
