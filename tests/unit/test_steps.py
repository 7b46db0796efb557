"""Running protocols: rounds merge, the parties must agree on every step, randomness is handed out once, in order."""

import gc
import weakref
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from engine import Pair, Recorder, shared, total, trio, words
from tacit.errors import CorrelationError
from tacit.mpc.correlation import Correlation, Field, Part, Provider
from tacit.mpc.linear import MatMul, Multiply, Product, times
from tacit.mpc.lockstep import Meter, both, plan, wire_bytes
from tacit.mpc.pooling import Windows, max_pool
from tacit.mpc.shares import Share
from tacit.mpc.sign import Mask, Window, maximum, nonnegative, relu, truncate
from tacit.mpc.steps import Enter, Open, Protocol, Take, Task, dataflow, together


def opening(x: Tensor) -> Protocol[Tensor]:
    (result,) = yield Open(x)
    return result


def rounds_of(protocol, *pairs: Pair, **options: object) -> int:
    meter = Meter()
    trio().run(*(protocol(*(pair[i] for pair in pairs), **options) for i in range(2)), meter)
    return meter.rounds


def two_relus(x: Share, y: Share) -> Protocol[list[Share]]:
    return (yield from together(relu(x), relu(y)))


X, Y = words(1, (3, 4), 2**24), words(2, (3, 4), 2**24)


class TestDataflow:
    def test_independent_protocols_share_their_rounds(self) -> None:
        x, y = shared(X, 32), shared(Y, 32, 1)
        assert rounds_of(relu, x) == 3
        assert rounds_of(two_relus, x, y) == 3
        alice, bob = both(trio(), two_relus, x, y)
        for pair, plain in zip(zip(alice, bob, strict=True), (X, Y), strict=True):
            assert int((total(pair) - (plain.clamp(min=0) >> 16)).abs().max()) <= 1

    def test_protocols_of_different_length_share_what_they_can(self) -> None:
        def mixed(x: Share, y: Share):
            return (yield from together(relu(x), truncate(y), times(x, y, Multiply())))

        assert rounds_of(mixed, shared(X, 32), shared(Y, 32)) == 3

    def test_what_depends_on_another_waits_for_it_and_no_longer(self) -> None:
        def graph(x: Share, y: Share):
            tasks = [
                Task("first", (), lambda: truncate(x)),
                Task("local", ("first",), lambda v: -v),
                Task("second", ("local",), relu),
                Task("side", (), lambda: relu(y)),
                Task("sum", ("second", "side"), lambda a, b: a + b),
            ]
            return (yield from dataflow(tasks, ["sum"]))

        x, y = shared(X, 32), shared(Y, 32, 1)
        assert rounds_of(graph, x, y) == 4
        alice, bob = both(trio(), graph, x, y)
        assert alice.keys() == {"sum"}
        plain = ((-X).clamp(min=0) >> 16) + (Y.clamp(min=0) >> 16)
        assert int((total((alice["sum"], bob["sum"])) - plain).abs().max()) <= 3

    def test_a_result_is_dropped_after_its_last_use(self) -> None:
        alive: list[bool] = []

        def graph(x: Share):
            references = []

            def large() -> Share:
                result = x.map(torch.clone)
                references.append(weakref.ref(result))
                return result

            def probe(*_: object) -> Share:
                gc.collect()
                alive.append(references[0]() is not None)
                return x

            tasks = [
                Task("large", (), large),
                Task("user", ("large",), lambda v: truncate(v)),
                Task("early", (), probe),
                Task("late", ("user",), probe),
            ]
            return (yield from dataflow(tasks, ["late"]))

        both(trio(), graph, shared(X, 32))
        assert alive == [True, True, False, False]  # early at alice and at bob, then late at both

    def test_what_is_kept_is_not_dropped(self) -> None:
        def graph(x: Share):
            tasks = [Task("a", (), lambda: x), Task("b", ("a",), lambda v: v + v)]
            return (yield from dataflow(tasks, ["a", "b"]))

        alice, _ = both(trio(), graph, shared(X))
        assert alice.keys() == {"a", "b"}

    def test_a_value_may_be_taken_twice(self) -> None:
        def graph(x: Share):
            tasks = [Task("a", (), lambda: x), Task("b", ("a", "a"), lambda v, w: v + w)]
            return (yield from dataflow(tasks, ["b"]))

        alice, bob = both(trio(), graph, shared(X))
        assert torch.equal(total((alice["b"], bob["b"])), 2 * X)

    def test_labels_nest_and_costs_go_to_the_outermost(self) -> None:
        def graph(x: Share, y: Share):
            tasks = [Task("pair", (), lambda: two_relus(x, y)), Task("single", (), lambda: truncate(x))]
            return (yield from dataflow(tasks, ["pair", "single"]))

        tap, meter = Recorder(), Meter()
        pairs = shared(X, 32), shared(Y, 32)
        trio(tap=tap).run(*(graph(*(pair[i] for pair in pairs)) for i in range(2)), meter)
        assert tap.labels == [("pair/0", "pair/1", "single"), *[("pair/0", "pair/1")] * 2]
        assert meter.layers["pair"].rounds == 3
        assert meter.layers["pair"].bytes_online == 2 * (8 * 12 + 12 + 2)
        assert meter.layers["single"].rounds == 1
        assert meter.layers["single"].bytes_online == 8 * 12
        assert meter.layers["pair"].bytes_dealt == 2 * 12 * 76
        assert meter.layers["single"].bytes_dealt == 12 * 10

    def test_the_same_seed_sends_the_same_messages(self) -> None:
        sent = []
        for _ in range(2):
            tap = Recorder()
            both(trio(5, tap), two_relus, shared(X, 32), shared(Y, 32))
            sent.append([value for messages in tap.sent.values() for message in messages for value in message])
        assert all(torch.equal(x, y) for x, y in zip(*sent, strict=True))


# protocol, inputs' scales, rounds, online bits an element, dealt bytes an element: as the docstrings state them.
STATED = [
    (truncate, (32,), 1, 64, 10),
    (truncate, (24,), 1, 64, 9),
    (truncate, (40,), 1, 64, 12),
    (nonnegative, (16,), 3, 73, 64),
    (relu, (32,), 3, 73, 76),
    (maximum, (16, 16), 3, 73, 64),
]


@pytest.mark.parametrize(("protocol", "scales", "rounds", "bits", "dealt"), STATED)
def test_stated_costs_are_planned_and_counted(
    protocol, scales: tuple[int, ...], rounds: int, bits: int, dealt: int
) -> None:
    pairs = [shared(words(i, (16,), 2**20), scale) for i, scale in enumerate(scales)]
    planned, counted = Meter(), Meter()
    plan(protocol(*(pair[0].map(lambda own: own.to("meta")) for pair in pairs)), planned)
    trio().run(*(protocol(*(pair[i] for pair in pairs)) for i in range(2)), counted)
    for meter in (planned, counted):
        assert (meter.rounds, meter.bytes_online, meter.bytes_dealt) == (rounds, 2 * bits, 16 * dealt)
    assert planned.correlations == counted.correlations


def test_what_a_message_weighs() -> None:
    assert [wire_bytes(torch.zeros(2, 9, dtype=dtype)) for dtype in (torch.int64, torch.uint8, torch.bool)] == [
        144,
        18,
        3,
    ]


ONE = torch.ones(3, dtype=torch.int64)


def steps(*items: object) -> Protocol[None]:
    for item in items:  # noqa: UP028 answers are sent in, which a tuple does not take
        yield item


class TestLockstep:
    @pytest.mark.parametrize(
        ("alice", "bob"),
        [
            ([Open(ONE)], []),
            ([], [Open(ONE)]),
            ([Open(ONE)], [Take(Mask((3,), 1))]),
            ([Take(Mask((3,), 1))], [Take(Mask((3,), 2))]),
            ([Take(Mask((3,), 1))], [Take(Mask((4,), 1))]),
            ([Enter("a")], [Enter("b")]),
            ([Open(ONE, labels=("a",))], [Open(ONE, labels=("b",))]),
            ([Open(ONE)], [Open(ONE, ONE)]),
            ([Open(ONE)], [Open(ONE[:1])]),
            ([Open(ONE)], [Open(ONE.to(torch.uint8))]),
        ],
    )
    def test_parties_whose_steps_differ_are_refused(self, alice: list[object], bob: list[object]) -> None:
        with pytest.raises(CorrelationError, match="steps differ"):
            trio().run(steps(*alice), steps(*bob))

    def test_words_add_and_bits_xor(self) -> None:
        one, three = torch.tensor([1, -1]), torch.tensor([3, 2**63 - 1])
        assert trio().run(opening(one), opening(three))[0].tolist() == [4, 2**63 - 2]
        one, three = torch.tensor([1, 255], dtype=torch.uint8), torch.tensor([3, 255], dtype=torch.uint8)
        assert trio().run(opening(one), opening(three))[1].tolist() == [2, 0]
        one, three = torch.tensor([True, True]), torch.tensor([True, False])
        assert trio().run(opening(one), opening(three))[0].tolist() == [False, True]


class Faulty(Correlation):
    """One whose dealing fails."""

    @property
    def fields(self) -> dict[str, Field]:
        return {"a": Field((3,))}

    def derive(self, uniform: Part, provider: Provider) -> Mapping[str, Tensor]:
        raise MemoryError("no room")


class TestCorrelations:
    def test_randomness_dealt_ahead_is_what_is_taken(self) -> None:
        run, meter = trio(), Meter()
        first, second = run.deal([Mask((3, 4), 16)]), run.deal([Mask((3, 4), 8)])
        assert repr(run.provider) == "Provider(2 correlations dealt)"
        run.run(*(truncate(side) for side in shared(X, 24)), meter, second)
        run.run(*(truncate(side) for side in shared(X, 32)), meter, first)
        assert repr(run.provider) == "Provider(2 correlations dealt)"
        assert meter.correlations == [Mask((3, 4), 8), Mask((3, 4), 16)]
        assert (len(first), len(second)) == (0, 0)

    def test_randomness_dealt_for_another_run_is_refused_and_thrown_away(self) -> None:
        run = trio()
        dealt = run.deal([Mask((3, 4), 16), Mask((3, 4), 8)])
        with pytest.raises(CorrelationError, match=r"drop=8.*asked for.*drop=16.*was dealt"):
            run.run(*(truncate(side) for side in shared(X, 24)), None, dealt)
        assert len(dealt) == 0
        result = both(run, truncate, shared(X, 24))
        assert int((total(result) - (X >> 8)).abs().max()) <= 1

    @pytest.mark.parametrize("count", [0, 2])
    def test_too_little_or_too_much_dealt_is_refused(self, count: int) -> None:
        run = trio()
        dealt = run.deal([Mask((3, 4), 16)] * count)
        with pytest.raises(CorrelationError, match="another run"):
            run.run(*(truncate(side) for side in shared(X, 32)), None, dealt)
        assert int((total(both(run, truncate, shared(X, 32))) - (X >> 16)).abs().max()) <= 1

    @pytest.mark.parametrize("number", [0, 2])
    def test_a_number_received_before_or_skipped_is_refused(self, number: int) -> None:
        party = trio().alice
        party.receive(0, Mask((3,), 1), {})
        with pytest.raises(CorrelationError, match=f"alice expects correlation 1 next, not {number}"):
            party.receive(number, Mask((3,), 1), {})
        party.receive(1, Mask((3,), 1), {})

    def test_every_number_gives_new_randomness(self) -> None:
        party = trio().alice
        parts = [party.receive(number, Mask((3,), 1), {}).r for number in range(4)]
        assert len({tuple(part.tolist()) for part in parts}) == 4

    def test_a_failure_in_dealing_does_not_end_the_cluster(self) -> None:
        run = trio()
        with pytest.raises(MemoryError):
            run.deal([Faulty()])
        assert int((total(both(run, truncate, shared(X, 32))) - (X >> 16)).abs().max()) <= 1

    @pytest.mark.parametrize(
        "correlation",
        [
            Mask((2, 3), 16, Window(16), select=True),
            Mask((2, 3), 0, Window(0, 2)),
            Mask((2, 3), 33),
            Product(MatMul(), (2, 3), (3, 4)),
        ],
    )
    def test_a_part_is_what_its_fields_say(self, correlation: Correlation) -> None:
        run = trio()
        number, corrections = run.provider.deal(correlation)
        assert sum(value.numel() * value.element_size() for value in corrections.values()) == correlation.nbytes
        for part in (run.alice.receive(number, correlation, {}), run.bob.receive(number, correlation, corrections)):
            assert vars(part).keys() == correlation.fields.keys()
            for name, field in correlation.fields.items():
                value = getattr(part, name)
                assert (tuple(value.shape), value.dtype) == (field.shape, field.dtype)

    def test_a_part_names_its_fields_and_hides_their_values(self) -> None:
        part = trio().alice.receive(0, Mask((2,), 16), {})
        assert repr(part) == str(part) == "Part(r, rho, mu)"
        with pytest.raises(AttributeError, match="no field 's'"):
            _ = part.s


def test_pooling_merges_the_comparisons_of_a_level() -> None:
    windows = Windows((2, 2), (2, 2), (0, 0), (1, 1))
    assert rounds_of(max_pool, shared(words(1, (2, 3, 4, 4), 2**20)), windows=windows) == 6
