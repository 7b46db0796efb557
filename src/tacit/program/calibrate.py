"""Comparison windows as large as a model's values need, found on sample inputs in the clear.

A comparison looks at a window of bits (`tacit.mpc.sign.Window`). Five chunks of 6 bits hold magnitudes up to 16,384,
which few operators need; every chunk less saves 8 dealt bytes a comparison, and computing. The model's owner, who
holds model and samples in the clear, calibrates once:

>>> calibration = private.calibrate(samples)
>>> private = parties.encrypt(model, example, context=calibration.context())

**A value outside its window gives a wrong bit, and nobody is told**: a ReLU passes a negative value or blocks a
positive one, a maximum takes the smaller, and the parties compute on. Nothing that they see differs. So a window is
chosen with a margin, by default four times the largest magnitude among the samples; samples that do not resemble
later inputs make it worthless. An audit with the same context (`tacit.program.audit`) finds values outside their
windows, on whatever inputs the owner has in the clear.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from tacit.errors import DataError, InputError, RangeError
from tacit.mpc.sign import MAX_CHUNKS
from tacit.program.audit import interpret, largest_compared, window_bound
from tacit.program.lowering import Context
from tacit.program.rewrite import Model

VERSION = 1
"""The version of what `Calibration.to_json` writes; others are refused."""
_LARGEST = 2.0**62
"""No word holds more, whatever its scale."""


@dataclass(frozen=True)
class Range:
    """What one operator compares, and in which window.

    Args:
        name: the node's name, the same in every trace of the model; ``operator`` its ATen operator.
        largest: the largest magnitude among the samples, see `tacit.program.audit.largest_compared`.
        chunks: the window's size, in groups of 6 bits.
    """

    name: str
    operator: str
    largest: float
    chunks: int

    @property
    def bound(self) -> float:
        """The magnitude from which a comparison may be wrong."""
        return window_bound(self.chunks)


@dataclass(frozen=True)
class Calibration:
    """The windows of a model's operators; public, as a program is.

    Args:
        margin: how many times the largest magnitude a window holds, where the largest window is not the limit.
        ranges: one for each operator that compares.
    """

    margin: float
    ranges: tuple[Range, ...]

    def context(self, base: Context | None = None) -> Context:
        """Settings with these windows, otherwise as in ``base``."""
        return replace(base or Context(), windows={one.name: one.chunks for one in self.ranges})

    def to_json(self) -> str:
        """The calibration as JSON, to be kept beside the model. It tells the samples' largest magnitudes."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `to_json` wrote.

        Raises:
            DataError: it is not that: no JSON, another version, a key missing, unknown or given twice, a value of
                another type or out of range.
        """
        try:
            content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refused)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the calibration is not JSON as tacit writes it: {error}") from None
        _expect(content, {"version", "margin", "ranges"}, "a calibration")
        if type(content["version"]) is not int or content["version"] != VERSION:
            raise DataError(f"the calibration has version {content['version']!r}, this tacit reads {VERSION}")
        if not isinstance(content["ranges"], list) or not _is_number(content["margin"], 1):
            raise DataError("a calibration has a list of ranges, and a margin of 1 or more")
        ranges = tuple(_range(item) for item in content["ranges"])
        if len({one.name for one in ranges}) < len(ranges):
            raise DataError("the calibration has two ranges for one operator")
        return cls(float(content["margin"]), ranges)

    def __str__(self) -> str:
        lines = [f"{'operator':<44}{'largest':>12}{'chunks':>8}{'bound':>12}{'margin':>10}"]
        for one in self.ranges:
            ratio = one.bound / one.largest if one.largest else math.inf
            name = f"{one.name} ({one.operator})"
            lines.append(f"{name:<44}{one.largest:>12.4g}{one.chunks:>8}{one.bound:>12.4g}{ratio:>10.1f}")
        return "\n".join(lines)


def calibrate(model: Model, inputs: Sequence[Tensor], context: Context, margin: float = 4.0) -> Calibration:
    """Choose the smallest window for every operator that compares.

    Args:
        model: the simplified program and its state, in the clear.
        inputs: sample inputs, float32; the more they resemble later ones, the more the result is worth.
        context: the engine's settings; ``chunks`` is the largest window, taken also where it holds less than the
            margin asks for.
        margin: a window holds this many times the largest magnitude among the samples; 1 or more.

    Returns:
        The windows; they hold for every batch size.

    Raises:
        InputError: the margin is below 1.
        RangeError: a value among the samples does not fit the largest window.
    """
    if not _is_number(margin, 1):
        raise InputError(f"a margin of {margin} would leave samples outside: 1 or more")
    values = interpret(model, inputs)
    ranges = []
    for node in model.graph.nodes:
        largest = largest_compared(node, values)
        if largest is None:
            continue
        if not largest < window_bound(context.chunks):
            bound = f"the largest window of {context.chunks} chunks holds {window_bound(context.chunks):.6g}"
            raise RangeError(f"{node.name} ({node.operator}) compares larger values than it can: {bound}")
        # Samples on which it is always zero say nothing about an operator.
        sizes = (chunks for chunks in range(1, context.chunks) if window_bound(chunks) >= margin * largest > 0)
        ranges.append(Range(node.name, node.operator, largest, next(sizes, context.chunks)))
    return Calibration(float(margin), tuple(ranges))


def _range(item: Any) -> Range:
    _expect(item, {field.name for field in fields(Range)}, "a range")
    texts = all(isinstance(item[key], str) and item[key] for key in ("name", "operator"))
    chunks = item["chunks"]
    if not texts or type(chunks) is not int or not 1 <= chunks <= MAX_CHUNKS or not _is_number(item["largest"], 0):
        raise DataError(f"a range has a name, an operator, a largest magnitude and 1 to {MAX_CHUNKS} chunks")
    return Range(item["name"], item["operator"], float(item["largest"]), chunks)


def _expect(content: Any, keys: set[str], what: str) -> None:
    if not isinstance(content, dict) or content.keys() != keys:
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{what} has the keys {sorted(keys)}, not {found}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is given twice")
    return content


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _is_number(value: Any, least: float) -> bool:
    return type(value) in (int, float) and least <= value < _LARGEST
