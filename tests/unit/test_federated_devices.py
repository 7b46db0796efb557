"""Simulated devices: eligibility, habits, traces, speeds and the virtual clock of a round."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tacit.errors import DataError, InputError
from tacit.federated.devices import AlwaysOn, Fleet, Speeds, Timeline
from tacit.federated.devices_draws import normal, uniform
from tacit.federated.devices_habits import SLOT, Habits
from tacit.federated.devices_schedule import (
    DROPPED,
    FAILED,
    LATE,
    NOT_NEEDED,
    RoundPolicy,
    Schedule,
    open_round,
    schedule,
)
from tacit.federated.devices_trace import Trace
from tacit.federated.eligibility import DAY, HOUR, DeviceStatus, Eligibility, FleetStatus
from tacit.federated.selection import Uniform

EXACT = Speeds(examples=10, down=100, up=50, compute_spread=0, link_spread=0, jitter=0, overhead=1, failures=0)
WEEK = """device,start,end,idle,charging,unmetered,offset
1,0,100,1,1,1,0
0,50,150,1,1,1,0
0,200,300,1,0,1,0
0,300,400,1,1,1,0
3,400,500,1,1,0,0
3,500,600,1,1,1,0
"""

policies = st.builds(
    Eligibility,
    idle=st.booleans(),
    charging=st.booleans(),
    unmetered=st.booleans(),
    hours=st.none()
    | st.tuples(st.integers(0, 11), st.integers(12, 23)).flatmap(lambda h: st.sampled_from([h, h[::-1]])),
    battery=st.sampled_from([0.0, 0.5, 1.0]),
)
statuses = st.builds(
    DeviceStatus,
    idle=st.booleans(),
    charging=st.booleans(),
    unmetered=st.booleans(),
    hour=st.floats(0, 23.99),
    battery=st.floats(0, 1),
    online=st.booleans(),
)


@given(policies, st.lists(statuses, min_size=1, max_size=20))
def test_the_policy_says_the_same_of_a_site_and_of_a_fleet(policy: Eligibility, sites: list[DeviceStatus]) -> None:
    fleet = FleetStatus(
        *(torch.tensor([getattr(s, name) for s in sites]) for name in ("idle", "charging", "unmetered")),
        *(torch.tensor([getattr(s, name) for s in sites], dtype=torch.float64) for name in ("hour", "battery")),
        torch.tensor([s.online for s in sites]),
    )
    assert policy.mask(fleet).tolist() == [policy.allows(site) for site in sites]
    assert [fleet[i] for i in range(len(sites))] == sites
    assert all(policy.allows(site) == (not policy.refusals(site)) for site in sites)


def test_refusals_by_hand() -> None:
    policy = Eligibility(hours=(22, 6), battery=0.8)
    assert policy.allows(DeviceStatus(True, True, True, hour=23))
    assert policy.allows(DeviceStatus(True, True, True, hour=5.9, battery=0.8))
    assert policy.refusals(DeviceStatus(False, False, False, hour=6, battery=0.79, online=False)) == (
        "offline",
        "in use",
        "not charging",
        "on a metered network",
        "outside the hours 22 to 6",
        "battery below 80%",
    )
    assert Eligibility(hours=(9, 17)).refusals(DeviceStatus(True, True, True, hour=17)) == (
        "outside the hours 9 to 17",
    )
    nothing = Eligibility(idle=False, charging=False, unmetered=False)
    assert nothing.allows(DeviceStatus(False, False, False, hour=12))
    assert not nothing.allows(DeviceStatus(False, False, False, hour=12, online=False))


def test_draws_are_uniform_normal_and_apart() -> None:
    """Kolmogorov's distance at the 0.1 % level is 1.95 / √n; a draw squared is far beyond it."""
    devices = torch.arange(20_000)
    grid = (torch.arange(20_000) + 0.5) / 20_000

    def distance(sample: Tensor) -> float:
        return float((sample.sort().values - grid).abs().max())

    u = uniform(3, "a", devices)
    assert distance(u) < 1.95 / math.sqrt(20_000) < distance(u**1.05)
    assert distance(torch.special.ndtr(normal(3, "a", devices))) < 1.95 / math.sqrt(20_000)
    others = [uniform(3, "b", devices), uniform(4, "a", devices), uniform(3, "a", devices, torch.tensor(0))]
    others += [uniform(3, "a", torch.tensor(day), devices) for day in (-1, 0, 1)]
    for other in (*others, u.roll(1)):
        assert abs(float(torch.corrcoef(torch.stack([u, other]))[0, 1])) < 4 / math.sqrt(20_000)
    assert torch.equal(uniform(3, "a", devices[7000:7010]), u[7000:7010])


def test_habits_do_not_depend_on_what_is_asked() -> None:
    fleet = Fleet.of_phones(500, seed=5)
    whole = fleet.eligible(30 * HOUR)
    some = torch.tensor([3, 499, 250])
    assert torch.equal(fleet.eligible(30 * HOUR, some), whole[some])
    assert torch.equal(Fleet.of_phones(500, seed=5).eligible(30 * HOUR), whole)
    assert not torch.equal(Fleet.of_phones(500, seed=6).eligible(30 * HOUR), whole)


def test_phones_are_eligible_at_night() -> None:
    """In one time zone: most at three in the morning, few at noon, none of it the same every day."""
    fleet = Fleet(Habits(4000, zones={-5.0: 1.0}))
    share = [float(fleet.eligible((hour + 5) * HOUR).double().mean()) for hour in range(24)]
    assert 0.6 < share[3] < 0.85
    assert share[3] > 4 * share[12]
    assert max(range(24), key=share.__getitem__) in (2, 3, 4)
    assert not torch.equal(fleet.eligible(8 * HOUR), fleet.eligible(8 * HOUR + DAY))
    availability = fleet.availability(samples=12)
    assert availability.shape == (4000,)
    assert float(availability.mean()) == pytest.approx(sum(share) / 24, abs=0.03)
    most = availability.sort(descending=True).values
    assert float(most[:1200].sum() / most.sum()) > 0.4


@pytest.mark.parametrize("timeline", [Habits(40, seed=2), AlwaysOn(40)], ids=["habits", "always on"])
def test_eligibility_ends_and_begins_where_a_fine_clock_says(timeline: Timeline) -> None:
    fleet, devices = Fleet(timeline, Eligibility(hours=(1.5, 11.25))), torch.arange(40)
    start, span, step = 10 * HOUR + 7, 6 * HOUR, 20.0
    ticks = [start + step * i for i in range(int(span / step))]
    seen = torch.stack([fleet.eligible(tick) for tick in ticks])
    until, following = fleet.eligible_until(devices, start, span), fleet.next_eligible(devices, start, span)
    for device in range(40):
        column = seen[:, device].tolist()
        stops = ticks[column.index(False)] if False in column else start + span
        begins = ticks[column.index(True)] if True in column else math.inf
        assert stops - step <= float(until[device]) <= stops
        assert float(following[device]) == begins or begins - step <= float(following[device]) <= begins
    assert len(set(until.tolist())) > (10 if isinstance(timeline, Habits) else 0)


def test_habits_change_only_where_they_say() -> None:
    habits, devices = Habits(200), torch.arange(200)
    time = torch.full((200,), 12345.0, dtype=torch.float64)
    change = habits.next_change(devices, time)
    assert bool(((change > time) & (change <= time + SLOT)).all())
    before = change - 1e-6
    now, later = habits.status(devices, time), habits.status(devices, before)
    for name in ("idle", "charging", "unmetered", "hour"):
        assert torch.equal(getattr(now, name), getattr(later, name))


def trace(tmp_path: Path, text: str, **options: float) -> Trace:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return Trace.read(path, **options)


def test_a_trace_is_read_as_it_stands(tmp_path: Path) -> None:
    fleet = Fleet(trace(tmp_path, WEEK))
    assert fleet.clients == 4
    times = {
        0: [1],
        50: [0, 1],
        99.9: [0, 1],
        100: [0],
        149: [0],
        150: [],
        250: [],
        300: [0],
        450: [],
        550: [3],
        600: [],
    }
    for time, expected in times.items():
        assert fleet.eligible(time).nonzero().flatten().tolist() == expected
    everyone = torch.arange(4)
    assert fleet.next_eligible(everyone, 120.0).tolist() == [120, math.inf, math.inf, 500]
    assert fleet.next_eligible(everyone, 160.0).tolist() == [300, math.inf, math.inf, 500]
    assert fleet.next_eligible(everyone, 0.0, limit=200).tolist() == [50, 0, math.inf, math.inf]
    assert fleet.eligible_until(everyone, 60.0, 1000.0).tolist() == [150, 100, 60, 60]
    assert fleet.eligible_until(everyone, 60.0, 25.0).tolist() == [85, 85, 60, 60]
    without_mains = Fleet(fleet.timeline, Eligibility(charging=False))
    assert without_mains.eligible_until(everyone, 200.0, 1000.0).tolist() == [400, 200, 200, 200]


def test_a_trace_repeats(tmp_path: Path) -> None:
    fleet = Fleet(trace(tmp_path, WEEK, clients=6, period=700.0))
    assert fleet.clients == 6
    for time in (0.0, 60.0, 320.0, 650.0):
        assert torch.equal(fleet.eligible(time), fleet.eligible(time + 7000.0))
    assert fleet.next_eligible(torch.tensor([0, 5]), 500.0).tolist() == [750, math.inf]
    assert fleet.eligible_until(torch.tensor([1]), 701.0, 1e4).tolist() == [800]


@given(
    st.dictionaries(st.integers(0, 3), st.lists(st.integers(0, 30), unique=True, max_size=8), min_size=1).filter(
        lambda devices: any(len(times) > 1 for times in devices.values())
    ),
    st.booleans(),
    st.integers(0, 90),
)
def test_any_trace_is_read_as_its_rows_say(devices: dict[int, list[int]], repeats: bool, start: int) -> None:
    """Against a list of the seconds at which each device is there; the status changes on whole seconds only."""
    rows = [(d, *span) for d, times in devices.items() for span in zip(*[iter(sorted(times))] * 2, strict=False)]
    text = "device,start,end\n" + "".join(f"{d},{begin},{end}\n" for d, begin, end in reversed(rows))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "trace.csv").write_text(text)
        fleet = Fleet(Trace.read(Path(folder) / "trace.csv", clients=4, period=30.0 if repeats else None))

    def there(device: int, second: int) -> bool:
        return any(d == device and begin <= (second % 30 if repeats else second) < end for d, begin, end in rows)

    everyone, limit = torch.arange(4), 40
    until, following = fleet.eligible_until(everyone, start, limit), fleet.next_eligible(everyone, start, limit)
    assert fleet.eligible(start + 0.5).tolist() == [there(device, start) for device in range(4)]
    for device in range(4):
        seen = [there(device, second) for second in range(start, start + limit)]
        assert float(until[device]) == start + (seen.index(False) if False in seen else limit)
        assert float(following[device]) == (start + seen.index(True) if True in seen else math.inf)


def test_a_trace_across_its_end_goes_on(tmp_path: Path) -> None:
    fleet = Fleet(trace(tmp_path, "device,start,end\n0,0,10\n0,90,100\n", period=100.0))
    assert fleet.eligible_until(torch.tensor([0]), 95.0, 50.0).tolist() == [110]


def test_local_hours_in_a_trace(tmp_path: Path) -> None:
    """Ten hours west of UTC, the hours 22 to 6 begin at 8:00 UTC."""
    always = trace(tmp_path, "device,start,end,offset\n0,0,864000,-10\n1,0,864000,0\n")
    fleet = Fleet(always, Eligibility(hours=(22, 6)))
    both = torch.tensor([0, 1])
    assert fleet.next_eligible(both, 7 * HOUR).tolist() == pytest.approx([8 * HOUR, 22 * HOUR])
    assert fleet.eligible_until(both, 10 * HOUR, 2 * DAY).tolist() == pytest.approx([16 * HOUR, 10 * HOUR])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "line 1 has the columns none"),
        ("device,start\n0,1\n", "line 1 has the columns device, start"),
        ("device,start,end,colour\n0,1,2,3\n", "colour"),
        ("device,start,end,end\n0,1,2,3\n", "each once"),
        ("device,start,end\n", "has no row after its header"),
        ("device,start,end\n0,1\n", "line 2 has 2 fields, expected 3"),
        ("device,start,end\n0,0,9\n0,x,2\n", "line 3 has start 'x', expected a number"),
        ("device,start,end\n0,2,2\n", "line 2 lasts from 2 to 2"),
        ("device,start,end\n0,nan,2\n", "line 2 lasts from nan to 2"),
        ("device,start,end\n0,0,inf\n", "line 2 lasts from 0 to inf"),
        ("device,start,end\n0,-1,2\n", "line 2 lasts from -1 to 2"),
        ("device,start,end\n1.5,0,2\n", "line 2 has device 1.5"),
        ("device,start,end\nnan,0,2\n", "line 2 has device nan"),
        ("device,start,end\n-1,0,2\n", "line 2 has device -1"),
        ("device,start,end\n1e300,0,2\n", "line 2 has device 1e+300"),
        ("device,start,end,idle\n0,0,2,2\n", "line 2 has idle 2, expected 0 or 1"),
        ("device,start,end,battery\n0,0,2,1.1\n", "line 2 has battery 1.1"),
        ("device,start,end,offset\n0,0,2,99\n", "line 2 has offset 99"),
        ("device,start,end\n0,5,9\n1,0,9\n0,0,6\n", "line 2 overlaps line 4, both of device 0"),
        ('device,start,end\n0,"5,9\n', "is not a CSV file"),
    ],
)
def test_bad_traces_name_the_file_and_the_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(DataError) as caught:
        trace(tmp_path, text)
    assert complaint in str(caught.value)
    assert "trace.csv" in str(caught.value)


def test_traces_beyond_what_was_promised(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 7 ends at 600, expected no later than the period, 550"):
        trace(tmp_path, WEEK, period=550.0)
    with pytest.raises(DataError, match="line 6 has device 3, expected a whole number from 0 to 2"):
        trace(tmp_path, WEEK, clients=3)
    with pytest.raises(DataError, match="cannot be read"):
        Trace.read(tmp_path / "missing.csv")
    (tmp_path / "binary.csv").write_bytes(b"device,start,end\n\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        Trace.read(tmp_path / "binary.csv")


def test_durations_by_hand() -> None:
    fleet = Fleet(AlwaysOn(3), speeds=EXACT)
    durations = fleet.durations(torch.tensor([0, 2]), torch.tensor([20, 50]), 300, 100, round=1)
    assert durations.tolist() == [1 + 2 + 3 + 2, 1 + 5 + 3 + 2]


def test_durations_spread_as_they_should() -> None:
    """Compute alone: the logarithm is normal with the spread given, jitter comes on top and changes by round."""
    speeds = Speeds(examples=50, compute_spread=0.7, jitter=0.0, overhead=0.0)
    devices, work = torch.arange(20_000), torch.full((20_000,), 100)
    logs = Fleet(AlwaysOn(20_000), speeds=speeds).durations(devices, work, 0, 0, round=1).log()
    assert float(logs.mean()) == pytest.approx(math.log(2), abs=0.02)
    assert float(logs.std()) == pytest.approx(0.7, abs=0.015)
    jittery = Fleet(AlwaysOn(20_000), speeds=Speeds(examples=50, compute_spread=0.7, jitter=0.2, overhead=0.0))
    a, b = (jittery.durations(devices, work, 0, 0, round=r).log() for r in (1, 2))
    assert float((a - b).std()) == pytest.approx(0.2 * math.sqrt(2), abs=0.01)


def test_failures_have_their_rate() -> None:
    """Half an hour at one failure an hour: 1 − exp(−1/2) fail."""
    fleet = Fleet(AlwaysOn(10_000), speeds=Speeds(failures=1.0))
    attempts = fleet.attempt(torch.arange(10_000), 0.0, torch.full((10_000,), 1800.0, dtype=torch.float64), round=1)
    assert float((~attempts.finished).double().mean()) == pytest.approx(1 - math.exp(-0.5), abs=0.02)
    assert torch.equal(attempts.failed, ~attempts.finished)
    assert bool((attempts.end[attempts.failed] < 1800).all())


def run(fleet: Fleet, policy: RoundPolicy, invited: list[int], start: float, examples: list[int]) -> Schedule:
    return schedule(fleet, policy, invited, start, examples=torch.tensor(examples), bytes_down=0, bytes_up=0, round=1)


def test_a_round_by_hand(tmp_path: Path) -> None:
    """Device 1 stops being eligible at 100; the others take 1 s and a tenth of a second an example."""
    rows = "device,start,end\n0,0,1000\n1,0,100\n2,0,1000\n3,0,1000\n"
    fleet = Fleet(trace(tmp_path, rows), speeds=EXACT)
    examples = [90, 200, 190, 490]
    assert run(fleet, RoundPolicy(), [0, 1, 2, 3], 90.0, examples) == Schedule((0, 2, 3), {1: DROPPED}, 90, 140)
    late = run(fleet, RoundPolicy(deadline=30), [0, 1, 2, 3], 90.0, examples)
    assert late == Schedule((0, 2), {1: DROPPED, 3: LATE}, 90, 120)
    closed = run(fleet, RoundPolicy(close_at=1), [0, 1, 2, 3], 90.0, examples)
    assert closed == Schedule((0,), {1: DROPPED, 2: NOT_NEEDED, 3: NOT_NEEDED}, 90, 100)
    open_end = run(fleet, RoundPolicy(close_at=4, minimum=1), [0, 1, 2, 3], 90.0, examples)
    assert open_end.finished == (0, 2, 3)
    abandoned = run(fleet, RoundPolicy(deadline=15, minimum=2), [0, 1, 2, 3], 90.0, examples)
    reason = "round abandoned: 1 finished, at least 2 needed"
    assert abandoned == Schedule((), {0: reason, 1: DROPPED, 2: LATE, 3: LATE}, 90, 105)
    assert run(fleet, RoundPolicy(), [], 90.0, []) == Schedule((), {}, 90, 90)


def test_ties_go_to_the_lower_index() -> None:
    fleet = Fleet(AlwaysOn(5), speeds=EXACT)
    assert run(fleet, RoundPolicy(close_at=2), [1, 2, 4], 0.0, [10, 10, 10]).finished == (1, 2)


def test_everyone_drops_out(tmp_path: Path) -> None:
    fleet = Fleet(trace(tmp_path, "device,start,end\n0,0,10\n1,0,20\n"), speeds=EXACT)
    assert run(fleet, RoundPolicy(), [0, 1], 5.0, [990, 990]) == Schedule(
        (), {0: "dropped out: no longer eligible", 1: DROPPED}, 5, 20
    )


def test_failures_are_named() -> None:
    fleet = Fleet(AlwaysOn(50), speeds=Speeds(failures=1e6))
    lost = run(fleet, RoundPolicy(), list(range(50)), 0.0, [10] * 50).lost
    assert set(lost.values()) == {FAILED}


@given(st.integers(0, 1000), st.sampled_from([None, 5, 40]), st.sampled_from([None, 10.0, 60.0]), st.integers(1, 5))
def test_every_invited_client_is_accounted_for(
    seed: int, close: int | None, deadline: float | None, least: int
) -> None:
    fleet = Fleet.of_phones(200, seed, Eligibility(idle=False, unmetered=False), Speeds(failures=60.0))
    start = seed * 977.0
    eligible = fleet.eligible(start).nonzero().flatten()
    policy = RoundPolicy(close_at=close, deadline=deadline, minimum=least)
    ran = run(fleet, policy, eligible.tolist(), start, [50 + seed] * len(eligible))
    assert sorted((*ran.finished, *ran.lost)) == eligible.tolist()
    assert len(ran.finished) == 0 or len(ran.finished) >= least
    assert close is None or len(ran.finished) <= close
    assert start <= ran.end <= start + (deadline or math.inf)
    assert ran == run(fleet, policy, eligible.tolist(), start, [50 + seed] * len(eligible))


def test_a_round_waits_until_enough_are_eligible(tmp_path: Path) -> None:
    fleet, sizes = Fleet(trace(tmp_path, WEEK)), torch.tensor([5, 5, 5, 5])
    opening = open_round(fleet, RoundPolicy(minimum=2, wait=20), sizes, 0.0)
    assert (opening.time, opening.eligible.tolist(), opening.reason) == (60.0, [True, True, False, False], "")
    never = open_round(fleet, RoundPolicy(minimum=2, wait=20, max_waits=10), sizes, 100.0)
    assert (never.time, never.reason) == (
        300.0,
        "the cohort did not fill: 2 needed, at most 1 were eligible within 200 s",
    )
    assert open_round(fleet, RoundPolicy(wait=20), torch.tensor([0, 5, 5, 5]), 110.0).time == 510.0
    with pytest.raises(InputError, match="needs 5 clients, but only 4 have examples"):
        open_round(fleet, RoundPolicy(close_at=5), sizes, 0.0)
    with pytest.raises(InputError, match="a fleet of 4 devices for 3 clients"):
        open_round(fleet, RoundPolicy(), sizes[:3], 0.0)


def test_over_selection() -> None:
    assert RoundPolicy(over_selection=1.3).invitation(Uniform(10), 100) == Uniform(13)
    assert RoundPolicy().invitation(Uniform(10), 100) == Uniform(10)


def test_a_million_devices() -> None:
    fleet = Fleet.of_phones(1_000_000)
    eligible = fleet.eligible(8 * HOUR)
    assert 500_000 < int(eligible.sum()) < 900_000
    cohort = Uniform(1000).select(1, torch.ones(1_000_000), eligible, torch.Generator().manual_seed(0))
    policy = RoundPolicy(deadline=120, close_at=900)
    ran = run(fleet, policy, list(cohort), 8 * HOUR, [60] * 1000)
    assert len(ran.finished) == 900


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Eligibility(hours=(6, 6)), "hours=(6, 6)"),
        (lambda: Eligibility(hours=(24, 6)), "hours=(24, 6)"),
        (lambda: Eligibility(battery=2), "battery=2"),
        (lambda: DeviceStatus(True, True, True, hour=24), "hour=24"),
        (lambda: DeviceStatus(True, True, True, hour=math.nan), "hour=nan"),
        (lambda: DeviceStatus(True, True, True, hour=1, battery=-1), "battery=-1"),
        (lambda: Habits(0), "clients=0"),
        (lambda: Habits(5, zones={}), "zones={}"),
        (lambda: Habits(5, zones={0.0: math.nan}), "zones="),
        (lambda: Habits(5, zones={20.0: 1.0}), "-12 to 14 hours"),
        (lambda: Speeds(examples=0), "examples=0"),
        (lambda: Speeds(up=math.inf), "up=inf"),
        (lambda: Speeds(jitter=-1), "jitter=-1"),
        (lambda: Speeds(failures=math.nan), "failures=nan"),
        (lambda: RoundPolicy(over_selection=0), "over_selection=0"),
        (lambda: RoundPolicy(deadline=0), "deadline=0"),
        (lambda: RoundPolicy(minimum=0), "minimum=0"),
        (lambda: RoundPolicy(close_at=2, minimum=3), "close_at=2: a round cannot close before its minimum, 3"),
        (lambda: RoundPolicy(wait=0), "wait=0"),
        (lambda: RoundPolicy(max_waits=-1), "max_waits=-1"),
        (lambda: Fleet.of_phones(3).next_eligible(torch.arange(3), 0.0, math.inf), "limit=inf"),
        (lambda: Trace.read(Path("x"), clients=0), "clients=0"),
        (lambda: Trace.read(Path("x"), period=0.0), "period=0.0"),
    ],
)
def test_bad_settings_are_named(make, complaint: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert complaint in str(caught.value)
