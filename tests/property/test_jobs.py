"""Whatever breaks, and whenever: a checkpoint that both parties have, no ticket twice, and an end once all are back."""

import contextlib
from collections.abc import Iterator
from random import Random

import pytest

from jobs_world import Killed, World, job
from tacit.errors import InputError
from tacit.party.jobs.states import ACTIVE, State

GOES_ON = ("alice hears", "bob hears", "alice works", "bob works", "connect", "time", "tickets")
BREAKS = ("cut", "kill alice", "kill bob", "kill alice's worker", "kill bob's worker", "bob refuses")
ASKED = ("cancel", "resume", "resume", "alice stops", "bob stops")
QUICK, SEEDS = 100, 600
ALL = 99


def happen(world: World, what: str, survives: int) -> None:
    steps = world.steps() | world.faults()
    if what in steps:
        steps[what]()
    elif world.alice.machine is not None:
        first = next(iter(world.alice.entries))
        with contextlib.suppress(InputError):
            {
                "cancel": lambda: world.alice.machine.cancel(first),
                "resume": lambda: world.alice.machine.resume(first),
                "alice stops": world.alice.machine.stop,
                "bob stops": lambda: world.bob.machine and world.bob.machine.stop(),
            }[what]()
    for party in (world.alice, world.bob):
        if party.machine is None and what == "connect":
            party.start()
        with contextlib.suppress(Killed):
            party.act(survives=survives)
        if party.machine is None:
            world.cut()


def happenings(seed: int) -> Iterator[tuple[str, int]]:
    """What happens, and how many of the things that it leads to a process survives."""
    draw = Random(seed)
    often = draw.choice((0.01, 0.03, 0.1))
    for _ in range(400):
        if draw.random() < often:
            yield draw.choice(BREAKS), ALL
        elif draw.random() < often:
            yield draw.choice(GOES_ON), draw.randrange(4)
        elif draw.random() < often / 4:
            yield draw.choice(ASKED), ALL
        else:
            yield draw.choice(GOES_ON), ALL


@pytest.mark.parametrize("seed", range(QUICK))
def test_a_job_comes_to_its_end(seed: int) -> None:
    come_to_an_end(seed)


@pytest.mark.slow
def test_jobs_come_to_their_end_many_times_over() -> None:
    for seed in range(QUICK, SEEDS):
        come_to_an_end(seed)


def come_to_an_end(seed: int) -> None:
    draw = Random(seed)
    world = World([job(draw.randint(1, 12), draw.randint(1, 4)), job(3, 1)][: draw.randint(1, 2)])
    for what, survives in happenings(seed):
        happen(world, what, survives)
        world.check()
    if world.alice.machine is not None:
        # What was stopped is started again.
        world.kill(world.alice)
    for _ in world.finish():
        world.check()
    for party in (world.alice, world.bob):
        assert {ticket.model for ticket in party.used} == set(party.entries)


def test_without_faults_each_step_is_taken_once() -> None:
    world = World([job(6, 4)])
    for _ in world.finish():
        world.check()
    assert world.runs == 1
    assert world.alice.used == world.bob.used
    assert len(world.alice.used) == 6


def test_a_cancelled_job_keeps_its_last_step_and_goes_on_from_there() -> None:
    world = World([job(6, 4)])
    digest = world.jobs[0].digest
    run = world.finish()
    while len(world.alice.used) < 2:
        next(run)
    world.alice.machine.cancel(digest)
    while world.alice.entries[digest].state is not State.CANCELLED:
        world.settle()
        for one in world.steps().values():
            one()
            world.settle()
    taken = len(world.alice.used)
    assert taken < 6
    assert world.alice.entries[digest].agreed.step == taken
    with pytest.raises(InputError, match="the job job is cancelled: it cannot be cancelled"):
        world.alice.machine.cancel(digest)
    world.alice.machine.resume(digest)
    assert world.alice.entries[digest].state not in ACTIVE
    for _ in world.finish():
        world.check()
    assert len(world.alice.used) == 6
    with pytest.raises(InputError, match="is done: it cannot be resumed"):
        world.alice.machine.resume(digest)
