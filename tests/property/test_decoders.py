"""Whatever bytes come from elsewhere: they parse, or raise the documented error, in bounded memory."""

import contextlib
import struct
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoders import DECODERS, Decoder
from tacit import wire
from tacit.errors import CodecError, PeerError

NAMES = sorted(DECODERS)
PACKED = sorted(name for name, one in DECODERS.items() if one.packed)
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats()
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=20) | st.binary(max_size=40)
VALUES = st.recursive(
    LEAVES,
    lambda kids: st.lists(kids, max_size=4) | st.dictionaries(st.text(max_size=6), kids, max_size=3),
    max_leaves=8,
)


def attempt(decoder: Decoder, data: bytes) -> None:
    """Any other error fails the test; only a connection can end, which is a `PeerError`."""
    with contextlib.suppress(PeerError if decoder.name == "link" else CodecError):
        decoder.decode(data)


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_accepted(name: str) -> None:
    decoder = DECODERS[name]
    accepted = 0
    for example in decoder.examples():
        try:
            decoder.decode(example)
            accepted += 1
        except CodecError:
            assert name == "part", "bob's and the provider's parts are not alice's"
    assert accepted


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=60)
def test_changed_bytes(name: str, data: st.DataObject) -> None:
    decoder = DECODERS[name]
    changed = bytearray(data.draw(st.sampled_from(decoder.examples())))
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(changed)))
        size = data.draw(st.sampled_from([0, 1, 1, 2, 5]))
        changed[place : place + size] = data.draw(st.binary(max_size=4))
    attempt(decoder, bytes(changed[: data.draw(st.none() | st.integers(0, len(changed)))]))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.binary(max_size=300))
@settings(max_examples=25)
def test_any_bytes(name: str, data: bytes) -> None:
    attempt(DECODERS[name], data)


@pytest.mark.parametrize("name", PACKED)
@given(data=st.data())
@settings(max_examples=60)
def test_changed_structure(name: str, data: st.DataObject) -> None:
    """What is still msgpack, with a part of it replaced, left out, repeated or moved."""
    decoder = DECODERS[name]
    tree = msgspec.msgpack.decode(data.draw(st.sampled_from(decoder.examples())))
    for _ in range(data.draw(st.integers(1, 3))):
        tree = altered(tree, data)
    attempt(decoder, msgspec.msgpack.encode(tree))


def altered(tree: Any, data: st.DataObject) -> Any:
    kids = list(tree) if isinstance(tree, list) else list(tree.values()) if isinstance(tree, dict) else []
    if not kids or data.draw(st.integers(0, 5)) == 0:
        return data.draw(VALUES)
    place = data.draw(st.integers(0, len(kids) - 1))
    what = data.draw(st.sampled_from(["descend", "descend", "descend", "drop", "repeat", "swap"]))
    if isinstance(tree, dict):
        keys = list(tree)
        if what == "drop":
            return {key: value for key, value in tree.items() if key != keys[place]}
        if what == "repeat":
            return {**tree, data.draw(st.text(max_size=8)): kids[place]}
        return {**tree, keys[place]: altered(kids[place], data)}
    if what == "drop":
        return kids[:place] + kids[place + 1 :]
    if what == "repeat":
        return kids[:place] + [kids[place]] * data.draw(st.integers(2, 3)) + kids[place + 1 :]
    if what == "swap":
        other = data.draw(st.integers(0, len(kids) - 1))
        kids[place], kids[other] = kids[other], kids[place]
        return kids
    return [*kids[:place], altered(kids[place], data), *kids[place + 1 :]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", [40, 400, 990, 100_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa5tuple\x91", b"\x81\xa3ref"])
def test_deep_nesting(name: str, depth: int, opening: bytes) -> None:
    attempt(DECODERS[name], opening * depth + b"\xc0")


@pytest.mark.parametrize("depth", [40, 400, 900])
def test_arguments_nested_deeply_in_a_program(depth: int) -> None:
    decoder = DECODERS["program"]
    tree = msgspec.msgpack.decode(decoder.examples()[0])
    nodes = tree[2]
    for opening in (b"\x91", b"\x81\xa5tuple\x91"):
        nested = [msgspec.Raw(opening * depth + b"\xc0")]
        for number, node in enumerate(nodes):
            changed = [*nodes[:number], [*node[:2], nested, *node[3:]], *nodes[number + 1 :]]
            attempt(decoder, msgspec.msgpack.encode([*tree[:2], changed, *tree[3:]]))


@pytest.mark.parametrize("name", NAMES)
def test_counts_beyond_what_comes_take_no_memory(name: str) -> None:
    decoder = DECODERS[name]
    huge = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
    prefix = decoder.examples()[0][:18]
    sizes = ((1 << 24, 1 << 34), (30, 1 << 20), (2**32 - 1, 2**64 - 1))
    claims = [struct.pack("<4sBBIQ", wire.MAGIC, wire.VERSION, 1, header, payload) for header, payload in sizes]
    tracemalloc.start()
    try:
        for data in [*huge, *(prefix + one for one in huge), *claims]:
            attempt(decoder, data)
            attempt(decoder, data + bytes(50))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20
