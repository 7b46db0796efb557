"""A masked vector is uniform and says nothing about the input; and these tests can tell when it does.

Seeds are fixed, so a test passes always or never; the level is 10^-6 for a whole test, by Bonferroni's correction.
Every deliberately weak generator below must be noticed by the same tests.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import chi2_contingency, chisquare

from secure_sums import World, prg, require_exact, run
from tacit.federated.secure_sum import client, messages, server
from tacit.federated.secure_sum.ring import Words
from tacit.federated.secure_sum.server import Stage
from tacit.ring.prg import Prg

LEVEL = 1e-6
LENGTH = 100_000
BITS = 20
TOP = 1 << (BITS - 1)

Inputs = Callable[[int], Words]


@dataclass(frozen=True)
class Given(World):
    """A cohort whose clients' vectors are given."""

    inputs: Inputs = lambda number: np.zeros(LENGTH, np.uint32)

    def vector(self, number: int) -> Words:
        return self.inputs(number)


def zeros(number: int) -> Words:
    return np.zeros(LENGTH, np.uint32)


def largest(number: int) -> Words:
    return np.full(LENGTH, (1 << BITS) - 1, np.uint32)


def coins(number: int) -> Words:
    return (prg(8, number).array(LENGTH) & 1).astype(np.uint32) * TOP


def masked_vectors(inputs: Inputs, round: int = 0) -> list[Words]:
    """What the server is sent by each of four clients."""
    world = Given(4, LENGTH, BITS, round=round, inputs=inputs)
    ran = run(world)
    require_exact(world, ran)
    return [received(world, ran.frames["up", Stage.MASK, number]) for number in range(4)]


def received(world: World, frame: bytes) -> Words:
    packed, words = messages.read_client_frame(frame, 1 << 24)[3], world.ring.zeros(world.length)
    world.ring.add_packed(packed, words)
    return words


def counts_of(words: Words) -> Iterator[np.ndarray]:
    """Cell counts of what should be equally likely: bytes, neighbours' bits, and neighbours' half bytes."""
    for shift in (0, 6, BITS - 8):
        yield np.bincount(words >> shift & 255, minlength=256)
    for shift in (0, BITS - 4):
        half = words >> shift & 15
        yield np.bincount(16 * half[:-1:2] + half[1::2], minlength=256)
    for bit in range(BITS):
        single = words >> bit & 1
        for lag in (1, 2, 5):
            left, right = single[: -lag or None], single[lag:]
            used = slice(None, None, lag + 1)
            yield np.bincount(2 * left[used] + right[used], minlength=4)


def against_uniform(words: Words) -> float:
    """The smallest p-value of all, corrected for their number."""
    values = [chisquare(counts).pvalue for counts in counts_of(words)]
    return min(1.0, min(values) * len(values))


def against_input(words: Words, inputs: Words) -> float:
    """Whether the masked words go with the bits of the input."""
    bits = (inputs >> (BITS - 1)).astype(np.int64)
    values = []
    for shift in (0, BITS - 4):
        table = np.bincount(16 * bits + (words >> shift & 15), minlength=32).reshape(2, 16)
        values.append(chi2_contingency(table[:, table.any(0)]).pvalue)
    return min(1.0, min(values) * len(values))


@pytest.mark.parametrize("inputs", [zeros, largest, coins])
def test_masked_vectors_are_uniform(inputs: Inputs) -> None:
    for words in masked_vectors(inputs):
        assert against_uniform(words) > LEVEL / 4


def test_masked_vectors_are_independent_of_the_input() -> None:
    for number, words in enumerate(masked_vectors(coins)):
        assert against_input(words, coins(number)) > LEVEL / 4


def test_no_mask_comes_back_in_another_round_or_at_another_client() -> None:
    first, second = masked_vectors(zeros, 1), masked_vectors(zeros, 2)
    pairs = [*zip(first, second, strict=True), (first[0], first[1]), (first[2], first[3])]
    for one, other in pairs:
        for combined in (one - other, one + other):
            assert against_uniform(combined & ((1 << BITS) - 1)) > LEVEL / 12


def test_any_three_of_four_masked_vectors_sum_to_something_uniform() -> None:
    vectors = masked_vectors(zeros)
    for left_out in range(4):
        total = sum(words for i, words in enumerate(vectors) if i != left_out)
        assert against_uniform(total & ((1 << BITS) - 1)) > LEVEL / 4


def congruential(seed: int, count: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        steps = np.cumprod(np.full(count, 1664525, np.uint32), dtype=np.uint32)
        return steps * np.uint32(seed | 1) + np.cumsum(np.concatenate(([1], steps[:-1])), dtype=np.uint32) * np.uint32(
            1013904223
        )


def strong(seed: int, count: int) -> np.ndarray:
    return Prg(seed.to_bytes(16, "big")).array(4 * count).view(np.uint32)


WEAK: dict[str, Callable[[int, int], np.ndarray]] = {
    "congruential": congruential,
    "short period": lambda seed, count: np.resize(strong(seed, 1024), count),
    "constant": lambda seed, count: np.full(count, strong(seed, 1)[0]),
    "no mask": lambda seed, count: np.zeros(count, np.uint32),
    "one word in fifty unmasked": lambda seed, count: np.where(np.arange(count) % 50, strong(seed, count), 0),
    "sixteen bits": lambda seed, count: strong(seed, count) & 0xFFFF,
    "a biased top bit": lambda seed, count: (
        strong(seed, count) | (TOP * (np.arange(count) * seed % 8 > 0)).astype(np.uint32)
    ),
}


def replace_generator(monkeypatch: pytest.MonkeyPatch, stream_of: Callable[[int, int], np.ndarray]) -> None:
    def add_streams(words: Words, streams: Iterable[tuple[Prg, bool]]) -> None:
        for generator, subtract in streams:
            stream = stream_of(int.from_bytes(generator.bytes(4), "big"), len(words)).astype(np.uint32)
            np.subtract(words, stream, out=words) if subtract else np.add(words, stream, out=words)

    for module in (client, server):
        monkeypatch.setattr(module, "add_streams", add_streams)


def smallest() -> float:
    """The smallest p-value over the four clients."""
    return min(
        min(against_uniform(words), against_input(words, coins(number)))
        for number, words in enumerate(masked_vectors(coins))
    )


@pytest.mark.parametrize("name", WEAK)
def test_a_weak_generator_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_generator(monkeypatch, WEAK[name])
    assert smallest() < LEVEL / 8


def test_a_strong_generator_in_its_place_is_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_generator(monkeypatch, strong)
    assert smallest() > LEVEL / 8
