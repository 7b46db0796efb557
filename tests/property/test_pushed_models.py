"""Whatever becomes of a part of a model on its way, it is taken, or refused by the documented error."""

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from faults import injected
from tacit.errors import CodecError
from tacit.identity import Identity, key_text
from tacit.party.dealing_messages import decode
from tacit.party.models import pack, unpack
from tacit.party.push import Push, prepare


class Model(nn.Module):
    """A bit of everything that a program can hold: products, windows, constants, indices, a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.convolution(x)), 2).flatten(1)
        x = self.linear(torch.sigmoid(self.norm(x)))
        return torch.where(torch.tensor([True, False, True]), x, x[:, [2, 0, 1]] * 2.0) + torch.arange(3)


@cache
def pushed() -> Push:
    torch.manual_seed(0)
    owner = key_text(Identity(bytes(32)).public)
    return prepare(Model().eval(), [torch.zeros(1, 1, 6, 6)], name="m", owner=owner, batch_sizes=[1, 2])


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**40, -(2**63), 2**64 - 1, 1e308, float("nan"), float("inf")]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["aten.relu.default", "aten.convolution.default", "getitem", "tacit.constant", "aten.add.Tensor"]),
    st.binary(max_size=5),
    st.builds(lambda name: {"ref": name}, st.sampled_from(["x", "relu", "linear", "convolution", "nothing"])),
    st.builds(lambda name: {"dtype": name}, st.sampled_from(["torch.int64", "torch.bool", "torch.complex64"])),
    st.lists(st.integers(-2, 9), max_size=4),
    st.builds(dict),
)


def mutated(content: Any, data: st.DataObject) -> Any:
    """The structure with one of its leaves or branches replaced, dropped or doubled."""
    if isinstance(content, dict) and content and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(sorted(content, key=str)))
        return content | {key: mutated(content[key], data)}
    if isinstance(content, list) and content and data.draw(st.integers(0, 9)):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.integers(0, 11)):
            case 0:
                return [*content[:at], *content[at + 1 :]]
            case 1:
                return [*content[:at], content[at], *content[at:]]
            case 2:
                other = data.draw(st.integers(0, len(content) - 1))
                return [content[at] if number == other else item for number, item in enumerate(content)]
        return [*content[:at], mutated(content[at], data), *content[at + 1 :]]
    return data.draw(values)


def taken_or_refused(description: bytes, part: str) -> None:
    body, (_, *weights) = pack(getattr(pushed(), part))
    injected("altered messages")
    try:
        unpack(body, [torch.tensor([*description], dtype=torch.uint8), *weights], part)
    except CodecError:
        return


def change_a_program(data: st.DataObject) -> None:
    packed = msgspec.msgpack.decode(pushed().provider.description)
    program = mutated(msgspec.msgpack.decode(packed[5][1][2]), data)
    packed[5][1][2] = msgspec.msgpack.encode(program)
    taken_or_refused(msgspec.msgpack.encode(packed), "provider")


def change_a_description(data: st.DataObject) -> None:
    packed = mutated(msgspec.msgpack.decode(pushed().provider.description), data)
    taken_or_refused(msgspec.msgpack.encode(packed), data.draw(st.sampled_from(["alice", "bob", "provider"])))


def flip_a_byte(data: st.DataObject) -> None:
    description = bytearray(pushed().alice.description)
    description[data.draw(st.integers(0, len(description) - 1))] ^= data.draw(st.integers(1, 255))
    taken_or_refused(bytes(description), "alice")


CHANGES = [change_a_program, change_a_description, flip_a_byte]


@pytest.mark.parametrize("change", CHANGES)
@settings(max_examples=12)
@given(data=st.data())
def test_a_changed_part(change: Callable[[st.DataObject], None], data: st.DataObject) -> None:
    change(data)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@settings(max_examples=300)
@given(data=st.data())
def test_a_part_changed_in_many_ways(change: Callable[[st.DataObject], None], data: st.DataObject) -> None:
    change(data)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    taken_or_refused(data, "bob")
    for parse in (decode, lambda body: unpack(body, [torch.zeros(3, dtype=torch.uint8)], "alice")):
        with contextlib.suppress(CodecError):
            parse(data)
