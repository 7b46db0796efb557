"""The whole service over a LAN and over a WAN: the plan that is in force, answers, refills, and connections that break.

No test here asserts how long something takes, but for what no network can do: a run cannot take less than its rounds'
time on the link. What it took is explained at the end of the tests' output.
"""

import http.client
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import namespaces
import tacit
from networks import CLIENT, EXPLAINED, Machines, Spread, spread
from relay import LAN, WAN
from serving import until
from tacit.cli.main import app
from tacit.errors import Busy, PeerError, Refused
from tacit.federated.models import lenet
from tacit.party.cluster_file import ALICE, BOB, PROVIDER
from tacit.party.connection import Connection, RemoteModel
from tacit.party.local import CLUSTER
from tacit.party.owning import Owner
from tacit.program.lowering import Context
from tacit.program.network import NETWORKS, Network
from tacit.program.run import Cost

pytestmark = pytest.mark.slow
NAME, SIZES, AHEAD = "digits", (1, 4), 8
FACTORY = f"""
import torch
from tacit.federated.models import lenet

def {NAME}():
    torch.manual_seed(0)
    return lenet().eval()
"""
PLACES = {"one machine": False} if namespaces.missing() else {"machines": True, "one machine": False}


@dataclass(frozen=True)
class Asked:
    """A service over a network, with a model pushed from the terminal."""

    service: Spread
    network: Network
    pushed: str
    what: str

    def connection(self) -> Connection:
        return tacit.connect(self.service.cluster, self.service.key(CLIENT))

    def metrics(self, party: str) -> dict[str, float]:
        """What a party shows, all labels added; batches also by size, as in `batches 4`."""

        def fetched() -> str:
            address = self.service.place.http(party)
            connection = http.client.HTTPConnection(address.host, address.port, timeout=20)
            try:
                connection.request("GET", "/metrics")
                return connection.getresponse().read().decode()
            finally:
                connection.close()

        found: dict[str, float] = defaultdict(float)
        shown = self.service.place.inside(party, fetched)
        for name, labels, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", shown, re.M):
            found[name] += float(value)
            if name == "tacit_batches_total" and (size := re.search(r'size="(\d+)"', labels)):
                found[f"batches {size[1]}"] += float(value)
        return found

    def tickets(self) -> dict[str, dict[int, int]]:
        """How many of every batch size alice and bob have."""

        def listed() -> dict[str, dict[int, int]]:
            with Owner(self.service.cluster, self.service.key("owner")) as owner:
                return {party: models[0].tickets for party, models in owner.list().items() if party != PROVIDER}

        return self.service.here(listed)

    def until_full(self) -> None:
        full = {size: AHEAD // size for size in SIZES}
        until(lambda: all(held == full for held in self.tickets().values()))


def image(number: int, rows: int = 1) -> Tensor:
    return torch.rand(rows, 1, 28, 28, generator=torch.Generator().manual_seed(number))


def in_the_clear() -> torch.nn.Module:
    torch.manual_seed(0)
    return lenet().eval()


def right(output: object, given: Tensor) -> bool:
    expected = in_the_clear()(given)
    return isinstance(output, Tensor) and bool((output - expected).abs().max() < 2.0**-9)


@cache
def plan(network: Network, batch: int) -> Cost:
    with tacit.cluster() as parties:
        private = parties.encrypt(in_the_clear(), image(0), context=Context(network=network))
        return private.cost((batch, 1, 28, 28))


@pytest.fixture(
    scope="module",
    params=[(network, place) for place in PLACES for network in ("lan", "wan")],
    ids=lambda param: f"{param[0]}, {param[1]}",
)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    name, place = request.param
    folder: Path = tmp_path_factory.mktemp("spread")
    (folder / "net.py").write_text(FACTORY)
    with spread(folder, NETWORKS[name], namespaces=PLACES[place], batch_sizes=SIZES, ahead=AHEAD) as service:
        command = ["model", "push", f"{folder}/net.py:{NAME}", "--example", "1,28,28"]
        options = ["--config", f"{folder / CLUSTER}", "--key", f"{folder}/owner.key"]
        done = service.here(lambda: CliRunner().invoke(app, [*command, *options]))
        assert done.exit_code == 0, done.output
        running = Asked(service, NETWORKS[name], done.stderr, f"{name} ({place})")
        running.until_full()
        yield running


def test_the_plan_is_the_network_s(asked: Asked) -> None:
    """Over the WAN a batch takes fewer rounds and more bytes than over the LAN."""
    plans = {network: plan(network, SIZES[-1]) for network in (LAN, WAN)}
    assert plans[WAN].rounds < plans[LAN].rounds
    assert plans[WAN].bytes_online > plans[LAN].bytes_online
    assert f"{plan(asked.network, 1).rounds} rounds" in asked.pushed

    def asking() -> None:
        with asked.connection() as parties:
            assert right(parties.model(NAME)(image(1, SIZES[-1])), image(1, SIZES[-1]))

    before = asked.metrics(ALICE)
    asked.service.here(asking)
    after = asked.metrics(ALICE)
    assert after["tacit_batches_total"] - before["tacit_batches_total"] == 1
    assert after["tacit_rounds_total"] - before["tacit_rounds_total"] == plans[asked.network].rounds
    assert after["tacit_bytes_online_total"] - before["tacit_bytes_online_total"] == plans[asked.network].bytes_online


def test_rounds_explain_the_latency(asked: Asked) -> None:
    number = 16

    def asking() -> list[float]:
        seconds = []
        with asked.connection() as parties:
            model = parties.model(NAME)
            for one in range(number + 2):
                began = time.perf_counter()
                output = model(image(one))
                seconds.append(time.perf_counter() - began)
                assert right(output, image(one))
                time.sleep(0.1)
        return seconds[2:]  # whoever is new is not counted upon

    before = asked.metrics(ALICE)
    seconds = asked.service.here(asking)
    after = asked.metrics(ALICE)
    batches = after["tacit_batches_total"] - before["tacit_batches_total"]
    rounds = plan(asked.network, 1).rounds
    assert batches == number + 2
    # Where no ticket for one is ready, one for four is used.
    ran = {size: after[f"batches {size}"] - before[f"batches {size}"] for size in SIZES}
    planned = sum(count * plan(asked.network, size).rounds for size, count in ran.items())
    assert ran[1] > 0
    assert after["tacit_rounds_total"] - before["tacit_rounds_total"] == planned
    half = asked.network.round_trip / 2
    assert min(seconds) >= rounds * half
    p50 = statistics.median(seconds)
    EXPLAINED.append(
        f"{asked.what}: a prediction by LeNet took {1000 * p50:.1f} ms (best {1000 * min(seconds):.1f}); the link "
        f"explains {1000 * (rounds + 3) * half:.1f}: {rounds} rounds of half a round trip of {2000 * half:g} ms, and "
        "three more from the client to alice, from her to bob, and back to the client"
    )


def test_batches_of_several_sizes_at_once_are_right(asked: Asked) -> None:
    def asking() -> None:
        with asked.connection() as parties:
            model = parties.model(NAME)
            given = [image(number, 1 + number % 5) for number in range(12)]
            futures = [model.submit(one) for one in given]
            assert all(right(future.result(), one) for future, one in zip(futures, given, strict=True))

    asked.service.here(asking)


def test_pools_refill_over_the_link(asked: Asked) -> None:
    asked.until_full()
    before, used = asked.metrics(PROVIDER)["tacit_dealt_tickets_total"], asked.metrics(ALICE)["tacit_batches_total"]

    def asking() -> None:
        with asked.connection() as parties:
            model = parties.model(NAME)
            for number in range(4):
                assert right(model(image(number, 4)), image(number, 4))

    for _ in range(20):  # the first that are used are with the workers already, and not all of these are replaced
        asked.service.here(asking)
        if asked.metrics(PROVIDER)["tacit_dealt_tickets_total"] - before >= 4:
            break
    used = asked.metrics(ALICE)["tacit_batches_total"] - used
    began = time.perf_counter()
    asked.until_full()
    seconds = time.perf_counter() - began
    assert used >= 4
    assert asked.metrics(PROVIDER)["tacit_dealt_tickets_total"] - before >= 4
    EXPLAINED.append(f"{asked.what}: the pools were full again {seconds:.1f} s after {used:.0f} batches")


@pytest.mark.parametrize("party", [ALICE, BOB, PROVIDER])
def test_all_goes_on_after_a_cut(asked: Asked, party: str) -> None:
    def asking() -> None:
        with asked.connection() as parties:
            model = parties.model(NAME)
            assert right(model(image(1)), image(1))
            asked.service.cut(party)
            asked.service.connect(party)
            assert right(answered(model, image(2)), image(2))

    asked.service.here(asking)
    asked.service.wait_ready()
    asked.until_full()


@pytest.mark.parametrize("seconds", [2.0, 15.0])
def test_a_cable_that_is_pulled_costs_time_and_nothing_else(asked: Asked, seconds: float) -> None:
    place = asked.service.place
    if not isinstance(place, Machines):
        pytest.skip("there is no cable to pull")

    def asking() -> None:
        with asked.connection() as parties:
            model = parties.model(NAME)
            futures = [model.submit(image(number)) for number in range(4)]
            place.machines.unplug(BOB)
            time.sleep(seconds)
            place.machines.plug(BOB)
            for number, future in enumerate(futures):
                if error := future.exception(120):
                    assert isinstance(error, PeerError | Refused)
                else:
                    assert right(future.result(), image(number))
            assert right(answered(model, image(9)), image(9))

    asked.service.here(asking)
    asked.service.wait_ready()


def answered(model: RemoteModel, given: Tensor) -> object:
    """An answer, asked for again and again while a party is gone."""
    deadline = time.monotonic() + 120.0
    while True:
        try:
            return model(given, timeout=20.0)
        except (PeerError, Busy, Refused):
            assert time.monotonic() < deadline, "it never came back"
            time.sleep(0.2)
