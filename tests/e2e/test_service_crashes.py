"""Every process of a running service, killed at every stage of every protocol while a client asks.

The stages are those of the code's own tables: every message of every union that parties, workers, clients and owners
say to each other (when it has come; for those that decide, also before and right after it was sent), every step of
`session.TABLE`, every round of a run. A message that is new in one of the unions is a stage from then on. After each
kill the process is started again. The client must see right answers again, and until then nothing but right answers and
documented errors; what workers noted of their use of tickets must show nothing twice, and both pools must offer the
same.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from crashes import Asking, crashing, tell
from serving import cluster_of, model, prepared, pushed
from stages import COMPUTING, Stage, World, dealing, names, nothing, said, sessions
from tacit.identity import Identity
from tacit.party import messages, worker_calls
from tacit.party.cluster_file import PARTIES, Pools
from tacit.party.jobs.agreeing import JobFromAlice, JobFromBob
from tacit.party.jobs.requests import JobCall, JobReply
from tacit.party.loaded import PlannedModel
from tacit.party.local import LocalService
from tacit.party.refilling import ticket_bytes

pytestmark = pytest.mark.slow
AHEAD = 24


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    part = PlannedModel(prepared(Identity.fresh()).bob)
    ahead = {size: -(-AHEAD // size) for size in part.part.batch_sizes}
    room = sum(count * ticket_bytes(part, size) for size, count in ahead.items())
    folder = tmp_path / "service"
    cluster_of(folder, pools=Pools(disk_gb=(room + 10) / 1e9, ahead=AHEAD))
    with crashing(tmp_path / "points") as points, LocalService(folder) as service:
        service.wait_ready()
        pushed(service)
        with Asking(service, model()) as asking:
            asking.recovered()
            yield World(service, points, asking, prepared(service.key("owner"), "extra", 7), sum(ahead.values()))


def test_a_client_s_requests_whoever_dies_at_whatever_stage(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [stage for party in COMPUTING for stage in said("a client", party, names(messages.ClientCall))]
    stages += [stage for party in COMPUTING for stage in said(party, "a client", names(messages.ClientReply))]
    campaign(world, capsys, "clients' requests", stages)


def test_what_alice_and_bob_agree_on(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    stages = said("alice", "bob", names(messages.FromAlice, JobFromAlice))
    stages += said("bob", "alice", names(messages.FromBob, JobFromBob))
    campaign(world, capsys, "what alice and bob tell each other", stages)


@pytest.mark.parametrize("party", COMPUTING)
def test_what_a_party_and_its_worker_tell_each_other(
    world: World, capsys: pytest.CaptureFixture[str], party: str
) -> None:
    stages = said(party, f"{party}'s worker", names(worker_calls.Call))
    stages += said(f"{party}'s worker", party, names(worker_calls.Answer))
    campaign(world, capsys, f"what {party} and a worker tell each other", stages)


def test_every_round_of_a_run(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = range(1, world.books.rounds() + 1)
    stages = [Stage((f"{party}'s worker opens round {one}",), nothing) for one in rounds for party in COMPUTING]
    campaign(world, capsys, "rounds of a run", stages)


def test_dealing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    campaign(world, capsys, "dealing", dealing())


def test_opening_sessions(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    campaign(world, capsys, "sessions", sessions())


def test_what_owners_do(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [stage for party in PARTIES for stage in said("owner", party, names(messages.OwnerCall, JobCall))]
    stages += [stage for party in PARTIES for stage in said(party, "owner", names(messages.OwnerReply, JobReply))]
    campaign(world, capsys, "what owners do", stages)


def campaign(world: World, capsys: pytest.CaptureFixture[str], kind: str, stages: list[Stage]) -> None:
    """All stages one after another, and one line about them."""
    for stage in stages:
        try:
            world.kill(stage)
        except BaseException as error:
            error.add_note(f"at the stage: {stage}")
            raise
    with capsys.disabled():
        print("\n" + tell(kind, world.asking.outcomes, world.kills, world.books))
