"""Which tickets are asked for next: the lowest line first, never beyond the limit, and nobody is left with nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacit.errors import InputError
from tacit.party.refill import PORTION, PORTION_BYTES, Line, Rate, Refill, Trim, Wanted, next_step, targets

A, B, C = (("aa" * 32, 1), ("aa" * 32, 64), ("bb" * 32, 8))


def test_the_lowest_level_is_refilled_first_in_portions() -> None:
    wanted = [Wanted(A, 64, 100), Wanted(B, 64, 100), Wanted(C, 8, 100)]
    assert next_step(wanted, {}, 10**6, 10**6) == Refill(A, PORTION)
    assert next_step(wanted, {A: 16}, 10**6, 10**6) == Refill(B, PORTION)
    assert next_step(wanted, {A: 16, B: 32}, 10**6, 10**6) == Refill(C, 8)
    assert next_step(wanted, {A: 16, B: 32, C: 7}, 10**6, 10**6) == Refill(A, PORTION)
    assert next_step(wanted, {A: 60, B: 64, C: 8}, 10**6, 10**6) == Refill(A, 4)
    assert next_step(wanted, {A: 64, B: 64, C: 8}, 10**6, 10**6) is None
    assert next_step([], {A: 5}, 10**6, 0) is None
    assert next_step([Wanted(A, 0, 1)], {}, 10**6, 10**6) is None
    assert next_step([Wanted(A, 64, PORTION_BYTES // 2)], {}, 1 << 40, 1 << 40) == Refill(A, 2)
    assert next_step([Wanted(A, 64, PORTION_BYTES * 9)], {}, 1 << 40, 1 << 40) == Refill(A, 1)


def test_where_not_everything_fits_everybody_gets_the_same_fraction() -> None:
    wanted = [Wanted(A, 100, 10), Wanted(B, 10, 1000)]
    assert targets(wanted, 5500) == {A: 50, B: 5}
    assert targets(wanted, 10**6) == {A: 100, B: 10}
    assert targets(wanted, 0) == {A: 0, B: 0}
    assert targets([], 100) == {}
    # What rounding down leaves goes to those that would have none.
    assert targets([Wanted(A, 4, 60), Wanted(B, 4, 60)], 130) == {A: 1, B: 1}


def test_a_new_model_finds_room_where_an_idle_one_fills_the_pool() -> None:
    wanted = [Wanted(A, 10, 100), Wanted(B, 10, 300)]
    levels = {A: 10}
    steps = []
    while (step := next_step(wanted, levels, 1000, 1000 - 100 * levels[A] - 300 * levels.get(B, 0))) and len(
        steps
    ) < 20:
        steps.append(step)
        levels[step.line] = levels.get(step.line, 0) + (step.count if isinstance(step, Refill) else -step.count)
    assert steps == [Trim(A, 3), Refill(B, 1), Trim(A, 3), Refill(B, 1)]
    assert levels == {A: 4, B: 2}


def test_tickets_that_nobody_wants_any_more_make_room_first() -> None:
    assert next_step([Wanted(A, 4, 100)], {C: 9}, 1000, 50) == Trim(C, 9)
    assert next_step([Wanted(A, 4, 2000)], {C: 9}, 1000, 50) is None, "it never fits"


lines = st.builds(
    lambda lines: [Wanted(line, ahead, size) for line, (ahead, size) in lines.items()],
    st.dictionaries(
        st.sampled_from([A, B, C, ("cc" * 32, 2)]), st.tuples(st.integers(0, 40), st.integers(1, 500)), min_size=1
    ),
)


@given(lines, st.dictionaries(st.sampled_from([A, B, C]), st.integers(0, 60)), st.integers(0, 20_000))
def test_following_it_fills_every_share_and_never_exceeds_the_limit(
    wanted: list[Wanted], levels: dict[Line, int], limit: int
) -> None:
    sizes = {one.line: one.ticket_bytes for one in wanted}
    shares = targets(wanted, limit)
    assert sum(count * sizes[line] for line, count in shares.items()) <= limit
    assert all(count <= one.ahead for one in wanted for count in [shares[one.line]])
    # What was there before may exceed a limit that was lowered since.
    taken = sum(level * sizes.get(line, 1) for line, level in levels.items())
    for _ in range(2000):
        step = next_step(wanted, levels, limit, max(0, limit - taken))
        if step is None:
            break
        assert step.count > 0
        if isinstance(step, Refill):
            assert step.count * sizes[step.line] <= limit - taken
            low = [one for one in wanted if levels.get(one.line, 0) < shares[one.line]]
            fraction = {one.line: levels.get(one.line, 0) / one.ahead for one in low}
            assert fraction[step.line] == min(fraction.values())
        else:
            assert levels[step.line] - step.count >= shares.get(step.line, 0), "nobody is trimmed below its share"
        change = step.count if isinstance(step, Refill) else -step.count
        levels = {**levels, step.line: levels.get(step.line, 0) + change}
        taken += change * sizes.get(step.line, 1)
    else:
        pytest.fail("it never comes to an end")
    assert all(levels.get(line, 0) >= count for line, count in shares.items())


def test_nonsense_is_refused() -> None:
    for settings in ((A, -1, 10), (A, 1, 0)):
        with pytest.raises(InputError):
            Wanted(*settings)


def test_the_rate_counts_from_when_it_was_asked() -> None:
    rate = Rate(window_s=60.0)
    assert rate.per_minute(A, 0.0) == 0.0
    rate.came(A, 10, 100.0, 110.0)
    assert rate.per_minute(A, 110.0) == 60.0
    assert rate.per_minute(B, 110.0) == 0.0
    rate.came(A, 10, 110.0, 120.0)
    assert rate.per_minute(A, 120.0) == 60.0
    assert rate.per_minute(A, 140.0) == 30.0
    assert rate.per_minute(A, 175.0) == pytest.approx(600 / 65)
    assert rate.per_minute(A, 500.0) == 0.0
