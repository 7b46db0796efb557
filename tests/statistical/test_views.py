"""What a party sees is uniform and says nothing about the input; and these tests can tell when it does.

A *view* is recorded over many independent runs: a tensor of N equal elements is N runs of an element-wise protocol,
each under masks of its own. Every message, what it opens to, the parts that were dealt, and pairs of them are tested
against the uniform distribution and between two inputs. Seeds are fixed, so a test passes always or never; the level is
10^-6 for a whole test, by Bonferroni's correction. Each kind of broken mask below must be noticed by the same tests.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor, nn

from engine import Recorder, prg, shared, trio
from tacit.cluster import Cluster
from tacit.mpc.correlation import Part, Party
from tacit.mpc.linear import MatMul, Multiply, load_weight, times, times_weight
from tacit.mpc.lockstep import both
from tacit.mpc.pooling import Windows, max_pool
from tacit.mpc.shares import Share
from tacit.mpc.sign import nonnegative, relu, truncate
from tacit.mpc.steps import Protocol, Role
from tacit.ring.prg import Prg

RUNS = 10_000
LEVEL = 1e-6
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass
class View:
    """What is seen in many runs, by name: one row of bytes a run, or single bits."""

    seen: dict[str, Bytes] = field(default_factory=dict)
    bits: set[str] = field(default_factory=set)

    def add(self, name: str, value: Tensor) -> None:
        if value.dtype == torch.bool:
            self.bits.add(name)
        flat = value.contiguous().view(-1).numpy()
        self.seen[name] = flat.view(np.uint8).reshape(len(flat), -1)

    def columns(self) -> Iterator[tuple[str, Bytes, int]]:
        """Every byte position (256 cells) and every bit (2 cells)."""
        for name, rows in self.seen.items():
            for position in range(rows.shape[1]):
                yield f"{name}[{position}]", rows[:, position], 2 if name in self.bits else 256


def uniformity(counts: np.ndarray[Any, Any]) -> float:
    """The chi-square test's p-value for equally likely cells."""
    expected = counts.sum() / counts.size
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1))


def homogeneity(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> float:
    """The two-sample chi-square test's p-value for counts of the same cells, from samples of one size."""
    both = left + right
    used = both > 0
    if used.sum() < 2:
        return 1.0
    return float(chi2.sf(((left - right)[used] ** 2 / both[used]).sum(), used.sum() - 1))


def smallest(values: list[tuple[str, float]]) -> tuple[float, str]:
    """The smallest p-value, corrected for how many there are, and where."""
    assert values
    name, p = min(values, key=lambda item: item[1])
    return min(1.0, p * len(values)), name


def against_uniform(view: View) -> tuple[float, str]:
    """All bytes, all single bits, and all pairs of half bytes of different things."""
    tests: list[tuple[str, float]] = []
    nibbles: list[tuple[str, Bytes, int]] = []
    for name, column, cells in view.columns():
        tests.append((name, uniformity(np.bincount(column, minlength=cells))))
        if cells == 256:
            ones = np.unpackbits(column[:, None], axis=1).sum(0)
            tests += [(f"{name} bit {i}", uniformity(np.array([n, len(column) - n]))) for i, n in enumerate(ones)]
            nibbles += [(f"{name} low", column & 15, 16), (f"{name} high", column >> 4, 16)]
        else:
            nibbles.append((name, column, 2))
    # The ends of every word say the most: the value stands in the low bytes, its sign and its range in the high ones.
    ends = [item for item in nibbles if item[0].endswith(("[0] low", "[7] high", "[0]", "[5] low"))]
    for (left, x, n), (right, y, m) in combinations(ends, 2):
        if len(x) == len(y):
            counts = np.bincount(x.astype(np.int64) * m + y, minlength=n * m)
            tests.append((f"{left} with {right}", uniformity(counts)))
    return smallest(tests)


def against_each_other(one: View, other: View) -> tuple[float, str]:
    """Whether two views have one distribution, byte by byte."""
    assert one.seen.keys() == other.seen.keys()
    tests = [
        (name, homogeneity(*(np.bincount(c, minlength=cells) for c in (column, match))))
        for (name, column, cells), (_, match, _) in zip(one.columns(), other.columns(), strict=True)
    ]
    return smallest(tests)


def accept(*views: View) -> None:
    for view in views:
        p, where = against_uniform(view)
        assert p > LEVEL, f"{where} is not uniform"
    for one, other in combinations(views, 2):
        p, where = against_each_other(one, other)
        assert p > LEVEL, f"{where} depends on the input"


# ---- protocols and their views ---------------------------------------------------------------------------------------


def product(x: Share) -> Protocol[Share]:
    return (yield from times(x, x, Multiply()))


def pool(x: Share) -> Protocol[Share]:
    return (yield from max_pool(x, Windows((2,), (2,), (0,), (1,))))


PROTOCOLS: dict[str, tuple[Callable[[Share], Protocol[Share]], int]] = {
    "truncate": (truncate, 32),
    "relu": (relu, 32),
    "nonnegative": (nonnegative, 16),
    "product": (product, 16),
    "max_pool": (pool, 16),
}
INPUTS = {"small": 0, "large": 16383 * 2**16, "negative": -(16383 * 2**16)}


def view_of(protocol: Callable[[Share], Protocol[Share]], scale: int, value: int, seed: int, role: Role) -> View:
    """What ``role`` sees in many runs on one value: its share, its parts, what it is sent, and what is opened."""
    tap, parts = Recorder(), list[Part]()
    values = torch.full((RUNS,), value << scale - 16)
    if protocol is pool:  # windows of the value and a zero
        values = torch.stack([values, torch.zeros_like(values)], 1).view(-1)
    pair = shared(values, scale, seed)
    run = trio(seed, tap)
    receive = Party.receive

    def recording(party: Party, *args: Any) -> Part:
        part = receive(party, *args)
        if party.role is role:
            parts.append(part)
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Party, "receive", recording)
        both(run, protocol, pair)
    view = View()
    other = Role.BOB if role is Role.ALICE else Role.ALICE
    view.add("own share", pair[role is Role.BOB].words)
    for i, (sent, opened) in enumerate(zip(tap.sent[other], tap.opened(), strict=True)):
        for j, (share, value_) in enumerate(zip(sent, opened, strict=True)):
            view.add(f"message {i}.{j}", share)
            view.add(f"opened {i}.{j}", value_)
    for i, part in enumerate(parts):
        for name, dealt in vars(part).items():
            for k, item in enumerate(dealt if name == "thermometers" else [dealt]):
                view.add(f"part {i} {name}{k}", item)
    return view


def two_views(name: str, role: Role = Role.BOB, inputs: tuple[str, str] = ("small", "large")) -> list[View]:
    protocol, scale = PROTOCOLS[name]
    return [view_of(protocol, scale, INPUTS[key], seed, role) for seed, key in enumerate(inputs, 10)]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_party_s_view_is_uniform_and_the_same_for_every_input(name: str, role: Role) -> None:
    accept(*two_views(name, role))


@pytest.mark.parametrize("name", ["relu", "nonnegative"])
def test_a_view_does_not_tell_the_sign(name: str) -> None:
    accept(*two_views(name, inputs=("negative", "large")))


def weighted(value: float, tap: Recorder) -> None:
    """A query to a loaded weight: 2 x 2, RUNS rows."""
    seed = 20 if value < 1 else 21
    run = trio(seed, tap)

    def load(side: Share):
        return {"w": (yield from load_weight(side, 0))}

    states = run.load(*(load(side) for side in shared(torch.full((2, 2), 3 << 16), seed=5)))
    tap.sent = {Role.ALICE: [], Role.BOB: []}
    rows = torch.full((RUNS, 2), int(value * 2**16))
    both(run, times_weight, shared(rows, seed=seed), [state["w"] for state in states], op=MatMul())


def messages(tap: Recorder) -> View:
    view = View()
    for i, (left, right, opened) in enumerate(zip(tap.sent[Role.ALICE], tap.sent[Role.BOB], tap.opened(), strict=True)):
        for j, triple in enumerate(zip(left, right, opened, strict=True)):
            for who, value in zip(("alice sends", "bob sends", "both know"), triple, strict=True):
                view.add(f"{who} {i}.{j}", value)
    return view


def test_queries_to_a_loaded_weight() -> None:
    views = []
    for value in (0.0, 9000.0):
        tap = Recorder()
        weighted(value, tap)
        views.append(messages(tap))
    accept(*views)


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 2))


def model_views(value: float, seed: int) -> tuple[View, View, View]:
    """All messages of one batch, and what the client sends to alice and to bob."""
    tap, to_alice, to_bob = Recorder(), View(), View()
    parties = Cluster(prg(seed), tap)
    private = parties.encrypt(small_model(), torch.zeros(1, 1, 4, 4))
    tap.sent = {Role.ALICE: [], Role.BOB: []}

    def seen(alice: Share, bob: Share) -> None:
        to_alice.add("share", alice.words)
        to_bob.add("share", bob.words)

    private(torch.full((4000, 1, 4, 4), value), seen=seen)
    return messages(tap), to_alice, to_bob


def test_a_small_model_and_its_client() -> None:
    one, other = (model_views(value, seed) for value, seed in ((0.0, 30), (-100.0, 31)))
    for views in zip(one, other, strict=True):
        accept(*views)


def test_weights_of_many_loads() -> None:
    views = []
    for seed, value in ((40, 0), (41, 2**29)):
        tap = Recorder()
        both(trio(seed, tap), load_weight, shared(torch.full((RUNS,), value), seed=seed), number=0)
        views.append(messages(tap))
    accept(*views)


# ---- the same tests, on broken masks ---------------------------------------------------------------------------------

stream = Prg._next
derive = Prg.derive


def zero(self: Prg, count: int) -> Bytes:
    return np.zeros_like(stream(self, count))


def narrow(self: Prg, count: int) -> Bytes:
    """Words of 32 bits."""
    out = stream(self, count)
    out[np.arange(count) % 8 >= 4] = 0
    return out


def biased(self: Prg, count: int) -> Bytes:
    """A top bit that is one in 9 of 16 words."""
    out = stream(self, count)
    rare = stream(self, count) < 32
    out[7::8] |= np.where(rare[7::8], 128, 0).astype(np.uint8)
    return out


def only_for(purpose: str, broken: Callable[[Prg, int], Bytes]) -> Callable[..., Prg]:
    """Generators for one purpose are broken, and whatever is derived elsewhere is sound."""

    def derived(self: Prg, name: str, number: int = 0) -> Prg:
        result = derive(self, name, number)
        if name == purpose:
            result._next = lambda count: broken(result, count)
        return result

    return derived


@pytest.mark.parametrize("broken", [zero, narrow, biased])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_broken_generator_is_noticed(
    name: str, broken: Callable[[Prg, int], Bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Prg, "_next", broken)
    assert against_uniform(two_views(name)[0])[0] < LEVEL


@pytest.mark.parametrize("broken", [zero, narrow])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_masks_that_are_broken_alone_are_noticed_behind_sound_shares(
    name: str, broken: Callable[[Prg, int], Bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Prg, "derive", only_for("correlation", broken))
    one, other = two_views(name)
    assert min(against_uniform(one)[0], against_uniform(other)[0]) < LEVEL
    assert against_each_other(one, other)[0] < LEVEL
    # Each message alone looks sound, since shares are: it is what it opens to that gives the input away.
    first = View({key: one.seen[key] for key in ("message 0.0",)})
    assert against_uniform(first)[0] > LEVEL


@pytest.mark.parametrize("broken", [zero, narrow, biased])
def test_broken_input_shares_are_noticed(broken: Callable[[Prg, int], Bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prg, "derive", only_for("owner", broken))
    _, to_alice, to_bob = model_views(-100.0, 31)
    assert against_uniform(to_alice)[0] < LEVEL
    assert against_uniform(to_bob)[0] < LEVEL


def test_a_selector_that_is_not_drawn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prg, "derive", only_for("provider", zero))
    one, other = two_views("relu", inputs=("negative", "large"))
    p, where = against_each_other(one, other)
    assert p < LEVEL
    assert where.startswith(("opened 1.0", "opened 2.0"))


def differences(values: tuple[int, int]) -> Tensor:
    """What two runs under one pair of parties open, subtracted."""
    tap = Recorder()
    run = trio(50, tap)
    for seed, value in enumerate(values):
        both(run, truncate, shared(torch.full((RUNS,), value), 32, seed))
    (first,), (second,) = tap.opened()
    return first - second


def test_two_runs_never_use_one_mask() -> None:
    view = View()
    view.add("difference", differences((7 << 32, 2 << 32)))
    accept(view)


def test_a_mask_used_twice_is_noticed_and_gives_the_difference_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: Prg, name: str, number: int = 0) -> Prg:
        return derive(self, name, 0 if name == "correlation" else number)

    monkeypatch.setattr(Prg, "derive", forgetful)
    view, leaked = View(), differences((7 << 32, 2 << 32))
    view.add("difference", leaked)
    assert against_uniform(view)[0] < LEVEL
    assert set(leaked.tolist()) == {5 << 32}
