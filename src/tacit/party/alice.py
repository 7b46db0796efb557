"""Alice's front process: what `tacit.party.leading` decides, with bob, the provider, owners and the clock around it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

from tacit.errors import CodecError, PeerError, one_line
from tacit.party import messages
from tacit.party.channel import Channel
from tacit.party.choosing import Unloaded, chosen
from tacit.party.control import Control
from tacit.party.entrance import Handler
from tacit.party.front import STARTING, STOPPING, Front, setups
from tacit.party.house import House
from tacit.party.jobs.agreeing import JobFromBob
from tacit.party.leading import Leader
from tacit.party.messages import Echo, FromBob, Holdings, Serve, Sound, Status, Trim, Trimmed
from tacit.party.pool import Holding
from tacit.party.refill import Line
from tacit.party.refilling import take_seeds
from tacit.party.refusal import Reason, Refusal
from tacit.party.session import Session
from tacit.party.session_messages import Purpose
from tacit.party.sounding import Sounding
from tacit.party.tickets import Ticket
from tacit.party.transport import Link

_BOB_STOPS = Refusal(Reason.STOPPING, "bob is stopping: retry in a moment", 5.0)
_AGAIN_S = (0.5, 1.0, 2.0, 5.0)


class Alice(Front):
    """See the module."""

    def __init__(self, house: House) -> None:
        super().__init__(house)
        self._control: Control[FromBob] = Control(messages.from_bob)
        self._leader = Leader(house, setups(house), self._control.say, self.tasks)
        self.crew, self.clients, self._pairing = self._leader.crew, self._leader.clients, self._leader.pairing
        self._unloaded, self._reviewing = Unloaded(house.folder), asyncio.Lock()
        self._bob_has: set[str] | None = None
        self._bob_stops = self._decided = False
        self._per_minute: dict[Line, float] = {}
        self._seeds = Seeds(house)
        self._sounding = Sounding(house.cluster.network.for_planning().round_trip)
        self._admit()
        self.jobs = self.desk(self._control.say)

    def handlers(self) -> dict[Purpose, Handler]:
        """Bob's control session."""
        return {Purpose.CONTROL: self._with_bob}

    def begin(self) -> None:
        """Take seeds."""
        self.thread("seeds", self._seeds.run)

    async def tick(self) -> None:
        """See `Front.tick`."""
        metrics = self.house.metrics
        self._pairing.refresh(self.levels)
        self._leader.set_stock(self._per_minute)
        self._leader.flush()
        self._control.say(Sound(self._sounding.send(time.monotonic())))
        self._control.say(Status(stopping=(self.stopping or self._bob_stops) and not self._leader.running))
        metrics.queue.set(self._leader.waiting)
        metrics.set_ready(
            {(self.crew.name_of(model), batch): n for (model, batch), n in self._pairing.stocked().items()}
        )
        for (model, batch), count in self._per_minute.items():
            metrics.refill.labels(self.crew.name_of(model), batch).set(count)

    async def finish(self) -> None:
        """See `Front.finish`."""
        self._leader.drain(STOPPING)
        await self._quiet()

    async def leave(self) -> None:
        """See `Front.leave`."""
        self._control.close()
        self._seeds.stop()

    def readiness(self) -> dict[str, object]:
        """See `Front.readiness`."""
        linked = sum(pair.linked for pair in self._pairing.pairs)
        models = self.crew.ready()
        return {
            "ready": not self.stopping
            and not self._bob_stops
            and linked > 0
            and self._decided
            and all(models.values()),
            "bob": self._control.connected,
            "pairs": linked,
            "provider": self._seeds.trouble or "connected",
            "models": models,
        }

    def set_loaded(self, name: str, loaded: bool) -> None:
        """See `Front.set_loaded`."""
        self._unloaded.set(name, not loaded)
        self.vault_changed()

    def vault_changed(self) -> None:
        """See `Front.vault_changed`."""
        self.tasks.start(self._review())

    def _admit(self) -> None:
        """Take requests, unless something is in the way."""
        waiting = _BOB_STOPS if self._bob_stops else None if self._decided else STARTING
        self.clients.closed = STOPPING if self.stopping else waiting

    async def _review(self) -> None:
        """Serve what is to be served by now, and have bob do the same."""
        async with self._reviewing:
            if self._bob_has is None:
                return  # he has not said yet what he has, and will
            entries = await asyncio.to_thread(self.house.vault.list)
            models = chosen(entries, self._bob_has, self._unloaded.names)
            if set(models) != self.crew.served.keys():
                await self.crew.serve(models)
            self._control.say(Serve(list(self.crew.served)))
            self._decided = True
            self._admit()

    async def _with_bob(self, channel: Channel, session: Session) -> None:
        if self._control.connected:
            self._pairing.disconnect()
            self.jobs.disconnected()
        self._control.attach(channel)
        self.house.log("bob_connected")
        try:
            self._control.say(Holdings(await asyncio.to_thread(self.house.pool.holdings)))
            first = await self._control.hear(channel)
            if not isinstance(first, Holdings):
                raise CodecError("bob said something else first than what he holds")
            await asyncio.to_thread(self.house.reconcile, first.holdings)
            self._bob_has, self._bob_stops = None, False
            self._admit()
            self._pairing.connect()
            self.jobs.connected()
            await self._control.listen(channel, self._heard)
        finally:
            if self._control.detach(channel):
                self.house.log("bob_gone")
                self._pairing.disconnect()
                self.jobs.disconnected()

    def _heard(self, message: FromBob) -> None:
        match message:
            case Status(stopping, per_minute, has):
                self._per_minute = {(model, batch): rate for model, batch, rate in per_minute}
                if set(has) != self._bob_has:
                    self._bob_has = set(has)
                    self.vault_changed()
                if stopping and not self._bob_stops:
                    self._bob_stops = True
                    self._leader.drain(_BOB_STOPS)
                    self.tasks.start(self._let_bob_go())
            case messages.Have(requests):
                self._leader.bob_has(requests)
            case messages.Absent(batch, requests):
                self._leader.bob_lacks(batch, requests)
            case messages.Broke(batch):
                self._leader.bob_broke(batch)
            case Holdings(holdings):
                self.tasks.start(self._compare(holdings))
            case Trim(tickets):
                self.tasks.start(self._trim(tickets))
            case Echo(number):
                self._echo(number)
            case _ if isinstance(message, JobFromBob):
                self.jobs.heard(message)
            case _:
                self._pairing.bob_said(message)

    def _echo(self, number: int) -> None:
        self._sounding.returned(time.monotonic(), number)
        if (seconds := self._sounding.round_trip) is not None:
            self.house.metrics.round_trip.set(seconds)
        if (seconds := self._sounding.surprise()) is not None:
            planned_ms = self.house.cluster.network.rtt_ms
            self.house.log("network_is_not_as_planned", round_trip_ms=1000 * seconds, planned_ms=planned_ms)

    async def _compare(self, holdings: list[Holding]) -> None:
        """Throw away what bob has thrown away without her: when the provider left him in the middle of dealing."""
        with contextlib.suppress(PeerError):  # her disk is full: it is done another time
            await asyncio.to_thread(self.house.reconcile, holdings, begun=True)

    async def _trim(self, tickets: list[Ticket]) -> None:
        thrown = await asyncio.to_thread(self.house.discard_ready, tickets)
        self._control.say(Trimmed(tickets, thrown))

    async def _let_bob_go(self) -> None:
        await self._quiet()
        self._control.say(Status(stopping=True))

    async def _quiet(self) -> None:
        """Wait until nothing runs."""
        while self._leader.running:
            await asyncio.sleep(0.02)


class Seeds:
    """Takes the seeds of tickets that the provider deals, in a thread of its own.

    Args:
        house: alice's.
    """

    def __init__(self, house: House) -> None:
        self._house, self._stopped = house, threading.Event()
        self._link: Link | None = None
        self.trouble = "not connected yet"

    def run(self) -> None:
        """Take them until `stop` is called.

        Raises:
            DataError: the pool cannot be used.
        """
        failures = 0
        while not self._stopped.is_set():
            try:
                self._link = self._house.dial_provider()
                failures, self.trouble = 0, ""
                take_seeds(self._link, self._house.pool)
            except PeerError as error:
                self.trouble = one_line(error)
            finally:
                if self._link:
                    self._link.close()
            self._stopped.wait(_AGAIN_S[min(failures, len(_AGAIN_S) - 1)])
            failures += 1

    def stop(self) -> None:
        """Take no more."""
        self._stopped.set()
        if self._link:
            self._link.close()
