"""Nothing that holds a secret prints it, and no error about a secret tells it."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import nn

import tacit
from engine import prg, seeds, shared, trio, words
from tacit.cluster import Cluster
from tacit.errors import InputError, TacitError
from tacit.mpc.correlation import Part
from tacit.mpc.lockstep import Meter, both
from tacit.mpc.shares import Bits, reconstruct
from tacit.mpc.sign import Mask, Window, masked_opening
from tacit.mpc.steps import Open, Role, Task
from tacit.party.messages import Ask
from tacit.party.tickets import Ticket
from tacit.party.worker_calls import Run
from tacit.program.rewrite import Model
from tacit.ring.field import encrypt
from tacit.ring.fixed_point import encode
from tacit.ring.prg import Prg
from tacit.tensor import PrivateTensor
from tacit.trace import trace

SECRET = 7391.25
WORD = int(SECRET * 2**16)
SEED = bytes.fromhex("d1e2f3a4b5c6978812345678deadbeef")


def texts(thing: object) -> list[str]:
    return [repr(thing), str(thing), f"{thing}", f"{[thing]}", f"{ {'key': thing} }"]


def traces(values: list[int]) -> list[str]:
    """How numbers might appear: decimal and hexadecimal, signed and not."""
    return [text for v in values for text in (str(abs(v)), str(v % 2**64), f"{v % 2**64:x}") if len(text) > 3]


def linear() -> nn.Module:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.fill_(SECRET)
        layer.bias.fill_(SECRET)
    return layer


@pytest.fixture
def parties() -> Cluster:
    return Cluster(Prg(SEED))


def hidden(thing: object, *values: int) -> None:
    found = [text for text in texts(thing) for mark in ("7391", *traces([WORD, *values])) if mark in text]
    assert found == []


def test_shares() -> None:
    for side in shared(torch.tensor([WORD, 5])):
        hidden(side, *side.words.tolist())
        assert side.holder.value in repr(side)


@given(seeds)
def test_shares_of_anything(seed: int) -> None:
    for side in shared(words(seed, (3,)), seed=seed):
        hidden(side, *side.words.tolist())


def test_bits() -> None:
    hidden(Bits(torch.tensor([1, 0, 1, 1], dtype=torch.uint8), Role.BOB))
    assert "1, 0, 1, 1" not in repr(Bits(torch.tensor([1, 0, 1, 1], dtype=torch.uint8), Role.BOB))


def test_parts() -> None:
    part = Part(r=torch.tensor([WORD]), rho=torch.tensor([WORD]))
    hidden(part)
    assert repr(part) == "Part(r, rho)"


def test_requests_whose_shares_come_of_a_seed() -> None:
    for message in (Ask(1, "ab" * 32, 2, 5.0, SEED), Run(1, Ticket("ab" * 32, 2, 0), [2], [], {0: SEED})):
        for text in texts(message):
            assert not any(mark in text for mark in (SEED.hex(), repr(SEED)[2:-1], repr(SEED)[2:12]))


def test_messages_and_openings() -> None:
    hidden(Open(torch.tensor([WORD])))

    def protocol(z):
        return (yield from masked_opening(z, 16, Window(16), select=True))

    for opening in both(trio(), protocol, shared(torch.tensor([WORD]), 32)):
        hidden(opening, *opening.opened.tolist(), *opening.part.r.tolist())


def test_generators() -> None:
    for generator in (Prg(SEED), Prg(SEED).derive("purpose", 3), Prg.fresh()):
        for text in texts(generator):
            assert "seed hidden" in text
            assert SEED.hex()[:6] not in text
            assert str(SEED) not in text


def test_numbers_of_the_field() -> None:
    number = encrypt(739125, prg=prg())
    hidden(number, *number.shares)
    assert "739125" not in str(number)


def test_the_parties_and_what_runs_them(parties: Cluster) -> None:
    private = parties.encrypt(linear(), torch.zeros(1, 2))
    seen: list[int] = []
    private(torch.full((3, 2), 0.5), seen=lambda *pair: seen.extend(pair[0].words.flatten().tolist()))
    party_states = [parties.alice.weights, parties.bob.weights]
    loaded = [weight for state in party_states for weight in state.values()]
    assert loaded
    numbers = [
        n for weight in loaded for n in (*weight.share.words.flatten().tolist(), *weight.difference.flatten().tolist())
    ]
    for thing in (
        parties,
        parties.alice,
        parties.bob,
        parties.provider,
        parties._trio,
        private,
        *loaded,
        *party_states,
    ):
        hidden(thing, *numbers, *seen)
        assert all(SEED.hex()[:6] not in text for text in texts(thing))
    for thing in (private.cost(), private.counted(), Meter()):
        hidden(thing, *numbers, *seen)


def test_the_owner_s_model() -> None:
    model = Model(*trace(linear(), (torch.zeros(1, 2),)))
    hidden(model)
    hidden(model.graph)


def test_private_tensors(parties: Cluster) -> None:
    x = secret_in(parties)
    hidden(x, *x._shares[0].words.tolist(), *x._shares[1].words.tolist())
    hidden(x * x)
    hidden(Task("a", (), lambda: x))


def secret_in(parties: Cluster) -> PrivateTensor:
    fixed = tacit.tensor([SECRET, -1.0]).fix_prec()
    return fixed.share(parties.alice, parties.bob, crypto_provider=parties.provider)


BAD = 739125.5
ERRORS: dict[str, Callable[[Cluster], object]] = {
    "an input outside the range": lambda c: encode(torch.tensor([BAD])),
    "an input beside NaN": lambda c: encode(torch.tensor([SECRET, float("nan")])),
    "a complex input": lambda c: encode(torch.tensor([SECRET + 1j])),
    "a weight outside the range": lambda c: c.encrypt(heavy(), torch.zeros(1, 2)),
    "a query outside the range": lambda c: c.encrypt(linear(), torch.zeros(1, 2))(torch.full((1, 2), BAD)),
    "a query of another shape": lambda c: c.encrypt(linear(), torch.zeros(1, 2))(torch.full((1, 3), SECRET)),
    "a query that is a list": lambda c: c.encrypt(linear(), torch.zeros(1, 2))([SECRET]),
    "a number with too many digits": lambda c: tacit.tensor([BAD]).fix_prec(precision=17),
    "a shared number outside the range": lambda c: (
        tacit.tensor([BAD]).fix_prec().share(c.alice, c.bob, crypto_provider=c.provider)
    ),
    "an unsupported operator": lambda c: secret_in(c).tan(),
    "a share that would lose bits": lambda c: shared(torch.tensor([WORD]))[0].raised(3),
    "shares in the wrong order": lambda c: reconstruct(*reversed(shared(torch.tensor([WORD])))),
    "shares of two tensors": lambda c: reconstruct(
        shared(torch.tensor([WORD]))[0], shared(torch.tensor([WORD, WORD]))[1]
    ),
    "a number outside the field": lambda c: encrypt(739125, modulus=101),
    "randomness out of order": lambda c: (c.alice.receive(0, Mask((1,), 1), {}), c.alice.receive(0, Mask((1,), 1), {})),
    "a part without a field": lambda c: Part(r=torch.tensor([WORD])).rho,
    "a seed of another length": lambda c: Prg(SEED + b"7391"),
}


def heavy() -> nn.Module:
    layer = linear()
    with torch.no_grad():
        layer.weight.fill_(BAD)
    return layer


@pytest.mark.parametrize("name", ERRORS)
def test_errors_about_secrets_do_not_tell_them(name: str, parties: Cluster) -> None:
    with pytest.raises((TacitError, AttributeError)) as error:
        ERRORS[name](parties)
    text = str(error.value)
    assert [mark for mark in ("7391", *traces([WORD]), SEED.hex()[:6], str(SEED)[2:8]) if mark in text] == []
    assert "\n" not in text


def test_shares_of_two_tensors_are_told_apart_by_shape_and_scale() -> None:
    one, other = shared(torch.tensor([1])), shared(torch.tensor([1]), scale=8)
    with pytest.raises(InputError, match="not shares of one tensor"):
        reconstruct(one[0], other[1])
