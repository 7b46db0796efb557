"""The scheduler: whatever comes in whatever order, every request leaves once, in order, fairly, and in time."""

from collections import Counter, defaultdict

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tacit.errors import InputError
from tacit.party.batching import TRIES, Batch, Policy, Scheduler
from tacit.party.limits import Limits
from tacit.party.queueing import Request
from tacit.party.refusal import Reason, Refusal

SIZES = (1, 8, 64)
GONE = Refusal(Reason.FAILED, "the batch failed")
CLIENTS = ("a", "b", "c")
MODELS = ("x", "y")


def scheduler(policy: Policy | None = None, **limits: Limits) -> Scheduler:
    made = Scheduler(policy or Policy(), limits)
    for model in MODELS:
        made.add_model(model, SIZES)
        for size in SIZES:
            made.set_stock(model, size, 1000, 60.0)
    return made


def ask(id: int, client: str = "a", rows: int = 1, model: str = "x", deadline: float | None = None) -> Request:
    return Request(id, client, model, rows, deadline)


ALL = dict.fromkeys(MODELS, SIZES)

actions = st.one_of(
    st.tuples(
        st.just("submit"),
        st.sampled_from(CLIENTS),
        st.sampled_from(MODELS),
        st.sampled_from((1, 2, 3, 8, 9, 64)),
        st.booleans(),
        st.sampled_from((None, 0.003, 0.5)),
    ),
    st.tuples(st.just("form"), *(st.sets(st.sampled_from(SIZES)),) * 3),
    st.tuples(st.just("ready"), st.integers(0, 10**6)),
    st.tuples(st.just("cancel"), st.integers(0, 10**6)),
    st.tuples(st.just("end"), st.integers(0, 10**6), st.sampled_from(("done", "failed", "blamed"))),
    st.tuples(st.just("wait"), st.floats(0, 0.05)),
)


@given(st.lists(actions, max_size=80), st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_every_request_leaves_once_in_order_and_no_batch_is_too_large(events: list[tuple], queue: int) -> None:
    one = scheduler(Policy(latency_s=0.004, queue=queue, missing_s=0.02))
    now, submitted, outcome, running = 0.0, [], {}, []
    first_left: dict[tuple[str, str], list[int]] = defaultdict(list)
    times, ready = Counter(), set()

    def refused(pairs: list[tuple[Request, Refusal]]) -> None:
        for request, _ in pairs:
            assert request.id not in outcome, "refused twice"
            outcome[request.id] = "refused"

    def formed(batch: Batch, tickets: dict) -> None:
        assert batch.size in tickets[batch.model]
        assert 1 <= batch.rows <= batch.size
        for request in batch.requests:
            assert request.id not in outcome
            assert request.model == batch.model
            assert request.id in ready, "left before both parties had it"
            assert not any(request in other.requests for other in running), "in two batches at once"
            times[request.id] += 1
            if times[request.id] == 1:
                first_left[request.client, request.model].append(request.id)
            assert times[request.id] <= TRIES
        running.append(batch)

    def end(batch: Batch, how: str) -> None:
        running.remove(batch)
        if how == "done":
            one.done(now, batch, 0.001)
            outcome.update((request.id, "done") for request in batch.requests)
        else:
            refused(one.failed(now, batch, GONE, {batch.requests[0].id} if how == "blamed" else ()))

    for event in events:
        match event:
            case ("submit", client, model, rows, known, patience):
                request = ask(len(submitted), client, rows, model, None if patience is None else now + patience)
                submitted.append(request)
                if known:
                    ready.add(request.id)
                refused(one.submit(now, request, ready=known))
                assert len(one) <= queue + sum(len(batch.requests) for batch in running) + TRIES * 64
            case ("form", xs, ys, coming):
                if batch := one.form(now, tickets := {"x": xs, "y": ys}, {"x": coming}):
                    formed(batch, tickets)
            case ("ready", number) if submitted:
                request = submitted[number % len(submitted)]
                ready.add(request.id)
                one.set_ready(request.id)
            case ("cancel", number) if submitted:
                request = submitted[number % len(submitted)]
                if one.cancel(now, request.id):
                    assert request.id not in outcome
                    outcome[request.id] = "cancelled"
            case ("end", number, how) if running:
                end(running[number % len(running)], how)
            case ("wait", seconds):
                now += seconds
                refused(one.expire(now))
    while running:
        end(running[0], "done")
    for request in submitted:
        ready.add(request.id)
        one.set_ready(request.id)
    # With time and tickets enough, everything that is left gets through: nothing is forgotten, and nothing waits
    # forever for a ticket that does not come.
    while len(one):
        now = max(now + 0.004, one.wake_at(now) or 0.0)
        refused(one.expire(now))
        while batch := one.form(now, ALL, ALL):
            formed(batch, ALL)
            end(batch, "done")
    assert outcome.keys() == {request.id for request in submitted}
    for ids in first_left.values():
        assert ids == sorted(ids), "a client was overtaken by itself"
    assert one.form(now + 100, ALL) is None


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 8)), min_size=1, max_size=120),
    st.sampled_from((8, 64)),
)
@example([*zip("adabbfccdde", (6, 1, 1, 3, 5, 2, 5, 5, 5, 4, 4), strict=True)], 8)
@settings(deadline=None)
def test_whoever_comes_new_is_served_after_at_most_one_batch_for_every_other_client(
    others: list[tuple[str, int]], size: int
) -> None:
    one = scheduler()
    for id, (client, rows) in enumerate(others):
        assert not one.submit(0.0, ask(id, client, rows))
    served = one.form(1.0, {"x": [size]})
    assert served
    one.submit(1.0, ask(-1, "newcomer", 8))
    for _ in range(7):
        batch = one.form(2.0, {"x": [size]})
        assert batch
        if any(request.client == "newcomer" for request in batch.requests):
            return
    pytest.fail("the newcomer waits while the others are served again and again")


@given(st.lists(st.integers(1, 8), min_size=40, max_size=80), st.lists(st.integers(1, 8), min_size=40, max_size=80))
@settings(deadline=None)
def test_two_clients_with_much_to_ask_get_the_same_number_of_rows(many: list[int], few: list[int]) -> None:
    one = scheduler()
    ids = iter(range(10**6))
    for client, requests in (("a", many), ("b", few)):
        for rows in requests:
            assert not one.submit(0.0, ask(next(ids), client, rows))
    rows: Counter[str] = Counter()
    left = {"a": len(many), "b": len(few)}
    while all(left.values()):
        batch = one.form(1.0, {"x": [8]})
        assert batch
        for request in batch.requests:
            rows[request.client] += request.rows
            left[request.client] -= 1
        if all(left.values()):
            assert abs(rows["a"] - rows["b"]) <= 16


def test_a_full_queue_refuses_whoever_holds_most_of_it() -> None:
    one = scheduler(Policy(queue=10))
    for id in range(10):
        assert not one.submit(0.0, ask(id, "flood"))
    [(request, refusal)] = one.submit(0.0, ask(10, "flood"))
    assert (request.id, refusal.reason) == (10, Reason.BUSY)
    assert refusal.retry_after_s
    for id in range(11, 15):
        [(request, refusal)] = one.submit(0.0, ask(id, "modest"))
        assert (request.client, refusal.reason) == ("flood", Reason.BUSY)
    assert len(one) == 10
    [(request, _)] = one.submit(0.0, ask(20, "flood"))
    assert request.id == 20


def test_alone_a_request_leaves_at_once_and_in_company_it_waits_for_the_others() -> None:
    one = scheduler(Policy(latency_s=0.004))
    # One client that asks again and again has nobody to wait for.
    now = 0.0
    for id in range(50):
        assert not one.submit(now, ask(id))
        batch = one.form(now, ALL)
        assert batch
        assert (batch.size, batch.rows) == (1, 1)
        now += 0.003
        one.done(now, batch, 0.003)
    # Of sixteen that do, the first one waits for the others.
    for turn in range(30):
        batches = []
        for number in range(16):
            assert not one.submit(now, ask(1000 + 16 * turn + number, f"client {number}"))
            if batch := one.form(now, ALL):
                batches.append(batch)
            now += 0.0002
        now += 0.004
        while batch := one.form(now, ALL):
            batches.append(batch)
        now += 0.02
        for batch in batches:
            one.done(now, batch, 0.001 * (8 + batch.size))
    assert [batch.rows for batch in batches] == [8, 8]


def test_a_full_batch_or_the_last_of_those_expected_ends_the_waiting() -> None:
    one = scheduler(Policy(latency_s=10.0))
    one.submit(0.0, ask(0, "a"), ready=False)
    one.submit(0.0, ask(1, "b"))
    assert one.form(0.0, ALL) is None, "a request that will be ready soon is company"
    assert one.wake_at(0.0) == 10.0
    one.set_ready(0)
    batch = one.form(0.0, ALL)
    assert batch
    assert batch.rows == 2
    one.submit(0.0, ask(3, "a"), ready=False)
    for id in range(4, 12):
        one.submit(0.0, ask(id, "b", 8))
    assert one.form(0.0, ALL).rows == 64  # type: ignore[union-attr]


def test_the_size_that_serves_with_the_least_time_a_row_is_taken() -> None:
    one = scheduler()
    rows_to_size = {}
    for rows in (1, 5, 9, 40, 64):
        for _ in range(rows):
            one.submit(0.0, ask(id := sum(rows_to_size) * 100 + len(one) + 1000 * rows, f"client {id}"))
        batch = one.form(1.0, ALL)
        assert batch
        rows_to_size[rows] = batch.size
        one.drain(1.0, GONE)
    assert rows_to_size == {1: 1, 5: 8, 9: 8, 40: 64, 64: 64}


def test_a_larger_ticket_that_is_coming_is_waited_for_where_it_serves_what_waits_with_less() -> None:
    one = scheduler(Policy(latency_s=0.004))
    small, coming = {"x": [1]}, {"x": [8, 64]}
    one.submit(0.0, ask(0, "client 0"))
    batch = one.form(1.0, small, coming)
    assert batch, "one request is not worth the wait"
    assert batch.size == 1
    one.done(1.0, batch, 0.005)
    for id in range(1, 21):
        one.submit(1.0, ask(id, f"client {id}"))
    assert one.form(1.1, small, coming) is None
    until = one.wake_at(1.1)
    assert until is not None
    assert 1.1 < until < 1.2
    assert one.form((1.1 + until) / 2, small, coming) is None
    batch = one.form((1.1 + until) / 2, {"x": [1, 8]}, {"x": [64]})
    assert batch, "batches of 8 serve 20 with as little as one of 64"
    assert batch.size == 8
    # What does not come in time is not waited for; the next batch may wait for it again.
    assert one.form(2.0, small, coming) is None
    until = one.wake_at(2.0)
    assert until is not None
    batch = one.form(until, small, coming)
    assert batch
    assert batch.size == 1
    assert one.form(until, small, coming) is None
    # A smaller one is never waited for.
    assert one.form(until, {"x": [64]}, {"x": [1, 8]})


def test_no_ticket_is_waited_for_until_a_request_is_too_late() -> None:
    one = scheduler()
    for id in range(20):
        one.submit(0.0, ask(id, f"client {id}", deadline=0.012 if not id else None))
    # A batch of one takes 9 ms, before any was measured: after 3 ms the first would be too late.
    assert one.form(0.0, {"x": [1]}, {"x": [64]}) is None
    until = one.wake_at(0.0)
    assert until is not None
    assert 0.0 < until < 0.004
    batch = one.form(until, {"x": [1]}, {"x": [64]})
    assert batch
    assert [request.id for request in batch.requests] == [0]


def test_a_large_request_waits_for_a_large_ticket_and_lets_others_pass() -> None:
    one = scheduler()
    one.submit(0.0, ask(0, "a", 20))
    one.submit(0.0, ask(1, "b", 1))
    batch = one.form(1.0, {"x": [1, 8]})
    assert batch
    assert [request.id for request in batch.requests] == [1]
    assert one.form(1.0, {"x": [1, 8]}) is None
    batch = one.form(1.0, {"x": [64]})
    assert batch
    assert [request.id for request in batch.requests] == [0]


def test_models_take_turns() -> None:
    one = scheduler()
    for id in range(20):
        one.submit(0.0, ask(id, "a", 8, "x"))
        one.submit(0.0, ask(100 + id, "b", 8, "y"))
    order = [one.form(1.0, {"x": [8], "y": [8]}).model for _ in range(6)]  # type: ignore[union-attr]
    assert order == ["x", "y"] * 3


def test_deadlines_missing_shares_and_empty_pools_are_told_apart() -> None:
    one = scheduler(Policy(missing_s=5.0, fail_when_empty=True))
    one.submit(0.0, ask(0, deadline=1.0))
    one.submit(0.0, ask(1, "b"), ready=False)
    one.submit(0.0, ask(2, "c", 9))
    assert one.wake_at(0.0) == 0.004
    assert one.wake_at(0.5) == 1.0
    assert [(r.id, f.reason) for r, f in one.expire(2.0)] == [(0, Reason.DEADLINE)]
    one.set_stock("x", 64, 0, 12.0)
    [(request, refusal)] = one.expire(2.0)
    assert (request.id, refusal.reason, refusal.retry_after_s) == (2, Reason.EMPTY, 5.0)
    assert refusal.text == "pool empty for model 'x', 12 a minute"
    assert [(r.id, f.reason) for r, f in one.expire(6.0)] == [(1, Reason.MISSING)]
    [(_, refusal)] = one.submit(6.0, ask(3, "c", 9))
    assert refusal.reason is Reason.EMPTY
    assert [f.reason for _, f in one.submit(6.0, ask(4, deadline=6.0))] == [Reason.DEADLINE]
    assert not len(one)
    waits = scheduler(Policy(fail_when_empty=False))
    waits.set_stock("x", 64, 0, 0.0)
    assert not waits.submit(0.0, ask(0, rows=9))
    assert not waits.expire(100.0)


def test_a_client_is_held_to_its_rate_and_sizes() -> None:
    one = scheduler(a=Limits(requests_per_minute=30, largest_batch=4))
    refusals = [one.submit(0.0, ask(id)) for id in range(31)]
    assert not any(refusals[:30])
    [(_, refusal)] = refusals[30]
    assert (refusal.reason, refusal.retry_after_s) == (Reason.BUSY, 2.0)
    assert one.submit(1.9, ask(31))
    assert not one.submit(2.0, ask(32))
    for rows in (0, 5):
        [(_, refusal)] = one.submit(60.0, ask(40, rows=rows))
        assert "1 to 4 inputs" in refusal.text
    [(_, refusal)] = one.submit(60.0, ask(41, "b", 65))
    assert "1 to 64 inputs" in refusal.text
    [(_, refusal)] = one.submit(60.0, ask(42, model="unknown"))
    assert "not served" in refusal.text
    # A clock that goes back gives nothing and takes nothing.
    assert one.submit(1.0, ask(50))
    assert one.submit(3.9, ask(51))
    assert not one.submit(4.0, ask(52))


def test_what_failed_is_tried_once_more_before_what_came_later_but_not_whoever_is_to_blame() -> None:
    one = scheduler()
    for id in range(3):
        one.submit(0.0, ask(id))
    batch = one.form(1.0, {"x": [8]})
    assert batch
    one.submit(1.0, ask(3))
    assert [request.id for request, _ in one.failed(1.0, batch, GONE, {1})] == [1]
    batch = one.form(2.0, {"x": [8]})
    assert batch
    assert [request.id for request in batch.requests] == [0, 2, 3]
    assert {request.id for request, _ in one.failed(2.0, batch, GONE)} == {0, 2}
    batch = one.form(3.0, {"x": [8]})
    assert batch
    assert [request.id for request in batch.requests] == [3]


def test_a_model_that_is_dropped_takes_what_waits_with_it_and_what_runs_ends() -> None:
    one = scheduler()
    one.submit(0.0, ask(0))
    running = one.form(0.0, ALL)
    assert running
    one.submit(0.0, ask(1))
    assert [request.id for request, _ in one.drop_model(0.0, "x", GONE)] == [1]
    one.add_model("x", SIZES)
    assert [request.id for request, _ in one.failed(0.0, running, GONE)] == [0]
    assert not len(one)


def test_a_number_that_waits_already_is_refused() -> None:
    one = scheduler()
    one.submit(0.0, ask(0))
    with pytest.raises(InputError, match="used once"):
        one.submit(0.0, ask(0))


def test_reminders_of_what_has_left_are_forgotten() -> None:
    one = scheduler()
    for id in range(20_000):
        one.submit(0.0, ask(id, deadline=1000.0))
        batch = one.form(0.0, ALL)
        assert batch
        one.done(0.0, batch, 0.001)
    assert len(one._reminders) < 5000
