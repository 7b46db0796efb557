"""alice, bob and the provider as real processes: what owners and clients can do, and what they cannot."""

import asyncio
import http.client
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch

import tacit
from serving import close, inputs, model, pushed, until
from tacit.errors import DeadlineExceeded, InputError, NotPermitted, Refused
from tacit.identity import Identity, key_text
from tacit.party import push
from tacit.party.client import Client
from tacit.party.local import LocalService
from tacit.party.owning import Owner

MODEL = model()


def fetched(service: LocalService, party: str, path: str) -> tuple[int, str]:
    address = service.cluster.party(party).http_at
    assert address
    connection = http.client.HTTPConnection(address.host, address.port, timeout=20)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_clients_at_the_same_time_each_get_their_own_results(service: LocalService) -> None:
    keys = [service.folder / f"{name}.key" for name in ("clinic", "lab")]
    with ThreadPoolExecutor(6) as threads:
        connections = [tacit.connect(service.folder / "cluster.toml", key) for key in keys]
        models = [connection.model("small") for connection in connections]

        def ask(number: int) -> bool:
            given = inputs(1 + number % 3, number)
            return close(models[number % 2](given), MODEL(given))

        assert all(threads.map(ask, range(30)))
        for connection in connections:
            connection.close()


def test_a_batch_larger_than_planned_is_sent_in_parts(service: LocalService) -> None:
    with tacit.connect(service.cluster, service.key("clinic")) as parties:
        given = inputs(11)
        assert close(parties.model("small")(given), MODEL(given))


def test_errors_say_what_is_wrong(service: LocalService) -> None:
    with tacit.connect(service.cluster, service.key("clinic")) as parties:
        small = parties.model("small")
        with pytest.raises(InputError, match=r"the model takes \(n, 6\)"):
            small(torch.zeros(2, 5))
        with pytest.raises(Refused, match="not loaded"):
            parties.model("unheard-of")
        with pytest.raises(DeadlineExceeded):
            small(inputs(1), timeout=1e-6)
        assert close(small(inputs(1)), MODEL(inputs(1)))
    with (
        tacit.connect(service.cluster, service.key("outsider")) as parties,
        pytest.raises(NotPermitted, match="does not let outsider ask model 'small'"),
    ):
        parties.model("small")
    with pytest.raises(InputError, match="no client with the key"):
        tacit.connect(service.cluster, Identity.fresh())


def test_a_cancelled_request_leaves_nothing_behind(service: LocalService) -> None:
    async def scenario() -> None:
        client = Client(service.cluster, service.key("clinic"))
        asked = [asyncio.create_task(client.ask("small", inputs(1, number))) for number in range(12)]
        await asyncio.sleep(0)
        for task in asked[::2]:
            task.cancel()
        for number, task in enumerate(asked):
            if number % 2:
                assert close(await task, MODEL(inputs(1, number)))
            else:
                with pytest.raises(asyncio.CancelledError):
                    await task
        await client.close()

    asyncio.run(scenario())
    until(lambda: "tacit_queue_requests 0.0" in fetched(service, "alice", "/metrics")[1])


@pytest.mark.slow
def test_owners_have_models_listed_pulled_unloaded_and_deleted(service: LocalService) -> None:
    rival, ours = service.key("rival"), service.key("owner")
    with Owner(service.cluster, rival) as owner:
        assert not any(owner.list().values())
        for forbidden in (lambda: owner.pull("small"), lambda: owner.delete("small"), lambda: owner.load("small")):
            with pytest.raises(InputError, match="belongs to another owner"):
                forbidden()
        theirs = push.prepare(
            model(1), [torch.zeros(1, 6)], name="small", owner=key_text(rival.public), batch_sizes=(1,)
        )
        with pytest.raises(InputError, match="the name 'small' belongs to another owner"):
            owner.push(theirs)
        stolen = push.prepare(model(1), [torch.zeros(1, 6)], name="x", owner=key_text(ours.public), batch_sizes=(1,))
        with pytest.raises(NotPermitted, match="pushed by its owner"):
            owner.push(stolen)
    with Owner(service.cluster, ours) as owner:
        pulled = owner.pull("small")
        for name, value in MODEL.state_dict().items():
            torch.testing.assert_close(pulled[name], value, atol=1e-6, rtol=0)
        with tacit.connect(service.cluster, service.key("clinic")) as parties:
            owner.load("small", False)
            until(lambda: not any(one.loaded for one in owner.list()["alice"]))
            with pytest.raises(Refused, match="not loaded"):
                parties.model("small")
            owner.load("small")
            until(lambda: all(one.loaded for one in owner.list()["bob"]))
            small = parties.model("small")
            assert close(small(inputs(2)), MODEL(inputs(2)))
            # A new version takes the old one's place, also for who asks already.
            pushed(service, seed=5)
            until(lambda: [one.loaded for one in owner.list()["bob"]] == [False, True])
            assert close(small(inputs(2)), model(5)(inputs(2)))
        owner.delete("small")
        assert not any(owner.list().values())
    pushed(service)


def test_health_readiness_and_metrics(service: LocalService) -> None:
    for party in ("alice", "bob", "provider"):
        assert fetched(service, party, "/healthz") == (200, "ok\n")
        assert fetched(service, party, "/readyz")[0] == 200
        assert fetched(service, party, "/else")[0] == 404
    status, text = fetched(service, "alice", "/metrics")
    assert status == 200
    for line in (
        'tacit_requests_total{model="small",outcome="answered"}',
        "tacit_bytes_online_total",
        "tacit_pool_bytes",
    ):
        assert line in text


@pytest.mark.slow
@pytest.mark.parametrize("party", ["alice", "bob", "provider"])
def test_a_party_stops_in_good_order_and_comes_back(service: LocalService, party: str) -> None:
    assert service.stop(party, signal.SIGTERM) == 0
    service.start(party)
    service.wait_ready()
    with tacit.connect(service.cluster, service.key("clinic")) as parties:
        assert close(parties.model("small")(inputs(3)), MODEL(inputs(3)))


def test_logs_hold_names_and_counts_only(service: LocalService) -> None:
    for party in ("alice", "bob", "provider"):
        for line in Path(service.folder / f"{party}.log").read_text().splitlines():
            event = msgspec.json.decode(line)
            assert event["party"] == party
            assert all(isinstance(value, str | int | float | None) for value in event.values())
