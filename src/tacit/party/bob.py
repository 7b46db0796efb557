"""Bob's front process: what `tacit.party.following` does as alice says, with the provider, owners and the clock."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib

from tacit.errors import CodecError, PeerError, one_line
from tacit.party import calling, messages
from tacit.party.channel import Channel
from tacit.party.cluster_file import ALICE, BOB
from tacit.party.control import Control
from tacit.party.entrance import Handler
from tacit.party.following import Follower
from tacit.party.front import STARTING, Front, setups
from tacit.party.house import House
from tacit.party.jobs.agreeing import JobFromAlice
from tacit.party.jobs.planned import PlannedJob
from tacit.party.loaded import PlannedModel
from tacit.party.messages import Echo, FromAlice, Holdings, Serve, Sound, Status, Trim, Trimmed
from tacit.party.refill import Line
from tacit.party.refilling import Refilling
from tacit.party.session_messages import Purpose
from tacit.party.tickets import Ticket
from tacit.wire import Kind

_AGAIN_S = (0.2, 0.5, 1.0, 2.0, 5.0)
_TRIMMING_S = 30.0
_COMPARING_S = 10.0


class Bob(Front):
    """See the module."""

    def __init__(self, house: House) -> None:
        super().__init__(house)
        self._control: Control[FromAlice] = Control(messages.from_alice)
        self._follower = Follower(house, setups(house), self._control.say, self.tasks)
        self.crew, self.clients = self._follower.crew, self._follower.clients
        self._seen_by_alice: dict[Line, int] = {}
        self._refilling = Refilling(
            house.dial_provider, house.pool, self._trim, lambda line: self._seen_by_alice.get(line, -1)
        )
        self._trimming: dict[tuple[Ticket, ...], concurrent.futures.Future[list[Ticket]]] = {}
        self._wanted, self._told = set[str](), False
        self._released = asyncio.Event()
        self._serving = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self.clients.closed = STARTING
        self.jobs = self.desk(self._control.say, self._want)

    def handlers(self) -> dict[Purpose, Handler]:
        """None: it is bob who calls alice."""
        return {}

    def begin(self) -> None:
        """Find alice, and refill the pool."""
        self.tasks.start(self._to_alice())
        self.thread("refilling", self._refilling.run)

    async def tick(self) -> None:
        """See `Front.tick`."""
        self._follower.expire()
        await self._report()

    async def finish(self) -> None:
        """See `Front.finish`."""
        await self._report()
        while self._control.connected and not self._released.is_set():
            await asyncio.sleep(0.02)
        while self._follower.running:
            await asyncio.sleep(0.02)

    async def leave(self) -> None:
        """See `Front.leave`."""
        self._control.close()
        self._refilling.stop()
        for future in self._trimming.values():
            future.cancel()

    def readiness(self) -> dict[str, object]:
        """See `Front.readiness`."""
        linked, models = self._follower.linked, self.crew.ready()
        return {
            "ready": not self.stopping
            and self._control.connected
            and linked > 0
            and self._told
            and all(models.values()),
            "alice": self._control.connected,
            "pairs": linked,
            "provider": self._refilling.trouble or "connected",
            "models": models,
        }

    def set_loaded(self, name: str, loaded: bool) -> None:
        """See `Front.set_loaded`; alice decides."""

    def vault_changed(self) -> None:
        """See `Front.vault_changed`."""
        self.tasks.start(self._report())

    async def _report(self) -> None:
        """Tell alice what she decides by."""
        has = [entry.digest for entry in await asyncio.to_thread(self.house.vault.list)]
        rates = [(model, size, self._refilling.per_minute(model, size)) for model, size in self._lines()]
        self._control.say(Status(self.stopping, rates, has))
        for model, size, rate in rates:
            self.house.metrics.refill.labels(self.crew.name_of(model), size).set(rate)

    def _lines(self) -> list[Line]:
        return [(model, size) for model, served in self.crew.served.items() for size in served.part.batch_sizes]

    async def _to_alice(self) -> None:
        failures, house = 0, self.house
        while True:
            try:
                channels, _ = await calling.call(house.cluster, BOB, house.identity, Purpose.CONTROL, (ALICE,))
                failures = 0
                await self._with_alice(channels[ALICE])
            except PeerError as error:
                self.house.log("alice_gone", reason=one_line(error))
            await asyncio.sleep(_AGAIN_S[min(failures, len(_AGAIN_S) - 1)])
            failures += 1

    async def _with_alice(self, channel: Channel) -> None:
        self._control.attach(channel)
        try:
            self._control.say(Holdings(await asyncio.to_thread(self.house.pool.holdings)))
            first = await self._control.hear(channel)
            if not isinstance(first, Holdings):
                raise CodecError("alice said something else first than what she holds")
            await asyncio.to_thread(self.house.reconcile, first.holdings)
            self._seen_by_alice = {(one.model, one.batch): one.seen for one in first.holdings}
            self.house.log("alice_connected")
            self.tasks.start(self._compare(channel))
            await self._report()
            self._follower.introduce()
            self.jobs.connected()
            await self._control.listen(channel, self._heard)
        finally:
            channel.abort()
            self._control.detach(channel)
            self.jobs.disconnected()
            for future in self._trimming.values():
                future.cancel()

    async def _compare(self, channel: Channel) -> None:
        """Tell alice again and again what is in the pool: she throws away what is not."""
        with contextlib.suppress(PeerError):
            while True:
                await asyncio.sleep(_COMPARING_S)
                holdings = Holdings(await asyncio.to_thread(self.house.pool.holdings))
                await channel.deliver(Kind.CALL, body=messages.encode(holdings))

    def _heard(self, message: FromAlice) -> None:
        match message:
            case Serve(models):
                self.tasks.start(self._serve(models))
            case Status(stopping):
                if stopping and self.stopping:
                    self._released.set()
            case Sound(number):
                self._control.say(Echo(number))
            case Trimmed(asked, thrown):
                future = self._trimming.get(tuple(asked))
                if future and not future.done():
                    future.set_result(thrown)
            case _ if isinstance(message, JobFromAlice):
                self.jobs.heard(message)
            case _:
                self._follower.alice_said(message)

    async def _serve(self, models: list[str]) -> None:
        async with self._serving:
            await self.crew.serve(models)
            for model in self._wanted - self.crew.served.keys():
                self._refilling.forget(model)
            ahead = self.house.cluster.pools.ahead
            for model in self.crew.served.keys() - self._wanted:
                part = self.crew.served[model].part
                wanted = {size: -(-ahead // size) for size in part.batch_sizes}
                await asyncio.to_thread(self._refilling.want, PlannedModel(part), wanted)
            self._wanted = set(self.crew.served)
            if not self._told and not self.stopping:
                self._told, self.clients.closed = True, None

    def _want(self, job: PlannedJob, ahead: int) -> None:
        """Keep tickets of a job; called by the thread of the jobs."""
        if ahead:
            self._refilling.want(job, {job.job.batch: ahead})
        else:
            self._refilling.forget(job.digest)

    def _trim(self, tickets: list[Ticket]) -> list[Ticket]:
        """Have alice throw tickets away, and say which; called by the thread that refills the pool.

        Raises:
            PeerError: she does not answer.
        """
        key, future = tuple(tickets), concurrent.futures.Future[list[Ticket]]()
        self._trimming[key] = future
        try:
            self._loop.call_soon_threadsafe(self._ask_to_trim, key, future)
            return future.result(_TRIMMING_S)
        except (TimeoutError, concurrent.futures.CancelledError):
            raise PeerError("alice did not throw tickets away that bob has no room for") from None
        finally:
            del self._trimming[key]

    def _ask_to_trim(self, tickets: tuple[Ticket, ...], future: concurrent.futures.Future[list[Ticket]]) -> None:
        if self._control.connected:
            self._control.say(Trim(list(tickets)))
        else:
            future.cancel()
