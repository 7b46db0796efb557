"""Compressed updates: error bounds, real bytes, error feedback, hostile encodings, training."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tacit.data.examples import Examples
from tacit.errors import CodecError, InputError
from tacit.federated.algorithm import Update
from tacit.federated.compression import ERROR, Compressed, Scheme
from tacit.federated.compression_schemes import Float16, StochasticQuantisation, TopK
from tacit.federated.fedavg import FedAvg
from tacit.federated.local.plain import PlainSolver
from tacit.runtimes.executors import one_thread

SCHEMES = [
    Float16(),
    *(StochasticQuantisation(bits, chunk) for bits in range(1, 17) for chunk in (7, 4096)),
    TopK(0.1),
    TopK(1.0),
]
vectors = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40).flatmap(
    lambda values: st.sampled_from([torch.float32, torch.float64]).map(lambda dtype: torch.tensor(values, dtype=dtype))
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def there_and_back(scheme: Scheme, vector: Tensor, seed: int = 0) -> Tensor:
    return scheme.decode(scheme.encode(vector, seeded(seed)), len(vector), vector.dtype)


@given(vectors, st.sampled_from(SCHEMES), st.integers(0, 2**32))
def test_encodings_are_reproducible_and_as_long_as_announced(vector: Tensor, scheme: Scheme, seed: int) -> None:
    kept, encoding = vector.clone(), scheme.encode(vector, seeded(seed))
    assert torch.equal(vector, kept)
    assert encoding == scheme.encode(vector, seeded(seed))
    assert len(encoding) == scheme.nbytes(len(vector), vector.dtype)
    decoded = scheme.decode(encoding, len(vector), vector.dtype)
    assert decoded.dtype == vector.dtype
    assert decoded.shape == vector.shape


@given(vectors)
def test_float16_is_within_its_bound(vector: Tensor) -> None:
    error = (there_and_back(Float16(), vector) - vector).abs()
    assert bool((error <= torch.maximum(vector.abs() * 2.0**-11, torch.tensor(2.0**-25))).all())


@given(vectors, st.integers(1, 16), st.integers(1, 50), st.integers(0, 2**32))
def test_quantisation_is_within_one_step(vector: Tensor, bits: int, chunk: int, seed: int) -> None:
    decoded = there_and_back(StochasticQuantisation(bits, chunk), vector, seed)
    for piece, found in zip(vector.split(chunk), decoded.split(chunk), strict=True):
        step = float(piece.max() - piece.min()) / (2**bits - 1)
        assert float((found - piece).abs().max()) <= step * (1 + 1e-6) + 2e-5


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_quantisation_is_unbiased(bits: int) -> None:
    """The mean of 4,000 decodings is within five standard errors of the vector; rounding to nearest is not."""
    vector, draws = torch.tensor([-1.0, -0.31, 0.0, 0.123, 0.5, 0.77, 2.0], dtype=torch.float64), 4000
    scheme, generator = StochasticQuantisation(bits), seeded(1)
    mean = sum(scheme.decode(scheme.encode(vector, generator), 7, vector.dtype) for _ in range(draws)) / draws
    step = 3 / (2**bits - 1)
    most = 5 * step / 2 / math.sqrt(draws)
    assert float((mean - vector).abs().max()) < most
    nearest = ((vector + 1) / step).round() * step - 1
    assert float((nearest - vector).abs().max()) > most


def test_the_bits_of_a_quantised_vector_by_hand() -> None:
    """Entries on the grid need no luck: words 0, 3, 1, 2 of two bits each, the first one lowest."""
    encoding = StochasticQuantisation(bits=2).encode(torch.tensor([1.0, 4.0, 2.0, 3.0]), seeded())
    assert encoding == bytes.fromhex("0000803f") * 2 + bytes([0b10_01_11_00])


@given(vectors, st.floats(0.001, 1))
def test_top_k_keeps_the_largest_exactly(vector: Tensor, fraction: float) -> None:
    decoded = there_and_back(TopK(fraction), vector)
    kept = math.ceil(round(fraction * len(vector), 6))
    places = decoded.nonzero().flatten()
    assert len(places) <= kept
    assert torch.equal(decoded[places], vector[places])
    by_magnitude = vector.abs().sort(descending=True).values
    assert float(decoded.abs().sum()) == pytest.approx(float(by_magnitude[:kept].sum()), rel=1e-5)


def test_constant_chunks_and_lone_entries_are_exact() -> None:
    for vector in (torch.full((10,), -3.25), torch.zeros(5), torch.tensor([7.5])):
        assert torch.equal(there_and_back(StochasticQuantisation(1, 4), vector), vector)


def corrupt(scheme: Scheme, change: Callable[[bytes], bytes]) -> Tensor:
    vector = torch.linspace(-1, 1, 11)
    return scheme.decode(change(scheme.encode(vector, seeded())), 11, torch.float32)


@pytest.mark.parametrize("scheme", [Float16(), StochasticQuantisation(3), StochasticQuantisation(16), TopK(0.3)])
@pytest.mark.parametrize("change", [lambda e: e[:-1], lambda e: e + b"\0", lambda e: b""])
def test_encodings_of_another_length_are_refused(scheme: Scheme, change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(CodecError, match="refuse the update"):
        corrupt(scheme, change)


def test_hostile_encodings_are_refused() -> None:
    with pytest.raises(CodecError, match="bits are set beyond the last"):
        corrupt(StochasticQuantisation(3), lambda e: e[:-1] + b"\xff")
    for places in (b"\x0b\0\0\0", b"\0\0\0\0", b"\xff\xff\xff\xff"):  # beyond the end, or there already
        with pytest.raises(CodecError, match="not ascending and below 11"):
            corrupt(TopK(0.3), lambda e, places=places: e[:12] + places + e[16:])


@dataclass(frozen=True)
class Sends(FedAvg):
    """FedAvg whose clients send what they are told."""

    delta: Tensor | None = None

    def client_update(self, state, memory, solver, examples, generator):
        assert ERROR not in memory
        return Update.of_client(self.delta.clone(), {}, 5, 0.5), {"inner": torch.ones(2)}


def send(delta: Tensor, scheme: Scheme, memory: dict[str, Tensor]) -> tuple[Update, dict[str, Tensor]]:
    return Compressed(Sends(delta=delta), scheme).client_update(None, memory, None, None, seeded())


def test_what_is_left_out_is_sent_later() -> None:
    """Thirty rounds with the same delta and a sixth of the entries each: nothing is lost beyond the memory."""
    delta, memory, sent = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), {}, torch.zeros(6)
    for _ in range(30):
        update, memory = send(delta, TopK(1 / 6), memory)
        assert int(update.delta.count_nonzero()) == 1
        sent += update.delta
    assert torch.allclose(sent + memory[ERROR], 30 * delta)
    assert int(sent.count_nonzero()) == 6
    assert torch.equal(memory["inner"], torch.ones(2))


def test_schemes_without_feedback_remember_nothing() -> None:
    for scheme in (Float16(), StochasticQuantisation(), TopK(0.5, error_feedback=False)):
        assert set(send(torch.arange(6.0), scheme, {})[1]) == {"inner"}
    assert set(send(torch.arange(6.0), StochasticQuantisation(error_feedback=True), {})[1]) == {"inner", ERROR}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_bytes_reported_are_those_of_the_encoding(scheme: Scheme) -> None:
    delta = torch.linspace(-1, 1, 100)
    plain = Update.of_client(delta, {}, 5, 0.5)
    update, _ = send(delta, scheme, {})
    assert plain.nbytes - update.nbytes == 400 - len(scheme.encode(delta, seeded()))
    assert (update.examples, update.loss, update.weight) == (5, 0.5, 5.0)


@pytest.mark.parametrize("scheme", [Float16(), StochasticQuantisation(), TopK()])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_update_stays_recognisable(scheme: Scheme, bad: float) -> None:
    memory = {ERROR: torch.ones(3), "inner": torch.zeros(2)}
    update, memory_now = send(torch.tensor([1.0, bad, 2.0]), scheme, memory)
    assert not update.is_finite()
    assert memory_now is memory


def test_what_float16_cannot_hold_counts_as_diverged() -> None:
    assert not send(torch.tensor([1.0, 7e4]), Float16(), {})[0].is_finite()
    assert send(torch.tensor([1.0, 6e4]), Float16(), {})[0].is_finite()


def test_compressing_twice_with_feedback_is_refused() -> None:
    twice = Compressed(Compressed(Sends(delta=torch.arange(6.0)), TopK(0.5)), TopK(0.5))
    with pytest.raises(InputError, match="compressed with error feedback twice"):
        twice.client_update(None, {}, None, None, seeded())


@one_thread()
def trained(scheme: Scheme | None, rounds: int = 20) -> tuple[float, int]:
    """Loss and bytes up of logistic regression over four clients of one class each."""
    generator = seeded(3)
    centres = torch.randn(4, 20, generator=generator)
    clients = [Examples(centres[k] + torch.randn(30, 20, generator=generator), torch.full((30,), k)) for k in range(4)]
    algorithm = (
        FedAvg(lr=0.4, batch_size=None) if scheme is None else Compressed(FedAvg(lr=0.4, batch_size=None), scheme)
    )
    model = nn.Linear(20, 4)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    solver, memories, sent = PlainSolver(model, cross_entropy), [{}, {}, {}, {}], 0
    state = algorithm.init(model, 4)
    for number in range(rounds):
        updates = []
        for k, client in enumerate(clients):
            update, memories[k] = algorithm.client_update(state, memories[k], solver, client, seeded(100 * number + k))
            updates.append(update)
            assert update.nbytes == algorithm.effort(state, torch.tensor([30])).bytes_up
        mean = algorithm.combine(updates)
        sent += mean.nbytes
        state = algorithm.server_update(state, mean)
    state.load_into(model)
    everyone = Examples(torch.cat([c.inputs for c in clients]), torch.cat([c.targets for c in clients]))
    return float(cross_entropy(model(everyone.inputs), everyone.targets).detach()), sent


def test_training_compressed_reaches_what_it_reaches_plain() -> None:
    """And error feedback is what makes a tenth of the entries enough."""
    loss, sent = trained(None)
    assert loss < 0.1
    for scheme, smaller in ((Float16(), 1.8), (StochasticQuantisation(8), 2.8), (TopK(0.1), 3.5)):
        compressed_loss, compressed_sent = trained(scheme)
        assert compressed_loss < loss + 0.01
        assert compressed_sent * smaller < sent
    assert trained(TopK(0.1, error_feedback=False))[0] > trained(TopK(0.1))[0] + 0.03


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: StochasticQuantisation(0), "bits=0"),
        (lambda: StochasticQuantisation(17), "bits=17"),
        (lambda: StochasticQuantisation(chunk=0), "chunk=0"),
        (lambda: TopK(0), "fraction=0"),
        (lambda: TopK(math.nan), "fraction=nan"),
        (lambda: Float16().encode(torch.zeros(0), seeded()), "shape (0,)"),
        (lambda: TopK().encode(torch.zeros(2, 2), seeded()), "shape (2, 2)"),
        (lambda: StochasticQuantisation().encode(torch.zeros(2).half(), seeded()), "torch.float16"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert complaint in str(caught.value)
