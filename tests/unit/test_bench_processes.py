"""What samples of a process's memory say: something that was made once is no growth, a leak is."""

import pytest

from tacit.bench.processes import Watch, growth


def test_a_warm_up_is_no_growth_and_a_leak_is() -> None:
    warming = [(float(t), min(100.0 + 10 * t, 200.0)) for t in range(61)]
    found = growth(warming)
    assert (found.first, found.last, found.slope) == (200.0, 200.0, 0.0)
    leaking = [(1000 + t, mb + 0.05 * t + (0.5 if t % 2 else -0.5)) for t, mb in warming]
    assert growth(leaking).slope == pytest.approx(60 * 0.05, rel=0.2)
    assert growth(leaking).last > growth(leaking).first


def test_a_process_that_was_seen_once_has_no_growth() -> None:
    watch = Watch({"alice": [(0.0, 1.0)], "bob": [(0.0, 1.0), (1.0, 2.0)]})
    assert list(watch.growth()) == ["bob"]
    watch.take(2.0, {"nobody": 1 << 30})
    assert "nobody" not in watch.samples
