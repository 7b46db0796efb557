"""Graphs as bytes: what programs for prediction and for training have in common when they travel.

A graph is names, numbers and references (`tacit.trace`), so its encoding is plain msgpack. Only operators and their
arguments travel: where in the owner's source code a node came from, and in which module, stays with the owner. Lists
and tuples are told apart, since a tuple is part of what the three processes compare correlations by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import torch

from tacit.errors import CodecError, InputError
from tacit.program.lowering import LOWERINGS, Context
from tacit.trace import Graph, Node, Ref


class PackedNode(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A `tacit.trace.Node` without its origin."""

    name: str
    operator: str
    args: list[Any]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]


_REFERENCE, _DTYPE, _TUPLE = "ref", "dtype", "tuple"
DTYPES = {
    str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
}
"""The dtypes that a program may name."""
MAX_DEPTH = 32
"""Of lists in lists, as arguments; what programs hold needs three or four."""


def pack_nodes(nodes: Iterable[Node]) -> list[PackedNode]:
    """The nodes of a graph, to be encoded.

    Raises:
        InputError: an argument is neither a number, a string, a reference, a dtype nor a list or tuple of these.
    """
    return [
        PackedNode(n.name, n.operator, [_plain(arg) for arg in n.args], _plain_values(n.kwargs), n.shape) for n in nodes
    ]


def unpack_graph(
    inputs: tuple[str, ...], state: tuple[str, ...], nodes: Sequence[PackedNode], outputs: tuple[str, ...]
) -> Graph:
    """A graph that has arrived.

    Raises:
        CodecError: it names an operator outside the lowering table, a value that no node before it gives, or one name
            twice, or holds an argument of another kind than those that travel.
    """
    known = {*inputs, *state}
    if len(known) < len(inputs) + len(state):
        raise CodecError("the program gives one name to two of its inputs")
    rebuilt = []
    for packed in nodes:
        node = Node(
            packed.name,
            packed.operator,
            tuple(map(_rebuilt, packed.args)),
            {key: _rebuilt(value) for key, value in packed.kwargs.items()},
            packed.shape,
        )
        if node.operator not in LOWERINGS:
            raise CodecError("the program holds an operator that this side does not know: it has no encrypted form")
        if node.name in known or not known.issuperset(node.refs):
            raise CodecError("the program is no graph: a node takes what none before it gives, or a name is used twice")
        known.add(node.name)
        rebuilt.append(node)
    if not known.issuperset(outputs):
        raise CodecError("the program returns something that no node of it gives")
    return Graph(inputs, state, tuple(rebuilt), outputs)


def unpack_context(packed: Any) -> Context:
    """The engine's settings that have arrived.

    Raises:
        CodecError: they are not those that this side knows.
    """
    try:
        context = msgspec.convert(packed, Context)
    except msgspec.MsgspecError:
        context = None
    if context is None or msgspec.to_builtins(context) != packed:
        raise CodecError("the program's settings are not those this side knows: both must run the same version")
    return context


def _plain(value: Any) -> Any:
    if isinstance(value, Ref):
        return {_REFERENCE: value.name}
    if isinstance(value, torch.dtype) and str(value) in DTYPES:
        return {_DTYPE: str(value)}
    if isinstance(value, tuple):
        return {_TUPLE: [_plain(item) for item in value]}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"an operator's argument of type {type(value).__name__} cannot be sent to the parties")


def _plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments without those that say where and how a tensor lies in memory, which the parties decide."""
    placing = ("device", "layout", "pin_memory", "memory_format")
    return {key: _plain(value) for key, value in values.items() if key not in placing}


def _rebuilt(value: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise CodecError(f"the program holds an argument that is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        return [_rebuilt(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    match list(value.items()):
        case [("ref", str(name))]:
            return Ref(name)
        case [("dtype", str(name))] if name in DTYPES:
            return DTYPES[name]
        case [("tuple", list(items))]:
            return tuple(_rebuilt(item, depth + 1) for item in items)
    raise CodecError("the program holds an argument that is neither a number, a string, a reference nor a dtype")
